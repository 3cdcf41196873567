"""Files that appear whole or not at all, and which image is meant by a name that somebody wrote."""
import os
import subprocess
import sys

import pytest

from conftest import ROOT
from tinyvlm.config import UserError
from tinyvlm.files import (ImageFinder, atomic_write, list_files, list_images, locked, read_json, tidy_name, write_csv,
                           write_json, write_text)


def touch(folder, *names, text="x"):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


# -- writing -----------------------------------------------------------------------------------------------------------

def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    write_text(tmp_path / "a", "old")

    def fails(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")
    with pytest.raises(OSError) as error:
        atomic_write(tmp_path / "a", fails)
    assert error.value.filename == str(tmp_path / "a") and (tmp_path / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_what_a_killed_process_was_writing_is_removed_and_that_of_a_living_one_is_not(tmp_path):
    touch(tmp_path, ".a.7.part", ".a.8.part", ".b.7.part")
    for name in (".a.7.part", ".b.7.part"):
        os.utime(tmp_path / name, (0, 0))                       # nobody has written to it for long
    write_text(tmp_path / "a", "new")
    assert sorted(os.listdir(tmp_path)) == [".a.8.part", ".b.7.part", "a"]


def test_a_device_is_no_file_to_write(tmp_path):
    """As root, a rename over /dev/null would replace it for the whole machine."""
    os.mkfifo(tmp_path / "pipe")
    for path in ("/dev/null", tmp_path / "pipe", tmp_path):
        with pytest.raises(UserError, match="no ordinary file"):
            write_text(path, "x")


def test_json_and_csv_come_back(tmp_path):
    write_json(tmp_path / "a.json", {"a": [1, "\udcff"]})
    assert read_json(tmp_path / "a.json") == {"a": [1, "\udcff"]}
    write_csv(tmp_path / "a.csv", ["b", "a"], [[1, "x,y"], {"a": 2}])
    assert (tmp_path / "a.csv").read_text() == 'b,a\n1,"x,y"\n,2\n'
    for content in ("{", "[" * 100_000, "[1]", "null"):
        with pytest.raises(UserError, match="b.json is not a (readable )?JSON"):
            read_json(touch(tmp_path, "b.json", text=content) / "b.json")


def test_a_second_process_is_told_or_waits(tmp_path):
    code = "from tinyvlm.files import *\nwith locked(Path(os.sys.argv[1]), wait=False): print('in')"

    def other():
        return subprocess.run([sys.executable, "-c", code, tmp_path / "lock"], cwd=ROOT, capture_output=True, text=True)
    with locked(tmp_path / "lock"):
        assert "in use by another process" in other().stderr
    assert other().stdout == "in\n"


# -- what a folder holds -----------------------------------------------------------------------------------------------

def test_what_is_no_data_is_passed_over_and_copies_of_a_folder_within_itself(tmp_path):
    """Kaggle's zips hold Images/Images/8.jpg beside Images/8.jpg. Of another size, it is another image."""
    touch(tmp_path / "disk", "a.jpg")
    touch(tmp_path / "set", "b.png", "deep/er/c.jpg", "I/8.jpg", "I/I/8.jpg", "I/9.jpg", "xI/I/8.jpg", "xI/8.jpg",
          "__MACOSX/b.png", "._b.png", ".thumbs/b.png", "d.incomplete/d.png", "7.jpg/e.png")
    touch(tmp_path / "set", "I/I/9.jpg", text="larger")
    os.symlink(tmp_path / "disk", tmp_path / "set" / "linked")
    assert list_files(tmp_path / "set") == ["b.png", "7.jpg/e.png", "I/8.jpg", "I/9.jpg", "linked/a.jpg", "xI/8.jpg",
                                            "I/I/9.jpg", "deep/er/c.jpg", "xI/I/8.jpg"]
    assert list_files(tmp_path / "nothing") == []
    touch(tmp_path / "new", "a.JFIF", "b.avif", "c.heic", "d.jpe", "e.txt", "f.pdf", "g.h5")    # from phones, browsers
    assert list_images(tmp_path / "new") == ["a.JFIF", "b.avif", "c.heic", "d.jpe"]


@pytest.mark.parametrize("written, tidy", [
    ("a.jpg", "a.jpg"), (" ./a.JPG ", "a.jpg"), ("cats\\x\\a.jpg", "cats/x/a.jpg"), ("cats//a.Jpeg#12", "cats/a.jpeg"),
    ("b/../A.jpg", "A.jpg"), ("../a.jpg", "../a.jpg"), ("cafe\u0301.png", "caf\u00e9.png"), ("a#1.jpg", "a#1.jpg"),
    ("2258277193_586949ec62.jpg.1#0", "2258277193_586949ec62.jpg.1")])
def test_names_are_brought_to_one_spelling(written, tidy):
    assert tidy_name(written) == tidy == tidy_name(tidy)


def found(finder, name, base=""):
    return finder.find([name], base).get(name)


def test_a_name_is_found_however_it_is_written(tmp_path, monkeypatch):
    folder = touch(tmp_path / "photos", "cats/8.jpg", "dogs/8.jpg", "cafe\u0301.png", "p.JPG")
    finder = ImageFinder(folder)
    for name in ("cats/8.jpg", "./cats/8.jpg", ".\\cats\\8.JPG", "photos/cats/8.jpg", f"{folder}/cats/8.jpg",
                 "/home/else/photos/cats/8.jpg", "C:\\data\\cats\\8.jpg", "../cats/8.jpg", "cats/8.jpg#3"):
        assert found(finder, name) == "cats/8.jpg", name
    assert found(finder, "8.jpg", base="cats") == found(finder, "../cats/8.jpg", base="dogs") == "cats/8.jpg"
    assert found(finder, "caf\u00e9.png") == "cafe\u0301.png"
    assert found(finder, "p.jpg") == "p.JPG" and found(finder, "P.jpg") is None
    monkeypatch.chdir(tmp_path)
    assert found(ImageFinder("photos"), "photos/dogs/8.jpg") == "dogs/8.jpg"


def test_a_name_without_an_ending_is_the_image_of_that_name(tmp_path):
    """Tables of numbers and VOC's lists have none; of two kinds none is chosen, and "a.jpg" is no name of a.jpg.png."""
    finder = ImageFinder(touch(tmp_path, "x/000007.JPG", "8.png", "8.jpg", "a.jpg.png"))
    assert finder.find(["000007", "a.jpg"]) == {"000007": "x/000007.JPG"} and found(finder, "8.png") == "8.png"
    with pytest.raises(UserError, match="8 could be"):
        finder.find(["8"])


def test_an_image_never_stands_in_for_that_of_another_folder(tmp_path):
    """cats/8.jpg is missing, and dogs/8.jpg was once taken for it. The folder is there, empty or not: no stand-in."""
    (tmp_path / "cows").mkdir()
    finder = ImageFinder(touch(tmp_path, "1.jpg", "dogs/8.jpg", "cats/9.jpg", "old/birds.txt", "a/pigs/7.jpg",
                               "b/pigs/8.jpg"))
    for name in ("cows/8.jpg", "cats/8.jpg", "x/cats/8.jpg", "old/8.jpg", "a/pigs/8.jpg"):
        assert found(finder, name) is None, name
    assert found(finder, "images/9.jpg") == "cats/9.jpg"         # there is no folder images at all
    names = ["images/9.jpg", "cats/9.jpg", "9.jpg", "1.jpg"]     # but where one name's folder exists, names are paths
    assert finder.find(names) == {"cats/9.jpg": "cats/9.jpg", "1.jpg": "1.jpg"}
    assert finder.find(["9.jpg", "8.jpg"], base="cats") == {"9.jpg": "cats/9.jpg"}


def test_of_two_images_none_is_taken_by_alphabet(tmp_path):
    folder = touch(tmp_path, "a/8.jpg", "b/8.jpg", "0.jpg", "a/0.jpg", "1.jpg", "1.JPG", "a/2.JPG", "b/2.jpg")
    finder = ImageFinder(folder)
    for name in ("8.jpg", "images/8.jpg", "2.jpg", "1.jpg"):
        with pytest.raises(UserError, match="could be .* or .* in .*; keep one"):
            finder.find([name])
    assert [found(finder, name) for name in ("a/8.jpg", "0.jpg", "b/2.JPG")] == ["a/8.jpg", "0.jpg", "b/2.jpg"]
