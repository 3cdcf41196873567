"""Long short-term memory (Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000), written out twice.

`lstm_cell` is one step as the books print it; `LSTM.plain` loops over it and lets autograd find the gradients: the
lesson, and the oracle of the tests. `LSTM.forward` gives the same numbers faster: `Recurrence` walks through time once
forward and once backward, with the backward pass derived by hand. Left out: bidirectional, projected and packed
sequences, peepholes.

    i, f, o = sigmoid(...)   how much to write, to keep, to show      each gate: x @ w_x.T + h @ w_h.T + b
    g       = tanh(...)      what to write
    c' = f * c + i * g       the memory: one product and one sum a step, so a gradient can survive many steps
    h' = o * tanh(c')        what the outside, and the next step, gets to see
"""
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .linear import linear


def lstm_cell(x, h, c, w_x, w_h, b):
    """One step. x (B, I), h and c (B, H), w_x (4H, I), w_h (4H, H), b (4H) -> the next h and c, both (B, H).

    The rows of the weights hold the gates in torch's order: input, forget, cell, output.
    With all weights and biases zero each gate is sigmoid(0) = 0.5 and g is 0: the memory halves at every step.
    """
    i, f, g, o = (F.linear(x, w_x, b) + F.linear(h, w_h)).chunk(4, dim=-1)  # each (B, H)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


class Recurrence(torch.autograd.Function):
    """One layer through all of time, its backward pass derived by hand: x (T, B, I) -> hs (T, B, H), last c (B, H).

    Autograd would record a dozen nodes per step and add up the weights' gradient T times. Here a step is one matrix
    product and a handful of small in-place operations; whatever does not depend on the step before is one product for
    all T of them. Time comes first, so that what belongs to one step lies together in memory.
    """

    @staticmethod
    def forward(ctx, x, w_x, w_h, b, h0, c0):
        T, B, H = x.shape[0], *h0.shape
        doubled = torch.ones(4, H, 1, dtype=w_x.dtype, device=w_x.device)   # tanh(a) = 2 sigmoid(2a) - 1: with the rows
        doubled[2] = 2                                                      # of g doubled, one sigmoid does all four
        w_x2, w_h2, b2 = (w.view(4, H, -1).mul(doubled).view(w.shape) for w in (w_x, w_h, b))
        gates = linear(x, w_x2, b2)                                         # (T, B, 4H): what the input asks for
        hs, cs = (start.new_empty(T + 1, B, H) for start in (h0, c0))       # slot t is the state before step t
        tanh_c = torch.empty_like(hs[1:])                                   # (T, B, H)
        hs[0], cs[0] = h0, c0
        steps = zip(gates, *gates.chunk(4, dim=2), hs, cs, hs[1:], cs[1:], tanh_c)    # per step, views to write into
        for a, i, f, g, o, h, c, h_next, c_next, tanh in steps:
            a.add_(linear(h, w_h2)).sigmoid_()                              # (B, 4H): and what the past asks for
            g.mul_(2).sub_(1)
            torch.mul(f, c, out=c_next).addcmul_(i, g)
            torch.tanh(c_next, out=tanh)
            torch.mul(o, tanh, out=h_next)
        ctx.save_for_backward(x, w_x, w_h, gates, hs, cs, tanh_c)
        return hs[1:], cs[T]                    # hs is saved too: after an edit in place, backward raises torch's error

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out, d_c):
        """d_name is the loss's gradient by name. We walk from the last step to the first, dh and dc flowing backwards:

            dh = d_out[t] + what step t + 1 returned through w_h       (h = o tanh(c))
            dc = what step t + 1 returned + dh * o (1 - tanh(c)^2)     (c = f c_before + i g)
            before squashing:  d_i = dc * g i (1 - i)      d_f = dc * c_before f (1 - f)      as s' = s (1 - s)
                               d_g = dc * i (1 - g^2)      d_o = dh * tanh(c) o (1 - o)       and tanh' = 1 - tanh^2

        What dh and dc are multiplied with is known before the walk, for all steps at once: `slope`, (T, B, 4H).
        `addcmul(a, b, c, value=-1)` is a - b * c in one sweep over memory.
        """
        x, w_x, w_h, gates, hs, cs, tanh_c = ctx.saved_tensors
        T, B, H = tanh_c.shape
        i, f, g, o = gates.chunk(4, dim=2)                                  # each (T, B, H)
        slope = torch.addcmul(gates, gates, gates, value=-1)                # (T, B, 4H): s - s * s; g's is replaced
        for s, factor in zip(slope.chunk(4, dim=2), (g, cs[:T], None, tanh_c)):
            s.mul_(factor) if factor is not None else torch.addcmul(i, i * g, g, value=-1, out=s)
        through = torch.addcmul(o, hs[1:], tanh_c, value=-1)                # (T, B, H): o (1 - tanh^2) = o - h tanh
        w_back = w_h.t().contiguous()                                       # (H, 4H), turned once for all steps
        d_gates, dc, later = slope.view(T, B, 4, H), d_c.clone(), None      # the slopes become the gradients in place
        for t in reversed(range(T)):
            dh = d_out[t] if later is None else linear(later, w_back).add_(d_out[t])        # (B, H)
            dc.addcmul_(dh, through[t])
            d_gates[t, :, :3].mul_(dc[:, None])                             # i, f and g act on h through c
            d_gates[t, :, 3].mul_(dh)
            dc.mul_(f[t])
            later = slope[t]                                                # (B, 4H)
        rows, wanted = slope.flatten(0, 1), ctx.needs_input_grad            # (T*B, 4H): all steps at once from here
        d_x = linear(slope, w_x.t()) if wanted[0] else None                 # (T, B, I)
        d_w_x = rows.t() @ x.flatten(0, 1) if wanted[1] else None           # (4H, I)
        d_w_h = rows.t() @ hs[:T].flatten(0, 1) if wanted[2] else None      # (4H, H)
        return d_x, d_w_x, d_w_h, rows.sum(0), slope[0] @ w_h if wanted[4] else None, dc


