"""Questions and answers: the official files, sentences and back, dialogues as tokens, scores, and what shapes asks."""
import collections
import csv
import json
import random

import pytest
import torch
from PIL import Image

from tinyvlm.config import UserError
from tinyvlm.gpt import IGNORE
from tinyvlm.metrics import MetricError
from tinyvlm.shapes import Thing, ask, make_scene, relation
from tinyvlm.tokenizer import SPECIAL_TOKENS, BPETokenizer
from tinyvlm.vqa import (SYSTEM, TAGS, Question, encode_dialogue, export_csv, find_vqa, from_scene, read_vqa, rows_of,
                         score_vqa, show_tokens, submission, to_sentence, to_short, to_targets, vqav2)


def write_pair(folder, split="train", images=range(1, 41), per_image=2, plain=False, **extra):
    """Official files of a split, and a picture for each image. Returns the two paths."""
    questions, annotations = [], []
    for i in images:
        for k in range(per_image):
            questions.append({"image_id": i, "question": f"What color is thing {k}?", "question_id": i * 1000 + k})
            answers = ["red" if (i + a) % 3 else "blue" for a in range(10)]
            annotations.append({"question_id": i * 1000 + k, "image_id": i, "question_type": "what color is",
                                "answer_type": "other", "multiple_choice_answer": "red",
                                "answers": answers if plain else [{"answer": a, "answer_id": 1} for a in answers]})
        path = folder / f"{split}2014" / f"COCO_{split}2014_{i:012d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (i % 250, 0, 0)).save(path)
    a = folder / f"v2_OpenEnded_mscoco_{split}2014_questions.json"
    b = folder / f"v2_mscoco_{split}2014_annotations.json"
    a.write_text(json.dumps({"questions": questions, "data_subtype": f"{split}2014", **extra}))
    b.write_text(json.dumps({"annotations": annotations[::-1], "data_subtype": f"{split}2014", **extra}))
    return a, b


# -- files

@pytest.mark.parametrize("plain", [False, True])
def test_questions_and_annotations_are_joined_by_id(tmp_path, plain):
    """Annotations come in reversed order here, and answers as dicts or as plain strings."""
    questions = read_vqa(*write_pair(tmp_path, plain=plain))
    assert len(questions) == 80 and [q.question_id for q in questions[:3]] == [1000, 1001, 2000]
    q = questions[2]
    assert (q.image_id, q.answer, q.answer_type, q.question_type) == (2, "red", "other", "what color is")
    assert len(q.answers) == 10 and q.answers[0] == "red" and q.answers[1] == "blue"
    asked = read_vqa(write_pair(tmp_path)[0])
    assert len(asked) == 80 and asked[0].answers == [] and asked[0].answer == ""


def test_missing_parts_are_guessed_and_questions_without_answer_counted(tmp_path):
    a, b = tmp_path / "q.json", tmp_path / "a.json"
    a.write_text(json.dumps([{"question_id": i, "image_id": "x", "question": "?"} for i in range(5)]))
    b.write_text(json.dumps([{"question_id": 0, "answers": ["no", "yes", "yes"]}, {"question_id": 1, "answer": 2},
                             {"question_id": 2, "answers": [], "multiple_choice_answer": ""},
                             {"question_id": "3", "answers": [{"answer": "a dog"}, {"answer": " "}]}]))
    notes = []
    questions = read_vqa(a, b, notes)
    assert [(q.question_id, q.answer, q.answer_type) for q in questions] == [
        (0, "yes", "yes/no"), (1, "2", "number"), (3, "a dog", "other")]
    assert questions[1].answers == ["2"] and notes == [f"2 of 5 questions of {a} left out: no answer"]


