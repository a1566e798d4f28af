"""Rate and distortion of images as tensor maths, [B], and the differences between R-D curves.

Sums over rows run in float64, so that the reported digits do not depend on how threads split them.
"""

import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import bjontegaard
import torch
import torch.nn.functional as F
from pytorch_msssim import ms_ssim as _ms_ssim
from torch import Tensor

from schemas.base import MS_SSIM_MIN_SIDE


def bits_per_pixel(likelihoods: Tensor, num_pixels: int) -> Tensor:
    """-sum(log2 p) / num_pixels, [B], for likelihoods p [B, C, h, w] in (0, 1]."""
    bits = -_sum(likelihoods.log2())
    return (bits / num_pixels).to(likelihoods.dtype)


def mean_squared_error(x_hat: Tensor, x: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean of weights * (x_hat - x)^2 over channels and pixels, [B]; see `squared_error`."""
    return per_value(squared_error(x_hat, x, weights), x)


def per_value(total: Tensor, x: Tensor) -> Tensor:
    """Sums [B] over images [B, 3, H, W] as means over channels and pixels, like x."""
    return (total / x[0].numel()).to(x.dtype)


def squared_error(x_hat: Tensor, x: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sum of weights * (x_hat - x)^2 over channels and pixels, [B] in float64.

    Args:
        x_hat, x: [B, 3, H, W].
        weights: [B, 1, H, W]; None: all are 1.
    """
    # mse_loss is one pass over memory forward and one backward.
    squares = F.mse_loss(x_hat, x, reduction="none")
    return _sum(squares if weights is None else squares * weights)


def _sum(v: Tensor) -> Tensor:
    """Sum of [B, C, H, W] over all but B: each row in v's precision, then all rows in float64."""
    rows = v.permute(0, 2, 3, 1).flatten(2)  # [B, H, W * C], a view of channels-last data
    return rows.sum(dim=2).sum(dim=1, dtype=torch.float64)


def psnr(mse: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, shaped as mse, for pixels in [0, 1]; infinite at MSE 0."""
    return -10 * mse.log10()


def to_8_bit(x: Tensor) -> Tensor:
    """Pixels as an 8-bit file has them: clamped to [0, 1], rounded to multiples of 1/255."""
    return (x.clamp(0, 1) * 255).round() / 255


def ms_ssim(x_hat: Tensor, x: Tensor) -> Tensor | None:
    """Multi-scale structural similarity, [B] in [0, 1], of two images [B, 3, H, W] in [0, 1].

    Wang, Simoncelli, Bovik 2003. None if a side is below 161 pixels, where it is not defined.
    """
    if min(x.shape[-2:]) < MS_SSIM_MIN_SIDE:
        return None
    # The channels are independent, and one at a time takes a third of the memory.
    channels = zip(x_hat.split(1, dim=1), x.split(1, dim=1), strict=True)
    each = [_ms_ssim(a, b, data_range=1.0, size_average=False) for a, b in channels]
    return torch.stack(each).mean(dim=0)


def ms_ssim_db(similarity: Tensor) -> Tensor:
    """-10 log10(1 - MS-SSIM) in dB, shaped as `similarity` in [0, 1]; infinite at 1."""
    return -10 * torch.log10(1 - similarity)


def picture_quality(x_hat: Tensor, x: Tensor) -> dict[str, float | None]:
    """The quality of one reconstruction in 8-bit pixels.

    Args:
        x_hat, x: [1, 3, H, W], x in [0, 1]. This function clamps and rounds x_hat to 8 bits.

    Returns:
        psnr (dB), ms_ssim in [0, 1] and ms_ssim_db (dB); the last two are None below 161 pixels a
        side.
    """
    x_hat = to_8_bit(x_hat)
    similarity = ms_ssim(x_hat, x)
    return {
        "psnr": psnr(mean_squared_error(x_hat, x)).item(),
        "ms_ssim": None if similarity is None else similarity.item(),
        "ms_ssim_db": None if similarity is None else ms_ssim_db(similarity).item(),
    }


# --- rate-distortion curves -----------------------------------------------------------------------


class Curve(NamedTuple):
    """The points of a rate-distortion curve: bits per pixel, and PSNR or MS-SSIM in dB."""

    bpp: Sequence[float]
    db: Sequence[float]


class CurvesDoNotCompareError(ValueError):
    """Two curves cannot be compared; the message says why."""


def bd_rate(anchor: Curve, test: Curve, method: str = "akima") -> float:
    """Mean difference in rate at equal quality, percent; negative where `test` needs fewer bits.

    Bjontegaard 2001 (VCEG-M33), by the `bjontegaard` package.

    Args:
        method: the interpolation between the points, `akima` or `pchip`.

    Raises:
        CurvesDoNotCompareError: a curve has fewer than 3 points, its quality does not rise with the
            rate, or the curves have no quality in common.
    """
    anchor, test = _sorted(anchor), _sorted(test)
    _check_overlap("dB", anchor.db, test.db)
    return _delta(bjontegaard.bd_rate, anchor, test, method)


def bd_psnr(anchor: Curve, test: Curve, method: str = "akima") -> float:
    """Mean difference in quality at equal rate, dB; positive where `test` is better.

    See `bd_rate` for the source and the argument.

    Raises:
        CurvesDoNotCompareError: a curve has fewer than 3 points, its quality does not rise with the
            rate, or the curves have no rate in common.
    """
    anchor, test = _sorted(anchor), _sorted(test)
    _check_overlap("bpp", anchor.bpp, test.bpp)
    return _delta(bjontegaard.bd_psnr, anchor, test, method)


def overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """The common part of two ranges, as a fraction in [0, 1] of the range that spans both."""
    common = min(max(a), max(b)) - max(min(a), min(b))
    return max(common, 0.0) / (max(*a, *b) - min(*a, *b))


def _sorted(curve: Curve) -> Curve:
    points = sorted(zip(curve.bpp, curve.db, strict=True))
    if len(points) < 3:
        raise CurvesDoNotCompareError(f"{len(points)} points: at least 3 make a curve")
    bpp, db = zip(*points, strict=True)
    if any(after <= before for side in (bpp, db) for before, after in pairwise(side)):
        raise CurvesDoNotCompareError("quality does not rise with the rate everywhere")
    return Curve(bpp, db)


def _check_overlap(unit: str, anchor: Sequence[float], test: Sequence[float]) -> None:
    if not overlap(anchor, test):
        spans = [f"{min(side):.4g} to {max(side):.4g} {unit}" for side in (anchor, test)]
        raise CurvesDoNotCompareError(f"curves do not overlap: {' and '.join(spans)}")


def _delta(function: Callable[..., float], anchor: Curve, test: Curve, method: str) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # callers report a small overlap themselves
        return float(function(*anchor, *test, method, require_matching_points=False))
