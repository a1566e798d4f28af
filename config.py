"""JSON configs of the published repository, checked by pydantic, with a few keys of our own.

`load_config(path, RefineConfig)` and `load_config(path, PretrainConfig)` return frozen objects
whose attributes are the JSON's keys. Unknown keys, wrong types, impossible values: one `InputError`
that names each.
"""

import argparse
import difflib
import functools
import json
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from common.files import printable, user_path

# libgomp reads this when torch is imported, which must come after this module. By default its
# threads spin for long while they wait: on a machine with other work a step takes twice as long.
if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "10000"


class InputError(Exception):
    """Something a user gave is wrong: one line that names it and says what would be right."""


class Section(BaseModel):
    """A JSON object whose keys and types are all known."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Index = Annotated[int, Field(ge=0)]
Tracker = Literal["tensorboard", "wandb"]
UserPath = Annotated[str, AfterValidator(user_path)]
SAVE_NAME = r"^[\w-][\w. -]*(/[\w-][\w. -]*)*$"


class Channels(Section):
    """Channels of the networks: N inside them, M of y."""

    N: Count
    M: Count


class Optimizer(Section):
    """What moves the latents. `momentum` is SGD's; `schedule` is of the learning rate."""

    name: Literal["adam", "sgd", "LBFGS"] = "adam"
    lr: Positive = 0.005
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    schedule: Literal["constant", "cosine"] = "constant"

    def lr_at(self, step: float, steps: int) -> float:
        """The learning rate of step `step` of `steps`; `cosine` falls to 0 at the end."""
        if self.schedule == "constant":
            return self.lr
        return self.lr * (1 + math.cos(math.pi * step / steps)) / 2


class CustomLr(Section):
    """start_lr for start_iters steps, linear to end_lr over warmup_steps, then end_lr."""

    start_iters: Index
    warmup_steps: Index
    start_lr: Positive
    end_lr: NonNegative

    def at(self, step: float) -> float:
        """The learning rate of optimisation step `step` (0 is the first)."""
        if step < self.start_iters:
            return self.start_lr
        if step >= self.start_iters + self.warmup_steps:
            return self.end_lr
        progress = (step - self.start_iters) / self.warmup_steps
        return self.start_lr + (self.end_lr - self.start_lr) * progress


class EarlyStop(Section):
    """Settled is an image whose last `evaluations` true losses lie within `tolerance` of them."""

    evaluations: Annotated[int, Field(ge=2)] = 5
    tolerance: Positive = 1e-4

    def settled(self, losses: Sequence[float]) -> bool:
        """Whether these true losses, the oldest first, have come to rest."""
        last = losses[-self.evaluations :]
        return len(last) == self.evaluations and max(last) - min(last) < self.tolerance * last[-1]


class SgaLogitsParams(Section):
    """The function of `sga_logits` or `sga_logits_3c`, and the temperature's upper bound."""

    logits: str | None = None
    ub: Annotated[float, Field(gt=0, le=1)] = 1.0


class TestPaths(Section):
    """Where the data sets lie. `clic` may stay null: tensorflow-datasets' own folder then."""

    kodak: UserPath | None = None
    tecnick: UserPath | None = None
    pathology: UserPath | None = None
    clic: UserPath | None = None
    folder: UserPath | None = None


