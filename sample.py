"""Ask a trained model about your own pictures.

    python sample.py --image dog.jpg                            the likeliest caption, from the last run in out/
    python sample.py --image photos/ https://example.com/a.jpg  a folder, an address: any mixture
    python sample.py --image dog.jpg --num-beams 3              search for the best whole sentence
    python sample.py --image dog.jpg --temperature 0.8 --top-p 0.9 --seed 7
    python sample.py --image dog.jpg --attention look.png       where each word looked
    python sample.py --image dog.jpg --pretrained nlpconnect/vit-gpt2-image-captioning    no training at all

Everything about the model (sizes, tokenizer, how images are prepared) comes with the run; no flag has to be repeated.
"""
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from data import CLEAN
from tinyvlm.config import UserError, option, parse_config, run_script
from tinyvlm.download import download
from tinyvlm.draw import attention_over, caption_sheet
from tinyvlm.generate import generate
from tinyvlm.image import load_image, preprocess, to_pil
from tinyvlm.layouts import IMAGE_TYPES
from tinyvlm.pretrained import load_pretrained, load_run
from tinyvlm.weights import atomic_write

MAX_IMAGE_BYTES = 50_000_000        # more than any photograph; less than what would fill a disk


@dataclass
class SampleConfig:
    """The options; the file's header shows the usual combinations."""
    image: list[str] = option([], "image files, folders of images, or http(s) addresses")
    out_dir: str = option("out", "the run to use")
    pretrained: str | None = option(None, "use this public captioner (a Hub id or a folder) instead of a run")
    allow_pickle: bool = option(False, "with --pretrained: also read a .bin file, unpickling plain tensors only")
    prompt: str = option("", "words the caption should begin with")
    temperature: float = option(0.0, "0 takes the likeliest word each time; towards 1 and above, more adventurous")
    top_k: int | None = option(None, "draw only among this many likeliest words")
    top_p: float | None = option(None, "draw only among the likeliest words that together have this probability")
    num_beams: int = option(1, "search this many sentences at once for the likeliest whole; 3 is a good value")
    length_penalty: float = option(1.0, "beams: above 1 favours long captions, below 1 short ones")
    max_tokens: int | None = option(None, "longest caption; default, and most: as in training")
    seed: int | None = option(None, "makes drawing repeatable (for the same --batch-size)")
    batch_size: int = option(16, "images captioned together")
    json: bool = option(False, "one json object a line on stdout: image and caption")
    attention: str | None = option(None, "cross model: draw where each word of the first caption looked, into this PNG")
    device: str = option("cpu", "cpu, cuda or mps; for a few images the cpu is quick enough")


def gather(sources):
    """Files, folders and addresses -> [(name, must it be good?)]: a folder may hold a broken file."""
    names = []
    for source in sources:
        if source and not source.startswith(("http://", "https://")) and Path(source).is_dir():
            paths = sorted(p for p in Path(source).iterdir() if p.suffix.lower() in IMAGE_TYPES)
            if not paths:
                raise UserError(f"the folder {source} holds no images ({', '.join(IMAGE_TYPES)})")
            names += [(str(path), False) for path in paths]
        else:
            names.append((source, True))
    if not names:
        raise UserError("name at least one picture: python sample.py --image dog.jpg")
    return names


def open_batches(names, batch_size):
    """Decode one batch at a time: yields lists of (name, PIL image). Says what it leaves out."""
    batch, good = [], 0
    for name, must in names:
        try:
            batch.append((name, fetch(name) if name.startswith(("http://", "https://")) else load_image(name)))
            good += 1
        except UserError as error:
            if must:
                raise
            print(f"left out: {error}", file=sys.stderr)
        if len(batch) == batch_size:
            yield batch
            batch = []
    if batch:
        yield batch
    if not good:
        raise UserError("none of the images could be read; the lines above say why")


def fetch(url):
    """The image at an address, size- and time-limited."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            path = download(url, Path(folder) / "image", max_bytes=MAX_IMAGE_BYTES, max_seconds=60, show=False)
        except UserError as error:
            raise UserError(str(error).partition("; try again")[0] + "; check the address, or save the image and name "
                            "the file") from None
        return load_image(path.read_bytes(), name=url)


def start_of(run, prompt):
    """The ids a caption starts from: the start token (or <image>), then the user's words, never read as tags."""
    clean = CLEAN[run.config.get("clean", "none")]              # words as the model met them in training
    ids = [run.config["first"]] + (run.tokenizer.encode(clean(prompt), special=False) if prompt else [])
    room = run.config["max_tokens"]
    if len(ids) > room:
        raise UserError(f"the prompt has {len(ids) - 1} tokens, but a caption of this model at most {room - 1}; "
                        "shorten it")
    return ids


