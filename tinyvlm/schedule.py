"""OneCycle: the learning rate climbs, then falls far below where it began (Smith & Topin 2018, arXiv:1708.07120).

A pure function: step in, rate out. No object to save, nothing to fall out of step on resume. Same numbers as
torch.optim.lr_scheduler.OneCycleLR (two phases, momentum left alone).

    >>> [round(one_cycle(step, 10, 1.0), 4) for step in (0, 2, 9)]     # start, peak, end
    [0.04, 1.0, 0.0]
"""
import math


def one_cycle(step, total_steps, max_lr, pct_start=0.3, div_factor=25.0, final_div_factor=1e4, anneal_strategy="cos"):
    """Learning rate at `step` (0 .. total_steps - 1), an optimizer step, not a batch.

    The rate rises from max_lr / div_factor to max_lr over the first pct_start of the steps, then falls to
    max_lr / div_factor / final_div_factor. anneal_strategy: "cos" or "linear". Raises ValueError for a step outside.
    """
    if not 0 <= step < total_steps:
        raise ValueError(f"step {step} is outside a schedule of {total_steps} steps")
    start = max_lr / div_factor
    end = start / final_div_factor
    peak = pct_start * total_steps - 1                    # torch's convention; it may fall between two steps
    last = total_steps - 1
    if step <= peak:
        return _between(start, max_lr, step / peak if peak else 1.0, anneal_strategy)
    return _between(max_lr, end, (step - peak) / (last - peak) if last > peak else 1.0, anneal_strategy)


def _between(a, b, fraction, anneal_strategy):
    """From a (fraction 0) to b (fraction 1), along half a cosine or a straight line."""
    if anneal_strategy == "linear":
        return a + (b - a) * fraction
    return b + (a - b) / 2 * (1 + math.cos(math.pi * fraction))
