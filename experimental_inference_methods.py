"""Rounding functions and temperature schedules, for refining latents by gradient descent.

Add your own methods here. A new method is a few lines under `rounding_method`, a new schedule a few
lines under `temperature_schedule`. The JSON config names it. There are two kinds of methods:

* a rounding: `f(v, tau, source, **hyper_parameters) -> v_hat`, same shape as v;
* a score over candidates (`candidates=floor_ceil` or `nearest_three`):
  `f(u, **hyper_parameters) -> logits`, where u >= 0 is the distance of v to each candidate. A draw
  from a Gumbel-softmax over the candidates turns the score into a rounding (SGA, SGA+).

v is a latent centred on its lattice (y minus its means, z minus its medians), so that hard
rounding is always `torch.round(v)`. tau in [0, 1] is the temperature, 0 at the end of annealing.
The import of this module fills the registries. So import the names of `__all__` from here.

Sources: Yang, Bamler, Mandt 2020 (arXiv 2006.04240): `sga`, `ste`, `unoise`, `danneal`.
Perugachi-Diaz, Gansekoele, Bhulai 2024 (arXiv 2401.17789): SGA+, all `sga_logits*` functions.
Agustsson, Theis 2020 (arXiv 2006.09952) and C3 (arXiv 2312.02753): `soft_round_*`.
"""

import math
from collections.abc import Callable
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from config import Positive
from rounding.candidates import TAU_MIN, floor_ceil, gumbel_softmax, nearest_three
from rounding.chosen import Rounding, build_rounding, rounding_from_config
from rounding.noise import Source, normal_noise, open_uniform, uniform_noise
from rounding.registry import METHODS, rounding_logits, rounding_method
from rounding.temperature import Tau, Temperature, at_least, temperature_schedule

__all__ = [
    "BASELINE_TEMPERATURE",
    "METHODS",
    "Rounding",
    "Tau",
    "Temperature",
    "build_rounding",
    "floor_ceil",
    "gumbel_softmax",
    "nearest_three",
    "rounding_from_config",
    "rounding_logits",
    "rounding_method",
    "soft_round",
    "temperature_schedule",
]

LEAST = 1e-3  # annealed softness and noise end here at the lowest: 0 is not allowed
EXP_MAX = 80  # exp(89) overflows in float32, and a probability of exp(-80) is as good as 0


# --- temperature schedules: tau at step t; the result is clipped to [0, ub] -----------------------


@temperature_schedule("exp")
def exponential(step: float, rate: float, ub: float, steps: int) -> float:
    """exp(-rate t) (arXiv 2401.17789)."""
    return math.exp(-rate * step)


@temperature_schedule("exp0")
def exponential_after_700(step: float, rate: float, ub: float, steps: int) -> float:
    """ub exp(-rate (t - 700)), which holds ub for the first 700 steps (arXiv 2401.17789)."""
    return ub * math.exp(-rate * max(step - 700, 0))


@temperature_schedule("exp_of_run")
def exponential_of_run(step: float, rate: float, ub: float, steps: int) -> float:
    """exp(-rate t / steps): ours, depends only on the fraction of the run that is done."""
    return math.exp(-rate * step / steps)


@temperature_schedule("linear")
def linear(step: float, rate: float, ub: float, steps: int) -> float:
    """ub (1 - t / steps): ours, from ub to 0 over the run."""
    return ub * (1 - step / steps)


# arXiv 2006.04240: the schedule of SGA and deterministic annealing.
BASELINE_TEMPERATURE = Temperature(rate=4e-3, ub=0.2, lb=TAU_MIN)


# --- baselines (arXiv 2006.04240) -----------------------------------------------------------------


@rounding_method("ste")
def ste(v: Tensor, tau: Tau, source: Source) -> Tensor:
    """Straight-through estimator: rounds forward, passes the gradient unchanged."""
    return v + (v.round() - v).detach()