def test_annotations_of_another_split_are_refused(tmp_path):
    """By their ids; by their image ids where each split counts its questions from 0; and by what the files claim."""
    train, val = write_pair(tmp_path), write_pair(tmp_path, "val", range(101, 141))
    with pytest.raises(UserError, match=r"val2014_annotations.*train2014_questions.*: 0 of 80 questions match"):
        read_vqa(train[0], val[1])
    entries = [{"question_id": i, "image_id": i, "question": "?"} for i in range(9)]
    marks = [{"question_id": i, "image_id": i + 50, "answer": "x"} for i in range(9)]
    (tmp_path / "q.json").write_text(json.dumps(entries))
    (tmp_path / "a.json").write_text(json.dumps(marks))
    with pytest.raises(UserError, match=r"a.json .*q.json .*0 of 9"):
        read_vqa(tmp_path / "q.json", tmp_path / "a.json")
    other = write_pair(tmp_path / "other", "val", range(1, 41))                   # the ids of train, by chance
    with pytest.raises(UserError, match=r"\(val\) does not belong .*\(train\): 80 of 80"):
        read_vqa(train[0], other[1])


@pytest.mark.parametrize("which, text, fault", [
    ("q", "{", "not a readable JSON"), ("q", '{"annotations": []}', "should be"), ("q", "[]", "should be"),
    ("q", '[{"question_id": 1, "image_id": 2}]', "entry 0"), ("q", '[7]', "entry 0"),
    ("q", '[{"question_id": true, "image_id": 2, "question": "?"}]', "entry 0"),
    ("q", '[{"question_id": 1, "image_id": 2, "question": ""}, {"question_id": 1, "image_id": 3, "question": ""}]',
     "twice"),
    ("a", '[{"question_id": 1, "answer": "a"}, {"question_id": 1, "answer": "b"}]', "twice"),
    ("a", '{"annotations": [{}]}', "entry 0"),
    ("a", '[{"question_id": 1, "answers": [{"text": "a"}]}]', "list of texts"),
    ("a", '[{"question_id": 1, "answers": "yes"}]', "list of texts"),
    ("a", '[{"question_id": 1, "answers": []}]', "answers none of")])
def test_broken_files_end_in_a_sentence_that_names_them(tmp_path, which, text, fault):
    files = {"q": '[{"question_id": 1, "image_id": 2, "question": "?"}]', "a": '[{"question_id": 1, "answer": "a"}]'}
    for name, content in {**files, which: text}.items():
        (tmp_path / f"{name}.json").write_text(content)
    with pytest.raises(UserError, match=fault) as error:
        read_vqa(tmp_path / "q.json", tmp_path / "a.json")
    assert f"{which}.json" in str(error.value)


def test_a_folder_with_train_and_val(tmp_path):
    """Most people's VQA v2: val is held out from train by image, the official val is the test."""
    write_pair(tmp_path / "deep" / "er")
    write_pair(tmp_path, "val", range(101, 111))
    ds = vqav2(tmp_path, seed=3)
    assert [len(ds.splits[s]) for s in ("train", "val", "test")] == [36, 4, 10] and len(ds.names) == 50
    assert not set(ds.splits["train"]) & set(ds.splits["val"])
    assert any("official val split is the test" in n for n in ds.notes)
    assert {ds.questions[i][0].image_id for i in ds.splits["test"]} == set(range(101, 111))
    for i, questions in enumerate(ds.questions):
        assert ds.open(i).getpixel((0, 0))[0] in range(questions[0].image_id - 4, questions[0].image_id + 5)
        assert ds.captions[i] == [q.question for q in questions] and len(questions) == 2
    assert vqav2(tmp_path, seed=3).splits == ds.splits != vqav2(tmp_path, seed=4).splits


def test_official_splits_and_a_test_without_answers(tmp_path):
    for split, images in (("train", range(1, 21)), ("val", range(21, 26))):
        write_pair(tmp_path, split, images)
    questions, answers = write_pair(tmp_path, "test", range(31, 34))
    answers.unlink()
    ds = vqav2(tmp_path)
    assert [len(v) for v in ds.splits.values()] == [20, 5, 3] and ds.questions[-1][0].answers == []
    for path in tmp_path.glob("test2014/*"):
        path.unlink()
    ds = vqav2(tmp_path)                                                          # as if there were no test at all
    assert [len(v) for v in ds.splits.values()] == [18, 2, 5] and any("no images: left out" in n for n in ds.notes)
    for path in list(tmp_path.glob("val2014/*"))[1:]:
        path.unlink()
    with pytest.raises(UserError, match="names 4 images that are not in"):        # answers without images: a fault
        vqav2(tmp_path)


