"""--task clip: system 4, pictures and sentences in one space; and what that is good for afterwards.

    prepare, build, loss, evaluate  the task: InfoNCE training (clip.py) and Recall@K
    label_embeddings, classify      zero-shot labels (Radford et al. 2021, section 3.1): which of these phrases fits?
    embed_folder, search            every picture becomes D numbers, once; an answer is then one small product

Left out: an index for millions of pictures (a plain product over 100,000 takes milliseconds).
"""
import json
import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from . import metrics
from .captions import clean_caption
from .clip import CLIP, CLIPConfig, chance, gather, in_batch_accuracy, info_nce, similarities
from .config import UserError, option
from .features import TextEmbeddings, text_embeddings, text_rows
from .files import IMAGE_TYPES, list_images
from .gpt import GPTConfig
from .image import Recipe, load_image, normalise, open_batches, to_uint8
from .pretrained import load_clip
from .task import Prepared, TextOptions, fresh_vision, load_vision, make_tokenizer, tower_sizes, train_mode
from .tokenizer import END
from .weights import load_safetensors, read_metadata, save_safetensors


@dataclass
class Options(TextOptions):
    """What only --task clip has."""
    features: str | None = option(None, "learn from ready-made image features in this file (data.py --features)",
                                  group="contrastive training")
    text_embeddings: str | None = option(None, "the file of text embeddings made by data.py --text-embeddings: a frozen "
                                               "text tower, run once")
    head: str = option("linear", "from the image's features to the common space; mlp: two layers with GELU between",
                       ("linear", "mlp"))
    n_joint: int = option(512, "numbers in the common space (a public text tower brings its own)", above=0)


# ---- the task

def prepare(config, dataset, features=None, run=None):
    """-> Prepared: a caption is what the text tower reads, or the number of a ready-made embedding.

    start: the towers that `build` begins with, vision and reader (a CLIP), ready text embeddings, and the CLIPConfig.
    """
    vision = load_vision(config.vision) if config.vision and not run else None
    reader = load_clip(config.text) if config.text and not run else None
    ready = TextEmbeddings(config.text_embeddings, dataset) if config.text_embeddings else None
    if features and features.data.dim() == 3:
        raise UserError(f"{config.features} holds a grid of vectors for each image, and a CLIP takes one; make another")
    if vision and features or reader and ready:
        raise UserError("a tower has made --features or --text-embeddings: drop --vision or --text, or the file")
    texts = [[clean_caption(text, config.clean) for text in captions] for captions in dataset.captions]
    tokenizer = run.tokenizer if run else reader.tokenizer if reader else None if ready else \
        make_tokenizer(config, [text for i in dataset.splits["train"] for text in texts[i]])
    if tokenizer is None and not ready:
        raise UserError(f"--text {config.text} came without its tokenizer; name a checkpoint that has one")
    if run:
        sizes = run.model.config
    else:
        text = reader.config.text if reader else None if ready else GPTConfig(
            block_size=config.max_tokens + 1, vocab_size=tokenizer.vocab_size, **tower_sizes(config))
        sizes = CLIPConfig(
            vision=None if features else vision.config if vision else fresh_vision(config), text=text, head=config.head,
            n_joint=reader.config.n_joint if reader else ready.dim if ready else config.n_joint, dropout=config.dropout,
            end_token=reader.config.end_token if reader else tokenizer.token_to_id(END) if tokenizer else None,
            feat_dim=features and features.feat_dim)
    rows = ready.rows if ready else [
        [(row, [0]) for row in text_rows(tokenizer, captions, sizes).tolist()] if captions else [] for captions in texts]
    recipe = run.recipe if run else vision.recipe if vision else Recipe(size=config.image_size)
    return Prepared(recipe, rows, tokenizer, {"clean": "none" if ready else config.clean, "text_embeddings": ready and ready.source},
                    SimpleNamespace(vision=vision, reader=reader, ready=ready, sizes=sizes))


