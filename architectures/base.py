"""What refinement, coding and training need of a family of models, and the registry of families.

A family is one class, registered under its name: it says what its latents are (`encode`,
`latent_shapes`) and how they are decoded (`walk`). Everything else follows from these here.
x is [B, 3, H, W] in [0, 1]. The latents are a dictionary by name.
"""

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from architectures.distributions import widened
from architectures.walk import Group, Latents, Rounding, ValueOf, Walk, placed, rounded
from common.compressai import CompressionModel
from fast.tiles import ENCODER_TILE, STRIDE, in_tiles
from metrics import squared_error

ARCHITECTURES: dict[str, type["Architecture"]] = {}


def architecture(name: str) -> Callable[[type["Architecture"]], type["Architecture"]]:
    """Decorator: register a family of models under the name that messages use."""

    def register(family: type[Architecture]) -> type[Architecture]:
        family.name = name
        ARCHITECTURES[name] = family
        return family

    return register


class Architecture(ABC):
    """A model of one family: CompressAI's network, and how its latents are made and decoded.

    A new family names its class of networks, overrides the abstract methods, and says in `zoo`
    where CompressAI has weights. `scale_networks` are the parts that choose the coding tables.
    """

    name: ClassVar[str]
    network_class: ClassVar[type[CompressionModel]]
    zoo: ClassVar[Mapping[str, Callable[..., CompressionModel]]] = {}
    scale_networks: ClassVar[tuple[str, ...]] = ("h_s",)

    def __init__(self, network: CompressionModel):
        self.network = network

    @classmethod
    @abstractmethod
    def mismatch(cls, weights: Mapping[str, Tensor]) -> str:
        """What tells weights, by their names and shapes, from this family's; "" for nothing."""

    @abstractmethod
    def latent_shapes(self, size: tuple[int, int]) -> dict[str, tuple[int, int, int, int]]:
        """The shape of each latent, for one picture of H, W pixels."""

    @abstractmethod
    def encode(self, x: Tensor, g_a: Callable[[Tensor], Tensor]) -> Latents:
        """The latents of x, not rounded, where `g_a` computes the network of that name."""

    @abstractmethod
    def walk(self, size: tuple[int, int], value_of: ValueOf) -> Tensor:
        """Ask `value_of` for each group of symbols in coding order; y_hat, which g_s decodes.

        Args:
            size: H, W of the picture.
        """

    # --- what follows from these ------------------------------------------------------------------

    @classmethod
    def build(cls, N: int, M: int) -> Self:
        """An untrained model with N channels inside the networks and M of y."""
        return cls(cls.network_class(N=N, M=M))

    @classmethod
    def from_weights(cls, weights: dict[str, Tensor]) -> Self:
        """The model that these weights are of; N and M follow from their shapes.

        Raises:
            KeyError, RuntimeError, ValueError, IndexError, TypeError: they are not this family's.
        """
        return cls(cls.network_class.from_state_dict(weights).eval())

    @property
    def N(self) -> int:  # noqa: N802  the field's own name
        """Channels inside the networks, and of z."""
        return self.network.N

    @property
    def M(self) -> int:  # noqa: N802
        """Channels of y."""
        return self.network.M

    @property
    def device(self) -> torch.device:
        """Where the model works."""
        return next(self.network.buffers()).device

    @property
    def weights_hash(self) -> str:
        """16 hexadecimal digits that tell one set of trained weights from another."""
        digest = hashlib.sha256()
        for name, weight in sorted(self.network.named_parameters()):
            digest.update(name.encode())
            digest.update(weight.detach().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def to(self, device: torch.device) -> Self:
        """The same model, moved there in place."""
        self.network.to(device)
        return self

    def prepare_tables(self) -> None:
        """Make the coding tables that the checkpoint did not hold, as CompressAI does."""
        scale_table = self.network.gaussian_conditional.scale_table
        self.network.update(scale_table if len(scale_table) else None)

    @torch.no_grad()
    def analyze(self, x: Tensor, tile: int = ENCODER_TILE) -> Latents:
        """The encoder's latents of x, not rounded, without gradients.

        x is continued by its border pixels to multiples of 16, so that the zeros with which the
        convolutions pad do not lie inside the last row and column of y, where the decoder has none.
        g_a sees `tile` positions of y a side at a time. It runs once, and would otherwise take more
        memory than all that follows.
        """
        height, width = x.shape[2:]
        x = F.pad(x, (0, -width % STRIDE, 0, -height % STRIDE), mode="replicate")
        return self.encode(x, lambda v: in_tiles(self.network.g_a, v, tile, STRIDE, 1))

    def visit(self, size: tuple[int, int], value_of: ValueOf) -> Walk:
        """Walk, and keep the groups and their values."""
        groups, values = [], {}

        def kept_value_of(group: Group) -> Tensor:
            value = value_of(group)
            groups.append(group)
            values[group.name] = value
            return value

        y_hat = self.walk(size, kept_value_of)
        return Walk(tuple(groups), values, y_hat)

    def round(self, latents: Latents, rounding: Rounding, size: tuple[int, int]) -> Walk:
        """Walk with latents that `rounding` rounds; H, W are the picture's."""
        return self.visit(size, rounded(latents, rounding))

    @torch.no_grad()
    def place(self, symbols: Latents, size: tuple[int, int]) -> Walk:
        """Walk with integers that are known, as `symbols` gives them; H, W are the picture's."""
        return self.visit(size, placed(symbols))

    @torch.no_grad()
    def symbols(self, latents: Latents, size: tuple[int, int]) -> Latents:
        """The integers that an entropy coder codes, int32: each latent less its centre, rounded."""
        walk = self.round(latents, torch.round, size)
        centres = {group.name: group.centre for group in walk.groups}
        return {name: (v - centres[name]).round().int() for name, v in latents.items()}

    @torch.no_grad()
    def reconstruct(
        self, symbols: Latents, size: tuple[int, int], tile: int | None = None
    ) -> Tensor:
        """x_hat [1, 3, *size] in [0, 1] of integers; `tile`: see `synthesize`."""
        return self.synthesize(self.place(symbols, size).y_hat, size, tile).clamp(0, 1)

    def synthesize(self, y_hat: Tensor, size: tuple[int, int], tile: int | None = None) -> Tensor:
        """x_hat [B, 3, *size] for y_hat [B, M, h, w]; not clamped to [0, 1].

        With `tile` g_s sees so many positions of y a side at a time. There is no gradient then, and
        where the model is frozen it may not be wanted: see `squared_error`.

        Raises:
            RuntimeError: a gradient through a frozen g_s is wanted.
        """
        g_s = self.network.g_s
        x_hat = g_s(y_hat) if tile is None else in_tiles(g_s, y_hat, tile, 1, STRIDE)
        return widened(x_hat[:, :, : size[0], : size[1]])

    def squared_error(
        self, y_hat: Tensor, x: Tensor, corner: tuple[int, int] = (0, 0)
    ) -> tuple[Tensor, Tensor]:
        """Sum of squared errors of x_hat, [B] in float64, and x_hat itself, [B, 3, H, W].

        Args:
            y_hat: [B, M, h, w].
            x: [B, 3, H, W], what the picture should be from row and column `corner` on.
        """
        fused = getattr(self.network.g_s, "squared_error", None)
        if fused is not None:
            return fused(y_hat, x, corner)
        (top, left), (height, width) = corner, x.shape[2:]
        x_hat = widened(self.network.g_s(y_hat)[:, :, top : top + height, left : left + width])
        return squared_error(x_hat, x), x_hat

    def with_exact_scales(self) -> Self:
        """A model that shares everything with this one but `scale_networks`, now in float64."""
        network = copy.copy(self.network)
        # A shallow copy would share the dictionary of parts, too.
        network._modules = dict(self.network._modules)
        for part in self.scale_networks:
            network._modules[part] = _InFloat64(network._modules[part])
        return type(self)(network)

    def state(self) -> dict[str, Any]:
        """The network's state dict with empty coding tables: training makes any it had wrong."""
        tables = ("_offset", "_quantized_cdf", "_cdf_length", "scale_table")
        return {
            key: value[:0] if key.rpartition(".")[2] in tables else value
            for key, value in self.network.state_dict().items()
        }


class _InFloat64(nn.Module):
    def __init__(self, part: nn.Module):
        super().__init__()
        self.part = copy.deepcopy(part).double()

    def forward(self, v: Tensor) -> Tensor:
        return self.part(v.double())
