"""Questions and answers: the official files, sentences and back, dialogues as tokens, scores."""
import collections
import csv
import json
import re

import pytest
from PIL import Image

from tinyvlm.config import UserError
from tinyvlm.gpt import IGNORE
from tinyvlm.tokenizer import SPECIAL_TOKENS, BPETokenizer
from tinyvlm.vqa import (ASSISTANT, BEGIN, END, IMAGE, SYSTEM, TAGS, USER, Question, encode_dialogue, export_csv,
                         read_vqa, rows_of, score_vqa, show_tokens, submission, to_sentence, to_short, to_targets,
                         vqav2)


def write_pair(folder, split="train2014", images=range(1, 41), name="{split}/COCO_{split}_{i:012d}.jpg"):
    """The official files of a split, two questions an image, and a picture for each image. Returns the two paths."""
    questions, annotations = [], []
    for i in images:
        for k in range(2):
            ids = {"image_id": i, "question_id": i * 1000 + k}
            questions.append({**ids, "question": f"What color is thing {k}?"})
            answers = [{"answer": "red" if (i + a) % 3 else "blue", "answer_id": a} for a in range(10)]
            annotations.append({**ids, "question_type": "what color is", "answer_type": "other",
                                "multiple_choice_answer": "red", "answers": answers})
        path = folder / name.format(split=split, i=i)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (i % 250, 0, 0)).save(path)
    paths = [folder / f"v2_{kind}.json" for kind in (f"OpenEnded_mscoco_{split}_questions",
                                                     f"mscoco_{split}_annotations")]
    paths[0].write_text(json.dumps({"questions": questions}))
    paths[1].write_text(json.dumps({"annotations": annotations[::-1]}))
    return paths


# -- files

def test_questions_and_annotations_are_joined_by_id(tmp_path):
    """Annotations come in reversed order here."""
    found = read_vqa(*write_pair(tmp_path))
    assert [q.question_id for q in found[:3]] == [1000, 1001, 2000] and len(found) == 80
    assert found[2] == Question(2000, 2, "What color is thing 0?", ["red", "blue"] + ["red", "red", "blue"] * 2 +
                                ["red", "red"], "red", "what color is", "other")
    secret = read_vqa(tmp_path / "v2_OpenEnded_mscoco_train2014_questions.json")
    assert len(secret) == 80 and secret[0] == Question(1000, 1, "What color is thing 0?", [])


@pytest.mark.parametrize("which, text, fault", [
    ("q", "{", "not a readable JSON"), ("q", "[7]", "is not a JSON object"), ("a", "", "as VQA publishes"),
    ("q", '{"questions": [{"question_id": 2000, "image_id": 2, "question": 3}]}', "as VQA publishes"),
    ("q", '{"questions": [{"question_id": 2000, "image_id": 3, "question": "of another split?"}]}', "(2000, 3)"),
    ("a", '{"annotations": [{"question_id": 2000, "image_id": 2, "answers": "yes"}]}', "as VQA publishes")])
def test_broken_files_end_in_a_sentence_that_names_them(tmp_path, which, text, fault):
    """Among them annotations of another split, which may count from 0, too: 2000 is about image 2 here, and 3 there."""
    files = dict(zip("qa", write_pair(tmp_path, images=[2])))
    files[which].write_text(text or '{"annotations": []}')
    with pytest.raises(UserError, match=re.escape(fault)) as error:
        read_vqa(files["q"], files["a"])
    assert files[which].name in str(error.value)


def test_a_folder_with_train_and_val(tmp_path):
    """Most people's VQA v2: val is held out from train by image, the official val is the test."""
    write_pair(tmp_path / "deep" / "er")
    write_pair(tmp_path, "val2014", range(101, 111))
    ds = vqav2(tmp_path, seed=3)
    assert [len(ds.splits[s]) for s in ("train", "val", "test")] == [36, 4, 10] and len(ds.names) == 50
    assert any("official val split is the test" in n for n in ds.notes)
    assert {ds.questions[i][0].image_id for i in ds.splits["test"]} == set(range(101, 111))
    for i, questions in enumerate(ds.questions):
        assert ds.open(i).getpixel((0, 0))[0] in range(questions[0].image_id - 4, questions[0].image_id + 5)
        assert ds.captions[i] == [f"{q.question} red" for q in questions] and len(questions) == 2 and ds.may_flip(i)


