"""Train a model to talk about pictures.

    python train.py                                           shapes, a few minutes on a laptop, no download
    python train.py --dataset flickr8k --preset laptop        real photographs
    python train.py --resume                                  go on where the last run stopped
    torchrun --nproc_per_node=2 train.py ...                  several processes, the same curve (without dropout, and
                                                              with --stem patch: BatchNorm sees its own share only)

All options come first, then the loop: rate, micro-batches, clip, step, log, evaluate, save. What a run leaves in
--out-dir (README, "A run's folder") is all that sample.py needs.
"""
import csv
import hashlib
import io
import json
import math
import os
import pickle
import shlex
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path

import torch
import torch.distributed as dist

from data import CLEAN, Batches, DataConfig, ImageStore, StreamStore, check_device, load_dataset, report
from tasks import TASKS, add_to_table, learning, read_table, show
from tinyvlm.config import UserError, option, out_of_memory, parse_config, run_script
from tinyvlm.draw import curves
from tinyvlm.features import FeatureStore, short_names
from tinyvlm.gpt import IGNORE
from tinyvlm.image import Augment
from tinyvlm.muon import Muon, Together
from tinyvlm.pretrained import is_run, load_run
from tinyvlm.schedule import one_cycle
from tinyvlm.vlm import MODELS, to_dict
from tinyvlm.vqa import show_tokens
from tinyvlm.weights import atomic_write, read_json, save_safetensors, write_json

RUN_FILES = ("state.pt", "model.safetensors", "tokenizer.json", "log.csv", "curves.png", "samples.png",
             "example.png", "scores.json", "captions.jsonl", "results.json", "similarity.png", "confusion-*.png",
             "search-*.safetensors", "config.json")     # the order of deletion: first what --resume needs, last what
                                                        # tells that the rest was a run's


