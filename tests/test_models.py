"""GPT, ViT and the bridges: published sizes, contracts, and the identities that catch the usual mistakes."""
import math

import pytest
import torch
import torch.nn.functional as F

from tinyvlm.generate import generate
from tinyvlm.gpt import IGNORE, GPT, GPTConfig, next_token_loss
from tinyvlm.transformer import KVCache, Packed
from tinyvlm.vit import ViT, ViTConfig, resize_positions
from tinyvlm.vlm import LSTMConfig, VLMConfig, build, from_dict, to_dict

V, IMAGE = 23, 22


def tiny_gpt(**more):
    return GPTConfig(**{**dict(block_size=40, vocab_size=V, n_layer=2, n_head=2, n_embd=16), **more})


def tiny_vit(**more):
    return ViTConfig(**{**dict(image_size=16, patch_size=4, n_layer=2, n_head=2, n_embd=12), **more})


def tiny(model="cross", **more):
    """A captioner whose every weight matters: also those that start at zero are set."""
    torch.manual_seed(0)
    net = build(VLMConfig(model=model, vision=tiny_vit(), text=tiny_gpt(), image_token=IMAGE, **more)).eval()
    for p in net.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return net


def n_params(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("n_layer, n_head, n_embd, total", [
    (12, 12, 768, 124_439_808), (24, 16, 1024, 354_823_168), (36, 20, 1280, 774_030_080), (6, 12, 768, 81_912_576)])
def test_gpt2_published_parameter_counts(n_layer, n_head, n_embd, total):
    with torch.device("meta"):
        assert n_params(GPT(GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd))) == total


@pytest.mark.parametrize("n_embd, n_head, total", [(768, 12, 86_567_656), (192, 3, 5_717_416)])
def test_vit_published_parameter_counts(n_embd, n_head, total):
    with torch.device("meta"):
        assert n_params(ViT(ViTConfig(n_embd=n_embd, n_head=n_head, n_class=1000))) == total


def test_vit_gpt2_published_parameter_count():
    """239,195,904 counts the ViT's pooler too, which nothing reads and we do not build: 768 * 768 + 768."""
    with torch.device("meta"):
        model = build(VLMConfig())
    assert n_params(model) + 768 * 768 + 768 == 239_195_904


def test_untrained_loss_is_the_logarithm_of_the_vocabulary():
    torch.manual_seed(0)
    model, idx = GPT(tiny_gpt()), torch.randint(0, V, (8, 20))
    assert abs(model(idx, idx.roll(-1, 1))[1].item() - math.log(V)) < 0.1


def test_loss_ignores_what_it_should():
    """A mean over the targets that count, not a mean of rows, and not one with zeros for the rest."""
    logits, targets = torch.randn(2, 3, V), torch.tensor([[1, 2, IGNORE], [3, IGNORE, IGNORE]])
    kept = torch.cat([logits[0, :2], logits[1, :1]])
    torch.testing.assert_close(next_token_loss(logits, targets), F.cross_entropy(kept, torch.tensor([1, 2, 3])))


def test_grown_vocabulary_keeps_the_old_words_and_the_tie():
    torch.manual_seed(0)
    model, idx = GPT(tiny_gpt()), torch.randint(0, V, (1, 6))
    before = model(idx)[0]
    model.grow_vocab(V + 2)
    after = model(idx)[0]
    torch.testing.assert_close(after[..., :V], before)
    torch.testing.assert_close(after[..., V], before.mean(-1), atol=1e-5, rtol=1e-4)   # a mean row scores the mean
    assert n_params(model) == n_params(GPT(tiny_gpt(vocab_size=V + 2)))


def test_context_limit_is_a_sentence():
    with pytest.raises(AssertionError, match="41 tokens, but the model's context holds 40"):
        GPT(tiny_gpt())(torch.zeros(1, 41, dtype=torch.long))


