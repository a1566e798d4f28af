"""A batch on its way: each image's noise and trajectory, and when the batch is evaluated."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Self

import torch
from torch import Generator, Tensor

from architectures import Latents
from common.errors import InputError
from common.images import seed_of
from config import RefineConfig
from experimental_inference_methods import Rounding
from metrics import picture_quality, psnr, to_8_bit
from objectives import Problem, Terms
from refinement.descent import Pace

PICTURED_STEPS = (1, 500)  # beside the first and the last; as in the published code
Metrics = dict[str, float | None]


class ImageError(InputError):
    """One image cannot be refined or coded; says why. The others go on."""


@dataclass
class Trajectory:
    """One image's way, and the latents that were best when truly rounded.

    rows: of each evaluated step, `step`, `temperature`, `lmbda`, and the metrics of `metrics_of` as
    `relaxed_*` and `true_*`. clock: this image's share of the seconds at which each row was there.
    base and best are rows; base_latents and latents are what belongs to them. They are empty before
    the first row, and all but base where that one's loss is not finite. pictures: by label, x_hat
    [1, 3, H, W], kept only with `keeps_pictures`. stopped: why the loss was not finite. settled:
    whether early stopping ended it.
    """

    lmbda: float
    keeps_pictures: bool = False
    rows: list[dict[str, Any]] = field(default_factory=list)
    clock: list[float] = field(default_factory=list)
    base: dict[str, Any] = field(default_factory=dict)
    best: dict[str, Any] = field(default_factory=dict)
    latents: Latents = field(default_factory=dict)
    base_latents: Latents = field(default_factory=dict)
    pictures: dict[str, Tensor] = field(default_factory=dict)
    stopped: str | None = None
    settled: bool = False

    @property
    def over(self) -> bool:
        """Whether more steps are no use: the loss is not finite, or has settled."""
        return self.settled or self.stopped is not None

    @property
    def true_losses(self) -> list[float]:
        """The true loss at each row."""
        return [row["true_loss"] for row in self.rows]

    @property
    def lowest(self) -> float:
        """The lowest true loss so far; infinite where none was finite."""
        return self.best["true_loss"] if self.best else math.inf

    def add(self, row: dict[str, Any], latents: Latents, x_hat: Tensor, seconds: float) -> None:
        """Add an evaluated step; keep copies of its latents and picture if it is the best."""
        self.rows.append(row)
        self.clock.append(seconds)
        if not math.isfinite(row["true_loss"] + row["relaxed_loss"]):
            self.stopped = f"the loss is not finite at step {row['step']}"
        if row["true_loss"] < self.lowest:
            self.best = row
            self.latents = {name: v.detach().clone() for name, v in latents.items()}
            if self.keeps_pictures:
                self.pictures["refined"] = x_hat.clone()
        if not self.base:
            self.base, self.base_latents = row, self.latents

    def keep_picture(self, label: str, x_hat: Tensor) -> None:
        """Keep x_hat [1, 3, H, W] under a label, unless the image is over."""
        if not self.over:
            self.pictures[label] = x_hat.clone()

    def finite_latents(self) -> Latents:
        """The best latents.

        Raises:
            ImageError: no step had a finite loss.
        """
        if not self.latents:
            raise ImageError("its loss is not finite even before refinement")
        return self.latents


def metrics_of(terms: Terms, x: Tensor) -> tuple[list[Metrics], Tensor]:
    """Metrics of each image of x [B, 3, H, W] in [0, 1], and x_hat in 8 bits.

    loss; bpp, and bpp_y, bpp_z of each latent; mse and psnr_raw (dB) of the networks' floats; psnr
    of clamped 8-bit pixels (dB); ms_ssim and ms_ssim_db of the same, None where a side is under 161
    pixels.
    """
    columns = {"loss": terms.loss.tolist(), "bpp": terms.bpp.tolist()}
    columns |= {f"bpp_{name}": terms.rates[name].tolist() for name in sorted(terms.rates)}
    columns |= {"mse": terms.mse.tolist(), "psnr_raw": psnr(terms.mse).tolist()}
    x_hat = to_8_bit(terms.x_hat)
    rows = []
    for values, shown, wanted in zip(
        zip(*columns.values(), strict=True), x_hat.split(1), x.split(1), strict=True
    ):
        quality = picture_quality(shown, wanted)
        rows.append({**dict(zip(columns, values, strict=True)), **quality})
    return rows, x_hat


def row_of(at: dict[str, Any], relaxed: Metrics, true: Metrics) -> dict[str, Any]:
    """A trajectory's row: where in the schedule it is, and both kinds of metrics."""
    row = at | {f"relaxed_{key}": value for key, value in relaxed.items()}
    return row | {f"true_{key}": value for key, value in true.items()}


def images_of(latents: Latents) -> Sequence[Latents]:
    """The latents of each image of a batch."""
    parts = {name: v.split(1) for name, v in latents.items()}
    count = len(next(iter(parts.values())))
    return [{name: part[index] for name, part in parts.items()} for index in range(count)]


