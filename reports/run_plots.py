"""Plots of one run; each function returns one matplotlib figure."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from common.files import label_of
from common.records import Record, loss_name, rate_of, result_file
from regions.measures import inside_of

RELAXED, TRUE = "tab:orange", "tab:blue"
# Names may have letters that the font lacks; matplotlib draws a box for each.
warnings.filterwarnings("ignore", message="Glyph .* missing from")


def plot_trajectory(table: pd.DataFrame, loss: str) -> Figure:
    """Relaxed and true loss, bpp, PSNR and MS-SSIM over the steps, with the temperature.

    Args:
        table: the table of `run_tables.mean_trajectory`.
        loss: the loss's name.
    """
    panels = [("loss", loss), ("bpp", "bits per pixel"), ("psnr_raw", "PSNR (dB, raw floats)")]
    if table["true_ms_ssim_db"].notna().any():
        panels.append(("ms_ssim_db", "MS-SSIM (dB)"))
    figure = Figure(figsize=(4.3 * len(panels), 3.8), dpi=120, layout="constrained")
    for axis, (key, label) in zip(figure.subplots(1, len(panels)), panels, strict=True):
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
        if key == panels[-1][0]:
            heat.set_ylabel("temperature (dashed)", color="tab:red", fontsize=8)
        if key == "loss":
            axis.legend(fontsize=8)
    count = int(table["images"].max())
    figure.suptitle(f"Refinement, mean over {count} image{'s' if count > 1 else ''}", fontsize=10)
    return figure


def plot_training(rows: Sequence[Record], objective: str = "mse") -> Figure:
    """Loss, rate and quality over the steps, of the training and of its tests.

    Args:
        rows: the rows of a metrics.jsonl.
        objective: what the loss counts beside the rate.
    """
    panels = [("loss", f"loss, {objective}"), ("bpp", "bits per pixel"), ("psnr", "PSNR (dB)")]
    if any(row.get("ms_ssim_db") is not None for row in rows):
        panels.append(("ms_ssim_db", "MS-SSIM (dB)"))  # only tests have it
    figure = Figure(figsize=(4.3 * len(panels), 3.8), dpi=120, layout="constrained")
    for axis, (key, label) in zip(figure.subplots(1, len(panels)), panels, strict=True):
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
    """Quality over bits per pixel: an arrow from base to refined for each image and for the mean.

    There is a panel for PSNR, one for MS-SSIM, and one for PSNR inside the maps, if there are any.
    """
    lmbdas = {record["lmbda"] for record in records}
    lmbda = f"lambda {min(lmbdas):.3g}" + (f" to {max(lmbdas):.3g}" if len(lmbdas) > 1 else "")
    names = {"psnr": "PSNR (dB)", "ms_ssim_db": "MS-SSIM (dB)",
             "psnr_inside": "PSNR inside the maps (dB)"}  # fmt: skip
    known = {
        key: [r for r in records if None not in (r["base"].get(key), r["refined"].get(key))]
        for key in names
    }
    panels = [(key, name) for key, name in names.items() if known[key] or key == "psnr"]
    figure = Figure(figsize=(5.6 * len(panels) + 0.8, 4.8), dpi=120, layout="constrained")
    figure.suptitle(f"{records[0]['method']}, {lmbda} for {loss_name(records[0])}: "
                    "up and to the left is better", fontsize=10)  # fmt: skip
    kind = "of the files" if "file_bpp" in records[0]["base"] else "(estimate)"
    for axis, (key, label) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels,
                                  strict=True):  # fmt: skip
        _draw_arrows(axis, known[key], key)
        axis.set(xlabel=f"bits per pixel {kind}", ylabel=label)
    return figure


def _draw_arrows(axis: Axes, known: Sequence[Record], key: str) -> None:
    """Draw the arrows of one quality, a key of a record's sides that all these records have."""
    points = {
        side: np.array([[rate_of(r[side]), r[side][key]] for r in known]).reshape(-1, 2)
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
    axis.margins(0.18)
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, borderaxespad=0)


