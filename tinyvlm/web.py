"""Images from the web, taken politely and safely: most links are fine; some are dead, slow, huge or hostile.

    fetch_image(url)                                        # -> RGB PIL image, or FetchError("HTTP 404")
    download_images(table_rows("pairs.csv"), "data/mine")   # -> a folder that layouts.photos reads, with report.csv
    ImageFolderCache("data/cache", 10**10).open(url)        # -> the image, kept on disk for the next epoch

Strangers wrote the links, so each is a request they make from inside your network (server-side request forgery): we
talk to public addresses only. What comes is an image if it decodes as one, whatever its name says. Each protection is
marked `Guard:`; how a request is made and a body read is download.py's. Left out: proxies, robots.txt, cookies.
"""
import contextlib
import csv
import functools
import hashlib
import http.cookiejar
import io
import ipaddress
import json
import math
import os
import re
import socket
import ssl
import threading
import time
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, urlencode

import requests
import urllib3
from PIL import Image

from .config import UserError
from .download import FetchError, Limits, body, download, request, retry
from .files import locked, write_csv
from .image import adaptive_square, load_image

HEADERS = {"User-Agent": "tinyvlm (collects training images)", "Accept": "image/*", "Accept-Encoding": "identity"}
REPORT = ["url", "file", "status", "caption", "extras"]
TOO_LONG = 10_000                       # letters of an address, a caption or extras: cut there, and not fetched
ROWS = "https://datasets-server.huggingface.co/rows"


@dataclass(frozen=True)
class Fetch(Limits):
    """How much to put up with, for one image; and for a crowd of them."""
    max_bytes: int = 20_000_000
    timeout: float = 10.0
    max_seconds: float = 30.0           # for all of it: redirects, waiting and second tries included
    tries: int = 3
    threads: int = 32
    per_host: int = 8                   # requests at once to one host, by download_images
    allow_private: bool = False         # also addresses inside your own network and machine


# ---- one image

_here = threading.local()               # of each thread: how, the deadline of its request, the session and its key
_decoding = threading.Semaphore(os.cpu_count() or 1)            # more at once would only need more memory


