"""Plots of a comparison; each function returns one matplotlib figure.

A table `curves` has one row for each point, with the columns curve, bpp, psnr, ms_ssim_db and
dashed. `dashed` is True for the curves that are not of our methods.
"""

from collections.abc import Sequence
from itertools import cycle
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter
from torch import Tensor

from common.files import printable
from common.images import to_pixels
from experimental_inference_methods import METHODS, rounding_logits
from reports.compared_run import ComparedRun, first_seeds
from reports.comparison_tables import mean_curve
from reports.details import Detail
from reports.run_plots import most_improved


def colors_of(names: Sequence[str]) -> dict[str, str]:
    """A colour for each name, the same in every plot; `base` is grey."""
    colors = [f"C{index}" for index in (0, 1, 2, 3, 4, 5, 6, 8, 9)]
    others = [name for name in dict.fromkeys(names) if name != "base"]
    return {"base": "grey"} | dict(zip(others, cycle(colors), strict=False))


def plot_text(text: str) -> str:
    """A name as a text for matplotlib: printable, and not read as a formula between $."""
    return printable(text).replace("$", r"\$")


def plot_curves(curves: pd.DataFrame, colors: dict[str, str]) -> Figure:
    """PSNR and MS-SSIM (dB) over bits per pixel; up and to the left is better.

    The axes show the range of the methods' curves, which are solid. All others are dashed.
    """
    figure = Figure(figsize=(12, 4.8), dpi=130, layout="constrained")
    panels = (("psnr", "PSNR (dB)"), ("ms_ssim_db", "MS-SSIM (dB)"))
    for axis, (key, label) in zip(figure.subplots(1, 2), panels, strict=True):
        others = zip(cycle("sv^Dd<>"), cycle(f"C{index}" for index in range(10)))
        known = curves.dropna(subset=["bpp", key])
        for name, points in known.groupby("curve", sort=False):
            style = {"marker": "o", "ms": 4, "lw": 1.6, "color": colors.get(name)}
            if points["dashed"].all():
                marker, color = next(others)
                style = {"marker": marker, "ms": 3.5, "lw": 1, "ls": "--", "color": color}
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
    runs: Sequence[ComparedRun], names: dict[str, Sequence[str]], colors: dict[str, str]
) -> Figure:
    """The true loss of each method over steps and over seconds; one row of panels for each model.

    Args:
        names: the compared images of each model.
    """
    models = list(dict.fromkeys(run.model for run in runs))
    figure = Figure(figsize=(12, 4.4 * len(models)), dpi=130, layout="constrained")
    for model, axes in zip(models, figure.subplots(len(models), 2, squeeze=False), strict=True):
        base = None
        for run in first_seeds(runs, model):
            curve = mean_curve(run, names.get(model, ()))
            if curve.empty:
                continue
            base, color = curve["true_loss"].iloc[0], colors[run.method]
            for axis, key in zip(axes, ("step", "seconds"), strict=True):
                axis.plot(curve[key], curve["true_loss"], color=color, label=plot_text(run.method))
                axis.plot(curve[key].iloc[-1], curve["true_loss"].iloc[-1], "o", color=color, ms=5)
        labels = ("step, or pass of the polish", "seconds per image")
        for axis, label in zip(axes, labels, strict=True):
            axis.set(xlabel=label, ylabel="true R-D loss, mean over images", xscale="log",
                     title=plot_text(model))  # fmt: skip
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.xaxis.set_major_formatter(ScalarFormatter())
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.grid(alpha=0.3, which="both")
            if base is not None:
                lowest = axis.get_ylim()[0]
                axis.axhline(base, color=colors["base"], ls=":", label="base")
                # Annealing may begin far above the base, but only what is below it matters.
                axis.set_ylim(lowest, base + 0.1 * (base - lowest))
        axes[0].legend(fontsize=8)
    return figure


