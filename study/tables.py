"""The tables of docs/study.md, from losses.csv and curves.csv of `study.collect`.

A change is that of an image's true loss against another method's, in percent. A mean of changes has
Student's 95 % confidence interval over images; the seeds of an image are averaged first.
"""

from collections.abc import Callable, Iterator, Sequence

import pandas as pd

from reports.comparison_tables import by_method, change_percent, changes_against, half_interval
from reports.page_tables import Cells

STEPS = {"500 steps": "loss_500", "2,000 steps": "loss"}
FUNCTIONS = ("atanh", "linear", "cosine", "SSL")


def tables_of(losses: pd.DataFrame, curves: pd.DataFrame) -> Iterator[tuple[str, Cells]]:
    """Each table that can be made, with its title; studies without results are left out."""
    makers: dict[str, Callable[[], Cells]] = {
        "Methods against SGA, 2,000 steps": lambda: of_methods(losses, "SGA", "loss"),
        "Methods against SGA, 500 steps": lambda: of_methods(losses, "SGA", "loss_500"),
        "Methods against SGA+ SSL, 2,000 steps": lambda: of_methods(losses, "SGA+ SSL", "loss"),
        "Steps to the loss that SGA has after 2,000": lambda: of_steps(curves, "SGA"),
        "Function and temperature": lambda: of_temperatures(losses),
        "Three classes against two": lambda: of_classes(losses),
        "Three seeds against SGA+ SSL": lambda: of_methods(
            losses, "SGA+ SSL", "loss", "study_seeds"
        ),
        "Three seeds": lambda: of_seeds(losses),
        "Upper bound of the temperature": lambda: of_settings(
            losses, "study_temperature", "bound", "SSL, bound 1"
        ),
        "Upper bound of the temperature, 500 steps": lambda: of_settings(
            losses, "study_temperature", "bound", "SSL, bound 1", "loss_500"
        ),
        "Rate of the temperature": lambda: of_settings(
            losses, "study_temperature", "rate", "SSL, bound 1"
        ),
        "Rate of the temperature, 500 steps": lambda: of_settings(
            losses, "study_temperature", "rate", "SSL, bound 1", "loss_500"
        ),
        "Learning rate": lambda: of_settings(
            losses, "study_learning_rate", "rate", "SSL, rate 0.005"
        ),
        "Learning rate, 500 steps": lambda: of_settings(
            losses, "study_learning_rate", "rate", "SSL, rate 0.005", "loss_500"
        ),
        "SSL's a": lambda: of_scales(losses),
        "Another lambda": lambda: of_lambdas(losses),
        "Crops against whole images": lambda: of_whole(losses),
        "MS-SSIM, crops of 192x192": lambda: of_ms_ssim(losses),
        "A context model": lambda: of_methods(losses, "SGA", "loss", "study_context"),
    }
    for title, maker in makers.items():
        cells = maker()
        if cells.rows:
            yield title, cells


# --- changes --------------------------------------------------------------------------------------


def changes(losses: pd.DataFrame, study: str, anchor: str, column: str = "loss") -> pd.DataFrame:
    """Changes in percent: a row for each model and image, a column for each method.

    Empty if the study has no result of the anchor.

    Args:
        losses: see `study.collect.collect`.
        anchor: the method that the others are compared with.
        column: `loss` or `loss_500`.
    """
    of_images = by_method(losses[losses["study"] == study], column)
    if anchor not in of_images:
        return pd.DataFrame()
    return changes_against(of_images, anchor)


def interval(values: Sequence[float] | pd.Series) -> str:
    """A mean of changes with its interval, as `-1.23 ± 0.45 %`; "" of none."""
    known = pd.Series(values, dtype=float).dropna()
    if known.empty:
        return ""
    half = half_interval(list(known))
    return f"{known.mean():+.2f}" + (" %" if pd.isna(half) else f" ± {half:.2f} %")


# --- the tables -----------------------------------------------------------------------------------


