"""What the decoder is told: found for pictures whose truth is known, and applied."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import skimage
import torch
from toys import toy

from adaptation.fit import Adapter
from architectures.directions import Directions
from coding.adapted import adapted
from coding.bitstream import BitstreamError
from coding.payload import Adaptation, Numbers, to_bytes
from common.errors import InputError
from conftest import to_x
from fast.last_layer import LastLayer
from models import freeze
from objectives import Problem, RateDistortion
from refinement.adapting import AdaptedProblem
from schemas.adapt import Adapt

# A decoder that refinement fuses with the error, and two that it does not.
FAMILIES = ["mbt2018-mean", "bmshj2018-factorized-relu", "elic2022-official"]
FAMILY = FAMILIES[0]
C, K, SIZE, LMBDA = 12, 5, (80, 96), 0.01  # channels of a toy's last layer, directions
X = to_x(skimage.data.coffee()[100:180, 200:296])
ALONG, EACH_WEIGHT = 0, 1  # kinds of groups
MARK = b"\x12\xfe"


def some_directions():
    """Random directions of a toy."""
    generator = torch.Generator().manual_seed(0)
    shapes = (K, C, 3, 5, 5), (K, 3)
    return Directions(*(torch.randn(v, generator=generator) / 8 for v in shapes), "", MARK)


def model_with(directions, name=FAMILY, frozen=True):
    """A toy that finds these directions."""
    model = freeze(copy.deepcopy(toy(name))) if frozen else toy(name).with_lattice(1)
    model.find_directions = lambda: directions
    return model


def adapter_of(model, x, directions=True, lmbda=LMBDA, **options):
    """An adapter; no file of directions is read, for the model knows them."""
    options["directions"] = "any" if directions else None
    return Adapter(Problem(model, x, RateDistortion(lmbda)), Adapt(**options))


@torch.no_grad()
def stock_picture(name, y_hat, size, last=None):
    """x_hat by CompressAI's decoder in float64, with `last` added to its last layer."""
    g_s = copy.deepcopy(toy(name).network.g_s).double()
    if last is not None:
        g_s[-1].weight += last.weight
        g_s[-1].bias += last.bias
    return g_s(y_hat.double())[:, :, : size[0], : size[1]]


def told_change(told, directions):
    """What a file's numbers add to the last layer of a toy, in float64, number by number."""
    weight, bias = np.zeros((C, 3, 5, 5)), np.zeros(3)
    for kind, step, values in told.groups:
        for place, number in enumerate(value * 2 ** ((step - 192) / 4) for value in values):
            if kind == ALONG:
                weight += number * directions.weight[place].double().numpy()
                bias += number * directions.bias[place].double().numpy()
            else:
                weight[np.unravel_index(place, weight.shape)] += number
    return LastLayer(torch.from_numpy(weight), torch.from_numpy(bias))


@torch.no_grad()
def loss_of(adapter, told, latents):
    """The true loss of the adapted problem."""
    return adapter.problem(told).true(latents).loss.item()


# --- the fit --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    "options", [{"directions": True}, {"directions": False, "last_layer": True},
                {"directions": True, "last_layer": True}],
)  # fmt: skip
@torch.no_grad()
def test_a_fit_lowers_the_true_loss_with_the_bits_that_it_costs(name, options):
    directions = some_directions()
    model = model_with(directions, name)
    adapter = adapter_of(model, X, **options)
    lattice = Adaptation(0 if name == FAMILIES[1] else 5)
    plain, before = adapter.plain, (model.lattice, model.network.g_s)
    latents = model.analyze(X)
    told = adapter.fitted(latents, lattice)
    assert told.lattice == lattice.lattice
    wanted = [kind for kind, key in ((ALONG, "directions"), (EACH_WEIGHT, "last_layer"))
              if options.get(key)]  # fmt: skip
    assert [group.kind for group in told.groups] == wanted
    assert told.directions == (MARK if options["directions"] else b"")
    assert all(group.values[-1] for group in told.groups)
    assert loss_of(adapter, told, latents) < loss_of(adapter, lattice, latents)
    assert (model.lattice, model.network.g_s) == before
    # the loss once more, from the bytes and the stock decoder
    terms = adapter.problem(told).true(latents)
    walk = model.with_lattice(2 ** (told.lattice / 16)).round(latents, torch.round, SIZE)
    x_hat = stock_picture(name, walk.y_hat, SIZE, told_change(told, directions))
    pixels = SIZE[0] * SIZE[1]
    bits = -sum(p.double().log2().sum().item() for p in walk.group_likelihoods)
    data = to_bytes(told)
    bits += 8 * (len(data) + (1 if len(data) < 128 else 2))  # and the length in the file
    mse = (x_hat - X).square().mean().item()
    assert terms.loss.item() == pytest.approx(bits / pixels + LMBDA * 255**2 * mse, rel=1e-4)
    assert adapter.plain is plain
    assert plain.told_bits is None


