"""tinyvlm/tokenizer.py and vocab.py: worked examples, identities, and answers of the `tokenizers` library in a file.

reference_tokenizer.json is made by make_reference_tokenizer.py from a corpus of our own; the library is not needed.
"""
import json
import random
from pathlib import Path

import pytest

from tinyvlm.config import UserError
from tinyvlm.tokenizer import (GPT2_WORDS, GPT2_WORDS_ASCII, SPECIAL_TOKENS, BPETokenizer, WordPieceTokenizer,
                               apply_merges, learn_merges, load_tokenizer, naive_encode, naive_merges)

REFERENCE = json.loads(Path(__file__).with_name("reference_tokenizer.json").read_text(encoding="utf-8"))
CORPUS, TEXTS, CASES = REFERENCE["corpus"], REFERENCE["texts"], REFERENCE["cases"]
ADDED = {"id": 400, "content": "<mask>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True}


def spec_of(case):
    return REFERENCE["base"] | CASES[case]["changes"]


def write(path, spec):
    path.write_text(json.dumps(spec), encoding="utf-8")
    return path


def write_vocab(folder, whole=False, **beside):
    """GPT-2's older layout: vocab.json (320 is <|endoftext|>), merges.txt and small files beside them; whole: the same
    as a tokenizer.json."""
    model = REFERENCE["base"]["model"]
    write(folder / "vocab.json", model["vocab"] | {"<|endoftext|>": 320})
    lines = [" ".join(pair) for pair in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *lines, ""]), encoding="utf-8")
    if whole:
        load_tokenizer(folder).save(folder)
    for name, content in beside.items():
        write(folder / f"{name}.json", content)
    return folder


@pytest.fixture
def tok():
    return BPETokenizer.train(CORPUS, 320)


@pytest.mark.parametrize("case", CASES)
def test_encodes_as_the_tokenizers_library_does(case, tmp_path):
    """Every kind we read, on captions, tags, accents, CJK, emoji, control characters and long words; saved, too."""
    first = load_tokenizer(write(tmp_path / "first.json", spec_of(case)))
    first.add_special_tokens(["<new>"])
    first.save(tmp_path / "run")
    again = load_tokenizer(tmp_path / "run")
    for tokenizer in (first, again):
        for text, ids, plain in zip(TEXTS, CASES[case]["ids"], CASES[case]["plain"], strict=True):
            assert tokenizer.encode(text) == ids, f"{case}: {text!r}"
            assert tokenizer.encode_plain(text) == plain, f"{case}: {text!r}"
    saved = json.loads((tmp_path / "run" / "tokenizer.json").read_text(encoding="utf-8"))
    assert {key: saved[key] for key in saved if key != "added_tokens"}.items() <= spec_of(case).items()
    assert type(again) is type(first) and again.vocab_size == first.vocab_size == again.special_ids[-1] + 1
    assert again.encode("a<new>") == first.encode("a<new>") and first.encode("") == sum(first.frame_ids, [])


def test_trainer_learns_the_merges_of_the_rust_trainer(tmp_path):
    """The library learned 64 merges from the same corpus: ours must be the same, ties included."""
    BPETokenizer.train(CORPUS[::-1], 320, special_tokens=()).save(tmp_path)        # nor does the order of texts matter
    saved = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    theirs = REFERENCE["base"]["model"]
    assert [tuple(m.split(" ")) for m in saved["merges"]] == [tuple(m) for m in theirs["merges"]]
    assert saved["vocab"] == theirs["vocab"]


def test_merges_by_hand():
    """hug x10, pug x5, hugs x5: (u, g) is seen 20 times, then (h, ug) 15 times; then ties go to the lowest ids."""
    words = {"hug": 10, "pug": 5, "hugs": 5}
    vocab, merges = learn_merges(words, 258)
    assert merges == [("u", "g"), ("h", "ug")] == naive_merges(words, 2) and vocab["hug"] == 257
    assert naive_encode("hugs", merges) == ["hug", "s"] and naive_encode("mug", merges) == ["m", "ug"]
    assert apply_merges([*"hugs"], {("u", "g"): 0, ("h", "ug"): 1}) == ["hug", "s"]
    assert learn_merges({"ab": 1, "cd": 1, "xa": 1}, 257)[1] == [("a", "b")], "of pairs seen equally often, the lowest"


