"""The three scripts, run for real at tiny size: every promise of the README that a small machine can check."""
import csv
import io
import json
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from PIL import Image

import bench
import data
import sample
import train
from conftest import REFERENCE, ROOT
from servers import send
from test_data import album, from_folder
from tinyvlm.config import UserError, run_script
from tinyvlm.gpt import GPT, GPTConfig
from tinyvlm.pretrained import export_gpt2, export_run, load_vit
from tinyvlm.tokenizer import BPETokenizer
from tinyvlm.weights import load_safetensors

TINY = ["--n-scenes", "48", "--image-size", "32", "--n-layer", "1", "--n-embd", "32", "--n-head", "2",
        "--vocab-size", "320", "--batch-size", "8", "--epochs", "2", "--eval-interval", "4", "--log-interval", "1",
        "--dropout", "0.1", "--jitter", "0.2", "--crop", "0.2"]


def run(script, *argv, code=0):
    """Call a script's main() as the shell would; returns nothing, fails on another exit code."""
    old, sys.argv = sys.argv, [f"{script.__name__}.py", *map(str, argv)]
    handler = signal.getsignal(signal.SIGINT)
    try:
        run_script(script.main)
        assert code == 0, "the script ended well, but should not have"
    except SystemExit as stop:
        assert stop.code == code
    finally:
        sys.argv = old
        signal.signal(signal.SIGINT, handler)


def losses(out):
    return {int(row["step"]): float(row["train_loss"]) for row in csv.DictReader(open(out / "log.csv"))}


def same_run(a, b):
    """Two runs left the same: weights, optimizer, log (but for the times), bit for bit."""
    assert losses(a) == losses(b)
    one, two = (torch.load(x / "state.pt", weights_only=True) for x in (a, b))
    assert one["step"] == two["step"] and one["best"] == two["best"] and torch.equal(one["rng"], two["rng"])
    for key, tensor in one["model"].items():
        assert torch.equal(tensor, two["model"][key]), key
    assert len(one["optimizers"]) == len(two["optimizers"])
    for mine, other in zip(one["optimizers"], two["optimizers"]):
        assert mine["state"].keys() == other["state"].keys()
        for k, slot in mine["state"].items():
            assert all(torch.equal(slot[name], other["state"][k][name]) for name in slot)
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    run(train, *TINY, "--out-dir", out)
    return out


def test_training_leaves_a_complete_folder(trained):
    names = {p.name for p in trained.iterdir()}
    assert names == {"model.safetensors", "config.json", "tokenizer.json", "state.pt", "log.csv", "curves.png",
                     "samples.png", "example.png"}
    config = json.loads((trained / "config.json").read_text())
    assert config["task"] == "caption" and config["scores"]["perplexity"] > 1 and "test exact" in config["scores"]
    seen = losses(trained)
    assert list(seen) == list(range(1, 13)) and seen[12] < seen[1]
    for name in ("curves.png", "samples.png", "example.png"):
        Image.open(trained / name).verify()


def test_the_command_printed_at_the_end_works(tmp_path, capsys):
    run(train, *TINY, "--out-dir", tmp_path / "r", "--epochs", "0.2", "--model", "prefix")
    printed = capsys.readouterr().out
    for words in ("held-out images", "truth", "test split: exact", "min left"):
        assert words in printed
    command = re.search(r"python sample.py (.+)", printed)[1]
    run(sample, *command.split())
    assert "example.png: " in capsys.readouterr().out


@pytest.mark.parametrize("how", [[], ["--num-beams", "3"], ["--temperature", "1.0", "--top-k", "5", "--seed", "3"],
                                 ["--temperature", "0.7", "--top-p", "0.9", "--seed", "3"], ["--prompt", "a large"]])
def test_sample_on_files_and_folders_as_json(trained, tmp_path, capsys, how):
    """Every way of decoding: a line an image, and the same captions again, whatever the batches."""
    album(tmp_path, n=3, captions=False)
    (tmp_path / "Images" / "below").mkdir()                     # folders inside count, and so does any image format
    Image.open(tmp_path / "Images" / "2.jpg").save(tmp_path / "Images" / "below" / "3.TIF")
    argv = ["--image", trained / "example.png", tmp_path / "Images", "--out-dir", trained, "--json", *how]
    run(sample, *argv)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [set(line) for line in lines] == [{"image", "caption"}] * 5
    if "--prompt" in how:
        assert all(line["caption"].startswith("a large") for line in lines)
    run(sample, *argv, "--batch-size", "5")
    again = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert again == lines


