"""From a picture file to the tensor a model expects, and back. All that a model demands of its input is a Recipe.

Every public checkpoint was trained on images prepared in one particular way; feeding it others gives plausible but
worse answers and no error. So the preparation is data (`Recipe`), stored with each run and each loaded checkpoint, and
there is one function that carries it out. Resizing is Pillow's, antialiased: what torchvision does to PIL images.

    file --load_image--> PIL, RGB --to_uint8--> (3, H, W) bytes --normalise--> (3, H, W) floats
                                                 ^ cached, batched, augmented on the device
"""
import contextlib
import functools
import io
import math
import warnings
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError

from .config import UserError

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
MAX_PIXELS = 100_000_000                    # a decoded image of 300 MB; larger "photos" are bombs or maps
MAX_ASPECT = 50                             # a strip of 40000x1, its short side blown up to 224, would be gigabytes


@dataclass
class Recipe:
    """How an image becomes (3, size, size) numbers.

    mode: "squash" resizes both sides to `size`, whatever the shape; "crop" resizes the short side to `resize` and cuts
    the centre; "adaptive" pads long, thin images (short/long < 0.6) with black to a square and centre-crops the others.
    mean, std: per channel (RGB), of values in 0..1.
    """
    size: int = 224
    mode: str = "crop"
    resize: int | None = None               # crop: the short side before cutting; None: `size`
    interpolation: str = "bicubic"          # or "bilinear"
    mean: tuple = HALF[0]
    std: tuple = HALF[1]

    def __post_init__(self):
        self.mean, self.std = tuple(self.mean), tuple(self.std)                   # json knows lists only


# What public checkpoints were trained with; and, last, a recipe for images from the web.
RECIPES = {
    "vit": Recipe(mode="squash", interpolation="bilinear"),                               # google/vit-*, nlpconnect
    "vit-augreg": Recipe(resize=248),                                                     # timm vit_*: 224 / 0.9
    "deit": Recipe(resize=248, mean=IMAGENET[0], std=IMAGENET[1]),                        # timm deit_*
    "clip": Recipe(mean=CLIP[0], std=CLIP[1]),
    "resnet50": Recipe(resize=256, mean=IMAGENET[0], std=IMAGENET[1]),                    # microsoft: 224 / 0.875
    "resnet50-a1": Recipe(resize=235, mean=IMAGENET[0], std=IMAGENET[1]),                 # timm a1: 224 / 0.95
    "torchvision": Recipe(resize=256, interpolation="bilinear", mean=IMAGENET[0], std=IMAGENET[1]),   # tv weights, VGG
    "adaptive": Recipe(size=128, mode="adaptive"),                                        # web images
}


