"""A mean-scale hyperprior becomes an autoregressive model, which begins with the same Gaussians."""

from typing import cast

import torch
from torch import Tensor, nn

from architectures import Architecture, Autoregressive
from pretraining.new_y import refuse_other_families

OFFSET = 8.0  # above the means of the channels that pass a layer without a pair


@torch.no_grad()
def with_new_context(model: Architecture) -> Architecture:
    """An mbt2018 with the weights of a mean-scale hyperprior, and new layers for the context.

    At first these layers hand on the scales and means of h_s, whatever the context is. Then y's
    lattice is the only difference: the integers, not the integers + means.

    Raises:
        InputError: `model` is of another family.
    """
    refuse_other_families(model, "new_context")
    grown = Autoregressive.build(model.N, model.M)
    trained = model.network.state_dict()
    own = grown.network.state_dict()
    grown.network.load_state_dict({**own, **trained})
    layers = cast(nn.Sequential, grown.network.entropy_parameters)
    narrow = _least_varied(trained["h_s.4.weight"][model.M :], layers)
    _hand_on(layers, model.M, narrow)
    return grown


def _least_varied(of_means: Tensor, layers: nn.Sequential) -> Tensor:
    """Which means have to pass the second layer without a pair: those with the smallest weights."""
    width = cast(nn.Conv2d, layers[2]).out_channels
    pairs = min(width - 2 * len(of_means), len(of_means))
    sizes = of_means.flatten(1).abs().sum(1)
    return sizes.argsort()[: len(of_means) - pairs].sort().values


def _hand_on(layers: nn.Sequential, M: int, narrow: Tensor) -> None:
    """Let the layers' first 2 M inputs, scales and means, be their 2 M results.

    A LeakyReLU of slope s keeps v: v = (f(v) - f(-v)) / (1 + s). So each mean takes a pair of
    units. In the second layer there are too few units: the means in `narrow` take one unit each,
    which `OFFSET` keeps above 0. Scales take one unit: below 0 all are the same to the coder. Units
    that are left over begin as torch makes them, but have no effect yet.
    """
    first, second, last = (cast(nn.Conv2d, layers[index]) for index in (0, 2, 4))
    weight_of_pair = 1 / (1 + cast(nn.LeakyReLU, layers[1]).negative_slope)
    paired = torch.tensor([c for c in range(M) if c not in set(narrow.tolist())], dtype=torch.long)
    scales, means = torch.arange(M), M + torch.arange(M)
    _clear(first, slice(0, 3 * M))
    for unit, source, sign in ((scales, scales, 1), (means, means, 1), (M + means, means, -1)):
        first.weight[unit, source, 0, 0] = sign
    units = M + torch.arange(2 * len(paired)).view(2, -1)  # of the second layer
    alone = M + 2 * len(paired) + torch.arange(len(narrow))
    _clear(second, slice(0, M + 2 * len(paired) + len(narrow)))
    second.weight[scales, scales, 0, 0] = 1
    for channels, unit, sign in ((paired, units[0], 1), (paired, units[1], -1), (narrow, alone, 1)):
        second.weight[unit, M + channels, 0, 0] = sign * weight_of_pair
        second.weight[unit, 2 * M + channels, 0, 0] = -sign * weight_of_pair
    cast(Tensor, second.bias)[alone] = OFFSET
    _clear(last, slice(None))
    last.weight[scales, scales, 0, 0] = 1
    last.weight[M + paired, units[0], 0, 0] = weight_of_pair
    last.weight[M + paired, units[1], 0, 0] = -weight_of_pair
    last.weight[M + narrow, alone, 0, 0] = 1
    cast(Tensor, last.bias)[M + narrow] = -OFFSET


def _clear(layer: nn.Conv2d, units: slice) -> None:
    layer.weight[units] = 0
    cast(Tensor, layer.bias)[units] = 0
