"""Ready-made features: run a frozen network over all images (or captions) once, keep the numbers, train on those.

    write_features("timm/vgg16.tv_in1k", dataset, "vgg16.safetensors")      data.py --features vgg16
    FeatureFile("vgg16.safetensors", dataset)                               train.py --features vgg16.safetensors

and the same for captions and CLIP's text tower (write_text_embeddings, TextEmbeddings).

One safetensors file holds `features`, (images, D) in float16 (or (images, N, D), a vector for each of N places), and in
its metadata `ids`, the image names as a JSON list. Any file of that form will do, whoever made it. Ours also says which
encoder made it (so that sample.py can treat new pictures alike), with which recipe, for which data set.
"""
import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import torch

from .config import UserError
from .draw import progress
from .image import Recipe, open_batches, preprocess
from .layouts import MAX_LOST
from .pretrained import is_run, load_pretrained, load_run
from .weights import SafetensorsError, load_safetensors, read_metadata, save_safetensors

ENCODERS = {"vgg16": "timm/vgg16.tv_in1k", "resnet50": "timm/resnet50.tv_in1k", "vit": "google/vit-base-patch16-224",
            "clip": "openai/clip-vit-base-patch32"}
SAVE_EVERY = 16         # batches between two savings of an unfinished file


def open_encoder(source):
    """A short name of ENCODERS, a Hub id, a folder, or a run of ours -> Loaded."""
    return load_run(source) if is_run(source) else load_pretrained(ENCODERS.get(source, source))


class Encoder:
    """A frozen public network and its recipe: PIL images -> features (B, D), pooled, or CLIP's embedding."""

    def __init__(self, source, device="cpu"):
        self.source, self.device, loaded = ENCODERS.get(source, source), device, open_encoder(source)
        self.model, self.recipe = loaded.model.to(device), loaded.recipe
        self.encode = getattr(self.model, "encode_image", None) or getattr(self.model, "features", None)
        if self.recipe is None or self.encode is None:
            raise UserError(f"{source} holds no image encoder; use {', '.join(ENCODERS)}, or another such checkpoint")

    @torch.inference_mode()
    def __call__(self, images):
        img = torch.stack([preprocess(image, self.recipe) for image in images]).to(self.device)        # (B, 3, S, S)
        return self.encode(img)                                                   # (B, D)


def short_names(names):
    """File names without folders, as published feature files list them; with folders where two would be the same."""
    names = list(names)
    short = [Path(name).name for name in names]
    return short if len(set(short)) == len(short) else [str(name) for name in names]


def check_meta(path, wanted, old):
    """Raise UserError where a file that is there was made with something else than `wanted` ({name: text})."""
    wrong = [key for key in wanted if old.get(key) != wanted[key]]
    if wrong:
        raise UserError(f"{path} was made with another {wrong[0]} ({str(old.get(wrong[0]))[:60]}, not "
                        f"{wanted[wrong[0]][:60]}); remove it, or rename it")


def write_features(source, dataset, path, batch_size=32, device="cpu", say=print):
    """Encode every image of the data set into the file `path`, going on where an earlier call was cut off.

    Broken images are counted and left out. Raises UserError if no image can be read, or if `path` holds what another
    encoder or recipe, or another data set, made.
    """
    path, encoder = Path(path), Encoder(source, device)
    meta = {"encoder": encoder.source, "recipe": json.dumps(asdict(encoder.recipe)), "dataset": dataset.name,
            "images": str(len(dataset.names))}
    done, names, broken = {}, short_names(dataset.names), {}
    if path.exists():
        old = read_metadata(path)
        check_meta(path, meta, old)
        done = dict(zip(json.loads(old["ids"]), load_safetensors(path)["features"].clone()))
        say(f"{path} already holds {len(done)} images")
    todo = [i for i, name in enumerate(names) if name not in done]
    for k, part in enumerate(open_batches(todo, dataset.open, batch_size, broken, "encoding images"), 1):
        if part:
            feats = encoder([image for _, image in part]).half().cpu()            # (b, D)
            done.update((names[i], x) for (i, _), x in zip(part, feats))
        if done and (k % SAVE_EVERY == 0 or k * batch_size >= len(todo)):
            ids = [name for name in names if name in done]
            save_safetensors({"features": torch.stack([done[name] for name in ids])}, path,
                             {**meta, "ids": json.dumps(ids)})
    for reason in list(broken.values())[:10]:
        say(f"left out: {reason}")
    if not done:
        raise UserError(f"none of the {len(names)} images of {dataset.name} could be read; nothing was written")
    say(f"{len(done)} images as {len(next(iter(done.values())))} numbers each in {path}; {len(broken)} left out")


