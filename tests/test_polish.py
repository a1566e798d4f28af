"""Polishing: its model of a move against the true loss, its result, and its place in a run."""

import json

import numpy as np
import pytest
import skimage
import torch

import polish as polishing
from config import RefineConfig, load_config
from conftest import ROOT, read_jsonl, to_x
from experimental_inference_methods import hard_round, rounding_from_config
from models import Latents, analyze, integer_latents, rd_pass
from polish import polish
from train_flexible_inference import main, refine

LMBDA = 0.01


def _true_loss(model, x, latents):
    with torch.no_grad():
        return rd_pass(model, x, latents, hard_round, LMBDA)["loss"]


@pytest.fixture
def x():
    return to_x(skimage.data.coffee()[100:197, 200:303])  # 97x103: not multiples of 16


@pytest.mark.parametrize("tile", [None, 3])
def test_polishing_lowers_the_true_loss_of_each_image(model, x, tile):
    both = torch.cat((x, x.flip(3)))
    latents = analyze(model, both)
    before = _true_loss(model, both, latents)
    generator = torch.Generator().manual_seed(0)
    polished = polish(model, both, latents, LMBDA, 12, generator, tile).latents
    after = _true_loss(model, both, polished)
    # The encoder's latents are far from the best integers: 12 passes find 1 % and more.
    assert (after < 0.99 * before).all()
    moved = integer_latents(model, polished).y - integer_latents(model, latents).y
    assert (moved != 0).any()
    # y lies on its lattice: nothing is left to round
    symbols = integer_latents(model, polished)
    again = Latents(polished.y + 0.2, polished.z)
    assert torch.equal(integer_latents(model, again).y, symbols.y)


def test_nothing_that_lowers_no_loss_is_kept(model, x, monkeypatch):
    """With gains promised where there are none, the latents stay as good as they were."""
    latents = analyze(model, x)
    before = _true_loss(model, x, latents)
    random = torch.Generator().manual_seed(1)

    def any_moves(here, *_):
        return torch.randint(-1, 2, here.y.shape, generator=random).to(here.y.dtype)

    monkeypatch.setattr(polishing, "_promising_moves", any_moves)
    polished = polish(model, x, latents, LMBDA, 5).latents
    assert _true_loss(model, x, polished) <= before * (1 + 1e-6)


def test_the_promised_change_is_the_true_one(model, x, monkeypatch):
    """Of single moves, with probes enough that their noise does not hide it."""
    points = []

    def noted(here, rate_of, curvature, refused):
        points.append(rate_of(here.y + 1) - here.rate + here.gradient + curvature)
        return torch.zeros_like(here.y)

    monkeypatch.setattr(polishing, "PROBES", 64)
    monkeypatch.setattr(polishing, "_promising_moves", noted)
    start, passes = polish(model, x, analyze(model, x), LMBDA, 1, torch.Generator().manual_seed(0))
    assert passes == 0
    base, promised, true = _true_loss(model, x, start), [], []
    lively = integer_latents(model, start).y.nonzero()
    for index in np.random.default_rng(0).choice(len(lively), 30, replace=False):
        place = tuple(lively[index])
        moved = start.y.clone()
        moved[place] += 1
        true.append((_true_loss(model, x, Latents(moved, start.z)) - base).item())
        promised.append(points[0][place].item())
    assert np.corrcoef(promised, true)[0, 1] > 0.95
    assert np.median(np.abs(np.subtract(promised, true))) < 0.2 * np.median(np.abs(true))


def test_polishing_is_the_last_row_of_a_refinement(model, config_values, write_config, x):
    overrides = ["polish_passes=4", "optimizer.schedule=cosine"]
    config = load_config(write_config(config_values), RefineConfig, overrides)
    rounding = rounding_from_config(config)
    (result,) = refine(model, x, rounding, config, [1], lambda *_: None)
    *_, before, last = result.trajectory
    assert (before["step"], last["step"]) == (8, 12)
    assert 0 < result.clock[-2] < result.clock[-1]
    assert last["true_loss"] == last["relaxed_loss"] < before["true_loss"]
    assert result.best is last
    assert last["true_loss"] == pytest.approx(_true_loss(model, x, result.latents).item(), rel=1e-6)


@pytest.mark.parametrize("name", ["fast", "best"])
def test_recipes_run(name, config_values, tmp_path):
    values = json.loads((ROOT / f"example_files/{name}.json").read_text())
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(values))
    photos = config_values["dev_options"]["path_test"]["folder"]
    changes = {
        "tot_inference_iterations": 10, "polish_passes": 2, "eval_freq": 5, "tot_batches": 2,
        "output_dir": str(tmp_path / "results"), "pretrain": str(config_values["pretrain"]),
        "dev_options.sample": "false", "dev_options.folder": "true",
        "dev_options.path_test.folder": photos,
    }  # fmt: skip
    overrides = [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]
    assert main(["--config", str(path), *overrides]) == 0
    for row in read_jsonl(tmp_path / "results" / name / "images.jsonl"):
        assert row["method"] == "soft_round_unoise"
        assert row["refined"]["true_loss"] < 0.99 * row["base"]["true_loss"]
