"""Weights on disk: files that appear whole or not at all, the safetensors format by hand, and one strict copy.

A safetensors file is three things in a row, all little-endian:

    8 bytes   N, the length of the header
    N bytes   JSON: {"wte.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, "__metadata__": {...}}
    the rest  the numbers of every tensor, row by row; data_offsets count from here

No code is stored, so opening a stranger's file cannot run any (a pickled .pt can). The rules are those of the original
library, https://github.com/huggingface/safetensors: what it opens, we open. Three oddities that its own description of
the format forbids, though its parser lets them pass, are refused: a name given twice, blanks before the `{`, an entry
that is a list.
Left out: slices of tensors, big-endian machines, elements smaller than a byte (F4, F6).
`copy_weights` follows gpt-fast's name tables and nanoGPT's checks of every shape.
"""
import json
import mmap
import os
import secrets
from collections import Counter
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import torch

from .config import UserError


# ---- files that appear whole or not at all

def atomic_write(path, write):
    """Call write(file) on a new binary file, then give it the name `path`: json, png, csv, pt and safetensors alike.

    os.replace swaps names in one step, so whoever opens `path` finds the old content or the new, never a part. On a
    failure (full disk, ctrl-C) the new file goes, the old one stays. Missing folders are made, links are followed.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")   # same folder: a rename cannot cross file systems
    try:
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())     # without it a power cut could leave the good name on bytes never written
        os.replace(temporary, path)
    except OSError as error:
        if error.filename in (None, str(temporary)):
            error.filename = str(path)  # the name the user knows; a full disk comes without any
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, obj):
    """A JSON file, whole or not at all."""
    text = json.dumps(obj, indent=2) + "\n"
    atomic_write(path, lambda file: file.write(text.encode("ascii")))   # json escapes the rest, odd file names included


def read_json(path, error=UserError):
    """The content of a JSON file. Raises `error`, a UserError naming the file, when it is missing or broken."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as fault:
        raise error(f"cannot read {path}: {fault.strerror}; check the path") from fault
    except (ValueError, RecursionError) as fault:   # not UTF-8, not JSON, nested too deeply, a NUL in the path
        raise error(f"{path} is not a readable JSON file: {fault}; mend it or fetch it again") from fault


# ---- the safetensors format

# Name in the file -> (bits per element, name in torch), in the format's own order. Files hold the last kinds first:
# wide elements come before narrow ones, so each tensor starts at a multiple of its element size without any padding.
DTYPES = {
    "BOOL": (8, "bool"), "F4": (4, ""), "F6_E2M3": (6, ""), "F6_E3M2": (6, ""), "U8": (8, "uint8"), "I8": (8, "int8"),
    "F8_E5M2": (8, "float8_e5m2"), "F8_E4M3": (8, "float8_e4m3fn"), "F8_E8M0": (8, "float8_e8m0fnu"),
    "F8_E4M3FNUZ": (8, "float8_e4m3fnuz"), "F8_E5M2FNUZ": (8, "float8_e5m2fnuz"), "I16": (16, "int16"),
    "U16": (16, "uint16"), "F16": (16, "float16"), "BF16": (16, "bfloat16"), "I32": (32, "int32"),
    "U32": (32, "uint32"), "F32": (32, "float32"), "C64": (64, "complex64"), "F64": (64, "float64"),
    "I64": (64, "int64"), "U64": (64, "uint64")}
MAX_HEADER = 100_000_000        # bytes, the original's limit: a damaged length cannot make us parse gigabytes


class SafetensorsError(UserError, ValueError):
    """A file that is missing, malformed or beyond torch, or tensors that the format cannot hold."""


def _demand(ok, fault):
    if not ok:
        raise ValueError(fault)