def test_official_splits_and_a_test_without_answers(tmp_path):
    for split, images in (("train2014", range(1, 21)), ("val2014", range(21, 26)), ("test2015", range(31, 34))):
        _, annotations = write_pair(tmp_path, split, images)
    annotations.unlink()
    ds = vqav2(tmp_path)
    assert [len(v) for v in ds.splits.values()] == [20, 5, 3] and ds.questions[-1][0].answers == []
    for path in tmp_path.glob("test2015/*"):
        path.unlink()
    ds = vqav2(tmp_path)                                                          # as if there were no test at all
    assert [len(v) for v in ds.splits.values()] == [18, 2, 5]
    next(tmp_path.glob("val2014/*")).unlink()
    with pytest.raises(UserError, match="names 1 images that are not in .*--allow-broken"):
        vqav2(tmp_path)
    assert len(vqav2(tmp_path, allow_broken=True).splits["test"]) == 4
    for name in ("v2_mscoco_val2014_annotations", "v2_OpenEnded_mscoco_train2014_questions"):
        (tmp_path / f"{name}.json").unlink()
        with pytest.raises(UserError, match=f"holds no {name}.json"):
            vqav2(tmp_path)


def test_an_image_is_the_one_of_its_split_and_of_this_number(tmp_path):
    """Image 7 of val is never shown for image 7 of train; a Mac's ._ files, version 1, test-dev count for nothing."""
    write_pair(tmp_path)
    write_pair(tmp_path, "val2014")
    for name in ("val2014/._COCO_val2014_000000000007.jpg", "val2014/COCO_val2014_000000000007.pdf",
                 "._v2_mscoco_val2014_annotations.json", "OpenEnded_mscoco_val2014_questions.json",
                 "v2_OpenEnded_mscoco_test-dev2015_questions.json"):
        (tmp_path / name).write_bytes(b"\x00\x05\x16\x07")
    ds = vqav2(tmp_path)
    assert [("val2014/" in name) for name in ds.names] == [i in ds.splits["test"] for i in range(80)]
    other = tmp_path / "other"                                                    # COCO's folders of 2017: split anew
    write_pair(other, images=range(1, 31), name="val2017/{i:012d}.jpg")
    assert vqav2(other).names[0] == "val2017/000000000001.jpg"


def test_two_copies_of_a_file_must_be_the_same_and_ids_may_be_written_as_text(tmp_path):
    """Of two question files the shallower was taken; ids as "7" on one side only were annotations of another split."""
    questions, annotations = write_pair(tmp_path / "a")
    (tmp_path / "b").mkdir()
    copy = tmp_path / "b" / questions.name
    copy.write_text(questions.read_text())
    assert len(vqav2(tmp_path).names) == 40
    rows = json.loads(questions.read_text())["questions"]
    copy.write_text(json.dumps({"questions": rows[:4]}))
    with pytest.raises(UserError, match="which differ; keep one"):
        vqav2(tmp_path)
    copy.unlink()
    for row in rows:
        row["image_id"] = str(row["image_id"])
    questions.write_text(json.dumps({"questions": rows}))
    assert len(vqav2(tmp_path).names) == 40
    for change, fault in ((rows + rows[:1], "1 of the questions in .* come twice"), (rows + [{
            **rows[0], "question_id": 7}], r"1 of 81 questions have no answers, such as \(7, 1\)")):
        questions.write_text(json.dumps({"questions": change}))
        with pytest.raises(UserError, match=fault):
            vqav2(tmp_path)


def test_questions_that_nobody_answered_are_left_out_and_counted(tmp_path):
    """They were scored, as wrong, or ended the training with the first evaluation: the accuracy of no answers."""
    def change(k, question, answers):
        for rows, key, value in zip((questions, people), ("question", "answers"), (question, answers)):
            next(row for row in rows if row["question_id"] == k)[key] = value
        for path, name, rows in zip(paths, ("questions", "annotations"), (questions, people)):
            path.write_text(json.dumps({name: rows}))
    paths = write_pair(tmp_path, images=range(1, 21))
    questions, people = (json.loads(path.read_text())[key] for path, key in zip(paths, ("questions", "annotations")))
    change(1000, "What?", [])
    change(2000, "What?", [{"answer": " "}] * 10)
    change(2001, " ", [{"answer": "red"}] * 10)
    ds = vqav2(tmp_path)
    assert "3 questions of train, empty or without answers, were left out" in ds.notes
    assert len(ds.names) == 19 and all(q.question and any(q.answers) for qs in ds.questions for q in qs)
    for row in questions:
        change(row["question_id"], "What?", [])
    with pytest.raises(UserError, match="holds no question that anybody has answered"):
        vqav2(tmp_path)


