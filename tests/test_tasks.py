"""CLIP, labels and questions, each from the first command to the last, at tiny size."""
import csv
import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch

import data
import sample
import train
from conftest import REFERENCE
from test_data import album, from_folder
from tasks import Captioning, n_shared
from test_scripts import TINY, losses, run
from tinyvlm.clip import contrastive_loss
from tinyvlm.pretrained import load_run
from tinyvlm.tokenizer import WordTokenizer
from tinyvlm.vlm import PrefixVLM, VLMConfig, pixel_shuffle
from tinyvlm.weights import load_safetensors

CLIP = [*TINY, "--task", "clip", "--n-joint", "16", "--stem", "patch", "--class-token"]
VQA = [*TINY, "--task", "vqa", "--model", "prefix", "--max-tokens", "80"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """The tiny reference CLIP, and a tokenizer for it: its folder has none."""
    folder = tmp_path_factory.mktemp("public") / "clip"
    shutil.copytree(REFERENCE / "clip_gelu", folder)
    words = WordTokenizer.train(["a dog number says large small red blue circle square"], 1, special_tokens=())
    words.save(folder / "tokenizer.json")
    return folder


def same_weights(a, b, rows_added=False):
    """Model b has every weight of a; not the batch statistics, which move at any rate of learning."""
    b = b.state_dict()
    for name, tensor in a.state_dict().items():
        if "running" not in name and "batches" not in name:
            theirs = b[name][:len(tensor)] if rows_added and tensor.dim() else b[name]
            assert torch.allclose(tensor, theirs, atol=1e-4), name


# ----- clip

@pytest.fixture(scope="module")
def clip_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("clip") / "out"
    run(train, *CLIP, "--out-dir", out)
    return out


def test_clip_trains_searches_and_labels(clip_run, tmp_path, capsys):
    example, where = ["--image", clip_run / "example.png"], ["--out-dir", clip_run]
    config = json.loads((clip_run / "config.json").read_text())
    assert {"test image to text R@1", "test text to image R@10"} <= config["scores"].keys()
    assert (clip_run / "similarity.png").exists() and losses(clip_run)[1] > 0
    album(tmp_path, n=5, captions=False)
    (tmp_path / "Images" / "broken.jpg").write_bytes(b"no")
    search = ["--search", "a red circle", "--images", tmp_path / "Images", "--sheet", tmp_path / "s.png", *where]
    run(sample, *search)
    first = capsys.readouterr()
    assert len(first.out.splitlines()) == 5 and "broken.jpg" in first.err         # named and left out, the others found
    assert (tmp_path / "s.png").exists() and len(list(clip_run.glob("search-*.safetensors"))) == 1
    run(sample, *search, "--json")
    assert all(set(json.loads(line)) == {"image", "score"} for line in capsys.readouterr().out.splitlines())
    run(sample, *example, "--labels", "a red circle", "a blue square", "--json", *where)
    labels = json.loads(capsys.readouterr().out)["labels"]
    assert set(labels) == {"a red circle", "a blue square"} and sum(labels.values()) == pytest.approx(1)
    (tmp_path / "texts.txt").write_text("\ufeffa red circle\n\na blue square\n", encoding="utf-8")
    run(sample, *example, "--labels", tmp_path / "texts.txt", "--json", *where)
    assert json.loads(capsys.readouterr().out)["labels"] == labels                # .. with a byte order mark
    run(sample, *example, "--captions", tmp_path / "texts.txt", *where)
    assert "a red circle" in capsys.readouterr().out


@pytest.mark.parametrize("argv, words", [
    (["--labels"], "expected at least one argument"), (["--search", "x"], "--search needs --images"),
    (["--search", "x", "--images", "none"], "none"), (["--image", "x.png"], "this run compares pictures and words"),
    (["--image", "x.png", "--captions", "empty.txt"], "empty.txt holds no captions"),
    (["--image", "x.png", "--labels", "empty.txt"], "empty.txt holds no labels"),
    (["--image", "x.png", "--labels", "a", "b", "--max-tokens", "3"], "--max-tokens is for a run of --task caption or"),
    (["--image", "x.png", "--labels", "typo.txt"], "'typo.txt' is neither two labels nor a file"),
    (["--image", "x.png", "--chat"], "was trained for --task clip; --chat is for a run of --task vqa")])
def test_clip_mistakes_are_a_sentence(clip_run, tmp_path, capsys, monkeypatch, argv, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n\n")
    run(sample, *argv, "--out-dir", clip_run, code=2)
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_micro_batches_do_not_change_a_contrastive_run(clip_run, tmp_path):
    """All pairs of a step are each other's wrong answers, however the step is cut up; nothing else differs here."""
    run(train, *CLIP, "--dropout", "0", "--out-dir", tmp_path / "a")
    run(train, *CLIP, "--dropout", "0", "--out-dir", tmp_path / "b", "--accum", "2")
    a, b = losses(tmp_path / "a"), losses(tmp_path / "b")
    assert all(a[step] == pytest.approx(b[step], abs=2e-4) for step in a)


def test_clip_on_ready_made_features_and_texts(clip, tmp_path, capsys):
    """The frozen tower's embeddings, made once, and images as features: only the head learns, and both are found."""
    folder, where = album(tmp_path / "a"), from_folder(tmp_path / "a")
    texts, images = tmp_path / "t.safetensors", tmp_path / "f.safetensors"
    run(data, *where, "--text-embeddings", clip, "--output", texts, "--sheet", tmp_path / "s.png")
    run(data, *where, "--features", clip, "--output", images, "--sheet", tmp_path / "s.png")
    emb = load_safetensors(texts)["embeddings"]
    assert emb.dtype == torch.float16 and len(emb) == 100
    assert torch.allclose(emb.float().norm(dim=1), torch.ones(100), atol=2e-3)
    argv = [*where, "--task", "clip", "--text-embeddings", texts, "--batch-size", "8", "--epochs", "2",
            "--eval-interval", "2", "--log-interval", "1", "--eval-images", "2"]
    run(train, *argv, "--features", images, "--head", "mlp", "--out-dir", tmp_path / "out")
    assert load_run(tmp_path / "out").model.text is None
    (folder / "captions.txt").write_text((folder / "captions.txt").read_text().replace("wau", "miau"))
    run(train, *argv, "--out-dir", tmp_path / "x", code=2)
    assert "other captions" in capsys.readouterr().err


def test_public_towers_go_into_one_clip(clip, tmp_path):
    """--vision and --text from a public CLIP: before any step the new model is that CLIP, to the last digit."""
    run(train, *TINY, "--task", "clip", "--vision", clip, "--text", clip, "--lr", "1e-12", "--dropout", "0",
        "--crop", "0", "--jitter", "0", "--epochs", "0.2", "--out-dir", tmp_path / "o")
    ours, theirs = load_run(tmp_path / "o").model, sample.load_clip(clip)
    img = torch.randn(3, 3, theirs.config.vision.image_size, theirs.config.vision.image_size)
    idx = torch.randint(0, theirs.config.text.vocab_size, (3, 6))
    assert torch.allclose(ours(img, idx)[0], theirs(img, idx)[0], atol=1e-4)
    assert torch.isfinite(contrastive_loss(ours(img, idx)[0]))


# ----- classify

def test_classify_then_a_captioner_with_its_eyes(tmp_path, capsys):
    """The command printed by the first run begins a second one whose vision is the first one's."""
    run(train, *TINY, "--task", "classify", "--out-dir", tmp_path / "c")
    printed = capsys.readouterr().out
    assert "color" in printed and "shape" in printed and (tmp_path / "c" / "confusion-color.png").exists()
    command = re.search(r"python train.py (.+)", printed)[1].split()
    assert command[:4] == ["--dataset", "shapes", "--vision", str(tmp_path / "c")]
    run(train, *TINY, *command, "--out-dir", tmp_path / "o", "--lr", "1e-12", "--epochs", "0.2")
    same_weights(load_run(tmp_path / "c").model.vision, load_run(tmp_path / "o").model.vision)
    run(sample, "--image", "x.png", "--out-dir", tmp_path / "c", code=2)
    assert "--task classify" in capsys.readouterr().err


def test_pseudo_labels_from_clip_teach_a_classifier(clip, tmp_path, capsys):
    where = from_folder(album(tmp_path / "a"))
    (tmp_path / "l.json").write_text('{"kind": ["a dog", "a cat", "a boat"], "place": ["a beach", "a street"]}')
    run(data, *where, "--label", tmp_path / "l.json", "--labeler", clip, "--margin", "0", "--sheet", tmp_path / "s.png")
    rows = list(csv.DictReader(open(tmp_path / "a" / "labels.csv")))
    assert len(rows) == 40 and {row["category"] for row in rows} == {"kind", "place"}
    assert all(row["label"] and 0 < float(row["probability"]) <= 1 for row in rows)
    classify = [*TINY, *where, "--task", "classify"]
    run(train, *classify, "--labels", tmp_path / "a" / "labels.csv", "--out-dir", tmp_path / "o")
    assert set(load_run(tmp_path / "o").config["labels"]) == {"kind", "place"}
    run(train, *classify, "--out-dir", tmp_path / "x", code=2)
    assert "has no labels of its own" in capsys.readouterr().err


# ----- questions

@pytest.fixture(scope="module")
def vqa_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("vqa") / "out"
    run(train, *VQA, "--captions-per-image", "2", "--out-dir", out)
    return out


def test_vqa_trains_scores_and_answers(vqa_run, capsys, monkeypatch):
    """One answer for each question, be they in --prompt or typed in --chat, where an empty line ends the talk."""
    asked = ["what color is it?", "is it red?"]
    results = json.loads((vqa_run / "results.json").read_text())
    assert all(set(row) == {"question_id", "answer"} for row in results) and len(results) > 4
    scores = json.loads((vqa_run / "scores.json").read_text())
    assert {"overall", "exchanged", "blank", "answer_type", "question_type"} <= scores.keys()
    run(sample, "--image", vqa_run / "example.png", "--prompt", *asked, "--out-dir", vqa_run)
    assert len(capsys.readouterr().out.splitlines()) == 2
    monkeypatch.setattr("builtins.input", lambda prompt, lines=iter([*asked, ""]): next(lines))
    run(sample, "--image", vqa_run / "example.png", "--chat", "--out-dir", vqa_run)
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_an_answer_is_as_long_as_asked_for(vqa_run, monkeypatch):
    """--max-tokens was taken and ignored: the training data alone decided."""
    longest, real = [], sample.generate
    monkeypatch.setattr(sample, "generate", lambda *args: longest.append(args[3]) or real(*args))
    argv = ["--image", vqa_run / "example.png", "--prompt", "is it red?", "--out-dir", vqa_run]
    for most in (1, 999):
        run(sample, *argv, "--max-tokens", most)
    assert longest == [1, load_run(vqa_run).config["longest"]]


def test_several_images_in_one_prompt(vqa_run, capsys):
    example = vqa_run / "example.png"
    run(sample, "--image", example, example, "--prompt", "<image> and <image>: which is red?", "--out-dir", vqa_run)
    assert len(capsys.readouterr().out.splitlines()) == 1
    run(sample, "--image", example, "--prompt", "<image> or <image>?", "--out-dir", vqa_run, code=2)
    assert "2 <image>" in capsys.readouterr().err


def test_the_next_stage_starts_where_the_last_one_ended(vqa_run, tmp_path):
    """caption, then vqa: --init takes every weight, and the tokenizer."""
    run(train, *TINY, "--model", "prefix", "--out-dir", tmp_path / "c", "--epochs", "0.4")
    run(train, *VQA, "--init", tmp_path / "c", "--lr", "1e-12", "--epochs", "0.2", "--out-dir", tmp_path / "v")
    a, b = (load_run(tmp_path / name) for name in "cv")
    assert a.tokenizer.encode("a red circle") == b.tokenizer.encode("a red circle")
    same_weights(a.model, b.model, rows_added=True)


def test_only_the_assistants_words_are_trained(tmp_path, capsys):
    """--show-batch prints what is trained and what is not, and leaves no run behind."""
    run(train, *VQA, "--show-batch", "--out-dir", tmp_path / "none")
    assert not (tmp_path / "none").exists()
    shown = capsys.readouterr().out
    trained = [line for line in shown.splitlines() if line.startswith("trained")]
    assert trained and all("<|endoftext|>" in line and "<|user|>" not in line for line in trained)


def test_vqa_needs_questions(tmp_path, capsys):
    run(train, *VQA, *from_folder(album(tmp_path / "a")), "--out-dir", tmp_path / "o", code=2)
    assert "holds no questions" in capsys.readouterr().err


def test_questions_as_a_csv(tmp_path, capsys):
    run(data, "--n-scenes", "20", "--export", tmp_path / "q.csv", "--sheet", tmp_path / "s.png")
    rows = list(csv.DictReader(open(tmp_path / "q.csv")))
    assert len(rows) == 24 and all(row["text"].count("<image>") == 1 and "<|assistant|>" in row["text"] for row in rows)
    none = from_folder(album(tmp_path / "a"))
    run(data, *none, "--export", tmp_path / "x.csv", "--sheet", tmp_path / "s.png", code=2)
    assert "holds no questions" in capsys.readouterr().err and not (tmp_path / "x.csv").exists()


def test_pixel_shuffle_moves_neighbours_together():
    """A 4 x 4 grid numbered row by row, 2 x 2: the first token holds places 0, 1, 4, 5."""
    feats = torch.arange(16.0).view(1, 16, 1)
    assert pixel_shuffle(feats, 2)[0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    with pytest.raises(AssertionError, match="no square grid"):
        pixel_shuffle(feats, 3)


def test_a_shuffled_prefix_model_trains(tmp_path):
    run(train, *TINY, "--model", "prefix", "--shuffle", "2", "--epochs", "0.4", "--out-dir", tmp_path / "o")
    model = load_run(tmp_path / "o").model
    assert isinstance(model, PrefixVLM) and model.n_image_tokens == 1 and isinstance(model.config, VLMConfig)


def test_a_prefix_captioner_knows_the_words_of_later_questions():
    """Its tokenizer is for all stages: one made from captions alone would ask "w|h|a|t" letter by letter."""
    dataset = data.Shapes(2, 50, 0)
    question = dataset.questions[dataset.splits["train"][0]][0]

    def words(model):
        task = SimpleNamespace(run=SimpleNamespace(dataset=dataset), config=SimpleNamespace(model=model))
        return list(Captioning.words(task, str))
    assert question.question in words("prefix") and question.question not in words("cross")
    assert set(words("cross")) == {dataset.captions[i][0] for i in dataset.splits["train"]} < set(words("prefix"))


def test_nothing_is_fetched_ahead_of_the_last_step():
    """A streamed run announces the images of the next eight steps, but none that no step will ask for."""
    announced = []
    store = SimpleNamespace(announce=announced.extend, present=lambda members: members)
    batches = SimpleNamespace(members=list(range(20)), batch_size=2, seed=0, store=store, end=3)
    picks = [(i, 0) for i, _ in data.step_order(20, 2, 0, 0)]
    assert data.Batches.fetched(batches, picks, 0) == picks
    assert announced == [i for step in range(3) for i, _ in data.step_order(20, 2, step, 0)]


@pytest.mark.parametrize("rows, n", [([[1, 9, 4], [1, 9, 5, 6]], 2), ([[9, 4], [9]], 1), ([[1, 9, 4], [2, 9, 4]], 0),
                                     ([[1, 4]], 0), ([], 0), ([[1, 9, 4], [1]], 0)])
def test_what_all_rows_begin_with(rows, n):
    assert n_shared(rows, image=9) == n