def test_sample_from_an_address_and_attention(host, trained, tmp_path, capsys):
    for name in ("example.png", "log.csv"):
        host.pages[f"/{name}"] = send((trained / name).read_bytes())
    run(sample, "--image", f"{host.url}/example.png", "--out-dir", trained, "--attention", tmp_path / "look.png")
    run(sample, "--image", trained / "example.png", "--out-dir", trained)
    one, two = capsys.readouterr().out.splitlines()
    assert one.split(": ")[1:] == two.split(": ")[1:] or one.split("example.png: ")[1] == two.split("example.png: ")[1]
    assert Image.open(tmp_path / "look.png").size[0] > 500
    run(sample, "--image", f"{host.url}/none.png", "--out-dir", trained, code=2)
    assert "404" in capsys.readouterr().err
    run(sample, "--image", f"{host.url}/log.csv", "--out-dir", trained, code=2)
    assert "not an image" in capsys.readouterr().err


@pytest.mark.parametrize("argv, words", [
    (["--image", "x.png", "--out-dir", "nothing-here"], "python train.py"), (["--image", "no-such.png"], "no-such.png"),
    ([], "--image"), (["--imgae", "x"], "--image"), (["--image", "EXAMPLE", "--prompt", "a " * 99], "shorten"),
    (["--image", "EXAMPLE", "--num-beams", "2", "--temperature", "1"], "--temperature"),
    (["--image", "EMPTY"], "holds no images"), (["--image", "x", "--top-k", "0"], "--top-k"),
    (["--image", "x", "--temperature", "nan"], "--temperature"), (["--image", "x", "--num-beams", "0"], "--num-beams"),
    (["--image", "x", "--temperature", "1e-320"], "must be 0, or a number such as 0.8, not 1e-320"),
    (["--image", "x", "--top-p", "7", "--temperature", "1"], "--top-p"),
    (["--image", "x", "--max-tokens", "-3"], "--max-tokens"), (["--image", "x", "--device", "nonsense"], "--device"),
    (["--image", "x", "--batch-size", "-2"], "--batch-size"), (["--image", "x", "--top-k", "3"], "--temperature"),
    (["--image", "EXAMPLE", "--features", "f.safetensors"], "drop --features"),
    (["--image", "EXAMPLE", "--hits", "3"], "--hits is for a run of --task clip"),
    (["--image", "EXAMPLE", "--images", "photos"], "--images and --sheet go with --search"),
    (["--image", "EXAMPLE", "--template", "a {}"], "--template goes with --labels"),
    (["--search", "x", "--labels", "a", "b"], "ask one at a time"),
    (["--search", "x", "--image", "y"], "drop --image")])
def test_sample_mistakes_are_one_sentence(trained, tmp_path, capsys, argv, words):
    argv = [{"EXAMPLE": trained / "example.png", "EMPTY": tmp_path}.get(a, a) for a in argv]
    run(sample, *(argv if "--out-dir" in argv else [*argv, "--out-dir", trained]), code=2)
    error = capsys.readouterr().err
    assert words in error and error.startswith("error: ") and error.count("\n") == 1


