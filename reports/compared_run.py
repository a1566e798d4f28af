"""The runs that a comparison compares."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


class ComparedRun(NamedTuple):
    """One run of a comparison: a method with a model and a seed, and the folder of its results."""

    method: str
    model: str
    seed: int
    folder: Path


def first_seeds(runs: Sequence[ComparedRun], model: str) -> list[ComparedRun]:
    """The first run of each method with a model."""
    found: dict[str, ComparedRun] = {}
    for run in runs:
        if run.model == model:
            found.setdefault(run.method, run)
    return list(found.values())
