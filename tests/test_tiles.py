"""Tiles against the whole picture: values, gradients, memory, and when they are chosen."""

import json
import re
from itertools import accumulate

import numpy as np
import pytest
import skimage
import torch
from PIL import Image
from torch.profiler import ProfilerActivity, profile

from architectures.footprint import Footprint, footprint_of
from common.errors import InputError
from config import Channels
from conftest import read_jsonl
from fast.freezing import release_memory
from fast.memory import TILES, MemoryBound, memory_bound
from fast.tiles import coding_tile, tiled_error, tiles_of
from models import build_model, freeze
from passes import problem_of, to_optimise
from train_flexible_inference import main


@pytest.fixture(scope="module")
def double_model():
    torch.manual_seed(0)
    model = build_model(Channels(N=8, M=12))
    model.network.double()
    return freeze(model)


@pytest.mark.parametrize("side", [1, 3, 4, 12])
def test_tiles_give_the_whole_pictures_loss_and_gradient(double_model, side):
    torch.manual_seed(1)
    x = torch.rand(2, 3, 150, 203, dtype=torch.float64)
    whole, tiled = (double_model.analyze(x, tile) for tile in (1000, side))
    torch.testing.assert_close(tiled, whole, rtol=1e-12, atol=1e-12)
    results = []
    for tile in (None, side):
        latents = to_optimise(whole)
        terms = problem_of(double_model, x, tile=tile).relaxed(latents, lambda v: v + 0.2)
        (terms.loss * torch.tensor([1.0, 3.0])).sum().backward()
        gradients = (v.grad for v in latents.values())
        results.append((terms.loss, terms.mse, terms.x_hat, *gradients))
    for ours, expected in zip(*reversed(results), strict=True):
        scale = expected.abs().max().item()
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12 * scale)
    y_hat = whole["y"].round()
    torch.testing.assert_close(
        double_model.synthesize(y_hat, (150, 203), side),
        double_model.synthesize(y_hat, (150, 203)), rtol=1e-12, atol=1e-12,
    )  # fmt: skip


@pytest.mark.parametrize("halo", [2, 7])
def test_tiles_cover_every_position_once(halo):
    seen = np.zeros((37, 21), int)
    for tile in tiles_of((37, 21), 8, halo):
        seen[tile.core] += 1
        for core, window, end in zip(tile.core, tile.window, seen.shape, strict=True):
            assert window.start == max(core.start - halo, 0)
            assert window.stop == min(core.stop + halo, end)
    assert (seen == 1).all()


def test_a_bound_chooses_the_whole_picture_or_the_largest_tile_that_fits():
    small, large = (512, 768), (4000, 6000)
    footprint = footprint_of(build_model(Channels(N=192, M=192)))
    bound = MemoryBound(footprint, limit=12e9, base=1e9)
    assert bound.tile(small) is None
    side = bound.tile(large)
    assert side in TILES
    assert bound.needed(large, tile=side) <= 12e9 < bound.needed(large)
    larger = TILES[TILES.index(side) - 1]
    assert bound.needed(large, tile=larger) > 12e9
    assert bound.images(large) == 1
    assert bound.needed(small, bound.images(small)) <= 12e9
    assert bound.needed(small, bound.images(small) + 1) > 12e9
    with pytest.raises(
        InputError, match=r"6000x4000 pixels need \d+\.\d\d GB even in the smallest"
    ):
        MemoryBound(footprint, limit=3e9, base=1e9).tile(large)


def test_a_model_without_a_halo_is_refined_whole_or_not_at_all():
    bound = MemoryBound(Footprint(300, 1700, 120, halo=None), limit=12e9, base=1e9)
    assert bound.tile((512, 768)) is None
    assert bound.needed((512, 768), tile=16) == bound.needed((512, 768))
    with pytest.raises(
        InputError, match=r"6000x4000 pixels need 49\.00 GB and this model has no tiles"
    ):
        bound.tile((4000, 6000))


