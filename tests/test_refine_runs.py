"""The refinement as a user runs it: what it leaves behind, and what it survives."""

import io
import json
import os
import sys
import time
import types

import numpy as np
import pandas as pd
import pytest
import skimage
import torch
from forks import Fork, ends_of, free_port, launch
from PIL import Image

from architectures import MeanScale
from config import RefineConfig, load_config
from conftest import WEIGHTS, read_jsonl, to_x
from passes import true_terms
from refinement.batch import metrics_of
from runs import NAMES, numbers, results, run
from train_flexible_inference import main, refine_images, report

pytestmark = pytest.mark.usefixtures("without_run_plots")

# --- what a run leaves behind ---------------------------------------------------------------------


@pytest.mark.usefixtures("with_run_plots")
def test_a_run_leaves_everything_behind(config_values, write_config, model, photos, capsys):
    config_values["dev_options"]["save_final"] = True
    config_values["tracker"] = "tensorboard"
    assert run(write_config(config_values)) == 0
    folder = results(config_values)
    records = read_jsonl(folder / "images.jsonl")
    assert [record["name"] for record in records] == NAMES
    printed = capsys.readouterr().out
    gains = [record["base"]["true_loss"] - record["refined"]["true_loss"] for record in records]
    assert min(gains) >= 0
    assert sum(gain > 0 for gain in gains) >= 2  # eight steps are few
    for record in records:
        assert set(record["base"]) == set(record["refined"]) == {
            "bpp", "bpp_y", "bpp_z", "distortion", "mse", "psnr", "psnr_raw", "ms_ssim",
            "ms_ssim_db", "true_loss", "relaxed_loss",
        }  # fmt: skip
        assert record["peak_memory_mb"] > 10
        assert record["name"] in printed
        _check_latents_decode(folder, record, model, photos)
        pictures = folder / "reconstructions" / record["name"]
        assert {path.name for path in pictures.iterdir()} == {
            "original.png", "base.png", "step_0001.png", "step_0008.png", "refined.png",
        }  # fmt: skip
    trajectory = pd.read_csv(folder / "trajectory.csv")
    assert trajectory["step"].tolist() == [0, 4, 8]
    mean_base = np.mean([record["base"]["true_loss"] for record in records])
    assert trajectory["true_loss"][0] == pytest.approx(mean_base)
    assert {"temperature", "relaxed_loss", "true_loss", "true_bpp", "true_psnr"} <= set(trajectory)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["images"] == 3
    mean_bpp = np.mean([record["refined"]["bpp"] for record in records])
    assert summary["refined"]["bpp"] == pytest.approx(mean_bpp)
    for name in ("trajectory.png", "before_after.png", "comparison.png"):
        assert str(folder / name) in printed
        assert min(Image.open(folder / name).size) > 300
    assert "tot_inference_iterations" in (folder / "config.json").read_text()
    assert "c_rocket.png" in (folder / "log.txt").read_text()
    assert list((folder / "tensorboard").iterdir())
    assert not list(folder.rglob(".*"))


def _check_latents_decode(folder, record, model, photos):
    """The stored integers alone give the reported picture, and the reported rate."""
    stored = np.load(folder / "latents" / f"{record['name']}.npz")
    assert stored["y"].dtype == stored["z"].dtype == np.int32
    x = to_x(np.asarray(Image.open(photos / record["name"])))
    network, (height, width) = model.network, stored["y"].shape[1:]
    medians = network.entropy_bottleneck.quantiles[:, 0, 1].reshape(1, -1, 1, 1)
    z_hat = torch.from_numpy(stored["z"])[None] + medians
    _, means = network.h_s(z_hat)[:, :, :height, :width].chunk(2, 1)
    latents = {"y": torch.from_numpy(stored["y"])[None] + means, "z": z_hat}
    (metrics,), shown = metrics_of(true_terms(model, x, latents), x)
    assert metrics["bpp"] == pytest.approx(record["refined"]["bpp"], rel=1e-4)
    assert metrics["psnr"] == pytest.approx(record["refined"]["psnr"], rel=1e-4)
    picture = Image.open(folder / "reconstructions" / record["name"] / "refined.png")
    torch.testing.assert_close(to_x(np.asarray(picture)), shown, rtol=0, atol=1.01 / 255)


