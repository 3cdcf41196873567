"""Use a trained model on your own pictures.

    python sample.py --image dog.jpg                            the likeliest caption, by the last run in out/
    python sample.py --image photos/ https://example.com/a.jpg  a folder, an address: any mixture
    python sample.py --image dog.jpg --num-beams 3              search for the best whole sentence
    python sample.py --image dog.jpg --temperature 0.8 --top-p 0.9 --seed 7
    python sample.py --image dog.jpg --attention attention.png  which places each word attended to
    python sample.py --image dog.jpg --pretrained nlpconnect/vit-gpt2-image-captioning    no training at all
    python sample.py --serve                                    all of this in your browser, for any run

    python sample.py --image kitchen.jpg --prompt "What color is the fridge?" "Is there a cat?"      --task vqa
    python sample.py --image dog.jpg --labels "a dog" "a cat"   which fits, with probabilities       --task clip
    python sample.py --search "two dogs in snow" --images photos/    the best pictures of a folder   --task clip

Everything about the model (sizes, tokenizer, how images are prepared) comes with the run; no flag has to be repeated.
"""
import base64
import io
import json
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from tinyvlm.config import UserError, flag_name, option, parse_config, run_script
from tinyvlm.device import check_device
from tinyvlm.download import download
from tinyvlm.draw import attention_over, caption_sheet
from tinyvlm.files import list_images, write_image
from tinyvlm.image import load_image, open_batches, to_pil
from tinyvlm.pretrained import load_pretrained, load_run
from tinyvlm.serve import MAX_BYTES, serve
from tinyvlm.use import attention, captions, embed_images, find, how_to_read, open_texts, ranker, reply, words_attended


@dataclass
class SampleConfig:
    """The options; the file's header shows the usual combinations."""
    image: list[str] = option([], "image files, folders of images, or http(s) addresses", group="what matters first")
    out_dir: str = option("out", "the run to use")
    pretrained: str | None = option(None, "use this public captioner or CLIP (a Hub id or a folder) instead of a run")
    serve: bool = option(False, "a page to use the model in your browser")
    prompt: list[str] = option([], "a caption run: words to begin with; a vqa run: one or more questions")
    labels: list[str] = option([], "a clip run: phrases to choose from, or one file with a phrase on each line")
    search: str | None = option(None, "a clip run: words to search for among --images")
    images: str | None = option(None, "the folder that --search goes through")
    num_beams: int = option(1, "search this many sentences at once for the likeliest whole; 3 is a good value", above=0)
    temperature: float = option(0.0, "0 takes the likeliest word each time; 1 draws by probability", least=0, below=1e4)
    top_k: int | None = option(None, "draw only among this many likeliest words", above=0, group="captions and answers")
    top_p: float | None = option(None, "draw only among the likeliest words with this probability together", above=0)
    length_penalty: float = option(1.0, "beams: above 1 favours long captions, below 1 short ones", least=-9, below=100)
    max_tokens: int | None = option(None, "longest caption or answer; at most as in training", above=0)
    seed: int | None = option(None, "makes drawing repeatable (for the same --batch-size)", least=0, below=2 ** 32)
    attention: str | None = option(None, "cross model: draw where the first caption's words attended, into this PNG")
    hits: int = option(12, "how many labels or pictures to show", above=0, group="labels and search")
    sheet: str = option("out/search.png", "where --search draws what it found")
    host: str = option("127.0.0.1", "the address that --serve listens at; 0.0.0.0: of every network", group="details")
    port: int = option(8000, "its port; 0 takes a free one", least=0, below=2 ** 16)
    json: bool = option(False, "one json object a line on stdout")
    batch_size: int = option(16, "images captioned together", above=0)
    device: str = option("cpu", "cpu, cuda or mps; for a few images the cpu is quick enough")


# ---- pictures in, lines out

def open_image(name):
    """A file or an address -> RGB PIL image. Raises UserError."""
    if not name.startswith(("http://", "https://")):
        return load_image(name)
    with tempfile.TemporaryDirectory() as folder:
        path = download(name, Path(folder) / "image", max_bytes=MAX_BYTES, max_seconds=60)
        return load_image(path.read_bytes(), name=name)


