"""Text <-> token ids: byte-level BPE, trained here or with GPT-2's and CLIP's vocabularies.

BPE starts from the 256 bytes and replaces the most frequent neighbouring pair by a new token, again and again (Sennrich
et al. 2016; on bytes: GPT-2, Radford et al. 2019). Encoding repeats those merges. The first two functions are the whole
idea; the next two do the same in a hundredth of the time; the tokenizer around them reads and writes files (vocab.py).

CLIP's text is cleaned as in `tokenizers` (NFC, runs of white space to one space, lower case), without the original
code's ftfy and HTML unescaping. "Letter" follows the `regex` package, whose Unicode may be newer than another's."""
import collections
import heapq
import re
import unicodedata

import regex

from .config import UserError
from .files import read_json
from .vocab import END, SPECIAL_TOKENS, Tokenizer, added_tokens, require
from .wordpiece import WordPieceTokenizer, WordTokenizer, lower

# How GPT-2 cuts text into words; merges never cross a cut. "Hello  world\n" -> "Hello", " ", " world", "\n".
GPT2_WORDS = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
GPT2_WORDS_ASCII = re.compile(  # the same cuts for pure ASCII, twice as fast: no Unicode tables, commonest case first
    r" ?[A-Za-z]+|'(?:[stmd]|re|ve|ll)| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+", re.ASCII)

# A printable character for each byte, so that a vocabulary is readable text without spaces: 33-126, 161-172 and 174-255
# stand for themselves, the other 68 take U+0100 upwards: space -> "Ġ", newline -> "Ċ". This is also the order of the
# ids 0..255 in GPT-2's vocabulary and in ours.
PLAIN = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE_CHAR = {byte: chr(byte) for byte in PLAIN}
BYTE_CHAR |= {byte: chr(256 + n) for n, byte in enumerate(sorted({*range(256)} - {*PLAIN}))}
CHAR_BYTE = {char: byte for byte, char in BYTE_CHAR.items()}


def spell(word):
    """Its UTF-8 bytes as characters: " café" -> ["Ġ", "c", "a", "f", "Ã", "©"]. Half a UTF-16 pair reads as "?"."""
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
                counts[pair] += word_counts[word]                                 # as often as its word
        if not counts:
            break
        best = min(counts, key=lambda pair: (-counts[pair], order.index(pair[0]), order.index(pair[1])))
        merges.append(best)
        order.append("".join(best))                                               # its id comes next
        words = {word: replace_pair(tokens, best, "".join(best)) for word, tokens in words.items()}
    return merges


def naive_encode(word, merges):
    """Of the pairs in the word, merge the one that was learned first; repeat until none is known."""
    tokens = spell(word)
    while known := [pair for pair in zip(tokens, tokens[1:]) if pair in merges]:
        i = list(zip(tokens, tokens[1:])).index(min(known, key=merges.index))
        tokens[i:i + 2] = [tokens[i] + tokens[i + 1]]                             # u g -> ug
    return tokens


def replace_pair(tokens, pair, new):
    """All occurrences, left to right: [1, 1, 1, 2] with (1, 1) -> 9 becomes [9, 1, 2]."""
    out, i = [], 0
    while i < len(tokens):
        found = i + 1 < len(tokens) and (tokens[i], tokens[i + 1]) == pair
        out.append(new if found else tokens[i])
        i += 2 if found else 1                                                    # nothing is merged twice
    return out


# ---- the same, fast

