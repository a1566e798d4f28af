"""Runs with maps of where distortion counts: what is weighed, and what is measured inside."""

import json

import numpy as np
import pytest
import skimage
import torch
from PIL import Image
from torch.nn.functional import conv2d

from conftest import WEIGHTS, needs, to_x, values_of_refinement
from fast.tiles import tiled_error
from models import freeze, load_checkpoint
from runs import (
    NAMES,
    decoded,
    decoded_result,
    leave_out_plots,
    limit_for_tiles,
    numbers,
    results,
    run,
)
from train_flexible_inference import main

MAPPED, UNMAPPED, BLACK = NAMES  # the images a, b and c of `photos`
REGION_KEYS = {"psnr_inside", "psnr_outside", "y_bits_inside", "y_bits_outside"}


def soft_map(height, width):
    """uint8 [height, width]: a bright blob at the upper left, dark but not black elsewhere."""
    rows, columns = np.mgrid[:height, :width]
    distance = np.hypot(rows - 0.35 * height, columns - 0.3 * width) / min(height, width)
    return np.rint(20 + 235 * np.exp(-((3 * distance) ** 2))).astype(np.uint8)


def save(path, pixels):
    """Write a picture of these pixels; the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture(scope="module")
def network():
    """The weights that are refined, as CompressAI's own network."""
    return load_checkpoint(str(WEIGHTS)).network


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The values of three runs over the photos: with maps, without maps, and with strength 0.

    a has a map of another size, b has none, and c's is black. The exit codes, and what was said.
    """
    folder = tmp_path_factory.mktemp("regions")
    photos = folder / "photos"
    photos.mkdir()
    save(photos / MAPPED, skimage.data.chelsea()[60:131, 100:181])  # 71x81: no multiples of 16
    save(photos / UNMAPPED, skimage.data.coffee()[100:171, 200:281])
    save(photos / BLACK, skimage.data.rocket()[200:264, 300:400])
    save(folder / "maps" / f"{MAPPED}.png", soft_map(140, 170))
    save(folder / "maps" / BLACK, np.zeros((64, 100), np.uint8))
    values = values_of_refinement(photos, folder / "results")
    maps = {"path_weights": {"folder": str(folder / "maps")}}
    done = {}
    with pytest.MonkeyPatch.context() as patch:
        for name, options in (
            ("weighted", maps), ("plain", {}), ("measured", maps | {"region_strength": 0.0}),
        ):  # fmt: skip
            own = values | {"save_name": name, "dev_options": values["dev_options"] | options}
            path = folder / f"{name}.json"
            path.write_text(json.dumps(own))
            if name != "weighted":
                leave_out_plots(patch)
            done[name] = own, run(path)
    return done


def record_of(runs, name, image=MAPPED):
    """The record of an image in a run, and the run's folder."""
    folder = results(runs[name][0])
    return {each["name"]: each for each in numbers(folder)}[image], folder


def picture_and_map(values, record):
    """float64 [H, W, 3] in [0, 255] of an image, and its saved map in [0, 1], [H, W]."""
    photos = values["dev_options"]["path_test"]["folder"]
    region = Image.open(results(values) / "regions" / f"{record['name']}.png").convert("L")
    pixels = np.asarray(Image.open(f"{photos}/{record['name']}"), dtype=float)
    return pixels, np.asarray(region, dtype=float) / 255


def weighted_loss(network, values, record, strength=1.0):
    """bpp + lambda * 255^2 * weighted MSE of the saved latents, by numpy in float64."""
    x_hat, _, bpp = decoded_result(network, results(values), record)
    pixels, region = picture_and_map(values, record)
    squares = (255 * x_hat[0].permute(1, 2, 0).double().numpy() - pixels) ** 2
    weights = 1 - strength + strength * region / region.mean()
    return bpp + record["lmbda"] * (weights[..., None] * squares).mean()


