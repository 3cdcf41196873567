"""--task clip: system 4, pictures and sentences in one space; and what that is good for afterwards.

    prepare, build, loss, evaluate  the task: InfoNCE training (clip.py) and Recall@K
    label_embeddings, classify      zero-shot labels (Radford et al. 2021, section 3.1): which of these phrases fits?
    embed_folder, search            every picture becomes D numbers, once; an answer is then one small product

Left out: an index for millions of pictures (a plain product over 100,000 takes milliseconds).
"""
import re
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from . import metrics
from .captions import clean_caption
from .clip import CLIP, CLIPConfig, chance, gather, info_nce, similarities
from .config import UserError, option
from .features import TextEmbeddings, digest, encode_rows, read_features, text_embeddings, text_rows
from .files import list_images
from .gpt import GPTConfig
from .image import load_image, preprocess
from .pretrained import load_clip
from .task import Prepared, TextOptions, load_vision, make_tokenizer, run_split, sizes
from .tokenizer import END


@dataclass
class Options(TextOptions):
    """What only --task clip has."""
    features: str | None = option(None, "learn from ready-made image features in this file (data.py --features)",
                                  group="contrastive training")
    text_embeddings: str | None = option(None, "the same for the captions (data.py --text-embeddings): a frozen text "
                                               "tower, run once")
    head: str = option("linear", "from image features to the common space; mlp: two layers, GELU", ("linear", "mlp"))
    bag: bool = option(False, "no transformer for text, but the mean of the words' vectors: better from few captions")
    n_joint: int = option(512, "numbers in the common space (a public text tower brings its own)", above=0)


# ---- the task

def prepare(config, dataset, features=None, run=None):
    """-> Prepared: a caption is what the text tower reads, or the number of a ready-made embedding.

    start: what `build` begins with: the towers vision and reader (a CLIP), ready text embeddings, the CLIPConfig.
    """
    if config.bag and (config.text or config.text_embeddings):
        raise UserError("--bag is a text tower of its own: drop it, or --text and --text-embeddings")
    vision = None if run else load_vision(config)
    reader = load_clip(config.text) if config.text and not run else None
    ready = TextEmbeddings(config.text_embeddings, dataset) if config.text_embeddings else None
    if config.vision and features or reader and ready:
        raise UserError("a tower has made --features or --text-embeddings: drop --vision or --text, or the file")
    if features and features.data.dim() != 2:
        raise UserError(f"--task clip takes one vector for each image, and {config.features} has {features.n_tokens}")
    notes = [] if ready else drop_empty(dataset, config.clean)
    source, texts = run or reader, [[clean_caption(t, config.clean) for t in captions] for captions in dataset.captions]
    tokenizer = None if ready else source.tokenizer if source else make_tokenizer(
        config, [text for i in dataset.splits["train"] for text in texts[i]])
    if tokenizer is None and not ready:
        raise UserError(f"--text {config.text} came without its tokenizer; name a checkpoint that has one")
    if run:
        model_config = run.model.config
    else:
        text = reader.config if reader else CLIPConfig(text=None, n_joint=ready.dim) if ready else CLIPConfig(
            text=GPTConfig(block_size=config.max_tokens + 1, vocab_size=tokenizer.vocab_size, **sizes(config)),
            n_joint=config.n_joint, end_token=tokenizer.token_to_id(END), bag=config.bag)
        model_config = replace(text, vision=None if features else vision.config, head=config.head,
                               dropout=config.dropout, feat_dim=features and features.feat_dim)
    rows = ready.rows if ready else [[(row, [0]) for row in text_rows(tokenizer, captions, model_config).tolist()]
                                     if captions else [] for captions in texts]
    meta = {"clean": config.clean, "text_embeddings": ready and ready.source}
    start = SimpleNamespace(vision=vision, reader=reader, ready=ready, config=model_config)
    return Prepared((run or vision).recipe, rows, tokenizer, meta, start, features, notes)


def drop_empty(dataset, clean):
    """Captions of which cleaning leaves nothing are all the same: they go, and images without others. Returns notes."""
    kept = [[text for text in captions if clean_caption(text, clean)] for captions in dataset.captions]
    n = sum(map(len, dataset.captions)) - sum(map(len, kept))
    dataset.captions, dataset.splits = kept, {split: [i for i in members if kept[i]]
                                              for split, members in dataset.splits.items()}
    return [f"{n} captions hold nothing to learn after --clean {clean} and were left out"] if n else []


def build(config, prepared):
    """A CLIP whose towers are public where --vision and --text name some, and fresh elsewhere."""
    start, model = prepared.start, CLIP(prepared.start.config)
    if start.vision.weights:
        model.vision.load_state_dict(start.vision.weights)
        theirs, ours = start.vision.head, model.image_head      # a CLIP's tower comes with its way into the space
        if str(theirs) == str(ours):                            # .. if that has the same layers and sizes
            ours.load_state_dict(theirs.state_dict())
    if start.reader:
        theirs = start.reader.state_dict().items()
        model.load_state_dict({name: x for name, x in theirs if name.startswith(("text", "logit_scale"))}, strict=False)
    return model


