"""--task vqa: the second half of system 5, a prefix model that answers questions about a picture in sentences.

The model and its building are captioning.py's, the dialogues as tokens vqa.py's. The loss is on the assistant's tokens
only. Accuracy is the official one of VQA v2, of the short answers read off the sentences, each question alone.
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
from .task import Prepared, run_split, write
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
    start, left_out = captioning.load_start(config, dataset, run=run), Counter()
    tokenizer, meta = start.tokenizer, start.meta
    tokenizer.add_special_tokens(TAGS)
    rows = [[to_targets(*row) for row in rows_of(questions, tokenizer, config.max_tokens, config.turns, left_out)]
            for questions in dataset.questions]
    runs = (groupby(targets, lambda target: target != IGNORE) for of_image in rows for _, targets in of_image)
    longest = max((len([*part]) for parts in runs for trained, part in parts if trained), default=0)
    if not longest:
        raise UserError(f"--max-tokens {config.max_tokens} leaves no room for any answer; raise it")
    meta["longest"] = run.config["longest"] if run else longest
    notes = [f"{n} {what}" for what, n in (+left_out).items()]
    return Prepared((start.run or start.vision).recipe, rows, tokenizer, meta, start, notes=notes)


def room_for_text(model):
    """How many tokens of text, <image> among them, fit beside the image into the decoder's context."""
    return model.config.text.block_size + 1 - captioning.n_image_tokens(model.config)


def evaluate(model, setup, split, limit=None, n_predict=None, **how):
    """-> scores, examples: the loss, and the accuracy of the answers about the first n_predict images (None: all).

    With all of them: by kind of question, with shuffled and with blank images (0 after normalisation, the mean colour),
    and results.json in the official form for submission. A question that leaves no room is not answered, so wrong.
    """
    questions, full, tokenizer = setup.dataset.questions, n_predict is None, setup.prepared.tokenizer
    longest = setup.prepared.meta["longest"]
    room = room_for_text(model) - longest

    def predict(batch):
        """-> {image: {(way, question_id): sentence}}"""
        rows = [(k, q.question_id, encode_dialogue(tokenizer, [(q.question, None)])[0])
                for k, i in enumerate(batch.members) for q in questions[i]]
        rows = [row for row in rows if len(row[2]) <= room]
        answers = {i: {} for i in batch.members}
        ways = {"": batch.img, "shuffled ": batch.img.roll(1, 0), "blank ": batch.img * 0}
        for way, img in ways.items() if full else [("", batch.img)]:
            feats = model.vision.grid(img)                                        # (b, N, C): once for all questions
            for part in (rows[k:k + 256] for k in range(0, len(rows), 256)):
                places, ids, prompts = zip(*part)
                for k, key, row in zip(places, ids, write(model, feats[[*places]], prompts, setup, longest, **how)):
                    answers[batch.members[k]][way, key] = tokenizer.decode(row).strip()
        return answers
    # the official test split keeps its answers secret
    secret = not any(q.answers for i in setup.dataset.splits[split] for q in questions[i])
    loss = None if secret else captioning.cross_entropy
    answers, value, shuffled, _ = run_split(model, setup, split, limit, predict, loss, n_predict)
    pairs = [(i, q, answers[i].get(("", q.question_id), "")) for i in answers for q in questions[i]]
    scores = {} if secret else {"loss": value, "shuffled loss": shuffled}
    short = {q.question_id: to_short(text) for _, q, text in pairs}
    if not secret:
        for way in ("", "shuffled ", "blank ") if full else ("",):
            texts = {q.question_id: to_short(answers[i].get((way, q.question_id), "")) for i, q, _ in pairs}
            parts = score_vqa([q for _, q, _ in pairs], texts)
            scores[f"{way}accuracy"] = parts["overall"]
            kinds = parts["answer_type"] | parts["question_type"] if full and not way else {}
            scores |= {f"accuracy, {kind}": part for kind, part in sorted(kinds.items())[:24]}
    if full and setup.device.main:
        write_text(Path(setup.config.out_dir) / "results.json", json.dumps(submission(short)))
    return scores, [{"image": i, "question": q.question, "prediction": text, "truth": q.answer} for i, q, text in pairs]