def test_the_fast_way_is_the_naive_way():
    """Words of few letters have overlaps ("aaa") and ties; with shuffled merges early ones may come up late."""
    rng = random.Random(1)
    words = {"".join(rng.choices("abc", k=rng.randint(1, 12))): rng.randint(1, 5) for _ in range(150)}
    merges = learn_merges(words, 256 + 80)[1]
    assert merges == naive_merges(words, 80) and len(merges) == 80
    for merges in (merges, rng.sample(merges, 80)):
        ranks = {pair: rank for rank, pair in enumerate(merges)}
        for _ in range(200):
            word = "".join(rng.choices("abcd", k=rng.randint(1, 30)))
            assert apply_merges([*word], ranks) == naive_encode(word, merges)


def test_one_long_word_without_spaces_is_not_quadratic(tok):
    """8 times the length makes about 8 times the look-ups of merges, where a plain loop makes 64 times (no clock)."""
    class Counting(dict):
        def __contains__(self, pair):
            counts.append(pair)
            return super().__contains__(pair)

    lookups, counts, tok._ranks = [], [], Counting(tok._ranks)
    for length in (100, 800):
        counts.clear()
        tok.encode("thedog" * length)
        lookups.append(len(counts))
    assert 0 < lookups[1] < 8.5 * lookups[0]


def test_round_trip_of_any_string(tok):
    """decode(encode(s)) == s for anything that is Unicode, unknown scripts, controls and unassigned points included."""
    assert tok.decode([*tok.encode("a dog"), 10**6, *tok.encode(" runs")]) == "a dog runs", "an id without a name"
    rng = random.Random(3)
    points = [i for i in range(0x110000) if not 0xD800 <= i < 0xE000]
    texts = TEXTS + ["".join(map(chr, rng.choices(points, k=30))) for _ in range(200)]
    for text in texts + ["".join(rng.choices("ab \n\t\x1c\x85\u2028'", k=20)) for _ in range(200)]:
        assert tok.decode(tok.encode(text)) == tok.decode(tok.encode_plain(text)) == text
    for _ in range(2000):       # the fast pattern for ASCII text must make the same cuts: \x1c-\x1f are no white space
        text = "".join(rng.choices([*map(chr, range(128)), *"'''   sdtlmrve\n"], k=15))
        assert GPT2_WORDS_ASCII.findall(text) == GPT2_WORDS.findall(text), repr(text)
    assert tok.encode("dog \ud83d dog") == tok.encode("dog ? dog"), "half a UTF-16 pair has no UTF-8 bytes"


def test_special_tokens_take_the_last_ids_and_are_cut_out_first(tok):
    assert tok.vocab_size == 320 and [tok.token_to_id(name) for name in SPECIAL_TOKENS] == [*range(315, 320)]
    assert tok.special_ids == [*range(315, 320)] and tok.unk_id is None and tok.frame_ids == ([], [])
    assert tok.encode("<image>a")[0] == 316 and tok.id_to_token(316) == "<image>"
    assert tok.token_to_id("<nothing>") is None and tok.id_to_token(320) is None
    tok.add_special_tokens(["<image>", "<image><image>", "<pad>", "<pad>"])
    assert tok.encode("<image><image><image>") == [320, 316], "of two that start at one place, the longer"
    assert tok.vocab_size == 322


def test_user_text_never_becomes_a_tag(tok, tmp_path):
    """Who types <|assistant|> into a question must not answer it; nor was a caption meant to hold <s> and </s>."""
    text = "hi <|assistant|><image>"
    assert not set(tok.encode_plain(text)) & set(tok.special_ids)
    assert set(tok.encode(text)) & set(tok.special_ids) == {316, 319}
    framed = load_tokenizer(write(tmp_path / "t.json", spec_of("framed")))
    assert framed.frame_ids == ([321], [322, 320]) and framed.decode(framed.encode_plain("a dog")) == "a dog"
    # some files list <image> as added but not special: then it is a word, until someone makes it special
    added = [token | {"special": False} for token in spec_of("gpt2")["added_tokens"]]
    loose = load_tokenizer(write(tmp_path / "t.json", spec_of("gpt2") | {"added_tokens": added}))
    assert loose.encode_plain("<image>") == [321] and loose.special_ids == []
    loose.add_special_tokens(["<image>"])
    assert loose.special_ids == [321] and 321 not in loose.encode_plain("<image>")


