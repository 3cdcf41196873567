"""Weights on disk: the safetensors format by hand, and one strict copy from a file into a model.

A safetensors file is three things in a row, all little-endian:

    8 bytes   N, the length of the header
    N bytes   JSON: {"wte.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, "__metadata__": {...}}
    the rest  the numbers of every tensor, row by row; data_offsets count from here

No code is stored, so opening a stranger's file cannot run any (a pickled .bin can). As at github.com/huggingface/
safetensors, but for slices, elements smaller than a byte (F4, F6) and models in several files."""
import json
import math
import mmap
from fnmatch import fnmatchcase

import torch

from .config import UserError
from .files import atomic_write

# In the format's own order. Files hold the last kinds first: wide elements come before narrow ones, so each tensor
# starts at a multiple of its element size without any padding.
DTYPES = {"BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E5M2": torch.float8_e5m2,
          "F8_E4M3": torch.float8_e4m3fn, "I16": torch.int16, "U16": torch.uint16, "F16": torch.float16,
          "BF16": torch.bfloat16, "I32": torch.int32, "U32": torch.uint32, "F32": torch.float32,
          "C64": torch.complex64, "F64": torch.float64, "I64": torch.int64, "U64": torch.uint64}
MAX_HEADER = 100_000_000        # bytes, the original's limit: a damaged length cannot make us parse gigabytes


class SafetensorsError(UserError, ValueError):
    """A file that is missing or malformed."""


# ---- reading

def _demand(ok, fault):
    if not ok:
        raise ValueError(fault)


def _unique(pairs):
    """json keeps the last of two equal keys; two readers could then find two different models in one file."""
    _demand(len(dict(pairs)) == len(pairs), f"a name appears twice among {[name for name, _ in pairs]}")
    return dict(pairs)


def _tensors(header, data):
    """The header's entries -> {name: tensor over its part of data (uint8)}. Every byte belongs to exactly one tensor:
    nothing can hide between two, nothing is read twice."""
    tensors, covered = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape, (begin, end) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        whole = isinstance(shape, list) and all(type(n) is int and 0 <= n < 2**60 for n in [*shape, begin, end])
        _demand(whole, f"{name!r:.60} has the shape {shape} and the data_offsets {begin}, {end}")
        size = math.prod(shape) * dtype.itemsize                                  # in bytes
        _demand(size == end - begin, f"{name!r:.60} of {size} bytes has the data_offsets {begin}, {end}")
        _demand(begin == covered, f"a hole or an overlap: {name!r:.60} begins at {begin}, others end at {covered}")
        _demand(end <= len(data), f"{name!r:.60} ends at {end} of {len(data)} bytes of data")
        flat, covered = data[begin:end], end
        shifted = flat.storage_offset() % dtype.itemsize                # by a header that was not padded
        tensors[name] = (flat.clone() if shifted else flat).view(dtype).reshape(shape)
    _demand(covered == len(data), f"its tensors cover {covered} bytes of data, the file holds {len(data)}")
    return tensors


def _read(path):
    """Map a file into memory, which reads nothing yet, and check its header -> ({name: tensor}, metadata). No number
    from the file sizes anything before it was compared with the file's real length."""
    try:
        with open(path, "rb") as file:
            buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        n = int.from_bytes(buffer[:8], "little")                                  # length of the header
        _demand(n <= MAX_HEADER and 8 + n <= len(buffer), f"its {len(buffer)} bytes cannot hold a header of {n}")
        text = buffer[8:8 + n].decode("utf-8")
        _demand(text.startswith("{"), "its header does not start with '{'")
        header = json.loads(text, object_pairs_hook=_unique)
        metadata = header.pop("__metadata__", None) or {}
        _demand(all(type(value) is str for value in metadata.values()), "its __metadata__ holds more than strings")
        return _tensors(header, torch.frombuffer(buffer, dtype=torch.uint8)[8 + n:]), metadata
    except OSError as fault:
        raise SafetensorsError(f"cannot read {path}: {fault.strerror}; check the path") from fault
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as fault:    # may quote a megabyte of header
        fault = f"{type(fault).__name__}: {fault}"
        raise SafetensorsError(f"{path} is no valid safetensors file ({fault:.150}); fetch or save it again") from None


def load_safetensors(path) -> dict[str, torch.Tensor]:
    """Every tensor of a file, on the CPU and not copied. Raises SafetensorsError naming the file and the fault. The
    file is mapped: a page is read when a tensor's numbers are first used, and writing into one changes no file."""
    return _read(path)[0]


def read_metadata(path) -> dict[str, str]:
    """The `__metadata__` strings of a file, {} when it has none."""
    return _read(path)[1]


# ---- writing

def save_safetensors(tensors, path, metadata=None):
    """Write {name: tensor} and {str: str} as one safetensors file, byte for byte as the original library does. Tensors
    may live on any device with any strides; each comes to the CPU in row order when its turn is there."""
    kinds, begin = {dtype: kind for kind, dtype in DTYPES.items()}, 0
    header = {} if metadata is None else {"__metadata__": metadata}
    names = sorted(tensors, key=lambda name: (-list(kinds).index(tensors[name].dtype), name))
    for name in names:
        end = begin + tensors[name].numel() * tensors[name].itemsize
        kind, shape = kinds[tensors[name].dtype], list(tensors[name].shape)
        header[name], begin = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}, end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)             # the data then starts at a multiple of 8, the widest element

    def write(file):
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            tensor = tensors[name].detach().cpu().clone(memory_format=torch.contiguous_format)
            file.write(tensor.view(-1).view(torch.uint8).numpy())
    atomic_write(path, write)


# ---- one strict copy: every weight from a known place, or no model at all

def copy_weights(model, tensors, rules, ignore=(), source="the checkpoint"):
    """Fill every parameter and persistent buffer of `model` from the tensors of a file: all of them, or none.

    tensors: {their name: tensor} of any dtype; rules: {our name: Source}, see names.py; ignore: patterns such as
    "*.attn.masked_bias" for what is no weight; source: what the message calls the tensors. A model made on the "meta"
    device gets its memory here, on the CPU, when all is known to fit. Raises UserError with the first five faults."""
    ours = model.state_dict()
    rules = {name: rule for name, rule in rules.items() if name in ours}
    used = {theirs for rule in rules.values() for theirs in rule.names}           # names of theirs
    faults = sorted([f"{name} is missing" for name in (used - tensors.keys()) | (ours.keys() - rules.keys())] + [
        f"{name} has no use" for name in tensors.keys() - used if not any(fnmatchcase(name, glob) for glob in ignore)])
    what = f"{source} does not fit {type(model).__name__}"
    wrong = [] if faults else [name for name in rules if rules[name].shape(tensors) != tuple(ours[name].shape)]
    if wrong:
        what += f", the first {rules[wrong[0]].shape(tensors)} where ours is {tuple(ours[wrong[0]].shape)}"
        faults = [rules[name].names[0] for name in wrong]
    if faults:
        what += f": {', '.join(faults[:5])}"
        raise UserError(f"{what:.240} ({len(faults)} in all); check the file and its config.json")
    ours = model.to_empty(device="cpu").state_dict()
    for name, rule in rules.items():
        ours[name].copy_(rule.make([tensors[theirs] for theirs in rule.names]))             # ours keeps its dtype
