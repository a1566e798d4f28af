"""Passes of a network that is only known by its `forward`, with other values for its roundings."""

from collections.abc import Callable, Mapping
from math import lcm
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from architectures.faults import place_of
from architectures.interception import Call, Carry, carried, intercepted, watched
from common.device import is_out_of_memory
from common.errors import InputError

# Called with the number of a rounding and what is rounded; returns the value in its place, or None
# for that of torch.round.
OnNumberedRound = Callable[[int, Tensor], Tensor | None]
Encoders = Mapping[str, frozenset[int]]  # the calls of modules, by name, that are left out
Results = Mapping[tuple[str, int], Any]  # what calls of encoders give: tensors, or nests of them

SAME = 1e-3  # the relative difference of tensors that differ by float rounding alone
ADVICE = "write an Architecture for it, see docs/models.md"


class Outcome(NamedTuple):
    """What one pass gave: what each rounding got, the values in their place, and the results."""

    rounded: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    x_hat: Tensor
    likelihoods: dict[str, Tensor]
    calls: tuple[Call, ...] = ()


class Experiment:
    """Passes of a network over pictures, with values in the place of its roundings.

    name: the network's, for messages. stride: the sides of pictures are multiples of it, in pixels.
    """

    def __init__(self, network: nn.Module, name: str):
        self.network, self.name = network, name
        self.stride = lcm(64, int(getattr(network, "downsampling_factor", 1)))

    @property
    def size(self) -> tuple[int, int]:
        """H, W of the pictures of the first experiments."""
        return 2 * self.stride, 2 * self.stride

    def continued(self, size: tuple[int, int]) -> tuple[int, int]:
        """The next multiples of the stride."""
        height, width = size
        return height + -height % self.stride, width + -width % self.stride

    def no_picture(self, size: tuple[int, int]) -> Tensor:
        """Zeros [1, 3, H, W] as the network takes them."""
        return next(self.network.parameters()).new_zeros((1, 3, *size)).detach()

    def pictures(self, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Two pictures of soft noise [1, 3, H, W] in [0, 1], one dark and one bright."""
        generator = torch.Generator().manual_seed(0)
        soft = torch.rand((2, 3, size[0] // 16, size[1] // 16), generator=generator)
        soft = F.interpolate(soft, size, mode="bilinear")
        noise = 0.9 * soft + 0.1 * torch.rand((2, 3, *size), generator=generator)
        dark, bright = (0.4 * noise.to(self.no_picture(size))).split(1)
        return dark, bright + 0.6

    def refuse(self, reason: str, advice: str = ADVICE) -> InputError:
        """The error that says why this network cannot be refined by its forward."""
        return InputError(f"architecture {self.name}: its forward {reason}; {advice}")

    def varies(self, roundings: int) -> InputError:
        """The error for a forward that does not have this number of roundings at every call."""
        return self.refuse(f"has not always the same roundings (once it had {roundings})")

    def __call__(
        self,
        x: Tensor,
        on_round: OnNumberedRound,
        encoders: Encoders | None = None,
        carry: Carry | None = None,
        watch: bool = False,
    ) -> Outcome:
        """One pass in float32.

        Args:
            x: [1, 3, H, W], H and W multiples of the stride.
            encoders, carry: the calls of modules whose results `carry` gives.
            watch: whether to list all calls.

        Raises:
            InputError: the forward fails, or gives something else than CompressAI's networks.
        """
        rounded: list[Tensor] = []
        values: list[Tensor] = []

        def noted(v: Tensor) -> Tensor | None:
            rounded.append(v)
            value = on_round(len(rounded) - 1, v)
            values.append(v if value is None else value)
            return value

        given = carry or (lambda call, stock: stock())
        with (
            torch.autocast(x.device.type, enabled=False),
            carried(self.network, encoders or {}, given),
            watched(self.network if watch else nn.Module(), lambda: len(rounded)) as calls,
        ):
            result = self._result(x, noted)
        return Outcome(tuple(rounded), tuple(values), *self._parts_of(result), tuple(calls))

    def _result(self, x: Tensor, on_round: Callable[[Tensor], Tensor | None]) -> Any:
        try:
            with intercepted(self.network, on_round):
                return self.network(x)
        except InputError:
            raise
        except Exception as error:  # code of the user's may raise any kind
            if is_out_of_memory(error):
                raise
            reason = " ".join(str(error).split())[:160]
            why = f"{place_of(self.name, error)}{type(error).__name__}: {reason}"
            raise self.refuse(f"fails ({why})", "mend it") from None

    def _parts_of(self, result: Any) -> tuple[Tensor, dict[str, Tensor]]:
        parts = result if isinstance(result, Mapping) else {}
        x_hat, likelihoods = parts.get("x_hat"), parts.get("likelihoods")
        if not (isinstance(x_hat, Tensor) and isinstance(likelihoods, Mapping) and likelihoods):
            raise self.refuse('must return {"x_hat": ..., "likelihoods": {NAME: ...}}', "mend it")
        for key, p in likelihoods.items():
            if not isinstance(p, Tensor) or p.dim() != 4:
                raise self.refuse(f"gives likelihoods {key} that are not [B, C, h, w]")
        return x_hat, dict(likelihoods)


def kept(run: Experiment, outcome: Outcome) -> OnNumberedRound:
    """The values of another pass, which must have had as many roundings."""

    def value(index: int, v: Tensor) -> Tensor:
        if index >= len(outcome.values) or v.shape != outcome.values[index].shape:
            raise run.varies(len(outcome.values))
        return outcome.values[index]

    return value


def rounds_truly(index: int, v: Tensor) -> Tensor:
    """The value in a stock network."""
    return torch.round(v)


def zeros_of(results: Results, like: Tensor) -> Carry:
    """Encoders that give zeros, shaped as these results, on like's device."""
    return lambda call, stock: tree_map_only(
        Tensor, lambda v: torch.zeros(v.shape, dtype=v.dtype, device=like.device), results[call]
    )


def times(results: Results, factor: float) -> Carry:
    """Encoders that give these results times a factor."""
    return lambda call, stock: tree_map_only(Tensor, lambda v: factor * v, results[call])


def differ(a: Any, b: Any) -> bool:
    """Whether tensors, or structures of them, differ by more than float rounding."""
    pairs = zip(tree_leaves(a), tree_leaves(b), strict=True)
    return any(
        v.shape != w.shape or bool((v - w).abs().max() > SAME * v.abs().max())
        for v, w in pairs
        if isinstance(v, Tensor) and v.is_floating_point() and v.numel()
    )
