"""Downloads against a web server inside the test, which plays a plain file host, a mirror and the Hugging Face hub.

Only 127.0.0.1 is contacted. Waiting goes through the injected `sleep`, so back-off takes no time here.
"""
import errno
import gzip
import hashlib
import os
import re
import stat
import subprocess
import sys
import threading
import time
import zipfile
from email.utils import formatdate
from pathlib import Path

import pytest

from servers import Host, answer, in_turn, send
from tinyvlm import download as module
from tinyvlm.config import UserError
from tinyvlm.download import DownloadError, download, extract_zip, hf_file

BODY = bytes(range(256)) * 200                                  # 51,200 bytes
SHA = hashlib.sha256(BODY).hexdigest()
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def git_sha(body):
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


def file_page(body=BODY, etag='"v1"', cut=None, ranges=True, **more):
    """A page as a file server gives it: Range and If-Range; cut=n breaks the first connection n bytes in."""
    cuts = [cut] if cut else []

    def page(handler):
        start = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
        start = int(start[1]) if start and ranges and handler.headers.get("If-Range", etag) == etag else 0
        if start and start >= len(body):
            return answer(handler, 416, Content_Range=f"bytes */{len(body)}")
        rest, headers = body[start:], {"ETag": etag, "Content_Length": str(len(body) - start), **more}
        if start:
            headers["Content_Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        answer(handler, 206 if start else 200, rest[:cuts.pop()] if cuts else rest, **headers)
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


# ---- the plain transfer


def test_fetches_checks_and_leaves_nothing_else(host, tmp_path):
    """The file arrives whole, sized in bytes on the wire, and alone in its folder; a second call asks nobody."""
    host.pages["/a.bin"] = file_page()
    path = tmp_path / "deep" / "a.bin"
    assert download(f"{host.url}/a.bin", path, SHA.upper()) == path and path.read_bytes() == BODY
    assert os.listdir(path.parent) == ["a.bin"]
    assert host.gets("Accept-Encoding") == ["identity"] and host.gets("Range") == [None]
    download(f"{host.url}/a.bin", path, SHA)
    download(f"{host.url}/a.bin", str(path), size=len(BODY))
    download(f"{host.url}/a.bin", path)
    assert len(host.seen) == 1


@pytest.mark.parametrize("known", [{"sha256": SHA}, {"size": len(BODY)}])
def test_a_wrong_file_in_place_is_replaced(host, tmp_path, known):
    host.pages["/a.bin"] = file_page()
    (tmp_path / "a.bin").write_bytes(b"half of it")
    assert download(f"{host.url}/a.bin", tmp_path / "a.bin", **known).read_bytes() == BODY


@pytest.mark.parametrize("etag", ['"v1"', None])
def test_a_cut_connection_is_resumed_from_its_last_byte(host, tmp_path, naps, etag):
    """Also without an ETag: within one call the total size must stay the same."""
    host.pages["/a.bin"] = file_page(etag=etag, cut=30_000)
    assert download(f"{host.url}/a.bin", tmp_path / "a.bin", sleep=naps.append).read_bytes() == BODY
    assert host.gets("Range") == [None, "bytes=30000-"] and host.gets("If-Range") == [None, etag]
    assert naps == [0.5]


def test_a_file_that_changed_meanwhile_is_not_glued_to_the_old_part(host, tmp_path, naps):
    """Same length, other ETag: 30,000 old bytes + 21,200 new ones would have the right size."""
    new = BODY[::-1]
    host.pages["/a.bin"] = in_turn(file_page(cut=30_000), file_page(new, etag='"v2"'))
    assert download(f"{host.url}/a.bin", tmp_path / "a.bin", sleep=naps.append).read_bytes() == new


@pytest.mark.parametrize("weak", ["", "W/"])
def test_a_server_that_ignores_if_range_is_caught_by_its_etag(host, tmp_path, naps, weak):
    """A weak tag may not stand in If-Range at all, so there the comparison is all we have."""
    new = BODY[::-1]
    late = {"ETag": weak + '"v2"', "Content_Range": f"bytes 30000-{len(new) - 1}/{len(new)}"}
    first = file_page(cut=30_000, etag=weak + '"v1"')
    host.pages["/a.bin"] = in_turn(first, lambda handler: answer(handler, 206, new[30_000:], **late),
                                   file_page(new, etag='"v2"'))
    assert download(f"{host.url}/a.bin", tmp_path / "a.bin", sleep=naps.append).read_bytes() == new
    assert naps == [0.5, 0] and host.gets("Range") == [None, "bytes=30000-", None]
    assert [headers.get("If-Range") for headers in host.gets()] == [None, None if weak else '"v1"', None]


def test_parts_of_earlier_runs(host, tmp_path):
    """With a checksum any part is continued (a poisoned one replaced); without one an unknown part is not trusted."""
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


def test_a_server_without_ranges_starts_over(host, tmp_path):
    host.pages["/a.bin"] = file_page(ranges=False)
    (tmp_path / "a.bin.incomplete").write_bytes(BODY[:1000])
    assert download(f"{host.url}/a.bin", tmp_path / "a.bin", SHA).read_bytes() == BODY


def test_ctrl_c_leaves_a_part_that_the_next_run_continues(host, tmp_path, naps):
    host.pages["/a.bin"] = file_page(cut=30_000)

    def ctrl_c(seconds):
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        download(f"{host.url}/a.bin", tmp_path / "a.bin", sleep=ctrl_c)
    assert (tmp_path / "a.bin.incomplete").stat().st_size == 30_000 and not (tmp_path / "a.bin").exists()
    download(f"{host.url}/a.bin", tmp_path / "a.bin")
    assert host.gets("Range")[-1] == "bytes=30000-" and sorted(os.listdir(tmp_path)) == ["a.bin"]


def test_gzip_in_spite_of_identity_is_undone(host, tmp_path, naps):
    """Its Content-Length counts packed bytes, so it is not the file's size, and a part of it cannot be continued."""
    noise = os.urandom(60_000)
    host.pages["/a.txt"] = file_page(gzip.compress(noise), cut=30_000, Content_Encoding="gzip")
    assert download(f"{host.url}/a.txt", tmp_path / "a.txt", sleep=naps.append).read_bytes() == noise
    assert host.gets("Range") == [None, None] and naps == [0.5]


# ---- errors


def test_wrong_hash_names_both_and_removes_the_part(host, tmp_path):
    host.pages["/a.bin"] = file_page(b"something else")
    text = fails("expected checksum", download, f"{host.url}/a.bin", tmp_path / "a.bin", SHA)
    assert SHA in text and hashlib.sha256(b"something else").hexdigest() in text
    assert f"{host.url}/a.bin" in text and str(tmp_path / "a.bin") in text and os.listdir(tmp_path) == []


def test_wrong_size_is_refused_before_the_body(host, tmp_path):
    host.pages["/a.bin"] = file_page()
    fails("51200 bytes where 7 were expected", download, f"{host.url}/a.bin", tmp_path / "a.bin", size=7)


@pytest.mark.parametrize("code", [401, 403, 404, 410])
def test_a_final_refusal_is_not_retried(host, tmp_path, naps, code):
    host.pages["/a.bin"] = send(status=code)
    fails(f"answers {code} ", download, f"{host.url}/a.bin", tmp_path / "a.bin", sleep=naps.append)
    assert len(host.seen) == 1 and naps == []


def test_busy_servers_are_given_the_time_they_ask_for(host, tmp_path, naps):
    """429 and 503 with Retry-After in seconds, as a date, and beyond the cap; a 500 gets the back-off."""
    date = formatdate(time.time() + 40, usegmt=True)
    host.pages["/a.bin"] = in_turn(send(status=429, Retry_After="7"), send(status=503, Retry_After=date),
                                   send(status=503, Retry_After="99999"), send(status=500), file_page())
    download(f"{host.url}/a.bin", tmp_path / "a.bin", SHA, sleep=naps.append, show=False)
    assert naps[0] == 7 and 30 < naps[1] <= 40 and naps[2:] == [300, 4.0]


def test_tries_are_bounded_and_progress_starts_a_new_row(host, tmp_path, naps):
    host.pages["/a.bin"] = send(status=500)
    fails("answers 500 Internal Server Error", download, f"{host.url}/a.bin", tmp_path / "a.bin", sleep=naps.append)
    assert naps == [0.5, 1, 2, 4]
    big = os.urandom(8_000_000)                                 # cut seven times: more than `tries`, but always further
    host.pages["/big"] = in_turn(*[file_page(big, cut=1_100_000) for _ in range(7)], file_page(big))
    assert download(f"{host.url}/big", tmp_path / "big", sleep=naps.append).read_bytes() == big


def test_nobody_there(tmp_path, naps):
    """A refused connection is tried as often as any other fault, and then a sentence."""
    with Host() as gone:
        url = f"{gone.url}/a.bin"
    fails("127.0.0.1 cannot be reached", download, url, tmp_path / "a.bin", sleep=naps.append)
    assert len(naps) == 4


def test_a_trickle_hits_the_time_limits(host, tmp_path, naps):
    """One byte per 20 ms keeps every read alive; only the total and the pace can stop it."""
    def trickle(handler):
        answer(handler, 200, b"x", Content_Length="100000")
        for _ in range(100):
            handler.wfile.write(b"x")
            time.sleep(0.02)
    host.pages["/slow"] = trickle
    fails("not done within 0 s", download, f"{host.url}/slow", tmp_path / "slow", max_seconds=0.2, sleep=naps.append)
    fails("under 1 kB/s", download, f"{host.url}/slow", tmp_path / "b", stall=0.1, tries=2, sleep=naps.append)
    host.pages["/dead"] = lambda handler: (answer(handler, 200, b"x", Content_Length="9"), time.sleep(0.4))
    fails("broke after 1 bytes of 9", download, f"{host.url}/dead", tmp_path / "c", timeout=0.1, tries=1)


def test_bodies_are_bounded_announced_or_not(host, tmp_path):
    host.pages["/a.bin"] = file_page()
    fails("51200 bytes exceed the limit of 1000", download, f"{host.url}/a.bin", tmp_path / "a", max_bytes=1000)
    host.pages["/b.bin"] = lambda handler: answer(handler, 200, BODY, Content_Length=None)
    fails("more than the 1000 bytes allowed", download, f"{host.url}/b.bin", tmp_path / "b", max_bytes=1000)
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_one_sentence(host, tmp_path, monkeypatch):
    host.pages["/a.bin"] = file_page()
    free = module.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: free._replace(free=1000))
    fails("GB of disk where 0.000 GB are free", download, f"{host.url}/a.bin", tmp_path / "a.bin")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: free._replace(free=10**9))

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(module.os, "fsync", full)
    fails("the disk is full", download, f"{host.url}/a.bin", tmp_path / "a.bin")


