"""Public data sets as they lie on disk, downloaded if need be: images, their captions, and the official split.

    Kaggle's zip, the original text files, Karpathy's json, COCO's json, a folder of one's own
        -> captions.py: {image name: [caption, ..]}, {image name: split}, by caption file
        -> locate: which file of the folder each name means -> make_splits -> Dataset

What was decided or left out stands in Dataset.notes; what could be meant in two ways is refused by name. The tables
below say what each data set consists of. data.py makes batches.
"""
import contextlib
import filecmp
import posixpath
import random
import re
from fnmatch import fnmatchcase
from pathlib import Path

from .captions import CLEAN, COCO, SPLIT_WORDS, clean_caption, coco_url, karpathy, layout, read_captions, read_coco
from .config import UserError
from .download import download, extract_zip
from .files import ImageFinder, list_files, list_images, locked, tidy_name
from .image import load_image

SPLITS = ("train", "val", "test")
MAX_LOST = 0.01                 # the share of images that may be missing or broken without --allow-broken
# The caption files that publishers ship, best first: side by side, those of one data set hold the same captions.
PUBLIC = {"flickr8k": ("captions.txt", "Flickr8k.token.txt", "dataset_flickr8k.json"),
          "flickr30k": ("flickr_annotations_30k.csv", "results.csv", "results_20130124.token",
                        "dataset_flickr30k.json"),
          "coco": ("dataset_coco.json", "captions_*.json")}
OWN = ("captions.txt", "captions.csv", "captions.tsv", "captions.jsonl", "metadata.csv", "metadata.jsonl",
       "dataset.json")
LISTS = {"train": "Flickr_8k.trainImages.txt", "val": "Flickr_8k.devImages.txt", "test": "Flickr_8k.testImages.txt"}
GITHUB = "https://github.com/jbrownlee/Datasets/releases/download/Flickr8k/"
KAGGLE = "https://www.kaggle.com/api/v1/datasets/download/adityajn105/flickr8k"
HUB = "https://huggingface.co/datasets/nlphuji/flickr30k/resolve/main/"
DOWNLOADS = {"flickr8k": (f"{GITHUB}Flickr8k_Dataset.zip", f"{GITHUB}Flickr8k_text.zip"),        # the captions last
             "flickr30k": (f"{HUB}flickr30k-images.zip", f"{HUB}flickr_annotations_30k.csv"),
             "coco": (f"{COCO}zips/train2014.zip", f"{COCO}zips/val2014.zip",
                      f"{COCO}annotations/annotations_trainval2014.zip")}


class Dataset:
    """names[i], captions[i] (a list) and open(i) (an RGB PIL image) of image i; splits: {"train": [i, ..], ..}.

    Images that are not on this disk have urls[i], and an `opener` that is given i and fetches the image.
    """

    def __init__(self, name, names, captions, splits, folder=None, notes=(), urls=None, opener=None):
        self.name, self.names, self.captions, self.splits = name, names, captions, splits
        self.folder, self.notes, self.urls, self.opener = folder, list(notes), urls, opener

    def open(self, i):
        return self.opener(i) if self.opener else load_image(self.folder / self.names[i])

    def may_flip(self, i):
        """A mirrored image no longer fits a caption that says left or right."""
        return not any(re.search(r"\b(left|right)(most|wards?|hand(ed)?)?\b", caption, re.IGNORECASE)
                       for caption in self.captions[i])


def report(dataset):
    """What a data set holds: a line per split, and what was decided on the way."""
    lines = [f"{dataset.name}: {len(dataset.names)} images, {sum(map(len, dataset.captions))} captions"]
    for split, members in dataset.splits.items():
        lengths = [len(caption.split()) for i in members for caption in dataset.captions[i]]
        lines.append(f"  {split:5} {len(members):6} images {len(lengths):7} captions")
        if lengths:
            lines[-1] += f" of {min(lengths)} to {max(lengths)} words, {sum(lengths) / len(lengths):.1f} on average"
    return "\n".join(lines + [f"  {note}" for note in dataset.notes])


# ---- from the names in a caption file to images and splits

def find_images(finder, names, base=""):
    """{name: path} of those that are there: below `base` (the caption file's folder), else, if none is, anywhere.

    If the folder of a single name exists, names are paths: then no file name alone may stand in for any of them.
    """
    by_name = not any(map(finder.folder_of, names))
    for place in dict.fromkeys((base, "")):
        found = {name: path for name in names if (path := finder.find(name, place, by_name))}
        if found:
            break
    return found