@pytest.mark.parametrize("name", FAMILIES)
def test_the_factors_of_a_picture_are_found(name):
    """The picture is one of a last layer that was changed along the directions."""
    directions, truth = some_directions(), torch.tensor([0.3, -0.7, 0.0, 1.1, -0.05])
    model = model_with(directions, name)
    latents = model.analyze(X)
    y_hat = model.round(latents, torch.round, SIZE).y_hat
    change = LastLayer(*(torch.einsum("k,k...->...", truth.double(), v.double())
                         for v in directions[:2]))  # fmt: skip
    x = stock_picture(name, y_hat, SIZE, change).float()
    adapter = adapter_of(model, x)
    told = adapter.fitted(latents, Adaptation())
    # nothing is left for the weights themselves
    assert adapter_of(model, x, last_layer=True).fitted(latents, Adaptation()) == told
    (group,) = told.groups
    found = torch.zeros(K)
    found[: len(group.values)] = torch.tensor(group.values) * group.step_size
    assert (found - truth).abs().max() < 0.1
    # nearly as good as the truth, quantised
    rounded = Numbers(ALONG, group.step, tuple((truth / group.step_size).round().int().tolist()))
    best = loss_of(adapter, Adaptation(0, MARK, (rounded,)), latents)
    assert loss_of(adapter, told, latents) < best + 48 / (SIZE[0] * SIZE[1])
    mse = [adapter.problem(v).true(latents).mse.item() for v in (Adaptation(), told)]
    assert mse[1] < 0.01 * mse[0]


def test_the_weights_of_a_picture_are_found():
    """A few of the last layer's weights were changed; the picture is large enough to tell."""
    model = model_with(None)
    latents = model.analyze(X)
    y_hat = model.round(latents, torch.round, SIZE).y_hat
    weight = torch.zeros(C, 3, 5, 5)
    weight[3, 1, 2, 4], weight[7, 0, 0, 1] = 2.0, -2.0
    x = stock_picture(FAMILY, y_hat, SIZE, LastLayer(weight, torch.zeros(3))).float()
    adapter = adapter_of(model, x, directions=False, last_layer=True, lmbda=1)
    told = adapter.fitted(latents, Adaptation())
    mse = [adapter.problem(v).true(latents).mse.item() for v in (Adaptation(), told)]
    assert mse[1] < 0.02 * mse[0]


@pytest.mark.parametrize("last_layer", [False, True])
def test_nothing_is_told_where_nothing_is_gained(last_layer):
    model = model_with(some_directions())
    latents = model.analyze(X)
    y_hat = model.with_lattice(2 ** (3 / 16)).round(latents, torch.round, SIZE).y_hat
    x = stock_picture(FAMILY, y_hat, SIZE).float()
    adapter = adapter_of(model, x, last_layer=last_layer)
    assert adapter.fitted(latents, Adaptation(3)) == Adaptation(3)
    # what was told before is forgotten too
    before = Adaptation(3, MARK, (Numbers(ALONG, 190, (1,)),))
    assert adapter.fitted(latents, before) == Adaptation(3)


