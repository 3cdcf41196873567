"""The transformer's parts: attention, MLP, block, and the key/value cache. The only attention in the project.

From "Attention is all you need" (Vaswani et al. 2017, arXiv:1706.03762), in the pre-norm form of GPT-2: normalise,
transform, add. The ViT, the GPT, CLIP's text tower and the bridges between picture and text are all stacks of `Block`;
they differ mainly in the kind of attention they use:

    self-attention    q, k, v all come from x                      ViT: every patch sees every patch
    causal            token t sees tokens 0..t only                GPT: nobody reads ahead
    cross-attention   q from x, but k and v from image features    captioner: every word looks at the picture

Left out: rotary positions, grouped heads, sliding windows. The published models rebuilt here use none of them.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from .linear import Linear, linear

ACTIVATIONS = {
    "gelu": F.gelu,                                             # exact, by erf: ViT, LAION's CLIP
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),       # GPT-2 (Hugging Face calls it gelu_new)
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),       # OpenAI's CLIP
}


def attend(q, k, v, mask=None):
    """Scaled dot-product attention, written out: the lesson, the oracle of the fused call, and the source of drawings.

    q (B, n_head, T, head_dim); k, v (B, n_head, S, head_dim); mask (..., T, S), True where looking is allowed.
    Returns the mixed values (B, n_head, T, head_dim) and the weights (B, n_head, T, S), whose rows sum to 1.
    """
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))    # (B, n_head, T, S)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = scores.softmax(dim=-1)                            # (B, n_head, T, S)
    return weights @ v, weights


def causal_mask(T, S, device=None):
    """Which of S positions each of the last T may look at: itself and everything before.

    >>> causal_mask(2, 3)               # two new tokens after one cached
    tensor([[ True,  True, False],
            [ True,  True,  True]])
    """
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(diagonal=S - T)    # (T, S)


class KVCache:
    """Keys and values of the tokens a decoder has already read, so that each new token costs one step, not a re-read.

    Self-attention: buffers (B, n_head, max_len, head_dim) per layer, filled from the left. Cross-attention: the image's
    keys and values, computed once. Rows may hold prompts of different length, padded on the right: give `lengths` (B,)
    to `finish_prompt`, and each row's next token overwrites its first padding slot, so positions stay gapless.
    """

    def __init__(self, n_layer, max_len):
        self.max_len = max_len
        self.length = 0                                         # slots in use in the longest row
        self.lengths = None                                     # (B,) true lengths, only when rows differ
        self.self_kv = [None] * n_layer
        self.cross_kv = [None] * n_layer
        self.feats = None                                       # its features: they tell a block there is a picture

    def positions(self, T, device):
        """Position numbers of the next T tokens: (T,), or (B, 1) when rows differ."""
        if self.lengths is None:
            return torch.arange(self.length, self.length + T, device=device)      # (T,)
        return self.lengths[:, None]                                              # (B, 1)

    def append(self, layer, k, v):
        """Store k, v (B, n_head, T, head_dim); return all keys and values and the mask of what may be seen, or None."""
        B, n_head, T, head_dim = k.shape
        end = self.length + T
        assert end <= self.max_len, f"the cache holds {self.max_len} tokens, {end} were given"
        if self.self_kv[layer] is None:
            # zeros, not empty: a masked slot counts 0 times its content, and 0 times a stray NaN would be NaN
            self.self_kv[layer] = [t.new_zeros(B, n_head, self.max_len, head_dim) for t in (k, v)]
        keys, values = self.self_kv[layer]
        mask = None
        if self.lengths is None:
            keys[:, :, self.length:end], values[:, :, self.length:end] = k, v
            if T > 1:
                mask = causal_mask(T, end, k.device)                              # (T, S)
        else:
            assert T == 1, f"rows of different length grow one token at a time, not {T}"
            rows = torch.arange(B, device=k.device)
            keys[rows, :, self.lengths], values[rows, :, self.lengths] = k[:, :, 0], v[:, :, 0]
            mask = torch.arange(end, device=k.device) <= self.lengths[:, None, None, None]   # (B, 1, 1, S)
        return keys[:, :, :end], values[:, :, :end], mask

    def advance(self, T):
        """All layers have appended T tokens."""
        self.length += T
        if self.lengths is not None:
            self.lengths = self.lengths + T

    def finish_prompt(self, lengths):
        """After a prompt padded on the right: row b really ends at lengths[b] (None: all are full). Returns self."""
        self.lengths = lengths
        return self

    def reorder(self, rows):
        """Row i continues what was row rows[i]: beams that won, or one row copied to several. rows (B',)."""
        def pick(buffer):
            if len(rows) != len(buffer):
                return buffer.index_select(0, rows)
            buffer[:, :, :self.length] = buffer[:, :, :self.length].index_select(0, rows)
            return buffer
        self.self_kv = [None if kv is None else [pick(t) for t in kv] for kv in self.self_kv]
        if self.lengths is not None:
            self.lengths = self.lengths[rows]
        # cross_kv stays: beams never leave their image, and attention folds them onto the one set of image keys


class Packed:
    """Texts that go on from one beginning, in one row: [beginning | a text | another | ..]. Keeps no keys or values.

    Stands where a KVCache would: it tells each token its position and whom it may see. A text sees the beginning and
    itself, as if it stood there alone, so the beginning (a picture of 64 or 196 tokens) is computed once for all.
    pos (B, L): a token's position if its text followed the beginning alone; owner (B, L): its text, or -1 (beginning).

    >>> Packed(torch.tensor([[0, 1, 2, 1, 2]]), torch.tensor([[-1, 0, 0, 1, 1]])).mask[0, 0].int()
    tensor([[1, 0, 0, 0, 0],
            [1, 1, 0, 0, 0],
            [1, 1, 1, 0, 0],
            [1, 0, 0, 1, 0],
            [1, 0, 0, 1, 1]], dtype=torch.int32)
    """

    feats = None                                                # as in a KVCache; GPT.hidden writes it

    def __init__(self, pos, owner):
        self.pos = pos
        mine = (owner[:, :, None] == owner[:, None]) | (owner[:, None] == -1)     # (B, L, L): may row see column?
        self.mask = (mine & (pos[:, :, None] >= pos[:, None]))[:, None]           # (B, 1, L, L)

    def positions(self, T, device):
        return self.pos

    def append(self, layer, k, v):
        return k, v, self.mask

    def advance(self, T):
        pass


class Attention(nn.Module):
    """Multi-head attention: n_head small attentions side by side, each on head_dim = n_embd / n_head channels.

    causal: token t attends to tokens 0..t. Dropout acts on what a block adds (see Block), not on the weights in here:
    the fused call is several times slower with it on a CPU.
    One weight matrix (3C, C) makes q, k and v: rows 0..C-1 the query, then key, then value. Self-attention uses it in
    one product; cross-attention takes the query rows for x and the rest for the image features. K, below, counts the
    captions (or beams) of one image.
    """

    def __init__(self, n_embd, n_head, causal=False):
        super().__init__()
        assert n_embd % n_head == 0, f"n_embd {n_embd} does not divide into {n_head} heads"
        self.n_head, self.causal = n_head, causal
        self.qkv = Linear(n_embd, 3 * n_embd)
        self.proj = Linear(n_embd, n_embd)
        self.keep_weights, self.weights = False, None           # set keep_weights to read the last weights, for drawing

    def forward(self, x, feats=None, cache=None, layer=0):
        """x (B, T, C) -> (B, T, C). feats (B or B/K, N, C): attend to these instead (K captions may share an image)."""
        B, T, C = x.shape
        if feats is None:
            q, k, v = (self._heads(t) for t in self.qkv(x).split(C, dim=-1))      # (B, n_head, T, head_dim)
            k, v, mask = (k, v, None) if cache is None else cache.append(layer, k, v)
            y = self._mix(q, k, v, mask, self.causal and cache is None)           # (B, n_head, T, head_dim)
        else:
            w_q, w_kv = self.qkv.weight.split([C, 2 * C])                         # (C, C), (2C, C)
            b_q, b_kv = self.qkv.bias.split([C, 2 * C])
            q = linear(x, w_q, b_q)                                               # (B, T, C)
            k, v = self._image_kv(feats, w_kv, b_kv, cache, layer)                # (B/K, n_head, N, head_dim)
            # Nothing is causal between words and patches, so the K captions (or beams) of an image can stand in one
            # row and read its keys once:  (B, T, C) -> (B/K, K*T, C)
            q = self._heads(q.reshape(k.size(0), -1, C))                          # (B/K, n_head, K*T, head_dim)
            y = self._mix(q, k, v, None, False)                                   # (B/K, n_head, K*T, head_dim)
        return self.proj(y.transpose(1, 2).reshape(B, T, C))                      # (B, T, C)

    def _heads(self, t):
        B, T, C = t.shape
        return t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)        # (B, n_head, T, head_dim)

    def _image_kv(self, feats, weight, bias, cache, layer):
        if cache is not None and cache.cross_kv[layer] is not None:
            return cache.cross_kv[layer]
        kv = linear(feats, weight, bias)                                          # (B, N, 2C)
        kv = tuple(self._heads(t) for t in kv.chunk(2, dim=-1))                   # 2 x (B, n_head, N, head_dim)
        if cache is not None:
            cache.cross_kv[layer] = tuple(t.contiguous() for t in kv)
        return kv

    def _mix(self, q, k, v, mask, causal):
        if self.keep_weights:
            mask = causal_mask(q.size(-2), k.size(-2), q.device) if causal else mask
            y, self.weights = attend(q, k, v, mask)
            return y
        # the same in one fused call that never writes the (T, S) scores to memory
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)


