"""shapes: captions that are right, splits that share none, parts that are scored, questions nobody can guess."""
import collections
import random
import re

import numpy as np
import pytest

from tinyvlm.shapes import (COLORS, SHAPES, Shapes, Thing, ask, describe, draw_scene, make_scene, parse,
                            relation, score_parts)
from tinyvlm.vqa import to_sentence, to_short


@pytest.fixture(scope="module")
def shapes():
    return Shapes(n_objects=3, n_scenes=600, seed=1)


def test_scenes_are_those_of_their_seed_for_ever(shapes):
    """Trained runs are resumed and compared: neither captions nor questions of a seed may ever change."""
    data, more, other = Shapes(2, 500, 0), Shapes(3, 700, seed=1), Shapes(3, 600, seed=2)
    assert more.captions[:600] == shapes.captions[:600] != other.captions[:600]   # more scenes do not change the first
    assert more.open(7).tobytes() == shapes.open(7).tobytes()
    assert data.captions[:3] + data.captions[-1:] == [
        ["a small brown diamond in the bottom"], ["a large cyan diamond above a small cyan diamond"],
        ["a small blue star in the bottom"], ["a small cyan square left of a small brown triangle"]]
    assert [q.question for q in data.questions[1]] == ["how many things are there?", "is there a cyan thing?"]


def test_held_out_captions_are_never_training_captions(shapes):
    """.. not even those of another seed."""
    other = Shapes(3, 600, seed=9)
    train = {data.captions[i][0] for data in (shapes, other) for i in data.splits["train"]}
    assert not train & {shapes.captions[i][0] for split in ("val", "test") for i in shapes.splits[split]}


def test_captions_and_labels_name_everything(shapes):
    words = " ".join(c[0] for c in shapes.captions)
    places = ("top left", "middle", "bottom right")
    assert all(w in words for w in (*COLORS, *SHAPES, "small", "large", "left of", "above", *places))
    assert not re.search("right of|below", words)               # in reading order, nothing is
    for i, (scene, (caption,)) in enumerate(zip(shapes.scenes, shapes.captions)):
        things, claims = parse(caption)
        assert len(claims) == max(1, 2 * len(scene) - 2) and [tuple(str(t).split()) for t in scene] == things
        assert caption.startswith("a {size} {color} {shape} ".format(**shapes.labels[i])) if i < 20 else True


def meaning(caption):
    """What a caption claims, whatever its order, as plain sets: the oracle of what score_parts finds all right."""
    things, claims = parse(caption)
    return sorted(things), {(things[a], how, things[b]) for a, how, b in claims}


ONE, TWO = "a small red circle in the top left", "a small red circle above a large blue star"
ALL = "size color shape"


@pytest.mark.parametrize("truth, prediction, right", [
    (ONE, "a small blue star in the top left", "size place"), (ONE, "a small red", ""), (ONE, TWO, ""), (TWO, ONE, ""),
    (ONE, "a small red circle in the top", ALL), (TWO, "a large blue star below a small red circle", ALL + " relation"),
    (TWO, TWO + " a", ""), (TWO, TWO.replace("above ", ""), ""), (ONE, "", ""),
    (TWO, "a large blue circle below a small red circle", "size color relation"),
    (TWO, "a large blue star above a small red circle", ALL),
    (TWO, "a small red star above a large blue circle", "size color relation"),
    (TWO + " and left of a large red cross",
     "a large red cross right of a small red circle and below a large blue star", ALL)])
def test_parts_of_a_caption(truth, prediction, right):
    """Things are compared with what they resemble, whichever is named first; the other kind of part is not there."""
    parts = (*ALL.split(), "place" if truth == ONE else "relation")
    assert score_parts(prediction, truth) == {part: part in right.split() for part in parts}


