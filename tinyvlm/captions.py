r"""Caption files of every public layout, each read into {image name: [caption, ..]} and {image name: split}.

    image,caption                      a header names the columns, whatever separates them: comma, tab, bar, semicolon
    7.jpg,"a dog, asleep"              Kaggle's captions.txt and results.csv, the hub's table, a table of one's own
    7.jpg#0<TAB>a dog , asleep         the original Flickr text, the one layout without a header
    {"image": "7.jpg", "captions": ["a dog, asleep"], "split": "val"}     json lines
    dataset_coco.json, captions_val2014.json                              Karpathy's splits, COCO's annotations

Left out: which file a name means, and the split where none is given (layouts.py).
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

NAME_COLUMNS = ("image", "file_name", "filename", "image_name", "image_path")
CAPTION_COLUMNS = ("caption", "captions", "text", "comment", "raw")             # raw: Flickr30k at the hub, a json list
SPLIT_WORDS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val",
               "test": "test", "testing": "test", "restval": "train"}   # restval: what Karpathy left over of COCO's val
COCO = "https://s3.amazonaws.com/images.cocodataset.org/"       # what http://images.cocodataset.org serves, with TLS
CLEAN = ("none", "lower", "words")


def clean_caption(text, how):
    """A caption, or a prompt, simplified before it is tokenised; white space always becomes single blanks.

    "lower" makes small letters. "words" also leaves nothing but apostrophes, hyphens, and letters of every script with
    the marks that belong to them: "A dog, 2 cats." -> "a dog cats". Typographic apostrophes and hyphens become plain.
    """
    text = " ".join(text.split())
    if how == "none":
        return text
    if how == "lower":
        return text.lower()
    text = unicodedata.normalize("NFC", text.lower()).translate({0x2019: "'", 0x2010: "-", 0x2011: "-", 0xAD: None})
    # \p{M}: vowel signs and accents; 200C and 200D, without width, stand inside words of Persian and Hindi
    return " ".join(regex.findall(r"[\p{L}'-][\p{L}\p{M}\u200c\u200d'-]*", text))


@contextlib.contextmanager
def layout(path, wanted, remedy="mend it or fetch it again"):
    """Whatever goes wrong in taking a file apart is one UserError: `PATH is not WANTED (what was wrong); REMEDY`."""
    try:
        yield
    except UnicodeDecodeError as error:                         # it carries the whole file: not for the screen
        raise UserError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    except (csv.Error, ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is not {wanted} ({type(error).__name__}: {str(error)[:80]}); {remedy}") from None


def read_captions(path, notes=None):
    """A table or json lines -> captions and splits. Rows without a name or a caption are counted in `notes`."""
    captions, splits, bad = {}, {}, 0
    with layout(path, "a proper table", "a quote left open, or not doubled, is the usual cause"):
        for row in _rows(path):
            name = row.get(_pick(row, NAME_COLUMNS, path)) or ""
            name, texts = re.sub(r"#\d+$", "", name.strip()), _texts(row, _pick(row, CAPTION_COLUMNS, path))
            bad += not (name and texts)
            if name:
                captions.setdefault(name, []).extend(texts)
            word = (row.get("split") or "").strip().lower()
            split = SPLIT_WORDS.get(word)
            if name and word and (split is None or splits.setdefault(name, split) != split):
                raise UserError(f"{path} gives {name} the split {word!r}; each image needs one of train, val, test")
    if not any(captions.values()):
        raise UserError(f"{path} holds no captions; each line should name an image and say what it shows")
    if bad and notes is not None:
        notes.append(f"{bad} rows of {path.name} without an image name or a caption were left out")
    return captions, splits


def _pick(row, known, path):
    """The one key of a row that is `known`, or None. Of several, none is taken silently: UserError."""
    found = [key for key in row if key in known]
    if len(found) > 1:
        raise UserError(f"{path} has several columns for one thing ({', '.join(found)}); rename all but one of them")
    return found[0] if found else None


def _texts(row, key):
    """The captions of a row: a text, or a list of texts, which stands as json in the column `raw`."""
    texts = json.loads(row[key]) if key == "raw" else row.get(key) or []
    texts = texts if isinstance(texts, list) else [texts]
    return [" ".join(text.split()) for text in texts if text.strip()]


def _rows(path):
    """Yields a dict of each row by the names of its columns: {"image": "a.jpg", "caption": "a dog", "split": "val"}."""
    text = path.read_text(encoding="utf-8-sig").lstrip("\n")
    lines = [line for line in text.split("\n") if line.strip()]                   # splitlines() also cuts at U+2028
    if path.suffix == ".jsonl":
        for number, line in enumerate(lines, 1):
            with layout(f"line {number} of {path}", 'like {"image": "a.jpg", "caption": "a dog"}', "mend it"):
                row = {key.lower(): value for key, value in json.loads(line).items()}
            yield row
        return
    head, rows = lines[0] if lines else "", None
    for separator in "\t|;,":
        header = [cell.strip(' "').lower() for cell in head.split(separator)]
        if {*header} & {*NAME_COLUMNS} and {*header} & {*CAPTION_COLUMNS}:
            rows = csv.reader(io.StringIO(text), delimiter=separator, skipinitialspace=True, strict=True)
            break
    if not rows:
        if "\t" not in head or not tidy_name(head.partition("\t")[0]).endswith(IMAGE_TYPES):
            raise UserError(f"{path} should begin with the line `image,caption`, not {head[:60]!r}")
        lines, header, separator = [head, *lines], ["image", "caption"], "\t"
    if not rows or separator == "|":            # the layouts of publishers, with quotes only inside captions
        rows = ([_unquoted(cell) for cell in line.split(separator)] for line in lines)
    if len(header) > len({*header}):
        raise UserError(f"{path} names a column twice: {head[:60]!r}; rename one of them")
    next(rows)
    for row in filter(None, rows):
        if len(row) > len(header):              # a separator without quotes cut a caption; one at the end can be mended
            if header[-1] not in CAPTION_COLUMNS or separator == "\t":
                raise UserError(f"{path}: the row of {row[0][:60]} has more cells than the header; put quotes round it")
            row[len(header) - 1:] = [f"{separator} ".join(row[len(header) - 1:])]
        yield dict(zip(header, row))


def _unquoted(cell):
    """'"a ""big"" dog"' -> 'a "big" dog'. Quotes round a whole cell are the table's, all others the caption's own."""
    whole = re.fullmatch(r'\s*"((?:[^"]|"")*)"\s*', cell)
    return whole[1].replace('""', '"') if whole else cell


def karpathy(path, name=None):
    """Karpathy's json (2015) -> captions and splits. name: which public data set it should be, to tell a mix-up.

    COCO's images have their folder in front, val2014/COCO_val2014_000000000042.jpg; its `restval`, the part of the
    official val that he tests nothing on, is for training.
    """
    captions, splits = {}, {}
    with layout(path, "in the layout of Karpathy's splits", "mend or remove it"):
        content = read_json(path)
        if name and content.get("dataset", name) != name:
            raise UserError(f"{path} is the split of {content['dataset']}, not of {name}; put that there instead")
        for x in content["images"]:
            image = f"{x['filepath']}/{x['filename']}" if "filepath" in x else x["filename"] + ""
            captions[image] = [" ".join(sentence["raw"].split()) for sentence in x.get("sentences", [])]
            splits[image] = SPLIT_WORDS[x["split"]]
    return captions, splits


def read_coco(path, urls, notes):
    """COCO's captions_val2014.json -> captions and splits; `urls` gets {image: where to fetch it, or None}."""
    captions, by_id, lost = {}, {}, 0
    with layout(path, "in the layout of COCO's captions, {images: [id, file_name], annotations: [image_id, caption]}"):
        content = read_json(path)
        for image in content["images"]:
            file, url = image["file_name"], image.get("coco_url") or ""
            part = re.search(r"(train|val)20\d\d", file) or re.search(r"(train|val|test)(20\d\d)?", path.stem)
            name = by_id[image["id"]] = f"{part[0]}/{file}" if part and "/" not in file else file
            captions[name] = []
            urls[name] = coco_url(name) if not url or "//mscoco.org" in url else re.sub(        # a host that is gone
                "^https?://images.cocodataset.org/", COCO, url)
        for note in content["annotations"]:
            lost += note["image_id"] not in by_id
            captions.get(by_id.get(note["image_id"]), []).append(" ".join(note["caption"].split()))
    if lost:
        notes.append(f"{lost} captions in {path.name} are of images that it does not list, and were left out")
    split = re.search("train|val|test", path.stem)
    return captions, dict.fromkeys(captions, split[0]) if split else {}


def coco_url(name):
    """Where COCO keeps val2014/COCO_val2014_000000000042.jpg, or None for a file that is not its own."""
    return COCO + name if re.match(r"(train|val)20\d\d/", name) else None
