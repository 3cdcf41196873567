"""Attention, blocks and the cache, held against torch's own modules and against themselves computed another way."""
import pytest
import torch
import torch.nn as nn

from tinyvlm.config import UserError, check_sizes
from tinyvlm.gpt import GPT, GPTConfig
from tinyvlm.transformer import ACTIVATIONS, Attention, Block, KVCache

B, T, N, C, H = 2, 5, 7, 24, 3
SIZES = GPTConfig(n_embd=C, n_head=H)


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
    mask = torch.ones(T, T).triu(1).bool() if kind == "causal" else None       # torch marks what is forbidden
    expected, weights = like_torch(ours)(x, source, source, attn_mask=mask, average_attn_weights=False)
    image_kv = ours.keys_values(feats) if kind == "cross" else None
    torch.testing.assert_close(ours(x, image_kv), expected, atol=1e-6, rtol=1e-5)
    ours.keep_weights = True                                                      # the written-out way, same numbers
    torch.testing.assert_close(ours(x, image_kv), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(ours.weights, weights, atol=1e-6, rtol=1e-5)


def test_the_future_does_not_change_the_past():
    block, x = Block(SIZES, causal=True), torch.randn(B, T, C)
    other = x.clone()
    other[:, 3:] += 1
    assert torch.equal(block(x)[:, :3], block(other)[:, :3])
    assert not torch.allclose(block(x)[:, 3:], block(other)[:, 3:])


def test_new_cross_attention_leaves_a_decoder_unharmed_and_learns():
    """It starts at zero, so a language model begins as good as it was; but a zero must be able to leave zero."""
    sizes = dict(block_size=8, vocab_size=11, n_layer=2, n_head=3, n_embd=C)
    plain, cross = GPT(GPTConfig(**sizes)), GPT(GPTConfig(cross=True, **sizes))
    cross.load_state_dict(plain.state_dict(), strict=False)
    idx = torch.randint(0, 11, (B, 8))
    logits, loss = cross(idx, idx, torch.randn(B, N, C))
    loss.backward()
    assert torch.equal(plain(idx)[0], logits) and cross.blocks[0].cross.proj.weight.grad.abs().max() > 0


def tokens_one_by_one(block, cache, x, chunks=1):
    """The block's outputs for x (B, T, C), read through the cache."""
    out = []
    for part in x.split(chunks, dim=1):
        cache.begin(part.size(1))
        out.append(block(part, cache=cache))
    return torch.cat(out, dim=1)


def test_each_row_goes_on_from_its_own_end_and_in_any_order():
    """Prompts of 3 and 1 tokens; row 0 is continued twice, as by two beams, and row 1 once; then they change places."""
    block, x = Block(SIZES, causal=True), torch.randn(2, 3, C)
    cache = KVCache(1, 2, 8, "cpu")
    tokens_one_by_one(block, cache, x, chunks=3)
    cache.lengths = torch.tensor([3, 1])                                          # the rest of row 1 is padding
    rows = [[*x[0]], [x[1, 0]]]
    for order in ([0, 1, 0], [2, 1, 1], [0, 2, 0]):
        cache.reorder(torch.tensor(order))
        new = torch.randn(3, 1, C)
        rows = [[*rows[i], new[b, 0]] for b, i in enumerate(order)]
        for out, row in zip(tokens_one_by_one(block, cache, new), rows):
            torch.testing.assert_close(out[0], block(torch.stack(row)[None])[0, -1], atol=1e-6, rtol=1e-5)
    assert cache.lengths.tolist() == [len(row) for row in rows]


def test_every_step_looks_alike_to_a_compiler():
    """One compiled `step` serves every token: no shape and no number may depend on how far decoding is."""
    model = GPT(GPTConfig(block_size=16, vocab_size=11, n_layer=2, n_head=3, n_embd=C, cross=True)).eval()
    nn.init.normal_(model.blocks[0].cross.proj.weight)
    recorded = []
    step = torch.compile(model.step, backend=lambda graph, _: recorded.append(graph) or graph.forward, fullgraph=True)
    idx, feats = torch.randint(0, 11, (2, 12)), torch.randn(1, N, C)              # two beams share an image
    whole, _ = model(idx, feats=feats)
    with torch.no_grad():
        _, cache = model.prefill(feats, idx[:, :4], torch.tensor([4, 4]), max_new_tokens=9)
        for t in range(4, 12):
            torch.testing.assert_close(step(idx[:, t], cache), whole[:, t], atol=1e-5, rtol=1e-4)
            cache.reorder(torch.tensor([0, 1]))
    assert len(recorded) == 1


def test_unused_cache_slots_cannot_poison_the_result(monkeypatch):
    """Rows of different length leave slots nobody wrote. They were once uninitialised memory: masked to weight 0, but 0
    * NaN is NaN, so one run in a few failed. Here every fresh buffer that is not zeroed holds NaN."""
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *size: torch.full(size, float("nan")))
    block, cache = Block(SIZES, causal=True), KVCache(1, 2, 9, "cpu")
    tokens_one_by_one(block, cache, torch.randn(2, 3, C), chunks=3)
    cache.lengths = torch.tensor([3, 1])
    assert tokens_one_by_one(block, cache, torch.randn(2, 3, C)).isfinite().all()


@pytest.mark.parametrize("wrong", [
    dict(n_head=0), dict(n_head=50), dict(n_layer=-2), dict(n_embd=12.0), dict(n_layer="2"), dict(n_layer=None),
    dict(n_head=True), dict(dropout=1.5), dict(dropout=float("nan")), dict(cross=2), dict(activation="relu"),
    dict(n_hidden=[3])])
def test_impossible_sizes_are_refused_by_name(wrong):
    """A config.json with n_head 0 once ended in a ZeroDivisionError; asserts would be gone under python -O."""
    (name, value), = wrong.items()
    with pytest.raises(UserError, match=f"{name} .*{str(value)[:4]}".replace("[", ".")):
        GPT(GPTConfig(**wrong))
    check_sizes(GPTConfig(n_hidden=None, dropout=0, eps=1e-12, activation="gelu"), activation=ACTIVATIONS)
