"""Comparisons of methods with several objectives, with maps, and with a target for all."""

import html
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import skimage
from PIL import Image

from common.errors import InputError
from compare import main, plan_runs
from config import CompareConfig, load_config
from conftest import WEIGHTS, read_jsonl, values_of_refinement
from runs import leave_out_plots

LMBDAS = (0.005, 0.01)  # of the models
MS_SSIM_LMBDAS = (5.0, 11.0)
METHODS = ("mse", "similar", "region")
IMAGES = ["a.png", "b.png"]


def method_file(folder, photos):
    """The path of a config of a short refinement."""
    values = values_of_refinement(photos, folder / "unused")
    # A method that gains in four steps.
    values["dev_options"] |= {"improving_methods": {"unoise": True}, "sga_logits_params": {}}
    path = folder / "method.json"
    path.write_text(json.dumps(values))
    return str(path)


def model_values(lmbda, **more):
    """The JSON values of a bundled model."""
    name = f"mean_scale_n64_lambda{lmbda}.pth.tar"
    return {"pretrain": str(WEIGHTS.with_name(name)), "train_lambda": lmbda, **more}


def write_photos(folder):
    """The folder, now with two pictures that are large enough for MS-SSIM."""
    folder.mkdir()
    for name, pixels in zip(
        IMAGES, (skimage.data.chelsea()[60:230, 100:270], skimage.data.coffee()[100:270, 200:370]),
        strict=True,
    ):  # fmt: skip
        Image.fromarray(pixels).save(folder / name)
    return folder


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A finished comparison: its values, its folder, the exit code, and the weighing map's path.

    Three methods: for MSE, for MS-SSIM, and for MSE with a map; two models.
    """
    folder = tmp_path_factory.mktemp("objectives")
    photos = write_photos(folder / "photos")
    rows, columns = np.mgrid[:170, :170]
    bright = np.where(np.hypot(rows - 60, columns - 60) < 40, 255, 15).astype(np.uint8)
    Image.fromarray(bright).save(folder / "map.png")
    method = method_file(folder, photos)
    values = {
        "save_name": "three", "output_dir": str(folder / "results"), "data_set": "folder",
        "path": str(photos), "images": 2, "shown": 1, "anchor": "mse",
        "set": {"tot_inference_iterations": 4, "eval_freq": 2, "optimizer.lr": 0.01},
        "methods": {
            "mse": {"config": method},
            "similar": {"config": method, "set": {"objective": "ms-ssim"}},
            "region": {"config": method, "roi": str(folder / "map.png")},
        },
        "models": [
            model_values(lmbda, ms_ssim_lambda=other)
            for lmbda, other in zip(LMBDAS, MS_SSIM_LMBDAS, strict=True)
        ],
    }  # fmt: skip
    path = folder / "compare.json"
    path.write_text(json.dumps(values))
    with pytest.MonkeyPatch.context() as patch:
        leave_out_plots(patch)
        exit_code = main(["--config", str(path)])
    return values, folder / "results/three", exit_code


def records_of(folder, method, lmbda):
    """The records of a run by image."""
    path = folder / "runs" / method / f"lambda {lmbda:g}" / "images.jsonl"
    return {record["name"]: record for record in read_jsonl(path)}


def loss_names(values):
    """The objective of each method, as tables name it."""
    maps = values["methods"]["region"]["roi"]
    return {"mse": "mse", "similar": "ms-ssim", "region": f"mse, weighted by {Path(maps).name}"}


def test_each_method_got_its_own_lambda_and_map(compared):
    values, folder, exit_code = compared
    assert exit_code == 0
    for lmbda, of_ms_ssim in zip(LMBDAS, MS_SSIM_LMBDAS, strict=True):
        for method in METHODS:
            records = records_of(folder, method, lmbda)
            assert list(records) == IMAGES
            for record in records.values():
                assert record["lmbda"] == (of_ms_ssim if method == "similar" else lmbda)
                assert ("psnr_inside" in record["refined"]) == (method == "region")
                weight = record["lmbda"] * (1 if method == "similar" else 255**2)
                for side in (record["base"], record["refined"]):
                    loss = side["bpp"] + weight * side["distortion"]
                    assert side["true_loss"] == pytest.approx(loss, rel=1e-6)
                assert record["refined"]["true_loss"] < record["base"]["true_loss"]
    for run in ("similar", "region"):
        config = json.loads((folder / f"runs/{run}/lambda 0.01/config.json").read_text())
        assert config["dev_options"]["path_weights"]["folder"] == values["methods"][run].get("roi")


def test_ms_ssim_lambda_wins_for_methods_of_its_objective_alone(compared, tmp_path):
    values, _, _ = compared
    path = tmp_path / "compare.json"
    model = model_values(0.01, inference_lambda=0.012, ms_ssim_lambda=11.0)
    path.write_text(json.dumps(values | {"models": [model]}))
    runs = plan_runs(load_config(path, CompareConfig))
    assert {run.method: run.config.lmbda for run in runs} == {
        "mse": 0.012, "similar": 11.0, "region": 0.012
    }  # fmt: skip
    path.write_text(json.dumps(values | {"models": [model_values(0.01)]}))
    with pytest.raises(
        InputError, match=r"models, lambda 0\.01: methods\.similar .* an ms_ssim_lambda"
    ):
        plan_runs(load_config(path, CompareConfig))


def test_losses_are_compared_within_one_objective(compared):
    values, folder, _ = compared
    table, names = pd.read_csv(folder / "table.csv"), loss_names(values)
    assert len(table) == 2 * 3 * 2  # for each model and objective: the base and a method
    for lmbda in LMBDAS:
        of_model = table[table["model"] == f"lambda {lmbda:g}"]
        for method, objective in names.items():
            own = of_model[of_model["objective"] == objective].set_index("method")
            assert set(own.index) == {"base", method}
            records = records_of(folder, method, lmbda).values()
            losses = {
                side: np.array([record[side]["true_loss"] for record in records])
                for side in ("base", "refined")
            }
            assert own.loc["base", "true_loss"] == pytest.approx(losses["base"].mean())
            assert own.loc[method, "true_loss"] == pytest.approx(losses["refined"].mean())
            changes = own[["change_percent", "change_of_mean_percent", "most_change"]]
            if method != "mse":  # the anchor has another objective
                assert changes.isna().all(axis=None)
                continue
            change = 100 * (losses["base"] / losses["refined"] - 1).mean()
            assert own.loc["base", "change_percent"] == pytest.approx(change)
            assert own.loc["mse", "change_percent"] == 0


def test_the_tables_have_the_quality_inside_and_outside_of_runs_with_maps(compared):
    values, folder, _ = compared
    table = pd.read_csv(folder / "table.csv")
    weighted = table["objective"] == loss_names(values)["region"]
    for key in ("psnr_inside", "psnr_outside"):
        assert table.loc[~weighted, key].isna().all()
        for lmbda in LMBDAS:
            records = records_of(folder, "region", lmbda).values()
            own = table[weighted & (table["model"] == f"lambda {lmbda:g}")].set_index("method")
            for method, side in (("base", "base"), ("region", "refined")):
                mean = np.mean([record[side][key] for record in records])
                assert own.loc[method, key] == pytest.approx(mean)


def test_a_report_without_the_maps_says_so(compared, tmp_path, capsys):
    values, folder, _ = compared
    before = pd.read_csv(folder / "table.csv")
    maps = Path(values["methods"]["region"]["roi"])
    moved = maps.rename(tmp_path / maps.name)
    path = tmp_path / "compare.json"
    path.write_text(json.dumps(values))
    try:
        assert main(["--config", str(path), "--report"]) == 0
    finally:
        moved.rename(maps)
    assert re.search(f"no maps are shown: .*{maps}", capsys.readouterr().out)
    pd.testing.assert_frame_equal(pd.read_csv(folder / "table.csv"), before)


def test_the_image_table_has_the_base_once_for_each_objective(compared):
    values, folder, _ = compared
    images, names = pd.read_csv(folder / "images.csv"), loss_names(values)
    assert len(images) == 2 * 2 * 3 * 2
    for _, row in images.iterrows():
        method = next(name for name, loss in names.items() if loss == row["objective"])
        assert row["method"] in ("base", method)
        side = "base" if row["method"] == "base" else "refined"
        record = records_of(folder, method, float(row["model"].removeprefix("lambda ")))
        expected = record[row["image"]]
        for key in ("bpp", "psnr", "ms_ssim_db", "true_loss"):
            assert row[key] == pytest.approx(expected[side][key])
        assert row["lmbda"] == expected["lmbda"]
    # Not weighed: the same for each objective.
    base = images[images["method"] == "base"]
    assert (base.groupby(["model", "image"])["psnr"].nunique() == 1).all()
    assert (base.groupby(["model", "image"])["true_loss"].nunique() == 3).all()


def test_curves_and_deltas_are_for_both_qualities(compared):
    _, folder, _ = compared
    bd = pd.read_csv(folder / "bd.csv")
    keys = {tuple(row) for row in bd[["curve", "image", "quality"]].to_numpy()}
    assert keys == {
        (curve, image, quality)
        for curve in ("base", "similar", "region") for image in (*IMAGES, "(mean curve)")
        for quality in ("psnr", "ms_ssim_db")
    }  # fmt: skip
    assert len(bd) == len(keys)
    assert (bd["reason"] == "2 points: at least 3 make a curve").all()
    assert set(bd["points"]) == {"2 and 2"}  # one of base, though it has a row for each objective
    curves = pd.read_csv(folder / "curves.csv").groupby("curve")
    assert {name: len(own) for name, own in curves} == dict.fromkeys(("base", *METHODS), 2)
    records = records_of(folder, "similar", 0.01).values()
    own = curves.get_group("base").set_index("model").loc["lambda 0.01"]
    for key in ("bpp", "psnr", "ms_ssim_db"):
        assert own[key] == pytest.approx(np.mean([record["base"][key] for record in records]))


def test_the_page_names_the_objectives(compared):
    values, folder, _ = compared
    page = (folder / "report.html").read_text()
    for name in loss_names(values).values():
        assert f"<td>{html.escape(name)}</td>" in page
    assert "Losses of different objectives" in page
    assert all(f"PSNR {where}" in page for where in ("inside", "outside"))
    # The lowest loss of each model and objective is bold: in Markdown between stars.
    lines = (folder / "table.md").read_text().splitlines()[2:]
    table = pd.read_csv(folder / "table.csv")
    lowest = table.loc[table.groupby(["model", "objective"])["true_loss"].idxmin()]
    bold = [line.split("**")[1] for line in lines if "**" in line]
    assert sorted(bold) == sorted(f"{loss:.4f}" for loss in lowest["true_loss"])
    assert set(lowest["method"]) == set(METHODS)
    assert min(Image.open(folder / "loss.png").size) > 400
    for name in ("detail_1", "bits_1"):
        assert (folder / f"{name}.png").stat().st_size > 10_000


def test_methods_with_different_targets_are_refused(compared, tmp_path, capsys):
    values, _, _ = compared
    methods = {
        name: {**values["methods"][name], "set": {"target_bpp": wanted}}
        for name, wanted in (("mse", 0.3), ("region", 0.4))
    }
    path = tmp_path / "compare.json"
    path.write_text(json.dumps(values | {"methods": methods, "save_name": "other"}))
    assert main(["--config", str(path)]) == 2
    error = capsys.readouterr().err
    assert "methods.mse: a target must be the same for all methods: put it into set" in error
    assert error.count("\n") == 1
    for method in methods.values():
        method["set"]["target_bpp"] = 0.3
    path.write_text(json.dumps(values | {"methods": methods, "save_name": "other"}))
    runs = plan_runs(load_config(path, CompareConfig))
    assert {run.config.target.wanted for run in runs} == {0.3}


def test_a_common_target_has_no_losses(compared, tmp_path, monkeypatch, capsys):
    """Rates and quality are compared, and an earlier plot of losses does not stay."""
    photos = write_photos(tmp_path / "photos")
    (photos / "b.png").unlink()
    Image.open(photos / "a.png").crop((0, 0, 90, 70)).save(photos / "a.png")
    records = records_of(compared[1], "mse", 0.01)
    values = {
        **compared[0], "save_name": "target", "output_dir": str(tmp_path), "path": str(photos),
        "images": 1, "shown": 0, "models": [model_values(0.01)], "anchor": "base",
        "set": {"tot_inference_iterations": 8, "target_bpp": 1.4 * records["a.png"]["base"]["bpp"]},
    }  # fmt: skip
    values["methods"] = {name: values["methods"][name] for name in ("mse", "region")}
    folder = tmp_path / "target"
    folder.mkdir()
    (folder / "loss.png").write_bytes(b"of an earlier comparison")
    leave_out_plots(monkeypatch)
    path = tmp_path / "compare.json"
    path.write_text(json.dumps(values))
    assert main(["--config", str(path)]) == 0
    table, images = (pd.read_csv(folder / f"{name}.csv") for name in ("table", "images"))
    assert set(table["method"]) == {"base", "mse", "region"}
    for key in ("true_loss", "change_percent", "change_of_mean_percent"):
        assert table[key].isna().all()
    assert images["true_loss"].isna().all()
    assert set(images["rate"]) == {"file"}
    for method in ("mse", "region"):
        (record,) = records_of(folder, method, 0.01).values()
        own = table.set_index("method").loc[method]
        assert own["bpp"] == pytest.approx(record["refined"]["file_bpp"])
        assert own["psnr"] == pytest.approx(record["refined"]["psnr"])
    assert not (folder / "loss.png").exists()
    page = (folder / "report.html").read_text()
    assert "so losses are not compared" in page
    assert "nan" not in capsys.readouterr().out.partition("| model |")[2]
    assert "**" not in (folder / "table.md").read_text()
