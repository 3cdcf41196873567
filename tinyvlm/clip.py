"""CLIP: two towers that put images and sentences into one space, where what belongs together lies together.

From "Learning transferable visual models from natural language supervision" (Radford et al. 2021, arXiv:2103.00020).
The vision tower is our ViT or ResNet-50, the text tower our GPT without its output matrix, or a mere bag of words. New
is the task set by a batch: which of B sentences belongs to this image, and which of B images to this sentence?

              a dog   a boat                     row 0 should find "a dog", column 0 should find the dog's image:
    dog.jpg  [  9.1     2.0 ]                    cross-entropy along the rows and along the columns,
    boat.jpg [  1.5     8.7 ]                    the right answers on the diagonal

The table needs all B pairs at once: `gather` brings the embeddings of all processes together, and `contrastive_step`
computes them twice where memory is short. Left out: OpenAI's attention-pooled ResNet."""
import math
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from .cnn import AllReduce, ResNetConfig
from .config import UserError, check_sizes
from .gpt import GPT, GPTConfig
from .vit import ViTConfig, build_vision

MAX_LOG_SCALE = math.log(100)   # sharper than a factor of 100, training becomes unstable (section 2.5 of the paper)
chance = math.log               # chance(B): the loss of a model that cannot tell B candidates apart: 4.852 for 128
VISION = dict(patch_size=32, activation="quick_gelu", eps=1e-5, pre_norm=True, patch_bias=False)
TEXT = dict(block_size=77, vocab_size=49408, n_head=8, n_embd=512, activation="quick_gelu")


@dataclass
class CLIPConfig:
    """The defaults are OpenAI's ViT-B/32. With the wrong activation nothing fails, the features are only worse."""
    vision: ViTConfig | ResNetConfig | None = field(default_factory=lambda: ViTConfig(**VISION))  # None: given features
    text: GPTConfig | None = field(default_factory=lambda: GPTConfig(**TEXT))       # None: given embeddings
    n_joint: int = 512              # D, width of the space that both towers meet in
    head: str = "linear"            # on the image side: "linear" as published; "mlp": two layers, GELU between
    end_token: int | None = None    # a text is read at the first of these; None: at its largest id, as OpenAI's CLIP
    feat_dim: int | None = None     # width of ready-made features, where vision is None
    dropout: float = 0.0            # before each linear layer of the image head, and on a bag's words
    bag: bool = False               # the text tower: no transformer, but the mean of the words' vectors


def similarities(image_emb, text_emb, logit_scale):
    """(B, D), (M, D) -> logits (B, M): the cosines times exp(logit_scale)."""
    with torch.autocast(image_emb.device.type, enabled=False):      # a logit of 50 in bfloat16 is off by up to 1/8
        return torch.as_tensor(logit_scale).float().exp() * image_emb.float() @ text_emb.float().t()


def info_nce(image_emb, text_emb, logit_scale):
    """InfoNCE (van den Oord et al. 2018), both ways, of L2-normalised embeddings (B, D), row i of one belonging to row
    i of the other. logit_scale: the LOG of the factor on the cosines (the inverse temperature)."""
    logits = similarities(image_emb, text_emb, logit_scale)                       # (B, B)
    diagonal = torch.arange(len(logits), device=logits.device)                    # (B,): the right answers
    return (F.cross_entropy(logits, diagonal) + F.cross_entropy(logits.t(), diagonal)) / 2


class WordBag(nn.Module):
    """The simplest text tower: the mean of the words' vectors. "Dog bites man" is "man bites dog", but there is little
    to learn, and a word that tells nothing can make its vector short: from few captions it learns more (README)."""
    def __init__(self, c, dropout):
        super().__init__()
        self.wte, self.drop = nn.Embedding(c.vocab_size, c.n_embd), nn.Dropout(dropout)
        nn.init.normal_(self.wte.weight, std=0.05)

    def forward(self, idx, n):
        """idx (B, T), of which the first n (B,) are words -> (B, C)."""
        words = torch.arange(idx.size(1), device=idx.device) < n[:, None]         # (B, T)
        x = self.drop(self.wte(idx)) * words[:, :, None]                          # (B, T, C)
        return x.sum(dim=1) / n[:, None].clamp(min=1)                             # (B, C)


