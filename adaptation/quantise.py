"""Numbers for the decoder, quantised so that bits and squared error together are least.

The squared error, in bits, is q^T gram q - 2 slope^T q for integers q, and a constant.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

SWEEPS = 4  # over all numbers; later ones hardly change any
# The share of numbers that are not 0, and their mean magnitude, before any is known. A cautious
# guess would leave all at 0, because each alone would be dear.
FIRST_GUESS = 0.25, 1.5
RIDGE = 1e-3  # of each number's own curvature, against noise where the gram matrix tells little


def least(gram: Floats, slopes: Floats, noise: float = 0.0) -> Floats:
    """The real numbers [K, parts] with the least squared error.

    Args:
        gram: [K, K], in bits; slopes: [K, parts], in bits. noise: a curvature that is added.
    """
    floor = np.finfo(np.float64).tiny + 1e-9 * np.diagonal(gram).max()
    stable = gram + np.diag(RIDGE * np.diagonal(gram) + floor + noise)
    solution: Floats = np.linalg.solve(stable, slopes)
    return solution


def nearest(gram: Floats, slopes: Floats) -> Integers:
    """The integers next to a solution that is drawn to 0, as the bits will draw it."""
    return np.rint(least(gram, slopes, 0.5)).astype(np.int64)


def quantise(gram: Floats, slopes: Floats, start: Integers) -> Integers:
    """Integers [K, parts] that make bits and squared error together small.

    It moves one number at a time to 0 or to an integer beside its own optimum, and estimates the
    bits of a value from how often it occurs. So it may miss the minimum.

    Args:
        gram: [K, K], in bits; slopes: [K, parts], in bits. start: [K, parts].
    """
    q = start.copy()
    curvature = np.maximum(np.diagonal(gram), np.finfo(np.float64).tiny)
    for _ in range(SWEEPS):
        costs, before = _costs_of(q), q.copy()
        for part, slope in zip(q.T, slopes.T, strict=True):
            _sweep(gram, slope, part, curvature, costs)
        if np.array_equal(q, before):
            break
    return q


def _sweep(
    gram: Floats,
    slope: Floats,
    q: Integers,
    curvature: Floats,
    costs: Callable[[Floats], Floats],
) -> None:
    """Move each of the integers q [K] once, in place."""
    left = slope - gram @ q
    first = costs(np.array([0.0, 1.0]))
    # A 0 that would not even pay for becoming 1 stays; this spares most numbers the search.
    tried = (q != 0) | (left**2 > curvature * (first[1] - first[0]))
    # Those that promise most come first, so that the others correct what is left.
    order = np.argsort(-(left**2) / curvature)
    for k in order[tried[order]]:
        best = q[k] + left[k] / curvature[k]
        candidates = np.array([0.0, np.floor(best), np.ceil(best)])
        scores = curvature[k] * (candidates - best) ** 2 + costs(candidates)
        new = int(candidates[np.argmin(scores)])
        if new != q[k]:
            left -= gram[:, k] * (new - q[k])
            q[k] = new


def change_in_bits(gram: Floats, slopes: Floats, q: Integers) -> float:
    """q^T gram q - 2 slope^T q, summed over the parts."""
    return float((q * (gram @ q - 2 * slopes)).sum())


def _costs_of(q: Integers) -> Callable[[Floats], Floats]:
    """Bits of values under a two-sided geometric distribution with a free share of zeros."""
    nonzero = int(np.count_nonzero(q))
    share, mean = FIRST_GUESS
    if nonzero:
        share, mean = (nonzero + 0.5) / (q.size + 1), np.abs(q).sum() / nonzero
    stay = max(1 - 1 / mean, 0.05)  # that a magnitude goes on
    zero, one, more = -np.log2(1 - share), 1 - np.log2(share * (1 - stay)), -np.log2(stay)

    def costs(values: Floats) -> Floats:
        magnitude = np.abs(values)
        return np.where(magnitude == 0, zero, one + more * (magnitude - 1))

    return costs
