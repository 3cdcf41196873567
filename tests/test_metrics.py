"""metrics: golden values of coco-caption, identities done by hand, slow plain oracles."""
import math
import random

import numpy as np
import pytest
import torch

from tinyvlm.config import UserError
from tinyvlm.metrics import (_lcs, _normalize_answer, bleu, cider, recall_at_k, rouge_l, score_captions, tokenize,
                             vqa_accuracy)

CANDIDATES = ["a dog is running on the grass", "two men on stage", "a girl eats"]
REFERENCES = [["a dog runs across the grass", "a brown dog is running on grass", "the dog runs"],
              ["two men play guitar on stage", "musicians perform a song"],
              ["a girl eats an apple", "a young girl is eating a red apple outside"]]


@pytest.mark.parametrize("text, tokens", [
    ("A man's dogs' bowls .", "a man 's dogs bowls"),
    ("It doesn't, can't, won't; cannot", "it does n't ca n't wo n't can not"),
    ("gonna wanna 'tis I'd he'd've cannots gonna-be JOE'S", "gon na wan na 't is i 'd he 'd 've cannots gonna-be joe 's"),
    ("t-shirt black-and-white and/or w/o 1/2 w/ x", "t-shirt black-and-white and/or w/o 1/2 w / x"),
    ("3,000 5:30 4x4 3rd 1950's 50% $5.00 #1 .5", "3,000 5:30 4x4 3rd 1950 's 50 % $ 5.00 # 1 .5"),
    ("five o'clock O'Malley ma'am y'all '90s 'em slip 'n' slide",
     "five o'clock o'malley ma'am y' all '90s 'em slip 'n' slide"),
    ("At 5 p.m. in the U.S. Mr. Fox, Jr., e.g. on st. no.7", "at 5 p.m. in the u.s. mr. fox jr. e.g. on st. no. 7"),
    ("Plan b. The end.", "plan b the end"), ("U. Miami plan b. is", "u. miami plan b. is"),
    ('He said "stop" ( twice ) [now] {ok}', "he said stop -lrb- twice -rrb- -lsb- now -rsb- -lcb- ok -rcb-"),
    ("wait ... what --- no -- yes - ok… – —", "wait what no yes ok"),
    ("AT&T at&t R&B & some people.They ran", "at&t at & t r&b & some people.they ran"),
    ("no! no!! what?! -----", "no no !! what ?! -----"),
    ("see foo.com or a@b.org :) <unk> C++", "see foo.com or a@b.org :-rrb- <unk> c++"),
    ("it’s “so” don’t ½ £5 café", "it 's so do n't 1/2 # 5 café"),
    ("an ant's-eye-view of a slip n 'slide 1 1/2 cups", "an ant 's eye-view of a slip n slide 1\u00a01/2 cups"),
    ("I ❤\ufe0f dogs", "i ❤ dogs"), ("keycap 1\ufe0f\u20e3 shirt", "keycap 1 shirt"),
    ("¿Dónde está? ¡Hola! „Hallo“ sagt er", "¿ dónde está ¡ hola „ hallo sagt er"),
    ("", ""), (" . , ' \" ", ""), ("red,blue\nend", "red blue end")])
def test_tokenize_follows_penn_treebank(text, tokens):
    """Each rule of the lexer on its own example; one different token changes every n-gram that holds it."""
    assert tokenize(text) == tokens.split(" ") if tokens else tokenize(text) == []


def test_caption_scores_equal_coco_caption():
    """Golden values computed once with pycocoevalcap 1.2."""
    assert bleu(CANDIDATES, REFERENCES) == pytest.approx([0.866878, 0.784121, 0.58468, 0.431455], abs=1e-6)
    assert rouge_l(CANDIDATES, REFERENCES) == pytest.approx(0.782314, abs=1e-6)
    assert cider(CANDIDATES, REFERENCES) == pytest.approx(2.302954, abs=1e-6)
    raw = [text.capitalize() + " !" for text in CANDIDATES]
    scores = score_captions(raw, [[ref + "." for ref in refs] for refs in REFERENCES])        # tokenises first
    assert list(scores) == ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr-D"]
    assert list(scores.values())[3:] == pytest.approx([0.431455, 0.782314, 2.302954], abs=1e-6)


