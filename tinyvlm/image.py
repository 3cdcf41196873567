"""From a picture file to the tensor a model expects, and back. All that a model demands of its input is a Recipe.

Every public checkpoint was trained on images prepared in one way; others give plausible, worse answers and no error. So
the preparation is data, kept with each run and checkpoint. Resizing is Pillow's, antialiased, as in torchvision.

    file --load_image--> PIL, RGB --to_uint8--> (3, H, W) bytes --normalise--> (3, H, W) floats"""
import contextlib
import functools
import io
import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from .config import UserError
from .draw import progress

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))                         # mean and std of R, G, B
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF")     # no other: Pillow would hand an EPS to Ghostscript
MAX_PIXELS, MAX_ASPECT = 100_000_000, 50    # above: bombs and maps; strips that become gigabytes when resized
# Pillow's own limits come before ours and refuse good files: photographs of 90 megapixels, colour profiles above 1 MB.
Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK = None, 64 << 20


@dataclass
class Recipe:
    """How an image becomes (3, size, size) numbers. Raises ValueError or TypeError where that is impossible. mode:
    "squash" resizes both sides to `resize`, whatever the shape; "crop" resizes the short side to `resize`. Then the
    middle size x size is cut out. mean, std: per channel (RGB), of values in 0..1."""
    size: int = 224
    mode: str = "crop"
    resize: int | None = None               # None: `size`
    interpolation: str = "bicubic"          # or "bilinear"
    mean: tuple = (0.5, 0.5, 0.5)
    std: tuple = (0.5, 0.5, 0.5)

    def __post_init__(self):
        side = self.size if self.resize is None else self.resize
        if not (type(self.size) is type(side) is int and 1 <= self.size <= side <= 10_000):
            raise ValueError(f"{self.size!r} pixels cannot be cut out of an image resized to {side!r}")
        if self.mode not in ("squash", "crop") or self.interpolation not in ("bilinear", "bicubic"):
            raise ValueError(f"mode {self.mode!r} or interpolation {self.interpolation!r} is unknown")
        for name, least in (("mean", -math.inf), ("std", 0)):
            values = getattr(self, name)
            if type(values) not in (list, tuple) or len(values) != 3 or not all(least < v < math.inf for v in values):
                raise ValueError(f"{name} {values!r} is not three numbers above {least}")
            setattr(self, name, tuple(values))                                    # json knows lists only


RECIPES = {     # what public checkpoints were trained with
    "vit": Recipe(mode="squash", interpolation="bilinear"),                               # google/vit-*, nlpconnect
    "deit": Recipe(resize=248, mean=IMAGENET[0], std=IMAGENET[1]),                        # timm deit_*: 224 / 0.9
    "clip": Recipe(mean=CLIP[0], std=CLIP[1]),
    "resnet50": Recipe(resize=256, mean=IMAGENET[0], std=IMAGENET[1]),                    # microsoft: 224 / 0.875
    "torchvision": Recipe(resize=256, interpolation="bilinear", mean=IMAGENET[0], std=IMAGENET[1]),   # tv weights, VGG
}


def load_image(source, name=None):
    """Open a path or bytes as an upright RGB PIL image: the one place where a file of unknown origin is decoded. Of an
    animation the first frame is taken, and the camera's orientation note (EXIF) is obeyed. Raises UserError naming the
    file and the fault."""
    name = name or (source if not isinstance(source, bytes) else "the image")
    try:
        image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS)
        w, h = image.size
        if w * h > MAX_PIXELS or max(w, h) > MAX_ASPECT * min(w, h):
            raise UserError(f"{name} is {w}x{h} pixels, too many or too long and thin; make it smaller, or crop it")
        depth = image.tile[0][3] if image.tile else None                          # load() forgets it
        image.load()
        with contextlib.suppress(Exception):    # a damaged EXIF costs the turning, not the picture
            image = ImageOps.exif_transpose(image)
        return to_rgb(image, depth)
    except (UserError, MemoryError):
        raise
    except FileNotFoundError:
        raise UserError(f"there is no image {name}; check the path") from None
    except UnidentifiedImageError:
        raise UserError(f"{name} is no image of a kind that is read ({', '.join(FORMATS)}), or damaged at its "
                        "beginning; replace it, or convert it to JPEG or PNG") from None
    except Exception as error:                  # Pillow's decoders raise nearly anything on a damaged file
        raise UserError(f"{name} cannot be opened ({type(error).__name__}: {str(error)[:99]}); replace it, or convert "
                        "it to JPEG or PNG") from None


