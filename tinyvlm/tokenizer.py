"""Text <-> token ids: byte-level BPE, trained here or with GPT-2's and CLIP's vocabularies.

BPE starts from the 256 bytes and replaces the most frequent neighbouring pair by a new token, again and again (Sennrich
et al. 2016; on bytes: GPT-2, Radford et al. 2019). Encoding repeats those merges. The first two functions are the whole
idea; the next two do the same in a hundredth of the time; the tokenizer around them reads and writes files (vocab.py).

Two kinds and no others: GPT-2's, and CLIP's, whose text is cleaned as in `tokenizers` (NFC, runs of white space to one
space, lower case), without the original code's ftfy and HTML unescaping. "Letter" follows the Unicode edition of the
`regex` package, which may be newer than another library's.
"""
import collections
import heapq
import re
import unicodedata

import regex

from .config import UserError
from .files import read_json
from .vocab import ANY, END, SPECIAL_TOKENS, Tokenizer, load, read_beside, require
from .wordpiece import WordPieceTokenizer, WordTokenizer, lower

CLIP_START = "<|startoftext|>"

# How GPT-2 cuts text into words; merges never cross a cut. "Hello  world\n" -> "Hello", " ", " world", "\n".
GPT2_WORDS = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
GPT2_WORDS_ASCII = re.compile(  # the same cuts for pure ASCII, twice as fast: no Unicode tables, commonest case first
    r" ?[A-Za-z]+|'(?:[stmd]|re|ve|ll)| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+", re.ASCII)
CLIP_WORDS = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")     # white space is dropped


def _byte_alphabet():
    """{byte: character}: a printable character for each byte, so that a vocabulary is readable text without spaces.

    33-126, 161-172 and 174-255 stand for themselves; the other 68 take U+0100 upwards: space -> "Ġ", newline -> "Ċ".
    Sorted by character, which is also the order of ids 0..255 in GPT-2's vocabulary and in ours.
    """
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in plain]
    return {**{byte: chr(byte) for byte in plain}, **{byte: chr(256 + n) for n, byte in enumerate(hidden)}}


BYTE_CHAR = _byte_alphabet()
CHAR_BYTE = {char: byte for byte, char in BYTE_CHAR.items()}


def spell(word):
    """Its UTF-8 bytes as characters: " café" -> ["Ġ", "c", "a", "f", "Ã", "©"]."""
    return [BYTE_CHAR[byte] for byte in word.encode("utf-8", errors="replace")]


# ---- BPE as the paper has it

def naive_merges(word_counts, n_merges):
    """Count all neighbouring pairs, merge the most frequent one, repeat.

    >>> naive_merges({"hug": 10, "pug": 5, "hugs": 5}, 2)       # ug: 20 times; then hug: 15
    [('u', 'g'), ('h', 'ug')]
    """
    words, order, merges = {word: spell(word) for word in word_counts}, list(CHAR_BYTE), []
    while len(merges) < n_merges:
        counts = collections.Counter()
        for word, tokens in words.items():
            for pair in zip(tokens, tokens[1:]):
                counts[pair] += word_counts[word]
        if not counts:
            break
        best = min(counts, key=lambda pair: (-counts[pair], order.index(pair[0]), order.index(pair[1])))
        merges.append(best)
        order.append("".join(best))
        words = {word: replace_pair(tokens, best, "".join(best)) for word, tokens in words.items()}
    return merges


def naive_encode(word, merges):
    """Of the pairs in the word, merge the one that was learned first; repeat until none is known."""
    tokens = spell(word)
    while known := [pair for pair in zip(tokens, tokens[1:]) if pair in merges]:
        i = list(zip(tokens, tokens[1:])).index(min(known, key=merges.index))
        tokens[i:i + 2] = [tokens[i] + tokens[i + 1]]
    return tokens


