"""Decoding, on a model of a few numbers whose every sentence can be counted, and on the real ones."""
import contextlib
import functools
import itertools
import math

import pytest
import torch

from test_models import IMAGE, tiny
from tinyvlm.generate import beam_search, filter_logits, generate, sample

EOS = 0


class Table(torch.nn.Module):
    """A language of V words: the next depends on the image, the place in the sentence and the last word, by a table."""
    def __init__(self, V=5, n_images=4, seed=0):
        super().__init__()
        rng = torch.Generator().manual_seed(seed)
        self.table = torch.nn.Parameter(1.5 * torch.randn(n_images, 8, V, V, generator=rng))

    @functools.cached_property
    def logp(self):
        return torch.log_softmax(self.table, -1).tolist()

    class State:
        def __init__(self, image):
            self.image, self.place = image, 0

        def reorder(self, rows):
            self.image = self.image[rows]

    def prefill(self, img, idx, lengths, max_new_tokens):
        return self.table[img, 0, idx[:, -1]], Table.State(img)

    def step(self, idx, state):
        state.place += 1
        return self.table[state.image, state.place, idx]


def logp(model, image, sentence, prompt=1):
    rows = model.logp[image]
    return sum(rows[t][a][b] for t, (a, b) in enumerate(zip([prompt, *sentence], sentence)))


def by_hand(model, image, K, steps, penalty, prompt=1):
    """Beam search in words: extend all, take the 2K best; those that end among the first K are finished, and so on."""
    V = model.table.size(-1)
    beams, finished = [((), 0.0)], []
    for t in range(1, steps + 1):
        options = [(s + (w,), logp(model, image, s + (w,), prompt)) for s, _ in beams for w in range(V)]
        options = sorted(options, key=lambda o: -o[1])[:2 * K]
        for rank, (s, p) in enumerate(options):
            if rank < K and (s[-1] == EOS or t == steps):
                finished.append((p / t ** penalty, s))
        finished = sorted(finished, key=lambda f: -f[0])[:K]
        beams = [o for o in options if o[0][-1] != EOS][:K]
        if len(finished) == K and beams[0][1] / t ** penalty <= finished[-1][0]:
            break
    best = list(finished[0][1])
    return best[:best.index(EOS)] if EOS in best else best


@pytest.mark.parametrize("K", [2, 3, 5])
@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("steps", [1, 3, 7])
def test_beam_search_equals_the_search_by_hand(K, penalty, steps):
    for seed in range(4):
        model, images = Table(seed=seed), torch.arange(4)                         # four images decode together
        out = generate(model, images, [[1]] * 4, steps, num_beams=K, eos_id=EOS, length_penalty=penalty)
        assert out == [by_hand(model, i, K, steps, penalty) for i in range(4)]


def test_an_exhaustive_beam_finds_the_best_of_all_sentences():
    """With nothing pruned (40 beams, 3 words, 4 steps) and no length penalty, beam search is plain maximisation."""
    for seed in range(5):
        model = Table(V=3, seed=seed)
        sentences = [(*s, EOS) for n in range(4) for s in itertools.product((1, 2), repeat=n)]
        sentences += list(itertools.product((1, 2), repeat=4))
        best = max(sentences, key=lambda s: logp(model, 0, s))
        assert generate(model, torch.tensor([0]), [[1]], 4, num_beams=40, eos_id=EOS, length_penalty=0.0)[0] \
            == [w for w in best if w != EOS]


def test_n_best_are_all_finished_sentences_the_best_first():
    """One step of five beams over five words is a sorted list."""
    model, images = Table(), torch.arange(4)
    rows = generate(model, images, [[1]] * 4, 1, num_beams=5, eos_id=EOS, n_best=True)
    for i, sentences in enumerate(rows):
        words = sorted(range(5), key=lambda w: -logp(model, i, (w,)))
        assert sentences == [[] if w == EOS else [w] for w in words]
    rows = generate(model, images, [[1]] * 4, 6, num_beams=3, eos_id=EOS, n_best=True)
    assert [row[0] for row in rows] == [by_hand(model, i, 3, 6, 1.0) for i in range(4)]
    assert all(len({*map(tuple, row)}) == len(row) == 3 for row in rows)
    assert generate(model, images, [[1]] * 4, 6, eos_id=EOS, n_best=True) == [
        [row] for row in generate(model, images, [[1]] * 4, 6, eos_id=EOS)]


