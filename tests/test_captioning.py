"""Captions scored: which words the loss was taken on."""
from types import SimpleNamespace

import pytest

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
