"""Images of one size refined together: the same as alone, and what fails does so alone."""

import numpy as np
import pytest
import skimage
import torch
from PIL import Image

from architectures import MeanScale
from common.finding import find_images
from common.images import ImageFiles, LoadedImage
from config import RefineConfig, load_config
from conftest import read_jsonl, to_x
from experimental_inference_methods import METHODS, Temperature, build_rounding
from passes import problem_of, refined
from refinement.target import Start
from rounding.noise import ImageGenerators
from train_flexible_inference import equal_sized, main

pytestmark = pytest.mark.usefixtures("without_run_plots")


def _image(name, height, width):
    return LoadedImage(name, torch.zeros(3, height, width) if height else None, (), "broken")


def test_batches_are_of_equal_size_and_in_order():
    sizes = [(8, 8), (8, 8), (8, 8), (8, 9), (0, 0), (0, 0), (8, 9), (8, 9)]
    images = [_image(str(index), *size) for index, size in enumerate(sizes)]
    batches = equal_sized(iter(images), lambda size: 2 if size == (8, 8) else 8)
    names = [[image.name for image in batch] for batch in batches]
    assert names == [["0", "1"], ["2"], ["3"], ["4"], ["5"], ["6", "7"]]


def test_each_image_of_a_batch_has_its_own_noise():
    rounding = build_rounding("unoise", temperature=Temperature(0.0, 1.0))
    v = torch.zeros(3, 2, 4, 5)

    def noise(seeds):
        generators = (torch.Generator().manual_seed(seed) for seed in seeds)
        return rounding.at(0, ImageGenerators(tuple(generators)))

    together = noise([5, 6, 7])(v)
    for index, seed in enumerate([5, 6, 7]):
        torch.testing.assert_close(together[index : index + 1], noise([seed])(v[:1]))
    assert (together[0] != together[1]).any()


@pytest.mark.parametrize("name", ["unoise", "sga_logits_3c"])
def test_a_batch_is_refined_as_its_images_are(model, config_values, write_config, name):
    config = load_config(write_config(config_values), RefineConfig, ["dev_options.save_final=true"])
    key = (name, "log_ssl_a_factor_pow") if name == "sga_logits_3c" else (name, None)
    rounding = build_rounding(*key, temperature=Temperature(0.01, 1.0))
    x = torch.cat([to_x(skimage.data.coffee()[100:164, left : left + 80]) for left in (200, 300)])
    together = refined(problem_of(model, x), config, [11, 12], rounding)
    for index, seed in enumerate([11, 12]):
        own = slice(index, index + 1)
        (alone,) = refined(problem_of(model, x[own]), config, [seed], rounding)
        ours = together[index]
        assert ours.best["step"] == alone.best["step"]
        assert ours.latents["y"].shape == alone.latents["y"].shape
        for row, expected in zip(ours.rows, alone.rows, strict=True):
            for metric in ("relaxed_loss", "true_loss", "true_psnr"):
                assert row[metric] == pytest.approx(expected[metric], rel=1e-3)
        assert ours.reconstructions.keys() == alone.reconstructions.keys() > {"base", "refined"}
        for label, picture in alone.reconstructions.items():
            assert ours.reconstructions[label].shape == picture.shape
            assert (ours.reconstructions[label] - picture).abs().mean() < 1e-3


def test_an_image_that_has_no_finite_loss_leaves_the_others_alone(
    model, config_values, write_config
):
    config = load_config(write_config(config_values), RefineConfig)
    rounding = build_rounding("ste", temperature=Temperature(0.01, 1.0))
    x = torch.cat([to_x(skimage.data.coffee()[100:164, left : left + 64]) for left in (200, 300)])
    start = Start(model.analyze(x))
    start.latents["y"][0, 0, 0, 0] = torch.nan
    shown = []

    def progress(*values):
        shown.append(values)

    broken, sound = refined(problem_of(model, x), config, [1, 2], rounding, progress, start)
    assert not broken.latents
    assert broken.stopped == "the loss is not finite at step 0"
    assert len(broken.rows) == 1
    assert sound.stopped is None
    (alone,) = refined(problem_of(model, x[1:]), config, [2], rounding)
    assert [row["step"] for row in sound.rows] == [row["step"] for row in alone.rows]
    for row, expected in zip(sound.rows, alone.rows, strict=True):
        assert row["true_loss"] == pytest.approx(expected["true_loss"], rel=1e-3)
    assert len(shown) == config.tot_inference_iterations
    assert all(loss.isfinite() and np.isfinite(lowest) for loss, lowest in shown)


