"""Public data sets as they lie on disk: captions, splits and images of every layout that people have.

A `Dataset` is images by number, captions by image number, and three splits. The readers here turn what was downloaded
(Kaggle's zip, the original text files, Karpathy's json, a folder of one's own) into one, and say aloud what they
decided or left out. data.py chooses among them and makes batches.
"""
import csv
import io
import json
import random
import re
import shutil
from pathlib import Path

from .config import UserError
from .download import download, extract_zip
from .image import load_image
from .weights import read_json


class Dataset:
    """names[i], captions[i] (a list) and open(i) (an RGB PIL image) of image i; splits: {"train": [i, ..], ..}."""

    def __init__(self, name, names, captions, splits, folder=None, notes=()):
        self.name, self.names, self.captions, self.splits = name, names, captions, splits
        self.folder, self.notes = folder, list(notes)           # notes: what was left out or decided, to be said aloud

    def open(self, i):
        return load_image(self.folder / self.names[i])

    def may_flip(self, i):
        """A mirrored image no longer fits a caption that says left or right."""
        return not any(re.search(r"\b(left|right)", caption, re.IGNORECASE) for caption in self.captions[i])


# ---------------------------------------------------------------------------------------------------------------------
# Photographs: a folder of images and a file of captions, in the layouts people have.

CAPTION_FILES = ("captions.txt", "Flickr8k.token.txt", "captions.csv", "captions.jsonl", "metadata.jsonl")
NAME_COLUMNS, CAPTION_COLUMNS = ("image", "file_name", "filename", "image_name"), ("caption", "text", "comment")
IMAGE_TYPES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
KAGGLE_FLICKR8K = "https://www.kaggle.com/api/v1/datasets/download/adityajn105/flickr8k"
GITHUB_FLICKR8K = "https://github.com/jbrownlee/Datasets/releases/download/Flickr8k/"


def find_files(folder, names):
    """The files of the given names in a folder or up to two folders below it, in the order of `names`."""
    found = {}
    for depth in ("*", "*/*", "*/*/*"):
        for path in sorted(folder.glob(depth)):
            if path.name in names and "__MACOSX" not in path.parts:
                found.setdefault(path.name, path)
    return [found[name] for name in names if name in found]


