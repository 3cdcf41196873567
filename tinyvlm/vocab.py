"""What all tokenizers share: names and ids, the tokens that are cut out of a text before anything else, and files.

A tokenizer lives in one `tokenizer.json`, the format of Hugging Face's `tokenizers` library, which opens what `save`
writes and encodes with it identically. Older layouts (vocab.json + merges.txt, or vocab.txt) are brought into it. What
could change an id is read, or refused by name (`require`): a guess would train a model on wrong ids unnoticed.

Left out: offsets and text pairs; a file's truncation and padding, which are settings of a call (as in transformers).
"""
import functools
import re
from pathlib import Path

import regex

from .config import UserError
from .files import read_json, write_json

END = "<|endoftext|>"
SPECIAL_TOKENS = (END, "<image>", "<|system|>", "<|user|>", "<|assistant|>")    # those that tinyvlm itself uses
CACHE_WORDS = 1 << 16       # distinct words remembered with their ids: captions repeat the same few thousand
NOT_SPACE = regex.compile(r"\S+")           # str.split would also cut at the control characters 28 to 31
BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")      # what an older layout may have
ANY = object()              # for `require`: every value of this field is read, or changes no id


def require(place, part, **allowed):
    """Refuse a component {field: value, ..} that has a field, or a value of one, which is not allowed.

    require("model", {"type": "BPE", "dropout": 0.1}, type=("BPE",), dropout=(None, 0)) raises "the model has dropout =
    0.1, .."; a field may be missing.
    """
    for field, value in part.items():
        if field not in allowed or allowed[field] is not ANY and value not in allowed[field]:
            raise UserError(f"the {place} has {field} = {str(value):.60}, which tinyvlm does not read; use a tokenizer "
                            "of GPT-2's, CLIP's or uncased BERT's kind")


def read_frame(spec):
    """The ids that a post-processor puts before and after a text: ([], []) for GPT-2, ([49406], [49407]) for CLIP."""
    kind = spec["type"] if spec else None
    if kind == "Sequence":                                  # the later ones go around the earlier
        frames = [read_frame(part) for part in spec["processors"]]
        return sum((before for before, _ in frames[::-1]), []), sum((after for _, after in frames), [])
    if kind in ("RobertaProcessing", "BertProcessing"):
        return [spec["cls"][1]], [spec["sep"][1]]
    if kind == "TemplateProcessing":                        # [{"SpecialToken": {"id": "<s>"}}, {"Sequence": ..}, ..]
        ids = [spec["special_tokens"][item["SpecialToken"]["id"]]["ids"] if "SpecialToken" in item else None
               for item in spec["single"]]
        return sum(ids[:ids.index(None)], []), sum(ids[ids.index(None) + 1:], [])
    require("post_processor", {"type": kind}, type=(None, "ByteLevel"))     # which only trims offsets
    return [], []


def added_token(content, id, **fields):
    """An entry of "added_tokens". normalized: looked for in the cleaned text (CLIP's match in capitals too)."""
    return {"id": id, "content": content, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
            "special": True} | fields


def read_beside(folder, vocab, classes, defaults):
    """What an older layout keeps in small files beside its vocabulary -> (tokenizer_config.json, "added_tokens").

    classes: the tokenizer_class it may have; defaults: {name: fields} of tokens that these make special by themselves.
    """
    config, roles, ids = [read_json(folder / name) if (folder / name).exists() else {} for name in BESIDE]
    checks = {"add_bos_token": (None, False), "add_eos_token": (None, False), "split_special_tokens": (None, False),
              "do_basic_tokenize": (None, True), "never_split": (None, []), "tokenizer_class": (None, *classes)}
    require("tokenizer_config.json", {key: config[key] for key in checks if key in config}, **checks)
    found = {name: fields for name, fields in defaults.items() if name in vocab}
    for role, value in (config | roles).items():        # "bos_token": "<s>" or {"content": "<s>", ..}; lists, dicts
        if role.endswith(("_token", "_special_tokens")) and value and value is not True:
            if isinstance(value, dict):                 # {"content": ..}, or {"image_token": "<image>", ..}
                value = [value] if "content" in value else list(value.values())
            for token in value if isinstance(value, list) else [value]:
                token = token if isinstance(token, dict) else {"content": token}
                found[token["content"]] = {k: v for k, v in token.items() if k != "__type"} | {"special": True}
    for name, i in ids.items():
        found[name] = found.get(name, {"special": False, "normalized": True}) | {"id": i}
    for i, token in config.get("added_tokens_decoder", {}).items():
        found[token["content"]] = found.get(token["content"], {}) | token | {"id": int(i)}
    return config, [added_token(**{"id": vocab.get(name), **token, "content": name}) for name, token in found.items()]


