"""Files from the network: resumable HTTP, checksums, the Hugging Face cache layout, and unpacking zips with care.

    download("https://host/images.zip", "data/images.zip", sha256="9f86d0...")     # any file on any web server
    hf_file("openai-community/gpt2", "config.json")                                # -> Path in the shared hub cache
    extract_zip("data/images.zip", "data/images")

A file gets its final name only when it is whole and checked, so "the file is there" always means "the file is good".
The cache is huggingface_hub's own (same folders, same locks): what transformers downloaded is found here without any
request, and the reverse. Unlike that library we do NOT ask whether `main` has moved on once a copy is cached, so a run
that worked once works offline. Left out: Xet, uploads, parallel parts, ~/.netrc.
"""
import contextlib
import email.utils
import errno
import hashlib
import http.client
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
except ImportError:                                             # Windows
    fcntl = None
    import msvcrt

CHUNK = 1 << 20


class DownloadError(UserError):
    """One sentence: the address, what went wrong, and where to put the file by hand."""


class _Fault(Exception):
    """Why one attempt failed. again: it may pass; wait: seconds the server asked for; answer: its response, if any."""

    def __init__(self, reason, again=False, wait=None, answer=None):
        super().__init__(reason)
        self.again, self.wait, self.status = again, wait, getattr(answer, "status_code", None)
        self.head = answer.headers if answer is not None else {}


@dataclass(frozen=True)
class Limits:
    """How much to put up with; every field is a keyword of download(), fetch_first() and hf_file()."""
    max_bytes: int = 100 * 10**9        # a larger body is refused, announced or not
    timeout: float = 30                 # seconds without a single byte that end an attempt
    stall: float = 120                  # seconds at under 1 kB/s that end an attempt
    max_seconds: float = float("inf")   # for everything together, waiting included
    tries: int = 5                      # failures in a row that are final; a megabyte gained starts a new row
    max_wait: float = 300               # the longest Retry-After we obey
    sleep: object = time.sleep          # tests put a list's append here and never wait
    show: bool = True                   # progress on stderr


@contextlib.contextmanager
def _one_sentence(url, by_hand):
    """Whatever fails inside becomes one DownloadError. Ctrl-C passes, and leaves the part for next time."""
    try:
        yield
        return
    except _Fault as fault:
        reason = str(fault)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "the disk is full" if full else f"{error.filename or by_hand}: {error.strerror or error}"
    url = re.sub(r"//[^/?#]*@", "//", str(url))                 # a password in the address stays out of logs
    raise DownloadError(f"cannot fetch {url}: {reason}; try again, or put the file at {by_hand} by hand")


