"""Runs of both scripts whose loss counts MS-SSIM, against CompressAI's layers and pytorch-msssim.

Among the pictures are some that are too small for it.
"""

import json
import math
import re

import numpy as np
import pandas as pd
import pytest
import skimage
import torch
from PIL import Image
from pytorch_msssim import ms_ssim

from architectures.footprint import footprint_of
from coding.coder import decode_picture, encode_latents
from common.errors import InputError
from config import Channels
from conftest import WEIGHTS, read_jsonl, to_x, values_of_refinement
from fast.memory import MemoryBound
from fast.tiles import tiled_picture
from models import build_model, load_checkpoint
from objectives import RateDistortion
from pretraining.training_pass import TrainingPass
from runs import decoded_result, leave_out_plots, limit_for_tiles, numbers, results, run
from trainings import folder_of

LMBDA = 8.0
CROPS = {
    "a.png": skimage.data.chelsea()[60:236, 100:270],  # 176x170
    "b.png": skimage.data.coffee()[100:276, 200:370],
    "c.png": skimage.data.rocket()[200:360, 300:480],  # 160 rows: one too few
    "d.png": skimage.data.astronaut()[:160, :180],
}
SMALL = "has 180x160 pixels; the objective ms-ssim needs 161 or more a side"


def write_crops(folder, names=tuple(CROPS)):
    """The folder, now with these crops."""
    folder.mkdir(parents=True)
    for name in names:
        Image.fromarray(CROPS[name]).save(folder / name)
    return folder


def values_for(photos, output):
    """The JSON values of a short refinement for MS-SSIM."""
    values = values_of_refinement(photos, output)
    values |= {"objective": "ms-ssim", "images": 4, "eval_freq": 2}
    values["dev_options"]["inference_lambda"] = LMBDA
    return values


