"""Distributions of symbols: CompressAI's entropy models, with likelihoods that never underflow."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from common.compressai import EntropyBottleneck, GaussianConditional


def widened(v: Tensor) -> Tensor:
    """v in float32 at least."""
    return v.float() if v.dtype in (torch.bfloat16, torch.float16) else v


class FactorizedPrior(NamedTuple):
    """Each channel has its own distribution, the same at every place (arXiv 1802.01436)."""

    coder: EntropyBottleneck

    @property
    def medians(self) -> Tensor:
        """[1, N, 1, 1]: the lattice is the integers plus them."""
        return self.coder.quantiles[:, 0, 1].detach().reshape(1, -1, 1, 1)

    def likelihood(self, v_hat: Tensor) -> Tensor:
        """p(v_hat), [B, N, h', w'] in [1e-9, 1].

        The difference of sigmoids is taken on the negative side of both tails, where float32
        resolves it. CompressAI's own difference underflows far above the median, and its gradient
        with it. In float32 at least, whatever precision the networks have.
        """
        flat = widened(v_hat).transpose(0, 1).reshape(v_hat.size(1), 1, -1)  # [N, 1, B h' w']
        with torch.autocast(v_hat.device.type, enabled=False):
            ends = torch.cat((flat - 0.5, flat + 0.5), dim=2)
            lower, upper = self.coder._logits_cumulative(ends, stop_gradient=False).chunk(2, dim=2)
        sign = torch.where(lower + upper > 0, -1.0, 1.0)
        p = (torch.sigmoid(sign * upper) - torch.sigmoid(sign * lower)).abs()
        p = p.reshape(v_hat.size(1), v_hat.size(0), *v_hat.shape[2:]).transpose(0, 1)
        return self.coder.likelihood_lower_bound(p)

    def indexes(self, shape: tuple[int, ...]) -> Tensor:
        """Table c for channel c, int32 [1, N, h', w']."""
        return torch.arange(shape[1], dtype=torch.int32).reshape(1, -1, 1, 1).expand(*shape)


class Gaussians(NamedTuple):
    """A Gaussian for each symbol, convolved with a unit box; scales and means [B, M, h, w].

    Scales below the model's bound, 0.11, count as the bound (arXiv 1802.01436).
    """

    coder: GaussianConditional
    scales: Tensor
    means: Tensor

    def likelihood(self, v_hat: Tensor) -> Tensor:
        """p(v_hat), [B, M, h, w] in [1e-9, 1].

        In float32 at least, whatever precision the networks have.
        """
        p = self.coder._likelihood(widened(v_hat), widened(self.scales), widened(self.means))
        return self.coder.likelihood_lower_bound(p)

    def indexes(self, shape: tuple[int, ...]) -> Tensor:
        """The table of the next larger scale, int32 [B, M, h, w]."""
        return self.coder.build_indexes(self.scales)


class CoderScales(nn.Module):
    """Scales as the entropy coder has them: the bound, then up to the next one of its table.

    The gradient is that of the scales before. Maps a tensor of any shape.
    """

    scale_table: Tensor

    def __init__(self, lower_bound: nn.Module, scale_table: Tensor):
        super().__init__()
        self.lower_bound = lower_bound
        self.register_buffer("scale_table", scale_table.float())

    def forward(self, scales: Tensor) -> Tensor:
        """Entries of the table, shaped as `scales`."""
        scales = self.lower_bound(scales)
        coded = self.scale_table[
            torch.bucketize(scales.detach().contiguous(), self.scale_table[:-1])
        ]
        return scales + (coded - scales).detach()


def use_coder_scales(conditional: GaussianConditional) -> None:
    """Let rates be those of `CoderScales`, a little above the continuous ones; in place.

    The coding tables must be there.
    """
    conditional.lower_bound_scale = CoderScales(
        conditional.lower_bound_scale, conditional.scale_table
    )
