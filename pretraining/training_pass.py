"""The forward pass of pre-training."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from architectures import Architecture
from metrics import psnr
from objectives import Problem, RateDistortion


class TrainingPass(nn.Module):
    """A forward pass with uniform noise in place of rounding (arXiv 1809.02736).

    With the quantization `mixed`, the noise is for the rates alone. h_s and g_s get rounded
    latents, and gradients pass the rounding unchanged (arXiv 2007.08739, section 3.3). With
    `rounded` the rates get them too.

    It is a module so that DistributedDataParallel can wrap the whole pass.
    """

    def __init__(
        self,
        model: Architecture,
        objective: RateDistortion,
        precision: torch.dtype = torch.float32,
        quantization: str = "noise",
    ):
        super().__init__()
        self.network = model.network  # registers the parameters
        self.model = model
        self.objective = objective
        self.precision = precision
        self.roundings = ROUNDINGS[quantization]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """The scalars loss, aux_loss, bpp, bpp_y, bpp_z, distortion and psnr (dB) of a batch.

        The networks run in `precision`, the likelihoods and the distortion in float32. Only
        aux_loss has gradients to the quantiles, and it has no others.

        Args:
            x: [B, 3, H, W] in [0, 1]; H and W are multiples of 64.
        """
        reduced = self.precision != torch.float32
        with torch.autocast(x.device.type, dtype=self.precision, enabled=reduced):
            latents = self.model.encode(x, self.network.g_a)
            latents = {name: v.float() for name, v in latents.items()}
            terms = Problem(self.model, x, self.objective).relaxed(latents, *self.roundings)
        return {
            "loss": terms.loss.mean(),
            "bpp": terms.bpp.mean(),
            **{f"bpp_{name}": rate.mean() for name, rate in sorted(terms.rates.items())},
            "distortion": terms.distortion.detach().mean(),
            "psnr": psnr(terms.mse.detach()).mean(),
            "aux_loss": self.network.aux_loss(),
        }


def _add_uniform_noise(v: Tensor) -> Tensor:
    return v + torch.empty_like(v).uniform_(-0.5, 0.5)


def _straight_through(v: Tensor) -> Tensor:
    return v + (v.round() - v).detach()


# By `quantization`: the rounding of latents, and another one for rates if there is one.
ROUNDINGS: dict[str, tuple[Callable[[Tensor], Tensor], ...]] = {
    "noise": (_add_uniform_noise,),
    "mixed": (_straight_through, _add_uniform_noise),
    "rounded": (_straight_through,),
}
