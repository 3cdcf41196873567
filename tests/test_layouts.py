"""Public layouts in tiny made-up folders: tables, splits, Flickr, COCO, Karpathy; and what is refused by name."""
import csv
import json
import os
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from tinyvlm import layouts
from tinyvlm.captions import clean_caption, read_captions
from tinyvlm.classifying import read_labels
from tinyvlm.config import UserError
from tinyvlm.layouts import Dataset, make_splits, open_photos, photos, report

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


def table(path, rows, head="image,caption"):
    return write(path, "\n".join([head, *rows]) + "\n")


def refused(words, name, folder, **more):
    """photos() ends in one sentence with these words."""
    with pytest.raises(UserError, match=words) as error:
        photos(name, folder, **more)
    text = str(error.value)
    assert "\n" not in text and len(text.replace(str(folder), "DIR")) <= 300


def sizes(dataset):
    return [len(dataset.splits[split]) for split in layouts.SPLITS]


# -- captions ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, cleaned", [
    ("A dog, 2 cats.", "a dog cats"), ("A well-known dog's  bone - 'tis_so", "a well-known dog's bone - 'tis so"),
    ("Don\u2019t STOP\u2014now", "don't stop now"), ("Cafe\u0301", "caf\u00e9"), ("co\u00adop", "coop"),
    ("\u090f\u0915 \u0915\u0941\u0924\u094d\u0924\u093e \u0967\u0964",
     "\u090f\u0915 \u0915\u0941\u0924\u094d\u0924\u093e"),                                                # Hindi
    ("\u0e15\u0e31\u0e27 2", "\u0e15\u0e31\u0e27"),                                                          # Thai
    ("\u0ba8\u0bbe\u0baf\u0bcd!", "\u0ba8\u0bbe\u0baf\u0bcd"),                                             # Tamil
    ("\u0645\u06cc\u200c\u062f\u0648\u062f", "\u0645\u06cc\u200c\u062f\u0648\u062f"), ("I \u2764\ufe0f it", "i it"),
    ("\u72d7\u5728\u8dd1\u3002", "\u72d7\u5728\u8dd1"), ("!!! 12", ""),
    ("\uff34\u30b7\u30e3\u30c4 \uff88\uff7a\uff01", "t\u30b7\u30e3\u30c4 \u30cd\u30b3"),   # full, half width
    ("\ufedb\ufee0\ufe90 \u0643\u0644\u0628\u200f.", "\u0643\u0644\u0628 \u0643\u0644\u0628"),
    ('\u05e6\u05d4\u05f4\u05dc \u05e6\u05d4"\u05dc "\u05d2\u05f3"', '\u05e6\u05d4"\u05dc \u05e6\u05d4"\u05dc \u05d2\''),
    ("\u053b\u055e\u0576\u0579 \u0567\u0589", "\u056b\u0576\u0579 \u0567"), ("\u0130stanbul'da", "istanbul'da")])
def test_cleaning_keeps_the_letters_of_every_script_whole(text, cleaned):
    r"""A class of \w tears Hindi, Thai and Tamil into letters: their vowel signs are no \w."""
    assert clean_caption(text, "words") == cleaned == clean_caption(cleaned, "words")
    assert clean_caption(" a  DOG, ", "none") == "a DOG," and clean_caption(" a  DOG, ", "lower") == "a dog,"


@pytest.mark.parametrize("head, row", [
    ("image,caption", '7.jpg,"a dog, ""big"""'), ("split;caption;image", 'val;"a dog, ""big""";7.jpg'),
    ("image\tcaption\tsplit", '7.jpg\t"a dog, ""big"""\tval'),
    ("Image_Name| comment_number| Comment", '7.jpg| 0| a dog, "big"'),
    ('"id","file_name","text","x"', '3,./7.JPG,"a dog, ""big""",train'), ("image|caption", '7.jpg|"a dog, ""big"""'),
    ("image;caption", '7.jpg#4;a dog,  "big" ')])