def locate(finder, where, captions, notes, allow_broken):
    """{name: path} of the images that have a caption in the file `where`; what has none, or is absent, is noted."""
    names = [name for name, texts in captions.items() if texts]
    if len(names) < len(captions):
        notes.append(f"{len(captions) - len(names)} images without a caption were left out")
    found, owner = find_images(finder, names, posixpath.dirname(where)), {}
    absent = [name for name in names if name not in found]
    check_absent(notes, absent, len(names), where, finder.folder, allow_broken)
    for name, path in found.items():
        if tidy_name(owner.setdefault(path, name)) != tidy_name(name):
            raise UserError(f"{where}: both {owner[path]} and {name} would be {path}; add the one that is missing")
    return found


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
    if len(names) < 3:
        raise UserError(f"{folder} holds {len(names)} captioned images; at least 3 are needed, one for each split")
    lists, rng = {split: lists[split] for split in SPLITS if lists and split in lists}, random.Random(seed)
    order = {split: [i for i, n in enumerate(names) if n in lists[split]] for split in lists}
    twice = [n for n in names if sum(n in members for members in lists.values()) > 1]
    left = len(names) - sum(map(len, order.values()))
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


def split_of_path(path):
    """"data/validation/cats/7.jpg" -> "val": what the folders of a path say of its split, if they say one thing."""
    found = {SPLIT_WORDS[part] for part in path.lower().split("/")[:-1] if part in SPLIT_WORDS}
    return found.pop() if len(found) == 1 else None


def listed_splits(finder, name, images):
    """({split: {path, ..}}, who says so) from what lies beside the captions: lists, Karpathy's json, split folders."""
    lists = {}
    for split, file in LISTS.items():
        if path := only_file(finder, [file]):
            with layout(path, "the list of a split", "mend or remove it"):
                lists[split] = {*find_images(finder, path.read_text(encoding="utf-8-sig").split()).values()}
    if lists:
        return lists, "the lists Flickr_8k.*Images.txt"
    jsons = [file for file in PUBLIC.get(name, sum(PUBLIC.values(), ())) if file.endswith(".json")]
    if path := only_file(finder, [*jsons, "dataset.json"]):
        splits = karpathy(path, name if name in PUBLIC else None)[1]
        splits = {path: splits[n] for n, path in find_images(finder, splits).items()}
        return by_split(splits), path.name
    splits = {path: split_of_path(path) for path in images}
    return ({}, "") if None in splits.values() else (by_split(splits), "the folders' names")


def by_split(splits):
    """{path: split} -> {split: {path, ..}}, only those that occur."""
    return {split: {path for path in splits if splits[path] == split} for split in SPLITS if split in splits.values()}


# ---- the files of a folder

def same_file(finder, path, other):
    """Whether two files of the folder hold the same bytes."""
    return filecmp.cmp(finder.folder / path, finder.folder / other, shallow=False)


def only_file(finder, names):
    """The one file of any of these names, or None. Copies of it do not matter; of others a UserError names two."""
    found = [path for path in finder.files if posixpath.basename(path) in names]
    for other in found[1:]:
        if not same_file(finder, found[0], other):
            raise UserError(f"{found[0]} and {other} in {finder.folder} differ, and only one can count; keep that one")
    return finder.folder / found[0] if found else None


def caption_files(finder, name, notes):
    """The caption files of a folder, all of one kind. Raises UserError where there is none, or several kinds."""
    sets = [PUBLIC[name]] if name in PUBLIC else [*PUBLIC.values()]
    found = {known: [path for path in finder.files if fnmatchcase(posixpath.basename(path), known)]
             for known in dict.fromkeys(sum(sets, ()) + OWN)}
    kinds = [known for known in found if found[known]]
    kinds = [kind for kind in kinds if not kind.endswith(".json")] or kinds       # beside others json gives the split
    if not kinds:
        raise UserError(f"{finder.folder} holds no {', '.join(PUBLIC.get(name, OWN[:4]))}; put one there, which names "
                        "each image and says what it shows (README: your own photos)")
    files = found[kinds[0]]
    if len(kinds) > 1:
        if not any({*kinds} <= {*files} for files in sets):
            raise UserError(f"{finder.folder} holds captions in {' and in '.join(found[kind][0] for kind in kinds)}; "
                            "keep what counts and move the rest away")
        notes.append(f"captions are those of {kinds[0]}; {', '.join(kinds[1:])} beside it was not read")
    if name in PUBLIC:                          # Kaggle's zips hold some files twice
        files = [path for k, path in enumerate(files) if not any(same_file(finder, path, p) for p in files[:k])]
    years = {re.search(r"(20\d\d)?\.\w+$", path)[1] for path in files}
    if len(years) > 1:
        years = " and ".join(sorted(map(str, years)))
        raise UserError(f"{finder.folder} holds COCO's captions of {years}; keep those of one year")
    return sorted(files)


