"""The checks of tests/exercises.md: one function for each idea, which fails until its exercise is done.

    python tests/exercises.py                 how far you are
    python tests/exercises.py bpe             one check, with what is still wrong

Do an exercise on a branch of your own. None of them changes what the code did before: a new argument has a default, so
the idea's oracle test passes before and after.
"""
import itertools
import math
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import torch                                                                      # noqa: E402
import torch.nn.functional as F                                                   # noqa: E402

from tinyvlm import clip, cnn, generate, lstm, metrics, optimizer, schedule                  # noqa: E402
from tinyvlm import tokenizer, transformer, vit, vlm                              # noqa: E402
from tinyvlm import weights as files                                              # noqa: E402


SIZES = vlm.GPTConfig(n_head=2, n_embd=12)                                        # of a block


def near(a, b):
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), atol=1e-5, rtol=1e-4, check_dtype=False)


def bpe():
    """hug 10 times, pug 5, hugs 5: (u, g) is seen 20 times, (h, ug) 15 times, and the next pair 5 times."""
    words = {"hug": 10, "pug": 5, "hugs": 5}
    assert tokenizer.naive_merges(words, 4, min_count=6) == [("u", "g"), ("h", "ug")]
    assert tokenizer.naive_merges(words, 4, min_count=5) == tokenizer.naive_merges(words, 4)
    assert len(tokenizer.naive_merges(words, 4)) == 4


def patch_embedding():
    """Windows of 2P pixels, P apart: a token sees P / 2 pixels beyond its patch on each side, and no further."""
    tower = vit.ViT(vit.ViTConfig(32, 8, 1, 2, 12, stem="overlap"))
    img = torch.randn(1, 3, 32, 32)
    assert tower(img).shape == (1, 17, 12)
    for x, seen in ((7, {0, 1}), (12, {1, 2}), (3, {0})):       # row 0 of pixels, column x; patch 1 is columns 8 to 15
        other = img.clone()
        other[:, :, 0, x] += 1
        change = (tower.patch(img) - tower.patch(other)).abs().amax(dim=1)[0]     # (4, 4)
        assert {*change[0].nonzero().flatten().tolist()} == seen and change[1:].max() == 0, f"a pixel in column {x}"


def attention():
    """Three equal scores of 0 and the off switch: each weight is 1/4, not 1/3; where nothing fits, all are near 0."""
    q, k, v = torch.zeros(1, 1, 1, 4), torch.randn(1, 1, 3, 4), torch.randn(1, 1, 3, 4)
    y, w = transformer.attend(q, k, v, off=True)
    near(w, torch.full((1, 1, 1, 3), 0.25))
    near(y, v.mean(dim=2, keepdim=True) * 0.75)
    y, w = transformer.attend(torch.full_like(q, 50.0), -torch.ones_like(k), v, off=True)      # scores of -100
    assert w.max() < 1e-6 and y.abs().max() < 1e-5
    near(transformer.attend(torch.full_like(q, 50.0), torch.ones_like(k), v, off=True)[1].sum(), 1.0)   # exp overflows
    near(transformer.attend(q, k, v)[1].sum(), 1.0)


def causal_mask():
    """window 2: token t attends to t - 1 and t only. Both ways: the fused call, and the one that keeps its weights."""
    x = torch.randn(1, 5, 12)
    other = x.clone()
    other[:, 1] += 1
    for window, keep in itertools.product((2, 3, None), (False, True)):
        layer = transformer.Attention(12, 2, causal=True, window=window)
        layer.keep_weights = keep
        changed = (layer(x) - layer(other)).abs().amax(dim=(0, 2)) > 1e-6         # (T,)
        assert changed.tolist() == [1 <= t < 1 + (window or 4) for t in range(5)], (window, keep, changed.tolist())


def cross_attention():
    """A closed gate hides the image whatever the weights; it can open, as its gradient is not 0, in a new model too."""
    block, x, feats = transformer.Block(SIZES, cross=True, gated=True), torch.randn(2, 5, 12), torch.randn(2, 7, 12)
    assert block.gate.shape == () and block.gate.item() == 0
    near(block(x, feats), block(x))
    transformer.init_weights(block, 1)                          # as a GPT does with all its blocks
    near(block(x, feats), block(x))
    block(x, feats).square().sum().backward()
    assert block.gate.grad.abs() > 0, "after init_weights the gate is 0, and so is what it multiplies: it stays shut"
    block.gate.data.fill_(0.5)
    assert not torch.allclose(block(x, feats), block(x))


