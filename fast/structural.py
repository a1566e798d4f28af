"""Multi-scale structural similarity with its gradient, for refinement and training.

MS-SSIM (Wang, Simoncelli, Bovik 2003) of five scales, with Gaussian windows of 11 pixels and
sigma 1.5, on each channel of RGB. Results are those of the package pytorch-msssim but for float
rounding. That package has no weights, and keeps some forty maps of a picture for its gradient. Here
the gradient is computed in the forward pass, in strips of rows, and only the gradient is kept.

For windows of two pictures a and b, with means m, variances s and covariance s_ab:

    cs = (2 s_ab + C2) / (s_aa + s_bb + C2)      l = (2 m_a m_b + C1) / (m_a^2 + m_b^2 + C1)
    MS-SSIM = product over scales j of mean(cs_j)^w_j, but mean(l cs)^w_5 at the last scale
"""

from functools import reduce
from operator import mul
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fast.autograd import Context
from fast.layout import rows_at_a_time
from schemas.base import MS_SSIM_MIN_SIDE

WINDOW, SIGMA = 11, 1.5  # pixels
C1, C2 = 0.01**2, 0.03**2  # for pixels in [0, 1]
EXPONENTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
STRIP_BYTES = 2**20  # of one of a strip's maps; on a CPU the maps then stay in the cache
OTHER_STRIP_BYTES = 2**26  # elsewhere each strip costs launches, and only memory is bounded


def ms_ssim(x_hat: Tensor, x: Tensor, weights: Tensor | None = None) -> Tensor:
    """MS-SSIM in [0, 1] of two pictures, [B], with a gradient to x_hat that can be taken once.

    With weights, each mean over windows is weighted: by the weight at the window's centre, averaged
    over 2x2 pixels from scale to scale. Equal weights change nothing.

    Args:
        x_hat, x: [B, C, H, W], nominally in [0, 1]; each side has 161 pixels or more.
        weights: [B, 1, H, W], at least 0.

    Returns:
        NaN where `weighs_nothing`.

    Raises:
        ValueError: the pictures are too small.
    """
    if min(x.shape[2:]) < MS_SSIM_MIN_SIDE:
        raise ValueError(
            f"MS-SSIM needs {MS_SSIM_MIN_SIDE} pixels a side, not {tuple(x.shape[2:])}"
        )
    with torch.autocast(x.device.type, enabled=False):
        similarity: Tensor = _Similarity.apply(x_hat, x, weights)
    return similarity


def weighs_nothing(weights: Tensor) -> bool:
    """Whether weights [B, 1, H, W] leave `ms_ssim` of an image without any weight at a scale.

    The centres of windows are 5 pixels or more from the border. The last scale sees fewest pixels.
    """
    for _ in EXPONENTS[1:]:
        weights = _halved(weights)
    edge = WINDOW // 2
    return bool((weights[:, :, edge:-edge, edge:-edge].amax((1, 2, 3)) <= 0).any())


class _Scale(NamedTuple):
    """One scale: mean(cs) or mean(l cs) of each channel [B, C], and its gradient to a, if wanted.

    The gradient, [B, C, H, W], of a channel is that of this channel's own mean.
    """

    mean: Tensor
    gradient: Tensor | None


