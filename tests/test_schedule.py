"""OneCycle against torch's own scheduler object."""
import pytest
import torch

from tinyvlm.schedule import one_cycle

OPTIONS = [{}, {"pct_start": 0.1}, {"pct_start": 0.5, "anneal_strategy": "linear"}, {"pct_start": 0.0},
           {"pct_start": 1.0}, {"div_factor": 10.0, "final_div_factor": 100.0}]
CASES = [(total, options) for total in (2, 3, 7, 10, 100, 333) for options in OPTIONS
         if options.get("pct_start", 0.3) * total != 1]          # a peak at step 0: torch divides by zero, see below


@pytest.mark.parametrize("total, options", CASES)
def test_equal_to_torchs(total, options):
    param = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([param], lr=1.0, momentum=0.9)
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.03, total_steps=total, **options)
    for step in range(total):
        want = optimizer.param_groups[0]["lr"]
        assert one_cycle(step, total, 0.03, **options) == pytest.approx(want, rel=1e-9, abs=1e-15)
        if step + 1 < total:
            optimizer.step()
            theirs.step()


def test_a_peak_at_step_zero_where_torch_divides_by_zero():
    assert one_cycle(0, 10, 1.0, pct_start=0.1) == 1.0


@pytest.mark.parametrize("step", [-1, 10])
def test_a_step_outside_is_refused(step):
    with pytest.raises(ValueError, match=f"step {step} is outside a schedule of 10 steps"):
        one_cycle(step, 10, 1.0)