def test_one_split_only_and_none(tmp_path):
    """With val alone its images are split; images alone, and questions without annotations, are refused."""
    write_pair(tmp_path, "val", range(1, 31))
    ds = vqav2(tmp_path)
    assert [len(v) for v in ds.splits.values()] == [24, 3, 3] and any("80/10/10" in n for n in ds.notes)
    with pytest.raises(UserError, match="holds no .*questions"):
        vqav2(tmp_path / "val2014")
    next(tmp_path.glob("*annotations*")).unlink()
    with pytest.raises(UserError, match="has no .*annotations"):
        vqav2(tmp_path)


def test_any_file_name_with_the_right_integer(tmp_path):
    """png or jpg, zeros or none, other json and folders between: the stem's last integer is the image id."""
    questions, answers = write_pair(tmp_path, images=range(1, 13))
    questions.rename(tmp_path / "my_Train_questions_v1.json")
    answers.rename(tmp_path / "train-annotations.json")
    (tmp_path / "captions.json").write_text("broken")
    for k, path in enumerate(sorted(tmp_path.glob("train2014/*"))):
        path.rename(tmp_path / [f"{k + 1}.png", f"{k + 1:012d}.jpg", f"img-{k + 1:03d}.jpeg"][k % 3])
    ds = vqav2(tmp_path)
    assert ds.names[:3] == ["1.png", "000000000002.jpg", "img-003.jpeg"] and find_vqa(tmp_path)[0]["train"][1] == (
        tmp_path / "train-annotations.json")


def test_splits_that_both_count_their_images_from_1(tmp_path):
    """Image 7 of val is not image 7 of train; and if val has no image 9, train's must not be shown in its place."""
    write_pair(tmp_path)
    write_pair(tmp_path, "val")
    ds = vqav2(tmp_path)
    assert [("val2014/" in name) for name in ds.names] == [i in ds.splits["test"] for i in range(80)]
    next(tmp_path.glob("val2014/*9.jpg")).unlink()
    with pytest.raises(UserError, match="names 1 images that are not .*--allow-broken"):
        vqav2(tmp_path)
    ds = vqav2(tmp_path, allow_broken=True)
    assert len(ds.splits["test"]) == 39 and any("1 of 40 images" in note for note in ds.notes)
    Image.new("RGB", (4, 4)).save(tmp_path / "val2014" / "x_07.png")
    with pytest.raises(UserError, match="image 7 of val could be"):
        vqav2(tmp_path, allow_broken=True)


def test_v2_goes_before_v1_and_two_equals_are_refused(tmp_path):
    questions, _ = write_pair(tmp_path)
    for name in ("OpenEnded_mscoco_train2014_questions.json", "MultipleChoice_mscoco_train2014_questions.json"):
        (tmp_path / name).write_text("[]")
    for name in ("v2_OpenEnded_mscoco_test-dev2015_questions.json", "v2_OpenEnded_mscoco_test2015_questions.json"):
        (tmp_path / name).write_text("[]")
    files = find_vqa(tmp_path)[0]
    assert files["train"][0] == questions and files["test"][0].name == "v2_OpenEnded_mscoco_test2015_questions.json"
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / questions.name).write_text("[]")
    with pytest.raises(UserError, match="both hold train questions"):
        find_vqa(tmp_path)


def test_a_mirrored_image_no_longer_fits_left_and_right(tmp_path):
    write_pair(tmp_path)
    ds = vqav2(tmp_path)
    assert ds.may_flip(0)
    ds.questions[0][0].answers[3] = "on the left"
    assert not ds.may_flip(0)


# -- sentences

