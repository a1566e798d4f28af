"""Maps become the weights of pixels."""

from collections.abc import Sequence

import torch
from torch import Tensor

from common.images import LoadedImage


def weights_of_images(images: Sequence[LoadedImage], strength: float) -> Tensor | None:
    """The weights [B, 1, H, W] of images of one size, with mean 1; None: all pixels count alike.

    An image without a map has equal weights.

    Args:
        strength: see `dev_options.region_strength`.
    """
    if strength == 0 or all(image.region is None for image in images):
        return None
    equal = torch.ones(1, *images[0].pixels().shape[1:])
    return torch.stack([
        equal if image.region is None else weights_of(image.region, strength) for image in images
    ])  # fmt: skip


def weights_of(region: Tensor, strength: float) -> Tensor:
    """The weight of each pixel's distortion: 1 - s + s * region / mean(region), whose mean is 1.

    Args:
        region: [1, H, W] in [0, 1], above 0 somewhere.
        strength: s, in [0, 1].

    Returns:
        float32 [1, H, W].
    """
    relative = region.double() / region.double().mean()
    return (1 - strength + strength * relative).float()
