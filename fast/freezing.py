"""Prepares networks: fixed weights for refinement, fast layers for training."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.compressai import GDN, CheckerboardMaskedConv2d, EntropyBottleneck, MaskedConv2d
from fast.decoder import FrozenDecoder, ToPicture
from fast.gdn import gdn
from fast.pool import Pool
from fast.precision import FrozenLayers, FrozenNetwork
from fast.upsampling import UpsamplingKernel

FROZEN = "has_constant_weights"  # the attribute of a network that marks it


class FastGDN(GDN):
    """CompressAI's GDN with its trainable parameters, computed by `gdn`."""

    def __init__(self, layer: GDN):
        super().__init__(len(layer.beta), inverse=layer.inverse)
        self.to(layer.beta).load_state_dict(layer.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        """The normalised x, [B, C, H, W]."""
        beta, gamma = self.beta_reparam(self.beta), self.gamma_reparam(self.gamma)
        return gdn(x, beta, gamma, self.inverse)


class FrozenGDN(nn.Module):
    """CompressAI's GDN with fixed weights, re-parametrised once, computed by `gdn`."""

    beta: Tensor
    gamma: Tensor

    def __init__(self, layer: GDN, pool: Pool | None = None):
        super().__init__()
        self.pool = pool
        gamma = layer.gamma_reparam(layer.gamma)
        self.register_buffer("beta", layer.beta_reparam(layer.beta).detach())  # [C]
        self.register_buffer("gamma", gamma.detach())  # [C, C]
        self.inverse = layer.inverse

    def forward(self, x: Tensor) -> Tensor:
        """The normalised x, [B, C, H, W]."""
        return gdn(x, self.beta, self.gamma, self.inverse, self.pool)


class FrozenBottleneck(nn.Module):
    """CompressAI's EntropyBottleneck, reduced to rates of z; weights re-parametrised once."""

    def __init__(self, bottleneck: EntropyBottleneck):
        super().__init__()
        self.register_buffer("quantiles", bottleneck.quantiles.detach())  # [N, 1, 3]
        self.likelihood_lower_bound = bottleneck.likelihood_lower_bound
        self.layers = len(bottleneck.filters) + 1
        for index in range(self.layers):
            matrix = F.softplus(bottleneck.matrices[index]).detach()  # [N, f', f]
            self.register_buffer(f"matrix_{index}", matrix)
            self.register_buffer(f"bias_{index}", bottleneck.biases[index].detach())  # [N, f', 1]
            if index < len(bottleneck.filters):
                factor = torch.tanh(bottleneck.factors[index]).detach()  # [N, f', 1]
                self.register_buffer(f"factor_{index}", factor)

    def _logits_cumulative(self, inputs: Tensor, stop_gradient: bool) -> Tensor:
        """Logits of the cumulative distribution, [N, 1, L]; CompressAI has a method like it."""
        logits = inputs.detach() if stop_gradient else inputs
        for index in range(self.layers):
            matrix, bias = getattr(self, f"matrix_{index}"), getattr(self, f"bias_{index}")
            logits = torch.baddbmm(bias, matrix, logits)  # [N, f', L]
            if index < self.layers - 1:
                factor = getattr(self, f"factor_{index}")
                logits = torch.addcmul(logits, factor, logits.tanh())
        return logits


class PickingConv2d(nn.Conv2d):
    """A 1x1 convolution with a stride that first picks the pixels that it needs.

    With channels-last memory torch 2.14's own backward pass crashes on a CPU.
    """

    @classmethod
    def of(cls, layer: nn.Conv2d) -> "PickingConv2d":
        """The same layer, with the same parameters."""
        down, across = layer.stride
        picking = cls(layer.in_channels, layer.out_channels, 1, (down, across))
        picking.weight, picking.bias = layer.weight, layer.bias
        return picking

    def forward(self, x: Tensor) -> Tensor:
        """As torch's, [B, C', ceil(H / s), ceil(W / s)]."""
        down, across = self.stride
        return F.conv2d(x[:, :, ::down, ::across], self.weight, self.bias)


def use_fast_layers(network: nn.Module) -> None:
    """Prepare a network for training, in place: `FastGDN`, channels-last memory."""
    _replace_layers(network, {GDN: FastGDN, nn.Conv2d: _picking})
    network.train().to(memory_format=torch.channels_last)


def _picking(layer: nn.Conv2d) -> nn.Conv2d:
    plain = layer.padding == (0, 0) and layer.groups == 1
    strided = layer.kernel_size == (1, 1) and max(layer.stride) > 1
    return PickingConv2d.of(layer) if strided and plain else layer


def _replace_layers(
    network: nn.Module, replacements: Mapping[type[nn.Module], Callable[[Any], nn.Module]]
) -> None:
    """Replace each layer whose type is exactly one of these: a subclass may compute otherwise."""
    for parent in list(network.modules()):
        for name, layer in parent.named_children():
            if type(layer) in replacements:
                setattr(parent, name, replacements[type(layer)](layer))


def is_frozen(network: nn.Module) -> bool:
    """Whether `freeze_layers` has changed this network."""
    return bool(getattr(network, FROZEN, False))


def freeze_layers(network: nn.Module) -> None:
    """Prepare a network for refinement, in place: its weights become constants.

    Sets eval mode, weights without gradients, channels-last memory and the layers of this folder.
    Call it after moving the network to its device.

    Raises:
        ValueError: the network is frozen already.
    """
    if is_frozen(network):
        raise ValueError("the model is frozen already")
    pool = Pool()
    for part in (getattr(network, "g_a", None), getattr(network, "g_s", None)):
        # Smaller parts would not gain from a pool and Winograd.
        if part is not None:
            _replace_layers(part, {nn.ConvTranspose2d: partial(_upsampling, pool=pool)})
    _replace_layers(network, {
        GDN: partial(FrozenGDN, pool=pool), nn.ConvTranspose2d: partial(_upsampling, pool=None),
        EntropyBottleneck: FrozenBottleneck, MaskedConv2d: _masked,
        CheckerboardMaskedConv2d: _masked,
    })  # fmt: skip
    _freeze_chains(network, pool)
    network.eval().requires_grad_(False)
    network.to(memory_format=torch.channels_last)
    setattr(network, FROZEN, True)


def _masked(layer: MaskedConv2d) -> nn.Module:
    """A masked convolution, which would mask its weights at each call, with masked weights."""
    plain = nn.Conv2d(layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride,
                      layer.padding)  # fmt: skip
    plain.weight.data, plain.bias = layer.weight.data * layer.mask, layer.bias
    return FrozenLayers(plain)


def _upsampling(layer: nn.ConvTranspose2d, pool: Pool | None) -> nn.Module:
    return UpsamplingKernel.of(layer, pool) if UpsamplingKernel.fits(layer) else layer


def _freeze_chains(parent: nn.Module, pool: Pool) -> None:
    """Let plain chains of layers keep a copy in half precision, and fuse the end of g_s."""
    for name, part in parent.named_children():
        if type(part) is nn.Sequential and len(part):
            setattr(parent, name, _frozen_chain(part, pool, name == "g_s"))
        else:
            _freeze_chains(part, pool)


def has_fused_end(chain: nn.Module | None) -> bool:
    """Whether a decoder ends, or its frozen form ended, with `deconv`, inverse GDN and `deconv`."""
    if isinstance(chain, FrozenDecoder):
        return True
    if type(chain) is not nn.Sequential or len(chain) < 3:
        return False
    before, gdn_layer, last = list(chain)[-3:]
    return (
        all(type(v) is nn.ConvTranspose2d and UpsamplingKernel.fits(v) for v in (before, last))
        and type(gdn_layer) in (GDN, FastGDN)
        and bool(gdn_layer.inverse)
    )


def _frozen_chain(chain: nn.Sequential, pool: Pool, is_decoder: bool) -> FrozenNetwork:
    *layers, before, gdn_layer, last = (None, None, None, *chain)
    ends = isinstance(before, UpsamplingKernel) and isinstance(last, UpsamplingKernel)
    if is_decoder and ends and isinstance(gdn_layer, FrozenGDN) and gdn_layer.inverse:
        to_picture = ToPicture(before, gdn_layer.beta, gdn_layer.gamma, last.weight, last.bias)
        return FrozenDecoder(*layers[3:], to_picture=to_picture)
    return FrozenLayers(*chain, pool=pool)


def release_memory(network: nn.Module) -> None:
    """Free the unused memory that a frozen network keeps for images of the last size."""
    pool = getattr(getattr(network, "g_s", None), "pool", None)
    if pool is not None:
        pool.clear()
