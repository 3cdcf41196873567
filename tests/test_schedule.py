"""OneCycle against torch's own scheduler object."""
import pytest
import torch

from tinyvlm.schedule import one_cycle

OPTIONS = [{}, {"pct_start": 0.1}, {"pct_start": 0.5}, {"pct_start": 0.0}, {"pct_start": 1.0},
           {"div_factor": 10.0, "final_div_factor": 100.0}]


@pytest.mark.parametrize("total, options", [(total, options) for total in (2, 3, 7, 10, 333) for options in OPTIONS
                                            if options.get("pct_start") != 1 / total])       # there torch divides by 0
def test_equal_to_torchs(total, options):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.9)
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.03, total_steps=total, **options)
    for step in range(total):
        assert one_cycle(step, total, 0.03, **options) == pytest.approx(optimizer.param_groups[0]["lr"], 1e-9, 1e-15)
        if step + 1 < total:
            optimizer.step()
            theirs.step()


def test_the_ends():
    """A peak at step 0, where torch divides by zero; and a step outside, which is nobody's."""
    assert one_cycle(0, 10, 1.0, pct_start=0.1) == 1.0
    for step in (-1, 10):
        with pytest.raises(ValueError, match=f"step {step} is outside a schedule of 10 steps"):
            one_cycle(step, 10, 1.0)