@pytest.mark.parametrize("kind", ["cross", "prefix", "lstm"])
def test_images_and_prompts_decode_as_if_alone(kind):
    """Prompts of different length, reordered caches, shared image keys: each as it would come out by itself; and greedy
    as the slow way, which reads the whole row again for each token."""
    net, img = tiny(kind), torch.randn(3, 3, 16, 16)
    prompts = [[IMAGE, 5, 6, 7], [IMAGE], [IMAGE, 8]]
    for K in (1, 3):
        together = generate(net, img, prompts, 6, num_beams=K, eos_id=EOS)
        assert together == [generate(net, img[b:b + 1], [prompts[b]], 6, num_beams=K, eos_id=EOS)[0] for b in range(3)]
        for b in range(3 if K == 1 else 0):
            row = prompts[b][:]
            while len(row) < len(prompts[b]) + 6 and row[-1] != EOS:
                row.append(net(img[b:b + 1], torch.tensor([row]))[0][0, -1].argmax().item())
            assert together[b] == [token for token in row[len(prompts[b]):] if token != EOS]


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"temperature": 1.0}, {"temperature": 3.0, "top_k": 2}])
def test_forbidden_ids_are_as_good_as_not_in_the_vocabulary(how):
    """<image>, tags and rows of the matrix without a name were once produced. Forbidden ones, even the likeliest, must
    not be, and all else must come out as from a vocabulary without them: words 2 and 3 of a table of five."""
    for seed in range(4):
        model, small = Table(seed=seed), Table(V=3)
        model.table.data[..., 2:4] += 5
        keep = torch.tensor([0, 1, 4])
        small.table.data = model.table.data[:, :, keep][..., keep]
        images = torch.arange(4)
        out = generate(model, images, [[1]] * 4, 6, eos_id=EOS, forbidden=[2, 3, 99], **how)
        assert not {2, 3} & {token for row in out for token in row}
        if how.get("temperature", 0) == 0:
            expected = generate(small, images, [[1]] * 4, 6, eos_id=EOS, **how)
            assert out == [[[0, 1, 4][token] for token in row] for row in expected]
        assert generate(model, images, [[1]] * 4, 6, eos_id=EOS, **how) != out


@pytest.mark.parametrize("n, error", [(8, None), (9, RuntimeError)])
def test_the_host_waits_for_a_device_every_eighth_step_only(n, error):
    """Tensors of device "meta" have no values: bool, item and tolist are errors there. Eight steps of the model, its
    cache, drawing and beams need none; before the ninth one is read."""
    with torch.device("meta"):
        net = tiny("cross").text
        for K, temperature in ((1, 0.0), (1, 1.0), (3, 0.0)):
            ends = torch.full((2,), 3)
            logits, state = net.prefill(torch.zeros(2, 7, 16), torch.zeros(2, 3, dtype=torch.long), ends, n)
            step = lambda token: net.step(token, state)
            with pytest.raises(error) if error else contextlib.nullcontext():
                tokens = (beam_search(logits, step, state.reorder, n, K, EOS, 1.0)[:, 0] if K > 1 else
                          sample(logits, step, n, temperature, 5, 0.9, EOS))
                assert tokens.shape == (2, n)


def test_tokens_are_told_as_they_are_chosen():
    """A listener gets a column of ids a step and changes nothing; the rows it heard, up to an end, are the result."""
    model, images, heard = Table(seed=1), torch.arange(4), []
    for how in ({}, {"temperature": 1.0, "seed": 2}):
        heard.clear()
        out = generate(model, images, [[1]] * 4, 6, eos_id=EOS, on_token=heard.append, **how)
        assert out == generate(model, images, [[1]] * 4, 6, eos_id=EOS, **how)
        assert [[*itertools.takewhile(lambda i: i != EOS, row)] for row in zip(*heard)] == out
    heard.clear()
    generate(model, images, [[1]] * 4, 6, eos_id=EOS, num_beams=2, on_token=heard.append)
    assert not heard                                            # beams are chosen at the end


def test_top_p_worked_example():
    logits = torch.tensor([[0.15, 0.5, 0.05, 0.3]]).log()
    assert filter_logits(logits, top_p=0.7).isfinite().tolist() == [[False, True, False, True]]
    assert filter_logits(logits, top_p=0.5).isfinite().tolist() == [[False, True, False, False]]
    assert filter_logits(logits, top_p=1e-9).isfinite().sum() == 1                # never empty
    assert filter_logits(logits, top_p=0.0).isfinite().sum() == 1
    assert filter_logits(torch.tensor([[90.0, 0.0, 0.0]]), top_p=0.9).isfinite().sum() == 1
    assert filter_logits(logits, top_k=3).isfinite().tolist() == [[True, True, False, True]]
    assert filter_logits(logits, top_k=99).isfinite().all()


def test_sampling_follows_temperature():
    """4,000 draws of one word against softmax(logits / temperature): temperature is used, and used rightly."""
    model, n = Table(), 4000
    for temperature in (0.5, 1.0, 2.0):
        out = generate(model, torch.zeros(n, dtype=torch.long), [[1]] * n, 1, temperature=temperature, seed=3)
        seen = torch.tensor(out).flatten().bincount(minlength=5) / n
        wanted = (model.table[0, 0, 1] / temperature).softmax(-1)
        assert (seen - wanted).abs().max() < 4 * math.sqrt(0.25 / n)
        assert out == generate(model, torch.zeros(n, dtype=torch.long), [[1]] * n, 1, temperature=temperature, seed=3)
        torch.manual_seed(3)                                                      # torch.multinomial runs the same race
        drawn = torch.multinomial((model.table[0, 0, 1] / temperature).softmax(-1).expand(n, -1), 1)
        assert torch.tensor(out).equal(drawn)


def test_sampled_beams_are_refused():
    with pytest.raises(AssertionError, match="temperature 0"):
        generate(Table(), torch.tensor([0]), [[1]], 2, temperature=1.0, num_beams=2)
