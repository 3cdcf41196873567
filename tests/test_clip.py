"""tinyvlm.clip: the published size, the loss by arithmetic, and what the two towers must not depend on."""
import math

import pytest
import torch

from tinyvlm.clip import CLIP, MAX_LOG_SCALE, CLIPConfig, contrastive_loss, info_nce, text_config, vision_config
from tinyvlm.cnn import ResNetConfig

END = 39


def tiny(**more):
    torch.manual_seed(0)
    vision = vision_config(image_size=16, patch_size=8, n_layer=2, n_head=2, n_embd=12)
    text = text_config(vocab_size=END + 1, block_size=10, n_layer=2, n_head=2, n_embd=16)
    return CLIP(CLIPConfig(**{"vision": vision, "text": text, "n_joint": 8, **more}))


def test_published_parameter_count():
    with torch.device("meta"):
        assert sum(p.numel() for p in CLIP(CLIPConfig()).parameters()) == 151_277_313


def test_the_temperature_starts_at_007():
    assert tiny().logit_scale.item() == pytest.approx(math.log(1 / 0.07)) == pytest.approx(2.6593, abs=1e-4)


def test_loss_of_a_model_that_knows_nothing_is_ln_batch():
    same = torch.nn.functional.normalize(torch.ones(128, 8), dim=-1)
    loss = info_nce(same, same, torch.tensor(1.0)).item()
    assert loss == pytest.approx(math.log(128)) == pytest.approx(4.852, abs=1e-3)


def test_loss_by_arithmetic():
    """Logits [[2, 0], [1, 0]]: rows cost ln(1 + e^-2) and ln(1 + e^1), columns ln(1 + e^-1) and ln(1 + e^0)."""
    want = sum(math.log(1 + math.exp(d)) for d in (-2, 1, -1, 0)) / 4
    assert contrastive_loss(torch.tensor([[2.0, 0.0], [1.0, 0.0]])).item() == pytest.approx(want)


def test_info_nce_is_symmetric_and_its_scale_a_log_capped_at_100():
    torch.manual_seed(0)
    a, b = (torch.nn.functional.normalize(torch.randn(4, 8), dim=-1) for _ in range(2))
    torch.testing.assert_close(info_nce(a, b, torch.tensor(2.0)), info_nce(b, a, torch.tensor(2.0)))
    torch.testing.assert_close(info_nce(a, b, torch.tensor(2.0)), contrastive_loss(math.exp(2) * a @ b.t()))
    torch.testing.assert_close(info_nce(a, b, torch.tensor(9.0)), contrastive_loss(100 * a @ b.t()))


def test_training_clamps_the_scale_and_can_leave_the_cap_again():
    """Clamping inside the graph would zero the gradient above the cap: the temperature would be stuck for good."""
    model = tiny().train()
    model.logit_scale.data.fill_(6.0)
    model(torch.randn(3, 3, 16, 16), torch.randint(0, END, (3, 6)))[1].backward()
    assert model.logit_scale.item() == pytest.approx(MAX_LOG_SCALE) and model.logit_scale.grad.abs() > 0


def test_forward_is_the_loss_of_the_embeddings():
    model, img, idx = tiny(), torch.randn(3, 3, 16, 16), torch.randint(0, END, (3, 6))
    logits, loss = model(img, idx)
    assert logits.shape == (3, 3)
    torch.testing.assert_close(loss, info_nce(model.encode_image(img), model.encode_text(idx), model.logit_scale))
    logits, loss = model(img[:1], idx)                          # one picture, three labels
    assert logits.shape == (1, 3) and loss is None


def test_embeddings_have_length_one():
    model = tiny()
    for emb in (model.encode_image(torch.randn(3, 3, 16, 16)), model.encode_text(torch.randint(0, END, (3, 6)))):
        torch.testing.assert_close(emb.norm(dim=-1), torch.ones(3))


@pytest.mark.parametrize("end_token", [None, END])
def test_text_is_read_at_its_end_and_padding_changes_nothing(end_token):
    model = tiny(end_token=end_token)
    row = torch.tensor([[1, 5, 7, END]])
    want = model.encode_text(row)
    for pad in (0, END):
        padded = torch.nn.functional.pad(row, (0, 4), value=pad)
        torch.testing.assert_close(model.encode_text(padded), want)
    assert (model.encode_text(torch.tensor([[2, 5, 7, END]])) - want).abs().max() > 1e-3      # the first word is heard


def test_an_end_token_that_is_not_the_largest_id():
    model = tiny(end_token=4)
    row, longer = torch.tensor([[1, 5, 4]]), torch.tensor([[1, 5, 4, END]])
    torch.testing.assert_close(model.encode_text(row), model.encode_text(longer))


def test_resnet_with_the_two_layer_head_learns_pairs():
    """The image side of the CLIP system: ResNet features, a GELU head; a few steps on one batch must fit it."""
    model = tiny(vision=ResNetConfig(width=4, blocks=(1, 1), n_class=0), head="mlp")
    assert [tuple(p.shape) for p in model.image_head.parameters()] == [(16, 32), (16,), (8, 16), (8,)]
    img, idx = torch.randn(4, 3, 32, 32), torch.randint(0, END, (4, 6))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(15):
        loss = model(img, idx)[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
