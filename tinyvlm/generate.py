"""Decoding: from an image and the first tokens to whole sentences. One implementation for every model.

A model takes part by offering three things (see vlm.py):
    prefill(img, idx, lengths, max_new_tokens) -> logits (B, V), state      encode the image, read the prompt, once
    step(idx (R,), state) -> logits (R, V)                                  read one more token in each of R rows
    state.reorder(rows (R',))                                               row i continues what was row rows[i]"""
import torch
import torch.nn.functional as F

NEVER = -1e9    # a score no real sentence has; finite, because -inf - -inf is not a number


@torch.inference_mode()
def generate(model, img, idx, max_new_tokens, temperature=0.0, top_k=None, top_p=None, num_beams=1, eos_id=None,
             length_penalty=1.0, n_best=False, seed=None, forbidden=(), on_token=None):
    """Continue B prompts of ids, of any lengths, together -> B lists of new ids, without eos_id, and never `forbidden`.
    img: (B, 3, H, W) or features, or None for a model without images. temperature 0 takes the likeliest token every
    time (greedy); above 0 draws from softmax(logits / temperature), kept to the top_k likeliest and to the smallest set
    with probability top_p. num_beams > 1 searches for the best sum of log-probabilities / length ** length_penalty, and
    n_best gives, in place of each image's best sentence, the list of all num_beams, best first.
    on_token: called with each step's B ids as they are chosen, eos_id behind an end; beams are chosen at the end."""
    assert num_beams == 1 or temperature == 0, "beam search is not sampled: use temperature 0, or num_beams 1"
    device, end = next(model.parameters()).device, -1 if eos_id is None else eos_id        # no token is -1
    lengths = [len(row) for row in idx]
    assert min(lengths) > 0, "a prompt needs at least one token, to predict the next from"
    idx = torch.tensor([list(row) + [0] * (max(lengths) - len(row)) for row in idx], device=device)        # (B, T)
    lengths = torch.tensor(lengths, device=device)
    logits, state = model.prefill(img, idx, lengths, max_new_tokens)              # (B, V)
    never = torch.tensor([i for i in forbidden if i < logits.size(1)], dtype=torch.long, device=device)
    allowed = lambda logits: logits.index_fill(1, never, float("-inf"))
    step = lambda token: allowed(model.step(token, state))                        # (R,) -> (R, V)
    if num_beams > 1:
        tokens = beam_search(allowed(logits), step, state.reorder, max_new_tokens, num_beams, end, length_penalty)
        tokens = tokens if n_best else tokens[:, 0]                               # (B, K, T_new) or (B, T_new)
    else:
        tokens = sample(allowed(logits), step, max_new_tokens, temperature, top_k, top_p, end, seed, on_token)
    rows = [row[:row.index(end)] if end in row else row for row in tokens.flatten(0, -2).tolist()]
    return [rows[k:k + num_beams] for k in range(0, len(rows), num_beams)] if n_best else rows


def filter_logits(logits, top_k=None, top_p=None):
    """Set all but the likeliest tokens to -inf: logits (B, V) -> (B, V). top_k keeps k, top_p (Holtzman et al. 2019,
    arXiv:1904.09751) as many as reach probability p together: of .5 .3 .15 .05, top_p 0.7 keeps the first two."""
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]             # (B, 1)
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if top_p is not None:
        probs, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
        before = probs.cumsum(dim=-1) - probs                 # probability of everything likelier than this token
        drop = (before >= top_p) & (before > 0)               # the likeliest always stays
        logits = logits.masked_fill(drop.scatter(1, order, drop), float("-inf"))  # back to vocabulary order
    return logits


