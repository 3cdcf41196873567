"""Public checkpoints: transformers' own answers on tiny random ones (tests/reference), in every naming, and strictness.

The reference folders were made by make_reference_checkpoints.py. The other namings (timm, OpenAI, torchvision) are the
same tensors renamed here, by hand and not by the tables under test; their answers must not change.
"""
import json
import re
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import public
from conftest import REFERENCE
from tinyvlm import export, pretrained
from tinyvlm.clip import CLIP, CLIPConfig
from tinyvlm.cnn import ResNetConfig
from tinyvlm.config import UserError
from tinyvlm.export import export_vit_gpt2
from tinyvlm.files import write_json
from tinyvlm.generate import generate
from tinyvlm.gpt import GPTConfig
from tinyvlm.image import RECIPES, Recipe
from tinyvlm.pretrained import (load_clip, load_gpt2, load_pretrained, load_resnet50, load_run, load_vgg16, load_vit,
                                load_vit_gpt2)
from tinyvlm.tokenizer import BPETokenizer
from tinyvlm.vit import ViTConfig
from tinyvlm.vlm import VLMConfig, build
from tinyvlm.weights import load_safetensors, save_safetensors


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


def refused(source, *parts, load=load_pretrained):
    """One sentence of at most 300 characters (beside the path) that has all these parts."""
    with pytest.raises(UserError) as caught:
        load(source)
    text = str(caught.value)
    assert all(part in text for part in parts) and "\n" not in text and len(text) <= 300 + len(str(source)), text


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
    tensors = tensors_of("gpt2") | {"lm_head.weight": torch.ones(40, 32)}
    refused(folder(tmp_path / "other", tensors, config_of("gpt2")), "lm_head.weight has no use")


def test_padded_tables_load_and_a_tokenizer_larger_than_its_model_does_not(tmp_path):
    """267 rows for 260 tokens ended in an AssertionError; new tokens take padded rows first."""
    padded = shutil.copytree(REFERENCE / "gpt2", tmp_path / "gpt2")
    tokens = [*(chr(33 + i) for i in range(35)), "<|endoftext|>"]           # 36 tokens for 40 rows
    spec = {"version": "1.0", "added_tokens": [], "normalizer": None, "post_processor": None, "decoder": None,
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
            "model": {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}, "merges": []}}
    write_json(padded / "tokenizer.json", spec)
    want, model = answers_of("gpt2"), load_gpt2(padded)
    close(model(want["idx"])[0], want["logits"])
    added = [f"<{i}>" for i in range(6)]
    model = load_gpt2(padded, special_tokens=["<image>", *added])
    assert model.tokenizer.token_to_id("<image>") == 36 and model.config.vocab_size == 43
    close(model(want["idx"])[0][..., :40], want["logits"])
    spec["added_tokens"] = [{"id": 36 + i, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
                             "normalized": False, "special": True} for i, token in enumerate(added)]
    write_json(padded / "tokenizer.json", spec)
    refused(padded, "tokenizer has 42 tokens, the model 40 rows")


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


def test_vit_from_timm(tmp_path):
    """eps 1e-6 instead of Hugging Face's 1e-12 is all that differs; a width of 24 must tell its heads."""
    timm = {"architecture": "deit_tiny_patch8_32", "num_classes": 5, "num_attention_heads": 3, "global_pool": "token",
            "pretrained_cfg": {"input_size": [3, 32, 32], "crop_pct": 0.9, "interpolation": "bicubic", **public.DEIT}}
    path, tensors, want = tmp_path / "timm", timm_vit(tensors_of("vit")), answers_of("vit")
    model = load_vit(folder(path, tensors, {**timm, "layer_norm_eps": 1e-12}))
    close(model.classify(want["img"]), want["logits"])
    assert model.recipe == Recipe(32, "crop", 35, **public.DEIT)
    assert load_vit(folder(path, tensors, timm)).config.eps == 1e-6
    refused(folder(path, tensors, timm | {"num_attention_heads": None}), "n_head None")
    for word, value in (("global_pool", "avg"), ("model_args", {"init_values": 1e-5}),
                        ("pretrained_cfg", None)):
        refused(folder(path, tensors, timm | {word: value}), word)              # 64 channels a head would load


