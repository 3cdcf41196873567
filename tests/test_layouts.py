"""Public layouts in tiny made-up folders: Flickr30k, COCO of both years, Karpathy's splits, and what goes wrong."""
import csv
import io
import json
import os
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from tinyvlm import layouts
from tinyvlm.config import UserError
from tinyvlm.layouts import (Dataset, check_absent, coco, fetch_coco, fetch_flickr30k, find_files, find_images,
                             flickr30k, karpathy, list_files, make_splits, open_photos, photos, read_captions)

S3 = "https://s3.amazonaws.com/images.cocodataset.org/"


def pictures(folder, names, colour="grey"):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), colour).save(folder / name)
    return folder


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def karpathy_json(path, members, dataset):
    """members: [(file name, folder or None, split)]"""
    images = [{"filename": name, "split": split, "imgid": k, **({"filepath": sub} if sub else {}),
               "sentences": [{"raw": f"K{k}  says {j}. ", "tokens": ["k"]} for j in range(5)]}
              for k, (name, sub, split) in enumerate(members)]
    return write(path, {"images": images, "dataset": dataset})


# -- what all readers share --------------------------------------------------------------------------------------------

def test_one_walk_follows_links_once_and_skips_what_is_not_data(tmp_path):
    pictures(tmp_path / "disk", ["a.jpg"])
    pictures(tmp_path / "set", ["b.png", "deep/er/c.jpg", "__MACOSX/b.png", "train2014.incomplete/train2014/d.jpg"])
    os.symlink(tmp_path / "disk", tmp_path / "set" / "linked")
    os.symlink(tmp_path / "set", tmp_path / "set" / "deep" / "loop")              # would never end
    assert list_files(tmp_path / "set") == ["b.png", "linked/a.jpg", "deep/er/c.jpg"]
    assert list_files(tmp_path / "nothing") == []


def test_files_are_found_shallow_first_and_in_the_order_asked_for(tmp_path):
    for path in ("x/b.json", "b.json", "x/y/a.txt", "x/y/z/c.txt"):
        write(tmp_path / path, "")
    assert find_files(tmp_path, ("c.txt", "a.txt", "b.json")) == [tmp_path / "x/y/a.txt", tmp_path / "b.json"]


def test_check_absent_lets_one_percent_pass_and_no_more():
    notes = []
    check_absent(notes, [], 5, "f.json", "DIR", False)
    assert notes == []
    check_absent(notes, [7], 100, "f.json", "DIR", False, what="asked-about images")
    assert notes == ["1 of 100 asked-about images are not in the folder: 7"]
    with pytest.raises(UserError, match=r"f.json names 1 images that are not in DIR \(such as 7\).*--allow-broken"):
        check_absent(notes, [7], 99, "f.json", "DIR", False)
    check_absent(notes, list(range(50)), 99, "f.json", "DIR", True)
    assert notes[-1].endswith("0, 1, 2, 3, 4 ..")


def test_missing_splits_are_held_out_and_said():
    names, notes = [f"{i}" for i in range(40)], []
    lists = {"train": set(names[:30]), "val": set(names[30:38])}
    order = make_splits(names, lists, 0, notes, "DIR")
    assert order["test"] == list(range(30, 38)) and len(order["val"]) == 3 and len(order["train"]) == 27
    assert sorted(order["train"] + order["val"]) == list(range(30))
    assert "val split is the test set" in notes[0] and "27/3/8; 2 images are in none" in notes[0]
    assert make_splits(names, lists, 0, notes, "DIR") == order != make_splits(names, lists, 1, notes, "DIR")
    big = [str(i) for i in range(60_000)]
    assert len(make_splits(big, {"train": set(big[:59_999]), "test": {big[-1]}}, 0, notes, "")["val"]) == 5000
    one = make_splits(names[:3], {"train": {"0", "1"}, "test": {"2"}}, 0, notes, "")
    assert {split: len(members) for split, members in one.items()} == {"train": 1, "val": 1, "test": 1}
    alone = make_splits(names, {"val": set(names)}, 0, notes, "DIR")
    assert [len(v) for v in alone.values()] == [32, 4, 4] and "80/10/10" in notes[-1]
    with pytest.raises(UserError, match="DIR name 1 images twice, such as 5"):
        make_splits(names, {"train": {"5", "6"}, "val": {"7"}, "test": {"5"}}, 0, notes, "DIR")


