"""The schema of the config of `train.py`."""

import math
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from schemas.base import (
    MS_SSIM_MIN_SIDE,
    SAVE_NAME,
    Channels,
    Count,
    Index,
    ModelOfLambda,
    NonNegative,
    Positive,
    Precision,
    ScriptConfig,
    Section,
    TorchSeed,
    Tracker,
    UserPath,
    channels_of_lambda,
    check_lambda,
)


class LearningRate(Section):
    """The learning rate at each step, and the bound of the gradients."""

    base: Positive = 1e-4
    """The learning rate after the warm-up."""
    curl_lr: NonNegative | None = None
    """No effect: it is in published files, and is kept so that they load."""
    clip_grad: NonNegative = 1.0
    """The bound of each gradient's absolute value. 0: no bound."""
    decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The rate is multiplied by this factor after every `decay_interval` steps."""
    decay_interval: Count = 1_000_000
    """The steps between two decays."""
    warmup_step: Index = 1000
    """The steps of the warm-up, in which the rate rises linearly to `base`."""
    schedule: Literal["decay", "cosine"] = "decay"
    """+ `decay`: the rate falls by `decay` and `decay_interval`. `cosine`: it falls along half a
    cosine, to 0 at `tot_iterations`; `decay` must be 1."""

    def at(self, step: int, steps: int) -> float:
        """The learning rate of step `step` (0 is the first) in a training of `steps` steps."""
        warm = min(1.0, (step + 1) / max(self.warmup_step, 1))
        if self.schedule == "cosine":
            return self.base * warm * (1 + math.cos(math.pi * step / steps)) / 2
        return self.base * warm * self.decay ** (step // self.decay_interval)

    @model_validator(mode="after")
    def _falls_in_one_way(self) -> "LearningRate":
        if self.schedule == "cosine" and self.decay < 1:
            raise ValueError('with the schedule "cosine", decay must be 1')
        return self


class PretrainPaths(Section):
    """The paths of the published training data."""

    train_clic: UserPath = ""
    """The folder in which tensorflow-datasets has prepared CLIC. "": its default folder, to which
    it downloads CLIC on first use."""
    train_imagenet: UserPath = ""
    """The folder of ImageNet's tfrecords, or one tfrecord file. "": none, and `train_folder` is
    needed."""


class PretrainConfig(ModelOfLambda, ScriptConfig):
    """The config of `train.py`."""

    tot_iterations: Count = 2_000_000
    """The steps of the training."""
    lr: LearningRate = LearningRate()
    cycle_length: Count = 4
    """The number of tfrecord files whose examples are mixed at a time."""
    batch_size: Count = 32
    """The crops in a step, for each process."""
    print_freq: Count = 1000
    """The steps between two rows of `metrics.jsonl`, and between two lines of the log."""
    save_model_freq: Count = 50_000
    """The steps between two checkpoints, and between two tests on `path_test_data`."""
    image_size: Annotated[int, Field(ge=64, multiple_of=64)] = 256
    """The side of the crops in pixels. Smaller images are skipped and counted."""
    smallest_scale: Annotated[float, Field(gt=0, le=1)] = 1.0
    """+ Each crop is taken from a photo shrunk by a random factor from this one to 1, which removes
    a JPEG's own artefacts. A photo is not shrunk below the size of the crop. 1: nothing is shrunk.
    CLIC's crops are always resized, as published."""
    seed: TorchSeed = 0
    """The seed of the weights, the crops and the noise."""
    test: bool = False
    """Do not train. Only test the newest checkpoint, or `pretrain` if there is none."""
    save_name: str = Field(pattern=SAVE_NAME)
    """The run's folder below `output_dir`: a name, or names joined by /. Names have letters,
    digits, blanks, `.`, `_` and `-`."""
    pretrain: UserPath = ""
    """The weights to start from: a file of torch.save or safetensors, or a model of CompressAI's
    zoo (see refinement). "": random weights."""
    new_y: bool = False
    """+ Take from `pretrain` only the layers that do not touch y, so that `channels` may ask for
    another M. The last layer of g_a, the first ones of g_s and h_a, and all of h_s begin anew."""
    new_context: bool = False
    """+ Make an `mbt2018` of the mean-scale hyperprior in `pretrain`: the layers that look at the
    context are new, and begin without an effect."""
    train_clic_imagenet: bool = True
    """Mix CLIC's train split with ImageNet, in proportion to their sizes."""
    path_train: PretrainPaths = PretrainPaths()
    path_test_data: UserPath = ""
    """The test images: a folder, one file, or `sample` for the sample photos. "": no tests."""
    train_folder: UserPath = ""
    """+ The images to train on in place of tfrecords: a folder, one file, or `sample` for the
    sample photos. `--images PATH` on the command line sets it. "": `path_train` is used."""
    quantization: Literal["noise", "mixed", "rounded"] = "noise"
    """+ What stands for rounding: `noise`: uniform noise. `mixed`: noise for the rates alone; h_s
    and g_s get rounded latents, as when a file is decoded (arXiv 2007.08739). `rounded`: rounded
    latents for the rates too; gradients pass the rounding unchanged. It is for the end of a
    training."""
    optimizer: Literal["adam", "soap"] = "adam"
    """+ The optimizer of all weights but the quantiles: Adam or SOAP (arXiv 2409.11321)."""
    aux_lr: Positive = 1e-3
    """+ The learning rate of the quantiles of the entropy bottleneck. Their optimizer is Adam."""
    precision: Precision = "float32"
    """+ The type in which the networks compute. `auto`: bfloat16 if this machine is faster with it,
    else float32. The weights, the likelihoods and the tests are in float32."""
    device: str = "auto"
    """+ `auto`, `cpu`, `cuda` or `cuda:N`. `auto` takes a GPU if there is one."""
    num_workers: Index = 0
    """+ The workers that decode images: threads for tfrecords, processes for folders. 0: all cores
    for tfrecords, the main process for folders."""
    keep_checkpoints: Count = 5
    """+ The number of checkpoints that are kept, the newest ones."""
    output_dir: UserPath = Field("checkpoints", min_length=1)
    """+ The folder of all runs."""
    resume: bool = False
    """+ Resume from the newest checkpoint in the folder."""
    tracker: Tracker | None = None
    """+ A tracker that also gets the metrics. null: none."""

    @staticmethod
    def keys_for_images(path: str) -> dict[str, Any]:
        """The keys that `--images PATH` sets: this folder or file is the training data."""
        return {"train_folder": path}

    @property
    def network_channels(self) -> Channels:
        """`channels`; if that is null, the published rule's for `train_lambda`."""
        return self.channels or channels_of_lambda(
            self.train_lambda, self.objective, self.architecture
        )

    @model_validator(mode="after")
    def _has_data(self) -> "PretrainConfig":
        self._check_new_layers()
        check_lambda(self.objective, self.train_lambda, "train_lambda")
        if self.objective == "ms-ssim" and self.image_size < MS_SSIM_MIN_SIDE and not self.test:
            raise ValueError(
                f'image_size = {self.image_size}: objective = "ms-ssim" needs crops of '
                f"{MS_SSIM_MIN_SIDE} pixels a side or more, so 192 or more"
            )
        if self.test and not self.path_test_data:
            raise ValueError("test is true, but path_test_data names no images to test on")
        if not self.test and not (self.train_folder or self.path_train.train_imagenet):
            raise ValueError(
                "no training data: name tfrecords in path_train.train_imagenet "
                "or a folder of images in train_folder"
            )
        return self

    def _check_new_layers(self) -> None:
        if self.new_y and self.new_context:
            raise ValueError("new_context is true, but so is new_y")
        for key, makes in (("new_y", "mbt2018-mean"), ("new_context", "mbt2018")):
            if not getattr(self, key):
                continue
            if not self.pretrain:
                raise ValueError(f"{key} is true, but pretrain names no model to take layers from")
            if self.architecture not in (None, makes):
                raise ValueError(f"{key} makes an {makes}, not the {self.architecture} asked for")
