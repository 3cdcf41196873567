"""Public checkpoints: transformers' own answers on tiny random ones (tests/reference), in every naming, and strictness.

The reference folders were made by make_reference_checkpoints.py. The other namings (timm, OpenAI, torchvision) are the
same tensors renamed here, by hand and not by the tables under test; their answers must not change.
"""
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from conftest import REFERENCE
from servers import Host, answer
from tinyvlm import pretrained
from tinyvlm.config import UserError
from tinyvlm.generate import generate
from tinyvlm.gpt import GPT, GPTConfig
from tinyvlm.image import CLIP as CLIP_COLOURS
from tinyvlm.image import IMAGENET, RECIPES, Recipe
from tinyvlm.pretrained import (export_gpt2, export_vit_gpt2, load_clip, load_gpt2, load_pretrained, load_resnet50,
                                load_vgg16, load_vit, load_vit_gpt2, open_checkpoint, pretrained_tokenizer)
from tinyvlm.tokenizer import BPETokenizer
from tinyvlm.vit import ViTConfig
from tinyvlm.vlm import VLMConfig, build, to_dict
from tinyvlm.weights import load_safetensors, save_safetensors, write_json


def config_of(name):
    return json.loads((REFERENCE / name / "config.json").read_text())


def tensors_of(name):
    return load_safetensors(REFERENCE / name / "model.safetensors")


def answers_of(name):
    return load_safetensors(REFERENCE / name / "answers.safetensors")


def folder(path, tensors, config=None, file="model.safetensors", **files):
    path.mkdir(exist_ok=True)
    save_safetensors(tensors, path / file)
    for name, content in {"config": config, **files}.items():
        if content is not None:
            write_json(path / f"{name}.json", content)
    return path


def close(got, want):
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


# ---- the same tensors under other names

def renamed(tensors, *rules):
    out = {}
    for name, tensor in tensors.items():
        for pattern, new in rules:
            name = re.sub(pattern, new, name)
        out[name] = tensor
    return out


def join_qkv(tensors, words, new):
    """Three tensors query, key, value -> one, rows in that order."""
    out = dict(tensors)
    for name in [name for name in tensors if f".{words[0]}." in name]:
        joined = torch.cat([out.pop(name.replace(words[0], word)) for word in words])
        out[re.sub(rf"(attention\.attention|self_attn)\.{words[0]}\.", new, name)] = joined
    return out


def timm_vit(tensors):
    return renamed(
        join_qkv(tensors, ("query", "key", "value"), "attn.qkv."), (r"^vit\.", ""),
        (r"embeddings\.cls_token", "cls_token"), (r"embeddings\.position_embeddings", "pos_embed"),
        (r"embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
        (r"encoder\.layer", "blocks"), (r"attention\.output\.dense", "attn.proj"), (r"intermediate\.dense", "mlp.fc1"),
        (r"output\.dense", "mlp.fc2"), ("layernorm_before", "norm1"), ("layernorm_after", "norm2"),
        ("layernorm", "norm"), ("classifier", "head"))


def openai_clip(tensors):
    tensors = renamed(
        join_qkv(tensors, ("q_proj", "k_proj", "v_proj"), "attn.in_proj_"), (r"vision_model\.", "visual."),
        (r"text_model\.", ""), (r"encoder\.layers", "transformer.resblocks"), ("pre_layrnorm", "ln_pre"),
        ("post_layernorm", "ln_post"), ("final_layer_norm", "ln_final"), ("layer_norm", "ln_"), ("self_attn", "attn"),
        ("fc1", "c_fc"), ("fc2", "c_proj"), (r"embeddings\.class", "class"), (r"embeddings\.patch_embedding", "conv1"),
        (r"embeddings\.position_embedding\.weight", "positional_embedding"), (r"embeddings\.token", "token"),
        (r"visual_projection\.weight", "visual.proj"), (r"text_projection\.weight", "text_projection"))
    return {name: t.t() if name in ("visual.proj", "text_projection") else t for name, t in tensors.items()}


def torchvision_resnet(tensors):
    return renamed(
        tensors, (r"resnet\.", ""), (r"embedder\.embedder\.convolution", "conv1"),
        (r"embedder\.embedder\.norm\w+", "bn1"), (r"encoder\.stages\.(\d)\.layers", lambda m: f"layer{int(m[1]) + 1}"),
        (r"shortcut\.convolution", "downsample.0"), (r"shortcut\.norm\w+", "downsample.1"),
        (r"layer\.(\d)\.convolution", lambda m: f"conv{int(m[1]) + 1}"),
        (r"layer\.(\d)\.norm\w+", lambda m: f"bn{int(m[1]) + 1}"), (r"classifier\.1", "fc"))


# ---- GPT-2

def gpt2_masks(prefix):
    return {f"{prefix}h.{i}.attn.{name}": t for i in range(2)
            for name, t in (("bias", torch.ones(1, 1, 20, 20, dtype=torch.uint8)), ("masked_bias", torch.tensor(-1e4)))}


@pytest.mark.parametrize("prefix, head", [
    ("transformer.", None), ("", None), ("transformer.", "beside"), ("module.transformer.", "beside"),
    ("_orig_mod.", None), ("transformer.", "alone")])
def test_gpt2_in_every_naming(tmp_path, prefix, head):
    """gpt2's file has no prefix and carries mask buffers, distilgpt2's has one; lm_head may repeat or replace wte."""
    bare = renamed(tensors_of("gpt2"), (r"^transformer\.", ""))
    tensors = renamed(bare, ("^", prefix)) | gpt2_masks(prefix)
    if head:
        tensors[prefix.replace("transformer.", "") + "lm_head.weight"] = bare["wte.weight"].clone()
    if head == "alone":
        del tensors[prefix + "wte.weight"]
    model = load_gpt2(folder(tmp_path / "gpt2", tensors, config_of("gpt2")))
    want = answers_of("gpt2")
    close(model(want["idx"])[0], want["logits"])
    assert not model.training and model.tokenizer is None and model.recipe is None


def test_gpt2_with_an_output_matrix_of_its_own_is_refused(tmp_path):
    tensors = tensors_of("gpt2") | {"lm_head.weight": torch.ones(40, 32)}
    with pytest.raises(UserError, match="lm_head.weight differs from wte.weight"):
        load_gpt2(folder(tmp_path / "gpt2", tensors, config_of("gpt2")))


def test_special_tokens_grow_gpt2_and_its_tokenizer_together(tmp_path):
    """New rows are the mean of the old; the old words keep their logits."""
    shutil.copytree(REFERENCE / "gpt2", tmp_path / "gpt2")
    spec = {"type": "BPE", "vocab": {chr(33 + i): i for i in range(39)} | {"<|endoftext|>": 39}, "merges": []}
    write_json(tmp_path / "gpt2" / "tokenizer.json", {
        "version": "1.0", "added_tokens": [], "normalizer": None, "post_processor": None,
        "decoder": {"type": "ByteLevel"}, "model": spec,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}})
    model = load_gpt2(tmp_path / "gpt2", special_tokens=["<image>", "<|endoftext|>", "<pad>"])
    assert model.tokenizer.encode("<image>#<pad>") == [40, 2, 41] and model.config.vocab_size == 42
    close(model.wte.weight[40:], model.wte.weight[:40].mean(0).expand(2, -1))
    want = answers_of("gpt2")
    close(model(want["idx"])[0][..., :40], want["logits"])
    assert pretrained_tokenizer(tmp_path / "gpt2").vocab_size == 40
    with pytest.raises(UserError, match="special tokens need a GPT-2 and its tokenizer"):
        load_gpt2(REFERENCE / "gpt2", special_tokens=["<image>"])


