"""Refinement that ends in files: what they hold, and files of a wanted size or quality."""

import json
import math

import numpy as np
import pytest
import torch
from compressai.models.google import get_scale_table
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from architectures.distributions import Gaussians
from coding.coder import decode_latents, decode_picture
from config import RefineConfig, Target, load_config
from conftest import WEIGHTS, read_jsonl, to_x
from models import freeze, load_checkpoint
from passes import true_terms
from refinement.target import LambdaSearch
from runs import NAMES, results, run

pytestmark = pytest.mark.usefixtures("without_run_plots")


def psnr_of_pixels(picture, path):
    """PSNR in dB of two 8-bit pictures, in float64 from its definition."""
    original = np.asarray(Image.open(path).convert("RGB")).astype(float)
    shown = (picture[0].clamp(0, 1) * 255).round().permute(1, 2, 0).numpy().astype(float)
    return 10 * math.log10(255**2 / ((shown - original) ** 2).mean())


def test_a_run_writes_files_and_reports_what_they_are(
    config_values, write_config, photos, coder, capsys
):
    config_values["dev_options"]["save_final"] = True
    values = {"save_bitstreams": True, "coder_scales": True, "polish_passes": 2}
    assert run(write_config(config_values | values)) == 0
    folder = results(config_values)
    records = read_jsonl(folder / "images.jsonl")
    assert [record["name"] for record in records] == NAMES
    for record in records:
        name, refined = record["name"], record["refined"]
        data = (folder / "bitstreams" / f"{name}.olc").read_bytes()
        assert refined["file_bytes"] == len(data)
        assert refined["file_bpp"] == 8 * len(data) / (record["width"] * record["height"])
        picture = decode_picture(coder, data)
        psnr = psnr_of_pixels(picture, photos / name)
        assert refined["psnr"] == pytest.approx(psnr, abs=1e-3)
        saved = to_x(np.asarray(Image.open(folder / "reconstructions" / name / "refined.png")))
        assert torch.equal((picture * 255).round(), (saved * 255).round())
        symbols, _ = decode_latents(coder, data)
        stored = np.load(folder / "latents" / f"{name}.npz")
        assert np.array_equal(stored["y"], symbols["y"][0])
        assert np.array_equal(stored["z"], symbols["z"][0])
        # Of some 400 bytes 38 are the header, and each string ends with a state of up to 8.
        ends = 8 * (38 + 2 * 8) / (record["width"] * record["height"])
        for side in (record["base"], refined):
            assert 0 < side["file_bpp"] - side["bpp"] < 0.01 * side["bpp"] + ends
    summary = json.loads((folder / "summary.json").read_text())
    sizes = [record["refined"]["file_bpp"] for record in records]
    assert summary["refined"]["file_bpp"] == pytest.approx(sum(sizes) / 3)
    table = capsys.readouterr().out
    assert "bpp (estimate)" in table
    assert f"{records[0]['base']['file_bpp']:.4f} -> {sizes[0]:.4f}" in table


def test_a_missing_file_is_made_again(config_values, write_config, capsys):
    path = write_config(config_values | {"save_bitstreams": True})
    assert run(path) == 0
    lost = results(config_values) / "bitstreams" / f"{NAMES[1]}.olc"
    data = lost.read_bytes()
    lost.unlink()
    assert run(path, "resume=true") == 0
    assert "2 of 3 images are done already" in capsys.readouterr().out
    assert lost.read_bytes() == data


def test_coder_scales_are_those_that_compressai_codes_with(photos):
    stock, model = load_checkpoint(str(WEIGHTS)).network, load_checkpoint(str(WEIGHTS))
    freeze(model, coder_scales=True)
    x = to_x(np.asarray(Image.open(photos / "c_rocket.png")))
    latents = model.analyze(x)
    y = latents["y"]
    medians = stock.entropy_bottleneck.quantiles[:, 0, 1].reshape(1, -1, 1, 1)
    z_hat = (latents["z"] - medians).round() + medians
    scales, means = stock.h_s(z_hat)[:, :, : y.size(2), : y.size(3)].chunk(2, 1)
    y_hat = (y - means).round() + means
    stock.update()
    table = torch.tensor(get_scale_table().tolist())
    coded = table[stock.gaussian_conditional.build_indexes(scales).long()]
    wanted = stock.gaussian_conditional._likelihood(y_hat, coded, means).clamp_min(1e-9)
    ours = Gaussians(model.network.gaussian_conditional, scales, means).likelihood(y_hat)
    torch.testing.assert_close(ours, wanted)


