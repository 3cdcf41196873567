"""The way back: a captioner of train.py's as a folder that the transformers library opens, with equal logits.

    python -m tinyvlm.export out/mine my-captioner          # a run's folder, then the folder to write

The same tables, read from left to right (names.outward, families.SETTINGS), and how captions begin and end, and images
are prepared. Only ViT + GPT-2 goes out; GPT-2 alone, CLIP and the others are left out here."""
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from .config import UserError, run_script
from .families import ACT_NAMES, SETTINGS
from .files import write_json
from .names import NAMINGS, outward
from .pretrained import load_run
from .recipes import to_transformers
from .vlm import CrossCaptioner
from .weights import save_safetensors


def _config(c, kind):
    """Our GPTConfig or ViTConfig -> the sizes and settings of their config.json, in its words."""
    theirs = {ours: theirs for theirs, ours in ACT_NAMES.items()}                 # "gelu_tanh" -> "gelu_new"
    ours = asdict(c) | {"n_hidden": c.n_hidden or 4 * c.n_embd, "activation": theirs[c.activation]}
    return {"model_type": kind} | {word: ours[field] for field, word in SETTINGS[kind].items() if field in ours}


def export_vit_gpt2(model, folder, recipe=None, tokenizer=None, first=None, end=None, max_tokens=None):
    """Write a CrossCaptioner as a folder that transformers' VisionEncoderDecoderModel.from_pretrained opens. first,
    end, max_tokens: as in a run's config.json. The pooler, which that library expects and nobody reads, is written as
    zeros. Raises UserError for what a Hugging Face ViT cannot express."""
    c, folder = model.config, Path(folder)
    if not isinstance(model, CrossCaptioner) or c.wiring != "final" or not c.vision:
        raise UserError("transformers knows only captioners with a vision tower and --model cross --wiring final")
    if c.vision.stem != "patch" or not c.vision.class_token or c.vision.pre_norm or not c.vision.patch_bias:
        raise UserError("transformers' ViT has square patches and a class token: train with --stem patch --class-token")
    files, C = {"preprocessor_config": to_transformers(recipe)} if recipe else {}, c.vision.n_embd
    save_safetensors(outward(NAMINGS["vit_gpt2"][0], model.state_dict()) | {
        "decoder.lm_head.weight": model.text.wte.weight, "encoder.pooler.dense.weight": torch.zeros(C, C),
        "encoder.pooler.dense.bias": torch.zeros(C)}, folder / "model.safetensors", {"format": "pt"})
    ids = {} if end is None else {"decoder_start_token_id": first, "eos_token_id": end, "pad_token_id": end}
    files["generation_config"] = ids | ({"max_length": max_tokens + 1} if max_tokens else {})    # with the start token
    files["config"] = {
        "model_type": "vision-encoder-decoder", "architectures": ["VisionEncoderDecoderModel"], **ids,
        "is_encoder_decoder": True, "tie_word_embeddings": True, "torch_dtype": "float32",
        "encoder": _config(c.vision, "vit"), "decoder": _config(c.text, "gpt2") | {
            "architectures": ["GPT2LMHeadModel"], "add_cross_attention": True, "is_decoder": True,
            "bos_token_id": first, "eos_token_id": end}}        # else that library takes GPT-2's 50256, and warns
    if tokenizer:
        tokenizer.save(folder)
        names = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), tokenizer.id_to_token(end))
        files["tokenizer_config"] = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    for name, content in files.items():
        write_json(folder / f"{name}.json", content)


def main():
    """Write the captioner in the folder argv[1] for transformers, into the folder argv[2]."""
    if len(sys.argv) != 3:
        raise UserError("usage: python -m tinyvlm.export RUN FOLDER")
    run = load_run(sys.argv[1])
    ids = (run.config.get(key) for key in ("first", "end", "max_tokens"))         # how captions begin and end
    export_vit_gpt2(run.model, sys.argv[2], run.recipe, run.tokenizer, *ids)
    print(f"wrote {sys.argv[2]}; open it with transformers: VisionEncoderDecoderModel.from_pretrained")


if __name__ == "__main__":
    run_script(main)
