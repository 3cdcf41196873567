"""Data sets: fetch, verify, show, cache, batch.

    python data.py --dataset shapes                     what a data set holds, and a contact sheet of it
    python data.py --dataset flickr8k                   the same, downloading it first if needed
    python data.py --dataset folder --data-dir photos   your own: images beside a captions.txt, .csv or .jsonl

A `Dataset` is images by number, captions by image number, and three splits. `shapes` draws its scenes from a seed and
needs no download; the others read the public layouts as they come. `ImageStore` decodes each image once, `step_order`
says which images each training step sees, and `Batches` makes the tensors. All of it is a pure function of (seed,
step): a run resumed at step 700 sees what the unbroken run saw.
"""
import os
import random
import re
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from tinyvlm.config import UserError, option, parse_config, run_script
from tinyvlm.draw import caption_sheet, progress
from tinyvlm.gpt import IGNORE
from tinyvlm.image import augment, normalise, to_uint8
from tinyvlm.layouts import CAPTION_FILES, Dataset, fetch_flickr8k, find_files, photos
from tinyvlm.shapes import ask, describe, draw_scene, make_scene
from tinyvlm.weights import atomic_write


@dataclass
class DataConfig:
    """Options of the data, shared by data.py and train.py."""
    dataset: str = option("shapes", "which data set", choices=("shapes", "flickr8k", "folder"))
    data_dir: str | None = option(None, "folder that holds it; default data/NAME, downloaded if it is not there")
    n_objects: int = option(2, "shapes: scenes hold one to this many objects (1, 2 or 3)")
    n_scenes: int = option(20000, "shapes: training scenes; a tenth as many, at most 1000, are held out twice")
    seed: int = option(0, "decides the scenes of `shapes` and any split that is not official")
    allow_broken: bool = option(False, "go on although 1% or more of the images are broken or missing")


@dataclass
class SheetConfig(DataConfig):
    """.. and of the contact sheet."""
    sheet: str = option("out/sheet.png", "where to write the contact sheet")


# ---------------------------------------------------------------------------------------------------------------------
# Data sets.

