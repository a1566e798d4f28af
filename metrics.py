"""Rate and distortion as pure tensor maths, one value an image, [B]; and what curves differ by.

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

# pytorch-msssim halves the picture four times under an 11-pixel window.
MS_SSIM_MIN_SIDE = 161


def bits_per_pixel(likelihoods: Tensor, num_pixels: int) -> Tensor:
    """-sum log2 p / pixels of the image, [B], for likelihoods [B, C, h, w] in (0, 1]."""
    bits = -_sum(likelihoods.log2())
    return (bits / num_pixels).to(likelihoods.dtype)


def mean_squared_error(x_hat: Tensor, x: Tensor) -> Tensor:
    """Mean over channels and pixels, [B], for two [B, 3, H, W]; in the square of their unit."""
    return (squared_error(x_hat, x) / x[0].numel()).to(x.dtype)


def squared_error(x_hat: Tensor, x: Tensor) -> Tensor:
    """Sum over channels and pixels, [B] in float64, for two [B, 3, H, W]."""
    return _sum(F.mse_loss(x_hat, x, reduction="none"))  # one pass each way


def _sum(v: Tensor) -> Tensor:
    """Sums of [B, C, H, W] over all but B: rows in their own precision, the rows in float64."""
    rows = v.permute(0, 2, 3, 1).flatten(2)  # [B, H, W * C], a view of channels-last data
    return rows.sum(dim=2).sum(dim=1, dtype=torch.float64)


def psnr(mse: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB for pixels in [0, 1]; infinite where the MSE is 0."""
    return -10 * mse.log10()


def to_8_bit(x: Tensor) -> Tensor:
    """Pixels as a viewer gets them: clamped to [0, 1] and rounded to multiples of 1/255."""
    return (x.clamp(0, 1) * 255).round() / 255


def ms_ssim(x_hat: Tensor, x: Tensor) -> Tensor | None:
    """Multi-scale structural similarity in [0, 1], [B], of pixels [B, 3, H, W] in [0, 1].

    None where the smaller side is below 161 pixels: it is not defined there.
    """
    if min(x.shape[-2:]) < MS_SSIM_MIN_SIDE:
        return None
    # Channels do not see each other; one at a time takes a third of the memory.
    channels = zip(x_hat.split(1, dim=1), x.split(1, dim=1), strict=True)
    each = [_ms_ssim(a, b, data_range=1.0, size_average=False) for a, b in channels]
    return torch.stack(each).mean(dim=0)


def ms_ssim_db(similarity: Tensor) -> Tensor:
    """-10 log10(1 - MS-SSIM), dB."""
    return -10 * torch.log10(1 - similarity)


def picture_quality(x_hat: Tensor, x: Tensor) -> dict[str, float | None]:
    """What a viewer gets of one image: psnr, ms_ssim and ms_ssim_db (dB) of 8-bit pixels.

    Args:
        x_hat, x: [1, 3, H, W] in [0, 1]; x_hat is clamped and rounded to 8 bits here.

    Returns:
        MS-SSIM is None where a side is under 161 pixels.
    """
    shown = to_8_bit(x_hat)
    similarity = ms_ssim(shown, x)
    return {
        "psnr": psnr(mean_squared_error(shown, x)).item(),
        "ms_ssim": None if similarity is None else similarity.item(),
        "ms_ssim_db": None if similarity is None else ms_ssim_db(similarity).item(),
    }


# --- rate-distortion curves -----------------------------------------------------------------------


class Curve(NamedTuple):
    """Points of a rate-distortion curve: bits per pixel, and PSNR or another quality in dB."""

    bpp: Sequence[float]
    db: Sequence[float]


class CurvesDoNotCompareError(ValueError):
    """Two curves have no common ground; says why."""


def bd_rate(anchor: Curve, test: Curve, method: str = "akima") -> float:
    """Mean difference in rate at equal quality, percent; negative where `test` needs fewer bits.

    Bjontegaard 2001 (VCEG-M33), by the `bjontegaard` package.

    Args:
        method: how points are joined, `akima` or `pchip`.

    Raises:
        CurvesDoNotCompareError: too few points, quality that does not rise with the rate, or no
            quality that both reach.
    """
    anchor, test = _sorted(anchor), _sorted(test)
    if not overlap(anchor.db, test.db):
        raise CurvesDoNotCompareError(_apart("dB", anchor.db, test.db))
    return _delta(bjontegaard.bd_rate, anchor, test, method)


def bd_psnr(anchor: Curve, test: Curve, method: str = "akima") -> float:
    """Mean difference in quality at equal rate, dB; positive where `test` is better.

    See `bd_rate`.
    """
    anchor, test = _sorted(anchor), _sorted(test)
    if not overlap(anchor.bpp, test.bpp):
        raise CurvesDoNotCompareError(_apart("bpp", anchor.bpp, test.bpp))
    return _delta(bjontegaard.bd_psnr, anchor, test, method)


def overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """The common part of two ranges of values, in [0, 1] of what they cover together."""
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


def _apart(unit: str, anchor: Sequence[float], test: Sequence[float]) -> str:
    ranges = " and ".join(f"{min(side):.4g} to {max(side):.4g} {unit}" for side in (anchor, test))
    return f"curves do not overlap: {ranges}"


def _delta(function: Callable[..., float], anchor: Curve, test: Curve, method: str) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a small overlap, which callers say themselves
        return float(function(*anchor, *test, method, require_matching_points=False))
