"""Files from the network: resumable HTTP with checksums, the Hugging Face cache layout, and unpacking zips with care.

    download("https://host/images.zip", "data/images.zip", sha256="9f86d0...")     # any file on any web server
    hf_file("openai-community/gpt2", "config.json")                                # -> Path in the shared hub cache
    extract_zip("data/images.zip", "data/images")

A file gets its final name only when it is whole and checked, so "the file is there" always means "the file is good".
The cache is huggingface_hub's own: what transformers downloaded is found without a request, and the reverse. Unlike
that library we do NOT ask whether `main` has moved on once a copy is cached, so a run that worked once works offline.
Left out: Xet, uploads, parallel parts. Links of strangers are for web.py, which shares the first part below. `Guard:`
stands where something protects against a bad server or file.
"""
import contextlib
import hashlib
import http.client
import math
import os
import re
import shutil
import stat
import sys
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from urllib.parse import quote, urljoin, urlsplit

import requests
from urllib3 import exceptions as below         # requests stands on urllib3, whose errors a raw body raises
from urllib3.util.response import assert_header_parsing

from .config import UserError
from .draw import progress
from .files import atomic_write, locked, write_text

CHUNK = 1 << 20
HEADERS = {"User-Agent": "tinyvlm", "Accept-Encoding": "identity"}


# ---- one request: shared with web.py

class DownloadError(UserError):
    """One sentence: the address, what went wrong, and where to put the file by hand."""


class FetchError(UserError):
    """Why one attempt failed, in a few words. transient: it may pass; answer: the server's, if it refused."""

    def __init__(self, reason, transient=False, answer=None):
        super().__init__(reason)
        self.transient, self.answer = transient, answer


@dataclass(frozen=True)
class Limits:
    """How much to put up with; every field is a keyword of download() and hf_file()."""
    max_bytes: int = 100 * 10**9        # a larger body is refused, announced or not
    timeout: float = 30                 # seconds to connect, and without a single byte
    max_seconds: float = math.inf       # for everything together, waiting included
    tries: int = 5                      # of what may pass: 429, 5xx, a timeout, a broken connection
    sleep: object = time.sleep          # tests put a list's append here and never wait


BROKEN = (OSError, ValueError, below.HTTPError, http.client.HTTPException)      # all that a malformed answer may raise
REASONS = ((below.NameResolutionError, "no such host", True),                   # (kinds, our words, is it transient)
           (below.NewConnectionError, "cannot be reached", True),
           ((requests.Timeout, below.TimeoutError), "timeout", True),
           (requests.exceptions.SSLError, "TLS fails", False),
           ((requests.exceptions.InvalidHeader, below.InvalidHeader), "broken answer", True),
           (ValueError, "no web address", False),
           (BROKEN, "broken answer", True))


def fault(error):
    """One of BROKEN -> FetchError. requests wraps what urllib3 wraps around the reason."""
    cause = getattr(error.args[0] if error.args else None, "reason", error)
    return next(FetchError(words, transient) for kinds, words, transient in REASONS
                if isinstance(error, kinds) or isinstance(cause, kinds))


def number(text):
    """'123' -> 123; anything else that a header may hold -> None."""
    return int(text) if re.fullmatch("[0-9]{1,18}", text or "") else None


def retry(attempt, limits, deadline=math.inf):
    """Call attempt() until it returns, or raise its last FetchError. Pauses: 0.5, 1, 2, 4 s, or Retry-After."""
    for failures in range(1, limits.tries + 1):
        try:
            return attempt()
        except FetchError as error:
            wish = number(error.answer.headers.get("Retry-After")) if error.answer is not None else None
            wait = 0.25 * 2**failures if wish is None else wish
            if not error.transient or failures == limits.tries or wait > 300 or time.monotonic() + wait > deadline:
                raise
            if wait > 5 and deadline == math.inf:
                print(f"{error}; next try in {wait:.0f} s", file=sys.stderr)
            limits.sleep(wait)