# ---- CLIP

def clip_agrees(model, name):
    want = answers_of(name)
    close(model.encode_image(want["img"]), want["image_emb"])
    close(model.encode_text(want["idx"]), want["text_emb"])
    close(model.logit_scale.exp() * want["image_emb"] @ want["text_emb"].t(), want["logits"])


@pytest.mark.parametrize("name, act", [("clip_quick", "quick_gelu"), ("clip_gelu", "gelu")])
def test_clip_from_hugging_face(tmp_path, name, act):
    """OpenAI's and LAION's activation, the old files' position numbers, sections called .._dict in old configs."""
    ids = {f"{side}_model.embeddings.position_ids": torch.arange(n)[None] for side, n in (("text", 10), ("vision", 17))}
    model = load_clip(folder(tmp_path / "clip", tensors_of(name) | ids, config_of(name)))
    clip_agrees(model, name)
    assert model.config.vision.activation == model.config.text.activation == act
    assert model.recipe == Recipe(32, mean=RECIPES["clip"].mean, std=RECIPES["clip"].std)
    config = config_of(name)
    sides = {f"{side}_config_dict": config.pop(f"{side}_config") for side in ("text", "vision")}
    wrong = {"text_config": {"hidden_act": "relu"}, "vision_config": {"hidden_act": "relu"}}
    clip_agrees(load_clip(folder(tmp_path / "old", tensors_of(name), config | sides | wrong)), name)


@pytest.mark.parametrize("name", ["clip_quick", "clip_gelu"])
def test_clip_in_openai_naming(tmp_path, name):
    """With Hugging Face's config.json, and with open_clip's, where model.safetensors is the image tower alone."""
    tensors = openai_clip(tensors_of(name))
    clip_agrees(load_clip(folder(tmp_path / "hf", tensors, config_of(name))), name)
    told = {"model_cfg": {"embed_dim": 16, "quick_gelu": name == "clip_quick",
                          "vision_cfg": {"image_size": 32, "layers": 3, "width": 24, "heads": 3, "patch_size": 8},
                          "text_cfg": {"context_length": 10, "vocab_size": 40, "width": 32, "heads": 4, "layers": 2}},
            "preprocess_cfg": {"mean": list(RECIPES["clip"].mean), "std": list(RECIPES["clip"].std)}}
    folder(tmp_path / "oc", {"trunk": torch.ones(1)}, {"architecture": "vit_base_patch32_clip_224"})
    path = folder(tmp_path / "oc", tensors, None, "open_clip_model.safetensors", open_clip_config=told)
    clip_agrees(load_clip(path), name)
    assert load_clip(path).recipe == Recipe(32, mean=RECIPES["clip"].mean, std=RECIPES["clip"].std)
    told["model_cfg"]["vision_cfg"]["pool_type"] = "avg"
    refused(folder(path, tensors, None, "open_clip_model.safetensors", open_clip_config=told), "pool_type = 'avg'")


