"""Images from the web, taken politely and safely: most links are fine; some are dead, slow, huge or hostile.

    download_images(table_rows("pairs.csv"), "data/mine")   # -> a folder that layouts.photos reads
    ImageFolderCache("data/cache", 10**10).open(url)        # -> RGB PIL image, kept on disk for the next epoch

Strangers wrote the links, so each is a request they make from inside your network (server-side request forgery): we
talk to public addresses only. How a request is made and a body read is download.py's. Left out: proxies, robots.txt,
cookies."""
import contextlib
import csv
import functools
import hashlib
import ipaddress
import itertools
import json
import os
import re
import socket
import ssl
import threading
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from time import monotonic

import requests
import urllib3
from PIL import ImageOps

from .config import UserError
from .download import DownloadError, body, download, request, retry
from .draw import progress
from .files import locked, read_json, write_csv
from .image import load_image

HEADERS = {"User-Agent": "tinyvlm (collects training images)", "Accept": "image/*", "Accept-Encoding": "identity"}
MAX_BYTES, TIMEOUT, MAX_SECONDS, TRIES = 20_000_000, 10, 30, 3  # of one image; seconds without a byte, and in all
THREADS, PER_HOST = 32, 8                                       # requests at once, and of these to one host
ODD = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")               # control characters and half ones
HEADER = ["image", "caption", "status", "url"]                  # of captions.csv
ROWS = "https://datasets-server.huggingface.co/rows?dataset=BAAI%2FCapsFusion-120M&config=default&split=train"
COLUMNS = ("image_url", "url"), ("capsfusion", "caption", "text")

_here = threading.local()               # of each thread: the deadline of its request


def is_public(address):
    """Is an IP address out in the open internet? "8.8.8.8" yes; "127.0.0.1", "10.0.0.1", "::ffff:169.254.1.1" no."""
    ip = ipaddress.ip_address(address.partition("%")[0])                          # without the zone of "fe80::1%eth0"
    hides = ip.version == 6 and (ip.sixtofour or ip not in ipaddress.ip_network("2000::/3"))    # perhaps an IPv4 one
    return ip.is_global and not ip.is_multicast and not hides


class _Timed(socket.socket):
    """Guard: every read ends by the deadline. A timeout alone starts anew with each byte of a server that drips."""
    def recv_into(self, *args):
        left = _here.deadline - monotonic()                                       # seconds
        if left <= 0:
            raise TimeoutError
        self.settimeout(min(left, TIMEOUT))
        return super().recv_into(*args)


@functools.cache
def _adapter(process, allow_private):
    """What makes a requests session connect to public addresses only; it keeps connections open, for all threads. By
    process: one that was forked must not write into its parent's connections."""
    class Checked:
        def _new_conn(self):            # Guard: checked before a byte is sent; a name may lead elsewhere each time
            sock = _Timed(fileno=super()._new_conn().detach())
            sock.settimeout(self.timeout)
            if not (allow_private or is_public(sock.getpeername()[0])):
                sock.close()
                raise DownloadError(self.host, "private address")
            return sock
    adapter = requests.adapters.HTTPAdapter()
    context = ssl.create_default_context(cafile=requests.certs.where())           # checks names and certificates
    context.sslsocket_class = type("_TimedTLS", (_Timed, ssl.SSLSocket), {})      # the same under TLS
    adapter.init_poolmanager(THREADS, THREADS, ssl_context=context)
    adapter.poolmanager.pool_classes_by_scheme = {
        scheme: type("_Pool", (pool,), {"ConnectionCls": type("_Connection", (Checked, pool.ConnectionCls), {})})
        for scheme, pool in (("http", urllib3.HTTPConnectionPool), ("https", urllib3.HTTPSConnectionPool))}
    adapter.cert_verify = lambda *args: None    # requests would read all authorities anew for each connection: 45 ms
    return adapter


def fetch(url, allow_private=False):
    """The bytes of an image, and it as RGB PIL image. Raises DownloadError. Guard: each redirect is checked as well."""
    _here.deadline, session = monotonic() + MAX_SECONDS, requests.Session()
    session.trust_env = False                                   # Guard: a proxy would resolve the names, unchecked
    session.adapters = {"http": _adapter(os.getpid(), allow_private)}             # and https, by its first letters

    def attempt():
        with request(session, "GET", url, HEADERS, timeout=TIMEOUT) as answer:
            return b"".join(body(url, answer, MAX_BYTES))
    data = retry(attempt, TRIES, _here.deadline)
    try:
        return data, load_image(data)
    except UserError:
        raise DownloadError(url, "no good image") from None


def _name(url):
    """What the file of an address is called. Guard: nothing of the address is in it, so it cannot lead elsewhere."""
    return hashlib.sha256(url.encode()).hexdigest()[:20]


# ---- a folder of small square images