def inputs(run, config, batch_size):
    """Yields (names, what the model takes): (b, 3, S, S), or features (b, D), a batch at a time.

    What cannot be read is reported and left out. Raises UserError if nothing is left.
    """
    names, broken, (prepare, batch) = [], {}, how_to_read(run, config)
    for source in config.image:
        names += [str(Path(source) / name) for name in list_images(source)] if Path(source).is_dir() else [source]
    for part in open_batches(names, lambda name: prepare(open_image(name)), batch_size, broken):
        if part:
            yield [name for name, _ in part], batch([value for _, value in part]).to(config.device)
    if len(broken) == len(set(names)):
        none = f"--image {config.image[0]} is a folder without images" if config.image else (
            "name at least one picture: python sample.py --image dog.jpg")
        raise UserError(next(iter(broken.values()), none))
    for reason in broken.values():
        print(f"left out: {reason}", file=sys.stderr)


class Lines:
    """A line on stdout for each result, or with --json an object. On a terminal (live) a line is seen as it grows."""

    def __init__(self, config):
        self.json, self.live, self.shown = config.json, sys.stdout.isatty() and not config.json, ""

    def grow(self, line):
        print(line[len(self.shown):], end="", flush=True)
        self.shown = line

    def end(self, line, row):
        print(json.dumps(row) if self.json else line[len(self.shown):], flush=True)
        self.shown = ""


# ---- captions and answers

def caption(run, config):
    """A caption run: a caption for each image."""
    out = Lines(config)
    for k, (names, img) in enumerate(inputs(run, config, config.batch_size)):
        say = (lambda text: out.grow(f"{names[0]}: {text}")) if out.live and len(names) == 1 else None
        rows = captions(run, config, img, None if config.seed is None else config.seed + k, say)
        for name, ids in zip(names, rows):
            text = run.tokenizer.decode(ids).strip()
            out.end(f"{name}: {text}", {"image": name, "caption": text})
        if config.attention and k == 0:
            draw_attention(run, img[:1], rows[0] or [run.config["end"]], config.attention)


def draw_attention(run, img, ids, path):
    """A picture of the image per token, lit where the model attended, into the PNG `path`. img, ids: see attention."""
    weights = attention(run, img, ids)
    if weights is None:
        raise UserError("--attention draws cross-attention over pixels; this run's model has none (--model cross has)")
    square, side = to_pil(img[0], run.recipe), run.recipe.size // run.model.config.vision.patch_size
    pictures = [square] + [attention_over(square, w, side) for w in weights]
    texts = ["what the model sees", *(run.tokenizer.decode([i]) for i in ids)]
    write_image(path, caption_sheet(pictures, texts, columns=6))


def answer(run, config):
    """A vqa run: every question about every image."""
    if not config.prompt:
        raise UserError('this run answers questions: give some with --prompt "What color is it?"')
    out = Lines(config)
    for (name,), img in inputs(run, config, 1):                 # (1, 3, S, S)
        for question in config.prompt:
            start = f"{name}: {question}  "
            say = (lambda text: out.grow(start + text)) if out.live else None
            text = reply(run, config, img, [(question, None)], say)
            out.end(start + text, {"image": name, "question": question, "answer": text})


# ---- labels and search

def read_labels(labels):
    """--labels: phrases, or one file that holds one on each line."""
    try:
        if len(labels) == 1:
            return [line.strip() for line in Path(labels[0]).read_text("utf-8-sig").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError):
        pass
    return labels


def compare(run, config):
    """A clip run: labels for images, or images for words."""
    out = Lines(config)
    if config.search is not None:
        hits = find(run, config, config.search)
        for name, score in hits:
            out.end(f"{score:.3f}  {name}", {"image": name, "score": score})
        pictures = [load_image(Path(config.images) / name) for name, _ in hits]
        write_image(config.sheet, caption_sheet(pictures, [f"{score:.3f} {name}" for name, score in hits]))
        return print(f"{config.sheet} shows them", file=sys.stderr)
    if not config.labels:
        raise UserError('this run compares pictures and sentences: give --labels "a dog" "a cat", or --search WORDS')
    rank = ranker(run, config, read_labels(config.labels))
    for names, img in inputs(run, config, config.batch_size):
        for name, best in zip(names, rank(img)):
            line = ", ".join(f"{label} {p:.1%}" for label, p in best.items())
            out.end(f"{name}: {line}", {"image": name, "labels": best})


# ---- a page in the browser