class DevOptions(Section):
    """Data set, method and its hyper-parameters. Null hyper-parameter: the method's own default."""

    kodak: bool = False
    tecnick: bool = False
    pathology: bool = False
    clic: bool = False
    folder: bool = False
    sample: bool = False
    path_test: TestPaths = TestPaths()
    improving_methods: dict[str, bool] = {}
    temp_rate: NonNegative = 1e-3
    temp_schedule: Literal["exp", "exp0", "exp_of_run", "linear"] = "exp"
    sga_logits_params: SgaLogitsParams = SgaLogitsParams()
    gnoise_sigma: Positive | None = None
    scale_factor: Positive | None = None
    power_3c: Positive | None = Field(None, alias="3c_power")
    factor_3c: Positive | None = Field(None, alias="3c_factor")
    rounding_params: dict[str, bool | int | float | str] = {}
    augmented_loss: bool = False
    save_final: bool = False
    inference_lambda: Positive | None = None
    custom_lr: CustomLr | None = None

    @property
    def data_set(self) -> str:
        """The name of the one data set that is switched on."""
        return next(name for name in DATA_SETS if getattr(self, name))

    @property
    def published_hyper_parameters(self) -> dict[str, float]:
        """The published keys that hold a value, by their JSON names."""
        values = {
            "gnoise_sigma": self.gnoise_sigma,
            "scale_factor": self.scale_factor,
            "3c_power": self.power_3c,
            "3c_factor": self.factor_3c,
        }
        return {key: value for key, value in values.items() if value is not None}

    @model_validator(mode="after")
    def _one_data_set(self) -> "DevOptions":
        chosen = [name for name in DATA_SETS if getattr(self, name)]
        if len(chosen) != 1:
            found = f"{' and '.join(chosen)} are" if chosen else "none is"
            raise ValueError(f"{found} true: exactly one of {', '.join(DATA_SETS)} must be")
        return self


DATA_SETS = ("kodak", "tecnick", "pathology", "clic", "folder", "sample")


class TrainPath(Section):
    """Kept so that published files load; refinement reads no training data."""

    train_imagenet: str | None = ""


def channels_of_lambda(train_lambda: float) -> Channels:
    """N = M = 128 up to lambda 0.001, 192 below 0.04, 256 above (arXiv 2401.17789).

    Lambdas between the published seven follow the same steps, up to 0.1, where we draw the line.

    Raises:
        ValueError: no rule for this lambda.
    """
    if not 0 < train_lambda < 0.1:
        raise ValueError(
            f"train_lambda = {train_lambda:g} has no channel rule: "
            "give a lambda in (0, 0.1), or channels {N, M}"
        )
    width = 128 if train_lambda <= 0.001 else 192 if train_lambda < 0.04 else 256
    return Channels(N=width, M=width)


class ModelOfLambda(Section):
    """What both scripts say of the network: the lambda that it is trained for, and its size."""

    train_lambda: float
    channels: Channels | None = None

    @model_validator(mode="after")
    def _has_channels(self) -> "ModelOfLambda":
        if self.channels is None:
            channels_of_lambda(self.train_lambda)
        elif self.train_lambda <= 0:
            raise ValueError(f"train_lambda = {self.train_lambda:g} must be greater than 0")
        return self


class Target(NamedTuple):
    """A file's `bpp`, to be met within 2 %, or its picture's `psnr`, within 0.05 dB."""

    kind: Literal["bpp", "psnr"]
    wanted: float

    def miss(self, value: float) -> float:
        """How far a value is off, in units of what is allowed: at most 1 is met."""
        if self.kind == "bpp":
            return abs(value / self.wanted - 1) / 0.02
        return abs(value - self.wanted) / 0.05

    def in_words(self, value: float) -> str:
        """A value with its unit."""
        return f"{value:.4f} bpp" if self.kind == "bpp" else f"{value:.2f} dB"