def test_sample_with_a_damaged_or_foreign_run(trained, tmp_path, capsys):
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (tmp_path / name).write_bytes((trained / name).read_bytes())
    argv = ["--image", trained / "example.png", "--out-dir", tmp_path]
    config = json.loads((tmp_path / "config.json").read_text())
    run(sample, *argv, "--labels", "a dog", code=2)                               # a checkpoint of another task
    assert "was trained for --task caption; --labels is for a run of --task clip" in capsys.readouterr().err
    for foreign in ({**config, "task": "clip"}, {}, {**config, "sizes": {**config["sizes"], "model": "rnn"}}):
        (tmp_path / "config.json").write_text(json.dumps(foreign))
        run(sample, *argv, code=2)
        assert "config.json" in capsys.readouterr().err
    recipe = config["recipe"]
    for edit in ({"max_tokens": "x"}, {"max_tokens": 99999}, {"first": 99999}, {"end": "q"}, {"end": None},
                 {"clean": "foo"}, {"options": None}, {"recipe": {**recipe, "mode": "zoom"}},
                 {"recipe": {**recipe, "size": 0}}, {"model": "prefix"}):
        (tmp_path / "config.json").write_text(json.dumps({**config, **edit}))
        run(sample, *argv, code=2)
        assert re.search(rf"config.json.*{[*edit][0]} is ", capsys.readouterr().err), edit
    (tmp_path / "config.json").write_text("{")
    run(sample, *argv, code=2)
    assert "config.json" in capsys.readouterr().err
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[:-100])
    run(sample, *argv, code=2)
    assert "model.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize("argv, words", [
    (["--preset", "huge"], "laptop"), (["--lerning-rate", "1"], "error"), (["--n-objects", "9"], "--n-objects"),
    (from_folder("nowhere"), "nowhere"), (["--batch-size", "7", "--accum", "2"], "--batch-size 7"),
    (["--device", "cuda"], "cuda"), (["--device", "tpu9"], "tpu9"), (["--image-size", "30"], "--image-size 30"),
    (["--workers", "-1"], "--workers"), (["--epochs", "inf"], "--epochs"), (["--beta2", "2"], "--beta2"),
    (["--wiring", "lockstep", "--model", "prefix"], "lockstep"),
    (["--task", "clip", "--captions-per-image", "3"], "--captions-per-image"),
    (["--model", "prefix", "--shuffle", "3"], "--shuffle 3"), (["--soft-attention", "--n-head", "0"], "--n-head"),
    (["--device", "meta"], "--device meta"), (["--num-beams", "3"], "--num-beams is for --eval-only"),
    (["--labels", "x.csv"], "--labels is for --task classify"), (["--open-decoder", "nan"], "--open-decoder"),
    (["--task", "vqa", "--model", "prefix", "--max-tokens", "8"], "--max-tokens 8")])
def test_train_mistakes_are_one_sentence_and_leave_nothing(tmp_path, capsys, argv, words):
    if argv == ["--device", "cuda"] and torch.cuda.is_available():
        argv, words = ["--device", "cuda:99"], "cuda:99"
    run(train, *TINY, *argv, "--out-dir", tmp_path / "r", code=2)
    error = capsys.readouterr().err.splitlines()[-1]
    assert words in error and error.startswith("error: ") and not (tmp_path / "r").exists()


def test_a_new_run_replaces_an_old_one_whole(trained, tmp_path, capsys):
    """Stopped before its first evaluation, a new run once left its state beside the old run's model and tokenizer."""
    out = tmp_path / "my run"
    out.mkdir()
    for path in trained.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    run(train, "--eval-only", "--out-dir", out, "--num-beams", "0", code=2)
    assert "--num-beams" in capsys.readouterr().err
    run(train, *TINY, "--vision", out, "--out-dir", out, code=2)                  # it would erase what it starts from
    assert "give another --out-dir" in capsys.readouterr().err and (out / "model.safetensors").exists()
    run(train, *TINY, "--out-dir", out, "--stop-after", "2")
    printed = capsys.readouterr().out
    assert "replacing the run" in printed and f"--out-dir '{out}'" in printed
    assert not (out / "model.safetensors").exists()
    (out / "state.pt").unlink()
    (out / "config.json").write_text('{"model_type": "gpt2"}')                    # files of these names, but not ours
    run(train, *TINY, "--out-dir", out, code=2)
    assert "not of a run of train.py" in capsys.readouterr().err and (out / "config.json").exists()
    (tmp_path / "file").write_text("")
    run(train, *TINY, "--out-dir", tmp_path / "file", code=2)
    run(train, *TINY, "--out-dir", tmp_path / "file" / "below", code=2)
    assert capsys.readouterr().err.count("error: ") == 2


