"""The schema of the config of `train_flexible_inference.py`."""

import math
import sys
from collections.abc import Sequence
from pathlib import PurePath
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, model_validator

from schemas.adapt import Adapt
from schemas.base import (
    MS_SSIM_LAMBDAS,
    SAVE_NAME,
    Count,
    Index,
    ModelOfLambda,
    NonNegative,
    Positive,
    Precision,
    ScriptConfig,
    Section,
    Switch,
    Tracker,
    UserPath,
    channels_of_lambda,
    check_lambda,
)

DATA_SETS = ("kodak", "tecnick", "pathology", "clic", "folder", "sample")


class Optimizer(Section):
    """The optimizer of the latents."""

    name: Literal["adam", "sgd", "LBFGS"] = "adam"
    """The optimizer's name. LBFGS refines one image at a time."""
    lr: Positive = 0.005
    """The learning rate, unless `dev_options.custom_lr` sets it."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """The momentum of `sgd`; the other optimizers ignore it."""
    schedule: Literal["constant", "cosine"] = "constant"
    """+ The schedule of the learning rate. With `cosine` the rate falls to 0 over the run. `cosine`
    and `dev_options.custom_lr` cannot be used together."""

    def lr_at(self, step: float, steps: int) -> float:
        """The learning rate at step `step` (0 is the first) of a run of `steps` steps."""
        if self.schedule == "constant":
            return self.lr
        return self.lr * (1 + math.cos(math.pi * step / steps)) / 2


class CustomLr(Section):
    """A learning rate in three parts: flat, linear, flat."""

    start_iters: Index
    """The number of steps that have the rate `start_lr`."""
    warmup_steps: Index
    """The number of steps over which the rate then changes linearly to `end_lr`."""
    start_lr: Positive
    """The learning rate at the start."""
    end_lr: NonNegative
    """The learning rate at the end."""

    def at(self, step: float) -> float:
        """The learning rate at step `step` (0 is the first)."""
        if step < self.start_iters:
            return self.start_lr
        if step >= self.start_iters + self.warmup_steps:
            return self.end_lr
        progress = (step - self.start_iters) / self.warmup_steps
        return self.start_lr + (self.end_lr - self.start_lr) * progress


class EarlyStop(Section):
    """When to end the descent of an image before its last step."""

    evaluations: Annotated[int, Field(ge=2)] = 5
    """+ The number of evaluations in a row that are compared. They are `eval_freq` steps apart."""
    tolerance: Positive = 1e-4
    """+ The descent ends when the true losses of these evaluations differ by less than this
    fraction of the last loss."""

    def settled(self, losses: Sequence[float]) -> bool:
        """Whether the last of these true losses, oldest first, differ by less than `tolerance`."""
        last = losses[-self.evaluations :]
        return len(last) == self.evaluations and max(last) - min(last) < self.tolerance * last[-1]


class SgaLogitsParams(Section):
    """The function of `sga_logits` or `sga_logits_3c`, and the upper bound of the temperature."""

    logits: str | None = None
    """The function that scores the candidates. `sga_logits` has `atanh`, `cosx`, `expxlogx`, `logx`
    and `ssl`; `sga_logits_3c` has `absx`, `log_absx_factor_pow`, `log_cosx_factor_pow`,
    `log_cosx_n` and `log_ssl_a_factor_pow`. Other methods ignore it."""
    ub: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The upper bound of the temperature. `sga` and `danneal` ignore it."""


class TestPaths(Section):
    """The paths of the data sets. Only the path of the data set that is true is read."""

    kodak: UserPath | None = None
    """The folder of the Kodak images."""
    tecnick: UserPath | None = None
    """The folder of TESTIMAGES, or its subfolder RGB_OR_1200x1200."""
    pathology: UserPath | None = None
    """A folder of TIFF files. One crop is taken from each, see `image_size`."""
    clic: UserPath | None = None
    """+ A folder of image files, or a folder in which tensorflow-datasets has prepared CLIC. null:
    tensorflow-datasets' default folder, to which it downloads CLIC on first use."""
    folder: UserPath | None = None
    """+ Your own photos: a folder, which is searched with its subfolders, or one image file.
    `--images PATH` on the command line sets it, and sets `dev_options.folder` to true."""


