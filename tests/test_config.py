"""Configs: published files load, wrong ones are refused by name."""

import importlib
import json
import re
import shlex

import pytest

from architectures import ARCHITECTURES
from common.errors import InputError
from compare import plan_runs
from config import (
    CompareConfig,
    CustomLr,
    PretrainConfig,
    RefineConfig,
    channels_of_lambda,
    load_config,
    parse_command_line,
    resolved,
)
from conftest import ROOT
from datasets import open_images
from experimental_inference_methods import rounding_from_config
from schemas.reference import keys_of, reference

EXAMPLES = sorted((ROOT / "example_files").rglob("*.json"))
PRETRAIN_EXAMPLES = [path for path in EXAMPLES if "train" in f"{path.parent.name}{path.stem}"]
COMPARE_EXAMPLES = [path for path in EXAMPLES if path.parent.name == "compare"]
REFINE_EXAMPLES = sorted({*EXAMPLES} - {*PRETRAIN_EXAMPLES} - {*COMPARE_EXAMPLES})


@pytest.mark.parametrize("path", REFINE_EXAMPLES, ids=lambda p: p.stem)
def test_example_files_load_and_name_a_method(path):
    config = load_config(path, RefineConfig)
    rounding = rounding_from_config(config)
    if path.parent.name == "baselines":
        assert rounding.name == path.stem == config.save_name.split("/")[1]
    assert (ROOT / config.pretrain).is_file()


