"""Pre-training as a user runs it: what it leaves behind, and what it survives."""

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import skimage
import torch
from PIL import Image

import datasets
import train
from architectures import MeanScale
from architectures.distributions import FactorizedPrior
from common.processes import Ranks
from config import PretrainConfig
from conftest import ROOT, ends_of, free_port, launch, read_jsonl, to_x
from fast.memory import MemoryBound
from metrics import picture_quality
from models import build_model, load_checkpoint
from objectives import RateDistortion
from passes import true_terms
from pretraining import validation
from pretraining.step import TrainingState, build_optimizers, train_step
from pretraining.training_pass import TrainingPass
from pretraining.window import Window

ALONE = Ranks(0, 1, 0)


@pytest.fixture
def values(tmp_path):
    """The JSON values of a very short training of a very small network."""
    folder = tmp_path / "train"
    folder.mkdir()
    for name, pixels in (
        ("a", skimage.data.astronaut()[:200, :200]),
        ("b", skimage.data.coffee()[:150, :150]),
        ("c", skimage.data.rocket()[200:300, 200:330]),
    ):
        Image.fromarray(pixels).save(folder / f"{name}.png")
    test = tmp_path / "test"
    test.mkdir()
    Image.fromarray(skimage.data.chelsea()[:192, :256]).save(test / "cat.png")
    Image.fromarray(skimage.data.chelsea()[100:171, 50:131]).save(test / "odd.png")
    return {
        "tot_iterations": 8,
        "train_lambda": 0.01,
        "channels": {"N": 8, "M": 12},
        "lr": {"base": 1e-3, "warmup_step": 2, "decay": 0.5, "decay_interval": 6},
        "batch_size": 2,
        "print_freq": 2,
        "save_model_freq": 4,
        "image_size": 64,
        "seed": 3,
        "save_name": "run",
        "train_folder": str(folder),
        "path_test_data": str(test),
        "device": "cpu",
        "output_dir": str(tmp_path / "checkpoints"),
    }


@pytest.fixture
def run(write_config):
    def run(values, **changed):
        return train.main(["--config", str(write_config({**values, **changed}, "train.json"))])

    return run


def folder_of(values, **changed):
    values = {**values, **changed}
    return Path(values["output_dir"]) / values["save_name"]


def saved(values, step, **changed):
    path = folder_of(values, **changed) / f"iter_{step}.pth.tar"
    return torch.load(path, weights_only=True)


def assert_same(a, b):
    """Two checkpoints, to the last bit, less the config."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a.keys() - {"config"}:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            assert_same(one, other)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


# --- one step -------------------------------------------------------------------------------------


def test_the_loss_is_the_paper_s_written_again(monkeypatch):
    """bpp + lambda 255^2 MSE, with the noise that was drawn, from CompressAI's parts in float64."""
    torch.manual_seed(0)
    model = build_model(PretrainConfig(
        train_lambda=0.02, channels={"N": 8, "M": 12}, save_name="x", train_folder="x"
    ).channels)  # fmt: skip
    x = to_x(skimage.data.astronaut()[:128, :64])
    noises = []

    def uniform(self, low, high):
        assert (low, high) == (-0.5, 0.5)
        noises.append(torch.rand(self.shape) - 0.5)
        return self.copy_(noises[-1])

    monkeypatch.setattr(torch.Tensor, "uniform_", uniform)
    terms = TrainingPass(model, RateDistortion(0.02))(x)
    monkeypatch.undo()
    network, x = model.network.double(), x.double()
    y = network.g_a(x)
    z_hat = network.h_a(y) + noises[0]
    scales, means = network.h_s(z_hat).chunk(2, 1)
    y_hat = y + noises[1]
    normal = torch.distributions.Normal(means, scales.clamp_min(0.11))
    p_y = (normal.cdf(y_hat + 0.5) - normal.cdf(y_hat - 0.5)).clamp_min(1e-9)
    p_z = network.entropy_bottleneck._likelihood(z_hat.permute(1, 0, 2, 3).reshape(8, 1, -1))[0]
    bpp_y, bpp_z = (-p.log2().sum() / (128 * 64) for p in (p_y, p_z.clamp_min(1e-9)))
    mse = (network.g_s(y_hat) - x).square().mean()
    expected = {
        "bpp_y": bpp_y, "bpp_z": bpp_z, "bpp": bpp_y + bpp_z, "psnr": -10 * mse.log10(),
        "loss": bpp_y + bpp_z + 0.02 * 255**2 * mse, "aux_loss": network.aux_loss(),
    }  # fmt: skip
    for key, value in expected.items():
        assert terms[key].item() == pytest.approx(value.item(), rel=1e-4), key


