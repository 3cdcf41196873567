"""Ready-made features: the file and its refusals; and features that others made."""
import json

import pytest
import torch

import sample
import train
from conftest import REFERENCE
from helpers import TEXT, TINY, album, from_folder, refused, run
from public import tiny_clip
from tinyvlm.config import UserError
from tinyvlm.features import Encoder, FeatureFile, TextEmbeddings, short_names, write_features, write_text_embeddings
from tinyvlm.layouts import photos
from tinyvlm.shapes import Shapes
from tinyvlm.weights import load_safetensors, read_metadata, save_safetensors

VIT = str(REFERENCE / "vit")
NAMES = json.dumps([f"{k}.jpg" for k in range(20)])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A data set of twenty images and its features by a tiny ViT."""
    folder = album(tmp_path_factory.mktemp("made") / "album")
    write_features(VIT, photos("folder", folder), folder / "f.safetensors", say=str)
    return folder


def test_each_row_is_what_the_encoder_makes_of_its_image(made):
    """`features` (n, D) float16, `ids` a JSON list: the form that anyone can make."""
    dataset, encoder, path = photos("folder", made), Encoder(VIT), made / "f.safetensors"
    file, ids = FeatureFile(path, dataset, say=str), json.loads(read_metadata(path)["ids"])
    assert load_safetensors(path)["features"].dtype == torch.float16 and sorted(ids) == sorted(json.loads(NAMES))
    for i in (0, 7, 19):
        row = file.data[file.row[i]]
        torch.testing.assert_close(row.float(), encoder([dataset.open(i)])[0], atol=2e-3, rtol=0)
        assert torch.equal(row, load_safetensors(path)["features"][ids.index(f"{i}.jpg")])
    assert file.meta == {"encoder": VIT, "source": VIT} and file.recipe == encoder.recipe


def test_broken_images_are_left_out_and_counted(tmp_path):
    folder, notes, path = album(tmp_path / "a"), [], tmp_path / "f.safetensors"
    (folder / "Images" / "3.jpg").write_bytes(b"no image")
    dataset = photos("folder", folder)
    write_features(VIT, dataset, path, say=notes.append)
    assert "left out (1 of 1)" in notes[0] and "3.jpg" in notes[0] and notes[1] == f"{path} now holds 19 of 20"
    with pytest.raises(UserError, match="lacks 1 of the 20 images of folder"):
        FeatureFile(path, dataset)
    assert short_names(["a/0.png", "b/1.png"]) == ["0.png", "1.png"]
    assert short_names(["a/0.png", "b/0.png"]) == ["a/0.png", "b/0.png"]


@pytest.mark.parametrize("shape, metadata, words", [
    ((20, 4), {"ids": None}, "KeyError"), ((20, 4), {"ids": "{"}, "`ids`"), ((20, 4), {"ids": "7"}, "`ids`"),
    ((20, 4), {"ids": '["0.jpg"]'}, "1 names"), ((20,), {}, "of shape"), ((20, 0), {}, r"\(20, 0\)"),
    ((20, 4), {"recipe": "{}x"}, "no feature file"), ((1, 4), {"ids": '["x.jpg"]'}, "lacks 20 of the 20"),
    ((20, 4), {"dataset": "coco"}, "made of coco"), ("nan", {}, "not all finite"), ("name", {}, "'features'")])
def test_files_that_do_not_fit_are_refused(made, tmp_path, shape, metadata, words):
    tensor = torch.full((20, 4), torch.nan) if isinstance(shape, str) else torch.zeros(shape)
    metadata = {key: value for key, value in {"ids": NAMES, **metadata}.items() if value}
    save_safetensors({"feats" if shape == "name" else "features": tensor}, tmp_path / "f.safetensors", metadata)
    with pytest.raises(UserError, match=words) as error:
        FeatureFile(tmp_path / "f.safetensors", photos("folder", made))
    assert "\n" not in str(error.value) and "f.safetensors" in str(error.value)


def test_features_of_other_drawn_scenes_are_refused(tmp_path):
    """Scenes were called by their number alone: a file of --seed 1 was used for --seed 0 without a word."""
    path = tmp_path / "f.safetensors"
    write_features(VIT, Shapes(2, 4, seed=0), path, say=str)
    assert len(FeatureFile(path, Shapes(2, 4, seed=0), say=str).row) == 6
    for other in ((2, 4, 1), (3, 4, 0), (2, 5, 0)):             # in each, another picture would have the same number
        with pytest.raises(UserError, match="lacks . of the . images of shapes, such as scene-"):
            FeatureFile(path, Shapes(*other), say=str)


def test_embeddings_of_other_captions_are_refused(made, tmp_path):
    """They are known by their place alone: after an edit, each would stand for another sentence."""
    dataset, path = photos("folder", made), tmp_path / "t.safetensors"
    write_text_embeddings(str(tiny_clip(tmp_path / "clip")), dataset, path, say=str)
    ready = TextEmbeddings(path, dataset)
    assert ready.dim == 16 and len(ready.data) == 100 and ready.rows[1][0] == ([5], [0])
    torch.testing.assert_close(ready.data.float().norm(dim=1), torch.ones(100), atol=2e-3, rtol=0)
    dataset.captions[3] = dataset.captions[3][::-1]
    with pytest.raises(UserError, match="of other captions"):
        TextEmbeddings(path, dataset)


@pytest.mark.parametrize("shape, how", [
    ((20, 6), "--model lstm"), ((20, 9, 6), "--model lstm --soft-attention"), ((20, 9, 6), "--model cross"),
    ((20, 9, 6), "--model prefix --shuffle 3"), ((20, 6), "--task clip"), ((20, 9, 6), "--task clip")])
def test_a_run_on_somebody_elses_features(made, tmp_path, capsys, shape, how):
    """Features, or grids of them, of a network that is not at hand: as a sentence says, it takes no new pictures."""
    theirs, out = tmp_path / "their's.safetensors", tmp_path / "out"
    save_safetensors({"features": torch.randn(shape).half()}, theirs, {"ids": NAMES, "encoder": "their network"})
    argv = [train, *from_folder(made), *TINY, *TEXT, *"--epochs 1 --accum 1 --tokenizer bpe".split(), *how.split()]
    argv += ["--features", theirs, "--out-dir", out]
    if "clip" in how and len(shape) == 3:
        return refused(capsys, "--task clip takes one vector for each image", *argv)
    run(*argv)
    assert "python sample.py" not in capsys.readouterr().out.splitlines()[-1]
    argv = [sample, "--out-dir", out, *(["--labels", "a dog", "a cat"] if "clip" in how else [])]
    refused(capsys, "'their network', one that is not at hand", *argv, "--image", made / "Images" / "5.jpg")