def test_the_bound_is_the_configs_or_a_part_of_the_machines(monkeypatch):
    device = torch.device("cpu")
    footprint = footprint_of(build_model(Channels(N=8, M=8)))
    assert memory_bound(footprint, 3.5, device).limit == 3.5e9
    alone = memory_bound(footprint, None, device).limit
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # left behind by another job
    assert memory_bound(footprint, None, device).limit == alone
    launched = {"WORLD_SIZE": 2, "RANK": 0, "LOCAL_RANK": 0, "MASTER_ADDR": "localhost",
                "MASTER_PORT": 29500}  # fmt: skip
    for name, value in launched.items():
        monkeypatch.setenv(name, str(value))
    assert memory_bound(footprint, None, device).limit == alone / 2


def test_vectors_of_an_optimizer_take_the_memory_of_as_many_latents():
    """Float32: 8 channels of y for each 16x16 pixels, 8 of z for each 64x64."""
    footprint = footprint_of(build_model(Channels(N=8, M=8)))
    size, device = (1600, 1600), torch.device("cpu")
    least = memory_bound(footprint, 3.5, device).needed(size)
    more = memory_bound(footprint.with_vectors(200), 3.5, device).needed(size)
    latents = 8 * 100 * 100 + 8 * 25 * 25
    assert more - least == pytest.approx(200 * 4 * latents)
    less = memory_bound(footprint.without_optimizer(60), 3.5, device).needed(size)
    assert least - less == pytest.approx(100 * latents)  # 160 bytes less 60


def test_only_large_pictures_are_coded_in_tiles():
    assert coding_tile((1024, 1024)) is None
    assert coding_tile((1025, 1024)) == 64


def _refined(config_values, write_config, **changes):
    values = {**config_values, "tot_batches": 1, "tot_inference_iterations": 2, **changes}
    return main(["--config", str(write_config(values, f"{values['save_name']}.json"))])


def test_a_refinement_in_tiles_is_that_of_the_whole(
    config_values, write_config, tmp_path, monkeypatch, capsys
):
    sides = []

    def noted(error_of, y_hat, x, tiling, weights):
        sides.append(tiling)
        return tiled_error(error_of, y_hat, x, tiling, weights)

    monkeypatch.setattr("objectives.tiled_error", noted)
    folder = tmp_path / "large"
    folder.mkdir()
    Image.fromarray(skimage.data.astronaut()[:400, :448]).save(folder / "a.png")
    config_values["dev_options"]["path_test"] = {"folder": str(folder)}
    assert _refined(config_values, write_config, save_name="whole") == 0
    assert not sides
    # 400x448 pixels take 152 MB whole, and in tiles of 256 pixels 107 MB, beside 1.3 GB
    assert _refined(config_values, write_config, save_name="tiled", max_memory_gb=1.42) == 0
    assert set(sides) == {(16, 2)}
    (whole,), (tiled,) = (
        read_jsonl(tmp_path / "results" / name / "images.jsonl") for name in ("whole", "tiled")
    )
    for side in ("base", "refined"):
        for key in ("true_loss", "bpp", "psnr", "ms_ssim"):
            assert tiled[side][key] == pytest.approx(whole[side][key], rel=1e-4)
    capsys.readouterr()
    assert _refined(config_values, write_config, save_name="none", max_memory_gb=1.31) == 1
    line = r"a.png: skipped: 448x400 pixels need 1\.\d\d GB even in the smallest tiles \(1.3 GB are"
    assert re.search(line, capsys.readouterr().out)


def _peak_of(step, path):
    """The most bytes that torch had allocated on the CPU at a time, of those since the start."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watch:
        step()
    watch.export_chrome_trace(str(path))
    events = [event for event in json.loads(path.read_text())["traceEvents"]
              if event["name"] == "[memory]"]  # fmt: skip
    events.sort(key=lambda event: event["ts"])
    return max(accumulate(event["args"]["Bytes"] for event in events))


def test_tiles_need_less_memory(model, tmp_path):
    """Resident memory would also have what the heap keeps, which differs by a fifth run by run."""
    x = torch.rand(1, 3, 1024, 1280)

    def step(tile):
        latents = to_optimise(model.analyze(x))
        terms = problem_of(model, x, tile=tile).relaxed(latents, torch.round)
        terms.loss.sum().backward()

    def peak(tile):
        release_memory(model.network)
        return _peak_of(lambda: step(tile), tmp_path / "trace.json")

    assert peak(16) < 0.5 * peak(None)
