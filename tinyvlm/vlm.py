"""The captioners: three ways to connect a language model to images, under one contract.

    cross    every decoder block gets an extra attention that reads the image features      VisionGPT2, Flamingo
    prefix   image features become tokens at the place of <image>, and a GPT reads on       LLaVA, PaliGemma, nanoVLM
    lstm     image features set the first state of an LSTM, which writes from memory        Show and Tell, NIC

Each is `forward(img_or_feats, idx, targets) -> (logits (B, T, V), loss)` for training and `prefill` / `step` for
generate.py. Sequences are `[start] a dog runs [end]` for cross and lstm, `<image> a dog runs [end]` for prefix."""
from dataclasses import dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F

from .config import UserError, check_sizes
from .gpt import GPT, GPTConfig, next_token_loss
from .lstm import LSTM
from .transformer import Attention, init_weights
from .vit import ViT, ViTConfig


@dataclass
class LSTMConfig:
    """Sizes of the LSTM captioner's decoder."""
    vocab_size: int = 50257     # V
    n_layer: int = 1
    n_embd: int = 512           # C, width of a word
    n_hidden: int = 512         # H, width of the state
    dropout: float = 0.0        # on the image features, the words, and the state on its way out
    n_head: int = 0             # above 0: soft attention over the image features


@dataclass
class VLMConfig:
    """Which connector, and the sizes of both towers."""
    model: str = "cross"                    # or "prefix", "lstm"
    vision: ViTConfig | None = field(default_factory=ViTConfig)     # None: image features come ready-made
    text: GPTConfig | LSTMConfig = field(default_factory=GPTConfig)
    wiring: str = "final"                   # cross: or "lockstep", see CrossCaptioner
    image_token: int | None = None          # prefix: the id of <image>
    feat_dim: int | None = None             # width of ready-made features
    slots: int = 1                          # cross, prefix: image tokens made of each vector of ready-made features
    shuffle: int = 1                        # prefix: shuffle x shuffle neighbouring patches make one image token


class Captioner(nn.Module):
    """What all three share. Each adds a `connector`; `encode(img)`, what its decoder gets of an image; and `read(img,
    idx)`, the logits at every token."""
    def __init__(self, config):
        super().__init__()
        check_sizes(config, wiring=("final", "lockstep"))
        self.config = config
        self.vision = ViT(config.vision) if config.vision else None
        self.width = config.vision.n_embd if config.vision else config.feat_dim   # channels of the image features
        self.text = None if config.model == "lstm" else GPT(config.text)
        self.drop = nn.Dropout(config.text.dropout)                               # on ready-made features

    def forward(self, img, idx, targets=None):
        """idx (B * K, T): the K captions of each of B images, side by side; the vision tower runs once for all of them.
        targets[:, t] is the token that follows idx[:, :t+1]. Returns logits (B * K, T, V), and the loss or None."""
        logits = self.read(img, idx)                                              # (B * K, T, V)
        return logits, None if targets is None else next_token_loss(logits, targets)

    def step(self, idx, state):
        return self.text.step(idx, state)                                         # (R,) -> (R, V): one more token a row

    def features(self, img):
        """Pixels (B, 3, H, W), or ready-made features (B, N, C) or (B, C), of one token -> (B, N, C)."""
        return self.vision(img) if img.dim() == 4 else img.reshape(len(img), -1, img.size(-1))

    def slots(self, x):
        """A wide vector is several tokens side by side: (B, N, slots C) -> (B, N slots, C)."""
        return x.unflatten(-1, (self.config.slots, -1)).flatten(1, 2)

    def parts(self):
        """{"connector" | "decoder" | "vision": parameters}, for per-part learning rates and staged unfreezing."""
        parts = {"connector": [], "decoder": [], "vision": []}
        for name, p in self.named_parameters():
            new = name.startswith("connector") or "cross." in name
            parts["connector" if new else "vision" if name.startswith("vision") else "decoder"].append(p)
        return parts