class RefineConfig(ModelOfLambda):
    """What `train_flexible_inference.py` reads."""

    cycle_length: Count = 1
    print_freq: Count = 100
    batch_size: Count = 1
    image_size: Count = 256
    seed: Index = 0
    crop_seed: Index = 0
    save_name: str = Field(pattern=SAVE_NAME)
    pretrain: UserPath = Field(min_length=1)
    path_train: TrainPath = TrainPath()
    tot_batches: Count = 24
    images: Count | None = None
    tot_inference_iterations: Count = 2000
    optimizer: Optimizer = Optimizer()
    improving_methods: dict[str, bool] = {}
    dev_options: DevOptions
    polish_passes: Index = 0
    early_stop: EarlyStop | None = None
    max_seconds: Annotated[float, Field(gt=0, le=1e9)] | None = None
    eval_freq: Count = 50
    device: str = "auto"
    output_dir: UserPath = Field("results", min_length=1)
    num_workers: Index = 0
    resume: bool = False
    tracker: Tracker | None = None
    save_bitstreams: bool = False
    coder_scales: bool = False
    target_bpp: Positive | None = None
    target_psnr: Positive | None = None
    max_memory_gb: Positive | None = None
    precision: Literal["float32", "bfloat16"] = "float32"

    @property
    def image_count(self) -> int:
        """How many images are refined at most."""
        return self.images or self.tot_batches * self.batch_size

    @property
    def images_at_once(self) -> int:
        """How many images of one size are refined together; LBFGS and targets take one."""
        alone = self.optimizer.name == "LBFGS" or self.target is not None
        return 1 if alone else self.batch_size

    @property
    def lmbda(self) -> float:
        """The lambda of the refinement's loss; with a target, the first that is tried."""
        return self.dev_options.inference_lambda or self.train_lambda

    @property
    def method(self) -> str:
        """The one rounding method that is on: dev_options' before the top level's."""
        return (_true_in(self.dev_options.improving_methods) or _true_in(self.improving_methods))[0]

    @property
    def overruled_methods(self) -> list[str]:
        """Methods that are true at the top level without effect, for dev_options has one."""
        return (
            _true_in(self.improving_methods) if _true_in(self.dev_options.improving_methods) else []
        )

    @property
    def target(self) -> Target | None:
        """What every image's file must meet, if the config asks for it."""
        if self.target_bpp is not None:
            return Target("bpp", self.target_bpp)
        return None if self.target_psnr is None else Target("psnr", self.target_psnr)

    @property
    def writes_files(self) -> bool:
        """Whether refined images become files; a target is always met by one."""
        return self.save_bitstreams or self.target is not None

    @model_validator(mode="after")
    def _one_target(self) -> "RefineConfig":
        if self.target_bpp is not None and self.target_psnr is not None:
            raise ValueError("target_bpp and target_psnr are both set: give only one")
        if self.target is not None and self.max_seconds is not None:
            raise ValueError(
                f"max_seconds and target_{self.target.kind} are both set: give only one, for a "
                "target takes as many runs as it needs"
            )
        return self

    def lr_at(self, step: float) -> float:
        """The learning rate of optimisation step `step` (0 is the first)."""
        if self.dev_options.custom_lr is not None:
            return self.dev_options.custom_lr.at(step)
        return self.optimizer.lr_at(step, self.tot_inference_iterations)

    @model_validator(mode="after")
    def _one_lr_schedule(self) -> "RefineConfig":
        if self.dev_options.custom_lr is not None and self.optimizer.schedule != "constant":
            raise ValueError(
                f"dev_options.custom_lr is set and optimizer.schedule is "
                f"{self.optimizer.schedule}: only one may set the learning rate"
            )
        return self

    @model_validator(mode="after")
    def _one_method(self) -> "RefineConfig":
        dev, top = _true_in(self.dev_options.improving_methods), _true_in(self.improving_methods)
        for place, chosen in (("dev_options.improving_methods", dev), ("improving_methods", top)):
            if len(chosen) > 1:
                raise ValueError(f"{place}: {' and '.join(chosen)} are true: only one may be")
        if not dev and not top:
            raise ValueError(
                "improving_methods: none is true here or in dev_options: set one method true"
            )
        return self


def _true_in(flags: dict[str, bool]) -> list[str]:
    return [name for name, on in flags.items() if on]


