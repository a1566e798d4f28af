"""Objectives in configs: the channels of models for MS-SSIM, and what is refused in a line."""

import importlib
import json

import pytest
from compressai.zoo.image import cfgs

from common.errors import InputError
from compare import plan_runs
from config import (
    CompareConfig,
    PretrainConfig,
    RefineConfig,
    channels_of_lambda,
    load_config,
)
from conftest import ROOT, WEIGHTS

# Of CompressAI's qualities 1 to 8: https://interdigitalinc.github.io/CompressAI/zoo.html
LAMBDAS = (2.40, 4.58, 8.73, 16.64, 31.73, 60.50, 115.37, 220.00)
FOR_MS_SSIM = ["objective=ms-ssim", "train_lambda=8.73"]


@pytest.mark.parametrize("architecture", cfgs)
def test_models_for_ms_ssim_have_compressais_channels(architecture):
    for quality, widths in cfgs[architecture].items():
        channels = channels_of_lambda(LAMBDAS[quality - 1], "ms-ssim", architecture)
        assert [widths[0], widths[-1]] == [channels.N, channels.M], quality


def test_a_training_for_ms_ssim_takes_the_channels_of_its_architecture():
    def of(*overrides):
        overrides = ["channels=null", "image_size=192", *FOR_MS_SSIM, *overrides]
        config = load_config(ROOT / "example_files/train_demo.json", PretrainConfig, overrides)
        return config.network_channels.N, config.network_channels.M

    assert of() == (128, 192)
    assert of("train_lambda=60.5") == (192, 320)
    assert of("train_lambda=60.5", "architecture=cheng2020-anchor") == (192, 192)
    assert of('channels={"N": 8, "M": 12}') == (8, 12)


@pytest.mark.parametrize("lmbda", [0.01, 0.999, 1000.5])
@pytest.mark.parametrize("architecture", ["mbt2018-mean", "elic2022-official"])
def test_there_is_no_channel_rule_for_other_lambdas_and_architectures(lmbda, architecture):
    with pytest.raises(ValueError, match="no channel rule for MS-SSIM and") as refused:
        channels_of_lambda(lmbda, "ms-ssim", architecture)
    assert f"{architecture}: give a lambda in [1, 1000]" in str(refused.value)
    with pytest.raises(ValueError, match="elic2022-official"):
        channels_of_lambda(8.73, "ms-ssim", "elic2022-official")


REFUSED = {
    "lambda for MSE": (
        ["objective=ms-ssim"],
        "lambda 0.01 is none for MS-SSIM: set dev_options.inference_lambda to one in [1, 1000]; "
        "CompressAI's models have 2.4 to 220",
    ),
    "inference lambda for MSE": (
        [*FOR_MS_SSIM, "dev_options.inference_lambda=0.5"],
        "lambda 0.5 is none for MS-SSIM: set dev_options.inference_lambda to one in [1, 1000]",
    ),
    "lambda for MS-SSIM": (
        ["train_lambda=8.73"],
        "lambda 8.73 is none for MSE: set dev_options.inference_lambda to one in (0, 0.1), or "
        'objective to "ms-ssim"',
    ),
    "inference lambda for MS-SSIM": (
        ["dev_options.inference_lambda=8.73"],
        "lambda 8.73 is none for MSE: set dev_options.inference_lambda to one in (0, 0.1)",
    ),
    "lambda for MS-SSIM and channels": (
        ['channels={"N": 4, "M": 4}', "train_lambda=8.73"],
        "lambda 8.73 is none for MSE: set dev_options.inference_lambda to one in (0, 0.1)",
    ),
    "polish": (
        [*FOR_MS_SSIM, "polish_passes=7"],
        'polish_passes = 7: the polish is for the objective "mse"; with "ms-ssim" set it to 0',
    ),
    "two targets": (
        ["target_bpp=0.3", "target_ms_ssim_db=15"],
        "target_bpp and target_ms_ssim_db are set: give only one",
    ),
    "two qualities": (
        ["target_psnr=30", "target_ms_ssim_db=15"],
        "target_psnr and target_ms_ssim_db are set: give only one",
    ),
    "time and target": (
        ["max_seconds=9", "target_ms_ssim_db=15"],
        "max_seconds and target_ms_ssim_db are both set: give only one",
    ),
    "no name": (["objective="], 'objective = "": String should have at least 1 character'),
}


