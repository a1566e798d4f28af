"""More channels of y for a trained mean-scale hyperprior: a high rate needs more of them."""

import torch
from torch import Tensor

from architectures import Architecture
from common.errors import InputError
from config import Channels
from models import build_model

# How large the weights of new channels begin, as shares of the old ones' root mean square. Then a
# new channel costs about a bit per symbol, and disturbs x_hat only a little.
SHARE_IN_G_A, SHARE_IN_G_S = 0.3, 0.1


@torch.no_grad()
def grow_y(model: Architecture, channels: Channels) -> Architecture:
    """A model whose first channels of y are those of `model`; the last ones are new.

    The encoder's old latents stay as they were, and so does what h_s says of them. The new channels
    of y are random filters of g_a's features with a faint random effect on x_hat, under Gaussians
    of mean 0 and scale 1.

    Args:
        model: a mean-scale hyperprior.
        channels: N as in `model`, M at least as in `model`.

    Raises:
        InputError: the model has another N, or more channels of y.
    """
    if channels.N != model.N or channels.M < model.M:
        raise InputError(
            f"pretrain: has N = {model.N}, M = {model.M}; with grow_y, channels must ask for the "
            f"same N, and for M = {model.M} or more, not N = {channels.N}, M = {channels.M}"
        )
    grown = build_model(channels)
    old, new = model.network, grown.network
    new.g_a[6].weight.normal_(std=SHARE_IN_G_A * _rms(old.g_a[6].weight))
    new.g_a[6].bias.zero_()
    new.g_s[0].weight.normal_(std=SHARE_IN_G_S * _rms(old.g_s[0].weight))
    new.h_a[0].weight.zero_()
    new.h_s[2].weight[old.h_s[2].in_channels :, : old.h_s[2].out_channels] = 0
    new.h_s[4].weight.zero_()
    new.h_s[4].bias[: channels.M], new.h_s[4].bias[channels.M :] = 1, 0  # scales, means

    trained = dict(old.named_parameters())
    for name, weight in new.named_parameters():
        # h_s ends in scales and means, each with M channels.
        parts = 2 if name.startswith("h_s.4.") else 1
        for wide, narrow in zip(weight.chunk(parts), trained[name].chunk(parts), strict=True):
            wide[tuple(slice(size) for size in narrow.shape)] = narrow
    return grown


def _rms(weight: Tensor) -> float:
    return weight.square().mean().sqrt().item()