def test_an_opener_takes_the_place_of_the_file():
    """How a streamed set gives its images: no file is looked for."""
    ds = Dataset("toy", ["a"], [["b"]], {"train": [0]}, urls=["https://x/a"], opener=lambda i: f"image {i}")
    assert ds.open(0) == "image 0" and ds.urls == ["https://x/a"]


@pytest.mark.parametrize("text", ['0.jpg,"a dog\n1.jpg,a cat', '0.jpg,"a dog\n1.jpg,"a cat"', '0.jpg,"a "big" dog"'])
def test_a_quote_left_open_swallows_no_rows(tmp_path, text):
    """Read leniently, each of these is a caption: of the first quote and all that follows up to the next."""
    with pytest.raises(UserError, match="captions.csv is not a proper CSV .*quote left open"):
        read_captions(write(tmp_path / "captions.csv", f"image,caption\n{text}\n"))


@pytest.mark.parametrize("encoding, byte", [("latin-1", 22), ("utf-16", 0)])
def test_other_encodings_are_named_and_not_printed(tmp_path, encoding, byte):
    """Python's error carries the file, which once filled the screen."""
    (tmp_path / "captions.csv").write_bytes("image,caption\n0.jpg,ca\u00e9\n".encode(encoding))
    with pytest.raises(UserError) as error:
        read_captions(tmp_path / "captions.csv")
    assert str(error.value) == f"{tmp_path}/captions.csv is not UTF-8 (byte {byte}); save it as UTF-8"


@pytest.mark.parametrize("name, row", [("captions.txt", "{}\t{}"),
                                       ("captions.jsonl", '{{"image": "{}", "caption": "{}"}}')])
def test_only_a_newline_ends_a_line(tmp_path, name, row):
    """str.splitlines() also cuts at U+2028 and U+0085, which JSON allows inside a text."""
    lines = [row.format(f"{k}.jpg", "a\u2028dog,\x85runs") for k in range(2)]
    (tmp_path / name).write_bytes("\r\n".join([*lines, ""]).encode())
    assert read_captions(tmp_path / name) == ({f"{k}.jpg": ["a dog, runs"] for k in range(2)}, 0)


def test_names_differ_from_files_in_the_case_of_the_suffix(tmp_path):
    """The name as it is spelled goes first, of paths too; what could be either of two is an error still."""
    pictures(tmp_path, ["a/0.JPG", "b/0.JPG", "1.jpg", "1.JPG", "2.tif", "b/c/3.JPG", "d/3.jpg"])
    names = {"a/0.jpg": "a/0.JPG", "b/0.jpg": "b/0.JPG", "1.JPG": "1.JPG", "1.jpg": "1.jpg", "2.TIF": "2.tif",
             "c/3.jpg": "b/c/3.JPG"}
    assert find_images(tmp_path, names) == names
    for name, words in (("1.Jpg", "1.JPG or 1.jpg"), ("0.jpg", "a/0.JPG or b/0.JPG")):
        with pytest.raises(UserError, match=words):
            find_images(tmp_path, [name])


def test_images_without_captions_are_counted(tmp_path):
    """In a folder of one's own; a published set lies about in copies, and hidden files are nobody's pictures."""
    pictures(tmp_path, [*(f"{k}.jpg" for k in range(5)), ".thumbnails/0.jpg"])
    write(tmp_path / "captions.csv", "image,caption\n" + "\n".join(f"{k}.jpg,a dog" for k in range(3)))
    note = "2 images in the folder have no caption and were left out, such as 3.jpg"
    assert note in photos("folder", tmp_path).notes and note not in photos("flickr8k", tmp_path).notes


