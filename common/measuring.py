"""Measure seconds and peak memory, and describe the machine."""

import platform
import resource
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil
import torch


class Cost(NamedTuple):
    """The time and memory that refining one image took.

    seconds: the batch's seconds divided by its images. peak_memory_mb: of the whole batch.
    batch: the number of images in it.
    """

    seconds: float
    seconds_per_step: float
    peak_memory_mb: float
    batch: int


class Stopwatch:
    """Measures seconds and peak memory from its creation on, on one device."""

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            # This resets the peak on Linux; elsewhere the peak is that of the whole process.
            with suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")
        self.before = psutil.Process().memory_info().rss
        self.start = time.perf_counter()

    def read(self) -> tuple[float, float]:
        """Seconds, and the peak memory in MB: allocated on a GPU, resident on a CPU."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            peak = torch.cuda.max_memory_allocated(self.device)
        else:
            peak = _peak_resident()
        return time.perf_counter() - self.start, peak / 2**20


def _peak_resident() -> int:
    """The peak resident memory of this process, bytes."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def machine_facts(device: torch.device) -> dict[str, str | int]:
    """The machine and the versions that produced a result, for summary.json."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "device": device.type,
        "machine": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
