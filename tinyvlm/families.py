"""What a published checkpoint is: its family, and its sizes, read off the shapes of its tensors.

No shape shows heads, activation or eps: config.json does. A setting there that contradicts the shapes, or changes the
numbers otherwise than is computed here, is refused by its name, in a ValueError that pretrained.py makes a sentence of.
Everywhere `shapes` is {our name: shape}: the size of GPT-2's vocabulary is shapes["wte.weight"][0], 50257.
"""
import math
import re

from .clip import CLIP, CLIPConfig
from .cnn import VGG16, ResNet50, ResNetConfig, VGGConfig
from .gpt import GPT, GPTConfig
from .image import RECIPES
from .vit import ViT, ViTConfig
from .vlm import CrossCaptioner, VLMConfig

WORDS = {       # a word of the configs of GPT-2, the other models, open_clip: the field of our config
    "n_embd": "n_embd", "hidden_size": "n_embd", "width": "n_embd", "n_inner": "n_hidden",
    "intermediate_size": "n_hidden", "n_layer": "n_layer", "num_hidden_layers": "n_layer", "layers": "n_layer",
    "n_head": "n_head", "num_attention_heads": "n_head", "heads": "n_head", "vocab_size": "vocab_size",
    "n_positions": "block_size", "max_position_embeddings": "block_size", "context_length": "block_size",
    "image_size": "image_size", "patch_size": "patch_size", "activation_function": "activation",
    "hidden_act": "activation", "layer_norm_epsilon": "eps", "layer_norm_eps": "eps"}
ACT_NAMES = {"gelu": "gelu", "gelu_new": "gelu_tanh", "quick_gelu": "quick_gelu"}
COMPUTED = {    # settings that no shape shows, each with the one value that is computed here
    "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "qkv_bias": True, "model_args": None,
    "quantization_config": None}
USUAL = {       # what transformers' classes mean where config.json is silent: heads, activation, eps
    "gpt2": (12, "gelu_new", 1e-5), "clip_text_model": (8, "quick_gelu", 1e-5),
    "vit": (12, "gelu", 1e-12), "clip_vision_model": (12, "quick_gelu", 1e-5)}


def agree(told, **computed):
    """Refuse a config that tells another value than what is computed: agree({"n_embd": 1024}, n_embd=768)."""
    for word, value in computed.items():
        if told.get(word) not in (None, value):
            raise ValueError(f"{word} = {told[word]!r:.60} in config.json, but the weights or tinyvlm have {value!r}")


def _transformer(ck, shapes, told, kind, **shown):
    """The fields that a ViTConfig and a GPTConfig share. kind: its model_type in transformers; shown: further sizes."""
    C, told = shapes["ln_f.weight"][0], {word: value for word, value in (told or {}).items() if value is not None}
    shown |= {"n_embd": C, "n_hidden": shapes["blocks.0.mlp.fc.weight"][0],
              "n_layer": len({name.split(".")[1] for name in shapes if name.startswith("blocks.")})}
    agree(told, model_type=kind, **COMPUTED, **{w: shown[field] for w, field in WORDS.items() if field in shown})
    n_head, activation, eps = USUAL[kind]
    if "model_type" not in ck.config:           # timm's and OpenAI's heads have 64 channels; wider models must tell
        n_head = C // told.get("head_width", 64) if "head_width" in told or C in (192, 384, 512, 768, 1024) else None
        eps = 1e-6 if "pos_embed" in ck.tensors else eps
    fields = {"n_head": n_head, "activation": activation, "eps": eps} | shown | {
        field: told[word] for word, field in WORDS.items() if word in told and field not in shown}
    if type(fields["n_head"]) is not int or fields["n_head"] < 1 or C % fields["n_head"]:
        raise ValueError(f"config.json tells n_head, a divisor of {C}, as num_attention_heads = {fields['n_head']!r}")
    if str(fields["activation"]) not in ACT_NAMES or not isinstance(fields["eps"], float):
        raise ValueError(f"hidden_act = {fields['activation']!r}, layer_norm_eps = {fields['eps']!r} in config.json")
    return fields | {"activation": ACT_NAMES[fields["activation"]]}


def _gpt(ck, shapes, told, kind="gpt2"):
    """GPT-2, a captioner's decoder, CLIP's text tower."""
    sizes = {"vocab_size": shapes["wte.weight"][0], "block_size": shapes["wpe.weight"][0]}
    return GPTConfig(**_transformer(ck, shapes, told, kind, **sizes), cross="blocks.0.cross.qkv.weight" in shapes)


def _vit(ck, shapes, told, kind="vit"):
    """ViT, a captioner's encoder, CLIP's image tower. timm's may pool otherwise than by the class token."""
    agree(told or {}, global_pool="token")
    P, n = shapes["patch.weight"][2], math.isqrt(shapes["pos"][1] - 1)      # one row for the class token, n * n patches
    sizes = _transformer(ck, shapes, told, kind, patch_size=P, image_size=n * P)
    return ViTConfig(**sizes, patch_bias="patch.bias" in shapes, n_class=shapes.get("head.weight", [0])[0],
                     pre_norm="ln_pre.weight" in shapes)


