"""From a folder to a model that runs: our own runs today, public checkpoints by name table."""
from dataclasses import dataclass
from pathlib import Path

from .config import UserError
from .image import Recipe
from .tokenizer import load_tokenizer
from .vlm import build, from_dict
from .weights import copy_weights, load_safetensors, read_json


@dataclass
class Loaded:
    """A model with what is needed to feed it: `recipe` prepares images, `tokenizer` text, `config` is config.json."""
    model: object
    tokenizer: object
    recipe: Recipe
    config: dict


def load_run(folder):
    """A run that train.py left in `folder` -> Loaded, the model in eval mode. Raises UserError naming what is missing."""
    folder = Path(folder)
    if not (folder / "config.json").exists():
        raise UserError(f"{folder} holds no trained model; train one first: python train.py --out-dir {folder}")
    config = read_json(folder / "config.json")
    try:
        sizes, recipe = from_dict(config["sizes"]), Recipe(**config["recipe"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder / 'config.json'} is not the config of a tinyvlm run ({error}); train again") from None
    model = build(sizes)
    tensors = load_safetensors(folder / "model.safetensors")
    copy_weights(model, tensors, {name: name for name in tensors}, source=str(folder / "model.safetensors"))
    return Loaded(model.eval(), load_tokenizer(folder / "tokenizer.json"), recipe, config)
