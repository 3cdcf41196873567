"""Downloads against a web server inside the test, which plays a plain file host, a mirror and the Hugging Face hub.

Only 127.0.0.1 is contacted. Pauses are collected, not waited for.
"""
import hashlib
import io
import os
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest

from servers import MALFORMED, Host, answer, in_turn, raw, send
from tinyvlm import download as module
from tinyvlm.config import UserError
from tinyvlm.download import DownloadError, download, extract_zip, hf_file

BODY = bytes(range(256)) * 200                                  # 51,200 bytes
SHA = hashlib.sha256(BODY).hexdigest()
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def git_sha(body):
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


def file_page(body=BODY, cut=None, **headers):
    """A page as a file server gives it; cut=n breaks the first connection n bytes in."""
    cuts = [cut] if cut else []

    def page(handler):
        start = int(handler.headers.get("Range", "bytes=0-")[6:-1])
        if start and start >= len(body):
            return answer(handler, 416, Content_Range=f"bytes */{len(body)}")
        rest, span = body[start:], f"bytes {start}-{len(body) - 1}/{len(body)}" if start else None
        answer(handler, 206 if start else 200, rest[:cuts.pop()] if cuts else rest, **headers, Content_Length=len(rest),
               Content_Range=span)
    return page


@pytest.fixture
def host():
    with Host("HTTP/1.0") as made:
        yield made


