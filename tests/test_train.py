"""Pre-training as a user runs it: what it leaves behind, and what it survives."""

import json
import math
import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import skimage
import torch
from forks import Fork, ends_of, free_port, launch
from PIL import Image

from architectures import MeanScale
from architectures.footprint import Footprint
from common.errors import InputError
from common.finding import find_images
from common.images import ImageFiles
from conftest import needs, read_jsonl, to_x
from crops import convert
from fast.memory import MemoryBound
from metrics import picture_quality
from models import load_checkpoint
from passes import true_terms
from pretraining import validation
from pretraining.draws import Draws
from pretraining.folder_crops import FolderCrops
from trainings import assert_same, checkpoint_of, folder_of

pytestmark = pytest.mark.usefixtures("without_run_plots")

# --- a run ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("with_run_plots")
def test_a_run_leaves_metrics_checkpoints_and_weights(train_on, train_values, write_config):
    assert train_on(train_values) == 0
    folder = folder_of(train_values)
    rows = read_jsonl(folder / "metrics.jsonl")
    trained = [row for row in rows if row["kind"] == "train"]
    tested = [row for row in rows if row["kind"] == "test"]
    assert [row["step"] for row in trained] == [2, 4, 6, 8]
    assert [row["step"] for row in tested] == [4, 8]
    assert [row["lr"] for row in trained] == [1e-3, 1e-3, 1e-3, 5e-4]
    for row in trained:
        assert row["bpp"] == pytest.approx(row["bpp_y"] + row["bpp_z"], rel=1e-5)
        assert row["images_per_second"] == pytest.approx(2 * row["steps_per_second"])
        assert 0 <= row["data_wait_share"] <= 1
        assert row["bad_steps"] == 0
    assert sorted(file.name for file in folder.glob("*.pth.tar")) == [
        "iter_4.pth.tar", "iter_8.pth.tar", "weights.pth.tar"
    ]  # fmt: skip
    checkpoint = checkpoint_of(train_values, 8)
    assert checkpoint["iter"] == 8
    assert {"model_state_dict", "optimizer_state_dict", "aux_optimizer_state_dict", "rng",
            "data_position"} <= checkpoint.keys()  # fmt: skip
    model = load_checkpoint(str(folder / "iter_8.pth.tar"))
    assert (model.N, model.M) == (8, 12)
    half = load_checkpoint(str(folder / "weights.pth.tar"))
    weights, halves = model.network.state_dict(), half.network.state_dict()
    trained = dict(model.network.named_parameters())
    tables = {name for name in halves if name.endswith(("._cdf_length", "._offset", "_cdf"))}
    assert len(halves["entropy_bottleneck._offset"]) == 8
    assert all(not len(weights[name]) for name in tables)  # a step later they would be wrong
    tables.add("gaussian_conditional.scale_table")
    for name in weights.keys() - tables:  # bounds such as 1e-9 would be 0 in half precision
        close = {"rtol": 1e-3, "atol": 1e-6} if name in trained else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(weights[name], halves[name], **close)
    size = (folder / "weights.pth.tar").stat().st_size
    assert size < 0.3 * (folder / "iter_8.pth.tar").stat().st_size
    assert (folder / "training.png").is_file()
    again = json.loads((folder / "config.json").read_text())
    assert train_on(again, save_name="again") == 0
    assert_same(checkpoint_of(train_values, 8), checkpoint_of(train_values, 8, save_name="again"))


def test_tests_measure_what_compressai_measures(train_on, train_values, capsys):
    assert train_on(train_values) == 0
    assert train_on(train_values, test=True) == 0
    report = json.loads((folder_of(train_values) / "test.json").read_text())
    (cat,) = (record for record in report["images"] if record["name"] == "cat.png")
    network = load_checkpoint(str(folder_of(train_values) / "iter_8.pth.tar")).network
    x = to_x(skimage.data.chelsea()[:192, :256])
    with torch.no_grad():
        out = network(x)
    bpp = sum(-p.log2().sum().item() for p in out["likelihoods"].values()) / (192 * 256)
    shown = (out["x_hat"].clamp(0, 1) * 255).round() / 255
    psnr = -10 * math.log10((shown - x).square().mean().item())
    assert cat["bpp"] == pytest.approx(bpp, rel=1e-4)
    assert cat["psnr"] == pytest.approx(psnr, abs=1e-3)
    mse = (out["x_hat"] - x).square().mean().item()
    assert cat["loss"] == pytest.approx(bpp + 0.01 * 255**2 * mse, rel=1e-4)
    assert report["mean"]["images"] == 2
    last = read_jsonl(folder_of(train_values) / "metrics.jsonl")[-1]
    assert last["bpp"] == pytest.approx(report["mean"]["bpp"], rel=1e-6)
    assert "odd.png" in capsys.readouterr().out