class _Similarity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, x_hat: Tensor, x: Tensor, weights: Tensor | None) -> Tensor:
        needed = ctx.needs_input_grad[0]
        a, b = (v.contiguous(memory_format=torch.channels_last) for v in (x_hat, x))
        scales = []
        for index in range(len(EXPONENTS)):
            last = index == len(EXPONENTS) - 1
            scales.append(_scale_of(a, b, _at_windows(weights, a), last, needed))
            if not last:
                a, b = _halved(a), _halved(b)
                weights = None if weights is None else _halved(weights)
        means = [scale.mean.clamp_min(0) for scale in scales]  # [B, C] each
        product = reduce(mul, (mean**e for mean, e in zip(means, EXPONENTS, strict=True)))
        if needed:
            # A mean that is 0 makes the product 0; the gradient there is taken as 0.
            tiny = torch.finfo(product.dtype).tiny
            shares = [
                e / x.size(1) * product / mean.clamp_min(tiny)
                for mean, e in zip(means, EXPONENTS, strict=True)
            ]
            ctx.save_for_backward(_through_scales(scales, shares))
        return product.mean(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, to_similarity: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        # In place: autograd raises an error if a second pass reads a changed tensor.
        return gradient.mul_(to_similarity[:, None, None, None]), None, None


def _through_scales(scales: list[_Scale], shares: list[Tensor]) -> Tensor:
    """The gradient to the picture, from those of each scale's means; shares: [B, C] each."""
    total: Tensor | None = None
    for scale, own_share in zip(reversed(scales), reversed(shares), strict=True):
        if scale.gradient is None:
            raise ValueError("the gradient was not asked for")
        own = scale.gradient.mul_(own_share[:, :, None, None])
        total = own if total is None else own.add_(_halved_adjoint(total, own))
    if total is None:
        raise ValueError("no scale")
    return total


def _halved(v: Tensor) -> Tensor:
    """Means of 2x2 pixels. Before a side of odd length comes a row of zeros, which counts."""
    return F.avg_pool2d(v, 2, padding=(v.size(2) % 2, v.size(3) % 2))


def _halved_adjoint(gradient: Tensor, like: Tensor) -> Tensor:
    """The gradient to v, shaped as `like`, of that to `_halved(v)`."""
    height, width = like.shape[2:]
    top, left = height % 2, width % 2
    spread = F.interpolate(gradient / 4, scale_factor=2, mode="nearest")
    return spread[:, :, top : top + height, left : left + width]


def _at_windows(weights: Tensor | None, like: Tensor) -> Tensor | None:
    """The weights [B, 1, H - 10, W - 10] at the centres of all windows, with sum 1."""
    if weights is None:
        return None
    edge = WINDOW // 2
    inner = weights[:, :, edge:-edge, edge:-edge].to(like.dtype)
    return inner / inner.sum((2, 3), keepdim=True, dtype=torch.float64).to(like.dtype)


def _scale_of(a: Tensor, b: Tensor, weights: Tensor | None, last: bool, needed: bool) -> _Scale:
    """The scale of pictures a and b, [B, C, H, W]; weights: those of `_at_windows`."""
    images, channels, height, width = a.shape
    windows = height - WINDOW + 1, width - WINDOW + 1
    if weights is None:
        weights = a.new_full((1, 1, 1, 1), 1 / (windows[0] * windows[1])).expand(-1, -1, *windows)
    size = STRIP_BYTES if a.device.type == "cpu" else OTHER_STRIP_BYTES
    rows = rows_at_a_time(a, size, images * channels * width, 8, windows[0])
    gradient = torch.zeros_like(a) if needed else None
    mean = a.new_zeros(images, channels, dtype=torch.float64)
    for first in range(0, windows[0], rows):
        end = min(first + rows, windows[0])
        strip = slice(first, end + WINDOW - 1)
        pair = a[:, :, strip], b[:, :, strip]
        maps = _maps_of(*pair)
        value, slopes = _similarity_of(maps, last)
        own = weights[:, :, first:end]
        mean += (value * own).sum(3).sum(2, dtype=torch.float64)
        if gradient is not None:
            gradient[:, :, strip] += _to_picture(*pair, [slope * own for slope in slopes])
    return _Scale(mean.to(a.dtype), gradient)


def _kernels(v: Tensor) -> tuple[Tensor, Tensor]:
    """The Gaussian window over columns [C, 1, 1, 11] and over rows [C, 1, 11, 1], like v."""
    offsets = torch.arange(WINDOW, dtype=v.dtype, device=v.device) - WINDOW // 2
    window = torch.exp(-(offsets**2) / (2 * SIGMA**2))
    window = (window / window.sum()).expand(v.size(1), 1, -1)
    return window[:, :, None], window[..., None]


def _maps_of(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    """The windows' means of a, a^2, a b, b and b^2, each [B, C, H - 10, W - 10]."""
    maps = torch.cat([a, a * a, a * b, b, b * b])
    over_columns, over_rows = _kernels(maps)
    channels = maps.size(1)
    maps = F.conv2d(F.conv2d(maps, over_columns, groups=channels), over_rows, groups=channels)
    return maps.chunk(5)


def _similarity_of(maps: tuple[Tensor, ...], last: bool) -> tuple[Tensor, list[Tensor]]:
    """cs, or l cs at the last scale, and its derivatives to the means of a, a^2 and a b."""
    m, aa, ab, n, bb = maps
    denominator = aa + bb - m * m - n * n + C2
    cs = (2 * (ab - m * n) + C2) / denominator
    to_m, to_aa, to_ab = 2 * (m * cs - n) / denominator, -cs / denominator, 2 / denominator
    if not last:
        return cs, [to_m, to_aa, to_ab]
    brightness = m * m + n * n + C1
    luminance = (2 * m * n + C1) / brightness
    to_m = luminance * to_m + cs * 2 * (n - luminance * m) / brightness
    return luminance * cs, [to_m, luminance * to_aa, luminance * to_ab]


def _to_picture(a: Tensor, b: Tensor, to_means: list[Tensor]) -> Tensor:
    """The gradient to a, of gradients to the windows' means of a, a^2 and a b."""
    maps = torch.cat(to_means)
    over_columns, over_rows = _kernels(maps)
    channels, reach = maps.size(1), WINDOW - 1
    # The window is symmetric, so its adjoint is the same window on padded maps.
    maps = F.conv2d(maps, over_rows, padding=(reach, 0), groups=channels)
    maps = F.conv2d(maps, over_columns, padding=(0, reach), groups=channels)
    to_m, to_aa, to_ab = maps.chunk(3)
    return to_m + 2 * a * to_aa + b * to_ab
