"""What `train.py` reads."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from schemas.base import (
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
)


class LearningRate(Section):
    """The learning rate over the steps, and the bound of the gradients."""

    base: Positive = 1e-4
    """The learning rate after the warm-up."""
    curl_lr: NonNegative | None = None
    """No effect: the current rate in published files, kept so that they load."""
    clip_grad: NonNegative = 1.0
    """The bound of each gradient's absolute value. 0: no bound."""
    decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The factor of the rate after every `decay_interval` steps."""
    decay_interval: Count = 1_000_000
    """Steps between two decays."""
    warmup_step: Index = 1000
    """Steps of the linear warm-up to `base`."""

    def at(self, step: int) -> float:
        """The learning rate of step `step` (0 is the first)."""
        warm = min(1.0, (step + 1) / max(self.warmup_step, 1))
        return self.base * warm * self.decay ** (step // self.decay_interval)


class PretrainPaths(Section):
    """Where the published training data lie."""

    train_clic: UserPath = ""
    """The tensorflow-datasets folder that holds CLIC prepared. "": its default folder, into which
    it downloads CLIC on first use."""
    train_imagenet: UserPath = ""
    """Folder of ImageNet's tfrecords, or one such file. "": none, then `train_folder` is needed."""


class PretrainConfig(ModelOfLambda, ScriptConfig):
    """What `train.py` reads."""

    tot_iterations: Count = 2_000_000
    """Steps of the training."""
    lr: LearningRate = LearningRate()
    cycle_length: Count = 4
    """How many tfrecord files are read in turn."""
    batch_size: Count = 32
    """Crops in a step, on each process."""
    print_freq: Count = 1000
    """Steps between rows of `metrics.jsonl` and lines of the log."""
    save_model_freq: Count = 50_000
    """Steps between checkpoints, and between tests on `path_test_data`."""
    image_size: Annotated[int, Field(ge=64, multiple_of=64)] = 256
    """Side of the crops, pixels. Smaller images are skipped and counted."""
    seed: TorchSeed = 0
    """Seed of the weights, the crops and the noise."""
    test: bool = False
    """Do not train, only test the newest checkpoint, or `pretrain` where there is none."""
    save_name: str = Field(pattern=SAVE_NAME)
    """The run's folder below `output_dir`: a name, or names joined by /, of letters, digits, blank,
    `.`, `_` and `-`."""
    pretrain: UserPath = ""
    """Weights to start from: a file of torch.save or safetensors, or a model of CompressAI's zoo.
    "": random weights."""
    train_clic_imagenet: bool = True
    """Mix CLIC's train split into ImageNet, by their sizes."""
    path_train: PretrainPaths = PretrainPaths()
    path_test_data: UserPath = ""
    """Test images: a folder, one file, or `sample` for the sample photos. "": no tests."""
    train_folder: UserPath = ""
    """+ Folder of images to train on instead of tfrecords, or `sample` for the sample photos.
    `--images PATH` on the command line sets it. "": `path_train` counts."""
    optimizer: Literal["adam", "soap"] = "adam"
    """+ The optimizer of all weights but the quantiles: Adam, or SOAP (arXiv 2409.11321)."""
    aux_lr: Positive = 1e-3
    """+ Learning rate of the Adam that the quantiles of the entropy bottleneck have."""
    precision: Precision = "float32"
    """+ With `bfloat16` the networks run under autocast; the likelihoods stay in float32."""
    device: str = "auto"
    """+ `auto`, `cpu`, `cuda` or `cuda:N`. `auto` takes a GPU if there is one."""
    num_workers: Index = 0
    """+ Processes that decode images. 0: all cores for tfrecords, the main process for folders."""
    keep_checkpoints: Count = 5
    """+ How many of the newest checkpoints are kept."""
    output_dir: UserPath = Field("checkpoints", min_length=1)
    """+ The folder of all runs."""
    resume: bool = False
    """+ Go on from the newest checkpoint in the folder."""
    tracker: Tracker | None = None
    """+ Also send the metrics to a tracker. null: to none."""

    @staticmethod
    def keys_for_images(path: str) -> dict[str, Any]:
        """What `--images PATH` sets, by dotted key: this folder is the training data."""
        return {"train_folder": path}

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
