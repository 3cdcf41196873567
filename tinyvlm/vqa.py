"""Visual question answering as data and text: the official files, answers as sentences, dialogues as tokens, scores.

From "Making the V in VQA matter" (Goyal et al. 2017, arXiv:1612.00837: the files, ten human answers a question) and
"Visual instruction tuning" (Liu et al. 2023, arXiv:2304.08485: questions as dialogue, loss on the assistant's words).

    <|system|> Answer .. <|user|> <image> What color is the fridge? <|assistant|> The fridge is white. <|endoftext|>
    masked                        image   masked                                  trained ...................

Left out: multiple choice, answer confidences, and grammar: an answer becomes a sentence only where few rules are sure.
"""
import csv
import io
import re
from collections import Counter
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from PIL import Image

from .config import UserError
from .gpt import IGNORE
from .layouts import SPLITS, Dataset, check_absent, list_files, make_splits
from .metrics import vqa_accuracy
from .weights import atomic_write, read_json

FIELDS = {"questions": {"question_id": (int, str), "image_id": (int, str), "question": (str,)},
          "annotations": {"question_id": (int, str)}}
NUMBER = r"\d+(?:[.,]\d+)*|zero|one|two|three|four|five|six|seven|eight|nine|ten"


@dataclass
class Question:
    """One question about one image. answers: what (ten) people said; answer: what most of them said, "" if unknown."""
    question_id: int | str
    image_id: int | str
    question: str
    answers: list[str]
    answer: str = ""
    question_type: str = ""     # its opening words ("what color is the"), or a kind of shapes.ask
    answer_type: str = ""       # yes/no | number | other


def from_scene(i, asked):
    """What shapes.ask says about scene i -> list of Question, with one answer each."""
    types = {"yes/no": "yes/no", "count": "number"}
    return [Question(1000 * i + k, i, a["question"], [a["short"]], a["short"], a["kind"], types.get(a["kind"], "other"))
            for k, a in enumerate(asked)]


def _entries(path, key):
    """{str(question_id): entry} of an official file or a bare list, and the split it claims: "train", .. or None."""
    data, by_id = read_json(path), {}
    entries = data.get(key) if isinstance(data, dict) else data
    for n, entry in enumerate(entries if entries and isinstance(entries, list) else [None]):
        if not isinstance(entry, dict) or any(type(entry.get(f)) not in kinds for f, kinds in FIELDS[key].items()):
            raise UserError(f'{path} should be {{"{key}": [..]}}, each with {", ".join(FIELDS[key])}; entry {n} is not')
        if by_id.setdefault(str(entry["question_id"]), entry) is not entry:
            raise UserError(f"{path} holds question_id {entry['question_id']} twice; remove one of the two")
    split = re.search("train|val|test", str(data.get("data_subtype"))) if isinstance(data, dict) else None
    return by_id, split and split[0]


def _join(entry, mark, path):
    answers = mark.get("answers", [])
    answers = [a.get("answer") if isinstance(a, dict) else a for a in answers] if isinstance(answers, list) else [None]
    if any(type(a) not in (str, int, float) for a in answers):
        raise UserError(f"{path}: the answers of question {entry['question_id']} should be a list of texts; mend it")
    answers = [str(a).strip() for a in answers]
    best = [str(mark[key]).strip() for key in ("multiple_choice_answer", "answer") if mark.get(key) is not None]
    best = next(filter(None, best + [answer for answer, _ in Counter(filter(None, answers)).most_common(1)]), "")
    kind = "yes/no" if best.lower() in ("yes", "no") else "number" if re.fullmatch(NUMBER, best) else "other"
    return Question(entry["question_id"], entry["image_id"], entry["question"], answers if any(answers) else [best],
                    best, mark.get("question_type") or "", mark.get("answer_type") or kind)


def read_vqa(questions_path, annotations_path=None, notes=None):
    """The official json files, joined by question id -> list of Question, in file order.

    Questions nobody answered are left out, and a sentence says how many (appended to `notes`, else printed). Raises
    UserError on broken or foreign files, an id that comes twice, and annotations of another split than the questions.
    """
    entries, split = _entries(questions_path, "questions")
    if annotations_path is None:
        return [Question(e["question_id"], e["image_id"], e["question"], []) for e in entries.values()]
    marks, other = _entries(annotations_path, "annotations")
    met = [i for i, e in entries.items() if i in marks      # two splits may both count from 0, but about other images
           and str(marks[i].get("image_id", e["image_id"])) == str(e["image_id"])]
    if 2 * len(met) < min(len(entries), len(marks)) or split and other and split != other:
        raise UserError(f"{annotations_path} ({other or '?'}) does not belong to {questions_path} ({split or '?'}): "
                        f"{len(met)} of {len(entries)} questions match; give the annotations of the same split")
    questions = [q for q in (_join(entries[i], marks[i], annotations_path) for i in met) if q.answer]
    if not questions:
        raise UserError(f"{annotations_path} answers none of the questions in {questions_path}; fetch it again")
    if len(questions) < len(entries):
        note = f"{len(entries) - len(questions)} of {len(entries)} questions of {questions_path} left out: no answer"
        print(note) if notes is None else notes.append(note)
    return questions


