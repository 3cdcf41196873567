"""Text <-> token ids: byte-level BPE (trained here, or GPT-2's and CLIP's vocabularies), BERT's WordPiece, whole words.

BPE starts from the 256 bytes and replaces the most frequent neighbouring pair by a new token, again and again (Sennrich
et al. 2016; on bytes: GPT-2, Radford et al. 2019). Encoding replays those merges in the order they were learned.
A tokenizer lives in one `tokenizer.json`, the file format of Hugging Face's `tokenizers` library, which opens what
`save` writes and encodes with it identically. A component we do not know is refused by name rather than guessed.

Left out: offsets, padding and text pairs; a file's own truncation and padding settings are not applied. CLIP's text is
cleaned as in `tokenizers` (NFC, runs of white space to one space, lower case), without the original code's ftfy and
HTML unescaping. "Letter" follows the Unicode edition of the `regex` package, which may be newer than another library's.
"""
import collections
import functools
import heapq
import json
import math
import re
import unicodedata
from pathlib import Path

import regex

from .config import UserError
from .weights import atomic_write, read_json

SPECIAL_TOKENS = ("<|endoftext|>", "<image>", "<|system|>", "<|user|>", "<|assistant|>")
CACHE_WORDS = 1 << 16       # distinct words remembered with their ids: captions repeat the same few thousand
LONG_WORD = 64              # bytes: longer words take the heap instead of the plain loop, and are not remembered

# How GPT-2 cuts text into words; merges never cross a cut. "Hello  world\n" -> "Hello", " ", " world", "\n".
GPT2_WORDS = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
GPT2_WORDS_ASCII = re.compile(  # the same cuts for pure ASCII, twice as fast: no Unicode tables, commonest case first
    r" ?[A-Za-z]+|'(?:[stmd]|re|ve|ll)| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+", re.ASCII)
CLIP_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
# CJK ideographs, which BERT takes one by one (kana and hangul are cut like letters).
IDEOGRAPH = re.compile("[\u4e00-\u9fff\u3400-\u4dbf\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002b73f"
                       "\U0002b740-\U0002b81f\U0002b820-\U0002ceaf\U0002f800-\U0002fa1f]")
SPACES, WORD_CHAR = regex.compile(r"\s*"), regex.compile(r"\w")


# ---- the pieces of BPE: an alphabet for bytes, learning merges, applying merges

def _byte_alphabet():
    """{byte: character}: a printable character for each byte, so that a vocabulary is readable text without spaces.

    33-126, 161-172 and 174-255 stand for themselves; the other 68 take U+0100 upwards: space -> "Ġ", newline -> "Ċ".
    Sorted by character, which is also the order of ids 0..255 in GPT-2's vocabulary and in ours.
    """
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in plain]
    return {**{byte: chr(byte) for byte in plain}, **{byte: chr(256 + n) for n, byte in enumerate(hidden)}}


BYTE_CHAR = _byte_alphabet()
CHAR_BYTE = str.maketrans({char: chr(byte) for byte, char in BYTE_CHAR.items()})    # for str.translate, then latin-1


def _gpt2_words(text):
    return (GPT2_WORDS_ASCII if text.isascii() else GPT2_WORDS).findall(text)


def _utf8(word):
    """A lone surrogate (half of a UTF-16 pair, not a character) has no UTF-8 bytes: it is read as "?"."""
    return word.encode("utf-8", errors="replace")


def _replace_pair(ids, pair, new):
    """All occurrences, left to right: [1, 1, 1, 2] with (1, 1) -> 9 becomes [9, 1, 2]."""
    out, i = [], 0
    while i < len(ids):
        found = i + 1 < len(ids) and (ids[i], ids[i + 1]) == pair
        out.append(new if found else ids[i])
        i += 2 if found else 1
    return out


