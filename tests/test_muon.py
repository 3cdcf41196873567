"""Muon: what its polynomial does to singular values; torch's own Muon and AdamW as the oracles of its steps."""
import pytest
import torch

from tinyvlm.muon import Muon, orthogonalise


@pytest.mark.parametrize("shape", [(48, 16), (16, 48)])
def test_keeps_the_directions_and_evens_their_strength(shape):
    torch.manual_seed(0)
    u, s, v = torch.linalg.svd(torch.randn(*shape), full_matrices=False)
    x = orthogonalise(u * s.clamp(min=0.2 * s.max()) @ v)                         # no direction hopelessly faint
    mixed = u.mT @ x @ v.mT                                                       # S' on its diagonal, nothing beside
    assert 0.65 < mixed.diagonal().min() and mixed.diagonal().max() < 1.25
    torch.testing.assert_close(mixed, torch.diag(mixed.diagonal()), atol=1e-4, rtol=0)


def test_steps_as_torchs_muon_and_adamw():
    """torch's Muon works in bfloat16, ours here in float32: equal to within bfloat16's rounding of one step's length.
    What is not marked steps exactly as AdamW. The rate is set anew each step, as the training loop does. Filters
    (8, 4, 3, 3), which torch's refuses, step as the matrix (8, 36) that they are."""
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in ((48, 16), (16, 64), (8, 4, 3, 3), (16, 4), (7,))]
    theirs = [torch.nn.Parameter(p.detach().clone().flatten(1) if p.dim() == 4 else p.detach().clone()) for p in ours]
    optimizer = Muon([{"params": ours[:3], "muon": True}, {"params": ours[3:]}], lr=1.0, weight_decay=0.1)
    muon = torch.optim.Muon(theirs[:3], lr=1.0, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(theirs[3:], lr=1.0, weight_decay=0.1)
    for lr in (0.01, 0.02, 0.005):
        before = [p.detach().clone() for p in ours]
        for group in [*optimizer.param_groups, *muon.param_groups, *adamw.param_groups]:
            group["lr"] = lr
        for p, q in zip(ours, theirs):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone().view_as(q)
        for each in (optimizer, muon, adamw):
            each.step()
        for k, (p, q, old) in enumerate(zip(ours, theirs, before)):
            assert (p - q.view_as(p)).abs().max() <= (0.1 if k < 3 else 0) * (p - old).abs().max()
            q.data.copy_(p.data.view_as(q))                                                  # one step at a time


@pytest.mark.parametrize("bad", [0, 1])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_one_overflow_stops_both(bad, value):
    """float16's scaler: a gradient that overflowed anywhere must move nothing, and a part without any is no error."""
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.ones(4, 4)), torch.nn.Parameter(torch.ones(4))]
    both = Muon([{"params": params[:1], "muon": True}, {"params": params[1:]}], lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for faulty in (True, False):
        for p in params:
            p.grad = 4 * torch.randn_like(p)
        params[bad].grad.flatten()[0] = value if faulty else 1.0
        scaler.scale(torch.ones(1))
        scaler.unscale_(both)
        scaler.step(both)
        scaler.update()
        for p in params:
            assert torch.equal(p, torch.ones_like(p)) == faulty and p.isfinite().all()
    before, params[0].grad = params[0].detach().clone(), None                     # frozen
    both.step()
    assert torch.equal(params[0], before)


def test_state_goes_to_a_file_and_back(tmp_path):
    """A twin made from a saved state, without pickled classes, takes the next steps bit for bit alike."""
    def step(params, optimizer, seed):
        torch.manual_seed(seed)
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()

    params = [torch.nn.Parameter(torch.ones(4, 6)), torch.nn.Parameter(torch.ones(4))]
    optimizer = Muon([{"params": params[:1], "muon": True}, {"params": params[1:]}], lr=0.1, fused=True)
    step(params, optimizer, 0)
    torch.save([params, optimizer.state_dict()], tmp_path / "state.pt")
    twins, state = torch.load(tmp_path / "state.pt", weights_only=True)
    twin = Muon([{"params": twins[:1], "muon": True}, {"params": twins[1:]}], lr=0.5, fused=True)
    twin.load_state_dict(state)
    for seed in (1, 2):
        step(params, optimizer, seed)
        step(twins, twin, seed)
    assert all(torch.equal(p, q) for p, q in zip(params, twins))
