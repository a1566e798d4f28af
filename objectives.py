"""What is minimised: rate + lambda * distortion, and the problem that refinement solves by it.

This is the only place where the distortion gets its weight.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import NamedTuple, Self, TypeVar

import torch
from torch import Tensor

from architectures import Architecture, Latents
from fast.tiles import tiled_error
from metrics import bits_per_pixel

Value = TypeVar("Value", float, Tensor)


@dataclass(frozen=True)
class RateDistortion:
    """bpp + lambda * 255^2 * MSE, MSE of pixels in [0, 1] (arXiv 2401.17789)."""

    lmbda: float

    @property
    def weight(self) -> float:
        """Of the MSE."""
        return self.lmbda * 255**2

    def __call__(self, bpp: Value, mse: Value) -> Value:
        """The loss of a rate and a distortion, floats or tensors [B]."""
        return bpp + self.weight * mse

    def bits_per_error(self, channels: int = 3) -> float:
        """How many bits of an image's file weigh as much as one unit of its squared error."""
        return self.weight / channels


class Terms(NamedTuple):
    """What one pass gave: each [B] but the last two.

    loss; bpp, and `rates` of each latent, bits per pixel; mse of pixels in [0, 1], not clamped;
    values: each latent on its lattice, relaxed or true; x_hat [B, 3, H, W], which has no gradient
    where the model is frozen.
    """

    loss: Tensor
    bpp: Tensor
    rates: dict[str, Tensor]
    mse: Tensor
    values: Latents
    x_hat: Tensor


@dataclass(frozen=True)
class Problem:
    """To make the loss of pictures small by their latents alone.

    model: see `Architecture`. x: [B, 3, H, W] in [0, 1]. tile: positions of y a side that g_s sees
    at a time; None is the whole picture. precision: of g_s in relaxed passes, by autocast where it
    is not float32.
    """

    model: Architecture
    x: Tensor
    objective: RateDistortion
    tile: int | None = None
    precision: torch.dtype = torch.float32

    @property
    def size(self) -> tuple[int, int]:
        """H, W."""
        return self.x.size(2), self.x.size(3)

    @property
    def pixels(self) -> int:
        """H * W."""
        return self.x.size(2) * self.x.size(3)

    def at(self, lmbda: float) -> Self:
        """The same with another lambda."""
        return replace(self, objective=RateDistortion(lmbda))

    def images(self) -> Iterable[Self]:
        """One problem for each image."""
        return (replace(self, x=x) for x in self.x.split(1))

    def relaxed(self, latents: Latents, rounding: Callable[[Tensor], Tensor]) -> Terms:
        """The terms of latents that a relaxed rounding of centred latents rounds."""
        return self._terms(latents, rounding, self.precision)

    def true(self, latents: Latents) -> Terms:
        """The terms of truly rounded latents, in float32: what a file of them costs and gives."""
        return self._terms(latents, torch.round, torch.float32)

    def squared_error(self, y_hat: Tensor, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Sum of squared errors [B], float64, with a gradient to y_hat [B, M, h, w]; and x_hat.

        Args:
            x: what the picture should be; the problem's own without it.
        """
        x = self.x if x is None else x
        if self.tile is None:
            return self.model.squared_error(y_hat, x)
        return tiled_error(self.model.squared_error, y_hat, x, self.tile)

    def _terms(
        self, latents: Latents, rounding: Callable[[Tensor], Tensor], precision: torch.dtype
    ) -> Terms:
        walk = self.model.round(latents, rounding, self.size)
        likelihoods = walk.likelihoods
        rates = {name: bits_per_pixel(p, self.pixels) for name, p in likelihoods.items()}
        with _autocast(self.x.device.type, precision):
            error, x_hat = self.squared_error(walk.y_hat)
        mse = (error / self.x[0].numel()).to(self.x.dtype)
        bpp = torch.stack(tuple(rates.values())).sum(0)
        return Terms(self.objective(bpp, mse), bpp, rates, mse, walk.values, x_hat)


def _autocast(device_type: str, precision: torch.dtype) -> AbstractContextManager:
    """Autocast to `precision`; float32 leaves an autocast around it alone."""
    if precision == torch.float32:
        return nullcontext()
    return torch.autocast(device_type, dtype=precision)
