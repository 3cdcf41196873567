"""From a published folder of files to a model that runs.

    find     a Hub id (fetched into the shared cache) or a folder -> config.json and the tensors        open_checkpoint
    name     of all families and namings of names.py, the one that finds most of its names              best_naming
    measure  sizes are read off the tensors' shapes; where config.json speaks of them, it must agree    Section
    copy     every weight of ours from a known place, every tensor of theirs used, or nothing at all    copy_weights
    dress    how its images are prepared (Recipe), its tokenizer, how its captions begin and end        load_*

    model = load_gpt2("openai-community/gpt2")
    python -m tinyvlm.pretrained openai-community/gpt2      # print what became of each tensor
    python -m tinyvlm.pretrained export out/ folder/        # the way back: export.py

Nothing is guessed that could give plausible but worse numbers: an unknown activation, a tensor too many, an output
matrix that is not the embedding, all end in one UserError.
Left out: OpenAI's TorchScript archives, CLIP's attention-pooled ResNets, distilled DeiT, quantised files.
"""
import argparse
import math
import pickle
import re
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Callable

import torch

from . import export
from .classifier import Classifier, ClassifierConfig
from .clip import CLIP, CLIPConfig
from .cnn import VGG16, ResNet50, ResNetConfig, VGGConfig
from .config import UserError, run_script
from .download import DownloadError, hf_file
from .gpt import GPT, GPTConfig
from .image import RECIPES, Recipe
from .names import best_naming, zeros
from .tokenizer import load_tokenizer
from .transformer import ACTIVATIONS
from .vit import ViT, ViTConfig, resize_positions
from .vlm import CrossCaptioner, VLMConfig, build, from_dict
from .weights import Source, copy_weights, load_safetensors, read_json, weight_map


@dataclass
class Loaded:
    """A model with what is needed to feed it: `recipe` prepares images, `tokenizer` text, `config` is config.json."""
    model: object
    tokenizer: object
    recipe: Recipe
    config: dict


# ---- our own runs: names and sizes are ours already

def is_run(source):
    """Whether `source` is a folder that train.py left (and not a public checkpoint's)."""
    path = Path(source) / "config.json"
    return path.is_file() and "options" in read_json(path)


def _build_run(config):
    """config.json of a run -> the freshly made model it describes."""
    sizes = config["sizes"]
    if config["task"] in ("caption", "vqa"):
        return build(from_dict(sizes))
    tower = sizes["vision"] and (ResNetConfig if "blocks" in sizes["vision"] else ViTConfig)(**sizes["vision"])
    if config["task"] == "classify":
        return Classifier(ClassifierConfig(**{**sizes, "vision": tower}))
    return CLIP(CLIPConfig(**{**sizes, "vision": tower, "text": sizes["text"] and GPTConfig(**sizes["text"])}))


def _check_run(config, model, recipe):
    """Entries that nothing has used by now, and where they will be used no error could name them: AssertionError."""
    fits = {"options": isinstance(config.get("options"), dict), "recipe": recipe.mode in ("squash", "crop", "adaptive")
            and recipe.interpolation in INTERPOLATIONS.values() and type(recipe.size) is int and recipe.size > 0}
    if config["task"] in ("caption", "vqa"):
        fits["model"], text = config.get("model") == model.config.model, model.config.text
        ids, room = range(text.vocab_size), range(1, getattr(text, "block_size", 2 ** 31) + 1)
        spans = {"first": ids, "end": ids, "max_tokens": room} | ({"longest": room} if config["task"] == "vqa" else {})
        fits |= {key: type(config.get(key)) is int and config[key] in span for key, span in spans.items()}
    for key, fit in fits.items():
        assert fit, f"{key} is {config.get(key)!r:.200}"


