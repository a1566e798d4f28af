"""Comparisons in parts: some methods alone, a report before the end, results of two machines."""

import html
import json
import re
import shutil
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pandas as pd
import pytest

from common.measuring import Cost
from common.records import RECORD_KEYS, SIDE_KEYS, records_in
from compare import main
from conftest import WEIGHTS, read_jsonl, values_of_refinement, write_photos
from refinement.forecast import Forecast, Work, time_left
from reports.compared_run import ComparedRun, runs_to_compare
from runs import NAMES, leave_out_plots

# Decoder passes of an image: steps, and two for each evaluation, at the start and at the end too.
PASSES = {"short": 4 + 2 * (2 + 2), "long": 9 + 2 * (3 + 2)}
MODEL = "lambda 0.01"


@pytest.fixture(autouse=True)
def without_plots(monkeypatch):
    """Leaves out all plots: no test here reads them."""
    leave_out_plots(monkeypatch)
    monkeypatch.setattr("reports.comparison.all_plots", lambda *_: {})


def values_of(folder):
    """The JSON values of a comparison of two methods over the photos in a folder."""
    method = folder / "method.json"
    method.write_text(json.dumps(values_of_refinement(folder / "photos", folder / "unused")))
    steps = {"short": (4, 2), "long": (9, 3)}
    return {
        "save_name": "parts", "output_dir": str(folder / "whole"), "data_set": "folder",
        "path": str(folder / "photos"), "images": 3, "shown": 0,
        "methods": {
            name: {"config": str(method),
                   "set": {"tot_inference_iterations": total, "eval_freq": every}}
            for name, (total, every) in steps.items()
        },
        "models": [{"pretrain": str(WEIGHTS), "train_lambda": 0.01}],
    }  # fmt: skip


def compare(values, *options):
    """The exit code of a comparison by JSON values."""
    path = Path(values["output_dir"]).with_suffix(".json")
    path.write_text(json.dumps(values))
    return main(["--config", str(path), *options])


def run_folder(values, method):
    return Path(values["output_dir"]) / "parts/runs" / method / MODEL


def table_of(values):
    """The main table without what a clock decides."""
    table = pd.read_csv(Path(values["output_dir"]) / "parts/table.csv")
    return table.drop(columns=["seconds"])


def content(folder):
    """The bytes of every file below a folder."""
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def whole_once(tmp_path_factory):
    """The JSON values of a comparison."""
    folder = tmp_path_factory.mktemp("parts")
    write_photos(folder / "photos")
    return values_of(folder)


@pytest.fixture(scope="module")
def printed_by_whole(whole_once):
    """What the comparison prints; afterwards it is finished."""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as out:
        leave_out_plots(patch)
        patch.setattr("reports.comparison.all_plots", lambda *_: {})
        assert compare(whole_once) == 0
    return out.getvalue()


@pytest.fixture
def whole(whole_once, printed_by_whole, tmp_path):
    """The JSON values of the finished comparison, with a copy of its results to spoil."""
    shutil.copytree(whole_once["output_dir"], tmp_path / "copy")
    return whole_once | {"output_dir": str(tmp_path / "copy")}


# --- progress


def percents(printed):
    return [int(found) for found in re.findall(r"(\d+) % of the decoder passes", printed)]