def test_wandb_gets_every_row_or_says_how_to_install_it(
    config_values, write_config, monkeypatch, capsys
):
    path = write_config(config_values | {"tracker": "wandb", "tot_batches": 1})
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert run(path) == 2
    assert "pip install wandb" in capsys.readouterr().err
    rows = []
    session = types.SimpleNamespace(log=rows.append)
    stand_in = types.SimpleNamespace(init=lambda **_: session)
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    assert run(path) == 0
    assert [row["a_chelsea.png/step"] for row in rows] == [0, 4, 8]


@pytest.mark.usefixtures("with_run_plots")
def test_tiny_and_odd_images_work(config_values, write_config, photos):
    for name in NAMES:
        (photos / name).unlink()
    pixels = skimage.data.chelsea()
    Image.fromarray(pixels[:1, :1]).save(photos / "one.png")
    Image.fromarray(pixels[:3, :65]).save(photos / "strip.png")
    Image.fromarray(pixels[:161, :170]).save(photos / "ms_ssim.png")
    assert run(write_config(config_values)) == 0
    by_name = {record["name"]: record for record in numbers(results(config_values))}
    assert (by_name["one.png"]["width"], by_name["one.png"]["height"]) == (1, 1)
    assert by_name["strip.png"]["base"]["ms_ssim"] is None
    assert by_name["ms_ssim.png"]["base"]["ms_ssim"] > 0.5


def test_conversions_are_mentioned_once_and_recorded_of_each(
    config_values, write_config, photos, capsys
):
    for name in NAMES:
        Image.open(photos / name).convert("L").save(photos / name)
    assert run(write_config(config_values)) == 0
    assert capsys.readouterr().out.count("L converted to RGB") == 1
    records = numbers(results(config_values))
    assert [record["converted"] for record in records] == [["L converted to RGB"]] * 3


def test_a_short_data_set_is_used_once_and_said_so(config_values, write_config, capsys):
    assert run(write_config(config_values | {"tot_batches": 12, "batch_size": 2})) == 0
    assert "the data set has 3 images, fewer than the config's 24" in (capsys.readouterr().out)
    assert len(numbers(results(config_values))) == 3


def test_tot_batches_takes_the_first_images(config_values, write_config, capsys):
    assert run(write_config(config_values | {"tot_batches": 1, "batch_size": 2})) == 0
    assert [record["name"] for record in numbers(results(config_values))] == NAMES[:2]
    assert "the first 2 of 3 images" in capsys.readouterr().out


def test_a_method_without_effect_is_said(config_values, write_config, capsys):
    values = config_values | {"improving_methods": {"ste": True}, "tot_batches": 1}
    assert run(write_config(values)) == 0
    printed = capsys.readouterr().out
    assert "improving_methods.ste has no effect" in printed
    assert "log_ssl_a_factor_pow (factor 0.98, power 1.4, scale_factor 1.4)" in printed


# --- repeatable, resumable, in several processes --------------------------------------------------


def test_a_run_repeats_itself_and_any_subset_of_it(config_values, write_config, photos):
    run(write_config(config_values))
    first = numbers(results(config_values))
    run(write_config(config_values | {"save_name": "again"}))
    assert numbers(results(config_values | {"save_name": "again"})) == first
    (photos / NAMES[0]).unlink()
    run(write_config(config_values | {"save_name": "subset"}))
    assert numbers(results(config_values | {"save_name": "subset"})) == first[1:]
    run(write_config(config_values | {"save_name": "other", "seed": 1}))
    other = numbers(results(config_values | {"save_name": "other"}))
    assert other[0]["refined"]["true_loss"] != first[1]["refined"]["true_loss"]


SCRIPT = "import sys, train_flexible_inference as t; sys.exit(t.main(['--config', {!r}]))"