@dataclass
class TrainConfig(DataConfig):
    """All options of a run; those of the data set (--dataset, --data-dir, ..) are in DataConfig, in data.py."""
    task: str = option("caption", "what to learn", tuple(TASKS))
    model: str = option("cross", "how the decoder sees: cross-attention; image tokens in place of <image>; or an LSTM "
                                 "whose first state is the image", tuple(MODELS))
    wiring: str = option("final", "cross: all blocks see the last vision layer, or block i sees layer i",
                         ("final", "lockstep"))
    out_dir: str = option("out", "the run's folder")
    resume: bool = option(False, "continue the run in --out-dir, exactly")
    eval_only: bool = option(False, "train nothing: score the run in --out-dir and add it to --table")
    # the model
    vision: str | None = option(None, "start from this vision tower: a Hub id, a folder, or a run; else from scratch")
    text: str | None = option(None, "start from this public GPT-2 (clip: CLIP), with its tokenizer; else from scratch")
    features: str | None = option(None, "learn from ready-made image features in this file (data.py --features)")
    image_size: int = option(64, "pixels a side; more shows more and costs its square (a public ViT brings its own)")
    patch_size: int = option(16, "pixels a side of one image token")
    stem: str = option("conv", "patches: as in the paper, or by small convolutions that learn faster from little data",
                       ("patch", "conv"))
    class_token: bool = option(False, "give the ViT its extra token; public ViTs have it, the captioners do without")
    n_layer: int = option(2, "blocks in each tower")
    n_head: int = option(4, "attention heads")
    n_embd: int = option(128, "channels")
    dropout: float = option(0.0, "raise it (0.1) when the training loss falls and the validation loss does not")
    n_hidden: int | None = option(None, "lstm: width of its state; default --n-embd. clip: width inside an mlp head")
    head: str = option("linear", "clip: from the image's features to the common space", ("linear", "mlp"))
    n_joint: int = option(256, "clip: numbers in the common space (a public text tower brings its own)")
    text_embeddings: str | None = option(None, "clip: the file of text embeddings made by data.py --text-embeddings")
    init: str | None = option(None, "caption, vqa: go on from the model of this run, with another stage or task")
    shuffle: int = option(1, "prefix: join this many by this many neighbouring patches into one image token")
    turns: int = option(1, "vqa: questions in one dialogue")
    labels: str | None = option(None, "classify: the file of labels (data.py --label); shapes have their own")
    tied: bool = option(True, "lstm: the word embedding is the way out as well")
    soft_attention: bool = option(False, "lstm: every state also asks the image features (--n-head heads)")
    tokenizer: str = option("bpe", "bpe or words: made from the captions; or a Hub id or folder, such as "
                                   "google-bert/bert-base-uncased")
    vocab_size: int = option(1024, "bpe: entries of the tokenizer")
    min_count: int = option(5, "words: how often a word must occur to be in the vocabulary")
    max_tokens: int = option(40, "longest caption, in tokens; longer ones are cut, counted and reported")
    clean: str = option("none", "captions: as they are, lower-cased, or lower-cased words only", tuple(CLEAN))
    # the training
    reinforce: int = option(0, "caption: draw this many captions of each image and reward the better ones (CIDEr-D), "
                               "starting from --init")
    epochs: float = option(4, "passes over the training images")
    batch_size: int = option(32, "images a step, over all processes and micro-batches")
    captions_per_image: int = option(1, "captions of each image a step; the vision tower runs once for all of them")
    accum: int = option(1, "split each step into this many micro-batches; raise it when memory runs out (the same "
                           "step, but for the BatchNorm of --stem conv, which sees a micro-batch at a time)")
    lr: float = option(2e-3, "peak learning rate; lower it for larger models, much lower for public weights")
    lr_decoder: float = option(1.0, "the decoder's rate, as a factor of --lr (new layers always take --lr)")
    lr_vision: float = option(1.0, "the vision tower's rate, as a factor of --lr")
    open_decoder: float = option(0, "epoch from which the decoder learns; before, only the new layers do")
    open_vision: float = option(0, "epoch from which the vision tower learns")
    warmup: float = option(0.2, "share of the steps in which the rate climbs (OneCycle)")
    optimizer: str = option("muon", "muon: for the matrices of blocks and bridge, AdamW for the rest; a slower step "
                                    "that usually teaches more. adamw: for all", ("muon", "adamw"))
    weight_decay: float = option(0.05, "pull of matrices (not of norms, biases, embeddings) towards zero")
    beta2: float = option(0.98, "AdamW's memory of squared gradients; 0.999 for very long runs")
    smoothing: float = option(0.0, "label smoothing: this share of the aim goes to all words; 0.1 helps beam search")
    grad_clip: float = option(1.0, "largest gradient norm; 0 for no limit")
    crop: float = option(0.0, "augment: random windows, leaving out at most this share of the area")
    jitter: float = option(0.0, "augment: brightness, contrast, saturation each by up to this factor")
    flip: bool = option(True, "augment: mirror half of the images, but none whose captions say left or right")
    # the machine
    device: str = option("auto", "cpu, cuda, mps or auto")
    dtype: str = option("auto", "number format of products; auto: bfloat16 or else float16 on cuda, float32 elsewhere",
                        ("auto", "float32", "bfloat16", "float16"))
    compile: bool | None = option(None, "torch.compile the model; the default is yes on cuda, no elsewhere")
    cache: str = option("auto", "decoded images: in memory if they fit, always, never", ("auto", "memory", "none"))
    workers: int = option(2, "processes that prepare batches, on a GPU or when images are not in memory")
    # looking
    eval_interval: int = option(1000, "steps between evaluations (and saves)")
    eval_images: int = option(500, "validation images each evaluation looks at")
    test_images: int = option(1000, "test images captioned at the end")
    split: str = option("test", "with --eval-only: the split to score", ("train", "val", "test"))
    num_beams: int = option(1, "with --eval-only: beams of the search; 1 is greedy")
    length_penalty: float = option(1.0, "with --eval-only: above 1 favours long captions, below 1 short ones")
    guidance: float = option(0.0, "caption: how far to move a caption's scores away from those of a blank picture; 0.3 "
                                  "tells pictures apart better, 1 costs correctness (kept for sample.py)")
    table: str = option("out/table.csv", "with --eval-only: the comparison table, one row a run, split and search")
    log_interval: int = option(25, "steps between log lines")
    show_batch: bool = option(False, "print the first batch token by token (image, masked, trained), and stop")
    stop_after: int = option(0, "end after this step, as if interrupted (0: never); --resume goes on")


