"""Text <-> token ids by words: BERT's WordPiece (uncased), which takes words apart, and whole words as in 2015.

WordPiece follows google-research/bert as the `tokenizers` library carries it on (signs younger than that library's
edition of Unicode may differ). Left out: training it, and cased BERT."""
import collections
import re
from unicodedata import category, normalize

from .config import UserError
from .vocab import NOT_SPACE, SPECIAL_TOKENS, Tokenizer, added_tokens, require

# CJK ideographs, which BERT takes one by one (kana and hangul are cut like letters); 2b920, not 2b820, as `tokenizers`.
IDEOGRAPH = re.compile("[\u4e00-\u9fff\u3400-\u4dbf\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002b73f"
                       "\U0002b740-\U0002b81f\U0002b920-\U0002ceaf\U0002f800-\U0002fa1f]")
CONTROL = ("Cc", "Cf", "Co", "Cs")
CLEANING = {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": None,
            "lowercase": True}
MODEL = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100}


def lower(text):
    """Letter by letter, as `tokenizers` does; Python alone would turn a word-final Σ into ς."""
    return text.replace("Σ", "σ").lower()


class WordPieceTokenizer(Tokenizer):
    """The longest known beginning of a word, then the longest known "##..." continuation: "unaffable" -> un ##aff
    ##able. A word that fails anywhere, or has over 100 characters, becomes [UNK] as a whole. Opened from a vocab.txt it
    has no frame: who wants [CLS] and [SEP] adds them."""
    kind, old_name = "WordPiece", "vocab.txt"

    @staticmethod
    def old_layout(path):
        """vocab.txt (a token a line), with small files beside it -> tokenizer.json."""
        vocab = {token: i for i, token in enumerate(path.read_text(encoding="utf-8").removesuffix("\n").split("\n"))}
        added = added_tokens(vocab, ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"))
        return {"added_tokens": added, "normalizer": CLEANING, "pre_tokenizer": {"type": "BertPreTokenizer"},
                "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": False}, "model": MODEL | {"vocab": vocab}}

    def _setup(self, spec):
        require("model", {key: value for key, value in spec["model"].items() if key != "vocab"}, MODEL)
        require("normalizer", spec["normalizer"], CLEANING)
        require("pre_tokenizer", spec["pre_tokenizer"], {"type": "BertPreTokenizer"})
        require("decoder", spec["decoder"], None, *({"type": "WordPiece", "prefix": "##", "cleanup": how} for how in
                                                    (False, True)))
        self.unk_id, self._cleanup = self._vocab["[UNK]"], (spec["decoder"] or {}).get("cleanup")

    def _normalize(self, text):
        """Odd characters out, ideographs apart, lower case, accents off: "Le Café" -> "le cafe". Unassigned characters
        (Cn) stay, as in `tokenizers`: next year's emoji is [UNK], not nothing."""
        if text.isascii() and text.isprintable():
            return text.lower()
        text = "".join(c for c in text if c in "\t\n\r" or c != "\ufffd" and category(c) not in CONTROL)
        text = lower(normalize("NFC", IDEOGRAPH.sub(r" \g<0> ", text)))           # each ideograph a word
        return "".join(c for c in normalize("NFD", text) if category(c) != "Mn")  # e + accent -> e

    def _word_ids(self, word):
        """"cafe!" -> the ids of "cafe" and of "!": ASCII's symbols and Unicode's punctuation (P*) stand apart."""
        apart = [f" {c} " if category(c)[0] == "P" or c.isascii() and not c.isalnum() else c for c in word]
        return [i for part in "".join(apart).split() for i in self._pieces(part)]

    def _pieces(self, word):
        ids, start = [], 0
        while start < len(word):
            prefix = "##" if start else ""
            ends = range(len(word), start, -1)
            end = next((end for end in ends if prefix + word[start:end] in self._vocab), None)  # the longest
            if end is None or len(word) > 100:
                return [self.unk_id]
            ids.append(self._vocab[prefix + word[start:end]])
            start = end                                                           # "##..." from here
        return ids

    def decode(self, ids):
        """Ids -> text: "##" glued on; case and spacing are lost. A file may ask for no space before . , ? and !"""
        text = super().decode(ids).replace(" ##", "")
        return re.sub(" (?=[.,?!])", "", text) if self._cleanup else text


class WordTokenizer(Tokenizer):
    """Whole words between spaces, each an id; what is not in the vocabulary becomes <unk>. As papers of 2015 did it.

    >>> tok = WordTokenizer.train(["a dog", "a cat", "a dog runs"], min_count=2)
    >>> tok.decode(tok.encode("a dog barks"))
    'a dog <unk>'
    """
    kind = "WordLevel"

    @classmethod
    def train(cls, texts, min_count=5, special_tokens=SPECIAL_TOKENS):
        """Keep the words that occur at least min_count times, commonest first; then the special tokens. A word that is
        spelled like a special token is no word: only `encode` gives it that token's id."""
        counts = collections.Counter(word for text in texts for word in NOT_SPACE.findall(text))
        words = [word for word, n in counts.items() if n >= min_count and word not in ("<unk>", *special_tokens)]
        if not words:
            raise UserError(f"no word occurs {min_count} times; lower --min-count, or clean the captions less")
        words = ["<unk>", *sorted(words, key=lambda word: (-counts[word], word))]
        tokenizer = cls({"pre_tokenizer": {"type": "WhitespaceSplit"}, "model": {
            "type": "WordLevel", "vocab": {word: i for i, word in enumerate(words)}, "unk_token": "<unk>"}})
        tokenizer.add_special_tokens(special_tokens)
        return tokenizer

    def _setup(self, spec):
        require("normalizer", spec["normalizer"], None)
        require("pre_tokenizer", spec["pre_tokenizer"], {"type": "WhitespaceSplit"})
        require("decoder", spec["decoder"], None)
        self.unk_id = self._vocab[spec["model"]["unk_token"]]

    def _word_ids(self, word):
        i = self._vocab.get(word, self.unk_id)
        return [self.unk_id if i in self.special_ids else i]        # a special token is cut out of the text, or is none
