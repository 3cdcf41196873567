"""Public data sets as they lie on disk: captions, splits and images of every layout that people have.

A `Dataset` is images by number, captions by image number, and three splits. The readers here turn what was downloaded
(Kaggle's zip, the original text files, Karpathy's json, COCO's json, a folder of one's own) into one, and say aloud
what they decided or left out. `open_photos` chooses among them; data.py makes batches.
"""
import contextlib
import csv
import gc
import io
import json
import os
import random
import re
import shutil
from collections import Counter
from functools import partial
from pathlib import Path

from .config import UserError
from .download import download, extract_zip, locked
from .image import load_image
from .weights import read_json


class Dataset:
    """names[i], captions[i] (a list) and open(i) (an RGB PIL image) of image i; splits: {"train": [i, ..], ..}.

    Images that are not on this disk have urls[i], and an `opener` that is given i and fetches the image.
    """

    def __init__(self, name, names, captions, splits, folder=None, notes=(), urls=None, opener=None):
        self.name, self.names, self.captions, self.splits = name, names, captions, splits
        self.folder, self.notes = folder, list(notes)           # notes: what was left out or decided, to be said aloud
        self.urls, self.opener = urls, opener

    def open(self, i):
        return self.opener(i) if self.opener else load_image(self.folder / self.names[i])

    def may_flip(self, i):
        """A mirrored image no longer fits a caption that says left or right."""
        return not any(re.search(r"\b(left|right)", caption, re.IGNORECASE) for caption in self.captions[i])


# ---------------------------------------------------------------------------------------------------------------------
# Photographs: a folder of images and a file of captions, in the layouts people have.

CAPTION_FILES = ("captions.txt", "Flickr8k.token.txt", "captions.csv", "captions.jsonl", "metadata.jsonl")
NAME_COLUMNS, CAPTION_COLUMNS = ("image", "file_name", "filename", "image_name"), ("caption", "text", "comment")
KARPATHY_FILES = ("dataset_flickr8k.json", "dataset_flickr30k.json", "dataset_coco.json", "dataset.json")
FLICKR30K_FILES = ("flickr_annotations_30k.csv", "results.csv", "results_20130124.token")
IMAGE_TYPES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
KAGGLE_FLICKR8K = "https://www.kaggle.com/api/v1/datasets/download/adityajn105/flickr8k"
GITHUB_FLICKR8K = "https://github.com/jbrownlee/Datasets/releases/download/Flickr8k/"
HUB_FLICKR30K = "https://huggingface.co/datasets/nlphuji/flickr30k/resolve/main/"
COCO = "https://s3.amazonaws.com/images.cocodataset.org/"       # what http://images.cocodataset.org serves, with TLS
SPLITS = ("train", "val", "test")
MAX_LOST = 0.01                 # the share of images or annotations that may be missing without --allow-broken


