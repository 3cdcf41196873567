"""OneCycle: the learning rate climbs, then falls far below where it began (Smith & Topin 2018, arXiv:1708.07120).

A pure function: step in, rate out. No object to save, nothing to fall out of step on resume. Same numbers as
torch.optim.lr_scheduler.OneCycleLR with its cosine (two phases, momentum left alone).

    >>> [round(one_cycle(step, 10, 1.0), 4) for step in (0, 2, 9)]     # start, peak, end
    [0.04, 1.0, 0.0]
"""
import math


def one_cycle(step, total_steps, max_lr, pct_start=0.3, div_factor=25.0, final_div_factor=1e4):
    """The rate at `step` (0 .. total_steps - 1), an optimizer step: it rises from max_lr / div_factor to max_lr over
    the first pct_start of the steps, then falls to max_lr / div_factor / final_div_factor, each along half a cosine."""
    if not 0 <= step < total_steps:
        raise ValueError(f"step {step} is outside a schedule of {total_steps} steps")
    peak, last = pct_start * total_steps - 1, total_steps - 1     # torch's convention; peak may fall between two steps
    if step <= peak:
        begin, end, done = max_lr / div_factor, max_lr, step / peak if peak else 1.0
    else:
        begin, end = max_lr, max_lr / div_factor / final_div_factor
        done = (step - peak) / (last - peak) if last > peak else 1.0
    return end + (begin - end) * (1 + math.cos(math.pi * done)) / 2
