"""What classical codecs reach at the rate of each point of a comparison."""

import numpy as np
import pandas as pd
from scipy.interpolate import PchipInterpolator

FIXED = ("model", "curve", "images", "bpp", "psnr")


def equal_rate_table(
    points: pd.DataFrame, codecs: pd.DataFrame, published: pd.DataFrame
) -> pd.DataFrame:
    """One row for each point of each curve: its mean PSNR beside that of others at equal rates.

    A codec has the same rate on each image. Its PSNR there is interpolated between its quality
    settings, over the logarithm of the rate. An image whose rate a codec does not reach is left out
    of the row. A published curve has the mean rate of the row, for its images are not known.

    Args:
        points: the table of `comparison_tables.curve_points`.
        codecs: the table of `classical_codecs.codec_table`.
        published: the table of `comparison_tables.published_curves`.

    Returns:
        The columns model, curve, images, bpp and psnr (dB), and one for each other (dB); empty
        without others.
    """
    if codecs.empty and published.empty:
        return pd.DataFrame()
    curves = dict(list(codecs.groupby(["method", "image"], sort=False)))
    names = list(codecs["method"].unique())
    beside = points.assign(**{
        codec: [
            psnr_at(curves.get((codec, image)), bpp)
            for image, bpp in zip(points["image"], points["bpp"], strict=True)
        ]
        for codec in names
    })  # fmt: skip
    beside = beside.dropna(subset=names)
    grouped = beside.groupby(["model", "curve"], sort=False)
    means = grouped[["bpp", "psnr", *names]].mean().reset_index()
    means.insert(2, "images", list(grouped.size()))
    for name, curve in published.groupby("curve", sort=False) if len(published) else ():
        means[name] = [psnr_at(curve, bpp) for bpp in means["bpp"]]
    return means


def psnr_at(curve: pd.DataFrame | None, bpp: float) -> float:
    """The PSNR (dB) of a curve at a rate; NaN if the curve does not reach the rate.

    Args:
        curve: the columns bpp and psnr; None: there is none.
    """
    if curve is None:
        return np.nan
    curve = curve.dropna(subset=["psnr"]).sort_values("bpp").drop_duplicates("bpp")
    if len(curve) < 2 or not curve["bpp"].iloc[0] <= bpp <= curve["bpp"].iloc[-1]:
        return np.nan
    return float(PchipInterpolator(np.log(curve["bpp"]), curve["psnr"])(np.log(bpp)))


def equal_rate_cells(table: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """The heads and the rows of an `equal_rate_table` as texts.

    The number in brackets is the lead over the other.
    """
    others = [key for key in table if key not in FIXED]
    heads = ["model", "method", "images", "bpp", "PSNR (dB)", *others]
    rows = []
    for _, row in table.iterrows():
        cells = [row["model"], row["curve"], str(row["images"]), f"{row['bpp']:.4f}"]
        beside = [
            "" if np.isnan(row[other]) else f"{row[other]:.2f} ({row['psnr'] - row[other]:+.2f})"
            for other in others
        ]
        rows.append([*cells, f"{row['psnr']:.2f}", *beside])
    return heads, rows