@pytest.mark.parametrize("path", COMPARE_EXAMPLES, ids=lambda p: p.stem)
def test_comparisons_load_and_all_their_runs(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load_config(path, CompareConfig)
    assert config.save_name == path.stem
    wanted = len(config.methods) * len(config.models) * len(config.seeds)
    assert len({run.folder for run in plan_runs(config)}) == wanted


@pytest.mark.parametrize("path", PRETRAIN_EXAMPLES, ids=lambda p: p.stem)
def test_pretraining_example_files_load(path):
    config = load_config(path, PretrainConfig)
    assert config.train_folder or config.path_train.train_imagenet


def test_the_default_example_has_the_published_settings():
    config = load_config(ROOT / "example_files/flexible_inference.json", RefineConfig)
    assert (config.train_lambda, config.tot_inference_iterations) == (0.01, 2000)
    assert (config.tot_batches, config.batch_size) == (24, 1)
    assert (config.optimizer.name, config.optimizer.lr) == ("adam", 0.005)
    rounding = rounding_from_config(config)
    assert rounding.name == "sga_logits_3c/log_ssl_a_factor_pow"
    assert rounding.params == {"factor": 0.98, "power": 1.4, "scale_factor": 1.4}
    assert (rounding.temperature.rate, rounding.temperature.ub) == (1e-3, 1.0)


def test_the_pretraining_example_has_the_published_settings():
    config = load_config(ROOT / "example_files/pretrain.json", PretrainConfig)
    assert (config.tot_iterations, config.batch_size, config.image_size) == (2_000_000, 32, 256)
    assert (config.lr.base, config.lr.warmup_step, config.lr.clip_grad) == (1e-4, 1000, 1.0)


@pytest.mark.parametrize(
    ("lmbda", "width"),
    [(0.001, 128), (0.0025, 192), (0.005, 192), (0.01, 192), (0.02, 192), (0.04, 256), (0.08, 256)],
)
def test_channels_follow_the_published_rule(lmbda, width):
    channels = channels_of_lambda(lmbda)
    assert (width, width) == (channels.N, channels.M)


def test_resolved_config_reads_back_as_itself(config_values, write_config):
    config = load_config(write_config(config_values), RefineConfig)
    again = load_config(write_config(resolved(config), "again.json"), RefineConfig)
    assert again == config


WRONG = {
    "unknown key": (
        ["dev_options.tmp_rate=0.1"],
        "unknown key 'dev_options.tmp_rate': did you mean 'temp_rate'?",
    ),
    "wrong type": (
        ["tot_inference_iterations=many"],
        'tot_inference_iterations = "many": should be a valid integer',
    ),
    "number as text": (['train_lambda="0.01"'], 'train_lambda = "0.01": should be a valid number'),
    "not a choice": (
        ["precision=float16"],
        "precision = \"float16\": should be 'auto', 'float32' or 'bfloat16'",
    ),
    "optimizer": (["optimizer.name=Adam"], "optimizer.name = \"Adam\": should be 'adam', 'sgd'"),
    "negative": (["eval_freq=0"], "eval_freq = 0: should be greater than or equal to 1"),
    "no channel rule": (["train_lambda=0.18"], "train_lambda = 0.18 has no channel rule"),
    "zero lambda": (["train_lambda=0"], "train_lambda = 0 has no channel rule"),
    "two methods": (
        ["dev_options.improving_methods.temp_ste=true"],
        "dev_options.improving_methods: sga_logits_3c and temp_ste are true: only one may be",
    ),
    "two baselines": (
        ["improving_methods.ste=true", "improving_methods.sga=true"],
        "improving_methods: ste and sga are true: only one may be",
    ),
    "no method": (
        ["dev_options.improving_methods.sga_logits_3c=false"],
        "none is true here or in dev_options: set one method true",
    ),
    "method not a flag": (
        ["dev_options.improving_methods.sga=1"],
        "dev_options.improving_methods.sga = 1: should be true or false",
    ),
    "two rates": (
        [
            "optimizer.schedule=cosine",
            'dev_options.custom_lr={"start_iters":1,"warmup_steps":1,"start_lr":1,"end_lr":1}',
        ],
        "custom_lr is set and optimizer.schedule is cosine: only one may set the learning rate",
    ),
    "time and target": (
        ["max_seconds=9", "target_bpp=0.3"],
        "max_seconds and target_bpp are both set: give only one",
    ),
    "early stop": (["early_stop={}", "early_stop.evaluations=1"], "greater than or equal to 2"),
    "two data sets": (["dev_options.sample=true"], "folder and sample are true: exactly one of"),
    "no data set": (["dev_options.folder=false"], "none is true: exactly one of kodak, tecnick"),
    "upper bound": (["dev_options.sga_logits_params.ub=1.5"], "ub = 1.5: should be less than or"),
    "not finite": (["optimizer.lr=NaN"], "optimizer.lr = NaN: should be a finite number"),
    "save_name": (["save_name=../outside"], 'save_name = "../outside": should be a name'),
    "no object": (
        ["optimizer=adam"],
        'optimizer = "adam": should be an object {...} with keys of name, lr, momentum',
    ),
    "not a switch": (
        ["cuda_graphs=yes"],
        'cuda_graphs: should be true, false or "auto", not "yes"',
    ),
    "not a boolean": (["resume=yes"], 'resume = "yes": should be true or false'),
    "not a string": (["save_name=7"], "save_name = 7: should be a string"),
    "key of another place": (["lr=1"], "unknown key 'lr': there are train_lambda, channels"),
    "no architecture": (["architecture="], "should have at least 1 character"),
    "architecture by number": (["architecture=4"], "architecture = 4: should be a string"),
    "empty group": (
        ['channels={"N": 8, "M": 8, "groups": [8, 0]}'],
        "channels.groups.1 = 0: should be greater than or equal to 1",
    ),
    "incomplete": (['channels={"N": 64}'], "the key 'channels.M' is missing"),
    "override": (["pretrain.sub=1"], "--set pretrain.sub=1: pretrain holds no keys"),
    "no equals sign": (["resume"], "--set resume: must read key.sub=value"),
}


@pytest.mark.parametrize(("overrides", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_values_are_refused_by_name(config_values, write_config, overrides, message):
    with pytest.raises(InputError) as refused:
        load_config(write_config(config_values), RefineConfig, overrides)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["quantization=round"], "should be 'noise', 'mixed' or 'rounded'"),
        (["new_context=true"], "new_context is true, but pretrain names no model to take"),
        (["new_context=true", "pretrain=a", "new_y=true"], "is true, but so is new_y"),
        (
            ["new_context=true", "pretrain=a", "architecture=mbt2018-mean"],
            "new_context makes an mbt2018, not the mbt2018-mean asked for",
        ),
    ],
)
def test_wrong_values_of_a_training_are_refused_by_name(overrides, message):
    with pytest.raises(InputError) as refused:
        load_config(ROOT / "example_files/train_demo.json", PretrainConfig, overrides)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_training_may_name_its_architecture_groups_and_rounding():
    overrides = ["architecture=elic2022-official", "quantization=rounded"]
    overrides.append('channels={"N": 8, "M": 12, "groups": [3, 5, 4]}')
    config = load_config(ROOT / "example_files/train_demo.json", PretrainConfig, overrides)
    assert (config.architecture, config.quantization) == ("elic2022-official", "rounded")
    assert config.network_channels.groups == [3, 5, 4]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON: Expecting property name"),
        ("[]", "holds no JSON object"),
        ('{"seed": 1, "seed": 2}', "the key 'seed' stands twice"),
        ("", "not valid JSON"),
    ],
)
def test_files_that_are_no_config_are_refused(tmp_path, text, message):
    path = tmp_path / "wrong.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"wrong\.json") as refused:
        load_config(path, RefineConfig)
    assert message in str(refused.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.json: No such file"):
        load_config(tmp_path / "nowhere.json", RefineConfig)


def test_dev_options_win_over_the_top_level(config_values, write_config):
    config_values["improving_methods"] = {"sga": True}
    config = load_config(write_config(config_values), RefineConfig)
    assert config.method == "sga_logits_3c"
    config_values["dev_options"]["improving_methods"] = {"sga_logits_3c": False}
    assert load_config(write_config(config_values), RefineConfig).method == "sga"


def test_inference_lambda_replaces_train_lambda_in_the_loss(config_values, write_config):
    path = write_config(config_values)
    assert load_config(path, RefineConfig).lmbda == 0.01
    assert load_config(path, RefineConfig, ["dev_options.inference_lambda=0.02"]).lmbda == 0.02


def test_channels_stand_in_for_the_rule(config_values, write_config):
    overrides = ["train_lambda=0.18", 'channels={"N": 192, "M": 320}']
    config = load_config(write_config(config_values), RefineConfig, overrides)
    assert (config.channels.N, config.channels.M) == (192, 320)


EXAMPLE = "A script.\n\npython script.py --config example.json\n"


def test_the_published_command_line_is_accepted(config_values, write_config):
    path = str(write_config(config_values))
    config = parse_command_line(RefineConfig, EXAMPLE, ["--load_json", "true", "--config", path])
    assert config.save_name == "run"
    config = parse_command_line(
        RefineConfig,
        EXAMPLE,
        ["--config", path, "--set", "seed=7", "--set", "dev_options.3c_power=2"],
    )
    assert config.seed == 7
    assert config.dev_options.published_hyper_parameters == {"3c_power": 2.0}


def test_custom_learning_rate_is_flat_then_linear_then_flat():
    schedule = CustomLr(start_iters=10, warmup_steps=20, start_lr=0.04, end_lr=0.02)
    rates = [schedule.at(step) for step in (0, 9, 10, 20, 30, 99)]
    assert rates == pytest.approx([0.04, 0.04, 0.04, 0.03, 0.02, 0.02])
    at_once = CustomLr(start_iters=2, warmup_steps=0, start_lr=0.04, end_lr=0.01)
    assert [at_once.at(step) for step in (1, 2)] == [0.04, 0.01]


def test_the_cosine_falls_from_the_rate_to_nothing_over_the_run(config_values, write_config):
    overrides = ["optimizer.lr=0.04", "optimizer.schedule=cosine", "tot_inference_iterations=300"]
    config = load_config(write_config(config_values), RefineConfig, overrides)
    rates = [config.lr_at(step) for step in (0, 100, 150, 200, 300)]
    assert rates == pytest.approx([0.04, 0.03, 0.02, 0.01, 0.0])
    constant = load_config(write_config(config_values), RefineConfig, overrides[::2])
    assert [constant.lr_at(step) for step in (0, 299)] == [0.04, 0.04]


def test_every_published_key_is_known():
    published = json.loads((ROOT / "example_files/flexible_inference.json").read_text())
    schedule = {"start_iters": 500, "warmup_steps": 100, "start_lr": 0.01, "end_lr": 0.005}
    published["dev_options"]["custom_lr"] = schedule
    assert RefineConfig.model_validate(published).dev_options.custom_lr.end_lr == 0.005


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_json_of_every_unicode_is_read(config_values, tmp_path, encoding):
    """As Windows' editors and shells write it, with a byte order mark or without."""
    path = tmp_path / "config.json"
    path.write_bytes(
        json.dumps(config_values | {"save_name": "ü"}, ensure_ascii=False).encode(encoding)
    )
    assert load_config(path, RefineConfig).save_name == "ü"


def test_json_of_no_unicode_is_refused_in_a_line(tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes('{"save_name": "ü"}'.encode("latin-1"))
    with pytest.raises(InputError, match="not a text file"):
        load_config(path, RefineConfig)


def test_no_path_has_a_null_character(config_values, write_config):
    config_values["dev_options"]["path_test"]["folder"] = "a\0b"
    with pytest.raises(InputError, match="null character"):
        load_config(write_config(config_values), RefineConfig)


# --- the command line -----------------------------------------------------------------------------


def _parsed(schema, path, *arguments):
    return parse_command_line(schema, EXAMPLE, ["--config", str(path), *map(str, arguments)])


def _refine_values(config_values):
    """A config of the sample photos that takes fewer images than there are."""
    del config_values["dev_options"]["path_test"]
    config_values["dev_options"] |= {"folder": False, "sample": True}
    return config_values | {"tot_batches": 1}


def test_images_are_the_whole_data_set_of_a_refinement(config_values, write_config, photos):
    path = write_config(_refine_values(config_values))
    config = _parsed(RefineConfig, path, "--images", photos)
    assert config.dev_options.data_set == "folder"
    names = ["a_chelsea.png", "b_coffee.png", "c_rocket.png"]
    assert open_images(config).names[: config.image_count] == names
    one = _parsed(RefineConfig, path, "--images", photos / "b_coffee.png")
    assert open_images(one).names == ["b_coffee.png"]


def test_a_number_of_images_is_kept(config_values, write_config, photos):
    values = _refine_values(config_values)
    path = write_config(values)
    assert _parsed(RefineConfig, path, "--images", photos, "--set", "images=2").image_count == 2
    path = write_config(values | {"images": 1})
    assert _parsed(RefineConfig, path, "--images", photos).image_count == 1
    path = write_config(values | {"images": None})  # as a run's own config.json has it
    assert _parsed(RefineConfig, path, "--images", photos).takes_all_images


def test_images_are_the_whole_data_set_of_a_comparison(photos, write_config):
    values = json.loads((ROOT / "example_files/compare/recipes_sample.json").read_text())
    path = write_config({key: value for key, value in values.items() if key != "images"})
    config = _parsed(CompareConfig, path, "--images", photos)
    assert (config.data_set, config.path, config.images) == ("folder", str(photos), 0)
    assert _parsed(CompareConfig, path, "--images", photos, "--set", "images=2").images == 2
    assert _parsed(CompareConfig, path).images == 24
    path = write_config(values | {"images": 4})
    assert _parsed(CompareConfig, path, "--images", photos).images == 4


def test_every_run_of_a_comparison_takes_all_of_these_images(photos, monkeypatch):
    monkeypatch.chdir(ROOT)
    path = "example_files/compare/recipes_sample.json"
    runs = plan_runs(_parsed(CompareConfig, path, "--images", photos, "--set", "images=0"))
    assert runs
    for run in runs:
        assert run.config.takes_all_images
        assert len(open_images(run.config).names[: run.config.image_count]) == 3


def test_images_are_what_is_trained_on(photos):
    config = _parsed(PretrainConfig, ROOT / "example_files/pretrain.json", "--images", photos)
    assert config.train_folder == str(photos)


def test_a_folder_called_sample_is_no_word_for_the_sample_photos(photos, monkeypatch):
    photos.rename(photos.with_name("sample"))
    monkeypatch.chdir(photos.parent)
    path = ROOT / "example_files/fast.json"
    assert len(open_images(_parsed(RefineConfig, path, "--images", "sample")).names) == 3
    path = ROOT / "example_files/train_demo.json"
    assert _parsed(PretrainConfig, path, "--images", "sample").train_folder == "./sample"


CONFIG_SCRIPTS = {
    "train_flexible_inference": "example_files/fast.json",
    "train": "example_files/train_demo.json",
    "compare": "example_files/compare/demo.json",
}


@pytest.mark.parametrize("script", CONFIG_SCRIPTS)
def test_images_that_do_not_exist_are_one_line(script, capsys):
    main = importlib.import_module(script).main
    assert main(["--config", str(ROOT / CONFIG_SCRIPTS[script]), "--images", "no/where"]) == 2
    assert capsys.readouterr().err == "error: --images no/where: no such file or folder\n"


def test_a_wrong_key_beside_images_is_named_with_what_was_given(photos):
    arguments = ["--images", photos, "--set", "sed=1"]
    with pytest.raises(InputError) as refused:
        _parsed(RefineConfig, "example_files/fast.json", *arguments)
    start = f"example_files/fast.json with --images {photos} with --set sed=1: unknown key 'sed'"
    assert str(refused.value).startswith(start)


def test_quick_takes_no_images_of_ones_own(photos, capsys):
    main = importlib.import_module("compare").main
    with pytest.raises(SystemExit) as ended:
        main(["--config", CONFIG_SCRIPTS["compare"], "--images", str(photos), "--quick"])
    assert ended.value.code == 2
    assert "not allowed with argument --images" in capsys.readouterr().err


@pytest.mark.parametrize("script", [*CONFIG_SCRIPTS, "codec", "benchmark", "datasets"])
def test_help_ends_with_examples_whose_files_exist(script, capsys):
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(script).main(["--help"])
    assert ended.value.code == 0
    _, _, end = capsys.readouterr().out.partition("\nexamples:\n")
    examples = end.splitlines()
    assert len(examples) >= 3
    for example in examples:
        words = shlex.split(example, comments=True)
        assert words[0] in ("python", "torchrun")
        assert f"{script}.py" in words
        for word in words:
            assert not word.startswith("example_files/") or (ROOT / word).is_file(), word
        if "--config" in words:
            assert words[words.index("--config") + 1].startswith("example_files/")


# --- the reference --------------------------------------------------------------------------------

SCHEMAS = (RefineConfig, PretrainConfig, CompareConfig)


def test_the_reference_is_current():
    page = (ROOT / "docs/config.md").read_text(encoding="utf-8")
    assert page == reference(), "run: python config.py > docs/config.md"
    assert "python config.py > docs/config.md" in page


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.__name__)
def test_every_key_is_described(schema):
    keys = keys_of(schema)
    assert [key.name for key in keys if len(key.description) < 10] == []
    assert len({key.name for key in keys}) == len(keys)


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.__name__)
def test_the_reference_has_every_key_that_the_example_files_have(schema):
    paths = {
        RefineConfig: REFINE_EXAMPLES,
        PretrainConfig: PRETRAIN_EXAMPLES,
        CompareConfig: COMPARE_EXAMPLES,
    }[schema]
    assert len(paths) > 0
    known = {key.name for key in keys_of(schema)}
    free = {"improving_methods", "rounding_params", "set", "groups", "published"}

    def names(values, prefix=""):
        for key, value in values.items():
            name = f"{prefix}{key}"
            yield name
            if isinstance(value, dict) and key not in free:
                inner = value.values() if key == "methods" else [value]
                place = ".NAME" if key == "methods" else ""
                for entry in inner:
                    yield from names(entry, f"{name}{place}.")
            if isinstance(value, list):
                for entry in value:
                    yield from names(entry, f"{name}[].") if isinstance(entry, dict) else ()

    for path in paths:
        assert {*names(json.loads(path.read_text()))} <= known, path


