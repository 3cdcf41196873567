"""Long short-term memory (Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000), written out twice.

    i, f, o = sigmoid(...)   how much to write, to keep, to show      each gate: x @ w_x.T + h @ w_h.T + b
    g       = tanh(...)      what to write
    c' = f * c + i * g       the memory: one product and one sum a step, so a gradient can survive many steps
    h' = o * tanh(c')        what the outside, and the next step, gets to see

`plain_loop` is the lesson; `Recurrence` gives the same numbers faster, with its way back by hand, and `LSTM` stacks
layers of either. On a CPU a training step is somewhat slower than torch.nn.LSTM's (`tests/bench.py lstm`): that is one
compiled loop, where a step here is a dozen small calls from Python. To fuse them would hide the formulas, so they stay
apart. Left out: bidirectional, projected and packed sequences, peepholes."""
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


def plain_loop(x, w_x, w_h, b, h, c):
    """One layer through time: x (T, B, I), h and c (B, H), w_x (4H, I), w_h (4H, H), b (4H), the gates' rows in torch's
    order, i f g o -> hs (T, B, H), last c. If all weights are 0, gates are 1/2 and g is 0: c halves at every step."""
    hs = []
    for x_t in x:
        i, f, g, o = (F.linear(x_t, w_x, b) + F.linear(h, w_h)).chunk(4, dim=-1)            # each (B, H)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        hs.append(h)
    return torch.stack(hs), c


class Recurrence(torch.autograd.Function):
    """`plain_loop`, and the way back through time, by the chain rule. d_y is the loss's gradient by y; `a` are the sums
    in the gates before squashing (s' = s (1 - s), tanh' = 1 - tanh^2).

        (1) h' = o tanh(c')      d_o = d_h' tanh(c')    d_c' gains d_h' o (1 - tanh(c')^2)
        (2) c' = f c + i g       d_i = d_c' g    d_f = d_c' c    d_g = d_c' i    d_c = d_c' f
        (3) gates of a           d_a = [d_i, d_f, d_g, d_o] * slope,  slope = [i (1 - i), f (1 - f), 1 - g^2, o (1 - o)]
        (4) a = x w_x.T + h w_h.T + b       d_h = d_a w_h    d_x = d_a w_x    d_w_x = d_a.T x    d_w_h = d_a.T h
    x's share of `a`, and the last three of (4), wait for no step: each is one product for all T."""
    @staticmethod
    def forward(ctx, x, w_x, w_h, b, h, c):
        gates, hs, cs = F.linear(x, w_x, b), [h], [c]                           # (T, B, 4H): the input's share of a
        for a in gates:
            a += F.linear(h, w_h)
            i, f, g, o = a.chunk(4, dim=1)                                      # each (B, H): views into `gates`
            i.sigmoid_(), f.sigmoid_(), g.tanh_(), o.sigmoid_()
            c = f * c + i * g
            h = o * torch.tanh(c)
            hs.append(h)
            cs.append(c)
        hs, cs = torch.stack(hs), torch.stack(cs)                               # (T + 1, B, H)
        ctx.save_for_backward(x, w_x, w_h, gates, hs, cs)
        return hs[1:], c

    @staticmethod
    @once_differentiable
    def backward(ctx, d_hs, d_c):
        x, w_x, w_h, gates, hs, cs = ctx.saved_tensors
        i, f, g, o = gates.chunk(4, dim=2)                                      # each (T, B, H)
        slope = torch.cat([i * (1 - i), f * (1 - f), 1 - g ** 2, o * (1 - o)], dim=2)       # (T, B, 4H), for (3)
        tanh_c = torch.tanh(cs[1:])
        through = o * (1 - tanh_c ** 2)                                         # (T, B, H), for (1)
        d_gates, d_h = torch.empty_like(gates), torch.zeros_like(d_c)
        for t in reversed(range(len(x))):
            d_h = d_h + d_hs[t]                                                 # from the next step, and from outside
            d_o = d_h * tanh_c[t]                                               # (1)
            d_c = d_c + d_h * through[t]
            d_i, d_f, d_g = d_c * g[t], d_c * cs[t], d_c * i[t]                 # (2)
            d_c = d_c * f[t]
            torch.mul(torch.cat([d_i, d_f, d_g, d_o], dim=1), slope[t], out=d_gates[t])     # (3)
            d_h = d_gates[t] @ w_h                                              # (4)
        d_a = d_gates.flatten(0, 1)                                             # (T * B, 4H): all steps at once
        return d_gates @ w_x, d_a.t() @ x.flatten(0, 1), d_a.t() @ hs[:-1].flatten(0, 1), d_a.sum(0), d_h, d_c


class LSTM(nn.Module):
    """Same numbers as torch.nn.LSTM(..., batch_first=True) given the same weights, gradients included. Parameters by
    torch's names: weight_ih_l{k} (4H, I, or 4H, H above the first layer), weight_hh_l{k} (4H, H), and two biases (4H),
    where one would do: a heritage of cuDNN. Dropout acts between layers, while training."""
    def __init__(self, input_size, hidden_size, num_layers=1, dropout=0.0):
        super().__init__()
        self.hidden_size, self.num_layers, self.dropout = hidden_size, num_layers, dropout
        for k in range(num_layers):
            n_in = hidden_size if k else input_size
            for name, size in (("weight_ih", [n_in]), ("weight_hh", [hidden_size]), ("bias_ih", []), ("bias_hh", [])):
                self.register_parameter(f"{name}_l{k}", nn.Parameter(torch.empty(4 * hidden_size, *size)))
        for weight in self.parameters():
            nn.init.uniform_(weight, -hidden_size ** -0.5, hidden_size ** -0.5)     # torch's range, drawn in its order

    def forward(self, x, state=None, through_time=Recurrence.apply):
        """x (B, T, I), state None (zeros) or (h, c), each (L, B, H) -> the top layer's h of every step (B, T, H), and
        the (h, c) to go on from. In float32 also under autocast: c is a long sum, half precision would round it off."""
        shape, dtype, last = (self.num_layers, len(x), self.hidden_size), self.weight_ih_l0.dtype, []
        h_0, c_0 = state or (x.new_zeros(shape),) * 2
        assert h_0.shape == c_0.shape == shape, f"an LSTM's state is a pair (h, c), both of shape {shape}"
        with torch.autocast(x.device.type, enabled=False):
            x = x.transpose(0, 1).to(dtype)                                     # (B, T, I) -> (T, B, I)
            for k in range(self.num_layers):
                x = F.dropout(x, self.dropout, self.training and k > 0)
                w_x, w_h, b_x, b_h = list(self.parameters())[4 * k:4 * k + 4]
                x, c = through_time(x, w_x, w_h, b_x + b_h, h_0[k].to(dtype), c_0[k].to(dtype))     # (T, B, H), (B, H)
                last.append((x[-1], c))
        return x.transpose(0, 1), tuple(map(torch.stack, zip(*last)))           # (B, T, H), two of (L, B, H)
