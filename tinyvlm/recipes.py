"""How a published folder says what an image must become, read as its owner means it (and written back, for export.py).

Hugging Face's preprocessor_config.json, or the `image_processor` in processor_config.json (transformers 5), and timm's
`pretrained_cfg` in config.json become a Recipe. A setting that a Recipe cannot express is refused by its name.
"""
import math
import re
from dataclasses import replace

from .config import UserError
from .files import read_json
from .image import RECIPES, Recipe

FILTERS = {2: "bilinear", 3: "bicubic"}                         # Pillow's numbers
HALF, CLIP, IMAGENET = ({"mean": RECIPES[name].mean, "std": RECIPES[name].std} for name in ("vit", "clip", "deit"))
SUPPORTED = {"do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_pad": False,
             "do_flip_channel_order": False}
# What the classes of transformers mean where a file is silent; "size" alone is a square for the first two.
PROCESSORS = {
    "ViT": {"size": 224, "default_to_square": True, "resample": 2, **HALF},
    "DeiT": {"size": 256, "default_to_square": True, "do_center_crop": True, "crop_size": 224, "resample": 3, **HALF},
    "CLIP": {"size": 224, "do_center_crop": True, "crop_size": 224, "resample": 3, **CLIP},
    "ConvNext": {"size": 384, "crop_pct": 224 / 256, "resample": 3, **HALF}}
TIMM = {"crop_pct": 0.875, "crop_mode": "center", "interpolation": "bicubic", **IMAGENET}


def _side(word, size):
    """224, {"shortest_edge": 224} or {"height": 224, "width": 224} -> (224, the names it stood under)."""
    sides = {name: side for name, side in size.items() if side is not None} if isinstance(size, dict) else {"": size}
    side = next(iter(sides.values()), None)
    if set(sides.values()) != {side} or type(side) is not int or set(sides) not in (
            {""}, {"shortest_edge"}, {"height", "width"}):
        raise ValueError(f"{word} = {size!r}")
    return side, set(sides)


def from_transformers(p, usual):
    """preprocessor_config.json -> Recipe. usual: the class ("ViT") where the file names none.

    {"size": {"height": 256, "width": 256}, "do_center_crop": true, "crop_size": 224}   both sides 256, then the centre
    {"size": {"shortest_edge": 256}, "do_center_crop": true, "crop_size": 224}          the short side, then the centre
    {"size": 224}                                   in old files: the class tells which of the two is meant
    """
    kind = str(p.get("image_processor_type") or p.get("feature_extractor_type") or usual)
    kind = re.sub("(ImageProcessor|FeatureExtractor)(Fast|Pil)?$", "", kind)
    if kind not in PROCESSORS:
        raise ValueError(f"image_processor_type = {p.get('image_processor_type')!r}")
    p = PROCESSORS[kind] | {word: value for word, value in p.items() if value is not None}
    for word, value in SUPPORTED.items():
        if abs(p.get(word, value) - value) > 1e-6:
            raise ValueError(f"{word} = {p[word]!r} where {value!r} is supported")
    side, names = _side("size", p["size"])
    squash = "height" in names or names == {""} and p.get("default_to_square", False)
    crop = _side("crop_size", p.get("crop_size"))[0] if p.get("do_center_crop") else None
    if kind == "ConvNext" and crop is None:                     # it crops by itself, below 384, and squashes above
        crop, side, squash = side, int(side / p["crop_pct"]) if side < 384 else side, side >= 384
    if crop is None and not squash:
        raise ValueError(f"do_center_crop = {p.get('do_center_crop')!r} after a size of the shortest edge")
    mean, std = ((p.get(f"image_{word}", p[word]) for word in ("mean", "std")) if p.get("do_normalize", True) else
                 ((0.0,) * 3, (1.0,) * 3))
    return Recipe(crop or side, "squash" if squash else "crop", side if crop not in (None, side) else None,
                  FILTERS.get(p["resample"], p["resample"]), mean, std)


