"""Makes tests/reference/: tiny random checkpoints as transformers writes them, each with an input and its answers.

    python tests/make_reference_checkpoints.py          # needs transformers; made with version 4.57.1

Not run by the tests. Every folder holds config.json and model.safetensors, under the published names and ranks, and
answers.safetensors. The ResNet has its own file, see make_reference_cnn.py.
"""
import json
from pathlib import Path

import torch
import transformers as tf
from safetensors.torch import save_file

HOME = Path(__file__).with_name("reference")
VIT = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=50, patch_size=8,
           image_size=32)
GPT2 = dict(vocab_size=40, n_positions=20, n_embd=32, n_layer=2, n_head=4, bos_token_id=39, eos_token_id=39)


def write(name, model, answer, preprocessor=None):
    """Large random values everywhere: at the library's own small ones a swapped layer norm would hardly show."""
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    model.tie_weights()
    model.eval().save_pretrained(HOME / name)
    with torch.no_grad():
        answers = {key: t.contiguous().clone() for key, t in answer(model).items()}
    save_file(answers, HOME / name / "answers.safetensors")
    if preprocessor:
        (HOME / name / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    if name != "vit_gpt2":
        (HOME / name / "generation_config.json").unlink(missing_ok=True)


def clip(act, eos):
    """eos 2 is what OpenAI's published config says, and means: the largest id. Rows end at places 5 and 9."""
    text = dict(vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                max_position_embeddings=10, hidden_act=act, eos_token_id=eos)
    vision = {**VIT, "hidden_act": act, "num_hidden_layers": 3}
    idx = torch.randint(3, 39, (2, 10))
    idx[0, 5] = idx[1, 9] = 39

    def answer(model):
        out = model(input_ids=idx, pixel_values=img)
        return {"img": img, "idx": idx, "image_emb": out.image_embeds, "text_emb": out.text_embeds,
                "logits": out.logits_per_image}
    return tf.CLIPModel(tf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)), answer


def vit_gpt2():
    config = tf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        tf.ViTConfig(**VIT), tf.GPT2Config(**GPT2, add_cross_attention=True, is_decoder=True),
        decoder_start_token_id=39, eos_token_id=39, pad_token_id=39)
    model = tf.VisionEncoderDecoderModel(config)
    model.decoder.transformer.wpe.weight.data *= 100        # else the same word wins for ever
    for block in model.decoder.transformer.h:
        block.crossattention.c_proj.weight.data *= 20       # and for every picture
    model.generation_config = tf.GenerationConfig(decoder_start_token_id=39, eos_token_id=39, pad_token_id=39,
                                                  max_length=12)

    def answer(model):
        beams = {f"beams{k}": model.generate(img, num_beams=k, do_sample=False)[:, 1:] for k in (1, 4)}
        return {"img": img, "idx": idx, "logits": model(pixel_values=img, decoder_input_ids=idx).logits, **beams}
    return model, answer


if __name__ == "__main__":
    torch.manual_seed(1)        # with this seed captions end, differ between the images, and beams find another one
    img, idx = torch.randn(2, 3, 32, 32), torch.randint(0, 40, (2, 9))
    write("vit_gpt2", *vit_gpt2(), {"size": 32, "do_resize": True, "do_normalize": True, "image_mean": [0.5, 0.5, 0.5],
                                    "image_std": [0.5, 0.5, 0.5], "feature_extractor_type": "ViTFeatureExtractor"})
    write("gpt2", tf.GPT2LMHeadModel(tf.GPT2Config(**GPT2)), lambda m: {"idx": idx, "logits": m(idx).logits})
    write("vit", tf.ViTForImageClassification(tf.ViTConfig(**VIT, num_labels=5)),
          lambda m: {"img": img, "feats": m.vit(img).last_hidden_state, "logits": m(img).logits})
    write("vit_pooler", tf.ViTModel(tf.ViTConfig(**VIT)), lambda m: {"img": img, "feats": m(img).last_hidden_state})
    write("clip_quick", *clip("quick_gelu", 2))
    write("clip_gelu", *clip("gelu", 39))