def test_clip_reads_a_text_where_its_tokenizer_put_the_end(tmp_path):
    """Old configs say eos_token_id 2, "the largest id": with tokens added to the table that is the wrong place."""
    path = public.tiny_clip(tmp_path / "clip")
    model, end = load_clip(path), json.loads((path / "vocab.json").read_text())["<|endoftext|>"]
    assert model.config.end_token == end
    added = load_safetensors(path / "model.safetensors")
    name = "text_model.embeddings.token_embedding.weight"
    added[name] = torch.cat([added[name], torch.randn(3, 32)])
    save_safetensors(added, path / "model.safetensors")
    ids = model.tokenizer.encode("a dog")
    close(load_clip(path).encode_text(torch.tensor([ids + [end + 2]])), model.encode_text(torch.tensor([ids])))
    for name in ("clip_quick", "clip_gelu"):            # eos 2, and eos 39: without a tokenizer, config.json tells
        assert load_clip(REFERENCE / name).config.end_token == 39


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
    """Random statistics and an odd image height: stride on the 3x3, shortcuts, pooling and head all show."""
    tensors, want = resnet_reference()
    config = {"model_type": "resnet", "layer_type": "bottleneck", "embedding_size": 2, "depths": [1, 2, 2]}
    if naming == "torchvision":
        tensors = torchvision_resnet(tensors)
        told = {"crop_pct": 0.95, "interpolation": "bicubic", "input_size": [3, 224, 224], **public.DEIT}
        config = {"architecture": "resnet50", "num_classes": 5, "pretrained_cfg": told, "global_pool": "avg"}
    elif naming == "bare":                                      # the body alone
        tensors = {name.removeprefix("resnet."): t for name, t in tensors.items() if "classifier" not in name}
    model = load_resnet50(folder(tmp_path / "resnet", tensors, config))
    close(model(want["img"]), want["feats"])
    close(model.grid(want["img"]), want["grid"])
    if naming != "bare":
        close(model.classify(want["img"]), want["logits"])
    close(model(want["img"][:1]), want["feats"][:1])            # in eval mode an image does not depend on its neighbours
    assert model.recipe == (Recipe(resize=235, **public.DEIT) if naming == "torchvision" else RECIPES["resnet50"])
    assert not torch.allclose(model.train()(want["img"]), want["feats"], atol=1e-3)


@pytest.mark.parametrize("naming", ["timm", "torchvision"])
def test_vgg_with_its_linear_layers_stored_either_way(tmp_path, naming):
    """The oracle is written out here with torch's own functions. A pool stands before each stage but the first."""
    torch.manual_seed(0)
    w, n_in, x = {}, 3, torch.randn(2, 3, 224, 224)
    img = x
    for n in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28):
        x = F.max_pool2d(x, 2) if n in (5, 10, 17, 24) else x
        w[f"features.{n}.weight"], w[f"features.{n}.bias"] = 0.3 * torch.randn(4, n_in, 3, 3), torch.randn(4)
        x, n_in = F.relu(F.conv2d(x, w[f"features.{n}.weight"], w[f"features.{n}.bias"], padding=1)), 4
    x = F.max_pool2d(x, 2)                                      # (2, 4, 7, 7)
    for name, shape in (("pre_logits.fc1", (10, 4, 7, 7)), ("pre_logits.fc2", (10, 10, 1, 1)), ("head.fc", (5, 10))):
        w[f"{name}.weight"], w[f"{name}.bias"] = 0.1 * torch.randn(shape), torch.randn(shape[0])
    for name in ("pre_logits.fc1", "pre_logits.fc2"):
        x = F.relu(F.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"]))
    logits = F.linear(x.flatten(1), w["head.fc.weight"], w["head.fc.bias"])
    if naming == "torchvision":
        w = {name: t.flatten(1) if name.startswith("pre_logits") and t.dim() > 1 else t for name, t in w.items()}
        w = renamed(w, (r"pre_logits\.fc1", "classifier.0"), (r"pre_logits\.fc2", "classifier.3"),
                    (r"head\.fc", "classifier.6"))
    model = load_vgg16(folder(tmp_path / "vgg", w))
    close(model(img) / 100, x.flatten(1) / 100)
    assert x.min() == 0 < x.max()                               # features stop after fc2's ReLU, which did act
    close(model.classify(img) / 100, logits / 100)
    assert model.recipe == RECIPES["torchvision"]


# ---- ViT + GPT-2, and the way back

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
        "caption", "cross", 39, 39, 11) and config["sizes"] == asdict(loaded.model.config)
    assert loaded.recipe == Recipe(32, "squash", None, "bilinear")
    for beams in (1, 4):
        rows = generate(loaded.model, want["img"], [[39]] * 2, 11, num_beams=beams, eos_id=39)
        theirs = want[f"beams{beams}"].tolist()
        assert rows == [row[:row.index(39)] if 39 in row else row for row in theirs]