def _folder(tmp_path):
    folder = tmp_path / "equal"
    folder.mkdir()
    coffee = skimage.data.coffee()
    for index, left in enumerate((100, 180, 260)):
        Image.fromarray(coffee[100:164, left : left + 80]).save(folder / f"{index}.png")
    (folder / "1a.png").write_bytes(b"no image")
    Image.fromarray(coffee[100:180, 300:364]).save(folder / "3.png")
    return folder


def _run(config_values, write_config, **changes):
    code = main(["--config", str(write_config({**config_values, **changes}, "c.json"))])
    folder = f"{config_values['output_dir']}/{changes['save_name']}"
    return code, {row["name"]: row for row in read_jsonl(f"{folder}/images.jsonl")}


def test_a_run_in_batches_leaves_what_a_run_one_by_one_does(config_values, write_config, tmp_path):
    config_values["dev_options"]["path_test"] = {"folder": str(_folder(tmp_path))}
    config_values["save_bitstreams"] = True
    code, alone = _run(config_values, write_config, save_name="alone", tot_batches=9)
    assert code == 1  # 1a.png
    code, batched = _run(
        config_values, write_config, save_name="batched", tot_batches=3, batch_size=3
    )
    assert code == 1
    assert list(batched) == list(alone) == ["0.png", "1.png", "2.png", "3.png"]
    assert [row["batch"] for row in alone.values()] == [1, 1, 1, 1]
    assert [row["batch"] for row in batched.values()] == [2, 2, 1, 1]
    assert batched["0.png"]["seconds"] == batched["1.png"]["seconds"]
    for name, row in batched.items():
        for side in ("base", "refined"):
            for key in ("true_loss", "file_bpp", "psnr"):
                assert row[side][key] == pytest.approx(alone[name][side][key], rel=5e-3)
        folder = tmp_path / "results" / "batched"
        assert (folder / "bitstreams" / f"{name}.olc").is_file()
        assert np.load(folder / "latents" / f"{name}.npz")["y"].shape[0] == 192


def test_lbfgs_and_targets_take_one_image_at_a_time(config_values, write_config):
    config_values["batch_size"] = 4
    path = write_config(config_values)
    assert load_config(path, RefineConfig).images_at_once == 4
    for override in ('optimizer={"name": "LBFGS"}', "target_bpp=0.3"):
        assert load_config(path, RefineConfig, [override]).images_at_once == 1


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_a_batch_that_does_not_fit_is_tried_one_by_one(
    config_values, write_config, tmp_path, monkeypatch, capsys, error
):
    """And only what does not fit alone is given up: the second image never does."""
    folder = _folder(tmp_path)
    (folder / "1a.png").unlink()
    config_values["dev_options"]["path_test"] = {"folder": str(folder)}
    code, plain = _run(config_values, write_config, save_name="plain", tot_batches=4)
    assert code == 0
    (never,) = ImageFiles(find_images(folder)).load(["1.png"])
    analyze = MeanScale.analyze

    def analyze_few(model, x):
        if len(x) > 1 or torch.equal(x[0], never.x):
            raise error
        return analyze(model, x)

    monkeypatch.setattr(MeanScale, "analyze", analyze_few)
    code, rows = _run(config_values, write_config, save_name="run", tot_batches=2, batch_size=3)
    assert code == 1
    assert list(rows) == ["0.png", "2.png", "3.png"]
    for name, row in rows.items():
        assert row["refined"]["true_loss"] == plain[name]["refined"]["true_loss"]
    out = capsys.readouterr().out
    assert "0.png and 2 more: does not fit into the memory of cpu" in out
    assert "1.png: skipped: does not fit into the memory of cpu: see max_memory_gb" in out
    assert out.count("skipped") == 1


@pytest.mark.parametrize("key", sorted(METHODS, key=str), ids=lambda k: "-".join(filter(None, k)))
def test_noise_does_not_depend_on_tiles(model, key):
    rounding = build_rounding(*key, temperature=Temperature(0.01, 1.0))
    x = to_x(skimage.data.coffee()[100:180, 200:312])
    losses = []
    for encoder_tile, tile in ((16, None), (2, 3)):
        latents = model.analyze(x, encoder_tile)
        # Noise is drawn in the order of memory.
        assert latents["y"].is_contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            relaxed = rounding.at(1, torch.Generator().manual_seed(1))
            terms = problem_of(model, x, tile=tile).relaxed(latents, relaxed)
        losses.append(terms.loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
