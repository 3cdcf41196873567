"""Files from the network: HTTP that goes on where it broke off, the Hugging Face cache layout, and zips.

    download("https://host/images.zip", "data/images.zip", sha256="9f86d0...")     # any file on any web server
    hf_file("openai-community/gpt2", "config.json")                                # -> Path in the shared hub cache

A file gets its final name only when it is whole and checked, so "the file is there" always means "the file is good".
The cache is huggingface_hub's own: what transformers downloaded is found without a request, and the reverse. Unlike
that library we do NOT ask whether `main` has moved on once a copy is cached. Left out: Xet, uploads, parallel parts.
`Guard:` stands at what protects against a bad server. `retry`, `request` and `body` serve web.py, too."""
import contextlib
import hashlib
import math
import os
import re
import shutil
import zipfile
from pathlib import Path
from time import monotonic, sleep
from urllib.parse import quote, urljoin, urlsplit

import requests
import urllib3

from .config import UserError
from .draw import progress
from .files import locked, write_text

HEADERS = {"User-Agent": "tinyvlm", "Accept-Encoding": "identity"}
NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*")    # a relative path that cannot leave its folder: no "..", "/x", "C:"


class DownloadError(UserError):
    """A sentence, and its `reason` in a few words. transient: it may pass; code, headers: of a server that refused."""
    def __init__(self, url, reason, transient=False, code=0, headers={}):
        url = re.sub(r"//[^/?#]*@", "//", url)[:150]            # Guard: a password in the address stays out of logs
        super().__init__(f"cannot fetch {url}: {reason}; try again, or fetch it by other means")
        self.reason, self.transient, self.code, self.headers = reason, transient, code, headers


@contextlib.contextmanager
def faults(url):
    """All that requests and urllib3 raise on bad answers becomes a DownloadError: the innermost cause is its reason."""
    try:
        yield
    except (OSError, ValueError, urllib3.exceptions.HTTPError) as error:
        cause = getattr(error.args[0] if error.args else None, "reason", error)
        hopeless = isinstance(error, (ValueError, requests.exceptions.SSLError))  # no address or header; TLS fails
        raise DownloadError(url, type(cause).__name__, not hopeless) from None


def retry(attempt, tries=5, deadline=math.inf):
    """Call attempt() until it returns, or raise its last error. Pauses: 0.5, 1, 2, 4 s, or what Retry-After says."""
    for failures in range(1, tries + 1):
        try:
            return attempt()
        except DownloadError as error:
            wish = error.headers.get("Retry-After", "")
            wait = int(wish[:9]) if wish.isdecimal() else 0.25 * 2**failures      # seconds
            if not error.transient or failures == tries or wait > 100 or monotonic() + wait > deadline:
                raise
            sleep(wait)


def request(session, method, url, headers, accept=(200,), timeout=30):
    """An answer with a status to accept, its body not read yet, after at most 10 redirects. A HEAD stays on its host.
    requests could follow by itself, but it would read a redirect's body whole."""
    here = url
    with faults(url):
        for _ in range(11):
            if urlsplit(here)[:2] != urlsplit(url)[:2]:         # Guard: a token goes to the first scheme and host only
                headers = {name: value for name, value in headers.items() if name != "Authorization"}
            answer = session.request(method, here, headers=headers, stream=True, allow_redirects=False, timeout=timeout,
                                     auth=lambda r: r)          # none; else requests sends what ~/.netrc holds
            there = session.get_redirect_target(answer)
            if there is None or method == "HEAD" and urlsplit(there).netloc:
                break
            answer.close()                                                        # its body stays unread
            here = urljoin(here, there)
    code = answer.status_code
    if code not in accept:
        raise DownloadError(url, f"HTTP {code}", code in (408, 429) or code >= 500, code, answer.headers)
    return answer


