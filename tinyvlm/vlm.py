"""The captioners: three ways to connect a language model to images, under one contract.

    cross    every decoder block gets an extra attention that reads the image features      VisionGPT2, Flamingo
    prefix   image features become tokens at the place of <image>, and a GPT reads on       LLaVA, PaliGemma, nanoVLM
    lstm     image features set the first state of an LSTM, which writes from memory        Show and Tell, NIC

Each is `forward(img_or_feats, idx, targets) -> (logits (B, T, V), loss)` for training and `prefill` / `step` for
generate.py. Sequences here are what the tokenizer made: `[start] a dog runs [end]` for cross and lstm, `<image> a dog
runs [end]` for prefix. Targets come already shifted: targets[t] is the token that follows idx[..t].
"""
from dataclasses import asdict, dataclass, field
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

from .config import UserError
from .gpt import GPT, GPTConfig, last_of, next_token_loss
from .lstm import LSTM
from .transformer import Attention, check_sizes, reorder_rows
from .vit import ViT, ViTConfig


@dataclass
class LSTMConfig:
    """Sizes of the LSTM captioner's decoder."""
    vocab_size: int = 50257     # V
    n_layer: int = 1
    n_embd: int = 512           # C, width of a word
    n_hidden: int = 512         # H, width of the state
    dropout: float = 0.0        # on the image features, the words, and the state on its way out
    n_head: int = 0             # above 0: soft attention over the image features with this many heads
    DIVIDES = (("n_hidden", "n_head"),)


@dataclass
class VLMConfig:
    """Which connector, and the sizes of both towers."""
    model: Literal["cross", "prefix", "lstm"] = "cross"
    vision: ViTConfig | None = field(default_factory=ViTConfig)     # None: image features come ready-made
    text: GPTConfig | LSTMConfig = field(default_factory=GPTConfig)
    wiring: Literal["final", "lockstep"] = "final"                  # cross: see CrossCaptioner
    image_token: int | None = None          # prefix: the id of <image>
    feat_dim: int | None = None             # width of ready-made features
    shuffle: int = 1                        # prefix: shuffle x shuffle neighbouring patches make one image token


class Captioner(nn.Module):
    """What all three share: a vision tower or ready-made features, a language model, and the parts by name.

    Each adds a `connector`; `encode(img)`, what its decoder gets of an image; and `read(img, idx)`, the decoder's last
    hidden state at every token of idx.
    """

    def __init__(self, config):
        super().__init__()
        check_sizes(config)
        self.config = config
        self.vision = ViT(config.vision) if config.vision else None
        self.width = config.vision.n_embd if config.vision else config.feat_dim   # channels of the image features
        if not self.width:
            raise UserError("a captioner needs a vision tower, or feat_dim: the width of ready-made features")
        self.text = None if config.model == "lstm" else GPT(config.text)

    def forward(self, img, idx, targets=None):
        """idx (B * K, T), K captions for each of B images -> logits (B * K, T, V) and the loss (None without targets).
        The captions of an image stand side by side, and its vision tower runs once for all of them."""
        logits = self.head(self.read(img, idx))                                   # (B * K, T, V)
        return logits, None if targets is None else next_token_loss(logits, targets)

    def head(self, x):
        return self.text.head(x)                                                  # (B, T, C) -> (B, T, V)

    def step(self, idx, state):
        """One more token per row: idx (R,) -> logits (R, V)."""
        return self.text.step(idx, state)

    def features(self, img):
        """Pixels (B, 3, H, W) go through the vision tower; ready-made features (B, N, C) or (B, C) pass as they are."""
        if img.dim() == 4:
            return self.vision(img)                                               # (B, N, C)
        return img if img.dim() == 3 else img[:, None]                            # (B, N, C)

    def parts(self):
        """{"connector" | "decoder" | "vision": parameters}, for per-part learning rates and staged unfreezing."""
        parts = {"connector": [], "decoder": [], "vision": []}
        for name, p in self.named_parameters():
            new = name.startswith("connector") or ".cross." in name or ".ln_cross." in name
            parts["connector" if new else "vision" if name.startswith("vision") else "decoder"].append(p)
        return parts


