"""The plots of docs/study.md, from losses.csv and curves.csv of `study.collect`."""

from collections.abc import Iterator

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reports.comparison_tables import half_interval
from reports.styles import Style, styles_of
from study.probabilities import plot_probabilities
from study.tables import FUNCTIONS, STEPS, changes, settings_of

# Study, setting, anchor, and the setting in words.
SENSITIVITY = (
    ("study_temperature", "bound", "SSL, bound 1", "upper bound of the temperature"),
    ("study_temperature", "rate", "SSL, bound 1", "rate of the temperature"),
    ("study_learning_rate", "rate", "SSL, rate 0.005", "learning rate"),
)


def figures_of(losses: pd.DataFrame, curves: pd.DataFrame) -> Iterator[tuple[str, Figure]]:
    """Each plot that can be made, with its file's name; studies without results are left out."""
    methods = changes(losses, "study_methods", "SGA")
    if len(methods):
        yield "methods", plot_methods(methods)
    own = curves[(curves["study"] == "study_methods") & (curves["model"] == "lambda 0.01")]
    if len(own):
        yield "curves", plot_curves_of_loss(own)
    if all(len(settings_of(losses, *panel[:3])) for panel in SENSITIVITY):
        yield "sensitivity", plot_sensitivity(losses)
    if len(changes(losses, "study_ssl_scale", "a = 1.333")):
        yield "ssl_scale", plot_scales(losses)
    if (losses["study"] == "study_lambdas").any():
        yield "lambdas", plot_lambdas(losses[losses["study"] == "study_lambdas"])
    yield "probabilities", plot_probabilities()


def plot_methods(table: pd.DataFrame) -> Figure:
    """The mean change of each method against SGA with each model, and its 95 % interval."""
    models = list(table.index.unique("model"))
    order = table.drop(columns="SGA").mean().sort_values(ascending=False).index
    figure = Figure(figsize=(8, 0.5 * len(order) + 1.2), layout="constrained")
    axis = figure.subplots()
    for number, (model, style) in enumerate(styles_of(models).items()):
        if model == "base":
            continue
        of_model = table.loc[model, order]
        heights = np.arange(len(order)) + 0.15 * (len(models) / 2 - number + 0.5)
        halves = [half_interval(list(of_model[method].dropna())) for method in order]
        axis.errorbar(of_model.mean(), heights, xerr=halves, ls="", capsize=2, lw=0.9, ms=4.5,
                      color=style.color, marker=style.marker, label=model)  # fmt: skip
    axis.axvline(0, color="black", lw=1)
    axis.set_yticks(range(len(order)), order)
    axis.set(xlabel="change of the loss against SGA, %")
    axis.grid(axis="x", alpha=0.3)
    axis.legend(fontsize=8)
    return figure


def plot_curves_of_loss(own: pd.DataFrame) -> Figure:
    """The lowest loss so far over the steps, of one model's rows of curves.csv."""
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axis = figure.subplots()
    styles = styles_of(list(own["method"].unique()))
    for method, curve in own.groupby("method", sort=False):
        known = curve[curve["step"] > 0]
        axis.plot(known["step"], known["loss"], **styles[method].of_line, lw=1.4,
                  marker=styles[method].marker, markevery=[-1], ms=5, label=method)  # fmt: skip
    axis.set(xlabel="step", ylabel="lowest true loss so far, mean over images", xscale="log")
    axis.grid(alpha=0.3, which="both")
    figure.legend(fontsize=8, loc="outside right upper")
    return figure


def plot_sensitivity(losses: pd.DataFrame) -> Figure:
    """The change of the loss over the temperature's upper bound, its rate, and the learning rate.

    The rows are after 500 and after 2,000 steps.
    """
    figure = Figure(figsize=(12, 7), layout="constrained")
    styles = styles_of([*FUNCTIONS, "SGA"])
    for axes, (steps, column) in zip(figure.subplots(2, 3), STEPS.items(), strict=True):
        for axis, (study, setting, anchor, label) in zip(axes, SENSITIVITY, strict=True):
            table = settings_of(losses, study, setting, anchor, column)
            draw_settings(axis, table, styles)
            axis.set(xlabel=label, ylabel=f"change against {anchor}, %", title=f"after {steps}")
            if setting == "rate":
                tried = sorted({*table.index.get_level_values(1)})
                axis.set_xscale("log")
                axis.set_xticks(tried, [f"{rate:g}" for rate in tried])
                axis.minorticks_off()
    return figure


def draw_settings(axis: Axes, table: pd.Series, styles: dict[str, Style]) -> None:
    """A line for each function over the values of a setting, with 95 % intervals.

    Args:
        table: see `settings_of`.
    """
    for function in table.index.unique(0):
        own = table.loc[function]
        axis.errorbar(
            own.index, [values.mean() for values in own],
            yerr=[half_interval(list(values)) for values in own], capsize=2, lw=1.4, ms=5,
            marker=styles[function].marker, label=function, **styles[function].of_line,
        )  # fmt: skip
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def plot_scales(losses: pd.DataFrame) -> Figure:
    """The change of the loss over SSL's a, after 500 and after 2,000 steps."""
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axis = figure.subplots()
    found = {}
    for name, column in STEPS.items():
        table = changes(losses, "study_ssl_scale", "a = 1.333", column)
        for method in table.columns.drop("base", errors="ignore"):
            found[name, float(method.removeprefix("a = "))] = table[method].dropna()
    series = pd.Series(list(found.values()), index=pd.MultiIndex.from_tuples(found))
    draw_settings(axis, series, styles_of(list(STEPS)))
    axis.set(xlabel="a", ylabel="change of the loss against a = 4/3, %")
    return figure


def plot_lambdas(own: pd.DataFrame) -> Figure:
    """PSNR over rate by SSL: four models, and two models that are refined for other lambdas."""
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axis = figure.subplots()
    own = own[own["method"].isin(["base", "SGA+ SSL"])]
    means = own.groupby(["method", "model"], sort=False)[["bpp", "psnr"]].mean().reset_index()
    means["checkpoint"] = means["model"].str.partition(" at ")[0]
    means["moved"] = means["model"].str.contains(" at ")
    lines = {}
    for method, of_method in means.groupby("method", sort=False):
        lines[f"{method}, four models"] = of_method[~of_method["moved"]]
        for checkpoint, of_model in of_method.groupby("checkpoint", sort=False):
            if of_model["moved"].any() and method != "base":
                lines[f"{method}, {checkpoint}"] = of_model
    styles = styles_of(list(lines))
    for name, line in lines.items():
        line, style = line.sort_values("bpp"), styles[name]
        axis.plot(line["bpp"], line["psnr"], marker=style.marker, ms=5, lw=1.3, label=name,
                  **style.of_line)  # fmt: skip
    axis.set(xlabel="bits per pixel", ylabel="PSNR (dB)")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    return figure
