"""Files from the network: resumable HTTP, checksums, the Hugging Face cache layout, and unpacking zips with care.

    download("https://host/images.zip", "data/images.zip", sha256="9f86d0...")     # any file on any web server
    hf_file("openai-community/gpt2", "config.json")                                # -> Path in the shared hub cache
    extract_zip("data/images.zip", "data/images")

A file gets its final name only when it is whole and checked, so "the file is there" always means "the file is good".
The cache is huggingface_hub's own (same folders, same locks): what transformers downloaded is found here without any
request, and the reverse. Unlike that library we do NOT ask whether `main` has moved on once a copy is cached, so a run
that worked once works offline. Left out: Xet, uploads, parallel parts, ~/.netrc. Links of strangers are for web.py,
which shares the first part below. Each protection against a bad server or file is marked `Guard:` where it stands.
"""
import contextlib
import email.utils
import errno
import hashlib
import http.client
import math
import os
import re
import shutil
import stat
import struct
import sys
import time
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from urllib.parse import quote, urljoin, urlsplit

import requests

from .config import UserError

try:
    import fcntl
except ImportError:                     # Windows; see _take
    fcntl = None

CHUNK = 1 << 20
KEPT_HEADERS = ("Accept-Encoding", "User-Agent", "Range", "If-Range")           # across origins: nothing secret


# When to try again, and one process at a time: shared with web.py.

class DownloadError(UserError):
    """One sentence: the address, what went wrong, and where to put the file by hand."""


class Fault(UserError):
    """Why one attempt failed. again: it may pass; wait: seconds the server asked for; answer: its response, if any."""

    def __init__(self, reason, again=False, wait=None, answer=None):
        super().__init__(reason)
        self.again, self.wait, self.status = again, wait, getattr(answer, "status_code", None)
        self.head = answer.headers if answer is not None else {}


@dataclass(frozen=True)
class Limits:
    """How much to put up with; every field is a keyword of download() and hf_file()."""
    max_bytes: int = 100 * 10**9        # a larger body is refused, announced or not
    timeout: float = 30                 # seconds without a single byte that end an attempt
    stall: float = 120                  # seconds at under 1 kB/s that end an attempt
    max_seconds: float = math.inf       # for everything together, waiting included
    tries: int = 5                      # failures in a row that are final; a megabyte gained starts a new row
    max_wait: float = 300               # the longest Retry-After we obey
    sleep: object = time.sleep          # tests put a list's append here and never wait
    show: bool = True                   # progress on stderr


def number(text):
    """'123' -> 123; anything else that a header may hold -> None."""
    return int(text) if re.fullmatch("[0-9]{1,18}", text or "") else None


def origin(url):
    """(scheme, host, port), what a secret is meant for: 'http://A/x' -> ('http', 'a', 80). Raises Fault."""
    try:
        parts = urlsplit(url)
        found = parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}[parts.scheme]
    except (ValueError, KeyError):
        found = None, None, None
    if not found[1]:
        raise Fault(f"{url!r} is not an http or https address")
    return found


def may_pass(status, head):
    """(is another try worth it, seconds the server asks us to wait or None): 429 with Retry-After 7 -> (True, 7)."""
    asked = head.get("Retry-After", "").strip()
    wait = number(asked)                                        # seconds, or a date
    if wait is None and (date := email.utils.parsedate_tz(asked)):
        with contextlib.suppress(ValueError, OverflowError):
            wait = max(0, email.utils.mktime_tz(date) - time.time())
    return status in (408, 429) or status >= 500, wait