def learn_merges(word_counts, vocab_size):
    """Learn BPE merges from {word: count}; returns (vocab {token: id}, merges [(left, right), ...]).

    >>> learn_merges({"hug": 10, "pug": 5, "hugs": 5}, 256 + 2)[1]      # ug: 20 times; then hug: 15
    [('u', 'g'), ('h', 'ug')]

    Pairs are counted once; a merge then revisits only the words its pair lives in. The heap may hold outdated counts
    (they only fall, except for pairs with the new token, which are pushed afresh), so each is checked when it comes up.
    Ties go to the lowest pair of ids, so the result depends on the counts alone, not on the order of the texts.
    Pairs seen once are merged too; training stops early when no pair is left (min_frequency 0 in `tokenizers`).
    """
    vocab = {char: i for i, char in enumerate(BYTE_CHAR.values())}
    names, merges = list(vocab), []
    words = [[vocab[BYTE_CHAR[byte]] for byte in _utf8(word)] for word in word_counts]
    freqs = list(word_counts.values())
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
        grown = set()
        for w in where.pop(pair):
            for old in zip(words[w], words[w][1:]):
                count[old] -= freqs[w]
            words[w] = _replace_pair(words[w], pair, new)
            for fresh in zip(words[w], words[w][1:]):
                count[fresh] += freqs[w]
                if new in fresh:
                    where[fresh].add(w)
                    grown.add(fresh)
        for fresh in grown:
            heapq.heappush(heap, (-count[fresh], fresh))
    return vocab, merges


def merge_short(ids, merges):
    """Apply merges to one word: again and again the pair learned earliest (lowest rank), the leftmost one first.

    merges: {(left id, right id): (rank, new id)}. With ug = 3 and hug = 4, h u g = [0, 1, 2] goes to [0, 3], then [4].
    Quadratic in the word's length, and the fastest way for ordinary words.
    """
    never = (math.inf, -1)
    found = [merges.get(pair, never) for pair in zip(ids, ids[1:])]     # found[i]: the merge of ids[i] and ids[i + 1]
    while found and (best := min(found)) is not never:
        i = found.index(best)
        ids[i:i + 2] = [best[1]]
        start = max(i - 1, 0)                                           # only the new token's neighbours change
        found[start:i + 2] = [merges.get(pair, never) for pair in zip(ids[start:i + 1], ids[start + 1:i + 2])]
    return ids


def merge_long(ids, merges):
    """The same result in n log n steps: a heap of (rank, place) finds the next pair, a linked list joins neighbours.

    A merged pair keeps its left place; its right place becomes None. Outdated heap entries are skipped as they come up.
    """
    never, end = (math.inf, -1), len(ids)
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


# ---- the components of a tokenizer.json: each dict {"type": ...} becomes a function

def _parts(spec, inner):
    """A component, a (nested) Sequence of them, or null -> a flat list; `inner` is the Sequence's key."""
    if not spec:
        return []
    return [p for s in spec[inner] for p in _parts(s, inner)] if spec["type"] == "Sequence" else [spec]


def _refuse(place, what):
    raise UserError(f"the {place} {what} is not one tinyvlm knows; use a GPT-2, CLIP or uncased BERT kind of tokenizer")


def _pattern(spec):
    return regex.compile(spec["Regex"] if "Regex" in spec else regex.escape(spec["String"]))


def _lower(text):
    """Letter by letter, as `tokenizers` does; Python alone would turn a word-final Σ into ς."""
    return text.replace("Σ", "σ").lower()


def _normalizer(spec):
    """Text -> text, before the words are cut."""
    kind = spec["type"]
    if kind in ("NFC", "NFD", "NFKC", "NFKD"):
        return functools.partial(unicodedata.normalize, kind)
    if kind == "Lowercase":
        return _lower
    if kind == "Replace":
        pattern = _pattern(spec["pattern"])
        return lambda text: pattern.sub(lambda match: spec["content"], text)
    _refuse("normalizer", kind)


