"""Choosing among captions by what is said of similar pictures: by hand, and through the scripts."""
import json
from types import SimpleNamespace

import pytest
import torch

import data
import public
import train
from helpers import album, from_folder, refused, run, table
from tinyvlm import consensus
from tinyvlm.config import UserError
from tinyvlm.consensus import Consensus

SMALL = "--n-embd 16 --n-head 1 --n-layer 1 --batch-size 4 --accum 1 --epochs 1 --eval-images 3 --test-images 3".split()
SMALL += ["--device", "cpu"]
SAID = [["a dog runs on grass", "a brown dog on the grass", "?!"], ["a boat on a lake", "a small boat on water"],
        ["a dog jumps on grass", "the dog runs on wet grass"]]
WHO, DOES = ["dog", "cat", "boy", "boat"], ["runs", "sleeps", "falls"]
PLACE = {"dog": [1.0, 0.0], "boat": [0.0, 1.0]}


class Eyes:
    """An image is its embedding; a caption lies where its animal or boat is."""
    config = SimpleNamespace(feat_dim=2)
    to = lambda self, device: self
    encode_image = staticmethod(lambda img: img)


@pytest.fixture
def judge(monkeypatch):
    monkeypatch.setattr(consensus, "is_run", lambda folder: True)
    monkeypatch.setattr(consensus, "load_run", lambda folder: SimpleNamespace(
        model=Eyes(), config={"task": "clip", "clean": "words", "features": {"encoder": "eyes"}}, tokenizer="any"))
    monkeypatch.setattr(consensus, "text_embeddings", lambda model, tokenizer, texts, clean: torch.tensor(
        [PLACE["dog" if "dog" in text else "boat"] for text in texts]))
    monkeypatch.setattr(consensus, "POOL", 3)
    return lambda shape=(3, 2), encoder="eyes", train=(0, 1, 2): Consensus("clip", SimpleNamespace(
        prepared=SimpleNamespace(features=SimpleNamespace(data=torch.zeros(shape), meta={"encoder": encoder})),
        device=SimpleNamespace(torch="cpu"),
        dataset=SimpleNamespace(name="these", captions=SAID, splits={"train": train})))


def test_the_chosen_caption_is_the_one_most_like_the_pool(judge):
    """Two pictures, the same candidates: what lies near each decides. Among equals the first stays, the model's own."""
    candidates = ["a cat sleeps", "a dog runs on the grass", "a small boat on the lake"]
    judge, img = judge(), torch.tensor([[1.0, 0.0], [0.0, 1.0]])                  # (2, D)
    assert judge.choose(img, [7, 8], [candidates, candidates]) == candidates[1:]
    assert judge.choose(img[:1], [7], [["no word of theirs", "none either"]]) == ["no word of theirs"]


@pytest.mark.parametrize("pool", [3, 100])
def test_what_was_said_of_the_very_image_is_not_in_its_pool(judge, monkeypatch, pool):
    """Image 0 is said to be brown; for it, as for a new picture, only what others say counts, be it all there is. A
    caption of which cleaning leaves nothing (it would be no word's, or any's) is not there."""
    judge, candidates = judge(), ["a brown dog on the grass", "the dog jumps on wet grass"]
    monkeypatch.setattr(consensus, "POOL", pool)
    assert judge.choose(torch.tensor([[1.0, 0.0]]), [0], [candidates]) == [candidates[1]]
    assert len(judge.owner) == len(judge.said) == len(judge.emb) == 6


@pytest.mark.parametrize("sees", [((3, 4, 2), "eyes"), ((3, 5), "eyes"), ((3, 2), "other eyes")])
def test_a_clip_that_has_seen_something_else_is_refused(judge, sees):
    """A grid of vectors as wide as its one, another width, and the same by another network."""
    with pytest.raises(UserError, match="learned from other images or features"):
        judge(*sees)


@pytest.mark.parametrize("train", [(), (1,)])
def test_a_training_split_that_leaves_no_pool_is_refused(judge, train):
    with pytest.raises(UserError, match="split of these has no captions"):
        judge(train=train)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Twenty images with three captions each, and their features by a tiny VGG-16."""
    folder = album(tmp_path_factory.mktemp("photos") / "d", captions=False)
    said = [(f"{k}.jpg", f"{a} {WHO[k % 4]} {DOES[k % 3]}") for k in range(20) for a in ("a", "the", "one")]
    table(folder / "captions.txt", [("image", "caption"), *said])
    run(data, *from_folder(folder), "--features", public.tiny_vgg16(folder.parent / "vgg"), "--sheet",
        folder.parent / "s.png")
    return folder


@pytest.mark.parametrize("eyes, others", [("features", "pixels"), ("pixels", "features")])
def test_through_the_scripts(photos, tmp_path, capsys, monkeypatch, eyes, others):
    """A captioner and a CLIP that see the same; then one chooses by the other. Runs that do not fit are refused."""
    monkeypatch.setattr(consensus, "POOL", 6)                   # of 45 in all
    sees = {"features": ["--features", photos / "features-vgg.safetensors"], "pixels": ["--image-size", "16"]}
    argv, words = [*from_folder(photos), *SMALL, "--out-dir"], tmp_path / "words"
    run(train, *argv, words, *sees[eyes], "--preset", "lstm", "--min-count", "1", "--epochs", "8", "--lr", "3e-2")
    for way in sees:
        run(train, *argv, tmp_path / way, *sees[way], "--task", "clip")
    plain, found = [train, "--eval-only", "--out-dir", words, "--split", "train"], {}
    for more in ((), ("--consensus", tmp_path / eyes)):
        run(*plain, "--num-beams", "5", *more)
        lines = (words / "predictions.jsonl").read_text().splitlines()
        found[more] = [json.loads(line)["prediction"] for line in lines]
    alone, chosen = found.values()
    assert len(alone) == len(chosen) == 16 and alone != chosen
    assert json.loads((words / "scores.json").read_text())["consensus"] == str(tmp_path / eyes)
    refused(capsys, "give --eval-only and --num-beams", *plain, "--consensus", tmp_path / eyes)
    late = ["--num-beams", "5", "--consensus"]
    refused(capsys, "give --eval-only and --num-beams", train, *argv, tmp_path / "new", *late, tmp_path / eyes)
    for folder, why in (words, "no run of --task"), (tmp_path / "none", "no run of"), (tmp_path / others, "from other"):
        refused(capsys, why, *plain, *late, folder)