SENTENCES = """Is the cat black? | yes | Yes, the cat is black.
Is it raining? | no | No, it is not raining.
is there a red thing? | yes | yes, there is a red thing.
Are there any dogs? | no | No, there are not any dogs.
Are there any dogs? | yes | Yes, there are dogs.
Is the man wearing a hat? | yes | Yes, the man is wearing a hat.
How many dogs are there? | 2 | There are 2 dogs.
How many dogs are there? | 1 | There is 1.
How many people are in the picture? | three | There are three people in the picture.
What color is the fridge? | white | The fridge is white.
What colour are the walls? | gray | The walls are gray.
What color is the dog's nose? | black and white | The dog's nose is black and white.
What shape is the red thing? | circle | The red thing is a circle.
How big is the dog? | small | The dog is small.
Where is the cat? | on the table | The cat is on the table.
Where is the cat? | kitchen | The answer is kitchen.
where is the cup relative to the fork? | left | the cup is left of the fork.
What is the man doing? | riding a bike | The man is riding a bike.
What sport is this? | tennis | The sport is tennis.
What animals are in the field? | cows | The animals are cows.
What is the man holding? | bat | The answer is bat.
In the photo, how many dogs are there? | 2 | The answer is 2.
What is this? | not sure | Not sure.
Is this a train or a bus? | yes | Yes.
Is this a train or a bus? | bus | The answer is bus.
Is the man holding the umbrella happy? | yes | Yes.
Is there anything on it? | yes | Yes.
Is this cat black? | no | No.
Is there no dog? | no | No.
What is it made of? | wood | The answer is wood.
How many of the dogs are black? | 2 | The answer is 2.
What color is the man wearing? | red | The color is red.
Where was the photo taken? | in rome | The answer is in rome.
What color is the cat that is on the bed? | red | The color is red.
What color is the cat? | unsure | Unsure.
What color is the table? | red oak | The color is red oak.""".split("\n")


@pytest.mark.parametrize("row", SENTENCES + [" | cat | The answer is cat.", "What? |  | "])
def test_sentences(row):
    """Each rule; and from "Is this a train or a bus?" on: what is half understood gets the plain answer."""
    question, answer, sentence = row.split(" | ")
    assert to_sentence(question, answer) == sentence and to_short(sentence) == answer


def test_a_question_is_read_from_its_type_on():
    assert to_sentence("In the photo, how many dogs are there?", "2", "how many") == "There are 2 dogs."


QUESTIONS = """Is the cat black?|Is there a dog?|Are there any?|Is this a train or a bus?|How many dogs are there?|Why?|
?|is|how many|HOW MANY DOGS ARE IN IT|What color is the fridge?|what color is {a} {0} the dog|Where is the cat?|What?|
Where is the cup relative to the fork?|What is the man doing?|What sport is this?|What kind of dog are these?|
Yes or no?|The answer is?|What shape is the answer?|Does it say no?|Is it, or is it not, yes?|
What numbers are there?""".split("|")
ANSWERS = """no|2|yes|on the table|black and white|not sure|yes, both|.|..|cat|the cat is black|The answer is 2|
there are 2 dogs|1|one|2 or 3|red.|st.|NY|Yes|NO|a|a dog|an|is|it is it|no idea|yes and no|left|left of the door|
above the table|red, white and blue|tennis|eating a pizza|don't know|none|white|circle|small|10:30|1,000|3.5|İ|ß|é|
the answer is the answer is x|yes,|no.|there is 1|{a}|{0}|x\ny|is red|a  b|?|!|in|outside|0|<image>|n/a|dogs|yes.no|
nope|No, thanks|the sport is tennis|no parking|the""".split("|") + ["", " ", "<|user|>", "a" * 300, "2 " * 100]


def test_every_sentence_leads_back_to_its_answer():
    """Letter by letter, with the question and without it, whatever the answer looks like."""
    for question in QUESTIONS:
        for answer in ANSWERS:
            for kind in ("", "how many", "what color is the"):
                sentence = to_sentence(question, answer, kind)
                wanted = " ".join(answer.split())
                assert to_short(sentence) == to_short(sentence, question) == wanted, (question, answer, sentence)


