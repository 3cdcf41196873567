"""What a trained CLIP is good for: labels in words that nobody trained on, and a folder of photographs asked in words.

    label_embeddings, classify      zero-shot labels (Radford et al. 2021, section 3.1): which of these phrases fits?
    embed_folder, search            every picture becomes D numbers, once; an answer is then one small product
    similarity_picture              the table of a batch, to look at

Left out: an index for millions of pictures (a plain product over 100,000 takes milliseconds).
"""
import hashlib
import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from .clip import similarities
from .config import UserError
from .draw import INK, PAPER, progress, wrap
from .image import load_image, normalise, to_uint8
from .layouts import IMAGE_TYPES, list_images
from .weights import load_safetensors, read_metadata, save_safetensors

# bare words are rare in captions: a label is put into all of these
TEMPLATES = ("a photo of a {}.", "a picture that shows a {}.", "a {} seen from close by.", "here you can see a {}.")
COUNTED = r"(?i)(an?|the|one|two|three|four|five|some|several|many|\d+)\s"


def fill(template, label):
    """("a photo of a {}.", "dog") -> "a photo of a dog."; "two dogs" and "the sea" lose the template's article."""
    label = label.strip()
    if "{}" not in template or not label:
        raise UserError(f"template {template!r}, label {label!r}: a template needs {{}} for the label, a label a word")
    return (re.sub(r"\ban? (?=\{\})", "", template) if re.match(COUNTED, label) else template).replace("{}", label)


def text_rows(tokenizer, texts, config):
    """Sentences -> idx (n, T) as CLIPConfig `config` reads them: cut to fit, each with the token that ends it, once.

    CLIP's tokenizer frames a text itself. For any other the end is added: end_token, or else the largest id there is.
    It may not stand in front too, as GPT-2 has it: a sentence is read at the first one.
    """
    most = config.text.block_size
    end = config.text.vocab_size - 1 if config.end_token is None else config.end_token
    rows = [tokenizer.encode(text, special=False, max_length=most) for text in texts]
    rows = [row if row[-1:] == [end] else row[:most - 1] + [end] for row in rows]
    T = max(map(len, rows))
    return torch.tensor([row + [0] * (T - len(row)) for row in rows])             # (n, T)


@torch.no_grad()
def text_embeddings(model, tokenizer, texts, batch_size=256, clean=str):
    """Sentences -> (n, D) of length 1, on the model's device. clean: what training did to its captions first."""
    if not texts or model.text is None:
        raise UserError("there is no text to embed; give at least one label or sentence" if not texts else "this model "
                        "learned from ready-made text embeddings and cannot read; use the text tower that made them")
    model.eval()
    idx = text_rows(tokenizer, [clean(text) for text in texts], model.config).to(model.logit_scale.device)    # (n, T)
    return torch.cat([model.encode_text(part) for part in idx.split(batch_size)])                             # (n, D)


def label_embeddings(model, tokenizer, labels, templates=TEMPLATES, clean=str):
    """Labels in words -> (n, D): the mean of each label's sentences, brought back to length 1."""
    emb = text_embeddings(model, tokenizer, [fill(t, label) for label in labels for t in templates], clean=clean)
    return F.normalize(emb.view(len(labels), len(templates), -1).mean(dim=1), dim=-1)         # (n, D)


def classify(image_emb, label_emb, log_scale):
    """(B, D), (n, D), the model's logit_scale -> probabilities (B, n), as if exactly one of the labels were right."""
    return similarities(image_emb, label_emb, log_scale).softmax(dim=-1)


def search(image_emb, text_emb, k=10):
    """(n, D), (Q, D) or (D,) -> the cosines and the image numbers of the k best, (Q, k) or (k,) each, best first."""
    return (text_emb @ image_emb.t()).topk(min(k, len(image_emb)), dim=-1)


