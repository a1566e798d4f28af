"""Finds the latents of a network that is only known by its `forward`.

Every rounding of the forward is caught (`architectures.interception`). These experiments tell what
is rounded. In all of them the roundings give values that were kept from one pass, so that only what
comes from the picture differs:

    which modules are encoders: their results change with the picture, not with the values
    which symbols are rounded again: encoders give random numbers, and what is rounded changes
    whose likelihoods are where: the values of one latent change
    whether a decoder could do the same: without the picture, x_hat and likelihoods must not change

Later passes need no picture. Encoders give zeros, so -v is the centre of the lattice of a rounding
that gets v, the lattice being the integers plus the centre.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from architectures.experiment import (
    SAME,
    Encoders,
    Experiment,
    Outcome,
    Results,
    differ,
    kept,
    rounds_truly,
    times,
    zeros_of,
)
from architectures.interception import Call
from architectures.walk import WHOLE, Part, Shape


class Structure(NamedTuple):
    """What the experiments found; it is the same for pictures of all sizes.

    roundings: how many a forward has. encoders: the calls that are left out. latent_of: which of
    the latents below each rounding rounds; None: no latent, but values that the decoder has.
    latents: the name of each, and the first of its channels in the likelihoods of that name.
    sources: the call of an encoder that gives all symbols of a name, where there is one.
    """

    roundings: int
    encoders: Encoders
    latent_of: tuple[int | None, ...]
    latents: tuple[tuple[str, int], ...]
    sources: Mapping[str, tuple[str, int]]


class Step(NamedTuple):
    """What one rounding does.

    latent: see `Structure.latent_of`. name: of the latent that has all these symbols. fresh: the
    parts that no rounding before had, each as a part of what is rounded and of the named latent.
    has: where it rounds symbols, bool [1, c, h, w]; None: everywhere.
    """

    latent: int
    name: str
    fresh: tuple[tuple[Part, Part], ...]
    has: Tensor | None


class Plan(NamedTuple):
    """What each rounding does for pictures of one size, and what encoders give.

    steps: None for a rounding of no latent. shapes: of the latents, by name. results: tensors
    without storage.
    """

    steps: tuple[Step | None, ...]
    shapes: Mapping[str, Shape]
    results: Results


def structure_of(run: Experiment) -> Structure:
    """Find the structure of a network.

    Raises:
        InputError: it cannot be refined by its forward; the message says why.
    """
    encoders, passes = _encoders_of(run)
    probe = _probe(run, encoders, run.size)
    for outcome in (probe.natural, probe.up, probe.down):
        results = outcome.x_hat, outcome.likelihoods
        if differ(results, (probe.zero.x_hat, probe.zero.likelihoods)):
            raise run.refuse("gives a decoder more than rounded latents")
    latents, latent_of = _latents_in(run, probe)
    _refuse_other_arrangements(run, latent_of, passes)
    names = _names_of(run, probe, latents, latent_of)
    sources = _sources_of(probe, latents, names)
    return Structure(len(latent_of), encoders, tuple(latent_of), names, sources)


def plan_of(run: Experiment, structure: Structure, size: tuple[int, int]) -> Plan:
    """The plan for pictures of size (H, W), multiples of the stride.

    Raises:
        InputError: the roundings are not those of `structure`.
    """
    probe = _probe(run, structure.encoders, size)
    if len(probe.zero.rounded) != structure.roundings:
        raise run.varies(structure.roundings)
    shapes = _shapes_of(structure, probe.zero)
    known: dict[int, Tensor] = {}  # where each latent has symbols so far
    steps: list[Step | None] = []
    for index, number in enumerate(structure.latent_of):
        if number is None:
            steps.append(None)
            continue
        name, channel = structure.latents[number]
        _, has = probe.changes(index)
        parts = tuple(
            (part, _shifted(part, channel, has.size(1), shapes[name][1]))
            for part in _parts_of(has & ~known[number] if number in known else has)
        )
        known[number] = has | known.get(number, has)
        steps.append(Step(number, name, parts, None if has.all() else has))
    return Plan(tuple(steps), shapes, probe.results)


def _shapes_of(structure: Structure, outcome: Outcome) -> dict[str, Shape]:
    """The shape of each latent by name, from one pass."""
    shapes: dict[str, Shape] = {}
    for number, (name, channel) in enumerate(structure.latents):
        first = outcome.rounded[structure.latent_of.index(number)]
        _, channels, height, width = first.shape
        before = shapes[name][1] if name in shapes else 0
        shapes[name] = (1, max(before, channel + channels), height, width)
    return shapes


def _parts_of(mask: Tensor) -> Iterator[Part]:
    """The parts of a latent that together are where the mask [1, C, h, w] is true."""
    if mask.all():
        yield WHOLE
        return
    rows = mask[0].flatten(1)  # [C, h w]
    is_new = [True, *(rows[1:] != rows[:-1]).any(1).tolist()]
    bounds = [channel for channel, new in enumerate(is_new) if new] + [len(rows)]
    for start, end in pairwise(bounds):
        positions = rows[start].nonzero()[:, 0]
        if len(positions):
            channels = None if end - start == len(rows) else slice(start, end)
            yield Part(channels, None if len(positions) == rows.size(1) else positions)


def _shifted(part: Part, channel: int, channels: int, all_channels: int) -> Part:
    """A part of some channels of a latent, which begin at `channel`, as a part of all of it."""
    if channels == all_channels:
        return part
    own = part.channels or slice(0, channels)
    return Part(slice(channel + own.start, channel + own.stop), part.positions)


# --- which modules are encoders -------------------------------------------------------------------


def _encoders_of(run: Experiment) -> tuple[Encoders, tuple[Outcome, Outcome]]:
    """The encoders' calls, and passes over two pictures with the same values.

    An encoder's result changes with the picture, but not with the values, and it rounds nothing.
    """
    dark, bright = run.pictures(run.size)
    first = run(dark, rounds_truly, watch=True)
    second = run(bright, kept(run, first), watch=True)
    moved = first._replace(values=tuple(v + 1 for v in first.values))
    third = run(bright, kept(run, moved), watch=True)
    if len(second.rounded) != len(first.rounded):
        raise run.varies(len(first.rounded))
    names = [[call.name for call in outcome.calls] for outcome in (first, second, third)]
    if not names[0] == names[1] == names[2]:
        raise run.refuse("does not call the same modules every time")
    found: set[Call] = set()
    numbers: dict[str, int] = {}
    encoders: dict[str, frozenset[int]] = {}
    for call, other, changed in zip(first.calls, second.calls, third.calls, strict=True):
        if not found.isdisjoint(_around(call)):
            continue
        number = numbers[call.name] = numbers.get(call.name, -1) + 1
        of_picture = differ(call.result, other.result)
        if call.roundings == 0 and of_picture and not differ(other.result, changed.result):
            found.add(call)
            encoders[call.name] = encoders.get(call.name, frozenset()) | {number}
    return encoders, (first, second)


def _around(call: Call) -> Iterator[Call]:
    while call.parent is not None:
        call = call.parent
        yield call


# --- which roundings share a latent ---------------------------------------------------------------


class _Probe(NamedTuple):
    """How what is rounded changes with what the encoders give.

    natural: a pass over a picture. zero: a pass whose encoders give zeros. up, down: with random
    numbers, and with these numbers times -1.
    """

    natural: Outcome
    zero: Outcome
    up: Outcome
    down: Outcome
    results: Results
    random: Results

    def changes(self, index: int) -> tuple[Tensor, Tensor]:
        """The changes of what a rounding gets, [2, *shape], and where there are any, [*shape].

        A change that is smaller than float rounding is none.
        """
        ends = torch.stack((self.up.rounded[index], self.down.rounded[index]))
        zero = self.zero.rounded[index]
        changes = ends - zero
        return changes, (changes.abs() > 1e-5 * (ends.abs() + zero.abs())).any(0)


def _probe(run: Experiment, encoders: Encoders, size: tuple[int, int]) -> _Probe:
    """The passes that tell what is rounded where, for one size of pictures."""
    dark, bright = run.pictures(size)
    results: dict[tuple[str, int], Any] = {}

    def record(call: tuple[str, int], stock: Callable[[], Any]) -> Any:
        result = stock()
        results[call] = tree_map_only(Tensor, lambda v: torch.empty_like(v, device="meta"), result)
        return result

    natural = run(dark, rounds_truly, encoders, record)
    generator = torch.Generator().manual_seed(1)
    random = {
        call: tree_map_only(
            Tensor, lambda v: (1 + torch.rand(v.shape, generator=generator)).to(dark), result
        )
        for call, result in results.items()
    }
    values = kept(run, natural)
    zero = run(run.no_picture(size), values, encoders, zeros_of(results, dark))
    up = run(bright, values, encoders, times(random, 1))
    down = run(dark, values, encoders, times(random, -1))
    return _Probe(natural, zero, up, down, results, random)


class _Latent:
    """The symbols of a latent that were found so far: their changes, and where they are."""

    def __init__(self, changes: Tensor, has: Tensor):
        self.changes, self.has = changes, has

    def takes(self, changes: Tensor, has: Tensor) -> bool:
        """Add what a rounding rounds, if it is this latent, or symbols beside it; returns whether.

        The same symbols change by the same numbers.
        """
        if has.shape != self.has.shape:
            return False
        both = has & self.has
        near = (changes - self.changes).abs() <= SAME * self.changes.abs()
        if not near[:, both].all():
            return False
        self.changes = torch.where(self.has, self.changes, changes)
        self.has = self.has | has
        return True


def _latents_in(run: Experiment, probe: _Probe) -> tuple[list[_Latent], list[int | None]]:
    """The latents, and which of them each rounding rounds."""
    latents: list[_Latent] = []
    latent_of: list[int | None] = []
    for index, v in enumerate(probe.zero.rounded):
        changes, has = probe.changes(index)
        if not has.any():
            latent_of.append(None)
            continue
        if v.dim() != 4:
            raise run.refuse(f"rounds a tensor {[*v.shape]}, not a latent [B, C, h, w]")
        takers = (taker for taker, latent in enumerate(latents) if latent.takes(changes, has))
        number = next(takers, len(latents))
        if number == len(latents):
            latents.append(_Latent(changes, has))
        latent_of.append(number)
    if not latents:
        raise run.refuse("rounds nothing that comes from the picture")
    return latents, latent_of


def _refuse_other_arrangements(
    run: Experiment, latent_of: Sequence[int | None], passes: tuple[Outcome, Outcome]
) -> None:
    """Refuse symbols that are rounded twice, but in tensors that are arranged differently."""
    first, second = passes
    changes: dict[int, Tensor] = {}
    for index, number in enumerate(latent_of):
        if number is not None and number not in changes:
            v = (second.rounded[index] - first.rounded[index]).flatten()
            changes[number] = v[v.abs() > SAME * v.abs().max()].sort().values
    for number, v in changes.items():
        for other, w in changes.items():
            if number != other and 1 < len(v) <= len(w) and _are_among(v, w):
                raise run.refuse("rounds the same symbols in tensors that are arranged differently")


def _are_among(v: Tensor, w: Tensor) -> bool:
    """Whether most of the numbers v are among w, which is sorted."""
    place = torch.searchsorted(w, v).clamp(1, len(w) - 1)
    nearest = torch.minimum((w[place] - v).abs(), (w[place - 1] - v).abs())
    return bool((nearest < 1e-5 * w.abs().max()).double().mean() > 0.5)


# --- whose likelihoods are where ------------------------------------------------------------------


def _names_of(
    run: Experiment, probe: _Probe, latents: Sequence[_Latent], latent_of: Sequence[int | None]
) -> tuple[tuple[str, int], ...]:
    """The name of each latent, and its first channel in the likelihoods of that name.

    Likelihoods belong to the last latent that changes them.
    """
    likelihoods = probe.zero.likelihoods
    owners = {key: torch.full((p.size(1),), -1) for key, p in likelihoods.items()}
    encoders: dict[str, frozenset[int]] = {}
    for name, number in probe.results:
        encoders[name] = encoders.get(name, frozenset()) | {number}
    nothing = torch.zeros_like(probe.natural.x_hat)
    for number, latent in enumerate(latents):
        moved = probe.natural._replace(values=tuple(
            v + latent.has.to(v) if mine == number else v
            for v, mine in zip(probe.natural.values, latent_of, strict=True)
        ))  # fmt: skip
        outcome = run(nothing, kept(run, moved), encoders, zeros_of(probe.results, nothing))
        for key, p in likelihoods.items():
            changed = ((outcome.likelihoods[key] - p).abs() > SAME * p).any(3).any(2)[0]
            owners[key][changed.cpu()] = number
    names: dict[int, tuple[str, int]] = {}
    for key, p in likelihoods.items():
        places = _places(run, key, p, owners[key].tolist(), latents)
        if names.keys() & places.keys():
            raise run.refuse(f"gives two likelihoods for one latent, {key} the second")
        names |= places
    others = (f"q{number}" for number in range(len(latents)))
    return tuple(names.get(number) or (next(others), 0) for number in range(len(latents)))


def _places(
    run: Experiment, key: str, p: Tensor, owners: list[int], latents: Sequence[_Latent]
) -> dict[int, tuple[str, int]]:
    """The first channel of each latent that has likelihoods of this name.

    Latents have consecutive channels. A channel whose likelihoods never change tells nothing.
    """
    places: dict[int, tuple[str, int]] = {}
    start = 0
    for number in dict.fromkeys(owner for owner in owners if owner >= 0):
        shape = latents[number].has.shape
        end = start + shape[1]
        if {*owners[start:end]} - {-1} != {number} or shape[2:] != p.shape[2:]:
            break
        places[number] = key, start
        start = end
    if start != p.size(1):
        raise run.refuse(f"gives likelihoods {key} {[*p.shape]} that fit no latent")
    return places


def _sources_of(
    probe: _Probe, latents: Sequence[_Latent], names: Sequence[tuple[str, int]]
) -> dict[str, tuple[str, int]]:
    """The encoders' calls whose results are the latents, by the latents' names."""
    wholes: dict[str, list[Tensor]] = {}
    for number in sorted(range(len(names)), key=names.__getitem__):
        wholes.setdefault(names[number][0], []).append(latents[number].changes[0])
    return {
        name: call
        for name, parts in wholes.items()
        for call, given in probe.random.items()
        if isinstance(given, Tensor) and not differ(given, torch.cat(parts, 1))
    }
