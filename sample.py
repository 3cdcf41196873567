"""Ask a trained model about your own pictures.

    python sample.py --image dog.jpg                            the likeliest caption, from the last run in out/
    python sample.py --image photos/ https://example.com/a.jpg  a folder, an address: any mixture
    python sample.py --image dog.jpg --num-beams 3              search for the best whole sentence
    python sample.py --image dog.jpg --temperature 0.8 --top-p 0.9 --seed 7
    python sample.py --image dog.jpg --attention look.png       where each word looked

Everything about the model (sizes, tokenizer, how images are prepared) comes with the run; no flag has to be repeated.
"""
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from data import IMAGE_TYPES
from tinyvlm.config import UserError, option, parse_config, run_script
from tinyvlm.download import download
from tinyvlm.draw import attention_over, caption_sheet
from tinyvlm.generate import generate
from tinyvlm.image import load_image, preprocess, to_pil
from tinyvlm.pretrained import load_run
from tinyvlm.weights import atomic_write

MAX_IMAGE_BYTES = 50_000_000        # more than any photograph; less than what would fill a disk


@dataclass
class SampleConfig:
    image: list[str] = option([], "image files, folders of images, or http(s) addresses")
    out_dir: str = option("out", "the run to use")
    prompt: str = option("", "words the caption should begin with")
    temperature: float = option(0.0, "0 takes the likeliest word each time; towards 1 and above, more adventurous")
    top_k: int | None = option(None, "draw only among this many likeliest words")
    top_p: float | None = option(None, "draw only among the likeliest words that together have this probability")
    num_beams: int = option(1, "search this many sentences at once for the likeliest whole; 3 is a good value")
    length_penalty: float = option(1.0, "beams: above 1 favours long captions, below 1 short ones")
    max_tokens: int | None = option(None, "longest caption; default: as in training")
    seed: int | None = option(None, "makes drawing repeatable")
    batch_size: int = option(16, "images captioned together")
    json: bool = option(False, "one json object a line on stdout: image and caption")
    attention: str | None = option(None, "cross model: draw where each word of the first caption looked, into this PNG")
    device: str = option("cpu", "cpu, cuda or mps; for a few images the cpu is quick enough")


def gather(sources):
    """Files, folders and addresses -> [(name, PIL image)], and the faults of files that are no images.

    A folder's broken files are reported and passed over; a file named on the command line must be good.
    """
    images, faults = [], []
    for source in sources:
        if source.startswith(("http://", "https://")):
            images.append((source, fetch(source)))
        elif Path(source).is_dir():
            paths = sorted(p for p in Path(source).iterdir() if p.suffix.lower() in IMAGE_TYPES)
            if not paths:
                raise UserError(f"the folder {source} holds no images ({', '.join(IMAGE_TYPES)})")
            for path in paths:
                try:
                    images.append((str(path), load_image(path)))
                except UserError as error:
                    faults.append(str(error))
        else:
            images.append((source, load_image(source)))
    if not images:
        raise UserError(faults[0] if faults else "name at least one picture: python sample.py --image dog.jpg")
    return images, faults


def fetch(url):
    """The image at an address, size- and time-limited."""
    with tempfile.TemporaryDirectory() as folder:
        path = download(url, Path(folder) / "image", max_bytes=MAX_IMAGE_BYTES, max_seconds=60, show=False)
        return load_image(path.read_bytes(), name=url)


def start_of(run, prompt):
    """The ids a caption starts from: the start token (or <image>), then the user's words, never read as special tokens."""
    ids = [run.config["first"]] + (run.tokenizer.encode(prompt, special=False) if prompt else [])
    room = run.config["max_tokens"]
    if len(ids) > room:
        raise UserError(f"the prompt has {len(ids) - 1} tokens, but a caption of this model has at most {room - 1}; shorten it")
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
    sheet = caption_sheet([square, *pictures], ["what the model saw", *(run.tokenizer.decode([i]) for i in ids)], columns=6)
    atomic_write(path, lambda file: sheet.save(file, "PNG"))


def main():
    config = parse_config(SampleConfig, description="Caption pictures with a trained model.")
    if config.num_beams > 1 and config.temperature > 0:
        raise UserError("beam search does not draw: give --num-beams or --temperature, not both")
    run = load_run(config.out_dir)
    if run.config["task"] != "caption":
        raise UserError(f"the run in {config.out_dir} was trained for --task {run.config['task']}, not to caption images")
    images, faults = gather(config.image)
    prompt = start_of(run, config.prompt)
    max_tokens = min(config.max_tokens or run.config["max_tokens"], run.config["max_tokens"] + 1 - len(prompt))
    run.model.to(config.device)
    for start in range(0, len(images), config.batch_size):
        part = [image for _, image in images[start:start + config.batch_size]]
        img = torch.stack([preprocess(image, run.recipe) for image in part]).to(config.device)     # (B, 3, S, S)
        rows = generate(run.model, img, [prompt] * len(part), max_tokens, config.temperature, config.top_k, config.top_p,
                        config.num_beams, run.config["end"], config.length_penalty,
                        None if config.seed is None else config.seed + start)
        for (name, _), ids in zip(images[start:], rows):
            caption = run.tokenizer.decode(prompt[1:] + ids).strip()
            print(json.dumps({"image": name, "caption": caption}) if config.json else f"{name}: {caption}")
        if config.attention and start == 0:
            draw_attention(run, img[:1], prompt[1:] + rows[0], config.attention)
    for fault in faults:
        print(f"left out: {fault}", file=sys.stderr)


if __name__ == "__main__":
    run_script(main)
