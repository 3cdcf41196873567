r"""Caption files of every public layout, each read into {image name: [caption, ..]} and {image name: split}.

    image,caption                      a header names the columns, whatever separates them: comma, tab, bar, semicolon
    7.jpg,"a dog, asleep"              Kaggle's captions.txt and results.csv, the hub's table, a table of one's own
    7.jpg#0<TAB>a dog , asleep         the original Flickr text, the one layout without a header
    {"image": "7.jpg", "captions": ["a dog, asleep"], "split": "val"}     json lines
    dataset_coco.json, captions_val2014.json                              Karpathy's splits, COCO's annotations

Which file a name means, and the split where none is given, decides layouts.py.
"""
import contextlib
import csv
import io
import json
import re
import unicodedata

import regex

from .config import UserError
from .files import IMAGE_TYPES, read_json, tidy_name

IMAGE = ("image", "file_name", "filename", "image_name", "image_path")            # columns by their names
CAPTION = ("caption", "captions", "text", "comment", "raw")     # .. or caption_1, caption_2; raw: Flickr30k at the hub
SPLIT = ("split", "subset", "partition", "set", "fold")
APOSTROPHES = dict.fromkeys(map(ord, "\u2019\u2018\u02bc\u05f3\u2032\u00b4`"), "'")
UNSEEN = dict.fromkeys([0xAD, 0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2060, 0x206A), 0xFEFF])
PLAIN = APOSTROPHES | UNSEEN | {0x2010: "-", 0x2011: "-", 0x5F4: '"'}   # one spelling, and soft hyphens are none
FORMS = regex.compile("[\ufb00-\ufdff\ufe70-\ufeff\uff01-\uffee]+")    # letters by another code: wide, narrow, joined
SPLIT_WORDS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val",
               "test": "test", "testing": "test", "restval": "train"}   # restval: what Karpathy left over of COCO's val
CLEAN = ("none", "lower", "words")
NOTHING = ("", "nan", "none", "null")         # what programs write into a cell for want of a caption


def clean_caption(text, how):
    """A caption, or a prompt, simplified before it is tokenised; white space always becomes single blanks.

    "lower" makes small letters, and one spelling of those that have several: typographic apostrophes and hyphens become
    plain, accents are composed, letters of full or half width are as usual. "words" also leaves nothing but
    apostrophes, hyphens, and letters of every script with the marks that belong to them: "A dog, 2 cats." -> "a dog
    cats".
    """
    if how != "none":
        text = FORMS.sub(lambda form: unicodedata.normalize("NFKC", form[0]), text).lower().replace("i\u0307", "i")
        text = unicodedata.normalize("NFC", text).translate(PLAIN)
    if how == "words":
        # \p{M}: vowel signs and accents; 200C and 200D, without width, stand inside words of Persian and Hindi, quotes
        # inside those of Hebrew. Armenian puts its signs of question, exclamation and stress on a vowel.
        text = " ".join(regex.findall(r"""[\p{L}'-](?:[\p{L}\p{M}\u200c\u200d'-]|(?<=\p{Hebrew})"(?=\p{Hebrew}))*""",
                                      regex.sub("[\u055b\u055c\u055e]", "", text)))
    return " ".join(text.split())


def read_captions(path, notes=None):
    """A file in any of the layouts above -> captions and splits. A UserError names a file that is in none of them."""
    captions, splits, bad, notes = {}, {}, 0, [] if notes is None else notes
    with readable(path):
        for name, texts, word in _karpathy(path) if path.name.startswith("dataset_") else \
                _coco(path) if path.suffix == ".json" else read_table(path, (IMAGE, CAPTION), (SPLIT,), notes):
            for cell in (name, *texts, word):
                if type(cell) is not str:
                    raise UserError(f"{path}: the row of {name!r:.60} has {cell!r:.60} where a text should be; mend it")
            texts, word = [" ".join(text.split()) for text in texts], word.strip().lower()
            texts, split = [text for text in texts if text.lower() not in NOTHING], SPLIT_WORDS.get(word)
            if not (name.strip() and texts):
                bad += 1
                continue
            name = tidy_name(name)
            captions.setdefault(name, []).extend(texts)
            if split is None and word or splits.setdefault(name, split) != split:
                other = f", and elsewhere {splits[name]!r}" if split else ""
                raise UserError(f"{path} gives {name[:60]!r} the split {word[:20]!r}{other}; each image needs one of "
                                "train, val, test")
    if not captions:
        raise UserError(f"{path} holds no captions; each line should name an image and say what it shows")
    notes += [f"{bad} rows of {path.name} without an image name or a caption were left out"] if bad else []
    return captions, splits


