"""The tables of a comparison: images, methods, curves, and differences between curves.

Most functions take tables, or runs, and return a table (pandas).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import pandas as pd
from scipy import stats

from common.errors import InputError
from common.records import Record, loss_name, records_in
from common.trajectories import read_trajectory
from config import CompareConfig
from metrics import Curve, CurvesDoNotCompareError, bd_psnr, bd_rate, overlap
from reports.compared_run import ComparedRun
from reports.run_tables import mean_trajectory

Losses = TypeVar("Losses", float, pd.Series)

CONFIDENCE = 0.95
QUALITIES = ("bpp", "psnr", "ms_ssim_db")
REGION_KEYS = ("psnr_inside", "psnr_outside")  # dB; only of runs with maps


class Tables(NamedTuple):
    """What a report tells: the tables of the functions of the same names.

    shared: of `rows_of_shared_images`. points: of `curve_points`. curves: the points of all curves,
    see `comparison_plots`. codecs, equal_rate: empty if there are none.
    """

    shared: pd.DataFrame
    methods: pd.DataFrame
    points: pd.DataFrame
    bd: pd.DataFrame
    codecs: pd.DataFrame
    curves: pd.DataFrame
    equal_rate: pd.DataFrame


def image_table(runs: Sequence[ComparedRun], names: Sequence[str]) -> pd.DataFrame:
    """One row for each image and run; unrefined images are the method `base`.

    The column `rate` is "file" if all refined images were written as files; bpp is then that of the
    files. Otherwise it is "estimate". `objective` is what the loss counts; the base has a row for
    each, where losses are known. `true_loss` is not known with a target, for its lambda differs
    from image to image.

    Args:
        names: the images to take.
    """
    known = {run: records_in(run.folder) for run in runs}
    found = {run: [one[name] for name in names if name in one] for run, one in known.items()}
    files = all("file_bpp" in record["refined"] for one in found.values() for record in one)
    rows = []
    for run, records in found.items():
        for record in records:
            common = {"model": run.model, "objective": loss_name(record), "image": record["name"],
                      "lmbda": record["lmbda"]}  # fmt: skip
            for method, side in ((run.method, "refined"), ("base", "base")):
                values = record[side]
                row = {"method": method, "seed": run.seed, **common}
                row["bpp"] = values["file_bpp" if files else "bpp"]
                row["rate"] = "file" if files else "estimate"
                row |= {key: values[key] for key in ("psnr", "ms_ssim_db", "true_loss")}
                if record.get("target"):
                    row["true_loss"] = math.nan
                    if side == "base":
                        row["lmbda"] = math.nan
                row |= {key: values[key] for key in REGION_KEYS if key in values}
                if side == "refined":
                    row |= {key: record[key] for key in ("steps", "best_step", "seconds")}
                rows.append(row)
    table = pd.DataFrame(rows)
    if table.empty:
        return table
    # Unknown values are None, such as MS-SSIM of small pictures.
    numbers = [key for key in (*QUALITIES, *REGION_KEYS) if key in table]
    table[numbers] = table[numbers].astype(float)
    is_base = table["method"] == "base"
    of_objective = ["objective"] if table["true_loss"].notna().any() else []
    if not of_objective:
        table.loc[is_base, "objective"] = ""
    base = table[is_base].drop_duplicates(["model", *of_objective, "image"])
    return pd.concat([base, table[~is_base]], ignore_index=True)


def rows_of_shared_images(images: pd.DataFrame) -> pd.DataFrame:
    """The rows of images that all methods refined, so that means can be compared.

    This is decided for each model separately. A method that refined no image with a model is left
    out for that model.

    Args:
        images: a table of `image_table`.
    """
    parts = [images.iloc[:0]]
    for _, own in images.groupby("model", sort=False) if len(images) else ():
        counts = own.groupby("image")["method"].nunique()
        parts.append(own[own["image"].map(counts) == own["method"].nunique()])
    return pd.concat(parts, ignore_index=True)


def method_table(images: pd.DataFrame, config: CompareConfig) -> pd.DataFrame:
    """One row for each model, objective and method: means, and changes against the anchor.

    Changes are only known where the anchor has the same objective; base has one row for each.
    The seeds of an image are averaged first. Columns beside the means:
    seed_spread_percent: the standard deviation of the loss over the seeds, mean over images.
    change_percent: the mean over images of loss / anchor's loss - 1.
    half_interval: half the width of Student's 95 % confidence interval of change_percent.
    least_change, most_change: the lowest and highest change of an image, in percent.
    change_of_mean_percent: the change of the mean loss.
    group: <name> (n): change_percent over the n compared images of a group.

    Args:
        images: the table of `rows_of_shared_images`.
    """
    rows = []
    for (model, objective), of_model in images.groupby(["model", "objective"], sort=False):
        keys = ["method", "image"]
        means = of_model.groupby(keys, sort=False).mean(numeric_only=True)
        spread = of_model.groupby(keys, sort=False)["true_loss"].std()
        losses = means["true_loss"]
        anchor = losses.get(config.anchor, pd.Series(dtype=float))
        for name in of_model["method"].unique():
            side = means.loc[name].drop(columns=["seed"])
            row = {"model": model, "method": name, "objective": objective, "images": len(side)}
            row |= dict(side.mean())
            if name != "base":
                row["seeds"] = of_model.loc[of_model["method"] == name, "seed"].nunique()
                row["seed_spread_percent"] = 100 * (spread.loc[name] / side["true_loss"]).mean()
            rows.append(row | _changes(side["true_loss"], anchor, config.groups))
    return pd.DataFrame(rows)


def _changes(own: pd.Series, anchor: pd.Series, groups: dict[str, list[str]]) -> dict[str, float]:
    """The changes of losses by image against the anchor's, by the names of `method_table`."""
    members = {name: own.index.isin(part).sum() for name, part in groups.items()}
    own, anchor = own.dropna().align(anchor.dropna(), join="inner")
    change = change_percent(own, anchor)
    return {
        "change_percent": change.mean(),
        "half_interval": half_interval(change),
        "change_of_mean_percent": change_percent(own.mean(), anchor.mean()),
        "least_change": change.min(),
        "most_change": change.max(),
        **{
            f"group: {name} ({members[name]})": change[change.index.isin(part)].mean()
            for name, part in groups.items()
        },
    }


