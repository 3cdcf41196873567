"""Data sets, splits, batches: what is in them, in which order, and what happens when they are not as they should be."""
import json
import random
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from tinyvlm import layouts
from data import CLEAN, NO_ROW, Batches, ImageStore, Shapes, Texts, eval_batches, load_dataset, pad_rows, step_order
from tinyvlm.gpt import IGNORE
from tinyvlm.layouts import Dataset, photos
from tinyvlm.config import UserError
from tinyvlm.image import Recipe
from tinyvlm.shapes import COLORS, OPPOSITE, SHAPES, Thing, ask, describe, draw_scene, make_scene, meaning
from tinyvlm.tokenizer import BPETokenizer


@pytest.fixture(scope="module")
def shapes():
    return Shapes(n_objects=3, n_scenes=600, seed=1)


def test_shapes_are_a_function_of_seed_and_index(shapes):
    again, other, more = Shapes(3, 600, seed=1), Shapes(3, 600, seed=2), Shapes(3, 700, seed=1)
    assert again.captions == shapes.captions != other.captions
    assert more.captions[:600] == shapes.captions[:600]                           # more scenes do not change the first
    assert again.open(7).tobytes() == shapes.open(7).tobytes()


def test_held_out_captions_are_never_training_captions(shapes):
    said = {split: {shapes.captions[i][0] for i in members} for split, members in shapes.splits.items()}
    assert not said["train"] & said["val"] and not said["train"] & said["test"] and not said["val"] & said["test"]
    other = Shapes(3, 600, seed=9)                                                # .. not even those of another seed
    assert not said["test"] & {other.captions[i][0] for i in other.splits["train"]}


def test_captions_name_everything(shapes):
    words = " ".join(c[0] for c in shapes.captions)
    places = ("top left", "middle", "bottom right")
    assert all(w in words for w in (*COLORS, *SHAPES, "small", "large", *OPPOSITE, *places))
    for scene, (caption,) in zip(shapes.scenes, shapes.captions):
        things, facts = meaning(caption)
        assert len(facts) == max(1, len(scene) - 1) and {tuple(str(t).split()) for t in scene} == things


def test_meaning_is_independent_of_the_wording():
    a = "a large red star left of a small red star"
    assert meaning(a) == meaning("a small red star right of a large red star")
    assert meaning(a) != meaning("a small red star left of a large red star")
    assert meaning(a) != meaning("a large red star left of a small blue star")
    assert meaning("a small red star in the top") != meaning("a small red star in the top left")
    for nonsense in ("", "a large star", a + " a", "red", "a large red star a small red star"):
        assert meaning(nonsense) is None


def test_relations_worked_example():
    left, right = Thing("small", "red", "circle", 20, 60), Thing("small", "blue", "square", 100, 70)
    assert describe([left, right]) == "a small red circle left of a small blue square"
    assert describe([right, left]) == "a small blue square right of a small red circle"
    assert describe([Thing("large", "red", "circle", 64, 100)]) == "a large red circle in the bottom"


def test_scenes_are_drawn_as_described():
    """The colour at the centre of each thing is its colour: things do not cover one another."""
    rng = random.Random(0)
    for _ in range(60):
        scene = make_scene(rng, 3)
        image = draw_scene(scene, rng)
        for t in scene:
            assert np.abs(np.subtract(image.getpixel((int(t.x), int(t.y))), COLORS[t.color])).max() <= 15, str(t)


def test_questions_are_right_and_balanced():
    rng, yes, kinds = random.Random(0), 0, set()
    for _ in range(400):
        scene = make_scene(rng, 3)
        for q in ask(scene, rng):
            kinds.add(q["kind"])
            if q["kind"] == "count":
                assert q["short"] == str(len(scene))
            if q["kind"] == "yes/no":
                yes += q["short"] == "yes"
                asked = q["question"].split()[3]
                assert (q["short"] == "yes") == any(t.color == asked for t in scene)
            assert q["short"] in q["answer"]
    assert kinds == {"color", "size", "shape", "count", "relation", "yes/no"} and 160 < yes < 240


# -- photographs -------------------------------------------------------------------------------------------------------

def album(folder, n=20, captions=True):
    """n little images and a Kaggle-style captions.txt, with commas, quotes and five captions an image."""
    (folder / "Images").mkdir(parents=True)
    for k in range(n):
        Image.new("RGB", (12 + k, 10), (10 * k, 50, 50)).save(folder / "Images" / f"{k}.jpg")
    if captions:
        rows = [f'{k}.jpg,"a dog, number {k}, says ""wau"" {j} ."' for k in range(n) for j in range(5)]
        (folder / "captions.txt").write_text("image,caption\n" + "\n".join(rows) + "\n")
    return folder


