"""Memory that is kept: pages of freed tensors, and a pool of large tensors.

Page faults for its many temporaries would take as long as half of a refinement step's convolutions.
"""

import ctypes
import sys
import weakref
from bisect import bisect_left, insort
from collections import deque

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 64  # bytes, of a cache line
# glibc's names for the two thresholds, of malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def keep_pages() -> bool:
    """Let this process keep the memory that it frees, for the next tensor; whether that took.

    glibc gives large blocks back to the system at once, and each new tensor then costs a page fault
    every 4 kB: up to half of a refinement step. Without glibc nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # Older versions know no threshold above 32 MB for single blocks.
    kept = mallopt(M_MMAP_THRESHOLD, 2**31 - 1) or mallopt(M_MMAP_THRESHOLD, 2**25)
    return bool(kept and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


class Pool:
    """Memory of large tensors, handed out again as soon as no tensor uses it any more.

    glibc seldom gives an aligned block the place of an equal one, so that a process that keeps its
    pages would grow to twice what it needs.
    """

    SLACK = 1.5  # so many times as large as needed a block may be

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []  # bytes, the smallest first
        # What tensors let go of, at any time and in any thread; sorted in when memory is wanted.
        self._returned: deque[np.ndarray] = deque()

    def __reduce__(self) -> tuple:
        return Pool, ()  # a copy of a model needs no copy of unused memory

    def clear(self) -> None:
        """Give back what nobody uses: pictures of another size come."""
        self._returned.clear()
        self._free.clear()

    def empty(self, like: Tensor, *shape: int) -> Tensor:
        """An uninitialised channels-last tensor [B, C, H, W] on like's device, of like's type.

        On other devices than a CPU it comes from torch.
        """
        batch, channels, height, width = shape
        strides = (height * width * channels, 1, width * channels, channels)
        if like.device.type != "cpu":
            return torch.empty_strided(shape, strides, dtype=like.dtype, device=like.device)
        size = batch * strides[0] * like.element_size()
        block = self._block_of(size + ALIGNMENT)
        start = -block.ctypes.data % ALIGNMENT
        lease = block[start : start + size]  # the storage holds it, so it dies with the last tensor
        weakref.finalize(lease, self._returned.append, block).atexit = False
        storage = torch.from_numpy(lease).untyped_storage()
        return torch.empty(0, dtype=like.dtype).set_(storage, 0, shape, strides)

    def _block_of(self, size: int) -> np.ndarray:
        while self._returned:
            insort(self._free, self._returned.popleft(), key=len)
        index = bisect_left(self._free, size, key=len)
        if index < len(self._free) and len(self._free[index]) <= self.SLACK * size:
            return self._free.pop(index)
        if index > 0 and len(self._free[index - 1]) * self.SLACK > size:
            self._free.pop(index - 1)  # a larger one takes its place
        return np.empty(size, np.uint8)
