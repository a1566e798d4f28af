"""Polish: a search on the integers themselves, which moves symbols of y by one, after annealing.

Annealing ends near the best integers, but not at them. From rounded latents we know the exact
change in rate that a move of one symbol causes, and the change in distortion to second order. A
move is drawn with probability proportional to exp(-change / temperature). "No move" has change 0
(a heat bath). Each pass draws moves in all neighbourhoods of the image at once. One evaluation then
gives the gradient at the new point. The temperature, in bits, falls from pass to pass, and with it
the number of moves that raise the loss. The point with the lowest loss is kept.

Drawing moves by their first-order change is Gibbs with gradients (Grathwohl et al. 2021,
arXiv 2102.04509); the exact rate, the curvature and the parallel moves are ours.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import fmean
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from architectures import Group, Latents, Walk
from architectures.walk import Distribution
from config import RefineConfig
from objectives import Problem
from refinement.batch import ImageNoise, Trajectory, metrics_of, row_of
from refinement.descent import LEAST_POLISH, PROBES, Pace
from rounding.noise import gumbel_noise

HOT, COLD = 0.5, 0.02  # bits
REACH = 1  # positions of y: two moves of one pass are farther apart than this
# The assumed relative deviation of a curvature from the product of its channel's and its position's
# mean. The measured one is 0.37, but with 0.18 the loss of `fast` is 0.15 % lower.
SPREAD = 0.18
LEAST_CURVATURE = 1e-3  # bits


class Point(NamedTuple):
    """Integers y, and their loss in bits: the rate plus the weighted squared error.

    y, rate, gradient: [B, M, h, w]; the gradient is that of all but the symbol's own rate. rate_of:
    the rates of other integers, each with all others as they are here. loss: [B].
    """

    y: Tensor
    rate: Tensor
    rate_of: Callable[[Tensor], Tensor]
    gradient: Tensor
    loss: Tensor
    walk: Walk
    x_hat: Tensor


@torch.no_grad()
def polish(
    problem: Problem,
    latents: Latents,
    pace: Pace,
    generator: Generator | None = None,
    on_pass: Callable[[Tensor], None] = lambda gain: None,
) -> Latents:
    """Latents on their lattice; in the problem's precision no pass had a lower loss.

    The polish moves the symbols of the last latent of the walk, y. It only rounds the others. In
    float32 the true loss is not above that of `latents`.

    Args:
        pace: counts passes from 0. A pass evaluates g_s and its gradient once. The start takes
            `PROBES` + 1 evaluations: for the curvature and for the first point.
        generator: the source of all noise, on x's device; None is torch's global generator.
        on_pass: called after each pass with the decrease of the loss since the start, bits [B].
    """
    bits_per_error = problem.objective.bits_per_error(problem.x.size(1))
    rounded_walk = problem.model.round(latents, torch.round, problem.size)
    point = _point_of(problem, rounded_walk, first_integers(rounded_walk, latents))
    best, first_loss, lowest_loss = point.y, point.loss, point.loss
    curvature = bits_per_error * _curvature(problem, point, generator)
    while not pace.at_end:
        temperature = HOT * (COLD / HOT) ** (pace.position / pace.last)
        moves = _draw_moves(point, curvature, temperature, generator)
        moved = _point_of(problem, rounded_walk, point.y + moves)
        # The change of a symbol's gradient after its move gives its curvature without noise.
        measured = (moves * (moved.gradient - point.gradient) / 2).clamp_min(LEAST_CURVATURE)
        curvature = torch.where(moves != 0, measured, curvature)
        point = moved
        lower = (point.loss < lowest_loss)[:, None, None, None]
        best = torch.where(lower, point.y, best)
        lowest_loss = torch.minimum(point.loss, lowest_loss)
        pace.advance()
        on_pass(first_loss - lowest_loss)
    polished = _walk_with(problem, rounded_walk, best).values
    return {name: polished[name] for name in latents}


def first_integers(walk: Walk, latents: Latents) -> Tensor:
    """The integers of the walk's last latent, [B, M, h, w] as floats."""
    name = walk.groups[-1].name
    return walk.whole(tuple(
        torch.round(group.in_steps(group.part.of(latents[name]))) if group.name == name else value
        for group, value in zip(walk.groups, walk.group_values, strict=True)
    ))[name]  # fmt: skip