def replace_pair(tokens, pair, new):
    """All occurrences, left to right: [1, 1, 1, 2] with (1, 1) -> 9 becomes [9, 1, 2]."""
    out, i = [], 0
    while i < len(tokens):
        found = i + 1 < len(tokens) and (tokens[i], tokens[i + 1]) == pair
        out.append(new if found else tokens[i])
        i += 2 if found else 1
    return out


# ---- the same, fast

def learn_merges(word_counts, vocab_size):
    """`naive_merges` up to a vocabulary's size; returns (vocab {token: id}, merges [(left, right), ...]).

    Pairs are counted once; a merge then revisits only the words its pair lives in. The heap may hold outdated counts
    (they only fall, except for pairs with the new token, which are pushed afresh), so each is checked when it comes up.
    Ties go to the lowest pair of ids, so the result depends on the counts alone, not on the order of the texts.
    Pairs seen once are merged too; training stops early when no pair is left (min_frequency 0 in `tokenizers`).
    """
    vocab = {char: i for i, char in enumerate(CHAR_BYTE)}
    names, merges = list(vocab), []
    words, freqs = [[vocab[char] for char in spell(word)] for word in word_counts], list(word_counts.values())
    count, where = collections.Counter(), collections.defaultdict(set)
    for w, ids in enumerate(words):
        for pair in zip(ids, ids[1:]):
            count[pair] += freqs[w]
            where[pair].add(w)
    heap = [(-n, pair) for pair, n in count.items()]
    heapq.heapify(heap)
    while heap and len(vocab) < vocab_size:
        negative, pair = heapq.heappop(heap)
        if count[pair] != -negative:
            if count[pair] > 0:
                heapq.heappush(heap, (-count[pair], pair))
            continue
        left, right = names[pair[0]], names[pair[1]]
        merges.append((left, right))
        new = vocab.setdefault(left + right, len(vocab))    # two different pairs may spell the same token
        names[new:new + 1] = [left + right]
        created = set()
        for w in where.pop(pair):
            for old in zip(words[w], words[w][1:]):
                count[old] -= freqs[w]
            words[w] = replace_pair(words[w], pair, new)
            for fresh in zip(words[w], words[w][1:]):
                count[fresh] += freqs[w]
                if new in fresh:
                    where[fresh].add(w)
                    created.add(fresh)
        for fresh in created:
            heapq.heappush(heap, (-count[fresh], fresh))
    return vocab, merges


def apply_merges(ids, merges):
    """`naive_encode` on ids in n log n steps: a heap of (rank, place) finds the next pair, linked lists its neighbours.

    merges: {(left id, right id): (rank, new id)}. With ug = 3 and hug = 4, h u g = [0, 1, 2] goes to [0, 3], then [4].
    A merged pair keeps its left place; its right place becomes None. Outdated heap entries are skipped as they come up.
    """
    end, never = len(ids), (None, None)
    before, after = list(range(-1, end - 1)), list(range(1, end + 1))
    heap = [(merges[pair][0], i) for i, pair in enumerate(zip(ids, ids[1:])) if pair in merges]
    heapq.heapify(heap)
    while heap:
        rank, i = heapq.heappop(heap)
        j = after[i]
        if j == end or merges.get((ids[i], ids[j]), never)[0] != rank:      # a rank names one pair
            continue
        ids[i], ids[j] = merges[ids[i], ids[j]][1], None
        k = after[i] = after[j]
        if k < end:
            before[k] = i
        for a, b in ((before[i], i), (i, k)):
            if a >= 0 and b < end and (ids[a], ids[b]) in merges:
                heapq.heappush(heap, (merges[ids[a], ids[b]][0], a))
    return [i for i in ids if i is not None]


# ---- the two kinds, as parts of a tokenizer.json

SPACES = regex.compile(r"\s+")
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
CLIP_CLEANING = [{"type": "NFC"}, {"type": "Replace", "pattern": {"Regex": SPACES.pattern}, "content": " "},
                 {"type": "Lowercase"}]
