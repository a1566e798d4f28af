"""Rounding functions, temperature schedules and their pace, for refining latents by descent.

Every method is a few lines under `rounding_method`, the one registry. Two kinds can be registered:

* a rounding: `f(v, tau, generator, **hyper_parameters) -> v_hat`, same shape as v;
* a score over candidates (`candidates=floor_ceil` or `nearest_three`):
  `f(u, **hyper_parameters) -> logits`, u >= 0 being the distance of v to each candidate. It becomes
  a rounding by drawing from a Gumbel-softmax over the candidates (SGA, SGA+).

v is a latent centred on its lattice (y minus its means, z minus its medians), so that hard
rounding is always `torch.round(v)`. tau in [0, 1] is the temperature, 0 at the end of annealing.

Sources: Yang, Bamler, Mandt 2020 (arXiv 2006.04240): `sga`, `ste`, `unoise`, `danneal`.
Perugachi-Diaz, Gansekoele, Bhulai 2024 (arXiv 2401.17789): SGA+, all `sga_logits*` functions.
Agustsson, Theis 2020 (arXiv 2006.09952) and C3 (arXiv 2312.02753): `soft_round_*`.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from torch import Generator, Tensor
from torch.autograd.function import once_differentiable

from config import InputError, Positive, RefineConfig

# Below this the Gumbel noise is lost in float32 and a draw is hard rounding already.
TAU_MIN = 1e-8
LEAST = 1e-3  # of what softness and noise may fall to, for neither may be 0
EXP_MAX = 80  # exp of 89 overflows in float32; a probability of exp(-80) is none


@dataclass(frozen=True)
class Temperature:
    """tau(t), the annealing schedule, in [lb, ub].

    Published (arXiv 2401.17789): `exp`, clip(exp(-rate t), lb, ub); `exp0`,
    ub * exp(-rate (t - 700)) with the same clip, which holds ub for the first 700 steps.
    Ours, which go by the part of the run that is over, however long it is: `exp_of_run`,
    clip(exp(-rate t / steps), lb, ub); `linear`, ub * (1 - t / steps).
    """

    rate: float
    ub: float
    schedule: str = "exp"
    lb: float = 0.0
    steps: int = 1

    def __call__(self, step: float) -> float:
        """The temperature of optimisation step `step` (0 is the first)."""
        tau = {
            "exp": lambda: math.exp(-self.rate * step),
            "exp0": lambda: self.ub * math.exp(-self.rate * max(step - 700, 0)),
            "exp_of_run": lambda: math.exp(-self.rate * step / self.steps),
            "linear": lambda: self.ub * (1 - step / self.steps),
        }[self.schedule]()
        return min(max(tau, self.lb), self.ub)


# arXiv 2006.04240: the schedule of SGA and deterministic annealing.
BASELINE_TEMPERATURE = Temperature(rate=4e-3, ub=0.2, lb=TAU_MIN)


@dataclass(frozen=True)
class Method:
    """One registered rounding: what `rounding_method` was told about it."""

    sample: Callable[..., Tensor]
    score: Callable[..., Tensor] | None
    candidates: Callable[[Tensor], tuple[Tensor, Tensor]] | None
    temperature: Temperature | None
    defaults: dict[str, Any]
    kinds: dict[str, Any]  # of its hyper-parameters: types, with ranges where they are annotated so


METHODS: dict[tuple[str, str | None], Method] = {}


def rounding_method(
    name: str,
    *,
    logits: str | None = None,
    candidates: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None,
    temperature: Temperature | None = None,
) -> Callable:
    """Decorator: register a rounding, or a score over candidates, under its JSON name.

    Args:
        name: the flag in `improving_methods`.
        logits: the name in `sga_logits_params.logits`, for families of several functions.
        candidates: `floor_ceil` or `nearest_three`; the decorated function is then a score.
        temperature: a schedule of the method's own; without it the JSON's holds.

    The function's keyword-only arguments are its hyper-parameters, their defaults the defaults,
    and their annotations say which values are taken; without one a number stays a number.
    """

    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        if candidates is None:
            sample, score = function, None
        else:
            sample, score = partial(_sample_candidates, candidates, function), function
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


# --- the mechanism shared by two and three classes ------------------------------------------------


def floor_ceil(v: Tensor) -> tuple[Tensor, Tensor]:
    """Two candidates and the distances to them, in [0, 1 - 1e-5]; both [2, ...] for v [...]."""
    candidates = torch.stack((v.floor(), v.ceil())).detach()  # [2, ...]
    return candidates, (v - candidates).abs().clamp(max=1 - 1e-5)


def nearest_three(v: Tensor) -> tuple[Tensor, Tensor]:
    """Three candidates round(v) + {-1, 0, 1} and the distances, in [0, 1.5]; both [3, ...]."""
    nearest = v.round().detach()
    candidates = torch.stack((nearest - 1, nearest, nearest + 1))  # [3, ...]
    return candidates, (v - candidates).abs()


def gumbel_softmax(logits: Tensor, tau: float, generator: Generator | None) -> Tensor:
    """Weights over the first axis: softmax((logits / tau + Gumbel noise) / tau), [K, ...].

    tau scales the logits and relaxes the sample (arXiv 2006.04240). For K = 2 one logistic draw,
    the difference of two Gumbel draws, and one sigmoid are the same.
    """
    tau = max(tau, TAU_MIN)
    if len(logits) == 2:
        noise = torch.logit(_open_uniform(logits[0], generator))
        second = torch.sigmoid(torch.add(noise / tau, logits[1] - logits[0], alpha=tau**-2))
        return torch.stack((1 - second, second))
    exponential = _open_uniform(logits, generator).log_().neg_()
    return torch.softmax(torch.sub(logits * tau**-2, exponential.log_(), alpha=1 / tau), dim=0)


def gumbel_noise(like: Tensor, generator: Generator | None) -> Tensor:
    """Independent draws of the standard Gumbel distribution, shaped as `like`."""
    return _open_uniform(like, generator).log_().neg_().log_().neg_()


def _open_uniform(like: Tensor, generator: Generator | None) -> Tensor:
    # Neither 0 nor 1. torch's own exponential draws take six times as long.
    epsilon = torch.finfo(like.dtype).eps
    return torch.empty_like(like).uniform_(epsilon / 4, 1 - epsilon / 2, generator=generator)


def _sample_candidates(
    candidates: Callable, score: Callable, v: Tensor, tau: float, generator, **params
) -> Tensor:
    return _CandidateSample.apply(v, candidates, partial(score, **params), tau, generator)


class _CandidateSample(torch.autograd.Function):
    """The sum of candidates weighted by `gumbel_softmax`, and its derivative, in one go.

    Elements do not see each other, so one derivative each is all that the backward pass needs, and
    on a CPU a large picture's latents can be worked on a few at a time.
    """

    ELEMENTS = 2**17

    @staticmethod
    def forward(ctx, v: Tensor, candidates_of, score, tau: float, generator) -> Tensor:
        flat = _in_memory_order(v)
        v_hat, derivative = torch.empty_like(flat), torch.empty_like(flat)
        count = _CandidateSample.ELEMENTS if v.device.type == "cpu" else max(len(flat), 1)
        ways = (part.split(count) for part in (flat, v_hat, derivative))
        for v_part, v_hat_part, derivative_part in zip(*ways, strict=True):
            with torch.set_grad_enabled(ctx.needs_input_grad[0]):
                v_part = v_part.detach().requires_grad_(ctx.needs_input_grad[0])
                candidates, distance = candidates_of(v_part)
                logits = score(distance)
            weights = gumbel_softmax(logits.detach(), tau, generator)  # [K, n]
            torch.sum(candidates * weights, dim=0, out=v_hat_part)
            if not ctx.needs_input_grad[0]:
                continue
            # The derivative to each logit, which tau divides twice.
            to_logits = (candidates - v_hat_part).mul_(weights)
            (to_v,) = torch.autograd.grad(logits, v_part, to_logits)
            torch.mul(to_v, max(tau, TAU_MIN) ** -2, out=derivative_part)
        ctx.save_for_backward(derivative)
        return _in_memory_order(v, back=v_hat)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (derivative,) = ctx.saved_tensors
        return grad * _in_memory_order(grad, back=derivative), None, None, None, None


def _in_memory_order(v: Tensor, back: Tensor | None = None) -> Tensor:
    """v, or `back` shaped as v: channels-last [B, C, H, W] to and from a flat view; others too."""
    if v.dim() != 4:
        return v.reshape(-1) if back is None else back.view(v.shape)
    v = v.permute(0, 2, 3, 1)  # [B, H, W, C]
    return v.reshape(-1) if back is None else back.view(v.shape).permute(0, 3, 1, 2)


def hard_round(v: Tensor) -> Tensor:
    """The true rounding of centred latents, what an entropy coder codes; any shape."""
    return v.round()


# --- baselines (arXiv 2006.04240) -----------------------------------------------------------------


@rounding_method("ste")
def ste(v: Tensor, tau: float, generator: Generator | None) -> Tensor:
    """Straight-through: rounds forward, identity gradient."""
    return v + (v.round() - v).detach()


@rounding_method("unoise")
def unoise(v: Tensor, tau: float, generator: Generator | None) -> Tensor:
    """Uniform noise on (-1/2, 1/2)."""
    return v + _uniform(v, generator) / 2


@rounding_method("danneal", temperature=BASELINE_TEMPERATURE)
def danneal(v: Tensor, tau: float, generator: Generator | None) -> Tensor:
    """Deterministic annealing: the weights of SGA without its noise."""
    candidates, distance = floor_ceil(v)
    weights = torch.softmax(atanh(distance) / max(tau, TAU_MIN), dim=0)  # [2, ...]
    return (candidates * weights).sum(dim=0)


# --- annealed noise and straight-through, of the code of arXiv 2401.17789; w = 1 - tau rises to 1 -


@rounding_method("temp_ste")
def temp_ste(v: Tensor, tau: float, generator: Generator | None) -> Tensor:
    """w STE(v / w): a lattice that grows to the integers."""
    w = max(1 - tau, 1e-4)
    return w * ste(v / w, tau, generator)


@rounding_method("temp_unoise")
def temp_unoise(v: Tensor, tau: float, generator: Generator | None) -> Tensor:
    """Uniform noise that grows to (-1/2, 1/2)."""
    return v + (1 - tau) * _uniform(v, generator) / 2


@rounding_method("temp_uste")
def temp_uste(v: Tensor, tau: float, generator: Generator | None) -> Tensor:
    """w STE((v + (1 - w) U / 2) / w): noise that gives way to a growing lattice."""
    w = max(1 - tau, 1e-8)
    return w * ste((v + (1 - w) * _uniform(v, generator) / 2) / w, tau, generator)


@rounding_method("gnoise")
def gnoise(
    v: Tensor, tau: float, generator: Generator | None, *, gnoise_sigma: Positive = 0.25
) -> Tensor:
    """Gaussian noise of a fixed standard deviation."""
    return v + gnoise_sigma * _normal(v, generator)


@rounding_method("temp_gnoise")
def temp_gnoise(v: Tensor, tau: float, generator: Generator | None) -> Tensor:
    """Gaussian noise that grows to a standard deviation of 1/4."""
    return v + 0.25 * (1 - tau) * _normal(v, generator)


def _uniform(v: Tensor, generator: Generator | None) -> Tensor:
    return torch.empty_like(v).uniform_(-1, 1, generator=generator)


def _normal(v: Tensor, generator: Generator | None) -> Tensor:
    return torch.empty_like(v).normal_(generator=generator)


# --- soft rounding with annealed noise; made for a tau that falls linearly from 1 to 0 ------------


Softness = Annotated[float, Field(gt=0, le=1000)]
Deviation = Annotated[float, Field(ge=0, le=1)]
Narrowness = Annotated[float, Field(ge=1, le=10)]


def soft_round(v: Tensor, softness: float) -> Tensor:
    """v for a large `softness`, round(v) for a small one, and smooth between (arXiv 2006.09952).

    floor(v) + 1/2 + tanh((v - floor(v) - 1/2) / T) / (2 tanh(1 / (2 T))) for T = softness > 0.
    """
    middle = v.detach().floor() + 0.5
    return middle + torch.tanh((v - middle) / softness) / (2 * math.tanh(0.5 / softness))


def _between(start: float, end: float, tau: float) -> float:
    return max(end + tau * (start - end), LEAST)


@rounding_method("soft_round_unoise")
def soft_round_unoise(
    v: Tensor, tau: float, generator: Generator | None, *, t_start: Softness = 0.35,
    t_end: Softness = 0.05, sigma_start: Deviation = 0.22, sigma_end: Deviation = 0.1,
) -> Tensor:  # fmt: skip
    """Uniform noise of standard deviation sigma between two soft roundings, all annealed.

    The mechanism is C3's (arXiv 2312.02753), the noise and the settings are ours.
    """
    softness = _between(t_start, t_end, tau)
    noise = _uniform(v, generator) * (math.sqrt(3) * _between(sigma_start, sigma_end, tau))
    return soft_round(soft_round(v, softness) + noise, softness)


@rounding_method("soft_round_gnoise")
def soft_round_gnoise(
    v: Tensor, tau: float, generator: Generator | None, *, t_start: Softness = 0.35,
    t_end: Softness = 0.05, sigma_start: Deviation = 0.22, sigma_end: Deviation = 0.1,
) -> Tensor:  # fmt: skip
    """The same with Gaussian noise."""
    softness = _between(t_start, t_end, tau)
    noise = _normal(v, generator) * _between(sigma_start, sigma_end, tau)
    return soft_round(soft_round(v, softness) + noise, softness)


@rounding_method("soft_round_knoise")
def soft_round_knoise(
    v: Tensor, tau: float, generator: Generator | None, *, t_start: Softness = 0.35,
    t_end: Softness = 0.05, a_start: Narrowness = 2.0, a_end: Narrowness = 1.0,
) -> Tensor:  # fmt: skip
    """The same with C3's Kumaraswamy noise on (-1/2, 1/2) (arXiv 2312.02753).

    Of its distribution function 1 - (1 - w^a)^b with b = (2^a (a - 1) + 1) / a the mode stays in
    the middle; a = 1 is uniform, a larger one narrower.
    """
    softness, a = _between(t_start, t_end, tau), _between(a_start, a_end, tau)
    b = (2**a * (a - 1) + 1) / a
    u = _open_uniform(v, generator)
    # 1 - u^(1 / b), which loses its digits for a large b.
    noise = (-torch.expm1(u.log() / b)) ** (1 / a) - 0.5
    return soft_round(soft_round(v, softness) + noise, softness)


# --- two classes: scores of the distance u in [0, 1) to floor and to ceil -------------------------


@rounding_method("sga", candidates=floor_ceil, temperature=BASELINE_TEMPERATURE)
@rounding_method("sga_logits", logits="atanh", candidates=floor_ceil)
def atanh(u: Tensor) -> Tensor:
    """-atanh(u), SGA (arXiv 2006.04240)."""
    return -torch.atanh(u)


@rounding_method("sga_logits", logits="logx", candidates=floor_ceil)
def logx(u: Tensor) -> Tensor:
    """Linear probabilities: log(1 - u) (arXiv 2401.17789)."""
    return torch.log(1 - u)


@rounding_method("sga_logits", logits="cosx", candidates=floor_ceil)
def cosx(u: Tensor) -> Tensor:
    """Cosine probabilities: log cos^2(pi u / 2) (arXiv 2401.17789)."""
    eps = 1e-7
    return torch.log((1 - eps) * torch.cos(math.pi / 2 * u) ** 2 + eps)


@rounding_method("sga_logits", logits="expxlogx", candidates=floor_ceil)
def expxlogx(u: Tensor, *, scale_factor: Positive = 1.0) -> Tensor:
    """exp(a u) log(1 - u^2), of the published code."""
    return torch.exp(scale_factor * u) * torch.log(1 - u**2)


@rounding_method("sga_logits", logits="ssl", candidates=floor_ceil)
def ssl(u: Tensor, *, scale_factor: Positive = 4 / 3) -> Tensor:
    """Sigmoid scaled logit: log sigmoid(-a logit(u)) (arXiv 2401.17789).

    a = 1 is `logx`; 4/3 was best in the paper's first version, 2.3 in its third. On the bundled
    weights 4/3 ends lower after 2,000 steps, 2.3 after 500.
    """
    return -_softplus((scale_factor * torch.logit(u, eps=1e-5)).clamp(max=EXP_MAX))


# --- three classes: scores of the distance s in [0, 1.5] to round(v) + {-1, 0, 1} -----------------


@rounding_method("sga_logits_3c", logits="absx", candidates=nearest_three)
def absx(s: Tensor) -> Tensor:
    """1 - 2/3 s, of the published code: a bounded score, not a log-probability."""
    return 1 - 2 / 3 * s


@rounding_method("sga_logits_3c", logits="log_absx_factor_pow", candidates=nearest_three)
def log_absx_factor_pow(s: Tensor, *, factor: Positive = 0.98, power: Positive = 1.5) -> Tensor:
    """Extended linear: power * log(1 - factor s) (arXiv 2401.17789)."""
    return power * torch.log((1 - factor * s).clamp_min(1e-6))


@rounding_method("sga_logits_3c", logits="log_cosx_n", candidates=nearest_three)
def log_cosx_n(s: Tensor, *, power: Positive = 3.0) -> Tensor:
    """log cos(pi s / 3)^power, 0 at s = 1.5, of the published code."""
    eps = 1e-7
    return torch.log((1 - eps) * _power(torch.cos(math.pi / 3 * s), power) + eps)


@rounding_method("sga_logits_3c", logits="log_cosx_factor_pow", candidates=nearest_three)
def log_cosx_factor_pow(s: Tensor, *, factor: Positive = 0.98, power: Positive = 2.0) -> Tensor:
    """Extended cosine: log cos(pi/2 factor s)^power (arXiv 2401.17789)."""
    cosine = torch.cos(math.pi / 2 * (factor * s).clamp(max=1))
    return torch.log(_power(cosine, power) + 1e-7)


@rounding_method("sga_logits_3c", logits="log_ssl_a_factor_pow", candidates=nearest_three)
def log_ssl_a_factor_pow(
    s: Tensor, *, factor: Positive = 0.98, power: Positive = 1.4, scale_factor: Positive = 1.4
) -> Tensor:
    """Extended SSL: power * log sigmoid(-a logit(factor s / 1.5)) (arXiv 2401.17789)."""
    # u is clamped to [1e-6, 1 - 1e-6]; float32 has too few digits for the latter, so that the logit
    # is clamped once more.
    bound = scale_factor * math.log(1e6 - 1)
    logit = scale_factor * torch.logit(s * (factor / 1.5), 2**-20)
    log_p = -_softplus(logit.clamp(-bound, min(bound, EXP_MAX)))
    return power * log_p.clamp_min(-math.log(1e6))


def _softplus(t: Tensor) -> Tensor:
    # torch's own is seven times as slow.
    return torch.log(1 + torch.exp(t))


def _power(base: Tensor, power: float) -> Tensor:
    # cos(pi / 2) is a little below 0 in float32, and 0 ** power has no finite gradient below 1.
    return base.clamp_min(1e-14) ** power


# --- choosing one ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rounding:
    """A method with its hyper-parameters and its temperature schedule, ready to be called.

    overridden: the method's own values of hyper-parameters for which a published key has another.
    """

    method: str
    logits: str | None
    params: dict[str, Any]
    temperature: Temperature
    sample: Callable[..., Tensor]
    overridden: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The method as a reader names it, e.g. `sga_logits_3c/log_ssl_a_factor_pow`."""
        return self.method if self.logits is None else f"{self.method}/{self.logits}"

    def __call__(self, v: Tensor, tau: float, generator: Generator | None = None) -> Tensor:
        """Relaxed rounding of centred latents v, any shape, at temperature tau."""
        return self.sample(v, tau, generator, **self.params)

    def at(self, step: float, generator: Generator | None = None) -> Callable[[Tensor], Tensor]:
        """The rounding of one optimisation step, as `models.rd_pass` takes it: v -> v_hat."""
        return partial(self, tau=self.temperature(step), generator=generator)


