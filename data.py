"""Data sets: fetch, verify, show, cache, batch.

    python data.py --dataset shapes                     what a data set holds, and a contact sheet of it
    python data.py --dataset flickr8k                   the same, downloading it first if needed
    python data.py --dataset flickr8k --features vgg16  .. and what a frozen VGG-16 makes of every image, in one file
    python data.py --dataset capsfusion --limit 1000    images and captions from the web
    python data.py --dataset folder --data-dir photos   your own: images beside a captions.txt, .csv or .jsonl

A `Dataset` is images by number, captions by image number, and three splits. `shapes` draws its scenes from a seed and
needs no download; the others read the public layouts as they come. `ImageStore` decodes each image once, `step_order`
says which images each training step sees, and `Batches` makes the tensors. All of it is a pure function of (seed,
step): a run resumed at step 700 sees what the unbroken run saw.
"""
import csv
import io
import os
import random
import re
import shlex
import sys
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from tinyvlm.clip import CLIP
from tinyvlm.config import UserError, option, parse_config, run_script
from tinyvlm.draw import caption_sheet, progress
from tinyvlm.features import ENCODERS, write_features, write_text_embeddings
from tinyvlm.gpt import IGNORE
from tinyvlm.image import Recipe, augment, normalise, preprocess, to_uint8
from tinyvlm.layouts import MAX_LOST, Dataset, open_photos, photos
from tinyvlm.pretrained import is_run, load_pretrained, load_run
from tinyvlm.search import classify, label_embeddings
from tinyvlm.shapes import ask, describe, draw_scene, labels, make_scene
from tinyvlm.vqa import export_csv, from_scene, vqav2
from tinyvlm.web import Fetch, FetchError, ImageStream, caption_rows, dataset_rows, download_images, table_rows
from tinyvlm.weights import atomic_write, read_json


@dataclass
class DataConfig:
    """Options of the data, shared by data.py and train.py."""
    dataset: str = option("shapes", "which data set", choices=("shapes", "flickr8k", "flickr30k", "coco", "capsfusion",
                                                               "vqav2", "folder"))
    data_dir: str | None = option(None, "folder that holds it; default data/NAME, downloaded if it is not there")
    n_objects: int = option(2, "shapes: scenes hold one to this many objects (1, 2 or 3)")
    n_scenes: int = option(20000, "shapes: training scenes; a tenth as many, at most 1000, are held out twice")
    seed: int = option(0, "decides the scenes of `shapes` and any split that is not official")
    stream: bool = option(False, "coco: fetch only the captions, and each image when it is needed")
    stream_cache: float = option(10.0, "with --stream: gigabytes of images to keep in data/coco/stream")
    allow_private: bool = option(False, "also fetch images from addresses inside this network or machine")
    allow_broken: bool = option(False, "go on although 1% or more of the images are broken or missing")


@dataclass
class SheetConfig(DataConfig):
    """.. and of what data.py makes: a contact sheet, a feature file."""
    sheet: str = option("out/sheet.png", "where to write the contact sheet")
    features: str | None = option(None, "run this frozen network over all images, once: vgg16, resnet50, vit, clip, or "
                                        "a Hub id or folder; for train.py --features")
    grid: bool = option(False, "with --features: a vector per place instead of one per image")
    text_embeddings: str | None = option(None, "run this frozen CLIP text tower over all captions, once: clip, or a "
                                               "Hub id or folder; for train.py --task clip --text-embeddings")
    label: str | None = option(None, "give each image its best label of every category in this json file, by CLIP; for "
                                     "train.py --task classify --labels")
    labeler: str = option("clip", "with --label: the CLIP to ask: a Hub id, a folder, or a run of --task clip")
    margin: float = option(0.1, "with --label: leave out labels whose probability is not this much above the next")
    limit: int = option(1000, "capsfusion: how many images to fetch")
    rows: str | None = option(None, "capsfusion: csv or jsonl with image_url and capsfusion; else the Hub's first rows")
    size: int = option(128, "capsfusion: pixels a side; long thin images are padded, others cropped")
    retry_failed: bool = option(False, "capsfusion: ask again for images that could not be fetched")
    export: str | None = option(None, "data sets with questions: write them as dialogues to this csv (image_id,text)")
    output: str | None = option(None, "with --features, --text-embeddings, --label: the file, else in the data folder")
    batch_size: int = option(32, "for the networks above: images or captions at once")
    device: str = option("cpu", "for the networks above: cpu, cuda or mps")


