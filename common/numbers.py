"""Means, changes and printing of numbers that may be unknown (None)."""

from collections.abc import Iterable


def mean_of_known(values: Iterable[float | None]) -> float | None:
    """The mean of the values that are not None; None if all are."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def percent_change(before: float, after: float) -> float:
    """The change from `before` to `after` in percent of `before`."""
    return 100 * (after / before - 1)


def rounded(value: float | None, digits: int) -> str:
    """The value with `digits` digits after the point; "-" for None."""
    return "-" if value is None else f"{value:.{digits}f}"
