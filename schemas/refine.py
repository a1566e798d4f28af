"""What `train_flexible_inference.py` reads."""

import math
import sys
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, model_validator

from schemas.base import (
    SAVE_NAME,
    Count,
    Index,
    ModelOfLambda,
    NonNegative,
    Positive,
    Precision,
    ScriptConfig,
    Section,
    Tracker,
    UserPath,
)

DATA_SETS = ("kodak", "tecnick", "pathology", "clic", "folder", "sample")


class Optimizer(Section):
    """The optimizer of the latents."""

    name: Literal["adam", "sgd", "LBFGS"] = "adam"
    """Which optimizer. LBFGS refines one image at a time."""
    lr: Positive = 0.005
    """The learning rate, unless `dev_options.custom_lr` sets it."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """The momentum of `sgd`; the others do not read it."""
    schedule: Literal["constant", "cosine"] = "constant"
    """+ The schedule of the learning rate: with `cosine` it falls to 0 over the run. `cosine` and
    `dev_options.custom_lr` exclude each other."""

    def lr_at(self, step: float, steps: int) -> float:
        """The learning rate of step `step` of `steps`; `cosine` falls to 0 at the end."""
        if self.schedule == "constant":
            return self.lr
        return self.lr * (1 + math.cos(math.pi * step / steps)) / 2


class CustomLr(Section):
    """A learning rate in three parts: flat, linear, flat."""

    start_iters: Index
    """How many steps have the rate `start_lr`."""
    warmup_steps: Index
    """How many steps the linear change from `start_lr` to `end_lr` then takes."""
    start_lr: Positive
    """The learning rate of the first steps."""
    end_lr: NonNegative
    """The learning rate of the last steps."""

    def at(self, step: float) -> float:
        """The learning rate of optimisation step `step` (0 is the first)."""
        if step < self.start_iters:
            return self.start_lr
        if step >= self.start_iters + self.warmup_steps:
            return self.end_lr
        progress = (step - self.start_iters) / self.warmup_steps
        return self.start_lr + (self.end_lr - self.start_lr) * progress


class EarlyStop(Section):
    """When the descent of an image ends before its last step."""

    evaluations: Annotated[int, Field(ge=2)] = 5
    """+ How many evaluations in a row are looked at; they are `eval_freq` steps apart."""
    tolerance: Positive = 1e-4
    """+ The descent ends when the true losses of these evaluations differ by less than this
    fraction of the last one."""

    def settled(self, losses: Sequence[float]) -> bool:
        """Whether these true losses, the oldest first, have come to rest."""
        last = losses[-self.evaluations :]
        return len(last) == self.evaluations and max(last) - min(last) < self.tolerance * last[-1]


class SgaLogitsParams(Section):
    """The function of `sga_logits` or `sga_logits_3c`, and the highest temperature."""

    logits: str | None = None
    """The function that scores the candidates. `sga_logits` has `atanh`, `cosx`, `expxlogx`, `logx`
    and `ssl`; `sga_logits_3c` has `absx`, `log_absx_factor_pow`, `log_cosx_factor_pow`,
    `log_cosx_n` and `log_ssl_a_factor_pow`. Other methods do not read it."""
    ub: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The highest temperature, of all methods but `sga` and `danneal`."""


class TestPaths(Section):
    """Where the data sets lie. Only the path of the data set that is on is read."""

    kodak: UserPath | None = None
    """Folder of the Kodak images."""
    tecnick: UserPath | None = None
    """Folder of TESTIMAGES, or its subfolder RGB_OR_1200x1200."""
    pathology: UserPath | None = None
    """Folder of TIFF files, of which crops are taken (`image_size`)."""
    clic: UserPath | None = None
    """+ Folder of image files, or a tensorflow-datasets folder that holds CLIC prepared. null:
    tensorflow-datasets' default folder, into which it downloads CLIC on first use."""
    folder: UserPath | None = None
    """+ Your own photos: a folder, searched with its subfolders, or one image file.
    `--images PATH` on the command line sets it and switches `dev_options.folder` on."""