def read_files(finder, name, stream, notes, allow_broken):
    """All captions of a folder -> {path of the image: [caption, ..]}, {path: split or None}, {path: url}."""
    captions, splits, urls = {}, {}, {}
    files = caption_files(finder, name, notes)
    for file in files:
        if posixpath.basename(file).startswith("captions_"):
            texts, given = read_coco(finder.folder / file, urls, notes)
        elif file.endswith(".json"):
            texts, given = karpathy(finder.folder / file, name if name in PUBLIC else None)
            urls.update((image, coco_url(image)) for image in texts)
        else:
            texts, given = read_captions(finder.folder / file, notes)
        if len(files) > 1 and not given:                        # train/metadata.jsonl, test/metadata.jsonl
            given = dict.fromkeys(texts, split_of_path(file))
        found = {n: n for n in texts if texts[n]} if stream else locate(finder, file, texts, notes, allow_broken)
        if twice := captions.keys() & found.values():
            raise UserError(f"{file} and {files[0]} in {finder.folder} both caption {min(twice)}; keep one of them")
        for image, path in found.items():
            captions.setdefault(path, []).extend(texts[image])
            splits[path] = given.get(image)
    if any(splits.values()) and None in splits.values():
        bare = next(path for path in splits if splits[path] is None)
        raise UserError(f"the captions in {finder.folder} give a split to some images and none to {bare}; give one to "
                        "each, or to none")
    return captions, splits, urls


def photos(name, folder, seed=0, allow_broken=False, stream=False):
    """A Dataset from a folder of images and their captions, in any of the layouts above.

    stream: no image need be in the folder; `urls` tells where each is, and the caller sets `opener` to fetch it. Raises
    UserError naming what is missing, or what could be meant in two ways.
    """
    folder, notes = Path(folder), []
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; give the right one with --data-dir")
    finder = ImageFinder(folder)
    captions, splits, urls = read_files(finder, name, stream, notes, allow_broken)
    names, lists, source = list(captions), by_split(splits), "the captions"
    if not lists:
        lists, source = listed_splits(finder, name, captions)
    if lost := [n for n in names if stream and not urls[n]]:
        raise UserError(f"the captions in {folder} tell no address of {len(lost)} images, such as {lost[0]}; leave out "
                        "--stream")
    if extra := set() if name in PUBLIC else {*finder.paths} - {*names}:         # what is public may lie there twice
        notes.append(f"{len(extra)} images in the folder have no caption and were left out, such as {min(extra)}")
    order = make_splits(names, lists, seed, notes, folder)
    notes += [f"the split is that of {source}"] if len(lists) > 1 else []
    urls = [urls[n] for n in names] if stream else None
    return Dataset(name, names, [captions[n] for n in names], order, folder, notes, urls)


# ---- downloads

def fetch_piece(url, folder, name):
    """Download a file, or unpack a zip as folder/name, unless it is there. One process (torchrun) fetches for all."""
    with locked(folder / f".fetch-{name}.lock"):                # not the lock that extract_zip takes within
        if not (folder / name).exists():
            if name.endswith(".csv"):
                download(url, folder / name)
                return
            zip_path = folder / "zips" / f"{name}.zip"
            extract_zip(download(url, zip_path), folder / name)
            zip_path.unlink()


def fetch(name, folder, stream=False):
    """Download what is not there of a public data set; with stream only the captions. What is there counts as whole,
    unless a folder `zips` shows that a download was broken off: it then goes on.
    """
    zips, files = folder / "zips", [posixpath.basename(path) for path in list_files(folder)]
    has_images = list_images(folder) and not zips.is_dir()
    has_captions = any(fnmatchcase(file, known) for file in files for known in PUBLIC[name] + OWN)
    year = "2017" if any(fnmatchcase(file, "captions_*2017.json") for file in files) else "2014"
    *images, captions = (url.replace("2014", year) for url in DOWNLOADS[name])
    pieces = [*([] if stream or has_images else images), *([] if has_captions else [captions])]
    try:
        for url in pieces:
            fetch_piece(url, folder, posixpath.basename(url).removesuffix(".zip"))
    except UserError as first:
        if name != "flickr8k":
            raise
        print(f"{first}\ntrying the next mirror")
        try:
            fetch_piece(KAGGLE, folder, "flickr8k")
        except UserError as second:
            raise UserError(f"no mirror of Flickr8k answered: {str(first)[:110]}; {str(second)[:110]}") from None
    with contextlib.suppress(OSError):                          # not there, or another piece is still to come
        zips.rmdir()


def open_photos(config):
    """A config with dataset, data_dir, seed, allow_broken and perhaps stream -> Dataset, downloaded if no data_dir."""
    name, stream = config.dataset, getattr(config, "stream", False)
    if stream and name != "coco":
        raise UserError(f"--stream fetches the images of coco one by one; leave it out for {name}")
    folder = Path(config.data_dir or f"data/{name}")
    if name in DOWNLOADS and not config.data_dir:
        fetch(name, folder, stream)
    return photos(name, folder, config.seed, config.allow_broken, stream)