def test_a_candidate_that_is_a_reference_is_perfect():
    perfect = [refs[0] for refs in REFERENCES]
    assert bleu(perfect, REFERENCES) == pytest.approx([1, 1, 1, 1], abs=1e-6)
    assert rouge_l(perfect, REFERENCES) == pytest.approx(1)
    assert cider(perfect, [[text] for text in perfect]) == pytest.approx(10)
    assert cider(perfect[:1], REFERENCES[:1]) == 0              # log(1 image) = 0: no n-gram tells anything
    assert bleu(["", ""], [["a b"], ["c d"]]) == pytest.approx([0] * 4, abs=1e-9)
    assert rouge_l([""], [["a b"]]) == 0 == cider(["", ""], [["a b"], ["c d"]])


def test_bleu_brevity_penalty_and_clipping_by_hand():
    """2 of 4 words, all right: precision 1, penalty exp(1 - 4/2). "the the the": only one "the" counts."""
    assert bleu(["a b"], [["a b c d"]])[:2] == pytest.approx([math.exp(-1)] * 2, abs=1e-6)
    assert bleu(["the the the"], [["the dog ran"]])[0] == pytest.approx(1 / 3, abs=1e-6)
    assert bleu(["a b c"], [["a b", "a b c d"]])[0] == pytest.approx(1, abs=1e-6)  # a tie
    assert bleu(["a", "x y z"], [["a"], ["p q r"]])[0] == pytest.approx(1 / 4, abs=1e-6)      # of the corpus, no mean


@pytest.mark.parametrize("metric", [bleu, rouge_l, cider, score_captions, vqa_accuracy])
@pytest.mark.parametrize("candidates, references", [
    ([], []), (["a"], []), (["a", "b"], [["a"], []]), (["a"], ["a"]), ("ab", [["a"], ["b"]])])
def test_what_does_not_pair_up_is_refused(metric, candidates, references):
    """zip would score the shorter list, an empty set is 0 / 0, and a bare string is a list of letters."""
    with pytest.raises(UserError, match=rf"{len(candidates)} predictions and {len(references)} references"):
        metric(candidates, references)


def test_lcs_equals_trying_every_subsequence():
    rng = random.Random(0)
    for _ in range(60):
        a, b = ([rng.choice("xyz") for _ in range(rng.randint(0, 7))] for _ in range(2))
        chosen = ([w for i, w in enumerate(a) if mask >> i & 1] for mask in range(2 ** len(a)))
        best = max(len(part) for part in chosen if all(w in rest for rest in [iter(b)] for w in part))
        assert _lcs(a, b) == best, f"{a} {b}"


def slow_ranks(img, txt, owner):
    """Plain definition: sort nothing, count for each query how many strangers are at least as good as its own best."""
    image_ranks, text_ranks = [], []
    for i in range(len(img)):
        own = max(img[i] @ txt[m] for m in range(len(txt)) if owner[m] == i)
        image_ranks.append(1 + sum(img[i] @ txt[m] >= own for m in range(len(txt)) if owner[m] != i))
    for m in range(len(txt)):
        own = img[owner[m]] @ txt[m]
        text_ranks.append(1 + sum(img[i] @ txt[m] >= own for i in range(len(img)) if i != owner[m]))
    return {"image_to_text": np.array(image_ranks), "text_to_image": np.array(text_ranks)}


