"""Lattices of y with another step than 1: rates, files, gradients and polish, and who has none."""

import copy
from functools import cache
from typing import NamedTuple

import numpy as np
import pytest
import skimage
import torch
from toys import IN_TURN, NAMES, toy

import refinement.polish as polishing
from architectures import ARCHITECTURES, Autoregressive
from architectures.distributions import Gaussians, use_coder_scales
from architectures.forwarded import forwarded_family
from architectures.own import find_family
from architectures.walk import Group, rounded
from coding.bitstream import read_bitstream
from coding.coder import build_coder, decode_latents, decode_picture, encode_latents
from common.compressai import GaussianConditional, ScaleHyperprior
from common.errors import InputError
from conftest import needs, to_x
from models import freeze
from passes import problem_of, to_optimise, true_terms
from refinement.descent import Pace
from refinement.polish import polish

STEP, SIZE, LMBDA = 1.3, (70, 90), 1e-4
X = to_x(skimage.data.coffee()[100:170, 200:290])
SCALING = [name for name in NAMES if ARCHITECTURES[name].scales_lattice]
# One for each kind: tables in one group, tables in many groups, symbols in turn.
KINDS = ["mbt2018-mean", "elic2022-official", "mbt2018"]


@cache
def coarse(name):
    """A toy whose y has the step `STEP`; do not change it."""
    return toy(name).with_lattice(STEP)


def probability(v, scales, means, step=STEP):
    """What a Gaussian gives the interval of width `step` around v, in float64."""
    v, scales, means = v.double(), scales.double().clamp_min(0.11 * step), means.double()
    distance = -(v - means).abs() / scales  # the left tail is the exact one
    ends = (torch.special.ndtr(distance + end * step / (2 * scales)) for end in (1, -1))
    return next(ends) - next(ends)


class Plain(NamedTuple):
    """A walk once more. bits: of y and z. groups: value, scales and means of each group of y."""

    y_hat: torch.Tensor
    bits: torch.Tensor
    groups: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def plainly(model, symbols_of):
    """The walk with what `symbols_of` says of a group and its step: integers, or relaxed ones."""
    groups, values = [], []

    def value_of(group):
        step = STEP if group.name == "y" else 1
        values.append(step * symbols_of(group, step) + group.centre)
        groups.append(group)
        return values[-1]

    y_hat = model.walk(SIZE, value_of)
    if isinstance(model, Autoregressive):
        context = model.network.context_prediction(y_hat)
        both = torch.cat((groups[1].distribution.params, context), 1)
        of_y = [(y_hat, *model.network.entropy_parameters(both).chunk(2, 1))]
    else:
        of_y = [(value, group.distribution.scales, group.distribution.means)
                for value, group in zip(values[1:], groups[1:], strict=True)]  # fmt: skip
    bits = -groups[0].distribution.likelihood(values[0]).log2().sum()  # z has the usual lattice
    for of_group in of_y:
        bits = bits - probability(*of_group).clamp_min(1e-9).log2().sum()
    return Plain(y_hat, bits, of_y)


def known(symbols):
    """A `symbols_of` that takes integers."""
    return lambda group, _: group.part.of(symbols[group.name])


