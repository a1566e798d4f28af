"""The factorised priors of Balle, Minnen, Singh, Hwang, Johnston 2018 (arXiv 1802.01436)."""

from collections.abc import Callable
from types import MappingProxyType

from torch import Tensor

from architectures.base import Architecture, architecture
from architectures.distributions import FactorizedPrior
from architectures.walk import Group, Latents, Shape, ValueOf
from common.compressai import (
    FactorizedPriorNetwork,
    FactorizedPriorReLU,
    bmshj2018_factorized,
)


@architecture("bmshj2018-factorized")
class Factorized(Architecture):
    """A model with the one latent y, [B, M, ceil(H/16), ceil(W/16)].

    x -> g_a -> y
    y_hat on the integers + medians, under one distribution for each channel
    x_hat = g_s(y_hat)
    """

    network_class = FactorizedPriorNetwork
    zoo = MappingProxyType({"bmshj2018-factorized": (bmshj2018_factorized, 8)})
    exact_parts = ()
    halo = 2
    keeps_lattice = "has no scales"

    def latent_shapes(self, size: tuple[int, int]) -> dict[str, Shape]:
        """See `Architecture`."""
        height, width = size
        return {"y": (1, self.M, -(-height // 16), -(-width // 16))}

    def encode(self, x: Tensor, g_a: Callable[[Tensor], Tensor]) -> Latents:
        """See `Architecture`."""
        return {"y": g_a(x)}

    def walk(self, size: tuple[int, int], value_of: ValueOf) -> Tensor:
        """See `Architecture`."""
        prior = FactorizedPrior(self.network.entropy_bottleneck)
        return value_of(Group("y", prior.medians, prior))


@architecture("bmshj2018-factorized-relu")
class FactorizedReLU(Factorized):
    """The same with ReLU in place of GDN. CompressAI has no trained weights of it."""

    network_class = FactorizedPriorReLU
    zoo = MappingProxyType({})