def load_image(source, name=None, formats=None):
    """Open a path or bytes as an upright RGB PIL image. formats: only these of Pillow's, for images of strangers.

    Grey, palette, CMYK and 16-bit images become 8-bit RGB, transparency is laid on white, of an animation the first
    frame is taken, and the camera's orientation note (EXIF) is obeyed. Raises UserError naming the file and the fault.
    """
    name = name or (source if not isinstance(source, bytes) else "the image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=formats)
            if image.width * image.height > MAX_PIXELS:
                raise UserError(f"{name} is {image.width}x{image.height} pixels, more than this program will decode")
            if max(image.size) > MAX_ASPECT * min(image.size):
                raise UserError(f"{name} is {image.width}x{image.height} pixels, too long and thin to resize; crop it")
            image.load()
        with contextlib.suppress(Exception):        # a damaged EXIF costs the turning, not the picture
            image = ImageOps.exif_transpose(image)
        return to_rgb(image)
    except FileNotFoundError:
        raise UserError(f"there is no image {name}; check the path") from None
    except UnidentifiedImageError:
        raise UserError(f"{name} is not an image Pillow can read; convert it to JPEG or PNG") from None
    except (UserError, MemoryError):
        raise
    except Exception as error:                              # Pillow's decoders raise nearly anything on a damaged file
        raise UserError(f"{name} is a damaged image ({type(error).__name__}: {error}); replace or remove it") from None


def to_rgb(image):
    """Any PIL mode -> RGB. Pillow's own convert() clips 16-bit grey to white; it is scaled here instead."""
    if image.mode in ("I;16", "I;16B", "I;16L", "I", "F"):
        grey = np.asarray(image, dtype=np.float32)
        top = 65535.0 if image.mode != "F" else max(1.0, float(grey.max(initial=0)))
        image = Image.fromarray((grey.clip(0, top) * (255.0 / top)).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def resize_short(image, size, interpolation="bicubic"):
    """Resize so that the short side is `size`: 500x375 to 224 gives 298x224 (long side rounded down)."""
    w, h = image.size
    new = (size, int(size * h / w)) if w <= h else (int(size * w / h), size)
    return image.resize(new, _filter(interpolation))


def centre_crop(image, size):
    """Cut size x size from the middle; an odd pixel goes where Python's round() puts half (as torchvision does).

    The image processors of `transformers` round down instead, so their cut may lie one pixel beside ours.
    """
    w, h = image.size
    left, top = round((w - size) / 2), round((h - size) / 2)
    return image.crop((left, top, left + size, top + size))


def adaptive_square(image):
    """Long, thin images (short/long < 0.6) would lose too much to a crop: pad them with black. Crop all others."""
    w, h = image.size
    if min(w, h) / max(w, h) >= 0.6:
        return centre_crop(image, min(w, h))
    square = Image.new("RGB", (max(w, h),) * 2)
    square.paste(image, ((max(w, h) - w) // 2, (max(w, h) - h) // 2))
    return square


def _filter(interpolation):
    return {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[interpolation]


def to_uint8(image, recipe):
    """RGB PIL image -> (3, size, size) uint8 tensor, geometry done, colours untouched."""
    size = recipe.size
    if recipe.mode == "crop":
        image = centre_crop(resize_short(image, recipe.resize or size, recipe.interpolation), size)
    elif image.size != (size, size) or recipe.mode == "adaptive":
        image = adaptive_square(image) if recipe.mode == "adaptive" else image
        image = image.resize((size, size), _filter(recipe.interpolation))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()        # (H, W, 3) -> (3, H, W)


def normalise(img, recipe):
    """(..., 3, H, W) uint8, or floats in 0..1, -> floats the model was trained on."""
    img = img.float() / 255 if img.dtype == torch.uint8 else img
    mean, std = (_per_channel(tuple(values), img.device) for values in (recipe.mean, recipe.std))
    return (img - mean) / std                                                     # (..., 3, H, W)


@functools.cache
def _per_channel(values, device):
    """Three numbers as (3, 1, 1) on the device: copied there once, since each copy makes the host wait for a GPU."""
    return torch.tensor(values, device=device).view(3, 1, 1)


def preprocess(image, recipe):
    """RGB PIL image -> (3, size, size) float tensor, ready for the model."""
    return normalise(to_uint8(image, recipe), recipe)


def to_pil(img, recipe=None):
    """A model's input back to a picture: undoes `normalise` when given the recipe. img (3, H, W)."""
    if img.dtype != torch.uint8:
        mean, std = (torch.tensor(t).view(3, 1, 1) for t in ((recipe.mean, recipe.std) if recipe else ((0,), (1,))))
        img = ((img.cpu().float() * std + mean).clamp(0, 1) * 255).round().byte()
    return Image.fromarray(img.permute(1, 2, 0).cpu().numpy())


@dataclass
class Augment:
    """What training does to each image anew every time it is seen. All zero and False: nothing."""
    crop: float = 0.0           # 0.3: a random window of 70..100% of the area, aspect 3/4..4/3, blown up to full size
    jitter: float = 0.0         # 0.2: brightness, contrast and saturation each times 0.8..1.2
    flip: bool = False          # mirror half of the images; never where captions speak of left and right


def augment(img, how, draw):
    """Augment a whole batch on its device: img (B, 3, H, W) floats in 0..1 -> same shape.

    draw (8, B): numbers in 0..1 that decide everything, made by the caller, so that a resumed run or one split over
    several processes repeats them. Rows: 0 area, 1 aspect, 2 and 3 place, 4 mirror (1.0: never), 5 to 7 brightness,
    contrast, saturation. A crop is one affine map per image, all sampled in a single call.
    """
    B, draw = len(img), draw.to(img.device, non_blocking=True)
    if how.flip:
        mirrored = (draw[4] < 0.5).view(B, 1, 1, 1)
        img = torch.where(mirrored, img.flip(-1), img)
    if how.crop:
        area = 1 - how.crop * draw[0]                                             # (B,) share of the image kept
        aspect = torch.exp((2 * draw[1] - 1) * math.log(4 / 3))
        w, h = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
        x0, y0 = (1 - w) * (2 * draw[2] - 1), (1 - h) * (2 * draw[3] - 1)         # centre of the window in -1..1
        zero = torch.zeros_like(area)
        theta = torch.stack([w, zero, x0, zero, h, y0], dim=1).view(B, 2, 3)      # from output to input places
        grid = F.affine_grid(theta, list(img.shape), align_corners=False)   # (B, H, W, 2)
        img = F.grid_sample(img, grid, padding_mode="reflection", align_corners=False)
    if how.jitter:
        gain = (1 + how.jitter * (2 * draw[5:8] - 1))[:, :, None, None, None]     # (3, B, 1, 1, 1)
        img = img * gain[0]                                                       # brightness
        mean = img.mean(dim=(1, 2, 3), keepdim=True)
        img = mean + (img - mean) * gain[1]                                       # contrast
        grey = (img * _per_channel((0.299, 0.587, 0.114), img.device)).sum(dim=1, keepdim=True)   # (B, 1, H, W)
        img = (grey + (img - grey) * gain[2]).clamp(0, 1)                         # saturation
    return img