def _splitter(spec):
    """Text -> list of words."""
    kind = spec["type"]
    if kind == "ByteLevel":     # the byte alphabet itself is applied word by word, in BPETokenizer._word_ids
        words = _gpt2_words if spec.get("use_regex", True) else (lambda text: [text])
        if not spec["add_prefix_space"]:
            return words
        return lambda text: words(text if text.startswith(" ") else " " + text)
    if kind == "Digits":
        digits = {"Regex": r"\p{N}" if spec["individual_digits"] else r"\p{N}+"}
        spec = {"pattern": digits, "behavior": "Isolated", "invert": False}
    elif kind != "Split":
        _refuse("pre_tokenizer", kind)
    if spec["behavior"] not in ("Isolated", "Removed"):
        _refuse("pre_tokenizer", f"Split with behavior {spec['behavior']}")
    pattern, removed, invert = _pattern(spec["pattern"]), spec["behavior"] == "Removed", spec.get("invert", False)
    keep_gaps, keep_matches = not (removed and invert), invert or not removed

    def split(text):
        words, done = [], 0
        for match in pattern.finditer(text):
            words += [text[done:match.start()]] * keep_gaps + [match.group()] * keep_matches
            done = match.end()
        return [word for word in words + [text[done:]] * keep_gaps if word]
    return split


def _frame(spec):
    """The ids a post-processor puts before and after a text: [] [] for GPT-2, [49406] [49407] for CLIP."""
    before, after = [], []
    for part in _parts(spec, "processors"):
        if part["type"] in ("RobertaProcessing", "BertProcessing"):
            before, after = [part["cls"][1], *before], [*after, part["sep"][1]]
        elif part["type"] == "TemplateProcessing":
            at = [i for i, item in enumerate(part["single"]) if "Sequence" in item]
            if len(at) != 1:
                _refuse("post_processor", f"TemplateProcessing with {len(at)} texts")
            ids = [part["special_tokens"][item["SpecialToken"]["id"]]["ids"] if "SpecialToken" in item else []
                   for item in part["single"]]
            before, after = sum(ids[:at[0]], []) + before, after + sum(ids[at[0]:], [])
        elif part["type"] != "ByteLevel":       # ByteLevel only trims offsets
            _refuse("post_processor", part["type"])
    return before, after


# ---- reading and writing files

def _read_spec(path):
    """The tokenizer.json of a file or folder as a dict; older layouts are brought into that form."""
    path = Path(path)
    if path.is_dir():
        names = [name for name in ("tokenizer.json", "vocab.json", "vocab.txt") if (path / name).exists()]
        if not names:
            raise UserError(f"{path} holds no tokenizer.json, vocab.json + merges.txt or vocab.txt; name one that does")
        path /= names[0]
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".txt":
            vocab = {token: i for i, token in enumerate(text.removesuffix("\n").split("\n"))}
            config = path.with_name("tokenizer_config.json")
            return _wordpiece_spec(vocab, read_json(config) if config.exists() else {})
        spec = json.loads(text)
        if path.name == "vocab.json":
            lines = path.with_name("merges.txt").read_text(encoding="utf-8").split("\n")
            return _bpe_spec(spec, [line for line in lines if line and not line.startswith("#version")])
    except OSError as error:
        raise UserError(f"cannot read {error.filename} ({error.strerror}); name a tokenizer.json or folder") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is not a readable tokenizer ({error}); fetch it again") from None
    if not isinstance(spec, dict) or not isinstance(spec.get("model"), dict):
        raise UserError(f"{path} is not a tokenizer.json (it has no model); name one, or the folder that holds it")
    return spec


