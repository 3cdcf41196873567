"""Visual question answering as data and text: the official files, answers as sentences, dialogues as tokens, scores.

From "Making the V in VQA matter" (Goyal et al. 2017, arXiv:1612.00837: the files, ten human answers a question) and
"Visual instruction tuning" (Liu et al. 2023, arXiv:2304.08485: questions as dialogue, loss on the assistant's words).

    <|system|> Answer .. <|user|> <image> What color is the fridge? <|assistant|> The fridge is white. <|endoftext|>
    masked                        image   masked                                  trained ...................

Left out: multiple choice, test-dev (a part of test), and grammar: answers become sentences by a few safe rules.
"""
import re
from collections import Counter
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from .config import UserError
from .files import ImageFinder, list_files, read_json, write_csv
from .gpt import IGNORE
from .layouts import SPLITS, Dataset, check_absent, make_splits
from .metrics import vqa_accuracy
from .tokenizer import SPECIAL_TOKENS

TAGS = END, IMAGE, BEGIN, USER, ASSISTANT = SPECIAL_TOKENS
SYSTEM = "Answer the question about the image."


@dataclass
class Question:
    """One question about one image. answers: of ten people; answer: the commonest of them, "" where they are secret."""
    question_id: int
    image_id: int | str
    question: str
    answers: list[str]
    answer: str = ""
    question_type: str = ""     # its opening words ("what color is the"), or a kind of shapes.ask
    answer_type: str = "other"  # yes/no | number | other


# ---- the official files

def _by_id(path, key):
    entries = read_json(path)[key]
    found = {entry["question_id"]: entry for entry in entries}
    if len(found) < len(entries):
        raise UserError(f"{path} holds {len(entries) - len(found)} of its question_ids twice; keep one entry of each")
    return found


def read_vqa(questions_path, annotations_path, notes):
    """The official json files, joined by question id -> list of Question in file order.

    annotations_path None: the answers are secret, as those of test. Raises UserError on files in another form, and on
    annotations of other questions: two splits may both count from 0, but they are about other images.
    """
    try:
        entries, questions = _by_id(questions_path, "questions"), []
        people = _by_id(annotations_path, "annotations") if annotations_path else {
            i: {"image_id": e["image_id"], "answers": [], "multiple_choice_answer": ""} for i, e in entries.items()}
        for i, e in entries.items():
            a = people.get(i)
            if a and a["image_id"] == e["image_id"]:
                questions.append(Question(i, e["image_id"], e["question"].strip(),
                                          [answer["answer"].strip() for answer in a["answers"]],
                                          a["multiple_choice_answer"].strip(), a.get("question_type", ""),
                                          a.get("answer_type", "other")))
    except (KeyError, TypeError, AttributeError) as fault:
        raise UserError(f"{questions_path} and {annotations_path} should be as VQA publishes them ({fault}); fetch "
                        "both again") from None
    if 2 * len(questions) < min(len(entries), len(people)) or not questions:
        raise UserError(f"{annotations_path} does not belong to {questions_path}: {len(questions)} of {len(entries)} "
                        "questions match; give the annotations of the same split")
    if len(questions) < len(entries):
        notes.append(f"{len(entries) - len(questions)} of {len(entries)} questions of {questions_path} have no answer")
    return questions


def _find_json(folder):
    """{("train", "questions"): "v2_OpenEnded_mscoco_train2014_questions.json", ..}, wherever they lie in the folder."""
    found = {}
    for path in list_files(folder):
        match = re.search(r"(?:^|[/_])(train|val|test)\d*_(questions|annotations)\.json$", path.lower())
        if match and "multiplechoice" not in path.lower() and found.setdefault(match.groups(), path) != path:
            raise UserError(f"{folder} holds both {found[match.groups()]} and {path}; keep the one to use")
    return found


def _find_image(finder, image_id, subset):
    """Image 9 of val2014 is COCO_val2014_000000000009.jpg, or 000000000009.jpg: COCO's folders of 2017 hold the images
    of 2014, split anew, under the same numbers. A text is a file's name. None where no file is found.
    """
    if isinstance(image_id, str):
        return finder.find(image_id)
    return finder.find(f"COCO_{subset}_{image_id:012d}.jpg") or finder.find(f"{image_id:012d}.jpg")


