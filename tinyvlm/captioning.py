"""--task caption: systems 1, 2 and 3, a sentence for a picture by cross-attention, by a prefix, or by an LSTM.

The model itself is in vlm.py. Here its rows are made (what it reads, and which token it should predict after each), it
is put together from what the options name, and its captions are scored. After that training, `--reinforce` continues
with rewards for the model's own captions.
"""
import math
from collections import Counter
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from . import metrics
from .batches import pad_rows
from .captions import clean_caption
from .config import UserError, flag_name, option
from .consensus import Consensus
from .gpt import IGNORE, GPTConfig
from .lstm import LSTM
from .pretrained import load_gpt2, load_run
from .shapes import score_parts
from .task import Prepared, TextOptions, load_vision, make_tokenizer, run_split, sizes, train_mode, write
from .tokenizer import END
from .vit import ViTConfig
from .vlm import MODELS, LSTMConfig, VLMConfig
from .vlm import build as build_vlm
from .vqa import SYSTEM, TAGS, to_sentence


@dataclass
class DecoderOptions(TextOptions):
    """Options of every model that writes text: captioners, and the one that answers questions."""
    init: str | None = option(None, "go on from the model of this run, with another stage or data set")
    blend: float = option(1.0, "with --init: keep weights this share of the way to the new ones; less forgets less",
                          above=0)
    shuffle: int = option(1, "prefix: join this many by this many neighbouring patches into one image token", above=0)
    captions_per_image: int = option(1, "texts of each image a step; the vision tower runs once for all", above=0)
    show_batch: bool = option(False, "print the first batch token by token (image, masked, trained), and stop")
    num_beams: int = option(1, "with --eval-only: beams of the search; 1 is greedy", above=0)
    length_penalty: float = option(1.0, "with --eval-only: above 1 favours long texts, below 1 short ones", least=-9)


@dataclass
class Options(DecoderOptions):
    """What only captioners have."""
    model: str = option("cross", "images by cross-attention, in place of <image>, or as the first state of an LSTM",
                        tuple(MODELS), group="captioner")
    wiring: str = option("final", "cross: all blocks attend to the last vision layer, or block i to layer i",
                         ("final", "lockstep"))
    n_hidden: int | None = option(None, "lstm: width of its state; default --n-embd", above=0)
    soft_attention: bool = option(False, "lstm: every state also attends to the image features (--n-head heads)")
    features: str | None = option(None, "learn from ready-made image features in this file (data.py --features)")
    reinforce: int = option(0, "reward the better of this many captions of each image (CIDEr-D); needs --init", least=0)
    consensus: str | None = option(None, "with --eval-only: of all beams, take the caption most like those that this "
                                         "run of --task clip finds for the image")


SLOTS = 4       # attention has nothing to choose from in a single vector: it is made into this many image tokens
# options that are a model's or its tokenizer's own: a stage that goes on from --init cannot change them
MADE_WITH = {"image_size", "patch_size", "stem", "class_token", "n_layer", "n_head", "n_embd", "n_hidden", "shuffle",
             "wiring", "soft_attention", "tokenizer", "vocab_size", "min_count"}
ONLY = {"wiring": "cross", "shuffle": "prefix", "n_hidden": "lstm", "soft_attention": "lstm"}   # .. and of one --model


# ---- what the model reads, and what it should predict

def prepare(config, dataset, features=None, run=None):
    """-> Prepared. run: a Loaded run that is only to be evaluated."""
    if config.consensus and (not run or config.num_beams == 1):
        raise UserError("--consensus chooses among beams of a finished run: give --eval-only and --num-beams 20, say")
    start = load_start(config, dataset, features, run)
    rows, notes = caption_rows(dataset.captions, start.tokenizer, **start.meta)
    start.reward = make_reward(dataset) if config.reinforce else None
    return Prepared((start.run or start.vision).recipe, rows, start.tokenizer, start.meta, start, features, notes)


