"""Training steps as tensors: which images and captions a step sees, padded, augmented and on the device.

Everything is a pure function of (seed, step), so a run resumed at step 700 sees what the unbroken run saw, and several
processes see together what one would see alone.
"""
import signal
from dataclasses import dataclass, replace

import numpy as np
import torch

from .config import UserError
from .gpt import IGNORE
from .image import augment, normalise

NO_ROW = ([], [])           # stands where an image has fewer captions than its neighbours in a batch


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
    """All texts of a run as two padded tensors; image i owns rows first[i] .. first[i] + count[i] - 1, the last is empty.

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
    if whole:
        n_steps = n // batch_size
        epoch, k = divmod(step, n_steps)
        order = np.random.default_rng([seed, epoch]).permutation(n)
        return [(int(i), epoch) for i in order[k * batch_size:(k + 1) * batch_size]]
    picks = []
    for k in range(step * batch_size, (step + 1) * batch_size):
        epoch, place = divmod(k, n)
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

    def pin_memory(self):
        """Page-locked memory, from which a GPU copies while it computes. The loader calls this."""
        return replace(self, **{name: getattr(self, name).pin_memory() for name in ("img", "idx", "targets", "rand")
                                if getattr(self, name) is not None})

    def to(self, device, recipe, how=None):
        """The batch on a device: img normalised floats (b, 3, S, S), augmented if `how` (an Augment) is given."""
        img, idx, targets = (t.to(device, non_blocking=True) for t in (self.img, self.idx, self.targets))
        if img.dtype == torch.uint8:
            img = img.float() / 255                                               # (b, 3, S, S) in 0..1
            img = normalise(augment(img, how, self.rand) if how else img, recipe)
        return replace(self, img=img, idx=idx, targets=targets)


class Batches(torch.utils.data.Dataset):
    """Training steps: batches[step] is the list of this process's micro-batches in that step, or the error it met.

    batch_size images in all, over `world` processes and `accum` micro-batches, with K captions of each. Raises
    UserError where that does not divide, or the split is empty.
    """

    def __init__(self, store, rows, batch_size, K=1, accum=1, seed=0, rank=0, world=1, whole=False):
        self.store, self.rows = store, rows
        self.members = [i for i in store.usable("train") if rows.count[i]]        # with something to learn from it
        self.batch_size, self.accum, self.seed, self.whole = batch_size, accum, seed, whole
        self.K = min(K, max(rows.count))                        # more rows than any image has captions would be empty
        self.rank, self.world = rank, world
        if batch_size % (accum * world):
            raise UserError(f"--batch-size {batch_size} does not divide among {world} processes x {accum} "
                            "micro-batches")
        if not self.members:
            raise UserError("the train split holds no usable image with something to learn; see the lines above")
        if whole and not 1 < batch_size <= len(self.members):
            raise UserError(f"a contrastive batch holds different images, at least 2: with {len(self.members)} training "
                            f"images --batch-size cannot be {batch_size}")

    def __getitem__(self, step):
        try:
            return self.make(step)
        except (UserError, OSError) as error:                   # raised in a worker process, it would bring a traceback
            return error

    def make(self, step):
        """The list of this process's micro-batches in that step. Raises UserError."""
        order = step_order(len(self.members), self.batch_size, step, self.seed, self.whole)
        picks = [(self.members[k], epoch) for k, epoch in order]                  # B pairs (image, epoch)
        rows = [self.rows.of(i, self.K, epoch) for i, epoch in picks]             # B x K row numbers
        total = max(1, self.rows.n_targets[np.array(rows)].sum())
        rand = torch.from_numpy(np.random.default_rng([self.seed, step, 7]).random((8, self.batch_size), np.float32))
        for k, (i, _) in enumerate(picks):
            if not self.store.dataset.may_flip(i):
                rand[4, k] = 1.0                                # see augment(): 1 means as it is
        split = self.pair_by_length if self.store.is_features else self.split_evenly
        out = []
        for members, numbers, some in split([i for i, _ in picks], rows, rand)[self.rank::self.world]:
            img, places = self.store.get(members)
            K = len(numbers) // len(members)
            numbers = [n for k in places for n in numbers[k * K:(k + 1) * K]]
            n = int(self.rows.n_targets[numbers].sum())
            out.append(Batch(img, *self.rows.take(numbers), n, n / total, some, [members[k] for k in places]))
        return out

    def split_evenly(self, members, rows, rand):
        """[(images, row numbers, random numbers), ..]: all processes' micro-batches, each of b images with their K rows."""
        b = self.batch_size // (self.accum * self.world)
        return [(members[k:k + b], [n for group in rows[k:k + b] for n in group], rand[:, k:k + b])
                for k in range(0, self.batch_size, b)]

    def pair_by_length(self, members, rows, rand):
        """.. of features, which cost nothing to repeat: each caption brings its image's. So captions of one length can
        stand together in a micro-batch, and the padding, which is computed like any word, goes from a half to little."""
        pairs = sorted(((i, n) for i, group in zip(members, rows) for n in group if n != self.rows.empty),
                       key=lambda pair: self.rows.length[pair[1]])
        parts = self.accum * self.world
        cuts = [len(pairs) * k // parts for k in range(parts + 1)]
        groups = [pairs[a:b] or [(members[0], self.rows.empty)] for a, b in zip(cuts, cuts[1:])]
        return [([i for i, _ in group], [n for _, n in group], None) for group in groups]


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
            if store.dataset.urls:                              # none of these could be fetched: others may be
                continue
            raise
        kept = [k for k, place in enumerate(places) if k == place]                # what could not be fetched is left out
        part, img = [part[k] for k in kept], img[kept]
        K = max(1, max(rows.count[i] for i in part))
        numbers = [n for i in part for n in rows.of(i, K)]
        yield Batch(img, *rows.take(numbers), int(rows.n_targets[numbers].sum()), members=part)


def ignore_signals(_):
    """Ctrl-C and SIGTERM go to the whole group of processes: the loader's workers leave them to the one that trains."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def load_steps(batches, start, total, device, workers):
    """The steps from `start` on: made here where images are in memory, else ahead of time by worker processes."""
    if batches.store.to(device.torch):
        return (batches[step] for step in range(start, total))
    # a generator of its own: the loader draws a seed, which from the run's numbers would shift them on resume
    return iter(torch.utils.data.DataLoader(batches, batch_size=None, sampler=range(start, total), num_workers=workers,
                                            pin_memory=device.cuda, generator=torch.Generator(),
                                            worker_init_fn=ignore_signals))
