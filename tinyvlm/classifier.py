"""Labels from a picture, several kinds at once: a vision tower and one linear head per category.

The first stage of the TinyVLM recipe: before a vision tower meets words, it learns to tell colours, things and places
apart, from labels that people or CLIP gave (pseudo-labels: "Noisy student", Xie et al. 2020). The heads are thrown away
afterwards, the tower stays: train.py --vision RUN.
"""
from dataclasses import dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F

from .cnn import ResNet50, ResNetConfig
from .gpt import IGNORE
from .vit import ViT, ViTConfig


@dataclass
class ClassifierConfig:
    """The tower's sizes, and the labels of every category: {"color": ["red", ..], "shape": [..]}; label 0 is "red"."""
    vision: ViTConfig | ResNetConfig = field(default_factory=ViTConfig)
    labels: dict = field(default_factory=dict)


class Classifier(nn.Module):
    """One tower, a head per category. An image without a label of some category (IGNORE) teaches that head nothing."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        resnet = isinstance(config.vision, ResNetConfig)
        self.vision = (ResNet50 if resnet else ViT)(config.vision)
        width = self.vision.n_feat if resnet else config.vision.n_embd
        self.heads = nn.ModuleList(nn.Linear(width, len(names)) for names in config.labels.values())  # (n_labels, C)
        for head in self.heads:
            nn.init.normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)

    def forward(self, img, labels, targets=None):
        """img (B, 3, H, W), labels (B, categories) of label numbers -> a list of logits (B, n_labels), and the loss.

        The loss is the mean over categories of each one's cross-entropy (nats). labels[:, k] counts within category k,
        or is IGNORE. targets is not used: labels stand where other models have idx, and are what is to be said.
        """
        feats = self.vision(img)                                                  # (B, N, C), from a ResNet (B, C)
        x = feats.mean(dim=1) if feats.dim() == 3 else feats                      # (B, C)
        logits = [head(x) for head in self.heads]                                 # categories x (B, n_labels)
        # sum / count, as the mean of F.cross_entropy is nan in a batch without any label of a category
        losses = [F.cross_entropy(scores.float(), labels[:, k], ignore_index=IGNORE, reduction="sum") /
                  (labels[:, k] != IGNORE).sum().clamp(min=1) for k, scores in enumerate(logits)]
        return logits, torch.stack(losses).mean()                                 # categories x (B, n_labels), ()

    def parts(self):
        """{"bridge" | "decoder" | "vision": parameters}: the heads are what is new, and nothing here speaks."""
        return {"bridge": list(self.heads.parameters()), "decoder": [], "vision": list(self.vision.parameters())}
