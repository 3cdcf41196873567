"""Use a trained model on your own pictures.

    python sample.py --image dog.jpg                            the likeliest caption, by the last run in out/
    python sample.py --image photos/ https://example.com/a.jpg  a folder, an address: any mixture
    python sample.py --image dog.jpg --num-beams 3              search for the best whole sentence
    python sample.py --image dog.jpg --temperature 0.8 --top-p 0.9 --seed 7
    python sample.py --image dog.jpg --attention attention.png  which places each word attended to
    python sample.py --image dog.jpg --pretrained nlpconnect/vit-gpt2-image-captioning    no training at all

    python sample.py --image kitchen.jpg --prompt "What color is the fridge?" "Is there a cat?"      --task vqa
    python sample.py --image dog.jpg --labels "a dog" "a cat"   which fits, with probabilities       --task clip
    python sample.py --search "two dogs in snow" --images photos/    the best pictures of a folder   --task clip

Everything about the model (sizes, tokenizer, how images are prepared) comes with the run; no flag has to be repeated.
"""
import hashlib
import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from tinyvlm.answering import room_for_text
from tinyvlm.config import UserError, option, parse_config, run_script
from tinyvlm.device import check_device
from tinyvlm.download import download
from tinyvlm.draw import attention_over, caption_sheet
from tinyvlm.features import Encoder, open_encoder, read_features, text_embeddings
from tinyvlm.files import list_images, write_image
from tinyvlm.generate import generate
from tinyvlm.image import load_image, open_batches, preprocess, to_pil
from tinyvlm.captions import clean_caption
from tinyvlm.pretrained import load_pretrained, load_run
from tinyvlm.retrieval import classify, embed_folder, label_embeddings, search
from tinyvlm.task import forbidden_ids
from tinyvlm.vqa import encode_dialogue

MAX_IMAGE_BYTES = 50_000_000        # more than any photograph; less than what would fill a disk


@dataclass
class SampleConfig:
    """The options; the file's header shows the usual combinations."""
    image: list[str] = option([], "image files, folders of images, or http(s) addresses", group="what to use")
    out_dir: str = option("out", "the run to use")
    pretrained: str | None = option(None, "use this public captioner or CLIP (a Hub id or a folder) instead of a run")
    prompt: list[str] = option([], "a caption run: words to begin with; a vqa run: one or more questions")
    num_beams: int = option(1, "search this many sentences at once for the likeliest whole; 3 is a good value", above=0)
    length_penalty: float = option(1.0, "beams: above 1 favours long captions, below 1 short ones", least=-9, below=100)
    temperature: float = option(0.0, "0 takes the likeliest word each time; 1 draws by probability", least=0, below=1e4)
    top_k: int | None = option(None, "draw only among this many likeliest words", above=0)
    top_p: float | None = option(None, "draw only among the likeliest words with this probability together", above=0)
    labels: list[str] = option([], "clip: phrases to choose from, or one file with a phrase on each line", group="clip")
    search: str | None = option(None, "words to search for among --images")
    images: str | None = option(None, "the folder that --search goes through")
    hits: int = option(12, "how many to show", above=0)
    sheet: str = option("out/search.png", "where --search draws what it found")
    max_tokens: int | None = option(None, "longest caption or answer; at most as in training", above=0, group="details")
    seed: int | None = option(None, "makes drawing repeatable (for the same --batch-size)", least=0, below=2 ** 32)
    attention: str | None = option(None, "cross model: draw where the first caption's words attended, into this PNG")
    features: str | None = option(None, "a run on features: the file that has them for these images, by name")
    json: bool = option(False, "one json object a line on stdout")
    batch_size: int = option(16, "images captioned together", above=0)
    device: str = option("cpu", "cpu, cuda or mps; for a few images the cpu is quick enough")


def open_image(name):
    """A file or an address -> RGB PIL image. Raises UserError."""
    if not name.startswith(("http://", "https://")):
        return load_image(name)
    with tempfile.TemporaryDirectory() as folder:
        path = download(name, Path(folder) / "image", max_bytes=MAX_IMAGE_BYTES, max_seconds=60)
        return load_image(path.read_bytes(), name=name)


def how_to_open(run, config):
    """-> open(name), which gives pixels or features, as the run takes, and batch(list of them). Raises UserError."""
    made_by = run.config.get("features")
    if not made_by:
        return lambda name: preprocess(open_image(name), run.recipe), torch.stack            # (3, S, S), (b, 3, S, S)
    if config.features:
        names, feats, _ = read_features(config.features)
        known = dict(zip(names, feats))                         # {file name: (D,) or (N, D)}

        def find(name):
            if Path(name).name not in known:
                raise UserError(f"{config.features} holds nothing for {name}; it knows images by file name only")
            return known[Path(name).name].float()
        return find, torch.stack
    if not made_by["source"]:
        raise UserError(f"this run takes features of {made_by['encoder'][:80]!r}, a network that is not at hand: give "
                        "the file that holds the features of these images with --features")
    return open_image, Encoder(made_by["source"], config.device)                             # PIL, (b, D)