# ---------------------------------------------------------------------------------------------------------------------
# Data sets.

class Shapes(Dataset):
    """Scenes made from (seed, split, index), drawn anew at each open().

    A scene belongs to the split that the hash of its caption names, so no caption of val or test is ever a training
    caption, by construction and whatever the seed.
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

    @cached_property
    def questions(self):
        """questions[i]: the list of vqa.Question about image i."""
        return [from_scene(i, ask(scene, random.Random(f"{self.seed}/ask/{i}"))) for i, scene in enumerate(self.scenes)]

    @property
    def labels(self):
        """{i: {category: label}} of image i's first thing, for --task classify."""
        return {i: labels(scene) for i, scene in enumerate(self.scenes)}


def load_dataset(config):
    """DataConfig (or any object with its fields) -> Dataset. Raises UserError where the files are missing or unfit."""
    if config.dataset == "shapes":
        if not 1 <= config.n_objects <= 3:
            raise UserError(f"--n-objects {config.n_objects} is not 1, 2 or 3")
        return Shapes(config.n_objects, config.n_scenes, config.seed)
    folder = Path(config.data_dir or f"data/{config.dataset}")
    if config.dataset == "vqav2":
        return vqav2(folder, config.seed, config.allow_broken)
    if config.dataset == "capsfusion":
        if not (folder / "captions.csv").exists():
            raise UserError(f"{folder} holds no images yet; fetch some with: "
                            "python data.py --dataset capsfusion --limit 1000")
        return photos("capsfusion", folder, config.seed, config.allow_broken)
    return open_photos(config)


# ---------------------------------------------------------------------------------------------------------------------
# From a data set to batches.

def each_image(dataset, members, use, label):
    """Decode the images `members` with all cores and give each to `use(k, image)`; {image: fault} of the broken."""
    broken = {}

    def work(k):
        try:
            use(k, dataset.open(members[k]))
        except UserError as error:
            broken[members[k]] = str(error)
    with ThreadPoolExecutor(os.cpu_count()) as pool:            # Pillow decodes outside Python's lock: threads suffice
        for done, _ in enumerate(pool.map(work, range(len(members))), 1):
            progress(done, len(members), label)
    return broken


def decode_all(dataset, members, recipe, label="decoding"):
    """The pixels of the images `members`, uint8 (n, 3, S, S), and {image: fault} of the broken, which stay black."""
    pixels = torch.zeros(len(members), 3, recipe.size, recipe.size, dtype=torch.uint8)            # (n, 3, S, S)

    def keep(k, image):
        pixels[k] = to_uint8(image, recipe)                                       # (3, S, S)
    return pixels, each_image(dataset, members, keep, label)


def check_images(dataset, members):
    """{image: fault} of the images that do not decode. The pixels are thrown away."""
    return each_image(dataset, members, lambda k, image: None, "checking images")


def refuse_broken(dataset, broken, n, allow_broken):
    """Raise UserError if too many of n images are broken and nobody has allowed it."""
    if len(broken) > MAX_LOST * n and not allow_broken:
        raise UserError(f"{len(broken)} of {n} images are broken, first {dataset.names[min(broken)]}; mend the data "
                        "set, or go on without them with --allow-broken")


