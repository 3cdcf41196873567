"""The five systems through the scripts, each as it was published but tiny: public checkpoints, data in public layouts.

Every test once used a ViT, and the ResNet branches behind it had become unreachable. So here each system runs in its
own configuration from the first command to the last; each pair of task and towers trains and is used, or is refused in
a sentence; and each preset runs. Nothing but 127.0.0.1 is contacted. A picture's colour tells its number, and so do its
captions: one that meets another's words is seen.
"""
import itertools
import json
import pickle

import pytest
import torch

import data
import public
import sample
import train
from helpers import TEXT, TINY, album, from_folder, one_sentence, png, run, table
from servers import send
from tinyvlm.batches import Batches
from tinyvlm.pretrained import load_gpt2, load_resnet50, load_run, load_vit
from tinyvlm.presets import PRESETS
from tinyvlm.weights import load_safetensors, save_safetensors

# as few sizes as the presets allow; what a task does not have is added by text()
SMALL = ["--n-layer", "1", "--n-embd", "16", "--n-head", "2", "--image-size", "16", "--batch-size", "4", "--device", "cpu",
         "--epochs", "0.5", "--eval-interval", "99", "--eval-images", "3", "--test-images", "3"]
STEPS = ["--batch-size", "4", "--eval-interval", "3", "--device", "cpu", "--log-interval", "1"]


@pytest.fixture(scope="module")
def pub(tmp_path_factory):
    """Tiny public checkpoints by name."""
    folder = tmp_path_factory.mktemp("pub")
    makers = {"vit": public.tiny_vit, "gpt2": lambda folder: public.tiny_gpt2(folder, block_size=400), "clip": public.tiny_clip, "resnet": public.tiny_resnet50,
              "vgg": public.tiny_vgg16, "bert": public.bert_tokenizer}
    return {name: make(folder / name) for name, make in makers.items()}


@pytest.fixture
def steps(monkeypatch):
    """(copies of all weights, config) before each step that train.py makes."""
    states, real = [], train.unfreeze
    monkeypatch.setattr(train, "unfreeze", lambda model, config, epoch: (
        states.append({name: p.clone() for name, p in model.named_parameters()}), real(model, config, epoch))[1])
    return states


