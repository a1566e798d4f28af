"""Moves of single symbols of y by one, after annealing: a search on the integers themselves.

Annealing ends near, not at, the best integers. At a rounded point the rate of every move of one
symbol is exact, and what it does to the distortion is known to second order. Moves are drawn with
probability exp(-change / temperature), none with that of no change (a heat bath), in every
neighbourhood of the picture at once; one evaluation then gives the gradient at the new point. As
the temperature, in bits, falls, less and less is moved for the worse. The best point counts.

Drawing moves by their first-order change is Gibbs with gradients (Grathwohl et al. 2021,
arXiv 2102.04509); the exact rate, the curvature and the parallel moves are ours.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from experimental_inference_methods import hard_round
from models import (
    Latents,
    likelihood_y,
    medians_of,
    prior_params,
    round_around,
    squared_error_of,
)
from refinement.pace import Pace
from rounding.noise import gumbel_noise
from tiles import tiled_error

HOT, COLD = 0.5, 0.02  # bits
REACH = 1  # positions of y around a move where no other is made in the same pass
PROBES = 16
# How far curvatures lie from the product of their channel's and their position's mean, relatively:
# measured on the model of lambda 0.01.
SPREAD = 0.18
LEAST_CURVATURE = 1e-3  # bits


class Point(NamedTuple):
    """Integers y [B, M, h, w], and what they cost, in bits: an image's bits plus its distortion."""

    y: Tensor
    rate: Tensor  # [B, M, h, w]
    gradient: Tensor  # [B, M, h, w], of the distortion
    loss: Tensor  # [B]
    x_hat: Tensor


def cost_in_steps(passes: int) -> int:
    """About how many steps of refinement take as long as so many passes, probes and all."""
    return PROBES + passes if passes else 0


@torch.no_grad()
def polish(
    model,
    x: Tensor,
    latents: Latents,
    lmbda: float,
    pace: Pace,
    generator: Generator | None = None,
    tile: int | None = None,
    on_pass: Callable[[Tensor], None] = lambda gain: None,
) -> Latents:
    """Latents on their lattice whose true loss is not above that of `latents`; z is only rounded.

    Args:
        x: [B, 3, H, W] in [0, 1].
        pace: passes, from 0; each takes an evaluation of g_s and its gradient, and before the first
            the curvature takes `PROBES` and the point to begin with one more.
        generator: of all noise, on x's device.
        tile: positions of y a side that g_s sees at a time; all without it.
        on_pass: told after every pass by how many bits [B] the lowest loss is below the first.
    """
    distortion_in_bits = lmbda * 255**2 / x.size(1)  # per unit of squared error
    z_hat = round_around(latents.z, medians_of(model), hard_round)
    scales, means = prior_params(model, z_hat, latents.y.shape[2:])

    def rate_of(y: Tensor) -> Tensor:
        return -likelihood_y(model, y + means, scales, means).log2()

    def point_of(y: Tensor) -> Point:
        error, x_hat, gradient = _error_and_gradient(model, y + means, x, tile)
        rate = rate_of(y)
        loss = rate.flatten(1).sum(1) + distortion_in_bits * error
        return Point(y, rate, distortion_in_bits * gradient, loss, x_hat)

    here = point_of(hard_round(latents.y - means))
    best, first, lowest = here.y, here.loss, here.loss
    curvature = distortion_in_bits * _curvature(model, here, means, generator, tile)
    while not pace.over:
        temperature = HOT * (COLD / HOT) ** (pace.position / pace.last)
        moves = _drawn_moves(here, rate_of, curvature, temperature, generator)
        there = point_of(here.y + moves)
        # What a move did to its own gradient tells its curvature without noise.
        seen = (moves * (there.gradient - here.gradient) / 2).clamp_min(LEAST_CURVATURE)
        curvature = torch.where(moves != 0, seen, curvature)
        here = there
        lower = (here.loss < lowest)[:, None, None, None]
        best, lowest = torch.where(lower, here.y, best), torch.minimum(here.loss, lowest)
        pace.advance()
        on_pass(first - lowest)
    return Latents(best + means, z_hat)


def _drawn_moves(
    here: Point,
    rate_of: Callable[[Tensor], Tensor],
    curvature: Tensor,
    temperature: float,
    generator: Generator | None,
) -> Tensor:
    """Moves of -1, 0 or 1, [B, M, h, w]: at most one in a position of y and `REACH` around it."""
    up, down = (
        (here.rate - rate_of(here.y + move) - move * here.gradient - curvature) / temperature
        + gumbel_noise(here.y, generator)
        for move in (1, -1)
    )
    # The largest of scores with Gumbel noise is a draw from their softmax.
    score, channel = torch.maximum(up, down).max(1, keepdim=True)  # [B, 1, h, w]
    highest = F.max_pool2d(score, 2 * REACH + 1, 1, REACH)
    picked = (score == highest) & (score > gumbel_noise(score, generator))
    moves = torch.zeros_like(here.y).scatter_(1, channel, picked.to(here.y.dtype))
    return torch.where(up > down, moves, -moves)


def _error_and_gradient(
    model, y_hat: Tensor, target: Tensor, tile: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Squared error to `target` [B], x_hat like target, and the error's gradient like y_hat."""
    error_of = partial(squared_error_of, model)
    with torch.enable_grad():
        y_hat = y_hat.detach().requires_grad_()
        if tile is None:
            error, x_hat = error_of(y_hat, target)
        else:
            error, x_hat = tiled_error(error_of, y_hat, target, tile)
        (gradient,) = torch.autograd.grad(error.sum(), y_hat)
    return error.detach(), x_hat.detach(), gradient


def _curvature(
    model, here: Point, means: Tensor, generator: Generator | None, tile: int | None
) -> Tensor:
    """Half the second derivative of the squared error to each element of y, shaped as it is.

    That is the squared norm of x_hat's derivative J, without g_s's own curvature: the mean of
    (J^T r)^2 over noise r of unit variance, and J^T r is half the gradient for a target that is r
    away from x_hat. So few draws are drawn near to what their channel and position have on average.
    """
    total = torch.zeros_like(here.y)
    for _ in range(PROBES):
        noise = torch.empty_like(here.x_hat).normal_(generator=generator)
        gradient = _error_and_gradient(model, here.y + means, here.x_hat - noise, tile)[2]
        total += (gradient / 2).square()
    drawn = total / PROBES
    of_channel, of_position = drawn.mean((2, 3), keepdim=True), drawn.mean(1, keepdim=True)
    mean = drawn.mean((1, 2, 3), keepdim=True).clamp_min(torch.finfo(drawn.dtype).tiny)
    typical = of_channel * of_position / mean
    # A draw's relative variance is 2 / PROBES.
    trust = SPREAD**2 / (SPREAD**2 + 2 / PROBES)
    return typical + trust * (drawn - typical)
