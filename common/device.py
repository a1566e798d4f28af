"""Choose a device and the precision there, and tell when its memory is full."""

import re
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import InputError

PROBES = 10  # of each type; the fastest but the first counts
CLEARLY_FASTER, HOPELESS = 0.8, 8  # times the time in float32


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
        # Else convolutions, and in some containers matrix products, have 10 bits of mantissa.
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    return device


def pick_precision(name: str, device: torch.device) -> str:
    """The type in which networks compute on a device: "float32" or "bfloat16".

    Args:
        name: one of these two, or `auto`: what is faster there.
    """
    if name != "auto":
        return name
    return "bfloat16" if is_faster_in_bfloat16(device) else "float32"


def is_faster_in_bfloat16(device: torch.device) -> bool:
    """Whether the device upsamples a tensor clearly faster in bfloat16 than in float32.

    It is measured, in less than a second. Units for bfloat16 are not enough: with AVX512_BF16 but
    without AMX, oneDNN upsamples more slowly than in float32. A CPU is measured with one thread,
    because other programs disturb several threads more.
    """
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return False
    times: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        v, weight = _probe_of(device)
        for probe in range(PROBES):
            for dtype, seconds in times.items():
                took = _upsampling_seconds(v.to(dtype), weight.to(dtype))
                if probe:  # the first is slow
                    seconds.append(took)
            if probe and min(times[torch.bfloat16]) > HOPELESS * min(times[torch.float32]):
                break
    finally:
        torch.set_num_threads(threads)
    return min(times[torch.bfloat16]) < CLEARLY_FASTER * min(times[torch.float32])


def _probe_of(device: torch.device) -> tuple[Tensor, Tensor]:
    """A tensor [1, C, 32, 48] and a weight [C, C, 5, 5], large enough for the device."""
    channels = 64 if device.type == "cpu" else 192
    v = torch.ones(1, channels, 32, 48, device=device).to(memory_format=torch.channels_last)
    return v, torch.ones(channels, channels, 5, 5, device=device)


@torch.no_grad()
def _upsampling_seconds(v: Tensor, weight: Tensor) -> float:
    """The seconds of a transposed convolution like the decoder's, v [1, C, h, w]."""
    if v.device.type == "cuda":
        torch.cuda.synchronize(v.device)
    start = time.perf_counter()
    F.conv_transpose2d(v, weight, stride=2, padding=2, output_padding=1)
    if v.device.type == "cuda":
        torch.cuda.synchronize(v.device)
    return time.perf_counter() - start


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error was raised because a GPU or the machine has no memory left."""
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or "allocate memory" in str(error)
