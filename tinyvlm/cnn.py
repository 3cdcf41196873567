"""Two convolutional image encoders: VGG-16 (Simonyan & Zisserman 2014) and ResNet-50 (He et al. 2015), with BatchNorm.

Both see an image through ever smaller grids of ever more channels, and both answer three questions:

    model(img)             one vector per image: (B, 2048) or (B, 4096)
    model.grid(img)        one vector per place: (B, N, C), the last feature map row by row; N = 7 * 7 at 224 x 224
    model.classify(img)    logits (B, n_class), where the model has a head

VGG is a straight pile of 3x3 convolutions. ResNet lets every block add to its input instead of replacing it, so that
the gradient finds a short way down, and 50 layers train. The ResNet is "v1.5", as torchvision's and NVIDIA's weights:
the halving sits on a block's 3x3 convolution; the paper had it on the 1x1 before, which drops 3 of 4 places unseen.
Left out: other depths of VGG, the two-convolution block of ResNet-18/34, VGG with BatchNorm.
"""
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.nn.functional import all_reduce       # the one with a gradient


class BatchNorm2d(nn.Module):
    """Ioffe & Szegedy 2015: give every channel mean 0 and variance 1, then a learned scale and shift.

    (B, C, H, W) -> same. In training the statistics are the batch's own, and a running average of them is kept; eval
    uses that average, so that an image's features no longer depend on its neighbours. Same numbers as
    torch.nn.BatchNorm2d in both modes; torch's count of batches seen is left out, as nothing here reads it.
    """
    eps, momentum = 1e-5, 0.1           # momentum: the weight of the newest batch in the running average

    def __init__(self, n_channel):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_channel))
        self.bias = nn.Parameter(torch.zeros(n_channel))
        self.register_buffer("running_mean", torch.zeros(n_channel))     # buffers are saved, but not trained
        self.register_buffer("running_var", torch.ones(n_channel))

    def forward(self, x):
        if self.training and dist.is_initialized() and dist.get_world_size() > 1:
            return self.over_all_processes(x)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias,
                            self.training, self.momentum, self.eps)

    def plain(self, x):
        """What the fused call in `forward` computes. The trap: the batch is divided by its biased variance (over n),
        but the running average collects the unbiased one (over n - 1), an estimate for images not seen yet."""
        mean, var = self.running_mean, self.running_var                             # (C,) both
        if self.training:
            mean, var = x.mean(dim=(0, 2, 3)), x.var(dim=(0, 2, 3), unbiased=False)
            n = x.numel() / x.shape[1]
            with torch.no_grad():
                self.running_mean.lerp_(mean, self.momentum)                        # old + 0.1 * (new - old)
                self.running_var.lerp_(var * n / (n - 1), self.momentum)
        scale = self.weight / torch.sqrt(var + self.eps)                            # (C,)
        return x * scale[:, None, None] + (self.bias - mean * scale)[:, None, None]


    def over_all_processes(self, x):
        """The same with the batch spread over several processes: sums are added up among them, gradients too, so that
        N processes train exactly as one would on the whole batch."""
        n = x.numel() / x.shape[1] * dist.get_world_size()
        sums = torch.stack([x.float().sum(dim=(0, 2, 3)), x.float().square().sum(dim=(0, 2, 3))])       # (2, C)
        mean, square = all_reduce(sums) / n                                         # (C,) both
        var = square - mean.square()
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * n / (n - 1), self.momentum)
        scale = self.weight / torch.sqrt(var + self.eps)                            # (C,)
        return x * scale[:, None, None] + (self.bias - mean * scale)[:, None, None]


def conv(n_in, n_out, size, stride=1):
    """A convolution without bias, as the BatchNorm after it would subtract any; padded to keep H, W at stride 1."""
    return nn.Conv2d(n_in, n_out, size, stride, padding=size // 2, bias=False)


class Bottleneck(nn.Module):
    """ResNet's block: 1x1 down to n_mid channels, 3x3 there, where it is cheap, 1x1 up to 4 * n_mid; plus the input.

    (B, n_in, H, W) -> (B, 4 * n_mid, H / stride, W / stride). Where the shape changes, a 1x1 convolution (`shortcut`)
    fits the input to it; elsewhere the input is added as it is.
    """
    expansion = 4

    def __init__(self, n_in, n_mid, stride=1):
        super().__init__()
        n_out = n_mid * self.expansion
        self.conv1, self.bn1 = conv(n_in, n_mid, 1), BatchNorm2d(n_mid)
        self.conv2, self.bn2 = conv(n_mid, n_mid, 3, stride), BatchNorm2d(n_mid)
        self.conv3, self.bn3 = conv(n_mid, n_out, 1), BatchNorm2d(n_out)
        self.shortcut = None
        if stride != 1 or n_in != n_out:
            self.shortcut = nn.Sequential(conv(n_in, n_out, 1, stride), BatchNorm2d(n_out))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))                 # (B, n_mid, H, W)
        y = F.relu(self.bn2(self.conv2(y)))                 # (B, n_mid, H / stride, W / stride)
        y = self.bn3(self.conv3(y))                         # (B, n_out, H / stride, W / stride)
        return F.relu(y + (x if self.shortcut is None else self.shortcut(x)))