@pytest.mark.parametrize("url", ["ftp://127.0.0.1/a", "file:///etc/passwd", "a.bin", "", "http://", "http://[::1",
                                 "http://h:99999/"])
def test_only_web_addresses(url, tmp_path):
    fails("not an http or https address", download, url, tmp_path / "a.bin")


def test_bad_arguments_and_places(host, tmp_path):
    fails("64 hex digits", download, f"{host.url}/a", tmp_path / "a", "abc")
    fails("is a folder", download, f"{host.url}/a", tmp_path)
    (tmp_path / "file").write_text("")
    fails("Not a directory|File exists", download, f"{host.url}/a", tmp_path / "file" / "a")
    text = fails("cannot fetch", download, host.url.replace("//", "//me:secret@") + "/none", tmp_path / "a")
    assert "secret" not in text


# ---- redirects and secrets


def test_a_token_stays_with_its_host(host, mirror, tmp_path):
    """Followed on the same host with the token; on another port, and back home from there, without it."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / ".netrc").write_text("machine 127.0.0.1 login a password b\n")     # requests would send this
    host.pages["/start"] = moved("/next", 307)
    host.pages["/next"] = moved(f"{mirror.url}/far")
    mirror.pages["/far"] = moved(f"{host.url}/back")
    host.pages["/back"] = file_page()
    secret = {"Authorization": "Bearer hf_x", "X-Api-Key": "k"}
    assert download(f"{host.url}/start", tmp_path / "a", SHA, headers=secret).read_bytes() == BODY
    assert host.gets("Authorization") == ["Bearer hf_x", "Bearer hf_x", None] and mirror.gets("Authorization") == [None]
    assert host.gets("X-Api-Key") == ["k", "k", None] and mirror.gets("X-Api-Key") == [None]


def test_an_origin_is_scheme_host_and_port():
    """A secret for https://h must not follow a redirect to http://h, nor to another port; :443 is the same place."""
    origin = module.origin("https://h/a")
    assert origin == module.origin("https://H:443/b") == ("https", "h", 443)
    for url in ("http://h/a", "http://h:443/a", "https://h:8443/a", "https://i/a"):
        assert module.origin(url) != origin, url


