"""Weights on disk: the safetensors format by hand, and one strict copy from a file into a model.

A safetensors file is three things in a row, all little-endian:

    8 bytes   N, the length of the header
    N bytes   JSON: {"wte.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, "__metadata__": {...}}
    the rest  the numbers of every tensor, row by row; data_offsets count from here

No code is stored, so opening a stranger's file cannot run any (a pickled .bin can). What the original library opens, we
open (https://github.com/huggingface/safetensors), but for three oddities that its description forbids: a name given
twice, blanks before the `{`, an entry that is a list. Left out: slices, elements smaller than a byte (F4, F6).
`copy_weights` follows gpt-fast's name tables and nanoGPT's checks of every shape.
"""
import json
import mmap
import os
import re
from collections import Counter
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from .config import UserError
from .files import atomic_write, read_json

# The file's names for torch's dtypes, in the format's own order. Files hold the last kinds first: wide elements come
# before narrow ones, so each tensor starts at a multiple of its element size without any padding.
DTYPES = {kind: getattr(torch, ours) for kind, ours in (pair.split("=") for pair in (
    "BOOL=bool U8=uint8 I8=int8 F8_E5M2=float8_e5m2 F8_E4M3=float8_e4m3fn F8_E8M0=float8_e8m0fnu "
    "F8_E4M3FNUZ=float8_e4m3fnuz F8_E5M2FNUZ=float8_e5m2fnuz I16=int16 U16=uint16 F16=float16 BF16=bfloat16 I32=int32 "
    "U32=uint32 F32=float32 C64=complex64 F64=float64 I64=int64 U64=uint64").split()) if hasattr(torch, ours)}
MAX_HEADER = 100_000_000        # bytes, the original's limit: a damaged length cannot make us parse gigabytes


class SafetensorsError(UserError, ValueError):
    """A file that is missing or malformed, or tensors that the format cannot hold."""


# ---- reading

def _demand(ok, fault):
    if not ok:
        raise ValueError(fault)


def _unique(pairs):
    """json keeps the last of two equal keys; two readers could then find two different models in one file."""
    for name, count in Counter(key for key, _ in pairs).items():
        _demand(count == 1, f"the name {name!r} appears twice")
    return dict(pairs)


def _check_entry(name, entry):
    """One value of the header -> (dtype, shape, begin, end); ValueError tells the fault. Other fields are let be."""
    def counts(value):          # whole numbers that torch can count to; to isinstance, True would be an int too
        return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)
    _demand(isinstance(entry, dict), f"the entry of tensor {name!r} is not an object")
    dtype, shape, span = (entry.get(field) for field in ("dtype", "shape", "data_offsets"))
    _demand(isinstance(dtype, str) and dtype in DTYPES, f"tensor {name!r} has the dtype {dtype!r}, unknown to torch")
    _demand(counts(shape), f"tensor {name!r} has the shape {shape!r}, not a list of whole numbers")
    _demand(counts(span) and len(span) == 2, f"tensor {name!r} has the data_offsets {span!r}, not two whole numbers")
    most = size = DTYPES[dtype].itemsize
    for n in shape:
        most, size = most * max(n, 1), size * n
        _demand(most < 2**63, f"tensor {name!r} has a shape that overflows a 64-bit size: {shape!r}")
    _demand(size == span[1] - span[0], f"tensor {name!r}: {dtype} {shape} is {size} bytes, but data_offsets are {span}")
    return dtype, shape, *span


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
    header = json.loads(text, object_pairs_hook=_unique, parse_constant=lambda word: _demand(False, f"{word}: no JSON"),
                        parse_int=lambda digits: float(digits) if digits[0] == "-" else int(digits))    # -0 is no count
    json.dumps(header, ensure_ascii=False).encode("utf-8")      # half a surrogate pair, "\\ud800", passes until here
    metadata = header.pop("__metadata__", None)
    _demand(metadata is None or isinstance(metadata, dict) and all(isinstance(text, str) for text in metadata.values()),
            "its __metadata__ is not a map from strings to strings")
    entries = {name: _check_entry(name, entry) for name, entry in header.items()}
    entries = dict(sorted(entries.items(), key=lambda item: item[1][2:]))
    covered = 0
    for name, (_, _, begin, end) in entries.items():    # every byte belongs to one tensor: nothing can hide between
        _demand(begin == covered, f"a hole or an overlap: tensor {name!r} begins at {begin}, others end at {covered}")
        covered = end
    _demand(8 + n + covered == len(buffer),
            f"its tensors cover {covered:,} bytes of data, the file holds {len(buffer) - 8 - n:,}")
    return metadata or {}, entries, 8 + n


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
        why = "JSON nested too deeply" if isinstance(fault, RecursionError) else f"{fault!s:.150}"    # may be MBs
        raise SafetensorsError(f"{path} is not a valid safetensors file: {why}; fetch or save it again") from fault


