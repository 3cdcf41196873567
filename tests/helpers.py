"""What several tests need: a folder of little photographs, a tiny model's options, a script run as the shell would."""
import csv
import io
import multiprocessing
import os
import signal
import sys
import time

import torch
from PIL import Image

import data
import train
from tinyvlm.config import run_script
from tinyvlm.runs import read_state

TINY = ["--n-scenes", "48", "--image-size", "32", "--n-layer", "1", "--n-embd", "32", "--n-head", "2",
        "--batch-size", "8", "--epochs", "2", "--eval-interval", "4", "--log-interval", "1", "--dropout", "0.1",
        "--jitter", "0.2", "--crop", "0.2", "--device", "cpu"]
TEXT = ["--vocab-size", "320"]              # for the tasks that have a text model


def album(folder, n=20, captions=True):
    """n little images and a Kaggle-style captions.txt, with commas, quotes and five captions an image."""
    (folder / "Images").mkdir(parents=True)
    for k in range(n):
        Image.new("RGB", (12 + k, 10), (10 * k % 256, 50, 50)).save(folder / "Images" / f"{k}.jpg")
    if captions:
        rows = [f'{k}.jpg,"a dog, number {k}, says ""wau"" {j} ."' for k in range(n) for j in range(5)]
        (folder / "captions.txt").write_text("image,caption\n" + "\n".join(rows) + "\n")
    return folder


def from_folder(folder):
    """The flags of a run on an album."""
    return ["--dataset", "folder", "--data-dir", folder]


def png(k):
    """A picture, as bytes, whose colour tells its number."""
    file = io.BytesIO()
    Image.new("RGB", (24, 20), (4 * k % 256, 240 - 4 * k % 240, 7)).save(file, "PNG")
    return file.getvalue()


def table(path, rows):
    """A csv file with quotes where they are needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return path


def run(script, *argv, code=0):
    """Call a script's main() as the shell would; fails on another exit code."""
    old, sys.argv = sys.argv, [f"{script.__name__}.py", *map(str, argv)]
    handlers = [signal.getsignal(sign) for sign in (signal.SIGINT, signal.SIGTERM)]
    try:
        run_script(script.main)
        assert code == 0, "the script ended well, but should not have"
    except SystemExit as stop:
        assert stop.code == code
    finally:
        sys.argv = old
        assert handlers == [signal.getsignal(sign) for sign in (signal.SIGINT, signal.SIGTERM)], "handlers stay behind"


def losses(out):
    return {int(row["step"]): float(row["train_loss"]) for row in csv.DictReader(open(out / "log.csv"))}


def refused(capsys, words, script, *argv):
    """A script ends with exit code 2 and one sentence that holds `words`: the last line on stderr."""
    run(script, *argv, code=2)
    error = capsys.readouterr().err.splitlines()
    assert error and error[-1].startswith("error: ") and words in error[-1] and len(error[-1]) < 310, error


def same_weights(a, b):
    """Model b has every weight of a, perhaps with rows added; not the batch statistics, which move at any rate."""
    b = b.state_dict()
    for name, tensor in a.state_dict().items():
        if "running" not in name:
            theirs = b[name][:len(tensor)] if tensor.dim() else b[name]
            assert torch.allclose(tensor, theirs, atol=1e-4), name


def same_state(a, b, where=""):
    """Dicts, lists and tensors in one another, the same bit for bit; but for the times in the log, and the options."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a.keys() - {"ms", "images_per_s", "options"}:
            same_state(a[key], b[key], f"{where} {key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for k, pair in enumerate(zip(a, b)):
            same_state(*pair, f"{where} {k}")
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, where


def same_run(a, b):
    """Two runs left the same, bit for bit: log, weights, optimizer, random numbers, and the best model."""
    same_state(read_state(a), read_state(b))
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()


# ---- train.py as processes of their own. A fork server that has imported everything saves each of them four seconds.

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "pytest", "helpers"])


def _process(argv, log, env, in_memory):
    """The child: a process group of its own, its output in the file `log`."""
    os.setsid()
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1), os.dup2(out, 2)
    os.environ.update(env)
    if not in_memory:
        data.free_memory = lambda: 0
    sys.argv = ["train.py", *argv]
    run_script(train.main)


class Training:
    """train.py in a process group of its own, with or without room for the images in memory. rank: of two."""

    def __init__(self, log, *argv, in_memory=True, rank=None, port=0):
        env = {} if rank is None else {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        self.log = log
        self.process = FORKS.Process(target=_process, args=([*map(str, argv)], log, env, in_memory))
        self.process.start()

    def printed(self):
        return self.log.read_bytes().decode(errors="surrogateescape") if self.log.exists() else ""

    def until(self, words):
        """Wait until it has printed these words."""
        end = time.monotonic() + 60
        while words not in self.printed():
            assert self.process.is_alive() and time.monotonic() < end, self.printed()
            time.sleep(0.01)

    def signal(self, sign):
        """To the whole group, as a terminal or a scheduler does."""
        os.killpg(self.process.pid, sign)

    def wait(self):
        """The exit code."""
        self.process.join(60)
        assert self.process.exitcode is not None, self.printed()
        return self.process.exitcode