# --- rates ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [0.6, STEP, 4.0])
def test_a_likelihood_is_the_mass_between_the_ends_of_a_box(step):
    """So many steps that some scales are below the bound, and some symbols far out."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, 4, 20, 20)
    scales = torch.exp(3 * torch.rand(shape, generator=generator) - 2)
    means = 5 * torch.randn(shape, generator=generator)
    symbols = (4 * torch.randn(shape, generator=generator)).round()
    gaussians = Gaussians(GaussianConditional(None), scales, means, step)
    v_hat = symbols * step + means
    expected = probability(v_hat, scales, means, step)
    p = gaussians.likelihood(v_hat)
    torch.testing.assert_close(p.double(), expected.clamp_min(1e-9), rtol=1e-4, atol=1e-8)
    assert (scales < 0.11 * step).any() or step < 1
    # all the boxes of a lattice together have the whole mass
    middle = (v_hat / step).round() * step
    total = sum(gaussians.likelihood(middle + n * step) for n in range(-80, 80))
    torch.testing.assert_close(total, torch.ones(shape), rtol=0, atol=1e-5)


@pytest.mark.parametrize("step", [1.0, STEP])
def test_integers_lie_as_exactly_on_a_lattice_as_its_centre(step):
    """Those of a coder are int32, around centres in float64."""
    symbols = torch.arange(-1000, 1000, dtype=torch.int32)
    centre = torch.linspace(-2, 2, 2000, dtype=torch.double)
    group = Group("y", centre, None, step=step)
    v = group.on_lattice(symbols)
    assert np.array_equal(v.numpy(), symbols.numpy() * step + centre.numpy())
    torch.testing.assert_close(group.in_steps(v), symbols.double(), rtol=0, atol=1e-12)
    assert group.on_lattice(symbols.float()).dtype == torch.double
    assert group._replace(centre=centre.float()).on_lattice(symbols).dtype == torch.float


def test_tables_and_coder_scales_count_in_steps():
    conditional = GaussianConditional(None)
    table = np.exp(np.linspace(np.log(0.11), np.log(30), 20))
    conditional.update_scale_table(table.tolist())
    scales = torch.linspace(0.02, 35, 600).view(1, 6, 10, 10)
    means = torch.linspace(-3, 3, 600).view(1, 6, 10, 10)
    gaussians = Gaussians(conditional, scales, means, STEP)
    stored = conditional.scale_table.numpy()
    next_larger = np.searchsorted(stored[:-1], scales.numpy() / np.float32(STEP))
    assert np.array_equal(gaussians.indexes(scales.shape).numpy(), next_larger)
    use_coder_scales(conditional)
    v_hat = STEP * torch.ones_like(means) + means
    expected = probability(v_hat, torch.from_numpy(STEP * stored[next_larger]), means)
    p = gaussians.likelihood(v_hat).double()
    torch.testing.assert_close(p, expected.clamp_min(1e-9), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("name", SCALING)
def test_relaxed_losses_and_their_gradients_are_those_of_a_plain_model(name):
    """In float64, with a rounding that has a slope; y is rounded in steps."""
    model = copy.deepcopy(coarse(name))
    model.network.double()
    x = X.double()

    def smooth(v):
        return v + 0.1 * torch.sin(3 * v)

    latents = to_optimise(model.analyze(x))
    loss = problem_of(model, x, LMBDA).relaxed(latents, smooth).loss[0]
    plain = plainly(model, lambda group, step: smooth(
        (group.part.of(latents[group.name]) - group.centre) / step
    ))  # fmt: skip
    mse = (x_hat_of(model, plain.y_hat) - x).square().mean()
    expected = plain.bits / (70 * 90) + LMBDA * 255**2 * mse
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    both = (torch.autograd.grad(value, list(latents.values())) for value in (loss, expected))
    for ours, theirs in zip(*both, strict=True):
        close = 1e-5 * theirs.abs().max().item()
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=close)


def x_hat_of(model, y_hat):
    return model.network.g_s(y_hat)[:, :, : SIZE[0], : SIZE[1]]


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=needs("constriction")) if name in IN_TURN else name for name in SCALING
])  # fmt: skip
@torch.no_grad()
def test_a_file_has_the_symbols_the_length_and_the_picture(name):
    coder = build_coder(coarse(name))
    model = coder.model
    assert model.lattice == coder.exact.lattice == STEP
    latents = model.analyze(X)
    symbols = model.symbols(latents, SIZE)
    assert symbols["y"].unique().numel() >= 5
    data = encode_latents(coder, symbols, SIZE)
    decoded, size = decode_latents(coder, data)
    assert size == SIZE
    assert all(torch.equal(decoded[key], v) for key, v in symbols.items())
    plain = plainly(model, known(symbols))
    torch.testing.assert_close(model.place(symbols, SIZE).y_hat, plain.y_hat, rtol=0, atol=1e-5)
    # y_hat is the nearest point of a lattice that is coarser than the integers
    assert 0.55 < (latents["y"] - plain.y_hat).abs().max().item() < STEP / 2 + 1e-4
    x_hat = x_hat_of(model, plain.y_hat).clamp(0, 1)
    torch.testing.assert_close(decode_picture(coder, data), x_hat, rtol=0, atol=1e-5)
    strings = [len(group.string) for group in read_bitstream(data).groups]
    # each string has a few bytes more than its symbols need
    assert -2 < sum(strings) - plain.bits.item() / 8 < 9 * len(strings)


@torch.no_grad()
def test_symbols_in_turn_have_their_gaussians_in_steps():
    """What the coder is told, in float64, place by place."""
    model = coarse("mbt2018").in_float64()
    symbols = model.symbols(model.analyze(X), SIZE)
    _, _, ((_, scales, means),) = plainly(model, known(symbols))
    table, told = symbols["y"][0].flatten(1).t(), {}

    def symbols_at(positions, *gaussians):
        for position, *both in zip(positions.tolist(), *gaussians, strict=True):
            told[position] = torch.stack(both)
        return table[positions]

    distribution = model.place(symbols, SIZE).groups[1].distribution
    returned = distribution.in_turn(tuple(symbols["y"].shape), symbols_at)
    assert torch.equal(returned, symbols["y"])
    expected = torch.stack(((scales / STEP).clamp_min(0.11), means / STEP), -1)  # [1, M, h, w, 2]
    expected = expected[0].flatten(1, 2).permute(1, 2, 0)
    ours = torch.stack([told[position] for position in range(len(table))])
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", SCALING)
@torch.no_grad()
def test_a_step_of_1_changes_no_bit(name):
    default, explicit = toy(name), coarse(name).with_lattice(1)
    latents = default.analyze(X)
    walks = [model.round(latents, torch.round, SIZE) for model in (default, explicit)]
    assert torch.equal(walks[0].y_hat, walks[1].y_hat)
    for key, p in walks[0].likelihoods.items():
        assert torch.equal(walks[1].likelihoods[key], p)
    # as it is where no step is known
    value_of = rounded(latents, torch.round)
    for group in walks[0].groups:
        v = group.part.of(latents[group.name])
        assert torch.equal(value_of(group), torch.round(v - group.centre) + group.centre)
        if isinstance(group.distribution, Gaussians):
            conditional, scales, means, _ = group.distribution
            p = conditional._likelihood(v, scales, means).clamp_min(1e-9)
            assert torch.equal(group.distribution.likelihood(v), p)


def test_a_lattice_stays_with_the_copies_of_a_model():
    model = toy("mbt2018-mean")
    lattice = model.with_lattice(STEP)
    assert lattice.network is model.network
    assert (model.lattice, lattice.lattice, lattice.with_lattice(2).lattice) == (1, STEP, 2)
    assert lattice.copy_of(copy.deepcopy(model.network)).lattice == STEP
    assert lattice.in_float64().lattice == STEP
    assert type(lattice.in_float64()) is type(model)


# --- polish ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_a_polish_lowers_the_true_loss_on_the_lattice(name):
    model = freeze(copy.deepcopy(coarse(name)))
    latents, losses = model.analyze(X), []
    generator = torch.Generator().manual_seed(0)
    for passes in (2, 6):
        losses.append(true_terms(model, X, latents, LMBDA).loss.item())
        latents = polish(problem_of(model, X, LMBDA), latents, Pace(0, passes), generator)
        plain = plainly(model, known(model.symbols(latents, SIZE)))
        torch.testing.assert_close(latents["y"], plain.y_hat, rtol=0, atol=1e-4)
    losses.append(true_terms(model, X, latents, LMBDA).loss.item())
    assert losses[1] <= losses[0] * (1 + 1e-6)
    assert losses[2] <= losses[1] * (1 + 1e-6)
    assert losses[2] < 0.999 * losses[0]


def point_in_float64(name):
    """A float64 copy of a coarse toy, its integers, and what polish knows about them."""
    model = copy.deepcopy(coarse(name))
    model.network.double()
    latents = model.analyze(X.double())
    symbols = model.symbols(latents, SIZE)
    problem = problem_of(model, X.double(), LMBDA)
    with torch.no_grad():
        walk = model.round(latents, torch.round, SIZE)
        integers = polishing.first_integers(walk, latents)
        assert torch.equal(integers.int(), symbols["y"])
        point = polishing._point_of(problem, walk, integers)
    return model, {key: v.double() for key, v in symbols.items()}, problem, point


@pytest.mark.parametrize("name", KINDS)
def test_a_gradient_to_integers_is_that_of_the_plain_loss(name):
    """All but the symbol's own rate, by autograd; a step more than the gradient to y_hat."""
    model, symbols, _, point = point_in_float64(name)
    y = symbols["y"].requires_grad_()
    plain = plainly(model, known(symbols))
    error = LMBDA * 255**2 / 3 * (x_hat_of(model, plain.y_hat) - X.double()).square().sum()
    of_y = sum(-probability(*group).clamp_min(1e-9).log2().sum() for group in plain.groups)
    assert point.loss.item() == pytest.approx((of_y + error).item(), rel=1e-6)
    (whole,) = torch.autograd.grad(plain.bits + error, y)
    # Its own rate is that of a Gaussian which stays where it is: a small move changes nothing else.
    with torch.no_grad():
        ahead, behind = (
            [
                -probability(value + way * STEP * 1e-5, scales, means).log2()
                for value, scales, means in plain.groups
            ]
            for way in (1, -1)
        )
        slopes = tuple((a - b) / 2e-5 for a, b in zip(ahead, behind, strict=True))
        own = point.walk.whole((symbols["z"], *slopes))["y"]
    expected = whole - own
    close = 1e-5 * expected.abs().max().item()
    torch.testing.assert_close(point.gradient, expected, rtol=1e-4, atol=close)
    assert own.abs().max() > 1e-3 * expected.abs().max()  # it would be seen