def _load_file(path):
    (buffer, _, entries, start), tensors = _open(path), {}
    for name, (dtype, shape, begin, end) in entries.items():
        kind, flat = DTYPES[dtype], torch.empty(0, dtype=torch.uint8)
        if begin < end:                         # frombuffer refuses to look at nothing
            flat = torch.frombuffer(buffer, dtype=torch.uint8, count=end - begin, offset=start + begin)
        shifted = (start + begin) % kind.itemsize               # by a header that was not padded
        tensors[name] = (flat.clone() if shifted else flat).view(kind).reshape(shape)
    return tensors


def weight_map(path):
    """The index of a model in several files: {tensor: path of its file}. A name that leaves the folder is refused."""
    index = read_json(path, SafetensorsError)
    home = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(home, dict):
        raise SafetensorsError(f"{path} has no weight_map from tensor names to file names; fetch it again")
    for file in home.values():
        if not isinstance(file, str) or file in ("", ".", "..") or re.search(r"[/\\:]", file):
            raise SafetensorsError(f"{path} names {file!r:.99}, no file of its own folder; do not trust this index")
    return {name: Path(path).parent / file for name, file in home.items()}


def load_safetensors(path) -> dict[str, torch.Tensor]:
    """Every tensor of a file, or of all the files behind a `model.safetensors.index.json`: on the CPU, not copied.

    The file is mapped: a page is read when a tensor's numbers are first used. Writing into a tensor changes neither the
    file nor another load of it. Raises SafetensorsError naming the file and the fault.
    """
    if Path(path).suffix != ".json":
        return _load_file(path)
    home, tensors = weight_map(path), {}
    for file in dict.fromkeys(home.values()):   # a tensor the index does not list stays, for copy_weights to report
        tensors |= {name: tensor for name, tensor in _load_file(file).items() if home.get(name, file) == file}
    for name in home.keys() - tensors.keys():
        raise SafetensorsError(f"{path} places {name!r:.99} in {home[name].name}, which lacks it; fetch that again")
    return tensors


def read_metadata(path) -> dict[str, str]:
    """The `__metadata__` strings of a file, {} when it has none."""
    return _open(path)[1]


# ---- writing

def save_safetensors(tensors, path, metadata=None):
    """Write {name: tensor} and {str: str} as one safetensors file, byte for byte as the original library does.

    Tensors may live on any device with any strides; each comes to the CPU in row order when its turn is there.
    Raises SafetensorsError for what the format cannot hold, OSError on a full disk; the old file then still stands.
    """
    kinds, header, begin = {dtype: kind for kind, dtype in DTYPES.items()}, {}, 0
    for name, tensor in tensors.items():
        if not torch.is_tensor(tensor) or tensor.layout != torch.strided or tensor.is_meta or tensor.dtype not in kinds:
            what = f"{tensor.layout} {tensor.dtype} {tensor.device}" if torch.is_tensor(tensor) else type(tensor)
            raise SafetensorsError(f"safetensors cannot hold {name!r}, {what}; give a dense tensor of a common dtype")
    if not all(isinstance(text, str) for pair in (metadata or {}).items() for text in pair):
        raise SafetensorsError(f"safetensors metadata maps strings to strings, got {metadata}; convert with str()")
    header |= {} if metadata is None else {"__metadata__": metadata}
    names = sorted(tensors, key=lambda name: (-list(kinds).index(tensors[name].dtype), name))
    for name in names:
        shape, end = list(tensors[name].shape), begin + tensors[name].numel() * tensors[name].itemsize
        header[name] = {"dtype": kinds[tensors[name].dtype], "shape": shape, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)             # the data then starts at a multiple of 8, the widest element

    def write(file):
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:      # a conjugate or negated view is a flag beside the bytes: resolve_* applies it
            tensor = tensors[name].detach().cpu().resolve_conj().resolve_neg().contiguous()
            flat = tensor.as_strided((tensor.numel(),), (1,))    # one lone element counts as contiguous at any stride
            file.write(flat.view(torch.uint8).numpy())
    atomic_write(path, write)