def test_freer_sentences_are_read_with_the_question():
    assert to_short("Yes it is.", "Is it red?") == "yes"
    assert to_short("No parking.", "What does it say?") == "no parking"
    assert to_short("I can see two dogs", "How many dogs are there?") == "two"
    assert to_short("White", "What color is it?") == "white" and to_short("") == ""


# -- dialogues

@pytest.fixture(scope="module")
def tokenizer():
    return BPETokenizer.train(["what color is the circle? the circle is red. answer the question about it"] * 3, 320)


def test_the_tags_are_those_every_tokenizer_of_ours_has():
    assert set(TAGS) == set(SPECIAL_TOKENS)


def test_only_the_assistants_words_and_end_tags_are_trained(tokenizer):
    turns = [("what color?", "red."), ("how many?", "2")]
    ids, trained = encode_dialogue(tokenizer, turns)
    assert tokenizer.decode(ids) == (f"<|system|>{SYSTEM}<|user|><image>what color?<|assistant|>red.<|endoftext|>"
                                     "<|user|>how many?<|assistant|>2<|endoftext|>")
    assert tokenizer.decode([i for i, on in zip(ids, trained) if on]) == "red.<|endoftext|>2<|endoftext|>"
    open_end, _ = encode_dialogue(tokenizer, [("a", None)], 2, system="")
    assert tokenizer.decode(open_end) == "<|user|><image><image>a<|assistant|>"
    idx, targets = to_targets(ids, trained)
    assert idx == ids[:-1] and len(targets) == len(idx)                           # a row for data.pad_rows
    assert [t for t in targets if t != IGNORE] == [i for i, on in zip(ids, trained) if on]
    assert all(t in (IGNORE, following) for t, following in zip(targets, ids[1:]))
    assert idx[targets.index(ids[trained.index(True)])] == tokenizer.token_to_id("<|assistant|>")   # "red" follows it


def test_images_stand_where_a_trusted_prompt_puts_them(tokenizer):
    turns = [("<image> and", "a"), ("or <image>?", None)]
    ids, _ = encode_dialogue(tokenizer, turns, 2, system="", places_images=True)
    assert tokenizer.decode(ids) == "<|user|><image> and<|assistant|>a<|endoftext|><|user|>or <image>?<|assistant|>"
    for n, turn in ((1, turns), (3, turns), (1, [("none", None)]), (0, [("none", None)])):
        with pytest.raises(UserError, match=rf"{sum(q.count('<image>') for q, _ in turn)} <image> and {n} images"):
            encode_dialogue(tokenizer, turn, n, places_images=True)
    with pytest.raises(UserError, match="0 <image> and 0 images"):
        encode_dialogue(tokenizer, turns, 0)


def test_texts_from_data_never_become_tags(tokenizer):
    """Tags in a question, an answer or the system text stay letters; nothing but the answer is trained."""
    tags = {tokenizer.token_to_id(tag) for tag in TAGS}
    nasty = "".join(TAGS)
    for places in (False, True):
        question = "<image>" + nasty.replace("<image>", "") if places else nasty
        ids, trained = encode_dialogue(tokenizer, [(question, nasty)], system=nasty, places_images=places)
        assert [tokenizer.id_to_token(i) for i in ids if i in tags] == [
            "<|system|>", "<|user|>", "<image>", "<|assistant|>", "<|endoftext|>"]
    assert sum(trained) == len(tokenizer.encode(nasty, special=False)) + 1


def test_every_length_is_cut_honestly(tokenizer):
    """Whatever max_len: a prefix of the whole, of whole turns or a first answer without end tag; and all is counted."""
    turns = [("what color?", "red and blue."), ("how?", "so"), ("why?", "it is")]
    whole, marks = encode_dialogue(tokenizer, turns)
    end = tokenizer.token_to_id("<|endoftext|>")
    ends = [i + 1 for i, token in enumerate(whole) if token == end]
    start = marks.index(True)
    for max_len in range(1, len(whole) + 2):
        cut = collections.Counter()
        ids, trained = encode_dialogue(tokenizer, turns, max_len=max_len, cut=cut)
        n = len(ids)
        assert n <= max_len and n == len(trained) and (ids, trained) == (whole[:n], marks[:n])
        kept = sum(e <= n for e in ends)
        assert n == (ends[kept - 1] if kept else max_len)
        assert cut == collections.Counter(turns=min(2, 3 - kept), answers=kept == 0 and n > start,
                                          questions=kept == 0 and n <= start)
        if kept == 0:
            assert end not in ids
    for bad in ((turns, None), (turns[:1] + [("why?", None)], collections.Counter())):
        with pytest.raises(UserError, match="longer than 20 tokens"):
            encode_dialogue(tokenizer, bad[0], max_len=20, cut=bad[1])
    assert encode_dialogue(tokenizer, turns, max_len=len(whole)) == (whole, marks)


