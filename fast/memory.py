"""The memory that a refinement takes, and the tiles that make an image fit into it."""

import math
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from common.errors import InputError
from common.processes import processes_here
from fast.tiles import HALO, STRIDE

TILES = (256, 128, 64, 32, 16)  # sides, in positions of y
# Bytes for each pixel: for each of the N channels inside g_s, and for the image.
PER_ACTIVATION, PER_PIXEL = 9, 150


class MemoryBound(NamedTuple):
    """The memory that a refinement needs and may take, in bytes, with N and M channels.

    `limit` is the memory that it may take, `base` the memory of the process without any image, and
    `per_latent` the memory for one element of y. The constants were measured on a CPU, at N = 64
    and 192, with up to 24 megapixels.
    """

    N: int
    M: int
    limit: float
    base: float
    per_latent: float = 160

    def needed(self, size: tuple[int, int], images: int = 1, tile: int | None = None) -> float:
        """Bytes to refine this many images of size (H, W), whole or in tiles of side `tile`."""
        pixels = images * size[0] * size[1]
        kept = pixels * (PER_PIXEL + self.per_latent * self.M / STRIDE**2)
        seen = pixels
        if tile is not None:
            seen = min(pixels, images * (STRIDE * (tile + 2 * HALO)) ** 2)
        return self.base + kept + seen * PER_ACTIVATION * self.N

    def images(self, size: tuple[int, int]) -> int:
        """How many whole images of size (H, W) fit together, at least 1."""
        one = self.needed(size) - self.base
        return max(1, int((self.limit - self.base) / one))

    def tile(self, size: tuple[int, int]) -> int | None:
        """The side of the largest tile that fits, in positions of y; None if the whole image fits.

        Args:
            size: H, W of the image.

        Raises:
            InputError: no tile fits.
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
    share_one_gpu: bool = False,
    extra_vectors: int = 0,
) -> MemoryBound:
    """The memory bound of a config: `max_memory_gb`, or else 0.9 of a GPU's or 0.75 of all memory.

    Processes on the same GPU or machine share its memory equally.

    Args:
        share_one_gpu: whether all processes of this machine use the same GPU.
        extra_vectors: how many copies of the latents an optimizer keeps in addition to Adam's two.

    Raises:
        InputError: see `processes_here`.
    """
    on_gpu = device.type == "cuda"
    processes = processes_here()
    if max_memory_gb is not None:
        limit = max_memory_gb * 1e9
    elif on_gpu:
        sharing = processes if share_one_gpu else -(-processes // torch.cuda.device_count())
        limit = 0.9 * torch.cuda.get_device_properties(device).total_memory / sharing
    else:
        limit = 0.75 * _machine_memory() / processes
    per_latent = MemoryBound._field_defaults["per_latent"] + 4 * extra_vectors
    return MemoryBound(N, M, limit, 0.2e9 if on_gpu else 1.3e9, per_latent)


def _machine_memory() -> float:
    """The memory in bytes of this machine, or of the container of this process."""
    limits = [float(psutil.virtual_memory().total)]
    for file in ("memory.max", "memory/memory.limit_in_bytes"):  # cgroups, version 2 and 1
        path = Path("/sys/fs/cgroup") / file
        if path.is_file() and path.read_text().strip().isdigit():
            limits.append(float(path.read_text()))
    return min(limits)