def json_lines(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def begins_as(state, part, model):
    """The part of the model that trains is the public model, number by number, as long as nothing is learned."""
    theirs = {name: p for name, p in model.named_parameters() if not name.startswith("head.")}
    assert theirs and all(torch.equal(state[f"{part}.{name}"][:len(p)] if p.dim() else state[f"{part}.{name}"], p)
                          for name, p in theirs.items())


def moved(before, after, part):
    return any(not torch.equal(p, after[name]) for name, p in before.items() if name.startswith(part) and "cross" not in name)


# ---- data in public layouts

def flickr30k(folder, n=20):
    """results.csv with bars, as Kaggle has it."""
    rows = [f"{k}.jpg| {j}| picture {k} , a dog \"{j}\" ." for k in range(n) for j in range(5)]
    public.write(folder, "results.csv", "\n".join(["image_name| comment_number| comment", *rows]) + "\n")
    (folder / "flickr30k_images").mkdir()
    for k in range(n):
        (folder / "flickr30k_images" / f"{k}.jpg").write_bytes(png(k))
    return ["--dataset", "flickr30k", "--data-dir", folder]


def coco(folder, url=None):
    """COCO's captions of 2014: 20 images of train, 4 of val; with the images, or (given a server's address) none."""
    words = "elephant umbrella mountain bicycle sandwich keyboard telescope volleyball".split()
    for subset, ids in (("train2014", range(20)), ("val2014", range(40, 44))):
        images = [{"id": k, "file_name": f"COCO_{subset}_{k:012d}.jpg", "coco_url": f"{url}/{k}"} for k in ids]
        notes = [{"id": 2 * k + j, "image_id": k, "caption": f"picture {k} {'ab'[j]} {words[(3 * k + j) % 8]}"}
                 for k in ids for j in (0, 1)]
        public.write(folder / "annotations", f"captions_{subset}.json", {"images": images, "annotations": notes})
        (folder / subset).mkdir()
        for image in [] if url else images:
            (folder / subset / image["file_name"]).write_bytes(png(image["id"]))
    return ["--dataset", "coco", "--data-dir", folder]


def vqav2(folder):
    """The official files of VQA v2: two questions about each of 8 images a split, answered by ten people."""
    for split, ids in (("train2014", range(8)), ("val2014", range(20, 28))):
        questions = [{"image_id": k, "question_id": 100 * k + j, "question": text}
                     for k in ids for j, text in enumerate(("What color is it?", "Is it red?"))]
        notes = [{**q, "multiple_choice_answer": a, "question_type": "what", "answer_type": kind, "answers": [{"answer": a}] * 10}
                 for q, (a, kind) in zip(questions, (("green", "other"), ("no", "yes/no")) * 8)]
        about = {"data_type": "mscoco", "data_subtype": split}
        public.write(folder, f"v2_OpenEnded_mscoco_{split}_questions.json", {**about, "questions": questions})
        public.write(folder, f"v2_mscoco_{split}_annotations.json", {**about, "annotations": notes})
        (folder / split).mkdir()
        for k in ids:
            (folder / split / f"COCO_{split}_{k:012d}.jpg").write_bytes(png(k))
    return ["--dataset", "vqav2", "--data-dir", folder]


# ---- the five systems

def test_1_vit_and_gpt2_in_lockstep_on_flickr30k(pub, tmp_path, steps, capsys):
    where, out = flickr30k(tmp_path / "d"), tmp_path / "out"
    run(data, *where, "--sheet", tmp_path / "s.png")
    run(train, *where, *STEPS, "--vision", pub["vit"], "--text", pub["gpt2"], "--wiring", "lockstep", "--epochs", "2",
        "--unfreeze-decoder", "0.5", "--unfreeze-vision", "1", "--clean", "lower", "--out-dir", out)
    printed = capsys.readouterr().out
    assert "validation loss" in printed and "perplexity" in printed and "BLEU-4" in printed and "CIDEr-D" in printed
    assert len(steps) == 8                                      # 16 images, 4 steps an epoch
    begins_as(steps[0], "text", load_gpt2(pub["gpt2"]))
    begins_as(steps[0], "vision", load_vit(pub["vit"]))
    assert not moved(steps[0], steps[2], "text") and moved(steps[2], steps[3], "text")
    assert not moved(steps[0], steps[4], "vision") and moved(steps[4], steps[5], "vision")
    model = load_run(out).model
    assert model.config.wiring == "lockstep" and len(model.connector["norms"]) == 1
    run(sample, "--image", out / "example.png", "--num-beams", "3", "--out-dir", out, "--attention", tmp_path / "a.png")
    assert "example.png: " in capsys.readouterr().out and (tmp_path / "a.png").exists()


@pytest.fixture
def streamed(host, tmp_path):
    """A data set of which only the captions are here; images 3, 8 and 41 are gone from its server."""
    host.pages.update({f"/{k}": send(png(k)) for k in (*range(20), *range(40, 44)) if k not in (3, 8, 41)})
    return [*coco(tmp_path / "data", host.url), "--stream", "--allow-private"]


def test_2_prefix_on_streamed_coco(streamed, pub, host, tmp_path, capfd, stop_at):
    """16 image tokens in the place of <image>, whose id comes behind --vocab-size others: 32,000 at full size."""
    sizes = ["--n-layer", "1", "--n-embd", "16", "--n-head", "2", "--image-size", "32", "--patch-size", "8", *STEPS]
    argv = [*streamed, *sizes, *TEXT, "--model", "prefix", "--epochs", "1", "--dropout", "0.2"]
    run(data, *streamed, "--sheet", tmp_path / "s.png")
    run(train, *argv, "--out-dir", tmp_path / "a")
    printed = capfd.readouterr()
    assert "images could not be fetched so far" in printed.out and "Traceback" not in printed.err + printed.out
    assert "3 held-out examples" in printed.out
    model = load_run(tmp_path / "a").model
    assert model.config.image_token == 320 and model.config.text.vocab_size == 321 and model.config.vision.n_patches == 16
    assert model.encode(torch.zeros(1, 3, 32, 32)).shape == (1, 16, 16)
    stop_at(2)                                                  # and what was seen is seen again by who resumes
    run(train, *argv, "--out-dir", tmp_path / "b")
    stop_at(None)
    run(train, "--resume", "--out-dir", tmp_path / "b")
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    run(train, *streamed, *STEPS, "--model", "prefix", "--vision", pub["vit"], "--text", pub["gpt2"], "--epochs", "0.5",
        "--out-dir", tmp_path / "c")
    tokens = load_gpt2(pub["gpt2"]).tokenizer.vocab_size
    assert load_run(tmp_path / "c").model.config.image_token == tokens
    for out in "ac":
        run(sample, "--image", f"{host.url}/7", "--prompt", "picture", "--out-dir", tmp_path / out)
    assert capfd.readouterr().out.count("/7: picture") == 2


def test_each_streamed_image_meets_its_own_caption(streamed):
    """Whatever cannot be fetched, the pairs that are left belong together; and other systems than Linux can hand the
    data set to the processes that fetch."""
    config = train.parse_config(train.config_class("caption"), [*map(str, streamed), *SMALL, *TEXT])
    setup, _ = train.build_setup(config, train.Device("cpu"))
    batches, seen = pickle.loads(pickle.dumps(Batches(setup.store, setup.rows, 10, 2, accum=2))), []
    for step in range(4):
        for batch in batches[step]:
            for img, rows in zip(batch.img, batch.targets.view(5, 2, -1)):
                texts = sorted(setup.prepared.tokenizer.decode(row[row >= 0].tolist()[:-1]) for row in rows)
                seen.append(round(img[0].float().mean().item() / 4))
                assert [text.split()[:3] for text in texts] == [["picture", f"{seen[-1]}", name] for name in "ab"]
    assert len(seen) == 40 and not {3, 8} & {*seen} and len({*seen}) > 12


def test_a_server_without_images_is_one_sentence(streamed, host, tmp_path, capsys):
    """Met in the loader's process, where an error once came with its traceback; and while evaluating."""
    host.pages.clear()
    for there, words in (((), "HTTP 404; try again"), (range(20), "no usable image to")):
        host.pages.update({f"/{k}": send(png(k)) for k in there})
        run(train, *streamed, *SMALL, *TEXT, "--out-dir", tmp_path / "r", code=2)
        one_sentence(capsys, words)


def test_3_vgg16_features_wordpiece_and_lstm(pub, tmp_path, capsys):
    where, out = ["--dataset", "flickr8k", "--data-dir", album(tmp_path / "d")], tmp_path / "out"
    run(data, *where, "--features", pub["vgg"], "--sheet", tmp_path / "s.png")
    features = tmp_path / "d" / "features-vgg.safetensors"
    assert f"python train.py --dataset flickr8k --data-dir={tmp_path}/d --features={features}" in capsys.readouterr().out
    run(train, *where, *STEPS, "--features", features, "--tokenizer", pub["bert"], "--n-hidden", "24", "--epochs", "1",
        "--n-embd", "16", "--accum", "1", "--eval-images", "2", "--out-dir", out)
    assert load_run(out).tokenizer.decode(load_run(out).tokenizer.encode_plain("a dog")) == "a dog"
    assert load_run(out).model.config.feat_dim == 16 and load_run(out).config["clean"] == "words"        # the preset's
    capsys.readouterr()
    drawn = []
    for seed in ("1", "1", "2"):
        run(sample, "--image", tmp_path / "d" / "Images" / "5.jpg", "--temperature", "1.5", "--seed", seed, "--out-dir",
            out, "--json")
        drawn += json_lines(capsys)
    assert drawn[0] == drawn[1] != drawn[2] and drawn[0]["caption"]


def test_4_resnet50_with_cached_texts_on_coco(pub, tmp_path, steps, capsys):
    """2048-1024-512 at full size: 128-64-16 here. Recall@K, then labels and search by the frozen tower itself."""
    where, out = coco(tmp_path / "d"), tmp_path / "out"
    run(data, *where, "--text-embeddings", pub["clip"], "--sheet", tmp_path / "s.png")
    texts = tmp_path / "d" / "text-embeddings-clip.safetensors"
    assert f"--text-embeddings={texts}" in capsys.readouterr().out
    run(train, *where, *STEPS, "--task", "clip", "--vision", pub["resnet"], "--head", "mlp", "--text-embeddings", texts,
        "--epochs", "1", "--out-dir", out)
    printed = capsys.readouterr().out
    for name in ("image to text R@1", "image to text R@5", "text to image R@10", "mean recall"):
        assert name in printed
    begins_as(steps[0], "vision", load_resnet50(pub["resnet"]))
    assert moved(steps[0], steps[1], "vision")
    model = load_run(out).model
    assert [tuple(p.shape) for p in model.image_head.parameters()] == [(64, 128), (64,), (16, 64), (16,)]
    assert model.text is None and (out / "similarity.png").exists()
    run(sample, "--image", out / "example.png", "--labels", "a dog", "a cat", "--out-dir", out, "--json")
    labels = json_lines(capsys)[0]["labels"]
    assert labels.keys() == {"a dog", "a cat"} and sum(labels.values()) == pytest.approx(1)
    argv = ["--search", "a dog", "--images", tmp_path / "d" / "val2014", "--sheet", tmp_path / "f.png", "--out-dir", out]
    run(sample, *argv, "--json")
    hits = json_lines(capsys)
    assert len(hits) == 4 and {*hits[0]} == {"image", "score"} and (tmp_path / "f.png").exists()
    tensors = load_safetensors(out / "model.safetensors")       # other weights: once a search failed until a file was removed
    save_safetensors({name: t.flip(0) if t.dim() == 1 else t.clone() for name, t in tensors.items()},
                     out / "model.safetensors", {"format": "pt"})
    run(sample, *argv, "--json")
    again = json_lines(capsys)
    assert {hit["image"] for hit in again} == {hit["image"] for hit in hits} and again != hits
    run(train, "--eval-only", "--out-dir", out)
    assert json.loads((out / "scores.json").read_text())["text to image R@1"] >= 0


def test_5_from_addresses_to_answers(pub, host, tmp_path, steps, capsys):
    """Images by URL, pseudo-labels by CLIP, a tower that learns them, captions, then questions; and dialogues as csv."""
    host.pages.update({f"/{k}": send(png(k)) for k in range(24) if k not in (2, 5)})
    host.pages["/5"] = send(b"<html>")
    rows = [(f"{host.url}/{k}", f'picture "{k}", a dog', "x") for k in range(24)]
    rows = table(tmp_path / "rows.csv", [("image_url", "capsfusion", "laion"), *rows])
    where, sheet = ["--dataset", "capsfusion", "--data-dir", tmp_path / "c"], ["--sheet", tmp_path / "s.png"]
    for _ in range(2):                                          # the second time nothing is fetched
        run(data, *where, *sheet, "--rows", rows, "--limit", "20", "--size", "32", "--allow-private")
        assert "20 images, 20 captions" in capsys.readouterr().out
    assert len({path for _, path, _ in host.seen}) == len(host.seen)
    (tmp_path / "l.json").write_text('{"kind": ["a dog", "a cat", "a boat"], "place": ["a beach", "a street"]}')
    run(data, *where, *sheet, "--label", tmp_path / "l.json", "--labeler", pub["clip"], "--margin", "0")
    command = capsys.readouterr().out.splitlines()[-1].partition("train.py ")[2].split()
    assert command == ["--task", "classify", "--dataset", "capsfusion", f"--data-dir={tmp_path}/c",
                       f"--labels={tmp_path}/c/labels.csv"]
    for tower, how in (("vit", ["--vision", pub["vit"]]), ("resnet", ["--vision", pub["resnet"]]), ("fresh", SMALL)):
        run(train, *how, *command, *STEPS, "--epochs", "0.5", "--out-dir", tmp_path / tower)
        assert {*load_run(tmp_path / tower).config["labels"]} == {"kind", "place"}
    begins_as(steps[2], "vision", load_resnet50(pub["resnet"]))
    public_text = ["--model", "prefix", "--text", pub["gpt2"], "--max-tokens", "30", "--epochs", "0.5", *STEPS]
    run(train, *where, *public_text, "--vision", tmp_path / "resnet", "--out-dir", tmp_path / "x", code=2)
    one_sentence(capsys, "a captioner takes a ViT")
    del steps[:]
    run(train, *where, *STEPS, "--model", "prefix", "--vision", tmp_path / "fresh", "--n-layer", "1", "--n-embd", "16",
        "--n-head", "2", *TEXT, "--epochs", "0.5", "--out-dir", tmp_path / "cap")
    begins_as(steps[0], "vision", load_run(tmp_path / "fresh").model.vision)
    questions = vqav2(tmp_path / "q")
    run(data, *questions, *sheet, "--export", tmp_path / "q.csv")
    assert (tmp_path / "q.csv").read_text().count("<image>") == 16
    del steps[:]
    argv = [*questions, *STEPS, "--task", "vqa", "--init", tmp_path / "cap", "--max-tokens", "400", "--turns", "1"]
    run(train, *argv, "--epochs", "1", "--eval-images", "2", "--test-images", "2", "--out-dir", tmp_path / "vqa")
    begins_as(steps[0], "text", load_run(tmp_path / "cap").model.text)
    assert {"val accuracy", "test accuracy"} <= {*load_run(tmp_path / "vqa").config["scores"]}
    run(train, "--eval-only", "--out-dir", tmp_path / "vqa", "--split", "val")
    assert {"blank accuracy", "shuffled accuracy", "accuracy"} <= {*json.loads((tmp_path / "vqa" / "scores.json").read_text())}
    results = json.loads((tmp_path / "vqa" / "results.json").read_text())
    assert results and all({*row} == {"question_id", "answer"} for row in results)
    capsys.readouterr()
    run(sample, "--image", tmp_path / "vqa" / "example.png", "--prompt", "Is it red?", "What is it?", "--out-dir",
        tmp_path / "vqa", "--json")
    assert [row["question"] for row in json_lines(capsys)] == ["Is it red?", "What is it?"]


# ---- every pair of task and towers

TASKS = {"cross": ["--model", "cross"], "prefix": ["--model", "prefix"], "lstm": ["--model", "lstm"], "vqa": ["--task", "vqa",
         "--max-tokens", "200"], "clip": ["--task", "clip"], "classify": ["--task", "classify"]}


@pytest.fixture(scope="module")
def encoded(pub, tmp_path_factory):
    """Photographs and drawn scenes with their features by VGG-16, the scenes also with their captions' by CLIP."""
    folder = tmp_path_factory.mktemp("encoded")
    for where in (from_folder(album(folder / "photos")), ["--data-dir", folder / "scenes", "--n-scenes", "8"]):
        run(data, *where, "--features", pub["vgg"], "--text-embeddings", pub["clip"], "--sheet", folder / "s.png")
    return folder


def refusal(task, vision, text):
    """Why train.py will not have it, or None."""
    if vision == "features" and task in ("vqa", "classify") or text and task == "classify":
        return "unrecognized arguments"
    if vision == "resnet" and task not in ("clip", "classify"):
        return "a captioner takes a ViT"
    return "--model lstm has no GPT-2" if text == "public" and task == "lstm" else None


ABOVE = [("cross", "vit", "public"), ("prefix", None, None), ("prefix", "vit", "public"), ("lstm", "features", None),
         ("clip", "resnet", "embeddings"), ("classify", "vit", None), ("classify", "resnet", None)]    # the five systems
PAIRS = [pair for pair in itertools.product(TASKS, (None, "vit", "resnet", "features"), (None, "public", "embeddings"))
         if pair not in ABOVE and not (pair[2] and refusal(*pair[:2], None)) and (pair[2] != "embeddings" or pair[0] == "clip")]


@pytest.mark.parametrize("task, vision, text", PAIRS)
def test_every_pair_of_towers_trains_and_is_used_or_is_refused(pub, encoded, tmp_path, capsys, task, vision, text):
    words, out = refusal(task, vision, text), tmp_path / "out"
    argv = [*SMALL, "--n-scenes", "8", *TASKS[task], "--epochs", "1"]
    if vision:
        argv += ["--features", encoded / "scenes" / "features-vgg.safetensors"] if vision == "features" else ["--vision", pub[vision]]
    if text:
        argv += ["--text-embeddings", encoded / "scenes" / "text-embeddings-clip.safetensors"] if text == "embeddings" else \
            ["--text", pub["clip" if task == "clip" else "gpt2"]]
    run(train, *argv, "--out-dir", out, code=2 if words else 0)
    if words:
        assert not out.exists()
        return one_sentence(capsys, words)
    printed = capsys.readouterr().out
    assert "step 2/2" in printed and "test split: " in printed
    how = {"vqa": ["--prompt", "Is it red?"], "clip": ["--labels", "a dog", "a cat"]}.get(task, [])
    run(sample, "--image", out / "example.png", *how, "--out-dir", out, code=2 if task == "classify" else 0)
    if task == "classify":
        return one_sentence(capsys, "train.py --vision")
    assert f"{out}/example.png: " in capsys.readouterr().out


# ---- every preset

@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_runs(pub, encoded, tmp_path, capsys, name):
    """At tiny sizes, on a data set of its kind: what a preset sets fits its task, and works."""
    folder = encoded / "photos"
    argv = ["--preset", name, *SMALL, *from_folder(folder), "--out-dir", tmp_path / "out"]
    if name in ("vqa", "vqa-photos"):
        argv += ["--dataset", "shapes", "--n-scenes", "8"] if name == "vqa" else vqav2(tmp_path / "q")
    if name == "labels":
        labels = [(f"Images/{k}.jpg", "kind", "ab"[k % 2]) for k in range(20)]
        argv += ["--labels", table(tmp_path / "l.csv", [("image", "category", "label"), *labels])]
    if name == "public":
        argv += ["--vision", pub["vit"], "--text", pub["gpt2"]]
    if name in ("lstm", "decoder", "reward"):
        argv += ["--features", folder / "features-vgg.safetensors", *(["--n-hidden", "24"] if name != "decoder" else [])]
    if name == "reward":
        run(train, *argv, "--preset", "lstm", "--out-dir", tmp_path / "init")
        argv += ["--init", tmp_path / "init"]
    run(train, *argv)
    printed = capsys.readouterr().out
    assert "test split: " in printed and ("validation CIDEr-D" in printed) == (name == "reward")
    options = load_run(tmp_path / "out").config["options"]
    flags = {word[2:].replace("-", "_") for word in map(str, argv) if word.startswith("--")}
    assert all(options[key] == value for key, value in PRESETS[name].items() if key not in flags)