# -- Flickr30k ---------------------------------------------------------------------------------------------------------

KAGGLE = ["1000.jpg| 0| Two men , one  with a | bar .", "1000.jpg| 1|2 dogs", "2199200615.jpg| 3| A dog .",
          "2199200615.jpg| 4   A dog runs across the grass .", '77.jpg| 0| "Stop" , he says | 3   times',
          "77.jpg|1 |  ", "", "78.jpg| 0\t7 birds"]


def test_kaggle_table_with_its_broken_row(tmp_path):
    """The second bar is missing in one row of the real file: the caption then reads as part of the number."""
    folder = pictures(tmp_path / "f", [f"flickr30k_images/{n}.jpg" for n in (1000, 2199200615, 77, 78)])
    write(folder / "results.csv", "\n".join(["image_name| comment_number| comment", *KAGGLE]))
    ds = flickr30k(folder)
    got = dict(zip([Path(name).name for name in ds.names], ds.captions))
    assert got == {"1000.jpg": ["Two men , one with a | bar .", "2 dogs"], "78.jpg": ["7 birds"],
                   "2199200615.jpg": ["A dog .", "A dog runs across the grass ."],
                   "77.jpg": ['"Stop" , he says | 3 times']}
    assert any(note.startswith("2 rows of results.csv lacked the bar") for note in ds.notes)
    assert any(note.startswith("1 caption lines without") for note in ds.notes)
    assert any("80/10/10" in note for note in ds.notes)
    assert ds.name == "flickr30k" and ds.open(0).size == (8, 8)


def test_two_copies_of_the_images_are_one(tmp_path):
    """Kaggle's zip can hold the images twice; Flickr's numbers are unique, so that is no ambiguity."""
    names = [f"{k}.jpg" for k in range(10)]
    for sub in ("flickr30k_images", "flickr30k_images/flickr30k_images"):
        pictures(tmp_path / sub, names)
    write(tmp_path / "flickr30k_images" / "results.csv",
          "image_name| comment_number| comment\n" + "\n".join(f"{n}| 0| a" for n in names))
    assert len(flickr30k(tmp_path).names) == 10


def hub_table(path, splits, raw=lambda k: [f'a dog, "{k}"', "two\u2028dogs"]):
    with open(path, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["raw", "sentids", "split", "filename", "img_id"])
        for k, split in enumerate(splits):
            rows.writerow([json.dumps(raw(k)), "[0, 1]", split, f"{k}.jpg", k])


def test_hub_table_with_official_splits(tmp_path):
    pictures(tmp_path, [f"flickr30k-images/flickr30k-images/{k}.jpg" for k in range(6)])
    hub_table(tmp_path / "flickr_annotations_30k.csv", ["train", "train", "val", "train", "test", "val"])
    write(tmp_path / "results.csv", "image_name| comment_number| comment\n0.jpg| 0| other")     # the hub's goes first
    ds = flickr30k(tmp_path)
    assert ds.splits == {"train": [0, 1, 3], "val": [2, 5], "test": [4]}
    assert ds.captions[3] == ['a dog, "3"', "two dogs"] and any("official split 3/2/1" in note for note in ds.notes)


def test_karpathys_json_splits_the_captions_of_others_and_can_stand_alone(tmp_path):
    pictures(tmp_path, [f"images/{k}.jpg" for k in range(5)])
    members = [("0.jpg", None, "train"), ("1.jpg", None, "test"), ("2.jpg", None, "val"), ("3.jpg", None, "train")]
    karpathy_json(tmp_path / "dataset_flickr30k.json", members, "flickr30k")
    assert flickr30k(tmp_path).captions[1] == [f"K1 says {j}." for j in range(5)]
    write(tmp_path / "results_20130124.token", "\n".join(f"{k}.jpg#{j}\ttoken {k}" for k in range(5) for j in range(2)))
    ds = flickr30k(tmp_path)
    assert ds.splits == {"train": [0, 3], "val": [2], "test": [1]} and ds.captions[1] == ["token 1"] * 2
    assert any("1 images are in none of its lists" in note for note in ds.notes)