def test_the_header_chooses_the_columns_whatever_separates_them(tmp_path, head, row):
    """A table with tabs and a header was once read by position: the split ended up in the caption, and the quotes."""
    captions, splits = read_captions(table(tmp_path / "captions.txt", [row, row], head))
    assert captions == {"7.jpg": ['a dog, "big"'] * 2} and splits == {"7.jpg": "val" if "split" in head else None}


def test_the_original_flickr_text_has_no_header_and_no_quoting(tmp_path):
    rows = ['7.jpg#0\t"Stop" , he says .', '7.jpg#1\t"a big dog"', "7.jpg#2\t ", "8.jpg#0\ta dog | 2"]
    notes = []
    captions, _ = read_captions(write(tmp_path / "Flickr8k.token.txt", "\ufeff" + "\r\n".join(rows)), notes)
    assert captions == {"7.jpg": ['"Stop" , he says .', '"a big dog"'], "8.jpg": ["a dog | 2"]}
    assert notes == ["1 rows of Flickr8k.token.txt without an image name or a caption were left out"]
    own = write(tmp_path / "captions.txt", '7.jpg\t"a ""big"" dog"\n8.jpg\ta')     # without #k: quoted as other tables
    assert read_captions(own)[0] == {"7.jpg": ['a "big" dog'], "8.jpg": ["a"]}


def test_a_caption_that_stands_twice_counts_twice(tmp_path):
    """On purpose: ten of Flickr8k's do, as two people wrote the same; Karpathy's files and coco-caption keep them."""
    file = table(tmp_path / "captions.csv", ["7.jpg,a dog", "7.jpg,a dog"])
    assert read_captions(file)[0] == {"7.jpg": ["a dog", "a dog"]}


