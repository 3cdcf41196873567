"""Decoding: from a picture and the first tokens to whole sentences. One implementation for every model.

A model takes part by offering three things (see vlm.py):
    prefill(img, idx, lengths, max_new_tokens) -> logits (B, V), state      look at the image, read the prompt, once
    step(idx (R,), state) -> logits (R, V)                                  read one more token in each of R rows
    state.reorder(rows (R',))                                               row i continues what was row rows[i]
Everything else, greedy, temperature, top-k, top-p (Holtzman et al. 2019, arXiv:1904.09751) and beam search, sees only
numbers over the vocabulary. Beams are scored as transformers scores them. Left out: repetition penalties, constraints.
"""
import torch
import torch.nn.functional as F

NEVER = -1e9    # a score no real sentence has; finite, because -inf - -inf is not a number


@torch.inference_mode()
def generate(model, img, idx, max_new_tokens, temperature=0.0, top_k=None, top_p=None, num_beams=1, eos_id=None,
             length_penalty=1.0, seed=None, guidance=0.0):
    """Continue each prompt; all images of the batch decode together.

    img: (B, 3, H, W) or features, or None for a model that sees nothing. idx: prompts, a (B, T) tensor or a list of B
    lists of ids, which may differ in length. temperature 0 takes the likeliest token every time (greedy); above 0 draws
    from softmax(logits / temperature), kept to the top_k likeliest and to the smallest set with probability top_p.
    num_beams > 1 searches for the sentence with the best sum of log-probabilities / length ** length_penalty instead.
    guidance > 0 favours what is particular to the image: see Guided. Takes twice the time.
    Returns B lists of new ids, without the prompt and without eos_id.
    """
    assert num_beams > 0 and max_new_tokens > 0, f"num_beams {num_beams}, max_new_tokens {max_new_tokens}: both above 0"
    assert num_beams == 1 or temperature == 0, "beam search is not sampled: use temperature 0, or num_beams 1"
    device = next(model.parameters()).device
    idx, lengths = pad_prompts(idx, device)
    model = Guided(model, guidance) if guidance else model
    logits, state = model.prefill(img, idx, lengths, max_new_tokens)              # (B, V)
    if num_beams > 1:
        tokens = beam_search(model, logits, state, max_new_tokens, num_beams, eos_id, length_penalty)
    else:
        tokens = sample(model, logits, state, max_new_tokens, temperature, top_k, top_p, eos_id, seed)
    rows = tokens.tolist()                                                        # the one copy to the host
    return [row[:row.index(eos_id)] if eos_id in row else row for row in rows]


class Guided:
    """A model whose scores are moved away from what it would say of a blank picture.

    score = log p(word | image) + guidance * (log p(word | image) - log p(word | blank))

    Words that any picture might get ("a man in a blue shirt") lose, those that this one makes likelier gain. Guidance
    of captions is by Kornblith et al. 2023 (arXiv:2307.16686); they train with some pictures left out, we show a blank
    one, 0 after normalisation, as in visual contrastive decoding (Leng et al. 2023, arXiv:2311.16922).
    With guidance 1, p = .5 here and .5 on a blank: log .5 + 0; .3 here and .1 on a blank: log .3 + log 3 = log .9.
    """

    def __init__(self, model, guidance):
        self.model, self.guidance = model, guidance

    def mix(self, logits, blank):
        """(R, V), (R, V) -> (R, V)."""
        here, blank = (F.log_softmax(x.float(), dim=-1) for x in (logits, blank))
        return here + self.guidance * (here - blank)

    def prefill(self, img, idx, lengths, max_new_tokens):
        logits, state = self.model.prefill(img, idx, lengths, max_new_tokens)     # (B, V)
        blank, other = self.model.prefill(torch.zeros_like(img), idx, lengths, max_new_tokens)
        return self.mix(logits, blank), TwoStates(state, other)

    def step(self, idx, states):
        return self.mix(self.model.step(idx, states.state), self.model.step(idx, states.other))


class TwoStates:
    """The states of the same sentences beside the image and beside a blank."""

    def __init__(self, state, other):
        self.state, self.other = state, other

    def reorder(self, rows):
        self.state.reorder(rows)
        self.other.reorder(rows)


def pad_prompts(idx, device):
    """Prompts -> idx (B, T) padded on the right, and their lengths (B,), or None when all are equally long."""
    if torch.is_tensor(idx):
        return idx.to(device), None
    lengths = [len(row) for row in idx]
    assert lengths and min(lengths) > 0, "a prompt needs at least one token, to predict the next from"
    padded = torch.tensor([row + [0] * (max(lengths) - len(row)) for row in idx], device=device)   # (B, T)
    return padded, None if min(lengths) == max(lengths) else torch.tensor(lengths, device=device)


def filter_logits(logits, top_k=None, top_p=None):
    """Set all but the likeliest tokens to -inf. logits (B, V) -> (B, V).

    top_k keeps the k likeliest. top_p keeps the shortest list, from the top, whose probability reaches p:
    probabilities .5 .3 .15 .05 with top_p 0.7 keep the first two (.5 is not enough, .5 + .3 is).
    """
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]             # (B, 1)
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)                     # (B, V)
        probs = ordered.softmax(dim=-1)
        before = probs.cumsum(dim=-1) - probs                 # probability of everything likelier than this token
        drop = (before >= top_p).scatter(1, order, before >= top_p)               # back to vocabulary order
        drop.scatter_(1, order[:, :1], False)                 # the likeliest always stays
        logits = logits.masked_fill(drop, float("-inf"))
    return logits


