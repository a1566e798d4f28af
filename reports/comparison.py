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
from reports.answer import answer
from reports.classical_codecs import codec_table
from reports.compared_run import ComparedRun, first_seeds
from reports.comparison_plots import (
    plot_bits,
    plot_curves,
    plot_details,
    plot_loss,
    plot_trajectories,
)
from reports.comparison_tables import (
    Tables,
    bd_table,
    codec_curves,
    curve_points,
    image_table,
    mean_curve,
    mean_points,
    method_table,
    published_curves,
    rows_of_shared_images,
)
from reports.details import Detail, details_of
from reports.equal_rate import equal_rate_table
from reports.page import Shown, write_page
from reports.page_data import picture_data
from reports.page_tables import equal_rate_cells, markdown, markdown_of
from reports.styles import Style, styles_of


# pyarrow's strings refuse names that are no text.
@pd.option_context("mode.string_storage", "python")
def write_report(
    config: CompareConfig,
    runs: Sequence[ComparedRun],
    configs: dict[str, RefineConfig],
    images: Images,
    remarks: Sequence[str] = (),
) -> Path | None:
    """Write all tables and plots and the page; print the result and the main table.

    Args:
        configs: the config of any run with each model, by the model's label.
        images: the image set that was refined.
        remarks: what the page shall say, such as what is not done yet.

    Returns:
        The page's path, or None where no image was refined by every method.

    Raises:
        InputError: a published curve cannot be read.
        OSError: a file cannot be written.
    """
    folder, first = Path(config.output_dir) / config.name, configs[runs[0].model]
    rows = image_table(runs, images.names[: first.image_count])
    shared = rows_of_shared_images(rows)
    if shared.empty:
        whom = "" if rows.empty else " by every method"
        print(f"error: {folder}: no image was refined{whom}; see above", file=sys.stderr)
        return None
    dropped = sorted({*rows["image"]} - {*shared["image"]})
    if dropped:
        lost = printable(", ".join(dropped))
        print(f"not compared, for some method lacks them: {lost}")
    tables = tables_of(config, shared, images, folder / "codecs.csv")
    text = _write_tables(folder, rows, tables)
    names: dict[str, Sequence[str]] = {
        model: list(own["image"].unique()) for model, own in shared.groupby("model")
    }
    trajectories = trajectories_of(runs, names)
    details = details_by_image(config, runs, configs, images, names)
    own_curves = tables.curves.loc[~tables.curves["dashed"].astype(bool), "curve"]
    styles = styles_of([*config.methods, *own_curves])
    _write_plots(folder, all_plots(runs[0].model, trajectories, tables.curves, details, styles))
    pictures = [picture_data(name, by_model) for name, by_model in details.items()]
    result = answer(shared, config, first.target)
    shown = Shown(result, tables, trajectories, styles, pictures, remarks)
    page = write_page(folder / "report.html", config, shown)
    print(f"\n{result}\n\n{text}\ntables:   {folder}\nreport:   {page}")
    return page


def tables_of(config: CompareConfig, shared: pd.DataFrame, images: Images, known: Path) -> Tables:
    """The tables of a report.

    Args:
        shared: the table of `rows_of_shared_images`.
        known: see `codec_table`.

    Raises:
        InputError: a published curve cannot be read.
    """
    points = curve_points(shared, config)
    codecs = codec_table(images, _names_of_all_models(shared), config.codecs, known)
    published = published_curves(config.published)
    return Tables(
        shared, method_table(shared, config), points, bd_table(points, config), codecs,
        curves=pd.concat([mean_points(points), codec_curves(codecs), published]),
        equal_rate=equal_rate_table(points, codecs, published),
    )  # fmt: skip


def _names_of_all_models(shared: pd.DataFrame) -> list[str]:
    """The images that are compared for every model."""
    counts = shared.groupby("image")["model"].nunique()
    return [name for name in counts.index if counts[name] == shared["model"].nunique()]


def _write_tables(folder: Path, rows: pd.DataFrame, tables: Tables) -> str:
    """Write the tables; returns those that are printed, as Markdown.

    Args:
        rows: the table of `image_table`.
    """
    files = {"images": rows, "table": tables.methods, "bd": tables.bd, "curves": tables.curves,
             "codecs": tables.codecs, "equal_rate": tables.equal_rate}  # fmt: skip
    for key, values in files.items():
        if key in ("codecs", "equal_rate") and values.empty:
            (folder / f"{key}.csv").unlink(missing_ok=True)  # an earlier comparison may have some
            continue
        if "image" in values:
            values = values.assign(image=values["image"].map(printable))
        write_whole(folder / f"{key}.csv", partial(values.to_csv, index=False))
    text = markdown(tables.methods)
    write_whole(folder / "table.md", lambda file: file.write_text(text, "utf-8"))
    write_for_compressai(folder, tables.points)
    if tables.equal_rate.empty:
        return text
    return f"{text}\n{markdown_of(equal_rate_cells(tables.equal_rate))}"


