"""Write the tables and plots of a refinement at its end.

results/<save_name>/
    trajectory.csv/.png  the trajectory, mean over the images
    before_after.png     rate and PSNR of each image, base and refined
    comparison.png       details of images, original, base and refined, with `save_final`
    summary.json         means over the images
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from common.files import write_whole
from common.logs import log
from common.records import Record, loss_name, result_file, write_json
from common.trajectories import read_trajectory
from reports.run_plots import plot_comparison, plot_rate_distortion, plot_trajectory
from reports.run_tables import format_regions, format_table, mean_trajectory, summarize

MOST_SHOWN = 4  # images in comparison.png


def write_run_report(
    folder: Path, records: Sequence[Record], failed: dict[str, str], facts: Record
) -> int:
    """Write the tables and plots of a run; log its table and the paths of the results.

    Args:
        folder: the run's folder, with the trajectories and, with `save_final`, the pictures.
        records: one for each image that is done, in order.
        failed: the reasons why images were skipped, by name.
        facts: further entries of summary.json, about the whole run.

    Returns:
        The exit code: 0, or 1 if an image failed or none was refined.

    Raises:
        InputError: a trajectory is missing or damaged.
        OSError: a file cannot be written.
    """
    if not records:
        log.error("no image was refined")
        return 1
    names = [record["name"] for record in records]
    tables = [read_trajectory(folder, name) for name in names]
    trajectory = mean_trajectory(tables)
    write_whole(folder / "trajectory.csv", partial(trajectory.to_csv, index=False))
    summary = summarize(records, failed) | facts
    write_json(folder / "summary.json", summary)
    log.info(f"\n{format_table(records, summary)}\n")
    if regions := format_regions(records, summary):
        log.info(f"{regions}\n")
    loss = f"loss, {loss_name(records[0])}"
    plots = [
        write_whole(folder / "trajectory.png", plot_trajectory(trajectory, loss).savefig),
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
        log.error("failed: %s", ", ".join(sorted(failed)))
    return 1 if failed else 0