@pytest.mark.parametrize(
    ("name", "values", "default"),
    [
        ("images", "whole number from 0 or null", "`null`"),
        ("optimizer.name", "`adam`, `sgd` or `LBFGS`", '`"adam"`'),
        ("optimizer.momentum", "number from 0 below 1", "`0.0`"),
        ("dev_options.3c_power", "number above 0 or null", "`null`"),
        ("dev_options.path_test.folder", "path or null", "`null`"),
        ("early_stop.evaluations", "whole number from 2", "`5`"),
        ("dev_options.improving_methods", "{NAME: true or false}", "`{}`"),
        ("channels.groups", "[whole number from 1] or null", "`null`"),
        ("architecture", "text or null", "`null`"),
        ("save_name", "text", "required"),
    ],
)
def test_the_reference_says_values_and_defaults_in_words(name, values, default):
    (key,) = (key for key in keys_of(RefineConfig) if key.name == name)
    assert (key.values, key.default) == (values, default)


@pytest.mark.parametrize("schema", [RefineConfig, PretrainConfig])
def test_the_reference_names_every_architecture(schema):
    (key,) = (key for key in keys_of(schema) if key.name == "architecture")
    assert {*re.findall(r"`([a-z]+20[\w-]+)`", key.description)} == ARCHITECTURES.keys()


def test_keys_without_effect_say_so():
    idle = {
        "cycle_length", "path_train", "path_train.train_imagenet", "lr.curl_lr",
    }  # fmt: skip
    both = [*keys_of(RefineConfig), *keys_of(PretrainConfig)]
    found = {key.name for key in both if key.description.startswith("No effect")}
    assert found == idle
