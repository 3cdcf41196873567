"""Images from the web, against servers inside the test that play a good host, dead ones and hostile ones.

Only 127.0.0.1 is contacted, so every fetch but those of the refusals sets allow_private. Waiting goes through the
injected `sleep`, so back-off takes no time.
"""
import csv
import gzip
import io
import json
import re
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import pytest
from PIL import Image

from servers import Host, answer, in_turn, send
from tinyvlm import web as module
from tinyvlm.config import UserError
from tinyvlm.image import RECIPES, load_image, to_pil, to_uint8
from tinyvlm.layouts import photos
from tinyvlm.web import (Fetch, FetchError, ImageStream, caption_rows, dataset_rows, download_images, fetch_image,
                         is_public, table_rows)


def picture(size=(40, 30), colour=(200, 30, 60), kind="JPEG", mode="RGB", **options):
    file = io.BytesIO()
    Image.new(mode, size, colour).save(file, kind, **options)
    return file.getvalue()


def noise(side=64, seed=0):
    """A JPEG with enough bytes to be cut in the middle."""
    file, made = io.BytesIO(), Image.effect_noise((side, side), 60 + seed)
    made.convert("RGB").save(file, "JPEG", quality=90)
    return file.getvalue()


@pytest.fixture
def naps():
    return []


@pytest.fixture
def how(naps):
    return Fetch(allow_private=True, timeout=2, max_seconds=4, sleep=naps.append, threads=8)


def reason(url, how):
    """Why this address gives no image."""
    with pytest.raises(FetchError) as caught:
        fetch_image(url, how)
    assert isinstance(caught.value, UserError) and len(str(caught.value)) < 40
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# One image.

def test_bytes_and_image_come_with_our_name_and_no_packing(host, how):
    host.pages["/a b.png"] = host.pages["/a%20b.png"] = send(picture(kind="PNG"), Content_Type="text/html")
    data, image = fetch_image(f"{host.url}/a b.png#part", how)
    assert data == picture(kind="PNG") and image.mode == "RGB" and image.size == (40, 30)
    assert "tinyvlm" in host.gets("User-Agent")[0] and host.gets("Accept-Encoding") == ["identity"]


def test_private_addresses_are_refused_however_they_are_written(host):
    port = host.url.rpartition(":")[2]
    host.pages["/x"] = send(picture())
    for name in ("127.0.0.1", "localhost", "2130706433", "0x7f.1", "127.1", "0.0.0.0", "[::1]", "[::ffff:127.0.0.1]",
                 "10.0.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "[fe80::1]", "[fd00::1]", "224.0.0.1",
                 "[64:ff9b::7f00:1]", "[2002:7f00:1::]"):
        assert reason(f"http://{name}:{port}/x", Fetch(max_seconds=2)) in ("private address", "no such host"), name
    assert not host.asked and is_public("8.8.8.8") and is_public("2606:4700::1111")


