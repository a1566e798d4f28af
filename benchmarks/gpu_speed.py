"""How fast is a GPU? Steps of refinement and training, and images a minute of whole recipes.

A setting is timed after a few steps; the host waits for the device only at the start and the end
of the timed steps. Our loop is `train_flexible_inference.refine` itself, between its evaluations.
"""

import copy
import json
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from architectures import Architecture
from benchmarks.gpu_setting import (
    EXAMPLES,
    TORCH_DEFAULT,
    AfterStep,
    backend,
    photos,
    quietly,
)
from benchmarks.refinement_loops import floor_step, plain_step
from benchmarks.training_loops import our_training, plain_training
from common.images import LoadedImage, save_picture
from common.measuring import Cost, Stopwatch
from config import Channels, RefineConfig, load_config
from experimental_inference_methods import rounding_from_config
from models import build_model, load_checkpoint
from refinement.descent import cost_in_steps
from train_flexible_inference import open_refiner, refine_images

# Graphs are captured and cuDNN chooses its algorithms in the first steps.
WARM_UP, FEWEST_STEPS, MOST_STEPS = 5, 3, 200
LONG = 10**6  # steps: never reached

Row = dict[str, Any]
Loop = Callable[[Architecture, Tensor], Callable[[], Any]]


@dataclass(frozen=True)
class Place:
    """Where settings are timed.

    checkpoint: the weights of the shipped size. size: H, W of the pictures. crop: the side of the
    crops that training sees. seconds: how long steps are timed, after the warm-up.
    """

    device: torch.device
    checkpoint: str
    size: tuple[int, int] = (512, 768)
    crop: int = 256
    seconds: float = 0.5
    _loaded: dict[int | None, Architecture] = field(default_factory=dict)
    _pictures: dict[int, Tensor] = field(default_factory=dict)

    def model(self, N: int | None) -> Architecture:
        """An untrained model of N = M channels, or the shipped one, on the device, not frozen."""
        if N not in self._loaded:
            self._loaded[N] = (
                load_checkpoint(self.checkpoint) if N is None else build_model(Channels(N=N, M=N))
            )
        return copy.deepcopy(self._loaded[N]).to(self.device)

    def pictures(self, count: int) -> Tensor:
        """Photos [count, 3, H, W] in [0, 1], on the CPU."""
        if count not in self._pictures:
            self._pictures[count] = photos(count, *self.size)
        return self._pictures[count]


class EnoughError(Exception):
    """All steps are timed: ends a loop from within."""


class StepTimer:
    """Times a loop that calls `count` after each step.

    step_seconds: the result, once `count` has raised `EnoughError`.
    """

    def __init__(self, device: torch.device, seconds: float):
        self.device, self.seconds = device, seconds
        self.steps, self.last, self.timed = 0, 0, 0
        self.started, self.step_seconds = 0.0, 0.0

    def count(self) -> None:
        """Count a step.

        Raises:
            EnoughError: this was the last one.
        """
        self.steps += 1
        if self.steps == WARM_UP:
            self.started = self._now()
        elif self.steps == WARM_UP + 1:
            now = self._now()
            fitting = int(self.seconds / max(now - self.started, 1e-9))
            self.timed = min(max(fitting, FEWEST_STEPS), MOST_STEPS)
            self.started = now
        elif self.steps == WARM_UP + 1 + self.timed:
            self.step_seconds = (self._now() - self.started) / self.timed
            raise EnoughError

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def run(self, step: Callable[[], Any]) -> None:
        """Repeat a step until all are timed."""
        with suppress(EnoughError):
            while True:
                step()
                self.count()


