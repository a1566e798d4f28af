"""What the plots and pictures of a comparison's page show, as JSON values for its script."""

import base64
import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from PIL import Image

from common.files import printable
from common.images import to_pixels
from common.records import Record
from reports.compared_run import ComparedRun
from reports.comparison_tables import by_method, changes_against
from reports.details import Detail, windows_of
from reports.styles import Style

# The quantities of a trajectory by the columns that hold them, true and relaxed.
ON_THE_WAY = {
    "loss": ("true_loss", "relaxed_loss"),
    "bits per pixel": ("true_bpp", "relaxed_bpp"),
    "PSNR (dB, raw floats)": ("true_psnr_raw", "relaxed_psnr_raw"),
    "MS-SSIM (dB)": ("true_ms_ssim_db", "relaxed_ms_ssim_db"),
    "true less relaxed loss": ("gap", ""),
    "temperature": ("temperature", ""),
}


def style_data(styles: dict[str, Style]) -> Record:
    """The styles by the names of the curves."""
    return {printable(name): style._asdict() for name, style in styles.items()}


def change_data(table: pd.DataFrame, images: pd.DataFrame, anchor: str) -> list[Record]:
    """The changes of the loss against the anchor, one for each model, objective and method.

    Each has model, objective, method, mean and half (the interval, in percent), and `images`: the
    change of each image. Rows without a change are left out.

    Args:
        table, images: the tables of `method_table` and `rows_of_shared_images`.
    """
    found = []
    for (model, objective), own in images.groupby(["model", "objective"], sort=False):
        losses = by_method(own, "true_loss").droplevel("model")
        if anchor not in losses:
            continue
        changes = changes_against(losses, anchor)
        rows = table[(table["model"] == model) & (table["objective"] == objective)]
        for _, row in rows.dropna(subset=["change_percent"]).iterrows():
            change = changes[row["method"]].dropna()
            found.append({
                "model": model, "objective": objective, "method": printable(row["method"]),
                "mean": row["change_percent"], "half": row["half_interval"],
                "images": {printable(name): value for name, value in change.items()},
            })  # fmt: skip
    return found


def curve_data(curves: pd.DataFrame) -> list[Record]:
    """The rate-distortion curves: a dictionary for each, with its name and its points' columns.

    Args:
        curves: see `comparison_plots`.
    """
    found = []
    for name, points in curves.groupby("curve", sort=False):
        points = points.sort_values("bpp")
        columns = [key for key in ("bpp", "psnr", "ms_ssim_db", "psnr_inside") if key in points]
        of_method = {
            key: list(points[key].map(printable)) for key in ("model", "method")
            if key in points and points[key].notna().all()
        }  # fmt: skip
        found.append({
            "curve": printable(name), "other": bool(points["dashed"].all()), **of_method,
            **{key: list(points[key]) for key in columns},
        })  # fmt: skip
    return found


def trajectory_data(trajectories: dict[ComparedRun, pd.DataFrame]) -> list[Record]:
    """The trajectories of runs, as means over images: a dictionary for each, with its columns."""
    found = []
    for run, curve in trajectories.items():
        curve = curve.assign(gap=curve["true_loss"] - curve["relaxed_loss"])
        values = {
            name: [list(curve[key]) for key in keys if key in curve and curve[key].notna().any()]
            for name, keys in ON_THE_WAY.items()
            if run.loss is not None or "loss" not in name
        }
        found.append({
            "model": run.model, "method": printable(run.method), "objective": run.loss or "",
            "step": list(curve["step"]), "seconds": list(curve["seconds"]),
            "values": {name: lists for name, lists in values.items() if lists},
        })  # fmt: skip
    return found


def picture_data(name: str, details: dict[str, Sequence[Detail]]) -> Record:
    """A detail of an image in each version, and the bits of y, as PNGs in data URLs.

    Args:
        details: the versions by model: the original, the base, and the result of each method. The
            detail is where the last method of the first model is best, see `windows_of`.
    """
    first = next(iter(details.values()))
    window = next(iter(windows_of(first).values()))
    versions = [{"label": "original", "model": "", "words": printable(name),
                 "picture": png_url(to_pixels(first[0].x)[window])}]  # fmt: skip
    if (region := first[0].region) is not None:
        shown = png_url(to_pixels(region.expand(3, -1, -1))[window])
        versions.append(
            {"label": "map", "model": "", "words": "white counts most", "picture": shown}
        )
    for model, own in details.items():
        highest = max(one.bits.max().item() for one in own if one.bits is not None)
        versions += [
            {"label": printable(one.label), "model": model, "words": one.in_words,
             "picture": png_url(to_pixels(one.x)[window]), "bits": _bits(one, highest)}
            for one in own[1:]
        ]  # fmt: skip
    return {"image": printable(name), "versions": versions}


def _bits(detail: Detail, highest: float) -> str:
    """The bits of y over the whole image: dark for 0, yellow for `highest`."""
    if detail.bits is None:
        return ""
    colors = colormaps["viridis"](detail.bits.numpy() / max(highest, 1e-9))[..., :3]
    return png_url((255 * colors).round().astype(np.uint8))


def png_url(pixels: np.ndarray) -> str:
    """uint8 [H, W, 3] as a PNG in a data URL."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def short(value: Any) -> Any:
    """A JSON value with floats of six digits, and None for those that are not finite."""
    if isinstance(value, dict):
        return {key: short(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [short(item) for item in value]
    if isinstance(value, float | np.floating):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value
