"""The families of this repository by their stock forward: as by our own walks, and as stock."""

import copy

import pytest
import torch
from compressai.models import (
    Cheng2020Anchor,
    Cheng2020AnchorCheckerboard,
    Elic2022Official,
    MeanScaleHyperprior,
)
from test_forwarded import SIZE, assert_near, gradients_of, smooth, spread

from architectures import AnchorCheckerboard, Elic, MeanScale
from architectures.forwarded import forwarded_family, strings_of
from common.errors import InputError
from models import freeze
from passes import problem_of, to_optimise, true_terms

MODELS = {
    "mean-scale": (MeanScale, lambda: MeanScaleHyperprior(8, 8)),
    "checkerboard": (AnchorCheckerboard, lambda: Cheng2020AnchorCheckerboard(8)),
    "elic": (Elic, lambda: Elic2022Official(8, 8, groups=[2, 2, 4])),
}


@pytest.fixture(scope="module", params=MODELS)
def pair(request):
    """A stock network, the same by its forward, and the same by our own walk."""
    family, build = MODELS[request.param]
    torch.manual_seed(0)
    network = spread(build())
    forwarded = forwarded_family(type(network))(copy.deepcopy(network))
    return network, forwarded, family(copy.deepcopy(network))


@pytest.fixture(scope="module")
def x():
    return torch.rand((1, 3, *SIZE), generator=torch.Generator().manual_seed(2))


def test_forward_and_own_walk_agree(pair, x):
    _, forwarded, own = pair
    assert forwarded.latent_shapes(SIZE) == own.latent_shapes(SIZE)
    latents = own.analyze(x)
    for name, v in forwarded.analyze(x).items():
        torch.testing.assert_close(v, latents[name], atol=1e-5, rtol=0)
    ours, truth = (true_terms(model, x, latents) for model in (forwarded, own))
    torch.testing.assert_close(ours.loss, truth.loss, rtol=1e-4, atol=0)
    for name, rate in truth.rates.items():
        torch.testing.assert_close(ours.rates[name], rate, rtol=1e-4, atol=0)
    for name, value in truth.walk.values.items():
        torch.testing.assert_close(ours.walk.values[name], value)
    gradients = []
    for model in (forwarded, own):
        moved = to_optimise(latents)
        relaxed = problem_of(model, x).relaxed(moved, smooth)
        gradients.append(gradients_of(relaxed.loss.sum(), moved))
    assert_near(*gradients)


def test_noise_is_drawn_as_in_the_own_walk(pair, x):
    """Each symbol is drawn once, in the same order."""
    _, forwarded, own = pair
    latents = own.analyze(x)
    losses = []
    for model in (forwarded, own):
        torch.manual_seed(0)
        walk = model.round(latents, lambda v: v + torch.rand(v.shape), SIZE)
        losses.append(problem_of(model, x)._terms(walk, *model.squared_error(walk.y_hat, x)).loss)
    torch.testing.assert_close(*losses, rtol=1e-4, atol=0)


def test_true_rounding_gives_the_stock_forward(pair, x):
    network, forwarded, _ = pair
    with torch.no_grad():
        stock = network(x)
        terms = true_terms(forwarded, x, forwarded.analyze(x))
    torch.testing.assert_close(terms.x_hat, stock["x_hat"], atol=1e-5, rtol=0)
    for name, p in stock["likelihoods"].items():
        bpp = -p.log2().sum() / (SIZE[0] * SIZE[1])
        torch.testing.assert_close(terms.rates[name].sum(), bpp, rtol=1e-4, atol=0)


def test_stock_strings_decode_to_the_reconstruction(pair, x):
    network, forwarded, _ = pair
    latents = {name: v + 0.7 * torch.randn_like(v) for name, v in forwarded.analyze(x).items()}
    symbols = forwarded.symbols(latents, SIZE)
    coded = strings_of(forwarded, symbols, SIZE)
    decoder = copy.deepcopy(network)
    decoder.update()
    with torch.no_grad():
        x_hat = decoder.decompress(**coded)["x_hat"]
    truth = forwarded.reconstruct(symbols, SIZE)
    torch.testing.assert_close(x_hat, truth, atol=1e-4, rtol=0)
    assert (
        truth - forwarded.reconstruct(forwarded.symbols(forwarded.analyze(x), SIZE), SIZE)
    ).any()


def test_freezing_changes_no_loss_and_no_layer(pair, x):
    network, forwarded, own = pair
    frozen = freeze(type(forwarded)(copy.deepcopy(network)))
    assert not any(weight.requires_grad for weight in frozen.network.parameters())
    latents = own.analyze(x)
    moved = to_optimise(latents)
    relaxed = problem_of(frozen, x).relaxed(moved, smooth)
    again = to_optimise(latents)
    truth = problem_of(own, x).relaxed(again, smooth)
    assert_near(gradients_of(relaxed.loss.sum(), moved), gradients_of(truth.loss.sum(), again))


def test_a_picture_of_any_size(pair):
    _, forwarded, _ = pair
    odd = torch.rand(1, 3, 70, 50)
    latents = forwarded.analyze(odd)
    assert {name: tuple(v.shape) for name, v in latents.items()} == forwarded.latent_shapes(
        (70, 50)
    )
    terms = true_terms(forwarded, odd, latents)
    assert terms.x_hat.shape == odd.shape
    symbols = forwarded.symbols(latents, (70, 50))
    x_hat = forwarded.reconstruct(symbols, (70, 50))
    torch.testing.assert_close(x_hat, terms.x_hat.clamp(0, 1), atol=1e-5, rtol=0)
    with pytest.raises(InputError, match="one picture at a time"):
        forwarded.analyze(torch.cat((odd, odd)))


def test_two_lattices_of_one_latent_become_the_first(x):
    """The stock model rounds y to integers for g_s, and around means for rates."""
    torch.manual_seed(0)
    network = spread(Cheng2020Anchor(8))
    model = forwarded_family(Cheng2020Anchor)(network)
    walk = model.round(model.analyze(x), torch.round, SIZE)
    assert [group.name for group in walk.groups] == ["z", "y"]
    with torch.no_grad():
        assert torch.equal(walk.y_hat, network(x)["x_hat"])
    with pytest.raises(InputError, match="its own decompress gives another picture"):
        strings_of(model, model.symbols(model.analyze(x), SIZE), SIZE)
