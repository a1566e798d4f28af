"""A walk through the groups of symbols of a model, in coding order.

A decoder works group by group. Each group of symbols has a distribution, which may depend on the
groups before it. After the last group the decoder has y_hat, the input of g_s. Refinement, the true
loss, polish, coding, decoding and the bit maps of a report all take the same walk. They differ only
in the function `value_of`, which returns the value of each group:

    rounded(latents, rounding)    rounds latents with `rounding`, which is relaxed or true
    placed(symbols)               takes integers that are known already
    a coder's writer or reader    takes the integers that it writes into a file or reads from one
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol, Self

from torch import Tensor

from common.compressai import EntropyModel

Latents = dict[str, Tensor]  # by name: y [B, M, h, w], z [B, N, h', w'] and the like


class Distribution(Protocol):
    """The distribution of a group's values, as rates and the entropy coder need it."""

    @property
    def coder(self) -> EntropyModel:
        """What turns symbols into bytes and back."""

    def likelihood(self, v_hat: Tensor) -> Tensor:
        """p(v_hat) of each symbol, shaped as v_hat, in [1e-9, 1], in float32 or float64."""

    def indexes(self, shape: tuple[int, ...]) -> Tensor:
        """The index of each symbol's coding table, int32 [1, C, h, w], for this shape."""


class Group(NamedTuple):
    """Symbols that are coded together.

    name: the name of the latent. centre: the offset of the lattice, which is the integers plus
    `centre`; its shape broadcasts to the latent's [B, C, h, w].
    """

    name: str
    centre: Tensor
    distribution: Distribution


ValueOf = Callable[[Group], Tensor]
Rounding = Callable[[Tensor], Tensor]


class Walk(NamedTuple):
    """The result of a walk.

    groups: all groups in coding order. values: the value of each group, on its lattice, by name.
    y_hat: [B, M, h, w], the input of g_s.
    """

    groups: tuple[Group, ...]
    values: Latents
    y_hat: Tensor

    @property
    def likelihoods(self) -> dict[str, Tensor]:
        """The likelihood of each group's values, shaped as these, in coding order."""
        return {
            group.name: group.distribution.likelihood(self.values[group.name])
            for group in self.groups
        }

    def rated_by(self, value_of: ValueOf) -> Self:
        """The same walk and y_hat, but with other values, from which the likelihoods follow."""
        return self._replace(values={group.name: value_of(group) for group in self.groups})


def rounded(latents: Latents, rounding: Rounding) -> ValueOf:
    """A `value_of` that rounds each group's latent around the group's centre.

    Args:
        rounding: rounds a centred latent, whose lattice is the integers, and keeps its shape.
    """
    return lambda group: rounding(latents[group.name] - group.centre) + group.centre


def placed(symbols: Mapping[str, Tensor]) -> ValueOf:
    """A `value_of` that puts known integers on each group's lattice: symbols + centre."""
    return lambda group: symbols[group.name] + group.centre
