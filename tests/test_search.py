"""tinyvlm.search: labels in words, and a folder of photographs that is embedded once, whatever happens to it."""
import os

import pytest
import torch
from PIL import Image

import tinyvlm.search
from tinyvlm.clip import CLIP, CLIPConfig, text_config, vision_config
from tinyvlm.config import UserError
from tinyvlm.image import Recipe, load_image, preprocess
from tinyvlm.search import (TEMPLATES, classify, embed_folder, fill, fingerprint, label_embeddings, search,
                            similarity_picture, text_embeddings, text_rows)
from tinyvlm.tokenizer import BPETokenizer
from tinyvlm.weights import load_safetensors, save_safetensors

RECIPE = Recipe(size=16, mode="squash")
TOKENIZER = BPETokenizer.train(["a photo of a dog", "two boats"], 300)
END = TOKENIZER.token_to_id("<|endoftext|>")


def tiny(**more):
    torch.manual_seed(0)
    vision = vision_config(image_size=16, patch_size=8, n_layer=1, n_head=2, n_embd=12, class_token=False)
    text = text_config(vocab_size=TOKENIZER.vocab_size, block_size=12, n_layer=1, n_head=2, n_embd=16)
    model = CLIP(CLIPConfig(**{"vision": vision, "text": text, "n_joint": 8, "end_token": END, **more})).eval()
    if model.vision:
        model.vision.patch.weight.data.mul_(20)                 # untrained, it would hardly tell one image from another
    return model


# ----- labels -----

@pytest.mark.parametrize("template, label, sentence", [
    ("a photo of a {}.", "dog", "a photo of a dog."), ("a photo of a {}.", " the sea ", "a photo of the sea."),
    ("a {} and an {}", "two dogs", "two dogs and two dogs"), ("extra {}", "a dog", "extra a dog"),
    ("a {}", "theatre", "a theatre"), ("a {}", "{}", "a {}")])
def test_labels_with_an_article_get_no_second_one(template, label, sentence):
    assert fill(template, label) == sentence


def test_every_template_takes_a_label():
    assert len({fill(template, "a dog") for template in TEMPLATES}) == len(TEMPLATES)


def test_text_rows_end_where_the_model_reads():
    """Our tokenizer frames nothing: the end token is added, once, also to what was cut; special tokens are words."""
    model = tiny()
    rows = text_rows(TOKENIZER, ["dog", "a photo of a dog " * 9, "<|endoftext|>"], model.config)
    assert rows.shape == (3, 12) and rows[1, -1] == END and (rows == END).sum(dim=1).tolist() == [1, 1, 1]
    assert rows[0].tolist()[:rows[0].tolist().index(END)] == TOKENIZER.encode("dog") and rows[0, -1] == 0
    model.config.end_token = None                               # read at the largest id, so that one must be the end
    rows = text_rows(TOKENIZER, ["dog", "two boats"], model.config)
    assert rows.amax(dim=1).tolist() == [TOKENIZER.vocab_size - 1] * 2


def test_label_embeddings_are_means_of_sentences():
    model = tiny()
    emb = label_embeddings(model, TOKENIZER, ["dog", "two boats"], ["a {}.", "{} here"])
    each = text_embeddings(model, TOKENIZER, ["two boats.", "two boats here"], batch_size=1)
    torch.testing.assert_close(emb[1], torch.nn.functional.normalize(each.mean(dim=0), dim=-1))
    torch.testing.assert_close(label_embeddings(model, TOKENIZER, ["DOG"], ["{}"], clean=str.lower),
                               text_embeddings(model, TOKENIZER, ["dog"]))


def test_classify_and_search_by_arithmetic():
    """Cosines 0.8 and 0.6 at a factor of 10: odds of e^2."""
    emb = torch.eye(3)[:2]
    probs = classify(torch.tensor([[0.8, 0.6, 0.0]]), emb, torch.tensor(10.0).log())
    assert probs[0].tolist() == pytest.approx([0.880797, 0.119203], abs=1e-5)
    images = torch.tensor([[0.0, 1], [1, 0], [0.6, 0.8]])
    scores, best = search(images, torch.tensor([1.0, 0]), k=2)
    assert best.tolist() == [1, 2] and scores.tolist() == pytest.approx([1, 0.6])
    assert search(images, torch.eye(2), k=10).indices.tolist() == [[1, 2, 0], [0, 2, 1]]


