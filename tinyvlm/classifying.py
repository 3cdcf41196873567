"""--task classify: the first stage of system 5. A vision tower learns labels, several categories at once.

Before a vision tower meets text, it learns to tell colours, things and places apart, from labels that people or CLIP
gave (pseudo-labels: "Self-training with Noisy Student", Xie et al. 2020, arXiv:1911.04252). One linear head per
category; the heads are thrown away afterwards, the tower stays: train.py --vision RUN.
"""
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from .captions import IMAGE, clean_caption, read_table, readable
from .cnn import ResNetConfig
from .config import UserError, option
from .features import Encoder
from .files import ImageFinder, check_writable, read_json, write_csv
from .gpt import IGNORE
from .image import open_batches
from .retrieval import classify, label_embeddings
from .task import Prepared, load_vision, run_split
from .vit import ViTConfig, build_vision


@dataclass
class Options:
    """What only --task classify has."""
    labels: str | None = option(None, "the file of labels (data.py --label); shapes have their own", group="labels")


# ---- the model

@dataclass
class ClassifierConfig:
    """The tower's sizes, and the labels of every category: {"color": ["red", ..], "shape": [..]}; label 0 is "red"."""
    vision: ViTConfig | ResNetConfig
    labels: dict


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
    """-> Prepared. An image has one row: its label's number in each category as idx, and one target, to count it.

    A label that the training split lacks has no number: nothing could learn it. Images without a label are left out.
    """
    start, notes, rows = run or load_vision(config), [], []
    given = read_labels(config.labels, dataset, notes) if config.labels else getattr(dataset, "labels", None)
    if given is None:
        raise UserError(f"{dataset.name} has no labels of its own; make some with data.py --label, then give --labels")
    pairs = sorted({pair for i in dataset.splits["train"] for pair in given.get(i, {}).items()})
    labels = {category: [name for k, name in pairs if k == category] for category, _ in pairs}
    for category in [category for category, names in labels.items() if len(names) < 2]:
        notes.append(f"all labels of {category} are {labels.pop(category)[0]}: it teaches nothing and is left out")
    labels = run.model.config.labels if run else labels
    for known in (given.get(i, {}) for i in range(len(dataset.names))):
        row = [names.index(known[c]) if known.get(c) in names else IGNORE for c, names in labels.items()]
        rows.append([(row, [0] + [IGNORE] * (len(row) - 1))] if {*row} - {IGNORE} else [])
    for split, members in dataset.splits.items():
        dataset.splits[split] = kept = [i for i in members if rows[i]]
        if not kept:
            raise UserError(f"no image of the {split} split has a label that is learned, of a category with two or "
                            "more; label more, or lower --margin")
        if len(kept) < len(members):
            notes.append(f"{len(members) - len(kept)} images of the {split} split have no label and are left out")
    return Prepared(start.recipe, rows, meta={"labels": labels}, start=start, notes=notes)


def read_labels(path, dataset, notes):
    """A table image,category,label[,..] (data.py --label) -> {image number: {category: label}}."""
    path, number, rows, labels = Path(path), {name: i for i, name in enumerate(dataset.names)}, {}, {}
    with readable(path):
        for cells in read_table(path, (IMAGE, ("category",), ("label",))):
            name, category, label = (" ".join(cell.split()) for cell in cells)
            if category and label and rows.setdefault((name, category), label) != label:
                raise UserError(f"{path} gives {name!r:.60} two labels of {category!r:.40}: {label!r:.40} and "
                                f"{rows[name, category]!r:.40}; keep one")
    files = ImageFinder(dataset.folder or ".", dataset.names).find({name for name, _ in rows})
    for (name, category), label in rows.items():
        if name in files:
            labels.setdefault(number[files[name]], {})[category] = label
    if absent := [name for name, _ in rows if name not in files]:
        notes.append(f"{len(absent)} of {len(rows)} labels of {path} are of images not in {dataset.name}, such as "
                     f"{absent[0]!r:.60}")
    if not labels:
        why = f"labels no image of {dataset.name} ({len(rows)} labels, of others); name its own file"
        raise UserError(f"{path} {why if rows else 'holds no label; make it again with a lower --margin'}")
    return labels


def build(config, prepared):
    """A tower, public or fresh, and a new head for each category."""
    start = prepared.start
    model = Classifier(ClassifierConfig(start.config, prepared.meta["labels"]))
    if start.weights:
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
        if known.any():
            for name, column in ((category, guess[:, k]), (f"shuffled {category}", guess[:, k].roll(1))):
                scores[name] = (column == truth[:, k])[known].float().mean().item()

    def text(row):
        return ", ".join(names[n] for n, names in zip(row, labels.values()) if n != IGNORE)
    return scores, [{"image": i, "prediction": text(g), "truth": text(t)}
                    for i, g, t in zip(guesses, guess.tolist(), truth.tolist())]


# ---- pseudo-labels

def read_categories(path):
    """A label file, {"category": ["phrase", ..], ..} -> the same. Raises UserError where it is not of that form."""
    categories = read_json(path)
    named = [*categories.values()]
    if not named or not all(isinstance(names, list) and len(names) > 1 for names in named) or not all(
            isinstance(name, str) and name.strip() for names in named for name in names):
        raise UserError(f'{path} should be like {{"color": ["red", "blue"]}}, two phrases or more in each category')
    return categories


@torch.inference_mode()
def write_pseudo_labels(config, dataset, path, say=print):
    """Each image's best label per category, by CLIP, with its probability, into the csv `path`.

    A label that is hardly likelier than the next best (--margin) teaches more noise than it is worth: it is left empty.
    config: data.PrepareConfig.
    """
    categories, encoder = read_categories(config.label), Encoder(config.labeler, config.device)
    check_writable(path.parent)
    model, tokenizer, clean = encoder.model, encoder.loaded.tokenizer, encoder.loaded.config.get("clean", "none")
    if getattr(model, "text_head", None) is None or tokenizer is None:
        raise UserError(f"--labeler {config.labeler} is no CLIP with both an image tower and a text tower")
    label_emb = [label_embeddings(model, tokenizer, names, clean=lambda text: clean_caption(text, clean))
                 for names in categories.values()]                                # categories x (n_labels, D)
    rows, broken, unsure = [], {}, 0
    for part in open_batches(range(len(dataset.names)), dataset.open, config.batch_size, broken, "labelling"):
        emb = encoder([image for _, image in part]) if part else None             # (b, D)
        for (category, names), their_emb in zip(categories.items(), label_emb if part else ()):
            best, order = classify(emb, their_emb, model.logit_scale).topk(2)     # (b, 2) both
            for (i, _), (p, q), (k, _) in zip(part, best.tolist(), order.tolist()):
                sure = p - q >= config.margin
                unsure += not sure
                rows.append([dataset.names[i], category, names[k] if sure else "", f"{p:.4f}", f"{p - q:.4f}"])
    write_csv(path, ["image", "category", "label", "probability", "margin"], rows)
    say(f"{len(rows) - unsure} labels, {unsure} too unsure (margin {config.margin}); {len(broken)} images could not be "
        f"opened {[*broken.values()][:1]}")
