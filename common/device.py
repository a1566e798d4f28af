"""Choose a device, and tell when its memory is full."""

import re

import torch

from common.errors import InputError


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """The device of a name, and the current one of CUDA from now on.

    Args:
        name: `auto` (a GPU if there is one), `cpu`, `cuda` (this rank's GPU) or `cuda:N`.
        local_rank: this process's number on this machine, from 0.

    Raises:
        InputError: there is no such device here, or it cannot be used.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{local_rank % max(torch.cuda.device_count(), 1)}"
    if not re.fullmatch(r"cpu|cuda:\d+", name):
        raise InputError(f"device = {name!r}: must be auto, cpu, cuda or cuda:N")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device = {name!r}: not usable here ({reason})") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False
    return device


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error was raised because a GPU or the machine has no memory left."""
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or "allocate memory" in str(error)