def plot_trajectories(
    runs: Sequence[ComparedRun], model: str, names: Sequence[str], colors: dict[str, str]
) -> Figure:
    """Losses, their gap, rate, quality and temperature of each method over the steps.

    It is like the second figure of arXiv 2401.17789.
    """
    figure = Figure(figsize=(14, 7.4), dpi=120, layout="constrained")
    figure.suptitle(f"{plot_text(model)}: true (solid) and relaxed (dashed)", fontsize=10)
    axes = figure.subplots(2, 3).ravel()
    panels = ("loss", "gap", "bpp", "psnr_raw", "temperature")
    labels = ("R-D loss", "true less relaxed loss", "bits per pixel", "PSNR (dB, raw floats)",
              "temperature")  # fmt: skip
    for run in first_seeds(runs, model):
        curve, color = mean_curve(run, names), colors[run.method]
        if curve.empty:
            continue
        curve["gap"] = curve["true_loss"] - curve["relaxed_loss"]
        for axis, key in zip(axes, panels, strict=False):
            if key in curve:
                axis.plot(curve["step"], curve[key], color=color, label=plot_text(run.method))
                continue
            axis.plot(curve["step"], curve[f"true_{key}"], color=color)
            axis.plot(curve["step"], curve[f"relaxed_{key}"], color=color, ls="--", lw=0.9)
    for axis, label in zip(axes, labels, strict=False):
        axis.set(xlabel="step", title=label)
        axis.grid(alpha=0.3)
    axes[5].axis("off")
    handles, names = axes[4].get_legend_handles_labels()
    axes[5].legend(handles, names, loc="center", fontsize=9)
    return figure


def plot_probabilities() -> Figure:
    """The probability of each rounding candidate over v, at temperature 1.

    There is a panel for each registered function, with its default hyper-parameters, like the first
    figure of arXiv 2401.17789.
    """
    scored = [(name, function) for (name, function), method in METHODS.items() if method.score]
    figure = Figure(figsize=(13, 2.7 * -(-len(scored) // 4)), dpi=110, layout="constrained")
    axes = figure.subplots(-(-len(scored) // 4), 4, squeeze=False).ravel()
    for axis, (name, function) in zip(axes, scored, strict=False):
        v, probability, candidates = candidate_probabilities(name, function)
        for one, label in zip(probability, candidates, strict=True):
            axis.plot(v, one, label=label)
        axis.set(title=f"{name}\n{function}" if function else name, ylim=(-0.03, 1.03))
        axis.title.set_fontsize(9)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    for axis in axes[len(scored) :]:
        axis.axis("off")
    figure.supxlabel("v", fontsize=9)
    return figure


def candidate_probabilities(
    name: str, function: str | None
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Values v [n], the probabilities [K, n] at temperature 1, and the names of K candidates."""
    candidates, _ = rounding_logits(torch.tensor([0.25]), name, function)
    three = candidates.size(-1) == 3
    v = torch.linspace(-0.499, 0.499, 400) if three else torch.linspace(0.001, 0.999, 400)
    _, logits = rounding_logits(v.double(), name, function)  # [n, K]
    names = ["round(v) - 1", "round(v)", "round(v) + 1"] if three else ["floor(v)", "ceil(v)"]
    return v.numpy(), torch.softmax(logits, dim=-1).movedim(-1, 0).numpy(), names


def plot_details(name: str, details: Sequence[Detail]) -> Figure:
    """A detail of an image: the original, the base, and the result of each method."""
    pixels = [to_pixels(detail.x) for detail in details]
    window = most_improved(pixels[0], pixels[1], pixels[-1])
    columns = min(len(details), 4)
    rows = -(-len(details) // columns)
    figure = Figure(figsize=(3.3 * columns, 3.6 * rows + 0.3), dpi=120, layout="constrained")
    figure.suptitle(plot_text(f"{name}: a detail; bpp and PSNR are of the whole image"), fontsize=9)
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for axis, detail, picture in zip(axes, details, pixels, strict=False):
        axis.imshow(picture[window], interpolation="nearest")
        title = plot_text(detail.label)
        if detail.bpp is not None:
            title += f"\n{detail.bpp:.4f} bpp, {detail.psnr:.2f} dB"
        axis.set_title(title, fontsize=9)
    for axis in figure.axes:
        axis.axis("off")
    return figure


def plot_bits(name: str, details: Sequence[Detail]) -> Figure:
    """Maps of the bits of y: of the base, of each method, and the last method's change."""
    coded = [(detail.label, detail.bits / 256) for detail in details if detail.bits is not None]
    maps: list[tuple[str, Tensor, dict[str, Any]]] = []
    highest = max(bits.max().item() for _, bits in coded)
    for label, bits in coded:
        maps.append((label, bits, {"vmin": 0, "vmax": highest}))
    (base, base_bits), (last, last_bits) = coded[0], coded[-1]
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
