"""ViT: cut the image into patches, treat them as words, run a transformer.

From "An image is worth 16x16 words" (Dosovitskiy et al. 2020, arXiv:2010.11929). Covers the plain ViT and DeiT, CLIP's
vision tower (a norm before the blocks, no patch bias) and, for training from scratch on little data, a convolutional
stem in place of the patch projection ("Early convolutions help transformers see better", Xiao et al. 2021).

The patch projection is a convolution whose stride is its size, P. Its windows do not overlap, so it is the same as
cutting the image into P x P squares, each a row of 3 P^2 numbers, and applying one linear map to every row.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn

from .cnn import BatchNorm2d, ResNet50, ResNetConfig, VisionTower, conv
from .config import UserError, check_sizes
from .transformer import ACTIVATIONS, Block, init_weights


@dataclass
class ViTConfig:
    """Sizes and switches of a ViT; the defaults are ViT-B/16."""
    image_size: int = 224       # H = W, pixels
    patch_size: int = 16        # P, pixels
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768           # C
    n_hidden: int | None = None # width inside the MLP; None: 4 C
    n_class: int = 0            # rows of the label head; 0: no head
    dropout: float = 0.0
    activation: str = "gelu"    # a key of transformer.ACTIVATIONS
    eps: float = 1e-6
    class_token: bool = True    # one extra token, in front, that stands for the whole image
    pre_norm: bool = False      # CLIP: a norm before the first block
    patch_bias: bool = True     # CLIP: False
    stem: str = "patch"         # "patch": one P x P projection; "conv": log2(P) small strided convolutions

    @property
    def n_patches(self):
        return (self.image_size // self.patch_size) ** 2        # 196 for 16-pixel patches of 224 pixels


def conv_stem(patch_size, n_embd):
    """Halve the image log2(P) times with 3x3 convolutions; channels, from the end: C, C/2, C/4, .. but 32 at least.
    P=16, C=256:  (B, 3, 128, 128) -> (B, 32, 64, 64) -> (B, 64, 32, 32) -> (B, 128, 16, 16) -> (B, 256, 8, 8)"""
    layers, c_in = [], 3
    for i in reversed(range(patch_size.bit_length() - 1)):
        c_out = min(n_embd, max(32, n_embd >> i))
        layers += [conv(c_in, c_out, 3, stride=2), BatchNorm2d(c_out), nn.ReLU()]
        c_in = c_out
    return nn.Sequential(*layers, nn.Conv2d(c_in, n_embd, 1))


def wave_positions(n_side, n_embd, class_token=False):
    """First values of the position table (1, [1 +] n_side^2, C): waves along x and y of ever longer period. From little
    data a table of random numbers does not learn what is left of what; waves know it ("Better plain ViT baselines",
    Beyer et al. 2022, keeps them fixed; here they are trained on)."""
    quarter = math.ceil(n_embd / 4)                                               # sin and cos, of x and of y
    rates = 1e4 ** -(torch.arange(quarter) / quarter)                             # (C/4,) from 1 towards 1/10000
    angle = torch.arange(n_side)[:, None] * rates                                 # (n_side, C/4)
    wave = torch.cat([angle.sin(), angle.cos()], dim=1)                           # (n_side, C/2)
    x, y = wave[None].expand(n_side, -1, -1), wave[:, None].expand(-1, n_side, -1)       # row y, column x
    grid = torch.cat([x, y], dim=2).flatten(0, 1)[:, :n_embd]                     # (n_side^2, C)
    return torch.cat([torch.zeros(int(class_token), n_embd), grid])[None]


class ViT(VisionTower):
    """Patches (and a class token), position table, n_layer blocks, a norm; a label head if n_class."""
    def __init__(self, config):
        super().__init__()
        c = self.config = config
        check_sizes(c, activation=ACTIVATIONS, stem=("patch", "conv"))
        if c.image_size % c.patch_size or c.stem == "conv" and c.patch_size.bit_count() > 1:
            raise UserError(f"patch_size {c.patch_size} must divide image_size {c.image_size}, and be a power of 2 for "
                            "a conv stem, which halves the image again and again")
        self.n_feat = c.n_embd
        self.patch = (conv_stem(c.patch_size, c.n_embd) if c.stem == "conv" else
                      nn.Conv2d(3, c.n_embd, c.patch_size, stride=c.patch_size, bias=c.patch_bias))
        self.cls = nn.Parameter(torch.zeros(1, 1, c.n_embd)) if c.class_token else None
        self.pos = nn.Parameter(wave_positions(c.image_size // c.patch_size, c.n_embd, c.class_token))
        self.ln_pre = nn.LayerNorm(c.n_embd, eps=c.eps) if c.pre_norm else nn.Identity()
        self.drop = nn.Dropout(c.dropout)
        self.blocks = nn.ModuleList(Block(c.n_embd, c.n_head, activation=c.activation, eps=c.eps, dropout=c.dropout,
                                          n_hidden=c.n_hidden) for _ in range(c.n_layer))
        self.ln_f = nn.LayerNorm(c.n_embd, eps=c.eps)
        self.head = nn.Linear(c.n_embd, c.n_class) if c.n_class else None
        init_weights(self, c.n_layer)
        for m in self.patch if c.stem == "conv" else ():        # at 0.02 the last one would be faint beside the waves
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, img):
        """img (B, 3, H, W) -> feats (B, N, C), final norm applied. N = patches (+ 1, the class token, in front)."""
        return self.ln_f(self.layers(img)[-1])                                    # (B, N, C)
    feature_map = forward

    def layers(self, img):
        """The output of every block, a list of n_layer tensors (B, N, C), none of them through the final norm."""
        (B, _, H, W), size = img.shape, self.config.image_size
        assert H == W == size, f"the model takes {size}x{size} pixels, got {H}x{W}"
        x = self.patch(img).flatten(2).transpose(1, 2)                            # (B, C, H/P, W/P) -> (B, patches, C)
        if self.cls is not None:
            x = torch.cat([self.cls.expand(B, -1, -1), x], dim=1)                 # (B, N, C), N = 1 + patches
        outputs = [self.drop(self.ln_pre(x + self.pos))]                          # (B, N, C)
        for block in self.blocks:
            outputs.append(block(outputs[-1]))                                    # (B, N, C)
        return outputs[1:]

    def grid(self, img):
        """img (B, 3, H, W) -> the patches alone, row by row, without the class token: (B, n_patches, C)."""
        return self(img)[:, int(self.config.class_token):]

    def pool(self, feats):
        """feats (B, N, C) -> one vector per image (B, C): the class token if there is one, else the patches' mean."""
        return feats[:, 0] if self.config.class_token else feats.mean(dim=1)


def build_vision(config):
    """A vision tower by the kind of its config: ViTConfig -> ViT, ResNetConfig -> ResNet50."""
    return (ResNet50 if isinstance(config, ResNetConfig) else ViT)(config)
