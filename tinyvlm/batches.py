"""Training steps as tensors: which images and captions a step sees, padded, augmented and on the device.

Everything is a pure function of (seed, step), so a run resumed at step 700 sees what the unbroken run saw, and several
processes see together what one would see alone.
"""
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch

from .config import UserError
from .gpt import IGNORE
from .image import augment, normalise

NO_ROW = ([], [])           # stands where an image has fewer captions than its neighbours in a batch
AHEAD = 3                   # steps that are made in advance where images are decoded as needed


def pad_rows(rows):
    """Rows (idx, targets) -> idx (R, T) padded by 0, targets (R, T) padded by IGNORE.

    Padding is told by length, never by id: the end token may serve as padding, and still one real end is learned.
        row ([s, a, dog], [a, dog, e]) and T = 5   ->   idx [s, a, dog, 0, 0]   targets [a, dog, e, -100, -100]
    """
    T = max(len(idx) for idx, _ in rows)
    idx = torch.tensor([i + [0] * (T - len(i)) for i, _ in rows], dtype=torch.int32)
    targets = torch.tensor([t + [IGNORE] * (T - len(t)) for _, t in rows], dtype=torch.int32)
    return idx, targets                                                           # (R, T), (R, T)


class Rows:
    """All texts of a run as two padded tensors; image i owns rows first[i] .. first[i] + count[i] - 1. One is empty.

    fixed: batches keep the padding of the longest row of all, so that a GPU sees one shape; else that of their longest.
    """

    def __init__(self, rows, fixed=False):
        flat = [row for of_image in rows for row in of_image] + [NO_ROW]
        self.count = [len(of_image) for of_image in rows]
        self.first = np.cumsum([0] + self.count)
        self.idx, self.targets = pad_rows(flat)                                   # (R + 1, T), (R + 1, T)
        self.length = np.array([len(idx) for idx, _ in flat])                     # (R + 1,)
        self.n_targets = np.array([sum(t != IGNORE for t in targets) for _, targets in flat])    # (R + 1,)
        self.empty, self.fixed = len(flat) - 1, fixed

    def of(self, i, K, epoch=0):
        """K rows of image i: over the epochs all of them take their turn; the empty row where it has fewer than K."""
        n = self.count[i]
        start = 0 if K >= n else epoch * K + i
        return [self.first[i] + (start + k) % n if k < n else self.empty for k in range(K)]

    def take(self, numbers):
        """Rows by number -> idx (R, T), targets (R, T), where the rows live."""
        T = self.idx.size(1) if self.fixed else max(1, self.length[numbers].max())
        at = torch.as_tensor(np.asarray(numbers), device=self.idx.device)         # (R,)
        return self.idx[at, :T].long(), self.targets[at, :T].long()


def step_order(n, batch_size, step, seed, whole=False):
    """Which of n samples a training step sees, with the epoch of each: permutations by (seed, epoch), laid end to end.

    5 samples, batches of 2: epoch 0 may be 3 1 4 0 2 and epoch 1 be 2 0 ..; then the steps are
    [(3, 0), (1, 0)], [(4, 0), (0, 0)], [(2, 0), (2, 1)], [(0, 1), ..
    whole: the rest of an epoch is left out, so that no sample can meet itself in a batch (contrastive training).
    """
    picks, n_epoch = [], n - n % batch_size if whole else n
    for k in range(step * batch_size, (step + 1) * batch_size):
        epoch, place = divmod(k, n_epoch)
        if not picks or place == 0:
            order = np.random.default_rng([seed, epoch]).permutation(n)
        picks.append((int(order[place]), epoch))
    return picks


@dataclass
class Batch:
    """What the model trains on at once: b images, K captions of each, side by side."""
    img: torch.Tensor           # (b, 3, S, S) uint8, or features (b, D) or (b, N, D)
    idx: torch.Tensor           # (b * K, T)
    targets: torch.Tensor       # (b * K, T)
    n_targets: int              # how many of them are to be predicted, here
    share: float = 1.0          # .. divided by the same count over the whole step: this batch's weight in its loss
    rand: torch.Tensor | None = None    # (8, b) numbers in 0..1 that decide the augmentation: see image.augment
    members: list | None = None         # which images these are

    def to(self, device, recipe, how=None):
        """On the device: img normalised floats (b, 3, S, S), augmented if `how` (an Augment) is given."""
        img, idx, targets = (t.to(device) for t in (self.img, self.idx, self.targets))
        if img.dtype == torch.uint8:
            img = img.float() / 255                                               # (b, 3, S, S) in 0..1
            img = normalise(augment(img, how, self.rand) if how else img, recipe)
        return replace(self, img=img, idx=idx, targets=targets)