class CrossCaptioner(Captioner):
    """ViT + GPT, joined by cross-attention in every decoder block. wiring "final": all read the ViT's last output,
    normalised. "lockstep": block i reads that of ViT block i, of as many, through a norm of its own (the last through
    the ViT's), so shallow blocks see edges and deep ones objects."""
    def __init__(self, config):
        config.text.cross = True
        super().__init__(config)
        n_norm, n_out = config.text.n_layer - 1 if config.wiring == "lockstep" else 0, config.text.n_embd * config.slots
        self.connector = nn.ModuleDict({
            "norms": nn.ModuleList(nn.LayerNorm(self.width) for _ in range(n_norm)),
            "proj": nn.Linear(self.width, n_out) if self.width != n_out else nn.Identity()})
        if not self.vision:
            self.connector["norm"] = nn.LayerNorm(self.width)   # a vision tower ends with its own
            init_weights(self.connector, n_layer=1)

    def encode(self, img):
        """img (B, 3, H, W) or features -> what the decoder attends to: (B, N slots, C), or a list, one per block."""
        if self.config.wiring == "final":
            x = self.features(img)                                                # (B, N, C_img)
            x = x if self.vision else self.drop(self.connector["norm"](x))
            return self.slots(self.connector["proj"](x))                          # (B, N slots, C)
        norms = [*self.connector["norms"], self.vision.ln_f]
        return [self.connector["proj"](norm(x)) for norm, x in zip(norms, self.vision.layers(img), strict=True)]

    def read(self, img, idx):
        return self.text(idx, feats=self.encode(img))[0]

    def prefill(self, img, idx, lengths, max_new_tokens):
        return self.text.prefill(self.encode(img), idx, lengths, max_new_tokens)


def pixel_shuffle(feats, k):
    """Lay k x k neighbouring patches side by side: (B, N, C) -> (B, N / k^2, k^2 C). Fewer tokens cost less time, but
    in each the decoder has to unmix k^2 places (nanoVLM, after Shi et al. 2016, arXiv:1609.05158)."""
    n = int(feats.size(1) ** 0.5) // k
    grid = feats.unflatten(1, (n, k, n, k)).transpose(2, 3)                       # (B, n, n, k, k, C)
    return grid.flatten(3).flatten(1, 2)


class PrefixVLM(Captioner):
    """ViT -> two-layer projector -> image tokens spliced into the text where `<image>` stands -> GPT: to that, patches
    become words of a language it has to learn. The class token, if any, stays out: it has no place in the image."""
    def __init__(self, config):
        super().__init__(config)
        if config.image_token is None or config.image_token >= config.text.vocab_size:
            raise UserError(f"the prefix model needs the id of <image> in its vocabulary, not {config.image_token}")
        n_embd, width = config.text.n_embd, self.width * config.shuffle ** 2
        self.connector = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, n_embd), nn.GELU(),
                                       nn.Linear(n_embd, n_embd * config.slots))
        init_weights(self.connector, n_layer=1)                                   # as small as word embeddings

    def encode(self, img):
        feats = self.vision.grid(img) if img.dim() == 4 else self.drop(self.features(img))       # (B, N, C)
        if self.config.shuffle > 1:
            feats = pixel_shuffle(feats, self.config.shuffle)                     # (B, N / k^2, k^2 C)
        return self.slots(self.connector(feats))                                  # image tokens (B, N slots, C)

    def splice(self, img, idx):
        """Replace the one <image> of each row of idx (B * K, T) by the N image tokens of its image: x (B * K, L, C),
        L = T + N - 1, and `last` (B * K, T), where in x token t ends. x picks from a table of the row's words and then
        its image tokens; a loop over the rows with torch.cat takes 3 to 9 times as long, there and back (32 images, T
        40 to 64, one CPU thread), and would wait for a GPU in each row to say where <image> stands. With N = 3:
            idx [a <image> dog]    table [a <image> dog | i0 i1 i2]    x = table[0 3 4 5 2]    last [0 3 4]"""
        tokens, T = self.encode(img), idx.size(1)                                 # (B, N, C)
        N, K = tokens.size(1), len(idx) // len(tokens)
        table = torch.cat([self.text.wte(idx), tokens.repeat_interleave(K, dim=0)], dim=1)       # (B * K, T + N, C)
        before = (idx == self.config.image_token).cumsum(dim=1) == 0              # (B * K, T) words before <image>
        at = before.sum(dim=1, keepdim=True)                                      # (B * K, 1) its place; T if missing
        slot = torch.arange(T + N - 1, device=idx.device)                         # (L,)
        place = torch.where(slot < at + N, T + slot - at, slot - N + 1)           # (B * K, L) image tokens, words after
        x = table.take_along_dim(torch.where(slot < at, slot, place)[:, :, None], dim=1)         # (B * K, L, C)
        return x, slot[:T] + (N - 1) * ~before

    def read(self, img, idx):
        x, last = self.splice(img, idx)
        return self.text.head(self.text.hidden(x).take_along_dim(last[:, :, None], dim=1))       # at text places only

    def prefill(self, img, idx, lengths, max_new_tokens):
        x, last = self.splice(img, idx)
        return self.text.prefill(None, x, 1 + last.gather(1, lengths[:, None] - 1)[:, 0], max_new_tokens)


