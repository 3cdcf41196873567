"""The way back: a model of ours as a folder that the transformers library opens, with equal logits.

The same name tables, read from left to right (names.outward), and three small files around them: config.json (sizes,
in their words), generation_config.json (how a caption begins and ends) and preprocessor_config.json (the Recipe).
Only GPT-2 and ViT + GPT-2 go out; CLIP and the others are left out here.
"""
from pathlib import Path

import torch

from .config import UserError
from .files import write_json
from .names import NAMINGS, outward
from .recipes import to_transformers
from .vlm import CrossCaptioner
from .weights import save_safetensors

ACT_NAMES = {"gelu_tanh": "gelu_new"}


def _gpt2_config(c, end):
    cross = {"add_cross_attention": True, "is_decoder": True} if c.cross else {}
    return {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": c.vocab_size,
            "n_positions": c.block_size, "n_embd": c.n_embd, "n_layer": c.n_layer, "n_head": c.n_head,
            "n_inner": c.n_hidden, "activation_function": ACT_NAMES.get(c.activation, c.activation),
            "layer_norm_epsilon": c.eps, "bos_token_id": end, "eos_token_id": end, "resid_pdrop": c.dropout,
            "embd_pdrop": c.dropout, "attn_pdrop": 0.0, "tie_word_embeddings": True, **cross}


def _vit_config(c):
    return {"model_type": "vit", "hidden_size": c.n_embd, "num_hidden_layers": c.n_layer,
            "num_attention_heads": c.n_head, "intermediate_size": c.n_hidden or 4 * c.n_embd,
            "hidden_act": ACT_NAMES.get(c.activation, c.activation), "layer_norm_eps": c.eps,
            "image_size": c.image_size, "patch_size": c.patch_size, "num_channels": 3, "qkv_bias": True,
            "hidden_dropout_prob": c.dropout, "attention_probs_dropout_prob": 0.0}


def _write_folder(folder, config, tensors, generation, preprocessor=None, tokenizer=None):
    folder = Path(folder)
    save_safetensors(tensors, folder / "model.safetensors", {"format": "pt"})
    files = {"config": config, "generation_config": generation, "preprocessor_config": preprocessor}
    for name, content in files.items():
        if content:
            write_json(folder / f"{name}.json", content)
    if tokenizer:
        tokenizer.save(folder)
        end = tokenizer.id_to_token(generation.get("eos_token_id", -1))
        names = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), end) if end else {}
        write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **names,
                                                      "clean_up_tokenization_spaces": False})


def export_gpt2(model, folder, tokenizer=None, end=None):
    """Write a GPT as a folder that transformers' GPT2LMHeadModel.from_pretrained opens with equal logits.

    end: the id that ends a text (None: the tokenizer's <|endoftext|>).
    """
    end = tokenizer.token_to_id("<|endoftext|>") if end is None and tokenizer else end
    generation = {} if end is None else {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    tensors = outward(NAMINGS["gpt2"][0], model.state_dict()) | {"lm_head.weight": model.wte.weight.detach()}
    _write_folder(folder, _gpt2_config(model.config, end), tensors, generation, None, tokenizer)


def export_vit_gpt2(model, folder, recipe=None, tokenizer=None, first=None, end=None, max_tokens=None):
    """Write a CrossCaptioner as a folder that transformers' VisionEncoderDecoderModel.from_pretrained opens.

    first, end, max_tokens: as in a run's config.json. The pooler, which that library expects and nobody reads, is
    written as zeros. Raises UserError for what a Hugging Face ViT cannot express.
    """
    c = model.config
    if not isinstance(model, CrossCaptioner) or c.wiring != "final" or not c.vision:
        raise UserError("transformers knows only captioners with a vision tower and --model cross --wiring final")
    if c.vision.stem != "patch" or not c.vision.class_token or c.vision.pre_norm or not c.vision.patch_bias:
        raise UserError("transformers' ViT has square patches and a class token; train with --stem patch --class-token "
                        "for a model that can be exported")
    preprocessor, C = recipe and to_transformers(recipe), c.vision.n_embd
    end = tokenizer.token_to_id("<|endoftext|>") if end is None and tokenizer else end
    ids = {"decoder_start_token_id": end if first is None else first, "eos_token_id": end, "pad_token_id": end}
    ids = {key: value for key, value in ids.items() if value is not None}
    generation = ids | ({"max_length": max_tokens + 1} if max_tokens else {})       # theirs counts the start token
    tensors = outward(NAMINGS["vit_gpt2"][0], model.state_dict()) | {
        "decoder.lm_head.weight": model.text.wte.weight.detach(),
        "encoder.pooler.dense.weight": torch.zeros(C, C), "encoder.pooler.dense.bias": torch.zeros(C)}
    config = {"model_type": "vision-encoder-decoder", "architectures": ["VisionEncoderDecoderModel"],
              "is_encoder_decoder": True, "tie_word_embeddings": True, "torch_dtype": "float32",
              "encoder": _vit_config(c.vision), "decoder": _gpt2_config(c.text, end), **ids}
    _write_folder(folder, config, tensors, generation, preprocessor, tokenizer)


def export_run(loaded, folder):
    """A captioner of train.py's, as load_run gives it, written for transformers."""
    export_vit_gpt2(loaded.model, folder, loaded.recipe, loaded.tokenizer,
                    *(loaded.config.get(key) for key in ("first", "end", "max_tokens")))
