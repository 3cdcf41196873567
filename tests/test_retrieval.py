"""--task clip beyond its model: labels in words, and a folder of photographs that is embedded once."""
import os
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import train
from helpers import TEXT, TINY, losses, refused, run
from public import tiny_clip
from tinyvlm import retrieval
from tinyvlm.captions import clean_caption
from tinyvlm.clip import CLIP, CLIPConfig
from tinyvlm.config import UserError
from tinyvlm.features import text_embeddings, text_rows
from tinyvlm.gpt import GPTConfig
from tinyvlm.image import Recipe, load_image, preprocess
from tinyvlm.pretrained import load_clip
from tinyvlm.retrieval import TEMPLATES, classify, embed_folder, fill, label_embeddings, search
from tinyvlm.tokenizer import BPETokenizer, WordTokenizer
from tinyvlm.use import check_learned
from tinyvlm.vit import ViTConfig

RECIPE = Recipe(size=16, mode="squash")
TOKENIZER = BPETokenizer.train(["a photo of a dog", "two boats"], 300)
END = TOKENIZER.token_to_id("<|endoftext|>")
CLIP_RUN = [*TINY, *TEXT, "--task", "clip", "--n-joint", "16", "--stem", "patch", "--dropout", "0", "--crop", "0"]


def tiny(**more):
    torch.manual_seed(0)
    vision = ViTConfig(image_size=16, patch_size=8, n_layer=1, n_head=2, n_embd=12, class_token=False)
    text = GPTConfig(vocab_size=TOKENIZER.vocab_size, block_size=12, n_layer=1, n_head=2, n_embd=16)
    model = CLIP(CLIPConfig(**{"vision": vision, "text": text, "n_joint": 8, "end_token": END, **more})).eval()
    if model.vision:
        model.vision.patch.weight.data.mul_(20)                 # untrained, it would hardly tell one image from another
    return model


@pytest.mark.parametrize("template, label, sentence", [
    ("a photo of a {}.", "dog", "a photo of a dog."), ("a photo of a {}.", " the sea ", "a photo of the sea."),
    ("a {} and an {}", "two dogs", "two dogs and two dogs"), ("a {}", "theatre", "a theatre"), ("a {}", "{}", "a {}")])
def test_labels_with_an_article_get_no_second_one(template, label, sentence):
    assert fill(template, label) == sentence


def test_text_rows_end_where_the_model_reads():
    """Our tokenizer frames nothing: the end is added, once, also to what was cut; what spells it stays text."""
    model = tiny()
    rows = text_rows(TOKENIZER, ["dog", "a photo of a dog " * 9, "<|endoftext|>"], model.config)
    assert rows.shape == (3, 12) and rows[1, -1] == END and (rows == END).sum(dim=1).tolist() == [1, 1, 1]
    assert rows[0].tolist() == [*TOKENIZER.encode("dog"), END] + [0] * (11 - len(TOKENIZER.encode("dog")))
    model.config.end_token = None                               # read at the largest id, so that one must be the end
    assert text_rows(TOKENIZER, ["dog", "two"], model.config).amax(dim=1).tolist() == [TOKENIZER.vocab_size - 1] * 2


def test_label_embeddings_are_means_of_sentences():
    emb = label_embeddings(tiny(), TOKENIZER, ["dog", "two boats"], clean=str.upper)
    each = text_embeddings(tiny(), TOKENIZER, [fill(t, "two boats").upper() for t in TEMPLATES], batch_size=1)
    torch.testing.assert_close(emb[1], torch.nn.functional.normalize(each.mean(dim=0), dim=-1))


def test_words_that_a_model_never_learned_rank_nothing(capsys):
    """A blank label took 51.7%; a search for nothing, or for an unknown word, found pictures all the same."""
    run, clean = SimpleNamespace(tokenizer=WordTokenizer.train(["a dog"], 1)), partial(clean_caption, how="words")
    for words in (" ", "7", "Zebra"):
        with pytest.raises(UserError, match="holds no word that this model has learned"):
            check_learned(run, ["a dog", words], clean)
    check_learned(run, ["a dog", "a zebra"], clean)
    assert capsys.readouterr().err.count("never learned") == 1


def test_classify_and_search_by_arithmetic():
    """Cosines 0.8 and 0.6 at a factor of 10: odds of e^2."""
    probs = classify(torch.tensor([[0.8, 0.6, 0.0]]), torch.eye(3)[:2], torch.tensor(10.0).log())
    assert probs[0].tolist() == pytest.approx([0.880797, 0.119203], abs=1e-5)
    scores, best = search(torch.tensor([[0.0, 1], [1, 0], [0.6, 0.8]]), torch.tensor([1.0, 0]), k=2)
    assert best.tolist() == [1, 2] and scores.tolist() == pytest.approx([1, 0.6])