def _unique(pairs):
    """json keeps the last of two equal keys; two readers could then see two different models in one file."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError(f"the name {Counter(key for key, _ in pairs).most_common(1)[0][0]!r} appears twice")
    return dict(pairs)


def _integer(text):
    """Digits -> int if it is an unsigned 64-bit one, else float, which no rule below takes for a count (nor is -0)."""
    return int(text) if text[0] != "-" and len(text) <= 20 and int(text) < 2**64 else float(text)


def _counts(value):
    return isinstance(value, list) and all(type(n) is int for n in value)   # to isinstance, True is an int too


def _check_entry(name, entry):
    """One value of the header -> (dtype, shape, begin, end); ValueError tells the fault. Further fields are let be."""
    _demand(isinstance(entry, dict), f"the entry of tensor {name!r} is not an object")
    for field in ("dtype", "shape", "data_offsets"):
        _demand(field in entry, f"tensor {name!r} lacks the field {field!r}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    _demand(isinstance(dtype, str) and dtype in DTYPES, f"tensor {name!r} has the unknown dtype {dtype!r}")
    _demand(_counts(shape), f"tensor {name!r} has the shape {shape!r}, not a list of whole numbers from 0")
    _demand(_counts(offsets) and len(offsets) == 2 and offsets[0] <= offsets[1],
            f"tensor {name!r} has the data_offsets {offsets!r}, not [begin, end] with begin <= end")
    bits = 1
    for factor in (*shape, DTYPES[dtype][0]):
        bits *= factor
        _demand(bits < 2**64, f"tensor {name!r} has a shape that overflows a 64-bit size")
    _demand(bits == 8 * (offsets[1] - offsets[0]),
            f"tensor {name!r}: the size of {dtype} {shape} is {bits / 8:g} bytes, data_offsets {offsets} span another")
    return dtype, shape, *offsets


def _parse(buffer):
    """A file's bytes -> (metadata, {name: entry} in data order, where the data starts); ValueError tells the fault.

    Nothing is sized by a number from the file before that number was compared with the file's real length.
    """
    _demand(len(buffer) >= 8, f"its {len(buffer)} bytes are too short for the 8-byte header length")
    n = int.from_bytes(buffer[:8], "little")
    _demand(n <= MAX_HEADER and 8 + n <= len(buffer),
            f"a header of {n:,} bytes is too large (file: {len(buffer):,}, limit: {MAX_HEADER:,})")
    text = bytes(buffer[8:8 + n]).decode("utf-8")
    _demand(text.startswith("{"), "its header does not start with '{'")
    header = json.loads(text, object_pairs_hook=_unique, parse_int=_integer,
                        parse_constant=lambda word: _demand(False, f"{word} is not JSON"))   # NaN, Infinity
    if "\\u" in text:           # json lets half a surrogate pair pass, "\\ud800"; encoding it again does not
        json.dumps(header, ensure_ascii=False).encode("utf-8")
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    _demand(isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values()),
            "its __metadata__ is not a map from strings to strings")
    entries = {name: _check_entry(name, entry) for name, entry in header.items()}
    entries = dict(sorted(entries.items(), key=lambda item: item[1][2:]))
    covered = 0
    for name, (_, _, begin, end) in entries.items():    # every byte belongs to one tensor: nothing can hide between
        kind = "a hole" if begin > covered else "an overlap"
        _demand(begin == covered, f"{kind} in the data: tensor {name!r} begins at {begin}, others end at {covered}")
        covered = end
    _demand(8 + n + covered == len(buffer),
            f"its tensors cover {covered:,} bytes of data, the file holds {len(buffer) - 8 - n:,}")
    return metadata, entries, 8 + n


def _open(path):
    """Map the file into memory, which reads nothing yet, and check its header: (buffer, metadata, entries, start)."""
    try:
        with open(path, "rb") as file:          # an empty file cannot be mapped
            size = os.fstat(file.fileno()).st_size
            buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) if size else b""
    except (OSError, ValueError) as fault:      # ValueError: a NUL in the path
        raise SafetensorsError(f"cannot read {path}: {getattr(fault, 'strerror', fault)}; check the path") from fault
    try:
        return buffer, *_parse(buffer)
    except (ValueError, RecursionError) as fault:
        why = "its JSON is nested too deeply" if isinstance(fault, RecursionError) else str(fault)[:300]  # may be MBs
        raise SafetensorsError(f"{path} is not a valid safetensors file: {why}; fetch or save it again") from fault


def _tensor(where, buffer, dtype, shape, begin, end):
    """Bytes begin..end of the mapped file as a tensor; `where` names it in a complaint."""
    kind = getattr(torch, DTYPES[dtype][1], None)
    if kind is None:
        raise SafetensorsError(f"{where} has the dtype {dtype}, which torch cannot hold; convert it to a wider one")
    if begin == end:                            # torch.frombuffer refuses to look at nothing
        flat = torch.empty(0, dtype=kind)
    else:
        flat = torch.frombuffer(buffer, dtype=torch.uint8, count=end - begin, offset=begin)
        flat = (flat.clone() if begin % kind.itemsize else flat).view(kind)     # an unpadded header shifts the data
    try:
        return flat.reshape(shape)
    except (RuntimeError, TypeError) as fault:  # [0, 2**63] needs no bytes, yet is beyond torch's own integers
        raise SafetensorsError(f"{where} has a shape too large for torch, {shape!s:.300}; save it again") from fault


def _load_file(path):
    buffer, _, entries, start = _open(path)
    return {name: _tensor(f"tensor {name!r:.300} in {path}", buffer, dtype, shape, start + begin, start + end)
            for name, (dtype, shape, begin, end) in entries.items()}


def weight_map(path):
    """The index of a model in several files: {tensor: path of its file}. A name that leaves the folder is refused."""
    index = read_json(path, SafetensorsError)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise SafetensorsError(f"{path} has no weight_map from tensor names to file names; fetch it again")
    for file in set(weight_map.values()):       # judged by its letters: in the Hub's cache each file links elsewhere
        parts = PurePosixPath(file)
        if not parts.parts or parts.is_absolute() or ".." in parts.parts or "\\" in file or ":" in file:
            raise SafetensorsError(f"{path} names the file {file!r} outside its own folder; do not trust this index")
    return {name: path.parent / file for name, file in weight_map.items()}


def load_safetensors(path) -> dict[str, torch.Tensor]:
    """Every tensor of a file, or of all the files behind a `model.safetensors.index.json`: on the CPU, not copied.

    The file is mapped: a page is read when a tensor is first looked at. The mapping is private: writing into a tensor
    changes neither the file nor another load of it. To replace the file, rename a new one over it, as `atomic_write`
    does; overwriting it in place would change these tensors. Raises SafetensorsError naming the file and the fault.
    """
    path = Path(path)
    if path.suffix != ".json":
        return _load_file(path)
    home, tensors = weight_map(path), {}
    for file in dict.fromkeys(home.values()):
        shard = _load_file(file)
        lost = [name for name in home if home[name] == file and name not in shard]
        if lost:
            raise SafetensorsError(f"{path} places tensor {lost[0]!r} in {file}, which lacks it; fetch that file again")
        # The index decides between two files. What it does not list is kept, for copy_weights to complain about.
        tensors.update((name, tensor) for name, tensor in shard.items() if home.get(name, file) == file)
    return tensors


def read_metadata(path) -> dict[str, str]:
    """The `__metadata__` strings of a file, {} when it has none; for an index, those of all its files."""
    path = Path(path)
    files = dict.fromkeys(weight_map(path).values()) if path.suffix == ".json" else [path]
    return {key: value for file in files for key, value in _open(file)[1].items()}


def _header(tensors, metadata):
    """What stands before the data: (header bytes, names in data order). Refuses what the format cannot hold."""
    kinds = {getattr(torch, ours, None): kind for kind, (_, ours) in DTYPES.items() if ours}
    for name, tensor in tensors.items():
        if not isinstance(name, str) or name == "__metadata__":
            raise SafetensorsError(f"a tensor cannot be named {name!r} in a safetensors file; rename it")
        dense = torch.is_tensor(tensor) and tensor.layout == torch.strided and not (tensor.is_nested or tensor.is_meta)
        if not dense or tensor.dtype not in kinds:
            what = f"{tensor.layout} {tensor.dtype} on {tensor.device}" if torch.is_tensor(tensor) else type(tensor)
            raise SafetensorsError(f"safetensors cannot hold {name!r} ({what}); pass a dense tensor of a known dtype")
    header, rank, begin = {}, list(DTYPES), 0
    if metadata is not None:
        if not (isinstance(metadata, dict) and all(isinstance(s, str) for pair in metadata.items() for s in pair)):
            raise SafetensorsError(f"safetensors metadata maps strings to strings, got {metadata}; convert with str()")
        header["__metadata__"] = dict(metadata)
    names = sorted(tensors, key=lambda name: (-rank.index(kinds[tensors[name].dtype]), name))
    for name in names:
        dtype, shape = tensors[name].dtype, list(tensors[name].shape)
        end = begin + tensors[name].numel() * dtype.itemsize
        header[name] = {"dtype": kinds[dtype], "shape": shape, "data_offsets": [begin, end]}
        begin = end
    try:
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    except UnicodeEncodeError as fault:
        raise SafetensorsError(f"a tensor name or metadata string is not text: {fault}; rename it") from fault
    text += b" " * (-len(text) % 8)     # the data then starts at a multiple of 8, the widest element
    if len(text) > MAX_HEADER:
        raise SafetensorsError(f"a header of {len(text):,} bytes is over the format's limit; save fewer tensors")
    return text, names


def save_safetensors(tensors, path, metadata=None):
    """Write {name: tensor} and {str: str} as one safetensors file, byte for byte as the original library does.

    Tensors may live on any device with any strides; each comes to the CPU in row order when its turn is there. Tied
    weights (one storage, two names) are written once per name, where the original refuses, so any reader finds both.
    Raises SafetensorsError for what the format cannot hold, OSError on a full disk; the old file then still stands.
    """
    header, names = _header(tensors, metadata)

    def write(file):
        file.write(len(header).to_bytes(8, "little") + header)
        for name in names:      # a conjugate or negated view is a flag beside the bytes: resolve_* applies it
            tensor = tensors[name].detach().cpu().resolve_conj().resolve_neg().contiguous()
            flat = tensor.as_strided((tensor.numel(),), (1,))    # one lone element counts as contiguous at any stride
            file.write(flat.view(torch.uint8).numpy())

    atomic_write(path, write)


# ---- one strict copy: every weight from a known place, or no model at all

# What may be done to foreign tensors so that they become ours: f(tensors, our shape).
OPS = {
    "copied": lambda tensors, shape: tensors[0],
    "transposed": lambda tensors, shape: tensors[0].t(),            # Conv1D, x @ P keep (in, out); nn.Linear (out, in)
    "joined": lambda tensors, shape: torch.cat(tensors),            # rows of q, k, v, (C, C) each -> (3C, C)
    "viewed": lambda tensors, shape: tensors[0].reshape(shape),     # VGG's conv (4096, 512, 7, 7) -> (4096, 25088)
}


class Source:
    """The right side of a name table: foreign names, and a word of OPS or a function of those tensors.

    Source("h.0.attn.c_attn.weight", op="transposed"); Source("q.bias", "k.bias", "v.bias", op="joined")
    """

    def __init__(self, *names, op="copied"):
        assert callable(op) or op in OPS, f"op {op!r} is neither a function nor one of {list(OPS)}"
        self.names, self.op, self.how = names, op, getattr(op, "__name__", op)

    def apply(self, tensors, shape):
        return self.op(*tensors) if callable(self.op) else OPS[self.op](tensors, shape)


class Row(NamedTuple):
    """A line of the table that copy_weights returns. Two tied names of ours read "wte.weight = head.weight"."""
    theirs: str
    ours: str
    shape: tuple
    how: str


def _misfit(name, target, rule, tensors):
    """Try a rule and drop the result (most are views; a join is small): "" if its shape is ours, else the reason."""
    try:
        got = rule.apply([tensors[theirs] for theirs in rule.names], target.shape)
        got = "complex, ours is real" if got.is_complex() and not target.is_complex() else tuple(got.shape)
    except (RuntimeError, IndexError, ValueError) as fault:
        got = str(fault).splitlines()[0]
    theirs = " + ".join(f"{theirs} {tuple(tensors[theirs].shape)}" for theirs in rule.names)
    fits = got == tuple(target.shape)
    return "" if fits else f"ours {name} {tuple(target.shape)}, theirs {theirs} {rule.how}: {got}"


def copy_weights(model, tensors, names, ignore=(), source="the checkpoint") -> list[Row]:
    """Fill every parameter and persistent buffer of `model` from foreign tensors: exactly once each, or not at all.

    tensors: {their name: tensor} of any dtype and device; names: {our name: their name or Source};
    ignore: patterns such as "*.attn.masked_bias" for what is no weight; source: what the message calls the tensors.
    Tied weights (one Parameter, two names) need a rule for one name. A foreign tensor may serve several rules.
    Raises one UserError that lists all that does not fit, before anything is written.
    """
    targets = {name: ours for name, ours in model.state_dict(keep_vars=True).items() if torch.is_tensor(ours)}
    rules = {name: rule if isinstance(rule, Source) else Source(rule) for name, rule in names.items()}
    tied = {}                           # keep_vars: a tied Parameter is the same object under both names
    for name, target in targets.items():
        tied.setdefault(id(target), []).append(name)
    filled = Counter(id(targets[name]) for name in rules if name in targets)
    used = {theirs for rule in rules.values() for theirs in rule.names}
    ignored = [name for name in tensors if name not in used and any(fnmatchcase(name, glob) for glob in ignore)]
    known = {name: rule for name, rule in rules.items() if name in targets and used & tensors.keys() >= set(rule.names)}
    faults = {
        "missing in the file": sorted(used - tensors.keys()),
        "missing in the name table": [" = ".join(ours) for key, ours in tied.items() if filled[key] == 0],
        "filled more than once": [" = ".join(ours) for key, ours in tied.items() if filled[key] > 1],
        "unknown to the model": [name for name in rules if name not in targets],
        "unused in the file": sorted(tensors.keys() - used - set(ignored)),
        "wrong shape": [why for name, rule in known.items() if (why := _misfit(name, targets[name], rule, tensors))],
    }
    if any(faults.values()):
        lines = [f"  {kind}: " + ", ".join(found[:20]) + (f" and {len(found) - 20} more" if len(found) > 20 else "")
                 for kind, found in faults.items() if found]
        raise UserError(f"{source} does not fit {type(model).__name__}, nothing was loaded; check that it is the right "
                        "file and that its config agrees\n" + "\n".join(lines))
    rows = []
    with torch.no_grad():
        for name, rule in rules.items():
            target = targets[name]
            target.copy_(rule.apply([tensors[theirs] for theirs in rule.names], target.shape))  # keeps dtype and device
            rows.append(Row(" + ".join(rule.names), " = ".join(tied[id(target)]), tuple(target.shape), rule.how))
    return rows + [Row(name, "", tuple(tensors[name].shape), "ignored") for name in ignored]