def vqav2(folder, seed=0, allow_broken=False):
    """A data folder in the layout of VQA v2 -> Dataset with `questions[i]`, the list of Question about image i.

    The captions are the questions with their answers. Splits are the official ones; see make_splits where one or two
    lack. A test without answers is kept if its images are there, to be submitted and not scored.
    """
    folder, notes, about, lists = Path(folder), [], {}, {}
    files, finder = _find_json(folder), ImageFinder(folder)
    present = [split for split in SPLITS if (split, "questions") in files]
    if not present or len(present) > 1 and "train" not in present:
        raise UserError(f"{folder} holds no .._train2014_questions.json; put VQA's files there, or name it: --data-dir")
    for split in present:
        source, annotations = files[split, "questions"], files.get((split, "annotations"))
        if not annotations and (split != "test" or len(present) == 1):
            raise UserError(f"{folder / source} has no .._{split}.._annotations.json beside it; add the answers")
        subset, by_image = re.findall(rf"{split}\d*", source.lower())[-1], {}
        for q in read_vqa(folder / source, annotations and folder / annotations, notes):
            by_image.setdefault(q.image_id, []).append(q)
        paths = {i: _find_image(finder, i, subset) for i in by_image}
        absent = [i for i in by_image if not paths[i]]
        kept = annotations or len(absent) < len(by_image)       # many have the questions of test, but not its images
        notes.append(f"{split}: {sum(map(len, by_image.values()))} questions in {source}" + (
            "" if annotations else ", no answers: to be submitted" if kept else ", no images: left out"))
        if kept:
            check_absent(notes, absent, len(by_image), source, folder, allow_broken, f"images of {source}")
            about |= {(split, i): (paths[i], by_image[i]) for i in by_image if paths[i]}
            lists[split] = {key for key in about if key[0] == split}
    splits = make_splits(list(about), lists, seed, notes, folder)
    names, questions = map(list, zip(*about.values()))
    captions = [[f"{q.question} {q.answer}".strip() for q in some] for some in questions]
    dataset = Dataset("vqav2", names, captions, splits, folder, notes)
    dataset.questions = questions
    return dataset


# ---- answers as sentences, and back

NUMBER = r"\d+(?:[.,]\d+)*|zero|one|two|three|four|five|six|seven|eight|nine|ten"
SHAPE = "circle|square|triangle|star|diamond|cross|rectangle|heart"
PLACE = "in|on|at|under|behind|near|next to|inside|outside|between|by|over|above|below|beside"
# Statements are made of plain words. These are none: they mean another thing once stated ("a train or a bus", "the cat
# that is here"), or are half of something ("the man wearing").
WORD = (r"(?!(?:or|and|is|are|was|were|do|does|did|who|what|which|that|no|not|any\w*|some\w*|ever|yet|either|enough|of|"
        rf"to|with|from|for|up|down|out|off|taken|made|seen|{PLACE})\b|(?!building)\w{{3,}}(?:ing|ed)\b)[\w'-]+")
BE, NOUN = "(?P<be>is|are|was|were)", f"{WORD}(?: {WORD})?"
WHERE = rf"(?: (?:{PLACE}) (?:the|this) {WORD})?"
THING = rf"(?P<it>(?:the|this|that|these|those|his|her|their|its) {NOUN}|this|that|it|he|she|they)"
CLAIM = (rf"{BE} (?P<it>there|it|he|she|they|(?:this|that)(?= an? )|the {WORD}(?= (?:an? )?\w+$| \w+ing \w+ \w+$)) "
         rf"(?P<any>(?:any )?)(?P<rest>(?:\w+ing|(?:\w+ing )?(?:(?:an?|the|his|her) )?{NOUN}){WHERE})")
COUNT = rf"how many (?P<it>{NOUN}) (?:are|do you see|can you see)(?: there| visible)?(?P<rest>{WHERE})"
NAMED = r"(?:what|which) (?P<it>(?:(?:kind|type) of )?(?!one|all|else)\w*[^s\W]) is (?:th\w+|it|in|on|being)\b.*"