def test_endless_and_forbidden_redirects(host, tmp_path):
    host.pages["/loop"] = moved("/loop")
    fails("more than 10 redirects", download, f"{host.url}/loop", tmp_path / "a")
    assert len(host.seen) == 11
    host.pages["/file"] = moved("file:///etc/passwd")
    fails("not an http or https address", download, f"{host.url}/file", tmp_path / "a")


# ---- several processes


def test_two_processes_fetch_once(host, tmp_path):
    """The second waits at the lock, then finds the file; a lock file left by a dead process holds nobody up."""
    def slow(handler):
        time.sleep(0.3)
        file_page()(handler)
    host.pages["/a.bin"] = slow
    (tmp_path / "a.bin.lock").write_text("")
    code = "import sys; from tinyvlm.download import download; download(*sys.argv[1:])"
    runs = [subprocess.Popen([sys.executable, "-c", code, f"{host.url}/a.bin", str(tmp_path / "a.bin"), SHA],
                             cwd=Path(module.__file__).parents[1]) for _ in range(2)]
    assert [run.wait(20) for run in runs] == [0, 0]
    assert len(host.seen) == 1 and (tmp_path / "a.bin").read_bytes() == BODY and os.listdir(tmp_path) == ["a.bin"]


def test_a_killed_download_holds_nobody_up(host, tmp_path):
    """kill -9 while it holds the lock: the kernel lets go of it, and the part is continued."""
    release = threading.Event()

    def half(handler):
        answer(handler, 200, BODY[:30_000], ETag='"v1"', Content_Length=str(len(BODY)))
        release.wait(10)
    host.pages["/a.bin"], part = half, tmp_path / "a.bin.incomplete"
    code = "import sys; from tinyvlm.download import download; download(*sys.argv[1:])"
    victim = subprocess.Popen([sys.executable, "-c", code, f"{host.url}/a.bin", str(tmp_path / "a.bin")],
                              cwd=Path(module.__file__).parents[1])
    until = time.monotonic() + 20
    while time.monotonic() < until and not (part.exists() and part.stat().st_size > 8192):
        time.sleep(0.01)
    victim.kill()
    victim.wait()
    release.set()
    kept = part.stat().st_size
    assert kept > 0 and (tmp_path / "a.bin.lock").exists()
    host.pages["/a.bin"] = file_page()
    assert download(f"{host.url}/a.bin", tmp_path / "a.bin").read_bytes() == BODY
    assert host.gets("Range")[-1] == f"bytes={kept}-" and os.listdir(tmp_path) == ["a.bin"]