@pytest.mark.parametrize("block", [2 ** 22, 90])
def test_recall_equals_plain_counting(block, monkeypatch):
    """Whole numbers as embeddings, so that many scores tie exactly; the table in one block, and in blocks of two."""
    monkeypatch.setattr("tinyvlm.metrics.BLOCK", block)
    rng = np.random.default_rng(0)
    img, txt = rng.integers(-2, 3, (13, 3)), rng.integers(-2, 3, (40, 3))
    owner = rng.permutation(np.concatenate([np.arange(13), rng.integers(0, 13, 27)]))
    got = recall_at_k(torch.tensor(img).float(), torch.tensor(txt).half(), torch.tensor(owner), ks=(1, 3, 10))
    for way, ranks in slow_ranks(img, txt, owner).items():
        want = {**{f"R@{k}": (ranks <= k).mean() for k in (1, 3, 10)}, "median_rank": np.median(ranks)}
        assert got[way] == pytest.approx(want), way


def test_perfect_and_constant_models():
    """A model that answers the same to everything must not look perfect because nothing beats it."""
    eye, owner = np.eye(20), np.arange(20)
    assert recall_at_k(eye, eye, owner)["text_to_image"] == {"R@1": 1, "R@5": 1, "R@10": 1, "median_rank": 1}
    row = np.random.default_rng(0).normal(size=(1, 37)).astype(np.float32).repeat(20, 0)
    for way in recall_at_k(row, row, owner).values():
        assert way["R@10"] == 0 and way["median_rank"] == 20


def test_recall_refuses_what_cannot_be_ranked():
    """One NaN compares as false with everything, so it would come first; an image without a text has no rank."""
    broken = np.eye(4)
    broken[2, 1] = np.nan
    for pair in ((broken, np.eye(4)), (np.eye(4), torch.tensor(broken))):
        with pytest.raises(UserError, match="not finite"):
            recall_at_k(*pair, range(4))
    for owner in ([0, 0, 0], [0, 1, 2], [0, 1, -1], [0, 1]):
        with pytest.raises(UserError, match="must name each of 2 images"):
            recall_at_k(np.eye(2), np.ones((3, 2)), owner)


@pytest.mark.parametrize("matches, score", [(0, 0), (1, .3), (2, .6), (3, .9), (4, 1), (10, 1)])
def test_vqa_accuracy_is_averaged_over_the_other_nine(matches, score):
    """min(m / 3, 1) would give .33, .67, 1 for m = 1, 2, 3."""
    assert vqa_accuracy(["cat"], [["cat"] * matches + ["dog"] * (10 - matches)]) == pytest.approx(score)


@pytest.mark.parametrize("text, clean", [
    ("The two dogs.", "2 dogs"), ("None", "0"), ("dont", "don't"), ("couldntve", "couldntve"),
    ("couldnt've", "couldn't've"), ("couldn'tve", "couldn't've"), ("yall'd've", "y'all'd've"),
    ("'ow'sat", "'ow's'at"), ("somebody'd", "somebodyd"), ("shed", "shed"), ("t-shirt", "t shirt"),
    ("red - blue", "red blue"), ("t-shirt - x", "tshirt x"), ("1,000-2", "10002"), ("1.5", "1.5"), ("5.", "5"),
    ("." * 33, "."), ("it's a cat!", "it's cat")])
def test_vqa_normalisation(text, clean):
    """The official script's rules and its oddities: its list of contractions, and 1.5 but not 5. keeping the point."""
    assert _normalize_answer(text) == clean


def test_vqa_unanimous_answers_and_other_counts():
    """The official script cleans up only where people disagree, so case counts when all ten say the same."""
    assert vqa_accuracy(["Yes"], [["yes"] * 10]) == 0 and vqa_accuracy(["Yes"], [["yes"] * 9 + ["no"]]) == 1
    assert vqa_accuracy(["The cat."], [["cat"]]) == 1
    assert vqa_accuracy(["cat"], [["cat", "cat", "dog"]]) == pytest.approx(2 / 3)
    assert vqa_accuracy(["a", "b", "2"], [["x"] * 3, ["b"] * 3, ["2"] * 3]) == pytest.approx(2 / 3)
