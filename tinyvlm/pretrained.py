"""From published files to a model that runs, and back: one name table per family, read in both directions.

A checkpoint is a bag of named arrays. Whoever trained it chose the names and, here and there, the layout: GPT-2 keeps
its matrices transposed, Hugging Face's ViT keeps q, k and v apart. A table says what of theirs each weight of ours is
made of, and copy_weights carries it out strictly. Sizes are read off the tensors and must agree with config.json.

    model = load_gpt2("openai-community/gpt2")              # a Hub id, fetched into the shared cache, or a folder
    python -m tinyvlm.pretrained openai-community/gpt2      # print that table, weight by weight
    python -m tinyvlm.pretrained export out/ folder/        # a captioner we trained, as a folder transformers opens

Left out: OpenAI's TorchScript archives, CLIP's attention-pooled ResNets, distilled DeiT, quantised files.
"""
import argparse
import copy
import math
import pickle
import re
from collections import Counter
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from .classifier import Classifier, ClassifierConfig
from .clip import CLIP, CLIPConfig
from .cnn import VGG16, ResNet50, ResNetConfig, VGGConfig
from .config import UserError, run_script
from .download import DownloadError, hf_file
from .gpt import GPT, GPTConfig
from .image import RECIPES, Recipe
from .tokenizer import load_tokenizer
from .transformer import ACTIVATIONS
from .vit import ViT, ViTConfig, resize_positions
from .vlm import CrossCaptioner, VLMConfig, build, from_dict
from .weights import (Source, weight_map, copy_weights, expand, load_safetensors, read_json, save_safetensors,
                      write_json)


@dataclass
class Loaded:
    """A model with what is needed to feed it: `recipe` prepares images, `tokenizer` text, `config` is config.json."""
    model: object
    tokenizer: object
    recipe: Recipe
    config: dict


def is_run(source):
    """Whether `source` is a folder that train.py left (and not a public checkpoint's)."""
    path = Path(source) / "config.json"
    return path.is_file() and "options" in read_json(path)


def _build_run(config):
    """config.json of a run -> the freshly made model it describes."""
    sizes = config["sizes"]
    if config["task"] in ("caption", "vqa"):
        missing = {"model", "first", "end", "max_tokens"} - config.keys()
        if missing:
            raise KeyError(*missing)
        return build(from_dict(sizes))
    tower = sizes["vision"] and (ResNetConfig if "blocks" in sizes["vision"] else ViTConfig)(**sizes["vision"])
    if config["task"] == "classify":
        return Classifier(ClassifierConfig(**{**sizes, "vision": tower}))
    return CLIP(CLIPConfig(**{**sizes, "vision": tower, "text": sizes["text"] and GPTConfig(**sizes["text"])}))


def load_run(folder):
    """A run that train.py left in `folder` -> Loaded, in eval mode. Raises UserError naming what is missing."""
    folder = Path(folder)
    if not (folder / "config.json").exists():
        raise UserError(f"{folder} holds no trained model; train one first: python train.py --out-dir {folder}")
    config = read_json(folder / "config.json")
    try:
        model, recipe = _build_run(config), Recipe(**config["recipe"])
    except (KeyError, TypeError, AttributeError, AssertionError) as error:
        raise UserError(f"{folder / 'config.json'} is not the config of a run this version made ({error}); train again"
                        ) from None
    tensors = load_safetensors(folder / "model.safetensors")
    copy_weights(model, tensors, {name: name for name in tensors}, source=str(folder / "model.safetensors"))
    tokenizer = load_tokenizer(folder / "tokenizer.json") if (folder / "tokenizer.json").exists() else None
    if tokenizer is None and config["task"] in ("caption", "vqa"):
        raise UserError(f"{folder} has lost its tokenizer.json; train again")
    return Loaded(model.eval(), tokenizer, recipe, config)


# ---- finding and opening the files

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
OPEN_CLIP = ("open_clip_model.safetensors",)
PICKLES = ("pytorch_model.bin", "open_clip_pytorch_model.bin")
# Main has no safetensors in these: the commits and branches that do, and a copy under another name.
ELSEWHERE = {
    "openai/clip-vit-base-patch32": [("openai/clip-vit-base-patch32", "d15b5f29721ca72dac15f8526b284be910de18be"),
                                     ("openai/clip-vit-base-patch32", "refs/pr/32"),
                                     ("timm/vit_base_patch32_clip_224.openai", "main")],
    "nlpconnect/vit-gpt2-image-captioning": [
        ("nlpconnect/vit-gpt2-image-captioning", "93857e539f312a97c13f16976c2a43505fd76d87"),
        ("nlpconnect/vit-gpt2-image-captioning", "refs/pr/37")],
}
# What a checkpoint may carry that is no weight of the model: GPT-2's causal masks, counters, position numbers, and the
# pooler, a layer on the class token that nothing here reads. lm_head is the embedding again, see `_check_tie`.
NO_WEIGHT = {
    "gpt2": ("*.attn.bias", "*.attn.masked_bias", "*.crossattention.bias", "*.crossattention.masked_bias",
             "*lm_head.weight"),
    "vit": ("*pooler.dense.*",),
    "clip": ("*position_ids", "input_resolution", "context_length", "vocab_size"),
    "resnet50": ("*num_batches_tracked",), "vgg16": ()}
NO_WEIGHT["vit_gpt2"] = NO_WEIGHT["gpt2"] + NO_WEIGHT["vit"]
WRAPPERS = ("module.", "_orig_mod.")        # left in names by DistributedDataParallel and torch.compile


def _places(source, revision=None):
    """Where to look for a model's files, best first: functions of a file name that return its Path or None."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return [lambda name: folder / name if (folder / name).is_file() else None]
    if str(source).startswith(("/", ".", "~")):
        raise UserError(f"there is no folder {source}; name one with config.json and model.safetensors, or a Hub id")
    main = partial(hf_file, str(source), revision=revision or "main", missing_ok=True)
    places = [main]
    for repo, commit in ELSEWHERE.get(str(source), []) if revision is None else []:
        find = partial(hf_file, repo, revision=commit, missing_ok=True)
        # a branch made for its weights may lack the small files beside them; another repository's would not fit
        places.append(find if repo != source else lambda name, find=find: find(name) or main(name))
    return places


def _read_pickle(path):
    """A .bin file's tensors. Only the reader that refuses to run code is used: a plain unpickle could do anything."""
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as fault:
        why = str(fault).splitlines()[0] if str(fault) else type(fault).__name__
        raise UserError(f"cannot open {path} without running code from it ({why}); use a safetensors file") from None
    for key in ("state_dict", "model"):                         # how training scripts wrap it
        tensors = tensors[key] if isinstance(tensors, dict) and isinstance(tensors.get(key), dict) else tensors
    if not isinstance(tensors, dict) or not tensors or not all(map(torch.is_tensor, tensors.values())):
        raise UserError(f"{path} is not a plain map from names to tensors; use a safetensors file")
    return tensors