def test_what_sample_py_left_in_out_is_no_foreign_folder(tmp_path):
    """`sample.py --pretrained .. --search` keeps its embeddings in out/, where the first run will go."""
    (tmp_path / "search-1.safetensors").write_bytes(b"")
    assert [path.name for path in train.old_files(tmp_path)] == ["search-1.safetensors"]
    (tmp_path / "log.csv").write_text("mine")
    with pytest.raises(UserError, match="holds log.csv, but not of a run"):
        train.old_files(tmp_path)


def test_a_non_finite_loss_names_its_step(tmp_path, capsys):
    run(train, *TINY, "--out-dir", tmp_path / "r", "--lr", "1e30", "--grad-clip", "0", "--log-interval", "5", code=2)
    assert re.search(r"the loss of step [2345] is not finite", capsys.readouterr().err)


def test_data_prepares_and_draws(tmp_path, capsys):
    """data.py counts what it found, names what is broken, and draws the sheet in either case."""
    run(data, "--sheet", tmp_path / "a.png", "--n-scenes", "50")
    folder = album(tmp_path / "album")
    (folder / "Images" / "4.jpg").write_bytes(b"broken")
    run(data, *from_folder(folder), "--sheet", tmp_path / "b.png", code=2)
    out, err = capsys.readouterr()
    assert "train     50 images" in out and "4.jpg" in out and "1 broken" in out and "1 of 20 images are broken" in err
    assert Image.open(tmp_path / "a.png").size[0] > 700 and Image.open(tmp_path / "b.png").size[0] > 700


def test_photographs_lockstep_and_several_captions_an_image(tmp_path, capsys):
    run(train, *from_folder(album(tmp_path / "album")), "--clean", "words", "--captions-per-image", "5",
        "--image-size", "16", "--cache", "none", "--n-layer", "2", "--n-embd", "32", "--n-head", "2",
        "--wiring", "lockstep", "--vocab-size", "300", "--max-tokens", "30", "--batch-size", "4", "--accum", "2",
        "--epochs", "2", "--out-dir", tmp_path / "r")
    out = capsys.readouterr().out
    assert "BLEU-4" in out and "no official split" in out and "decoded as they are needed" in out


def test_staged_unfreezing_opens_the_parts_in_their_epochs(tmp_path):
    """Decoder from epoch 1, vision from epoch 1.5: until then their weights must be the initial ones, bit for bit."""
    argv = [*TINY, "--open-decoder", "1", "--open-vision", "1.5", "--epochs", "2", "--eval-interval", "1000"]
    states = []
    for stop in (1, 6, 8, 11):                                                    # 6 steps an epoch
        run(train, *argv, "--stop-after", stop, "--out-dir", tmp_path / str(stop))
        states.append(torch.load(tmp_path / str(stop) / "state.pt", weights_only=True)["model"])

    def part(name):
        if name.startswith("vision"):
            return "vision"
        return "bridge" if "cross" in name or "bridge" in name else "decoder"

    def moved(a, b):
        return {part(name) for name in a if not torch.equal(a[name], b[name])}
    assert moved(states[0], states[1]) == {"bridge"}
    assert moved(states[1], states[2]) == {"bridge", "decoder"}
    assert moved(states[2], states[3]) == {"bridge", "decoder", "vision"}


@pytest.mark.parametrize("model", ["cross", "prefix"])
def test_public_weights_are_where_training_starts(tmp_path, capsys, model):
    """--vision and --text from folders in public layouts: the first checkpoint must hold exactly their weights."""
    torch.manual_seed(0)
    tokenizer = BPETokenizer.train(["a small red circle left of a large blue square"] * 3, 300)
    gpt = GPT(GPTConfig(block_size=80, vocab_size=tokenizer.vocab_size, n_layer=2, n_head=2, n_embd=32))
    export_gpt2(gpt, tmp_path / "gpt2", tokenizer, tokenizer.token_to_id("<|endoftext|>"))
    vit = REFERENCE / "vit"
    argv = [*TINY, "--model", model, "--vision", vit, "--text", tmp_path / "gpt2", "--dropout", "0",
            "--out-dir", tmp_path / "r"]
    run(train, *argv, "--open-decoder", "99", "--open-vision", "99", "--epochs", "0.5")
    state = load_safetensors(tmp_path / "r" / "model.safetensors")
    for name, tensor in gpt.state_dict().items():
        assert torch.equal(state[f"text.{name}"], tensor), name
    for name, tensor in load_vit(vit).state_dict().items():
        assert name.startswith("head.") or torch.equal(state[f"vision.{name}"], tensor), name
    config = json.loads((tmp_path / "r" / "config.json").read_text())
    assert config["recipe"]["mode"] == "squash" and config["sizes"]["vision"]["class_token"]
    run(sample, "--image", tmp_path / "r" / "example.png", "--out-dir", tmp_path / "r")
    assert "example.png: " in capsys.readouterr().out
    run(train, *argv, "--text", vit, code=2)
    assert "vit" in capsys.readouterr().err


