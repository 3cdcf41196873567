"""Images from the web, against servers inside the test that play a good host, dead ones and hostile ones.

Only 127.0.0.1 is contacted, so every fetch but those of the refusals sets allow_private. Waiting goes through the
injected `sleep`, so back-off takes no time.
"""
import csv
import io
import json
import os
import re
import signal
import socket
import ssl
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import requests
from PIL import Image

from servers import MALFORMED, Host, answer, in_turn, raw, send
from tinyvlm import web as module
from tinyvlm.config import UserError
from tinyvlm.image import RECIPES, to_pil, to_uint8
from tinyvlm.layouts import photos
from tinyvlm.web import (Fetch, FetchError, ImageFolderCache, caption_rows, dataset_rows, download_images, fetch_image,
                         is_public, table_rows)


def picture(size=(40, 30), colour=(200, 30, 60), kind="JPEG"):
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, kind)
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
    assert len(str(caught.value)) < 60, "a report counts reasons, so they hold nothing of the address"
    return str(caught.value)


# ---- one image

def test_an_image_comes_with_our_name_no_packing_no_cookies_and_no_proxy(host, how, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    host.pages["/a%20b.png"] = send(picture(kind="PNG"), Content_Type="text/html", Set_Cookie="track=1")
    for _ in range(2):
        image = fetch_image(f"{host.url}/a b.png#part", how)
        assert image.mode == "RGB" and image.size == (40, 30) and image.getpixel((0, 0)) == (200, 30, 60)
    assert "tinyvlm" in host.gets("User-Agent")[0] and host.gets("Accept-Encoding") == ["identity"] * 2
    assert host.gets("Cookie") == [None, None]


def test_private_addresses_get_no_byte_however_they_are_written(host):
    port = host.url.rpartition(":")[2]
    for name in ("127.0.0.1", "localhost", "2130706433", "0x7f.1", "127.1", "0.0.0.0", "[::ffff:127.0.0.1]"):
        assert reason(f"http://{name}:{port}/x", Fetch(max_seconds=2)) == "private address", name
    assert not host.seen and is_public("8.8.8.8") and is_public("2606:4700::1111")
    for address in ("127.0.0.1", "10.0.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
                    "::1", "fe80::1%eth0", "fd00::1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::"):
        assert not is_public(address), address


def test_a_name_that_leads_elsewhere_the_second_time_gets_nothing(host, monkeypatch):
    """DNS rebinding: whatever the name service said before, the address that was connected to is what is checked."""
    port = host.url.rpartition(":")[2]
    monkeypatch.setattr(socket, "getaddrinfo", lambda name, port, *args, **options: [
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))])
    assert reason(f"http://public.example:{port}/x", Fetch()) == "private address" and not host.seen


def test_each_redirect_is_checked_and_five_are_the_most(host, how, monkeypatch):
    for k in range(7):
        host.pages[f"/r{k}"] = send(status=302, Location=f"r{k - 1}" if k else "/end")
    host.pages["/end"] = send(picture())
    assert fetch_image(f"{host.url}/r4", how).size == (40, 30) and reason(f"{host.url}/r5", how) == "too many redirects"
    host.pages["/file"] = send(status=302, Location="file:///etc/passwd")
    assert reason(f"{host.url}/file", how) == "no web address"
    verdicts = iter([True, False])                              # on the first host, then on the second
    monkeypatch.setattr(module, "is_public", lambda address: next(verdicts))
    with Host() as inside:
        host.pages["/inside"] = send(status=302, Location=inside.url)
        assert reason(f"{host.url}/inside", Fetch()) == "private address" and not inside.seen


@pytest.mark.parametrize("url", ["", "ftp://a.b/c", "http://", "file:///etc/passwd", "http://a:b:c/", "http://[::1/",
                                 "javascript:alert(1)", "data:image/png,AA", f"http://{'a' * 70}.com/", "no url"])
def test_addresses_that_are_none(url):
    assert reason(url, Fetch()) == "no web address"


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_answers_are_a_reason_and_no_image(host, how, name):
    host.pages["/x"] = raw(MALFORMED[name].replace(b"good", picture()[:4]))
    assert reason(f"{host.url}/x", how) in ("broken answer", "no web address")


