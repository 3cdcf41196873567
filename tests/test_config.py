"""The command line made from a dataclass, and how a script ends."""
import io
import sys
from dataclasses import dataclass

import pytest

from tinyvlm.config import UserError, option, parse_config, peek, run_script


@dataclass
class Options:
    lr: float = option(1e-3, "rate, 100% yours", above=0, below=1, group="numbers")
    n_layer: int = option(2, "layers", least=1)
    fast: bool = option(True, "hurry")
    compile: bool | None = option(None, "maybe")
    top_k: int | None = option(None, "limit")
    image: list[str] = option([], "files", group="names")
    model: str = option("cross", "which", choices=("cross", "prefix"))
    out_dir: str | None = option("out", "folder")


def parse(*argv):
    return parse_config(Options, list(argv), {"big": {"n_layer": 9, "fast": False}})


def test_defaults_presets_flags_in_that_order_of_authority():
    assert parse() == Options() and parse().image is not parse().image            # no list shared between configs
    assert parse("--preset", "big") == Options(n_layer=9, fast=False)
    assert parse("--preset", "big", "--n-layer", "3", "--fast").n_layer == 3
    same = parse("--n-layer", "2", "--preset", "big")                             # given, even if equal to the default
    assert same.n_layer == 2 and same.given == {"n_layer"}
    assert parse_config(Options, [], {"big": {"n_layer": 9}}, default_preset="big").n_layer == 9
    with pytest.raises(AssertionError, match="preset x sets fields that do not exist: .'depth'."):
        parse_config(Options, [], {"x": {"depth": 1}})


def test_every_kind_of_field():
    config = parse("--lr", "0.5", "--no-fast", "--compile", "--top-k", "7", "--image", "a.jpg", "b c.jpg",
                   "--model", "prefix", "--out-dir=-odd")
    assert config == Options(0.5, 2, False, True, 7, ["a.jpg", "b c.jpg"], "prefix", "-odd")
    assert parse("--no-compile").compile is False and parse().compile is None


@pytest.mark.parametrize("argv, words", [
    (["--n-layers", "3"], "did you mean --n-layer?"), (["--n-layer", "x"], "invalid int"), (["--model", "x"], "cross"),
    (["--preset", "huge"], "big"), (["--n-lay", "3"], "unrecognized"), (["stray"], "unrecognized"),
    (["--fast", "False"], "False"), (["--lr"], "expected one"), (["--lr", "0"], "--lr must be above 0, not 0"),
    (["--lr", "1"], "--lr must be below 1"), (["--n-layer", "0"], "--n-layer must be at least 1"),
    (["--lr", "nan"], "ordinary number"), (["--top-k", "1" * 20], "ordinary number"),
    (["--out-dir", ""], "--out-dir was given an empty value"), (["--image", "a", ""], "--image was given an empty")])
def test_mistakes_are_one_sentence(argv, words):
    with pytest.raises(UserError) as error:
        parse(*argv)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_help_lists_every_flag_with_its_default_under_its_heading(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    wanted = ("--preset", "numbers:", "--lr LR rate, 100% yours [0.001]", "--no-fast", "--top-k TOP_K limit", "names:")
    places = [text.index(words) for words in (*wanted, "--image IMAGE", "--model {cross,prefix}")]
    assert stop.value.code == 0 and places == sorted(places)


def test_peek_finds_what_the_whole_line_will_mean():
    argv = ["--task", "clip", "--out-dir=a=b", "--resume", "--stem", "--vision=", "--task", "vqa"]
    assert [peek(argv, name, "none") for name in ("task", "out_dir", "resume", "stem", "vision", "text")] == [
        "vqa", "a=b", True, True, "", "none"]


@pytest.mark.parametrize("error, code, words", [
    (UserError("no such dog"), 2, "error: no such dog\n"), (KeyboardInterrupt(), 130, ""),
    (OSError(28, "No space left", "/x/y"), 2, "cannot use /x/y: No space left; free some space"),
    (OSError(24, "Too many open files", "/x/y"), 2, "Too many open files; raise ulimit -n"),
    *((bad, 2, "memory ran out") for bad in (
        MemoryError(), OSError(12, "Cannot allocate memory"), RuntimeError("CUDA out of memory. Tried to allocate 2"),
        RuntimeError("CPUAllocator: you tried to allocate 4e12 bytes"), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")))])
def test_run_script_ends_with_a_sentence_and_a_code(error, code, words, capsys):
    def main():
        raise error
    with pytest.raises(SystemExit) as stop:
        run_script(main)
    assert stop.value.code == code and words in capsys.readouterr().err


@pytest.mark.parametrize("words", ["Connection closed by peer", "connectFullMesh failed: Connection refused"])
def test_a_neighbour_that_has_ended_is_no_bug_of_ours(words, capsys, monkeypatch):
    """In the middle of a step, or before the processes had met."""
    monkeypatch.setenv("RANK", "1")
    test_run_script_ends_with_a_sentence_and_a_code(RuntimeError(words), 2, "error: another process of this", capsys)


@pytest.mark.parametrize("bug", [ZeroDivisionError(), RuntimeError("cannot share"), RuntimeError("reset by peer")])
def test_run_script_does_not_hide_our_bugs(bug):
    def main():
        raise bug
    with pytest.raises(type(bug)):
        run_script(main)


def test_names_are_printed_as_the_bytes_they_are(monkeypatch):
    """A folder that is not UTF-8, so that a printed command works; what a console has no bytes for is escaped."""
    for encoding, name, wanted in (("utf-8", "\udce9", b"\xe9 \xe2\x82\xac"), ("latin-1", "\xe9", b"\xe9 \\u20ac")):
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
        run_script(lambda: print(f"{name} \u20ac", end="", flush=True))
        assert sys.stdout.buffer.getvalue() == wanted