PRESETS = {                     # those with adamw were measured, or written, before there was muon.py
    # real photographs from scratch on two cores: within 40 minutes
    "laptop": dict(dataset="flickr8k", image_size=128, n_layer=2, n_embd=256, dropout=0.2, vocab_size=2048,
                   clean="words", max_tokens=20, epochs=10, captions_per_image=5, crop=0.4, jitter=0.3,
                   eval_interval=376, guidance=0.3),
    # the same at the size a GPU likes
    "gpu": dict(dataset="flickr8k", image_size=224, n_layer=6, n_head=8, n_embd=512, vocab_size=8192, clean="words",
                max_tokens=32, dropout=0.1, epochs=40, batch_size=128, captions_per_image=5, lr=1e-3, crop=0.4,
                jitter=0.3, eval_interval=235, optimizer="adamw"),
    # an LSTM on ready-made features (--features FILE), as captioners were built before attention
    "lstm": dict(dataset="flickr8k", model="lstm", clean="words", tokenizer="words", n_layer=1, n_embd=256,
                 n_hidden=512, soft_attention=True, n_head=1, dropout=0.5, max_tokens=24, epochs=10, batch_size=64,
                 captions_per_image=5, accum=4, lr=2e-3, eval_interval=188, eval_images=1000, optimizer="adamw"),
    # .. and after it: captions of one's own, rewarded by their score (--features FILE --init RUN)
    "reward": dict(dataset="flickr8k", model="lstm", clean="words", max_tokens=24, reinforce=5, epochs=2, batch_size=64,
                   lr=3e-4, warmup=0.1, eval_interval=94, eval_images=1000, optimizer="adamw"),
    # pictures and sentences in one space, also on ready-made features (--features FILE)
    "clip": dict(task="clip", dataset="flickr8k", clean="words", tokenizer="words", head="mlp", n_joint=512, n_embd=256,
                 dropout=0.3, max_tokens=16, epochs=40, batch_size=256, lr=1e-3, eval_interval=94, eval_images=1000,
                 optimizer="adamw"),
    # questions and answers about drawn scenes
    "vqa": dict(task="vqa", model="prefix", max_tokens=64, captions_per_image=5, epochs=5.4, lr_vision=0.5,
                warmup=0.1),
    # public weights: first the new cross-attention, then the decoder, then all, at gentle rates
    "public": dict(dataset="flickr8k", vision="google/vit-base-patch16-224-in21k", text="openai-community/gpt2",
                   max_tokens=40, dropout=0.1, epochs=8, batch_size=32, lr=1e-4, lr_decoder=0.3, lr_vision=0.1,
                   open_decoder=1, open_vision=2, crop=0.3, eval_interval=376, optimizer="adamw"),
}


# ---------------------------------------------------------------------------------------------------------------------
# The machine: device, number format, processes.