def to_rgb(image, depth):
    """Grey, palette, CMYK, 16 bits -> 8-bit RGB, transparency on white. depth: the file's, such as "RGB;16B". Pillow's
    convert() would clip 16-bit grey. And the one colour that a PNG may call transparent comes in the file's own depth,
    while the pixels have 8 bits by now."""
    clear = image.info.get("transparency")
    if image.mode == "F":
        raise ValueError("floating-point pixels")
    if image.mode.startswith("I"):                                                # 16 bits
        grey = np.array(image, dtype=np.float32)                                  # (H, W)
        grey[grey == clear] = 65535                                               # no pixel where clear is None
        return Image.fromarray((grey.clip(0, 65535) / 257).astype(np.uint8)).convert("RGB")
    if clear is not None and depth == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in clear)         # 0x1234 shows as 0x12
    elif clear is not None and depth in ("L;2", "L;4"):
        image.info["transparency"] = clear * {"L;2": 85, "L;4": 17}[depth]        # 3 and 15 show as 255
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def to_uint8(image, recipe):
    """RGB PIL image -> (3, size, size) uint8 tensor, geometry done, colours untouched."""
    S, side, (w, h) = recipe.size, recipe.resize or recipe.size, (1, 1) if recipe.mode == "squash" else image.size
    shape = side * w // min(w, h), side * h // min(w, h)        # rounded down: 500x375, short side to 224, is 298x224
    left, top = (round((n - S) / 2) for n in shape)             # round() puts half a pixel where torchvision does
    image = image.resize(shape, Image.Resampling[recipe.interpolation.upper()]).crop((left, top, left + S, top + S))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()        # (3, S, S)


@functools.cache
def _per_channel(values, device):
    """Three numbers as (3, 1, 1) on the device: copied there once, since each copy makes the host wait for a GPU."""
    return torch.tensor(values, device=device).view(3, 1, 1)


def normalise(img, recipe):
    """(..., 3, H, W) uint8, or floats in 0..1, -> floats the model was trained on."""
    img = img.float() / 255 if img.dtype == torch.uint8 else img
    return (img - _per_channel(recipe.mean, img.device)) / _per_channel(recipe.std, img.device)   # (..., 3, H, W)


def preprocess(image, recipe):
    """RGB PIL image -> (3, size, size) float tensor, ready for the model."""
    return normalise(to_uint8(image, recipe), recipe)


def to_pil(img, recipe):
    """A model's input (3, H, W) back to a picture."""
    img = img * _per_channel(recipe.std, img.device) + _per_channel(recipe.mean, img.device)  # (3, H, W) in 0..1
    return Image.fromarray((img.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy())


@dataclass
class Augment:
    """What training does to each image anew every time it is seen."""
    crop: float = 0.0           # 0.3: a random window of 70..100% of the area, aspect 3/4..4/3, blown up to full size
    jitter: float = 0.0         # 0.2: brightness, contrast and saturation each times 0.8..1.2
    flip: bool = False          # mirror half of the images; never where captions say left or right


def augment(img, how, draw):
    """Augment a whole batch on its device: img (B, 3, H, W) floats in 0..1 -> same shape. draw (8, B): numbers in 0..1
    that decide everything, from the caller, so that a resumed run repeats them. Rows: 0 area, 1 aspect, 2 and 3 place,
    4 mirror (1.0: never), 5 to 7 brightness, contrast, saturation."""
    draw = draw.to(img.device, non_blocking=True)                                 # (8, B)
    if how.flip:
        img = torch.where((draw[4] < 0.5).view(-1, 1, 1, 1), img.flip(-1), img)    # (B, 3, H, W)
    if how.crop:
        area = 1 - how.crop * draw[0]                                             # (B,) share of the image kept
        aspect = torch.exp((2 * draw[1] - 1) * math.log(4 / 3))
        w, h = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
        x0, y0 = (1 - w) * (2 * draw[2] - 1), (1 - h) * (2 * draw[3] - 1)         # centre of the window in -1..1
        theta = torch.stack([w, 0 * w, x0, 0 * w, h, y0], dim=1).view(-1, 2, 3)   # from output to input places
        grid = F.affine_grid(theta, list(img.shape), align_corners=False)         # (B, H, W, 2)
        img = F.grid_sample(img, grid, padding_mode="reflection", align_corners=False)  # (B, 3, H, W)
    if how.jitter:
        gain = (1 + how.jitter * (2 * draw[5:8] - 1))[:, :, None, None, None]     # (3, B, 1, 1, 1)
        img = img * gain[0]                                                       # brightness
        mean = img.mean(dim=(1, 2, 3), keepdim=True)                              # (B, 1, 1, 1)
        img = mean + (img - mean) * gain[1]                                       # contrast
        grey = (img * _per_channel((0.299, 0.587, 0.114), img.device)).sum(dim=1, keepdim=True)   # (B, 1, H, W)
        img = (grey + (img - grey) * gain[2]).clamp(0, 1)                         # saturation
    return img


def open_batches(keys, open_one, batch_size, broken, label=None, threads=None):
    """The one loop over images: yields lists of (key, open_one(key)), a batch at a time, opened by all cores. What
    raises UserError is left out, and noted in the dict `broken`: {key: its sentence}. label: shows progress."""
    def attempt(key):
        try:
            return open_one(key)
        except UserError as error:
            return error
    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:     # Pillow decodes outside Python's lock
        for start in range(0, len(keys), batch_size):
            part = keys[start:start + batch_size]
            opened = list(zip(part, pool.map(attempt, part)))               # [(key, what it gave or the UserError), ..]
            broken.update((key, str(found)) for key, found in opened if isinstance(found, UserError))
            if label:
                progress(start + len(part), len(keys), label)
            yield [(key, found) for key, found in opened if not isinstance(found, UserError)]