def is_public(address):
    """Is an IP address out in the open internet? "8.8.8.8" yes; "127.0.0.1", "10.0.0.1", "::ffff:169.254.1.1" no."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if ip.version == 6:                 # an IPv4 address may hide in it: mapped, 6to4, Teredo, NAT64
        nat64 = ip in ipaddress.ip_network("64:ff9b::/96") and ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        ip = ip.ipv4_mapped or ip.sixtofour or (ip.teredo and ip.teredo[1]) or nat64 or ip
    return ip.is_global and not (ip.is_multicast or ip.is_reserved)


class _Timed(socket.socket):
    """Guard: every read ends by the deadline. A timeout alone starts anew with each byte of a server that drips."""

    def recv_into(self, *args):
        left = _here.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self.settimeout(min(left, _here.how.timeout))
        return super().recv_into(*args)


class _Checked:
    """Guard: the address that was connected to must be public, before a byte is sent.

    Looking the name up first would not do: the second answer may differ (DNS rebinding).
    """

    def _new_conn(self):
        self.timeout = max(0.01, min(self.timeout, _here.deadline - time.monotonic()))
        sock = _Timed(fileno=super()._new_conn().detach())
        sock.settimeout(self.timeout)
        if not (_here.how.allow_private or is_public(sock.getpeername()[0])):
            sock.close()
            raise FetchError("private address")
        return sock


class _Adapter(requests.adapters.HTTPAdapter):
    """What makes a requests session connect in this way."""

    def init_poolmanager(self, *args, **kwargs):
        super().init_poolmanager(*args, ssl_context=_tls(), **kwargs)
        for scheme, pool in (("http", urllib3.HTTPConnectionPool), ("https", urllib3.HTTPSConnectionPool)):
            connection = type("_Connection", (_Checked, pool.ConnectionCls), {})
            pool = type("_Pool", (pool,), {"ConnectionCls": connection})
            self.poolmanager.pool_classes_by_scheme = {**self.poolmanager.pool_classes_by_scheme, scheme: pool}

    def cert_verify(self, *args):       # requests would read all authorities anew for each connection: 45 ms
        pass


@functools.cache
def _tls():
    context = ssl.create_default_context(cafile=requests.certs.where())         # checks names and certificates
    context.sslsocket_class = type("_TimedTLS", (_Timed, ssl.SSLSocket), {})
    return context


def _session(how):
    """This thread's session, whose last connections stay open. A forked process must not write into its parent's."""
    key = os.getpid(), how.allow_private
    if getattr(_here, "key", None) != key:
        _here.key, _here.session = key, requests.Session()
        _here.session.trust_env = False                         # Guard: a proxy would look the names up, unchecked
        _here.session.cookies.set_policy(http.cookiejar.DefaultCookiePolicy(allowed_domains=[]))
        for scheme in ("http://", "https://"):
            _here.session.mount(scheme, _Adapter(pool_connections=4, pool_maxsize=1))
    return _here.session


def _fetch(url, how):
    """The bytes at `url` and the image that they are. Guard: each redirect is checked as the first address is."""
    _here.how, _here.deadline = how, time.monotonic() + how.max_seconds

    def attempt():
        with request(_session(how), "GET", url, HEADERS, how.timeout, redirects=5) as answer:
            return b"".join(body(answer, how.max_bytes))
    data = retry(attempt, how, _here.deadline)
    return data, _decode(data)


def _decode(data):
    """Bytes -> RGB PIL image. "it is 9x999 pixels, too long and thin; crop it" -> FetchError("too long and thin")."""
    try:
        with _decoding:
            return load_image(data, "it")
    except UserError as error:
        raise FetchError(re.sub(r"(?s)^it (is )?|\d+x\d+ pixels, |( ?[(;]| that ).*", "", str(error))) from None


def fetch_image(url, how=Fetch()):
    """The upright RGB PIL image at `url`. Raises FetchError, whose text is the reason in a few words."""
    return _fetch(url, how)[1]


# ---- a folder of small square images; its report is a journal, one line per finished address: a kill loses none

def _name(url):
    """What the file of an address is called. Guard: nothing of the address is in it, so it cannot lead elsewhere."""
    return hashlib.sha256(url.encode("utf-8", "replace")).hexdigest()[:20]


def _plain(text):
    """One line that any csv holds: no control characters, no half characters, no run of blanks."""
    return " ".join(re.sub("[\x00-\x1f\x7f\ud800-\udfff]", " ", str(text or "")).split())


def _read_report(folder):
    """{name: the latest row of that address} of report.csv. A last line that a kill tore is passed over."""
    path, head = folder / "report.csv", ",".join(REPORT).encode()
    data = path.read_bytes() if path.exists() else b""
    if not data.startswith(head[:len(data)]) or (not data and (folder / "captions.csv").exists()):
        raise UserError(f"{folder} has a csv that this program did not make; choose another folder")
    text = io.StringIO(data[:data.rfind(b"\n") + 1].decode("utf-8", "replace"), newline="")
    return {_name(row[0]): row for row in list(csv.reader(text))[1:] if len(row) == len(REPORT)}


def _write_report(folder):
    """Sort the report by file name, derive captions.csv from it; its rows by name."""
    rows = dict(sorted(_read_report(folder).items()))
    write_csv(folder / "report.csv", REPORT, rows.values())
    write_csv(folder / "captions.csv", ["image", "caption"], ([row[1], row[3]] for row in rows.values() if row[1]))
    return rows


def _keep(url, caption, extras, folder, size, how):
    """Fetch, shrink and save one image -> its row in the report. A file counts once its row is written."""
    try:
        if not caption or TOO_LONG in (len(url), len(caption), len(extras)):
            raise FetchError("row too long" if caption else "no caption")
        image = fetch_image(url, how)
    except FetchError as error:
        return [url, "", str(error), caption, extras]
    image.thumbnail((4096, 4096))       # before padding: 25,000 x 600 pixels would become a square of 1.9 GB
    image = adaptive_square(image).resize((size, size), Image.Resampling.BICUBIC)
    image.save(folder / f"{_name(url)}.jpg", "JPEG", quality=95)
    return [url, f"{_name(url)}.jpg", "ok", caption, extras]


def _in_parallel(work, jobs, threads, room):
    """Yield work(*job) as they finish, in any order, with at most room() of them begun and unfinished."""
    pool, running, job = ThreadPoolExecutor(threads), set(), next(jobs, None)
    try:
        while True:
            while job and len(running) < room():
                running.add(pool.submit(work, *job))
                job = next(jobs, None)
            if not running:
                return
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def download_images(rows, folder, size=128, how=Fetch(), limit=None, say=print, retry_failed=False):
    """Fetch the images of (url, caption, dict of extras) rows into `folder`, as size x size JPEGs named by their URL.

    report.csv gets a line per URL with the reason of each failure; captions.csv makes the folder one that
    layouts.photos reads. What an earlier run finished is not fetched again (failures are with retry_failed).
    Rows are begun in order, and never more than could still be needed for `limit` good images: so these are the
    first `limit` good ones, however threads and kills fall. With limit 7 and every third link dead, 11 are fetched.
    Returns counts of the folder: good, failed, reasons. Raises UserError if it holds images of another size.
    """
    folder, limit = Path(folder), math.inf if limit is None else limit
    kept = tried = fine = 0             # good from earlier runs, as far as read; fetched now; good among these
    gates, seen = {}, set()             # host -> semaphore; names of addresses

    def jobs():
        nonlocal kept
        for url, caption, extras in rows:
            url = _plain(url)[:TOO_LONG]
            name, host = _name(url), str(url.split("/")[2:3])
            if name not in seen and name not in earlier:
                yield (gates.setdefault(host, threading.Semaphore(how.per_host)),
                       (url, _plain(caption)[:TOO_LONG], json.dumps(extras, default=str)[:TOO_LONG]))
            elif name not in seen:
                kept += earlier[name]
            seen.add(name)

    def work(gate, row):
        with gate:
            return _keep(*row, folder, size, how)

    with locked(folder / ".lock"):      # two runs in one folder would tear each other's report
        earlier = {name: bool(row[1]) for name, row in _write_report(folder).items()
                   if ((folder / row[1]).is_file() if row[1] else not retry_failed)}
        for name in [name for name in earlier if earlier[name]][:1]:
            if (found := load_image(folder / f"{name}.jpg").size) != (size, size):
                raise UserError(f"{folder} holds images of {found} pixels, not {size}x{size}; choose another folder")
        try:
            with open(folder / "report.csv", "a", encoding="utf-8", newline="") as report:
                for row in _in_parallel(work, jobs(), how.threads, lambda: min(4 * how.threads, limit - kept - fine)):
                    csv.writer(report, lineterminator="\n").writerow(row)
                    report.flush()
                    tried, fine = tried + 1, fine + bool(row[1])
                    if tried % 1000 == 0:
                        say(f"{tried} addresses, {fine} gave an image")
        finally:                        # ctrl-C, too, leaves a folder that can be trained on
            rows = _write_report(folder).values()
    reasons = Counter(row[2] for row in rows if not row[1])
    failed = sum(reasons.values())
    counts = {"good": len(rows) - failed, "failed": failed, "reasons": dict(reasons.most_common())}
    say(f"{fine} of {tried} addresses gave an image; {folder} now holds {counts}")
    return counts


# ---- where the links come from

def dataset_rows(dataset, config, split, start=0, limit=None, endpoint=ROWS, cache="data/rows", **limits):
    """The rows (dicts) of a data set on the Hugging Face hub, from its rows service: no parquet reader needed.

    Pages of 100 are kept in `cache`; `limits` are download()'s. The service converts only a first part of a large data
    set, and slowly: 429, 5xx and timeouts are tried again for about a minute.
    """
    folder = Path(cache, quote(f"{dataset}--{config}--{split}", safe=""))
    offset, total, end = start // 100 * 100, math.inf, math.inf if limit is None else start + limit
    while offset < min(total, end):
        query = urlencode(dict(dataset=dataset, config=config, split=split, offset=offset, length=100))
        path = download(f"{endpoint}?{query}", folder / f"{offset:09d}.json", **{"tries": 8, **limits})
        try:
            page = json.loads(path.read_text("utf-8"))
            rows = [row["row"] for row in page["rows"]]
            total = page.get("num_rows_total") or math.inf if rows else 0
        except (ValueError, KeyError, TypeError):
            path.unlink()
            raise UserError(f"{endpoint} sent no page of rows at {offset} of {dataset}; try again later") from None
        yield from rows[max(0, start - offset):int(min(end - offset, 100))]
        offset += len(rows)


def caption_rows(rows, where):
    """Row dicts -> (url, caption, {other columns}). Raises UserError, naming `where`, if the columns are others.

    {"url": "http://a/1", "text": "a dog", "id": 7} -> ("http://a/1", "a dog", {"id": 7}). Where the rows service signs
    its links, the url is a dict with the address under "src".
    """
    for n, row in enumerate(rows, 1):
        url, caption = (next((name for name in names if name in row), None) if isinstance(row, dict) else None
                        for names in (("image_url", "url"), ("capsfusion", "caption", "text")))
        if url is None or caption is None or None in row:       # None: what csv found beyond the header's columns
            raise UserError(f"row {n} of {where} holds {str(row)[:80]}; it needs the columns image_url (or url) and "
                            "capsfusion (or caption, or text), and no cell beyond the header")
        address = row[url]["src"] if isinstance(row[url], dict) and "src" in row[url] else row[url]
        yield address, row[caption], {key: value for key, value in row.items() if key not in (url, caption)}


def table_rows(path):
    """A local .csv (with a header) or .jsonl -> (url, caption, {other columns}), read as it goes. Raises UserError."""
    path = Path(path)
    if path.suffix.lower() not in (".csv", ".jsonl"):
        raise UserError(f"{path} should be a .csv or .jsonl file; export other formats (say, parquet) as one of these")
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            is_csv = path.suffix.lower() == ".csv"
            yield from caption_rows(csv.DictReader(file) if is_csv else map(json.loads, filter(str.strip, file)), path)
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"cannot read {path}: {error}; mend it") from None


# ---- training while downloading

class ImageFolderCache:
    """Images by address: from a folder of at most max_bytes, else fetched and kept there; least recently used out.

    Threads and processes may share the folder, and a restart finds it: there is no index, only files and their dates.
    """

    def __init__(self, folder, max_bytes, how=Fetch()):
        self.folder, self.max_bytes, self.how = Path(folder), max_bytes, how
        self.folder.mkdir(parents=True, exist_ok=True)
        self.added = max_bytes          # bytes kept since the last trim; so the first one trims what was there before

    def open(self, url):
        """The RGB PIL image. Raises FetchError if it cannot be had."""
        path = self.folder / _name(url)
        with contextlib.suppress(OSError, FetchError):          # not there, thrown out right now, or damaged on disk
            image = _decode(path.read_bytes())
            os.utime(path)
            return image
        data, image = _fetch(url, self.how)
        # Not atomic_write: that waits for the disk each time, and what a power cut spoils here is fetched again.
        part = self.folder / f"{path.name}.{os.getpid()}.{threading.get_ident()}"
        with contextlib.suppress(FileNotFoundError):            # trimmed away in between: the cache is far too small
            part.write_bytes(data)
            os.replace(part, path)
        self.added += len(data)
        if self.added > self.max_bytes / 50:
            self.trim()
        return image

    def trim(self):
        """Keep the latest 4/5 of max_bytes: ten processes that each add 1/50 before they trim stay within it."""
        with locked(self.folder / ".lock"):
            self.added, files = 0, []
            for name in os.listdir(self.folder):
                with contextlib.suppress(FileNotFoundError):
                    if re.match("[0-9a-f]{20}", name):          # else it is somebody's own file
                        info = os.stat(self.folder / name)
                        files.append((info.st_mtime_ns, info.st_size, name))
            total = sum(size for _, size, _ in files)
            for _, size, name in sorted(files):
                if total > 0.8 * self.max_bytes:
                    (self.folder / name).unlink(missing_ok=True)
                    total -= size