def _added_token(content, i, normalized=False):
    return {"id": i, "content": content, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": normalized, "special": True}


def _bpe_spec(vocab, merges):
    """The tokenizer.json for vocab.json + merges.txt: GPT-2's kind, or CLIP's, known by its <|startoftext|>."""
    start, end = "<|startoftext|>", "<|endoftext|>"
    clip = start in vocab
    split = byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    normalizer = frame = None
    if clip:
        one_space = {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "}
        normalizer = {"type": "Sequence", "normalizers": [{"type": "NFC"}, one_space, {"type": "Lowercase"}]}
        words = {"type": "Split", "pattern": {"Regex": CLIP_WORDS}, "behavior": "Removed", "invert": True}
        split = {"type": "Sequence", "pretokenizers": [words, byte_level]}
        frame = {"type": "RobertaProcessing", "cls": [start, vocab[start]], "sep": [end, vocab[end]],
                 "trim_offsets": False, "add_prefix_space": False}
    model = {"type": "BPE", "unk_token": end if clip else None, "end_of_word_suffix": "</w>" if clip else None,
             "vocab": vocab, "merges": merges}
    added = [_added_token(token, vocab[token], normalized=True) for token in (start, end) if token in vocab]
    return {"version": "1.0", "added_tokens": added, "normalizer": normalizer, "pre_tokenizer": split,
            "post_processor": frame, "decoder": byte_level, "model": model}


def _wordpiece_spec(vocab, config):
    """The tokenizer.json for BERT's vocab.txt; its tokenizer_config.json may tell of a cased one, which is refused."""
    names = [name for name in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if name in vocab]
    cleaning = {"clean_text": True, "handle_chinese_chars": config.get("tokenize_chinese_chars", True),
                "strip_accents": config.get("strip_accents"), "lowercase": config.get("do_lower_case", True)}
    return {"version": "1.0", "added_tokens": [_added_token(name, vocab[name]) for name in names],
            "normalizer": {"type": "BertNormalizer", **cleaning}, "pre_tokenizer": {"type": "BertPreTokenizer"},
            "post_processor": None, "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": False},
            "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                      "max_input_chars_per_word": 100, "vocab": vocab}}


# ---- what all kinds of tokenizer share

def _check_tokens(ids, added):
    """Refuse what would show late: an embedding has a row for every id, and a flag is read when its token is met."""
    for i in ids:
        if type(i) is not int or not 0 <= i < 2**24:            # to isinstance, True is an int too
            raise ValueError(f"the id {i!r:.40} is not a whole number from 0 and below 2**24")
    for token in added:
        flags = [token[name] for name in ("single_word", "lstrip", "rstrip", "normalized", "special")]
        if not (isinstance(token["content"], str) and token["content"] and all(type(flag) is bool for flag in flags)):
            raise ValueError(f"the added token of id {token['id']} has no text, or a flag that is not true or false")


class _Tokenizer:
    """Ids and names, and the special tokens, which are cut out of a text before anything else looks at it.

    A subclass brings `_setup` (read its components, and put a text's cleaning into `_normalize` if it has one),
    `_words` (clean text -> words), `_word_ids` (word -> ids) and `decode`.
    """

    def __init__(self, spec):
        self._spec, self._vocab = spec, spec["model"]["vocab"]
        self._normalize, self._before, self._after = str, [], []
        self._setup(spec)
        added = spec.get("added_tokens") or []
        _check_tokens([*self._vocab.values(), *self._before, *self._after, *(token["id"] for token in added)], added)
        self._cached_ids = functools.lru_cache(CACHE_WORDS)(self._word_ids)
        self._added = {token["content"]: token for token in added}
        self._index()

    def _index(self):
        """Everything that depends on the added tokens."""
        self._ids = self._vocab | {name: token["id"] for name, token in self._added.items()}
        self._names = {i: name for name, i in self._ids.items()}
        self._specials = {token["id"] for token in self._added.values() if token["special"]}
        # Some tokens are looked for in the text as given, the others then, after normalising both: CLIP's match in
        # capitals too. Of two that become one string the first counts (reversed: a dict keeps the last).
        early = {name: token for name, token in self._added.items() if not token["normalized"]}
        late = {self._normalize(name): token for name, token in reversed(self._added.items()) if token["normalized"]}
        late.pop("", None)                      # a lone accent, say, of which nothing is left
        self._early_finder, self._late_finder = _finder(early), _finder(late)

    @classmethod
    def load(cls, path):
        """`load_tokenizer`, sure of the kind. Raises UserError naming the fault."""
        tokenizer = load_tokenizer(path)
        if not isinstance(tokenizer, cls):
            raise UserError(f"{path} is no tokenizer for {cls.__name__}; use load_tokenizer, which opens any kind")
        return tokenizer

    def _whole_spec(self):
        added = sorted(self._added.values(), key=lambda token: token["id"])
        return self._spec | {"added_tokens": added, "truncation": None, "padding": None}

    def __reduce__(self):       # what pickle needs: a DataLoader hands its dataset to worker processes
        return type(self), (self._whole_spec(),)

    def save(self, path):
        """Write a tokenizer.json (into `path` if that is a folder), whole or not at all."""
        path = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
        atomic_write(path, lambda file: file.write(json.dumps(self._whole_spec(), ensure_ascii=False).encode()))

    @property
    def unk_id(self):
        """The id of "no such word", which a model should never learn to say, or None: byte-level BPE needs none."""
        return getattr(self, "_unk", None)

    @property
    def vocab_size(self):
        """Highest id + 1: the rows an embedding needs, even where a file leaves ids unused."""
        return max(self._names, default=-1) + 1

    def token_to_id(self, token):
        """The id of a token as the vocabulary spells it ("Ġdog", "<image>"), or None."""
        return self._ids.get(token)

    def id_to_token(self, i):
        """The spelling of an id, or None."""
        return self._names.get(i)

    def add_special_tokens(self, tokens):
        """Give each new token the next id at the end; returns how many ids that took.

        A token the vocabulary already spells keeps its id, and is from now on cut out whole.
        """
        assert not isinstance(tokens, str), f"add_special_tokens takes a list of tokens, not the one string {tokens!r}"
        size = end = self.vocab_size
        for name in dict.fromkeys(tokens):
            assert name, "a special token cannot be the empty string"
            token = self._added.get(name) or _added_token(name, self._ids.get(name, end))
            self._added[name] = token | {"special": True}
            end += name not in self._ids
        self._index()
        return end - size

    def _pieces(self, text, special):
        """Text -> plain strings (normalised) and the ids of added tokens, in order."""
        for piece in _cut(text, self._early_finder, special):
            if isinstance(piece, int):
                yield piece
            elif self._late_finder:
                yield from _cut(self._normalize(piece), self._late_finder, special)
            else:
                yield self._normalize(piece)

    def encode(self, text, special=True, max_length=None):
        """Text -> list of ids.

        special=False reads the strings of special tokens as ordinary text: for text from users, which must never turn
        into tags. max_length shortens the text's own ids so that the whole fits: CLIP's 77 still ends in 49407.
        """
        ids = []
        for piece in self._pieces(text, special):
            if isinstance(piece, int):
                ids.append(piece)
            else:
                self._encode_plain(piece, ids)
        if max_length is not None:
            room = max_length - len(self._before) - len(self._after)
            assert room >= 0, f"max_length {max_length} leaves no room for {self._before} and {self._after}"
            del ids[room:]
        return [*self._before, *ids, *self._after] if self._before or self._after else ids

    def _encode_plain(self, text, ids):
        for word in self._words(text):
            ids += self._cached_ids(word) if len(word) <= LONG_WORD else self._word_ids(word)

    def _names_of(self, ids, special):
        for i in ids:
            assert i in self._names, f"id {i} is not in this vocabulary of {self.vocab_size}"
            if special or i not in self._specials:
                yield self._names[i]


def _finder(tokens):
    """(pattern, {string: token}): any of these strings; of those that start at one place, the longest."""
    names = sorted(tokens, key=len, reverse=True)
    return (re.compile("|".join(map(re.escape, names))), tokens) if names else None


def _cut(text, finder, special=True):
    """Yield the plain strings between added tokens, and the tokens' ids; nothing for an empty string."""
    done = 0
    for match in finder[0].finditer(text) if finder else ():
        token, (start, stop) = finder[1][match.group()], match.span()
        if token["special"] and not special:
            continue
        if token["single_word"] and (start and WORD_CHAR.match(text, start - 1) or WORD_CHAR.match(text, stop)):
            continue
        # "<mask>" in "a <mask> b" may own the spaces on its left (lstrip) or right (rstrip).
        while token["lstrip"] and start > done and text[start - 1].isspace():
            start -= 1
        if token["rstrip"]:
            stop = SPACES.match(text, stop).end()
        if start > done:
            yield text[done:start]
        yield token["id"]
        done = stop
    if done < len(text):
        yield text[done:]


# ---- the three tokenizers

class BPETokenizer(_Tokenizer):
    """Byte-level BPE: any text can be encoded, and (GPT-2's kind) decode(encode(text)) == text.

    >>> tok = BPETokenizer.train(["a dog", "a dog runs"], vocab_size=256 + 3 + 1, special_tokens=["<image>"])
    >>> tok.encode("<image>a dog")      # the bytes have ids 0..255; merges: "do", " do", " dog"; then the special token
    [259, 64, 258]
    """

    @classmethod
    def train(cls, texts, vocab_size, special_tokens=SPECIAL_TOKENS):
        """Learn a vocabulary: 256 bytes, then merges, then the special tokens on the last ids; `vocab_size` counts all.

        texts: strings; special tokens inside them are cut out and teach nothing. A small corpus may run out of pairs,
        which leaves the vocabulary smaller. Raises UserError when vocab_size has no room for the bytes.
        """
        assert not isinstance(texts, str), "train takes a list of texts, not one string"
        special_tokens = list(dict.fromkeys(special_tokens))
        if vocab_size < 256 + len(special_tokens):
            raise UserError(f"vocab_size {vocab_size} is too small: 256 bytes and {len(special_tokens)} special tokens "
                            f"need at least {256 + len(special_tokens)}")
        finder = _finder({name: _added_token(name, 0) for name in special_tokens})
        counts = collections.Counter()          # merges never cross words: distinct words with their counts are enough
        for text in texts:
            for piece in _cut(text, finder):
                counts.update(_gpt2_words(piece) if isinstance(piece, str) else ())
        vocab, merges = learn_merges(counts, vocab_size - len(special_tokens))
        tokenizer = cls(_bpe_spec(vocab, [" ".join(pair) for pair in merges]))
        tokenizer.add_special_tokens(special_tokens)
        return tokenizer

    def _setup(self, spec):
        model, vocab = spec["model"], self._vocab
        steps = [_normalizer(part) for part in _parts(spec.get("normalizer"), "normalizers")]
        if steps:
            self._normalize = lambda text: functools.reduce(lambda t, step: step(t), steps, text)
        parts = _parts(spec.get("pre_tokenizer"), "pretokenizers")
        if [part["type"] for part in parts].count("ByteLevel") != 1 or parts[-1]["type"] != "ByteLevel":
            _refuse("pre_tokenizer", "without ByteLevel as its last step")
        self._splits = [_splitter(part) for part in parts]
        self._before, self._after = _frame(spec.get("post_processor"))
        for part in _parts(spec.get("decoder"), "decoders"):
            if part["type"] != "ByteLevel":
                _refuse("decoder", part["type"])
        for name in ("dropout", "continuing_subword_prefix"):
            if model.get(name):
                _refuse("model option", f"{name} {model[name]}")
        self._suffix, self._ignore_merges = model.get("end_of_word_suffix") or "", model.get("ignore_merges")
        # A byte the vocabulary lacks becomes unk_token, or nothing without one, as in `tokenizers`.
        unk = vocab[model["unk_token"]] if model.get("unk_token") else None
        self._byte_ids = [vocab.get(BYTE_CHAR[byte], unk) for byte in range(256)]
        self._last_ids = [vocab.get(BYTE_CHAR[byte] + self._suffix, unk) for byte in range(256)]
        for name in ("byte_fallback", "fuse_unk"):      # without effect while all bytes are there
            if model.get(name) and any(c + s not in vocab for c in BYTE_CHAR.values() for s in ("", self._suffix)):
                _refuse("model option", f"{name} for a vocabulary that lacks bytes")
        self._merges = {}       # {(left id, right id): (rank, new id)}; old files spell a merge "a b", newer ["a", "b"]
        for rank, pair in enumerate(model["merges"]):
            left, right = pair.split(" ") if isinstance(pair, str) else pair
            self._merges[vocab[left], vocab[right]] = rank, vocab[left + right]

    def _words(self, text):
        words = self._splits[0](text)           # GPT-2 has this one step; CLIP then cuts each word again, to no effect
        for split in self._splits[1:]:
            words = [word for piece in words for word in split(piece)]
        return words

    def _word_ids(self, word):
        data = _utf8(word)
        ids = [self._byte_ids[byte] for byte in data]
        ids[-1] = self._last_ids[data[-1]]
        merge = merge_short if len(data) <= LONG_WORD else merge_long
        ids = merge([i for i in ids if i is not None], self._merges)
        if self._ignore_merges:     # a word that is a token as a whole is taken as such
            whole = self._vocab.get("".join(map(BYTE_CHAR.get, data)))
            ids = ids if whole is None else [whole]
        return ids

    def decode(self, ids, special=True):
        """Ids -> text; special=False leaves the special tokens out. Bytes that are not UTF-8 show as U+FFFD.

        CLIP's kind has lost case and white space: a word's </w> becomes one space, and the ends are stripped.
        """
        out = bytearray()
        for name in self._names_of(ids, special):
            word = name.removesuffix(self._suffix)
            chars = word.translate(CHAR_BYTE)
            foreign = name in self._added or not chars.isascii() and max(chars) > "\xff"     # not in the byte alphabet
            out += _utf8(name) if foreign else chars.encode("latin-1") + b" " * (word != name)
        text = out.decode("utf-8", errors="replace")
        return text.strip() if self._suffix else text


class WordPieceTokenizer(_Tokenizer):
    """BERT's WordPiece, uncased: the longest known beginning of a word, then the longest "##..." continuation, ...

    "unaffable" -> un ##aff ##able. A word that fails anywhere, or has over 100 characters, becomes [UNK] as a whole.
    `encode` adds no [CLS] or [SEP]. Follows google-research/bert as `transformers.BertTokenizer` carries it on.
    """

    def _setup(self, spec):
        model, norm = spec["model"], spec.get("normalizer") or {"type": "null"}
        cleans = [norm.get(name) for name in ("clean_text", "handle_chinese_chars", "lowercase")]
        if norm["type"] != "BertNormalizer" or not all(cleans) or norm.get("strip_accents") is False:
            _refuse("normalizer", f"{norm['type']} (not uncased BERT's)")
        if [part["type"] for part in _parts(spec.get("pre_tokenizer"), "pretokenizers")] != ["BertPreTokenizer"]:
            _refuse("pre_tokenizer", "other than BertPreTokenizer")
        self._prefix, self._longest = model["continuing_subword_prefix"], model["max_input_chars_per_word"]
        self._unk = self._vocab[model["unk_token"]]
        self._normalize, self._cleanup = _bert_clean, (spec.get("decoder") or {}).get("cleanup")

    def _words(self, text):
        return text.split()

    def _word_ids(self, word):
        return [i for part in _bert_words(word) for i in self._longest_pieces(part)]

    def _longest_pieces(self, word):
        ids, start = [], 0
        while start < len(word) <= self._longest:
            prefix = self._prefix if start else ""
            ends = range(len(word), start, -1)
            end = next((end for end in ends if prefix + word[start:end] in self._vocab), None)
            if end is None:
                return [self._unk]
            ids.append(self._vocab[prefix + word[start:end]])
            start = end
        return ids or [self._unk]

    def decode(self, ids, special=True):
        """Ids -> text: tokens joined by spaces, "##" glued on. Case, accents and the original spacing are lost.

        A file may ask for `cleanup`: no space before . , ? and !
        """
        text = " ".join(self._names_of(ids, special)).replace(" " + self._prefix, "")
        return re.sub(" (?=[.,?!])", "", text) if self._cleanup else text


class WordTokenizer(_Tokenizer):
    """Whole words between spaces, each an id; what is not in the vocabulary becomes <unk>. As papers of 2015 did it.

    >>> tok = WordTokenizer.train(["a dog", "a cat", "a dog runs"], min_count=2)
    >>> tok.decode(tok.encode("a dog barks"))
    'a dog <unk>'
    """

    @classmethod
    def train(cls, texts, min_count=5, special_tokens=SPECIAL_TOKENS):
        """Keep the words that occur at least min_count times, commonest first; then the special tokens."""
        counts = collections.Counter(word for text in texts for word in text.split())
        words = sorted((word for word, n in counts.items() if n >= min_count), key=lambda word: (-counts[word], word))
        if not words:
            raise UserError(f"no word occurs {min_count} times; lower the minimum count")
        vocab = {word: i for i, word in enumerate(["<unk>", *words])}
        tokenizer = cls({"version": "1.0", "added_tokens": [], "normalizer": None, "post_processor": None,
                         "pre_tokenizer": {"type": "WhitespaceSplit"}, "decoder": None,
                         "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"}})
        tokenizer.add_special_tokens(special_tokens)
        return tokenizer

    def _setup(self, spec):
        if [part["type"] for part in _parts(spec.get("pre_tokenizer"), "pretokenizers")] != ["WhitespaceSplit"]:
            _refuse("pre_tokenizer", "other than WhitespaceSplit")
        self._unk = self._vocab[spec["model"]["unk_token"]]

    def _words(self, text):
        return text.split()

    def _word_ids(self, word):
        return [self._vocab.get(word, self._unk)]

    def decode(self, ids, special=True):
        """Ids -> text: words joined by spaces."""
        return " ".join(self._names_of(ids, special))


@functools.lru_cache(maxsize=CACHE_WORDS)
def _clean_char(char):
    """What a character becomes before words are cut: control characters go, a CJK ideograph is a word of its own."""
    category = unicodedata.category(char)
    if char in "\t\n\r" or category == "Zs":
        return " "
    if category[0] == "C" or char == "\ufffd":
        return ""
    return f" {char} " if IDEOGRAPH.match(char) else char


def _bert_clean(text):
    """Odd characters out, lower case, accents off: "Le Café" -> "le cafe"."""
    if text.isascii() and text.isprintable():
        return text.lower()
    text = unicodedata.normalize("NFC", "".join(map(_clean_char, text)))
    return "".join(char for char in unicodedata.normalize("NFD", _lower(text)) if unicodedata.category(char) != "Mn")


def _bert_words(word):
    """Every punctuation character apart: "cafe!" -> ["cafe", "!"]."""
    # All of ASCII's symbols count as punctuation ("$" and "`" too), beyond ASCII only Unicode's categories P*.
    apart = [f" {c} " if unicodedata.category(c)[0] == "P" or c.isascii() and not c.isalnum() else c for c in word]
    return "".join(apart).split()


def load_tokenizer(path):
    """Open any kind from a tokenizer.json, a vocab.txt, or a folder that holds one or vocab.json + merges.txt.

    Raises UserError naming the file and its fault: missing, broken, or with a component we do not know.
    """
    spec = _read_spec(path)
    kind = spec["model"].get("type") or ("BPE" if "merges" in spec["model"] else "WordPiece")   # the oldest do not say
    try:
        kinds = {"BPE": BPETokenizer, "WordPiece": WordPieceTokenizer, "WordLevel": WordTokenizer}
        if kind not in kinds:
            _refuse("model", kind)
        return kinds[kind](spec)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (LookupError, ValueError, TypeError, AttributeError, RecursionError, regex.error) as error:
        raise UserError(f"{path} is broken ({type(error).__name__}: {error}); fetch it again") from None
