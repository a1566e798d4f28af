"""How much memory a refinement takes, and which tiles make a picture fit."""

import math
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from common.errors import InputError
from common.processes import processes_here
from fast.tiles import HALO, STRIDE

TILES = (256, 128, 64, 32, 16)  # sides of tiles, positions of y
PER_ACTIVATION, PER_PIXEL = 9, 150  # bytes: a pixel of g_s per channel N, and one of the image


class MemoryBound(NamedTuple):
    """How much a refinement may take, bytes, for networks with N and M channels.

    `base` is what the process holds without any picture, `per_latent` what it keeps per element of
    y. What a picture takes was measured on a CPU, at N = 64 and 192, up to 24 megapixels.
    """

    N: int
    M: int
    limit: float
    base: float
    per_latent: float = 160

    def needed(self, size: tuple[int, int], images: int = 1, tile: int | None = None) -> float:
        """Bytes that refining so many images of H, W takes, whole or in tiles."""
        pixels = images * size[0] * size[1]
        kept = pixels * (PER_PIXEL + self.per_latent * self.M / STRIDE**2)
        seen = pixels
        if tile is not None:
            seen = min(pixels, images * (STRIDE * (tile + 2 * HALO)) ** 2)
        return self.base + kept + seen * PER_ACTIVATION * self.N

    def images(self, size: tuple[int, int]) -> int:
        """How many whole images of H, W fit together, 1 at least."""
        one = self.needed(size) - self.base
        return max(1, int((self.limit - self.base) / one))

    def tile(self, size: tuple[int, int]) -> int | None:
        """None where one whole image of H, W fits, else the side of the largest tile that does.

        Raises:
            InputError: none does.
        """
        for side in (None, *TILES):
            if self.needed(size, tile=side) <= self.limit:
                return side
        least = math.ceil(self.needed(size, tile=TILES[-1]) / 1e7) / 100
        raise InputError(
            f"{size[1]}x{size[0]} pixels need {least:.2f} GB even in the smallest tiles "
            f"({self.base / 1e9:.1f} GB are taken without any picture); "
            f"max_memory_gb is {self.limit / 1e9:.2f}"
        )


def memory_bound(
    N: int,
    M: int,
    max_memory_gb: float | None,
    device: torch.device,
    one_for_all: bool = False,
    vectors: int = 0,
) -> MemoryBound:
    """The bound that a config sets; else 0.9 of a GPU's memory, or 0.75 of the machine's.

    Processes that share a GPU or a machine share its memory.

    Args:
        one_for_all: all processes of this machine use this one GPU.
        vectors: how many vectors like the latents an optimizer keeps beyond Adam's two.

    Raises:
        InputError: see `processes_here`.
    """
    on_gpu = device.type == "cuda"
    processes = processes_here()
    if max_memory_gb is not None:
        limit = max_memory_gb * 1e9
    elif on_gpu:
        sharing = processes if one_for_all else -(-processes // torch.cuda.device_count())
        limit = 0.9 * torch.cuda.get_device_properties(device).total_memory / sharing
    else:
        limit = 0.75 * _machine_memory() / processes
    per_latent = MemoryBound._field_defaults["per_latent"] + 4 * vectors
    return MemoryBound(N, M, limit, 0.2e9 if on_gpu else 1.3e9, per_latent)


def _machine_memory() -> float:
    """Bytes of this machine, or of the container that this process runs in."""
    limits = [float(psutil.virtual_memory().total)]
    for file in ("memory.max", "memory/memory.limit_in_bytes"):  # cgroups, version 2 and 1
        path = Path("/sys/fs/cgroup") / file
        if path.is_file() and path.read_text().strip().isdigit():
            limits.append(float(path.read_text()))
    return min(limits)
