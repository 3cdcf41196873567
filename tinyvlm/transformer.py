"""The transformer's parts: attention, MLP, block, and the key/value cache. The only attention in the project.

From "Attention is all you need" (Vaswani et al. 2017, arXiv:1706.03762), in the pre-norm form of GPT-2: normalise,
transform, add; rotary positions are left out. The ViT, the GPT and CLIP's text tower are all stacks of `Block`:

    self-attention    q, k, v all come from x                      ViT: every patch attends to every patch
    causal            mask [[1 0 0], [1 1 0], [1 1 1]]             GPT: token t attends to tokens 0..t only
    cross-attention   q from x, but k and v from image features    captioner: every word attends to all patches"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from .config import UserError

ACTIVATIONS = {
    "gelu": F.gelu,                                             # exact, by erf: ViT, LAION's CLIP
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),       # GPT-2 (Hugging Face calls it gelu_new)
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x)}       # OpenAI's CLIP


def attend(q, k, v, mask=None):
    """Scaled dot-product attention, written out: q (B, n_head, T, head_dim), k and v (B, n_head, S, head_dim), mask
    (.., T, S), True where attention is allowed -> mixed values (B, n_head, T, head_dim), weights (B, n_head, T, S)."""
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))    # (B, n_head, T, S)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = scores.softmax(dim=-1)                                              # rows sum to 1
    return weights @ v, weights


class KVCache:
    """Keys and values of the tokens a decoder has read, so that each new token costs one step; the image's, made once.
    Per layer, buffers (B, n_head, max_len, head_dim), of which row b has filled the first lengths[b] slots: no shape
    says how far decoding is. In rows that hold 2 and 1 tokens, of max_len 4, the next go to slots [2, 1], with mask
    [[1 1 1 0], [1 1 0 0]]. Prompts of different length are padded on the right; once they are read, `lengths` is set
    back to the true ones, and the padding is overwritten."""
    def __init__(self, n_layer, B, max_len, device):
        self.max_len, self.lengths = max_len, torch.zeros(B, dtype=torch.long, device=device)
        self.self_kv, self.cross_kv = [None] * n_layer, [None] * n_layer

    def begin(self, T):
        """T more tokens in each row, before the layers append them: returns their positions (B, T)."""
        places = torch.arange(self.max_len, device=self.lengths.device)
        self.slots = self.lengths[:, None] + places[:T]                           # (B, T)
        self.mask = places <= self.slots[:, None, :, None]                        # (B, 1, T, max_len)
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
    """n_head attentions side by side, each on head_dim = n_embd / n_head channels. One matrix (3C, C) makes q, k and v,
    for self-attention in one product; cross-attention takes its first C rows for x and the others for the image's
    features. No dropout on the weights: it makes the fused call slow on a CPU."""
    def __init__(self, n_embd, n_head, causal=False):
        super().__init__()
        if n_embd % n_head:
            raise UserError(f"attention cannot divide {n_embd} channels among n_head {n_head}")
        self.n_head, self.causal, self.keep_weights = n_head, causal, False       # True: keep .weights, for drawing
        self.qkv, self.proj = nn.Linear(n_embd, 3 * n_embd), nn.Linear(n_embd, n_embd)

    def forward(self, x, image_kv=None, cache=None, layer=0):
        """x (B, T, C) -> (B, T, C), attending to x itself or, across, to image_kv: what `keys_values` made."""
        B, T, C = x.shape
        mask, causal = None, self.causal and cache is None
        if image_kv is None:
            q, k, v = (self._heads(t) for t in self.qkv(x).split(C, dim=-1))      # (B, n_head, T, head_dim)
            if cache is not None:
                k, v, mask = cache.append(layer, k, v)                            # (B, n_head, max_len, head_dim)
        else:                   # an image's K captions (or beams) share its keys, as one long row
            k, v = image_kv                                                       # (B/K, n_head, N, head_dim)
            q = F.linear(x, self.qkv.weight[:C], self.qkv.bias[:C])               # (B, T, C)
            q = self._heads(q.reshape(k.size(0), -1, C))                          # (B/K, n_head, K*T, head_dim)
        if self.keep_weights:
            mask = torch.ones(T, T, dtype=torch.bool, device=x.device).tril() if causal else mask      # (T, T)
            y, self.weights = attend(q, k, v, mask)
        else:                   # the same in one fused call, which never writes the (T, S) scores to memory
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.proj(y.transpose(1, 2).reshape(B, T, C))                      # (B, T, C)

    def keys_values(self, feats):
        """Image features (B, N, C) -> the keys and values that cross-attention reads, each (B, n_head, N, head_dim)."""
        C = feats.size(-1)
        k, v = F.linear(feats, self.qkv.weight[C:], self.qkv.bias[C:]).split(C, dim=-1)          # (B, N, C)
        return self._heads(k), self._heads(v)

    def _heads(self, t):
        return t.unflatten(-1, (self.n_head, -1)).transpose(1, 2)                 # (B, n_head, T, head_dim)


class MLP(nn.Module):
    """Two linear maps with a nonlinearity between: the part of a block that works on each position by itself."""
    def __init__(self, c):
        super().__init__()
        C, C_mid = c.n_embd, c.n_hidden or 4 * c.n_embd
        self.fc, self.proj, self.act = nn.Linear(C, C_mid), nn.Linear(C_mid, C), ACTIVATIONS[c.activation]

    def forward(self, x):
        return self.proj(self.act(self.fc(x)))                                    # (B, T, C)


class Block(nn.Module):
    """x + self-attention, then (with cross) + cross-attention, then + MLP, each on a normalised x. c: the GPTConfig or
    ViTConfig that it is a block of."""
    def __init__(self, c, causal=False, cross=False):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(c.n_embd, eps=c.eps), Attention(c.n_embd, c.n_head, causal)
        if cross:
            self.ln_cross, self.cross = nn.LayerNorm(c.n_embd, eps=c.eps), Attention(c.n_embd, c.n_head)
        self.ln_2, self.mlp = nn.LayerNorm(c.n_embd, eps=c.eps), MLP(c)
        self.drop = nn.Dropout(c.dropout)

    def forward(self, x, feats=None, cache=None, layer=0):
        """x (B, T, C) -> (B, T, C). feats (B or B/K, N, C), of which K rows may share one, for cross-attention; left
        out once the cache, which is read and added to at `layer`, holds the image's keys."""
        x = x + self.drop(self.attn(self.ln_1(x), cache=cache, layer=layer))      # (B, T, C)
        image_kv = None if feats is None else self.cross.keys_values(feats)
        if cache is not None:
            image_kv = cache.cross_kv[layer] = image_kv or cache.cross_kv[layer]
        if image_kv is not None:
            x = x + self.drop(self.cross(self.ln_cross(x), image_kv))             # (B, T, C)
        return x + self.drop(self.mlp(self.ln_2(x)))                              # (B, T, C)


def init_weights(model, n_layer):
    """GPT-2's: N(0, 0.02), and projections into the residual stream smaller by sqrt(2 n_layer), so that its variance
    does not grow with depth. A cross-attention's starts at zero: a pretrained decoder predicts at first as before."""
    for name, p in model.named_parameters():
        if name.endswith(("bias", "cross.proj.weight")):
            nn.init.zeros_(p)
        elif name.endswith("weight") and p.dim() > 1:                             # not norms, whose scales stay at 1
            nn.init.normal_(p, std=0.02 / math.sqrt(2 * n_layer) if name.endswith("proj.weight") else 0.02)
