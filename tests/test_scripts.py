"""The three scripts, run for real at tiny size: every promise of the README that a small machine can check."""
import json
import sys
import os
import re
import shlex
import shutil
import signal
import socket
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import data
import sample
import train
from conftest import REFERENCE
from helpers import TEXT, TINY, Training, album, from_folder, losses, refused, run, same_run, same_state
from servers import send
from tinyvlm.config import UserError
from tinyvlm.files import locked
from tinyvlm.runs import read_state
from tinyvlm.weights import load_safetensors, save_safetensors

RUN = [*TINY, *TEXT]
COMPLETE = {"model.safetensors", "config.json", "tokenizer.json", "state.pt", "log.csv", "curves.png", "samples.png",
            "example.png", ".lock"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A whole run of 12 steps, in memory, never interrupted: what all others are compared with."""
    out = tmp_path_factory.mktemp("run") / "out"
    run(train, *RUN, "--out-dir", out)
    return out


@pytest.fixture
def copy(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "copy")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_training_leaves_a_complete_folder(trained):
    config, seen = json.loads((trained / "config.json").read_text()), losses(trained)
    assert {*contents(trained)} == COMPLETE and list(seen) == list(range(1, 13)) and seen[12] < seen[1]
    assert config["task"] == "caption" and config["scores"]["val perplexity"] > 1 and "test exact" in config["scores"]
    for name in ("curves.png", "samples.png", "example.png"):
        Image.open(trained / name).verify()


def test_blend_keeps_the_weights_part_of_the_way_from_init(trained, tmp_path):
    """What is kept is init + 0.25 (own - init), although training itself goes all the way."""
    out = tmp_path / "out"
    run(train, *RUN, "--init", trained, "--blend", "0.25", "--eval-interval", "100", "--out-dir", out)
    old, kept = (load_safetensors(folder / "model.safetensors") for folder in (trained, out))
    own = read_state(out)["model"]
    assert not torch.equal(old["text.wte.weight"], own["text.wte.weight"])
    for name in kept:
        torch.testing.assert_close(kept[name], old[name] + 0.25 * (own[name] - old[name]))


def test_blend_resumes_on_the_same_line_although_init_was_trained_anew(copy, tmp_path, stop_at):
    """Where the line begins is kept with the state: another run in the folder of --init would have bent it silently."""
    go_on = [train, *RUN, "--init", copy, "--blend", "0.25", "--out-dir"]
    run(*go_on, tmp_path / "whole")
    stop_at(7)
    run(*go_on, tmp_path / "broken")
    stop_at(None)
    old = load_safetensors(copy / "model.safetensors")
    save_safetensors({name: value + 1 for name, value in old.items()}, copy / "model.safetensors")
    run(train, "--resume", "--out-dir", tmp_path / "broken")
    same_run(tmp_path / "whole", tmp_path / "broken")


def test_the_printed_command_works_whatever_the_folder_is_called(tmp_path, capfdbinary):
    """A name that begins with a dash was taken for a flag, and of one that is not UTF-8 another was printed."""
    out = "- run\udce9'"
    run(train, *RUN, f"--out-dir={tmp_path}/{out}", "--epochs", "0.5", "--model", "prefix")
    printed = os.fsdecode(capfdbinary.readouterr().out)
    assert all(words in printed for words in ("held-out examples", "truth", "test split: ", "prediction"))
    steps = [line for line in printed.splitlines() if re.match(r"step \d+/", line)]
    assert len(steps) == 3 and max(map(len, steps)) <= 100 and steps[1].endswith(" min left")
    python, script, *words = shlex.split(printed.splitlines()[-1])
    assert f"--out-dir={tmp_path}/{out}" in words and (python, script) == ("python", "sample.py")
    run(sample, *words)
    assert os.fsencode(f"{out}/example.png: ") in capfdbinary.readouterr().out


@pytest.mark.parametrize("task, own, others", [
    ("caption", "--model --wiring --reinforce --init --features --text --show-batch", "--turns --head --labels"),
    ("vqa", "--turns --init --show-batch --text", "--wiring --features --labels --reinforce"),
    ("clip", "--head --text-embeddings --n-joint --features", "--init --model --num-beams --turns"),
    ("classify", "--labels", "--text --tokenizer --max-tokens --features --init")])
def test_each_task_has_its_own_options(tmp_path, capsys, task, own, others):
    run(train, "--task", task, "-h")
    flags = {*re.findall(r"^ *(--[a-z][\w-]*)", capsys.readouterr().out, re.MULTILINE)}
    assert {*own.split(), "--lr", "--out-dir", "--vision", "--dataset", "--preset"} <= flags
    assert not flags & {*others.split()}
    for flag in others.split():
        refused(capsys, f"unrecognized arguments: {flag}", train, "--out-dir", tmp_path, "--task", task, flag, "3")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("how", [[], ["--num-beams", "3", "--length-penalty", "1.2"], ["--prompt", " a large  "],
                                 ["--temperature", "1.0", "--top-k", "5", "--seed", "3", "--max-tokens", "6"],
                                 ["--temperature", "0.7", "--top-p", "0.9", "--seed", "3"]])
def test_sample_on_files_and_folders_as_json(trained, tmp_path, capsys, how):
    """Every way of decoding: a line an image, and the same captions again, whatever the batches."""
    album(tmp_path, n=3, captions=False)
    (tmp_path / "Images" / "below").mkdir()                     # folders inside count, and so does any image format
    Image.open(tmp_path / "Images" / "2.jpg").save(tmp_path / "Images" / "below" / "3.TIF")
    argv = ["--image", trained / "example.png", tmp_path / "Images", "--out-dir", trained, "--json", *how]
    for size in ("16", "16" if "--seed" in how else "2"):
        run(sample, *argv, "--batch-size", size)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[:5] == lines[5:] and [set(line) for line in lines[5:]] == [{"image", "caption"}] * 5
    assert "--prompt" not in how or all(line["caption"].startswith("a large") for line in lines)


@pytest.mark.parametrize("how", [[], ["--temperature", "2", "--seed", "1"], ["--prompt", "a small"]])
def test_a_terminal_shows_a_caption_as_it_is_made(trained, capsys, monkeypatch, how):
    """Written in pieces, it is the line that goes into a pipe; two images are captioned together, a line at a time."""
    argv = ["--image", trained / "example.png", "--out-dir", trained, *how]
    run(sample, *argv)
    line, pieces = capsys.readouterr().out, []
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    real = sys.stdout.write
    monkeypatch.setattr(sys.stdout, "write", lambda text: (pieces.append(text), real(text))[1])
    for more, live in (([], True), (["--json"], False), (["--num-beams", "2"], False)):
        if "--temperature" in how and "--num-beams" in more:
            continue
        pieces.clear()
        run(sample, *argv, *more)
        shown = [piece for piece in pieces if piece not in ("", "\n")]
        assert (len(shown) > 2) == live and (not live or "".join(pieces) == line), pieces
    pieces.clear()
    run(sample, *argv[:2], trained / "samples.png", *argv[2:])
    assert len([piece for piece in pieces if piece not in ("", "\n")]) == 2


def test_help_has_the_ten_options_that_matter_first(capsys):
    run(sample, "-h")
    first = capsys.readouterr().out.partition("what matters first:")[2].partition("\n\n")[0]
    assert re.findall(r"^  (--[a-z-]+)", first, re.MULTILINE) == ["--image", "--out-dir", "--pretrained", "--serve",
        "--prompt", "--labels", "--search", "--images", "--num-beams", "--temperature"]


def test_sample_from_an_address_and_attention(host, trained, tmp_path, capsys):
    for name in ("example.png", "log.csv"):
        host.pages[f"/{name}"] = send((trained / name).read_bytes())
    run(sample, "--image", f"{host.url}/example.png", "--out-dir", trained, "--attention", tmp_path / "a.png")
    run(sample, "--image", trained / "example.png", "--out-dir", trained)
    one, two = capsys.readouterr().out.splitlines()
    assert one.partition("example.png: ")[2] == two.partition("example.png: ")[2] != ""
    assert Image.open(tmp_path / "a.png").size[0] > 500
    for name, words in (("none.png", "404"), ("log.csv", "log.csv is no image of a kind")):
        refused(capsys, words, sample, "--image", f"{host.url}/{name}", "--out-dir", trained)


ALBUM = "--dataset folder --data-dir ALBUM"
MISTAKES = {
    sample: {
        "": "--image", "--image none.png": "none.png", "--image EMPTY": "a folder without", "--image=": "empty value",
        "--imgae x": "did you mean --image", "--image EXAMPLE --out-dir none": "python train.py",
        "--image EXAMPLE --prompt a b": "give one --prompt", f"--image EXAMPLE --prompt={'a,' * 99}": "shorten",
        "--num-beams 2 --temperature 1": "--temperature", "--top-k 3": "--temperature", "--features f": "--features",
        "--serve --labels a b": "--labels is for the terminal", "--serve --port 70000": "--port must be below",
        "--images EMPTY": "are for clip",
        "--labels a b": "are for clip", "--search dog --images EMPTY": "are for clip", "--device nonsense": "--device",
        "--image EXAMPLE --out-dir DAMAGED": "model.safetensors", "--out-dir f --image EXAMPLE": "name the folder of a",
        "--image EXAMPLE --pretrained ./f": "./f is no folder"},
    train: {
        "--task": "--task", "--task dance": "dance", "--preset huge": "laptop", "--dataset folder": "data/folder",
        "--batch-size 7 --accum 2": "--batch-size 7", "--image-size 30": "30", "--n-head 3": "n_head",
        "--device cuda:99": "cuda:99", "--device meta": "--device meta", "--model prefix --shuffle 3": "--shuffle 3",
        "--wiring lockstep --model lstm": "--wiring", "--model lstm --text gpt2": "--text", "--vision=": "empty value",
        "--features none.safetensors": "none.safetensors", "--vision ./none": "./none", "--init none": "none",
        "--init a --vision b": "--init brings", "--blend 0.5": "give --init RUN",
        "--reinforce 5": "--reinforce needs", "--tokenizer ./none": "./none",
        "--stream": "leave it out for shapes", "--eval-only": "train.py", "--task vqa --max-tokens 8": "--max-tokens 8",
        f"--task vqa {ALBUM}": "holds no questions", f"--task classify {ALBUM}": "--labels",
        "--task clip --batch-size 64": "--batch-size cannot be 64", "--task clip --text-embeddings none": "none",
        "--task clip --bag --text x": "--bag is a text tower of its own",
        "--out-dir": "expected one argument", "--out-dir f": "f is a file", "--out-dir f/below": "f",
        "--data-dir ALBUM": "say what it holds with --dataset",     # drawn scenes were trained on, whatever it held
        "--image-size 20000": "--image-size must be below", "--eval-images 1": "must be at least 2",
        "--out-dir FOREIGN": "not of a run", "--vision none --out-dir none": "give another --out-dir"},
    data: {
        "--dataset cocoo": "coco", "--dataset folder": "data/folder", "--label none.json": "none.json",
        "--stream": "leave it out for shapes", "--features ./none": "./none", "--device cuda:99": "cuda:99",
        "--text-embeddings VIT": "is no CLIP with", "--label L --labeler VIT": "no CLIP",
        "--dataset capsfusion --rows none.csv": "none.csv", "--dataset vqav2 --data-dir ALBUM": "ALBUM",
        "--data-dir ALBUM": "say what it holds with --dataset",
        f"{ALBUM} --export x.csv": "holds no questions", "--sheet /dev/null": "ends in .png"}}


@pytest.mark.parametrize("script, line, words", [(s, *row) for s, rows in MISTAKES.items() for row in rows.items()])
def test_mistakes_are_one_sentence_and_leave_nothing(trained, tmp_path, capsys, monkeypatch, script, line, words):
    monkeypatch.chdir(tmp_path)
    album(tmp_path / "ALBUM")
    files = {"f": b"", "EMPTY/x": b"", "L": b'{"kind": ["a dog", "a cat"]}', "FOREIGN/config.json": b'{"hidden": 1}'}
    files |= {f"DAMAGED/{name}": content[:50000] for name, content in contents(trained).items()}
    for path, content in files.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(content)
    before, argv = {*tmp_path.rglob("*")}, line.split()
    usual = [*(TINY if {"classify", "--eval-only", "dance"} & {*argv} else RUN), "--out-dir", "r"]
    usual = {sample: ["--out-dir", trained], train: usual, data: ["--n-scenes", "20"]}[script]
    argv = [{"EXAMPLE": trained / "example.png", "VIT": REFERENCE / "vit"}.get(word, word) for word in argv]
    refused(capsys, words, script, *usual, *argv)
    left = {path.relative_to(tmp_path).parts[0] for path in {*tmp_path.rglob("*")} - before}
    assert left <= {"data", "out"} if script is data else not left                # data.py draws its sheet first


def test_data_prepares_and_draws(tmp_path, capsys):
    """data.py counts what it found, names what is broken, and draws what is whole."""
    folder, dialogues = album(tmp_path / "album"), tmp_path / "q.csv"
    run(data, "--sheet", tmp_path / "a.png", "--n-scenes", "50", "--export", dialogues)
    assert "train     50 images" in capsys.readouterr().out
    (folder / "Images" / "4.jpg").write_bytes(b"broken")
    refused(capsys, "1 of 20 images are broken, first Images/4.jpg", data, *from_folder(folder))
    run(data, *from_folder(folder), "--sheet", tmp_path / "b.png", "--allow-broken")
    assert all(Image.open(tmp_path / name).size[0] > 700 for name in ("a.png", "b.png"))
    assert all(line.count("<image>") == 1 for line in dialogues.read_text().splitlines()[1:])


def test_a_new_run_replaces_the_old_one_after_its_first_step(copy, capsys, monkeypatch, stop_at):
    """The old run was once deleted before it was known that the new one can start; and later, stopped before its first
    evaluation, a new run left its state beside the old one's model and tokenizer."""
    before = contents(copy)
    refused(capsys, "give another --out-dir", train, *RUN, "--vision", copy, "--out-dir", copy)
    with monkeypatch.context() as patch:
        patch.setattr(train.captioning, "loss", lambda *args: (_ for _ in ()).throw(MemoryError()))
        refused(capsys, "memory ran out", train, *RUN, "--out-dir", copy)
    assert contents(copy) == before
    stop_at(2)
    run(train, *RUN, "--out-dir", copy)
    assert {*contents(copy)} == {"state.pt", "log.csv", "curves.png", ".lock"}
    assert f"python train.py --resume --out-dir={copy}" in capsys.readouterr().out


def test_resume_equals_the_unbroken_run(trained, tmp_path, capsys, stop_at):
    """Stopped between evaluations, resumed: dropout, augmentation, order and optimizer go on as if nothing had been."""
    out = tmp_path / "r"
    for step in (1, 7):
        stop_at(step)
        run(train, *(RUN if step == 1 else ["--resume"]), "--out-dir", out)
        assert f"stopped after step {step}; go on with" in capsys.readouterr().out
    stop_at(None)
    for flag, then, now in (("--n-embd", 32, 48), ("--epochs", 2.0, 3.5)):      # 3.5 is the default: given is given
        refused(capsys, f"{flag} {then}, not {now}", train, "--resume", "--out-dir", out, flag, now)
    run(train, "--resume", "--out-dir", out, "--log-interval", "1")
    same_run(trained, out)
    assert {*contents(out)} == COMPLETE


def test_a_damaged_state_is_refused(copy, capsys):
    """torch.load compares no checksums: of flipped bits 48 in 60 were once resumed silently, to other weights."""
    path, good, refusals, resume = copy / "state.pt", read_state(copy), 0, (train, "--resume", "--out-dir", copy)
    whole = path.read_bytes()
    for k in range(40):                                         # what is between the tensors in the zip does no harm
        flipped = bytearray(whole)
        flipped[len(whole) * (2 * k + 1) // 80] ^= 1 << k % 8
        path.write_bytes(flipped)
        try:
            same_state(read_state(copy), good)
        except UserError:
            refusals += 1
    assert refusals >= 30
    for damaged in (whole[:2000], whole.replace(good["rng"].numpy().tobytes(), bytes(len(good["rng"])))):
        path.write_bytes(damaged)
        refused(capsys, "state.pt is damaged", *resume)
    torch.save({**good, "options": {**good["options"], "depth": 3}}, path)
    refused(capsys, "is not of this version", *resume)
    path.unlink()                                               # a run copied without it: its weights must not be lost
    refused(capsys, "without its state.pt", *resume)
    assert (copy / "model.safetensors").exists()


def test_resume_on_other_captions_is_refused(tmp_path, capsys, stop_at):
    """The vocabulary is made anew from the captions: what was learned for "dog" would now be "ape"."""
    folder, out = album(tmp_path / "a"), ["--out-dir", tmp_path / "r"]
    stop_at(1)
    run(train, *RUN, *from_folder(folder), "--tokenizer", "words", "--min-count", "1", *out)
    text = (folder / "captions.txt").read_text()
    (folder / "captions.txt").write_text(text.replace("dog", "ape"))
    refused(capsys, "are not those that the run", train, "--resume", *out)
    (folder / "captions.txt").write_text(text)
    shutil.move(folder, tmp_path / "b")
    stop_at(2)
    run(train, "--resume", *out, "--data-dir", tmp_path / "b")                    # moved, but the same


def test_a_killed_run_and_one_that_is_told_to_end_resume_to_the_same_end(trained, tmp_path, capsys):
    """kill -9 in the middle of things: what is on disk must be whole. SIGTERM to the group, as of schedulers: it saves
    and leaves. Steps that were made ahead are dropped, and the end is that of the run with its images in memory; and
    while a run goes on, nobody else trains in its folder."""
    out, argv = tmp_path / "r", [*RUN, "--out-dir", tmp_path / "r", "--resume"]
    process = Training(tmp_path / "log", *argv)
    process.until("step 6/12")
    process.signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and "holds no run to resume: a new one begins" in process.printed()
    load_safetensors(out / "model.safetensors")
    json.loads((out / "config.json").read_text())
    process = Training(tmp_path / "log2", *argv, in_memory=False)
    process.until("step 7/12")
    process.signal(signal.SIGSTOP)                              # or it might be through before the other one is refused
    refused(capsys, "in use by another process", train, *RUN, "--out-dir", out)
    process.signal(signal.SIGTERM)
    process.signal(signal.SIGCONT)
    assert process.wait() == 0 and "stopped after step" in process.printed(), process.printed()
    assert "decoded as needed" in process.printed() and 7 <= read_state(out)["step"] < 12
    run(train, "--resume", "--out-dir", out)
    same_run(trained, out)


def start_two(logs, *argv):
    """train.py as torchrun starts it twice."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [Training(logs / f"log{rank}", *argv, rank=rank, port=port) for rank in (0, 1)]


def two(logs, *argv):
    """.. -> exit codes, what each has printed."""
    both = start_two(logs, *argv)
    return [process.wait() for process in both], [process.printed() for process in both]


def test_a_process_that_is_killed_takes_the_other_along_in_one_sentence(tmp_path):
    """Killed, it has no message of its own that would say why, as the other one said."""
    one, other = start_two(tmp_path, *RUN, "--epochs", "90", "--out-dir", tmp_path / "r")
    one.until("step 3/")
    other.signal(signal.SIGKILL)
    assert other.wait() == -signal.SIGKILL and one.wait() == 2 and "Traceback" not in one.printed()
    assert one.printed().endswith("its own message, or torchrun's report, says why\n"), one.printed()


def test_two_processes_give_the_same_curve_as_one(tmp_path):
    """The best model is that of the last step: the second process once read the file for the report before the first
    had written it. And where one of them ends with a mistake, the other one ends, too, without a traceback."""
    argv, one, out = [*RUN, "--dropout", "0", "--stem", "patch", "--epochs", "1"], tmp_path / "one", tmp_path / "two"
    run(train, *argv, "--accum", "2", "--eval-interval", "99", "--out-dir", one)
    codes, printed = two(tmp_path, *argv, "--accum", "2", "--eval-interval", "99", "--out-dir", out)
    assert codes == [0, 0] and "test split" in printed[0] and "test split" not in printed[1], "".join(printed)
    assert [*losses(out)] == [*range(1, 7)]
    assert [*losses(out).values()] == pytest.approx([*losses(one).values()], rel=2e-4)
    mine, theirs = (json.loads((folder / "config.json").read_text())["scores"] for folder in (one, out))
    assert theirs == pytest.approx(mine, rel=2e-3)
    with locked(out / ".lock"):
        codes, printed = two(one, *argv, "--out-dir", out)
    assert codes == [2, 2] and "in use by another process" in printed[0] and "Traceback" not in "".join(printed)
    assert "error: another process of this run has ended" in printed[1], printed[1]


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_split_that_holds_nothing_to_learn_is_refused_before_an_epoch_is_spent(tmp_path, capsys, split):
    """Captions of which --clean leaves nothing; of val that was said after the first epoch, of test after the last."""
    rows = [{"image": f"{k}.jpg", "caption": "1, 2 .." if part == split else "a dog", "split": part}
            for k in range(20) for part in [("train", "train", "val", "test")[k % 4]]]
    (album(tmp_path / "a", captions=False) / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    refused(capsys, f"the {split} split of folder has 0 usable images", train, *RUN, *from_folder(tmp_path / "a"),
            "--clean", "words", "--out-dir", tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_a_folder_that_cannot_be_written_is_refused_before_any_work(trained, tmp_path, capsys, monkeypatch):
    """A read-only disk was met when all images were decoded, or all of a split was scored, or a folder encoded."""
    def refuse(dir):
        raise OSError(30, "Read-only file system", f"{dir}/tmp0")
    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    monkeypatch.setattr(train, "build_setup", None)
    words = f"cannot write into {tmp_path}/a/b (Read-only file system); name another folder"
    refused(capsys, words, train, *RUN, "--out-dir", tmp_path / "a/b")
    refused(capsys, f"cannot write into {trained} (Read", train, "--eval-only", "--out-dir", trained)
    refused(capsys, "cannot write into", data, "--features", REFERENCE / "vit", "--n-scenes", "9", "--data-dir",
            tmp_path / "c", "--sheet", tmp_path / "s.png")


def test_a_compiler_that_fails_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda *args, **how: (_ for _ in ()).throw(RuntimeError("no compiler here")))
    run(train, *RUN, "--out-dir", tmp_path, "--compile", "--epochs", "0.3")
    assert "torch.compile failed (RuntimeError)" in capsys.readouterr().out and (tmp_path / "example.png").exists()


def test_a_full_disk_is_a_sentence_and_keeps_the_old_run(copy, capsys, monkeypatch):
    """torch.save goes on after the failed write, and hides the disk's error behind one about positions in a zip."""
    def refuse(*args):
        raise OSError(28, "No space left on device")
    real, before, words = torch.save, contents(copy), f"cannot use {copy}/state.pt: No space left on device; free some"
    monkeypatch.setattr(torch, "save", lambda state, _: real(state, SimpleNamespace(write=refuse, flush=refuse)))
    refused(capsys, words, train, *RUN, "--out-dir", copy)
    assert contents(copy) == before


def test_a_loss_that_is_not_finite_names_its_steps(tmp_path, capsys):
    argv = [train, *RUN, "--out-dir", tmp_path / "r", "--lr", "1e14", "--grad-clip", "0", "--log-interval", "5"]
    refused(capsys, "not finite within the 4 steps before step 4", *argv)


def test_eval_only_scores_a_whole_split(trained, copy, capsys):
    run(train, "--eval-only", "--out-dir", copy, "--num-beams", "2", "--split", "val")
    scores = json.loads((copy / "scores.json").read_text())
    assert scores["split"] == "val" and scores["num_beams"] == 2 and {"exact", "shuffled loss"} <= {*scores}
    then = json.loads((trained / "config.json").read_text())["scores"]
    assert scores["loss"] == pytest.approx(then["val loss"], rel=1e-5)            # the same `evaluate`
    rows = [json.loads(line) for line in (copy / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 4 and all({"image", "prediction", "references"} <= {*row} for row in rows)
    refused(capsys, "--n-embd 32, not 64", train, "--eval-only", "--out-dir", copy, "--n-embd", "64")


def test_show_batch_prints_what_is_trained_and_leaves_nothing(tmp_path, capsys):
    for task in (["--task", "vqa", "--max-tokens", "300"], ["--model", "prefix"], ["--model", "lstm"]):
        run(train, *RUN, *task, "--show-batch", "--out-dir", tmp_path / "r")
        shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("trained")]
        assert shown and all("<|endoftext|>" in line and "<|user|>" not in line for line in shown)
    assert not (tmp_path / "r").exists()