class MLP(nn.Module):
    """Two linear maps with a bend between: the part of a block that thinks about one position at a time."""

    def __init__(self, n_embd, n_hidden, activation="gelu_tanh"):
        super().__init__()
        self.fc = Linear(n_embd, n_hidden)
        self.proj = Linear(n_hidden, n_embd)
        self.act = ACTIVATIONS[activation]

    def forward(self, x):
        return self.proj(self.act(self.fc(x)))                                    # (B, T, C)


class Block(nn.Module):
    """x + self-attention, then (in a decoder that sees) + cross-attention, then + MLP, each on a normalised x.

    cross: add the cross-attention. Its output projection starts at zero, so a pretrained decoder given new eyes
    speaks exactly as before on the first step and learns from there what to look at.
    """

    def __init__(self, n_embd, n_head, causal=False, cross=False, activation="gelu_tanh", eps=1e-5, dropout=0.0,
                 n_hidden=None):
        super().__init__()
        self.ln_1 = nn.LayerNorm(n_embd, eps=eps)
        self.attn = Attention(n_embd, n_head, causal)
        if cross:
            self.ln_cross = nn.LayerNorm(n_embd, eps=eps)
            self.cross = Attention(n_embd, n_head)
        self.ln_2 = nn.LayerNorm(n_embd, eps=eps)
        self.mlp = MLP(n_embd, n_hidden or 4 * n_embd, activation)
        self.drop = nn.Dropout(dropout)

    def forward(self, x, feats=None, cache=None, layer=0):
        """x (B, T, C); feats (B or B/K, N, C) only where the block has cross-attention."""
        x = x + self.drop(self.attn(self.ln_1(x), cache=cache, layer=layer))      # (B, T, C)
        if feats is not None:
            x = x + self.drop(self.cross(self.ln_cross(x), feats, cache, layer))  # (B, T, C)
        return x + self.drop(self.mlp(self.ln_2(x)))                              # (B, T, C)


def init_weights(model, n_layer):
    """GPT-2's initialisation: N(0, 0.02), and projections back into the residual stream shrunk by sqrt(2 n_layer),

    so that the stream's variance does not grow with depth; cross-attention's projection starts at zero (see Block).
    """
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding, nn.Conv2d)):
            std = 0.02 / math.sqrt(2 * n_layer) if name.endswith(".proj") and "blocks" in name else 0.02
            nn.init.zeros_(module.weight) if name.endswith("cross.proj") else nn.init.normal_(module.weight, std=std)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
