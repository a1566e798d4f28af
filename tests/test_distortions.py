"""Distortions of the loss, refined through the frozen decoder: against CompressAI's own modules.

In float64, by autograd of `plain`, for the whole picture and in tiles.
"""

import copy

import numpy as np
import pytest
import skimage
import torch
from plain import plain_error, plain_ms_ssim, plain_rate
from toys import NAMES, toy

import objectives
from conftest import read_jsonl, to_x
from models import freeze
from objectives import DISTORTIONS, Problem, RateDistortion, distortion
from passes import to_optimise
from train_flexible_inference import main

FUSED, OTHER = "mbt2018-mean", "cheng2020-anchor"
SIZE = 176, 203  # 176 is a multiple of 16, 203 is odd


def smooth(v):
    """Stands for rounding; not a mere shift, so that y_hat depends on its means."""
    return v + 0.2 * v.sin()


@pytest.fixture(scope="module", params=[FUSED, OTHER])
def pair(request):
    """CompressAI's network and our frozen model of the same weights, in float64."""
    model = copy.deepcopy(toy(request.param))
    model.network.double()
    stock = copy.deepcopy(model.network)
    return stock, freeze(model)


def near(network, latents, photos):
    """Targets like what a toy decodes, which is like no photo: MS-SSIM would be about 0."""
    with torch.no_grad():
        decoded = network.g_s(latents["y"].round())[:, :, : photos.size(2), : photos.size(3)]
    return 0.5 + 0.8 * decoded + 0.1 * photos


@pytest.fixture(scope="module")
def task(pair):
    """Latents of two photos, and targets."""
    height, width = SIZE
    photos = skimage.data.coffee()[100:, 200:], skimage.data.astronaut()[30:, 150:]
    photos = torch.cat([to_x(photo[:height, :width]) for photo in photos]).double()
    stock, model = pair
    latents = model.analyze(photos)
    return latents, near(stock, latents, photos)


def maps(kind):
    """Weights of mean 1: none, or smooth ones that are 0 in half of the first picture."""
    if kind == "equal":
        return None
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(2, 1, 9, 7, dtype=torch.float64, generator=generator)
    weights = torch.nn.functional.interpolate(coarse, SIZE, mode="bilinear")
    weights[0, :, :, :100] = 0
    return weights / weights.mean((1, 2, 3), keepdim=True)


@pytest.fixture
def mean_absolute_error(monkeypatch):
    """A distortion of one's own, for one test."""
    monkeypatch.setattr(objectives, "DISTORTIONS", dict(DISTORTIONS))

    @distortion("mae", scale=255.0, least_side=70)
    def of_pictures(x_hat, x, weights):
        difference = (x_hat - x).abs()
        return (difference if weights is None else difference * weights).mean((1, 2, 3))


# What the loss has beside the rate, by the objective's name, for lambda 1.
PLAIN = {
    "mse": lambda *pictures: 255**2 * plain_error(*pictures),
    "ms-ssim": lambda *pictures: 1 - plain_ms_ssim(*pictures),
    "mae": lambda a, b, weights: (
        255 * ((a - b).abs() * (1 if weights is None else weights)).mean((1, 2, 3))
    ),
}
LMBDAS = {"mse": 1e-4, "ms-ssim": 30.0, "mae": 0.1}
OF_IMAGES = torch.tensor([1.0, -3.0], dtype=torch.float64)


@pytest.mark.usefixtures("mean_absolute_error")
@pytest.mark.parametrize("tile", [None, 4])
@pytest.mark.parametrize("kind", ["equal", "weighted"])
@pytest.mark.parametrize("name", PLAIN)
def test_loss_and_gradients_are_those_of_compressais_modules(
    pair, task, name, kind, tile, monkeypatch
):
    monkeypatch.setattr("fast.decoder.STRIP_BYTES", 2**17)  # a few rows
    (stock, model), (latents, x) = pair, task
    weights, lmbda = maps(kind), LMBDAS[name]
    ours, theirs = to_optimise(latents), to_optimise(latents)
    problem = Problem(model, x, RateDistortion(lmbda, name), tile, weights=weights)
    terms = problem.relaxed(ours, smooth)
    (terms.loss * OF_IMAGES).sum().backward()
    bpp, y_hat = plain_rate(stock, theirs, smooth, SIZE)
    x_hat = stock.g_s(y_hat)[:, :, : SIZE[0], : SIZE[1]]
    counted = PLAIN[name](x_hat, x, weights)
    loss = bpp + lmbda * counted
    (loss * OF_IMAGES).sum().backward()
    exact = {"rtol": 1e-9, "atol": 0}
    torch.testing.assert_close(terms.loss, loss, **exact)
    torch.testing.assert_close(terms.bpp, bpp, **exact)
    # all parts are large enough to be seen
    assert (lmbda * counted > 1e-3 * loss).all() and (bpp > 1e-3 * loss).all()
    assert name != "ms-ssim" or (counted < 0.9).all()
    torch.testing.assert_close(terms.mse, plain_error(x_hat, x), **exact)
    torch.testing.assert_close(terms.x_hat, x_hat, rtol=1e-9, atol=1e-12)
    for key, mine in ours.items():
        expected = theirs[key].grad
        scale = expected.abs().amax((1, 2, 3), keepdim=True)
        assert (scale > 0).all()
        torch.testing.assert_close(mine.grad / scale, expected / scale, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["ms-ssim", "mse"])