# (question, answer, statement with {a} for the answer): the first that fits and leads back is taken
RULES = [(re.compile(asks, re.IGNORECASE), re.compile(says), text) for asks, says, text in (
    (CLAIM, "yes", "yes, {it} {be} {rest}"),                    # Is it a dog? Are there any? Is the man wearing a hat?
    (CLAIM, "no", "no, {it} {be} not {any}{rest}"),
    (".*", r"(?:yes|no|not|none|nothing|nobody|un\w+|can't|cannot|don't|i|it|maybe)\b.*", "{a}"),
    (COUNT, "1|one", "there is {a}{rest}"),                     # How many dogs are in the park?
    (COUNT, NUMBER, "there are {a} {it}{rest}"),
    (rf"what colou?r {BE} {THING}", ".+", "{it} {be} {a}"),
    (rf"(?:how (?:big|large|small|tall)|what size) {BE} {THING}", "[a-z]+", "{it} {be} {a}"),
    (rf"what shape {BE} {THING}", SHAPE, "{it} {be} a {a}"),
    (rf"where {BE} {THING} relative to (?P<rest>the {NOUN})", "left|right", "{it} {be} {a} of {rest}"),
    (rf"where {BE} {THING} relative to (?P<rest>the {NOUN})", "above|below", "{it} {be} {a} {rest}"),
    (rf"where {BE} {THING}", rf"(?:{PLACE}) \w.*|inside|outside", "{it} {be} {a}"),         # the cat is on the table
    (rf"what {BE} {THING} doing", r"\w+ing\b.*", "{it} {be} {a}"),                          # they are eating pizza
    (NAMED, ".+", "the {it} is {a}"),                                                       # the kind of dog is poodle
    (".*", ".+", "the answer is {a}"))]                         # always leads back


def to_sentence(question, answer):
    """A short answer as a sentence, by the first of RULES that fits. to_short takes it back, letter by letter.

    "Is it a dog?" no -> "No, it is not a dog."   "How many dogs are there?" 2 -> "There are 2 dogs."
    A lower-case question gets a lower-case sentence, an empty answer an empty one.
    """
    question, answer = " ".join(question.split()), " ".join(answer.split())
    for asks, says, text in RULES:
        if match := says.fullmatch(answer) and asks.fullmatch(question.rstrip(" ?.!")):
            parts = match.groupdict()
            text = text.format(a=answer, **{**parts, "be": parts.get("be", "").lower()}) + "."
            text = text if question[:1].islower() else text[:1].upper() + text[1:]
            if to_short(text) == answer:
                return text
    return ""


def to_short(sentence):
    """The short answer in a sentence: "Yes, it is." -> "yes", "There are 2 dogs." -> "2", "The cat is red." -> "red".

    What has none of these forms is the answer itself, without its period.
    """
    text = " ".join(sentence.split()).removesuffix(".")
    claim = re.fullmatch("(yes|no)(?:,.*)?", text, re.IGNORECASE)
    if claim:
        return claim[1].lower()
    for form in (r"the answer is (.*)", rf"there (?:is|are) ({NUMBER})\b.*",
                 r".+? is (left|right|above|below)(?: of)? (?:the|an?) .+", r".+? (?:is|are|was|were) (?:an? )?(.+)"):
        if match := re.fullmatch(form, text, re.IGNORECASE):
            return match[1]
    return text[:1].lower() + text[1:]


# ---- dialogues as tokens

def encode_dialogue(tokenizer, turns, n_images=1, places_images=False):
    """turns [(question, answer or None: to be generated), ..] -> (ids, trained): the loss is taken on the trained ids.

    Trained are the assistant's words and the end tag of each answer. The images stand before the first question or,
    with places_images, where the questions spell "<image>"; no other text becomes a tag. Raises UserError where the
    questions place another number of images than there are.
    """
    end, image, begin, user, assistant = map(tokenizer.token_to_id, TAGS)
    ids, trained = [], []

    def add(tokens, train=False):
        ids.extend(tokens)
        trained.extend([train] * len(tokens))
    add([begin, *tokenizer.encode_plain(SYSTEM), user] + [image] * (0 if places_images else n_images))
    for k, (question, answer) in enumerate(turns):
        add([user] * (k > 0))
        question = " ".join(question.split())
        for n, part in enumerate(question.split(IMAGE) if places_images else [question]):
            add([image] * (n > 0) + tokenizer.encode_plain(part))
        add([assistant])
        if answer is not None:
            add([*tokenizer.encode_plain(answer), end], train=True)
    if ids.count(image) != n_images:
        raise UserError(f"the prompt places {ids.count(image)} of {n_images} images; put <image> once for each")
    return ids, trained


