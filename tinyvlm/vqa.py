"""Visual question answering as data and text: the official files, answers as sentences, dialogues as tokens, scores.

From "Making the V in VQA matter" (Goyal et al. 2017, arXiv:1612.00837: the files, ten human answers a question) and
"Visual instruction tuning" (Liu et al. 2023, arXiv:2304.08485: questions as dialogue, loss on the assistant's words).

    <|system|> Answer .. <|user|> <image> What color is the fridge? <|assistant|> The fridge is white. <|endoftext|>
    masked                        image   masked                                  trained ...................

Left out: multiple choice, version 1, test-dev (a part of test), and grammar: a few safe rules make the sentences."""
import filecmp
import re
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from .config import UserError
from .files import ImageFinder, read_json, write_csv
from .gpt import IGNORE
from .layouts import Dataset, check_absent, files_called, make_splits
from .metrics import vqa_accuracy
from .tokenizer import SPECIAL_TOKENS

TAGS = END, IMAGE, BEGIN, USER, ASSISTANT = SPECIAL_TOKENS
SYSTEM = "Answer the question about the image."
SUBSETS = {"train": "train2014", "val": "val2014", "test": "test2015"}            # of COCO, whose images these are


@dataclass
class Question:
    """One question about one image. answers: of ten people; answer: the commonest of them, "" where they are secret."""
    question_id: int
    image_id: int
    question: str
    answers: list[str]
    answer: str = ""
    question_type: str = ""     # its opening words ("what color is the"), or a kind of shapes.ask
    answer_type: str = "other"  # yes/no | number | other


def read_vqa(questions_path, annotations_path=None):
    """The official json files -> list of Question; those of test come without annotations, so without answers.

    They are joined by the ids of question and image: two splits may both count from 0, but are about other images.
    """
    def by_ids(path, key):
        rows = read_json(path)[key]
        found = {(int(row["question_id"]), int(row["image_id"])): row for row in rows}
        if len(found) < len(rows):
            raise ValueError(f"{len(rows) - len(found)} of the {key} in {path.name} come twice")
        return found
    try:
        texts = by_ids(questions_path, "questions")
        if not annotations_path:
            return [Question(*ids, q["question"].strip(), []) for ids, q in texts.items()]
        people = by_ids(annotations_path, "annotations")
        if lacking := [ids for ids in texts if ids not in people]:
            raise ValueError(f"{len(lacking)} of {len(texts)} questions have no answers, such as {lacking[0]}")
        return [Question(*ids, q["question"].strip(), [each["answer"].strip() for each in people[ids]["answers"]], *(
            people[ids][key].strip() for key in ("multiple_choice_answer", "question_type", "answer_type")))
                for ids, q in texts.items()]
    except (KeyError, TypeError, ValueError, AttributeError) as fault:
        raise UserError(f"{questions_path} and {annotations_path and annotations_path.name} should be one split as VQA "
                        f"publishes it ({type(fault).__name__}: {fault!s:.120}); put both files of it there") from None


def vqav2(folder, seed=0, allow_broken=False):
    """The files of VQA v2 and COCO, at any depth of a folder -> Dataset with `questions[i]`, those about image i.

    The captions are the questions with their answers. Splits are the official ones; see make_splits where val or test
    lacks. The answers of test are secret: with its images in the folder it is kept, to be submitted and not scored.
    """
    folder, finder, notes, about, lists = Path(folder), ImageFinder(folder), [], {}, {}
    for split, subset in SUBSETS.items():
        parts = [f"v2_OpenEnded_mscoco_{subset}_questions.json", f"v2_mscoco_{subset}_annotations.json"]
        parts, found, where = parts[:1] if split == "test" else parts, {}, {}
        files = {name: files_called(finder, name) for name in parts}
        if split != "train" and not files[parts[0]]:
            continue
        for name, paths in files.items():
            if not paths:
                raise UserError(f"{folder} holds no {name}; put VQA's files there, or name it: --data-dir")
            if not all(filecmp.cmp(folder / paths[0], folder / path, shallow=False) for path in paths[1:]):
                raise UserError(f"{folder} holds {' and '.join(paths)}, which differ; keep one")
        read = read_vqa(*(folder / paths[0] for paths in files.values()))
        questions = [q for q in read if q.question and (split == "test" or any(q.answers))]
        if not questions:
            raise UserError(f"{parts[0]} in {folder} holds no question that anybody has answered; fetch it again")
        if len(questions) < len(read):
            notes.append(f"{len(read) - len(questions)} questions of {split}, empty or without answers, were left out")
        for form in (f"COCO_{subset}_{{:012d}}.jpg", "{:012d}.jpg"):        # in COCO's folders of 2017 are the same
            names = {form.format(i): i for i in {q.image_id for q in questions} - where.keys()}
            where |= {names[name]: path for name, path in finder.find(names).items()}
        for q in questions:
            found.setdefault(where.get(q.image_id), []).append(q)
        absent = {q.image_id for q in found.pop(None, [])}
        if found or split != "test":                            # many have the questions of test, but not its images
            check_absent(notes, [f"COCO_{subset}_{i:012d}.jpg" for i in sorted(absent)], len(found) + len(absent),
                         parts[0], folder, allow_broken)
            about, lists[split] = about | found, {*found}
    captions = [[f"{q.question} {q.answer}".strip() for q in questions] for questions in about.values()]
    dataset = Dataset("vqav2", [*about], captions, make_splits([*about], lists, seed, notes, folder), folder, notes)
    dataset.questions = [*about.values()]
    return dataset


