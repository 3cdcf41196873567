"""The transformer's parts: attention, MLP, block, and the key/value cache. The only attention in the project.

From "Attention is all you need" (Vaswani et al. 2017, arXiv:1706.03762), in the pre-norm form of GPT-2: normalise,
transform, add; rotary positions are left out. The ViT, the GPT and CLIP's text tower are all stacks of `Block`:

    self-attention    q, k, v all come from x                      ViT: every patch attends to every patch
    causal            token t attends to tokens 0..t only          GPT: what follows is to be predicted
    cross-attention   q from x, but k and v from image features    captioner: every word attends to all patches
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from .config import UserError

ACTIVATIONS = {
    "gelu": F.gelu,                                             # exact, by erf: ViT, LAION's CLIP
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),       # GPT-2 (Hugging Face calls it gelu_new)
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),       # OpenAI's CLIP
}


def attend(q, k, v, mask=None):
    """Scaled dot-product attention, written out: the lesson, the oracle of the fused call, and the source of drawings.
    q (B, n_head, T, head_dim); k, v (B, n_head, S, head_dim); mask (.., T, S), True where attention is allowed.
    Returns the mixed values (B, n_head, T, head_dim) and the weights (B, n_head, T, S), whose rows sum to 1."""
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))    # (B, n_head, T, S)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = scores.softmax(dim=-1)
    return weights @ v, weights


def causal_mask(T, device=None):
    """Each token may attend to itself and all before: causal_mask(3) = [[1 0 0], [1 1 0], [1 1 1]]."""
    return torch.ones(T, T, dtype=torch.bool, device=device).tril()               # (T, T)


class KVCache:
    """Keys and values of the tokens a decoder has already read, so that each new token costs one step, not a re-read.

    Fixed size: per layer, buffers (B, n_head, max_len, head_dim), of which row b has filled the first lengths[b] slots.
    In rows that hold 2 and 1 tokens, of max_len 4, the next ones go to slots [2, 1], with mask [[1 1 1 0], [1 1 0 0]].
    So no shape says how far decoding is, and no step waits for the device. Prompts of different length are padded on
    the right; once they are read, `lengths` is set back to the true ones, and the padding is overwritten.
    cross_kv: the image's keys and values, made once."""
    def __init__(self, n_layer, B, max_len, device):
        self.max_len, self.lengths = max_len, torch.zeros(B, dtype=torch.long, device=device)
        self.self_kv, self.cross_kv = [None] * n_layer, [None] * n_layer

    def begin(self, T):
        """T more tokens in each row, before the layers append them: returns their positions (B, T)."""
        device = self.lengths.device
        self.slots = self.lengths[:, None] + torch.arange(T, device=device)       # (B, T)
        self.mask = torch.arange(self.max_len, device=device) <= self.slots[:, None, :, None]    # (B, 1, T, max_len)
        self.lengths = self.lengths + T
        return self.slots

    def append(self, layer, k, v):
        """Store k, v (B, n_head, T, head_dim); return all keys, all values (B, n_head, max_len, head_dim), the mask."""
        if self.self_kv[layer] is None:         # zeros, not empty: a masked slot counts 0 times, but 0 * NaN is NaN
            self.self_kv[layer] = [t.new_zeros(*t.shape[:2], self.max_len, t.size(-1)) for t in (k, v)]
        rows = torch.arange(len(k), device=k.device)[:, None]                     # (B, 1)
        for buffer, new in zip(self.self_kv[layer], (k, v)):
            buffer[rows, :, self.slots] = new.transpose(1, 2)                     # (B, T, n_head, head_dim)
        return *self.self_kv[layer], self.mask

    def reorder(self, rows):
        """Row i continues what was row rows[i]. cross_kv stays: an image's beams share its keys (see Attention)."""
        self.lengths = self.lengths[rows]
        self.self_kv = [[t.index_select(0, rows) for t in kv] for kv in self.self_kv]


