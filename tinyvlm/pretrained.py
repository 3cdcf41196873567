"""From a published folder of files to a model that runs, and from a run's folder to the same.

    find     a Hub id (fetched into the shared cache) or a folder -> config.json and the tensors       open_checkpoint
    name     of all families and namings of names.py, the one that finds most of its names             best_naming
    measure  sizes are read off the tensors' shapes, the rest off config.json; the two must agree      families.py
    copy     every weight of ours from a known place, every tensor of theirs used, or nothing at all   copy_weights
    dress    how its images are prepared (recipes.py), its tokenizer, how captions begin and end       load_pretrained

Left out: pickled files, files of several parts, CLIP's ResNets, distilled DeiT, quantised files.
"""
import contextlib
import re
import shlex
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

from .captions import CLEAN
from .clip import CLIP, CLIPConfig
from .cnn import ResNetConfig
from .config import UserError
from .download import hf_file
from .families import FAMILIES, IGNORE, agree, tie_lm_head
from .files import read_json
from .gpt import GPTConfig
from .image import Recipe
from .names import Source, best_naming
from .recipes import read_recipe
from .tokenizer import END, load_tokenizer
from .vit import ViTConfig
from .vlm import LSTMConfig, VLMConfig, build
from .weights import copy_weights, load_safetensors


@dataclass
class Loaded:
    """A model with what is needed to feed it: `recipe` prepares images, `tokenizer` text, `config` is config.json."""
    model: object
    tokenizer: object
    recipe: Recipe
    config: dict


@contextlib.contextmanager
def blame(where, remedy):
    """Whatever goes wrong while a model is built from a file's settings can only be that file's fault: one sentence."""
    try:
        yield
    except (UserError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        fault = f"{error} is missing, or unknown" if isinstance(error, KeyError) else str(error).partition("\n")[0]
        raise UserError(f"{where}: {fault:.160}; {remedy}") from None


# ---- find: the files, and what is in them

NEUTRAL = {     # what a generation_config.json may say and is not done here, with the value that changes nothing
    **dict.fromkeys(("min_length min_new_tokens no_repeat_ngram_size encoder_no_repeat_ngram_size suppress_tokens "
                     "begin_suppress_tokens bad_words_ids sequence_bias forced_bos_token_id forced_eos_token_id "
                     "forced_decoder_ids force_words_ids constraints exponential_decay_length_penalty stop_strings "
                     "watermarking_config penalty_alpha dola_layers diversity_penalty token_healing").split(), 0),
    **dict.fromkeys("repetition_penalty encoder_repetition_penalty guidance_scale num_beam_groups".split(), 1)}
PINNED = {      # main has no safetensors in these: a commit that does
    "openai/clip-vit-base-patch32": "d15b5f29721ca72dac15f8526b284be910de18be",
    "nlpconnect/vit-gpt2-image-captioning": "93857e539f312a97c13f16976c2a43505fd76d87"}


def _finder(source):
    """A folder, Hub id or id@revision -> the function of a file's name that gives its Path, or None."""
    folder, (repo, _, revision) = Path(source).expanduser(), str(source).partition("@")
    if folder.is_dir():
        return lambda name: folder / name if (folder / name).is_file() else None
    if folder.exists() or str(source)[:1] in "./~":
        raise UserError(f"{source!s:.120} is no folder; name one, or a Hub id such as openai-community/gpt2")
    return lambda name: hf_file(repo, name, revision or PINNED.get(repo, "main"), missing_ok=True)


def open_checkpoint(source):
    """A Hub id or a folder -> its config, tensors, their path; and the content of any other JSON file: read(name)."""
    find = _finder(source)
    config = read_json(find("config.json"), missing_ok=True)
    # timm's CLIP folders hold two files, and the one called model.safetensors is the image tower alone
    path = None if "model_type" in config else find("open_clip_model.safetensors")
    path = path or find("model.safetensors")
    if path is None:
        raise UserError(f"{source!s:.80} has no model.safetensors, and a pytorch_model.bin, which may run code, is not "
                        "opened; name a revision that has it, as org/name@refs/pr/1")
    # DistributedDataParallel and torch.compile put something in front
    tensors = {re.sub(r"^((module|_orig_mod)\.)+", "", name): x for name, x in load_safetensors(path).items()}
    return SimpleNamespace(config=config, tensors=tensors, path=path,
                           read=lambda name: read_json(find(name), missing_ok=True))


# ---- dress: text, and the loaders

def pretrained_tokenizer(source, missing_ok=False):
    """The tokenizer of a Hub id or folder: GPT-2's, CLIP's, BERT's ("google-bert/bert-base-uncased"), or of a run.

    The first of three files decides; load_tokenizer reads the others where they lie beside it.
    """
    paths = [*map(_finder(source), ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer_config.json",
                                    "added_tokens.json", "special_tokens_map.json"))]
    path = paths[0] or paths[1] or paths[2]
    if not path and not missing_ok:
        raise UserError(f"{source} holds no tokenizer.json, vocab.json + merges.txt or vocab.txt; name one that does")
    return path and load_tokenizer(path)


