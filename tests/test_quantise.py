"""Numbers quantised by bits and error together: exhaustive search, and costs computed once more."""

import itertools

import numpy as np
import pytest

from adaptation import quantise as quantising
from adaptation.quantise import change_in_bits, least, nearest, quantise
from coding.runs import cost_in_bits

CURVATURE = 6 / np.log(2)  # of numbers with the usual quantisation step, in bits


def correlated(rng, count, curvature=CURVATURE, noise=0.3):
    """A gram matrix of numbers that partly replace each other, with this mean curvature."""
    root = rng.standard_normal((count, 3 * count)) + rng.standard_normal(3 * count)
    root += noise * rng.standard_normal(root.shape)
    gram = root @ root.T
    return gram * curvature / np.diagonal(gram).mean()


def bits_of(q):
    """The bits that a file's sort of code takes: a share of zeros, a sign, a geometric law."""
    magnitudes = np.abs(q).ravel().astype(float)
    nonzero = (magnitudes > 0).sum()
    share = (nonzero + 0.5) / (len(magnitudes) + 1)
    stay = max(1 - nonzero / max(magnitudes.sum(), 1), 0.05)
    p = [share * (1 - stay) * stay ** (m - 1) / 2 if m else 1 - share for m in magnitudes]
    return -np.log2(p).sum()


def value(gram, slopes, q):
    """The squared error in bits, without its constant, entry by entry."""
    total = 0.0
    for part in range(q.shape[1]):
        for k, l in itertools.product(range(len(q)), repeat=2):  # noqa: E741
            total += q[k, part] * gram[k, l] * q[l, part]
        total -= 2 * (slopes[:, part] * q[:, part]).sum()
    return total


# --- real numbers ---------------------------------------------------------------------------------


def test_the_change_in_bits_is_the_sum_of_its_entries():
    rng = np.random.default_rng(0)
    gram, slopes, q = correlated(rng, 5), rng.standard_normal((5, 3)), rng.integers(-4, 5, (5, 3))
    assert change_in_bits(gram, slopes, q) == pytest.approx(value(gram, slopes, q), rel=1e-12)


def test_the_least_squared_error_is_at_the_solution():
    """A ridge of a thousandth of each curvature moves it a little."""
    rng = np.random.default_rng(1)
    gram = correlated(rng, 20, noise=3)
    truth = rng.standard_normal((20, 3))
    found = least(gram, gram @ truth)
    assert np.abs(found - truth).max() < 0.02
    lowest = change_in_bits(gram, gram @ truth, truth)
    assert change_in_bits(gram, gram @ truth, found) < 0.9999 * lowest  # both are negative
    shrunken = least(np.diag([4.0, 4.0]), np.array([[4.0], [8.0]]), noise=4.0)
    np.testing.assert_allclose(shrunken, [[0.5], [1.0]], rtol=1e-3)


def test_numbers_that_change_nothing_are_zero():
    gram = np.array([[9.0, 0.0, 3.0], [0.0, 0.0, 0.0], [3.0, 0.0, 9.0]])
    slopes = gram @ np.array([[2.2], [5.0], [-1.3]])
    found = least(gram, slopes)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[[0, 2], 0], [2.2, -1.3], atol=0.01)
    assert found[1, 0] == 0
    with np.errstate(all="raise", under="ignore"):
        q = quantise(gram, slopes, nearest(gram, slopes))
    assert q[:, 0].tolist() == [2, 0, -1]
    nothing = np.zeros((3, 3))
    assert not least(nothing, np.zeros((3, 1))).any()
    assert not quantise(nothing, np.zeros((3, 1)), np.zeros((3, 1), np.int64)).any()


def test_two_numbers_for_the_same_thing_share_it():
    """The gram matrix has no inverse."""
    gram = np.array([[20.0, 20.0], [20.0, 20.0]])
    slopes = gram @ np.array([[3.0], [0.0]])
    found = least(gram, slopes)
    assert found.sum() == pytest.approx(3, rel=0.01)
    q = quantise(gram, slopes, nearest(gram, slopes))
    assert q.sum() == 3


# --- integers -------------------------------------------------------------------------------------