@pytest.mark.parametrize(("overrides", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_a_refinement_is_refused_in_a_line(config_values, write_config, overrides, message):
    with pytest.raises(InputError) as refused:
        load_config(write_config(config_values), RefineConfig, overrides)
    assert str(refused.value).count(message) == 1
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("overrides", "lmbda"),
    [
        (FOR_MS_SSIM, 8.73),
        # A model for one loss may be refined for the other.
        (["objective=ms-ssim", "dev_options.inference_lambda=30"], 30),
        (["train_lambda=8.73", "dev_options.inference_lambda=0.02"], 0.02),
        (["target_ms_ssim_db=15"], 0.01),
    ],
)
def test_a_refinement_for_either_loss_is_accepted(config_values, write_config, overrides, lmbda):
    config = load_config(write_config(config_values), RefineConfig, overrides)
    assert config.lmbda == lmbda


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            [*FOR_MS_SSIM, "image_size=128"],
            'image_size = 128: objective = "ms-ssim" needs crops of 161 pixels a side or more, so '
            "192 or more",
        ),
        (
            ["channels=null", "image_size=192", "objective=ms-ssim"],
            "train_lambda = 0.01 has no channel rule for MS-SSIM and mbt2018-mean",
        ),
        (
            ["channels=null", "train_lambda=8.73"],
            "train_lambda = 8.73 has no channel rule: give a lambda in (0, 0.1)",
        ),
        (
            ["channels=null", "objective=msssim"],
            "objective = 'msssim' has no channel rule, only mse and ms-ssim have one: "
            "give channels {N, M}",
        ),
    ],
)
def test_a_training_is_refused_in_a_line(overrides, message):
    with pytest.raises(InputError) as refused:
        load_config(ROOT / "example_files/train_demo.json", PretrainConfig, overrides)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


# --- an objective that there is not --------------------------------------------------------------


@pytest.fixture
def wrong(request, config_values, train_values, photos, tmp_path):
    """A script's JSON values that ask for an unknown objective."""
    path = tmp_path / "method.json"
    path.write_text(json.dumps(config_values))
    comparison = {
        "save_name": "run", "output_dir": str(tmp_path / "results"), "data_set": "folder",
        "path": str(photos), "set": {"objective": "lpips"}, "methods": {"a": {"config": str(path)}},
        "models": [{"pretrain": str(WEIGHTS), "train_lambda": 0.01}],
    }  # fmt: skip
    return {
        "train_flexible_inference": config_values | {"objective": "lpips"},
        "train": train_values | {"objective": "lpips"},
        "compare": comparison,
    }[request.param]


@pytest.mark.parametrize(
    ("wrong", "script"),
    [(script, script) for script in ("train_flexible_inference", "train", "compare")],
    indirect=["wrong"],
)
def test_an_unknown_objective_is_one_line_that_names_the_known(
    wrong, script, write_config, tmp_path, capsys
):
    main = importlib.import_module(script).main
    assert main(["--config", str(write_config(wrong))]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ")
    assert line.endswith("objective = 'lpips': there are mse, ms-ssim")
    assert not captured.out
    assert not (tmp_path / "results").exists() and not (tmp_path / "checkpoints").exists()


def test_lambdas_of_a_comparison_are_those_of_each_methods_objective(
    config_values, write_config, photos, tmp_path
):
    path = str(write_config(config_values, "method.json"))
    values = {
        "save_name": "run", "output_dir": str(tmp_path), "data_set": "folder", "path": str(photos),
        "methods": {
            "mse": {"config": path},
            "ms-ssim": {"config": path, "set": {"objective": "ms-ssim"}},
        },
        "models": [
            {"pretrain": str(WEIGHTS), "train_lambda": 0.01, "ms_ssim_lambda": 20.0},
            {"pretrain": str(WEIGHTS), "train_lambda": 0.01, "inference_lambda": 0.02,
             "ms_ssim_lambda": 40.0},
        ],
    }  # fmt: skip
    runs = plan_runs(load_config(write_config(values), CompareConfig))
    lambdas = [(run.config.objective, run.config.lmbda) for run in runs]
    assert lambdas == [("mse", 0.01), ("mse", 0.02), ("ms-ssim", 20.0), ("ms-ssim", 40.0)]
    assert len({run.loss for run in runs[:2]} | {run.loss for run in runs[2:]}) == 2
    del values["models"][0]["ms_ssim_lambda"]
    with pytest.raises(InputError) as refused:
        plan_runs(load_config(write_config(values), CompareConfig))
    start = "models, lambda 0.01: methods.ms-ssim has the objective ms-ssim, so give the model an"
    assert str(refused.value) == f"{start} ms_ssim_lambda"
    values["models"] = [{"pretrain": str(WEIGHTS), "train_lambda": 8.73, "inference_lambda": 0.01}]
    del values["methods"]["ms-ssim"]
    (run,) = plan_runs(load_config(write_config(values), CompareConfig))
    assert (run.config.objective, run.config.lmbda, run.config.usual_lambda) == ("mse", 0.01, 0.01)
    values["models"] = [{"pretrain": str(WEIGHTS), "train_lambda": 8.73}]
    values["methods"] = {"own": {"config": path, "set": {"objective": "ms-ssim"}}}
    (run,) = plan_runs(load_config(write_config(values), CompareConfig))
    assert (run.config.lmbda, run.config.usual_lambda) == (8.73, 8.73)