def draw_attention(run, img, ids, path):
    """A picture of the image per word, lit where the last block's cross-attention looked while choosing that word."""
    if run.config["model"] != "cross":
        raise UserError("--attention draws cross-attention; this run's model has none (--model cross has)")
    layer = run.model.text.blocks[-1].cross
    layer.keep_weights = True
    row = torch.tensor([[run.config["first"]] + ids[:-1]], device=img.device)
    with torch.inference_mode():
        run.model(img, row)
    layer.keep_weights = False
    weights = layer.weights[0].mean(dim=0)                      # (n_head, T, N) -> (T, N), the mean of the heads
    vision = run.config["sizes"]["vision"]
    size = run.recipe.size
    square = to_pil(img[0], run.recipe)
    pictures = [attention_over(square, w, size // vision["patch_size"]) for w in weights]
    words = [run.tokenizer.decode([i]) for i in ids]
    sheet = caption_sheet([square, *pictures], ["what the model saw", *words], columns=6)
    atomic_write(path, lambda file: sheet.save(file, "PNG"))


def check_options(c):
    """Numbers that mean nothing are refused before anything is loaded."""
    draws = c.temperature > 0
    for holds, sentence in (
            (0 <= c.temperature < 1e4, f"--temperature must be 0 or above, not {c.temperature}"),
            (c.top_k is None or c.top_k > 0, f"--top-k must be above 0, not {c.top_k}"),
            (c.top_p is None or 0 < c.top_p <= 1, f"--top-p is a probability above 0 and at most 1, not {c.top_p}"),
            (c.num_beams > 0, f"--num-beams must be above 0, not {c.num_beams}"),
            (c.batch_size > 0, f"--batch-size must be above 0, not {c.batch_size}"),
            (c.max_tokens is None or c.max_tokens > 0, f"--max-tokens must be above 0, not {c.max_tokens}"),
            (abs(c.length_penalty) < 100, f"--length-penalty must be an ordinary number, not {c.length_penalty}"),
            (c.seed is None or 0 <= c.seed < 2 ** 32, f"--seed must be between 0 and 2^32, not {c.seed}"),
            (not (draws and c.num_beams > 1), "beam search does not draw: give --num-beams or --temperature, not both"),
            (draws or (c.top_k is None and c.top_p is None), "--top-k and --top-p need a --temperature above 0"),
            (c.device in ("cpu", "mps") or c.device.startswith("cuda"), f"--device {c.device} is not cpu, cuda or mps"),
            (c.device[:4] != "cuda" or torch.cuda.is_available(), "--device cuda: PyTorch sees no such device"),
            (c.device != "mps" or torch.backends.mps.is_available(), "--device mps: PyTorch sees no such device")):
        if not holds:
            raise UserError(sentence)


def main():
    """Load, gather, decode in batches, print."""
    config = parse_config(SampleConfig, description="Caption pictures with a trained model.")
    check_options(config)
    run = load_pretrained(config.pretrained, allow_pickle=config.allow_pickle) if config.pretrained else \
        load_run(config.out_dir)
    if run.config["task"] != "caption":
        raise UserError(f"{config.pretrained or config.out_dir} was trained for --task {run.config['task']}, not to "
                        "caption images")
    names = gather(config.image)
    prompt = start_of(run, config.prompt)
    max_tokens = min(config.max_tokens or run.config["max_tokens"], run.config["max_tokens"] + 1 - len(prompt))
    run.model.to(config.device)
    for start, batch in enumerate(open_batches(names, config.batch_size)):
        img = torch.stack([preprocess(image, run.recipe) for _, image in batch]).to(config.device)     # (B, 3, S, S)
        rows = generate(run.model, img, [prompt] * len(batch), max_tokens, config.temperature, config.top_k,
                        config.top_p, config.num_beams, run.config["end"], config.length_penalty,
                        None if config.seed is None else config.seed + start)
        for (name, _), ids in zip(batch, rows):
            caption = run.tokenizer.decode(prompt[1:] + ids).strip()
            print(json.dumps({"image": name, "caption": caption}) if config.json else f"{name}: {caption}")
        if config.attention and start == 0:
            draw_attention(run, img[:1], prompt[1:] + rows[0], config.attention)


if __name__ == "__main__":
    run_script(main)
