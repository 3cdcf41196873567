"""GPT, ViT and the captioners: published sizes, contracts, and the identities that catch the usual mistakes."""
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F

from tinyvlm.cnn import ResNet50, ResNetConfig
from tinyvlm.config import UserError
from tinyvlm.generate import generate
from tinyvlm.gpt import IGNORE, GPT, GPTConfig, next_token_loss
from tinyvlm.pretrained import _build_run
from tinyvlm.vit import ViT, ViTConfig, build_vision
from tinyvlm.vlm import LSTMConfig, VLMConfig, build, pixel_shuffle

V, IMAGE = 23, 22
KINDS = {"cross": {}, "lockstep": {"model": "cross", "wiring": "lockstep"}, "prefix": {}, "shuffle": {
    "model": "prefix", "shuffle": 2}, "lstm": {"text": LSTMConfig(V, 2, 16, 24, n_head=2)},
    "plain lstm": {"model": "lstm", "text": LSTMConfig(V, 1, 16, 16)}}
every_kind = pytest.mark.parametrize("kind", KINDS)


def tiny_gpt(**more):
    return GPTConfig(**{**dict(block_size=40, vocab_size=V, n_layer=2, n_head=2, n_embd=16), **more})


def tiny_vit(**more):
    return ViTConfig(**{**dict(image_size=16, patch_size=4, n_layer=2, n_head=2, n_embd=12), **more})


def tiny(kind="cross"):
    """A captioner whose every weight matters: also those that start at zero are set."""
    torch.manual_seed(0)
    sizes = {"model": kind, "vision": tiny_vit(), "text": tiny_gpt(), "image_token": IMAGE, **KINDS[kind]}
    net = build(VLMConfig(**sizes)).eval()
    for p in net.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return net


def n_params(model):
    return sum(p.numel() for p in model.parameters())


def test_published_parameter_counts():
    with torch.device("meta"):
        for n_layer, n_head, n_embd, total in (12, 12, 768, 124_439_808), (6, 12, 768, 81_912_576), (
                24, 16, 1024, 354_823_168), (36, 20, 1280, 774_030_080):
            assert n_params(GPT(GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd))) == total
        for n_embd, n_head, total in (768, 12, 86_567_656), (192, 3, 5_717_416):
            assert n_params(ViT(ViTConfig(n_embd=n_embd, n_head=n_head, n_class=1000))) == total
        # ViT-GPT2: 239,195,904 counts the ViT's pooler too, which nothing reads and we do not build
        assert n_params(build(VLMConfig())) + 768 * 768 + 768 == 239_195_904


def test_loss_is_the_mean_over_the_targets_that_count():
    """Not a mean of rows, nor one with zeros for the rest. Over no target at all it was nan, and one such micro-batch
    (of one process of several) made every weight nan: loss and gradients must be 0."""
    logits, targets = torch.randn(2, 3, V, requires_grad=True), torch.tensor([[1, 2, IGNORE], [3, IGNORE, IGNORE]])
    kept = torch.cat([logits[0, :2], logits[1, :1]])
    torch.testing.assert_close(next_token_loss(logits, targets), F.cross_entropy(kept, torch.tensor([1, 2, 3])))
    loss = next_token_loss(logits, torch.full((2, 3), IGNORE))
    loss.backward()
    assert loss == 0 and logits.grad.abs().max() == 0


def test_extended_vocabulary_keeps_the_old_words_and_the_tie():
    torch.manual_seed(0)
    model, idx = GPT(tiny_gpt()), torch.randint(0, V, (1, 6))
    before = model(idx)[0]
    model.extend_vocab(V + 2)
    after = model(idx)[0]
    torch.testing.assert_close(after[..., :V], before)
    torch.testing.assert_close(after[..., V], before.mean(-1), atol=1e-5, rtol=1e-4)   # a mean row scores the mean
    assert n_params(model) == n_params(GPT(tiny_gpt(vocab_size=V + 2)))
    model.extend_context(44)                                                      # and a longer context
    torch.testing.assert_close(model(idx)[0], after)
    assert model(torch.zeros(1, 44, dtype=torch.long))[0].shape == (1, 44, V + 2)


