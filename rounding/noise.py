"""Random tensors, drawn from a given source."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Generator, Tensor


class ImageGenerators(NamedTuple):
    """One generator for each image of a batch [..., B, C, h, w] or [..., B, h, w, C].

    Each image gets the noise that it would get alone.
    """

    images: tuple[Generator, ...]


# One generator for all, one for each image, or torch's global generator.
Source = Generator | ImageGenerators | None


def uniform_noise(like: Tensor, source: Source) -> Tensor:
    """Independent uniform draws from [-1, 1), shaped as `like`."""
    return _drawn(like, source, lambda v, one: v.uniform_(-1, 1, generator=one))


def normal_noise(like: Tensor, source: Source) -> Tensor:
    """Independent draws of the standard normal distribution, shaped as `like`."""
    return _drawn(like, source, lambda v, one: v.normal_(generator=one))


def open_uniform(like: Tensor, source: Source) -> Tensor:
    """Independent uniform draws from (0, 1), neither 0 nor 1, shaped as `like`.

    Minus their logarithm is an exponential draw; torch's own takes six times as long.
    """
    epsilon = torch.finfo(like.dtype).eps
    low, high = epsilon / 4, 1 - epsilon / 2
    return _drawn(like, source, lambda v, one: v.uniform_(low, high, generator=one))


def gumbel_noise(like: Tensor, source: Source) -> Tensor:
    """Independent draws of the standard Gumbel distribution, shaped as `like`."""
    return open_uniform(like, source).log_().neg_().log_().neg_()


def _drawn(
    like: Tensor, source: Source, fill: Callable[[Tensor, Generator | None], Tensor]
) -> Tensor:
    """A tensor shaped as `like` that `fill` has filled with draws."""
    noise = torch.empty_like(like)
    if not isinstance(source, ImageGenerators):
        return fill(noise, source)
    for image, generator in zip(noise.split(1, dim=-4), source.images, strict=True):
        fill(image, generator)
    return noise
