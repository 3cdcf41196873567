"""Ready-made features: the cache file, its refusals, and runs that see through it, from first command to last."""
import json

import pytest
import torch
from PIL import Image

import data
import sample
import train
from conftest import REFERENCE
from test_data import album, from_folder
from test_scripts import run
from tinyvlm.clip import CLIP
from tinyvlm.config import UserError
from tinyvlm.features import Encoder, FeatureStore, read_features, short_names, write_features
from tinyvlm.image import preprocess
from tinyvlm.layouts import photos
from tinyvlm.weights import load_safetensors, read_metadata, save_safetensors

VIT = str(REFERENCE / "vit")
SMALL = ["--n-layer", "1", "--n-embd", "32", "--n-head", "2", "--vocab-size", "320", "--captions-per-image", "2",
         "--batch-size", "8", "--epochs", "2", "--eval-interval", "2", "--log-interval", "1", "--eval-images", "4"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A data set of twenty images and its features by a tiny ViT."""
    folder = album(tmp_path_factory.mktemp("made") / "album")
    write_features(VIT, photos("folder", folder), folder / "f.safetensors", say=lambda text: None)
    return folder


def test_the_file_holds_what_the_encoder_says_of_each_image(made):
    """`features` (N, D) float16, `ids` a JSON list: the form anyone can make; and each row is its own image's."""
    dataset, tensors = photos("folder", made), load_safetensors(made / "f.safetensors")
    ids, encoder = json.loads(read_metadata(made / "f.safetensors")["ids"]), Encoder(VIT)
    assert tensors["features"].dtype == torch.float16 and len(ids) == len(tensors["features"]) == 20
    store = FeatureStore(made / "f.safetensors", dataset, say=lambda text: None)
    for i in (0, 7, 19):
        img = preprocess(dataset.open(i), encoder.recipe)[None]
        with torch.no_grad():
            assert torch.allclose(store.get([i]), encoder.model(img)[:, 0], atol=2e-3)        # float16
        assert torch.equal(store.get([i])[0], tensors["features"][ids.index(f"{i}.jpg")].float())
    assert store.feat_dim == tensors["features"].size(1)
    assert store.source == VIT and store.recipe == encoder.recipe and store.n_tokens == 1


@pytest.mark.parametrize("name, grid, dims", [("vit", True, 3), ("clip_gelu", False, 2), ("clip_gelu", True, 3),
                                              ("vit_gpt2", False, 2)])
def test_encoders_of_every_kind(made, name, grid, dims):
    """One vector an image, or a grid of them: of unit length from CLIP, without the class token in a grid."""
    dataset, encoder = photos("folder", made), Encoder(str(REFERENCE / name), grid)
    feats = encoder([dataset.open(i) for i in range(3)])
    assert feats.dim() == dims and len(feats) == 3 and feats.isfinite().all()
    if isinstance(encoder.model, CLIP) and not grid:
        assert torch.allclose(feats.norm(dim=1), torch.ones(3), atol=1e-5)
    if grid:
        assert feats.size(1) == encoder.eyes.config.n_patches                     # no class token among the places


def test_an_unfinished_file_is_continued_not_begun_again(made, tmp_path, monkeypatch):
    """Of twenty rows twelve are there: eight images are encoded, and the file is the one of an unbroken run."""
    dataset, path = photos("folder", made), tmp_path / "f.safetensors"
    write_features(VIT, dataset, path, say=lambda text: None)
    whole, about = load_safetensors(path)["features"].clone(), read_metadata(path)
    about["ids"] = json.dumps(json.loads(about["ids"])[:12])
    save_safetensors({"features": whole[:12]}, path, about)
    seen = []
    real = Encoder.__call__
    monkeypatch.setattr(Encoder, "__call__", lambda self, images: seen.extend(images) or real(self, images))
    write_features(VIT, dataset, path, batch_size=3, say=lambda text: None)
    assert len(seen) == 8 and torch.equal(load_safetensors(path)["features"], whole)
    write_features(VIT, dataset, path, say=lambda text: None)
    assert len(seen) == 8                                                         # nothing left to do


def test_broken_images_are_named_and_left_out(tmp_path):
    folder, said = album(tmp_path / "a"), []
    (folder / "Images" / "3.jpg").write_bytes(b"no image")
    dataset = photos("folder", folder)
    write_features(VIT, dataset, tmp_path / "f.safetensors", say=said.append)
    assert "3.jpg" in said[0] and "1 left out" in said[-1]
    assert len(read_features(tmp_path / "f.safetensors")) == 19
    with pytest.raises(UserError, match="no features of 1 of the 20 images"):
        FeatureStore(tmp_path / "f.safetensors", dataset)


@pytest.mark.parametrize("tensors, metadata, words", [
    ({"features": torch.zeros(2, 4)}, {}, "needs a tensor `features` and, in its metadata, `ids`"),
    ({"feats": torch.zeros(2, 4)}, {"ids": '["a", "b"]'}, "needs a tensor `features`"),
    ({"features": torch.zeros(2, 4)}, {"ids": '["0.jpg"]'}, "a name for each"),
    ({"features": torch.zeros(2)}, {"ids": '["0.jpg", "1.jpg"]'}, "should hold features of shape"),
    ({"features": torch.zeros(2, 0)}, {"ids": '["0.jpg", "1.jpg"]'}, r"features are \(2, 0\)"),
    ({"features": torch.zeros(1, 4)}, {"ids": '["0.jpg"]', "marks": "7"}, "`marks` cannot be read"),
    ({"features": torch.zeros(1, 4)}, {"ids": "{"}, "image names as a JSON list"),
    ({"features": torch.zeros(1, 4)}, {"ids": '["other.jpg"]'}, "belongs to another data set"),
    ({"features": torch.zeros(20, 4)}, {"ids": json.dumps([f"{k}.jpg" for k in range(20)]), "dataset": "coco"},
     "was made for coco")])
def test_files_that_do_not_fit_are_refused(made, tmp_path, tensors, metadata, words):
    save_safetensors(tensors, tmp_path / "f.safetensors", metadata)
    with pytest.raises(UserError, match=words):
        FeatureStore(tmp_path / "f.safetensors", photos("folder", made))


def test_a_file_of_another_folder_with_the_same_names_is_refused(made, tmp_path):
    """Every folder is called "folder", and cameras count from 1: the features of other photographs once passed."""
    other = album(tmp_path / "other")
    for picture in (other / "Images").iterdir():
        Image.new("RGB", (90, 90), "teal").save(picture)
    with pytest.raises(UserError, match="no features of 20 of the 20 images"):
        FeatureStore(made / "f.safetensors", photos("folder", other))
    with pytest.raises(UserError, match="other images of the same names, such as 0.jpg"):
        write_features(VIT, photos("folder", other), made / "f.safetensors")
    made.rename(tmp_path / "moved")                             # the same photographs elsewhere, and with other words
    captions = tmp_path / "moved" / "captions.txt"
    captions.write_text(captions.read_text().replace("wau", "miau"))
    FeatureStore(tmp_path / "moved" / "f.safetensors", photos("folder", tmp_path / "moved"))
    (tmp_path / "moved").rename(made)


def test_features_of_drawn_scenes_belong_to_their_seed(tmp_path):
    write_features(VIT, data.Shapes(n_scenes=20), tmp_path / "f.safetensors")
    FeatureStore(tmp_path / "f.safetensors", data.Shapes(n_scenes=20))
    with pytest.raises(UserError, match="made of other images of these names: remove it"):
        FeatureStore(tmp_path / "f.safetensors", data.Shapes(n_scenes=20, seed=1))


def test_a_number_that_is_none_is_told_with_its_image(tmp_path):
    dataset = photos("folder", album(tmp_path / "a"))
    feats = torch.zeros(20, 4).index_put((torch.tensor(3),), torch.tensor(torch.nan))
    save_safetensors({"features": feats}, tmp_path / "f.safetensors",
                     {"ids": json.dumps([str(name) for name in dataset.names])})
    store = FeatureStore(tmp_path / "f.safetensors", dataset)
    assert store.get([0, 1, 2]).shape == (3, 4)
    with pytest.raises(UserError, match=f"holds inf or nan for {dataset.names[3]}"):
        store.get([2, 3])


def test_another_encoder_does_not_continue_the_file(made):
    with pytest.raises(UserError, match="made with another encoder"):
        write_features(str(REFERENCE / "vit_pooler"), photos("folder", made), made / "f.safetensors")


def test_names_without_folders_only_where_they_are_unique():
    assert short_names(["a/0.png", "b/1.png"]) == ["0.png", "1.png"]
    assert short_names(["a/0.png", "b/0.png"]) == ["a/0.png", "b/0.png"]


@pytest.mark.parametrize("how", [["--model", "lstm", "--tokenizer", "words", "--min-count", "1", "--clean", "words"],
                                 ["--model", "lstm", "--soft-attention", "--n-hidden", "16", "--no-tied"],
                                 ["--model", "cross"], ["--model", "prefix"]])
def test_from_features_to_captions_and_scores(made, tmp_path, capsys, how):
    """The whole path: encode, train, sample a new image through the same encoder, score, and a row of the table."""
    out, where = tmp_path / "out", from_folder(made)
    run(data, *where, "--features", VIT, "--output", tmp_path / "f.safetensors", "--sheet", tmp_path / "s.png")
    run(train, *where, *SMALL, *how, "--features", tmp_path / "f.safetensors", "--out-dir", out)
    run(sample, "--image", made / "Images" / "5.jpg", "--out-dir", out, "--num-beams", "2")
    assert "5.jpg: " in capsys.readouterr().out
    table = ["--table", tmp_path / "table.csv"]
    for beams in (1, 2, 2):
        run(train, "--eval-only", "--out-dir", out, "--num-beams", beams, *table)
    scores = json.loads((out / "scores.json").read_text())
    assert scores["images"] == 2 and {"BLEU-4", "CIDEr-D", "distinct", "perplexity", "shuffled"} <= scores.keys()
    rows = [json.loads(line) for line in (out / "captions.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and all(len(row["references"]) == 5 and row["image"].endswith(".jpg") for row in rows)
    assert len((tmp_path / "table.csv").read_text().splitlines()) == 3            # a header, and a row per search


def test_own_captions_are_rewarded(made, tmp_path, capsys):
    """--reinforce goes on from a run; without one, or together with what it cannot use, it is refused."""
    argv = [*from_folder(made), *SMALL, "--model", "lstm", "--features", made / "f.safetensors"]
    run(train, *argv, "--out-dir", tmp_path / "a")
    own = [*argv, "--captions-per-image", "1", "--reinforce", "3"]
    run(train, *own, "--init", tmp_path / "a", "--out-dir", tmp_path / "b")
    assert "validation CIDEr-D" in capsys.readouterr().out
    a, b = (load_safetensors(tmp_path / name / "model.safetensors") for name in "ab")
    assert a.keys() == b.keys() and any(not torch.equal(a[name], b[name]) for name in a)
    run(train, *own, "--out-dir", tmp_path / "c", code=2)
    assert "--reinforce needs" in capsys.readouterr().err


def test_a_run_on_somebody_elses_features(made, tmp_path, capsys):
    """Features of a network we do not have: images are looked up by name, and the sentence says how."""
    ids = [f"{k}.jpg" for k in range(20)]
    save_safetensors({"features": torch.randn(20, 6).half()}, tmp_path / "f.safetensors",
                     {"ids": json.dumps(ids), "encoder": "their network"})
    out, theirs = tmp_path / "out", ["--features", tmp_path / "f.safetensors"]
    run(train, *from_folder(made), *SMALL, "--model", "lstm", *theirs, "--out-dir", out)
    printed = capsys.readouterr().out
    assert f"--features {tmp_path}/f.safetensors" in printed.splitlines()[-1]     # the command to run next
    run(sample, "--image", "5.jpg", "--out-dir", out, *theirs)
    assert "5.jpg: " in capsys.readouterr().out
    run(sample, "--image", made / "Images" / "5.jpg", "--out-dir", out, code=2)
    assert "features of 'their network', a network that is not at hand" in capsys.readouterr().err
    run(sample, "--image", "nobody.jpg", "--out-dir", out, *theirs, code=2)
    assert "holds nothing for nobody.jpg" in capsys.readouterr().err


@pytest.mark.parametrize("argv, words", [
    (["--features", "none.safetensors"], "there is no feature file none.safetensors"),
    (["--features", "x", "--vision", "y"], "drop --vision or --features"),
    (["--model", "lstm", "--text", "gpt2"], "--model lstm has none")])
def test_options_that_do_not_go_together(made, tmp_path, capsys, argv, words):
    run(train, *from_folder(made), *argv, "--out-dir", tmp_path / "out", code=2)
    assert words in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_eval_only_needs_a_trained_run(tmp_path, capsys):
    run(train, "--eval-only", "--out-dir", tmp_path / "none", code=2)
    assert "holds no trained model" in capsys.readouterr().err
