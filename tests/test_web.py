"""Images from the web, against servers inside the test that play a good host, dead ones and hostile ones.

Only 127.0.0.1 is contacted, so every fetch but those of the refusals allows private addresses.
"""
import csv
import io
import json
import os
import signal
import socket
import ssl
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import requests
from PIL import Image

from servers import MALFORMED, Host, answer, in_turn, raw, send
from tinyvlm import download, web
from tinyvlm.config import UserError
from tinyvlm.download import DownloadError
from tinyvlm.layouts import photos
from tinyvlm.web import ImageFolderCache, capsfusion_rows, download_images, fetch, is_public, table_rows


def picture(size=(40, 30), colour=(200, 30, 60), kind="JPEG"):
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, kind)
    return file.getvalue()


@pytest.fixture(autouse=True)
def naps(monkeypatch):
    """Collects the pauses that would have been made; and little patience."""
    found = []
    monkeypatch.setattr(download, "sleep", found.append)
    monkeypatch.setattr(web, "TIMEOUT", 2)
    monkeypatch.setattr(web, "MAX_SECONDS", 4)
    return found


def reason(url, allow_private=True):
    """Why this address gives no image."""
    return pytest.raises(DownloadError, fetch, url, allow_private).value.reason


# ---- one image

def test_an_image_comes_with_our_name_no_packing_no_cookies_and_no_proxy(host, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    host.pages["/a%20b.png"] = send(picture(kind="PNG"), Content_Type="text/html", Set_Cookie="track=1")
    for _ in range(2):
        data, image = fetch(f"{host.url}/a b.png#part", True)
        assert data == picture(kind="PNG") and image.size == (40, 30) and image.getpixel((0, 0)) == (200, 30, 60)
    assert "tinyvlm" in host.gets("User-Agent")[0] and host.gets("Accept-Encoding") == ["identity"] * 2
    assert host.gets("Cookie") == [None, None]


def test_private_addresses_get_no_byte_however_they_are_written(host, monkeypatch):
    """Nor does a name whose second answer leads elsewhere (DNS rebinding)."""
    port, found = host.url.rpartition(":")[2], socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda name, *args, **options: found(
        "127.0.0.1" if name == "public.example" else name, *args, **options))
    for name in ("127.0.0.1", "localhost", "2130706433", "0x7f.1", "0.0.0.0", "[::ffff:127.0.0.1]", "public.example"):
        assert reason(f"http://{name}:{port}/x", False) == "private address", name
    assert not host.seen and is_public("8.8.8.8") and is_public("2606:4700::1111")
    for address in ("127.0.0.1", "10.0.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
                    "::1", "fe80::1%eth0", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "ff0e::1"):
        assert not is_public(address), address


def test_each_redirect_is_checked_and_ten_are_the_most(host, naps, monkeypatch):
    for k in range(11):
        host.pages[f"/r{k}"] = send(status=302, Location=f"r{k - 1}" if k else "/end")
    host.pages["/end"] = send(picture())
    assert fetch(f"{host.url}/r9", True)[1].size == (40, 30) and reason(f"{host.url}/r10") == "HTTP 302"
    host.pages["/file"] = send(status=302, Location="file:///etc/passwd")
    for url in (f"{host.url}/file", "ftp://a.b/c", "http://", "http://[::1/", "javascript:alert(1)", "no url"):
        assert reason(url) in ("MissingSchema", "InvalidSchema", "InvalidURL", "ValueError") and not naps
    verdicts = iter([True, False])                              # on the first host, then on the second
    monkeypatch.setattr(web, "is_public", lambda address: next(verdicts))
    with Host() as inside:
        host.pages["/inside"] = send(status=302, Location=inside.url)
        assert reason(f"{host.url}/inside", False) == "private address" and not inside.seen


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_answers_are_a_reason_and_no_image(host, name):
    host.pages["/x"] = raw(MALFORMED[name].replace(b"good", picture()[:4]))
    assert reason(f"{host.url}/x") not in ("no good image", "ReadTimeout")


