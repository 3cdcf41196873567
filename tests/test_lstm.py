"""tinyvlm.lstm: torch.nn.LSTM is the oracle of `forward` and of the plain loop; arithmetic is the second one."""
import pytest
import torch

from tinyvlm.lstm import LSTM, plain_loop


def twins(num_layers=1, dtype=torch.float64):
    """Ours and torch's, with the same random weights."""
    torch.manual_seed(num_layers)
    theirs = torch.nn.LSTM(5, 7, num_layers, batch_first=True, dtype=dtype)
    ours = LSTM(5, 7, num_layers).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def everything(lstm, call, x, h, c):
    """Output, states, and the gradient of a loss that reads all three with uneven weights."""
    out, (h_n, c_n) = call(x, (h, c))
    loss = sum((y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)).sum() for y in (out, h_n, c_n))
    return [out, h_n, c_n, *torch.autograd.grad(loss, [x, h, c, *lstm.parameters()])]


@pytest.mark.parametrize("num_layers, B, T", [(1, 3, 6), (1, 1, 1), (2, 3, 1), (3, 2, 9)])
@pytest.mark.parametrize("way", [(), (plain_loop,)])
def test_equals_torch_with_gradients(way, num_layers, B, T):
    """The promise of the file: same numbers as nn.LSTM, for the output, both states and the gradient of all inputs."""
    (ours, theirs), L, H = twins(num_layers=num_layers), num_layers, 7
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((B, T, 5), (L, B, H), (L, B, H))]
    got, want = everything(ours, lambda x, state: ours(x, state, *way), *inputs), everything(theirs, theirs, *inputs)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_a_step_by_arithmetic():
    """Zero weights: gates are 1/2 and g is 0, so c halves and h = tanh(c) / 2. Then biases that latch each gate."""
    h, zeros = torch.ones(1, 1), [torch.zeros(4, 1), torch.zeros(4, 1)]
    latched = torch.tensor([-100.0, 100.0, 5.0, 100.0])                 # write nothing, keep all, show all
    for b, kept, shown in ((torch.zeros(4), 0.4, 0.5), (latched, 0.8, 1.0)):
        hs, c = plain_loop(h[None], *zeros, b, h, torch.full((1, 1), 0.8))
        assert c.item() == pytest.approx(kept)
        assert hs.item() == pytest.approx(shown * torch.tanh(torch.tensor(kept)).item())


def test_dropout_acts_between_layers_and_only_in_training():
    """The top layer's output has no zeros; eval equals dropout 0; with dropout 1 nothing reaches the upper layer."""
    (lstm, _), x = twins(num_layers=2), torch.randn(2, 4, 5, dtype=torch.float64)
    dry, lstm.dropout = lstm(x)[0], 0.5
    assert not torch.equal(lstm(x)[0], lstm(x)[0]) and lstm(x)[0].count_nonzero() == 2 * 4 * 7
    assert torch.equal(lstm.eval()(x)[0], dry)
    lstm.train().dropout = 1.0
    assert torch.equal(lstm(x)[0], lstm(x + 1)[0])


def test_runs_in_full_precision_under_autocast():
    """bf16 in and bf16 state: the recurrence stays in float32, and gradients come back in the input's own type."""
    ours, _ = twins(dtype=torch.float32)
    x = torch.randn(2, 4, 5, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out, (h, c) = ours(x, (torch.zeros(1, 2, 7, dtype=torch.bfloat16),) * 2)
        out.sum().backward()
    assert out.dtype == h.dtype == c.dtype == ours.weight_hh_l0.grad.dtype == torch.float32
    assert x.grad.dtype == torch.bfloat16
    torch.testing.assert_close(out, ours(x.float())[0])


def test_a_state_of_another_shape_is_named():
    """Without its layers' axis a state would be read as one number a channel, the same for every row, silently."""
    with pytest.raises(AssertionError, match=r"\(1, 2, 7\)"):
        LSTM(5, 7)(torch.zeros(2, 4, 5), (torch.zeros(2, 7), torch.zeros(2, 7)))