def load_run(folder):
    """A run that train.py left in `folder` -> Loaded, in eval mode. Raises UserError naming what is missing."""
    folder = Path(folder)
    if not (folder / "config.json").exists():
        raise UserError(f"{folder} holds no trained model; train one first: python train.py --out-dir {folder}")
    config = read_json(folder / "config.json")
    try:
        model, recipe = _build_run(config), Recipe(**config["recipe"])
        _check_run(config, model, recipe)
    except (KeyError, TypeError, AttributeError, AssertionError) as error:
        raise UserError(f"{folder / 'config.json'} is not the config of a run this version made ({error}); train again"
                        ) from None
    tensors = load_safetensors(folder / "model.safetensors")
    copy_weights(model, tensors, {name: name for name in tensors}, source=str(folder / "model.safetensors"))
    tokenizer = load_tokenizer(folder / "tokenizer.json") if (folder / "tokenizer.json").exists() else None
    if tokenizer is None and config["task"] in ("caption", "vqa"):
        raise UserError(f"{folder} has lost its tokenizer.json; train again")
    return Loaded(model.eval(), tokenizer, recipe, config)


# ---- find: the files, and what is in them

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
OPEN_CLIP = ("open_clip_model.safetensors",)
PICKLES = ("pytorch_model.bin", "open_clip_pytorch_model.bin")
# Main has no safetensors in these: the commits and branches that do, and a copy under another name.
ELSEWHERE = {
    "openai/clip-vit-base-patch32": ["@d15b5f29721ca72dac15f8526b284be910de18be", "@refs/pr/32",
                                     "timm/vit_base_patch32_clip_224.openai@main"],
    "nlpconnect/vit-gpt2-image-captioning": ["@93857e539f312a97c13f16976c2a43505fd76d87", "@refs/pr/37"]}


def _places(source, revision=None):
    """Where to look for a model's files, best first: functions of a file name that return its Path or None."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return [lambda name: folder / name if (folder / name).is_file() else None]
    if str(source).startswith(("/", ".", "~")):
        raise UserError(f"there is no folder {source}; name one with config.json and model.safetensors, or a Hub id")
    main = partial(hf_file, str(source), revision=revision or "main", missing_ok=True)
    places = [main]
    for repo, _, commit in (where.partition("@") for where in ELSEWHERE.get(source, []) if revision is None):
        find = partial(hf_file, repo or source, revision=commit, missing_ok=True)
        # a branch made for its weights may lack the small files beside them; another repository's would not fit
        places.append(find if repo else lambda name, find=find: find(name) or main(name))
    return places


def _read_pickle(path):
    """A .bin file's tensors. Only the reader that refuses to run code is used: a plain unpickle could do anything."""
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as fault:
        why = (str(fault) or type(fault).__name__).splitlines()[0]
        raise UserError(f"cannot open {path} without running code from it ({why}); use a safetensors file") from None
    for key in ("state_dict", "model"):                         # how training scripts wrap it
        if isinstance(tensors, dict) and isinstance(tensors.get(key), dict):
            tensors = tensors[key]
    if not isinstance(tensors, dict) or not tensors or not all(map(torch.is_tensor, tensors.values())):
        raise UserError(f"{path} is not a plain map from names to tensors; use a safetensors file")
    return tensors


def _read_tensors(path, find):
    """{name: tensor}, without what DistributedDataParallel and torch.compile put in front of names.

    "module._orig_mod.wte.weight" -> "wte.weight", unless the file holds that name too.
    """
    if path.name.endswith(".json"):
        for shard in sorted({file.relative_to(path.parent).as_posix() for file in weight_map(path).values()}):
            find(shard)                                         # a hub's shards come one by one, beside the index
    found, tensors = _read_pickle(path) if path.name.endswith(".bin") else load_safetensors(path), {}
    for name, tensor in found.items():
        bare = re.sub(r"^((module|_orig_mod)\.)+", "", name)
        tensors[name if bare in found or bare in tensors else bare] = tensor    # none is lost: copy_weights tells
    return tensors


def _object(path):
    config = read_json(path) if path else {}
    if not isinstance(config, dict):
        raise UserError(f"{path} is not a JSON object; fetch it again")
    return config


@dataclass
class Checkpoint:
    """A public model's files, opened. find(name) gives the Path of another file of it, or None."""
    source: str
    find: Callable
    config: dict
    tensors: dict
    path: Path

    def fail(self, fault):
        raise UserError(f"{self.source}: {fault}; fetch config.json and the weights again, or name another model")


