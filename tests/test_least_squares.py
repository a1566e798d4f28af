"""The squared error as a function of the last layer, against stock CompressAI in float64."""

import copy
from functools import cache

import pytest
import skimage
import torch
from torch import nn
from toys import toy

from adaptation.least_squares import Quadratic, from_columns, quadratic_of, to_columns
from conftest import to_x
from fast.last_layer import LastLayer, input_of_last_layer, last_layer_of, with_last_layer
from fast.tiles import STRIDE
from models import freeze
from objectives import Problem, RateDistortion

# A decoder that refinement fuses with the error, and two that it does not.
FAMILIES = ["mbt2018-mean", "bmshj2018-factorized-relu", "elic2022-official"]
COFFEE = to_x(skimage.data.coffee())
C = 12  # channels of the last layer's input in a toy


@cache
def model_of(name, frozen):
    """A toy, frozen or not; do not change it."""
    return freeze(copy.deepcopy(toy(name))) if frozen else toy(name)


def problem_of(model, x, weights=None):
    """The problem that x [1, 3, H, W] poses to the model."""
    return Problem(model, x, RateDistortion(0.01), weights=weights)


def crop(height, width):
    """x [1, 3, height, width] of a photo beside its mirror image, or of that turned."""
    x = torch.cat((COFFEE, COFFEE.flip(3)), 3)
    x = x if height <= x.size(2) else x.transpose(2, 3)
    return x[:, :, :height, :width].contiguous()


@torch.no_grad()
def y_hat_of(model, size):
    """The rounded y of a photo, [1, M, h, w]."""
    return model.round(model.analyze(crop(*size)), torch.round, size).y_hat


def some_change(seed, scale=0.05):
    """A change of a toy's last layer, in float64."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (C, 3, 5, 5), (3,)
    return LastLayer(*(torch.randn(v, generator=generator).double() * scale for v in shapes))


def stock_decoder(name, change=None):
    """A toy's decoder in float64, with a change added to its last layer, which has gradients."""
    g_s = copy.deepcopy(toy(name).network.g_s).double()
    if change is not None:
        g_s[-1].weight += change.weight
        g_s[-1].bias += change.bias
    g_s[-1].requires_grad_()
    return g_s


def error_of(g_s, y_hat, x, weights=None):
    """The summed squared error of a decoder in float64."""
    picture = g_s(y_hat.double())[:, :, : x.size(2), : x.size(3)]
    return ((picture - x.double()) ** 2 * (1 if weights is None else weights)).sum()


def columns_of(last):
    """[C * 25 + 1, 3], colour by colour."""
    return torch.stack([
        torch.cat((last.weight[:, colour].reshape(-1), last.bias[colour : colour + 1]))
        for colour in range(3)
    ], 1)  # fmt: skip


def value(error, d):
    """What a `Quadratic` says of a change [P, 3]."""
    return (error.error - 2 * (d * error.slope).sum() + (d * (error.gram @ d)).sum()).item()


def assert_tells_the_error(error, name, y_hat, x, weights=None):
    """A `Quadratic` is the error of the stock decoder for any change, with its slope."""
    g_s = stock_decoder(name)
    plain = error_of(g_s, y_hat, x, weights)
    assert error.error == pytest.approx(plain.item(), rel=1e-5)
    of_layer = torch.autograd.grad(plain, [g_s[-1].weight, g_s[-1].bias])
    slope = -columns_of(LastLayer(*of_layer)) / 2
    close = 1e-5 * slope.abs().max().item()
    torch.testing.assert_close(error.slope, slope, rtol=1e-4, atol=close)
    torch.testing.assert_close(error.gram, error.gram.T, rtol=1e-5, atol=1e-5)
    for seed, scale in enumerate((1e-3, 0.01, 0.1)):
        change = some_change(seed, scale)
        expected = error_of(stock_decoder(name, change), y_hat, x, weights).item()
        assert value(error, columns_of(change)) == pytest.approx(expected, rel=1e-4)


# --- the sums over a picture ----------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 128), (70, 90), (16, 2)])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_error_is_that_of_the_stock_decoder(name, frozen, size):
    model, x = model_of(name, frozen), crop(*size)
    y_hat = y_hat_of(model, size)
    assert_tells_the_error(quadratic_of(problem_of(model, x), y_hat), name, y_hat, x)