@pytest.fixture(scope="module")
def network():
    """The weights that are refined, as CompressAI's own network."""
    return load_checkpoint(str(WEIGHTS)).network


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The values and the exit code of a run over all crops, whose plots are drawn."""
    folder = tmp_path_factory.mktemp("objective")
    values = values_for(write_crops(folder / "photos"), folder / "results")
    path = folder / "config.json"
    path.write_text(json.dumps(values))
    return values, run(path)


@pytest.fixture
def values(tmp_path, monkeypatch):
    """The values of a run over the first crop alone, without plots."""
    leave_out_plots(monkeypatch)
    return values_for(write_crops(tmp_path / "crops", ["a.png"]), tmp_path / "results")


def loss_of(network, folder, record, lmbda):
    """The loss of saved latents from its formula: bpp + lambda * (1 - MS-SSIM), x_hat in floats."""
    x_hat, _, bpp = decoded_result(network, folder, record)
    similarity = ms_ssim(x_hat, to_x(CROPS[record["name"]]), data_range=1.0)
    return bpp + lmbda * (1 - similarity.item())


# --- refinement


def test_losses_are_those_of_the_saved_latents(finished, network):
    values, _ = finished
    records = read_jsonl(results(values) / "images.jsonl")
    assert [record["name"] for record in records] == ["a.png", "b.png"]
    for record in records:
        refined = record["refined"]
        assert (record["objective"], record["weighted"], record["lmbda"]) == ("ms-ssim", None, 8)
        loss = loss_of(network, results(values), record, LMBDA)
        assert refined["true_loss"] == pytest.approx(loss, rel=1e-5)
        assert refined["distortion"] == pytest.approx((loss - refined["bpp"]) / LMBDA, rel=1e-4)
        x_hat, *_ = decoded_result(network, results(values), record)
        mse = (x_hat - to_x(CROPS[record["name"]])).double().square().mean().item()
        assert refined["mse"] == pytest.approx(mse, rel=1e-4)
        assert refined["psnr_raw"] == pytest.approx(-10 * math.log10(mse), rel=1e-5)
        assert refined["true_loss"] < 0.98 * record["base"]["true_loss"]


def test_the_best_step_has_the_lowest_loss_for_ms_ssim(finished):
    values, _ = finished
    for record in read_jsonl(results(values) / "images.jsonl"):
        table = pd.read_csv(results(values) / "trajectories" / f"{record['name']}.csv")
        best = table.loc[table["true_loss"].idxmin()]
        assert record["best_step"] == best["step"]
        assert record["refined"]["true_loss"] == pytest.approx(best["true_loss"], rel=1e-9)
        expected = table["true_bpp"] + LMBDA * table["true_distortion"]
        np.testing.assert_allclose(table["true_loss"], expected, rtol=1e-6)
        relaxed = table["relaxed_bpp"] + LMBDA * table["relaxed_distortion"]
        np.testing.assert_allclose(table["relaxed_loss"], relaxed, rtol=1e-6)


def test_images_too_small_for_ms_ssim_are_skipped_in_a_line_each(finished):
    values, exit_code = finished
    assert exit_code == 1
    summary = json.loads((results(values) / "summary.json").read_text())
    assert (summary["images"], summary["objective"]) == (2, "ms-ssim")
    assert summary["failed"] == {"c.png": SMALL, "d.png": SMALL}
    lines = (results(values) / "log.txt").read_text().splitlines()
    for name in ("c.png", "d.png"):
        assert len([line for line in lines if f"{name}: skipped: {SMALL}" in line]) == 1
    assert "loss, ms-ssim" in "\n".join(lines)
    assert "lambda 8 for ms-ssim" in "\n".join(lines)


def test_a_batch_gives_each_image_its_own_result(finished, write_config, monkeypatch):
    leave_out_plots(monkeypatch)
    values, _ = finished
    path = write_config(values)
    assert run(path, "save_name=batch", "batch_size=2") == 1
    folder = results(values | {"save_name": "batch"})
    assert json.loads((folder / "summary.json").read_text())["failed"] == {
        "c.png": SMALL, "d.png": SMALL
    }  # fmt: skip
    together, alone = (read_jsonl(each / "images.jsonl") for each in (folder, results(values)))
    for one, other in zip(together, alone, strict=True):
        assert (one["name"], one["batch"], other["batch"]) == (other["name"], 2, 1)
        for key in ("true_loss", "bpp", "distortion"):
            assert one["base"][key] == pytest.approx(other["base"][key], rel=1e-5)
            assert one["refined"][key] == pytest.approx(other["refined"][key], rel=5e-3)


def test_the_largest_picture_that_the_log_names_just_fits(values, write_config):
    bounds = [
        MemoryBound(footprint, limit=12e9, base=1.3e9)
        for footprint in (
            footprint_of(build_model(Channels(N=8, M=8))),
            footprint_of(build_model(Channels(N=8, M=8))).with_pictures(),
            footprint_of(build_model(Channels(N=8, M=8)))._replace(halo=None),
        )
    ]
    for bound in bounds:
        width = bound.largest() / 4000
        bound.tile((4000, int(0.999 * width)))
        with pytest.raises(InputError, match="max_memory_gb is 12"):
            bound.tile((4000, int(1.001 * width)))
    assert bounds[1].largest() < bounds[0].largest()
    bound = MemoryBound(footprint_of(load_checkpoint(str(WEIGHTS))).with_pictures(), 3e9, 1.3e9)
    assert run(write_config(values), "max_memory_gb=3", "tot_inference_iterations=1") == 0
    log = (results(values) / "log.txt").read_text()
    (said,) = re.findall(r"pictures of up to ([\d.]+) megapixels fit into 3 GB\n", log)
    assert float(said) == pytest.approx(bound.largest() / 1e6, rel=0.006)


def test_tiles_give_the_run_of_the_whole_picture(values, write_config, monkeypatch):
    sides, limit = [], limit_for_tiles(monkeypatch, (176, 170), with_pictures=True)

    def noted(g_s, y_hat, tiling):
        sides.append(tiling)
        return tiled_picture(g_s, y_hat, tiling)

    monkeypatch.setattr("architectures.base.tiled_picture", noted)
    path = write_config(values | {"tot_inference_iterations": 4})
    assert run(path, "save_name=whole") == 0
    assert not sides
    assert run(path, "save_name=tiled", f"max_memory_gb={limit}") == 0
    assert set(sides) == {(3, 2)}
    (whole,), (tiled,) = (
        read_jsonl(results(values | {"save_name": name}) / "images.jsonl")
        for name in ("whole", "tiled")
    )
    for side in ("base", "refined"):
        for key in ("true_loss", "bpp", "distortion", "psnr", "ms_ssim"):
            assert tiled[side][key] == pytest.approx(whole[side][key], rel=1e-4)
    assert whole["refined"]["true_loss"] < whole["base"]["true_loss"]


def test_a_run_goes_on_only_with_its_objective(finished, values, write_config, tmp_path, capsys):
    """What comes after the break is what an unbroken run has."""
    write_crops(tmp_path / "both", ["a.png", "b.png"])
    values["dev_options"]["path_test"] = {"folder": str(tmp_path / "both")}
    path = write_config(values)
    assert run(path, "images=1") == 0
    (first,) = read_jsonl(results(values) / "images.jsonl")
    to_mse = ("objective=mse", "dev_options.inference_lambda=0.01")
    assert run(path, "resume=true", *to_mse) == 2
    assert "objective ('ms-ssim' then, 'mse' now)" in capsys.readouterr().err
    assert read_jsonl(results(values) / "images.jsonl") == [first]
    assert run(path, "resume=true") == 0
    assert read_jsonl(results(values) / "images.jsonl")[0] == first
    unbroken, _ = finished
    assert numbers(results(values)) == numbers(results(unbroken))


def test_a_run_from_before_objectives_goes_on(values, write_config, capsys):
    values["objective"] = "mse"
    values["dev_options"] |= {"inference_lambda": 0.01}
    path, folder = write_config(values), results(values)
    assert run(path) == 0
    old = json.loads((folder / "config.json").read_text())
    for key in ("objective", "target_ms_ssim_db"):
        del old[key]
    for key in ("path_weights", "region_strength"):
        del old["dev_options"][key]
    (folder / "config.json").write_text(json.dumps(old))
    (record,) = read_jsonl(folder / "images.jsonl")
    for key in ("objective", "weighted"):
        del record[key]
    for side in ("base", "refined"):
        del record[side]["distortion"]
    (folder / "images.jsonl").write_text(json.dumps(record) + "\n")
    assert run(path, "resume=true") == 0
    printed = capsys.readouterr().out
    assert "1 of 1 images are done already" in printed
    assert printed.count("loss, mse") == 2
    assert read_jsonl(folder / "images.jsonl") == [record]


def test_bfloat16_reports_losses_in_float32(values, write_config, network):
    values |= {"precision": "bfloat16", "tot_inference_iterations": 4}
    assert run(write_config(values)) == 0
    (record,) = read_jsonl(results(values) / "images.jsonl")
    assert record["precision"] == "bfloat16"
    assert record["refined"]["true_loss"] == pytest.approx(
        loss_of(network, results(values), record, LMBDA), rel=1e-5
    )
    assert record["refined"]["true_loss"] < 0.99 * record["base"]["true_loss"]


def ms_ssim_db_of_file(coder, data, name):
    """MS-SSIM in dB of the 8-bit picture that a file decodes to."""
    shown = (decode_picture(coder, data).clamp(0, 1) * 255).round()
    original = torch.from_numpy(CROPS[name].copy()).permute(2, 0, 1)[None].float()
    return -10 * math.log10(1 - ms_ssim(shown, original, data_range=255).item())


@pytest.mark.parametrize("objective", ["mse", "ms-ssim"])
def test_files_meet_a_target_for_ms_ssim(values, write_config, tmp_path, coder, network, objective):
    """A picture that is too small fails alone, whatever the loss counts."""
    Image.fromarray(CROPS["c.png"]).save(tmp_path / "crops" / "c.png")
    x = to_x(CROPS["a.png"])
    unrefined = encode_latents(
        coder, coder.model.symbols(coder.model.analyze(x), (176, 170)), (176, 170)
    )
    wanted = ms_ssim_db_of_file(coder, unrefined, "a.png") - 0.3
    values |= {"objective": objective, "target_ms_ssim_db": wanted, "tot_inference_iterations": 40}
    if objective == "mse":
        values["dev_options"]["inference_lambda"] = None
    assert run(write_config(values)) == 1
    folder = results(values)
    (record,) = read_jsonl(folder / "images.jsonl")
    got = ms_ssim_db_of_file(coder, (folder / "bitstreams" / "a.png.olc").read_bytes(), "a.png")
    assert got == pytest.approx(wanted, abs=0.05)
    assert record["target"]["met"]
    assert (record["target"]["kind"], record["target"]["wanted"]) == ("ms_ssim_db", wanted)
    assert record["target"]["got"] == pytest.approx(got, abs=1e-3)
    needs = "target_ms_ssim_db" if objective == "mse" else "the objective ms-ssim"
    reason = f"has 180x160 pixels; {needs} needs 161 or more a side"
    assert json.loads((folder / "summary.json").read_text())["failed"] == {"c.png": reason}
    for side in (record["base"], record["refined"]):
        weighted = record["lmbda"] * side["distortion"] * (65025 if objective == "mse" else 1)
        assert side["true_loss"] == pytest.approx(side["bpp"] + weighted, rel=1e-5)
    if objective == "ms-ssim":
        loss = loss_of(network, folder, record, record["lmbda"])
        assert record["refined"]["true_loss"] == pytest.approx(loss, rel=1e-4)


# --- training


@pytest.fixture
def values_of_training(train_values):
    """The values of a short training for MS-SSIM, on crops that are large enough."""
    return train_values | {
        "objective": "ms-ssim", "train_lambda": LMBDA, "image_size": 192, "tot_iterations": 4,
        "save_model_freq": 100,
    }  # fmt: skip


def test_a_training_for_ms_ssim_reports_and_tests_its_loss(train_on, values_of_training, capsys):
    assert train_on(values_of_training) == 0
    folder = folder_of(values_of_training)
    rows = read_jsonl(folder / "metrics.jsonl")
    trained = [row for row in rows if row["kind"] == "train"]
    assert [row["step"] for row in trained] == [2, 4]
    for row in trained:
        assert row["loss"] == pytest.approx(row["bpp"] + LMBDA * row["distortion"], rel=1e-5)
        assert 0 < row["distortion"] < 1
    reason = "odd.png: not tested: the objective ms-ssim needs 161 pixels or more a side"
    assert capsys.readouterr().out.count(reason) == 1
    assert train_on(values_of_training, test=True) == 1
    assert reason in capsys.readouterr().out
    report = json.loads((folder / "test.json").read_text())
    cat, odd = report["images"]
    assert odd == {"name": "odd.png", "error": reason.partition("tested: ")[2]}
    network = load_checkpoint(str(folder / "iter_4.pth.tar")).network
    x = to_x(skimage.data.chelsea()[:192, :256])
    with torch.no_grad():
        out = network(x)
    bpp = sum(-p.log2().sum().item() for p in out["likelihoods"].values()) / (192 * 256)
    distortion = 1 - ms_ssim(out["x_hat"], x, data_range=1.0).item()
    assert cat["loss"] == pytest.approx(bpp + LMBDA * distortion, rel=1e-4)
    assert report["mean"]["loss"] == cat["loss"] == rows[-1]["loss"]
    to_mse = {"objective": "mse", "train_lambda": 0.01, "resume": True}
    assert train_on(values_of_training, **to_mse) == 2
    assert "objective ('ms-ssim' then, 'mse' now)" in capsys.readouterr().err


def test_the_training_pass_has_the_loss_and_gradient_of_stock_modules(small):
    """With rounded latents nothing is random: CompressAI's network, which rounds in tests."""
    x = torch.stack([to_x(CROPS[name][:, :170])[0] for name in ("a.png", "b.png")])
    x = torch.nn.functional.interpolate(x, (192, 192), mode="bilinear")
    network = small.network.requires_grad_()
    try:
        training_pass = TrainingPass(small, RateDistortion(LMBDA, "ms-ssim"), quantization="mixed")
        terms = training_pass(x)
        out = network(x)
        expected = 1 - ms_ssim(out["x_hat"], x, data_range=1.0)
        assert terms["distortion"].item() == pytest.approx(expected.item(), rel=1e-5)
        assert terms["loss"].item() == pytest.approx(
            terms["bpp"].item() + LMBDA * expected.item(), rel=1e-5
        )
        # The rates do not depend on g_s: its gradient is that of the distortion alone.
        weights = list(network.g_s.parameters())
        ours = torch.autograd.grad(terms["loss"], weights, retain_graph=True)
        theirs = torch.autograd.grad(LMBDA * expected, weights)
        for one, other in zip(ours, theirs, strict=True):
            scale = other.abs().max().item()
            assert scale > 0
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * scale)
    finally:
        network.requires_grad_(False)