class LSTM(nn.Module):
    """Same numbers as torch.nn.LSTM(..., batch_first=True) given the same weights, gradients included.

    input_size I, hidden_size H; dropout acts on the output of every layer but the last, while training.
    The parameters carry torch's own names and shapes, so that `ours.load_state_dict(torch.nn.LSTM(...).state_dict())`
    is all it takes to copy one: weight_ih_l{k} (4H, I, or 4H, H above the first layer), weight_hh_l{k} (4H, H),
    bias_ih_l{k} and bias_hh_l{k} (4H). Two biases are one too many, since only their sum acts: a heritage of cuDNN.
    """

    def __init__(self, input_size, hidden_size, num_layers=1, dropout=0.0):
        super().__init__()
        assert min(input_size, hidden_size, num_layers) > 0 and 0 <= dropout <= 1, (
            f"LSTM sizes must be positive and dropout within 0..1, got input_size {input_size}, hidden_size "
            f"{hidden_size}, num_layers {num_layers}, dropout {dropout}")
        self.input_size, self.hidden_size, self.num_layers, self.dropout = input_size, hidden_size, num_layers, dropout
        for k in range(num_layers):
            for name, shape in [("weight_ih", (input_size if k == 0 else hidden_size,)), ("weight_hh", (hidden_size,)),
                                ("bias_ih", ()), ("bias_hh", ())]:
                self.register_parameter(f"{name}_l{k}", nn.Parameter(torch.empty(4 * hidden_size, *shape)))
        for weight in self.parameters():
            nn.init.uniform_(weight, -hidden_size ** -0.5, hidden_size ** -0.5)    # torch's range, drawn in its order

    def forward(self, x, state=None):
        """x (B, T, I), state None (zeros) or (h, c), each (L, B, H) -> the top layer's h of every step (B, T, H), and
        the (h, c) after the last one, each (L, B, H): feed them back to go on reading where this call stopped.

        Computed in the weights' precision, also under autocast: c is a long sum, and half precision would round it off.
        """
        return self._layers(x, state, self._fast)

    def plain(self, x, state=None):
        """The same as `forward`, one `lstm_cell` after the other. Slower; gradients of gradients work."""
        return self._layers(x, state, self._loop)

    @staticmethod
    def _fast(x, h, c, w_x, w_h, b):
        hs, c = Recurrence.apply(x, w_x, w_h, b, h, c)              # (T, B, H), (B, H)
        return hs, hs[-1], c

    @staticmethod
    def _loop(x, h, c, w_x, w_h, b):
        hs = []
        for x_t in x:                                               # (B, I)
            h, c = lstm_cell(x_t, h, c, w_x, w_h, b)
            hs.append(h)
        return torch.stack(hs), h, c                                # (T, B, H), (B, H), (B, H)

    def _layers(self, x, state, through_time):
        x, state = self._check(x, state)
        last_h, last_c = [], []
        with torch.autocast(x.device.type, enabled=False):
            x = x.transpose(0, 1).contiguous()                      # (B, T, I) -> (T, B, I)
            for k, (h, c) in enumerate(zip(*state)):
                if k > 0:
                    x = F.dropout(x, self.dropout, self.training)
                w_x, w_h, b_x, b_h = (getattr(self, f"{name}_l{k}")
                                      for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
                x, h, c = through_time(x, h, c, w_x, w_h, b_x + b_h)    # (T, B, H), (B, H), (B, H)
                last_h.append(h)
                last_c.append(c)
        return x.transpose(0, 1), (torch.stack(last_h), torch.stack(last_c))    # (B, T, H), two of (L, B, H)

    def _check(self, x, state):
        """The input and state in the weights' precision, after a look at their shapes."""
        assert x.ndim == 3 and x.shape[1] > 0 and x.shape[2] == self.input_size, (
            f"LSTM reads x of shape (B, T, {self.input_size}) with at least one step, got {tuple(x.shape)}")
        dtype, shape = self.weight_ih_l0.dtype, (self.num_layers, x.shape[0], self.hidden_size)
        if state is None:
            state = (x.new_zeros(shape, dtype=dtype),) * 2
        assert tuple(state[0].shape) == tuple(state[1].shape) == shape, (
            f"LSTM state is a pair (h, c) of shape {shape}, got {tuple(state[0].shape)} and {tuple(state[1].shape)}")
        return x.to(dtype), (state[0].to(dtype), state[1].to(dtype))
