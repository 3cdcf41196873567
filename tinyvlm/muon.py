"""Muon: momentum, made orthogonal. An optimizer for the matrices inside a network.

From "Muon: an optimizer for hidden layers in neural networks" (Jordan et al. 2024, kellerjordan.github.io/posts/muon),
with the step length of "Muon is scalable for LLM training" (Liu et al. 2025, arXiv:2502.16982).

A gradient of a matrix is mostly a few directions, and gradient descent and Adam follow them. Muon takes the momentum
U S V^T and steps along U V^T, all directions alike: the idea is that what is rare in the data, and shows in the faint
ones, is then learned as well. It is for matrices between layers; embeddings, convolutions, heads, norms and biases stay
with AdamW. `Together` makes the two look like one optimizer.
"""
import torch

COEFFICIENTS = 3.4445, -4.7750, 2.0315          # steep at 0, never above 1.21 for s from 0 to 1.2


def orthogonalise(x, steps=5):
    """x (.., R, C) = U S V^T -> about U V^T, without an SVD: singular values come to lie between 0.6 and 1.2.

    Newton and Schulz: x -> a x + b (x x^T) x + c (x x^T)^2 x acts on each singular value s as a s + b s^3 + c s^5, and
    five times that lifts those above about 1/500 of the matrix's norm; fainter ones grow a^5 = 485 times, 0 stays 0.
    Matrix products are all it takes, which is what machines are best at.
    """
    a, b, c = COEFFICIENTS
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x                                                       # R <= C: the smaller square below
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)                           # no singular value above 1
    for _ in range(steps):
        square = x @ x.mT                                                         # (.., R, R)
        x = a * x + (b * square + c * square @ square) @ x                        # (.., R, C)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """For matrices (R, C) only. lr and weight_decay mean what they mean to AdamW, so both can share a schedule:

    an orthogonal R x C matrix times 0.2 sqrt(max(R, C)) has entries as large as AdamW's steps usually are.
    """

    def __init__(self, params, lr, weight_decay=0.0, momentum=0.95):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))
        assert all(p.dim() == 2 for group in self.param_groups for p in group["params"]), "Muon is for matrices"

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            beta, same_shape = group["momentum"], {}
            for p in group["params"]:
                if p.grad is not None:
                    if "mean" not in self.state[p]:
                        self.state[p]["mean"] = torch.zeros_like(p)
                    mean = self.state[p]["mean"].lerp_(p.grad, 1 - beta)
                    same_shape.setdefault(p.shape, []).append((p, p.grad.lerp(mean, beta)))   # Nesterov: look ahead
            for shape, pairs in same_shape.items():             # as one stack: a few large products, not many small
                stack = torch.stack([update for _, update in pairs])              # (n, R, C)
                stack = orthogonalise(stack.bfloat16() if stack.is_cuda else stack)
                for (p, _), update in zip(pairs, stack.to(pairs[0][0].dtype)):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update, alpha=-0.2 * max(shape) ** 0.5 * group["lr"])


class Together:
    """Several optimizers as one to the training loop and the gradient scaler: if a gradient overflows, none steps."""

    def __init__(self, *optimizers):
        self.optimizers = optimizers

    @property
    def param_groups(self):
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self):
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none=True):
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def state_dict(self):
        return [optimizer.state_dict() for optimizer in self.optimizers]

    def load_state_dict(self, states):
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)
