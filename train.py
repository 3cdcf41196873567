"""Train a model to talk about pictures.

    python train.py                                           drawn scenes, a few minutes on a laptop, no download
    python train.py --task caption --dataset flickr8k         real photographs
    python train.py --resume                                  go on where the last run stopped
    torchrun --nproc_per_node=2 train.py ...                  several processes, the same curve (but for dropout, which
                                                              each of them draws for itself)

First the options of every task (a task's own stand in its module, in tinyvlm/). Then a run is built in one direction:
options, data set, tokenizer and rows, images, model, optimizer. Then the loop: rate, forward, backward, clip, step,
log, evaluate, save. What it leaves in --out-dir (README, "A run's folder") is all that sample.py needs.
"""
import json
import math
import os
import shlex
import signal
import sys
import time
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from data import DataConfig, ImageStore, load_dataset
from tinyvlm import answering, captioning, classifying, retrieval
from tinyvlm.batches import Batches, Rows, load_steps
from tinyvlm.clip import contrastive_step
from tinyvlm.config import UserError, flag_name, option, parse_config, peek, run_script
from tinyvlm.device import Device, compile_blocks
from tinyvlm.features import FeatureFile
from tinyvlm.files import check_writable, locked, write_json, write_text
from tinyvlm.gpt import IGNORE
from tinyvlm.image import Augment
from tinyvlm.layouts import report
from tinyvlm.optimizer import blended, make_optimizer, unfreeze
from tinyvlm.presets import PRESETS, choose
from tinyvlm.pretrained import load_run
from tinyvlm.runs import (fingerprint, load_state, old_files, read_state, report_test, save_model, save_state,
                          show_example, write_log)
from tinyvlm.schedule import one_cycle
from tinyvlm.task import Setup, show, train_mode
from tinyvlm.vqa import show_tokens

TASKS = {"caption": captioning, "clip": retrieval, "classify": classifying, "vqa": answering}


@dataclass
class TrainConfig(DataConfig):
    """The options of every task; those of the data set (--dataset, --data-dir, ..) are in DataConfig, in data.py."""
    task: str = option("caption", "what to learn; `--task clip -h` shows its own options, too", tuple(TASKS), "the run")
    out_dir: str = option("out", "the run's folder")
    resume: bool = option(False, "continue the run in --out-dir, exactly; where there is none, begin it")
    eval_only: bool = option(False, "train nothing: score the run in --out-dir on --split")
    split: str = option("test", "with --eval-only: the split to score", ("train", "val", "test"))
    vision: str | None = option(None, "start from this vision tower: a Hub id, a folder, or a run", group="the model")
    image_size: int = option(64, "pixels a side; more shows more and costs its square; public towers fix it", above=0,
                             below=10_001)
    patch_size: int = option(16, "pixels a side of one image token", above=0)
    stem: str = option("conv", "how patches are cut: as in the paper, or by small convolutions", ("patch", "conv"))
    class_token: bool = option(False, "give the ViT its extra token; public ViTs have it, captioners do without")
    n_layer: int = option(2, "blocks in each tower", above=0)
    n_head: int = option(4, "attention heads", above=0)
    n_embd: int = option(128, "channels", above=0)
    dropout: float = option(0.0, "raise it (0.1) when only the training loss still falls", least=0, below=1)
    epochs: float = option(3.5, "passes over the training images", above=0, group="the training")
    batch_size: int = option(32, "images a step, over all processes and micro-batches", above=0)
    accum: int = option(1, "split each step into this many micro-batches; raise it when memory runs out", above=0)
    lr: float = option(2e-3, "peak learning rate; lower for larger models, much lower for public weights", above=0)
    lr_vision: float = option(1.0, "the vision tower's rate, as a factor of --lr", least=0)
    unfreeze_vision: float = option(0, "epoch from which the vision tower learns", least=0)
    warmup: float = option(0.2, "share of the steps in which the rate climbs (OneCycle)", least=0, below=1)
    optimizer: str = option("muon", "muon: for the matrices of the blocks, AdamW for the rest", ("muon", "adamw"))
    weight_decay: float = option(0.05, "pull of matrices (not of norms, biases, embeddings) towards zero", least=0)
    grad_clip: float = option(1.0, "largest gradient norm; 0 for no limit", least=0)
    crop: float = option(0.0, "augment: random windows, leaving out up to this share of the area", least=0, below=1)
    jitter: float = option(0.0, "augment: brightness, contrast, saturation, up to this factor", least=0, below=1)
    flip: bool = option(True, "augment: mirror half of the images, but none whose (English) captions say left or right")
    device: str = option("auto", "cpu, cuda, mps or auto", group="the machine")
    dtype: str = option("auto", "of products; auto: 16 bits on cuda", ("auto", "float32", "bfloat16", "float16"))
    compile: bool | None = option(None, "torch.compile the blocks; default: on cuda, from 10 million weights on")
    eval_interval: int = option(1000, "steps between evaluations (and saves)", above=0, group="reports")
    eval_images: int = option(500, "validation images of each evaluation", least=2)
    test_images: int = option(1000, "test images scored at the end", least=2)
    log_interval: int = option(25, "steps between log lines", above=0)