class Attention(nn.Module):
    """Multi-head attention: n_head small attentions side by side, each on head_dim = n_embd / n_head channels.

    One matrix (3C, C) makes q, k and v, for self-attention in one product; cross-attention takes its first C rows for x
    and the other 2C for the image features. No dropout on the weights: it makes the fused call slow on a CPU."""
    def __init__(self, n_embd, n_head, causal=False):
        super().__init__()
        if n_embd % n_head:
            raise UserError(f"attention cannot divide {n_embd} channels among n_head {n_head}")
        self.n_head, self.causal = n_head, causal
        self.qkv = nn.Linear(n_embd, 3 * n_embd)
        self.proj = nn.Linear(n_embd, n_embd)
        self.keep_weights, self.weights = False, None           # set keep_weights to read the last weights, for drawing

    def forward(self, x, image_kv=None, cache=None, layer=0):
        """x (B, T, C) -> (B, T, C), attending to x itself or, across, to image_kv: what `keys_values` made."""
        B, T, C = x.shape
        mask, causal = None, self.causal and cache is None
        if image_kv is None:
            q, k, v = (self._heads(t) for t in self.qkv(x).split(C, dim=-1))      # (B, n_head, T, head_dim)
            if cache is not None:
                k, v, mask = cache.append(layer, k, v)                            # (B, n_head, max_len, head_dim)
        else:
            # an image's K captions (or beams) share its keys, as one long row:  (B, T, C) -> (B/K, K*T, C)
            k, v = image_kv                                                       # (B/K, n_head, N, head_dim)
            q = F.linear(x, self.qkv.weight[:C], self.qkv.bias[:C])               # (B, T, C)
            q = self._heads(q.reshape(k.size(0), -1, C))                          # (B/K, n_head, K*T, head_dim)
        if self.keep_weights:
            y, self.weights = attend(q, k, v, causal_mask(T, x.device) if causal else mask)
        else:               # the same in one fused call, which never writes the (T, S) scores to memory
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.proj(y.transpose(1, 2).reshape(B, T, C))                      # (B, T, C)

    def keys_values(self, feats):
        """Image features (B, N, C) -> the keys and values that cross-attention reads, each (B, n_head, N, head_dim)."""
        C = feats.size(-1)
        kv = F.linear(feats, self.qkv.weight[C:], self.qkv.bias[C:])              # (B, N, 2C)
        return tuple(self._heads(t) for t in kv.chunk(2, dim=-1))

    def _heads(self, t):
        return t.unflatten(-1, (self.n_head, -1)).transpose(1, 2)                 # (B, n_head, T, head_dim)


class MLP(nn.Module):
    """Two linear maps with a nonlinearity between: the part of a block that works on each position by itself."""
    def __init__(self, n_embd, n_hidden, activation):
        super().__init__()
        self.fc, self.proj = nn.Linear(n_embd, n_hidden), nn.Linear(n_hidden, n_embd)
        self.act = ACTIVATIONS[activation]

    def forward(self, x):
        return self.proj(self.act(self.fc(x)))                                    # (B, T, C)


class Block(nn.Module):
    """x + self-attention, then (with cross) + cross-attention, then + MLP, each on a normalised x.

    The output projection of the cross-attention starts at zero: a pretrained decoder that is given images predicts on
    the first step as it did before, and learns from there what to attend to. n_hidden None: 4 C."""
    def __init__(self, n_embd, n_head, causal=False, cross=False, activation="gelu_tanh", eps=1e-5, dropout=0.0,
                 n_hidden=None):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(n_embd, eps=eps), Attention(n_embd, n_head, causal)
        if cross:
            self.ln_cross, self.cross = nn.LayerNorm(n_embd, eps=eps), Attention(n_embd, n_head)
        self.ln_2, self.mlp = nn.LayerNorm(n_embd, eps=eps), MLP(n_embd, n_hidden or 4 * n_embd, activation)
        self.drop = nn.Dropout(dropout)

    def forward(self, x, feats=None, cache=None, layer=0):
        """x (B, T, C) -> (B, T, C). feats (B or B/K, N, C), for cross-attention: K rows may share an image.
        cache: a KVCache to read from and add to, at `layer`. Once it holds the image's keys, feats may be left out."""
        x = x + self.drop(self.attn(self.ln_1(x), cache=cache, layer=layer))      # (B, T, C)
        image_kv = None if feats is None else self.cross.keys_values(feats)
        if cache is not None:
            image_kv = cache.cross_kv[layer] = image_kv or cache.cross_kv[layer]
        if image_kv is not None:
            x = x + self.drop(self.cross(self.ln_cross(x), image_kv))             # (B, T, C)
        return x + self.drop(self.mlp(self.ln_2(x)))                              # (B, T, C)


def init_weights(model, n_layer):
    """GPT-2's initialisation: N(0, 0.02), and projections back into the residual stream shrunk by sqrt(2 n_layer), so
    that its variance does not grow with depth; the projection of a cross-attention starts at zero (see Block)."""
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding, nn.Conv2d)):
            std = 0.02 / math.sqrt(2 * n_layer) if name.endswith(".proj") and "blocks" in name else 0.02
            nn.init.zeros_(module.weight) if name.endswith("cross.proj") else nn.init.normal_(module.weight, std=std)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
