"""Every picture of the README but that of the page, made anew by one command, with Pillow and tinyvlm.draw alone.

    python tests/figures.py                             trains three models first, by the README's own commands
    python tests/figures.py --data-dir DIR              .. with the Flickr8k that lies in DIR
    python tests/figures.py --photos RUN --shapes RUN --clip RUN        with runs that are finished already
    python tests/figures.py --only bridges patches      the drawings need no run

A drawing is made at twice its size and halved, as Pillow's lines have steps. No text may lie on another, nor leave its
box or the picture: `Drawing.text` refuses it, so a figure that is drawn is legible.
"""
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data import DataConfig, load_dataset                                         # noqa: E402
from tinyvlm.config import UserError, option, parse_config, run_script            # noqa: E402
from tinyvlm.draw import INK, PAPER, attention_over, caption_sheet, similarity_picture       # noqa: E402
from tinyvlm.features import text_embeddings                                      # noqa: E402
from tinyvlm.files import write_image                                             # noqa: E402
from tinyvlm.generate import generate                                             # noqa: E402
from tinyvlm.image import preprocess, to_pil                                      # noqa: E402
from tinyvlm.metrics import CiderD, tokenize                                      # noqa: E402
from tinyvlm.pretrained import is_run, load_run                                   # noqa: E402
from tinyvlm.shapes import Shapes                                                 # noqa: E402
from tinyvlm.task import forbidden_ids                                            # noqa: E402

WIDE = 800                                                      # pixels of a drawing, as the README shows it
IMAGE, MASKED, TRAINED, LINE = (196, 219, 245), (226, 226, 226), (200, 232, 203), (90, 90, 90)
TRAIN = {
    "shapes": ["train.py"],
    "clip": "train.py --task clip --batch-size 128 --epochs 6 --optimizer adamw --test-images 200".split(),
    "photos": "train.py --task caption --dataset flickr8k".split()}


@dataclass
class FigureConfig:
    """Where the runs are; one that is missing is trained into its place."""
    data_dir: str | None = option(None, "folder that holds Flickr8k; default data/flickr8k, downloaded if missing")
    photos: str = option("out/figures/photos", "a cross-attention captioner of Flickr8k")
    shapes: str = option("out/figures/shapes", "the default run: drawn scenes")
    clip: str = option("out/figures/clip", "a clip run of drawn scenes")
    photo: str | None = option(None, "the test photo of attention.png, by file name; default: see `best_photo`")
    only: list[str] = option([], "names of the figures to make; default all")


class Drawing:
    """A white sheet of WIDE x height in units of one pixel; boxes, chips, arrows, texts."""

    def __init__(self, height):
        self.image, self.height, self.texts = Image.new("RGB", (2 * WIDE, 2 * height), PAPER), height, []
        self.pen = ImageDraw.Draw(self.image)

    def text(self, x, y, words, size=15, anchor="mm", color=INK, inside=None):
        """words at (x, y). inside: the rectangle (x0, y0, x1, y1) that must hold them; default the whole sheet."""
        font = ImageFont.load_default(2 * size)
        here = [v / 2 for v in self.pen.textbbox((2 * x, 2 * y), words, font, anchor)]
        x0, y0, x1, y1 = inside or (0, 0, WIDE, self.height)
        assert x0 <= here[0] and y0 <= here[1] and here[2] <= x1 and here[3] <= y1, f"{words!r} does not fit: {here}"
        for other, (a, b, c, d) in self.texts:
            apart = here[2] <= a or c <= here[0] or here[3] <= b or d <= here[1]
            assert apart, f"{words!r} lies on {other!r}"
        self.texts.append((words, here))
        self.pen.text((2 * x, 2 * y), words, color, font, anchor)

    def box(self, x, y, wide, high, words="", fill=PAPER, size=15, edge=LINE):
        self.pen.rounded_rectangle([2 * x, 2 * y, 2 * (x + wide), 2 * (y + high)], 8, fill, edge, 2)
        if words:
            self.text(x + wide / 2, y + high / 2, words, size, inside=(x, y, x + wide, y + high))

    def line(self, *points, color=LINE, width=1.5):
        self.pen.line([2 * v for point in points for v in point], color, round(2 * width))

    def arrow(self, *points):
        """Along points, each straight above, below or beside the one before."""
        (x0, y0), (x1, y1) = points[-2:]
        self.line(*points)
        along = ((x1 > x0) - (x1 < x0), (y1 > y0) - (y1 < y0))
        tip = [(x1 - 9 * along[0] + side * 5 * along[1], y1 - 9 * along[1] + side * 5 * along[0]) for side in (-1, 1)]
        self.pen.polygon([(2 * a, 2 * b) for a, b in [(x1, y1), *tip]], LINE)

    def paste(self, image, x, y, side):
        self.image.paste(image.resize((2 * side, 2 * side), Image.Resampling.LANCZOS), (2 * x, 2 * y))

    def done(self):
        return self.image.resize((WIDE, self.height), Image.Resampling.LANCZOS)


