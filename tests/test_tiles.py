"""Tiles against the whole picture: values, gradients, memory, and when they are chosen."""

import re
import subprocess
import sys

import numpy as np
import pytest
import skimage
import torch
from PIL import Image

from common.errors import InputError
from config import Channels
from conftest import ROOT, WEIGHTS, read_jsonl
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


def test_tiles_cover_every_position_once():
    seen = np.zeros((37, 21), int)
    for tile in tiles_of((37, 21), 8):
        seen[tile.core] += 1
        for core, window, end in zip(tile.core, tile.window, seen.shape, strict=True):
            assert window.start == max(core.start - 2, 0)
            assert window.stop == min(core.stop + 2, end)
    assert (seen == 1).all()


def test_a_bound_chooses_the_whole_picture_or_the_largest_tile_that_fits():
    small, large = (512, 768), (4000, 6000)
    bound = MemoryBound(N=192, M=192, limit=12e9, base=1e9)
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
        MemoryBound(192, 192, limit=3e9, base=1e9).tile(large)


def test_the_bound_is_the_configs_or_a_part_of_the_machines(monkeypatch):
    device = torch.device("cpu")
    assert memory_bound(8, 8, 3.5, device).limit == 3.5e9
    alone = memory_bound(8, 8, None, device).limit
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # left behind by another job
    assert memory_bound(8, 8, None, device).limit == alone
    launched = {"WORLD_SIZE": 2, "RANK": 0, "LOCAL_RANK": 0, "MASTER_ADDR": "localhost",
                "MASTER_PORT": 29500}  # fmt: skip
    for name, value in launched.items():
        monkeypatch.setenv(name, str(value))
    assert memory_bound(8, 8, None, device).limit == alone / 2
    size = (1600, 1600)
    more = memory_bound(8, 8, 3.5, device, extra_vectors=200).needed(size)
    assert more - memory_bound(8, 8, 3.5, device).needed(size) == 200 * 4 * 8 * 100 * 100


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

    def noted(error_of, y_hat, x, side):
        sides.append(side)
        return tiled_error(error_of, y_hat, x, side)

    monkeypatch.setattr("objectives.tiled_error", noted)
    folder = tmp_path / "large"
    folder.mkdir()
    Image.fromarray(skimage.data.astronaut()[:400, :448]).save(folder / "a.png")
    config_values["dev_options"]["path_test"] = {"folder": str(folder)}
    assert _refined(config_values, write_config, save_name="whole") == 0
    assert not sides
    # 400x448 pixels take 152 MB whole, and in tiles of 256 pixels 107 MB, beside 1.3 GB
    assert _refined(config_values, write_config, save_name="tiled", max_memory_gb=1.42) == 0
    assert set(sides) == {16}
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


PEAK = """
import sys, torch
from fast.pool import keep_pages
from models import freeze, load_checkpoint
from objectives import Problem, RateDistortion
from common.measuring import Stopwatch
tile = int(sys.argv[2]) or None
keep_pages()
model = freeze(load_checkpoint(sys.argv[1]))
x = torch.rand(1, 3, 1024, 1280)
watch = Stopwatch(torch.device("cpu"))
latents = {name: v.requires_grad_() for name, v in model.analyze(x).items()}
Problem(model, x, RateDistortion(0.01), tile).relaxed(latents, torch.round).loss.sum().backward()
print(watch.read()[1] - watch.before / 2**20)
"""


@pytest.mark.skipif(
    sys.platform != "linux",
    reason="only Linux can forget a process's peak memory before a measurement",
)
def test_tiles_need_less_memory():
    whole, tiled = (
        float(subprocess.run([sys.executable, "-c", PEAK, str(WEIGHTS), tile], cwd=ROOT, check=True,
                             capture_output=True, text=True).stdout)
        for tile in ("0", "16")
    )  # fmt: skip
    assert tiled < 0.6 * whole
