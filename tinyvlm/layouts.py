"""Public data sets as they lie on disk, downloaded if need be: images, their captions, and the official split.

    Kaggle's zip, the original text files, Karpathy's json, COCO's json, a folder of one's own
        -> captions.py: {image name: [caption, ..]}, {image name: split}, by caption file
        -> files.ImageFinder: which file of the folder each name means -> make_splits -> Dataset

What was decided or left out stands in Dataset.notes; what could be meant in two ways is refused by name.
"""
import posixpath
import random
import re
import shutil
from fnmatch import fnmatchcase
from pathlib import Path

from .captions import SPLIT_WORDS, read_captions
from .config import UserError
from .download import download, extract_zip
from .files import IMAGE_TYPES, ImageFinder, locked, read_json
from .image import load_image

SPLITS = ("train", "val", "test")
MAX_LOST = 0.01                 # the share of images that may be missing or broken without --allow-broken
# The caption files that publishers ship, best first: side by side, they hold the same captions.
PUBLIC = {"flickr8k": ("dataset_flickr8k.json", "captions.txt", "Flickr8k.token.txt"),
          "flickr30k": ("dataset_flickr30k.json", "flickr_annotations_30k.csv", "results.csv",
                        "results_20130124.token"),
          "coco": ("dataset_coco.json", "captions_*2014.json", "captions_*2017.json")}
OWN = ("captions.txt", "captions.csv", "captions.jsonl", "metadata.csv", "metadata.jsonl")
# train.txt, val_images.txt, Flickr_8k.devImages.txt: files so called list the images of a split, one on each line
LIST = re.compile(rf"(.*[._ -])?({'|'.join(SPLIT_WORDS)}|splits?|folds?)[._ -]?(images?|lists?|ids?|names?|files?)?"
                  r"\.(txt|lst|csv|tsv|jsonl?)")
COCO = "https://s3.amazonaws.com/images.cocodataset.org/"       # what images.cocodataset.org serves, with TLS
GITHUB = "https://github.com/jbrownlee/Datasets/releases/download/Flickr8k/"
HUB = "https://huggingface.co/datasets/nlphuji/flickr30k/resolve/main/"
DOWNLOADS = {                                                   # captions last
    "flickr8k": (f"{GITHUB}Flickr8k_Dataset.zip", f"{GITHUB}Flickr8k_text.zip"),
    "flickr30k": (f"{HUB}flickr30k-images.zip", f"{HUB}flickr_annotations_30k.csv"),
    "coco": tuple(f"{COCO}{piece}2014.zip" for piece in ("zips/train", "zips/val", "annotations/annotations_trainval"))}


class Dataset:
    """names[i], captions[i] (a list) and open(i) (an RGB PIL image) of image i; splits: {"train": [i, ..], ..}.

    Images that are not on this disk have urls[i], and an `opener` that is given i and fetches the image.
    """

    def __init__(self, name, names, captions, splits, folder=None, notes=(), urls=None):
        self.name, self.names, self.captions, self.splits = name, names, captions, splits
        self.folder, self.notes, self.urls, self.opener = folder, notes, urls, None

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
        n = sum(len(dataset.captions[i]) for i in members)
        lines.append(f"  {split:5} {len(members):6} images {n:7} captions")
    return "\n".join(lines + [f"  {note}" for note in dataset.notes])


# ---- absent images, and splits

def check_absent(notes, absent, total, where, folder, allow_broken):
    """Note which of the `total` images that `where` names are absent. More than 1% of them are a UserError."""
    if not absent:
        return
    odd = [name for name in absent if re.search(r"\.\w{2,5}$", name) and not name.lower().endswith(IMAGE_TYPES)]
    first = repr((odd or absent)[0][:60])                       # a name may hold a line break, or 400 letters
    fault, remedy = ("of a kind that is not read, in", "convert them to JPEG or PNG, in the table, too") if odd else (
        "not in", "add them")
    notes.append(f"{len(absent)} of {total} images of {where} are {fault} the folder, such as {first}")
    if len(absent) > MAX_LOST * total and not allow_broken:
        raise UserError(f"{where} names {len(odd or absent)} images that are {fault} {folder} (such as {first}); "
                        f"{remedy}, or go on without them with --allow-broken")