def _pairs(rows, known):
    """{"url": "http://a/1", "text": "a  dog", "id": 7} -> "http://a/1", "a dog", fit for any csv; each address once."""
    try:
        for row in rows:
            pair = [[row[name] for name in names if name in row][0] for names in COLUMNS]
            url, caption = (" ".join(ODD.sub(" ", str(cell or "")).split())[:10_000] for cell in pair)
            if None in row:
                raise ValueError("more cells than the header has")
            if url and caption and url not in known:
                known.add(url)                                                    # duplicates within the rows, too
                yield url, caption
    except (ValueError, TypeError, LookupError, RecursionError, csv.Error) as error:
        raise UserError(f"the rows cannot be read ({str(error)[:99]}); each needs image_url (or url) and capsfusion "
                        "(or caption, or text), in json lines or in a csv with a header") from None


def download_images(rows, folder, size=128, limit=1000, allow_private=False):
    """Fetch images into `folder`, as JPEGs of size x size, until it holds `limit` -> {status: how many addresses}.

    captions.csv makes the folder one that layouts.photos reads. It has a line per address with "ok" or the reason of
    its failure, and decides what is not fetched again: to retry failures, delete their lines. Never more rows are taken
    than may still be needed, so that the folder holds the first good ones, however threads and kills fall."""
    table, pool, jobs = Path(folder, "captions.csv"), ThreadPoolExecutor(THREADS), [None]
    gates = defaultdict(lambda: threading.Semaphore(PER_HOST))  # by host

    def work(gate, url, caption):       # -> the line of the address
        try:
            with gate:
                image = fetch(url, allow_private)[1]
        except DownloadError as error:
            return ["", caption, error.reason, url]
        short, long = sorted(image.size)        # a crop would lose too much of long, thin images: black is added
        square = ImageOps.fit if short / long >= 0.6 else ImageOps.pad
        square(image, (size, size)).save(table.with_name(name := f"{_name(url)}.jpg"), quality=95)
        return [name, caption, "ok", url]

    with locked(table.with_name(".lock")):      # two runs in one folder would overwrite each other's table
        lines = [*csv.reader(table.read_text("utf-8", "replace").splitlines())] if table.exists() else [HEADER]
        if lines[:1] != [HEADER]:
            raise UserError(f"{table} was not made by this program; choose another folder")
        done = {line[3]: line for line in lines[1:] if len(line) == 4}          # by address; half a line does not count
        pairs, counts = _pairs(rows, set(done)), Counter(line[2] for line in done.values())
        try:
            while jobs:
                jobs = [pool.submit(work, gates[str(url.split("/")[2:3])], url, caption)
                        for url, caption in itertools.islice(pairs, max(0, min(limit - counts["ok"], 200)))]
                for n, job in enumerate(as_completed(jobs), 1):
                    done[job.result()[3]] = job.result()
                    progress(n, len(jobs), "addresses")
                write_csv(table, HEADER, sorted(done.values()))                   # a kill costs the jobs since
                counts = Counter(line[2] for line in done.values())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    print(f"{folder} now holds: {dict(counts.most_common())}")
    return counts


def capsfusion_rows(cache):
    """The rows (dicts) of BAAI/CapsFusion-120M from the Hub's rows service, in pages of 100 that are kept in `cache`.
    The service converts only a first part of a large data set, and slowly: it is given about a minute for a page."""
    offset, total = 0, 1
    while offset < total:
        page = read_json(download(f"{ROWS}&offset={offset}&length=100", Path(cache, f"{offset:09d}.json"), tries=8))
        yield from (row["row"] for row in page["rows"])
        offset, total = offset + 100, page["num_rows_total"]


def table_rows(path):
    """The rows (dicts) of a local .jsonl, or of a .csv with a header, read as it goes."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        is_jsonl = str(path).endswith(".jsonl")
        yield from map(json.loads, filter(str.strip, file)) if is_jsonl else csv.DictReader(file)


class ImageFolderCache:
    """For training while downloading: images from a folder, else fetched, and kept while it has less than max_bytes.
    What came first stays: in epochs over more than fits, the least recently used image is the one needed next."""
    def __init__(self, folder, max_bytes, allow_private):
        self.folder, self.allow_private = folder, allow_private
        folder.mkdir(parents=True, exist_ok=True)
        room = max_bytes - sum(file.stat().st_size for file in folder.iterdir())
        self.room = room / int(os.environ.get("WORLD_SIZE", 1))                   # torchrun's processes share it

    def open(self, url):
        """The RGB PIL image. Raises DownloadError if it cannot be had."""
        path = self.folder / _name(url)
        with contextlib.suppress(OSError, UserError):           # not there, or half a file
            return load_image(path.read_bytes())
        data, image = fetch(url, self.allow_private)
        if len(data) <= self.room:
            self.room -= len(data)
            path.write_bytes(data)      # not atomic_write, which waits for the disk: half a file is fetched again
        return image