def large_picture(values):
    """A test image just beyond those that are coded whole."""
    pixels = np.tile(skimage.data.chelsea()[:262, :400], (4, 3, 1))[:, :1024]
    Image.fromarray(pixels).save(Path(values["path_test_data"]) / "large.png")
    return to_x(pixels)


def test_large_test_images_are_measured_in_tiles_and_small_ones_whole(
    train_on, train_values, monkeypatch
):
    x = large_picture(train_values)
    decoded = []
    squared_error = MeanScale.squared_error

    def noted(model, y_hat, x, corner=(0, 0), weights=None):
        if not torch.is_grad_enabled():
            decoded.append(tuple(y_hat.shape[2:]))
        return squared_error(model, y_hat, x, corner, weights)

    monkeypatch.setattr(MeanScale, "squared_error", noted)
    assert train_on(train_values, save_model_freq=100) == 0
    cat, *large, odd = decoded  # two tiles of 64 by 64 positions and 2 rows that the first lends
    assert (cat, odd) == ((12, 16), (5, 6))
    assert large == [(66, 64), (4, 64)]
    monkeypatch.undo()
    assert train_on(train_values, test=True) == 0
    report = json.loads((folder_of(train_values) / "test.json").read_text())
    (record,) = (record for record in report["images"] if record["name"] == "large.png")
    model = load_checkpoint(str(folder_of(train_values) / "iter_8.pth.tar"))
    whole = true_terms(model, x, model.analyze(x))
    expected = {
        "loss": whole.loss, "bpp": whole.bpp, "bpp_y": whole.rates["y"], "bpp_z": whole.rates["z"]
    }  # fmt: skip
    for key, value in expected.items():
        assert record[key] == pytest.approx(value.item(), rel=1e-5)
    assert record["psnr"] == pytest.approx(picture_quality(whole.x_hat, x)["psnr"], abs=1e-4)


@pytest.mark.parametrize("trouble", ["too large", "no memory", "another"])
def test_a_test_image_that_fails_is_named_and_the_run_goes_on(
    train_on, train_values, monkeypatch, capsys, trouble
):
    assert train_on(train_values, save_name="plain") == 0
    large_picture(train_values)
    reason = "does not fit into the memory of cpu"
    whole = MeanScale.analyze

    def fail(model, x):
        if x.size(3) < 1024:
            return whole(model, x)
        if trouble == "another":
            raise IndexError("somewhere\nin a network")
        return torch.empty(2**60)  # what PyTorch itself raises where memory ends

    if trouble == "too large":
        limits = MemoryBound(Footprint(200, 72, 8, 2), limit=1.3e9, base=1.3e9)
        monkeypatch.setattr(validation, "memory_bound", lambda *_: limits)
    else:
        monkeypatch.setattr(MeanScale, "analyze", fail)
        if trouble == "another":
            reason = "IndexError: somewhere"
    assert train_on(train_values) == 0
    output = capsys.readouterr().out
    assert output.count(f"large.png: not tested: {reason}\n") == 1  # of two tests
    assert_same(checkpoint_of(train_values, 8), checkpoint_of(train_values, 8, save_name="plain"))
    tests = [[row for row in read_jsonl(folder_of(train_values, save_name=name) / "metrics.jsonl")
              if row["kind"] == "test"] for name in ("plain", "run")]  # fmt: skip
    assert tests[0] == tests[1]  # the means of the two small ones, to the bit
    assert [row["step"] for row in tests[1]] == [4, 8]
    assert train_on(train_values, test=True) == 1
    assert f"large.png: not tested: {reason}" in capsys.readouterr().out


def test_training_starts_from_given_weights(train_on, train_values):
    assert train_on(train_values) == 0
    weights = folder_of(train_values) / "weights.pth.tar"
    tuned = {"save_name": "tuned", "pretrain": str(weights), "tot_iterations": 1,
             "lr": {"base": 1e-12}, "train_lambda": 0.02, "aux_lr": 1e-12}  # fmt: skip
    assert train_on(train_values, **tuned) == 0
    start = load_checkpoint(str(weights))
    end = load_checkpoint(str(folder_of(train_values, **tuned) / "iter_1.pth.tar"))
    both = (model.network.parameters() for model in (start, end))
    for a, b in zip(*both, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["adam", "soap"])