def read_features(path):
    """A feature file -> image names, features (images, D) or (images, N, D) float16, metadata. Raises UserError."""
    if not Path(path).is_file():
        raise UserError(f"there is no feature file {path}; make one with data.py --features, or name another")
    try:
        meta = read_metadata(path)
        feats, ids = load_safetensors(path)["features"], json.loads(meta["ids"])
    except SafetensorsError as error:
        raise UserError(f"{path} is damaged ({str(error)[:150]}); make it again") from None
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path} is no feature file: it needs a tensor `features` and, in its metadata, `ids`, the "
                        "image names as a JSON list") from None
    if not isinstance(ids, list) or feats.dim() not in (2, 3) or len(ids) != len(feats) or 0 in feats.shape:
        raise UserError(f"{path} should hold features of shape (images, D) or (images, N, D) and a name for each; its "
                        f"features are {tuple(feats.shape)}, its names {len(ids)}")
    finite = feats.isfinite().flatten(1).all(dim=1)                               # (images,)
    if not finite.all():
        raise UserError(f"{path} holds inf or nan for {ids[int(finite.int().argmin())]}; make it again")
    return short_names(map(str, ids)), feats, meta


class FeatureFile:
    """Features of a data set's images, in place of pixels: data (n, D) or (n, N, D) and row {image: its place there}.

    feat_dim, n_tokens: D and N; meta: for config.json, what made them; recipe: how that wants its images, or None.
    Raises UserError where the file lacks over 1% of the images.
    """

    def __init__(self, path, dataset, say=print):
        ids, self.data, meta = read_features(path)
        place, names = {name: k for k, name in enumerate(ids)}, short_names(dataset.names)
        wanted = sorted({i for members in dataset.splits.values() for i in members})
        missing = [names[i] for i in wanted if names[i] not in place]
        if len(missing) > MAX_LOST * len(wanted) or meta.get("dataset", dataset.name) != dataset.name:
            raise UserError(f"{path} is of {meta.get('dataset', 'another data set')} and lacks {len(missing)} of the "
                            f"{len(wanted)} images of {dataset.name} {missing[:1]}; run data.py --features again")
        if missing:
            say(f"left out: {len(missing)} images that {path} has no features of, such as {missing[0]}")
        self.row = {i: place[names[i]] for i in wanted if names[i] in place}
        self.feat_dim, self.n_tokens = self.data.shape[-1], 1 if self.data.dim() == 2 else self.data.shape[1]
        encoder = meta.get("encoder", "unknown")
        try:
            self.recipe = Recipe(**json.loads(meta["recipe"])) if "recipe" in meta else None
        except (TypeError, ValueError) as error:
            raise UserError(f"the recipe in {path} cannot be read ({str(error)[:100]}); make the file again") from None
        self.meta = {"encoder": encoder, "source": encoder if self.recipe else None, "dim": self.feat_dim}
        # source: None where sample.py cannot make features of new pictures
        say(f"{len(wanted)} images as {tuple(self.data.shape[1:])} numbers each, by {encoder[:100]}")


# ---- captions, likewise

