"""Makes reference_tokenizer.json, the answers test_tokenizer.py compares with. Needs the `tokenizers` package (0.22).

    python tests/make_reference_tokenizer.py

The file holds a corpus, texts, and for each case a tokenizer.json (as changes to a base one) with the ids that the
Hugging Face `tokenizers` library gives for the texts. Nothing in tinyvlm or its tests imports that library.
"""
import json
import random
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [f"{a} {b} {c} {d}." for a in ("A dog", "Two dogs", "the child's dog") for b in ("runs", "is running", "jumps")
          for c in ("through", "over") for d in ("the grass", "the 24 stairs", "a pink field", "some water")]
TAGS = ["<|endoftext|>", "<image>", "<|user|>"]


def make_texts():
    """Captions, traps, and seeded random strings from letters, spaces, tags, accents, CJK, emoji and controls."""
    rng = random.Random(0)
    atoms = [*"aeghnorst AB ,.!'09", " ", "  ", "\n", "\t", "\xa0", "\u3000", "'s", "'LL", "é", "É", "e\u0301", "ß",
             "Σ", "ΟΔΟΣ ", "İ", "的", "日本", "😀", "👍🏽", "½", "٣", "\x00", "\u200d", "\ufffd",
             "…", "¿", "$", "dog", " the", "<image>", "<|endoftext|>", "<|ENDOFTEXT|>", "<|user|>", "<imag",
             "[MASK]", "<SOS>", "<mark>", "a<mark>b", " <mark> "]
    fixed = ["", " ", "A dog runs.", "a" * 150, "the dog " * 4, "Hello  world\n\n  it's 2024!", "x" * 101, "dogs" * 20]
    return fixed + ["".join(rng.choices(atoms, k=rng.randint(1, 14))) for _ in range(60)]


def chain(*steps):
    return pre_tokenizers.Sequence(list(steps))


def train(model, trainer, pre_tokenizer, normalizer=None):
    tok = Tokenizer(model)
    tok.pre_tokenizer = pre_tokenizer
    if normalizer:
        tok.normalizer = normalizer
    tok.train_from_iterator(CORPUS, trainer)
    return tok


def main():
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    options = dict(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    gpt = train(models.BPE(), trainers.BpeTrainer(vocab_size=320, **options), byte_level)
    gpt.decoder = decoders.ByteLevel()
    gpt.add_special_tokens(TAGS)
    words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    split = pre_tokenizers.Split(words, "removed", invert=True)
    lower = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    alphabet = [c + end for c in sorted(pre_tokenizers.ByteLevel.alphabet()) for end in ("", "</w>")]
    clip = train(models.BPE(end_of_word_suffix="</w>"),
                 trainers.BpeTrainer(vocab_size=290, end_of_word_suffix="</w>", **options),
                 pre_tokenizers.Sequence([split, byte_level]), lower)
    merges = json.loads(clip.to_str())["model"]["merges"]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(alphabet + ["".join(pair) for pair in merges]
                                                              + ["<|startoftext|>", "<|endoftext|>"]))}
    clip.model = models.BPE(vocab, [tuple(pair) for pair in merges], end_of_word_suffix="</w>",
                            unk_token="<|endoftext|>")
    clip.add_tokens([AddedToken(name, special=True, normalized=True) for name in ("<|startoftext|>", "<|endoftext|>")])
    clip.post_processor = processors.RobertaProcessing(("<|endoftext|>", vocab["<|endoftext|>"]),
                                                       ("<|startoftext|>", vocab["<|startoftext|>"]), False, False)
    bert = train(models.WordPiece(unk_token="[UNK]"), trainers.WordPieceTrainer(
        vocab_size=120, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], show_progress=False),
        pre_tokenizers.BertPreTokenizer(), normalizers.BertNormalizer())
    bert.add_special_tokens(["<SOS>"])

    expand = normalizers.Sequence([normalizers.NFKD(), normalizers.Replace("a", "dog"), lower])

    def variant(**changes):
        """The GPT-2 kind with some components exchanged, and added tokens with every flag."""
        tok = Tokenizer.from_str(gpt.to_str())
        tok.add_tokens(changes.pop("add", []))
        for name, value in changes.items():
            setattr(tok, name, value)
        return tok

    words = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?!\S)|\s+")
    plain_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    frame = processors.TemplateProcessing(single="<image> $A <|user|> <|endoftext|>", special_tokens=[
        (name, gpt.token_to_id(name)) for name in TAGS])
    cases = {
        "gpt2": gpt, "clip": clip, "bert": bert,
        "prefix_space": variant(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)),
        "split_isolated": variant(pre_tokenizer=chain(pre_tokenizers.Split(words, "isolated"), plain_bytes)),
        "split_removed": variant(pre_tokenizer=chain(pre_tokenizers.Split("o", "removed"), byte_level)),
        "digits": variant(pre_tokenizer=chain(pre_tokenizers.Digits(True), plain_bytes)),
        "framed": variant(post_processor=processors.Sequence([processors.ByteLevel(), frame])),
        "normalized": variant(normalizer=expand),
        "strip": variant(add=[AddedToken("<mark>", lstrip=True, rstrip=True), AddedToken("dog", single_word=True)]),
    }
    base, texts = json.loads(gpt.to_str()), make_texts()
    out = {"corpus": CORPUS, "texts": texts, "base": base, "cases": {}}
    for name, tok in cases.items():
        spec = json.loads(tok.to_str())
        changes = {key: value for key, value in spec.items() if value != base[key]}
        out["cases"][name] = {"changes": changes, "ids": [encoding.ids for encoding in tok.encode_batch(texts)]}
    path = Path(__file__).with_name("reference_tokenizer.json")
    path.write_text(json.dumps(out, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")


if __name__ == "__main__":
    main()
