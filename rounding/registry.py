"""The registry of rounding methods, by their JSON names, with their hyper-parameters."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import Tensor

from common.errors import InputError
from rounding.candidates import Candidates, sample_candidates
from rounding.temperature import Temperature


@dataclass(frozen=True)
class Method:
    """One registered rounding method.

    sample: maps (v, tau, source, **hyper_parameters) to v_hat.
    score, candidates: the two functions of a draw among candidates; None for other methods.
    temperature: the method's own schedule, which replaces the config's; None if it has none.
    defaults: each hyper-parameter's default, `inspect.Parameter.empty` if it has none.
    kinds: each hyper-parameter's type, with its range if that is annotated.
    """

    sample: Callable[..., Tensor]
    score: Callable[..., Tensor] | None
    candidates: Candidates | None
    temperature: Temperature | None
    defaults: dict[str, Any]
    kinds: dict[str, Any]


METHODS: dict[tuple[str, str | None], Method] = {}


def rounding_method(
    name: str,
    *,
    logits: str | None = None,
    candidates: Candidates | None = None,
    temperature: Temperature | None = None,
) -> Callable:
    """Decorator: register a rounding, or a score over candidates, under its JSON name.

    Args:
        name: the flag in `improving_methods`.
        logits: the name in `sga_logits_params.logits`, for families of several functions.
        candidates: `floor_ceil` or `nearest_three`, if the decorated function is a score.
        temperature: the method's own schedule; by default the config's is used.

    The function's keyword-only arguments are its hyper-parameters. Their defaults are used if the
    config has no value. Their annotations define the allowed values. Without an annotation, a
    number as default allows numbers only.
    """

    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        if candidates is None:
            sample, score = function, None
        else:
            sample, score = partial(sample_candidates, candidates, function), function
        parameters = inspect.signature(function).parameters.values()
        hyper = {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}
        defaults = {key: p.default for key, p in hyper.items()}
        kinds = {key: _kind_of(p) for key, p in hyper.items()}
        METHODS[name, logits] = Method(sample, score, candidates, temperature, defaults, kinds)
        return function

    return register


def _kind_of(parameter: inspect.Parameter) -> Any:
    if parameter.annotation is not parameter.empty:
        return parameter.annotation
    return float if type(parameter.default) in (int, float) else Any


def find_method(method: str, logits: str | None = None) -> Method:
    """The registered method with these JSON names.

    Raises:
        InputError: no such method, or no such function in its family; lists the registered names.
    """
    known = sorted(function for name, function in METHODS if name == method and function)
    if known:
        if logits not in known:
            raise InputError(
                f"dev_options.sga_logits_params.logits = {logits!r}: {method} has "
                + ", ".join(known)
            )
        return METHODS[method, logits]
    if (method, None) not in METHODS:
        raise InputError(
            f"improving_methods.{method}: no such method; "
            f"there are {', '.join(sorted({name for name, _ in METHODS}))}"
        )
    return METHODS[method, None]


PYTHON_NAMES = {"3c_power": "power", "3c_factor": "factor"}
_STRICT = ConfigDict(strict=True, allow_inf_nan=False)


def bind_params(method: Method, name: str, params: dict[str, Any]) -> dict[str, Any]:
    """The method's hyper-parameters: its defaults, overridden by `params`.

    `params` may have JSON names (`3c_power`, `3c_factor`) or Python names (`power`, `factor`).

    Raises:
        InputError: the method does not have a hyper-parameter; one without a default is missing;
            or a value has the wrong type or is out of range.
    """
    by_python_name = {PYTHON_NAMES.get(key, key): value for key, value in params.items()}
    if len(by_python_name) < len(params):
        raise InputError(f"{name}: a hyper-parameter is given with and without its 3c_ prefix")
    has = ", ".join(sorted(method.defaults)) or "none"
    for key in by_python_name.keys() - method.defaults.keys():
        raise InputError(f"{name} has no hyper-parameter {key!r}; it has {has}")
    bound = {**method.defaults, **by_python_name}
    for key, value in bound.items():
        if value is inspect.Parameter.empty:
            raise InputError(
                f"{name} needs the hyper-parameter {key!r}: add it to dev_options.rounding_params"
            )
        try:
            TypeAdapter(method.kinds[key], config=_STRICT).validate_python(value)
        except ValidationError as error:
            wrong = error.errors()[0]["msg"].removeprefix("Input ")
            raise InputError(f"{name}: the hyper-parameter {key} = {value!r} {wrong}") from None
    return bound


def rounding_logits(
    v: Tensor, method: str, logits: str | None = None, **params: Any
) -> tuple[Tensor, Tensor]:
    """The candidates and their logits, both [..., K], of centred latents v [...].

    Raises:
        InputError: the method has no candidates; see also `find_method` and `bind_params`.
    """
    found = find_method(method, logits)
    if found.score is None or found.candidates is None:
        raise InputError(f"{method} rounds without candidates, so it has no logits")
    candidates, distance = found.candidates(v)  # [K, ...]
    scores = found.score(distance, **bind_params(found, method, params))
    return candidates.movedim(0, -1), scores.movedim(0, -1)
