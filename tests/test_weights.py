"""weights.py: every dtype comes back bit for bit, every rule of the format is enforced, nothing is done by halves.

The oracle for the format is a file assembled by hand, byte by byte, in `pack` below.
"""
import json
import random
import struct
import warnings

import pytest
import torch
from torch import nn

from tinyvlm.config import UserError
from tinyvlm.names import Source
from tinyvlm.weights import (DTYPES, SafetensorsError, copy_weights, load_safetensors, read_metadata,
                             save_safetensors)


def pack(header, data=b""):
    """The format in one line: length, header, data."""
    text = header if isinstance(header, bytes) else (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(text)) + text + data


def line(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def put(folder, raw, name="x.safetensors"):
    (folder / name).write_bytes(raw)
    return folder / name


# ---- reading and writing tensors

def test_the_bytes_of_a_file_assembled_by_hand(tmp_path):
    """Header padded to 8 with spaces; I64 before F32 before U8 (so each is aligned), then by name."""
    header = ('{"__metadata__":{"format":"pt"},"n":{"dtype":"I64","shape":[],"data_offsets":[0,8]},'
              '"a":{"dtype":"F32","shape":[1,2],"data_offsets":[8,16]},'
              '"b\u00e9":{"dtype":"F32","shape":[0,3],"data_offsets":[16,16]},'
              '"m":{"dtype":"U8","shape":[3],"data_offsets":[16,19]}}').encode()
    header += b" " * (-len(header) % 8)
    expected = pack(header, struct.pack("<qff3B", -7, 1.5, -2.0, 1, 2, 255))
    tensors = {"m": torch.tensor([1, 2, 255], dtype=torch.uint8), "b\u00e9": torch.zeros(0, 3),
               "a": torch.tensor([[1.5, -2.0]]), "n": torch.tensor(-7)}
    save_safetensors(tensors, tmp_path / "x.safetensors", {"format": "pt"})
    assert (tmp_path / "x.safetensors").read_bytes() == expected
    loaded = load_safetensors(tmp_path / "x.safetensors")
    assert list(loaded) == ["n", "a", "b\u00e9", "m"] and all(torch.equal(loaded[k], tensors[k]) for k in tensors)
    assert read_metadata(tmp_path / "x.safetensors") == {"format": "pt"}


@pytest.mark.parametrize("kind", DTYPES)
def test_every_dtype_comes_back_bit_for_bit(tmp_path, kind):
    """pad=3 shifts the data off every grid but the byte's, as unpadded headers of old writers do."""
    dtype = DTYPES[kind]
    raw = torch.randint(0, 2, (6 * dtype.itemsize,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    save_safetensors({"x": raw.view(dtype).reshape(2, 3)}, tmp_path / "x.safetensors")
    text = (tmp_path / "x.safetensors").read_bytes()
    n = int.from_bytes(text[:8], "little")
    assert json.loads(text[8:8 + n])["x"]["dtype"] == kind and text[8 + n:] == bytes(raw.tolist())
    for pad in (0, 3):
        path = put(tmp_path, pack(text[8:8 + n] + b" " * pad, text[8 + n:]))
        with warnings.catch_warnings():
            warnings.simplefilter("error")          # torch warns about tensors on read-only memory
            loaded = load_safetensors(path)["x"]
        assert loaded.dtype == dtype and loaded.shape == (2, 3) and loaded.data_ptr() % dtype.itemsize == 0
        assert torch.equal(loaded.reshape(-1).view(torch.uint8), raw)


def test_views_and_tied_weights_are_saved_as_what_they_show(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    odd = {"t": base.t(), "cut": base[:, 1:3], "wide": base[:1].expand(3, 4), "tie": base, "tied": base,
           "one": base[1:2, 1:2].t(), "param": nn.Parameter(base),
           "last": torch.ones(1, 2, 3, 4).to(memory_format=torch.channels_last)}
    save_safetensors(odd, tmp_path / "x.safetensors")
    loaded = load_safetensors(tmp_path / "x.safetensors")
    assert loaded.keys() == odd.keys() and all(torch.equal(loaded[name], odd[name]) for name in odd)


def test_writing_into_a_loaded_tensor_is_private(tmp_path):
    path = put(tmp_path, pack({"x": line()}, struct.pack("<f", 1.0)))
    before, first, second = path.read_bytes(), load_safetensors(path)["x"], load_safetensors(path)["x"]
    first.fill_(5.0)
    assert path.read_bytes() == before and second.item() == 1.0 and first.item() == 5.0
    save_safetensors({"x": first + 1}, path)    # replacing the file does not pull the ground from under old tensors
    assert second.item() == 1.0 and load_safetensors(path)["x"].item() == 6.0


# ---- malformed files

D4 = b"\0" * 4
FAULTS = {f"no room {k}": (raw, "bytes cannot hold a header of") for k, raw in enumerate([
    b"\2" + b"\0" * 6, struct.pack("<Q", 3) + b"{}", struct.pack("<Q", 2**64 - 1) + b"{}"])} | {
    f"no object {k}": (pack(text), "does not start with") for k, text in enumerate([b"", b" {}", b"[]"])} | {
    "nothing": (b"", "empty file"),
    "bad UTF-8": (pack(b'{"\xff": 1}'), "utf-8"),
    "bad JSON": (pack(b"{"), "line 1"),
    "NUL after the JSON": (pack(b"{}\0"), "Extra data"),
    "deep nesting": (pack('{"x":' + "[" * 200_000), "recursion"),
    "duplicate tensor": (pack('{"x":%s,"x":%s}' % ((json.dumps(line()),) * 2), D4), "a name appears twice among ['x'"),
    "duplicate field": (pack('{"x":{"shape":[1],"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', D4), "twice"),
    "begin after end": (pack({"x": line(offsets=(4, 0))}, D4), "of 4 bytes has the data_offsets 4, 0"),
    "size and offsets differ": (pack({"x": line(shape=(2,))}, D4), "of 8 bytes"),
    "larger than any file": (pack({"x": line(shape=(2**59,))}, D4), "of 2305843009213693952 bytes"),
    "hole at the start": (pack({"x": line(offsets=(4, 8))}, D4 * 2), "'x' begins at 4"),
    "hole": (pack({"x": line(), "y": line(offsets=(8, 12))}, D4 * 3), "'y' begins at 8, others end at 4"),
    "overlap": (pack({"x": line(), "y": line()}, D4), "'y' begins at 0, others end at 4"),
    "trailing bytes": (pack({"x": line()}, D4 + b"!"), "the file holds 5"),
    "data cut short": (pack({"x": line()}, D4[:3]), "ends at 4 of 3 bytes"),
    "data without tensors": (pack({}, D4), "cover 0 bytes"),
    "metadata with a number": (pack({"__metadata__": {"a": 1}}), "__metadata__"),
    "metadata a list": (pack({"__metadata__": ["a"]}), "AttributeError")} | {
    f"entry {entry}": (pack({"x": entry}, D4), fault)
    for fault, entries in {
        "TypeError": [1, ["F32", [1], [0, 4]], line(["F32"])],
        "KeyError": [{"shape": [1], "data_offsets": [0, 4]}, {"dtype": "F32", "data_offsets": [0, 4]},
                     {"dtype": "F32", "shape": [1]}, line("f32"), line("F4", (8,))],
        "'x' has the shape": [
            {**line(), "shape": None}, {**line(), "shape": {}}, line(shape=(True,)), line(shape=(1.0,)), line(shape=("1",)), line(shape=(-1, -1)), line(offsets=(0, "4")),
            line(offsets=(-4, 0)), line(shape=(2**62, 4)), line(shape=(0, 2**64), offsets=(0, 0))],
        "ValueError": [{"dtype": "F32", "shape": [1], "data_offsets": {}}, line(offsets=(0, 4, 4)),
                       line("U8", (2**32, 2**32), (0, 0))]}.items() for entry in entries}


@pytest.mark.parametrize("case", FAULTS)
def test_each_rule_of_the_format_is_enforced_and_named(tmp_path, case):
    raw, fault = FAULTS[case]
    with pytest.raises(SafetensorsError) as caught:
        load_safetensors(put(tmp_path, raw))
    assert fault in str(caught.value) and "x.safetensors" in str(caught.value)
    assert isinstance(caught.value, UserError) and isinstance(caught.value, ValueError)


def test_a_complaint_about_a_huge_shape_stays_short_and_a_huge_header_is_not_read(tmp_path):
    """A shape of 75 MB was printed whole."""
    for raw in (pack({"x": line(shape=[1] * 10_000 + [-1])}, D4), pack({"x" * 10_000: line("F4", (8,))}, D4)):
        with pytest.raises(SafetensorsError) as caught:
            load_safetensors(put(tmp_path, raw))
        assert len(str(caught.value)) < 260 + len(str(tmp_path))
    with open(tmp_path / "big.safetensors", "wb") as file:      # sparse: takes no room on the disk
        file.write(struct.pack("<Q", 100_000_001) + b"{}")
        file.truncate(100_000_100)
    with pytest.raises(SafetensorsError, match="a header of 100000001"):
        load_safetensors(tmp_path / "big.safetensors")


@pytest.mark.parametrize("raw, shapes", [
    (pack(b"{}"), {}),
    (pack({"__metadata__": None, "x": {**line(), "note": [1, {"z": -1}]}}, D4), {"x": (1,)}),
    (pack({"y": line("U8", (2,), (2, 4)), "x": line("U8", (1, 2), (0, 2))}, D4), {"x": (1, 2), "y": (2,)}),
    (pack({"x": line(), "e": line(shape=(0, 7), offsets=(4, 4)), "f": line(shape=(2, 0), offsets=(0, 0))}, D4),
     {"f": (2, 0), "x": (1,), "e": (0, 7)}),
    (pack('{"\\ud83d\\ude00":{"\\u0064type":"F32","shape":[],"data_offsets":[0,4]}}\n\t ', D4), {"\U0001f600": ()}),
], ids=["nothing", "null metadata, unknown field", "any order", "empty tensors", "escapes and blanks"])
def test_unusual_but_valid_files_open(tmp_path, raw, shapes):
    loaded = load_safetensors(put(tmp_path, raw))
    assert {name: tuple(tensor.shape) for name, tensor in loaded.items()} == shapes


def small(folder):
    tensors = {"a": torch.arange(4.0), "b": torch.ones(2, 2, dtype=torch.bfloat16), "c": torch.tensor(True)}
    save_safetensors(tensors, folder / "small.safetensors", {"format": "pt"})
    return (folder / "small.safetensors").read_bytes()


def test_a_missing_file_a_folder_and_a_file_cut_at_any_byte_are_refused(tmp_path):
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(SafetensorsError, match="cannot read"):
            load_safetensors(path)
    raw = small(tmp_path)
    for length in range(len(raw)):
        with pytest.raises(SafetensorsError):
            load_safetensors(put(tmp_path, raw[:length]))


def test_random_damage_raises_nothing_but_safetensors_error(tmp_path):
    """What still opens must be covered exactly by its tensors; both outcomes must occur, or this is no test."""
    raw, rng, opened = small(tmp_path), random.Random(0), 0
    n = int.from_bytes(raw[:8], "little")
    bits = [b"-0", b"1e9", b"null", b"[]", b"{}", b"true", b'"F32"', b"18446744073709551616", b"\\ud800", b"\0"]
    for _ in range(300):
        header = bytearray(raw[8:8 + n])
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(header))
            header[at:at + rng.randint(0, 3)] = rng.choice(bits) if rng.random() < 0.5 else bytes([rng.randrange(256)])
        try:
            tensors = load_safetensors(put(tmp_path, pack(bytes(header), raw[8 + n:])))
        except SafetensorsError:
            continue
        assert sum(tensor.numel() * tensor.itemsize for tensor in tensors.values()) == len(raw) - 8 - n
        opened += 1
    assert 0 < opened < 300, f"{opened} of 300 damaged files opened"


# ---- the strict copy

class Tiny(nn.Module):
    """Two layers of joined q, k, v, and a buffer."""

    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(5, 2)
        self.h = nn.ModuleList([nn.Linear(2, 6) for _ in range(2)])
        self.register_buffer("mean", torch.zeros(2, dtype=torch.float64))


TABLE = {"wte.weight": Source(("emb",)), "mean": Source(("mean",)),
         **{f"h.{i}.weight": Source((f"{i}.w",), "T") for i in range(2)},
         **{f"h.{i}.bias": Source((f"{i}.q", f"{i}.k", f"{i}.v")) for i in range(2)}}


def foreign():
    torch.manual_seed(0)
    tensors = {"emb": torch.randn(5, 2), "mean": torch.randn(2), "0.mask": torch.ones(3, dtype=torch.uint8)}
    for i in "01":
        tensors[f"{i}.w"] = torch.randn(2, 6)
        tensors.update({f"{i}.{part}": torch.randn(2).half() for part in "qkv"})
    return tensors


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_copy_weights_fills_everything(device):
    """On "meta" the model has sizes and no memory yet."""
    theirs = foreign()
    with torch.device(device):
        model = Tiny()
    copy_weights(model, theirs, TABLE, ignore=["*.mask"])
    assert torch.equal(model.wte.weight, theirs["emb"]) and torch.equal(model.h[1].weight, theirs["1.w"].t())
    assert torch.equal(model.mean, theirs["mean"].double())
    assert torch.equal(model.h[0].bias, torch.cat([theirs[f"0.{part}"].float() for part in "qkv"]))
    assert all(parameter.requires_grad and parameter.grad_fn is None for parameter in model.parameters())


@pytest.mark.parametrize("changes, faults", [
    ({"mean": None, "1.q": None, "extra": torch.ones(1)}, [": 1.q is missing, extra has no use, mean is missing (3"]),
    ({"0.w": torch.ones(6, 2)}, [", the first (2, 6) where ours is (6, 2): 0.w (1 in all)"]),
    ({"0.w": torch.ones(2, 2), "emb": torch.ones(4, 2)}, [", the first (4, 2) where ours is (5, 2): emb, 0.w"])])
def test_copy_weights_names_every_fault_and_writes_nothing(changes, faults):
    model, tensors = Tiny(), foreign() | changes
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError) as caught:
        copy_weights(model, tensors, TABLE, ignore=["*.mask"], source="some/file")
    text = str(caught.value)
    assert text.startswith("some/file does not fit Tiny") and all(fault in text for fault in faults), text
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(UserError, match="h.1.bias is missing"):         # a weight of ours that has no rule
        copy_weights(model, foreign(), {name: rule for name, rule in TABLE.items() if name != "h.1.bias"}, ["*.mask"])


def test_a_file_of_another_width_is_one_short_sentence_that_shows_the_cause():
    """60 tensors were once printed in 3,000 characters, and the reader had to find out that all are 48 wide."""
    ours = nn.ModuleDict({f"layer{i}": nn.Linear(32, 64) for i in range(30)})
    theirs = nn.ModuleDict({f"layer{i}": nn.Linear(48, 64) for i in range(30)}).state_dict()
    rules = {name: Source((name,)) for name in theirs}
    with pytest.raises(UserError) as caught:
        copy_weights(ours, theirs, rules, source="model.safetensors")
    text = str(caught.value)
    assert "the first (64, 48) where ours is (64, 32): layer0.weight, layer1.weight" in text
    assert "layer4.weight" in text and "layer5.weight" not in text and "(30 in all)" in text and len(text) <= 300
