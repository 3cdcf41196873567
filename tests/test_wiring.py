"""Web and public data sets, from the first command to the last: what each script hands to the next one.

Nothing but 127.0.0.1 is contacted. Images are of one colour that tells their number, and captions say the number: so a
picture that meets another's words is seen.
"""
import csv
import io
import json
import multiprocessing
import pickle

import pytest
import torch
from PIL import Image

import data
import sample
import test_tasks
import train
from conftest import REFERENCE
from servers import send
from test_layouts import write
from test_scripts import TINY, run, same_run
from tinyvlm import features
from tinyvlm.config import UserError, parse_config
from tinyvlm.features import Encoder
from tinyvlm.image import Recipe
from tinyvlm.layouts import coco
from tinyvlm.weights import load_safetensors, save_safetensors

VIT = str(REFERENCE / "vit")
clip = test_tasks.clip                                          # a fixture: a tiny CLIP that reads


def png(k):
    file = io.BytesIO()
    Image.new("RGB", (24, 20), (4 * k, 240 - 4 * k, 7)).save(file, "PNG")
    return file.getvalue()


def number(img):
    """uint8 (3, S, S) -> which image it is."""
    return round(img[0].float().mean().item() / 4)


def table(path, *rows):
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return write(path, text.getvalue())


def one_sentence(capsys, words):
    """Standard error holds one error, with these words, and there is no traceback anywhere."""
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and words in lines[0] and "Traceback" not in out + err, err


# ----- COCO and Flickr30k

def coco_2014(folder, url=None):
    """Annotations in the layout of 2014, with the images beside them or, given an address, none but coco_urls."""
    for subset, ids in (("train2014", range(20)), ("val2014", range(40, 44))):
        images = [{"id": k, "file_name": f"COCO_{subset}_{k:012d}.jpg", "coco_url": f"{url}/{k}"} for k in ids]
        notes = [{"id": 2 * k + j, "image_id": k, "caption": f"picture {k} {'ab'[j]}"} for k in ids for j in (0, 1)]
        write(folder / "annotations" / f"captions_{subset}.json", {"images": images, "annotations": notes})
        for image in [] if url else images:
            write(folder / subset / image["file_name"], "").write_bytes(png(image["id"]))
    return folder


def test_coco_and_flickr30k_from_local_folders(tmp_path, capsys):
    coco_2014(tmp_path / "coco")
    splits = ["train"] * 16 + ["val"] * 2 + ["test"] * 2
    texts = json.dumps(["a dog, large", 'it says "wau"'])
    table(tmp_path / "flickr30k" / "flickr_annotations_30k.csv", ("raw", "split", "filename"),
          *((texts, split, f"{k}.jpg") for k, split in enumerate(splits)))
    for k in range(20):
        write(tmp_path / "flickr30k" / "flickr30k-images" / f"{k}.jpg", "").write_bytes(png(k))
    for name, counts in (("coco", "18/2/4"), ("flickr30k", "16/2/2")):
        where = ["--dataset", name, "--data-dir", tmp_path / name]
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


def test_each_streamed_image_meets_its_own_caption(streamed):
    """Through a real loader process, in two micro-batches: whatever fails, the pairs that are left belong together."""
    argv = [*TINY, *streamed, "--accum", "2", "--captions-per-image", "2"]
    config = parse_config(train.TrainConfig, map(str, argv))
    made, seen = train.Run(config, train.Machine(config)), []
    for micro_batches in made.loader(0):
        assert sum(batch.share for batch in micro_batches) == pytest.approx(1)
        for batch in micro_batches:
            for img, rows in zip(batch.img, batch.targets.view(4, 2, -1)):
                texts = {made.task.tokenizer.decode(row[row >= 0].tolist()[:-1]) for row in rows}
                seen.append(number(img))
                assert texts == {f"picture {seen[-1]} a", f"picture {seen[-1]} b"}
    assert len(seen) == 8 * made.total_steps and not {3, 8} & set(seen) and len(set(seen)) > 12
    assert not multiprocessing.active_children(), "the loader's process has ended with the loop"
    assert {path.name for path in made.store.folder.iterdir()} == {"loader0"}, "this process fetched nothing yet"
    assert [made.dataset.names[i][-6:-4] for i in made.members("test")] == ["40", "42", "43"]


