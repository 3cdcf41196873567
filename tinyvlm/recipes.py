"""How a published folder tells what an image must become, read as its owner means it (and written back, for export.py).

Hugging Face's preprocessor_config.json, or the `image_processor` in processor_config.json (transformers 5), and timm's
`pretrained_cfg` in config.json become a Recipe. What it cannot express is refused by its name, in a ValueError.
"""
import math
import re
from dataclasses import replace

from .config import UserError
from .image import RECIPES, Recipe

FILTERS = {2: "bilinear", 3: "bicubic"}                         # Pillow's numbers
HALF, CLIP, IMAGENET = ({"mean": RECIPES[name].mean, "std": RECIPES[name].std} for name in ("vit", "clip", "deit"))
FOLLOWED = {"do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "do_pad": False,
            "do_flip_channel_order": False, "crop_mode": "center"}              # other values are refused
CLASSES = {                                                     # what each means where a file is silent
    "ViT": {"size": 224, "resample": 2, **HALF},
    "CLIP": {"size": 224, "do_center_crop": True, "crop_size": 224, "resample": 3, **CLIP},
    "ConvNext": {"size": 224, "crop_pct": 224 / 256, "resample": 3, **HALF},
    "timm": {"crop_pct": 0.875, "interpolation": "bicubic", **IMAGENET}}
USUAL = {"clip": ("CLIP", "clip"), "resnet50": ("ConvNext", "resnet50"), "vgg16": ("", "torchvision")}


def from_transformers(p, kind):
    """preprocessor_config.json, filled up by its class -> Recipe.

    {"size": {"height": 256, "width": 256}, "do_center_crop": true, "crop_size": 224}   both sides 256, then the centre
    {"size": {"shortest_edge": 256}, "do_center_crop": true, "crop_size": 224}          the short side, then the centre
    {"size": 224}                                   in old files: a square for ViT, else the short side
    """
    sizes = [p["size"], p["crop_size"] if p.get("do_center_crop") else None]
    word = "height" if kind == "ViT" else "shortest_edge"
    sizes = [size if isinstance(size, dict) else dict(zip(("height", "width"), size)) if isinstance(size, list) else
             {word: size} for size in sizes]
    (side, *odd), (crop, *odder) = (set(size.values()) for size in sizes)                   # odd: not square
    squash = "height" in sizes[0]
    if kind == "ConvNext" and side < 384:                       # it crops by itself
        crop, side = side, int(side / p["crop_pct"])
    crop = crop or (side if squash else None)
    if crop is None or odd or odder or "longest_edge" in sizes[0] or kind == "ConvNext" and squash:
        raise ValueError(f"size = {p['size']!r}, do_center_crop = {p.get('do_center_crop')!r} of class {kind}")
    how = FILTERS.get(p["resample"], f"of resample = {p['resample']!r}")
    return Recipe(crop, "squash" if squash else "crop", None if side == crop else side, how,
                  p.get("image_mean", p["mean"]), p.get("image_std", p["std"]))


def from_timm(p):
    """pretrained_cfg -> Recipe. crop_pct 0.9: 224 pixels are cut from an image whose short side is 248."""
    side, width = p["input_size"][1:]
    if side != width:
        raise ValueError(f"input_size = {p['input_size']!r}")
    resize = math.floor(side / p["crop_pct"])
    return Recipe(side, "crop", resize if resize != side else None, p["interpolation"], p["mean"], p["std"])


def read_recipe(ck, family, size=None):
    """The Recipe of a published folder (a Checkpoint of pretrained.py). size: pixels of the model, if it has any.

    Where no file tells, it is the family's habit; timm's ViTs have none in common.
    """
    usual, habit = USUAL.get(family, ("ViT", "vit"))
    p = ck.read("processor_config.json").get("image_processor") or ck.read("preprocessor_config.json")
    kind = re.sub("(ImageProcessor|FeatureExtractor)(Fast|Pil)?$", "", str(
        p.get("image_processor_type") or p.get("feature_extractor_type") or usual))
    if not p and family != "clip":                              # there it is for the bare vision tower
        kind, p = "timm", ck.config.get("pretrained_cfg")
    if p:
        if kind not in CLASSES:
            raise ValueError(f"image_processor_type = {kind!r:.60} where {', '.join(CLASSES)} are supported")
        p = CLASSES[kind] | {word: value for word, value in p.items() if value is not None}
        for word in [word for word, value in FOLLOWED.items() if p.get(word, value) != value]:
            raise ValueError(f"{word} = {p[word]!r} where {FOLLOWED[word]!r} is supported")
        recipe = from_timm(p) if kind == "timm" else from_transformers(p, kind)
    elif "pos_embed" in ck.tensors:
        raise ValueError("no pretrained_cfg in config.json tells how images are prepared")
    else:
        recipe = RECIPES[habit]
        recipe = replace(recipe, size=size or 224, resize=recipe.resize and recipe.resize * (size or 224) // 224)
    if size and recipe.size != size:
        raise ValueError(f"images become {recipe.size} pixels wide, and the model takes {size}")
    return recipe


def to_transformers(recipe):
    """Recipe -> preprocessor_config.json of CLIP's class, which resizes, then crops."""
    if recipe.mode == "adaptive":
        raise UserError("adaptive padding of images is unknown to transformers; export with no recipe")
    side, crop = recipe.resize or recipe.size, {"height": recipe.size, "width": recipe.size}
    return {"image_processor_type": "CLIPImageProcessor", "do_resize": True, "do_center_crop": True, "crop_size": crop,
            "size": {"shortest_edge": side} if recipe.mode == "crop" else {"height": side, "width": side},
            "resample": {"bilinear": 2, "bicubic": 3}[recipe.interpolation], "do_rescale": True,
            "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": recipe.mean, "image_std": recipe.std}