def persist(attempt, limits, deadline, gained=lambda: 0):
    """Call attempt() until it returns, or raise its last Fault. Pauses: 0.5, 1, 2, 4 s, or what the server asked for.

    gained(): bytes so far. A long file over a bad line fails often but gets on, so only failures in a row count.
    """
    failures, best = 0, gained()
    while True:
        try:
            return attempt()
        except Fault as fault:
            if gained() >= best + CHUNK:
                failures, best = 0, gained()
            failures += 1
            wait = 0.25 * 2**failures if fault.wait is None else min(fault.wait, limits.max_wait)
            if not fault.again or failures >= limits.tries or time.monotonic() + wait > deadline:
                raise
            if wait > 5 and limits.show:
                print(f"{fault}; next try in {wait:.0f} s", file=sys.stderr)
            limits.sleep(wait)


@contextlib.contextmanager
def locked(path, keep=False):
    """`with locked(path):` lets one process in at a time; the others wait. The file goes afterwards, unless `keep`.

    The kernel drops a lock with its process, so a crash leaves none. Whoever waited while the owner removed the file
    then holds a file without a name, which excludes nobody who comes later: it begins anew.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    ours = False
    while not ours:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _take(handle, path)
            with contextlib.suppress(FileNotFoundError):
                ours = keep or os.path.samestat(os.fstat(handle), os.stat(path))
            if ours:
                try:
                    yield
                finally:
                    if not keep:
                        path.unlink(missing_ok=True)
        finally:
            os.close(handle)


def _take(handle, path):
    """Wait for the lock. Where there is none (Windows, some network disks) that is said, and we go on without."""
    try:
        if fcntl is None:
            raise OSError(errno.ENOSYS, "no locks")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that holds {path}", file=sys.stderr)
            fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        print(f"{path.parent} has no file locks: do not run two downloads at once", file=sys.stderr)


# One file.

@contextlib.contextmanager
def _one_sentence(url, by_hand):
    """Whatever fails inside becomes one DownloadError. Ctrl-C passes, and leaves the part for next time."""
    try:
        yield
        return
    except Fault as fault:
        reason = str(fault)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "the disk is full" if full else f"{error.filename or by_hand}: {error.strerror or error}"
    url = re.sub(r"//[^/?#]*@", "//", str(url))                 # Guard: a password in the address stays out of logs
    raise DownloadError(f"cannot fetch {url}: {reason}; try again, or put the file at {by_hand} by hand")


class _Progress:
    """`gpt2.zip  12.0 of 548.1 MB  9.8 MB/s  0:54 left` on stderr: redrawn on a terminal, else a line every 30 s."""

    def __init__(self, name, done, total, show):
        self.name, self.start, self.total, self.live = name, done, total, sys.stderr.isatty()
        self.began = self.last = time.monotonic()
        self.pause = math.inf if not show else 0.2 if self.live else 30

    def __call__(self, done, final=False):
        now = time.monotonic()
        if now - self.last < self.pause and not (final and self.last > self.began):
            return                      # so a transfer too short for a line gets no last line either
        rate, self.last = max(done - self.start, 1) / (now - self.began + 1e-9), now
        of = f" of {self.total / 1e6:.1f}" if self.total else ""
        text = f"{self.name}  {done / 1e6:.1f}{of} MB  {rate / 1e6:.1f} MB/s"
        if of and not final:
            text += "  {}:{:02d} left".format(*divmod(int((self.total - done) / rate), 60))
        if self.live:
            text = f"\r{text}\x1b[K"                            # ESC [K wipes what a longer line left behind
        print(text, end="" if self.live and not final else "\n", file=sys.stderr, flush=True)


def _digest(path, like):
    """Checksum of a file, of the kind `like` is: 64 hex digits are sha256, 40 a git blob id.

    git: sha1(b"blob 6\\0" + b"hello\\n") = ce013625030ba8dba906f756967f9e9ca394464a
    """
    made = hashlib.sha256() if len(like) == 64 else hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with open(path, "rb") as file:
        while block := file.read(CHUNK):
            made.update(block)
    return made.hexdigest()


def _open(session, method, url, headers, timeout, stay=lambda answer, there: False):
    """The answer to one request, after at most ten redirects; it is not read yet. Raises Fault.

    requests could follow by itself, but it carries every header but Authorization to the next host, and reads the body
    of a redirect whole. stay(answer, there): end the walk here, on a redirect.
    """
    first = origin(url)
    for _ in range(11):
        if origin(url) != first:        # Guard: a token (or cookie, or key) goes to the first origin only
            headers = {name: value for name, value in headers.items() if name in KEPT_HEADERS}
        login = requests.utils.get_auth_from_url(url)
        try:
            # An auth that does nothing keeps requests from replacing our Authorization by a line of ~/.netrc.
            answer = session.request(method, url, headers=headers, stream=True, allow_redirects=False,
                                     timeout=(min(10, timeout), timeout), auth=login if any(login) else lambda r: r)
        except (requests.RequestException, ValueError) as error:
            final = isinstance(error, (requests.exceptions.SSLError, requests.exceptions.ProxyError))
            passing = isinstance(error, (requests.Timeout, requests.ConnectionError)) and not final
            raise Fault(f"{urlsplit(url).hostname} cannot be reached ({type(error).__name__})", again=passing)
        there = session.get_redirect_target(answer)
        if there is None or stay(answer, there):
            return answer
        answer.close()
        try:
            url = urljoin(url, there)
        except ValueError:                                      # such as http://[
            raise Fault(f"the server redirects to {there!r}, which is no address") from None
    raise Fault("more than 10 redirects")


def _refusal(answer):
    """The Fault for a status that is no success."""
    code = answer.status_code
    phrase = f"the server answers {code} {http.client.responses.get(code, '')}".rstrip()
    return Fault(phrase, *may_pass(code, answer.headers), answer)


class _Transfer:
    """One address into one file: `path.incomplete` grows over any number of attempts, is checked, then renamed.

    Guard: without a checksum a part is continued only when `path.incomplete.note` (ETag or date, full size) agrees with
    the server's answer; with one, any part may be, since a wrong mixture cannot pass. A server that names neither ETag
    nor date leaves the size as the only sign of change.
    """

    def __init__(self, url, path, checksum, size, headers, limits, name=None):
        self.url, self.path, self.size, self.limits, self.name = url, path, size, limits, name or path.name
        self.checksum = checksum and checksum.lower()
        self.headers = {"User-Agent": "tinyvlm", **(headers or {}), "Accept-Encoding": "identity"}   # lengths: bytes
        self.part, self.note = Path(f"{path}.incomplete"), Path(f"{path}.incomplete.note")
        self.deadline = time.monotonic() + limits.max_seconds

    def run(self):
        """Fetch unless finished, check, rename. A part that spoils the checksum gets one more chance, from byte 0."""
        if self.finished(self.path):
            return
        with requests.Session() as session:
            for last in (False, True):
                start = persist(lambda: self.attempt(session), self.limits, self.deadline, self.have)
                if self.finished(self.part):
                    os.replace(self.part, self.path)            # Guard: the name appears with the whole file behind it
                    return self.note.unlink(missing_ok=True)
                found = self.checksum and _digest(self.part, self.checksum)
                fault = self.discard(f"expected checksum {self.checksum}, got {found}")
                if last or start == 0:
                    raise fault

    def finished(self, path):
        """Is the file there, with the size and the checksum we know of?"""
        there = path.exists() and self.size in (None, path.stat().st_size)
        return there and self.checksum in (None, self.checksum and _digest(path, self.checksum))

    def have(self):
        return self.part.stat().st_size if self.part.exists() else 0

    def discard(self, reason="", **kind):
        """Drop the part; the Fault is for the caller to raise."""
        self.part.unlink(missing_ok=True)
        self.note.unlink(missing_ok=True)
        return Fault(reason, **kind)

    def attempt(self, session):
        """One request that brings the part to its full length. Returns the byte it began at; raises Fault."""
        tag, _, total = (self.note.read_text("utf-8") if self.note.exists() else "").partition("\n")
        start, headers = self.have() if self.checksum or tag or total else 0, dict(self.headers)
        if start:
            headers["Range"] = f"bytes={start}-"
            if tag and not tag.startswith("W/") and not self.checksum:      # "the rest, if it is still that file";
                headers["If-Range"] = tag                       # a weak tag is not allowed here, but we compare it
        timeout = max(0.01, min(self.limits.timeout, self.deadline - time.monotonic()))
        with _open(session, "GET", self.url, headers, timeout) as answer:
            start, known = self.place(answer, start, tag, total)
            if known is None or start < known:
                self.pour(answer, start, known)
        return start

    def place(self, answer, start, tag, total):
        """Read the head of an answer: (byte where its body belongs, full size or None). A 200 empties the part."""
        code, head = answer.status_code, answer.headers
        now = head.get("ETag") or head.get("Last-Modified", "")
        packed = head.get("Content-Encoding", "identity") != "identity"         # lengths then mean other bytes
        if code == 200:                 # all of it, asked for or not
            start, known = 0, None if packed else number(head.get("Content-Length"))
        elif code in (206, 416) and start:                      # the rest; or "there is nothing from that byte on"
            span = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", head.get("Content-Range", ""))
            known = number(span and span[2])
            same = self.checksum or (now in ("", tag) and str(known or "") == total)
            if same and code == 416 and known == start:         # whole already, only the rename was missing
                return start, start
            if not same or code == 416 or not span or number(span[1]) != start:
                raise self.discard("the file on the server changed, or it cannot send a part", again=True, wait=0)
        else:
            raise _refusal(answer)
        if known is not None and self.size not in (None, known):
            raise Fault(f"it has {known} bytes where {self.size} were expected")
        known = self.size if known is None else known
        need, free = (known or 0), shutil.disk_usage(self.part.parent).free
        if need > self.limits.max_bytes:                        # Guard: size as announced; pour() counts what comes
            raise Fault(f"its {known} bytes exceed the limit of {self.limits.max_bytes}")
        if need - start > free:
            raise Fault(f"it needs {(need - start) / 1e9:.3f} GB of disk where {free / 1e9:.3f} GB are free")
        if code == 200:
            self.discard()
            self.part.touch()
            if not self.checksum and not packed:
                self.note.write_text(f"{now}\n{'' if known is None else known}", "utf-8")
        return start, known

    def pour(self, answer, start, known):
        """Append the body to the part, watching size, pace and time."""
        have, since, mark = start, time.monotonic(), start
        limit = self.limits.max_bytes if known is None else known
        progress = _Progress(self.name, have, known, self.limits.show)
        with open(self.part, "ab") as file:
            try:
                # read1 returns what has arrived; read would sit on a trickle until a whole chunk is there.
                while have <= limit and (chunk := answer.raw.read1(CHUNK, decode_content=True)):
                    file.write(chunk)
                    have, now = have + len(chunk), time.monotonic()
                    progress(have)
                    if now > self.deadline:                     # Guard: time; one byte a second never times out
                        raise Fault(f"not done within {self.limits.max_seconds:.0f} s ({have} bytes so far)")
                    if now - since > self.limits.stall:
                        if have - mark < 1000 * (now - since):
                            raise Fault(f"under 1 kB/s for {self.limits.stall:.0f} s, at byte {have}", again=True)
                        since, mark = now, have
            except requests.packages.urllib3.exceptions.HTTPError:      # raw reads are urllib3's, below requests
                raise Fault(f"the connection broke after {have} bytes" + (f" of {known}" if known else ""), again=True)
            finally:
                progress(have, final=True)
            file.flush()
            os.fsync(file.fileno())
        if have > limit:
            raise self.discard(f"it sends more than the {limit} bytes allowed")
        if known is not None and have != known:
            raise Fault(f"it ended after {have} of {known} bytes", again=True)


def download(url, path, sha256=None, size=None, headers=None, **limits):
    """Fetch `url` to `path` and return the Path; see Limits for the other keywords.

    A file already at `path` is kept as it is, without a request, unless it has another `sha256` or `size` (bytes): a
    file only gets that name once complete. An interrupted transfer continues from `path.incomplete`. `headers` (say, a
    token) go to the origin of `url` only, not along with a redirect to another host. Raises DownloadError.
    """
    path = Path(path)
    with _one_sentence(url, path):
        origin(url)
        if sha256 and not re.fullmatch("[0-9a-fA-F]{64}", sha256):
            raise Fault(f"sha256={sha256!r} is not 64 hex digits")
        if path.is_dir():
            raise Fault(f"{path} is a folder, and a file name is needed")
        transfer = _Transfer(url, path, sha256, size, headers, Limits(**limits))
        if not transfer.finished(path):
            with locked(Path(f"{path}.lock")):
                transfer.run()                                  # looks again: another process may have done it
    return path


# The Hugging Face hub: models--org--name/{refs/main, blobs/<etag>, snapshots/<commit>/<file> -> ../../blobs/<etag>}

def _setting(*names, default=None):
    """The first environment variable of `names` that is set, with ~ and $VARS filled in."""
    value = next((os.environ[n] for n in names if os.environ.get(n)), default)
    return value and os.path.expandvars(os.path.expanduser(value))


def _hf_home():
    return Path(_setting("HF_HOME") or Path(_setting("XDG_CACHE_HOME", default="~/.cache"), "huggingface"))


def _inside(name):
    """Can this relative path not leave its folder, on any system? 'a/b.txt' yes; '../a', '/a', 'C:a' no."""
    windows = PureWindowsPath(name)                             # knows drives and takes both kinds of slash
    return bool(windows.name) and not windows.anchor and ".." not in windows.parts and "\0" not in name


def _ask_hub(url, headers, limits):
    """Ask the hub itself, not the store it redirects to: (commit, etag, size or None). Raises Fault.

    The etag is the content's sha256 for a large file (X-Linked-Etag), git's blob id for a small one.
    """
    def stay(answer, there):
        # A relative redirect is a renamed repository (gpt2 -> openai-community/gpt2), one elsewhere is the content.
        return urlsplit(there).netloc and ("X-Repo-Commit" in answer.headers or origin(there) != origin(url))

    def attempt():
        with _open(session, "HEAD", url, {**headers, "Accept-Encoding": "identity"}, limits.timeout, stay) as answer:
            if answer.status_code >= 400:
                raise _refusal(answer)
            return answer

    with requests.Session() as session:
        answer = persist(attempt, limits, time.monotonic() + limits.max_seconds)
    head = answer.headers
    own = None if answer.is_redirect or "Content-Encoding" in head else head.get("Content-Length")
    commit, etag = head.get("X-Repo-Commit", ""), re.sub('^W/|"', "", head.get("X-Linked-Etag") or head.get("ETag", ""))
    if not all(re.fullmatch(r"\w[\w.-]*", text, re.ASCII) for text in (commit, etag)):  # Guard: both become file names
        raise Fault("the answer names no commit or no ETag, so this is no hub (is HF_ENDPOINT or a proxy at fault?)")
    return commit, etag, number(head.get("X-Linked-Size") or own)


def _hub_reason(fault, repo_id, filename, revision):
    """The hub's refusals in words; X-Error-Code says more than the status."""
    code = fault.head.get("X-Error-Code", fault.status)
    if fault.status in (401, 403) or code == "GatedRepo":
        return (f"{fault}, so {repo_id} is gated, private or misspelt: accept its terms on its web page and set the "
                "environment variable HF_TOKEN to a token that may read it")
    absent = f"repository {repo_id} has no file {filename} at revision {revision}"
    return {"RepoNotFound": f"there is no repository {repo_id} (or it is private and HF_TOKEN may not read it)",
            "RevisionNotFound": f"repository {repo_id} has no revision {revision}"
            }.get(code, absent if fault.status == 404 else str(fault))