# what may be given anew to a run that is continued; and what else to one that is only scored
FREE = {"resume", "eval_only", "out_dir", "split", "num_beams", "length_penalty", "consensus", "device", "data_dir",
        "features", "log_interval"}
FREE_TO_SCORE = FREE | {"dtype", "batch_size", "allow_broken"}


def read_options(argv):
    """The command line -> options of the task it names; with --resume or --eval-only those of the run in --out-dir, and
    what would contradict them is refused. Also the state to resume from, or None."""
    out, state = Path(str(peek(argv, "out_dir", "out"))), None
    if peek(argv, "eval_only"):
        saved, free = load_run(out).config["options"], FREE_TO_SCORE
    elif peek(argv, "resume") and old_files(out):
        state = read_state(out)
        saved, free = state["options"], FREE
    else:
        task, preset = choose(argv)
        presets = {name: values for name, values in PRESETS.items() if values.get("task", "caption") == task}
        return parse_config(config_class(task), argv, presets, __doc__.partition("\n")[0], preset), None
    cls = config_class(saved.get("task"))
    unknown = saved.keys() - cls.__dataclass_fields__.keys()
    if unknown or saved.get("task") not in TASKS:
        raise UserError(f"the run in {out} is not of this version (its options: {sorted(unknown)[:3]}); train again")
    config = parse_config(cls, argv, dict.fromkeys(("run", *PRESETS), saved), default_preset="run")
    for name in sorted(config.given - free):
        if getattr(config, name) != saved.get(name):
            raise UserError(f"the run in {out} was made with {flag_name(name)} {saved.get(name)}, not "
                            f"{getattr(config, name)}; drop the flag, or train another run")
    return config, state


def config_class(task):
    """The options of a task: everybody's, then its own."""
    own = (TASKS[task].Options,) if task in TASKS else ()
    return dataclass(type("Options", (*own, TrainConfig), {}))


def build_setup(config, device, run=None):
    """Options -> Setup: data set, then tokenizer and rows, then images. run: the one that is only to be evaluated."""
    dataset, path = load_dataset(config), getattr(config, "features", None)
    device.say(report(dataset))
    features = FeatureFile(path, dataset, device.say) if path else None
    prepared = TASKS[config.task].prepare(config, dataset, features, run)
    for note in prepared.notes:
        device.say(note)
    if features:
        store = ImageStore(dataset, None, features.data, features.row)
    else:
        store = ImageStore.of_pixels(dataset, [config.split] if run else ["train", "val", "test"], prepared.recipe,
                                     config.allow_broken, int(os.environ.get("LOCAL_WORLD_SIZE", 1)), device.say)
    rows = Rows(prepared.rows, fixed=device.cuda)
    for split in [config.split] if run else ["train", "val", "test"]:             # before an epoch is spent
        n, least = sum(rows.count[i] > 0 for i in store.usable(split)), 2 if config.task == "clip" else 1
        if n < least and not (config.task == "vqa" and split == "test"):          # whose answers may be secret
            raise UserError(f"the {split} split of {dataset.name} has {n} usable images with something to learn, and "
                            f"needs {least}; see the lines above")
    if store.to(device.torch) and device.cuda:                  # batches are then made on the GPU, from a few numbers
        rows.idx, rows.targets = rows.idx.to(device.torch), rows.targets.to(device.torch)
    return Setup(config, device, dataset, prepared, store, rows)


@contextmanager
def catch_signals(stop):
    """Ctrl-C and SIGTERM (what schedulers send): finish the step, save, leave. A second Ctrl-C leaves at once."""
    def interrupt(*_):
        stop.append(1)
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with ExitStack() as stack:
        for sign in (signal.SIGINT, signal.SIGTERM):            # afterwards, each gets back the handler it had
            stack.callback(signal.signal, sign, signal.signal(sign, interrupt))
        yield