class Batches:
    """Training steps: make(step) gives the list of this process's micro-batches in that step.

    batch_size images in all, over `world` processes and `accum` micro-batches, with K captions of each. Raises
    UserError where that does not divide.
    """

    def __init__(self, store, rows, batch_size, K=1, accum=1, seed=0, rank=0, world=1, whole=False):
        self.store, self.rows = store, rows
        self.members = [i for i in store.usable("train") if rows.count[i]]        # with something to learn from it
        self.K = min(K, max(rows.count))                        # more rows than any image has captions would be empty
        self.batch_size, self.seed, self.whole = batch_size, seed, whole
        self.rank, self.world, self.parts = rank, world, accum * world
        if batch_size % self.parts:
            raise UserError(f"--batch-size {batch_size} does not divide among {world} processes x {accum} parts")
        if whole and not 1 < batch_size <= len(self.members):
            raise UserError(f"a contrastive batch holds different images, at least 2: of {len(self.members)} training "
                            f"images, --batch-size cannot be {batch_size}")

    def make(self, step):
        order = step_order(len(self.members), self.batch_size, step, self.seed, self.whole)
        picks = [(self.members[k], self.rows.of(self.members[k], self.K, epoch)) for k, epoch in order]
        total = max(1, self.rows.n_targets[np.array([numbers for _, numbers in picks])].sum())
        rand = torch.from_numpy(np.random.default_rng([self.seed, step, 7]).random((8, self.batch_size), np.float32))
        for k, (i, _) in enumerate(picks):                      # B pairs (image, its K row numbers)
            if not self.store.dataset.may_flip(i):
                rand[4, k] = 1.0                                # see augment(): 1 means as it is
        if self.store.is_features:
            # Features cost nothing to repeat, so each caption brings its image's, and captions of one length can stand
            # together in a micro-batch: the padding, which is computed like any word, goes from a half to little.
            picks = sorted(((i, [n]) for i, numbers in picks for n in numbers if n != self.rows.empty),
                           key=lambda pick: self.rows.length[pick[1][0]])
        cuts, out = [len(picks) * k // self.parts for k in range(self.parts + 1)], []
        for a, b in list(zip(cuts, cuts[1:]))[self.rank::self.world]:
            group = picks[a:b] or [(self.members[0], [self.rows.empty])]
            img, places = self.store.get([i for i, _ in group])
            numbers = [n for k in places for n in group[k][1]]
            n = int(self.rows.n_targets[numbers].sum())
            out.append(Batch(img, *self.rows.take(numbers), n, n / total, rand[:, a:b], [group[k][0] for k in places]))
        return out


def eval_batches(store, rows, split, batch_size=64, limit=None, rank=0, world=1):
    """Yields a Batch at a time: every image of a split (or its first `limit`) once, with all its captions.

    The last Batch may be smaller. In several processes each decodes only its own: every world-th batch.
    """
    members = store.usable(split)[:limit]
    starts = range(0, len(members), batch_size)
    for start in starts[rank::world]:
        part = members[start:start + batch_size]
        try:
            img, places = store.get(part)
        except UserError:
            if not store.dataset.urls:
                raise
            continue                                            # none of these could be fetched: others may be
        kept = sorted({*places})                                # without those that come again: see ImageStore.get
        part, img = [part[k] for k in kept], img[kept]
        K = max(1, max(rows.count[i] for i in part))
        numbers = [n for i in part for n in rows.of(i, K)]
        yield Batch(img, *rows.take(numbers), int(rows.n_targets[numbers].sum()), members=part)


def load_steps(batches, start, total, device):
    """Yields the micro-batches of each step from `start` on. Raises UserError.

    Where images are not in memory, a thread of its own opens those of the next steps while the model trains.
    """
    if batches.store.to(device.torch):
        yield from map(batches.make, range(start, total))
        return
    pool, ahead = ThreadPoolExecutor(1), deque()
    try:
        for step in range(start, total):
            while step + len(ahead) < min(step + AHEAD, total):
                ahead.append(pool.submit(batches.make, step + len(ahead)))
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)                      # else a run that is stopped would make them first