class CrossCaptioner(Captioner):
    """ViT + GPT, joined by cross-attention in every decoder block.

    wiring "final": all blocks read the ViT's last, normalised output. "lockstep": block i reads the output of ViT block
    i through a norm of its own (the last through the ViT's), so shallow blocks see edges and deep ones objects; needs
    equal depths. Where the two widths differ, one linear map brings the features to the decoder's.
    """

    def __init__(self, config):
        config.text.cross = True
        super().__init__(config)
        self.connector, n_layer = nn.ModuleDict(), config.text.n_layer
        if config.wiring == "lockstep":
            if not config.vision or config.vision.n_layer != n_layer:
                raise UserError("lockstep wiring pairs the layers of a vision tower and a decoder of equal depth")
            self.connector["norms"] = nn.ModuleList(nn.LayerNorm(self.width) for _ in range(n_layer - 1))
        if self.width != config.text.n_embd:
            self.connector["proj"] = nn.Linear(self.width, config.text.n_embd)

    def encode(self, img):
        """img (B, 3, H, W) or features -> what the decoder attends to: (B, N, C), or a list of them, one per block."""
        proj = self.connector["proj"] if "proj" in self.connector else nn.Identity()
        if "norms" not in self.connector:
            return proj(self.features(img))                                       # (B, N, C)
        norms = [*self.connector["norms"], self.vision.ln_f]
        return [proj(norm(x)) for norm, x in zip(norms, self.vision.layers(img))]             # n_layer x (B, N, C)

    def read(self, img, idx):
        return self.text.hidden(self.text.embed(idx), self.encode(img))           # (B * K, T, C)

    def prefill(self, img, idx, lengths=None, max_new_tokens=0):
        return self.text.prefill(self.encode(img), idx, lengths, max_new_tokens)


