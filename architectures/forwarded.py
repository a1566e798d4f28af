"""Models of which only CompressAI's `forward` is known: any `CompressionModel` of the user's.

Such a model is refined by its own forward, in eval mode and float32. `architectures.discovery`
finds its latents, and `architectures.interception` replaces every rounding by the chosen one.

    Q(v) becomes rounding(latent - centre) + centre - centre    centre = -v, as encoders give zeros

A symbol that is rounded again, also within a masked tensor, keeps its first value: latent codecs
round up to three times, and all must see the same draw. The rates are the likelihoods that the
forward returns. Only those of an `EntropyBottleneck` come from `FactorizedPrior`, because its own
underflow far from the median, where they have no gradient.

Limits, each of which is refused with one line:

    a forward whose roundings vary from call to call
    a decoder that gets more than rounded latents, as their signs, or noise
    the same symbols rounded in tensors of different arrangement, as whole and in slices
    likelihoods that are not [B, C, h, w] like the latents
    a gradient that is not that of the chosen rounding, which is measured once

One limit is not: where the same symbols are rounded around two centres, as y in the stock mbt2018,
the second rounding gives the value on the first lattice. Pictures are those of the stock forward
then, but rates are not. Pictures are refined one by one, as a whole. There is no polish, and there
are no .olc files: the rates are estimates, and `strings_of` gives the strings of the network's own
coder.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from architectures.base import (
    Architecture,
    as_network,
    continued,
    label_of,
    restore_constants,
)
from architectures.discovery import Plan, Structure, plan_of, structure_of
from architectures.distributions import at_least_float32
from architectures.experiment import (
    SAME,
    Experiment,
    OnNumberedRound,
    Outcome,
    kept,
    rounds_truly,
    zeros_of,
)
from architectures.interception import carried
from architectures.walk import WHOLE, Distribution, Group, Latents, Part, Shape, ValueOf, Walk
from common.compressai import (
    GDN,
    CheckerboardMaskedConv2d,
    CompressionModel,
    EntropyBottleneck,
    MaskedConv2d,
)
from common.errors import InputError
from metrics import squared_error

STEP = 0.01  # of a latent, where gradients are measured


def forwarded_family(
    network_class: type[CompressionModel], given_as: str = ""
) -> type["Forwarded"]:
    """The family of a class of CompressAI's kind, which is refined by its own forward.

    Args:
        given_as: how a config names the class, `path/to/file.py:Class`.
    """
    name = network_class.__name__
    own = {"name": name, "network_class": network_class, "given_as": given_as}
    return type(name, (Forwarded,), own)


class ForwardRate:
    """The likelihoods that a forward returned for the values of one group.

    likelihoods: by name of the latent; the forward adds them at its end.
    """

    def __init__(self, likelihoods: Mapping[str, Tensor], name: str, part: Part):
        self.likelihoods, self.name, self.part = likelihoods, name, part
        self.value: Tensor | None = None

    def likelihood(self, v_hat: Tensor) -> Tensor:
        """p(v_hat), shaped as v_hat; 1 for a latent that has no likelihoods of its own.

        Raises:
            InputError: these are not the values that the forward had.
        """
        if v_hat is not self.value:
            raise InputError("a model that is refined by its forward has no rates of other values")
        if self.name not in self.likelihoods:
            return torch.ones_like(v_hat)
        return at_least_float32(self.part.of(self.likelihoods[self.name]))

    def fixed_at(self, v_hat: Tensor) -> Distribution:
        """There is none: the forward does not tell what likelihoods depend on.

        Raises:
            InputError: always.
        """
        raise InputError("polish is not available for a model that is refined by its forward")


class Forwarded(Architecture):
    """A model that is refined by its own forward, see the module. `forwarded_family` names it.

    y_hat is the picture itself: [B, 3, H, W], H and W multiples of 64.
    """

    batches: ClassVar[bool] = False
    polishes: ClassVar[bool] = False
    keeps_lattice: ClassVar[str] = "is refined by its own forward"

    def __init__(self, network: CompressionModel):
        super().__init__(network.eval())
        _keep_layers(network)
        self._run = Experiment(network, label_of(type(self)))
        self._structure: Structure | None = None
        self._plans: dict[tuple[tuple[int, int], torch.device], Plan] = {}

    # --- what is found out

    @property
    def structure(self) -> Structure:
        """What the network rounds, found on first use.

        Raises:
            InputError: it cannot be refined by its forward.
        """
        if self._structure is None:
            with torch.no_grad():
                self._structure = structure_of(self._run)
            try:
                self._check()
            except InputError:
                self._structure = None
                raise
        return self._structure

    def _check(self) -> None:
        """Refuse a network whose walk differs from its forward, or has another gradient."""
        size = self._run.size
        x, _ = self._run.pictures(size)
        with torch.no_grad():
            stock = self._run(x, rounds_truly).x_hat
            latents = self.analyze(x)
            x_hat = self.round(latents, torch.round, size).y_hat
        if (x_hat - stock).square().mean() > SAME * stock.square().mean():
            raise self._run.refuse("rounds one latent in several ways")
        for name, v in latents.items():
            if self._hides_gradient(latents, name):
                raise self._run.refuse(
                    f"hides the gradient to its latent {name} {[*v.shape]}",
                    "call a torch.autograd.Function that rounds as NAME.apply in the forward",
                )

    def _hides_gradient(self, latents: Latents, name: str) -> bool:
        """Whether autograd misses a part of what happens to x_hat where one latent moves."""
        size, v = self._run.size, latents[name]
        way = torch.randn(v.shape, generator=torch.Generator().manual_seed(0)).to(v)

        def walk_at(v: Tensor) -> Walk:
            return self.round(latents | {name: v}, _bends, size)

        with torch.no_grad():
            ahead, behind = (walk_at(v + step * way).y_hat for step in (STEP, -STEP))
            change = (ahead - behind) / (2 * STEP)
        with torch.enable_grad():
            v = v.detach().requires_grad_()
            walk = walk_at(v)
            bits = sum((p.log2().sum() for p in walk.group_likelihoods), walk.y_hat.new_zeros(()))
            along = (change * walk.y_hat).sum()  # its slope is the squared norm of the change
            to_bits, to_x_hat = (
                torch.autograd.grad(
                    value, v, retain_graph=True, allow_unused=True, materialize_grads=True
                )[0]
                for value in (bits, along)
            )
        slope, measured = (to_x_hat * way).sum(), change.square().sum()
        is_more_than_rounding = measured > 1e-8 * walk.y_hat.square().sum()
        hides = is_more_than_rounding and slope < 0.8 * measured
        return bool(hides) or not (to_bits.any() or to_x_hat.any())

    def _plan(self, size: tuple[int, int]) -> Plan:
        """The plan for pictures of size (H, W)."""
        size, structure = self._run.continued(size), self.structure
        key = size, next(self.network.parameters()).device
        if key not in self._plans:
            with torch.no_grad():
                self._plans[key] = plan_of(self._run, structure, size)
        return self._plans[key]

    def _decoded(self, size: tuple[int, int], on_round: OnNumberedRound) -> Outcome:
        """A forward without a picture: the encoders give zeros."""
        plan = self._plan(size)
        x = self._run.no_picture(self._run.continued(size))
        outcome = self._run(x, on_round, self.structure.encoders, zeros_of(plan.results, x))
        if len(outcome.rounded) != self.structure.roundings:
            raise self._run.varies(self.structure.roundings)
        return outcome

    # --- what a family defines

    def latent_shapes(self, size: tuple[int, int]) -> dict[str, Shape]:
        """See `Architecture`."""
        return dict(self._plan(size).shapes)

    @torch.no_grad()
    def analyze(self, x: Tensor, tile: int = 0) -> Latents:
        """See `Architecture`; there are no tiles."""
        return self.encode(x, lambda v: v)

    def encode(self, x: Tensor, g_a: Callable[[Tensor], Tensor]) -> Latents:
        """See `Architecture`; `g_a` is not needed. x [1, 3, H, W] is continued to multiples of 64.

        The latents are what the roundings of the stock forward get, plus the centres that the walk
        has for the same values.

        Raises:
            InputError: x has several images, or the forward has other roundings than before.
        """
        if len(x) != 1:
            raise InputError(f"{self.name} is refined by its own forward, one picture at a time")
        x = continued(x, self._run.stride)
        size = x.size(2), x.size(3)
        plan = self._plan(size)
        stock = self._run(x, rounds_truly)
        decoded = self._decoded(size, kept(self._run, stock))
        if len(stock.rounded) != len(decoded.rounded):
            raise self._run.varies(len(decoded.rounded))
        latents = {name: x.new_zeros(shape) for name, shape in plan.shapes.items()}
        for step, v, less in zip(plan.steps, stock.rounded, decoded.rounded, strict=True):
            if step is not None:
                for part, whole in step.fresh:
                    whole.write(latents[step.name], part.of(v - less))
        return latents

    def walk(self, size: tuple[int, int], value_of: ValueOf) -> Tensor:
        """See `Architecture`; returns x_hat [B, 3, H, W] of a size in multiples of 64."""
        plan = self._plan(size)
        likelihoods: dict[str, Tensor] = {}
        known: dict[int, Tensor] = {}  # the values of each latent so far

        def on_round(index: int, v: Tensor) -> Tensor | None:
            if index >= len(plan.steps):
                raise self._run.varies(len(plan.steps))
            step = plan.steps[index]
            if step is None:
                return None
            for part, whole in step.fresh:
                rate = ForwardRate(likelihoods, step.name, whole)
                rate.value = value_of(Group(step.name, -part.of(v), rate, whole))
                known[step.latent] = _with(known.get(step.latent), v, part, rate.value)
            symbols = known[step.latent] + v
            return symbols if step.has is None else torch.where(step.has, symbols, torch.round(v))

        outcome = self._decoded(size, on_round)
        likelihoods.update(outcome.likelihoods)
        return outcome.x_hat

    def synthesize(self, y_hat: Tensor, size: tuple[int, int], tile: int | None = None) -> Tensor:
        """The picture [B, 3, *size] in y_hat, which is one of a larger size already."""
        return at_least_float32(y_hat[:, :, : size[0], : size[1]])

    def squared_error(
        self,
        y_hat: Tensor,
        x: Tensor,
        corner: tuple[int, int] = (0, 0),
        weights: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See `Architecture`; y_hat is the picture."""
        (top, left), (height, width) = corner, x.shape[2:]
        x_hat = at_least_float32(y_hat[:, :, top : top + height, left : left + width])
        return squared_error(x_hat, x, weights), x_hat

    # --- what it replaces

    @classmethod
    def build(cls, N: int, M: int, groups: Sequence[int] | None = None) -> Self:
        """There is no training for such a class.

        Raises:
            InputError: always.
        """
        raise InputError(
            f"architecture {label_of(cls)}: is refined by its own forward; train it with your own "
            "code"
        )

    @classmethod
    def example(cls, groups: int) -> Self:
        """A model without layers: `from_weights` finds out what such a model consists of."""
        return cls(CompressionModel())

    @classmethod
    def mismatch(cls, weights: Mapping[str, Tensor]) -> str:
        """Always "": `from_weights` finds out."""
        return ""

    @classmethod
    def from_weights(cls, weights: dict[str, Tensor]) -> Self:
        """The model with these weights: by the class's `from_state_dict`, or without arguments.

        Raises:
            InputError: the class cannot be created so.
            KeyError, RuntimeError, ValueError, IndexError: the weights do not fit it.
        """
        network = _network_with(cls, weights)
        restore_constants(network)
        return cls(network)

    @property
    def N(self) -> int:  # noqa: N802
        """The network's N, or the number of channels of its first latent."""
        return self._channels("N", 0)

    @property
    def M(self) -> int:  # noqa: N802
        """The network's M, or the number of channels of its last latent."""
        return self._channels("M", -1)

    def _channels(self, name: str, latent: int) -> int:
        own = getattr(self.network, name, None)
        shapes = [*self.latent_shapes(self._run.size).values()] if own is None else []
        return int(shapes[latent][1] if own is None else own)

    @property
    def has_fused_decoder(self) -> bool:
        """Never: the squared error is not a part of the forward."""
        return False

    def check_codable(self) -> None:
        """There are no files.

        Raises:
            InputError: always.
        """
        raise InputError(
            f"{self.name} is refined by its own forward, with estimates of its rate: files need a "
            "walk, see docs/models.md"
        )


