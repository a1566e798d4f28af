"""Write the report of a comparison: its tables, its plots, and the page that shows them.

results/<save_name>/
    report.html              tables and plots in one file that needs no network
    table.csv, table.md      means, and paired differences to the anchor with confidence intervals
    bd.csv                   Bjontegaard deltas to the anchor, per image and of the mean curve
    images.csv, codecs.csv   every image of every run; every image by classical codecs
    curves.csv               the points of the rate-distortion curves
    equal_rate.csv           what codecs and published curves reach at the rates of these points
    compressai/              the same points in the layout that CompressAI's plot tool reads
    *.png, *.svg             the plots
"""

import shutil
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from common.files import printable, short_enough, write_whole
from common.images import Images
from common.records import write_json
from config import CompareConfig, RefineConfig, folder_name
from reports.classical_codecs import codec_table
from reports.compared_run import ComparedRun, first_seeds
from reports.comparison_plots import (
    colors_of,
    plot_bits,
    plot_curves,
    plot_details,
    plot_loss,
    plot_probabilities,
    plot_trajectories,
)
from reports.comparison_tables import (
    bd_table,
    codec_curves,
    curve_points,
    image_table,
    mean_points,
    method_table,
    published_curves,
    rows_of_shared_images,
)
from reports.details import details_of
from reports.equal_rate import equal_rate_cells, equal_rate_table
from reports.page import markdown, markdown_of, write_page


# pyarrow's strings refuse names that are no text.
@pd.option_context("mode.string_storage", "python")
def write_report(
    config: CompareConfig, runs: Sequence[ComparedRun], refine_config: RefineConfig, images: Images
) -> Path | None:
    """Write all tables and plots and the page; print the main table.

    Args:
        refine_config: the config of any run with the first model.
        images: the image set that was refined.

    Returns:
        The page's path, or None where no image was refined by every method.

    Raises:
        InputError: a published curve cannot be read.
        OSError: a file cannot be written.
    """
    folder = Path(config.output_dir) / config.name
    rows = image_table(runs, images.names[: refine_config.image_count])
    shared = rows_of_shared_images(rows)
    if shared.empty:
        print(f"error: {folder}: no image was refined by every method", file=sys.stderr)
        return None
    dropped = sorted({*rows["image"]} - {*shared["image"]})
    if dropped:
        lost = printable(", ".join(dropped))
        print(f"not compared, for some method lacks them: {lost}")
    table, points = method_table(shared, config), curve_points(shared, config)
    bd = bd_table(points, config)
    codecs = codec_table(images, _names_of_all_models(shared), config.codecs, folder / "codecs.csv")
    published = published_curves(config.published)
    curves = pd.concat([mean_points(points), codec_curves(codecs), published])
    beside = equal_rate_table(points, codecs, published)
    tables = {"images": rows, "table": table, "bd": bd, "curves": curves}
    for key, values in {"codecs": codecs, "equal_rate": beside}.items():
        if len(values):
            tables[key] = values
        else:  # an earlier comparison may have had codecs
            (folder / f"{key}.csv").unlink(missing_ok=True)
    _write_tables(folder, tables)
    text = markdown(table)
    write_whole(folder / "table.md", lambda file: file.write_text(text, "utf-8"))
    write_for_compressai(folder, points)
    names: dict[str, Sequence[str]] = {
        model: list(own["image"].unique()) for model, own in shared.groupby("model")
    }
    plots = all_plots(config, runs, refine_config, images, curves, names)
    pictures = _write_plots(folder, plots)
    shown = {"table": table, "bd": bd, "equal_rate": beside}
    page = write_page(folder / "report.html", config, shared, shown, pictures)
    if len(beside):
        text += "\n" + markdown_of(*equal_rate_cells(beside))
    print(f"\n{text}\ntables:   {folder}\nreport:   {page}")
    return page


def _names_of_all_models(shared: pd.DataFrame) -> list[str]:
    """The images that are compared for every model."""
    counts = shared.groupby("image")["model"].nunique()
    return [name for name in counts.index if counts[name] == shared["model"].nunique()]


def _write_tables(folder: Path, tables: dict[str, pd.DataFrame]) -> None:
    for key, values in tables.items():
        if "image" in values:
            values = values.assign(image=values["image"].map(printable))
        write_whole(folder / f"{key}.csv", partial(values.to_csv, index=False))


def write_for_compressai(folder: Path, points: pd.DataFrame) -> None:
    """Write the curves of each image and of the mean in the format of CompressAI's plot tool.

    Raises:
        OSError: a file cannot be written.
    """
    # An earlier comparison may have written files of methods that are no longer in the config.
    shutil.rmtree(folder / "compressai", ignore_errors=True)
    every = pd.concat([points, mean_points(points).assign(image="mean")])
    for (image, curve), own in every.groupby(["image", "curve"], sort=False):
        own = own.sort_values("bpp")
        results = {"bpp": list(own["bpp"]), "psnr-rgb": list(own["psnr"])}
        if own["ms_ssim_db"].notna().all():
            # The plot tool converts MS-SSIM to dB itself.
            results["ms-ssim-rgb"] = list(1 - 10 ** (-own["ms_ssim_db"] / 10))
        path = folder / "compressai" / short_enough(str(image)) / f"{folder_name(curve)}.json"
        write_json(path, {"name": curve, "description": str(image), "results": results})


def all_plots(
    config: CompareConfig,
    runs: Sequence[ComparedRun],
    refine_config: RefineConfig,
    images: Images,
    curves: pd.DataFrame,
    names: dict[str, Sequence[str]],
) -> dict[str, Figure]:
    """The plots of a report, by their file names without suffix.

    Args:
        refine_config, images: see `write_report`.
        curves: see `comparison_plots`.
        names: the compared images of each model.
    """
    model = runs[0].model
    own = names.get(model, [])
    colors = colors_of([*config.methods, *curves.loc[~curves["dashed"].astype(bool), "curve"]])
    of_model = first_seeds(runs, model)
    plots = {"rate_distortion": plot_curves(curves, colors)}
    if (loss := plot_loss(runs, names, colors)) is not None:
        plots["loss"] = loss
    plots["trajectories"] = plot_trajectories(runs, model, own, colors)
    for number, name in enumerate(own[: config.shown], start=1):
        details = details_of(of_model, refine_config, images, name)
        if details is not None:
            plots[f"detail_{number}"] = plot_details(name, details)
            plots[f"bits_{number}"] = plot_bits(name, details)
    return plots | {"probabilities": plot_probabilities()}


def _write_plots(folder: Path, plots: dict[str, Figure]) -> dict[str, bytes]:
    """Write each plot as PNG and SVG; return the PNGs' bytes by name."""
    for plot in (file for kind in ("detail_*", "bits_*", "loss.*") for file in folder.glob(kind)):
        plot.unlink()  # an earlier comparison may have shown more
    pictures = {}
    for key, figure in plots.items():
        for suffix in ("png", "svg"):
            write_whole(folder / f"{key}.{suffix}", figure.savefig)
        pictures[key] = (folder / f"{key}.png").read_bytes()
    return pictures