def make_splits(names, lists, seed, notes, folder):
    """{"train": [i, ..], "val": [..], "test": [..]}, places in `names`, from the official lists {split: {name, ..}}.

    Where train alone is listed, or all but train, the other images are the test set, or train. Where val or test has no
    list, the other one is the test set, and a tenth of train (at most 5,000), drawn by the seed, is held out as val.
    With no list, or one of all images, or no train, all images are split 80/10/10.
    """
    order = {split: [i for i, n in enumerate(names) if n in lists[split]] for split in SPLITS if split in lists}
    if len(set().union(*order.values())) < sum(map(len, order.values())):
        raise UserError(f"the split lists in {folder} name an image twice; mend them")
    rest = sorted({*range(len(names))} - set().union(*order.values()))
    if rest and order and (order.keys() == {"train"} or "train" not in order):
        split = "test" if "train" in order else "train"
        order = {"train": [], **order, split: rest}
        notes.append(f"no list tells the {split} split: it is the {len(rest)} images of no other list")
    note, rng = "official split", random.Random(seed)
    if "train" not in order or len(order) < 2:
        mixed, k = rng.sample(range(len(names)), len(names)), max(1, len(names) // 10)
        order = {"train": sorted(mixed[2 * k:]), "val": sorted(mixed[:k]), "test": sorted(mixed[k:2 * k])}
        note = f"no official split here: 80/10/10 by seed {seed}; scores are not comparable with published ones:"
    elif len(order) == 2:
        train, (official, test) = order.pop("train"), order.popitem()
        val = set(rng.sample(train, min(5000, len(train), max(1, len(train) // 10))))
        order = {"train": [i for i in train if i not in val], "val": sorted(val), "test": test}
        note = f"the official {official} split is the test set here, and val was held out of train by seed {seed}:"
    sizes, left = "/".join(str(len(members)) for members in order.values()), len(names) - sum(map(len, order.values()))
    notes.append(f"{note} {sizes}" + (f"; {left} images are in none of its lists and stay unused" if left else ""))
    if not all(order.values()):
        raise UserError(f"the {len(names)} captioned images in {folder} give splits of {sizes}, none of which may be "
                        "empty; add images, or mend the split lists")
    return order


# ---- the files of a folder

def files_called(finder, known):
    """The files of a folder with this name, such as captions_*2014.json, at any depth."""
    return [path for path in finder.files if fnmatchcase(posixpath.basename(path), known)]


def caption_files(finder, name, notes):
    """The caption files of a folder, all of one name. Raises UserError where there is none, or a choice to make."""
    public = PUBLIC.get(name, ())
    found = {known: files for known in (*public, *OWN) if (files := files_called(finder, known))}
    best, *others = found or [None]
    if best is None:
        raise UserError(f"{finder.folder} holds no {', '.join(public or OWN)}; put one there, which names each image "
                        "and says what it shows (README: your own photos)")
    if others and not found.keys() <= {*public}:
        raise UserError(f"{finder.folder} holds captions in {' and in '.join(files[0] for files in found.values())}; "
                        "keep what counts and move the rest away")
    if others:
        notes.append(f"captions are those of {best}, not of {', '.join(others)}")
    return found[best]


def split_of_path(path):
    """"data/validation/cats/7.jpg" -> "val": what the folders of a path say of its split, if they say one thing."""
    parts = [re.sub(r"_?20\d\d$", "", part) for part in path.lower().split("/")[:-1]]       # train2017
    found = {SPLIT_WORDS[part] for part in parts if part in SPLIT_WORDS}
    return found.pop() if len(found) == 1 else None


def read_files(finder, name, stream, notes, allow_broken):
    """All captions of a folder -> {path of the image: [caption, ..]} and {path: split or None}."""
    captions, splits = {}, {}
    for file in caption_files(finder, name, notes):
        texts, given = read_captions(finder.folder / file, notes)
        found = {image: image for image in texts} if stream else finder.find(texts, posixpath.dirname(file))
        check_absent(notes, [n for n in texts if n not in found], len(texts), file, finder.folder, allow_broken)
        for image, path in found.items():
            if path in captions:
                raise UserError(f"{file} gives captions to {path} a second time, as {image}; keep one of them, or add "
                                "the image that is missing")
            captions[path] = texts[image]
            splits[path] = given[image] or split_of_path(file) or split_of_path(path)
    bare = [path for path in splits if not splits[path]]
    if 0 < len(bare) < len(splits):
        raise UserError(f"the captions or folders in {finder.folder} give a split to some images and none to "
                        f"{bare[0]}; give one to each, or to none")
    return captions, splits


def listed_splits(finder, names, notes):
    """{split: {path, ..}} by the files of a folder that are called as a split and name its images, one on each line."""
    lists, names = {}, {*names}
    for file in finder.files:
        if match := LIST.fullmatch(posixpath.basename(file).lower()):
            lines = {line.strip() for line in (finder.folder / file).read_text(errors="replace").split("\n")} - {""}
            found = {*finder.find(lines, posixpath.dirname(file)).values()} & names
            if found and match[2] in SPLIT_WORDS:
                lists.setdefault(SPLIT_WORDS[match[2]], set()).update(found)
                if bad := len(lines) - len(found):
                    notes.append(f"{bad} of the {len(lines)} lines of {file} name no image that has a caption")
            else:
                notes.append(f"{file} is not read: no list of a split, with the name of a captioned image on each line")
    return lists


def coco_urls(finder, names):
    """Where each image is: at the coco_url of its json, or else where COCO keeps it; from COCO itself always by TLS."""
    told, karpathy = {}, any(file.endswith("dataset_coco.json") for file in finder.files)    # which has no addresses
    for file in () if karpathy else finder.files:
        if match := re.search(r"captions_(\w+)\.json$", file):
            told |= {f"{match[1]}/{image['file_name']}": image.get("coco_url") or ""
                     for image in read_json(finder.folder / file)["images"]}
    urls = {name: url for name, url in told.items() if url and "//mscoco.org" not in url}         # a host that is gone
    return [re.sub("^https?://images.cocodataset.org/", COCO, urls.get(name, COCO + name)) for name in names]


def photos(name, folder, seed=0, allow_broken=False, stream=False):
    """A Dataset from a folder of images and their captions, in any of the layouts above.

    stream: no image need be in the folder; `urls` tells where each is, and the caller sets `opener` to fetch it. Raises
    UserError naming what is missing, or what could be meant in two ways.
    """
    finder, notes = ImageFinder(folder), []
    captions, splits = read_files(finder, name, stream, notes, allow_broken)
    names, lists = list(captions), {split: {n for n in splits if splits[n] == split} for split in {*splits.values()}}
    listed = listed_splits(finder, names, notes)
    if len(lists) < 2:                          # nothing, or one word for all: {None: {..}}, {"train": {..}}
        lists = listed
    elif listed:
        notes.append(f"the split is that of the captions, not of the lists of {', '.join(listed)}")
    if extra := set() if name in PUBLIC else {*finder.images} - {*names}:         # what is public may lie there twice
        notes.append(f"{len(extra)} images in the folder have no caption and were left out, such as {min(extra)}")
    order, urls = make_splits(names, lists, seed, notes, folder), coco_urls(finder, names) if stream else None
    return Dataset(name, names, [*captions.values()], order, finder.folder, notes, urls)


# ---- downloads

def fetch(name, folder, stream):
    """Download a public data set, or with stream only its captions, and unpack each zip as folder/NAME.

    As long as `zips` is in the folder, pieces are to come. Without it the folder is whole, or its owner filled it.
    """
    zips = folder / "zips"
    if not zips.exists() and any(path.name[0] != "." for path in folder.glob("*")):
        return
    with locked(folder / ".fetch.lock"):                        # one process (torchrun) fetches for all
        zips.mkdir(exist_ok=True)
        for url in DOWNLOADS[name][-1:] if stream else DOWNLOADS[name]:
            piece = folder / posixpath.basename(url).removesuffix(".zip")
            if piece.suffix == ".csv":
                download(url, piece)
            elif not piece.exists():
                file = download(url, zips / f"{piece.name}.zip")
                extract_zip(file, piece)
                file.unlink()
        if not stream:
            shutil.rmtree(zips, ignore_errors=True)


def open_photos(config):
    """A config with dataset, data_dir, seed, allow_broken and stream -> Dataset, downloaded if there is no data_dir."""
    folder = Path(config.data_dir or f"data/{config.dataset}")
    if config.dataset in DOWNLOADS and not config.data_dir:
        fetch(config.dataset, folder, config.stream)
    return photos(config.dataset, folder, config.seed, config.allow_broken, config.stream)