def build(config, prepared, features=None):
    """A CLIP whose towers are public where --vision and --text name some, and fresh elsewhere."""
    start, model = prepared.start, CLIP(prepared.start.sizes)
    if start.vision:
        model.vision.load_state_dict(start.vision.weights)
        head = start.vision.head                                # a CLIP's tower comes with its way into the space
        if head is not None and config.head == "linear" and head.shape == model.image_head.weight.shape:
            model.image_head.weight.data.copy_(head)
    if start.reader:
        model.text.load_state_dict(start.reader.text.state_dict())
        model.text_head.load_state_dict(start.reader.text_head.state_dict())
        model.logit_scale.data.copy_(start.reader.logit_scale.data)
    return model


def texts_of(batch, setup):
    """What encode_text takes: idx (B, T), or ready-made embeddings (B, D) in their place."""
    ready = setup.prepared.start.ready
    return batch.idx if ready is None else ready.data[batch.idx[:, 0].cpu()].float().to(setup.device.torch)


def loss(model, batch, setup):
    """InfoNCE of a whole batch, over all processes: every pair is the others' wrong answer."""
    image_emb, text_emb, scale = model(batch.img, texts_of(batch, setup))         # (B, D) both
    return info_nce(gather(image_emb), gather(text_emb), scale)


@torch.no_grad()
def evaluate(model, setup, split, limit=None, n_predict=None, **_):
    """-> scores, examples: Recall@K both ways over a split, mean of the six first; the best caption for each image.

    Of drawn scenes with one caption only the first is searched: no sentence could tell them apart.
    """
    device, dataset, rows, image_emb, text_emb = setup.device, setup.dataset, setup.prepared.rows, {}, {}
    model.eval()
    for batch in setup.each_batch(split, None if dataset.name == "shapes" else limit):
        with device.autocast():
            img = model.encode_image(batch.img).cpu()                             # (b, D)
            kept = (batch.targets[:, 0] == 0).cpu()                               # rows that stand for a caption
            txt = model.encode_text(texts_of(batch, setup)).cpu()[kept]           # (all their captions, D)
        image_emb.update(zip(batch.members, img))
        text_emb.update(zip(batch.members, txt.split([len(rows[i]) for i in batch.members])))
    train_mode(model)
    image_emb, text_emb = device.merge(image_emb), device.merge(text_emb)
    members = [i for i in setup.store.usable(split) if i in image_emb]
    if dataset.name == "shapes":
        members = sorted({dataset.captions[i][0]: i for i in reversed(members)}.values())
    members = members[:limit]
    img, txt = torch.stack([image_emb[i] for i in members]), torch.cat([text_emb[i] for i in members])     # (n, D), (m, D)
    owner = torch.tensor([k for k, i in enumerate(members) for _ in rows[i]])     # (m,)
    recall, shuffled = (metrics.recall_at_k(emb, txt, owner) for emb in (img, img.roll(1, 0)))
    first = torch.stack([text_emb[i][0] for i in members])                        # (n, D)
    scores = {"mean recall": mean_recall(recall), **{f"{way.replace('_', ' ')} {name}": float(value) for way, part in
                                                     recall.items() for name, value in part.items()},
              **batch_losses(model, img, first, setup.config.batch_size), "shuffled mean recall": mean_recall(shuffled)}
    captions = [text for i in members for text in dataset.captions[i]]
    best = (img @ txt.t()).argmax(dim=1).tolist()                                 # (n,)
    return scores, [{"image": i, "prediction": captions[k], "truth": dataset.captions[i][0], "text": captions[k],
                     "similarity": (img[n] @ first[:12].t()).tolist() if n < 12 else None}
                    for n, (i, k) in enumerate(zip(members, best))]


def mean_recall(recall):
    """The mean of R@1, R@5 and R@10, both ways."""
    return sum(way[f"R@{k}"] for way in recall.values() for k in (1, 5, 10)) / 6