def learn_merges(word_counts, vocab_size):
    """`naive_merges` up to a vocabulary's size; returns (vocab {token: id}, merges [(left, right), ...]).

    Pairs are counted once; a merge then revisits only the words its pair lives in, and every pair whose count changes
    goes onto a heap with its new count; entries that are outdated are dropped when they come up.
    Ties go to the lowest pair of ids, so the result depends on the counts alone, not on the order of the texts.
    Pairs seen once are merged too; training stops early when no pair is left (min_frequency 0 in `tokenizers`)."""
    vocab, merges = {char: i for i, char in enumerate(CHAR_BYTE)}, []
    words, freqs = [spell(word) for word in word_counts], [*word_counts.values()]  # of word w
    count, change, where, heap = collections.Counter(), collections.Counter(), collections.defaultdict(set), []
    for w, tokens in enumerate(words):
        for pair in zip(tokens, tokens[1:]):
            change[pair] += freqs[w]
            where[pair].add(w)
    while len(vocab) < vocab_size:
        for pair, n in change.items():
            count[pair] += n
            if n and count[pair]:
                heapq.heappush(heap, (-count[pair], vocab[pair[0]], vocab[pair[1]], pair))
        while heap and count[heap[0][3]] != -heap[0][0]:
            heapq.heappop(heap)
        if not heap:
            break
        best = heapq.heappop(heap)[3]
        new = "".join(best)
        merges.append(best)
        vocab.setdefault(new, len(vocab))                   # two different pairs may spell the same token
        change.clear()
        for w in where.pop(best):                                                 # the words that hold it
            for old in zip(words[w], words[w][1:]):
                change[old] -= freqs[w]                                           # what it was
            words[w] = replace_pair(words[w], best, new)                          # h u g s -> h ug s
            for pair in zip(words[w], words[w][1:]):
                change[pair] += freqs[w]
                where[pair].add(w)
    return vocab, merges


def apply_merges(tokens, ranks):
    """`naive_encode` in n log n steps: a heap of (rank, place) finds the next pair, linked lists its neighbours. ranks:
    {(left, right): when it was learned}. With ("u", "g"): 0 and ("h", "ug"): 1, h u g goes to h ug, then hug. A merged
    pair keeps its left place; its right place becomes None. Outdated heap entries are skipped as they come up."""
    end = len(tokens)
    before, after = list(range(-1, end - 1)), list(range(1, end + 1))             # each place's neighbours
    heap = [(ranks[pair], i) for i, pair in enumerate(zip(tokens, tokens[1:])) if pair in ranks]
    heapq.heapify(heap)
    while heap:
        rank, i = heapq.heappop(heap)
        j = after[i]
        if j == end or ranks.get((tokens[i], tokens[j])) != rank:           # a rank names one pair
            continue
        tokens[i], tokens[j] = tokens[i] + tokens[j], None                        # u, g -> ug, None
        k = after[i] = after[j]                                                   # j drops out of the list
        if k < end:
            before[k] = i
        for a, b in ((before[i], i), (i, k)):
            if a >= 0 and b < end and (tokens[a], tokens[b]) in ranks:
                heapq.heappush(heap, (ranks[tokens[a], tokens[b]], a))
    return [token for token in tokens if token]


# ---- the two kinds, as parts of a tokenizer.json

CLIP_START, SPACES = "<|startoftext|>", regex.compile(r"\s+")
CLIP_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"       # white space is dropped
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
GPT2_PARTS = {"pre_tokenizer": BYTE_LEVEL, "decoder": BYTE_LEVEL}
CLIP_CLEANING = {"type": "Sequence", "normalizers": [
    {"type": "NFC"}, {"type": "Replace", "pattern": {"Regex": SPACES.pattern}, "content": " "}, {"type": "Lowercase"}]}
CLIP_SPLITS = [[{"type": "Split", "pattern": {"Regex": names + CLIP_WORDS}, "behavior": "Removed", "invert": True}]
               for names in ("", r"<\|startoftext\|>|<\|endoftext\|>|")]            # newer files cut at the two names