def test_the_prior_of_z_learns_as_compressai_s_does():
    torch.manual_seed(0)
    model = build_model(PretrainConfig(
        train_lambda=0.02, channels={"N": 4, "M": 4}, save_name="x", train_folder="x"
    ).channels)  # fmt: skip
    z_hat = 3 * torch.randn(2, 4, 3, 5)
    bottleneck = model.network.entropy_bottleneck
    weights = [p for name, p in bottleneck.named_parameters() if name != "quantiles"]
    likelihood = FactorizedPrior(bottleneck).likelihood(z_hat)
    ours = torch.autograd.grad(-likelihood.log2().sum(), weights)
    flat = z_hat.permute(1, 0, 2, 3).reshape(4, 1, -1)
    plain = torch.autograd.grad(-bottleneck._likelihood(flat)[0].log2().sum(), weights)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def small_training(optimizer="adam", precision="float32"):
    torch.manual_seed(0)
    config = PretrainConfig(
        train_lambda=0.01, channels={"N": 8, "M": 8}, save_name="x", train_folder="x",
        optimizer=optimizer, lr={"base": 1e-3},
    )  # fmt: skip
    model = build_model(config.channels)
    model.network.train()
    state = TrainingState(*build_optimizers(model.network, config))
    return TrainingPass(model, RateDistortion(0.01), precision), state


def crops(count=4):
    pixels = skimage.data.astronaut()
    return torch.cat([to_x(pixels[64 * i : 64 * i + 64, 100:164]) for i in range(count)])


@pytest.mark.parametrize("optimizer", ["adam", "soap"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_every_parameter_learns_and_the_loss_falls(optimizer, precision):
    training, state = small_training(optimizer, precision)
    network = training.model.network
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    x = crops()
    losses = [train_step(training, state, x, 5e-3, 1.0)["loss"].item() for _ in range(60)]
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:10])
    for name, p in network.named_parameters():
        assert p.dtype == torch.float32
        assert not torch.equal(p, before[name]), name


def test_gradients_are_clipped_by_value():
    training, state = small_training()
    state.optimizer = torch.optim.SGD(state.optimizer.param_groups[0]["params"], lr=1.0)
    weights = state.optimizer.param_groups[0]["params"]
    for clip in (0.01, 0.0):
        before = [p.detach().clone() for p in weights]
        train_step(training, state, crops(), 1.0, clip)
        largest = max((p - q).abs().max().item() for p, q in zip(weights, before, strict=True))
        if clip:
            assert largest == pytest.approx(clip, rel=1e-3)
        else:
            assert largest > 1


def test_the_quantiles_find_the_median_and_tails():
    """The auxiliary loss moves them, and nothing else, to where the prior's tails lie."""
    training, state = small_training()
    bottleneck = training.model.network.entropy_bottleneck
    for step in range(4000):
        bottleneck.loss().backward()
        assert all(p.grad is None for p in state.optimizer.param_groups[0]["params"])
        state.aux_optimizer.step()
        state.aux_optimizer.zero_grad()
        for group in state.aux_optimizer.param_groups:
            group["lr"] = 0.3 * 0.999**step
    logits = bottleneck._logits_cumulative(bottleneck.quantiles, stop_gradient=True)
    tail = math.log(2 / 1e-9 - 1)
    expected = torch.tensor([-tail, 0.0, tail]).expand_as(logits)
    torch.testing.assert_close(logits, expected, rtol=0.02, atol=0.05)


