"""Plots of one run; each function returns one matplotlib figure."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

from common.files import label_of
from common.records import Record, rate_of, result_file

RELAXED, TRUE = "tab:orange", "tab:blue"
# Names may have letters that the font lacks; matplotlib draws a box for each.
warnings.filterwarnings("ignore", message="Glyph .* missing from")


def plot_trajectory(table: pd.DataFrame) -> Figure:
    """Relaxed and true loss, bpp and PSNR over the steps, with the temperature.

    Args:
        table: the table of `run_tables.mean_trajectory`.
    """
    figure = Figure(figsize=(13, 3.8), dpi=120, layout="constrained")
    panels = (
        ("loss", "R-D loss"),
        ("bpp", "bits per pixel"),
        ("psnr_raw", "PSNR (dB, raw floats)"),
    )
    for axis, (key, label) in zip(figure.subplots(1, 3), panels, strict=True):
        axis.plot(table["step"], table[f"relaxed_{key}"], color=RELAXED, lw=1, label="relaxed")
        axis.plot(table["step"], table[f"true_{key}"], color=TRUE, lw=1.8, label="true")
        axis.axhline(
            table[f"true_{key}"].iloc[0], color="grey", lw=0.8, ls=":", label="base (true)"
        )
        axis.set(xlabel="step", ylabel=label)
        axis.grid(alpha=0.3)
        heat = axis.twinx()
        heat.plot(table["step"], table["temperature"], color="tab:red", lw=0.8, ls="--", alpha=0.6)
        heat.set(ylim=(0, 1.02))
        heat.tick_params(axis="y", colors="tab:red", labelsize=7)
        if key == "psnr_raw":
            heat.set_ylabel("temperature (dashed)", color="tab:red", fontsize=8)
        if key == "loss":
            axis.legend(fontsize=8)
    count = int(table["images"].max())
    figure.suptitle(f"Refinement, mean over {count} image{'s' if count > 1 else ''}", fontsize=10)
    return figure


def plot_training(rows: Sequence[Record]) -> Figure:
    """Loss, rate and quality over the steps, of the training and of its tests.

    Args:
        rows: the rows of a metrics.jsonl.
    """
    figure = Figure(figsize=(13, 3.8), dpi=120, layout="constrained")
    panels = (("loss", "R-D loss"), ("bpp", "bits per pixel"), ("psnr", "PSNR (dB)"))
    for axis, (key, label) in zip(figure.subplots(1, 3), panels, strict=True):
        for kind, style in (
            ("train", {"color": RELAXED}),
            ("test", {"color": TRUE, "marker": "o"}),
        ):
            known = [row for row in rows if row["kind"] == kind and row.get(key) is not None]
            if known:
                x, y = zip(*((row["step"], row[key]) for row in known), strict=True)
                name = "training crops, noise" if kind == "train" else "test images, rounded"
                axis.plot(x, y, lw=1.2, ms=4, label=name, **style)
        axis.set(xlabel="step", ylabel=label, yscale="log" if key == "loss" else "linear")
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=8)
    return figure


def plot_rate_distortion(records: Sequence[Record]) -> Figure:
    """Bits per pixel and PSNR: an arrow from base to refined for each image and for the mean."""
    lmbdas = {record["lmbda"] for record in records}
    lmbda = f"lambda {min(lmbdas):.3g}" + (f" to {max(lmbdas):.3g}" if len(lmbdas) > 1 else "")
    title = f"{records[0]['method']}, {lmbda}\nup and to the left is better"
    figure = Figure(figsize=(6.4, 4.8), dpi=120, layout="constrained")
    axis = figure.subplots()
    known = [r for r in records if None not in (r["base"]["psnr"], r["refined"]["psnr"])]
    points = {
        side: np.array([[rate_of(r[side]), r[side]["psnr"]] for r in known]).reshape(-1, 2)
        for side in ("base", "refined")
    }
    for start, end in zip(points["base"], points["refined"], strict=True):
        axis.annotate("", xy=end, xytext=start, arrowprops={"arrowstyle": "->", "color": "grey"})
    mean = {side: values.mean(axis=0) for side, values in points.items() if len(values)}
    if len(known) > 1:
        axis.annotate("", xy=mean["refined"], xytext=mean["base"],
                      arrowprops={"arrowstyle": "->", "lw": 2})  # fmt: skip
        axis.annotate("mean", mean["base"], textcoords="offset points", xytext=(6, 3))
    for side, color in (("base", RELAXED), ("refined", TRUE)):
        bpp, db = points[side].T
        axis.scatter(bpp, db, color=color, label=side, zorder=3, s=22)
    if len(known) <= 12:
        for record, point in zip(known, points["refined"], strict=True):
            axis.annotate(
                label_of(Path(record["name"]).stem), point, parse_math=False,
                textcoords="offset points", xytext=(6, 3),
                fontsize=8,
            )  # fmt: skip
    kind = "of the files" if "file_bpp" in records[0]["base"] else "(estimate)"
    axis.set(xlabel=f"bits per pixel {kind}", ylabel="PSNR (dB)", title=title)
    axis.margins(0.18)
    axis.grid(alpha=0.3)
    axis.legend()
    return figure


def plot_comparison(folder: Path, records: Sequence[Record], names: Sequence[str]) -> Figure:
    """A detail of each image, where refinement improved it most: original, base and refined.

    Args:
        folder: the run's folder, which has the pictures.
        names: the images to show.

    Raises:
        OSError: a picture cannot be read.
    """
    by_name = {record["name"]: record for record in records}
    figure = Figure(figsize=(9, 3.2 * len(names) + 0.4), dpi=110, layout="constrained")
    figure.suptitle(
        f"Details of {len(names)} of {len(records)} images; bpp and PSNR are of the whole image",
        fontsize=9,
    )
    axes = figure.subplots(len(names), 3, squeeze=False)
    for row, name in zip(axes, names, strict=True):
        record = by_name[name]
        pictures = {
            label: np.asarray(
                Image.open(result_file(folder, "reconstructions", name) / f"{label}.png")
            )
            for label in ("original", "base", "refined")
        }
        window = most_improved(*pictures.values())
        for axis, (label, picture) in zip(row, pictures.items(), strict=True):
            axis.imshow(picture[window], interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            title = f"{label_of(name)}: {label}"
            if label != "original":
                side = record[label]
                db = "" if side["psnr"] is None else f", {side['psnr']:.2f} dB"
                title = f"{label}: {rate_of(side):.3f} bpp{db}"
            axis.set_title(title, fontsize=9, parse_math=False)
    return figure


def most_improved(
    original: np.ndarray, base: np.ndarray, refined: np.ndarray
) -> tuple[slice, slice]:
    """The window in which refinement reduced the squared error most.

    Args:
        original, base, refined: uint8 [H, W, 3].

    Returns:
        Slices of rows and columns, 160 pixels long, or as long as a side that is shorter.
    """

    def error(picture: np.ndarray) -> np.ndarray:
        return ((picture.astype(float) - original) ** 2).sum(axis=2)

    gain = np.pad(error(base) - error(refined), ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    height, width = (min(160, side) for side in original.shape[:2])
    sums = (
        gain[height:, width:] - gain[:-height, width:] - gain[height:, :-width]
        + gain[:-height, :-width]
    )  # fmt: skip
    top, left = np.unravel_index(np.argmax(sums), sums.shape)
    return slice(top, top + height), slice(left, left + width)