def _split_of(text):
    found = re.findall(r"(?<![a-z])(train|val|test)(?:ing|id|idation)?(?![a-z])", text.lower())
    return found[-1] if found else None


def _image_key(image_id):
    """9, "009", "COCO_val2014_000000000009.jpg" -> 9, the integer the stem ends in; without one, the stem."""
    stem = Path(str(image_id)).stem
    digits = re.search("[0-9]{1,18}$", stem)
    return int(digits[0]) if digits else stem


def find_vqa(folder):
    """-> question files {split: (questions, annotations or None)} and image files {_image_key: [path in folder, ..]}.

    Json files lie in the folder or up to two below, named *train*questions*.json and so on (a folder may name the split
    instead; with no name at all it is "train"). Of several, v2 goes before v1, open-ended before multiple choice.
    """
    found, images, types = {}, {}, tuple(Image.registered_extensions())
    for path in list_files(folder):
        where, _, name = path.lower().rpartition("/")
        kind = re.search(r"(question|annotation).*\.json$", name)
        if kind and path.count("/") <= 2:
            split = re.search("|".join(SPLITS), name) or [_split_of(where) or "train"]
            rank = (not name.startswith("v2_"), "multiplechoice" in name, "test-dev" in name)
            found.setdefault((split[0], kind[1]), []).append((rank, folder / path))
        elif name.endswith(types):
            images.setdefault(_image_key(path), []).append(path)
    for (split, kind), files in found.items():
        files.sort()
        if len(files) > 1 and files[0][0] == files[1][0]:
            raise UserError(f"{files[0][1]} and {files[1][1]} both hold {split} {kind}s; keep one of them")
    return {split: (found[split, "question"][0][1], found.get((split, "annotation"), [(0, None)])[0][1])
            for split in SPLITS if (split, "question") in found}, images


def _choose(image_id, paths, split, strict):
    """Which of the paths with its key is the image: the one in its own split's folder. None if there is none."""
    own = [p for p in paths if _split_of(p) == split] or [p for p in paths if not _split_of(p)]
    own = own or ([] if strict else paths)
    own = [p for p in own if Path(p).stem == Path(str(image_id)).stem] or own
    if len(own) > 1:
        raise UserError(f"image {image_id} of {split} could be {own[0]} or {own[1]}; keep one of them")
    return own[0] if own else None


class VQADataset(Dataset):
    """A Dataset whose captions are questions; `questions[i]` is the list of Question about image i."""

    def may_flip(self, i):
        """Nor may an answer say left or right."""
        return super().may_flip(i) and not any(re.search("left|right", a) for q in self.questions[i] for a in q.answers)


def vqav2(folder, seed=0, allow_broken=False):
    """A data folder in the layout of VQA v2 -> VQADataset. Raises UserError naming what is missing.

    Splits are the official ones; see make_splits where one or two lack. A test without answers is kept if its images
    are there, to be submitted and not scored.
    """
    folder, notes, about, lists = Path(folder), [], {}, {}
    files, images = find_vqa(folder)
    if not files or len(files) > 1 and "train" not in files:
        raise UserError(f"{folder} holds no *train*questions*.json; put VQA's json files there, or name it: --data-dir")
    # two splits with an image 7 each count from 0, so none may look in another's folder; COCO's numbers are unique
    strict = any(len({_split_of(p) for p in paths} - {None}) > 1 for paths in images.values())
    for split, (asked, marks) in files.items():
        if marks is None and (split != "test" or len(files) == 1):
            raise UserError(f"{asked} has no *{split}*annotations*.json beside it; add the answers")
        by_id = {}
        for q in read_vqa(asked, marks, notes):
            by_id.setdefault(q.image_id, []).append(q)
        paths = {i: _choose(i, images.get(_image_key(i), []), split, strict) for i in by_id}
        absent = [i for i in by_id if paths[i] is None]
        if marks or len(absent) < len(by_id):   # most people have the test questions but not the images: no test then
            check_absent(notes, absent, len(by_id), asked, folder, allow_broken, f"images of {asked.name}")
            lists[split] = {(split, i) for i in by_id if paths[i]}      # splits may share an image, but no question
            about.update({(split, i): (paths[i], by_id[i]) for i in by_id if paths[i]})
        notes.append(f"{split}: {sum(map(len, by_id.values()))} questions in {asked.name}" + (
            "" if marks else ", no answers: to be submitted" if split in lists else ", no images: left out"))
    splits = make_splits(list(about), lists, seed, notes, folder)
    names, questions = ([pair[k] for pair in about.values()] for k in (0, 1))
    dataset = VQADataset("vqav2", names, [[q.question for q in qs] for qs in questions], splits, folder, notes)
    dataset.questions = questions
    return dataset