def prefix_splice():
    """4 x 4 patches become 4 rows of 5: the fifth is one learned vector, the same in every row and for every image."""
    sizes = dict(model="prefix", vision=vit.ViTConfig(16, 4, 1, 2, 12), text=vlm.GPTConfig(40, 23, 1, 2, 16),
                 image_token=22)
    model, plain = vlm.build(vlm.VLMConfig(**sizes, row_end=True)), vlm.build(vlm.VLMConfig(**sizes))
    img = torch.randn(2, 3, 16, 16)
    tokens = model.encode(img)
    assert tokens.shape == (2, 20, 16), f"{tuple(tokens.shape)}"
    ends = tokens[:, 4::5].reshape(-1, 16)                                        # (2 * 4, C)
    assert (ends == ends[0]).all() and not (tokens[0, 3] == tokens[1, 3]).all()
    logits, loss = model(img, torch.tensor([[22, 1, 2]] * 2), torch.tensor([[1, 2, 3]] * 2))
    loss.backward()
    assert logits.shape == (2, 3, 23)
    assert all(p.grad is not None for p in model.parts()["connector"]), "a connector's weight learns nothing"
    more, before = (sum(p.numel() for p in net.parts()["connector"]) for net in (model, plain))
    assert more == before + 16, "the new vector should be a part of the connector, as a new layer is"
    assert plain.encode(img).shape == (2, 16, 16)


def lstm_gates():
    """coupled: what is written is what is forgotten, i = 1 - f. The way back by hand must equal autograd's."""
    torch.manual_seed(0)
    sizes = ((6, 3, 5), (28, 5), (28, 7), (28,), (3, 7), (3, 7))                  # x, w_x, w_h, b, h, c
    inputs, got = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes], []
    for way in (lstm.plain_loop, lstm.Recurrence.apply):
        hs, c = way(*inputs, True)
        got.append([hs, c, *torch.autograd.grad(hs.square().sum() + c.sum(), inputs)])
    for a, b in zip(*got):
        near(a, b)
    assert got[0][3][:7].abs().max() == 0, "the rows of i in w_x have no use any more"
    zero, one = torch.zeros(4, 1), torch.ones(1, 1)
    latched = torch.tensor([0.0, -100.0, 100.0, 100.0])         # forget all: write all of g = 1
    near(lstm.plain_loop(one[None], zero, zero, latched, one, 5 * one, True)[1], one)
    assert not lstm.plain_loop(*inputs)[0].allclose(got[0][0])


def residual_cnn():
    """drop 0.5: in training each image goes either around the branch, or through it with twice its strength."""
    block, x = cnn.Bottleneck(16, 4, 16, drop=0.5), 100 + torch.rand(64, 16, 3, 3)            # no ReLU acts at the end
    torch.nn.init.ones_(block.bn3.weight)
    plain = cnn.Bottleneck(16, 4, 16)
    plain.load_state_dict(block.state_dict())
    branch, went = plain(x) - x, block(x) - x                                     # (64, 16, 3, 3)
    around = (went.abs().amax(dim=(1, 2, 3)) < 1e-3)
    through = ((went - 2 * branch).abs().amax(dim=(1, 2, 3)) < 1e-3)
    assert (around ^ through).all() and 10 < around.sum() < 54
    assert torch.equal(block.eval()(x), plain.eval()(x)), "in eval mode nothing changes"


def info_nce():
    """Each of the B x B pairs by itself: yes or no? Logits [[2, 0], [1, 0]] at scale ln 2, and a bias on all."""
    image_emb, text_emb = torch.tensor([[1.0, 0.0], [0.5, math.sqrt(0.75)]]), torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    for bias in (0.0, -1.5):
        cost = [math.log(1 + math.exp(-sign * (logit + bias))) for logit, sign in ((2, 1), (0, -1), (1, -1), (0, 1))]
        near(clip.sigmoid_loss(image_emb, text_emb, math.log(2), bias), sum(cost) / 2)
    torch.manual_seed(0)
    a, b = (F.normalize(torch.randn(8, 4), dim=-1) for _ in range(2))
    near(clip.sigmoid_loss(a[:1], b[:1], 0.0, 0.0), F.softplus(-(a[0] @ b[0])))


def one_cycle():
    """anneal "linear", equal to torch's."""
    assert schedule.one_cycle(5, 10, 1.0, anneal="linear") > 0
    for total, start in ((10, 0.3), (333, 0.5)):
        toy = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.9)
        theirs = torch.optim.lr_scheduler.OneCycleLR(toy, 0.03, total_steps=total, pct_start=start,
                                                     anneal_strategy="linear")
        for step in range(total):
            near(schedule.one_cycle(step, total, 0.03, start, anneal="linear"), toy.param_groups[0]["lr"])
            toy.step()
            if step + 1 < total:
                theirs.step()