def test_the_address_that_was_checked_is_the_one_connected_to(host, monkeypatch):
    """DNS rebinding: the first look-up gives a public address, any later one 127.0.0.1. There must be no later one."""
    answers, port = ["203.0.113.7", "127.0.0.1"], int(host.url.rpartition(":")[2])
    asked, dialled = [], []

    def look_up(name, port, *args, **kind):
        asked.append(name)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (answers.pop(0), port))]

    monkeypatch.setattr(module, "is_public", lambda address: address == "203.0.113.7")
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(module._Timed, "connect", lambda self, address: dialled.append(address) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fetch_image(f"http://rebind.example:{port}/x")
    assert asked == ["rebind.example"] and dialled == [("203.0.113.7", port)]


def test_each_redirect_is_checked_and_five_are_the_most(host, how, monkeypatch):
    for k in range(7):
        host.pages[f"/r{k}"] = send(status=302, Location=f"r{k - 1}" if k else "/end")
    host.pages["/end"] = send(picture())
    host.pages["/loop"] = send(status=301, Location="/loop")
    host.pages["/inside"] = send(status=302, Location="http://10.0.0.1/x")
    host.pages["/file"] = send(status=302, Location="file:///etc/passwd")
    assert fetch_image(f"{host.url}/r4", how)[1].size == (40, 30)
    assert reason(f"{host.url}/r5", how) == "too many redirects"
    assert reason(f"{host.url}/loop", how) == "too many redirects" and host.asked["/loop"] == 6
    assert reason(f"{host.url}/file", how) == "not http or https"
    monkeypatch.setattr(module, "is_public", lambda address: address == "127.0.0.1")       # the first hop alone passes
    assert reason(f"{host.url}/inside", Fetch(max_seconds=2)) == "private address"


@pytest.mark.parametrize("url, why", [("", "bad address"), ("ftp://a.b/c", "not http or https"),
                                      ("http://", "bad address"), ("file:///etc/passwd", "not http or https"),
                                      ("http://a:b:c/", "bad address"),
                                      ("javascript:alert(1)", "not http or https"), ("http://[::1/", "bad address"),
                                      (f"http://{'a' * 70}.com/", "no such host"), ("no url", "bad address")])
def test_addresses_that_are_none(url, why):
    assert reason(url, Fetch()) == why


def test_what_is_no_image_by_content_is_refused_whatever_its_name(host, how):
    eps = io.BytesIO()
    Image.new("RGB", (20, 20)).save(eps, "EPS")
    for path, body, why in (("/a.jpg", b"<html>gone</html>", "not an image"), ("/b.jpg", b"", "not an image"),
                            ("/c.jpg", noise()[:900], "truncated image"), ("/d.jpg", eps.getvalue(), "not an image"),
                            ("/e.png", picture((3000, 20), kind="PNG"), "too long and thin")):
        host.pages[path] = send(body, Content_Type="image/jpeg")
        assert reason(host.url + path, how) == why, path


def test_bombs_are_not_decoded(host, how):
    """Few bytes, many pixels; and a gzip of zeros, whose 50 MB must never be in memory."""
    for side in (9_000, 60_000):                                # refused by us, and by Pillow already
        head = b"IHDR" + struct.pack(">II", side, side) + b"\x08\x02\0\0\0"
        body = picture(kind="PNG")
        host.pages["/wide.png"] = send(body[:12] + head + struct.pack(">I", zlib.crc32(head)) + body[33:])
        assert reason(f"{host.url}/wide.png", how) == "too many pixels"
    host.pages["/zip"] = send(gzip.compress(bytes(50_000_000)), Content_Encoding="gzip")
    assert reason(f"{host.url}/zip", how) == "too large"
    host.pages["/honest"] = send(gzip.compress(picture()), Content_Encoding="gzip")
    assert fetch_image(f"{host.url}/honest", how)[0] == picture()
    host.pages["/broken"] = send(gzip.compress(picture())[:20] + b"\xff" * 40, Content_Encoding="gzip")
    assert reason(f"{host.url}/broken", how) in ("connection broke", "not an image", "truncated image")
    host.pages["/br"] = send(b"x", Content_Encoding="br")
    assert reason(f"{host.url}/br", how) == "packed as br"


def test_a_body_beyond_the_limit_is_cut_off_announced_or_not(host, how):
    small = Fetch(**{**vars(how), "max_bytes": 100_000})
    sent = []

    def endless(handler):
        answer(handler, 200, b"\xff\xd8", Content_Length=None)
        while True:
            handler.wfile.write(bytes(10_000))
            sent.append(10_000)

    host.pages.update({"/announced": send(b"x", Content_Length=10**10), "/endless": endless})
    assert reason(f"{host.url}/announced", small) == "too large"
    assert reason(f"{host.url}/endless", small) == "too large"
    assert sum(sent) < 20_000_000, "the rest of an endless body fits in the buffers of the two sockets at most"


def test_a_server_that_drips_is_cut_off_in_head_and_body(host, naps):
    """Each byte comes well within `timeout`; only the limit for the whole ends it."""
    quick = Fetch(allow_private=True, timeout=0.3, max_seconds=0.5, sleep=naps.append)

    def drip(handler, start):
        handler.wfile.write(start)
        for _ in range(60):
            handler.wfile.write(b"x")
            time.sleep(0.05)

    host.pages["/head"] = lambda handler: drip(handler, b"HTTP/1.1 200 OK\r\nX-Slow: ")
    host.pages["/body"] = lambda handler: drip(handler, b"HTTP/1.1 200 OK\r\nContent-Length: 60\r\n\r\n")
    host.pages["/mute"] = lambda handler: time.sleep(1)
    began = time.monotonic()
    assert {reason(host.url + path, quick) for path in ("/head", "/body", "/mute")} == {"timeout"}
    assert time.monotonic() - began < 3 * 3, "60 drips last 3 s each"


def test_what_may_pass_is_tried_again_and_what_not_is_not(host, how, naps):
    host.pages["/late"] = in_turn(send(status=429, Retry_After="1"), send(status=503), send(picture()))
    assert fetch_image(f"{host.url}/late", how)[0] == picture() and naps == [1, 1.0]
    host.pages["/busy"] = send(status=429, Retry_After="3600")
    assert reason(f"{host.url}/busy", how) == "HTTP 429" and host.asked["/busy"] == 1, "an hour is not within reason"
    host.pages["/500"] = send(status=500)
    assert reason(f"{host.url}/500", how) == "HTTP 500" and host.asked["/500"] == 3
    assert reason(f"{host.url}/gone", how) == "HTTP 404" and host.asked["/gone"] == 1
    host.pages["/cut"] = in_turn(lambda handler: setattr(handler, "close_connection", True), send(picture()))
    assert fetch_image(f"{host.url}/cut", how)[0] == picture()
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        assert reason(f"http://127.0.0.1:{nobody.getsockname()[1]}/", how) == "cannot be reached"


def test_a_body_shorter_than_announced_is_no_image(host, how):
    def short(handler):
        handler.close_connection = True
        answer(handler, 200, picture(), Content_Length=len(picture()) + 5)
    host.pages["/short"] = short
    assert reason(f"{host.url}/short", how) == "connection broke" and host.asked["/short"] == 3


def test_every_kind_of_picture_becomes_upright_rgb(host, how):
    frames = [Image.new("RGB", (40, 30), colour) for colour in ("red", "blue")]
    gif = io.BytesIO()
    frames[0].save(gif, "GIF", save_all=True, append_images=frames[1:])
    exif = Image.Exif()
    exif[0x0112] = 6                                            # the camera was held upright
    clear = io.BytesIO()
    Image.new("P", (40, 30), 0).save(clear, "PNG", transparency=0)
    kinds = {"/gif": (gif.getvalue(), (40, 30), (255, 0, 0)),
             "/cmyk": (picture(colour=(0, 255, 255, 0), mode="CMYK"), (40, 30), (255, 0, 0)),
             "/grey16": (picture(colour=65535 // 2, kind="PNG", mode="I;16"), (40, 30), (127, 127, 127)),
             "/turned": (picture(colour="red", exif=exif), (30, 40), (254, 0, 0)),
             "/clear": (clear.getvalue(), (40, 30), (255, 255, 255))}
    for path, (body, size, colour) in kinds.items():
        host.pages[path] = send(body)
        image = fetch_image(host.url + path, how)[1]
        assert image.mode == "RGB" and image.size == size, path
        assert max(abs(a - b) for a, b in zip(image.getpixel((5, 5)), colour)) <= 2, (path, image.getpixel((5, 5)))


def test_one_connection_serves_many_requests_and_a_closed_one_is_replaced(host, how):
    ports = []
    host.pages["/x"] = lambda handler: (ports.append(handler.client_address[1]), send(picture())(handler))
    shared = module._Web(how)
    for _ in range(3):
        fetch_image(f"{host.url}/x", how, shared)
    assert len(set(ports)) == 1
    shared.mine.line.sock.shutdown(socket.SHUT_RDWR)            # as an idle connection ends at some time
    assert fetch_image(f"{host.url}/x", how, shared)[0] == picture() and len(set(ports)) == 2


def test_tls_checks_the_name_and_keeps_to_the_time(host, how, tmp_path, monkeypatch):
    """The address is pinned, the name in the URL is what the certificate and SNI are about; a drip ends here too."""
    (tmp_path / "pem").write_text(PEM)
    context, names, found = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), [], socket.getaddrinfo
    context.load_cert_chain(tmp_path / "pem")
    context.sni_callback = lambda sock, name, context: names.append(name)
    host.socket = context.wrap_socket(host.socket, server_side=True, do_handshake_on_connect=False)
    monkeypatch.setattr(socket, "getaddrinfo", lambda name, *a, **k: found("127.0.0.1", *a, **k))
    host.pages["/x"] = send(picture())
    host.pages["/drip"] = lambda handler: [(handler.wfile.write(b"x"), time.sleep(0.05)) for _ in range(60)]
    port = host.url.rpartition(":")[2]
    assert reason(f"https://tls.example:{port}/x", how) == "TLS fails", "nobody vouches for this certificate"
    monkeypatch.setattr(module.requests.certs, "where", lambda: str(tmp_path / "pem"))
    assert fetch_image(f"https://tls.example:{port}/x", how)[0] == picture() and set(names) == {"tls.example"}
    assert host.gets("Host")[-1] == f"tls.example:{port}"
    assert reason(f"https://other.example:{port}/x", how) == "TLS fails", "the certificate is for another name"
    began = time.monotonic()
    assert reason(f"https://tls.example:{port}/drip", Fetch(**{**vars(how), "max_seconds": 0.4})) == "timeout"
    assert time.monotonic() - began < 2.5, "60 drips last 3 s"
    assert reason(f"http://tls.example:{port}/x", Fetch(**{**vars(how), "retries": 0})) == "connection broke"


# A certificate for tls.example that signs itself, with its key, made for this test; it opens nothing else.
PEM = """-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgA4QjV8uYFVJt+BEC
SvnHsXS+7ZL8xLg/5Xd+itEb0JyhRANCAASriWSIPalWmE6mFc3C5+ZppJ9ZlCr4
Imw89YYyR5yktH5pyetyyvVhFXsnHEEJZ7pL/EjyOyIFhXfPuxb4xlg1
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBmzCCAUGgAwIBAgIUOIO3YcSX5FvcrJzB8SvZq0L64cEwCgYIKoZIzj0EAwIw
FjEUMBIGA1UEAwwLdGxzLmV4YW1wbGUwIBcNMjYxMTIyMDkwNzQ0WhgPMjEyNjEw
MjkwOTA3NDRaMBYxFDASBgNVBAMMC3Rscy5leGFtcGxlMFkwEwYHKoZIzj0CAQYI
KoZIzj0DAQcDQgAEq4lkiD2pVphOphXNwufmaaSfWZQq+CJsPPWGMkecpLR+acnr
csr1YRV7JxxBCWe6S/xI8jsiBYV3z7sW+MZYNaNrMGkwHQYDVR0OBBYEFMnfawt5
XoFlLyuEf9T5Eir9hEypMB8GA1UdIwQYMBaAFMnfawt5XoFlLyuEf9T5Eir9hEyp
MA8GA1UdEwEB/wQFMAMBAf8wFgYDVR0RBA8wDYILdGxzLmV4YW1wbGUwCgYIKoZI
zj0EAwIDSAAwRQIhAM2Wf5bcj4O0AtlcgPt1s/NrUf9sjnGISira1XDWq2ysAiBm
0gMril6rwj23xNFMLYqXWSJHns3CJRTme5bSdLgUSQ==
-----END CERTIFICATE-----
"""


# ---------------------------------------------------------------------------------------------------------------------
# A folder of many.

def table(folder):
    with open(folder / "report.csv", encoding="utf-8", newline="") as file:
        return {row["url"]: row for row in csv.DictReader(file)}


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def test_folder_report_and_captions(host, how, tmp_path):
    """Bad and good rows; the result is a folder that photos() reads, and every address has its reason."""
    host.pages.update({"/square": send(picture((50, 50))), "/wide": send(noise(64)), "/thin": send(picture((90, 30))),
                       "/crop": send(picture((64, 48)))})
    rows = [(f"{host.url}/square", 'a "red", square\nthing\x00', {"id": 7}), (f"{host.url}/thin", "a strip", {}),
            (f"{host.url}/crop", "é \ud83d broken", {}), (f"{host.url}/none", "gone", {}), ("", "no link", {}),
            (f"{host.url}/square", "said twice", {}), (f"{host.url}/wide", None, {})]
    rows += [(f"{host.url}/square?{k}", f"square {k}", {}) for k in range(6)]
    told = []
    counts = download_images(iter(rows), tmp_path / "d", how=how, say=told.append)
    assert counts == {"good": 9, "failed": 3, "reasons": {"HTTP 404": 1, "bad address": 1, "no caption": 1},
                      "cropped": 1, "padded": 1, "as is": 7}
    assert "75% gave an image" in told[-1] and "1 padded" in told[-1] and "HTTP 404" in told[-1]
    report = table(tmp_path / "d")
    first = report[f"{host.url}/square"]
    assert len(report) == 12 and first["status"] == "ok" and (first["width"], first["fit"]) == ("50", "as is")
    assert first["caption"] == 'a "red", square thing' and json.loads(first["extras"]) == {"id": 7}
    assert report[f"{host.url}/none"]["status"] == "HTTP 404" and report[f"{host.url}/none"]["file"] == ""
    data = photos("folder", tmp_path / "d")
    assert len(data.names) == 9 and [['a "red", square thing']] == [c for c in data.captions if "thing" in c[0]]
    assert {Image.open(tmp_path / "d" / name).size for name in data.names} == {(128, 128)}
    strip = load_image(tmp_path / "d" / report[f"{host.url}/thin"]["file"])
    assert max(strip.getpixel((64, 3))) < 20 < min(max(strip.getpixel((64, 64))), 255), "black above, picture within"


def test_the_square_is_the_one_of_the_adaptive_recipe():
    for size in ((200, 150), (300, 100), (40, 40)):
        image = Image.effect_noise(size, 80).convert("RGB")
        expected = to_pil(to_uint8(image, RECIPES["adaptive"]))
        assert module._shrink(image, 128)[0].tobytes() == expected.tobytes(), size


def test_finished_addresses_are_not_asked_again_and_failures_on_request(host, how, tmp_path):
    host.pages["/a"] = send(picture())
    rows = [(f"{host.url}/a", "a", {}), (f"{host.url}/b", "b", {})]
    download_images(rows, tmp_path, how=how, say=str)
    before = contents(tmp_path)
    assert download_images(rows, tmp_path, how=how, say=str)["good"] == 1 and contents(tmp_path) == before
    assert host.asked == {"/a": 1, "/b": 1}
    host.pages["/b"] = send(picture((80, 20)))
    counts = download_images(rows, tmp_path, how=how, say=str, retry_failed=True)
    assert (counts["good"], counts["failed"]) == (2, 0) and host.asked == {"/a": 1, "/b": 2}
    (tmp_path / table(tmp_path)[f"{host.url}/a"]["file"]).unlink()
    assert download_images(rows, tmp_path, how=how, say=str)["good"] == 2 and host.asked["/a"] == 2
    with pytest.raises(UserError, match="128x128, and 64x64 was asked"):
        download_images(rows, tmp_path, size=64, how=how, say=str)


def test_limit_keeps_the_first_good_ones_and_reads_no_further(host, how, tmp_path):
    """With 8 threads and every third address dead, the limit must give exactly the first seven good of the list."""
    host.pages["/x"] = send(picture())
    read = []

    def endless():
        k = 0
        while True:
            read.append(k)
            yield f"{host.url}/{'none' if k % 3 == 0 else 'x'}?{k}", f"number {k}", {}
            k += 1

    assert download_images(endless(), tmp_path / "a", how=how, limit=7, say=str)["good"] == 7
    assert sorted(int(row["caption"].split()[1]) for row in table(tmp_path / "a").values()) == list(range(11))
    assert max(read) == 10
    for limit in (2, 5, 7):
        download_images(endless(), tmp_path / "b", how=how, limit=limit, say=str)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_slow_host_gets_few_requests_at_once_and_does_not_stop_the_others(host, tmp_path, naps):
    how = Fetch(allow_private=True, threads=4, per_host=2, sleep=naps.append)
    gate, inside, most = threading.Event(), [], []

    def slow(handler):
        inside.append(handler)
        most.append(len(inside))
        gate.wait(5)
        inside.remove(handler)
        answer(handler, 200, picture())
    with Host() as other:
        host.pages["/x"] = slow
        other.pages["/x"] = lambda handler: (other.asked["/x?9"] and gate.set(), answer(handler, 200, picture()))
        rows = [(f"{one.url}/x?{k}", "a", {}) for one in (host, other) for k in range(10)]
        assert download_images(rows, tmp_path, how=how, say=str)["good"] == 20
    assert gate.is_set() and max(most) == 2, "the quick host was served while the slow one held only two threads"


def test_an_unforeseen_fault_ends_the_run_and_is_not_hidden(host, how, tmp_path, monkeypatch):
    host.pages["/x"] = send(picture())
    monkeypatch.setattr(module, "_shrink", lambda image, size: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        download_images([(f"{host.url}/x", "a", {})], tmp_path, how=how, say=str)
    with pytest.raises(UserError, match="rows are gone"):
        download_images((_ for _ in [0] if fail()), tmp_path, how=how, say=str)


def fail():
    raise UserError("the rows are gone")


def test_a_torn_report_is_mended_and_a_foreign_one_refused(host, how, tmp_path):
    host.pages["/x"] = send(picture())
    rows = [(f"{host.url}/x?{k}", f"number {k}", {}) for k in range(4)]
    download_images(rows, tmp_path / "whole", how=how, say=str)
    whole = contents(tmp_path / "whole")
    for end in range(0, len(whole["report.csv"]), 97):
        folder = tmp_path / f"cut{end}"
        folder.mkdir()
        for name, data in whole.items():
            (folder / name).write_bytes(data[:end] if name == "report.csv" else data)
        (folder / "half.jpg.part").write_bytes(b"half")
        download_images(rows, folder, how=how, say=str)
        assert contents(folder) == whole, end
    for name in ("report.csv", "captions.csv"):                 # with no end of line, so that a careless mending shows
        (tmp_path / name / "own").mkdir(parents=True)
        (tmp_path / name / "own" / name).write_text("month,money\n5,100")
        with pytest.raises(UserError, match=f"{name} was not made by this program"):
            download_images(rows, tmp_path / name / "own", how=how, say=str)
        assert (tmp_path / name / "own" / name).read_text() == "month,money\n5,100"


def test_absurd_cells_do_not_spoil_the_report(host, how, tmp_path):
    """Python's csv refuses cells beyond 131,072 characters when reading: such a report could never be resumed."""
    rows = [("data:image/png;base64," + "A" * 200_000, "a", {}), (f"{host.url}/x", "b" * 200_000, {"c": "d" * 200_000}),
            (f"{host.url}/x\r\n?1", "e\r\nf", {"g\n": "\n"})]
    host.pages["/x"] = send(picture())
    for _ in range(2):
        counts = download_images(rows, tmp_path / "d", how=how, say=str)
        assert counts["reasons"] == {"not http or https": 1, "caption too long": 1} and counts["good"] == 1


KILLER = """
import glob, json, os, signal, sys, time
from tinyvlm.web import Fetch, download_images
rows, folder = json.load(open(sys.argv[1])), sys.argv[2]
for kill in range(10):                                          # forks of one process: torch is imported once
    wanted = len(glob.glob(folder + "/*.jpg")) + 7
    child = os.fork()
    if not child:
        download_images(rows, folder, 32, Fetch(allow_private=True, threads=4, per_host=4, retries=0), limit=90)
        os._exit(0)
    while len(glob.glob(folder + "/*.jpg")) < wanted and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG |
                                                                   os.WNOWAIT) is None:
        time.sleep(0.001 * kill)
    os.kill(child, signal.SIGKILL)
    print(os.WIFSIGNALED(os.waitpid(child, 0)[1]))
"""


def test_a_run_killed_ten_times_ends_as_an_unkilled_one(host, how, tmp_path):
    """kill -9 at different moments, then once to the end: the folder must be the same, byte by byte."""
    bodies = [noise(48, k) for k in range(5)]
    for k, body in enumerate(bodies):
        host.pages[f"/{k}"] = lambda handler, body=body: (time.sleep(0.01), send(body)(handler))
    rows = [(f"{host.url}/{k % 7}?{k}", f"number {k}", {"k": k}) for k in range(150)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    download_images(rows, tmp_path / "calm", size=32, how=how, limit=90, say=str)
    told = subprocess.run([sys.executable, "-c", KILLER, tmp_path / "rows.json", tmp_path / "killed"], check=True,
                          cwd=Path(module.__file__).parent.parent, stdout=subprocess.PIPE, text=True).stdout
    assert told.count("True") >= 4, f"most runs ended before they were killed: {told}"
    download_images(rows, tmp_path / "killed", size=32, how=how, limit=90, say=str)
    assert contents(tmp_path / "killed") == contents(tmp_path / "calm")


# ---------------------------------------------------------------------------------------------------------------------
# Rows.

def rows_page(rows, fails=()):
    """The rows service: `fails` are the statuses of the first answers for offset 100."""
    fails = list(fails)

    def page(handler):
        asked = {k: v for k, v in re.findall(r"(\w+)=([^&]*)", handler.path)}
        offset, length = int(asked["offset"]), int(asked["length"])
        assert asked["dataset"] == "BAAI%2FCapsFusion-120M" and length <= 100
        if offset == 100 and fails:
            return send(b"{}", fails.pop(0))(handler)
        found = [{"row_idx": offset + k, "row": row, "truncated_cells": []} for k, row in
                 enumerate(rows[offset:offset + length])]
        send(json.dumps({"rows": found, "num_rows_total": len(rows)}).encode())(handler)
    return page


def test_pages_of_rows_are_tried_again_kept_and_cut_to_the_wish(host, tmp_path, naps):
    rows = [{"image_url": f"http://h/{k}", "capsfusion": f"text {k}", "laion_2b": k} for k in range(250)]
    host.pages["/rows"] = rows_page(rows, fails=(504, 429))

    def ask(**wish):
        return list(dataset_rows("BAAI/CapsFusion-120M", "default", "train", endpoint=f"{host.url}/rows",
                                 cache=tmp_path, sleep=naps.append, **wish))
    assert ask() == rows and len(naps) == 2 and sum(host.asked.values()) == 5
    assert ask(start=90, limit=15) == rows[90:105] and ask(start=120) == rows[120:] and ask(limit=0) == []
    assert ask(start=300, limit=5) == [] and ask(start=249) == rows[249:] and sum(host.asked.values()) == 6
    host.shutdown()
    assert ask() == rows, "all pages come from the folder"
    assert next(caption_rows(rows, "it")) == ("http://h/0", "text 0", {"laion_2b": 0})


def test_a_page_that_is_no_page_is_not_kept(host, tmp_path):
    host.pages["/rows"] = in_turn(send(b"<html>sorry</html>"), rows_page([{"url": "u", "text": "t"}]))
    for wanted in (None, [{"url": "u", "text": "t"}]):
        asking = dataset_rows("BAAI/CapsFusion-120M", "default", "train", endpoint=f"{host.url}/rows", cache=tmp_path)
        if wanted is None:
            with pytest.raises(UserError, match="sent no page of rows"):
                list(asking)
        else:
            assert list(asking) == wanted


def test_tables_csv_and_jsonl(tmp_path):
    (tmp_path / "a.csv").write_text('id,url,caption\n1,http://h/1,"a, b"\n2,http://h/2,c\n')
    (tmp_path / "b.jsonl").write_text('{"image_url": "http://h/1", "capsfusion": "x", "text": "kept"}\n\n')
    assert list(table_rows(tmp_path / "a.csv")) == [("http://h/1", "a, b", {"id": "1"}),
                                                    ("http://h/2", "c", {"id": "2"})]
    assert list(table_rows(tmp_path / "b.jsonl")) == [("http://h/1", "x", {"text": "kept"})]
    signed = {"image_url": {"src": "http://h/s", "height": 3}, "text": "t"}
    assert list(caption_rows([signed], "it")) == [("http://h/s", "t", {})]


@pytest.mark.parametrize("name, text, why", [
    ("a.csv", "picture,words\n1,2\n", "has the columns picture, words; it needs image_url"),
    ("a.csv", "url,caption\nu,a,b\n", "a.csv .row 1.: .* more cells than the header"),
    ("a.jsonl", '{"url": "u", "text": "t"}\n{"url": ', "a.jsonl .row 2.:"),
    ("a.jsonl", "[1]\n", "no json object"), ("a.jsonl", '{"url": "u"}\n', "has the columns url; it needs"),
    ("a.parquet", "", "export other formats"), ("a.csv", None, "No such file")])
def test_wrong_tables_are_named_with_the_remedy(name, text, why, tmp_path):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=why):
        list(table_rows(tmp_path / name))


# ---------------------------------------------------------------------------------------------------------------------
# The stream.

@pytest.fixture
def stream(host, how, tmp_path):
    """make(n, ..) -> a stream of n images of n colours (address k: /k), closed at the end."""
    made = []

    def make(n, **options):
        for k in range(n):
            host.pages.setdefault(f"/{k}", send(picture(colour=(k, 0, 0), kind="BMP")))
        options = {"how": how, "max_cache_bytes": 10**6, **options}
        made.append(ImageStream([f"{host.url}/{k}" for k in range(n)], tmp_path / "cache", **options))
        return made[-1]
    yield make
    for one in made:
        one.close()


def test_the_stream_gives_image_i_announced_or_not_in_any_order(host, stream):
    one = stream(60, ahead=10)
    one.prefetch(range(40))
    order = [*range(20), 55, 39, 25, 21, 3, 20, 30]
    assert [one.get(i).getpixel((0, 0))[0] for i in order] == order
    found = {}
    def take(part):
        found.update({i: one.get(i).getpixel((0, 0))[0] for i in part})
    threads = [threading.Thread(target=take, args=(range(k, 60, 4),)) for k in range(4)]
    one.prefetch(range(60))
    [t.start() for t in threads], [t.join() for t in threads]
    assert found == {i: i for i in range(60)}
    assert max(host.asked.values()) == 1, "what was fetched once comes from the cache"


def test_no_more_than_ahead_is_fetched_before_it_is_asked_for(host, stream):
    one = stream(50, ahead=6)
    one.prefetch(range(50))
    one.get(0)
    [one.get(i) for i in range(1, 10)]
    for future in list(one.coming.values()):
        future.result()
    assert sum(host.asked.values()) == 16
    assert [one.get(i).size for i in range(40, 50)] == [(40, 30)] * 10
    assert sum(host.asked.values()) == 26, "a run that goes on at 40 does not fetch what it passed over"


def test_the_cache_keeps_to_its_limit_and_survives_a_restart(host, stream, tmp_path):
    """Room for five files: the least recently used go, also after a restart; and what a kill left half is removed."""
    size = len(picture(kind="BMP"))
    one = stream(8, max_cache_bytes=5 * size + 3, ahead=1)
    for i in (0, 1, 2, 3, 4, 0, 5, 6):
        one.get(i)
        time.sleep(0.01)                                        # file dates tell who was used last, in steps of 4 ms
    files = {path.name: path.stat().st_size for path in (tmp_path / "cache").iterdir()}
    assert one.cache.bytes == sum(files.values()) <= 5 * size + 3 and len(files) == 5
    (tmp_path / "cache" / "x.part").write_bytes(b"half")
    (tmp_path / "cache" / "notes.txt").write_text("mine")
    two = stream(8, max_cache_bytes=3 * size, ahead=1)
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {"notes.txt", *two.cache.sizes}
    host.seen.clear()
    assert [two.get(i).getpixel((0, 0))[0] for i in (0, 5, 6)] == [0, 5, 6] and not host.asked
    two.get(1)
    assert host.asked == {"/1": 1} and len(two.cache.sizes) == 3
    path = tmp_path / "cache" / module._name(f"{host.url}/1")
    path.write_bytes(b"rotten")
    assert two.get(1).getpixel((0, 0))[0] == 1 and path.read_bytes() == picture(colour=(1, 0, 0), kind="BMP")


def test_a_failed_image_is_left_out_and_too_many_end_the_run(host, stream):
    for k in range(0, 100, 10):
        host.pages[f"/{k}"] = send(status=503)
    one, lost = stream(100), []
    one.prefetch(range(100))
    for i in range(100):
        try:
            one.get(i)
        except FetchError:
            lost.append(i)
    assert lost == list(range(0, 100, 10)) and one.failed == {"HTTP 503": 10} and host.asked["/0"] == 3
    host.pages.update({f"/{k}": send(b"<html>") for k in range(200)})
    two = stream(200, fail_share=0.2)
    with pytest.raises(UserError, match="of the latest .* images could not be fetched .mostly: not an image") as caught:
        for i in range(100, 200):
            try:
                two.get(i)
            except FetchError:
                pass
    assert not isinstance(caught.value, FetchError) and sum(two.failed.values()) == 50


def test_two_threads_are_not_confused_by_one_image(host, stream):
    one, seen = stream(1), []
    one.prefetch([0, 0, 0])
    threads = [threading.Thread(target=lambda: seen.append(one.get(0).size)) for _ in range(5)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert seen == [(40, 30)] * 5
