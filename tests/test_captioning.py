"""Captions scored: which words the loss was taken on, and what is refused before it misleads."""
from types import SimpleNamespace

import pytest

import data
import train
from helpers import TINY, album, run
from tinyvlm.captioning import scored_words
from tinyvlm.captions import clean_caption


class Letters:
    unk_id = 26

    def encode_plain(self, text):
        return [ord(c) - 96 for c in text if c != " "]


@pytest.mark.parametrize("text, longest, words", [
    ("ab cd", 9, 2), ("ab cd", 2, 2 * 2 / 5), ("az", 9, 2 / 3), ("", 9, 0)])
def test_nats_per_word_count_the_words_that_were_scored(text, longest, words):
    """Whole; cut after 2 of 4 letters, without its end; one of two letters unknown. All words once counted, so that a
    run on captions cut to one token looked ten times better."""
    prepared = SimpleNamespace(tokenizer=Letters(), meta={"max_tokens": longest})
    assert scored_words(text, prepared) == pytest.approx(words)


@pytest.mark.parametrize("how", ["lower", "words"])
def test_one_word_has_one_spelling(how):
    assert {clean_caption(f"Don{mark}t", how) for mark in "'\u2019\u02bc\uff07`"} == {"don't"}
    assert clean_caption("e\u0301te\u0301", how) == clean_caption("\u00e9t\u00e9", how)


def test_pictures_are_not_taken_for_drawn_scenes(tmp_path, capsys):
    """--data-dir without --dataset trained on drawn scenes, whatever the folder held."""
    for script in (data, train):
        run(script, "--data-dir", album(tmp_path / script.__name__), code=2)
        assert "say what it holds with --dataset" in capsys.readouterr().err


def test_recall_among_one_image_is_no_result(tmp_path, capsys):
    """It was 100%, and decided which checkpoint is kept."""
    run(train, *TINY, "--task", "clip", "--n-scenes", "16", "--out-dir", tmp_path / "r", code=2)
    assert "recall needs two" in capsys.readouterr().err