@torch.no_grad()
def strings_of(model: Forwarded, symbols: Latents, size: tuple[int, int]) -> dict[str, Any]:
    """What the network's own `compress` gives for integer latents: {"strings", "shape"}.

    Its encoders give the values of the latents, which `compress` rounds to these integers. The
    network's own `decompress` decodes the strings as a check.

    Args:
        symbols: integers, as `Architecture.symbols` returns them.
        size: H, W of the image. The strings are those of a picture in multiples of 64.

    Raises:
        InputError: the network cannot code them so, or decodes another picture.
    """
    model.prepare_tables()
    walk = model.place(symbols, size)
    sources = model.structure.sources
    if missing := [name for name in walk.values if name not in sources]:
        raise InputError(f"{model.name}: no module gives {missing[0]}, so compress cannot code it")
    given = {module: walk.values[name].contiguous() for name, (module, _) in sources.items()}
    calls = {module: frozenset((0,)) for module in given}
    with carried(model.network, calls, lambda call, stock: given[call[0]].clone()):
        coded = model.network.compress(torch.zeros_like(walk.y_hat))
    x_hat = model.network.decompress(coded["strings"], coded["shape"])["x_hat"]
    if not torch.allclose(x_hat.clamp(0, 1), walk.y_hat.clamp(0, 1), rtol=0, atol=1e-4):
        raise InputError(f"{model.name}: its own decompress gives another picture than its forward")
    return {"strings": coded["strings"], "shape": coded["shape"]}


