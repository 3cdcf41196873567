"""Muon: momentum, made orthogonal. An optimizer for the matrices inside a network.

From "Muon: an optimizer for hidden layers in neural networks" (Jordan et al. 2024, kellerjordan.github.io/posts/muon),
with the step length of "Muon is scalable for LLM training" (Liu et al. 2025, arXiv:2502.16982).

A gradient of a matrix is mostly a few directions, those that already matter; gradient descent and Adam follow them and
leave the rest to chance. Muon takes the momentum U S V^T and steps along U V^T: all directions alike, so that what is
rare in the data is learned as fast as what is common. Embeddings, norms and biases are no maps from vectors to vectors:
they stay with AdamW.
"""
import torch

COEFFICIENTS = 3.4445, -4.7750, 2.0315          # of the polynomial below: steepest at 0, and bounded between 0 and 1


def orthogonalise(x, steps=5):
    """x (.., R, C) = U S V^T -> about U V^T: every singular value is brought to between 0.7 and 1.2, without an SVD.

    Newton and Schulz: x -> a x + b (x x^T) x + c (x x^T)^2 x acts on each singular value s as a s + b s^3 + c s^5, and
    five times that lifts even small ones. Matrix products are all it takes, which is what machines are best at.
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
                    mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                    mean.lerp_(p.grad, 1 - beta)
                    same_shape.setdefault(p.shape, []).append((p, p.grad.lerp(mean, beta)))   # Nesterov: look ahead
            for shape, pairs in same_shape.items():             # as one stack: a few large products, not many small
                stack = torch.stack([update for _, update in pairs])              # (n, R, C)
                stack = orthogonalise(stack.bfloat16() if stack.is_cuda else stack)
                for (p, _), update in zip(pairs, stack.to(pairs[0][0].dtype)):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update, alpha=-0.2 * max(shape) ** 0.5 * group["lr"])
