"""The base class of all families of models, and the registry of families.

A family is one class, registered under its name. It defines its latents (`encode`,
`latent_shapes`) and how they are decoded (`walk`). The base class derives everything else that
refinement, coding and training need. x is [B, 3, H, W] in [0, 1]. Latents are a dictionary by name.
"""

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from architectures.distributions import at_least_float32
from architectures.walk import Group, Latents, Rounding, ValueOf, Walk, placed, rounded
from common.compressai import CompressionModel
from fast.tiles import ENCODER_TILE, STRIDE, in_tiles
from metrics import squared_error

ARCHITECTURES: dict[str, type["Architecture"]] = {}


def architecture(name: str) -> Callable[[type["Architecture"]], type["Architecture"]]:
    """Decorator: register a family of models under `name`, which messages use too."""

    def register(family: type[Architecture]) -> type[Architecture]:
        family.name = name
        ARCHITECTURES[name] = family
        return family

    return register


class Architecture(ABC):
    """A model of one family: CompressAI's network, and how its latents are encoded and decoded.

    A new family overrides the abstract methods and sets `network_class`. `zoo` holds CompressAI's
    functions that load trained weights. `scale_networks` are the parts that predict scales; these
    choose the coding tables.
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
        """Why weights, by their names and shapes, cannot be of this family; "" if they can."""

    @abstractmethod
    def latent_shapes(self, size: tuple[int, int]) -> dict[str, tuple[int, int, int, int]]:
        """The shape [1, C, h, w] of each latent, for one image of size = (H, W) pixels."""

    @abstractmethod
    def encode(self, x: Tensor, g_a: Callable[[Tensor], Tensor]) -> Latents:
        """The latents of x [B, 3, H, W], not rounded; `g_a` computes the network of that name."""

    @abstractmethod
    def walk(self, size: tuple[int, int], value_of: ValueOf) -> Tensor:
        """Call `value_of` for each group of symbols in coding order, and return y_hat for g_s.

        Args:
            size: H, W of the image.
        """

    # --- derived from the methods above -----------------------------------------------------------

    @classmethod
    def build(cls, N: int, M: int) -> Self:
        """An untrained model; the networks have N channels inside, y has M."""
        return cls(cls.network_class(N=N, M=M))

    @classmethod
    def from_weights(cls, weights: dict[str, Tensor]) -> Self:
        """The model with these weights; their shapes tell N and M.

        Raises:
            KeyError, RuntimeError, ValueError, IndexError, TypeError: they fit another family.
        """
        return cls(cls.network_class.from_state_dict(weights).eval())

    @property
    def N(self) -> int:  # noqa: N802  the field's own name
        """The number of channels inside the networks, and of z."""
        return self.network.N

    @property
    def M(self) -> int:  # noqa: N802
        """The number of channels of y."""
        return self.network.M

    @property
    def device(self) -> torch.device:
        """The device that the model is on."""
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
        """Move the model to a device, in place, and return it."""
        self.network.to(device)
        return self

    def prepare_tables(self) -> None:
        """Compute the coding tables that the checkpoint does not hold, as CompressAI does."""
        conditional = getattr(self.network, "gaussian_conditional", None)
        scale_table = () if conditional is None else conditional.scale_table
        self.network.update(scale_table if len(scale_table) else None)

    @torch.no_grad()
    def analyze(self, x: Tensor, tile: int = ENCODER_TILE) -> Latents:
        """The encoder's latents of x, not rounded, without gradients.

        The border pixels of x are repeated up to multiples of 16. Otherwise the convolutions' zero
        padding would lie inside the pixels of the last row and column of y.

        Args:
            x: [B, 3, H, W] in [0, 1].
            tile: the side, in positions of y, of the tiles that g_a encodes one by one. On a whole
                image g_a would take more memory than all later steps.
        """
        height, width = x.shape[2:]
        x = F.pad(x, (0, -width % STRIDE, 0, -height % STRIDE), mode="replicate")
        return self.encode(x, lambda v: in_tiles(self.network.g_a, v, tile, STRIDE, 1))

    def visit(self, size: tuple[int, int], value_of: ValueOf) -> Walk:
        """Walk, and keep every group and its value."""
        groups, values = [], {}

        def kept_value_of(group: Group) -> Tensor:
            value = value_of(group)
            groups.append(group)
            values[group.name] = value
            return value

        y_hat = self.walk(size, kept_value_of)
        return Walk(tuple(groups), values, y_hat)

    def round(self, latents: Latents, rounding: Rounding, size: tuple[int, int]) -> Walk:
        """Walk, and round each latent with `rounding`; size: H, W of the image."""
        return self.visit(size, rounded(latents, rounding))

    @torch.no_grad()
    def place(self, symbols: Latents, size: tuple[int, int]) -> Walk:
        """Walk with known integers, as `symbols` returns them; size: H, W of the image."""
        return self.visit(size, placed(symbols))

    @torch.no_grad()
    def symbols(self, latents: Latents, size: tuple[int, int]) -> Latents:
        """The integers that an entropy coder codes, int32: round(latent - centre of its group)."""
        walk = self.round(latents, torch.round, size)
        centres = {group.name: group.centre for group in walk.groups}
        return {name: (v - centres[name]).round().int() for name, v in latents.items()}

    @torch.no_grad()
    def reconstruct(
        self, symbols: Latents, size: tuple[int, int], tile: int | None = None
    ) -> Tensor:
        """The reconstruction [1, 3, *size] in [0, 1] of integers; `tile`: see `synthesize`."""
        return self.synthesize(self.place(symbols, size).y_hat, size, tile).clamp(0, 1)

    def synthesize(self, y_hat: Tensor, size: tuple[int, int], tile: int | None = None) -> Tensor:
        """The reconstruction [B, 3, *size] of y_hat [B, M, h, w], not clamped to [0, 1].

        Args:
            tile: the side, in positions of y, of the tiles that g_s decodes one by one, without a
                gradient; None decodes the whole image at once.

        Raises:
            RuntimeError: a gradient through a frozen g_s is wanted; only `squared_error` has one.
        """
        g_s = self.network.g_s
        x_hat = g_s(y_hat) if tile is None else in_tiles(g_s, y_hat, tile, 1, STRIDE)
        return at_least_float32(x_hat[:, :, : size[0], : size[1]])

    def squared_error(
        self, y_hat: Tensor, x: Tensor, corner: tuple[int, int] = (0, 0)
    ) -> tuple[Tensor, Tensor]:
        """The summed squared error of x_hat, [B] in float64, and x_hat itself, [B, 3, H, W].

        Args:
            y_hat: [B, M, h, w].
            x: [B, 3, H, W], the target.
            corner: the row and column, in pixels of g_s's result, where x begins.
        """
        fused = getattr(self.network.g_s, "squared_error", None)
        if fused is not None:
            return fused(y_hat, x, corner)
        (top, left), (height, width) = corner, x.shape[2:]
        x_hat = self.network.g_s(y_hat)[:, :, top : top + height, left : left + width]
        x_hat = at_least_float32(x_hat)
        return squared_error(x_hat, x), x_hat

    def with_exact_scales(self) -> Self:
        """A model that computes `scale_networks` in float64 and shares all else with this one."""
        network = copy.copy(self.network)
        # The copy is shallow: without this line both networks would share one dictionary of parts.
        network._modules = dict(self.network._modules)
        for part in self.scale_networks:
            network._modules[part] = _InFloat64(network._modules[part])
        return type(self)(network)

    def state(self) -> dict[str, Any]:
        """The network's state dict, with empty coding tables: training makes old tables wrong."""
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