def measures_by_hand(x_hat, bits, pixels, region):
    """What a record says of a region, from 8-bit pixels and from the bits [h, w] of y."""
    shown = (x_hat[0].clamp(0, 1) * 255).round().permute(1, 2, 0).numpy().astype(float)
    squares, inside = ((shown - pixels) ** 2).mean(axis=2), region > region.mean()
    share = np.array([
        [inside[16 * i : 16 * i + 16, 16 * j : 16 * j + 16].mean() for j in range(bits.shape[1])]
        for i in range(bits.shape[0])
    ])  # fmt: skip
    return {
        "psnr_inside": 10 * np.log10(255**2 / squares[inside].mean()),
        "psnr_outside": 10 * np.log10(255**2 / squares[~inside].mean()),
        "y_bits_inside": (bits * share).sum(),
        "y_bits_outside": (bits * (1 - share)).sum(),
    }


# --- what is weighed


def test_the_loss_weighs_errors_by_the_saved_map(runs, network):
    values, _ = runs["weighted"]
    record, folder = record_of(runs, "weighted")
    assert (record["objective"], record["weighted"]) == ("mse", "maps")
    refined = record["refined"]
    loss = weighted_loss(network, values, record)
    assert refined["true_loss"] == pytest.approx(loss, rel=1e-5)
    assert refined["true_loss"] < 0.99 * record["base"]["true_loss"]
    # What is not weighed is far from it, and is what the plain MSE is.
    pixels, _ = picture_and_map(values, record)
    x_hat, *_ = decoded_result(network, folder, record)
    mse = ((x_hat[0].permute(1, 2, 0).double().numpy() - pixels / 255) ** 2).mean()
    assert refined["mse"] == pytest.approx(mse, rel=1e-4)
    assert abs(refined["distortion"] / mse - 1) > 0.01
    saved = Image.open(folder / "regions" / f"{MAPPED}.png")
    expected = Image.fromarray(soft_map(140, 170)).resize((81, 71), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(np.asarray(saved.convert("L")), np.asarray(expected))


def test_a_lower_strength_weighs_less(runs, network, write_config, monkeypatch):
    leave_out_plots(monkeypatch)
    values = runs["weighted"][0] | {"save_name": "less", "images": 1}
    assert run(write_config(values), "dev_options.region_strength=0.4") == 0
    (record,) = numbers(results(values))
    loss = weighted_loss(network, values, record, 0.4)
    assert record["refined"]["true_loss"] == pytest.approx(loss, rel=1e-5)
    assert record["weighted"] == "0.4 of maps"


def test_bits_and_quality_move_into_the_region(runs):
    weighted, plain = (record_of(runs, name)[0]["refined"] for name in ("weighted", "measured"))
    assert weighted["psnr_inside"] > plain["psnr_inside"]
    assert weighted["psnr_outside"] < plain["psnr_outside"]
    assert record_of(runs, "weighted")[0]["y_bits_moved"] > 0


def test_a_map_of_one_grey_changes_nothing(runs, write_config, tmp_path, monkeypatch):
    """All pixels count alike, none is inside, and tables take that."""
    leave_out_plots(monkeypatch)
    grey = save(tmp_path / "map.png", np.full((9, 9), 100, np.uint8))
    values = runs["plain"][0] | {"save_name": "grey", "images": 1}
    assert run(write_config(values), f"dev_options.path_weights.folder={grey}") == 0
    (record,), (plain, _) = numbers(results(values)), record_of(runs, "plain")
    for side in ("base", "refined"):
        assert record[side]["true_loss"] == pytest.approx(plain[side]["true_loss"], rel=1e-6)
        assert (record[side]["psnr_inside"], record[side]["y_bits_inside"]) == (None, 0)
        assert record[side]["psnr_outside"] == pytest.approx(plain[side]["psnr"], rel=1e-5)
    assert record["y_bits_moved"] == 0
    log = (results(values) / "log.txt").read_text()
    assert "not known" in log[log.index("PSNR inside (dB)") :]


# --- what is measured


@pytest.mark.parametrize("name", ["weighted", "measured"])
def test_measures_are_those_of_the_saved_latents(runs, network, name):
    values, _ = runs[name]
    record, folder = record_of(runs, name)
    pixels, region = picture_and_map(values, record)
    model = freeze(load_checkpoint(str(WEIGHTS)))
    symbols = model.symbols(model.analyze(to_x(pixels.astype(np.uint8))), (71, 81))
    base = decoded(network, *(symbols[key][0].int().numpy() for key in "yz"), (71, 81))
    sides = {"base": base, "refined": decoded_result(network, folder, record)}
    found = {}
    for side, (x_hat, bits, _) in sides.items():
        found[side] = measures_by_hand(x_hat, bits, pixels, region)
        for key, value in found[side].items():
            assert record[side][key] == pytest.approx(value, rel=1e-4), (side, key)
        total = record[side]["y_bits_inside"] + record[side]["y_bits_outside"]
        assert total == pytest.approx(record[side]["bpp_y"] * 71 * 81, rel=1e-5)
    before, after = found["base"], found["refined"]
    kept = before["y_bits_inside"] / (before["y_bits_inside"] + before["y_bits_outside"])
    moved = after["y_bits_inside"] - kept * (after["y_bits_inside"] + after["y_bits_outside"])
    assert record["y_bits_moved"] == pytest.approx(moved, abs=0.05)
    assert abs(moved) > 0.5


def test_strength_0_only_measures(runs):
    """The same latents as without maps, and numbers of the region beside."""
    (record, folder), (plain, plain_folder) = (
        record_of(runs, name) for name in ("measured", "plain")
    )
    assert record["weighted"] is None
    for key in ("y", "z"):
        arrays = [np.load(each / "latents" / f"{MAPPED}.npz")[key]
                  for each in (folder, plain_folder)]  # fmt: skip
        np.testing.assert_array_equal(*arrays)
    assert set(record["refined"]) - set(plain["refined"]) == REGION_KEYS
    for side in ("base", "refined"):
        record[side] = {key: record[side][key] for key in plain[side]}
    assert {key: record[key] for key in plain} == plain
    assert record["y_bits_moved"] != 0


def test_an_image_without_a_map_is_refined_as_without(runs):
    weighted, folder = record_of(runs, "weighted", UNMAPPED)
    plain, plain_folder = record_of(runs, "plain", UNMAPPED)
    assert not REGION_KEYS & set(weighted["refined"])
    assert weighted | {"weighted": None} == plain
    latents = [(each / "latents" / f"{UNMAPPED}.npz") for each in (folder, plain_folder)]
    for key in ("y", "z"):
        np.testing.assert_array_equal(*(np.load(path)[key] for path in latents))
    assert not (folder / "regions" / f"{UNMAPPED}.png").exists()
    log = (folder / "log.txt").read_text()
    assert f"images without a map, refined with equal weights: {UNMAPPED}" in log


def test_an_image_whose_map_is_black_is_skipped_by_name(runs):
    values, exit_code = runs["weighted"]
    maps = values["dev_options"]["path_weights"]["folder"]
    reason = f"its map {maps}/{BLACK} is black all over the image: paint white what counts most"
    assert exit_code == 1
    summary = json.loads((results(values) / "summary.json").read_text())
    assert summary["failed"] == {BLACK: reason}
    assert (results(values) / "log.txt").read_text().count(f"{BLACK}: skipped: {reason}") == 1
    assert runs["plain"][1] == 0


def test_tables_show_the_regions_of_the_images_that_have_one(runs):
    record, folder = record_of(runs, "weighted")
    log = (folder / "log.txt").read_text()
    head = log[log.index("PSNR inside (dB)") :].splitlines()
    assert [line.split()[0] for line in head[2:4]] == [MAPPED, "mean"]
    inside = [record[side]["psnr_inside"] for side in ("base", "refined")]
    assert f"{inside[0]:.2f} -> {inside[1]:.2f} ({inside[1] - inside[0]:+.2f})" in head[2]
    assert f"{record['y_bits_moved']:+.0f}" in head[2]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["y_bits_moved"] == record["y_bits_moved"]
    for side in ("base", "refined"):  # means over the images that have a map
        assert summary[side]["psnr_inside"] == record[side]["psnr_inside"]
    assert "lambda 0.01 for mse, weighted by maps" in log
    assert "loss, mse, weighted" in log
    assert "PSNR inside" not in (results(runs["plain"][0]) / "log.txt").read_text()


@needs("cv2")
def test_saved_maps_repeat_a_run_with_detected_ones(runs, write_config, monkeypatch):
    leave_out_plots(monkeypatch)
    values = runs["plain"][0] | {"images": 2}
    first = values | {"save_name": "detected"}
    assert main(["--config", str(write_config(first)), "--roi", "auto"]) == 0
    regions = results(first) / "regions"
    again = values | {"save_name": "again"}
    path = write_config(again)
    assert main(["--config", str(path), "--roi", str(regions)]) == 0
    detected, repeated = numbers(results(first)), numbers(results(again))
    assert [record["weighted"] for record in detected] == ["auto"] * 2
    assert all(note.startswith("its map: ") for one in detected for note in one["converted"])
    own = {"weighted": "auto", "converted": []}
    assert [record | own for record in repeated] == [record | own for record in detected]
    for name in (MAPPED, UNMAPPED):
        maps = [(results(one) / "regions" / f"{name}.png").read_bytes() for one in (first, again)]
        assert maps[0] == maps[1]
        for key in ("y", "z"):
            latents = [np.load(results(one) / "latents" / f"{name}.npz")[key]
                       for one in (first, again)]  # fmt: skip
            np.testing.assert_array_equal(*latents)
        plain, _ = record_of(runs, "plain", name)
        assert plain["refined"]["bpp"] != detected[0]["refined"]["bpp"]


def test_a_batch_of_images_with_and_without_a_map(runs, write_config, monkeypatch):
    leave_out_plots(monkeypatch)
    values = runs["weighted"][0] | {"save_name": "batch", "batch_size": 2, "tot_batches": 1}
    assert run(write_config(values)) == 0
    records = {record["name"]: record for record in numbers(results(values))}
    assert [record["batch"] for record in records.values()] == [2, 2]
    for name in (MAPPED, UNMAPPED):
        alone, _ = record_of(runs, "weighted", name)
        assert set(alone["refined"]) == set(records[name]["refined"])
        for key in ("true_loss", "distortion", "psnr_inside", "y_bits_inside"):
            if key in alone["base"]:
                assert records[name]["base"][key] == pytest.approx(alone["base"][key], rel=1e-5)
                assert records[name]["refined"][key] == pytest.approx(
                    alone["refined"][key], rel=5e-3
                )


def test_a_weighted_run_with_polish_in_tiles_is_that_of_the_whole(
    runs, network, write_config, tmp_path, monkeypatch
):
    sides, limit = [], limit_for_tiles(monkeypatch, (150, 170))

    def noted(error_of, y_hat, x, tiling, weights):
        sides.append((tiling, weights is not None))
        return tiled_error(error_of, y_hat, x, tiling, weights)

    leave_out_plots(monkeypatch)
    monkeypatch.setattr("objectives.tiled_error", noted)
    save(tmp_path / "large" / "a.png", skimage.data.astronaut()[50:200, 150:320])
    maps = save(tmp_path / "map.png", soft_map(100, 100))
    values = runs["plain"][0] | {"tot_inference_iterations": 1, "polish_passes": 1}
    values["dev_options"] = values["dev_options"] | {
        "path_test": {"folder": str(tmp_path / "large")}, "path_weights": {"folder": str(maps)},
    }  # fmt: skip
    path = write_config(values)
    assert run(path, "save_name=whole") == 0
    assert not sides
    assert run(path, "save_name=tiled", f"max_memory_gb={limit}") == 0
    assert {tiling for tiling, _ in sides} == {(3, 2)}
    assert any(weighted for _, weighted in sides)
    whole, tiled = (values | {"save_name": name} for name in ("whole", "tiled"))
    (record,), (other,) = numbers(results(whole)), numbers(results(tiled))
    assert record["best_step"] == other["best_step"] == 2  # that of the polish
    for side in ("base", "refined"):
        for key in ("true_loss", "bpp", "distortion", *REGION_KEYS):
            assert other[side][key] == pytest.approx(record[side][key], rel=2e-4)
    for own, result in ((whole, record), (tiled, other)):
        loss = weighted_loss(network, own, result)
        assert result["refined"]["true_loss"] == pytest.approx(loss, rel=1e-5)


# --- MS-SSIM with maps


def weighted_ms_ssim(a, b, weights):
    """MS-SSIM of [3, H, W] in float64: its means over windows weigh as their centres do.

    Equations 7 and 11 of Wang, Simoncelli, Bovik 2003, for sides that stay even.
    """
    offsets = torch.arange(11, dtype=torch.float64) - 5
    line = torch.exp(-(offsets**2) / (2 * 1.5**2))
    window = torch.outer(line, line)[None, None] / line.sum() ** 2

    def blurred(v):
        return conv2d(v[:, None], window)[:, 0]

    result = torch.ones(3, dtype=torch.float64)
    for scale, power in enumerate((0.0448, 0.2856, 0.3001, 0.2363, 0.1333)):
        m, n = blurred(a), blurred(b)
        s_aa, s_bb = blurred(a * a) - m * m, blurred(b * b) - n * n
        value = (2 * (blurred(a * b) - m * n) + 0.03**2) / (s_aa + s_bb + 0.03**2)
        if scale == 4:
            value = value * (2 * m * n + 0.01**2) / (m * m + n * n + 0.01**2)
        inner = weights[5:-5, 5:-5]
        result = result * ((value * inner).sum((1, 2)) / inner.sum()) ** power
        a, b, weights = (
            v.unflatten(-1, (-1, 2)).mean(-1).unflatten(-2, (-1, 2)).mean(-2)
            for v in (a, b, weights)
        )
    return result.mean().item()


def test_ms_ssim_is_weighted_and_a_map_near_the_border_is_skipped(
    runs, network, write_config, tmp_path, monkeypatch
):
    """The last scale looks at pixels that are 80 or more from the border."""
    leave_out_plots(monkeypatch)
    border = np.full((192, 192), 255, np.uint8)
    border[78:114, 78:114] = 0
    for name, region in (("a.png", soft_map(192, 192)), ("b.png", border)):
        save(tmp_path / "photos" / name, skimage.data.astronaut()[:192, 100:292])
        save(tmp_path / "maps" / name, region)
    values = runs["plain"][0] | {"objective": "ms-ssim", "batch_size": 2}
    values["dev_options"] = values["dev_options"] | {
        "path_test": {"folder": str(tmp_path / "photos")}, "inference_lambda": 9.0,
        "path_weights": {"folder": str(tmp_path / "maps")},
    }  # fmt: skip
    assert run(write_config(values), "save_name=similar") == 1
    values |= {"save_name": "similar"}
    folder = results(values)
    assert json.loads((folder / "summary.json").read_text())["failed"] == {
        "b.png": "its map is black except near the border, where MS-SSIM does not look"
    }
    (record,) = numbers(folder)
    x_hat, _, bpp = decoded_result(network, folder, record)
    pixels, region = picture_and_map(values, record)
    similarity = weighted_ms_ssim(
        x_hat[0].double(), torch.from_numpy(pixels).permute(2, 0, 1) / 255, torch.from_numpy(region)
    )
    refined = record["refined"]
    assert refined["true_loss"] == pytest.approx(bpp + 9 * (1 - similarity), rel=1e-5)
    assert refined["true_loss"] < 0.99 * record["base"]["true_loss"]
    # Far from what is not weighed, compared with the tolerance above.
    assert abs(refined["distortion"] / (1 - refined["ms_ssim"]) - 1) > 2e-3
