"""Web and public data sets, from the first command to the last: what each script hands to the next one.

Nothing but 127.0.0.1 is contacted. Images are of one colour that tells their number, and captions say the number: so a
picture that meets another's words is seen.
"""
import csv
import io
import json
import multiprocessing
import pickle
import threading

import pytest
import torch
from PIL import Image

import data
import sample
import train
from test_layouts import write
from test_scripts import TINY, run, same_run
from test_tasks import clip  # noqa: F401 (a fixture)
from test_web import Host, send
from tinyvlm import features
from tinyvlm.config import UserError, parse_config
from tinyvlm.features import Encoder
from tinyvlm.image import Recipe
from tinyvlm.layouts import coco
from tinyvlm.weights import load_safetensors

VIT = __file__.rpartition("/")[0] + "/reference/vit"


def colour(k):
    return (4 * k, 240 - 4 * k, 7)


def png(k, size=(24, 20)):
    file = io.BytesIO()
    Image.new("RGB", size, colour(k)).save(file, "PNG")
    return file.getvalue()


def one_sentence(capsys, words):
    """Standard error ends in one line with these words, and there is no traceback anywhere."""
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and words in lines[0] and "Traceback" not in out + err, err


@pytest.fixture
def host():
    made = Host()
    yield made
    made.server.shutdown()
    made.server.server_close()


# ----- COCO and Flickr30k

def coco_2014(folder, url=None, n_train=20):
    """Annotations in the layout of 2014, with the images beside them or, given an address, none but coco_urls."""
    for subset, ids in (("train2014", range(n_train)), ("val2014", range(40, 44))):
        images = [{"id": k, "file_name": f"COCO_{subset}_{k:012d}.jpg", "coco_url": f"{url}/{k}"} for k in ids]
        notes = [{"id": 9 * k + j, "image_id": k, "caption": f"picture {k} seen {'ab'[j]}"} for k in ids for j in (0, 1)]
        write(folder / "annotations" / f"captions_{subset}.json", {"images": images, "annotations": notes})
        for image in [] if url else images:
            path = folder / subset / image["file_name"]
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(png(image["id"]))
    return folder


def test_coco_and_flickr30k_from_local_folders(tmp_path, capsys):
    coco_2014(tmp_path / "coco")
    splits = ["train"] * 16 + ["val"] * 2 + ["test"] * 2
    with open(write(tmp_path / "f30k" / "flickr_annotations_30k.csv", ""), "w", newline="") as file:
        csv.writer(file).writerows([("raw", "split", "filename"), *(
            (json.dumps([f"a dog, {k}", 'it says "wau"']), split, f"{k}.jpg") for k, split in enumerate(splits))])
    (tmp_path / "f30k" / "flickr30k-images").mkdir()
    for k in range(20):
        (tmp_path / "f30k" / "flickr30k-images" / f"{k}.jpg").write_bytes(png(k))
    for name, folder, counts in (("coco", "coco", "18/2/4"), ("flickr30k", "f30k", "16/2/2")):
        where = ["--dataset", name, "--data-dir", tmp_path / folder]
        run(data, *where, "--sheet", tmp_path / f"{name}.png")
        printed = capsys.readouterr().out
        assert counts in printed and "  0 broken images" in printed and (tmp_path / f"{name}.png").exists()
        run(train, *TINY, *where, "--out-dir", tmp_path / name / "out", "--epochs", "0.5")
        assert "BLEU-4" in capsys.readouterr().out and (tmp_path / name / "out" / "example.png").exists()


@pytest.fixture
def streamed(host, tmp_path):
    """A data set of which only the annotations are here; images 3, 8 and 41 are gone. Returns the options."""
    host.pages.update({f"/{k}": send(png(k)) for k in (*range(20), *range(40, 44)) if k not in (3, 8, 41)})
    return ["--dataset", "coco", "--stream", "--allow-private", "--data-dir", coco_2014(tmp_path / "data", host.url)]