@pytest.mark.parametrize("lattice", [Adaptation(), Adaptation(4)])
def test_a_small_gain_pays_all_bits_of_the_file_or_is_left_out(lattice):
    """Also the bits of the flags, and those that say which directions."""
    directions = some_directions()
    model = model_with(directions)
    latents = model.analyze(X)
    y_hat = model.with_lattice(lattice.lattice_step).round(latents, torch.round, SIZE).y_hat
    last = LastLayer(directions.weight[0], directions.bias[0])
    plain = stock_picture(FAMILY, y_hat, SIZE)
    way = stock_picture(FAMILY, y_hat, SIZE, last) - plain
    bits_per_error, found = LMBDA * 255**2 / 3, set()
    for saved in (20, 30, 40, 50, 60, 70, 80, 90, 120):  # at most, in bits
        x = plain + way * (saved / bits_per_error / way.square().sum()) ** 0.5
        adapter = adapter_of(model, x.float())
        told = adapter.fitted(latents, lattice)
        found.add(len(told.groups))
        losses = [loss_of(adapter, v, latents) for v in (lattice, told)]
        assert losses[1] <= losses[0] + 1e-6, saved
    assert found == {0, 1}


@pytest.mark.parametrize("size", [(1, 40), (40, 1), (71, 91)])
def test_pictures_of_odd_size_are_fitted_too(size):
    model, x = model_with(some_directions()), X[:, :, : size[0], : size[1]].contiguous()
    latents = model.analyze(x)
    adapter = adapter_of(model, x, last_layer=True)
    told = adapter.fitted(latents, Adaptation(2))
    losses = [loss_of(adapter, v, latents) for v in (Adaptation(2), told)]
    assert (told == Adaptation(2)) == (1 in size)
    assert losses[1] < losses[0] or told == Adaptation(2)


@pytest.mark.parametrize("factor", [1e3, 1e5, 1e12, math.inf])
def test_latents_that_went_astray_give_nothing_that_no_file_can_have(factor):
    model = model_with(some_directions())
    adapter = adapter_of(model, X, last_layer=True)
    latents = {name: v * factor for name, v in model.analyze(X).items()}
    assert len(to_bytes(adapter.fitted(latents, Adaptation(4)))) > 0


def test_only_one_image_has_a_decoder_of_its_own():
    config = SimpleNamespace(adapt=Adapt(lattice=1.2), usual_lambda=LMBDA)
    problem = adapter_of(model_with(None), torch.cat((X, X))).plain
    with pytest.raises(ValueError, match="one image at a time"):
        AdaptedProblem(problem, config, Adaptation())


def test_directions_that_change_nothing_tell_nothing():
    none = Directions(torch.zeros(K, C, 3, 5, 5), torch.zeros(K, 3), "", MARK)
    model = model_with(none)
    assert adapter_of(model, X).fitted(model.analyze(X), Adaptation(2)) == Adaptation(2)


def test_weights_of_pixels_count_in_the_fit():
    """Where pixels weigh nothing, the picture has noise, which the fit does not see."""
    directions, truth = some_directions(), torch.tensor([0.3, -0.7, 0.2, 1.1, -0.5])
    model = model_with(directions)
    latents = model.analyze(X)
    y_hat = model.round(latents, torch.round, SIZE).y_hat
    change = LastLayer(*(torch.einsum("k,k...->...", truth, v) for v in directions[:2]))
    x = stock_picture(FAMILY, y_hat, SIZE, change).float()
    weights = torch.ones(1, 1, *SIZE)
    weights[:, :, 40:] = 0
    x[:, :, 40:] = 9
    problem = Problem(model, x, RateDistortion(LMBDA), weights=2 * weights)
    told = Adapter(problem, Adapt(directions="any")).fitted(latents, Adaptation())
    (group,) = told.groups
    assert len(group.values) == K
    assert (torch.tensor(group.values) * group.step_size - truth).abs().max() < 0.05


def test_without_a_fit_all_stays_as_it_is():
    model = model_with(some_directions())
    adapter = adapter_of(model, X, directions=False)
    told = Adaptation(3, MARK, (Numbers(ALONG, 190, (1,)),))
    assert adapter.fitted(model.analyze(X), told) is told


