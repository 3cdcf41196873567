"""Makes reference_tokenizer.json, the answers test_tokenizer.py compares with. Needs the `tokenizers` package (0.23).

    python tests/make_reference_tokenizer.py

The file holds a corpus, texts, and for each case a tokenizer.json (as changes to a base one) with the ids that Hugging
Face's `tokenizers` gives for the texts: `ids` by its encode, `plain` without frame and special tokens.
"""
import json
import random
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [f"{a} {b} {c} {d}." for a in ("A dog", "Two dogs", "the child's dog") for b in ("runs", "is running", "jumps")
          for c in ("through", "over") for d in ("the grass", "the 24 stairs", "a pink field", "some water")]
TAGS = ["<|endoftext|>", "<image>", "<|user|>"]
CLIP_TAGS = ["<|startoftext|>", "<|endoftext|>"]


def make_texts():
    """Captions, traps, and seeded random strings from letters, spaces, tags, accents, CJK, emoji and controls."""
    rng = random.Random(0)
    atoms = [*"aeghnorst AB ,.!'09", " ", "  ", "\n", "\t", "\xa0", "\u3000", "'s", "'LL", "é", "É", "e\u0301", "ß",
             "Σ", "ΟΔΟΣ ", "İ", "的", "日本", "😀", "👍🏽", "\U0001fae8", "½", "٣", "\x00", "\x1c", "\u200d", "\ufffd",
             "…", "¿", "$", "dog", " the", "<image>", "<|endoftext|>", "<|ENDOFTEXT|>", "<|user|>", "<imag",
             "[MASK]", "[mask]", "<SOS>", "<MARK>", "a<mark>b"]
    fixed = ["", " ", "A dog runs.", "a" * 150, "the dog " * 4, "Hello  world\n\n  it's 2024!", "x" * 101, "dogs" * 20]
    return fixed + ["".join(rng.choices(atoms, k=rng.randint(1, 14))) for _ in range(60)]


def make_clip(byte_level, options):
    """CLIP's kind: in its vocabulary are bytes, bytes that end a word, merges, and the two tokens of its frame."""
    words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    split = pre_tokenizers.Sequence([pre_tokenizers.Split(words, "removed", invert=True), byte_level])
    lower = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    clip = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    clip.normalizer, clip.pre_tokenizer = lower, split
    clip.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=290, end_of_word_suffix="</w>", **options))
    merges = [tuple(pair) for pair in json.loads(clip.to_str())["model"]["merges"]]
    letters = [c + end for c in sorted(pre_tokenizers.ByteLevel.alphabet()) for end in ("", "</w>")]
    vocab = {token: i for i, token in enumerate(dict.fromkeys([*letters, *map("".join, merges), *CLIP_TAGS]))}
    clip.model = models.BPE(vocab, merges, end_of_word_suffix="</w>", unk_token=CLIP_TAGS[1])
    clip.add_tokens([AddedToken(name, special=True, normalized=True) for name in CLIP_TAGS])
    start, end = ((name, vocab[name]) for name in CLIP_TAGS)
    clip.post_processor = processors.RobertaProcessing(end, start, False, False)
    return clip


def main():
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    options = dict(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    gpt = Tokenizer(models.BPE())
    gpt.pre_tokenizer, gpt.decoder = byte_level, decoders.ByteLevel()
    gpt.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=320, **options))
    gpt.add_special_tokens(TAGS)
    words = sorted({word for text in CORPUS for word in text.lower().strip(".").split()})
    letters = sorted({char for word in words for char in word})
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *["##" + char for char in letters], *words,
              "##dog", "##ing", "!", ".", ",", "的"]               # a trained vocabulary would be another each time
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    bert = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    bert.normalizer, bert.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    bert.add_special_tokens(["<SOS>"])
    bert.add_tokens([AddedToken("<mark>", normalized=True)])
    cases = {"gpt2": gpt, "clip": make_clip(byte_level, options), "bert": bert}
    for name, base in ("framed", gpt), ("bert_framed", bert):
        cases[name] = Tokenizer.from_str(base.to_str())
    cases["framed"].post_processor = processors.TemplateProcessing(
        single="<image> $A <|user|> <|endoftext|>", special_tokens=[(name, gpt.token_to_id(name)) for name in TAGS])
    cases["bert_framed"].post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))

    base, texts = json.loads(gpt.to_str()), make_texts()
    out = {"corpus": CORPUS, "texts": texts, "base": base, "cases": {}}
    for name, tok in cases.items():
        spec = json.loads(tok.to_str())
        case = {"changes": {key: value for key, value in spec.items() if value != base[key]}}
        case["ids"] = [encoding.ids for encoding in tok.encode_batch(texts)]
        tok.encode_special_tokens = True
        case["plain"] = [encoding.ids for encoding in tok.encode_batch(texts, add_special_tokens=False)]
        out["cases"][name] = case
    path = Path(__file__).with_name("reference_tokenizer.json")
    path.write_text(json.dumps(out, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")


if __name__ == "__main__":
    main()
