"""Distributions of symbols: CompressAI's entropy models, with likelihoods that never underflow."""

from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from architectures.walk import Shape
from common.compressai import EntropyBottleneck, GaussianConditional


def at_least_float32(v: Tensor) -> Tensor:
    """v in float32, if it is in half precision; else v itself."""
    return v.float() if v.dtype in (torch.bfloat16, torch.float16) else v


class FactorizedPrior(NamedTuple):
    """One distribution for each channel, the same at all positions (arXiv 1802.01436)."""

    coder: EntropyBottleneck

    @property
    def medians(self) -> Tensor:
        """The medians [1, N, 1, 1]; the lattice is the integers plus the medians."""
        return self.coder.quantiles[:, 0, 1].detach().reshape(1, -1, 1, 1)

    def likelihood(self, v_hat: Tensor) -> Tensor:
        """p(v_hat), [B, N, h', w'] in [1e-9, 1].

        Far above the median two sigmoids near 1 differ by less than float32 resolves. So both
        arguments change their sign there. Half precision is raised to float32.
        """
        v_hat = at_least_float32(v_hat)
        flat = v_hat.transpose(0, 1).reshape(v_hat.size(1), 1, -1)  # [N, 1, B h' w']
        with torch.autocast(v_hat.device.type, enabled=False):
            ends = torch.cat((flat - 0.5, flat + 0.5), dim=2)
            lower, upper = self.coder._logits_cumulative(ends, stop_gradient=False).chunk(2, dim=2)
        sign = torch.where(lower + upper > 0, -1.0, 1.0)
        p = (torch.sigmoid(sign * upper) - torch.sigmoid(sign * lower)).abs()
        p = p.reshape(v_hat.size(1), v_hat.size(0), *v_hat.shape[2:]).transpose(0, 1)
        return self.coder.likelihood_lower_bound(p)

    def fixed_at(self, v_hat: Tensor) -> Self:
        """This distribution: symbols do not depend on each other."""
        return self

    def indexes(self, shape: Shape) -> Tensor:
        """The table of each symbol, int32 [1, N, h', w']: table c for channel c."""
        return torch.arange(shape[1], dtype=torch.int32).reshape(1, -1, 1, 1).expand(*shape)


class Gaussians(NamedTuple):
    """One Gaussian for each symbol, convolved with a box of width `step` (arXiv 1802.01436).

    In units of steps this is a Gaussian of scale `scales` / `step`, convolved with a unit box.

    scales, means: [B, M, h, w]. step: that of the lattice. Scales below the model's bound, 0.11
    steps, are raised to it.
    """

    coder: GaussianConditional
    scales: Tensor
    means: Tensor
    step: float = 1.0

    def likelihood(self, v_hat: Tensor) -> Tensor:
        """p(v_hat), [B, M, h, w] in [1e-9, 1]. Half precision is raised to float32."""
        v_hat, scales, means = map(at_least_float32, (v_hat, self.scales, self.means))
        if self.step == 1:
            p = self.coder._likelihood(v_hat, scales, means)
        else:
            p = self.coder._likelihood((v_hat - means) / self.step, scales / self.step)
        return self.coder.likelihood_lower_bound(p)

    def fixed_at(self, v_hat: Tensor) -> Self:
        """The same Gaussians: symbols do not depend on each other."""
        return self

    def indexes(self, shape: Shape) -> Tensor:
        """The table of each symbol, int32 [B, M, h, w]: that of the next larger scale."""
        scales = self.scales if self.step == 1 else at_least_float32(self.scales) / self.step
        return self.coder.build_indexes(scales)


class CoderScales(nn.Module):
    """Rounds scales of any shape as the entropy coder does.

    It raises them to the bound, then to the next scale of the coder's table. The gradient passes
    the table unchanged (straight-through).
    """

    scale_table: Tensor

    def __init__(self, lower_bound: nn.Module, scale_table: Tensor):
        super().__init__()
        self.lower_bound = lower_bound
        self.register_buffer("scale_table", scale_table.float())

    def forward(self, scales: Tensor) -> Tensor:
        """Scales from the table, shaped as `scales`."""
        scales = self.lower_bound(scales)
        coded = self.scale_table[
            torch.bucketize(scales.detach().contiguous(), self.scale_table[:-1])
        ]
        return scales + (coded - scales).detach()


def use_coder_scales(conditional: GaussianConditional) -> None:
    """Make an entropy model compute its rates with `CoderScales`, in place.

    These rates are a little above those of the continuous scales. Needs the coding tables.
    """
    conditional.lower_bound_scale = CoderScales(
        conditional.lower_bound_scale, conditional.scale_table
    )