def test_the_true_loss_is_that_of_rounded_latents(pair, task, name):
    """The same for rounding itself, in tiles, and image by image, each with its own weights."""
    (stock, model), (latents, x) = pair, task
    weights, lmbda = maps("weighted"), LMBDAS[name]
    problem = Problem(model, x, RateDistortion(lmbda, name), 4, weights=weights)
    with torch.no_grad():
        bpp, y_hat = plain_rate(stock, latents, torch.round, SIZE)
        x_hat = stock.g_s(y_hat)[:, :, : SIZE[0], : SIZE[1]]
        loss = bpp + lmbda * PLAIN[name](x_hat, x, weights)
        torch.testing.assert_close(problem.true(latents).loss, loss, rtol=1e-9, atol=0)
        for index, alone in enumerate(problem.images()):
            own = {key: v[index : index + 1] for key, v in latents.items()}
            torch.testing.assert_close(alone.true(own).loss[0], loss[index], rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_every_architecture_refines_ms_ssim(name):
    """In float32, with the stock g_s for the picture."""
    photo = to_x(skimage.data.coffee()[100:263, 200:361])
    model = freeze(copy.deepcopy(toy(name)))
    latents = to_optimise(model.analyze(photo))
    x = near(toy(name).network, latents, photo)
    problem = Problem(model, x, RateDistortion(30.0, "ms-ssim"))
    terms = problem.relaxed(latents, smooth)
    with torch.no_grad():
        x_hat = toy(name).network.g_s(terms.walk.y_hat)[:, :, :163, :161].double()
    expected = terms.bpp + 30 * (1 - plain_ms_ssim(x_hat, x.double()))
    torch.testing.assert_close(terms.loss.double(), expected, rtol=1e-4, atol=0)
    seen = []
    for whole, of_rate in zip(
        torch.autograd.grad(terms.loss, list(latents.values()), retain_graph=True),
        torch.autograd.grad(terms.bpp, list(latents.values())),
        strict=True,
    ):
        assert whole.isfinite().all() and whole.abs().max() > 0
        seen.append((whole - of_rate).abs().max() / of_rate.abs().max())
    assert terms.distortion < 0.9
    assert max(seen) > 1e-3  # y, and z where y's lattice depends on it, reach the picture


@pytest.mark.usefixtures("mean_absolute_error")
def test_a_distortion_of_ones_own_is_refined_by_a_run(
    model, config_values, write_config, tmp_path, capsys
):
    """Its record's loss is that of the latents that it wrote; too small images are named."""
    config_values |= {"objective": "mae", "tot_inference_iterations": 60, "eval_freq": 10}
    config_values["dev_options"] |= {"inference_lambda": 0.2, "temp_rate": 0.05}
    assert main(["--config", str(write_config(config_values))]) == 1
    out = capsys.readouterr().out
    assert "b_coffee.png: skipped: has 64x64 pixels; the objective mae needs 70 or more" in out
    (row,) = read_jsonl(tmp_path / "results/run/images.jsonl")
    stored = np.load(tmp_path / "results/run/latents/a_chelsea.png.npz")
    symbols = {name: torch.from_numpy(stored[name])[None] for name in ("y", "z")}
    x = to_x(skimage.data.chelsea()[60:131, 100:181])
    walk = model.place(symbols, (71, 81))
    x_hat = model.network.g_s(walk.y_hat)[:, :, :71, :81]
    distortion = PLAIN["mae"](x_hat, x, None).item()
    bits = sum(-p.double().log2().sum().item() for p in walk.likelihoods.values())
    loss = bits / (71 * 81) + 0.2 * distortion
    assert row["refined"]["distortion"] == pytest.approx(distortion / 255, rel=1e-5)
    assert row["refined"]["true_loss"] == pytest.approx(loss, rel=1e-5)
    assert row["refined"]["true_loss"] < 0.97 * row["base"]["true_loss"]
    assert row["objective"] == "mae"