mirror = host                           # a second port: to a browser, and to a token, another host


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A clean environment: no token, proxy, cache or offline flag of the person who runs the tests."""
    for name in list(os.environ):
        if name.startswith("HF_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return tmp_path / "hf"


@pytest.fixture(autouse=True)
def naps(monkeypatch):
    """Collects the pauses that would have been made."""
    found = []
    monkeypatch.setattr(module, "sleep", found.append)
    return found


def fails(match, function, *args, **options):
    """The call must end in a UserError of one sentence that matches; returns the sentence."""
    with pytest.raises(UserError, match=match) as caught:
        function(*args, **options)
    text = str(caught.value)
    assert isinstance(caught.value, DownloadError) or function is extract_zip
    assert "\n" not in text and ". " not in text, f"not one sentence: {text}"
    return text


def files(folder):
    return sorted(name for name in os.listdir(folder) if not name.endswith(".lock"))


# ---- one file

def zipped(body=BODY):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("member", body)
    return file.getvalue()


@pytest.mark.parametrize("name, sha256, body, resumed", [
    ("a.bin", SHA, BODY, True), ("a.zip", None, zipped(), True), ("a.bin", None, BODY, False)])
def test_what_can_be_checked_is_continued(host, tmp_path, naps, name, sha256, body, resumed):
    """Else 30,000 old bytes and the rest of a newer file would have the right size. A connection is cut, then a run."""
    host.pages["/x"], path, part = file_page(body, cut=30_000), tmp_path / name, tmp_path / f"{name}.incomplete"
    assert download(f"{host.url}/x", path, sha256).read_bytes() == body
    assert host.gets("Range") == [None, "bytes=30000-" if resumed else None] and naps == [0.5]
    other = in_turn(send(body[1000:], 206, Content_Range=f"bytes 1000-{len(body) - 1}/{len(body) + 1}"), send(body))
    for page, have, ranges in (
            (file_page(body), body[:1000], ["bytes=1000-"]), (send(body), body[:1000], ["bytes=1000-"]),
            (other, body[:1000], ["bytes=1000-", None]),        # the file has another length now
            (file_page(body), body + b"x", [f"bytes={len(body) + 1}-", None])):   # 416
        host.pages["/x"] = page if resumed else file_page(body)
        host.seen.clear()
        path.unlink()
        part.write_bytes(have)
        assert download(f"{host.url}/x", path, sha256).read_bytes() == body
        assert host.gets("Range") == (ranges if resumed else [None]) and files(tmp_path) == [name]


@pytest.mark.parametrize("name", MALFORMED)
@pytest.mark.parametrize("sha256", [None, hashlib.sha256(b"good").hexdigest()])
def test_no_malformed_answer_gets_the_final_name(host, tmp_path, name, sha256):
    host.pages["/a.bin"] = raw(MALFORMED[name])
    fails("cannot fetch .*a.bin: .*; try again", download, f"{host.url}/a.bin", tmp_path / "a.bin", sha256, tries=2)
    assert not (tmp_path / "a.bin").exists()


def test_wrong_content_is_named_and_the_part_removed_and_good_content_kept(host, tmp_path):
    host.pages["/a"] = file_page(b"<html>please log in</html>")
    assert f"{host.url}/a" in fails(f"its checksum is not {SHA}", download, f"{host.url}/a", tmp_path / "a.bin", SHA)
    fails("what came is no zip", download, f"{host.url}/a", tmp_path / "a.zip")
    assert files(tmp_path) == []
    host.pages["/a"] = file_page()
    (tmp_path / "a.bin").write_bytes(b"half of it")
    for sha256 in (None, SHA.upper(), SHA, None):               # only the second must fetch
        assert download(f"{host.url}/a", str(tmp_path / "a.bin"), sha256) == tmp_path / "a.bin"
    assert (tmp_path / "a.bin").read_bytes() == BODY and len(host.seen) == 3


def test_busy_servers_are_given_the_time_they_ask_for(host, tmp_path, naps):
    """429 and 503 with Retry-After in seconds; a 500 gets the back-off; an hour is too long; five tries are the end."""
    host.pages["/a.bin"] = in_turn(send(status=429, Retry_After="7"), send(status=503, Retry_After="0"),
                                   send(status=500), file_page())
    download(f"{host.url}/a.bin", tmp_path / "a.bin", SHA)
    assert naps == [7, 0, 2]
    host.pages.update({"/429": send(status=429, Retry_After="3600"), "/500": send(status=500), "/403": send(b"", 403)})
    for code in (429, 403, 404, 500):
        address = f"{host.url}/{code}".replace("//", "//me:secret@")
        assert "secret" not in fails(f"HTTP {code}", download, address, tmp_path / "b")
    assert naps[3:] == [0.5, 1, 2, 4] and files(tmp_path) == ["a.bin"]


def test_limits_of_size_and_time(host, tmp_path):
    """One byte per 20 ms keeps every read alive; only the total can stop it."""
    def trickle(handler):
        answer(handler, 200, b"x", Content_Length="100000")
        for _ in range(20):
            handler.wfile.write(b"x")
            time.sleep(0.02)
    chunked = raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nC800\r\n" + BODY + b"\r\n0\r\n\r\n")
    host.pages.update({"/slow": trickle, "/a": file_page(), "/b": chunked})
    fails("not done within 0 s", download, f"{host.url}/slow", tmp_path / "slow", max_seconds=0.2)
    for name in ("a", "b"):                                     # with its length announced, and without
        fails("more than 1000 bytes", download, f"{host.url}/{name}", tmp_path / name, max_bytes=1000)
        assert not (tmp_path / name).exists()
        assert download(f"{host.url}/{name}", tmp_path / name, max_bytes=51_200).read_bytes() == BODY


def test_many_at_once_fetch_it_once(host, tmp_path):
    """As the processes of one run do: one has the lock, the others wait and find the file."""
    host.pages["/a.bin"] = lambda handler: (time.sleep(0.1), file_page()(handler))
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda _: download(f"{host.url}/a.bin", tmp_path / "a.bin", SHA).read_bytes(), range(6)))
    assert found == [BODY] * 6 and len(host.seen) == 1


# ---- the hub

@pytest.mark.parametrize("where", ["env", "file"])
def test_a_token_stays_with_its_host(host, mirror, home, tmp_path, monkeypatch, where):
    """Followed on the same host with the token; on another port, and back home from there, without it."""
    for file, text in ((home / "token", "hf_file\n"), (tmp_path / "home" / ".netrc",
                                                       "machine 127.0.0.1 login a password b\n")):
        file.parent.mkdir()
        file.write_text(text)                                   # requests would send what .netrc holds
    monkeypatch.setenv("HF_ENDPOINT", host.url)
    if where == "env":
        monkeypatch.setenv("HF_TOKEN", " hf_env\n")
    head, get = send(ETag=f'"{SHA}"', X_Repo_Commit=COMMIT), send(status=307, Location="/next")
    host.pages["/a/b/resolve/main/f"] = lambda handler: (head if handler.command == "HEAD" else get)(handler)
    host.pages["/next"] = send(status=302, Location=f"{mirror.url}/far")
    mirror.pages["/far"] = send(status=302, Location=f"{host.url}/back")
    host.pages["/back"] = file_page()
    assert hf_file("a/b", "f").read_bytes() == BODY
    assert [h.get("Authorization") for _, _, h in host.seen] == [f"Bearer hf_{where}"] * 3 + [None]
    assert mirror.gets("Authorization") == [None]


@pytest.fixture
def hub(host, mirror, monkeypatch, home):
    """A hub whose repository org/name has a small file in git, a large one on another host, and a short name."""
    monkeypatch.setenv("HF_ENDPOINT", host.url)
    commit = {"X_Repo_Commit": COMMIT}
    small = file_page(b"{}\n", ETag=f'W/"{git_sha(b"{}" + bytes([10]))}"', **commit)
    large = send(status=302, Location=f"{mirror.url}/store/1", X_Linked_Etag=f'"{SHA}"', ETag='"no"', **commit)
    mirror.pages["/store/1"] = file_page(ETag='"store"')
    for revision in ("main", COMMIT, "refs%2Fpr%2F32"):
        root = f"/org/name/resolve/{revision}"
        host.pages.update({f"{root}/config.json": small, f"{root}/sub/dir/model.bin": large, f"{root}/none":
                           send(status=404, X_Error_Code="EntryNotFound", **commit)})
        host.pages[f"/name/resolve/{revision}/config.json"] = send(status=307, Location=f"{root}/config.json")
    return home / "hub" / "models--org--name"


def test_hub_layout(hub, mirror):
    """What huggingface_hub makes of the same files, name by name; links lead up as many folders as they are deep."""
    (hub / "blobs").mkdir(parents=True)
    (hub / "blobs" / f"{SHA}.incomplete").write_bytes(BODY[:777])       # a part that huggingface_hub left
    small, large = hf_file("org/name", "config.json"), hf_file("org/name", "sub/dir/model.bin")
    assert small == hub / "snapshots" / COMMIT / "config.json" and small.read_bytes() == b"{}\n"
    assert large == hub / "snapshots" / COMMIT / "sub" / "dir" / "model.bin" and large.read_bytes() == BODY
    assert mirror.gets("Range") == ["bytes=777-"]
    assert os.readlink(small) == f"../../blobs/{git_sha(b'{}' + bytes([10]))}"
    assert os.readlink(large) == f"../../../../blobs/{SHA}" and (hub / "refs" / "main").read_text() == COMMIT
    assert files(hub) == ["blobs", "refs", "snapshots"] and len(files(hub / "blobs")) == 2


def test_hub_cache_is_used_without_a_request(hub, host, monkeypatch):
    """Cached by branch or by commit; the offline flag matters only for what is missing."""
    file, count = hf_file("org/name", "config.json"), len(host.seen)
    monkeypatch.setenv("HF_HUB_OFFLINE", "yes")
    assert hf_file("org/name", "config.json") == hf_file("org/name", "config.json", COMMIT) == file
    assert str(file.parent / "x.bin") in fails("HF_HUB_OFFLINE forbids", hf_file, "org/name", "x.bin")
    assert hf_file("org/name", "x.bin", missing_ok=True) is None and len(host.seen) == count
    fails("HF_HUB_OFFLINE forbids", hf_file, "org/other", "x.bin", missing_ok=True)     # "has no weights"


def test_revisions_and_short_names(hub, host, home):
    """refs/pr/32 travels as one path element, %2F included; gpt2-like names follow the hub's relative redirect."""
    pinned = hf_file("org/name", "config.json", "refs/pr/32")
    assert host.seen[0][1] == "/org/name/resolve/refs%2Fpr%2F32/config.json"
    assert (hub / "refs" / "refs" / "pr" / "32").read_text() == COMMIT and pinned.parent.name == COMMIT
    assert hf_file("name", "config.json") == home / "hub" / "models--name" / "snapshots" / COMMIT / "config.json"
    hf_file("org/name", "sub/dir/model.bin", COMMIT)
    assert not (hub / "refs" / COMMIT).exists()