def pixel_shuffle(feats, k):
    """Lay k x k neighbouring patches side by side: (B, N, C) -> (B, N / k^2, k^2 C). Fewer tokens cost less time, but
    in each the decoder has to unmix k^2 places ("nanoVLM", after Shi et al. 2016, arXiv:1609.05158)."""
    B, N, C = feats.shape
    n = int(N ** 0.5)
    if n * n != N or n % k:
        raise UserError(f"{N} image tokens are no square grid that divides into {k} x {k} neighbours; use shuffle 1")
    grid = feats.view(B, n // k, k, n // k, k, C).transpose(2, 3)                 # (B, n/k, n/k, k, k, C)
    return grid.reshape(B, N // k ** 2, k * k * C)


class PrefixVLM(Captioner):
    """ViT -> two-layer projector -> image tokens spliced into the text where `<image>` stands -> GPT.

    N = 196 for a ViT-B/16 at 224 pixels, 64 for P = 16 at 128. The decoder needs no new weights: to it the projected
    patches are words of a language it has to learn. The class token, if any, stays out: it has no place in the image.
    """

    def __init__(self, config):
        super().__init__(config)
        if config.image_token is None or config.image_token >= config.text.vocab_size:
            raise UserError(f"the prefix model needs the id of <image> in its vocabulary, not {config.image_token}")
        n_embd, width = config.text.n_embd, self.width * config.shuffle ** 2
        self.connector = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, n_embd), nn.GELU(),
                                       nn.Linear(n_embd, n_embd))
        for layer in (self.connector[1], self.connector[3]):                      # start as small as word embeddings
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    @property
    def n_image_tokens(self):
        return self.config.vision.n_patches // self.config.shuffle ** 2           # that one image becomes

    def encode(self, img):
        """img (B, 3, H, W) or features -> image tokens (B, N, C), or (B, N / shuffle^2, C)."""
        feats = self.vision.grid(img) if img.dim() == 4 else self.features(img)   # (B, N, C)
        return self.connector(pixel_shuffle(feats, self.config.shuffle) if self.config.shuffle > 1 else feats)

    def splice(self, img, idx):
        """Replace every <image> of idx (B * K, T) by its N image tokens. img may be (B, M, 3, H, W): M images per row.

        Returns x (B * K, L, C), L = T + M (N - 1), where shorter rows end in copies of their last vector, and `last`
        (B * K, T): where in x token t ends. One row alone would be torch.cat over its words and image tokens. For all
        at once, x picks from a table of the row's words and then its image tokens; no shape depends on where <image>
        stands, so nothing waits for the device, and a whole training step can be one graph. With M = 1, N = 3:

            idx [a <image> dog]    table [a <image> dog | i0 i1 i2]    x = table[0 3 4 5 2]    last [0 3 4]
        """
        tokens = self.encode(img.flatten(0, 1) if img.dim() == 5 else img)        # (B * M, N, C)
        (R, T), N, M = idx.shape, tokens.size(1), len(tokens) // len(img)
        tokens = tokens.view(len(img), M * N, -1).repeat_interleave(R // len(img), dim=0)     # (R, M * N, C), R = B * K
        table = torch.cat([self.text.embed(idx), tokens], dim=1)                  # (R, T + M * N, C)
        is_image = idx == self.config.image_token                                 # (R, T)
        last = torch.where(is_image, N, 1).cumsum(dim=1) - 1                      # (R, T)
        slot = torch.arange(T + M * (N - 1), device=idx.device).minimum(last[:, -1:])         # (R, L)
        token = torch.searchsorted(last, slot)                                    # (R, L) the token that fills a slot
        number = is_image.cumsum(dim=1).gather(1, token)                          # (R, L) images up to there
        place = T + number * N - 1 - (last.gather(1, token) - slot)               # (R, L) counted back from its end
        return pick(table, torch.where(is_image.gather(1, token), place, token)), last        # (R, L, C), (R, T)

    def read(self, img, idx):
        """At text positions only: image positions have no logits and cannot be trained on. What follows <image> is
        predicted from its last image token."""
        x, last = self.splice(img, idx)                                           # (B * K, L, C), (B * K, T)
        return pick(self.text.hidden(x), last)                                    # (B * K, T, C)

    def prefill(self, img, idx, lengths=None, max_new_tokens=0):
        x, last = self.splice(img, idx)                                           # (B, L, C), (B, T)
        return self.text.read(x, None, 1 + last_of(last, lengths), max_new_tokens)


def pick(x, places):
    """The vectors of x (B, L, C) at `places` (B, T) of each row: (B, T, C)."""
    return x.gather(1, places[:, :, None].expand(-1, -1, x.size(2)))


class LSTMState:
    """What an LSTM captioner carries from word to word: h and c (L, R, H), and the image's keys and values."""

    def __init__(self, h, c, image_kv):
        self.h, self.c, self.image_kv = h, c, image_kv

    def reorder(self, rows):
        """Row i continues what was row rows[i]. image_kv stays: beams never leave their image."""
        self.h, self.c = (reorder_rows(t, rows, dim=1) for t in (self.h, self.c))


class LSTMCaptioner(Captioner):
    """Features -> the LSTM's first state; then a word in, a word out, and nothing but the state in between.

    From "Show and tell" (Vinyals et al. 2015, arXiv:1411.4555), with the image in the first state, through tanh, as in
    "Show, attend and tell" (Xu et al. 2015, arXiv:1502.03044). With n_head, each state on its way out also attends to
    the features (a grid, or the one vector there is): attention after the recurrence (Luong et al. 2015), so that all
    steps of the LSTM still run as one pass. The word embedding is the output matrix as well.
    """

    def __init__(self, config):
        super().__init__(config)
        c = config.text
        self.wte = nn.Embedding(c.vocab_size, c.n_embd)                           # (V, C)
        nn.init.normal_(self.wte.weight, std=c.n_embd ** -0.5)
        self.drop = nn.Dropout(c.dropout)
        self.connector = nn.ModuleDict({"norm": nn.LayerNorm(self.width),
                                        "state": nn.Linear(self.width, 2 * c.n_layer * c.n_hidden)})
        if c.n_head:
            self.connector["feats"] = nn.Linear(self.width, c.n_hidden)
            self.connector["attn"] = Attention(c.n_hidden, c.n_head)
        self.lstm = LSTM(c.n_embd, c.n_hidden, c.n_layer, dropout=c.dropout)
        self.out = nn.Linear(c.n_hidden, c.n_embd) if c.n_hidden != c.n_embd else nn.Identity()
        self.head_bias = nn.Parameter(torch.zeros(c.vocab_size))

    def encode(self, img):
        """img (B, 3, H, W) or features -> the first h and c (L, B, H), and keys and values to attend to, or None."""
        feats = self.drop(self.connector["norm"](self.features(img)))             # (B, N, C_img)
        vector = self.vision.pool(feats) if self.vision else feats.mean(dim=1)    # (B, C_img)
        state = torch.tanh(self.connector["state"](vector))                       # (B, 2 L H)
        h, c = state.view(len(feats), 2, self.config.text.n_layer, -1).permute(1, 2, 0, 3).contiguous()     # (L, B, H)
        attn = self.config.text.n_head > 0
        return h, c, self.connector["attn"].keys_values(self.connector["feats"](feats)) if attn else None

    def attend(self, x, image_kv):
        """Hidden states x (R, T, H), plus what each finds in the image -> (R, T, H)."""
        return x if image_kv is None else x + self.connector["attn"](x, image_kv)

    def head(self, x):
        """Hidden states x (R, T, H) -> logits (R, T, V)."""
        return F.linear(self.drop(self.out(x)), self.wte.weight, self.head_bias)

    def read(self, img, idx):
        h, c, image_kv = self.encode(img)
        h, c = (t.repeat_interleave(len(idx) // t.size(1), dim=1) for t in (h, c))         # (L, B * K, H)
        x, _ = self.lstm(self.drop(self.wte(idx)), (h, c))                        # (B * K, T, H)
        return self.attend(x, image_kv)                                           # (B * K, T, H)

    def prefill(self, img, idx, lengths=None, max_new_tokens=0):
        state = LSTMState(*self.encode(img))
        for t, words in enumerate(self.wte(idx).split(1, dim=1)):                 # prompts are short, and may differ
            _, new = self.lstm(words, (state.h, state.c))                         # 2 x (L, B, H)
            if lengths is not None:                                               # a row that has ended stays as it was
                new = [torch.where(t < lengths[:, None], a, b) for a, b in zip(new, (state.h, state.c))]
            state.h, state.c = new
        return self.head(self.attend(state.h[-1][:, None], state.image_kv))[:, -1], state     # (B, V)

    def step(self, idx, state):
        x, (h, c) = self.lstm(self.wte(idx[:, None]), (state.h, state.c))         # (R, 1, H)
        state.h.copy_(h), state.c.copy_(c)                                        # in place, as in KVCache
        return self.head(self.attend(x, state.image_kv))[:, -1]                   # (R, V)


MODELS = {"cross": CrossCaptioner, "prefix": PrefixVLM, "lstm": LSTMCaptioner}


to_dict = asdict    # a VLMConfig as plain nested dicts, for config.json


def build(config):
    """VLMConfig -> the model it describes, freshly initialised."""
    return MODELS[config.model](config)


def from_dict(d):
    """The inverse of to_dict: config.json's "sizes" -> VLMConfig. Raises UserError where they describe no model."""
    try:
        vision = ViTConfig(**d["vision"]) if d["vision"] else None
        text = (LSTMConfig if d["model"] == "lstm" else GPTConfig)(**d["text"])
        config = VLMConfig(**{**d, "vision": vision, "text": text})
    except (KeyError, TypeError) as error:
        raise UserError(f"the sizes in config.json describe no model: {str(error):.100}") from None
    check_sizes(config)
    return config
