"""Whose weight is whose: the name tables of public checkpoints.

Whoever trained a checkpoint chose the names of its arrays and, here and there, the layout: GPT-2 keeps its matrices
transposed, Hugging Face's ViT keeps q, k and v apart. Below, the first column holds our name, each other one the same
weight as transformers, timm, torchvision or OpenAI save it. To load, read a line from right to left; to export, from
left to right.

    ln_f.                   a dot at the end: the pair ln_f.weight and ln_f.bias; bn1.* adds running_mean and _var
    blocks.{i}.             {i} is a layer's number; blocks.{i}. on its own: the six lines of BLOCK, in every layer
    [q+k+v]_proj.           several of their tensors, one below the other, make one of ours
    c_fc.^T  x^1  x^V       theirs is transposed, gets an axis in front, or is flattened
    head.?                  a file that has none of it is a model without it; - in a column: none of those models has it

Worked example. GPT-2's cross-attention, q from the text and k, v from the image, C = 768 channels, in layer 0:

    ours    blocks.{i}.cross.qkv.                   theirs  h.{i}.crossattention.[q+c]_attn.^T
    blocks.0.cross.qkv.weight (2304, 768)  =  h.0.crossattention.q_attn.weight (768, 768), transposed,
                                    on top of h.0.crossattention.c_attn.weight (768, 1536), transposed"""
import re
from typing import NamedTuple

import torch

OPS = {     # what is done to each of their tensors; several results are then joined, row under row
    "": lambda x: x,
    "T": lambda x: x.t(),                           # Conv1D and x @ P keep (in, out), nn.Linear (out, in)
    "1": lambda x: x[None, None] if x.dim() == 1 else x[None],          # (C,), (N, C) -> (1, 1, C), (1, N, C)
    "V": lambda x: x.flatten(1)}                    # linear layers kept as convolutions, (O, C, 7, 7) -> (O, 49 C)
PARTS = {".": ("weight", "bias"), "*": ("weight", "bias", "running_mean", "running_var")}


class Source(NamedTuple):
    """Where a weight of ours comes from: names in the file, and the key of OPS that makes it of those tensors."""
    names: tuple
    op: str = ""

    def make(self, tensors):
        pieces = [OPS[self.op](x) for x in tensors]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)     # q, k, v, (C, C) each -> (3C, C)

    def shape(self, tensors):
        """The shape that `make` would give, without reading a number."""
        return tuple(self.make([tensors[name].to("meta") for name in self.names]).shape)


# ---- the tables

def columns(text):
    """A table as text -> {title of a column: {our name: theirs}}."""
    titles, *rows = [line.split() for line in text.strip().splitlines()]
    return {title: {row[0]: row[k] for row in rows if row[k] != "-"} for k, title in enumerate(titles) if k}


# One transformer block. GPT-2's Conv1D computes x @ W and so keeps W as (in, out); its columns are q, k, v as our rows.
BLOCK = columns("""
ours       gpt2           vit                                    timm       clip                    openai
ln_1.      ln_1.          layernorm_before.                      norm1.     layer_norm1.            ln_1.
attn.qkv.  attn.c_attn.^T attention.attention.[query+key+value]. attn.qkv.  self_attn.[q+k+v]_proj. attn.in_proj_
attn.proj. attn.c_proj.^T attention.output.dense.                attn.proj. self_attn.out_proj.     attn.out_proj.
ln_2.      ln_2.          layernorm_after.                       norm2.     layer_norm2.            ln_2.
mlp.fc.    mlp.c_fc.^T    intermediate.dense.                    mlp.fc1.   mlp.fc1.                mlp.c_fc.
mlp.proj.  mlp.c_proj.^T  output.dense.                          mlp.fc2.   mlp.fc2.                mlp.c_proj.
""")

# A text tower. Only the GPT-2 of a captioner attends to an image.
TEXT = columns("""
ours                    gpt2                              clip                                  openai
wte.weight              wte.weight                        embeddings.token_embedding.weight     token_embedding.weight
wpe.weight              wpe.weight                        embeddings.position_embedding.weight  positional_embedding
blocks.{i}.             h.{i}.                            encoder.layers.{i}.         transformer.resblocks.{i}.
blocks.{i}.ln_cross.?   h.{i}.ln_cross_attn.              -                                     -
blocks.{i}.cross.qkv.?  h.{i}.crossattention.[q+c]_attn.^T    -                                 -
blocks.{i}.cross.proj.? h.{i}.crossattention.c_proj.^T    -                                     -
ln_f.                   ln_f.                             final_layer_norm.                     ln_final.
""")

# An image tower. "pre_layrnorm" is how they spell it; CLIP's patches have no bias.
VISION = columns("""
ours          vit                                      timm
cls           embeddings.cls_token                     cls_token
pos           embeddings.position_embeddings           pos_embed
patch.        embeddings.patch_embeddings.projection.  patch_embed.proj.
blocks.{i}.   encoder.layer.{i}.                       blocks.{i}.
ln_f.         layernorm.                               norm.
""") | columns("""
ours          clip                                     openai
cls           embeddings.class_embedding^1             class_embedding^1
pos           embeddings.position_embedding.weight^1   positional_embedding^1
patch.weight  embeddings.patch_embedding.weight        conv1.weight
ln_pre.       pre_layrnorm.                            ln_pre.
blocks.{i}.   encoder.layers.{i}.                      transformer.resblocks.{i}.
ln_f.         post_layernorm.                          ln_post.
""")

