"""GPT-2: a stack of causal blocks that guesses the next token.

From "Language models are unsupervised multitask learners" (Radford et al. 2019) and, as code, nanoGPT's model.py.
Two additions let it talk about pictures: `feats` gives every block image features to cross-attend to, and `embed` /
`hidden` are open to callers that put something other than words into the sequence (the prefix model's image tokens).
Left out: weight decay groups and generation, which live in train.py and generate.py for all models alike.
"""
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from .transformer import Block, KVCache, Packed, init_weights, linear

IGNORE = -100    # a target nobody is asked to predict: padding


@dataclass
class GPTConfig:
    """Sizes of a GPT; the defaults are GPT-2 small."""
    block_size: int = 1024      # longest sequence: rows of the position table
    vocab_size: int = 50257     # V
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768           # C
    n_hidden: int | None = None # width inside the MLP; None: 4 C
    dropout: float = 0.0
    cross: bool = False         # give every block cross-attention over image features
    activation: str = "gelu_tanh"
    eps: float = 1e-5
    smoothing: float = 0.0      # label smoothing of the training loss


def next_token_loss(logits, targets, smoothing=0.0):
    """Mean cross-entropy (nats) over the targets that are not IGNORE. logits (B, T, V), targets (B, T) -> scalar.

    smoothing: this share of the aim is spread over the whole vocabulary ("Rethinking the Inception architecture",
    Szegedy et al. 2015, arXiv:1512.00567): a model that need not be certain keeps better beams. For training only.
    """
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE,
                           label_smoothing=smoothing)


def last_of(x, lengths=None):
    """The hidden state at the end of each prompt: x (B, T, C), lengths (B,) or None for T everywhere -> (B, C)."""
    return x[:, -1] if lengths is None else x[torch.arange(len(x), device=x.device), lengths - 1]


class GPT(nn.Module):
    """Token and position embeddings, n_layer causal blocks, a norm, and the embedding again as the way out."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.wte = nn.Embedding(c.vocab_size, c.n_embd)                           # (V, C), also the output matrix
        self.wpe = nn.Embedding(c.block_size, c.n_embd)
        self.drop = nn.Dropout(c.dropout)
        self.blocks = nn.ModuleList(Block(c.n_embd, c.n_head, causal=True, cross=c.cross, activation=c.activation,
                                          eps=c.eps, dropout=c.dropout, n_hidden=c.n_hidden)
                                    for _ in range(c.n_layer))
        self.ln_f = nn.LayerNorm(c.n_embd, eps=c.eps)
        init_weights(self, c.n_layer)

    def forward(self, idx, targets=None, feats=None, cache=None):
        """idx (B, T) -> logits (B, T, V) and, given targets (B, T), the loss; otherwise None.

        targets[b, t] is the token that should FOLLOW idx[b, :t+1] (already shifted), or IGNORE.
        feats: image features (B or B/K, N, C) for all blocks, or a list with one such tensor per block.
        """
        logits = self.head(self.hidden(self.embed(idx), feats, cache))            # (B, T, V)
        return logits, None if targets is None else self.loss(logits, targets)

    def loss(self, logits, targets):
        """The loss of training (smoothed) or of evaluation (never)."""
        return next_token_loss(logits, targets, self.config.smoothing if self.training else 0.0)

    def embed(self, idx):
        """Token ids (B, T) -> vectors (B, T, C), without positions.

        The table's gradient is (V, C), and the way out (`head`) fills all of it. The few rows read here need no second
        table of zeros: as a sparse gradient they are added to the first in place (10% of a small batch's step, on a
        CPU). A model that embeds but never predicts, like CLIP's text tower, calls `wte` instead.
        """
        sparse = idx.device.type == "cpu" and not torch.compiler.is_compiling()
        return F.embedding(idx, self.wte.weight, sparse=sparse)                   # (B, T, C)

    def hidden(self, x, feats=None, cache=None):
        """Embedded tokens x (B, T, C) -> the last block's normalised output (B, T, C). Adds the positions.

        cache: a KVCache to read from and add to, or a Packed: rows that hold several texts.
        """
        T = x.size(1)
        pos = torch.arange(T, device=x.device) if cache is None else cache.positions(T, x.device)
        if cache is not None:
            feats = cache.feats if feats is None else feats                       # later steps: the prompt's picture
            cache.feats = feats
        packed = isinstance(cache, Packed)                      # texts side by side: a row may be longer than any text
        end = 0 if packed else T + (cache.length if cache else 0)
        assert end <= self.config.block_size, f"{end} tokens, but the model's context holds {self.config.block_size}"
        x = self.drop(x + self.wpe(pos))                                          # (B, T, C)
        for i, block in enumerate(self.blocks):
            x = block(x, feats[i] if isinstance(feats, (list, tuple)) else feats, cache, layer=i)
        if cache is not None:
            cache.advance(T)
        return self.ln_f(x)                                                       # (B, T, C)

    def head(self, x):
        """(B, T, C) -> logits (B, T, V). The matrix is the embedding itself: reading and writing share a vocabulary."""
        return linear(x, self.wte.weight)                                         # (B, T, V)

    def prefill(self, feats, idx, lengths=None, max_new_tokens=0):
        """Read the prompts idx (B, T), row b ending at lengths[b] (None: all at T). feats as in forward, or None.

        Returns the logits of the next token (B, V) and the cache that `step` continues from: generate.py's contract.
        """
        cache = KVCache(self.config.n_layer, idx.size(1) + max_new_tokens)
        x = self.hidden(self.embed(idx), feats, cache)                            # (B, T, C)
        return self.head(last_of(x, lengths)), cache.finish_prompt(lengths)

    def step(self, idx, cache):
        """One more token in each row: idx (R,) -> logits (R, V)."""
        return self.head(self.hidden(self.embed(idx[:, None]), cache=cache))[:, -1]         # (R, V)

    def grow_vocab(self, vocab_size):
        """Append rows for new special tokens; each starts as the mean of the old rows, a word of no meaning yet."""
        old = self.wte.weight.data
        new = vocab_size - old.size(0)
        assert new >= 0, f"the model knows {old.size(0)} tokens and cannot shrink to {vocab_size}"
        rows = torch.cat([old, old.mean(0, keepdim=True).expand(new, -1)])        # (V + new, C)
        self.wte = nn.Embedding.from_pretrained(rows, freeze=False)
        self.config.vocab_size = vocab_size

    def grow_context(self, block_size):
        """Append positions for longer texts; they start small and random, like all that no text has reached."""
        old = self.wpe.weight.data
        assert block_size >= len(old), f"the model reads {len(old)} tokens and cannot shrink to {block_size}"
        new = torch.randn(block_size - len(old), old.size(1), device=old.device) * 0.02
        self.wpe = nn.Embedding.from_pretrained(torch.cat([old, new]), freeze=False)             # (block_size, C)
        self.config.block_size = block_size