def test_a_killed_run_resumes_to_the_same_numbers(config_values, write_config, capsys):
    values = config_values | {"tot_inference_iterations": 60, "eval_freq": 20}
    path = write_config(values)
    assert run(path, "save_name=whole") == 0
    killed = Fork(SCRIPT.format(str(path)))
    folder = results(values)
    records = folder / "images.jsonl"
    while not (records.exists() and records.read_bytes()) and killed.is_alive():
        time.sleep(0.01)
    killed.kill()
    killed.join()
    done = len(read_jsonl(records))
    assert 1 <= done < 3
    (folder / "latents" / ".123.tmp.npz").write_bytes(b"left behind")
    assert run(path) == 2
    assert 'go on with "resume": true' in capsys.readouterr().err
    assert run(path, "resume=true") == 0
    assert f"{done} of 3 images are done already" in capsys.readouterr().out
    assert numbers(folder) == numbers(results(values | {"save_name": "whole"}))
    means = [pd.read_csv(folder.parent / run / "trajectory.csv") for run in ("run", "whole")]
    pd.testing.assert_frame_equal(*means)
    assert not list(folder.rglob(".*"))


def test_two_processes_give_the_result_of_one(config_values, write_config):
    values = config_values | {"tot_inference_iterations": 4, "eval_freq": 2, "tot_batches": 4}
    (results(values).parent.parent / "photos" / "d_broken.png").write_bytes(b"broken")
    path = str(write_config(values))
    ((code, _, errors),) = ends_of([Fork(SCRIPT.format(path))])
    assert code == 1, errors
    path, port = str(write_config(values | {"save_name": "two"})), free_port()
    ends = ends_of([launch(SCRIPT.format(path), rank, 2, port) for rank in (0, 1)])
    assert [code for code, *_ in ends] == [1, 1], ends
    assert "failed: d_broken.png" in ends[0][1]
    both = results(values | {"save_name": "two"})
    assert numbers(both) == numbers(results(values))
    log = (both / "log.txt").read_text()
    assert [log.count(f"{name}: 0.") for name in NAMES] == [1, 1, 1]
    assert not list(both.glob("images.rank*"))
    summary = json.loads((both / "summary.json").read_text())
    assert summary["images"] == 3
    assert list(summary["failed"]) == ["d_broken.png"]


def test_results_of_single_ranks_are_not_lost(finished, write_config):
    """What a killed run of several processes left is found by the next, in one process."""
    path = write_config(finished)
    folder = results(finished)
    lines = (folder / "images.jsonl").read_text().splitlines(keepends=True)
    (folder / "images.rank0.jsonl").write_text(lines[0])
    (folder / "images.rank1.jsonl").write_text(lines[1])
    (folder / "images.jsonl").unlink()
    assert run(path, "resume=true") == 0
    assert [record["name"] for record in numbers(folder)] == NAMES
    assert (folder / "images.jsonl").read_text().startswith(lines[0] + lines[1])


def test_a_record_that_is_lost_is_a_failure(finished, write_config, capsys):
    """A process says that it is done, but what it wrote cannot be read."""
    config = load_config(write_config(finished), RefineConfig, ["resume=true"])
    refined = refine_images(config)
    path = results(finished) / "images.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    assert report(refined) == 1
    assert f"failed: {NAMES[0]}" in capsys.readouterr().out
    summary = json.loads((results(finished) / "summary.json").read_text())
    assert list(summary["failed"]) == [NAMES[0]]
    assert run(write_config(finished), "resume=true") == 0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=3", "seed (0 then, 3 now)"),
        ("dev_options.temp_rate=0.5", "dev_options.temp_rate (0.01 then, 0.5 now)"),
    ],
)
def test_a_run_is_not_resumed_with_another_config(
    finished, write_config, capsys, override, message
):
    path = write_config(finished)
    before = (results(finished) / "images.jsonl").read_text()
    assert run(path, "resume=true", override) == 2
    assert message in capsys.readouterr().err
    assert (results(finished) / "images.jsonl").read_text() == before


def test_a_run_is_not_resumed_with_other_weights(config_values, write_config, tmp_path, capsys):
    weights = torch.load(WEIGHTS, weights_only=True)
    path = tmp_path / "weights.pth.tar"
    torch.save(weights, path)
    values = config_values | {"pretrain": str(path)}
    run(write_config(values), "tot_batches=1")
    weights["model_state_dict"]["g_s.6.bias"] += 0.01
    torch.save(weights, path)
    assert run(write_config(values), "resume=true") == 2
    assert "its results were made with other weights" in capsys.readouterr().err