def train(setup, state=None):
    """The loop. Returns the trained model, or None when it was stopped before the end. state: to resume from."""
    config, device = setup.config, setup.device
    task, out = TASKS[config.task], Path(config.out_dir)
    torch.manual_seed(config.seed)
    model = task.build(config, setup.prepared).to(device.torch)
    optimizer, share = make_optimizer(model, config), getattr(config, "blend", 1)
    origin = {name: t.clone() for name, t in model.state_dict().items() if share != 1}
    batches = Batches(setup.store, setup.rows, config.batch_size, getattr(config, "captions_per_image", 1),
                      config.accum, config.seed, device.rank, device.world, whole=config.task == "clip")
    steps_per_epoch, n_params = len(batches.members) / config.batch_size, sum(p.numel() for p in model.parameters())
    total, augment = max(1, round(config.epochs * steps_per_epoch)), Augment(config.crop, config.jitter, config.flip)
    step, best, log, data = 0, math.inf, [], fingerprint(setup.dataset, setup.prepared)
    if state:
        load_state(out, state, model, optimizer, device, data)
        step, best, log, origin = (state.get(name, {}) for name in ("step", "best", "log", "origin"))
    device.say(f"{n_params / 1e6:.2f} M parameters; steps {step} to {total} of {config.batch_size} images x {batches.K}"
               f" texts, {config.epochs:g} epochs, on {device.world} x {device.torch}, {str(device.dtype)[6:]}")
    if config.resume and not state:                             # one command for a scheduler, and a mistyped folder
        device.say(f"{out} holds no run to resume: a new one begins")
    if not state and len(old_files(out)) > 1:
        device.say(f"the run in {out} will be replaced after the first step; Ctrl-C keeps it")
    if device.cuda and n_params > 1e7 if config.compile is None else config.compile:
        compile_blocks(model, device)
    first, losses, stop, mark, since = step, [], [], time.perf_counter(), None

    def save():
        save_state(out, model, optimizer, device, config, step=step, best=best, log=log, origin=origin, data=data)

    with locked(out / ".lock", wait=False) if device.main else nullcontext(), catch_signals(stop):
        for micro_batches in load_steps(batches, step, total, device):
            # The rate of this step, and the parts of the model that may learn by now.
            lr = one_cycle(step, total, config.lr, pct_start=config.warmup)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["factor"]
            if unfreeze(model, config, step / steps_per_epoch) or step == first:
                train_mode(model)
                # what several processes train together; checkpoints are taken from the model itself
                fast = DistributedDataParallel(model) if device.world > 1 else model

            # Forward and backward, micro-batch by micro-batch. Each counts by its share of the step's targets, so the
            # gradients add up to those of the mean over all. DDP takes the mean over processes where the sum is
            # needed, hence the factor `world`. The loss stays a tensor: .item() would make the host wait for the GPU.
            ready = [batch.to(device.torch, setup.prepared.recipe, augment) for batch in micro_batches]
            if config.task == "clip" and len(ready) > 1:        # each pair needs all the others as wrong answers
                pairs = [(batch.img, retrieval.texts_of(batch, setup)) for batch in ready]
                loss = contrastive_step(fast, pairs, device.autocast, device.scaler.scale) / device.world
            else:
                loss = 0
                for k, batch in enumerate(ready):
                    with device.no_sync(fast, last=k + 1 == len(ready)):
                        with device.autocast():
                            part = task.loss(fast, batch, setup) * batch.share
                        device.scaler.scale(part * device.world).backward()
                    loss = loss + part.detach()
            losses.append(loss)

            # Clip and step.
            device.scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
            device.scaler.step(optimizer)
            device.scaler.update()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            if step == first + 1 and not state and device.main:     # all works: now a new run may replace an old one
                save()                                          # half of each would be a model nobody trained
                for path in old_files(out)[1:]:                 # the first is the state.pt just saved
                    path.unlink()

            # Log. Only here are numbers read off the device, so only here can a bad one be seen.
            evaluating = step == total or step % config.eval_interval == 0
            leaving = bool(stop) and device.world == 1          # several processes agree on it below, when they log
            if evaluating or leaving or step % config.log_interval == 0:
                *values, stops = device.total(*torch.stack(losses).tolist(), len(stop))
                if not all(map(math.isfinite, values)):
                    raise UserError(f"the loss is not finite within the {len(values)} steps before step {step}; lower "
                                    "--lr and start again (the weights of the last good evaluation are kept)")
                leaving, losses, before, mark = stops > 0, [], mark, time.perf_counter()
                seconds, since = (mark - before) / len(values), since or (step, mark)
                log.append({"step": step, "train_loss": sum(values) / len(values), "lr": lr, "grad_norm": norm.item(),
                            "ms": 1000 * seconds, "images_per_s": config.batch_size / seconds})
                # the steps before the first line held compilation: none of them counts for the time left
                left = (mark - since[1]) / max(1, step - since[0]) * (total - step) / 60
                device.say("step {step}/{total}  loss {train_loss:.3f}  lr {lr:.1e}  norm {grad_norm:.2f}  {ms:.0f} ms"
                           "  {images_per_s:.0f} images/s".format(total=total, **log[-1]) +
                           (f"  {left:.1f} min left" if left else ""))

            # Evaluate, save, leave.
            if evaluating:
                with blended(model, origin, share):
                    best = validate(model, setup, step, best, log[-1])
                mark = time.perf_counter()
            if (evaluating or leaving) and device.main:
                save()
                write_log(out, log, f"{setup.dataset.name}, {getattr(config, 'model', config.task)}")
            if leaving and step < total:
                device.say(f"stopped after step {step}; go on with: python train.py --resume "
                           f"--out-dir={shlex.quote(str(out))}")
                return None
    return model


