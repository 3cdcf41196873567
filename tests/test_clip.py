"""tinyvlm.clip: the published size, the loss by arithmetic, and what the two towers must not depend on; and that a
batch in chunks, or over several processes, is the same batch."""
import math
from datetime import timedelta
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from tinyvlm.clip import (CLIP, MAX_LOG_SCALE, CLIPConfig, chance, contrastive_loss, contrastive_step,
                          in_batch_accuracy, info_nce, text_config, vision_config)
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
    assert loss == pytest.approx(chance(128)) == pytest.approx(4.852, abs=1e-3)


def test_in_batch_accuracy_by_hand():
    """Pictures 0 and 2 find their sentence, sentence 2 alone finds its picture. A constant model: 1 / B."""
    logits = torch.tensor([[5.0, 1.0, 0.0], [6.0, 2.0, 1.0], [0.0, 3.0, 4.0]])
    assert in_batch_accuracy(logits) == pytest.approx((2 / 3 + 1 / 3) / 2)
    assert in_batch_accuracy(torch.zeros(8, 8)) == pytest.approx(1 / 8)


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
    """The text is read off at config.end_token: what follows it, here a larger id, changes nothing."""
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


# ----- ready-made features and text embeddings -----

def features_only(**more):
    """No tower at all: image features of 6 numbers against text embeddings of 8."""
    return tiny(**{"vision": None, "text": None, "feat_dim": 6, **more})


def test_ready_made_features_and_text_embeddings():
    """Only the head and the temperature learn, and the head's shape is the published one: width, width / 2, D."""
    model = features_only(head="mlp")
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == {
        "logit_scale": (), "image_head.0.weight": (3, 6), "image_head.0.bias": (3,), "image_head.2.weight": (8, 3),
        "image_head.2.bias": (8,)}
    assert features_only(head="mlp", n_hidden=5).image_head[2].in_features == 5
    feats, text_emb = torch.randn(4, 6), torch.randn(4, 8)
    loss = model(feats, text_emb.half())[1]
    want = torch.nn.functional.normalize(text_emb.half().float(), dim=-1)       # in float32, not in float16
    torch.testing.assert_close(loss, info_nce(model.encode_image(feats), want, model.logit_scale))
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())


def test_a_frozen_towers_features_give_the_same_embeddings():
    """Features cached from a tower, and the head alone, must be what the whole model says."""
    model, img = tiny(vision=ResNetConfig(width=4, blocks=(1, 1), n_class=0)).eval(), torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model.encode_image(model.vision(img)), model.encode_image(img))


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_head_dropout_is_for_training_only(head):
    model, feats = features_only(head=head, dropout=0.5), torch.randn(64, 6)
    assert (model.train().encode_image(feats) - model.encode_image(feats)).abs().max() > 0.1
    assert torch.equal(model.eval().encode_image(feats), model.encode_image(feats))


def test_a_missing_tower_is_named():
    for call, words in ((lambda: features_only(feat_dim=None), "feat_dim"),
                        (lambda: features_only().encode_image(torch.randn(2, 3, 16, 16)), "no vision tower"),
                        (lambda: features_only().encode_text(torch.ones(2, 4, dtype=torch.long)), "no text tower")):
        with pytest.raises(AssertionError, match=words):
            call()


def test_similarities_are_exact_under_autocast():
    """With bfloat16 products a logit near 100 would be off by up to 1/4: the loss must not depend on it."""
    model, feats, text_emb = features_only().eval(), torch.randn(16, 6), torch.randn(16, 8)
    model.logit_scale.data.fill_(MAX_LOG_SCALE)
    with torch.autocast("cpu", torch.bfloat16):
        image_emb, text_emb, scale = model(feats, text_emb, embed=True)
        logits = model(feats, text_emb)[0]
    torch.testing.assert_close(logits, scale.exp() * image_emb @ text_emb.t())


# ----- the same batch in chunks, or over processes -----