def from_folder(folder):
    """The flags of a run on an album."""
    return ["--dataset", "folder", "--data-dir", folder]


def test_kaggle_layout_commas_and_quotes(tmp_path):
    ds = photos("folder", album(tmp_path / "a"))
    assert len(ds.names) == 20 and ds.captions[3][1] == 'a dog, number 3, says "wau" 1 .'
    assert ds.open(3).size == (15, 10) and sorted(sum(ds.splits.values(), [])) == list(range(20))
    assert any("no official split" in note for note in ds.notes)
    same, other = (photos("folder", tmp_path / "a", seed=seed) for seed in (0, 1))
    assert same.splits == ds.splits != other.splits


def test_original_text_layout_with_official_split(tmp_path):
    folder = album(tmp_path / "a", captions=False)
    (folder / "Images").rename(folder / "Flicker8k_Dataset")
    text = folder / "Flickr8k_text"
    text.mkdir()
    lines = [f"{k}.jpg#{j}\tA dog , number {k} ." for k in range(20) for j in range(5)]
    lines.append("2258277193_586949ec62.jpg.1#0\tnone")                           # stands so in the real file
    (text / "Flickr8k.token.txt").write_text("\n".join(lines))
    for name, members in (("train", range(10)), ("dev", range(10, 14)), ("test", range(14, 18))):
        (text / f"Flickr_8k.{name}Images.txt").write_text("\n".join(f"{k}.jpg" for k in members) + "\n")
    ds = photos("flickr8k", folder, allow_broken=True)
    assert [len(v) for v in ds.splits.values()] == [10, 4, 4] and len(ds.names) == 20
    assert any("2 images are in none" in n for n in ds.notes) and any("1 of 21 captioned images" in n for n in ds.notes)


def test_jsonl_and_tab_layouts(tmp_path):
    folder = album(tmp_path / "a", captions=False)
    rows = [{"file_name": f"{k}.jpg", "captions": ["one", "two"]} if k % 2 else {"image": f"{k}.jpg", "text": "a"}
            for k in range(20)]
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert photos("folder", folder).captions[1] == ["one", "two"]
    (folder / "captions.jsonl").unlink()
    (folder / "captions.txt").write_text("\n".join(f"{k}.jpg\ta dog, {k}" for k in range(20)))
    assert photos("folder", folder).captions[4] == ["a dog, 4"]


def test_unquoted_commas_do_not_cut_captions(tmp_path):
    folder = album(tmp_path / "a", captions=False)
    rows = [f"{k}.jpg,a dog, a cat and {k}" for k in range(20)]
    (folder / "captions.txt").write_text("image,caption\n" + "\n".join(rows))
    assert photos("folder", folder).captions[4] == ["a dog, a cat and 4"]
    (folder / "captions.txt").write_text("caption,image\na dog, a cat,4.jpg\n")
    with pytest.raises(UserError, match="line 2 of .* more cells"):
        photos("folder", folder)


def test_the_same_file_name_in_two_folders(tmp_path):
    """Matching by file name alone once gave both captions the second picture."""
    for sub in "ab":
        (tmp_path / sub).mkdir()
        for k in range(10):
            Image.new("RGB", (4, 4), "red" if sub == "a" else "blue").save(tmp_path / sub / f"{k}.png")
    rows = [f"{sub}/{k}.png,{sub}" for sub in "ab" for k in range(10)]
    (tmp_path / "captions.txt").write_text("image,caption\n" + "\n".join(rows))
    ds = photos("folder", tmp_path)
    assert all(ds.open(i).getpixel((0, 0))[0] == (255 if ds.captions[i] == ["a"] else 0) for i in range(20))
    (tmp_path / "captions.txt").write_text("image,caption\n3.png,which?\n")
    with pytest.raises(UserError, match="3.png could be a/3.png or b/3.png"):
        photos("folder", tmp_path)


def test_captions_cannot_speak_special_tokens():
    tokenizer = data_tokenizer()
    texts = Texts([["a <image> b <|endoftext|> c"]], tokenizer, 1, 2, 99)
    special = {tokenizer.token_to_id("<image>"), tokenizer.token_to_id("<|endoftext|>")}
    ids, targets = texts.rows[0][0]                             # of a row, the first id and the last target are ours
    assert not special & {*ids[1:], *targets[:-1]}


@pytest.mark.parametrize("name, content", [
    ("captions.txt", 'image,caption\n0.jpg,"open\n' + "x" * 200_000),
    ("captions.jsonl", '{"image": "0.jpg", "captions": [3, null]}'),
    ("captions.jsonl", '{"image": "0.jpg", "captions": "a dog"}'), ("captions.txt", "image,caption\n0.jpg\n"),
    ("captions.txt", b"\xff\xfe\x00"), ("dataset.json", "{}"), ("dataset.json", "{")])