def test_rows_of_an_image(tokenizer):
    """Five questions, two turns a row: rows of two, two and one answers, each with its end."""
    questions = [Question(k, 1, "what color is the circle?", ["red"], "red") for k in range(5)]
    rows = rows_of(questions, tokenizer, 500, turns=2)
    ends = [ids.count(tokenizer.token_to_id("<|endoftext|>")) for ids, _ in rows]
    assert ends == [2, 2, 1] and tokenizer.decode(rows[2][0]).endswith("<|assistant|>the circle is red.<|endoftext|>")


@pytest.mark.parametrize("form", ["trained", "targets", "padded"])
def test_show_tokens_is_readable_without_colours(tokenizer, form):
    ids, marks = encode_dialogue(tokenizer, [("what color is\nthe\x1b?", "the circle is red.")], system="")
    if form != "trained":
        ids, marks = to_targets(ids, marks)
    if form == "padded":
        ids, marks = torch.tensor(ids + [0] * 4), torch.tensor(marks + [IGNORE] * 4)
    lines = show_tokens(tokenizer, ids, marks, 64, color=False).split("\n")
    assert [line.split("|")[0].strip() for line in lines] == ["masked", "image", "masked", "trained"]
    assert lines[1] == "image   |<image> x 64|" and "\\n" in lines[2] and "\\x1b" in lines[2]
    assert lines[3].endswith("|<|endoftext|>|") and lines[3].replace("|", "").startswith("trained the circle is red.")
    coloured = show_tokens(tokenizer, ids, marks, 64)
    assert "\x1b[34mimage" in coloured and "\x1b[90mmasked" in coloured and "\x1b[32mtrained" in coloured


def test_unshifted_targets_are_visible(tokenizer):
    """The mistake the picture is for: targets equal to the inputs teach a model to repeat what it reads."""
    ids, trained = encode_dialogue(tokenizer, [("a", "red")], system="")
    wrong = [i if on else IGNORE for i, on in zip(ids, trained)]
    right = show_tokens(tokenizer, *to_targets(ids, trained), 1, color=False)
    assert show_tokens(tokenizer, ids, wrong, 1, color=False) != right


# -- scores

def test_scores_by_type_and_the_official_form():
    questions = [Question(1, 1, "?", ["yes"] * 10, "yes", "is", "yes/no"),
                 Question(2, 1, "?", ["2"] * 3 + ["3"] * 7, "3", "how", "number"),
                 Question(3, 2, "?", ["red"], "red", "what", "other"),
                 Question(4, 2, "?", ["no"] * 10, "no", "is", "yes/no")]
    said = {1: "yes", 2: "two", 3: "Red.", 4: "yes"}
    scores = score_vqa(questions, said)
    assert scores["answer_type"] == pytest.approx({"yes/no": 0.5, "number": 0.9, "other": 1.0})
    assert scores["question_type"] == pytest.approx({"is": 0.5, "how": 0.9, "what": 1.0})
    assert scores["overall"] == pytest.approx(2.9 / 4) and set(scores) == {"overall", "answer_type", "question_type"}
    assert submission(said)[1] == {"question_id": 2, "answer": "two"}
    with pytest.raises(UserError, match="1 of 4 questions have no prediction, first 3"):
        score_vqa(questions, {1: "", 2: "", 4: ""})
    with pytest.raises(MetricError):
        score_vqa([Question(1, 1, "?", [])], {1: "x"})