def _read_tensors(path, find):
    if path.name.endswith(".bin"):
        return _read_pickle(path)
    if path.name.endswith(".json"):
        for shard in sorted({file.relative_to(path.parent).as_posix() for file in weight_map(path).values()}):
            find(shard)                                         # a hub's shards come one by one, beside the index
    return load_safetensors(path)


def _object(path):
    config = read_json(path) if path else {}
    if not isinstance(config, dict):
        raise UserError(f"{path} is not a JSON object; fetch it again")
    return config


def open_checkpoint(source, revision=None, allow_pickle=False):
    """A Hub id or a local folder -> Checkpoint. Raises UserError when no safetensors file can be had."""
    places = _places(source, revision)
    for find, pickled in [(find, False) for find in places] + [(places[0], True)] * allow_pickle:
        try:
            config = _object(find("config.json"))
            # timm's CLIP folders hold two files, and the one called model.safetensors is the image tower alone
            names = PICKLES if pickled else WEIGHTS + OPEN_CLIP if "model_type" in config else OPEN_CLIP + WEIGHTS
            path = next(filter(None, map(find, names)), None)
        except DownloadError:
            if find is places[0]:                               # a pinned commit may be gone, the repository not
                raise
            continue
        if path:
            return Checkpoint(source, find, config, _read_tensors(path, find), path)
    hint = "a pytorch_model.bin there opens only with --allow-pickle"
    if Path(source).expanduser().is_dir():
        raise UserError(f"the folder {source} has no model.safetensors; {hint}")
    try:
        hf_file(str(source), WEIGHTS[0], revision or "main")    # its sentence tells the revision, or: offline
    except DownloadError as error:
        raise UserError(f"{error} ({hint})") from None
    raise UserError(f"{source} changed while it was read; try again")


class Checkpoint:
    """A public model's files, opened: config, tensors, and the tensors' names without the prefixes of wrappers.

    The methods answer what a loader asks about sizes, each comparing the tensor's shape with what config.json says.
    """

    def __init__(self, source, find, config, tensors, path):
        self.source, self.find, self.config, self.tensors, self.path = str(source), find, config, tensors, path
        self.hugging = "model_type" in config       # Hugging Face's config.json, which leaves out what is the default
        if isinstance(config.get("id2label"), dict):
            self.config = {"num_classes": len(config["id2label"]), **config}
        self.names = {name: name for name in tensors}
        self.names = self.strip(*WRAPPERS).names

    def strip(self, *prefixes):
        """The same checkpoint seen without these prefixes: a body saved inside its task's wrapper, or bare."""
        view, view.names = copy.copy(self), {}
        for short, full in self.names.items():
            while prefix := next(filter(short.startswith, prefixes), ""):
                short = short[len(prefix):]
            view.names.setdefault(short, full)      # of two that now collide one stays unused: copy_weights tells
        return view

    def part(self, prefix, config, defaults):
        """One of several models in a file: the names under `prefix`, and its own section of config.json."""
        view = copy.copy(self)
        view.names = {short[len(prefix):]: full for short, full in self.names.items() if short.startswith(prefix)}
        view.config = config if isinstance(config, dict) else {}
        return view.assume(defaults)

    def assume(self, defaults):
        """What a field that is missing in Hugging Face's config.json stands for: the value of its class."""
        view = copy.copy(self)
        view.config = {**(defaults if self.hugging else {}), **{k: v for k, v in self.config.items() if v is not None}}
        return view

    def fail(self, fault):
        raise UserError(f"{self.source}: {fault}; fetch config.json and the weights again, or name another model")

    def full(self, name):
        """The name in the file; for one that is not there, what it would be called."""
        if name in self.names or not self.names:
            return self.names.get(name, name)
        leads = Counter(full[:len(full) - len(short)] for short, full in self.names.items())
        return leads.most_common(1)[0][0] + name

    def has(self, *begins):
        return any(name.startswith(begins) for name in self.names)

    def size(self, name, axis, key=None):
        """The length of a tensor along `axis`, which config.json calls `key`."""
        full = self.full(name)
        if full not in self.tensors:
            self.fail(f"{full} is missing in {self.path}")
        shape, said = tuple(self.tensors[full].shape), self.config.get(key)
        if len(shape) <= axis or said not in (None, shape[axis], [shape[axis]] * 2):
            self.fail(f"{full} has the shape {shape}" + (f", but config.json says {key} = {said}" if said else ""))
        return shape[axis]

    def depth(self, stem, key=None):
        """How many layers `stem`.0, `stem`.1, ... the file holds, which config.json calls `key`."""
        found = len({match[1] for name in self.names if (match := re.match(re.escape(stem) + r"\.(\d+)\.", name))})
        if self.config.get(key, found) != found or not found:
            self.fail(f"config.json says {key} = {self.config.get(key)}, but the weights have {found} layers {stem}.*")
        return found

    def heads(self, key, width):
        """No shape shows the number of heads. Without a config: 64 channels each, as in most published models."""
        timm = self.config.get("model_args")
        n = self.config.get(key, timm.get("num_heads") if isinstance(timm, dict) else None) or width // 64
        if type(n) is not int or n < 1 or width % n:
            self.fail(f"config.json must give {key}, and {n!r} does not divide the width {width}")
        return n

    def eps(self, key, default):
        value = self.config.get(key, default)
        small = isinstance(value, float) and 0 < value < 1
        return value if small else self.fail(f"{key} = {value!r} in config.json is no small number")

    def activation(self, key, default):
        name = str(self.config.get(key, default))
        ours = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}.get(name, name)
        return ours if ours in ACTIVATIONS else self.fail(f"{key} = {name!r} in config.json is none of ours")

    def only(self, **known):
        """Switches whose other settings would need a model that is not ours, at the same shapes."""
        for key, value in known.items():
            if self.config.get(key, value) != value:
                self.fail(f"{key} = {self.config[key]!r} in config.json is a model we do not build (only {value!r})")

    def table(self, lines, n_layer=1):
        """A name table written out in the names of this file."""
        rules = _write_out(lines, n_layer).items()
        return {ours: Source(*map(self.full, rule.names), op=rule.op) for ours, rule in rules}


# ---- the name tables: ours, then theirs. A trailing dot stands for the pair .weight and .bias, {i} for each layer.

def transposed_joined(*matrices):
    """Several (in, out) matrices -> one (sum of outs, in)."""
    return torch.cat([matrix.t() for matrix in matrices])


def unsqueezed(table):
    """(C,) or (N, C) -> (1, 1, C) or (1, N, C)."""
    return table[None, None] if table.dim() == 1 else table[None]      # ours keep an axis for the batch in front


