"""The registry of roundings: every method under its JSON names, with its hyper-parameters."""

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
    """One registered rounding.

    sample: (v, tau, generator, **hyper-parameters) to v_hat.
    score, candidates: of a draw among candidates; else None.
    temperature: the method's own, which replaces the config's.
    defaults: of its hyper-parameters; `inspect.Parameter.empty` for one without a default.
    kinds: types of its hyper-parameters, with ranges where they are annotated.
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
        candidates: `floor_ceil` or `nearest_three`; the decorated function is then a score.
        temperature: a schedule of the method's own; without it the config's holds.

    The function's keyword-only arguments are its hyper-parameters. Their defaults hold where the
    config has no value. Their annotations say which values are taken; without one, a default that
    is a number asks for a number.
    """

    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        if candidates is None:
            sample, score = function, None
        else:
            sample, score = partial(sample_candidates, candidates, function), function
        parameters = inspect.signature(function).parameters.values()
        own = {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}
        defaults = {key: p.default for key, p in own.items()}
        kinds = {key: _kind_of(p) for key, p in own.items()}
        METHODS[name, logits] = Method(sample, score, candidates, temperature, defaults, kinds)
        return function

    return register


def _kind_of(parameter: inspect.Parameter) -> Any:
    if parameter.annotation is not parameter.empty:
        return parameter.annotation
    return float if type(parameter.default) in (int, float) else Any


def find_method(method: str, logits: str | None = None) -> Method:
    """The registered method of these JSON names.

    Raises:
        InputError: no such method, or no such function in its family; names what there is.
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

    JSON names (`3c_power`, `3c_factor`) and the functions' own (`power`, `factor`) both count.

    Raises:
        InputError: a hyper-parameter the method does not have, one without a default is missing,
            or one of the wrong type or out of range.
    """
    given = {PYTHON_NAMES.get(key, key): value for key, value in params.items()}
    if len(given) < len(params):
        raise InputError(f"{name}: a hyper-parameter is given with and without its 3c_ prefix")
    has = ", ".join(sorted(method.defaults)) or "none"
    for key in given.keys() - method.defaults.keys():
        raise InputError(f"{name} has no hyper-parameter {key!r}; it has {has}")
    bound = {**method.defaults, **given}
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
    """Candidates and their logits at temperature 1, both [..., K], for centred latents v [...].

    Raises:
        InputError: the method has no candidates, or see `find_method` and `bind_params`.
    """
    found = find_method(method, logits)
    if found.score is None or found.candidates is None:
        raise InputError(f"{method} rounds without candidates, so it has no logits")
    candidates, distance = found.candidates(v)  # [K, ...]
    scores = found.score(distance, **bind_params(found, method, params))
    return candidates.movedim(0, -1), scores.movedim(0, -1)