def test_progress_is_over_the_whole_plan(printed_by_whole):
    total = 3 * sum(PASSES.values())
    done = [*(number * PASSES["short"] for number in range(4))]
    done += [done[-1] + number * PASSES["long"] for number in range(4)]
    assert percents(printed_by_whole) == [100 * part // total for part in done]
    assert f"6 refinements to do, {total} decoder passes" in printed_by_whole
    starts = re.findall(r"\[(\d of \d)\] .*\ndone: (\d of \d) runs", printed_by_whole)
    assert starts == [("1 of 2", "0 of 2"), ("2 of 2", "1 of 2")]
    assert "done: 2 of 2 runs, 100 % of the decoder passes\n" in printed_by_whole
    # In each line but the first and the last.
    assert printed_by_whole.count("passes; less than a minute left\n") == len(done) - 2


def test_progress_goes_on_after_a_restart_and_counts_the_chosen_methods_alone(whole, capsys):
    records = run_folder(whole, "long") / "images.jsonl"
    first = records.read_text().splitlines(keepends=True)[0]
    records.write_text(first)
    shutil.rmtree(run_folder(whole, "short"))
    assert compare(whole, "--only", "long") == 0
    out, _ = capsys.readouterr()
    assert percents(out) == [33, 66, 100]
    assert f"2 refinements to do, {2 * PASSES['long']} decoder passes" in out
    assert not run_folder(whole, "short").exists()
    assert "not done yet, and left out: short with lambda 0.01 (0 of 3 images)" in out
    assert set(table_of(whole)["method"]) == {"base", "long"}


def record_of(name):
    side = dict.fromkeys(SIDE_KEYS, 1.0)
    return dict.fromkeys(RECORD_KEYS, 1) | {"name": name, "base": side, "refined": side}


def add_records(path, *names):
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(record_of(name)) + "\n" for name in names)


def test_time_left_follows_the_passes_of_all_processes(tmp_path, monkeypatch, capsys):
    """Two runs of 8 images, 10 and 30 passes each, by 2 processes in batches of 3."""
    now = [0.0]
    monkeypatch.setattr("refinement.forecast.time.monotonic", lambda: now[0])
    names = [str(number) for number in range(8)]
    first, second = (tmp_path / name for name in "ab")
    add_records(first / "images.jsonl", "0", "1", "no image of this run")
    forecast = Forecast([Work(first, names, 10), Work(second, names, 30)], processes=2)
    assert forecast.at_run(0) == "done: 0 of 2 runs, 6 % of the decoder passes"  # 20 of 320
    now[0] = 600
    cost = Cost(1.0, 1.0, 1.0, batch=3)
    forecast.print_after(cost)
    # The other process has 3 of the 6 as well: 60 passes in 10 minutes, and 240 are left.
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(
        "done: 1 of 2 runs, 25 % of the decoder passes; about 40 min left, until"
    )
    # The other process failed at one image. It is no work any more.
    add_records(first / "images.rank0.jsonl", "2", "3", "4")
    add_records(first / "images.rank1.jsonl", "5", "6")
    add_records(second / "images.rank1.jsonl", "7")
    now[0] = 1200
    # Now 70 + 30 of 310 passes; 80 in 20 minutes, so 210 take 52.5.
    assert forecast.at_run(1).startswith("done: 1 of 2 runs, 32 % of the decoder passes; about 52")
    now[0] = 1800
    forecast.print_after(cost)
    # 6 of the 7 images: 280 of 310 passes, and 260 of them in half an hour.
    assert capsys.readouterr().out.startswith(
        "done: 1 of 2 runs, 90 % of the decoder passes; about 3 min left, until about "
    )


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(29, "less than a minute left"), (80 * 60, "about 1 h 20 min left"), (3600, "about 1 h left"),
     (3599, "about 1 h left"), (100 * 3600, "about 100 h left")],
)  # fmt: skip
def test_times_in_words(seconds, words):
    found = time_left(seconds)
    assert found.startswith(words)
    if seconds >= 60:
        end = r"\d{4}-\d\d-\d\d \d\d:\d\d" if seconds > 24 * 3600 else r"(\S+ )?\d\d:\d\d"
        assert re.fullmatch(words + ", until about " + end, found)


# --- some methods alone


def test_an_unknown_method_is_refused_in_a_line(whole_once, capsys):
    assert compare(whole_once, "--only", "shrot") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("only: no method 'shrot'; there is short, long")


