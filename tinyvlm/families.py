"""What a published checkpoint is: its family, and its sizes, read off the shapes of its tensors.

No shape shows heads, activation or eps: config.json does. A setting there that contradicts the shapes, or changes the
numbers otherwise than is computed here, is refused by its name, in a ValueError that pretrained.py makes a sentence of.
Everywhere `shapes` is {our name: shape}: the size of GPT-2's vocabulary is shapes["wte.weight"][0], 50257."""
import math

from .clip import CLIP, CLIPConfig
from .cnn import VGG16, ResNet50, ResNetConfig, VGGConfig
from .gpt import GPT, GPTConfig
from .image import RECIPES
from .names import columns
from .vit import ViT, ViTConfig
from .vlm import CrossCaptioner, VLMConfig

SETTINGS = columns("""
ours        gpt2                 vit                      open_clip
n_embd      n_embd               hidden_size              width
n_hidden    n_inner              intermediate_size        -
n_layer     n_layer              num_hidden_layers        layers
n_head      n_head               num_attention_heads      heads
vocab_size  vocab_size           vocab_size               vocab_size
block_size  n_positions          max_position_embeddings  context_length
image_size  -                    image_size               image_size
patch_size  -                    patch_size               patch_size
activation  activation_function  hidden_act               -
eps         layer_norm_epsilon   layer_norm_eps           -
""")
WORDS = {theirs: ours for column in SETTINGS.values() for ours, theirs in column.items()}
ACT_NAMES = {"gelu": "gelu", "gelu_new": "gelu_tanh", "quick_gelu": "quick_gelu"}
COMPUTED = {    # settings that no shape shows, each with the one value that is computed here
    "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "qkv_bias": True, "model_args": None,
    "quantization_config": None}
USUAL = {       # what transformers' classes mean where config.json is silent
    "gpt2": dict(n_head=12, activation="gelu_new", eps=1e-5),
    "vit": dict(n_head=12, activation="gelu", eps=1e-12),
    "clip_text_model": dict(n_head=8, activation="quick_gelu", eps=1e-5),
    "clip_vision_model": dict(n_head=12, activation="quick_gelu", eps=1e-5)}
HEADS = {192: 3, 384: 6, 512: 8, 768: 12, 1024: 16}             # timm's and OpenAI's by width; others must tell


def agree(told, **computed):
    """Refuse a config that tells another value than what is computed: agree({"n_embd": 1024}, n_embd=768)."""
    for word, value in computed.items():
        if told.get(word) not in (None, value):
            raise ValueError(f"{word} = {told[word]!r:.60} in config.json, but the weights or tinyvlm have {value!r}")


def _part(shapes, prefix):
    """The shapes of one tower: {"vision.pos": ..} -> {"pos": ..}."""
    return {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}


def _transformer(ck, shapes, told, kind, **shown):
    """The fields that a ViTConfig and a GPTConfig share. told: its part of config.json, or None, all of it; kind: its
    model_type in transformers; shown: further sizes."""
    told = {word: value for word, value in (told or ck.config).items() if value is not None}
    shown |= {"n_embd": shapes["ln_f.weight"][0], "n_hidden": shapes["blocks.0.mlp.fc.weight"][0],
              "n_layer": len({name.split(".")[1] for name in shapes if name.startswith("blocks.")})}
    agree(told, model_type=kind, **COMPUTED, **{w: shown[field] for w, field in WORDS.items() if field in shown})
    usual = {"n_head": HEADS.get(shown["n_embd"])} if "model_type" not in ck.config else {}
    usual |= {"eps": 1e-6} if "pos_embed" in ck.tensors else {}                   # timm's ViTs
    fields = USUAL[kind] | usual | {WORDS[word]: value for word, value in told.items() if word in WORDS} | shown
    return fields | {"activation": ACT_NAMES.get(str(fields["activation"]), fields["activation"])}


def _gpt(ck, shapes, told=None, kind="gpt2"):
    """GPT-2, a captioner's decoder, CLIP's text tower."""
    sizes = _transformer(ck, shapes, told, kind, vocab_size=shapes["wte.weight"][0], block_size=shapes["wpe.weight"][0])
    return GPTConfig(**sizes, cross="blocks.0.cross.qkv.weight" in shapes)


def _vit(ck, shapes, told=None, kind="vit"):
    """ViT, a captioner's encoder, CLIP's image tower. timm's may pool otherwise than by the class token."""
    agree(told or ck.config, global_pool="token")
    P, n = shapes["patch.weight"][2], math.isqrt(shapes["pos"][1] - 1)      # one row for the class token, n * n patches
    sizes = _transformer(ck, shapes, told, kind, patch_size=P, image_size=n * P)
    return ViTConfig(**sizes, patch_bias="patch.bias" in shapes, n_class=shapes.get("head.weight", [0])[0],
                     pre_norm="ln_pre.weight" in shapes)


