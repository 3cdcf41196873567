"""--task vqa: the second half of system 5, a prefix model that answers questions about a picture in sentences.

The model and its building are captioning.py's, the dialogues as tokens vqa.py's. The loss is on the assistant's tokens
only. Accuracy is the official one of VQA v2, of the short answers read off the sentences, each question asked alone.
"""
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from . import captioning
from .config import UserError, option
from .files import write_text
from .generate import generate
from .gpt import IGNORE
from .task import Prepared, forbidden_ids, mean_losses
from .vqa import TAGS, encode_dialogue, rows_of, score_vqa, submission, to_short, to_targets


@dataclass
class Options(captioning.DecoderOptions):
    """The decoder's options, and one more. The model is the prefix model, from pixels."""
    model: str = option("prefix", "the model that reads questions", ("prefix",), group="answers")
    turns: int = option(1, "questions in one dialogue: the picture is read once for all of them", above=0)
    wiring, reinforce = "final", 0                              # a captioner's other options, fixed: no flags


def prepare(config, dataset, features=None, run=None):
    """-> Prepared: each image's dialogues as rows. meta["longest"]: the longest answer, in tokens."""
    if not hasattr(dataset, "questions"):
        raise UserError(f"{dataset.name} holds no questions; --task vqa needs --dataset shapes or vqav2")
    start = captioning.load_start(config, run=run)
    tokenizer, first, end = captioning.start_tokenizer(config, dataset, start)
    tokenizer.add_special_tokens(TAGS)
    cut = Counter()
    rows = [[to_targets(*row) for row in rows_of(questions, tokenizer, config.max_tokens, config.turns, cut)]
            for questions in dataset.questions]
    notes = [f"{n} {what}" for what, n in (+cut).items()]
    longest = max((longest_answer(targets) for of_image in rows for _, targets in of_image), default=0)
    if not longest:
        raise UserError(f"--max-tokens {config.max_tokens} leaves no room for any answer; raise it")
    meta = {"first": first, "end": end, "max_tokens": config.max_tokens, "clean": config.clean,
            "longest": run.config["longest"] if run else longest}
    return Prepared(start.recipe, rows, tokenizer, meta, start, notes)


def longest_answer(targets):
    """The longest stretch of trained tokens: [-100, 7, 8, -100, 9] -> 2."""
    most = n = 0
    for target in targets:
        n = 0 if target == IGNORE else n + 1
        most = max(most, n)
    return most


build, loss = captioning.build, captioning.loss


def answer(model, feats, prompts, setup, **how):
    """Sentences: feats (Q, N, C) of the images and the dialogues so far as ids, one each for Q questions."""
    meta, tokenizer = setup.prepared.meta, setup.prepared.tokenizer
    most = room_for_text(model)
    out = [""] * len(prompts)                                   # a dialogue that leaves no room is unanswered, so wrong
    fits = [k for k, prompt in enumerate(prompts) if len(prompt) < most]
    for start in range(0, len(fits), 256):
        part = fits[start:start + 256]
        some = [prompts[k] for k in part]
        with setup.device.autocast():
            rows = generate(model, feats[part], some, min(meta["longest"], most - max(map(len, some))),
                            eos_id=meta["end"], forbidden=forbidden_ids(tokenizer, meta["end"],
                                                                        model.config.text.vocab_size), **how)
        for k, row in zip(part, rows):
            out[k] = tokenizer.decode(row).strip()
    return out


def room_for_text(model, n_images=1):
    """How many tokens of question and answer fit beside the images into the decoder's context (<image> is one of them)."""
    c = model.config
    return c.text.block_size - n_images * (captioning.n_image_tokens(c.model, c.vision, c.shuffle) - 1)


def evaluate(model, setup, split, limit=None, n_predict=None, num_beams=1, length_penalty=1.0):
    """-> scores, examples: the loss, and the accuracy of the answers about the first n_predict images (None: all).

    With all of them: by kind of question, with shuffled and with blank images (0 after normalisation, the mean colour),
    and results.json in the official form for submission.
    """
    questions, tokenizer, full = setup.dataset.questions, setup.prepared.tokenizer, n_predict is None
    answers = {way: {} for way in (("true", "shuffled", "blank") if full else ("true",))}
    seen = []

    def visit(batch):
        if not full and setup.device.world == 1 and len(seen) >= n_predict:
            return
        seen.extend(batch.members)
        pairs = [(k, q) for k, i in enumerate(batch.members) for q in questions[i]]
        prompts = [encode_dialogue(tokenizer, [(q.question, None)])[0] for _, q in pairs]
        for way, found in answers.items():
            img = batch.img * 0 if way == "blank" else batch.img.roll(1, 0) if way == "shuffled" else batch.img
            with setup.device.autocast():
                feats = model.vision.grid(img)                                    # (b, N, C): once for all questions
            texts = answer(model, feats[[k for k, _ in pairs]], prompts, setup, num_beams=num_beams,
                           length_penalty=length_penalty)
            found.update((q.question_id, text) for (_, q), text in zip(pairs, texts))
    value, shuffled, _ = mean_losses(model, setup, split, limit, lambda m, b: m(b.img, b.idx, b.targets)[1], visit)
    answers = {way: setup.device.merge(found) for way, found in answers.items()}
    asked = [(i, q) for i in setup.store.usable(split)[:limit] for q in questions[i] if q.question_id in answers["true"]]
    scores = {"loss": value, "shuffled loss": shuffled}
    short = {way: {q.question_id: to_short(found[q.question_id]) for _, q in asked}
             for way, found in answers.items()}
    if any(q.answers for _, q in asked):                        # the official test split keeps its answers secret
        parts = {way: score_vqa([q for _, q in asked], texts) for way, texts in short.items()}
        scores |= {("" if way == "true" else f"{way} ") + "accuracy": part["overall"] for way, part in parts.items()}
        if full:
            kinds = parts["true"]["answer_type"] | parts["true"]["question_type"]
            scores |= {f"accuracy, {kind}": value for kind, value in sorted(kinds.items())[:24]}
    if full and setup.device.main:
        write_text(Path(setup.config.out_dir) / "results.json", json.dumps(submission(short["true"])))
    return scores, [{"image": i, "question": q.question, "prediction": answers["true"][q.question_id], "truth": q.answer,
                     "text": f"{q.question} {answers['true'][q.question_id]}"} for i, q in asked]