class ImageNoise:
    """The random numbers of a batch: one generator an image, seeded anew for each step.

    Args:
        seeds: one an image.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device):
        self.seeds = tuple(seeds)
        self.device = device
        self._generators = [Generator(device) for _ in self.seeds]
        self._kept: dict[int, Tensor] = {}

    @classmethod
    def of_images(
        cls, seed: int, names: Sequence[str], device: torch.device, trial: int = 0
    ) -> Self:
        """The noise of images by their names, whichever they are refined with.

        Args:
            seed: of the run.
            trial: other numbers for another refinement of the same image.
        """
        return cls([seed_of(seed, name) + trial for name in names], device)

    def rounding(
        self, rounding: Rounding, step: int, position: float
    ) -> Callable[[Tensor], Tensor]:
        """The relaxed rounding of centred latents v [B, ...] at a step, with fresh noise.

        However often a step asks, as LBFGS does, its noise is the same.

        Args:
            position: in the schedule of temperatures.
        """
        roundings = [
            rounding.at(position, generator.manual_seed(seed + step))
            for generator, seed in zip(self._generators, self.seeds, strict=True)
        ]
        return image_by_image(roundings)

    def keep(self, index: int) -> None:
        """Remember an image's state, from which `of_image` goes on."""
        self._kept[index] = self._generators[index].get_state()

    def of_image(self, index: int) -> Generator:
        """An image's generator: as it was kept, or as it is."""
        generator = self._generators[index]
        if index in self._kept:
            generator.set_state(self._kept.pop(index))
        return generator


def image_by_image(roundings: Sequence[Callable[[Tensor], Tensor]]) -> Callable[[Tensor], Tensor]:
    """One rounding of v [B, ...] that lets each of B roundings have its image."""
    if len(roundings) == 1:
        return roundings[0]
    return lambda v: torch.cat(
        [rounding(part) for rounding, part in zip(roundings, v.split(1), strict=True)]
    )


class Recorder:
    """Evaluates a batch at some of its steps, one `Trajectory` an image.

    Every `eval_freq` steps, at the first and at the last one the latents are truly rounded and
    evaluated, before that step's update. With `save_final` pictures of a few steps are kept.
    """

    def __init__(
        self,
        problem: Problem,
        rounding: Rounding,
        config: RefineConfig,
        noise: ImageNoise,
        pace: Pace,
    ):
        self.problem, self.rounding, self.noise, self.pace = problem, rounding, noise, pace
        self.early_stop = config.early_stop
        self.eval_freq, self.keeps_pictures = config.eval_freq, config.dev_options.save_final
        self.first_step = int(pace.position)
        lmbda = problem.objective.lmbda
        self.trajectories = [Trajectory(lmbda, self.keeps_pictures) for _ in problem.x]

    @property
    def over(self) -> bool:
        """Whether every image is over."""
        return all(trajectory.over for trajectory in self.trajectories)

    def visit(self, step: int, latents: Latents) -> None:
        """Evaluate the step if it is due."""
        due = step % self.eval_freq == 0 or step == self.first_step or self.pace.over
        pictured = self.keeps_pictures and (
            step in (self.first_step, *PICTURED_STEPS) or self.pace.over
        )
        if not due and not pictured:
            return
        began = self.pace.elapsed
        with torch.no_grad():
            true, x_hat = metrics_of(self.problem.true(latents), self.problem.x)
            if pictured:
                self._keep_pictures(step, x_hat)
            if not due:
                return
            relaxed_rounding = self.noise.rounding(self.rounding, step, self.pace.position)
            relaxed, _ = metrics_of(self.problem.relaxed(latents, relaxed_rounding), self.problem.x)
        at = {
            "step": step,
            "temperature": self.rounding.temperature(self.pace.position),
            "lmbda": self.problem.objective.lmbda,
        }
        rows = [row_of(at, *both) for both in zip(relaxed, true, strict=True)]
        self._add(rows, latents, x_hat)
        if step == self.first_step:
            self.pace.set_aside(self.pace.elapsed - began)  # for the last evaluation

    def _keep_pictures(self, step: int, x_hat: Tensor) -> None:
        label = "base" if step == self.first_step else f"step_{step:04d}"
        for trajectory, picture in zip(self.trajectories, x_hat.split(1), strict=True):
            trajectory.keep_picture(label, picture)

    def _add(self, rows: list[dict], latents: Latents, x_hat: Tensor) -> None:
        seconds = self.pace.elapsed / len(rows)
        parts = zip(self.trajectories, rows, images_of(latents), x_hat.split(1), strict=True)
        for index, (trajectory, row, own, picture) in enumerate(parts):
            if not trajectory.over:
                trajectory.add(row, own, picture, seconds)
                if self.early_stop and self.early_stop.settled(trajectory.true_losses):
                    trajectory.settled = True
                    # The polish goes on with this noise, as if the image were alone.
                    self.noise.keep(index)

    def progress_of(self, losses: Tensor) -> tuple[Tensor, float]:
        """Means over the images that go on: of their relaxed losses [B], and of the lowest true."""
        going = [index for index, one in enumerate(self.trajectories) if not one.over]
        # An index would wait for a GPU.
        shown = losses if len(going) == len(self.trajectories) else losses[going]
        return shown.mean(), fmean(self.trajectories[index].lowest for index in going)