# -- sentences

SENTENCES = """Is the cat black? | yes | Yes, the cat is black.
is there a red thing? | yes | yes, there is a red thing.
Are there any dogs? | no | No, there are not any dogs.
Is it red？ | no | No, it is not red.
How many dogs are there? | 1 | There is 1.
How many people are in the picture? | 3 | There are 3 people in the picture.
What color is the fridge? | white | The fridge is white.
What shape is the red thing? | circle | The red thing is a circle.
Where is the cat? | on the table | The cat is on the table.
where is the cup relative to the fork? | left | the cup is left of the fork.
What is the man doing? | riding a bike | The man is riding a bike.
What is the man holding? | bat | The answer is bat.
Is this a train or a bus? | yes | Yes.
Is the stop sign red? | yes | Yes.
Is there anything on it? | yes | Yes.
How many of the dogs are black? | 2 | The answer is 2.
What color is the man wearing? | red | The answer is red.
What color is the cat that is on the bed? | red | The answer is red.
How tall is the man? | 6 feet | The man is 6 feet.
how many are there? | lots | the answer is lots.""".split("\n")


@pytest.mark.parametrize("row", SENTENCES + [" | cat | The answer is cat.", "What? |  | "])
def test_sentences(row):
    """Each rule; and from "What is the man holding?" on what no rule understands."""
    question, answer, sentence = row.split(" | ")
    assert to_sentence(question, answer) == sentence and to_short(sentence) == answer


def test_every_sentence_leads_back_to_its_answer():
    """Letter by letter, whatever the question and the answer look like: all pairs of odd ones."""
    answers = """no|2|yes|on the table|not sure|yes, both|.|..|the cat is black|The answer is 2|there are 2 dogs|1|red.|
Yes|NO|a dog|an|is|yes and no|left|left of the door|above the table|don't know|red, white and blue|eating a pizza|
circle|1,000|İ|ß|the answer is the answer is x|yes,|no.|there is 1|{a}|{0}|x\ny|a  b|?|0|<image>|""".split("|")
    for question in [row.split(" | ")[0] for row in SENTENCES] + [
            "?", "is", "how many", "HOW MANY DOGS ARE IN IT", "what color is {a} {0} the dog", "Does it say no?"]:
        assert [to_short(to_sentence(question, a)) for a in answers] == [" ".join(a.split()) for a in answers], question


# -- dialogues

@pytest.fixture(scope="module")
def tokenizer():
    return BPETokenizer.train(["what color is the circle? the circle is red. answer the question about it"] * 3, 320)


def test_only_the_assistants_words_and_end_tags_are_trained(tokenizer):
    """And a tag in a text from outside stays letters."""
    ids, trained = encode_dialogue(tokenizer, [("what  color? ", "red."), ("".join(TAGS), "2<|endoftext|>")])
    assert TAGS is SPECIAL_TOKENS and tokenizer.decode(ids) == (
        f"<|system|>{SYSTEM}<|user|><image>what color?<|assistant|>red.<|endoftext|>"
        f"<|user|>{''.join(TAGS)}<|assistant|>2<|endoftext|><|endoftext|>")
    assert tokenizer.decode([i for i, on in zip(ids, trained) if on]) == "red.<|endoftext|>2<|endoftext|><|endoftext|>"
    assert [tokenizer.id_to_token(i) for i in ids if i in map(tokenizer.token_to_id, TAGS)] == [
        BEGIN, USER, IMAGE, ASSISTANT, END, USER, ASSISTANT, END]
    idx, targets = to_targets(ids, trained)
    assert idx == ids[:-1] and [t for t in targets if t != IGNORE] == [i for i, on in zip(ids, trained) if on]
    assert all(t in (IGNORE, following) for t, following in zip(targets, ids[1:]))
    assert idx[targets.index(ids[trained.index(True)])] == tokenizer.token_to_id("<|assistant|>")   # "red" follows it