@contextlib.contextmanager
def readable(path):
    """Whatever goes wrong while a file is taken apart is that file's fault: one sentence."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    except (csv.Error, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        cause = "" if ".json" in path.suffix else "; a quote left open or not doubled is the usual cause"
        raise UserError(f"{path} is not in a known layout ({type(error).__name__}: {str(error)[:80]}); mend it, or "
                        f"fetch it again{cause}") from None


def read_table(path, needed, more=(), notes=None):
    """Yields each row's cells of the columns that are asked for, each by its possible names; "" where it has none.

    Captions are a list: there may be several columns of them. Two columns for anything else are refused, since none is
    taken silently; and those that nobody asked for are noted.
    """
    unread, asked = {}, (*needed, *more)
    for row in _rows(path, needed):
        found = [[pair for pair in row if pair[0] in known] for known in asked]
        for cells, known in zip(found, asked):
            if len({column for column, _ in cells}) > 1 or len(cells) > 1 and known is not CAPTION:
                columns = ", ".join(column for column, _ in row)
                raise UserError(f"{path} has several columns for one thing ({columns}); rename all but one of them")
        unread |= {column: 1 for column, _ in row if column and not any(column in known for known in asked)}
        found = [[cell for _, cell in cells if cell is not None] for cells in found]
        yield [sum((cell if isinstance(cell, list) else [cell] for cell in cells), []) if known is CAPTION else
               (cells or [""])[0] for cells, known in zip(found, asked)]
    if unread and notes is not None:
        notes.append(f"columns of {path.name} that are not read: {', '.join(unread)}")


def _rows(path, needed):
    """Yields each row with the names of its columns: [("image", "a.jpg"), ("caption", "a dog"), ("split", "val")].

    A name is small letters without the number behind it: of "Caption 1" and "caption_2" becomes "caption".
    """
    def tidy(column):
        return re.sub("_?[0-9]*$", "", re.sub(r"\W+", "_", column.strip(' "').lower()))
    text = path.read_text(encoding="utf-8-sig").lstrip("\n")
    if path.suffix == ".jsonl":
        lines = [line for line in text.split("\n") if line.strip()]               # splitlines() also cuts at U+2028
        for row in json.loads("[" + ",\n".join(lines) + "]", object_pairs_hook=list):
            if not all(type(pair) is tuple for pair in row):
                raise ValueError("each line should be one {..}")
            yield [(tidy(column), cell) for column, cell in row]
        return
    head = text.partition("\n")[0]
    for separator in "\t|;,":
        header = [tidy(column) for column in head.split(separator)]
        if all({*header} & {*names} for names in needed):
            break
    else:
        name, separator, _ = head.partition("\t")
        if not (separator and tidy_name(name).endswith(IMAGE_TYPES) and CAPTION in needed):
            raise UserError(f"{path} should begin with the line `{','.join(names[0] for names in needed)}`, not "
                            f"{head[:60]!r}")
        header, text = ["image", "caption"], f"image\tcaption\n{text}"
    # In the two layouts of publishers that know no quoting, quotes belong to the captions.
    quoting = csv.QUOTE_NONE if "comment_number" in header or re.match(r"[^\t]+#\d\t", head) else csv.QUOTE_MINIMAL
    rows = csv.reader(io.StringIO(text), delimiter=separator, quoting=quoting, skipinitialspace=True, strict=True)
    next(rows)
    for row in filter(None, rows):
        if len(row) > len(header):
            raise UserError(f"{path}: the row of {row[0][:60]} has more cells than the header; put quotes round them")
        # a list of captions, as the hub has it: ["a dog", "two dogs"]
        yield [(column, json.loads(cell) if re.match(r"\[\s*[\"'\]]", cell) else cell)
               for column, cell in zip(header, row)]


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
