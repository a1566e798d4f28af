"""Tries a class of the user's once, so that its faults are found before any work is done.

The model of a small picture is encoded, walked and decoded as refinement and files will do it. A
class that breaks a rule of `Architecture`, or whose code fails, is refused with one line.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from architectures.base import SMALL_SIZE, Architecture, label_of, restore_constants
from architectures.faults import Fault, users_code
from architectures.forwarded import Forwarded
from architectures.walk import Group, Latents, Part, Shape, ValueOf, placed, rounded
from common.errors import InputError
from fast.tiles import STRIDE

EXACT = "; exact_parts must name all parts that predict scales and means, or work on what they give"


class WrongNamesError(InputError):
    """The weights have other names than the class asks for: they may be of another family."""


def build_own(
    family: type[Architecture], N: int, M: int, groups: Sequence[int] | None
) -> Architecture:
    """An untrained model of a class of the user's, which was tried and can be loaded again.

    Raises:
        InputError: the class has a fault, or cannot have these channels.
    """
    label, channels = label_of(family), f"; with the channels N = {N}, M = {M}"
    with users_code(label, channels):
        model = _as_model(family.build(N, M, groups), "build")
    tried(model, channels)
    with torch.random.fork_rng(devices=[]), users_code(label):
        if not isinstance(model.network.aux_loss(), Tensor):
            raise Fault("its network has no EntropyBottleneck, whose quantiles training would move")
    after = "; the class cannot load what it was trained to, see from_state_dict"
    with torch.random.fork_rng(devices=[]), users_code(label, after):
        _check_loads(model)
    return model


def load_own(family: type[Architecture], weights: dict[str, Tensor], source: str) -> Architecture:
    """The model of a class of the user's with these weights, not tried yet.

    Args:
        source: where the weights come from, for messages.

    Raises:
        WrongNamesError: the weights lack a name, or have one too many.
        InputError: the class has a fault.
    """
    try:
        with (
            torch.random.fork_rng(devices=[]),
            users_code(label_of(family), f"; while it loads {source}"),
        ):
            model = _as_model(family.from_weights(weights), "from_weights")
            restore_constants(model.network)
    except InputError as line:
        if "key(s) in state_dict" in str(line.__cause__):
            raise WrongNamesError(str(line)) from None
        raise
    return model


def tried(model: Architecture, after: str = "") -> Architecture:
    """The model itself, after a trial if its class is the user's.

    Args:
        after: more words for the end of a message.

    Raises:
        InputError: the class has a fault.
    """
    label = model.given_as
    if label:
        with _left_as_it_was(model.network), users_code(label, after):
            _try(model)
    return model


def _as_model(model: Any, method: str) -> Architecture:
    """What a class method returned, if it is a model around a network."""
    if not isinstance(model, Architecture):
        raise Fault(f"{method} must return a model of the class; it returns {_kind(model)}")
    if not isinstance(model.network, nn.Module):
        raise Fault(f"its network must be a CompressionModel; it is {_kind(model.network)}")
    missing = [name for name in ("update", "aux_loss") if not hasattr(model.network, name)]
    if missing:
        raise Fault(
            f"its network has no {' and no '.join(missing)}: derive {_kind(model.network)} from "
            "compressai.models.CompressionModel"
        )
    return model


def _check_loads(model: Architecture) -> None:
    """Load the state that a checkpoint would hold."""
    state = {name: v.cpu() for name, v in model.state().items()}
    loaded = _as_model(type(model).from_weights(dict(state)), "from_weights")
    after = loaded.state()
    if changed := [name for name, v in state.items() if not _is_equal(after.get(name), v)]:
        raise Fault(f"from_state_dict does not restore {changed[0]}")


def _is_equal(v: Tensor | None, w: Tensor) -> bool:
    return v is not None and v.shape == w.shape and torch.equal(v, w)


@contextmanager
def _left_as_it_was(network: nn.Module) -> Iterator[None]:
    """In eval mode and without gradients; later the modes and the random numbers are as before."""
    modes = {part: part.training for part in network.modules()}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        network.eval()
        try:
            yield
        finally:
            for part, training in modes.items():
                part.training = training


# --- the rules ------------------------------------------------------------------------------------


def _try(model: Architecture) -> None:
    """Use a model as refinement and files will.

    Raises:
        Fault: it breaks a rule.
        InputError: it is refined by its forward, and cannot be.
    """
    if isinstance(model, Forwarded):
        _ = model.structure
        _check_channels(model)
        return
    _check_channels(model)
    _check_attributes(model)
    shapes = model.latent_shapes(SMALL_SIZE)
    _check_shapes(shapes)
    x = torch.rand(1, 3, *SMALL_SIZE, device=model.device)
    latents = model.analyze(x)
    _check_latents(latents, shapes)
    _check_walk(model, rounded(latents, torch.round), shapes)
    symbols = model.symbols(latents, SMALL_SIZE)
    exact = model.in_float64()
    with users_code(model.given_as, EXACT):
        _check_walk(exact, placed(symbols), shapes)


def _check_channels(model: Architecture) -> None:
    for name in ("N", "M"):
        try:
            channels = getattr(model, name)
        except AttributeError as error:
            raise Fault(f"has no {name} ({error}): set it in the network's constructor") from error
        if not isinstance(channels, int):
            raise Fault(f"{name} must be an int; it is {_kind(channels)}")


def _check_attributes(model: Architecture) -> None:
    if not isinstance(model.name, str):
        raise Fault(f"name must be a text; it is {_kind(model.name)}")
    halo, exact = model.halo, model.exact_parts
    if halo is not None and not (type(halo) is int and halo >= 0):
        raise Fault(f"halo must be None or a whole number from 0; it is {halo!r}")
    is_collection = isinstance(exact, tuple | list | set | frozenset)
    if not is_collection or not all(isinstance(name, str) for name in exact):
        raise Fault(f'exact_parts must be a tuple of names, as ("h_s",); it is {exact!r}')
    owner = next(kind for kind in type(model).__mro__ if "exact_parts" in vars(kind))
    inherited = owner.__module__.startswith("architectures.")
    if inherited and owner is not Architecture:  # a network may lack some of them
        return
    known = {name.rpartition(".")[2] for name, _ in model.network.named_modules()}
    if unknown := [name for name in exact if name not in known]:
        default = ", which it does unless the class sets it: () for none" if inherited else ""
        raise Fault(f"exact_parts names {unknown[0]}{default}, but the network has no such part")


def _check_shapes(shapes: Mapping[str, Shape]) -> None:
    if not isinstance(shapes, dict) or not shapes:
        raise Fault(f"latent_shapes must return a dict of shapes; it returns {_kind(shapes)}")
    for name, shape in shapes.items():
        whole = isinstance(shape, tuple) and all(isinstance(side, int) for side in shape)
        if not whole or len(shape) != 4 or shape[0] != 1:
            raise Fault(f"latent_shapes must have a tuple (1, C, h, w) for {name}, not {shape!r}")


def _check_latents(latents: Latents, shapes: Mapping[str, Shape]) -> None:
    if not isinstance(latents, dict):
        raise Fault(f"encode must return a dict of latents; it returns {_kind(latents)}")
    for name, v in latents.items():
        if not isinstance(v, Tensor):
            raise Fault(f"encode must give a Tensor for {name}, not {_kind(v)}")
    given = {name: tuple(v.shape) for name, v in latents.items()}
    for name in {**given, **shapes}:
        if given.get(name) != shapes.get(name):
            height, width = SMALL_SIZE
            raise Fault(
                f"encode gives {_described(given, name)}, but latent_shapes has "
                f"{_described(shapes, name)} for a picture of {height} x {width} pixels "
                f"(continued to multiples of {STRIDE}; with a halo y must be a {STRIDE}th of it)"
            )


def _described(shapes: Mapping[str, Sequence[int]], name: str) -> str:
    return f"{name} {[*shapes[name]]}" if name in shapes else f"no {name}"


def _check_walk(model: Architecture, value_of: ValueOf, shapes: Mapping[str, Shape]) -> None:
    """Walk, check each group, and check that each symbol is in one group, and the picture."""
    covered = {name: torch.zeros(shape, dtype=torch.bool) for name, shape in shapes.items()}

    def checked(group: Group) -> Tensor:
        _check_group(group, shapes)
        value = value_of(group)
        _check_value(group, value, group.part.shape_in(shapes[group.name]))
        _check_distribution(model, group, value)
        _cover(covered[group.name], group)
        return value

    y_hat = model.walk(SMALL_SIZE, checked)
    for name, has in covered.items():
        if not has.all():
            missing = int((~has).sum())
            raise Fault(f"walk does not ask for {missing} of {has.numel()} symbols of {name}")
    if not isinstance(y_hat, Tensor):
        raise Fault(f"walk must return y_hat, a Tensor; it returns {_kind(y_hat)}")
    if not y_hat.isfinite().all():
        raise Fault("walk returns a y_hat with NaN or infinite values")
    x_hat = model.synthesize(y_hat.float(), SMALL_SIZE)
    if tuple(x_hat.shape) != (1, 3, *SMALL_SIZE):
        raise Fault(
            f"g_s makes a picture {[*x_hat.shape]}, not {[1, 3, *SMALL_SIZE]}, of the y_hat "
            f"{[*y_hat.shape]} that walk returns"
        )


def _check_group(group: Group, shapes: Mapping[str, Shape]) -> None:
    if not isinstance(group, Group):
        raise Fault(f"value_of must get a Group; it gets {_kind(group)}")
    if group.name not in shapes:
        raise Fault(f"walk asks for {group.name}, but encode gives {', '.join(shapes)}")
    if not isinstance(group.part, Part):
        raise Fault(f"the part of {group.name} must be a Part, not {_kind(group.part)}")
    if not isinstance(group.centre, Tensor):
        raise Fault(f"the centre of {group.name} must be a Tensor, not {_kind(group.centre)}")
    if not (isinstance(group.step, int | float) and 0 < group.step < math.inf):
        raise Fault(f"the step of {group.name} must be a number above 0, not {group.step!r}")
    shape = group.part.shape_in(shapes[group.name])
    try:
        fits = torch.broadcast_shapes(group.centre.shape, shape) == shape
    except RuntimeError:
        fits = False
    if not fits:
        centre = [*group.centre.shape]
        raise Fault(f"the centre {centre} of {group.name} does not fit its symbols {[*shape]}")


def _check_value(group: Group, value: Tensor, shape: Shape) -> None:
    if tuple(value.shape) != shape:
        raise Fault(f"the symbols of {group.name} are {[*value.shape]}, not {[*shape]}")
    if not value.isfinite().all():
        raise Fault(f"the centre or the latent {group.name} has NaN or infinite values")


def _check_distribution(model: Architecture, group: Group, value: Tensor) -> None:
    distribution = group.distribution
    for method in ("likelihood", "fixed_at"):
        if not callable(getattr(distribution, method, None)):
            raise Fault(f"the distribution {_kind(distribution)} of {group.name} has no {method}")
    rates = [distribution, distribution.fixed_at(value)] if model.polishes else [distribution]
    for rate in rates:
        p = rate.likelihood(value)
        if not isinstance(p, Tensor) or p.shape != value.shape:
            found = [*p.shape] if isinstance(p, Tensor) else _kind(p)
            raise Fault(f"the likelihood of {group.name} must be {[*value.shape]}, not {found}")


def _cover(covered: Tensor, group: Group) -> None:
    here = group.part.of(covered)
    if here.any():
        raise Fault(f"walk asks for symbols of {group.name} twice")
    group.part.write(covered, torch.ones_like(here))


def _kind(value: Any) -> str:
    return "None" if value is None else type(value).__name__
