"""Moves of single symbols of y by one, after annealing: a search on the integers themselves.

Annealing ends near, not at, the best integers. At a rounded point the rate of every move of one
symbol is exact, and what it does to the distortion is known to second order. Moves are drawn with
probability exp(-change / temperature), none with that of no change (a heat bath), in every
neighbourhood of the picture at once; one evaluation then gives the gradient at the new point. As
the temperature, in bits, falls, less and less is moved for the worse. The best point counts.

Drawing moves by their first-order change is Gibbs with gradients (Grathwohl et al. 2021,
arXiv 2102.04509); the exact rate, the curvature and the parallel moves are ours.
"""

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from architectures import Latents
from config import RefineConfig
from objectives import Problem
from refinement.batch import ImageNoise, Trajectory, metrics_of, row_of
from refinement.descent import LEAST_POLISH, PROBES, Pace
from rounding.noise import gumbel_noise

HOT, COLD = 0.5, 0.02  # bits
REACH = 1  # positions of y around a move where no other is made in the same pass
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


@torch.no_grad()
def polish(
    problem: Problem,
    latents: Latents,
    pace: Pace,
    generator: Generator | None = None,
    on_pass: Callable[[Tensor], None] = lambda gain: None,
) -> Latents:
    """Latents on their lattice whose true loss is not above that of `latents`.

    Symbols of the last group of the walk, y, are moved. The groups before it are only rounded.

    Args:
        pace: passes, from 0. Each takes an evaluation of g_s and its gradient. Before the first one
            the curvature takes `PROBES` of them, and the point to begin with one more.
        generator: of all noise, on x's device.
        on_pass: called after every pass with what has been gained so far, in bits [B].
    """
    bits_per_error = problem.objective.bits_per_error(problem.x.size(1))
    walk = problem.model.round(latents, torch.round, problem.size)
    group = walk.groups[-1]

    def rate_of(y: Tensor) -> Tensor:
        return -group.distribution.likelihood(y + group.centre).log2()

    def point_of(y: Tensor) -> Point:
        error, x_hat, gradient = _error_and_gradient(problem, y + group.centre)
        rate = rate_of(y)
        loss = rate.flatten(1).sum(1) + bits_per_error * error
        return Point(y, rate, bits_per_error * gradient, loss, x_hat)

    here = point_of(torch.round(latents[group.name] - group.centre))
    best, first, lowest = here.y, here.loss, here.loss
    curvature = bits_per_error * _curvature(problem, here, group.centre, generator)
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
    polished = walk.values | {group.name: best + group.centre}
    return {name: polished[name] for name in latents}


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
    problem: Problem, y_hat: Tensor, x: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Squared error to x [B], x_hat like x, and the error's gradient like y_hat."""
    with torch.enable_grad():
        y_hat = y_hat.detach().requires_grad_()
        error, x_hat = problem.squared_error(y_hat, x)
        (gradient,) = torch.autograd.grad(error.sum(), y_hat)
    return error.detach(), x_hat.detach(), gradient


def _curvature(
    problem: Problem, here: Point, centre: Tensor, generator: Generator | None
) -> Tensor:
    """Half the second derivative of the squared error to each element of y, shaped as it is.

    That is the squared norm of x_hat's derivative J, without g_s's own curvature. It is the mean of
    (J^T r)^2 over noise r of unit variance, and J^T r is half the gradient for a target that is r
    away from x_hat. So few draws are pulled towards what their channel and position have on
    average.
    """
    total = torch.zeros_like(here.y)
    for _ in range(PROBES):
        noise = torch.empty_like(here.x_hat).normal_(generator=generator)
        gradient = _error_and_gradient(problem, here.y + centre, here.x_hat - noise)[2]
        total += (gradient / 2).square()
    drawn = total / PROBES
    of_channel, of_position = drawn.mean((2, 3), keepdim=True), drawn.mean(1, keepdim=True)
    mean = drawn.mean((1, 2, 3), keepdim=True).clamp_min(torch.finfo(drawn.dtype).tiny)
    typical = of_channel * of_position / mean
    # A draw's relative variance is 2 / PROBES.
    trust = SPREAD**2 / (SPREAD**2 + 2 / PROBES)
    return typical + trust * (drawn - typical)


def polish_batch(
    problem: Problem,
    trajectories: Sequence[Trajectory],
    config: RefineConfig,
    noise: ImageNoise,
    pace: Pace,
    progress: Callable[[Tensor, Tensor], None],
) -> None:
    """Polish the best latents of each image; one more row of its trajectory says what that gave.

    With `max_seconds` each image has its share of the time that is left. An image whose loss became
    infinite keeps the best that it had.

    Args:
        pace: that of the steps before.
    """
    problems = list(problem.images())
    left = [index for index, one in enumerate(trajectories) if not one.stopped]
    for nth, index in enumerate(left):
        own, trajectory = problems[index], trajectories[index]
        seconds = _share_of_time(config.max_seconds, pace, len(problems), len(left) - nth)
        shortest = LEAST_POLISH * pace.step_seconds / len(problems)  # of a step of the whole batch
        if seconds is not None and seconds < shortest:
            break
        passes = Pace(0, config.polish_passes, seconds)
        generator = noise.of_image(index)
        lowest = fmean(trajectories[index].lowest for index in left)

        def on_pass(gain: Tensor, lowest: float = lowest) -> None:
            loss = lowest - gain.mean() / problem.pixels / len(left)
            progress(loss, loss)  # nothing is relaxed any more

        latents = polish(own, trajectory.finite_latents(), passes, generator, on_pass)
        (metrics,), x_hat = metrics_of(own.true(latents), own.x)
        step = trajectory.rows[-1]["step"] + passes.steps_taken
        at = {"step": step, "temperature": 0.0, "lmbda": trajectory.lmbda}
        row = row_of(at, metrics, metrics)
        trajectory.add(row, latents, x_hat, trajectory.clock[-1] + passes.elapsed)


def _share_of_time(
    max_seconds: float | None, pace: Pace, images: int, waiting: int
) -> float | None:
    """Seconds of an image's polish, its evaluation at the end not counted; None without a limit.

    Args:
        max_seconds: of an image; pace.seconds, of them all, is less by two evaluations of each.
        images: in the batch; waiting: those that are still to be polished.
    """
    if not max_seconds or pace.seconds is None:
        return None
    limit = max_seconds * images
    evaluation = (limit - pace.seconds) / (2 * images)
    return (limit - pace.elapsed) / waiting - evaluation