def test_without_a_slope_all_are_zero():
    rng = np.random.default_rng(2)
    gram, slopes = correlated(rng, 12), np.zeros((12, 3))
    assert not nearest(gram, slopes).any()
    start = np.zeros((12, 3), np.int64)
    start[[2, 7, 7], [0, 1, 2]] = 3, -1, 1
    assert not quantise(gram, slopes, start).any()
    uncorrelated = np.diag(np.diagonal(gram))
    assert not quantise(uncorrelated, slopes, rng.integers(-3, 4, (12, 3))).any()


@pytest.mark.parametrize("seed", range(6))
def test_uncorrelated_numbers_get_the_best_integers_for_given_costs(seed, monkeypatch):
    """Any costs that never fall with the magnitude; each integer of a range is tried."""
    rng = np.random.default_rng(seed)
    zero, one, more = rng.uniform(0, 2), rng.uniform(2, 6), rng.uniform(0.1, 4)

    def costs(values):
        magnitudes = np.abs(values)
        return np.where(magnitudes == 0, zero, one + more * (magnitudes - 1))

    monkeypatch.setattr(quantising, "_costs_of", lambda q: costs)
    gram = np.diag(rng.uniform(5, 60, 4))
    slopes = gram @ rng.laplace(0, 2, (4, 2))
    q = quantise(gram, slopes, nearest(gram, slopes))
    integers = np.arange(-40, 41)
    for k, part in np.ndindex(q.shape):
        scores = gram[k, k] * integers**2 - 2 * slopes[k, part] * integers + costs(integers)
        assert q[k, part] == integers[scores.argmin()]


@pytest.mark.parametrize("seed", range(8))
def test_a_few_numbers_are_close_to_the_best_of_all(seed):
    """All integers between -3 and 3 of three correlated numbers, with the bits that they take."""
    rng = np.random.default_rng(seed)
    gram = correlated(rng, 3)
    slopes = gram @ rng.laplace(0, 1, (3, 1)).clip(-2.5, 2.5)
    every = (np.array(q)[:, None] for q in itertools.product(range(-3, 4), repeat=3))
    lowest = min(value(gram, slopes, q) + bits_of(q) for q in every)
    q = quantise(gram, slopes, nearest(gram, slopes))
    found = value(gram, slopes, q) + bits_of(q)
    assert lowest - 1e-9 <= found < lowest + 3
    assert found <= bits_of(0 * q) + 1e-9


@pytest.mark.parametrize("seed", range(6))
def test_it_does_not_end_above_its_start(seed):
    rng = np.random.default_rng(seed)
    gram = correlated(rng, 30, CURVATURE * rng.choice([1, 2, 5]))
    slopes = gram @ rng.laplace(0, rng.choice([0.3, 1, 3]), (30, 2))
    rounded = np.rint(np.linalg.solve(gram, slopes)).astype(np.int64)
    for start in (nearest(gram, slopes), rounded, np.zeros((30, 2), np.int64)):
        kept = start.copy()
        q = quantise(gram, slopes, start)
        assert np.array_equal(start, kept)
        assert (q.dtype, q.shape) == (np.int64, (30, 2))
        before, after = (value(gram, slopes, v) + bits_of(v) for v in (start, q))
        assert after <= before + 1e-9


def test_correlated_numbers_are_better_than_rounded_ones():
    """Together they save more, in fewer bits of a file, than each rounded alone."""
    gains = []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        gram = correlated(rng, 40)
        slopes = gram @ rng.laplace(0, 0.7, (40, 1))
        rounded = np.rint(np.linalg.solve(gram, slopes)).astype(np.int64)
        q = quantise(gram, slopes, nearest(gram, slopes))
        before, after = (value(gram, slopes, v) + cost_in_bits(v.ravel()) for v in (rounded, q))
        gains.append(before - after)
    assert min(gains) > 0
    assert np.mean(gains) > 8


def test_parts_do_not_depend_on_each_other_but_for_their_costs(monkeypatch):
    rng = np.random.default_rng(3)
    gram = correlated(rng, 15)
    slopes = gram @ rng.laplace(0, 1, (15, 3))
    monkeypatch.setattr(quantising, "_costs_of", lambda q: np.abs)
    together = quantise(gram, slopes, nearest(gram, slopes))
    alone = [quantise(gram, part, nearest(gram, part)) for part in np.split(slopes, 3, 1)]
    assert np.array_equal(together, np.concatenate(alone, 1))
