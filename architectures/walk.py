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
from typing import NamedTuple, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from common.compressai import EntropyModel

Latents = dict[str, Tensor]  # by name: y [B, M, h, w], z [B, N, h', w'] and the like
Shape = tuple[int, int, int, int]


class Distribution(Protocol):
    """The distribution of a group's values, as rates and the entropy coder need it."""

    def likelihood(self, v_hat: Tensor) -> Tensor:
        """p(v_hat) of each symbol, shaped as v_hat, in [1e-9, 1], in float32 or float64."""

    def fixed_at(self, v_hat: Tensor) -> "Distribution":
        """The distribution of each symbol while all others stay as in v_hat."""


@runtime_checkable
class TableDistribution(Distribution, Protocol):
    """A distribution that one of CompressAI's coding tables approximates for each symbol."""

    @property
    def coder(self) -> EntropyModel:
        """What turns symbols into bytes and back."""

    def indexes(self, shape: Shape) -> Tensor:
        """The index of each symbol's coding table, int32 [1, C, h, w], for this shape."""


# Called with positions [n], scales and means [n, C]; returns the symbols there, [n, C].
SymbolsAt = Callable[[Tensor, Tensor, Tensor], Tensor]


@runtime_checkable
class TurnDistribution(Distribution, Protocol):
    """A distribution that depends on the group's own symbols, which are therefore coded in turn."""

    def in_turn(self, shape: Shape, symbols_at: SymbolsAt) -> Tensor:
        """Ask for the symbols of a latent of this shape, some positions at a time.

        Args:
            symbols_at: gets positions among h * w, and the Gaussians there. It returns the symbols.

        Returns:
            All symbols, int32 [1, C, h, w].
        """


class Part(NamedTuple):
    """The symbols of a latent that form a group: some of its channels, at some positions.

    channels: None for all. positions: indexes into the h * w positions, int64 [n]; None for all.
    The values of a part are [B, c, h, w], or [B, c, 1, n] where it has positions.
    """

    channels: slice | None = None
    positions: Tensor | None = None

    def of(self, v: Tensor) -> Tensor:
        """The part of a whole latent [B, C, h, w]."""
        v = v if self.channels is None else v[:, self.channels]
        return v if self.positions is None else v.flatten(2)[:, :, None, self.positions]

    def write(self, whole: Tensor, values: Tensor) -> None:
        """Write the values of this part into a whole latent, in place."""
        target = whole if self.channels is None else whole[:, self.channels]
        if self.positions is None:
            target.copy_(values)
        else:
            target.flatten(2)[:, :, self.positions] = values[:, :, 0]

    def shape_in(self, shape: Shape) -> Shape:
        """The shape of this part's values in a latent of this shape [B, C, h, w]."""
        batch, channels, height, width = shape
        channels = len(range(channels)[self.channels or slice(None)])
        if self.positions is None:
            return batch, channels, height, width
        return batch, channels, 1, len(self.positions)


WHOLE = Part()


class Group(NamedTuple):
    """Symbols that are coded together.

    name: the name of the latent. centre: the offset of the lattice, which is `step` times the
    integers plus `centre`; its shape broadcasts to the part's values. distribution: of the values;
    it has an attribute `step` too if that is not 1. part: which symbols of the latent. step: the
    distance of two points of the lattice.
    """

    name: str
    centre: Tensor
    distribution: Distribution
    part: Part = WHOLE
    step: float = 1.0

    def in_steps(self, v: Tensor) -> Tensor:
        """The part's values in steps from the centre, shaped as v, not rounded."""
        centred = v - self.centre
        return centred if self.step == 1 else centred / self.step

    def on_lattice(self, symbols: Tensor) -> Tensor:
        """The part's values of integers, or of their relaxation; inverts `in_steps`."""
        if self.step == 1:
            return symbols + self.centre
        # float32 is too coarse for the integers of a float64 centre
        exact = symbols.to(torch.result_type(symbols, self.centre))
        return exact * self.step + self.centre


ValueOf = Callable[[Group], Tensor]
Rounding = Callable[[Tensor], Tensor]


class Walk(NamedTuple):
    """The result of a walk.

    groups: all groups in coding order. group_values: the value of each group, on its lattice.
    shapes: of the whole latents. y_hat: what `Architecture.synthesize` turns into a picture.
    """

    groups: tuple[Group, ...]
    group_values: tuple[Tensor, ...]
    shapes: Mapping[str, Shape]
    y_hat: Tensor

    @property
    def values(self) -> Latents:
        """The value of each latent, on its lattice, by name."""
        return self.whole(self.group_values)

    @property
    def group_likelihoods(self) -> tuple[Tensor, ...]:
        """The likelihood of each group's values, shaped as these."""
        return tuple(
            group.distribution.likelihood(value)
            for group, value in zip(self.groups, self.group_values, strict=True)
        )

    @property
    def likelihoods(self) -> Latents:
        """The likelihood of each latent's values, shaped as the latent, in coding order."""
        return self.whole(self.group_likelihoods)

    def rated_by(self, value_of: ValueOf) -> Self:
        """The same walk and y_hat, but with other values, from which the likelihoods follow."""
        return self._replace(group_values=tuple(map(value_of, self.groups)))

    def whole(self, of_groups: tuple[Tensor, ...]) -> Latents:
        """One tensor for each latent, from one for each group."""
        latents: Latents = {}
        for group, values in zip(self.groups, of_groups, strict=True):
            if group.part is WHOLE:
                latents[group.name] = values
                continue
            if group.name not in latents:
                shape = (len(values), *self.shapes[group.name][1:])
                latents[group.name] = values.new_zeros(shape)
            group.part.write(latents[group.name], values)
        return latents


def rounded(latents: Latents, rounding: Rounding) -> ValueOf:
    """A `value_of` that rounds each group's latent around the group's centre.

    Args:
        rounding: rounds a centred latent, whose lattice is the integers, and keeps its shape.
    """
    return lambda g: g.on_lattice(rounding(g.in_steps(g.part.of(latents[g.name]))))


def placed(symbols: Mapping[str, Tensor]) -> ValueOf:
    """A `value_of` that puts known integers on each group's lattice: step * symbols + centre."""
    return lambda group: group.on_lattice(group.part.of(symbols[group.name]))


def checkerboard(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The positions of the anchors and of the others, for `Part`, row by row (arXiv 2103.15306).

    An anchor's row and column are both even or both odd.
    """
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
    parity = ((rows[:, None] + columns) % 2).flatten()
    return (parity == 0).nonzero()[:, 0], (parity == 1).nonzero()[:, 0]


def merged(values: tuple[Tensor, ...], positions: tuple[Tensor, ...], shape: Shape) -> Tensor:
    """The tensor [B, c, h, w] of parts [B, c, 1, n], which together have every position once."""
    order = torch.cat(positions).argsort()
    return torch.cat(values, 3)[:, :, 0, order].unflatten(2, shape[2:])
