"""Hyperpriors: a Gaussian for each symbol of y, predicted from z.

The mean-scale hyperprior of Minnen, Balle, Toderici 2018 (arXiv 1809.02736), and the scale
hyperprior of Balle, Minnen, Singh, Hwang, Johnston 2018 (arXiv 1802.01436).
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from architectures.base import Architecture, architecture, continued
from architectures.distributions import FactorizedPrior, Gaussians
from architectures.walk import Group, Latents, Shape, ValueOf
from common.compressai import (
    MeanScaleHyperprior,
    ScaleHyperprior,
    bmshj2018_hyperprior,
    mbt2018_mean,
)


class Hyperprior(Architecture):
    """A model with latents y and z, whose z lies on the integers + medians.

    y is [B, M, ceil(H/16), ceil(W/16)], z is [B, N, ceil(H/64), ceil(W/64)]. The names of its
    networks are those of CompressAI's hyperpriors; a family with other names replaces `hyper`.
    """

    scales_lattice = True

    @property
    def hyper(self) -> Any:
        """What has the networks h_a and h_s and the entropy bottleneck."""
        return self.network

    def latent_shapes(self, size: tuple[int, int]) -> dict[str, Shape]:
        """See `Architecture`."""
        height, width = size
        return {
            "y": (1, self.M, -(-height // 16), -(-width // 16)),
            "z": (1, self.N, -(-height // 64), -(-width // 64)),
        }

    def encode(self, x: Tensor, g_a: Callable[[Tensor], Tensor]) -> Latents:
        """See `Architecture`."""
        y = g_a(x)  # [B, M, ceil(H/16), ceil(W/16)]
        return {"y": y, "z": self.hyper.h_a(continued(y, 4))}  # z [B, N, ceil(H/64), ceil(W/64)]

    def hyper_params(self, size: tuple[int, int], value_of: ValueOf) -> Tensor:
        """What h_s predicts from z_hat, cropped to y's size: [B, C, h, w]."""
        prior = FactorizedPrior(self.hyper.entropy_bottleneck)
        z_hat = value_of(Group("z", prior.medians, prior))
        height, width = self.latent_shapes(size)["y"][2:]
        return self.hyper.h_s(z_hat)[:, :, :height, :width]


@architecture("mbt2018-mean")
class MeanScale(Hyperprior):
    """A model with latents y and z: h_s predicts a Gaussian for each symbol of y from z.

        x -> g_a -> y -> h_a -> z        encoder: the latents that refinement begins with
        z_hat on the integers + medians, under the factorised prior
        scales, means = h_s(z_hat)       cropped to y's size
        y_hat on the integers + means, under the Gaussians
        x_hat = g_s(y_hat)               cropped to x's size, so x may have any size

    y is [B, M, ceil(H/16), ceil(W/16)], z is [B, N, ceil(H/64), ceil(W/64)].
    """

    network_class = MeanScaleHyperprior
    zoo = MappingProxyType({"mbt2018-mean": (mbt2018_mean, 8)})
    halo = 2  # four 5x5 layers, each at twice the resolution: 1 + 1/2 + 1/4 + 1/8

    @classmethod
    def mismatch(cls, weights: Mapping[str, Tensor]) -> str:
        """See `Architecture`."""
        scales_only = "h_s gives no means: a scale hyperprior, as bmshj2018-hyperprior"
        return super().mismatch(weights) or (scales_only if _has_one_scale(weights) else "")

    def walk(self, size: tuple[int, int], value_of: ValueOf) -> Tensor:
        """See `Architecture`."""
        scales, means = self.hyper_params(size, value_of).chunk(2, dim=1)  # [B, M, h, w]
        gaussians = Gaussians(self.network.gaussian_conditional, scales, means, self.lattice)
        return value_of(Group("y", means, gaussians, step=self.lattice))


@architecture("bmshj2018-hyperprior")
class Scale(Hyperprior):
    """A model with latents y and z: h_s predicts the scale of each symbol of y from z.

    As `MeanScale`, but y lies on the integers, every mean is 0, and h_a sees |y|.
    """

    network_class = ScaleHyperprior
    zoo = MappingProxyType({"bmshj2018-hyperprior": (bmshj2018_hyperprior, 8)})
    halo = 2

    @classmethod
    def mismatch(cls, weights: Mapping[str, Tensor]) -> str:
        """See `Architecture`."""
        other = "h_s gives means: a mean-scale hyperprior, as mbt2018-mean"
        return super().mismatch(weights) or ("" if _has_one_scale(weights) else other)

    def encode(self, x: Tensor, g_a: Callable[[Tensor], Tensor]) -> Latents:
        """See `Architecture`."""
        y = g_a(x)
        return {"y": y, "z": self.network.h_a(continued(y, 4).abs())}

    def walk(self, size: tuple[int, int], value_of: ValueOf) -> Tensor:
        """See `Architecture`."""
        scales = self.hyper_params(size, value_of)  # [B, M, h, w]
        zeros = torch.zeros_like(scales)
        gaussians = Gaussians(self.network.gaussian_conditional, scales, zeros, self.lattice)
        return value_of(Group("y", zeros, gaussians, step=self.lattice))


def _has_one_scale(weights: Mapping[str, Tensor]) -> bool:
    """Whether h_s has as many results as y has channels."""
    return weights["h_s.4.weight"].shape[:1] == weights["g_a.6.weight"].shape[:1]
