"""The loss, from its formula; and the problem that it poses."""

import pytest
import torch

from config import RefineConfig, Target
from objectives import DISTORTIONS, Problem, RateDistortion
from passes import problem_of, to_optimise, true_terms


@pytest.mark.parametrize("lmbda", [0.0, 0.0016, 0.01, 0.18])
def test_the_loss_is_its_formula(lmbda):
    """bpp + lambda * 255^2 * MSE in float64, for numbers and for tensors, and its gradient."""
    objective = RateDistortion(lmbda)
    bpp = torch.tensor([0.0, 0.31, 2.5], dtype=torch.float64, requires_grad=True)
    mse = torch.tensor([1e-4, 7.3e-4, 0.02], dtype=torch.float64, requires_grad=True)
    expected = [b + lmbda * 65025 * d for b, d in zip(bpp.tolist(), mse.tolist(), strict=True)]
    loss = objective(bpp, mse)
    assert loss.tolist() == pytest.approx(expected, rel=1e-14)
    assert objective(0.31, 7.3e-4) == pytest.approx(expected[1], rel=1e-14)
    weights = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    to_bpp, to_mse = torch.autograd.grad(loss, (bpp, mse), weights)
    assert to_bpp.tolist() == [1, -2, 3]
    assert to_mse.tolist() == pytest.approx([lmbda * 65025 * w for w in (1, -2, 3)], rel=1e-14)


def test_a_squared_error_weighs_so_many_bits(small):
    """An image's bits and its squared error, added by hand, are its loss times its pixels."""
    x = torch.rand(2, 3, 70, 40)
    latents = {name: 3 * v for name, v in small.analyze(x).items()}
    terms = true_terms(small, x, latents, lmbda=0.02)
    walk = small.round(latents, torch.round, (70, 40))
    bits = sum(-p.double().log2().flatten(1).sum(1) for p in walk.likelihoods.values())
    error = (small.network.g_s(walk.y_hat)[:, :, :70, :40] - x).double().square().flatten(1).sum(1)
    loss = (bits + RateDistortion(0.02).bits_per_error() * error) / (70 * 40)
    torch.testing.assert_close(terms.loss.double(), loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(terms.mse.double(), error / (3 * 70 * 40), rtol=1e-5, atol=0)
    assert terms.loss[0] != terms.loss[1]


def test_the_gradient_is_that_of_the_formula(small):
    """By its parts: of all rates, and lambda * 255^2 times that of the mean squared error."""
    x = torch.rand(1, 3, 70, 40)
    latents = {name: 3 * v for name, v in small.analyze(x).items()}
    parts = {}
    for part in ("loss", "bpp", "mse"):
        moved = to_optimise(latents)
        # Not a mere shift: y_hat would not depend on its means, and so not on z.
        terms = problem_of(small, x, lmbda=0.02).relaxed(moved, lambda v: v + 0.2 * v.sin())
        parts[part] = torch.autograd.grad(getattr(terms, part).sum(), list(moved.values()))
    for loss, bpp, mse in zip(parts["loss"], parts["bpp"], parts["mse"], strict=True):
        assert bpp.abs().max() > 0 and mse.abs().max() > 0
        torch.testing.assert_close(loss, bpp + 0.02 * 65025 * mse, rtol=1e-4, atol=1e-6)


def test_a_problem_at_another_lambda_and_of_each_image(small):
    x = torch.rand(2, 3, 64, 64)
    latents = small.analyze(x)
    problem = problem_of(small, x, lmbda=0.02, tile=2)
    terms, other = problem.true(latents), problem.at(0.5).true(latents)
    torch.testing.assert_close(other.loss - terms.loss, 0.48 * 65025 * terms.mse)
    assert torch.equal(other.bpp, terms.bpp)
    for index, own in enumerate(problem.images()):
        alone = own.true({name: v[index : index + 1] for name, v in latents.items()})
        assert (own.size, own.pixels, own.tile) == ((64, 64), 4096, 2)
        torch.testing.assert_close(alone.loss[0], terms.loss[index], rtol=1e-5, atol=0)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_mse_that_is_registered_is_that_of_the_fused_path(small, weighted):
    x = torch.rand(2, 3, 70, 40)
    weights = torch.rand(2, 1, 70, 40) if weighted else None
    walk = small.round(small.analyze(x), torch.round, (70, 40))
    with torch.no_grad():
        problem = Problem(small, x, RateDistortion(0.01), weights=weights)
        fused, x_hat = problem.distortion(walk.y_hat)
    squares = (x_hat - x).double().square() * (1 if weights is None else weights)
    expected = squares.mean((1, 2, 3))
    torch.testing.assert_close(fused.double(), expected, rtol=1e-5, atol=0)
    registered = DISTORTIONS["mse"].of(x_hat, x, weights).double()
    torch.testing.assert_close(registered, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("train_lambda", "objective", "usual"), [
    (0.02, "mse", 0.02), (8.73, "ms-ssim", 8.73), (0.02, "ms-ssim", 13.0), (8.73, "mse", 0.01),
])  # fmt: skip
def test_a_target_is_searched_about_a_lambda_of_the_same_loss(
    config_values, train_lambda, objective, usual
):
    config_values["dev_options"]["inference_lambda"] = 13.0 if objective == "ms-ssim" else 0.01
    config = RefineConfig.model_validate(
        config_values | {"train_lambda": train_lambda, "objective": objective, "target_psnr": 30.0}
    )
    assert config.usual_lambda == usual
    assert config.target.in_words(30) == "30.00 dB"


def test_a_target_says_what_it_is():
    assert Target("ms_ssim_db", 15).in_words(15.002) == "MS-SSIM 15.00 dB"
    assert Target("bpp", 0.3).in_words(0.31) == "0.3100 bpp"
