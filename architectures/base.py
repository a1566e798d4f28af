"""The base class of all families of models, and the registry of families.

A family is one class, registered under its name. It defines its latents (`encode`,
`latent_shapes`) and how they are decoded (`walk`). The base class derives everything else that
refinement, coding and training need. x is [B, 3, H, W] in [0, 1]. Latents are a dictionary by name.
"""

import copy
import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from architectures.distributions import at_least_float32
from architectures.walk import (
    Group,
    Latents,
    Rounding,
    Shape,
    TableDistribution,
    TurnDistribution,
    ValueOf,
    Walk,
    placed,
    rounded,
)
from common.compressai import (
    GDN,
    CompressionModel,
    EntropyBottleneck,
    GaussianConditional,
    MaskedConv2d,
)
from common.errors import InputError
from fast.freezing import has_fused_end
from fast.last_layer import LastLayer, last_layer_of, with_last_layer
from fast.tiles import ENCODER_TILE, STRIDE, in_tiles, tiled_picture
from metrics import squared_error

ARCHITECTURES: dict[str, type["Architecture"]] = {}
SMALL_SIZE = 70, 90  # H, W of a picture that classes of the user's are tried with


def architecture(name: str) -> Callable[[type["Architecture"]], type["Architecture"]]:
    """Decorator: register a family of models under `name`, which messages use too."""

    def register(family: type[Architecture]) -> type[Architecture]:
        family.name = name
        ARCHITECTURES[name] = family
        return family

    return register