def test_a_curvature_to_integers_is_that_of_a_dense_jacobian(monkeypatch):
    for name, value in {"PROBES": 100, "SPREAD": 1e6}.items():
        monkeypatch.setattr(polishing, name, value)
    model, _, problem, point = point_in_float64("mbt2018-mean")
    with torch.no_grad():
        drawn = polishing._curvature(problem, point, torch.Generator().manual_seed(0)).flatten()
        picked = torch.arange(0, drawn.numel(), 7)
        moves = STEP * torch.eye(drawn.numel(), dtype=torch.double)[picked]
        moves = 1e-4 * moves.view(-1, *point.y.shape[1:])
        up, down = (x_hat_of(model, point.walk.y_hat + move) for move in (moves, -moves))
        true = ((up - down) / 2e-4).square().sum((1, 2, 3))
    assert abs((drawn[picked] / true).mean().item() - 1) < 0.06


# --- who has no other lattice ---------------------------------------------------------------------

OWN = """
from architectures import Group
from architectures.distributions import Gaussians
from architectures.hyperpriors import MeanScale


class Deaf(MeanScale):
    powers = 0, 0

    def walk(self, size, value_of):
        scales, means = self.hyper_params(size, value_of).chunk(2, 1)
        of_rate, of_group = (self.lattice**power for power in self.powers)
        gaussians = Gaussians(self.network.gaussian_conditional, scales, means, of_rate)
        return value_of(Group("y", means, gaussians, step=of_group))


class Wrong(Deaf):
    powers = 0, 1


class Right(Deaf):
    powers = 1, 1


class Silent(Right):
    scales_lattice = False
"""


