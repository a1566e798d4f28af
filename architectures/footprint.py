"""The memory that the gradient of a model's loss takes, for each pixel of a picture."""

from typing import NamedTuple

import torch
from torch import Tensor

from architectures.base import Architecture

# Bytes for each pixel. With GDN's decoder: measured at N = 64 and 192 with up to 24 megapixels, for
# each of the N channels inside g_s. Others: what autograd keeps, times a factor for all else.
PER_ACTIVATION, PER_PIXEL, BESIDE_KEPT = 9, 150, 1.5
PER_LATENT = 160  # bytes for each element of y, with Adam
# Of a loss that is not fused with the decoder: the pictures and their gradients; measured.
PER_PICTURE = 60
SIDE = 128  # of the picture that is measured, pixels


class Footprint(NamedTuple):
    """The bytes that refinement takes for each pixel.

    whole: of the whole picture. seen: of the part that g_s decodes at a time. per_latent: that part
    of `whole` which is for the latents. halo: of tiles, in positions of y; None: there are none.
    """

    whole: float
    seen: float
    per_latent: float
    halo: int | None

    def with_vectors(self, extra: int) -> "Footprint":
        """The same with more copies of the latents, which an optimizer keeps."""
        added = 4 * extra * self.per_latent / PER_LATENT
        return self._replace(whole=self.whole + added, per_latent=self.per_latent + added)

    def with_pictures(self) -> "Footprint":
        """The same for a loss of whole pictures, which is not fused with the decoder."""
        return self._replace(whole=self.whole + PER_PICTURE)

    def without_optimizer(self, bytes_a_latent: float) -> "Footprint":
        """The same where each element of the latents takes so many bytes."""
        latents = self.per_latent * bytes_a_latent / PER_LATENT
        return self._replace(whole=self.whole - self.per_latent + latents, per_latent=latents)


def footprint_of(model: Architecture) -> Footprint:
    """The footprint of a model."""
    shapes = model.latent_shapes((SIDE, SIDE))
    elements = sum(shape[1] * shape[2] * shape[3] for shape in shapes.values()) / SIDE**2
    latents = PER_LATENT * elements
    if model.has_fused_decoder:
        return Footprint(PER_PIXEL + latents, PER_ACTIVATION * model.N, latents, model.halo)
    seen = BESIDE_KEPT * _kept_bytes(model) / SIDE**2
    return Footprint(PER_PIXEL + latents, seen, latents, model.halo)


def _kept_bytes(model: Architecture) -> int:
    """What autograd keeps for the gradient of the loss of a small picture."""
    kept: dict[int, int] = {}

    def pack(v: Tensor) -> Tensor:
        kept[v.untyped_storage().data_ptr()] = v.untyped_storage().nbytes()
        return v

    x = torch.zeros(1, 3, SIDE, SIDE, device=model.device)
    latents = {name: v.requires_grad_() for name, v in model.analyze(x).items()}
    weights = {p.untyped_storage().data_ptr() for p in model.network.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda v: v):
        walk = model.round(latents, lambda v: v, (SIDE, SIDE))
        kept_graph = walk.group_likelihoods, model.squared_error(walk.y_hat, x)
    del kept_graph
    return sum(size for place, size in kept.items() if place not in weights)
