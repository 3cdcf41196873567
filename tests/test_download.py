"""Downloads against a web server inside the test, which plays a plain file host, a mirror and the Hugging Face hub.

Only 127.0.0.1 is contacted. Waiting goes through the injected `sleep`, so back-off takes no time here.
"""
import errno
import gzip
import hashlib
import os
import re
import signal
import stat
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

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


def file_page(body=BODY, cut=None, ranges=True, **headers):
    """A page as a file server gives it, with ranges; cut=n breaks the first connection n bytes in."""
    cuts = [cut] if cut else []

    def page(handler):
        start = int(handler.headers.get("Range", "bytes=0-")[6:-1]) if ranges else 0
        if start and start >= len(body):
            return answer(handler, 416, Content_Range=f"bytes */{len(body)}")
        rest = body[start:]
        answer(handler, 206 if start else 200, rest[:cuts.pop()] if cuts else rest, **headers, Content_Length=len(rest))
    return page


def moved(where, code=302, **headers):
    return send(status=code, Location=where, **headers)


@pytest.fixture
def host():
    """Ends the connection after each answer, so that a body which falls short is seen at once."""
    with Host("HTTP/1.0") as made:
        yield made


@pytest.fixture
def mirror():
    """A second port: to a browser, and to a token, another host."""
    with Host("HTTP/1.0") as made:
        yield made


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A clean environment: no token, proxy, cache or offline flag of the person who runs the tests."""
    for name in list(os.environ):
        if name.startswith(("HF_", "HUGGING", "TRANSFORMERS_", "XDG_CACHE")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return tmp_path / "hf"


@pytest.fixture
def naps():
    """Collects the pauses that download() would have made."""
    return []


def fails(match, function, *args, **options):
    """The call must end in a DownloadError of one sentence that matches; returns the sentence."""
    with pytest.raises(DownloadError, match=match) as caught:
        function(*args, **options)
    text = str(caught.value)
    assert isinstance(caught.value, UserError) and "\n" not in text and ". " not in text, f"not one sentence: {text}"
    return text


def files(folder):
    return sorted(name for name in os.listdir(folder) if not name.endswith(".lock"))


# ---- the plain transfer

def test_fetches_checks_and_leaves_nothing_else(host, tmp_path):
    """The file arrives whole and alone in its folder; a second call sends no request; a wrong file is replaced."""
    host.pages["/a.bin"] = file_page()
    path = tmp_path / "deep" / "a.bin"
    assert download(f"{host.url}/a.bin", path, SHA.upper()) == path and path.read_bytes() == BODY
    assert files(path.parent) == ["a.bin"]
    assert host.gets("Accept-Encoding") == ["identity"] and host.gets("Range") == [None]
    download(f"{host.url}/a.bin", str(path), SHA)
    download(f"{host.url}/a.bin", path)
    assert len(host.seen) == 1
    path.write_bytes(b"half of it")
    assert download(f"{host.url}/a.bin", path, SHA).read_bytes() == BODY


@pytest.mark.parametrize("sha256, ranges", [(SHA, [None, "bytes=30000-"]), (None, [None, None])])
def test_a_cut_connection_is_resumed_if_the_checksum_can_tell(host, tmp_path, naps, sha256, ranges):
    """Without one the file may have changed in between: 30,000 old bytes and 21,200 new ones have the right size."""
    host.pages["/a.bin"] = file_page(cut=30_000)
    assert download(f"{host.url}/a.bin", tmp_path / "a.bin", sha256, sleep=naps.append).read_bytes() == BODY
    assert host.gets("Range") == ranges and naps == [0.5]


def test_parts_of_earlier_runs(host, tmp_path):
    """With a checksum any part is continued (a poisoned one replaced); without one no part is trusted."""
    host.pages["/a.bin"], path, part = file_page(), tmp_path / "a.bin", tmp_path / "a.bin.incomplete"
    for have, sha256, ranges in [(BODY[:1000], SHA, ["bytes=1000-"]),
                                 (b"x" * 1000, SHA, ["bytes=1000-", None]),
                                 (BODY, SHA, ["bytes=51200-"]),                     # 416: only the rename was missing
                                 (BODY + b"x", SHA, ["bytes=51201-", None]),        # 416: longer than the file
                                 (b"x" * 1000, None, [None])]:
        host.seen.clear()
        path.unlink(missing_ok=True)
        part.write_bytes(have)
        assert download(f"{host.url}/a.bin", path, sha256, sleep=lambda s: None).read_bytes() == BODY
        assert host.gets("Range") == ranges and not part.exists()
    host.pages["/b.bin"] = file_page(ranges=False)
    (tmp_path / "b.bin.incomplete").write_bytes(BODY[:1000])
    assert download(f"{host.url}/b.bin", tmp_path / "b.bin", SHA).read_bytes() == BODY, "a server without ranges"


@pytest.mark.parametrize("name", MALFORMED)
@pytest.mark.parametrize("sha256", [None, hashlib.sha256(b"good").hexdigest()])
def test_no_malformed_answer_gets_the_final_name(host, tmp_path, naps, name, sha256):
    host.pages["/a.bin"] = raw(MALFORMED[name])
    text = fails("broken answer|no web address", download, f"{host.url}/a.bin", tmp_path / "a.bin",
                 sha256, tries=2, sleep=naps.append)
    assert f"put the file at {tmp_path / 'a.bin'} by hand" in text and not (tmp_path / "a.bin").exists()


# ---- errors

def test_a_wrong_checksum_is_named_and_the_part_removed(host, tmp_path):
    host.pages["/a.bin"] = file_page(b"something else")
    text = fails(f"its checksum is not {SHA}", download, f"{host.url}/a.bin", tmp_path / "a.bin", SHA)
    assert f"{host.url}/a.bin" in text and files(tmp_path) == []
    host.pages["/a.bin"] = file_page(gzip.compress(BODY), Content_Encoding="gzip")
    fails("packed as gzip", download, f"{host.url}/a.bin", tmp_path / "a.bin")


def test_busy_servers_are_given_the_time_they_ask_for(host, tmp_path, naps):
    """429 and 503 with Retry-After in seconds; a 500 gets the back-off; an hour is too long; five tries are the end."""
    host.pages["/a.bin"] = in_turn(send(status=429, Retry_After="7"), send(status=503, Retry_After="0"),
                                   send(status=500), file_page())
    download(f"{host.url}/a.bin", tmp_path / "a.bin", SHA, sleep=naps.append)
    assert naps == [7, 0, 2]
    host.pages.update({"/429": send(status=429, Retry_After="3600"), "/500": send(status=500), "/403": send(b"", 403)})
    for code in (429, 403, 404, 500):
        address = f"{host.url}/{code}".replace("//", "//me:secret@")
        assert "secret" not in fails(f"HTTP {code}", download, address, tmp_path / "b", sleep=naps.append)
    assert naps[3:] == [0.5, 1, 2, 4] and files(tmp_path) == ["a.bin"]


def test_limits_of_size_and_time(host, tmp_path, naps):
    """One byte per 20 ms keeps every read alive; only the total can stop it."""
    def trickle(handler):
        answer(handler, 200, b"x", Content_Length="100000")
        for _ in range(20):
            handler.wfile.write(b"x")
            time.sleep(0.02)
    host.pages.update({"/slow": trickle, "/a": file_page(), "/b": lambda handler: answer(handler, 200, BODY,
                                                                                         Content_Length=None)})
    fails("not done within 0 s", download, f"{host.url}/slow", tmp_path / "slow", max_seconds=0.2, sleep=naps.append)
    for name in ("a", "b"):                                     # with its length announced, and without
        fails("more than 1000 bytes", download, f"{host.url}/{name}", tmp_path / name, max_bytes=1000)
        assert not (tmp_path / name).exists()
        assert download(f"{host.url}/{name}", tmp_path / name, max_bytes=51_200).read_bytes() == BODY


def test_what_a_disk_refuses_is_one_sentence_about_the_file_itself(host, tmp_path, monkeypatch):
    """Not about a lock or part nobody knows. (Root may write anywhere, so the refusals are made here.)"""
    host.pages["/a.bin"], path = file_page(), tmp_path / "a.bin"

    def refuse(code):
        def call(*args, **options):
            raise OSError(code, os.strerror(code), str(tmp_path / "some.lock"))
        return call
    monkeypatch.setattr(module.os, "fsync", refuse(errno.ENOSPC))
    text = fails("No space left", download, f"{host.url}/a.bin", path)
    monkeypatch.setattr("tinyvlm.files.os.open", refuse(errno.EROFS))
    text += fails("Read-only", download, f"{host.url}/a.bin", path)
    assert text.count(f"put the file at {path} by hand") == 2 and ".lock" not in text
    monkeypatch.undo()
    (tmp_path / "file").write_text("")
    fails("Not a directory|File exists", download, f"{host.url}/a", tmp_path / "file" / "a")


# ---- redirects and secrets

@pytest.mark.parametrize("where", ["env", "file", "path"])
def test_a_token_stays_with_its_host(host, mirror, home, tmp_path, monkeypatch, where):
    """Followed on the same host with the token; on another port, and back home from there, without it."""
    for file in (home / "token", tmp_path / "elsewhere", tmp_path / "home" / ".netrc"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"hf_{'path' if file.name == 'elsewhere' else 'file'}\n")
    file.write_text("machine 127.0.0.1 login a password b\n")   # requests would send this
    monkeypatch.setenv("HF_ENDPOINT", host.url)
    if where == "env":
        monkeypatch.setenv("HF_TOKEN", " hf_env\n")
    elif where == "path":
        monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "elsewhere"))
    head, get = send(ETag=f'"{SHA}"', X_Repo_Commit=COMMIT), moved("/next", 307)
    host.pages["/a/b/resolve/main/f"] = lambda handler: (head if handler.command == "HEAD" else get)(handler)
    host.pages["/next"] = moved(f"{mirror.url}/far")
    mirror.pages["/far"] = moved(f"{host.url}/back")
    host.pages["/back"] = file_page()
    assert hf_file("a/b", "f").read_bytes() == BODY
    assert [h.get("Authorization") for _, _, h in host.seen] == [f"Bearer hf_{where}"] * 3 + [None]
    assert mirror.gets("Authorization") == [None]


# ---- several processes

def test_a_killed_process_holds_nobody_up_and_its_part_is_continued(host, tmp_path):
    """kill -9 while it holds the lock that another waits for: the kernel lets go of it."""
    release = threading.Event()

    def half(handler):
        answer(handler, 200, BODY[:30_000], Content_Length=len(BODY))
        release.wait(10)
    part, job = tmp_path / "a.bin.incomplete", (f"{host.url}/a.bin", tmp_path / "a.bin", SHA)
    host.pages["/a.bin"] = half
    victim = os.fork()
    if not victim:
        download(*job)
        os._exit(0)
    until = time.monotonic() + 20
    while time.monotonic() < until and not (part.exists() and part.stat().st_size > 8192):
        time.sleep(0.01)
    host.pages["/a.bin"] = file_page()
    threading.Timer(0.2, os.kill, (victim, signal.SIGKILL)).start()
    with ThreadPoolExecutor(6) as pool:                         # six wait for it; one goes on, five find the file
        assert [path.read_bytes() for path in pool.map(lambda _: download(*job), range(6))] == [BODY] * 6
    os.waitpid(victim, 0)
    release.set()
    assert len(host.seen) == 2 and re.fullmatch(r"bytes=\d{4,}-", host.gets("Range")[1])
    assert files(tmp_path) == ["a.bin"]


# ---- the hub

@pytest.fixture
def hub(host, mirror, monkeypatch, home):
    """A hub whose repository org/name has a small file in git, a large one on another host, and a short name."""
    monkeypatch.setenv("HF_ENDPOINT", host.url)
    commit = {"X_Repo_Commit": COMMIT}
    small = file_page(b"{}\n", ETag=f'W/"{git_sha(b"{}" + bytes([10]))}"', **commit)
    large = moved(f"{mirror.url}/store/1", X_Linked_Etag=f'"{SHA}"', ETag='"no"', **commit)
    mirror.pages["/store/1"] = file_page(ETag='"store"')
    for revision in ("main", COMMIT, "refs%2Fpr%2F32"):
        root = f"/org/name/resolve/{revision}"
        host.pages.update({f"{root}/config.json": small, f"{root}/sub/dir/model.bin": large, f"{root}/none":
                           send(status=404, X_Error_Code="EntryNotFound", **commit)})
        host.pages[f"/name/resolve/{revision}/config.json"] = moved(f"{root}/config.json", 307)
    return home / "hub" / "models--org--name"


def test_hub_layout(hub, host):
    """What huggingface_hub makes of the same files, name by name; links lead up as many folders as they are deep."""
    small, large = hf_file("org/name", "config.json"), hf_file("org/name", "sub/dir/model.bin")
    assert small == hub / "snapshots" / COMMIT / "config.json" and small.read_bytes() == b"{}\n"
    assert large == hub / "snapshots" / COMMIT / "sub" / "dir" / "model.bin" and large.read_bytes() == BODY
    assert os.readlink(small) == f"../../blobs/{git_sha(b'{}' + bytes([10]))}"
    assert os.readlink(large) == f"../../../../blobs/{SHA}" and (hub / "refs" / "main").read_text() == COMMIT
    assert sorted(os.listdir(hub)) == ["blobs", "refs", "snapshots"] and len(os.listdir(hub / "blobs")) == 2
    assert len(os.listdir(hub.parent / ".locks" / hub.name)) == 2


def test_hub_cache_is_used_without_a_request(hub, host, monkeypatch):
    """Cached by branch or by commit; offline flags matter only for what is missing."""
    file = hf_file("org/name", "config.json")
    count = len(host.seen)
    for name, flag in (("HF_HUB_OFFLINE", "yes"), ("TRANSFORMERS_OFFLINE", "1")):
        with monkeypatch.context() as patch:
            patch.setenv(name, flag)
            assert hf_file("org/name", "config.json") == hf_file("org/name", "config.json", COMMIT) == file
            fails("HF_HUB_OFFLINE", hf_file, "org/name", "sub/dir/model.bin")
            assert hf_file("org/name", "sub/dir/model.bin", missing_ok=True) is None
            text = fails("by hand", hf_file, "org/name", "w.bin", "refs/pr/7")
            place = Path(re.search(r"put the file at (.*) by hand", text)[1])
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(b"w")
            assert hf_file("org/name", "w.bin", "refs/pr/7") == place, "where we say to put a file it is found"
            place.unlink()
    assert len(host.seen) == count


@pytest.mark.parametrize("names, root", [
    ({"HF_HUB_CACHE": "a"}, "a"), ({"HF_HOME": "c"}, "c/hub"),
    ({"HF_HOME": "", "XDG_CACHE_HOME": "d"}, "d/huggingface/hub"), ({"HF_HOME": ""}, "home/.cache/huggingface/hub")])
def test_cache_root_is_read_from_the_environment_at_each_call(hub, tmp_path, monkeypatch, names, root):
    for name, value in names.items():
        monkeypatch.setenv(name, value and str(tmp_path / value))
    assert hf_file("org/name", "config.json") == tmp_path / root / hub.name / "snapshots" / COMMIT / "config.json"


def test_revisions_and_short_names(hub, host, home):
    """refs/pr/32 travels as one path element, %2F included; gpt2-like names follow the hub's relative redirect."""
    pinned = hf_file("org/name", "config.json", "refs/pr/32")
    assert host.seen[0][1] == "/org/name/resolve/refs%2Fpr%2F32/config.json"
    assert (hub / "refs" / "refs" / "pr" / "32").read_text() == COMMIT and pinned.parent.name == COMMIT
    assert hf_file("name", "config.json") == home / "hub" / "models--name" / "snapshots" / COMMIT / "config.json"
    hf_file("org/name", "sub/dir/model.bin", COMMIT)
    assert not (hub / "refs" / COMMIT).exists()


