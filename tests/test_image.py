"""Preparation of images: each step by itself, and the odd files people have."""
import io
import json
import math
import struct
import zlib
from dataclasses import asdict

import numpy as np
import pytest
import torch
from PIL import Image

from tinyvlm.config import UserError
from tinyvlm.image import RECIPES, Augment, Recipe, augment, load_image, normalise, preprocess, to_pil, to_uint8


def noise(w, h, mode="RGB", seed=0):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)).convert(mode)


def saved(tmp_path, image, name="a.png", **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


@pytest.mark.parametrize("w, h, recipe, resized, left, top", [
    (300, 200, RECIPES["vit"], (224, 224), 0, 0), (300, 200, RECIPES["clip"], (336, 224), 56, 0),
    (300, 200, RECIPES["deit"], (372, 248), 74, 12), (500, 375, RECIPES["clip"], (298, 224), 37, 0),
    (375, 500, RECIPES["clip"], (224, 298), 0, 37), (333, 500, RECIPES["torchvision"], (256, 384), 16, 80),
    (300, 200, Recipe(mode="squash", resize=256), (256, 256), 16, 16),            # size {256,256}, crop_size 224
    *[(300, 200, Recipe(mode="squash", resize=side), (side, side), left, left)    # as torchvision: half goes to even
      for side, left in ((225, 0), (227, 2), (229, 2))]])
def test_recipes_name_every_step_and_the_long_side_is_rounded_down(w, h, recipe, resized, left, top):
    how = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[recipe.interpolation]
    expected = noise(w, h).resize(resized, how).crop((left, top, left + 224, top + 224))
    assert np.array_equal(to_uint8(noise(w, h), recipe).permute(1, 2, 0).numpy(), np.asarray(expected))


@pytest.mark.parametrize("fault", [
    {"size": 0}, {"size": 2.5}, {"size": True}, {"size": "224"}, {"size": 10**9}, {"resize": 0}, {"resize": 100},
    {"mode": "stretch"}, {"mode": ["crop"]}, {"interpolation": 3}, {"mean": [0.5, 0.5]}, {"mean": None},
    {"mean": [0, 0, math.nan]}, {"std": [1, 1, 0]}, {"std": [1, 1, math.inf]}])
def test_an_impossible_recipe_is_refused_where_it_is_made(fault):
    """From a config.json, size 0 was once a traceback, and a std of 0 pixels that are not numbers."""
    with pytest.raises(ValueError, match=next(iter(fault))[:4]):
        Recipe(**{**json.loads(json.dumps(asdict(Recipe()))), **fault})
    assert Recipe(**json.loads(json.dumps(asdict(RECIPES["deit"])))) == RECIPES["deit"]


def test_normalise_worked_example_and_back():
    pixels = torch.full((3, 1, 1), 255, dtype=torch.uint8)
    assert normalise(pixels, RECIPES["vit"]).flatten().tolist() == [1.0, 1.0, 1.0]
    assert normalise(pixels, RECIPES["clip"])[0].item() == pytest.approx((1 - 0.48145466) / 0.26862954, rel=1e-6)
    image, recipe = noise(32, 32), Recipe(size=32, mean=(.4, .5, .6), std=(.2, .3, .4))
    assert np.array_equal(np.asarray(to_pil(preprocess(image, recipe), recipe)), np.asarray(image))


def test_exif_orientation_is_obeyed_and_a_damaged_one_passed_over(tmp_path):
    image = Image.new("RGB", (40, 20), "black")
    image.paste("white", (0, 0, 20, 20))                                          # left half white
    exif = Image.Exif()
    exif[274], exif[282] = 6, 72                                                  # "turn me clockwise to view"
    turned = load_image(saved(tmp_path, image, "a.jpg", exif=exif))
    assert turned.size == (20, 40) and turned.getpixel((10, 5)) > (200,) * 3 and turned.getpixel((10, 35)) < (50,) * 3
    raw = bytearray(exif.tobytes())
    raw[29] = 0x19                      # 282, the resolution, becomes 281, which Pillow fails to write again
    assert load_image(saved(tmp_path, image, "a.jpg", exif=bytes(raw))).size == (40, 20)


def test_every_mode_becomes_rgb(tmp_path):
    for mode, name in (("L", "a.png"), ("P", "b.png"), ("1", "c.png"), ("CMYK", "d.jpg"), ("RGBA", "e.png"),
                       ("P", "g.gif"), ("YCbCr", "h.jpg")):
        assert load_image(saved(tmp_path, noise(9, 7, mode), name)).mode == "RGB", mode
    grey = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)               # scaled, where Pillow would clip
    pixels = np.asarray(load_image(saved(tmp_path, Image.fromarray(grey))))[..., 0].astype(int)
    assert np.abs(pixels - grey // 257).max() <= 1
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert load_image(saved(tmp_path, clear, "clear.png")).getpixel((0, 0)) == (255, 255, 255)
    frames = [Image.new("RGB", (4, 4), c) for c in ("red", "blue")]
    frames[0].save(tmp_path / "film.gif", save_all=True, append_images=frames[1:])
    assert load_image(tmp_path / "film.gif").getpixel((0, 0)) == (255, 0, 0)      # the first frame
    with pytest.raises(UserError, match="floating-point"):
        load_image(saved(tmp_path, Image.new("F", (4, 4)), "f.tif"))


def png(pixels, depth, kind, *chunks):
    """A PNG file of raw rows (bytes) with chunks of one's own, such as tRNS: Pillow itself writes none below 8 bits."""
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    w, h = len(pixels[0]) * 8 // depth // {0: 1, 2: 3}[kind], len(pixels)
    head = (b"IHDR", struct.pack(">IIBBBBB", w, h, depth, kind, 0, 0, 0))
    rows = (b"IDAT", zlib.compress(b"".join(b"\0" + row for row in pixels)))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*c) for c in (head, *chunks, rows, (b"IEND", b"")))