class Shapes(Dataset):
    """Scenes made from (seed, index). A scene belongs to the split that the hash of its caption names, so no caption of

    val or test is ever a training caption, by construction and whatever the seed.
    """

    def __init__(self, n_objects=2, n_scenes=20000, seed=0):
        self.seed, self.scenes = seed, []
        held_out = max(1, min(1000, n_scenes // 10))
        sizes, splits = {"train": n_scenes, "val": held_out, "test": held_out}, {}
        for split, size in sizes.items():
            splits[split] = list(range(len(self.scenes), len(self.scenes) + size))
            self.scenes += [self._scene_of(split, n_objects, seed, i) for i in range(size)]
        captions = [[describe(scene)] for scene in self.scenes]
        super().__init__("shapes", [f"scene-{i:05d}" for i in range(len(self.scenes))], captions, splits)

    @staticmethod
    def _scene_of(split, n_objects, seed, index):
        rng = random.Random(f"{seed}/{split}/{index}")
        while True:
            scene = make_scene(rng, n_objects)
            bucket = zlib.crc32(describe(scene).encode()) % 10
            if split == {0: "val", 1: "test"}.get(bucket, "train"):
                return scene

    def open(self, i):
        return draw_scene(self.scenes[i], random.Random(f"{self.seed}/paint/{i}"))

    def may_flip(self, i):
        """Of two things the one further left is often named first, so only lone things can be mirrored."""
        return len(self.scenes[i]) == 1 and super().may_flip(i)

    def questions(self, i):
        return ask(self.scenes[i], random.Random(f"{self.seed}/ask/{i}"))


def load_dataset(config):
    """DataConfig (or any object with its fields) -> Dataset."""
    if config.dataset == "shapes":
        if not 1 <= config.n_objects <= 3:
            raise UserError(f"--n-objects {config.n_objects} is not 1, 2 or 3")
        return Shapes(config.n_objects, config.n_scenes, config.seed)
    folder = Path(config.data_dir or f"data/{config.dataset}")
    if config.dataset == "flickr8k" and not config.data_dir and not find_files(folder, CAPTION_FILES):
        fetch_flickr8k(folder)
    return photos(config.dataset, folder, config.seed, config.allow_broken)


# ---------------------------------------------------------------------------------------------------------------------
# From a data set to batches.

def decode_all(dataset, members, recipe, label="decoding"):
    """Decode the images `members` with all cores: uint8 (n, 3, S, S), and {image: fault} for those that would not."""
    store = torch.zeros(len(members), 3, recipe.size, recipe.size, dtype=torch.uint8)
    broken = {}

    def work(k):
        try:
            store[k] = to_uint8(dataset.open(members[k]), recipe)
        except UserError as error:
            broken[members[k]] = str(error)
    with ThreadPoolExecutor(os.cpu_count()) as pool:            # Pillow decodes outside Python's lock: threads suffice
        for done, _ in enumerate(pool.map(work, range(len(members))), 1):
            progress(done, len(members), label)
    return store, broken


class ImageStore:
    """The images of some splits as uint8 tensors. In memory if they fit, else decoded when asked for.

    cache: "memory", "none", or "auto" (memory while the pixels take at most half of what is free).
    `broken` holds the images left out; usable(split) is the split without them.
    """

    def __init__(self, dataset, splits, recipe, cache="auto", allow_broken=False, say=print):
        self.dataset, self.recipe = dataset, recipe
        members = sorted({i for split in splits for i in dataset.splits[split]})
        bytes_needed = len(members) * 3 * recipe.size ** 2
        self.in_memory = cache == "memory" or (cache == "auto" and bytes_needed < free_memory() / 2)
        self.row = {i: k for k, i in enumerate(members)}
        self.pixels, self.broken = None, {}
        if self.in_memory:
            self.pixels, self.broken = decode_all(dataset, members, recipe, "images into memory")
            say(f"{len(members)} images of {recipe.size}x{recipe.size} pixels in memory: {bytes_needed / 1e6:.0f} MB")
        else:
            say(f"{len(members)} images would take {bytes_needed / 1e9:.1f} GB of memory: decoded as they are needed")
            self.broken = check_images(dataset, members)
        for i, fault in list(self.broken.items())[:10]:
            say(f"left out: {fault}")
        if self.broken:
            say(f"{len(self.broken)} of {len(members)} images are broken and left out")
        if len(self.broken) > 0.01 * len(members) and not allow_broken:
            raise UserError(f"{len(self.broken)} of {len(members)} images are broken, first "
                            f"{dataset.names[min(self.broken)]}; mend the data set, or go on without them with "
                            "--allow-broken")

    def usable(self, split):
        return [i for i in self.dataset.splits[split] if i not in self.broken]

    def get(self, members):
        """uint8 (B, 3, S, S) of the images `members`."""
        if self.in_memory:
            return self.pixels[[self.row[i] for i in members]]
        return torch.stack([to_uint8(self.dataset.open(i), self.recipe) for i in members])


def check_images(dataset, members):
    """{image: fault} of the images that do not decode. The pixels are thrown away."""
    broken = {}

    def work(i):
        try:
            dataset.open(i)
        except UserError as error:
            broken[i] = str(error)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done, _ in enumerate(pool.map(work, members), 1):
            progress(done, len(members), "checking images")
    return broken


def free_memory():
    """Bytes of memory this machine could still give, or 4 GB where it does not say."""
    try:
        return int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024
    except (OSError, TypeError):
        return 4 << 30


# How captions are simplified before they are tokenised; "words" turns "A dog, 2 cats." into "a dog cats".
CLEAN = {"none": str, "lower": str.lower,
         "words": lambda s: " ".join(re.sub(r"[^\w\s'-]|[\d_]", " ", s.lower()).split())}


class Texts:
    """The captions of a data set as token ids, tokenised once: [first] + ids + [end], cut at `max_len` ids.

    first: the start token (cross) or <image> (prefix). A caption that was cut has no end token: the model must not
    learn to stop in mid-sentence. `cut` counts them.
    """

    def __init__(self, captions, tokenizer, first, end, max_len, clean=str):
        self.cut, self.ids = 0, []
        for texts in captions:
            rows = []
            for text in texts:
                ids = tokenizer.encode(clean(text), special=False)                # a caption cannot say <image>
                self.cut += len(ids) > max_len
                rows.append([first] + ids[:max_len] + ([end] if len(ids) <= max_len else []))
            self.ids.append(rows)


def step_order(n, batch_size, step, seed):
    """Which of n samples a training step sees, with the epoch of each: permutations by (seed, epoch), laid end to end.

    5 samples, batches of 2: epoch 0 may be 3 1 4 0 2 and epoch 1 be 2 0 ..; then the steps are
    [(3, 0), (1, 0)], [(4, 0), (0, 0)], [(2, 0), (2, 1)], [(0, 1), ..
    """
    picks = []
    for k in range(step * batch_size, (step + 1) * batch_size):
        epoch, place = divmod(k, n)
        if not picks or place == 0:
            order = np.random.default_rng([seed, epoch]).permutation(n)
        picks.append((int(order[place]), epoch))
    return picks


def pad_rows(rows, pad_to=None):
    """Token rows -> idx (B, T), targets (B, T): targets are the row moved by one, IGNORE where the row has ended.

    Padding is told by length, never by id: the end token may serve as padding, and still one real end is learned.
        row [s, a, dog, e] and T = 5   ->   idx [s, a, dog, 0, 0]   targets [a, dog, e, -100, -100]
    """
    T = pad_to or max(len(row) for row in rows) - 1
    idx = torch.zeros(len(rows), T, dtype=torch.long)
    targets = torch.full((len(rows), T), IGNORE)
    for b, row in enumerate(rows):
        t = len(row) - 1
        if t > 0:
            idx[b, :t], targets[b, :t] = torch.tensor(row[:-1]), torch.tensor(row[1:])
    return idx, targets


@dataclass
class Batch:
    """What the model trains on at once: B images, K captions of each."""
    img: torch.Tensor           # (B, 3, S, S) uint8, or floats once on the device
    idx: torch.Tensor           # (B * K, T): K captions of each image, side by side
    targets: torch.Tensor       # (B * K, T)
    n_targets: int              # how many of them are to be predicted, here
    share: float = 1.0          # .. divided by the same count over the whole step: this batch's weight in its loss
    draw: torch.Tensor | None = None    # (8, B) random numbers in 0..1 that decide the augmentation

    def pin_memory(self):
        """Page-locked memory, from which a GPU copies while it computes. The loader calls this."""
        self.img, self.idx, self.targets = self.img.pin_memory(), self.idx.pin_memory(), self.targets.pin_memory()
        return self

    def to(self, device, recipe, how=None):
        """On the device, normalised, augmented if `how` (an Augment) says so: img, idx, targets."""
        img, idx, targets = (t.to(device, non_blocking=True) for t in (self.img, self.idx, self.targets))
        img = img.float() / 255
        return normalise(augment(img, how, self.draw) if how else img, recipe), idx, targets


class Batches(torch.utils.data.Dataset):
    """Training steps: batches[step] is the list of this process's micro-batches in that step.

    batch_size images in all, over `world` processes and `accum` micro-batches, with K captions of each.
    """

    def __init__(self, store, texts, split, batch_size, K=1, accum=1, seed=0, rank=0, world=1, pad_to=None):
        self.store, self.texts, self.members = store, texts, store.usable(split)
        self.batch_size, self.accum, self.seed = batch_size, accum, seed
        self.K = min(K, max(map(len, texts.ids)))               # more rows than any image has captions would be empty
        self.rank, self.world, self.pad_to = rank, world, pad_to
        if batch_size % (accum * world):
            raise UserError(f"--batch-size {batch_size} does not divide among {world} processes x {accum} "
                            "micro-batches")
        if not self.members:
            raise UserError(f"the {split} split holds no usable image")

    def captions_of(self, i, epoch):
        """K captions of image i: over the epochs all of them take their turn; empty rows where it has fewer than K."""
        rows = self.texts.ids[i]
        start = 0 if self.K >= len(rows) else epoch * self.K + i
        return [rows[(start + k) % len(rows)] if k < len(rows) else [0] for k in range(self.K)]

    def __getitem__(self, step):
        order = step_order(len(self.members), self.batch_size, step, self.seed)
        picks = [(self.members[k], epoch) for k, epoch in order]
        rows = [self.captions_of(i, epoch) for i, epoch in picks]
        total = sum(len(row) - 1 for group in rows for row in group)
        draw = torch.rand(8, self.batch_size, generator=torch.Generator().manual_seed(hash((self.seed, step))))
        draw[4, [not self.store.dataset.may_flip(i) for i, _ in picks]] = 1.0     # see augment(): 1 means as it is
        per = self.batch_size // (self.accum * self.world)
        out = []
        for m in range(self.accum):
            part = slice((m * self.world + self.rank) * per, (m * self.world + self.rank + 1) * per)
            flat = [row for group in rows[part] for row in group]
            n = sum(len(row) - 1 for row in flat)
            idx, targets = pad_rows(flat, self.pad_to)
            out.append(Batch(self.store.get([i for i, _ in picks[part]]), idx, targets, n, n / total, draw[:, part]))
        return out


def eval_batches(store, texts, split, batch_size, limit=None, pad_to=None):
    """Every image of a split once, with all its captions. The last batch may be smaller."""
    members = store.usable(split)[:limit]
    for start in range(0, len(members), batch_size):
        part = members[start:start + batch_size]
        K = max(len(texts.ids[i]) for i in part)
        rows = [row for i in part for row in texts.ids[i] + [[0]] * (K - len(texts.ids[i]))]
        idx, targets = pad_rows(rows, pad_to)
        yield Batch(store.get(part), idx, targets, sum(len(row) - 1 for row in rows))


# ---------------------------------------------------------------------------------------------------------------------

def report(dataset):
    """What a data set holds, for the eyes of its user."""
    lines = [f"{dataset.name}: {len(dataset.names)} images, {sum(map(len, dataset.captions))} captions"]
    for split, members in dataset.splits.items():
        lengths = [len(c.split()) for i in members for c in dataset.captions[i]]
        lines.append(f"  {split:5} {len(members):6} images {len(lengths):7} captions of {min(lengths)} to "
                     f"{max(lengths)} words, {np.mean(lengths):.1f} on average")
    return "\n".join(lines + [f"  {note}" for note in dataset.notes])


def main():
    """Load, report, check every image, draw the sheet."""
    config = parse_config(SheetConfig, description="Prepare, verify and show a data set.")
    dataset = load_dataset(config)
    print(report(dataset))
    broken = {} if config.dataset == "shapes" else check_images(dataset, range(len(dataset.names)))
    for fault in broken.values():
        print(f"  broken: {fault}")
    print(f"  {len(broken)} broken images" if config.dataset != "shapes" else "  drawn from the seed: nothing to break")
    n = len(dataset.names)
    some = [i for i in random.Random(config.seed).sample(range(n), min(12, n)) if i not in broken]
    sheet = caption_sheet([dataset.open(i) for i in some], ["\n".join(dataset.captions[i][:2]) for i in some])
    atomic_write(config.sheet, lambda file: sheet.save(file, format="PNG"))
    print(f"wrote {config.sheet}")
    if len(broken) > 0.01 * len(dataset.names) and not config.allow_broken:
        raise UserError(f"{len(broken)} of {n} images are broken; mend the data set, or use --allow-broken")


if __name__ == "__main__":
    run_script(main)