def test_a_server_that_drips_is_cut_off_in_head_and_body(host, monkeypatch):
    """Each byte comes well within TIMEOUT; only the limit for the whole ends it."""
    monkeypatch.setattr(web, "MAX_SECONDS", 0.4)

    def drip(start):
        def page(handler):
            handler.wfile.write(start)
            for _ in range(60):
                handler.wfile.write(b"5")
                time.sleep(0.05)
        return page
    ok = b"HTTP/1.1 200 OK\r\n"
    for k, start in enumerate((b"", ok + b"X-Slow: ", ok + b"Content-Length: 60\r\n\r\n",
                               ok + b"Transfer-Encoding: chunked\r\n\r\n")):
        host.pages[f"/{k}"] = drip(start)
    host.pages["/4"] = lambda handler: time.sleep(0.6)
    began = time.monotonic()
    with ThreadPoolExecutor(5) as pool:
        assert {*pool.map(lambda k: reason(f"{host.url}/{k}"), range(5))} <= {"ReadTimeout", "ReadTimeoutError"}
    assert time.monotonic() - began < 2.5, "60 drips last 3 s each"


def test_what_may_pass_is_tried_again_and_what_not_is_not(host, naps):
    """And over one connection, where the server keeps it open: each costs a handshake."""
    ports = []
    good = lambda handler: (ports.append(handler.client_address[1]), send(picture())(handler))      # noqa: E731
    host.pages["/late"] = in_turn(raw(b""), send(status=429, Retry_After="1"), good)
    for _ in range(2):
        assert fetch(f"{host.url}/late", True)[1].size == (40, 30)
    assert naps == [0.5, 1] and len(ports) == 2 and len(set(ports)) == 1
    assert reason(f"{host.url}/gone") == "HTTP 404" and naps == [0.5, 1]
    host.pages["/a.jpg"] = send(b"<html>gone</html>", Content_Type="image/jpeg")
    assert reason(f"{host.url}/a.jpg") == "no good image"
    host.pages["/huge"] = send(b"x", Content_Length=10**10)
    assert reason(f"{host.url}/huge") == "more than 20000000 bytes"
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        assert reason(f"http://127.0.0.1:{nobody.getsockname()[1]}/") == "NewConnectionError" and len(naps) == 4


def test_tls_checks_the_name_and_keeps_to_the_time(host, monkeypatch):
    """The name in the URL is what the certificate and SNI are about; a drip ends here, too."""
    pem = Path(__file__).parent / "reference" / "tls.pem"
    context, names, found = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), [], socket.getaddrinfo
    context.load_cert_chain(pem)
    context.sni_callback = lambda sock, name, context: names.append(name)
    host.socket = context.wrap_socket(host.socket, server_side=True, do_handshake_on_connect=False)
    monkeypatch.setattr(socket, "getaddrinfo", lambda name, *a, **k: found("127.0.0.1", *a, **k))
    host.pages["/x"] = send(picture())
    host.pages["/drip"] = lambda handler: [(handler.wfile.write(b"x"), time.sleep(0.05)) for _ in range(60)]
    port = host.url.rpartition(":")[2]
    assert reason(f"https://tls.example:{port}/x") == "SSLError", "nobody vouches for this certificate"
    monkeypatch.setattr(requests.certs, "where", lambda: str(pem))
    web._adapter.cache_clear()
    assert fetch(f"https://tls.example:{port}/x", True)[1].size == (40, 30) and set(names) == {"tls.example"}
    assert reason(f"https://other.example:{port}/x") == "SSLError", "the certificate is for another name"
    assert reason(f"https://tls.example:{port}/x", False) == "private address"
    monkeypatch.setattr(web, "MAX_SECONDS", 0.4)
    assert reason(f"https://tls.example:{port}/drip") == "ReadTimeout"
    web._adapter.cache_clear()


# ---- a folder of many

