"""The product that almost all the time goes into: x (.., C_in) times a weight (C_out, C_in).

`linear` gives F.linear's numbers (to rounding) and `Linear` is nn.Linear through it. On a GPU, in half precision and
under torch.compile they are exactly that. On a CPU in float32, two things are done by hand, since PyTorch hands these
products to MKL, which Intel tunes for Intel's own processors:

    training, batches   oneDNN, the library that PyTorch already uses for convolutions, is up to twice as fast where MKL
                        is at a loss, and no slower elsewhere. The gradients are two more products, written out below
    one row alone       a matrix times one vector is left to a single core; cut into a stack it goes to all of them

`bench.py train`, `decode` and `lstm` show what both are worth. Left out: half precision on CPUs, quantised weights.
"""
from functools import cache

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

FEW_ROWS = 96       # below this, bringing a transposed weight into oneDNN's order costs more than its product saves


@cache
def has_onednn():
    """Whether this PyTorch can multiply dense matrices by oneDNN (Intel and AMD builds can; some others cannot)."""
    try:
        return bool(onednn(torch.ones(1, 1), torch.ones(1, 1)) == 1)
    except (AttributeError, RuntimeError):                      # no operator: NotImplementedError is a RuntimeError
        return False


def onednn(x, weight, bias=None):
    """F.linear by oneDNN, no gradients: x (.., C_in), weight (C_out, C_in), bias (C_out) or None -> (.., C_out)."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class Product(torch.autograd.Function):
    """y = x W^T + b, and its gradients: dx = dy W, dW = dy^T x, db = the sum of dy's rows."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return onednn(x, weight, bias)                                            # (.., C_out)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dx = dw = db = None
        dy = dy.reshape(-1, weight.size(0))                                       # (R, C_out), R rows in all
        if ctx.needs_input_grad[0]:
            dx = onednn(dy, weight.t()) if len(dy) >= FEW_ROWS else dy @ weight   # (R, C_in)
            dx = dx.view(x.shape)
        if ctx.needs_input_grad[1]:
            dw = dy.t() @ x.reshape(-1, x.size(-1))                               # (C_out, C_in)
        if ctx.needs_input_grad[2]:
            db = dy.sum(dim=0)                                                    # (C_out,)
        return dx, dw, db


def by_hand(x, weight):
    """Whether the two ways of this file apply: float32 on a CPU, outside autocast and torch.compile.

    And a whole weight, or a whole one turned: for columns cut out of one, oneDNN falls back to its reference loop,
    which takes a thousand times as long.
    """
    return (not torch.compiler.is_compiling() and x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
            and x.numel() > 0 and (weight.is_contiguous() or weight.t().is_contiguous())
            and not torch.is_autocast_enabled("cpu") and has_onednn())


def linear(x, weight, bias=None):
    """x (.., C_in), weight (C_out, C_in), bias (C_out) or None -> (.., C_out)."""
    if not by_hand(x, weight):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or bias is not None and bias.requires_grad):
        return Product.apply(x, weight, bias)
    return one_row(x, weight, bias) if x.numel() == x.size(-1) and len(weight) >= 512 else onednn(x, weight, bias)


def one_row(x, weight, bias=None):
    """The product for a single row, x (.., C_in) of C_in numbers in all: every weight is read for one multiplication,

    so memory sets the pace, and each core should read its share.
    """
    rows, C = weight.shape
    k = torch.get_num_threads()
    n = rows // k * k
    stack = weight[:n].view(k, n // k, C)                                         # (k, n/k, C)
    # .t() and not a reshape to (C, 1): the strides tell the library that x is a column, for which it has the fast path
    y = torch.bmm(stack, x.reshape(1, C).t().expand(k, C, 1)).flatten()           # (k, n/k, 1) -> (n,)
    if n < rows:
        y = torch.cat([y, F.linear(x.reshape(C), weight[n:])])                    # (rows,)
    y = y if bias is None else y + bias
    return y.view(*x.shape[:-1], rows)


class Linear(nn.Linear):
    """nn.Linear through `linear`."""

    def forward(self, x):
        return linear(x, self.weight, self.bias)