def zeros(*weights):
    """The bias of layers that have none, one number for each of their outputs."""
    return torch.zeros(sum(map(len, weights)))                  # published without a bias: ours is there, but zero


GPT2 = {        # their Conv1D computes x @ W and so keeps W as (in, out); its columns are q, k, v as our rows are
    "wte.weight": "wte.weight", "wpe.weight": "wpe.weight", "ln_f.": "ln_f.",
    "blocks.{i}.ln_1.": "h.{i}.ln_1.",
    "blocks.{i}.attn.qkv.": Source("h.{i}.attn.c_attn.", op="transposed"),
    "blocks.{i}.attn.proj.": Source("h.{i}.attn.c_proj.", op="transposed"),
    "blocks.{i}.ln_2.": "h.{i}.ln_2.",
    "blocks.{i}.mlp.fc.": Source("h.{i}.mlp.c_fc.", op="transposed"),
    "blocks.{i}.mlp.proj.": Source("h.{i}.mlp.c_proj.", op="transposed")}
GPT2_CROSS = {  # q looks from the text (C, C), k and v from the image (C, 2C)
    "blocks.{i}.ln_cross.": "h.{i}.ln_cross_attn.",
    "blocks.{i}.cross.qkv.": Source("h.{i}.crossattention.q_attn.", "h.{i}.crossattention.c_attn.",
                                    op=transposed_joined),
    "blocks.{i}.cross.proj.": Source("h.{i}.crossattention.c_proj.", op="transposed")}
VIT = {
    "cls": "embeddings.cls_token", "pos": "embeddings.position_embeddings",
    "patch.": "embeddings.patch_embeddings.projection.",
    "blocks.{i}.ln_1.": "encoder.layer.{i}.layernorm_before.",
    "blocks.{i}.attn.qkv.": Source(*(f"encoder.layer.{{i}}.attention.attention.{part}."
                                     for part in ("query", "key", "value")), op="joined"),
    "blocks.{i}.attn.proj.": "encoder.layer.{i}.attention.output.dense.",
    "blocks.{i}.ln_2.": "encoder.layer.{i}.layernorm_after.",
    "blocks.{i}.mlp.fc.": "encoder.layer.{i}.intermediate.dense.",
    "blocks.{i}.mlp.proj.": "encoder.layer.{i}.output.dense.",
    "ln_f.": "layernorm.", "head.": "classifier."}
VIT_TIMM = {
    "cls": "cls_token", "pos": "pos_embed", "patch.": "patch_embed.proj.",
    "blocks.{i}.ln_1.": "blocks.{i}.norm1.", "blocks.{i}.attn.qkv.": "blocks.{i}.attn.qkv.",
    "blocks.{i}.attn.proj.": "blocks.{i}.attn.proj.", "blocks.{i}.ln_2.": "blocks.{i}.norm2.",
    "blocks.{i}.mlp.fc.": "blocks.{i}.mlp.fc1.", "blocks.{i}.mlp.proj.": "blocks.{i}.mlp.fc2.",
    "ln_f.": "norm.", "head.": "head."}
CLIP_BLOCK = {  # the same in both towers
    "blocks.{i}.ln_1.": "layers.{i}.layer_norm1.",
    "blocks.{i}.attn.qkv.": Source(*(f"layers.{{i}}.self_attn.{part}_proj." for part in "qkv"), op="joined"),
    "blocks.{i}.attn.proj.": "layers.{i}.self_attn.out_proj.", "blocks.{i}.ln_2.": "layers.{i}.layer_norm2.",
    "blocks.{i}.mlp.fc.": "layers.{i}.mlp.fc1.", "blocks.{i}.mlp.proj.": "layers.{i}.mlp.fc2."}
CLIP_VISION = {  # "pre_layrnorm" is how they spell it
    "cls": Source("embeddings.class_embedding", op=unsqueezed), "patch.weight": "embeddings.patch_embedding.weight",
    "pos": Source("embeddings.position_embedding.weight", op=unsqueezed), "ln_pre.": "pre_layrnorm.",
    "ln_f.": "post_layernorm."}
CLIP_TEXT = {
    "wte.weight": "embeddings.token_embedding.weight", "wpe.weight": "embeddings.position_embedding.weight",
    "ln_f.": "final_layer_norm."}
CLIP_HEADS = {"image_head.weight": "visual_projection.weight", "text_head.weight": "text_projection.weight",
              "logit_scale": Source("logit_scale", op="viewed")}
OPENAI_BLOCK = {
    "blocks.{i}.ln_1.": "transformer.resblocks.{i}.ln_1.",
    "blocks.{i}.attn.qkv.weight": "transformer.resblocks.{i}.attn.in_proj_weight",
    "blocks.{i}.attn.qkv.bias": "transformer.resblocks.{i}.attn.in_proj_bias",
    "blocks.{i}.attn.proj.": "transformer.resblocks.{i}.attn.out_proj.",
    "blocks.{i}.ln_2.": "transformer.resblocks.{i}.ln_2.", "blocks.{i}.mlp.fc.": "transformer.resblocks.{i}.mlp.c_fc.",
    "blocks.{i}.mlp.proj.": "transformer.resblocks.{i}.mlp.c_proj."}
OPENAI_VISION = {
    "cls": Source("class_embedding", op=unsqueezed), "patch.weight": "conv1.weight",
    "pos": Source("positional_embedding", op=unsqueezed), "ln_pre.": "ln_pre.", "ln_f.": "ln_post."}
OPENAI_TEXT = {"wte.weight": "token_embedding.weight", "wpe.weight": "positional_embedding", "ln_f.": "ln_final."}
OPENAI_HEADS = {"image_head.weight": Source("visual.proj", op="transposed"),          # used as x @ P
                "text_head.weight": Source("text_projection", op="transposed"),
                "logit_scale": Source("logit_scale", op="viewed")}
NORM = ("weight", "bias", "running_mean", "running_var")
RESNET = [      # ours, torchvision's and timm's, Hugging Face's; stage {s}, counted from 1 {t}; block {b}
    ("conv1", "conv1", "embedder.embedder.convolution"), ("bn1", "bn1", "embedder.embedder.normalization"),
    *((f"stages.{{s}}.{{b}}.{ours}{k}", f"layer{{t}}.{{b}}.{ours}{k}",
       f"encoder.stages.{{s}}.layers.{{b}}.layer.{k - 1}.{theirs}")
      for k in (1, 2, 3) for ours, theirs in (("conv", "convolution"), ("bn", "normalization"))),
    ("stages.{s}.{b}.shortcut.0", "layer{t}.{b}.downsample.0", "encoder.stages.{s}.layers.{b}.shortcut.convolution"),
    ("stages.{s}.{b}.shortcut.1", "layer{t}.{b}.downsample.1", "encoder.stages.{s}.layers.{b}.shortcut.normalization"),
    ("head", "fc", "classifier.1")]