def test_a_step_without_finite_gradients_changes_nothing():
    training, state = small_training()
    network = training.model.network
    train_step(training, state, crops(), 1e-3, 1.0)
    before = {name: p.detach().clone() for name, p in network.state_dict().items()}
    bad = crops()
    bad[1, 0, 3, 3] = math.nan
    assert train_step(training, state, bad, 1e-3, 1.0) is None
    assert_same(before, dict(network.state_dict()))
    assert train_step(training, state, crops(), 1e-3, 1.0) is not None


def test_learning_rates_warm_up_and_decay():
    lr = PretrainConfig(
        train_lambda=0.01, save_name="x", train_folder="x",
        lr={"base": 1.0, "warmup_step": 4, "decay": 0.1, "decay_interval": 10},
    ).lr  # fmt: skip
    rates = [lr.at(step) for step in (0, 1, 3, 4, 9, 10, 19, 20)]
    assert rates == pytest.approx([0.25, 0.5, 1, 1, 1, 0.1, 0.1, 0.01])


def test_a_window_averages_over_its_good_steps():
    window = Window(ALONE, batch_size=5)
    for loss in (1.0, 3.0):
        window.add({"loss": torch.tensor(loss)}, waited=0.0)
    window.add(None, waited=0.0)
    values = window.read()
    assert values["loss"] == 2
    assert values["images_per_second"] == pytest.approx(5 * values["steps_per_second"])
    assert window.read()["loss"] is None


# --- a run ----------------------------------------------------------------------------------------


def test_a_run_leaves_metrics_checkpoints_and_weights(run, values, write_config):
    assert run(values) == 0
    folder = folder_of(values)
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
    checkpoint = saved(values, 8)
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
    assert run(again, save_name="again") == 0
    assert_same(saved(values, 8), saved(values, 8, save_name="again"))


def test_tests_measure_what_compressai_measures(run, values, capsys):
    assert run(values) == 0
    assert run(values, test=True) == 0
    report = json.loads((folder_of(values) / "test.json").read_text())
    (cat,) = (record for record in report["images"] if record["name"] == "cat.png")
    network = load_checkpoint(str(folder_of(values) / "iter_8.pth.tar")).network
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
    last = read_jsonl(folder_of(values) / "metrics.jsonl")[-1]
    assert last["bpp"] == pytest.approx(report["mean"]["bpp"], rel=1e-6)
    assert "odd.png" in capsys.readouterr().out


def large_picture(values):
    """A test image just beyond those that are coded whole."""
    pixels = np.tile(skimage.data.chelsea()[:262, :400], (4, 3, 1))[:, :1024]
    Image.fromarray(pixels).save(Path(values["path_test_data"]) / "large.png")
    return to_x(pixels)


def test_large_test_images_are_measured_in_tiles_and_small_ones_whole(run, values, monkeypatch):
    x = large_picture(values)
    decoded = []
    squared_error = MeanScale.squared_error

    def noted(model, y_hat, x, corner=(0, 0)):
        if not torch.is_grad_enabled():
            decoded.append(tuple(y_hat.shape[2:]))
        return squared_error(model, y_hat, x, corner)

    monkeypatch.setattr(MeanScale, "squared_error", noted)
    assert run(values, save_model_freq=100) == 0
    cat, *large, odd = decoded  # two tiles of 64 by 64 positions and 2 rows that the first lends
    assert (cat, odd) == ((12, 16), (5, 6))
    assert large == [(66, 64), (4, 64)]
    monkeypatch.undo()
    assert run(values, test=True) == 0
    report = json.loads((folder_of(values) / "test.json").read_text())
    (record,) = (record for record in report["images"] if record["name"] == "large.png")
    model = load_checkpoint(str(folder_of(values) / "iter_8.pth.tar"))
    whole = true_terms(model, x, model.analyze(x))
    expected = {
        "loss": whole.loss, "bpp": whole.bpp, "bpp_y": whole.rates["y"], "bpp_z": whole.rates["z"]
    }  # fmt: skip
    for key, value in expected.items():
        assert record[key] == pytest.approx(value.item(), rel=1e-5)
    assert record["psnr"] == pytest.approx(picture_quality(whole.x_hat, x)["psnr"], abs=1e-4)