def body(url, answer, max_bytes):
    """Yield the body piece by piece as it arrives. Guard: DownloadError if it is too large or does not end properly.
    urllib3 raises on fewer bytes than announced and on a broken chunk. Its read1 returns what is there, where read
    would wait on a trickle, and would trust a chunk that says its size is -1."""
    length, done, piece = answer.raw.length_remaining, 0, b"more"
    packed = answer.headers.get("Content-Encoding", "identity") != "identity"     # though we ask for no such thing
    if length is None and not answer.raw.chunked or packed:
        raise DownloadError(url, "no length, or packed", transient=True)          # cut within its head, for one
    with faults(url):
        while piece and max(done, length or 0) <= max_bytes:
            piece = answer.raw.read1(1 << 20, decode_content=False)
            done += len(piece)
            yield piece
    if piece:
        raise DownloadError(url, f"more than {max_bytes} bytes")


def _is_good(path, check):
    """Is the file there, and does it pass? check: "zip", 64 hex digits of sha256, 40 of a git blob id, or None. Git's
    is sha1(b"blob 6\\0" + b"hello\\n") = ce013625030ba8dba906f756967f9e9ca394464a."""
    if not check or not path.is_file():
        return path.is_file()
    if check == "zip":                                          # its end lists all members; unpacking checks each
        return zipfile.is_zipfile(path)
    made = hashlib.sha256() if len(check) == 64 else hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            made.update(block)
    return made.hexdigest() == check


def download(url, path, sha256=None, headers=HEADERS, max_bytes=10**11, max_seconds=math.inf, tries=5):
    """Fetch `url` to `path`, by way of path.incomplete, and return the Path. Raises DownloadError. A good file at
    `path` is kept, without a request: one with this sha256 (or git blob id) if it is given; a .zip if it is one. What
    can be checked in this way is continued where an earlier attempt, or run, stopped."""
    path, part, deadline = Path(path), Path(f"{path}.incomplete"), monotonic() + max_seconds
    check = sha256.lower() if sha256 else "zip" if path.suffix == ".zip" else None  # None: only "is it there?"

    def attempt():
        start = part.stat().st_size if check and part.exists() else 0             # bytes that are here already
        ranged = {**headers, "Range": f"bytes={start}-"} if start else headers
        with request(session, "GET", url, ranged, accept=(200, 206, 416)) as answer:
            start = 0 if answer.status_code == 200 else start                     # 200: the server sends all of it
            total = start + (answer.raw.length_remaining or 0)
            if answer.status_code > 200 and answer.headers.get("Content-Range") != f"bytes {start}-{total - 1}/{total}":
                part.unlink(missing_ok=True)                    # Guard: another part than we want, or none (416)
                raise DownloadError(url, "wrong range", transient=True)
            with open(part, "ab" if start else "wb") as file:
                for piece in body(url, answer, max_bytes - start):
                    file.write(piece)
                    if total > 1 << 20:
                        progress(file.tell(), total, f"bytes of {path.name}")
                    if monotonic() > deadline:                  # Guard: one byte a second never times out
                        raise DownloadError(url, f"not done within {max_seconds:.0f} s")
                file.flush()
                os.fsync(file.fileno())

    with locked(path.with_name(f".{path.name}.lock")), requests.Session() as session:
        if not _is_good(path, check):                           # another process may have fetched it meanwhile
            retry(attempt, tries, deadline)
            if not _is_good(part, check):
                part.unlink()
                raise DownloadError(url, f"its checksum is not {check}" if sha256 else "what came is no zip")
            os.replace(part, path)                              # Guard: the name appears with the whole file behind it
    return path


# ---- the hub: models--org--name/{refs/main, blobs/<etag>, snapshots/<commit>/<file> -> ../../blobs/<etag>}