def test_each_streamed_image_meets_its_own_caption(streamed, host):
    """Through a real loader process, in two micro-batches: whatever fails, the pairs that are left belong together."""
    config = parse_config(train.TrainConfig, [*map(str, [*TINY, *streamed]), "--accum", "2", "--captions-per-image", "2"])
    made, steps, seen = train.Run(config, train.Machine(config)), 0, set()
    for micro_batches in made.loader(0):
        assert sum(batch.n_targets for batch in micro_batches) and sum(batch.share for batch in micro_batches) == pytest.approx(1)
        steps += 1
        for batch in micro_batches:
            assert batch.img.shape == (4, 3, 32, 32) and len(batch.targets) == 8
            for img, rows in zip(batch.img, batch.targets.view(4, 2, -1)):
                k = round(img[0].float().mean().item() / 4)
                texts = {made.task.tokenizer.decode(row[row >= 0].tolist()[:-1]) for row in rows}
                assert texts == {f"picture {k} seen a", f"picture {k} seen b"}
                seen.add(k)
    assert steps == made.total_steps and not seen & {3, 8} and len(seen) > 12
    assert not multiprocessing.active_children(), "the loader's process has ended with the loop"
    assert {path.name for path in made.store.folder.iterdir()} == {"loader0"}, "nothing was asked for in this process"
    assert made.members("test") == [k for k in made.dataset.splits["test"] if "41." not in made.dataset.names[k]]


def test_a_streamed_run_ends_well_and_resumes_to_the_same_end(streamed, tmp_path, capfd):
    argv = [*TINY, *streamed, "--accum", "2", "--n-layer", "1"]
    run(train, *argv, "--out-dir", tmp_path / "a")
    printed = capfd.readouterr()
    assert "images could not be fetched so far: {'HTTP 404'" in printed.out and "Traceback" not in printed.err
    assert "3 held-out images" in printed.out and "test split: " in printed.out
    for name in ("samples.png", "example.png", "model.safetensors"):
        assert (tmp_path / "a" / name).stat().st_size
    assert {path.name for path in (tmp_path / "data" / "stream").iterdir()} == {"main0", "loader0"}
    run(train, *argv, "--out-dir", tmp_path / "b", "--stop-after", "3")
    run(train, "--resume", "--out-dir", tmp_path / "b")
    same_run(tmp_path / "a", tmp_path / "b")
    run(train, "--eval-only", "--out-dir", tmp_path / "a", "--table", tmp_path / "t.csv", "--split", "val")
    run(train, *argv, "--task", "clip", "--n-joint", "16", "--out-dir", tmp_path / "c", "--epochs", "0.5")
    run(train, "--eval-only", "--out-dir", tmp_path / "c", "--table", tmp_path / "t.csv")
    assert (tmp_path / "c" / "similarity.png").exists() and len((tmp_path / "t.csv").read_text().splitlines()) == 3


@pytest.mark.parametrize("gone, words", [("train", "none of the 8 images of step 0 could be fetched"), ("val", "to evaluate with"),
                                         ("test", "none of the images of the test split")])
def test_a_server_without_any_image_is_one_sentence(streamed, host, tmp_path, capsys, gone, words):
    """Met in the loader's process, in the evaluation, and at the end: a worker's error once came with its traceback."""
    dataset = coco(tmp_path / "data", stream=True)
    for i in dataset.splits[gone]:
        host.pages.pop("/" + dataset.urls[i].rpartition("/")[2], None)
    run(train, *TINY, *streamed, "--out-dir", tmp_path / "r", "--epochs", "0.5", code=2)
    one_sentence(capsys, words)
    assert not multiprocessing.active_children()


