"""Prepares networks: fixed weights for refinement, fast layers for training."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.compressai import GDN, CompressionModel, EntropyBottleneck
from fast.decoder import FrozenDecoder, ToPicture
from fast.gdn import gdn
from fast.pool import Pool
from fast.precision import FrozenLayers
from fast.upsampling import UpsamplingKernel


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


def use_fast_layers(network: CompressionModel) -> None:
    """Prepare g_a and g_s for training, in place: `FastGDN`, channels-last memory."""
    for part in (network.g_a, network.g_s):
        for index, layer in enumerate(part):
            if isinstance(layer, GDN):
                part[index] = FastGDN(layer)
    network.train().to(memory_format=torch.channels_last)


def is_frozen(network: CompressionModel) -> bool:
    """Whether `freeze_layers` has changed this network."""
    return isinstance(network.entropy_bottleneck, FrozenBottleneck)


def freeze_layers(network: CompressionModel) -> None:
    """Prepare a network for refinement, in place: its weights become constants.

    Sets eval mode, weights without gradients, channels-last memory and the layers of this folder.
    Call it after moving the network to its device.

    Raises:
        ValueError: the network is frozen already, or a transposed convolution is not CompressAI's
            `deconv`.
    """
    if is_frozen(network):
        raise ValueError("the model is frozen already")
    network.entropy_bottleneck = FrozenBottleneck(network.entropy_bottleneck)
    pool = Pool()
    h_s: nn.Sequential = getattr(network, "h_s", nn.Sequential())
    for part in (network.g_a, network.g_s, h_s):
        for index, layer in enumerate(part):
            if isinstance(layer, GDN):
                part[index] = FrozenGDN(layer, pool)
            elif isinstance(layer, nn.ConvTranspose2d):
                # h_s is too small to gain from a pool and Winograd.
                part[index] = UpsamplingKernel.of(layer, None if part is h_s else pool)
    *layers, before, gdn_layer, last = network.g_s
    fused = isinstance(before, UpsamplingKernel) and isinstance(last, UpsamplingKernel)
    if fused and isinstance(gdn_layer, FrozenGDN) and gdn_layer.inverse:
        to_picture = ToPicture(before, gdn_layer.beta, gdn_layer.gamma, last.weight, last.bias)
        network.g_s = FrozenDecoder(*layers, to_picture=to_picture)
    if len(h_s):
        network.h_s = FrozenLayers(*h_s)
    network.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def release_memory(network: CompressionModel) -> None:
    """Free the unused memory that a frozen network keeps for images of the last size."""
    if isinstance(network.g_s, FrozenDecoder) and network.g_s.pool:
        network.g_s.pool.clear()
