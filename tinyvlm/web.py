"""Many images from the web, taken politely and safely: most links are fine; some are dead, slow, huge or hostile.

    fetch_image(url)                                        # -> bytes and RGB PIL image, or FetchError("HTTP 404")
    download_images(table_rows("pairs.csv"), "data/mine")   # -> a folder that layouts.photos reads, with report.csv
    ImageStream(urls, "data/cache", 10**10)                 # -> images while training, through a cache on disk

Strangers wrote the links, so each is a request they make from inside your network (server-side request forgery): we
connect to public addresses only, and to the very address that was checked. What comes is an image if it decodes as
one, whatever its name says. Each protection is marked `Guard:` where it stands; when to try again is download.py's
rule. Left out: proxies (they look names up, so nothing could be checked), robots.txt, cookies.
"""
import contextlib
import csv
import functools
import hashlib
import http.client
import io
import ipaddress
import itertools
import json
import math
import os
import re
import socket
import ssl
import threading
import time
import zlib
from collections import Counter, OrderedDict, defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from urllib.parse import quote, urlencode, urljoin

import requests
from PIL import Image, UnidentifiedImageError

from .config import UserError
from .download import Fault, Limits, download, locked, may_pass, number, origin, persist
from .image import MAX_ASPECT, adaptive_square, load_image

FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF")     # Guard: Pillow would hand an EPS to Ghostscript
HEADERS = {"User-Agent": "tinyvlm/0.1 (collects training images)", "Accept": "image/*", "Accept-Encoding": "identity"}
AHEAD = 2048                            # rows read before their turn, so that one slow host leaves work for the others
REPORT = ["url", "file", "status", "width", "height", "fit", "caption", "extras"]
URL_COLUMNS, CAPTION_COLUMNS = ("image_url", "url"), ("capsfusion", "caption", "text")
ROWS = "https://datasets-server.huggingface.co/rows"


@dataclass(frozen=True)
class Fetch:
    """How much to put up with, for one image."""
    max_bytes: int = 20_000_000         # of the body, and of what it unpacks to
    timeout: float = 10.0               # seconds to connect, and without a single byte
    max_seconds: float = 30.0           # for all of it: redirects, waiting and second tries included
    per_host: int = 8                   # requests at once to one host, by download_images
    threads: int = 32
    max_pixels: int = 50_000_000        # 150 MB decoded
    allow_private: bool = False         # also addresses inside your own network and machine
    retries: int = 2                    # after what may pass: 429, 5xx, a broken connection, a timeout
    sleep: object = time.sleep          # tests put a list's append here and never wait


class FetchError(Fault):
    """Why there is no image, in a few words for a report."""


# One connection, to an address that was checked, with an end in time.

class _Timed(socket.socket):
    """Guard: every read ends by `deadline`. A timeout alone starts anew with each byte of a server that drips."""
    deadline, pause = math.inf, 10.0

    def clock(self):
        left = min(self.deadline - time.monotonic(), self.pause)
        if left <= 0:
            raise TimeoutError
        self.settimeout(left)

    def recv_into(self, *args):
        self.clock()
        if hasattr(socket, "TCP_QUICKACK"):     # else Linux may sit on an ACK, for which a server that sends head and
            self.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)         # body in two pieces waits 40 ms
        return super().recv_into(*args)


class _TimedTLS(_Timed, ssl.SSLSocket):
    """The same under TLS."""


