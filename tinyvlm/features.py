"""Ready-made image features: run a frozen network over all images once, keep the numbers, train on those.

    write_features("timm/vgg16.tv_in1k", dataset, "vgg16.safetensors")      data.py --features vgg16
    FeatureStore("vgg16.safetensors", dataset)                              train.py --features vgg16.safetensors

and the same for captions and CLIP's text tower (write_text_embeddings, TextEmbeddings).

One safetensors file holds `features`, (images, D) in float16 (or (images, N, D), a vector for each of N places), and in
its metadata `ids`, the image names as a JSON list. Any file of that form will do, whoever made it. Ours also says which
encoder made it (so that sample.py can treat new pictures alike), with which recipe, for which data set, and in `marks`
what tells its images from others of the same names.
"""
import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import torch

from .clip import CLIP
from .cnn import VGG16, ResNet50
from .config import UserError
from .draw import progress
from .image import Recipe, preprocess
from .layouts import MAX_LOST
from .pretrained import load_clip, load_pretrained
from .search import text_embeddings
from .vit import ViT
from .weights import SafetensorsError, load_safetensors, read_metadata, save_safetensors

ENCODERS = {"vgg16": "timm/vgg16.tv_in1k", "resnet50": "timm/resnet50.tv_in1k", "vit": "google/vit-base-patch16-224",
            "clip": "openai/clip-vit-base-patch32"}
SAVE_EVERY = 500        # images between two savings of an unfinished cache


class Encoder:
    """A frozen public network and its recipe. source: a short name of ENCODERS, a Hub id, or a folder.

    grid: a vector for each place instead of one for the image. Raises UserError if source is no image encoder.
    """

    def __init__(self, source, grid=False, device="cpu"):
        self.source, self.grid, self.device = ENCODERS.get(source, source), grid, device
        loaded = load_pretrained(self.source)
        self.model, self.recipe = loaded.model.to(device), loaded.recipe
        self.eyes = getattr(self.model, "vision", self.model)                     # CLIP's or a captioner's tower
        if self.recipe is None or not isinstance(self.eyes, (ViT, ResNet50, VGG16)):
            raise UserError(f"{source} holds no image encoder; use {', '.join(ENCODERS)}, or another such checkpoint")

    @torch.inference_mode()
    def __call__(self, images):
        """PIL images -> features (B, D): pooled, the class token, or CLIP's embedding. With grid: (B, N, D).

        Of a ViT the grid is its patches: the class token stands for no place.
        """
        img = torch.stack([preprocess(image, self.recipe) for image in images]).to(self.device)        # (B, 3, S, S)
        if isinstance(self.model, CLIP) and not self.grid:
            return self.model.encode_image(img)                                   # (B, D)
        if not isinstance(self.eyes, ViT):
            return self.eyes.grid(img) if self.grid else self.eyes(img)           # (B, N, D) or (B, D)
        feats, cls = self.eyes(img), int(self.eyes.config.class_token)            # (B, [1 +] N, D)
        if self.grid:
            return feats[:, cls:]                                                 # (B, N, D)
        return feats[:, 0] if cls else feats.mean(dim=1)                          # (B, D)

    def about(self, dataset):
        """The file's metadata, strings all, beside the `ids`: what read_metadata gives back as FeatureStore.meta."""
        return {"encoder": self.source, "grid": json.dumps(self.grid), "recipe": json.dumps(asdict(self.recipe)),
                "dataset": dataset.name}


def short_names(names):
    """File names without folders, as published feature files list them; with folders where two would be the same."""
    names = list(names)
    short = [Path(name).name for name in names]
    return short if len(set(short)) == len(short) else [str(name) for name in names]


def _marks(dataset):
    """{image name: what tells it from others of that name}: a file's length, a scene's caption; {}: names suffice."""
    names = short_names(dataset.names)
    if dataset.name == "shapes":
        return {name: said[0] for name, said in zip(names, dataset.captions)}
    own = dataset.name in ("folder", "capsfusion")              # the names in published sets are unique
    paths = [dataset.folder / path for path in dataset.names] if own else []
    return {name: path.stat().st_size for name, path in zip(names, paths) if path.is_file()}


def _strangers(dataset, meta):
    """The names that stood for another image when the file was made. Files from elsewhere do not tell."""
    try:
        then = dict(json.loads(meta.get("marks", "{}")))
    except (TypeError, ValueError):
        raise UserError("the feature file's `marks` cannot be read; make the file again") from None
    return {name for name, mark in _marks(dataset).items() if then.get(name, mark) != mark}