def test_the_sheet_and_labels_of_a_streamed_set(streamed, host, clip, tmp_path, capsys):  # noqa: F811
    (tmp_path / "l.json").write_text('{"kind": ["a dog", "a cat"]}')
    run(data, *streamed, "--sheet", tmp_path / "s.png", "--label", tmp_path / "l.json", "--labeler", clip, "--margin", "0")
    printed = capsys.readouterr().out
    assert printed.count("left out: ") == 3 and "000000000041.jpg could not be fetched (HTTP 404)" in printed
    assert Image.open(tmp_path / "s.png").size[0] > 700 and "kind: 21 images labelled" in printed
    assert len((tmp_path / "data" / "labels.csv").read_text().splitlines()) == 22
    host.pages.clear()
    run(data, "--dataset", "coco", "--stream", "--allow-private", "--data-dir", coco_2014(tmp_path / "b", host.url), code=2)
    one_sentence(capsys, "that were tried can be opened")
    run(data, "--stream", code=2)
    one_sentence(capsys, "leave it out for shapes")


def test_what_waits_in_memory_is_limited_and_each_process_streams_by_itself(streamed, host, tmp_path):
    said, dataset = [], coco(tmp_path / "data", stream=True)
    store = data.StreamStore(dataset, Recipe(size=8), allow_private=True)
    pickle.dumps(store)                                         # what macOS does to give it to a loader's process
    store.at_hand, store.say = 5, said.append
    for _ in range(2):
        there = store.present(range(24))
        assert there == [i for i in range(24) if i not in (3, 8, 21)] and len(store.pixels) == 5
        img = store.get(there)
        assert [round(x[0].float().mean().item() / 4) for x in img] == [k if k < 20 else k + 20 for k in there]
        assert store.get(there[:2]).equal(img[:2]) and len(store.pixels) == 5
    assert len(store.lost) == 3 and said[-1].startswith("2 images"), "an image that fails again is not a new loss"
    assert max(host.asked[f"/{k}"] for k in range(20) if k not in (3, 8)) == 1
    before, threads = store.stream, threading.active_count()
    store.process = -1                                          # as in the child of a fork, where no thread lives on
    assert store.open() is not before and threading.active_count() == threads
    with pytest.raises(UserError, match="000000000003.jpg could not be fetched .HTTP 404.; check"):
        dataset.open(3)


# ----- capsfusion

def test_capsfusion_is_fetched_once_and_trained_on(host, tmp_path, capsys):
    host.pages.update({f"/{k}": send(png(k)) for k in range(14) if k not in (2, 5)})
    host.pages["/5"] = send(b"<html>")
    where = ["--dataset", "capsfusion", "--data-dir", tmp_path / "d", "--sheet", tmp_path / "s.png"]
    with open(tmp_path / "rows.csv", "w", newline="") as file:
        csv.writer(file).writerows([("image_url", "capsfusion", "laion"),
                                    *((f"{host.url}/{k}", f'picture "{k}", large', "x") for k in range(14))])
    fetch = [*where, "--rows", tmp_path / "rows.csv", "--limit", "10", "--size", "32", "--allow-private"]
    for again in (False, True):
        run(data, *fetch)
        printed = capsys.readouterr().out
        assert "10 good, 2 failed" in printed and "1 HTTP 404" in printed and "1 not an image" in printed
        assert "10 images, 10 captions" in printed and "  0 broken images" in printed
        assert sum(host.asked.values()) == 12 and max(host.asked.values()) == 1, "the second time nothing is fetched"
    report = list(csv.DictReader(open(tmp_path / "d" / "report.csv")))
    assert {row["status"]: row["url"][-2:] for row in report if not row["file"]} == {"HTTP 404": "/2", "not an image": "/5"}
    run(data, *where)                                           # only looked at: no row of the Hub is asked for
    run(train, *TINY, *where[:4], "--out-dir", tmp_path / "out", "--epochs", "1")
    assert (tmp_path / "out" / "samples.png").exists()


@pytest.mark.parametrize("text, words", [("a,b\n1,2\n", "it needs image_url"), ("", "it holds no rows"),
                                         ("image_url,capsfusion\n", "it holds no rows"), (None, "No such file"),
                                         ("image_url,capsfusion\nHOST/none,x\n", "none of the addresses gave an image")])