class WeightPaths(Section):
    """Maps that say where distortion counts more, for each data set. Only the one of the data set
    that is true is read. A map is a grey picture: white counts most, black not at all. Give a
    folder of maps that are named as the images, one map for all, or `auto`: faces, or else what
    stands out. Weights are divided by their mean, so that lambda keeps its meaning. `--roi PATH` or
    `--roi auto` on the command line sets the path of the data set. null: all pixels count alike."""

    kodak: UserPath | None = None
    """+ For the Kodak images."""
    tecnick: UserPath | None = None
    """+ For the Tecnick images."""
    pathology: UserPath | None = None
    """+ For pathology images; a map is cropped as its image is."""
    clic: UserPath | None = None
    """+ For CLIC; a map of tensorflow-datasets' image 7 is named clic_test_0007."""
    folder: UserPath | None = None
    """+ For your own photos."""
    sample: UserPath | None = None
    """+ For the sample photos."""


class DevOptions(Section):
    """The data set, the rounding method and its hyper-parameters."""

    kodak: bool = False
    """Refine the Kodak images. Exactly one of the six data sets must be true."""
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
    centre_crop: Count | None = None
    """+ Refine only the square of this side in the centre of each image, in pixels. Images that are
    smaller are skipped. null: whole images. Pathology images have crops of their own."""
    path_weights: WeightPaths = WeightPaths()
    region_strength: Annotated[float, Field(ge=0, le=1)] = 1.0
    """+ How much of the maps in `path_weights` enters the weights: 1 - s + s * map / mean. 0: all
    pixels count alike, and maps only measure the quality inside and outside."""
    improving_methods: dict[str, bool] = Field({})
    """The rounding methods by name; at most one is true. It wins over the `improving_methods` of
    the top level."""
    temp_rate: NonNegative = 1e-3
    """The rate in the formulas of `temp_schedule`."""
    temp_schedule: str = "exp"
    """The schedule of the temperature at step t. The temperature is clipped to [0, ub]; ub is in
    `sga_logits_params`. `exp`: exp(-rate t). `exp0`: ub exp(-rate (t - 700)). Two schedules of ours
    depend on the fraction of the run: `exp_of_run`, exp(-rate t / steps), for which 2 is a good
    rate, and `linear`, ub (1 - t / steps), which has no rate. You can also add your own."""
    sga_logits_params: SgaLogitsParams = SgaLogitsParams()
    gnoise_sigma: Positive | None = None
    """The standard deviation of the method `gnoise`. null: the method's default. Other methods
    ignore it."""
    scale_factor: Positive | None = None
    """The scale factor a of the SSL functions and of `expxlogx`. null: the function's default.
    Other methods ignore it."""
    power_3c: Positive | None = Field(None, alias="3c_power")
    """The power of three-class functions. null: the function's default. Other methods ignore
    it."""
    factor_3c: Positive | None = Field(None, alias="3c_factor")
    """The factor of three-class functions. null: the function's default. Other methods ignore
    it."""
    rounding_params: dict[str, bool | int | float | str] = Field({})
    """+ Hyper-parameters of the method by name. A name that the method does not have is an
    error."""
    augmented_loss: bool = False
    """Use the mean of relaxed and true loss as the loss of each step. The true loss has no
    gradient, so this halves the gradient."""
    save_final: bool = False
    """Save pictures: original, base, refined, and those after step 1, step 500 and the last step.
    The last one is taken before the polish. It is left out if `early_stop` ended the descent."""
    inference_lambda: Positive | None = None
    """The lambda of the loss that refinement minimises. null: `train_lambda`."""
    custom_lr: CustomLr | None = None
    """A learning rate in three parts: `start_lr` for `start_iters` steps, then linear to `end_lr`
    over `warmup_steps` steps, then `end_lr`. null: `optimizer` sets the rate."""

    @property
    def data_set(self) -> str:
        """The name of the one data set that is true."""
        return next(name for name in DATA_SETS if getattr(self, name))

    @property
    def maps(self) -> str | None:
        """Where the maps of the data set are: a path, `auto`, or None."""
        path: str | None = getattr(self.path_weights, self.data_set)
        return path

    @property
    def published_hyper_parameters(self) -> dict[str, float]:
        """The published keys of hyper-parameters that have a value, by their JSON names."""
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
        if self.pathology and self.centre_crop is not None:
            raise ValueError("centre_crop: pathology images have the crops of image_size; use null")
        return self


