"""tinyvlm.clip: size, loss by arithmetic, where a text is read; a batch in chunks, or over processes, is the same."""
import math
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import normalize, pad
from torch.nn.parallel import DistributedDataParallel

from tinyvlm.clip import (CLIP, MAX_LOG_SCALE, TEXT, VISION, CLIPConfig, chance, contrastive_step, info_nce,
                          similarities)
from tinyvlm.cnn import ResNetConfig
from tinyvlm.config import UserError
from tinyvlm.gpt import GPTConfig
from tinyvlm.vit import ViTConfig

END = 39
RESNET = ResNetConfig(width=4, blocks=(1, 1), n_class=0)


def tiny(**more):
    torch.manual_seed(0)
    vision = ViTConfig(**{**VISION, "image_size": 16, "patch_size": 8, "n_layer": 2, "n_head": 2, "n_embd": 12})
    text = GPTConfig(**{**TEXT, "vocab_size": END + 1, "block_size": 10, "n_layer": 2, "n_head": 2, "n_embd": 16})
    return CLIP(CLIPConfig(**{"vision": vision, "text": text, "n_joint": 8, **more}))


def pairs(n, size=16):
    torch.manual_seed(1)
    return torch.randn(n, 3, size, size), torch.randint(0, END, (n, 6))


def test_published_parameter_count_and_first_temperature():
    with torch.device("meta"):
        assert sum(p.numel() for p in CLIP(CLIPConfig()).parameters()) == 151_277_313
    assert tiny().logit_scale.item() == pytest.approx(math.log(1 / 0.07)) == pytest.approx(2.6593, abs=1e-4)


def test_loss_by_arithmetic():
    """Logits [[2, 0], [1, 0]]: rows cost ln(1 + e^-2) and ln(1 + e^1), columns ln(1 + e^-1) and ln(1 + e^0). The scale
    is a log: at ln 2 cosines of 1, 0, 1/2, 0 become these logits. A model that knows nothing is at ln(batch)."""
    want = sum(math.log(1 + math.exp(d)) for d in (-2, 1, -1, 0)) / 4
    image_emb = torch.tensor([[1.0, 0.0], [0.5, math.sqrt(0.75)]])                # (2, 2)
    text_emb = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    assert info_nce(image_emb, text_emb, math.log(2)).item() == pytest.approx(want)
    same = normalize(torch.ones(128, 8), dim=-1)
    assert info_nce(same, same, 1.0).item() == pytest.approx(chance(128)) == pytest.approx(4.852, abs=1e-3)


def test_logits_are_exact_under_autocast_and_the_scale_can_leave_its_cap():
    """With bfloat16 products a logit near 100 would be off by up to 1/4. The parameter itself is clamped: clamping
    inside the graph would zero the gradient above the cap, and the temperature would be stuck for good."""
    model, (img, idx) = tiny().train(), pairs(16)
    model.logit_scale.data.fill_(6.0)
    with torch.autocast("cpu", torch.bfloat16):
        image_emb, text_emb, scale = model(img, idx)
        logits, loss = similarities(image_emb, text_emb, scale), info_nce(image_emb, text_emb, scale)
    assert scale.item() == pytest.approx(MAX_LOG_SCALE)
    torch.testing.assert_close(logits, 100 * image_emb @ text_emb.t())
    for emb in (image_emb, text_emb):
        assert emb.dtype == torch.float32
        torch.testing.assert_close(emb.norm(dim=-1), torch.ones(16))
    loss.backward()
    assert model.logit_scale.grad.abs() > 0


@pytest.mark.parametrize("end_token", [None, END])
def test_text_is_read_at_its_end_and_padding_changes_nothing(end_token):
    model, row = tiny(end_token=end_token), torch.tensor([[1, 5, 7, END]])
    want = model.encode_text(row)
    for value in (0, END):
        torch.testing.assert_close(model.encode_text(pad(row, (0, 4), value=value)), want)
    assert (model.encode_text(torch.tensor([[2, 5, 7, END]])) - want).abs().max() > 1e-3      # the first token counts