class _Progress:
    """`gpt2.zip  12.0 of 548.1 MB  9.8 MB/s  0:54 left` on stderr: redrawn on a terminal, else a line every 30 s."""

    def __init__(self, name, done, total, show):
        self.name, self.start, self.total, self.tty = name, done, total, sys.stderr.isatty()
        self.began = self.last = time.monotonic()
        self.pause = float("inf") if not show else 0.2 if self.tty else 30

    def __call__(self, done, final=False):
        now, drawn = time.monotonic(), self.last > self.began
        if now - self.last < self.pause and not (final and drawn):
            return
        rate, self.last = max(done - self.start, 1) / (now - self.began + 1e-9), now
        left = divmod(int((self.total - done) / rate), 60) if self.total else None
        text = f"{self.name}  {done / 1e6:.1f}{f' of {self.total / 1e6:.1f}' if left else ''} MB  {rate / 1e6:.1f} MB/s"
        text += f"  {left[0]}:{left[1]:02d} left" if left and not final else ""
        tty = ("\r", "\x1b[K") if self.tty else ("", "")        # ESC [K wipes what a longer line left behind
        print(text.join(tty), end="" if self.tty and not final else "\n", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _locked(path, keep=False):
    """One process at a time; the others wait. The kernel drops a lock with its process, so a crash leaves none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    told = False
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if fcntl:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            else:
                msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
            if keep or os.path.samestat(os.fstat(handle), os.stat(path)):
                break                                           # else: the last owner removed the file we just locked
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                print(f"{path.parent} has no file locks: do not run two downloads at once", file=sys.stderr)
                break
            if error.errno not in (errno.EAGAIN, errno.EACCES, errno.EDEADLK, errno.ENOENT):
                os.close(handle)
                raise
            if not told and error.errno != errno.ENOENT:
                print(f"waiting for another process that holds {path}", file=sys.stderr)
                told = True
        os.close(handle)
        time.sleep(0.05)
    try:
        yield
    finally:
        if not keep:
            with contextlib.suppress(OSError):                  # Windows will not remove a file that others hold open
                os.unlink(path)
        os.close(handle)


def _digest(path, like):
    """Checksum of a file, of the kind `like` is: 64 hex digits are sha256, 40 a git blob id.

    git: sha1(b"blob 6\\0" + b"hello\\n") = ce013625030ba8dba906f756967f9e9ca394464a
    """
    made = hashlib.sha256() if len(like) == 64 else hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with open(path, "rb") as file:
        while block := file.read(CHUNK):
            made.update(block)
    return made.hexdigest()


def _number(text):
    """'123' -> 123; anything else that a header may hold -> None."""
    return int(text) if re.fullmatch("[0-9]{1,18}", text or "") else None


def _origin(url):
    """(scheme, host, port), what a secret is meant for: 'http://A/x' -> ('http', 'a', 80)."""
    try:
        parts = urlsplit(url)
        origin = parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}[parts.scheme]
    except (ValueError, KeyError):
        origin = None, None, None
    if not origin[1]:
        raise _Fault(f"{url!r} is not an http or https address")
    return origin


def _open(session, method, url, headers, timeout, stay=lambda answer, there: False):
    """One request, at most ten redirects followed by hand; leaving the first origin drops all headers but four.

    requests itself drops only Authorization, and reads a redirect's body whole. `stay` may end the walk early.
    """
    first = _origin(url)
    for _ in range(11):
        if _origin(url) != first:
            headers = {k: v for k, v in headers.items() if k in ("Accept-Encoding", "User-Agent", "Range", "If-Range")}
        login = requests.utils.get_auth_from_url(url)
        try:
            # An auth that does nothing keeps requests from replacing our Authorization by a line of ~/.netrc.
            answer = session.request(method, url, headers=headers, stream=True, allow_redirects=False,
                                     timeout=(min(10, timeout), timeout), auth=login if any(login) else lambda r: r)
        except (requests.RequestException, ValueError) as error:
            final = isinstance(error, (requests.exceptions.SSLError, requests.exceptions.ProxyError))
            passing = isinstance(error, (requests.Timeout, requests.ConnectionError)) and not final
            raise _Fault(f"{urlsplit(url).hostname} cannot be reached ({type(error).__name__})", again=passing)
        there = session.get_redirect_target(answer)
        if there is None or stay(answer, there):
            return answer
        answer.close()
        url = urljoin(url, there)
    raise _Fault("more than 10 redirects")


def _refusal(answer, limits):
    """The _Fault for a status that is no success: 408, 429 and 5xx may pass, the others will not."""
    code, asked = answer.status_code, answer.headers.get("Retry-After", "").strip()
    wait = _number(asked)                                       # seconds, or a date
    if wait is None and (date := email.utils.parsedate_tz(asked)):
        with contextlib.suppress(ValueError, OverflowError):
            wait = max(0, email.utils.mktime_tz(date) - time.time())
    phrase = f"the server answers {code} {http.client.responses.get(code, '')}".rstrip()
    again = code in (408, 429) or code >= 500
    return _Fault(phrase, again, wait if wait is None else min(wait, limits.max_wait), answer)


def _persist(attempt, limits, deadline, gained=lambda: 0):
    """Call attempt() until it returns. Pauses of 0.5, 1, 2, 4 s, or what the server asked for; then it is final."""
    failures, best = 0, gained()
    while True:
        try:
            return attempt()
        except _Fault as fault:
            if gained() >= best + CHUNK:
                failures, best = 0, gained()
            failures += 1
            wait = 0.25 * 2**failures if fault.wait is None else fault.wait
            if not fault.again or failures >= limits.tries or time.monotonic() + wait > deadline:
                raise
            if wait > 5 and limits.show:
                print(f"{fault}; next try in {wait:.0f} s", file=sys.stderr)
            limits.sleep(wait)


class _Transfer:
    """One address into one file: `path.incomplete` grows over any number of attempts, is checked, then renamed.

    Without a checksum a part is continued only when `path.incomplete.note` (ETag or date, full size) agrees with the
    server's answer; with one, any part may be, since a wrong mixture cannot pass. A server that names neither ETag nor
    date leaves the size as the only sign of change.
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
                start = _persist(lambda: self.attempt(session), self.limits, self.deadline, self.have)
                if self.finished(self.part):
                    os.replace(self.part, self.path)
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
        """Drop the part; the _Fault is for the caller to raise."""
        self.part.unlink(missing_ok=True)
        self.note.unlink(missing_ok=True)
        return _Fault(reason, **kind)

    def attempt(self, session):
        """One request that brings the part to its full length. Returns the byte it began at; raises _Fault."""
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
        span = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", head.get("Content-Range", ""))
        known = _number(span and span[2])
        now = head.get("ETag") or head.get("Last-Modified", "")
        if code in (206, 416) and start:
            same = self.checksum or (now in ("", tag) and str(known or "") == total)
            if same and code == 416 and known == start:         # whole already, only the rename was missing
                return start, start
            if not same or code == 416 or not span or _number(span[1]) != start:
                raise self.discard("the file on the server changed, or it cannot send a part", again=True, wait=0)
        elif code == 200:
            packed = head.get("Content-Encoding", "identity") != "identity"     # lengths then mean other bytes
            start, known = 0, None if packed else _number(head.get("Content-Length"))
        else:
            raise _refusal(answer, self.limits)
        if known is not None and self.size not in (None, known):
            raise _Fault(f"it has {known} bytes where {self.size} were expected")
        known = self.size if known is None else known
        need, free = (known or 0), shutil.disk_usage(self.part.parent).free
        if need > self.limits.max_bytes:
            raise _Fault(f"its {known} bytes exceed the limit of {self.limits.max_bytes}")
        if need - start > free:
            raise _Fault(f"it needs {(need - start) / 1e9:.3f} GB of disk where {free / 1e9:.3f} GB are free")
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
                    if now > self.deadline:
                        raise _Fault(f"not done within {self.limits.max_seconds:.0f} s ({have} bytes so far)")
                    if now - since > self.limits.stall:
                        if have - mark < 1000 * (now - since):
                            raise _Fault(f"under 1 kB/s for {self.limits.stall:.0f} s, at byte {have}", again=True)
                        since, mark = now, have
            except requests.packages.urllib3.exceptions.HTTPError:      # raw reads are urllib3's, below requests
                raise _Fault(f"the connection broke after {have} bytes" + (f" of {known}" if known else ""), again=True)
            finally:
                progress(have, final=True)
            file.flush()
            os.fsync(file.fileno())
        if have > limit:
            raise self.discard(f"it sends more than the {limit} bytes allowed")
        if known is not None and have != known:
            raise _Fault(f"it ended after {have} of {known} bytes", again=True)


def download(url, path, sha256=None, size=None, headers=None, **limits):
    """Fetch `url` to `path` and return the Path; see Limits for the other keywords.

    A file already at `path` is kept as it is, without a request, unless it has another `sha256` or `size` (bytes): a
    file only gets that name once complete. An interrupted transfer continues from `path.incomplete`. `headers` (say, a
    token) go to the origin of `url` only, not along with a redirect to another host. Raises DownloadError.
    """
    path = Path(path)
    with _one_sentence(url, path):
        _origin(url)
        if sha256 and not re.fullmatch("[0-9a-fA-F]{64}", sha256):
            raise _Fault(f"sha256={sha256!r} is not 64 hex digits")
        if path.is_dir():
            raise _Fault(f"{path} is a folder, and a file name is needed")
        transfer = _Transfer(url, path, sha256, size, headers, Limits(**limits))
        if not transfer.finished(path):
            with _locked(Path(f"{path}.lock")):
                transfer.run()                                  # looks again: another process may have done it
    return path


def fetch_first(urls, path, sha256=None, **options):
    """download() from the first of several mirrors that works; if none does, one DownloadError with every reason."""
    reasons = []
    for url in urls:
        try:
            return download(url, path, sha256, **options)
        except DownloadError as error:
            reasons.append(str(error).rpartition("; try again")[0])
    raise DownloadError(f"{', and '.join(reasons) or 'no address given'}; try again, or put the file at {path} by hand")


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
    """Ask the hub itself, not the store it redirects to: (commit, etag, size or None). Raises _Fault."""
    def stay(answer, there):
        # A relative redirect is a renamed repository (gpt2 -> openai-community/gpt2), one elsewhere is the content.
        return urlsplit(there).netloc and ("X-Repo-Commit" in answer.headers or _origin(there) != _origin(url))

    def attempt():
        with _open(session, "HEAD", url, {**headers, "Accept-Encoding": "identity"}, limits.timeout, stay) as answer:
            if answer.status_code >= 400:
                raise _refusal(answer, limits)
            return answer

    with requests.Session() as session:
        answer = _persist(attempt, limits, time.monotonic() + limits.max_seconds)
    head = answer.headers
    own = None if answer.is_redirect or "Content-Encoding" in head else head.get("Content-Length")
    commit, etag = head.get("X-Repo-Commit", ""), head.get("X-Linked-Etag") or head.get("ETag", "")
    etag = re.sub('^W/|"', "", etag)
    if not all(re.fullmatch(r"\w[\w.-]*", text, re.ASCII) for text in (commit, etag)):      # both become file names
        raise _Fault("the answer names no commit or no ETag, so this is no hub (is HF_ENDPOINT or a proxy at fault?)")
    return commit, etag, _number(head.get("X-Linked-Size") or own)


def _hub_reason(fault, repo_id, filename, revision):
    """The hub's refusals in words; X-Error-Code says more than the status."""
    code = fault.head.get("X-Error-Code")
    if fault.status in (401, 403) or code == "GatedRepo":
        return (f"{fault}, so {repo_id} is gated, private or misspelt: accept its terms on its web page and set the "
                "environment variable HF_TOKEN to a token that may read it")
    if code == "RepoNotFound":
        return f"there is no repository {repo_id} (or it is private and HF_TOKEN may not read it)"
    if code == "RevisionNotFound":
        return f"repository {repo_id} has no revision {revision}"
    return f"repository {repo_id} has no file {filename} at revision {revision}" if fault.status == 404 else str(fault)


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


def _hub_fetch(url, home, name, filename, revision, limits):
    """The blob, then the link to it, under the lock file that huggingface_hub uses for this blob."""
    token = _setting("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
    file = Path(_setting("HF_TOKEN_PATH") or _hf_home() / "token")
    token = (token or (file.read_text() if file.is_file() else "")).strip()
    headers, folder = {"Authorization": f"Bearer {token}"} if token else {}, home / name
    commit, etag, size = _ask_hub(url, headers, limits)
    blob, pointer = folder / "blobs" / etag, folder / "snapshots" / commit / filename
    checksum = etag if re.fullmatch("[0-9a-f]{64}|[0-9a-f]{40}", etag) else None
    blob.parent.mkdir(parents=True, exist_ok=True)
    with _locked(home / ".locks" / name / f"{etag}.lock", keep=True):
        _Transfer(url, blob, checksum, size, headers, limits, name=filename).run()
        if not pointer.is_file():
            _link(blob, pointer)
        _remember(folder, revision, commit)                     # last: a ref without its file would promise too much
    return pointer


def hf_file(repo_id, filename, revision="main", repo_type="model", missing_ok=False, **limits):
    """The Path of one file of a hub repository, from the shared cache or else the network (then cached).

    revision: branch, tag, `refs/pr/32`, or a commit sha; repo_type: "model" or "dataset". With missing_ok a file that
    the repository does not have gives None instead of a DownloadError (offline: one that the cache does not have).
    Environment: HF_ENDPOINT, HF_TOKEN, HF_TOKEN_PATH, HF_HUB_CACHE, HF_HOME, HF_HUB_OFFLINE as for huggingface_hub.
    """
    assert repo_type in ("model", "dataset", "space"), f"repo_type {repo_type!r} is none of model, dataset, space"
    if not re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]{0,95}", repo_id) or re.search(r"--|\.\.|\.git$|[.-](/|$)", repo_id):
        raise DownloadError(f"{repo_id!r} is no hub repository id; one looks like gpt2 or openai-community/gpt2")
    if not _inside(filename) or not _inside(revision) or "\\" in filename + revision:
        raise DownloadError(f"file {filename!r} at revision {revision!r} of {repo_id} must be plain relative paths")
    home = Path(_setting("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE") or _hf_home() / "hub")
    name = f"{repo_type}s--{repo_id.replace('/', '--')}"
    folder, ref = home / name, home / name / "refs" / revision
    commit = ref.read_text().strip() if ref.is_file() else revision
    found = folder / "snapshots" / commit / filename
    if found.is_file():
        return found
    flags = os.environ.get("HF_HUB_OFFLINE", ""), os.environ.get("TRANSFORMERS_OFFLINE", "")
    offline = any(flag.upper() in ("1", "ON", "YES", "TRUE") for flag in flags)
    if missing_ok and (offline or (folder / ".no_exist" / commit / filename).is_file()):
        return None
    endpoint = _setting("HF_ENDPOINT", default="https://huggingface.co").rstrip("/")
    kind = "" if repo_type == "model" else f"{repo_type}s/"
    url = f"{endpoint}/{kind}{repo_id}/resolve/{quote(revision, safe='')}/{quote(filename)}"
    with _one_sentence(url, found):
        if offline:
            raise _Fault("it is not in the cache and HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE forbids the network")
        try:
            return _hub_fetch(url, home, name, filename, revision, Limits(**limits))
        except _Fault as fault:
            absent = fault.status == 404 and fault.head.get("X-Error-Code", "EntryNotFound") == "EntryNotFound"
            if absent and re.fullmatch(r"\w+", commit := fault.head.get("X-Repo-Commit", "")):
                marker = folder / ".no_exist" / commit / filename
                marker.parent.mkdir(parents=True, exist_ok=True)
                marker.touch()
                _remember(folder, revision, commit)
            if not (absent and missing_ok):
                raise _Fault(_hub_reason(fault, repo_id, filename, revision))
    return None


def extract_zip(zip_path, folder, max_bytes=200 * 10**9, max_files=2_000_000, max_ratio=200, show=True):
    """Unpack into `folder` and return its Path. A folder that was not there appears whole or not at all.

    Everything goes to `folder.incomplete` first; files of the same name in `folder` are replaced. Refused before a byte
    is written: names that leave the folder, links, more than max_bytes or max_files, or over 100 MB that grow more than
    max_ratio times (a zip bomb). Members lie about their size in vain: zipfile stops at the announced size, and then
    the CRC is wrong. Raises DownloadError.
    """
    zip_path, folder = Path(zip_path), Path(os.path.abspath(folder))
    work, done = folder.with_name(folder.name + ".incomplete"), 0
    try:
        with _locked(folder.with_name(folder.name + ".lock")), zipfile.ZipFile(zip_path) as archive:
            # A Mac adds resource forks under __MACOSX/, which end in .jpg too.
            members = [m for m in archive.infolist() if not re.search(r"__MACOSX[/\\]|\.DS_Store$", m.filename)]
            total = _check_members(zip_path, members, folder, max_bytes, max_files, max_ratio)
            shutil.rmtree(work, ignore_errors=True)             # what a killed run left
            progress = _Progress(f"unpacking {zip_path.name}", 0, total, show)
            try:
                work.mkdir()
                for member in members:
                    _unpack(archive, member, work)
                    done += member.file_size
                    progress(done)
                progress(done, final=True)
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
    """Refuse a dangerous zip; return its unpacked size in bytes."""
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


def _unpack(archive, member, work):
    """Write one member below `work`; reading to its end checks the CRC."""
    target = work / member.filename.replace("\\", "/")
    if member.filename[-1] in "/\\":
        return target.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    with archive.open(member) as source, open(target, "wb") as file:
        shutil.copyfileobj(source, file, CHUNK)