def test_all_parts_are_right_exactly_if_the_meaning_is():
    """Of captions with one word replaced, too, some of which mean the same (two colours swapped, two twins)."""
    rng, equal = random.Random(0), 0
    words = [*COLORS, *SHAPES, "small", "large", "left", "right", "above", "below"]
    for _ in range(1500):
        truth = describe(make_scene(rng, 3)).split()
        other = list(truth)
        other[rng.randrange(len(other))] = rng.choice(words)
        truth, other = " ".join(truth), " ".join(other)
        assert all(score_parts(other, truth).values()) == (meaning(other) == meaning(truth)), (truth, other)
        equal += meaning(other) == meaning(truth)
    assert 20 < equal < 500


def test_scenes_are_drawn_as_described():
    """The colour at the centre of each thing is its colour: things do not cover one another."""
    rng = random.Random(0)
    for _ in range(60):
        scene = make_scene(rng, 3)
        image = draw_scene(scene, rng)
        for t in scene:
            assert np.abs(np.subtract(image.getpixel((int(t.x), int(t.y))), COLORS[t.color])).max() <= 15, str(t)


def test_mirrored_scenes_keep_their_caption(shapes):
    """Whatever may be flipped must be described by the same words afterwards, or the default run learns from noise."""
    for i in shapes.splits["train"][:300]:
        if shapes.may_flip(i):
            mirrored = [Thing(t.size, t.color, t.shape, 128 - t.x, t.y) for t in shapes.scenes[i]]
            assert describe(sorted(mirrored, key=lambda t: t.x + t.y)) == shapes.captions[i][0]
    assert any(map(shapes.may_flip, shapes.splits["train"]))


# -- questions

def blind_accuracy(n_objects, n_scenes):
    """{kind or "all": how often the commonest answer to a question's exact words is right}."""
    rng, answers, right, total = random.Random(0), collections.defaultdict(collections.Counter), {}, {}
    for _ in range(n_scenes):
        for q in ask(make_scene(rng, n_objects), rng):
            answers[q.question, q.question_type][q.answer] += 1
    for (_, kind), counts in answers.items():
        for name in ("all", kind):
            right[name] = right.get(name, 0) + max(counts.values())
            total[name] = total.get(name, 0) + counts.total()
    return {name: right[name] / total[name] for name in total}


def test_the_question_alone_does_not_tell_the_answer():
    blind = blind_accuracy(2, 4000)
    assert blind["all"] < 0.45 and set(blind) == {"all", "color", "size", "shape", "count", "relation", "yes/no"}
    assert max(blind[kind] for kind in ("size", "count", "yes/no")) < 0.56
    assert max(blind["color"], blind["shape"]) < 0.25 and blind["relation"] < 0.5


def test_questions_are_unambiguous_and_become_whole_sentences():
    """Answered again from the scene by the words of the question alone; exactly one thing must fit each description."""
    rng = random.Random(1)
    for n in range(1500):
        scene = make_scene(rng, 3)

        def only(words):
            fits = [t for t in scene if set(words.split()) <= {"the", "thing", t.color, t.shape}]
            assert len(fits) == 1, (words, scene)
            return fits[0]
        for k, q in enumerate(ask(scene, rng, n)):
            words = q.question.rstrip("?")
            if q.question_type in ("color", "size", "shape"):
                assert getattr(only(words.split(" is ")[1]), q.question_type) == q.answer
            elif q.question_type == "relation":
                a, b = words.removeprefix("where is ").split(" relative to ")
                assert relation(only(a), only(b)).split()[0] == q.answer
            elif q.question_type == "count":
                assert q.answer == str(len(scene)) and q.answer_type == "number"
            else:
                assert (q.answer == "yes") == any(t.color == words.split()[-2] for t in scene)
                assert "a orange" not in words
            sentence = to_sentence(q.question, q.answer)
            assert (q.question_id, q.answers) == (1000 * n + k, [q.answer]) and to_short(sentence) == q.answer
            assert len(sentence.split()) > 2 and "answer" not in sentence