def _walk_with(problem: Problem, walk: Walk, y: Tensor) -> Walk:
    """The walk with other integers of its last latent; the others keep their values."""
    name, kept = walk.groups[-1].name, iter(walk.group_values)

    def value_of(group: Group) -> Tensor:
        value = next(kept)
        return group.on_lattice(group.part.of(y)) if group.name == name else value

    return problem.model.visit(problem.size, value_of)


def _values_of(moved: Sequence[tuple[Group, Tensor]], y: Tensor) -> list[Tensor]:
    """The values of the groups of integers y, on lattices that y does not move."""
    fixed = [group._replace(centre=group.centre.detach()) for group, _ in moved]
    return [group.on_lattice(group.part.of(y)) for group in fixed]


def _point_of(problem: Problem, rounded_walk: Walk, y: Tensor) -> Point:
    """The point of integers y [B, M, h, w]."""
    with torch.enable_grad():
        y = y.detach().requires_grad_()
        walk = _walk_with(problem, rounded_walk, y)
    moved = [
        (group, value)
        for group, value in zip(walk.groups, walk.group_values, strict=True)
        if group.name == walk.groups[-1].name
    ]
    fixed = [group.distribution.fixed_at(value.detach()) for group, value in moved]

    def rate_of(y: Tensor) -> Tensor:
        rates = iter([
            -distribution.likelihood(value).log2()
            for value, distribution in zip(_values_of(moved, y), fixed, strict=True)
        ])  # fmt: skip
        name = walk.groups[-1].name
        return walk.whole(tuple(
            next(rates) if group.name == name else value
            for group, value in zip(walk.groups, walk.group_values, strict=True)
        ))[name]  # fmt: skip

    weight = problem.objective.bits_per_error(problem.x.size(1))
    error, x_hat, gradient = _error_and_gradient(problem, walk.y_hat)
    gradient = weight * gradient
    alone = len(moved) == 1 and fixed[0] is moved[0][0].distribution
    if alone:
        gradient = moved[0][0].step * gradient
    else:
        gradient = _gradient_through(walk, moved, fixed, y, gradient)
    y = y.detach()
    rate = rate_of(y)
    loss = rate.flatten(1).sum(1) + weight * error
    return Point(y, rate, rate_of, gradient, loss, walk, x_hat)


def _gradient_through(
    walk: Walk,
    moved: Sequence[tuple[Group, Tensor]],
    fixed: Sequence[Distribution],
    y: Tensor,
    to_y_hat: Tensor,
) -> Tensor:
    """The gradient to integers y that change the lattices and rates of other symbols too.

    Args:
        moved, fixed: the groups of y with their values, and their distributions at these.
        to_y_hat: the gradient of the weighted squared error to the walk's y_hat.
    """
    with torch.enable_grad():
        bits = [-group.distribution.likelihood(value).log2().sum() for group, value in moved]
        (through,) = torch.autograd.grad(
            [walk.y_hat, *bits], y, [to_y_hat, *map(torch.ones_like, bits)]
        )
        own = y.detach().requires_grad_()
        values = _values_of(moved, own)
        own_bits = [-distribution.likelihood(value).log2().sum()
                    for distribution, value in zip(fixed, values, strict=True)]  # fmt: skip
        return through - torch.autograd.grad(own_bits, own)[0]


def _draw_moves(
    point: Point, curvature: Tensor, temperature: float, generator: Generator | None
) -> Tensor:
    """Moves of -1, 0 or 1, [B, M, h, w]; two moves are more than `REACH` positions apart."""
    up, down = (
        (point.rate - point.rate_of(point.y + move) - move * point.gradient - curvature)
        / temperature
        + gumbel_noise(point.y, generator)
        for move in (1, -1)
    )
    # Gumbel-max: the largest score plus Gumbel noise is a draw from the scores' softmax.
    score, channel = torch.maximum(up, down).max(1, keepdim=True)  # [B, 1, h, w]
    highest = F.max_pool2d(score, 2 * REACH + 1, 1, REACH)
    picked = (score == highest) & (score > gumbel_noise(score, generator))
    moves = torch.zeros_like(point.y).scatter_(1, channel, picked.to(point.y.dtype))
    return torch.where(up > down, moves, -moves)


