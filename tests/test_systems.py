"""The five systems through the scripts, each as it was published but tiny: public checkpoints, data in public layouts.

Every test once used a ViT, and the ResNet branches behind it had become unreachable. So here each system runs in its
own configuration from the first command to the last; each pair of task and towers trains and is used, or is refused in
a sentence; and each preset runs. A picture's colour tells its number, as its captions do: mixed pairs would be seen.
"""
import itertools
import json
import shlex

import pytest
import torch

import data
import public
import sample
import train
from helpers import TEXT, album, from_folder, png, refused, run, table
from servers import send
from tinyvlm import layouts
from tinyvlm.pretrained import load_gpt2, load_resnet50, load_run, load_vit
from tinyvlm.presets import PRESETS, choose
from tinyvlm.weights import load_safetensors, save_safetensors

SIZES = ["--n-layer", "1", "--n-embd", "16", "--n-head", "2"]
STEPS = ["--batch-size", "4", "--eval-interval", "3", "--device", "cpu", "--log-interval", "1"]
SMALL = [*SIZES, *STEPS, "--image-size", "16", "--epochs", "0.5", "--eval-images", "3", "--test-images", "3"]


@pytest.fixture(scope="module")
def pub(tmp_path_factory):
    """Tiny public checkpoints by name."""
    folder = tmp_path_factory.mktemp("pub")
    makers = {"vit": public.tiny_vit, "gpt2": lambda folder: public.tiny_gpt2(folder, block_size=400), "clip":
              public.tiny_clip, "resnet": public.tiny_resnet50, "vgg": public.tiny_vgg16, "bert": public.bert_tokenizer}
    return {name: make(folder / name) for name, make in makers.items()}