def test_a_resumed_run_ends_as_an_unbroken_one(train_on, train_values, optimizer):
    train_values["optimizer"] = optimizer
    assert train_on(train_values, save_name="unbroken", tot_iterations=23) == 0
    assert train_on(train_values, tot_iterations=5) == 0
    assert train_on(train_values, tot_iterations=15, resume=True) == 0
    assert train_on(train_values, tot_iterations=23, resume=True) == 0
    assert train_on(train_values, tot_iterations=23, resume=True) == 0
    assert_same(
        checkpoint_of(train_values, 23, save_name="unbroken"), checkpoint_of(train_values, 23)
    )
    rows = read_jsonl(folder_of(train_values) / "metrics.jsonl")
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(2, 23, 2))
    assert [row["step"] for row in rows if row["kind"] == "test"] == [4, 5, 8, 12, 15, 16, 20, 23]


def test_a_cosine_keeps_its_end(train_on, train_values, capsys):
    train_values["lr"] = {"base": 1e-4, "schedule": "cosine"}
    assert train_on(train_values, tot_iterations=3) == 0
    assert train_on(train_values, tot_iterations=3, resume=True) == 0
    assert train_on(train_values, tot_iterations=6, resume=True) == 2
    assert "tot_iterations" in capsys.readouterr().err


def crops_of(images):
    return FolderCrops(images, 64, 1, num_workers=2).batches(Draws(0), lambda *_: None)


def pictures_of(images):
    return images.load(images.names * 50, num_workers=2)


@pytest.mark.parametrize("items_of", [crops_of, pictures_of])
def test_a_worker_that_dies_is_named_where_its_next_item_is_asked_for(train_values, items_of):
    """As for want of shared memory; the kernel ends it, maybe in the middle of a step."""
    items = items_of(ImageFiles(find_images(train_values["train_folder"])))
    next(items)
    for worker in multiprocessing.active_children():
        worker.kill()
        worker.join()
    with pytest.raises(InputError, match=r"num_workers = 2: DataLoader worker .*/dev/shm"):
        for _ in range(100):
            next(items)


@needs("tensorflow")
def test_tfrecords_resume_to_the_bit_too(train_on, train_values, tmp_path, converted_here):
    folder = str(tmp_path / "records")
    assert convert(train_values["train_folder"], folder) == 0
    train_values |= {
        "train_folder": "", "train_clic_imagenet": False,
        "path_train": {"train_imagenet": folder}, "path_test_data": "",
    }  # fmt: skip
    assert train_on(train_values, save_name="unbroken", tot_iterations=7) == 0
    assert train_on(train_values, tot_iterations=4) == 0
    assert train_on(train_values, tot_iterations=7, resume=True) == 0
    assert_same(
        checkpoint_of(train_values, 7, save_name="unbroken"), checkpoint_of(train_values, 7)
    )


