"""What all tokenizers share: names and ids, the tokens that are cut out of a text before anything else, and files.

A tokenizer lives in one `tokenizer.json`, the format of Hugging Face's `tokenizers` library, which opens what `save`
writes and encodes with it identically. Older layouts (vocab.json + merges.txt, or vocab.txt) are brought into it. A
file's parts must equal those of the public kinds: a guess would train a model on wrong ids unnoticed. Left out:
offsets, text pairs, truncation and padding.
"""
import functools
import re
from pathlib import Path

import regex

from .config import UserError
from .files import read_json, write_json

END = "<|endoftext|>"
SPECIAL_TOKENS = (END, "<image>", "<|system|>", "<|user|>", "<|assistant|>")    # those that tinyvlm itself uses
NOT_SPACE = regex.compile(r"\S+")           # str.split would also cut at the control characters 28 to 31

FILE = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": None, "post_processor": None, "decoder": None}
# normalized: searched for in the text once it is cleaned, so that CLIP's are found in capitals, too.
ADDED = {"id": None, "content": "", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True}
# What a tokenizer_config.json may say where it changes ids. A class of transformers brings parts of its own, whatever
# tokenizer.json says; the two last ones take what is there.
SETTINGS = {**dict.fromkeys(("add_bos_token", "add_eos_token", "add_prefix_space", "split_special_tokens"), [False]),
            **dict.fromkeys(("do_lower_case", "do_basic_tokenize", "strip_accents", "tokenize_chinese_chars"), [True]),
            "never_split": [[]]}
CLASSES = {"BPE": ["GPT2"], "BPE</w>": ["CLIP"], "WordPiece": ["Bert", "DistilBert"]}
ANY_CLASS = ["PreTrainedTokenizerFast", "TokenizersBackend"]


def require(place, part, *known):
    """Refuse a part of a tokenizer that is none of the known ones; a field that it leaves out counts as usual."""
    if not any(part == form or type(part) is type(form) is dict and part and form | part == form for form in known):
        raise UserError(f"the tokenizer's {place} is not one tinyvlm reads ({str(part):.80}); use a GPT-2, CLIP or "
                        "uncased BERT kind")


def read_frame(spec):
    """The ids that a post-processor puts before and after a text: ([], []) for GPT-2, ([49406], [49407]) for CLIP."""
    kind = spec and spec["type"]
    if kind in ("RobertaProcessing", "BertProcessing"):
        return [spec["cls"][1]], [spec["sep"][1]]
    if kind == "TemplateProcessing":                        # [{"SpecialToken": {"id": "<s>"}}, {"Sequence": ..}, ..]
        ids = [spec["special_tokens"][item["SpecialToken"]["id"]]["ids"] if "SpecialToken" in item else None
               for item in spec["single"]]
        return sum(ids[:ids.index(None)], []), sum(ids[ids.index(None) + 1:], [])
    require("post_processor", kind, None, "ByteLevel")      # the latter only trims offsets
    return [], []


def added_tokens(vocab, names, normalized=False):
    """The "added_tokens" of an older layout: the names that are special by themselves."""
    return [ADDED | {"content": name, "id": vocab[name], "normalized": normalized} for name in names if name in vocab]


def read_beside(folder, spec, kind):
    """A tokenizer.json, or what an older layout becomes -> the same, with what the small files beside it add.

    How a token is found in a text, the last one of them says. It must have one id everywhere, and a name that has a
    role (such as "pad_token") must have one at all: transformers would give it the next, for which a model has no row.
    """
    names, model, found = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"), spec["model"], {}
    config, roles, ids = (read_json(folder / name, missing_ok=True) for name in names)
    known = CLASSES.get(kind + (model.get("end_of_word_suffix") or ""), ())
    classes = [name + "Tokenizer" + fast for name in known for fast in ("", "Fast")]
    for name, usual in (SETTINGS | {"tokenizer_class": classes + ANY_CLASS}).items():
        require(f"{name} in {names[0]}", config.get(name), None, *usual)
    tokens = []
    for role, value in (config | roles).items():            # "bos_token": "<s>" or {"content": "<s>", ..}
        if value and (role.endswith("_token") or role in ("additional_special_tokens", "extra_special_tokens")):
            value = value.values() if isinstance(value, dict) and "content" not in value else value
            tokens += [({"content": token} if isinstance(token, str) else token) | {"special": True}
                       for token in ([value] if isinstance(value, (str, dict)) else value)]
    tokens += [*(spec.get("added_tokens") or []), *({"content": name, "id": i} for name, i in ids.items())]
    tokens += [token | {"id": int(i)} for i, token in config.get("added_tokens_decoder", {}).items()]
    for token in tokens:
        name = token["content"]
        old = found.get(name, {"id": model["vocab"].get(name), "special": False})
        if None not in (old["id"], token.get("id")) and old["id"] != token["id"]:
            raise UserError(f"the token {name!r:.60} has the ids {old['id']} and {token['id']} in files of one folder")
        found[name] = old | token | {"special": old["special"] or token.get("special", False)}
    return spec | {"added_tokens": [
        {key: token.get(key, not token["special"] if key == "normalized" else ADDED[key]) for key in ADDED}
        for token in found.values()]}