class Machine:
    """Where and how to compute: device, autocast, gradient scaler, and this process's place among the others."""

    def __init__(self, config):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.main = self.rank == 0
        kind = config.device
        if kind == "auto":
            kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        if kind.startswith("cuda") and not torch.cuda.is_available():
            raise UserError("--device cuda: this PyTorch sees no CUDA device; use --device cpu or a CUDA build")
        if self.world > 1 and kind == "cuda":
            kind = f"cuda:{os.environ['LOCAL_RANK']}"
        self.device = check_device(kind)
        if self.world > 1 and self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self.cuda = self.device.type == "cuda"
        if self.world > 1:
            dist.init_process_group("nccl" if self.cuda else "gloo")
        name = config.dtype
        if name == "auto":
            real = self.cuda and torch.cuda.is_bf16_supported(including_emulation=False)
            name = "bfloat16" if real else "float16" if self.cuda else "float32"
        self.dtype = getattr(torch, name)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=name == "float16")
        self.compile = self.cuda if config.compile is None else config.compile
        if self.cuda:
            torch.set_float32_matmul_precision("high")          # TF32 for what autocast leaves in float32

    def autocast(self):
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device.type, self.dtype)

    def total(self, *numbers):
        """Sums over all processes."""
        t = torch.tensor(numbers, dtype=torch.float64)
        if self.world > 1:
            t = t.to(self.device)
            dist.all_reduce(t)
        return t.tolist()

    def prepare(self, model, trial):
        """What the loop calls in place of the model: compiled if wanted and possible, then spread over the processes.

        trial(fast): a step's forward and backward pass with what is compiled, as the loop will make it. The model
        itself stays as it is, so a checkpoint never carries the names a compiler or DDP would add.
        """
        fast = model
        if self.compile:
            buffers = [b.clone() for b in model.buffers()]      # BatchNorm's statistics: the trial must not count
            try:                                                # compilation happens at the first call: make one
                with torch.random.fork_rng([self.device] if self.cuda else []):   # .. and leave the run's numbers alone
                    fast = torch.compile(model)
                    trial(fast)
            except Exception as error:                          # a compiler can raise anything
                fast, self.compile = model, False
                self.say(f"torch.compile failed ({type(error).__name__}); going on without it, slower")
            model.zero_grad(set_to_none=True)
            for b, old in zip(model.buffers(), buffers):
                b.copy_(old)
        return torch.nn.parallel.DistributedDataParallel(fast) if self.world > 1 else fast

    def say(self, text):
        if self.main:
            print(text, flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# A run: the data, the model, and what is left on disk.

class Run:
    """Everything that belongs to one run and does not change while it trains."""

    def __init__(self, config, machine, saved=None):
        """saved: a Loaded run that is only to be judged."""
        self.config, self.machine, self.out = config, machine, Path(config.out_dir)
        self.dataset = load_dataset(config)
        machine.say(report(self.dataset))
        self.feats = FeatureStore(config.features, self.dataset, machine.say) if config.features else None
        self.task = TASKS[config.task](self, saved)
        if not self.feats or config.stream:                     # on features: streamed only to show what was captioned
            self.store = self.make_store(("train", "val", "test") if saved is None else (config.split,))
        self.store = self.feats or self.store
        self.augment = Augment(config.crop, config.jitter, config.flip)
        if saved:
            return
        rows = self.task.texts.rows if machine.compile else ()                    # one shape, one compilation
        pad_to = max((len(idx) for of_image in rows for idx, _ in of_image), default=None)
        self.batches = Batches(self.store, self.task.texts, "train", config.batch_size, config.captions_per_image,
                               config.accum, config.seed, machine.rank, machine.world, pad_to)
        self.steps_per_epoch = len(self.batches.members) / config.batch_size
        self.total_steps = self.batches.end = max(1, round(config.epochs * self.steps_per_epoch))

    def make_store(self, splits):
        """Pixels: in memory, decoded when needed, or fetched when needed."""
        c, say = self.config, self.machine.say
        if c.stream:
            return StreamStore(self.dataset, self.task.recipe, c.stream_cache, c.allow_private, say)
        return ImageStore(self.dataset, splits, self.task.recipe, c.cache, c.allow_broken, say)

    def members(self, split, limit=None):
        """The images of a split that can be had, the first `limit` of them."""
        members = self.store.usable(split)[:limit]
        members = self.store.present(members) if isinstance(self.store, StreamStore) else members
        if not members:
            raise UserError(f"none of the images of the {split} split can be had; the lines above say why")
        return members

    def loader(self, start):
        """The steps from `start` on; made ahead by worker processes where there is decoding or a GPU to feed."""
        workers = self.config.workers if self.machine.cuda or not self.store.in_memory else 0
        workers = 1 if isinstance(self.store, StreamStore) else workers           # it has threads of its own, one cache
        # a generator of its own: the loader draws a seed, which from the run's numbers would shift them on resume
        return torch.utils.data.DataLoader(
            self.batches, batch_size=None, sampler=range(start, self.total_steps), num_workers=workers,
            pin_memory=self.machine.cuda, generator=torch.Generator(), worker_init_fn=as_worker)

    def clear(self):
        """A new run in an old one's folder replaces it: half of each would be a model nobody trained."""
        old = old_files(self.out)
        if old:
            print(f"replacing the run in {self.out}")
        for path in old:
            path.unlink()

    @cached_property
    def fingerprint(self):
        """A hash of what is learned from. On other captions the vocabulary would change under the weights."""
        data = [short_names(self.dataset.names), self.dataset.captions, self.dataset.splits, self.task.texts.rows]
        return hashlib.sha256(json.dumps(data).encode()).hexdigest()

    def save(self, model, scores):
        """The best model so far: what it is, how it reads text, its weights. sample.py needs nothing else."""
        if self.task.tokenizer:
            self.task.tokenizer.save(self.out / "tokenizer.json")
        save_safetensors(model.state_dict(), self.out / "model.safetensors", {"format": "pt"})
        write_json(self.out / "config.json", {
            "task": self.config.task, "model": self.config.model, "sizes": to_dict(model.config),
            "recipe": asdict(self.feats.recipe or self.task.recipe if self.feats else self.task.recipe),
            **self.task.about(), "features": self.feats.about() if self.feats else None,
            "dataset": self.dataset.name, "scores": scores, "options": asdict(self.config)})

    def add_scores(self, scores):
        """Put more of them, by name, into config.json."""
        config = read_json(self.out / "config.json")
        config["scores"].update(scores)
        write_json(self.out / "config.json", config)

    @property
    def kind(self):
        """What has been trained, in a word: cross, prefix, lstm, clip, classify."""
        return self.config.model if self.config.task in ("caption", "vqa") else self.config.task

    def save_state(self, model, optimizer, step, best, log):
        """All that --resume needs to go on from `step` as if nothing had happened. One file: no kill can split it."""
        state = {"step": step, "best": best, "log": log, "options": asdict(self.config), "data": self.fingerprint,
                 "model": model.state_dict(), "optimizers": optimizer.state_dict(),
                 "scaler": self.machine.scaler.state_dict(), "rng": torch.get_rng_state(),
                 "cuda_rng": torch.cuda.get_rng_state(self.machine.device) if self.machine.cuda else None}
        atomic_write(self.out / "state.pt", lambda file: write_state(state, file))
        self.write_log(log)

    def load_state(self, model, optimizer):
        """Put everything back where save_state took it from; returns (step, best, log)."""
        state = read_state(self.out)
        if state["data"] != self.fingerprint:
            raise UserError(f"the images, captions, labels or tokenizer of {self.dataset.name} are not those that the "
                            f"run in {self.out} began with; bring them back, or start again without --resume")
        try:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizers"])
            self.machine.scaler.load_state_dict(state["scaler"])
            torch.set_rng_state(state["rng"])
            if self.machine.cuda and state["cuda_rng"] is not None:
                torch.cuda.set_rng_state(state["cuda_rng"], self.machine.device)
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
            if out_of_memory(error):
                raise
            raise UserError(f"{self.out}/state.pt does not fit the model of its own options ({type(error).__name__}); "
                            "start again without --resume") from None
        return state["step"], state["best"], state["log"]

    def write_log(self, log):
        """log.csv, a line per logged step, and the same as curves.png."""
        text = io.StringIO()
        names = ["step", "train_loss", "val_loss", "shuffled_loss", "lr", "grad_norm", "ms", "images_per_s"]
        writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(log)
        atomic_write(self.out / "log.csv", lambda file: file.write(text.getvalue().encode()))
        series = {name: [(row["step"], row[key]) for row in log if key in row] for name, key in
                  (("training", "train_loss"), ("validation", "val_loss"), ("wrong image", "shuffled_loss"))}
        image = curves(series, f"{self.dataset.name}, {self.kind}: loss (nats per token) by step")
        atomic_write(self.out / "curves.png", lambda file: image.save(file, "PNG"))


def as_worker(_):
    """A loader's process inherits our handlers, but it should leave Ctrl-C to us, and end when it is told to."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def old_files(out):
    """What an earlier run left in the folder `out`. Raises UserError where files of these names are not a run's."""
    old = [path for name in RUN_FILES for path in out.glob(name)]
    foreign = [path.name for path in old if not path.name.startswith("search-")]          # sample.py leaves those, too
    if foreign and not (out / "state.pt").exists() and not is_run(out):
        raise UserError(f"{out} holds {foreign[0]}, but not of a run of train.py; give another --out-dir")
    return old


def write_state(state, file):
    """torch.save. A full disk, which it hides behind an error of its own, is the OSError that it was."""
    try:
        torch.save(state, file)
    except RuntimeError as error:
        raise error.__context__ if isinstance(error.__context__, OSError) else error


def read_state(out):
    """The content of a run's state.pt, or a UserError."""
    path = out / "state.pt"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        TrainConfig(**state["options"])
        if not {"optimizers", "data"} <= set(state):
            raise UserError(f"{path} is of an earlier version; start again without --resume")
        return state
    except (RuntimeError, OSError, EOFError, ValueError, LookupError, TypeError, AttributeError,
            pickle.UnpicklingError) as error:
        if out_of_memory(error) or getattr(error, "filename", None):              # not the file's fault
            raise
        raise UserError(f"{path} is damaged ({type(error).__name__}); start again without --resume") from None


def make_optimizer(model, config):
    """AdamW, or AdamW together with Muon, which then has the matrices inside; a group for each part and kind.

    Parts have rates of their own: the bridge (new layers) --lr, the decoder and the vision tower a factor of it. Of the
    two kinds, matrices decay, and norms, biases and a transformer's tables do not.
    The LSTM's word table does decay, and did when it was measured; nobody has compared.
    """
    factor = {"bridge": 1.0, "decoder": config.lr_decoder, "vision": config.lr_vision}
    names, groups = {id(p): name for name, p in model.named_parameters()}, {"adamw": [], "muon": []}

    def kind(p):
        """(who moves it, does it decay)"""
        table = names[id(p)].endswith((".wte.weight", ".wpe.weight", ".pos", ".cls"))
        inside = p.dim() == 2 and (".blocks." in names[id(p)] or names[id(p)].startswith("bridge."))
        return "muon" if inside and config.optimizer == "muon" else "adamw", p.dim() >= 2 and not table
    for part, params in model.parts().items():
        for owner, decays in dict.fromkeys(map(kind, params)):
            chosen = [p for p in params if kind(p) == (owner, decays)]
            pull = config.weight_decay if decays else 0.0
            groups[owner].append({"params": chosen, "weight_decay": pull, "factor": factor[part]})
    fused = next(model.parameters()).device.type in ("cpu", "cuda")               # one loop over all weights, not ten
    adamw = torch.optim.AdamW(groups["adamw"], lr=config.lr, betas=(0.9, config.beta2), fused=fused)
    return Together(adamw, Muon(groups["muon"], lr=config.lr)) if groups["muon"] else Together(adamw)


def open_parts(model, config, epoch):
    """Staged unfreezing: new layers learn from the start, the rest from its epoch on. True if anything changed."""
    changed = False
    for part, since in (("decoder", config.open_decoder), ("vision", config.open_vision)):
        for p in model.parts()[part]:
            changed |= p.requires_grad != (epoch >= since)
            p.requires_grad_(epoch >= since)
    return changed


# ---------------------------------------------------------------------------------------------------------------------

def train(run):
    """The loop. Returns the trained model, or None when it was stopped before the end."""
    config, machine = run.config, run.machine
    model = run.task.make_model().to(machine.device)
    optimizer = make_optimizer(model, config)
    step, best, log = 0, math.inf, []
    if config.resume:
        step, best, log = run.load_state(model, optimizer)
    elif machine.main:
        run.clear()
        run.save_state(model, optimizer, step, best, log)       # at once: a folder that cannot be written is seen now
    n_params = sum(p.numel() for p in model.parameters())
    machine.say(f"{n_params / 1e6:.2f} M parameters; steps {step} to {run.total_steps} of {config.batch_size} images x "
                f"{config.captions_per_image} captions, {config.epochs:g} epochs, on {machine.world} x "
                f"{machine.device}, {str(machine.dtype)[6:]}")
    stop = []                                                   # Ctrl-C: finish the step, save, leave; twice: at once

    def interrupt(*_):
        stop.append(1)
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # SIGTERM is what `kill` and job schedulers send before the end
    before = {sign: signal.signal(sign, interrupt) for sign in (signal.SIGINT, signal.SIGTERM)}
    fast, losses = None, []
    begin, begin_step, mark = time.perf_counter(), step, time.perf_counter()

    for micro_batches in run.loader(step):
        if isinstance(micro_batches, Exception):
            raise micro_batches
        # The rate of this step, and the parts of the model that may learn by now.
        lr = one_cycle(step, run.total_steps, config.lr, pct_start=config.warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["factor"]
        if open_parts(model, config, step / run.steps_per_epoch) or fast is None:
            learning(model)
            fast = machine.prepare(model, lambda fast: run.task.backward(fast, micro_batches[:1]))

        # The gradients of the step, micro-batch by micro-batch. The loss stays a tensor: .item() here would make the
        # host wait for the GPU.
        losses.append(run.task.backward(fast, micro_batches))

        # Clip and step.
        machine.scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
        machine.scaler.step(optimizer)
        machine.scaler.update()
        optimizer.zero_grad(set_to_none=True)
        step += 1

        # Log. Only here are numbers read off the device, so only here can a bad one be seen.
        end = step == run.total_steps
        evaluating = end or step % config.eval_interval == 0
        leaving = step == config.stop_after or (stop and machine.world == 1)
        if evaluating or leaving or step % config.log_interval == 0:
            n = step - (log[-1]["step"] if log else 0)
            values = torch.stack(losses).tolist()                                          # one per step
            *values, stops = machine.total(*values, len(stop))
            if not all(map(math.isfinite, values)):
                bad = step - n + 1 + [math.isfinite(v) for v in values].index(False)
                raise UserError(f"the loss of step {bad} is not finite; lower --lr and start again (the weights of the "
                                "last good evaluation are kept)")
            total, leaving = sum(values), leaving or stops > 0
            now = time.perf_counter()
            ms = 1000 * (now - mark) / n
            log.append({"step": step, "train_loss": total / n, "lr": lr, "grad_norm": norm.item(), "ms": ms,
                        "images_per_s": 1000 * config.batch_size / ms})
            left = (now - begin) / (step - begin_step) * (run.total_steps - step) / 60
            machine.say(f"step {step}/{run.total_steps}  loss {total / n:.3f}  lr {lr:.1e}  norm {norm.item():.2f}  "
                        f"{ms:.0f} ms  {1000 * config.batch_size / ms:.0f} images/s  {left:.1f} min left")
            losses, mark = [], now

        # Evaluate, save, leave.
        if evaluating:
            val, shuffled, judged = run.task.look(model, step, best)
            best = min(best, judged)
            log[-1].update(val_loss=val, shuffled_loss=shuffled)
            mark = time.perf_counter()
        if (evaluating or leaving) and machine.main:
            run.save_state(model, optimizer, step, best, log)
        if leaving and not end:
            machine.say(f"stopped after step {step}; go on with: python train.py --resume --out-dir "
                        f"{shlex.quote(str(run.out))}")
            return None
    for sign, handler in before.items():
        signal.signal(sign, handler)
    return model


def check_options(c):
    """Numbers that cannot work together are refused before anything is read or written."""
    above_zero = ("epochs", "batch_size", "captions_per_image", "accum", "lr", "n_layer", "n_head", "n_embd",
                  "n_scenes", "image_size", "patch_size", "max_tokens", "eval_interval", "log_interval", "eval_images",
                  "test_images")
    rules = [(getattr(c, name) > 0, f"--{name.replace('_', '-')} must be above 0, not {getattr(c, name)}")
             for name in above_zero]
    rules += [(0 <= getattr(c, name) < 1, f"--{name} must be at least 0 and below 1, not {getattr(c, name)}")
              for name in ("dropout", "crop", "jitter", "warmup", "smoothing")]
    rules += [(getattr(c, name) >= 0, f"--{name.replace('_', '-')} must not be below 0, but is {getattr(c, name)}")
              for name in ("workers", "seed", "weight_decay", "grad_clip", "stop_after", "lr_decoder", "lr_vision",
                           "open_decoder", "open_vision")]
    rules += [(0 < c.beta2 < 1, f"--beta2 must be between 0 and 1, not {c.beta2}"),
              (math.isfinite(c.epochs) and c.seed < 2 ** 32, "--epochs and --seed must be ordinary numbers"),
              (c.wiring == "final" or c.model == "cross", "--wiring lockstep is for --model cross"),
              (c.task != "vqa" or c.model == "prefix", "--task vqa is for --model prefix: give that too"),
              (c.task != "clip" or c.captions_per_image == 1, "--task clip pairs each image with one caption a step: "
               "drop --captions-per-image"),
              (c.model != "prefix" or c.features or c.vision or c.init or c.image_size // c.patch_size % c.shuffle == 0,
               f"--shuffle {c.shuffle} does not divide the {c.image_size // c.patch_size} patches of a row"),
              (c.task != "vqa" or not c.features, "--task vqa looks at pixels; drop --features"),
              (c.task != "classify" or not c.features, "--task classify teaches a vision tower; drop --features"),
              (c.reinforce == 0 or c.reinforce > 1 and c.task == "caption" and c.init and c.captions_per_image == 1,
               "--reinforce needs 2 or more, --task caption, --init RUN and --captions-per-image 1"),
              (c.reinforce == 0 or c.features, "--reinforce is for runs on --features"),
              (0 <= c.guidance < 100, f"--guidance must be 0 or a little above, not {c.guidance}"),
              (not c.guidance or c.task == "caption", "--guidance is for --task caption"),
              (c.shuffle == 1 or c.model == "prefix", "--shuffle is for --model prefix"),
              (not c.text_embeddings or c.task == "clip", "--text-embeddings is for --task clip"),
              (c.head == "linear" or c.task == "clip", "--head is for --task clip"),
              (not c.labels or c.task == "classify", "--labels is for --task classify"),
              (c.turns == 1 or c.task == "vqa", "--turns is for --task vqa"),
              (c.shuffle > 0 and c.turns > 0 and c.n_joint > 0, "--shuffle, --turns and --n-joint must be above 0"),
              (not (c.show_batch and c.task in ("clip", "classify")), "--show-batch is for --task caption and vqa"),
              (not (c.init and (c.vision or c.text)), "--init brings a whole model: drop --vision and --text"),
              (not c.init or c.task in ("caption", "vqa"), "--init is for caption and vqa; --vision takes a tower"),
              (not c.stream or c.dataset == "coco", "--stream fetches the images of coco; drop it"),
              (c.stream_cache > 0, f"--stream-cache must be above 0, not {c.stream_cache}"),
              (c.wiring == "final" or not c.features, "--wiring lockstep needs a vision tower, not --features"),
              (not (c.features and c.vision), "a vision tower has made --features: drop --vision or --features"),
              (not (c.model == "lstm" and c.text), "--text brings a GPT-2; --model lstm has none"),
              (c.n_hidden is None or c.n_hidden > 0, f"--n-hidden must be above 0, not {c.n_hidden}"),
              (c.min_count > 0 and c.num_beams > 0, "--min-count and --num-beams must be above 0"),
              (abs(c.length_penalty) < 100, f"--length-penalty is a number around 1, not {c.length_penalty}"),
              (c.stem == "patch" or c.patch_size > 1, "--stem conv needs --patch-size 2 or more")]
    rules += [(c.vocab_size >= 300, f"--vocab-size {c.vocab_size} is too small: bytes and special tokens need 300")]
    for holds, sentence in rules:
        if not holds:
            raise UserError(sentence)
    power = c.stem == "patch" or c.patch_size & (c.patch_size - 1) == 0
    for holds, sentence in (
            (c.image_size % c.patch_size == 0,
             f"--image-size {c.image_size} is no multiple of --patch-size {c.patch_size}"),
            (c.n_embd % c.n_head == 0, f"--n-embd {c.n_embd} does not divide among --n-head {c.n_head} heads"),
            (not c.soft_attention or (c.n_hidden or c.n_embd) % c.n_head == 0,
             f"the state of {c.n_hidden or c.n_embd} does not divide among --n-head {c.n_head} heads"),
            (power, f"--stem conv halves the picture: --patch-size {c.patch_size} is no power of 2")):
        if not holds:
            raise UserError(sentence)


def resumed_options(config, out):
    """The options of the saved run: --resume means the same run, so a flag that says otherwise is refused."""
    if not (out / "state.pt").exists():
        if is_run(out) and old_files(out):
            raise UserError(f"{out} holds a run without its state.pt, so it cannot be continued; go on from its "
                            f"weights with --init {out} (or --vision) in another --out-dir")
        print(f"{out} holds no saved state yet: starting from the beginning")
        return config, False
    saved = TrainConfig(**read_state(out)["options"])
    free = ("resume", "out_dir", "stop_after", "device", "workers", "cache", "data_dir", "features", "log_interval")
    for f in fields(TrainConfig):
        now, then = getattr(config, f.name), getattr(saved, f.name)
        if f.name in free[:3] or f.name in free and f.name in config.given:
            setattr(saved, f.name, now)
        elif f.name in config.given and now != then:
            raise UserError(f"--resume continues the run in {out}, made with --{f.name.replace('_', '-')} {then}, not "
                            f"{now}; drop the flag, or start a new run in another --out-dir")
    return saved, True


def evaluate_run(config):
    """--eval-only: score a finished run on a whole split; scores.json, captions.jsonl, and a row of the table."""
    saved = load_run(config.out_dir)
    read_table(config.table)                                    # a file that is no table is refused before the scoring
    options = saved.config["options"]
    here = {"eval_only", "out_dir", "split", "num_beams", "length_penalty", "table", "device", "dtype"}
    unfit = set(config.given) - here - {"data_dir", "features", "cache", "allow_broken", "batch_size", "guidance"}
    if unfit:
        raise UserError(f"--eval-only judges the run as it was trained: drop --{min(unfit).replace('_', '-')}")
    given = {name: getattr(config, name) for name in here | set(config.given)}
    try:
        config = TrainConfig(**{**options, **given})
    except TypeError as error:
        raise UserError(f"{config.out_dir}/config.json is not of this version ({error}); train again") from None
    check_options(config)
    machine = Machine(config)
    run = Run(config, machine, saved)
    model = saved.model.to(machine.device)
    scores = run.task.judge(model, config.split, num_beams=config.num_beams, length_penalty=config.length_penalty)
    if not scores:
        return                                                  # nothing to judge by; the task has said so
    shuffled = scores.pop("shuffled")
    machine.say(f"{config.split} split: {show(scores)}\nwith images exchanged: {show(shuffled)}")
    row = {"run": config.out_dir, "model": run.kind,
           "features": (saved.config.get("features") or {}).get("encoder", "")[:24], "dataset": config.dataset,
           "split": config.split, "beams": config.num_beams, "penalty": config.length_penalty,
           "guidance": config.guidance,
           "M params": sum(p.numel() for p in model.parameters()) / 1e6, **scores,
           **{f"{name} exchanged": shuffled[name] for name in ("BLEU-4", "CIDEr-D", "exact") if name in shuffled}}
    machine.say(f"\n{config.table}:\n" + "\n".join(add_to_table(config.table, row)))


def show_batch(run):
    """--show-batch: what the first step trains on. The bug every VLM author makes, visible at a glance."""
    vision = run.task.make_model().config.vision if run.config.model == "prefix" else None
    n_image = vision.n_patches // run.config.shuffle ** 2 if vision else 1
    batches = run.batches[0]
    if isinstance(batches, Exception):
        raise batches
    for batch in batches:
        for idx, targets in list(zip(batch.idx.tolist(), batch.targets.tolist()))[:8]:
            T = max([t + 1 for t, target in enumerate(targets) if target != IGNORE], default=0)
            print(show_tokens(run.task.tokenizer, idx[:T], targets[:T], n_image, color=sys.stdout.isatty()) + "\n")


def main():
    """Options, machine, data, loop, result."""
    config = parse_config(TrainConfig, presets=PRESETS, description="Train a model to talk about pictures.")
    if config.eval_only:
        return evaluate_run(config)
    meant = sorted({"split", "num_beams", "length_penalty", "table"} & set(config.given))
    if meant:
        raise UserError(f"--{meant[0].replace('_', '-')} is for --eval-only; without that a new run would begin here")
    if config.resume:
        config, config.resume = resumed_options(config, Path(config.out_dir))
    check_options(config)
    for source in (config.init, config.vision, config.text):
        if source and not config.resume and Path(source).resolve() == Path(config.out_dir).resolve():
            raise UserError(f"{source} would be replaced by the run that starts from it; give another --out-dir")
    if Path(config.out_dir).exists() and not Path(config.out_dir).is_dir():
        raise UserError(f"--out-dir {config.out_dir} is a file; name a folder")
    if not config.resume and not config.show_batch:
        old_files(Path(config.out_dir))
    machine = Machine(config)
    run = Run(config, machine)
    if config.show_batch:
        return show_batch(run)
    try:
        model = train(run)
        if model is not None and machine.main:
            run.task.finish(model)
    finally:
        if machine.world > 1:
            dist.destroy_process_group()


if __name__ == "__main__":
    run_script(main)