@pytest.mark.parametrize("place", ["generation_config", "config"])
@pytest.mark.parametrize("told, want", [
    ({"max_new_tokens": 7}, 7), ({"max_length": 9}, 8), ({"max_length": None}, 20), ({"max_length": 99}, 20),
    ({"eos_token_id": [39]}, 11), ({"no_repeat_ngram_size": 0, "repetition_penalty": 1.0, "num_beams": 4}, 11),
    ({"eos_token_id": [39, 5]}, "eos_token_id = [39, 5]"), ({"decoder_start_token_id": "x"}, "start_token_id = 'x'"),
    ({"max_length": "9"}, "max_length = '9'"),
    *[({word: value}, f"{word} = {value}") for word, value in (
        ("no_repeat_ngram_size", 1), ("suppress_tokens", [1]), ("begin_suppress_tokens", [2]), ("bad_words_ids", [[5]]),
        ("forced_bos_token_id", 3), ("forced_eos_token_id", 39), ("repetition_penalty", 1.2), ("min_length", 5),
        ("encoder_repetition_penalty", 1.1), ("min_new_tokens", 3), ("sequence_bias", [[[1], 2.0]]),
        ("diversity_penalty", 0.5), ("num_beam_groups", 2), ("stop_strings", ["."]), ("guidance_scale", 2.0))]])
def test_what_a_captioner_may_say_is_read_or_refused_by_name(tmp_path, place, told, want):
    """A no_repeat_ngram_size was once passed over, and the captions were others than their owner's. The longest
    captions were checked against transformers 5.24; config.json tells only where there is no generation_config.json."""
    path, base = tmp_path / "x", {"decoder_start_token_id": 39, "eos_token_id": 39, "max_length": 12}
    files = {"generation_config": base | told} if place == "generation_config" else {}
    config = config_of("vit_gpt2") | ({"no_repeat_ngram_size": 2, "max_length": 5} if files else base | told)
    preprocessor = json.loads((REFERENCE / "vit_gpt2" / "preprocessor_config.json").read_text())
    folder(path, tensors_of("vit_gpt2"), config, preprocessor_config=preprocessor, **files)
    if isinstance(want, str):
        refused(path, want, "name another model")
    else:
        assert load_pretrained(path).config["max_tokens"] == want


def test_an_output_matrix_that_is_nowhere_is_missing(tmp_path):
    """Untied in config.json, and no lm_head in the file: transformers makes a random one. Equal tensors are equal."""
    bare, config = tensors_of("gpt2"), config_of("gpt2") | {"tie_word_embeddings": False}
    refused(folder(tmp_path / "x", bare, config), "tie_word_embeddings = False")
    head = {"lm_head.weight": next(t for n, t in bare.items() if n.endswith("wte.weight")).clone()}
    close(load_gpt2(folder(tmp_path / "x", bare | head, config))(answers_of("gpt2")["idx"])[0],
          answers_of("gpt2")["logits"])


@pytest.mark.parametrize("recipe", [Recipe(16, "crop", 20), Recipe(16, "squash", 20), Recipe(16, "squash")])
def test_towers_of_different_width_export_and_return(tmp_path, monkeypatch, recipe):
    """enc_to_dec_proj, and the whole way out and back: equal logits, recipe, tokenizer, start and end."""
    sizes = VLMConfig(vision=ViTConfig(image_size=16, patch_size=8, n_layer=1, n_head=2, n_embd=12, eps=1e-5),
                      text=GPTConfig(block_size=12, vocab_size=300, n_layer=2, n_head=2, n_embd=16))
    model, tokenizer = public.made(build, sizes), BPETokenizer.train(["a dog runs", "a cat"], 280, ("<|endoftext|>",))
    end = tokenizer.token_to_id("<|endoftext|>")
    export_vit_gpt2(model, tmp_path / "out", recipe, tokenizer, end, end, 9)
    back = load_pretrained(tmp_path / "out")
    img, idx = torch.randn(2, 3, 16, 16), torch.randint(0, 300, (2, 7))
    torch.testing.assert_close(back.model(img, idx)[0], model(img, idx)[0], atol=0, rtol=0)
    assert back.recipe == recipe and [back.config[key] for key in ("first", "end", "max_tokens")] == [end, end, 9]
    assert back.tokenizer.encode("a dog") == tokenizer.encode("a dog")
    if recipe.mode == "crop":                                   # .. and from the command line
        monkeypatch.setattr(sys, "argv", ["export", str(a_captioner(tmp_path / "run")), str(tmp_path / "hf")])
        export.main()
        run, back = load_run(tmp_path / "run"), load_pretrained(tmp_path / "hf")
        close(back.model(img, idx % 262)[0], run.model(img, idx % 262)[0])
        assert back.config["max_tokens"] == 10 and back.recipe == run.recipe


