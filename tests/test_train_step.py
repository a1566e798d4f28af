"""One step of pre-training: its loss, its gradients, its learning rate and its counts."""

import math

import numpy as np
import pytest
import skimage
import torch
from pydantic import ValidationError

from architectures.distributions import FactorizedPrior
from common.processes import Ranks
from config import PretrainConfig
from conftest import to_x
from models import build_model
from objectives import RateDistortion
from pretraining.step import TrainingState, build_optimizers, train_step
from pretraining.training_pass import TrainingPass
from pretraining.window import Window
from schemas.pretrain import LearningRate
from trainings import assert_same

ALONE = Ranks(0, 1, 0)


@pytest.mark.parametrize("quantization", ["noise", "mixed", "rounded"])
def test_the_loss_is_the_paper_s_written_again(monkeypatch, quantization):
    """bpp + lambda 255^2 MSE, with the noise that was drawn, from CompressAI's parts in float64.

    With `mixed`, h_s and g_s get rounded latents (arXiv 2007.08739), and gradients pass rounding.
    With `rounded`, the rates get them too, and no noise is drawn.
    """
    torch.manual_seed(0)
    model = build_model(PretrainConfig(
        train_lambda=0.02, channels={"N": 8, "M": 12}, save_name="x", train_folder="x"
    ).channels)  # fmt: skip
    x = to_x(skimage.data.astronaut()[:128, :64])
    noises = []

    def uniform(self, low, high):
        assert (low, high) == (-0.5, 0.5)
        noises.append(torch.rand(self.shape) - 0.5)
        return self.copy_(noises[-1])

    monkeypatch.setattr(torch.Tensor, "uniform_", uniform)
    with torch.no_grad():
        model.network.entropy_bottleneck.quantiles[:, 0, 1] = 0.3  # the medians
        # So that not all of y is rounded to the means, and no likelihood is below its bound.
        model.network.g_a[-1].weight *= 30
        model.network.h_s[-1].bias[:12] = 3  # the scales
    training = TrainingPass(model, RateDistortion(0.02), quantization=quantization)
    terms = training(x)
    monkeypatch.undo()
    terms["loss"].backward()
    ours = model.network.g_a[0].weight.grad.double()
    network, x = model.network.double(), x.double()
    y = network.g_a(x)
    z = network.h_a(y)
    assert len(noises) == (0 if quantization == "rounded" else 2)
    noisy_z, noisy_y = (v + noise for v, noise in zip((z, y), noises or (0, 0), strict=True))
    rounded_z = z + ((z - 0.3).round() + 0.3 - z).detach()
    z_hat = rounded_z if quantization == "rounded" else noisy_z
    z_decoded = noisy_z if quantization == "noise" else rounded_z
    scales, means = network.h_s(z_decoded).chunk(2, 1)
    rounded_y = y + ((y - means).round() + means - y).detach()
    y_hat = rounded_y if quantization == "rounded" else noisy_y
    y_decoded = noisy_y if quantization == "noise" else rounded_y
    normal = torch.distributions.Normal(means, scales.clamp_min(0.11))
    p_y = (normal.cdf(y_hat + 0.5) - normal.cdf(y_hat - 0.5)).clamp_min(1e-9)
    p_z = network.entropy_bottleneck._likelihood(z_hat.permute(1, 0, 2, 3).reshape(8, 1, -1))[0]
    bpp_y, bpp_z = (-p.log2().sum() / (128 * 64) for p in (p_y, p_z.clamp_min(1e-9)))
    mse = (network.g_s(y_decoded) - x).square().mean()
    expected = {
        "bpp_y": bpp_y, "bpp_z": bpp_z, "bpp": bpp_y + bpp_z, "psnr": -10 * mse.log10(),
        "loss": bpp_y + bpp_z + 0.02 * 255**2 * mse, "aux_loss": network.aux_loss(),
    }  # fmt: skip
    for key, value in expected.items():
        assert terms[key].item() == pytest.approx(value.item(), rel=1e-4), key
    network.zero_grad()
    expected["loss"].backward()
    theirs = network.g_a[0].weight.grad
    assert (ours - theirs).norm() < 1e-3 * theirs.norm()


def test_the_prior_of_z_learns_as_compressai_s_does():
    torch.manual_seed(0)
    model = build_model(PretrainConfig(
        train_lambda=0.02, channels={"N": 4, "M": 4}, save_name="x", train_folder="x"
    ).channels)  # fmt: skip
    z_hat = 3 * torch.randn(2, 4, 3, 5)
    bottleneck = model.network.entropy_bottleneck
    weights = [p for name, p in bottleneck.named_parameters() if name != "quantiles"]
    likelihood = FactorizedPrior(bottleneck).likelihood(z_hat)
    ours = torch.autograd.grad(-likelihood.log2().sum(), weights)
    flat = z_hat.permute(1, 0, 2, 3).reshape(4, 1, -1)
    plain = torch.autograd.grad(-bottleneck._likelihood(flat)[0].log2().sum(), weights)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def small_training(optimizer="adam", precision="float32"):
    torch.manual_seed(0)
    config = PretrainConfig(
        train_lambda=0.01, channels={"N": 8, "M": 8}, save_name="x", train_folder="x",
        optimizer=optimizer, lr={"base": 1e-3},
    )  # fmt: skip
    model = build_model(config.channels)
    model.network.train()
    state = TrainingState(*build_optimizers(model.network, config))
    return TrainingPass(model, RateDistortion(0.01), getattr(torch, precision)), state


