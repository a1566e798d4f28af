"""Comparisons: what is run and reused, and the numbers against a second way to them."""

import io
import os
import sys

import numpy as np
import pandas as pd
import pytest
import skimage
import torch
from PIL import Image
from scipy import stats

from compare import main, plan_runs
from config import CompareConfig, load_config
from conftest import WEIGHTS, read_jsonl
from datasets import open_images
from reports.compared_run import ComparedRun
from reports.comparison import trajectories_of
from reports.comparison_plots import plot_loss
from reports.comparison_tables import half_interval
from reports.styles import styles_of
from runs import NAMES

pytestmark = pytest.mark.usefixtures("without_run_plots")


@pytest.fixture
def compared(config_values, write_config, photos, tmp_path):
    """The JSON values of a comparison of two methods with two seeds over `photos`."""
    path = write_config(config_values, "method.json")
    return {
        "save_name": "both",
        "output_dir": str(tmp_path / "results"),
        "data_set": "folder",
        "path": str(photos),
        "images": 3,
        "methods": {
            "slow": {"config": str(path), "set": {"optimizer.lr": 0.001}},
            "fast, of course": {"config": str(path), "set": {"polish_passes": 3}},
        },
        "models": [{"pretrain": str(WEIGHTS), "train_lambda": 0.01}],
        "seeds": [0, 5],
        "anchor": "slow",
        "groups": {"animals": ["a_chelsea.png"]},
    }


@pytest.fixture
def without_plots(monkeypatch):
    """Leaves out the plots, which take most of a comparison's time, where no test reads them."""
    monkeypatch.setattr("reports.comparison.all_plots", lambda *_: {})


def test_a_comparison_counts_as_it_says(compared, write_config, tmp_path, capsys):
    path = write_config(compared, "compare.json")
    assert main(["--config", str(path)]) == 0
    folder = tmp_path / "results/both"
    runs = {
        (method, seed): read_jsonl(folder / f"runs/{name}/lambda 0.01{end}/images.jsonl")
        for method, name in (("slow", "slow"), ("fast, of course", "fast of course"))
        for seed, end in ((0, ""), (5, " seed 5"))
    }
    losses = {
        method: [
            np.mean([runs[method, seed][index]["refined"]["true_loss"] for seed in (0, 5)])
            for index in range(3)
        ]
        for method in ("slow", "fast, of course")
    }
    images = pd.read_csv(folder / "images.csv")
    assert len(images) == 2 * 2 * 3 + 3  # the base once
    assert set(images["image"]) == set(NAMES)
    table = pd.read_csv(folder / "table.csv").set_index("method")
    fast, slow = table.loc["fast, of course"], table.loc["slow"]
    assert fast["true_loss"] == pytest.approx(np.mean(losses["fast, of course"]))
    assert fast["steps"] == 8 + 3 and slow["steps"] == 8
    ratios = np.divide(losses["fast, of course"], losses["slow"])
    assert fast["change_percent"] == pytest.approx(100 * (ratios.mean() - 1), rel=1e-6)
    low, high = stats.ttest_1samp(100 * (ratios - 1), 0).confidence_interval(0.95)
    assert fast["half_interval"] == pytest.approx((high - low) / 2, rel=1e-6)
    of_means = 100 * (np.mean(losses["fast, of course"]) / np.mean(losses["slow"]) - 1)
    assert fast["change_of_mean_percent"] == pytest.approx(of_means, rel=1e-6)
    assert fast["group: animals (1)"] == pytest.approx(100 * (ratios[0] - 1), rel=1e-6)
    assert fast["seeds"] == 2 and fast["seed_spread_percent"] > 0
    assert slow["change_percent"] == 0
    base = np.mean([record["base"]["true_loss"] for record in runs["slow", 0]])
    assert table.loc["base", "true_loss"] == pytest.approx(base)
    printed = capsys.readouterr().out
    assert "| lambda 0.01 | fast, of course | 3 |" in printed
    assert printed.count((folder / "table.md").read_text()) == 1
    assert min(Image.open(folder / "loss.png").size) > 400
    assert "<svg" in (folder / "loss.svg").read_text()[:600]