def test_export_writes_what_transformers_wrote(tmp_path):
    """Loading a folder of transformers and exporting it gives its tensors and its config again, name by name."""
    export_vit_gpt2(load_vit_gpt2(REFERENCE / "vit_gpt2"), tmp_path / "x", first=39, end=39)
    ours, theirs = load_safetensors(tmp_path / "x" / "model.safetensors"), tensors_of("vit_gpt2")
    assert ours.keys() ^ theirs.keys() <= {"decoder.lm_head.weight"}
    assert all(torch.equal(ours[n], t) for n, t in theirs.items() if "pooler" not in n)
    mine, told = json.loads((tmp_path / "x" / "config.json").read_text()), config_of("vit_gpt2")
    for part in ("encoder", "decoder"):
        for key in mine[part].keys() & told[part].keys() - {"n_inner", "architectures"}:
            assert mine[part][key] == told[part][key], (part, key)


@pytest.mark.parametrize("change", [dict(stem="conv"), dict(class_token=False), dict(wiring="lockstep")])
def test_what_a_hugging_face_vit_cannot_express_is_refused(tmp_path, change):
    vision = {k: v for k, v in change.items() if k != "wiring"}
    model = build(VLMConfig(vision=ViTConfig(image_size=16, patch_size=8, n_layer=1, n_head=2, n_embd=16, **vision),
                            text=GPTConfig(block_size=12, vocab_size=30, n_layer=1, n_head=2, n_embd=16),
                            wiring=change.get("wiring", "final")))
    with pytest.raises(UserError, match="--stem patch --class-token" if vision else "--wiring final"):
        export_vit_gpt2(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- strict or not at all

@pytest.mark.parametrize("name", ["gpt2", "vit", "clip_quick", "vit_gpt2"])
def test_each_missing_extra_or_misshapen_tensor_is_named(tmp_path, name):
    """One at a time, all that sizes are read from included; of the layers' other tensors some."""
    whole, config = tensors_of(name), config_of(name)
    refused(folder(tmp_path / "x", whole | {"h.0.extra.weight": torch.ones(3)}, config), "h.0.extra.weight has no use")
    names = [n for n in whole if "pooler" not in n]
    for i, bad in enumerate(names):
        if re.search(r"\.\d\.", bad) and i % 9:
            continue
        refused(folder(tmp_path / "x", {n: t for n, t in whole.items() if n != bad}, config), bad)
        if whole[bad].dim() and i % 2:
            longer = torch.cat([whole[bad], whole[bad][:1]])
            refused(folder(tmp_path / "x", whole | {bad: longer if i % 4 == 1 else whole[bad][None, None]}, config))


@pytest.mark.parametrize("name, key, value", [
    ("gpt2", "n_embd", 48), ("gpt2", "n_layer", 3), ("gpt2", "n_positions", 21), ("gpt2", "vocab_size", 41),
    ("gpt2", "n_head", 5), ("gpt2", "n_head", "4"), ("gpt2", "activation_function", "relu"), ("gpt2", "n_inner", 64),
    ("gpt2", "scale_attn_weights", False), ("gpt2", "scale_attn_by_inverse_layer_idx", True),
    ("gpt2", "layer_norm_epsilon", "x"), ("gpt2", "model_type", "imagegpt"), ("vit", "model_type", "vit_mae"),
    ("vit", "quantization_config", {"bits": 4}), ("vit", "image_size", [32, 40]), ("vit", "patch_size", 16),
    ("vit", "num_hidden_layers", 12), ("vit", "hidden_act", []), ("vit", "qkv_bias", False),
    ("vit", "num_attention_heads", 0), ("vit", "intermediate_size", 51), ("clip_quick", "projection_dim", 512),
    ("clip_quick", "text_config.max_position_embeddings", 77), ("clip_quick", "text_config.eos_token_id", [1, 2]),
    ("vit_gpt2", "decoder.n_layer", 4), ("vit_gpt2", "encoder.hidden_act", "silu"), ("vit_gpt2", "eos_token_id", 40)])
def test_a_setting_that_lies_or_is_not_computed_here_is_refused_by_name(tmp_path, name, key, value):
    config, (*part, key) = config_of(name), key.split(".")
    (config[part[0]] if part else config)[key] = value
    ours = {"num_attention_heads": "n_head", "activation_function": "activation", "hidden_act": "activation",
            "layer_norm_epsilon": "eps", "eos_token_id": "end"}
    refused(folder(tmp_path / "x", tensors_of(name), config), ours.get(key, key))


@pytest.mark.parametrize("told, fault", [
    ({"architecture": "resnetblur50"}, "= 'resnetblur50'"), ({"global_pool": "max"}, "global_pool = 'max'"),
    ({"model_args": {"output_stride": 16}}, "output_stride"),
    ({"model_type": "resnet", "downsample_in_bottleneck": True}, "downsample_in_bottleneck = True")])
def test_resnets_that_differ_without_a_weight_are_refused(tmp_path, told, fault):
    """The stride on the 1x1 convolution, say, changes every number and no shape."""
    refused(folder(tmp_path / "other", torchvision_resnet(resnet_reference()[0]), told), fault)


def test_the_family_is_found_out_and_another_is_refused_with_advice(tmp_path):
    """GPT-2 given as --vision once ended in "wte.weight is missing"."""
    for name, family in (("gpt2", "gpt2"), ("vit_pooler", "vit"), ("clip_gelu", "clip"), ("vit_gpt2", "cross")):
        assert load_pretrained(REFERENCE / name).config["model"] == family
    refused(REFERENCE / "gpt2", "is a GPT-2 (--text)", "not a ViT (--vision)", load=load_vit)
    refused(REFERENCE / "vit", "is a ViT (--vision)", "not a GPT-2 (--text)", load=load_gpt2)
    refused(folder(tmp_path / "x", {"bert.weight": torch.ones(2)}, {"model_type": "bert"}), "is none of clip", "bert")


# ---- files

def test_a_model_in_half_precision(tmp_path):
    tensors, want = tensors_of("gpt2"), answers_of("gpt2")
    model = load_gpt2(folder(tmp_path / "h", {n: t.half() for n, t in tensors.items()}, config_of("gpt2")))
    assert model.wte.weight.dtype == torch.float32
    torch.testing.assert_close(model(want["idx"])[0], want["logits"], atol=0.02, rtol=0.02)


def test_safetensors_only_at_a_pinned_revision_are_found_there(monkeypatch):
    """nlpconnect's and OpenAI's main have only a pickle; their safetensors sit at a commit."""
    at = {("nlpconnect/vit-gpt2-image-captioning", "93857e539f312a97c13f16976c2a43505fd76d87"): "vit_gpt2",
          ("openai/clip-vit-base-patch32", "d15b5f29721ca72dac15f8526b284be910de18be"): "clip_quick",
          ("org/x", "refs/pr/1"): "gpt2"}

    def hf_file(repo, name, revision="main", missing_ok=False):
        path = REFERENCE / at.get((repo, revision), "nowhere") / name
        return path if path.exists() else None
    monkeypatch.setattr(pretrained, "hf_file", hf_file)
    want = answers_of("vit_gpt2")
    close(load_vit_gpt2("nlpconnect/vit-gpt2-image-captioning")(want["img"], want["idx"])[0], want["logits"])
    clip_agrees(load_clip("openai/clip-vit-base-patch32"), "clip_quick")
    refused("org/x", "no model.safetensors, and a pytorch_model.bin", "as org/name@refs/pr/1")
    assert load_pretrained("org/x@refs/pr/1").config["task"] == "text"
    refused("./x", "./x is no folder; name one")


# ---- our own runs

def a_run(path, model, task, **more):
    torch.manual_seed(0)
    tokenizer = BPETokenizer.train(["a dog"], 260, ("<|endoftext|>", "<image>"))
    tokenizer.save(folder(path, model.state_dict(), {
        "task": task, "model": getattr(model.config, "model", None), "sizes": asdict(model.config), "clean": "none",
        "recipe": asdict(Recipe(16)), "options": {}, "features": None, **more}) / "tokenizer.json")
    return path


def a_captioner(path):
    sizes = VLMConfig(vision=ViTConfig(image_size=16, patch_size=8, n_layer=1, n_head=2, n_embd=16),
                      text=GPTConfig(block_size=12, vocab_size=262, n_layer=1, n_head=2, n_embd=16))
    return a_run(path, public.made(build, sizes), "caption", first=256, end=256, max_tokens=10)


def test_runs_come_back_with_either_kind_of_tower(tmp_path):
    """A clip run on a ResNet could be saved, and never be loaded again."""
    text = GPTConfig(block_size=8, vocab_size=262, n_layer=1, n_head=2, n_embd=16)
    for k, vision in enumerate((ResNetConfig(2, (1, 1), 0), ViTConfig(16, 8, 1, 2, 16), None)):
        model = public.made(CLIP, CLIPConfig(vision=vision, text=text, n_joint=8, head="mlp", feat_dim=6))
        back = load_run(a_run(tmp_path / str(k), model, "clip")).model
        img = torch.randn(2, 3, 16, 16) if vision else torch.randn(2, 6)
        close(back.encode_image(img), model.encode_image(img))
    assert back.config == model.config and not pretrained.is_run(REFERENCE / "vit")


@pytest.mark.parametrize("where, value, fault", [
    ("sizes.text.n_head", 0, "n_head"), ("sizes.text.n_head", 3, "n_head"), ("sizes.vision.n_layer", "2", "n_layer"),
    ("sizes.vision.patch_size", 0, "patch_size"), ("sizes.text.n_embd", None, "n_embd"), ("sizes", 3, "sizes is 3"),
    ("sizes", None, "sizes is None"), ("recipe", [], "recipe is []"),
    ("sizes.text.extra", 1, "extra"), ("sizes.vision.activation", "x", "activation"), ("sizes.text.eps", "x", "eps"),
    ("recipe.mode", "x", "mode"), ("recipe.std", [1, 1, 0], "std"), ("task", "x", "'x'"), ("end", 999, "end is 999"),
    ("clean", "x", "clean is 'x'"), ("max_tokens", "8", "max_tokens is '8'"), ("model", "prefix", "model is 'prefix'"),
    ("options", None, "NoneType"),
    *((key, ..., f"'{key}' is missing") for key in ("task", "sizes", "recipe", "clean"))])
def test_an_edited_config_of_a_run_is_one_sentence_naming_file_and_field(tmp_path, where, value, fault):
    path = a_captioner(tmp_path / "run")
    config = json.loads((path / "config.json").read_text())
    *parents, key = where.split(".")
    part = config
    for parent in parents:
        part = part[parent]
    part[key] = value
    if value is ...:
        del part[key]
    write_json(path / "config.json", config)
    refused(path, "config.json", fault, load=load_run)


def test_a_run_whose_weights_are_anothers_says_the_cause(tmp_path):
    path = a_captioner(tmp_path / "run")
    config = json.loads((path / "config.json").read_text())
    (path / "tokenizer.json").rename(tmp_path / "t.json")           # "config.json describes no run" was said
    with pytest.raises(UserError, match="^[^:]*run holds no tokenizer.json"):
        load_run(path)
    (tmp_path / "t.json").rename(path / "tokenizer.json")
    config["sizes"]["text"]["vocab_size"] = 10 ** 7                 # gigabytes: checked before memory is taken
    write_json(path / "config.json", config)
    refused(path, "does not fit CrossCaptioner", "(262, 16) where ours is (10000000, 16)", load=load_run)
    (path / "config.json").write_text("[1]")
    refused(path, "is not a JSON object", load=load_run)