def is_public(address):
    """Is an IP address out in the open internet? "8.8.8.8" yes; "127.0.0.1", "10.0.0.1", "::ffff:169.254.1.1" no."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if ip.version == 6:                 # an IPv4 address may hide in it: mapped, 6to4, Teredo, NAT64
        nat64 = ip in ipaddress.ip_network("64:ff9b::/96") and ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        ip = ip.ipv4_mapped or ip.sixtofour or (ip.teredo and ip.teredo[1]) or nat64 or ip
    return ip.is_global and not (ip.is_multicast or ip.is_reserved)


class _Line(http.client.HTTPConnection):
    """http.client's connection to a checked address; the name still goes into Host: and against the certificate."""

    def __init__(self, place, web):
        super().__init__(*place[1:])
        self.place, self.web, self.default_port = place, web, {"http": 80, "https": 443}[place[0]]

    def ask(self, target, deadline):
        self.deadline = deadline
        if self.sock:
            self.sock.deadline = deadline
        self.request("GET", target, headers=HEADERS)
        return self.getresponse()

    def connect(self):
        """Guard: the name is looked up once. A second look-up could give another address, unchecked (DNS rebinding)."""
        try:
            found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        except (socket.gaierror, UnicodeError) as error:
            raise FetchError("no such host", again=getattr(error, "errno", 0) == socket.EAI_AGAIN) from None
        found = [entry for entry in found if self.web.how.allow_private or is_public(entry[4][0])]
        fault = FetchError("private address")
        for family, kind, protocol, _, address in found:
            try:
                self.sock = self.timed(_Timed(family, kind, protocol))
                self.sock.connect(address)
                if self.place[0] == "https":
                    self.sock = self.timed(self.web.tls.wrap_socket(self.sock, server_hostname=self.host))
                return
            except OSError as error:
                self.close()
                late, tls = isinstance(error, TimeoutError), isinstance(error, ssl.SSLError)
                fault = FetchError("timeout" if late else "TLS fails" if tls else "cannot be reached", again=not tls)
        raise fault

    def timed(self, sock):
        sock.deadline, sock.pause = self.deadline, self.web.how.timeout
        sock.clock()
        return sock


def _target(url):
    """((scheme, host, port), what to ask for), in ASCII: "http://a.b/ä?x#y" -> (("http", "a.b", 80), "/%C3%A4?x")."""
    prepared = requests.PreparedRequest()
    try:
        prepared.prepare_url(url, None)
        return origin(prepared.url), prepared.path_url
    except (requests.RequestException, ValueError):
        raise FetchError("bad address") from None
    except Fault:
        raise FetchError("not http or https") from None


class _Web:
    """What many requests share: the rules, the certificates, each thread's last connection (opening one is slow)."""

    def __init__(self, how):
        self.how, self.mine = how, threading.local()
        self.decoding = threading.Semaphore(os.cpu_count() or 1)        # more at once would only need more memory

    @functools.cached_property
    def tls(self):
        context = ssl.create_default_context(cafile=requests.certs.where())
        context.sslsocket_class = _TimedTLS
        return context

    def get(self, url, deadline):
        """The body at `url`. Guard: of at most five redirects, each is checked like the first. Raises FetchError."""
        body = None
        try:
            for _ in range(6):
                answer = self.open(url, deadline)
                there = answer.status in (301, 302, 303, 307, 308) and answer.getheader("Location")
                if not there:
                    break
                self.hang_up()
                try:
                    url = urljoin(url, there.encode("latin-1").decode("utf-8", "replace"))
                except ValueError:                              # such as http://[
                    raise FetchError("bad address") from None
            else:
                raise FetchError("too many redirects")
            if answer.status != 200:
                raise FetchError(f"HTTP {answer.status}", *may_pass(answer.status, answer.headers))
            body = self.read(answer)
            return body
        except TimeoutError:
            raise FetchError("timeout", again=True) from None
        except (OSError, http.client.HTTPException, zlib.error):
            raise FetchError("connection broke", again=True) from None
        finally:                        # an answer left unread would be taken for the next one
            if body is None or answer.will_close:
                self.hang_up()

    def open(self, url, deadline):
        """Ask over this thread's last connection if it leads there; if the server has closed it since, over a new."""
        place, target = _target(url)
        line = getattr(self.mine, "line", None)
        if line and line.place == place:
            with contextlib.suppress(http.client.BadStatusLine, ConnectionError):
                return line.ask(target, deadline)
        self.hang_up()
        self.mine.line = _Line(place, self)
        return self.mine.line.ask(target, deadline)

    def hang_up(self):
        if line := self.mine.__dict__.pop("line", None):
            line.close()

    def read(self, answer):
        """The body, unpacked if it came packed unasked. Guard: both sizes are watched; 20 kB of gzip can hold 20 MB."""
        packed, limit = answer.getheader("Content-Encoding", "").strip().lower(), self.how.max_bytes
        if packed not in ("", "identity", "gzip", "x-gzip", "deflate"):
            raise FetchError(f"packed as {packed[:20]}")
        unpack = zlib.decompressobj(47).decompress if packed not in ("", "identity") else lambda chunk, most: chunk
        body, came, announced = bytearray(), 0, number(answer.getheader("Content-Length")) or 0
        while max(came, announced, len(body)) <= limit and (chunk := answer.read(1 << 16)):
            came += len(chunk)
            body += unpack(chunk, limit + 1 - len(body))        # no more than that is ever in memory
        if max(came, announced, len(body)) > limit:
            raise FetchError("too large")
        if answer.length:               # bytes that were announced and did not come
            raise FetchError("connection broke", again=True)
        return bytes(body)

    def decode(self, data):
        """Bytes -> upright RGB PIL image. Guard: few bytes can be many pixels, so the head is read first."""
        try:
            with self.decoding:
                with Image.open(io.BytesIO(data), formats=FORMATS) as head:
                    w, h = head.size
                if w * h > self.how.max_pixels:
                    raise FetchError("too many pixels")
                if max(w, h) > MAX_ASPECT * min(w, h):          # padded to a square, such a strip would be gigabytes
                    raise FetchError("too long and thin")
                return load_image(data, "it", FORMATS)
        except FetchError:
            raise
        except UnidentifiedImageError:
            raise FetchError("not an image") from None
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            raise FetchError("too many pixels") from None
        except Exception as error:      # a file made with malice can make a decoder raise anything
            raise FetchError("truncated image" if "truncat" in str(error).lower() else "damaged image") from None