def _error_and_gradient(
    problem: Problem, y_hat: Tensor, x: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The squared error [B], x_hat shaped as x, and the error's gradient shaped as y_hat."""
    with torch.enable_grad():
        y_hat = y_hat.detach().requires_grad_()
        with problem.in_precision():
            error, x_hat = problem.squared_error(y_hat, x)
        (gradient,) = torch.autograd.grad(error.sum(), y_hat)
    return error.detach(), x_hat.detach(), gradient


def _curvature(problem: Problem, point: Point, generator: Generator | None) -> Tensor:
    """Half the second derivative of the squared error to each integer of y, shaped as y.

    We ignore the curvature of g_s itself, and that a symbol may move the lattices of others. Then
    it is the squared norm of J, the derivative of x_hat to the integer. This norm is the mean of
    (J^T r)^2 over noise r of unit variance. J^T r is half the gradient for the target x_hat - r.
    With weights of pixels, they are the variance of r, and the error is without them. Few draws
    give a noisy mean, so it is shrunk towards the product of its channel's and its position's mean.
    """
    total, unweighted = torch.zeros_like(point.y), replace(problem, weights=None)
    step = point.walk.groups[-1].step
    for _ in range(PROBES):
        noise = torch.empty_like(point.x_hat).normal_(generator=generator)
        if problem.weights is not None:
            noise *= problem.weights.sqrt()
        gradient = _error_and_gradient(unweighted, point.walk.y_hat, point.x_hat - noise)[2]
        total += (step * gradient / 2).square()
    drawn = total / PROBES
    of_channel, of_position = drawn.mean((2, 3), keepdim=True), drawn.mean(1, keepdim=True)
    mean = drawn.mean((1, 2, 3), keepdim=True).clamp_min(torch.finfo(drawn.dtype).tiny)
    typical = of_channel * of_position / mean
    # `drawn` has a relative variance of 2 / PROBES.
    trust = SPREAD**2 / (SPREAD**2 + 2 / PROBES)
    return typical + trust * (drawn - typical)


def polish_batch(
    problems: Sequence[Problem],
    trajectories: Sequence[Trajectory],
    config: RefineConfig,
    noise: ImageNoise,
    pace: Pace,
    progress: Callable[[Tensor, Tensor], None],
) -> None:
    """Polish the best latents of each image, and add a row with the result to its trajectory.

    With `max_seconds` the images share the time that is left. An image whose loss became infinite
    is not polished.

    Args:
        problems: one for each image.
        pace: the pace of the descent before.
        progress: called after each pass with two mean true losses, both the same.
    """
    remaining = [index for index, one in enumerate(trajectories) if not one.stopped]
    for polished, index in enumerate(remaining):
        image_problem, trajectory = problems[index], trajectories[index]
        waiting = len(remaining) - polished
        seconds = _share_of_time(config.max_seconds, pace, len(problems), waiting)
        step_seconds = pace.step_seconds / len(problems)  # a step of the batch moves them all
        if seconds is not None and seconds < LEAST_POLISH * step_seconds:
            break
        passes = Pace(0, config.polish_passes, seconds)
        generator = noise.of_image(index)
        mean_loss = fmean(trajectories[index].lowest_loss for index in remaining)

        def on_pass(gain: Tensor, mean_loss: float = mean_loss) -> None:
            loss = mean_loss - gain.mean() / problems[0].pixels / len(remaining)
            progress(loss, loss)  # polish has no relaxed loss

        latents = polish(image_problem, trajectory.finite_latents(), passes, generator, on_pass)
        (metrics,), x_hat = metrics_of(image_problem.true(latents), image_problem.x)
        step = trajectory.rows[-1]["step"] + passes.steps_taken
        at = {"step": step, "temperature": 0.0, "lmbda": trajectory.lmbda}
        row = row_of(at, metrics, metrics)
        clock = trajectory.clock[-1] + passes.elapsed
        trajectory.add(row, latents, x_hat, clock, trajectory.told)


def _share_of_time(
    max_seconds: float | None, pace: Pace, images: int, waiting: int
) -> float | None:
    """The seconds for the polish of one image, without its evaluation at the end; None: no limit.

    Args:
        max_seconds: for each image. `pace.seconds`, of the whole batch, is shorter by the time of
            two evaluations of the batch.
        images: how many images the batch has; waiting: how many are not yet polished.
    """
    if not max_seconds or pace.seconds is None:
        return None
    limit = max_seconds * images
    evaluation = (limit - pace.seconds) / (2 * images)
    return (limit - pace.elapsed) / waiting - evaluation