# ---- ViT

@pytest.mark.parametrize("name", ["vit", "vit_pooler"])
def test_vit_from_hugging_face(name):
    model, want = load_vit(REFERENCE / name), answers_of(name)
    close(model(want["img"]), want["feats"])
    assert model.config.eps == 1e-12 and model.recipe == Recipe(32, "squash", None, "bilinear")
    if name == "vit":
        close(model.classify(want["img"]), want["logits"])
    else:
        assert model.head is None


@pytest.mark.parametrize("arch, recipe", [("vit_tiny_patch8_32", "vit-augreg"), ("deit_tiny_patch8_32", "deit")])
def test_vit_from_timm(tmp_path, arch, recipe):
    """eps 1e-6 instead of Hugging Face's 1e-12 is all that differs; `model_args` tells the heads of odd sizes."""
    timm = {"architecture": arch, "num_classes": 5, "model_args": {"num_heads": 3}}
    model = load_vit(folder(tmp_path / "timm", timm_vit(tensors_of("vit")), timm))
    want = answers_of("vit")
    torch.testing.assert_close(model.classify(want["img"]), want["logits"], atol=1e-3, rtol=1e-3)
    model = load_vit(folder(tmp_path / "timm", timm_vit(tensors_of("vit")), {**timm, "layer_norm_eps": 1e-12}))
    close(model.classify(want["img"]), want["logits"])
    assert model.recipe.mean == RECIPES[recipe].mean and model.recipe.resize == 248 * 32 // 224


@pytest.mark.parametrize("told, fault", [
    ({}, "must give num_heads, a divisor of the width 24, not None"),
    ({"model_args": {"num_heads": 3, "act_layer": "silu"}}, "act_layer = 'silu'"),
    ({"model_args": {"num_heads": 3, "norm_layer": "rmsnorm"}}, "norm_layer = 'rmsnorm'"),
    ({"num_heads": 3, "global_pool": "avg"}, "global_pool = 'avg'")])
def test_what_changes_a_timm_vit_and_no_shape_is_told_or_refused(tmp_path, told, fault):
    """timm's ViT-H is 1,280 wide with heads of 80 channels: 64 would load, and give other numbers."""
    config = {"architecture": "vit", "num_classes": 5}
    with pytest.raises(UserError, match=fault):
        load_vit(folder(tmp_path / "timm", timm_vit(tensors_of("vit")), config | told))


def test_vit_at_another_image_size():
    """Position tables are stretched; the class token keeps its row; a size between the patches is refused."""
    model, small = load_vit(REFERENCE / "vit", image_size=48), load_vit(REFERENCE / "vit")
    assert model(torch.randn(1, 3, 48, 48)).shape == (1, 37, 24) and model.recipe.size == model.config.image_size == 48
    torch.testing.assert_close(model.pos[:, 0], small.pos[:, 0])
    with pytest.raises(UserError, match="image_size 50 is no multiple of the model's patch size 8"):
        load_vit(REFERENCE / "vit", image_size=50)


