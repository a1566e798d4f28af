"""Tiny models of every architecture, whose symbols vary as those of trained models do."""

from functools import cache

import pytest
import torch

from architectures import ARCHITECTURES, Autoregressive, Checkerboard, Elic
from conftest import needs

NAMES = tuple(ARCHITECTURES)
# Their y is coded position after position.
IN_TURN = [name for name in NAMES if issubclass(ARCHITECTURES[name], Autoregressive)]
# Their networks have CompressAI's own `forward` and `decompress`.
STOCK = [name for name in NAMES if "decompress" in dir(ARCHITECTURES[name].network_class)]
# For tests that write files: those of autoregressive models need a package of their own.
CODED = [
    pytest.param(name, marks=needs("constriction")) if name in IN_TURN else name for name in NAMES
]
N, M, GROUPS = 12, 12, (3, 5, 4)


def groups_of(name):
    """The groups of channels of a toy, as `channels.groups` wants them."""
    return list(GROUPS) if issubclass(ARCHITECTURES[name], Elic) else None


@cache
def toy(name):
    """A model of an architecture; do not change it, but copies of it."""
    torch.manual_seed(1)
    model = ARCHITECTURES[name].build(N, M, groups_of(name))
    network = model.network.eval().requires_grad_(False)
    hyper = network.latent_codec.hyper if isinstance(model, Checkerboard) else network
    for parameter, value in network.named_parameters():
        if parameter.endswith("quantiles"):
            value[:, 0, 1] = torch.linspace(-1.3, 1.4, len(value))
    [layer for layer in network.g_a if hasattr(layer, "weight")][-1].weight *= 20
    for part, layers in network.named_modules():
        if part.rpartition(".")[2] in ("entropy_parameters", "h_s") and hasattr(layers, "append"):
            last = [layer for layer in layers if hasattr(layer, "weight")][-1]
            last.bias += 3  # scales for which few symbols are out of the tables
    if hasattr(hyper, "h_a"):
        hyper.h_a[-1].weight *= 20
    return model


def stock_decoding(name, model, groups, size):
    """The picture that CompressAI's own `decompress` makes of a file's groups."""
    height, width = (side // 16 for side in size)
    strings = [[group.string] for group in (*groups[1:], groups[0])]
    network = model.network
    with torch.no_grad():
        if isinstance(model, Checkerboard):
            y = [(channels, height, width) for channels in model.groups]
            y = y if isinstance(model, Elic) else y[0]
            shape = {"y": y, "hyper": (height // 4, width // 4)}
            return network.decompress(strings, shape=shape)["x_hat"]
        if len(groups) == 1:
            return network.decompress(strings, (height, width))["x_hat"]
        return network.decompress(strings, (height // 4, width // 4))["x_hat"]
