"""Tests run from any folder, see the scripts beside the package, and never touch the network or the user's caches."""
import os
import signal
import sys
from pathlib import Path

import pytest

from servers import Host

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "tests" / "reference"            # tiny public checkpoints: make_reference_checkpoints.py
sys.path.insert(0, str(ROOT))
os.environ["OMP_NUM_THREADS"] = "1"                  # many tiny models: threads would only wait for one another
os.environ["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))     # for the processes of helpers.Training


@pytest.fixture(autouse=True)
def no_user_caches(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("HF_HOME", str(tmp_path_factory.getbasetemp() / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def host():
    """A web server for this test alone."""
    with Host() as made:
        yield made


@pytest.fixture
def stop_at(monkeypatch):
    """stop_at(n): in this test, Ctrl-C in the middle of train.py's step n; None: no more."""
    import train
    real = train.one_cycle

    def stop(n):
        monkeypatch.setattr(train, "one_cycle", lambda step, *args, **how: (
            signal.raise_signal(signal.SIGINT) if step + 1 == n else None, real(step, *args, **how))[1])
    return stop


@pytest.fixture
def steps(monkeypatch):
    """Copies of all parameters before each step that train.py makes: [{name: tensor}, ..]."""
    import train
    states, real = [], train.unfreeze
    monkeypatch.setattr(train, "unfreeze", lambda model, *args: (
        states.append({name: p.detach().clone() for name, p in model.named_parameters()}), real(model, *args))[1])
    return states