def test_an_extended_vocabulary_is_still_read_at_the_tokenizers_end():
    """The story: CLIP files whose config says eos_token_id 2 mean "the largest id". Somebody added tokens, which got
    larger ids than the end, and texts with one of them were read in their middle (cosine 0.94, and no error)."""
    end, added = 30, END
    by_end, special = tiny(end_token=end), torch.tensor([[1, added, 4, end]])
    assert (tiny(end_token=None).encode_text(special) - by_end.encode_text(special)).abs().max() > 1e-3
    x = by_end.text.hidden(special)[:, 3]                                         # (1, C): the state at the end
    torch.testing.assert_close(by_end.encode_text(special), normalize(by_end.text_head(x), dim=-1))
    with pytest.raises(UserError, match="lacks the end token, id 30"):
        by_end.eval().encode_text(torch.tensor([[1, 5, 4, end], [1, 5, 4, 4]]))


def test_a_bag_is_the_mean_of_its_words():
    """Whatever their order and the padding; of no word at all it is nothing, not NaN."""
    model = tiny(bag=True, end_token=END)
    emb = model.encode_text(torch.tensor([[1, 2, 3, END, 0], [3, 1, 2, END, END], [5, END, 0, 0, 0], [END, 1, 2, 0, 0]]))
    mean = model.text.wte.weight[1:4].mean(dim=0, keepdim=True)
    torch.testing.assert_close(emb[:2], normalize(model.text_head(mean), dim=-1).expand(2, -1))
    torch.testing.assert_close(emb[2], normalize(model.text_head(model.text.wte.weight[5]), dim=-1))
    assert not emb[3].any()


# ----- other towers, ready-made features and text embeddings -----

FEATURES_ONLY = {"vision": None, "text": None, "feat_dim": 6}   # of 6 numbers, against text embeddings of 8


def test_ready_made_features_and_text_embeddings():
    """Only the head (width, width / 2, D) and the temperature learn; float16 embeddings are normalised in float32."""
    model, feats, text_emb = tiny(head="mlp", **FEATURES_ONLY), torch.randn(4, 6), torch.randn(4, 8).half()
    assert [tuple(p.shape) for p in model.parameters()] == [(), (3, 6), (3,), (8, 3), (8,)]
    loss = info_nce(*model(feats, text_emb))
    torch.testing.assert_close(loss, info_nce(model.encode_image(feats), normalize(text_emb.float(), dim=-1),
                                              model.logit_scale))
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("more", [{}, {"vision": RESNET}, {"vision": ViTConfig(16, 8, 1, 2, 8, class_token=False)}])
def test_any_towers_features_give_the_same_embeddings_and_parts_hold_every_weight(more):
    """Features cached from a tower by the one pooling rule, and the head alone, are the whole model's embeddings."""
    model, (img, _) = tiny(**more).eval(), pairs(2)
    torch.testing.assert_close(model.encode_image(model.vision.features(img)), model.encode_image(img))
    parts = model.parts()
    assert sorted(id(p) for part in parts.values() for p in part) == sorted(map(id, model.parameters()))
    assert len(parts["connector"]) == 3


def test_a_new_class_token_does_not_drown_the_gradient():
    """Class token and its position both start at 0 in a ViT; through CLIP's norm in front, the gradient of an all-zero
    row grows by 1 / sqrt(eps) = 316, and clipping to norm 1 would leave nothing of all the other weights'."""
    model = tiny()
    info_nce(*model(*pairs(4))).backward()
    norms = {name: g.norm().item() for name, g in grads(model).items()}
    assert norms["vision.cls"] < 10 * max(norm for name, norm in norms.items() if name.startswith("vision.blocks"))


# ----- the same batch in chunks, or over processes -----

def batch_norm_clip():
    """Both towers, a vision tower with BatchNorm, dropout before each layer of the head."""
    model = tiny(vision=RESNET, head="mlp", dropout=0.5).train()
    model.logit_scale.data.fill_(5.0)                           # above the cap, which must not cut its gradient
    return model