@pytest.mark.usefixtures("without_plots")
def test_what_is_done_is_reused_and_a_method_can_be_added(compared, write_config, tmp_path):
    compared["seeds"] = [0]
    both, slow = compared["methods"], compared["methods"].pop("fast, of course")
    assert main(["--config", str(write_config(compared, "compare.json"))]) == 0
    folder = tmp_path / "results/both"
    before = (folder / "runs/slow/lambda 0.01/images.jsonl").read_bytes()
    compared["methods"] = both | {"new": slow}
    path = write_config(compared, "compare.json")
    assert main(["--config", str(path)]) == 0
    # A record holds the seconds that it took: the same bytes were not computed again.
    assert (folder / "runs/slow/lambda 0.01/images.jsonl").read_bytes() == before
    assert set(pd.read_csv(folder / "table.csv")["method"]) == {"base", "slow", "new"}
    runs = plan_runs(load_config(path, CompareConfig))
    done = [ComparedRun(run.method, run.model.label, run.seed, run.folder) for run in runs]
    trajectories = trajectories_of(done, {"lambda 0.01": NAMES})
    left, right = plot_loss(trajectories, styles_of(list(compared["methods"]))).axes
    assert min(len(left.lines), len(right.lines)) >= len(runs) == 2
    for run, line, clock in zip(runs, left.lines, right.lines, strict=False):
        records = read_jsonl(run.folder / "images.jsonl")
        tables = [pd.read_csv(run.folder / f"trajectories/{name}.csv") for name in NAMES]
        for step, loss in zip(*line.get_data(), strict=True):
            rows = [table.loc[table["step"] == step, "true_loss"].item() for table in tables]
            assert loss == pytest.approx(np.mean(rows), rel=1e-6)
        assert clock.get_xdata()[-1] == pytest.approx(
            np.mean([record["clock"][-1] for record in records])
        )


def test_a_comparison_has_as_many_images_as_it_says(compared, write_config):
    compared |= {"batch_size": 4, "images": 2}
    runs = plan_runs(load_config(write_config(compared, "compare.json"), CompareConfig))
    assert {run.config.image_count for run in runs} == {2}
    assert {run.config.images_at_once for run in runs} == {4}
    quick = load_config(write_config(compared, "compare.json"), CompareConfig, ["quick=true"])
    assert {run.config.image_count for run in plan_runs(quick)} == {quick.quick_images}


def test_crops_are_the_same_for_all_seeds(compared, write_config, tmp_path):
    Image.fromarray(skimage.data.immunohistochemistry()).save(tmp_path / "s.tif")
    compared |= {"data_set": "pathology", "path": str(tmp_path), "set": {"image_size": 64}}
    runs = plan_runs(load_config(write_config(compared, "compare.json"), CompareConfig))
    assert {run.seed for run in runs} == {0, 5}
    crops = [next(iter(open_images(run.config).load(["s.tif"]))).x for run in runs]
    assert all(torch.equal(crop, crops[0]) for crop in crops)


@pytest.mark.usefixtures("with_run_plots")
def test_names_that_are_no_text_end_no_comparison(
    compared, write_config, photos, tmp_path, monkeypatch
):
    (photos / NAMES[0]).rename(photos / os.fsdecode(b"caf\xe9.png"))
    (photos / NAMES[1]).rename(photos / ("日" * 83 + ".png"))
    compared["methods"].popitem()
    compared |= {"seeds": [0], "codecs": ["JPEG"], "shown": 1}
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    assert main(["--config", str(write_config(compared, "compare.json"))]) == 0
    folder = tmp_path / "results/both"
    for table in ("images.csv", "codecs.csv"):
        text = (folder / table).read_text(encoding="utf-8")
        assert "caf\\xe9.png" in text and "日" in text
    assert (folder / "report.html").stat().st_size > 100_000


