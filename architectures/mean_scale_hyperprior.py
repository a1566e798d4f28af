"""The mean-scale hyperprior of Minnen, Balle, Toderici 2018 (arXiv 1809.02736)."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch.nn.functional as F
from torch import Tensor

from architectures.base import Architecture, architecture
from architectures.distributions import FactorizedPrior, Gaussians
from architectures.walk import Group, Latents, ValueOf
from common.compressai import MeanScaleHyperprior, mbt2018_mean


@architecture("mean-scale hyperprior")
class MeanScale(Architecture):
    """A model with latents y and z: h_s predicts a Gaussian for each symbol of y from z.

        x -> g_a -> y -> h_a -> z        encoder: the latents that refinement begins with
        z_hat on the integers + medians, under the factorised prior
        scales, means = h_s(z_hat)       cropped to y's size
        y_hat on the integers + means, under the Gaussians
        x_hat = g_s(y_hat)               cropped to x's size, so x may have any size

    y is [B, M, ceil(H/16), ceil(W/16)], z is [B, N, ceil(H/64), ceil(W/64)].
    """

    network_class = MeanScaleHyperprior
    zoo = MappingProxyType({"mbt2018-mean": mbt2018_mean})

    @classmethod
    def mismatch(cls, weights: Mapping[str, Tensor]) -> str:
        """See `Architecture`."""
        parts = {key.partition(".")[0] for key in weights}
        if "context_prediction" in parts:
            return "context_prediction: an autoregressive model, as mbt2018 and cheng2020 are"
        if not {"g_a.0.weight", "g_a.6.weight"} <= weights.keys():
            return f"no g_a.0.weight, g_a.6.weight among {', '.join(list(weights)[:3])}"
        if not {"h_a", "h_s"} & parts:
            return "no h_a, h_s: a factorized prior, as bmshj2018-factorized"
        last = weights.get("h_s.4.weight")
        if last is not None and last.shape[:1] == weights["g_a.6.weight"].shape[:1]:
            return "h_s gives no means: a scale hyperprior, as bmshj2018-hyperprior"
        return ""

    def latent_shapes(self, size: tuple[int, int]) -> dict[str, tuple[int, int, int, int]]:
        """See `Architecture`."""
        height, width = size
        return {
            "y": (1, self.M, -(-height // 16), -(-width // 16)),
            "z": (1, self.N, -(-height // 64), -(-width // 64)),
        }

    def encode(self, x: Tensor, g_a: Callable[[Tensor], Tensor]) -> Latents:
        """See `Architecture`."""
        y = g_a(x)  # [B, M, ceil(H/16), ceil(W/16)]
        missing = (0, -y.size(3) % 4, 0, -y.size(2) % 4)
        # Else h_a's zero padding would lie elsewhere at the lower and right border than in any
        # training crop, and h_s would predict nonsense there.
        continued = F.pad(y, missing, mode="replicate") if any(missing) else y
        return {"y": y, "z": self.network.h_a(continued)}  # z [B, N, ceil(H/64), ceil(W/64)]

    def walk(self, size: tuple[int, int], value_of: ValueOf) -> Tensor:
        """See `Architecture`."""
        prior = FactorizedPrior(self.network.entropy_bottleneck)
        z_hat = value_of(Group("z", prior.medians, prior))
        height, width = self.latent_shapes(size)["y"][2:]
        params = self.network.h_s(z_hat)[:, :, :height, :width]  # [B, 2 M, h, w]
        scales, means = params.chunk(2, dim=1)  # [B, M, h, w]
        gaussians = Gaussians(self.network.gaussian_conditional, scales, means)
        return value_of(Group("y", means, gaussians))
