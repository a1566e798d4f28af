"""What is made of a refinement's results at its end.

results/<save_name>/
    trajectory.csv/.png  the mean over the images
    before_after.png     every image from base to refined
    comparison.png       details of images before and after, with `save_final`
    summary.json         means over the images
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pandas as pd

from common.files import printable, write_whole
from common.logs import log
from common.records import Record, result_file, write_json
from reports.run_plots import plot_comparison, plot_rate_distortion, plot_trajectory
from reports.run_tables import format_table, mean_trajectory, summarize

MOST_SHOWN = 4  # images in comparison.png


def write_run_report(
    folder: Path, records: Sequence[Record], failed: dict[str, str], facts: Record
) -> int:
    """Write the tables and plots of a run, print its table and where all is; the exit code.

    Args:
        folder: the run's, with the trajectories and, where they are kept, the pictures.
        records: one for each image that is done, in order.
        failed: why images were skipped, by name.
        facts: what summary.json says of the run as a whole.

    Returns:
        0, or 1 where an image failed or none was refined.

    Raises:
        OSError: a file cannot be written.
    """
    if not records:
        log.error("no image was refined")
        return 1
    names = [record["name"] for record in records]
    tables = [pd.read_csv(result_file(folder, "trajectories", name, ".csv")) for name in names]
    trajectory = mean_trajectory(tables)
    write_whole(folder / "trajectory.csv", partial(trajectory.to_csv, index=False))
    summary = summarize(records, failed) | facts
    write_json(folder / "summary.json", summary)
    log.info("\n%s\n", format_table(records, summary))
    plots = [
        write_whole(folder / "trajectory.png", plot_trajectory(trajectory).savefig),
        write_whole(folder / "before_after.png", plot_rate_distortion(records).savefig),
    ]
    pictured = [name for name in names if result_file(folder, "reconstructions", name).is_dir()]
    if pictured:
        figure = plot_comparison(folder, records, pictured[:MOST_SHOWN])
        plots.append(write_whole(folder / "comparison.png", figure.savefig))
    log.info("results:  %s", folder)
    if "file_bpp" in records[0]["base"]:
        log.info("files:    %s", folder / "bitstreams")
    for label, path in zip(("plot:", "plot:", "images:"), plots, strict=False):
        log.info("%-9s %s", label, path)
    if pictured:
        log.info("%-9s %s", "images:", folder / "reconstructions")
    if failed:
        log.error("failed: %s", printable(", ".join(sorted(failed))))
    return 1 if failed else 0