def test_a_damaged_newest_checkpoint_is_passed_over(train_on, train_values, capsys):
    assert train_on(train_values, save_name="unbroken", tot_iterations=7) == 0
    assert train_on(train_values) == 0
    newest = folder_of(train_values) / "iter_8.pth.tar"
    newest.write_bytes(newest.read_bytes()[:1000])
    with (folder_of(train_values) / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "tra')
    assert train_on(train_values, resume=True, tot_iterations=7, keep_checkpoints=1) == 0
    assert "renamed to *.damaged" in capsys.readouterr().out
    assert_same(
        checkpoint_of(train_values, 7, save_name="unbroken"), checkpoint_of(train_values, 7)
    )
    assert {path.name for path in folder_of(train_values).glob("iter_*")} == {
        "iter_7.pth.tar", "iter_8.pth.tar.damaged"
    }  # fmt: skip
    (folder_of(train_values) / "iter_7.pth.tar").write_bytes(b"")
    assert train_on(train_values, resume=True) == 2
    assert "no checkpoint in it can be read" in capsys.readouterr().err
    rows = (folder_of(train_values) / "metrics.jsonl").read_bytes()
    for resume in (True, False):  # not on the second try either
        assert train_on(train_values, resume=resume) == 2
        assert "holds weights, but no checkpoint that can be read" in capsys.readouterr().err
    assert (folder_of(train_values) / "metrics.jsonl").read_bytes() == rows


def test_a_test_alone_leaves_the_run_as_it_is(train_on, train_values):
    assert train_on(train_values) == 0
    metrics = folder_of(train_values) / "metrics.jsonl"
    with metrics.open("a") as file:
        file.write('{"kind": "train", "step": 9, "loss": 1.0}\n')
    before = metrics.read_text()
    # The run's own checkpoint is tested, not the weights that it once started from.
    assert train_on(train_values, test=True, pretrain="nowhere.pth.tar") == 0
    assert metrics.read_text() == before
    assert train_on(train_values, test=True, save_name="another") == 2
    assert not folder_of(train_values, save_name="another").exists()


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGTERM, 2), (signal.SIGINT, 0)])
def test_a_signal_saves_and_ends_cleanly(train_on, train_values, write_config, number, workers):
    """Sent to the whole group, workers included, as a terminal or a scheduler does."""
    train_values |= {"tot_iterations": 100_000, "print_freq": 1, "path_test_data": "",
               "save_model_freq": 100_000, "num_workers": workers}  # fmt: skip
    config = write_config(train_values, "long.json")
    process = Fork(f"import sys, train; sys.exit(train.main(['--config', {str(config)!r}]))")
    for line in process.stdout:
        if line.startswith("step 3"):
            os.killpg(process.pid, number)
            break
    ((code, rest, errors),) = ends_of([process])
    assert code == 0, errors
    assert "stopped at step" in rest
    (path,) = folder_of(train_values).glob("iter_*.pth.tar")
    step = torch.load(path, weights_only=True)["iter"]
    assert train_on(train_values, tot_iterations=step + 3, resume=True) == 0
    assert train_on(train_values, tot_iterations=step + 3, save_name="unbroken") == 0
    assert_same(
        checkpoint_of(train_values, step + 3),
        checkpoint_of(train_values, step + 3, save_name="unbroken"),
    )


def test_a_diverged_run_ends_and_keeps_the_last_good_checkpoint(train_on, train_values, capsys):
    assert train_on(train_values, tot_iterations=4) == 0
    before = checkpoint_of(train_values, 4)
    # Such pixels make the loss infinite from the first step on.
    broken = checkpoint_of(train_values, 4)
    broken["model_state_dict"]["g_s.6.bias"] += 1e30
    torch.save(broken, folder_of(train_values) / "iter_4.pth.tar")
    assert train_on(train_values, tot_iterations=100, resume=True, keep_checkpoints=1) == 1
    output = capsys.readouterr().out
    assert "10 steps in a row" in output
    assert "iter_4.pth.tar" in output
    kept = checkpoint_of(train_values, 4)
    assert kept["iter"] == before["iter"]
    assert [file.name for file in folder_of(train_values).glob("iter_*")] == ["iter_4.pth.tar"]


def test_only_the_newest_checkpoints_are_kept(train_on, train_values):
    assert train_on(train_values, save_model_freq=1, keep_checkpoints=3, path_test_data="") == 0
    steps = {int(path.name[5:-8]) for path in folder_of(train_values).glob("iter_*")}
    assert steps == {6, 7, 8}


