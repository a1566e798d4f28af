"""Reuse of memory: the pages of freed tensors, and a pool of large tensors.

Without reuse, page faults would take half as long as the convolutions of a refinement step.
"""

import ctypes
import sys
import weakref
from bisect import bisect_left, insort
from collections import deque

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 64  # bytes, one cache line
# The thresholds' names in glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def keep_pages() -> bool:
    """Make this process keep freed memory for the next tensor; returns whether that worked.

    glibc returns large blocks to the system at once. Then a new tensor causes a page fault every
    4 kB, which takes up to half of a refinement step. Without glibc this does nothing.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # Older versions of glibc allow at most 32 MB for this threshold.
    kept = mallopt(M_MMAP_THRESHOLD, 2**31 - 1) or mallopt(M_MMAP_THRESHOLD, 2**25)
    return bool(kept and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


class Pool:
    """Memory blocks for large tensors; a block is reused as soon as no tensor uses it.

    glibc seldom puts an aligned block where a freed one of the same size was. So without a pool a
    process that keeps its pages would need twice the memory.
    """

    SLACK = 1.5  # a reused block may be this many times larger than needed

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []  # bytes, the smallest first
        # Blocks of dead tensors. Any thread may append one; `_block_of` moves them to `_free`.
        self._returned: deque[np.ndarray] = deque()

    def __reduce__(self) -> tuple:
        return Pool, ()  # a copy of a model needs no copy of unused memory

    def clear(self) -> None:
        """Free all unused blocks, for example before images of another size."""
        self._returned.clear()
        self._free.clear()

    def empty(self, like: Tensor, *shape: int) -> Tensor:
        """An uninitialised channels-last tensor [B, C, H, W] of like's device and dtype.

        On other devices than a CPU, torch allocates it.
        """
        batch, channels, height, width = shape
        strides = (height * width * channels, 1, width * channels, channels)
        if like.device.type != "cpu":
            return torch.empty_strided(shape, strides, dtype=like.dtype, device=like.device)
        size = batch * strides[0] * like.element_size()
        block = self._block_of(size + ALIGNMENT)
        start = -block.ctypes.data % ALIGNMENT
        lease = block[start : start + size]  # the storage keeps it until the last tensor dies
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
            self._free.pop(index - 1)  # the new block, a little larger, replaces it
        return np.empty(size, np.uint8)