def test_fits_are_spread_evenly_over_a_schedule():
    adapter = adapter_of(model_with(None), X, fits=3)
    due, fits = [], 0
    for position in range(101):
        if adapter.due(position, 100, fits):
            due.append(position)
            fits += 1
    assert due == [25, 50, 75]
    assert not adapter_of(model_with(None), X, fits=0).due(100, 100, 0)


def test_the_lattice_follows_lambda():
    model = model_with(None)

    def step(lattice, lmbda):
        told = adapter_of(model, X, lattice=lattice, lmbda=lmbda).with_lattice(0.01)
        assert told == Adaptation(told.lattice)
        return told.lattice_step

    assert step(None, 0.01) == 1
    assert step(1.3, 0.01) == step(1.3, 0.1) == pytest.approx(1.3, rel=0.022)
    assert step("auto", 0.01) == pytest.approx(1.15, rel=0.022)
    assert step("auto", 0.005) == pytest.approx(1.15 * 2**0.35, rel=0.022)
    assert step("auto", 0.02) < 1


# --- models that are told something ---------------------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_an_adapted_model_decodes_as_stock_with_changed_weights(name, frozen):
    directions = some_directions()
    model = model_with(directions, name, frozen)
    values = tuple(np.random.default_rng(0).integers(-3, 4, C * 3 * 25 - 4).tolist())
    groups = Numbers(ALONG, 188, (1, 0, -2)), Numbers(EACH_WEIGHT, 176, values)
    y_hat = model.round(model.analyze(X), torch.round, SIZE).y_hat
    plain = model.synthesize(y_hat, SIZE)
    for used in (groups, groups[:1], groups[1:]):
        told = Adaptation(0, MARK if used[0].kind == ALONG else b"", used)
        expected = stock_picture(name, y_hat, SIZE, told_change(told, directions)).float()
        ours = adapted(model, told).synthesize(y_hat, SIZE)
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
        assert (ours - plain).abs().max() > 0.05
    assert torch.equal(adapted(model, Adaptation()).synthesize(y_hat, SIZE), plain)


def test_an_adapted_model_has_the_lattice():
    model = model_with(None)
    assert adapted(model, Adaptation(6)).lattice == np.float32(2 ** (6 / 16))
    assert adapted(model, Adaptation()).lattice == model.lattice == 1
    with pytest.raises(InputError, match="has no scales, so its lattice cannot be coarser"):
        adapted(toy("bmshj2018-factorized"), Adaptation(6))


FACTOR, WEIGHT = Numbers(ALONG, 190, (1,)), Numbers(EACH_WEIGHT, 190, (1,))


@pytest.mark.parametrize(
    ("told", "message"),
    [
        (Adaptation(0, b"\0\1", (FACTOR,)), r"other directions \(0001; these are 12fe\)"),
        (Adaptation(0, MARK, (Numbers(ALONG, 190, (1,) * 6),)), "more factors than there are"),
        (Adaptation(0, b"", (Numbers(EACH_WEIGHT, 190, (0,) * C * 75 + (1,)),)),
         "more numbers than the last layer has weights"),
        (Adaptation(0, b"", (FACTOR,)), "does not say which directions it needs"),
        (Adaptation(0, MARK, (WEIGHT,)), "does not say which directions it needs"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_model_is_refused(told, message):
    with pytest.raises(BitstreamError, match=message) as refused:
        adapted(model_with(some_directions()), told)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "told", "message"),
    [
        ("cheng2020-anchor", Adaptation(0, b"", (WEIGHT,)),
         "changes a last layer that cheng2020-anchor does not have"),
        (FAMILY, Adaptation(0, MARK, (FACTOR,)), "needs a file of directions: see --directions"),
    ],
)  # fmt: skip
def test_what_a_model_does_not_have_is_refused(name, told, message):
    with pytest.raises(BitstreamError, match=message):
        adapted(toy(name), told)
