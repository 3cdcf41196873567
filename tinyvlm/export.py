"""The way back: a model of ours as a folder that the transformers library opens, with equal logits.

The same name tables, read from left to right (names.outward), and three small files around them: config.json (sizes,
in their words), generation_config.json (how a caption begins and ends) and preprocessor_config.json (the Recipe).
Only GPT-2 and ViT + GPT-2 go out; CLIP and the others are left out here.
"""
from pathlib import Path

import torch

from .config import UserError
from .names import NAMINGS, outward
from .vlm import CrossCaptioner
from .weights import save_safetensors, write_json


def _gpt2_config(c, end):
    drop = {"resid_pdrop": c.dropout, "embd_pdrop": c.dropout, "attn_pdrop": 0.0}           # attention has none here
    cross = {"add_cross_attention": True, "is_decoder": True} if c.cross else {}
    return {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": c.vocab_size,
            "n_positions": c.block_size, "n_embd": c.n_embd, "n_layer": c.n_layer, "n_head": c.n_head,
            "n_inner": c.n_hidden, "activation_function": _act(c.activation), "layer_norm_epsilon": c.eps,
            "bos_token_id": end, "eos_token_id": end, **drop, **cross, "tie_word_embeddings": True}


def _vit_config(c):
    drop = {"hidden_dropout_prob": c.dropout, "attention_probs_dropout_prob": 0.0}
    return {"model_type": "vit", "hidden_size": c.n_embd, "num_hidden_layers": c.n_layer,
            "num_attention_heads": c.n_head, "intermediate_size": c.n_hidden or 4 * c.n_embd,
            "hidden_act": _act(c.activation), "layer_norm_eps": c.eps, "image_size": c.image_size,
            "patch_size": c.patch_size, "num_channels": 3, "qkv_bias": True, **drop}


def _act(name):
    return {"gelu_tanh": "gelu_new"}.get(name, name)


def _preprocessor(recipe):
    """Recipe -> preprocessor_config.json: CLIP's class crops the centre, ViT's squashes."""
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
    folder, preprocessor = Path(folder), recipe and _preprocessor(recipe)       # refuse before anything is written
    save_safetensors(tensors, folder / "model.safetensors", {"format": "pt"})
    for name, content in (("config", config), ("generation_config", speech), ("preprocessor_config", preprocessor)):
        if content:
            write_json(folder / f"{name}.json", content)
    if tokenizer:
        tokenizer.save(folder)
        end = tokenizer.id_to_token(speech.get("eos_token_id", -1))
        words = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), end) if end else {}
        write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **words,
                                                      "clean_up_tokenization_spaces": False})


def _speech(model, tokenizer, first, end, max_tokens):
    """generation_config.json: what is given, else what the model was loaded with, else <|endoftext|>."""
    def known(name, value):
        return getattr(model, name, None) if value is None else value
    end = known("end", end)
    end = tokenizer.token_to_id("<|endoftext|>") if end is None and tokenizer else end
    first, max_tokens = known("first", first), known("max_tokens", max_tokens)
    speech = {"decoder_start_token_id": end if first is None else first, "bos_token_id": end, "eos_token_id": end,
              "pad_token_id": end, "max_length": max_tokens and max_tokens + 1}     # theirs counts the start token
    return {key: value for key, value in speech.items() if value is not None}


def export_gpt2(model, folder, tokenizer=None, end=None):
    """Write a GPT as a folder that transformers' GPT2LMHeadModel.from_pretrained opens with equal logits.

    end: the id that ends a text (None: the tokenizer's <|endoftext|>). Returns nothing; files appear whole.
    """
    speech = _speech(model, tokenizer, None, end, None)
    speech.pop("decoder_start_token_id", None)
    tensors = outward(NAMINGS["gpt2"][0], model.state_dict()) | {"lm_head.weight": model.wte.weight.detach()}
    _write_folder(folder, _gpt2_config(model.config, speech.get("eos_token_id")), tensors, None, tokenizer, speech)


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
    speech, C = _speech(model, tokenizer, first, end, max_tokens), c.vision.n_embd
    tensors = outward(NAMINGS["vit_gpt2"][0], model.state_dict()) | {
        "decoder.lm_head.weight": model.text.wte.weight.detach(),
        "encoder.pooler.dense.weight": torch.zeros(C, C), "encoder.pooler.dense.bias": torch.zeros(C)}
    config = {"model_type": "vision-encoder-decoder", "architectures": ["VisionEncoderDecoderModel"],
              "is_encoder_decoder": True, "tie_word_embeddings": True, "torch_dtype": "float32",
              "encoder": _vit_config(c.vision), "decoder": _gpt2_config(c.text, speech.get("eos_token_id")),
              **{key: speech[key] for key in speech if key not in ("bos_token_id", "max_length")}}
    _write_folder(folder, config, tensors, recipe or getattr(model, "recipe", None), tokenizer, speech)
