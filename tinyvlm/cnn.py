"""Two convolutional vision towers: VGG-16 (Simonyan & Zisserman 2014) and ResNet-50 (He et al. 2015), with BatchNorm.

VGG is a straight pile of 3x3 convolutions (no dropout: here it only serves frozen). In ResNet every block adds to its
input instead of replacing it, so that the gradient finds a short way down, and 50 layers train. It is "v1.5", as
torchvision's: the halving sits on a block's 3x3 convolution (the paper's 1x1 drops 3 of 4 places unseen)."""
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from .config import UserError


class AllReduce(torch.autograd.Function):
    """dist.all_reduce with a gradient: the sum of x over all processes, and backward the sum of its gradients."""
    @staticmethod
    def forward(ctx, x):
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total
    backward = staticmethod(lambda ctx, grad: AllReduce.apply(grad))


class BatchNorm2d(nn.Module):
    """Ioffe & Szegedy 2015: give every channel mean 0 and variance 1, then a learned scale and shift. Statistics are
    the batch's own in training, and their running average in eval, where no image shall depend on its neighbours."""
    def __init__(self, n_channel):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(n_channel)), nn.Parameter(torch.zeros(n_channel))
        self.register_buffer("running_mean", torch.zeros(n_channel))                # saved, but not trained
        self.register_buffer("running_var", torch.ones(n_channel))

    def forward(self, x):
        world = dist.get_world_size() if self.training and dist.is_initialized() else 1
        n = x.numel() // x.shape[1] * world                                       # values per channel
        if self.training and n == 1:
            raise UserError("BatchNorm cannot train on one value per channel: raise --batch-size, or lower --accum")
        if world == 1:                                      # in one fused call, what follows for several processes
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training)
        y = x.to(self.weight.dtype)                                                 # not in half precision
        mean = AllReduce.apply(y.mean(dim=(0, 2, 3), keepdim=True)) / world         # (1, C, 1, 1)
        var = AllReduce.apply((y - mean).square().mean(dim=(0, 2, 3), keepdim=True)) / world
        self.running_mean.lerp_(mean.detach().flatten(), 0.1)                       # old + 0.1 * (new - old)
        self.running_var.lerp_(var.detach().flatten() * n / (n - 1), 0.1)           # unbiased; the batch's is biased
        y = (y - mean) / torch.sqrt(var + 1e-5)
        return (y * self.weight[:, None, None] + self.bias[:, None, None]).to(x.dtype)


def conv(n_in, n_out, size, stride=1):
    """A convolution without bias, as the BatchNorm after it would subtract any; padded to keep H, W at stride 1."""
    return nn.Conv2d(n_in, n_out, size, stride, padding=size // 2, bias=False)


def init_like_kaiming(model):
    """He et al. 2015b: variance 2 / fan-in keeps the size of signals. bn3 at 0: blocks begin as shortcuts alone."""
    for name, p in model.named_parameters():
        if name == "head.weight":
            nn.init.normal_(p, std=0.01)                    # no ReLU follows: begin with nearly equal logits
        elif p.ndim > 1:
            nn.init.kaiming_normal_(p, nonlinearity="relu")
        elif name.endswith((".bias", "bn3.weight")):
            nn.init.zeros_(p)


class VisionTower(nn.Module):
    """What every tower offers, a ViT too: img (B, 3, H, W) -> one vector, a grid of vectors, logits."""
    def features(self, img):
        return self.pool(self.feature_map(img))             # (B, n_feat)
    forward = features

    def pool(self, x):
        return x.mean(dim=(2, 3))                           # (B, C, h, w) -> (B, C): any image size will do

    def grid(self, img):
        return self.feature_map(img).flatten(2).transpose(1, 2)     # (B, N, C), row by row: N = 7 * 7 at 224 x 224

    def classify(self, img):
        return self.head(self.features(img))                # (B, n_class)


class Bottleneck(nn.Module):
    """ResNet's block: 1x1 down to n_mid channels, 3x3 there, where it is cheap, 1x1 up to n_out; plus the input.
    (B, n_in, H, W) -> (B, n_out, H / stride, W / stride); where that differs, a 1x1 convolution makes the input fit."""
    def __init__(self, n_in, n_mid, n_out, stride=1):
        super().__init__()
        self.conv1, self.bn1 = conv(n_in, n_mid, 1), BatchNorm2d(n_mid)
        self.conv2, self.bn2 = conv(n_mid, n_mid, 3, stride), BatchNorm2d(n_mid)
        self.conv3, self.bn3 = conv(n_mid, n_out, 1), BatchNorm2d(n_out)
        same = stride == 1 and n_in == n_out
        self.shortcut = nn.Identity() if same else nn.Sequential(conv(n_in, n_out, 1, stride), BatchNorm2d(n_out))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))                 # (B, n_mid, H, W)
        y = F.relu(self.bn2(self.conv2(y)))                 # (B, n_mid, H / stride, W / stride)
        return F.relu(self.bn3(self.conv3(y)) + self.shortcut(x))       # (B, n_out, H / stride, W / stride)