def test_absent_files_are_remembered(hub, host):
    """pretrained.py asks for model.safetensors first; the marker is the one huggingface_hub leaves."""
    assert hf_file("org/name", "none", missing_ok=True) is None
    assert (hub / ".no_exist" / COMMIT / "none").is_file() and (hub / "refs" / "main").read_text() == COMMIT
    assert hf_file("org/name", "none", missing_ok=True) is None and len(host.seen) == 1
    fails("there is no none at main of org/name", hf_file, "org/name", "none")


@pytest.mark.parametrize("code, head, match", [
    (401, {}, "HTTP 401.*HF_TOKEN"), (403, {"X_Error_Code": "GatedRepo"}, "GatedRepo.*HF_TOKEN"),
    (404, {"X_Error_Code": "RepoNotFound"}, "RepoNotFound: there is no f at v1 of org/gone"),
    (404, {"X_Error_Code": "RevisionNotFound"}, "RevisionNotFound"), (429, {"Retry_After": "9"}, "HTTP 429")])
def test_hub_refusals_say_what_to_do_also_where_a_file_may_be_missing(hub, host, naps, code, head, match):
    host.pages["/org/gone/resolve/v1/f"] = send(status=code, **head)
    fails(match, hf_file, "org/gone", "f", "v1", missing_ok=True, sleep=naps.append)
    assert naps == ([9] * 4 if code == 429 else [])