@pytest.mark.parametrize("code, head, match", [
    (401, {}, "HTTP 401.*HF_TOKEN"), (403, {"X_Error_Code": "GatedRepo"}, "GatedRepo.*HF_TOKEN"),
    (404, {"X_Error_Code": "RevisionNotFound"}, "RevisionNotFound"), (429, {"Retry_After": "9"}, "HTTP 429;"),
    (200, {}, "is no hub"), (200, {"X_Repo_Commit": COMMIT}, "is no hub"),
    (200, {"X_Repo_Commit": COMMIT, "ETag": '"../../../evil"'}, "is no hub"),
    (200, {"X_Repo_Commit": "../../evil", "ETag": f'"{SHA}"'}, "is no hub")])
def test_hub_refusals_also_where_a_file_may_be_missing(hub, host, naps, code, head, match):
    """And answers without commit and ETag, or with either leading out of the cache. A missing file alone is None."""
    host.pages["/org/gone/resolve/v1/f"] = send(status=code, **head)
    fails(match, hf_file, "org/gone", "f", "v1", missing_ok=True)
    assert naps == ([9] * 4 if code == 429 else [])
    assert hf_file("org/name", "none", missing_ok=True) is None
    fails("HTTP 404 EntryNotFound", hf_file, "org/name", "none")