@dataclass(frozen=True)
class Setting(ABC):
    """What is timed; its fields and the result of `measure` become a row of the table.

    batch: images or crops at once. width: the channels of an untrained model; None is the shipped
    model. precision: float32, bfloat16, or auto in a recipe. tf32: see `backend`.
    """

    what: ClassVar[str]
    loop: str
    batch: int
    width: int | None = None
    precision: str = "float32"
    tf32: str = "off"

    @property
    def dtype(self) -> torch.dtype:
        """The precision as torch's type."""
        return getattr(torch, self.precision)

    @abstractmethod
    def measure(self, place: Place) -> Row:
        """The figures: seconds (of a step) or images_per_minute, N and peak_mb."""

    def expected_seconds(self, rows: Sequence[Row]) -> float:
        """About how long `measure` takes, by the rows before."""
        return 5.0

    def row(self) -> Row:
        """The fields as JSON values."""
        return {"what": self.what, **asdict(self)}


PLAIN, FLOOR, OURS = "plain", "convolutions alone", "ours"
GRAPHS, FREE = "ours, CUDA graphs", "ours, cuDNN's fastest"


class RefinementStep(Setting):
    """A step of refinement: plain, ours, or only torch's convolutions."""

    what = "refinement step"

    def measure(self, place: Place) -> Row:
        """See `Setting`."""
        model = place.model(self.width)
        x = place.pictures(self.batch)
        watch, timer = Stopwatch(place.device), StepTimer(place.device, place.seconds)
        others: dict[str, Loop] = {
            PLAIN: plain_step, FLOOR: partial(floor_step, precision=self.dtype)
        }  # fmt: skip
        ours = self.loop not in others
        fastest = self.loop == FREE
        with backend(self.tf32, deterministic=ours and not fastest, fastest=fastest):
            if ours:
                self._time_ours(model, x, place, timer)
            else:
                timer.run(others[self.loop](model, x.to(place.device)))
        return {"seconds": timer.step_seconds, "N": model.N, "peak_mb": watch.read()[1]}

    def _time_ours(self, model: Architecture, x: Tensor, place: Place, timer: StepTimer) -> None:
        values = {
            "pretrain": place.checkpoint, "tot_inference_iterations": LONG, "eval_freq": LONG,
            "device": str(place.device), "precision": self.precision,
            "cuda_graphs": self.loop == GRAPHS,
        }  # fmt: skip
        config = recipe_config("flexible_inference", values)
        refiner = open_refiner(model, rounding_from_config(config), config, place.device)
        images = [LoadedImage(str(index), one) for index, one in enumerate(x)]
        with suppress(EnoughError), AfterStep(lambda steps: timer.count()) as progress:
            _, failures = refiner.refine_batch(images, progress)
            raise RuntimeError(f"ended early: {failures}")


class TrainingStep(Setting):
    """A step of training: ours, or of a plain loop with CompressAI."""

    what = "training step"

    def measure(self, place: Place) -> Row:
        """See `Setting`."""
        model = place.model(self.width)
        loops: dict[str, Loop] = {
            PLAIN: plain_training,
            OURS: partial(our_training, precision=self.dtype),
        }
        x = photos(self.batch, place.crop, place.crop).to(place.device)
        watch, timer = Stopwatch(place.device), StepTimer(place.device, place.seconds)
        with backend(self.tf32, deterministic=self.loop == OURS):
            timer.run(loops[self.loop](model, x))
        return {"seconds": timer.step_seconds, "N": model.N, "peak_mb": watch.read()[1]}