CLIP_SPLIT = {"type": "Split", "pattern": {"Regex": CLIP_WORDS.pattern}, "behavior": "Removed", "invert": True}
CLIP_PATTERNS = [{"Regex": start + CLIP_WORDS.pattern} for start in ("", r"<\|startoftext\|>|<\|endoftext\|>|")]


def gpt2_spec(vocab, merges, added=()):
    """The tokenizer.json of GPT-2's kind."""
    return {"version": "1.0", "added_tokens": [*added], "normalizer": None, "pre_tokenizer": BYTE_LEVEL,
            "post_processor": None, "decoder": BYTE_LEVEL, "model": {"type": "BPE", "vocab": vocab, "merges": merges}}


def clip_spec(vocab, merges, added):
    """The tokenizer.json of CLIP's kind: the text is cleaned, white space dropped, "</w>" ends a word; with a frame."""
    spec = gpt2_spec(vocab, merges, added)
    return spec | {
        "normalizer": {"type": "Sequence", "normalizers": CLIP_CLEANING},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [CLIP_SPLIT, BYTE_LEVEL]},
        "post_processor": {"type": "RobertaProcessing", "cls": [CLIP_START, vocab[CLIP_START]],
                           "sep": [END, vocab[END]], "trim_offsets": False, "add_prefix_space": False},
        "model": spec["model"] | {"unk_token": END, "end_of_word_suffix": "</w>"}}