def init_like_kaiming(model):
    """He et al. 2015b: weights of variance 2 / fan-in, so that signals keep their size through the ReLUs."""
    for name, p in model.named_parameters():
        if name == "head.weight":
            nn.init.normal_(p, std=0.01)                    # no ReLU follows: begin with nearly equal logits
        elif p.ndim > 1:
            nn.init.kaiming_normal_(p, nonlinearity="relu")
        elif name.endswith((".bias", "bn3.weight")):        # bn3 at zero: each block of the ResNet starts as its
            nn.init.zeros_(p)                               # shortcut alone (Goyal et al. 2017)


class ImageEncoder(nn.Module):
    """What the two encoders share: three answers out of one feature map. They provide `feature_map` and `pool`."""

    def forward(self, img):
        """img (B, 3, H, W), normalised as the checkpoint wants -> one feature vector per image (B, n_feat)."""
        return self.pool(self.feature_map(img))

    def grid(self, img):
        """One vector per place, for soft attention: (B, N, C), places row by row. N = 49 at 224."""
        return self.feature_map(img).flatten(2).transpose(1, 2)     # (B, C, h, w) -> (B, h * w, C)

    def classify(self, img):
        """Logits (B, n_class)."""
        assert self.head is not None, f"this {type(self).__name__} was built without a head (n_class=0): no logits"
        return self.head(self.drop(self(img)))


@dataclass
class ResNetConfig:
    """Sizes of a ResNet; the defaults are ResNet-50."""
    width: int = 64                             # channels after the stem; doubles from stage to stage
    blocks: tuple = (3, 4, 6, 3)                # bottlenecks per stage; (3, 4, 23, 3) would be ResNet-101
    n_class: int = 1000                         # 0: no head


class ResNet50(ImageEncoder):
    """Stem, four stages of bottlenecks, average over all places: 224 -> 56 -> 56, 28, 14, 7 -> a vector (B, 2048)."""

    def __init__(self, config=None):
        super().__init__()
        config = config or ResNetConfig()
        self.conv1, self.bn1 = conv(3, config.width, 7, stride=2), BatchNorm2d(config.width)
        self.stages = nn.ModuleList()
        n_in = config.width
        for s, n_block in enumerate(config.blocks):
            n_mid, stage = config.width * 2 ** s, nn.Sequential()
            for b in range(n_block):                        # the first block of each stage but the first halves H and W
                stage.append(Bottleneck(n_in, n_mid, stride=2 if s > 0 and b == 0 else 1))
                n_in = n_mid * Bottleneck.expansion
            self.stages.append(stage)
        self.n_feat = n_in
        self.drop = nn.Identity()                           # ResNet's head needs no dropout
        self.head = nn.Linear(n_in, config.n_class) if config.n_class else None
        init_like_kaiming(self)

    def feature_map(self, img):
        x = F.relu(self.bn1(self.conv1(img)))               # (B, width, H / 2, W / 2)
        x = F.max_pool2d(x, 3, stride=2, padding=1)         # (B, width, H / 4, W / 4)
        for stage in self.stages:
            x = stage(x)                                    # (B, 4 * width * 2^s, H / (4 * 2^s), W / (4 * 2^s))
        return x                                            # (B, n_feat, H / 32, W / 32)

    def pool(self, x):
        return x.mean(dim=(2, 3))                           # (B, n_feat): any image size will do


@dataclass
class VGGConfig:
    """Sizes of a VGG; the defaults are VGG-16."""
    widths: tuple = (64, 128, 256, 512, 512)    # channels of the five stages, each halving H and W at its end
    convs: tuple = (2, 2, 3, 3, 3)              # 3x3 convolutions per stage: 13, and 3 linear layers make 16
    n_hidden: int = 4096                        # of the two hidden linear layers
    n_class: int = 1000                         # 0: no head
    dropout: float = 0.5                        # after each hidden layer, while training


class VGG16(ImageEncoder):
    """13 convolutions, then an MLP over all of the 7 x 7 places. Nine tenths of the weights sit in that MLP.

    The feature vector (B, 4096) is what remains when the last layer is cut off: fc2 after its ReLU, so never negative.
    """

    def __init__(self, config=None):
        super().__init__()
        config = config or VGGConfig()
        layers, n_in = [], 3
        for n_out, n_conv in zip(config.widths, config.convs, strict=True):
            for _ in range(n_conv):
                layers += [nn.Conv2d(n_in, n_out, 3, padding=1), nn.ReLU(inplace=True)]
                n_in = n_out
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)              # numbered as the public files number them: 0, 2, 5, 7, ...
        self.fc1 = nn.Linear(n_in * 7 * 7, config.n_hidden)
        self.fc2 = nn.Linear(config.n_hidden, config.n_hidden)
        self.drop = nn.Dropout(config.dropout)
        self.n_feat = config.n_hidden
        self.head = nn.Linear(config.n_hidden, config.n_class) if config.n_class else None
        init_like_kaiming(self)

    def feature_map(self, img):
        return self.features(img)                           # (B, 512, H / 32, W / 32)

    def pool(self, x):
        # The MLP has a weight for each of 7 x 7 places: larger maps are averaged down to that, smaller ones repeated.
        x = F.adaptive_avg_pool2d(x, 7).flatten(1)          # (B, 512 * 7 * 7): by channel, then row, then column
        x = self.drop(F.relu(self.fc1(x)))                  # (B, n_hidden)
        return F.relu(self.fc2(x))                          # (B, n_hidden)