def _check(config, model, tokenizer):
    """What config.json tells beside the sizes is refused here: where it is used, no error could name the file."""
    sizes = vars(getattr(model.config, "text", model.config) or model.config)
    V, room = sizes.get("vocab_size", 0), range(1, sizes.get("block_size", 10**6) + 1)
    if tokenizer and tokenizer.vocab_size > V > 0:              # fewer are well: padded tables
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} tokens, the model {V} rows")
    allowed = {"clean": CLEAN, "options": [dict(config["options"])]}                # TypeError where it is none
    if config["task"] in ("caption", "vqa"):
        allowed |= {"model": [model.config.model], "first": range(V), "end": range(V), "max_tokens": room}
    for key, values in (allowed | ({"longest": room} if config["task"] == "vqa" else {})).items():
        if config[key] not in values:
            raise ValueError(f"{key} is {config[key]!r:.99}")


def _frame(ck, config):
    """The id a caption starts from, the id that ends it, and how many new ones a caption may have.

    As in transformers: where generation_config.json is, it alone says what is allowed. How to search (num_beams,
    length_penalty, do_sample, temperature, top_k, ..) is the user's choice and not read; NEUTRAL's are refused.
    """
    own, decoder = ck.read("generation_config.json"), ck.config.get("decoder") or {}
    rules = own or decoder | {word: value for word, value in ck.config.items() if value is not None}
    for word in [word for word, value in NEUTRAL.items() if rules.get(word) and rules[word] != value]:
        raise ValueError(f"{word} = {rules[word]!r:.60} of its captions is not supported")
    told = {word: value for place in (decoder, ck.config, own) for word, value in place.items() if value is not None}
    ends = told.get("eos_token_id", min(50256, config.vocab_size - 1))
    end = ends[0] if isinstance(ends, list) and len(ends) == 1 else ends        # of several, none is the one end
    first = told.get("decoder_start_token_id", told.get("bos_token_id", end))
    length = {word: rules[word] for word in ("max_length", "max_new_tokens") if rules.get(word) is not None}
    for word, value in {"eos_token_id": end, "decoder_start_token_id": first, **length}.items():
        if type(value) is not int:
            raise ValueError(f"{word} = {value!r:.60} is not one whole number")
    # max_new_tokens goes before max_length, which counts the start token; without both, transformers 5 makes 20
    longest = length.get("max_new_tokens", length.get("max_length", 21) - 1)
    return {"first": first, "end": end, "max_tokens": min(longest, config.block_size)}


def load_pretrained(source, family=None, special_tokens=()):
    """A public checkpoint, its family found out by its names -> Loaded, in eval mode; its config is as that of a run.

    source: a Hub id, id@revision or a local folder. family: the only one wanted. special_tokens: new ones for a GPT-2
    that comes with its tokenizer. Raises UserError naming what is missing or does not fit.
    """
    ck = open_checkpoint(source)
    share, found, rules = best_naming(ck.tensors)
    if share < 0.5:
        raise UserError(f"{source} is none of {', '.join(FAMILIES)} (model_type {ck.config.get('model_type')}, tensors "
                        f"{', '.join(list(ck.tensors)[:3])!s:.80}, ..); name another model")
    kind, model_class, measure, task = FAMILIES[found]
    if family not in (None, found):
        raise UserError(f"{source} is {kind} by the names of its tensors, not {FAMILIES[family][0]}; name another")
    tied = "lm_head" not in " ".join(ck.tensors)
    tie_lm_head(ck.tensors, rules)
    tokenizer = None if task == "vision" else pretrained_tokenizer(source, missing_ok=True)
    with blame(source, "name another model, or make sure that config.json and the weights are whole"):
        if tied and found in ("gpt2", "vit_gpt2"):              # else its output matrix would be missing
            agree(ck.config.get("decoder") or ck.config, tie_word_embeddings=True)
        config = measure(ck, {ours: rule.shape(ck.tensors) for ours, rule in rules.items()})
        if task == "clip" and tokenizer and tokenizer.token_to_id(END):         # a text is read where that puts its end
            config.end_token = tokenizer.token_to_id(END)
        size = getattr(getattr(config, "vision", config), "image_size", None)
        recipe = None if task == "text" else read_recipe(ck, found, size)
        with torch.device("meta"):              # no memory, no random numbers for weights that are about to be copied
            model = model_class(config)
        about = {"task": task, "model": "cross" if task == "caption" else found, "dataset": str(source),
                 "sizes": asdict(config), "recipe": recipe and asdict(recipe), "clean": "none", "features": None,
                 "options": {}, **(_frame(ck, config.text) if task == "caption" else {})}
        _check(about, model, tokenizer)
    copy_weights(model, ck.tensors, rules, IGNORE, ck.path)
    if special_tokens and tokenizer:
        tokenizer.add_special_tokens(special_tokens)
        model.extend_vocab(max(config.vocab_size, tokenizer.vocab_size))
    model.recipe, model.tokenizer = recipe, tokenizer
    return Loaded(model.eval(), tokenizer, recipe, about)