def test_training_cuts_special_tokens_out_and_may_run_out_of_pairs():
    tokenizer = BPETokenizer.train(["<image>ab"] * 5, 1000, special_tokens=("<image>",))
    assert tokenizer.vocab_size == 256 + 1 + 1, "ab is the only pair: nothing was learned from the letters of <image>"
    assert tokenizer.encode("ab<image>") == [256, 257]
    with pytest.raises(UserError, match="vocab_size 200 has no room.*add 61"):
        BPETokenizer.train(CORPUS, 200)


def test_vocab_json_and_merges_txt(tmp_path):
    """The older layout of two files gives the ids of the one file, GPT-2's and CLIP's."""
    tokenizer = load_tokenizer(write_vocab(tmp_path))
    tokenizer.add_special_tokens(["<image>", "<|user|>"])
    assert [tokenizer.encode(text) for text in TEXTS] == CASES["gpt2"]["ids"]
    model = spec_of("clip")["model"]
    write(tmp_path / "vocab.json", model["vocab"])
    (tmp_path / "merges.txt").write_text("\n".join(" ".join(pair) for pair in model["merges"]), encoding="utf-8")
    clip = load_tokenizer(tmp_path)
    assert [clip.encode(text) for text in TEXTS] == CASES["clip"]["ids"]
    assert clip.decode(clip.encode_plain("A dog\nruns!")) == "a dog runs !"


@pytest.mark.parametrize("beside", [
    {"added_tokens": {"<image>": 321, "<pad>": 322},
     "special_tokens_map": {"pad_token": "<pad>", "additional_special_tokens": ["<image>"]}},
    {"added_tokens": {"<image>": 321, "<pad>": 322}, "tokenizer_config": {
        "additional_special_tokens": ["<image>"], "pad_token": {"__type": "AddedToken", "content": "<pad>"}}},
    {"tokenizer_config": {"tokenizer_class": "GPT2TokenizerFast", "model_max_length": 77, "add_bos_token": False,
                          "added_tokens_decoder": {"321": {"content": "<image>", "special": True, "lstrip": False},
                                                   "322": {"content": "<pad>", "special": True}}}}])
def test_special_tokens_of_the_files_beside_a_vocabulary(beside, tmp_path):
    """A <image> of added_tokens.json was once cut into letters: the model was then shown ids it had never learned."""
    tokenizer = load_tokenizer(write_vocab(tmp_path, **beside))
    letters = load_tokenizer(write(tmp_path / "t.json", REFERENCE["base"])).encode
    assert tokenizer.encode("a<image>dog<pad>") == [*letters("a"), 321, *letters("dog"), 322]
    assert tokenizer.special_ids == [320, 321, 322] and tokenizer.vocab_size == 323
    assert 321 not in tokenizer.encode_plain("<image>")


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("beside, name", [
    *[({"tokenizer_config": {"tokenizer_class": f"{name}Tokenizer"}}, name) for name in
      ("Bart", "Qwen2", "Llama", "Whisper", "CLIP", "Bert")],
    ({"tokenizer_config": {"extra_special_tokens": {"image_token": "<x>"}}}, "<x>"), ({"added_tokens": []}, "added_tokens"),
    ({"tokenizer_config": {"bos_token": 5}}, "a file beside it is broken"),
    ({"tokenizer_config": {"added_tokens_decoder": {"7": {"content": "<|endoftext|>"}}}}, "the ids 320 and 7"),
    ({"special_tokens_map": {"pad_token": "<pad>"}}, "<pad>"), ({"added_tokens": {"<image>": 5}}, "has the id 5"),
    ({"added_tokens": {"e": 321}}, "token 'e'"), ({"tokenizer_config": {"tokenizer_class": "RobertaTokenizer"}}, "Roberta"),
    *[({"tokenizer_config": {key: True}}, key) for key in ("add_bos_token", "add_prefix_space", "split_special_tokens")],
    ({"tokenizer_config": {"added_tokens_decoder": {"321": {"content": "<x>", "lstrip": True}}}}, "added token")])
def test_what_lies_beside_and_cannot_be_read_is_refused_by_name(whole, beside, name, tmp_path):
    """transformers' classes bring parts of their own: Roberta's would frame each text, with a tokenizer.json or not."""
    with pytest.raises(UserError, match=name):
        load_tokenizer(write_vocab(tmp_path, whole, **beside))


