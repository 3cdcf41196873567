"""CLIP: two towers that put pictures and sentences into one space, where what belongs together lies together.

From "Learning transferable visual models from natural language supervision" (Radford et al. 2021, arXiv:2103.00020).
There is nothing new inside: the image tower is our ViT (a norm before its blocks, no patch bias) or our ResNet-50, the
text tower our GPT without its output matrix. New is the question asked of a batch: which of these B sentences belongs
to this picture, and which of these B pictures to this sentence? Rows and columns of one (B, B) table of similarities:

              a dog   a boat                     row 0 should say "a dog", column 0 should say the dog's picture:
    dog.jpg  [  9.1     2.0 ]                    cross-entropy along the rows and along the columns,
    boat.jpg [  1.5     8.7 ]                    the right answers on the diagonal

An untrained model is at loss ln(B): it cannot tell B candidates apart. Left out: OpenAI's ResNet with attention
pooling, and gathering the negatives of other processes.
"""
import math
from dataclasses import dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F

from .cnn import ResNet50, ResNetConfig
from .gpt import GPT, GPTConfig
from .vit import ViT, ViTConfig

MAX_LOG_SCALE = math.log(100)   # sharper than a factor of 100, training becomes unstable (section 2.5 of the paper)


def vision_config(**sizes):
    """A ViT as CLIP builds it, ViT-B/32 if nothing else is said."""
    return ViTConfig(**{"patch_size": 32, "activation": "quick_gelu", "eps": 1e-5, "pre_norm": True,
                        "patch_bias": False, **sizes})


def text_config(**sizes):
    """The text tower: GPT-2's blocks, narrower, over CLIP's own vocabulary of 49,408 tokens and 77 positions."""
    return GPTConfig(**{"block_size": 77, "vocab_size": 49408, "n_head": 8, "n_embd": 512, "activation": "quick_gelu",
                        **sizes})


@dataclass
class CLIPConfig:
    """The defaults are ViT-B/32 with OpenAI's activation.

    LAION's weights want "gelu" in both towers; with the wrong one nothing fails, the features are only worse.
    """
    vision: ViTConfig | ResNetConfig = field(default_factory=vision_config)
    text: GPTConfig = field(default_factory=text_config)
    n_joint: int = 512              # D, width of the space that both towers meet in
    head: str = "linear"            # on the image side: "linear" as published; "mlp": two layers, GELU between
    end_token: int | None = None    # id that ends a sentence; None: the largest id in each row


def contrastive_loss(logits):
    """logits (B, B), picture i and sentence i belonging together -> the mean of both directions' cross-entropy."""
    B, n_text = logits.shape
    assert B == n_text, f"each picture needs its one sentence, got {B} pictures and {n_text} sentences"
    targets = torch.arange(B, device=logits.device)                               # the diagonal
    return (F.cross_entropy(logits.float(), targets) + F.cross_entropy(logits.float().t(), targets)) / 2


def info_nce(image_emb, text_emb, logit_scale):
    """The symmetric InfoNCE loss of L2-normalised embeddings (B, D), row i of one belonging to row i of the other.

    logit_scale: a scalar tensor, the LOG of the factor on the cosines (the inverse temperature), capped at ln 100.
    Reference: "Representation learning with contrastive predictive coding" (van den Oord et al. 2018), symmetric as in
    CLIP's figure 3. All embeddings equal: every candidate is as likely as the others, and the loss is ln(B).
    """
    scale = torch.as_tensor(logit_scale).clamp(max=MAX_LOG_SCALE).exp()
    return contrastive_loss(scale * image_emb @ text_emb.t())


class CLIP(nn.Module):
    """Two towers and two projections into one space of D numbers, with a learned temperature between them."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        assert c.head in ("linear", "mlp"), f"head {c.head!r} is neither linear nor mlp"
        if isinstance(c.vision, ResNetConfig):
            self.vision = ResNet50(c.vision)
            width = self.vision.n_feat
        else:
            self.vision, width = ViT(c.vision), c.vision.n_embd
        self.text = GPT(c.text)
        self.image_head = nn.Linear(width, c.n_joint, bias=False)
        if c.head == "mlp":                         # ResNet-50 against a ready text tower: 2048 -> 1024 -> 512
            self.image_head = nn.Sequential(nn.Linear(width, width // 2), nn.GELU(), nn.Linear(width // 2, c.n_joint))
        self.text_head = nn.Linear(c.text.n_embd, c.n_joint, bias=False)
        for layer in [*self.image_head.modules(), self.text_head]:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=layer.in_features ** -0.5)
        # a log, so that the optimiser's equal steps are equal factors and the factor stays positive
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, img, idx, targets=None):
        """img (B, 3, H, W), idx (B, T), pair by pair -> logits (B, B), [i, j] for picture i and sentence j; the loss.

        The loss needs no targets: the partner is known by its place. Of unequal numbers (one picture, many labels) only
        the logits are made and the loss is None.
        """
        if self.training:           # clamp the parameter itself: clamping a copy would also cut its gradient for good
            with torch.no_grad():
                self.logit_scale.clamp_(max=MAX_LOG_SCALE)
        logits = self.logit_scale.exp() * self.encode_image(img) @ self.encode_text(idx).t()     # (B, B)
        return logits, contrastive_loss(logits) if logits.size(0) == logits.size(1) else None

    def encode_image(self, img):
        """img (B, 3, H, W) -> (B, D), of length 1: the class token's last state (or the pooled features), projected."""
        feats = self.vision(img)                                                  # (B, N, C), from a ResNet (B, C)
        if feats.dim() == 3:
            feats = feats[:, 0] if self.config.vision.class_token else feats.mean(dim=1)         # (B, C)
        return F.normalize(self.image_head(feats), dim=-1)                        # (B, D)

    def encode_text(self, idx):
        """idx (B, T) -> (B, D), of length 1: the state at the end-of-text token, which alone has read everything.

        That token is CLIP's largest id, so argmax finds it (the first, where rows are padded with it too). The blocks
        are causal: whatever stands after it changes nothing, and no mask is needed.
        """
        marks = idx if self.config.end_token is None else (idx == self.config.end_token).int()   # (B, T)
        x = self.text.hidden(self.text.wte(idx))                                  # (B, T, C)
        x = x[torch.arange(len(idx), device=idx.device), marks.argmax(dim=1)]     # (B, C)
        return F.normalize(self.text_head(x), dim=-1)                             # (B, D)
