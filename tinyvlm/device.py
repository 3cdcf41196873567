"""Where and how to compute: the device, its number format, and this process's place among several.

On a GPU, products run in bfloat16 (float16 with a gradient scaler where that is only emulated); on a CPU everything is
float32. Several processes (torchrun) each take their share of every batch and add up gradients.
"""
import atexit
import os
from contextlib import nullcontext

import torch
import torch.distributed as dist

from .config import UserError
from .transformer import Block


def check_device(name):
    """torch.device(name), after a trial. Raises UserError where this PyTorch or this machine has none of that name."""
    try:
        torch.zeros(1, device=name).cpu()
        return torch.device(name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        why = str(error).partition("\n")[0].partition(". ")[0][:100]
        raise UserError(f"--device {name} cannot be used here ({why}); try cpu") from None


class Device:
    """torch: the torch.device; rank of world processes; dtype of products; scaler of float16 gradients."""

    def __init__(self, name="auto", dtype="auto"):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.main = self.rank == 0
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        if name == "cuda" and self.world > 1:
            name = f"cuda:{os.environ['LOCAL_RANK']}"
        self.torch = check_device(name)
        self.cuda = self.torch.type == "cuda"
        if self.cuda:
            torch.cuda.set_device(self.torch)
            torch.set_float32_matmul_precision("high")          # TF32 for what autocast leaves in float32
        if self.world > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if self.cuda else "gloo")
            atexit.register(dist.destroy_process_group)
        if dtype == "auto":
            native = self.cuda and torch.cuda.is_bf16_supported(including_emulation=False)
            dtype = "bfloat16" if native else "float16" if self.cuda else "float32"
        self.dtype = getattr(torch, dtype)
        self.scaler = torch.amp.GradScaler(self.torch.type, enabled=dtype == "float16")

    def autocast(self):
        """`with device.autocast():` computes products in `dtype`."""
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(self.torch.type, self.dtype)

    def total(self, *numbers):
        """Each of the numbers summed over all processes: a list."""
        t = torch.tensor(numbers, dtype=torch.float64)
        if self.world > 1:
            t = t.to(self.torch)
            dist.all_reduce(t)
        return t.tolist()

    def merge(self, found):
        """The dicts of all processes as one, the same everywhere."""
        parts = [found] * self.world
        if self.world > 1:
            dist.all_gather_object(parts, found)
        return {key: value for part in parts for key, value in part.items()}

    def no_sync(self, model, last):
        """Processes exchange gradients once a step, with its last micro-batch."""
        return nullcontext() if last or self.world == 1 else model.no_sync()

    def say(self, text):
        """Print, in one process only."""
        if self.main:
            print(text, flush=True)


def compile_blocks(model, device):
    """torch.compile each Block, in place: equal blocks share one compilation, and no name in a checkpoint changes. A
    trial comes first, as a missing compiler shows at the first call only: then the model goes on as it was."""
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(8, device=device.torch))
    except Exception as error:                                  # a compiler can raise anything
        return device.say(f"torch.compile failed ({type(error).__name__}); going on without it, slower")
    for module in model.modules():
        if isinstance(module, Block):
            module.compile()