def test_coder_scales_leave_the_gradient_as_it_is():
    """That of a scale that already stands in the table, where both rates are the same."""
    plain, coded = (
        freeze(load_checkpoint(str(WEIGHTS)), coder_scales=flag).network.gaussian_conditional
        for flag in (False, True)
    )
    table = coded.lower_bound_scale.scale_table
    gradients = []
    for conditional in (plain, coded):
        scales = table[5:45].reshape(1, 1, 5, 8).clone().requires_grad_()
        gaussians = Gaussians(conditional, scales, torch.zeros_like(scales))
        gaussians.likelihood(torch.full_like(scales, 0.7)).log().sum().backward()
        gradients.append(scales.grad)
    assert gradients[0].abs().min() > 0
    torch.testing.assert_close(*gradients)


def test_files_cost_nothing_but_themselves(config_values, write_config):
    """The same latents, losses and estimates with and without."""
    path = write_config(config_values | {"tot_batches": 1})
    assert run(path) == run(path, "save_name=files", "save_bitstreams=true") == 0
    plain, files = (
        read_jsonl(results(config_values | {"save_name": name}) / "images.jsonl")[0]
        for name in ("run", "files")
    )
    for key in ("bpp", "true_loss", "psnr_raw"):
        assert plain["refined"][key] == files["refined"][key]
    assert plain["refined"]["psnr"] == pytest.approx(files["refined"]["psnr"], abs=1e-3)
    assert "file_bpp" not in plain["refined"]


# --- a wanted size or quality ---------------------------------------------------------------------


@settings(deadline=None, max_examples=300)
@given(
    kind=st.sampled_from(["bpp", "psnr"]),
    slope=st.floats(0.2, 2.5),
    position=st.floats(-2.0, 2.0),
    lag=st.floats(0.0, 0.3),
    unrefined=st.floats(-0.3, 0.3),
)
def test_the_search_finds_what_answers_it(kind, slope, position, lag, unrefined):
    """A picture whose value follows lambda, late, with a fifth to 2.5 times the usual slope."""
    slope *= LambdaSearch.SLOPES[kind]

    def at(lmbda):
        value = slope * math.log(lmbda / 0.01)
        return 0.4 * math.exp(value) if kind == "bpp" else 31 + value

    target = Target(kind, at(0.01 * math.exp(position)))
    value = at(0.01 * math.exp(unrefined))
    search = LambdaSearch(target, 0.01, 0.01)
    search.begin(value)
    tried = 0
    while search.goes_on:
        assert 0.01 / 1025 < search.lmbda < 0.01 * 1025
        value = lag * value + (1 - lag) * at(search.lmbda)
        search.add(value)
        tried += 1
    assert tried <= LambdaSearch.TRIALS
    assert target.miss(value) <= 1


@pytest.mark.parametrize(("wanted", "end"), [(60.0, 0.01 * 1024), (5.0, 0.01 / 1024)])
def test_the_search_ends_where_lambda_ends(wanted, end):
    search = LambdaSearch(Target("psnr", wanted), 0.01, 0.01)
    search.begin(30.0)
    while search.goes_on:
        search.add(30 + math.tanh(math.log(search.lmbda / 0.01)))
    assert search.lmbda == pytest.approx(end)
    assert search.trials < LambdaSearch.TRIALS


def test_a_target_is_2_percent_or_a_twentieth_of_a_decibel():
    assert Target("bpp", 0.5).miss(0.5099) < 1 < Target("bpp", 0.5).miss(0.4899)
    assert Target("psnr", 30.0).miss(30.049) < 1 < Target("psnr", 30.0).miss(29.949)