def rows_of(questions, tokenizer, max_len, turns=1, left_out=None):
    """One image's list of Question -> [(ids, trained), ..]: dialogues of `turns` questions, answered in sentences.

    An answer that max_len cuts loses its end tag, too: the model must not learn to stop in mid-sentence. Questions
    without an answer, and rows without room for any, teach nothing and are left out. The Counter left_out counts all.
    """
    rows, left_out = [], Counter() if left_out is None else left_out
    pairs = [(q.question, to_sentence(q.question, q.answer)) for q in questions if q.answer]
    left_out["questions without an answer"] += len(questions) - len(pairs)
    for k in range(0, len(pairs), turns):
        ids, trained = encode_dialogue(tokenizer, pairs[k:k + turns])
        beyond = [i for i, on in zip(ids[max_len:], trained[max_len:]) if on]
        left_out["answers cut at the end or whole"] += beyond.count(tokenizer.token_to_id(END))
        if any(trained[:max_len]):
            rows.append((ids[:max_len], trained[:max_len]))
    return rows


def to_targets(ids, trained):
    """ids [u, q, a, e] of which a, e are trained -> idx [u, q, a] and what follows each, targets [IGNORE, a, e]."""
    return ids[:-1], [i if on else IGNORE for i, on in zip(ids[1:], trained[1:])]


def show_tokens(tokenizer, idx, targets, n_image_tokens, color=True):
    """A row as text, a line per run of a kind: image (blue), masked (grey), trained (green); `|` parts the tokens.

    Trained tokens are shown as the loss sees them, from the targets: unshifted targets would double each word. What
    follows the last target is padding and not shown.
    """
    lines, image, colors = [], tokenizer.token_to_id(IMAGE), dict(image=34, masked=90, trained=32)
    last = max(t for t, target in enumerate(targets) if target != IGNORE)
    row = zip(idx[:last + 1] + [None], [IGNORE] + targets[:last + 1])             # each token, and what stands for it
    tokens = [("trained", t) if t != IGNORE else ("image" if i == image else "masked", i) for i, t in row]
    for kind, run in groupby(tokens, key=lambda token: token[0]):
        texts = ["".join(c if c.isprintable() else repr(c)[1:-1] for c in tokenizer.decode([i])) for _, i in run]
        line = f"{kind:8}|{'|'.join(text + f' x {n_image_tokens}' * (kind == 'image') for text in texts)}|"
        lines.append(f"\x1b[{colors[kind]}m{line}\x1b[0m" if color else line)
    return "\n".join(lines)


# ---- scores and files

def submission(predictions):
    """{question_id: short answer} -> the official form."""
    return [{"question_id": i, "answer": answer} for i, answer in predictions.items()]


def score_vqa(questions, predictions):
    """{question_id: short answer} -> accuracies, 0..1: {"overall": .., "answer_type": {..}, "question_type": {..}}."""
    given, answers = [predictions[q.question_id] for q in questions], [q.answers for q in questions]
    scores = {by: vqa_accuracy(given, answers, [getattr(q, by) for q in questions])
              for by in ("answer_type", "question_type")}
    return {"overall": [part.pop("overall") for part in scores.values()][0], **scores}


def export_csv(questions, path):
    """image_id,text: a row per image, its questions as one dialogue with tags. A tag in their own text gets a space."""
    rows = {}
    for q in questions:
        asks, says = (re.sub(r"<(?=\||image>)", "< ", text) for text in (q.question, to_sentence(q.question, q.answer)))
        start = rows[q.image_id] + USER if q.image_id in rows else BEGIN + SYSTEM + USER + IMAGE
        rows[q.image_id] = start + asks + ASSISTANT + says + END * bool(says)
    write_csv(path, ("image_id", "text"), rows.items())