def json_lines(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def begins_as(state, part, model):
    """A part of the model that trains is another model, number by number, before anything is learned."""
    theirs = {f"{part}.{name}": p for name, p in model.named_parameters() if not name.startswith("head.")}
    assert theirs and all(torch.equal(state[name][:len(p)], p) for name, p in theirs.items())


def moved(before, after, part):
    return any(not torch.equal(p, after[name]) for name, p in before.items() if name.startswith(part) and
               "cross" not in name)


def test_1_vit_and_gpt2_in_lockstep_on_flickr30k(pub, tmp_path, steps, capsys):
    where, out = public.flickr30k(tmp_path / "d", png), tmp_path / "out"
    run(data, *where, "--sheet", tmp_path / "s.png")
    run(train, *where, *STEPS, "--vision", pub["vit"], "--text", pub["gpt2"], "--wiring", "lockstep", "--epochs", "2",
        "--unfreeze-decoder", "0.5", "--unfreeze-vision", "1", "--clean", "lower", "--out-dir", out)
    printed = capsys.readouterr().out
    assert all(words in printed for words in ("validation loss", "perplexity", "BLEU-4", "CIDEr-D"))
    begins_as(steps[0], "text", load_gpt2(pub["gpt2"]))
    begins_as(steps[0], "vision", load_vit(pub["vit"]))
    assert len(steps) == 8                                      # 16 images, 4 steps an epoch
    assert not moved(steps[0], steps[2], "text") and moved(steps[2], steps[3], "text")
    assert not moved(steps[0], steps[4], "vision") and moved(steps[4], steps[5], "vision")
    model = load_run(out).model
    assert model.config.wiring == "lockstep" and len(model.connector["norms"]) == 1
    run(sample, "--image", out / "example.png", "--num-beams", "3", "--out-dir", out, "--attention", tmp_path / "a.png")
    assert "example.png: " in capsys.readouterr().out and (tmp_path / "a.png").exists()


@pytest.fixture
def streamed(host, tmp_path, monkeypatch):
    """A data set of which only the captions are here; images 3, 8 and 41 are gone from its server."""
    monkeypatch.setattr(layouts, "COCO", f"{host.url}/")
    host.pages.update({page(k): send(png(k)) for k in (*range(20), *range(40, 44)) if k not in (3, 8, 41)})
    return [*public.coco(tmp_path / "data"), "--stream", "--allow-private"]


def page(k):
    subset = "train2014" if k < 20 else "val2014"
    return f"/{subset}/COCO_{subset}_{k:012d}.jpg"


def test_2_prefix_on_streamed_coco(streamed, pub, host, tmp_path, capfd, stop_at):
    """16 image tokens in the place of <image>, whose id comes behind --vocab-size others: 32,000 at full size."""
    argv = [*streamed, *SIZES, *STEPS, *TEXT, *"--model prefix --image-size 32 --patch-size 8 --dropout 0.2".split()]
    argv += ["--epochs", "1"]
    run(data, *streamed, "--sheet", tmp_path / "s.png")
    run(train, *argv, "--out-dir", tmp_path / "a")
    out, err = capfd.readouterr()
    assert "images could not be fetched so far" in out and "3 held-out examples" in out and "Traceback" not in out + err
    model = load_run(tmp_path / "a").model
    assert model.config.image_token == 320 and model.config.text.vocab_size == 321
    assert model.encode(torch.zeros(1, 3, 32, 32)).shape == (1, 16, 16)
    stop_at(2)                                                  # what was seen is seen again by who resumes
    run(train, *argv, "--out-dir", tmp_path / "b")
    stop_at(None)
    run(train, "--resume", "--out-dir", tmp_path / "b")
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    run(train, *streamed, *STEPS, "--model", "prefix", "--vision", pub["vit"], "--text", pub["gpt2"], "--epochs", "0.5",
        "--out-dir", tmp_path / "c")
    assert load_run(tmp_path / "c").model.config.image_token == load_gpt2(pub["gpt2"]).tokenizer.vocab_size
    for out in "ac":
        run(sample, "--image", host.url + page(7), "--prompt", "picture", "--out-dir", tmp_path / out)
    assert capfd.readouterr().out.count(f"{page(7)}: picture") == 2


def test_a_server_without_images_is_one_sentence(streamed, host, tmp_path, capsys):
    """Met in the thread that makes steps ahead; and while evaluating."""
    host.pages.clear()
    for there, words in (((), "HTTP 404; try again"), (range(20), "no usable image to evaluate with")):
        host.pages.update({page(k): send(png(k)) for k in there})
        refused(capsys, words, train, *streamed, *SMALL, *TEXT, "--out-dir", tmp_path / "r")


def test_3_vgg16_features_wordpiece_and_lstm(pub, tmp_path, capsys):
    where, out = ["--dataset", "flickr8k", "--data-dir", album(tmp_path / "d")], tmp_path / "out"
    run(data, *where, "--features", pub["vgg"], "--sheet", tmp_path / "s.png")
    features = tmp_path / "d" / "features-vgg.safetensors"
    assert f"train.py --dataset flickr8k --data-dir={tmp_path}/d --features={features}" in capsys.readouterr().out
    run(train, *where, *STEPS, "--features", features, "--tokenizer", pub["bert"], "--n-hidden", "24", "--epochs", "1",
        "--n-embd", "16", "--eval-images", "2", "--out-dir", out)
    made = load_run(out)
    assert made.tokenizer.decode(made.tokenizer.encode_plain("a dog")) == "a dog"
    assert made.model.config.feat_dim == 16 and made.config["clean"] == "words"   # the preset's
    capsys.readouterr()
    for seed in ("1", "1", "2"):
        run(sample, "--image", tmp_path / "d" / "Images" / "5.jpg", "--temperature", "1.5", "--seed", seed, "--out-dir",
            out, "--json")
    one, same, other = json_lines(capsys)
    assert one == same != other and one["caption"]


def test_4_resnet50_with_cached_texts_on_coco(pub, tmp_path, steps, capsys):
    """2048-1024-512 at full size: 128-64-16 here. Recall@K, then labels and search by the frozen tower itself."""
    where, out = public.coco(tmp_path / "d", png), tmp_path / "out"
    run(data, *where, "--text-embeddings", pub["clip"], "--sheet", tmp_path / "s.png")
    texts = tmp_path / "d" / "text-embeddings-clip.safetensors"
    assert f"--text-embeddings={texts}" in capsys.readouterr().out
    run(train, *where, *STEPS, "--task", "clip", "--vision", pub["resnet"], "--head", "mlp", "--text-embeddings", texts,
        "--epochs", "1", "--out-dir", out)
    printed = capsys.readouterr().out
    assert all(f"{way} R@{k}" in printed for way in ("image to text", "text to image") for k in (1, 5, 10))
    begins_as(steps[0], "vision", load_resnet50(pub["resnet"]))
    assert moved(steps[0], steps[1], "vision") and (out / "similarity.png").exists()
    model = load_run(out).model
    assert [tuple(p.shape) for p in model.image_head.parameters()] == [(64, 128), (64,), (16, 64), (16,)]
    run(sample, "--image", out / "example.png", "--labels", "a dog", "a cat", "--out-dir", out, "--json")
    labels = json_lines(capsys)[0]["labels"]
    assert labels.keys() == {"a dog", "a cat"} and sum(labels.values()) == pytest.approx(1)
    argv = ["--search", "dog", "--images", where[-1] / "val2014", "--sheet", out / "f.png", "--out-dir", out, "--json"]
    run(sample, *argv)
    tensors = load_safetensors(out / "model.safetensors")       # other weights: a search failed until a file was gone
    save_safetensors({name: t.flip(0) if t.dim() == 1 else t.clone() for name, t in tensors.items()},
                     out / "model.safetensors", {"format": "pt"})
    run(sample, *argv)
    hits = json_lines(capsys)
    assert len(hits) == 8 and {*hits[0]} == {"image", "score"} and (out / "f.png").exists()
    assert {hit["image"] for hit in hits[:4]} == {hit["image"] for hit in hits[4:]} and hits[:4] != hits[4:]
    run(train, "--eval-only", "--out-dir", out)
    assert json.loads((out / "scores.json").read_text())["text to image R@1"] >= 0


def test_5_from_addresses_to_answers(pub, host, tmp_path, steps, capsys):
    """Images by URL, pseudo-labels by CLIP, a tower that learns them, captions, questions; and dialogues as csv."""
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
    assert command[:4] == ["--task", "classify", "--dataset", "capsfusion"]
    for tower, how in (("vit", ["--vision", pub["vit"]]), ("resnet", ["--vision", pub["resnet"]]), ("own", SMALL)):
        run(train, *how, *command, *STEPS, "--epochs", "0.5", "--out-dir", tmp_path / tower)
        assert load_run(tmp_path / tower).config["labels"] == {"place": ["a beach", "a street"]}     # one kind for all
    begins_as(steps[2], "vision", load_resnet50(pub["resnet"]))
    argv = [*where, *STEPS, *SIZES, *TEXT, "--model", "prefix", "--epochs", "0.5"]
    refused(capsys, "a captioner takes a ViT", train, *argv, "--vision", tmp_path / "resnet")
    run(train, *argv, "--vision", tmp_path / "own", "--out-dir", tmp_path / "captions")
    begins_as(steps[6], "vision", load_run(tmp_path / "own").model.vision)
    questions, out = public.vqav2(tmp_path / "q", png), tmp_path / "vqa"
    run(data, *questions, *sheet, "--export", tmp_path / "q.csv")
    assert (tmp_path / "q.csv").read_text().count("<image>") == 16
    run(train, *questions, *STEPS, *"--task vqa --max-tokens 400 --turns 1 --epochs 1 --test-images 2".split(),
        "--init", tmp_path / "captions", "--out-dir", out)
    begins_as(steps[8], "text", load_run(tmp_path / "captions").model.text)
    assert {"val accuracy", "test accuracy"} <= {*load_run(out).config["scores"]}
    run(train, "--eval-only", "--out-dir", out, "--split", "val")
    assert {"blank accuracy", "shuffled accuracy", "accuracy"} <= {*json.loads((out / "scores.json").read_text())}
    assert {*json.loads((out / "results.json").read_text())[0]} == {"question_id", "answer"}
    secret = [{"image_id": 31, "question_id": k, "question": "What is it?"} for k in (7, 8)]
    (questions[-1] / "v2_OpenEnded_mscoco_test2015_questions.json").write_text(json.dumps({"questions": secret}))
    (questions[-1] / "COCO_test2015_000000000031.jpg").write_bytes(png(31))
    run(train, "--eval-only", "--out-dir", out)                 # it was refused: without answers there is no loss
    assert [row["question_id"] for row in json.loads((out / "results.json").read_text())] == [7, 8]
    assert {*json.loads((out / "scores.json").read_text())} == {"split", "num_beams", "length_penalty"}
    capsys.readouterr()
    run(sample, "--image", out / "example.png", "--prompt", "Is it red?", "What is it?", "--out-dir", out, "--json")
    assert [row["question"] for row in json_lines(capsys)] == ["Is it red?", "What is it?"]


TASKS = {"cross": ["--model", "cross"], "prefix": ["--model", "prefix"], "lstm": ["--model", "lstm"], "clip": ["--task",
         "clip"], "vqa": ["--task", "vqa", "--max-tokens", "200"], "classify": ["--task", "classify"]}


@pytest.fixture(scope="module")
def encoded(pub, tmp_path_factory):
    """Photographs and drawn scenes with their features by VGG-16, and with their captions' by CLIP."""
    folder = tmp_path_factory.mktemp("encoded")
    for where in (from_folder(album(folder / "photos")), ["--data-dir", folder / "scenes", "--n-scenes", "30"]):
        run(data, *where, "--features", pub["vgg"], "--text-embeddings", pub["clip"], "--sheet", folder / "s.png")
    return folder


def refusal(task, vision, text):
    """Why train.py will not have it, or None."""
    if vision == "features" and task in ("vqa", "classify") or text and task == "classify" or \
            text == "embeddings" and task != "clip":
        return "unrecognized arguments"
    if vision == "resnet" and task not in ("clip", "classify"):
        return "a captioner takes a ViT"
    return "--model lstm has no GPT-2" if text == "public" and task == "lstm" else None


# what the five systems have run is not run again
ABOVE = [("cross", "vit", "public"), ("prefix", None, None), ("prefix", "vit", "public"), ("lstm", "features", None),
         ("clip", "resnet", "embeddings"), ("classify", "vit", None)]
PAIRS = [pair for pair in itertools.product(TASKS, (None, "vit", "resnet", "features"), (None, "public", "embeddings"))
         if pair not in ABOVE and not (pair[2] and refusal(*pair[:2], None))]
PAIRS += [("clip", vision, "bag") for vision in (None, "vit", "resnet", "features")]


@pytest.mark.parametrize("task, vision, text", PAIRS)
def test_every_pair_of_towers_trains_and_is_used_or_is_refused(pub, encoded, tmp_path, capsys, task, vision, text):
    words, out, scenes = refusal(task, vision, text), tmp_path / "out", encoded / "scenes"
    argv = [*SMALL, "--n-scenes", "30", *TASKS[task], "--out-dir", out]
    argv += {None: [], "features": ["--features", scenes / "features-vgg.safetensors"]}.get(
        vision, ["--vision", pub.get(vision)])
    argv += {None: [], "embeddings": ["--text-embeddings", scenes / "text-embeddings-clip.safetensors"],
             "bag": ["--bag"], "public": ["--text", pub["clip" if task == "clip" else "gpt2"]]}[text]
    if words:
        refused(capsys, words, train, *argv)
        assert not out.exists()
        return
    run(train, *argv)
    printed = capsys.readouterr().out
    assert "step 4/4" in printed and "test split: " in printed
    how = {"vqa": ["--prompt", "Is it red?"], "clip": ["--labels", "a dog", "a cat"]}.get(task, [])
    argv = [sample, "--image", out / "example.png", *how, "--out-dir", out]
    if task == "classify":                                      # what it says to try next starts from this tower
        refused(capsys, "train.py --vision", *argv)
        *words, _ = shlex.split(printed.splitlines()[-1])[2:]
        return run(train, *SMALL, "--n-scenes", "30", "--vocab-size", "320", *words, tmp_path / "next")
    run(*argv)
    assert f"{out}/example.png: " in capsys.readouterr().out


def test_a_bag_of_words_is_borrowed_by_who_learned_from_its_embeddings(tmp_path, capsys):
    """It was read as the transformer that a model without --bag has, and ended in a traceback."""
    scenes = ["--n-scenes", "30", "--data-dir", tmp_path / "scenes"]
    argv = [*SMALL, *scenes, "--task", "clip", "--out-dir"]
    run(train, *argv, tmp_path / "bag", "--bag")
    run(data, *scenes, "--text-embeddings", tmp_path / "bag", "--sheet", tmp_path / "s.png")
    run(train, *argv, tmp_path / "out", "--text-embeddings", tmp_path / "scenes" / "text-embeddings-bag.safetensors")
    capsys.readouterr()
    run(sample, "--image", tmp_path / "out" / "example.png", "--labels", "small", "large", "--out-dir", tmp_path / "out",
        "--json")
    probabilities = json_lines(capsys)[0]["labels"]
    assert probabilities.keys() == {"small", "large"} and sum(probabilities.values()) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("flags, preset", [
    ("", None), ("--task vqa", "vqa"), ("--dataset flickr8k --device cpu", "laptop"), ("--text gpt2", None),
    ("--dataset coco --text gpt2", "public"), ("--dataset coco --features F", "lstm"), ("--task vqa --dataset vqav2",
     "vqa-photos"), ("--dataset coco --features F --model prefix", "decoder"), ("--task clip --dataset coco", "clip"),
    ("--task clip --dataset coco --features F", "clip-features"), ("--preset gpu", "gpu"),
    ("--task clip --dataset coco --features F --text-embeddings T", "clip"), ("--task clip", None)])
def test_a_command_line_brings_its_preset(flags, preset):
    """A bag of words, for one, only where no other text tower is named."""
    assert choose(flags.split())[1] == preset


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_runs(pub, encoded, tmp_path, capsys, name):
    """At tiny sizes, on a data set of its kind: what a preset sets fits its task, and works."""
    folder = encoded / "photos"
    where = {"vqa": ["--dataset", "shapes", "--n-scenes", "30"]}.get(name) or (
        public.vqav2(tmp_path / "q", png) if name == "vqa-photos" else from_folder(folder))
    argv = ["--preset", name, *SMALL, *where, "--out-dir", tmp_path / "out"]
    if name == "labels":
        labels = [(f"Images/{k}.jpg", "kind", "ab"[k % 2]) for k in range(20)]
        argv += ["--labels", table(tmp_path / "l.csv", [("image", "category", "label"), *labels])]
    if name == "public":
        argv += ["--vision", pub["vit"], "--text", pub["gpt2"]]
    if name in ("lstm", "decoder", "reward", "clip-features"):
        argv += ["--features", folder / "features-vgg.safetensors"]
    if name == "reward":
        run(train, *argv, "--preset", "lstm", "--out-dir", tmp_path / "init")
        argv += ["--init", tmp_path / "init"]
    run(train, *argv)
    printed = capsys.readouterr().out
    assert "test split: " in printed and ("validation CIDEr-D" in printed) == (name == "reward")
    options = load_run(tmp_path / "out").config["options"]
    flags = {word[2:].replace("-", "_") for word in map(str, argv) if word.startswith("--")}
    assert all(options[key] == value for key, value in PRESETS[name].items() if key not in flags)