def request(session, method, url, headers, timeout, accept=(200,), follow=lambda there: True, redirects=10):
    """An answer with a status to accept, its body not read yet, after the redirects to follow. Raises FetchError.

    requests could follow by itself, but it carries our headers to the next host and reads a redirect's body whole.
    """
    here, session.auth = url, lambda r: r                       # an empty auth, else requests sends what ~/.netrc holds
    for _ in range(redirects + 1):
        try:
            if urlsplit(here)[:2] != urlsplit(url)[:2]:         # Guard: a token goes to the first scheme and host only
                headers = {name: value for name, value in headers.items() if name != "Authorization"}
            answer = session.request(method, here, headers=headers, stream=True, allow_redirects=False,
                                     timeout=(min(10, timeout), timeout))
            assert_header_parsing(answer.raw._original_response.msg)    # a line without colon hides what follows
            there = session.get_redirect_target(answer)
            if there is None or not follow(there):
                break
            answer.close()
            here = urljoin(here, there)
        except BROKEN as error:
            raise fault(error) from None
    else:
        raise FetchError("too many redirects")
    code = answer.status_code
    if code not in accept:
        raise FetchError(f"HTTP {code}", transient=code in (408, 429) or code >= 500, answer=answer)
    return answer


def body(answer, max_bytes):
    """Yield the body piece by piece as it arrives. Guard: FetchError if it is too large or does not end properly.

    urllib3 raises on fewer bytes than announced and on a broken chunk. Its read1 returns what is there, where read
    would wait on a trickle, and would trust a chunk that says its size is -1.
    """
    head, done, piece = answer.headers, 0, b"more"
    length, packed = number(head.get("Content-Length", "0")), head.get("Content-Encoding", "identity")
    if length is None or packed != "identity":                  # packed, though we asked for no such thing
        raise FetchError("broken answer" if length is None else f"packed as {packed[:20]}")
    try:
        while max(done, length) <= max_bytes and (piece := answer.raw.read1(CHUNK, decode_content=False)):
            done += len(piece)
            yield piece
    except BROKEN as error:
        raise fault(error) from None
    if piece:
        raise FetchError(f"more than {max_bytes} bytes")
    if not done and "Content-Length" not in head and "Transfer-Encoding" not in head:
        raise FetchError("broken answer", transient=True)       # cut within its head


# ---- one file

def _is_good(path, checksum):
    """Is the file there, and of this checksum if we know one? 64 hex digits are sha256, 40 a git blob id.

    git: sha1(b"blob 6\\0" + b"hello\\n") = ce013625030ba8dba906f756967f9e9ca394464a
    """
    if not checksum or not path.is_file():
        return path.is_file()
    made = hashlib.sha256() if len(checksum) == 64 else hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with open(path, "rb") as file:
        while block := file.read(CHUNK):
            made.update(block)
    return made.hexdigest() == checksum


