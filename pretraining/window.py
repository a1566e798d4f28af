"""Means and speeds between two lines of a training log."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from common.numbers import mean_of_known
from common.processes import Ranks, gather


class Window:
    """Means over the steps since the last reading, kept on the device until they are read."""

    def __init__(self, ranks: Ranks, batch_size: int):
        self.ranks = ranks
        self.batch_size = batch_size
        self._reset()

    def _reset(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._good = self._steps = 0
        self._waited = 0.0
        self._started = time.perf_counter()

    def add(self, terms: dict[str, Tensor] | None, waited: float) -> None:
        """Count a step: its terms, None if it was skipped, and the seconds it waited for data."""
        self._steps += 1
        self._waited += waited
        if terms is not None:
            self._good += 1
            for key, value in terms.items():
                self._sums[key] = self._sums.get(key, 0) + value

    @contextmanager
    def stopped_clock(self) -> Iterator[None]:
        """The time of what happens inside counts in no speed."""
        paused = time.perf_counter()
        yield
        self._started += time.perf_counter() - paused

    def read(self) -> dict[str, float | None]:
        """Means over steps and ranks, and speeds; then starts anew. Every rank must call this."""
        own = {key: value.item() / self._good for key, value in self._sums.items()}
        seconds = time.perf_counter() - self._started
        parts = gather(self.ranks, own)
        means = {
            key: mean_of_known(part.get(key) for part in parts)
            for key in ("loss", "psnr", "bpp", "bpp_y", "bpp_z", "aux_loss")
        }
        speed = self._steps / seconds
        values = {
            **means,
            "steps_per_second": speed,
            "images_per_second": speed * self.batch_size * self.ranks.world,
            "data_wait_share": self._waited / seconds,
        }
        self._reset()
        return values