def test_capsfusion_mistakes_are_one_sentence(host, tmp_path, capsys, text, words):
    if text is not None:
        (tmp_path / "rows.csv").write_text(text.replace("HOST", host.url))
    run(data, "--dataset", "capsfusion", "--data-dir", tmp_path / "d", "--rows", tmp_path / "rows.csv", "--allow-private", code=2)
    one_sentence(capsys, words)
    run(data, "--dataset", "capsfusion", "--data-dir", tmp_path / "d", "--size", "0", code=2)
    one_sentence(capsys, "--size must be above 0")


# ----- questions

def vqa_files(folder, splits=("train", "val"), answered=("train", "val")):
    """The official layout: 8 images a split with two questions each; answers are ten people's."""
    for n, split in enumerate(splits):
        ids, subset = range(20 * n, 20 * n + 8), f"{split}20{14 + (split == 'test')}"
        asked = [{"image_id": k, "question": question, "question_id": 100 * k + j} for k in ids
                 for j, question in enumerate(("What color is it?", "Is it red?"))]
        write(folder / f"v2_OpenEnded_mscoco_{subset}_questions.json", {"questions": asked, "data_subtype": subset})
        marks = [{"question_id": q["question_id"], "image_id": q["image_id"], "question_type": "is it" if q["question_id"] % 2 else
                  "what color is", "answer_type": "yes/no" if q["question_id"] % 2 else "other", "multiple_choice_answer": said,
                  "answers": [{"answer": said, "answer_id": a + 1} for a in range(10)]}
                 for q in asked for said in [("no" if q["question_id"] % 2 else "green")]]
        if split in answered:
            write(folder / f"v2_mscoco_{subset}_annotations.json", {"annotations": marks, "data_subtype": subset})
        for k in ids:
            path = folder / subset / f"COCO_{subset}_{k:012d}.jpg"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(png(k))
    return folder


ASKS = [*TINY, "--task", "vqa", "--model", "prefix", "--max-tokens", "60", "--dataset", "vqav2", "--captions-per-image", "2"]


def test_questions_in_the_official_layout(tmp_path, capsys):
    where, out = ["--dataset", "vqav2", "--data-dir", vqa_files(tmp_path / "d")], tmp_path / "out"
    run(data, *where, "--sheet", tmp_path / "s.png")
    printed = capsys.readouterr().out
    assert "16 questions in v2_OpenEnded_mscoco_val2014_questions.json" in printed and (tmp_path / "s.png").exists()
    run(train, *ASKS, *where, "--out-dir", out, "--test-images", "3")
    assert len(json.loads((out / "results.json").read_text())) == 6
    run(train, "--eval-only", "--out-dir", out, "--table", tmp_path / "t.csv")
    rows = json.loads((out / "results.json").read_text())
    assert sorted(row["question_id"] for row in rows) == sorted(100 * k + j for k in range(20, 28) for j in (0, 1))
    assert all(set(row) == {"question_id", "answer"} and isinstance(row["answer"], str) for row in rows)
    assert json.loads((out / "scores.json").read_text())["answer_type"].keys() == {"yes/no", "other"}
    capsys.readouterr()
    run(sample, "--image", out / "example.png", "--prompt", "Is it red?", "--out-dir", out)
    assert "example.png: Is it red?  " in capsys.readouterr().out


def test_a_test_split_whose_answers_are_secret_is_answered_and_not_scored(tmp_path, capsys):
    folder, out = vqa_files(tmp_path / "d", ("train", "val", "test"), ("train", "val")), tmp_path / "out"
    run(train, *ASKS, "--data-dir", folder, "--out-dir", out, "--epochs", "1")
    assert "16 questions about 8 images, without answers" in capsys.readouterr().out
    (out / "results.json").unlink()
    run(train, "--eval-only", "--out-dir", out, "--table", tmp_path / "t.csv")
    rows = json.loads((out / "results.json").read_text())
    assert [row["question_id"] for row in rows] == [100 * k + j for k in range(40, 48) for j in (0, 1)]
    val, train_marks = (folder / f"v2_mscoco_{split}2014_annotations.json" for split in ("val", "train"))
    val.write_text(train_marks.read_text())
    capsys.readouterr()
    run(data, "--dataset", "vqav2", "--data-dir", folder, code=2)
    one_sentence(capsys, "give the annotations of the same split")


