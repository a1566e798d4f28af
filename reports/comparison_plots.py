"""Plots of a comparison; each function returns one matplotlib figure.

A table `curves` has one row for each point, with the columns curve, bpp, psnr, ms_ssim_db and
dashed. `dashed` is True for the curves that are not of our methods.
"""

from collections.abc import Sequence
from itertools import cycle
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter
from torch import Tensor

from common.images import to_pixels
from reports.compared_run import ComparedRun
from reports.details import Detail, windows_of
from reports.styles import Style, plot_text


def plot_curves(curves: pd.DataFrame, styles: dict[str, Style]) -> Figure:
    """PSNR and MS-SSIM (dB) over bits per pixel; up and to the left is better.

    With maps there is also PSNR inside them.
    The axes show the range of the methods' curves. All others are thin.
    """
    panels = [("psnr", "PSNR (dB)"), ("ms_ssim_db", "MS-SSIM (dB)")]
    if "psnr_inside" in curves and curves["psnr_inside"].notna().any():
        panels.append(("psnr_inside", "PSNR inside the maps (dB)"))
    figure = Figure(figsize=(6 * len(panels), 4.8), dpi=130, layout="constrained")
    for axis, (key, label) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        others = cycle(zip(("#444444", "#888888", "#aaaaaa") * 2, "|x1+23", strict=True))
        known = curves.dropna(subset=["bpp", key])
        for name, points in known.groupby("curve", sort=False):
            style: dict[str, Any] = {"ms": 7, "lw": 0.9, "ls": "--"}
            if points["dashed"].all():
                style["color"], style["marker"] = next(others)
            else:
                style |= {"ms": 4.5, "lw": 1.6, **styles[name].of_line}
                style["marker"] = styles[name].marker
            points = points.sort_values("bpp")
            axis.plot(points["bpp"], points[key], label=plot_text(name), **style)
        axis.set(xlabel="bits per pixel", ylabel=label)
        axis.grid(alpha=0.3)
        ours = known[~known["dashed"].astype(bool)]
        if len(ours):
            low, high = ours[key].min(), ours[key].max()
            room = 0.4 * max(high - low, 1)
            bpp = ours["bpp"].min(), ours["bpp"].max()
            axis.set(xlim=(0.7 * bpp[0], 1.4 * bpp[1]), ylim=(low - room, high + room))
        if axis.has_data():
            axis.legend(fontsize=8)
    return figure


def plot_loss(
    trajectories: dict[ComparedRun, pd.DataFrame], styles: dict[str, Style]
) -> Figure | None:
    """The true loss of each method over steps and over seconds; None if no losses are comparable.

    There is one row of panels for each model and objective.
    """
    known = (run for run in trajectories if run.loss is not None)
    rows = list(dict.fromkeys((run.model, run.loss) for run in known))
    if not rows:
        return None
    figure = Figure(figsize=(12, 4.4 * len(rows)), dpi=130, layout="constrained")
    all_axes = figure.subplots(len(rows), 2, squeeze=False)
    for (model, loss), axes in zip(rows, all_axes, strict=True):
        base = None
        for run, curve in trajectories.items():
            if (run.model, run.loss) != (model, loss):
                continue
            base, style = curve["true_loss"].iloc[0], styles[run.method]
            for axis, key in zip(axes, ("step", "seconds"), strict=True):
                axis.plot(curve[key], curve["true_loss"], **style.of_line, marker=style.marker,
                          markevery=_some(curve), ms=5, label=plot_text(run.method))  # fmt: skip
        labels = ("step, or pass of the polish", "seconds per image")
        for axis, label in zip(axes, labels, strict=True):
            axis.set(xlabel=label, ylabel=plot_text(f"true loss, {loss}, mean over images"),
                     xscale="log", title=plot_text(model))  # fmt: skip
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.xaxis.set_major_formatter(ScalarFormatter())
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.grid(alpha=0.3, which="both")
            if base is not None:
                lowest = axis.get_ylim()[0]
                axis.axhline(base, **styles["base"].of_line, lw=1, label="base")
                # Annealing may begin far above the base, but only what is below it matters.
                axis.set_ylim(lowest, base + 0.1 * (base - lowest))
        axes[0].legend(fontsize=8)
    return figure