def test_hub_content_is_verified_and_parts_of_huggingface_hub_resumed(hub, host, mirror):
    """By sha256 for the large file, by git's blob id for the small one; nothing is linked when it is wrong."""
    mirror.pages["/store/1"] = file_page(BODY[::-1])
    fails("its checksum is not " + SHA, hf_file, "org/name", "sub/dir/model.bin")
    etag = f'"{git_sha(b"{}" + bytes([10]))}"'
    host.pages["/org/name/resolve/main/config.json"] = file_page(b"[]\n", ETag=etag, X_Repo_Commit=COMMIT)
    fails("its checksum is not " + git_sha(b"{}\n"), hf_file, "org/name", "config.json")
    assert not (hub / "refs").exists() and os.listdir(hub / "blobs") == []
    mirror.pages["/store/1"] = file_page()
    mirror.seen.clear()
    (hub / "blobs" / f"{SHA}.incomplete").write_bytes(BODY[:777])       # both libraries call it so
    assert hf_file("org/name", "sub/dir/model.bin").read_bytes() == BODY and mirror.gets("Range") == ["bytes=777-"]


def test_no_hub_or_a_hostile_one(hub, host):
    """A 200 without commit and ETag, or with either leading out of the cache, is refused."""
    for head in ({}, {"X_Repo_Commit": COMMIT}, {"X_Repo_Commit": COMMIT, "ETag": '"../../../evil"'},
                 {"X_Repo_Commit": "../../evil", "ETag": '"a"'}):
        host.pages["/org/name/resolve/main/x"] = send(status=200, **head)
        fails("is no hub", hf_file, "org/name", "x")