@pytest.mark.parametrize("trouble", ["too large", "no memory", "another"])
def test_a_test_image_that_fails_is_named_and_the_run_goes_on(
    run, values, monkeypatch, capsys, trouble
):
    assert run(values, save_name="plain") == 0
    large_picture(values)
    reason = "does not fit into the memory of cpu"
    whole = MeanScale.analyze

    def fail(model, x):
        if x.size(3) < 1024:
            return whole(model, x)
        if trouble == "another":
            raise IndexError("somewhere\nin a network")
        return torch.empty(2**60)  # what PyTorch itself raises where memory ends

    if trouble == "too large":
        limits = MemoryBound(8, 12, limit=1.3e9, base=1.3e9)
        monkeypatch.setattr(validation, "memory_bound", lambda *_: limits)
    else:
        monkeypatch.setattr(MeanScale, "analyze", fail)
        if trouble == "another":
            reason = "IndexError: somewhere"
    assert run(values) == 0
    output = capsys.readouterr().out
    assert output.count(f"large.png: not tested: {reason}\n") == 1  # of two tests
    assert_same(saved(values, 8), saved(values, 8, save_name="plain"))
    tests = [[row for row in read_jsonl(folder_of(values, save_name=name) / "metrics.jsonl")
              if row["kind"] == "test"] for name in ("plain", "run")]  # fmt: skip
    assert tests[0] == tests[1]  # the means of the two small ones, to the bit
    assert [row["step"] for row in tests[1]] == [4, 8]
    assert run(values, test=True) == 1
    assert f"large.png: not tested: {reason}" in capsys.readouterr().out


def test_training_starts_from_given_weights(run, values):
    assert run(values) == 0
    weights = folder_of(values) / "weights.pth.tar"
    tuned = {"save_name": "tuned", "pretrain": str(weights), "tot_iterations": 1,
             "lr": {"base": 1e-12}, "train_lambda": 0.02, "aux_lr": 1e-12}  # fmt: skip
    assert run(values, **tuned) == 0
    start = load_checkpoint(str(weights))
    end = load_checkpoint(str(folder_of(values, **tuned) / "iter_1.pth.tar"))
    both = (model.network.parameters() for model in (start, end))
    for a, b in zip(*both, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["adam", "soap"])
def test_a_resumed_run_ends_as_an_unbroken_one(run, values, optimizer):
    values["optimizer"] = optimizer
    assert run(values, save_name="unbroken", tot_iterations=23) == 0
    assert run(values, tot_iterations=5) == 0
    assert run(values, tot_iterations=15, resume=True) == 0
    assert run(values, tot_iterations=23, resume=True) == 0
    assert run(values, tot_iterations=23, resume=True) == 0
    assert_same(saved(values, 23, save_name="unbroken"), saved(values, 23))
    rows = read_jsonl(folder_of(values) / "metrics.jsonl")
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(2, 23, 2))
    assert [row["step"] for row in rows if row["kind"] == "test"] == [4, 5, 8, 12, 15, 16, 20, 23]


def test_tfrecords_resume_to_the_bit_too(run, values, tmp_path):
    folder = str(tmp_path / "records")
    assert datasets.main(["make-tfrecords", "--images", values["train_folder"], "--out", folder,
                          "--shards", "2", "--workers", "1"]) == 0  # fmt: skip
    values |= {"train_folder": "", "train_clic_imagenet": False,
               "path_train": {"train_imagenet": folder}, "path_test_data": ""}  # fmt: skip
    assert run(values, save_name="unbroken", tot_iterations=7) == 0
    assert run(values, tot_iterations=4) == 0
    assert run(values, tot_iterations=7, resume=True) == 0
    assert_same(saved(values, 7, save_name="unbroken"), saved(values, 7))