def inputs(run, config, batch_size):
    """Yields (names, what the model takes): (b, 3, S, S), or features (b, D) or (b, N, D), a batch at a time.

    What cannot be read is reported and left out. Raises UserError if nothing is left.
    """
    names, broken, (open_one, batch) = [], {}, how_to_open(run, config)
    for source in config.image:
        names += [str(Path(source) / name) for name in list_images(source)] if Path(source).is_dir() else [source]
    for part in open_batches(names, open_one, batch_size, broken):
        if part:
            yield [name for name, _ in part], batch([value for _, value in part]).to(config.device)
    if len(broken) == len(set(names)):
        raise UserError(next(iter(broken.values()), "name at least one picture: python sample.py --image dog.jpg"))
    for reason in broken.values():
        print(f"left out: {reason}", file=sys.stderr)


def write(run, config, img, prompts, longest, seed):
    """Rows of ids for images img, each going on from its row of `prompts`, of at most `longest` tokens."""
    end = run.config["end"]
    return generate(run.model, img, prompts, min(config.max_tokens or longest, longest), seed=seed, eos_id=end,
                    temperature=config.temperature, top_k=config.top_k, top_p=config.top_p, num_beams=config.num_beams,
                    length_penalty=config.length_penalty,
                    forbidden=forbidden_ids(run.tokenizer, end, run.model.config.text.vocab_size))


def prompt_ids(run, prompt):
    """The ids a caption starts from: the start token (or <image>), then the user's words, prepared as captions were."""
    text = clean_caption(" ".join(prompt.split()), run.config.get("clean", "none"))
    ids, longest = run.tokenizer.encode_plain(text), run.config["max_tokens"]
    if run.tokenizer.unk_id is not None and run.tokenizer.unk_id in ids:
        raise UserError(f"the prompt {prompt[:60]!r} holds words that the model never learned; use others")
    if len(ids) >= longest:
        raise UserError(f"the prompt has {len(ids)} tokens, but a caption of this model at most {longest}; shorten it")
    return [run.config["first"], *ids]


def caption(run, config):
    """A caption run: a caption for each image."""
    if len(config.prompt) > 1:
        raise UserError("a caption begins only one way: give one --prompt (several questions are for a vqa run)")
    prompt = prompt_ids(run, "".join(config.prompt))
    room = run.config["max_tokens"] + 1 - len(prompt)           # prompt[0], the start token, is no part of the caption
    for k, (names, img) in enumerate(inputs(run, config, config.batch_size)):
        rows = write(run, config, img, [prompt] * len(img), room, None if config.seed is None else config.seed + k)
        for name, ids in zip(names, rows):
            text = run.tokenizer.decode(prompt[1:] + ids).strip()
            print(json.dumps({"image": name, "caption": text}) if config.json else f"{name}: {text}", flush=True)
        if config.attention and k == 0:
            draw_attention(run, img[:1], prompt[1:] + rows[0] or [run.config["end"]], config.attention)


def draw_attention(run, img, ids, path):
    """A picture of the image per word, lit where the last block's cross-attention went while choosing that word.

    img (1, 3, S, S); ids: the caption without its start token; path: the PNG to write.
    """
    if run.config["model"] != "cross" or img.dim() != 4:
        raise UserError("--attention draws cross-attention over pixels; this run's model has none (--model cross has)")
    layer = run.model.text.blocks[-1].cross
    layer.keep_weights = True
    with torch.inference_mode():                                # (1, T): place t chooses word t
        run.model(img, torch.tensor([[run.config["first"]] + ids[:-1]], device=img.device))
    weights = layer.weights[0].mean(dim=0)                      # (n_head, T, N) -> (T, N), the mean of the heads
    square, side = to_pil(img[0], run.recipe), run.recipe.size // run.model.config.vision.patch_size
    pictures = [square] + [attention_over(square, w, side) for w in weights]
    texts = ["what the model sees", *(run.tokenizer.decode([i]) for i in ids)]
    write_image(path, caption_sheet(pictures, texts, columns=6))
    layer.keep_weights = False


def answer(run, config):
    """A vqa run: every question about every image."""
    if not config.prompt:
        raise UserError('this run answers questions: give some with --prompt "What color is it?"')
    longest = run.config["longest"]
    for (name,), img in inputs(run, config, 1):                 # (1, 3, S, S)
        for question in config.prompt:
            ids, _ = encode_dialogue(run.tokenizer, [(question, None)])
            if len(ids) + longest > room_for_text(run.model):
                raise UserError("the question is longer than this model can read; shorten it")
            text = run.tokenizer.decode(write(run, config, img, [ids], longest, config.seed)[0]).strip()
            row = {"image": name, "question": question, "answer": text}
            print(json.dumps(row) if config.json else f"{name}: {question}  {text}", flush=True)


