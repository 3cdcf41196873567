"""Files that appear whole or not at all, one way to read and write json and csv, and what a folder of images holds.

All that tinyvlm leaves on a disk goes through `atomic_write`: a kill at any moment leaves the old file or the new one.
`IMAGE_TYPES` is the one list of what counts as an image's name; whether it is a good image shows when it is opened.
`ImageFinder` is the one place that decides which image is meant by a name that somebody wrote.
"""
import contextlib
import csv
import io
import json
import os
import posixpath
import re
import unicodedata
from pathlib import Path

from .config import UserError

try:
    import fcntl
except ImportError:                     # Windows has no flock; `locked` then only warns nobody
    fcntl = None

# Cameras and phones write these. Pillow cannot open .heic by itself: such a file is named as broken, never overlooked.
IMAGE_TYPES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic",
               ".heif")


# ---- writing

def atomic_write(path, write):
    """Call write(file) on a new binary file, then give it the name `path`: json, png, csv, pt and safetensors alike.

    os.replace swaps names in one step, so whoever opens `path` finds the old content or the new, never a part. On a
    failure (full disk, ctrl-C) the new file goes and the old one stays. Missing folders are made, links are followed.
    Raises UserError where `path` is a device or a folder (a rename would replace /dev/null by a file), or OSError.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is no ordinary file; name another one to write")
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")    # same folder: renames cannot cross file systems
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())     # without it a power cut could leave the good name on bytes never written
        os.replace(temporary, path)
    except OSError as error:
        if error.filename in (None, str(temporary)):
            error.filename = str(path)  # the name the user knows; a full disk comes without any
        raise
    finally:
        with contextlib.suppress(OSError):                      # a read-only disk has a sentence already
            temporary.unlink(missing_ok=True)


def _remove_leftovers(path):
    """Remove what a killed process (kill -9) was writing when it died: .NAME.<its number>.part."""
    for entry in os.scandir(path.parent) if os.name == "posix" else ():           # elsewhere signal 0 does harm
        number = entry.name.removeprefix(f".{path.name}.").removesuffix(".part")
        if number.isdecimal() and len(number) < 10 and entry.name == f".{path.name}.{number}.part":
            try:
                os.kill(int(number), 0)                         # nothing is sent; it fails where the process is gone
            except ProcessLookupError:
                with contextlib.suppress(OSError):
                    os.unlink(entry)
            except OSError:
                pass


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
    """A PIL image as a PNG file."""
    atomic_write(path, lambda file: image.save(file, "PNG"))


@contextlib.contextmanager
def locked(path, wait=True):
    """`with locked(path):` lets one process in at a time; the others wait, or with wait=False get a UserError.

    The kernel drops a lock with its process, so a crash leaves none. The empty file stays: removing it would let in
    two, one with the old file open and one with a new.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if fcntl is not None:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                raise UserError(f"{path.parent} is in use by another process; wait for it, or name another folder") \
                    from None
            except OSError:             # a network disk without locks: go on without
                pass
        yield
    finally:
        os.close(handle)


# ---- reading

def read_json(path, error=UserError):
    """The content of a JSON file. Raises `error`, a UserError naming the file, when it is missing or broken."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as fault:
        raise error(f"cannot read {path}: {fault.strerror}; check the path") from fault
    except (ValueError, RecursionError) as fault:   # not UTF-8, not JSON, nested too deeply, a NUL in the path
        raise error(f"{path} is not a readable JSON file: {str(fault)[:100]}; mend it or fetch it again") from fault


def _walk(folder):
    """Yields (subfolder or "", [its files]), each once, though links lead there again (large sets lie on other disks).

    Passed over: hidden ones, a Mac's ._7.jpg and __MACOSX, which are no pictures, and what is being unpacked.
    """
    seen = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(f for f in folders if f[0] != "." and f != "__MACOSX" and not f.endswith(".incomplete"))
        if os.path.realpath(root) in seen:                      # a link back up would never end
            folders.clear()
            continue
        seen.add(os.path.realpath(root))
        yield Path(root).relative_to(folder).as_posix().removeprefix("."), [f for f in files if f[0] != "."]


def list_files(folder):
    """["a/b.jpg", ..]: every file in a folder, shallow ones first. The 123,287 images of COCO take a second."""
    found = [f"{inner}/{file}".removeprefix("/") for inner, files in _walk(folder) for file in files]
    return sorted(found, key=lambda path: (path.count("/"), path))


def list_images(folder):
    """["b.jpg", "a/c.png", ..]: the images in and below a folder, by their names' endings."""
    return [path for path in list_files(folder) if path.lower().endswith(IMAGE_TYPES)]