class LearningRate(Section):
    """Linear warm-up to `base` over warmup_step steps; times `decay` every decay_interval steps.

    clip_grad bounds each gradient's absolute value, 0 does not. curl_lr is the current rate in the
    published files: `at` computes it, so it has no effect.
    """

    base: Positive = 1e-4
    curl_lr: NonNegative | None = None
    clip_grad: NonNegative = 1.0
    decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    decay_interval: Count = 1_000_000
    warmup_step: Index = 1000

    def at(self, step: int) -> float:
        """The learning rate of step `step` (0 is the first)."""
        warm = min(1.0, (step + 1) / max(self.warmup_step, 1))
        return self.base * warm * self.decay ** (step // self.decay_interval)


class PretrainPaths(Section):
    """Training data: tfrecords of ImageNet; tensorflow-datasets' folder of `clic`, "" its own."""

    train_clic: UserPath = ""
    train_imagenet: UserPath = ""


class PretrainConfig(ModelOfLambda):
    """What `train.py` reads."""

    tot_iterations: Count = 2_000_000
    lr: LearningRate = LearningRate()
    cycle_length: Count = 4
    batch_size: Count = 32
    print_freq: Count = 1000
    save_model_freq: Count = 50_000
    image_size: Annotated[int, Field(ge=64, multiple_of=64)] = 256
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    test: bool = False
    save_name: str = Field(pattern=SAVE_NAME)
    pretrain: UserPath = ""
    train_clic_imagenet: bool = True
    path_train: PretrainPaths = PretrainPaths()
    path_test_data: UserPath = ""
    train_folder: UserPath = ""
    optimizer: Literal["adam", "soap"] = "adam"
    aux_lr: Positive = 1e-3
    precision: Literal["float32", "bfloat16"] = "float32"
    device: str = "auto"
    num_workers: Index = 0
    keep_checkpoints: Count = 5
    output_dir: UserPath = Field("checkpoints", min_length=1)
    resume: bool = False
    tracker: Tracker | None = None

    @property
    def network_channels(self) -> Channels:
        """`channels`, or those that the published rule gives for train_lambda."""
        return self.channels or channels_of_lambda(self.train_lambda)

    @model_validator(mode="after")
    def _has_data(self) -> "PretrainConfig":
        if self.test and not self.path_test_data:
            raise ValueError("test is true, but path_test_data names no images to test on")
        if not self.test and not (self.train_folder or self.path_train.train_imagenet):
            raise ValueError(
                "no training data: name tfrecords in path_train.train_imagenet "
                "or a folder of images in train_folder"
            )
        return self


ShortName = Annotated[str, Field(pattern=r"^\S(.{0,60}\S)?$")]


def _refuse_what_a_comparison_sets(changes: dict[str, Any]) -> dict[str, Any]:
    places = {
        "train_lambda": "models", "pretrain": "models", "dev_options.inference_lambda": "models",
        "seed": "seeds", "device": "device", "save_name": "save_name", "output_dir": "output_dir",
        "tot_batches": "images", "images": "images",
        **{f"dev_options.{name}": "data_set" for name in DATA_SETS},
    }  # fmt: skip
    for key in changes.keys() & places.keys():
        raise ValueError(f"{key} is for the comparison to say: {places[key]}")
    return changes


Changes = Annotated[dict[str, Any], AfterValidator(_refuse_what_a_comparison_sets)]


class ComparedMethod(Section):
    """A refinement config, and what to change in it: `{"optimizer.lr": 0.01}`."""

    config: UserPath
    set: Changes = {}


class ComparedModel(Section):
    """A checkpoint, and the lambda of the refinement where it is not the checkpoint's own."""

    pretrain: UserPath = Field(min_length=1)
    train_lambda: Positive
    inference_lambda: Positive | None = None
    name: ShortName | None = None

    @property
    def checkpoint(self) -> str:
        """What tells the checkpoint from others, e.g. `lambda 0.01`."""
        return self.name or f"lambda {self.train_lambda:g}"

    @property
    def label(self) -> str:
        """What tells it from others, e.g. `lambda 0.01` or `lambda 0.01 at 0.005`."""
        at = "" if self.inference_lambda is None else f" at {self.inference_lambda:g}"
        return f"{self.checkpoint}{at}"


Codec = Literal["JPEG", "JPEG 2000", "WebP", "AVIF"]


class CompareConfig(Section):
    """What `compare.py` reads: every method with every model and seed over one image set."""

    save_name: str = Field(pattern=SAVE_NAME)
    output_dir: UserPath = Field("results", min_length=1)
    data_set: Literal["kodak", "tecnick", "pathology", "clic", "folder", "sample"] = "sample"
    path: UserPath | None = None
    images: Count = 24
    methods: dict[ShortName, ComparedMethod] = Field(min_length=1)
    models: list[ComparedModel] = Field(min_length=1)
    set: Changes = {}
    seeds: list[Annotated[int, Field(ge=0, lt=2**31)]] = Field([0], min_length=1)
    anchor: str = "base"
    groups: dict[ShortName, list[str]] = {}
    codecs: list[Codec] = []
    published: dict[ShortName, UserPath] = {}
    shown: Index = 2
    device: str = "auto"
    quick: bool = False
    quick_images: Count = 2
    quick_steps: Count = 100

    @property
    def name(self) -> str:
        """The comparison's folder below `output_dir`."""
        return f"{self.save_name}_quick" if self.quick else self.save_name

    @property
    def image_set(self) -> str:
        """The data set that is refined."""
        return "sample" if self.quick else self.data_set

    @property
    def used_seeds(self) -> list[int]:
        """Seeds, after `quick`."""
        return self.seeds[:1] if self.quick else self.seeds

    @model_validator(mode="after")
    def _is_consistent(self) -> "CompareConfig":
        known = ["base", *self.methods]
        if self.anchor not in known:
            raise ValueError(f"anchor = {self.anchor!r}: must be one of {', '.join(known)}")
        for name in self.methods.keys() & {"base", *get_args(Codec)}:
            raise ValueError(f"methods.{name}: is in every comparison or a codec; another name")
        for name in self.published.keys() & {*known, *get_args(Codec)}:
            raise ValueError(f"published.{name}: is a method's or a codec's name; another one")
        if self.data_set not in ("sample", "clic") and self.path is None:
            raise ValueError(f"path is missing: the folder of {self.data_set}")
        if self.data_set == "sample" and self.path is not None:
            raise ValueError("path is set, but data_set sample has none: set data_set, to folder?")
        labels = [folder_name(model.label) for model in self.models]
        if len({*labels}) < len(labels):
            raise ValueError("models: two have the same lambdas: give each a name of its own")
        if len({*self.seeds}) < len(self.seeds):
            raise ValueError("seeds: one stands twice")
        if len({folder_name(method) for method in self.methods}) < len(self.methods):
            raise ValueError("methods: names must differ in more than punctuation")
        return self


def folder_name(name: str) -> str:
    """A short name as part of a path: letters, digits, blanks, . and -."""
    return re.sub(r"[^\w.-]+", " ", name).strip(" .") or "_"


# --- reading --------------------------------------------------------------------------------------

Schema = TypeVar("Schema", bound=BaseModel)


def load_config(
    path: str | Path,
    schema: type[Schema],
    overrides: Sequence[str] = (),
    source: str | None = None,
) -> Schema:
    """Read and check a JSON config; `overrides` are `key.sub=value` strings applied first.

    Errors begin with `source`, by default the path and the overrides.

    Raises:
        InputError: no such file, not JSON, or not what `schema` asks for.
    """
    values = read_json_object(path)
    for override in overrides:
        _apply_override(values, override)
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        problems = "; ".join(_describe(problem, schema) for problem in error.errors())
        if source is None:
            source = f"{path} with --set {' '.join(overrides)}" if overrides else str(path)
        raise InputError(f"{source}: {problems}") from None


def read_json_object(path: str | Path) -> dict[str, Any]:
    """The one JSON object in a file.

    Raises:
        InputError: no such file, not JSON, a key given twice, or not an object.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"config {path}: {error.strerror}") from None
    try:
        # Given bytes, it finds out which Unicode they are, mark and all.
        values = json.loads(data, object_pairs_hook=_refuse_duplicates)
    except UnicodeDecodeError:
        raise InputError(f"config {path}: not a text file; a JSON object is wanted") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"config {path}: not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"config {path}: holds no JSON object ({{...}})")
    return values


def resolved(config: BaseModel) -> dict[str, Any]:
    """The config with every default filled in, as JSON values that `load_config` reads back."""
    return config.model_dump(mode="json", by_alias=True)


def parse_command_line(
    schema: type[Schema],
    description: str,
    argv: Sequence[str] | None = None,
    flags: dict[str, str] | None = None,
) -> Schema:
    """The checked config of `--config JSON [--set key.sub=value ...]`.

    Args:
        flags: `--name` sets the config's key `name` to true; what each is for.

    Raises:
        InputError: see `load_config`. SystemExit 2 for a wrong command line, as argparse does.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--config", required=True, type=user_path, metavar="JSON", help="the config file"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY.SUB=VALUE",
        help="override one key of the config; VALUE is JSON, or else a string "
        "(a number that is meant as a string needs JSON's quotes)",
    )
    parser.add_argument(
        "--load_json",
        choices=("true", "True"),
        help="accepted for the published command lines; the config is always read",
    )
    for name, purpose in (flags or {}).items():
        parser.add_argument(f"--{name}", action="store_true", help=purpose)
    arguments = parser.parse_args(argv)
    switched_on = [f"{name}=true" for name in flags or {} if getattr(arguments, name)]
    return load_config(arguments.config, schema, [*arguments.set, *switched_on])


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return values


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(f"--set {override}: must read key.sub=value")
    *path, last = key.split(".")
    for depth, part in enumerate(path):
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            raise InputError(f"--set {override}: {'.'.join(path[: depth + 1])} holds no keys")
    try:
        values[last] = json.loads(text)
    except ValueError:
        values[last] = text


