"""Pictures of what happens, with Pillow alone: caption sheets, curves, attention over the image; and a progress line.

Looking at the data and at the mistakes is half of the work; these four are what the scripts write for you to look at.
"""
import math
import sys
import time

from PIL import Image, ImageDraw, ImageFont

INK, PAPER, GRID = (30, 30, 30), (255, 255, 255), (220, 220, 220)
HUES = ((31, 97, 180), (214, 90, 30), (40, 140, 70), (150, 60, 150))


def wrap(text, font, width):
    """Break text into lines of at most `width` pixels; line breaks in the text are kept."""
    lines = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split():
            if line and font.getlength(f"{line} {word}") > width:
                lines.append(line)
                line = word
            else:
                line = f"{line} {word}".strip()
        lines.append(line)
    return lines


def caption_sheet(images, texts, columns=4, side=192):
    """A grid of images (PIL), each with its text below. Returns one PIL image."""
    assert len(images) == len(texts) and images, f"{len(images)} images and {len(texts)} texts do not pair up"
    font, gap, line = ImageFont.load_default(12), 10, 15
    columns = min(columns, len(images))
    wrapped = [wrap(text, font, side) for text in texts]
    rows = [wrapped[k:k + columns] for k in range(0, len(images), columns)]
    heights = [side + gap + line * max(map(len, row)) + gap for row in rows]
    sheet = Image.new("RGB", (columns * (side + gap) + gap, sum(heights) + gap), PAPER)
    pen = ImageDraw.Draw(sheet)
    for k, (image, lines) in enumerate(zip(images, wrapped)):
        x, y = gap + k % columns * (side + gap), gap + sum(heights[:k // columns])
        small = image.copy()
        small.thumbnail((side, side))
        if max(small.size) < side:                              # thumbnail() never enlarges
            small = image.resize([round(v * side / max(image.size)) for v in image.size], Image.Resampling.NEAREST)
        sheet.paste(small, (x + (side - small.width) // 2, y + (side - small.height) // 2))
        for row, text in enumerate(lines):
            pen.text((x, y + side + 4 + row * line), text, INK, font=font)
    return sheet


def curves(series, title, size=(720, 400)):
    """Line plot. series: {"name": [(x, y), ..]}, y linear from the least to the greatest. Returns a PIL image."""
    font = ImageFont.load_default(12)
    image = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(image)
    points = [(x, y) for line in series.values() for x, y in line if math.isfinite(y)]
    pen.text((60, 8), title, INK, font=ImageFont.load_default(14))
    if not points:
        return image
    (x0, x1), (y0, y1) = ((min(v), max(v)) for v in zip(*points))
    x1, y1 = x1 if x1 > x0 else x0 + 1, y1 if y1 > y0 else y0 + 1
    left, top, right, bottom = 60, 34, size[0] - 20, size[1] - 34

    def at(x, y):
        return left + (x - x0) / (x1 - x0) * (right - left), bottom - (y - y0) / (y1 - y0) * (bottom - top)
    for k in range(5):
        y, x = y0 + (y1 - y0) * k / 4, x0 + (x1 - x0) * k / 4
        pen.line([at(x0, y), at(x1, y)], GRID)
        pen.text((8, at(x0, y)[1] - 7), f"{y:.3g}", INK, font=font)
        pen.text((at(x, y0)[0] - 12, bottom + 8), f"{x:.0f}", INK, font=font)
    for k, (name, line) in enumerate(series.items()):
        line = [at(x, y) for x, y in line if math.isfinite(y)]
        if len(line) > 1:
            pen.line(line, HUES[k % 4], width=2)
        pen.text((right - 120, top + 4 + 16 * k), name, HUES[k % 4], font=font)
    return image


def attention_over(image, weights, grid):
    """Where a word looked: the image, dark where its attention weight is low.

    weights (N,): the last grid * grid are the patches, row by row; a class token before them has no place to show.
    """
    patches = weights[-grid * grid:].reshape(grid, grid).float().cpu()
    light = (patches / patches.max().clamp(min=1e-9) * 255).byte().numpy()
    mask = Image.fromarray(light).resize(image.size, Image.Resampling.BICUBIC)
    return Image.composite(image, Image.blend(image, Image.new("RGB", image.size), 0.75), mask)


_started = {}


def progress(done, total, label):
    """A line that says how far, and how long still: redrawn on a terminal, else printed about every tenth."""
    now = time.monotonic()
    start = _started.setdefault(label, now)
    live = sys.stderr.isatty()
    if done == total:
        _started.pop(label)
    due = done == total or done % (16 if live else max(1, total // 10)) == 0
    if not due or (not live and total < 1000):
        return
    left = (now - start) / done * (total - done)
    print(f"\r{label}: {done}/{total}, {left:.0f} s left " if live else f"{label}: {done}/{total}, {left:.0f} s left",
          end="\n" if done == total or not live else "", file=sys.stderr, flush=True)
