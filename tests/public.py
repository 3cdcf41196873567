"""Tiny checkpoints with random weights and tiny data sets, in public layouts, for tests that run the scripts.

Each function fills a folder as the publisher would and returns it: config.json, model.safetensors, and, where there are
any, the tokenizer's and the image processor's files. No peer library is needed. These are no oracles: the numbers come
from our own models (see tests/reference for transformers' answers).
"""
import json
from pathlib import Path

import torch

from tinyvlm.clip import CLIP, CLIPConfig
from tinyvlm.cnn import VGG16, ResNet50, ResNetConfig, VGGConfig
from tinyvlm.export import export_vit_gpt2
from tinyvlm.gpt import GPT, GPTConfig
from tinyvlm.image import Recipe
from tinyvlm.names import NAMINGS, outward
from tinyvlm.vit import ViT, ViTConfig
from tinyvlm.vlm import VLMConfig, build
from tinyvlm.weights import save_safetensors

PLAIN = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES = [chr(byte) for byte in PLAIN] + [chr(256 + n) for n in range(256 - len(PLAIN))]      # GPT-2's byte alphabet
END = "<|endoftext|>"
VIT = dict(image_size=32, patch_size=8, n_layer=2, n_head=3, n_embd=24)
DEIT = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


def write(folder, name, content):
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def made(model_class, config, seed=0):
    """A model with larger random numbers than ours start with, so that inputs show in its outputs."""
    torch.manual_seed(seed)
    model = model_class(config).eval()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model


def publish(folder, model, naming, config, preprocessor=None, **shapes):
    """shapes: the published shape of a tensor whose name ends so, where it is not ours."""
    tensors = outward(naming, model.state_dict())
    for name in tensors:
        shape = next((shape for end, shape in shapes.items() if name.endswith(end)), tensors[name].shape)
        tensors[name] = tensors[name].reshape(shape)
    save_safetensors(tensors, Path(folder) / "model.safetensors", {"format": "pt"})
    write(folder, "config.json", config)
    if preprocessor:
        write(folder, "preprocessor_config.json", preprocessor)
    return folder


def _bpe(folder, tokens, merges, specials):
    tokens = [*tokens, *map("".join, merges), *specials]
    write(folder, "vocab.json", {token: i for i, token in enumerate(tokens)})
    write(folder, "merges.txt", "\n".join(["#version: 0.2", *map(" ".join, merges), ""]))
    return len(tokens)


def gpt2_tokenizer(folder, merges=(("Ġ", "a"), ("t", "h"), ("Ġ", "d"), ("o", "g"), ("Ġd", "og"))):
    """vocab.json and merges.txt of GPT-2's kind, <|endoftext|> last. Returns the number of tokens."""
    return _bpe(folder, sorted(BYTES), merges, [END])


def clip_tokenizer(folder, merges=(("a", "t</w>"), ("c", "at</w>"), ("o", "g</w>"), ("d", "og</w>"))):
    """The same of CLIP's kind: the last symbol of a word carries </w>, and start and end are the last two ids."""
    return _bpe(folder, [*BYTES, *(char + "</w>" for char in BYTES)], merges, ["<|startoftext|>", END])