# Stage {s}, which torchvision counts from one, {t}; convolution {k} of a block, which transformers counts from zero.
RESNET = columns("""
ours                            torchvision                   transformers
conv1.weight                    conv1.weight                  embedder.embedder.convolution.weight
bn1.*                           bn1.*                         embedder.embedder.normalization.*
stages.{s}.{i}.conv{k}.weight   layer{t}.{i}.conv{k}.weight   encoder.stages.{s}.layers.{i}.layer.{j}.convolution.weight
stages.{s}.{i}.bn{k}.*          layer{t}.{i}.bn{k}.*          encoder.stages.{s}.layers.{i}.layer.{j}.normalization.*
stages.{s}.0.shortcut.0.weight? layer{t}.0.downsample.0.weight encoder.stages.{s}.layers.0.shortcut.convolution.weight
stages.{s}.0.shortcut.1.*?      layer{t}.0.downsample.1.*     encoder.stages.{s}.layers.0.shortcut.normalization.*
""")


# ---- families: each is a list of namings, {our line: their line}, one for each way its files are found written

def _tower(table, dialect, ours="", theirs=""):
    """One column of a table, its blocks filled in, one level down on both sides: vision.ln_f. = visual.ln_post."""
    lines = {}
    for left, right in table[dialect].items():
        inner = BLOCK[dialect] if left == "blocks.{i}." else {"": ""}             # the six lines, or the line as it is
        lines |= {ours + left + a: theirs + right + b for a, b in inner.items()}
    return lines


def _resnet(dialect, head, lead=""):
    at = [dict(s=s, t=s + 1, k=k, j=k - 1, i="{i}") for s in range(4) for k in (1, 2, 3)]   # some lines come thrice
    return {a.format(**n): lead + b.format(**n) for n in at for a, b in RESNET[dialect].items()} | {"head.?": head}


FEATURES = {f"feature_map.{n}.?": f"features.{n}." for n in range(50)}          # VGG's are numbered alike everywhere
NAMINGS = {     # a model saved from inside its task's class has a name in front; of several namings the best fit counts
    "gpt2": [_tower(TEXT, "gpt2", "", lead) for lead in ("transformer.", "")],
    "vit": [_tower(VISION, "vit", "", lead) | {"head.?": "classifier."} for lead in ("vit.", "")] +
           [_tower(VISION, "timm") | {"head.?": "head."}],
    "clip": [_tower(VISION, "clip", "vision.", "vision_model.") | _tower(TEXT, "clip", "text.", "text_model.") | {
                 "logit_scale": "logit_scale", "image_head.weight": "visual_projection.weight",
                 "text_head.weight": "text_projection.weight"},
             _tower(VISION, "openai", "vision.", "visual.") | _tower(TEXT, "openai", "text.") | {
                 "logit_scale": "logit_scale", "image_head.weight": "visual.proj^T",            # used as x @ P
                 "text_head.weight": "text_projection^T"}],
    "resnet50": [_resnet("transformers", "classifier.1.", lead) for lead in ("resnet.", "")] +
                [_resnet("torchvision", "fc.")],
    "vgg16": [FEATURES | {"fc1.": "pre_logits.fc1.^V", "fc2.": "pre_logits.fc2.^V", "head.?": "head.fc."},      # timm
              FEATURES | {"fc1.": "classifier.0.^V", "fc2.": "classifier.3.^V", "head.?": "classifier.6."}],
    "vit_gpt2": [_tower(VISION, "vit", "vision.", "encoder.") | _tower(TEXT, "gpt2", "text.", "decoder.transformer.") |
                 {"connector.proj.?": "enc_to_dec_proj."}]}     # only between towers of different width


# ---- reading a naming

def write_out(naming, names, ours=False):
    """A naming with all its layers and parts written out for one model: {our name: Source}. names: those of the file
    (or, with ours=True, of our model), which tell the layers and which lines with "?" apply."""
    rules = {}
    for left, right in naming.items():
        left, optional, _ = left.partition("?")
        right, _, op = right.partition("^")
        stem, layered, _ = (left if ours else right).partition("{i}")             # "h.", for "h.{i}.ln_1."
        n_layer = len({m[1] for name in names if (m := re.match(re.escape(stem) + r"(\d+)\.", name))}) if layered else 1
        lines = {}
        for i in range(n_layer):
            for part in PARTS.get(left[-1], ("",)):
                a, b = (side.replace("{i}", str(i)).rstrip("*") + part for side in (left, right))
                head, _, rest = b.partition("[")        # "layers.0.self_attn.[q+k+v]_proj.bias": three names
                middle, _, tail = rest.partition("]")
                lines[a] = Source(tuple(head + word + tail for word in middle.split("+")), "" if part == "bias" else op)
        if not optional or any(name in names for a, rule in lines.items() for name in ([a] if ours else rule.names)):
            rules |= lines
    return rules


def best_naming(names):
    """The naming that finds the largest share of its names among `names`: (that share, its family, it written out)."""
    fits = [(family, write_out(naming, names)) for family in NAMINGS for naming in NAMINGS[family]]
    return max(((sum(rule.names[0] in names for rule in rules.values()) / len(rules), family, rules)
                for family, rules in fits), key=lambda fit: fit[0])


def outward(naming, state):
    """The way back: {their name: tensor}, made of our `state` dict by undoing what each line does."""
    tensors = {}
    for ours, rule in write_out(naming, state, ours=True).items():
        pieces = [state[ours]]
        if len(rule.names) > 1:                         # ours is q, k and v; theirs those, or q and k with v
            C = len(state[ours]) // 3                                             # of (3C, C)
            pieces = state[ours].split([C, 2 * C] if len(rule.names) == 2 else C)  # rows of q, k, v
        tensors |= {name: piece.t() if rule.op == "T" else piece for name, piece in zip(rule.names, pieces)}
    return tensors
