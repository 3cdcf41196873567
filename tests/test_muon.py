"""Muon: what its polynomial does to singular values, and torch's own Muon as the oracle of its steps."""
import pytest
import torch

import train
from test_scripts import TINY, run, same_run
from tinyvlm.muon import Muon, Together, orthogonalise


@pytest.mark.parametrize("shape", [(48, 16), (16, 48), (3, 20, 30)])
def test_keeps_the_directions_and_evens_their_strength(shape):
    torch.manual_seed(0)
    u, s, v = torch.linalg.svd(torch.randn(*shape), full_matrices=False)
    x = orthogonalise(u * s.clamp(min=0.2 * s.amax()).unsqueeze(-2) @ v)          # no direction hopelessly faint
    mixed = u.mT @ x @ v.mT                                                       # S' on its diagonal, nothing beside
    strength = mixed.diagonal(dim1=-2, dim2=-1)
    assert 0.65 < strength.min() and strength.max() < 1.25
    torch.testing.assert_close(mixed, torch.diag_embed(strength), atol=1e-4, rtol=0)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has its own Muon from 2.9 on")
def test_steps_as_torchs():
    """torch's works in bfloat16, ours here in float32: equal to within bfloat16's rounding of one step's length."""
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in ((48, 16), (16, 16), (48, 16), (16, 64))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    a = Muon(ours, lr=0.01, weight_decay=0.1)
    b = torch.optim.Muon(theirs, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        before = [p.detach().clone() for p in ours]
        for p, q in zip(ours, theirs):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        a.step()
        b.step()
        for p, q, old in zip(ours, theirs, before):
            assert (p - q).abs().max() < 0.1 * (p - old).abs().max()
            q.data.copy_(p.data)                                                  # one step at a time


def test_no_gradient_no_step():
    p = torch.nn.Parameter(torch.ones(4, 4))
    Muon([p], lr=1.0, weight_decay=0.5).step()
    assert torch.equal(p, torch.ones(4, 4))
    with pytest.raises(AssertionError, match="for matrices"):
        Muon([torch.nn.Parameter(torch.ones(4))], lr=1.0)


@pytest.mark.parametrize("bad", ["matrix", "bias"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_one_overflow_stops_both(bad, value):
    """float16's scaler: a gradient that overflowed anywhere must move nothing, and a part without any is no error."""
    torch.manual_seed(0)
    params = {"matrix": torch.nn.Parameter(torch.ones(4, 4)), "bias": torch.nn.Parameter(torch.ones(4))}
    both = Together(torch.optim.AdamW([params["bias"]], lr=0.1), Muon([params["matrix"]], lr=0.1))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for faulty in (True, False):
        for name, p in params.items():
            p.grad = 4 * torch.randn_like(p)
            if faulty and name == bad:
                p.grad.flatten()[0] = value
        scaler.scale(torch.ones(1))
        scaler.unscale_(both)
        torch.nn.utils.clip_grad_norm_(params.values(), 1.0)
        scaler.step(both)
        scaler.update()
        for p in params.values():
            assert torch.equal(p, torch.ones_like(p)) == faulty and p.isfinite().all()
    params["matrix"].grad = None                                                  # frozen
    scaler.unscale_(both)
    scaler.step(both)


def test_a_run_with_both_optimizers_resumes_exactly(tmp_path):
    """.. with the picture read once for three dialogues, and the decoder opened on the way."""
    argv = [*TINY, "--task", "vqa", "--model", "prefix", "--max-tokens", "80", "--captions-per-image", "3",
            "--optimizer", "muon", "--open-decoder", "0.5"]
    run(train, *argv, "--out-dir", tmp_path / "whole")
    run(train, *argv, "--out-dir", tmp_path / "parts", "--stop-after", "5")
    run(train, "--resume", "--out-dir", tmp_path / "parts")
    same_run(tmp_path / "whole", tmp_path / "parts")
    state = torch.load(tmp_path / "whole" / "state.pt", weights_only=True)
    assert len(state["optimizers"]) == 2 and state["optimizers"][1]["state"]
