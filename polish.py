"""Greedy moves of single symbols of y by one, judged by what they truly do.

Annealing ends near, not at, the best integers. At the rounded point the rate of each move is exact,
and its distortion is known to second order: the gradient, and a curvature from random probes. Moves
so far apart that their pixels hardly meet are made together, and each that does not lower the true
loss around it is taken back.
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
from tiles import STRIDE, tiled_error

PROBES = 8
APART = 3  # positions of y between two moves of one pass, at least
# A move changes pixels up to two positions away.
REACH = 5


class Point(NamedTuple):
    """Where integers y [B, M, h, w] lie: what they cost, in the loss's unit, and where it goes."""

    y: Tensor
    rate: Tensor  # [B, M, h, w]
    distortion: Tensor  # [B, 1, h, w], of the pixels of each position
    gradient: Tensor  # [B, M, h, w], of the distortion

    @property
    def loss(self) -> Tensor:
        """Rate of y and distortion of each image, [B]."""
        return (self.rate.sum(1, keepdim=True) + self.distortion).flatten(1).sum(1)


class Polished(NamedTuple):
    """Latents on their lattice, and how many passes were taken."""

    latents: Latents
    passes: int


def cost_in_steps(passes: int) -> int:
    """About how many steps of refinement take as long as so many passes, probes and all."""
    return PROBES + 2 * passes if passes else 0


@torch.no_grad()
def polish(
    model,
    x: Tensor,
    latents: Latents,
    lmbda: float,
    passes: int,
    generator: Generator | None = None,
    tile: int | None = None,
    in_time: Callable[[], bool] = lambda: True,
) -> Polished:
    """Latents whose true loss is not above that of `latents`.

    A pass takes one evaluation of g_s and its gradient, a second where moves are taken back. When
    no move promises anything there are no more passes.

    Args:
        x: [B, 3, H, W] in [0, 1].
        generator: of the probes' noise, on x's device.
        tile: positions of y a side that g_s sees at a time; all without it.
        in_time: whether there is time for another pass.
    """
    pixels, scale = x.size(2) * x.size(3), lmbda * 255**2 / x[0].numel()
    z_hat = round_around(latents.z, medians_of(model), hard_round)
    scales, means = prior_params(model, z_hat, latents.y.shape[2:])

    def rate_of(y: Tensor) -> Tensor:
        return -likelihood_y(model, y + means, scales, means).log2() / pixels

    def point_of(y: Tensor) -> Point:
        x_hat, gradient = _picture_and_gradient(model, y + means, x, tile)
        distortion = scale * _by_position((x_hat - x).square())
        return Point(y, rate_of(y), distortion, scale * gradient)

    best = here = point_of(hard_round(latents.y - means))
    curvature = scale * _curvature(model, here.y + means, x, generator, tile)
    refused = torch.zeros_like(here.y, dtype=torch.bool)
    taken = 0
    while taken < passes and in_time():
        moves = _promising_moves(here, rate_of, curvature, refused)
        if not moves.any():
            break
        taken += 1
        there = point_of(here.y + moves)
        change = F.avg_pool2d(
            there.distortion - here.distortion, REACH, 1, REACH // 2, divisor_override=1
        ) + (there.rate - here.rate).sum(1, keepdim=True)  # [B, 1, h, w], around each position
        wrong = (moves != 0) & (change >= 0)
        refused |= wrong
        here = point_of(here.y + moves.masked_fill(wrong, 0)) if wrong.any() else there
        lower = (here.loss < best.loss)[:, None, None, None]
        best = Point(*(torch.where(lower, new, old) for new, old in zip(here, best, strict=True)))
    return Polished(Latents(best.y + means, z_hat), taken)


def _promising_moves(
    here: Point, rate_of: Callable[[Tensor], Tensor], curvature: Tensor, refused: Tensor
) -> Tensor:
    """The moves to try, -1, 0 or 1, [B, M, h, w]: of each neighbourhood the most promising one."""
    up, down = (
        rate_of(here.y + move) - here.rate + move * here.gradient + curvature for move in (1, -1)
    )
    change, channel = torch.minimum(up, down).masked_fill(refused, 1).min(1, keepdim=True)
    lowest = -F.max_pool2d(-change, 2 * APART - 1, 1, APART - 1)
    picked = torch.zeros_like(here.y).scatter_(
        1, channel, ((change == lowest) & (change < 0)).to(up.dtype)
    )
    return torch.where(up < down, picked, -picked)


def _picture_and_gradient(
    model, y_hat: Tensor, target: Tensor, tile: int | None
) -> tuple[Tensor, Tensor]:
    """x_hat, and the gradient of the squared error to `target`; like target, and y_hat."""
    error_of = partial(squared_error_of, model)
    with torch.enable_grad():
        y_hat = y_hat.detach().requires_grad_()
        if tile is None:
            error, x_hat = error_of(y_hat, target)
        else:
            error, x_hat = tiled_error(error_of, y_hat, target, tile)
        (gradient,) = torch.autograd.grad(error.sum(), y_hat)
    return x_hat.detach(), gradient


def _curvature(
    model, y_hat: Tensor, x: Tensor, generator: Generator | None, tile: int | None
) -> Tensor:
    """Half the second derivative of the squared error to each element of y_hat, shaped as it is.

    That is the squared norm of x_hat's derivative J, without g_s's own curvature: the mean of
    (J^T r)^2 over noise r of unit variance, and J^T r is half the gradient for a target that is r
    away from x_hat.
    """
    x_hat, _ = _picture_and_gradient(model, y_hat, x, tile)
    total = torch.zeros_like(y_hat)
    for _ in range(PROBES):
        noise = torch.empty_like(x).normal_(generator=generator)
        total += (_picture_and_gradient(model, y_hat, x_hat - noise, tile)[1] / 2).square()
    return total / PROBES


def _by_position(v: Tensor) -> Tensor:
    """Sums of v [B, C, H, W] over channels and the pixels of each position of y, [B, 1, h, w]."""
    height, width = v.shape[2:]
    v = F.pad(v.sum(1, keepdim=True), (0, -width % STRIDE, 0, -height % STRIDE))
    return F.avg_pool2d(v, STRIDE, divisor_override=1)
