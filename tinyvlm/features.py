"""Ready-made features: run a frozen network over all images (or captions) once, keep the numbers, train on those.

    write_features("timm/vgg16.tv_in1k", dataset, "vgg16.safetensors")      data.py --features vgg16
    FeatureFile("vgg16.safetensors", dataset)                               train.py --features vgg16.safetensors

and the same for captions and CLIP's text tower (write_text_embeddings, TextEmbeddings).

One safetensors file holds `features`, (n, D) in float16 (or (n, N, D), a vector for each of N places), and in its
metadata `ids`, the image names as a JSON list (of captions: their numbers). Any file of that form will do; ours
also says which encoder made it (so that sample.py can treat new pictures alike), and how it wants images.
"""
import hashlib
import json
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from .captions import clean_caption
from .config import UserError
from .files import check_writable
from .image import Recipe, open_batches, preprocess
from .layouts import MAX_LOST
from .pretrained import is_run, load_pretrained, load_run
from .weights import load_safetensors, read_metadata, save_safetensors

ENCODERS = {"vgg16": "timm/vgg16.tv_in1k", "resnet50": "timm/resnet50.tv_in1k", "vit": "google/vit-base-patch16-224",
            "clip": "openai/clip-vit-base-patch32"}


# ---- encoders

def open_encoder(source):
    """A short name of ENCODERS, a Hub id, a folder, or a run of ours -> Loaded."""
    return load_run(source) if is_run(source) else load_pretrained(ENCODERS.get(source, source))


class Encoder:
    """A frozen network and its recipe: PIL images -> features (B, D), pooled, or CLIP's embedding."""

    def __init__(self, source, device="cpu"):
        self.source, self.device, self.loaded = ENCODERS.get(source, source), device, open_encoder(source)
        self.model, self.recipe = self.loaded.model.to(device), self.loaded.recipe
        self.encode = getattr(self.model, "encode_image", None) or getattr(self.model, "features", None)
        if self.encode is None or getattr(self.model, "vision", self.model) is None:
            raise UserError(f"{source} holds no image encoder; use {', '.join(ENCODERS)}, or another such checkpoint")

    @torch.inference_mode()
    def __call__(self, images):
        img = torch.stack([preprocess(image, self.recipe) for image in images]).to(self.device)        # (B, 3, S, S)
        return self.encode(img)                                                   # (B, D)


def text_rows(tokenizer, texts, config):
    """Sentences -> idx (n, T) as CLIPConfig `config` reads them: framed, cut to fit, each with its end token.

    CLIP's tokenizer has a frame of its own (start, end); for any other the end alone is added.
    """
    before, after = tokenizer.frame_ids
    end = config.end_token if config.end_token is not None else after[-1] if after else config.text.vocab_size - 1
    before = [i for i in before if i != end]                    # GPT-2's frame has the end in front, too
    room = config.text.block_size - len(before) - 1
    rows = [before + tokenizer.encode_plain(text)[:room] + [end] for text in texts]
    T = max(map(len, rows))
    return torch.tensor([row + [0] * (T - len(row)) for row in rows])             # (n, T)


@torch.no_grad()
def text_embeddings(model, tokenizer, texts, batch_size=256, clean=str):
    """Sentences -> (n, D) of length 1, on the model's device. clean: what training did to its captions first."""
    model.eval()
    idx = text_rows(tokenizer, [clean(text) for text in texts], model.config).to(model.logit_scale.device)    # (n, T)
    return torch.cat([model.encode_text(part) for part in idx.split(batch_size)])                             # (n, D)


# ---- files

def short_names(names):
    """File names without folders, as published feature files list them; with folders where two would be the same."""
    short = [Path(name).name for name in names]
    return short if len(set(short)) == len(short) else [str(name) for name in names]


def encode_rows(path, ids, open_one, encode, meta, batch_size, say):
    """Encode what open_one(k) gives for each of the ids, into the file `path` -> the ids that could be read, and their
    rows in float16. What is broken is counted and left out."""
    rows, broken = {}, {}
    check_writable(Path(path).parent)
    for part in open_batches(range(len(ids)), open_one, batch_size, broken, "encoding"):
        rows.update(zip([k for k, _ in part], encode([value for _, value in part]).half().cpu() if part else ()))
    for reason in list(broken.values())[:10]:
        say(f"left out (1 of {len(broken)}): {reason}")
    if not rows:
        raise UserError(f"none of the {len(ids)} can be read, so there is nothing for {path}")
    kept, feats = [ids[k] for k in rows], torch.stack([*rows.values()])           # (n, ..)
    save_safetensors({"features": feats}, path, {**meta, "ids": json.dumps(kept)})
    say(f"{path} now holds {len(kept)} of {len(ids)}")
    return kept, feats


