"""Ask a trained model about your own pictures.

    python sample.py --image dog.jpg                            the likeliest caption, from the last run in out/
    python sample.py --image photos/ https://example.com/a.jpg  a folder, an address: any mixture
    python sample.py --image dog.jpg --num-beams 3              search for the best whole sentence
    python sample.py --image dog.jpg --temperature 0.8 --top-p 0.9 --seed 7
    python sample.py --image dog.jpg --attention look.png       where each word looked
    python sample.py --image dog.jpg --pretrained nlpconnect/vit-gpt2-image-captioning    no training at all

    a run of --task vqa
    python sample.py --image kitchen.jpg --prompt "What color is the fridge?" "Is there a cat?"
    python sample.py --image kitchen.jpg --chat                 question after question, each knows the ones before

    a run of --task clip, or --pretrained openai/clip-vit-base-patch32
    python sample.py --image dog.jpg --labels "a dog" "a cat"   which of these fits, with probabilities
    python sample.py --image dog.jpg --captions captions.txt    which line of a file fits best
    python sample.py --search "two dogs in snow" --images photos/    the best pictures of a folder, and a sheet of them

Everything about the model (sizes, tokenizer, how images are prepared) comes with the run; no flag has to be repeated.
"""
import hashlib
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from data import CLEAN, check_device
from tinyvlm.config import UserError, option, parse_config, run_script
from tinyvlm.download import download
from tinyvlm.draw import attention_over, caption_sheet
from tinyvlm.features import Encoder, read_features
from tinyvlm.generate import generate
from tinyvlm.image import load_image, preprocess, to_pil
from tinyvlm.layouts import IMAGE_TYPES, list_images
from tinyvlm.pretrained import load_clip, load_pretrained, load_run
from tinyvlm.search import (TEMPLATES, classify, embed_folder, label_embeddings, search, text_embeddings)
from tinyvlm.vqa import encode_dialogue
from tinyvlm.weights import atomic_write

MAX_IMAGE_BYTES = 50_000_000        # more than any photograph; less than what would fill a disk


@dataclass
class SampleConfig:
    """The options; the file's header shows the usual combinations."""
    image: list[str] = option([], "image files, folders of images, or http(s) addresses")
    out_dir: str = option("out", "the run to use")
    pretrained: str | None = option(None, "use this public captioner (a Hub id or a folder) instead of a run")
    features: str | None = option(None, "for a run on ready-made features whose encoder is not at hand: the file to "
                                        "look the images up in, by name")
    allow_pickle: bool = option(False, "with --pretrained: also read a .bin file, unpickling plain tensors only")
    prompt: list[str] = option([], "a caption run: words to begin with; a vqa run: one or more questions")
    chat: bool = option(False, "vqa: ask on and on about one image; an empty line ends it")
    labels: list[str] = option([], "clip: phrases to choose from, or one file with a phrase on each line")
    template: list[str] = option(list(TEMPLATES), "clip: sentences that labels are put into, at {}")
    captions: str | None = option(None, "clip: a file of sentences, one a line: which fits each image best?")
    search: str | None = option(None, "clip: words to look for among --images")
    images: str | None = option(None, "clip: the folder that --search looks through")
    hits: int = option(12, "clip: how many to show")
    sheet: str = option("out/search.png", "clip: where --search draws what it found")
    temperature: float = option(0.0, "0 takes the likeliest word each time; towards 1 and above, more adventurous")
    top_k: int | None = option(None, "draw only among this many likeliest words")
    top_p: float | None = option(None, "draw only among the likeliest words that together have this probability")
    num_beams: int = option(1, "search this many sentences at once for the likeliest whole; 3 is a good value")
    length_penalty: float = option(1.0, "beams: above 1 favours long captions, below 1 short ones")
    guidance: float | None = option(None, "captions: above 0 says more of what is particular to the image; default: as "
                                          "the run was trained to")
    max_tokens: int | None = option(None, "longest caption or answer; default, and most: as in training")
    seed: int | None = option(None, "makes drawing repeatable (for the same --batch-size)")
    batch_size: int = option(16, "images captioned together")
    json: bool = option(False, "one json object a line on stdout: image and caption")
    attention: str | None = option(None, "cross model: draw where each word of the first caption looked, into this PNG")
    device: str = option("cpu", "cpu, cuda or mps; for a few images the cpu is quick enough")


def gather(sources):
    """Files, folders and addresses -> [(name, must it be good?), ..]: only inside a folder may a file be broken."""
    names = []
    for source in sources:
        if source and not source.startswith(("http://", "https://")) and Path(source).is_dir():
            inside = list_images(source)                        # and below it, as --search does
            if not inside:
                raise UserError(f"the folder {source} holds no images ({', '.join(IMAGE_TYPES)})")
            names += [(str(Path(source) / name), False) for name in inside]
        else:
            names.append((source, True))
    if not names:
        raise UserError("name at least one picture: python sample.py --image dog.jpg")
    return names