# ---- drawings, which need no run

def some_picture():
    """A drawn scene of two things."""
    scenes = Shapes(2, 40, 3)
    return scenes.open(next(i for i, texts in enumerate(scenes.captions) if "above" in texts[0] and "star" in texts[0]))


def bridges():
    """The three ways to see: what of the image reaches the decoder, and where."""
    d, picture = Drawing(612), some_picture()
    heads = {"cross": "every block attends to the words so far, then to the patches",
             "prefix": "the patches stand where <image> stood, and a GPT reads on",
             "lstm": "the mean of the patches sets the first state; the rest is memory"}
    for k, (name, head) in enumerate(heads.items()):
        y = 204 * k
        d.text(16, y + 22, "--model " + name, 18, "lm")
        d.text(190, y + 22, head, 15, "lm", LINE)
        d.paste(picture, 16, y + 66, 84)
        d.arrow((102, y + 108), (126, y + 108))
        d.box(128, y + 88, 56, 40, "ViT")
        d.arrow((186, y + 108), (210, y + 108))
        for n in range(9):
            d.box(212 + 20 * (n % 3), y + 79 + 20 * (n // 3), 17, 17, fill=IMAGE)
        d.text(241, y + 158, "feats (B, N, C)", 13)
        if k:
            d.line((16, y), (WIDE - 16, y), color=MASKED)
    places, words = [432, 532, 632, 732], ["a", "dog", "runs", "[end]"]

    def column(x, y, token, word, top=48, bottom=166, low=144, high=76):
        """A token below the decoder, and the word that is predicted above it."""
        if token:
            d.text(x, y + bottom + 10, token)
            d.arrow((x, y + bottom), (x, y + low))
        d.arrow((x, y + high), (x, y + high - 14))
        d.text(x, y + top + 4, word)

    d.box(384, 80, 400, 62)                                     # cross
    d.box(394, 92, 118, 38, "self-attention", size=14)
    d.box(522, 92, 128, 38, "cross-attention", IMAGE, 14)
    d.box(660, 92, 114, 38, "MLP", size=14)
    d.arrow((512, 111), (522, 111))
    d.arrow((650, 111), (660, 111))
    d.line((278, 108), (330, 108), (330, 190), (582, 190))
    d.arrow((582, 190), (582, 131))
    for x, token, word in zip(places, ["[start]", "a", "dog", "runs"], words):
        column(x, 0, token, word)

    y = 204                                                     # prefix
    d.box(384, y + 80, 400, 62, "GPT", size=16)
    d.box(292, y + 88, 78, 40, "connector", size=13)
    d.arrow((278, y + 108), (291, y + 108))
    d.arrow((330, y + 129), (330, y + 178), (388, y + 178))
    for n, x in enumerate((392, 418, 444, 496)):
        d.box(x, y + 167, 22, 22, fill=IMAGE)
        d.arrow((x + 11, y + 165), (x + 11, y + 144))
    d.text(481, y + 178, ".. N")
    for x, token, word in zip((507, 580, 660, 740), (None, "a", "dog", "runs"), words):
        column(x, y, token, word)

    y = 408                                                     # lstm
    d.box(292, y + 92, 62, 32, "mean", size=14)
    d.arrow((278, y + 108), (291, y + 108))
    d.arrow((355, y + 108), (401, y + 108))
    d.text(376, y + 92, "h, c", 14)
    for k, (x, token, word) in enumerate(zip(places, ["[start]", "a", "dog", "runs"], words)):
        d.box(x - 30, y + 80, 60, 62, "LSTM")
        if k < 3:
            d.arrow((x + 31, y + 108), (x + 69, y + 108))
        column(x, y, token, word)
    return d.done()


def patches():
    """How <image> becomes 196 tokens."""
    d, side = Drawing(478), 16
    picture = some_picture().resize((224, 224), Image.Resampling.NEAREST)
    cells = [picture.crop((side * c, side * r, side * c + side, side * r + side)) for r in range(14) for c in range(14)]
    d.paste(picture, 16, 40, 224)
    for k in range(15):
        d.line((16 + 16 * k, 40), (16 + 16 * k, 264), color=(170, 170, 170), width=0.5)
        d.line((16, 40 + 16 * k), (240, 40 + 16 * k), color=(170, 170, 170), width=0.5)
    d.text(128, 22, "1  cut: 14 x 14 patches")
    d.text(128, 284, "img (B, 3, 224, 224)", 14, color=LINE)
    d.arrow((246, 152), (292, 152))
    for k, cell in enumerate(cells):
        d.paste(cell, 296 + 16 * (k % 14) - (k % 14 > 13), 40 + 16 * (k // 14), 13)
    d.text(408, 22, "2  each patch is a token")
    d.text(408, 284, "(B, 196, 768): 3 x 16 x 16 numbers", 14, color=LINE)
    d.arrow((524, 115), (552, 115))
    d.box(554, 90, 92, 50, "ViT", size=16)
    d.box(554, 164, 92, 50, "connector", size=14)
    d.arrow((600, 141), (600, 163))
    d.text(600, 22, "3  encode")
    d.text(600, 284, "(B, 196, C)", 14, color=LINE)
    d.arrow((647, 189), (676, 189))
    for k in range(3):
        d.box(678, 132 + 30 * k, 100, 24, f"token {k + 1}" if k < 2 else "token 196", IMAGE, 13)
    d.text(728, 230, "as wide as a word", 13, color=LINE)
    d.text(16, 326, "4  splice: T tokens with one <image> become T + 195", 15, "lm")
    row = [("<image>", 92, IMAGE), ("a", 40, PAPER), ("dog", 56, PAPER), ("runs", 62, PAPER)]
    x = 250
    for word, wide, fill in row:
        d.box(x, 346, wide, 30, word, fill)
        x += wide + 8
    d.text(232, 361, "idx (B, T)", 14, "rm", LINE)
    d.text(100, 449, "x (B, T + 195, C)", 14, color=LINE)
    x = 180
    d.line((250, 377), (x, 432))
    for k, word in enumerate(["1", "2", "3", "4", "5", "..", "194", "195", "196"]):
        if word == "..":
            d.text(x + 18, 449, word)
        else:
            d.box(x, 434, 36, 30, word, IMAGE, 13)
        x += 40
    d.line((342, 377), (x - 4, 432))
    for (word, wide, fill), start in zip(row[1:], (350, 398, 462)):
        d.line((start + wide / 2, 377), (x + 4 + wide / 2, 432), color=(170, 170, 170), width=1)
        d.box(x + 4, 434, wide, 30, word, fill)
        x += wide + 8
    return d.done()


def predictions():
    """A caption of four words is four predictions, and the causal mask is a triangle."""
    d, words, targets = Drawing(262), ["[start]", "a", "dog", "runs"], ["a", "dog", "runs", "[end]"]
    d.text(270, 20, "what may be read: idx (B, T)", 14, color=LINE)
    d.text(642, 20, "what comes next: targets (B, T)", 14, color=LINE)
    for t, word in enumerate(words):
        y = 40 + 54 * t
        d.text(60, y + 22, f"t = {t}", 14, color=LINE)
        for s, other in enumerate(words):
            d.box(100 + 88 * s, y, 82, 44, other if s <= t else "", IMAGE if s <= t else MASKED, edge=PAPER)
        d.arrow((460, y + 22), (556, y + 22))
        d.box(562, y, 160, 44, targets[t], TRAINED, edge=PAPER)
    return d.done()


def beams():
    """Beam search with two beams: the worked example of generate.py."""
    d = Drawing(248)
    d.text(60, 20, "read", 14, color=LINE)
    d.text(262, 20, "the 2 best words", 14, color=LINE)
    d.text(496, 20, "best ways to go on", 14, color=LINE)
    d.text(590, 20, "sum", 14, "lm", LINE)
    d.box(30, 106, 60, 34, "a")
    for y, word, log_p in ((72, "dog", "-0.2"), (174, "cat", "-1.9")):
        d.arrow((91, 123), (140, 123), (140, y + 17), (214, y + 17))
        d.text(178, y + 4, log_p, 13)
        d.box(216, y, 92, 34, word)
    ways = ((44, 89, ".", "-0.1", "-0.3", "finished: the best"), (108, 89, "runs", "-2.4", "-2.6", "stays open"),
            (174, 191, ".", "-0.3", "-2.2", "finished"))
    for y, start, word, log_p, total, what in ways:
        d.arrow((309, start), (370, start), (370, y + 17), (448, y + 17))
        d.text(410, y + 4, log_p, 13)
        d.box(450, y, 92, 34, word, TRAINED if word == "." else PAPER)
        d.text(590, y + 17, f"{total}   {what}", 14, "lm")
    return d.done()


# ---- figures of our commands

def show_batch(*options):
    """What `train.py --show-batch` prints -> rows of (kind, [token, ..])."""
    done = subprocess.run([sys.executable, "train.py", *options, "--show-batch", "--n-scenes", "3000"], cwd=ROOT,
                          text=True, stdout=subprocess.PIPE, check=True)
    rows = []
    for part in re.findall(r"(?:^(?:image|masked|trained) .*\n)+", done.stdout, flags=re.MULTILINE):
        # `|` parts the tokens, and stands in the names of tags, too
        lines = [(line[:8].strip(), re.findall(r"<\|\w+\|>|[^|]+", line[8:])) for line in part.splitlines()]
        rows.append(lines)
    return rows


def batch():
    """A batch of the prefix model, coloured by what the loss does with each token."""
    rows = show_batch("--model", "prefix")[:2] + show_batch("--task", "vqa", "--turns", "2", "--max-tokens", "96")[:2]
    d, hues, font = Drawing(600), {"image": IMAGE, "masked": MASKED, "trained": TRAINED}, ImageFont.load_default(28)
    x = 16
    for kind, what in (("image", "image tokens: nothing to predict"), ("masked", "given: no loss"),
                       ("trained", "trained: the loss is taken here")):
        d.box(x, 12, 20, 20, fill=hues[kind], edge=PAPER)
        d.text(x + 28, 22, what, 14, "lm")
        x += 64 + font.getlength(what) / 2
    y = 50
    for row in rows:
        x = 16
        for kind, token in ((kind, token) for kind, tokens in row for token in tokens):
            wide = font.getlength(token.strip()) / 2 + 10
            if x + wide > WIDE - 16:
                x, y = 16, y + 32
            d.box(x, y, wide, 26, token.strip(), hues[kind], 14, PAPER)
            x += wide + 4
        y += 50
    return d.done().crop((0, 0, WIDE, y - 12))


def captions_of(run, img):
    """Greedy captions, as rows of ids: what `sample.py --image` says."""
    end, first = run.config["end"], run.config["first"]
    return generate(run.model, img, [[first]] * len(img), run.config["max_tokens"], eos_id=end,
                    forbidden=forbidden_ids(run.tokenizer, end, run.model.config.text.vocab_size))


def best_photo(run, dataset, n=200):
    """Of the first n test photos the one whose caption CIDEr-D likes best, of those with at least six words."""
    members = dataset.splits["test"][:n]
    scorer = CiderD([[" ".join(tokenize(text)) for text in dataset.captions[i]] for i in members])
    best = (-1, members[0])
    for start in range(0, len(members), 20):
        part = members[start:start + 20]
        img = torch.stack([preprocess(dataset.open(i), run.recipe) for i in part])            # (b, 3, S, S)
        for k, ids in enumerate(captions_of(run, img)):
            text = " ".join(tokenize(run.tokenizer.decode(ids)))
            if 6 <= len(text.split()) <= 14:
                best = max(best, (scorer.score(text, start + k), part[k]))
    return best[1]


def attention(config):
    """A test photo, its caption, and for each word where the last block's cross-attention went."""
    run = load_run(config.photos)
    if run.config["model"] != "cross":
        raise UserError(f"{config.photos} holds no model with cross-attention; see train.py --model cross")
    dataset = load_dataset(DataConfig(run.config["options"]["dataset"], config.data_dir))
    if config.photo and config.photo not in dataset.names:
        raise UserError(f"{dataset.folder} holds no photo {config.photo}; names look like {dataset.names[0]}")
    i = dataset.names.index(config.photo) if config.photo else best_photo(run, dataset)
    photo = dataset.open(i)
    img = preprocess(photo, run.recipe)[None]                                     # (1, 3, S, S)
    ids, layer = captions_of(run, img)[0], run.model.text.blocks[-1].cross
    layer.keep_weights = True
    with torch.inference_mode():                                                  # place t chooses token t
        run.model(img, torch.tensor([[run.config["first"], *ids[:-1]]]))
    weights = layer.weights[0].mean(dim=0)                                        # (n_head, T, N) -> (T, N)
    words = []                                                                    # [(word, its tokens' weights), ..]
    for token, w in zip(ids, weights):
        text = run.tokenizer.decode([token])
        if words and not text.startswith(" "):
            words[-1] = (words[-1][0] + text, words[-1][1] + [w])
        else:
            words.append((text.strip(), [w]))
    sharp = replace(run.recipe, size=2 * run.recipe.size, resize=None)            # shown at twice what the model sees
    square, grid = to_pil(preprocess(photo, sharp), sharp), run.recipe.size // run.model.config.vision.patch_size
    maps = [torch.stack(w).mean(dim=0)[-grid * grid:] for _, w in words]          # each (patches,)
    pictures = [square] + [attention_over(square, w - w.min(), grid) for w in maps]     # from the least to the most
    sheet = caption_sheet(pictures, ["the photo", *(word for word, _ in words)], columns=5, side=146)
    figure = Image.new("RGB", (sheet.width, sheet.height + 44), PAPER)
    figure.paste(sheet, (0, 44))
    caption = run.tokenizer.decode(ids).strip()
    ImageDraw.Draw(figure).text((10, 14), f"\"{caption}\"", INK, ImageFont.load_default(20))
    print(f"{dataset.names[i]}: {caption}")
    return figure.quantize(192, Image.Quantize.MEDIANCUT).convert("RGB")


def similarity(config):
    """Twelve held-out scenes against their twelve sentences: similarity_picture, with the scenes beside it."""
    run = load_run(config.clip)
    options = run.config["options"]
    scenes = Shapes(options["n_objects"], options["n_scenes"], options["seed"])
    of_text = {scenes.captions[i][0]: i for i in scenes.splits["test"]}
    texts = [*of_text][:12]
    pictures = [scenes.open(of_text[text]) for text in texts]
    with torch.inference_mode():
        image_emb = run.model.encode_image(torch.stack([preprocess(picture, run.recipe) for picture in pictures]))
        sim = image_emb @ text_embeddings(run.model, run.tokenizer, texts).float().t()        # (12, 12)
    table = similarity_picture(sim, texts)
    figure = Image.new("RGB", (table.width + 52, table.height + 40), PAPER)
    figure.paste(table, (52, 40))
    pen, font = ImageDraw.Draw(figure), ImageFont.load_default(13)
    for k, picture in enumerate(pictures):
        figure.paste(picture.resize((40, 40), Image.Resampling.LANCZOS), (4, 42 + 44 * k))
        pen.text((52 + 200 + 44 * k + 22, 28), str(k + 1), INK, font, "mm")
    pen.text((4, 20), "image i, its own sentence", INK, font, "lm")
    pen.text((246, 10), "cosine with sentence", INK, font, "lm")
    return figure


def kept(run, name):
    """A picture that the run itself has drawn."""
    return Image.open(Path(run) / name).convert("RGB")


FIGURES = {                     # name: (the run it needs, how it is made)
    "bridges": (None, lambda config: bridges()), "patches": (None, lambda config: patches()),
    "predictions": (None, lambda config: predictions()), "beams": (None, lambda config: beams()),
    "batch": (None, lambda config: batch()), "attention": ("photos", attention), "similarity": ("clip", similarity),
    "samples": ("shapes", lambda config: kept(config.shapes, "samples.png")),
    "curves": ("shapes", lambda config: kept(config.shapes, "curves.png"))}


def train(name, out, data_dir):
    """The README's command for a run that is not there yet."""
    print(f"{out} holds no finished run: training it")
    data = ["--data-dir", str(Path(data_dir).resolve())] if data_dir and name == "photos" else []
    if subprocess.run([sys.executable, *TRAIN[name], *data, "--out-dir", out], cwd=ROOT).returncode:
        raise UserError(f"the run for --{name} ended early, see above; mend that, or name a finished one")


def main():
    config = parse_config(FigureConfig, description=__doc__.partition("\n")[0])
    wanted = config.only or list(FIGURES)
    if unknown := set(wanted) - FIGURES.keys():
        raise UserError(f"there is no figure {sorted(unknown)[0]}; there are {', '.join(FIGURES)}")
    for name in wanted:
        needs, make = FIGURES[name]
        if needs and not (is_run(getattr(config, needs)) and (Path(getattr(config, needs)) / "samples.png").exists()):
            train(needs, str(Path(getattr(config, needs)).resolve()), config.data_dir)
        path = ROOT / "figures" / f"{name}.png"
        write_image(path, make(config))
        print(f"wrote {path.relative_to(ROOT)}, {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    run_script(main)
