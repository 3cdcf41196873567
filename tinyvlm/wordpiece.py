"""Text <-> token ids by words: BERT's WordPiece (uncased), which takes words apart, and whole words as in 2015.

WordPiece follows google-research/bert as the `tokenizers` library carries it on (signs younger than that library's
edition of Unicode may differ). Left out: training it, and cased BERT.
"""
import collections
import functools
import re
import unicodedata

from .config import UserError
from .vocab import ANY, CACHE_WORDS, NOT_SPACE, SPECIAL_TOKENS, Tokenizer, read_beside, require

# CJK ideographs, which BERT takes one by one (kana and hangul are cut like letters); 2b920, not 2b820, as `tokenizers`.
IDEOGRAPH = re.compile("[\u4e00-\u9fff\u3400-\u4dbf\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002b73f"
                       "\U0002b740-\U0002b81f\U0002b920-\U0002ceaf\U0002f800-\U0002fa1f]")


def lower(text):
    """Letter by letter, as `tokenizers` does; Python alone would turn a word-final Σ into ς."""
    return text.replace("Σ", "σ").lower()


@functools.lru_cache(maxsize=CACHE_WORDS)
def _clean_char(char):
    """What a character becomes before words are cut: control characters go, a CJK ideograph is a word of its own.

    Unassigned ones (Cn) stay, as in `tokenizers`: next year's emoji is [UNK], not nothing.
    """
    category = unicodedata.category(char)
    if char in "\t\n\r" or category == "Zs":
        return " "
    if category in ("Cc", "Cf", "Co", "Cs") or char == "\ufffd":
        return ""
    return f" {char} " if IDEOGRAPH.match(char) else char


class WordPieceTokenizer(Tokenizer):
    """The longest known beginning of a word, then the longest known "##..." continuation, and so on.

    "unaffable" -> un ##aff ##able. A word that fails anywhere, or has over 100 characters, becomes [UNK] as a whole.
    Opened from a vocab.txt it has no frame: who wants [CLS] and [SEP] adds them.
    """
    kind = "WordPiece"

    @staticmethod
    def old_layout(path):
        """vocab.txt (a token a line), with small files beside it -> tokenizer.json."""
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
        vocab = {token: i for i, token in enumerate(lines)}
        classes = ("BertTokenizer", "BertTokenizerFast", "DistilBertTokenizer", "DistilBertTokenizerFast")
        names = dict.fromkeys(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"), {})
        config, added = read_beside(path.parent, vocab, classes, names)
        cleaning = {"handle_chinese_chars": config.get("tokenize_chinese_chars", True), "clean_text": True,
                    "strip_accents": config.get("strip_accents"), "lowercase": config.get("do_lower_case", True)}
        return {"version": "1.0", "added_tokens": added, "normalizer": {"type": "BertNormalizer", **cleaning},
                "pre_tokenizer": {"type": "BertPreTokenizer"}, "post_processor": None,
                "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": False},
                "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                          "max_input_chars_per_word": 100, "vocab": vocab}}

    def _setup(self, spec):
        model, decoder = spec["model"], spec.get("decoder") or {}
        require("model", model, type=("WordPiece",), vocab=ANY, unk_token=ANY, continuing_subword_prefix=("##",),
                max_input_chars_per_word=(100,))
        require("normalizer", spec.get("normalizer") or {"type": None}, type=("BertNormalizer",), clean_text=(True,),
                handle_chinese_chars=(True,), strip_accents=(None, True), lowercase=(True,))
        require("pre_tokenizer", spec.get("pre_tokenizer") or {"type": None}, type=("BertPreTokenizer",))
        self.unk_id, self._cleanup = self._vocab[model["unk_token"]], decoder.get("cleanup")

    def _normalize(self, text):
        """Odd characters out, lower case, accents off: "Le Café" -> "le cafe"."""
        if text.isascii() and text.isprintable():
            return text.lower()
        text = unicodedata.normalize("NFC", "".join(map(_clean_char, text)))
        return "".join(c for c in unicodedata.normalize("NFD", lower(text)) if unicodedata.category(c) != "Mn")

    def _word_ids(self, word):
        """"cafe!" -> the ids of "cafe" and of "!": every punctuation character stands apart."""
        # All of ASCII's symbols count as punctuation ("$" and "`" too), beyond ASCII only Unicode's categories P*.
        apart = [f" {c} " if unicodedata.category(c)[0] == "P" or c.isascii() and not c.isalnum() else c for c in word]
        return [i for part in "".join(apart).split() for i in self._longest_pieces(part)]

    def _longest_pieces(self, word):
        ids, start = [], 0
        while start < len(word) <= 100:
            prefix = "##" if start else ""
            ends = range(len(word), start, -1)
            end = next((end for end in ends if prefix + word[start:end] in self._vocab), None)
            if end is None:
                return [self.unk_id]
            ids.append(self._vocab[prefix + word[start:end]])
            start = end
        return ids or [self.unk_id]

    def decode(self, ids):
        """Ids -> text: tokens joined by spaces, "##" glued on. Case, accents and the original spacing are lost.

        A file may ask for `cleanup`: no space before . , ? and !
        """
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
        """Keep the words that occur at least min_count times, commonest first; then the special tokens.

        A word that is spelled like a special token is no word: only `encode` gives it that token's id.
        """
        counts = collections.Counter(word for text in texts for word in NOT_SPACE.findall(text))
        words = [word for word, n in counts.items() if n >= min_count and word not in ("<unk>", *special_tokens)]
        if not words:
            raise UserError(f"no word occurs {min_count} times; lower the minimum count")
        words.sort(key=lambda word: (-counts[word], word))
        vocab = {word: i for i, word in enumerate(["<unk>", *words])}
        tokenizer = cls({"version": "1.0", "added_tokens": [], "normalizer": None, "post_processor": None,
                         "pre_tokenizer": {"type": "WhitespaceSplit"}, "decoder": None,
                         "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"}})
        tokenizer.add_special_tokens(special_tokens)
        return tokenizer

    def _setup(self, spec):
        require("model", spec["model"], type=("WordLevel",), vocab=ANY, unk_token=ANY)
        require("file", {"normalizer": spec.get("normalizer"), "pre_tokenizer": spec.get("pre_tokenizer")},
                normalizer=(None,), pre_tokenizer=({"type": "WhitespaceSplit"},))
        self.unk_id = self._vocab[spec["model"]["unk_token"]]

    def _word_ids(self, word):
        i = self._vocab.get(word, self.unk_id)
        return [self.unk_id if i in self.special_ids else i]        # a special token is cut out of the text, or is none