def find_method(method: str, logits: str | None = None) -> Method:
    """The registered method of these JSON names.

    Raises:
        InputError: no such method, or no such function in its family; names what there is.
    """
    families = {name for name, function in METHODS if function is not None}
    if method in families:
        known = sorted(function for name, function in METHODS if name == method)
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


_PYTHON_NAMES = {"3c_power": "power", "3c_factor": "factor"}
_STRICT = ConfigDict(strict=True, allow_inf_nan=False)


def bind_params(method: Method, name: str, params: dict[str, Any]) -> dict[str, Any]:
    """The method's hyper-parameters: its defaults, overridden by `params`.

    JSON names (`3c_power`, `3c_factor`) and the functions' own (`power`, `factor`) both count.

    Raises:
        InputError: a hyper-parameter the method does not have, one without a default is missing,
            or one of the wrong type or out of range.
    """
    given = {_PYTHON_NAMES.get(key, key): value for key, value in params.items()}
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


def build_rounding(
    method: str, logits: str | None = None, *, temperature: Temperature, **params: Any
) -> Rounding:
    """A rounding by its JSON names, with `params` as its hyper-parameters.

    `temperature` holds unless the method has a schedule of its own (sga, danneal).

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


def rounding_logits(
    v: Tensor, method: str, logits: str | None = None, **params: Any
) -> tuple[Tensor, Tensor]:
    """Candidates and their logits at temperature 1, both [..., K], for centred latents v [...].

    Raises:
        InputError: the method has no candidates, or see `find_method` and `bind_params`.
    """
    found = find_method(method, logits)
    if found.score is None:
        raise InputError(f"{method} rounds without candidates, so it has no logits")
    candidates, distance = found.candidates(v)  # [K, ...]
    logits = found.score(distance, **bind_params(found, method, params))
    return candidates.movedim(0, -1), logits.movedim(0, -1)


def rounding_from_config(config: RefineConfig) -> Rounding:
    """The one rounding that a refinement config switches on.

    Published hyper-parameters (scale_factor, 3c_power, ...) stand in every published JSON and
    reach the methods that have them; those in `rounding_params` must all be the method's own.

    Raises:
        InputError: an unknown method or function, or a wrong hyper-parameter.
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
        if _PYTHON_NAMES.get(key, key) in method.defaults
    }
    temperature = Temperature(
        options.temp_rate,
        params.ub,
        options.temp_schedule,
        steps=config.tot_inference_iterations,
    )
    chosen = {**published, **options.rounding_params}
    rounding = _with_params(family, params.logits, temperature, chosen)
    names = {_PYTHON_NAMES.get(key, key) for key in published}
    overridden = {
        name: method.defaults[name]
        for name in sorted(names)
        if method.defaults[name] not in (rounding.params[name], inspect.Parameter.empty)
    }
    return replace(rounding, overridden=overridden)