def load_start(config, dataset, features=None, run=None):
    """What a model begins with, as a namespace: run (--init, or the one to evaluate), or vision, and gpt (--text);
    their tokenizer, or a new one; and meta, how texts become its ids."""
    if config.reinforce and not (config.init and features and config.reinforce > 1 and config.captions_per_image == 1):
        raise UserError("--reinforce needs 2 or more captions, --init RUN, --features, and --captions-per-image 1")
    if config.init and (config.vision or config.text) or config.text and config.model == "lstm":
        raise UserError("--init brings a whole model and --model lstm has no GPT-2: drop --vision, --text or the other")
    if config.blend != 1 and not config.init:
        raise UserError("--blend is a share of the way from the weights of --init: give --init RUN")
    for name in sorted(ONLY.keys() & config.given):
        if config.model != ONLY[name]:
            raise UserError(f"{flag_name(name)} is for --model {ONLY[name]}, not {config.model}: drop it")
    run = run or (load_run(config.init) if config.init else None)
    if run:
        if run.config["task"] not in ("caption", "vqa") or run.config["model"] != config.model:
            raise UserError(f"--init {config.init} holds a {run.config['model']} model, not a {config.model} captioner")
        for name in sorted(MADE_WITH & config.given):
            if getattr(config, name) != run.config["options"].get(name):
                raise UserError(f"--init {config.init} was made with another {flag_name(name)}, which stays: drop it")
        if run.model.config.feat_dim != (features and features.feat_dim):
            raise UserError(f"the run has learned from {run.model.config.feat_dim or 'no'} features: see --features")
    vision = None if run else load_vision(config)
    if config.vision and vision and (features or not isinstance(vision.config, ViTConfig)):
        raise UserError(f"--vision {config.vision}: a captioner takes a ViT, or ready-made --features of any network")
    new = TAGS if config.task == "vqa" else ("<image>",) if config.model == "prefix" else ()
    gpt = load_gpt2(config.text, special_tokens=new) if config.text and not run else None
    ready = run or gpt
    tokenizer = ready.tokenizer if ready else make_tokenizer(config, corpus(config, dataset))
    end = tokenizer and tokenizer.token_to_id(END)
    first = tokenizer and tokenizer.token_to_id("<image>") if config.model == "prefix" else end
    if first is None or end is None:
        raise UserError(f"{config.text or config.out_dir} came without a tokenizer that knows {END}; name another")
    meta = {"first": first, "end": end, "max_tokens": config.max_tokens, "clean": config.clean}
    return SimpleNamespace(run=run, vision=vision, gpt=gpt, tokenizer=tokenizer, meta=meta)


def corpus(config, dataset):
    """What a new tokenizer is trained on: the training captions, as strings; for a prefix model also the dialogues,
    since it keeps its tokenizer through all stages, and without them it would spell "what" letter by letter."""
    train = dataset.splits["train"]
    yield from (clean_caption(text, config.clean) for i in train for text in dataset.captions[i])
    if config.model == "prefix" and hasattr(dataset, "questions"):
        yield SYSTEM
        for q in (q for i in train for q in dataset.questions[i]):
            yield from (q.question, to_sentence(q.question, q.answer))


def caption_rows(captions, tokenizer, first, end, max_tokens, clean):
    """Captions -> rows[i], a list of (idx, targets) for image i, and notes. targets[t] is the token after idx[..t].

    first: the start token (cross, lstm) or <image> (prefix).
        "a dog"  ->  idx [first, a, dog], targets [a, dog, end]
    A caption that is too long loses its end, and the model must not learn to stop in mid-sentence, so there is no end
    token to predict. Nor should it learn to say "unknown word". What then teaches nothing is left out.
    """
    rows, notes = [[] for _ in captions], Counter()
    for i, text in ((i, text) for i, texts in enumerate(captions) for text in texts):
        ids = tokenizer.encode_plain(clean_caption(text, clean))
        row = [first] + ids[:max_tokens] + ([end] if len(ids) <= max_tokens else [])
        targets = [IGNORE if token == tokenizer.unk_id else token for token in row[1:]]
        notes[f"words of the captions are not among the vocabulary's {tokenizer.vocab_size}"] += targets.count(IGNORE)
        if ids and {*targets} - {IGNORE}:
            rows[i].append((row[:-1], targets))
            notes[f"captions are longer than --max-tokens {max_tokens} and were cut"] += len(ids) > max_tokens
        else:
            notes[f"captions hold nothing to learn after --clean {clean} and were left out"] += 1
    return rows, [f"{n} {what}" for what, n in notes.items() if n]


# ---- the model