class DevOptions(Section):
    """Data set, method and its hyper-parameters."""

    kodak: bool = False
    """Refine the Kodak images. Exactly one of the six data sets is true."""
    tecnick: bool = False
    """Refine the Tecnick images."""
    pathology: bool = False
    """Refine crops of pathology images."""
    clic: bool = False
    """+ Refine CLIC 2020's images."""
    folder: bool = False
    """+ Refine the images at `path_test.folder`."""
    sample: bool = False
    """+ Refine the four sample photos that come with scikit-image."""
    path_test: TestPaths = TestPaths()
    improving_methods: dict[str, bool] = Field({})
    """Rounding methods by name, of which at most one is true. It wins over the top level's
    `improving_methods`."""
    temp_rate: NonNegative = 1e-3
    """The rate of the temperature schedule."""
    temp_schedule: str = "exp"
    """The temperature tau at step t, clipped to [0, ub] with ub from `sga_logits_params`. `exp`:
    exp(-rate t). `exp0`: ub exp(-rate (t - 700)). Ours, by the part of the run that is over:
    `exp_of_run`, exp(-rate t / steps), for which a rate of 2 is a good one; `linear`,
    ub (1 - t / steps), without a rate. Schedules of your own count too."""
    sga_logits_params: SgaLogitsParams = SgaLogitsParams()
    gnoise_sigma: Positive | None = None
    """Standard deviation of the method `gnoise`. null: the method's own default; so with the next
    three. A method that does not have such a hyper-parameter ignores it."""
    scale_factor: Positive | None = None
    """The scale factor a of the SSL functions and of `expxlogx`. null: the function's default."""
    power_3c: Positive | None = Field(None, alias="3c_power")
    """The power of three-class functions. null: the function's default."""
    factor_3c: Positive | None = Field(None, alias="3c_factor")
    """The factor of three-class functions. null: the function's default."""
    rounding_params: dict[str, bool | int | float | str] = Field({})
    """+ Hyper-parameters of the chosen method by name, for methods that have others than the
    published ones. A name that the method does not have is refused."""
    augmented_loss: bool = False
    """Average the true loss into the loss of each step. It has no gradient, so this halves the
    gradient."""
    save_final: bool = False
    """Save pictures: original, base, refined, and those after steps 1, 500 and the last. The last
    is left out where the loss settled before, and is taken before the polish."""
    inference_lambda: Positive | None = None
    """The lambda of the refinement's loss. null: `train_lambda`."""
    custom_lr: CustomLr | None = None
    """Learning rate in three parts: `start_lr` for `start_iters` steps, linear to `end_lr` over
    `warmup_steps`, then `end_lr`. null: as `optimizer` says."""

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


class TrainPath(Section):
    """No effect: kept so that published files load. Refinement reads no training data."""

    train_imagenet: str | None = ""
    """No effect: kept so that published files load."""


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


