"""The table of an image's refinement over its steps, trajectories/<image>.csv of a run."""

from pathlib import Path

import pandas as pd

from common.errors import InputError
from common.records import result_file

COLUMNS = frozenset({"step", "temperature", "true_loss", "relaxed_loss"})


def read_trajectory(folder: Path, name: str) -> pd.DataFrame:
    """One row for each evaluated step of an image of a run, from 0 on; all columns are numbers.

    `COLUMNS` are in it. A loss may be infinite.

    Raises:
        InputError: the file is missing or damaged.
    """
    path = result_file(folder, "trajectories", name, ".csv")
    try:
        table = pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); refine this image again") from None
    sound = {*table.columns} >= COLUMNS and all(kind.kind in "biuf" for kind in table.dtypes)
    steps = table["step"] if sound else pd.Series()
    rises = steps.is_monotonic_increasing and steps.is_unique
    if not len(steps) or steps.dtype.kind != "i" or steps[0] != 0 or not rises:
        raise InputError(f"{path}: is damaged; refine this image again")
    return table