def build(config, prepared):
    """The captioner: each tower public, from another run, or fresh as the options say."""
    start, features, vocab_size = prepared.start, prepared.features, prepared.tokenizer.vocab_size
    if start.run:
        return extend(start.run.model, config, vocab_size, features)
    vision = None if features else replace(start.vision.config, dropout=config.dropout)
    c = VLMConfig(model=config.model, vision=vision, text=None, wiring=config.wiring, shuffle=config.shuffle,
                  feat_dim=features and features.feat_dim,
                  slots=SLOTS if features and features.n_tokens == 1 and config.model != "lstm" else 1,
                  image_token=prepared.meta["first"] if config.model == "prefix" else None)
    room = config.max_tokens + 2 + n_image_tokens(c, features)                    # start, end
    if config.model == "lstm":
        c.text = LSTMConfig(vocab_size, config.n_layer, config.n_embd, config.n_hidden or config.n_embd,
                            config.dropout, config.n_head if config.soft_attention else 0)
    elif start.gpt:
        c.text = replace(start.gpt.config, dropout=config.dropout)
        if c.text.block_size < room:
            raise UserError(f"--text {config.text} reads {c.text.block_size} tokens; image and caption need {room}")
    else:
        c.text = GPTConfig(block_size=room, vocab_size=vocab_size, **sizes(config))
    if c.wiring == "lockstep" and (not vision or vision.n_layer != c.text.n_layer):
        raise UserError(f"--wiring lockstep needs as many vision layers as the decoder's {c.text.n_layer}; --n-layer")
    model = build_vlm(c)
    if start.vision.weights:
        model.vision.load_state_dict(start.vision.weights)
    if start.gpt:
        model.text.load_state_dict(start.gpt.state_dict(), strict=False)          # cross-attention is new
    return model


def n_image_tokens(c, features=None):
    """How many tokens an image takes in the decoder's context: 196 in a prefix of 16-pixel patches at 224."""
    n = 0 if c.model != "prefix" else c.vision.n_patches if c.vision else features.n_tokens * c.slots
    side = math.isqrt(n)
    if c.shuffle > 1 and (side ** 2 != n or side % c.shuffle):
        raise UserError(f"--shuffle {c.shuffle} needs a square grid that it divides, not {n} image tokens")
    return n // c.shuffle ** 2


def extend(model, config, vocab_size, features=None):
    """The model of --init for another stage: rows for new tokens, positions for longer texts, another dropout."""
    if config.model != "lstm":
        c, room = model.config.text, config.max_tokens + 2 + n_image_tokens(model.config, features)
        model.text.extend_vocab(max(c.vocab_size, vocab_size))
        model.text.extend_context(max(c.block_size, room))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = config.dropout
        elif isinstance(module, LSTM):
            module.dropout = config.dropout
    return model


# ---- what is minimised, and what is measured

def cross_entropy(model, batch):
    """Nats per token."""
    return model(batch.img, batch.idx, batch.targets)[1]


def loss(model, batch, setup):
    """Of one micro-batch: the cross-entropy, or with --reinforce minus the score of the model's own captions."""
    return self_critical_loss(model, batch, setup) if setup.config.reinforce else cross_entropy(model, batch)


def make_reward(dataset):
    """-> the function (caption, image) of the CIDEr-D of a caption against those of that training image."""
    place = {i: k for k, i in enumerate(dataset.splits["train"])}
    cider = metrics.CiderD([[metrics.tidy(text) for text in dataset.captions[i]] for i in place])
    return lambda caption, i: cider.score(metrics.tidy(caption), place[i])