def test_a_streamed_run_ends_well_and_resumes_to_the_same_end(streamed, tmp_path, capfd):
    argv = [*TINY, *streamed, "--accum", "2"]
    run(train, *argv, "--out-dir", tmp_path / "a")
    printed = capfd.readouterr()
    assert "images could not be fetched so far: {'HTTP 404'" in printed.out and "Traceback" not in printed.err
    assert "3 held-out images" in printed.out and "test split: " in printed.out
    assert all((tmp_path / "a" / name).stat().st_size for name in ("samples.png", "example.png", "model.safetensors"))
    assert {path.name for path in (tmp_path / "data" / "stream").iterdir()} == {"main0", "loader0"}
    run(train, *argv, "--out-dir", tmp_path / "b", "--stop-after", "3")
    run(train, "--resume", "--out-dir", tmp_path / "b")
    same_run(tmp_path / "a", tmp_path / "b")
    run(train, *argv, "--task", "clip", "--n-joint", "16", "--out-dir", tmp_path / "c", "--epochs", "0.5")
    made = {"ids": json.dumps([f"COCO_{split}2014_{k:012d}.jpg" for k in range(50) for split in ("train", "val")])}
    save_safetensors({"features": torch.randn(100, 6)}, tmp_path / "f.safetensors", made)
    run(train, *argv, "--features", tmp_path / "f.safetensors", "--out-dir", tmp_path / "d", "--test-images", "1")
    for out in "acd":
        run(train, "--eval-only", "--out-dir", tmp_path / out, "--table", tmp_path / "t.csv")
    assert (tmp_path / "c" / "similarity.png").exists() and len((tmp_path / "t.csv").read_text().splitlines()) == 4


@pytest.mark.parametrize("gone, words", [("train", "none of the 8 images of step 0"), ("val", "to evaluate with"),
                                         ("test", "none of the images of the test split")])
def test_a_server_without_any_image_is_one_sentence(streamed, host, tmp_path, capsys, gone, words):
    """Met in the loader's process (where an error once came with its traceback), while evaluating, and at the end."""
    dataset = coco(tmp_path / "data", stream=True)
    for i in dataset.splits[gone]:
        host.pages.pop("/" + dataset.urls[i].rpartition("/")[2], None)
    run(train, *TINY, *streamed, "--out-dir", tmp_path / "r", "--epochs", "0.5", code=2)
    one_sentence(capsys, words)
    assert not multiprocessing.active_children()


def test_the_sheet_and_labels_of_a_streamed_set(streamed, host, clip, tmp_path, capsys):
    write(tmp_path / "l.json", {"kind": ["a dog", "a cat"]})
    argv = [*streamed, "--sheet", tmp_path / "s.png"]
    run(data, *argv, "--label", tmp_path / "l.json", "--labeler", clip, "--margin", "0")
    printed = capsys.readouterr().out
    assert printed.count("left out: ") == 3 and "000000000041.jpg could not be fetched (HTTP 404)" in printed
    assert Image.open(tmp_path / "s.png").size[0] > 700 and "kind: 21 images labelled" in printed
    assert len((tmp_path / "data" / "labels.csv").read_text().splitlines()) == 22
    host.pages.clear()
    run(data, *argv[:-3], coco_2014(tmp_path / "b", host.url), code=2)
    one_sentence(capsys, "that were tried can be opened")
    run(data, "--stream", code=2)
    one_sentence(capsys, "leave it out for shapes")


def test_what_waits_in_memory_is_limited_and_each_process_streams_by_itself(streamed, host, tmp_path):
    said, dataset = [], coco(tmp_path / "data", stream=True)
    store = data.StreamStore(dataset, Recipe(size=8), allow_private=True)
    pickle.dumps(store)                                         # how macOS hands it to a loader's process
    store.at_hand, store.say = 5, said.append
    for _ in range(2):
        there = store.present(range(24))
        assert there == [i for i in range(24) if i not in (3, 8, 21)] and len(store.pixels) == 5
        img = store.get(there)
        assert [number(x) for x in img] == [k if k < 20 else k + 20 for k in there] and len(store.pixels) == 5
    assert len(store.lost) == 3 and said[-1].startswith("2 images"), "an image that fails again is not a new loss"
    assert max(host.asked[f"/{k}"] for k in range(20) if k not in (3, 8)) == 1
    before, store.process = store.stream, -1                    # as in the child of a fork, where no thread lives on
    assert store.open() is not before
    with pytest.raises(UserError, match="000000000003.jpg could not be fetched .HTTP 404.; check"):
        dataset.open(3)