def write_for_compressai(folder: Path, points: pd.DataFrame) -> None:
    """Write the curves of each image and of the mean in the format of CompressAI's plot tool.

    Raises:
        OSError: a file cannot be written.
    """
    folder = folder / "compressai"
    written = set()
    every = pd.concat([points, mean_points(points).assign(image="mean")])
    for (image, curve), own in every.groupby(["image", "curve"], sort=False):
        own = own.sort_values("bpp")
        results = {"bpp": list(own["bpp"]), "psnr-rgb": list(own["psnr"])}
        if own["ms_ssim_db"].notna().all():
            # The plot tool converts MS-SSIM to dB itself.
            results["ms-ssim-rgb"] = list(1 - 10 ** (-own["ms_ssim_db"] / 10))
        path = folder / short_enough(str(image)) / f"{folder_name(curve)}.json"
        written.add(
            write_json(path, {"name": curve, "description": str(image), "results": results})
        )
    # An earlier comparison may have written files of methods that are no longer in the config.
    for old in {*folder.rglob("[!.]*.json")} - written:
        old.unlink(missing_ok=True)


def trajectories_of(
    runs: Sequence[ComparedRun], names: dict[str, Sequence[str]]
) -> dict[ComparedRun, pd.DataFrame]:
    """The mean trajectory of the run with the first seed of each method and model.

    Args:
        names: the compared images of each model.
    """
    found = {}
    for model in dict.fromkeys(run.model for run in runs):
        for run in first_seeds(runs, model):
            curve = mean_curve(run, names.get(model, ()))
            if not curve.empty:
                found[run] = curve
    return found


def details_by_image(
    config: CompareConfig,
    runs: Sequence[ComparedRun],
    configs: dict[str, RefineConfig],
    images: Images,
    names: dict[str, Sequence[str]],
) -> dict[str, dict[str, Sequence[Detail]]]:
    """The versions of each shown image with the first model; of the first image with every model.

    Args:
        configs, images: see `write_report`.
        names: the compared images of each model.
    """
    found: dict[str, dict[str, Sequence[Detail]]] = {}
    models = list(dict.fromkeys(run.model for run in runs))
    shown = list(names.get(models[0], ()))[: config.shown]
    for number, name in enumerate(shown):
        for model in models if number == 0 else models[:1]:
            done = [run for run in first_seeds(runs, model) if name in names.get(model, ())]
            details = details_of(done, configs[model], images, name) if done else None
            if details is not None:
                found.setdefault(name, {})[model] = details
    return found


def all_plots(
    model: str,
    trajectories: dict[ComparedRun, pd.DataFrame],
    curves: pd.DataFrame,
    details: dict[str, dict[str, Sequence[Detail]]],
    styles: dict[str, Style],
) -> dict[str, Figure]:
    """The plots of a report, by their file names without suffix.

    Args:
        model: the first model; plots of trajectories and details are of it.
        trajectories, details: of `trajectories_of` and `details_by_image`.
        curves: see `comparison_plots`.
    """
    plots = {"rate_distortion": plot_curves(curves, styles)}
    if (loss := plot_loss(trajectories, styles)) is not None:
        plots["loss"] = loss
    own = {run: curve for run, curve in trajectories.items() if run.model == model}
    plots["trajectories"] = plot_trajectories(own, styles)
    for number, (name, by_model) in enumerate(details.items(), start=1):
        if model in by_model:
            plots[f"detail_{number}"] = plot_details(name, by_model[model])
            plots[f"bits_{number}"] = plot_bits(name, by_model[model])
    return plots


def _write_plots(folder: Path, plots: dict[str, Figure]) -> None:
    """Write each plot as PNG and SVG."""
    # An earlier comparison may have had more; older code drew the probabilities, too.
    kinds = ("detail_*", "bits_*", "loss.*", "probabilities.*")
    for plot in (file for kind in kinds for file in folder.glob(kind)):
        plot.unlink(missing_ok=True)  # another report of the same folder may be written now
    for key, figure in plots.items():
        for suffix in ("png", "svg"):
            write_whole(folder / f"{key}.{suffix}", figure.savefig)