def grads(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def same(a, b, tolerance=1e-6):
    """Every gradient (or buffer) of one model is the other's, relative to the largest of its tensor."""
    assert a.keys() == b.keys() and a
    for name in a:
        assert (a[name] - b[name]).abs().max() <= tolerance * max(1, b[name].abs().max().item()), name


def plain_step(model, chunks, seed):
    """All chunks with their graphs kept, one loss over all of them: what contrastive_step must equal."""
    torch.manual_seed(seed)
    parts = []
    for chunk_seed in torch.randint(2 ** 62, (len(chunks),)).tolist():            # dropout as in contrastive_step
        torch.manual_seed(chunk_seed)
        parts.append(model(*chunks[len(parts)]))
    loss = info_nce(*(torch.cat([part[i] for part in parts]) for i in (0, 1)), model.logit_scale)
    loss.backward()
    return loss.item()


@pytest.mark.parametrize("frozen", [(), ("text",), ("image_head", "vision"), ("logit_scale", "vision")])
@pytest.mark.parametrize("sizes", [[5], [2, 3], [1, 1, 3]])
def test_a_batch_in_chunks_is_the_whole_batch(sizes, frozen):
    """Loss, gradients and BatchNorm's statistics, with dropout on; what is frozen is left out and no error. A
    GradScaler's factor reaches every gradient exactly once (a power of two: nothing is rounded)."""
    whole, chunked = batch_norm_clip(), batch_norm_clip()
    for model in (whole, chunked):
        for name, p in model.named_parameters():
            p.requires_grad_(not name.startswith(frozen))
    chunks = list(zip(*(t.split(sizes) for t in pairs(sum(sizes)))))
    want = plain_step(whole, chunks, seed=2)
    torch.manual_seed(2)
    got = contrastive_step(chunked, chunks, scale=lambda loss: 1024 * loss)
    assert got.item() == pytest.approx(want, abs=1e-6) and not got.requires_grad
    same({name: g / 1024 for name, g in grads(chunked).items()}, grads(whole))
    same(dict(chunked.named_buffers()), dict(whole.named_buffers()))


def test_chunks_need_less_memory_than_the_batch():
    """What a graph keeps at once is one chunk's: first without graphs, then one chunk at a time."""
    model, alive = batch_norm_clip(), []
    model.image_head.register_forward_hook(lambda m, args, y: alive.append(y.requires_grad and len(y)))
    contrastive_step(model, list(zip(*(t.split(2) for t in pairs(8)))))
    assert alive == [False] * 4 + [2] * 4


def three_ways(img, idx, text_emb, parts, wrap=lambda model: model):
    """(loss, gradients and buffers) of the whole batch at once, in chunks (rows `parts`), and from cached text."""
    for name, right in (("at once", idx), ("chunks", idx), ("cached text", text_emb)):
        model = tiny(vision=RESNET, **({"text": None} if name == "cached text" else {})).train()
        chunks = [(img, right)] if name == "at once" else [(img[rows], right[rows]) for rows in parts]
        yield contrastive_step(wrap(model), chunks).item(), {**grads(model), **dict(model.named_buffers())}


def process(rank, folder, inputs):
    """What each of two processes does: its half of the batch, in two chunks of two."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2,
                            timeout=timedelta(seconds=60))
    try:
        inputs = [t[4 * rank:4 * rank + 4] for t in inputs]
        torch.save(list(three_ways(*inputs, [[0, 1], [2, 3]], DistributedDataParallel)), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_two_processes_are_one(tmp_path):
    """Loss, gradients and BatchNorm's averages with DistributedDataParallel are those of one process with the whole
    batch. Without `gather`, with a gradient scaled by the number of processes, or with each process's own batch norm,
    they differ by far more than the 2e-5 allowed here."""
    inputs = [*pairs(8), torch.randn(8, 8)]
    other = torch.multiprocessing.get_context("spawn").Process(target=process, args=(1, tmp_path, inputs))
    other.start()
    process(0, tmp_path, inputs)                                # this process is the first of the two
    other.join(60)
    assert other.exitcode == 0
    want = list(three_ways(*inputs, [[0, 1, 4, 5], [2, 3, 6, 7]]))
    for rank in (0, 1):
        for (loss, tensors), (right_loss, right) in zip(torch.load(tmp_path / f"{rank}.pt"), want, strict=True):
            assert loss == pytest.approx(right_loss, abs=1e-5)
            same(tensors, right, 2e-5)