def validate(model, setup, step, best, row):
    """Evaluate, print, keep the best model so far. Returns the new best cost; row: the log line to complete."""
    scores, examples = TASKS[setup.config.task].evaluate(model, setup, "val", setup.config.eval_images, n_predict=24)
    name, first = next(iter(scores.items()))
    cost = first if name == "loss" else -first
    if not math.isfinite(cost):
        raise UserError(f"the validation {name} at step {step} is not finite; lower --lr and start again")
    setup.device.say("\n".join([f"step {step}: validation {show(scores)}", *map(show_example, examples[:3])]))
    row.update(val_loss=scores["loss"], shuffled_loss=scores["shuffled loss"])
    if cost < best and setup.device.main:
        save_model(model, setup, {"step": step, **{f"val {key}": value for key, value in scores.items()}})
    return min(cost, best)


def evaluate_run(config, device):
    """--eval-only: score a finished run on a whole split; leaves scores.json and predictions.jsonl."""
    run, out = load_run(config.out_dir), Path(config.out_dir)
    setup = build_setup(config, device, run)
    names = ("num_beams", "length_penalty", "consensus")
    how = {name: getattr(config, name) for name in names if hasattr(config, name)}
    scores, examples = TASKS[config.task].evaluate(run.model.to(device.torch), setup, config.split, **how)
    device.say(f"{config.split} split: {show(scores)}")
    if device.main:
        rows = [{**example, "image": setup.dataset.names[example["image"]],
                 "references": setup.dataset.captions[example["image"]]} for example in examples]
        write_text(out / "predictions.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        write_json(out / "scores.json", {"split": config.split, **how, **scores})


def show_batch(setup):
    """--show-batch: what the first step trains on. The bug every VLM author makes, visible at a glance."""
    config = setup.config
    batches = Batches(setup.store, setup.rows, config.batch_size, config.captions_per_image, seed=config.seed)
    batch, model = batches.make(0)[0], TASKS[config.task].build(config, setup.prepared)
    n_image = captioning.n_image_tokens(model.config, setup.prepared.features) or 1
    rows = [row for row in zip(batch.idx.tolist(), batch.targets.tolist()) if any(t != IGNORE for t in row[1])]
    for idx, targets in rows[:8]:
        print(show_tokens(setup.prepared.tokenizer, idx, targets, n_image, color=sys.stdout.isatty()) + "\n")


def main():
    """Options, device, data, loop, result."""
    config, state = read_options(sys.argv[1:])
    for source in ("init", "vision", "text"):
        path = getattr(config, source, None)
        if path and not state and Path(path).resolve() == Path(config.out_dir).resolve():
            raise UserError(f"--{source} {path} would be replaced by the run that begins so; give another --out-dir")
    device = Device(config.device, config.dtype)
    old_files(config.out_dir)                                   # refuses a folder that is not a run's before all work,
    check_writable(config.out_dir)                              # or cannot be written
    if config.eval_only:
        return evaluate_run(config, device)
    setup = build_setup(config, device)
    if getattr(config, "show_batch", False):
        return show_batch(setup)
    model = train(setup, state)
    if model is not None:
        report_test(model, setup, TASKS[config.task].evaluate)


if __name__ == "__main__":
    run_script(main)