def by_method(images: pd.DataFrame, column: str) -> pd.DataFrame:
    """A column's values: a row for each model and image, a column for each method.

    The seeds are averaged.
    """
    return images.pivot_table(column, ["model", "image"], "method", sort=False)


def changes_against(losses: pd.DataFrame, anchor: str) -> pd.DataFrame:
    """The change of each column against one of them, in percent of it."""
    return losses.apply(change_percent, other=losses[anchor])


def change_percent(value: Losses, other: Losses) -> Losses:
    """The change of losses against others, 100 (value / other - 1)."""
    return 100 * (value / other - 1)


def half_interval(values: Sequence[float]) -> float:
    """Half the width of Student's 95 % confidence interval of the mean.

    NaN for one value, and for two: half of it would be 13 standard errors.
    """
    count = len(values)
    if count < 3:
        return math.nan
    quantile = stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)
    return float(quantile * np.std(values, ddof=1) / math.sqrt(count))


def curve_points(images: pd.DataFrame, config: CompareConfig) -> pd.DataFrame:
    """The points of rate-distortion curves: one row for each image, curve and point.

    Each method has one curve, with a point for each model. If a checkpoint has several inference
    lambdas, each method has a curve over these for each `checkpoint`. Otherwise that column is "".
    It is always "" for base.
    """
    checkpoints = {model.label: model.checkpoint for model in config.models}
    points = images.assign(curve=images["method"], checkpoint="")
    if len(set(checkpoints.values())) < len(checkpoints):
        of = points["model"].map(checkpoints)
        refined = points["method"] != "base"
        points.loc[refined, "checkpoint"] = of[refined]
        points.loc[refined, "curve"] += ", " + of[refined]
        # The unrefined image does not know the lambda of a refinement.
        points.loc[~refined, "model"] = of[~refined]
    keys = ["curve", "method", "checkpoint", "model", "image"]
    return points.groupby(keys, sort=False)[_qualities_of(points)].mean().reset_index()


def _qualities_of(points: pd.DataFrame) -> list[str]:
    """The columns of rate and quality, with those of regions if there are any."""
    return [*QUALITIES, *(key for key in REGION_KEYS if key in points)]


def mean_points(points: pd.DataFrame) -> pd.DataFrame:
    """The points of each curve, as means over the images that every point of every curve has."""
    of_image = points.groupby("image").size()
    shared = points[points["image"].map(of_image) == len(points.groupby(["curve", "model"]))]
    keys = ["curve", "method", "checkpoint", "model"]
    means = shared.groupby(keys, sort=False)[_qualities_of(shared)].mean().reset_index()
    return means.assign(images=shared["image"].nunique(), dashed=False)


