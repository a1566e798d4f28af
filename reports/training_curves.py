"""Draw the curves of trainings that follow on one another, over hours.

python -m reports.training_curves curves.png --chain "lambda 0.01" checkpoints/a checkpoints/b

A chain is a label and its runs in order: folders of `train.py`, or their metrics.jsonl. Chains may
share runs. The option can be given more than once.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from common.command_line import script_parser
from common.errors import InputError, exits_with_one_line
from common.files import user_path, write_whole
from common.records import Record, read_metrics

PANELS = (("loss", "R-D loss"), ("psnr", "PSNR (dB)"), ("bpp", "bits per pixel"))


class Chain(NamedTuple):
    """Trainings, each from the weights of the one before: their rows, with `hours` since the start.

    `ends`: the hours at which each of them ended.
    """

    label: str
    rows: list[Record]
    ends: list[float]


def chain_of(label: str, runs: Sequence[Sequence[Record]]) -> Chain:
    """Join the rows of the metrics.jsonl of several runs; only steps count, and no tests."""
    rows, ends, seconds = [], [], 0.0
    for run in runs:
        step = 0
        for row in run:
            if row["kind"] == "train":
                seconds += (row["step"] - step) / row["steps_per_second"]
                step = row["step"]
            rows.append({**row, "hours": seconds / 3600})
        ends.append(seconds / 3600)
    return Chain(label, rows, ends)


def plot_chains(chains: Sequence[Chain]) -> Figure:
    """Loss, PSNR and rate over hours: lines for training crops, points for test images."""
    figure = Figure(figsize=(14, 4.6), dpi=110, layout="constrained")
    for axis, (key, label) in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        for number, chain in enumerate(chains):
            colour = f"C{number}"
            for kind, style in (("train", {"lw": 0.9, "alpha": 0.7, "label": chain.label}),
                                ("test", {"ls": "", "marker": "o", "ms": 4})):  # fmt: skip
                known = [row for row in chain.rows if row["kind"] == kind]
                axis.plot([row["hours"] for row in known], [row[key] for row in known],
                          color=colour, **style)  # fmt: skip
            for end in chain.ends[:-1]:
                axis.axvline(end, color=colour, lw=0.6, ls=":")
        axis.set(xlabel="hours of steps", ylabel=label)
        axis.grid(alpha=0.3, which="both")
    losses = figure.axes[0]
    # The first steps' losses are a hundred times as high as the last ones'.
    losses.set(yscale="log", ylim=(None, 4 * max(chain.rows[-1]["loss"] for chain in chains)))
    losses.yaxis.set_major_formatter("{x:g}")
    losses.yaxis.set_minor_formatter("{x:g}")
    losses.legend(fontsize=8, title="lines: crops, points: test images", title_fontsize=8)
    return figure


@exits_with_one_line
def main(argv: Sequence[str] | None = None) -> int:
    """Write the picture; exit code 2 if a run has no metrics."""
    parser = script_parser(__doc__)
    parser.add_argument("picture", type=user_path, help="where to write it: .png or .svg")
    parser.add_argument("--chain", nargs="+", action="append", required=True,
                        metavar=("LABEL", "RUN"))  # fmt: skip
    arguments = parser.parse_args(argv)
    picture = Path(arguments.picture)
    if picture.suffix not in (".png", ".svg"):
        raise InputError(f"{picture}: must end in .png or .svg")
    if lone := [chain[0] for chain in arguments.chain if len(chain) < 2]:
        raise InputError(f"--chain {lone[0]}: names no run; give a label, then its runs in order")
    chains = [
        chain_of(label, [_rows_of(Path(user_path(run))) for run in runs])
        for label, *runs in arguments.chain
    ]
    print(write_whole(picture, plot_chains(chains).savefig))
    return 0


def _rows_of(run: Path) -> list[Record]:
    file = run / "metrics.jsonl" if run.is_dir() else run
    rows = read_metrics(file)
    if not rows:
        raise InputError(f"{file}: has no rows of metrics; name a training's folder or its metrics")
    return rows


if __name__ == "__main__":
    sys.exit(main())
