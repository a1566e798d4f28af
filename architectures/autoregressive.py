"""Autoregressive models: the Gaussian of a symbol also depends on the symbols decoded before.

The joint model of Minnen, Balle, Toderici 2018 (arXiv 1809.02736), and the two models of Cheng,
Sun, Takeuchi, Katto 2020 (arXiv 2001.01568).

CompressAI's `forward` feeds integers y to context and g_s, but computes rates, and codes, on the
lattice around the means. Here y lies on the integers everywhere. Then all contexts of a picture
follow from y_hat at once, and rate, picture and file agree. Only decoding goes in turn.
"""

from types import MappingProxyType
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from architectures.base import architecture
from architectures.distributions import Gaussians
from architectures.hyperpriors import Hyperprior
from architectures.walk import Group, Shape, SymbolsAt, ValueOf
from common.compressai import (
    Cheng2020Anchor,
    Cheng2020Attention,
    EntropyBottleneck,
    GaussianConditional,
    JointAutoregressiveHierarchicalPriors,
    cheng2020_anchor,
    cheng2020_attn,
    mbt2018,
)
from common.optional_packages import require_package

REACH = 2  # rows above, and columns on either side, that a context of 5x5 symbols has
# The symbols of a context: all in the rows above, and those to the left.
CONTEXT = tuple((row, column) for row in range(-REACH, 1) for column in range(-REACH, REACH + 1)
                if row < 0 or column < 0)  # fmt: skip


class ContextGaussians(NamedTuple):
    """One Gaussian for each symbol, which depends on the symbols around that come before it.

    params: what h_s predicts, [B, C, h, w]. context_prediction: a masked 5x5 convolution.
    entropy_parameters: layers that work on each position alone. step: that of the lattice.
    """

    conditional: GaussianConditional
    params: Tensor
    context_prediction: nn.Module
    entropy_parameters: nn.Module
    step: float = 1.0

    def likelihood(self, v_hat: Tensor) -> Tensor:
        """p(v_hat), [B, M, h, w] in [1e-9, 1], of all symbols at once."""
        return self._gaussians(v_hat).likelihood(v_hat)

    def fixed_at(self, v_hat: Tensor) -> Gaussians:
        """The Gaussian of each symbol in the context of v_hat, without a gradient to v_hat."""
        with torch.no_grad():
            return self._gaussians(v_hat)

    def _gaussians(self, v_hat: Tensor) -> Gaussians:
        context = self.context_prediction(v_hat)
        scales, means = self.entropy_parameters(torch.cat((self.params, context), 1)).chunk(2, 1)
        return Gaussians(self.conditional, scales, means, self.step)

    @torch.no_grad()
    def in_turn(self, shape: Shape, symbols_at: SymbolsAt) -> Tensor:
        """Ask for all symbols, wave by wave; see `TurnDistribution`.

        The symbols of a wave lie on a line of slope 1/3. None is in the context of another.
        """
        _, channels, height, width = shape
        kernel, bias = _context_matrix(self.context_prediction)  # [12 M, C], [C]
        kernel = self.step * kernel  # the context is that of y_hat, which is step times the symbols
        params = self.params[0].permute(1, 2, 0)  # [h, w, C]
        rows_around = height + REACH, width + 2 * REACH
        known = params.new_zeros(*rows_around, channels)  # with zeros around the picture
        table = known.view(-1, channels)
        steps = torch.tensor([row * rows_around[1] + column for row, column in CONTEXT])
        for wave in range(width + (REACH + 1) * (height - 1)):
            rows = torch.arange(height)
            columns = wave - (REACH + 1) * rows
            inside = (columns >= 0) & (columns < width)
            rows, columns = rows[inside], columns[inside]
            if not len(rows):  # as in narrow pictures
                continue
            places = (rows + REACH) * rows_around[1] + columns + REACH  # [n]
            context = table[places[:, None] + steps].flatten(1) @ kernel + bias  # [n, C]
            both = torch.cat((params[rows, columns], context), 1).t()[None, :, :, None]
            scales, means = self.entropy_parameters(both)[0, :, :, 0].t().chunk(2, 1)  # [n, M]
            scales = self.conditional.lower_bound_scale(scales / self.step)
            symbols = symbols_at(rows * width + columns, scales, means / self.step)
            table[places] = symbols.to(table.dtype)
        return known[REACH:, REACH:-REACH].permute(2, 0, 1)[None].int()


def _context_matrix(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """The weights [12 M, C] and the bias [C] of a masked 5x5 convolution, context by context."""
    layer = cast(nn.Conv2d, getattr(layer, "part", layer))
    taps = [layer.weight[:, :, row + REACH, column + REACH].t() for row, column in CONTEXT]
    return torch.cat(taps), cast(Tensor, layer.bias)


@architecture("mbt2018")
class Autoregressive(Hyperprior):
    """A model with latents y and z, where context and z predict a Gaussian for each symbol of y.

        x -> g_a -> y -> h_a -> z
        z_hat on the integers + medians; params = h_s(z_hat)
        y_hat on the integers; context = a masked 5x5 convolution of y_hat
        scales, means = entropy_parameters(params, context)
        x_hat = g_s(y_hat)

    y is [B, M, ceil(H/16), ceil(W/16)], z is [B, N, ceil(H/64), ceil(W/64)].
    """

    network_class = JointAutoregressiveHierarchicalPriors
    zoo = MappingProxyType({"mbt2018": (mbt2018, 8)})
    exact_parts = ("h_s", "context_prediction", "entropy_parameters")
    halo = 2

    def check_codable(self) -> None:
        """See `Architecture`; y's coder is a package of its own."""
        super().check_codable()
        require_package("constriction", "files of autoregressive models", "refine")

    @property
    def table_models(self) -> list[EntropyBottleneck | GaussianConditional]:
        """The model of z alone: y is coded by the Gaussians themselves."""
        return [self.network.entropy_bottleneck]

    def walk(self, size: tuple[int, int], value_of: ValueOf) -> Tensor:
        """See `Architecture`."""
        network = self.network
        params = self.hyper_params(size, value_of)
        gaussians = ContextGaussians(
            network.gaussian_conditional, params, network.context_prediction,
            network.entropy_parameters, self.lattice,
        )  # fmt: skip
        return value_of(Group("y", params.new_zeros(1), gaussians, step=self.lattice))


@architecture("cheng2020-anchor")
class Anchor(Autoregressive):
    """The anchor model of Cheng et al. 2020: residual blocks, and sub-pixel convolutions in g_s."""

    network_class = Cheng2020Anchor
    zoo = MappingProxyType({"cheng2020-anchor": (cheng2020_anchor, 6)})
    halo = 7
    one_width = True


@architecture("cheng2020-attn")
class Attention(Anchor):
    """The same with attention, which looks at a bounded neighbourhood too."""

    network_class = Cheng2020Attention
    zoo = MappingProxyType({"cheng2020-attn": (cheng2020_attn, 6)})
    halo = 12