def test_patches_are_read_row_by_row():
    """The conv-as-patches must equal cutting the picture by hand, left to right, then down."""
    torch.manual_seed(0)
    vit, img = ViT(tiny_vit(n_layer=1, class_token=False)), torch.randn(1, 3, 16, 16)
    tokens = vit.patch(img).flatten(2).transpose(1, 2)[0]                         # (N, C)
    second_row_third = img[0, :, 4:8, 8:12]                                       # patch number 1 * 4 + 2
    by_hand = torch.einsum("chw,dchw->d", second_row_third, vit.patch.weight) + vit.patch.bias
    torch.testing.assert_close(tokens[6], by_hand, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("stem", ["patch", "conv"])
def test_vit_contract(stem):
    """(B, 3, H, W) -> (B, N, C) with the class token first and the final norm applied; only its own image size."""
    vit, img = ViT(tiny_vit(stem=stem, n_class=5)).eval(), torch.randn(2, 3, 16, 16)
    feats = vit(img)
    assert feats.shape == (2, 17, 12) and vit.classify(img).shape == (2, 5) and len(vit.layers(img)) == 2
    torch.testing.assert_close(feats.mean(-1), torch.zeros(2, 17), atol=1e-5, rtol=0)  # the final norm is applied
    with pytest.raises(AssertionError, match="takes 16x16 pixels, got 16x12"):
        vit(img[..., :12])


def test_position_table_resizing():
    pos = torch.randn(1, 17, 12)
    assert torch.equal(resize_positions(pos, 4), pos) and resize_positions(pos, 7).shape == (1, 50, 12)
    assert torch.equal(resize_positions(pos, 7)[:, 0], pos[:, 0])                 # the class row is no place


@pytest.mark.parametrize("model, more", [("cross", {}), ("cross", {"wiring": "lockstep"}), ("prefix", {})])
def test_one_contract(model, more):
    """Every captioner: (img, idx, targets) -> (logits, loss), sees its image, and is rebuilt from config.json."""
    net, img = tiny(model, **more), torch.randn(2, 3, 16, 16)
    first = IMAGE if model == "prefix" else 0
    idx = torch.tensor([[first, 1, 2, 3], [first, 4, 5, 0]])
    targets = torch.tensor([[1, 2, 3, 0], [4, 5, 0, IGNORE]])
    logits, loss = net(img, idx, targets)
    assert logits.shape == (2, 4, V) and loss.shape == () and net(img, idx, None)[1] is None
    torch.testing.assert_close(loss, next_token_loss(logits, targets))
    assert not torch.allclose(net(img.flip(0), idx, targets)[0], logits), "the image makes no difference"
    again = from_dict(to_dict(net.config))
    build(again).load_state_dict(net.state_dict())                                # config.json is enough to rebuild it


@pytest.mark.parametrize("model, more", [("cross", {}), ("cross", {"wiring": "lockstep"}), ("prefix", {})])
def test_several_captions_of_one_image(model, more):
    """(img, 3 captions each) equals the image given three times."""
    net, img = tiny(model, **more), torch.randn(2, 3, 16, 16)
    idx = torch.randint(1, 20, (6, 5))
    idx[:, 0] = IMAGE if model == "prefix" else 0
    torch.testing.assert_close(net(img, idx)[0], net(img.repeat_interleave(3, 0), idx)[0], atol=1e-5, rtol=1e-4)


def test_lockstep_block_i_reads_vision_layer_i():
    net, img = tiny(wiring="lockstep"), torch.randn(1, 3, 16, 16)
    seen = []
    for block in net.text.blocks:
        block.cross.register_forward_hook(lambda module, args, out: seen.append(args[1]))
    net(img, torch.zeros(1, 3, dtype=torch.long))
    norms = [net.bridge["norms"][0], net.vision.ln_f]
    for feats, norm, x in zip(seen, norms, net.vision.layers(img)):
        torch.testing.assert_close(feats, net.bridge["proj"](norm(x)))


def test_image_tokens_stand_where_image_stood():
    """The splice, against a loop that anyone can check: any place, any number of images, shorter rows padded right."""
    net = tiny("prefix")
    N, C = 3, 16
    tokens = torch.randn(2, 2, N, C)                                              # two images for each of two rows
    idx = torch.tensor([[1, IMAGE, 2, IMAGE, 3], [IMAGE, 4, 5, 6, 7]])
    x, last = net.splice(tokens, idx)
    for b in range(2):
        rows, m, ends = [], 0, []
        for token in idx[b].tolist():
            if token == IMAGE:
                rows += list(tokens[b, m])
                m += 1
            else:
                rows.append(net.text.wte.weight[token])
            ends.append(len(rows) - 1)
        torch.testing.assert_close(x[b, :len(rows)], torch.stack(rows))
        assert last[b].tolist() == ends
    assert x.shape == (2, 5 + 2 * (N - 1), C)
    with pytest.raises(AssertionError, match="holds 2 <image> tokens but only 1 images"):
        net.splice(tokens[:, :1], idx)


def test_prefix_logits_equal_the_long_way_round():
    """Asking the vocabulary only at text positions must not change a logit: compare with the whole sequence's."""
    net, img = tiny("prefix"), torch.randn(1, 3, 16, 16)
    idx = torch.tensor([[IMAGE, 5, 6, 7]])
    x = torch.cat([net.look(img), net.text.embed(idx[:, 1:])], dim=1)             # (1, N + 3, C)
    whole = net.text.head(net.text.hidden(x))                                     # (1, N + 3, V)
    torch.testing.assert_close(net(img, idx)[0], whole[:, -4:], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("n_before, K", [(0, 3), (2, 2)])
def test_rows_that_begin_alike_may_share_their_beginning(n_before, K):
    """Prompt and picture read once for K texts: the logits, the loss and every gradient of reading them K times."""
    net, img = tiny("prefix"), torch.randn(2, 3, 16, 16)
    idx = torch.randint(1, 20, (2 * K, n_before + 5))
    idx[:, :n_before], idx[:, n_before] = torch.arange(1, n_before + 1), IMAGE
    targets = idx.roll(-1, dims=1)
    targets[0, n_before + 2:], targets[:, -1] = IGNORE, IGNORE                    # a shorter row, padded
    apart = net(img, idx, targets)
    torch.testing.assert_close(net(img, idx, n_shared=n_before + 1)[0], apart[0], atol=1e-5, rtol=1e-4)
    shared = net(img, idx, targets, n_shared=n_before + 1, loss_only=True)
    torch.testing.assert_close(shared[0][0], apart[0][targets != IGNORE], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(shared[1], apart[1])
    grads = [torch.autograd.grad(loss, list(net.parameters()), allow_unused=True) for _, loss in (shared, apart)]
    for a, b in zip(*grads):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a.to_dense(), b.to_dense(), atol=1e-5, rtol=1e-3)


def test_one_graph_for_the_compiler():
    """fullgraph: torch.compile raises where a shape depends on numbers it would have to fetch from the device."""
    net, img = tiny("prefix").train(), torch.randn(2, 3, 16, 16)
    idx = torch.randint(1, 20, (4, 6))
    idx[:, :2] = torch.tensor([1, IMAGE])
    targets = idx.roll(-1, dims=1)
    targets[0, 3:] = IGNORE
    fast = torch.compile(net, backend="eager", fullgraph=True)
    torch.testing.assert_close(fast(img, idx, targets, n_shared=2, loss_only=True)[1], net(img, idx, targets)[1])


def test_packed_texts_see_their_beginning_and_themselves():
    """A row of 2 + 3 x 2 tokens, and one of 2 + 1 + 4 with a slot of the second text to spare."""
    pos = torch.tensor([[0, 1, 2, 3, 2, 3, 2, 3], [0, 1, 2, 2, 3, 4, 5, 6]])
    owner = torch.tensor([[-1, -1, 0, 0, 1, 1, 2, 2], [-1, -1, 0, 1, 1, 1, 1, 1]])
    mask = Packed(pos, owner).mask
    assert mask.shape == (2, 1, 8, 8)
    for b in range(2):
        for i in range(8):
            for j in range(8):
                allowed = j <= i and (j < 2 or owner[b, i] == owner[b, j])
                assert mask[b, 0, i, j] == allowed, (b, i, j)


@pytest.mark.parametrize("model, more", [("cross", {}), ("cross", {"wiring": "lockstep"}), ("prefix", {})])
def test_cached_logits_equal_uncached(model, more):
    """Token by token through the cache, prompts of different length together, against one full forward each."""
    net, img = tiny(model, **more), torch.randn(2, 3, 16, 16)
    first = IMAGE if model == "prefix" else 0
    rows, new = [[first, 3, 4, 5], [first, 6]], torch.tensor([[7, 8, 9], [10, 11, 12]])
    padded = torch.tensor([rows[0], rows[1] + [0, 0]])
    logits, state = net.prefill(img, padded, torch.tensor([4, 2]), max_new_tokens=3)
    steps = [logits] + [net.step(new[:, t], state) for t in range(3)]             # 4 x (2, V)
    for b, row in enumerate(rows):
        full = net(img[b:b + 1], torch.tensor([row + new[b].tolist()]))[0][0]     # (T, V)
        torch.testing.assert_close(torch.stack([s[b] for s in steps]), full[len(row) - 1:], atol=1e-5, rtol=1e-4)


def test_prefix_rows_with_fewer_images_decode_as_if_alone():
    net, img = tiny("prefix"), torch.randn(2, 2, 3, 16, 16)                       # room for two images a row
    idx = torch.tensor([[IMAGE, 1, IMAGE, 2], [IMAGE, 3, 4, 5]])                  # .. the second row uses one
    logits, state = net.prefill(img, idx, None, max_new_tokens=1)
    logits = torch.stack([logits, net.step(torch.tensor([6, 7]), state)], dim=1)  # (2, 2, V)
    for b, alone in enumerate([img[:1], img[1:, :1]]):
        full = net(alone, torch.tensor([idx[b].tolist() + [6 + b]]))[0][0, -2:]
        torch.testing.assert_close(logits[b], full, atol=1e-5, rtol=1e-4)


def test_gpt_forward_with_cache_continues():
    torch.manual_seed(0)
    model, idx, cache = GPT(tiny_gpt()).eval(), torch.randint(0, V, (2, 9)), KVCache(2, 9)
    parts = [model(part, cache=cache)[0] for part in idx.split([4, 1, 4], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(idx)[0], atol=1e-5, rtol=1e-4)


def test_parts_cover_every_parameter_once():
    for model in ("cross", "prefix"):
        net = tiny(model)
        ids = [id(p) for part in net.parts().values() for p in part]
        assert sorted(ids) == sorted(id(p) for p in net.parameters())
        assert all(net.parts().values()), "a part is empty"


# ----- the LSTM captioner

@pytest.fixture(params=[(0, True, 1, 32), (4, False, 2, 32), (4, True, 1, 48)],
                ids=["plain", "attention untied", "narrow"])
def speaker(request):
    n_head, tied, n_layer, n_hidden = request.param
    torch.manual_seed(0)
    text = LSTMConfig(50, n_layer, 32, n_hidden, 0.1, tied, n_head)
    return build(VLMConfig("lstm", None, text, feat_dim=20)).eval()


def test_the_lstm_speaks_word_by_word_as_in_one_pass(speaker):
    """prefill and step give the logits of the one pass over the whole caption: at words, and between K captions."""
    img, idx = torch.randn(3, 20), torch.randint(0, 50, (6, 7))
    whole, _ = speaker(img, idx)                                                  # K = 2 captions an image
    assert torch.allclose(whole, speaker(img.repeat_interleave(2, 0), idx)[0], atol=1e-5)
    logits, state = speaker.prefill(img.repeat_interleave(2, 0), idx[:, :3])
    for t in range(3, 7):
        assert torch.allclose(logits, whole[:, t - 1], atol=1e-5)
        logits = speaker.step(idx[:, t], state)
    assert from_dict(to_dict(speaker.config)) == speaker.config


def test_lstm_prompts_of_different_length_decode_as_if_alone(speaker):
    img, prompts = torch.randn(3, 4, 20), [[1], [1, 2], [3, 4, 5]]                # a grid of 4 places
    together = generate(speaker, img, prompts, 5, num_beams=3, eos_id=0)
    alone = [generate(speaker, img[k:k + 1], [p], 5, num_beams=3, eos_id=0)[0] for k, p in enumerate(prompts)]
    assert together == alone


def test_the_image_is_in_the_first_state_and_every_weight_learns(speaker):
    speaker.train()
    idx = torch.randint(0, 50, (3, 7))
    img = torch.randn(3, 20, requires_grad=True)
    speaker(img, idx, idx)[1].backward()
    assert img.grad.abs().sum() > 0 and all(p.grad is not None for p in speaker.parameters())
    assert sum(map(len, speaker.parts().values())) == len(list(speaker.parameters()))