class CLIP(nn.Module):
    """Two towers and two projections into one space of D numbers, with a learned temperature between them."""
    def __init__(self, config):
        super().__init__()
        c = self.config = config
        check_sizes(c, head=("linear", "mlp"))
        self.vision = build_vision(c.vision) if c.vision else None                # (B, 3, H, W) -> (B, width)
        self.text = (WordBag(c.text, c.dropout) if c.bag else GPT(c.text)) if c.text else None
        width = self.vision.n_feat if c.vision else c.feat_dim
        self.drop = nn.Dropout(c.dropout)
        self.image_head = nn.Linear(width, c.n_joint, bias=False)
        if c.head == "mlp":                         # ResNet-50 against a ready text tower: 2048 -> 1024 -> 512
            self.image_head = nn.Sequential(nn.Linear(width, width // 2), nn.Sequential(nn.GELU(), self.drop),
                                            nn.Linear(width // 2, c.n_joint))
        self.text_head = nn.Linear(c.text.n_embd, c.n_joint, bias=False) if c.text else None
        for layer in [*self.image_head.modules(), self.text_head]:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=layer.in_features ** -0.5)
        if getattr(self.vision, "cls", None) is not None:       # as zeros, its gradient through the norm in front would
            nn.init.normal_(self.vision.cls, std=width ** -0.5)                   # be 1 / sqrt(eps) = 316 times larger
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))         # a log: equal steps, equal factors

    def forward(self, img, idx):
        """img (B, 3, H, W), idx (B, T), pair by pair -> what info_nce takes."""
        if self.training:           # clamp the parameter itself: clamping a copy would also cut its gradient for good
            self.logit_scale.data.clamp_(max=MAX_LOG_SCALE)
        return self.encode_image(img), self.encode_text(idx), self.logit_scale

    def encode_image(self, img):
        """img (B, 3, H, W), or features (B, C) as the tower pools them -> (B, D), of length 1."""
        feats = img if img.dim() == 2 else self.vision.features(img)              # (B, C)
        return F.normalize(self.image_head(self.drop(feats)).float(), dim=-1)     # (B, D)

    def encode_text(self, idx):
        """idx (B, T) -> (B, D), of length 1: the state at the end token, which alone has read everything, or a bag's
        mean. Padding after it changes nothing, as blocks are causal. Floats (B, D) are embeddings already."""
        if idx.is_floating_point():
            return F.normalize(idx.float(), dim=-1)                               # (B, D)
        end = self.config.end_token
        ended = idx == (idx.amax(dim=1, keepdim=True) if end is None else end)    # (B, T)
        if not self.training and not ended.any(dim=1).all():    # in training no GPU is waited for
            raise UserError(f"a text lacks the end token, id {end}: use the tokenizer that came with the weights")
        at = ended.int().argmax(dim=1)                                            # (B,): the first
        if isinstance(self.text, WordBag):                      # not config.bag: the tower may be borrowed (use.py)
            x = self.text(idx, at)                                                # (B, C)
        else:
            x = self.text.hidden(idx)[torch.arange(len(idx), device=idx.device), at]        # (B, C)
        return F.normalize(self.text_head(x).float(), dim=-1)                     # (B, D)

    def parts(self):
        """{"connector" | "decoder" | "vision": parameters}: heads and temperature, text tower, vision tower."""
        prefixes = {"connector": ("logit_scale", "image_head", "text_head"), "decoder": "text.", "vision": "vision."}
        return {part: [p for name, p in self.named_parameters() if name.startswith(prefix)]
                for part, prefix in prefixes.items()}


def gather(x):
    """(B, D), B the same everywhere -> the rows of all W processes (W * B, D), with gradients. Each process calls
    backward on the WHOLE batch's loss, so gradients come W times; DistributedDataParallel's mean takes the W away."""
    if not dist.is_initialized():
        return x
    rows = x.new_zeros(dist.get_world_size(), *x.shape)                           # (W, B, D)
    rows[dist.get_rank()] = x                                                     # the sum fills in the others'
    return AllReduce.apply(rows).flatten(0, 1)                                    # (W * B, D)


def contrastive_step(model, chunks, autocast=nullcontext, scale=lambda loss: loss):
    """The gradient of a batch of B pairs in the memory of one chunk, as GradCache makes it (arXiv:2101.06983): embed
    all chunks without a graph, keeping 2 B D numbers; take the loss of the whole (B, B) table and its gradient by these
    numbers; embed each chunk again, now with a graph, and push its rows of that gradient through it. chunks: pairs
    (img, idx), equally many in all processes; scale: the GradScaler's method. Adds to .grad; returns the loss."""
    seeds = torch.randint(2 ** 62, (len(chunks),)).tolist()     # dropout must fall alike both times

    def embed(k):
        torch.manual_seed(seeds[k])
        with autocast():
            return model(*chunks[k])                                              # (b, D), (b, D), ()
    buffers = [buffer.clone() for buffer in model.buffers()]
    with torch.no_grad():
        leaves = [[t.detach().requires_grad_() for t in embed(k)] for k in range(len(chunks))]
        for buffer, old in zip(model.buffers(), buffers):       # BatchNorm: this was a rehearsal
            buffer.copy_(old)
    image_emb, text_emb, scales = zip(*leaves)
    loss = info_nce(gather(torch.cat(image_emb)), gather(torch.cat(text_emb)), scales[-1])
    scale(loss).backward()                                      # now every leaf has its .grad, but of scales the last
    no_sync = getattr(model, "no_sync", nullcontext)            # DDP adds up over processes once, with the last chunk
    for k in range(len(chunks)):
        with no_sync() if k + 1 < len(chunks) else nullcontext():
            pairs = [(x, leaf.grad) for x, leaf in zip(embed(k), leaves[k])       # without what is frozen
                     if x.requires_grad and leaf.grad is not None]
            torch.autograd.backward(*zip(*pairs))
    return loss.detach()