def text_rows(tokenizer, texts, config):
    """Sentences -> idx (n, T) as CLIPConfig `config` reads them: framed, cut to fit, each with the token that ends it once.

    CLIP's tokenizer has a frame of its own (start, end); for any other the end alone is added.
    """
    before, after = tokenizer.frame_ids
    end = config.end_token if config.end_token is not None else after[-1] if after else config.text.vocab_size - 1
    before, after = [i for i in before if i != end], [end]      # GPT-2's end may stand in front too: read at the first one
    room = config.text.block_size - len(before) - 1
    rows = [before + tokenizer.encode_plain(text)[:room] + after for text in texts]
    T = max(map(len, rows))
    return torch.tensor([row + [0] * (T - len(row)) for row in rows])             # (n, T)


@torch.no_grad()
def text_embeddings(model, tokenizer, texts, batch_size=256, clean=str):
    """Sentences -> (n, D) of length 1, on the model's device. clean: what training did to its captions first."""
    if not texts or model.text is None:
        raise UserError("there is no text to embed; give at least one label or sentence" if not texts else "this model "
                        "learned from ready-made text embeddings and has no text tower; use the one that made them")
    model.eval()
    idx = text_rows(tokenizer, [clean(text) for text in texts], model.config).to(model.logit_scale.device)    # (n, T)
    return torch.cat([model.encode_text(part) for part in idx.split(batch_size)])                             # (n, D)


def _digest(dataset):
    """A hash that stands for "these captions of these images, in this order": embeddings are known by place alone."""
    text = json.dumps([short_names(dataset.names), dataset.captions], ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()


@torch.inference_mode()
def write_text_embeddings(source, dataset, path, device="cpu", batch_size=256, say=print):
    """All captions through a frozen CLIP text tower, once: `embeddings` (captions, D) float16 in the data set's order.

    A frozen tower gives the same numbers every epoch: computing them once is the same training, many times faster.
    """
    path, loaded = Path(path), open_encoder(source)
    model, texts = loaded.model.to(device), [text for captions in dataset.captions for text in captions]
    meta = {"encoder": ENCODERS.get(source, source), "captions": _digest(dataset), "dataset": dataset.name}
    if getattr(model, "text_head", None) is None or loaded.tokenizer is None:
        raise UserError(f"{source} is no CLIP with a text tower and its tokenizer; name one that has both")
    if path.exists():
        check_meta(path, meta, read_metadata(path))
        say(f"{path} is there already")
        return
    parts = []
    for k in range(0, len(texts), batch_size):
        parts.append(text_embeddings(model, loaded.tokenizer, texts[k:k + batch_size]).half().cpu())    # (b, D)
        progress(min(k + batch_size, len(texts)), len(texts), "encoding captions")
    save_safetensors({"embeddings": torch.cat(parts)}, path, meta)
    say(f"{len(texts)} captions as {parts[0].size(1)} numbers each in {path}")


class TextEmbeddings:
    """The captions of a data set as ready-made embeddings: data (captions, D); rows[i], those of image i.

    A row is ([k], [0]): k, the caption's number in data, stands where others have ids, so batches are made the same
    way; [0] is one target, which counts the caption once. Raises UserError if the file does not fit the data set.
    """

    def __init__(self, path, dataset):
        if not Path(path).is_file():
            raise UserError(f"there is no file {path}; make it with data.py --text-embeddings")
        try:
            meta, self.data = read_metadata(path), load_safetensors(path)["embeddings"]
        except (SafetensorsError, KeyError) as error:
            raise UserError(f"{path} is no file of text embeddings ({str(error)[:100]}); make it again") from None
        check_meta(path, {"captions": _digest(dataset)}, meta)
        self.source, self.dim, numbers = meta.get("encoder"), self.data.size(1), iter(range(len(self.data)))
        self.rows = [[([next(numbers)], [0]) for _ in captions] for captions in dataset.captions]