def test_sample_a_public_captioner_and_an_exported_run(tmp_path, capsys):
    """--pretrained reads a folder in transformers' layout; what we trained and exported says the same there."""
    run(train, *TINY, "--stem", "patch", "--class-token", "--out-dir", tmp_path / "r", "--epochs", "0.5")
    export_run(tmp_path / "r", tmp_path / "theirs")
    picture = tmp_path / "r" / "example.png"
    capsys.readouterr()
    run(sample, "--image", picture, "--out-dir", tmp_path / "r", "--max-tokens", "8", "--json")
    run(sample, "--image", picture, "--pretrained", tmp_path / "theirs", "--max-tokens", "8", "--json")
    one, two = capsys.readouterr().out.splitlines()
    assert one == two
    run(sample, "--image", picture, "--pretrained", REFERENCE / "vit", code=2)
    assert "was trained for --task classify" in capsys.readouterr().err


def test_resume_equals_the_unbroken_run(trained, tmp_path, capsys):
    """Stopped between evaluations, resumed: dropout, augmentation, order and optimizer go on as if nothing had been."""
    run(train, *TINY, "--out-dir", tmp_path / "r", "--stop-after", "7")
    assert "go on with" in capsys.readouterr().out
    run(train, "--resume", "--out-dir", tmp_path / "r")
    same_run(trained, tmp_path / "r")
    for flag, then, now in (("--n-embd", 32, 48), ("--epochs", 2.0, 4.0)):        # 4 is the default: given is given
        run(train, "--resume", "--out-dir", tmp_path / "r", flag, now, code=2)
        assert f"{flag} {then}, not {now}" in capsys.readouterr().err
    state = torch.load(tmp_path / "r" / "state.pt", weights_only=True)
    torch.save({**state, "rng": torch.zeros(3)}, tmp_path / "r" / "state.pt")
    run(train, "--resume", "--out-dir", tmp_path / "r", code=2)
    assert "state.pt does not fit" in capsys.readouterr().err
    state["optimizer"] = state.pop("optimizers")
    torch.save(state, tmp_path / "r" / "state.pt")
    run(train, "--resume", "--out-dir", tmp_path / "r", code=2)
    assert "state.pt is of an earlier version" in capsys.readouterr().err
    (tmp_path / "r" / "state.pt").write_bytes((tmp_path / "r" / "state.pt").read_bytes()[:2000])
    run(train, "--resume", "--out-dir", tmp_path / "r", code=2)
    assert "state.pt is damaged" in capsys.readouterr().err
    (tmp_path / "r" / "state.pt").unlink()                      # a run copied without it: its weights must not be lost
    run(train, "--resume", "--out-dir", tmp_path / "r", code=2)
    assert "without its state.pt" in capsys.readouterr().err and (tmp_path / "r" / "model.safetensors").exists()


def test_resume_on_other_captions_is_refused(tmp_path, capsys):
    """The vocabulary is made anew from the captions: what was learned for "dog" would now be "ape"."""
    folder = album(tmp_path / "a")
    argv = [*TINY, *from_folder(folder), "--tokenizer", "words", "--min-count", "1", "--out-dir", tmp_path / "r"]
    run(train, *argv, "--stop-after", "1")
    text = (folder / "captions.txt").read_text()
    (folder / "captions.txt").write_text(text.replace("dog", "ape"))
    run(train, "--resume", "--out-dir", tmp_path / "r", code=2)
    assert "are not those that the run" in capsys.readouterr().err
    (folder / "captions.txt").write_text(text)
    run(train, "--resume", "--out-dir", tmp_path / "r", "--stop-after", "2")


