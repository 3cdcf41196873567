"""What the four tasks share: their common options, the parts they start from, and how one is measured.

Each is a module (captioning, answering, retrieval, classifying): a dataclass of its own options, and four functions.

    prepare(config, dataset, features) -> Prepared      tokenizer, image recipe, and all texts as rows of numbers
    build(config, prepared) -> model                    from scratch, from public weights, or from another run
    loss(model, batch, setup) -> scalar                 of one micro-batch
    evaluate(model, setup, split, ..) -> scores, examples       validation, the report at the end and --eval-only

The first of the scores decides which checkpoint is kept: the lower the better if it is called "loss", else the higher.
"""
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import torch

from .batches import eval_batches
from .cnn import BatchNorm2d, ResNet50
from .config import UserError, option
from .features import open_encoder
from .generate import generate
from .image import Recipe
from .pretrained import pretrained_tokenizer
from .tokenizer import END, SPECIAL_TOKENS, BPETokenizer, WordTokenizer
from .vit import ViT, ViTConfig


@dataclass
class TextOptions:
    """Options of every task that reads or writes text."""
    text: str | None = option(None, "start from this public GPT-2 (clip: CLIP) and its tokenizer", group="text")
    tokenizer: str = option("bpe", "bpe or words: made from the captions; or that of a Hub id or folder")
    vocab_size: int = option(1024, "bpe: entries of the tokenizer", least=300)
    min_count: int = option(5, "words: how often a word must occur to be in the vocabulary", above=0)
    max_tokens: int = option(40, "longest text, in tokens; longer ones are cut, counted and reported", above=0)
    clean: str = option("none", "captions as they are, lower-cased, or words alone, too", ("none", "lower", "words"))
    lr_decoder: float = option(1.0, "the text model's rate, as a factor of --lr (new layers always take --lr)", least=0)
    unfreeze_decoder: float = option(0, "epoch from which the text model learns; before, only new layers do", least=0)


@dataclass
class Prepared:
    """What a task made of the options and the data set, before there is a model."""
    recipe: Recipe                      # how an image becomes numbers
    rows: list                          # rows[i]: image i's texts, each (idx, targets)
    tokenizer: object = None
    meta: dict = field(default_factory=dict)    # what sample.py must know, for config.json
    start: object = None                # the run, tower or public weights that `build` begins with
    features: object = None             # the features.FeatureFile whose numbers stand in place of images
    notes: list = field(default_factory=list)   # what was cut or left out, to be reported


@dataclass
class Setup:
    """All that surrounds a model while it is trained or evaluated; complete before anything uses it."""
    config: object
    device: object                      # device.Device: where and how to compute
    dataset: object
    prepared: Prepared
    store: object                       # data.ImageStore
    rows: object                        # batches.Rows


def train_mode(model):
    """Training mode; but a frozen BatchNorm stays in eval mode: its statistics are part of what it knows."""
    model.train()
    for module in model.modules():
        if isinstance(module, BatchNorm2d) and not module.weight.requires_grad:
            module.eval()


def sizes(config, *more):
    """The options by which both towers are made from scratch, and more of them, as a dict."""
    return {name: getattr(config, name) for name in ("n_layer", "n_head", "n_embd", "dropout", *more)}


def load_vision(config):
    """The vision tower to begin with: config and recipe; weights and CLIP's image head, where --vision names a run or a
    public checkpoint, and otherwise None."""
    if not config.vision:
        fresh = ViTConfig(**sizes(config, "image_size", "patch_size", "class_token", "stem"))
        return SimpleNamespace(config=fresh, recipe=Recipe(size=config.image_size), weights=None, head=None)
    loaded = open_encoder(config.vision)
    tower, head = getattr(loaded.model, "vision", loaded.model), getattr(loaded.model, "image_head", None)
    if not isinstance(tower, (ViT, ResNet50)):
        raise UserError(f"--vision {config.vision} holds no vision tower that can be trained here (a ViT or a ResNet)")
    weights = {name: value for name, value in tower.state_dict().items() if not name.startswith("head.")}
    return SimpleNamespace(config=replace(tower.config, n_class=0), recipe=loaded.recipe, weights=weights, head=head)


def make_tokenizer(config, corpus):
    """The tokenizer that the options name: trained on the texts `corpus`, or a ready one that learns END and <image>.

    A prefix model's <image> stands behind the --vocab-size other entries: 32,000 and one, of which it has id 32,000.
    """
    if config.tokenizer == "bpe":
        prefix = getattr(config, "model", "") == "prefix"
        special = sorted(SPECIAL_TOKENS, key=lambda token: token == "<image>") if prefix else SPECIAL_TOKENS
        return BPETokenizer.train(corpus, config.vocab_size + prefix, special)
    if config.tokenizer == "words":
        return WordTokenizer.train(corpus, config.min_count)
    tokenizer = pretrained_tokenizer(config.tokenizer)
    tokenizer.add_special_tokens([END, "<image>"])
    return tokenizer


@torch.no_grad()
def run_split(model, setup, split, limit, predict, loss=None, n_predict=None):
    """All batches of a split, once, in eval mode -> {image: what predict(batch) made of it}, loss, shuffled loss, n.

    The dict is in the split's order, over all processes, and may end after n_predict images. loss: mean of
    loss(model, batch), in nats per target, n of them; the shuffled loss is the same with each image in its neighbour's
    place: if it is no larger, the model ignores the image.
    """
    found, total, before, device = {}, [0.0, 0.0, 0], None, setup.device
    model.eval()
    for batch in eval_batches(setup.store, setup.rows, split, max(2, min(64, setup.config.batch_size)), limit,
                              device.rank, device.world):
        batch = batch.to(device.torch, setup.prepared.recipe)
        # a last batch of one image takes one of the batch before it
        other = batch.img.roll(1, 0) if len(batch.img) > 1 or before is None else before[-1:]
        with device.autocast():
            values = [loss(model, b).item() for b in (batch, replace(batch, img=other))] if loss else [0, 0]
            if n_predict is None or len(found) < n_predict:
                found.update(predict(batch))
        total = [a + b * batch.n_targets for a, b in zip(total, [*values, 1])]
        before = batch.img
    train_mode(model)
    (true, shuffled, n), found = device.total(*total), device.merge(found)
    if not (n if loss else found):
        raise UserError(f"the {split} split of {setup.dataset.name} has no usable image to evaluate with, see above")
    members = [i for i in setup.store.usable(split) if i in found][:n_predict]
    return {i: found[i] for i in members}, true / max(n, 1), shuffled / max(n, 1), n


def show(scores):
    """Scores as one line."""
    return ", ".join(f"{name} {value:.3f}" for name, value in scores.items() if isinstance(value, float))


def forbidden_ids(tokenizer, end, n_rows):
    """Ids that no text may hold: <image>, tags, the unknown word, and rows of the model's matrix that have no name."""
    return sorted({*tokenizer.special_ids, *range(tokenizer.vocab_size, n_rows), tokenizer.unk_id} - {end, None})


def write(model, img, prompts, setup, max_new_tokens=None, **how):
    """Texts as rows of ids, for a batch of images and the ids that each one's text begins with. how: for generate."""
    meta, tokenizer = setup.prepared.meta, setup.prepared.tokenizer
    return generate(model, img, prompts, max_new_tokens or meta["max_tokens"], eos_id=meta["end"], **how,
                    forbidden=forbidden_ids(tokenizer, meta["end"], model.config.text.vocab_size))