class ImageStore:
    """The images of some splits as uint8 tensors. In memory if they fit, else decoded when asked for.

    cache: "memory", "none", or "auto" (memory if the pixels take less than half of what is free; each process of
    torchrun has pixels of its own). `broken`: {image: fault}; usable(split): the split without them. Raises UserError
    when over 1% are broken, unless allow_broken.
    """
    ready = False               # get() gives pixels, not features

    def __init__(self, dataset, splits, recipe, cache="auto", allow_broken=False, say=print):
        self.dataset, self.recipe = dataset, recipe
        members = sorted({i for split in splits for i in dataset.splits[split]})
        bytes_needed, here = len(members) * 3 * recipe.size ** 2, int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        self.in_memory = cache == "memory" or (cache == "auto" and bytes_needed * here < free_memory() / 2)
        self.row = {i: k for k, i in enumerate(members)}        # image i is pixels[row[i]]
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
        refuse_broken(dataset, self.broken, len(members), allow_broken)

    def usable(self, split):
        return [i for i in self.dataset.splits[split] if i not in self.broken]

    def get(self, members):
        """uint8 (B, 3, S, S) of the images `members`."""
        if self.in_memory:
            return self.pixels[[self.row[i] for i in members]]
        return torch.stack([to_uint8(self.dataset.open(i), self.recipe) for i in members])


class StreamStore:
    """Images fetched while training, some batches ahead, and kept in a disk cache of limited size.

    Has what ImageStore has, and two things more: `announce(members)` says what will be needed, in order, and
    `present(members)` says which of them can be had at all. What cannot be fetched is counted and said; too much of it
    ends the run. Each process has threads and a cache folder of its own: the one that trains, and its loader's.
    """
    ready, in_memory, broken = False, False, {}
    at_hand = 1024              # images whose pixels wait in memory between present() and get()

    def __init__(self, dataset, recipe, cache_gb=10.0, allow_private=False, say=print):
        self.dataset, self.recipe, self.say, dataset.opener = dataset, recipe, say, self.picture
        self.folder, self.fetch = dataset.folder / "stream", Fetch(allow_private=allow_private)
        self.bytes = int(cache_gb * 1e9 / (2 * int(os.environ.get("WORLD_SIZE", 1))))           # of one folder
        self.process, self.stream, self.said, self.lost, self.pixels = None, None, 1, {}, {}
        say(f"{sum(map(len, dataset.splits.values()))} images are fetched as they are needed; up to {cache_gb:g} GB "
            f"stay in {self.folder}")

    def open(self):
        """This process's stream. A loader's process begins its own: threads do not survive a fork."""
        if self.process != os.getpid():
            kind = "main" if torch.utils.data.get_worker_info() is None else "loader"
            self.process = os.getpid()
            self.stream = ImageStream(self.dataset.urls, self.folder / f"{kind}{os.environ.get('RANK', 0)}", self.bytes,
                                      self.fetch)
        return self.stream

    def picture(self, i):
        """Image i as a PIL image: what the data set's open() gives. Raises FetchError, after counting it."""
        try:
            image = self.open().get(i)
        except FetchError as error:
            self.lost[i] = str(error)
            if len(self.lost) >= self.said:                     # each time that they have doubled
                reasons = Counter(self.lost.values()).most_common(4)
                self.say(f"{len(self.lost)} images could not be fetched so far: {dict(reasons)}")
                self.said = 2 * len(self.lost)
            raise FetchError(f"{self.dataset.names[i]} could not be fetched ({error}); check the connection") from None
        self.lost.pop(i, None)
        return image

    def usable(self, split):
        return list(self.dataset.splits[split])

    def announce(self, members):
        self.open().prefetch(members)

    def present(self, members):
        """Those of `members` that could be fetched. Their pixels wait for get(), the first `at_hand` of them; of a
        split too large for that, the rest comes from the disk cache again.
        """
        self.announce(members)
        self.pixels, there = {}, []
        for i in members:
            if i not in self.pixels:                            # where two epochs meet, a batch may hold an image twice
                try:
                    pixels = to_uint8(self.picture(i), self.recipe)
                except FetchError:
                    continue
                if len(self.pixels) < self.at_hand:
                    self.pixels[i] = pixels
            there.append(i)
        return there

    def get(self, members):
        """uint8 (B, 3, S, S) of images that `present` named. Raises FetchError where one cannot be had again."""
        again = [i for i in members if i not in self.pixels]
        if again:
            self.announce(again)
        found = self.pixels | {i: to_uint8(self.picture(i), self.recipe) for i in again}
        return torch.stack([found[i] for i in members])                           # (B, 3, S, S)


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
    """The captions of a data set as rows (idx, targets), tokenised once: targets[t] is the token after idx[t].

    first: the start token (cross, lstm) or <image> (prefix).
        "a dog"  ->  idx [first, a, dog], targets [a, dog, end]
    A caption longer than max_len tokens loses its end, and the model must not learn to stop in mid-sentence, so there
    is no end token to predict; `cut` counts them. Nor should it learn to say "unknown word": `unknown` counts those.
    Of some captions `clean` leaves nothing ("!!!"): they teach to say nothing, and `empty` counts them.
    """

    def __init__(self, captions, tokenizer, first, end, max_len, clean=str):
        self.cut = self.unknown = self.empty = 0
        self.rows = []
        for texts in captions:
            rows = []
            for text in texts:
                ids = tokenizer.encode(clean(text), special=False)                # a caption cannot say <image>
                self.cut += len(ids) > max_len
                self.empty += not ids
                row = [first] + ids[:max_len] + ([end] if len(ids) <= max_len else [])
                targets = [IGNORE if i == tokenizer.unk_id else i for i in row[1:]]
                self.unknown += targets.count(IGNORE)
                rows.append((row[:-1], targets))
            self.rows.append(rows)


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


