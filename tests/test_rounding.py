"""Rounding functions and temperatures, against the published tables and independent maths."""

import inspect
import json
import math
import re
import subprocess
import sys
from unittest.mock import patch

import numpy as np
import pytest
import torch

from common.errors import InputError
from config import RefineConfig, load_config
from conftest import ROOT
from experimental_inference_methods import (
    BASELINE_TEMPERATURE,
    METHODS,
    Temperature,
    build_rounding,
    gumbel_softmax,
    nearest_three,
    rounding_from_config,
    rounding_logits,
    rounding_method,
    soft_round,
    temperature_schedule,
)
from rounding.temperature import SCHEDULES

TABLES = json.loads((ROOT / "tests/reference/rounding_logits.json").read_text())
FLAT = Temperature(rate=0.0, ub=1.0)
PUBLISHED = sorted(METHODS, key=str)
# As tau goes to 0 these end in noise of full strength, the published stand-in for rounding.
NOISE_ONLY = {"unoise", "gnoise", "temp_unoise", "temp_gnoise"}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-4)])
@pytest.mark.parametrize(
    "entry",
    TABLES["logits_at_temperature_1"],
    ids=lambda e: "-".join(map(str, (e["method"], e["logits"], *e["params"].values()))),
)
def test_candidates_and_logits_are_the_published_ones(entry, dtype, tolerance):
    v = torch.tensor(TABLES["inputs"], dtype=dtype)
    candidates, logits = rounding_logits(v, entry["method"], entry["logits"], **entry["params"])
    torch.testing.assert_close(candidates, torch.tensor(entry["candidates"], dtype=dtype))
    expected = torch.tensor(entry["values"], dtype=torch.float64)
    torch.testing.assert_close(logits.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("entry", TABLES["temperature"])
def test_temperatures_are_the_published_ones(entry):
    temperature = Temperature(entry["temp_rate"], entry["ub"], entry["temp_schedule"])
    annealed = [1 - temperature(step) for step in entry["iterations"]]
    if entry["method"] == "temp_ste":
        annealed = [max(w, 1e-4) for w in annealed]
    assert annealed == pytest.approx(entry["annealed_temperature"], abs=1e-12)


def test_our_temperatures_go_by_the_part_of_the_run():
    for steps in (50, 2000):
        linear = Temperature(0.001, 0.8, "linear", steps=steps)
        marks = [linear(part * steps // 10) for part in (0, 5, 10)]
        assert marks == pytest.approx([0.8, 0.4, 0])
        falling = Temperature(2.0, 1.0, "exp_of_run", steps=steps)
        marks = [falling(part * steps // 10) for part in (0, 5, 10)]
        assert marks == pytest.approx([1, math.exp(-1), math.exp(-2)])


def test_soft_rounding_is_the_papers_and_goes_from_nothing_to_rounding():
    v = torch.linspace(-2.43, 2.47, 98, dtype=torch.float64).requires_grad_()
    for softness in (0.05, 0.35, 2.0):
        distance = v.detach().numpy() - np.floor(v.detach().numpy()) - 0.5
        half = np.tanh(distance / softness) / np.tanh(1 / (2 * softness)) / 2
        expected = np.floor(v.detach().numpy()) + 0.5 + half
        np.testing.assert_allclose(soft_round(v, softness).detach().numpy(), expected)
        assert torch.autograd.gradcheck(lambda v, s=softness: soft_round(v, s), v)
    torch.testing.assert_close(soft_round(v, 100.0), v, rtol=0, atol=1e-4)
    torch.testing.assert_close(soft_round(v, 1e-6), v.round())


@pytest.mark.parametrize("tau", [1.0, 0.25, 0.0])
def test_noise_between_soft_roundings_is_of_its_distribution(tau):
    """At T = 100 soft rounding is the identity, and the noise itself shows."""
    v = torch.full((200_000,), 0.3, dtype=torch.float64)
    sigma, soft = 0.1 + tau * 0.12, {"t_start": 100.0, "t_end": 100.0}

    def noise(name, **params):
        rounding = build_rounding(name, temperature=FLAT, **soft, **params)
        return rounding(v, tau, torch.Generator().manual_seed(0)) - v

    uniform = noise("soft_round_unoise")
    assert uniform.std().item() == pytest.approx(sigma, rel=0.01)
    assert uniform.abs().max().item() == pytest.approx(3**0.5 * sigma, rel=0.01)
    normal = noise("soft_round_gnoise")
    assert normal.std().item() == pytest.approx(sigma, rel=0.01)
    assert (normal.abs() < sigma).double().mean().item() == pytest.approx(0.683, abs=0.005)
    a = 1 + tau * 1.5
    b = (2**a * (a - 1) + 1) / a
    kumaraswamy = noise("soft_round_knoise", a_start=2.5)
    for w in (0.1, 0.35, 0.5, 0.8):
        below = (kumaraswamy + 0.5 < w).double().mean().item()
        assert below == pytest.approx(1 - (1 - w**a) ** b, abs=0.005)


@pytest.mark.parametrize("name", ["soft_round_unoise", "soft_round_gnoise", "soft_round_knoise"])
def test_soft_rounding_with_noise_sharpens_to_hard_rounding(name):
    """At the end little noise is left where v is near an integer."""
    calm = {} if name == "soft_round_knoise" else {"sigma_end": 0.001}
    rounding = build_rounding(name, temperature=FLAT, t_end=0.01, **calm)
    v = torch.tensor([-1.9, -0.2, 0.1, 2.3], dtype=torch.float64)
    for seed in range(20):
        got = rounding(v, 0.0, torch.Generator().manual_seed(seed))
        if calm:
            torch.testing.assert_close(got, v.round())
        assert ((got - got.round()).abs() < 1e-3).double().mean() > 0.7


def test_baseline_temperature_is_the_published_one():
    (entry,) = TABLES["baseline_temperature"]
    tau = [BASELINE_TEMPERATURE(step) for step in entry["iterations"]]
    assert tau == pytest.approx(entry["tau"], rel=1e-12)
    for method in ("sga", "danneal"):
        assert build_rounding(method, temperature=FLAT).temperature == BASELINE_TEMPERATURE


def test_defaults_are_the_published_best_settings():
    def defaults(*key):
        return METHODS[key].defaults

    three = "sga_logits_3c"
    assert defaults(three, "log_absx_factor_pow") == {"factor": 0.98, "power": 1.5}
    assert defaults(three, "log_cosx_n") == {"power": 3.0}
    assert defaults(three, "log_cosx_factor_pow") == {"factor": 0.98, "power": 2.0}
    ssl = {"factor": 0.98, "power": 1.4, "scale_factor": 1.4}
    assert defaults(three, "log_ssl_a_factor_pow") == ssl
    assert defaults("sga_logits", "ssl") == {"scale_factor": 4 / 3}


def _values(dtype):
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(200, generator=generator, dtype=torch.float64) * 3
    exact = torch.arange(-4, 4.5, 0.5, dtype=torch.float64)
    near = torch.cat((exact + 1e-7, exact - 1e-7, exact + 2e-6))
    return torch.cat((exact, near, spread)).to(dtype)


@pytest.mark.parametrize("tau", [1.0, 0.2, 1e-3, 1e-8, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("key", PUBLISHED, ids=lambda k: "-".join(filter(None, k)))
def test_every_method_has_finite_values_and_gradients(key, dtype, tau):
    rounding = build_rounding(*key, temperature=FLAT)
    v = _values(dtype).requires_grad_()
    v_hat = rounding(v, tau, torch.Generator().manual_seed(1))
    assert v_hat.shape == v.shape
    assert v_hat.dtype == dtype
    v_hat.sum().backward()
    assert v_hat.isfinite().all()
    assert v.grad.isfinite().all()


@pytest.mark.parametrize("key", PUBLISHED, ids=lambda k: "-".join(filter(None, k)))
def test_every_method_becomes_hard_rounding(key):
    rounding = build_rounding(*key, temperature=FLAT)
    # Ties may go either way; the rest may not.
    v = _values(torch.float64)
    v = v[((v - v.floor()) - 0.5).abs() > 0.01]
    v_hat = rounding(v, 1e-8, torch.Generator().manual_seed(1))
    if key[0] in NOISE_ONLY:
        assert (v_hat - v).abs().max() < 1.2
        assert (v_hat - v).std() > 0.2
    elif key[0].startswith("soft_round"):  # noise is left, and moves what lies near a half
        assert (v_hat - v.round()).abs().median() < 0.01
    else:
        torch.testing.assert_close(v_hat, v.round(), rtol=0, atol=1e-6)


def test_gradients_are_autograds_of_the_formula():
    """SGA+ three-class SSL against a second writing of it, same noise, in float64."""
    v = torch.linspace(-2.3, 2.4, 50, dtype=torch.float64).requires_grad_()
    tau, a, factor, power = 0.6, 1.4, 0.98, 1.4
    rounding = build_rounding("sga_logits_3c", "log_ssl_a_factor_pow", temperature=FLAT)
    ours = rounding(v, tau, torch.Generator().manual_seed(3))
    epsilon = torch.finfo(v.dtype).eps
    uniform = torch.empty(3, 50, dtype=torch.float64)
    uniform.uniform_(epsilon / 4, 1 - epsilon / 2, generator=torch.Generator().manual_seed(3))
    gumbel = -torch.log(-torch.log(uniform))
    nearest = torch.round(v).detach()
    total, weighted = 0, 0
    for index, shift in enumerate((-1, 0, 1)):
        s = v - nearest - shift
        u = (factor * s.abs() / 1.5).clamp(1e-6, 1 - 1e-6)
        p = (1 / (1 + (u / (1 - u)) ** a)).clamp_min(1e-6) ** power
        weight = torch.exp((p.log() / tau + gumbel[index]) / tau)
        total, weighted = total + weight, weighted + weight * (nearest + shift)
    theirs = weighted / total
    torch.testing.assert_close(ours, theirs)
    (our_grad,) = torch.autograd.grad(ours.sum(), v, retain_graph=True)
    (their_grad,) = torch.autograd.grad(theirs.sum(), v)
    torch.testing.assert_close(our_grad, their_grad)


@pytest.mark.parametrize("tau", [1.0, 0.4])
@pytest.mark.parametrize("classes", [2, 3])
def test_samples_fall_on_candidates_as_often_as_the_logits_say(tau, classes):
    """The arg max of a Gumbel-softmax draw is categorical with softmax(logits / tau)."""
    logits = torch.tensor([-0.3, -1.5, -2.0][:classes], dtype=torch.float64)
    expanded = logits[:, None].expand(classes, 200_000)
    weights = gumbel_softmax(expanded, tau, torch.Generator().manual_seed(0))
    frequency = weights.argmax(0).bincount(minlength=classes) / 200_000
    torch.testing.assert_close(frequency.double(), (logits / tau).softmax(0), atol=5e-3, rtol=0)


def test_straight_through_has_an_identity_gradient():
    v = torch.tensor([0.2, 1.7, -3.4], requires_grad=True)
    v_hat = build_rounding("ste", temperature=FLAT)(v, 1.0)
    v_hat.backward(torch.tensor([1.0, 2.0, 3.0]))
    assert v_hat.tolist() == [0.0, 2.0, -3.0]
    assert v.grad.tolist() == [1.0, 2.0, 3.0]


def test_temp_uste_rounds_on_a_lattice_of_width_w():
    v = torch.linspace(-3, 3, 101, dtype=torch.float64)
    rounding = build_rounding("temp_uste", temperature=FLAT)
    on_lattice = rounding(v, 0.5, torch.Generator().manual_seed(0)) / 0.5
    torch.testing.assert_close(on_lattice, on_lattice.round())
    assert (on_lattice * 0.5 - v).abs().max() <= 0.25 + 0.25


@pytest.fixture
def restored_registries():
    """What a test registers is known to the project during the test, and to no test after it."""
    before = [*METHODS], [*SCHEDULES]
    with patch.dict(METHODS), patch.dict(SCHEDULES):
        yield
        assert ([*METHODS], [*SCHEDULES]) != before, "the test registered nothing"
    assert ([*METHODS], [*SCHEDULES]) == before


@pytest.mark.usefixtures("restored_registries")
def test_a_method_that_hands_its_source_to_torch_is_refused(config_values, write_config):
    @rounding_method("of_the_test")
    def with_torchs_noise(v, tau, generator):
        return v + torch.empty_like(v).uniform_(-0.5, 0.5, generator=generator)

    config_values["dev_options"]["improving_methods"] = {"of_the_test": True}
    config = load_config(write_config(config_values), RefineConfig)
    with pytest.raises(InputError, match="of_the_test: torch cannot draw from its third argument"):
        rounding_from_config(config)


@pytest.mark.usefixtures("restored_registries")
def test_a_researcher_adds_a_method_in_a_few_lines(config_values, write_config):
    @rounding_method("sga_logits_3c", logits="of_the_test", candidates=nearest_three)
    def gaussian(s, *, width):
        return -((s / width) ** 2)

    assert len(inspect.getsource(gaussian).splitlines()) < 10
    options = config_values["dev_options"]
    options["sga_logits_params"] = {"logits": "of_the_test"}
    with pytest.raises(InputError, match="of_the_test needs the hyper-parameter 'width'"):
        rounding_from_config(load_config(write_config(config_values), RefineConfig))
    options["rounding_params"] = {"width": 0.5, "hight": 2}
    with pytest.raises(InputError, match="no hyper-parameter 'hight'; it has width"):
        rounding_from_config(load_config(write_config(config_values), RefineConfig))
    options["rounding_params"] = {"width": 0.5}
    options["3c_power"] = 2
    rounding = rounding_from_config(load_config(write_config(config_values), RefineConfig))
    assert rounding.params == {"width": 0.5}
    assert rounding(torch.tensor([0.1, 1.8]), 1e-8).tolist() == [0.0, 2.0]


@pytest.mark.usefixtures("restored_registries")
def test_a_researcher_adds_a_temperature_schedule_in_a_few_lines(config_values, write_config):
    @temperature_schedule("halved")
    def halved(step, rate, ub, steps):
        return ub * 0.5 ** (rate * step / steps)

    assert len(inspect.getsource(halved).splitlines()) < 10
    options = config_values["dev_options"]
    options |= {"temp_schedule": "halved", "temp_rate": 3}
    options["sga_logits_params"]["ub"] = 0.8
    config_values["tot_inference_iterations"] = 30
    rounding = rounding_from_config(load_config(write_config(config_values), RefineConfig))
    marks = [rounding.temperature(step) for step in (0, 10, 20, 30, -10)]
    assert marks == pytest.approx([0.8, 0.4, 0.2, 0.1, 0.8])  # the last is clipped to ub


def test_unknown_temperature_schedules_are_refused_by_name(config_values, write_config):
    config_values["dev_options"]["temp_schedule"] = "cosine"
    message = "dev_options.temp_schedule = 'cosine': there are "
    with pytest.raises(InputError, match=f"^{re.escape(message)}") as refused:
        rounding_from_config(load_config(write_config(config_values), RefineConfig))
    known = str(refused.value).removeprefix(message).split(", ")
    assert {"exp", "exp0", "exp_of_run", "linear"} <= {*known}


@pytest.mark.parametrize("method", ["sga", "ste"])
def test_methods_that_ignore_the_schedule_refuse_an_unknown_one_too(
    config_values, write_config, method
):
    options = config_values["dev_options"]
    options |= {"temp_schedule": "cosine", "improving_methods": {method: True}}
    with pytest.raises(InputError, match="temp_schedule = 'cosine'"):
        rounding_from_config(load_config(write_config(config_values), RefineConfig))


def test_the_registry_needs_nothing_of_what_it_registers():
    """The registries are filled by the front door alone; nothing under `rounding` needs it."""
    script = (
        "import sys; import rounding.chosen; from rounding.registry import METHODS; "
        "assert 'experimental_inference_methods' not in sys.modules; assert not METHODS; "
        "import experimental_inference_methods as front; assert front.METHODS is METHODS; "
        "assert METHODS"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, timeout=60)


@pytest.mark.parametrize(
    ("flags", "logits", "message"),
    [
        ({"sga_logit": True}, None, "improving_methods.sga_logit: no such method"),
        ({"sga": True, "stee": False}, None, "improving_methods.stee: no such method"),
        ({"sga_logits": True}, "absx", "logits = 'absx': sga_logits has atanh, cosx"),
        ({"sga_logits_3c": True}, None, "logits = None: sga_logits_3c has absx"),
    ],
)
def test_unknown_methods_are_refused_by_name(config_values, write_config, flags, logits, message):
    options = config_values["dev_options"]
    options["improving_methods"] = flags
    options["sga_logits_params"] = {"logits": logits}
    with pytest.raises(InputError, match=message):
        rounding_from_config(load_config(write_config(config_values), RefineConfig))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"power": "abc"}, "hyper-parameter power = 'abc' should be a valid number"),
        ({"power": True}, "hyper-parameter power = True should be a valid number"),
        ({"3c_scale_factor": 1}, "no hyper-parameter '3c_scale_factor'"),
        ({"power": 1, "3c_power": 2}, "with and without its 3c_ prefix"),
        ({"power": -1}, "hyper-parameter power = -1 should be greater than 0"),
        ({"temperature": 1}, "no hyper-parameter 'temperature'"),
        ({"softness": 1}, "no hyper-parameter 'softness'; it has factor, power, scale_factor"),
    ],
)
def test_wrong_hyper_parameters_are_refused_by_name(config_values, write_config, params, message):
    config_values["dev_options"]["rounding_params"] = params
    with pytest.raises(InputError, match=message):
        rounding_from_config(load_config(write_config(config_values), RefineConfig))


@pytest.mark.parametrize(
    ("method", "key", "values"),
    [
        ("soft_round_unoise", "t_start", (-1, 0, 1e300)),
        ("soft_round_gnoise", "sigma_end", (-0.1, 1.5)),
        ("soft_round_knoise", "a_start", (0.5, 1100)),
    ],
)
def test_hyper_parameters_out_of_range_are_refused(method, key, values):
    for value in values:
        message = f"{method}: the hyper-parameter {key} = {re.escape(str(value))} should"
        with pytest.raises(InputError, match=message):
            build_rounding(method, temperature=FLAT, **{key: value})


def test_published_hyper_parameters_reach_only_the_methods_that_have_them(
    config_values, write_config
):
    options = config_values["dev_options"]
    options |= {"scale_factor": 2.0, "3c_power": 1.1, "3c_factor": 0.9, "gnoise_sigma": 0.4}
    options["sga_logits_params"] = {"logits": "log_absx_factor_pow"}
    config = load_config(write_config(config_values), RefineConfig)
    assert rounding_from_config(config).params == {"factor": 0.9, "power": 1.1}
