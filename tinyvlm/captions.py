r"""Caption files of every public layout, each read into {image name: [caption, ..]} and {image name: split}.

    image,caption                      a header names the columns, whatever separates them: comma, tab, bar, semicolon
    7.jpg,"a dog, asleep"              Kaggle's captions.txt and results.csv, the hub's table, a table of one's own
    7.jpg#0<TAB>a dog , asleep         the original Flickr text, the one layout without a header
    {"image": "7.jpg", "captions": ["a dog, asleep"], "split": "val"}     json lines
    dataset_coco.json, captions_val2014.json                              Karpathy's splits, COCO's annotations

Which file a name means, and the split where none is given, decides layouts.py.
"""
import csv
import io
import json
import re
import unicodedata

import regex

from .config import UserError
from .files import IMAGE_TYPES, read_json, tidy_name

COLUMNS = (("image", "file_name", "filename", "image_name", "image_path"),
           ("caption", "captions", "text", "comment", "raw"),   # raw: Flickr30k at the hub, a json list
           ("split", "subset", "partition", "set", "fold"))
APOSTROPHES = dict.fromkeys(map(ord, "\u2019\u2018\u02bc\uff07\u2032\u00b4`"), "'")
PLAIN = APOSTROPHES | {0x2010: "-", 0x2011: "-", 0xAD: None}    # one spelling; a soft hyphen is none
SPLIT_WORDS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val",
               "test": "test", "testing": "test", "restval": "train"}   # restval: what Karpathy left over of COCO's val
CLEAN = ("none", "lower", "words")


def clean_caption(text, how):
    """A caption, or a prompt, simplified before it is tokenised; white space always becomes single blanks.

    "lower" makes small letters, and one spelling of those that have several: typographic apostrophes and hyphens become
    plain, accents are composed. "words" also leaves nothing but apostrophes, hyphens, and letters of every script with
    the marks that belong to them: "A dog, 2 cats." -> "a dog cats".
    """
    text = " ".join(text.split())
    if how == "none":
        return text
    text = unicodedata.normalize("NFC", text.lower()).translate(PLAIN)
    if how == "lower":
        return text
    # \p{M}: vowel signs and accents; 200C and 200D, without width, stand inside words of Persian and Hindi
    return " ".join(regex.findall(r"[\p{L}'-][\p{L}\p{M}\u200c\u200d'-]*", text))


def read_captions(path, notes=None):
    """A file in any of the layouts above -> captions and splits. A UserError names a file that is in none of them."""
    captions, splits, bad = {}, {}, 0
    rows = _karpathy if path.name.startswith("dataset_") else _coco if path.suffix == ".json" else _table
    try:
        for name, texts, word in rows(path):
            texts, split = [text for text in (" ".join(text.split()) for text in texts) if text], SPLIT_WORDS.get(word)
            if not (name and texts):
                bad += 1
                continue
            name = tidy_name(name)
            captions.setdefault(name, []).extend(texts)
            if split is None and word or splits.setdefault(name, split) != split:
                other = f", and elsewhere {splits[name]!r}" if split else ""
                raise UserError(f"{path} gives {name[:60]!r} the split {word[:20]!r}{other}; each image needs one of "
                                "train, val, test")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    except (csv.Error, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is not in a known layout ({type(error).__name__}: {str(error)[:80]}); mend it, or "
                        "fetch it again; in a table, a quote left open or not doubled is the usual cause") from None
    if not captions:
        raise UserError(f"{path} holds no captions; each line should name an image and say what it shows")
    if bad and notes is not None:
        notes.append(f"{bad} rows of {path.name} without an image name or a caption were left out")
    return captions, splits


def _table(path):
    """Yields (image name, [caption, ..], split word or "") of each row, wherever the columns stand."""
    for row in _rows(path):
        cells = [[cell for column, cell in row if column in known] for known in COLUMNS]
        if max(map(len, cells)) > 1:                            # none is taken silently
            columns = ", ".join(column for column, _ in row)
            raise UserError(f"{path} has several columns for one thing ({columns}); rename all but one of them")
        name, texts, word = (found[0] if found else None for found in cells)
        yield (name or "").strip(), texts if isinstance(texts, list) else [texts or ""], (word or "").strip().lower()


def _rows(path):
    """Yields each row with the names of its columns: [("image", "a.jpg"), ("caption", "a dog"), ("split", "val")]."""
    text = path.read_text(encoding="utf-8-sig").lstrip("\n")
    if path.suffix == ".jsonl":
        lines = [line for line in text.split("\n") if line.strip()]               # splitlines() also cuts at U+2028
        for row in json.loads("[" + ",\n".join(lines) + "]", object_pairs_hook=list):
            yield [(column.lower(), cell) for column, cell in row]
        return
    head = text.partition("\n")[0]
    for separator in "\t|;,":
        header = [cell.strip(' "').lower() for cell in head.split(separator)]
        if {*header} & {*COLUMNS[0]} and {*header} & {*COLUMNS[1]}:
            break
    else:
        name, separator, _ = head.partition("\t")
        if not (separator and tidy_name(name).endswith(IMAGE_TYPES)):
            raise UserError(f"{path} should begin with the line `image,caption`, not {head[:60]!r}")
        header, text = ["image", "caption"], f"image\tcaption\n{text}"
    # In the two layouts of publishers that know no quoting, quotes belong to the captions.
    quoting = csv.QUOTE_NONE if "comment_number" in header or re.match(r"[^\t]+#\d\t", head) else csv.QUOTE_MINIMAL
    rows = csv.reader(io.StringIO(text), delimiter=separator, quoting=quoting, skipinitialspace=True, strict=True)
    next(rows)
    for row in filter(None, rows):
        if len(row) > len(header):
            raise UserError(f"{path}: the row of {row[0][:60]} has more cells than the header; put quotes round them")
        yield [(column, json.loads(cell) if column == "raw" else cell) for column, cell in zip(header, row)]


def _karpathy(path):
    """Yields the same from Karpathy's json (2015); COCO's images have their folder in front: val2014/COCO_...jpg."""
    for image in read_json(path)["images"]:
        name = f"{image.get('filepath', '.')}/{image['filename']}"
        yield name, [sentence["raw"] for sentence in image["sentences"]], image["split"]


def _coco(path):
    """Yields the same from COCO's captions_val2014.json, with the folder of the image in front: val2014/COCO_...jpg."""
    content, subset = read_json(path), path.stem.removeprefix("captions_")
    texts = {image["id"]: [] for image in content["images"]}
    for note in content["annotations"]:
        texts[note["image_id"]].append(note["caption"])
    for image in content["images"]:
        yield f"{subset}/{image['file_name']}", texts[image["id"]], subset[:-4]