def _clip(ck, shapes):
    """Settings from config.json, or from open_clip's file, where whatever is set changes the model."""
    if "model_type" in ck.config:               # where an old file has both, its .._dict counts
        vision, text = (ck.config.get(f"{side}_config_dict") or ck.config.get(f"{side}_config") or {}
                        for side in ("vision", "text"))
    else:
        told, usual = ck.read("open_clip_config.json"), RECIPES["clip"]
        act = {"hidden_act": "quick_gelu" if told["model_cfg"].get("quick_gelu") else "gelu"}
        vision, text = (act | told["model_cfg"][f"{side}_cfg"] for side in ("vision", "text"))
        agree(vision | text, **dict.fromkeys((vision | text).keys() - WORDS.keys()))
        agree(told.get("preprocess_cfg") or {}, mean=[*usual.mean], std=[*usual.std], resize_mode="shortest",
              interpolation="bicubic")
    D = shapes["text_head.weight"][0]                                             # (D, C)
    agree(ck.config, model_type="clip", projection_dim=D)
    config = CLIPConfig(vision=_vit(ck, _part(shapes, "vision."), vision, "clip_vision_model"), n_joint=D,
                        text=_gpt(ck, _part(shapes, "text."), text, "clip_text_model"),
                        end_token=text.get("eos_token_id", 2))
    if config.end_token == 2:                   # so in old configs, and there it means: the largest id
        config.end_token = min(49407, config.text.vocab_size - 1)       # tokens that were added stand behind it
    return config


def _resnet50(ck, shapes):
    width, blocks = shapes["conv1.weight"][0], []                                 # (width, 3, 7, 7)
    while stage := _part(shapes, f"stages.{len(blocks)}."):                     # stage 0, 1, ..: {"0.conv1.weight": ..}
        blocks.append(len({name.split(".")[0] for name in stage}))
    agree(ck.config, model_type="resnet", architecture="resnet50", hidden_act="relu", layer_type="bottleneck",
          embedding_size=width, depths=blocks, downsample_in_bottleneck=False, downsample_in_first_stage=False,
          global_pool="avg", **COMPUTED)
    return ResNetConfig(width=width, blocks=tuple(blocks), n_class=shapes.get("head.weight", [0])[0])


def _vgg16(ck, shapes):
    widths = tuple(shapes[f"feature_map.{k}.weight"][0] for k in (0, 5, 10, 17, 24))        # of each stage's first
    return VGGConfig(widths, n_hidden=shapes["fc1.weight"][0], n_class=shapes.get("head.weight", [0])[0])


def _vit_gpt2(ck, shapes):
    return VLMConfig(vision=_vit(ck, _part(shapes, "vision."), ck.config.get("encoder")),
                     text=_gpt(ck, _part(shapes, "text."), ck.config.get("decoder")))


def tie_lm_head(tensors, rules):
    """GPT-2's output matrix is its embedding again: a file may hold it under either name, or both if they are equal."""
    for wte in [rule.names[0] for ours, rule in rules.items() if ours.endswith("wte.weight")]:
        head = wte.replace("transformer.", "").replace("wte", "lm_head")
        if head != wte and head in tensors and tensors.setdefault(wte, tensors[head]).equal(tensors[head]):
            del tensors[head]                                                     # the same numbers again


FAMILIES = {    # what it is; our class; (checkpoint, shapes) -> its config; its task
    "clip": ("a CLIP model (--task clip)", CLIP, _clip, "clip"),
    "vit_gpt2": ("a ViT-GPT2 captioner (sample.py --pretrained)", CrossCaptioner, _vit_gpt2, "caption"),
    "gpt2": ("a GPT-2 (--text)", GPT, _gpt, "text"),
    "vit": ("a ViT (--vision)", ViT, _vit, "vision"),
    "resnet50": ("a ResNet (--vision)", ResNet50, _resnet50, "vision"),
    "vgg16": ("a VGG (--features)", VGG16, _vgg16, "vision")}
# No weights: causal masks, position numbers, counters; and the pooler, a layer on the class token that nothing reads.
IGNORE = ["*.attn.bias", "*.attn.masked_bias", "*.crossattention.bias", "*.crossattention.masked_bias",
          "*position_ids", "*num_batches_tracked", "*pooler.dense.*"]
