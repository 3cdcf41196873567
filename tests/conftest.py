"""Tests run from any folder, see the scripts beside the package, and never touch the network or the user's caches."""
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")       # many tiny models: threads would only wait for one another


@pytest.fixture(autouse=True)
def no_user_caches(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("HF_HOME", str(tmp_path_factory.getbasetemp() / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
