"""The bridges: three ways to let a language model see, under one contract.

    cross    every decoder block gets an extra attention that reads the image features      VisionGPT2, Flamingo
    prefix   image features become tokens at the place of <image>, and a GPT reads on       LLaVA, PaliGemma, nanoVLM
    lstm     image features set the first state of an LSTM, which speaks from memory        Show and Tell, NIC

Each is `forward(img_or_feats, idx, targets) -> (logits (B, T, V), loss)` for training and `prefill` / `step` for
generate.py. Sequences here are what the tokenizer made: `[start] a dog runs [end]` for cross and lstm, `<image> a dog
runs [end]` for prefix. Targets come already shifted: targets[t] is the token that follows idx[..t].
"""
from dataclasses import asdict, dataclass, field

import torch
import torch.nn as nn

from .gpt import IGNORE, GPT, GPTConfig, last_of, next_token_loss
from .linear import Linear, linear
from .lstm import LSTM
from .transformer import Attention, KVCache, Packed
from .vit import ViT, ViTConfig


@dataclass
class LSTMConfig:
    """Sizes of the LSTM captioner's decoder."""
    vocab_size: int = 50257     # V
    n_layer: int = 1
    n_embd: int = 512           # C, width of a word
    n_hidden: int = 512         # H, width of the state
    dropout: float = 0.0        # on the image features, the words, and the state on its way out
    tied: bool = True           # the embedding is the way out as well (through a linear map where C and H differ)
    n_head: int = 0             # above 0: soft attention over the image features with this many heads
    smoothing: float = 0.0      # label smoothing of the training loss


@dataclass
class VLMConfig:
    """Which bridge, and the sizes of both towers."""
    model: str = "cross"                    # cross | prefix | lstm
    vision: ViTConfig | None = field(default_factory=ViTConfig)     # None: image features come ready-made
    text: GPTConfig | LSTMConfig = field(default_factory=GPTConfig)
    wiring: str = "final"                   # cross: "final" (every block sees the ViT's last output) or "lockstep"
    image_token: int | None = None          # prefix: the id of <image>
    feat_dim: int | None = None             # width of ready-made features
    shuffle: int = 1                        # prefix: shuffle x shuffle neighbouring patches make one image token

    @property
    def width(self):
        """Channels of the features the bridge receives."""
        return self.vision.n_embd if self.vision else self.feat_dim