@pytest.mark.parametrize("depth, kind, clear, pixel, other, colour", [
    (8, 0, 7, b"\7", b"\0", 0), (16, 0, 300, b"\1\x2c", b"\1\0", 0), (16, 0, 0, b"\0\0", b"\x80\0", 127),
    (2, 0, 1, b"\x55", b"\0", 0), (4, 0, 7, b"\x77", b"\xff", 255), (1, 0, 0, b"\0", b"\xff", 255),
    (8, 2, 9, b"\t\t\t", b"\0\0\0", 0), (16, 2, 0x1234, b"\x12\x34" * 3, b"\x80\x80" * 3, 128)])
def test_the_transparent_colour_is_white_at_every_depth(depth, kind, clear, pixel, other, colour):
    """8-bit images turned white, 16-bit ones black: Pillow compares their 16-bit colour with 8-bit pixels."""
    value = struct.pack(">H", clear) * (3 if kind == 2 else 1)
    image = load_image(png([pixel * 4, other * 4], depth, kind, (b"tRNS", value)))
    assert image.getpixel((0, 0)) == (255,) * 3 and image.getpixel((0, 1)) == (colour,) * 3


def test_large_photographs_and_profiles_are_no_damage(tmp_path):
    """90 megapixels (Pillow warns above 89), a colour profile of 2 MB, a text of 2 MB: all were "damaged"."""
    assert load_image(saved(tmp_path, Image.new("1", (10_000, 9_000)), "a.png")).size == (10_000, 9_000)
    assert load_image(saved(tmp_path, noise(4, 4), "b.png", icc_profile=bytes(2 << 20))).size == (4, 4)
    text = (b"zTXt", b"Comment\0\0" + zlib.compress(b"x" * (2 << 20)))
    assert load_image(png([b"\0" * 4], 8, 0, text)).size == (4, 1)