@contextlib.contextmanager
def _layout(path, wanted, remedy="mend it or fetch it again"):
    """Whatever goes wrong in taking a file apart is one UserError: `PATH is not WANTED (what was wrong); REMEDY`."""
    try:
        yield
    except UnicodeDecodeError as error:                         # it carries the whole file: not for the screen
        raise UserError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    except (OSError, csv.Error, ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is not {wanted} ({error!r}); {remedy}") from None


def list_files(folder):
    """["a/b.jpg", ..]: every file in a folder, shallow ones first. One walk: the 123,287 images of COCO take a second.

    Linked folders count (large sets often lie on another disk), each once. Passed over: a Mac's resource forks under
    __MACOSX, which end in .jpg too, and what a killed run was unpacking.
    """
    found, seen, folder = [], set(), Path(folder)
    for root, folders, files in os.walk(folder, followlinks=True):
        real, inner = os.path.realpath(root), Path(root).relative_to(folder).as_posix()
        if real in seen:                                        # a link back up would never end
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(f for f in folders if f != "__MACOSX" and not f.endswith(".incomplete"))
        found += files if inner == "." else [f"{inner}/{file}" for file in files]
    return sorted(sorted(found), key=lambda path: path.count("/"))


def list_images(folder):
    """["b.jpg", "a/c.png", ..]: the images in and below a folder, but for hidden ones (thumbnails and the like)."""
    return [path for path in list_files(folder) if path.lower().endswith(IMAGE_TYPES) and "/." not in f"/{path}"]


def find_files(folder, names):
    """The files of the given names in a folder or up to two folders below it, in the order of `names`."""
    paths = [path for path in list_files(folder) if path.count("/") <= 2]
    found = {path.rpartition("/")[2]: path for path in reversed(paths)}                         # the shallowest wins
    return [folder / found[name] for name in dict.fromkeys(names) if name in found]


def read_captions(path, notes=None):
    """A caption file of any public layout -> {image name: [caption, ..]} in file order, and the number of bad lines.

    CSV with a header (image,caption: quotes obeyed; Kaggle), `name.jpg#2<TAB>caption` (the original Flickr text),
    `name.jpg<TAB>caption`, `name.jpg| 2| caption` with a header (Flickr30k at Kaggle), or one json object a line with
    image/file_name and caption/captions/text. The list `notes` hears of rows that were mended.
    """
    with _layout(path, "a readable file of captions"):
        text = path.read_text(encoding="utf-8-sig")
    captions, bad = {}, 0
    if text.partition("\n")[0].count("|") == 2:     # `2199200615.jpg| 4   A dog runs ..`: the second bar was forgotten
        text, mended = re.subn(r"(?m)^([^|\n]+\|[ \t]*\d+)[ \t]+(?![|\s])", r"\1| ", text)
        if mended and notes is not None:
            notes.append(f"{mended} rows of {path.name} lacked the bar before the caption and were mended")
    with _layout(path, "a proper CSV", "a quote left open, or not doubled, is the usual cause"):
        for name, caption in _jsonl_rows(text, path) if path.suffix == ".jsonl" else _table_rows(text, path):
            if name.strip() and caption.strip():
                captions.setdefault(name.strip(), []).append(" ".join(caption.split()))
            else:
                bad += 1
    if not captions:
        raise UserError(f"{path} holds no captions; each line should name an image and say what it shows")
    return captions, bad


def _table_rows(text, path):
    """`a.jpg#0<TAB>a dog`, or, below a header `image,caption`, `a.jpg,"a dog, asleep"` -> ("a.jpg", caption)."""
    head = text.partition("\n")[0]
    if "\t" in head:
        for number, line in enumerate(filter(str.strip, text.split("\n"))):
            name, _, caption = line.partition("\t")
            if number or name.strip().lower() not in NAME_COLUMNS:                # a header is welcome, not required
                yield re.sub(r"#\d+$", "", name), caption
        return
    if "|" in head:                         # bars without any quoting: whatever follows the last one is the caption's
        rows = (line.split("|", head.count("|")) for line in text.split("\n") if line.strip())
    else:
        rows = csv.reader(io.StringIO(text), skipinitialspace=True, strict=True)
    header = [cell.strip().lower() for cell in next(rows, [])]
    name = next((header.index(n) for n in NAME_COLUMNS if n in header), None)
    caption = next((header.index(n) for n in CAPTION_COLUMNS if n in header), None)
    if name is None or caption is None:
        raise UserError(f"{path} should begin with the line `image,caption`, not {','.join(header)[:60]!r}")
    for row in rows:
        if len(row) > len(header) and caption != len(header) - 1:
            raise UserError(f"line {rows.line_num} of {path} has more cells than the header; put quotes round commas")
        if row:             # commas without quotes split a caption that stands last; cutting it there would be silent
            end = None if caption + 1 == len(header) else caption + 1
            yield row[name] if len(row) > name else "", ", ".join(row[caption:end])


def _jsonl_rows(text, path):
    """`{"image": "a.jpg", "captions": ["a dog", "a pet"]}` -> ("a.jpg", "a dog"), ("a.jpg", "a pet")."""
    for number, line in enumerate(text.split("\n"), 1):         # splitlines() would also cut at U+2028
        if not line.strip():
            continue
        with _layout(f"line {number} of {path}", 'like {"image": "a.jpg", "caption": "a dog"}', "mend it"):
            row = json.loads(line)
            name = row.get("image") or row["file_name"]
            texts = row.get("captions") or [row.get("caption") or row["text"]]
            if not isinstance(name, str) or not isinstance(texts, list) or not all(isinstance(t, str) for t in texts):
                raise TypeError("the name and each caption should be a text")
        for caption in texts:
            yield name, caption


def find_images(folder, names, unique=False):
    """{name: path within folder} of the named images that are there: by path, by the end of a path, or by file name.

    "val/7.jpg" is found at val/7.jpg, else at all/val/7.jpg, else at pictures/7.jpg; of several there an error tells.
    The case of a suffix matters only where files differ by it: cameras write 7.JPG, and programs call it 7.jpg.
    unique: the publisher gave no two images one name, so of several copies the first will do.
    """
    def plain(path):
        stem, kind = os.path.splitext(path)
        return stem + kind.lower()                              # "val/7.JPG" -> "val/7.jpg"
    by_path, by_name, found = set(), {}, {}
    for path in list_images(folder):
        by_path.add(path)
        by_name.setdefault(plain(path).rpartition("/")[2], []).append(path)
    for name in names:
        there = [name] if name in by_path else by_name.get(plain(name).rpartition("/")[2], [])
        for spelled in (str, plain):
            if len(there) > 1:
                there = [path for path in there if f"/{spelled(path)}".endswith(f"/{spelled(name)}")] or there
        if len(there) > 1 and not unique:
            raise UserError(f"{name} could be {there[0]} or {there[1]} in {folder}; write its folder there as well")
        if there:
            found[name] = there[0]
    return found


def karpathy(path, name=None):
    """Karpathy's json (2015) -> {image name: [caption, ..]} and {"train": {image name, ..}, "val": .., "test": ..}.

    COCO's images have their folder in the name, val2014/COCO_val2014_000000000042.jpg, and its `restval`, the part of
    the official val that he tests nothing on, is for training. name: which data set it should be, to tell a mix-up.
    """
    captions, lists = {}, {}
    gc.disable()                    # searching COCO's 8 million words for circular rubbish takes longer than reading
    try:
        content = read_json(path)
    finally:
        gc.enable()
    with _layout(path, "in the layout of Karpathy's splits", "mend or remove it"):
        theirs = content.get("dataset", name)
        if name in DATASETS and name != "folder" and theirs != name:
            raise UserError(f"{path} is the split of {theirs}, not of {name}; put dataset_{name}.json there instead")
        for x in content["images"]:
            image = "/".join([x[key] for key in ("filepath", "filename") if key in x or key == "filename"])
            captions[image] = [" ".join(sentence["raw"].split()) for sentence in x.get("sentences", [])]
            lists.setdefault("train" if x["split"] == "restval" else x["split"], set()).add(image)
    return captions, lists


def read_split_files(folder, name=None):
    """The official split, {"train": {name, ..}, ..}: Flickr8k's three lists, or Karpathy's json, or None."""
    paths = find_files(folder, ["Flickr_8k.trainImages.txt", "Flickr_8k.devImages.txt", "Flickr_8k.testImages.txt"])
    if len(paths) == 3:
        with _layout(paths[0], "the list of a split (or one beside it is not)", "mend or remove it"):
            return {split: set(path.read_text().split()) for split, path in zip(SPLITS, paths)}
    paths = find_files(folder, (f"dataset_{name}.json", *KARPATHY_FILES))
    return karpathy(paths[0], name)[1] if paths else None


def check_absent(notes, absent, total, where, folder, allow_broken, what="captioned images"):
    """Note which of the `total` images that `where` names are absent. More than 1% of them are a UserError."""
    if absent:
        notes.append(f"{len(absent)} of {total} {what} are not in the folder: {', '.join(map(str, absent[:5]))}"
                     + (" .." if len(absent) > 5 else ""))
    if len(absent) > MAX_LOST * total and not allow_broken:
        raise UserError(f"{where} names {len(absent)} images that are not in {folder} (such as {absent[0]}); "
                        "add them, or go on without them with --allow-broken")


def make_splits(names, lists, seed, notes, folder):
    """{"train": [i, ..], "val": [..], "test": [..]}, places in `names`, from the official lists {split: {name, ..}}.

    Where val or test has no list, the other one is the test set, and a tenth of train (at most 5,000), drawn by the
    seed, is held out as val. With one list or none, or no train, all images are split 80/10/10.
    """
    lists, rng = {split: lists[split] for split in SPLITS if lists and split in lists}, random.Random(seed)
    order = {split: [i for i, n in enumerate(names) if n in lists[split]] for split in lists}
    times = Counter(n for members in lists.values() for n in members)
    left, twice = sum(n not in times for n in names), [n for n in times if times[n] > 1]
    if twice:
        raise UserError(f"the split lists in {folder} name {len(twice)} images twice, such as {min(twice)}; mend them")
    note = "official split"
    if "train" not in order or len(order) < 2:
        mixed, k, left = rng.sample(range(len(names)), len(names)), max(1, len(names) // 10), 0
        order = {"train": sorted(mixed[2 * k:]), "val": sorted(mixed[:k]), "test": sorted(mixed[k:2 * k])}
        note = f"no official split here: 80/10/10 by seed {seed}; scores are not comparable with published ones:"
    elif len(order) == 2:
        train, official = order["train"], "val" if "val" in order else "test"
        val = set(rng.sample(train, min(5000, len(train), max(1, len(train) // 10))))
        order = {"train": [i for i in train if i not in val], "val": sorted(val), "test": order[official]}
        note = f"the official {official} split is the test set here, and val was held out of train by seed {seed}:"
    notes.append(f"{note} {'/'.join(str(len(v)) for v in order.values())}" +
                 (f"; {left} images are in none of its lists and stay unused" if left else ""))
    for split, members in order.items():
        if not members:
            raise UserError(f"the {split} split of {folder} is empty: {len(names)} captioned images are too few, or "
                            "the split lists name other files")
    return order


def _assemble(name, folder, where, captions, lists, notes, seed, allow_broken, unique=True, urls=None):
    """The end of every reader: which images are there, how they are split. urls {name: url}: none need be there."""
    said = {n: texts for n, texts in captions.items() if any(texts)}
    if len(said) < len(captions):
        notes.append(f"{len(captions) - len(said)} images without a caption were left out")
    found = {n: n for n in said} if urls else find_images(folder, said, unique)
    check_absent(notes, [n for n in said if n not in found], len(said), where, folder, allow_broken)
    if len(set(found.values())) < len(found):
        raise UserError(f"{where} gives several of its images one and the same file in {folder}; rename them")
    extra = set() if unique or urls else {*list_images(folder)} - {*found.values()}
    if extra:                                                   # a published set may lie there twice: no matter
        notes.append(f"{len(extra)} images in the folder have no caption and were left out, such as {min(extra)}")
    names = list(found)
    return Dataset(name, [found[n] for n in names], [list(filter(None, said[n])) for n in names],
                   make_splits(names, lists, seed, notes, folder), folder, notes, urls and [urls[n] for n in names])


def _hub_table(path):
    """flickr_annotations_30k.csv: a row an image, with its captions as a json list -> what karpathy() returns."""
    captions, lists, wanted = {}, {}, "the hub's table of Flickr30k, with columns raw (a json list), split and filename"
    with _layout(path, wanted):
        for row in csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig"))):
            texts = json.loads(row["raw"])
            if not isinstance(texts, list):                     # the letters of a string could be looped over, too
                raise TypeError(f"raw is {texts!r}")
            captions[row["filename"]] = [" ".join(text.split()) for text in texts]
            lists.setdefault(row["split"], set()).add(row["filename"])
    return captions, lists


def photos(name, folder, seed=0, allow_broken=False):
    """A Dataset from a folder of images with one caption file. Raises UserError naming what is missing."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; give the right one with --data-dir")
    special = FLICKR30K_FILES if name == "flickr30k" else ()
    files = find_files(folder, (*special, *CAPTION_FILES, f"dataset_{name}.json", *KARPATHY_FILES))
    if not files:
        raise UserError(f"{folder} holds no {', '.join(special or CAPTION_FILES[:1])}, captions.csv, captions.jsonl or "
                        "Flickr8k.token.txt; add one that names each image and says what it shows (README: your own "
                        "photos)")
    where, lists, notes = files[0], None, []
    if where.suffix == ".json":
        captions, lists = karpathy(where, name)
    elif where.name == FLICKR30K_FILES[0]:
        captions, lists = _hub_table(where)
    else:
        captions, bad = read_captions(where, notes)
        notes += [f"{bad} caption lines without an image name or text were left out"] if bad else []
    lists = read_split_files(folder, name) or lists
    return _assemble(name, folder, where, captions, lists, notes, seed, allow_broken, unique=name != "folder")


flickr30k = partial(photos, "flickr30k")        # as the hub, Kaggle, its authors or Karpathy give it


# ---------------------------------------------------------------------------------------------------------------------
# COCO: annotations/captions_{train,val}{2014,2017}.json, and the images in train2014/, .. or wherever they lie.

def _years(files):
    """The years, {"2014", "2017"}, that paths of images tell: train2014/.., COCO_val2014_.., or bare twelve digits."""
    told = (re.search(r"(?:train|val)(20\d\d)|(?:^|/)\d{12}\.[^/]*$", path) for path in files
            if path.lower().endswith(IMAGE_TYPES))
    return {match[1] or "2017" for match in told if match}


def _caption_json(files):
    """{year or "": paths of caption files in COCO's layout}: captions_*.json, or else any directly in the folder."""
    paths = {path.rpartition("/")[2]: path for path in reversed(files) if path.endswith(".json")}
    named = [path for name, path in paths.items() if re.fullmatch(r"captions_(train|val|test)\d*\.json", name)]
    by_year = {}
    for path in sorted(named or {path for path in paths.values() if "/" not in path} - {*KARPATHY_FILES}):
        by_year.setdefault(re.search(r"20\d\d|$", path.rpartition("/")[2])[0], []).append(path)
    return by_year


def _address(name):
    """Where COCO keeps val2014/COCO_val2014_000000000042.jpg, or None for a file that is not its own."""
    return COCO + name if re.match(r"(train|val)20\d\d/", name) else None


def read_coco(path, notes, allow_broken=False):
    """One captions_*.json -> {"val2014/COCO_val2014_000000000042.jpg": [caption, ..]} and {the same: url or None}."""
    content, captions, urls, by_id, unknown = read_json(path), {}, {}, {}, []
    subset = re.search(r"(train|val|test)(20\d\d)?", path.stem)
    with _layout(path, "in the layout of COCO's captions, {images: [id, file_name], annotations: [image_id, caption]}",
                 "is it captions_train2014.json or the like?"):
        for image in content["images"]:
            file, url = image["file_name"], image.get("coco_url") or ""
            own = re.search(r"(train|val)20\d\d", file) or subset
            name = by_id[image["id"]] = file if "/" in file or not own else f"{own[0]}/{file}"
            if not url or "//mscoco.org" in url:                        # the oldest files name this host, which is gone
                url = _address(name)
            captions[name], urls[name] = [], url and re.sub("^https?://images.cocodataset.org/", COCO, url)
        for note in content["annotations"]:
            if note["image_id"] in by_id:
                captions[by_id[note["image_id"]]].append(" ".join(note["caption"].split()))
            else:
                unknown.append(note["image_id"])
    if unknown:
        notes.append(f"{len(unknown)} of {len(content['annotations'])} annotations in {path} have an image_id that it "
                     f"does not list, such as {unknown[0]}")
        if len(unknown) > MAX_LOST * len(content["annotations"]) and not allow_broken:
            raise UserError(f"{notes[-1]}; fetch it again, or go on without them with --allow-broken")
    return captions, urls


def coco(folder, seed=0, allow_broken=False, stream=False):
    """COCO's captions of 2014 or 2017 with the official split, or Karpathy's where his dataset_coco.json is.

    stream: no image need be in the folder; `urls` says where each is, and the caller sets `opener` to fetch it. Raises
    UserError when annotations and images are of different years or do not belong together for another reason.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; give the right one with --data-dir")
    files, notes, captions, lists, urls = list_files(folder), [], {}, {}, {}
    by_year, there = _caption_json(files), _years(files)
    where = next((path for path in files if path.rpartition("/")[2] == "dataset_coco.json"), None)
    if where:
        captions, lists = karpathy(folder / where, "coco")
        urls = {name: _address(name) for name in captions}
    elif by_year:
        year = max(by_year, key=lambda year: (year in there, year))
        where = ", ".join(by_year[year])
        if len(by_year) > 1:
            notes.append(f"of the annotations of {' and '.join(sorted(by_year))} those of {year} are used")
        for path in by_year[year]:
            more, addresses = read_coco(folder / path, notes, allow_broken)
            role = re.search("train|val|test", Path(path).stem)
            lists.setdefault(role[0] if role else "train", set()).update(more)
            captions.update(more)
            urls.update(addresses)
    else:
        raise UserError(f"{folder} holds neither annotations/captions_train2014.json (or another of COCO's caption "
                        "files) nor dataset_coco.json; put one there, or leave out --data-dir to have it downloaded")
    years = {re.search(r"20\d\d|$", name.partition("/")[0])[0] for name in captions}
    if not stream and there and "" not in years and not years & there:
        raise UserError(f"{where} in {folder} is of {max(years)}, but the images there are of {max(there)}; fetch "
                        "annotations and images of one year")
    lost = [name for name in captions if stream and not urls[name]]
    if lost:
        raise UserError(f"{where} gives no coco_url of {len(lost)} images, such as {lost[0]}, whose names tell no year "
                        "either; leave out --stream to read them from the folder")
    dataset = _assemble("coco", folder, where, captions, lists, notes, seed, allow_broken, "" not in years,
                        urls if stream else None)
    counts = [len(texts) for texts in dataset.captions]
    dataset.notes.append(f"{len(counts)} images of {where} {'to be streamed' if stream else 'are there'}, with "
                         f"{sum(counts)} captions, {min(counts)} to {max(counts)} each")
    return dataset


# ---------------------------------------------------------------------------------------------------------------------
# Downloads, and the table of all that is here.

def _fetch_zip(url, folder, name):
    """Unpack the zip at `url` as folder/name, unless that is there. A download that was broken off leaves its part.

    Several processes may want it (torchrun): one fetches, and the others then find it there.
    """
    zip_path = folder / "zips" / f"{name}.zip"
    with locked(folder / f".{name}.lock"):
        if not (folder / name).is_dir():
            extract_zip(download(url, zip_path), folder / name)
            zip_path.unlink()


def fetch_flickr8k(folder):
    """Download Flickr8k (1.1 GB): the two zips of the text layout, or else Kaggle's copy of it.

    The captions come last: where they are, the images are whole, and nothing is asked for again. Lengths are
    checked against what the server announced, contents by the zips' own checksums; the publishers give no others.
    """
    if find_files(folder, CAPTION_FILES):
        return
    try:
        for name in ("Flickr8k_Dataset", "Flickr8k_text"):
            _fetch_zip(f"{GITHUB_FLICKR8K}{name}.zip", folder, name)
    except UserError as first:
        print(f"{first}\ntrying the next mirror")
        try:
            _fetch_zip(KAGGLE_FLICKR8K, folder, "flickr8k")
        except UserError as second:
            raise UserError(f"no mirror of Flickr8k answered: {first}; {second}") from None
    shutil.rmtree(folder / "zips", ignore_errors=True)


def fetch_flickr30k(folder):
    """Download Flickr30k from the hub: 4.4 GB of images, then, as for fetch_flickr8k, the captions."""
    if not find_files(folder, (*FLICKR30K_FILES, *CAPTION_FILES, "dataset_flickr30k.json")):
        _fetch_zip(HUB_FLICKR30K + "flickr30k-images.zip", folder, "flickr30k-images")
        download(HUB_FLICKR30K + FLICKR30K_FILES[0], folder / FLICKR30K_FILES[0])
        shutil.rmtree(folder / "zips", ignore_errors=True)


def fetch_coco(folder, annotations_only=False, year=None):
    """Download what is not there of COCO: 19 GB of images, unless annotations_only, and the captions.

    year: 2014 or 2017; by default that of the images that are there, else 2014, as in published numbers. While there is
    a folder `zips`, a download was broken off, so images that are there may not be all.
    """
    zips, files = folder / "zips", list_files(folder)
    there, by_year = _years(files), _caption_json(files)
    year = str(year or max(there, default=2014))
    if not annotations_only and (year not in there or zips.is_dir()):
        for piece in (f"train{year}", f"val{year}"):
            _fetch_zip(f"{COCO}zips/{piece}.zip", folder, piece)
    if not find_files(folder, ["dataset_coco.json"]) and not by_year.keys() & {year, ""}:
        piece = f"annotations_trainval{year}"
        _fetch_zip(f"{COCO}annotations/{piece}.zip", folder, piece)
    if zips.is_dir() and not any(zips.iterdir()):
        zips.rmdir()


DATASETS = {"flickr8k": (fetch_flickr8k, partial(photos, "flickr8k")), "flickr30k": (fetch_flickr30k, flickr30k),
            "coco": (fetch_coco, coco), "folder": (None, partial(photos, "folder"))}       # how to fetch, how to read


def open_photos(config):
    """A config with dataset, data_dir, seed, allow_broken and perhaps stream -> Dataset, downloaded if no data_dir."""
    fetch, reader = DATASETS[config.dataset]
    folder = Path(config.data_dir or f"data/{config.dataset}")
    if getattr(config, "stream", False):
        if config.dataset != "coco":
            raise UserError(f"--stream fetches the images of coco one by one; leave it out for {config.dataset}")
        fetch, reader = partial(fetch_coco, annotations_only=True), partial(coco, stream=True)
    if fetch and not config.data_dir:
        fetch(folder)
    return reader(folder, config.seed, config.allow_broken)