def test_two_halves_are_the_whole(whole, tmp_path, capsys):
    """Two machines do a method each; the second one's folder is copied to the first."""
    halves = [whole | {"output_dir": str(tmp_path / name)} for name in ("one", "two")]
    for half, method in zip(halves, ("short", "long"), strict=True):
        assert compare(half, "--only", method) == 0
    capsys.readouterr()
    one, two = halves
    shutil.copytree(run_folder(two, "long"), run_folder(one, "long"))
    before = content(run_folder(one, "long"))
    assert compare(one, "--report") == 0
    assert content(run_folder(one, "long")) == before
    out, error = capsys.readouterr()
    assert "not done yet" not in out and error == ""
    pd.testing.assert_frame_equal(table_of(one), table_of(whole))
    # The plain command refines nothing again: a record holds the seconds that it took.
    records = read_jsonl(run_folder(one, "long") / "images.jsonl")
    assert compare(one) == 0
    assert read_jsonl(run_folder(one, "long") / "images.jsonl") == records
    assert "0 refinements to do" in capsys.readouterr().out
    pd.testing.assert_frame_equal(table_of(one), table_of(whole))


def test_results_of_another_device_are_reported_and_not_gone_on_with(whole, capsys):
    path = run_folder(whole, "long") / "images.jsonl"
    path.write_text("".join(
        json.dumps(record | {"device": "cuda", "seconds": 0.5}) + "\n"
        for record in read_jsonl(path)
    ))  # fmt: skip
    before = table_of(whole)
    for options in (["--report"], ["--only", "short"]):
        assert compare(whole, *options) == 0
        pd.testing.assert_frame_equal(table_of(whole), before)
    table = pd.read_csv(Path(whole["output_dir"]) / "parts/table.csv").set_index("method")
    assert table.loc["long", "seconds"] == 0.5
    capsys.readouterr()
    assert compare(whole) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "its results were made on cuda, and this is cpu" in line and "--report" in line


# --- a report before the end


def cut_off(folder, parts):
    """Leave a run as it is while ranks refine: some records, in files, and no summary yet.

    Args:
        parts: by the file's name, which of the run's records it has; -1: the first half of a line.
    """
    lines = (folder / "images.jsonl").read_text().splitlines(keepends=True)
    for name in ("images.jsonl", "summary.json"):
        (folder / name).unlink()
    for name, numbers in parts.items():
        half = lines[2][: len(lines[2]) // 2]
        (folder / name).write_text("".join(half if n == -1 else lines[n] for n in numbers))


def test_a_run_in_progress_is_left_out_named_and_left_alone(whole, capsys):
    """It needs no checkpoint, and changes no file of a run."""
    slow = run_folder(whole, "long")
    cut_off(slow, {"images.jsonl": [0], "images.rank1.jsonl": [1, -1]})
    (slow / "latents/.c.npz.1.tmp").write_bytes(b"in progress")
    values = whole | {"models": [{"pretrain": "gone.pth.tar", "train_lambda": 0.01}]}
    before, table = content(slow.parent.parent), table_of(whole).set_index("method")
    assert compare(values, "--report") == 0
    out, error = capsys.readouterr()
    assert "not done yet, and left out: long with lambda 0.01 (2 of 3 images)\n" in out
    assert error == "" and content(slow.parent.parent) == before
    now = table_of(values).set_index("method")
    assert set(now.index) == {"base", "short"} and set(now["images"]) == {3}
    assert now.loc["short", "true_loss"] == table.loc["short", "true_loss"]


def test_results_of_another_config_are_named(whole, capsys):
    """Other paths are not: another machine may have others."""
    moved = Path(whole["output_dir"]) / "moved"
    shutil.copytree(whole["path"], moved)
    assert compare(whole | {"path": str(moved)}, "--report") == 0
    assert "another config" not in capsys.readouterr().out
    whole["methods"] = json.loads(json.dumps(whole["methods"]))  # other tests have them, too
    whole["methods"]["long"]["set"] |= {"optimizer.lr": 0.5, "eval_freq": 9}
    assert compare(whole, "--report") == 0
    changes = "eval_freq (3 then, 9 now), optimizer.lr (0.02 then, 0.5 now)"
    line = f"{run_folder(whole, 'long')}: was refined with another config: {changes}\n"
    assert line in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weights": "00ff"}, r"it has other weights: 00ff, but \w{16} in .*/short/lambda 0\.01"),
        ({"width": 999}, r"its \S+ is another picture: 999x\d+, unrefined .* dB, but \d+x"),
        ({"base": {"bpp": 0.9}}, r"another picture: \d+x\d+, unrefined 0\.9000 bpp and"),
    ],
)
def test_results_of_other_weights_or_pictures_are_left_out(whole, change, words, capsys):
    """They are named, on the page, too. Numbers that are only rounded differently do not matter.

    What two of three runs have is right, be it not the first one's.
    """
    whole["methods"] = {"zero": whole["methods"]["short"]} | whole["methods"]
    shutil.copytree(run_folder(whole, "short"), run_folder(whole, "zero"))
    path = run_folder(whole, "long") / "images.jsonl"
    records = read_jsonl(path)
    for record in records:
        record["base"]["bpp"] *= 1.001
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert compare(whole, "--report") == 0
    assert ", but " not in capsys.readouterr().out
    for key, value in change.items():
        records[1][key] = records[1][key] | value if isinstance(value, dict) else value
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert compare(whole, "--report") == 0
    (line,) = re.findall(r".*, but .*", capsys.readouterr().out)
    assert line.startswith(f"{run_folder(whole, 'long')}: left out: ")
    assert re.search(words.replace("short", "zero"), line)
    assert set(table_of(whole)["method"]) == {"base", "zero", "short"}
    page = (Path(whole["output_dir"]) / "parts/report.html").read_text()
    assert html.escape(line[1:]) in page