class LSTMState:
    """What an LSTM captioner carries from word to word: h and c (L, R, H), and the image's keys and values."""
    def __init__(self, h, c, image_kv):
        self.h, self.c, self.image_kv = h, c, image_kv

    def reorder(self, rows):                    # image_kv stays: beams never leave their image
        self.h, self.c = self.h[:, rows], self.c[:, rows]


class LSTMCaptioner(Captioner):
    """Features -> the LSTM's first state; then a word in, a word out, and nothing but the state in between.
    From "Show and tell" (Vinyals et al. 2015, arXiv:1411.4555), with the image in the first state, as in "Show, attend
    and tell" (Xu et al. 2015, arXiv:1502.03044). With n_head, each state on its way out also attends to the features:
    after the recurrence (Luong et al. 2015), so that all steps of the LSTM still run as one pass."""
    def __init__(self, config):
        super().__init__(config)
        c = config.text
        check_sizes(c)
        self.wte = nn.Embedding(c.vocab_size, c.n_embd)                           # (V, C), also the output matrix
        nn.init.normal_(self.wte.weight, std=c.n_embd ** -0.5)
        self.connector = nn.ModuleDict({"norm": nn.LayerNorm(self.width),
                                        "state": nn.Linear(self.width, 2 * c.n_layer * c.n_hidden)})
        if c.n_head:
            self.connector["feats"] = nn.Linear(self.width, c.n_hidden)
            self.connector["attn"] = Attention(c.n_hidden, c.n_head)
        self.lstm = LSTM(c.n_embd, c.n_hidden, c.n_layer, dropout=c.dropout)
        self.out = nn.Linear(c.n_hidden, c.n_embd) if c.n_hidden != c.n_embd else nn.Identity()
        self.head_bias = nn.Parameter(torch.zeros(c.vocab_size))                  # (V,)

    def encode(self, img):
        feats = self.drop(self.connector["norm"](self.features(img)))             # (B, N, C_img)
        vector = self.vision.pool(feats) if self.vision else feats.mean(dim=1)    # (B, C_img)
        state = torch.tanh(self.connector["state"](vector))                       # (B, 2 L H)
        h, c = state.unflatten(1, (2, self.config.text.n_layer, -1)).permute(1, 2, 0, 3).contiguous()       # (L, B, H)
        attends = "attn" in self.connector
        return LSTMState(h, c, attends and self.connector["attn"].keys_values(self.connector["feats"](feats)))

    def advance(self, x, state):
        """Read words x (R, T, C), moving the state on -> logits (R, T, V)."""
        x, (state.h, state.c) = self.lstm(x, (state.h, state.c))                  # (R, T, H)
        if state.image_kv:
            x = x + self.connector["attn"](x, state.image_kv)                     # plus what each finds in the image
        return F.linear(self.drop(self.out(x)), self.wte.weight, self.head_bias)

    def read(self, img, idx):
        state = self.encode(img)
        state.reorder(torch.arange(len(idx), device=idx.device) * state.h.size(1) // len(idx))   # K captions an image
        return self.advance(self.drop(self.wte(idx)), state)                      # (B * K, T, V)

    def prefill(self, img, idx, lengths, max_new_tokens):
        state, last = self.encode(img), 0
        for t, words in enumerate(self.wte(idx).split(1, dim=1)):                 # prompts are short, and may differ
            h, c, going = state.h, state.c, t < lengths[:, None]                  # (L, B, H) both, (B, 1)
            last = torch.where(going[:, :, None], self.advance(words, state), last)         # (B, 1, V)
            state.h, state.c = torch.where(going, state.h, h), torch.where(going, state.c, c)
        return last[:, -1], state                                                 # (B, V)

    def step(self, idx, state):
        return self.advance(self.wte(idx[:, None]), state)[:, -1]                 # (R, V)


MODELS = {"cross": CrossCaptioner, "prefix": PrefixVLM, "lstm": LSTMCaptioner}


def build(config):
    """VLMConfig -> the model it describes, freshly initialised."""
    return MODELS[config.model](config)
