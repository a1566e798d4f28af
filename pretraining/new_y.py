"""New channels of y for a trained mean-scale hyperprior: a high rate needs more of them."""

import torch

from architectures import Architecture, MeanScale
from common.errors import InputError
from config import Channels
from models import build_model

# The parameters whose shape or meaning depends on the channels of y.
NEW = ("g_a.6.", "g_s.0.weight", "h_a.0.", "h_s.")
# By torch's own small weights few symbols of y would not be 0 at first: 7 % with a model of lambda
# 0.02, and 59 % with these.
GAIN = 4.0


@torch.no_grad()
def with_new_y(model: Architecture, channels: Channels) -> Architecture:
    """A model with the inner layers of `model`; the layers on both sides of y, and h_s, are new.

    Args:
        model: a mean-scale hyperprior, which stays as it is.
        channels: N as in `model`; any M.

    Raises:
        InputError: the channels N differ, or the model is of another family.
    """
    refuse_other_families(model, "new_y")
    if channels.N != model.N:
        raise InputError(
            f"pretrain: has N = {model.N}; with new_y, channels may ask for another M, but not for "
            f"N = {channels.N}"
        )
    renewed = build_model(channels)
    trained = dict(model.network.named_parameters())
    for name, weight in renewed.network.named_parameters():
        if not name.startswith(NEW):
            weight.copy_(trained[name])
    for layer in (renewed.network.g_a[6], renewed.network.g_s[0]):
        layer.weight.mul_(GAIN)
    return renewed


def refuse_other_families(model: Architecture, key: str) -> None:
    """Refuse a model that is no mean-scale hyperprior.

    Args:
        key: the key of the config that needs one.

    Raises:
        InputError: it is none.
    """
    if type(model) is not MeanScale:
        raise InputError(
            f"pretrain: has a model of {model.name}; {key} wants one of {MeanScale.name}"
        )