def _fetch(url, path, checksum, limits, headers, lock):
    """Have the file at `path`: fetched into path.incomplete, by any number of attempts, checked, renamed. FetchError.

    With a checksum an old part is continued: a wrong mixture cannot pass, and gets one more chance from byte 0. Without
    one every attempt begins at byte 0.
    """
    part, deadline = Path(f"{path}.incomplete"), time.monotonic() + limits.max_seconds

    def attempt():                      # -> the byte it began at
        start = part.stat().st_size if checksum and part.exists() else 0
        ranged, accept = ({**headers, "Range": f"bytes={start}-"}, (200, 206, 416)) if start else (headers, (200,))
        with request(session, "GET", url, ranged, limits.timeout, accept) as answer:
            if answer.status_code == 416:                       # no byte from there on: the part is whole, or too long
                return start
            done = start = start if answer.status_code == 206 else 0
            total = start + (number(answer.headers.get("Content-Length")) or 0)
            with open(part, "ab" if start else "wb") as file:
                for piece in body(answer, limits.max_bytes - start):
                    before, done = done, done + file.write(piece)
                    if before // CHUNK < done // CHUNK <= total // CHUNK:
                        progress(done // CHUNK, total // CHUNK, f"MB of {path.name}")
                    if time.monotonic() > deadline:             # Guard: one byte a second never times out
                        raise FetchError(f"not done within {limits.max_seconds:.0f} s")
                file.flush()
                os.fsync(file.fileno())
        return start

    with locked(lock), requests.Session() as session:
        while not _is_good(path, checksum):                     # another process may have fetched it meanwhile
            start = retry(attempt, limits, deadline)
            if _is_good(part, checksum):
                os.replace(part, path)                          # Guard: the name appears with the whole file behind it
            else:
                part.unlink()
                if start == 0:
                    raise FetchError(f"its checksum is not {checksum}")


@contextlib.contextmanager
def _one_sentence(url, path):
    """Whatever fails inside becomes one DownloadError, which names the file the user wants and no temporary one."""
    try:
        yield
        return
    except FetchError as error:
        reason = str(error)
    except OSError as error:
        reason = f"it cannot be written ({error.strerror or error})"
    url = re.sub(r"//[^/?#]*@", "//", url)[:150]                # Guard: a password in the address stays out of logs
    raise DownloadError(f"cannot fetch {url}: {reason}; try again, or put the file at {path} by hand")


def download(url, path, sha256=None, **limits):
    """Fetch `url` to `path` and return the Path; see Limits for the other keywords. Raises DownloadError.

    A file already at `path` is kept as it is, without a request, unless it has another `sha256`.
    """
    path, checksum = Path(path), sha256 and sha256.lower()
    assert not checksum or re.fullmatch("[0-9a-f]{64}", checksum), f"sha256={sha256!r} is not 64 hex digits"
    with _one_sentence(url, path):
        if not _is_good(path, checksum):
            _fetch(url, path, checksum, Limits(**limits), HEADERS, path.with_name(f".{path.name}.lock"))
    return path


# ---- the hub: models--org--name/{refs/main, blobs/<etag>, snapshots/<commit>/<file> -> ../../blobs/<etag>}

def _setting(name, default):
    """An environment variable, if it is set to something, as a path."""
    return Path(os.environ.get(name) or default).expanduser()


def _inside(name):
    """Can this relative path not leave its folder, on any system? 'a/b.txt' yes; '../a', '/a', 'C:a' no."""
    windows = PureWindowsPath(name)                             # knows drives and takes both kinds of slash
    return bool(windows.name) and not windows.anchor and ".." not in windows.parts and "\0" not in name


def _hub_fetch(url, home, folder, filename, revision, limits):
    """The blob, then the link to it, then the ref, which is a promise. The lock's name is huggingface_hub's.

    The hub is asked, not the store it redirects to: its etag is the content's sha256 for a large file (X-Linked-Etag),
    git's blob id for a small one. A redirect within it is a renamed repository (gpt2 -> openai-community/gpt2).
    """
    file = _setting("HF_TOKEN_PATH", home / "token")
    token = (os.environ.get("HF_TOKEN") or (file.read_text() if file.is_file() else "")).strip()
    headers = HEADERS | ({"Authorization": f"Bearer {token}"} if token else {})
    with requests.Session() as session:
        head = retry(lambda: request(session, "HEAD", url, headers, limits.timeout, (200, 301, 302, 303, 307, 308),
                                     follow=lambda there: not urlsplit(there).netloc), limits).headers
    commit, etag = head.get("X-Repo-Commit", ""), re.sub('^W/|"', "", head.get("X-Linked-Etag") or head.get("ETag", ""))
    if not all(re.fullmatch(r"\w[\w.-]*", text, re.ASCII) for text in (commit, etag)):  # Guard: both become file names
        raise FetchError("the answer names no commit or no ETag, so this is no hub (check HF_ENDPOINT and the proxy)")
    blob, pointer = folder / "blobs" / etag, folder / "snapshots" / commit / filename
    blob.parent.mkdir(parents=True, exist_ok=True)
    checksum = etag if re.fullmatch("[0-9a-f]{64}|[0-9a-f]{40}", etag) else None
    _fetch(url, blob, checksum, limits, headers, folder.parent / ".locks" / folder.name / f"{etag}.lock")
    pointer.parent.mkdir(parents=True, exist_ok=True)
    try:
        with contextlib.suppress(FileExistsError):
            pointer.symlink_to(os.path.relpath(blob, pointer.parent))
    except OSError:                                             # Windows without the privilege: a copy
        atomic_write(pointer, lambda file: file.write(blob.read_bytes()))
    if revision != commit:
        write_text(folder / "refs" / revision, commit)
    return pointer


def hf_file(repo_id, filename, revision="main", missing_ok=False, **limits):
    """The Path of one file of a hub repository, from the shared cache or else the network (then cached).

    revision: branch, tag, `refs/pr/32`, or a commit sha. With missing_ok a file that the repository does not have
    gives None instead of a DownloadError (offline: one that the cache does not have).
    Environment: HF_ENDPOINT, HF_TOKEN, HF_TOKEN_PATH, HF_HUB_CACHE, HF_HOME, HF_HUB_OFFLINE as for huggingface_hub.
    """
    plain = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repo_id) and "--" not in repo_id
    if not plain or not all(_inside(name) and "\\" not in name for name in (repo_id, filename, revision)):      # Guard
        raise DownloadError(f"{repo_id!r} is no hub repository such as openai-community/gpt2, or {filename!r} at "
                            f"{revision!r} is no plain relative path; check their spelling")
    home = _setting("HF_HOME", _setting("XDG_CACHE_HOME", "~/.cache") / "huggingface")
    folder = _setting("HF_HUB_CACHE", home / "hub") / f"models--{repo_id.replace('/', '--')}"
    ref = folder / "refs" / revision
    commit = ref.read_text().strip() if ref.is_file() else revision
    found = folder / "snapshots" / commit / filename
    if found.is_file():
        return found
    offline = any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")
                  for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
    if missing_ok and (offline or (folder / ".no_exist" / commit / filename).is_file()):
        return None
    url = f"{os.environ.get('HF_ENDPOINT') or 'https://huggingface.co'}/{repo_id}/resolve/{quote(revision, safe='')}/"
    url += quote(filename)
    with _one_sentence(url, found):
        if offline:
            raise FetchError("it is not in the cache and HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE forbids the network")
        try:
            return _hub_fetch(url, home, folder, filename, revision, Limits(**limits))
        except FetchError as error:
            code, head = (error.answer.status_code, error.answer.headers) if error.answer is not None else (0, {})
            why = head.get("X-Error-Code", "EntryNotFound" if code == 404 else "")
            if why == "EntryNotFound" and re.fullmatch(r"\w+", commit := head.get("X-Repo-Commit", "")):
                write_text(folder / ".no_exist" / commit / filename, "")        # as huggingface_hub marks it: then
                write_text(folder / "refs" / revision, commit)                  # nobody asks again
            if why == "EntryNotFound" and missing_ok:
                return None
            if code in (401, 403, 404):
                error = (f"{error} {why}: there is no {filename} at {revision} of {repo_id}, or it needs a token in "
                         "HF_TOKEN whose owner accepted its terms")
            raise FetchError(str(error)) from None