class Captioner(nn.Module):
    """What all three share: a vision tower or ready-made features, a language model, and the parts by name."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        assert config.vision or config.feat_dim, "a captioner needs a vision tower, or the width of ready-made features"
        self.vision = ViT(config.vision) if config.vision else None
        self.text = None if config.model == "lstm" else GPT(config.text)

    def encode(self, img):
        """Ready-made features (B, N, C) or (B, C) pass as they are; pixels (B, 3, H, W) go through the vision tower."""
        if img.dim() < 4:
            return img if img.dim() == 3 else img[:, None]                        # (B, N, C)
        assert self.vision is not None, "this model has no vision tower: it was trained on ready-made features"
        return self.vision(img)                                                   # (B, N, C)

    def parts(self):
        """{"bridge" | "decoder" | "vision": parameters}, for per-part learning rates and staged unfreezing."""
        parts = {"bridge": [], "decoder": [], "vision": []}
        for name, p in self.named_parameters():
            new = name.startswith("bridge") or ".cross." in name or ".ln_cross." in name
            parts["bridge" if new else "vision" if name.startswith("vision") else "decoder"].append(p)
        return parts

    def step(self, idx, state):
        """One more token per row: idx (R,) -> logits (R, V)."""
        return self.text.step(idx, state)


class CrossCaptioner(Captioner):
    """ViT + GPT, joined by cross-attention in every decoder block.

    wiring "final": all blocks read the ViT's last, normalised output. "lockstep": block i reads the output of ViT block
    i through a norm of its own (the last through the ViT's), so shallow blocks see edges and deep ones objects; needs
    equal depths.
    Where the two widths differ, one linear map brings the features to the decoder's.
    """

    def __init__(self, config):
        config.text.cross = True
        super().__init__(config)
        n_embd = config.text.n_embd
        self.bridge = nn.ModuleDict()
        if config.wiring == "lockstep":
            depths = config.vision and config.vision.n_layer, config.text.n_layer
            assert depths[0] == depths[1], f"lockstep pairs the layers of both towers, but they have {depths}"
            self.bridge["norms"] = nn.ModuleList(nn.LayerNorm(config.width) for _ in range(config.text.n_layer - 1))
        if config.width != n_embd:
            self.bridge["proj"] = nn.Linear(config.width, n_embd)

    def look(self, img):
        """img (B, 3, H, W) or features -> what the decoder attends to: (B, N, C), or a list of them, one per block."""
        proj = self.bridge["proj"] if "proj" in self.bridge else nn.Identity()
        if self.config.wiring == "lockstep" and img.dim() == 4:
            norms = [*self.bridge["norms"], self.vision.ln_f]
            return [proj(norm(x)) for norm, x in zip(norms, self.vision.layers(img))]         # n_layer x (B, N, C)
        return proj(self.encode(img))                                             # (B, N, C)

    def forward(self, img, idx, targets=None):
        """idx (B * K, T): K captions for each of B images, the same image's side by side; the ViT runs once per image.

        Returns logits (B * K, T, V) and the loss (None without targets).
        """
        return self.text(idx, targets, feats=self.look(img))

    def prefill(self, img, idx, lengths=None, max_new_tokens=0):
        """Look once, read the prompts idx (B, T): logits of the next token (B, V) and the state to go on from."""
        return self.text.prefill(self.look(img), idx, lengths, max_new_tokens)


def pixel_shuffle(feats, k):
    """Lay k x k neighbouring patches side by side: (B, N, C) -> (B, N / k^2, k^2 C). Nothing is lost, only rearranged.

    A reader of a quarter of the tokens costs a quarter, but has to unmix four places in each ("nanoVLM", after Shi et
    al. 2016, arXiv:1609.05158).
    """
    B, N, C = feats.shape
    n = int(N ** 0.5)
    assert n * n == N and n % k == 0, f"{N} image tokens are no square grid that divides into {k} x {k} neighbours"
    grid = feats.view(B, n // k, k, n // k, k, C).transpose(2, 3)                 # (B, n/k, n/k, k, k, C)
    return grid.reshape(B, N // k ** 2, k * k * C)


class PrefixVLM(Captioner):
    """ViT -> two-layer projector -> image tokens spliced into the text where `<image>` stands -> GPT.

    N = 196 for a ViT-B/16 at 224 pixels, 64 for P = 16 at 128. The decoder needs no new weights: to it the projected
    patches are words of a language it has to learn. The class token, if any, stays out: it has no place in the picture.
    """

    def __init__(self, config):
        super().__init__(config)
        assert config.image_token is not None, "the prefix model needs the id of its <image> token"
        n_embd, width = config.text.n_embd, config.width * config.shuffle ** 2
        self.bridge = nn.Sequential(nn.LayerNorm(width), Linear(width, n_embd), nn.GELU(), Linear(n_embd, n_embd))
        for layer in (self.bridge[1], self.bridge[3]):         # start near the size of word embeddings
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    @property
    def n_image_tokens(self):
        """How many tokens one picture of the vision tower becomes."""
        return self.config.vision.n_patches // self.config.shuffle ** 2

    def eyes(self, img):
        """What can be kept of a picture that is asked about several times: img (B, 3, H, W) -> patches (B, N, C)."""
        feats = self.encode(img)                                                  # (B, [1 +] N, C)
        return feats[:, 1:] if img.dim() == 4 and self.config.vision.class_token else feats

    def look(self, img):
        """img (B, 3, H, W) or features -> image tokens (B, N, C), or (B, N / shuffle^2, C)."""
        feats = self.eyes(img)
        return self.bridge(pixel_shuffle(feats, self.config.shuffle) if self.config.shuffle > 1 else feats)

    def splice(self, image_tokens, idx):
        """Replace every <image> of idx (B, T) by its N image tokens.

        image_tokens (B, M, N, C): up to M images per row, in reading order. Returns x (B, L, C) with L = T + M (N - 1),
        padded on the right, and `last` (B, T): where token t of idx ends in x (for <image>, its last image token).
        The shapes depend only on T, M and N, so nothing waits for the device and torch.compile sees one graph.

        N = 3:  idx  [<image> a  dog]   ->   x  [i0 i1 i2 a  dog],   last  [2 3 4]
        on the way: is_image [1 0 0], size [3 1 1], begin [0], slots [0 1 2]
        x has one row too many at first: what must not be written anywhere goes there, and x[:, :L] drops it
        """
        (B, T), (_, M, N, C) = idx.shape, image_tokens.shape
        is_image = idx == self.config.image_token                                 # (B, T)
        if idx.device.type == "cpu" and not torch.compiler.is_compiling():        # on a GPU, asking would stall it
            most = int(is_image.sum(dim=1).max())
            assert most <= M, f"a prompt holds {most} <image> tokens but only {M} images were given"
        size = torch.where(is_image, N, 1)                                        # (B, T) rows that each token takes
        last = size.cumsum(dim=1) - 1                                             # (B, T)
        L = T + M * (N - 1)
        words = self.text.embed(idx)                                              # (B, T, C)
        image_tokens = image_tokens.to(words.dtype)                               # autocast left them in bf16
        x = words.new_zeros(B, L + 1, C)                                          # one spare row for what is unused
        x = x.scatter(1, torch.where(is_image, L, last)[:, :, None].expand(-1, -1, C), words)
        # where image m of a row begins: the m-th position with is_image, or the spare row if there is none
        order = torch.where(is_image, is_image.cumsum(dim=1) - 1, M)              # (B, T): 0, 1, .. at images, else M
        begin = torch.full((B, M + 1), L, device=idx.device).scatter(1, order, torch.where(is_image, last - (N - 1), L))
        slots = begin[:, :M, None] + torch.arange(N, device=idx.device)           # (B, M, N)
        slots = slots.clamp(max=L).flatten(1)[:, :, None].expand(-1, -1, C)       # (B, M * N, C)
        x = x.scatter(1, slots, image_tokens.flatten(1, 2))                       # (B, L + 1, C)
        return x[:, :L], last                                                     # (B, L, C), (B, T)

    def _read(self, img, idx, cache=None, max_new_tokens=0):
        """Text positions only: hidden states (B, T, C) and `last` (B, T). img (B, M, 3, H, W): M images a row."""
        B = idx.size(0)
        tokens = self.look(img.flatten(0, 1) if img.dim() == 5 else img)          # (images, N, C)
        _, N, C = tokens.shape
        if img.dim() == 5:
            tokens = tokens.view(img.size(0), -1, N, C)                           # (B, M, N, C)
        else:
            tokens = tokens[:, None]                                              # (B, 1, N, C)
        tokens = tokens.repeat_interleave(B // tokens.size(0), dim=0)             # K captions share an image
        x, last = self.splice(tokens, idx)                                        # (B, L, C), (B, T)
        if cache is not None:
            cache.max_len = x.size(1) + max_new_tokens
        x = self.text.hidden(x, cache=cache)                                      # (B, L, C)
        # the vocabulary is asked only where text is read: scores at image positions would be thrown away
        return x.gather(1, last[:, :, None].expand(-1, -1, C)), last              # (B, T, C)

    def _read_packed(self, img, idx, n_shared, needed=None):
        """Hidden states (B * K, T, C) like _read's, but image and prompt, the same for K rows, are read once.

        needed (B * K, T), on a CPU: which tokens matter. The others, padding, are left out; their states are 0.
        """
        tokens = self.look(img)                                                   # (B, N, C)
        B, K, T = len(tokens), len(idx) // len(tokens), idx.size(1) - n_shared
        start, last = self.splice(tokens[:, None], idx[::K, :n_shared])           # (B, S, C), (B, n_shared)
        S, most = start.size(1), self.text.config.block_size
        assert S + T <= most, f"{S + T} tokens, but the model's context holds {most}"
        slots = torch.arange(K * T, device=idx.device).expand(B, -1)              # (B, K T): all tokens of all texts
        if needed is not None:                                  # .. or those that matter first, and the rest cut off
            needed = needed[:, n_shared:].reshape(B, K * T)
            slots = needed.int().argsort(dim=1, descending=True, stable=True)[:, :int(needed.sum(dim=1).max())]
        texts = self.text.embed(idx[:, n_shared:].reshape(B, K * T).gather(1, slots))        # (B, L - S, C)
        begin = torch.arange(S, device=idx.device).expand(B, -1)
        owner = torch.cat([torch.full_like(begin, -1), slots // T], dim=1)        # (B, L): which text, -1 for all
        pack = Packed(torch.cat([begin, S + slots % T], dim=1), owner)
        x = self.text.hidden(torch.cat([start, texts], dim=1), cache=pack)        # (B, L, C)
        start = x.gather(1, last[:, :, None].expand(-1, -1, x.size(2)))           # (B, n_shared, C)
        texts = x.new_zeros(B, K * T, x.size(2)).scatter(1, slots[:, :, None].expand(-1, -1, x.size(2)), x[:, S:])
        return torch.cat([start.repeat_interleave(K, dim=0), texts.view(B * K, T, -1)], dim=1)     # (B * K, T, C)

    def forward(self, img, idx, targets=None, n_shared=0, loss_only=False):
        """idx (B * K, T) with `<image>` tokens in it -> logits (B * K, T, V) at the text positions, and the loss.

        targets (B * K, T): the word after <image> is predicted at <image>, from the last image token. Image positions
        themselves have no logits and so can never be trained on.
        n_shared: so many tokens, up to an <image>, begin all K rows of an image alike: read them, and it, only once.
        loss_only: what no target needs may be left out: padding is not read, and logits are (1, number of targets, V).
        Only on a CPU: a GPU would have to wait for the counting. Nor under torch.compile: the shape must not vary.
        """
        graded = needed = None
        if loss_only and targets is not None and idx.device.type == "cpu" and not torch.compiler.is_compiling():
            graded = targets != IGNORE                                            # (B * K, T)
            needed = graded.flip(1).cummax(dim=1).values.flip(1)                  # .. and all that comes before one
        if n_shared and len(idx) > len(img) and img.dim() < 5:
            x = self._read_packed(img, idx, n_shared, needed)                     # (B * K, T, C)
        else:
            x, _ = self._read(img, idx)
        if graded is not None:
            x, targets = x[graded][None], targets[graded][None]                   # (1, targets, C), (1, targets)
        logits = self.text.head(x)                                                # (B * K, T, V)
        return logits, None if targets is None else self.text.loss(logits, targets)

    def prefill(self, img, idx, lengths=None, max_new_tokens=0):
        """Image and prompt in one reading: logits of the next token (B, V) and the state to go on from."""
        cache = KVCache(self.config.text.n_layer, 0)
        x, last = self._read(img, idx, cache, max_new_tokens)                     # (B, T, C), (B, T)
        end = last[:, -1] if lengths is None else last.gather(1, lengths[:, None] - 1)[:, 0]     # (B,)
        # rows end at different places, or all leave room that was kept for more images than they show
        uneven = bool((end != end[0]).any()) or int(end[0]) + 1 < cache.length
        return self.text.head(last_of(x, lengths)), cache.finish_prompt(end + 1 if uneven else None)


class LSTMState:
    """What an LSTM captioner carries from word to word: h and c (L, R, H), and the image's keys and values."""

    def __init__(self, h, c, cache=None):
        self.h, self.c, self.cache = h, c, cache

    def reorder(self, rows):
        """Row i continues what was row rows[i]. rows (R',)."""
        self.h, self.c = self.h[:, rows], self.c[:, rows]       # the cache stays: beams never leave their image


class LSTMCaptioner(Captioner):
    """Features -> the LSTM's first state; then a word in, a word out, and nothing but the state in between.

    From "Show and tell" (Vinyals et al. 2015, arXiv:1411.4555), with the picture in the first state, through tanh, as
    in "Show, attend and tell" (Xu et al. 2015, arXiv:1502.03044). With n_head, each state on its way out also asks the
    features (a grid, or the one vector there is): attention after the recurrence (Luong et al. 2015), so that all steps
    of the LSTM still run as one pass.
    """

    def __init__(self, config):
        super().__init__(config)
        c = config.text
        self.wte = nn.Embedding(c.vocab_size, c.n_embd)                           # (V, C)
        nn.init.normal_(self.wte.weight, std=c.n_embd ** -0.5)
        self.drop = nn.Dropout(c.dropout)
        self.bridge = nn.ModuleDict({"norm": nn.LayerNorm(config.width),
                                     "state": Linear(config.width, 2 * c.n_layer * c.n_hidden)})
        if c.n_head:
            self.bridge["feats"] = Linear(config.width, c.n_hidden)
            self.bridge["attn"] = Attention(c.n_hidden, c.n_head)
        self.lstm = LSTM(c.n_embd, c.n_hidden, c.n_layer, dropout=c.dropout)
        self.out = Linear(c.n_hidden, c.n_embd) if c.tied and c.n_hidden != c.n_embd else None
        self.head_weight = None if c.tied else nn.Parameter(torch.randn(c.vocab_size, c.n_hidden) * c.n_hidden ** -0.5)
        self.head_bias = nn.Parameter(torch.zeros(c.vocab_size))

    def look(self, img):
        """img (B, 3, H, W) or features -> the first h and c (L, B, H), and what attention reads, (B, N, H) or None."""
        feats = self.drop(self.bridge["norm"](self.encode(img)))                  # (B, N, C_img)
        state = torch.tanh(self.bridge["state"](feats.mean(dim=1)))               # (B, 2 L H)
        h, c = state.view(len(feats), 2, self.config.text.n_layer, -1).permute(1, 2, 0, 3).contiguous()     # (L, B, H)
        return h, c, self.bridge["feats"](feats) if self.config.text.n_head else None

    def head(self, x, grid=None, cache=None):
        """States x (B * K, T, H) -> logits (B * K, T, V)."""
        if grid is not None:
            x = x + self.bridge["attn"](x, grid, cache)                           # (B * K, T, H)
        x = self.drop(x if self.out is None else self.out(x))
        return linear(x, self.wte.weight if self.head_weight is None else self.head_weight, self.head_bias)

    def forward(self, img, idx, targets=None):
        """idx (B * K, T): all T words of all captions in one pass -> logits (B * K, T, V) and the loss."""
        h, c, grid = self.look(img)
        h, c = (t.repeat_interleave(len(idx) // t.size(1), dim=1) for t in (h, c))         # (L, B * K, H)
        x, _ = self.lstm(self.drop(self.wte(idx)), (h, c))                        # (B * K, T, H)
        logits = self.head(x, grid)                                               # (B * K, T, V)
        return logits, None if targets is None else next_token_loss(
            logits, targets, self.config.text.smoothing if self.training else 0.0)

    def prefill(self, img, idx, lengths=None, max_new_tokens=0):
        """Look once, read the prompts idx (B, T): logits of the next token (B, V) and the state to go on from."""
        h, c, grid = self.look(img)
        state = LSTMState(h, c, KVCache(1, 0))
        state.cache.feats = grid
        x, lengths = self.drop(self.wte(idx)), torch.full((len(idx),), idx.size(1)) if lengths is None else lengths
        for t in range(idx.size(1)):                                              # prompts are short, and may differ
            _, (h, c) = self.lstm(x[:, t:t + 1], (state.h, state.c))
            reads = (t < lengths).to(h.device)[:, None]                           # (B, 1) rows that have a word here
            state.h, state.c = torch.where(reads, h, state.h), torch.where(reads, c, state.c)
        return self.head(state.h[-1][:, None], grid, state.cache)[:, -1], state

    def step(self, idx, state):
        """One more token per row: idx (R,) -> logits (R, V)."""
        x, (state.h, state.c) = self.lstm(self.wte(idx[:, None]), (state.h, state.c))       # (R, 1, H)
        return self.head(x, state.cache.feats, state.cache)[:, -1]                # (R, V)


MODELS = {"cross": CrossCaptioner, "prefix": PrefixVLM, "lstm": LSTMCaptioner}


def to_dict(config):
    """A VLMConfig as plain nested dicts, for config.json."""
    return asdict(config)


def from_dict(d):
    """The inverse of to_dict: config.json's "sizes" -> VLMConfig."""
    vision = ViTConfig(**d["vision"]) if d["vision"] else None
    text = (LSTMConfig if d["model"] == "lstm" else GPTConfig)(**d["text"])
    return VLMConfig(**{**d, "vision": vision, "text": text})


def build(config):
    """VLMConfig -> the model it describes, freshly initialised."""
    assert config.model in MODELS, f"no model is called {config.model!r}; there are {', '.join(MODELS)}"
    return MODELS[config.model](config)