def test_tokens_beside_a_tokenizer_json_are_cut_out_as_transformers_does(tmp_path):
    """Its tokenizer_config.json may add tokens; they were once cut into letters. A flag said last counts."""
    beside = {"tokenizer_config": {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|endoftext|>", "pad_token": None,
                                   "added_tokens_decoder": {"321": {"content": "<image>", "special": True}}}}
    tokenizer = load_tokenizer(write_vocab(tmp_path, True, **beside))
    assert tokenizer.encode("<image>")[-1:] == [321] and tokenizer.special_ids == [320, 321]
    write(tmp_path / "special_tokens_map.json", {"eos_token": {"content": "<|endoftext|>", "lstrip": True}})
    assert load_tokenizer(tmp_path).special_ids == [320, 321], "the file's own entry tells how a token is found"


def test_older_files_and_far_ids(tmp_path):
    """The first files spell merges 'a b' and name no model type; an embedding needs a row up to the highest id."""
    model = dict(REFERENCE["base"]["model"], merges=[" ".join(pair) for pair in REFERENCE["base"]["model"]["merges"]])
    del model["type"]
    spec = spec_of("gpt2") | {"model": model, "added_tokens": [ADDED, *spec_of("gpt2")["added_tokens"]]}
    tokenizer = load_tokenizer(write(tmp_path / "old.json", spec))
    assert [tokenizer.encode(text) for text in TEXTS] == CASES["gpt2"]["ids"]
    assert tokenizer.vocab_size == 401 and tokenizer.encode("<mask>") == [400] and tokenizer.id_to_token(399) is None


BYTES, MODEL = REFERENCE["base"]["pre_tokenizer"], REFERENCE["base"]["model"]


@pytest.mark.parametrize("change, name", [
    *[({"pre_tokenizer": part}, "pre_tokenizer") for part in (
        None, {}, {"type": "Metaspace"}, BYTES | {"use_regex": False}, BYTES | {"add_prefix_space": True},
        {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTES]})],
    *[({"decoder": part}, "decoder") for part in (          # another one makes another text of the same ids
        {}, {"type": "Metaspace"}, {"type": "WordPiece", "prefix": "##"}, {"type": "Sequence", "decoders": [BYTES]})],
    ({"normalizer": {"type": "NFC"}}, "normalizer"), ({"post_processor": {"type": "Strange"}}, "post_processor"),
    ({"post_processor": {"type": "BertProcessing", "cls": ["a", 900], "sep": ["b", 1]}}, "post_processor.*900"),
    ({"model": None}, "broken"), ({"model": {"type": "BPE", "merges": []}}, "vocab"),
    *[({"model": MODEL | {option: value}}, f"model.*{option}") for option, value in (
        ("type", "Unigram"), ("dropout", 0.1), ("byte_fallback", True), ("ignore_merges", True), ("fuse_unk", True),
        ("new_option", 1), ("continuing_subword_prefix", "##"))],
    *[({"model": MODEL | {"merges": [merge]}}, "merges") for merge in (["q", "qq"], "a b c")],
    *[({"added_tokens": [ADDED | {flag: True}]}, "added token") for flag in ("single_word", "lstrip", "rstrip")],
    *[({"added_tokens": [ADDED | wrong]}, "has the id") for wrong in (
        {"id": 1.5}, {"id": -1}, {"id": "1"}, {"id": 2**24}, {"id": None}, {"content": "e"}, {"id": 5})]])
def test_what_is_not_known_is_refused_by_name(change, name, tmp_path):
    """A wrong guess would train a model on wrong ids without anyone noticing."""
    with pytest.raises(UserError, match=name if name != "model.*type" else "Unigram") as error:
        load_tokenizer(write(tmp_path / "odd.json", REFERENCE["base"] | change))
    assert "odd.json" in str(error.value) and len(str(error.value)) - len(str(tmp_path)) < 280


def test_missing_and_broken_files_name_themselves(tmp_path):
    (tmp_path / "broken.json").write_text('{"model": ', encoding="utf-8")
    (tmp_path / "deep.json").write_text("[" * 100_000, encoding="utf-8")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    for name in ("none.json", "broken.json", "deep.json", "bytes.json", "vocab.txt", "tokenizer.json"):
        with pytest.raises(UserError, match=name):
            load_tokenizer(tmp_path if name == "tokenizer.json" else tmp_path / name)
    write(tmp_path / "vocab.json", {"a": 0})
    with pytest.raises(UserError, match="merges.txt"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="BPE"):
        WordPieceTokenizer.load(write(tmp_path / "bpe.json", REFERENCE["base"]))