def read_labels(labels):
    """--labels: phrases, or one file that holds one on each line. Raises UserError for fewer than two."""
    try:
        if len(labels) == 1:
            labels = [line.strip() for line in Path(labels[0]).read_text("utf-8-sig").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError):
        pass
    labels = list(dict.fromkeys(labels))
    if len(labels) < 2:
        raise UserError(f"{labels} is neither two labels nor a file of them, and one alone is always 100%; add some")
    return labels


def compare(run, config):
    """A clip run: labels for images, or images for words."""
    reader = run
    if run.tokenizer is None:                                   # the tower that made the embeddings of its training
        if not run.config.get("text_embeddings"):
            raise UserError("this model came without its text tower; --labels and --search need one")
        reader = open_encoder(run.config["text_embeddings"])
        theirs, run.tokenizer = reader.model.to(config.device), reader.tokenizer
        run.model.text, run.model.text_head = theirs.text, theirs.text_head
        run.model.config.text, run.model.config.end_token = theirs.config.text, theirs.config.end_token
    clean = partial(clean_caption, how=reader.config["clean"])
    if config.search is not None:
        return search_folder(run, config, clean)
    if not config.labels:
        raise UserError('this run compares pictures and sentences: give --labels "a dog" "a cat", or --search WORDS')
    labels = read_labels(config.labels)
    text_emb = label_embeddings(run.model, run.tokenizer, labels, clean=clean)                # (n, D)
    for names, img in inputs(run, config, config.batch_size):
        with torch.inference_mode():
            probs = classify(run.model.encode_image(img), text_emb, run.model.logit_scale)    # (b, n)
        for name, row in zip(names, probs):
            best = {labels[k]: row[k].item() for k in row.argsort(descending=True)[:config.hits].tolist()}
            print(json.dumps({"image": name, "labels": best}) if config.json else
                  f"{name}: " + ", ".join(f"{label} {p:.1%}" for label, p in best.items()))


def search_folder(run, config, clean):
    """--search: the pictures of a folder that fit the words best. The run's folder keeps their embeddings."""
    if config.images is None:
        raise UserError("--search needs --images, the folder to go through")
    # what stands for the weights that made an embedding: name, size and time of their file, and the image recipe
    stamps = [[path.name, path.stat().st_size, path.stat().st_mtime_ns]
              for path in sorted(Path(config.pretrained or config.out_dir).glob("*.safetensors"))
              if not path.name.startswith("search-")]
    key = json.dumps([config.pretrained, stamps, asdict(run.recipe)])
    name = hashlib.sha256(f"{config.pretrained} {Path(config.images).resolve()}".encode(errors="surrogateescape"))
    cache = Path(config.out_dir) / f"search-{name.hexdigest()[:12]}.safetensors"
    names, image_emb = embed_folder(run.model, run.recipe, config.images, cache, key, config.batch_size, config.device,
                                    partial(print, file=sys.stderr))              # (n, D)
    text_emb = text_embeddings(run.model, run.tokenizer, [config.search], clean=clean)[0].cpu()           # (D,)
    scores, order = search(image_emb, text_emb, config.hits)                      # (k,), (k,)
    hits = [(names[i], score) for i, score in zip(order.tolist(), scores.tolist())]
    for name, score in hits:
        print(json.dumps({"image": name, "score": score}) if config.json else f"{score:.3f}  {name}")
    pictures = [load_image(Path(config.images) / name) for name, _ in hits]
    write_image(config.sheet, caption_sheet(pictures, [f"{score:.3f} {name}" for name, score in hits]))
    print(f"{len(names)} pictures searched; {config.sheet} shows the best", file=sys.stderr)


MODES = {"caption": caption, "vqa": answer, "clip": compare}


def main():
    """Load the run or checkpoint, then do what it was trained for: MODES."""
    config = parse_config(SampleConfig, description=__doc__.partition("\n")[0])
    drawing = config.temperature > 0
    if drawing and config.num_beams > 1 or not drawing and (config.top_k or config.top_p):
        raise UserError("--top-k and --top-p need a --temperature above 0, and --num-beams must have none")
    check_device(config.device)
    where = config.pretrained or config.out_dir
    run = load_pretrained(where) if config.pretrained else load_run(where)
    task = run.config["task"]
    if task not in MODES:
        raise UserError(f"{where} was trained for --task {task}, which sample.py has no use for; train.py "
                        f"--{'text' if task == 'text' else 'vision'} {where} starts a captioner from it")
    if (config.labels or config.search) and task != "clip" or config.features and not run.config.get("features"):
        raise UserError(f"{where} is a {task} model: --labels and --search are for clip, --features if trained on some")
    run.model.to(config.device)
    MODES[task](run, config)


if __name__ == "__main__":
    run_script(main)