def bd_table(points: pd.DataFrame, config: CompareConfig) -> pd.DataFrame:
    """Bjontegaard deltas against the anchor's curve, for each image and for the mean curve.

    There is a row for each `quality`, psnr and ms_ssim_db. BD-rates are in percent, BD-PSNRs and
    their likes for MS-SSIM in dB. `overlap`, in [0, 1], is the common part of the two ranges of
    quality. If the curves cannot be compared, `reason` says why.
    """
    rows = []
    for quality in ("psnr", "ms_ssim_db"):
        known = points.dropna(subset=[quality])  # means of both sides are over the same images
        means = mean_points(known).assign(image="(mean curve)")
        every = pd.concat([known, means], ignore_index=True)
        keys = ["curve", "method", "checkpoint", "image"]
        for (curve, method, checkpoint, image), own in every.groupby(keys, sort=False):
            if method == config.anchor:
                continue
            of_anchor = every[(every["method"] == config.anchor) & (every["image"] == image)]
            other = of_anchor[of_anchor["checkpoint"].isin(["", checkpoint])]
            row = {"curve": curve, "quality": quality, "anchor": config.anchor, "image": image}
            rows.append(row | _deltas(other, own, quality))
    return pd.DataFrame(rows)


def _deltas(anchor: pd.DataFrame, test: pd.DataFrame, quality: str) -> Record:
    known, tested = (Curve(list(side["bpp"]), list(side[quality])) for side in (anchor, test))
    row: Record = {"points": f"{len(anchor)} and {len(test)}"}
    if len(anchor) and len(test):
        row["overlap"] = overlap(known.db, tested.db) if len(anchor) + len(test) > 2 else 0.0
    try:
        for method in ("akima", "pchip"):
            row[f"bd_rate_{method}"] = bd_rate(known, tested, method)
            row[f"bd_db_{method}"] = bd_psnr(known, tested, method)
    except CurvesDoNotCompareError as error:
        row["reason"] = str(error)
    return row


def published_curves(files: dict[str, str]) -> pd.DataFrame:
    """Read curves from CSV files with the columns bpp, psnr and, optionally, ms_ssim_db.

    Args:
        files: the paths, by the curves' names.

    Raises:
        InputError: there is no such file, or it is no such table.
    """
    tables = []
    for name, path in files.items():
        try:
            table = pd.read_csv(path, comment="#")
        except (OSError, ValueError) as error:
            raise InputError(f"published.{name} {path}: cannot be read ({error})") from None
        if not {"bpp", "psnr"} <= set(table.columns):
            found = ", ".join(table.columns)
            raise InputError(f"published.{name} {path}: needs columns bpp and psnr, has {found}")
        numbers = table[table.columns.intersection(QUALITIES)].apply(pd.to_numeric, errors="coerce")
        if not np.isfinite(numbers).all(axis=None) or (numbers["bpp"] <= 0).any():
            raise InputError(f"published.{name} {path}: a value is no number, or no bpp above 0")
        table[numbers.columns] = numbers
        tables.append(table.assign(curve=name, dashed=True))
    return pd.concat(tables) if tables else pd.DataFrame()


def codec_curves(codecs: pd.DataFrame) -> pd.DataFrame:
    """The points of each codec's curve, as means over the images, in the form of `mean_points`.

    Args:
        codecs: the table of `classical_codecs.codec_table`.
    """
    return pd.concat([pd.DataFrame(), *(
        own.groupby("model", sort=False)[list(QUALITIES)].mean().reset_index()
        .assign(curve=codec, images=own["image"].nunique(), dashed=True)
        for codec, own in codecs.groupby("method", sort=False)
    )])  # fmt: skip


def mean_curve(run: ComparedRun, names: Sequence[str]) -> pd.DataFrame:
    """A run's trajectory over steps, with `seconds`, as the mean over the images of these names.

    If an image ended early, its last row counts at later steps, too.

    Raises:
        InputError: a trajectory is missing or damaged.
    """
    tables = []
    records = records_in(run.folder)
    for name, record in ((name, records[name]) for name in names if name in records):
        table = read_trajectory(run.folder, name)
        # Records of older runs have no clock.
        clock = record.get("clock") or table["step"] * record["seconds_per_step"]
        tables.append(table.assign(seconds=clock))
    return mean_trajectory(tables) if tables else pd.DataFrame()
