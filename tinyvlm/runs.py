"""A run's folder: the best model, the state that --resume needs, the log, the result. Every file appears whole or not.

    model.safetensors, config.json, tokenizer.json      the best model so far; all that sample.py needs
    state.pt                                            everything at the last save: weights, optimizer, random numbers
    log.csv, curves.png                                 a line per logged step, and the same as a picture
"""
import shlex
import zipfile
from dataclasses import asdict
from pathlib import Path

import torch

from .config import UserError, out_of_memory
from .draw import caption_sheet, curves, similarity_picture
from .features import digest, short_names
from .files import atomic_write, read_json, write_csv, write_image, write_json
from .pretrained import is_run
from .task import show
from .vit import ViT
from .weights import load_safetensors, save_safetensors

RUN_FILES = ("state.pt", "model.safetensors", "tokenizer.json", "log.csv", "curves.png", "samples.png", "example.png",
             "scores.json", "predictions.jsonl", "results.json", "similarity.png", "search-*.safetensors",
             "config.json")     # in the order of deletion: last what tells that the rest was a run's
LOG = ("step", "train_loss", "val_loss", "shuffled_loss", "lr", "grad_norm", "ms", "images_per_s")


def old_files(out):
    """What an earlier run left in the folder `out`. Raises UserError where files of these names are not a run's."""
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out-dir {out} is a file; name a folder")
    old = [path for name in RUN_FILES for path in out.glob(name)]
    foreign = [path.name for path in old if not path.name.startswith("search-")]          # sample.py leaves those, too
    if foreign and not (out / "state.pt").exists() and not is_run(out):
        raise UserError(f"{out} holds {foreign[0]}, but not of a run of train.py; give another --out-dir")
    return old


def fingerprint(dataset, prepared):
    """A hash of what is learned from. On other captions the vocabulary would change under the weights."""
    return digest([short_names(dataset.names), dataset.captions, dataset.splits, prepared.rows])


def save_model(model, setup, scores):
    """The best model so far: what it is, how it reads text, its weights."""
    config, prepared, out = setup.config, setup.prepared, Path(setup.config.out_dir)
    features = prepared.features
    if prepared.tokenizer:
        prepared.tokenizer.save(out / "tokenizer.json")
    save_safetensors(model.state_dict(), out / "model.safetensors", {"format": "pt"})
    write_json(out / "config.json", {
        "task": config.task, "model": getattr(config, "model", config.task), "sizes": asdict(model.config),
        "recipe": asdict(features and features.recipe or prepared.recipe), "clean": "none", **prepared.meta,
        "features": features and features.meta, "dataset": setup.dataset.name, "scores": scores,
        "options": asdict(config)})


def save_state(out, model, optimizer, device, config, **rest):
    """All that --resume needs to go on as if nothing had happened, in one file: no kill can split it. rest: step, best,
    log, origin (where --blend begins; the run of --init may be trained anew), data (the fingerprint)."""
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": device.scaler.state_dict(),
             "rng": torch.get_rng_state(), "cuda_rng": torch.cuda.get_rng_state(device.torch) if device.cuda else None,
             "options": asdict(config), **rest}

    def write(file):
        try:
            torch.save(state, file)
        except RuntimeError as error:                           # torch hides a full disk behind an error of its own
            raise error.__context__ if isinstance(error.__context__, OSError) else error
    atomic_write(Path(out) / "state.pt", write)


def read_state(out):
    """The content of a run's state.pt, or a UserError. torch.load trusts the numbers: checksums are compared here."""
    path = Path(out) / "state.pt"
    if not path.exists():
        raise UserError(f"{out} holds a run without its state.pt, so it cannot be continued; go on from its weights "
                        f"with --init {out} (or --vision) in another --out-dir")
    try:
        with zipfile.ZipFile(path) as file:
            if file.testzip():
                raise ValueError("a checksum is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
        state["optimizer"], state["data"], state["options"]     # KeyError: of an earlier version
        return state
    except Exception as error:                                  # a damaged zip or pickle can raise anything
        if isinstance(error, OSError) or out_of_memory(error):  # not the file's fault
            raise
        raise UserError(f"{path} is damaged or of another version ({error!r:.60}); train again without --resume") \
            from None


def load_state(out, state, model, optimizer, device, data):
    """Put everything back where save_state took it from."""
    if state["data"] != data:
        raise UserError(f"the images, captions, labels or tokenizer are not those that the run in {out} began with; "
                        "bring them back, or start again without --resume")
    for part, name in ((model, "model"), (optimizer, "optimizer"), (device.scaler, "scaler")):
        part.load_state_dict(state[name])
    torch.set_rng_state(state["rng"])
    if device.cuda and state["cuda_rng"] is not None:
        torch.cuda.set_rng_state(state["cuda_rng"], device.torch)


def write_log(out, log, title):
    """log.csv, a line per logged step, and the same as curves.png."""
    write_csv(Path(out) / "log.csv", LOG, log)
    series = {name: [(row["step"], row[key]) for row in log if key in row] for name, key in
              (("training", "train_loss"), ("validation", "val_loss"), ("shuffled images", "shuffled_loss"))}
    write_image(Path(out) / "curves.png", curves(series, f"{title}: loss (nats per target) by step"))


def show_example(example):
    """The question (if there is one), the prediction and the truth: a line each."""
    return "".join(f"    {key:10}  {example[key]}\n" for key in ("question", "prediction", "truth") if key in example)


def report_test(model, setup, evaluate):
    """The result by the best weights on the test split, as the task's `evaluate` has it: scores, samples.png,
    example.png, and what to run next."""
    config, dataset, out = setup.config, setup.dataset, Path(setup.config.out_dir)
    setup.device.total(0)                                       # the others wait here until the first has saved
    model.load_state_dict(load_safetensors(out / "model.safetensors"))
    scores, examples = evaluate(model, setup, "test", config.test_images)
    if not setup.device.main:
        return
    print(f"\n{len(examples)} held-out examples, by the best model:", *map(show_example, examples[:6]), sep="\n")
    print("test split: " + show(scores))
    about = read_json(out / "config.json")
    about["scores"] |= {f"test {name}": value for name, value in scores.items()}
    write_json(out / "config.json", about)
    shown = list({example["image"]: example for example in examples}.values())[:16]
    pictures = [dataset.open(example["image"]) for example in shown]
    texts = [f"{example.get('question', '')} {example['prediction']}".strip() for example in shown]
    write_image(out / "samples.png", caption_sheet(pictures, texts))
    write_image(out / "example.png", pictures[0])
    if config.task == "clip":
        sim = torch.tensor([example["similarity"] for example in examples[:12]])   # (12, 12), or fewer
        write_image(out / "similarity.png", similarity_picture(sim, [example["truth"] for example in examples[:12]]))
    print(f"{out}/samples.png shows {len(shown)} of them, {out}/curves.png the training.")
    features, words = setup.prepared.features, ["sample.py", f"--out-dir={out}", f"--image={out}/example.png"]
    if config.task == "classify":
        where = [f"--data-dir={config.data_dir}"] if config.data_dir else []
        how = ["--model", "prefix"] if isinstance(model.vision, ViT) else ["--task", "clip"]   # which takes a ResNet
        words = ["train.py", *how, "--dataset", dataset.name, *where, f"--vision={out}", "--out-dir", "out/next"]
    words += {"vqa": ["--prompt", shown[0].get("question")],
              "clip": ["--labels", *dict.fromkeys(example["truth"] for example in shown[:3])]}.get(config.task, [])
    if not features or features.meta["source"]:                 # else what made them cannot encode a new picture
        print("Now try\n    python " + shlex.join(words))
