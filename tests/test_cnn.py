"""tinyvlm.cnn: torch's BatchNorm, transformers' ResNet (a stored reference), bare F.conv2d, published sizes."""
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tinyvlm.cnn import BatchNorm2d, Bottleneck, ResNet50, ResNetConfig, VGG16, VGGConfig

TINY_VGG = VGGConfig(widths=(4, 6), convs=(1, 2), n_hidden=10, n_class=3)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("way", ["forward", "plain"])
def test_batchnorm_equals_torch(way, training):
    """Output, gradients and running statistics after three batches; the unbiased running variance shows at n = 12."""
    torch.manual_seed(0)
    ours, theirs = BatchNorm2d(5).double().train(training), torch.nn.BatchNorm2d(5).double().train(training)
    for tensor in (theirs.weight, theirs.bias, theirs.running_mean, theirs.running_var):
        torch.nn.init.uniform_(tensor, 0.5, 2)
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if k != "num_batches_tracked"})
    for _ in range(3):
        x = torch.randn(2, 5, 3, 2, dtype=torch.float64, requires_grad=True)
        ramp = torch.linspace(-1, 2, x.numel(), dtype=x.dtype).view(x.shape)    # a plain sum has zero gradient here
        got, want = getattr(ours, way)(x), theirs(x)
        torch.testing.assert_close(got, want)
        for a, b in zip(*(torch.autograd.grad((y * ramp).sum(), [x, m.weight, m.bias])
                          for y, m in ((got, ours), (want, theirs)))):
            torch.testing.assert_close(a, b)
        for name in ("running_mean", "running_var"):
            torch.testing.assert_close(getattr(ours, name), getattr(theirs, name))


def test_batchnorm_by_arithmetic():
    """The channel 1, 3 has mean 2, biased variance 1, unbiased 2: out -1, 1; running 0.1 * 2 and 0.9 + 0.1 * 2."""
    norm = BatchNorm2d(1)
    out = norm(torch.tensor([1.0, 3.0]).view(2, 1, 1, 1))
    torch.testing.assert_close(out.flatten(), torch.tensor([-1.0, 1.0]), atol=1e-5, rtol=0)
    assert norm.running_mean.item() == pytest.approx(0.2) and norm.running_var.item() == pytest.approx(1.1)


def reference_resnet():
    """The stored ResNet of transformers in our class; its names, stage by stage, in ours."""
    arrays = {k: torch.from_numpy(v) for k, v in np.load(Path(__file__).with_name("reference_resnet.npz")).items()}
    model = ResNet50(ResNetConfig(width=2, blocks=(1, 2, 2), n_class=5))
    state = {}
    for name, tensor in arrays.items():
        if not name.startswith("weights/"):
            continue
        name = name.removeprefix("weights/").replace("resnet.embedder.embedder.convolution", "conv1")
        name = name.replace("resnet.embedder.embedder.normalization", "bn1").replace("classifier.1", "head")
        name = name.replace("resnet.encoder.", "").replace(".layers.", ".")
        for k in range(3):
            name = name.replace(f"layer.{k}.convolution", f"conv{k + 1}")
            name = name.replace(f"layer.{k}.normalization", f"bn{k + 1}")
        name = name.replace("shortcut.convolution", "shortcut.0").replace("shortcut.normalization", "shortcut.1")
        state[name] = tensor
    model.load_state_dict(state)
    return model.eval(), arrays


def test_resnet_equals_transformers():
    """Every part at once, on random statistics and an odd image height: stride on the 3x3, shortcuts, pooling, head."""
    model, reference = reference_resnet()
    with torch.no_grad():
        for call, name in ((model.grid, "grid"), (model, "feats"), (model.classify, "logits")):
            torch.testing.assert_close(call(reference["img"]), reference[name], rtol=1e-4, atol=1e-5)


def test_eval_features_do_not_depend_on_the_neighbours():
    """Eval reads the running statistics; in training each image leaks into the others' features."""
    model, reference = reference_resnet()
    img = reference["img"]
    torch.testing.assert_close(model(img)[:1], model(img[:1]))
    model.train()
    assert not torch.allclose(model(img)[:1], model(img[:1]), atol=1e-3)


