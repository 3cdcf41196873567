"""Attention, blocks and the cache, held against torch's own modules and against themselves computed another way."""
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from tinyvlm.transformer import ACTIVATIONS, Attention, Block, KVCache, attend, causal_mask, linear

B, T, N, C, H = 2, 5, 7, 24, 3


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def like_torch(ours):
    """torch's MultiheadAttention with our weights."""
    theirs = nn.MultiheadAttention(C, H, batch_first=True)
    theirs.load_state_dict({"in_proj_weight": ours.qkv.weight, "in_proj_bias": ours.qkv.bias,
                            "out_proj.weight": ours.proj.weight, "out_proj.bias": ours.proj.bias})
    return theirs


@pytest.mark.parametrize("kind", ["self", "causal", "cross"])
def test_attention_equals_torchs(kind):
    ours, x, feats = Attention(C, H, causal=kind == "causal"), torch.randn(B, T, C), torch.randn(B, N, C)
    source = feats if kind == "cross" else x
    mask = ~causal_mask(T, T) if kind == "causal" else None                       # torch marks what is forbidden
    expected, weights = like_torch(ours)(x, source, source, attn_mask=mask, average_attn_weights=False)
    torch.testing.assert_close(ours(x, feats if kind == "cross" else None), expected, atol=1e-6, rtol=1e-5)
    ours.keep_weights = True                                                      # the written-out way, same numbers
    torch.testing.assert_close(ours(x, feats if kind == "cross" else None), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(ours.weights, weights, atol=1e-6, rtol=1e-5)


def test_plain_attention_equals_the_fused_call():
    q, k, v = torch.randn(B, H, T, 8), torch.randn(B, H, N, 8), torch.randn(B, H, N, 8)
    mask = torch.rand(T, N) < 0.7
    mask[:, 0] = True
    y, weights = attend(q, k, v, mask)
    torch.testing.assert_close(y, F.scaled_dot_product_attention(q, k, v, attn_mask=mask))
    torch.testing.assert_close(weights.sum(-1), torch.ones(B, H, T))
    assert weights[:, :, ~mask].max() == 0


@pytest.mark.parametrize("rows", [512, 513, 1021])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_single_row_takes_another_way_to_the_same_product(rows, threads, monkeypatch):
    """One vector on a CPU is spread over the cores by hand; also when rows do not divide among them."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    weight, bias = torch.randn(rows, C), torch.randn(rows)
    with torch.inference_mode():
        for shape in [(1, 1, C), (1, C), (C,), (2, 1, C), (1, 3, C)]:
            x = torch.randn(shape)
            for b in (bias, None):
                torch.testing.assert_close(linear(x, weight, b), F.linear(x, weight, b), atol=1e-5, rtol=1e-5)


def test_causal_mask_worked_example():
    assert causal_mask(2, 3).tolist() == [[True, True, False], [True, True, True]]


def test_the_future_does_not_change_the_past():
    block, x = Block(C, H, causal=True), torch.randn(B, T, C)
    other = x.clone()
    other[:, 3:] += 1
    assert torch.equal(block(x)[:, :3], block(other)[:, :3])
    assert not torch.allclose(block(x)[:, 3:], block(other)[:, 3:])


def test_captions_of_one_image_share_its_keys():
    """K captions per image in one row must equal the image repeated K times."""
    cross, x, feats = Attention(C, H), torch.randn(3 * B, T, C), torch.randn(B, N, C)
    torch.testing.assert_close(cross(x, feats), cross(x, feats.repeat_interleave(3, dim=0)), atol=1e-6, rtol=1e-5)


def test_new_cross_attention_leaves_a_decoder_unharmed():
    """The layer that looks at images starts at zero, so a language model begins as good as it was."""
    from tinyvlm.gpt import GPT, GPTConfig
    sizes = dict(block_size=8, vocab_size=11, n_layer=2, n_head=3, n_embd=C)
    plain, seeing = GPT(GPTConfig(**sizes)), GPT(GPTConfig(cross=True, **sizes))
    seeing.load_state_dict(plain.state_dict(), strict=False)
    idx = torch.randint(0, 11, (B, 8))
    assert torch.equal(plain(idx)[0], seeing(idx, feats=torch.randn(B, N, C))[0])


def test_block_gradient_reaches_a_zero_initialised_cross_attention():
    """Zero output does not mean zero gradient: the projection itself must be able to leave zero."""
    from tinyvlm.gpt import GPT, GPTConfig
    model = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=3, n_embd=C, cross=True))
    model(torch.ones(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.long), torch.randn(1, N, C))[1].backward()
    assert model.blocks[0].cross.proj.weight.grad.abs().max() > 0


@pytest.mark.parametrize("chunks", [[5], [1, 1, 1, 1, 1], [2, 1, 2]])
def test_cached_block_equals_uncached(chunks):
    block, x, feats = Block(C, H, causal=True, cross=True), torch.randn(B, T, C), torch.randn(B, N, C)
    nn.init.normal_(block.cross.proj.weight)
    cache, out = KVCache(1, T), []
    for part in x.split(chunks, dim=1):
        out.append(block(part, feats, cache))
        cache.advance(part.size(1))
    torch.testing.assert_close(torch.cat(out, 1), block(x, feats), atol=1e-6, rtol=1e-5)


def test_unused_cache_slots_cannot_poison_the_result(monkeypatch):
    """Rows of different length leave slots nobody wrote. They were once uninitialised memory: masked to weight 0, but
    0 * NaN is NaN, so one run in a few failed. Here every fresh buffer that is not zeroed holds NaN."""
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *size: torch.full(size, float("nan")))
    block, cache = Block(C, H, causal=True), KVCache(1, 9)
    block(torch.randn(2, 3, C), cache=cache)
    cache.advance(3)
    cache.finish_prompt(torch.tensor([3, 1]))
    for _ in range(3):
        assert block(torch.randn(2, 1, C), cache=cache).isfinite().all()
        cache.advance(1)


def test_a_full_cache_says_so():
    block, cache = Block(C, H, causal=True), KVCache(1, 2)
    with pytest.raises(AssertionError, match="holds 2 tokens, 5 were given"):
        block(torch.randn(B, T, C), cache=cache)


def test_activations():
    """The three are near one another, and public weights need exactly theirs: the formulas of the papers."""
    x = torch.linspace(-4, 4, 33)
    torch.testing.assert_close(ACTIVATIONS["gelu"](x), 0.5 * x * (1 + torch.erf(x / 2 ** 0.5)))
    tanh = 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x ** 3)))
    torch.testing.assert_close(ACTIVATIONS["gelu_tanh"](x), tanh)
    torch.testing.assert_close(ACTIVATIONS["quick_gelu"](x), x / (1 + torch.exp(-1.702 * x)))
