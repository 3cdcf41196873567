"""The command line made from a dataclass."""
from dataclasses import dataclass

import pytest

from tinyvlm.config import UserError, option, out_of_memory, parse_config, run_script


@dataclass
class Options:
    lr: float = option(1e-3, "rate, 100% yours")
    n_layer: int = option(2, "layers")
    fast: bool = option(True, "hurry")
    compile: bool | None = option(None, "maybe")
    top_k: int | None = option(None, "limit")
    image: list[str] = option([], "files")
    model: str = option("cross", "which", choices=("cross", "prefix"))


PRESETS = {"big": {"n_layer": 9, "fast": False}}


def parse(*argv):
    return parse_config(Options, list(argv), PRESETS)


def test_defaults_presets_flags_in_that_order_of_authority():
    assert parse() == Options()
    assert parse("--preset", "big") == Options(n_layer=9, fast=False)
    assert parse("--preset", "big", "--n-layer", "3", "--fast").n_layer == 3
    assert parse("--n-layer", "2", "--preset", "big").n_layer == 2                # given, even if equal to the default


def test_every_kind_of_field():
    config = parse("--lr", "0.5", "--no-fast", "--compile", "--top-k", "7", "--image", "a.jpg", "b c.jpg",
                   "--model", "prefix")
    assert config == Options(0.5, 2, False, True, 7, ["a.jpg", "b c.jpg"], "prefix")
    assert parse("--no-compile").compile is False and parse().compile is None
    assert parse().image is not parse().image                                     # no list shared between configs


@pytest.mark.parametrize("argv, words", [
    (["--n-layers", "3"], "did you mean --n-layer?"), (["--n-layer", "x"], "invalid int"),
    (["--model", "rnn"], "cross"), (["--preset", "huge"], "big"), (["--n-lay", "3"], "unrecognized"),
    (["stray"], "unrecognized"), (["--fast", "False"], "False"), (["--lr"], "expected one argument")])
def test_mistakes_are_one_sentence(argv, words):
    with pytest.raises(UserError, match=words.replace("?", r"\?")) as error:
        parse(*argv)
    assert "\n" not in str(error.value)


def test_help_lists_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    assert all(s in text for s in ("--no-fast", "100% yours [0.001]", "--top-k TOP_K limit", "--preset"))


def test_a_preset_of_a_field_that_does_not_exist_is_our_own_bug():
    with pytest.raises(AssertionError, match="preset x sets fields that do not exist: .'depth'."):
        parse_config(Options, [], {"x": {"depth": 1}})


@pytest.mark.parametrize("error, code, words", [
    (UserError("no such dog"), 2, "error: no such dog\n"),
    (OSError(28, "No space left on device", "/x/y"), 2, "cannot use /x/y"), (KeyboardInterrupt(), 130, ""),
    (MemoryError(), 2, "memory ran out"),
    (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), 2, "memory ran out"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4e12 bytes"), 2, "memory ran")])
def test_run_script_ends_with_a_sentence_and_a_code(error, code, words, capsys):
    def main():
        raise error
    with pytest.raises(SystemExit) as stop:
        run_script(main)
    assert stop.value.code == code and words in capsys.readouterr().err


def test_run_script_does_not_hide_our_bugs():
    for bug in (ZeroDivisionError(), RuntimeError("size mismatch")):
        def main(bug=bug):
            raise bug
        with pytest.raises(type(bug)):
            run_script(main)


def test_a_machine_without_memory_says_so_however_it_is_said():
    assert all(map(out_of_memory, (MemoryError(), OSError(12, "Cannot allocate memory"),
                                   RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"))))
    others = OSError(28, "No space left"), RuntimeError("unable to allocate shared memory"), ValueError("no memory")
    assert not any(map(out_of_memory, others))
