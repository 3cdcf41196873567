"""ViT: cut the image into patches, treat them as words, run a transformer.

From "An image is worth 16x16 words" (Dosovitskiy et al. 2020, arXiv:2010.11929); also DeiT and CLIP's vision tower.
The patch projection is a convolution whose stride is its size, P. Its windows do not overlap, so it is the same as
cutting the image into P x P squares, each a row of 3 P^2 numbers, and applying one linear map to every row."""
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
    """log2(P) convolutions that halve the image, easier to train on little data than one large one (Xiao et al. 2021).
    P=16, C=256:  (B, 3, 128, 128) -> (B, 32, 64, 64) -> (B, 64, 32, 32) -> (B, 128, 16, 16) -> (B, 256, 8, 8)"""
    widths = [3] + [min(n_embd, max(32, n_embd >> i)) for i in reversed(range(patch_size.bit_length() - 1))]
    layers = nn.Sequential()
    for c_in, c_out in zip(widths, widths[1:]):
        layers.extend([conv(c_in, c_out, 3, stride=2), BatchNorm2d(c_out), nn.ReLU()])
    return layers.append(nn.Conv2d(widths[-1], n_embd, 1))


def wave_positions(n_side, n_embd, class_token=False):
    """First values of the position table (1, [1 +] n_side^2, C): waves along x and y of ever longer period, as in Beyer
    et al. 2022. From little data a random table does not learn what is left of what; waves know it."""
    quarter = (n_embd + 3) // 4                                                   # sin and cos, of x and of y
    angle = torch.arange(n_side)[:, None] * 1e4 ** -(torch.arange(quarter) / quarter)       # (n_side, C/4)
    wave = torch.cat([angle.sin(), angle.cos()], dim=1)                           # (n_side, C/2)
    grid = torch.cat([wave.repeat(n_side, 1), wave.repeat_interleave(n_side, dim=0)], dim=1)[:, :n_embd]
    return torch.cat([torch.zeros(int(class_token), n_embd), grid])[None]         # x runs fastest: row by row


class ViT(VisionTower):
    """Patches (and a class token), position table, n_layer blocks, a norm; a label head if n_class."""
    def __init__(self, config):
        super().__init__()
        c = self.config = config
        check_sizes(c, activation=ACTIVATIONS, stem=("patch", "conv"))
        if c.image_size % c.patch_size or c.stem == "conv" and c.patch_size.bit_count() > 1:
            raise UserError(f"patch_size {c.patch_size} must divide image_size {c.image_size}; stem conv: a power of 2")
        P = c.patch_size
        self.patch = conv_stem(P, c.n_embd) if c.stem == "conv" else nn.Conv2d(3, c.n_embd, P, P, bias=c.patch_bias)
        self.cls = nn.Parameter(torch.zeros(1, 1, c.n_embd)) if c.class_token else None  # (1, 1, C)
        self.pos = nn.Parameter(wave_positions(c.image_size // c.patch_size, c.n_embd, c.class_token))  # (1, N, C)
        self.ln_pre = nn.LayerNorm(c.n_embd, eps=c.eps) if c.pre_norm else nn.Identity()
        self.drop = nn.Dropout(c.dropout)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.n_layer))           # every patch attends to all
        self.ln_f = nn.LayerNorm(c.n_embd, eps=c.eps)
        self.n_feat, self.head = c.n_embd, nn.Linear(c.n_embd, c.n_class) if c.n_class else None
        init_weights(self, c.n_layer)
        for p in self.patch.parameters():
            if c.stem == "conv" and p.dim() > 1:                # at 0.02 the last one would be faint beside the waves
                nn.init.kaiming_normal_(p, mode="fan_out", nonlinearity="relu")

    def forward(self, img):
        """img (B, 3, H, W) -> feats (B, N, C), final norm applied. N = patches (+ 1, the class token, in front)."""
        return self.ln_f(self.layers(img)[-1])                                    # (B, N, C)
    feature_map = forward

    def layers(self, img):
        """The output of every block, a list of n_layer tensors (B, N, C), none of them through the final norm."""
        (H, W), size = img.shape[2:], self.config.image_size
        assert H == W == size, f"the model takes {size}x{size} pixels, got {H}x{W}"
        x = self.patch(img).flatten(2).transpose(1, 2)                            # (B, C, H/P, W/P) -> (B, patches, C)
        if self.cls is not None:
            x = torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1)            # (B, N, C), N = 1 + patches
        outputs = [self.drop(self.ln_pre(x + self.pos))]                          # (B, N, C)
        for block in self.blocks:
            outputs.append(block(outputs[-1]))                                    # (B, N, C)
        return outputs[1:]

    def grid(self, img):
        return self(img)[:, int(self.config.class_token):]                        # (B, n_patches, C), row by row

    def pool(self, feats):
        return feats[:, 0] if self.config.class_token else feats.mean(dim=1)      # (B, N, C) -> (B, C)


def build_vision(config):
    """A vision tower by the kind of its config: ViTConfig -> ViT, ResNetConfig -> ResNet50."""
    return (ResNet50 if isinstance(config, ResNetConfig) else ViT)(config)
