"""Means and speeds over the steps between two lines of the training log."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
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
        self._keys: tuple[str, ...] = ()
        self._sums: Tensor | None = None  # over good steps, of each key; then how many these are
        self._steps = 0
        self._waited = 0.0
        self._started = time.perf_counter()

    def add(self, terms: dict[str, Tensor], finite: Tensor) -> None:
        """Count a step.

        Args:
            terms, finite: of `train_step`; the terms of a step that changed nothing do not count.
        """
        self._steps += 1
        self._keys = tuple(terms)
        values = torch.stack([*terms.values(), torch.ones_like(terms["loss"])])
        values = torch.where(finite, values, 0)
        self._sums = values if self._sums is None else self._sums + values

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time spent in the block as waiting for data."""
        started = time.perf_counter()
        yield
        self._waited += time.perf_counter() - started

    @contextmanager
    def stopped_clock(self) -> Iterator[None]:
        """Leave the time spent in the block out of the speeds."""
        paused = time.perf_counter()
        yield
        self._started += time.perf_counter() - paused

    @property
    def _rate_keys(self) -> list[str]:
        """The names of the rates of the latents, bpp_y and others."""
        return sorted(key for key in self._keys if key.startswith("bpp_"))

    def read(self) -> dict[str, float | None]:
        """Read the window and start a new one; every rank must call this.

        Returns:
            loss, distortion, psnr (dB), bpp, the bpp of each latent and aux_loss, means over steps
            and ranks; None where no step was good. steps_per_second, images_per_second, and
            data_wait_share in [0, 1].
        """
        *sums, good = (0.0,) if self._sums is None else self._sums.tolist()
        own = {key: value / good for key, value in zip(self._keys, sums, strict=True) if good}
        seconds = time.perf_counter() - self._started
        parts = gather(self.ranks, own)
        means = {
            key: mean_of_known(part.get(key) for part in parts)
            for key in ("loss", "distortion", "psnr", "bpp", *self._rate_keys, "aux_loss")
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