# ----- capsfusion

def test_capsfusion_is_fetched_once_and_trained_on(host, tmp_path, capsys):
    host.pages.update({f"/{k}": send(png(k)) for k in range(14) if k not in (2, 5)})
    host.pages["/5"] = send(b"<html>")
    where = ["--dataset", "capsfusion", "--data-dir", tmp_path / "d"]
    rows = table(tmp_path / "rows.csv", ("image_url", "capsfusion", "laion"),
                 *((f"{host.url}/{k}", f'picture "{k}", large', "x") for k in range(14)))
    look = [*where, "--sheet", tmp_path / "s.png"]
    for _ in range(2):
        run(data, *look, "--rows", rows, "--limit", "10", "--size", "32", "--allow-private")
        printed = capsys.readouterr().out
        assert "10 good, 2 failed" in printed and "1 HTTP 404" in printed and "1 not an image" in printed
        assert "10 images, 10 captions" in printed and "  0 broken images" in printed
        assert sum(host.asked.values()) == 12 and max(host.asked.values()) == 1, "the second time nothing is fetched"
    report = list(csv.DictReader(open(tmp_path / "d" / "report.csv")))
    failed = {row["url"][-2:]: row["status"] for row in report if not row["file"]}
    assert failed == {"/2": "HTTP 404", "/5": "not an image"}
    run(data, *look)                                            # only looked at: no row of the Hub is asked for
    run(train, *TINY, *where, "--out-dir", tmp_path / "out", "--epochs", "1")
    assert (tmp_path / "out" / "samples.png").exists()


@pytest.mark.parametrize("text, words", [("a,b\n1,2\n", "it needs image_url"), ("", "it holds no rows"),
                                         ("image_url,capsfusion\n", "it holds no rows"), (None, "No such file"),
                                         ("image_url,capsfusion\nHOST/none,x\n", "none of the addresses")])
def test_capsfusion_mistakes_are_one_sentence(host, tmp_path, capsys, text, words):
    where = ["--dataset", "capsfusion", "--data-dir", tmp_path / "d", "--allow-private"]
    if text is not None:
        write(tmp_path / "rows.csv", text.replace("HOST", host.url))
    run(data, *where, "--rows", tmp_path / "rows.csv", code=2)
    one_sentence(capsys, words)
    run(data, *where, "--size", "0", code=2)
    one_sentence(capsys, "--size must be above 0")


# ----- questions

def vqa_files(folder, splits):
    """The official layout: 8 images a split with two questions each, the answers of ten people but to test's."""
    for n, split in enumerate(splits):
        subset, questions, marks = split + {"test": "2015"}.get(split, "2014"), [], []
        for k in range(20 * n, 20 * n + 8):
            for j, text, said, kind in ((0, "What color is it?", "green", "other"), (1, "Is it red?", "no", "yes/no")):
                questions.append({"image_id": k, "question_id": 100 * k + j, "question": text})
                marks.append({**questions[-1], "multiple_choice_answer": said, "question_type": "", "answer_type": kind,
                              "answers": [{"answer": said}] * 10})
            write(folder / subset / f"COCO_{subset}_{k:012d}.jpg", "").write_bytes(png(k))
        for kind, name, content in (("questions", "OpenEnded_mscoco", questions), ("annotations", "mscoco", marks)):
            if split != "test" or kind == "questions":
                write(folder / f"v2_{name}_{subset}_{kind}.json", {kind: content, "data_subtype": subset})
    return folder


ASKS = [*TINY, "--task", "vqa", "--model", "prefix", "--max-tokens", "60", "--captions-per-image", "2"]


