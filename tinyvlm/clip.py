"""CLIP: two towers that put pictures and sentences into one space, where what belongs together lies together.

From "Learning transferable visual models from natural language supervision" (Radford et al. 2021, arXiv:2103.00020).
There is nothing new inside: the image tower is our ViT (a norm before its blocks, no patch bias) or our ResNet-50, the
text tower our GPT without its output matrix. New is the question asked of a batch: which of these B sentences belongs
to this picture, and which of these B pictures to this sentence? Rows and columns of one (B, B) table of similarities:

              a dog   a boat                     row 0 should say "a dog", column 0 should say the dog's picture:
    dog.jpg  [  9.1     2.0 ]                    cross-entropy along the rows and along the columns,
    boat.jpg [  1.5     8.7 ]                    the right answers on the diagonal

An untrained model is at loss ln(B): it cannot tell B candidates apart. The more candidates, the better the teacher,
but gradients cannot simply be added up over micro-batches, as the table needs all B pairs at once. Two ways around:
`gather` brings the embeddings of all processes together, and `contrastive_step` computes the embeddings twice. Either
tower may be left out (None): ready-made features, or text embeddings made once by a frozen tower, then take its place.
Left out: OpenAI's ResNet with attention pooling.
"""
import math
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from .cnn import ResNet50, ResNetConfig
from .gpt import GPT, GPTConfig
from .vit import ViT, ViTConfig

MAX_LOG_SCALE = math.log(100)   # sharper than a factor of 100, training becomes unstable (section 2.5 of the paper)


def vision_config(**sizes):
    """A ViT as CLIP builds it, ViT-B/32 if nothing else is said."""
    return ViTConfig(**{"patch_size": 32, "activation": "quick_gelu", "eps": 1e-5, "pre_norm": True,
                        "patch_bias": False, **sizes})


def text_config(**sizes):
    """The text tower: GPT-2's blocks, narrower, over CLIP's own vocabulary of 49,408 tokens and 77 positions."""
    return GPTConfig(**{"block_size": 77, "vocab_size": 49408, "n_head": 8, "n_embd": 512, "activation": "quick_gelu",
                        **sizes})


@dataclass
class CLIPConfig:
    """The defaults are ViT-B/32 with OpenAI's activation.

    LAION's weights want "gelu" in both towers; with the wrong one nothing fails, the features are only worse.
    """
    vision: ViTConfig | ResNetConfig | None = field(default_factory=vision_config)  # None: images are features
    text: GPTConfig | None = field(default_factory=text_config)                     # None: texts are embeddings
    n_joint: int = 512              # D, width of the space that both towers meet in
    head: str = "linear"            # on the image side: "linear" as published; "mlp": two layers, GELU between
    end_token: int | None = None    # id that ends a sentence; None: the largest id in each row
    feat_dim: int | None = None     # width of ready-made features, where vision is None
    n_hidden: int | None = None     # width inside the "mlp" head; None: half of what comes in (2048 -> 1024 -> 512)
    dropout: float = 0.0            # before each linear layer of the image head


def similarities(image_emb, text_emb, log_scale):
    """(B, D), (M, D) -> logits (B, M), the cosines times exp(log_scale). Always in float32: a logit of 50 in bfloat16
    would be off by up to 1/8."""
    with torch.autocast(image_emb.device.type, enabled=False):
        return log_scale.float().exp() * image_emb.float() @ text_emb.float().t()              # (B, M)


def contrastive_loss(logits):
    """logits (B, B), picture i and sentence i belonging together -> the mean of both directions' cross-entropy.

    All else counts as wrong: of two pictures whose captions happen to be the same words, each is told that the other's
    copy is. A little noise, left as the paper leaves it.
    """
    B, n_text = logits.shape
    assert B == n_text, f"each picture needs its one sentence, got {B} pictures and {n_text} sentences"
    targets = torch.arange(B, device=logits.device)                               # the diagonal
    return (F.cross_entropy(logits.float(), targets) + F.cross_entropy(logits.float().t(), targets)) / 2


def info_nce(image_emb, text_emb, logit_scale):
    """The symmetric InfoNCE loss of L2-normalised embeddings (B, D), row i of one belonging to row i of the other.

    logit_scale: a scalar tensor, the LOG of the factor on the cosines (the inverse temperature), capped at ln 100.
    Reference: "Representation learning with contrastive predictive coding" (van den Oord et al. 2018), symmetric as in
    CLIP's figure 3. All embeddings equal: every candidate is as likely as the others, and the loss is ln(B).
    """
    return contrastive_loss(similarities(image_emb, text_emb, torch.as_tensor(logit_scale).clamp(max=MAX_LOG_SCALE)))