def _flat(config):
    """config.json with two numbers where the rest is: timm's heads, and how many names transformers gives its labels.

    {"id2label": {"0": "cat", "1": "dog"}} -> {"num_classes": 2, ...}; {"model_args": {"num_heads": 3}} -> num_heads 3
    """
    inner, labels = config.get("model_args"), config.get("id2label")
    told = {"num_classes": len(labels)} if isinstance(labels, dict) else {}
    return told | (inner if isinstance(inner, dict) else {}) | config


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
            return Checkpoint(str(source), find, _flat(config), _read_tensors(path, find), path)
    hint = "a pytorch_model.bin there opens only with --allow-pickle (sample.py, python -m tinyvlm.pretrained)"
    if Path(source).expanduser().is_dir():
        raise UserError(f"the folder {source} has no model.safetensors; {hint}")
    try:
        hf_file(str(source), WEIGHTS[0], revision or "main")    # its sentence tells the revision, or: offline
    except DownloadError as error:
        raise UserError(f"{error} ({hint})") from None
    raise UserError(f"{source} changed while it was read; try again")


# ---- measure: the sizes

SIZES = {       # field of our config: the weight that shows it, and along which axis; then config.json's words for it
    "vocab_size": ("wte.weight", 0, "vocab_size"),
    "block_size": ("wpe.weight", 0, "n_positions", "max_position_embeddings", "context_length"),
    "patch_size": ("patch.weight", 2, "patch_size"),
    "n_embd": ("ln_f.weight", 0, "n_embd", "hidden_size", "width"),     # GPT-2's word, the other models', open_clip's
    "n_hidden": ("blocks.0.mlp.fc.weight", 0, "n_inner", "intermediate_size"),
    "n_joint": ("text_head.weight", 0, "projection_dim"),
    "width": ("conv1.weight", 0, "embedding_size"),
    "n_class": ("head.weight", 0, "num_classes")}
# Switches whose other settings would be another model at the same shapes: nothing but config.json would show it.
SWITCHES = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "layer_type": "bottleneck",
            "downsample_in_bottleneck": False, "downsample_in_first_stage": False,
            "norm_layer": None, "aa_layer": None, "replace_stem_pool": False, "output_stride": 32,          # timm
            "no_causal_mask": False, "final_ln_after_pool": False, "norm_kwargs": {}, "act_kwargs": {}}     # open_clip
HEADS_OF_64 = 192, 384, 768, 1024       # widths at which every published model has heads of 64 channels