VGG = [("fc1", "pre_logits.fc1", "classifier.0"), ("fc2", "pre_logits.fc2", "classifier.3"),
       ("head", "head.fc", "classifier.6")]                     # ours, timm's, torchvision's


def _under(ours, theirs, lines):
    """The same lines one level down on both sides: {"ln_f.": "ln_post."} under "vision.", "visual."."""
    rules = {name: rule if isinstance(rule, Source) else Source(rule) for name, rule in lines.items()}
    return {ours + name: Source(*(theirs + n for n in rule.names), op=rule.op) for name, rule in rules.items()}


def _write_out(lines, n_layer):
    """Layers and pairs written out: {our name: Source}. A bias is joined as its weight is; it cannot be transposed."""
    full = {}
    for ours, rule in _under("", "", lines).items():
        if not ours.endswith("."):
            full[ours] = rule
            continue
        full[ours + "weight"] = Source(*(name + "weight" for name in rule.names), op=rule.op)
        full[ours + "bias"] = Source(*(name + "bias" for name in rule.names),
                                     op="joined" if len(rule.names) > 1 else "copied")
    return {name: rule if isinstance(rule, Source) else Source(rule) for name, rule in expand(full, n_layer).items()}


# ---- one plan per family: the sizes, and the table in the names of the file at hand

class Plan(NamedTuple):
    """How one checkpoint becomes a model: which class, which sizes, whose names, and how its images are prepared."""
    model: type
    config: object
    names: dict
    recipe: str | None          # entry of RECIPES for files that do not tell


GPT2_DEFAULTS = dict(vocab_size=50257, n_positions=1024, n_embd=768, n_layer=12, n_head=12)
VIT_DEFAULTS = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072,
                    patch_size=16, image_size=224, qkv_bias=True, layer_norm_eps=1e-12)
CLIP_VISION_DEFAULTS = VIT_DEFAULTS | dict(patch_size=32, layer_norm_eps=1e-5, hidden_act="quick_gelu")
CLIP_TEXT_DEFAULTS = dict(hidden_size=512, num_hidden_layers=12, num_attention_heads=8, intermediate_size=2048,
                          vocab_size=49408, max_position_embeddings=77, layer_norm_eps=1e-5, hidden_act="quick_gelu",
                          eos_token_id=49407)


def _check_tie(ck):
    """A file may repeat the embedding as the output matrix; one that learned another matrix there is not our model."""
    head, embedding = (ck.tensors.get(ck.full(name)) for name in ("lm_head.weight", "wte.weight"))
    if head is not None and embedding is not None and not torch.equal(head.float(), embedding.float()):
        ck.fail("lm_head.weight differs from wte.weight; in tinyvlm's GPT they are one matrix")


def _gpt2(ck, image_size=None, cross=None):
    ck = ck.strip("transformer.").assume(GPT2_DEFAULTS)
    wte = "wte.weight" if "wte.weight" in ck.names or "lm_head.weight" not in ck.names else "lm_head.weight"
    _check_tie(ck)
    ck.only(scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False)
    n_embd = ck.size(wte, 1, "n_embd")
    ck = ck.assume({"n_inner": 4 * n_embd})
    config = GPTConfig(
        block_size=ck.size("wpe.weight", 0, "n_positions"), vocab_size=ck.size(wte, 0, "vocab_size"), n_embd=n_embd,
        n_layer=ck.depth("h", "n_layer"), n_head=ck.heads("n_head", n_embd),
        n_hidden=ck.size("h.0.mlp.c_fc.weight", 1, "n_inner"), cross=cross or ck.has("h.0.crossattention"),
        activation=ck.activation("activation_function", "gelu_new"), eps=ck.eps("layer_norm_epsilon", 1e-5))
    lines = GPT2 | (GPT2_CROSS if config.cross else {}) | {"wte.weight": wte}
    return Plan(GPT, config, ck.table(lines, config.n_layer), None)


