"""The table of an image's refinement over its steps, trajectories/<image>.csv of a run."""

from pathlib import Path

import pandas as pd

from common.errors import InputError
from common.records import result_file

COLUMNS = frozenset({"step", "temperature", "true_loss", "relaxed_loss"})


def read_trajectory(folder: Path, name: str) -> pd.DataFrame:
    """One row for each evaluated step of an image of a run; it has `COLUMNS`, and all are numbers.

    Raises:
        InputError: the file is missing or damaged.
    """
    path = result_file(folder, "trajectories", name, ".csv")
    try:
        table = pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); refine this image again") from None
    whole = len(table) and {*table.columns} >= COLUMNS and table["step"].is_unique
    if not whole or any(kind.kind not in "biuf" for kind in table.dtypes):
        raise InputError(f"{path}: is damaged; refine this image again")
    return table