def test_older_records_without_weights_are_not_left_out(whole, capsys):
    path = run_folder(whole, "long") / "images.jsonl"
    records = read_jsonl(path)
    for record in records:
        del record["weights"]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert compare(whole, "--report") == 0
    assert "left out" not in capsys.readouterr().out
    assert set(table_of(whole)["method"]) == {"base", "long", "short"}


def test_what_a_run_failed_at_is_only_named_where_the_run_is_compared(whole, capsys):
    """And so with its precision."""
    folder = run_folder(whole, "long")
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(summary | {"failed": {NAMES[0]: "broken"}}))
    lines = (folder / "images.jsonl").read_text().splitlines()[1:]
    records = [json.loads(line) | {"precision": "bfloat16"} for line in lines]

    def report():
        path = folder / "images.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        assert compare(whole, "--report") == 0
        return capsys.readouterr().out

    out = report()
    assert f"failed, and not compared: {NAMES[0]} with lambda 0.01\n" in out
    assert "networks computed in float32 (short), bfloat16 (long)\n" in out
    records[0]["weights"] = "00ff"
    out = report()
    assert "left out: it has other weights" in out
    assert "failed, and" not in out and "networks computed" not in out


def test_methods_of_different_precision_are_named(whole, capsys):
    whole["methods"] = json.loads(json.dumps(whole["methods"]))  # other tests have them, too
    whole["methods"]["long"]["set"]["precision"] = "bfloat16"
    shutil.rmtree(run_folder(whole, "long"))
    assert compare(whole) == 0
    assert "\nnetworks computed in float32 (short), bfloat16 (long)\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kind", "content", "code"),
    [
        ("trajectories/{}.csv", "garb", 2), ("trajectories/{}.csv", "step,true_loss\n0,1\n", 2),
        ("trajectories/{}.csv", "step,temperature,true_loss,relaxed_loss\n0,1,1,1\nnan,1,1,1\n", 2),
        ("latents/{}.npz", "garb", 0), ("latents/{}.npz", "", 0), ("config.json", "{", 0),
    ],
)  # fmt: skip
def test_a_damaged_file_of_a_run_is_named(whole, kind, content, code, capsys):
    path = run_folder(whole, "long") / kind.format(NAMES[0])
    path.write_text(content)
    assert compare(whole | {"shown": 1}, "--report") == code
    out, error = capsys.readouterr()
    (line,) = [line for line in (out + error).splitlines() if str(path.parent) in line]
    if code == 2:
        assert line.startswith(f"error: {path}: ") and line.endswith("; refine this image again")
    else:
        assert path.name in line and "cannot be read" in line


