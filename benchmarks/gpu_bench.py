"""What the checks of a GPU compute with: the model, photos, and short refinements and trainings."""

import copy
import json
import tempfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import train
from architectures import Architecture
from benchmarks.gpu_setting import EXAMPLES, AfterStep, photos, run_quietly
from benchmarks.variant import LMBDA
from common.images import LoadedImage, save_picture
from common.records import read_metrics
from common.weights import read_checkpoint
from config import RefineConfig, load_config
from experimental_inference_methods import rounding_from_config
from models import load_checkpoint
from refinement.result import Refined
from train_flexible_inference import Refiner, open_refiner


class Scale(NamedTuple):
    """How much the checks compute.

    size: H, W of the pictures, multiples of 64. recipe: what is changed in fast.json. steps: of
    short refinements. training: keys of the training config.
    """

    size: tuple[int, int]
    recipe: tuple[str, ...]
    steps: int
    training: dict[str, Any]


FULL = Scale(
    (256, 384), (), 40, {"channels": {"N": 64, "M": 64}, "batch_size": 8, "image_size": 128}
)
TOY = Scale(
    (64, 64),
    ("tot_inference_iterations=12", "polish_passes=4", "eval_freq=6"),
    8,
    {"channels": {"N": 8, "M": 8}, "batch_size": 2, "image_size": 64},
)


class Bench:
    """The device to check, the model, and results that several checks need.

    Args:
        checkpoint: the weights, trained for a lambda of 0.01 and not frozen.
    """

    def __init__(self, device: torch.device, checkpoint: str, scale: Scale):
        self.device, self.checkpoint, self.scale = device, checkpoint, scale

    @cached_property
    def stock(self) -> Architecture:
        """The model on the CPU, with CompressAI's own layers."""
        return load_checkpoint(self.checkpoint)

    @cached_property
    def exact(self) -> Architecture:
        """The same in float64."""
        model = copy.deepcopy(self.stock)
        model.network.double()
        return model

    @cached_property
    def x(self) -> Tensor:
        """Two photos [2, 3, H, W] on the CPU."""
        return photos(2, *self.scale.size)

    def refiner(self, device: torch.device, *overrides: str, precision: str = "float32") -> Refiner:
        """A refiner on a device, as fast.json and these overrides say, in a precision."""
        given = [f"pretrain={json.dumps(self.checkpoint)}", f"precision={precision}", *overrides]
        config = load_config(EXAMPLES / "fast.json", RefineConfig, given)
        rounding = rounding_from_config(config)
        return open_refiner(copy.deepcopy(self.stock), rounding, config, device)

    def short(self, device: torch.device, *overrides: str, precision: str = "float32") -> Refiner:
        """A refiner of few steps, without polish and with evaluations at the ends only.

        At the published learning rate a difference in float rounding stays small for so long.
        """
        steps = self.scale.steps
        ends = f"tot_inference_iterations={steps}", f"eval_freq={steps}", "polish_passes=0"
        return self.refiner(device, *ends, "optimizer.lr=0.005", *overrides, precision=precision)

    @cached_property
    def losses_on_cpu(self) -> Tensor:
        """The true losses [2] of the photos, refined on the CPU."""
        return losses_of(self.refiner(torch.device("cpu"), *self.scale.recipe), self.x)

    @cached_property
    def coded(self) -> list[Refined]:
        """The photos, refined on the device and written as files."""
        return refine_all(self.short(self.device, "save_bitstreams=true"), self.x)

    @cached_property
    def trained(self) -> "Trained":
        """The outcome of two short trainings, one of them stopped and resumed."""
        return train_twice(self.device, self.scale.training)


class Trained(NamedTuple):
    """What two trainings of 30 steps showed.

    loss_ratio: the mean loss of the last 5 steps over that of the first 5. deviation: how far the
    weights are apart if one run is stopped halfway and resumed, over the way of the second half.
    """

    loss_ratio: float
    deviation: float


def train_twice(device: torch.device, changed: dict[str, Any]) -> Trained:
    """Train on crops of four small photos, without a stop and with one.

    Args:
        changed: keys of the training config.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for index, x in enumerate(photos(4, 192, 256)):
            save_picture(folder / "photos" / f"{index}.png", x)

        def weights(name: str, steps: int, **more: Any) -> Tensor:
            values = {
                "tot_iterations": steps, "train_lambda": LMBDA, "device": str(device),
                "lr": {"base": 1e-3, "warmup_step": 2}, "train_folder": str(folder / "photos"),
                "save_name": name, "output_dir": str(folder), **changed, **more,
            }  # fmt: skip
            config = folder / "config.json"
            config.write_text(json.dumps(values))
            run_quietly(train.main, "--config", str(config))
            state = read_checkpoint(folder / name / f"iter_{steps}.pth.tar")["model_state_dict"]
            return torch.cat(
                [v.flatten().double() for v in state.values() if v.is_floating_point()]
            )

        whole = weights("whole", 30, print_freq=5)
        half = weights("stopped", 15)
        resumed = weights("stopped", 30, resume=True)
        losses = [row["loss"] for row in read_metrics(folder / "whole" / "metrics.jsonl")]
    way = (whole - half).norm()
    return Trained(losses[-1] / losses[0], ((resumed - whole).norm() / way).item())


def refine_all(refiner: Refiner, x: Tensor, first: int = 0) -> list[Refined]:
    """The results of photos x [B, 3, H, W], refined together.

    Args:
        first: the number of the first photo; an image's noise depends on its number.

    Raises:
        RuntimeError: an image has no result.
    """
    images = [LoadedImage(str(first + index), one) for index, one in enumerate(x)]
    with AfterStep(lambda steps: None) as progress:
        results, failures = refiner.refine_batch(images, progress)
    for name, failure in failures.items():
        raise RuntimeError(f"photo {name}: {failure}")
    return list(results.values())


def losses_of(refiner: Refiner, x: Tensor, first: int = 0) -> Tensor:
    """The lowest true losses [B] of photos x [B, 3, H, W], refined together, in float64."""
    results = refine_all(refiner, x, first)
    lowest = [result.trajectory.lowest_loss for result in results]
    return torch.tensor(lowest, dtype=torch.float64)


def last_relaxed(results: Sequence[Refined]) -> Tensor:
    """The relaxed losses [B] at the end, in float64. Other noise changes them by 0.1 % and more."""
    losses = [result.trajectory.rows[-1]["relaxed_loss"] for result in results]
    return torch.tensor(losses, dtype=torch.float64)


def largest_change(value: Tensor, expected: Tensor) -> float:
    """The largest relative difference of two losses [B], in percent."""
    return 100 * (value / expected - 1).abs().max().item()


def percent(value: Tensor, expected: Tensor) -> float:
    """How much the mean of `value` is above that of `expected`, in percent."""
    return 100 * (value.mean() / expected.mean() - 1).item()


def relative_error(value: Tensor, expected: Tensor) -> float:
    """The norm of the difference over that of `expected`, on the CPU in float64."""
    expected = expected.detach().cpu().double()
    return ((value.detach().cpu().double() - expected).norm() / expected.norm()).item()
