"""A rounding method with its settings, from a config or from arguments."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor

from common.errors import InputError
from rounding.noise import ImageGenerators, Source
from rounding.registry import METHODS, PYTHON_NAMES, bind_params, find_method
from rounding.temperature import Tau, Temperature
from schemas.refine import RefineConfig


@dataclass(frozen=True)
class Rounding:
    """A method with its hyper-parameters and its temperature schedule, ready to be called.

    overridden: the method's own default of each hyper-parameter that a published key replaced.
    """

    method: str
    logits: str | None
    params: dict[str, Any]
    temperature: Temperature
    sample: Callable[..., Tensor]
    overridden: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The method's full name, e.g. `sga_logits_3c/log_ssl_a_factor_pow`."""
        return self.method if self.logits is None else f"{self.method}/{self.logits}"

    @property
    def takes_tensors(self) -> bool:
        """Whether tau may be a tensor: the method never needs the number in it."""
        v, tau = torch.empty(1, 1, 1, 1, device="meta"), torch.empty((), device="meta")
        try:
            self(v, tau)
        except Exception:  # torch and math raise several kinds for tensors without numbers
            return False
        return True

    def __call__(self, v: Tensor, tau: Tau, source: Source = None) -> Tensor:
        """The relaxed rounding of centred latents v at temperature tau in [0, 1].

        v may have any shape, but [B, C, h, w] if the source is `ImageGenerators`.
        """
        return self.sample(v, tau, source, **self.params)

    def at(self, step: float, source: Source = None) -> Callable[[Tensor], Tensor]:
        """The rounding v -> v_hat at one step of the schedule, as `Problem.relaxed` takes it."""
        return self.with_tau(self.temperature(step), source)

    def with_tau(self, tau: Tau, source: Source = None) -> Callable[[Tensor], Tensor]:
        """The rounding v -> v_hat at temperature tau."""
        return partial(self, tau=tau, source=source)


def build_rounding(
    method: str, logits: str | None = None, *, temperature: Temperature, **params: Any
) -> Rounding:
    """The rounding with these JSON names.

    Args:
        temperature: ignored by methods with a schedule of their own (sga, danneal).
        params: hyper-parameters; the method's defaults fill in the others.

    Raises:
        InputError: see `find_method` and `bind_params`.
    """
    return _with_params(method, logits, temperature, params)


def _with_params(
    method: str, logits: str | None, temperature: Temperature, params: dict[str, Any]
) -> Rounding:
    found = find_method(method, logits)
    logits = logits if (method, logits) in METHODS else None
    name = method if logits is None else f"{method}/{logits}"
    bound = bind_params(found, name, params)
    return Rounding(method, logits, bound, found.temperature or temperature, found.sample)


def rounding_from_config(config: RefineConfig) -> Rounding:
    """The one rounding that a refinement config switches on.

    Every published JSON has the published hyper-parameters (scale_factor, 3c_power, ...), so a
    method ignores those that it does not have. It must have all those of `rounding_params`.

    Raises:
        InputError: an unknown method, function or temperature schedule, a wrong hyper-parameter, or
            a method that hands its source of noise to torch.
    """
    options = config.dev_options
    for key in (*config.improving_methods, *options.improving_methods):
        if key not in {name for name, _ in METHODS}:
            find_method(key)
    params, family = options.sga_logits_params, config.method
    method = find_method(family, params.logits)
    published = {
        key: value
        for key, value in options.published_hyper_parameters.items()
        if PYTHON_NAMES.get(key, key) in method.defaults
    }
    temperature = Temperature(
        options.temp_rate,
        params.ub,
        options.temp_schedule,
        steps=config.tot_inference_iterations,
    )
    chosen = {**published, **options.rounding_params}
    rounding = _with_params(family, params.logits, temperature, chosen)
    names = {PYTHON_NAMES.get(key, key) for key in published}
    overridden = {
        name: method.defaults[name]
        for name in sorted(names)
        if method.defaults[name] not in (rounding.params[name], inspect.Parameter.empty)
    }
    _refuse_torch_generator(rounding)
    return replace(rounding, overridden=overridden)


def _refuse_torch_generator(rounding: Rounding) -> None:
    """Refuse a method that hands its source of noise to torch itself."""
    try:
        rounding(torch.zeros(1, 1, 1, 1), 0.5, ImageGenerators((Generator(),)))
    except TypeError as error:
        if ImageGenerators.__name__ not in str(error):
            raise
        raise InputError(
            f"{rounding.name}: torch cannot draw from its third argument, the source of noise; "
            "hand it to uniform_noise, normal_noise or gumbel_noise of rounding/noise.py"
        ) from None
