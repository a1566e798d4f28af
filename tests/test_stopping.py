"""When a refinement ends: with its steps, its time, or a loss that has settled."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import skimage
import torch

from config import EarlyStop, RefineConfig, load_config
from conftest import read_jsonl, to_x
from experimental_inference_methods import Pace, rounding_from_config
from reporting import mean_trajectory
from train_flexible_inference import main, refine


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
    while not pace.over:
        positions.append(pace.position)
        halfway = slower if pace.elapsed > seconds / 2 else 1
        clock.now += 0.3 if pace.taken == 0 else 0.1 * halfway
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
    while not pace.over:
        positions.append(pace.position)
        pace.advance()
    assert positions == [3, 4, 5, 6, 7, 8]


def test_a_time_limit_leaves_out_steps_not_temperatures(config_values, write_config):
    options = config_values["dev_options"]
    options |= {"temp_schedule": "linear"}
    values = config_values | {
        "tot_inference_iterations": 100_000, "max_seconds": 2.0, "eval_freq": 5, "tot_batches": 2,
        "polish_passes": 3, "optimizer": {"name": "adam", "lr": 0.02, "schedule": "cosine"},
    }  # fmt: skip
    assert main(["--config", str(write_config(values))]) == 0
    folder = Path(values["output_dir"]) / values["save_name"]
    for record in read_jsonl(folder / "images.jsonl"):
        assert 2 < record["steps"] < 20_000
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

    def refined(overrides, *others):
        config = load_config(write_config(config_values), RefineConfig, overrides)
        batch, seeds = torch.cat([x, *others]), range(1 + len(others))
        return refine(model, batch, rounding_from_config(config), config, seeds, lambda *_: None)

    (alone,), (whole,) = refined(overrides), refined(overrides[:-1])
    assert alone.settled and not alone.stopped
    assert [row["step"] for row in alone.trajectory] == [0, 1, 2, 3, 4, 5, 6]
    assert whole.trajectory[:7] == alone.trajectory and len(whole.trajectory) == 31
    wild = torch.rand(x.shape, generator=torch.Generator().manual_seed(0))
    first, _ = refined(overrides, wild)
    assert [row["step"] for row in first.trajectory] == [0, 1, 2, 3, 4, 5, 6]


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
    rounding = rounding_from_config(config)
    (alone,) = refine(model, x, rounding, config, [7], lambda *_: None)
    mated, _ = refine(model, torch.cat([x, wild]), rounding, config, [7, 8], lambda *_: None)
    assert alone.settled and mated.settled
    assert [row["step"] for row in mated.trajectory] == [0, 1, 2, 3, 4, 5, 6, 11]
    losses = [result.trajectory[-1]["true_loss"] for result in (alone, mated)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[0] < alone.trajectory[-2]["true_loss"]


def test_what_comes_after_the_schedule_has_its_share_of_the_time():
    """A fifth of ten seconds; nothing where that is less than what it needs at least."""
    for least, end in ((15, 8), (30, 10)):
        clock = Clock()
        pace = Pace(0, 500, 10, 0.2, least, clock)
        while not pace.over:
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
