"""From a published folder of files to a model that runs, and from a run's folder to the same.

    find     a Hub id (fetched into the shared cache) or a folder -> config.json and the tensors       open_checkpoint
    name     of all families and namings of names.py, the one that finds most of its names             best_naming
    measure  sizes are read off the tensors' shapes; where config.json tells them too, it must agree   families.py
    copy     every weight of ours from a known place, every tensor of theirs used, or nothing at all   copy_weights
    dress    how its images are prepared (recipes.py), its tokenizer, how captions begin and end       load_pretrained

    model = load_gpt2("openai-community/gpt2")              # a folder, a Hub id, or a Hub id with @revision behind
    python -m tinyvlm.pretrained openai-community/gpt2      # print what became of each tensor
    python -m tinyvlm.pretrained export out/ folder/        # the way back: export.py

Left out: pickled files, OpenAI's TorchScript archives, CLIP's ResNets, distilled DeiT, quantised files.
"""
import math
import re
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Callable

import torch

from .clip import CLIP, CLIPConfig
from .cnn import ResNetConfig
from .config import UserError, run_script
from .download import DownloadError, hf_file
from .export import export_run
from .families import FAMILIES
from .files import read_json
from .gpt import GPTConfig
from .image import Recipe
from .names import Source, best_naming
from .recipes import read_recipe
from .tokenizer import load_tokenizer
from .vit import ViTConfig
from .vlm import build, from_dict
from .weights import copy_weights, load_safetensors, weight_map


@dataclass
class Loaded:
    """A model with what is needed to feed it: `recipe` prepares images, `tokenizer` text, `config` is config.json."""
    model: object
    tokenizer: object
    recipe: Recipe
    config: dict


# ---- find: the files, and what is in them

# Main has no safetensors in these: the commits and branches that do, and a copy under another name.
ELSEWHERE = {
    "openai/clip-vit-base-patch32": ["@d15b5f29721ca72dac15f8526b284be910de18be", "@refs/pr/32",
                                     "timm/vit_base_patch32_clip_224.openai@main"],
    "nlpconnect/vit-gpt2-image-captioning": ["@93857e539f312a97c13f16976c2a43505fd76d87", "@refs/pr/37"]}


@dataclass
class Checkpoint:
    """A public model's files, opened. find(name) gives the Path of another file of it, or None."""
    source: str
    find: Callable
    config: dict
    tensors: dict
    path: Path

    def fail(self, fault):
        raise UserError(f"{self.source}: {fault}; fetch config.json and the weights again, or name another model")


def _places(source):
    """Where to look for a model's files, best first: functions of a file name that return its Path or None."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return [lambda name: folder / name if (folder / name).is_file() else None]
    if source.startswith(("/", ".", "~")):
        raise UserError(f"there is no folder {source}; name one with config.json and model.safetensors, or a Hub id")
    repo, _, revision = source.partition("@")
    places = [partial(hf_file, repo, revision=revision or "main", missing_ok=True)]
    for other, _, commit in (where.partition("@") for where in ELSEWHERE.get(source, [])):
        find = partial(hf_file, other or repo, revision=commit, missing_ok=True)
        # a branch made for its weights may lack the small files beside them; another repository's would not fit
        places.append(find if other else lambda name, find=find: find(name) or places[0](name))
    return places


def _read_tensors(path, find):
    """{name: tensor}, without what DistributedDataParallel and torch.compile put in front: "module._orig_mod.wte"."""
    if path.name.endswith(".json"):
        for shard in {file.name for file in weight_map(path).values()}:
            find(shard)                                         # a hub's shards come one by one, beside the index
    found, tensors = load_safetensors(path), {}
    for name, tensor in found.items():
        bare = re.sub(r"^((module|_orig_mod)\.)+", "", name)
        tensors[name if bare in found or bare in tensors else bare] = tensor    # none is lost: copy_weights tells
    return tensors


def _object(path):
    config = read_json(path) if path else {}
    if not isinstance(config, dict):
        raise UserError(f"{path} is not a JSON object; fetch it again")
    return config


def open_checkpoint(source):
    """A Hub id or a local folder -> Checkpoint. Raises UserError when no safetensors file can be had."""
    places, fault = _places(str(source)), "it has no model.safetensors"
    for find in places:
        try:
            config = _object(find("config.json"))
            # timm's CLIP folders hold two files, and the one called model.safetensors is the image tower alone
            names = ["model.safetensors", "model.safetensors.index.json"]
            names.insert(2 if "model_type" in config else 0, "open_clip_model.safetensors")
            path = next(filter(None, map(find, names)), None)
        except DownloadError as error:                          # a pinned commit may be gone, the repository not
            path, fault = None, f"{error!s:.140}" if find is places[0] else fault
        if path:
            return Checkpoint(str(source), find, config, _read_tensors(path, find), path)
    raise UserError(f"{source!s:.80}: {fault}; a pytorch_model.bin may run code and is not opened: name a revision "
                    "that has safetensors, as org/name@refs/pr/1")


# ---- dress: text, and the loaders

def _find_tokenizer(find):
    for names in (["tokenizer.json"], ["vocab.json", "merges.txt"], ["vocab.txt"]):
        paths = [find(name) for name in names]
        if all(paths):
            for name in ("tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"):
                find(name)                                      # load_tokenizer reads them where they lie beside
            return load_tokenizer(paths[0])
    return None


def pretrained_tokenizer(source):
    """The tokenizer of a Hub id or folder: GPT-2's, CLIP's, BERT's ("google-bert/bert-base-uncased"), or of a run."""
    tokenizer = next(filter(None, map(_find_tokenizer, _places(str(source)))), None)
    if tokenizer is None:
        raise UserError(f"{source} holds no tokenizer.json, vocab.json + merges.txt or vocab.txt; name one that does")
    return tokenizer