def test_rows_are_cut_honestly_and_those_that_teach_nothing_left_out(tokenizer):
    """Whatever max_len: a prefix of the whole; an answer has its end tag or is counted; no row is only masked."""
    questions = [Question(k, 1, "what color is the circle?", ["red"], "red") for k in range(3)]
    whole, trained = rows_of(questions, tokenizer, 500, 3, collections.Counter())[0]
    end = tokenizer.token_to_id("<|endoftext|>")
    for max_len in range(1, len(whole) + 2):
        left_out = collections.Counter()
        rows = rows_of(questions, tokenizer, max_len, 3, left_out)
        assert rows == ([(whole[:max_len], trained[:max_len])] if any(trained[:max_len]) else [])
        assert left_out.total() == 3 - sum(ids.count(end) for ids, _ in rows)
    left_out = collections.Counter()
    rows = rows_of([*questions, Question(9, 1, "secret?", [])] + questions[:1], tokenizer, 500, 2, left_out)
    assert [ids.count(end) for ids, _ in rows] == [2, 2] and +left_out == {"questions without an answer": 1}


def test_show_tokens_shows_what_the_loss_sees(tokenizer):
    """Without colours too; padding is not shown. Targets equal to the inputs teach a model to repeat, and look so."""
    ids, trained = encode_dialogue(tokenizer, [("what color is the\x1b?", "the circle is red.")])
    idx, targets = to_targets(ids, trained)
    plain = show_tokens(tokenizer, idx + [0] * 4, targets + [IGNORE] * 4, 64, color=False)
    kinds, texts = zip(*(line.split("|", 1) for line in plain.split("\n")))
    assert " ".join(kinds).split() == ["masked", "image", "masked", "trained"] and texts[1] == "<image> x 64|"
    assert "\\x1b" in texts[2] and texts[3].endswith(".|<|endoftext|>|") and texts[3].startswith("the| circle|")
    assert show_tokens(tokenizer, idx, targets, 64).startswith("\x1b[90mmasked")
    unshifted = [i if on else IGNORE for i, on in zip(idx, trained)]
    assert "|the|\ntrained |the| circle|" in show_tokens(tokenizer, idx, unshifted, 64, color=False)


# -- scores and files

def test_scores_by_type_and_the_official_form():
    questions = [Question(1, 1, "?", ["yes"] * 10, "yes", "is", "yes/no"),
                 Question(2, 1, "?", ["2"] * 3 + ["3"] * 7, "3", "how", "number"),
                 Question(3, 2, "?", ["red"], "red", "what", "other"),
                 Question(4, 2, "?", ["no"] * 10, "no", "is", "yes/no")]
    predictions = {1: "yes", 2: "two", 3: "Red.", 4: "yes"}
    scores = score_vqa(questions, predictions)
    assert scores["answer_type"] == pytest.approx({"yes/no": 0.5, "number": 0.9, "other": 1.0})
    assert scores["question_type"] == pytest.approx({"is": 0.5, "how": 0.9, "what": 1.0})
    assert scores["overall"] == pytest.approx(2.9 / 4) and set(scores) == {"overall", "answer_type", "question_type"}
    assert submission(predictions)[1] == {"question_id": 2, "answer": "two"}


def test_csv_of_dialogues(tmp_path, tokenizer):
    """A row an image, however odd its texts, and read back it still holds one <image>."""
    questions = [Question(1, 7, 'what "is", it?', ["red"], "red"),
                 Question(2, 7, "say <|user|>\n<image>", ["<image>"], "<image>"), Question(3, 8, "why?", [])]
    export_csv(questions, tmp_path / "new" / "vqa.csv")
    rows = list(csv.reader((tmp_path / "new" / "vqa.csv").open(encoding="utf-8", newline="")))
    assert rows[0] == ["image_id", "text"] and [row[0] for row in rows[1:]] == ["7", "8"]
    assert rows[1][1] == (f'<|system|>{SYSTEM}<|user|><image>what "is", it?<|assistant|>the answer is red.<|endoftext|>'
                          "<|user|>say < |user|>\n< image><|assistant|>the answer is < image>.<|endoftext|>")
    assert rows[2][1].endswith("<|user|><image>why?<|assistant|>")
    assert tokenizer.encode(rows[1][1]).count(tokenizer.token_to_id("<image>")) == 1