def _side(ck, rows, patch):
    """The image size that a position table of 1 + n * n rows was learned at: n patches a side."""
    said = ck.config.get("image_size")
    said = said[0] if isinstance(said, list) and said else said
    n = math.isqrt(max(rows - 1, 0))
    if n < 1 or n * n + 1 != rows or (said is not None and (type(said) is not int or said // patch != n)):
        ck.fail(f"a position table of {rows} rows does not fit config.json's image_size = {said}, patches of {patch}")
    return n * patch


def _resize(config, names, key, image_size):
    """Another image size: the grid of positions is stretched like a picture."""
    if not image_size or image_size == config.image_size:
        return
    if image_size % config.patch_size or image_size < config.patch_size:
        raise UserError(f"image_size {image_size} is no multiple of the model's patch size {config.patch_size}")
    config.image_size = image_size

    def resized(table):
        return resize_positions(table.float().reshape(1, -1, table.size(-1)), image_size // config.patch_size)
    names[key] = Source(*names[key].names, op=resized)


def _vit(ck, image_size=None):
    ck = ck.strip("vit.", "deit.").assume(VIT_DEFAULTS)
    timm = ck.has("blocks.")
    lines = VIT_TIMM if timm else VIT
    patch, pos, head, fc = (lines[k] for k in ("patch.", "pos", "head.", "blocks.{i}.mlp.fc."))
    n_embd = ck.size(patch + "weight", 0, "hidden_size")
    P = ck.size(patch + "weight", 2, "patch_size")
    n_layer = ck.depth("blocks" if timm else "encoder.layer", "num_hidden_layers")
    with_head = ck.has(head)
    config = ViTConfig(
        image_size=_side(ck, ck.size(pos, 1), P), patch_size=P, n_layer=n_layer, n_embd=n_embd,
        n_head=ck.heads("num_attention_heads", n_embd),
        n_hidden=ck.size(fc.replace("{i}", "0") + "weight", 0, "intermediate_size"),
        n_class=ck.size(head + "weight", 0, "num_classes") if with_head else 0,
        activation=ck.activation("hidden_act", "gelu"), eps=ck.eps("layer_norm_eps", 1e-6 if timm else 1e-12))
    names = ck.table({k: v for k, v in lines.items() if with_head or k != "head."}, n_layer)
    if not ck.config.get("qkv_bias", False) and not any(n.endswith(("qkv.bias", "query.bias")) for n in ck.names):
        for i in range(n_layer):
            weight = names[f"blocks.{i}.attn.qkv.weight"]
            names[f"blocks.{i}.attn.qkv.bias"] = Source(*weight.names, op=zeros)
    _resize(config, names, "pos", image_size)
    deit = "deit" in str(ck.config.get("architecture", ck.source))
    return Plan(ViT, config, names, ("deit" if deit else "vit-augreg") if timm else "vit")


def _tower(ck, lines, sizes, prefix):
    """One tower of CLIP: the fields that ViTConfig and GPTConfig share, those of `sizes`, and the tower's table.

    sizes: {field: (our name, axis of theirs, Hugging Face's key)}."""
    fields = {field: ck.size(lines[ours].names[0], axis, key) for field, (ours, axis, key) in sizes.items()}
    stem = lines["blocks.{i}.ln_1."].names[0].partition(".{i}")[0]
    fields["n_layer"] = ck.depth(stem, "num_hidden_layers")
    fields["n_head"] = ck.heads("num_attention_heads", fields["n_embd"])
    fc = lines["blocks.{i}.mlp.fc."].names[0].replace("{i}", "0")
    fields["n_hidden"] = ck.size(fc + "weight", 0, "intermediate_size")
    fields["activation"] = ck.activation("hidden_act", "quick_gelu")
    fields["eps"] = ck.eps("layer_norm_eps", 1e-5)
    return fields, {prefix + ours: rule for ours, rule in ck.table(lines, fields["n_layer"]).items()}


OPEN_CLIP_WORDS = {"width": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads",
                   "image_size": "image_size", "patch_size": "patch_size", "vocab_size": "vocab_size",
                   "context_length": "max_position_embeddings"}


def _open_clip_config(ck):
    """open_clip_config.json in Hugging Face's words: (vision, text). No such file: OpenAI's weights."""
    model = _object(ck.find("open_clip_config.json")).get("model_cfg") or {}
    sides = [model.get("vision_cfg") or {}, model.get("text_cfg") or {}]
    if "head_width" in sides[0] and "width" in sides[0]:
        sides[0] = {**sides[0], "heads": sides[0]["width"] // sides[0]["head_width"]}
    openai = not model or "openai" in ck.source or "quickgelu" in str(ck.config.get("architecture"))
    act = "quick_gelu" if model.get("quick_gelu", openai) else "gelu"
    return [{OPEN_CLIP_WORDS[k]: v for k, v in side.items() if k in OPEN_CLIP_WORDS} | {"hidden_act": act}
            for side in sides]


def _clip(ck, image_size=None):
    hf = ck.has("vision_model.", "text_model.", "visual_projection.")
    ck = ck.strip("text.")                                      # open_clip's newer files put the text tower there
    sides = [ck.config.get("vision_config"), ck.config.get("text_config")]
    vision_config, text_config = sides if any(sides) or hf else _open_clip_config(ck)
    ck = ck.assume({"projection_dim": 512})
    block = _under("", "encoder.", CLIP_BLOCK) if hf else _under("", "", OPENAI_BLOCK)
    eyes = ck.part("vision_model." if hf else "visual.", vision_config, CLIP_VISION_DEFAULTS)
    words = ck.part("text_model." if hf else "", text_config, CLIP_TEXT_DEFAULTS)
    vision, names = _tower(eyes, _under("", "", CLIP_VISION if hf else OPENAI_VISION) | block, {
        "n_embd": ("patch.weight", 0, "hidden_size"), "patch_size": ("patch.weight", 2, "patch_size")}, "vision.")
    text, more = _tower(words, _under("", "", CLIP_TEXT if hf else OPENAI_TEXT) | block, {
        "vocab_size": ("wte.weight", 0, "vocab_size"), "n_embd": ("wte.weight", 1, "hidden_size"),
        "block_size": ("wpe.weight", 0, "max_position_embeddings")}, "text.")
    pos = (CLIP_VISION if hf else OPENAI_VISION)["pos"].names[0]
    vision["image_size"] = _side(eyes, eyes.size(pos, 0), vision["patch_size"])
    end = words.config.get("eos_token_id", 2)                   # 2: old configs' mistake, kept as a sign for "argmax"
    if type(end) is not int:
        ck.fail(f"eos_token_id = {end!r} in config.json is no token")
    heads = _under("", "", CLIP_HEADS if hf else OPENAI_HEADS)
    config = CLIPConfig(vision=ViTConfig(pre_norm=True, patch_bias=False, **vision), text=GPTConfig(**text),
                        n_joint=ck.size(heads["text_head.weight"].names[0], 0 if hf else 1, "projection_dim"),
                        end_token=None if end == 2 else end)
    names |= more | ck.table(heads)
    _resize(config.vision, names, "vision.pos", image_size)
    return Plan(CLIP, config, names, "clip")


def _resnet50(ck, image_size=None):
    ck = ck.strip("resnet.")
    column = 2 if ck.has("embedder.") else 1
    ck.only(layer_type="bottleneck", hidden_act="relu", downsample_in_bottleneck=False, downsample_in_first_stage=False)
    blocks = tuple(ck.depth(f"encoder.stages.{s}.layers" if column == 2 else f"layer{s + 1}")
                   for s in range(4) if s == 0 or ck.has(f"encoder.stages.{s}." if column == 2 else f"layer{s + 1}."))
    if ck.config.get("depths", list(blocks)) != list(blocks):
        ck.fail(f"config.json says depths = {ck.config['depths']}, but the weights have {list(blocks)} blocks")
    lines, head = {}, RESNET[-1][column] + "."
    for row in RESNET[:-1]:
        ours, theirs = row[0], row[column]
        parts = NORM if ".bn" in ours or ours in ("bn1", "stages.{s}.{b}.shortcut.1") else ("weight",)
        for s, b in [(s, b) for s, n in enumerate(blocks) for b in range(n)] if "{s}" in ours else [(0, 0)]:
            if b == 0 or ".shortcut" not in ours:
                ours_b, theirs_b = ours.format(s=s, b=b), theirs.format(s=s, t=s + 1, b=b)
                lines.update({f"{ours_b}.{part}": f"{theirs_b}.{part}" for part in parts})
    if ck.has(head):
        lines["head."] = head
    config = ResNetConfig(width=ck.size(RESNET[0][column] + ".weight", 0, "embedding_size"), blocks=blocks,
                          n_class=ck.size(head + "weight", 0, "num_classes") if ck.has(head) else 0)
    kind = str(ck.config.get("architecture", ck.source)) + str(ck.config.get("pretrained_cfg")) + ck.source
    recipe = "resnet50" if column == 2 else "resnet50-a1" if "a1_in1k" in kind else "torchvision"
    return Plan(ResNet50, config, ck.table(lines), recipe)


def _vgg16(ck, image_size=None):
    layers = sorted(int(n.split(".")[1]) for n in ck.names if re.fullmatch(r"features\.\d{1,3}\.weight", n))
    widths, convs = [], []
    for last, layer in zip([-9, *layers], layers):              # numbered with the ReLUs; a pool makes the step 3
        if layer - last > 2:
            widths.append(ck.size(f"features.{layer}.weight", 0))
            convs.append(0)
        convs[-1] += 1
    column = 1 if ck.has("pre_logits.") else 2
    fc1, fc2, head = (row[column] + "." for row in VGG)
    lines = {f"features.{layer}.": f"features.{layer}." for layer in layers}
    lines |= {f"fc{k}.{part}": Source(fc + part, op="viewed" if part == "weight" else "copied")
              for k, fc in ((1, fc1), (2, fc2)) for part in ("weight", "bias")}
    if ck.has(head):
        lines["head."] = head
    config = VGGConfig(widths=tuple(widths), convs=tuple(convs), n_hidden=ck.size(fc1 + "weight", 0),
                       n_class=ck.size(head + "weight", 0, "num_classes") if ck.has(head) else 0)
    return Plan(VGG16, config, ck.table(lines), "torchvision")


def _vit_gpt2(ck, image_size=None):
    eyes = _vit(ck.part("encoder.", ck.config.get("encoder"), {}), image_size)
    words = _gpt2(ck.part("decoder.", ck.config.get("decoder"), {}), cross=True)
    names = {"vision." + ours: rule for ours, rule in eyes.names.items()}
    names |= {"text." + ours: rule for ours, rule in words.names.items()}
    if eyes.config.n_embd != words.config.n_embd:
        names |= ck.table({"bridge.proj.": "enc_to_dec_proj."})
    return Plan(CrossCaptioner, VLMConfig(vision=eyes.config, text=words.config), names, "vit")


# family: its plan, and tensors that only it has, in the order to ask
FAMILIES = {
    "clip": (_clip, ("visual_projection.weight", "visual.conv1.weight")),
    "vit_gpt2": (_vit_gpt2, ("encoder.embeddings.cls_token",)),
    "gpt2": (_gpt2, ("wte.weight", "lm_head.weight")),
    "vit": (_vit, ("patch_embed.proj.weight", "embeddings.cls_token")),
    "resnet50": (_resnet50, ("layer1.0.conv3.weight", "embedder.embedder.convolution.weight")),
    "vgg16": (_vgg16, ("features.0.weight",)),
}
TASKS = {"vit_gpt2": "caption", "clip": "clip", "gpt2": "text"}         # the others: "classify"


def family_of(ck):
    """Which of FAMILIES a checkpoint belongs to, by names that only one of them has."""
    for family, (_, marks) in FAMILIES.items():
        if any(name.endswith(marks) for name in ck.names):
            return family
    raise UserError(f"{ck.source} is none of {', '.join(FAMILIES)} (model_type {ck.config.get('model_type')}, tensors "
                    f"{', '.join(list(ck.names)[:3])}, ...); name another model")


# ---- how images are prepared, and text

INTERPOLATIONS = {2: "bilinear", 3: "bicubic", "bilinear": "bilinear", "bicubic": "bicubic"}      # Pillow's numbers


def _hf_recipe(p, default):
    """preprocessor_config.json -> Recipe. Old files give sizes as one number, whose meaning depends on the class."""
    size, crop = p.get("size", default.resize or default.size), p.get("crop_size")
    sides = size if isinstance(size, dict) else {}
    side = sides.get("shortest_edge") or sides.get("height") or size
    squash = "height" in sides if sides else not p.get("do_center_crop", default.mode == "crop")
    crop = crop.get("height") if isinstance(crop, dict) else crop
    convnext = "ConvNext" in str(p.get("image_processor_type") or p.get("feature_extractor_type"))
    pct = p.get("crop_pct") or (224 / 256 if convnext else None)
    if pct:                                                     # ConvNext's processor crops below 384, squashes above
        crop, side, squash = side, int(side / pct) if side < 384 else side, side >= 384
    crop = side if squash or not crop else crop
    if {type(side), type(crop)} != {int} or sides.get("height") != sides.get("width"):
        raise ValueError(f"size {size}, crop_size {crop}")
    colours = {"mean": p.get("image_mean", default.mean), "std": p.get("image_std", default.std)}
    if not p.get("do_normalize", True):
        colours = {"mean": (0,) * 3, "std": (1,) * 3}
    return _make_recipe(crop, side, squash, p.get("resample", default.interpolation), colours)


def _timm_recipe(p, default):
    """timm's pretrained_cfg, or open_clip's preprocess_cfg, -> Recipe."""
    size = int(p.get("input_size", (3, default.size))[-1])
    side = math.floor(size / p["crop_pct"]) if "crop_pct" in p else (default.resize or size)
    squash = "squash" in (p.get("crop_mode"), p.get("resize_mode"))
    return _make_recipe(size, side, squash, p.get("interpolation", default.interpolation),
                        {"mean": default.mean, "std": default.std, **p})


def _make_recipe(size, side, squash, how, colours):
    mean, std = (tuple(map(float, colours[key])) for key in ("mean", "std"))
    return Recipe(size, "squash" if squash else "crop", None if squash or side == size else side, INTERPOLATIONS[how],
                  mean, std)


def _recipe(ck, default, size):
    """From the files, else the family's usual one; always for images of `size` pixels (None: as the files say)."""
    recipe = RECIPES[default]
    told = [(_hf_recipe, _object(ck.find("preprocessor_config.json"))), (_timm_recipe, ck.config.get("pretrained_cfg"))]
    if default == "clip":
        told.append((_timm_recipe, _object(ck.find("open_clip_config.json")).get("preprocess_cfg")))
    try:
        recipe = next((read(words, recipe) for read, words in told if words), recipe)
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as fault:
        raise UserError(f"{ck.source} prepares images in a way tinyvlm does not know ({type(fault).__name__}: {fault});"
                        " mend its preprocessor_config.json") from None
    size = size or recipe.size
    return replace(recipe, size=size, resize=recipe.resize and int(recipe.resize * size / recipe.size))


def _find_tokenizer(find):
    for names in (("tokenizer.json",), ("vocab.json", "merges.txt"), ("vocab.txt",)):
        paths = [find(name) for name in names]
        if all(paths):
            return load_tokenizer(paths[0])
    return None


def pretrained_tokenizer(source, revision=None):
    """The tokenizer of a Hub id or folder: GPT-2's, CLIP's, BERT's ("google-bert/bert-base-uncased"), or of a run."""
    tokenizer = next(filter(None, map(_find_tokenizer, _places(source, revision))), None)
    if tokenizer is None:
        raise UserError(f"{source} holds no tokenizer.json, vocab.json + merges.txt or vocab.txt; name one that does")
    return tokenizer


def _speech(ck, vocab_size):
    """The id a caption starts from, the id that ends it, and how many new ones a caption may have."""
    places = [_object(ck.find("generation_config.json")), ck.config, ck.config.get("decoder") or {}]

    def look(*keys, default, places=places):
        value = next((place[key] for key in keys for place in places if place.get(key) is not None), default)
        value = value[0] if isinstance(value, list) and value else value
        return value if type(value) is int and value >= 0 else ck.fail(f"{keys[0]} = {value!r} is no token or length")
    first = look("decoder_start_token_id", "bos_token_id", default=min(50256, vocab_size - 1))
    end = look("eos_token_id", default=min(50256, vocab_size - 1))
    if max(first, end) >= vocab_size:
        ck.fail(f"the start token {first} or the end token {end} is beyond the vocabulary of {vocab_size}")
    # theirs counts the start token; a decoder's own max_length is a leftover of the class's defaults
    return first, end, max(1, look("max_length", default=16, places=places[:2]) - 1)


# ---- the loaders

def _load(family, ck, image_size=None, special_tokens=()):
    """Plan, build without values, fill, dress: the one way from a checkpoint to a model.

    It carries .recipe (how to prepare images; None for GPT-2), .tokenizer (None where the files hold none), .table (the
    rows of copy_weights), .sizes (its config) and, if it writes captions, .first, .end, .max_tokens.
    """
    plan = FAMILIES[family][0](ck, image_size)
    with torch.device("meta"):                  # no memory, no random numbers for weights that are about to be copied
        model = plan.model(plan.config)
    model.to_empty(device="cpu")
    model.table = copy_weights(model, ck.tensors, plan.names, NO_WEIGHT[family], str(ck.path))
    vision = getattr(plan.config, "vision", plan.config)
    model.recipe = plan.recipe and _recipe(ck, plan.recipe, getattr(vision, "image_size", image_size))
    model.tokenizer = _find_tokenizer(ck.find) if family in ("gpt2", "clip", "vit_gpt2") else None
    if family == "vit_gpt2":
        model.first, model.end, model.max_tokens = _speech(ck, plan.config.text.vocab_size)
    if special_tokens:
        _grow(family, model, special_tokens)
    model.sizes = plan.config
    return model.eval()


def _grow(family, model, special_tokens):
    gpt = {"gpt2": model, "vit_gpt2": getattr(model, "text", None)}.get(family)
    if gpt is None or model.tokenizer is None:
        raise UserError(f"special tokens need a GPT-2 and its tokenizer.json; this {family} came without")
    model.tokenizer.add_special_tokens(special_tokens)
    gpt.grow_vocab(max(gpt.config.vocab_size, model.tokenizer.vocab_size))


def _open(family, source, revision=None, allow_pickle=False, image_size=None, special_tokens=()):
    """What every load_* below does. source: a Hub id or a local folder; revision: a branch, tag or commit.

    allow_pickle: open pytorch_model.bin, through torch's weights-only reader, if there is nothing else. image_size:
    stretch the position table to other pictures. special_tokens: new ones for GPT-2. The model comes in eval mode, with
    .recipe and .tokenizer (None where the source has none). Raises UserError naming what is missing or does not fit.
    """
    return _load(family, open_checkpoint(source, revision, allow_pickle), image_size, special_tokens)


def load_gpt2(source, **options):
    """GPT-2 of any size (openai-community/gpt2, distilbert/distilgpt2) -> gpt.GPT. Options: see _open."""
    return _open("gpt2", source, **options)


def load_vit(source, **options):
    """ViT or DeiT, Hugging Face's or timm's names (google/vit-base-patch16-224) -> vit.ViT. Options: see _open."""
    return _open("vit", source, **options)


def load_clip(source, **options):
    """CLIP with a ViT, Hugging Face's or OpenAI's names (laion/CLIP-...) -> clip.CLIP. Options: see _open."""
    return _open("clip", source, **options)


def load_resnet50(source, **options):
    """ResNet-50 v1.5 (microsoft/resnet-50, timm/resnet50.a1_in1k) -> cnn.ResNet50. Options: see _open."""
    return _open("resnet50", source, **options)


def load_vgg16(source, **options):
    """VGG-16 (timm/vgg16.tv_in1k), linear layers stored either way -> cnn.VGG16. Options: see _open."""
    return _open("vgg16", source, **options)


def load_vit_gpt2(source, **options):
    """ViT + GPT-2 (nlpconnect/vit-gpt2-image-captioning) -> vlm.CrossCaptioner. Options: see _open."""
    return _open("vit_gpt2", source, **options)


def load_pretrained(source, revision=None, allow_pickle=False, **options):
    """Any of the families, found out by its names -> Loaded; a captioner's `config` is as train.py writes a run's."""
    ck = open_checkpoint(source, revision, allow_pickle)
    family = family_of(ck)
    model = _load(family, ck, **options)
    config = {"task": TASKS.get(family, "classify"), "model": "cross" if family == "vit_gpt2" else family,
              "sizes": asdict(model.sizes), "recipe": model.recipe and asdict(model.recipe), "dataset": str(source)}
    if family == "vit_gpt2":
        config |= {"first": model.first, "end": model.end, "max_tokens": model.max_tokens}
    return Loaded(model, model.tokenizer, model.recipe, config)


# ---- the way back

def _outward(model, lines, n_layer, prefix=""):
    """A name table read from right to left: {their name: tensor} made of our weights under `prefix`."""
    state, tensors = model.state_dict(), {}
    for ours, rule in _write_out(lines, n_layer).items():
        whole = state[prefix + ours]
        C = len(whole) // 3
        pieces = {1: [len(whole)], 2: [C, 2 * C], 3: [C, C, C]}[len(rule.names)]
        for name, piece in zip(rule.names, whole.split(pieces)):
            tensors[name] = piece.t() if rule.op in ("transposed", transposed_joined) else piece
    return tensors


def _act(name):
    return {"gelu_tanh": "gelu_new"}.get(name, name)


def _gpt2_config(c, end):
    drop = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), c.dropout)
    cross = {"add_cross_attention": True, "is_decoder": True} if c.cross else {}
    return {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": c.vocab_size,
            "n_positions": c.block_size, "n_embd": c.n_embd, "n_layer": c.n_layer, "n_head": c.n_head,
            "n_inner": c.n_hidden, "activation_function": _act(c.activation), "layer_norm_epsilon": c.eps,
            "bos_token_id": end, "eos_token_id": end, **drop, **cross, "tie_word_embeddings": True}


def _vit_config(c):
    drop = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), c.dropout)
    return {"model_type": "vit", "hidden_size": c.n_embd, "num_hidden_layers": c.n_layer,
            "num_attention_heads": c.n_head, "intermediate_size": c.n_hidden or 4 * c.n_embd,
            "hidden_act": _act(c.activation), "layer_norm_eps": c.eps, "image_size": c.image_size,
            "patch_size": c.patch_size, "num_channels": 3, "qkv_bias": True, **drop}


