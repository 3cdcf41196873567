"""What a published checkpoint is: its family, and its sizes, read off the shapes of its tensors.

config.json is believed where no shape shows a thing (heads, activation, eps) and must agree where one does. Each of
its settings that changes numbers is read, or refused by its name where it is not what is computed here.
"""
import math
import re

import torch

from .clip import CLIP, CLIPConfig
from .cnn import VGG16, ResNet50, ResNetConfig, VGGConfig
from .files import read_json
from .gpt import GPT, GPTConfig
from .names import Source
from .transformer import ACTIVATIONS
from .vit import ViT, ViTConfig
from .vlm import CrossCaptioner, VLMConfig

SIZES = {       # field of our config: the weight that shows it, and along which axis; then the configs' words for it
    "vocab_size": ("wte.weight", 0, "vocab_size"),
    "block_size": ("wpe.weight", 0, "n_positions", "max_position_embeddings", "context_length"),
    "patch_size": ("patch.weight", 2, "patch_size"),
    "n_embd": ("ln_f.weight", 0, "n_embd", "hidden_size", "width"),     # GPT-2's word, the other models', open_clip's
    "n_hidden": ("blocks.0.mlp.fc.weight", 0, "n_inner", "intermediate_size"),
    "n_joint": ("text_head.weight", 0, "projection_dim"),
    "width": ("conv1.weight", 0, "embedding_size"),
    "n_class": ("head.weight", 0, "num_classes")}
# Settings that no shape shows, with the values that are computed here.
SUPPORTED = {"scale_attn_weights": [True], "scale_attn_by_inverse_layer_idx": [False], "qkv_bias": [True],
             "quantization_config": [], "layer_type": ["bottleneck"], "downsample_in_bottleneck": [False],
             "downsample_in_first_stage": [False], "pool_type": ["tok", "argmax"]}
HARMLESS = {*SUPPORTED, "num_heads", "heads", "act_layer", "embed_dim", "depth", "layers", "img_size", "image_size",
            "mlp_ratio", "head_width", *(word for _, _, *words in SIZES.values() for word in words)}
ACT_NAMES = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh"}