def from_timm(p, size=None):
    """pretrained_cfg -> Recipe. crop_pct 0.9: 224 pixels are cut from 248; crop_mode "squash": from a square of 248."""
    p = TIMM | {word: value for word, value in p.items() if value is not None}
    side, other = p.get("input_size", (3, size or 224, size or 224))[1:]
    if side != other or p["crop_mode"] not in ("center", "squash"):
        raise ValueError(f"input_size = {p.get('input_size')!r}, crop_mode = {p['crop_mode']!r}")
    resize = math.floor(side / p["crop_pct"])
    return Recipe(side, "squash" if p["crop_mode"] == "squash" else "crop", resize if resize != side else None,
                  p["interpolation"], p["mean"], p["std"])


def _settings(ck, family):
    """The places that may tell how images are prepared, (file, settings), the first that does counts."""
    def read(name):
        return read_json(path) if (path := ck.find(name)) else {}
    yield "processor_config.json", read("processor_config.json").get("image_processor")
    yield "preprocessor_config.json", read("preprocessor_config.json")
    if family != "clip":
        yield "config.json", ck.config.get("pretrained_cfg")
    elif p := read("open_clip_config.json").get("preprocess_cfg"):      # timm's own is for its bare vision tower
        mode, size = p.get("resize_mode") or "shortest", p.get("size")
        size = {"input_size": (3, *size) if isinstance(size, list) else (3, size, size)} if size else {}
        yield "open_clip_config.json", {**CLIP, **p, **size, "crop_pct": 1,
                                        "crop_mode": {"shortest": "center"}.get(mode, mode)}


def read_recipe(ck, family, size=None):
    """The Recipe of a published folder: as its files say, else as its family was trained. size: pixels of the model.

    ck: a Checkpoint of pretrained.py. UserError tells the file and the setting that is not followed.
    """
    timm = {"pos_embed", "conv1.weight"} & ck.tensors.keys()
    resnet = "torchvision" if timm else "resnet50"
    usual = {"clip": "clip", "vgg16": "torchvision", "resnet50": resnet}.get(family, "vit")
    if usual == "vit" and timm:
        usual = "deit" if "deit" in str(ck.config.get("architecture")) else "vit-augreg"
    name, p = next(((name, p) for name, p in _settings(ck, family) if p), ("", None))
    try:
        if name.endswith("processor_config.json"):
            recipe = from_transformers(p, {"clip": "CLIP", "resnet50": "ConvNext"}.get(family, "ViT"))
        elif p:
            recipe = from_timm(p, size)
        else:                                                   # the habit, at the size of the model
            recipe, own = RECIPES[usual], size or RECIPES[usual].size
            recipe = replace(recipe, size=own, resize=recipe.resize and recipe.resize * own // recipe.size)
        if size and recipe.size != size:
            raise ValueError(f"it makes images of {recipe.size} pixels, the model takes {size}")
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as fault:
        raise UserError(f"{ck.source}: {name} prepares images as tinyvlm cannot: {fault!s:.150}; mend it, or name "
                        "another model") from None
    return recipe


def to_transformers(recipe):
    """Recipe -> preprocessor_config.json: CLIP's class crops, ViT's only squashes."""
    if recipe.mode == "adaptive":
        raise UserError("adaptive padding of images is unknown to transformers; export with no recipe")
    square, side = {"height": recipe.size, "width": recipe.size}, recipe.resize or recipe.size
    how = {"image_processor_type": "ViTImageProcessor", "size": square}
    if recipe.mode == "crop" or recipe.resize:
        size = {"shortest_edge": side} if recipe.mode == "crop" else {"height": side, "width": side}
        how = {"image_processor_type": "CLIPImageProcessor", "size": size, "do_center_crop": True, "crop_size": square,
               "do_convert_rgb": True}
    return {**how, "do_resize": True, "resample": {"bilinear": 2, "bicubic": 3}[recipe.interpolation],
            "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": list(recipe.mean),
            "image_std": list(recipe.std)}
