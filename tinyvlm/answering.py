"""--task vqa: the second half of system 5, a prefix model that answers questions about a picture in sentences.

The model and its building are captioning.py's, the dialogues as tokens vqa.py's. The loss is on the assistant's tokens
only. Accuracy is the official one of VQA v2, of the short answers read off the sentences, each question asked alone.
"""
import json
from collections import Counter
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from . import captioning
from .config import UserError, option
from .files import write_text
from .gpt import IGNORE
from .task import Prepared, mean_losses, write
from .vqa import TAGS, encode_dialogue, rows_of, score_vqa, submission, to_short, to_targets


@dataclass
class Options(captioning.DecoderOptions):
    """The decoder's options, and one more. The model is the prefix model, from pixels."""
    model: str = option("prefix", "the model that reads questions", ("prefix",), group="answers")
    turns: int = option(1, "questions in one dialogue: the picture is read once for all of them", above=0)
    wiring, reinforce = "final", 0                              # a captioner's other options, fixed: no flags


build, loss = captioning.build, captioning.loss


def prepare(config, dataset, features=None, run=None):
    """-> Prepared: each image's dialogues as rows. meta["longest"]: the longest answer, in tokens."""
    if not hasattr(dataset, "questions"):
        raise UserError(f"{dataset.name} holds no questions; --task vqa needs --dataset shapes or vqav2")
    start, left_out = captioning.load_start(config, run=run), Counter()
    tokenizer, first, end = captioning.start_tokenizer(config, dataset, start)
    tokenizer.add_special_tokens(TAGS)
    rows = [[to_targets(*row) for row in rows_of(questions, tokenizer, config.max_tokens, config.turns, left_out)]
            for questions in dataset.questions]
    longest = max((len([*part]) for of_image in rows for _, targets in of_image
                   for trained, part in groupby(targets, lambda target: target != IGNORE) if trained), default=0)
    if not longest:
        raise UserError(f"--max-tokens {config.max_tokens} leaves no room for any answer; raise it")
    meta = {"first": first, "end": end, "max_tokens": config.max_tokens, "clean": config.clean,
            "longest": run.config["longest"] if run else longest}
    return Prepared(start.recipe, rows, tokenizer, meta, start, [f"{n} {what}" for what, n in (+left_out).items()])


def room_for_text(model):
    """How many tokens of question and answer fit beside the image into the decoder's context (<image> is one of them)."""
    c = model.config
    return c.text.block_size + 1 - captioning.n_image_tokens(c.model, c.vision, c.shuffle)


def answer(model, feats, prompts, setup, **how):
    """Sentences: feats (Q, N, C) of the images and the dialogues so far as ids, one each for Q questions.

    A dialogue that leaves no room is not answered, so wrong.
    """
    room, out = room_for_text(model) - setup.prepared.meta["longest"], [""] * len(prompts)
    fits = [k for k, prompt in enumerate(prompts) if len(prompt) <= room]
    for start in range(0, len(fits), 256):
        part = fits[start:start + 256]
        rows = write(model, feats[part], [prompts[k] for k in part], setup, setup.prepared.meta["longest"], **how)
        for k, row in zip(part, rows):
            out[k] = setup.prepared.tokenizer.decode(row).strip()
    return out


def evaluate(model, setup, split, limit=None, n_predict=None, **how):
    """-> scores, examples: the loss, and the accuracy of the answers about the first n_predict images (None: all).

    With all of them: by kind of question, with shuffled and with blank images (0 after normalisation, the mean colour),
    and results.json in the official form for submission.
    """
    questions, full, device = setup.dataset.questions, n_predict is None, setup.device
    answers, n = {way: {} for way in (("", "shuffled ", "blank ") if full else ("",))}, 0

    def visit(batch):
        nonlocal n
        if not full and device.world == 1 and n >= n_predict:
            return
        n += len(batch.members)
        pairs = [(k, q) for k, i in enumerate(batch.members) for q in questions[i]]
        prompts = [encode_dialogue(setup.prepared.tokenizer, [(q.question, None)])[0] for _, q in pairs]
        for way, found in answers.items():
            img = {"": batch.img, "shuffled ": batch.img.roll(1, 0), "blank ": batch.img * 0}[way]
            with device.autocast():
                feats = model.vision.grid(img)                                    # (b, N, C): once for all questions
            texts = answer(model, feats[[k for k, _ in pairs]], prompts, setup, **how)
            found.update((q.question_id, text) for (_, q), text in zip(pairs, texts))
    value, shuffled, _ = mean_losses(model, setup, split, limit, lambda m, b: m(b.img, b.idx, b.targets)[1], visit)
    answers = {way: device.merge(found) for way, found in answers.items()}
    asked = [(i, q) for i in setup.store.usable(split)[:limit] for q in questions[i] if q.question_id in answers[""]]
    scores = {"loss": value, "shuffled loss": shuffled}
    short = {way: {key: to_short(text) for key, text in found.items()} for way, found in answers.items()}
    if any(q.answers for _, q in asked):                        # the official test split keeps its answers secret
        parts = {way: score_vqa([q for _, q in asked], texts) for way, texts in short.items()}
        scores |= {f"{way}accuracy": part["overall"] for way, part in parts.items()}
        kinds = parts[""]["answer_type"] | parts[""]["question_type"] if full else {}
        scores |= {f"accuracy, {kind}": value for kind, value in sorted(kinds.items())[:24]}
    if full and device.main:
        write_text(Path(setup.config.out_dir) / "results.json", json.dumps(submission(short[""])))
    return scores, [{"image": i, "question": q.question, "prediction": answers[""][q.question_id], "truth": q.answer,
                     "text": f"{q.question} {answers[''][q.question_id]}"} for i, q in asked]