def test_names_that_leave_the_cache_are_refused(hub, host):
    """So is a--b, whose folder would be that of a/b."""
    for repo in ("../x", "a/b/c", "a--b", ""):
        fails("no hub repository .* or .* no plain relative path", hf_file, repo, "f")
    for path in ("../f", "/f", "", "x/../../f", "C:f", "..\\f"):
        fails("no plain relative path", hf_file, "a/b", path)
        fails("no plain relative path", hf_file, "a/b", "f", path)
    assert host.seen == []


def test_copy_where_links_fail(hub, monkeypatch):
    """Windows without the privilege for links: the snapshot holds the file itself."""
    def no_links(*args, **options):
        raise OSError("a required privilege is not held by the client")
    monkeypatch.setattr(module.os, "symlink", no_links)
    file = hf_file("org/name", "sub/dir/model.bin")
    assert not file.is_symlink() and file.read_bytes() == BODY


# ---- zips

def make_zip(path, members, mode=None):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, body in members.items():
            info = zipfile.ZipInfo(name)
            info.compress_type, info.external_attr = zipfile.ZIP_DEFLATED, (mode or 0) << 16
            archive.writestr(info, body)
    return path


def test_zip_appears_whole(tmp_path):
    made = make_zip(tmp_path / "a.zip", {"d/": b"", "d/1.txt": b"one", "2.txt": b"two"})
    (tmp_path / "out.incomplete").mkdir()
    (tmp_path / "out.incomplete" / "old").write_text("of a killed run")
    out = extract_zip(made, tmp_path / "out")
    assert sorted(str(p.relative_to(out)) for p in out.rglob("*")) == ["2.txt", "d", "d/1.txt"]
    assert (out / "d/1.txt").read_bytes() == b"one" and files(tmp_path) == ["a.zip", "out"]