class BPETokenizer(Tokenizer):
    """Byte-level BPE: any text can be encoded, and (GPT-2's kind) decode(encode(text)) == text.

    >>> tok = BPETokenizer.train(["a dog", "a dog runs"], vocab_size=256 + 3 + 1, special_tokens=["<image>"])
    >>> tok.encode("<image>a dog")      # the bytes have ids 0..255; merges: "do", " do", " dog"; then the special token
    [259, 64, 258]
    """
    kind, old_name = "BPE", "vocab.json"

    @classmethod
    def train(cls, texts, vocab_size, special_tokens=SPECIAL_TOKENS):
        """Learn a vocabulary: 256 bytes, then merges, then the special tokens on the last ids; `vocab_size` counts all.
        Special tokens inside the texts are cut out and teach nothing. A small corpus may run out of pairs, which leaves
        the vocabulary smaller."""
        n_merges = vocab_size - 256 - len(set(special_tokens))
        if n_merges < 0:
            raise UserError(f"vocab_size {vocab_size} has no room for bytes and special tokens; add {-n_merges}")
        cut = re.compile("|".join(map(re.escape, sorted(special_tokens, key=len, reverse=True))) or "(?!)")
        counts = collections.Counter()          # merges never cross words: distinct words with their counts are enough
        for text in texts:
            for piece in cut.split(text):
                counts.update(_gpt2_words(piece))
        vocab, merges = learn_merges(counts, 256 + n_merges)                      # {token: id}, pairs
        tokenizer = cls(GPT2_PARTS | {"model": {"type": "BPE", "vocab": vocab, "merges": [*map(" ".join, merges)]}})
        tokenizer.add_special_tokens(special_tokens)
        return tokenizer

    @staticmethod
    def old_layout(path):
        """vocab.json, with merges.txt and small files beside it -> tokenizer.json."""
        vocab, lines = read_json(path), path.with_name("merges.txt").read_text(encoding="utf-8").split("\n")
        merges = [line for line in lines if line and not line.startswith("#version")]
        clip, model = CLIP_START in vocab, {"type": "BPE", "vocab": vocab, "merges": merges}
        spec = GPT2_PARTS | {"added_tokens": added_tokens(vocab, (CLIP_START, END), normalized=clip)}
        if not clip:
            return spec | {"model": model}
        return spec | {"model": model | {"unk_token": END, "end_of_word_suffix": "</w>"}, "normalizer": CLIP_CLEANING,
                       "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*CLIP_SPLITS[0], BYTE_LEVEL]},
                       "post_processor": {"type": "RobertaProcessing", "sep": [END, vocab[END]], "trim_offsets": False,
                                          "cls": [CLIP_START, vocab[CLIP_START]], "add_prefix_space": False}}

    def _setup(self, spec):
        model, split, vocab = spec["model"], spec["pre_tokenizer"] or {}, self._vocab
        settings = {key: value for key, value in model.items() if value and key not in ("vocab", "merges", "unk_token")}
        require("model", {"type": "BPE"} | settings, {"type": "BPE"}, {"type": "BPE", "end_of_word_suffix": "</w>"})
        self._suffix = model.get("end_of_word_suffix") or ""
        require("normalizer", spec["normalizer"], CLIP_CLEANING if self._suffix else None)
        *cuts, last = split.get("pretokenizers", [split])
        require("pre_tokenizer", cuts, *(CLIP_SPLITS if self._suffix else [[]]))
        require("pre_tokenizer", last, BYTE_LEVEL)
        require("decoder", spec["decoder"] and spec["decoder"]["type"], None, "ByteLevel")      # its flags do nothing
        self._clip_words = regex.compile(cuts[0]["pattern"]["Regex"]) if cuts else None
        pairs = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]  # "a b" is old
        require("merges", [pair for pair in pairs if len(pair) != 2 or "".join(pair) not in vocab][:1], [])
        self._ranks = {pair: rank for rank, pair in enumerate(pairs)}             # 0: learned first
        # A byte the vocabulary lacks becomes unk_token, or nothing without one, as in `tokenizers`.
        self._unk = model.get("unk_token") if model.get("unk_token") in vocab else None

    def _normalize(self, text):
        return lower(SPACES.sub(" ", unicodedata.normalize("NFC", text))) if self._suffix else text

    def _words(self, text):
        if not self._suffix:
            return _gpt2_words(text)
        return [word for piece in self._clip_words.findall(text) for word in _gpt2_words(piece)]

    def _word_ids(self, word):
        *chars, last = spell(word)
        tokens = [char if char in self._vocab else self._unk for char in (*chars, last + self._suffix)]
        return [self._vocab[token] for token in apply_merges([token for token in tokens if token], self._ranks)]

    def decode(self, ids):
        """Ids -> text. Bytes that are not UTF-8 show as U+FFFD; ids without a name are left out. CLIP's kind has lost
        case and white space: a word's </w> becomes one space, and the ends are stripped."""
        data, added = bytearray(), {token["id"] for token in self._spec["added_tokens"]}
        for i in ids:
            name = self.id_to_token(i) or ""
            data += name.encode(errors="replace") if i in added else bytes(CHAR_BYTE.get(char, 63) for char in name)
        text = data.decode("utf-8", errors="replace")
        return text.replace(self._suffix, " ").strip() if self._suffix else text


def _gpt2_words(text):
    return (GPT2_WORDS_ASCII if text.isascii() else GPT2_WORDS).findall(text)


load_tokenizer = Tokenizer.load         # any kind: BPE, and from wordpiece.py WordPiece and whole words