def test_context_limit_is_a_sentence():
    model, idx = GPT(tiny_gpt()), torch.zeros(1, 41, dtype=torch.long)
    for call in (lambda: model(idx), lambda: model.prefill(None, idx[:, :5], torch.tensor([5]), 37)):
        with pytest.raises(AssertionError, match="41 tokens, but the model's context holds 40"):
            call()
    assert len(generate(model, None, idx[:, :5], 36)[0]) == 36                    # the last new token is never read


def test_strided_convolution_is_cutting_and_a_linear_map():
    """What vit.py's header says: squares cut by hand, left to right, then down, each a row of numbers."""
    torch.manual_seed(0)
    vit, img = ViT(tiny_vit(n_layer=1)), torch.randn(2, 3, 16, 16)
    squares = [img[:, :, 4 * y:4 * y + 4, 4 * x:4 * x + 4].flatten(1) for y in range(4) for x in range(4)]
    by_hand = F.linear(torch.stack(squares, dim=1), vit.patch.weight.flatten(1), vit.patch.bias)   # (B, 16, C)
    torch.testing.assert_close(vit.patch(img).flatten(2).transpose(1, 2), by_hand, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("stem", ["patch", "conv"])
def test_vit_contract(stem):
    """(B, 3, H, W) -> (B, N, C) with the class token first and the final norm applied; only its own image size."""
    vit, img = build_vision(tiny_vit(stem=stem, n_class=5)).eval(), torch.randn(2, 3, 16, 16)
    feats = vit(img)
    assert isinstance(build_vision(ResNetConfig(width=4, blocks=(1, 1), n_class=0)), ResNet50)
    assert feats.shape == (2, 17, 12) and vit.classify(img).shape == (2, 5) and len(vit.layers(img)) == 2
    torch.testing.assert_close(feats.mean(-1), torch.zeros(2, 17), atol=1e-5, rtol=0)  # the final norm is applied
    with pytest.raises(AssertionError, match="takes 16x16 pixels, got 16x12"):
        vit(img[..., :12])


@pytest.mark.parametrize("class_token", [True, False])
def test_one_pooling_rule(class_token):
    """The class token where there is one, else the mean of the patches: for labels, features and the LSTM's first state
    alike. They once differed: some took the token, some averaged it in."""
    vit, img = ViT(tiny_vit(class_token=class_token, n_class=5)).eval(), torch.randn(2, 3, 16, 16)
    feats = vit(img)
    pooled = feats[:, 0] if class_token else feats.mean(dim=1)
    assert torch.equal(vit.features(img), pooled) and torch.equal(vit.classify(img), vit.head(pooled))
    assert torch.equal(vit.grid(img), feats[:, -16:]) and vit.n_feat == 12
    net = build(VLMConfig("lstm", tiny_vit(class_token=class_token), LSTMConfig(V, 1, 16, 16))).eval()
    vector = net.vision.pool(net.connector["norm"](net.vision(img)))
    torch.testing.assert_close(net.encode(img).h[0], net.connector["state"](vector).tanh()[:, :16])


@pytest.mark.parametrize("config, words", [
    (dict(model="prefix"), "<image>"), (dict(model="prefix", image_token=V), "not 23"), (dict(wiring="x"), "wiring"),
    (dict(vision=tiny_vit(patch_size=5)), "patch_size 5 must divide image_size 16"),
    (dict(vision=tiny_vit(stem="conv", image_size=18, patch_size=6)), "power of 2"), (dict(shuffle=0), "shuffle 0"),
    (dict(model="lstm", text=LSTMConfig(n_hidden=15, n_head=2)), "n_head 2"),
    (dict(model="lstm", text=LSTMConfig(n_layer=0)), "n_layer 0"), (dict(vision=tiny_vit(stem="x")), "stem 'x'")])
def test_sizes_that_do_not_fit_are_one_sentence(config, words):
    with pytest.raises(UserError, match=words):
        build(VLMConfig(**{**dict(vision=tiny_vit(), text=tiny_gpt()), **config}))


@every_kind
def test_one_contract(kind):
    """Every captioner: (img, idx, targets) -> (logits, loss); it sees its image, K captions of an image equal the image
    given K times, every weight learns, and belongs to one part; and config.json is enough to rebuild it."""
    net, img, idx = tiny(kind), torch.randn(2, 3, 16, 16), torch.randint(1, 20, (6, 4))
    idx[:, 0] = IMAGE
    targets = idx.roll(-1, 1).masked_fill(idx > 15, IGNORE)
    logits, loss = net(img, idx, targets)
    assert logits.shape == (6, 4, V) and net(img, idx)[1] is None
    torch.testing.assert_close(loss, next_token_loss(logits, targets))
    torch.testing.assert_close(net(img.repeat_interleave(3, 0), idx)[0], logits, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(net(img.flip(0), idx)[0], logits), "the image makes no difference"
    loss.backward()
    unused = {"vision.cls"} if kind == "prefix" else set()
    assert {name for name, p in net.named_parameters() if p.grad is None} <= unused
    ids = [id(p) for part in net.parts().values() for p in part]
    assert sorted(ids) == sorted(id(p) for p in net.parameters()) and all(net.parts().values())
    again = _build_run({"task": "caption", "sizes": asdict(net.config)})
    assert again.config == net.config
    again.load_state_dict(net.state_dict())


def test_lockstep_block_i_reads_vision_layer_i():
    net, img = tiny("lockstep"), torch.randn(1, 3, 16, 16)
    seen = []
    for block in net.text.blocks:
        block.cross.register_forward_hook(lambda module, args, out: seen.append(args[1]))
    net(img, torch.zeros(1, 3, dtype=torch.long))
    norms = [net.connector["norms"][0], net.vision.ln_f]
    for block, feats, norm, x in zip(net.text.blocks, seen, norms, net.vision.layers(img), strict=True):
        torch.testing.assert_close(feats, block.cross.keys_values(net.connector["proj"](norm(x))))


def splice_by_hand(net, tokens, row):
    """One row as anyone would write it: words and image tokens (N, C) joined in reading order; where each ends."""
    pieces = [tokens if token == IMAGE else net.text.wte.weight[token][None] for token in row]
    return torch.cat(pieces), torch.tensor([len(piece) for piece in pieces]).cumsum(0) - 1


@pytest.mark.parametrize("K", [1, 2])
def test_image_tokens_stand_where_image_stood(K):
    """The splice against torch.cat: any place, K captions of an image; and a row without it (padding) stays."""
    net, img = tiny("prefix"), torch.randn(4 // K, 3, 16, 16)
    rows = [[IMAGE, 1, 2], [3, 4, IMAGE], [5, IMAGE, 6], [7, 8, 0]]
    x, last = net.splice(img, torch.tensor(rows))                                 # (4, 3 + 15, 16)
    for b, row in enumerate(rows):
        expected, ends = splice_by_hand(net, net.encode(img)[b // K], row)
        torch.testing.assert_close(x[b, :len(expected)], expected, atol=1e-6, rtol=1e-5)
        assert torch.equal(last[b], ends)
        logits = net(img, torch.tensor(rows))[0][b]                               # made at text positions only
        whole = net.text.head(net.text.hidden(expected[None]))[0]
        torch.testing.assert_close(logits, whole[ends], atol=1e-5, rtol=1e-4)


def test_pixel_shuffle_lays_neighbours_side_by_side():
    """Places 0..15 of a 4 x 4 grid, two channels each: the first token holds places 0, 1, 4 and 5."""
    out = pixel_shuffle(torch.arange(32).view(1, 16, 2), 2)
    assert out.shape == (1, 4, 8) and out[0, 0].tolist() == [0, 1, 2, 3, 8, 9, 10, 11]
    assert out[0, 1, 0] == 4 and out[0, 2, 0] == 16
    net, img = tiny("shuffle"), torch.randn(1, 3, 16, 16)
    assert net.encode(img).shape == (1, 4, 16) and net(img, torch.tensor([[IMAGE, 1]]))[0].shape == (1, 2, V)


def test_one_graph_for_the_compiler():
    """fullgraph: torch.compile raises where a shape depends on numbers it would have to fetch from the device."""
    net, img = tiny("prefix").train(), torch.randn(2, 3, 16, 16)
    idx = torch.tensor([[1, IMAGE, 2, 3], [1, IMAGE, 4, 5]]).repeat(2, 1)
    fast = torch.compile(net, backend="eager", fullgraph=True)
    torch.testing.assert_close(fast(img, idx, idx.roll(-1, 1))[1], net(img, idx, idx.roll(-1, 1))[1])


@every_kind
def test_cached_logits_equal_uncached(kind):
    """Token by token through the cache, prompts of different length together, against one full forward each."""
    net, img = tiny(kind), torch.randn(2, 3, 16, 16)
    rows, new = [[IMAGE, 3, 4, 5], [IMAGE, 6]], torch.tensor([[7, 8, 9], [10, 11, 12]])
    padded = torch.tensor([rows[0], rows[1] + [0, 0]])
    logits, state = net.prefill(img, padded, torch.tensor([4, 2]), max_new_tokens=4)
    steps = [logits] + [net.step(new[:, t], state) for t in range(3)]             # 4 x (2, V)
    for b, row in enumerate(rows):
        full = net(img[b:b + 1], torch.tensor([row + new[b].tolist()]))[0][0]     # (T, V)
        torch.testing.assert_close(torch.stack([s[b] for s in steps]), full[len(row) - 1:], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["cross", "prefix", "lstm"])
@pytest.mark.parametrize("shape", [(2, 20), (2, 9, 20)])
def test_ready_made_features_stand_in_for_a_vision_tower(kind, shape):
    """One vector an image, or a grid of them; the vision tower's own features give what its pixels give."""
    sizes = {"model": kind, "text": tiny_gpt(), "image_token": IMAGE, **KINDS[kind], "vision": None, "feat_dim": 20}
    net, idx = build(VLMConfig(**sizes)), torch.tensor([[IMAGE, 1, 2]]).repeat(4, 1)
    assert net(torch.randn(shape), idx)[0].shape == (4, 3, V) and not net.parts()["vision"]
    net, img = tiny(kind), torch.randn(4, 3, 16, 16)
    feats = net.vision.grid(img) if kind == "prefix" else net.vision(img)
    torch.testing.assert_close(net(feats, idx)[0], net(img, idx)[0])


@pytest.mark.parametrize("kind", ["cross", "prefix"])
def test_a_single_vector_is_read_as_several_tokens(kind):
    """slots 3: each vector's projection is cut into three tokens, in order, of which attention weighs every one."""
    sizes = {"model": kind, "text": tiny_gpt(), "image_token": IMAGE, **KINDS[kind], "vision": None, "feat_dim": 20}
    net, feats = build(VLMConfig(**sizes, slots=3)).eval(), torch.randn(2, 20)
    tokens, proj = net.encode(feats), net.connector["proj"] if kind == "cross" else net.connector[3]
    assert tokens.shape == (2, 3, 16) and proj.weight.shape[0] == 48
    proj.weight.data[16:] = proj.bias.data[16:] = 0             # only the first token's rows are left
    assert torch.equal(net.encode(feats)[:, :1], tokens[:, :1]) and not net.encode(feats)[:, 1:].any()