@dataclass(frozen=True)
class Recipe(Setting):
    """Whole refinements by a recipe of example_files: images are read, results are written.

    precision: auto is the recipes' own. images: how many. changed: keys of the config that are not
    the recipe's.
    """

    what = "recipe"
    images: int = 1
    changed: tuple[tuple[str, Any], ...] = ()

    def measure(self, place: Place) -> Row:
        """See `Setting`."""
        costs: list[Cost] = []
        with tempfile.TemporaryDirectory() as name, quietly():
            folder = Path(name)
            for index, x in enumerate(place.pictures(self.images)):
                save_picture(folder / "photos" / f"{index:03d}.png", x)
            values = {
                "pretrain": place.checkpoint, "device": str(place.device), "output_dir": name,
                "batch_size": self.batch, "precision": self.precision, "images": 0,
                **RefineConfig.keys_for_images(str(folder / "photos")), **dict(self.changed),
            }  # fmt: skip
            config = recipe_config(self.loop, values)
            watch = Stopwatch(place.device)
            run = refine_images(config, costs.append)
            seconds, _ = watch.read()
        if run.failed:
            raise RuntimeError(next(iter(run.failed.values())))
        if any(cost.batch != self.batch for cost in costs):
            raise torch.OutOfMemoryError("the images do not fit into memory together")
        return {
            "images_per_minute": 60 * self.images / seconds, "N": run.facts["N"],
            "chosen": run.facts["precision"], "peak_mb": max(cost.peak_memory_mb for cost in costs),
        }  # fmt: skip

    def expected_seconds(self, rows: Sequence[Row]) -> float:
        """See `Setting`. The polish refines the images of a batch one by one."""
        like = RefinementStep(OURS, 0).row()
        steps = {
            row["batch"]: row["seconds"]
            for row in rows
            if "seconds" in row and all(row[key] == like[key] for key in like if key != "batch")
        }
        config = recipe_config(self.loop, {})
        alone = steps.get(1, 0.01)
        together = steps.get(self.batch, alone * self.batch)
        descent = config.tot_inference_iterations * together / self.batch
        polish = cost_in_steps(config.polish_passes) * alone
        return 5 + 1.5 * self.images * (descent + polish)


def recipe_config(recipe: str, values: dict[str, Any]) -> RefineConfig:
    """The config of a recipe of example_files, with other values by dotted keys."""
    overrides = [f"{key}={json.dumps(value)}" for key, value in values.items()]
    return load_config(EXAMPLES / f"{recipe}.json", RefineConfig, overrides)


def settings() -> list[Setting]:
    """All settings, the most telling ones first."""
    steps = {
        (N, batch): refinement_steps(N, batch) for batch in (1, 16, 4, 24) for N in (192, None)
    }
    first = [step for (_, batch), group in steps.items() if batch in (1, 16) for step in group]
    rest = [step for (_, batch), group in steps.items() if batch in (4, 24) for step in group]
    training = [
        TrainingStep(PLAIN, 32, 192, tf32=TORCH_DEFAULT),
        TrainingStep(OURS, 32, 192),
        TrainingStep(OURS, 32, 192, "bfloat16"),
        TrainingStep(OURS, 32, 192, tf32="on"),
        TrainingStep(PLAIN, 32, 192),
    ]
    graphs = (("cuda_graphs", True),)
    recipes = [
        Recipe("fast", 1, None, "auto", images=4),
        Recipe("fast", 16, None, "auto", images=32),
        Recipe("fast", 16, None, "auto", images=32, changed=graphs),
        Recipe("best", 16, None, "auto", images=16),
        Recipe("best", 1, None, "auto", images=1),
    ]
    return [*first, *training, *recipes, *rest]


def refinement_steps(N: int | None, batch: int) -> list[Setting]:
    """The loops and number formats at one size of model and batch.

    Our loop with TF32 in all products is not an option of this project, only a comparison. So is
    cuDNN's choice of algorithms: the same numbers need not come again.
    """
    loops = [
        (PLAIN, "float32", TORCH_DEFAULT),
        (OURS, "float32", "off"),
        (OURS, "bfloat16", "off"),
        (GRAPHS, "float32", "off"),
        (GRAPHS, "bfloat16", "off"),
        (FLOOR, "float32", "off"),
        (FLOOR, "bfloat16", "off"),
        (PLAIN, "float32", "off"),
        (OURS, "float32", "on"),
        (FREE, "bfloat16", "off"),
    ]
    return [RefinementStep(loop, batch, N, precision, tf32=tf32) for loop, precision, tf32 in loops]
