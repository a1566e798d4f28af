"""What classical codecs and published curves reach at the rates of a comparison's points."""

import numpy as np
import pandas as pd
from scipy.interpolate import PchipInterpolator

LEAD = "lead over "


def equal_rate_table(
    points: pd.DataFrame, codecs: pd.DataFrame, published: pd.DataFrame
) -> pd.DataFrame:
    """One row for each point of each curve: its mean PSNR, and its lead over others.

    A codec is compared at each image's own rate. Its PSNR there is interpolated between its quality
    settings, over the logarithm of the rate. Images whose rate its files do not reach are left out
    for this codec. A published curve is compared at the mean rate, for its images are not known.

    Args:
        points: the table of `comparison_tables.curve_points`.
        codecs: the table of `classical_codecs.codec_table`.
        published: the table of `comparison_tables.published_curves`.

    Returns:
        The columns model, curve, images, bpp and psnr (dB). For each other, by its name: `psnr of`
        and `lead over`, in dB, and `images of`, the number of images with both. Empty if there are
        no others.
    """
    if codecs.empty and published.empty:
        return pd.DataFrame()
    rows = []
    for (model, curve), own in points.groupby(["model", "curve"], sort=False):
        row = {"model": model, "curve": curve, "images": len(own)}
        row |= {"bpp": own["bpp"].mean(), "psnr": own["psnr"].mean()}
        for codec, files in codecs.groupby("method", sort=False) if len(codecs) else ():
            of_image = dict(list(files.groupby("image")))
            there = [
                psnr_at(of_image.get(image), bpp)
                for image, bpp in zip(own["image"], own["bpp"], strict=True)
            ]
            row |= _lead(codec, own["psnr"].to_numpy(), np.array(there))
        for name, known in published.groupby("curve", sort=False) if len(published) else ():
            row |= _lead(name, np.array([row["psnr"]]), np.array([psnr_at(known, row["bpp"])]))
            row[f"images of {name}"] *= len(own)
        rows.append(row)
    return pd.DataFrame(rows)


def _lead(name: str, own: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """The columns of one other; own, other: PSNRs (dB) of the same images, NaN if unknown."""
    both = np.isfinite(own) & np.isfinite(other)
    if not both.any():
        return {f"psnr of {name}": np.nan, LEAD + name: np.nan, f"images of {name}": 0}
    own, other = own[both], other[both]
    return {
        f"psnr of {name}": other.mean(),
        LEAD + name: (own - other).mean(),
        f"images of {name}": int(both.sum()),
    }


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
    """The heads and the rows of an `equal_rate_table` as texts, with the leads in brackets."""
    others = [key.removeprefix(LEAD) for key in table if key.startswith(LEAD)]
    heads = ["model", "method", "images", "bpp", "PSNR (dB)", *others]
    rows = [
        [row["model"], row["curve"], str(row["images"]), f"{row['bpp']:.4f}", f"{row['psnr']:.2f}",
         *(_cell(row, other) for other in others)]
        for _, row in table.iterrows()
    ]  # fmt: skip
    return heads, rows


def _cell(row: pd.Series, other: str) -> str:
    """PSNR and lead; with the number of images if some have none; empty if all have none."""
    images = row[f"images of {other}"]
    if not images:
        return ""
    text = f"{row[f'psnr of {other}']:.2f} ({row[LEAD + other]:+.2f})"
    return text if images == row["images"] else f"{text}, {images:.0f} of {row['images']} images"
