"""The README stays true: its commands parse, its functions exist, its pictures are there and small."""
import importlib
import re
import shlex
from pathlib import Path

import data
import pytest
import sample
import train
from tinyvlm.config import parse_config

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
INLINE = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", README, flags=re.MULTILINE | re.DOTALL))
COMMANDS = sorted({match[1] for text in ["\n".join(BLOCKS), *(" ".join(text.split()) for text in INLINE)]
                   for match in re.finditer(r"^(?:[A-Z]  )?python ((?:train|sample|data)\.py.*)$", text, re.MULTILINE)})
HOMES = {name: f"tinyvlm.{name}" for name in (
    "batches captioning captions classifying files gpt image layouts optimizer schedule tokenizer vlm").split()}
HOMES |= {"train": "train", "data": "data", "BPETokenizer": "tinyvlm.tokenizer", "Tokenizer": "tinyvlm.tokenizer",
          "ImageStore": "data", "Batches": "tinyvlm.batches", "Batch": "tinyvlm.batches", "Rows": "tinyvlm.batches",
          "Captioner": "tinyvlm.vlm", "CrossCaptioner": "tinyvlm.vlm", "ViT": "tinyvlm.vit", "GPT": "tinyvlm.gpt",
          "Block": "tinyvlm.transformer", "Attention": "tinyvlm.transformer", "Muon": "tinyvlm.muon"}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command):
    script, *argv = shlex.split(command.replace("..", ""), comments=True)
    if script == "sample.py":
        parse_config(sample.SampleConfig, argv)
    elif script == "data.py":
        parse_config(data.PrepareConfig, argv)
    elif not {"--eval-only", "--resume", "-h"} & {*argv}:       # they ask for a run's folder
        assert train.read_options(argv)[0].task in train.TASKS


def test_the_way_of_one_caption_names_what_exists():
    table = README.split("\n## The way of one caption")[1].split("\n## ")[0]
    names = [name for row in re.findall(r"^\| \d+ \| ([^|]*) \|", table, flags=re.MULTILINE)
             for name in re.findall(r"`([\w.]+)`", row)]
    assert len(names) >= 40
    for name in names:
        first, *rest = name.split(".")
        module = importlib.import_module(HOMES[first])
        thing = module if HOMES[first].split(".")[-1] == first else getattr(module, first)
        for part in rest:
            thing = getattr(thing, part)
        assert callable(thing), name


def test_files_and_figures_exist():
    for path in re.findall(r"\]\(([\w/.]+)\)", README):
        assert (ROOT / path).is_file(), path
    order = README.split("\n## A reading order")[1].split("\n## ")[0]
    for path in re.findall(r"`([\w/]+\.py)`", order):
        assert any((ROOT / folder / path).is_file() for folder in ("", "tinyvlm")), path
    listed = {Path(path).name for path in re.findall(r"`([\w/]+\.py)`", order)}
    assert {path.name for path in (ROOT / "tinyvlm").glob("*.py")} - {"__init__.py"} <= listed
    assert sum(path.stat().st_size for path in (ROOT / "figures").iterdir()) < 1.5e6
    assert len(README.splitlines()) <= 350