def fetch_image(url, how=Fetch(), web=None):
    """The bytes at `url` and the upright RGB PIL image that they are. Raises FetchError; Fetch has the limits.

    A Retry-After is obeyed if it ends within how.max_seconds. web: shared by the requests of a crowd.
    """
    web, deadline = web or _Web(how), time.monotonic() + how.max_seconds

    def attempt():
        data = web.get(url, deadline)
        return data, web.decode(data)
    patience = Limits(tries=how.retries + 1, max_wait=math.inf, sleep=how.sleep, show=False)
    return persist(attempt, patience, deadline)


# A folder of small square images. Its report is a journal, one line per finished address: a kill loses none.

def _name(url):
    """What the file of an address is called. Guard: nothing of the address is in it, so it cannot lead elsewhere."""
    return hashlib.sha256(url.encode()).hexdigest()[:20]


def _plain(text, gap):
    """Without the control characters and half characters that no csv survives."""
    return re.sub("[\x00-\x1f\x7f\ud800-\udfff]", gap, str(text or "")).strip()


def _write(path, data):
    """Guard: the name appears with the whole file behind it. A kill leaves a .part, which the next run removes."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(data)
    os.replace(part, path)


def _csv(rows):
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


@contextlib.contextmanager
def _long_cells():
    """Python's csv refuses cells over 131,072 characters, and an address may be `data:` and a whole image.

    The limit is the process's, and others rely on it to notice a quote left open: so it is put back.
    """
    before = csv.field_size_limit(1 << 30)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _read_report(path):
    """{name: the latest row of that address}; makes the file if need be, and drops a last line that a kill tore."""
    head, captions = _csv([REPORT]), path.with_name("captions.csv")
    foreign = not path.exists() and captions.exists()
    with open(path, "a+b") as file:
        file.seek(0)
        data = file.read()
        if foreign or not data.startswith(head[:len(data)]):
            raise UserError(f"{captions if foreign else path} was not made by this program; choose another folder")
        if not file.truncate(data.rfind(b"\n") + 1):
            file.write(head)
    with _long_cells(), open(path, encoding="utf-8", newline="") as file:
        return {_name(row[0]): row for row in list(csv.reader(file))[1:] if len(row) == len(REPORT)}


def _earlier(folder, size, retry_failed):
    """{name: is it good} of what need not be asked for again. Images of another size are refused."""
    rows = _read_report(folder / "report.csv")
    done = {name: bool(row[1]) for name, row in rows.items()
            if ((folder / row[1]).is_file() if row[1] else not retry_failed)}
    for name in [name for name in done if done[name]][:1]:
        with Image.open(folder / rows[name][1]) as image:
            if image.size != (size, size):
                raise UserError(f"{folder} holds images of {image.width}x{image.height}, and {size}x{size} was asked "
                                "for; choose another folder")
    return done


def _finish_report(folder):
    """Sort the report by file name, derive captions.csv from it, and count what the folder holds."""
    rows = [row for _, row in sorted(_read_report(folder / "report.csv").items())]
    good = [row for row in rows if row[1]]
    _write(folder / "report.csv", _csv([REPORT, *rows]))
    _write(folder / "captions.csv", _csv([["image", "caption"], *([row[1], row[6]] for row in good)]))
    fits, reasons = Counter(row[5] for row in good), Counter(row[2] for row in rows if not row[1])
    return {"good": len(good), "failed": len(rows) - len(good), "reasons": dict(reasons.most_common()),
            **{fit: fits[fit] for fit in ("cropped", "padded", "as is")}}


def _in_parallel(jobs, work, how, room):
    """Yield work(job) of (host, job) pairs as they finish: at most room() unfinished, how.per_host running per host.

    The jobs of a full host wait here, outside the pool, so a slow host never holds more than its share of threads: with
    per_host=1 and rows a1 a2 b1, a1 and b1 run at once. (None, None) is no job, only a reason to ask room() again.
    """
    pool, done, busy, waiting = ThreadPoolExecutor(how.threads), SimpleQueue(), Counter(), defaultdict(deque)
    unfinished, pair = 0, True          # pair: the latest taken from jobs; None once there are no more

    def start(host, job):
        pool.submit(work, job).add_done_callback(lambda future: done.put((host, future)))
    try:
        while pair or unfinished:
            # start jobs while there is room; else wait for a result, until none is left
            if pair and unfinished < room() and (pair := next(jobs, None)):
                host, job = pair
                if job:
                    unfinished, busy[host] = unfinished + 1, busy[host] + 1
                    start(host, job) if busy[host] <= how.per_host else waiting[host].append(job)
            while unfinished and (not pair or unfinished >= room() or not done.empty()):
                host, future = done.get()
                unfinished, busy[host] = unfinished - 1, busy[host] - 1
                if waiting[host]:
                    start(host, waiting[host].popleft())
                elif not busy[host]:
                    del waiting[host], busy[host]               # millions of hosts may pass by
                yield future.result()
            if not unfinished and room() <= 0:
                return
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _shrink(image, size):
    """(size x size image, how: "as is", "cropped" or "padded")."""
    image.thumbnail((4096, 4096))       # before padding: 25,000 x 600 pixels would become a square of 1.9 GB
    square = adaptive_square(image)
    fit = "as is" if square.size == image.size else "cropped" if square.width == min(image.size) else "padded"
    return square.resize((size, size), Image.Resampling.BICUBIC), fit


def _keep(url, caption, extras, folder, size, web):
    """Fetch, shrink and save one image -> its row in the report."""
    told, jpeg = [caption, json.dumps(extras, default=str)], io.BytesIO()
    try:
        if not 0 < len(caption) < 10_000:
            raise FetchError("caption too long" if caption else "no caption")
        _, image = fetch_image(url, web.how, web)
    except FetchError as error:
        return [url, "", str(error), "", "", "", *told]
    w, h = image.size                   # before _shrink, which shrinks a huge image in place
    small, fit = _shrink(image, size)
    small.save(jpeg, "JPEG", quality=95)
    _write(folder / f"{_name(url)}.jpg", jpeg.getvalue())
    return [url, f"{_name(url)}.jpg", "ok", w, h, fit, *told]


def download_images(rows, folder, size=128, how=Fetch(), limit=None, say=print, retry_failed=False):
    """Fetch the images of (url, caption, dict of extras) rows into `folder`, as size x size JPEGs named by their URL.

    report.csv gets a line per URL with the reason of each failure; captions.csv makes the folder one that
    layouts.photos reads. What an earlier run finished is not asked for again (failures are with retry_failed).
    Rows are started in order, and never more than could still be needed for `limit` good images: so these are the
    first `limit` good ones, however threads and kills fall. With limit 7 and every third link dead, 11 are asked.
    Returns counts of the folder: good, failed, reasons, cropped, padded, as is. Raises UserError if the folder holds
    images of another size.
    """
    folder, web = Path(folder), _Web(how)
    limit, began, said = math.inf if limit is None else limit, time.monotonic(), time.monotonic()
    kept = new = fine = 0               # good from earlier runs, as far as read; asked for now; good among these
    folder.mkdir(parents=True, exist_ok=True)

    def jobs():                         # what no earlier run, and no earlier row of this one, has finished
        nonlocal kept
        asked = set()
        for url, caption, extras in rows:
            name = _name(url := _plain(url, ""))
            if name not in asked and name not in earlier:
                host = re.split("[/?#]", url.partition("//")[2])[0].lower()
                yield host, (url, " ".join(_plain(caption, " ").split()), extras)
            elif name not in asked and earlier[name]:
                kept += 1
                yield None, None
            asked.add(name)

    def pace():
        rate = new / (time.monotonic() - began + 1e-9)
        return f"{new} addresses at {rate:.0f}/s, {fine / max(1, new):.0%} gave an image"

    with locked(folder / ".lock"):      # two runs in one folder would tear each other's report
        for left in folder.glob("*.part"):
            left.unlink()
        earlier = _earlier(folder, size, retry_failed)
        try:
            with open(folder / "report.csv", "ab") as report:
                for row in _in_parallel(jobs(), lambda job: _keep(*job, folder, size, web), how,
                                        lambda: min(AHEAD, limit - kept - fine)):
                    report.write(_csv([row]))
                    report.flush()
                    new, fine = new + 1, fine + bool(row[1])
                    if time.monotonic() > said + 10:
                        said = time.monotonic()
                        say(pace())
        finally:                        # ctrl-C, too, leaves a folder that can be trained on
            counts = _finish_report(folder)
    why = ", ".join(f"{count} {reason}" for reason, count in list(counts["reasons"].items())[:5])
    say(f"{pace()}; {folder} holds {counts['good']} images ({counts['cropped']} cropped, {counts['padded']} padded, "
        f"{counts['as is']} as is)" + (f"; failed: {why}" if why else ""))
    return counts


# Where the links come from.

def dataset_rows(dataset, config, split, start=0, limit=None, endpoint=ROWS, cache="data/rows", **limits):
    """The rows (dicts) of a data set on the Hugging Face hub, from its rows service: no parquet reader needed.

    Pages of 100 are kept in `cache` and not asked for again; `limits` are download()'s. The service converts only a
    first part of a large data set, and slowly: 429, 5xx and timeouts are tried again for about a minute.
    """
    folder = Path(cache, quote(f"{dataset}--{config}--{split}", safe=""))
    limits = {"tries": 8, "show": False, **limits}
    offset, total, end = start // 100 * 100, math.inf, math.inf if limit is None else start + limit
    while offset < min(total, end):
        query = urlencode(dict(dataset=dataset, config=config, split=split, offset=offset, length=100))
        path = download(f"{endpoint}?{query}", folder / f"{offset:09d}.json", **limits)
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
    for row in rows:
        url, caption = (next((name for name in names if name in row), None) for names in (URL_COLUMNS, CAPTION_COLUMNS))
        if url is None or caption is None:
            raise UserError(f"{where} has the columns {', '.join(map(str, row))[:100]}; it needs image_url (or url) "
                            "and capsfusion (or caption, or text)")
        address = row[url]["src"] if isinstance(row[url], dict) and "src" in row[url] else row[url]
        yield address, row[caption], {key: value for key, value in row.items() if key not in (url, caption)}


def table_rows(path):
    """A local .csv (with a header) or .jsonl -> (url, caption, {other columns}), read as it goes. Raises UserError."""
    path = Path(path)
    if path.suffix.lower() not in (".csv", ".jsonl"):
        raise UserError(f"{path} should be a .csv or .jsonl file; export other formats (say, parquet) as one of these")

    def dicts():
        row = 0
        try:
            with _long_cells(), open(path, encoding="utf-8-sig", newline="") as file:
                lines = filter(str.strip, file) if path.suffix.lower() == ".jsonl" else csv.DictReader(file)
                for row, found in enumerate(lines, 1):
                    found = json.loads(found) if isinstance(found, str) else found
                    if not isinstance(found, dict) or None in found:
                        raise ValueError("it is no json object, or has more cells than the header")
                    yield found
            if not row:
                raise ValueError("it holds no rows")
        except (OSError, ValueError, csv.Error) as error:
            raise UserError(f"cannot read {path} (row {row}): {error}; mend it") from None
    return caption_rows(dicts(), path)


# Training while downloading.

class _DiskCache:
    """Bytes by name in a folder of at most max_bytes; least recently used out, also across restarts (file dates)."""

    def __init__(self, folder, max_bytes):
        self.folder, self.max_bytes, self.lock = Path(folder), max_bytes, threading.Lock()
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob("*.part"):
            left.unlink()
        files = [(path.stat(), path.name) for path in self.folder.iterdir() if re.fullmatch("[0-9a-f]{20}", path.name)]
        self.sizes = OrderedDict((name, info.st_size) for info, name in sorted(files, key=lambda f: f[0].st_mtime_ns))
        self.bytes = sum(self.sizes.values())
        self.trim()

    def trim(self, room=0):
        while self.sizes and self.bytes + room > self.max_bytes:
            name, size = self.sizes.popitem(last=False)
            (self.folder / name).unlink(missing_ok=True)
            self.bytes -= size

    def read(self, name):
        """The bytes, or None."""
        with self.lock:
            if name not in self.sizes:
                return None
            self.sizes.move_to_end(name)
        with contextlib.suppress(FileNotFoundError):            # thrown out since: then it is fetched again
            os.utime(self.folder / name)
            return (self.folder / name).read_bytes()

    def write(self, name, data):
        with self.lock:
            self.bytes -= self.sizes.pop(name, 0)
            if len(data) <= self.max_bytes:
                self.trim(len(data))
                with contextlib.suppress(FileNotFoundError):    # another process began here and tidied our part away
                    _write(self.folder / name, data)
                    self.sizes[name], self.bytes = len(data), self.bytes + len(data)


class ImageStream:
    """Images by number from a list of URLs, fetched shortly before they are asked for and kept in a cache on disk.

    stream.prefetch(order)          # what will be asked for next, of any length; `ahead` of it are held in memory
    stream.get(i)                   # the RGB PIL image, or FetchError: leave this one out
    stream.failed                   # {reason: how many addresses}, after all second tries
    stream.close()

    An address goes from `plan` (announced) to `coming` (fetched or being fetched) to the caller of get(). With ahead=6
    and prefetch(range(50)), ten calls of get() have made 16 requests.
    Once more than fail_share of the latest 500 addresses (and at least 50) failed, get() raises one UserError. The
    data set is taken to lie on one host made for it, so how.threads counts here and not how.per_host. Any number of
    threads may call; processes need a cache folder each.
    """

    def __init__(self, urls, cache_dir, max_cache_bytes=10 * 10**9, how=Fetch(), ahead=256, fail_share=0.2):
        self.urls, self.ahead, self.fail_share = urls, ahead, fail_share
        self.web, self.cache = _Web(how), _DiskCache(cache_dir, max_cache_bytes)
        turn = itertools.count()        # threads start 5 ms apart: a server with a short queue (5 in Python's) drops
        self.pool = ThreadPoolExecutor(                         # some of many connections at once, for a second each
            how.threads, initializer=lambda: time.sleep(0.005 * next(turn)))
        self.plan, self.coming, self.lock = OrderedDict(), OrderedDict(), threading.Lock()
        self.failed, self.latest = Counter(), deque(maxlen=500)

    def prefetch(self, items):
        with self.lock:
            self.plan.update((self.urls[i], None) for i in items if self.urls[i] not in self.coming)
            self.feed()

    def feed(self):
        while self.plan and len(self.coming) < self.ahead:
            url, _ = self.plan.popitem(last=False)
            self.coming[url] = self.pool.submit(self.load, url)

    def get(self, i):
        """Image i. Raises FetchError if it cannot be had, UserError if too many cannot."""
        url = self.urls[i]
        with self.lock:
            future = self.coming.pop(url, None)
            if not future and url in self.plan:                 # what was announced before it was passed over
                while self.plan.popitem(last=False)[0] != url:
                    pass
                oldest = next(iter(self.coming), None)          # may be of the passed over: make room, one a call
                if oldest and self.coming[oldest].done():
                    del self.coming[oldest]
            self.feed()
        try:
            return future.result() if future else self.load(url)
        finally:
            self.check()

    def check(self):
        """Guard: one dead link is left out, but a run on a tenth of its data must not look like a good one."""
        with self.lock:
            bad, tried = sum(self.latest), len(self.latest)
            if tried >= 50 and bad > self.fail_share * tried:
                reason, _ = self.failed.most_common(1)[0]
                raise UserError(f"{bad} of the latest {tried} images could not be fetched (mostly: {reason}); check "
                                "the connection and the addresses") from None

    def load(self, url):
        """From the cache, or else from the network. Raises FetchError."""
        data = self.cache.read(_name(url))
        with contextlib.suppress(FetchError):                   # a file that was damaged on disk is fetched again
            if data:
                return self.web.decode(data)
        try:
            data, image = fetch_image(url, self.web.how, self.web)
        except FetchError as error:
            with self.lock:
                self.failed[str(error)] += 1
                self.latest.append(True)
            raise
        with self.lock:
            self.latest.append(False)
        self.cache.write(_name(url), data)
        return image

    def close(self):
        with self.lock:
            self.plan.clear()
            self.pool.shutdown(wait=False, cancel_futures=True)