@pytest.mark.parametrize("target", [("target_bpp", 0.85), ("target_psnr", 0.4)])
def test_files_meet_a_target(config_values, write_config, photos, coder, capsys, target):
    key, change = target
    values = config_values | {"tot_batches": 1, "tot_inference_iterations": 40}
    path = write_config(values)
    run(path, "save_name=plain", "save_bitstreams=true", "tot_inference_iterations=1")
    (plain,) = read_jsonl(results(values | {"save_name": "plain"}) / "images.jsonl")
    bpp = key == "target_bpp"
    wanted = plain["base"]["file_bpp"] * change if bpp else plain["base"]["psnr"] + change
    assert run(path, f"{key}={wanted}") == 0
    (record,) = read_jsonl(results(values) / "images.jsonl")
    data = (results(values) / "bitstreams" / f"{NAMES[0]}.olc").read_bytes()
    if bpp:
        got = 8 * len(data) / (81 * 71)
        assert got == pytest.approx(wanted, rel=0.02)
    else:
        got = psnr_of_pixels(decode_picture(coder, data), photos / NAMES[0])
        assert got == pytest.approx(wanted, abs=0.05)
    assert record["target"]["met"]
    assert record["target"]["got"] == pytest.approx(got, abs=1e-3)
    assert record["lmbda"] != 0.01
    assert " met" in capsys.readouterr().out
    _losses_are_at_the_lambda_found(record)


def _losses_are_at_the_lambda_found(record):
    for side in (record["base"], record["refined"]):
        mse = 10 ** (-side["psnr_raw"] / 10)
        loss = side["bpp"] + record["lmbda"] * 255**2 * mse
        assert side["true_loss"] == pytest.approx(loss, rel=1e-4)


def test_what_cannot_be_met_is_said_and_the_closest_kept(config_values, write_config, capsys):
    values = config_values | {"tot_batches": 1}
    assert run(write_config(values), "target_psnr=70") == 0
    (record,) = read_jsonl(results(values) / "images.jsonl")
    said = capsys.readouterr().out
    assert "the target, 70.00 dB, was not met; the closest" in said
    assert not record["target"]["met"]
    trials = [
        float(line.split()[-2])
        for line in said.splitlines()
        if ": step " in line and "lambda" in line
    ]
    assert len(trials) == record["target"]["stretches"] > 2
    assert record["refined"]["psnr"] == pytest.approx(max(trials), abs=0.006)
    assert record["refined"]["psnr"] > record["base"]["psnr"]
    steps = [row["step"] for row in _trajectory(results(values))]
    assert steps == sorted(set(steps))


def test_no_refinement_may_be_the_closest(config_values, write_config, capsys):
    """A learning rate that wrecks the latents at once: said, and the encoder's file is kept."""
    values = config_values | {"tot_batches": 1, "eval_freq": 1}
    assert run(write_config(values), "target_psnr=31", "optimizer.lr=1e30") == 0
    (record,) = read_jsonl(results(values) / "images.jsonl")
    assert record["target"] | {"got": 0} == {
        "kind": "psnr", "wanted": 31.0, "got": 0, "met": False, "stretches": 1
    }  # fmt: skip
    assert record["refined"]["psnr"] == record["base"]["psnr"]
    assert "was not met" in capsys.readouterr().out


def test_a_run_from_before_these_keys_goes_on(config_values, write_config, capsys):
    path = write_config(config_values)
    assert run(path) == 0
    stored = results(config_values) / "config.json"
    old = json.loads(stored.read_text())
    for key in ("save_bitstreams", "coder_scales", "target_bpp", "target_psnr"):
        del old[key]
    stored.write_text(json.dumps(old))
    records = results(config_values) / "images.jsonl"
    lines = read_jsonl(records)
    for record in lines:
        del record["target"]
    records.write_text("".join(json.dumps(record) + "\n" for record in lines))
    assert run(path, "resume=true") == 0
    assert "3 of 3 images are done already" in capsys.readouterr().out


def _trajectory(folder):
    import pandas as pd

    return pd.read_csv(folder / "trajectory.csv").to_dict("records")


def test_only_one_target(config_values, write_config):
    from common.errors import InputError

    path = write_config(config_values)
    with pytest.raises(InputError, match="give only one"):
        load_config(path, RefineConfig, ["target_bpp=1", "target_psnr=30"])
    with pytest.raises(InputError, match="target_bpp = -1"):
        load_config(path, RefineConfig, ["target_bpp=-1"])


def test_the_estimate_is_the_sum_of_the_likelihoods(coder, photos):
    """The true pass, from which base rates come, beside CompressAI's forward."""
    x = to_x(np.asarray(Image.open(photos / "b_coffee.png")))
    ours = true_terms(coder.model, x, coder.model.analyze(x))
    with torch.no_grad():
        p = coder.model.network(x)["likelihoods"]
    bits = -sum(v.log2().sum().item() for v in p.values())
    assert ours.bpp.item() == pytest.approx(bits / 64**2, rel=1e-5)