def row(url, text):
    return {"url": url, "text": text, "id": 7}


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def test_folder_report_and_captions(host, tmp_path):
    """Bad and good rows; the result is a folder that photos() reads, and every address has its reason."""
    host.pages.update({"/square": send(picture((50, 50))), "/bad": raw(b"rubbish\r\n\r\n")})
    rows = [row(f"{host.url}/square", 'a "red", square\nthing\x00'), row(f"{host.url}/none", "é \ud83d broken"),
            row(f"{host.url}/square", "a second time"), row(f"{host.url}/bad", "b" * 200_000),
            row("", "no link"), row(f"{host.url}/x", None), row("data:image/png;base64," + "A" * 200_000, "a")]
    rows += [row(f"{host.url}/square?{k}", f"square {k}") for k in range(6)]
    for _ in range(2):                                          # the second finds all done
        counts = download_images(iter(rows), tmp_path / "d", allow_private=True)
        assert counts == {"ok": 7, "HTTP 404": 1, "InvalidSchema": 1, "ConnectionError": 1}
    assert [path for _, path, _ in host.seen].count("/none") == 1
    with open(tmp_path / "d" / "captions.csv", encoding="utf-8") as file:
        assert ["", "é broken", "HTTP 404", f"{host.url}/none"] in [*csv.reader(file)]
    data = photos("folder", tmp_path / "d")
    assert len(data.names) == 7 and [['a "red", square thing']] == [c for c in data.captions if "thing" in c[0]]


@pytest.mark.parametrize("size, black", [((200, 118), (0, 64)), ((118, 200), (64, 0)), ((200, 120), None),
                                         ((9, 9), None)])
