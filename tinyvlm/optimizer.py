"""Which weights learn, how fast, by which rule, and how far: groups of parameters, staged unfreezing, blending.

A model names its parts: "connector" (new layers), "decoder" and "vision" (often public weights). New layers learn from
the start at the full rate; what is already good waits for its epoch and then takes smaller steps, or the noise of the
untrained layers would undo it (as ULMFiT thaws, Howard & Ruder 2018, arXiv:1801.06146).
"""
from contextlib import contextmanager

import torch

from .muon import Muon


def make_optimizer(model, config):
    """AdamW, where --optimizer muon has Muon move the matrices and filters inside; a group for each part and kind. A
    part's rate is a factor of --lr, which train.py multiplies in. Matrices decay; norms, biases, tables do not."""
    factor = {"connector": 1.0, "decoder": getattr(config, "lr_decoder", 1.0), "vision": config.lr_vision}
    names, groups = {id(p): name for name, p in model.named_parameters()}, {}
    for part, p in ((part, p) for part, params in model.parts().items() for p in params):
        name = names[id(p)]
        decays = p.dim() >= 2 and not name.endswith((".wte.weight", ".wpe.weight", ".pos", ".cls"))
        inside = p.dim() == 4 or p.dim() == 2 and (".blocks." in name or name.startswith("connector.")) and (
            min(p.shape) <= 1024)                               # Muon's cost grows with this squared
        muon = config.optimizer == "muon" and inside
        group = {"params": [], "factor": factor[part], "weight_decay": config.weight_decay * decays, "muon": muon}
        groups.setdefault((part, muon, decays), group)["params"].append(p)
    fused = p.device.type in ("cpu", "cuda")                    # one loop over all weights, not ten
    return Muon(groups.values(), lr=config.lr, betas=(0.9, 0.98), fused=fused)


def unfreeze(model, config, epoch):
    """Let each part learn from its epoch on, and hold it still before. True if anything changed."""
    changed = False
    for part, since in (("decoder", getattr(config, "unfreeze_decoder", 0)), ("vision", config.unfreeze_vision)):
        for p in model.parts()[part]:
            changed |= p.requires_grad != (epoch >= since)
            p.requires_grad_(epoch >= since)
    return changed


@contextmanager
def blended(model, origin, share):
    """`with blended(..):` the model's weights are origin + share (own - origin). origin: the state_dict with which they
    began, on any device; empty for all the way. Fine-tuning wins one skill and loses others, and part of the way often
    has most of both. From "Robust fine-tuning of zero-shot models" (Wortsman et al. 2021, arXiv:2109.01903)."""
    weights, own = model.state_dict(), {}                       # the tensors themselves, without their gradients
    for name, start in origin.items():
        own[name] = weights[name].clone()
        weights[name].copy_(torch.lerp(start.to(own[name]), own[name], share))
    yield
    for name, value in own.items():
        weights[name].copy_(value)
