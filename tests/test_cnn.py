"""tinyvlm.cnn: torch's BatchNorm, published sizes; what ResNet and VGG compute is compared in test_pretrained.py."""
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from tinyvlm.cnn import VGG16, BatchNorm2d, ResNet50, ResNetConfig, VGGConfig
from tinyvlm.config import UserError


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("W", [1, 3])
def test_batchnorm_equals_torch(W, training, monkeypatch):
    """Output, gradients and running statistics after three batches; the unbiased running variance shows at n = 12. W =
    3: the way of several processes. Here all three hold copies of one batch, so that a sum over them is three times
    one's own, and torch is given all three copies at once."""
    torch.manual_seed(0)
    for name, answer in {"is_initialized": True, "get_world_size": W}.items():
        monkeypatch.setattr(dist, name, lambda answer=answer: answer)
    monkeypatch.setattr(dist, "all_reduce", lambda t: t.mul_(W))
    ours, theirs = BatchNorm2d(5).double().train(training), torch.nn.BatchNorm2d(5).double().train(training)
    for tensor in (theirs.weight, theirs.bias, theirs.running_mean, theirs.running_var):
        torch.nn.init.uniform_(tensor, 0.5, 2)
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if k != "num_batches_tracked"})
    for _ in range(3):
        x = torch.randn(2, 5, 3, 2, dtype=torch.float64, requires_grad=True)
        ramp = torch.linspace(-1, 2, x.numel(), dtype=x.dtype).view(x.shape)    # a plain sum has zero gradient here
        got, want = ours(x), theirs(x.repeat(W, 1, 1, 1))
        torch.testing.assert_close(got, want[:2])
        a = torch.autograd.grad((got * ramp).sum(), [x, ours.weight, ours.bias])
        b = torch.autograd.grad((want * ramp.repeat(W, 1, 1, 1)).sum(), [x, theirs.weight, theirs.bias])
        torch.testing.assert_close([W * grad for grad in a], list(b))           # one process's share of each gradient
        for name in ("running_mean", "running_var"):
            torch.testing.assert_close(getattr(ours, name), getattr(theirs, name))


def test_vgg_takes_images_of_any_size():
    """At twice the size each of the 7 x 7 places is the mean of 2 x 2; smaller images pass, too. (The numbers themselves
    are held against bare convolutions in test_pretrained.py.)"""
    torch.manual_seed(0)
    model = VGG16(VGGConfig(widths=(4, 6), n_hidden=10, n_class=3)).eval()
    large = torch.randn(1, 3, 56, 56)
    torch.testing.assert_close(model(large), model.pool(F.avg_pool2d(model.grid(large).mT.view(1, 6, 14, 14), 2)))
    assert model(torch.randn(1, 3, 8, 20)).shape == (1, 10)


@pytest.mark.parametrize("model, total, n_feat", [(ResNet50, 25_557_032, 2048), (VGG16, 138_357_544, 4096)])
def test_published_sizes(model, total, n_feat):
    """The totals of torchvision and timm: one bias too many is caught without a download. No memory is used."""
    with torch.device("meta"):
        encoder, img = model().eval(), torch.empty(2, 3, 224, 224)
    assert sum(p.numel() for p in encoder.parameters()) == total
    assert encoder(img).shape == (2, n_feat) and encoder.n_feat == n_feat
    assert encoder.grid(img).shape[:2] == (2, 49) and encoder.classify(img).shape == (2, 1000)
    if model is VGG16:                                                  # the numbers of the public files
        names = [name.split(".") for name, _ in encoder.feature_map.named_parameters()]
        assert [int(k) for k, what in names if what == "weight"] == [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]


def test_a_fresh_block_is_the_identity():
    """bn3 starts at zero, so a block without shortcut gives back its input (which a ReLU has made positive)."""
    model, x = ResNet50(ResNetConfig(width=4, blocks=(2,), n_class=0)).eval(), torch.rand(1, 16, 5, 5)
    torch.testing.assert_close(model.stages[0][1](x), x)
    assert model.head is None and model(torch.rand(1, 3, 32, 32)).shape == (1, model.n_feat)
    with pytest.raises(UserError, match="raise --batch-size"):                    # one value a channel: eval takes it
        model.train()(torch.rand(1, 3, 4, 4))
