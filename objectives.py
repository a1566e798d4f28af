"""The objective, rate + lambda * distortion, and the problem that refinement solves.

Only this module weighs the distortion.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from typing import NamedTuple, Self, TypeVar

import torch
from torch import Tensor

from architectures import Architecture, Latents, Walk
from architectures.walk import Rounding, rounded
from fast.tiles import tiled_error
from metrics import bits_per_pixel

Value = TypeVar("Value", float, Tensor)


@dataclass(frozen=True)
class RateDistortion:
    """The loss bpp + lambda * 255^2 * MSE, with the MSE of pixels in [0, 1] (arXiv 2401.17789)."""

    lmbda: float

    @property
    def weight(self) -> float:
        """The factor of the MSE in the loss."""
        return self.lmbda * 255**2

    def __call__(self, bpp: Value, mse: Value) -> Value:
        """The loss of a rate (bpp) and an MSE, both floats or both tensors [B]."""
        return bpp + self.weight * mse

    def bits_per_error(self, channels: int = 3) -> float:
        """How many bits weigh as much as 1 of an image's summed squared error."""
        return self.weight / channels


class Terms(NamedTuple):
    """The results of one forward pass over B images.

    loss, bpp, mse: [B]; mse of pixels that are not clamped to [0, 1]. rates: the bpp [B] of each
    latent. walk: the groups and their values after rounding, relaxed or true. x_hat: [B, 3, H, W],
    without a gradient if the decoder is fused with the error.
    """

    loss: Tensor
    bpp: Tensor
    rates: dict[str, Tensor]
    mse: Tensor
    walk: Walk
    x_hat: Tensor


@dataclass(frozen=True)
class Problem:
    """The task to minimise the loss of images over their latents, under a fixed model.

    x: [B, 3, H, W] in [0, 1]. tile: the side, in positions of y, of the tiles that g_s decodes one
    by one; None decodes the whole image at once, as does a model without a halo. precision: of the
    networks in relaxed passes and within `in_precision`; another one than float32 goes through
    autocast.
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
        """The same problem with another lambda."""
        return replace(self, objective=RateDistortion(lmbda))

    def in_float32(self) -> Self:
        """The same problem with float32 as its precision."""
        return replace(self, precision=torch.float32)

    def images(self) -> Iterable[Self]:
        """One problem for each image."""
        return (replace(self, x=x) for x in self.x.split(1))

    def relaxed(
        self, latents: Latents, rounding: Rounding, rates_rounding: Rounding | None = None
    ) -> Terms:
        """The terms after a relaxed rounding.

        Args:
            rounding: maps a centred latent to its own shape.
            rates_rounding: another rounding, for the likelihoods alone.
        """
        with self.in_precision():
            walk = self.model.round(latents, rounding, self.size)
            if rates_rounding is not None:
                walk = walk.rated_by(rounded(latents, rates_rounding))
            error, x_hat = self.squared_error(walk.y_hat)
        return self._terms(walk, error, x_hat)

    def true(self, latents: Latents) -> Terms:
        """The terms after true rounding, in float32, as a file of these latents would have them."""
        walk = self.model.round(latents, torch.round, self.size)
        return self._terms(walk, *self.squared_error(walk.y_hat))

    def in_precision(self) -> AbstractContextManager:
        """Autocast to `precision`; float32 changes nothing: an outer autocast stays in force."""
        if self.precision == torch.float32:
            return nullcontext()
        return torch.autocast(self.x.device.type, dtype=self.precision)

    def squared_error(self, y_hat: Tensor, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The summed squared error [B] of x_hat in float64, with a gradient to y_hat, and x_hat.

        Args:
            y_hat: [B, M, h, w].
            x: the target [B, 3, H, W]; the problem's images by default.
        """
        x = self.x if x is None else x
        if self.tile is None or self.model.halo is None:
            return self.model.squared_error(y_hat, x)
        return tiled_error(self.model.squared_error, y_hat, x, (self.tile, self.model.halo))

    def _terms(self, walk: Walk, error: Tensor, x_hat: Tensor) -> Terms:
        rates: dict[str, Tensor] = {}
        for group, p in zip(walk.groups, walk.group_likelihoods, strict=True):
            bpp = bits_per_pixel(p, self.pixels)
            rates[group.name] = rates[group.name] + bpp if group.name in rates else bpp
        mse = (error / self.x[0].numel()).to(self.x.dtype)
        bpp = reduce(add, rates.values())
        return Terms(self.objective(bpp, mse), bpp, rates, mse, walk, x_hat)
