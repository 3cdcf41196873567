"""The exercises: each names a file and a test that exist, is not done yet, and stands in the list with its five."""
import re
from pathlib import Path

import pytest

import exercises

ROOT = Path(__file__).resolve().parent.parent
IDEAS = (ROOT / "tests" / "exercises.md").read_text(encoding="utf-8").split("\n## ")[1:]
FIVE = ["Paper", "Shapes", "File", "Test", "Exercise"]


@pytest.mark.parametrize("idea", IDEAS, ids=exercises.CHECKS)
def test_each_idea_has_its_five(idea):
    assert re.findall(r"^- \*\*(\w+)\*\* ", idea, flags=re.MULTILINE) == FIVE
    file = re.search(r"\*\*File\*\* (\S+)", idea)[1]
    test, name = re.search(r"\*\*Test\*\* (\S+)::(\w+)", idea).groups()
    assert (ROOT / file).is_file() and f"\ndef {name}(" in (ROOT / test).read_text(encoding="utf-8")
    assert all((ROOT / path).is_file() for path in re.findall(r"figures/\w+\.png", idea))


def test_each_exercise_is_still_to_be_done():
    """All sixteen, in the order of the list. A check that passes before its exercise is done would check nothing; one
    that fails for any other reason could never pass: two of them once built a Block as it had been built before."""
    assert re.findall(r"\*\*Exercise\*\* `(\w+)`", "".join(IDEAS)) == list(exercises.CHECKS)
    missing = ["min_count", "overlap", "off", "window", "gated", "row_end", "7 were given", "drop", "sigmoid_loss",
               "anneal", "undo", "min_new_tokens", "smooth", "'d'", "describe", "freeze_vision"]
    failures = {name: str(exercises.failure(name)) for name in exercises.CHECKS}
    assert [failures[name] for name, what in zip(failures, missing, strict=True) if what not in failures[name]] == []