def _bends(v: Tensor) -> Tensor:
    """A smooth rounding, whose slope is not 1."""
    return v + 0.1 * torch.sin(2 * torch.pi * v)


def _with(known: Tensor | None, v: Tensor, part: Part, values: Tensor) -> Tensor:
    """The values of a latent, shaped as v, with those of one more part."""
    if part is WHOLE:
        return values
    known = values.new_zeros((len(values), *v.shape[1:])) if known is None else known.clone()
    part.write(known, values)
    return known


def _keep_layers(network: nn.Module) -> None:
    """Let refinement keep the layers of a network as they are, in place.

    It would replace layers of exactly these classes by faster ones. But a user's forward may use
    any attribute of a layer, and a fused decoder has no gradient in a forward.
    """
    replaced = (
        GDN, nn.ConvTranspose2d, EntropyBottleneck, MaskedConv2d, CheckerboardMaskedConv2d,
        nn.Sequential,
    )  # fmt: skip
    for part in network.modules():
        if type(part) in replaced:
            part.__class__ = type(type(part).__name__, (type(part),), {})


def _network_with(family: type[Forwarded], weights: dict[str, Tensor]) -> CompressionModel:
    """The network by its class's `from_state_dict`; without one, or where that of a base class
    fails, by its constructor.
    """
    network_class = family.network_class
    try:
        if hasattr(network_class, "from_state_dict"):
            return as_network(family, network_class.from_state_dict(weights))
    except (TypeError, KeyError, RuntimeError):
        if "from_state_dict" in vars(network_class):
            raise
    try:
        inspect.signature(network_class).bind()
    except TypeError as error:
        raise InputError(
            f"architecture {label_of(family)}: its constructor needs arguments ({error}); give it "
            "defaults, or a classmethod from_state_dict(weights)"
        ) from None
    network = network_class()
    network.load_state_dict(weights)
    return network