NO_ROW = ([], [])           # stands where an image has fewer captions than its neighbours in a batch


def n_targets(rows):
    """How many targets of these rows (idx, targets) the loss is taken over: all but IGNORE."""
    return sum(len(targets) - targets.count(IGNORE) for _, targets in rows)


def pad_rows(rows, pad_to=None):
    """Rows (idx, targets) -> idx (R, T) padded by 0, targets (R, T) padded by IGNORE.

    Padding is told by length, never by id: the end token may serve as padding, and still one real end is learned.
        row ([s, a, dog], [a, dog, e]) and T = 5   ->   idx [s, a, dog, 0, 0]   targets [a, dog, e, -100, -100]
    """
    T = pad_to or max(len(idx) for idx, _ in rows)
    idx = torch.tensor([i + [0] * (T - len(i)) for i, _ in rows])
    targets = torch.tensor([t + [IGNORE] * (T - len(t)) for _, t in rows])
    return idx, targets                                                           # (R, T), (R, T)


@dataclass
class Batch:
    """What the model trains on at once: B images, K captions of each."""
    img: torch.Tensor           # (B, 3, S, S) uint8, or features (B, D) or (B, N, D)
    idx: torch.Tensor           # (B * K, T): K captions of each image, side by side
    targets: torch.Tensor       # (B * K, T)
    n_targets: int              # how many of them are to be predicted, here
    share: float = 1.0          # .. divided by the same count over the whole step: this batch's weight in its loss
    draw: torch.Tensor | None = None    # (8, B) random numbers in 0..1 that decide the augmentation: see image.augment
    members: list | None = None         # which images these are

    def pin_memory(self):
        """Page-locked memory, from which a GPU copies while it computes. The loader calls this."""
        for name in ("img", "idx", "targets", "draw"):
            if getattr(self, name) is not None:
                setattr(self, name, getattr(self, name).pin_memory())
        return self

    def to(self, device, recipe, how=None):
        """img (B, 3, S, S) normalised floats, augmented if `how` (an Augment) is given, or features; idx, targets."""
        img, idx, targets = (t.to(device, non_blocking=True) for t in (self.img, self.idx, self.targets))
        if img.dtype != torch.uint8:                                              # ready-made features
            return img, idx, targets
        img = img.float() / 255                                                   # (B, 3, S, S) in 0..1
        return normalise(augment(img, how, self.draw) if how else img, recipe), idx, targets