# ---- answers as sentences, and back

COLOR = ("(?:black|white|red|green|blue|yellow|orange|purple|pink|brown|gr[ae]y|silver|gold|tan|beige|maroon|teal|"
         "cyan|turquoise|magenta|cream|navy|light|dark)")
PLACE = "in|on|at|under|behind|near|next to|inside|outside|between|by|over|above|below|beside"
BE, REST = "(?P<be>is|are|was|were)", "(?P<rest>.+)"
THING = r"(?P<it>(?:the|this|that|these|those|his|her|their|its) [\w' -]*\w|this|that|it|he|she|they)"
CLAIM = (rf"{BE} (?P<it>there|it|he|she|they|(?:this|that)(?= an? | the )|"
         rf"the \w+(?= (?:{COLOR}|\w+ing(?: (?:an?|the|his|her) \w+)?)$)) (?P<any>(?:any )?){REST}")
COUNT = (r"how many (?P<it>(?!of )[\w' -]+?) (?:are there|are visible|are|do you see|can you see)"
         rf"(?P<rest>(?: (?:{PLACE}) .+)?)")
NAMED = r"(?:what|which) (?P<it>(?:(?:kind|type|sort) of )?(?!(?:one|all|else|way|people|is|it|he|she|th\w+)\b)\w+"

# (question, answer, statement with {a} for the answer): the first that fits, is safe and leads back is taken
RULES = [(re.compile(asks, re.IGNORECASE), re.compile(says), text) for asks, says, text in (
    (CLAIM, "yes", "yes, {it} {be} {rest}"),                    # Is it a dog? Are there any? Is the man wearing a hat?
    (CLAIM, "no", "no, {it} {be} not {any}{rest}"),
    (COUNT, "1|one", "there is {a}{rest}"),                     # How many dogs are in the park?
    (COUNT, NUMBER, "there are {a} {it}{rest}"),
    (rf"what colou?r {BE} {THING}", rf"{COLOR}(?:(?:,|,? and|) {COLOR})*", "{it} {be} {a}"),
    (rf"(?:how (?:big|large|small|tall)|what size) {BE} {THING}", "small|large|big|tiny|huge|medium", "{it} {be} {a}"),
    (rf"what shape {BE} {THING}", "circle|square|triangle|star|diamond|cross|rectangle|heart", "{it} {be} a {a}"),
    (rf"where {BE} {THING} relative to {REST}", "left|right", "{it} {be} {a} of {rest}"),
    (rf"where {BE} {THING} relative to {REST}", "above|below", "{it} {be} {a} {rest}"),
    (rf"where {BE} {THING}", rf"(?:{PLACE}) \w.*|inside|outside", "{it} {be} {a}"),         # the cat is on the table
    (rf"what {BE} {THING} doing", r"\w+ing\b.*", "{it} {be} {a}"),                          # they are eating pizza
    (".*", r"(?:yes|no|not|none|nothing|nobody|un\w+|can't|cannot|don't|i|it|maybe)\b.*", "{a}"),
    (rf"{NAMED}(?:[^s\W]|[sui]s)) {BE} .+", ".+", "the {it} is {a}"),                       # the kind of dog is poodle
    (rf"{NAMED}[^\Wsui]s) {BE} .+", ".+", "the {it} are {a}"),
    (".*", ".+", "the answer is {a}"))]                         # always leads back
# A phrase with one of these may be half of something ("the man wearing"), or mean another thing once stated ("or")
UNSURE = re.compile(
    r"\b(?:or|and|is|are|was|were|do|does|did|who|what|which|no|not|any\w*|some\w*|ever|yet|either|enough|relative)\b|"
    r" that\b|[,;:?]|^(?!an? )\w+ .*\w (?!thing$|building$|ceiling$|painting$)\w+(?:ing|ed|en)$|"
    rf"\b(?:{PLACE}|of|to|with|from|for|up|down|out|off)$", re.IGNORECASE)