def sample(logits, step, max_new_tokens, temperature, top_k, top_p, end, seed=None, on_token=None):
    """One token at a time, the likeliest or drawn -> ids (B, T_new), filled with `end` once done. A draw from p is the
    argmax of p / e, each e exponentially distributed: torch.multinomial's way, but without waiting for a GPU."""
    rng = None if seed is None else torch.Generator(logits.device).manual_seed(seed)
    done, tokens = torch.zeros(len(logits), dtype=torch.bool, device=logits.device), []
    for n in range(1, max_new_tokens + 1):
        if temperature > 0:
            probs = filter_logits(logits.float() / temperature, top_k, top_p).softmax(dim=-1)
            logits = probs / torch.empty_like(probs).exponential_(generator=rng)
        token = torch.where(done, end, logits.argmax(dim=-1))
        done |= token == end
        tokens.append(token)
        if on_token:                                          # reading a token waits for the device: only if asked to
            on_token(token.tolist())
        if n == max_new_tokens or (n % 8 == 0 or done.is_cpu) and done.all():     # seldom wait for a GPU
            break
        logits = step(token)
    return torch.stack(tokens, dim=1)                                             # (B, T_new)


def beam_search(logits, step, reorder, max_new_tokens, K, end, length_penalty):
    """Keep the K best unfinished sentences of each image; remember the K best finished ones: (B, K, T_new).
    Of the K * V ways to extend the beams by a token the 2K best are taken, so that K unfinished ones remain. One that
    ends (or is cut off) among the first K is finished, with score sum / length ** length_penalty, its end token
    counted. An image stops when its best open beam, at the length so far, is below the worst of K finished ones: as in
    transformers. K=2 after "a", with log p: "dog" -.2, "cat" -1.9; then "dog" -> "." -.1, "runs" -2.4; "cat" -> "."
    -.3: the sums are "dog ." -.3 (finished, -.3 / 2), "cat ." -2.2 (finished), "dog runs" -2.6 (stays open)."""
    (B, V), device = logits.shape, logits.device
    total = torch.full((B, K), NEVER, device=device)          # sums of open beams
    total[:, 0] = 0.0                                         # all beams start equal: extend only one of them
    tokens = torch.full((B, K, max_new_tokens), end, device=device)
    best, best_tokens = torch.full_like(total, NEVER), tokens                     # finished sentences
    active = torch.ones(B, 1, dtype=torch.bool, device=device)                    # images still searching
    image = torch.arange(B, device=device).repeat_interleave(K)                    # (B * K,) of each beam
    reorder(image)
    logits = logits[image]
    for n in range(1, max_new_tokens + 1):
        sums = total[:, :, None] + F.log_softmax(logits.float(), dim=-1).view(B, K, V)
        sums, flat = sums.flatten(1).topk(2 * K)                                  # (B, 2K), and the next three
        parent, token = flat // V, flat % V
        ended = (token == end) | (n == max_new_tokens)
        extended = tokens.take_along_dim(parent[:, :, None], dim=1)               # (B, 2K, T_new)
        extended[:, :, n - 1] = token
        # the finished: old and new compete for K places
        score = (sums / n ** length_penalty).masked_fill(~(ended & active), NEVER)
        score[:, K:] = NEVER                                  # candidates beyond the first K are only a reserve
        best, order = torch.cat([best, score], dim=1).topk(K)
        best_tokens = torch.cat([best_tokens, extended], dim=1).take_along_dim(order[:, :, None], dim=1)
        # the open: the K best that did not end
        total, order = sums.masked_fill(ended, NEVER).topk(K)
        tokens, parent = extended.take_along_dim(order[:, :, None], dim=1), parent.gather(1, order)
        worst = best[:, -1:]                                  # NEVER, until K are finished
        active = active & ~((worst > NEVER / 2) & (total[:, :1] / n ** length_penalty <= worst))
        if n == max_new_tokens or (n % 8 == 0 or active.is_cpu) and not active.any():
            break
        reorder(image * K + parent.flatten())
        logits = step(tokens[:, :, n - 1].flatten())                              # (B * K, V)
    return best_tokens                                                            # (B, K, T_new)
