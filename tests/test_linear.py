"""Our product is nn.Linear's, forward and backward, whichever way it takes."""
import pytest
import torch
import torch.nn.functional as F

from tinyvlm import linear as module
from tinyvlm.linear import FEW_ROWS, Linear, by_hand, linear, one_row


@pytest.mark.parametrize("shape", [(3, 5), (2, 7, 5), (FEW_ROWS, 5), (4, FEW_ROWS, 5), (1, 5), (0, 5), (5,)])
@pytest.mark.parametrize("bias", [True, False])
def test_output_and_gradients_are_those_of_f_linear(shape, bias):
    torch.manual_seed(0)
    x, w, b = torch.randn(shape), torch.randn(9, 5), torch.randn(9) if bias else None
    results = []
    for product in (linear, F.linear):
        leaves = [t.clone().requires_grad_() for t in (x, w, b) if t is not None]
        y = product(*leaves, *([] if bias else [None]))
        (y * torch.arange(y.numel()).view(y.shape)).sum().backward()
        results.append([y, *(leaf.grad for leaf in leaves)])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(*results))


def test_weights_that_do_not_lie_in_order():
    """Rows of a joined matrix and a transposed one, as attention and the LSTM give them; and columns of one."""
    torch.manual_seed(0)
    x = torch.randn(200, 5)
    for weight in (torch.randn(12, 5)[2:9], torch.randn(5, 9).t(), torch.randn(9, 7)[:, :5]):
        assert torch.allclose(linear(x, weight), F.linear(x, weight), atol=1e-5)


@pytest.mark.parametrize("rows", [512, 513, 1027])
def test_one_row_is_cut_into_a_stack_and_back(rows):
    """Also where the rows do not divide among the threads: the last few take the plain way."""
    torch.manual_seed(0)
    x, w, b = torch.randn(1, 1, 64), torch.randn(rows, 64), torch.randn(rows)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert torch.allclose(one_row(x, w, b), F.linear(x, w, b), atol=1e-4)
            assert torch.allclose(one_row(x, w), F.linear(x, w), atol=1e-4)
    finally:
        torch.set_num_threads(before)


def test_elsewhere_it_is_f_linear_itself(monkeypatch):
    """Half precision, columns cut out of a weight, autocast, and a PyTorch without oneDNN."""
    x, w = torch.randn(3, 5), torch.randn(9, 5)
    monkeypatch.setattr(module, "has_onednn", lambda: True)
    assert by_hand(x, w) and by_hand(x, torch.randn(5, 9).t()) and not by_hand(x, torch.randn(9, 7)[:, :5])
    assert not by_hand(x.bfloat16(), w.bfloat16()) and not by_hand(x.double(), w.double())
    with torch.autocast("cpu", torch.bfloat16):
        assert not by_hand(x, w) and linear(x, w).dtype == torch.bfloat16
    monkeypatch.setattr(module, "has_onednn", lambda: False)
    assert torch.equal(linear(x, w), F.linear(x, w))


def test_frozen_weights_get_no_gradient():
    layer, x = Linear(5, 9).requires_grad_(False), torch.randn(3, 5, requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight.grad is None and layer.bias.grad is None
    assert torch.allclose(x.grad, layer.weight.sum(dim=0).expand(3, 5), atol=1e-5)