@pytest.mark.parametrize("size", [(71, 91), (64, 65), (33, 48)])
def test_half_covered_rows_and_columns_are_left_out(size):
    name = "mbt2018-mean"
    model, x = model_of(name, True), crop(*size)
    y_hat = y_hat_of(model, size)
    covered = x[:, :, : size[0] // 2 * 2, : size[1] // 2 * 2]
    assert_tells_the_error(quadratic_of(problem_of(model, x), y_hat), name, y_hat, covered)


@pytest.mark.parametrize("size", [(20, 1), (1, 20), (1, 1)])
def test_a_picture_of_half_covered_pixels_alone_has_no_error(size):
    model = model_of("mbt2018-mean", True)
    error = quadratic_of(problem_of(model, crop(*size)), y_hat_of(model, size))
    assert error.error == 0
    assert not error.slope.any()
    assert not error.gram.any()


@pytest.mark.parametrize("name", FAMILIES[:2])
def test_pixels_count_by_their_weights(name):
    model, x = model_of(name, True), crop(70, 90)
    y_hat = y_hat_of(model, (70, 90))
    weights = torch.rand(1, 1, 70, 90, generator=torch.Generator().manual_seed(2))
    weights[:, :, 20:40] = 0
    weights /= weights.mean()
    problem = problem_of(model, x, weights)
    assert_tells_the_error(quadratic_of(problem, y_hat), name, y_hat, x, weights)


# The last column of the last one's second tile is half-covered, and there is no other one.
@pytest.mark.parametrize("size", [(32, 1100), (1100, 32), (20, 514), (20, 513)])
def test_tiles_give_the_whole_pictures_error(size):
    name = "mbt2018-mean"
    model, x = model_of(name, True), crop(*size)
    y_hat = y_hat_of(model, size)
    covered = x[:, :, : size[0] // 2 * 2, : size[1] // 2 * 2]
    assert_tells_the_error(quadratic_of(problem_of(model, x), y_hat), name, y_hat, covered)


@pytest.mark.parametrize(("name", "side"), [("mbt2018-mean", 1), ("elic2022-official", 3)])
@pytest.mark.parametrize("weighted", [False, True])
def test_small_tiles_and_few_rows_at_a_time_give_the_same(name, side, weighted, monkeypatch):
    model, size = model_of(name, True), (70, 107)
    x, y_hat, weights = crop(*size), y_hat_of(model, size), None
    if weighted:
        weights = torch.rand(1, 1, *size, generator=torch.Generator().manual_seed(3))
    problem = problem_of(model, x, weights)
    whole = quadratic_of(problem, y_hat)
    monkeypatch.setattr("adaptation.least_squares.SIDE", side)
    monkeypatch.setattr("adaptation.least_squares.COLUMNS", 40)
    tiled = quadratic_of(problem, y_hat)
    assert tiled.error == pytest.approx(whole.error, rel=1e-6)
    for ours, expected in zip(tiled[1:], whole[1:], strict=True):
        close = 1e-5 * expected.abs().max().item()
        torch.testing.assert_close(ours, expected, rtol=0, atol=close)


def test_of_a_large_picture_every_second_tile_is_looked_at_and_scaled_up(monkeypatch):
    name, tile = "elic2022-official", 3
    model, size = model_of(name, True), (16 * tile, 32 * tile)
    half = (slice(None), slice(None), slice(None), slice(16 * tile))
    x, y_hat = crop(*size), y_hat_of(model, size)
    first = torch.zeros(1, 1, *size)
    first[half] = 1  # the first of the two tiles is all that counts
    monkeypatch.setattr("adaptation.least_squares.SIDE", tile)
    expected = quadratic_of(problem_of(model, x, first), y_hat)
    monkeypatch.setattr("adaptation.least_squares.MOST_PIXELS", x[0, 0].numel() // 2)
    sampled = quadratic_of(problem_of(model, x), y_hat)
    assert sampled.error == pytest.approx(2 * expected.error, rel=1e-6)
    for ours, whole in zip(sampled[1:], expected[1:], strict=True):
        close = 1e-5 * whole.abs().max().item()
        torch.testing.assert_close(ours, 2 * whole, rtol=0, atol=close)


def test_a_decoder_with_another_last_layer_is_refused():
    model = model_of("cheng2020-anchor", True)
    with pytest.raises(ValueError, match="does not end with a transposed convolution"):
        quadratic_of(problem_of(model, crop(64, 64)), torch.zeros(1, C, 4, 4))


# --- the function itself --------------------------------------------------------------------------


@pytest.fixture
def random_error():
    """A `Quadratic` of 2 channels, and changes [4, 51, 3] in float64."""
    generator = torch.Generator().manual_seed(0)
    root, slope, changes = (torch.randn(shape, generator=generator, dtype=torch.float64)
                            for shape in ((51, 60), (51, 3), (4, 51, 3)))  # fmt: skip
    return Quadratic(1234.5, slope, root @ root.T), changes


def test_the_error_after_a_change_is_a_function_of_further_changes(random_error):
    error, (first, *others) = random_error
    moved = error.at(first)
    assert moved.error == pytest.approx(value(error, first), rel=1e-12)
    for d in others:
        assert value(moved, d) == pytest.approx(value(error, first + d), rel=1e-12)


def test_the_error_along_directions_is_a_function_of_their_factors(random_error):
    error, directions = random_error
    slope, gram = error.along(directions)
    assert (slope.shape, gram.shape) == ((4,), (4, 4))
    factors = torch.tensor([0.3, -2, 0, 1.7], dtype=torch.float64)
    change = sum(factor * one for factor, one in zip(factors, directions, strict=True))
    along = error.error - 2 * factors @ slope + factors @ gram @ factors
    assert along.item() == pytest.approx(value(error, change), rel=1e-12)


def test_columns_have_each_weight_of_a_colour_and_then_its_bias():
    last = some_change(0)
    columns = to_columns(*last)
    assert torch.equal(columns, columns_of(last))
    assert columns[7 * 25 + 3 * 5 + 4, 2] == last.weight[7, 2, 3, 4]
    assert torch.equal(columns[-1], last.bias)
    back = from_columns(columns)
    assert torch.equal(back.weight, last.weight)
    assert torch.equal(back.bias, last.bias)
    several = to_columns(*(torch.stack((v, 2 * v)) for v in last))
    assert torch.equal(several, torch.stack((columns, 2 * columns)))


# --- decoders with another last layer -------------------------------------------------------------


KINDS = [(name, frozen) for name in FAMILIES for frozen in (False, True)]


@pytest.mark.parametrize(("name", "frozen"), KINDS)
@torch.no_grad()
def test_the_last_layer_and_its_input_are_the_stock_decoders(name, frozen):
    g_s, size = model_of(name, frozen).network.g_s, (70, 90)
    last, stock = last_layer_of(g_s), toy(name).network.g_s
    assert torch.equal(last.weight, stock[-1].weight)
    assert torch.equal(last.bias, stock[-1].bias)
    assert not last.weight.requires_grad
    y_hat = y_hat_of(model_of(name, frozen), size)
    expected = stock_decoder(name)[:-1](y_hat.double())
    assert expected.shape == (1, C, 5 * STRIDE // 2, 6 * STRIDE // 2)
    ours = input_of_last_layer(g_s, y_hat).double()
    close = 1e-5 * expected.abs().max().item()
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=close)


@pytest.mark.parametrize(("name", "frozen"), KINDS)
def test_a_model_with_another_last_layer_decodes_and_differentiates_as_stock(name, frozen):
    old, size, change = model_of(name, frozen), (70, 90), some_change(4)
    y_hat, x = y_hat_of(old, size), crop(*size)
    weight, bias = last_layer_of(old.network.g_s)
    before = weight.clone(), old.synthesize(y_hat, size)
    new = old.with_last_layer(LastLayer(weight + change.weight.float(), bias + change.bias.float()))
    stock = stock_decoder(name, change)
    to_y_hat, expected = (v.detach().clone().requires_grad_() for v in (y_hat, y_hat.double()))
    error, x_hat = new.squared_error(to_y_hat, x)
    plain = error_of(stock, expected, x)
    assert error.item() == pytest.approx(plain.item(), rel=1e-5)
    picture = stock(expected)[:, :, : size[0], : size[1]].float()
    for ours in (x_hat, new.synthesize(y_hat, size), new.synthesize(y_hat, size, tile=3)):
        torch.testing.assert_close(ours, picture, rtol=1e-4, atol=1e-4)
    error.sum().backward()
    plain.backward()
    close = 1e-4 * expected.grad.abs().max().item()
    torch.testing.assert_close(to_y_hat.grad.double(), expected.grad, rtol=1e-3, atol=close)
    assert (picture - before[1]).abs().max() > 0.01
    assert torch.equal(last_layer_of(old.network.g_s).weight, before[0])
    assert torch.equal(old.synthesize(y_hat, size), before[1])


@pytest.mark.parametrize(("name", "frozen"), KINDS)
def test_models_share_all_but_their_last_layers(name, frozen):
    old = model_of(name, frozen).with_lattice(1)
    old.find_directions = lambda: None
    new = old.with_last_layer(LastLayer(*(v.float() for v in some_change(4))))
    assert type(new) is type(old)
    assert new.find_directions is old.find_directions
    assert new.network is not old.network
    theirs = {v.data_ptr() for v in old.network.state_dict().values()}
    own = [key for key, v in new.network.state_dict().items()
           if v.numel() and v.data_ptr() not in theirs]  # fmt: skip
    assert own
    assert all(key.startswith("g_s.") for key in own)
    last = "to_picture." if frozen and name == FAMILIES[0] else f"{len(toy(name).network.g_s) - 1}."
    assert all(key.startswith(f"g_s.{last}") for key in own)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_new_last_layer_is_used_in_half_precision_too(name):
    """A frozen decoder keeps a copy in half precision, here with the old last layer."""
    old, size, change = model_of(name, True), (64, 64), some_change(5)
    y_hat, x = y_hat_of(old, size), crop(*size)
    weight, bias = last_layer_of(old.network.g_s)
    stock = [stock_decoder(name, one)(y_hat.double()).float() for one in (None, change)]
    with torch.autocast("cpu", torch.bfloat16):
        first = old.synthesize(y_hat, size)
        new = old.with_last_layer(
            LastLayer(weight + change.weight.float(), bias + change.bias.float())
        )
        pictures = first, new.synthesize(y_hat, size), old.synthesize(y_hat, size)
        _, fused = new.squared_error(y_hat, x)
    assert new.synthesize(y_hat, size).dtype == torch.float32
    for ours, expected in zip((*pictures, fused), (*stock, stock[0], stock[1]), strict=True):
        assert (ours - expected).norm() < 0.02 * expected.norm()
    assert (stock[0] - stock[1]).norm() > 0.1 * stock[1].norm()


def test_decoders_without_such_a_last_layer_have_none():
    class Clipped(nn.Sequential):
        """Does more than its layers."""

        def forward(self, v):
            return super().forward(v).clamp(0, 1)

    layers = toy("mbt2018-mean").network.g_s
    other_kernel = nn.ConvTranspose2d(C, 3, 3, stride=2, padding=1, output_padding=1)
    assert last_layer_of(layers) is not None
    for g_s in (None, nn.Sequential(), nn.Sequential(*layers[:-1]), nn.ModuleList(layers),
                nn.Sequential(*layers[:-1], other_kernel), Clipped(*layers)):  # fmt: skip
        assert last_layer_of(g_s) is None
    model = model_of("cheng2020-anchor", False)
    with pytest.raises(ValueError, match="does not end with a transposed convolution"):
        model.with_last_layer(last_layer_of(layers))


def test_a_decoder_itself_stays_as_it_is():
    g_s = toy("mbt2018-mean").network.g_s
    before = g_s[-1].weight.clone()
    new = with_last_layer(g_s, LastLayer(before + 1, g_s[-1].bias))
    assert torch.equal(g_s[-1].weight, before)
    assert torch.equal(new[-1].weight, before + 1)
    assert new[0] is g_s[0]