def _preprocessor(recipe):
    if recipe.mode == "adaptive":
        raise UserError("adaptive padding of images is unknown to transformers; give export_vit_gpt2 no recipe")
    side = {"height": recipe.size, "width": recipe.size}
    how = {"image_processor_type": "ViTImageProcessor", "size": side}
    if recipe.mode == "crop":
        how = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": recipe.resize or recipe.size},
               "do_center_crop": True, "crop_size": side, "do_convert_rgb": True}
    return {**how, "do_resize": True, "resample": {"bilinear": 2, "bicubic": 3}[recipe.interpolation],
            "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": list(recipe.mean),
            "image_std": list(recipe.std)}


def _write_folder(folder, config, tensors, recipe, tokenizer, speech):
    folder, preprocessor = Path(folder), _preprocessor(recipe) if recipe else None
    save_safetensors(tensors, folder / "model.safetensors", {"format": "pt"})
    speech = {key: value for key, value in speech.items() if value is not None}
    for name, content in (("config.json", config), ("generation_config.json", speech),
                          ("preprocessor_config.json", preprocessor)):
        if content:
            write_json(folder / name, content)
    if tokenizer:
        tokenizer.save(folder)
        end = tokenizer.id_to_token(speech.get("eos_token_id", -1))
        words = {key: end for key in ("bos_token", "eos_token", "unk_token", "pad_token") if end}
        write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **words,
                                                      "clean_up_tokenization_spaces": False})