def write_features(source, dataset, path, grid=False, batch_size=32, device="cpu", say=print):
    """Encode every image of the data set into the file `path`, going on where an earlier call was cut off.

    Broken images are named and left out. Raises UserError if no image can be read, or if `path` holds what another
    encoder or recipe, or another data set, made.
    """
    path, encoder = Path(path), Encoder(source, grid, device)
    about, done = encoder.about(dataset), {}
    if path.exists():
        old = read_metadata(path)
        wrong = [key for key in about if old.get(key) != about[key]]
        if wrong:
            raise UserError(f"{path} was made with another {wrong[0]} ({str(old.get(wrong[0]))[:60]}, not "
                            f"{about[wrong[0]][:60]}); choose another file, or remove it")
        if strange := _strangers(dataset, old):
            raise UserError(f"{path} was made of other images of the same names, such as {min(strange)}; choose "
                            "another file, or remove it")
        done = dict(zip(json.loads(old["ids"]), load_safetensors(path)["features"].clone()))
        say(f"{path} already holds {len(done)} images")
    about["marks"] = json.dumps(_marks(dataset))
    names, broken = short_names(dataset.names), []
    todo = [i for i, name in enumerate(names) if name not in done]

    def save():
        ids = [name for name in names if name in done]
        save_safetensors({"features": torch.stack([done[name] for name in ids])}, path,
                         {**about, "ids": json.dumps(ids)})
    for start in range(0, len(todo), batch_size):
        good = {}
        for i in todo[start:start + batch_size]:
            try:
                good[names[i]] = dataset.open(i)
            except UserError as error:
                broken.append(str(error))
                say(f"left out: {error}")
        if good:
            done.update(zip(good, encoder(list(good.values())).half().cpu()))
        progress(min(start + batch_size, len(todo)), len(todo), "encoding images")
        if done and start // SAVE_EVERY != (start + batch_size) // SAVE_EVERY:
            save()
    if not done:
        raise UserError(f"none of the {len(names)} images of {dataset.name} could be read; nothing was written")
    if todo:
        save()
    shape = tuple(next(iter(done.values())).shape)                                # (D,) or (N, D)
    say(f"{len(done)} images as {shape} numbers each in {path}; {len(broken)} left out")


def read_features(path):
    """{image name: features, (D,) or (N, D) float16} of a feature file. Raises UserError naming its fault."""
    if not Path(path).is_file():
        raise UserError(f"there is no feature file {path}; make one with data.py --features, or name another")
    try:
        feats, ids = load_safetensors(path)["features"], json.loads(read_metadata(path)["ids"])
    except SafetensorsError as error:
        raise UserError(f"{path} is damaged ({error}); make it again") from None
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path} is no feature file: it needs a tensor `features` and, in its metadata, `ids`, the "
                        "image names as a JSON list") from None
    if not isinstance(ids, list) or feats.dim() not in (2, 3) or len(ids) != len(feats) or 0 in feats.shape:
        raise UserError(f"{path} should hold features of shape (images, D) or (images, N, D) and a name for each; its "
                        f"features are {tuple(feats.shape)}, its names {len(ids)}")
    return dict(zip(short_names(map(str, ids)), feats))


class FeatureStore:
    """Features of a data set's images from a file, in place of pixels. Raises UserError where the two do not match.

    Has what data.ImageStore has: `usable(split)`, `get(members)`, `dataset`, `in_memory`. `meta`: what the file says of
    itself; `source`, `recipe`: the encoder and how it wants its images, None where the file does not tell; `feat_dim`,
    `n_tokens`: D and N.
    """
    ready, in_memory = True, True

    def __init__(self, path, dataset, say=print):
        self.dataset, self.path = dataset, Path(path)
        by_name = read_features(path)
        self.meta = read_metadata(path)
        strange = _strangers(dataset, self.meta)
        for name in strange:                                    # not this image's: as good as missing
            by_name.pop(name, None)
        names = short_names(dataset.names)
        wanted = sorted({i for members in dataset.splits.values() for i in members})
        missing = [names[i] for i in wanted if names[i] not in by_name]
        if len(missing) > MAX_LOST * len(wanted):
            remedy = ("it was made of other images of these names: remove it and" if strange else
                      "it belongs to another data set, or was not finished:")
            raise UserError(f"{path} has no features of {len(missing)} of the {len(wanted)} images of {dataset.name} "
                            f"(such as {missing[0]}); {remedy} run data.py --features again")
        if missing:
            say(f"left out: {len(missing)} images that {path} has no features of, such as {missing[0]}")
        if self.meta.get("dataset", dataset.name) != dataset.name:
            raise UserError(f"{path} was made for {self.meta['dataset']}, not {dataset.name}; make it again")
        self.feats = {i: by_name[names[i]] for i in wanted if names[i] in by_name}
        shape = next(iter(self.feats.values())).shape                               # (D,) or (N, D)
        self.feat_dim, self.n_tokens = shape[-1], 1 if len(shape) == 1 else shape[0]
        say(f"{len(wanted)} images as {tuple(shape)} numbers each, by {self.meta.get('encoder', 'an unknown encoder')}")
        try:
            self.recipe = Recipe(**json.loads(self.meta["recipe"])) if "recipe" in self.meta else None
        except (TypeError, ValueError) as error:
            raise UserError(f"the recipe in {path} cannot be read ({error}); make the file again") from None
        self.source = self.meta.get("encoder") if self.recipe else None

    def about(self):
        """For config.json: what made these features. dim: D; source: None where sample.py cannot make them anew."""
        return {"encoder": self.meta.get("encoder", "unknown"), "source": self.source, "dim": self.feat_dim,
                "grid": self.meta.get("grid") == "true"}

    def usable(self, split):
        return [i for i in self.dataset.splits[split] if i in self.feats]

    def get(self, members):
        """float32 (B, D) or (B, N, D) of the images `members`. Raises UserError where a number is inf or nan."""
        feats = torch.stack([self.feats[i] for i in members]).float()
        if not feats.isfinite().all():                          # here and not on opening, which reads nothing yet
            bad = next(i for i, x in zip(members, feats) if not x.isfinite().all())
            raise UserError(f"{self.path} holds inf or nan for {self.dataset.names[bad]}; make it again, or leave that "
                            "image out")
        return feats