def batch_losses(model, image_emb, text_emb, batch_size):
    """As in training: the loss of batches of one size, beside chance, with shuffled images, and the share right."""
    size, scale, n = min(batch_size, len(image_emb)), model.logit_scale.detach().cpu(), max(1, len(image_emb) // batch_size)
    total = {"loss": 0.0, "chance loss": chance(size) * n, "shuffled loss": 0.0, "right in a batch": 0.0}
    for img, txt in list(zip(image_emb.split(size), text_emb.split(size)))[:n]:
        total["loss"] += info_nce(img, txt, scale).item()
        total["shuffled loss"] += info_nce(img.roll(1, 0), txt, scale).item()
        total["right in a batch"] += in_batch_accuracy(img @ txt.t())
    return {name: value / n for name, value in total.items()}


# ---- labels in words

# bare words are rare in captions: a label is put into all of these
TEMPLATES = ("a photo of a {}.", "a picture that shows a {}.", "a {} seen from close by.", "here you can see a {}.")
COUNTED = r"(?i)(an?|the|one|two|three|four|five|some|several|many|\d+)\s"


def fill(template, label):
    """("a photo of a {}.", "dog") -> "a photo of a dog."; "two dogs" and "the sea" lose the template's article."""
    label = label.strip()
    return (re.sub(r"\ban? (?=\{\})", "", template) if re.match(COUNTED, label) else template).replace("{}", label)


def label_embeddings(model, tokenizer, labels, clean=str):
    """Labels in words -> (n, D): the mean of each label's sentences, brought back to length 1."""
    emb = text_embeddings(model, tokenizer, [fill(t, label) for label in labels for t in TEMPLATES], clean=clean)
    return F.normalize(emb.view(len(labels), len(TEMPLATES), -1).mean(dim=1), dim=-1)         # (n, D)


def classify(image_emb, label_emb, log_scale):
    """(B, D), (n, D), the model's logit_scale -> probabilities (B, n), as if exactly one of the labels were right."""
    return similarities(image_emb, label_emb, log_scale).softmax(dim=-1)


# ---- search in a folder

def search(image_emb, text_emb, k=10):
    """(n, D), (D,) -> the cosines and the image numbers of the k best, (k,) each, best first."""
    return (text_emb @ image_emb.t()).topk(min(k, len(image_emb)), dim=-1)


@torch.no_grad()
def embed_folder(model, recipe, folder, cache, model_key, batch_size=32, device="cpu", say=print):
    """All images in and below a folder -> their names (n) within it, sorted, and embeddings (n, D) of length 1.

    Only images that are new or changed (by size and time) since the last call are opened: the file `cache` keeps the
    others, in float16, as long as `model_key`, which stands for the model's weights, is the same; else it is made anew.
    Broken images are counted and left out. Raises UserError: no image, none readable, no vision tower.
    """
    if model.vision is None:
        raise UserError("this model learned from ready-made features and has no vision tower; use the one that made them")
    folder, cache, known, broken = Path(folder), Path(cache), {}, {}
    stamps = {name: (p.stat().st_size, p.stat().st_mtime_ns) for name in sorted(list_images(folder))
              if (p := folder / name).is_file()}                # not a link that leads nowhere
    if not stamps:
        raise UserError(f"the folder {folder} holds no images ({', '.join(IMAGE_TYPES)}); check the path")
    try:
        meta = read_metadata(cache) if cache.exists() else {}
        if meta.get("model") == model_key:
            old = zip(json.loads(meta["images"]), load_safetensors(cache)["emb"].clone())
            known = {name: row for (name, *stamp), row in old if stamps.get(name) == tuple(stamp)}
    except (KeyError, TypeError, ValueError):                   # SafetensorsError is a ValueError, too
        say(f"{cache} is damaged and is made anew")
    todo = [name for name in stamps if name not in known]
    model.to(device).eval()
    for part in open_batches(todo, lambda name: to_uint8(load_image(folder / name), recipe), batch_size, broken,
                             "embedding images"):
        if part:
            img = normalise(torch.stack([pixels for _, pixels in part]).to(device), recipe)   # (b, 3, S, S)
            known.update(zip([name for name, _ in part], model.encode_image(img).half().cpu()))     # (b, D)
    for reason in broken.values():
        say(f"left out: {reason}")
    if not known:
        raise UserError(f"none of the {len(stamps)} images in {folder} can be read; the lines above say why")
    names = sorted(known)
    emb = torch.stack([known[name] for name in names])                            # (n, D)
    if todo or not cache.exists():
        save_safetensors({"emb": emb}, cache, {"images": json.dumps([[name, *stamps[name]] for name in names]),
                                               "model": model_key})
    return names, F.normalize(emb.float(), dim=-1)