class Section:
    """One tower of a checkpoint: the rules for our names under `prefix`, and the part of config.json that tells of it.

    Example: gpt2's wte.weight is (50257, 768), so size("wte.weight", 0, "vocab_size") is 50257. Should config.json say
    "vocab_size": 50258, one of the two files is not what it claims to be, and a UserError names both.
    """

    def __init__(self, ck, rules, told, prefix=""):
        self.ck, self.rules, self.prefix = ck, rules, prefix
        self.told = told if isinstance(told, dict) else {}
        for word, value in SWITCHES.items():
            self.agree(value, [word], f"tinyvlm builds only models with {word} = {value!r}")

    def has(self, name):
        return self.prefix + name in self.rules

    def said(self, *words, default=None):
        """Which of these words config.json uses, and the value: ("hidden_size", 768)."""
        return next(((word, self.told[word]) for word in words if self.told.get(word) is not None), (words[0], default))

    def agree(self, value, words, seen):
        """What the tensors show must be what config.json says, if it says anything."""
        word, said = self.said(*words)
        if said not in (None, value, [value] * 2):              # [16, 16]: a patch of 16 pixels
            self.ck.fail(f"{seen}, but config.json says {word} = {said!r}")
        return value

    def size(self, name, axis, *words):
        """The length of our weight `name` along `axis`, read off the tensor it will come from."""
        rule = self.rules[self.prefix + name]
        theirs = rule.names[0]
        if theirs not in self.ck.tensors:
            self.ck.fail(f"{theirs} is missing in {self.ck.path}")
        shape = tuple(self.ck.tensors[theirs].shape)
        seen, ours = f"{theirs} has the shape {shape}", shape[::-1] if rule.op == "transposed" else shape
        return self.agree(ours[axis], words, seen) if -len(shape) <= axis < len(shape) else self.ck.fail(seen)

    def sizes(self):
        """All that SIZES finds here."""
        return {field: self.size(name, *where) for field, (name, *where) in SIZES.items() if self.has(name)}

    def depth(self, stem, *words):
        """How many layers `stem`.0, `stem`.1, ... there are."""
        begin = f"{self.prefix}{stem}."
        n = len({name[len(begin):].partition(".")[0] for name in self.rules if name.startswith(begin)})
        return self.agree(n, words, f"the weights have {n} layers {stem}.*") or self.ck.fail(f"there are no {stem}.*")

    def transformer(self, n_head, activation, eps):
        """The fields that a ViTConfig and a GPTConfig share, and those of SIZES.

        No shape shows these three; given is what transformers means where config.json is silent. Elsewhere a head has
        `head_width` channels, open_clip's word, or 64 where nobody publishes anything else; ViT-H's 80 must be told.
        """
        fields = self.sizes() | {"n_layer": self.depth("blocks", "n_layer", "num_hidden_layers", "layers")}
        C, silent = fields["n_embd"], n_head if "model_type" in self.ck.config else None
        width = self.told.get("head_width", 64 if C in HEADS_OF_64 else None)
        if silent is None and type(width) is int and width > 0:
            silent = C // width
        word, n_head = self.said("num_heads", "n_head", "num_attention_heads", "heads", default=silent)
        if type(n_head) is not int or n_head < 1 or C % n_head:
            self.ck.fail(f"config.json must give {word}, a divisor of the width {C}, not {n_head!r}")
        word, act = self.said("activation_function", "hidden_act", "act_layer", default=activation)
        ours = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}.get(str(act), str(act))
        if ours not in ACTIVATIONS:
            self.ck.fail(f"{word} = {act!r} in config.json is none of ours")
        word, eps = self.said("layer_norm_epsilon", "layer_norm_eps", default=eps)
        if not isinstance(eps, float) or not 0 < eps < 1:
            self.ck.fail(f"{word} = {eps!r} in config.json is no small number")
        return fields | {"n_head": n_head, "activation": ours, "eps": eps}


def _gpt(ck, rules, told, prefix="", defaults=(12, "gelu_new", 1e-5)):
    """GPT-2, a captioner's decoder, CLIP's text tower. A file may hold wte under the name of the output matrix."""
    wte = rules[prefix + "wte.weight"].names[0]
    head = wte.replace("transformer.", "").replace("wte", "lm_head")
    if head in ck.tensors and wte not in ck.tensors:
        rules[prefix + "wte.weight"] = Source(head)
    elif head in ck.tensors and not torch.equal(ck.tensors[head].float(), ck.tensors[wte].float()):
        ck.fail("lm_head.weight differs from wte.weight; in tinyvlm's GPT they are one matrix")
    section = Section(ck, rules, told, prefix)
    return GPTConfig(**section.transformer(*defaults), cross=section.has("blocks.0.cross.qkv.weight"))


def _vit(ck, rules, told, prefix="", defaults=(12, "gelu", 1e-12)):
    """ViT, a captioner's encoder, CLIP's image tower."""
    section = Section(ck, rules, told, prefix)
    biases = [name for name in rules if name.startswith(prefix) and name.endswith("attn.qkv.bias")]
    there = any(theirs in ck.tensors for name in biases for theirs in rules[name].names)
    if there:
        section.agree(True, ["qkv_bias"], "queries, keys and values have biases")
    elif not section.said("qkv_bias", default="model_type" in ck.config)[1]:
        rules |= {name: Source(*rules[name.replace("bias", "weight")].names, op=zeros) for name in biases}
    if section.has("head.weight") and "pos_embed" in ck.tensors:                  # timm's
        section.agree("token", ["global_pool"], "our ViT classifies by its class token")
    fields = section.transformer(*defaults[:2], 1e-6 if "pos_embed" in ck.tensors else defaults[2])    # timm's
    P, rows = fields["patch_size"], section.size("pos", -2, "rows")     # one row for the class token, n * n patches
    n, said = math.isqrt(max(rows - 1, 0)), section.said("image_size")[1]
    said = said[0] if isinstance(said, list) and said and said == said[:1] * 2 else said
    if n < 1 or n * n + 1 != rows or said not in (None, n * P):
        ck.fail(f"a position table of {rows} rows does not fit config.json's image_size = {said}, patches of {P}")
    return ViTConfig(**fields, image_size=n * P, pre_norm=section.has("ln_pre.weight"),
                     patch_bias=section.has("patch.bias"))


