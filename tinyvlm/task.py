"""What the four tasks share: their common options, the parts they start from, and how one is measured.

A task is a module (captioning, answering, retrieval, classifying) with a dataclass of its own options and four functions:

    prepare(config, dataset, features) -> Prepared      tokenizer, image recipe, and all texts as rows of numbers
    build(config, prepared, features) -> model          from scratch, or from public weights, or from another run
    loss(model, batch, setup) -> scalar                 of one micro-batch
    evaluate(model, setup, split, ..) -> scores, examples
                                                        the first score decides which checkpoint is kept: the lower the
                                                        better if it is called "loss", else the higher the better

train.py calls them in this order; validation during training, the report at its end, and --eval-only are one `evaluate`.
"""
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import torch

from .cnn import BatchNorm2d
from .config import UserError, option
from .generate import generate
from .image import Recipe
from .pretrained import is_run, load_pretrained, load_run, pretrained_tokenizer
from .tokenizer import END, SPECIAL_TOKENS, BPETokenizer, WordTokenizer
from .vit import ViTConfig


@dataclass
class TextOptions:
    """Options of every task that reads or writes text."""
    text: str | None = option(None, "start from this public GPT-2 (clip: CLIP), with its tokenizer; else from scratch",
                              group="text")
    tokenizer: str = option("bpe", "bpe or words: made from the captions; or a Hub id or folder, such as "
                                   "google-bert/bert-base-uncased")
    vocab_size: int = option(1024, "bpe: entries of the tokenizer", least=300)
    min_count: int = option(5, "words: how often a word must occur to be in the vocabulary", above=0)
    max_tokens: int = option(40, "longest text, in tokens; longer ones are cut, counted and reported", above=0)
    clean: str = option("none", "captions: as they are, lower-cased, or lower-cased words only",
                        ("none", "lower", "words"))
    lr_decoder: float = option(1.0, "the text model's rate, as a factor of --lr (new layers always take --lr)", least=0)
    unfreeze_decoder: float = option(0, "epoch from which the text model learns; before, only the new layers do", least=0)


@dataclass
class Prepared:
    """What a task made of the options and the data set, before there is a model."""
    recipe: Recipe                      # how an image becomes numbers
    rows: list                          # rows[i]: image i's texts, each (idx, targets)
    tokenizer: object = None
    meta: dict = field(default_factory=dict)    # what sample.py must know, for config.json
    start: object = None                # the run, tower or public weights that `build` begins with
    notes: list = field(default_factory=list)   # what was cut or left out, to be reported


@dataclass
class Setup:
    """All that surrounds a model while it is trained or evaluated; complete before anything uses it."""
    config: object
    device: object                      # train.Device: where and how to compute
    dataset: object
    prepared: Prepared
    store: object                       # data.ImageStore
    rows: object                        # batches.Rows
    eval_batches: Callable              # (split, limit) -> this process's batches

    def each_batch(self, split, limit=None):
        """This process's batches of a split, on the device. Raises UserError if there are none at all."""
        n = 0
        for batch in self.eval_batches(split, limit):
            n += 1
            yield batch.to(self.device.torch, self.prepared.recipe)
        if not n and self.device.world == 1:
            raise UserError(f"the {split} split of {self.dataset.name} has no usable image to evaluate with")


def train_mode(model):
    """Training mode; but a frozen BatchNorm stays in eval mode: its statistics are part of what it knows."""
    model.train()
    for module in model.modules():
        if isinstance(module, BatchNorm2d) and not module.weight.requires_grad:
            module.eval()


def load_vision(source):
    """The vision tower of a run or of a public checkpoint: its config, weights and recipe, and CLIP's image head.

    Raises UserError where there is no tower that can be trained here.
    """
    loaded = load_run(source) if is_run(source) else load_pretrained(source)
    tower, head = getattr(loaded.model, "vision", loaded.model), getattr(loaded.model, "image_head", None)
    if not hasattr(tower, "features") or not hasattr(tower.config, "n_class") or hasattr(tower.config, "convs"):
        raise UserError(f"--vision {source} holds no vision tower that can be trained here (a ViT or a ResNet)")
    weights = {name: value for name, value in tower.state_dict().items() if not name.startswith("head.")}
    return SimpleNamespace(config=replace(tower.config, n_class=0), weights=weights, recipe=loaded.recipe,
                           head=head.weight.data if isinstance(head, torch.nn.Linear) else None)


def tower_sizes(config):
    """The sizes that both towers take from the options."""
    return dict(n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd, dropout=config.dropout)


def fresh_vision(config):
    """A vision tower from scratch, as the options say: ViTConfig."""
    return ViTConfig(image_size=config.image_size, patch_size=config.patch_size, class_token=config.class_token,
                     stem=config.stem, **tower_sizes(config))


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
    tokenizer = pretrained_tokenizer(config.tokenizer)          # BERT's WordPiece, or any other
    tokenizer.add_special_tokens([END, "<image>"])
    return tokenizer


@torch.no_grad()
def mean_losses(model, setup, split, limit, loss, visit=None):
    """Mean loss (nats per target) over a split, the same with shuffled images, and how many targets there were.

    If the second is no larger than the first, the model ignores the image. visit(batch): called once for each batch,
    so that whatever else is measured needs no second decoding.
    """
    true = shuffled = n = 0.0
    before = None
    model.eval()
    for batch in setup.each_batch(split, limit):
        # every image gives its place to its neighbour; a last batch of one image takes one of the batch before it
        other = batch.img.roll(1, 0) if len(batch.img) > 1 or before is None else before[-1:]
        with setup.device.autocast():
            true += loss(model, batch).item() * batch.n_targets
            shuffled += loss(model, replace(batch, img=other)).item() * batch.n_targets
        n, before = n + batch.n_targets, batch.img
        if visit:
            visit(batch)
    train_mode(model)
    true, shuffled, n = setup.device.total(true, shuffled, n)
    if not n:
        raise UserError(f"no text of the {split} split has a token to predict; raise --max-tokens, or see the notes above")
    return true / n, shuffled / n, n


def show(scores):
    """Scores as one line."""
    return ", ".join(f"{name} {value:.3f}" for name, value in scores.items() if isinstance(value, float))


def forbidden_ids(tokenizer, end, n_rows):
    """Ids a model must never produce: <image>, tags, the unknown word, and rows of its matrix (n_rows) without a name."""
    return sorted({*tokenizer.special_ids, *range(tokenizer.vocab_size, n_rows), tokenizer.unk_id} - {end, None})


def write(model, img, prompts, setup, max_new_tokens=None, **how):
    """Texts as rows of ids: img, ready for the model, and for each image the ids its text begins with. how: for generate."""
    meta = setup.prepared.meta
    with setup.device.autocast():
        return generate(model, img, prompts, max_new_tokens or meta["max_tokens"], eos_id=meta["end"], forbidden=
                        forbidden_ids(setup.prepared.tokenizer, meta["end"], model.config.text.vocab_size), **how)