def load(path, kinds):
    """Open a tokenizer.json, a vocab.txt, or a folder with one or with vocab.json + merges.txt.

    kinds: {"BPE": class, ..} by the model's type. Raises UserError naming the file and its fault.
    """
    path = Path(path)
    if path.is_dir():
        names = [name for name in ("tokenizer.json", "vocab.json", "vocab.txt") if (path / name).exists()]
        if not names:
            raise UserError(f"{path} holds no tokenizer.json, vocab.json + merges.txt or vocab.txt; name one that does")
        path /= names[0]
    old = "BPE" if path.name == "vocab.json" else "WordPiece" if path.suffix == ".txt" else None
    try:
        spec = {"model": {"type": old}} if old else read_json(path)
        kind = spec["model"].get("type") or ("BPE" if "merges" in spec["model"] else "WordPiece")    # oldest files
        if kind not in kinds:
            raise UserError(f"this is a {kind} tokenizer, not {' or '.join(kinds)}; name another file")
        return kinds[kind](kinds[kind].old_layout(path) if old else spec)
    except OSError as error:
        raise UserError(f"cannot read {error.filename} ({error.strerror}); fetch it, or name another file") from None
    except UserError as error:
        raise UserError(f"{error}" if str(path.parent) in str(error) else f"{path}: {error}") from None
    except (LookupError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is broken ({type(error).__name__}: {str(error):.80}); fetch it again") from None


class Tokenizer:
    """Ids and names, and the added tokens, which are cut out of a text before anything else reads it.

    A subclass brings its model's type in `kind`, `_setup` (read the components), `_word_ids` (word -> ids), and its own
    `_normalize` (clean a text), `_words` (clean text -> words) and `decode` where these differ. Public: `vocab_size`,
    the rows an embedding needs; `token_to_id(token)` and `id_to_token(i)`, None for what there is not; `frame_ids`, the
    ids (before, after) that `encode` adds; `special_ids`, which no model should generate; `unk_id`, None in BPE.
    """
    unk_id = None

    def __init__(self, spec):
        self._spec, self._vocab = spec, spec["model"]["vocab"]
        added, names = spec.get("added_tokens") or [], {i: name for name, i in self._vocab.items()}
        for token in added:
            require("added token", token, id=ANY, content=ANY, single_word=(False,), lstrip=(False,), rstrip=(False,),
                    normalized=(False, True), special=(False, True))
            name, i = token["content"], token["id"]
            if i is None or self._vocab.get(name, i) != i or names.setdefault(i, name) != name or not name:
                raise UserError(f"the added token {name!r} has the id {i}, which is none or another's; make "
                                f"{', '.join(BESIDE)} or tokenizer.json agree with the vocabulary")
        self._added = {token["content"]: token for token in sorted(added, key=lambda token: token["id"])}
        self.frame_ids = read_frame(spec.get("post_processor"))
        self._setup(spec)
        self._index()
        for i in [*self._ids.values(), *sum(self.frame_ids, [])]:
            if type(i) is not int or not 0 <= i < 2**24:        # an embedding has a row for every id
                raise ValueError(f"the id {i!r:.40} is not a whole number from 0 and below 2**24")

    def _index(self):
        """Everything that depends on the added tokens."""
        self._ids = self._vocab | {name: token["id"] for name, token in self._added.items()}
        self._names = {i: name for name, i in self._ids.items()}
        self.token_to_id, self.id_to_token = self._ids.get, self._names.get
        self.vocab_size = max(self._names, default=-1) + 1      # highest id + 1: a file may leave some out
        special = {token["id"] for token in self._added.values() if token["special"]}
        self.special_ids = sorted({*special, *sum(self.frame_ids, []), self.unk_id} - {None})
        self._every, self._plain = self._finders(True), self._finders(False)
        self._cached_ids = functools.lru_cache(CACHE_WORDS)(self._word_ids)

    def _finders(self, special):
        """[(pattern, {name: id})]: of tokens looked for in the text as given, and of those looked for once it is clean.

        Of names that start at one place the longest is found; of two names that are cleaned to one the first counts.
        """
        finders = []
        for clean in (False, True):
            ids = {self._normalize(name) if clean else name: token["id"] for name, token in
                   reversed(self._added.items()) if token["normalized"] == clean and (special or not token["special"])}
            if "" in ids:                                   # a lone accent, say: it would be found everywhere
                raise UserError("cleaning leaves nothing of an added token; take it out of the file")
            names = "|".join(map(re.escape, sorted(ids, key=len, reverse=True)))
            finders.append((re.compile(f"({names or '(?!)'})"), ids))
        return finders

    @classmethod
    def load(cls, path):
        """Open a file or folder that holds this kind. Raises UserError naming the file and its fault."""
        return load(path, {cls.kind: cls})

    def save(self, path):
        """Write a tokenizer.json: `path` is the name of a .json file, or a folder."""
        added = sorted(self._added.values(), key=lambda token: token["id"])
        path = Path(path) if str(path).endswith(".json") else Path(path) / "tokenizer.json"
        write_json(path, self._spec | {"added_tokens": added, "truncation": None, "padding": None})

    def add_special_tokens(self, tokens):
        """Give each new token the next id at the end; returns how many ids that took.

        A token that the vocabulary spells already keeps its id, and is from now on cut out whole.
        """
        assert not isinstance(tokens, str) and all(tokens), f"add_special_tokens takes a list of names, not {tokens!r}"
        size = end = self.vocab_size
        for name in dict.fromkeys(tokens):
            self._added[name] = self._added.get(name, added_token(name, self._ids.get(name, end))) | {"special": True}
            end += name not in self._ids
        self._index()
        return end - size

    def encode(self, text):
        """Text -> ids, with the tokenizer's own frame, and with special tokens where the text spells them."""
        before, after = self.frame_ids
        return [*before, *self._encode(text, self._every), *after]

    def encode_plain(self, text, max_length=None):
        """Text -> ids (at most max_length), no frame, and special tokens spelled in it stay text.

        For captions, prompts and dialogues, whose caller sets the frame: a user who types <|assistant|> or <image> must
        not get that token.
        """
        return self._encode(text, self._plain)[:max_length]

    def _normalize(self, text):
        return text

    def _words(self, text):
        return NOT_SPACE.findall(text)

    def _encode(self, text, finders):
        (early, early_ids), (late, late_ids) = finders
        if not text.isascii():      # half of a UTF-16 pair (a broken \ud83d in some json) has no bytes: it reads as "?"
            text = text.encode("utf-8", errors="replace").decode("utf-8")
        ids = []
        for piece in early.split(text):                     # "a<image>b" -> "a", "<image>", "b"
            if piece in early_ids:
                ids.append(early_ids[piece])
                continue
            for part in late.split(self._normalize(piece)):
                if part in late_ids:
                    ids.append(late_ids[part])
                elif part:
                    for word in self._words(part):
                        ids += self._cached_ids(word)
        return ids

    def decode(self, ids):
        """Ids -> text: names between spaces. Ids without a name (a model's table may have more rows) are left out."""
        return " ".join(self._names[i] for i in ids if i in self._names)