def test_questions_in_the_official_layout(tmp_path, capsys):
    """Trained, scored on val, and test, whose answers are secret, answered for the server that knows them."""
    folder, out = vqa_files(tmp_path / "d", ("train", "val", "test")), tmp_path / "out"
    where, ids = ["--dataset", "vqav2", "--data-dir", folder], [100 * k + j for k in range(20, 48) for j in (0, 1)]
    run(data, *where, "--sheet", tmp_path / "s.png")
    assert "16 questions in v2_OpenEnded_mscoco_test2015_questions.json, no answers" in capsys.readouterr().out
    run(train, *ASKS, *where, "--out-dir", out, "--test-images", "3")
    assert "6 questions about 3 images, without answers" in capsys.readouterr().out
    for split, mine in (("test", ids[-16:]), ("val", ids[:16])):
        run(train, "--eval-only", "--out-dir", out, "--split", split, "--table", tmp_path / "t.csv")
        rows = json.loads((out / "results.json").read_text())
        assert [row["question_id"] for row in rows] == mine, "all of the split, not --test-images of them"
        assert all(set(row) == {"question_id", "answer"} and isinstance(row["answer"], str) for row in rows)
    assert json.loads((out / "scores.json").read_text())["answer_type"].keys() == {"yes/no", "other"}
    run(sample, "--image", out / "example.png", "--prompt", "Is it red?", "--out-dir", out)
    assert "example.png: Is it red?  " in capsys.readouterr().out
    own, other = (folder / f"v2_mscoco_{split}2014_annotations.json" for split in ("val", "train"))
    write(own, other.read_text())
    run(data, *where, code=2)
    one_sentence(capsys, "give the annotations of the same split")


# ----- labels, and what is made once

def test_classes_are_learned_from_what_has_a_label(tmp_path, clip, capsys, monkeypatch):
    """Empty labels, images without any, a category or a label that train never saw: left out, said, never a nan."""
    monkeypatch.chdir(tmp_path)                                 # where no folder data/shapes is yet
    label = ["--n-scenes", "48", "--label", "l.json", "--labeler", clip, "--margin", "1.1"]
    for wrong, words in (("{", "not a readable JSON"), (["a", "b"], "like"), ({}, "like"),
                         ({"kind": ["a dog"]}, "two phrases or more")):
        write(tmp_path / "l.json", wrong)
        run(data, *label, code=2)
        one_sentence(capsys, words)
    write(tmp_path / "l.json", {"kind": ["a dog", "a cat"]})
    run(data, *label)
    assert "kind: 0 images labelled, 56 too unsure" in capsys.readouterr().out
    run(train, *TINY, "--task", "classify", "--labels", "data/shapes/labels.csv", code=2)
    one_sentence(capsys, "a lower --margin")
    names = [row[0] for row in csv.reader(open("data/shapes/labels.csv"))][1:]
    labels = [*("dog", "cat", "") * 16, "dog", "fox", "dog", "", "fox", "cat", "dog", "dog"]
    table(tmp_path / "l.csv", ("image", "category", "label"), *((x, "kind", label) for x, label in zip(names, labels)),
          *((x, "place", "beach") for x in names[49:52]))       # images of val
    run(train, *TINY, "--task", "classify", "--labels", "l.csv", "--out-dir", "out")
    printed = capsys.readouterr().out
    assert "16 of 48 images of the train split have no label that is learned" in printed and "nan" not in printed
    assert json.loads((tmp_path / "out" / "config.json").read_text())["labels"] == {"kind": ["cat", "dog"]}
    run(train, "--eval-only", "--out-dir", "out")
    assert 0 <= json.loads((tmp_path / "out" / "scores.json").read_text())["kind"] <= 1


@pytest.mark.parametrize("kind, where, maker, stop, kept", [("features", Encoder, "__call__", 5, 16),
                                                           ("text-embeddings", features, "text_embeddings", 90, 80)])
def test_a_killed_cache_goes_on_where_it_was(tmp_path, clip, monkeypatch, kind, where, maker, stop, kept):
    """Into a folder that is not there yet; what was saved before the kill is not made again, nor is a whole file."""
    monkeypatch.chdir(tmp_path)
    real, seen, path = getattr(where, maker), [], "new/deep/f.safetensors"

    def counted(*args):
        if len(seen) == stop:
            raise KeyboardInterrupt
        seen.append(len(args[-1]))
        return real(*args)
    monkeypatch.setattr(where, maker, counted)
    monkeypatch.setattr(features, "SAVE_EVERY", 8)
    source, size = (VIT, 4) if kind == "features" else (clip, 1)
    argv = ["--n-scenes", "200", f"--{kind}", source, "--batch-size", size, "--output", path]
    run(data, *argv, code=130)
    assert sum(seen) == stop * size and len(next(iter(load_safetensors(path).values()))) == kept
    seen, stop = [], None
    for _ in range(2):
        run(data, *argv)
        assert sum(seen) == 240 - kept, "what was not saved is made again, and no more"
    (made,) = load_safetensors(path).values()
    assert len(made) == 240 and torch.isfinite(made.float()).all()