def test_skipped_images_are_counted_and_named(train_on, train_values, capsys):
    Image.new("RGB", (30, 200)).save(Path(train_values["train_folder"]) / "small.png")
    (Path(train_values["train_folder"]) / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert train_on(train_values) == 0
    output = capsys.readouterr().out
    assert "small.png: skipped: smaller than the crop" in output
    assert "broken.png: skipped: not readable" in output
    last = [
        row for row in read_jsonl(folder_of(train_values) / "metrics.jsonl") if "skipped" in row
    ][-1]
    assert last["skipped"] == {"smaller than the crop": 1, "not readable": 1}


def test_two_processes_train_one_model(train_values, write_config, tmp_path):
    """The parameters of both ranks agree to the bit, and the loss falls."""
    train_values |= {"tot_iterations": 40, "print_freq": 10, "save_model_freq": 40,
               "lr": {"base": 3e-3, "warmup_step": 1}}  # fmt: skip
    config, port = write_config(train_values, "two.json"), free_port()
    script = f"""
        import sys
        import torch, train
        distribute, checkpoint, trained = train.distribute, train.TrainingState.checkpoint, []
        def keeping(network, ranks):
            trained.append(network.model.network)
            return distribute(network, ranks)
        def spying(self, ranks):
            torch.save(trained[0].state_dict(), {str(tmp_path)!r} + f"/rank{{ranks.rank}}.pt")
            return checkpoint(self, ranks)
        train.distribute, train.TrainingState.checkpoint = keeping, spying
        sys.exit(train.main(["--config", {str(config)!r}]))
    """
    ends = ends_of([launch(script, rank, 2, port) for rank in (0, 1)], timeout=300)
    assert [code for code, *_ in ends] == [0, 0], ends
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert_same(dict(first), dict(second))
    assert_same(dict(checkpoint_of(train_values, 40)["model_state_dict"]), dict(first))
    losses = [row["loss"] for row in read_jsonl(folder_of(train_values) / "metrics.jsonl")
              if row["kind"] == "train"]  # fmt: skip
    assert losses[-1] < 0.6 * losses[0]
    checkpoint = checkpoint_of(train_values, 40)
    assert len(checkpoint["rng"]) == len(checkpoint["data_position"]) == 2
    assert not torch.equal(*(rng["cpu"] for rng in checkpoint["rng"]))


def test_a_signal_to_one_of_two_processes_stops_both(train_on, train_values, write_config):
    """A plain launcher's; they stop at one step, saved, and go on from there."""
    train_values |= {"tot_iterations": 100_000, "print_freq": 1, "save_model_freq": 1_000_000,
               "path_test_data": ""}  # fmt: skip
    config = write_config(train_values, "two.json")
    script = f"import sys, train; sys.exit(train.main(['--config', {str(config)!r}]))"
    port = free_port()
    first, second = processes = [launch(script, rank, 2, port) for rank in (0, 1)]
    for line in first.stdout:
        if line.startswith("step 20:"):
            second.send_signal(signal.SIGTERM)
            break
    (code, out, errors), (other_code, *_) = ends_of(processes)
    assert (code, other_code) == (0, 0), errors
    (path,) = folder_of(train_values).glob("iter_*.pth.tar")
    step = torch.load(path, weights_only=True)["iter"]
    assert f"stopped at step {step} and saved" in out
    assert len(checkpoint_of(train_values, step)["data_position"]) == 2
    assert train_on(train_values, tot_iterations=step + 1, resume=True) == 0


# --- wrong input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"train_folder": "nowhere"}, "train_folder = nowhere: no such folder"),
        ({"path_test_data": "nowhere"}, "path_test_data = nowhere: no such folder"),
        ({"train_folder": ""}, "no training data: name tfrecords in path_train.train_imagenet"),
        ({"image_size": 100}, "image_size = 100"),
        ({"image_sizes": 64}, "unknown key 'image_sizes': did you mean 'image_size'?"),
        ({"lr": {"bases": 1}}, "unknown key 'lr.bases': did you mean 'base'?"),
        ({"optimizer": "soup"}, 'optimizer = "soup"'),
        ({"pretrain": "nowhere.pth.tar"}, "pretrain nowhere.pth.tar: no such file"),
        ({"train_lambda": 0.2, "channels": None}, "train_lambda = 0.2 has no channel rule"),
        ({"device": "cuda:99"}, "device = 'cuda:99'"),
        ({"test": True, "path_test_data": ""}, "path_test_data names no images"),
        ({"test": True}, "no checkpoint in"),
        ({"image_size": 256}, "not one image gives a crop of 256x256"),
        ({"save_name": "../out"}, "save_name"),
    ],
)
def test_wrong_input_is_one_line(train_on, train_values, capsys, changed, message):
    assert train_on(train_values, **changed) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error


def test_checkpoints_are_not_overwritten_and_configs_not_mixed(train_on, train_values, capsys):
    assert train_on(train_values) == 0
    before = {file.name: file.read_bytes() for file in folder_of(train_values).glob("iter_*")}
    assert train_on(train_values) == 2
    assert "holds checkpoints" in capsys.readouterr().err
    assert train_on(train_values, resume=True, train_lambda=0.02) == 2
    assert "its config differs in train_lambda (0.01 then, 0.02 now)" in capsys.readouterr().err
    assert before == {
        file.name: file.read_bytes() for file in folder_of(train_values).glob("iter_*")
    }