@dataclass
class ResNetConfig:
    """Sizes of a ResNet; the defaults are ResNet-50."""
    width: int = 64                             # channels after the stem; doubles from stage to stage
    blocks: tuple = (3, 4, 6, 3)                # bottlenecks per stage
    n_class: int = 1000                         # 0: no head


class ResNet50(VisionTower):
    """Stem, four stages of bottlenecks, average over all places: 224 -> 56 -> 56, 28, 14, 7 -> a vector (B, 2048)."""
    def __init__(self, config=None):
        super().__init__()
        c = self.config = config or ResNetConfig()
        self.conv1, self.bn1 = conv(3, c.width, 7, stride=2), BatchNorm2d(c.width)
        self.stages, n_in = nn.Sequential(), c.width
        for s, n_block in enumerate(c.blocks):              # each stage but the first begins by halving H and W
            n_mid, n_out = c.width * 2 ** s, 4 * c.width * 2 ** s
            sizes = [(n_in, n_mid, n_out, 2 if s else 1)] + [(n_out, n_mid, n_out)] * (n_block - 1)
            self.stages.append(nn.Sequential(*(Bottleneck(*size) for size in sizes)))
            n_in = n_out
        self.n_feat, self.head = n_in, nn.Linear(n_in, c.n_class) if c.n_class else None
        init_like_kaiming(self)

    def feature_map(self, img):
        x = F.relu(self.bn1(self.conv1(img)))               # (B, width, H / 2, W / 2)
        x = F.max_pool2d(x, 3, stride=2, padding=1)         # (B, width, H / 4, W / 4)
        return self.stages(x)                               # (B, n_feat, H / 32, W / 32)


@dataclass
class VGGConfig:
    """Sizes of a VGG; the defaults are VGG-16."""
    widths: tuple = (64, 128, 256, 512, 512)    # channels of the stages, each halving H and W at its end
    n_hidden: int = 4096                        # of the two hidden linear layers
    n_class: int = 1000                         # 0: no head


class VGG16(VisionTower):
    """13 convolutions, then an MLP over the 7 x 7 places: 16 layers. The features are fc2's, after its ReLU."""
    def __init__(self, config=None):
        super().__init__()
        c = self.config = config or VGGConfig()
        self.feature_map, n_in = nn.Sequential(), 3         # (B, 3, H, W) -> (B, 512, H / 32, W / 32)
        for n_out, n_conv in zip(c.widths, (2, 2, 3, 3, 3)):
            for _ in range(n_conv):                         # numbered as the public files number them: 0, 2, 5, 7, ..
                self.feature_map.extend([nn.Conv2d(n_in, n_out, 3, padding=1), nn.ReLU(inplace=True)])
                n_in = n_out
            self.feature_map.append(nn.MaxPool2d(2))
        self.fc1, self.fc2 = nn.Linear(n_in * 7 * 7, c.n_hidden), nn.Linear(c.n_hidden, c.n_hidden)
        self.n_feat, self.head = c.n_hidden, nn.Linear(c.n_hidden, c.n_class) if c.n_class else None
        init_like_kaiming(self)

    def pool(self, x):
        x = F.adaptive_avg_pool2d(x, 7).flatten(1)          # (B, 512 * 7 * 7): larger maps averaged, smaller repeated
        return F.relu(self.fc2(F.relu(self.fc1(x))))        # (B, n_hidden)