def _part(shapes, prefix):
    """The shapes of one tower: {"vision.pos": ..} -> {"pos": ..}."""
    return {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}


def _clip(ck, shapes):
    """Settings from config.json, or from open_clip's file, where whatever is set changes the model."""
    if "model_type" in ck.config:               # where an old file has both, its .._dict counts
        vision, text = (ck.config.get(f"{side}_config_dict") or ck.config.get(f"{side}_config") or {}
                        for side in ("vision", "text"))
    else:
        model = ck.read("open_clip_config.json")["model_cfg"]
        vision, text = ({"hidden_act": "quick_gelu" if model.get("quick_gelu") else "gelu"} | model[side]
                        for side in ("vision_cfg", "text_cfg"))
        agree(vision | text, **dict.fromkeys((vision | text).keys() - WORDS.keys() - {"head_width"}))
        images, usual = ck.read("open_clip_config.json").get("preprocess_cfg") or {}, RECIPES["clip"]
        agree(images, mean=[*usual.mean], std=[*usual.std], resize_mode="shortest", interpolation="bicubic")
    agree(ck.config, model_type="clip", projection_dim=shapes["text_head.weight"][0])
    config = CLIPConfig(vision=_vit(ck, _part(shapes, "vision."), vision, "clip_vision_model"),
                        text=_gpt(ck, _part(shapes, "text."), text, "clip_text_model"),
                        n_joint=shapes["text_head.weight"][0], end_token=text.get("eos_token_id", 2))
    if config.end_token == 2:                   # so in old configs, and there it means: the largest id
        config.end_token = min(49407, config.text.vocab_size - 1)       # tokens that were added stand behind it
    if type(config.end_token) is not int or not 0 <= config.end_token < config.text.vocab_size:
        raise ValueError(f"eos_token_id = {config.end_token!r} in config.json is no token")
    return config


def _resnet50(ck, shapes):
    """50 layers are 3, 4, 6 and 3 blocks; other depths of the same block fit as well."""
    width, blocks = shapes["conv1.weight"][0], []
    while stage := _part(shapes, f"stages.{len(blocks)}."):
        blocks.append(len({name.split(".")[0] for name in stage}))
    agree(ck.config, model_type="resnet", hidden_act="relu", layer_type="bottleneck", embedding_size=width,
          depths=blocks, downsample_in_bottleneck=False, downsample_in_first_stage=False, global_pool="avg", **COMPUTED)
    if not re.fullmatch(r"resnet\d+", ck.config.get("architecture", "resnet50")):       # resnetblur50: the same shapes
        raise ValueError(f"architecture = {ck.config['architecture']!r} in config.json is no plain ResNet")
    return ResNetConfig(width=width, blocks=tuple(blocks), n_class=shapes.get("head.weight", [0])[0])


def _vgg16(ck, shapes):
    first = (0, 5, 10, 17, 24)                  # the numbers of each stage's first convolution
    return VGGConfig(widths=tuple(shapes[f"feature_map.{k}.weight"][0] for k in first),
                     n_hidden=shapes["fc1.weight"][0], n_class=shapes.get("head.weight", [0])[0])


def _vit_gpt2(ck, shapes):
    return VLMConfig(vision=_vit(ck, _part(shapes, "vision."), ck.config.get("encoder")),
                     text=_gpt(ck, _part(shapes, "text."), ck.config.get("decoder")))


def tie_lm_head(tensors, rules):
    """GPT-2's output matrix is its embedding again: a file may hold it under either name, or both if they are equal."""
    for wte in [rule.names[0] for ours, rule in rules.items() if ours.endswith("wte.weight")]:
        head = wte.replace("transformer.", "").replace("wte", "lm_head")
        if head != wte and head in tensors and tensors.setdefault(wte, tensors[head]).equal(tensors[head]):
            del tensors[head]


# Causal masks. The pooler is a layer on the class token that nothing reads.
MASKS = ["*.attn.bias", "*.attn.masked_bias", "*.crossattention.bias", "*.crossattention.masked_bias"]
FAMILIES = {    # what it is; our class; (checkpoint, shapes) -> its config; its task; what is no weight of ours
    "clip": ("a CLIP model (--task clip)", CLIP, _clip, "clip",
             ["*position_ids", "context_length", "input_resolution", "vocab_size"]),
    "vit_gpt2": ("a ViT-GPT2 captioner (sample.py --pretrained)", CrossCaptioner, _vit_gpt2, "caption",
                 [*MASKS, "*pooler.dense.*"]),
    "gpt2": ("a GPT-2 (--text)", GPT, lambda ck, shapes: _gpt(ck, shapes, ck.config), "text", MASKS),
    "vit": ("a ViT (--vision)", ViT, lambda ck, shapes: _vit(ck, shapes, ck.config), "vision", ["*pooler.dense.*"]),
    "resnet50": ("a ResNet (--vision)", ResNet50, _resnet50, "vision", ["*num_batches_tracked"]),
    "vgg16": ("a VGG (--features)", VGG16, _vgg16, "vision", [])}