def write_features(source, dataset, path, batch_size=32, device="cpu", say=print):
    """Every image of a data set through a frozen image encoder, once."""
    encoder = Encoder(source, device)
    meta = {"encoder": encoder.source, "recipe": json.dumps(asdict(encoder.recipe)), "dataset": dataset.name}
    encode_rows(path, short_names(dataset.names), dataset.open, encoder, meta, batch_size, say)


def write_text_embeddings(source, dataset, path, device="cpu", say=print):
    """All captions through a frozen CLIP text tower, once.

    A frozen tower gives the same numbers every epoch: computing them once is the same training, many times faster.
    """
    loaded, texts = open_encoder(source), [text for captions in dataset.captions for text in captions]
    model, clean = loaded.model.to(device), partial(clean_caption, how=loaded.config["clean"])
    if getattr(model, "text_head", None) is None or loaded.tokenizer is None:
        raise UserError(f"{source} is no CLIP with a text tower and its tokenizer; name one that has both")
    meta = {"encoder": ENCODERS.get(source, source), "captions": digest(dataset.captions), "dataset": dataset.name}
    encode_rows(path, [*map(str, range(len(texts)))], texts.__getitem__,
                lambda part: text_embeddings(model, loaded.tokenizer, part, clean=clean), meta, 256, say)


def digest(data):
    """A hash of what a file was made of, as of all captions: an embedding does not tell which words it stands for."""
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()


def read_features(path):
    """A feature file -> ids, features (n, D) or (n, N, D) float16, metadata. Raises UserError."""
    try:
        meta, feats = read_metadata(path), load_safetensors(path)["features"]
        ids, recipe = short_names(json.loads(meta["ids"])), json.loads(meta.get("recipe", "null"))
        recipe = recipe and Recipe(**recipe)
        if feats.dim() not in (2, 3) or len(ids) != len(feats) or 0 in feats.shape or not feats.isfinite().all():
            raise ValueError(f"{len(ids)} names, and features of shape {tuple(feats.shape)}, perhaps not all finite")
    except (KeyError, TypeError, ValueError) as error:          # a SafetensorsError is a ValueError, too
        raise UserError(f"{path} is no feature file, or damaged: it should hold finite `features` (n, D) or (n, N, D), "
                        f"and in its metadata n `ids`, names as a JSON list ({error!r:.80}); make it again") from None
    return ids, feats, {**meta, "recipe": recipe}


class FeatureFile:
    """Features of a data set's images, in place of pixels: data (n, D) or (n, N, D) and row {image: its place there}.

    feat_dim, n_tokens: D and N; meta: for config.json, what made them; recipe: how that wants its images, or None.
    Raises UserError where the file lacks over 1% of the images.
    """

    def __init__(self, path, dataset, say=print):
        ids, self.data, meta = read_features(path)
        place, names, of = {name: k for k, name in enumerate(ids)}, short_names(dataset.names), meta.get("dataset")
        wanted = {i for members in dataset.splits.values() for i in members}
        self.row = {i: place[names[i]] for i in sorted(wanted) if names[i] in place}
        encoder, self.recipe, lost = meta.get("encoder", "unknown"), meta["recipe"], len(wanted) - len(self.row)
        about = f"{path}, by {encoder:.100}, lacks {lost} of the {len(wanted)} images of {dataset.name}"
        if lost > MAX_LOST * len(wanted) or of not in (None, dataset.name):
            first = names[min(wanted - self.row.keys(), default=0)]
            raise UserError(f"{about}, such as {first:.60}, and was made of {of or 'others'}; run data.py --features "
                            "again")
        say(about)
        self.feat_dim, self.n_tokens = self.data.shape[-1], 1 if self.data.dim() == 2 else self.data.shape[1]
        # source: None where sample.py cannot make features of new pictures
        self.meta = {"encoder": encoder, "source": encoder if self.recipe else None}


class TextEmbeddings:
    """The captions of a data set as ready-made embeddings: data (captions, D); rows[i], those of image i.

    A row is ([k], [0]): k, the caption's number in data, stands where others have ids, so batches are made the same
    way; [0] is one target, which counts the caption once. Raises UserError if the file does not fit the data set.
    """

    def __init__(self, path, dataset):
        ids, self.data, meta = read_features(path)
        if meta.get("captions") != digest(dataset.captions):
            raise UserError(f"{path} is of other captions; make it again with data.py --text-embeddings")
        self.source, self.dim, numbers = meta["encoder"], self.data.size(1), iter(range(len(ids)))
        self.rows = [[([next(numbers)], [0]) for _ in captions] for captions in dataset.captions]
