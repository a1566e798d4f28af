"""bfloat16 in the steps: where it is taken, how near it is to float32, what stays in float32."""

import copy
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import common.device
import train
from common.device import pick_precision
from compare import plan_runs, precision_of_auto
from config import Channels, CompareConfig, RefineConfig, load_config
from conftest import ROOT, read_jsonl
from experimental_inference_methods import rounding_from_config
from fast.precision import FrozenLayers
from models import build_model, freeze, load_checkpoint
from passes import problem_of, refined, to_optimise, true_terms
from runs import results, run

pytestmark = pytest.mark.usefixtures("without_run_plots")

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def frozen():
    """The bundled model, frozen."""
    return freeze(load_checkpoint("example_files/weights/mean_scale_n64_lambda0.01.pth.tar"))


@pytest.fixture(scope="module")
def photo(frozen):
    """A crop [1, 3, 96, 128] of a photo."""
    import skimage

    from conftest import to_x

    return to_x(skimage.data.coffee()[100:196, 200:328])


@pytest.mark.parametrize(("share", "picked"), [(0.5, "bfloat16"), (0.95, "float32")])
def test_auto_is_what_is_clearly_faster(monkeypatch, share, picked):
    seconds = {torch.float32: 1.0, torch.bfloat16: share}
    monkeypatch.setattr(common.device, "_upsampling_seconds", lambda v, weight: seconds[v.dtype])
    assert pick_precision("auto", CPU) == picked
    names = ["float32", "bfloat16"]
    assert [pick_precision(name, CPU) for name in names] == names


def test_a_processor_without_units_for_it_takes_float32():
    code = "import torch, common.device as d; print(d.pick_precision('auto', torch.device('cpu')))"
    restricted = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=restricted, check=True,
                          capture_output=True, text=True)  # fmt: skip
    assert done.stdout.strip() == "float32"