def test_what_is_no_image_by_content_is_refused_whatever_its_name(host, how):
    for path, body in (("/a.jpg", b"<html>gone</html>"), ("/b.jpg", b""), ("/c.jpg", picture((200, 200))[:700]),
                       ("/e.png", picture((3000, 20), kind="PNG"))):
        host.pages[path] = send(body, Content_Type="image/jpeg")
    assert reason(f"{host.url}/a.jpg", how) == reason(f"{host.url}/b.jpg", how) and "not an image" in reason(
        f"{host.url}/a.jpg", how)
    assert reason(f"{host.url}/e.png", how) == "too long and thin to resize"
    assert reason(f"{host.url}/c.jpg", how) not in ("broken answer", "too long and thin to resize")
    host.pages["/gzip"] = send(b"x", Content_Encoding="gzip")
    assert reason(f"{host.url}/gzip", how) == "packed as gzip"


def test_a_body_beyond_the_limit_is_cut_off_announced_or_not(host, how):
    sent = []

    def endless(handler):
        answer(handler, 200, b"\xff\xd8", Content_Length=None)
        while True:
            sent.append(handler.wfile.write(bytes(10_000)))

    host.pages.update({"/announced": send(b"x", Content_Length=10**10), "/endless": endless})
    for path in ("/announced", "/endless"):
        assert reason(host.url + path, replace(how, max_bytes=100_000)) == "more than 100000 bytes"
    assert sum(sent) < 20_000_000, "the rest of an endless body fits in the buffers of the two sockets at most"


def test_a_server_that_drips_is_cut_off_in_head_and_body(host, how):
    """Each byte comes well within `timeout`; only the limit for the whole ends it."""
    quick = replace(how, timeout=0.3, max_seconds=0.4)

    def drip(start):
        def page(handler):
            handler.wfile.write(start)
            for _ in range(60):
                handler.wfile.write(b"5")
                time.sleep(0.05)
        return page
    ok = b"HTTP/1.1 200 OK\r\n"
    for k, start in enumerate((b"", ok + b"X-Slow: ", ok + b"Content-Length: 60\r\n\r\n", ok + b"\r\n",
                               ok + b"Transfer-Encoding: chunked\r\n\r\n")):
        host.pages[f"/{k}"] = drip(start)
    host.pages["/5"] = lambda handler: time.sleep(0.6)
    began = time.monotonic()
    with ThreadPoolExecutor(6) as pool:
        assert set(pool.map(lambda k: reason(f"{host.url}/{k}", quick), range(6))) == {"timeout"}
    assert time.monotonic() - began < 2.5, "60 drips last 3 s each"


def test_what_may_pass_is_tried_again_and_what_not_is_not(host, how, naps):
    """And over one connection, where the server keeps it open: each costs a handshake."""
    ports = []
    good = lambda handler: (ports.append(handler.client_address[1]), send(picture())(handler))      # noqa: E731
    host.pages["/late"] = in_turn(raw(b""), send(status=429, Retry_After="1"), good)
    assert fetch_image(f"{host.url}/late", how).size == fetch_image(f"{host.url}/late", how).size == (40, 30)
    assert naps == [0.5, 1] and len(ports) == 2 and len(set(ports)) == 1
    assert reason(f"{host.url}/gone", how) == "HTTP 404" and host.requested["/gone"] == 1
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        assert reason(f"http://127.0.0.1:{nobody.getsockname()[1]}/", how) == "cannot be reached"


def test_tls_checks_the_name_and_keeps_to_the_time(host, how, monkeypatch):
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
    assert reason(f"https://tls.example:{port}/x", how) == "TLS fails", "nobody vouches for this certificate"
    monkeypatch.setattr(requests.certs, "where", lambda: str(pem))
    module._tls.cache_clear()
    module._here.key = None
    assert fetch_image(f"https://tls.example:{port}/x", how).size == (40, 30) and set(names) == {"tls.example"}
    assert reason(f"https://other.example:{port}/x", how) == "TLS fails", "the certificate is for another name"
    assert reason(f"https://tls.example:{port}/x", Fetch()) == "private address"
    began = time.monotonic()
    assert reason(f"https://tls.example:{port}/drip", replace(how, max_seconds=0.4)) == "timeout"
    assert time.monotonic() - began < 2.5, "60 drips last 3 s"
    module._tls.cache_clear()
    module._here.key = None


# ---- a folder of many