def test_photos_reads_karpathys_json_where_there_is_no_caption_file(tmp_path):
    """caption_datasets.zip holds all three files; each data set must take its own."""
    pictures(tmp_path, [f"{k}.jpg" for k in range(3)])
    for name in ("coco", "flickr30k", "flickr8k"):
        of_another = "" if name == "flickr8k" else "no"
        members = [(f"{of_another}{k}.jpg", None, split) for k, split in enumerate(layouts.SPLITS)]
        karpathy_json(tmp_path / f"dataset_{name}.json", members, name)
    ds = photos("flickr8k", tmp_path)
    assert ds.splits == {"train": [0], "val": [1], "test": [2]} and ds.captions[2][4] == "K2 says 4."
    pictures(tmp_path, [f"no{k}.jpg" for k in range(3)])
    assert flickr30k(tmp_path).names == ["no0.jpg", "no1.jpg", "no2.jpg"]
    os.replace(tmp_path / "dataset_coco.json", tmp_path / "dataset_flickr8k.json")
    with pytest.raises(UserError, match="dataset_flickr8k.json is the split of coco, not of flickr8k"):
        photos("flickr8k", tmp_path)


@pytest.mark.parametrize("raw", [lambda k: "a dog", lambda k: [3], lambda k: {"a": 1}, lambda k: None])
def test_broken_tables_of_flickr30k_are_a_sentence(tmp_path, raw):
    pictures(tmp_path, ["0.jpg"])
    hub_table(tmp_path / "flickr_annotations_30k.csv", ["train"], raw)
    with pytest.raises(UserError, match="flickr_annotations_30k.csv is not the hub's table"):
        flickr30k(tmp_path)