def test_vit_without_qkv_bias_is_one_whose_biases_are_zero(tmp_path):
    tensors, want = tensors_of("vit_pooler"), answers_of("vit_pooler")
    is_bias = re.compile(r"attention\.attention\.\w+\.bias")
    zeroed = {name: torch.zeros_like(t) if is_bias.search(name) else t for name, t in tensors.items()}
    without = {name: t for name, t in tensors.items() if not is_bias.search(name)}
    a = load_vit(folder(tmp_path / "a", zeroed, config_of("vit_pooler")))
    b = load_vit(folder(tmp_path / "b", without, config_of("vit_pooler") | {"qkv_bias": False}))
    torch.testing.assert_close(a(want["img"]), b(want["img"]))
    with pytest.raises(UserError, match="query.bias"):          # gone without a word in the config: damaged
        load_vit(folder(tmp_path / "b", without, config_of("vit_pooler") | {"qkv_bias": True}))
    with pytest.raises(UserError, match="have biases, but config.json says qkv_bias = False"):
        load_vit(folder(tmp_path / "b", tensors, config_of("vit_pooler") | {"qkv_bias": False}))


# ---- CLIP

def clip_agrees(model, name):
    want = answers_of(name)
    close(model.encode_image(want["img"]), want["image_emb"])
    close(model.encode_text(want["idx"]), want["text_emb"])
    close(model(want["img"], want["idx"])[0], want["logits"])


@pytest.mark.parametrize("name, act", [("clip_quick", "quick_gelu"), ("clip_gelu", "gelu")])
def test_clip_from_hugging_face(tmp_path, name, act):
    """OpenAI's and LAION's activation, the old files' position numbers, the wrong activation showing."""
    ids = {f"{side}_model.embeddings.position_ids": torch.arange(n)[None] for side, n in (("text", 10), ("vision", 17))}
    model = load_clip(folder(tmp_path / "clip", tensors_of(name) | ids, config_of(name)))
    clip_agrees(model, name)
    assert model.config.vision.activation == model.config.text.activation == act
    assert model.recipe == Recipe(32, "crop", None, "bicubic", *CLIP_COLOURS)