# ----- labels

@pytest.mark.parametrize("text, words", [("{", "l.json is not a readable JSON file"), ('{"kind": ["a dog"]}', "two phrases or more"),
                                         ('["a dog", "a cat"]', "should be like"), ("{}", "should be like")])
def test_label_files_that_are_none(tmp_path, clip, capsys, text, words):  # noqa: F811
    (tmp_path / "l.json").write_text(text)
    run(data, "--n-scenes", "9", "--sheet", tmp_path / "s.png", "--label", tmp_path / "l.json", "--labeler", clip, code=2)
    one_sentence(capsys, words)


def test_classes_are_learned_from_what_has_a_label(tmp_path, clip, capsys, monkeypatch):  # noqa: F811
    """Empty labels, images without any, a category or a label that train never saw: left out, said, never a nan."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "l.json").write_text('{"kind": ["a dog", "a cat"]}')
    run(data, "--n-scenes", "48", "--label", "l.json", "--labeler", clip, "--margin", "1.1")      # no folder data/shapes yet
    assert "kind: 0 images labelled, 56 too unsure" in capsys.readouterr().out
    run(train, *TINY, "--task", "classify", "--labels", "data/shapes/labels.csv", code=2)
    one_sentence(capsys, "a lower --margin")
    rows = list(csv.reader(open("data/shapes/labels.csv")))[1:]
    labels = [*(("a dog", "a cat", "")[k % 3] for k in range(48)), "a dog", "a fox", "a dog", "", "a fox", "a cat", "a dog", "a dog"]
    more = [[rows[k][0], "place", "a beach", "", ""] for k in (49, 50, 51)]                        # in val alone
    with open("l.csv", "w", newline="") as file:
        csv.writer(file).writerows([("image", "category", "label", "probability", "margin"),
                                    *((*row[:2], label, "", "") for row, label in zip(rows, labels)), *more])
    run(train, *TINY, "--task", "classify", "--labels", "l.csv", "--out-dir", "out")
    printed = capsys.readouterr().out
    assert "16 of 48 images of the train split have no label that is learned" in printed and "nan" not in printed
    assert json.loads((tmp_path / "out" / "config.json").read_text())["labels"] == {"kind": ["a cat", "a dog"]}
    run(train, "--eval-only", "--out-dir", "out")
    assert 0 <= json.loads((tmp_path / "out" / "scores.json").read_text())["kind"] <= 1


# ----- what is made once, killed half way

@pytest.mark.parametrize("kind, where, maker, stop, kept", [("features", Encoder, "__call__", 5, 16),
                                                           ("text-embeddings", features, "text_embeddings", 90, 80)])
def test_a_killed_cache_goes_on_where_it_was(tmp_path, clip, monkeypatch, kind, where, maker, stop, kept):  # noqa: F811
    """Into a folder that is not there yet; what was saved before the kill is not computed again, nor is a whole file."""
    monkeypatch.chdir(tmp_path)
    real, seen = getattr(where, maker), []

    def counted(*args):
        if len(seen) == stop:
            raise KeyboardInterrupt
        seen.append(len(args[-1]))
        return real(*args)
    monkeypatch.setattr(where, maker, counted)
    monkeypatch.setattr(features, "SAVE_EVERY", 8)
    source, size = (VIT, 4) if kind == "features" else (clip, 1)
    argv = ["--n-scenes", "200", f"--{kind}", source, "--batch-size", size, "--output", "new/deep/f.safetensors"]
    run(data, *argv, code=130)
    assert sum(seen) == stop * size and len(next(iter(load_safetensors("new/deep/f.safetensors").values()))) == kept
    seen, stop = [], None
    run(data, *argv)
    assert sum(seen) == 240 - kept, "what was not saved is made again, and no more"
    (made,) = load_safetensors("new/deep/f.safetensors").values()
    assert len(made) == 240 and torch.isfinite(made.float()).all()
    run(data, *argv)
    assert sum(seen) == 240 - kept