def _open_clip_config(ck):
    """open_clip_config.json's sections (vision, text). No such file: OpenAI's weights, as they first came."""
    model = _object(ck.find("open_clip_config.json")).get("model_cfg") or {}
    eyes, words = ({"head_width": 64} | (model.get(side) or {}) for side in ("vision_cfg", "text_cfg"))
    hub = "" if Path(ck.source).expanduser().is_dir() else ck.source               # a folder's name tells nothing
    openai = not model or "openai" in hub or "quickgelu" in str(ck.config.get("architecture"))
    act = {"hidden_act": "quick_gelu" if model.get("quick_gelu", openai) else "gelu"}
    return eyes | act, words | act


def _clip(ck, rules):
    """Sizes from config.json, or open_clip's file beside it. end_token None: a text ends at the largest of its ids."""
    if {"model_type", "vision_config"} & set(ck.config):        # where an old file has both, its .._dict counts
        eyes, words = (ck.config.get(f"{side}_dict") or ck.config.get(side)
                       for side in ("vision_config", "text_config"))
    else:
        eyes, words = _open_clip_config(ck)
        Section(ck, rules, eyes).agree("tok", ["pool_type"], "our CLIP sees by its class token")
        Section(ck, rules, words).agree("argmax", ["pool_type"], "our CLIP reads at the end token")
    end = Section(ck, rules, words).said("eos_token_id", default=49407 if "model_type" in ck.config else 2)[1]
    if type(end) is not int:
        ck.fail(f"eos_token_id = {end!r} in config.json is no token")
    return CLIPConfig(vision=_vit(ck, rules, eyes, "vision.", (12, "quick_gelu", 1e-5)),
                      text=_gpt(ck, rules, words, "text.", (8, "quick_gelu", 1e-5)),
                      end_token=None if end == 2 else end,      # 2: old configs' mistake, kept as a sign for "argmax"
                      **Section(ck, rules, ck.config).sizes())


def _resnet50(ck, rules):
    """50 layers are 3, 4, 6 and 3 blocks; other depths of the same block fit as well."""
    section = Section(ck, rules, ck.config)
    section.agree("relu", ["hidden_act", "act_layer"], "our ResNet has ReLUs")
    section.agree("avg", ["global_pool"], "our ResNet ends in a mean")
    kind = str(ck.config.get("architecture", "resnet50"))       # timm's: resnetblur50 and others have the same shapes
    if not re.fullmatch(r"(\w+_)?resnet\d+(_v1b)?(\..+)?", kind):
        ck.fail(f"architecture = {kind!r} in config.json is no plain ResNet")
    blocks = [section.depth(f"stages.{s}", "-") for s in range(4) if s == 0 or section.has(f"stages.{s}.0.bn1.bias")]
    section.agree(blocks, ["depths"], f"the weights have {blocks} blocks")
    return ResNetConfig(**{"n_class": 0} | section.sizes(), blocks=tuple(blocks))


def _vgg16(ck, rules):
    """The convolutions are numbered 0, 2, 5, 7, 10, ...: a ReLU after each, and a pool where the step is 3."""
    section = Section(ck, rules, ck.config)
    layers = [int(name.split(".")[1]) for name in rules if re.fullmatch(r"features\.\d+\.weight", name)]
    first = [k for k in range(len(layers)) if k == 0 or layers[k] - layers[k - 1] > 2]      # of each stage
    convs = [end - k for k, end in zip(first, [*first[1:], len(layers)])]
    return VGGConfig(widths=tuple(section.size(f"features.{layers[k]}.weight", 0, "-") for k in first),
                     convs=tuple(convs), n_hidden=section.size("fc1.weight", 0, "-"),
                     **{"n_class": 0} | section.sizes())


