"""The objective, rate + lambda * distortion, and the problem that refinement solves.

Only this module weighs the distortion. A new distortion is a function with the decorator
`distortion`.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from typing import Any, NamedTuple, Self, TypeVar

import torch
from torch import Tensor

from architectures import Architecture, Latents, Walk
from architectures.walk import Rounding, rounded
from common.errors import InputError
from fast.structural import ms_ssim, weighs_nothing
from fast.tiles import tiled_error
from metrics import bits_per_pixel, mean_squared_error, per_value
from schemas.base import MS_SSIM_MIN_SIDE, ModelOfLambda

Value = TypeVar("Value", float, Tensor)
# Of x_hat and x [B, 3, H, W] in floats, and the weights [B, 1, H, W] of pixels, if any: [B].
DistortionOf = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class Distortion(NamedTuple):
    """A distortion that a loss can have, and what it needs.

    of: the function of pictures. scale: its factor in the loss beside lambda. least_side: of an
    image, in pixels. weighs_nothing: whether weights [B, 1, H, W] leave an image without any;
    None: no weights do that. is_mse: whether it is the mean squared error, which is fused with the
    decoder, and which alone the polish knows.
    """

    name: str
    of: DistortionOf
    scale: float
    least_side: int = 1
    is_mse: bool = False
    weighs_nothing: Callable[[Tensor], bool] | None = None


DISTORTIONS: dict[str, Distortion] = {}


def distortion(
    name: str, scale: float = 1.0, **needs: Any
) -> Callable[[DistortionOf], DistortionOf]:
    """Decorator: register a function of pictures as the `objective` of that name in configs.

    Args:
        needs: further fields of `Distortion`.
    """

    def register(function: DistortionOf) -> DistortionOf:
        DISTORTIONS[name] = Distortion(name, function, scale, **needs)
        return function

    return register


# The MSE of pixels in [0, 1]: the loss is bpp + lambda * 255^2 * MSE (arXiv 2401.17789).
distortion("mse", scale=255**2, is_mse=True)(mean_squared_error)


@distortion("ms-ssim", least_side=MS_SSIM_MIN_SIDE, weighs_nothing=weighs_nothing)
def ms_ssim_distortion(x_hat: Tensor, x: Tensor, weights: Tensor | None) -> Tensor:
    """1 - MS-SSIM; the loss is bpp + lambda * (1 - MS-SSIM), as CompressAI's models have it."""
    return 1 - ms_ssim(x_hat, x, weights)


@dataclass(frozen=True)
class RateDistortion:
    """The loss bpp + lambda * scale * distortion.

    name: of the distortion, a key of `DISTORTIONS`.
    """

    lmbda: float
    name: str = "mse"

    @property
    def distortion(self) -> Distortion:
        """What the loss counts beside the rate."""
        return DISTORTIONS[self.name]

    @property
    def weight(self) -> float:
        """The factor of the distortion in the loss."""
        return self.lmbda * self.distortion.scale

    def __call__(self, bpp: Value, distortion: Value) -> Value:
        """The loss of a rate (bpp) and a distortion, both floats or both tensors [B]."""
        return bpp + self.weight * distortion

    def at(self, lmbda: float) -> Self:
        """The same loss with another lambda."""
        return replace(self, lmbda=lmbda)

    def bits_per_error(self, channels: int = 3) -> float:
        """How many bits weigh as much as 1 of an image's summed squared error.

        Raises:
            ValueError: the distortion is not the MSE.
        """
        if not self.distortion.is_mse:
            raise ValueError(f"{self.name} is no squared error")
        return self.weight / channels


def objective_of(config: ModelOfLambda, lmbda: float) -> RateDistortion:
    """The loss of a config.

    Raises:
        InputError: there is no such objective.
    """
    if config.objective not in DISTORTIONS:
        known = ", ".join(DISTORTIONS)
        raise InputError(f"objective = {config.objective!r}: there are {known}")
    return RateDistortion(lmbda, config.objective)


class Terms(NamedTuple):
    """The results of one forward pass over B images.

    loss, bpp, distortion, mse: [B]; of pixels that are not clamped to [0, 1]. distortion: what the
    loss counts. mse: always the plain MSE, with a gradient only if it is the distortion. rates: the
    bpp [B] of each latent, and of `told` if the problem has `told_bits`. walk: the groups and their
    values after rounding, relaxed or true. x_hat: [B, 3, H, W], without a gradient if the decoder
    is fused with the error.
    """

    loss: Tensor
    bpp: Tensor
    rates: dict[str, Tensor]
    distortion: Tensor
    mse: Tensor
    walk: Walk
    x_hat: Tensor