def _end_of(model, tokenizer, end):
    end = getattr(model, "end", None) if end is None else end
    return tokenizer.token_to_id("<|endoftext|>") if end is None and tokenizer else end


def export_gpt2(model, folder, tokenizer=None, end=None):
    """Write a GPT as a folder that transformers' GPT2LMHeadModel.from_pretrained opens with equal logits.

    end: the id that ends a text (None: the tokenizer's <|endoftext|>). Returns nothing; files appear whole.
    """
    end, c = _end_of(model, tokenizer, end), model.config
    lines = _under("", "transformer.", GPT2 | (GPT2_CROSS if c.cross else {}))
    tensors = _outward(model, lines, c.n_layer) | {"lm_head.weight": model.wte.weight.detach()}
    speech = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    _write_folder(folder, _gpt2_config(c, end), tensors, None, tokenizer, speech)


def export_vit_gpt2(model, folder, recipe=None, tokenizer=None, first=None, end=None, max_tokens=None):
    """Write a CrossCaptioner as a folder that transformers' VisionEncoderDecoderModel.from_pretrained opens.

    first, end, max_tokens: as in a run's config.json; None: what the model was loaded with, else <|endoftext|>. The
    pooler, which that library expects and nobody reads, is written as zeros. Raises UserError for what a Hugging Face
    ViT cannot express: patches from a convolutional stem, no class token, the lockstep wiring.
    """
    c = model.config
    if not isinstance(model, CrossCaptioner) or c.wiring != "final" or not c.vision:
        raise UserError("transformers knows only captioners with a vision tower and --model cross --wiring final")
    if c.vision.stem != "patch" or not c.vision.class_token or c.vision.pre_norm or not c.vision.patch_bias:
        raise UserError("transformers' ViT has square patches and a class token; train with --stem patch --class-token "
                        "for a model that can be exported")
    end = _end_of(model, tokenizer, end)
    first = getattr(model, "first", end) if first is None else first
    max_tokens = getattr(model, "max_tokens", None) if max_tokens is None else max_tokens
    eyes = {ours: rule for ours, rule in VIT.items() if ours != "head."}
    tensors = _outward(model, _under("", "encoder.", eyes), c.vision.n_layer, "vision.")
    tensors |= _outward(model, _under("", "decoder.transformer.", GPT2 | GPT2_CROSS), c.text.n_layer, "text.")
    tensors["decoder.lm_head.weight"] = model.text.wte.weight.detach()
    tensors["encoder.pooler.dense.weight"] = torch.zeros(c.vision.n_embd, c.vision.n_embd)
    tensors["encoder.pooler.dense.bias"] = torch.zeros(c.vision.n_embd)
    if "proj" in model.bridge:
        tensors |= _outward(model, {"proj.": "enc_to_dec_proj."}, 1, "bridge.")
    speech = {"decoder_start_token_id": first, "bos_token_id": end, "eos_token_id": end, "pad_token_id": end,
              "max_length": max_tokens and max_tokens + 1}
    config = {"model_type": "vision-encoder-decoder", "architectures": ["VisionEncoderDecoderModel"],
              "is_encoder_decoder": True, "tie_word_embeddings": True, "torch_dtype": "float32",
              "encoder": _vit_config(c.vision), "decoder": _gpt2_config(c.text, end),
              **{key: speech[key] for key in ("decoder_start_token_id", "eos_token_id", "pad_token_id")
                 if speech[key] is not None}}
    _write_folder(folder, config, tensors, recipe or getattr(model, "recipe", None), tokenizer, speech)