def hf_file(repo_id, filename, revision="main", missing_ok=False):
    """The Path of one file of a hub repository, from the shared cache or else the network (then cached).

    revision: branch, tag, `refs/pr/32`, or a commit sha. With missing_ok a file that the repository does not have
    gives None instead of a DownloadError (offline: one that the cache has only other files of).
    Environment: HF_ENDPOINT, HF_TOKEN, HF_HUB_CACHE, HF_HOME and HF_HUB_OFFLINE as for huggingface_hub.

    The hub knows the etag, not the store it redirects to: the content's sha256 for a large file (X-Linked-Etag), git's
    blob id for a small one. A redirect within it is a renamed repository (gpt2 -> openai-community/gpt2)."""
    get = os.environ.get
    url = f"{get('HF_ENDPOINT') or 'https://huggingface.co'}/{repo_id}/resolve/{quote(revision, '')}/{quote(filename)}"
    if not all(map(NAME.fullmatch, (repo_id, filename, revision))) or "--" in repo_id:      # Guard: they become paths
        raise DownloadError(url, "no plain names of a hub repository, a file in it and a revision")
    home = Path(get("HF_HOME") or "~/.cache/huggingface").expanduser()
    folder = Path(get("HF_HUB_CACHE") or home / "hub").expanduser() / f"models--{repo_id.replace('/', '--')}"
    offline = get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    ref, login = folder / "refs" / revision, home / "token"
    link = folder / "snapshots" / (ref.read_text().strip() if ref.is_file() else revision) / filename
    if link.is_file():
        return link
    if offline and missing_ok and link.parent.is_dir():         # of a repository not cached nothing is known
        return None
    if offline:
        raise DownloadError(url, f"there is no {link}, and HF_HUB_OFFLINE forbids the network")
    token = (get("HF_TOKEN") or (login.read_text() if login.is_file() else "")).strip()
    headers = {**HEADERS, "Authorization": f"Bearer {token}"} if token else HEADERS
    try:
        with requests.Session() as session:
            head = retry(lambda: request(session, "HEAD", url, headers, (200, 301, 302, 303, 307, 308))).headers
        commit, etag = head.get("X-Repo-Commit", ""), head.get("X-Linked-Etag") or head.get("ETag", "")
        etag = re.sub('^W/|"', "", etag)                                          # W/"0ab1" -> 0ab1
        if not (NAME.fullmatch(commit) and re.fullmatch("[0-9a-f]{64}|[0-9a-f]{40}", etag)):  # Guard: both become names
            raise DownloadError(url, "no commit or no checksum, so this is no hub (see HF_ENDPOINT and the proxy)")
        blob = download(url, folder / "blobs" / etag, etag, headers)
    except DownloadError as error:
        why = error.headers.get("X-Error-Code", "")
        if missing_ok and error.code == 404 and why in ("", "EntryNotFound"):
            return None
        hint = f" {why} (what is private or gated needs a token in HF_TOKEN)" if error.code in (401, 403, 404) else ""
        raise DownloadError(url, error.reason + hint) from None
    link = folder / "snapshots" / commit / filename                               # where transformers looks for it
    link.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):                  # another process was as quick
        link.symlink_to(os.path.relpath(blob, link.parent))
    if revision != commit:
        write_text(ref, commit)                                 # last: it says that the rest is there
    return link


def extract_zip(zip_path, folder):
    """Unpack into a new `folder`, which appears whole or not at all. Raises UserError. zipfile itself keeps every name
    inside the folder, makes plain files of links, and checks each size and CRC, so a zip cannot unpack to more than it
    declares; what it declares is checked here."""
    work = Path(f"{folder}.incomplete")
    try:
        shutil.rmtree(work, ignore_errors=True)                 # what a killed run left
        with zipfile.ZipFile(zip_path) as archive:
            size, packed = sum(member.file_size for member in archive.infolist()), Path(zip_path).stat().st_size
            if size > 200 * packed + 10**6:                     # a bomb: photographs hardly shrink
                raise ValueError(f"its {packed} bytes would become {size}")
            archive.extractall(work)                                              # checks every CRC
        os.replace(work, folder)
    except Exception as error:                                  # on a damaged zip zipfile raises nearly anything
        shutil.rmtree(work, ignore_errors=True)
        raise UserError(f"cannot unpack {zip_path} to {folder} ({error}); mend it or make room; run again") from None
