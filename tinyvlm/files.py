"""Files that appear whole or not at all, one way to read and write json and csv, and what a folder of images holds.

All that tinyvlm leaves on a disk goes through `atomic_write`: a kill at any moment leaves the old file or the new one.
`IMAGE_TYPES` is the one list of what counts as an image's name; whether it is a good image shows when it is opened.
`ImageFinder` is the one place that decides which image is meant by a name that somebody wrote.
"""
import contextlib
import csv
import fcntl
import glob
import io
import json
import os
import posixpath
import re
import tempfile
import time
import unicodedata
from pathlib import Path

from .config import UserError

# Pillow cannot open .heic, from phones, by itself: such a file is named as broken, never overlooked.
IMAGE_TYPES = tuple(".jpg .jpeg .jpe .jfif .png .webp .gif .bmp .tif .tiff .avif .heic .heif".split())


def atomic_write(path, write):
    """Call write(file) on a new binary file, then give it the name `path`: json, png, csv, pt and safetensors alike.

    os.replace swaps names in one step, so whoever opens `path` finds the old content or the new, never a part. On a
    failure (full disk, ctrl-C) the new file goes and the old one stays. Missing folders are made, links are followed.
    A device is refused: a rename would replace /dev/null by a file.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is no ordinary file; name another one to write")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")    # same folder: renames cannot cross file systems
    try:
        for part in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
            if time.time() - part.stat().st_mtime > 600:        # left by a process that was killed
                part.unlink()
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())     # else a power cut could leave the good name on bytes never written
        os.replace(temporary, path)
    except OSError as error:
        error.filename = str(path)      # the name the user knows; a full disk comes without any
        raise
    finally:
        with contextlib.suppress(OSError):                      # it has been renamed, or could not be made
            temporary.unlink()


def write_text(path, text):
    """A UTF-8 text file. Names that are no text (bytes of another encoding) go back to the bytes they came from."""
    atomic_write(path, lambda file: file.write(text.encode("utf-8", errors="surrogateescape")))


def write_json(path, obj):
    """A JSON file, pure ASCII: odd file names are escaped."""
    write_text(path, json.dumps(obj, indent=2) + "\n")


def write_csv(path, header, rows):
    """A csv file: the names of the columns, then rows, each a list of cells or a dict by those names."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([row.get(name, "") for name in header] if isinstance(row, dict) else row for row in rows)
    write_text(path, text.getvalue())


def write_image(path, image):
    """A PIL image as a PNG file. Raises UserError for another ending: it would replace somebody's weights or table."""
    if Path(path).suffix.lower() != ".png":
        raise UserError(f"{path} will be a picture: give it a name that ends in .png")
    atomic_write(path, lambda file: image.save(file, "PNG"))


@contextlib.contextmanager
def locked(path, wait=True):
    """`with locked(path):` lets one process in at a time; the others wait, or with wait=False get a UserError.

    The kernel drops a lock with its process. The empty file stays: with old and new file open, two would be in.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise UserError(f"{path.parent} is in use by another process; wait, or name another folder") from None
        except OSError:                 # a network disk without locks
            pass
        yield


def check_writable(folder):
    """Refuse, before any work is done for it, a folder that nothing could be written into; it need not exist yet."""
    place = Path(os.path.abspath(folder))
    try:
        tempfile.TemporaryFile(dir=next(path for path in (place, *place.parents) if path.exists())).close()
    except OSError as error:
        raise UserError(f"cannot write into {folder} ({error.strerror}); name another folder") from None


def read_json(path, missing_ok=False):
    """The object in a JSON file, or {} where there is no file and missing_ok. Raises UserError when it is broken."""
    if missing_ok and not (path and Path(path).exists()):
        return {}
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as fault:   # not UTF-8, not JSON, nested too deeply
        raise UserError(f"{path} is not a readable JSON file: {str(fault)[:100]}; mend it or fetch it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object, {{..}}; mend it or fetch it again")
    return content


def list_files(folder):
    """["b.txt", "a/b.jpg", ..]: every file in a folder, shallow ones first; links are followed.

    Passed over: hidden ones and a Mac's ._7.jpg and __MACOSX; what is being unpacked; and copies in a folder of the
    same name, as Kaggle has them (Images/7.jpg, Images/Images/7.jpg).
    """
    first = {}
    for path in sorted(glob.glob("**", root_dir=folder, recursive=True), key=lambda path: (path.count("/"), path)):
        file = os.path.join(folder, path)
        if os.path.isfile(file) and not re.search(r"(^|/)__MACOSX/|\.incomplete/", path):
            first.setdefault((re.sub(r"(?<![^/])([^/]+/)\1+", r"\1", path), os.path.getsize(file)), path)
    return [*first.values()]


def list_images(folder):
    """["b.jpg", "a/c.png", ..]: the images in and below a folder, by their names' endings."""
    return [path for path in list_files(folder) if path.lower().endswith(IMAGE_TYPES)]