@pytest.mark.parametrize("name", ["../evil", "/evil", "d/../../evil", "C:\\evil", "..\\evil", "C:evil"])
def test_zip_slips_are_refused(tmp_path, name):
    made = make_zip(tmp_path / "a.zip", {"good": b"x", name: b"evil"})
    fails("outside its folder", extract_zip, made, tmp_path / "in" / "out")
    assert not list(tmp_path.rglob("evil*")) and not (tmp_path / "in" / "out").exists()


def test_zip_links_and_bombs_are_refused(tmp_path):
    made = make_zip(tmp_path / "link.zip", {"link": b"/etc/passwd"}, mode=stat.S_IFLNK | 0o777)
    fails("a link", extract_zip, made, tmp_path / "out")
    made = make_zip(tmp_path / "a.zip", {"zeros": bytes(100_000), "b": b"x"})
    fails("beyond all limits", extract_zip, made, tmp_path / "out", max_bytes=50_000)
    fails("beyond all limits", extract_zip, made, tmp_path / "out", max_files=1)
    with zipfile.ZipFile(tmp_path / "big.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("z", "w") as file:
            for _ in range(101):
                file.write(bytes(1_000_000))
    fails("beyond all limits", extract_zip, tmp_path / "big.zip", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damaged_zip_leaves_nothing_behind(tmp_path):
    """One flipped bit fails the CRC after other members were written: nothing may look finished."""
    made = make_zip(tmp_path / "a.zip", {"1": b"fine", "2": os.urandom(5000)})
    data = bytearray(made.read_bytes())
    data[2500] ^= 1
    made.write_bytes(data)
    fails("CRC.*run again", extract_zip, made, tmp_path / "out")
    made.write_bytes(data[:3000])
    assert str(made) in fails("delete a damaged zip", extract_zip, made, tmp_path / "out")
    assert files(tmp_path) == ["a.zip"]
    fails("No such file", extract_zip, tmp_path / "none.zip", tmp_path / "out")