def to_sentence(question, answer, question_type=""):
    """A short answer as a sentence, by the first of RULES that is safe. to_short takes it back, letter by letter.

    "Is it a dog?" no -> "No, it is not a dog."   "How many dogs are there?" 2 -> "There are 2 dogs."
    question_type: VQA's opening words; a question that only comes to them later is read from there on. A lower-case
    question gets a lower-case sentence, an empty answer an empty one.
    """
    question, answer = " ".join(question.split()), " ".join(answer.split())
    start = question.lower().find(question_type.lower()) if " " in question_type else 0
    for asks, says, text in RULES:
        match = asks.fullmatch(question[max(0, start):].rstrip(" ?.!"))
        parts = match.groupdict() if match and says.fullmatch(answer) else None
        if parts is not None and not any(UNSURE.search(parts.get(part, "")) for part in ("it", "rest")):
            text = text.format(a=answer, **{**parts, "be": parts.get("be", "").lower()}) + "."
            text = text if question[:1].islower() else text[:1].upper() + text[1:]
            if to_short(text) == to_short(text, question) == answer:
                return text
    return ""


def to_short(sentence, question=""):
    """The short answer in a sentence: "Yes, it is." -> "yes", "There are 2 dogs." -> "2", "The cat is red." -> "red".

    Sentences of to_sentence need no question. With it, freer ones are read too: a yes/no question is answered by a
    leading yes or no, "how many" by the first number. What fits nothing is the answer itself, without its period.
    """
    text, first = " ".join(sentence.split()).removesuffix("."), question.lower().partition(" ")[0]
    if text.lower().startswith("the answer is "):
        return text[len("the answer is "):]
    claim = first in "is are was were do does did can could has have will would".split()
    for pattern in (r"(yes|no)\b.*" if claim else "(yes|no)(?:,.*)?", rf"there (?:is|are) ({NUMBER})\b.*",
                    r".+? is (left|right|above|below)(?: of)? (?:the|an?) .+", r".+? (?:is|are|was|were) (?:an? )?(.+)",
                    rf".*?\b({NUMBER})\b.*" if question.lower().startswith("how many ") else "(?!)"):
        if match := re.fullmatch(pattern, text, re.IGNORECASE):
            return match[1].lower() if match[1].lower() in ("yes", "no") else match[1]
    return text[:1].lower() + text[1:]


# ---- dialogues as tokens

TAGS = ("<image>", "<|system|>", "<|user|>", "<|assistant|>", "<|endoftext|>")      # the last one ends every answer
SYSTEM = "Answer the question about the image."


def encode_dialogue(tokenizer, turns, n_images=1, system=SYSTEM, max_len=None, places_images=False, cut=None):
    """turns [(question, answer or None: to be said), ..] -> (ids, trained): trained marks the tokens the loss is on.

    Trained are the assistant's words and the end tag of each answer. All images stand before the first question, or
    with places_images where the questions say "<image>"; no other text becomes a tag. Beyond max_len ids, turns are
    dropped from the end; of the first, the answer is cut and has no end tag, or the model would learn to stop in
    mid-sentence. The Counter `cut` counts lost "turns", cut "answers", and "questions" without room for any: these
    train nothing. Raises UserError on a wrong number of images, and on too long a dialogue if there is no `cut` or its
    last answer is open: the question itself would go.
    """
    tags = [tokenizer.token_to_id(tag) for tag in TAGS]
    assert None not in tags, f"the tokenizer lacks one of {TAGS}: call add_special_tokens(TAGS) first"
    assert turns and all(answer is not None for _, answer in turns[:-1]), f"only the last answer may be open: {turns}"
    image, start, user, assistant, end = tags
    placed = sum(question.count("<image>") for question, _ in turns) if places_images else n_images
    if placed != n_images or not placed:
        raise UserError(f"the prompt holds {placed} <image> and {n_images} images were given; place each image once")
    ids = [start, *tokenizer.encode(system, special=False)] if system else []
    trained = [False] * len(ids)
    for k, (question, answer) in enumerate(turns):
        asked = [user] + [image] * (0 if places_images or k else n_images)
        for n, part in enumerate(question.split("<image>") if places_images else [question]):
            asked += [image] * (n > 0) + tokenizer.encode(part, special=False)
        said = [] if answer is None else tokenizer.encode(answer, special=False) + [end]
        room = len(said) if max_len is None else max_len - len(ids) - len(asked) - 1
        if room < len(said):
            if cut is None or turns[-1][1] is None:
                raise UserError(f"the dialogue is longer than {max_len} tokens; shorten it, or begin a new one")
            cut["turns"] += len(turns) - k - (k == 0)
            if k:
                break
            cut["answers" if room > 0 else "questions"] += 1
        ids += [*asked, assistant, *said[:max(0, room)]]
        trained += [False] * (len(asked) + 1) + [True] * min(len(said), max(0, room))
        if room < len(said):
            break
    return ids[:max_len], trained[:max_len]