def _remember(folder, revision, commit):
    """refs/<revision> holds the commit; left alone when right, for a cache may be read-only."""
    ref = folder / "refs" / revision
    if revision != commit and not (ref.is_file() and ref.read_text() == commit):
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(commit)


def _link(blob, pointer):
    """snapshots/<commit>/a/b -> ../../../blobs/<etag>; a copy where the system has no symbolic links."""
    pointer.parent.mkdir(parents=True, exist_ok=True)
    temporary = pointer.with_name(pointer.name + ".incomplete")
    temporary.unlink(missing_ok=True)
    try:
        os.symlink(os.path.relpath(blob, pointer.parent), temporary)
    except (OSError, NotImplementedError):
        shutil.copyfile(blob, temporary)
    os.replace(temporary, pointer)


def _hub_fetch(url, folder, filename, revision, limits):
    """The blob, then the link to it, under the lock file that huggingface_hub uses for this blob."""
    file = Path(_setting("HF_TOKEN_PATH") or _hf_home() / "token")
    token = _setting("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN") or (file.read_text() if file.is_file() else "")
    headers = {"Authorization": f"Bearer {token.strip()}"} if token.strip() else {}
    commit, etag, size = _ask_hub(url, headers, limits)
    blob, pointer = folder / "blobs" / etag, folder / "snapshots" / commit / filename
    checksum = etag if re.fullmatch("[0-9a-f]{64}|[0-9a-f]{40}", etag) else None
    blob.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.parent / ".locks" / folder.name / f"{etag}.lock", keep=True):
        _Transfer(url, blob, checksum, size, headers, limits, name=filename).run()
        if not pointer.is_file():
            _link(blob, pointer)
        _remember(folder, revision, commit)                     # last: a ref without its file would promise too much
    return pointer