def start(*argv, torchrun=False):
    """train.py as a process of its own, or as two: its output can be read line by line, while it runs."""
    two = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={29500 + os.getpid() % 1000}"]
    command = [sys.executable, *(two if torchrun else []), str(ROOT / "train.py"), *map(str, argv)]
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=settings, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT)


def test_a_killed_run_resumes_to_the_same_end(trained, tmp_path):
    """kill -9 in the middle of things, twice; what is on disk afterwards must always be whole."""
    out = tmp_path / "r"
    for after in ("step 6/12", "step 10/12"):
        process = start(*TINY, "--out-dir", out, "--resume")
        for line in process.stdout:
            if after in line:
                process.send_signal(signal.SIGKILL)
                break
        process.wait()
        assert process.returncode == -signal.SIGKILL
        load_safetensors(out / "model.safetensors")
        json.loads((out / "config.json").read_text())
    run(train, "--resume", "--out-dir", out)
    same_run(trained, out)


def test_ctrl_c_saves_and_leaves(tmp_path):
    process = start(*TINY, "--out-dir", tmp_path, "--epochs", "2000")
    for line in process.stdout:
        if "step 5/" in line:
            process.send_signal(signal.SIGINT)
            break
    rest = process.stdout.read()
    assert process.wait() == 0 and "stopped after step" in rest and (tmp_path / "state.pt").exists()


def test_two_processes_give_the_same_curve_as_one(tmp_path):
    argv = [*TINY, "--dropout", "0", "--accum", "2", "--eval-images", "4"]
    run(train, *argv, "--out-dir", tmp_path / "one")
    process = start(*argv, "--out-dir", tmp_path / "two", torchrun=True)
    out = process.communicate()[0]
    assert process.returncode == 0, out
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert list(one) == list(two)
    for step in one:
        assert two[step] == pytest.approx(one[step], rel=2e-4), f"step {step}"


def test_a_compiler_that_fails_is_one_line(tmp_path, capsys, monkeypatch):
    def broken(model):
        raise RuntimeError("no C++ compiler here")
    monkeypatch.setattr(torch, "compile", broken)
    run(train, *TINY, "--out-dir", tmp_path, "--compile", "--epochs", "0.5")
    assert "torch.compile failed (RuntimeError)" in capsys.readouterr().out
    assert (tmp_path / "model.safetensors").exists()


def test_a_full_disk_is_a_sentence_and_keeps_the_old_run(trained, tmp_path, capsys, monkeypatch):
    out = tmp_path / "r"
    run(train, *TINY, "--out-dir", out, "--stop-after", "4")
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    run(train, "--resume", "--out-dir", out, code=2)
    assert "No space left on device" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_a_full_disk_is_told_through_torchs_writer():
    """torch.save goes on after the failed write, and raises an error about positions in a zip file."""
    class Full(io.BytesIO):
        def write(self, data):
            raise OSError(28, "No space left on device")
    with pytest.raises(OSError, match="No space left on device"):
        train.write_state({"step": torch.zeros(1000)}, Full())


def test_a_file_that_is_no_table_is_seen_before_the_scoring(trained, tmp_path, capsys):
    for content in (b"run,split\n1,2,3\n", "caf\xe9".encode("latin-1")):
        (tmp_path / "t.csv").write_bytes(content)
        run(train, "--eval-only", "--out-dir", trained, "--table", tmp_path / "t.csv", code=2)
        assert "t.csv is no table" in capsys.readouterr().err and (tmp_path / "t.csv").read_bytes() == content


def test_the_benchmark_compares_and_refuses(capsys):
    run(bench, "lstm", "--pairs", "1", "--threads", "1")
    assert capsys.readouterr().out.count("ratio") == 5
    run(bench, "warp", code=2)
    assert "decode" in capsys.readouterr().err