def chance(B):
    """The loss of a model that cannot tell B candidates apart: ln(B), 4.852 for 128."""
    return math.log(B)


def in_batch_accuracy(logits):
    """logits (B, B) -> how often the true partner scores highest, the mean of both directions. By chance: 1 / B."""
    targets = torch.arange(len(logits), device=logits.device)
    return sum((logits.argmax(dim=d) == targets).float().mean().item() for d in (0, 1)) / 2


class CLIP(nn.Module):
    """Two towers and two projections into one space of D numbers, with a learned temperature between them."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        assert c.head in ("linear", "mlp"), f"head {c.head!r} is neither linear nor mlp"
        assert c.vision or c.feat_dim, f"without a vision tower, feat_dim must be the features' width, not {c.feat_dim}"
        if isinstance(c.vision, ResNetConfig):
            self.vision = ResNet50(c.vision)
            width = self.vision.n_feat
        else:
            self.vision, width = (ViT(c.vision), c.vision.n_embd) if c.vision else (None, c.feat_dim)
        self.text = GPT(c.text) if c.text else None
        self.drop = nn.Dropout(c.dropout)
        self.image_head = nn.Linear(width, c.n_joint, bias=False)
        if c.head == "mlp":                         # ResNet-50 against a ready text tower
            n_hidden = c.n_hidden or width // 2
            self.image_head = nn.Sequential(nn.Linear(width, n_hidden), nn.Sequential(nn.GELU(), nn.Dropout(c.dropout)),
                                            nn.Linear(n_hidden, c.n_joint))
        self.text_head = nn.Linear(c.text.n_embd, c.n_joint, bias=False) if c.text else None
        for layer in [*self.image_head.modules(), self.text_head]:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=layer.in_features ** -0.5)
        if isinstance(self.vision, ViT) and c.vision.class_token:   # the pre-norm of an all-zero row: gradient x 316
            nn.init.normal_(self.vision.cls, std=width ** -0.5)
        # a log, so that the optimiser's equal steps are equal factors and the factor stays positive
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, img, idx, targets=None, embed=False):
        """img (B, 3, H, W), idx (B, T), pair by pair -> logits (B, B), [i, j] for picture i and sentence j; the loss.

        Either may come ready-made: features (B, feat_dim), text embeddings (B, D). The loss needs no targets: the
        partner is known by its place. Of unequal numbers (one picture, many labels) only the logits are made and the
        loss is None. While several processes train, both are of all their pairs together, the same everywhere.
        embed: (image_emb, text_emb, logit_scale) instead, for contrastive_step, which has to come through `forward`:
        nothing else passes through torch.compile and DistributedDataParallel.
        """
        if self.training:           # clamp the parameter itself: clamping a copy would also cut its gradient for good
            with torch.no_grad():
                self.logit_scale.clamp_(max=MAX_LOG_SCALE)
        image_emb, text_emb = self.encode_image(img), self.encode_text(idx)       # (B, D) both
        if embed:
            return image_emb, text_emb, self.logit_scale
        if self.training:
            image_emb, text_emb = gather(image_emb), gather(text_emb)
        logits = similarities(image_emb, text_emb, self.logit_scale)              # (B, B)
        return logits, contrastive_loss(logits) if logits.size(0) == logits.size(1) else None

    def encode_image(self, img):
        """img (B, 3, H, W) -> (B, D), of length 1: the class token's last state (or the pooled features), projected.

        Features (B, C), as the tower would have pooled them, go straight into the head.
        """
        assert img.dim() == 2 or self.vision, "this model has no vision tower: it was trained on ready-made features"
        feats = img if img.dim() == 2 else self.vision(img)                       # (B, N, C), from a ResNet (B, C)
        if feats.dim() == 3:
            feats = feats[:, 0] if self.config.vision.class_token else feats.mean(dim=1)         # (B, C)
        return F.normalize(self.image_head(self.drop(feats)).float(), dim=-1)     # (B, D)

    def encode_text(self, idx):
        """idx (B, T) -> (B, D), of length 1: the state at the end-of-text token, which alone has read everything.

        That token is CLIP's largest id, so argmax finds it (the first, where rows are padded with it too). The blocks
        are causal: whatever stands after it changes nothing, and no mask is needed.
        Floats (B, D) are embeddings already, and are only brought to length 1: in float16 they come a little off.
        """
        if idx.is_floating_point():
            return F.normalize(idx.float(), dim=-1)                               # (B, D)
        assert self.text, "this model has no text tower: it was trained on ready-made text embeddings"
        marks = idx if self.config.end_token is None else (idx == self.config.end_token).int()   # (B, T)
        x = self.text.hidden(self.text.wte(idx))                                  # (B, T, C)
        x = x[torch.arange(len(idx), device=idx.device), marks.argmax(dim=1)]     # (B, C)
        return F.normalize(self.text_head(x).float(), dim=-1)                     # (B, D)

    def parts(self):
        """{"bridge" | "decoder" | "vision": parameters}: heads and temperature, the text tower, the image tower."""
        towers = {"decoder": self.text, "vision": self.vision}
        parts = {part: list(tower.parameters()) if tower else [] for part, tower in towers.items()}
        in_towers = {id(p) for params in parts.values() for p in params}
        return {"bridge": [p for p in self.parameters() if id(p) not in in_towers], **parts}


# ----- Batches larger than one process, or one memory, can hold -----

class AllGather(torch.autograd.Function):
    """Rows (B, D) of each of W processes -> all rows (W * B, D) in each. Backward, their gradients are summed up."""

    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)                                                   # (W * B, D)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)                  # all_reduce writes into it
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]                 # (B, D)


def gather(x):
    """(B, D), B the same everywhere -> the rows of all W processes (W * B, D), with gradients; of one process: itself.

    Each process then calls backward on the WHOLE batch's loss as it is, neither divided by W nor multiplied. Its own
    rows receive W times the gradient (W equal losses, summed), DistributedDataParallel's mean over the processes takes
    the W away, and what is left is the sum over all rows: one process's gradient. The temperature's is the same
    everywhere, and so is its mean.
    """
    return AllGather.apply(x) if dist.is_initialized() and dist.get_world_size() > 1 else x


def contrastive_step(model, chunks, autocast=nullcontext, scale=lambda loss: loss):
    """The gradient of a batch of B pairs in the memory of one chunk: each is embedded twice (GradCache: "Scaling deep
    contrastive learning batch size under memory limited setup", Gao et al. 2021, arXiv:2101.06983).

        1. embed all chunks without a graph; only 2 B D numbers are kept
        2. the loss of the whole (B, B) table, and its gradient with respect to these numbers
        3. embed each chunk again, now with a graph, and push its rows of that gradient through it

    model: a CLIP in training mode, also compiled or in DistributedDataParallel. chunks: pairs (img, idx), or functions
    that make them, called in each pass. Both passes draw the same random numbers: dropout repeats itself, and so does
    augmentation by torch's generators. autocast, scale: called around the model, and on the loss before backward, as
    in contrastive_step(model, chunks, machine.autocast, scaler.scale). Adds to .grad; returns the loss, detached.
    A single chunk is the plain step. BatchNorm takes its means over a chunk (in several processes: over all k-th
    chunks), and its running averages see each once. Processes have equally many chunks of equal size: see `gather`.
    """
    def embed(chunk):
        with autocast():
            return model(*(chunk() if callable(chunk) else chunk), embed=True)    # (b, D), (b, D), ()

    def backward(image_emb, text_emb, log_scale):
        loss = info_nce(gather(image_emb), gather(text_emb), log_scale)
        scale(loss).backward()
        return loss.detach()

    if len(chunks) == 1:
        return backward(*embed(chunks[0]))
    device = next(model.parameters()).device                    # dropout draws from the device's generator
    sources = [(torch, ())] + {"cuda": [(torch.cuda, (device,))], "mps": [(torch.mps, ())]}.get(device.type, [])
    buffers, states, parts = [b.clone() for b in model.buffers()], [], []
    with torch.no_grad():
        for chunk in chunks:
            states.append([source.get_rng_state(*where) for source, where in sources])
            parts.append(embed(chunk))
        for buffer, old in zip(model.buffers(), buffers):       # BatchNorm: this was a rehearsal
            buffer.copy_(old)
    image_emb, text_emb = (torch.cat([part[i] for part in parts]).requires_grad_() for i in (0, 1))      # (B, D) both
    log_scale = parts[0][2].detach().requires_grad_()
    loss = backward(image_emb, text_emb, log_scale)
    rows = [len(part[0]) for part in parts]
    for k, (d_image, d_text) in enumerate(zip(image_emb.grad.split(rows), text_emb.grad.split(rows))):
        for (source, where), state in zip(sources, states[k]):
            source.set_rng_state(state, *where)
        last = k + 1 == len(chunks)                             # DDP exchanges gradients once, at the end
        with nullcontext() if last else getattr(model, "no_sync", nullcontext)():
            pairs = zip(embed(chunks[k]), (d_image, d_text, log_scale.grad if last else None))
            pairs = [(x, dx) for x, dx in pairs if x.requires_grad and dx is not None]    # a side may be frozen
            if pairs:
                torch.autograd.backward(*zip(*pairs))
    return loss