# ---- answers as sentences, and back

BE, PLACE = "(?P<be>is|are|was|were)", "in|on|at|under|behind|near|next to|between|by|over|beside"
# "the cat's bowl", "it"; not "the man wearing", which is half of something, nor "the dog or the cat"
THING = r"(?P<it>(?:the|this|that|these|those|his|her|its?|he|she|they)(?: (?!(?:or|made|going|\w{3,}ing)\b)[\w'-]+)*)"
CLAIM = (rf"{BE} (?P<it>there|it|he|she|they|(?:this|that)(?= an? )|the \w+(?= \w+$| \w+ing ))"
         r" (?P<any>(?:any )?)(?P<rest>(?!any)(?!.*\bor\b).+)")
COUNT = rf"how many (?P<it>(?!of )[\w' -]+?) (?:are there|(?:can|do) you see|are(?= (?:{PLACE}) ))(?P<rest>.*)"
WHERE = rf"where {BE} {THING}"
RULES = (                       # question, answer, statement: the first that fits and leads back is taken
    (CLAIM, "yes", "yes, {it} {be} {rest}"),                    # is it a dog? are there any? is the man wearing a hat?
    (CLAIM, "no", "no, {it} {be} not {any}{rest}"),
    (".*", "yes|no", "{answer}"),
    (COUNT, "1", "there is 1{rest}"),
    (COUNT, r"\d+", "there are {answer} {it}{rest}"),           # there are 2 dogs in the park
    (rf"(?:what (?:colou?r|size)|how (?:big|large|tall)) {BE} {THING}", ".+", "{it} {be} {answer}"),
    (rf"what shape {BE} {THING}", "circle|square|triangle|star|diamond|cross|rectangle|heart", "{it} {be} a {answer}"),
    (rf"{WHERE} relative to (?P<rest>.+)", "left|right", "{it} {be} {answer} of {rest}"),
    (rf"{WHERE} relative to (?P<rest>.+)", "above|below", "{it} {be} {answer} {rest}"),
    (WHERE, rf"(?:{PLACE}) \w.*|inside|outside", "{it} {be} {answer}"),                     # the cat is on the table
    (rf"what {BE} {THING} doing", r"\w+ing\b.*", "{it} {be} {answer}"),                     # they are eating pizza
    (".*", ".+", "the answer is {answer}"))                     # always leads back


def to_sentence(question, answer):
    """A short answer as a sentence, by the first of RULES that fits; to_short takes it back, letter by letter.

    "Is it a dog?" no -> "No, it is not a dog."   "how many dogs are there?" 2 -> "there are 2 dogs."   "" -> ""
    """
    question, answer = " ".join(question.split()), " ".join(answer.split())
    plain = question[:1].lower() + question[1:].rstrip(" ?.!\uff1f")                    # "is it a dog"
    for pattern, answers, form in RULES:
        if match := re.fullmatch(answers, answer) and re.fullmatch(pattern, plain):
            text = form.format(answer=answer, **match.groupdict()) + "."
            text = text if question[:1].islower() else text[:1].upper() + text[1:]  # as the question begins
            if to_short(text) == answer:                                          # else the next rule
                return text
    return ""


def to_short(sentence):
    """The short answer in a sentence, or all of it: "Yes, it is." -> "yes", "There are 2." -> "2", "Red" -> "red"."""
    text = " ".join(sentence.split()).removesuffix(".")
    text = text[:1].lower() + text[1:]
    for form in ("(yes|no)(?:,.*)?", "the answer is (.*)", r"there (?:is|are) (\S+).*",
                 ".+? is (left|right|above|below)(?: of)? .+", ".+? (?:is|are|was|were) (?:an? )?(.+)"):
        if match := re.fullmatch(form, text):
            return match[1]
    return text


