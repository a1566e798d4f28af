"""A walk through a model in coding order, one step a group of symbols; what rounds is passed in.

The decoder of any model here works in steps: each group of symbols has a distribution, which may
depend on the groups before it, and the last step gives what the picture is made of. Refinement, the
true loss, polish, coding, decoding and the bit maps of a report all take the same walk. They differ
in `value_of` alone, which is asked for the value of each group:

    rounded(latents, rounding)    latents rounded as `rounding` does: relaxed or truly
    placed(symbols)               integers that are known already
    a coder's writer or reader    integers that go into a file or come out of one
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

from torch import Tensor

from common.compressai import EntropyModel

Latents = dict[str, Tensor]  # by name: y [B, M, h, w], z [B, N, h', w'] and the like


class Distribution(Protocol):
    """Of the values of a group, as rates and an entropy coder need it."""

    @property
    def coder(self) -> EntropyModel:
        """What turns symbols into bytes and back."""

    def likelihood(self, v_hat: Tensor) -> Tensor:
        """p(v_hat) of each symbol, shaped as v_hat, in [1e-9, 1], float32 at least."""

    def indexes(self, shape: tuple[int, ...]) -> Tensor:
        """Which of the coder's tables each symbol is coded with, int32 [1, C, h, w]."""


class Group(NamedTuple):
    """One step of a walk: symbols that are coded together.

    name: of the latent. centre: the lattice is the integers plus this, of a shape that broadcasts
    to the latent's [B, C, h, w].
    """

    name: str
    centre: Tensor
    distribution: Distribution


ValueOf = Callable[[Group], Tensor]
Rounding = Callable[[Tensor], Tensor]


class Walk(NamedTuple):
    """A walk that is over.

    groups: in coding order. values: of each group, on its lattice. y_hat: what g_s makes the
    picture of.
    """

    groups: tuple[Group, ...]
    values: Latents
    y_hat: Tensor

    @property
    def likelihoods(self) -> dict[str, Tensor]:
        """Of each group's values, in coding order."""
        return {
            group.name: group.distribution.likelihood(self.values[group.name])
            for group in self.groups
        }


def rounded(latents: Latents, rounding: Rounding) -> ValueOf:
    """Gives each group its latent, rounded around the group's centre.

    Args:
        rounding: maps a centred latent, which has the integers as its lattice; any shape.
    """
    return lambda group: rounding(latents[group.name] - group.centre) + group.centre


def placed(symbols: Mapping[str, Tensor]) -> ValueOf:
    """Gives each group its integer symbols, on the group's lattice."""
    return lambda group: symbols[group.name] + group.centre