def fingerprint(model, recipe):
    """sha256 of what decides an image's embedding: the recipe, the head, and 64 numbers of each weight before it (no
    training leaves those as they were)."""
    digest = hashlib.sha256(json.dumps(asdict(recipe)).encode())
    for name, x in model.state_dict().items():
        if name.startswith(("vision.", "image_head.")):
            x = x.flatten()[:64] if name.startswith("vision.") else x
            digest.update(name.encode() + x.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def read_cache(path, model_name):
    """{image name: ((bytes, time), embedding (D,))} of what embed_folder saved."""
    metadata = read_metadata(path)
    if "images" not in metadata or "model" not in metadata:
        raise UserError(f"{path} is no cache of image embeddings; name another file")
    if metadata["model"] != model_name:
        raise UserError(f"{path} is of another model or image preparation; have it rebuilt, or name another file")
    rows = load_safetensors(path)["emb"].clone()                # a copy: the file is about to be replaced
    return {name: (tuple(stamp), row) for (name, *stamp), row in zip(json.loads(metadata["images"]), rows)}


@torch.no_grad()
def embed_folder(model, recipe, folder, cache_path, batch_size=32, device="cpu", say=print, rebuild=False,
                 save_every=2000):
    """All images in and below a folder -> their names (n) within it, sorted, and embeddings (n, D) of length 1.

    Only images that are new or changed (by size and time) since the last call are opened. The cache keeps the others,
    in float16; it is saved on the way too, so that a stopped call goes on. Broken images are named, counted, left out.
    Raises UserError: no image, none readable, no vision tower, a cache of another model (unless `rebuild`).
    """
    if model.vision is None:
        raise UserError("this model learned from ready-made features and cannot see; use the tower that made them")
    folder, path, model_name = Path(folder), Path(cache_path), fingerprint(model, recipe)
    stamps = {name: (p.stat().st_size, p.stat().st_mtime_ns) for name in sorted(list_images(folder))
              if (p := folder / name).is_file()}                # not a link that leads nowhere
    if not stamps:
        raise UserError(f"the folder {folder} holds no images ({', '.join(IMAGE_TYPES)}); check the path")
    try:
        old = read_cache(path, model_name) if path.exists() and not rebuild else {}
    except (KeyError, TypeError, ValueError) as error:          # SafetensorsError is a ValueError, too
        say(f"{path} is damaged ({error}) and is made anew")
        old = {}
    known = {name: old[name] for name, stamp in stamps.items() if name in old and old[name][0] == stamp}
    todo, saved = [name for name in stamps if name not in known], len(known)

    def read(name):
        try:
            return to_uint8(load_image(folder / name), recipe)                    # (3, S, S)
        except UserError as error:
            say(f"left out: {error}")

    def save():
        save_safetensors({"emb": torch.stack([row for _, row in known.values()])}, path, {
            "images": json.dumps([[name, *stamp] for name, (stamp, _) in known.items()]), "model": model_name})
    model.to(device).eval()
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(todo), batch_size):
            part = todo[start:start + batch_size]
            good = [(name, x) for name, x in zip(part, pool.map(read, part)) if x is not None]
            if good:
                img = normalise(torch.stack([x for _, x in good]).to(device), recipe)         # (b, 3, S, S)
                emb = model.encode_image(img).half().cpu()                        # (b, D)
                known |= {name: (stamps[name], row) for (name, _), row in zip(good, emb)}
            if len(known) >= saved + save_every:
                save()
                saved = len(known)
            progress(start + len(part), len(todo), "embedding images")
    if len(known) < len(stamps):
        say(f"{len(stamps) - len(known)} of {len(stamps)} images are broken and left out")
    if not known:
        raise UserError(f"none of the {len(stamps)} images in {folder} can be read; the lines above say why")
    if len(known) != saved or known.keys() != old.keys():
        save()                                                  # something is new, or something is gone
    names = sorted(known)
    return names, F.normalize(torch.stack([known[name][1] for name in names]).float(), dim=-1)


def similarity_picture(sim, labels, side=44):
    """sim (n, n), picture i against sentence j, and the sentences -> a PIL image of the table, darker where higher."""
    font, left, top, n, sim = ImageFont.load_default(12), 200, 24, len(sim), sim.detach().float().cpu()
    share = (sim - sim.min()) / (sim.max() - sim.min()).clamp(min=1e-9)           # (n, n) in 0..1
    heat = Image.fromarray((255 - 200 * share).byte().numpy()).resize((n * side, n * side), Image.Resampling.NEAREST)
    image = Image.new("RGB", (left + n * side, top + n * side), PAPER)
    image.paste(heat, (left, top))
    pen = ImageDraw.Draw(image)
    for i in range(n):
        x, y = left + (i + 0.5) * side, top + (i + 0.5) * side
        pen.text((x, top / 2), str(i + 1), INK, font, anchor="mm")
        pen.text((4, y - 16), "\n".join(wrap(f"{i + 1}  {labels[i]}", font, left - 10)[:2]), INK, font)
        for j in range(n):
            ink = PAPER if share[i, j] > 0.5 else INK
            pen.text((left + (j + 0.5) * side, y), f"{sim[i, j]:.2f}", ink, font, anchor="mm")
    return image