@dataclass(frozen=True)
class Problem:
    """The task to minimise the loss of images over their latents, under a fixed model.

    x: [B, 3, H, W] in [0, 1]. tile: the side, in positions of y, of the tiles that g_s decodes one
    by one; None decodes the whole image at once, as does a model without a halo. precision: of the
    networks in relaxed passes and within `in_precision`; another one than float32 goes through
    autocast. weights: [B, 1, H, W], with mean 1 in each image: how much each pixel's distortion
    counts; None: all count alike. told_bits: of what a file tells the decoder beside the latents;
    None: files tell nothing.
    """

    model: Architecture
    x: Tensor
    objective: RateDistortion
    tile: int | None = None
    precision: torch.dtype = torch.float32
    weights: Tensor | None = None
    told_bits: int | None = None

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
        return replace(self, objective=self.objective.at(lmbda))

    def in_float32(self) -> Self:
        """The same problem with float32 as its precision."""
        return replace(self, precision=torch.float32)

    def images(self) -> Iterable[Self]:
        """One problem for each image."""
        weights = [None] * len(self.x) if self.weights is None else self.weights.split(1)
        return (
            replace(self, x=x, weights=own) for x, own in zip(self.x.split(1), weights, strict=True)
        )

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
            distortion, x_hat = self.distortion(walk.y_hat)
        return self._terms(walk, distortion, x_hat)

    def true(self, latents: Latents) -> Terms:
        """The terms after true rounding, in float32, as a file of these latents would have them."""
        walk = self.model.round(latents, torch.round, self.size)
        return self._terms(walk, *self.distortion(walk.y_hat))

    def in_precision(self) -> AbstractContextManager:
        """Autocast to `precision`; float32 changes nothing: an outer autocast stays in force."""
        if self.precision == torch.float32:
            return nullcontext()
        return torch.autocast(self.x.device.type, dtype=self.precision)

    def distortion(self, y_hat: Tensor) -> tuple[Tensor, Tensor]:
        """The distortion [B] of x_hat with a gradient to y_hat [B, M, h, w], and x_hat."""
        if self.objective.distortion.is_mse:
            error, x_hat = self.squared_error(y_hat)
            return per_value(error, self.x), x_hat
        x_hat = self.model.synthesize(y_hat, self.size, self.tile)
        distortion = self.objective.distortion.of(x_hat, self.x, self.weights)
        if distortion.shape != self.x.shape[:1]:
            raise InputError(
                f"objective {self.objective.name}: its function gives {tuple(distortion.shape)} "
                f"values for {len(self.x)} images; one for each is wanted"
            )
        return distortion, x_hat

    def squared_error(self, y_hat: Tensor, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The summed squared error [B] of x_hat, weighted, with a gradient to y_hat, and x_hat.

        The sum is in float64.

        Args:
            y_hat: [B, M, h, w].
            x: the target [B, 3, H, W]; the problem's images by default.
        """
        x = self.x if x is None else x
        if self.tile is None or self.model.halo is None:
            return self.model.squared_error(y_hat, x, weights=self.weights)
        tiling = self.tile, self.model.halo
        return tiled_error(self.model.squared_error, y_hat, x, tiling, self.weights)

    def _terms(self, walk: Walk, distortion: Tensor, x_hat: Tensor) -> Terms:
        rates: dict[str, Tensor] = {}
        for group, p in zip(walk.groups, walk.group_likelihoods, strict=True):
            bpp = bits_per_pixel(p, self.pixels)
            rates[group.name] = rates[group.name] + bpp if group.name in rates else bpp
        if self.told_bits is not None:
            rates["told"] = torch.full_like(distortion, self.told_bits / self.pixels)
        bpp, mse = reduce(add, rates.values()), distortion
        if self.weights is not None or not self.objective.distortion.is_mse:
            mse = mean_squared_error(x_hat.detach(), self.x)
        loss = self.objective(bpp, distortion)
        return Terms(loss, bpp, rates, distortion, mse, walk, x_hat)
