"""Pictures of what happens, with Pillow alone: caption sheets, curves, attention over the image; and a progress line.

Looking at the data and at the mistakes is half of the work; these are what the scripts write for you to look at. Every
function returns a PIL image; files.write_image keeps it. Left out: everything a plotting library does better, above all
choice. One size, four colours, and axes whose numbers are round.
"""
import itertools
import math
import sys
import time

from PIL import Image, ImageDraw, ImageFont

INK, PAPER, GRID = (30, 30, 30), (255, 255, 255), (225, 225, 225)
HUES = ((31, 97, 180), (214, 90, 30), (40, 140, 70), (150, 60, 150))


def wrap(text, font, width):
    """Text -> its lines of at most `width` pixels. Breaks in the text are kept; a longer word has a line of its own."""
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
    """A grid of images (PIL, of any size), each with its text below -> one PIL image.

    Each row is as high as its longest text needs.
    """
    font, gap, line = ImageFont.load_default(12), 10, 15
    columns = min(columns, len(images))
    wrapped = [wrap(text, font, side) for text in texts]
    heights = [side + 2 * gap + line * max(map(len, wrapped[k:k + columns])) for k in range(0, len(images), columns)]
    sheet = Image.new("RGB", (columns * (side + gap) + gap, sum(heights) + gap), PAPER)
    pen = ImageDraw.Draw(sheet)
    for k, (image, lines) in enumerate(zip(images, wrapped, strict=True)):
        x, y = gap + k % columns * (side + gap), gap + sum(heights[:k // columns])
        scale = side / max(image.size)      # a small image is enlarged so that its pixels stay visible
        small = image.resize([max(1, round(v * scale)) for v in image.size],
                             Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)
        sheet.paste(small, (x + (side - small.width) // 2, y + (side - small.height) // 2))
        pen.text((x, y + side + 4), "\n".join(lines), INK, font=font, spacing=line - 12)
    return sheet


def ticks(low, high, log=False):
    """Round numbers in low..high, 1, 2 or 5 times a power of ten.

    (0, 870) -> 0, 200, 400, 600, 800;   log (0.3, 45) -> 0.5, 1, 2, 5, 10, 20;   log (0.3, 4500) -> 1, 10, 100, 1000
    """
    if log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
        found = [m * 10.0 ** k for k in decades for m in ((1, 2, 5) if len(decades) < 4 else (1,))]
    else:
        power = 10.0 ** math.floor(math.log10((high - low) / 6))
        step = next(m * power for m in (1, 2, 5, 10) if m * power >= (high - low) / 6)
        found = [step * n for n in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return [value for value in found if low <= value <= high]


def curves(series, title, x_label="step", y_label="", size=(720, 400)):
    """A line plot -> PIL image. series: {"name": [(x, y), ..]}; a line of few points shows them as dots.

    y is logarithmic if all values are positive and the greatest is more than 20 times the least. What is not finite is
    left out.
    """
    zoom = 2                                # drawn at twice the size and made smaller: Pillow's own lines have steps
    image = Image.new("RGB", (zoom * size[0], zoom * size[1]), PAPER)
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(12 * zoom)
    left, top, right, bottom = (zoom * v for v in (60, 62, size[0] - 30, size[1] - 42))
    pen.text((left, 10 * zoom), title, INK, ImageFont.load_default(15 * zoom))
    lines = {name: [(x, y) for x, y in line if math.isfinite(y)] for name, line in series.items() if line}
    points = [point for line in lines.values() for point in line]
    if not points:
        return image.resize(size, Image.Resampling.LANCZOS)
    (x0, x1), (y0, y1) = ((min(v), max(v)) for v in zip(*points))
    log = 0 < 20 * y0 < y1
    x1, margin = max(x1, x0 + 1), 0.04 * (y1 - y0) or abs(y1) / 2 or 1
    y0, y1 = (y0 / 1.1, y1 * 1.1) if log else (y0 - margin, y1 + margin)

    def share(value, low, high, log=False):         # where a value lies between low (0) and high (1)
        return share(*map(math.log, (value, low, high))) if log else (value - low) / (high - low)

    def at(x, y):
        return left + share(x, x0, x1) * (right - left), bottom - share(y, y0, y1, log) * (bottom - top)
    for y in ticks(y0, y1, log):
        pen.line([(left, at(x0, y)[1]), (right, at(x0, y)[1])], GRID, zoom)
        pen.text((left - 8 * zoom, at(x0, y)[1]), f"{y:,.6g}", INK, font, anchor="rm")
    for x in ticks(x0, x1):
        pen.line([(at(x, y0)[0], bottom), (at(x, y0)[0], bottom + 4 * zoom)], INK, zoom)
        pen.text((at(x, y0)[0], bottom + 8 * zoom), f"{x:,.10g}", INK, font, anchor="mt")
    pen.line([(left, top), (left, bottom), (right, bottom)], INK, zoom)
    pen.text((right, size[1] * zoom - 6 * zoom), x_label, INK, font, anchor="rb")
    pen.text((left, top - 12 * zoom), y_label + ", log scale" * log, INK, font, anchor="ls")
    # the legend stands above the plot, where it covers no line: "-- training  -- validation", up to the right edge
    start = right - sum(font.getlength(name) + 42 * zoom for name in lines) + 18 * zoom
    for (name, line), hue in zip(lines.items(), itertools.cycle(HUES)):
        line = [at(x, y) for x, y in line]
        pen.line(line, hue, 2 * zoom, joint="curve")
        for x, y in line if len(line) <= 40 else ():
            pen.ellipse([x - 4 * zoom, y - 4 * zoom, x + 4 * zoom, y + 4 * zoom], hue, PAPER, zoom)
        pen.line([(start, top - 16 * zoom), (start + 18 * zoom, top - 16 * zoom)], hue, 3 * zoom)
        pen.text((start + 24 * zoom, top - 12 * zoom), name, hue, font, anchor="ls")
        start += font.getlength(name) + 42 * zoom
    return image.resize(size, Image.Resampling.LANCZOS)


def attention_over(image, weights, grid):
    """Which patches a token attended to: the image, dark where its attention weight is low.

    weights (N,): the last grid * grid are the patches, row by row; a class token before them has no place to show.
    """
    patches = weights[-grid * grid:].reshape(grid, grid).float().cpu()
    light = (patches / patches.max().clamp(min=1e-9) * 255).byte().numpy()        # (grid, grid)
    mask = Image.fromarray(light).resize(image.size, Image.Resampling.BICUBIC)
    return Image.composite(image, Image.blend(image, Image.new("RGB", image.size), 0.75), mask)


def similarity_picture(sim, labels, side=44):
    """sim (n, n), image i against sentence j, and the sentences -> a PIL image of the table, darker where higher."""
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


_clocks = {}                # {label: (when it began, when its line was last written)}


def progress(done, total, label):
    """One line that says how far, and how long still: redrawn on a terminal; in a log file, a line every 30 seconds."""
    now, live = time.monotonic(), sys.stderr.isatty()
    start, shown = _clocks.setdefault(label, (now, now))
    if done >= total:
        del _clocks[label]
    if now - shown >= (0.1 if live else 30) or live and done >= total:
        _clocks.update({label: (start, now)} if done < total else {})
        line = f"{label}: {done}/{total}, {(now - start) / max(1, done) * (total - done):.0f} s left "
        print("\r" * live + line, end="\n" if done >= total or not live else "", file=sys.stderr, flush=True)