class RefineConfig(ModelOfLambda, ScriptConfig):
    """What `train_flexible_inference.py` reads."""

    cycle_length: Count = 1
    """No effect: kept so that published files load."""
    print_freq: Count = 100
    """Steps between lines of the log, where the output is no terminal."""
    batch_size: Count = 1
    """How many consecutive images of equal size are refined together, if they fit into memory.
    LBFGS and targets take one at a time. It also counts in the number of images, see
    `tot_batches`."""
    image_size: Count = 256
    """Side of the crops that are taken of pathology images, pixels."""
    seed: Index = 0
    """Seed of the noise. An image's noise depends on the seed and the image's name only."""
    crop_seed: Index = 0
    """+ Seed of where the crops of pathology images lie."""
    save_name: str = Field(pattern=SAVE_NAME)
    """The run's folder below `output_dir`: a name, or names joined by /, of letters, digits, blank,
    `.`, `_` and `-`."""
    pretrain: UserPath = Field(min_length=1)
    """The trained model: a file of torch.save or safetensors, or a model of CompressAI's zoo,
    `zoo:mbt2018-mean:1` to `zoo:mbt2018-mean:8`. A file has the weights by CompressAI's names, old
    or new, under any keys and prefixes. No code in it is run. Averaged weights (`ema`) are taken
    only where there are no others."""
    path_train: TrainPath = TrainPath()
    tot_batches: Count = 24
    """`tot_batches` * `batch_size` is the number of images, unless `images` gives it."""
    images: Index | None = None
    """+ How many images are refined at most, the first ones by name. null: `tot_batches` *
    `batch_size`. 0: all that there are, which `--images PATH` on the command line implies unless
    the file or a `--set` has this key."""
    tot_inference_iterations: Count = 2000
    """Steps of gradient descent for each image."""
    optimizer: Optimizer = Optimizer()
    improving_methods: dict[str, bool] = Field({})
    """Rounding methods by name, of which at most one is true, unless `dev_options` has a true one:
    `sga_logits_3c`, `sga_logits`, `sga`, `danneal`, `ste`, `unoise`, `temp_ste`, `temp_uste`,
    `temp_unoise`, `temp_gnoise`, `gnoise`, `soft_round_unoise`, `soft_round_gnoise`,
    `soft_round_knoise`, or one of your own."""
    dev_options: DevOptions
    polish_passes: Index = 0
    """+ Passes of the polish after the last step: it moves single symbols of y by one where this
    lowers the loss. Each pass takes the time of a step, and 16 such times come before the first."""
    early_stop: EarlyStop | None = None
    """+ End an image's descent when its true loss has come to rest; its polish follows. `{}` takes
    the defaults below. null: every step is taken."""
    max_seconds: Annotated[float, Field(gt=0, le=1e9)] | None = None
    """+ Time for each image in seconds; the schedule moves on by more than one step at a time where
    the measured speed asks for it. Encoding, evaluations and polish are within the time, writing
    files is not. Results then depend on the machine's speed. Excludes a target. null: no limit."""
    eval_freq: Count = 50
    """+ Steps between evaluations of the true loss. The best evaluated step is kept."""
    device: str = "auto"
    """+ `auto`, `cpu`, `cuda` or `cuda:N`. `auto` takes a GPU if there is one."""
    output_dir: UserPath = Field("results", min_length=1)
    """+ The folder of all runs."""
    num_workers: Index = 0
    """+ Processes that read images ahead. 0: the main process reads them."""
    resume: bool = False
    """+ Go on with the results in the folder. Another config or other weights are refused."""
    tracker: Tracker | None = None
    """+ Also send the metrics to a tracker. null: to none."""
    save_bitstreams: bool = False
    """+ Write each refined image as a file that `codec.py decompress` reads."""
    coder_scales: bool = False
    """+ Compute rates with the scales that the entropy coder has, which are rounded up to the next
    of its 64."""
    target_bpp: Positive | None = None
    """+ The size that each image's file shall have, bits per pixel, within 2 %. The lambda is
    searched for each image. Excludes `target_psnr`. null: no such target."""
    target_psnr: Positive | None = None
    """+ The PSNR that each image's decoded file shall have, dB, within 0.05. The lambda is searched
    for each image. Excludes `target_bpp`. null: no such target."""
    max_memory_gb: Positive | None = None
    """+ The memory that the process may take, GB; larger pictures are refined in tiles. null: 0.75
    of the machine's memory, 0.9 of a GPU's, shared by the processes there."""
    precision: Precision = "float32"
    """+ With `bfloat16` g_s runs under autocast in the steps; evaluations stay in float32."""

    @staticmethod
    def keys_for_images(path: str) -> dict[str, Any]:
        """What `--images PATH` sets, by dotted key: this folder or file is the data set."""
        return {
            **{f"dev_options.{name}": name == "folder" for name in DATA_SETS},
            "dev_options.path_test.folder": path,
        }

    @property
    def takes_all_images(self) -> bool:
        """Whether no image of the data set is left out."""
        return self.images == 0

    @property
    def image_count(self) -> int:
        """How many images are refined at most."""
        if self.takes_all_images:
            return sys.maxsize
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
