"""What a trained model does with new pictures: it describes, answers, labels and searches. sample.py prints what these
functions find, or sends it to a page of the browser, as it comes. `config` is sample.py's; `run` is what pretrained.py
has loaded; img is what the run takes: pixels (b, 3, S, S), or ready-made features (b, D).
"""
import hashlib
import json
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from .answering import room_for_text
from .captions import clean_caption
from .config import UserError
from .features import Encoder, open_encoder, text_embeddings
from .generate import generate
from .image import preprocess
from .retrieval import classify, embed_folder, label_embeddings, search
from .task import forbidden_ids
from .vqa import encode_dialogue


def how_to_read(run, config):
    """-> prepare(PIL image), for each of a batch, and batch(list of those): pixels or features, as the run takes."""
    made_by = run.config.get("features")
    if not made_by:
        return partial(preprocess, recipe=run.recipe), torch.stack                           # (3, S, S), (b, 3, S, S)
    if not made_by["source"]:
        raise UserError(f"this run takes features of {made_by['encoder'][:80]!r}, one that is not at hand for new "
                        "pictures; train on pixels, or on features that data.py --features makes")
    return (lambda image: image), Encoder(made_by["source"], config.device)                  # PIL, (b, D)


# ---- captions and answers

def write(run, config, img, prompts, longest, seed, on_token=None):
    """Rows of ids for images img, each going on from its row of `prompts`, of at most `longest` tokens."""
    end = run.config["end"]
    return generate(run.model, img, prompts, min(config.max_tokens or longest, longest), seed=seed, eos_id=end,
                    temperature=config.temperature, top_k=config.top_k, top_p=config.top_p, num_beams=config.num_beams,
                    length_penalty=config.length_penalty, on_token=on_token,
                    forbidden=forbidden_ids(run.tokenizer, end, run.model.config.text.vocab_size))


def teller(run, ids, say):
    """-> what `generate` should call at each new token of a single row, to have say(the text so far) called; ids: the
    first part of the text. Letters whose last bytes are still to come are held back."""
    ids = [*ids]

    def on_token(row):
        if row[0] != run.config["end"]:
            ids.append(row[0])
            say(run.tokenizer.decode(ids).strip().rstrip("\ufffd"))
    return on_token


def prompt_ids(run, prompt):
    """The ids a caption starts from: the start token (or <image>), then the user's words, prepared as captions were."""
    if len(prompt) > 1:
        raise UserError("a caption begins only one way: give one --prompt (several questions are for a vqa run)")
    text = clean_caption(" ".join("".join(prompt).split()), run.config.get("clean", "none"))
    ids, longest = run.tokenizer.encode_plain(text), run.config["max_tokens"]
    if run.tokenizer.unk_id is not None and run.tokenizer.unk_id in ids:
        raise UserError(f"the prompt {text[:60]!r} holds words that the model never learned; use others")
    if len(ids) >= longest:
        raise UserError(f"the prompt has {len(ids)} tokens, but a caption of this model at most {longest}; shorten it")
    return [run.config["first"], *ids]


def captions(run, config, img, seed, say=None):
    """A caption for each image, as ids without the start token. say: of a single image, gets the text as it is made."""
    prompt = prompt_ids(run, config.prompt)
    room = run.config["max_tokens"] + 1 - len(prompt)           # prompt[0], the start token, is no part of the caption
    on_token = teller(run, prompt[1:], say) if say else None
    return [prompt[1:] + ids for ids in write(run, config, img, [prompt] * len(img), room, seed, on_token)]


def attention(run, img, ids):
    """Where the last block's cross-attention went while choosing each token: (T, N), the mean of its heads. None for a
    run whose model has none over pixels. img (1, 3, S, S); ids: T of them, the caption without its start token."""
    if run.config["model"] != "cross" or img.dim() != 4 or not ids:
        return None
    layer = run.model.text.blocks[-1].cross
    layer.keep_weights = True
    with torch.inference_mode():                                # (1, T): place t chooses word t
        run.model(img, torch.tensor([[run.config["first"]] + ids[:-1]], device=img.device))
    layer.keep_weights = False
    return layer.weights[0].mean(dim=0)                         # (n_head, T, N) -> (T, N)


def words_attended(run, img, ids):
    """A caption's words, each with where the model attended for it: its weight for each patch, row by row (the mean of
    its tokens'), or [] where there is none: [("a", [0.01, ..]), ("dog", ..)]."""
    weights, texts = attention(run, img, ids), [run.tokenizer.decode(ids[:k + 1]).split() for k in range(len(ids))]
    words, n = texts[-1] if ids else [], None if weights is None else run.model.config.vision.n_patches
    tokens = [[k for k, text in enumerate(texts) if max(len(text), 1) == w] for w in range(1, len(words) + 1)]
    return [(word, [] if n is None else [round(x, 5) for x in weights[rows or [-1], -n:].mean(dim=0).tolist()])
            for word, rows in zip(words, tokens)]


