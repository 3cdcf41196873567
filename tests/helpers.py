"""What several tests need: a folder of little photographs, a tiny model's options, a script run as the shell would."""
import csv
import signal
import sys

import torch
from PIL import Image

from tinyvlm.config import run_script

TINY = ["--n-scenes", "48", "--image-size", "32", "--n-layer", "1", "--n-embd", "32", "--n-head", "2",
        "--batch-size", "8", "--epochs", "2", "--eval-interval", "4", "--log-interval", "1", "--dropout", "0.1",
        "--jitter", "0.2", "--crop", "0.2"]
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


def one_sentence(capsys, words):
    """The last line on stderr is an error of one sentence that holds `words`."""
    error = capsys.readouterr().err.splitlines()
    assert error and error[-1].startswith("error: ") and words in error[-1] and len(error[-1]) < 310, error


def same_weights(a, b):
    """Model b has every weight of a, perhaps with rows added; not the batch statistics, which move at any rate."""
    b = b.state_dict()
    for name, tensor in a.state_dict().items():
        if "running" not in name:
            theirs = b[name][:len(tensor)] if tensor.dim() else b[name]
            assert torch.allclose(tensor, theirs, atol=1e-4), name