def crops(count=4):
    pixels = skimage.data.astronaut()
    return torch.cat([to_x(pixels[64 * i : 64 * i + 64, 100:164]) for i in range(count)])


@pytest.mark.parametrize("optimizer", ["adam", "soap"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_every_parameter_learns_and_the_loss_falls(optimizer, precision):
    training, state = small_training(optimizer, precision)
    network = training.model.network
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    x = crops()
    losses = [train_step(training, state, x, 5e-3, 1.0)[0]["loss"].item() for _ in range(60)]
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:10])
    for name, p in network.named_parameters():
        assert p.dtype == torch.float32
        assert not torch.equal(p, before[name]), name


def test_gradients_are_clipped_by_value():
    training, state = small_training()
    state.optimizer = torch.optim.SGD(state.optimizer.param_groups[0]["params"], lr=1.0)
    weights = state.optimizer.param_groups[0]["params"]
    for clip in (0.01, 0.0):
        before = [p.detach().clone() for p in weights]
        train_step(training, state, crops(), 1.0, clip)
        largest = max((p - q).abs().max().item() for p, q in zip(weights, before, strict=True))
        if clip:
            assert largest == pytest.approx(clip, rel=1e-3)
        else:
            assert largest > 1


def test_the_quantiles_find_the_median_and_tails():
    """The auxiliary loss moves them, and nothing else, to where the prior's tails lie."""
    training, state = small_training()
    bottleneck = training.model.network.entropy_bottleneck
    for step in range(1000):
        bottleneck.loss().backward()
        assert all(p.grad is None for p in state.optimizer.param_groups[0]["params"])
        state.aux_optimizer.step()
        state.aux_optimizer.zero_grad()
        for group in state.aux_optimizer.param_groups:
            group["lr"] = 1.5 * 0.994**step
    logits = bottleneck._logits_cumulative(bottleneck.quantiles, stop_gradient=True)
    tail = math.log(2 / 1e-9 - 1)
    expected = torch.tensor([-tail, 0.0, tail]).expand_as(logits)
    torch.testing.assert_close(logits, expected, rtol=0.02, atol=0.05)


def test_a_step_without_finite_gradients_changes_nothing():
    training, state = small_training()
    network = training.model.network
    train_step(training, state, crops(), 1e-3, 1.0)
    before = {name: p.detach().clone() for name, p in network.state_dict().items()}
    bad = crops()
    bad[1, 0, 3, 3] = math.nan
    assert not train_step(training, state, bad, 1e-3, 1.0)[1]
    assert_same(before, dict(network.state_dict()))
    assert train_step(training, state, crops(), 1e-3, 1.0)[1]


def test_learning_rates_warm_up_and_decay():
    lr = PretrainConfig(
        train_lambda=0.01, save_name="x", train_folder="x",
        lr={"base": 1.0, "warmup_step": 4, "decay": 0.1, "decay_interval": 10},
    ).lr  # fmt: skip
    rates = [lr.at(step, 30) for step in (0, 1, 3, 4, 9, 10, 19, 20)]
    assert rates == pytest.approx([0.25, 0.5, 1, 1, 1, 0.1, 0.1, 0.01])


def test_learning_rates_fall_to_zero_along_half_a_cosine():
    lr = LearningRate(base=2.0, warmup_step=2, schedule="cosine")
    rates = [lr.at(step, 12) for step in (0, 3, 4, 6, 8, 9, 12)]
    root = math.sqrt(0.5)
    assert rates == pytest.approx([1, 1 + root, 1.5, 1, 0.5, 1 - root, 0], abs=1e-12)
    with pytest.raises(ValidationError, match='with the schedule "cosine", decay must be 1'):
        LearningRate(schedule="cosine", decay=0.5)


def test_a_window_averages_over_its_good_steps():
    window = Window(ALONE, batch_size=5)
    for loss in (1.0, 3.0):
        window.add({"loss": torch.tensor(loss)}, torch.tensor(True))
    window.add({"loss": torch.tensor(math.nan)}, torch.tensor(False))
    values = window.read()
    assert values["loss"] == 2
    assert values["images_per_second"] == pytest.approx(5 * values["steps_per_second"])
    assert window.read()["loss"] is None
