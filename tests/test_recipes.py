"""How folders say what an image must become: each setting is followed, or refused by its name.

The expected recipes were checked once against the pixels of transformers 5's own processors; what becomes of the
pixels is test_image.py's.
"""
import pytest
import torch

import public
from test_pretrained import config_of, folder, refused, tensors_of
from tinyvlm.image import RECIPES, Recipe
from tinyvlm.pretrained import load_pretrained

CLIP = {"mean": RECIPES["clip"].mean, "std": RECIPES["clip"].std}
DEIT = {"mean": RECIPES["deit"].mean, "std": RECIPES["deit"].std}
SQUARE, SHORT, CROP = {"height": 40, "width": 40}, {"shortest_edge": 36}, {"height": 32, "width": 32}
FOLLOWED = [
    ({"size": 32}, Recipe(32, "squash", None, "bilinear")),
    ({"size": CROP, "resample": 3}, Recipe(32, "squash", None, "bicubic")),
    ({"size": [32, 32]}, Recipe(32, "squash", None, "bilinear")),
    ({"size": SHORT, "crop_size": CROP, "do_center_crop": True, "resample": 3}, Recipe(32, "crop", 36, "bicubic")),
    ({"size": SQUARE, "crop_size": 32, "do_center_crop": True}, Recipe(32, "squash", 40, "bilinear")),
    ({"size": CROP, "crop_size": 40, "do_center_crop": False}, Recipe(32, "squash", None, "bilinear")),
    ({"size": 36, "crop_size": 32, "feature_extractor_type": "CLIPFeatureExtractor"}, Recipe(32, "crop", 36, **CLIP)),
    ({"size": 32, "crop_pct": 0.875, "feature_extractor_type": "ConvNextFeatureExtractor", "resample": 2},
     Recipe(32, "crop", 36, "bilinear")),
    ({"size": {"shortest_edge": 32}, "image_processor_type": "ConvNextImageProcessorFast"}, Recipe(32, "crop", 36))]


@pytest.mark.parametrize("told, want", FOLLOWED)
@pytest.mark.parametrize("version", [4, 5])
def test_a_folder_of_transformers_is_followed(tmp_path, told, want, version):
    """Version 5 writes processor_config.json, and there the settings are one of several parts; once nobody read it."""
    files = {"preprocessor_config": told} if version == 4 else {
        "processor_config": {"image_processor": told, "processor_class": "X"}, "preprocessor_config": {"size": 7}}
    assert load_pretrained(folder(tmp_path / "x", tensors_of("vit"), config_of("vit"), **files)).recipe == want


@pytest.mark.parametrize("told, fault", [
    ({"size": "big"}, "'big' pixels"), ({"size": {"height": 32, "width": 64}}, "{'height': 32, 'width': 64}"),
    ({"size": {"longest_edge": 32}}, "longest_edge"), ({"resample": 1}, "resample = 1"),
    ({"image_mean": 3}, "mean"), ({"do_rescale": False}, "do_rescale"), ({"rescale_factor": 1}, "rescale_factor"),
    ({"do_normalize": False}, "do_normalize"), ({"do_pad": True}, "do_pad = True"), ({"size": 224}, "224 pixels"),
    ({"size": SHORT, "do_center_crop": False}, "do_center_crop = False"), ({"do_center_crop": True}, "'crop_size'"),
    ({"image_processor_type": "BlipImageProcessor"}, "image_processor_type = 'Blip'")])
def test_what_a_recipe_cannot_express_is_refused_by_name(tmp_path, told, fault):
    told = {"size": 32, **told}
    refused(folder(tmp_path / "x", tensors_of("vit"), config_of("vit"), preprocessor_config=told), fault)


@pytest.mark.parametrize("told, want", [
    ({"crop_pct": 0.9, "interpolation": "bilinear"}, Recipe(32, "crop", 35, "bilinear", **DEIT)),
    ({"crop_pct": 1.0}, Recipe(32, "crop", **DEIT)), ({"crop_mode": "squash"}, "crop_mode = 'squash'"),
    ({"interpolation": "random"}, "interpolation 'random'"), ({"input_size": [3, 32, 40]}, "input_size = [3, 32, 40]")])
def test_timms_settings_are_followed_or_refused(tmp_path, told, want):
    path = public.tiny_vit(tmp_path / "vit", "timm")
    config = {"architecture": "deit_tiny_patch8_32", "num_attention_heads": 3, "num_classes": 5}
    public.write(path, "config.json", config | {"pretrained_cfg": {"input_size": [3, 32, 32], **told}})
    if isinstance(want, str):
        refused(path, want)
    else:
        assert load_pretrained(path).recipe == want


def test_the_tiny_public_checkpoints_load_and_run(tmp_path):
    """public.py serves the tests of the scripts: each of its folders must be what it says."""
    for make, n_feat in ((public.tiny_vit, 24), (public.tiny_resnet50, 128), (public.tiny_vgg16, 16)):
        loaded = load_pretrained(make(tmp_path / make.__name__))
        assert loaded.model(torch.randn(1, 3, 32, 32)).shape[-1] == n_feat and loaded.recipe.size == 32
    for make in (public.tiny_gpt2, public.tiny_clip, public.tiny_vit_gpt2):
        loaded = load_pretrained(make(tmp_path / make.__name__))
        text = getattr(loaded.model, "text", loaded.model)
        assert loaded.tokenizer.token_to_id("<|endoftext|>") == text.config.vocab_size - 1