def test_flickr30k_folders_without_what_is_needed(tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        flickr30k(tmp_path / "no")
    with pytest.raises(UserError, match="holds no flickr_annotations_30k.csv, results.csv"):
        flickr30k(tmp_path)
    hub_table(tmp_path / "flickr_annotations_30k.csv", ["train", "val", "test"])
    with pytest.raises(UserError, match="names 3 images that are not in"):
        flickr30k(tmp_path)


# -- COCO --------------------------------------------------------------------------------------------------------------

def file_of(k, subset):
    return f"COCO_{subset}_{k:012d}.jpg" if "2014" in subset else f"{k:012d}.jpg"


def annotations(ids, subset, n_captions=lambda k: 5, **more):
    images = [{"id": k, "file_name": file_of(k, subset), "height": 8, "width": 8,
               "coco_url": f"http://images.cocodataset.org/{subset}/{file_of(k, subset)}"} for k in ids]
    said = [{"id": 100 * k + j, "image_id": k, "caption": f"image {k}\n caption {j}"}
            for k in reversed(ids) for j in range(n_captions(k))]
    return {"info": {}, "licenses": [], "images": images, "annotations": said, **more}


def official(folder, year=2014, n_train=20, n_val=4, where="{}/{}", **more):
    for subset, ids in ((f"train{year}", range(n_train)), (f"val{year}", range(100, 100 + n_val))):
        write(folder / "annotations" / f"captions_{subset}.json", annotations(ids, subset, **more))
        write(folder / "annotations" / f"instances_{subset}.json", "never opened")
        pictures(folder, [where.format(subset, file_of(k, subset)) for k in ids], "red" if ids[0] else "blue")
    return folder


@pytest.mark.parametrize("year", [2014, 2017])
@pytest.mark.parametrize("where", ["{}/{}", "images/{}/{}", "all/{1}"])
def test_official_layout_wherever_the_images_lie(tmp_path, year, where):
    ds = coco(official(tmp_path, year, where=where, n_captions=lambda k: 7 if k == 3 else 6 if k == 101 else 5))
    assert [len(ds.splits[split]) for split in layouts.SPLITS] == [18, 2, 4] and len(ds.names) == 24
    assert sorted(ds.splits["train"] + ds.splits["val"]) == list(range(20))
    assert ds.captions[3] == [f"image 3 caption {j}" for j in range(7)] and len(ds.captions[21]) == 6    # all are kept
    assert ds.open(0).getpixel((0, 0))[2] > 200 and ds.open(ds.splits["test"][0]).getpixel((0, 0))[0] > 200
    assert any("official val split is the test set" in note and "18/2/4" in note for note in ds.notes)
    assert "24 images of annotations" in ds.notes[-1] and "123 captions, 5 to 7 each" in ds.notes[-1]
    assert coco(tmp_path).splits == ds.splits != coco(tmp_path, seed=5).splits


def test_only_the_official_val(tmp_path):
    """A small download, only val2014: it is split by seed, and a note says so."""
    folder = official(tmp_path / "a", n_val=20)
    (folder / "annotations" / "captions_train2014.json").unlink()
    ds = coco(folder)
    assert [len(v) for v in ds.splits.values()] == [16, 2, 2] and any("80/10/10 by seed 0" in note for note in ds.notes)


def test_files_of_ones_own_in_cocos_layout(tmp_path):
    """The same file names in three folders, a json for each: a picture must never come from the folder of another."""
    for split, ids in (("train", range(4)), ("val", range(2)), ("test", range(3))):
        content = annotations(ids, "2017")
        for image in content["images"]:
            del image["coco_url"]
        write(tmp_path / f"{split}.json", content)
        pictures(tmp_path / "images" / split, [f"{k:012d}.jpg" for k in ids],
                 {"train": "blue", "val": "red", "test": "lime"}[split])
    karpathy_json(tmp_path / "dataset_flickr30k.json", [("a.jpg", None, "train")], "flickr30k")  # of no concern here
    ds = coco(tmp_path)
    assert {split: len(members) for split, members in ds.splits.items()} == {"train": 4, "val": 2, "test": 3}
    for channel, split in enumerate(("val", "test", "train")):
        assert all(ds.open(i).getpixel((0, 0))[channel] > 200 for i in ds.splits[split])
    with pytest.raises(UserError, match="no coco_url of 9 images, such as test/0000"):
        coco(tmp_path, stream=True)
    os.rename(tmp_path / "images" / "val", tmp_path / "elsewhere.incomplete")
    with pytest.raises(UserError, match="val/000000000000.jpg could be images/test/0000.* or images/train/0000"):
        coco(tmp_path)
    (tmp_path / "test.json").unlink()
    os.rename(tmp_path / "images" / "test", tmp_path / "test.incomplete")
    with pytest.raises(UserError, match="train.json, val.json gives several of its images one and the same file"):
        coco(tmp_path)


def test_one_json_of_ones_own_with_images_of_train_and_val(tmp_path):
    parts = [annotations(range(5), "train2014"), annotations(range(100, 105), "val2014")]
    write(tmp_path / "train_small.json", {key: parts[0][key] + parts[1][key] for key in ("images", "annotations")})
    for part in parts:
        pictures(tmp_path / "all", [image["file_name"] for image in part["images"]])
    assert [len(members) for members in coco(tmp_path).splits.values()] == [8, 1, 1]
    assert coco(tmp_path, stream=True).names[5] == "val2014/" + file_of(100, "val2014")


def test_karpathy_split_with_restval(tmp_path):
    """restval, most of the official val, is for training; captions are the raw ones; no other json is needed."""
    members = [(file_of(k, sub), sub, split) for k, (sub, split) in enumerate(
        [("train2014", "train"), ("train2014", "train"), ("val2014", "restval"), ("val2014", "val"),
         ("val2014", "test"), ("val2014", "restval")])]
    folder = pictures(tmp_path, [f"{sub}/{name}" for name, sub, _ in members])
    path = karpathy_json(folder / "dataset_coco.json", members, "coco")
    write(folder / "annotations" / "captions_train2014.json", "never opened")
    ds = coco(folder)
    assert ds.splits == {"train": [0, 1, 2, 5], "val": [3], "test": [4]} and ds.captions[4][0] == "K4 says 0."
    assert ds.names[4] == "val2014/COCO_val2014_000000000004.jpg"
    assert coco(folder, stream=True).urls[4] == S3 + ds.names[4]
    with pytest.raises(UserError, match="no coco_url of 1 images, such as b.jpg"):
        write(tmp_path / "b" / "dataset_coco.json", {"images": [
            {"filename": "b.jpg", "split": "val", "sentences": [{"raw": "b"}]}]})
        coco(tmp_path / "b", stream=True)
    captions, lists = karpathy(path, "coco")
    assert list(captions) == ds.names and lists["train"] == {ds.names[i] for i in ds.splits["train"]}


@pytest.mark.parametrize("said, there", [(2017, 2014), (2014, 2017)])
def test_annotations_of_another_year_than_the_images(tmp_path, said, there):
    official(tmp_path, said)
    for subset in ("train", "val"):
        os.rename(tmp_path / f"{subset}{said}", tmp_path / f"{subset}{there}")
        for path in list((tmp_path / f"{subset}{there}").iterdir()):        # the same photos by the other name
            os.rename(path, path.with_name(file_of(int(path.stem[-12:]), f"{subset}{there}")))
    with pytest.raises(UserError, match=f"captions_train{said}.* is of {said}, but the images there are of {there}"):
        coco(tmp_path, allow_broken=True)


def test_annotations_of_both_years(tmp_path):
    """What is used is the year whose images are there: both together would put test images into training."""
    official(tmp_path, 2014)
    for subset, ids in (("train2017", range(20)), ("val2017", range(100, 104))):
        write(tmp_path / "annotations" / f"captions_{subset}.json", annotations(ids, subset))
    ds = coco(tmp_path)
    assert len(ds.names) == 24 and "of the annotations of 2014 and 2017 those of 2014 are used" in ds.notes


def test_streaming_needs_addresses_and_no_images(tmp_path):
    """coco_url where it leads somewhere, else the address built from the file name; no image on disk."""
    folder = official(tmp_path / "a")
    content = annotations(range(4), "train2014")
    for image, url in zip(content["images"], ("http://127.0.0.1:8000/a.jpg", "http://mscoco.org/images/1", None)):
        image["coco_url"] = url
    write(folder / "annotations" / "captions_train2014.json", content)
    os.rename(folder / "train2014", tmp_path / "away")
    os.rename(folder / "val2014", folder / "val2017")            # of no importance here
    ds = coco(folder, stream=True)
    built = [f"{S3}train2014/{file_of(k, 'train2014')}" for k in (1, 2, 3)]
    assert ds.urls[:4] == ["http://127.0.0.1:8000/a.jpg", *built]
    assert ds.urls[4] == f"{S3}val2014/{file_of(100, 'val2014')}" and len(ds.urls) == len(ds.names) == 8
    assert ds.names[1] == "train2014/" + file_of(1, "train2014")                    # where it would lie in the folder
    ds.opener = lambda i: ds.urls[i]
    assert ds.open(0) == "http://127.0.0.1:8000/a.jpg" and "to be streamed" in ds.notes[-1]
    assert coco(official(tmp_path / "b", 2017), stream=True).urls[0] == S3 + "train2017/000000000000.jpg"


def test_missing_images_and_unknown_ids(tmp_path):
    """Up to one in a hundred may be missing and is counted; more needs --allow-broken."""
    folder = official(tmp_path, n_train=200, n_val=30)
    for k in (5, 6):
        (folder / "train2014" / file_of(k, "train2014")).unlink()
    assert "2 of 230 captioned images are not in the folder" in coco(folder).notes[0]
    (folder / "train2014" / file_of(7, "train2014")).unlink()
    with pytest.raises(UserError, match="captions_val2014.json names 3 images .*such as train2014/COCO_.*5.jpg"):
        coco(folder)
    assert len(coco(folder, allow_broken=True).names) == 227
    path = folder / "annotations" / "captions_val2014.json"
    content = annotations(range(100, 130), "val2014")
    content["annotations"] += [{"image_id": 999, "caption": "?"}]
    write(path, content)
    assert any(n.startswith("1 of 151 annotations in") and "999" in n for n in coco(folder, allow_broken=True).notes)
    content["annotations"] += [{"image_id": 998, "caption": "?"}]
    write(path, content)
    with pytest.raises(UserError, match="2 of 152 annotations in .*captions_val2014.json have .*999.*--allow"):
        coco(folder)
    content["images"].append({"id": 500, "file_name": "COCO_val2014_500.jpg"})
    content["annotations"] += [{"image_id": 100, "caption": "  "}]
    write(path, content)
    ds = coco(folder, allow_broken=True)
    assert "1 images without a caption were left out" in ds.notes
    assert ds.captions[-30] == [f"image 100 caption {j}" for j in range(5)]


@pytest.mark.parametrize("content", [
    "{", [], {}, {"images": []}, {"images": [{"id": 1}], "annotations": []}, {"images": [3], "annotations": []},
    {"images": [{"id": 1, "file_name": 3}], "annotations": []},
    {"images": [{"id": [], "file_name": "a"}], "annotations": []},
    {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1, "bbox": []}]},
    {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1, "caption": None}]},
    {"images": [{"id": 1, "file_name": "a.jpg", "coco_url": 3}], "annotations": []}])