# ---- zips

def extract_zip(zip_path, folder, max_bytes=200 * 10**9, max_files=2_000_000):
    """Unpack into a new `folder` and return its Path: it appears whole or not at all. Raises DownloadError.

    Guard: no names that leave the folder, no links, not too much, no bombs (over 100 MB that grow more than 200 times).
    Members lie about their size in vain: zipfile stops at the announced size, and then the CRC is wrong.
    """
    zip_path, folder = Path(zip_path), Path(os.path.abspath(folder))
    work = folder.with_name(folder.name + ".incomplete")
    try:
        with locked(folder.with_name(f".{folder.name}.lock")), zipfile.ZipFile(zip_path) as archive:
            members = archive.infolist()
            total, packed = sum(m.file_size for m in members), sum(m.compress_size for m in members)
            if total > max_bytes or len(members) > max_files or total > max(10**8, 200 * packed):
                raise DownloadError(f"{zip_path} would grow from {packed} bytes to {total} in {len(members)} files, "
                                    "beyond all limits; do not use it")
            for member in members:
                kind = stat.S_IFMT(member.external_attr >> 16)  # Unix file type; 0 where the packer wrote none
                if not _inside(member.filename) or kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                    raise DownloadError(f"{zip_path} holds {member.filename!r}, a link or outside its folder; do not "
                                        "use it")
            shutil.rmtree(work, ignore_errors=True)             # what a killed run left
            try:
                for done, member in enumerate(members, 1):
                    archive.extract(member, work)               # reading to the end checks the CRC
                    progress(done, len(members), f"files of {zip_path.name}")
                os.replace(work, folder)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    except UserError:
        raise
    except Exception as error:          # on a damaged zip zipfile raises nearly anything
        raise DownloadError(f"cannot unpack {zip_path} to {folder} ({error}); delete a damaged zip or make room, and "
                            "run again") from None
    return folder