def of_methods(
    losses: pd.DataFrame, anchor: str, column: str, study: str = "study_methods"
) -> Cells:
    """The mean change of each method against one, for each model."""
    table = changes(losses, study, anchor, column)
    models = list(table.index.unique("model")) if len(table) else []
    rows = [
        [method, *(interval(table.loc[model, method]) for model in models)]
        for method in table
        if method != anchor
    ]
    return Cells(["method", *models], rows)


def of_steps(curves: pd.DataFrame, anchor: str) -> Cells:
    """The steps after which each method's mean loss is not above the anchor's last one."""
    own = curves[curves["study"] == "study_methods"] if len(curves) else curves
    lasts = {
        model: known["loss"].iloc[-1]
        for model, known in own[own["method"] == anchor].groupby("model", sort=False)
    } if len(own) else {}  # fmt: skip
    rows = []
    for method, of_method in own.groupby("method", sort=False) if lasts else ():
        row = [str(method)]
        for model, last in lasts.items():
            reached = of_method[(of_method["model"] == model) & (of_method["loss"] <= last)]
            row.append(f"{reached['step'].min():,.0f}" if len(reached) else "")
        rows.append(row)
    return Cells(["method", *lasts], rows)


def of_seeds(losses: pd.DataFrame) -> Cells:
    """The mean loss with each seed, and its standard deviation in percent of the mean."""
    own = losses[(losses["study"] == "study_seeds") & (losses["method"] != "base")]
    means = own.pivot_table("loss", "method", "seed", sort=False)
    if means.shape[1] < 2:
        return Cells([], [])
    rows = [
        [str(method), *(f"{loss:.4f}" for loss in row),
         f"{100 * row.std() / row.mean():.3f} %"]
        for method, row in means.dropna().iterrows()
    ]  # fmt: skip
    return Cells(["method", *(f"seed {seed}" for seed in means), "standard deviation"], rows)


def of_settings(
    losses: pd.DataFrame, study: str, setting: str, anchor: str, column: str = "loss"
) -> Cells:
    """The mean change of each function with each value of a setting, and the range over them.

    The study's methods are named `function, setting value`. A temperature's rate of 0.001 is the
    method with the bound 1.
    """
    table = settings_of(losses, study, setting, anchor, column)
    values = sorted({*table.index.get_level_values(1)}) if len(table) else []
    rows = []
    for function in table.index.unique(0) if len(values) > 1 else ():
        own = table.loc[function]
        means = own.map(lambda images: images.mean())
        cells = [interval(own[value]) if value in own else "" for value in values]
        rows.append([function, *cells, f"{means.max() - means.min():.2f} %"])
    return Cells([f"{setting}:", *(f"{value:g}" for value in values), "range"], rows)


def settings_of(
    losses: pd.DataFrame, study: str, setting: str, anchor: str, column: str = "loss"
) -> pd.Series:
    """The changes of images against the anchor, by function and by the setting's value.

    Its methods are named as `of_settings` says; the functions are `FUNCTIONS` and SGA.
    """
    table, found = changes(losses, study, anchor, column), {}
    for method in table:
        function, _, words = str(method).partition(", ")
        name, _, value = words.partition(" ")
        if name == setting:
            found[function, float(value)] = table[method].dropna()
        elif (setting, words) == ("rate", "bound 1"):
            found[function, 0.001] = table[method].dropna()
    found = {key: own for key, own in found.items() if key[0] in (*FUNCTIONS, "SGA")}
    order = sorted(found, key=lambda key: ([*FUNCTIONS, "SGA"].index(key[0]), key[1]))
    return pd.Series(
        [found[key] for key in order],
        index=pd.MultiIndex.from_tuples(order or [("", 0)])[: len(order)],
    )


def of_temperatures(losses: pd.DataFrame) -> Cells:
    """The change of each function against SGA, with SGA's temperature and with SGA+'s.

    The study's methods are named `function, temperature of SGA` and `function, bound 1`.
    """
    kinds = {"SGA's": "temperature of SGA", "SGA+'s": "bound 1"}
    rows: dict[str, list[str]] = {function: [function] for function in FUNCTIONS}
    heads = ["function"]
    for steps, column in STEPS.items():
        table = changes(losses, "study_temperature", "atanh, temperature of SGA", column)
        for kind, words in kinds.items() if len(table) else ():
            heads.append(f"{steps}, {kind}")
            for function in FUNCTIONS:
                rows[function].append(interval(table.get(f"{function}, {words}", ())))
    return Cells(heads, list(rows.values()) if heads[1:] else [])


