"""When a refinement ends: with its steps, its time, or a loss that has settled."""

import math
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import skimage
import torch

import refinement.batch
import refinement.descent
import refinement.polish
from architectures import MeanScale
from config import EarlyStop, RefineConfig, load_config
from conftest import read_jsonl, to_x
from experimental_inference_methods import Temperature
from objectives import Problem
from passes import problem_of, refined
from refinement.descent import Pace
from reports.run_tables import mean_trajectory
from train_flexible_inference import main


class Clock:
    """Seconds that pass as told."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.mark.parametrize("slower", [1, 3])
@pytest.mark.parametrize(("seconds", "steps"), [(10, 100), (1, 10), (0.001, 1), (1000, 500)])
def test_the_schedule_ends_with_the_time(seconds, steps, slower):
    """Steps of 0.1 s after one of 0.3 s; from the middle of the time on they may be slower."""
    clock = Clock()
    pace = Pace(0, 500, seconds, clock=clock)
    positions = []
    while not pace.at_end:
        positions.append(pace.position)
        halfway = slower if pace.elapsed > seconds / 2 else 1
        clock.now += 0.3 if pace.steps_taken == 0 else 0.1 * halfway
        pace.advance()
    strides = np.diff([*positions, 500])
    assert strides.min() >= 1
    assert pace.position == 500
    if slower == 1:
        assert abs(len(positions) - steps) <= 3
    if 1 <= seconds < 50:
        assert seconds - 0.3 < pace.elapsed < seconds + 0.5 * slower
    if seconds > 500 * 0.3:
        assert positions == list(range(500))


def test_without_a_time_limit_each_step_stands_at_its_number():
    pace = Pace(3, 9)
    positions = []
    while not pace.at_end:
        positions.append(pace.position)
        pace.advance()
    assert positions == [3, 4, 5, 6, 7, 8]


def _set_clock(monkeypatch, clock):
    """Let the schedules of steps and of polish go by this clock."""
    for module in (refinement.descent, refinement.polish):
        monkeypatch.setattr(module, "Pace", partial(Pace, clock=clock))


def test_a_time_limit_leaves_out_steps_not_temperatures(config_values, write_config, monkeypatch):
    # Time passes whenever it is asked for: the same on a busy machine.
    _set_clock(monkeypatch, partial(next, count(0.0, 0.02)))
    options = config_values["dev_options"]
    options |= {"temp_schedule": "linear"}
    values = config_values | {
        "tot_inference_iterations": 100_000, "max_seconds": 2.0, "eval_freq": 5, "tot_batches": 2,
        "polish_passes": 3, "optimizer": {"name": "adam", "lr": 0.02, "schedule": "cosine"},
    }  # fmt: skip
    assert main(["--config", str(write_config(values))]) == 0
    folder = Path(values["output_dir"]) / values["save_name"]
    for record in read_jsonl(folder / "images.jsonl"):
        assert 10 < record["steps"] < 100
        assert record["refined"]["true_loss"] < record["base"]["true_loss"]
        table = pd.read_csv(folder / "trajectories" / f"{record['name']}.csv")
        assert len(table) == len(record["clock"])
        assert record["clock"] == sorted(record["clock"])
        taus = table["temperature"].to_numpy()
        assert taus[0] == 1 and (np.diff(taus) <= 0).all() and taus[-1] == 0
    mean = pd.read_csv(folder / "trajectory.csv")
    final = [record["refined"]["true_loss"] for record in read_jsonl(folder / "images.jsonl")]
    assert mean["true_loss"].iloc[-1] >= np.mean(final) * (1 - 1e-6)
    assert (mean["images"] == 2).all()


def test_an_image_stops_when_its_loss_has_settled(model, config_values, write_config):
    """After three steps the rate is 0, so nothing moves; each image of a batch as if alone."""
    schedule = '{"start_iters": 3, "warmup_steps": 0, "start_lr": 0.05, "end_lr": 0.0}'
    overrides = [
        f"dev_options.custom_lr={schedule}", "eval_freq=1", "tot_inference_iterations=30",
        'early_stop={"evaluations": 4}',
    ]  # fmt: skip
    x = to_x(skimage.data.coffee()[100:164, 200:264])

    def refined_with(overrides, *others):
        config = load_config(write_config(config_values), RefineConfig, overrides)
        batch, seeds = torch.cat([x, *others]), range(1 + len(others))
        return refined(problem_of(model, batch), config, seeds)

    (alone,), (whole,) = refined_with(overrides), refined_with(overrides[:-1])
    assert alone.settled and not alone.stopped
    assert [row["step"] for row in alone.rows] == [0, 1, 2, 3, 4, 5, 6]
    assert whole.rows[:7] == alone.rows and len(whole.rows) == 31
    wild = torch.rand(x.shape, generator=torch.Generator().manual_seed(0))
    first, _ = refined_with(overrides, wild)
    assert [row["step"] for row in first.rows] == [0, 1, 2, 3, 4, 5, 6]


def test_a_settled_image_is_polished_as_if_alone(model, config_values, write_config):
    """Whatever its batch mate does; and it stays settled."""
    schedule = '{"start_iters": 3, "warmup_steps": 0, "start_lr": 0.05, "end_lr": 0.0}'
    overrides = [
        f"dev_options.custom_lr={schedule}", "eval_freq=1", "tot_inference_iterations=12",
        'early_stop={"evaluations": 4}', "polish_passes=5",
    ]  # fmt: skip
    config = load_config(write_config(config_values), RefineConfig, overrides)
    x = to_x(skimage.data.coffee()[100:164, 200:264])
    wild = torch.rand(x.shape, generator=torch.Generator().manual_seed(0))
    (alone,) = refined(problem_of(model, x), config, [7])
    mated, _ = refined(problem_of(model, torch.cat([x, wild])), config, [7, 8])
    assert alone.settled and mated.settled
    assert [row["step"] for row in mated.rows] == [0, 1, 2, 3, 4, 5, 6, 11]
    losses = [trajectory.rows[-1]["true_loss"] for trajectory in (alone, mated)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[0] < alone.rows[-2]["true_loss"]


@pytest.fixture
def timed_refine(model, config_values, write_config, monkeypatch):
    """Refines B images of 32x32 on a clock of its own, and says what the schedule was asked.

    Encoding takes two seconds, evaluations half a second, all else that goes through g_s a tenth,
    for each image; the first step takes a second more.
    """
    clock = Clock()

    def takes(owner, name, cost):
        real = getattr(owner, name)

        def timed(*args, **kwargs):
            clock.now += cost(*args)
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, timed)

    warm = iter([1.0])
    takes(MeanScale, "analyze", lambda model, x: 2.0 * len(x))
    for module in (refinement.batch, refinement.polish):
        takes(module, "metrics_of", lambda terms, x: 0.4 * len(x))
    for kind in ("relaxed", "true"):
        takes(Problem, kind, lambda problem, *_: 0.1 * len(problem.x))
    takes(torch.optim.Adam, "step", lambda *_: next(warm, 0))
    takes(refinement.polish, "_error_and_gradient", lambda problem, *_: 0.1 * len(problem.x))
    _set_clock(monkeypatch, clock)
    asked = {"lr": [], "temperature": []}

    def notes(owner, name, positions):
        real = getattr(owner, name)

        def noted(self, step, *args):
            positions.append(step)
            return real(self, step, *args)

        monkeypatch.setattr(owner, name, noted)

    notes(RefineConfig, "lr_at", asked["lr"])
    notes(Temperature, "__call__", asked["temperature"])

    def run(images, *overrides):
        config = load_config(write_config(config_values), RefineConfig, overrides)
        x = to_x(skimage.data.coffee()[100:132, 200:232]).repeat(images, 1, 1, 1)
        began = clock.now
        trajectories = refined(problem_of(model, x), config, range(images))
        return trajectories, clock.now - began, asked

    return run


LONG = ["tot_inference_iterations=1000", "eval_freq=5000", "polish_passes=500"]


@pytest.mark.parametrize(("images", "limit"), [(1, 30), (3, 10)])
def test_images_keep_their_time_polish_and_schedule(timed_refine, images, limit):
    """All of it counts, encoding and evaluations too; a third of the time is the polish's."""
    trajectories, seconds, asked = timed_refine(images, *LONG, f"max_seconds={limit}")
    assert seconds == pytest.approx(limit * images, rel=0.03)
    # 516 of 1,516 steps' time is the polish's, but for two evaluations of half a second;
    reserve = (limit - 1) * 516 / 1516
    # encoding, two evaluations before and two after the steps, and the first step's own second.
    left = limit - reserve - 2 - 2 - 1 / images
    for trajectory in trajectories:
        first, last, polished = trajectory.rows
        assert (first["step"], polished["temperature"]) == (0, 0.0)
        assert last["step"] == pytest.approx(left / 0.1, abs=4)
        assert polished["step"] - last["step"] == pytest.approx((reserve - 0.5) / 0.1 - 17, abs=4)
    lr = np.array(asked["lr"])
    assert (np.diff(lr) > 1).mean() > 0.9  # the first stands at 1 until the speed is known
    assert lr[0] == 0 and 950 < lr[-1] < 1000
    # Evaluations ask for theirs, and for that of their row, at the first step and at the end.
    assert asked["temperature"] == [0, 0, *asked["lr"], 1000, 1000]