def test_damaged_tables_are_a_sentence(tmp_path, name, content):
    folder = album(tmp_path / "a", captions=name == "dataset.json")
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=name):
        photos("folder", folder)


def test_bad_folders_are_one_sentence(tmp_path):
    def fails(words, folder):
        with pytest.raises(UserError, match=words) as error:
            photos("folder", folder)
        assert "\n" not in str(error.value) and str(folder.name) in str(error.value)
    fails("there is no folder", tmp_path / "nothing")
    fails("holds no captions.txt", album(tmp_path / "b", captions=False))
    absent = album(tmp_path / "c")
    (absent / "Images" / "3.jpg").unlink()
    fails("names 1 images that are not in .*3.jpg.*--allow-broken", absent)
    assert len(photos("folder", absent, allow_broken=True).names) == 19
    (absent / "captions.txt").write_text("image,caption\n")
    fails("holds no captions", absent)
    (absent / "captions.txt").write_text("picture;words\n0.jpg;a dog\n")
    with pytest.raises(UserError, match="should begin with the line `image,caption`"):
        photos("folder", absent)
    few = album(tmp_path / "d", n=2)
    fails("split of .* is empty", few)


def test_broken_images_are_counted_and_refused_above_one_percent(tmp_path, capsys):
    folder = album(tmp_path / "a")
    (folder / "Images" / "5.jpg").write_bytes(b"not a jpeg")
    ds = photos("folder", folder)
    with pytest.raises(UserError, match="1 of 20 images are broken, first .*5.jpg.*--allow-broken"):
        ImageStore(ds, ds.splits, Recipe(size=8))
    for cache in ("memory", "none"):
        store = ImageStore(ds, ds.splits, Recipe(size=8), cache=cache, allow_broken=True)
        assert sum(len(store.usable(s)) for s in ds.splits) == 19 and list(store.broken) == [5]
    assert "5.jpg" in capsys.readouterr().out


def test_memory_and_on_demand_give_the_same_pixels(tmp_path):
    ds = photos("folder", album(tmp_path / "a"))
    stores = [ImageStore(ds, ds.splits, Recipe(size=8), cache=cache) for cache in ("memory", "none")]
    assert torch.equal(*(s.get([3, 9, 3]) for s in stores)) and stores[0].get([3]).dtype == torch.uint8


def test_flickr8k_tries_the_mirrors_in_order(tmp_path, monkeypatch):
    """Without a network: the first mirror fails, the second serves Kaggle's zip, and it is used from then on."""
    source = album(tmp_path / "source")
    asked = []

    def fake(url, path, **_):
        asked.append(url)
        if "jbrownlee" in url:
            raise UserError("the server answered 404")
        path.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(path, "w") as z:
            for file in source.rglob("*.*"):
                z.write(file, file.relative_to(source))
        return path
    monkeypatch.setattr(layouts, "download", fake)
    monkeypatch.chdir(tmp_path)
    config = SimpleNamespace(dataset="flickr8k", data_dir=None, seed=0, allow_broken=False)
    assert len(load_dataset(config).names) == 20 and len(asked) == 2 and "kaggle" in asked[1]
    assert len(load_dataset(config).names) == 20 and len(asked) == 2              # nothing is fetched twice
    assert not (tmp_path / "data" / "flickr8k" / "zips").exists()


def test_mirrored_scenes_keep_their_caption(shapes):
    """Whatever may be flipped must be described by the same words afterwards, or the default run learns from noise."""
    for i in shapes.splits["train"][:300]:
        if shapes.may_flip(i):
            mirrored = [Thing(t.size, t.color, t.shape, 128 - t.x, t.y) for t in shapes.scenes[i]]
            assert describe(sorted(mirrored, key=lambda t: (t.size != "large", t.x))) == shapes.captions[i][0]
    assert any(map(shapes.may_flip, shapes.splits["train"]))


# -- batches -----------------------------------------------------------------------------------------------------------

class Letters:
    """A tokenizer for tests: a letter, a token."""
    unk_id = None

    def encode(self, text, special):
        return [ord(c) - 96 for c in text if c != " "]


def data_tokenizer():
    return BPETokenizer.train(["a b c"], 300)


def toy(n=7, K=1, batch_size=3, world=1, rank=0, accum=1, seed=0):
    captions = [["ab", "abc", "a"][:1 + i % 3] for i in range(n)]
    ds = Dataset("toy", list(map(str, range(n))), captions, {"train": list(range(n)), "val": list(range(n))})
    ds.open = lambda i: Image.new("RGB", (4, 4), (i, i, i))
    store = ImageStore(ds, ["train"], Recipe(size=4), "memory", say=lambda text: None)
    return Batches(store, Texts(captions, Letters(), 50, 60, 10), "train", batch_size, K, accum, seed, rank, world)