@pytest.mark.parametrize("call, words", [
    (lambda: label_embeddings(tiny(), TOKENIZER, []), "at least one label or sentence"),
    (lambda: label_embeddings(tiny(), TOKENIZER, ["a", " "]), "a label a word"),
    (lambda: label_embeddings(tiny(), TOKENIZER, ["a"], ["a photo"]), "template 'a photo'"),
    (lambda: text_embeddings(tiny(), TOKENIZER, []), "or sentence"),
    (lambda: label_embeddings(tiny(), TOKENIZER, ["a"], []), "at least one label or sentence"),
    (lambda: text_embeddings(tiny(text=None), TOKENIZER, ["a"]), "cannot read"),
    (lambda: embed_folder(tiny(vision=None, feat_dim=4), RECIPE, ".", "cache"), "cannot see")])
def test_what_cannot_be_embedded_is_a_sentence(call, words):
    with pytest.raises(UserError, match=words):
        call()


# ----- a folder -----

@pytest.fixture
def album(tmp_path, monkeypatch):
    """Six images, one of them below, one broken, one hidden; `opened` collects the names of those that are decoded."""
    folder = tmp_path / "album"
    (folder / "below").mkdir(parents=True)
    for k, name in enumerate(("a.png", "b.png", "c.JPG", "d.png", "below/e.png", ".hidden.png")):
        Image.new("RGB", (20, 20), (40 * k, 90, 250 - 40 * k)).save(folder / name, format="PNG")
    (folder / "broken.jpg").write_bytes(b"not an image")
    (folder / "notes.txt").write_text("no image")
    opened = []

    def spy(path):
        opened.append(os.path.relpath(path, folder))
        return load_image(path)
    monkeypatch.setattr(tinyvlm.search, "load_image", spy)
    return folder, tmp_path / "cache.safetensors", opened


def test_a_folder_is_embedded_once(album):
    """The second time only the broken image is tried again; every row is its own image's."""
    folder, cache, opened = album
    model, said = tiny(), []
    names, emb = embed_folder(model, RECIPE, folder, cache, batch_size=2, say=said.append)
    assert names == ["a.png", "b.png", "below/e.png", "c.JPG", "d.png"]
    for name, row in zip(names, emb):                           # each row belongs to its name; float16 on disk
        want = model.encode_image(preprocess(load_image(folder / name), RECIPE)[None])[0]
        torch.testing.assert_close(row, want, atol=1e-3, rtol=0)
    assert torch.pdist(emb).min() > 0.02, "the images must be told apart, or the check above says nothing"
    torch.testing.assert_close(emb.norm(dim=-1), torch.ones(5))
    assert "broken.jpg" in said[0] and said[1] == "1 of 6 images are broken and left out" and len(said) == 2
    assert load_safetensors(cache)["emb"].dtype == torch.float16
    opened.clear()
    before = cache.stat().st_mtime_ns
    again = embed_folder(model, RECIPE, folder, cache, say=said.append)
    assert opened == ["broken.jpg"] and again[0] == names and torch.equal(again[1], emb)
    assert cache.stat().st_mtime_ns == before, "nothing changed, so nothing is written"


def test_only_new_and_changed_images_are_opened_and_vanished_ones_go(album):
    folder, cache, opened = album
    model = tiny()
    (folder / "broken.jpg").unlink()
    names, emb = embed_folder(model, RECIPE, folder, cache)
    opened.clear()
    Image.new("RGB", (20, 20), "red").save(folder / "new.png")
    (folder / "a.png").unlink()
    Image.new("RGB", (20, 20), "white").save(folder / "b.png")
    os.utime(folder / "c.JPG", (1, 1))                          # the same bytes, another time: who knows
    later, new = embed_folder(model, RECIPE, folder, cache)
    assert sorted(opened) == ["b.png", "c.JPG", "new.png"]
    assert later == ["b.png", "below/e.png", "c.JPG", "d.png", "new.png"]
    rows = dict(zip(later, new))
    for name, row in zip(names, emb):
        if name != "a.png":
            assert torch.allclose(rows[name], row, atol=1e-3) == (name != "b.png"), name
    opened.clear()
    assert embed_folder(model, RECIPE, folder, cache)[0] == later and not opened
    (folder / "new.png").unlink()
    embed_folder(model, RECIPE, folder, cache)
    assert len(load_safetensors(cache)["emb"]) == 4, "a picture that only vanished leaves the cache too"