# ---- one strict copy: every weight from a known place, or no model at all

def _shape(rule, tensors):
    """The shape of what a rule makes; where the tensors have not even the axes for it, that of the first."""
    theirs = [tensors[name].to("meta") for name in rule.names]                    # shapes without numbers
    try:
        return tuple(rule.make(theirs).shape)
    except (RuntimeError, IndexError, TypeError):
        return tuple(theirs[0].shape)


def _sentence(start, faults, end):
    """One sentence of at most 300 characters: up to five names of each kind of fault, and how many more there are."""
    for most in (5, 4, 3, 2, 1):
        parts = [f"{kind}: {', '.join(found[:most])}" + f" and {len(found) - most} more" * (len(found) > most)
                 for kind, found in faults.items() if found]
        text = f"{start}; {'; '.join(parts)}; {end}"
        if len(text) <= 300:
            return text
    return text[:297] + "..."


def copy_weights(model, tensors, rules, ignore=(), source="the checkpoint"):
    """Fill every parameter and persistent buffer of `model` from the tensors of a file: all of them, or none.

    tensors: {their name: tensor} of any dtype and device; rules: {our name: Source}, the tables of names.py;
    ignore: patterns such as "*.attn.masked_bias" for what is no weight; source: what the message calls the tensors.
    A model on the "meta" device gets its memory when all is known to fit. Raises one UserError naming what does not.
    Returns what became of each tensor: rows (their names, our name, shape, how), our name "" where it was ignored.
    """
    ours = model.state_dict(keep_vars=True)
    rules = {name: rule for name, rule in rules.items() if name in ours}
    used = {theirs for rule in rules.values() for theirs in rule.names}
    ignored = [name for name in tensors if name not in used and any(fnmatchcase(name, glob) for glob in ignore)]
    shapes = {name: (_shape(rule, tensors), tuple(ours[name].shape)) for name, rule in rules.items()
              if tensors.keys() >= set(rule.names)}
    misfits = {name: pair for name, pair in shapes.items() if pair[0] != pair[1]}
    widths = Counter(pair for a, b in misfits.values() for pair in set(zip(a, b)) if pair[0] != pair[1])
    (theirs, wanted), count = widths.most_common(1)[0] if widths else ((0, 0), 0)
    alike = count > max(1, len(misfits) / 2)                    # one cause: the names tell the rest
    faults = {"missing": sorted(used - tensors.keys()) + [name for name in ours if name not in rules],
              "unused": sorted(tensors.keys() - used - set(ignored)),
              "another shape": [rules[name].names[0] + ("" if alike else f" {a} for our {b}")
                                for name, (a, b) in misfits.items()]}
    if any(faults.values()):
        cause = f": most are {theirs} wide where ours are {wanted}" if alike else ""
        raise UserError(_sentence(f"{source} does not fit {type(model).__name__}{cause}", faults,
                                  "check the file and its config.json"))
    if any(tensor.is_meta for tensor in ours.values()):
        ours = model.to_empty(device="cpu").state_dict(keep_vars=True)
    with torch.no_grad():
        for name, rule in rules.items():
            ours[name].copy_(rule.make([tensors[theirs] for theirs in rule.names]))           # keeps dtype and device
    return [(" + ".join(rule.names), name, tuple(ours[name].shape), rule.op) for name, rule in rules.items()] + [
        (name, "", tuple(tensors[name].shape), "ignored") for name in ignored]