# ---- dialogues as tokens

def encode_dialogue(tokenizer, turns):
    """turns [(question, answer or None: to be generated), ..] -> (ids, trained): the loss is taken on the trained ids.
    Trained are the assistant's words and the end tag of each answer. No text from outside ever becomes a tag."""
    end, image, begin, user, assistant = map(tokenizer.token_to_id, TAGS)         # their ids
    start, row = [begin, *tokenizer.encode_plain(SYSTEM), user, image], []
    for question, answer in turns:
        masked = [*start, *tokenizer.encode_plain(" ".join(question.split())), assistant]
        reply = [] if answer is None else [*tokenizer.encode_plain(answer), end]
        row += [(i, False) for i in masked] + [(i, True) for i in reply]
        start = [user]                                                         # the image stands in the first turn only
    return [i for i, _ in row], [on for _, on in row]                             # (T,) both


def rows_of(questions, tokenizer, max_len, turns, left_out):
    """One image's list of Question -> [(ids, trained), ..]: dialogues of `turns` questions, answered in sentences. An
    answer that max_len cuts loses its end tag, too: the model must not learn to stop in mid-sentence. Questions without
    an answer, and rows without room for any, teach nothing and are left out. The Counter left_out counts all."""
    pairs = [(q.question, to_sentence(q.question, q.answer)) for q in questions if q.answer]
    rows = [encode_dialogue(tokenizer, pairs[k:k + turns]) for k in range(0, len(pairs), turns)]  # cut below
    left_out["questions without an answer"] += len(questions) - len(pairs)
    end = tokenizer.token_to_id(END)
    left_out["answers cut at the end or whole"] += sum(ids[max_len:].count(end) for ids, _ in rows)
    return [(ids[:max_len], trained[:max_len]) for ids, trained in rows if any(trained[:max_len])]


def to_targets(ids, trained):
    """ids [u, q, a, e] of which a, e are trained -> idx [u, q, a] and what follows each, targets [IGNORE, a, e]."""
    return ids[:-1], [i if on else IGNORE for i, on in zip(ids[1:], trained[1:])]


def show_tokens(tokenizer, idx, targets, n_image_tokens, color=True):
    """A row as text, a line per run of a kind: image (blue), masked (grey), trained (green); `|` parts the tokens.
    Trained tokens are shown as the loss sees them, from the targets: unshifted targets would double each word. What
    follows the last target is padding and not shown."""
    image, lines = tokenizer.token_to_id(IMAGE), []
    n = max(k for k, target in enumerate(targets, 1) if target != IGNORE)
    tokens = [("trained", 32, target) if target != IGNORE else ("image", 34, i) if i == image else ("masked", 90, i)
              for i, target in zip([*idx[:n], None], [IGNORE, *targets[:n]])]     # each token, or what stands for it
    for (kind, hue), run in groupby(tokens, key=lambda token: token[:2]):
        times = f" x {n_image_tokens}" * (kind == "image")
        line = f"{kind:8}|" + "".join(f"{repr(tokenizer.decode([i]))[1:-1]}{times}|" for *_, i in run)
        lines.append(f"\x1b[{hue}m{line}\x1b[0m" if color else line)
    return "\n".join(lines)


# ---- scores and files

def submission(predictions):
    """{question_id: short answer} -> the official form."""
    return [{"question_id": i, "answer": answer} for i, answer in predictions.items()]


def score_vqa(questions, predictions):
    """{question_id: short answer} -> accuracies, 0..1: {"overall": .., "answer_type": {..}, "question_type": {..}}."""
    def accuracy(part):
        return vqa_accuracy([predictions[q.question_id] for q in part], [q.answers for q in part])
    scores = {"overall": accuracy(questions)}
    for kind in ("answer_type", "question_type"):
        names = dict.fromkeys(getattr(q, kind) for q in questions)                # each once, in order
        scores[kind] = {name: accuracy([q for q in questions if getattr(q, kind) == name]) for name in names}
    return scores


def export_csv(questions, path):
    """image_id,text: a row per image, its questions as one dialogue with tags. A tag in their own text gets a space."""
    rows = {}
    for q in questions:
        text, reply = (re.sub(r"<(?=\||image>)", "< ", t) for t in (q.question, to_sentence(q.question, q.answer)))
        start = rows[q.image_id] + USER if q.image_id in rows else BEGIN + SYSTEM + USER + IMAGE
        rows[q.image_id] = start + text + ASSISTANT + reply + END * bool(reply)
    write_csv(path, ("image_id", "text"), rows.items())