def test_a_stopped_call_goes_on(album, monkeypatch):
    """Killed in the fourth image, with a save after every second: two are kept, and the end is the same."""
    folder, cache, opened = album
    (folder / "broken.jpg").unlink()
    model = tiny()
    names, want = embed_folder(model, RECIPE, folder, folder / "whole.safetensors", batch_size=1)

    def kill(path, load=tinyvlm.search.load_image):
        if len(opened) == 3:
            raise KeyboardInterrupt
        return load(path)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        opened.clear()
        patch.setattr(tinyvlm.search, "load_image", kill)
        embed_folder(model, RECIPE, folder, cache, batch_size=1, save_every=2)
    assert len(load_safetensors(cache)["emb"]) == 2
    opened.clear()
    again, emb = embed_folder(model, RECIPE, folder, cache, batch_size=1, save_every=2)
    assert len(opened) == 3 and again == names and torch.equal(emb, want)


def test_a_cache_of_another_model_is_refused_or_rebuilt(album):
    """A search with mixed embeddings gives plausible nonsense. The model counts (head or tower), and the recipe; the
    text tower does not."""
    folder, cache, _ = album
    model, other, tuned = tiny(), tiny(), tiny()
    embed_folder(model, RECIPE, folder, cache)
    other.text_head.weight.data.mul_(2)
    other.logit_scale.data.add_(1)
    embed_folder(other, Recipe(size=16, mode="squash", mean=list(RECIPE.mean)), folder, cache)
    other.image_head.weight.data[-1, -1] += 1e-3
    tuned.vision.blocks[0].mlp.fc.weight.data.mul_(1.001)
    for stranger, recipe in ((other, RECIPE), (tuned, RECIPE), (model, Recipe(size=16))):
        with pytest.raises(UserError, match="another model"):
            embed_folder(stranger, recipe, folder, cache)
    emb = embed_folder(other, RECIPE, folder, cache, rebuild=True)[1]
    assert torch.equal(embed_folder(other, RECIPE, folder, cache)[1], emb)
    assert len({fingerprint(m, RECIPE) for m in (model, other, tuned)}) == 3


def test_a_damaged_cache_is_made_anew_and_said(album):
    folder, cache, opened = album
    (folder / "broken.jpg").unlink()
    names, emb = embed_folder(tiny(), RECIPE, folder, cache)
    whole, said = cache.read_bytes(), []
    cache.write_bytes(whole[:-20])
    again = embed_folder(tiny(), RECIPE, folder, cache, say=said.append)
    assert again[0] == names and torch.equal(again[1], emb) and cache.read_bytes() == whole
    assert len(said) == 1 and said[0].startswith(f"{cache} is damaged")


def test_folders_and_files_that_are_of_no_use(album, tmp_path):
    folder, cache, _ = album
    save_safetensors({"w": torch.ones(2)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="no cache of image embeddings"):
        embed_folder(tiny(), RECIPE, folder, tmp_path / "model.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no images"):
        embed_folder(tiny(), RECIPE, tmp_path / "empty", cache)
    (tmp_path / "empty" / "x.jpg").write_bytes(b"no")
    with pytest.raises(UserError, match="none of the 1 images"):
        embed_folder(tiny(), RECIPE, tmp_path / "empty", cache, say=lambda line: None)
    assert not cache.exists()


def test_similarity_picture_is_darker_where_more_similar():
    sim = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.8, 0.1], [0.0, 0.1, 0.7]])
    image = similarity_picture(sim, ["a dog", "a very long sentence " * 9, "x"], side=40)
    light = [[image.getpixel((201 + 40 * j, 25 + 40 * i))[0] for j in range(3)] for i in range(3)]   # cells' corners
    assert light[0][2] == light[2][0] == 255 and light[0][0] < light[1][1] < light[2][2] < light[1][0] < light[0][1]
    assert light[0][1] == light[1][2] == light[2][1]
    assert similarity_picture(torch.ones(1, 1), ["one"]).size == (244, 68)        # nothing to compare: no division by 0
