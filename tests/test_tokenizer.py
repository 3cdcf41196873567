"""tinyvlm/tokenizer.py: worked examples, identities, and answers of the `tokenizers` library kept in a small file.

reference_tokenizer.json is made by make_reference_tokenizer.py from a corpus of our own; the library is not needed.
"""
import json
import pickle
import random
from collections import Counter
from pathlib import Path

import pytest

from tinyvlm.config import UserError
from tinyvlm.tokenizer import (BYTE_CHAR, CACHE_WORDS, GPT2_WORDS, GPT2_WORDS_ASCII, LONG_WORD, SPECIAL_TOKENS,
                               BPETokenizer, WordPieceTokenizer, learn_merges, load_tokenizer, merge_long, merge_short)

REFERENCE = json.loads(Path(__file__).with_name("reference_tokenizer.json").read_text(encoding="utf-8"))
CORPUS, TEXTS = REFERENCE["corpus"], REFERENCE["texts"]
ADDED = {"id": 400, "content": "<mask>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True}


def spec_of(case):
    return REFERENCE["base"] | REFERENCE["cases"][case]["changes"]


def write(path, spec):
    path.write_text(json.dumps(spec), encoding="utf-8")
    return path


@pytest.fixture
def tok():
    return BPETokenizer.train(CORPUS, 320)


@pytest.fixture
def bert(tmp_path):
    tokens = "[PAD] [UNK] [CLS] [SEP] [MASK] un ##aff ##able a cafe dog ##s ! - t shirt $ 的 < > sos ' ## <x>".split()
    (tmp_path / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    return WordPieceTokenizer.load(tmp_path)


@pytest.mark.parametrize("case", REFERENCE["cases"])
def test_encodes_as_the_tokenizers_library_does(case, tmp_path):
    """Every component we read, on captions, tags, accents, CJK, emoji, control characters and long words."""
    tokenizer = load_tokenizer(write(tmp_path / "tokenizer.json", spec_of(case)))
    for text, ids in zip(TEXTS, REFERENCE["cases"][case]["ids"], strict=True):
        assert tokenizer.encode(text) == ids, f"{case}: {text!r}"


@pytest.mark.parametrize("case", REFERENCE["cases"])
def test_a_saved_tokenizer_is_the_same_tokenizer(case, tmp_path):
    """A run is rebuilt from its tokenizer.json alone: every component and every id must survive save and load."""
    first = load_tokenizer(write(tmp_path / "first.json", spec_of(case)))
    first.add_special_tokens(["<new>"])
    first.save(tmp_path / "tokenizer.json")
    again = load_tokenizer(tmp_path)
    assert type(again) is type(first) and again.vocab_size == first.vocab_size
    for text in ["a<new>dog", *TEXTS]:          # texts with tags of every flag
        assert again.encode(text) == first.encode(text)
    assert [p.name for p in tmp_path.iterdir() if "partial" in p.name] == []


def test_trainer_learns_the_merges_of_the_rust_trainer(tmp_path):
    """The library learned 64 merges from the same corpus: ours must be the same, ties included."""
    ours = BPETokenizer.train(CORPUS, 320, special_tokens=())
    ours.save(tmp_path)
    saved = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    theirs = REFERENCE["base"]["model"]
    assert [tuple(m.split(" ")) for m in saved["merges"]] == [tuple(m) for m in theirs["merges"]]
    assert saved["vocab"] == theirs["vocab"]


def test_merges_by_hand():
    """hug x10, pug x5, hugs x5: (u, g) is seen 20 times, then (h, ug) 15 times; then ties go to the lowest ids."""
    vocab, merges = learn_merges({"hug": 10, "pug": 5, "hugs": 5}, 258)
    assert merges == [("u", "g"), ("h", "ug")] and vocab["hug"] == 257
    assert learn_merges({"ab": 1, "cd": 1, "xa": 1}, 257)[1] == [("a", "b")], "of pairs seen equally often, the lowest"


def test_incremental_counts_equal_counting_afresh():
    """The heap of outdated counts must choose as a recount after each merge would, overlaps such as 'aaa' included."""
    rng = random.Random(1)
    words = Counter("".join(rng.choices("abc", k=rng.randint(1, 12))) for _ in range(200))
    vocab, merges = learn_merges(words, 256 + 120)
    ids = {char: i for i, char in enumerate(BYTE_CHAR.values())}
    split = {word: list(word) for word in words}
    for merge in merges:
        count = Counter()
        for word, n in words.items():
            for pair in zip(split[word], split[word][1:]):
                count[pair] += n
        assert merge == min(count, key=lambda pair: (-count[pair], ids[pair[0]], ids[pair[1]]))
        ids.setdefault("".join(merge), len(ids))
        for symbols in split.values():
            i = 0
            while i < len(symbols) - 1:
                if (symbols[i], symbols[i + 1]) == merge:
                    symbols[i:i + 2] = ["".join(merge)]
                i += 1
    assert ids == vocab and len(merges) == 120


def test_heap_and_plain_loop_merge_alike():
    """The near-linear way for long words is an optimisation, so it may never show; merge tables are arbitrary here."""
    rng = random.Random(2)
    for _ in range(300):
        pairs = [(rng.randrange(8), rng.randrange(8)) for _ in range(20)]
        merges = {pair: (rank, rng.randrange(4, 8)) for rank, pair in enumerate(dict.fromkeys(pairs))}
        ids = [rng.randrange(4) for _ in range(rng.randrange(1, 60))]
        assert merge_long(list(ids), merges) == merge_short(list(ids), merges)
    assert merge_short([0, 1, 2], {(1, 2): (0, 3), (0, 3): (1, 4)}) == [4]


def test_one_long_word_without_spaces_is_not_quadratic(tok, monkeypatch):
    """Long words take the heap, and there 8 times the length makes about 8 times the look-ups of merges (no clock)."""
    def only_short_words(ids, merges):
        assert len(ids) <= LONG_WORD, f"the quadratic loop was given {len(ids)} symbols"
        return merge_short(ids, merges)

    class Counting(dict):
        looks = 0

        def get(self, *args):
            Counting.looks += 1
            return super().get(*args)

    def work(n):
        Counting.looks = 0
        tok.encode("thedog" * n)
        return Counting.looks

    monkeypatch.setattr("tinyvlm.tokenizer.merge_short", only_short_words)
    tok._merges = Counting(tok._merges)
    assert 0 < work(800) < 8.5 * work(100)


def test_round_trip_of_any_string(tok):
    """decode(encode(s)) == s for anything that is Unicode, unknown scripts, controls and unassigned points included."""
    rng = random.Random(3)
    points = [i for i in range(0x110000) if not 0xD800 <= i < 0xE000]
    texts = TEXTS + ["".join(map(chr, rng.choices(points, k=30))) for _ in range(200)]
    for text in texts + ["".join(rng.choices("ab \n\t\x1c\x85\u2028'", k=20)) for _ in range(200)]:
        for special in (True, False):
            assert tok.decode(tok.encode(text, special=special)) == text


def test_a_lone_surrogate_reads_as_a_question_mark(tok):
    """Half a UTF-16 pair (a broken \\ud83d in some json) has no UTF-8 bytes; it must not stop a training run."""
    assert tok.encode("dog \ud83d dog") == tok.encode("dog ? dog")


def test_ascii_cuts_are_the_unicode_cuts():
    """The fast pattern for ASCII text is an optimisation: \\x1c-\\x1f are no white space for either."""
    rng = random.Random(4)
    for _ in range(3000):
        text = "".join(rng.choices([*map(chr, range(128)), *"'''   sdtlmrve\n"], k=15))
        assert GPT2_WORDS_ASCII.findall(text) == GPT2_WORDS.findall(text), repr(text)


def test_special_tokens_take_the_last_ids_and_are_cut_out_first(tok):
    assert tok.vocab_size == 320 and [tok.token_to_id(name) for name in SPECIAL_TOKENS] == [*range(315, 320)]
    assert tok.encode("<image>a")[0] == 316 and tok.id_to_token(316) == "<image>"
    assert tok.token_to_id("<nothing>") is None and tok.id_to_token(320) is None
    assert tok.add_special_tokens(["<image>", "<image><image>", "<pad>", "<pad>"]) == 2
    assert tok.encode("<image><image><image>") == [320, 316], "of two that start at one place, the longer"
    assert tok.decode([320, *tok.encode("a"), 321], special=False) == "a"


def test_worked_example_of_the_docstring():
    tokenizer = BPETokenizer.train(["a dog", "a dog runs"], vocab_size=256 + 3 + 1, special_tokens=["<image>"])
    assert tokenizer.encode("<image>a dog") == [259, 64, 258]
    assert [tokenizer.id_to_token(i) for i in range(256, 260)] == ["do", "Ġdo", "Ġdog", "<image>"]


def test_user_text_never_becomes_a_tag(tok):
    """special=False: someone who types <|assistant|> into a question must not speak in the model's voice."""
    text = "hi <|assistant|><image>"
    assert not set(tok.encode(text, special=False)) & set(range(315, 320))
    assert set(tok.encode(text)) & set(range(315, 320)) == {316, 319}


def test_a_plain_added_token_can_be_made_special(tmp_path):
    """Some files list <image> as added but not special: user text would then become that tag, special=False or not."""
    spec = spec_of("gpt2")
    spec["added_tokens"] = [token | {"special": False} for token in spec["added_tokens"]]
    tokenizer = load_tokenizer(write(tmp_path / "t.json", spec))
    image = tokenizer.token_to_id("<image>")
    assert tokenizer.encode("<image>", special=False) == [image]
    assert tokenizer.add_special_tokens(["<image>"]) == 0 and tokenizer.encode("<image>") == [image]
    assert image not in tokenizer.encode("<image>", special=False)


def test_training_cuts_special_tokens_out_and_may_run_out_of_pairs():
    tokenizer = BPETokenizer.train(["<image>ab"] * 5, 1000, special_tokens=("<image>",))
    assert tokenizer.vocab_size == 256 + 1 + 1, "ab is the only pair: nothing was learned from the letters of <image>"
    assert tokenizer.encode("ab<image>") == [256, 257]
    with pytest.raises(UserError, match="vocab_size 200 is too small.*261"):
        BPETokenizer.train(CORPUS, 200)


def test_training_does_not_depend_on_the_order_of_the_texts(tok, tmp_path):
    BPETokenizer.train(CORPUS[::-1], 320).save(tmp_path / "b.json")
    tok.save(tmp_path / "a.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


@pytest.mark.parametrize("case", ["gpt2", "clip"])
def test_vocab_json_and_merges_txt(case, tmp_path):
    """The older layout of two files gives the ids of the one file; a merge of '#' signs is not a comment."""
    model = spec_of(case)["model"]
    write(tmp_path / "vocab.json", model["vocab"] | ({"<|endoftext|>": 320} if case == "gpt2" else {}))
    lines = [" ".join(pair) for pair in model["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *lines, ""]), encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path)
    tokenizer.add_special_tokens(["<image>", "<|user|>"] if case == "gpt2" else [])
    for text, ids in zip(TEXTS, REFERENCE["cases"][case]["ids"], strict=True):
        assert tokenizer.encode(text) == ids


def test_clip_context_ends_in_the_end_token(tmp_path):
    """CLIP reads its answer at the end token, so shortening to the context must keep it."""
    clip = load_tokenizer(write(tmp_path / "t.json", spec_of("clip")))
    start, end = clip.token_to_id("<|startoftext|>"), clip.token_to_id("<|endoftext|>")
    ids = clip.encode("a dog " * 100, max_length=77)
    assert len(ids) == 77 and ids[0] == start and ids[-1] == end
    assert clip.encode("A  DOG", max_length=77) == clip.encode("a dog") and clip.encode("") == [start, end]
    assert clip.decode(clip.encode("A dog\nruns!"), special=False) == "a dog runs !"
    with pytest.raises(AssertionError, match="max_length 1"):
        clip.encode("a", max_length=1)


def test_old_merge_strings_and_a_missing_model_type(tmp_path):
    """The first tokenizer.json files spell merges 'a b' and do not name the model's type."""
    spec = spec_of("gpt2")
    model = {**spec["model"], "merges": [" ".join(pair) for pair in spec["model"]["merges"]]}
    del model["type"]
    tokenizer = load_tokenizer(write(tmp_path / "old.json", spec | {"model": model}))
    assert [tokenizer.encode(text) for text in TEXTS] == REFERENCE["cases"]["gpt2"]["ids"]


def test_tokens_taken_as_they_stand_are_cut_before_normalized_ones(tmp_path):
    """As `tokenizers` does, normaliser or not: <mask> owns the spaces on its left, although "  " begins first."""
    spaces = ADDED | {"id": 401, "content": "  ", "normalized": True, "special": False}
    for tokens, text, ids in (([ADDED | {"lstrip": True}, spaces], "a  <mask>", [64, 400]),
                              ([ADDED, spaces | {"content": "b<"}], "ab<mask>", [64, 65, 400])):
        path = write(tmp_path / "t.json", spec_of("gpt2") | {"added_tokens": tokens})
        assert load_tokenizer(path).encode(text) == ids


def test_vocab_size_is_the_highest_id_plus_one(tmp_path):
    """An embedding of len(vocab) rows would be too small where ids are left out (32000 + <image> at id 32000)."""
    spec = spec_of("gpt2")
    spec["added_tokens"] = [spec["added_tokens"][0] | {"id": 500, "content": "<far>"}]
    tokenizer = load_tokenizer(write(tmp_path / "far.json", spec))
    assert tokenizer.vocab_size == 501 and tokenizer.encode("<far>") == [500] and tokenizer.id_to_token(499) is None
    with pytest.raises(AssertionError, match="id 499 is not in this vocabulary of 501"):
        tokenizer.decode([499])


def test_ignore_merges_takes_whole_words(tmp_path):
    """Llama 3's option: 'zz' is a token that no merge reaches."""
    spec = spec_of("gpt2")
    model = spec["model"] | {"vocab": spec["model"]["vocab"] | {"zz": 400}}
    for option, ids in ((True, [400]), (False, [spec["model"]["vocab"]["z"]] * 2)):
        path = write(tmp_path / "t.json", spec | {"model": model | {"ignore_merges": option}})
        assert load_tokenizer(path).encode("zz") == ids


@pytest.mark.parametrize("change, name", [
    ({"pre_tokenizer": {"type": "Metaspace"}}, "pre_tokenizer"), ({"pre_tokenizer": None}, "ByteLevel"),
    ({"normalizer": {"type": "Precompiled"}}, "normalizer Precompiled"),
    ({"post_processor": {"type": "Strange"}}, "post_processor Strange"),
    ({"decoder": {"type": "Fuse"}}, "decoder Fuse"),
    ({"model": {"type": "Unigram", "vocab": []}}, "model Unigram"), ({"model": {"type": "BPE", "merges": []}}, "vocab"),
    ({"model": REFERENCE["base"]["model"] | {"dropout": 0.1}}, "dropout"),
    ({"model": REFERENCE["base"]["model"] | {"merges": [["q", "qq"]]}}, "qq"), ({"model": None}, "no model")])
def test_what_is_not_known_is_refused_by_name(change, name, tmp_path):
    """A wrong guess would train a model on wrong ids without anyone noticing."""
    with pytest.raises(UserError, match=name) as error:
        load_tokenizer(write(tmp_path / "odd.json", REFERENCE["base"] | change))
    assert "odd.json" in str(error.value)


@pytest.mark.parametrize("fault", [
    {"id": True}, {"id": 1.0}, {"id": -1}, {"id": "1"}, {"id": 2**24}, {"id": None}, {"content": ""}, {"content": 7},
    {"special": 1}, {"normalized": None}, {"lstrip": "no"}])
def test_a_damaged_added_token_is_refused_when_the_file_is_opened(fault, tmp_path):
    """An id of 1e30 became the size of an embedding, and an empty token was found before every letter."""
    assert load_tokenizer(write(tmp_path / "t.json", spec_of("gpt2") | {"added_tokens": [ADDED]})).vocab_size == 401
    with pytest.raises(UserError, match="t.json is broken"):
        load_tokenizer(write(tmp_path / "t.json", spec_of("gpt2") | {"added_tokens": [ADDED | fault]}))


@pytest.mark.parametrize("i", [True, 5.0, -1, 2**24, 10**30])
def test_a_damaged_id_of_the_vocabulary_or_the_frame_is_refused(i, tmp_path):
    model = spec_of("gpt2")["model"]
    frame = {"type": "BertProcessing", "cls": ["<cls>", i], "sep": ["<sep>", 1]}
    for change in ({"model": model | {"vocab": model["vocab"] | {"dog": i}}}, {"post_processor": frame}):
        with pytest.raises(UserError, match="the id .* is not a whole number"):
            load_tokenizer(write(tmp_path / "t.json", spec_of("gpt2") | change))


def test_missing_and_broken_files_name_themselves(tmp_path):
    (tmp_path / "broken.json").write_text('{"model": ', encoding="utf-8")
    (tmp_path / "deep.json").write_text("[" * 100_000, encoding="utf-8")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    for path, words in ((tmp_path / "none.json", "none.json"), (tmp_path, "holds no tokenizer.json"),
                        (tmp_path / "broken.json", "broken.json"), (tmp_path / "deep.json", "deep.json"),
                        (tmp_path / "bytes.json", "bytes.json")):
        with pytest.raises(UserError, match=words):
            BPETokenizer.load(path)
    write(tmp_path / "vocab.json", {"a": 0})
    with pytest.raises(UserError, match="merges.txt"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="WordPieceTokenizer"):
        WordPieceTokenizer.load(write(tmp_path / "bpe.json", REFERENCE["base"]))


def test_wordpiece_by_hand(bert):
    """Longest prefix first, ## continuations, punctuation apart, accents and case off, CJK alone, over 100 is [UNK]."""
    def tokens(text, **options):
        return [bert.id_to_token(i) for i in bert.encode(text, **options)]
    assert tokens("Unaffable dogs!") == ["un", "##aff", "##able", "dog", "##s", "!"]
    assert tokens("CAFÉ Cafe\u0301 a\x00\u200d\ufffd的dog") == ["cafe", "cafe", "a", "的", "dog"]
    assert tokens("T-shirt$ unaffx") == ["t", "-", "shirt", "$", "[UNK]"]
    assert tokens("a" * 101) == ["[UNK]"] and tokens("") == [] and tokens(" \n\u3000") == []
    assert tokens("[MASK]a") == ["[MASK]", "a"] and tokens("[MASK]", special=False) == ["[UNK]"] * 3
    assert bert.decode(bert.encode("Unaffable dogs!")) == "unaffable dogs !"


def test_wordpiece_added_tokens_survive_a_round_trip(bert, tmp_path):
    """<SOS> must be found before lower-casing and punctuation splitting would turn it into < sos >."""
    size = bert.vocab_size
    assert bert.encode("<SOS>") == bert.encode("< sos >") and bert.add_special_tokens(["<SOS>", "<EOS>"]) == 2
    bert.save(tmp_path / "tokenizer.json")
    for tokenizer in (bert, load_tokenizer(tmp_path), WordPieceTokenizer.load(tmp_path / "tokenizer.json")):
        assert tokenizer.vocab_size == size + 2
        assert tokenizer.encode("<SOS>a<EOS>") == [size, bert.token_to_id("a"), size + 1]


def test_wordpiece_normalized_tokens_are_found_however_written(bert, tmp_path):
    """add_tokens(["covid"]) of `transformers`: the text and the token are cleaned alike, then compared."""
    bert.save(path := tmp_path / "tokenizer.json")
    spec, soft = json.loads(path.read_text(encoding="utf-8")), {"normalized": True, "special": False}
    names = ["Covid", "café au", "COVID", "\u0301"]           # of two that become one the first counts; one is nothing
    spec["added_tokens"] += [ADDED | soft | {"id": 30 + i, "content": name} for i, name in enumerate(names)]
    tokenizer = load_tokenizer(write(path, spec))
    a, dash = tokenizer.token_to_id("a"), tokenizer.token_to_id("-")
    assert [tokenizer.encode(text) for text in ("covid", "a COVID-a", "Cafe\u0301 AU", "a \u0301 a")] == [
        [30], [a, 30, dash, a], [31], [a, a]]


@pytest.mark.parametrize("config", [{"do_lower_case": False}, {"strip_accents": False}, []])
def test_a_cased_vocab_txt_is_refused(config, bert, tmp_path):
    """Its folder says so beside the vocabulary. Lower-casing would quietly give other ids than its model learned."""
    assert WordPieceTokenizer.load(tmp_path).encode("A") == bert.encode("a")
    write(tmp_path / "tokenizer_config.json", {"do_lower_case": True, "strip_accents": None})
    assert WordPieceTokenizer.load(tmp_path).encode("A") == bert.encode("a")
    write(tmp_path / "tokenizer_config.json", config)
    with pytest.raises(UserError, match="uncased BERT" if config else "vocab.txt"):
        load_tokenizer(tmp_path)


def test_wordpiece_cleanup_takes_spaces_before_punctuation_out(bert, tmp_path):
    """The `cleanup` of the file's decoder, which BERT's own tokenizer.json asks for."""
    bert.add_special_tokens([".", ","])
    ids = bert.encode("a dogs' - a, dog!.")
    assert bert.decode(ids) == "a dogs ' - a , dog ! ."
    bert.save(path := tmp_path / "tokenizer.json")
    spec = json.loads(path.read_text(encoding="utf-8"))
    spec["decoder"]["cleanup"] = True
    assert load_tokenizer(write(path, spec)).decode(ids) == "a dogs ' - a, dog!."


def test_the_word_cache_is_bounded(tok):
    """A long run must not remember every word it ever met, nor pin huge words; forgetting must not change the ids."""
    before = tok.encode("the dog")
    tok.encode("x" * 1000)
    assert tok._cached_ids.cache_info().currsize == 2 and tok._cached_ids.cache_info().maxsize == CACHE_WORDS
    tok._cached_ids.cache_clear()
    assert tok.encode("the dog") == before


def test_pickles_for_data_loader_workers(tok, bert):
    """Where worker processes are spawned, the dataset and its tokenizer travel by pickle."""
    for tokenizer in (tok, bert):
        tokenizer.add_special_tokens(["<new>"])
        again = pickle.loads(pickle.dumps(tokenizer))
        assert again.vocab_size == tokenizer.vocab_size and again.encode("a dog<new>") == tokenizer.encode("a dog<new>")