def open_batches(names, batch_size, by_name=False):
    """Decode one batch at a time: yields lists of (name, PIL image), or with by_name of (name, None).

    What cannot be read is said and left out, or a UserError if it had to be good or nothing else is.
    """
    batch, good = [], 0
    for name, must in names:
        try:
            web = name.startswith(("http://", "https://"))
            batch.append((name, None if by_name else fetch(name) if web else load_image(name)))
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
    """The PIL image at an address: at most MAX_IMAGE_BYTES, within 60 seconds. Raises UserError."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            path = download(url, Path(folder) / "image", max_bytes=MAX_IMAGE_BYTES, max_seconds=60, show=False)
        except UserError as error:
            raise UserError(str(error).partition("; try again")[0] + "; check the address, or save the image and name "
                            "the file") from None
        return load_image(path.read_bytes(), name=url)


class Pixels:
    """Images -> what a model trained on pixels takes."""

    def __init__(self, run):
        self.recipe = run.recipe

    def __call__(self, batch):
        """[(name, PIL image), ..] -> (B, 3, S, S)."""
        return torch.stack([preprocess(image, self.recipe) for _, image in batch])


class Features:
    """Images -> what a model trained on ready-made features takes: encoded here, or looked up by name."""

    def __init__(self, run, config):
        about = run.config["features"]
        self.encoder, self.known = None, None
        if config.features:
            self.known = read_features(config.features)                           # {name: (D,) or (N, D)}
            dim = next(iter(self.known.values())).size(-1)
            if dim != about["dim"]:
                raise UserError(f"{config.features} has vectors of {dim} numbers; the run learned from {about['dim']}")
        elif about["source"]:
            self.encoder = Encoder(about["source"], about["grid"], config.device)
        else:
            raise UserError(f"this run sees through features of {about['encoder']!r}, a network that is not at hand: "
                            "give the file that holds the features of these images with --features")

    def __call__(self, batch):
        """[(name, PIL image), ..] -> (B, D) or (B, N, D). Raises UserError for a name that the file lacks."""
        if self.encoder:
            return self.encoder([image for _, image in batch])
        feats = [self.known.get(name, self.known.get(Path(name).name)) for name, _ in batch]
        for x, (name, _) in zip(feats, batch):
            if x is None:
                raise UserError(f"--features holds nothing for {name}; it knows images by file name only")
        return torch.stack(feats).float()                                         # float16 on disk


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
    """A picture of the image per word, lit where the last block's cross-attention looked while choosing that word.

    img (1, 3, S, S); ids: the caption without its start token; path: the PNG to write.
    """
    if run.config["model"] != "cross" or run.config.get("features"):
        raise UserError("--attention draws cross-attention over pixels; this run's model has none (--model cross has)")
    layer = run.model.text.blocks[-1].cross
    layer.keep_weights = True
    row = torch.tensor([[run.config["first"]] + ids[:-1]], device=img.device)     # (1, T): place t chooses word t
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
    """Numbers that mean nothing, and options of which one is ignored, are refused before anything is loaded."""
    draws, asked = c.temperature > 0, [bool(c.labels), c.captions is not None, c.search is not None]
    for holds, sentence in (
            (c.temperature == 0 or 1e-4 < c.temperature < 1e4, "--temperature must be 0, or a number such as 0.8, not "
             f"{c.temperature}"),
            (c.top_k is None or c.top_k > 0, f"--top-k must be above 0, not {c.top_k}"),
            (c.top_p is None or 0 < c.top_p <= 1, f"--top-p is a probability above 0 and at most 1, not {c.top_p}"),
            (c.num_beams > 0, f"--num-beams must be above 0, not {c.num_beams}"),
            (c.hits > 0, f"--hits must be above 0, not {c.hits}"),
            (c.batch_size > 0, f"--batch-size must be above 0, not {c.batch_size}"),
            (c.max_tokens is None or c.max_tokens > 0, f"--max-tokens must be above 0, not {c.max_tokens}"),
            (abs(c.length_penalty) < 100, f"--length-penalty must be an ordinary number, not {c.length_penalty}"),
            (c.guidance is None or 0 <= c.guidance < 100, f"--guidance must be 0 or a little above, not {c.guidance}"),
            (c.seed is None or 0 <= c.seed < 2 ** 32, f"--seed must be between 0 and 2^32, not {c.seed}"),
            (not (draws and c.num_beams > 1), "beam search does not draw: give --num-beams or --temperature, not both"),
            (draws or (c.top_k is None and c.top_p is None), "--top-k and --top-p need a --temperature above 0"),
            (sum(asked) < 2, "--labels, --captions and --search are three questions: ask one at a time"),
            (c.search is None or not c.image, "--search looks through --images, a folder: drop --image"),
            (asked[2] or not c.given & {"images", "sheet"}, "--images and --sheet go with --search; without it, name "
             "the folder with --image"),
            (asked[0] or "template" not in c.given, "--template goes with --labels")):
        if not holds:
            raise UserError(sentence)
    check_device(c.device)


def speak(run, config):
    """A caption run: a caption for each image."""
    if len(config.prompt) > 1:
        raise UserError("a caption begins only one way: give one --prompt (several questions are for --task vqa)")
    prompt = start_of(run, config.prompt[0] if config.prompt else "")
    # the user's words are part of the longest caption; prompt[0], the start token, is not
    max_tokens = min(config.max_tokens or run.config["max_tokens"], run.config["max_tokens"] + 1 - len(prompt))
    guidance = config.guidance if config.guidance is not None else run.config.get("options", {}).get("guidance", 0.0)
    look = Features(run, config) if run.config.get("features") else Pixels(run)
    for start, batch in enumerate(open_batches(gather(config.image), config.batch_size, bool(config.features))):
        img = look(batch).to(config.device)                                       # (B, 3, S, S), or features
        rows = generate(run.model, img, [prompt] * len(batch), max_tokens, config.temperature, config.top_k,
                        config.top_p, config.num_beams, run.config["end"], config.length_penalty,
                        None if config.seed is None else config.seed + start, guidance)
        for (name, _), ids in zip(batch, rows):
            caption = run.tokenizer.decode(prompt[1:] + ids).strip()
            print(json.dumps({"image": name, "caption": caption}) if config.json else f"{name}: {caption}")
        if config.attention and start == 0:
            draw_attention(run, img[:1], prompt[1:] + rows[0] or [run.config["end"]], config.attention)


def reply(run, config, img, turns):
    """What a vqa run says to the last of `turns`, [(question, answer), .., (question, None)]. img (M, 3, S, S).

    Raises UserError when the turns before leave no room for the question.
    """
    placed = turns[0][0].count("<image>")
    room = run.model.config.text.block_size - run.model.n_image_tokens * len(img) - run.config["longest"]
    ids, _ = encode_dialogue(run.tokenizer, turns, len(img), max_len=room, places_images=placed > 0)
    longest = min(config.max_tokens or run.config["longest"], run.config["longest"])
    rows = generate(run.model, img[None], [ids], longest, config.temperature, config.top_k, config.top_p,
                    config.num_beams, run.config["end"], config.length_penalty, config.seed)
    return run.tokenizer.decode(rows[0]).strip()


def answer(run, config):
    """A vqa run: every question about every image; or, where a question places <image> itself, about all together."""
    if not config.prompt and not config.chat:
        raise UserError('this run answers questions: ask with --prompt "What color is it?", or --chat')
    look, names = Pixels(run), gather(config.image)
    together = any("<image>" in question for question in config.prompt)
    batches = open_batches(names, len(names) if together or config.chat else 1)
    for batch in batches:
        img, name = look(batch).to(config.device), ", ".join(name for name, _ in batch)        # (M, 3, S, S)
        for question in config.prompt:
            said = reply(run, config, img, [(question, None)])
            row = {"image": name, "question": question, "answer": said}
            print(json.dumps(row) if config.json else f"{name}: {question}  {said}")
        if config.chat:
            chat(run, config, img)


def chat(run, config, img):
    """Question after question; when the dialogue is full, its oldest turns are forgotten."""
    turns = []
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            return
        if not question:
            return
        while True:
            try:
                said = reply(run, config, img, turns + [(question, None)])
                break
            except UserError:
                if not turns:
                    raise
                turns = turns[1:]
        print(said, flush=True)
        turns.append((question, said))


def read_lines(path, what):
    """The lines of a text file that are not empty. Raises UserError if there are none; what: "labels", "captions"."""
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the {what} in {path}: {error}") from None
    if not lines:
        raise UserError(f"{path} holds no {what}; write one on each line")
    return lines


def find(run, config):
    """A clip run: labels or captions for images, or images for words."""
    clean = CLEAN[run.config.get("clean", "none")]
    if run.tokenizer is None:
        source = run.config.get("text_embeddings")
        if not source:
            raise UserError("this model came without its text tower; --labels and --search need one that can read")
        reader = load_clip(source)                              # the tower that made the embeddings of its training
        reader.to(config.device)
        run.model.text, run.model.text_head, run.tokenizer = reader.text, reader.text_head, reader.tokenizer
        run.model.config.text, run.model.config.end_token = reader.config.text, reader.config.end_token
    if config.search is not None:
        return search_folder(run, config, clean)
    if not config.labels and not config.captions:
        raise UserError('this run compares pictures and words: give --labels "a dog" "a cat", --captions FILE, or '
                        "--search WORDS with --images FOLDER")
    if config.labels:
        labels = config.labels
        if len(labels) == 1 and Path(labels[0]).is_file():
            labels = read_lines(labels[0], "labels")
        if len(labels) == 1:
            raise UserError(f"{config.labels[0]!r} is neither two labels nor a file of them, and one is always 100%; "
                            "name another, or the right file")
        text_emb = label_embeddings(run.model, run.tokenizer, labels, config.template, clean)             # (n, D)
    else:
        labels = read_lines(config.captions, "captions")
        text_emb = text_embeddings(run.model, run.tokenizer, labels, clean=clean)                         # (n, D)
    look = Features(run, config) if run.config.get("features") else Pixels(run)
    for batch in open_batches(gather(config.image), config.batch_size, bool(config.features)):
        with torch.inference_mode():
            image_emb = run.model.encode_image(look(batch).to(config.device))     # (B, D)
            probs = classify(image_emb, text_emb, run.model.logit_scale)          # (B, n)
        for (name, _), row in zip(batch, probs):
            best = [(labels[k], row[k].item()) for k in row.argsort(descending=True)[:config.hits].tolist()]
            print(json.dumps({"image": name, "labels": dict(best)}) if config.json else
                  f"{name}: " + ", ".join(f"{label} {p:.1%}" for label, p in best))


def search_folder(run, config, clean):
    """--search: the pictures of a folder that fit the words best. A run keeps a folder's embeddings beside itself."""
    if config.features:
        store = read_features(config.features)
        names = list(store)
        with torch.inference_mode():
            feats = torch.stack(list(store.values())).float().to(config.device)                 # (n, C) or (n, N, C)
            image_emb = run.model.encode_image(feats).cpu()                                     # (n, D)
    elif run.config.get("features"):
        raise UserError("this run sees through ready-made features: name their file with --features")
    elif config.images is None:
        raise UserError("--search needs --images, the folder to look through")
    else:
        home = Path(config.out_dir) if not config.pretrained else Path("out")
        key = hashlib.sha256(f"{config.pretrained} {Path(config.images).resolve()}".encode()).hexdigest()[:12]
        names, image_emb = embed_folder(run.model, run.recipe, config.images, home / f"search-{key}.safetensors",
                                        config.batch_size, config.device, say=lambda text: print(text, file=sys.stderr))
    start = time.perf_counter()
    text_emb = text_embeddings(run.model, run.tokenizer, [config.search], clean=clean)[0].cpu()           # (D,)
    scores, order = search(image_emb, text_emb, config.hits)                      # (k,), (k,)
    took = time.perf_counter() - start
    hits = [(names[i], score) for i, score in zip(order.tolist(), scores.tolist())]
    for name, score in hits:
        print(json.dumps({"image": name, "score": score}) if config.json else f"{score:.3f}  {name}")
    folder = Path(config.images) if config.images else None
    if folder:
        sheet = caption_sheet([load_image(folder / name) for name, _ in hits], [f"{s:.3f} {n}" for n, s in hits])
        atomic_write(config.sheet, lambda file: sheet.save(file, "PNG"))
        print(f"{len(names)} pictures searched in {1000 * took:.0f} ms; {config.sheet} shows the best", file=sys.stderr)