def test_too_short_a_time_is_all_for_the_steps(timed_refine):
    (trajectory,), seconds, _ = timed_refine(1, *LONG, "max_seconds=6.5")
    assert [row["step"] for row in trajectory.rows] == [0, pytest.approx(16, abs=3)]
    assert seconds == pytest.approx(6.5, abs=0.3)


def test_a_slow_first_step_is_no_measure_of_the_others():
    clock = Clock()
    pace = Pace(0, 500, 10, clock=clock)
    while not pace.at_end:
        clock.now += 0.1 if pace.steps_taken else 3.0
        pace.advance()
    assert pace.steps_taken == pytest.approx(71, abs=2)


def test_what_comes_after_the_schedule_has_its_share_of_the_time():
    """A fifth of ten seconds; nothing where that is less than what it needs at least."""
    for least, end in ((15, 8), (30, 10)):
        clock = Clock()
        pace = Pace(0, 500, 10, 0.2, least, clock)
        while not pace.at_end:
            clock.now += 0.1
            pace.advance()
        assert pace.elapsed == pytest.approx(end, abs=0.3)


def test_settled_is_what_lies_still():
    rule = EarlyStop(evaluations=3, tolerance=0.01)
    assert not rule.settled([1.0, 1.0])
    assert rule.settled([2.0, 1.0, 1.005, 0.999])
    assert not rule.settled([1.0, 1.0, 1.02])
    assert not rule.settled([1.0, math.inf, 1.0])


def test_the_mean_trajectory_lets_an_image_that_is_done_count_on():
    rows = {"a": {"step": [0, 5, 7], "true_loss": [3.0, 2.0, 1.0]},
            "b": {"step": [0, 5, 10], "true_loss": [5.0, 4.0, 3.0]}}  # fmt: skip
    mean = mean_trajectory([pd.DataFrame(table) for table in rows.values()])
    assert mean["step"].tolist() == [0, 5, 7, 10]
    assert mean["true_loss"].tolist() == [4.0, 3.0, 2.5, 2.0]
    assert mean["images"].tolist() == [2] * 4
