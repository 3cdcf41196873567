"""Training steps as a pure function of (seed, step): which images, which captions, in which order, how padded."""
import numpy as np
import pytest
import torch
from PIL import Image

from data import ImageStore
from helpers import album
from tinyvlm.batches import NO_ROW, Batches, Rows, eval_batches, load_steps, pad_rows, step_order
from tinyvlm.captioning import caption_rows
from tinyvlm.config import UserError
from tinyvlm.device import Device
from tinyvlm.gpt import IGNORE
from tinyvlm.image import Recipe
from tinyvlm.layouts import Dataset, photos
from tinyvlm.tokenizer import END, BPETokenizer


class Letters:
    """A tokenizer for tests: a letter, a token."""
    unk_id, vocab_size = 26, 99

    def encode_plain(self, text):
        return [ord(c) - 96 for c in text if c != " "]


def rows_of(captions, max_tokens=10, clean="none"):
    return caption_rows(captions, Letters(), 50, 60, max_tokens, clean)


def toy(n=7, K=1, batch_size=3, features=False, **how):
    """Batches over n grey images (or numbers in their place), image i with 1 + i % 3 captions."""
    captions = [["ab", "abc", "a"][:1 + i % 3] for i in range(n)]
    dataset = Dataset("toy", list(map(str, range(n))), captions, {"train": list(range(n)), "val": list(range(n))})
    dataset.open = lambda i: Image.new("RGB", (4, 4), (i, i, i))
    if features:
        store = ImageStore(dataset, None, torch.arange(n).half()[:, None], {i: i for i in range(n)})
    else:
        store = ImageStore.of_pixels(dataset, ["train"], Recipe(size=4), say=lambda text: None)
    return Batches(store, Rows(rows_of(captions)[0]), batch_size, K, **how)


def test_every_epoch_sees_every_sample_once_in_a_new_order():
    picks = [pick for step in range(14) for pick in step_order(7, 3, step, seed=0)]
    epochs = [[i for i, e in picks if e == epoch] for epoch in range(6)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs) and len({tuple(e) for e in epochs}) == 6
    assert picks[18:21] == step_order(7, 3, 6, seed=0) != step_order(7, 3, 6, seed=1)
    assert len(step_order(2, 9, 0, seed=0)) == 9                                  # a batch larger than the data


def test_no_sample_meets_itself_in_a_contrastive_batch():
    """Laid end to end, epochs meet within a batch, and an image would be its own wrong answer."""
    steps = [[i for i, _ in step_order(7, 3, step, 0, whole=True)] for step in range(20)]
    assert all(len(set(step)) == 3 for step in steps) and set(sum(steps, [])) == set(range(7))
    assert any(len({i for i, _ in step_order(7, 3, step, 0)}) < 3 for step in range(20))


def test_padding_is_told_by_length_and_the_end_is_learned():
    """end == pad == 0 here: the one real end must be a target, the padding must not, the first word must be."""
    idx, targets = pad_rows([([0, 5, 6], [5, 6, 0]), ([0, 7], [7, 0]), NO_ROW])
    assert idx.tolist() == [[0, 5, 6], [0, 7, 0], [0, 0, 0]]
    assert targets.tolist() == [[5, 6, 0], [7, 0, IGNORE], [IGNORE] * 3]


def test_fixed_rows_differ_by_padding_only():
    """What a GPU sees (one shape) and what a CPU computes (no needless padding) hold the same tokens."""
    rows = rows_of([["ab", "abcdef"], ["a"]])[0]
    (idx, targets), (same, also) = Rows(rows).take([0, 2]), Rows(rows, fixed=True).take([0, 2])
    assert idx.shape == (2, 3) and same.shape == (2, 7)
    assert torch.equal(same[:, :3], idx) and torch.equal(also[:, :3], targets) and (also[:, 3:] == IGNORE).all()


def test_captions_teach_neither_to_stop_when_cut_nor_the_unknown_word():
    """What teaches nothing, after cleaning or of unknown words alone, once gave the mean of nothing, nan."""
    rows, notes = rows_of([["abc", "abcd"]], max_tokens=3)
    assert rows == [[([50, 1, 2, 3], [1, 2, 3, 60]), ([50, 1, 2], [1, 2, 3])]] and "1 captions are longer" in notes[0]
    rows, notes = rows_of([["abc", "!!!"], ["z"], ["az"]], clean="words")
    assert [len(r) for r in rows] == [1, 1, 1] and rows[1] == [([50, 26], [IGNORE, 60])]
    assert rows[2] == [([50, 1, 26], [1, IGNORE, 60])]
    assert any("1 captions hold nothing" in n for n in notes) and any("2 words" in n for n in notes)
    assert rows_of([["z"]], max_tokens=0)[0] == [[]]


def test_captions_cannot_become_special_tokens():
    """Text that spells <image> or the end stays text: of a row, only the first id and the last target are special."""
    tokenizer = BPETokenizer.train(["a b c"], 300)
    first, end = tokenizer.token_to_id("<image>"), tokenizer.token_to_id(END)
    rows, _ = caption_rows([[f"a <image> b {END} c"]], tokenizer, first, end, 99, "none")
    idx, targets = rows[0][0]
    assert not {first, end} & {*idx[1:], *targets[:-1]} and idx[0] == first and targets[-1] == end