def test_every_epoch_sees_every_sample_once_in_a_new_order():
    picks = [pick for step in range(14) for pick in step_order(7, 3, step, seed=0)]
    epochs = [[i for i, e in picks if e == epoch] for epoch in range(6)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs) and len({tuple(e) for e in epochs}) == 6
    assert picks[18:21] == step_order(7, 3, 6, seed=0) != step_order(7, 3, 6, seed=1)
    assert len(step_order(2, 9, 0, seed=0)) == 9                                  # a batch larger than the data


def test_padding_is_told_by_length_and_the_end_is_learned():
    """end == pad == 0 here: the one real end must be a target, the padding must not, the first word must be."""
    idx, targets = pad_rows([([0, 5, 6], [5, 6, 0]), ([0, 7], [7, 0]), NO_ROW])
    assert idx.tolist() == [[0, 5, 6], [0, 7, 0], [0, 0, 0]]
    assert targets.tolist() == [[5, 6, 0], [7, 0, IGNORE], [IGNORE] * 3]


def test_a_cut_caption_does_not_teach_to_stop():
    texts = Texts([["abc", "abcd"]], Letters(), first=50, end=60, max_len=3)
    assert texts.rows == [[([50, 1, 2, 3], [1, 2, 3, 60]), ([50, 1, 2], [1, 2, 3])]] and texts.cut == 1


def test_captions_of_which_nothing_is_left_are_counted():
    texts = Texts([["abc", "!!!"]], Letters(), first=50, end=60, max_len=3, clean=CLEAN["words"])
    assert texts.rows[0][1] == ([50], [60]) and texts.empty == 1


def test_images_without_any_row_are_passed_over():
    store = SimpleNamespace(usable=lambda split: [0, 1, 2], get=torch.tensor, ready=True)
    texts = SimpleNamespace(rows=[[], [([1], [2])], []])
    assert Batches(store, texts, "train", 1).members == [1]
    assert [batch.img.tolist() for batch in eval_batches(store, texts, "val", 1)] == [[1]]


def test_all_captions_take_their_turn():
    batches = toy(K=1)
    assert {tuple(batches.captions_of(2, epoch)[0][1]) for epoch in range(3)} == {(1, 2, 60), (1, 2, 3, 60), (1, 60)}
    rows = toy(K=99).captions_of(1, 0)                                            # two captions, the most is three
    assert [targets for _, targets in rows] == [[1, 2, 60], [1, 2, 3, 60], []]


def test_processes_and_micro_batches_share_one_step():
    """2 processes x 2 micro-batches of 2 are the 8 images of the one-process step; their weights add up to one."""
    whole = toy(n=20, K=2, batch_size=8)[5][0]
    ranks = [toy(n=20, K=2, batch_size=8, world=2, accum=2, rank=rank)[5] for rank in (0, 1)]
    parts = [ranks[rank][m] for m in (0, 1) for rank in (0, 1)]
    assert torch.equal(torch.cat([p.img for p in parts]), whole.img)
    assert torch.equal(torch.cat([p.draw for p in parts], 1), whole.draw)         # same augmentation, however split
    assert sum(p.share for p in parts) == pytest.approx(1) and whole.share == 1
    assert all(p.n_targets == int((p.targets != IGNORE).sum()) for p in parts)


def test_images_whose_captions_say_left_or_right_are_never_mirrored():
    captions = [["a dog left of a cat"], ["a dog"], ["Two cats", "the one on the right jumps"]]
    ds = Dataset("toy", list("abc"), captions, {"train": [0, 1, 2]})
    assert [ds.may_flip(i) for i in range(3)] == [False, True, False]
    batches = toy(n=20, batch_size=20)
    batches.store.dataset.may_flip = lambda i: i >= 10
    picks = [i for i, _ in step_order(20, 20, 0, seed=0)]
    assert all(value == 1 for value, i in zip(batches[0][0].draw[4].tolist(), picks) if i < 10)
    assert all(value < 1 for value, i in zip(batches[0][0].draw[4].tolist(), picks) if i >= 10)


def test_batches_that_do_not_divide_are_refused():
    with pytest.raises(UserError, match="--batch-size 3 does not divide among 2 processes x 1"):
        toy(world=2)


def test_evaluation_sees_every_caption_once():
    batches = toy()
    found = [row for b in eval_batches(batches.store, batches.texts, "val", 4) for row in b.targets.tolist()]
    assert sum(60 in row for row in found) == sum(len(rows) for rows in batches.texts.rows)