class Architecture(ABC):
    """A model of one family: a network, and how its latents are encoded and decoded.

    A new family overrides the abstract methods and sets `network_class`.

    zoo: CompressAI's functions that load trained weights, and their qualities, by name.
    exact_parts: the parts of the network, by the last part of their names, that predict scales and
    means; the coder computes them in float64. halo: how many positions of y around a pixel's own
    one g_s and g_a look at; None: not known, so that pictures are never cut into tiles. batches:
    whether several images can be refined together. polishes: whether polish can move its symbols.
    one_width: whether M is N, and the constructor takes N alone. given_as: how a config names a
    class of the user's, `path/to/file.py:Class`; "" for a registered family.

    scales_lattice: whether y's lattice can have another step than 1. A class of the user's sets it
    to True if its walk gives `self.lattice` to each `Group` of the last latent, as its `step`, and
    to that group's distribution, as in `Gaussians(conditional, scales, means, self.lattice)`.
    keeps_lattice: why it cannot, as messages say it. lattice: the step of y's lattice, the distance
    of its points; `with_lattice` changes it. find_directions: gives the `Directions` of the last
    layer that belong to these weights; None: there are none.
    """

    name: ClassVar[str]
    given_as: ClassVar[str] = ""
    network_class: ClassVar[type[CompressionModel]]
    zoo: ClassVar[Mapping[str, tuple[Callable[..., CompressionModel], int]]] = {}
    exact_parts: ClassVar[tuple[str, ...]] = ("h_s",)
    halo: ClassVar[int | None] = None
    batches: ClassVar[bool] = True
    polishes: ClassVar[bool] = True
    one_width: ClassVar[bool] = False
    scales_lattice: ClassVar[bool] = False
    keeps_lattice: ClassVar[str] = "does not set scales_lattice (architectures/base.py)"
    lattice: float = 1.0
    find_directions: Callable[[], Any] | None = None

    def __init__(self, network: CompressionModel):
        self.network = network

    @abstractmethod
    def latent_shapes(self, size: tuple[int, int]) -> dict[str, Shape]:
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

    # --- what a family may replace ----------------------------------------------------------------

    @classmethod
    def build(cls, N: int, M: int, groups: Sequence[int] | None = None) -> Self:
        """An untrained model; the networks have N channels inside, y has M.

        Args:
            groups: how many channels of y each group has, where a family codes them in groups.

        Raises:
            InputError: the family cannot have these channels.
        """
        if groups is not None:
            raise InputError(f"channels.groups: {cls.name} has no groups of channels")
        if cls.one_width and N != M:
            raise InputError(f"channels: {cls.name} has M = N, not M = {M} and N = {N}")
        return cls(cls.network_class(N=N) if cls.one_width else cls.network_class(N=N, M=M))

    @classmethod
    def from_weights(cls, weights: dict[str, Tensor]) -> Self:
        """The model with these weights; their shapes tell N and M.

        Raises:
            KeyError, RuntimeError, ValueError, IndexError, TypeError: they fit another family.
            InputError: `from_state_dict` returns no network.
        """
        return cls(as_network(cls, cls.network_class.from_state_dict(weights)).eval())

    @classmethod
    def example(cls, groups: int) -> Self:
        """A small model whose parameters have the names that trained weights have.

        Args:
            groups: how many groups of channels y has, where a family codes them in groups.
        """
        return cls.build(4, 4)

    @classmethod
    def mismatch(cls, weights: Mapping[str, Tensor]) -> str:
        """Why weights, by their names and shapes, cannot be of this family; "" if they can."""
        groups = len({key for key in weights if key.endswith(".context_prediction.weight")})
        trained, all_names = names_of(cls, groups)
        if missing := [name for name in trained if name not in weights]:
            return f"no {missing[0]}"
        return next((f"it has no {key}" for key in weights if key not in all_names), "")

    @property
    def N(self) -> int:  # noqa: N802  the field's own name
        """The number of channels inside the networks, and of z if there is one."""
        return self.network.N

    @property
    def M(self) -> int:  # noqa: N802
        """The number of channels of y."""
        return self.network.M

    @property
    def table_models(self) -> list[EntropyBottleneck | GaussianConditional]:
        """The entropy models whose coding tables files need, those of z first."""
        kinds = EntropyBottleneck, GaussianConditional
        parts = list(self.network.modules())
        return [part for kind in kinds for part in parts if isinstance(part, kind)]

    @property
    def has_fused_decoder(self) -> bool:
        """Whether refinement fuses the end of g_s with the squared error."""
        return has_fused_end(getattr(self.network, "g_s", None))

    @property
    def name_in_files(self) -> str:
        """The family's name in the header of a file."""
        return self.name

    @torch.no_grad()
    def check_codable(self) -> None:
        """Check that files can be written and read: that coders know each group's distribution.

        Raises:
            InputError: they cannot; the message says why.
        """
        for group in self._own_groups():
            if not isinstance(group.distribution, TableDistribution | TurnDistribution):
                raise InputError(
                    f"architecture {self.given_as}: its latent {group.name} has the distribution "
                    f"{type(group.distribution).__name__}, which no coder knows: files need coder "
                    "and indexes, or in_turn (architectures/walk.py)"
                )

    def copy_of(self, network: Any) -> Self:
        """The same model around a changed copy of its network; its lattice stays as it is."""
        copied = type(self)(network)
        copied.lattice, copied.find_directions = self.lattice, self.find_directions
        return copied

    # --- derived from the methods above -----------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """The device that the model is on."""
        return next(self.network.buffers()).device

    @property
    def weights_hash(self) -> str:
        """16 hexadecimal digits that tell one set of trained weights from another.

        A masked convolution sets masked weights to 0 when it is first used. Here they always are.
        """
        masks = {
            f"{name}.weight": part.mask
            for name, part in self.network.named_modules()
            if isinstance(part, MaskedConv2d)
        }
        digest = hashlib.sha256()
        for name, weight in sorted(self.network.named_parameters()):
            weight = weight * masks[name] if name in masks else weight
            digest.update(name.encode())
            digest.update(weight.detach().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def to(self, device: torch.device) -> Self:
        """Move the model to a device, in place, and return it."""
        self.network.to(device)
        return self

    def prepare_tables(self) -> None:
        """Compute the coding tables that the checkpoint does not hold, as CompressAI does."""
        tables = (getattr(part, "scale_table", ()) for part in self.table_models)
        self.network.update(next((table for table in tables if len(table)), None))

    def with_lattice(self, step: float) -> Self:
        """The same model and network, where the points of y's lattice are `step` apart.

        y_hat = centre + step * integers. A larger step than 1 costs fewer bits, and gives a worse
        picture. A file decodes only with exactly the step that it was written with.

        Raises:
            InputError: the step is no positive number, or the family has no other lattice.
        """
        if not 0 < step < math.inf:
            raise InputError(f"lattice: the step must be a number above 0, not {step}")
        model = copy.copy(self)
        model.lattice = float(step)
        if step != 1:
            model._check_lattice()
        return model

    def _check_lattice(self) -> None:
        """Refuse a family without another lattice, and a user's class whose walk ignores it."""
        label = label_of(type(self))
        if not self.scales_lattice:
            raise InputError(
                f"lattice: {label} {self.keeps_lattice}, so its lattice cannot be coarser"
            )
        groups = self._own_groups()
        for group in groups:
            step = self.lattice if group.name == groups[-1].name else 1.0
            if not group.step == getattr(group.distribution, "step", 1.0) == step:
                raise InputError(
                    f"lattice: {label} has scales_lattice, so its walk must give step=self.lattice "
                    f"to the groups of {groups[-1].name} and to their distributions, and to no "
                    "others"
                )

    @torch.no_grad()
    def _own_groups(self) -> tuple[Group, ...]:
        """The groups of a small picture, if the class is the user's; else ()."""
        if not self.given_as:
            return ()
        shapes = self.latent_shapes(SMALL_SIZE)
        zeros = {name: torch.zeros(shape, device=self.device) for name, shape in shapes.items()}
        return self.place(zeros, SMALL_SIZE).groups

    def with_last_layer(self, last: LastLayer) -> Self:
        """The same model with another last layer of g_s; they share all else.

        Raises:
            ValueError: g_s does not end with a transposed convolution.
        """
        if last_layer_of(getattr(self.network, "g_s", None)) is None:
            raise ValueError("g_s does not end with a transposed convolution")
        network = copy.copy(self.network)
        network._modules = {**self.network._modules, "g_s": with_last_layer(network.g_s, last)}
        return self.copy_of(network)

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
        x = continued(x, STRIDE)
        if self.halo is None:
            return self.encode(x, self.network.g_a)
        halo = self.halo
        return self.encode(x, lambda v: in_tiles(self.network.g_a, v, tile, halo, (STRIDE, 1)))

    def visit(self, size: tuple[int, int], value_of: ValueOf) -> Walk:
        """Walk, and keep every group and its value."""
        groups, values = [], []

        def kept_value_of(group: Group) -> Tensor:
            value = value_of(group)
            groups.append(group)
            values.append(value)
            return value

        y_hat = self.walk(size, kept_value_of)
        return Walk(tuple(groups), tuple(values), self.latent_shapes(size), y_hat)

    def round(self, latents: Latents, rounding: Rounding, size: tuple[int, int]) -> Walk:
        """Walk, and round each latent with `rounding`; size: H, W of the image."""
        return self.visit(size, rounded(latents, rounding))

    @torch.no_grad()
    def place(self, symbols: Latents, size: tuple[int, int]) -> Walk:
        """Walk with known integers, as `symbols` returns them; size: H, W of the image."""
        return self.visit(size, placed(symbols))

    @torch.no_grad()
    def symbols(self, latents: Latents, size: tuple[int, int]) -> Latents:
        """The integers that an entropy coder codes, int32: those next to the latents.

        They are round((latent - centre) / step), with centre and step of the symbol's group.
        """
        walk = self.round(latents, torch.round, size)
        symbols = walk.whole(tuple(
            group.in_steps(group.part.of(latents[group.name])).round().int()
            for group in walk.groups
        ))  # fmt: skip
        return {name: symbols[name] for name in latents}

    @torch.no_grad()
    def reconstruct(
        self, symbols: Latents, size: tuple[int, int], tile: int | None = None
    ) -> Tensor:
        """The reconstruction [1, 3, *size] in [0, 1] of integers; `tile`: see `synthesize`."""
        return self.synthesize(self.place(symbols, size).y_hat, size, tile).clamp(0, 1)

    def synthesize(self, y_hat: Tensor, size: tuple[int, int], tile: int | None = None) -> Tensor:
        """The reconstruction [B, 3, *size] of y_hat [B, M, h, w], not clamped to [0, 1].

        Its gradient to y_hat can be taken once.

        Args:
            tile: the side, in positions of y, of the tiles that g_s decodes one by one; None
                decodes the whole image at once. For the gradient each tile is decoded once more.
        """
        g_s = self.network.g_s
        if tile is None or self.halo is None:
            x_hat = g_s(y_hat)
        else:
            x_hat = tiled_picture(g_s, y_hat, (tile, self.halo))
        return at_least_float32(x_hat[:, :, : size[0], : size[1]])

    def squared_error(
        self,
        y_hat: Tensor,
        x: Tensor,
        corner: tuple[int, int] = (0, 0),
        weights: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The summed squared error of x_hat, [B] in float64, and x_hat itself, [B, 3, H, W].

        Args:
            y_hat: [B, M, h, w].
            x: [B, 3, H, W], the target.
            corner: the row and column, in pixels of g_s's result, where x begins.
            weights: [B, 1, H, W], of x's pixels; None: all are 1.
        """
        fused = getattr(self.network.g_s, "squared_error", None)
        if fused is not None:
            return fused(y_hat, x, corner, weights)
        (top, left), (height, width) = corner, x.shape[2:]
        x_hat = self.network.g_s(y_hat)[:, :, top : top + height, left : left + width]
        x_hat = at_least_float32(x_hat)
        return squared_error(x_hat, x, weights), x_hat

    def in_float64(self) -> Self:
        """A model that computes `exact_parts` in float64; g_a and g_s are those of this one."""
        shared: dict[int, Any] = {}
        for part in (getattr(self.network, name, None) for name in ("g_a", "g_s")):
            shared[id(part)] = part
        network = copy.deepcopy(self.network, shared)
        for parent in list(network.modules()):
            for name in parent._modules.keys() & {*self.exact_parts}:
                _compute_in_float64(parent, name)
        return self.copy_of(network)

    def state(self) -> dict[str, Any]:
        """The network's state dict, with empty coding tables: training makes old tables wrong."""
        tables = ("_offset", "_quantized_cdf", "_cdf_length", "scale_table")
        return {
            key: value[:0] if key.rpartition(".")[2] in tables else value
            for key, value in self.network.state_dict().items()
        }


CONSTANT_BUFFERS = (".bound", ".pedestal", ".target", ".scale_bound")


def restore_constants(network: nn.Module) -> None:
    """Reset, in place, the constants of CompressAI's layers that half precision has rounded.

    For example it has rounded the lower bound of likelihoods, 1e-9, to 0.
    """
    with torch.random.fork_rng(devices=[]):
        examples = EntropyBottleneck(1), GaussianConditional(None), GDN(1)
    for part in network.modules():
        for example in (one for one in examples if isinstance(part, type(one))):
            own = dict(part.named_buffers())
            for name, exact in example.named_buffers():
                constant = f".{name}".endswith(CONSTANT_BUFFERS) and name in own
                if constant and torch.equal(own[name], exact.half().float()):
                    own[name].copy_(exact)


@cache
def names_of(family: type[Architecture], groups: int) -> tuple[tuple[str, ...], frozenset[str]]:
    """The names of the parameters, and of all tensors, of a model with so many groups of channels.

    `groups`: see `Architecture.example`.
    """
    network = _example_of(family, groups)
    return tuple(dict(network.named_parameters())), frozenset(network.state_dict())


def label_of(family: type[Architecture]) -> str:
    """What messages call a family: `path/to/file.py:Class`, or its name."""
    return family.given_as or family.name


def as_network(family: type[Architecture], network: Any) -> Any:
    """What a class's `from_state_dict` returned, if that is a network.

    Raises:
        InputError: it is none.
    """
    if isinstance(network, nn.Module):
        return network
    raise InputError(
        f"architecture {label_of(family)}: from_state_dict of {family.network_class.__name__} must "
        f"return the network; it returns {type(network).__name__}"
    )


def _example_of(family: type[Architecture], groups: int) -> CompressionModel:
    with torch.random.fork_rng(devices=[]):  # its weights must not move the noise of a training
        return family.example(groups).network


def continued(v: Tensor, side: int) -> Tensor:
    """v [B, C, h, w] with its border repeated, so that h and w are multiples of `side`.

    Else the zero padding of strided layers would lie elsewhere at the lower and right border than
    in any training crop, and what follows them would be nonsense there.
    """
    missing = (0, -v.size(3) % side, 0, -v.size(2) % side)
    return F.pad(v, missing, mode="replicate") if any(missing) else v


def _compute_in_float64(parent: nn.Module, name: str) -> None:
    """Let a part of a network, or each of its parts if it is a dictionary or a list, do so."""
    part = parent._modules[name]
    if isinstance(part, nn.ModuleDict | nn.ModuleList):
        for key in list(part._modules):
            _compute_in_float64(part, key)
    elif part is not None:
        parent._modules[name] = _InFloat64(part)


class _InFloat64(nn.Module):
    def __init__(self, part: nn.Module):
        super().__init__()
        self.part = part.double()

    def forward(self, v: Tensor) -> Tensor:
        return self.part(v.double())