# ---- captions, likewise

def _digest(dataset):
    """A hash that stands for "these captions of these images, in this order": embeddings are known by place alone."""
    text = json.dumps([short_names(dataset.names), dataset.captions], ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()


@torch.inference_mode()
def write_text_embeddings(source, dataset, path, batch_size=256, device="cpu", say=print):
    """All captions through a frozen CLIP text tower, once: `embeddings` (captions, D) float16 in the data set's order.

    Goes on where an earlier call was cut off. Raises UserError for a file of another tower or of other captions, and
    for a CLIP that has no tokenizer.
    """
    source, path = ENCODERS.get(source, source), Path(path)
    about = {"encoder": source, "captions": _digest(dataset), "dataset": dataset.name}
    model = load_clip(source).to(device)
    if model.tokenizer is None:
        raise UserError(f"{source} came without its tokenizer; name a CLIP that has one")
    texts, done = [text for captions in dataset.captions for text in captions], []
    if path.exists():
        _check_embeddings(path, about)
        done = [load_safetensors(path)["embeddings"].clone()]
    start = len(done[0]) if done else 0
    for k in range(start, len(texts), batch_size):
        done.append(text_embeddings(model, model.tokenizer, texts[k:k + batch_size]).half().cpu())     # (b, D)
        progress(min(k + batch_size, len(texts)), len(texts), "encoding captions")
        if k // (40 * batch_size) != (k + batch_size) // (40 * batch_size) or k + batch_size >= len(texts):
            done = [torch.cat(done)]
            save_safetensors({"embeddings": done[0]}, path, about)
    say(f"{len(texts)} captions as {done[0].size(1)} numbers each in {path}")


def _check_embeddings(path, about):
    """The metadata of a file of text embeddings. Raises UserError if it is damaged or differs from `about`."""
    try:
        meta = read_metadata(path)
    except SafetensorsError as error:
        raise UserError(f"{path} is damaged ({error}); make it again") from None
    for key, other in (("captions", "of other captions, or captions in another order"),
                       ("encoder", "by another text tower")):
        if key in about and meta.get(key) != about[key]:
            raise UserError(f"{path} holds embeddings {other} ({str(meta.get(key))[:60]}); make it again with "
                            "data.py --text-embeddings, in another file")
    return meta


class TextEmbeddings:
    """The captions of a data set as ready-made embeddings: `emb` (captions, D); `rows[i]`, those of image i.

    A row is ([k], [0]): k, the caption's number in `emb`, stands where data.Texts has ids, so batches are made the same
    way; [0] is one target, which counts the caption once. Raises UserError if the file does not fit or is unfinished.
    """

    def __init__(self, path, dataset):
        if not Path(path).is_file():
            raise UserError(f"there is no file {path}; make it with data.py --text-embeddings")
        self.source = _check_embeddings(path, {"captions": _digest(dataset)})["encoder"]
        self.emb = load_safetensors(path)["embeddings"]
        if len(self.emb) != sum(map(len, dataset.captions)):
            raise UserError(f"{path} was not finished: {len(self.emb)} of {sum(map(len, dataset.captions))} captions; "
                            "run data.py --text-embeddings again, it goes on from there")
        self.dim, numbers = self.emb.size(1), iter(range(len(self.emb)))
        self.rows = [[([next(numbers)], [0]) for _ in captions] for captions in dataset.captions]
