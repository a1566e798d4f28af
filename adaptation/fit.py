"""Fits the decoder's last layer to one picture, by rate and distortion.

For latents that stay as they are, the squared error is a quadratic function of the last layer (see
`adaptation.least_squares`). So the best change is found directly, and quantised such that the bits
that it costs are worth less than the error that it saves.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from adaptation.least_squares import Quadratic, quadratic_of, to_columns
from adaptation.quantise import Floats, Integers, change_in_bits, least, nearest, quantise
from architectures import Latents
from architectures.directions import Directions
from coding.adapted import DIRECTIONS, LAST_LAYER, adapted
from coding.payload import KINDS, Adaptation, Numbers, bits, lattice_code, step_code
from coding.runs import LARGEST
from objectives import Problem
from schemas.adapt import Adapt

# The last layer's weights are not even tried if they would save less than so many bits each.
LEAST_BITS = 1.0
# In bits; no step is coded that would suit a smaller or a larger one.
LEAST_CURVATURE, MOST_CURVATURE = 1e-8, 1e27
# Quantisation steps that are tried, times the one that is right for uncorrelated numbers at a high
# rate. The weights of the last layer are correlated, and may have larger steps.
STEPS = {DIRECTIONS: (1.0, 1.5, 2.2), LAST_LAYER: (2.0, 4.0)}


def adapted_problem(plain: Problem, told: Adaptation) -> Problem:
    """The problem with the model as `told` changes it, and with the bits that this costs.

    Args:
        plain: the problem with the model as it is.
    """
    return replace(plain, model=adapted(plain.model, told), told_bits=bits(told))


@dataclass(frozen=True)
class Adapter:
    """Finds what the decoder should be told of one picture.

    plain: the problem with the model as it is.
    """

    plain: Problem
    options: Adapt

    def problem(self, told: Adaptation) -> Problem:
        """See `adapted_problem`."""
        return adapted_problem(self.plain, told)

    def due(self, position: float, last: float, fits: int) -> bool:
        """Whether the next fit is due at a position of a schedule, after so many `fits`.

        They are evenly spaced; none is at the start or at the end.
        """
        return fits < min(self.options.fits, self.fits_before(position, last))

    def fits_before(self, position: float, last: float) -> int:
        """How many fits a schedule has up to a position."""
        return int(position * (self.options.fits + 1) / last)

    def with_lattice(self, train_lambda: float) -> Adaptation:
        """The adaptation before any fit: only the step of y's lattice, for the problem's lambda."""
        step = self.options.step_at(self.plain.objective.lmbda, train_lambda)
        return Adaptation(lattice_code(step))

    @torch.no_grad()
    def fitted(self, latents: Latents, told: Adaptation) -> Adaptation:
        """An adaptation with the same lattice, and the last layer fitted to the rounded latents.

        Each group is kept only if it saves more than its bits.
        """
        if not self.options.fits_the_decoder:
            return told
        only_lattice = Adaptation(told.lattice)
        problem = self.problem(only_lattice)
        y_hat = problem.model.round(latents, torch.round, problem.size).y_hat
        error, found = quadratic_of(problem, y_hat), only_lattice
        bits_per_error = problem.objective.bits_per_error()
        find = self.plain.model.find_directions
        if self.options.directions is not None and find is not None:
            directions: Directions = find()
            columns = to_columns(directions.weight, directions.bias).double()
            marked = found._replace(directions=directions.mark)
            group = _along(error, columns, bits_per_error, _bits_added(found, marked))
            if group is not None:
                found = marked._replace(groups=(group,))
                error = error.at(_change(columns, group))
        if self.options.last_layer:
            group = _of_each_weight(error, bits_per_error, _bits_added(found, found))
            if group is not None:
                found = found._replace(groups=(*found.groups, group))
        return found


def _bits_added(without: Adaptation, told: Adaptation) -> Callable[[Numbers], int]:
    """The bits of `told` and a further group, less those of an adaptation without it."""
    return lambda group: bits(told._replace(groups=(*told.groups, group))) - bits(without)


def _change(columns: Tensor, group: Numbers) -> Tensor:
    factors = torch.tensor(group.values, dtype=torch.float64) * group.step_size
    return torch.einsum("k,kpc->pc", factors, columns[: len(factors)])


def _along(
    error: Quadratic, columns: Tensor, bits_per_error: float, cost: Callable[[Numbers], int]
) -> Numbers | None:
    """The factors of directions, columns [K, P, 3]; None if they save less than their bits."""
    slope, gram = (bits_per_error * v.numpy() for v in error.along(columns))
    return _best(DIRECTIONS, gram, slope[:, None], np.ravel, cost)


def _of_each_weight(
    error: Quadratic, bits_per_error: float, cost: Callable[[Numbers], int]
) -> Numbers | None:
    """The changes of the last layer's weights; None if they save less than their bits."""
    gram = bits_per_error * error.gram[:-1, :-1].numpy()
    slopes = bits_per_error * error.slope[:-1].numpy()
    if not np.isfinite(gram).all():
        return None
    if (slopes * least(gram, slopes)).sum() < LEAST_BITS * slopes.size:
        return None
    return _best(LAST_LAYER, gram, slopes, _in_order_of_weights, cost)


def _in_order_of_weights(values: Integers) -> Integers:
    """Values [C * 25, 3] in the order of [C, 3, 5, 5]."""
    return values.reshape(-1, 25, values.shape[1]).transpose(0, 2, 1).ravel()


def _best(
    kind: str,
    gram: Floats,
    slopes: Floats,
    in_order: Callable[[Integers], Integers],
    cost: Callable[[Numbers], int],
) -> Numbers | None:
    """The group that saves most, of several quantisation steps; None if none saves anything.

    None also if the latents have gone so far astray that no numbers would fit into a file.

    Args:
        gram: [K, K], slopes: [K, parts]; in bits. The parts do not depend on each other.
        in_order: the numbers as a file has them, from integers [K, parts].
        cost: the bits that a file has more with a group.
    """
    best, lowest = None, 0.0
    curvature = float(np.diagonal(gram).mean())
    if not (np.isfinite(gram).all() and np.isfinite(slopes).all()):
        return None
    # With less curvature the numbers change no pixel.
    if not LEAST_CURVATURE <= curvature <= MOST_CURVATURE:
        return None
    for factor in STEPS[kind]:
        group = Numbers(KINDS.index(kind), step_code(factor * (6 / np.log(2) / curvature) ** 0.5))
        step = group.step_size
        of_step = step**2 * gram, step * slopes
        for start in (nearest(*of_step), np.zeros(slopes.shape, dtype=np.int64)):
            q = quantise(*of_step, start)
            values = in_order(q)
            if np.abs(values).max() > LARGEST:
                continue
            trimmed = group._replace(values=tuple(np.trim_zeros(values, "b").tolist()))
            total = change_in_bits(*of_step, q) + cost(trimmed)
            if total < lowest:
                best, lowest = trimmed, total
    return best
