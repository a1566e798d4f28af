"""Random tensors, drawn from a given generator; None is torch's global generator."""

import torch
from torch import Generator, Tensor


def uniform_noise(like: Tensor, generator: Generator | None) -> Tensor:
    """Independent uniform draws from [-1, 1), shaped as `like`."""
    return torch.empty_like(like).uniform_(-1, 1, generator=generator)


def normal_noise(like: Tensor, generator: Generator | None) -> Tensor:
    """Independent draws of the standard normal distribution, shaped as `like`."""
    return torch.empty_like(like).normal_(generator=generator)


def open_uniform(like: Tensor, generator: Generator | None) -> Tensor:
    """Independent uniform draws from (0, 1), neither 0 nor 1, shaped as `like`.

    Minus their logarithm is an exponential draw; torch's own takes six times as long.
    """
    epsilon = torch.finfo(like.dtype).eps
    return torch.empty_like(like).uniform_(epsilon / 4, 1 - epsilon / 2, generator=generator)


def gumbel_noise(like: Tensor, generator: Generator | None) -> Tensor:
    """Independent draws of the standard Gumbel distribution, shaped as `like`."""
    return open_uniform(like, generator).log_().neg_().log_().neg_()