def texts_of(batch, setup):
    """What encode_text takes: idx (B, T), or ready-made embeddings (B, D) in their place."""
    ready = setup.prepared.start.ready
    return batch.idx if ready is None else ready.data[batch.idx[:, 0].cpu()].float().to(setup.device.torch)


def loss(model, batch, setup):
    """InfoNCE of a whole batch, over all processes: every pair is the others' wrong answer."""
    image_emb, text_emb, scale = model(batch.img, texts_of(batch, setup))         # (B, D) both
    return info_nce(gather(image_emb), gather(text_emb), scale)


def evaluate(model, setup, split, limit=None, **_):
    """-> scores, examples: Recall@K both ways over a split, mean of the six first; the best caption for each image.

    Of drawn scenes with one caption only the first is searched: no sentence could tell them apart.
    """
    dataset, rows = setup.dataset, setup.prepared.rows

    def predict(batch):
        """-> {image: its embedding (D,) and those of its captions (k, D)}"""
        kept = batch.targets[:, 0] == 0                                           # rows that stand for a caption
        text_emb = model.encode_text(texts_of(batch, setup))[kept].cpu()          # (all their captions, D)
        image_emb = model.encode_image(batch.img).cpu()                           # (b, D)
        return dict(zip(batch.members, zip(image_emb, text_emb.split([len(rows[i]) for i in batch.members]))))
    distinct = dataset.name == "shapes"
    found = run_split(model, setup, split, None if distinct else limit, predict)[0]
    members = sorted({dataset.captions[i][0]: i for i in reversed(found)}.values())[:limit] if distinct else [*found]
    if len(members) < 2:
        raise UserError(f"the {split} split has {len(members)} image to search among; recall needs two at least")
    img = torch.stack([found[i][0] for i in members])                             # (n, D)
    txt = torch.cat([found[i][1] for i in members])                               # (m, D)
    first = torch.stack([found[i][1][0] for i in members])                        # (n, D)
    owner = torch.tensor([k for k, i in enumerate(members) for _ in rows[i]])     # (m,)
    recall, shuffled = (metrics.recall_at_k(emb, txt, owner) for emb in (img, img.roll(1, 0)))
    scores = {"mean recall": mean_recall(recall), "shuffled mean recall": mean_recall(shuffled),
              **batch_losses(model, img, first, setup.config.batch_size)}
    scores |= {f"{way.replace('_', ' ')} {name}": value for way, part in recall.items() for name, value in part.items()}
    captions = [text for i in members for text in dataset.captions[i]]
    best = (img @ txt.t()).argmax(dim=1).tolist()                                 # (n,)
    return scores, [{"image": i, "prediction": captions[k], "truth": dataset.captions[i][0],
                     "similarity": (img[n] @ first[:12].t()).tolist() if n < 12 else None}
                    for n, (i, k) in enumerate(zip(members, best))]


def mean_recall(recall):
    """The mean of R@1, R@5 and R@10, both ways."""
    return sum(way[f"R@{k}"] for way in recall.values() for k in (1, 5, 10)) / 6


def batch_losses(model, image_emb, text_emb, batch_size):
    """(n, D) both -> the loss as in training, the mean over batches of one size, beside chance and shuffled images."""
    size, scale = min(batch_size, len(image_emb)), model.logit_scale.detach().cpu()
    n = len(image_emb) // size
    img, txt = (emb[:n * size].view(n, size, -1) for emb in (image_emb, text_emb))          # (n, size, D) both
    mean, shuffled = (sum(info_nce(a, b, scale).item() for a, b in zip(emb, txt)) / n for emb in (img, img.roll(1, 1)))
    return {"loss": mean, "chance loss": chance(size), "shuffled loss": shuffled}


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

    The file `cache` keeps them, with a key: what they depend on, that is model_key, which stands for the model's
    weights, and the images' names, sizes and times. Another key, and all are made anew. Broken ones are left out.
    """
    if model.vision is None:
        raise UserError("this model learned from ready-made features and has no vision tower: use another model")
    folder, names = Path(folder), sorted(list_images(folder))
    if not names:
        raise UserError(f"the folder {folder} holds no images; check the path")
    stats = [(name, (folder / name).stat()) for name in names]
    key = digest([model_key, [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]])
    try:
        numbers, emb, meta = read_features(cache)
    except UserError:                                           # there is none yet, or a damaged one
        meta = {}
    if meta.get("key") != key:
        model.to(device).eval()
        numbers, emb = encode_rows(cache, [*map(str, range(len(names)))],
                                   lambda k: preprocess(load_image(folder / names[k]), recipe),
                                   lambda images: model.encode_image(torch.stack(images).to(device)),
                                   {"key": key}, batch_size, say)
    return [names[int(k)] for k in numbers], F.normalize(emb.float(), dim=-1)     # (n), (n, D)