class Batches(torch.utils.data.Dataset):
    """Training steps: batches[step] is the list of this process's micro-batches in that step, or the error it met.

    batch_size images in all, over `world` processes and `accum` micro-batches, with K captions of each. Raises
    UserError where that does not divide, or the split is empty.
    """

    def __init__(self, store, texts, split, batch_size, K=1, accum=1, seed=0, rank=0, world=1, pad_to=None):
        self.store, self.texts = store, texts
        self.members = [i for i in store.usable(split) if texts.rows[i]]          # with something to learn from it
        self.batch_size, self.accum, self.seed = batch_size, accum, seed
        self.K = min(K, max(map(len, texts.rows)))              # more rows than any image has captions would be empty
        self.rank, self.world, self.pad_to = rank, world, pad_to
        self.end = sys.maxsize                                  # the run's last step: nothing beyond is fetched
        if batch_size % (accum * world):
            raise UserError(f"--batch-size {batch_size} does not divide among {world} processes x {accum} "
                            "micro-batches")
        if not self.members:
            raise UserError(f"the {split} split holds no usable image")

    def captions_of(self, i, epoch):
        """K captions of image i: over the epochs all of them take their turn; empty rows where it has fewer than K."""
        rows = self.texts.rows[i]
        start = 0 if self.K >= len(rows) else epoch * self.K + i
        return [rows[(start + k) % len(rows)] if k < len(rows) else NO_ROW for k in range(self.K)]

    def fetched(self, picks, step):
        """The step's images that can be had; one that cannot gives its place to another of the same batch."""
        ahead = [self.members[k] for s in range(step + 1, min(step + 9, self.end))
                 for k, _ in step_order(len(self.members), self.batch_size, s, self.seed)]
        self.store.announce([i for i, _ in picks] + ahead)
        there = set(self.store.present([i for i, _ in picks]))
        good = [pick for pick in picks if pick[0] in there]
        if not good:
            raise UserError(f"none of the {len(picks)} images of step {step} could be fetched; check the connection")
        return [pick if pick[0] in there else good[k % len(good)] for k, pick in enumerate(picks)]

    def __getitem__(self, step):
        try:
            return self.make(step)
        except (UserError, OSError) as error:                   # raised in a worker process, it would bring a traceback
            return error

    def make(self, step):
        """The list of this process's micro-batches in that step. Raises UserError."""
        order = step_order(len(self.members), self.batch_size, step, self.seed)
        picks = [(self.members[k], epoch) for k, epoch in order]
        if isinstance(self.store, StreamStore):
            picks = self.fetched(picks, step)
        rows = [self.captions_of(i, epoch) for i, epoch in picks]
        total = sum(map(n_targets, rows))
        draw = torch.rand(8, self.batch_size, generator=torch.Generator().manual_seed(hash((self.seed, step))))
        draw[4, [not self.store.dataset.may_flip(i) for i, _ in picks]] = 1.0     # see augment(): 1 means as it is
        parts = self.accum * self.world
        if self.store.ready:
            # Features cost nothing to repeat, so each caption brings its image's. Then captions of one length can stand
            # together in a micro-batch: the padding, which is computed like any word, goes from a half to little.
            pairs = sorted(((i, row) for (i, _), group in zip(picks, rows) for row in group if row is not NO_ROW),
                           key=lambda pair: len(pair[1][0]))
            cuts = [len(pairs) * k // parts for k in range(parts + 1)]
            groups = [([i for i, _ in pairs[a:b]], [row for _, row in pairs[a:b]], None)
                      for a, b in zip(cuts, cuts[1:])]
        else:
            per = self.batch_size // parts
            groups = [([i for i, _ in picks[k:k + per]], [row for group in rows[k:k + per] for row in group],
                       draw[:, k:k + per]) for k in range(0, self.batch_size, per)]
        out = []
        for members, flat, numbers in groups[self.rank::self.world]:
            n = n_targets(flat)
            out.append(Batch(self.store.get(members), *pad_rows(flat, self.pad_to), n, n / total, numbers, members))
        return out


def eval_batches(store, texts, split, batch_size, limit=None, pad_to=None):
    """Yields a Batch at a time: every image of a split (or its first `limit`) once, with all its captions.

    The last Batch may be smaller. share is left at 1: who adds up losses weighs them by n_targets.
    """
    members = [i for i in store.usable(split)[:limit] if texts.rows[i]]
    for start in range(0, len(members), batch_size):
        part = members[start:start + batch_size]
        part = store.present(part) if isinstance(store, StreamStore) else part
        if not part:
            continue
        K = max(len(texts.rows[i]) for i in part)
        rows = [row for i in part for row in texts.rows[i] + [NO_ROW] * (K - len(texts.rows[i]))]
        idx, targets = pad_rows(rows, pad_to)
        yield Batch(store.get(part), idx, targets, n_targets(rows))


# ---------------------------------------------------------------------------------------------------------------------

def report(dataset):
    """What a data set holds, for the eyes of its user."""
    lines = [f"{dataset.name}: {len(dataset.names)} images, {sum(map(len, dataset.captions))} captions"]
    for split, members in dataset.splits.items():
        lengths = [len(c.split()) for i in members for c in dataset.captions[i]]
        lines.append(f"  {split:5} {len(members):6} images {len(lengths):7} captions of {min(lengths)} to "
                     f"{max(lengths)} words, {np.mean(lengths):.1f} on average")
    return "\n".join(lines + [f"  {note}" for note in dataset.notes])


def fetch_capsfusion(config):
    """Images and their captions from the web into the data folder; goes on where an earlier call was cut off."""
    folder = Path(config.data_dir or "data/capsfusion")
    if (folder / "captions.csv").exists() and not {"rows", "limit", "retry_failed"} & config.given:
        return                                                  # what is there is looked at, labelled, encoded
    name = "BAAI/CapsFusion-120M"
    rows = table_rows(config.rows) if config.rows else caption_rows(
        dataset_rows(name, "default", "train", cache=folder / "rows"), name)
    counts = download_images(rows, folder, config.size, Fetch(allow_private=config.allow_private), config.limit,
                             retry_failed=config.retry_failed)
    reasons = counts.pop("reasons")
    print(", ".join(f"{n} {what}" for what, n in {**counts, **reasons}.items()))
    if not counts["good"]:
        raise UserError(f"none of the addresses gave an image; {folder / 'report.csv'} says why for each of them")


def read_categories(path):
    """A label file, {"category": ["phrase", ..], ..} -> the same, checked."""
    categories = read_json(path)
    if not isinstance(categories, dict) or not categories or not all(
            isinstance(names, list) and len(names) > 1 and all(isinstance(n, str) and n.strip() for n in names)
            for names in categories.values()):
        raise UserError(f'{path} should be like {{"color": ["red", "blue"], "place": ["a kitchen", "a beach"]}}, with '
                        "two phrases or more in each category")
    return categories


@torch.inference_mode()
def pseudo_labels(config, dataset, broken=()):
    """Each image's best label per category, with its probability, into a csv. Returns the csv's path.

    A label that is hardly likelier than the next best (--margin) teaches more noise than it is worth: it is left empty.
    """
    categories, source = read_categories(config.label), ENCODERS.get(config.labeler, config.labeler)
    loaded = load_run(source) if is_run(source) else load_pretrained(source)
    if not isinstance(loaded.model, CLIP) or loaded.model.vision is None or loaded.tokenizer is None:
        raise UserError(f"--labeler {config.labeler} is no CLIP that sees pixels and reads words")
    model, clean = loaded.model.to(config.device), CLEAN[loaded.config.get("clean", "none")]
    label_emb = {kind: label_embeddings(model, loaded.tokenizer, names, clean=clean)            # (n_labels, D) each
                 for kind, names in categories.items()}
    text, left_out = io.StringIO(), Counter()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", "category", "label", "probability", "margin"])
    members, n = [i for i in range(len(dataset.names)) if i not in broken], 0
    for start in range(0, len(members), config.batch_size):
        part, pixels = [], []
        for i in members[start:start + config.batch_size]:
            try:
                pixels.append(preprocess(dataset.open(i), loaded.recipe))         # (3, S, S)
                part.append(i)
            except FetchError as error:
                print(f"left out: {error}")
        if not part:
            continue
        n += len(part)
        emb = model.encode_image(torch.stack(pixels).to(config.device))           # (B, 3, S, S) -> (B, D)
        for kind, names in categories.items():
            best, order = classify(emb, label_emb[kind], model.logit_scale).topk(2)                       # (B, 2)
            for i, (p, q), (k, _) in zip(part, best.tolist(), order.tolist()):
                sure = p - q >= config.margin
                left_out[kind] += not sure
                writer.writerow([dataset.names[i], kind, names[k] if sure else "", f"{p:.4f}", f"{p - q:.4f}"])
        progress(min(start + config.batch_size, len(members)), len(members), "labelling")
    path = Path(config.output or Path(config.data_dir or f"data/{config.dataset}") / "labels.csv")
    atomic_write(path, lambda file: file.write(text.getvalue().encode()))
    for kind, unsure in left_out.items():
        print(f"  {kind}: {n - unsure} images labelled, {unsure} too unsure (margin {config.margin})")
    return path


def check_device(name):
    """torch.device(name), after a trial. Raises UserError where this PyTorch or this machine has none of that name."""
    try:
        torch.zeros(1, device=name).cpu()
        return torch.device(name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        why = str(error).partition("\n")[0].partition(". ")[0]
        raise UserError(f"--device {name} cannot be used here ({why}); try cpu") from None


def check_options(c):
    """Numbers that mean nothing are refused before anything is read or fetched."""
    check_device(c.device)
    for name in ("n_scenes", "limit", "size", "batch_size", "stream_cache"):
        if not getattr(c, name) > 0:
            raise UserError(f"--{name.replace('_', '-')} must be above 0, not {getattr(c, name)}")
    if c.stream and c.dataset != "coco":
        raise UserError(f"--stream fetches the images of coco one by one; leave it out for {c.dataset}")


def main():
    """Load, report, check every image, draw the sheet."""
    config = parse_config(SheetConfig, description="Prepare, verify and show a data set.")
    if config.output and sum(map(bool, (config.features, config.text_embeddings, config.label))) > 1:
        raise UserError("--output names one file: make features, text embeddings and labels one after the other")
    check_options(config)
    if config.dataset == "capsfusion":
        fetch_capsfusion(config)
    dataset = load_dataset(config)
    print(report(dataset))
    drawn = config.dataset == "shapes" or config.stream        # nothing on disk that could be broken
    broken = {} if drawn else check_images(dataset, range(len(dataset.names)))
    for fault in broken.values():
        print(f"  broken: {fault}")
    print("  images are made or fetched when needed: none to check" if drawn else f"  {len(broken)} broken images")
    n = len(dataset.names)
    some = [i for i in random.Random(config.seed).sample(range(n), min(12, n)) if i not in broken]
    if config.stream:
        store = StreamStore(dataset, Recipe(), config.stream_cache, config.allow_private)
        some = store.present(some)
        if config.features or config.label:
            store.announce(range(n))
    if not some:
        raise UserError(f"none of the images of {dataset.name} that were tried can be opened; the lines above say why")
    sheet = caption_sheet([dataset.open(i) for i in some], ["\n".join(dataset.captions[i][:2]) for i in some])
    atomic_write(config.sheet, lambda file: sheet.save(file, format="PNG"))
    print(f"wrote {config.sheet}")
    folder = Path(config.data_dir or f"data/{config.dataset}")
    where = f"--dataset {config.dataset}" + (f" --data-dir {shlex.quote(config.data_dir)}" if config.data_dir else "")
    for kind, source, write in (("features", config.features, write_features),
                                ("text-embeddings", config.text_embeddings, write_text_embeddings)):
        if source:
            grid = {"grid": config.grid} if kind == "features" else {}
            name = f"{kind}-{Path(source).name}{'-grid' * (config.grid and kind == 'features')}.safetensors"
            path = config.output or folder / name
            write(source, dataset, path, batch_size=config.batch_size, device=config.device, **grid)
            task = "" if kind == "features" else "--task clip "
            print(f"now train on it: python train.py {task}{where} --{kind} {shlex.quote(str(path))}")
    if config.export:
        if not hasattr(dataset, "questions"):
            raise UserError(f"{dataset.name} holds no questions to export; --export is for shapes and vqav2")
        export_csv([q for questions in dataset.questions for q in questions], config.export)
        print(f"wrote {config.export}")
    if config.label:
        path = pseudo_labels(config, dataset, broken)
        print(f"now learn them: python train.py --task classify {where} --labels {shlex.quote(str(path))}")
    refuse_broken(dataset, broken, n, config.allow_broken)


if __name__ == "__main__":
    run_script(main)