def _check_rows(where, tokenizer, text):
    """A model may have more rows than its tokenizer has tokens (padded tables), but not fewer."""
    if tokenizer and text and tokenizer.vocab_size > text.vocab_size:
        raise UserError(f"{where}: the tokenizer has {tokenizer.vocab_size} tokens, the model {text.vocab_size} rows; "
                        "they belong to two models, fetch both again")


def _end_token(ck, config, tokenizer):
    """CLIP reads a text at its end token: where the tokenizer puts it, or else where config.json says.

    Old configs say eos_token_id 2, which no text holds, and mean the original rule: the largest id (None).
    """
    end = tokenizer and tokenizer.token_to_id("<|endoftext|>")
    end = config.end_token if end is None else end
    if type(end) is not int:
        ck.fail(f"eos_token_id = {end!r} in config.json is no token")
    if end == 2 and config.text.vocab_size > 49408:             # tokens were added: the largest id is one of those
        ck.fail(f"eos_token_id = 2 does not tell the end among {config.text.vocab_size} tokens; add a tokenizer.json")
    return None if end == 2 else end


def _frame(ck, vocab_size):
    """The id a caption starts from, the id that ends it, and how many new ones a caption may have."""
    places = [_object(ck.find("generation_config.json")), ck.config, ck.config.get("decoder") or {}]

    def read(places, default, below, *words):
        value = next((place[word] for word in words for place in places if place.get(word) is not None), default)
        value = value[0] if isinstance(value, list) and len(value) == 1 else value
        return value if type(value) is int and 0 <= value < below else ck.fail(f"{words[0]} = {value!r} does not fit")
    usual = min(50256, vocab_size - 1)
    return {"first": read(places, usual, vocab_size, "decoder_start_token_id", "bos_token_id"),
            "end": read(places, usual, vocab_size, "eos_token_id"),
            # theirs counts the start token; a decoder's own max_length is a leftover of the class's defaults
            "max_tokens": max(1, read(places[:2], 21, math.inf, "max_length") - 1)}


def load_pretrained(source, family=None, special_tokens=()):
    """Any of the FAMILIES, found out by its names (or only `family`) -> Loaded, in eval mode.

    source: a Hub id, id@revision or a local folder. special_tokens: new ones for a GPT-2 and its tokenizer.
    The config is as train.py writes a run's. Raises UserError naming what is missing or does not fit.
    """
    ck = open_checkpoint(source)
    share, found, rules = best_naming(ck.tensors)
    if share < 0.5:
        raise UserError(f"{source} is none of {', '.join(FAMILIES)} (model_type {ck.config.get('model_type')}, tensors "
                        f"{', '.join(list(ck.tensors)[:3])!s:.80}, ..); name another model")
    kind, model_class, measure, task, ignore = FAMILIES[found]
    if family not in (None, found):
        raise UserError(f"{source} is {kind} by the names of its tensors, not {FAMILIES[family][0]}; name another")
    config = measure(ck, rules)
    text = config if task == "text" else getattr(config, "text", None)
    tokenizer = None if task == "vision" else _find_tokenizer(ck.find)
    _check_rows(source, tokenizer, text)
    if task == "clip":
        config.end_token = _end_token(ck, config, tokenizer)
    size = getattr(getattr(config, "vision", config), "image_size", None)
    recipe = None if task == "text" else read_recipe(ck, found, size)
    with torch.device("meta"):                  # no memory, no random numbers for weights that are about to be copied
        model = model_class(config)
    model.table = copy_weights(model, ck.tensors, rules, ignore, str(ck.path))
    if special_tokens:
        if found != "gpt2" or tokenizer is None:
            raise UserError(f"{source}: special tokens need a GPT-2 and its tokenizer.json; name a folder with both")
        tokenizer.add_special_tokens(special_tokens)
        model.extend_vocab(max(config.vocab_size, tokenizer.vocab_size))
    about = {"task": task, "model": "cross" if task == "caption" else found, "dataset": str(source), "clean": "none",
             "sizes": asdict(config), "recipe": recipe and asdict(recipe), "features": None, "options": {},
             **(_frame(ck, text.vocab_size) if task == "caption" else {})}
    model.recipe, model.tokenizer = recipe, tokenizer
    return Loaded(model.eval(), tokenizer, recipe, about)