def plot_comparison(folder: Path, records: Sequence[Record], names: Sequence[str]) -> Figure:
    """A detail of each image, where refinement improved it most: original, base and refined.

    For an image with a map it is a detail inside, and the map follows, with the detail's frame.

    Args:
        folder: the run's folder, which has the pictures.
        names: the images to show.

    Raises:
        OSError: a picture cannot be read.
    """
    by_name = {record["name"]: record for record in records}
    maps = {name: _map_of(folder, name) for name in names}
    columns = 3 if all(one is None for one in maps.values()) else 4
    size = (3 * columns, 3.2 * len(names) + 0.4)
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    figure.suptitle(
        f"Details of {len(names)} of {len(records)} images; bpp and dB are of the whole image",
        fontsize=9,
    )
    axes = figure.subplots(len(names), columns, squeeze=False)
    for row, name in zip(axes, names, strict=True):
        record = by_name[name]
        pictures = {
            label: np.asarray(
                Image.open(result_file(folder, "reconstructions", name) / f"{label}.png")
            )
            for label in ("original", "base", "refined")
        }
        region = maps[name]
        counted = None if region is None else inside_of(torch.from_numpy(region)).numpy()
        original, base, refined = pictures.values()
        window = most_improved(original, base, refined, counted)
        for axis in row:
            axis.set_xticks([])
            axis.set_yticks([])
        if region is not None:
            _draw_map(row[-1], region, window)
        elif columns > 3:
            row[-1].axis("off")
        for axis, (label, picture) in zip(row, pictures.items(), strict=False):
            axis.imshow(picture[window], interpolation="nearest")
            title = f"{label_of(name)}: {label}"
            if label != "original":
                side = record[label]
                title = f"{label}: {rate_of(side):.3f} bpp\n{_in_db(side)}"
            axis.set_title(title, fontsize=9, parse_math=False)
    return figure


def _in_db(side: Record) -> str:
    """PSNR and MS-SSIM of a side, where they are known."""
    known = {"": side["psnr"], "MS-SSIM ": side["ms_ssim_db"]}
    text = ", ".join(f"{name}{db:.2f} dB" for name, db in known.items() if db is not None)
    inside, outside = side.get("psnr_inside"), side.get("psnr_outside")
    if inside is None or outside is None:
        return text
    return f"{text}\ninside {inside:.2f} dB, outside {outside:.2f} dB"


def _map_of(folder: Path, name: str) -> np.ndarray | None:
    """The map of an image, [H, W]; None if it has none."""
    path = result_file(folder, "regions", name, ".png")
    return np.array(Image.open(path).convert("L")) if path.is_file() else None


def _draw_map(axis: Axes, region: np.ndarray, window: tuple[slice, slice]) -> None:
    """Draw a map, and the frame of a window in it."""
    axis.imshow(region, cmap="gray", vmin=0, vmax=255)
    rows, columns = window
    corner, width, height = (
        (columns.start, rows.start),
        *(side.stop - side.start for side in (columns, rows)),
    )
    axis.add_patch(Rectangle(corner, width, height, fill=False, color=RELAXED, lw=1.5))
    axis.set_title("where distortion counts", fontsize=9)


def most_improved(
    original: np.ndarray,
    base: np.ndarray,
    refined: np.ndarray,
    counted: np.ndarray | None = None,
) -> tuple[slice, slice]:
    """The window in which refinement reduced the squared error most.

    Args:
        original, base, refined: uint8 [H, W, 3].
        counted: [H, W], the factor of each pixel's error; None: all are 1.

    Returns:
        Slices of rows and columns, 160 pixels long, or as long as a side that is shorter.
    """

    def error(picture: np.ndarray) -> np.ndarray:
        return ((picture.astype(float) - original) ** 2).sum(axis=2)

    gained = error(base) - error(refined)
    gained = gained if counted is None else gained * counted
    gain = np.pad(gained, ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    height, width = (min(160, side) for side in original.shape[:2])
    sums = (
        gain[height:, width:] - gain[:-height, width:] - gain[height:, :-width]
        + gain[:-height, :-width]
    )  # fmt: skip
    top, left = np.unravel_index(np.argmax(sums), sums.shape)
    return slice(top, top + height), slice(left, left + width)