def reply(run, config, img, turns, say=None):
    """The answer to the last of the turns [(question, answer), .., (question, None)] about one image. The turns before
    are read only as far as the run has learned dialogues (train.py --turns) and has room."""
    longest, turns = run.config["longest"], turns[-run.config["options"].get("turns", 1):]
    while len(ids := encode_dialogue(run.tokenizer, turns)[0]) + longest > room_for_text(run.model):
        if len(turns) == 1:
            raise UserError("the question is longer than this model can read; shorten it")
        turns = turns[1:]
    on_token = teller(run, [], say) if say else None
    return run.tokenizer.decode(write(run, config, img, [ids], longest, config.seed, on_token)[0]).strip()


# ---- labels and search

def open_texts(run, config):
    """See that a clip run has a text tower. One trained on ready-made embeddings borrows the tower that made them."""
    if run.tokenizer is None:
        if not run.config.get("text_embeddings"):
            raise UserError("this model came without its text tower; --labels and --search need one")
        reader = open_encoder(run.config["text_embeddings"])
        theirs, run.tokenizer = reader.model.to(config.device), reader.tokenizer
        run.model.text, run.model.text_head = theirs.text, theirs.text_head
        run.model.config.text, run.model.config.end_token = theirs.config.text, theirs.config.end_token
        run.config["clean"] = reader.config["clean"]
    return partial(clean_caption, how=run.config["clean"])


def check_learned(run, texts, clean):
    """Refuse words for a picture of which the model has learned none: they would fit any picture. Some are said."""
    for text in texts:
        ids = {*run.tokenizer.encode_plain(clean(text))}
        if not ids - {run.tokenizer.unk_id}:
            raise UserError(f"{text[:60]!r} holds no word that this model has learned; use others")
        if run.tokenizer.unk_id in ids:
            print(f"{text[:60]!r} holds words that this model never learned; they count for nothing", file=sys.stderr)


def ranker(run, config, labels):
    """-> a function: img -> for each image the labels that fit best, with their probabilities, {"a dog": 0.9, ..}."""
    labels, clean = list(dict.fromkeys(labels)), open_texts(run, config)
    if len(labels) < 2:
        raise UserError(f"{labels} is neither two labels nor a file of them, and one alone is always 100%; add some")
    check_learned(run, labels, clean)
    label_emb = label_embeddings(run.model, run.tokenizer, labels, clean=clean)               # (n, D)

    def rank(img):
        with torch.inference_mode():
            probs = classify(run.model.encode_image(img), label_emb, run.model.logit_scale)   # (b, n)
        best = probs.argsort(dim=1, descending=True)[:, :config.hits]                         # (b, hits)
        return [{labels[k]: row[k].item() for k in order} for row, order in zip(probs, best.tolist())]
    return rank


def embed_images(run, config):
    """The pictures of the folder --images -> their names and embeddings (n, D). The run's folder keeps them."""
    if config.images is None:
        raise UserError("--search needs --images, the folder to go through")
    # what stands for the weights that made an embedding: name, size and time of their file, and the image recipe
    stamps = [[path.name, path.stat().st_size, path.stat().st_mtime_ns]
              for path in sorted(Path(config.pretrained or config.out_dir).glob("*.safetensors"))
              if not path.name.startswith("search-")]
    key = json.dumps([config.pretrained, stamps, asdict(run.recipe)])
    name = hashlib.sha256(f"{config.pretrained} {Path(config.images).resolve()}".encode(errors="surrogateescape"))
    cache = Path(config.out_dir) / f"search-{name.hexdigest()[:12]}.safetensors"
    return embed_folder(run.model, run.recipe, config.images, cache, key, config.batch_size, config.device,
                        partial(print, file=sys.stderr))


def find(run, config, words):
    """The pictures of --images that fit the words best -> [(name, cosine), ..], best first."""
    clean = open_texts(run, config)
    check_learned(run, [words], clean)
    names, image_emb = embed_images(run, config)                                  # (n, D)
    text_emb = text_embeddings(run.model, run.tokenizer, [words], clean=clean)[0].cpu()      # (D,)
    scores, order = search(image_emb, text_emb, config.hits)                      # (k,), (k,)
    return [(names[i], score) for i, score in zip(order.tolist(), scores.tolist())]
