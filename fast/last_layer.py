"""The last layer of a decoder: its input, and decoders with another last layer.

The last layer is CompressAI's `deconv`, a transposed 5x5 convolution with stride 2. The picture is
linear in its weights, so least squares can find the best ones for an image.
"""

import copy
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from fast.decoder import FrozenDecoder
from fast.precision import FrozenLayers
from fast.upsampling import UpsamplingKernel


class LastLayer(NamedTuple):
    """The weights of a transposed convolution: weight [C, 3, 5, 5], bias [3]."""

    weight: Tensor
    bias: Tensor


def last_layer_of(g_s: nn.Module | None) -> LastLayer | None:
    """The last layer of a decoder, frozen or not; None if it is no `deconv`."""
    if isinstance(g_s, FrozenDecoder):
        to_picture = g_s.to_picture
        return LastLayer(to_picture.weight, to_picture.phases_bias[: to_picture.weight.size(1)])
    # A subclass may do more than its layers.
    if not isinstance(g_s, nn.Sequential) or type(g_s) not in (nn.Sequential, FrozenLayers):
        return None
    last = g_s[-1] if len(g_s) else None
    if isinstance(last, UpsamplingKernel):
        return LastLayer(last.weight, last.bias)
    if type(last) is nn.ConvTranspose2d and UpsamplingKernel.fits(last):
        return LastLayer(last.weight.detach(), cast(Tensor, last.bias).detach())
    return None


@torch.no_grad()
def input_of_last_layer(g_s: nn.Module, y_hat: Tensor) -> Tensor:
    """What the last layer of a decoder gets for y_hat [B, M, h, w]: [B, C, 8 h, 8 w].

    Args:
        g_s: a decoder with a `last_layer_of`.
    """
    if isinstance(g_s, FrozenDecoder):
        return g_s.to_picture.input_of_last_layer(g_s.layers(y_hat))
    v = y_hat
    for layer in list(cast(nn.Sequential, g_s))[:-1]:
        v = layer(v)
    return v


def with_last_layer(g_s: nn.Module, last: LastLayer) -> nn.Module:
    """A decoder with another last layer; it shares all other layers with `g_s`.

    Args:
        g_s: a decoder with a `last_layer_of`.
    """
    if isinstance(g_s, FrozenDecoder):
        to_picture = g_s.to_picture.with_last_layer(*last)
        return FrozenDecoder(*g_s.layers, to_picture=to_picture).train(g_s.training)
    *layers, old = cast(nn.Sequential, g_s)
    if isinstance(g_s, FrozenLayers):
        kernel = UpsamplingKernel(*last, pool=cast(UpsamplingKernel, old).pool)
        kernel = kernel.to(memory_format=torch.channels_last)
        return FrozenLayers(*layers, kernel, pool=g_s.pool).train(g_s.training)
    replaced = copy.deepcopy(old)
    replaced.load_state_dict({"weight": last.weight, "bias": last.bias})
    return nn.Sequential(*layers, replaced).train(g_s.training)
