"""A mean-scale hyperprior that becomes an autoregressive model with the same Gaussians."""

import copy
import json

import pytest
import skimage
import torch
from PIL import Image
from toys import toy

import codec
from architectures import Autoregressive
from coding.coder import build_coder, decode_picture
from conftest import ROOT, WEIGHTS, needs, to_x
from models import load_checkpoint, save_weights
from objectives import Problem, RateDistortion
from passes import true_terms
from pretraining.new_context import with_new_context
from trainings import folder_of

pytestmark = pytest.mark.usefixtures("without_run_plots")

X = to_x(skimage.data.astronaut()[:192, 64:320])


@pytest.fixture(scope="module")
def trained():
    return load_checkpoint(str(WEIGHTS))


@pytest.fixture(scope="module")
def grown(trained):
    torch.manual_seed(0)
    model = with_new_context(trained)
    model.network.eval()
    return model


@torch.no_grad()
def test_any_context_gives_the_gaussians_of_h_s(trained, grown):
    """Also means below the offset of the units that have no pair."""
    latents = trained.analyze(X)
    of_y = trained.round(latents, torch.round, (192, 256)).groups[-1].distribution
    assert of_y.means.min() < -8 and of_y.means.max() > 8
    torch.manual_seed(0)
    for y_hat in (latents["y"].round(), 30 * torch.randn_like(latents["y"])):
        group = grown.round({**latents, "y": y_hat}, torch.round, (192, 256)).groups[-1]
        gaussians = group.distribution.fixed_at(y_hat)
        torch.testing.assert_close(gaussians.means, of_y.means, rtol=1e-5, atol=1e-4)
        scales, expected = (v.scales.clamp_min(0.11) for v in (gaussians, of_y))
        torch.testing.assert_close(scales, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_only_the_lattice_changes_the_loss(trained, grown):
    latents = trained.analyze(X)
    before, after = (true_terms(model, X, latents) for model in (trained, grown))
    assert torch.equal(before.rates["z"], after.rates["z"])
    assert 1 < (after.loss / before.loss).item() < 1.15
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(latents["y"].shape, generator=generator) - 0.5

    def add_noise(v):
        return v + noise if v.shape == noise.shape else v.round()

    before, after = (
        Problem(model, X, RateDistortion(0.01)).relaxed(latents, add_noise)
        for model in (trained, grown)
    )
    torch.testing.assert_close(after.loss, before.loss, rtol=1e-4, atol=0)


def test_every_weight_of_the_context_learns(grown):
    grown = copy.deepcopy(grown)
    latents = grown.analyze(X)
    layers = {name: p for name, p in grown.network.named_parameters()
              if name.startswith(("context_prediction", "entropy_parameters"))}  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # past the first step, as after one of training
        for p in layers.values():
            p += 1e-3 * torch.randn(p.shape, generator=generator)
    Problem(grown, X, RateDistortion(0.01)).relaxed(
        latents, lambda v: v + 0.1
    ).loss.sum().backward()
    for name, p in layers.items():
        assert p.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({}, ""),
        ({"pretrain": ""}, "pretrain names no model to take layers from"),
        ({"new_y": True}, "new_context is true, but so is new_y"),
        ({"architecture": "cheng2020-anchor"}, "makes an mbt2018, not the cheng2020-anchor"),
        ({"pretrain": "mbt2018"}, "has a model of mbt2018; new_context wants one of mbt2018-mean"),
    ],
)
def test_training_goes_on_from_it(changed, error, train_on, train_values, tmp_path, capsys):
    files = {
        name: str(save_weights(tmp_path / f"{name}.pth.tar", toy(name), 0))
        for name in ("mbt2018-mean", "mbt2018")
    }
    changed = {key: files.get(str(value), value) for key, value in changed.items()}
    values = {**train_values, "channels": {"N": 12, "M": 12}, "path_test_data": "",
              "new_context": True, "pretrain": files["mbt2018-mean"], **changed}  # fmt: skip
    assert train_on(values) == (2 if error else 0)
    assert error in capsys.readouterr().err
    if not error:
        assert type(load_checkpoint(str(folder_of(values) / "iter_8.pth.tar"))) is Autoregressive


@needs("constriction")
def test_the_bundled_model_is_refined_and_coded(tmp_path):
    weights = ROOT / "example_files" / "weights" / "mbt2018_n64_lambda0.02.pth.tar"
    photo, config = tmp_path / "photo.png", tmp_path / "recipe.json"
    Image.fromarray(skimage.data.coffee()[100:228, 200:328]).save(photo)
    recipe = json.loads((ROOT / "example_files" / "fast.json").read_text())
    recipe |= {"tot_inference_iterations": 10, "polish_passes": 4, "precision": "float32"}
    config.write_text(json.dumps(recipe))
    command = ["compress", str(photo), "--checkpoint", str(weights)]
    assert codec.main([*command, "-o", str(tmp_path / "base")]) == 0
    refine = ["--refine", str(config), "--lmbda", "0.02"]
    assert codec.main([*command, *refine, "-o", str(tmp_path / "refined")]) == 0
    x = to_x(skimage.data.coffee()[100:228, 200:328])
    coder, losses = build_coder(load_checkpoint(str(weights))), []
    for folder in ("base", "refined"):
        data = (tmp_path / folder / "photo.png.olc").read_bytes()
        mse = (decode_picture(coder, data) - x).square().mean().item()
        losses.append(8 * len(data) / 128**2 + 0.02 * 255**2 * mse)
    assert losses[1] < 0.99 * losses[0]