class BPETokenizer(Tokenizer):
    """Byte-level BPE: any text can be encoded, and (GPT-2's kind) decode(encode(text)) == text.

    >>> tok = BPETokenizer.train(["a dog", "a dog runs"], vocab_size=256 + 3 + 1, special_tokens=["<image>"])
    >>> tok.encode("<image>a dog")      # the bytes have ids 0..255; merges: "do", " do", " dog"; then the special token
    [259, 64, 258]
    """
    kind = "BPE"

    @classmethod
    def train(cls, texts, vocab_size, special_tokens=SPECIAL_TOKENS):
        """Learn a vocabulary: 256 bytes, then merges, then the special tokens on the last ids; `vocab_size` counts all.

        texts: strings; special tokens inside them are cut out and teach nothing. A small corpus may run out of pairs,
        which leaves the vocabulary smaller. Raises UserError when vocab_size has no room for the bytes.
        """
        assert not isinstance(texts, str), "train takes a list of texts, not one string"
        special_tokens = list(dict.fromkeys(special_tokens))
        least = 256 + len(special_tokens)
        if vocab_size < least:
            raise UserError(f"vocab_size {vocab_size} is too small for 256 bytes and {least - 256} special tokens; use "
                            f"{least} or more")
        cut = re.compile("|".join(map(re.escape, sorted(special_tokens, key=len, reverse=True))) or "(?!)")
        counts = collections.Counter()          # merges never cross words: distinct words with their counts are enough
        for text in texts:
            for piece in cut.split(text):
                counts.update(_gpt2_words(piece))
        vocab, merges = learn_merges(counts, vocab_size - len(special_tokens))
        tokenizer = cls(gpt2_spec(vocab, [" ".join(pair) for pair in merges]))
        tokenizer.add_special_tokens(special_tokens)
        return tokenizer

    @staticmethod
    def old_layout(path):
        """vocab.json, with merges.txt and small files beside it -> tokenizer.json."""
        vocab = read_json(path)
        lines = path.with_name("merges.txt").read_text(encoding="utf-8").split("\n")
        merges = [line for line in lines if line and not line.startswith("#version")]
        if CLIP_START in vocab:
            names = dict.fromkeys((CLIP_START, END), {"normalized": True})
            config, added = read_beside(path.parent, vocab, ("CLIPTokenizer", "CLIPTokenizerFast"), names)
            return clip_spec(vocab, merges, added)
        config, added = read_beside(path.parent, vocab, ("GPT2Tokenizer", "GPT2TokenizerFast"), {END: {}})
        split = BYTE_LEVEL | {"add_prefix_space": bool(config.get("add_prefix_space"))}
        return gpt2_spec(vocab, merges, added) | {"pre_tokenizer": split}

    def _setup(self, spec):
        model, vocab, split = spec["model"], self._vocab, spec.get("pre_tokenizer") or {"type": None}
        require("model", model, type=("BPE",), vocab=ANY, merges=ANY, unk_token=ANY, end_of_word_suffix=ANY,
                continuing_subword_prefix=(None, ""), dropout=(None, 0), fuse_unk=(None, False),
                byte_fallback=(None, False), ignore_merges=(None, False))
        require("normalizer", spec.get("normalizer") or {}, type=("Sequence",), normalizers=(CLIP_CLEANING,))
        *cuts, last = split["pretokenizers"] if split["type"] == "Sequence" else [split]
        require("pre_tokenizer", last, type=("ByteLevel",), add_prefix_space=(False, not cuts), trim_offsets=ANY,
                use_regex=(True,))
        for part in cuts:
            require("pre_tokenizer", part, **{name: (value,) for name, value in CLIP_SPLIT.items()} | {
                "pattern": CLIP_PATTERNS})
        self._cleans, self._prefix_space = spec.get("normalizer"), last["add_prefix_space"]
        self._clip_words = regex.compile(cuts[0]["pattern"]["Regex"]) if cuts else None
        # A byte the vocabulary lacks becomes unk_token, or nothing without one, as in `tokenizers`.
        self._suffix, unk = model.get("end_of_word_suffix") or "", vocab.get(model.get("unk_token"))
        self._byte_ids = {char: vocab.get(char, unk) for char in CHAR_BYTE}
        self._last_ids = {char: vocab.get(char + self._suffix, unk) for char in CHAR_BYTE}
        self._merges = {}       # {(left id, right id): (rank, new id)}; old files spell a merge "a b", newer ["a", "b"]
        for rank, pair in enumerate(model["merges"]):
            left, right = pair.split(" ") if isinstance(pair, str) else pair
            self._merges[vocab[left], vocab[right]] = rank, vocab[left + right]

    def _normalize(self, text):
        return lower(SPACES.sub(" ", unicodedata.normalize("NFC", text))) if self._cleans else text

    def _words(self, text):
        if self._clip_words:
            return [word for piece in self._clip_words.findall(text) for word in _gpt2_words(piece)]
        return _gpt2_words(" " + text if self._prefix_space and text[0] != " " else text)

    def _word_ids(self, word):
        *chars, last = spell(word)
        ids = [*map(self._byte_ids.get, chars), self._last_ids[last]]
        return apply_merges([i for i in ids if i is not None], self._merges)

    def decode(self, ids):
        """Ids -> text. Bytes that are not UTF-8 show as U+FFFD; ids without a name are left out.

        CLIP's kind has lost case and white space: a word's </w> becomes one space, and the ends are stripped.
        """
        out = bytearray()
        for name in (self._names[i] for i in ids if i in self._names):
            word = name.removesuffix(self._suffix)
            data = [CHAR_BYTE.get(char) for char in word]
            foreign = name in self._added or None in data               # not in the byte alphabet
            out += name.encode("utf-8", errors="replace") if foreign else bytes(data) + b" " * (word != name)
        text = out.decode("utf-8", errors="replace")
        return text.strip() if self._suffix else text


def _gpt2_words(text):
    return (GPT2_WORDS_ASCII if text.isascii() else GPT2_WORDS).findall(text)


def load_tokenizer(path):
    """Open any kind from a tokenizer.json, a vocab.txt, or a folder that holds one or vocab.json + merges.txt.

    Raises UserError naming the file and its fault: missing, broken, or with a component that is not read here.
    """
    return load(path, {cls.kind: cls for cls in (BPETokenizer, WordPieceTokenizer, WordTokenizer)})
