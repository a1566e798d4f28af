"""What a region of a picture got: its quality, and the bits of y that lie in it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from architectures import Latents
from fast.tiles import STRIDE
from metrics import psnr, squared_error, to_8_bit
from objectives import Problem


def inside_of(region: Tensor) -> Tensor:
    """Which pixels of a map [..., H, W] are inside, as floats 0 or 1: those above its mean."""
    mean = region.double().mean((-2, -1), keepdim=True)
    return (region.double() > mean).to(region.dtype)


@torch.no_grad()
def region_measures(problem: Problem, latents: Latents, region: Tensor) -> dict[str, float]:
    """The quality inside and outside a region, and the bits of y there, of one image's latents.

    A position of y stands for 16x16 pixels; its bits are shared in proportion to these.

    Args:
        problem: of one image; latents: of it.
        region: the map, [1, H, W]; inside is where it is above its mean.

    Returns:
        psnr_inside, psnr_outside (dB, in 8-bit pixels), y_bits_inside, y_bits_outside. A PSNR is
        NaN where there are no pixels: outside nothing, or inside a map that is equal everywhere.
    """
    terms = problem.true(latents)
    inside = inside_of(region.to(problem.x.device))[None]  # [1, 1, H, W]
    likelihoods = terms.walk.likelihoods[terms.walk.groups[-1].name]
    bits = -likelihoods.log2().sum(1, dtype=torch.float64)  # [1, h, w]
    shares = _of_positions(inside, (bits.size(1), bits.size(2)))
    x_hat, measures = to_8_bit(terms.x_hat), {}
    for name, mask, share in (
        ("inside", inside, shares),
        ("outside", 1 - inside, 1 - shares),
    ):
        error = squared_error(x_hat, problem.x, mask) / (problem.x.size(1) * mask.double().sum())
        measures[f"psnr_{name}"] = psnr(error).item()
        measures[f"y_bits_{name}"] = (bits * share).sum().item()
    return measures


def _of_positions(inside: Tensor, positions: tuple[int, int]) -> Tensor:
    """Which part of each position's pixels is inside, [1, h, w] in float64.

    Args:
        inside: [1, 1, H, W]; positions: h, w.
    """
    pooled = F.avg_pool2d(inside.double(), STRIDE, ceil_mode=True, count_include_pad=False)
    if pooled.shape[2:] != positions:  # a model of another stride
        pooled = F.adaptive_avg_pool2d(inside.double(), positions)
    return pooled[:, 0]


def bits_moved(base: dict[str, float], refined: dict[str, float]) -> float:
    """How many bits of y lie inside that would not at the base's proportions.

    Args:
        base, refined: two results of `region_measures`.
    """
    total = {
        name: side["y_bits_inside"] + side["y_bits_outside"]
        for name, side in (("base", base), ("refined", refined))
    }
    if not total["base"]:
        return refined["y_bits_inside"]
    return refined["y_bits_inside"] - total["refined"] * base["y_bits_inside"] / total["base"]