def test_before_any_run_is_done_all_that_have_images_are_compared(whole, capsys):
    cut_off(run_folder(whole, "short"), {"images.rank0.jsonl": [2], "images.rank1.jsonl": [0, -1]})
    cut_off(run_folder(whole, "long"), {"images.jsonl": [0, 1, -1]})
    assert compare(whole, "--report") == 0
    out = capsys.readouterr().out
    expected = (
        "not done yet: short with lambda 0.01 (2 of 3 images), long with lambda 0.01 (2 of 3)"
    )
    assert f"{expected}\n" in out
    table = table_of(whole).set_index("method")
    assert set(table["images"]) == {1} and set(table.index) == {"base", "short", "long"}
    for method in ("short", "long"):
        record = records_in(run_folder(whole, method))[NAMES[0]]
        assert table.loc[method, "true_loss"] == pytest.approx(record["refined"]["true_loss"])


def test_a_report_of_nothing_is_an_error(whole, capsys):
    shutil.rmtree(run_folder(whole, "short"))
    cut_off(run_folder(whole, "long"), {"images.jsonl": [-1]})
    assert compare(whole, "--report") == 2
    out, error = capsys.readouterr()
    assert out.count("\n") == 1 and "(0 of 3 images), long with lambda 0.01 (0 of 3)" in out
    folder = f"{whole['output_dir']}/parts"
    assert error.endswith(f"{folder}: no image was refined yet; run it without --report first\n")


def test_an_image_that_failed_is_not_waited_for(whole, capsys):
    """It has no record, but its run is over: that is compared on the images it has."""
    path = Path(whole["path"]) / "d_broken.png"
    path.write_bytes(b"no picture")
    try:
        values = whole | {"images": 4}
        assert compare(values) == 1
        table = table_of(values)
        capsys.readouterr()
        assert compare(values, "--report") == 0
        out = capsys.readouterr().out
        assert (
            "not done yet" not in out
            and "failed, and not compared: d_broken.png with lambda 0.01\n" in out
        )
        assert (
            "Failed, and not compared: d_broken.png with lambda 0.01."
            in (Path(values["output_dir"]) / "parts/report.html").read_text()
        )
        pd.testing.assert_frame_equal(table_of(values), table)
    finally:
        path.unlink()


def test_a_long_list_of_runs_is_shortened(tmp_path):
    runs = [
        ComparedRun("a", f"lambda {number}", seed, tmp_path / f"{number} {seed}")
        for number in range(4) for seed in (0, 1)
    ]  # fmt: skip
    add_records(runs[0].folder / "images.jsonl", "x", "y")
    add_records(runs[2].folder / "images.jsonl", "x")
    kept, message = runs_to_compare(runs, ["x", "y"])
    assert kept == runs[:1]
    assert message == (
        "not done yet, and left out: a with lambda 0, seed 1 (0 of 2 images), "
        "a with lambda 1, seed 0 (1 of 2), a with lambda 1, seed 1 (0 of 2), "
        "a with lambda 2, seed 0 (0 of 2), a with lambda 2, seed 1 (0 of 2) and 2 more"
    )
    assert runs_to_compare(runs, ["x", "y"], over=runs)[1] == ""