def tidy_name(name):
    r"""A file's name as people write it -> one spelling: ".\cats\7.JPG#0" -> "cats/7.jpg", accents composed (NFC)."""
    name = re.sub(r"#\d+$", "", unicodedata.normalize("NFC", name).strip()).replace("\\", "/")
    stem, kind = posixpath.splitext(posixpath.normpath(name))
    return stem + kind.lower()


def _ends(path):
    """"a/b/c.jpg" -> [("a/b", "a/b/c.jpg"), ("b", "b/c.jpg"), ("", "c.jpg")]: ends of its folders and of itself."""
    parts = path.split("/")
    return [("/".join(parts[k:-1]), "/".join(parts[k:])) for k in range(len(parts))]


class ImageFinder:
    """Which image of a folder is meant by a name that somebody wrote.

    The longest end of the name whose folder exists decides: data/pets/cats/8.jpg may be photos/cats/8.jpg, and if that
    is missing, nothing stands in, not dogs/8.jpg. Only where no name has a folder that exists do file names suffice.
    """

    def __init__(self, folder, images=None):
        self.folder, self.home = Path(folder), Path(os.path.abspath(folder)).name
        if images is None and not self.folder.is_dir():
            raise UserError(f"there is no folder {folder}; name one with --data-dir")
        self.files = list_files(folder) if images is None else images
        self.images = [path for path in self.files if path.lower().endswith(IMAGE_TYPES)] if images is None else images
        inner = ["", *glob.glob("**/", root_dir=folder, recursive=True)] if images is None else images
        self.places = {place for path in inner for place, _ in _ends(tidy_name(f"{self.home}/{path}x"))}
        self.ending = {}                                        # {"cats/8.jpg": [the images whose paths end so]}
        for path in self.images:
            for _, end in _ends(tidy_name(f"{self.home}/{path}")):
                self.ending.setdefault(end, []).append(path)
                if not (stem := posixpath.splitext(end)[0]).endswith(IMAGE_TYPES):          # "cats/8" will do
                    self.ending.setdefault(stem, []).append(path)

    def find(self, names, base=""):
        """{name: path} of those that are there: below `base`, the folder of the file that names them, else anywhere."""
        tidy = {name: tidy_name(name) for name in names}
        by_name = not any(place in self.places for name in tidy.values() for place, _ in _ends(name)[:-1])
        for start in (base and base + "/", ""):
            found = {name: self._find(tidy[name], start, by_name) for name in names}
            if any(found.values()):
                break
        return {name: path for name, path in found.items() if path}

    def _find(self, name, start, by_name):
        whole = tidy_name(posixpath.join(self.home, start, name))
        for place, end in [(None, whole), *_ends(name)[:None if by_name else -1]]:
            fit = [path for path in self.ending.get(end, ()) if path.startswith(start)]
            if fit or place in self.places:
                break
        if len(fit) > 1:
            raise UserError(f"{name} could be {fit[0]} or {fit[1]} in {self.folder}; keep one, or write its folder too")
        return fit[0] if fit else None
