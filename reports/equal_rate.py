"""What classical codecs and published curves reach at the rates of a comparison's points."""

from typing import Any

import numpy as np
import pandas as pd
from scipy.interpolate import PchipInterpolator

LEAD = "lead over "
QUALITY_NAMES = {"psnr": "PSNR", "ms_ssim_db": "MS-SSIM"}


def equal_rate_table(
    points: pd.DataFrame, codecs: pd.DataFrame, published: pd.DataFrame
) -> pd.DataFrame:
    """One row for each quality and point of each curve: its mean, and its lead over others.

    A codec is compared at each image's own rate. Its quality there is interpolated between its
    settings, over the logarithm of the rate. Images whose rate its files do not reach are left out
    for this codec. A published curve is compared at the mean rate, for its images are not known.

    Args:
        points: the table of `comparison_tables.curve_points`.
        codecs: the table of `classical_codecs.codec_table`.
        published: the table of `comparison_tables.published_curves`.

    Returns:
        The columns model, curve, quality (psnr or ms_ssim_db), images, bpp and dB. For each other,
        by its name: `dB of` and `lead over`, in dB, and `images of`, the number of images with
        both. Empty if there are no others.
    """
    if codecs.empty and published.empty:
        return pd.DataFrame()
    rows = []
    for quality in ("psnr", "ms_ssim_db"):
        for (model, curve), own in points.groupby(["model", "curve"], sort=False):
            own = own.dropna(subset=[quality])  # rate and quality are of the same images
            row = {"model": model, "curve": curve, "quality": quality, "images": len(own)}
            row |= {"bpp": own["bpp"].mean(), "dB": own[quality].mean()}
            rows.append(row | _leads(own, row, codecs, published))
    return pd.DataFrame(rows)


def _leads(
    own: pd.DataFrame, row: dict[str, Any], codecs: pd.DataFrame, published: pd.DataFrame
) -> dict[str, float]:
    """The columns of all others, for the images `own` of one row; see `equal_rate_table`."""
    quality: str = row["quality"]
    leads: dict[str, float] = {}
    for codec, files in codecs.groupby("method", sort=False) if len(codecs) else ():
        of_image = dict(list(files.groupby("image")))
        there = [
            quality_at(of_image.get(image), bpp, quality)
            for image, bpp in zip(own["image"], own["bpp"], strict=True)
        ]
        leads |= _lead(codec, own[quality].to_numpy(float), np.array(there))
    for name, known in published.groupby("curve", sort=False) if len(published) else ():
        at_rate = np.array([quality_at(known, row["bpp"], quality)])
        leads |= _lead(name, np.array([row["dB"]]), at_rate)
        leads[f"images of {name}"] *= row["images"]
    return leads


def _lead(name: str, own: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """The columns of one other; own, other: dB of the same images, NaN if unknown."""
    both = np.isfinite(own) & np.isfinite(other)
    if not both.any():
        return {f"dB of {name}": np.nan, LEAD + name: np.nan, f"images of {name}": 0}
    own, other = own[both], other[both]
    return {
        f"dB of {name}": other.mean(),
        LEAD + name: (own - other).mean(),
        f"images of {name}": int(both.sum()),
    }


def quality_at(curve: pd.DataFrame | None, bpp: float, quality: str = "psnr") -> float:
    """The quality (dB) of a curve at a rate; NaN if the curve does not reach the rate.

    Args:
        curve: the columns bpp and, perhaps, that of the quality; None: there is none.
        quality: psnr or ms_ssim_db.
    """
    if curve is None or quality not in curve:
        return np.nan
    curve = curve.dropna(subset=[quality]).sort_values("bpp").drop_duplicates("bpp")
    if len(curve) < 2 or not curve["bpp"].iloc[0] <= bpp <= curve["bpp"].iloc[-1]:
        return np.nan
    return float(PchipInterpolator(np.log(curve["bpp"]), curve[quality])(np.log(bpp)))