def test_a_frozen_network_is_cast_once_and_computes_what_its_cast_copy_does():
    torch.manual_seed(0)
    layers = FrozenLayers(torch.nn.Conv2d(3, 4, 3), torch.nn.LeakyReLU(), torch.nn.Conv2d(4, 2, 1))
    layers.requires_grad_(False)
    v = torch.randn(1, 3, 8, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layers(v)
        first = layers._copies[torch.bfloat16]
        assert torch.equal(layers(v), out)
    assert layers._copies == {torch.bfloat16: first}
    cast = torch.nn.Sequential(*copy.deepcopy(layers)).to(torch.bfloat16)
    assert torch.equal(out, cast(v.to(torch.bfloat16)))
    out.float().sum().backward()
    assert v.grad.dtype == torch.float32
    assert layers(v).dtype == torch.float32
    assert all(value.dtype == torch.float32 for value in layers.state_dict().values())


def test_the_copy_shares_the_memory_pool_but_not_winograds_form(frozen):
    g_s = freeze(build_model(Channels(N=8, M=8))).network.g_s
    kernel = g_s.to_picture.upsampling
    assert kernel.winograd is kernel.winograd  # kept
    reduced = g_s._copy_in(torch.bfloat16)
    assert reduced.pool is g_s.pool is reduced.to_picture.upsampling.pool
    assert "winograd" not in vars(reduced.to_picture.upsampling)
    assert {value.dtype for value in reduced.state_dict().values()} == {torch.bfloat16}


def test_gradients_in_bfloat16_point_where_those_in_float32_do(frozen, photo):
    latents, gradients, losses = frozen.analyze(photo), {}, {}
    for precision in (torch.float32, torch.bfloat16):
        moved = to_optimise(latents)
        loss = problem_of(frozen, photo, precision=precision).relaxed(moved, lambda v: v + 0.1).loss
        loss.sum().backward()
        losses[precision] = loss.item()
        gradients[precision] = {name: v.grad for name, v in moved.items()}
    assert losses[torch.bfloat16] == pytest.approx(losses[torch.float32], rel=0.01)
    assert losses[torch.bfloat16] != losses[torch.float32]
    for name, exact in gradients[torch.float32].items():
        near = gradients[torch.bfloat16][name]
        assert torch.cosine_similarity(exact.flatten(), near.flatten(), dim=0) > 0.98


def test_refinement_and_polish_in_bfloat16_end_near_float32(frozen, photo):
    values = {"precision": "bfloat16", "images": 1, "tot_inference_iterations": 60}
    sets = [f"{key}={json.dumps(value)}" for key, value in values.items()]
    config = load_config("example_files/fast.json", RefineConfig, sets)
    losses = {}
    for precision in (torch.float32, torch.bfloat16):
        problem = problem_of(frozen, photo, precision=precision)
        (trajectory,) = refined(problem, config, [0], rounding_from_config(config))
        losses[precision] = trajectory.lowest_loss
        first, last = trajectory.rows[0], trajectory.rows[-2:]
        assert last[1]["true_loss"] < last[0]["true_loss"], "the polish gains nothing"
        # Every row is in float32: what it says of the best latents is what float32 computes.
        again = true_terms(frozen, photo, trajectory.latents).loss.item()
        assert trajectory.lowest_loss == pytest.approx(again, rel=1e-6)
    # So short a run of so small a picture differs by as much with another seed.
    assert losses[torch.bfloat16] == pytest.approx(losses[torch.float32], rel=0.02)
    assert losses[torch.bfloat16] != losses[torch.float32]
    relaxed = problem_of(frozen, photo).relaxed(frozen.analyze(photo), torch.round).loss.item()
    assert first["true_loss"] == pytest.approx(relaxed, rel=1e-6)


def test_evaluated_relaxed_losses_are_in_float32(frozen, photo):
    sets = ["tot_inference_iterations=1", "polish_passes=0"]
    config = load_config("example_files/fast.json", RefineConfig, sets)
    problem = problem_of(frozen, photo)
    rows = []
    for precision in (torch.float32, torch.bfloat16):
        at = replace(problem, precision=precision)
        (trajectory,) = refined(at, config, [0], rounding_from_config(config))
        rows.append(trajectory.rows[0])
    assert rows[0] == rows[1]


def test_the_record_and_the_first_line_say_which(config_values, write_config, capsys, monkeypatch):
    monkeypatch.setattr(common.device, "is_faster_in_bfloat16", lambda device: True)
    path = write_config(config_values)
    assert run(path, "images=1", "precision=auto", "tot_inference_iterations=1") == 0
    assert "cpu, bfloat16" in capsys.readouterr().out
    folder = results(config_values)
    (record,) = read_jsonl(folder / "images.jsonl")
    assert record["precision"] == "bfloat16"
    assert json.loads((folder / "summary.json").read_text())["precision"] == "bfloat16"
    # Elsewhere another precision may be faster: the run keeps its own, and mixes it with no other.
    monkeypatch.setattr(common.device, "is_faster_in_bfloat16", lambda device: False)
    again = ["images=2", "resume=true", "tot_inference_iterations=1"]
    assert run(path, *again, "precision=float32") == 2
    assert "differs in precision ('bfloat16' then, 'float32' now)" in capsys.readouterr().err
    assert run(path, *again, "precision=auto") == 0
    assert [record["precision"] for record in read_jsonl(folder / "images.jsonl")] == [
        "bfloat16"
    ] * 2


def test_a_run_from_before_precision_was_recorded_goes_on(
    finished, write_config, capsys, monkeypatch
):
    file = results(finished) / "images.jsonl"
    records = read_jsonl(file)
    for record in records:
        del record["precision"]
    file.write_text("".join(f"{json.dumps(record)}\n" for record in records[:-1]))
    path = write_config(finished)
    monkeypatch.setattr(common.device, "is_faster_in_bfloat16", lambda device: True)
    assert run(path, "resume=true", "precision=bfloat16") == 2
    assert "differs in precision ('float32' then, 'bfloat16' now)" in capsys.readouterr().err
    for _ in range(2):
        assert run(path, "resume=true", "precision=auto") == 0
    assert "cpu, float32" in capsys.readouterr().out


def test_a_training_keeps_its_precision(tmp_path, monkeypatch):
    values = {
        "train_lambda": 0.01, "channels": {"N": 8, "M": 8}, "batch_size": 1, "image_size": 64,
        "train_folder": "sample", "save_name": "run", "output_dir": str(tmp_path),
        "precision": "auto", "resume": True,
    }  # fmt: skip
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    for faster, steps in ((True, 1), (False, 2)):
        monkeypatch.setattr(common.device, "is_faster_in_bfloat16", lambda _, is_it=faster: is_it)
        assert train.main(["--config", str(path), "--set", f"tot_iterations={steps}"]) == 0
        stored = json.loads((tmp_path / "run/config.json").read_text())
        assert stored["precision"] == "bfloat16"
    command = ["--config", str(path), "--set", "tot_iterations=3", "--set", "precision=float32"]
    assert train.main(command) == 2


def test_all_runs_of_a_comparison_have_one_precision(monkeypatch):
    config = load_config("example_files/compare/study_seeds.json", CompareConfig)
    runs = plan_runs(config)
    asked = []
    monkeypatch.setattr(common.device, "is_faster_in_bfloat16", lambda device: not asked.append(1))
    precision = precision_of_auto(runs, CPU)
    assert (precision, asked) == ("bfloat16", [1])
    settled = {run.method: run.in_precision(precision).config.precision for run in runs}
    assert settled == {
        run.method: {"auto": "bfloat16"}.get(run.config.precision, "float32") for run in runs
    }
    assert {"bfloat16", "float32"} == set(settled.values())