def export_run(run, folder):
    """The captioner that train.py left in the folder `run`, written for transformers."""
    loaded = load_run(run)
    export_vit_gpt2(loaded.model, folder, loaded.recipe, loaded.tokenizer,
                    *(loaded.config.get(key) for key in ("first", "end", "max_tokens")))


def show_table(source, revision=None, allow_pickle=False):
    """Print how a published file becomes our model: a line per weight, and the parameter total."""
    loaded = load_pretrained(source, revision, allow_pickle)
    rows = loaded.model.table
    width = max(len(row.ours) for row in rows)
    print(f"{'how':<22}{'shape':<20}{'our name':<{width}}  their name")
    for row in rows:
        shape = " x ".join(map(str, row.shape)) or "one number"
        print(f"{row.how.replace('_', ' + '):<22}{shape:<20}{row.ours or '-':<{width}}  {row.theirs}")
    total = sum(p.numel() for p in loaded.model.parameters())
    ignored = [math.prod(row.shape) for row in rows if row.how == "ignored"]
    print(f"{source}: {type(loaded.model).__name__}, {total:,} parameters; ignored: {len(ignored)} tensors of together "
          f"{sum(ignored):,} numbers")


def main():
    """The command line; positional words, so argparse at hand instead of parse_config."""
    usage = "python -m tinyvlm.pretrained SOURCE [--allow-pickle] [--revision R], or: export RUN FOLDER"
    parser = argparse.ArgumentParser(usage=usage, allow_abbrev=False,
                                     description="Print how a public checkpoint becomes our model, or export a run.")
    parser.add_argument("words", nargs="*", help="a Hub id or a folder to explain; or a run to write for transformers")
    parser.add_argument("--allow-pickle", action="store_true", help="open pytorch_model.bin if there is nothing else")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")

    def refuse(message):
        raise UserError(f"{message}; usage: {usage}")
    parser.error = refuse
    args = parser.parse_args()
    if args.words[:1] == ["export"] and len(args.words) == 3:
        export_run(*args.words[1:])
        print(f"wrote {args.words[2]}; open it with transformers: VisionEncoderDecoderModel.from_pretrained")
    elif len(args.words) == 1 and args.words[0] != "export":
        show_table(args.words[0], args.revision, args.allow_pickle)
    else:
        refuse(f"{' '.join(args.words)!r} is neither one SOURCE nor export RUN FOLDER")


if __name__ == "__main__":
    run_script(main)