@rounding_method("unoise")
def unoise(v: Tensor, tau: Tau, source: Source) -> Tensor:
    """Uniform noise on (-1/2, 1/2)."""
    return v + uniform_noise(v, source) / 2


@rounding_method("danneal", temperature=BASELINE_TEMPERATURE)
def danneal(v: Tensor, tau: Tau, source: Source) -> Tensor:
    """Deterministic annealing: the weights of SGA without its noise."""
    candidates, distance = floor_ceil(v)
    weights = torch.softmax(atanh(distance) / at_least(tau, TAU_MIN), dim=0)  # [2, ...]
    return (candidates * weights).sum(dim=0)


# --- annealed noise and straight-through, from the code of arXiv 2401.17789; w = 1 - tau to 1 ----


@rounding_method("temp_ste")
def temp_ste(v: Tensor, tau: Tau, source: Source) -> Tensor:
    """w STE(v / w): rounds to a lattice of spacing w, which grows to 1."""
    w = at_least(1 - tau, 1e-4)
    return w * ste(v / w, tau, source)


@rounding_method("temp_unoise")
def temp_unoise(v: Tensor, tau: Tau, source: Source) -> Tensor:
    """Uniform noise that grows to (-1/2, 1/2)."""
    return v + (1 - tau) * uniform_noise(v, source) / 2


@rounding_method("temp_uste")
def temp_uste(v: Tensor, tau: Tau, source: Source) -> Tensor:
    """w STE((v + (1 - w) U / 2) / w): the noise fades while the lattice spacing grows to 1."""
    w = at_least(1 - tau, 1e-8)
    return w * ste((v + (1 - w) * uniform_noise(v, source) / 2) / w, tau, source)


@rounding_method("gnoise")
def gnoise(v: Tensor, tau: Tau, source: Source, *, gnoise_sigma: Positive = 0.25) -> Tensor:
    """Gaussian noise of a fixed standard deviation."""
    return v + gnoise_sigma * normal_noise(v, source)


@rounding_method("temp_gnoise")
def temp_gnoise(v: Tensor, tau: Tau, source: Source) -> Tensor:
    """Gaussian noise that grows to a standard deviation of 1/4."""
    return v + 0.25 * (1 - tau) * normal_noise(v, source)


# --- soft rounding with annealed noise; tuned for a tau that falls linearly from 1 to 0 -----------


Softness = Annotated[float, Field(gt=0, le=1000)]
Deviation = Annotated[float, Field(ge=0, le=1)]
Narrowness = Annotated[float, Field(ge=1, le=10)]


def soft_round(v: Tensor, softness: Tau) -> Tensor:
    """A smooth rounding: v for a large `softness`, round(v) for a small one (arXiv 2006.09952).

    floor(v) + 1/2 + tanh((v - floor(v) - 1/2) / T) / (2 tanh(1 / (2 T))) for T = softness > 0.
    """
    middle = v.detach().floor() + 0.5
    of_half = 0.5 / softness
    end = torch.tanh(of_half) if isinstance(of_half, Tensor) else math.tanh(of_half)
    return middle + torch.tanh((v - middle) / softness) / (2 * end)


def _annealed(start: float, end: float, tau: Tau) -> Tau:
    return at_least(end + tau * (start - end), LEAST)


def _soft_round_with(
    draw: Callable[[Tensor, Source], Tensor], scale: float
) -> Callable[..., Tensor]:
    """A rounding that adds noise between two soft roundings; both are annealed.

    The mechanism is C3's (arXiv 2312.02753). The noise and the settings are ours. `scale` brings
    the draws of `draw` to a standard deviation of 1; sigma is the standard deviation of the noise.
    """

    def sample(
        v: Tensor, tau: Tau, source: Source, *, t_start: Softness = 0.35,
        t_end: Softness = 0.05, sigma_start: Deviation = 0.22, sigma_end: Deviation = 0.1,
    ) -> Tensor:  # fmt: skip
        softness = _annealed(t_start, t_end, tau)
        noise = draw(v, source) * (scale * _annealed(sigma_start, sigma_end, tau))
        return soft_round(soft_round(v, softness) + noise, softness)

    return sample