def _describe(problem: Any, schema: type[BaseModel]) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = _keys(_section(schema, problem["loc"][:-1]))
        close = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known)}"
        return f"unknown key {key!r}: {hint}"
    if problem["type"] == "missing":
        return f"the key {key!r} is missing"
    message = problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if problem["type"] == "value_error":
        return f"{key}: {message}" if key else message
    if problem["type"] == "model_type":
        keys = ", ".join(_keys(_section(schema, problem["loc"])))
        message = f"should be an object {{...}} with keys of {keys}"
    if problem["type"] == "bool_type":
        message = "should be true or false"
    if problem["type"] == "string_type":
        message = "should be a string (after --set: '\"...\"' with both quotes)"
    if problem["loc"] == ("save_name",) and problem["type"] == "string_pattern_mismatch":
        message = "should be a name, or names joined by /, of letters, digits, blank, . _ and -"
    return f"{key} = {json.dumps(problem['input'], default=str)}: {message}"


def _section(schema: type[BaseModel], loc: Sequence[Any]) -> type[BaseModel]:
    """The model of the JSON object at `loc`."""
    for part in loc:
        fields = {field.alias or name: field for name, field in schema.model_fields.items()}
        if part in fields:
            annotation = fields[part].annotation
            kinds = [kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type)]
            schema = next((kind for kind in kinds if issubclass(kind, BaseModel)), schema)
    return schema


def _keys(schema: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in schema.model_fields.items()]


def exits_with_one_line(main: Callable[..., int]) -> Callable[..., int]:
    """Decorator of a script's `main`: an `InputError` or a failing disk is one line and code 2.

    An interrupt is code 130: what was computed is on disk already.
    """

    @functools.wraps(main)
    def guarded(argv: Sequence[str] | None = None) -> int:
        # Names may hold what the console's encoding has no letters for.
        with suppress(AttributeError):
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            return main(argv)
        except InputError as error:
            print(f"error: {printable(str(error))}", file=sys.stderr)
        except BrokenPipeError:  # whoever read our output has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 128 + signal.SIGPIPE
        except OSError as error:
            print(f"error: {printable(reason_of(error))}", file=sys.stderr)
        except KeyboardInterrupt:
            print("interrupted: what was finished is kept", file=sys.stderr)
            return 130
        return 2

    return guarded


def reason_of(error: OSError) -> str:
    """What failed at which file, as one line says it."""
    name = f"{error.filename}: " if error.filename else ""
    return f"{name}{error.strerror or error}"
