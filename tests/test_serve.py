"""The page of `sample.py --serve`, by real requests to a server in a thread."""
import http.client
import json
import re
import threading
from contextlib import contextmanager
from http.server import ThreadingHTTPServer

import pytest
import torch

import public
import sample
import train
from helpers import TEXT, TINY, album, png, refused, run
from tinyvlm.config import UserError
from tinyvlm.image import load_image, preprocess
from tinyvlm.pretrained import load_pretrained, load_run
from tinyvlm.serve import MAX_BYTES, PAGE, make_server
from tinyvlm.use import attention, captions


@contextmanager
def serving(about, act):
    """A server for the `with`, on a free port of 127.0.0.1 -> that port."""
    with make_server(about, act, "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def request(port, method, path, body=b"", **headers):
    """-> status, headers, a response to read from. A header is a keyword: Host="evil.example"."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.putrequest(method, path, skip_host="Host" in headers)
    for name, value in ({"Content_Length": len(body)} | headers).items():
        if value is not None:
            connection.putheader(name.replace("_", "-"), str(value))
    connection.endheaders(body)
    return connection.getresponse()


def ask(port, asked, data=b"", **headers):
    """-> the status and the rows of /ask."""
    line = asked if isinstance(asked, bytes) else json.dumps(asked).encode()
    response = request(port, "POST", "/ask", line + b"\n" + data, **headers)
    return response.status, [json.loads(row) for row in response.read().splitlines()]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny models of the three kinds that the page is for, and some pictures."""
    folder = tmp_path_factory.mktemp("serve")
    public.tiny_vit_gpt2(folder / "caption")
    public.tiny_clip(folder / "clip")
    run(train, *TINY, *TEXT, "--task", "vqa", "--turns", "2", "--max-tokens", "400", "--epochs", "0.3", "--out-dir",
        folder / "vqa")
    album(folder / "photos", n=5, captions=False)
    (folder / "a.png").write_bytes(png(7))
    return folder


@pytest.fixture
def opened(folders, request, tmp_path):
    """What --serve makes of one of them -> its folder, port, run and config."""
    kind = getattr(request, "param", "caption")
    which = {"out_dir": str(folders / kind)} if kind == "vqa" else {
        "pretrained": str(folders / kind), "out_dir": str(tmp_path)}
    config = sample.SampleConfig(**which, **({"images": str(folders / "photos")} if kind == "clip" else {}))
    run = load_run(config.out_dir) if kind == "vqa" else load_pretrained(config.pretrained)
    about, act = sample.page(run, config)
    with serving(about, act) as port:
        assert json.loads(request_text(port, "/about")) == json.loads(json.dumps(about))
        yield folders, port, run, config


def request_text(port, path):
    return request(port, "GET", path).read().decode()


def shown(capsys, *argv):
    """What sample.py prints, as rows."""
    capsys.readouterr()
    run(sample, "--json", *argv)
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_the_page_asks_for_nothing_from_elsewhere(opened):
    _, port, *_ = opened
    response = request(port, "GET", "/")
    assert response.status == 200 and response.read() == PAGE.read_bytes()
    assert "default-src 'none'" in response.getheader("Content-Security-Policy")
    assert not re.search(r"https?:|src=\"|@import", PAGE.read_text())


@pytest.mark.parametrize("asked, flags", [
    ({}, []), ({"num_beams": 3, "top_p": 0.5}, ["--num-beams", "3"]), ({"prompt": ["a dog"]}, ["--prompt", "a dog"]),
    ({"temperature": 0, "num_beams": 1}, [])])
def test_a_caption_grows_and_ends_as_in_the_terminal(opened, capsys, asked, flags):
    folder, port, *_ = opened
    status, rows = ask(port, asked, png(7))
    *texts, last = rows
    expected, = shown(capsys, "--image", folder / "a.png", "--pretrained", folder / "caption", *flags)
    assert status == 200 and last["caption"] == expected["caption"]
    assert [word for word, _ in last["words"]] == last["caption"].split()
    texts = [row["text"] for row in texts]
    assert len(texts) > 1 or "num_beams" in asked and asked["num_beams"] > 1      # beams are chosen at the end
    assert all(after.startswith(before) for before, after in zip(texts, [*texts[1:], last["caption"]]))


def test_draws_differ_and_may_be_limited_to_the_likeliest(opened):
    """top_p of next to nothing leaves the likeliest word: a draw is then the greedy caption; else they differ."""
    _, port, *_ = opened
    says = {how: {ask(port, {"temperature": 2, "top_p": how, "num_beams": 4}, png(7))[1][-1]["caption"]
                  for _ in range(4)} for how in (0.05, 1)}
    assert len(says[1]) > 1 and len(says[0.05]) <= len(says[1])


def test_each_word_has_its_attention(opened):
    """The weights are the mean, over a word's tokens, of the last block's; with the class token's they sum to 1."""
    folder, port, run, config = opened
    words = ask(port, {"prompt": ["a dog runs"]}, png(7))[1][-1]["words"]
    img = preprocess(load_image(png(7)), run.recipe)[None]                        # (1, 3, 32, 32)
    config.prompt = ["a dog runs"]
    ids, = captions(run, config, img, None)
    weights = attention(run, img, ids)                                            # (T, 17)
    assert weights.shape == (len(ids), 17) and torch.allclose(weights.sum(dim=1), torch.ones(len(ids)), atol=1e-5)
    assert [run.tokenizer.decode([i]) for i in ids[:3]] == ["a", " dog", " "]     # "runs" is spelled by letters
    assert all(len(light) == 16 for _, light in words) and words[2][0].startswith("runs")
    for (_, light), tokens in zip(words, ([0], [1, 2])):        # a space by itself counts with the word before it
        torch.testing.assert_close(torch.tensor(light), weights[tokens, 1:].mean(dim=0), atol=1e-5, rtol=0)
    assert not run.model.text.blocks[-1].cross.keep_weights                       # the slow way, only while drawing


@pytest.mark.parametrize("opened", ["vqa"], indirect=True)
def test_a_dialogue(opened, capsys):
    """The first answer is the terminal's. The next question is read with the turn before, as the run has learned two at
    a time; the third one without the first."""
    folder, port, *_ = opened
    argv = ["--image", folder / "a.png", "--out-dir", folder / "vqa", "--prompt"]
    expected, = shown(capsys, *argv, "Is it red?")
    answer = ask(port, {"prompt": ["Is it red?"]}, png(7))[1][-1]["answer"]
    assert answer == expected["answer"]
    dialogue = ["What?", "no idea", "Is it red?", answer, "Why?"]
    assert ask(port, {"prompt": dialogue}, png(7)) == ask(port, {"prompt": dialogue[2:]}, png(7))
    status, rows = ask(port, {"prompt": dialogue[:2]}, png(7))
    assert status == 400 and "no question" in rows[0]["error"]
    assert "shorten" in ask(port, {"prompt": ["why " * 500]}, png(7))[1][0]["error"]


@pytest.mark.parametrize("opened", ["clip"], indirect=True)
def test_labels_and_search(opened, capsys, tmp_path):
    folder, port, _, config = opened
    argv = ["--pretrained", folder / "clip", "--out-dir", config.out_dir]
    labels = ask(port, {"labels": ["a dog", "a cat", "a dog"]}, png(7))[1][0]["labels"]
    expected, = shown(capsys, *argv, "--image", folder / "a.png", "--labels", "a dog", "a cat")
    assert labels == pytest.approx(expected["labels"]) and sum(labels.values()) == pytest.approx(1)
    hits = ask(port, {"search": "a dog"})[1][0]["hits"]
    expected = shown(capsys, *argv, "--search", "a dog", "--images", folder / "photos", "--sheet", tmp_path / "s.png")
    assert [(hit["image"], hit["score"]) for hit in hits] == [(hit["image"], hit["score"]) for hit in expected] != []
    assert all(hit["picture"].startswith("data:image/jpeg;base64,") for hit in hits)
    (tmp_path / "secret").write_text("one\ntwo\n")              # a file of labels is for the command line only
    status, rows = ask(port, {"labels": [str(tmp_path / "secret")]}, png(7))
    assert status == 400 and "neither two labels" in rows[0]["error"]


@pytest.mark.parametrize("status, words, headers", [
    (403, "not served as 'evil.example'", {"Host": "evil.example"}), (403, "not served as", {"Host": ""}),
    (403, "not served as", {"Host": "127.0.0.1.evil.example"}), (403, "not served as", {"Host": "evil.example:80"}),
    (403, "another site", {"Origin": "http://evil.example"}), (403, "another site", {"Origin": "null"}),
    (403, "another site", {"Origin": "http://localhost:1"}), (200, "", {"Host": "localhost"}),
    (200, "", {"Host": "[::1]:8000", "Origin": "http://[::1]:8000"}), (200, "", {"Host": "192.168.0.7:8000"})])
@pytest.mark.parametrize("method, path", [("GET", "/"), ("GET", "/about"), ("POST", "/ask")])
def test_other_sites_are_refused(method, path, status, words, headers):
    """A page of another site carries its Origin; a name that was led to 127.0.0.1 is in Host ("DNS rebinding")."""
    done = []
    with serving({}, lambda asked, data, send: (done.append(asked), send({}))) as port:
        response = request(port, method, path, b"{}\n", **headers)
        assert response.status == status and words in response.read().decode()
        assert len(done) == (status == 200 and method == "POST")


@pytest.mark.parametrize("status, words, asked, data, headers", [
    (413, f"more than {MAX_BYTES // 10 ** 6} MB", {}, b"", {"Content_Length": MAX_BYTES + 1}),
    (413, "more than", {}, b"", {"Content_Length": "9" * 15}), (411, "its length", {}, b"", {"Content_Length": "-1"}),
    (411, "its length", {}, b"", {"Content_Length": None}), (400, "a line of JSON", b"[" * 9999, b"", {}),
    (400, "a line of JSON", b"[]", b"", {}), (400, "a line of JSON", b"\xff", b"", {}),
    (400, "the picture is no image of a kind", {}, b"broken", {}),
    (400, "the picture is no image of a kind", {}, b"", {}),
    (400, "the picture cannot be opened", {}, png(7)[:60], {}), (400, "'num_beams'", {"num_beams": 99}, png(7), {}),
    (400, "'temperature'", {"temperature": float("nan")}, png(7), {}), (400, "'top_p'", {"top_p": "1"}, png(7), {}),
    (400, "'prompt'", {"prompt": [1]}, png(7), {}), (400, "'out_dir'", {"out_dir": "/etc"}, png(7), {}),
    (400, "one way", {"prompt": ["a", "b"]}, png(7), {}), (400, "shorten it", {"prompt": ["a," * 99]}, png(7), {})])
def test_what_is_wrong_is_a_sentence(opened, status, words, asked, data, headers):
    _, port, *_ = opened
    assert (answer := ask(port, asked, data, **headers))[0] == status
    assert words in answer[1][0]["error"] and len(answer[1][0]["error"]) <= 300
    assert ask(port, {}, png(7))[0] == 200                      # and the server goes on


def test_unknown_paths_and_methods(opened):
    _, port, *_ = opened
    for method, path, status in (("GET", "/../sample.py", 404), ("GET", "/page.html", 404), ("POST", "/", 404),
                                 ("PUT", "/ask", 501)):
        assert request(port, method, path).status == status


def test_a_bug_is_a_sentence_and_the_server_lives_on(capfd):
    """Before anything was sent it is the status, too; afterwards the last row. The traceback is for the terminal."""
    def act(asked, data, send):
        if asked:
            send({"text": "a"})
        raise {"mine": UserError("mine"), "large": MemoryError()}.get(min(asked, default=""), KeyError("secret"))
    with serving({}, act) as port:
        for asked, status, n, words in (({}, 500, 1, "a mistake in the program"), ({"x": 1}, 200, 2, "a mistake"),
                                        ({"mine": 1}, 200, 2, "mine"), ({"large": 1}, 200, 2, "memory ran out")):
            answer = ask(port, asked)
            assert answer[0] == status and len(answer[1]) == n and words in answer[1][-1]["error"]
            assert "secret" not in str(answer)
    assert "KeyError: 'secret'" in capfd.readouterr().err


def test_rows_are_sent_as_they_are_made_to_one_at_a_time():
    """The first row is read while its request still runs; meanwhile a second request waits, and GET does not."""
    inside, go, seen = [], threading.Event(), []

    def act(asked, data, send):
        inside.append(asked["n"])
        send({"text": "first"})
        go.wait(30)
        seen.append((asked["n"], [*inside]))
        send({"data": data.decode()})
        inside.remove(asked["n"])
    with serving({"task": "x"}, act) as port:
        response = request(port, "POST", "/ask", b'{"n": 1}\na\nb')
        assert response.readline() == b'{"text": "first"}\n'
        rest = []
        second = threading.Thread(target=lambda: rest.append(ask(port, {"n": 2}, b"two")))
        second.start()
        assert json.loads(request_text(port, "/about")) == {"task": "x"} and not seen
        go.set()
        assert response.read() == b'{"data": "a\\nb"}\n'
        second.join(30)
        assert rest == [(200, [{"text": "first"}, {"data": "two"}])] and seen == [(1, [1]), (2, [2])]


def test_a_page_that_is_closed_ends_its_request(capfd):
    ended = threading.Event()

    def act(asked, data, send):
        try:
            while True:
                send({"text": "x" * 10_000})
                if not asked:
                    return
        finally:
            ended.set()
    with serving({}, act) as port:
        response = request(port, "POST", "/ask", b'{"n": 1}\n')
        response.readline()
        response.close()
        assert ended.wait(30) and ask(port, {})[0] == 200
    assert "Traceback" not in capfd.readouterr().err


def test_the_command(folders, tmp_path, capsys, monkeypatch):
    """It prints the address, warns where others can connect, ends with Ctrl-C, and refuses what is for the terminal."""
    argv = [sample, "--serve", "--pretrained", folders / "caption", "--out-dir", tmp_path, "--port"]

    def interrupt(server):
        raise KeyboardInterrupt
    monkeypatch.setattr(ThreadingHTTPServer, "serve_forever", interrupt)
    for host, warned in (("127.0.0.1", False), ("0.0.0.0", True)):
        run(*argv, "0", "--host", host)
        out, err = capsys.readouterr()
        assert re.search(rf"http://{host}:\d+ ", out) and ("warning: --host" in err) == warned
    with make_server({}, None, "127.0.0.1", 0) as other:
        refused(capsys, f"no page can be at 127.0.0.1, port {other.server_port}", *argv, other.server_port)
    refused(capsys, "--image is for the terminal", *argv, "0", "--image", folders / "a.png")
    refused(capsys, "--images are for clip", *argv, "0", "--images", folders / "photos")