class Tower:
    """One tower of a checkpoint: the rules for our names under `prefix`, and `told`, what config.json says about it.

    supported: values of further settings ({"model_type": ["vit"]}) that are computed here; others are refused by name.
    """

    def __init__(self, ck, rules, told, prefix="", **supported):
        self.ck, self.rules = ck, {name[len(prefix):]: rule for name, rule in rules.items() if name.startswith(prefix)}
        self.told = told if isinstance(told, dict) else {}
        self.told = self.told | self.closed(self.told.get("model_args") or {})         # timm's
        for word, values in (SUPPORTED | supported).items():
            if self.told.get(word) not in [None, *values]:
                ck.fail(f"{word} = {self.told[word]!r} in config.json is not what tinyvlm computes")

    def closed(self, section):
        """A part of a config in which whatever is set changes the model, so that what is unknown is refused."""
        for word in [word for word in section if word not in HARMLESS and section[word]]:
            self.ck.fail(f"{word} = {section[word]!r} in config.json is nothing that tinyvlm knows")
        return section

    def read(self, default, *words):
        """Which of these words config.json uses, and the value: ("hidden_size", 768)."""
        return next(((word, self.told[word]) for word in words if self.told.get(word) is not None), (words[0], default))

    def agree(self, value, *words):
        """What the tensors show must be what config.json says, if it says anything."""
        word, told = self.read(None, *words)
        if told not in (None, value, [value] * 2):              # [16, 16]: a patch of 16 pixels
            self.ck.fail(f"{word} = {told!r} in config.json, but the weights show {value}")
        return value

    def size(self, name, axis, *words):
        """The length of our weight `name` along `axis`, read off the tensor that it comes from.

        gpt2's wte.weight is (50257, 768), so size("wte.weight", 0, "vocab_size") is 50257. Should config.json say
        "vocab_size": 50258, one of the two files is not what it claims to be, and a UserError says so.
        """
        theirs, transposed = self.rules[name].names[0], self.rules[name].op == "transposed"
        shape = tuple(self.ck.tensors[theirs].shape) if theirs in self.ck.tensors else ()
        if not -len(shape) <= axis < len(shape):
            self.ck.fail(f"{theirs} is missing, or has too few axes, in {self.ck.path.name}")
        return self.agree(shape[::-1][axis] if transposed else shape[axis], *(words or "-"))

    def sizes(self):
        """All that SIZES finds here."""
        return {field: self.size(*where) for field, where in SIZES.items() if where[0] in self.rules}

    def depth(self, stem, *words):
        """How many layers `stem`.0, `stem`.1, ... there are."""
        n = len({name[len(stem) + 1:].partition(".")[0] for name in self.rules if name.startswith(stem + ".")})
        return self.agree(n, *(words or "-"))

    def transformer(self, n_head, activation, eps):
        """The fields that a ViTConfig and a GPTConfig share.

        No shape shows heads, activation and eps; given is what transformers means where its config.json is silent. With
        no such config a head has 64 channels, but not in timm's ViTs of other widths (ViT-H: 80), which must tell.
        """
        sizes = self.sizes() | {"n_layer": self.depth("blocks", "n_layer", "num_hidden_layers", "layers", "depth")}
        C, width = sizes["n_embd"], self.told.get("head_width", 64)
        if "model_type" not in self.ck.config:
            odd = "pos_embed" in self.ck.tensors and C not in (192, 384, 768, 1024) or width not in range(1, C + 1)
            n_head = None if odd else C // width
        word, n_head = self.read(n_head, "n_head", "num_attention_heads", "num_heads", "heads")
        if type(n_head) is not int or n_head < 1 or C % n_head:
            self.ck.fail(f"config.json must give {word}, a divisor of the width {C}, not {n_head!r}")
        word, act = self.read(activation, "activation_function", "hidden_act", "act_layer")
        if ACT_NAMES.get(str(act), str(act)) not in ACTIVATIONS:
            self.ck.fail(f"{word} = {act!r} in config.json is none of ours")
        word, eps = self.read(eps, "layer_norm_epsilon", "layer_norm_eps")
        if not isinstance(eps, float) or not 0 < eps < 1:
            self.ck.fail(f"{word} = {eps!r} in config.json is no small number")
        return sizes | {"n_head": n_head, "activation": ACT_NAMES.get(str(act), str(act)), "eps": eps}


def _gpt(ck, rules, told, prefix="", kind="gpt2", usual=(12, "gelu_new", 1e-5)):
    """GPT-2, a captioner's decoder, CLIP's text tower. A file may hold wte under the name of the output matrix."""
    wte = rules[prefix + "wte.weight"].names[0]
    head = wte.replace("transformer.", "").replace("wte", "lm_head")
    if head in ck.tensors and wte not in ck.tensors:
        rules[prefix + "wte.weight"] = Source((head,))
    elif head in ck.tensors and not torch.equal(ck.tensors[head].float(), ck.tensors[wte].float()):
        ck.fail("lm_head.weight differs from wte.weight; in tinyvlm's GPT they are one matrix")
    tower = Tower(ck, rules, told, prefix, model_type=[kind])
    return GPTConfig(**tower.transformer(*usual), cross="blocks.0.cross.qkv.weight" in tower.rules)


def _vit(ck, rules, told, prefix="", kind="vit", usual=(12, "gelu", 1e-12)):
    """ViT, a captioner's encoder, CLIP's image tower. timm's eps is 1e-6, and its ViT may pool otherwise than ours."""
    tower = Tower(ck, rules, told, prefix, model_type=[kind], global_pool=["token", ""])
    sizes = tower.transformer(*usual[:2], 1e-6 if "pos_embed" in ck.tensors else usual[2])
    rows = tower.size("pos", -2)                                # one for the class token, and n * n patches
    n = math.isqrt(max(rows - 1, 0))
    if n * n + 1 != rows or not n:
        ck.fail(f"a position table of {rows} rows is no class token and a square of patches")
    return ViTConfig(**sizes, image_size=tower.agree(n * sizes["patch_size"], "image_size", "img_size"),
                     pre_norm="ln_pre.weight" in tower.rules, patch_bias="patch.bias" in tower.rules)