def table(folder):
    with open(folder / "report.csv", encoding="utf-8", newline="") as file:
        return {row["url"]: row for row in csv.DictReader(file)}


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def test_folder_report_and_captions(host, how, tmp_path):
    """Bad and good rows; the result is a folder that photos() reads, and every address has its reason."""
    host.pages.update({"/square": send(picture((50, 50))), "/thin": send(picture((90, 30))),
                       "/crop": send(picture((64, 48))), "/bad": raw(b"rubbish\r\n\r\n")})
    rows = [(f"{host.url}/square", 'a "red", square\nthing\x00', {"id": 7}), (f"{host.url}/thin", "a strip", {}),
            (f"{host.url}/crop", "é \ud83d broken", {}), (f"{host.url}/none", "gone", {}), ("", "no link", {}),
            (f"{host.url}/square", "said twice", {}), (f"{host.url}/wide", None, {}), (f"{host.url}/bad", "bad", {}),
            ("data:image/png;base64," + "A" * 200_000, "a", {}), (f"{host.url}/x", "b" * 200_000, {"c": "d" * 200_000})]
    rows += [(f"{host.url}/square?{k}", f"square {k}", {}) for k in range(6)]
    told = []
    for _ in range(2):                                          # the second finds all done
        counts = download_images(iter(rows), tmp_path / "d", how=how, say=told.append)
        assert counts == {"good": 9, "failed": 6, "reasons": {
            "row too long": 2, "HTTP 404": 1, "no web address": 1, "no caption": 1, "broken answer": 1}}
    assert "9 of 15 addresses" in told[0] and "0 of 0" in told[1] and host.requested["/none"] == 1
    report = table(tmp_path / "d")
    first = report[f"{host.url}/square"]
    assert (first["status"], first["caption"], first["extras"]) == ("ok", 'a "red", square thing', '{"id": 7}')
    assert report[f"{host.url}/none"]["status"] == "HTTP 404" and report[f"{host.url}/none"]["file"] == ""
    data = photos("folder", tmp_path / "d")
    assert len(data.names) == 9 and [['a "red", square thing']] == [c for c in data.captions if "thing" in c[0]]
    assert {Image.open(tmp_path / "d" / name).size for name in data.names} == {(128, 128)}


def test_the_square_is_the_one_of_the_adaptive_recipe(host, how, tmp_path):
    rows = []
    for k, size in enumerate(((200, 150), (300, 100), (40, 40))):
        file, image = io.BytesIO(), Image.effect_noise(size, 80).convert("RGB")
        image.save(file, "PNG")
        host.pages[f"/{k}"] = send(file.getvalue())
        row = module._keep(f"{host.url}/{k}", "a", "", tmp_path, 128, how)
        to_pil(to_uint8(image, RECIPES["adaptive"])).save(tmp_path / "expected.jpg", quality=95)
        assert (tmp_path / row[1]).read_bytes() == (tmp_path / "expected.jpg").read_bytes(), size


def test_finished_addresses_are_not_fetched_again_and_failures_on_request(host, how, tmp_path):
    host.pages["/a"] = send(picture())
    rows = [(f"{host.url}/a", "a", {}), (f"{host.url}/b", "b", {})]
    download_images(rows, tmp_path, how=how, say=str)
    before = contents(tmp_path)
    assert download_images(rows, tmp_path, how=how, say=str)["good"] == 1 and contents(tmp_path) == before
    host.pages["/b"] = send(picture((80, 20)))
    counts = download_images(rows, tmp_path, how=how, say=str, retry_failed=True)
    assert (counts["good"], counts["failed"]) == (2, 0) and host.requested == {"/a": 1, "/b": 2}
    (tmp_path / table(tmp_path)[f"{host.url}/a"]["file"]).unlink()
    assert download_images(rows, tmp_path, how=how, say=str)["good"] == 2 and host.requested["/a"] == 2
    with pytest.raises(UserError, match="not 64x64; choose another folder"):
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
    assert max(read) == 11, "one row is held ready"
    for limit in (2, 5, 7):
        download_images(endless(), tmp_path / "b", how=how, limit=limit, say=str)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_host_gets_few_requests_at_once(host, how, tmp_path):
    inside, most = [], []

    def slow(handler):
        inside.append(handler)
        most.append(len(inside))
        time.sleep(0.02)
        inside.remove(handler)
        answer(handler, 200, picture())
    host.pages["/x"] = slow
    rows = [(f"{host.url}/x?{k}", "a", {}) for k in range(10)]
    assert download_images(rows, tmp_path, how=replace(how, per_host=2), say=str)["good"] == 10 and max(most) == 2