def tidy_name(name):
    r"""A file's name as people write it -> one spelling: ".\cats\7.JPG#0" -> "cats/7.jpg", accents composed (NFC)."""
    name = re.sub(r"#\d+$", "", unicodedata.normalize("NFC", name).strip()).replace("\\", "/")
    stem, kind = posixpath.splitext(posixpath.normpath(name))
    return stem + kind.lower()


def _ends(path):
    """The ends of a path's folders, longest first: "a/b/c.jpg" -> ["a/b", "b"]."""
    parts = [part for part in path.split("/")[:-1] if part not in ("", "..")]
    return ["/".join(parts[k:]) for k in range(len(parts))]


class ImageFinder:
    """Which image of a folder is meant by a name that somebody wrote.

    It is a path from `base`, the subfolder whose file names it; or the longest end of its folders that exists decides:
    data/pets/cats/8.jpg may be photos/cats/8.jpg, never dogs/8.jpg. Only where none exists does the file name stand in.
    """

    def __init__(self, folder):
        self.folder, self.root, every = Path(folder), Path(os.path.abspath(folder)).as_posix(), list_files(folder)
        self.paths = [path for path in every if path.lower().endswith(IMAGE_TYPES)]
        self.files = [path for path in every if not path.lower().endswith(IMAGE_TYPES)]         # captions and the like
        self.at, self.called = {}, {}                           # {whole path: [path, ..]}, {file name: [path, ..]}
        for path in self.paths:
            whole = tidy_name(f"{self.root}/{path}")
            self.at.setdefault(whole, []).append(path)
            self.called.setdefault(posixpath.basename(whole), []).append(path)
        self.folders = {end for inner, _ in _walk(folder) for end in _ends(tidy_name(f"{self.root}/{inner}/x"))}

    def folder_of(self, name):
        """The longest end of the name's folders that exists: "data/pets/cats/8.jpg" -> "cats", or ""."""
        return next((end for end in _ends(tidy_name(name)) if end in self.folders), "")

    def find(self, name, base="", by_name=True):
        """Its path in the folder (and below base), or None. Raises UserError where several files fit."""
        tidy = tidy_name(name)
        fit = self.at.get(tidy_name(posixpath.join(self.root, base, tidy)), [])
        if not fit and ((end := self.folder_of(name)) or by_name):
            file = posixpath.basename(tidy)
            fit = [path for path in self.called.get(file, []) if path.startswith(base and base + "/")
                   and tidy_name(f"{self.root}/{path}").endswith(f"/{end}/{file}" if end else file)]
        if len(fit) < 2:
            return fit[0] if fit else None
        if len({posixpath.dirname(path) for path in fit}) == 1:                   # 7.jpg beside 7.JPG: as it is spelled
            fit = [path for path in fit if posixpath.basename(path) in name] or fit
        copies = {re.sub(r"(?<![^/])([^/]+/)\1+", r"\1", path) for path in fit}   # Kaggle has Images/Images/7.jpg, too
        if len(copies) > 1 or len({(self.folder / path).stat().st_size for path in fit}) > 1:
            raise UserError(f"{name} could be {fit[0]} or {fit[1]} in {self.folder}; keep one, or write its folder too")
        return fit[0]
