"""Rate and distortion as pure tensor maths; every result is one value an image, [B].

Sums over rows run in float64, so that the reported digits do not depend on how threads split them.
"""

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


def rate_distortion_loss(bpp: Tensor, mse: Tensor, lmbda: float) -> Tensor:
    """bpp + lambda * 255^2 * MSE, [B], MSE of pixels in [0, 1] (arXiv 2401.17789)."""
    return bpp + lmbda * 255**2 * mse


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
