"""Catches every rounding in the forward of a network, and puts another value in its place.

What counts as a rounding: torch.round and the methods `round` and `round_`, wherever they are
called, so also in CompressAI's `quantize_ste` and `EntropyModel.quantize`. A call of
`EntropyModel.quantize` counts with every mode: the noise of "noise", and the integers of "symbols",
are replaced too.

The value that is put in place has a gradient, and the usual ways of a straight-through estimator
would add another one or cut it. So these three have no effect on what comes from a rounding:
`detach` of its argument, its result or sums of that; `torch.no_grad` around such sums; and a
`torch.autograd.Function` whose result is the rounded value. It must be called as NAME.apply in the
forward: another name that was bound to this method before cannot be caught. Everything else keeps
its gradient.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from architectures.distributions import FactorizedPrior
from common.compressai import EntropyBottleneck, EntropyModel

OnRound = Callable[[Tensor], Tensor | None]
Forward = Callable[..., Any]
# Called with a module's name and the number of its call, and the call itself; returns its result.
Carry = Callable[[tuple[str, int], Callable[[], Any]], Any]

_ROUND = frozenset(("round", "special_round"))
# Each has the forms add, add_, __add__, __radd__ and __iadd__.
_SUMS = frozenset(
    form.format(name)
    for name in ("add", "sub", "mul", "div", "truediv", "neg")
    for form in ("{}", "{}_", "__{}__", "__r{}__", "__i{}__")
) | {"rsub"}


_DIFFERENCES = frozenset(("sub", "__sub__"))


@dataclass
class _Gate:
    is_closed: bool


class _GatedIdentity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor, gate: _Gate) -> Tensor:
        ctx.gate = gate
        return v.view_as(v)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        return None if ctx.gate.is_closed else grad, None


class _Roundings(TorchFunctionMode):
    """Calls `on_round` with what each rounding gets, and gives its result to the network."""

    def __init__(self, on_round: OnRound):
        super().__init__()
        self._on_round = on_round
        self._has_gradients = torch.is_grad_enabled()
        # By id; as long as a tensor is kept, no other one has its id.
        self._rounded: dict[int, Tensor] = {}
        self._results: dict[int, Tensor] = {}
        self._origins: dict[int, tuple[Tensor, Tensor]] = {}  # a detached tensor, and what it was
        self._gates: dict[int, _Gate] = {}
        self._within: list[Tensor] | None = None  # the values made within a Function
        self._is_away = False  # in `on_round`, whose Functions are not the network's

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """See torch: this is called in place of every function of tensors."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        v = args[0] if args else None
        if isinstance(v, Tensor) and v.is_floating_point():
            in_place = name == "round_"
            if in_place or (name in _ROUND and not kwargs.get("decimals")):
                value = self._value_of(v.clone() if in_place else v)
                if value is not None:
                    return self._written(v, value) if in_place else value
            if name == "detach":
                return self._detached(v)
            if name in _DIFFERENCES and len(args) == 2 and self._is_detached(args[1], v):
                return self._unless_rounded(func(*args, **kwargs), v)
        is_sum = name in _SUMS and any(id(argument) in self._results for argument in args)
        if is_sum:
            args = tuple(map(self._origin_of, args))
        with self._gradients(is_sum):
            result = func(*args, **kwargs)
        return self._note(self._results, result) if is_sum else result

    def _detached(self, v: Tensor) -> Tensor:
        """v itself if it was rounded, or comes from a rounding; else v without a gradient."""
        if id(v) in self._rounded or id(v) in self._results:
            return v
        without = v.detach()
        if v.requires_grad and not v.is_leaf:
            self._origins[id(without)] = without, v
        return without

    def _is_detached(self, argument: Any, v: Any) -> bool:
        return id(argument) in self._origins and self._origins[id(argument)][1] is v

    def _unless_rounded(self, difference: Tensor, v: Tensor) -> Tensor:
        """v - v.detach(), whose gradient to v ends where v is rounded, now or later."""
        gate = self._gates.setdefault(id(v), _Gate(id(v) in self._rounded))
        return _GatedIdentity.apply(difference, gate)

    def _origin_of(self, argument: Any) -> Any:
        """What a tensor was before `detach`, if that has been rounded."""
        _, origin = self._origins.get(id(argument), (None, argument))
        return origin if id(origin) in self._rounded else argument

    def _value_of(self, v: Tensor) -> Tensor | None:
        _, v = self._origins.get(id(v), (v, v))
        self._is_away = True
        with self._gradients(True):
            value = self._on_round(v)
        self._is_away = False
        if value is None:
            return None
        self._note(self._rounded, v)
        self._note(self._results, value)
        if id(v) in self._gates:
            self._gates[id(v)].is_closed = True
        if self._within is None:
            return value
        self._within.append(value)
        return value.detach()  # the Function gives its own gradient to what it returns

    def _written(self, v: Tensor, value: Tensor) -> Tensor:
        with self._gradients(True):
            return self._note(self._results, v.copy_(value))

    def _note(self, kept: dict[int, Tensor], v: Tensor) -> Tensor:
        kept[id(v)] = v
        return v

    def _gradients(self, wanted: bool) -> torch.set_grad_enabled:
        on = torch.is_grad_enabled() or (wanted and self._has_gradients)
        return torch.set_grad_enabled(on)

    def of_function(self, apply: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The result of a `torch.autograd.Function`, or the value in its place if it rounds."""
        if self._is_away:
            return apply(*args, **kwargs)
        outer, self._within = self._within, []
        try:
            result = apply(*args, **kwargs)
            values = self._within
        finally:
            self._within = outer
        if len(values) == 1 and isinstance(result, Tensor) and torch.equal(result, values[0]):
            return values[0]
        return result


def _quantize(model: Any, v: Tensor, mode: str, means: Tensor | None = None) -> Tensor:
    """`EntropyModel.quantize` by torch.round alone, whatever the mode, with results in floats."""
    if mode not in ("noise", "dequantize", "symbols"):
        raise ValueError(f'Invalid quantization mode: "{mode}"')
    rounded = torch.round(v if means is None else v - means)
    return rounded if means is None or mode == "symbols" else rounded + means


def _bottleneck_forward(part: EntropyBottleneck) -> Forward:
    """The forward of an `EntropyBottleneck`, with likelihoods that do not underflow."""
    prior, stock = FactorizedPrior(part), part.forward

    def forward(x: Tensor, training: bool | None = None) -> tuple[Tensor, Tensor]:
        if x.dim() != 4:
            return stock(x, training)
        x_hat = torch.round(x - prior.medians) + prior.medians
        return x_hat, prior.likelihood(x_hat)

    return forward


@contextmanager
def intercepted(network: nn.Module, on_round: OnRound) -> Iterator[None]:
    """Within this block each rounding gives the value of `on_round`; also after an exception.

    Args:
        on_round: gets what is rounded, of any shape, and returns the value in its place; None:
            this rounding is left as it is.
    """
    mode, function = _Roundings(on_round), torch.autograd.Function
    quantize, apply = EntropyModel.quantize, vars(function)["apply"]
    bottlenecks = {
        part: _bottleneck_forward(part) for part in network.modules()
        if getattr(type(part), "forward", None) is EntropyBottleneck.forward
    }  # fmt: skip

    def applied(cls: type, *args: Any, **kwargs: Any) -> Any:
        return mode.of_function(apply.__get__(None, cls), *args, **kwargs)

    try:
        EntropyModel.quantize, function.apply = _quantize, classmethod(applied)
        with with_forwards(bottlenecks), mode:
            yield
    finally:
        EntropyModel.quantize, function.apply = quantize, apply


@contextmanager
def with_forwards(forwards: Mapping[nn.Module, Forward]) -> Iterator[None]:
    """Within this block modules have other forwards."""
    own = {module: vars(module)["forward"] for module in forwards if "forward" in vars(module)}
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module in forwards:
            del module.forward
            if module in own:
                module.forward = own[module]


@contextmanager
def carried(
    network: nn.Module, calls: Mapping[str, frozenset[int]], carry: Carry
) -> Iterator[None]:
    """Within this block `carry` gives the results of some calls of some modules.

    Args:
        calls: the numbers of the calls, from 0, of each module by name.
    """

    def forward_of(name: str, wanted: frozenset[int]) -> tuple[nn.Module, Forward]:
        module, numbers = network.get_submodule(name), count()
        stock = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            number = next(numbers)
            if number not in wanted:
                return stock(*args, **kwargs)
            return carry((name, number), lambda: stock(*args, **kwargs))

        return module, forward

    with with_forwards(dict(forward_of(*item) for item in calls.items())):
        yield


class Call:
    """One call of a module: the call around it, its result, and the number of roundings within."""

    def __init__(self, name: str, parent: "Call | None", roundings: int):
        self.name, self.parent = name, parent
        self.roundings = -roundings  # of the network before the call, until it ends
        self.result: Any = None


@contextmanager
def watched(network: nn.Module, roundings: Callable[[], int]) -> Iterator[list[Call]]:
    """Within this block the calls of all modules of a network are listed, in order of their begin.

    Args:
        roundings: returns how many roundings there were so far.
    """
    calls: list[Call] = []
    open_calls: list[Call] = []

    def begin(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            call = Call(name, open_calls[-1] if open_calls else None, roundings())
            calls.append(call)
            open_calls.append(call)

        return hook

    def end(module: nn.Module, args: Any, result: Any) -> None:
        call = open_calls.pop()
        call.roundings += roundings()
        call.result = result

    with ExitStack() as handles:
        for name, module in network.named_modules():
            if name:
                handles.callback(module.register_forward_pre_hook(begin(name)).remove)
                handles.callback(module.register_forward_hook(end).remove)
        yield calls