def test_vgg_equals_bare_convolutions():
    """conv-ReLU, pool, conv-ReLU twice, pool, then the MLP: features stop after fc2's ReLU, so none is negative."""
    torch.manual_seed(0)
    model = VGG16(TINY_VGG).eval()
    w = {name: torch.nn.init.normal_(p.data, std=0.3) for name, p in model.named_parameters()}
    img = torch.randn(2, 3, 28, 28)

    def layer(x, k):
        return F.conv2d(x, w[f"features.{k}.weight"], w[f"features.{k}.bias"], padding=1).clamp(min=0)

    x = F.max_pool2d(layer(img, 0), 2)
    x = F.max_pool2d(layer(layer(x, 3), 5), 2)                          # (2, 6, 7, 7): no averaging at this size
    hidden = (x.reshape(2, -1) @ w["fc1.weight"].T + w["fc1.bias"]).clamp(min=0)
    feats = (hidden @ w["fc2.weight"].T + w["fc2.bias"]).clamp(min=0)
    assert feats.min() == 0 < feats.max()                               # the ReLU did act
    torch.testing.assert_close(model(img), feats)
    torch.testing.assert_close(model.classify(img), feats @ w["head.weight"].T + w["head.bias"])
    torch.testing.assert_close(model.grid(img), x.flatten(2).mT)


def test_vgg_averages_larger_maps_to_7x7():
    """At twice the size each of the 7 x 7 places is the mean of 2 x 2."""
    torch.manual_seed(0)
    model = VGG16(TINY_VGG).eval()
    img = torch.randn(1, 3, 56, 56)
    grid = model.grid(img).mT.view(1, 6, 14, 14)
    torch.testing.assert_close(model(img), model.pool(F.avg_pool2d(grid, 2)))
    assert model(torch.randn(1, 3, 8, 20)).shape == (1, 10)             # smaller and oblong images pass too


def test_grid_is_row_by_row():
    """Token 1 is the place right of token 0: a bright pixel there lights up that token only."""
    model = VGG16(VGGConfig(widths=(1,), convs=(1,), n_hidden=4, n_class=0)).eval()
    with torch.no_grad():
        model.features[0].weight.zero_()[:, :, 1, 1] = 1.0              # copy the pixel
    img = torch.zeros(1, 3, 6, 8)
    img[:, :, 0, 2] = 1.0                                               # row 0, column 2 -> place (0, 1) of 3 x 4
    assert model.grid(img).flatten().nonzero().flatten().tolist() == [1]


@pytest.mark.parametrize("model, total, n_feat", [(ResNet50, 25_557_032, 2048), (VGG16, 138_357_544, 4096)])
def test_published_sizes(model, total, n_feat):
    """The totals of torchvision and timm: one bias too many is caught without a download. No memory is used."""
    with torch.device("meta"):
        encoder = model().eval()
        img = torch.empty(2, 3, 224, 224)
    assert sum(p.numel() for p in encoder.parameters()) == total
    assert encoder(img).shape == (2, n_feat) and encoder.n_feat == n_feat
    assert encoder.grid(img).shape[:2] == (2, 49)
    assert encoder.classify(img).shape == (2, 1000)


def test_vgg_layer_numbers_are_the_public_ones():
    with torch.device("meta"):
        names = [name for name, _ in VGG16().features.named_parameters() if name.endswith("weight")]
    assert [int(n.split(".")[0]) for n in names] == [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]


def test_a_fresh_block_is_the_identity():
    """bn3 starts at zero, so a block without shortcut gives back its input (which a ReLU has made positive)."""
    model = ResNet50(ResNetConfig(width=4, blocks=(2,), n_class=0)).eval()
    block = model.stages[0][1]
    assert isinstance(block, Bottleneck) and block.shortcut is None
    x = torch.rand(1, 16, 5, 5)
    torch.testing.assert_close(block(x), x)


@pytest.mark.parametrize("kind, config", [(ResNet50, ResNetConfig(4, (1,), 0)), (VGG16, VGGConfig((4,), (1,), 8, 0))])
def test_without_head_classify_says_so(kind, config):
    model = kind(config)
    img = torch.zeros(2, 3, 32, 32)
    assert model(img).shape == (2, model.n_feat)
    with pytest.raises(AssertionError, match="n_class=0"):
        model.classify(img)


def test_both_learn():
    """A few steps in training mode drive the loss down: gradients reach the stem through blocks that start at zero."""
    torch.manual_seed(0)
    img, label = torch.randn(8, 3, 32, 32), torch.tensor([0, 1] * 4)
    vgg = VGG16(VGGConfig((8, 8), (1, 1), 32, n_class=2, dropout=0.0))
    for model, lr in ((ResNet50(ResNetConfig(4, (1, 1), n_class=2)), 0.02), (vgg, 0.01)):
        optimizer = torch.optim.Adam(model.parameters(), lr)
        losses = []
        for _ in range(20):
            loss = F.cross_entropy(model.classify(img), label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.5 * losses[0], f"{type(model).__name__}: loss went {losses[0]:.3f} -> {losses[-1]:.3f}"
