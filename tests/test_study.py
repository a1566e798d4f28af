"""The study's tables and plots, by hand from what runs leave; and that docs/study.md has them."""

import json
import math
import xml.etree.ElementTree as ET

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from common.errors import InputError
from config import CompareConfig, load_config
from conftest import ROOT
from reports.page_tables import markdown_of
from study.collect import collect, main
from study.draw import main as draw_main
from study.draw import read_table
from study.probabilities import candidate_probabilities
from study.tables import (
    changes,
    of_classes,
    of_lambdas,
    of_methods,
    of_ms_ssim,
    of_settings,
    of_steps,
    of_temperatures,
    tables_of,
)

STEPS = [0, 250, 500, 1000, 2000]
IMAGES = ["a.png", "b.png", "c.png"]


def write_run(folder, losses, side=128):
    """The files of a finished run; losses: for each image the true loss at STEPS."""
    (folder / "trajectories").mkdir(parents=True)
    lines = []
    for name, of_image in losses.items():
        unread = dict.fromkeys(("temperature", "relaxed_loss"), 1.0)
        pd.DataFrame({"step": STEPS, "true_loss": of_image, **unread}).to_csv(
            folder / f"trajectories/{name}.csv", index=False
        )
        metrics = {"bpp": 0.5, "psnr": 30.0, "psnr_raw": 30.0, "ms_ssim_db": None}
        lines.append({
            "name": name, "width": side, "height": side, "lmbda": 0.01, "best_step": 0,
            "stopped": None, "steps": STEPS[-1], "seconds": 1.0, "seconds_per_step": 1.0,
            "base": {**metrics, "true_loss": of_image[0]},
            "refined": {**metrics, "bpp": 0.4, "true_loss": min(of_image)},
        })  # fmt: skip
    (folder / "images.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Runs of the real configs with made-up losses: the folder, the losses by run, the tables."""
    tmp_path, random, made = tmp_path_factory.mktemp("study"), np.random.default_rng(0), {}
    for study in ("study_methods", "study_learning_rate", "study_temperature", "study_lambdas"):
        path = ROOT / f"example_files/compare/{study}.json"
        config = load_config(path, CompareConfig, [f'output_dir="{tmp_path}"'])
        for method, model, seed in config.combinations:
            base = {name: 1 + number / 10 for number, name in enumerate(IMAGES)}
            losses = {
                name: [first, *(first * random.uniform(0.8, 1.05, len(STEPS) - 1))]
                for name, first in base.items()
            }
            write_run(tmp_path / config.save_name_of(method, model, seed), losses)
            made[study, method, model.label] = losses
    return tmp_path, made, *collect(tmp_path, ROOT / "example_files/compare")


def test_the_losses_are_those_of_the_runs(results):
    folder, made, losses, curves = results
    rows = losses.set_index(["study", "method", "model", "image"])
    for run, own in made.items():
        for name, values in own.items():
            assert rows.loc[(*run, name), "loss"] == pytest.approx(min(values))
            assert rows.loc[(*run, name), "loss_500"] == pytest.approx(min(values[:3]))
    base = losses.query("study == 'study_methods' and method == 'base'")
    assert len(base) == 4 * len(IMAGES)
    assert set(base["loss"]) == {1.0, 1.1, 1.2}
    own = made["study_methods", "fast", "lambda 0.02"]
    curve = curves.query("method == 'fast' and model == 'lambda 0.02'")
    lowest = np.minimum.accumulate(np.array(list(own.values())), axis=1).mean(axis=0)
    assert list(curve["step"]) == STEPS
    assert list(curve["loss"]) == pytest.approx(list(lowest))
    with pytest.raises(InputError, match="no run of"):
        collect(folder / "nothing", ROOT / "example_files/compare")


def test_changes_have_students_interval(results):
    _, made, losses, curves = results
    table = changes(losses, "study_methods", "SGA")
    model = "lambda 0.005"
    sga, ssl = (
        np.array([min(values) for values in made["study_methods", method, model].values()])
        for method in ("SGA", "SGA+ SSL")
    )
    expected = 100 * (ssl / sga - 1)
    assert list(table.loc[model, "SGA+ SSL"]) == pytest.approx(list(expected))
    low, high = stats.ttest_1samp(expected, 0).confidence_interval(0.95)
    cells = of_methods(losses, "SGA", "loss")
    row = next(row for row in cells.rows if row[0] == "SGA+ SSL")
    words = f"{expected.mean():+.2f} ± {(high - low) / 2:.2f} %"
    assert row[cells.heads.index(model)] == words
    steps = of_steps(curves, "SGA")
    goal = sga.mean()
    of_ssl = np.array(list(made["study_methods", "SGA+ SSL", model].values()))
    reached = np.minimum.accumulate(of_ssl, axis=1).mean(axis=0) <= goal
    row = next(row for row in steps.rows if row[0] == "SGA+ SSL")
    expected = f"{STEPS[reached.argmax()]:,}" if reached.any() else ""
    assert row[steps.heads.index(model)] == expected


def test_settings_are_read_from_the_methods_names(results):
    _, made, losses, _ = results
    cells = of_settings(losses, "study_learning_rate", "rate", "SSL, rate 0.005")
    assert cells.heads == ["rate:", "0.0025", "0.005", "0.01", "0.02", "0.04", "range"]
    assert [row[0] for row in cells.rows] == ["atanh", "linear", "cosine", "SSL", "SGA"]

    def mean_change(method):
        own, anchor = (
            np.array([min(values) for values in
                      made["study_learning_rate", name, "lambda 0.01"].values()])
            for name in (method, "SSL, rate 0.005")
        )  # fmt: skip
        return 100 * (own / anchor - 1).mean()

    means = [mean_change(f"SGA, rate {rate}") for rate in cells.heads[1:-1]]
    assert [float(cell.split()[0]) for cell in cells.rows[4][1:-1]] == pytest.approx(
        means, abs=0.005
    )
    assert cells.rows[4][-1] == f"{max(means) - min(means):.2f} %"
    rates = of_settings(losses, "study_temperature", "rate", "SSL, bound 1")
    assert rates.heads[1:-1] == ["0.0005", "0.001", "0.002", "0.004"]
    assert rates.rows[3][2] == "+0.00 ± 0.00 %"  # SSL at 0.001 is the anchor


def test_functions_are_compared_at_equal_temperature(results):
    _, made, losses, _ = results

    def lowest(method):
        return np.array([min(v) for v in made["study_temperature", method, "lambda 0.01"].values()])

    cells = of_temperatures(losses)
    assert [row[0] for row in cells.rows] == ["atanh", "linear", "cosine", "SSL"]
    row = dict(zip(cells.heads, cells.rows[2], strict=True))
    sga = lowest("atanh, temperature of SGA")
    for kind, method in {
        "SGA's": "cosine, temperature of SGA",
        "SGA+'s": "cosine, bound 1",
    }.items():
        change = 100 * (lowest(method) / sga - 1).mean()
        assert float(row[f"2,000 steps, {kind}"].split()[0]) == pytest.approx(change, abs=0.005)
    assert cells.rows[0][1] == "+0.00 ± 0.00 %"


def test_three_classes_are_compared_with_two_of_the_same_function(results):
    _, made, losses, _ = results
    cells = of_classes(losses)
    assert [row[:2] for row in cells.rows] == [
        [function, after] for function in ("linear", "cosine", "SSL")
        for after in ("500 steps", "2,000 steps")
    ]  # fmt: skip
    two, three = (
        np.array([min(v) for v in made["study_methods", name, "lambda 0.02"].values()])
        for name in ("SGA+ linear", "three-class linear")
    )
    row = dict(zip(cells.heads, cells.rows[1], strict=True))
    change = 100 * (three / two - 1).mean()
    assert float(row["lambda 0.02"].split()[0]) == pytest.approx(change, abs=0.005)


def test_another_lambda_is_compared_with_the_model_that_was_trained_for_it(results):
    _, made, losses, _ = results
    cells = of_lambdas(losses)
    row = next(row for row in cells.rows if row[:3] == ["0.005", "lambda 0.01", "fast"])

    def of(model, reduce):
        return np.array(
            [reduce(values) for values in made["study_lambdas", "fast", model].values()]
        )

    own = of("lambda 0.01 at 0.005", min)
    for cell, other in zip(row[-2:], (min, lambda values: values[0]), strict=True):
        change = 100 * (own / of("lambda 0.005", other) - 1)
        assert float(cell.split()[0]) == pytest.approx(change.mean(), abs=0.005)
    # No model was trained for this one.
    lonely = next(row for row in cells.rows if row[0] == "0.014")
    assert lonely[-2:] == ["", ""]


def test_the_rows_of_a_model_stand_together(tmp_path):
    """Whatever order the runs were found in."""
    path = ROOT / "example_files/compare/study_ms_ssim.json"
    config = load_config(path, CompareConfig, [f'output_dir="{tmp_path}"'])
    for one in config.combinations:
        losses = {name: [1.0, *[0.9] * 4] for name in IMAGES}
        write_run(tmp_path / config.save_name_of(*one), losses, side=192)
    losses, _ = collect(tmp_path, ROOT / "example_files/compare")
    rows = of_ms_ssim(losses).rows
    models = [f"lambda {model.train_lambda:g}" for model in config.models]
    assert [row[:2] for row in rows] == [
        [model, method] for model in models for method in ("base", *config.methods)
    ]


@pytest.mark.parametrize(
    ("name", "spoil", "words"),
    [
        ("losses", lambda text: "a,b\n1,2\n", "has no column study, method"),
        ("curves", lambda text: text.replace(",2000,", ",garb,"), "cannot be read"),
    ],
)
def test_damaged_tables_are_named(results, tmp_path, name, spoil, words, capsys):
    assert main([str(results[0]), "-o", str(tmp_path)]) == 0
    path = tmp_path / f"{name}.csv"
    path.write_text(spoil(path.read_text()))
    assert draw_main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"{path}: {words}" in error


def test_the_commands_write_the_same_plots_again(results, tmp_path, capsys):
    folder, *_ = results
    out = tmp_path / "out"
    assert main([str(folder), "-o", str(out)]) == 0
    assert draw_main([str(out)]) == 0
    plots = {path.name: path.read_bytes() for path in out.glob("*.svg")}
    names = ("methods", "curves", "sensitivity", "lambdas", "probabilities")
    assert set(plots) == {f"{name}.svg" for name in names}  # no results of SSL's a were made
    for plot in plots.values():
        assert ET.fromstring(plot).tag.endswith("svg")
    printed = capsys.readouterr().out
    assert "| SGA+ SSL |" in printed and "nan" not in printed
    assert draw_main([str(out)]) == 0
    assert all((out / name).read_bytes() == plot for name, plot in plots.items())
    assert draw_main([str(tmp_path)]) == 2
    assert "losses.csv: cannot be read" in capsys.readouterr().err


def test_runs_that_are_not_done_are_left_out(tmp_path, capsys):
    """So that all means are over the same images; and a crop of another size is no crop."""
    path = ROOT / "example_files/compare/study_ssl_scale.json"
    config = load_config(path, CompareConfig, [f'output_dir="{tmp_path}"'])
    folders = [tmp_path / config.save_name_of(*one) for one in config.combinations[:3]]
    losses = {name: [1.0] * len(STEPS) for name in IMAGES}
    write_run(folders[0], losses)
    write_run(folders[1], {name: losses[name] for name in IMAGES[:2]})
    write_run(folders[2], losses, side=768)
    write_run(
        tmp_path / config.save_name_of(*config.combinations[3]), dict.fromkeys("xyz", [1.0] * 5)
    )
    table, curves = collect(tmp_path, ROOT / "example_files/compare")
    assert set(table["method"]) == {"base", config.combinations[0][0]}
    printed = capsys.readouterr().out
    assert f"left out, with 2 of the 3 images: {folders[1]}" in printed
    assert "left out, with 0 of the 3 images: " in printed
    assert f"{folders[2]}: left out: its a.png is another picture: 768x768" in printed
    assert list(curves.columns) == ["study", "method", "model", "step", "loss"] and curves.empty


def test_the_page_has_the_tables_of_its_csv_files():
    text = (ROOT / "docs/study.md").read_text()
    losses, curves = (read_table(ROOT / f"docs/study/{name}.csv") for name in ("losses", "curves"))
    assert sum(path.stat().st_size for path in (ROOT / "docs/study").glob("*.csv")) < 500_000
    for title, cells in tables_of(losses, curves):
        assert markdown_of(cells).strip() in text, title
    assert not any(math.isnan(loss) for loss in losses["loss"])


@pytest.mark.parametrize(
    ("name", "function", "ceil"),
    [
        ("sga_logits", "logx", lambda v: v),
        ("sga_logits", "cosx", lambda v: np.sin(np.pi * v / 2) ** 2),
        ("sga_logits", "ssl", lambda v: 1 / (1 + ((1 - v) / v) ** (4 / 3))),
    ],
)
def test_probabilities_are_the_papers(name, function, ceil):
    v, probability, candidates = candidate_probabilities(name, function)
    assert candidates == ["floor(v)", "ceil(v)"]
    assert probability[1] == pytest.approx(ceil(v.astype(float)), abs=1e-4)