def _clip(ck, rules):
    """Sizes from config.json, or from open_clip's file beside it; without either, they are OpenAI's first weights."""
    clip = Tower(ck, rules, ck.config if "model_type" in ck.config else {}, model_type=["clip"])
    if {"model_type", "vision_config"} & set(ck.config):        # where an old file has both, its .._dict counts
        vision, text = (ck.config.get(f"{side}_dict") or ck.config.get(side) or {}
                        for side in ("vision_config", "text_config"))
    else:
        path = ck.find("open_clip_config.json")
        model = read_json(path)["model_cfg"] if path else {"quick_gelu": True}
        act = {"hidden_act": "quick_gelu" if model.get("quick_gelu") else "gelu"}
        vision, text = (act | clip.closed(model.get(side) or {}) for side in ("vision_cfg", "text_cfg"))
    return CLIPConfig(vision=_vit(ck, rules, vision, "vision.", "clip_vision_model", (12, "quick_gelu", 1e-5)),
                      text=_gpt(ck, rules, text, "text.", "clip_text_model", (8, "quick_gelu", 1e-5)),
                      end_token=text.get("eos_token_id", 49407 if "model_type" in ck.config else 2), **clip.sizes())


def _resnet50(ck, rules):
    """50 layers are 3, 4, 6 and 3 blocks; other depths of the same block fit as well."""
    relu, kind = ["relu"], str(ck.config.get("architecture", "resnet50"))
    tower = Tower(ck, rules, ck.config, model_type=["resnet"], hidden_act=relu, act_layer=relu, global_pool=["avg"])
    if not re.fullmatch(r"(\w+_)?resnet\d+(_v1b)?(\..+)?", kind):       # timm's resnetblur50 has the same shapes
        ck.fail(f"architecture = {kind!r} in config.json is no plain ResNet")
    blocks = tower.agree([n for s in range(4) if (n := tower.depth(f"stages.{s}"))], "depths")
    return ResNetConfig(**{"n_class": 0} | tower.sizes(), blocks=tuple(blocks))


def _vgg16(ck, rules):
    """The convolutions are numbered 0, 2, 5, 7, 10, ...: a ReLU after each, and a pool where the step is 3."""
    tower = Tower(ck, rules, ck.config)
    layers = [int(name.split(".")[1]) for name in rules if re.fullmatch(r"feature_map\.\d+\.weight", name)]
    first = [k for k in range(len(layers)) if k == 0 or layers[k] - layers[k - 1] > 2]      # of each stage
    return VGGConfig(widths=tuple(tower.size(f"feature_map.{layers[k]}.weight", 0) for k in first),
                     convs=tuple(end - k for k, end in zip(first, [*first[1:], len(layers)])),
                     n_hidden=tower.size("fc1.weight", 0), **{"n_class": 0} | tower.sizes())


def _vit_gpt2(ck, rules):
    Tower(ck, rules, ck.config, model_type=["vision-encoder-decoder"])
    return VLMConfig(vision=_vit(ck, rules, ck.config.get("encoder"), "vision."),
                     text=_gpt(ck, rules, ck.config.get("decoder"), "text."))


# Causal masks; and lm_head, the embedding again (_gpt). The pooler is a layer on the class token that nothing reads.
MASKS = ["*.attn.bias", "*.attn.masked_bias", "*.crossattention.bias", "*.crossattention.masked_bias",
         "*lm_head.weight"]
POOLER = ["*pooler.dense.*"]
FAMILIES = {    # what it is; our class; its sizes (checkpoint, rules) -> config; its task; what is no weight of ours
    "clip": ("a CLIP model (--task clip)", CLIP, _clip, "clip", ["*position_ids", "context_length", "input_resolution",
                                                                 "vocab_size"]),
    "vit_gpt2": ("a ViT-GPT2 captioner (sample.py --pretrained)", CrossCaptioner, _vit_gpt2, "caption", MASKS + POOLER),
    "gpt2": ("a GPT-2 (--text)", GPT, lambda ck, rules: _gpt(ck, rules, ck.config), "text", MASKS),
    "vit": ("a ViT (--vision)", ViT, lambda ck, rules: _vit(ck, rules, ck.config), "vision", POOLER),
    "resnet50": ("a ResNet (--vision)", ResNet50, _resnet50, "vision", ["*num_batches_tracked"]),
    "vgg16": ("a VGG (--features)", VGG16, _vgg16, "vision", [])}