def hf_file(repo_id, filename, revision="main", missing_ok=False, **limits):
    """The Path of one file of a hub repository, from the shared cache or else the network (then cached).

    revision: branch, tag, `refs/pr/32`, or a commit sha. With missing_ok a file that
    the repository does not have gives None instead of a DownloadError (offline: one that the cache does not have).
    Environment: HF_ENDPOINT, HF_TOKEN, HF_TOKEN_PATH, HF_HUB_CACHE, HF_HOME, HF_HUB_OFFLINE as for huggingface_hub.
    """
    if not re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]{0,95}", repo_id) or re.search(r"--|\.\.|\.git$|[.-](/|$)", repo_id):
        raise DownloadError(f"{repo_id!r} is no hub repository id; one looks like gpt2 or openai-community/gpt2")
    if not _inside(filename) or not _inside(revision) or "\\" in filename + revision:   # Guard: paths stay inside
        raise DownloadError(f"file {filename!r} at revision {revision!r} of {repo_id} must be plain relative paths")
    home = Path(_setting("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE") or _hf_home() / "hub")
    folder = home / f"models--{repo_id.replace('/', '--')}"
    ref = folder / "refs" / revision
    commit = ref.read_text().strip() if ref.is_file() else revision
    found = folder / "snapshots" / commit / filename
    if found.is_file():
        return found
    offline = any(os.environ.get(flag, "").upper() in ("1", "ON", "YES", "TRUE")
                  for flag in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
    if missing_ok and (offline or (folder / ".no_exist" / commit / filename).is_file()):
        return None
    endpoint = _setting("HF_ENDPOINT", default="https://huggingface.co").rstrip("/")
    url = f"{endpoint}/{repo_id}/resolve/{quote(revision, safe='')}/{quote(filename)}"
    with _one_sentence(url, found):
        if offline:
            raise Fault("it is not in the cache and HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE forbids the network")
        try:
            return _hub_fetch(url, folder, filename, revision, Limits(**limits))
        except Fault as fault:
            absent = fault.status == 404 and fault.head.get("X-Error-Code", "EntryNotFound") == "EntryNotFound"
            if absent and re.fullmatch(r"\w+", commit := fault.head.get("X-Repo-Commit", "")):
                marker = folder / ".no_exist" / commit / filename       # huggingface_hub's; the next call asks nobody
                marker.parent.mkdir(parents=True, exist_ok=True)
                marker.touch()
                _remember(folder, revision, commit)
            if not (absent and missing_ok):
                raise Fault(_hub_reason(fault, repo_id, filename, revision))
    return None


# Zips.

def extract_zip(zip_path, folder, max_bytes=200 * 10**9, max_files=2_000_000, max_ratio=200):
    """Unpack into `folder` and return its Path. A folder that was not there appears whole or not at all.

    Everything goes to `folder.incomplete` first; files of the same name in `folder` are replaced. Raises DownloadError.
    """
    zip_path, folder = Path(zip_path), Path(os.path.abspath(folder))
    work, done = folder.with_name(folder.name + ".incomplete"), 0
    try:
        with locked(folder.with_name(folder.name + ".lock")), zipfile.ZipFile(zip_path) as archive:
            # A Mac adds resource forks under __MACOSX/, which end in .jpg too.
            members = [m for m in archive.infolist() if not re.search(r"__MACOSX[/\\]|\.DS_Store$", m.filename)]
            total = _check_members(zip_path, members, folder, max_bytes, max_files, max_ratio)
            progress = _Progress(f"unpacking {zip_path.name}", 0, total, True)
            shutil.rmtree(work, ignore_errors=True)             # what a killed run left
            try:
                work.mkdir()
                for member in members:
                    member.filename = member.filename.replace("\\", "/")        # as some packers on Windows write
                    archive.extract(member, work)               # reading to the end checks the CRC
                    done += member.file_size
                    progress(done, final=member is members[-1])
                if folder.exists():
                    shutil.copytree(work, folder, dirs_exist_ok=True, copy_function=os.replace)     # renames, no copies
                else:
                    os.replace(work, folder)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, RuntimeError, ValueError) as error:
        raise DownloadError(f"{zip_path} is damaged or no plain zip ({error}): delete it and run again") from None
    except OSError as error:
        raise DownloadError(f"cannot unpack {zip_path} to {folder} ({error.strerror or error}): mend that or choose "
                            "another folder, then run again") from None
    return folder


