"""Files that appear whole or not at all, one way to read and write json and csv, and what a folder of images holds.

Everything tinyvlm leaves on a disk goes through `atomic_write`: a kill at any moment leaves the old file or the new one.
`IMAGE_TYPES` is the one list of what counts as an image's name; whether it is a good image shows when it is opened.
"""
import contextlib
import csv
import io
import json
import os
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
    Raises UserError where `path` is a device, a pipe or a folder (a rename would replace /dev/null by a file), OSError
    naming `path` where the disk refuses.
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
    for entry in os.scandir(path.parent):
        head, _, number = entry.name.removesuffix(".part").rpartition(".")
        if entry.name.endswith(".part") and head == f".{path.name}" and number.isdigit() and not _is_alive(int(number)):
            with contextlib.suppress(OSError):
                os.unlink(entry)


def _is_alive(process):
    if os.name != "posix":              # elsewhere signal 0 does harm, so every process counts as alive
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


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


def list_files(folder):
    """["a/b.jpg", ..]: every file in a folder, shallow ones first. One walk: the 123,287 images of COCO take a second.

    Linked folders count (large sets often lie on another disk), each once. Passed over: hidden files and folders, a
    Mac's resource forks among them (._7.jpg and all of __MACOSX end in .jpg too), and what a killed run was unpacking.
    """
    found, seen, folder = [], set(), Path(folder)
    for root, folders, files in os.walk(folder, followlinks=True):
        real, inner = os.path.realpath(root), Path(root).relative_to(folder).as_posix()
        if real in seen:                                        # a link back up would never end
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(f for f in folders if f != "__MACOSX" and not f.endswith(".incomplete") and f[0] != ".")
        files = [file for file in files if file[0] != "."]
        found += files if inner == "." else [f"{inner}/{file}" for file in files]
    return sorted(sorted(found), key=lambda path: path.count("/"))


def list_images(folder):
    """["b.jpg", "a/c.png", ..]: the images in and below a folder, by their names' endings."""
    return [path for path in list_files(folder) if path.lower().endswith(IMAGE_TYPES)]
