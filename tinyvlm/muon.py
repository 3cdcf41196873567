"""Muon: momentum, made orthogonal. An optimizer for the matrices inside a network, with AdamW for all the rest.

From "Muon: an optimizer for hidden layers in neural networks" (Jordan et al. 2024, kellerjordan.github.io/posts/muon),
with the step length of "Muon is scalable for LLM training" (Liu et al. 2025, arXiv:2502.16982).
A gradient of a matrix is mostly a few directions, and Adam follows them. Muon takes the momentum U S V^T and steps
along U V^T, all directions alike: the idea is that what is rare in the data is then learned as well. A convolution's
filters (C_out, C_in, k, k) are a matrix, too, of a row for each filter. Embeddings, heads, norms and biases stay with
AdamW. Left out: several matrices of one shape as one stack."""
import torch


def orthogonalise(x, steps=5):
    """x (R, C) = U S V^T -> about U V^T, without an SVD: singular values come to lie between 0.6 and 1.2. Newton and
    Schulz: x -> (a + b x x^T + c (x x^T)^2) x acts on each singular value s as a s + b s^3 + c s^5, and five times that
    lifts those above about 1/500 of the matrix's norm; fainter ones grow a^5 = 485 times, 0 stays 0.

    The five factors are polynomials of one square x x^T, so their product can be made first, of R x R matrices, and x
    (often four times as wide) be multiplied once. In 16 bits the faint would drown: there, x takes each step itself."""
    a, b, c = 3.4445, -4.7750, 2.0315                   # steep at 0, never above 1.21 for s from 0 to 1.2
    if len(x) > x.shape[1]:
        return orthogonalise(x.t(), steps).t()          # R <= C: the smaller square below
    x = (x.bfloat16() if x.is_cuda else x) / (x.norm() + 1e-7)      # no singular value above 1
    at_once = 1 if x.is_cuda else steps
    for _ in range(0, steps, at_once):
        square, product = x @ x.t(), None                                         # (R, R)
        for k in range(at_once):
            factor = torch.addmm(square, square, square, beta=b, alpha=c)         # (R, R)
            factor.diagonal().add_(a)
            product = factor if product is None else factor @ product             # (R, R)
            if k + 1 < at_once:
                square = factor @ (square @ factor)                               # that of the new x
        x = product @ x                                                           # (R, C)
    return x


class Muon(torch.optim.AdamW):
    """AdamW, but the groups with "muon": True, of matrices and filters only, step by Muon. Both share lr and decay:
    an orthogonal R x C matrix times 0.2 sqrt(max(R, C)) has entries as large as AdamW's steps usually are."""
    def __init__(self, params, **options):
        super().__init__(params, **options)
        self._step_supports_amp_scaling = False             # to a GradScaler: if any gradient overflows, nothing steps

    @torch.no_grad()
    def step(self):
        groups = self.param_groups
        for group in (group for group in groups if group.get("muon")):
            for p in (p for p in group["params"] if p.grad is not None):
                grad = p.grad.flatten(1)                                            # (R, C)
                if p not in self.state:                     # AdamW's load_state_dict wants a "step" everywhere
                    self.state[p] = {"mean": torch.zeros_like(grad), "step": torch.zeros(())}
                mean = self.state[p]["mean"].lerp_(grad, 0.05)                      # (R, C)
                update = orthogonalise(grad.lerp(mean, 0.95)).to(p.dtype)           # Nesterov: look ahead
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(update.reshape(p.shape), alpha=0.2 * max(grad.shape) ** 0.5 * group["lr"])
        self.param_groups = [group for group in groups if not group.get("muon")]
        super().step()                                      # AdamW, for the rest
        self.param_groups = groups