def test_bad_files_are_one_sentence_with_the_true_reason(tmp_path):
    good = saved(tmp_path, noise(64, 64), "good.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(good[:len(good) // 2])
    (tmp_path / "page.jpg").write_bytes(b"<html>not here</html>")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "script.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n%%EOF\n")
    (tmp_path / "dir.jpg").mkdir()
    bomb = saved(tmp_path, noise(4, 4), "bomb.gif").read_bytes()                  # tells of 1.2 GB as RGB
    (tmp_path / "bomb.gif").write_bytes(bomb[:6] + struct.pack("<HH", 20000, 20000) + bomb[10:])
    saved(tmp_path, Image.new("1", (51, 1)), "strip.png")
    for name, words in (("cut.jpg", "truncated"), ("page.jpg", "no image of a kind"), ("empty.png", "no image of a kind"),
                        ("script.jpg", "no image of a kind .*convert it"), ("no.jpg", "there is no image .*check the path"),
                        ("dir.jpg", "Is a directory"), ("bomb.gif", "20000x20000 pixels, too many"),
                        ("strip.png", "51x1 pixels, .*too long and thin")):
        with pytest.raises(UserError, match=words) as error:
            load_image(tmp_path / name)
        assert name in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match="https://x/cut"):
        load_image(good[:500], name="https://x/cut")


def test_damage_anywhere_is_a_sentence(tmp_path):
    """300 seeded ways to break a file: either it still decodes or it is a UserError, never anything else."""
    rng, outcomes = np.random.default_rng(0), set()
    for kind in ("PNG", "JPEG", "GIF", "WEBP"):
        buffer = io.BytesIO()
        noise(16, 16).save(buffer, kind)
        for _ in range(75):
            raw = bytearray(buffer.getvalue())
            for k in rng.integers(0, len(raw), 6):
                raw[k] = rng.integers(0, 256)
            try:
                load_image(bytes(raw))
                outcomes.add("decoded")
            except UserError:
                outcomes.add("refused")
    assert outcomes == {"decoded", "refused"}


def test_flip_mirrors_exactly_the_images_it_should():
    img, draw = torch.rand(4, 3, 8, 8), torch.rand(8, 4)
    draw[4] = torch.tensor([0.1, 0.9, 0.4, 0.6])                                  # below one half: mirrored
    mirrored = torch.stack([img[0].flip(-1), img[1], img[2].flip(-1), img[3]])
    assert torch.equal(augment(img, Augment(flip=True), draw), mirrored)
    assert torch.equal(augment(img, Augment(), draw), img)


def test_random_crop_shows_a_window_of_the_image():
    """On an image whose red is x and green is y, the corners of the result tell which window was taken."""
    ramp = (torch.arange(64) + 0.5) / 64
    img = torch.stack([ramp.expand(64, 64), ramp[:, None].expand(64, 64), torch.zeros(64, 64)])
    img = img[None].expand(50, -1, -1, -1)
    out = augment(img, Augment(crop=0.5), torch.rand(8, 50, generator=torch.Generator().manual_seed(0)))
    width, height = out[:, 0, 32, -1] - out[:, 0, 32, 0], out[:, 1, -1, 32] - out[:, 1, 0, 32]
    area = width * height * (64 / 63) ** 2
    assert 0.42 < area.min() < 0.65 and 0.85 < area.max() <= 1.01 and (width / height).std() > 0.05


def test_jitter_worked_example():
    img, draw = torch.full((1, 3, 2, 2), 0.5), torch.full((8, 1), 0.5)
    torch.testing.assert_close(augment(img, Augment(jitter=0.2), draw), img)      # 0.5 is the middle: all factors 1
    draw[5] = 1.0                                                                 # 1.2 times as bright
    torch.testing.assert_close(augment(img, Augment(jitter=0.2), draw), torch.full((1, 3, 2, 2), 0.6))
