"""Draw the plots of docs/study.md, and print its tables, from the CSV files beside them.

python -m study.draw my_study
"""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import matplotlib as mpl
import pandas as pd

from common.command_line import script_parser
from common.errors import InputError, exits_with_one_line
from common.files import user_path, write_whole
from reports.page_tables import markdown_of
from study.plots import figures_of
from study.tables import tables_of

# The columns of a table, by the name of its file; the second ones have real numbers.
COLUMNS = {
    "losses": (
        ("study", "method", "model", "seed", "image"),
        ("loss_500", "loss", "bpp", "psnr", "ms_ssim_db"),
    ),
    "curves": (("study", "method", "model"), ("step", "loss")),
}


@exits_with_one_line
def main(argv: Sequence[str] | None = None) -> int:
    """Write the plots and print the tables; exit code 0, 2 where the CSV files are missing."""
    parser = script_parser(__doc__)
    parser.add_argument("folder", type=user_path, help="where losses.csv and curves.csv are")
    folder = Path(parser.parse_args(argv).folder)
    losses, curves = (read_table(folder / f"{name}.csv") for name in ("losses", "curves"))
    for title, cells in tables_of(losses, curves):
        print(f"{title}\n\n{markdown_of(cells)}")
    # Text stays text; without a date and random names the same table gives the same file.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "study"}):
        for name, figure in figures_of(losses, curves):
            path = folder / f"{name}.svg"
            write_whole(path, partial(figure.savefig, metadata={"Date": None}))
            print(path)
    return 0


def read_table(path: Path) -> pd.DataFrame:
    """A CSV file of `study.collect`.

    Raises:
        InputError: it is missing or damaged.
    """
    names, numbers = COLUMNS[path.stem]
    try:
        table = pd.read_csv(path, dtype=dict.fromkeys(numbers, float))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: cannot be read ({error}); study.collect writes such a file"
        ) from None
    if lacking := [name for name in (*names, *numbers) if name not in table]:
        raise InputError(
            f"{path}: has no column {', '.join(lacking)}; study.collect writes such a file"
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