SLIDERS = {"temperature": (0, 2, 0.05), "top_p": (0.05, 1, 0.05), "num_beams": (1, 8, 1)}          # from, to, step


def settings(config, asked):
    """The options, with what the page asks for in its place. Raises UserError for what no page of ours asks."""
    kinds = {**dict.fromkeys(SLIDERS, (int, float)), "prompt": list, "labels": list, "search": str}
    for name, value in asked.items():
        low, high, _ = SLIDERS.get(name, (0, 0, 0))
        if not isinstance(value, kinds.get(name, ())) or not (
                low <= value <= high if name in SLIDERS else all(isinstance(text, str) for text in value)):
            raise UserError(f"the request's {name[:20]!r} does not fit this model; load the page again")
    now = replace(config, **asked)
    if now.temperature > 0:                                     # beams are not drawn, and only draws are limited
        return replace(now, num_beams=1)
    return replace(now, num_beams=int(now.num_beams), top_k=None, top_p=None)


def thumbnail(path):
    """A small copy of a picture as an address that holds it: data:image/jpeg;base64,.."""
    image, file = load_image(path), io.BytesIO()
    image.thumbnail((320, 320))
    image.save(file, "JPEG")
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def page(run, config):
    """What --serve serves: about, what the page should know of the run; and act(asked, data, send), which does what it
    asks for. asked: {option: value}, for a vqa run in "prompt" the dialogue: question, answer, .., question; data: the
    picture's bytes; send(row): called with results, and before them with texts as they are made."""
    task, recipe, (prepare, batch) = run.config["task"], run.recipe, how_to_read(run, config)
    if task == "clip":
        open_texts(run, config)
    share = recipe.size / (recipe.resize or recipe.size)        # of the picture that the model sees
    about = {"task": task, "run": config.pretrained or config.out_dir, "mode": recipe.mode, "share": share,
             "images": len(embed_images(run, config)[0]) if config.images else 0, "max_bytes": MAX_BYTES,
             "turns": run.config["options"].get("turns", 1),
             "sliders": {name: [*row, getattr(config, name)] for name, row in SLIDERS.items() if task != "clip"}}

    def act(asked, data, send):
        now = settings(config, asked)
        if task == "clip" and now.search:
            return send({"hits": [{"image": name, "score": score, "picture": thumbnail(Path(config.images) / name)}
                                  for name, score in find(run, now, now.search)]})
        img = batch([prepare(load_image(data, "the picture"))]).to(config.device)
        if task == "clip":
            return send({"labels": ranker(run, now, now.labels)(img)[0]})
        say = lambda text: send({"text": text})
        if task == "vqa":
            if len(now.prompt) % 2 == 0:
                raise UserError("there is no question; ask one")
            turns = list(zip(now.prompt[::2], [*now.prompt[1::2], None]))
            return send({"answer": reply(run, now, img, turns, say)})
        ids = captions(run, now, img, now.seed, say)[0]
        send({"caption": run.tokenizer.decode(ids).strip(), "words": words_attended(run, img, ids)})
    return about, act


MODES = {"caption": caption, "vqa": answer, "clip": compare}


def main():
    """Load the run or checkpoint, then do what it was trained for: MODES; or serve the page that does."""
    config = parse_config(SampleConfig, description=__doc__.partition("\n")[0])
    drawing = config.temperature > 0
    if drawing and config.num_beams > 1 or not drawing and (config.top_k or config.top_p):
        raise UserError("--top-k and --top-p need a --temperature above 0, and --num-beams must have none")
    if config.serve and (given := config.given & {"image", "prompt", "labels", "search", "attention", "json"}):
        raise UserError(f"{flag_name(min(given))} is for the terminal, --serve asks for all that on its page: drop one")
    check_device(config.device)
    where = config.pretrained or config.out_dir
    run = load_pretrained(where) if config.pretrained else load_run(where)
    task = run.config["task"]
    if task not in MODES:
        raise UserError(f"{where} was trained for --task {task}, which sample.py has no use for; train.py "
                        f"--{'text' if task == 'text' else 'vision'} {where} starts another model from it")
    if (config.labels or config.search or config.images) and task != "clip":
        raise UserError(f"{where} is a {task} model: --labels, --search and --images are for clip")
    run.model.to(config.device)
    if config.serve:
        return serve(*page(run, config), config.host, config.port)
    MODES[task](run, config)


if __name__ == "__main__":
    run_script(main)