def _load(family, source, special_tokens=()):
    return load_pretrained(source, family, special_tokens).model


# Each takes (source, special_tokens=()) and returns the model named last; it carries .recipe and .tokenizer.
load_gpt2 = partial(_load, "gpt2")              # any size: openai-community/gpt2, distilbert/distilgpt2 -> gpt.GPT
load_vit = partial(_load, "vit")                # ViT or DeiT: google/vit-base-patch16-224, timm/deit_... -> vit.ViT
load_clip = partial(_load, "clip")              # with a ViT: openai/clip-vit-base-patch32, laion/... -> clip.CLIP
load_resnet50 = partial(_load, "resnet50")      # v1.5: microsoft/resnet-50, timm/resnet50.a1_in1k -> cnn.ResNet50
load_vgg16 = partial(_load, "vgg16")            # linear layers stored either way: timm/vgg16.tv_in1k -> cnn.VGG16
load_vit_gpt2 = partial(_load, "vit_gpt2")      # nlpconnect/vit-gpt2-image-captioning -> vlm.CrossCaptioner


# ---- our own runs: names and sizes are ours already

def is_run(source):
    """Whether `source` is a folder that train.py left (and not a public checkpoint's)."""
    path = Path(source) / "config.json"
    return path.is_file() and '"sizes": ' in path.read_text(errors="replace")


def _build_run(config):
    """config.json of a run -> the freshly made model it describes. `blocks` tells a ResNet's sizes from a ViT's."""
    from .classifying import Classifier, ClassifierConfig        # a task's module, which may import this one
    sizes = dict(config["sizes"])
    model_class, kind = {"caption": (build, VLMConfig), "vqa": (build, VLMConfig), "clip": (CLIP, CLIPConfig),
                         "classify": (Classifier, ClassifierConfig)}[config["task"]]
    kinds = {"vision": ResNetConfig if "blocks" in (sizes["vision"] or {}) else ViTConfig,
             "text": LSTMConfig if sizes.get("model") == "lstm" else GPTConfig}
    return model_class(kind(**sizes | {part: kinds[part](**sizes[part]) for part in kinds if sizes.get(part)}))


def load_run(folder):
    """A run that train.py left in `folder` -> Loaded, in eval mode. Raises UserError naming the file and the fault."""
    path = Path(folder) / "config.json"
    if not path.exists():
        first = f"train one first: python train.py --out-dir={shlex.quote(str(folder))}"
        remedy = "name the folder of a run" if Path(folder).is_file() else first
        raise UserError(f"{folder} holds no trained model; {remedy}")
    config, where = read_json(path), (f"{path} describes no run of this version", "mend it, or train again")
    with blame(*where):
        for key in [key for key in ("sizes", "recipe") if not isinstance(config[key], dict)]:
            raise ValueError(f"{key} is {config[key]!r:.60}")
        with torch.device("meta"):
            model = _build_run(config)
        recipe = Recipe(**config["recipe"])
    tokenizer = pretrained_tokenizer(folder, missing_ok=getattr(model.config, "text", None) is None)
    with blame(*where):
        _check(config, model, tokenizer)
    rules, path = {name: Source((name,)) for name in model.state_dict()}, path.with_name("model.safetensors")
    copy_weights(model, load_safetensors(path), rules, source=path)
    return Loaded(model.eval(), tokenizer, recipe, config)
