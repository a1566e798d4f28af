"""One run of a comparison."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


class ComparedRun(NamedTuple):
    """One run of a comparison: a method with a model and a seed, and the folder of its results.

    loss: what its loss counts, see `common.records.loss_name`; None: its losses have several
    lambdas, and cannot be compared.
    """

    method: str
    model: str
    seed: int
    folder: Path
    loss: str | None = "mse"


def first_seeds(runs: Sequence[ComparedRun], model: str) -> list[ComparedRun]:
    """The run of each method with a model and the first seed, in the order of methods."""
    found: dict[str, ComparedRun] = {}
    for run in runs:
        if run.model == model:
            found.setdefault(run.method, run)
    return list(found.values())
