"""Numbers that may be unknown (None): their means, their changes, and how they are printed."""

from collections.abc import Iterable


def mean_of_known(values: Iterable[float | None]) -> float | None:
    """The mean of the values that are not None; None where there is none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def percent_change(before: float, after: float) -> float:
    """By how many percent `after` is above `before`."""
    return 100 * (after / before - 1)


def rounded(value: float | None, digits: int) -> str:
    """The value with so many digits after the point; "-" for None."""
    return "-" if value is None else f"{value:.{digits}f}"