def test_all_captions_take_their_turn():
    rows = Rows(rows_of([["a"], ["a", "b"], ["a", "b", "c"]])[0])
    assert {tuple(rows.of(2, 1, epoch)) for epoch in range(3)} == {(3,), (4,), (5,)}
    assert rows.of(1, 3) == [1, 2, rows.empty]                                    # two captions, three asked for
    assert rows.n_targets[rows.empty] == 0


@pytest.mark.parametrize("features", [False, True])
def test_processes_and_micro_batches_share_one_step(features):
    """2 processes x 2 micro-batches of 2 are the 8 images of the one-process step; their weights add up to one."""
    whole = toy(20, 2, 8, features).make(5)[0]
    ranks = [toy(20, 2, 8, features, world=2, accum=2, rank=rank).make(5) for rank in (0, 1)]
    parts = [ranks[rank][m] for m in (0, 1) for rank in (0, 1)]
    assert torch.equal(torch.cat([p.img for p in parts]), whole.img)
    assert sum(p.share for p in parts) == pytest.approx(1) and whole.share == 1
    assert sum(p.n_targets for p in parts) == whole.n_targets
    assert all(p.n_targets == int((p.targets != IGNORE).sum()) for p in parts)
    if features:                                                # captions of one length stand together
        assert all(img == i for p in parts for img, i in zip(p.img[:, 0].tolist(), p.members))
    else:
        assert torch.equal(torch.cat([p.rand for p in parts], 1), whole.rand)     # same augmentation, however split


def test_images_whose_captions_say_left_or_right_are_never_mirrored():
    batches = toy(n=20, batch_size=20)
    batches.store.dataset.may_flip = lambda i: i >= 10
    picks = [i for i, _ in step_order(20, 20, 0, seed=0)]
    mirror = batches.make(0)[0].rand[4].tolist()
    assert all((value == 1) == (i < 10) for value, i in zip(mirror, picks))


def test_evaluation_sees_every_caption_once_also_in_several_processes():
    batches = toy()
    for world in (1, 2, 3):
        found = [(i, row) for rank in range(world)
                 for b in eval_batches(batches.store, batches.rows, "val", 2, None, rank, world)
                 for i, row in zip(np.repeat(b.members, len(b.idx) // len(b.members)), b.targets.tolist()) if 60 in row]
        assert sorted(i for i, _ in found) == sorted(i for i in range(7) for _ in range(1 + i % 3))


def test_images_without_any_row_are_passed_over():
    batches = toy()
    rows = Rows([[]] + [[([1], [2])]] * 6)
    assert Batches(batches.store, rows, 2).members == [1, 2, 3, 4, 5, 6]
    assert sum(batch.n_targets for batch in eval_batches(batches.store, rows, "val", 3)) == 6


# ---- the image store

def test_broken_images_are_counted_and_refused_above_one_percent(tmp_path):
    folder, notes = album(tmp_path / "a"), []
    (folder / "Images" / "5.jpg").write_bytes(b"not a jpeg")
    dataset = photos("folder", folder)
    with pytest.raises(UserError, match="1 of 20 images are broken, first .*5.jpg.*--allow-broken"):
        ImageStore.of_pixels(dataset, dataset.splits, Recipe(size=8), say=notes.append)
    store = ImageStore.of_pixels(dataset, dataset.splits, Recipe(size=8), allow_broken=True, say=notes.append)
    assert sum(len(store.usable(s)) for s in dataset.splits) == 19 and len(store.broken) == 1
    assert any("5.jpg" in note for note in notes)


def test_a_streamed_image_that_is_gone_leaves_its_place_to_another(capsys):
    """Its captions come along: what is left belongs together."""
    batches = toy(6, 2, 6)
    dataset = batches.store.dataset

    def fetch(i):
        if i in (2, 3):
            raise UserError(f"{i} is gone")
        return Image.new("RGB", (4, 4), (i, i, i))
    dataset.open, dataset.urls = fetch, ["http://x"] * 6
    batches.store = ImageStore(dataset, Recipe(size=4))
    batch = batches.make(0)[0]
    assert batch.img[:, 0, 0, 0].tolist() == batch.members and not {2, 3} & {*batch.members} and len(batch.members) == 6
    assert all(row.tolist() == batches.rows.idx[n, :len(row)].tolist() for i, pair in zip(batch.members, batch.idx.view(
        6, 2, -1)) for n, row in zip(batches.rows.of(i, 2), pair))
    assert sorted(i for b in eval_batches(batches.store, batches.rows, "val", 6) for i in b.members) == [0, 1, 4, 5]
    assert "could not be fetched" in capsys.readouterr().out
    dataset.open = lambda i: fetch(2)
    with pytest.raises(UserError, match="2 is gone"):
        next(load_steps(batches, 0, 9, Device("cpu")))


def test_steps_made_ahead_are_those_made_at_once():
    """From memory, and by a thread that runs three steps in front of the one it is asked for, to the last."""
    batches, seen = toy(), []
    bare = ImageStore(batches.store.dataset, Recipe(size=4))
    whole, batches.store, real = [*load_steps(batches, 2, 9, Device("cpu"))], bare, batches.make
    batches.make = lambda step: seen.append(step) or real(step)
    steps = load_steps(batches, 2, 9, Device("cpu"))
    for k, ([a], [b]) in enumerate(zip(whole, steps, strict=True)):
        assert torch.equal(a.img, b.img) and torch.equal(a.idx, b.idx) and torch.equal(a.rand, b.rand)
        assert seen == [*range(2, 2 + len(seen))] and len(seen) <= min(7, k + 3)