MODES = {"caption": speak, "vqa": answer, "clip": find}
# The options that only runs of some tasks heed: {tasks: names}
ONLY = {"caption": "attention guidance", "vqa": "chat", "clip": "labels template captions search images hits sheet",
        "caption or vqa": "prompt temperature top_k top_p num_beams length_penalty max_tokens seed"}


def main():
    """Load the run or checkpoint, then do what it was trained for: MODES."""
    config = parse_config(SampleConfig, description="Ask a trained model about pictures.")
    check_options(config)
    run = load_pretrained(config.pretrained, allow_pickle=config.allow_pickle) if config.pretrained else \
        load_run(config.out_dir)
    where, task = config.pretrained or config.out_dir, run.config["task"]
    if task not in MODES:
        flag = "--text" if task == "gpt" else "--vision"
        raise UserError(f"{where} was trained for --task {task}, which sample.py has no use for; train.py {flag} "
                        f"{where} starts a captioner from it")
    if run.config.get("clean", "none") not in [*CLEAN]:
        raise UserError(f"{where}/config.json: clean is {run.config['clean']!r}, not {', '.join(CLEAN)}; train again")
    for tasks, names in ONLY.items():
        ignored = config.given & {*names.split()}
        if ignored and task not in tasks:
            raise UserError(f"{where} was trained for --task {task}; --{min(ignored).replace('_', '-')} is for a run "
                            f"of --task {tasks}")
    if config.features and not run.config.get("features"):
        raise UserError(f"{where} looks at pixels itself: drop --features")
    run.model.to(config.device)
    MODES[task](run, config)


if __name__ == "__main__":
    run_script(main)