def test_json_lines(tmp_path):
    rows = [{"file_name": "0.jpg", "text": "a\u2028dog,\x85runs"},
            {"Image": "1.jpg", "captions": ["one", "two"], "Split": "validation"}, {"image": "2.jpg", "caption": None}]
    path = write(tmp_path / "captions.jsonl", "\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    assert read_captions(path) == ({"0.jpg": ["a dog, runs"], "1.jpg": ["one", "two"]}, {"0.jpg": None, "1.jpg": "val"})


def test_every_column_of_captions_counts_and_others_are_said(tmp_path):
    """Of caption_1 .. caption_5 none may be lost, and a caption_fr beside them is not silently passed over."""
    notes = []
    path = table(tmp_path / "a.csv", ['7.jpg,a,b,un,"[""x"", ""y""]"', "8.jpg,nan,,deux,None"],
                 "Image Name,Caption 1,caption_2,caption_fr,caption3")
    assert read_captions(path, notes)[0] == {"7.jpg": ["a", "b", "x", "y"]}
    assert notes == ["columns of a.csv that are not read: caption_fr",
                     "1 rows of a.csv without an image name or a caption were left out"]


@pytest.mark.parametrize("name, content, words", [
    ("a.csv", "image,image_2,caption\n7.jpg,8.jpg,a", "several columns"),
    ("a.jsonl", '[["image", "7.jpg"]]', "each line should be one"),
    ("a.csv", "image,captions\n7.jpg,\"['a', 'b']\"", "not in a known layout"),
    ("a.csv", "image,caption,text\n7.jpg,a,b", "several columns for one thing .image, caption, text"),
    ("a.jsonl", '{"image": "7.jpg", "caption": "a", "text": "b"}', "several columns"),
    ("a.csv", "image,caption\n7.jpg,a dog, a cat", "row of 7.jpg has more cells"),
    ("a.txt", "image\tcaption\n7.jpg\ta dog\ttrain", "row of 7.jpg has more cells"),
    ("a.txt", "7.jpg#0\ta dog\ttrain", "row of 7.jpg#0 has more cells"), ("a.csv", "7.jpg,a dog", "should begin with"),
    ("a.txt", "picture\twords\n7.jpg\ta dog", "should begin with"), ("a.csv", "", "should begin with"),
    ("a.csv", "image,caption\n7.jpg", "holds no captions"), ("a.jsonl", '{"img": "7.jpg"}', "holds no captions"),
    ("a.csv", 'image,caption\n0.jpg,"a dog\n1.jpg,"a cat"', "quote"),
    ("a.csv", 'image,caption\n0.jpg,"open' + "x" * 200_000, "quote"), ("a.jsonl", "[3]", "not in a known layout"),
    ("a.jsonl", '{"image": 3, "text": "a"}', "row of 3 has 3 where a text should be"),
    *[("a.jsonl", f'{{"image": "7.jpg", "captions": {cell}}}', "row of '7.jpg' has .* where a text should be")
      for cell in ("3", "true", "[3]", '["a", null]', '{"en": "a"}', '[["a"]]')],
    ("a.csv", "image,caption,split\n7.jpg,a,holdout", "gives '7.jpg' the split 'holdout'"),
    ("a.csv", "image,caption,split\n7.jpg,a,val\n7.jpg,b,train", "gives '7.jpg' the split 'train', and elsewhere 'val'"),
    ("a.csv", b"image,caption\n7.jpg,caf\xe9", "not UTF-8 .byte 23.; save it as UTF-8"),
    ("dataset_coco.json", '{"images": [{"filename": "a", "split": "x", "sentences": [{"raw": "a"}]}]}', "split 'x'"),
    ("captions_val2014.json", '{"images": [{"id": 1}], "annotations": [{"image_id": 2, "caption": "a"}]}', "is not"),
    ("captions_val2014.json", "{", "is not a readable JSON")])
def test_what_could_mean_two_things_or_nothing_is_refused(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=words) as error:
        read_captions(tmp_path / name)
    assert name in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 400


# -- which image, which file, which split ------------------------------------------------------------------------------

def test_a_folder_of_ones_own_and_its_report(tmp_path):
    pictures(tmp_path, [*(f"Images/{k}.jpg" for k in range(12)), "._0.jpg", ".thumbnails/0.jpg"])
    table(tmp_path / "captions.csv", [f"{k}.jpg,a dog {j}" for k in range(10) for j in range(3)])
    ds = photos("folder", tmp_path)
    assert sizes(ds) == [8, 1, 1] and sorted(sum(ds.splits.values(), [])) == list(range(10))    # ten photos can train
    assert ds.names[3] == "Images/3.jpg" and ds.open(3).size == (8, 8) and ds.captions[3][1] == "a dog 1"
    assert ds.splits == photos("folder", tmp_path).splits != photos("folder", tmp_path, seed=1).splits
    assert "2 images in the folder have no caption and were left out, such as Images/10.jpg" in ds.notes
    assert report(ds).startswith("folder: 10 images, 30 captions\n  train      8 images      24 captions\n  val")
    table(tmp_path / "captions.csv", ["0.jpg,a", "1.jpg,b"])
    refused("2 captioned images in .* give splits of 0/1/1", "folder", tmp_path)
    table(tmp_path / "captions.csv", ["0.jpg,a", "1.jpg,b", "20.jpg,c"])
    refused("captions.csv names 1 images that are not in .*20.jpg.*--allow-broken", "folder", tmp_path)
    (tmp_path / "captions.csv").unlink()
    refused("holds no captions.txt, captions.csv", "folder", tmp_path)
    refused("there is no folder .*no; name one with", "folder", tmp_path / "no")


def test_a_missing_image_is_missing_though_another_has_its_name(tmp_path):
    """cats/8.jpg is not there; dogs/8.jpg was once taken for it."""
    pictures(tmp_path, [f"dogs/{k}.jpg" for k in range(9)] + [f"cats/{k}.jpg" for k in range(8)])
    table(tmp_path / "captions.csv", [f"cats/{k}.jpg,a cat" for k in range(9)] + ["dogs/1.jpg,a dog"])
    refused(r"names 1 images that are not in .* \(such as 'cats/8.jpg'\)", "folder", tmp_path)
    table(tmp_path / "captions.csv", ["images/8.jpg,a dog", "img/8.jpg,a cow"])
    refused("captions to dogs/8.jpg a second time, as img/8.jpg", "folder", tmp_path)


def test_all_caption_files_of_one_name_are_read_and_their_folders_are_the_splits(tmp_path):
    """Only the first by alphabet was read, which is the test set. The same names stand in each of them."""
    for split, n, colour in (("train", 5, "blue"), ("validation", 2, "lime"), ("test", 3, "red")):
        pictures(tmp_path / split, [f"img/{k}.png" for k in range(n)], colour)
        write(tmp_path / split / "metadata.jsonl", "\n".join(
            json.dumps({"file_name": f"{k}.png", "text": split}) for k in range(n)))
    ds = photos("folder", tmp_path)
    assert sizes(ds) == [5, 2, 3] and ds.notes == ["official split 5/2/3"]
    for split, colour in (("train", (0, 0, 255)), ("test", (255, 0, 0))):
        assert {(ds.captions[i][0], ds.open(i).getpixel((0, 0))) for i in ds.splits[split]} == {(split, colour)}
    (tmp_path / "train" / "img" / "4.png").unlink()
    refused("train/metadata.jsonl names 1 images .*such as '4.png'", "folder", tmp_path)
    os.rename(tmp_path / "train", tmp_path / "more")
    refused("give a split to some images and none to more/img/0.png", "folder", tmp_path, allow_broken=True)
    table(tmp_path / "captions.csv", ["test/img/0.png,a"])
    refused("holds captions in captions.csv and in more/metadata.jsonl; keep what", "folder", tmp_path)
    (tmp_path / "captions.csv").unlink()
    write(tmp_path / "metadata.jsonl", '{"file_name": "test/img/0.png", "text": "a"}')
    refused("test/metadata.jsonl gives captions to test/img/0.png a second time", "folder", tmp_path, allow_broken=True)


def test_a_split_column_and_split_folders_are_the_split(tmp_path):
    pictures(tmp_path / "a", [f"{k}.jpg" for k in range(6)])
    words = ["train", "Training", "dev", "test", "train", "test"]
    table(tmp_path / "a" / "captions.csv", [f"{k}.jpg,a,{word}" for k, word in enumerate(words)], "image,caption,split")
    assert photos("folder", tmp_path / "a").splits == {"train": [0, 1, 4], "val": [2], "test": [3, 5]}
    table(tmp_path / "a" / "captions.csv", [f"{k}.jpg,a,{'test' * (k > 3)}" for k in range(6)], "image,caption,split")
    refused("give a split to some images and none to 0.jpg", "folder", tmp_path / "a")
    pictures(tmp_path / "b", names := [f"{split}/{k}.jpg" for k in range(4) for split in ("train", "val", "test")])
    table(tmp_path / "b" / "captions.csv", [f"{name},{name[:4]}" for name in names])
    ds = photos("folder", tmp_path / "b")
    assert sizes(ds) == [4, 4, 4] and {ds.captions[i][0] for i in ds.splits["test"]} == {"test"}


@pytest.mark.parametrize("names", [("train.txt", "dev.txt", "test.txt"), ("my_train_images.lst", "VAL-ids.txt", "test.csv")])
@pytest.mark.parametrize("form", ["{}.jpg", "./{}.jpg", "{}"])
def test_lists_of_ones_own_are_the_split(tmp_path, names, form):
    """A train.txt beside the captions was passed over, and another split was drawn: scores of images trained on."""
    pictures(tmp_path, [f"{k}.jpg" for k in range(9)])
    table(tmp_path / "captions.csv", [f"{k}.jpg,a dog" for k in range(9)])
    for name, members in zip(names, (range(4), range(4, 6), range(6, 9))):
        write(tmp_path / "lists" / name, "\n".join(form.format(k) for k in members))
    ds = photos("folder", tmp_path)
    assert ds.splits == {"train": [0, 1, 2, 3], "val": [4, 5], "test": [6, 7, 8]} and ds.notes == ["official split 4/2/3"]
    (tmp_path / "lists" / names[0]).unlink()                    # what no list tells
    assert photos("folder", tmp_path).splits == ds.splits
    write(tmp_path / "splits.json", {"train": ["0.jpg"]})
    write(tmp_path / "lists" / names[1], "4.jpg\n40.jpg")
    ds = photos("folder", tmp_path)
    assert sizes(ds) == [5, 1, 3] and ds.notes[0].startswith("splits.json is not read") and any(
        f"1 of the 2 lines of lists/{names[1]} name no image" in note for note in ds.notes)
    table(tmp_path / "captions.csv", [f"{k}.jpg,a,{word}" for k, word in enumerate(["train"] * 5 + ["val", "test"] * 2)],
          "image,caption,split")
    assert sizes(ds := photos("folder", tmp_path)) == [5, 2, 2] and "not of the lists of" in "".join(ds.notes)


def test_images_of_a_kind_that_is_not_read_are_said_to_be_so(tmp_path):
    """They were "not in the folder", although they are."""
    for kind in ("ppm", "jp2", "ico", "svg", "tga", "xcf"):
        write(tmp_path / kind / f"0.{kind}", "x")
        table(tmp_path / kind / "captions.csv", [f"0.{kind},a dog"])
        refused(f"names 1 images that are of a kind that is not read.*'0.{kind}'.*convert", "folder", tmp_path / kind)
    table(tmp_path / "xcf" / "captions.csv", ["http://a.org/0.jpg?size=3,a dog"])
    refused("names 1 images that are not in", "folder", tmp_path / "xcf")


def test_missing_splits_are_held_out_and_noted():
    names, notes = [f"{i}" for i in range(40)], []
    lists = {"train": set(names[:30]), "val": set(names[30:38])}
    order = make_splits(names, lists, 0, notes, "DIR")
    assert order["test"] == list(range(30, 38)) and len(order["val"]) == 3 and len(order["train"]) == 27
    assert sorted(order["train"] + order["val"]) == list(range(30))
    assert "val split is the test set" in notes[0] and "27/3/8; 2 images are in none" in notes[0]
    assert make_splits(names, lists, 0, notes, "DIR") == order != make_splits(names, lists, 1, notes, "DIR")
    alone = make_splits(names, {"val": set(names)}, 0, notes, "DIR")
    assert [len(v) for v in alone.values()] == [32, 4, 4] and "80/10/10" in notes[-1]
    with pytest.raises(UserError, match="DIR name an image twice"):
        make_splits(names, {"train": {"5", "6"}, "val": {"7"}, "test": {"5"}}, 0, notes, "DIR")
    with pytest.raises(UserError, match="40 captioned images in DIR give splits of 2/1/0"):
        make_splits(names, {"train": {"5", "6"}, "val": {"7"}, "test": {"x"}}, 0, notes, "DIR")


def test_left_and_right_in_any_case_are_never_mirrored():
    captions = [["a", "LEFT of a cat"], ["a bright leftover"], ["the rightmost dog"], ["a left-hand drive"], ["a"]]
    ds = Dataset("toy", list("abcde"), captions, {})
    assert [ds.may_flip(i) for i in range(5)] == [False, True, False, False, True]


# -- labels ------------------------------------------------------------------------------------------------------------

def test_labels_are_read_as_captions_are(tmp_path):
    """Names once had to be written as we print them: "7.jpg" for Images/7.jpg was the label of no image, silently."""
    dataset, notes = Dataset("folder", [f"Images/{k}.jpg" for k in range(3)], [], {}, tmp_path), []
    rows = ["0.jpg;colour;red;x", ".\\1.JPG;colour; dark  red ;x", "2.jpg;colour;;x", "8.jpg;colour;red;x"]
    path = table(tmp_path / "labels.csv", rows, "Image;Category;Label;who")
    assert read_labels(path, dataset, notes) == {0: {"colour": "red"}, 1: {"colour": "dark red"}}
    assert notes == [f"1 of 3 labels of {path} are of images not in folder, such as '8.jpg'"]
    for rows, fault in ((["0.jpg,c,red", "0.jpg,c,blue"], "gives '0.jpg' two labels of 'c': 'blue' and 'red'; keep one"),
                        (["8.jpg,c,red"], "labels no image of folder .1 labels, of others"),
                        (["0.jpg,c,red,blue"], "more cells than the header"), ([], "holds no label")):
        with pytest.raises(UserError, match=fault):
            read_labels(table(path, rows, "image,category,label"), dataset, [])
    with pytest.raises(UserError, match="should begin with the line `image,category,label`"):
        read_labels(table(path, ["0.jpg,red"], "image,colour"), dataset, [])


# -- Flickr ------------------------------------------------------------------------------------------------------------

def karpathy_json(path, members):
    """members: [(file name, folder or None, split)]"""
    images = [{"filename": name, "split": split, "imgid": k, **({"filepath": sub} if sub else {}),
               "sentences": [{"raw": f"K{k}  says {j}. ", "tokens": ["k"]} for j in range(5)]}
              for k, (name, sub, split) in enumerate(members)]
    return write(path, {"images": images, "dataset": "any"})


def test_flickr8k_as_text_and_as_kaggles_zip_with_the_official_lists(tmp_path):
    pictures(tmp_path, [f"Flicker8k_Dataset/{k}.jpg" for k in range(120)])
    lines = [f"{k}.jpg#{j}\tA dog , number {k} ." for k in range(120) for j in range(5)]
    lines.append("2258277193_586949ec62.jpg.1#0\ta boat")                           # stands so in the real file
    write(tmp_path / "text" / "Flickr8k.token.txt", "\n".join(lines))
    for name, members in (("train", range(80)), ("dev", range(80, 99)), ("test", range(99, 118))):
        write(tmp_path / "text" / f"Flickr_8k.{name}Images.txt", "".join(f"{k}.jpg\n" for k in members))
    ds = photos("flickr8k", tmp_path)
    assert sizes(ds) == [80, 19, 19] and len(ds.names) == 120 and len(ds.captions[7]) == 5
    assert "1 of 121 images of" in ds.notes[0] and "2 images are in none" in ds.notes[1]
    table(tmp_path / "captions.txt", [f'{k}.jpg,"a dog, {k}"' for k in range(120)])
    kaggle = photos("flickr8k", tmp_path)
    assert kaggle.splits == ds.splits and kaggle.captions[3] == ["a dog, 3"]
    assert "captions are those of captions.txt, not of Flickr8k.token.txt" in kaggle.notes
    write(tmp_path / "Flickr_8k.testImages.txt", "3.jpg")                         # all lists of one name are read
    refused("split lists in .* name an image twice", "flickr8k", tmp_path)
    table(tmp_path / "captions.csv", ["1.jpg,a"])
    refused("holds captions in captions.txt and in text/Flickr8k.token.txt and in captions.csv", "flickr8k", tmp_path)


def test_kaggles_flickr30k_with_bars_and_two_copies_of_everything(tmp_path):
    rows = ["1000.jpg| 0| Two men , one  with a bar .", "1000.jpg| 1|2 dogs", "77.jpg|1 |  ", "",
            "2199200615.jpg| 3| A dog .", "2199200615.jpg| 4   A dog runs .", '77.jpg| 0| "Stop" , he says  3   times']
    for sub in ("flickr30k_images", "flickr30k_images/flickr30k_images"):
        pictures(tmp_path / sub, [f"{k}.jpg" for k in (1000, 77, 2199200615)])
        table(tmp_path / sub / "results.csv", rows, "image_name| comment_number| comment")
    ds = photos("flickr30k", tmp_path)
    assert dict(zip([Path(name).name for name in ds.names], ds.captions)) == {
        "1000.jpg": ["Two men , one with a bar .", "2 dogs"], "77.jpg": ['"Stop" , he says 3 times'],
        "2199200615.jpg": ["A dog ."]}                          # one row of the real file lacks its second bar, too
    assert ds.notes[:2] == ["columns of results.csv that are not read: comment_number",
                            "2 rows of results.csv without an image name or a caption were left out"]


def hub_table(path, splits, raw=lambda k: [f'a dog, "{k}"', "two\u2028dogs"]):
    with open(path, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["raw", "sentids", "split", "filename", "img_id"])
        rows.writerows([json.dumps(raw(k)), "[0, 1]", split, f"{k}.jpg", k] for k, split in enumerate(splits))


def test_the_hubs_flickr30k_and_karpathys_split_beside_other_captions(tmp_path):
    pictures(tmp_path, [f"flickr30k-images/flickr30k-images/{k}.jpg" for k in range(6)])
    hub_table(tmp_path / "flickr_annotations_30k.csv", ["train", "train", "val", "train", "test", "val"])
    table(tmp_path / "results.csv", ["0.jpg| 0| other"], "image_name| comment_number| comment")
    ds = photos("flickr30k", tmp_path)
    assert ds.splits == {"train": [0, 1, 3], "val": [2, 5], "test": [4]} and "official split 3/2/1" in ds.notes
    assert ds.captions[3] == ['a dog, "3"', "two dogs"]
    assert "captions are those of flickr_annotations_30k.csv, not of results.csv" in ds.notes
    karpathy_json(tmp_path / "dataset_flickr30k.json", [("0.jpg", None, "train"), ("1.jpg", None, "test"),
                                                        ("2.jpg", None, "val"), ("3.jpg", None, "train")])
    karpathy_json(tmp_path / "dataset_coco.json", [("9.jpg", None, "train")])     # caption_datasets.zip holds all three
    ds = photos("flickr30k", tmp_path)
    assert ds.splits == {"train": [0, 3], "val": [2], "test": [1]} and ds.captions[1][0] == "K1 says 0."


# -- COCO --------------------------------------------------------------------------------------------------------------

def file_of(k, subset):
    return f"COCO_{subset}_{k:012d}.jpg" if "2014" in subset else f"{k:012d}.jpg"


def annotations(ids, subset, n_captions=lambda k: 5):
    images = [{"id": k, "file_name": file_of(k, subset), "height": 8, "width": 8,
               "coco_url": f"http://images.cocodataset.org/{subset}/{file_of(k, subset)}"} for k in ids]
    rows = [{"id": 100 * k + j, "image_id": k, "caption": f"image {k}\n caption {j}"}
            for k in reversed(ids) for j in range(n_captions(k))]
    return {"info": {}, "licenses": [], "images": images, "annotations": rows}


def official(folder, year=2014, n_train=20, n_val=4, where="{}/{}", **more):
    for subset, ids in ((f"train{year}", range(n_train)), (f"val{year}", range(100, 100 + n_val))):
        write(folder / "annotations" / f"captions_{subset}.json", annotations(ids, subset, **more))
        write(folder / "annotations" / f"instances_{subset}.json", "never opened")
        pictures(folder, [where.format(subset, file_of(k, subset)) for k in ids], "red" if ids[0] else "blue")
    return folder


@pytest.mark.parametrize("year, where", [(2014, "{}/{}"), (2017, "{}/{}"), (2014, "images/{}/{}"), (2017, "all/{1}")])
def test_official_coco_wherever_the_images_lie(tmp_path, year, where):
    ds = photos("coco", official(tmp_path, year, where=where, n_captions=lambda k: 7 if k == 3 else 5))
    assert sizes(ds) == [18, 2, 4] and sorted(ds.splits["train"] + ds.splits["val"]) == list(range(20))
    assert ds.captions[3] == [f"image 3 caption {j}" for j in range(7)]           # all are kept
    assert ds.open(0).getpixel((0, 0))[2] > 200 and ds.open(ds.splits["test"][0]).getpixel((0, 0))[0] > 200
    assert any("official val split is the test set" in note and "18/2/4" in note for note in ds.notes)
    for path in tmp_path.rglob("*000010?.jpg"):
        path.unlink()
    refused("captions_val.*.json names 4 images that are not", "coco", tmp_path)


def test_karpathys_coco_with_restval(tmp_path):
    """restval, most of the official val, is for training; captions are the raw ones; no other json is needed."""
    members = [(file_of(k, sub), sub, split) for k, (sub, split) in enumerate(
        [("train2014", "train")] * 2 + [("val2014", "restval"), ("val2014", "val"), ("val2014", "test")])]
    pictures(tmp_path, [f"{sub}/{name}" for name, sub, _ in members])
    karpathy_json(tmp_path / "dataset_coco.json", members)
    write(tmp_path / "annotations" / "captions_train2014.json", "never opened")
    ds = photos("coco", tmp_path)
    assert ds.splits == {"train": [0, 1, 2], "val": [3], "test": [4]} and ds.captions[4][0] == "K4 says 0."
    assert photos("coco", tmp_path, stream=True).urls[4] == S3 + "val2014/COCO_val2014_000000000004.jpg"


def test_coco_of_two_years_is_one_and_never_both(tmp_path):
    """The same images under other names, split anew: together they would be a test set that was trained on."""
    official(official(tmp_path), 2017)
    assert sizes(ds := photos("coco", tmp_path)) == [18, 2, 4] and "not of captions_*2017.json" in ds.notes[0]


# -- downloads ---------------------------------------------------------------------------------------------------------

@pytest.fixture
def server(tmp_path, monkeypatch):
    """Stands in for download(). files: {end of the address: {member: text} of a zip, or a text}; requests: names."""
    files, requests = {}, []

    def fake(url, path):
        requests.append(path.name)
        content = next((files[end] for end in files if url.endswith(end)), None)
        if content is None:
            raise UserError(f"cannot fetch {url}: no")
        if isinstance(content, str):
            return write(path, content)
        with zipfile.ZipFile(path, "w") as z:
            for name, text in content.items():
                z.writestr(name, text)
        return path
    monkeypatch.setattr(layouts, "download", fake)
    monkeypatch.chdir(tmp_path)
    return SimpleNamespace(files=files, requests=requests)


def fetched(dataset, stream=False, data_dir=None):
    return open_photos(SimpleNamespace(dataset=dataset, data_dir=data_dir, seed=0, allow_broken=False, stream=stream))


def test_flickr30k_is_downloaded_once_captions_last(server, tmp_path):
    server.files["flickr30k-images.zip"] = {f"flickr30k-images/{k}.jpg": "x" for k in range(3)}
    for _ in range(2):
        with pytest.raises(UserError, match="cannot fetch .*flickr_annotations_30k.csv"):
            fetched("flickr30k")
    hub_table(tmp_path / "table.csv", layouts.SPLITS)
    server.files["flickr_annotations_30k.csv"] = (tmp_path / "table.csv").read_text("utf-8")
    for _ in range(2):
        assert fetched("flickr30k").splits == {"train": [0], "val": [1], "test": [2]}
    assert server.requests == ["flickr30k-images.zip"] + 3 * ["flickr_annotations_30k.csv"]


def test_coco_streams_from_its_annotations_alone_then_completes(server):
    """--stream downloads one file; without it the images follow, and a download that broke off goes on."""
    server.files["annotations_trainval2014.zip"] = {
        f"annotations/captions_{s}2014.json": json.dumps(annotations(ids, f"{s}2014"))
        for s, ids in (("train", range(20)), ("val", range(100, 104)))}
    urls = fetched("coco", stream=True).urls
    assert len(urls) == 24 and urls[0] == f"{S3}train2014/COCO_train2014_000000000000.jpg"
    write(Path("data/coco/stream/ab/1.jpg"), "a streamed image")
    server.files["train2014.zip"] = {f"train2014/{file_of(k, 'train2014')}": "x" for k in range(20)}
    with pytest.raises(UserError, match="cannot fetch .*zips/val2014.zip"):
        fetched("coco")
    server.files["val2014.zip"] = {f"val2014/{file_of(k, 'val2014')}": "x" for k in range(100, 104)}
    for _ in range(2):
        assert len(fetched("coco").names) == 24
    assert server.requests == ["annotations_trainval2014.zip", "train2014.zip", "val2014.zip", "val2014.zip"]
    assert not os.path.exists("data/coco/zips")


def test_what_is_there_by_hand_is_not_downloaded_again(server, tmp_path):
    official(tmp_path / "data" / "coco", 2017)
    assert len(fetched("coco").names) == 24
    with pytest.raises(UserError, match="there is no folder .*no;"):
        fetched("flickr8k", data_dir=str(tmp_path / "no"))
    assert server.requests == []