rounding_method("soft_round_unoise")(_soft_round_with(uniform_noise, math.sqrt(3)))
rounding_method("soft_round_gnoise")(_soft_round_with(normal_noise, 1.0))


@rounding_method("soft_round_knoise")
def soft_round_knoise(
    v: Tensor, tau: Tau, source: Source, *, t_start: Softness = 0.35,
    t_end: Softness = 0.05, a_start: Narrowness = 2.0, a_end: Narrowness = 1.0,
) -> Tensor:  # fmt: skip
    """C3's Kumaraswamy noise on (-1/2, 1/2) between two soft roundings (arXiv 2312.02753).

    The distribution function is 1 - (1 - w^a)^b with b = (2^a (a - 1) + 1) / a, so the mode stays
    at w = 1/2. a = 1 gives uniform noise, a larger a gives narrower noise.
    """
    softness, a = _annealed(t_start, t_end, tau), _annealed(a_start, a_end, tau)
    b = (2**a * (a - 1) + 1) / a
    u = open_uniform(v, source)
    # expm1: for a large b, 1 - u^(1 / b) would lose its digits.
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
    """exp(a u) log(1 - u^2), from the published code."""
    return torch.exp(scale_factor * u) * torch.log(1 - u**2)


@rounding_method("sga_logits", logits="ssl", candidates=floor_ceil)
def ssl(u: Tensor, *, scale_factor: Positive = 4 / 3) -> Tensor:
    """Sigmoid scaled logit: log sigmoid(-a logit(u)) (arXiv 2401.17789).

    a = 1 equals `logx`. The paper's first version prefers a = 4/3, its third a = 2.3, which is also
    better after few steps (docs/recipes.md).
    """
    return -_softplus((scale_factor * torch.logit(u, eps=1e-5)).clamp(max=EXP_MAX))


# --- three classes: scores of the distance s in [0, 1.5] to round(v) + {-1, 0, 1} -----------------


@rounding_method("sga_logits_3c", logits="absx", candidates=nearest_three)
def absx(s: Tensor) -> Tensor:
    """1 - 2/3 s, from the published code: a bounded score, not a log-probability."""
    return 1 - 2 / 3 * s


@rounding_method("sga_logits_3c", logits="log_absx_factor_pow", candidates=nearest_three)
def log_absx_factor_pow(s: Tensor, *, factor: Positive = 0.98, power: Positive = 1.5) -> Tensor:
    """Extended linear: power * log(1 - factor s) (arXiv 2401.17789)."""
    return power * torch.log((1 - factor * s).clamp_min(1e-6))


@rounding_method("sga_logits_3c", logits="log_cosx_n", candidates=nearest_three)
def log_cosx_n(s: Tensor, *, power: Positive = 3.0) -> Tensor:
    """log cos(pi s / 3)^power, from the published code; the cosine is 0 at s = 1.5."""
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
    # We want u clamped to [1e-6, 1 - 1e-6]. Float32 has too few digits for the upper end, so the
    # logit is clamped as well.
    bound = scale_factor * math.log(1e6 - 1)
    logit = scale_factor * torch.logit(s * (factor / 1.5), 2**-20)
    log_p = -_softplus(logit.clamp(-bound, min(bound, EXP_MAX)))
    return power * log_p.clamp_min(-math.log(1e6))


def _softplus(t: Tensor) -> Tensor:
    # torch's own softplus takes seven times as long.
    return torch.log(1 + torch.exp(t))


def _power(base: Tensor, power: float) -> Tensor:
    # In float32 cos(pi / 2) is a little below 0, and for power < 1 the gradient at 0 is infinite.
    return base.clamp_min(1e-14) ** power