MASKS = ("*.attn.bias", "*.attn.masked_bias", "*.crossattention.bias", "*.crossattention.masked_bias",  # causal masks
         "*lm_head.weight")                                     # the embedding again, see _gpt
POOLER = ("*pooler.dense.*",)                                   # a layer on the class token that nothing here reads
# Family: our class; its sizes (checkpoint, rules) -> config, its task, and what a file may hold that is no weight
FAMILIES = {
    "clip": (CLIP, _clip, "clip", ("*position_ids", "input_resolution", "context_length", "vocab_size")),
    "vit_gpt2": (CrossCaptioner, lambda ck, rules: VLMConfig(
        vision=_vit(ck, rules, ck.config.get("encoder"), "vision."),
        text=_gpt(ck, rules, ck.config.get("decoder"), "text.")), "caption", MASKS + POOLER),
    "gpt2": (GPT, lambda ck, rules: _gpt(ck, rules, ck.config), "text", MASKS),
    "vit": (ViT, lambda ck, rules: _vit(ck, rules, ck.config), "classify", POOLER),
    "resnet50": (ResNet50, _resnet50, "classify", ("*num_batches_tracked",)),
    "vgg16": (VGG16, _vgg16, "classify", ())}


# ---- dress: how images are prepared, and text

INTERPOLATIONS = {2: "bilinear", 3: "bicubic", "bilinear": "bilinear", "bicubic": "bicubic"}      # Pillow's numbers


def _hf_geometry(p, default):
    """preprocessor_config.json -> (side of the result, side to resize to, squash?).

    {"size": {"height": 224, "width": 224}}                        both sides become 224     (224, 224, True)
    {"size": {"shortest_edge": 256}, "crop_size": {"height": 224}, ...}   256, then the centre     (224, 256, False)
    {"size": 224}                    in old files; do_center_crop, or else the class's habit, tells which is meant
    """
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
    return crop, side, squash


def _timm_geometry(p, default):
    """The same of timm's pretrained_cfg or open_clip's preprocess_cfg. crop_pct 0.9: 224 pixels are cut from 248."""
    size = int(p.get("input_size", (3, default.size))[-1])
    side = math.floor(size / p["crop_pct"]) if "crop_pct" in p else (default.resize or size)
    return size, side, "squash" in (p.get("crop_mode"), p.get("resize_mode"))


def _read_recipe(geometry, p, default):
    crop, side, squash = geometry(p, default)
    mean, std = p.get("image_mean", p.get("mean", default.mean)), p.get("image_std", p.get("std", default.std))
    if not p.get("do_normalize", True):
        mean, std = (0,) * 3, (1,) * 3
    return Recipe(crop, "squash" if squash else "crop", None if squash or side == crop else side,
                  INTERPOLATIONS[p.get("resample", p.get("interpolation", default.interpolation))],
                  tuple(map(float, mean)), tuple(map(float, std)))


def _recipe(family, ck, size):
    """From the files, else as those who use these names do; for images of `size` pixels (None: as the files say)."""
    kind, usual = str(ck.config.get("architecture", ck.source)), {"vgg16": "torchvision", "vit_gpt2": "vit"}
    usual = usual.get(family, family)
    if "pos_embed" in ck.tensors:                               # timm's ViT
        usual = "deit" if "deit" in kind else "vit-augreg"
    elif family == "resnet50" and "conv1.weight" in ck.tensors:
        usual = "resnet50-a1" if "a1_in1k" in f"{kind} {ck.config.get('pretrained_cfg')} {ck.source}" else "torchvision"
    told = [(_hf_geometry, _object(ck.find("preprocessor_config.json"))),
            (_timm_geometry, ck.config.get("pretrained_cfg")),
            (_timm_geometry, family == "clip" and _object(ck.find("open_clip_config.json")).get("preprocess_cfg"))]
    try:
        recipe = next((_read_recipe(how, p, RECIPES[usual]) for how, p in told if p), RECIPES[usual])
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