def bert_tokenizer(folder, words=("a", "the", "dog", "cat", "runs", "red", "blue", "circle", "square")):
    """vocab.txt of BERT's uncased kind: the five special tokens first, letters and pieces after them."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,!?'-"
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + c for c in letters if c.isalnum())]
    write(folder, "vocab.txt", "\n".join(dict.fromkeys([*tokens, *words])) + "\n")
    return folder


def tiny_gpt2(folder, block_size=64, n_layer=2):
    """As distilbert/distilgpt2: a prefix before every name."""
    V = gpt2_tokenizer(folder)
    config = GPTConfig(block_size=block_size, vocab_size=V, n_layer=n_layer, n_head=2, n_embd=24)
    return publish(folder, made(GPT, config), NAMINGS["gpt2"][0], {"model_type": "gpt2", "n_head": 2, "n_embd": 24})


def tiny_vit(folder, layout="hf", n_class=5, **sizes):
    """layout "hf" as google/vit-base-patch16-224, "timm" as timm/deit_tiny_patch16_224."""
    model = made(ViT, ViTConfig(**{**VIT, **sizes}, n_class=n_class))
    c = model.config
    if layout == "timm":
        told = {"input_size": [3, c.image_size, c.image_size], "crop_pct": 0.9, "interpolation": "bicubic", **DEIT}
        return publish(folder, model, NAMINGS["vit"][-1], {
            "architecture": f"deit_tiny_patch{c.patch_size}_{c.image_size}", "num_classes": n_class,
            "num_attention_heads": c.n_head, "pretrained_cfg": told})
    return publish(folder, model, NAMINGS["vit"][0], {
        "model_type": "vit", "hidden_size": c.n_embd, "num_hidden_layers": c.n_layer, "num_attention_heads": c.n_head,
        "intermediate_size": 4 * c.n_embd, "image_size": c.image_size, "patch_size": c.patch_size, "hidden_act": "gelu",
        "layer_norm_eps": 1e-6}, {"size": c.image_size, "image_processor_type": "ViTImageProcessor"})


def tiny_clip(folder, n_joint=16, block_size=32):
    """As openai/clip-vit-base-patch32: old config (eos_token_id 2), vocab.json and merges.txt."""
    V, act = clip_tokenizer(folder), "quick_gelu"
    text = GPTConfig(block_size=block_size, vocab_size=V, n_layer=2, n_head=4, n_embd=32, activation=act)
    vision = ViTConfig(**VIT, activation=act, eps=1e-5, pre_norm=True, patch_bias=False)
    return publish(folder, made(CLIP, CLIPConfig(vision=vision, text=text, n_joint=n_joint)), NAMINGS["clip"][0], {
        "model_type": "clip", "projection_dim": n_joint, "vision_config": {"num_attention_heads": 3, "hidden_act": act},
        "text_config": {"num_attention_heads": 4, "hidden_act": act, "eos_token_id": 2}}, {
        "feature_extractor_type": "CLIPFeatureExtractor", "size": 32, "crop_size": 32, "do_center_crop": True},
        **{"class_embedding": 24, "vision_model.embeddings.position_embedding.weight": (17, 24)})


def tiny_resnet50(folder, width=4, size=32):
    """As microsoft/resnet-50, 3, 4, 6 and 3 blocks: features of 32 * width channels."""
    return publish(folder, made(ResNet50, ResNetConfig(width=width, n_class=5)), NAMINGS["resnet50"][0], {
        "model_type": "resnet", "depths": [3, 4, 6, 3], "embedding_size": width, "layer_type": "bottleneck"}, {
        "feature_extractor_type": "ConvNextFeatureExtractor", "size": size, "crop_pct": 0.875, "resample": 3,
        "image_mean": DEIT["mean"], "image_std": DEIT["std"]})


def tiny_vgg16(folder, n_hidden=16, size=32):
    """As timm/vgg16.tv_in1k: the first two linear layers stored as convolutions."""
    model = made(VGG16, VGGConfig(widths=(4, 4, 8, 8, 8), n_hidden=n_hidden, n_class=5))
    told = {"input_size": [3, size, size], "crop_pct": 0.875, "interpolation": "bilinear", **DEIT}
    return publish(folder, model, NAMINGS["vgg16"][0], {
        "architecture": "vgg16", "num_classes": 5, "pretrained_cfg": told}, **{
        "fc1.weight": (n_hidden, 8, 7, 7), "fc2.weight": (n_hidden, n_hidden, 1, 1)})


def tiny_vit_gpt2(folder):
    """As nlpconnect/vit-gpt2-image-captioning."""
    V = gpt2_tokenizer(folder)
    text = GPTConfig(block_size=32, vocab_size=V, n_layer=2, n_head=2, n_embd=24, cross=True)
    model = made(build, VLMConfig(vision=ViTConfig(**VIT), text=text))
    export_vit_gpt2(model, folder, Recipe(32, "squash", None, "bilinear"), None, V - 1, V - 1, 15)
    return folder


# ---- data sets in their public layouts; png(k): the bytes of picture k. Each returns the flags that name the data.

def flickr30k(folder, png, n=20):
    """results.csv with bars, as Kaggle has it."""
    rows = [f'{k}.jpg| {j}| picture {k} , a dog "{j}" .' for k in range(n) for j in range(5)]
    write(folder, "results.csv", "\n".join(["image_name| comment_number| comment", *rows]) + "\n")
    _pictures(folder / "flickr30k_images", {f"{k}.jpg": png(k) for k in range(n)})
    return ["--dataset", "flickr30k", "--data-dir", folder]


def coco(folder, png=None):
    """COCO's captions of 2014: 20 images of train, 4 of val, which lie beside them or, without png, only at COCO's."""
    words = "elephant umbrella mountain bicycle sandwich keyboard telescope volleyball".split()
    for subset, ids in (("train2014", range(20)), ("val2014", range(40, 44))):
        images = [{"id": k, "file_name": f"COCO_{subset}_{k:012d}.jpg"} for k in ids]
        notes = [{"id": 2 * k + j, "image_id": k, "caption": f"picture {k} {'ab'[j]} {words[(3 * k + j) % 8]}"}
                 for k in ids for j in (0, 1)]
        write(folder / "annotations", f"captions_{subset}.json", {"images": images, "annotations": notes})
        _pictures(folder / subset, {image["file_name"]: png(image["id"]) for image in images if png})
    return ["--dataset", "coco", "--data-dir", folder]


def vqav2(folder, png):
    """The official files of VQA v2: two questions about each of 8 images a split, answered by ten people."""
    for split, ids in (("train2014", range(8)), ("val2014", range(20, 28))):
        questions = [{"image_id": k, "question_id": 100 * k + j, "question": text}
                     for k in ids for j, text in enumerate(("What color is it?", "Is it red?"))]
        notes = [{**q, "multiple_choice_answer": word, "question_type": "what", "answer_type": kind,
                  "answers": [{"answer": word}] * 10}
                 for q, (word, kind) in zip(questions, (("green", "other"), ("no", "yes/no")) * 8)]
        about = {"data_type": "mscoco", "data_subtype": split}
        write(folder, f"v2_OpenEnded_mscoco_{split}_questions.json", {**about, "questions": questions})
        write(folder, f"v2_mscoco_{split}_annotations.json", {**about, "annotations": notes})
        _pictures(folder / split, {f"COCO_{split}_{k:012d}.jpg": png(k) for k in ids})
    return ["--dataset", "vqav2", "--data-dir", folder]


def _pictures(folder, files):
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