def rows_of(questions, tokenizer, max_len, turns=1, system=SYSTEM, cut=None):
    """One image's list of Question -> [(ids, trained), ..]: dialogues of `turns` questions, answered in sentences."""
    pairs = [(q.question, to_sentence(q.question, q.answer, q.question_type)) for q in questions]
    return [encode_dialogue(tokenizer, pairs[k:k + turns], 1, system, max_len, cut=cut)
            for k in range(0, len(pairs), turns)]


def to_targets(ids, trained):
    """ids [u, q, a, e] of which a, e are trained -> idx [u, q, a] and what follows each, targets [IGNORE, a, e]."""
    return ids[:-1], [i if on else IGNORE for i, on in zip(ids[1:], trained[1:])]


def show_tokens(tokenizer, ids, marks, n_image_tokens, color=True):
    """A row of a batch, a line per run of a kind: image (blue), masked (grey), trained (green); `|` parts the tokens.

    marks: `trained` of encode_dialogue, or the row's targets. From targets, trained tokens are shown as the loss sees
    them: unshifted targets would double each word. What follows the last target is padding and not shown.
    """
    ids, marks = (x.tolist() if hasattr(x, "tolist") else list(x) for x in (ids, marks))
    if not all(isinstance(mark, bool) for mark in marks):
        ids = ids[:1] + [i if t == IGNORE else t for i, t in zip(ids[1:] + [0], marks)]
        marks = [False] + [t != IGNORE for t in marks]
        ids = ids[:len(ids) - marks[::-1].index(True)] if any(marks) else ids[:-1]
    lines, image = [], tokenizer.token_to_id("<image>")
    kinds = [("trained" if on else "image" if i == image else "masked", i) for i, on in zip(ids, marks)]
    for kind, run in groupby(kinds, key=lambda pair: pair[0]):
        texts = ["".join(c if c.isprintable() else repr(c)[1:-1] for c in tokenizer.decode([i])) for _, i in run]
        line = f"{kind:8}|{'|'.join(text + f' x {n_image_tokens}' * (kind == 'image') for text in texts)}|"
        lines.append(f"\x1b[{dict(image=34, masked=90, trained=32)[kind]}m{line}\x1b[0m" if color else line)
    return "\n".join(lines)


# ---- scores and files

def submission(predictions):
    """{question_id: short answer} -> the official form."""
    return [{"question_id": i, "answer": answer} for i, answer in predictions.items()]


def score_vqa(questions, predictions):
    """{question_id: short answer} -> official accuracies in 0..1: {"overall", "answer_type": {}, "question_type": {}}.

    Raises UserError when a prediction is missing, MetricError for a question without human answers.
    """
    missing = [q.question_id for q in questions if q.question_id not in predictions]
    if missing:
        raise UserError(f"{len(missing)} of {len(questions)} questions have no prediction, first {missing[0]}; add it")
    said, humans = [predictions[q.question_id] for q in questions], [q.answers for q in questions]
    kinds = {by: [getattr(q, by) for q in questions] for by in ("answer_type", "question_type")}
    scores = {by: vqa_accuracy(said, humans, kind) for by, kind in kinds.items()}
    return {"overall": [part.pop("overall") for part in scores.values()][0], **scores}


def export_csv(questions, path, system=SYSTEM):
    """image_id,text: a row per image, its questions as one dialogue with tags. A tag in their own text gets a space."""
    rows, (image, start, user, assistant, end) = {}, TAGS
    for q in questions:
        said = to_sentence(q.question, q.answer, q.question_type)
        asked, said = (re.sub(r"<(?=\||image>)", "< ", text) for text in (q.question, said))
        before = rows[q.image_id] + user if q.image_id in rows else start + system + user + image
        rows[q.image_id] = before + asked + assistant + said + end * bool(said)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([("image_id", "text"), *rows.items()])
    atomic_write(path, lambda file: file.write(text.getvalue().encode("utf-8", errors="replace")))
