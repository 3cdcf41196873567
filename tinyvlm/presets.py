"""Named sets of options for train.py, and which one a command line gets that names none. Flags win over a preset.

Each was chosen on a validation split; the README says what each reaches, in what time. Drawn scenes need no preset: the
defaults are theirs.
"""
import torch

from .config import peek
from .pretrained import is_run

PHOTOS = dict(dataset="flickr8k", image_size=128, n_embd=256, dropout=0.2, crop=0.4, jitter=0.3)
WORDS = dict(clean="words", optimizer="adamw")
SPACE = dict(WORDS, task="clip", tokenizer="words", head="mlp", max_tokens=16, batch_size=256, eval_interval=94,
             eval_images=1000)

PRESETS = {
    # real photographs from scratch on two cores: within 40 minutes
    "laptop": dict(PHOTOS, vocab_size=2048, clean="words", max_tokens=20, epochs=10, captions_per_image=5,
                   eval_interval=376),
    # the same at the size a GPU likes
    "gpu": dict(PHOTOS, image_size=224, n_layer=6, n_head=8, n_embd=512, vocab_size=2048, clean="words", max_tokens=24,
                dropout=0.3, epochs=20, batch_size=128, captions_per_image=5, lr=1e-3, crop=0.5, eval_interval=94),
    # an LSTM on ready-made features (--features FILE), as captioners were built before attention
    "lstm": dict(WORDS, dataset="flickr8k", model="lstm", tokenizer="words", n_layer=1, n_embd=256, n_hidden=512,
                 soft_attention=True, n_head=1, dropout=0.5, max_tokens=24, epochs=10, batch_size=64,
                 captions_per_image=5, accum=4, eval_interval=188, eval_images=1000),
    # a GPT decoder on ready-made features, by cross-attention (or --model prefix)
    "decoder": dict(WORDS, dataset="flickr8k", optimizer="muon", tokenizer="words", n_layer=2, n_embd=256, dropout=0.2,
                    max_tokens=24, epochs=7, batch_size=64, captions_per_image=5, accum=4, lr=1e-3, eval_interval=94),
    # after either: the model's own captions, rewarded by their score, and 0.4 of the way (--features FILE --init RUN)
    "reward": dict(WORDS, dataset="flickr8k", model="lstm", max_tokens=24, reinforce=5, blend=0.4, epochs=2,
                   batch_size=64, lr=1e-4, warmup=0.1, eval_interval=94, eval_images=1000),
    # pictures and sentences in one space, from pixels ..
    "clip": dict(PHOTOS, **SPACE, dropout=0.3, epochs=40, lr=1e-3),
    # .. or from ready-made features (--features FILE), with a bag of words against them
    "clip-features": dict(SPACE, dataset="flickr8k", bag=True, min_count=3, n_embd=512, dropout=0.5, epochs=120,
                          lr=3e-3),
    # labels of photographs: the first stage of the TinyVLM recipe
    "labels": dict(PHOTOS, task="classify", dataset="capsfusion", epochs=10, batch_size=64, lr=1e-3),
    # questions and answers about drawn scenes
    "vqa": dict(task="vqa", max_tokens=64, captions_per_image=3, epochs=4, lr=1e-3, lr_vision=0.5, warmup=0.1),
    # .. and about photographs
    "vqa-photos": dict(PHOTOS, task="vqa", dataset="vqav2", vocab_size=4096, max_tokens=160, turns=5, batch_size=64,
                       lr=1e-3),
    # public weights: first the new cross-attention, then the decoder, then all, at gentle rates
    "public": dict(dataset="flickr8k", vision="google/vit-base-patch16-224-in21k", text="openai-community/gpt2",
                   max_tokens=40, dropout=0.1, epochs=8, batch_size=32, lr=1e-4, lr_decoder=0.3, lr_vision=0.1,
                   unfreeze_decoder=1, unfreeze_vision=2, crop=0.3, eval_interval=376, optimizer="adamw"),
}


def choose(argv):
    """A command line -> the task it names, and its preset: the one named, or the one its task and data set bring.

    ["--dataset", "flickr8k"] -> ("caption", "laptop"), or "gpu" where a GPU will be used.
    """
    named, dataset = peek(argv, "preset"), peek(argv, "dataset", "shapes")
    task = peek(argv, "task", PRESETS.get(named, {}).get("task", "caption"))
    if named or dataset == "shapes" and task != "vqa":
        return task, named
    if task != "caption":
        vqa = "vqa-photos" if dataset == "vqav2" else "vqa"
        bag = peek(argv, "features") and not (peek(argv, "text") or peek(argv, "text_embeddings"))
        clip = "clip-features" if bag else "clip"
        return task, {"vqa": vqa, "clip": clip, "classify": "labels"}.get(task)
    if peek(argv, "reinforce"):
        return task, "reward"
    if peek(argv, "features"):
        return task, "lstm" if peek(argv, "model", "lstm") == "lstm" else "decoder"
    if peek(argv, "text") or peek(argv, "vision") and not is_run(str(peek(argv, "vision"))):
        return task, "public"
    gpu = torch.cuda.is_available() and str(peek(argv, "device", "auto"))[:4] in ("auto", "cuda")
    return task, "gpu" if gpu else "laptop"