def batch_norm_clip(dropout=0.0):
    """Both towers, a vision tower with BatchNorm, dropout before each layer of the head."""
    model = tiny(vision=ResNetConfig(width=4, blocks=(1, 1), n_class=0), head="mlp", dropout=dropout).train()
    model.logit_scale.data.fill_(5.0)                           # above the cap, which must not cut its gradient
    return model


def pairs(n, size=32):
    torch.manual_seed(1)
    return torch.randn(n, 3, size, size), torch.randint(0, END, (n, 6))


def grads(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def plain_step(model, chunks):
    """All chunks with their graphs kept, one loss over all of them: what contrastive_step must equal."""
    parts = [model(*(chunk() if callable(chunk) else chunk), embed=True) for chunk in chunks]
    loss = info_nce(*(torch.cat([part[i] for part in parts]) for i in (0, 1)), model.logit_scale)
    loss.backward()
    return loss.item()


def same(a, b, tolerance=1e-6):
    """Every gradient (or buffer) of one model is the other's, relative to the largest of its tensor."""
    assert a.keys() == b.keys() and a
    for name in a:
        assert (a[name] - b[name]).abs().max() <= tolerance * max(1, b[name].abs().max().item()), name


@pytest.mark.parametrize("sizes", [[5], [2, 3], [1, 1, 3]])
def test_a_batch_in_chunks_is_the_whole_batch(sizes):
    """Loss, gradients, BatchNorm's statistics and the random numbers afterwards, with dropout on. Each chunk may also
    be a function, whose own random numbers (an augmentation) must come out the same in both passes."""
    whole, chunked = batch_norm_clip(0.5), batch_norm_clip(0.5)
    calls = []

    def noisy(img, idx):
        calls.append(1)
        return img + torch.randn_like(img), idx
    chunks = [partial(noisy, *chunk) for chunk in zip(*(t.split(sizes) for t in pairs(sum(sizes), size=16)))]
    torch.manual_seed(2)
    want, after, calls[:] = plain_step(whole, chunks), torch.rand(1), []
    torch.manual_seed(2)
    got = contrastive_step(chunked, chunks)
    assert got.item() == pytest.approx(want, abs=1e-6) and not got.requires_grad
    assert torch.rand(1) == after and len(calls) == (1 if len(sizes) == 1 else 2 * len(sizes))
    same(grads(chunked), grads(whole))
    same(dict(chunked.named_buffers()), dict(whole.named_buffers()))
    assert chunked.logit_scale.grad != 0


def test_a_new_class_token_does_not_drown_the_gradient():
    """Class token and its position both start at 0 in a ViT; through CLIP's norm in front, the gradient of an all-zero
    row grows by 1 / sqrt(eps) = 316, and clipping to norm 1 would leave nothing of all the other weights'."""
    model = tiny()
    model(*pairs(4, size=16))[1].backward()
    norms = {name: g.norm().item() for name, g in grads(model).items()}
    assert norms["vision.cls"] < 10 * max(norm for name, norm in norms.items() if name.startswith("vision.blocks"))


def test_one_chunk_is_the_plain_forward():
    """Without any cutting up, the chunked step is the ordinary one, batch norm included."""
    one, other, chunk = batch_norm_clip(), batch_norm_clip(), pairs(4)
    loss = other(*chunk)[1]
    loss.backward()
    assert contrastive_step(one, [chunk]) == loss
    same(grads(one), grads(other))


def test_chunks_need_less_memory_than_the_batch():
    """What a graph keeps at once is one chunk's: the largest number of rows alive with a graph is the chunk's."""
    model, alive = batch_norm_clip(), []
    model.image_head.register_forward_hook(lambda m, args, y: alive.append(y.requires_grad and len(y)))
    img, idx = pairs(8, size=16)
    contrastive_step(model, list(zip(img.split(2), idx.split(2))))
    assert alive == [False] * 4 + [2] * 4, "first without graphs, then one chunk at a time"


def test_frozen_parts_and_ready_made_sides_in_chunks():
    """A frozen text tower, cached embeddings, a frozen temperature: what has no gradient is left out, not an error."""
    img, idx = pairs(4, size=16)
    for freeze in (["text"], ["image_head", "vision", "drop"], ["logit_scale", "vision"]):
        whole, chunked = batch_norm_clip(), batch_norm_clip()
        for model in (whole, chunked):
            for name, p in model.named_parameters():
                p.requires_grad_(not name.startswith(tuple(freeze)))
        chunks = list(zip(img.split(2), idx.split(2)))
        assert plain_step(whole, chunks) == pytest.approx(contrastive_step(chunked, chunks).item(), abs=1e-6)
        same(grads(chunked), grads(whole))
    feats, text_emb = torch.randn(4, 6), torch.randn(4, 8)
    whole, chunked = features_only(), features_only()
    chunks = list(zip(feats.split(2), text_emb.split(2)))
    assert plain_step(whole, chunks) == pytest.approx(contrastive_step(chunked, chunks).item(), abs=1e-6)
    same(grads(chunked), grads(whole))


def test_chunks_with_autocast_and_a_loss_scale():
    """A GradScaler's factor reaches every gradient exactly once (a power of two: nothing is rounded)."""
    plain, scaled, (img, idx) = batch_norm_clip(), batch_norm_clip(), pairs(4, size=16)
    chunks = list(zip(img.split(2), idx.split(2)))

    def autocast():
        return torch.autocast("cpu", torch.bfloat16)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    assert contrastive_step(plain, chunks, autocast) == contrastive_step(scaled, chunks, autocast, scaler.scale)
    same({name: g / 1024 for name, g in grads(scaled).items()}, grads(plain), 1e-2)       # bfloat16 keeps three digits
    torch.testing.assert_close(scaled.logit_scale.grad / 1024, plain.logit_scale.grad)


def two_ways(img, idx, text_emb, parts, wrap=lambda model: model):
    """{name: (loss, gradients)} of the global loss: in one piece, in chunks (rows `parts`), without a text tower."""
    results = {}
    for name in ("forward", "one chunk", "chunks", "cached text"):
        model = tiny(**({"text": None} if name == "cached text" else {})).train()
        right = text_emb if name == "cached text" else idx
        chunks = [(img[rows], right[rows]) for rows in parts] if name in ("chunks", "cached text") else [(img, right)]
        fast = wrap(model)                                      # kept in a variable: without DDP no exchange happens
        loss = fast(img, idx)[1] if name == "forward" else contrastive_step(fast, chunks)
        if name == "forward":
            loss.backward()
        results[name] = loss.item(), grads(model)
    return results


def process(rank, folder, inputs):
    """What each of two processes does: its half of the batch, in two chunks of two."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2,
                            timeout=timedelta(seconds=60))
    try:
        inputs = [t[4 * rank:4 * rank + 4] for t in inputs]
        torch.save(two_ways(*inputs, [[0, 1], [2, 3]], DistributedDataParallel), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_two_processes_are_one(tmp_path):
    """Loss and gradients with DistributedDataParallel are those of one process with the whole batch. Without `gather`,
    or with a gradient scaled by the number of processes, they differ by far more than the 1e-5 allowed here."""
    inputs = [*pairs(8, size=16), torch.randn(8, 8)]
    other = torch.multiprocessing.get_context("spawn").Process(target=process, args=(1, tmp_path, inputs))
    other.start()
    process(0, tmp_path, inputs)                                # this process is the first of the two
    other.join(60)
    assert other.exitcode == 0
    want = two_ways(*inputs, [[0, 1, 4, 5], [2, 3, 6, 7]])
    for rank in (0, 1):
        got = torch.load(tmp_path / f"{rank}.pt")
        for name, (loss, gradients) in want.items():
            assert got[name][0] == pytest.approx(loss, abs=1e-5), f"{name}: loss"
            same(got[name][1], gradients, 1e-5)