def test_public_towers_are_where_training_starts(tmp_path, steps):
    """--vision and --text from one CLIP: before any step the model is that CLIP, its way into the space included."""
    clip = tiny_clip(tmp_path / "clip")
    run(train, *CLIP_RUN, "--vision", clip, "--text", clip, "--epochs", "0.2", "--out-dir", tmp_path / "out")
    theirs = dict(load_clip(clip).named_parameters())
    assert steps[0].keys() == theirs.keys() and all(torch.equal(steps[0][name], p) for name, p in theirs.items())


def test_micro_batches_do_not_change_a_contrastive_run(tmp_path):
    """All pairs of a step are each other's wrong answers, however the step is cut up."""
    for accum in (1, 2):
        run(train, *CLIP_RUN, "--epochs", "1", "--accum", accum, "--out-dir", tmp_path / str(accum))
    a, b = losses(tmp_path / "1"), losses(tmp_path / "2")
    assert len(a) == 6 and [*a.values()] == pytest.approx([*b.values()], abs=2e-4)


def test_recall_among_one_image_is_no_result(tmp_path, capsys):
    """It was 100%, and decided which checkpoint is kept; then it was refused, but only after an epoch."""
    refused(capsys, "the val split of shapes has 1 usable images", train, *CLIP_RUN, "--n-scenes", "16", "--out-dir",
            tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_captions_of_which_cleaning_leaves_nothing_are_no_wrong_answers():
    """All of them became the same row, the end alone: right and wrong answers of a batch were one."""
    data = SimpleNamespace(captions=[["a dog", "7"], ["1, 2 .."], ["a cat"]], splits={"train": [0, 1], "val": [2]})
    assert retrieval.drop_empty(data, "words") == [
        "2 captions hold nothing to learn after --clean words and were left out"]
    assert data.captions == [["a dog"], [], ["a cat"]] and data.splits == {"train": [0], "val": [2]}
    assert not retrieval.drop_empty(data, "words")


@pytest.fixture
def album(tmp_path, monkeypatch):
    """Five images, one of them below, and a broken and a hidden one; `opened`: the names of those that are decoded."""
    folder, opened = tmp_path / "album", []
    (folder / "below").mkdir(parents=True)
    for k, name in enumerate(("a.png", "b.png", "c.JPG", "d.png", "below/e.png", ".hidden.png")):
        Image.new("RGB", (20, 20), (40 * k, 90, 250 - 40 * k)).save(folder / name, format="PNG")
    (folder / "broken.jpg").write_bytes(b"not an image")
    monkeypatch.setattr(retrieval, "load_image", lambda path: (opened.append(os.path.relpath(path, folder)),
                                                               load_image(path))[1])
    return folder, tmp_path / "cache.safetensors", opened


def is_of(model, folder, names, emb):
    """Each row is its own image's, to float16, and told apart from the others: else that would say nothing."""
    img = torch.stack([preprocess(load_image(folder / name), RECIPE) for name in names])
    return torch.allclose(model.encode_image(img), emb, atol=1e-3) and torch.pdist(emb).min() > 0.02


def test_a_folder_is_embedded_once_and_anew_after_any_change(album):
    """A search among mixed embeddings gives plausible nonsense; and it once failed until the user removed the file."""
    (folder, cache, opened), model, notes = album, tiny(), []

    def embed(model=model, key="key"):
        opened.clear()
        names, emb = embed_folder(model, RECIPE, folder, cache, key, batch_size=2, say=notes.append)
        assert is_of(model, folder, names, emb)
        return names, emb
    names, emb = embed()
    assert names == ["a.png", "b.png", "below/e.png", "c.JPG", "d.png"] and "broken.jpg" in notes[0] and len(notes) == 2
    again, whole = embed(), cache.read_bytes()
    assert not opened and again[0] == names and torch.equal(again[1], emb)
    for spoilt in (whole[:-20], b"", whole.replace(b'"ids"', b'"sid"'), whole.replace(rb'[\"', rb'{\"')):
        cache.write_bytes(spoilt)
        assert spoilt != whole and embed()[0] == names and cache.read_bytes() == whole
    os.utime(folder / "c.JPG", (1, 1))                          # the same bytes, another time: who knows
    assert embed()[0] == names and len(opened) == 6
    (folder / "a.png").unlink()
    Image.new("RGB", (20, 20), "white").save(folder / "new.png")
    assert embed()[0] == [*names[1:], "new.png"] and len(opened) == 6
    other = tiny()
    other.vision.blocks[0].mlp.fc.weight.data.mul_(2)
    embed(other, "other key")
    assert len(opened) == 6


def test_folders_that_are_of_no_use(tmp_path):
    for model, words, name in ((tiny(vision=None, feat_dim=4), "no vision tower", "x"), (tiny(), "no images", "x"),
                               (tiny(), "none of the 1", "x.jpg")):
        (tmp_path / name).write_bytes(b"no")
        with pytest.raises(UserError, match=words):
            embed_folder(model, RECIPE, tmp_path, tmp_path / "c", "key", say=str)
    assert not (tmp_path / "c").exists()
