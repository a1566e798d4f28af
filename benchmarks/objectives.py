"""A step of refinement with each objective, beside plain loops and another MS-SSIM."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from pytorch_msssim import ms_ssim as package_ms_ssim
from torch import Tensor

from architectures import Architecture
from benchmarks.refinement_loops import our_step, plain_step
from benchmarks.variant import Variant, in_bfloat16
from objectives import DISTORTIONS, RateDistortion, distortion

MS_SSIM_LMBDA = 13.0
PACKAGE = "ms-ssim of pytorch-msssim"  # an objective that only exists here


def with_ms_ssim(x_hat: Tensor, x: Tensor) -> Tensor:
    """lambda * (1 - MS-SSIM) by pytorch-msssim, for a plain loop."""
    return MS_SSIM_LMBDA * (1 - package_ms_ssim(x_hat, x, data_range=1.0))


def package_step(model: Architecture, x: Tensor) -> Callable[[], Any]:
    """Our loop with the MS-SSIM of pytorch-msssim in place of our own."""
    if PACKAGE not in DISTORTIONS:
        distortion(PACKAGE, DISTORTIONS["ms-ssim"].scale)(
            lambda x_hat, x, weights: (
                1 - package_ms_ssim(x_hat, x, data_range=1.0, size_average=False)
            )
        )
    return our_step(model, x, objective=RateDistortion(MS_SSIM_LMBDA, PACKAGE))


def weighted_step(model: Architecture, x: Tensor) -> Callable[[], Any]:
    """Our loop with weights of pixels, as a map gives them."""
    weights = torch.rand(len(x), 1, *x.shape[2:])
    weights = weights / weights.mean((1, 2, 3), keepdim=True)
    return our_step(model, x, weights=weights)


MS_SSIM = RateDistortion(MS_SSIM_LMBDA, "ms-ssim")
plain_ms_ssim = partial(plain_step, weighted_distortion=with_ms_ssim)
our_ms_ssim = partial(our_step, objective=MS_SSIM)
OBJECTIVE_STEPS = {
    "plain, mse": Variant("mse, plain published loop", False, plain_step),
    "mse": Variant("mse", True, our_step),
    "mse, bfloat16": Variant("mse, bfloat16", True, in_bfloat16(our_step)),
    "weighted": Variant("mse, weighted by a map", True, weighted_step),
    "plain, ms-ssim": Variant("ms-ssim, plain loop", False, plain_ms_ssim),
    "package": Variant("ms-ssim of pytorch-msssim in this loop", True, package_step),
    "ms-ssim": Variant("ms-ssim", True, our_ms_ssim),
    "ms-ssim, bfloat16": Variant("ms-ssim, bfloat16", True, in_bfloat16(our_ms_ssim)),
}