def test_a_torn_report_is_mended_and_a_foreign_one_refused(host, how, tmp_path):
    host.pages["/x"] = send(picture())
    rows = [(f"{host.url}/x?{k}", f"number {k}", {}) for k in range(4)]
    download_images(rows, tmp_path / "whole", how=how, say=str)
    whole = contents(tmp_path / "whole")
    for end in range(0, len(whole["report.csv"]), 97):
        folder = tmp_path / f"cut{end}"
        folder.mkdir()
        for name, data in whole.items():
            if end or name != "captions.csv":
                (folder / name).write_bytes(data[:end] if name == "report.csv" else data)
        download_images(rows, folder, how=how, say=str)
        assert contents(folder) == whole, end
    for name in ("report.csv", "captions.csv"):                 # with no end of line, so that a careless mending shows
        (tmp_path / name / "own").mkdir(parents=True)
        (tmp_path / name / "own" / name).write_text("month,money\n5,100")
        with pytest.raises(UserError, match="a csv that this program did not make"):
            download_images(rows, tmp_path / name / "own", how=how, say=str)
        assert (tmp_path / name / "own" / name).read_text() == "month,money\n5,100"


def test_a_run_killed_six_times_ends_as_an_unkilled_one(host, how, tmp_path):
    """kill -9 at different moments, then once to the end: the folder must be the same, byte by byte."""
    for k in range(5):
        page = send(picture((48, 40), (50 * k, 9, 9)))
        host.pages[f"/{k}"] = lambda handler, page=page: (time.sleep(0.01), page(handler))
    rows, killed = [(f"{host.url}/{k % 7}?{k}", f"number {k}", {"k": k}) for k in range(100)], 0
    download_images(rows, tmp_path / "calm", size=32, how=how, limit=60, say=str)
    for kill in range(6):
        wanted = len(list(tmp_path.glob("killed/*.jpg"))) + 7
        child = os.fork()
        if not child:
            download_images(rows, tmp_path / "killed", 32, replace(how, threads=4), limit=60, say=str)
            os._exit(0)
        while len(list(tmp_path.glob("killed/*.jpg"))) < wanted and os.waitid(
                os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            time.sleep(0.001 * kill)
        os.kill(child, signal.SIGKILL)
        killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert killed >= 3, f"only {killed} of 6 runs were killed before they ended"
    download_images(rows, tmp_path / "killed", size=32, how=how, limit=60, say=str)
    assert contents(tmp_path / "killed") == contents(tmp_path / "calm")


# ---- rows

def rows_page(rows, fails=()):
    """The rows service: `fails` are the statuses of the first answers for offset 100."""
    fails = list(fails)

    def page(handler):
        query = dict(re.findall(r"(\w+)=([^&]*)", handler.path))
        offset, length = int(query["offset"]), int(query["length"])
        assert query["dataset"] == "BAAI%2FCapsFusion-120M" and length <= 100
        if offset == 100 and fails:
            return send(b"{}", fails.pop(0))(handler)
        found = [{"row_idx": offset + k, "row": row, "truncated_cells": []} for k, row in
                 enumerate(rows[offset:offset + length])]
        send(json.dumps({"rows": found, "num_rows_total": len(rows)}).encode())(handler)
    return page


def test_pages_of_rows_are_tried_again_kept_and_cut_to_the_wish(host, tmp_path, naps):
    rows = [{"image_url": f"http://h/{k}", "capsfusion": f"text {k}", "laion_2b": k} for k in range(250)]
    host.pages["/rows"] = in_turn(send(b"<html>sorry</html>"), rows_page(rows, fails=(504, 429)))

    def get(**wish):
        return list(dataset_rows("BAAI/CapsFusion-120M", "default", "train", endpoint=f"{host.url}/rows",
                                 cache=tmp_path, sleep=naps.append, **wish))
    with pytest.raises(UserError, match="sent no page of rows"):
        get()
    assert get() == rows and len(naps) == 2 and len(host.seen) == 6, "what is no page is not kept"
    assert get(start=90, limit=15) == rows[90:105] and get(start=120) == rows[120:] and get(limit=0) == []
    assert get(start=300, limit=5) == [] and get(start=249) == rows[249:] and len(host.seen) == 7
    host.shutdown()
    assert get() == rows, "all pages come from the folder"
    assert next(caption_rows(rows, "it")) == ("http://h/0", "text 0", {"laion_2b": 0})


def test_tables_csv_and_jsonl(tmp_path):
    (tmp_path / "a.csv").write_text('id,url,caption\n1,http://h/1,"a, b"\n2,http://h/2,c\n')
    (tmp_path / "b.jsonl").write_text('{"image_url": "http://h/1", "capsfusion": "x", "text": "kept"}\n\n')
    assert list(table_rows(tmp_path / "a.csv")) == [("http://h/1", "a, b", {"id": "1"}),
                                                    ("http://h/2", "c", {"id": "2"})]
    assert list(table_rows(tmp_path / "b.jsonl")) == [("http://h/1", "x", {"text": "kept"})]
    signed = {"image_url": {"src": "http://h/s", "height": 3}, "text": "t"}
    assert list(caption_rows([signed], "it")) == [("http://h/s", "t", {})]


@pytest.mark.parametrize("name, text, why", [
    ("a.csv", "picture,title\n1,2\n", "row 1 of .*a.csv holds .*picture.*it needs the columns image_url"),
    ("a.csv", "url,caption\nu,a\nu,a,b\n", "row 2 of .*no cell beyond the header"),     # a comma would cut the caption
    ("a.jsonl", '{"url": "u", "text": "t"}\n{"url": ', "cannot read .*a.jsonl"), ("a.jsonl", "[1]\n", "row 1 of .*.1."),
    ("a.jsonl", '{"url": "u"}\n', "it needs"), ("a.parquet", "", "export other"), ("a.csv", None, "No such file")])
def test_wrong_tables_are_named_with_the_remedy(name, text, why, tmp_path):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=why):
        list(table_rows(tmp_path / name))


