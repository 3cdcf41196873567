"""GPT-2: a stack of causal blocks that predicts the next token.

From "Language models are unsupervised multitask learners" (Radford et al. 2019) and, as code, nanoGPT's model.py. Two
additions serve images: blocks may attend to their features, and vectors may stand in place of words. See vlm.py."""
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from .config import check_sizes
from .transformer import ACTIVATIONS, Block, KVCache, init_weights

IGNORE = -100    # a target that is not trained on: padding, or the user's part of a dialogue


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
    cross: bool = False         # give every block cross-attention, over image features
    activation: str = "gelu_tanh"   # a key of transformer.ACTIVATIONS
    eps: float = 1e-5


def next_token_loss(logits, targets):
    """Mean cross-entropy (nats) of logits (B, T, V) over the targets (B, T) that are not IGNORE; over none, 0."""
    total = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
    return total / (targets != IGNORE).sum().clamp(min=1)       # a mean over none is nan, and would spoil the weights


class GPT(nn.Module):
    """Token and position embeddings, n_layer causal blocks, a norm, and the embedding again as the output matrix."""
    def __init__(self, config):
        super().__init__()
        check_sizes(config, activation=ACTIVATIONS)
        c = self.config = config
        self.wte = nn.Embedding(c.vocab_size, c.n_embd)                           # (V, C), also the output matrix
        self.wpe = nn.Embedding(c.block_size, c.n_embd)                           # (block_size, C)
        self.drop = nn.Dropout(c.dropout)
        self.blocks = nn.ModuleList(Block(c, causal=True, cross=c.cross) for _ in range(c.n_layer))
        self.ln_f = nn.LayerNorm(c.n_embd, eps=c.eps)
        init_weights(self, c.n_layer)

    def forward(self, idx, targets=None, feats=None, cache=None):
        """idx (B, T) -> logits (B, T, V) and, given targets, the loss: targets[b, t] should FOLLOW idx[b, :t+1], or is
        IGNORE. feats: image features (B or B/K, N, C) for all blocks, or a list of them, one per block."""
        logits = self.head(self.hidden(idx, feats, cache))                        # (B, T, V)
        return logits, None if targets is None else next_token_loss(logits, targets)

    def hidden(self, x, feats=None, cache=None):
        """Ids (B, T), or vectors (B, T, C) in their place -> the last block's normalised output (B, T, C)."""
        x = self.wte(x) if x.dim() == 2 else x                                    # (B, T, C)
        longest, most = cache.max_len if cache else x.size(1), self.config.block_size
        assert longest <= most, f"{longest} tokens, but the model's context holds {most}"
        pos = cache.begin(x.size(1)) if cache else torch.arange(longest, device=x.device)        # (B, T) or (T,)
        x = self.drop(x + self.wpe(pos))                                          # (B, T, C)
        for i, block in enumerate(self.blocks):
            x = block(x, feats[i] if isinstance(feats, list) else feats, cache, layer=i)
        return self.ln_f(x)                                                       # (B, T, C)

    def head(self, x):
        return F.linear(x, self.wte.weight)                                       # (B, T, C) -> logits (B, T, V)

    def prefill(self, feats, x, lengths, max_new_tokens):
        """Read the prompts x, as in `hidden`, row b ending at lengths[b]. (The last new token will not be read.)"""
        cache = KVCache(self.config.n_layer, len(x), x.size(1) + max_new_tokens - 1, x.device)
        x = self.hidden(x, feats, cache)                                          # (B, T, C)
        cache.lengths = lengths
        return self.head(x[torch.arange(len(x), device=x.device), lengths - 1]), cache

    def step(self, idx, cache):
        return self.head(self.hidden(idx[:, None], cache=cache))[:, -1]           # (R,) -> (R, V): one more token a row

    def extend_vocab(self, vocab_size):
        """Append rows for new special tokens; each starts as the mean of the old rows: no meaning yet."""
        old = self.wte.weight                                                     # (V, C)
        old.data = torch.cat([old.data, old.data.mean(0).expand(vocab_size - len(old), -1)])     # (vocab_size, C)
        self.config.vocab_size = vocab_size

    def extend_context(self, block_size):
        """Append positions for longer texts; they start small and random, as all did."""
        old = self.wpe.weight                                                     # (block_size before, C)
        old.data = torch.cat([old.data, 0.02 * torch.randn(block_size - len(old), old.size(1), device=old.device)])
        self.config.block_size = block_size
