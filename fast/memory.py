"""The memory that a refinement takes, and the tiles that make an image fit into it."""

import math
from pathlib import Path
from typing import NamedTuple, Protocol

import psutil
import torch

from common.errors import InputError
from common.processes import processes_here
from fast.tiles import STRIDE

TILES = (256, 128, 64, 32, 16)  # sides, in positions of y


class PixelBytes(Protocol):
    """The bytes that refinement takes for each pixel; see `architectures.footprint`."""

    @property
    def whole(self) -> float:
        """For each pixel of the picture."""

    @property
    def seen(self) -> float:
        """For each pixel that g_s decodes at a time."""

    @property
    def halo(self) -> int | None:
        """Of a tile, in positions of y; None: pictures are not cut into tiles."""


class MemoryBound(NamedTuple):
    """The memory that a refinement needs and may take, in bytes.

    `limit` is the memory that it may take, `base` the memory of the process without any image.
    """

    footprint: PixelBytes
    limit: float
    base: float

    def needed(self, size: tuple[int, int], images: int = 1, tile: int | None = None) -> float:
        """Bytes to refine this many images of size (H, W), whole or in tiles of side `tile`."""
        pixels = seen = images * size[0] * size[1]
        if tile is not None and self.footprint.halo is not None:
            seen = min(pixels, images * (STRIDE * (tile + 2 * self.footprint.halo)) ** 2)
        return self.base + pixels * self.footprint.whole + seen * self.footprint.seen

    def images(self, size: tuple[int, int]) -> int:
        """How many whole images of size (H, W) fit together, at least 1."""
        one = self.needed(size) - self.base
        return max(1, int((self.limit - self.base) / one))

    def largest(self) -> float:
        """The pixels of the largest picture that fits, in the smallest tiles if there are any."""
        room, footprint = self.limit - self.base, self.footprint
        if footprint.halo is None:
            return room / (footprint.whole + footprint.seen)
        seen = (STRIDE * (TILES[-1] + 2 * footprint.halo)) ** 2
        as_whole = room / (footprint.whole + footprint.seen)
        return max(as_whole, (room - seen * footprint.seen) / footprint.whole)

    def tile(self, size: tuple[int, int]) -> int | None:
        """The side of the largest tile that fits, in positions of y; None if the whole image fits.

        Args:
            size: H, W of the image.

        Raises:
            InputError: no tile fits.
        """
        sides = (None,) if self.footprint.halo is None else (None, *TILES)
        for side in sides:
            if self.needed(size, tile=side) <= self.limit:
                return side
        least = math.ceil(self.needed(size, tile=sides[-1]) / 1e7) / 100
        how = "even in the smallest tiles" if sides[-1] else "and this model has no tiles"
        raise InputError(
            f"{size[1]}x{size[0]} pixels need {least:.2f} GB {how} "
            f"({self.base / 1e9:.1f} GB are taken without any picture); "
            f"max_memory_gb is {self.limit / 1e9:.2f}"
        )


def memory_bound(
    footprint: PixelBytes,
    max_memory_gb: float | None,
    device: torch.device,
    share_one_gpu: bool = False,
) -> MemoryBound:
    """The memory bound of a config: `max_memory_gb`, or else 0.9 of a GPU's or 0.75 of all memory.

    Processes on the same GPU or machine share its memory equally.

    Args:
        share_one_gpu: whether all processes of this machine use the same GPU.

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
    return MemoryBound(footprint, limit, 0.2e9 if on_gpu else 1.3e9)


def _machine_memory() -> float:
    """The memory in bytes of this machine, or of the container of this process."""
    limits = [float(psutil.virtual_memory().total)]
    for file in ("memory.max", "memory/memory.limit_in_bytes"):  # cgroups, version 2 and 1
        path = Path("/sys/fs/cgroup") / file
        if path.is_file() and path.read_text().strip().isdigit():
            limits.append(float(path.read_text()))
    return min(limits)