def kv_cache():
    """Read three tokens, guess two, take the guess back, read two others: as if it had never been."""
    torch.manual_seed(0)
    block, x, guess = transformer.Block(SIZES, causal=True), torch.randn(2, 5, 12), torch.randn(2, 2, 12)
    cache = transformer.KVCache(1, 2, 8, "cpu")

    def read(part):
        cache.begin(part.size(1))
        return block(part, cache=cache)
    read(x[:, :3])
    read(guess)
    cache.undo(2)
    near(read(x[:, 3:]), block(x)[:, 3:])
    assert cache.lengths.tolist() == [5, 5]


def beam_search():
    """min_new_tokens: nothing ends before. With 40 beams over three words, the best of all such sentences is found."""
    from test_generate import EOS, Table, logp
    model = Table(V=3)
    for least in range(4):
        options = [(*s, EOS) for n in range(least, 4) for s in itertools.product((1, 2), repeat=n)]
        options += itertools.product((1, 2), repeat=4)
        best = max(options, key=lambda s: logp(model, 0, s))
        how = dict(eos_id=EOS, length_penalty=0.0, min_new_tokens=least)
        rows = generate.generate(model, torch.tensor([0]), [[1]], 4, num_beams=40, **how)
        assert rows == [[w for w in best if w != EOS]]
        assert len(generate.generate(model, torch.tensor([0]), [[1]], 4, **how)[0]) >= least, "greedy, too"


def bleu():
    """ "a b c d" against "a b x d", one added above and below for n = 2, 3, 4: 3/4, 2/4, 1/3, 1/2."""
    pair, p = (["a b c d"], [["a b x d"]]), [3 / 4, 2 / 4, 1 / 3, 1 / 2]
    near(metrics.bleu(*pair, smooth=1), [math.prod(p[:n]) ** (1 / n) for n in (1, 2, 3, 4)])
    assert metrics.bleu(*pair)[3] < 1e-3


def cider():
    """Without the D a caption may repeat itself: "red red dog dog" has the unigrams of "red dog" in proportion."""
    references = [["red dog"], ["blue cat"]]
    plain, strict = metrics.CiderD(references, d=False), metrics.CiderD(references)
    near(plain.score("red red dog dog", 0), 10 / 4 * (1 + 1 / math.sqrt(3)))
    assert strict.score("red red dog dog", 0) < plain.score("red red dog dog", 0)
    near(plain.score("red dog", 0), strict.score("red dog", 0))


def safetensors():
    """The header alone tells what a file holds: also where the file was cut off behind it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        files.save_safetensors({"b": torch.zeros(2, 3), "n": torch.tensor(7), "h": torch.ones(4).half()}, path,
                               {"made by": "us"})
        raw = path.read_bytes()
        path.write_bytes(raw[:8 + int.from_bytes(raw[:8], "little")])
        assert files.describe(path) == {"b": ("F32", [2, 3]), "n": ("I64", []), "h": ("F16", [4])}


def unfreezing():
    """The vision tower learns in epochs 1 to 3 only; what changes is reported, once."""
    from test_models import tiny
    model = tiny("cross")
    config = SimpleNamespace(unfreeze_decoder=0, unfreeze_vision=1, freeze_vision=3)
    story = []
    for epoch in (0, 0.5, 1, 2.9, 3, 7):
        changed = optimizer.unfreeze(model, config, epoch)
        story.append((changed, *({p.requires_grad for p in model.parts()[part]} for part in ("vision", "decoder"))))
    assert [row[1] for row in story] == [{False}, {False}, {True}, {True}, {False}, {False}], "freeze_vision"
    assert [row[0] for row in story] == [True, False, True, False, True, False], "True when something changed"
    assert all(row[2] == {True} for row in story), "the decoder obeys its own epoch only"


CHECKS = {check.__name__: check for check in (
    bpe, patch_embedding, attention, causal_mask, cross_attention, prefix_splice, lstm_gates, residual_cnn, info_nce,
    one_cycle, kv_cache, beam_search, bleu, cider, safetensors, unfreezing)}


def failure(name):
    """What is wrong, or None if the exercise is done."""
    torch.manual_seed(0)
    try:
        CHECKS[name]()
    except Exception as error:                                  # a missing argument is a TypeError, and so on
        return error


def main(names):
    if unknown := [name for name in names if name not in CHECKS]:
        sys.exit(f"there is no exercise {unknown[0]}; there are {', '.join(CHECKS)}")
    for name in names or CHECKS:
        error = failure(name)
        print(f"{name:16} " + ("done" if error is None else f"not yet: {type(error).__name__}: {str(error)[:90]!r}"))
        if names and error:
            raise error


if __name__ == "__main__":
    main(sys.argv[1:])