def of_classes(losses: pd.DataFrame) -> Cells:
    """The change of each function with three classes against the same one with two."""
    models, rows = [], []
    for function in FUNCTIONS:
        for steps, column in STEPS.items():
            table = changes(losses, "study_methods", f"SGA+ {function}", column)
            if (three := f"three-class {function}") in table:
                models = list(table.index.unique("model"))
                rows.append([function, steps, *(interval(table.loc[m, three]) for m in models)])
    return Cells(["function", "after", *models], rows)


def of_scales(losses: pd.DataFrame) -> Cells:
    """The change with each a of SSL against a = 4/3, after 500 and after 2,000 steps."""
    rows: dict[str, list[str]] = {}
    for column in STEPS.values():
        table = changes(losses, "study_ssl_scale", "a = 1.333", column)
        for method in table:
            if method != "base":
                rows.setdefault(str(method), []).append(interval(table[method]))
    return Cells(["a", *STEPS], [[name.removeprefix("a = "), *row] for name, row in rows.items()])


def of_lambdas(losses: pd.DataFrame) -> Cells:
    """What a model reaches at another lambda, against the model that was trained for that lambda.

    The loss is at the lambda of the refinement. The last columns are changes against that model
    with the same method, and unrefined.
    """
    own = losses[losses["study"] == "study_lambdas"]
    rows = []
    for model in own["model"].unique():
        checkpoint, at, wanted = model.partition(" at ")
        trained = own[own["model"] == f"lambda {wanted}"]
        for method in own["method"].unique() if at else ():
            part = own[(own["model"] == model) & (own["method"] == method)].set_index("image")
            same = trained[trained["method"] == method].set_index("image")["loss"]
            base = trained[trained["method"] == "base"].set_index("image")["loss"]
            rows.append([
                wanted, checkpoint, method, f"{part['bpp'].mean():.4f}",
                f"{part['psnr'].mean():.2f}", f"{part['loss'].mean():.4f}",
                *(interval(change_percent(part["loss"], other)) for other in (same, base)),
            ])  # fmt: skip
    heads = ["wanted lambda", "model", "method", "bpp", "PSNR (dB)", "loss",
             "against its own model", "against that, unrefined"]  # fmt: skip
    return Cells(heads, sorted(rows, key=lambda row: (float(row[0]), row[1])))


def of_whole(losses: pd.DataFrame) -> Cells:
    """The mean changes against SGA of the same images, as crops and whole."""
    whole = changes(losses, "study_whole", "SGA")
    crops = changes(losses, "study_methods", "SGA")
    if whole.empty or crops.empty:
        return Cells([], [])
    crops = crops.reindex(whole.index)
    rows = [
        [str(method), interval(crops[method]), interval(whole[method])]
        for method in whole
        if method in crops and method != "SGA"
    ]
    return Cells(["method", "128x128 centre", "whole image"], rows)


def of_ms_ssim(losses: pd.DataFrame) -> Cells:
    """Rate, PSNR, MS-SSIM and the change of the loss against SGA on the larger crops."""
    own = losses[losses["study"] == "study_ms_ssim"]
    table = changes(losses, "study_ms_ssim", "SGA")
    rows = []
    own = own.sort_values("model", key=lambda of: of.map(list(of.unique()).index), kind="stable")
    for (model, method), part in own.groupby(["model", "method"], sort=False):
        change = table.loc[model, method] if len(table) and method in table else []
        rows.append([
            model, method, f"{part['bpp'].mean():.4f}", f"{part['psnr'].mean():.2f}",
            f"{part['ms_ssim_db'].mean():.2f}", interval(change),
        ])  # fmt: skip
    heads = ["model", "method", "bpp", "PSNR (dB)", "MS-SSIM (dB)", "loss against SGA"]
    return Cells(heads, rows)