class Tokenizer:
    """Ids and names, and the added tokens, which are cut out of a text before anything else reads it.

    A subclass brings its model's type in `kind`, `_setup` (compare and read the parts), `_word_ids` (word -> ids), and
    its own `_normalize` (clean a text), `_words` (clean text -> words) and `decode` where these differ. Public:
    `vocab_size`, the rows an embedding needs; `token_to_id(token)` and `id_to_token(i)`, None for what there is not;
    `frame_ids`, the ids (before, after) that `encode` adds; `special_ids`, which no model should generate; `unk_id`.
    """
    old_name = unk_id = None

    def __init__(self, spec):
        self._vocab, added = spec["model"]["vocab"], spec.get("added_tokens") or []
        entries = [*self._vocab.items(), *((token["content"], token["id"]) for token in added)]
        ids, names = dict(entries), {i: name for name, i in entries}
        for name, i in entries:                             # an embedding has a row for every id
            if ids[name] != i or names[i] != name or type(i) is not int or not 0 <= i < 2**24:
                raise UserError(f"the token {name!r} has the id {i}, which is none or another's; make vocabulary and "
                                "added tokens agree")
        self.token_to_id, self.id_to_token, self.vocab_size = ids.get, names.get, max(names, default=-1) + 1
        for token in added:
            require("added token", {**token, "id": None, "content": "", "normalized": False, "special": True}, ADDED)
        added = sorted(added, key=lambda token: token["id"])
        self._spec = FILE | spec | {"added_tokens": added, "truncation": None, "padding": None}
        self._setup(self._spec)
        self.frame_ids = before, after = read_frame(self._spec["post_processor"])
        require("post_processor", [i for i in before + after if i not in names], [])
        self.special_ids = sorted({*before, *after, self.unk_id, *(t["id"] for t in added if t["special"])} - {None})
        self._finders = {(special, clean): self._finder([
            t for t in added if bool(t["normalized"]) == clean and (special or not t["special"])], clean)
            for special in (True, False) for clean in (True, False)}
        self._cached_ids = functools.lru_cache(1 << 16)(self._word_ids)     # captions repeat a few thousand words

    def _finder(self, tokens, clean):
        """(pattern, {name: id}). Of names that start at one place the longest is found.

        Of two names that are cleaned to one, the first counts; one of which cleaning leaves nothing is never found.
        """
        ids = {self._normalize(token["content"]) if clean else token["content"]: token["id"] for token in tokens[::-1]}
        names = "|".join(map(re.escape, sorted(filter(None, ids), key=len, reverse=True)))
        return re.compile(f"({names or '(?!)'})"), ids

    @classmethod
    def load(cls, path):
        """Open a tokenizer.json, a vocab.json with merges.txt beside it, a vocab.txt, or a folder with one of these.

        Raises UserError naming the file and its fault: missing, broken, or of no kind that this class reads.
        """
        path = Path(path)
        if path.is_dir():
            names = ("tokenizer.json", "vocab.json", "vocab.txt")
            path /= next((name for name in names if (path / name).exists()), names[0])
        kinds = {kind.kind: kind for kind in cls.__subclasses__() or [cls]}
        try:
            old = [kind for kind in kinds.values() if kind.old_name == path.name]
            spec = old[0].old_layout(path) if old else read_json(path)
            kind = spec["model"].get("type") or ("BPE" if "merges" in spec["model"] else "WordPiece")    # oldest files
            require("model", kind, *kinds)
            beside = old or path.name == "tokenizer.json"
            return kinds[kind](read_beside(path.parent, spec, kind) if beside else spec)
        except UserError as error:
            raise UserError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
        except (OSError, LookupError, ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{path} or a file beside it is broken ({type(error).__name__}: {error!s:.160}); fetch it "
                            "again") from None

    def save(self, path):
        """Write a tokenizer.json: `path` is the name of a .json file, or a folder."""
        write_json(path if str(path).endswith(".json") else Path(path) / "tokenizer.json", self._spec)

    def add_special_tokens(self, tokens):
        """Give each new token the next id at the end; one that there is already is from now on cut out whole."""
        added, end = {token["content"]: token for token in self._spec["added_tokens"]}, self.vocab_size
        for name in dict.fromkeys(tokens):
            i = self.token_to_id(name)
            new = ADDED | {"content": name, "id": end if i is None else i}
            added[name] = added.get(name, new) | {"special": True}
            end += i is None
        self.__init__(self._spec | {"added_tokens": [*added.values()]})

    def encode(self, text):
        """Text -> ids, with the tokenizer's own frame, and with special tokens where the text spells them."""
        before, after = self.frame_ids
        return [*before, *self._encode(text, special=True), *after]

    def encode_plain(self, text):
        """Text -> ids, no frame, and special tokens spelled in it stay text.

        For captions and questions, whose caller sets the frame: a user who types <image> must not get that token.
        """
        return self._encode(text, special=False)

    def _normalize(self, text):
        return text

    def _words(self, text):
        return NOT_SPACE.findall(text)

    def _encode(self, text, special, clean=False):
        """Added tokens are found in the text as given; between them, in the text once it is clean; then words."""
        (pattern, found), ids = self._finders[special, clean], []
        for part in pattern.split(text):                    # "a<image>b" -> "a", "<image>", "b"
            if part and part in found:
                ids.append(found[part])
            elif not clean:
                ids += self._encode(self._normalize(part), special, clean=True)
            else:
                for word in self._words(part):
                    ids += self._cached_ids(word)
        return ids

    def decode(self, ids):
        """Ids -> text: names between spaces. Ids without a name (a model's table may have more rows) are left out."""
        return " ".join(name for name in map(self.id_to_token, ids) if name is not None)