def pretrained_tokenizer(source):
    """The tokenizer of a Hub id or folder: GPT-2's, CLIP's, BERT's ("google-bert/bert-base-uncased"), or of a run."""
    tokenizer = next(filter(None, map(_find_tokenizer, _places(source))), None)
    if tokenizer is None:
        raise UserError(f"{source} holds no tokenizer.json, vocab.json + merges.txt or vocab.txt; name one that does")
    return tokenizer


def _speech(ck, vocab_size):
    """The id a caption starts from, the id that ends it, and how many new ones a caption may have."""
    places = [_object(ck.find("generation_config.json")), ck.config, ck.config.get("decoder") or {}]

    def look(places, default, *keys):
        value = next((place[key] for key in keys for place in places if place.get(key) is not None), default)
        value = value[0] if isinstance(value, list) and len(value) == 1 else value
        return value if type(value) is int and value >= 0 else ck.fail(f"{keys[0]} = {value!r} is no token or length")
    usual = min(50256, vocab_size - 1)
    first, end = look(places, usual, "decoder_start_token_id", "bos_token_id"), look(places, usual, "eos_token_id")
    if max(first, end) >= vocab_size:
        ck.fail(f"the start token {first} or the end token {end} is beyond the vocabulary of {vocab_size}")
    # theirs counts the start token; a decoder's own max_length is a leftover of the class's defaults
    return first, end, max(1, look(places[:2], 21, "max_length") - 1)


def _grow(family, model, special_tokens):
    """New words for a GPT-2 and its tokenizer together: each new row of wte starts as the mean of the old ones."""
    if family not in ("gpt2", "vit_gpt2") or model.tokenizer is None:
        raise UserError(f"special tokens need a GPT-2 and its tokenizer.json; this {family} came without")
    gpt = model if family == "gpt2" else model.text
    model.tokenizer.add_special_tokens(special_tokens)
    gpt.grow_vocab(max(gpt.config.vocab_size, model.tokenizer.vocab_size))


