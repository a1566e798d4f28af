"""Polishing: its model of a move against the true loss, its draws, and its place in a run."""

import copy
import json
import math

import numpy as np
import pytest
import skimage
import torch
from toys import toy

import objectives
import refinement.polish as polishing
from architectures import Autoregressive
from config import RefineConfig, load_config
from conftest import ROOT, read_jsonl, to_x
from models import freeze
from objectives import Problem, RateDistortion
from passes import LMBDA, problem_of, refined, true_terms
from refinement.descent import Pace
from refinement.polish import polish
from train_flexible_inference import main


def _true_loss(model, x, latents, weights=None):
    with torch.no_grad():
        return _weighted(model, x, weights).true(latents).loss


def _weighted(model, x, weights, lmbda=LMBDA, tile=None):
    return Problem(model, x, RateDistortion(lmbda), tile, weights=weights)


def _map_of(x):
    """Weights of mean 1 that rise from left to right; they are 0 in the upper half."""
    weights = torch.linspace(0.2, 2, x.size(3)).to(x.dtype).expand_as(x[:, :1]).clone()
    weights[:, :, : x.size(2) // 2] = 0
    return weights / weights.mean((1, 2, 3), keepdim=True)


def _symbols_of_y(model, x, latents):
    return model.symbols(latents, x.shape[2:])["y"]


@pytest.fixture
def x():
    return to_x(skimage.data.coffee()[100:197, 200:303])  # 97x103: not multiples of 16


@pytest.mark.parametrize(("tile", "weighted"), [(None, False), (3, False), (3, True)])
def test_polishing_lowers_the_true_loss_of_each_image(model, x, tile, weighted):
    both = torch.cat((x, x.flip(3)))
    latents = model.analyze(both)
    weights = _map_of(both) if weighted else None
    before = _true_loss(model, both, latents, weights)
    generator = torch.Generator().manual_seed(0)
    problem = _weighted(model, both, weights, tile=tile)
    polished = polish(problem, latents, Pace(0, 12), generator)
    assert list(polished) == list(latents)
    after = _true_loss(model, both, polished, weights)
    # The encoder's latents are far from the best integers: 12 passes find 1 % and more.
    assert (after < 0.99 * before).all()
    symbols = _symbols_of_y(model, both, polished)
    assert (symbols != _symbols_of_y(model, both, latents)).any()
    # y lies on its lattice: nothing is left to round
    again = polished | {"y": polished["y"] + 0.2}
    assert torch.equal(_symbols_of_y(model, both, again), symbols)


def test_nothing_that_lowers_no_loss_is_kept(model, x, monkeypatch):
    """With moves that promise nothing, the latents stay as good as they were."""
    latents = model.analyze(x)
    before = _true_loss(model, x, latents)
    random = torch.Generator().manual_seed(1)

    def any_moves(here, *_):
        return torch.randint(-1, 2, here.y.shape, generator=random).to(here.y.dtype)

    monkeypatch.setattr(polishing, "_draw_moves", any_moves)
    polished = polish(problem_of(model, x), latents, Pace(0, 5))
    assert _true_loss(model, x, polished) <= before * (1 + 1e-6)


def _record_of_moves(monkeypatch, model, x, passes, weights=None, **settings):
    """What each pass knew, (point, curvature), the moves it drew, and the result."""
    passed, draw = [], polishing._draw_moves

    def noted(here, curvature, temperature, generator):
        moves = draw(here, curvature, temperature, generator)
        passed.append((here, curvature, moves))
        return moves

    monkeypatch.setattr(polishing, "_draw_moves", noted)
    for name, value in settings.items():
        monkeypatch.setattr(polishing, name, value)
    generator = torch.Generator().manual_seed(0)
    problem = _weighted(model, x, weights)
    latents = polish(problem, model.analyze(x), Pace(0, passes), generator)
    return passed, latents


def _true_changes(model, x, latents, places, weights=None):
    """True loss after a move of y up by one at each place, less that before, in bits."""
    base, changes = _true_loss(model, x, latents, weights), []
    for place in places:
        moved = latents["y"].clone()
        moved[place] += 1
        after = _true_loss(model, x, latents | {"y": moved}, weights)
        changes.append((after - base).item())
    return np.array(changes) * x.shape[2] * x.shape[3]


@pytest.mark.parametrize("weighted", [False, True])
def test_the_promised_change_is_the_true_one(model, x, monkeypatch, weighted):
    """Of single moves, with probes enough that their noise does not hide it."""
    weights = _map_of(x) if weighted else None
    no_moves = {"HOT": 1e-9, "COLD": 1e-10}
    passed, start = _record_of_moves(monkeypatch, model, x, 1, weights, PROBES=64, **no_moves)
    here, curvature, _ = passed[0]
    lively = here.y.nonzero()
    picked = np.random.default_rng(0).choice(len(lively), 30, replace=False)
    places = [tuple(lively[index]) for index in picked]
    change = here.rate_of(here.y + 1) - here.rate + here.gradient + curvature
    start = start | {"y": y_hat_of(model, x)}
    true = _true_changes(model, x, start, places, weights)
    promised = [change[place].item() for place in places]
    assert np.corrcoef(promised, true)[0, 1] > 0.95
    assert np.median(np.abs(promised - true)) < 0.2 * np.median(np.abs(true))


def y_hat_of(model, x):
    """y of x's encoder, on its lattice."""
    return true_terms(model, x, model.analyze(x)).walk.values["y"]


def test_few_probes_know_curvatures_better_than_their_own_noise(model, monkeypatch):
    """16 probes alone are off by sqrt(2 / 16) = 35 %, 512 by 6 %."""
    x = to_x(skimage.data.coffee()[100:228, 200:328])
    few = _record_of_moves(monkeypatch, model, x, 1)[0][0][1]
    # so much trust that nothing is drawn to anything
    alone = _record_of_moves(monkeypatch, model, x, 1, SPREAD=1e6)[0][0][1]
    many = _record_of_moves(monkeypatch, model, x, 1, PROBES=512, SPREAD=1e6)[0][0][1]
    error, error_alone = ((v / many).log().std().item() for v in (few, alone))
    assert error < min(0.95 * error_alone, 0.35)
    assert abs((few.mean() / many.mean()).item() - 1) < 0.05


@pytest.mark.parametrize("weighted", [False, True])
def test_a_curvature_is_that_of_a_dense_jacobian(monkeypatch, weighted):
    """Of all elements of y: the sum over pixels of the weight times the squared derivative."""
    toy_model = copy.deepcopy(toy("mbt2018-mean"))
    toy_model.network.double()
    network = toy_model.network
    model = freeze(copy.deepcopy(toy_model))
    x = to_x(skimage.data.coffee()[100:160, 200:275]).double()
    weights = _map_of(x) if weighted else torch.ones_like(x[:, :1])
    for name, value in {"PROBES": 200, "SPREAD": 1e6}.items():
        monkeypatch.setattr(polishing, name, value)
    problem = _weighted(model, x, weights if weighted else None)
    with torch.no_grad():
        walk = model.round(model.analyze(x), torch.round, SIZE)
        point = polishing._point_of(problem, walk, polishing.first_integers(walk, walk.values))
        drawn = polishing._curvature(problem, point, torch.Generator().manual_seed(0)).flatten()
        steps = 1e-4 * torch.eye(drawn.numel(), dtype=x.dtype).view(-1, *walk.y_hat.shape[1:])
        up, down = (network.g_s(walk.y_hat + step)[:, :, :60, :75] for step in (steps, -steps))
        true = (((up - down) / 2e-4).square() * weights).sum((1, 2, 3))
    ratio = drawn / true
    assert abs(ratio.mean().item() - 1) < 0.03
    assert ratio.std().item() < 1.5 * math.sqrt(2 / 200)


def test_a_curvature_is_learnt_from_a_move(model, monkeypatch):
    """Second differences of the true squared error by y agree with it where a symbol was moved."""
    x = to_x(skimage.data.coffee()[100:292, 200:392])
    passed, _ = _record_of_moves(monkeypatch, model, x, 2, PROBES=1)
    (before, _, moves), (_, curvature, _) = passed
    scale = LMBDA * 255**2 / 3
    means = y_hat_of(model, x) - before.y

    def error(y):
        with torch.no_grad():
            x_hat = model.network.g_s(y)[:, :, : x.size(2), : x.size(3)]
        return scale * (x_hat - x).square().sum().item()

    places = [tuple(place) for place in moves.nonzero()[:8]]
    assert len(places) >= 5
    learnt, true = [], []
    for place in places:
        step = torch.zeros_like(moves)
        step[place] = 0.5 * moves[place]
        centre = before.y + means + step
        second = error(centre + step) - 2 * error(centre) + error(centre - step)
        true.append(2 * second)
        learnt.append(curvature[place].item())
    # Other moves near by disturb a little.
    assert np.median(np.abs(np.array(learnt) / true - 1)) < 0.15


def test_the_temperature_of_moves_falls_by_equal_ratios(model, x, monkeypatch):
    seen = []

    def no_moves(here, curvature, temperature, generator):
        seen.append(temperature)
        return torch.zeros_like(here.y)

    monkeypatch.setattr(polishing, "_draw_moves", no_moves)
    polish(problem_of(model, x), model.analyze(x), Pace(0, 9))
    # from half a bit to a fiftieth, where a tenth pass would be
    assert [*seen, 0.02] == pytest.approx(np.geomspace(0.5, 0.02, 10).tolist())


@pytest.mark.parametrize("temperature", [0.3, 1.5])
def test_moves_are_drawn_by_their_change(temperature):
    """A heat bath over staying and four moves in one position, against its probabilities."""
    count = 40_000
    rate_up, rate_down = torch.tensor([0.4, 1.0]), torch.tensor([0.9, -0.1])
    gradient, curvature = torch.tensor([-0.2, 0.3]), torch.tensor([0.1, 0.2])
    y = torch.zeros(count, 2, 1, 1)

    def rate_of(moved):
        step = moved - y
        change = torch.where(step > 0, rate_up[:, None, None], rate_down[:, None, None])
        return torch.where(step == 0, 0.0, change)

    wide = [v[None, :, None, None].expand_as(y) for v in (gradient, curvature)]
    here = polishing.Point(y, rate_of(y), rate_of, wide[0], None, None, None)
    generator = torch.Generator().manual_seed(0)
    moves = polishing._draw_moves(here, wide[1], temperature, generator)
    assert moves.abs().sum(1).max() == 1
    changes = np.concatenate([
        [0.0], (rate_up + gradient + curvature).numpy(), (rate_down - gradient + curvature).numpy()
    ])  # fmt: skip
    expected = np.exp(-changes / temperature)
    expected /= expected.sum()
    up, down = (moves == 1).float().mean(0).flatten(), (moves == -1).float().mean(0).flatten()
    drawn = np.concatenate([[1 - (up.sum() + down.sum()).item()], up.numpy(), down.numpy()])
    assert drawn == pytest.approx(expected, abs=4 * 0.5 / math.sqrt(count))


def test_no_two_moves_of_a_pass_are_neighbours(model, monkeypatch):
    x = to_x(skimage.data.coffee()[100:292, 200:392])
    passed, _ = _record_of_moves(monkeypatch, model, x, 3, HOT=5.0)
    for *_, moves in passed:
        places = moves.abs().sum(1, keepdim=True)
        assert places.sum() > 5
        around = torch.nn.functional.avg_pool2d(places, 3, 1, 1, divisor_override=1)
        assert (around * places).max() == 1


def _gaussians_of(model, symbols):
    """Scales and means of y, [1, M, h, w] each, in the context of integers."""
    walk = model.place(symbols, SIZE)
    if isinstance(model, Autoregressive):
        network, y = model.network, symbols["y"].double()
        params = network.h_s(walk.values["z"])[:, :, : y.size(2), : y.size(3)]
        both = torch.cat((params, network.context_prediction(y)), 1)
        return network.entropy_parameters(both).chunk(2, 1)
    empty = torch.empty_like(symbols["z"], dtype=torch.double)
    fields = [group.distribution[1:3] for group in walk.groups[1:]]
    return [walk.whole((empty, *field))["y"] for field in zip(*fields, strict=True)]


# Toys are not trained: with this lambda their rate is more than a hundredth of their loss.
SIZE, SMALL_LMBDA = (60, 75), 1e-4


@pytest.mark.parametrize(
    ("name", "weighted"),
    [
        ("elic2022-official", False),
        ("mbt2018", False),
        ("mbt2018", True),
        ("mbt2018-mean", False),
        ("mbt2018-mean", True),
    ],
)
def test_the_gradient_of_a_point_is_that_of_all_but_the_symbols_own_rate(name, weighted):
    """By central differences in float64, with the rate of a Gaussian written again.

    A symbol of ELIC and mbt2018 changes what others cost, and where they lie.
    """
    model = copy.deepcopy(toy(name))
    model.network.double()
    x = to_x(skimage.data.coffee()[100:160, 200:275]).double()
    weight = SMALL_LMBDA * 255**2 / 3
    latents = model.analyze(x)
    symbols = model.symbols(latents, SIZE)
    weights = _map_of(x) if weighted else None
    start = _weighted(model, x, weights, SMALL_LMBDA)
    with torch.no_grad():
        walk = model.round(latents, torch.round, SIZE)
        point = polishing._point_of(start, walk, symbols["y"].double())
        scales, means = _gaussians_of(model, symbols)

    def total(y):
        walk = model.place({**symbols, "y": y}, SIZE)
        with torch.no_grad():
            x_hat = model.network.g_s(walk.y_hat)[:, :, : SIZE[0], : SIZE[1]]
        bits = -walk.likelihoods["y"].log2().sum().item()
        squares = (x_hat - x).square() * (1 if weights is None else weights)
        return bits + weight * squares.sum().item()

    def own_rate(y, place):
        centre = 0 if isinstance(model, Autoregressive) else means[place]
        normal = torch.distributions.Normal(means[place], scales[place])
        v = y[place] + centre
        return -(normal.cdf(v + 0.5) - normal.cdf(v - 0.5)).log2().item()

    y = symbols["y"].double()
    assert point.loss.item() == pytest.approx(total(y), rel=1e-9)
    assert y.unique().numel() >= 5
    picked = np.random.default_rng(0).choice(y.numel(), 40, replace=False)
    step, expected, own = 1e-4, [], []
    places = [tuple(int(v) for v in np.unravel_index(index, y.shape)) for index in picked]
    for place in places:
        up, down = y.clone(), y.clone()
        up[place] += step
        down[place] -= step
        own.append((own_rate(up, place) - own_rate(down, place)) / (2 * step))
        expected.append((total(up) - total(down)) / (2 * step) - own[-1])
        assert point.rate[place].item() == pytest.approx(own_rate(y, place), rel=1e-6)
    gradient = [point.gradient[place].item() for place in places]
    assert gradient == pytest.approx(expected, rel=1e-4, abs=1e-4 * np.abs(expected).max())
    assert np.abs(own).max() > 1e-3 * np.abs(expected).max()  # it would be seen


@pytest.mark.parametrize("name", ["elic2022-official", "mbt2018"])
def test_polishing_moves_symbols_that_others_depend_on(name):
    model = freeze(copy.deepcopy(toy(name)))
    x = to_x(skimage.data.coffee()[100:160, 200:275])
    latents = model.analyze(x)
    generator = torch.Generator().manual_seed(0)
    polished = polish(problem_of(model, x, SMALL_LMBDA), latents, Pace(0, 12), generator)
    before, after = (true_terms(model, x, v, SMALL_LMBDA).loss for v in (latents, polished))
    assert after < 0.998 * before
    symbols = model.symbols(latents, SIZE)
    moved = model.symbols(polished, SIZE)
    assert torch.equal(moved["z"], symbols["z"])
    assert not torch.equal(moved["y"], symbols["y"])
    again = polished | {"y": polished["y"] + 0.2}  # y lies on its lattice
    assert torch.equal(model.symbols(again, SIZE)["y"], moved["y"])


def test_polishing_is_the_last_row_of_a_refinement(model, config_values, write_config, x):
    overrides = ["polish_passes=4", "optimizer.schedule=cosine"]
    config = load_config(write_config(config_values), RefineConfig, overrides)
    (result,) = refined(problem_of(model, x), config, [1])
    *_, before, last = result.rows
    assert (before["step"], last["step"]) == (8, 12)
    assert 0 < result.clock[-2] < result.clock[-1]
    assert last["true_loss"] == last["relaxed_loss"] < before["true_loss"]
    assert result.best is last
    assert last["true_loss"] == pytest.approx(_true_loss(model, x, result.latents).item(), rel=1e-6)


def test_the_polish_knows_the_tiles_and_lambda_of_its_run(
    model, config_values, write_config, x, monkeypatch
):
    """A target's runs have lambdas of their own: that of the config would lower another loss."""
    config = load_config(write_config(config_values), RefineConfig, ["polish_passes=4"])
    told, tilings, seen = [], [], []

    def tiled_error(error_of, y_hat, x, tiling, weights):
        tilings.append(tiling)
        return real_tiled_error(error_of, y_hat, x, tiling, weights)

    def error_and_gradient(*args):
        tilings.clear()
        result = real_error_and_gradient(*args)
        seen.append(tuple(tilings))
        return result

    real_tiled_error = objectives.tiled_error
    real_error_and_gradient = polishing._error_and_gradient
    monkeypatch.setattr(objectives, "tiled_error", tiled_error)
    monkeypatch.setattr(polishing, "_error_and_gradient", error_and_gradient)
    lmbda = 30 * config.lmbda
    problem = problem_of(model, x, lmbda, tile=3)
    (result,) = refined(problem, config, [1], progress=lambda *losses: told.append(losses))
    *_, before, last = result.rows
    assert seen == [((3, 2),)] * (1 + polishing.PROBES + 4)
    true = true_terms(model, x, result.latents, lmbda).loss.item()
    assert last["true_loss"] == pytest.approx(true, rel=1e-5)
    assert last["true_loss"] < before["true_loss"]
    # Eight steps and four passes were told of; the last ends at what the result has.
    assert len(told) == 12
    assert float(told[-1][0]) == pytest.approx(last["true_loss"], rel=1e-4)


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
    rows = read_jsonl(tmp_path / "results" / name / "images.jsonl")
    assert len(rows) == 2
    for row in rows:
        assert row["method"] == "soft_round_unoise"
        assert row["refined"]["true_loss"] < 0.995 * row["base"]["true_loss"]