def read_captions(path):
    """A caption file of any public layout -> {image name: [caption, ..]} in file order, and the number of bad lines.

    CSV with a header (image,caption: quotes obeyed; Kaggle), `name.jpg#2<TAB>caption` (the original Flickr text),
    `name.jpg<TAB>caption`, or one json object a line with image/file_name and caption/captions/text.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the captions in {path}: {error}") from None
    captions, bad = {}, 0
    try:
        for name, caption in _jsonl_rows(text, path) if path.suffix == ".jsonl" else _table_rows(text, path):
            if name.strip() and caption.strip():
                captions.setdefault(name.strip(), []).append(" ".join(caption.split()))
            else:
                bad += 1
    except csv.Error as error:
        raise UserError(f"{path} is no proper CSV ({error}); a quote left open is the usual cause") from None
    if not captions:
        raise UserError(f"{path} holds no captions; each line should name an image and say what it shows")
    return captions, bad


def _table_rows(text, path):
    if "\t" in text.partition("\n")[0]:
        for number, line in enumerate(text.splitlines()):
            name, _, caption = line.partition("\t")
            if number or name.strip().lower() not in NAME_COLUMNS:                # a header is welcome, not required
                yield re.sub(r"#\d+$", "", name), caption
        return
    rows = csv.reader(io.StringIO(text), skipinitialspace=True)
    header = [cell.strip().lower() for cell in next(rows, [])]
    name = next((header.index(n) for n in NAME_COLUMNS if n in header), None)
    caption = next((header.index(n) for n in CAPTION_COLUMNS if n in header), None)
    if name is None or caption is None:
        raise UserError(f"{path} should begin with the line `image,caption`, not {','.join(header)[:60]!r}")
    for row in rows:
        if len(row) > len(header) and caption != len(header) - 1:
            raise UserError(f"line {rows.line_num} of {path} has more cells than the header; put quotes round commas")
        if row:             # commas without quotes split a caption that stands last; cutting it there would be silent
            yield row[name] if len(row) > name else "", ", ".join(row[caption:] if caption + 1 == len(header) else
                                                                  row[caption:caption + 1])


def _jsonl_rows(text, path):
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name = row.get("image") or row["file_name"]
            texts = row.get("captions") or [row.get("caption") or row["text"]]
            if not isinstance(name, str) or not isinstance(texts, list) or not all(isinstance(t, str) for t in texts):
                raise ValueError
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
            wanted = '{"image": "a.jpg", "caption": "a dog"}'
            raise UserError(f"line {number} of {path} should be like {wanted}") from None
        for caption in texts:
            yield name, caption


def find_images(folder, names):
    """{name: path within folder} of the named images that are there: by path, or by file name wherever it lies."""
    by_path, by_name = {}, {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in IMAGE_TYPES and "__MACOSX" not in path.parts:
            inner = path.relative_to(folder).as_posix()
            by_path[inner] = inner
            by_name.setdefault(path.name, []).append(inner)
    found = {}
    for name in names:
        there = [by_path[name]] if name in by_path else by_name.get(Path(name).name, [])
        if len(there) > 1:
            raise UserError(f"{name} could be {there[0]} or {there[1]} in {folder}; write its folder there as well")
        if there:
            found[name] = there[0]
    return found


def read_split_files(folder):
    """The official Flickr8k split, {"train": {name, ..}, ..}, or None when its three lists are not there."""
    paths = find_files(folder, ["Flickr_8k.trainImages.txt", "Flickr_8k.devImages.txt", "Flickr_8k.testImages.txt"])
    try:
        if len(paths) == 3:
            lists = {split: set(path.read_text().split()) for split, path in zip(("train", "val", "test"), paths)}
        else:
            paths = find_files(folder, ["dataset_flickr8k.json", "dataset.json"])      # Karpathy's
            if not paths:
                return None
            images = read_json(paths[0])["images"]
            lists = {s: {x["filename"] for x in images if x["split"] == s} for s in ("train", "val", "test")}
    except (UnicodeDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{paths[0]} is no list of a split ({error}); mend or remove it") from None
    twice = lists["train"] & lists["val"] | lists["train"] & lists["test"] | lists["val"] & lists["test"]
    if twice:
        raise UserError(f"the split lists in {folder} name {len(twice)} images twice, such as {min(twice)}; mend them")
    return lists


def photos(name, folder, seed=0, allow_broken=False):
    """A Dataset from a folder of images with one caption file. Raises UserError naming what is missing."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; give the right one with --data-dir")
    files = find_files(folder, CAPTION_FILES)
    if not files:
        raise UserError(f"{folder} holds no captions.txt, captions.csv, captions.jsonl or Flickr8k.token.txt; add one "
                        "that names each image and says what it shows (README: your own photos)")
    captions, bad = read_captions(files[0])
    found = find_images(folder, captions)
    notes = [f"{bad} caption lines without an image name or text were left out"] if bad else []
    absent = [n for n in captions if n not in found]
    if absent:
        notes.append(f"{len(absent)} of {len(captions)} captioned images are not in the folder: {', '.join(absent[:5])}"
                     + (" .." if len(absent) > 5 else ""))
        if len(absent) > 0.01 * len(captions) and not allow_broken:
            raise UserError(f"{files[0]} names {len(absent)} images that are not in {folder} (such as {absent[0]}); "
                            "add them, or go on without them with --allow-broken")
    splits = read_split_files(folder)
    names = list(found)
    if splits:
        order = {split: [i for i, n in enumerate(names) if n in splits[split]] for split in splits}
        left = len(names) - sum(map(len, order.values()))
        notes.append(f"official split {'/'.join(str(len(v)) for v in order.values())}" +
                     (f"; {left} images are in none of its lists and stay unused" if left else ""))
    else:
        shuffled = random.Random(seed).sample(range(len(names)), len(names))
        tenth = max(1, len(names) // 10)
        order = {"train": sorted(shuffled[2 * tenth:]), "val": sorted(shuffled[:tenth]),
                 "test": sorted(shuffled[tenth:2 * tenth])}
        notes.append(f"no official split here: 80/10/10 by seed {seed}; scores are not comparable with published ones")
    for split, members in order.items():
        if not members:
            raise UserError(f"the {split} split of {folder} is empty: {len(names)} captioned images are too few, or "
                            "the split lists name other files")
    return Dataset(name, [found[n] for n in names], [captions[n] for n in names], order, folder, notes)


def fetch_flickr8k(folder):
    """Download Flickr8k: the two zips of the text layout, or else Kaggle's copy of it. About 1.1 GB.

    The captions come last: where they are, the images are whole, and load_dataset need not ask again. Lengths are
    checked against what the server announced, contents by the zips' own checksums; the publishers give no others.
    """
    zips = folder / "zips"
    try:
        for name in ("Flickr8k_Dataset.zip", "Flickr8k_text.zip"):
            extract_zip(download(GITHUB_FLICKR8K + name, zips / name), folder / name[:-4])
    except UserError as first:
        print(f"{first}\ntrying the next mirror")
        try:
            extract_zip(download(KAGGLE_FLICKR8K, zips / "flickr8k.zip"), folder / "flickr8k")
        except UserError as second:
            raise UserError(f"no mirror of Flickr8k answered: {first}; {second}") from None
    shutil.rmtree(zips)