def _check_members(zip_path, members, folder, max_bytes, max_files, max_ratio):
    """Refuse a dangerous zip before a byte is written; return its unpacked size in bytes.

    Guard: names that leave the folder, links, more than max_bytes or max_files, and zip bombs: over 100 MB that grow
    more than max_ratio times. Members lie about their size in vain: zipfile stops at the announced size, and then the
    CRC is wrong.
    """
    for member in members:
        kind = stat.S_IFMT(member.external_attr >> 16)          # Unix file type; 0 where the packer wrote none
        if not _inside(member.filename) or kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise DownloadError(f"{zip_path} holds {member.filename!r}, a link or outside its folder: do not use it")
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2):
            raise NotImplementedError(f"{member.filename!r} is packed by the rare method {member.compress_type}")
    total, packed = sum(m.file_size for m in members), sum(m.compress_size for m in members)
    if total > max_bytes or len(members) > max_files or total > max(10**8, max_ratio * packed):
        raise DownloadError(f"{zip_path} would unpack {packed} bytes to {total} in {len(members)} files, beyond the "
                            f"limits ({max_bytes} bytes, {max_files} files, {max_ratio} times): do not use it")
    if total > shutil.disk_usage(folder.parent).free:
        raise DownloadError(f"{zip_path} needs {total / 1e9:.1f} GB in {folder.parent}: free some space and run again")
    return total
