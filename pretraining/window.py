"""Means and speeds over the steps between two lines of the training log."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from common.numbers import mean_of_known
from common.processes import Ranks, gather


class Window:
    """Means over the steps since the last `read`; sums stay on the device until then."""

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
        """Count a step.

        Args:
            terms: of `train_step`; None for a step that changed nothing.
            waited: the seconds that the step waited for data.
        """
        self._steps += 1
        self._waited += waited
        if terms is not None:
            self._good += 1
            for key, value in terms.items():
                self._sums[key] = self._sums.get(key, 0) + value

    @contextmanager
    def stopped_clock(self) -> Iterator[None]:
        """Leave the time spent in the block out of the speeds."""
        paused = time.perf_counter()
        yield
        self._started += time.perf_counter() - paused

    def read(self) -> dict[str, float | None]:
        """Read the window and start a new one; every rank must call this.

        Returns:
            loss, psnr (dB), bpp, bpp_y, bpp_z and aux_loss, means over steps and ranks; None where
            no step was good. steps_per_second, images_per_second, and data_wait_share in [0, 1].
        """
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