class TrainPath(Section):
    """No effect: kept so that published files load. Refinement reads no training data."""

    train_imagenet: str | None = ""
    """No effect: kept so that published files load."""


class Target(NamedTuple):
    """The wanted `bpp` of a file, within 2 %, or quality of its picture, within 0.05 dB.

    The quality is `psnr` or `ms_ssim_db`, both in dB.
    """

    kind: Literal["bpp", "psnr", "ms_ssim_db"]
    wanted: float

    def miss(self, value: float) -> float:
        """The distance of a value from the target, divided by the allowed distance: met up to 1."""
        if self.kind == "bpp":
            return abs(value / self.wanted - 1) / 0.02
        return abs(value - self.wanted) / 0.05

    def in_words(self, value: float) -> str:
        """A value with its unit."""
        if self.kind == "bpp":
            return f"{value:.4f} bpp"
        return f"{'MS-SSIM ' if self.kind == 'ms_ssim_db' else ''}{value:.2f} dB"


class RefineConfig(ModelOfLambda, ScriptConfig):
    """The config of `train_flexible_inference.py`."""

    cycle_length: Count = 1
    """No effect: kept so that published files load."""
    print_freq: Count = 100
    """The steps between two lines of the log if the output is no terminal."""
    batch_size: Count = 1
    """The number of consecutive images of equal size that are refined together if they fit into
    memory. LBFGS and targets refine one image at a time. The number of images depends on it too,
    see `tot_batches`."""
    image_size: Count = 256
    """The side of the crops of pathology images, in pixels."""
    seed: Index = 0
    """The seed of the noise. An image's noise depends only on the seed and the image's name."""
    crop_seed: Index = 0
    """+ The seed of the places of the crops of pathology images."""
    save_name: str = Field(pattern=SAVE_NAME)
    """The run's folder below `output_dir`: a name, or names joined by /. Names have letters,
    digits, blanks, `.`, `_` and `-`."""
    pretrain: UserPath = Field(min_length=1)
    """The trained model: a file of torch.save or safetensors, or a model of CompressAI's zoo, as
    `zoo:mbt2018-mean:4`, or `zoo:mbt2018-mean:4:ms-ssim` for one trained for MS-SSIM. The file must
    have CompressAI's names of weights, old or new, below any keys and with any prefix. No code in
    it is run. Averaged weights (`ema`) are used only if there are no others."""
    path_train: TrainPath = TrainPath()
    tot_batches: Count = 24
    """The largest number of images is `tot_batches` * `batch_size`, unless `images` is set."""
    images: Index | None = None
    """+ The largest number of images to refine; the first ones by name are taken. null:
    `tot_batches` * `batch_size`. 0: all. `--images PATH` on the command line also means all, unless
    the file or a `--set` has this key."""
    tot_inference_iterations: Count = 2000
    """The steps of gradient descent for each image."""
    optimizer: Optimizer = Optimizer()
    improving_methods: dict[str, bool] = Field({})
    """The rounding methods by name; at most one is true. A true one in `dev_options` wins over it.
    The methods: `sga_logits_3c`, `sga_logits`, `sga`, `danneal`, `ste`, `unoise`, `temp_ste`,
    `temp_uste`, `temp_unoise`, `temp_gnoise`, `gnoise`, `soft_round_unoise`, `soft_round_gnoise`,
    `soft_round_knoise`, or one of your own."""
    dev_options: DevOptions
    polish_passes: Index = 0
    """+ The passes of the polish after the last step. The polish moves symbols of y by one to lower
    the loss. A pass takes the time of a step. 16 probes before the first pass take as long as 16
    steps."""
    adapt: Adapt | None = None
    """+ What the decoder is told beside the latents. null: nothing."""
    early_stop: EarlyStop | None = None
    """+ End the descent of an image early, when its true loss does not change any more. The polish
    follows. `{}`: with the defaults below. null: take all steps."""
    max_seconds: Annotated[float, Field(gt=0, le=1e9)] | None = None
    """+ The time limit for each image in seconds. If the machine is too slow for all steps, the
    schedule advances by more than one step at a time. The time includes encoding, evaluations and
    polish, but not the writing of files. Results then depend on the machine's speed. It cannot be
    used with a target. null: no limit."""
    eval_freq: Count = 50
    """+ The steps between two evaluations of the true loss. The best evaluated step is kept."""
    device: str = "auto"
    """+ `auto`, `cpu`, `cuda` or `cuda:N`. `auto` takes a GPU if there is one."""
    output_dir: UserPath = Field("results", min_length=1)
    """+ The folder of all runs."""
    num_workers: Index = 0
    """+ The number of processes that read images ahead. 0: the main process reads them."""
    resume: bool = False
    """+ Resume the run in the folder. Another config or other weights are refused."""
    tracker: Tracker | None = None
    """+ A tracker that also gets the metrics. null: none."""
    save_bitstreams: bool = False
    """+ Write each refined image as a file that `codec.py decompress` reads."""
    coder_scales: bool = False
    """+ Compute rates with the entropy coder's scales: each scale is rounded up to the next of 64
    values."""
    target_bpp: Positive | None = None
    """+ The wanted size of each image's file in bits per pixel, within 2 %. The lambda is searched
    for each image. Only one target can be set. null: no such target."""
    target_psnr: Positive | None = None
    """+ The wanted PSNR of each image's decoded file in dB, within 0.05 dB. The lambda is searched
    for each image. Only one target can be set. null: no such target."""
    target_ms_ssim_db: Positive | None = None
    """+ The wanted MS-SSIM of each image's decoded file in dB, -10 log10(1 - MS-SSIM), within
    0.05 dB. The lambda is searched for each image. Only one target can be set. null: no such
    target."""
    max_memory_gb: Positive | None = None
    """+ The memory that the process may use, in GB. Pictures that need more are refined in tiles.
    null: 0.75 of the machine's memory, or 0.9 of the GPU's, divided by the number of processes
    there."""
    precision: Precision = "float32"
    """+ The type in which the networks compute the steps and the polish. `auto`: bfloat16 if this
    machine is faster with it, else float32. Evaluations, losses, rates and files are in float32."""
    cuda_graphs: Switch = False
    """+ Let the GPU repeat the kernels of a step without the processor. Needs a GPU, and takes up
    to twice the memory. `auto`: where there is a GPU and the rounding allows it."""

    @staticmethod
    def keys_for_images(path: str) -> dict[str, Any]:
        """The keys that `--images PATH` sets: this folder or file is the data set."""
        return {
            **{f"dev_options.{name}": name == "folder" for name in DATA_SETS},
            "dev_options.path_test.folder": path,
        }

    def keys_for_regions(self, path: str) -> dict[str, Any]:
        """The keys that `--roi PATH` sets: the maps of the data set that is true."""
        return {f"dev_options.path_weights.{self.dev_options.data_set}": path}

    @property
    def takes_all_images(self) -> bool:
        """Whether all images of the data set are refined."""
        return self.images == 0

    @property
    def image_count(self) -> int:
        """The largest number of images to refine."""
        if self.takes_all_images:
            return sys.maxsize
        return self.images or self.tot_batches * self.batch_size

    @property
    def images_at_once(self) -> int:
        """The largest number of images that are refined together."""
        alone = self.optimizer.name == "LBFGS" or self.target is not None or self.adapt is not None
        return 1 if alone else self.batch_size

    @property
    def lmbda(self) -> float:
        """The lambda of the loss that refinement minimises; a target searches its own."""
        return self.dev_options.inference_lambda or self.train_lambda

    @property
    def usual_lambda(self) -> float:
        """A lambda around which a target is searched: the model's, if it is for the same loss."""
        same = (self.train_lambda < MS_SSIM_LAMBDAS[0]) == (self.objective == "mse")
        return self.train_lambda if same else self.lmbda

    @property
    def method(self) -> str:
        """The rounding method that is true; one in `dev_options` wins."""
        return (_true_in(self.dev_options.improving_methods) or _true_in(self.improving_methods))[0]

    @property
    def overruled_methods(self) -> list[str]:
        """The methods of the top level that are true but have no effect: `dev_options` has one."""
        return (
            _true_in(self.improving_methods) if _true_in(self.dev_options.improving_methods) else []
        )

    @property
    def target(self) -> Target | None:
        """The target of every image's file; None if the config sets none."""
        return next(iter(self._targets), None)

    @property
    def _targets(self) -> list[Target]:
        """All targets that the config sets."""
        wanted: dict[Literal["bpp", "psnr", "ms_ssim_db"], float | None] = {
            "bpp": self.target_bpp,
            "psnr": self.target_psnr,
            "ms_ssim_db": self.target_ms_ssim_db,
        }
        return [Target(kind, value) for kind, value in wanted.items() if value is not None]

    @property
    def weighted(self) -> str | None:
        """Which maps weight the distortion, in words; None: none do."""
        maps, strength = self.dev_options.maps, self.dev_options.region_strength
        if maps is None or strength == 0:
            return None
        name = PurePath(maps).name
        return name if strength == 1 else f"{strength:g} of {name}"

    @property
    def writes_files(self) -> bool:
        """Whether refined images are written as files; a target implies it."""
        return self.save_bitstreams or self.target is not None

    @model_validator(mode="after")
    def _one_target(self) -> "RefineConfig":
        if len(self._targets) > 1:
            names = " and ".join(f"target_{target.kind}" for target in self._targets)
            raise ValueError(f"{names} are set: give only one")
        if self.target is not None and self.max_seconds is not None:
            raise ValueError(
                f"max_seconds and target_{self.target.kind} are both set: give only one, for a "
                "target takes as many runs as it needs"
            )
        return self

    def _check_channel_rule(self) -> None:
        """Refinement takes the channels from the weights, so the model may be for either loss."""
        own = "ms-ssim" if self.train_lambda >= MS_SSIM_LAMBDAS[0] else "mse"
        channels_of_lambda(self.train_lambda, own)

    @model_validator(mode="after")
    def _fits_the_objective(self) -> "RefineConfig":
        check_lambda(self.objective, self.lmbda, "dev_options.inference_lambda")
        if self.objective == "ms-ssim" and self.polish_passes:
            raise ValueError(no_polish(self.polish_passes, self.objective))
        return self

    def lr_at(self, step: float) -> float:
        """The learning rate at step `step` (0 is the first)."""
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


def no_polish(passes: int, objective: str) -> str:
    """Why there is no polish for an objective."""
    return (
        f'polish_passes = {passes}: the polish is for the objective "mse"; with "{objective}" set '
        "it to 0"
    )


def _true_in(flags: dict[str, bool]) -> list[str]:
    return [name for name, on in flags.items() if on]