def self_critical_loss(model, batch, setup):
    """Draw K captions of each image, make the better ones likelier and the worse ones less.

    "Self-critical sequence training" (Rennie et al. 2016, arXiv:1612.00563): cross-entropy rewards the next word of
    somebody's caption, this a high score of the model's own. A caption's advantage is its CIDEr-D minus the mean of the
    other K - 1 of its image; the loss is minus the advantage times the caption's log-probability.
    """
    config, device, meta = setup.config, setup.device.torch, setup.prepared.meta
    K, plain = config.reinforce, getattr(model, "module", model)                  # DDP holds the model as .module
    first, img = [meta["first"]], batch.img.repeat_interleave(K, dim=0)           # (B * K, D) or (B * K, N, D)
    plain.eval()
    drawn = write(plain, img, [first] * len(img), setup, temperature=1.0)
    train_mode(plain)
    reward, decode = setup.prepared.start.reward, setup.prepared.tokenizer.decode
    score = torch.tensor([reward(decode(row), batch.members[k // K]) for k, row in enumerate(drawn)])
    score = score.view(-1, K).to(device)                                          # (B, K)
    advantage = (score - score.mean(dim=1, keepdim=True)) * K / (K - 1)           # (B, K)
    full = [row + [meta["end"]] if len(row) < config.max_tokens else row for row in drawn]
    idx, targets = (t.long().to(device) for t in pad_rows([(first + row[:-1], row) for row in full]))
    logits = model(img, idx)[0]                                                   # (B * K, T, V)
    # F.cross_entropy takes (rows, V, T), and gives 0 where there is no target: log_p is (B * K,)
    log_p = -F.cross_entropy(logits.float().transpose(1, 2), targets, ignore_index=IGNORE, reduction="none").sum(dim=1)
    share = batch.share * config.batch_size * K / len(img)      # the loop weighs by targets: undone
    value = -(advantage.flatten() * log_p).mean() / share
    return value + (-score.mean() / share - value).detach()     # this gradient; as the number to log, minus the score


def evaluate(model, setup, split, limit=None, n_predict=None, consensus=None, **how):
    """-> scores, examples: the loss, and the captions of the first n_predict images, scored if all are made (None).

    "shuffled": the same with every image in its neighbour's place; what is left of a score then is what the model knows
    of captions in general. nats per word: comparable between vocabularies, as the loss per token is not.
    """
    config, dataset, prepared = setup.config, setup.dataset, setup.prepared
    n_predict = None if config.reinforce else n_predict         # what is trained is the score, so it also decides
    judge, decode = Consensus(consensus, setup) if consensus else None, prepared.tokenizer.decode

    def predict(batch):
        rows = write(model, batch.img, [[prepared.meta["first"]]] * len(batch.img), setup, n_best=True, **how)
        texts = [[decode(row).strip() for row in beams] for beams in rows]        # B lists of num_beams
        best = judge.choose(batch.img, batch.members, texts) if judge else [beams[0] for beams in texts]
        return dict(zip(batch.members, best))
    captions, value, shuffled, n_tokens = run_split(model, setup, split, limit, predict, cross_entropy, n_predict)
    n_words = sum(scored_words(clean_caption(text, config.clean), prepared) for i in setup.store.usable(split)[:limit]
                  for text in dataset.captions[i])
    members, texts = [*captions], [*captions.values()]
    scores = {"loss": value, "shuffled loss": shuffled, "perplexity": math.exp(min(value, 50)),
              "nats per word": value * n_tokens / max(1, n_words), "distinct": len({*texts}) / len(texts)}
    if n_predict is None:
        right, wrong = (score_captions(dataset, order, texts) for order in (members, members[1:] + members[:1]))
        key = "exact" if "exact" in right else "CIDEr-D"
        scores |= right | {f"shuffled {key}": wrong[key]}
        scores = {key: scores[key], **scores} if config.reinforce else scores
    return scores, [{"image": i, "prediction": text, "truth": dataset.captions[i][0]} for i, text in captions.items()]


def scored_words(text, prepared):
    """How many words of a caption the loss is taken on: of a cut one, or one with unknown words, in proportion."""
    tokenizer, longest = prepared.tokenizer, prepared.meta["max_tokens"]
    ids = tokenizer.encode_plain(text)
    scored = sum(i != tokenizer.unk_id for i in ids[:longest]) + (len(ids) <= longest)       # and its end
    return len(text.split()) * scored / (len(ids) + 1) if ids else 0


def score_captions(dataset, members, predictions):
    """How often the meaning is right, and its parts (shapes), or the papers' scores."""
    truths = [dataset.captions[i] for i in members]
    if dataset.name != "shapes":
        return metrics.score_captions(predictions, truths)
    found = {}
    for text, (truth,) in zip(predictions, truths):
        parts = score_parts(text, truth)
        for name, right in {"exact": all(parts.values()), **{f"right {part}": parts[part] for part in parts}}.items():
            found.setdefault(name, []).append(right)
    return {name: sum(right) / len(right) for name, right in found.items()}