def _stretch(vision, rules, image_size):
    """Another image size: the grid of positions is stretched like a picture."""
    if image_size % vision.patch_size or image_size < vision.patch_size:
        raise UserError(f"image_size {image_size} is no multiple of the model's patch size {vision.patch_size}")
    vision.image_size, name = image_size, "pos" if "pos" in rules else "vision.pos"

    def resized(table):
        return resize_positions(table.float().reshape(1, -1, table.size(-1)), image_size // vision.patch_size)
    rules[name] = Source(*rules[name].names, op=resized)


# ---- the loaders

def _load(family, source, revision=None, allow_pickle=False, image_size=None, special_tokens=()):
    """What every load_* below does. source: a Hub id or a local folder; revision: a branch, tag or commit.

    allow_pickle: open pytorch_model.bin, through torch's weights-only reader, if there is nothing else. image_size:
    stretch the position table to other pictures. special_tokens: new ones for GPT-2. family None: find it out.
    The model comes in eval mode. It carries .family, .recipe (how to prepare images; None for GPT-2), .tokenizer (None
    where the files hold none), .table (the rows of copy_weights), .sizes (its config) and, if it writes captions,
    .first, .end, .max_tokens. Raises UserError naming what is missing or does not fit.
    """
    ck = open_checkpoint(source, revision, allow_pickle)
    share, found, rules = best_naming(ck.tensors, [family] if family else FAMILIES)
    if not family and share < 0.5:
        raise UserError(f"{source} is none of {', '.join(FAMILIES)} (model_type {ck.config.get('model_type')}, tensors "
                        f"{', '.join(list(ck.tensors)[:3])}, ...); name another model")
    family = found
    model_class, sizes, task, ignore = FAMILIES[family]
    config = sizes(ck, rules)
    vision = getattr(config, "vision", config)
    if isinstance(vision, ViTConfig) and image_size and image_size != vision.image_size:
        _stretch(vision, rules, image_size)
    with torch.device("meta"):                  # no memory, no random numbers for weights that are about to be copied
        model = model_class(config)
    model.to_empty(device="cpu")
    model.table = copy_weights(model, ck.tensors, rules, ignore, str(ck.path))
    model.family, model.sizes = family, config
    model.recipe = None if task == "text" else _recipe(family, ck, getattr(vision, "image_size", image_size))
    model.tokenizer = None if task == "classify" else _find_tokenizer(ck.find)
    if task == "caption":
        model.first, model.end, model.max_tokens = _speech(ck, config.text.vocab_size)
    if special_tokens:
        _grow(family, model, special_tokens)
    return model.eval()


# Each takes (source, **options), see _load, and returns the model named last.
load_gpt2 = partial(_load, "gpt2")              # any size: openai-community/gpt2, distilbert/distilgpt2 -> gpt.GPT
load_vit = partial(_load, "vit")                # ViT or DeiT: google/vit-base-patch16-224, timm/deit_... -> vit.ViT
load_clip = partial(_load, "clip")              # with a ViT: openai/clip-vit-base-patch32, laion/... -> clip.CLIP
load_resnet50 = partial(_load, "resnet50")      # v1.5: microsoft/resnet-50, timm/resnet50.a1_in1k -> cnn.ResNet50
load_vgg16 = partial(_load, "vgg16")            # linear layers stored either way: timm/vgg16.tv_in1k -> cnn.VGG16
load_vit_gpt2 = partial(_load, "vit_gpt2")      # nlpconnect/vit-gpt2-image-captioning -> vlm.CrossCaptioner


def load_pretrained(source, **options):
    """Any of the families, found out by its names -> Loaded; a captioner's `config` is as train.py writes a run's."""
    model = _load(None, source, **options)
    task = FAMILIES[model.family][2]
    config = {"task": task, "model": "cross" if task == "caption" else model.family, "dataset": str(source),
              "sizes": asdict(model.sizes), "recipe": model.recipe and asdict(model.recipe)}
    if task == "caption":
        config |= {"first": model.first, "end": model.end, "max_tokens": model.max_tokens}
    return Loaded(model, model.tokenizer, model.recipe, config)


# ---- the way back, and the command line

export_gpt2, export_vit_gpt2 = export.export_gpt2, export.export_vit_gpt2


def export_run(run, folder):
    """The captioner that train.py left in the folder `run`, written for transformers."""
    loaded = load_run(run)
    export_vit_gpt2(loaded.model, folder, loaded.recipe, loaded.tokenizer,
                    *(loaded.config.get(key) for key in ("first", "end", "max_tokens")))


def show_table(source, **options):
    """Print how a published file becomes our model: a line per weight, and the parameter total."""
    model = load_pretrained(source, **options).model
    width = max(len(row.ours) for row in model.table)
    print(f"{'how':<22}{'shape':<20}{'our name':<{width}}  their name")
    for row in model.table:
        shape = " x ".join(map(str, row.shape)) or "one number"
        print(f"{row.how.replace('_', ' + '):<22}{shape:<20}{row.ours or '-':<{width}}  {row.theirs}")
    total = sum(p.numel() for p in model.parameters())
    ignored = [math.prod(row.shape) for row in model.table if row.how == "ignored"]
    print(f"{source}: {type(model).__name__}, {total:,} parameters; ignored: {len(ignored)} tensors of together "
          f"{sum(ignored):,} numbers")


def main():
    """The command line; positional words, so argparse at hand instead of parse_config."""
    usage = "python -m tinyvlm.pretrained SOURCE [--allow-pickle] [--revision R], or: export RUN FOLDER"

    def refuse(message):
        raise UserError(f"{message}; usage: {usage}")
    parser = argparse.ArgumentParser(usage=usage, allow_abbrev=False,
                                     description="Print how a public checkpoint becomes our model, or export a run.")
    parser.error = refuse
    parser.add_argument("words", nargs="*", help="a Hub id or a folder to explain; or a run to write for transformers")
    parser.add_argument("--allow-pickle", action="store_true", help="open pytorch_model.bin if there is nothing else")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    options = vars(parser.parse_args())
    words = options.pop("words")
    if words[:1] == ["export"] and len(words) == 3:
        export_run(*words[1:])
        print(f"wrote {words[2]}; open it with transformers: VisionEncoderDecoderModel.from_pretrained")
    elif len(words) == 1 and words[0] != "export":
        show_table(words[0], **options)
    else:
        refuse(f"{' '.join(words)!r} is neither one SOURCE nor export RUN FOLDER")


if __name__ == "__main__":
    run_script(main)