def test_a_lock_file_removed_by_its_last_owner_is_no_lock(tmp_path, monkeypatch):
    """We open the file, its owner finishes and removes it, we lock what nobody else will ever see: so try again."""
    path, real, calls = tmp_path / "a.lock", os.open, []

    def open_then_lose(name, *args):
        handle = real(name, *args)
        calls.append(name)
        if len(calls) == 1:
            os.unlink(name)
        return handle
    monkeypatch.setattr(module.os, "open", open_then_lose)
    with module.locked(path):
        assert path.exists() and calls == [path, path]
    assert not path.exists()


def test_many_threads_fetch_once(host, tmp_path):
    host.pages["/a.bin"] = file_page()
    threads = [threading.Thread(target=download, args=(f"{host.url}/a.bin", tmp_path / "a.bin")) for _ in range(6)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert len(host.seen) == 1 and os.listdir(tmp_path) == ["a.bin"]


# ---- the hub


@pytest.fixture
def hub(host, mirror, monkeypatch, home):
    """A hub whose repository org/name has a small file in git, a large one on another host, and a short name."""
    monkeypatch.setenv("HF_ENDPOINT", host.url)
    commit = {"X_Repo_Commit": COMMIT}
    small = file_page(b"{}\n", etag=f'W/"{git_sha(b"{}" + bytes([10]))}"', **commit)
    large = moved(f"{mirror.url}/store/1", X_Linked_Etag=f'"{SHA}"', X_Linked_Size=str(len(BODY)), ETag='"no"',
                  **commit)
    mirror.pages["/store/1"] = file_page(etag='"store"')
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
    assert os.readlink(small) == f"../../blobs/{git_sha(small.read_bytes())}"
    assert os.readlink(large) == f"../../../../blobs/{SHA}"
    assert (hub / "refs" / "main").read_text() == COMMIT
    assert sorted(os.listdir(hub)) == ["blobs", "refs", "snapshots"] and len(os.listdir(hub / "blobs")) == 2
    assert len(os.listdir(hub.parent / ".locks" / hub.name)) == 2
    assert all(headers["Accept-Encoding"] == "identity" for _, _, headers in host.seen)


def test_hub_cache_is_used_without_a_request(hub, host, monkeypatch):
    """Cached by branch or by commit; offline flags matter only for what is missing."""
    file = hf_file("org/name", "config.json")
    count = len(host.seen)
    monkeypatch.setenv("HF_HUB_OFFLINE", "yes")
    assert hf_file("org/name", "config.json") == hf_file("org/name", "config.json", COMMIT) == file
    fails("HF_HUB_OFFLINE", hf_file, "org/name", "sub/dir/model.bin")
    assert hf_file("org/name", "sub/dir/model.bin", missing_ok=True) is None
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("TRANSFORMERS_OFFLINE", "1")
    fails("offline|OFFLINE", hf_file, "org/name", "sub/dir/model.bin")
    assert len(host.seen) == count


def test_where_we_say_to_put_a_file_it_is_found(hub, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    text = fails("by hand", hf_file, "org/name", "w.bin", "refs/pr/7")
    place = Path(re.search(r"put the file at (.*) by hand", text)[1])
    place.parent.mkdir(parents=True)
    place.write_bytes(b"w")
    assert hf_file("org/name", "w.bin", "refs/pr/7") == place


@pytest.mark.parametrize("names, root", [
    ({"HF_HUB_CACHE": "a", "HUGGINGFACE_HUB_CACHE": "b"}, "a"), ({"HUGGINGFACE_HUB_CACHE": "b"}, "b"),
    ({"HF_HOME": "c"}, "c/hub"), ({"HF_HOME": "", "XDG_CACHE_HOME": "d"}, "d/huggingface/hub"),
    ({"HF_HOME": ""}, "home/.cache/huggingface/hub")])
def test_cache_root_is_read_from_the_environment_at_each_call(hub, tmp_path, monkeypatch, names, root):
    for name, value in names.items():
        monkeypatch.setenv(name, value and str(tmp_path / value))
    assert hf_file("org/name", "config.json") == tmp_path / root / hub.name / "snapshots" / COMMIT / "config.json"


def test_revisions_and_short_names(hub, host, home):
    """refs/pr/32 travels as one path element, %2F included; gpt2-like names follow the hub's relative redirect."""
    pinned = hf_file("org/name", "config.json", "refs/pr/32")
    assert host.seen[0][1] == "/org/name/resolve/refs%2Fpr%2F32/config.json"
    assert (hub / "refs" / "pr" / ".." / "refs" / "pr" / "32").exists() is False
    assert (hub / "refs" / "refs" / "pr" / "32").read_text() == COMMIT and pinned.parent.name == COMMIT
    assert hf_file("name", "config.json") == home / "hub" / "models--name" / "snapshots" / COMMIT / "config.json"
    hf_file("org/name", "sub/dir/model.bin", COMMIT)
    assert not (hub / "refs" / COMMIT).exists()


@pytest.mark.parametrize("where", ["env", "file", "path"])
def test_hub_token_goes_to_the_hub_only(hub, host, mirror, home, tmp_path, monkeypatch, where):
    if where == "env":
        monkeypatch.setenv("HF_TOKEN", " hf_x\n")
    else:
        file = home / "token" if where == "file" else tmp_path / "elsewhere"
        file.parent.mkdir(exist_ok=True)
        file.write_text("hf_x\n")
        monkeypatch.setenv("HF_TOKEN_PATH", str(file)) if where == "path" else None
    hf_file("org/name", "sub/dir/model.bin")
    assert [h.get("Authorization") for _, _, h in host.seen] == ["Bearer hf_x"] * 2
    assert [h.get("Authorization") for _, _, h in mirror.seen] == [None]


def test_absent_files_are_remembered(hub, host):
    """pretrained.py asks for model.safetensors first; the marker is the one huggingface_hub leaves."""
    assert hf_file("org/name", "none", missing_ok=True) is None
    assert (hub / ".no_exist" / COMMIT / "none").is_file() and (hub / "refs" / "main").read_text() == COMMIT
    count = len(host.seen)
    assert hf_file("org/name", "none", missing_ok=True) is None and len(host.seen) == count
    fails("org/name has no file none at revision main", hf_file, "org/name", "none")


@pytest.mark.parametrize("code, head, match", [
    (401, {}, "gated, private or misspelt.*HF_TOKEN"), (403, {"X_Error_Code": "GatedRepo"}, "gated.*HF_TOKEN"),
    (404, {"X_Error_Code": "RepoNotFound"}, "no repository org/gone"),
    (404, {}, "org/gone has no file f at revision v1"),
    (404, {"X_Error_Code": "RevisionNotFound"}, "org/gone has no revision v1"),
    (429, {"Retry_After": "9"}, "429 Too Many")])
def test_hub_refusals_say_what_to_do(hub, host, naps, code, head, match):
    host.pages["/org/gone/resolve/v1/f"] = send(status=code, **head)
    fails(match, hf_file, "org/gone", "f", "v1", sleep=naps.append, show=False)
    assert naps == ([9] * 4 if code == 429 else [])
    if "no file" not in match:
        fails(match, hf_file, "org/gone", "f", "v1", missing_ok=True, sleep=naps.append, show=False)


def test_hub_content_is_verified(hub, host, mirror):
    """By sha256 for the large file, by git's blob id for the small one; nothing is linked when it is wrong."""
    mirror.pages["/store/1"] = file_page(BODY[::-1])
    fails("expected checksum " + SHA, hf_file, "org/name", "sub/dir/model.bin")
    etag = f'"{git_sha(b"{}" + bytes([10]))}"'
    host.pages["/org/name/resolve/main/config.json"] = file_page(b"[]\n", etag=etag, X_Repo_Commit=COMMIT)
    fails("expected checksum " + git_sha(b"{}\n"), hf_file, "org/name", "config.json")
    assert not (hub / "snapshots").exists() and not (hub / "refs").exists() and os.listdir(hub / "blobs") == []


def test_hub_resumes_a_part_of_huggingface_hub(hub, mirror):
    """Both libraries call it blobs/<etag>.incomplete."""
    (hub / "blobs").mkdir(parents=True)
    (hub / "blobs" / f"{SHA}.incomplete").write_bytes(BODY[:777])
    assert hf_file("org/name", "sub/dir/model.bin").read_bytes() == BODY
    assert mirror.gets("Range") == ["bytes=777-"]


@pytest.mark.parametrize("head", [{}, {"X_Repo_Commit": COMMIT}, {"X_Repo_Commit": COMMIT, "ETag": '"../../../evil"'},
                                  {"X_Repo_Commit": "../../evil", "ETag": '"a"'}])
def test_no_hub_or_a_hostile_one(hub, host, head):
    """A 200 without commit and ETag, or with either leading out of the cache, is refused."""
    host.pages["/org/name/resolve/main/x"] = send(status=200, **head)
    fails("is no hub", hf_file, "org/name", "x")


@pytest.mark.parametrize("repo, file, revision", [
    ("../x", "f", "main"), ("a/b/c", "f", "main"), ("a--b", "f", "main"), ("", "f", "main"), ("a/b", "../f", "main"),
    ("a/b", "/f", "main"), ("a/b", "", "main"), ("a/b", "x/../../f", "main"), ("a/b", "C:f", "main"),
    ("a/b", "..\\f", "main"), ("a/b", "f", "../main"), ("a/b", "f", "")])
def test_names_that_leave_the_cache_are_refused(hub, host, repo, file, revision):
    fails("repository id|plain relative", hf_file, repo, file, revision)
    assert host.seen == []


def test_copy_where_links_fail(hub, monkeypatch):
    """Windows without the privilege for links: the snapshot holds the file itself."""
    def no_links(*args):
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


def test_zip_unpacks_without_litter(tmp_path):
    litter = {"__MACOSX/d/._1.txt": b"x", "d/.DS_Store": b"x"}
    made = make_zip(tmp_path / "a.zip", {"d/": b"", "d/1.txt": b"one", "2.txt": b"two", **litter})
    out = extract_zip(made, tmp_path / "out")
    assert sorted(str(p.relative_to(out)) for p in out.rglob("*")) == ["2.txt", "d", "d/1.txt"]
    assert (out / "d/1.txt").read_bytes() == b"one"
    extract_zip(make_zip(tmp_path / "b.zip", {"d/3.txt": b"three", "2.txt": b"new"}), out)          # into what is there
    assert (out / "d/1.txt").exists() and (out / "d/3.txt").exists() and (out / "2.txt").read_bytes() == b"new"
    assert sorted(os.listdir(tmp_path)) == ["a.zip", "b.zip", "out"]


@pytest.mark.parametrize("name", ["../evil", "/evil", "d/../../evil", "C:\\evil", "..\\evil", "C:evil"])
def test_zip_slips_are_refused(tmp_path, name):
    made = make_zip(tmp_path / "a.zip", {"good": b"x", name: b"evil"})
    fails("outside its folder", extract_zip, made, tmp_path / "in" / "out")
    assert not list(tmp_path.rglob("evil*")) and not (tmp_path / "in" / "out").exists()


def test_zip_links_are_refused(tmp_path):
    made = make_zip(tmp_path / "a.zip", {"link": b"/etc/passwd"}, mode=stat.S_IFLNK | 0o777)
    fails("a link", extract_zip, made, tmp_path / "out")


def test_zip_bombs_are_refused(tmp_path):
    made = make_zip(tmp_path / "a.zip", {"zeros": bytes(100_000), "b": b"x"})
    fails("beyond the limits", extract_zip, made, tmp_path / "out", max_bytes=50_000)
    fails("beyond the limits", extract_zip, made, tmp_path / "out", max_files=1)
    with zipfile.ZipFile(tmp_path / "big.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("z", "w") as file:
            for _ in range(101):
                file.write(bytes(1_000_000))
    fails("beyond the limits", extract_zip, tmp_path / "big.zip", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damaged_zip_leaves_nothing_behind(tmp_path):
    """One flipped bit fails the CRC after other members were written: nothing may look finished."""
    made = make_zip(tmp_path / "a.zip", {"1": b"fine", "2": os.urandom(5000)})
    data = bytearray(made.read_bytes())
    data[2500] ^= 1
    made.write_bytes(data)
    fails("CRC.*delete it and run again", extract_zip, made, tmp_path / "out")
    made.write_bytes(data[:3000])
    assert str(made) in fails("delete it and run again", extract_zip, made, tmp_path / "out")
    assert os.listdir(tmp_path) == ["a.zip"]
    fails("cannot unpack", extract_zip, tmp_path / "none.zip", tmp_path / "out")


def test_interrupted_unpacking_is_not_mistaken_for_done(tmp_path, monkeypatch):
    made = make_zip(tmp_path / "a.zip", {"1": b"one", "2": b"two"})
    (tmp_path / "out.incomplete").mkdir()
    (tmp_path / "out.incomplete" / "old").write_text("of a killed run")
    real, calls = module.shutil.copyfileobj, []

    def second_is_ctrl_c(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(*args)
    with monkeypatch.context() as patch:
        patch.setattr(module.shutil, "copyfileobj", second_is_ctrl_c)
        with pytest.raises(KeyboardInterrupt):
            extract_zip(made, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert sorted(os.listdir(extract_zip(made, tmp_path / "out"))) == ["1", "2"]


def test_progress_is_quiet_in_a_log_and_one_line_on_a_terminal(host, tmp_path, capsys, monkeypatch):
    host.pages["/a.bin"] = file_page()
    download(f"{host.url}/a.bin", tmp_path / "a.bin")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    clock = iter([100.0, 102.0, 104.0])
    monkeypatch.setattr(module, "time", type("Clock", (), {"monotonic": staticmethod(lambda: next(clock))}))
    progress = module._Progress("a.bin", 0, 8_000_000, True)
    progress(2_000_000)
    progress(8_000_000, final=True)
    assert capsys.readouterr().err == ("\ra.bin  2.0 of 8.0 MB  1.0 MB/s  0:06 left\x1b[K"
                                       "\ra.bin  8.0 of 8.0 MB  2.0 MB/s\x1b[K\n")
