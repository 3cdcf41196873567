"""--task classify: the first stage of system 5. A vision tower learns labels, several categories at once.

Before a vision tower meets text, it learns to tell colours, things and places apart, from labels that people or CLIP
gave (pseudo-labels: "Self-training with Noisy Student", Xie et al. 2020, arXiv:1911.04252). One linear head per
category; the heads are thrown away afterwards, the tower stays: train.py --vision RUN.
"""
import csv
import io
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from .captions import clean_caption, layout
from .cnn import ResNetConfig
from .config import UserError, option
from .features import open_encoder
from .files import read_json, tidy_name, write_csv
from .gpt import IGNORE
from .image import Recipe, open_batches, preprocess
from .retrieval import classify, label_embeddings
from .task import Prepared, fresh_vision, load_vision, run_split
from .vit import ViTConfig, build_vision


@dataclass
class Options:
    """What only --task classify has."""
    labels: str | None = option(None, "the file of labels (data.py --label); shapes have their own", group="labels")


# ---- the model

@dataclass
class ClassifierConfig:
    """The tower's sizes, and the labels of every category: {"color": ["red", ..], "shape": [..]}; label 0 is "red"."""
    vision: ViTConfig | ResNetConfig = field(default_factory=ViTConfig)
    labels: dict = field(default_factory=dict)


class Classifier(nn.Module):
    """One tower, a head per category. An image without a label of some category (IGNORE) teaches that head nothing."""

    def __init__(self, config):
        super().__init__()
        self.config, self.vision = config, build_vision(config.vision)
        self.heads = nn.ModuleList(nn.Linear(self.vision.n_feat, len(names)) for names in config.labels.values())
        for head in self.heads:
            nn.init.normal_(head.weight, std=0.02)                                # (n_labels, C)
            nn.init.zeros_(head.bias)

    def forward(self, img, labels):
        """img (B, 3, H, W), labels (B, categories) of label numbers -> a list of logits (B, n_labels), and the loss:
        the mean over categories of each one's cross-entropy (nats), of the images that have a label of it."""
        x = self.vision.features(img)                                             # (B, C)
        logits = [head(x) for head in self.heads]                                 # categories x (B, n_labels)
        # sum / count, as the mean of F.cross_entropy is nan in a batch without any label of a category
        losses = [F.cross_entropy(scores.float(), labels[:, k], ignore_index=IGNORE, reduction="sum") /
                  (labels[:, k] != IGNORE).sum().clamp(min=1) for k, scores in enumerate(logits)]
        return logits, torch.stack(losses).mean()

    def parts(self):
        """{"connector" | "decoder" | "vision": parameters}: the heads are what is new, and nothing here makes text."""
        return {"connector": list(self.heads.parameters()), "decoder": [], "vision": list(self.vision.parameters())}


# ---- the task

def prepare(config, dataset, features=None, run=None):
    """-> Prepared. An image has one row: its label's number in each category as idx, and one target that counts it once.

    A label that the training split lacks has no number: nothing could learn it. Images without a label are left out.
    """
    start = load_vision(config.vision) if config.vision and not run else None
    given = read_labels(config.labels, dataset) if config.labels else getattr(dataset, "labels", None)
    if given is None:
        raise UserError(f"{dataset.name} has no labels of its own; make some with data.py --label, and give the file "
                        "with --labels")
    labels, notes, rows = {}, [], []
    for i in given.keys() & {*dataset.splits["train"]}:
        for category, name in given[i].items():
            labels.setdefault(category, set()).add(name)
    labels = run.model.config.labels if run else {category: sorted(labels[category]) for category in sorted(labels)}
    for i in range(len(dataset.names)):
        found = [given.get(i, {}).get(category) for category in labels]
        row = [names.index(name) if name in names else IGNORE for name, names in zip(found, labels.values())]
        rows.append([(row, [0] + [IGNORE] * (len(row) - 1))] if {*row} - {IGNORE} else [])
    for split, members in dataset.splits.items():
        dataset.splits[split] = kept = [i for i in members if rows[i]]
        if not kept:
            raise UserError(f"no image of the {split} split has a label that is learned; label more images, or with a "
                            "lower --margin")
        if len(kept) < len(members):
            notes.append(f"{len(members) - len(kept)} images of the {split} split have no label and are left out")
    recipe = run.recipe if run else start.recipe if start else Recipe(size=config.image_size)
    return Prepared(recipe, rows, meta={"labels": labels}, start=start, notes=notes)


