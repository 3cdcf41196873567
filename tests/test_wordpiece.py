"""tinyvlm/wordpiece.py: worked examples; what the `tokenizers` library answers is compared in test_tokenizer.py."""
import json

import pytest

from tinyvlm.config import UserError
from tinyvlm.tokenizer import SPECIAL_TOKENS, WordPieceTokenizer, WordTokenizer, load_tokenizer


@pytest.fixture
def bert(tmp_path):
    tokens = "[PAD] [UNK] [CLS] [SEP] [MASK] un ##aff ##able a cafe dog ##s ! - t shirt $ 的 < > sos ' ## <x>".split()
    (tmp_path / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    return WordPieceTokenizer.load(tmp_path)


def test_wordpiece_by_hand(bert):
    """Longest prefix first, ## continuations, punctuation apart, accents and case off, CJK alone, over 100 is [UNK]."""
    def tokens(text, encode=bert.encode):
        return [bert.id_to_token(i) for i in encode(text)]
    assert tokens("Unaffable dogs!") == ["un", "##aff", "##able", "dog", "##s", "!"]
    assert tokens("CAFÉ Cafe\u0301 a\x00\u200d\ufffd的dog") == ["cafe", "cafe", "a", "的", "dog"]
    assert tokens("T-shirt$ unaffx") == ["t", "-", "shirt", "$", "[UNK]"]
    assert tokens("a" * 101) == ["[UNK]"] and tokens("") == [] and tokens(" \n\u3000") == []
    assert tokens("[MASK]a") == ["[MASK]", "a"] and tokens("[MASK]", bert.encode_plain) == ["[UNK]"] * 3
    assert bert.decode([*bert.encode("Unaffable dogs!"), 999]) == "unaffable dogs !"
    assert bert.unk_id == 1 and bert.special_ids == [0, 1, 2, 3, 4] and bert.frame_ids == ([], [])


def test_added_tokens_survive_a_round_trip(bert, tmp_path):
    """<SOS> must be found before lower-casing and punctuation splitting would turn it into < sos >."""
    size = bert.vocab_size
    assert bert.encode("<SOS>") == bert.encode("< sos >")
    bert.add_special_tokens(["<SOS>", "<EOS>"])
    bert.save(tmp_path / "new" / "tokenizer.json")
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<SOS>": size, "<EOS>": size + 1}), encoding="utf-8")
    for tokenizer in (bert, load_tokenizer(tmp_path / "new"), WordPieceTokenizer.load(tmp_path)):
        assert tokenizer.vocab_size == size + 2
        assert tokenizer.encode("<SOS>a<EOS>") == [size, bert.token_to_id("a"), size + 1]


@pytest.mark.parametrize("config, name", [
    ({"do_lower_case": False}, "do_lower_case"), ({"strip_accents": False}, "strip_accents"), ([], "not a JSON object"),
    ({"tokenize_chinese_chars": False}, "tokenize_chinese"), ({"tokenizer_class": "AlbertTokenizer"}, "Albert"),
    ({"do_basic_tokenize": False}, "do_basic_tokenize")])
def test_a_cased_vocab_txt_is_refused(config, name, bert, tmp_path):
    """Its folder says so beside the vocabulary. Lower-casing would quietly give other ids than its model learned."""
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({"do_lower_case": True, "strip_accents": None}), encoding="utf-8")
    assert WordPieceTokenizer.load(tmp_path).encode("A") == bert.encode("a")
    path.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UserError, match=name):
        load_tokenizer(tmp_path)


def test_cleanup_takes_spaces_before_punctuation_out(bert, tmp_path):
    """The `cleanup` of the file's decoder, which BERT's own tokenizer.json asks for."""
    ids = bert.encode("a dogs' - a dog!")
    assert bert.decode(ids) == "a dogs ' - a dog !"
    bert.save(path := tmp_path / "tokenizer.json")
    spec = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(spec | {"decoder": spec["decoder"] | {"cleanup": True}}), encoding="utf-8")
    assert load_tokenizer(path).decode(ids) == "a dogs ' - a dog!"
    for other in (spec["decoder"] | {"prefix": "@@"}, {"type": "ByteLevel"}):     # was read as if it were this one
        path.write_text(json.dumps(spec | {"decoder": other}), encoding="utf-8")
        with pytest.raises(UserError, match="decoder"):
            load_tokenizer(path)


def test_words_are_the_common_ones(tmp_path):
    """Commonest first, ties by spelling, whatever the order of the texts; the rest is <unk>; saved and loaded alike."""
    texts = ["a dog", "the cat", "a cat", "a\x1cb dog"]
    words = WordTokenizer.train(texts, min_count=2)
    assert [words.id_to_token(i) for i in range(words.vocab_size)] == ["<unk>", "a", "cat", "dog", *SPECIAL_TOKENS]
    words.save(tmp_path / "words")
    for tokenizer in (words, WordTokenizer.train(texts[::-1], 2), load_tokenizer(tmp_path / "words")):
        assert tokenizer.encode("a bird\n<image>a\x1cb dog") == [1, 0, 5, 0, 3], "\\x1c is no white space"
        assert tokenizer.unk_id == 0 and tokenizer.special_ids == [0, 4, 5, 6, 7, 8]
    assert words.decode([1, 0, 99, 3]) == "a <unk> dog"
    with pytest.raises(UserError, match="no word occurs 9 times"):
        WordTokenizer.train(texts, min_count=9)
    spec = json.loads((tmp_path / "words" / "tokenizer.json").read_text(encoding="utf-8"))
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        (tmp_path / "odd.json").write_text(json.dumps(spec | {part: {"type": "Whitespace"}}), encoding="utf-8")
        with pytest.raises(UserError, match=part):
            load_tokenizer(tmp_path / "odd.json")


def test_a_caption_that_spells_a_special_token_does_not_get_it(tmp_path):
    """Captions with <image> or the end token in them once taught the model to stop, or to expect an image, there."""
    words = WordTokenizer.train(["a <image> <|endoftext|> <unk>"] * 3, 1)
    assert words.token_to_id("<unk>") == 0 and words.encode("a <image>") == [1, 3]
    assert words.encode_plain("a <image> a<image> <|endoftext|>") == [1, 0, 0, 0]
    words.add_special_tokens(["a"])             # a word that becomes a special token is a word no more
    assert words.encode("a") == [1] and words.encode_plain("a") == [0]