@pytest.fixture
def own(tmp_path):
    """The model of one of these classes."""
    path = tmp_path / "own.py"
    path.write_text(OWN)

    def build(name):
        return find_family(f"{path}:{name}")(toy("mbt2018-mean").network)

    return build


@torch.no_grad()
def test_a_class_of_ones_own_that_passes_the_step_has_the_lattice(own):
    model = own("Right").with_lattice(STEP)
    latents = model.analyze(X)
    ours, theirs = (true_terms(v, X, latents) for v in (model, coarse("mbt2018-mean")))
    assert torch.equal(ours.loss, theirs.loss)
    coder = build_coder(model)
    symbols = coder.model.symbols(latents, SIZE)
    decoded, _ = decode_latents(coder, encode_latents(coder, symbols, SIZE))
    assert all(torch.equal(decoded[key], v) for key, v in symbols.items())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Deaf", "Deaf has scales_lattice, so its walk must give step=self.lattice to the groups "
                 "of y and to their distributions, and to no others"),
        ("Wrong", "Wrong has scales_lattice, so its walk must"),
        ("Silent", "Silent does not set scales_lattice (architectures/base.py), so its lattice "
                   "cannot be coarser"),
    ],
)  # fmt: skip
def test_a_class_of_ones_own_that_ignores_the_step_is_refused(name, message, own):
    model = own(name)
    assert model.with_lattice(1).lattice == 1
    assert message in refusal(model)


@pytest.mark.parametrize("name", sorted({*NAMES} - {*SCALING}))
def test_a_model_without_scales_is_refused(name):
    model = toy(name)
    assert name.startswith("bmshj2018-factorized")
    assert refusal(model) == f"lattice: {name} has no scales, so its lattice cannot be coarser"
    assert model.with_lattice(1.0).lattice == 1


def test_a_model_that_is_refined_by_its_forward_is_refused():
    model = forwarded_family(ScaleHyperprior, "own.py:Mine")(ScaleHyperprior(8, 12))
    line = "lattice: own.py:Mine is refined by its own forward, so its lattice cannot be coarser"
    assert refusal(model) == line
    assert model.with_lattice(1).lattice == 1


@pytest.mark.parametrize("step", [0, -1.3, float("inf"), float("nan")])
def test_a_step_that_is_no_positive_number_is_refused(step):
    line = f"lattice: the step must be a number above 0, not {step}"
    assert refusal(toy("mbt2018-mean"), step) == line


def refusal(model, step=STEP):
    """The one line in which a model refuses a step."""
    with pytest.raises(InputError) as refused:
        model.with_lattice(step)
    assert "\n" not in str(refused.value)
    return str(refused.value)