@pytest.mark.parametrize("name, prefix", [("clip_quick", ""), ("clip_gelu", "text."), ("clip_quick", "module.")])
def test_clip_in_open_clip_naming(tmp_path, name, prefix):
    """Sizes, activation and preprocessing from open_clip_config.json; model.safetensors beside it is another model."""
    names = openai_clip(tensors_of(name))
    lead = prefix.replace("text.", "")
    tensors = {(lead if k == "logit_scale" or k.startswith("visual.") else prefix) + k: t for k, t in names.items()}
    told = {"model_cfg": {"embed_dim": 16, "quick_gelu": name == "clip_quick",
                          "vision_cfg": {"image_size": 32, "layers": 3, "width": 24, "head_width": 8, "patch_size": 8},
                          "text_cfg": {"context_length": 10, "vocab_size": 40, "width": 32, "heads": 4, "layers": 2}},
            "preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "std": [1, 1, 1], "resize_mode": "squash"}}
    folder(tmp_path / "clip", {"trunk": torch.ones(1)}, {"architecture": "vit_base_patch32_clip_224"})
    path = folder(tmp_path / "clip", tensors, None, "open_clip_model.safetensors", open_clip_config=told)
    model = load_clip(path)
    clip_agrees(model, name)
    assert model.recipe == Recipe(32, "squash", None, "bicubic", (0.1, 0.2, 0.3), (1.0, 1.0, 1.0))
    if name == "clip_gelu":                                     # what a folder is called tells nothing
        del told["model_cfg"]["quick_gelu"]
        names = folder(tmp_path / "openai", tensors, None, "open_clip_model.safetensors", open_clip_config=told)
        clip_agrees(load_clip(names), name)
    told["model_cfg"]["vision_cfg"]["pool_type"] = "avg"
    with pytest.raises(UserError, match="pool_type = 'avg'"):
        load_clip(folder(tmp_path / "other", tensors, None, "open_clip_model.safetensors", open_clip_config=told))


@pytest.mark.parametrize("name", ["clip_quick", "clip_gelu"])
def test_clip_with_the_sections_of_old_configs(tmp_path, name):
    """`text_config_dict` beside or in place of `text_config`: it is the one that counts."""
    config = config_of(name)
    sides = {f"{side}_config_dict": config.pop(f"{side}_config") for side in ("text", "vision")}
    other = {"hidden_act": "relu"}
    for k, extra in enumerate(({}, {"text_config": other, "vision_config": other})):
        clip_agrees(load_clip(folder(tmp_path / str(k), tensors_of(name), config | sides | extra)), name)


def test_clip_in_openai_naming_with_hugging_faces_config(tmp_path):
    tensors = openai_clip(tensors_of("clip_gelu"))
    tensors["logit_scale"] = tensors["logit_scale"].reshape(1)
    clip_agrees(load_clip(folder(tmp_path / "clip", tensors, config_of("clip_gelu"))), "clip_gelu")
    assert load_clip(tmp_path / "clip", image_size=40).encode_image(torch.randn(1, 3, 40, 40)).shape == (1, 16)


# ---- ResNet-50 and VGG-16

def resnet_reference():
    data = np.load(Path(__file__).with_name("reference_resnet.npz"))
    arrays = {name: torch.from_numpy(data[name]) for name in data.files}
    tensors = {name.removeprefix("weights/"): t for name, t in arrays.items() if name.startswith("weights/")}
    counters = {name.replace("running_var", "num_batches_tracked"): torch.tensor(3)
                for name in tensors if name.endswith("running_var")}
    return tensors | counters, arrays


@pytest.mark.parametrize("naming", ["Hugging Face", "torchvision", "bare"])
def test_resnet_in_both_namings(tmp_path, naming):
    tensors, want = resnet_reference()
    config = {"model_type": "resnet", "layer_type": "bottleneck", "embedding_size": 2, "depths": [1, 2, 2]}
    if naming == "torchvision":
        tensors = torchvision_resnet(tensors)
        told = {"tag": "a1_in1k", "crop_pct": 0.95, "interpolation": "bicubic", "input_size": [3, 224, 224],
                "mean": IMAGENET[0], "std": IMAGENET[1]}
        config = {"architecture": "resnet50", "num_classes": 5, "pretrained_cfg": told}
    elif naming == "bare":                                      # the body alone
        tensors = {name.removeprefix("resnet."): t for name, t in tensors.items() if "classifier" not in name}
    model = load_resnet50(folder(tmp_path / "resnet", tensors, config))
    close(model(want["img"]), want["feats"])
    if naming != "bare":
        close(model.classify(want["img"]), want["logits"])
    assert model.recipe == RECIPES["resnet50-a1" if naming == "torchvision" else "resnet50"]


def test_resnet_that_halves_elsewhere_is_refused(tmp_path):
    """The stride on the 1x1 convolution changes every number and no shape."""
    tensors, _ = resnet_reference()
    with pytest.raises(UserError, match="downsample_in_bottleneck = True"):
        load_resnet50(folder(tmp_path / "resnet", tensors, {"model_type": "resnet", "downsample_in_bottleneck": True}))


@pytest.mark.parametrize("told, fault", [
    ({"architecture": "resnetblur50"}, "architecture = 'resnetblur50'"),
    ({"global_pool": "max"}, "global_pool = 'max'"), ({"model_args": {"act_layer": "silu"}}, "act_layer = 'silu'"),
    ({"model_args": {"output_stride": 16}}, "output_stride = 16"), ({"model_args": {"aa_layer": "avg"}}, "aa_layer")])
def test_timm_resnets_that_differ_without_a_weight_are_refused(tmp_path, told, fault):
    config = {"architecture": "resnet50", "global_pool": "avg", "num_classes": 5}
    load_resnet50(folder(tmp_path / "plain", torchvision_resnet(resnet_reference()[0]), config))
    with pytest.raises(UserError, match=fault):
        load_resnet50(folder(tmp_path / "other", torchvision_resnet(resnet_reference()[0]), config | told))


@pytest.mark.parametrize("naming", ["timm, convolutions", "timm, linear", "torchvision"])
def test_vgg_with_its_linear_layers_stored_either_way(tmp_path, naming):
    torch.manual_seed(0)
    shapes = {"features.0": (4, 3, 3, 3), "features.3": (6, 4, 3, 3), "features.5": (6, 6, 3, 3),
              "pre_logits.fc1": (10, 6, 7, 7), "pre_logits.fc2": (10, 10, 1, 1), "head.fc": (5, 10)}
    w = {f"{name}.weight": 0.3 * torch.randn(shape) for name, shape in shapes.items()}
    w |= {f"{name}.bias": torch.randn(shape[0]) for name, shape in shapes.items()}
    img = torch.randn(2, 3, 28, 28)
    x = img
    for name, pool in (("features.0", True), ("features.3", False), ("features.5", True)):
        x = F.relu(F.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], padding=1))
        x = F.max_pool2d(x, 2) if pool else x                   # 28 -> 14 -> 7
    for name in ("pre_logits.fc1", "pre_logits.fc2"):
        x = F.relu(F.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"]))
    if naming != "timm, convolutions":
        w = {name: t.flatten(1) if name.startswith("pre_logits") and t.dim() > 1 else t for name, t in w.items()}
    if naming == "torchvision":
        w = renamed(w, (r"pre_logits\.fc1", "classifier.0"), (r"pre_logits\.fc2", "classifier.3"),
                    (r"head\.fc", "classifier.6"))
    model = load_vgg16(folder(tmp_path / "vgg", w))
    close(model(img), x.flatten(1))
    close(model.classify(img), F.linear(x.flatten(1), w.get("head.fc.weight", w.get("classifier.6.weight")),
                                        w.get("head.fc.bias", w.get("classifier.6.bias"))))
    assert model.recipe == RECIPES["torchvision"]


# ---- ViT + GPT-2

@pytest.mark.parametrize("naming", ["as saved", "as nlpconnect"])
def test_vit_gpt2_logits_and_captions(tmp_path, naming):
    """Teacher-forced logits, greedy and beam tokens. nlpconnect's file has masks of both attentions, and lm_head."""
    tensors, want = tensors_of("vit_gpt2"), answers_of("vit_gpt2")
    if naming == "as nlpconnect":
        tensors |= gpt2_masks("decoder.transformer.")
        tensors |= {name.replace("attn", "crossattention"): t for name, t in gpt2_masks("decoder.transformer.").items()}
        tensors["decoder.lm_head.weight"] = tensors["decoder.transformer.wte.weight"].clone()
    path = folder(tmp_path / "vit_gpt2", tensors, config_of("vit_gpt2"))
    for name in ("generation_config.json", "preprocessor_config.json"):
        shutil.copy(REFERENCE / "vit_gpt2" / name, path)
    loaded = load_pretrained(path)
    close(loaded.model(want["img"], want["idx"])[0], want["logits"])
    config = loaded.config
    assert (config["task"], config["model"], config["first"], config["end"], config["max_tokens"]) == (
        "caption", "cross", 39, 39, 11) and config["sizes"] == to_dict(loaded.model.config)
    assert loaded.recipe == Recipe(32, "squash", None, "bilinear")
    for beams in (1, 4):
        rows = generate(loaded.model, want["img"], [[39]] * 2, 11, num_beams=beams, eos_id=39)
        theirs = want[f"beams{beams}"].tolist()
        assert rows == [row[:row.index(39)] if 39 in row else row for row in theirs]


def test_towers_of_different_width_export_and_return(tmp_path):
    """enc_to_dec_proj, and the whole way out and back: equal logits, recipe, tokenizer, start and end."""
    torch.manual_seed(0)
    model = build(VLMConfig(vision=ViTConfig(image_size=16, patch_size=8, n_layer=1, n_head=2, n_embd=12, eps=1e-5),
                            text=GPTConfig(block_size=12, vocab_size=300, n_layer=2, n_head=2, n_embd=16))).eval()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    tokenizer = BPETokenizer.train(["a dog runs", "a cat sits"], 280, ("<|endoftext|>",))
    end = tokenizer.token_to_id("<|endoftext|>")
    recipe = Recipe(16, "crop", 20, "bicubic", CLIP_COLOURS[0], CLIP_COLOURS[1])
    export_vit_gpt2(model, tmp_path / "out", recipe, tokenizer, max_tokens=9)
    back = load_vit_gpt2(tmp_path / "out")
    img, idx = torch.randn(2, 3, 16, 16), torch.randint(0, 300, (2, 7))
    torch.testing.assert_close(back(img, idx)[0], model(img, idx)[0], atol=0, rtol=0)
    assert (back.recipe, back.first, back.end, back.max_tokens) == (recipe, end, end, 9)
    assert back.tokenizer.encode("a dog") == tokenizer.encode("a dog")
    assert to_dict(back.config) == to_dict(model.config) | {"vision": back.config.vision.__dict__,
                                                            "text": back.config.text.__dict__}


def test_export_writes_what_transformers_wrote(tmp_path):
    """Loading a folder of transformers and exporting it gives its tensors again: all names, all values."""
    export_vit_gpt2(load_vit_gpt2(REFERENCE / "vit_gpt2"), tmp_path / "a")
    export_gpt2(load_gpt2(REFERENCE / "gpt2"), tmp_path / "b", end=39)
    for name, path in (("vit_gpt2", "a"), ("gpt2", "b")):
        ours, theirs = load_safetensors(tmp_path / path / "model.safetensors"), tensors_of(name)
        assert {n for n in theirs if "pooler" not in n} <= ours.keys()
        assert not [n for n in ours.keys() - theirs.keys() if "lm_head" not in n and "pooler" not in n]
        assert all(torch.equal(ours[n], t) for n, t in theirs.items() if "pooler" not in n)
        mine, said = json.loads((tmp_path / path / "config.json").read_text()), config_of(name)
        for part in ("encoder", "decoder") if name == "vit_gpt2" else (None,):
            a, b = (mine[part], said[part]) if part else (mine, said)
            for key in a.keys() & b.keys() - {"n_inner", "dtype", "architectures"}:
                assert a[key] == b[key] or "drop" in key, (part, key)
    assert json.loads((tmp_path / "a" / "generation_config.json").read_text())["max_length"] == 12


@pytest.mark.parametrize("change", [dict(stem="conv"), dict(class_token=False), dict(wiring="lockstep"),
                                    dict(model="prefix")])
def test_what_a_hugging_face_vit_cannot_express_is_refused(tmp_path, change):
    vision = {k: v for k, v in change.items() if k in ("stem", "class_token")}
    more = {k: v for k, v in change.items() if k not in vision}
    model = build(VLMConfig(vision=ViTConfig(image_size=16, patch_size=8, n_layer=1, n_head=2, n_embd=16, **vision),
                            text=GPTConfig(block_size=12, vocab_size=30, n_layer=1, n_head=2, n_embd=16),
                            image_token=29, **more))
    with pytest.raises(UserError, match="--stem patch --class-token" if vision else "--wiring final"):
        export_vit_gpt2(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- strict or not at all

def damaged(name, damage):
    tensors, config = dict(tensors_of(name)), config_of(name)
    return damage(tensors, config) or (tensors, config)


LOAD = {"gpt2": load_gpt2, "vit": load_vit, "clip_quick": load_clip, "vit_gpt2": load_vit_gpt2}


@pytest.mark.parametrize("name", list(LOAD))
def test_each_missing_tensor_is_named(tmp_path, name):
    """One at a time, all that sizes are read from included; of the layers' other tensors every fourth."""
    whole, config = tensors_of(name), config_of(name)
    for i, gone in enumerate(whole):
        if "pooler" in gone or re.search(r"\.\d\.", gone) and i % 4 and not re.search(r"\.0\..*fc.*weight", gone):
            continue
        path = folder(tmp_path / "x", {n: t for n, t in whole.items() if n != gone}, config)
        with pytest.raises(UserError) as caught:
            LOAD[name](path)
        assert gone in str(caught.value)


@pytest.mark.parametrize("name", list(LOAD))
def test_each_tensor_of_wrong_shape_is_named(tmp_path, name):
    """A row more, and a dimension more."""
    whole, config = tensors_of(name), config_of(name)
    for bad in [n for n in whole if not re.search(r"\.[12]\.|pooler", n) and whole[n].dim()][::3]:
        for wrong in (torch.cat([whole[bad], whole[bad][:1]]), whole[bad][None, None]):
            path = folder(tmp_path / "x", whole | {bad: wrong}, config)
            with pytest.raises(UserError) as caught:
                LOAD[name](path)
            assert bad in str(caught.value) or f"{len(wrong)} rows" in str(caught.value)


@pytest.mark.parametrize("name", list(LOAD))
def test_an_extra_tensor_is_named(tmp_path, name):
    """Weights that nothing reads are a sign of another model, so they are no detail to pass over."""
    with pytest.raises(UserError, match="unused in the file: h.0.extra.weight"):
        LOAD[name](folder(tmp_path / "x", tensors_of(name) | {"h.0.extra.weight": torch.ones(3)}, config_of(name)))


@pytest.mark.parametrize("name, key, value", [
    ("gpt2", "n_embd", 48), ("gpt2", "n_layer", 3), ("gpt2", "n_positions", 21), ("gpt2", "vocab_size", 41),
    ("gpt2", "n_head", 5), ("gpt2", "n_head", "4"), ("gpt2", "activation_function", "relu"), ("gpt2", "n_inner", 64),
    ("gpt2", "scale_attn_weights", False), ("gpt2", "layer_norm_epsilon", "x"), ("vit", "hidden_size", 32),
    ("vit", "image_size", 36), ("vit", "image_size", [32, 40]), ("vit", "patch_size", 16), ("vit", "image_size", 64),
    ("vit", "num_hidden_layers", 12), ("vit", "hidden_act", []),
    ("vit", "num_attention_heads", 0), ("vit", "intermediate_size", 51), ("vit", "id2label", {"0": "dog"}),
    ("clip_quick", "projection_dim", 512)])
def test_a_lying_config_is_one_sentence(tmp_path, name, key, value):
    with pytest.raises(UserError, match="config.json") as caught:
        LOAD[name](folder(tmp_path / "x", tensors_of(name), config_of(name) | {key: value}))
    assert (key in str(caught.value) or key == "id2label") and len(str(caught.value).splitlines()) == 1


def test_sections_of_a_config_are_checked_too(tmp_path):
    config = config_of("clip_quick")
    config["text_config"]["max_position_embeddings"] = 77
    with pytest.raises(UserError, match="max_position_embeddings = 77"):
        load_clip(folder(tmp_path / "x", tensors_of("clip_quick"), config))
    config = config_of("vit_gpt2")
    config["decoder"]["n_layer"] = 4
    with pytest.raises(UserError, match="n_layer = 4"):
        load_vit_gpt2(folder(tmp_path / "x", tensors_of("vit_gpt2"), config))
    config = config_of("vit_gpt2") | {"eos_token_id": [39, 0]}
    with pytest.raises(UserError, match=r"eos_token_id = \[39, 0\] is no token"):         # two ends are one too many
        load_vit_gpt2(folder(tmp_path / "x", tensors_of("vit_gpt2"), config))


def test_the_wrong_family_is_one_error():
    with pytest.raises(UserError, match="wte.weight is missing"):
        load_gpt2(REFERENCE / "vit")
    with pytest.raises(UserError, match="is missing"):
        load_vit(REFERENCE / "gpt2")


@pytest.mark.parametrize("name, family", [("gpt2", "gpt2"), ("vit", "vit"), ("vit_pooler", "vit"),
                                          ("clip_gelu", "clip"), ("vit_gpt2", "cross")])
def test_the_family_is_found_out(name, family):
    """A folder tells itself what it holds; a pooler, or two models in one, must not confuse that."""
    assert load_pretrained(REFERENCE / name).config["model"] == family


def test_an_unknown_family_is_refused(tmp_path):
    with pytest.raises(UserError, match="is none of clip, .*model_type bert, tensors bert.weight"):
        load_pretrained(folder(tmp_path / "x", {"bert.weight": torch.ones(2)}, {"model_type": "bert"}))


# ---- files

def test_a_model_in_several_files(tmp_path):
    tensors = tensors_of("gpt2")
    names = sorted(tensors)
    folder(tmp_path / "x", {n: tensors[n] for n in names[:9]}, config_of("gpt2"), "model-00001-of-00002.safetensors")
    folder(tmp_path / "x", {n: tensors[n] for n in names[9:]}, None, "model-00002-of-00002.safetensors")
    write_json(tmp_path / "x" / "model.safetensors.index.json", {"weight_map": {
        n: f"model-0000{1 + (i >= 9)}-of-00002.safetensors" for i, n in enumerate(names)}})
    want = answers_of("gpt2")
    close(load_gpt2(tmp_path / "x")(want["idx"])[0], want["logits"])


def test_pickles_open_only_when_allowed_and_never_run_code(tmp_path):
    path = tmp_path / "x"
    path.mkdir()
    write_json(path / "config.json", config_of("gpt2"))
    torch.save({"state_dict": tensors_of("gpt2")}, path / "pytorch_model.bin")
    with pytest.raises(UserError, match="no model.safetensors; .*--allow-pickle"):
        load_gpt2(path)
    want = answers_of("gpt2")
    close(load_gpt2(path, allow_pickle=True)(want["idx"])[0], want["logits"])
    torch.save({"wte.weight": Path("/")}, path / "pytorch_model.bin")
    with pytest.raises(UserError, match="without running code"):
        load_gpt2(path, allow_pickle=True)


def test_half_precision_files_become_float32(tmp_path):
    model = load_gpt2(folder(tmp_path / "x", {n: t.half() for n, t in tensors_of("gpt2").items()}, config_of("gpt2")))
    want = answers_of("gpt2")
    assert model.wte.weight.dtype == torch.float32
    torch.testing.assert_close(model(want["idx"])[0], want["logits"], atol=0.02, rtol=0.02)


@pytest.mark.parametrize("told, want", [
    ({"size": 32}, Recipe(32, "squash", None, "bilinear")),
    ({"size": {"height": 32, "width": 32}, "resample": 3}, Recipe(32, "squash", None, "bicubic")),
    ({"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True, "resample": 3,
      "image_mean": CLIP_COLOURS[0], "image_std": CLIP_COLOURS[1]}, Recipe(32, "crop", 36, "bicubic", *CLIP_COLOURS)),
    ({"size": 36, "crop_size": 32, "do_center_crop": True}, Recipe(32, "crop", 36, "bilinear")),
    ({"size": 32, "crop_pct": 0.875, "feature_extractor_type": "ConvNextFeatureExtractor", "resample": 3},
     Recipe(32, "crop", 36, "bicubic")),
    ({"size": {"shortest_edge": 32}, "image_processor_type": "ConvNextImageProcessor"},
     Recipe(32, "crop", 36, "bilinear")),
    ({"size": 224}, Recipe(32, "squash", None, "bilinear")),
    ({"size": 32, "do_normalize": False}, Recipe(32, "squash", None, "bilinear", (0.0,) * 3, (1.0,) * 3))])
def test_recipe_from_the_files(tmp_path, told, want):
    """Old files give one number, new ones name the sides; the model's own image size has the last word."""
    path = folder(tmp_path / "x", tensors_of("vit"), config_of("vit"), preprocessor_config=told)
    assert load_vit(path).recipe == want


@pytest.mark.parametrize("told", [{"size": "big"}, {"size": {"height": 32, "width": 64}}, {"resample": 1},
                                  {"image_mean": 3}])
def test_a_recipe_we_cannot_follow_is_refused(tmp_path, told):
    path = folder(tmp_path / "x", tensors_of("vit"), config_of("vit"), preprocessor_config={"size": 32, **told})
    with pytest.raises(UserError, match="preprocessor_config.json"):
        load_vit(path)


# ---- the Hub

@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A web server as the Hub answers: files[(repo, revision, name)] = bytes; asked: what was requested, in order."""
    files, asked = {}, []

    def page(handler):
        repo, _, rest = handler.path[1:].partition("/resolve/")
        revision, _, name = rest.partition("/")
        asked.append((handler.command, repo, revision, name))
        branch = revision.replace("%2F", "/")
        body, known = files.get((repo, branch, name)), any(key[:2] == (repo, branch) for key in files)
        commit = hashlib.sha1(revision.encode()).hexdigest() if known else None
        if body is None:
            error = "EntryNotFound" if known else "RevisionNotFound"
            return answer(handler, 404, X_Repo_Commit=commit, X_Error_Code=error)
        answer(handler, 200, body, X_Repo_Commit=commit, ETag=f'"{hashlib.sha256(body).hexdigest()}"')

    for name in ("HF_TOKEN", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Host("HTTP/1.0", otherwise=page) as host:
        monkeypatch.setenv("HF_ENDPOINT", host.url)
        yield files, asked


def upload(files, repo, revision, path, names=None):
    for file in Path(path).iterdir():
        if names is None or file.name in names:
            files[repo, revision, file.name] = file.read_bytes()


def test_a_model_from_the_hub_and_then_offline(hub, monkeypatch):
    files, asked = hub
    upload(files, "org/tiny-gpt2", "main", REFERENCE / "gpt2", ("config.json", "model.safetensors"))
    want = answers_of("gpt2")
    close(load_gpt2("org/tiny-gpt2")(want["idx"])[0], want["logits"])
    asked.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    close(load_gpt2("org/tiny-gpt2")(want["idx"])[0], want["logits"])
    assert not asked


def test_safetensors_only_at_a_pinned_revision_are_found_there(hub):
    """nlpconnect's main has only a pickle; its safetensors sit at a commit, or, should that go, in a pull request."""
    files, asked = hub
    repo = "nlpconnect/vit-gpt2-image-captioning"
    upload(files, repo, "main", REFERENCE / "vit_gpt2", ("config.json", "preprocessor_config.json"))
    upload(files, repo, "refs/pr/37", REFERENCE / "vit_gpt2", ("model.safetensors", "generation_config.json"))
    files[repo, "main", "pytorch_model.bin"] = b"never asked for"
    model, want = load_vit_gpt2(repo), answers_of("vit_gpt2")
    close(model(want["img"], want["idx"])[0], want["logits"])
    assert model.max_tokens == 11 and "pytorch_model.bin" not in [name for *_, name in asked]
    with pytest.raises(UserError, match="model.safetensors at revision main.*--allow-pickle"):
        load_vit_gpt2(repo, revision="main")


def test_clip_falls_back_to_timms_copy(hub, tmp_path):
    files, _ = hub
    upload(files, "openai/clip-vit-base-patch32", "main", REFERENCE / "clip_quick", ("config.json",))
    tensors = openai_clip(tensors_of("clip_quick"))
    folder(tmp_path / "t", tensors, config_of("clip_quick"), "open_clip_model.safetensors")
    upload(files, "timm/vit_base_patch32_clip_224.openai", "main", tmp_path / "t")
    clip_agrees(load_clip("openai/clip-vit-base-patch32"), "clip_quick")


def test_shards_are_fetched_one_by_one(hub, tmp_path):
    files, _ = hub
    tensors = tensors_of("gpt2")
    half = {n: t for n, t in tensors.items() if ".h.0." in n}
    folder(tmp_path / "s", half, config_of("gpt2"), "a.safetensors")
    index = {"weight_map": {n: "a.safetensors" if n in half else "b.safetensors" for n in tensors}}
    folder(tmp_path / "s", {n: t for n, t in tensors.items() if n not in half}, None, "b.safetensors",
           **{"model.safetensors.index": index})
    upload(files, "org/shards", "main", tmp_path / "s")
    want = answers_of("gpt2")
    close(load_gpt2("org/shards")(want["idx"])[0], want["logits"])


@pytest.mark.parametrize("source, match", [("org/none", "org/none"), ("no/such/thing", "no hub repository"),
                                           ("./x", "no folder ./x")])
def test_what_is_not_there_is_one_sentence(hub, source, match):
    with pytest.raises(UserError, match=match):
        open_checkpoint(source)


# ---- the command line

def run(monkeypatch, capsys, *argv):
    monkeypatch.setattr(sys, "argv", ["pretrained", *map(str, argv)])
    pretrained.main()
    return capsys.readouterr().out


def test_the_mapping_table(monkeypatch, capsys):
    """Every line of the lesson: what is copied, transposed, joined and left out, and the total by arithmetic."""
    out = run(monkeypatch, capsys, REFERENCE / "vit_gpt2")

    def find(theirs):
        return next(line for line in out.splitlines() if line.endswith(theirs)).split()
    assert find("decoder.transformer.h.1.mlp.c_fc.weight")[0] == "transposed"
    assert find("encoder.encoder.layer.0.attention.attention.value.bias")[0] == "joined"
    assert " ".join(find("crossattention.c_attn.weight")[:3]) == "transposed + joined"
    assert find("encoder.pooler.dense.weight")[0] == "ignored"
    total = sum(p.numel() for p in load_vit_gpt2(REFERENCE / "vit_gpt2").parameters())
    assert f"CrossCaptioner, {total:,} parameters; ignored: 2 tensors of together {24 * 24 + 24} numbers" in out


def test_export_of_a_run(monkeypatch, capsys, tmp_path):
    """What train.py leaves -> a folder in Hugging Face's layout that opens again with the same logits."""
    torch.manual_seed(0)
    tokenizer = BPETokenizer.train(["a dog"], 260, ("<|endoftext|>",))
    sizes = VLMConfig(vision=ViTConfig(image_size=16, patch_size=8, n_layer=1, n_head=2, n_embd=16),
                      text=GPTConfig(block_size=12, vocab_size=tokenizer.vocab_size, n_layer=1, n_head=2, n_embd=16))
    model, end = build(sizes).eval(), tokenizer.token_to_id("<|endoftext|>")
    config = {"task": "caption", "model": "cross", "sizes": to_dict(sizes), "recipe": vars(Recipe(16)),
              "first": end, "end": end, "max_tokens": 10, "options": {}}
    folder(tmp_path / "run", model.state_dict(), config)
    tokenizer.save(tmp_path / "run")
    assert "wrote" in run(monkeypatch, capsys, "export", tmp_path / "run", tmp_path / "hf")
    back = load_pretrained(tmp_path / "hf")
    img, idx = torch.randn(1, 3, 16, 16), torch.tensor([[end, 3, 4]])
    torch.testing.assert_close(back.model(img, idx)[0], model(img, idx)[0])
    assert back.config["max_tokens"] == 10 and back.recipe.mode == "crop"
    assert back.tokenizer.decode([end]) == "<|endoftext|>"
    with pytest.raises(UserError, match="export RUN FOLDER"):
        run(monkeypatch, capsys, "export", tmp_path / "run")


def test_export_of_a_gpt(tmp_path):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=30, n_layer=1, n_head=2, n_embd=16, n_hidden=20)).eval()
    export_gpt2(model, tmp_path / "gpt", end=29)
    idx = torch.randint(0, 30, (1, 8))
    torch.testing.assert_close(load_gpt2(tmp_path / "gpt")(idx)[0], model(idx)[0])
    assert json.loads((tmp_path / "gpt" / "config.json").read_text())["n_inner"] == 20