def read_labels(path, dataset):
    """A csv image,category,label[,..] (data.py --label) -> {image number: {category: label}}. Raises UserError."""
    number, found = {tidy_name(name): i for i, name in enumerate(dataset.names)}, {}
    with layout(path, "a table of labels that begins with image,category,label"):
        for row in csv.DictReader(io.StringIO(Path(path).read_text(encoding="utf-8-sig"))):
            i = number.get(tidy_name(row["image"]))
            if i is not None and row["label"] and row["category"]:
                found.setdefault(i, {})[row["category"]] = row["label"]
    return found


def build(config, prepared, features=None):
    """A tower, public or fresh, and a new head for each category."""
    start = prepared.start
    model = Classifier(ClassifierConfig(start.config if start else fresh_vision(config), prepared.meta["labels"]))
    if start:
        model.vision.load_state_dict(start.weights)
    return model


def loss(model, batch, setup=None):
    """Mean cross-entropy over the categories, in nats."""
    return model(batch.img, batch.idx)[1]


def evaluate(model, setup, split, limit=None, **_):
    """-> scores, examples: the loss, and the share of right labels by category, with true and with shuffled images."""
    def predict(batch):
        logits, _ = model(batch.img, batch.idx)                                   # categories x (b, n_labels)
        best = torch.stack([scores.argmax(dim=1) for scores in logits], dim=1)    # (b, categories)
        return dict(zip(batch.members, best.tolist()))
    guesses, value, shuffled, _ = run_split(model, setup, split, limit, predict, loss)
    guess = torch.tensor([*guesses.values()])                                     # (n, categories)
    truth = torch.tensor([setup.prepared.rows[i][0][0] for i in guesses])         # (n, categories), or IGNORE
    scores, labels = {"loss": value, "shuffled loss": shuffled}, model.config.labels
    for k, category in enumerate(labels):
        known = truth[:, k] != IGNORE                                             # (n,)
        for way, column in (("", guess[:, k]), ("shuffled ", guess[:, k].roll(1))) if known.any() else ():
            scores[way + category] = (column == truth[:, k])[known].float().mean().item()

    def text(row):
        return ", ".join(names[n] for n, names in zip(row, labels.values()) if n != IGNORE)
    return scores, [{"image": i, "prediction": text(g), "truth": text(t), "text": text(g)}
                    for i, g, t in zip(guesses, guess.tolist(), truth.tolist())]


# ---- pseudo-labels

def read_categories(path):
    """A label file, {"category": ["phrase", ..], ..} -> the same. Raises UserError where it is not of that form."""
    categories = read_json(path)
    if not isinstance(categories, dict) or not categories or not all(
            isinstance(names, list) and len(names) > 1 and all(isinstance(n, str) and n.strip() for n in names)
            for names in categories.values()):
        raise UserError(f'{path} should be like {{"color": ["red", "blue"]}}, with two phrases or more in each category')
    return categories


@torch.inference_mode()
def write_pseudo_labels(config, dataset, path, say=print):
    """Each image's best label per category, by CLIP, with its probability, into the csv `path`. Returns the path.

    A label that is hardly likelier than the next best (--margin) teaches more noise than it is worth: it is left empty.
    config: data.PrepareConfig.
    """
    categories, loaded = read_categories(config.label), open_encoder(config.labeler)
    model, tokenizer, how = loaded.model.to(config.device), loaded.tokenizer, loaded.config.get("clean", "none")
    if not hasattr(model, "encode_image") or None in (model.vision, model.text, tokenizer):
        raise UserError(f"--labeler {config.labeler} is no CLIP with both an image tower and a text tower")
    label_emb = {category: label_embeddings(model, tokenizer, names, clean=lambda text: clean_caption(text, how))
                 for category, names in categories.items()}                       # (n_labels, D) each
    rows, broken, unsure = [], {}, Counter()
    for part in open_batches(range(len(dataset.names)), lambda i: preprocess(dataset.open(i), loaded.recipe),
                             config.batch_size, broken, "labelling"):
        emb = model.encode_image(torch.stack([img for _, img in part]).to(config.device)) if part else ()      # (b, D)
        for category, names in categories.items() if part else ():
            best, order = classify(emb, label_emb[category], model.logit_scale).topk(2)           # (b, 2) both
            for (i, _), (p, q), (k, _) in zip(part, best.tolist(), order.tolist()):
                unsure[category] += p - q < config.margin
                rows.append([dataset.names[i], category, names[k] if p - q >= config.margin else "", f"{p:.4f}",
                             f"{p - q:.4f}"])
    write_csv(path, ["image", "category", "label", "probability", "margin"], rows)
    say("".join(f"  {category}: {unsure[category]} images too unsure (margin {config.margin})\n" for category in categories)
        + f"  {len(broken)} of {len(dataset.names)} images could not be opened {[*broken.values()][:1]}")
    return path