# ---- the cache

def test_the_cache_keeps_to_its_limit_and_survives_a_restart(host, how, tmp_path):
    """Room for five files: the least recently used go, also after a restart; a damaged one is fetched again."""
    size = len(picture(kind="BMP"))
    host.pages.update({f"/{k}": send(picture(colour=(k, 0, 0), kind="BMP")) for k in range(8)})
    (tmp_path / "notes.txt").write_text("mine")

    def opened(cache, numbers):
        host.seen.clear()
        for k in numbers:
            assert cache.open(f"{host.url}/{k}").getpixel((0, 0)) == (k, 0, 0)
            time.sleep(0.01)                                    # file dates tell who was used last, in steps of 4 ms
            assert sum(len(data) for name, data in contents(tmp_path).items() if name != "notes.txt") <= cache.max_bytes
        return [int(path[1:]) for _, path, _ in host.seen]
    one = ImageFolderCache(tmp_path, 5 * size + 3, how)
    assert opened(one, [0, 1, 2, 3, 0, 4, 0, 1]) == [0, 1, 2, 3, 4, 1], "room for 4/5: 4 drives 1 out, then 1 drives 2"
    two = ImageFolderCache(tmp_path, 5 * size + 3, how)
    assert opened(two, [0, 3, 4, 1]) == []
    (tmp_path / module._name(f"{host.url}/1")).write_bytes(b"rotten")
    assert opened(two, [1, 1]) == [1] and (tmp_path / "notes.txt").read_text() == "mine"
    with pytest.raises(FetchError, match="HTTP 404"):
        two.open(f"{host.url}/none")


def test_threads_and_processes_share_a_folder(host, how, tmp_path):
    """Three processes of four threads each, twelve images, room for eight: all get the right ones, none trips."""
    size, children = len(picture(kind="BMP")), []
    host.pages.update({f"/{k}": send(picture(colour=(k, 0, 0), kind="BMP")) for k in range(12)})
    for _ in range(3):
        children.append(os.fork())
        if not children[-1]:
            cache = ImageFolderCache(tmp_path, 8 * size, how)
            with ThreadPoolExecutor(4) as pool:
                found = list(pool.map(lambda k: cache.open(f"{host.url}/{k % 12}").getpixel((0, 0))[0], range(100)))
            os._exit(found != [k % 12 for k in range(100)])
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0] and len(host.seen) < 300
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 8 * size