def test_squares_are_cut_from_the_middle_or_padded_with_black(host, tmp_path, size, black):
    """Black where the short side ends if it is below 0.6 of the long one; a red square in the middle stays one."""
    image, side, file = Image.new("RGB", size, "white"), min(size) // 3, io.BytesIO()
    image.paste("red", [(n - side) // 2 for n in size] + [(n + side) // 2 for n in size])
    image.save(file, "PNG")
    host.pages["/x"] = send(file.getvalue())
    download_images([row(f"{host.url}/x", "a")], tmp_path, allow_private=True)
    pixels = np.asarray(Image.open(next(tmp_path.glob("*.jpg")))).astype(int)     # (128, 128, 3)
    assert (pixels.sum(axis=2) < 100).any() == bool(black) and (not black or pixels[black].sum() < 100)
    red = (pixels[..., 0] - pixels[..., 1] > 128)
    assert pixels.shape == (128, 128, 3) and abs(red[64].sum() - red[:, 64].sum()) <= 2 and red[64, 64]


def test_limit_keeps_the_first_good_ones_and_reads_no_further(host, tmp_path, monkeypatch):
    """With 32 threads and every third address dead, the limit must give exactly the first seven good of the list."""
    read, inside, most = [], [], []

    def page(handler):
        inside.append(handler)
        most.append(len(inside))
        time.sleep(0.02)
        inside.remove(handler)
        answer(handler, 200, picture())
    host.pages["/x"] = page
    monkeypatch.setattr(web, "PER_HOST", 2)

    def endless():
        while True:
            read.append(len(read))
            yield row(f"{host.url}/{'none' if read[-1] % 3 == 0 else 'x'}?{read[-1]}", f"number {read[-1]}")

    assert download_images(endless(), tmp_path / "a", limit=7, allow_private=True) == {"ok": 7, "HTTP 404": 4}
    assert read == list(range(11))
    for limit in (2, 5, 7):
        read.clear()
        download_images(endless(), tmp_path / "b", limit=limit, allow_private=True)
    assert contents(tmp_path / "a") == contents(tmp_path / "b") and max(most) == 2, "a host has two at once"


def test_a_killed_run_is_continued_and_deleted_lines_are_fetched_again(host, tmp_path):
    """kill -9 in the midst, then to the end: the folder is that of an unkilled run, byte by byte."""
    page = send(picture((48, 40)))
    host.pages["/x"] = lambda handler: (time.sleep(0.01), page(handler))
    rows = [row(f"{host.url}/{'x' if k % 3 else 'y'}?{k}", f"number {k}") for k in range(90)]
    download_images(rows, tmp_path / "calm", 32, 50, allow_private=True)
    child, calm = os.fork(), contents(tmp_path / "calm")
    if not child:
        download_images(rows, tmp_path / "killed", 32, 50, allow_private=True)
        os._exit(0)
    while len(list(tmp_path.glob("killed/*.jpg"))) < 8:
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    table = tmp_path / "killed" / "captions.csv"
    assert not table.exists(), "killed before its first table"
    download_images(rows, tmp_path / "killed", 32, 50, allow_private=True)
    assert contents(tmp_path / "killed") == calm
    table.write_text("".join(table.read_text().splitlines(keepends=True)[:-4]) + "\n")
    host.seen.clear()
    download_images(rows, tmp_path / "killed", 32, 50, allow_private=True)
    assert contents(tmp_path / "killed") == calm and len(host.seen) == 4
    table.write_text("month,money\n5,100")
    with pytest.raises(UserError, match="captions.csv was not made by this program"):
        download_images(rows, tmp_path / "killed")
    assert table.read_text() == "month,money\n5,100"


# ---- rows

def test_pages_of_rows_are_tried_again_and_kept(host, tmp_path, naps, monkeypatch):
    rows, refusals = [{"image_url": f"http://h/{k}", "capsfusion": f"text {k}"} for k in range(250)], [504, 429]

    def page(handler):
        offset = int(handler.path.partition("offset=")[2].partition("&")[0])
        if offset == 100 and refusals:
            return send(b"{}", refusals.pop(0))(handler)
        found = [{"row_idx": k, "row": rows[k], "truncated_cells": []} for k in range(offset, min(250, offset + 100))]
        send(json.dumps({"rows": found, "num_rows_total": 250}).encode())(handler)
    monkeypatch.setattr(web, "ROWS", f"{host.url}/rows?dataset=x")
    host.pages["/rows"] = in_turn(send(b"<html>sorry</html>"), page)
    with pytest.raises(UserError, match="000000000.json is not a readable JSON file"):
        next(capsfusion_rows(tmp_path))
    (tmp_path / "000000000.json").unlink()
    assert list(capsfusion_rows(tmp_path)) == rows and len(naps) == 2
    host.shutdown()
    assert list(capsfusion_rows(tmp_path)) == rows, "all pages come from the folder"


def test_tables_csv_and_jsonl_and_wrong_ones(tmp_path):
    (tmp_path / "a.csv").write_text('id,url,caption\n1,http://h/1,"a, b"\n2,http://h/2,c\n')
    (tmp_path / "b.jsonl").write_text('{"image_url": "http://h/1", "capsfusion": "x", "text": "kept"}\n\n')
    assert list(web._pairs(table_rows(tmp_path / "a.csv"), set())) == [("http://h/1", "a, b"), ("http://h/2", "c")]
    assert list(web._pairs(table_rows(str(tmp_path / "b.jsonl")), set())) == [("http://h/1", "x")]
    for name, text in (("a.csv", b"picture,title\n1,2\n"), ("a.csv", b"url,caption\nu,a,b\n"),    # cut by its comma
                       ("a.jsonl", b'{"url": '), ("a.jsonl", b"[1]\n"), ("a.jsonl", b"1\n"),
                       ("a.jsonl", b'{"url": "u"}\n'), ("a.parquet", b"PAR1\xff")):
        (tmp_path / name).write_bytes(text)
        with pytest.raises(UserError, match="the rows cannot be read .*; each needs image_url"):
            download_images(table_rows(tmp_path / name), tmp_path / "out")


# ---- the cache

def test_the_cache_keeps_to_its_limit_and_survives_a_restart(host, tmp_path):
    """Room for five files: what came first stays; a damaged file is fetched again."""
    size, fetched = len(picture(kind="BMP")), []
    host.pages.update({f"/{k}": send(picture(colour=(k, 0, 0), kind="BMP")) for k in range(8)})
    for _ in range(2):
        cache = ImageFolderCache(tmp_path, 5 * size + 3, True)
        assert [cache.open(f"{host.url}/{k}").getpixel((0, 0))[0] for k in range(8)] == [*range(8)]
        fetched.append([int(path[1:]) for _, path, _ in host.seen])
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) == 5 * size
    assert fetched == [[*range(8)], [*range(8), 5, 6, 7]]
    (tmp_path / web._name(f"{host.url}/1")).write_bytes(b"rotten")
    assert cache.open(f"{host.url}/1").getpixel((0, 0)) == (1, 0, 0)