def test_damaged_annotations_name_the_file(tmp_path, content):
    write(tmp_path / "annotations" / "captions_train2014.json", content)
    with pytest.raises(UserError, match="captions_train2014.json is not") as error:
        coco(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [{"images": []}, {"images": [{"filename": 3, "split": "val"}]},
                                     {"images": [{"filename": "a.jpg", "split": "val", "sentences": [{"tokens": []}]}]},
                                     {"images": [{"filename": "a.jpg"}]}, {"images": [{"filename": "a", "split": []}]}])
def test_damaged_splits_name_the_file_or_are_empty(tmp_path, content):
    write(tmp_path / "dataset_coco.json", content)
    with pytest.raises(UserError, match="dataset_coco.json is not in the layout|split of .* is empty"):
        coco(tmp_path)


def test_coco_folders_without_what_is_needed(tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        coco(tmp_path / "no")
    with pytest.raises(UserError, match="neither annotations/captions_train2014.json"):
        coco(tmp_path)


# -- downloads ---------------------------------------------------------------------------------------------------------

@pytest.fixture
def server(tmp_path, monkeypatch):
    """Stands in for download(). files: {end of the address: {member: bytes} of a zip, or bytes}; asked: what was."""
    files, asked = {}, []

    def fake(url, path, **_):
        asked.append(url)
        content = next((files[end] for end in files if url.endswith(end)), None)
        if content is None:
            raise UserError(f"cannot fetch {url}: no")
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            with zipfile.ZipFile(path, "w") as z:
                for name, data in content.items():
                    z.writestr(name, data)
        return path
    monkeypatch.setattr(layouts, "download", fake)
    monkeypatch.chdir(tmp_path)
    return SimpleNamespace(files=files, asked=asked)


def jpeg():
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG")
    return buffer.getvalue()


def config(dataset, **more):
    return SimpleNamespace(**{"dataset": dataset, "data_dir": None, "seed": 0, "allow_broken": False, **more})


def test_flickr30k_is_downloaded_once_captions_last(server, tmp_path):
    server.files["flickr30k-images.zip"] = {f"flickr30k-images/{k}.jpg": jpeg() for k in range(3)}
    with pytest.raises(UserError, match="cannot fetch .*flickr_annotations_30k.csv"):
        open_photos(config("flickr30k"))
    hub_table(tmp_path / "table.csv", layouts.SPLITS)
    server.files["flickr_annotations_30k.csv"] = (tmp_path / "table.csv").read_bytes()
    assert open_photos(config("flickr30k")).splits == {"train": [0], "val": [1], "test": [2]}
    assert len(open_photos(config("flickr30k")).names) == 3
    asked = [url.rpartition("/")[2] for url in server.asked]
    assert asked == ["flickr30k-images.zip", "flickr_annotations_30k.csv", "flickr_annotations_30k.csv"]
    assert os.listdir("data/flickr30k") and not os.path.exists("data/flickr30k/zips")
    fetch_flickr30k(Path("data/flickr30k"))
    assert len(server.asked) == 3


def test_coco_streams_from_its_annotations_alone_then_completes(server):
    """--stream downloads one file; without it the images follow, and a killed download goes on where it was."""
    server.files["annotations_trainval2014.zip"] = {
        f"annotations/captions_{s}2014.json": json.dumps(annotations(ids, f"{s}2014"))
        for s, ids in (("train", range(20)), ("val", range(100, 104)))}
    ds = open_photos(config("coco", stream=True))
    assert len(ds.urls) == 24 and server.asked == [S3 + "annotations/annotations_trainval2014.zip"]
    server.files["train2014.zip"] = {f"train2014/{file_of(k, 'train2014')}": jpeg() for k in range(20)}
    with pytest.raises(UserError, match="cannot fetch .*zips/val2014.zip"):
        open_photos(config("coco"))
    server.files["val2014.zip"] = {f"val2014/{file_of(k, 'val2014')}": jpeg() for k in range(100, 104)}
    for _ in range(2):
        assert len(open_photos(config("coco")).names) == 24
    assert [url[len(S3):] for url in server.asked[1:]] == ["zips/train2014.zip", "zips/val2014.zip", "zips/val2014.zip"]
    fetch_coco(Path("data/coco"))
    assert len(server.asked) == 4 and not os.path.exists("data/coco/zips")


def test_streaming_meanwhile_does_not_spoil_a_broken_download(server):
    """--stream between two halves of the download must leave the sign that val2014 is still to come."""
    root = Path("data/coco")
    server.files["train2014.zip"] = {f"train2014/{file_of(k, 'train2014')}": jpeg() for k in range(20)}
    with pytest.raises(UserError, match="zips/val2014.zip"):
        fetch_coco(root)
    write(root / "zips" / "val2014.zip.incomplete", "half")
    server.files["annotations_trainval2014.zip"] = {"annotations/captions_val2014.json": "{}"}
    fetch_coco(root, annotations_only=True)
    assert (root / "zips" / "val2014.zip.incomplete").exists() and not list(root.glob("zips/*.zip"))
    server.files["val2014.zip"] = {"val2014/a.jpg": jpeg()}
    fetch_coco(root)
    assert (root / "val2014" / "val2014" / "a.jpg").exists() and server.asked[-1] == S3 + "zips/val2014.zip"


def test_coco_by_hand_is_not_downloaded_again(server, tmp_path):
    official(tmp_path / "data" / "coco", 2017)
    assert len(open_photos(config("coco")).names) == 24 and server.asked == []
    with pytest.raises(UserError, match="zips/train2014.zip"):
        fetch_coco(tmp_path / "data" / "coco", year=2014)
    assert server.asked == [S3 + "zips/train2014.zip"]


def test_open_photos_never_downloads_into_a_given_folder(server, tmp_path):
    for name in ("flickr8k", "flickr30k", "coco", "folder"):
        with pytest.raises(UserError, match="there is no folder"):
            open_photos(config(name, data_dir=str(tmp_path / "no"), stream=False))
    with pytest.raises(UserError, match="--stream fetches the images of coco"):
        open_photos(config("flickr8k", stream=True))
    assert server.asked == []
