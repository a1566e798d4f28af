"""One forward pass of pre-training."""

import torch
from torch import Tensor, nn

from architectures import Architecture
from metrics import psnr
from objectives import Problem, RateDistortion


class TrainingPass(nn.Module):
    """A pass in which uniform noise stands for rounding (arXiv 1809.02736).

    A module of its own so that DistributedDataParallel can wrap the whole of it.
    """

    def __init__(self, model: Architecture, objective: RateDistortion, precision: str = "float32"):
        super().__init__()
        self.network = model.network  # registers the parameters
        self.model = model
        self.objective = objective
        self.precision = getattr(torch, precision)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """loss, aux_loss, bpp, bpp_y, bpp_z and psnr (dB) of x [B, 3, H, W] in [0, 1]; scalars.

        The networks run in `precision`, the likelihoods and the distortion in float32. aux_loss
        moves nothing but the quantiles, which no other loss sees. Height and width must be
        multiples of 64.
        """
        reduced = self.precision != torch.float32
        with torch.autocast(x.device.type, dtype=self.precision, enabled=reduced):
            latents = self.model.encode(x, self.network.g_a)
            latents = {name: v.float() for name, v in latents.items()}
            terms = Problem(self.model, x, self.objective).relaxed(latents, _add_uniform_noise)
        return {
            "loss": terms.loss.mean(),
            "bpp": terms.bpp.mean(),
            **{f"bpp_{name}": rate.mean() for name, rate in sorted(terms.rates.items())},
            "psnr": psnr(terms.mse.detach()).mean(),
            "aux_loss": self.network.aux_loss(),
        }


def _add_uniform_noise(v: Tensor) -> Tensor:
    return v + torch.empty_like(v).uniform_(-0.5, 0.5)