WRONG = {
    "anchor": ({"anchor": "medium"}, "anchor = 'medium': must be one of base, slow, fast"),
    "no path": ({"path": None}, "path is missing: the folder of folder"),
    "typo": ({"seed": 1}, "unknown key 'seed': did you mean 'seeds'?"),
    "seed twice": ({"seeds": [1, 1]}, "seeds: one stands twice"),
    "seed": ({"seeds": [2**70]}, "should be less than"),
    "path of the samples": ({"data_set": "sample"}, "data_set sample has none"),
    "its own seed": (
        {"methods": {"slow": {"config": "method.json", "set": {"seed": 1}}}},
        "seed is for the comparison to say: seeds",
    ),
    "target": (
        {"methods": {"slow": {"config": "method.json", "set": {"target_bpp": 0.3}},
                     "free": {"config": "method.json"}}},
        "methods.slow: a target must be the same for all methods: put it into set",
    ),
    "crop": (
        {"methods": {"slow": {"config": "method.json"},
                     "part": {"config": "method.json", "set": {"dev_options.centre_crop": 64}}}},
        "methods.part.set: dev_options.centre_crop is for the comparison to say: centre_crop",
    ),
    "no published curve": (
        {"published": {"a": "none.csv"}, "methods": {"slow": {"config": "method.json"}}},
        "published.a none.csv: cannot be read",
    ),
    "published under a method's name": ({"published": {"slow": "a.csv"}}, "another one"),
    "no checkpoint": (
        {"models": [{"pretrain": "none", "train_lambda": 0.01}],
         "methods": {"slow": {"config": "method.json"}}},
        "pretrain none: no such file",
    ),
    "device": (
        {"device": "cuda:99", "methods": {"slow": {"config": "method.json"}}}, "device = 'cuda:99'",
    ),
    "model twice": (
        {"models": [{"pretrain": "a", "train_lambda": 0.01}] * 2},
        "models: two have the same lambdas: give each a name",
    ),
    "missing config": (
        {"methods": {"slow": {"config": "none.json"}}},
        "config none.json: No such file or directory",
    ),
    "wrong change": (
        {"methods": {"slow": {"config": "method.json", "set": {"optimizer.rate": 1}}}},
        "methods.slow, method.json and its changes: unknown key 'optimizer.rate'",
    ),
    "no method": (
        {"methods": {"slow": {"config": "method.json",
                              "set": {"dev_options.improving_methods": {"sgaa": True}}}}},
        "improving_methods.sgaa: no such method",
    ),
    "no schedule": (
        {"methods": {"slow": {"config": "method.json",
                              "set": {"dev_options.temp_schedule": "cosine"}}}},
        "dev_options.temp_schedule = 'cosine': there are exp, exp0, exp_of_run, linear",
    ),
    "same folder": (
        {"methods": {"slow": {"config": "method.json"}, "slow!": {"config": "method.json"}}},
        "names must differ in more than punctuation",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG.keys())
def test_a_wrong_comparison_runs_nothing(
    compared, write_config, tmp_path, monkeypatch, capsys, case
):
    changes, message = case
    monkeypatch.chdir(tmp_path)
    assert main(["--config", str(write_config(compared | changes, "compare.json"))]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
    assert not (tmp_path / "results").exists()


@pytest.mark.usefixtures("without_plots")
def test_only_images_of_the_set_that_every_method_has_are_compared(
    compared, write_config, tmp_path, photos, capsys
):
    """One method alone saw b, c has gone, d is flat; names that a plot or a table would misread."""
    compared |= {"seeds": [0], "anchor": "base", "codecs": ["JPEG", "WebP"], "shown": 1}
    odd = compared["methods"] = {"a|b $x_$ <i>": compared["methods"]["slow"]}
    Image.new("RGB", (170, 170), (90, 90, 90)).save(photos / "$d_.png")
    assert main(["--config", str(write_config(compared | {"images": 4}, "compare.json"))]) == 0
    (photos / "c_rocket.png").unlink()
    (photos / "b_coffee.png").write_bytes(b"no picture any more")
    odd["new"] = odd["a|b $x_$ <i>"]
    capsys.readouterr()
    path = write_config(compared | {"images": 4}, "compare.json")
    assert main(["--config", str(path)]) == 1
    assert "not compared, for some method lacks them: b_coffee.png" in capsys.readouterr().out
    table = pd.read_csv(tmp_path / "results/both/table.csv")
    assert set(table["images"]) == {2} and len(table) == 3
    images = pd.read_csv(tmp_path / "results/both/images.csv")
    assert set(images["image"]) == {"$d_.png", "a_chelsea.png", "b_coffee.png"}
    text = (tmp_path / "results/both/table.md").read_text()
    assert "a\\|b $x_$ <i>" in text
    assert "a|b $x_$ &lt;i&gt;" in (tmp_path / "results/both/report.html").read_text()


def test_a_seed_can_be_added(compared, write_config, tmp_path):
    compared["methods"].pop("fast, of course")
    runs = plan_runs(load_config(write_config(compared | {"seeds": [0]}), CompareConfig))
    more = plan_runs(load_config(write_config(compared | {"seeds": [5, 0]}), CompareConfig))
    assert runs[0].folder == more[1].folder != more[0].folder


def test_an_interval_needs_three_values():
    assert np.isnan(half_interval([1.0])) and np.isnan(half_interval([1.0, 2.0]))
    assert half_interval([1.0, 1.0, 1.0]) == 0
    # 4.3027 is t of two degrees of freedom; the standard error is 1 / sqrt(3).
    assert half_interval([0.0, 1.0, 2.0]) == pytest.approx(4.3027 / 3**0.5, rel=1e-4)