def test_csv_of_dialogues(tmp_path, tokenizer):
    """A row an image, however odd its texts, and read back it still holds one <image>."""
    questions = [Question(1, 7, 'what "is", it?', ["red"], "red"),
                 Question(2, 7, "say <|user|>\n<image>", ["<image>"], "<image>"),
                 Question(3, "b", "\ud800?", [])]
    export_csv(questions, tmp_path / "new" / "vqa.csv")
    rows = list(csv.reader((tmp_path / "new" / "vqa.csv").open(encoding="utf-8", newline="")))
    assert rows[0] == ["image_id", "text"] and [row[0] for row in rows[1:]] == ["7", "b"]
    assert rows[1][1] == (f'<|system|>{SYSTEM}<|user|><image>what "is", it?<|assistant|>the answer is red.<|endoftext|>'
                          "<|user|>say < |user|>\n< image><|assistant|>the answer is < image>.<|endoftext|>")
    assert rows[2][1].endswith("<|user|><image>??<|assistant|>")
    assert tokenizer.encode(rows[1][1]).count(tokenizer.token_to_id("<image>")) == 1


# -- shapes

def blind_accuracy(n_objects, n_scenes):
    """{kind or "all": how often the commonest answer to a question's exact words is right}."""
    rng, said, kind = random.Random(0), collections.defaultdict(collections.Counter), {}
    for _ in range(n_scenes):
        for q in ask(make_scene(rng, n_objects), rng):
            said[q["question"]][q["short"]] += 1
            kind[q["question"]] = q["kind"]
    right, asked = collections.Counter(), collections.Counter()
    for question, answers in said.items():
        for name in ("all", kind[question]):
            right[name] += max(answers.values())
            asked[name] += sum(answers.values())
    return {name: right[name] / asked[name] for name in asked}


@pytest.mark.parametrize("n_objects", [2, 3])
def test_the_question_alone_does_not_tell_the_answer(n_objects):
    blind = blind_accuracy(n_objects, 4000)
    assert blind["all"] < 0.45 and set(blind) == {"all", "color", "size", "shape", "count", "relation", "yes/no"}
    assert max(blind[kind] for kind in ("size", "count", "yes/no")) < 0.56
    assert max(blind["color"], blind["shape"]) < 0.25 and blind["relation"] < 0.5


def test_questions_of_shapes_are_unambiguous_and_their_sentences_are_ours():
    """Answered again from the scene by the words of the question alone; exactly one thing must fit each description."""
    rng = random.Random(1)
    for n in range(1500):
        scene = make_scene(rng, 3)

        def only(words):
            fits = [t for t in scene if set(words.split()) <= {"the", "thing", t.color, t.shape}]
            assert len(fits) == 1, (words, scene)
            return fits[0]
        for q in from_scene(n, ask(scene, rng)):
            words = q.question.rstrip("?")
            if q.question_type in ("color", "size", "shape"):
                assert getattr(only(words.split(" is ")[1]), q.question_type) == q.answer
            elif q.question_type == "relation":
                a, b = words.removeprefix("where is ").split(" relative to ")
                assert relation(only(a), only(b)).split()[0] == q.answer
            assert q.answers == [q.answer] and to_short(to_sentence(q.question, q.answer)) == q.answer
    thing = Thing("small", "orange", "circle", 60, 60)
    for asked in (ask([thing], random.Random(k)) for k in range(20)):
        assert all(to_sentence(q["question"], q["short"], q["kind"]) == q["answer"] for q in asked)
        assert not any("a orange" in q["question"] for q in asked)


def test_a_twin_is_never_asked_about_by_name():
    """Two red circles: the old questions asked where "the red circle" is from the square."""
    scene = [Thing("large", "red", "circle", 30, 30), Thing("small", "red", "circle", 100, 30),
             Thing("small", "blue", "square", 60, 110)]
    kinds = collections.Counter(q["kind"] for k in range(200) for q in ask(scene, random.Random(k)))
    assert kinds["relation"] == 0 and kinds["count"] == kinds["yes/no"] == 200 and 0 < kinds["color"] < 200
