"""Pictures of what happens, with Pillow alone: caption sheets, curves, attention over the image; and a progress line.

Half of the work is to see the data and the mistakes. Every function returns a PIL image, for files.write_image to keep.
Left out: everything a plotting library does better.
"""
import math
import sys
import textwrap
import time

from PIL import Image, ImageDraw, ImageFont

INK, PAPER, GRID = (30, 30, 30), (255, 255, 255), (225, 225, 225)
HUES = ((31, 97, 180), (214, 90, 30), (40, 140, 70), (150, 60, 150))


def wrap(text, width):
    """Text -> its lines of at most about `width` pixels (a letter of 12 points has 6 or 7). Breaks in it are kept."""
    return [line for part in text.split("\n") for line in textwrap.wrap(part, width // 7)]


def caption_sheet(images, texts, columns=4, side=192):
    """A grid of images (PIL, of any size), each with its text below -> one PIL image."""
    gap, columns, texts = 10, min(columns, len(images)), [wrap(text, side) for text in texts]
    wide, high = side + gap, side + 2 * gap + 15 * max(map(len, texts))
    sheet = Image.new("RGB", (columns * wide + gap, math.ceil(len(images) / columns) * high + gap), PAPER)
    for k, (image, lines) in enumerate(zip(images, texts, strict=True)):
        x, y = gap + k % columns * wide, gap + k // columns * high
        scale = side / max(image.size)      # a small image is enlarged so that its pixels stay visible
        how = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
        small = image.resize([max(1, round(v * scale)) for v in image.size], how)
        sheet.paste(small, (x + (side - small.width) // 2, y + (side - small.height) // 2))
        ImageDraw.Draw(sheet).text((x, y + side + 4), "\n".join(lines), INK, ImageFont.load_default(12), spacing=3)
    return sheet


def ticks(low, high, log=False):
    """Round numbers in low..high: multiples of 1, 2 or 5 times a power of ten, at most seven; log: those themselves.

    (0, 870) -> 0, 200, 400, 600, 800;   log (0.3, 45) -> 0.5, 1, 2, 5, 10, 20
    """
    steps = [m * 10.0 ** k for k in range(-40, 40) for m in (1, 2, 5)]
    step = next(step for step in steps if step >= (high - low) / 6)
    multiples = [step * n for n in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return [value for value in steps if low <= value <= high] if log else multiples


def curves(series, title):
    """{"name": [(step, y), ..]} -> a line plot, PIL 720 x 400; a line of few points shows them as dots.

    y is logarithmic if all values are positive and the greatest is more than 20 times the least. What is not finite is
    left out.
    """
    image = Image.new("RGB", (1440, 800), PAPER)                # twice the size: Pillow's own lines have steps
    pen, font, (left, top, right, bottom) = ImageDraw.Draw(image), ImageFont.load_default(24), (120, 124, 1380, 716)
    lines = {name: [(x, y) for x, y in line if math.isfinite(y)] for name, line in series.items() if line}
    (x0, x1), (y0, y1) = ((min(v), max(v)) for v in zip(*sum(lines.values(), []) or [(0, 1)]))
    log, margin = 0 < 20 * y0 < y1, (y1 - y0) / 20 or 1
    scale, x1 = math.log if log else float, max(x1, x0 + 1)
    y0, y1 = (y0 / 1.1, y1 * 1.1) if log else (y0 - margin, y1 + margin)

    def at(x, y):
        share = (scale(y) - scale(y0)) / (scale(y1) - scale(y0))
        return left + (x - x0) / (x1 - x0) * (right - left), bottom - share * (bottom - top)
    for y in ticks(y0, y1, log):
        pen.line([at(x0, y), at(x1, y)], GRID, 2)
        pen.text((left - 16, at(x0, y)[1]), f"{y:,.6g}", INK, font, "rm")
    for x in ticks(x0, x1):
        pen.line([at(x, y0), at(x, y1)], GRID, 2)
        pen.text((at(x, y0)[0], bottom + 16), f"{x:,.10g}", INK, font, "mt")
    pen.text((left, 20), title + ", log scale" * log, INK, ImageFont.load_default(30))
    start = left                        # of the legend, above the plot: "-- training  -- validation"
    for (name, line), hue in zip(lines.items(), HUES):
        line = [at(x, y) for x, y in line]
        pen.line(line, hue, 4, "curve")
        for x, y in line if len(line) <= 40 else ():
            pen.ellipse([x - 8, y - 8, x + 8, y + 8], hue, PAPER, 2)
        pen.line([(start, top - 32), (start + 36, top - 32)], hue, 6)
        pen.text((start + 48, top - 24), name, hue, font, "ls")
        start += font.getlength(name) + 84
    return image.resize((720, 400), Image.Resampling.LANCZOS)


def attention_over(image, weights, grid):
    """Which patches a token attended to: the image, dark where its attention weight is low.

    weights (N,): the last grid * grid are the patches, row by row; a class token before them has no place to show.
    """
    patches = weights[-grid * grid:].reshape(grid, grid).float().cpu()
    light = (patches / patches.max().clamp(min=1e-9) * 255).byte().numpy()        # (grid, grid)
    mask = Image.fromarray(light).resize(image.size, Image.Resampling.BICUBIC)
    return Image.composite(image, Image.blend(image, Image.new("RGB", image.size), 0.75), mask)


def similarity_picture(sim, labels):
    """sim (n, n), image i against sentence j, and the sentences -> a PIL image of the table, darker where higher."""
    side, left, font = 44, 200, ImageFont.load_default(12)
    share = ((sim - sim.min()) / (sim.max() - sim.min()).clamp(min=1e-9)).tolist()              # (n, n) in 0..1
    image = Image.new("RGB", (left + len(sim) * side, len(sim) * side), PAPER)
    pen = ImageDraw.Draw(image)
    for i, row in enumerate(share):
        pen.text((4, i * side + 6), "\n".join(wrap(f"{i + 1}  {labels[i]}", left)[:2]), INK, font)
        for j, value in enumerate(row):
            x, y = left + j * side, i * side
            pen.rectangle([x, y, x + side - 1, y + side - 1], (round(255 - 200 * value),) * 3)
            pen.text((x + side / 2, y + side / 2), f"{sim[i, j]:.2f}", PAPER if value > 0.5 else INK, font, "mm")
    return image


_clocks = {}                # {label: (when it began, when its line was last written)}


def progress(done, total, label):
    """One line that says how far, and how long still: redrawn on a terminal; in a log file, a line every 30 seconds."""
    now, live, last = time.monotonic(), sys.stderr.isatty(), done >= total
    start, shown = _clocks.pop(label, (now, now))
    if now - shown >= (0.1 if live else 30) or live and last:
        line, shown = f"{label}: {done}/{total}, {(now - start) / max(1, done) * (total - done):.0f} s left ", now
        print("\r" * live + line, end="\n" if last or not live else "", file=sys.stderr, flush=True)
    if not last:
        _clocks[label] = start, shown