def _load(family, source, special_tokens=()):
    return load_pretrained(source, family, special_tokens).model


# Each takes (source, special_tokens=()) and returns the model named last; it carries .recipe, .tokenizer and .table.
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
    return path.is_file() and bool({"options", "sizes"} & set(_object(path)))


def _build_run(config):
    """config.json of a run -> the freshly made model it describes. `blocks` tells a ResNet's sizes from a ViT's."""
    sizes, task = config["sizes"], config["task"]
    if task in ("caption", "vqa"):
        return build(from_dict(sizes))
    vision = sizes["vision"] and (ResNetConfig if "blocks" in sizes["vision"] else ViTConfig)(**sizes["vision"])
    if task == "clip":
        return CLIP(CLIPConfig(**{**sizes, "vision": vision, "text": sizes["text"] and GPTConfig(**sizes["text"])}))
    if task == "classify":
        from .classifying import Classifier, ClassifierConfig    # a task's module, which may import this one
        return Classifier(ClassifierConfig(**{**sizes, "vision": vision}))
    raise ValueError(f"task is {task!r}")


def _check_run(config, model):
    """Entries that building the model has not used; where they will be used, no error could name them."""
    fits = {"clean": config["clean"] in ("none", "lower", "words"), "options": isinstance(config["options"], dict),
            "features": config.get("features") is None or isinstance(config["features"], dict)}
    if config["task"] in ("caption", "vqa"):
        text = model.config.text
        ids, room = range(text.vocab_size), range(1, getattr(text, "block_size", 2**31) + 1)
        spans = {"first": ids, "end": ids, "max_tokens": room} | ({"longest": room} if config["task"] == "vqa" else {})
        fits |= {key: type(config[key]) is int and config[key] in span for key, span in spans.items()}
        fits["model"] = config["model"] == model.config.model
    for key in [key for key, fit in fits.items() if not fit]:
        raise ValueError(f"{key} is {config[key]!r:.99}")


def load_run(folder):
    """A run that train.py left in `folder` -> Loaded, in eval mode. Raises UserError naming the file and the fault."""
    folder = Path(folder)
    if not (folder / "config.json").exists():
        raise UserError(f"{folder} holds no trained model; train one first: python train.py --out-dir {folder}")
    config = _object(folder / "config.json")
    try:
        with torch.device("meta"):
            model = _build_run(config)
        recipe = Recipe(**config["recipe"])
        _check_run(config, model)
    except (UserError, KeyError, TypeError, ValueError, AttributeError, AssertionError, ArithmeticError, RuntimeError
            ) as error:             # whatever a wrong size or type leads to, here it can only come from this file
        fault = f"{error} is missing" if isinstance(error, KeyError) else str(error).partition("\n")[0]
        raise UserError(f"{folder / 'config.json'} describes no run of this version: {fault:.140}; mend it, or train "
                        "again") from None
    tensors, names = load_safetensors(folder / "model.safetensors"), model.state_dict()
    copy_weights(model, tensors, {name: Source((name,)) for name in names}, source=str(folder / "model.safetensors"))
    tokenizer = load_tokenizer(folder / "tokenizer.json") if (folder / "tokenizer.json").exists() else None
    text = getattr(model.config, "text", None)
    if text and tokenizer is None:
        raise UserError(f"{folder} has lost its tokenizer.json; train again")
    _check_rows(folder, tokenizer, text)
    return Loaded(model.eval(), tokenizer, recipe, config)


# ---- the command line

def show_table(source):
    """Print how a published file becomes our model: a line per weight, and the parameter total."""
    model = load_pretrained(source).model
    width = max(len(ours) for _, ours, _, _ in model.table)
    print(f"{'how':<22}{'shape':<20}{'our name':<{width}}  their name")
    for theirs, ours, shape, how in model.table:
        print(f"{how:<22}{' x '.join(map(str, shape)) or 'one number':<20}{ours or '-':<{width}}  {theirs}")
    ignored = [math.prod(shape) for _, ours, shape, _ in model.table if not ours]
    print(f"{source}: {type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} parameters; ignored: "
          f"{len(ignored)} tensors of together {sum(ignored):,} numbers")


def main():
    """SOURCE, or: export RUN FOLDER."""
    match sys.argv[1:]:
        case ["export", run, folder]:
            export_run(load_run(run), folder)
            print(f"wrote {folder}; open it with transformers: VisionEncoderDecoderModel.from_pretrained")
        case [source] if source != "export" and not source.startswith("-"):
            show_table(source)
        case _:
            raise UserError("usage: python -m tinyvlm.pretrained SOURCE (a Hub id or a folder), or: export RUN FOLDER")


if __name__ == "__main__":
    run_script(main)