def test_hub_content_is_verified(hub, host, mirror):
    """By sha256 for the large file, by git's blob id for the small one; nothing is linked when it is wrong."""
    mirror.pages["/store/1"] = file_page(BODY[::-1])
    fails("its checksum is not " + SHA, hf_file, "org/name", "sub/dir/model.bin")
    etag = f'"{git_sha(b"{}" + bytes([10]))}"'
    host.pages["/org/name/resolve/main/config.json"] = file_page(b"[]\n", ETag=etag, X_Repo_Commit=COMMIT)
    fails("its checksum is not " + git_sha(b"{}\n"), hf_file, "org/name", "config.json")
    assert not (hub / "refs").exists() and files(hub / "blobs") == []


def test_names_that_leave_the_cache_are_refused(hub, host):
    """So is a--b, whose folder would be that of a/b."""
    for path in ("../f", "/f", "", "x/../../f", "C:f", "..\\f", "a--b"):
        for names in (path, "f"), ("a/b", "f", path), ("a/b", path):
            if path != "a--b" or names[0] == path:
                fails("no plain names of a hub repository", hf_file, *names)
    assert host.seen == []


# ---- zips

def test_zip_appears_whole_and_nothing_leaves_its_folder(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in ("d/", "d/1.txt", "../evil", "/else/2"):
            archive.writestr(name, b"" if name == "d/" else b"one")
        link = zipfile.ZipInfo("link")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    (tmp_path / "in" / "out.incomplete").mkdir(parents=True)
    (tmp_path / "in" / "out.incomplete" / "old").write_text("of a killed run")
    out = tmp_path / "in" / "out"
    extract_zip(tmp_path / "a.zip", out)
    assert (out / "d/1.txt").read_bytes() == b"one" and (out / "link").read_bytes() == b"/etc/passwd"
    assert not (out / "link").is_symlink() and not (out / "old").exists()
    assert files(tmp_path) == ["a.zip", "in"] and files(tmp_path / "in") == ["out"]


def test_damaged_zips_and_bombs_leave_nothing_behind(tmp_path):
    """One flipped bit fails the CRC after other members were written; 3 MB of zeros have 3 kB."""
    data, bomb = bytearray(zipped()), io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros", bytes(3_000_000))
    for damaged, why in ((data[:3000], "not a zip file"), (data[:2500] + b"!" + data[2501:], "CRC"),
                         (bomb.getvalue(), "would become 3000000")):
        (tmp_path / "a.zip").write_bytes(damaged)
        assert str(tmp_path / "a.zip") in fails(f"{why}.*run again", extract_zip, tmp_path / "a.zip", tmp_path / "out")
        assert files(tmp_path) == ["a.zip"]