def test_a_damaged_newest_checkpoint_is_passed_over(run, values, capsys):
    assert run(values, save_name="unbroken", tot_iterations=7) == 0
    assert run(values) == 0
    newest = folder_of(values) / "iter_8.pth.tar"
    newest.write_bytes(newest.read_bytes()[:1000])
    with (folder_of(values) / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "tra')
    assert run(values, resume=True, tot_iterations=7, keep_checkpoints=1) == 0
    assert "renamed to *.damaged" in capsys.readouterr().out
    assert_same(saved(values, 7, save_name="unbroken"), saved(values, 7))
    assert {path.name for path in folder_of(values).glob("iter_*")} == {
        "iter_7.pth.tar", "iter_8.pth.tar.damaged"
    }  # fmt: skip
    (folder_of(values) / "iter_7.pth.tar").write_bytes(b"")
    assert run(values, resume=True) == 2
    assert "no checkpoint in it can be read" in capsys.readouterr().err
    rows = (folder_of(values) / "metrics.jsonl").read_bytes()
    for resume in (True, False):  # not on the second try either
        assert run(values, resume=resume) == 2
        assert "holds weights, but no checkpoint that can be read" in capsys.readouterr().err
    assert (folder_of(values) / "metrics.jsonl").read_bytes() == rows


def test_a_test_alone_leaves_the_run_as_it_is(run, values):
    assert run(values) == 0
    metrics = folder_of(values) / "metrics.jsonl"
    with metrics.open("a") as file:
        file.write('{"kind": "train", "step": 9, "loss": 1.0}\n')
    before = metrics.read_text()
    # The run's own checkpoint is tested, not the weights that it once started from.
    assert run(values, test=True, pretrain="nowhere.pth.tar") == 0
    assert metrics.read_text() == before
    assert run(values, test=True, save_name="another") == 2
    assert not folder_of(values, save_name="another").exists()


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGTERM, 2), (signal.SIGINT, 0)])
def test_a_signal_saves_and_ends_cleanly(run, values, write_config, number, workers):
    """Sent to the whole group, workers included, as a terminal or a scheduler does."""
    values |= {"tot_iterations": 100_000, "print_freq": 1, "path_test_data": "",
               "num_workers": workers}  # fmt: skip
    config = write_config(values, "long.json")
    process = subprocess.Popen(
        [sys.executable, "train.py", "--config", str(config)], cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    for line in process.stdout:
        if line.startswith("step 3"):
            os.killpg(process.pid, number)
            break
    rest = process.stdout.read()
    assert process.wait() == 0
    assert "stopped at step" in rest
    (path,) = folder_of(values).glob("iter_*.pth.tar")
    step = torch.load(path, weights_only=True)["iter"]
    assert run(values, tot_iterations=step + 3, resume=True) == 0
    assert run(values, tot_iterations=step + 3, save_name="unbroken") == 0
    assert_same(saved(values, step + 3), saved(values, step + 3, save_name="unbroken"))


def test_a_diverged_run_ends_and_keeps_the_last_good_checkpoint(run, values, capsys):
    assert run(values, tot_iterations=4) == 0
    before = saved(values, 4)
    # Such pixels make the loss infinite from the first step on.
    broken = saved(values, 4)
    broken["model_state_dict"]["g_s.6.bias"] += 1e30
    torch.save(broken, folder_of(values) / "iter_4.pth.tar")
    assert run(values, tot_iterations=100, resume=True, keep_checkpoints=1) == 1
    output = capsys.readouterr().out
    assert "10 steps in a row" in output
    assert "iter_4.pth.tar" in output
    kept = saved(values, 4)
    assert kept["iter"] == before["iter"]
    assert [file.name for file in folder_of(values).glob("iter_*")] == ["iter_4.pth.tar"]


def test_only_the_newest_checkpoints_are_kept(run, values):
    assert run(values, save_model_freq=1, keep_checkpoints=3, path_test_data="") == 0
    steps = {int(path.name[5:-8]) for path in folder_of(values).glob("iter_*")}
    assert steps == {6, 7, 8}


def test_skipped_images_are_counted_and_named(run, values, capsys):
    Image.new("RGB", (30, 200)).save(Path(values["train_folder"]) / "small.png")
    (Path(values["train_folder"]) / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert run(values) == 0
    output = capsys.readouterr().out
    assert "small.png: skipped: smaller than the crop" in output
    assert "broken.png: skipped: not readable" in output
    last = [row for row in read_jsonl(folder_of(values) / "metrics.jsonl") if "skipped" in row][-1]
    assert last["skipped"] == {"smaller than the crop": 1, "not readable": 1}


def test_two_processes_train_one_model(values, write_config, tmp_path):
    """The parameters of both ranks agree to the bit, and the loss falls."""
    values |= {"tot_iterations": 40, "print_freq": 10, "save_model_freq": 40,
               "lr": {"base": 3e-3, "warmup_step": 1}}  # fmt: skip
    script = tmp_path / "both.py"
    script.write_text(
        textwrap.dedent(f"""
        import os, sys
        sys.path.insert(0, {str(ROOT)!r})
        import torch, train
        distribute, checkpoint, trained = train.distribute, train.TrainingState.checkpoint, []
        def keeping(network, ranks):
            trained.append(network.model.network)
            return distribute(network, ranks)
        def spying(self, ranks):
            torch.save(trained[0].state_dict(), {str(tmp_path)!r} + f"/rank{{ranks.rank}}.pt")
            return checkpoint(self, ranks)
        train.distribute, train.TrainingState.checkpoint = keeping, spying
        sys.exit(train.main())
    """)
    )
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
        str(script), "--config", str(write_config(values, "two.json")),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True,
                          timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert_same(dict(first), dict(second))
    assert_same(dict(saved(values, 40)["model_state_dict"]), dict(first))
    losses = [row["loss"] for row in read_jsonl(folder_of(values) / "metrics.jsonl")
              if row["kind"] == "train"]  # fmt: skip
    assert losses[-1] < 0.6 * losses[0]
    checkpoint = saved(values, 40)
    assert len(checkpoint["rng"]) == len(checkpoint["data_position"]) == 2
    assert not torch.equal(*(rng["cpu"] for rng in checkpoint["rng"]))


def test_a_signal_to_one_of_two_processes_stops_both(run, values, write_config):
    """A plain launcher's; they stop at one step, saved, and go on from there."""
    values |= {"tot_iterations": 100_000, "print_freq": 1, "save_model_freq": 1_000_000,
               "path_test_data": ""}  # fmt: skip
    config = write_config(values, "two.json")
    script = f"import sys, train; sys.exit(train.main(['--config', {str(config)!r}]))"
    port = free_port()
    first, second = processes = [launch(script, rank, 2, port) for rank in (0, 1)]
    for line in first.stdout:
        if line.startswith("step 20:"):
            second.send_signal(signal.SIGTERM)
            break
    (code, out, errors), (other_code, *_) = ends_of(processes)
    assert (code, other_code) == (0, 0), errors
    (path,) = folder_of(values).glob("iter_*.pth.tar")
    step = torch.load(path, weights_only=True)["iter"]
    assert f"stopped at step {step} and saved" in out
    assert len(saved(values, step)["data_position"]) == 2
    assert run(values, tot_iterations=step + 1, resume=True) == 0


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
def test_wrong_input_is_one_line(run, values, capsys, changed, message):
    assert run(values, **changed) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error


def test_checkpoints_are_not_overwritten_and_configs_not_mixed(run, values, capsys):
    assert run(values) == 0
    before = {file.name: file.read_bytes() for file in folder_of(values).glob("iter_*")}
    assert run(values) == 2
    assert "holds checkpoints" in capsys.readouterr().err
    assert run(values, resume=True, train_lambda=0.02) == 2
    assert "its config differs in train_lambda (0.01 then, 0.02 now)" in capsys.readouterr().err
    assert before == {file.name: file.read_bytes() for file in folder_of(values).glob("iter_*")}