def sample(model, logits, state, max_new_tokens, temperature, top_k, top_p, eos_id, seed=None):
    """One token at a time, the likeliest or drawn. Returns ids (B, T_new); rows are filled with eos_id once done."""
    rng = None if seed is None else torch.Generator(logits.device).manual_seed(seed)
    done = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)       # (B,)
    tokens = []
    for step in range(max_new_tokens):
        if temperature == 0:
            token = logits.argmax(dim=-1)                                         # (B,)
        else:
            probs = filter_logits(logits.float() / temperature, top_k, top_p).softmax(dim=-1)
            token = torch.multinomial(probs, 1, generator=rng).squeeze(1)         # (B,)
        if eos_id is not None:
            token = torch.where(done, eos_id, token)
            done |= token == eos_id
        tokens.append(token)
        if step + 1 == max_new_tokens or (eos_id is not None and _worth_asking(step, done) and done.all()):
            break
        logits = model.step(token, state)                                         # (B, V)
    return torch.stack(tokens, dim=1)                                             # (B, T_new)


def _worth_asking(step, tensor):
    """Reading a value off a GPU makes the host wait for it, so there the loop asks "all done?" every 8th step only."""
    return not tensor.is_cuda or step % 8 == 7


def beam_search(model, logits, state, max_new_tokens, K, eos_id, length_penalty=1.0):
    """Keep the K best unfinished sentences of each image; remember the K best finished ones. Returns ids (B, T_new).

    Each step extends all K beams by all V tokens and takes the 2K best of the K * V sums of log-probabilities, so that
    K unfinished ones remain even if the other K just ended. One that ends among the first K is finished, with score
    sum / length ** length_penalty (its end token counts). An image stops when it has K finished sentences and its best
    open beam, divided by the length so far, is below the worst of them. Beams cut off by max_new_tokens are scored as
    they stand, so a search in which nothing ended returns the best open beam.

    K=2 after "a", with log p: "dog" -.2, "cat" -1.9; then "dog" -> "." -.1, "runs" -2.4; "cat" -> "." -.3: the sums are
    "dog ." -.3 (finished, -.3 / 2), "cat ." -2.2 (finished), "dog runs" -2.6 (stays open).
    """
    B, V = logits.shape
    device = logits.device
    total = torch.full((B, K), NEVER, device=device)                              # (B, K) sums of open beams
    total[:, 0] = 0.0                                         # all beams start equal: extend only one of them
    tokens = torch.zeros(B, K, 0, dtype=torch.long, device=device)                # (B, K, t)
    best = torch.full((B, K), NEVER, device=device)                               # (B, K) scores of finished ones
    best_tokens = torch.full((B, K, max_new_tokens), eos_id or 0, device=device)  # (B, K, T_new)
    active = torch.ones(B, 1, dtype=torch.bool, device=device)                    # (B, 1) images still searching
    first_row = torch.arange(B, device=device)[:, None] * K                       # (B, 1)
    state.reorder(torch.arange(B, device=device).repeat_interleave(K))
    logits = logits.repeat_interleave(K, dim=0)                                   # (B * K, V)
    for step in range(max_new_tokens):
        sums = total[:, :, None] + F.log_softmax(logits.float(), dim=-1).view(B, K, V)   # (B, K, V)
        sums, flat = sums.flatten(1).topk(2 * K)                                  # (B, 2K)
        parent, token = flat // V, flat % V                                       # (B, 2K)
        grown = torch.cat([_take(tokens, parent), token[:, :, None]], dim=2)      # (B, 2K, t + 1)
        ended = token == eos_id if eos_id is not None else torch.zeros_like(token, dtype=torch.bool)
        if step + 1 == max_new_tokens:
            ended = torch.ones_like(ended)

        # the finished: old and new compete for K places
        score = sums / (step + 1) ** length_penalty
        score = score.masked_fill(~(ended & active), NEVER)
        score[:, K:] = NEVER                                  # candidates beyond the first K are only a reserve
        padded = F.pad(grown, (0, max_new_tokens - step - 1), value=eos_id or 0)  # (B, 2K, T_new)
        best, order = torch.cat([best, score], dim=1).topk(K)                     # (B, K)
        best_tokens = _take(torch.cat([best_tokens, padded], dim=1), order)       # (B, K, T_new)

        # the open: the K best that did not end
        total, order = sums.masked_fill(ended, NEVER).topk(K)                     # (B, K)
        tokens, parent = _take(grown, order), parent.gather(1, order)             # (B, K, t + 1), (B, K)
        full = best[:, -1:] > NEVER / 2                                           # (B, 1) K finished sentences
        active = active & ~(full & (total[:, :1] / (step + 1) ** length_penalty <= best[:, -1:]))
        if step + 1 == max_new_tokens or (_worth_asking(step, active) and not active.any()):
            break
        state.reorder((first_row + parent).flatten())
        logits = model.step(tokens[:, :, -1].flatten(), state)                    # (B * K, V)
    return best_tokens[:, 0]                                                      # (B, T_new)


def _take(rows, order):
    """rows (B, K, T), order (B, M) -> (B, M, T): the chosen rows of each image."""
    return rows.gather(1, order[:, :, None].expand(-1, -1, rows.size(2)))