# --- trouble --------------------------------------------------------------------------------------


def test_an_unreadable_image_is_skipped_by_name(config_values, write_config, photos, capsys):
    whole = (photos / NAMES[0]).read_bytes()
    (photos / "aa_broken.png").write_bytes(whole[:200])
    assert run(write_config(config_values | {"tot_batches": 4})) == 1
    assert "aa_broken.png: skipped:" in capsys.readouterr().out
    folder = results(config_values)
    assert [record["name"] for record in numbers(folder)] == NAMES
    assert list(json.loads((folder / "summary.json").read_text())["failed"]) == ["aa_broken.png"]


@pytest.mark.usefixtures("with_run_plots")
def test_a_loss_that_is_not_finite_stops_the_image_at_its_best(config_values, write_config, capsys):
    path = write_config(config_values | {"optimizer": {"name": "sgd", "lr": 1e30}})
    assert run(path) == 0
    records = numbers(results(config_values))
    assert [record["name"] for record in records] == NAMES
    assert all(record["best_step"] == 0 for record in records)
    assert all("not finite at step 4" in record["stopped"] for record in records)
    assert "stopped, the loss is not finite at step 4; kept step 0" in capsys.readouterr().out


def test_an_image_without_a_finite_loss_is_skipped(config_values, write_config, tmp_path, capsys):
    """Weights that overflow: nothing can be kept, not even the encoder's latents."""
    weights = torch.load(WEIGHTS, weights_only=True)
    bias = weights["model_state_dict"]["g_s.6.bias"].float()  # half precision on disk
    weights["model_state_dict"]["g_s.6.bias"] = bias + 1e38
    path = tmp_path / "overflow.pth.tar"
    torch.save(weights, path)
    assert run(write_config(config_values | {"pretrain": str(path)})) == 1
    printed = capsys.readouterr().out
    assert "a_chelsea.png: skipped: its loss is not finite even before refinement" in printed
    assert "no image was refined" in printed


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory: 9 bytes")],
)
def test_an_image_that_does_not_fit_into_memory_is_skipped(
    config_values, write_config, monkeypatch, capsys, error
):
    analyze = MeanScale.analyze

    def no_memory_for_wide_images(model, x):
        if x.size(3) == 100:
            raise error
        return analyze(model, x)

    monkeypatch.setattr(MeanScale, "analyze", no_memory_for_wide_images)
    assert run(write_config(config_values)) == 1
    assert "c_rocket.png: skipped: does not fit into the memory of cpu" in capsys.readouterr().out
    assert [record["name"] for record in numbers(results(config_values))] == NAMES[:2]


@pytest.mark.usefixtures("with_run_plots")
def test_file_names_of_every_kind(config_values, write_config, photos, monkeypatch):
    """Names that plots take for formulas, that are no text, that the console has no letters for."""
    names = ["a $_$ b.png", "日本.png", os.fsdecode(b"caf\xe9.png")]
    for old, new in zip(NAMES, names, strict=True):
        (photos / old).rename(photos / new)
    config_values["dev_options"]["save_final"] = True
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    assert run(write_config(config_values)) == 0
    assert {record["name"] for record in numbers(results(config_values))} == set(names)
    assert (results(config_values) / "comparison.png").is_file()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("pretrain=nowhere.pth.tar", "pretrain nowhere.pth.tar: no such file"),
        ("dev_options.path_test.folder=nowhere", "path_test.folder = nowhere: no such folder"),
        ("device=abacus", "device = 'abacus': must be auto, cpu"),
        ("dev_options.tmp_rate=1", "unknown key 'dev_options.tmp_rate'"),
        ("dev_options.sga_logits_params.logits=cosx", "sga_logits_3c has absx"),
        ("output_dir=/dev/null/results", "/dev/null/results/run: Not a directory"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    config_values, write_config, capsys, override, message
):
    assert run(write_config(config_values), override) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert not results(config_values).exists()


def test_the_script_says_what_it_wants(capsys):
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 2
    assert "--config" in capsys.readouterr().err