def _some(curve: pd.DataFrame) -> int:
    """Of how many points of a trajectory one has a marker."""
    return max(len(curve) // 6, 1)


def plot_trajectories(
    trajectories: dict[ComparedRun, pd.DataFrame], styles: dict[str, Style]
) -> Figure:
    """Losses, their gap, rate, quality and temperature of one model's methods over the steps.

    It is like the second figure of arXiv 2401.17789. Losses are shown of the first objective.
    """
    loss = next((run.loss for run in trajectories), None)
    model = next((run.model for run in trajectories), "")
    panels = {"bpp": "bits per pixel", "psnr_raw": "PSNR (dB, raw floats)",
              "ms_ssim_db": "MS-SSIM (dB)", "temperature": "temperature"}  # fmt: skip
    if loss is not None:
        panels = {"loss": plot_text(f"loss, {loss}"), "gap": "true less relaxed loss", **panels}
    columns = -(-(len(panels) + 1) // 2)
    figure = Figure(figsize=(4.4 * columns, 7.4), dpi=110, layout="constrained")
    figure.suptitle(f"{plot_text(model)}: true (thick) and relaxed (thin)", fontsize=10)
    *axes, legend = figure.subplots(2, columns).ravel()[: len(panels) + 1]
    for run, curve in trajectories.items():
        style, label = styles[run.method].of_line, plot_text(run.method)
        marks = {"marker": styles[run.method].marker, "ms": 4, "markevery": _some(curve)}
        curve = curve.assign(gap=curve["true_loss"] - curve["relaxed_loss"])
        for axis, key in zip(axes, panels, strict=True):
            if key in ("loss", "gap") and run.loss != loss:
                continue
            known = key if key in curve else f"true_{key}"
            axis.plot(curve["step"], curve[known], **style, **marks, label=label)
            if key not in curve:
                axis.plot(curve["step"], curve[f"relaxed_{key}"], **style, lw=0.7, alpha=0.7)
    for axis, label in zip(axes, panels.values(), strict=True):
        axis.set(xlabel="step", title=label)
        axis.grid(alpha=0.3)
    for axis in figure.axes[len(panels) :]:
        axis.axis("off")
    legend.legend(*axes[-1].get_legend_handles_labels(), loc="center", fontsize=9)
    return figure


def plot_details(name: str, details: Sequence[Detail]) -> Figure:
    """Details of an image, see `windows_of`: the original, the base, and each method's result."""
    pixels = [to_pixels(detail.x) for detail in details]
    windows = windows_of(details)
    columns = min(len(details), 4)
    rows = -(-len(details) // columns)
    size = (3.3 * columns, (3.7 * rows) * len(windows) + 0.3)
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    words = f"{name}: details; all numbers are of the whole image"
    figure.suptitle(plot_text(words), fontsize=9)
    axes = figure.subplots(rows * len(windows), columns, squeeze=False)
    for index, (place, window) in enumerate(windows.items()):
        own = axes[index * rows : (index + 1) * rows].flat
        for axis, detail, picture in zip(own, details, pixels, strict=False):
            axis.imshow(picture[window], interpolation="nearest")
            title = f"{plot_text(place + detail.label)}\n{detail.in_words}"
            axis.set_title(title.strip(), fontsize=8)
    for axis in figure.axes:
        axis.axis("off")
    return figure


def plot_bits(name: str, details: Sequence[Detail]) -> Figure:
    """Maps of the bits of y: of the base, of each method, and the last method's change.

    With a map of where distortion counts, it comes first.
    """
    coded = [(detail.label, detail.bits / 256) for detail in details if detail.bits is not None]
    maps: list[tuple[str, Tensor, dict[str, Any]]] = []
    highest = max(bits.max().item() for _, bits in coded)
    if details[0].region is not None:
        where = {"vmin": 0, "vmax": 1, "cmap": "gray"}
        maps.append(("where distortion counts", details[0].region[0], where))
    for label, bits in coded:
        maps.append((label, bits, {"vmin": 0, "vmax": highest}))
    # Beside a map, what counts is where another method put its bits.
    other = 1 if details[0].region is not None and len(coded) > 2 else 0
    (base, base_bits), (last, last_bits) = coded[other], coded[-1]
    change = last_bits - base_bits
    limit = change.abs().max().item() or 1.0
    maps.append((f"{last} less {base}", change,
                 {"vmin": -limit, "vmax": limit, "cmap": "RdBu_r"}))  # fmt: skip
    columns = min(len(maps), 3)
    rows = -(-len(maps) // columns)
    figure = Figure(figsize=(4.4 * columns, 3.4 * rows + 0.3), dpi=120, layout="constrained")
    figure.suptitle(plot_text(f"{name}: bits of y per pixel, 16x16 pixels a position"), fontsize=9)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, (label, values, options) in zip(axes, maps, strict=False):
        shown = axis.imshow(values.numpy(), interpolation="nearest", **options)
        axis.set_title(plot_text(label), fontsize=9)
        figure.colorbar(shown, ax=axis, shrink=0.8)
    for axis in axes:
        axis.axis("off")
    return figure
