"""A batch in refinement: the noise and the trajectory of each image, and its evaluations."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Protocol, Self

import torch
from torch import Generator, Tensor

from architectures import Latents
from coding.payload import NOTHING, Adaptation
from common.errors import InputError
from common.images import seed_of
from config import RefineConfig
from experimental_inference_methods import Rounding
from metrics import picture_quality, psnr, to_8_bit
from objectives import Problem, Terms
from refinement.descent import Pace
from rounding.noise import ImageGenerators

RECONSTRUCTED_STEPS = (1, 500)  # also the first and the last; as in the published code
Metrics = dict[str, float | None]


class ImageError(InputError):
    """One image cannot be refined or coded; the message says why. The other images go on."""


@dataclass
class Trajectory:
    """The evaluated steps of one image, and the latents with the lowest true loss.

    rows: one row for each evaluated step, with `step`, `temperature`, `lmbda`, and the metrics of
    `metrics_of` as `relaxed_*` and `true_*`. clock: for each row, the seconds since the start,
    divided by the number of images in the batch. base, best: the first row, and the row with the
    lowest true loss; base_latents, latents: the latents of these rows. All four are empty before
    the first row, and all but base are empty where its loss is not finite. told: what the decoder
    is told in the best row. reconstructions: x_hat [1, 3, H, W] by label, only with
    `keeps_reconstructions`. stopped: the step at which the loss was not finite, in words, or None.
    settled: whether early stopping ended the descent.
    """

    lmbda: float
    keeps_reconstructions: bool = False
    rows: list[dict[str, Any]] = field(default_factory=list)
    clock: list[float] = field(default_factory=list)
    base: dict[str, Any] = field(default_factory=dict)
    best: dict[str, Any] = field(default_factory=dict)
    latents: Latents = field(default_factory=dict)
    base_latents: Latents = field(default_factory=dict)
    told: Adaptation = NOTHING
    reconstructions: dict[str, Tensor] = field(default_factory=dict)
    stopped: str | None = None
    settled: bool = False

    @property
    def ended(self) -> bool:
        """Whether the descent has ended early: the loss is not finite, or has settled."""
        return self.settled or self.stopped is not None

    @property
    def true_losses(self) -> list[float]:
        """The true loss of each row."""
        return [row["true_loss"] for row in self.rows]

    @property
    def lowest_loss(self) -> float:
        """The lowest true loss so far; infinite if no loss was finite."""
        return self.best["true_loss"] if self.best else math.inf

    def add(
        self,
        row: dict[str, Any],
        latents: Latents,
        x_hat: Tensor,
        seconds: float,
        told: Adaptation = NOTHING,
    ) -> None:
        """Add the row of an evaluated step; if it is the best, copy its latents and x_hat."""
        self.rows.append(row)
        self.clock.append(seconds)
        if not math.isfinite(row["true_loss"] + row["relaxed_loss"]):
            self.stopped = f"the loss is not finite at step {row['step']}"
        if row["true_loss"] < self.lowest_loss:
            self.best, self.told = row, told
            self.latents = {name: v.detach().clone() for name, v in latents.items()}
            if self.keeps_reconstructions:
                self.reconstructions["refined"] = x_hat.clone()
        if not self.base:
            self.base, self.base_latents = row, self.latents

    def keep_reconstruction(self, label: str, x_hat: Tensor) -> None:
        """Copy x_hat [1, 3, H, W] under a label, unless the descent has ended."""
        if not self.ended:
            self.reconstructions[label] = x_hat.clone()

    def finite_latents(self) -> Latents:
        """The latents with the lowest true loss.

        Raises:
            ImageError: no step had a finite loss.
        """
        if not self.latents:
            raise ImageError("its loss is not finite even before refinement")
        return self.latents


def metrics_of(terms: Terms, x: Tensor) -> tuple[list[Metrics], Tensor]:
    """The metrics of each image, and x_hat [B, 3, H, W] in 8-bit pixels.

    Args:
        x: [B, 3, H, W] in [0, 1].

    Returns:
        For each image: loss; bpp, bpp_y and bpp_z; distortion, as the loss counts it, mse and
        psnr_raw (dB) of x_hat in floats; psnr (dB), ms_ssim and ms_ssim_db (dB) of x_hat in 8-bit
        pixels, see `picture_quality`.
    """
    columns = {"loss": terms.loss.tolist(), "bpp": terms.bpp.tolist()}
    columns |= {f"bpp_{name}": terms.rates[name].tolist() for name in sorted(terms.rates)}
    columns["distortion"] = terms.distortion.tolist()
    columns |= {"mse": terms.mse.tolist(), "psnr_raw": psnr(terms.mse).tolist()}
    x_hat = to_8_bit(terms.x_hat)
    rows = []
    for values, one_x_hat, one_x in zip(
        zip(*columns.values(), strict=True), x_hat.split(1), x.split(1), strict=True
    ):
        quality = picture_quality(one_x_hat, one_x)
        rows.append({**dict(zip(columns, values, strict=True)), **quality})
    return rows, x_hat


def row_of(at: dict[str, Any], relaxed: Metrics, true: Metrics) -> dict[str, Any]:
    """One row of a trajectory: `at` has step, temperature and lmbda; the rest are metrics."""
    row = at | {f"relaxed_{key}": value for key, value in relaxed.items()}
    return row | {f"true_{key}": value for key, value in true.items()}


def images_of(latents: Latents) -> Sequence[Latents]:
    """The latents of each image of a batch, [1, C, h, w] each."""
    parts = {name: v.split(1) for name, v in latents.items()}
    count = len(next(iter(parts.values())))
    return [{name: part[index] for name, part in parts.items()} for index in range(count)]


class ImageNoise:
    """The random numbers of a batch: one generator for each image, seeded again at each step.

    Args:
        seeds: one seed for each image.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device):
        self.seeds = tuple(seeds)
        self.device = device
        self.source = ImageGenerators(tuple(Generator(device) for _ in self.seeds))
        self._kept: dict[int, Tensor] = {}

    @classmethod
    def of_images(
        cls, seed: int, names: Sequence[str], device: torch.device, trial: int = 0
    ) -> Self:
        """The noise of named images; it does not depend on the other images of the batch.

        Args:
            seed: the seed of the run.
            trial: the number of the refinement of the same image; each has other noise.
        """
        return cls([seed_of(seed, name) + trial for name in names], device)

    def rounding(
        self, rounding: Rounding, step: int, position: float
    ) -> Callable[[Tensor], Tensor]:
        """The relaxed rounding of centred latents v [B, ...] at one step, with new noise.

        A second call for the same step has the same noise. LBFGS needs that.

        Args:
            position: the position in the temperature schedule, in steps.
        """
        self.restart(step)
        return rounding.at(position, self.source)

    def restart(self, step: int) -> None:
        """Restart the noise of one step."""
        for generator, seed in zip(self.source.images, self.seeds, strict=True):
            generator.manual_seed(seed + step)

    def keep(self, index: int) -> None:
        """Keep the state of an image's generator for `of_image`."""
        self._kept[index] = self.source.images[index].get_state()

    def of_image(self, index: int) -> Generator:
        """An image's generator, in the state that `keep` kept, if any."""
        generator = self.source.images[index]
        if index in self._kept:
            generator.set_state(self._kept.pop(index))
        return generator


class Subject(Protocol):
    """What a recorder evaluates: a problem, which may change, and what its decoder is told."""

    problem: Problem
    told: Adaptation


class Recorder:
    """Evaluates a batch at some steps, and keeps one `Trajectory` for each image.

    It evaluates truly rounded latents at the first step, at the last one and at every `eval_freq`
    steps, before the step's update, always in float32. With `save_final` it also keeps x_hat at a
    few steps.
    """

    def __init__(
        self,
        subject: Subject,
        rounding: Rounding,
        config: RefineConfig,
        noise: ImageNoise,
        pace: Pace,
    ):
        self.subject = subject
        self.rounding, self.noise, self.pace = rounding, noise, pace
        self.early_stop = config.early_stop
        self.eval_freq, self.keeps_reconstructions = config.eval_freq, config.dev_options.save_final
        self.first_step = int(pace.position)
        lmbda, x = subject.problem.objective.lmbda, subject.problem.x
        self.trajectories = [Trajectory(lmbda, self.keeps_reconstructions) for _ in x]

    @property
    def ended(self) -> bool:
        """Whether the descent of every image has ended."""
        return all(trajectory.ended for trajectory in self.trajectories)

    def evaluate_if_due(self, step: int, latents: Latents) -> None:
        """Evaluate the latents and keep x_hat, each only if it is due at this step."""
        due = step % self.eval_freq == 0 or step == self.first_step or self.pace.at_end
        keeps_x_hat = self.keeps_reconstructions and (
            step in (self.first_step, *RECONSTRUCTED_STEPS) or self.pace.at_end
        )
        if not due and not keeps_x_hat:
            return
        began, problem = self.pace.elapsed, self.subject.problem.in_float32()
        with torch.no_grad():
            true, x_hat = metrics_of(problem.true(latents), problem.x)
            if keeps_x_hat:
                self._keep_reconstructions(step, x_hat)
            if not due:
                return
            relaxed_rounding = self.noise.rounding(self.rounding, step, self.pace.position)
            relaxed, _ = metrics_of(problem.relaxed(latents, relaxed_rounding), problem.x)
        at = {
            "step": step,
            "temperature": self.rounding.temperature(self.pace.position),
            "lmbda": problem.objective.lmbda,
        }
        rows = [row_of(at, *both) for both in zip(relaxed, true, strict=True)]
        self._add(rows, latents, x_hat)
        if step == self.first_step:
            self.pace.set_aside(self.pace.elapsed - began)  # the last evaluation takes as long

    def _keep_reconstructions(self, step: int, x_hat: Tensor) -> None:
        label = "base" if step == self.first_step else f"step_{step:04d}"
        for trajectory, one_x_hat in zip(self.trajectories, x_hat.split(1), strict=True):
            trajectory.keep_reconstruction(label, one_x_hat)

    def _add(self, rows: list[dict], latents: Latents, x_hat: Tensor) -> None:
        seconds = self.pace.elapsed / len(rows)
        parts = zip(self.trajectories, rows, images_of(latents), x_hat.split(1), strict=True)
        for index, (trajectory, row, image_latents, one_x_hat) in enumerate(parts):
            if not trajectory.ended:
                trajectory.add(row, image_latents, one_x_hat, seconds, self.subject.told)
                if self.early_stop and self.early_stop.settled(trajectory.true_losses):
                    trajectory.settled = True
                    # The polish continues this noise, as it would without the other images.
                    self.noise.keep(index)

    def progress_of(self, losses: Tensor) -> tuple[Tensor, float]:
        """The means of `losses` [B] and of the lowest true losses, over images not yet ended."""
        active = [index for index, one in enumerate(self.trajectories) if not one.ended]
        # A list as the index, or a mask, would wait for the GPU.
        active_losses = torch.stack([losses[index] for index in active])
        lowest_losses = (self.trajectories[index].lowest_loss for index in active)
        return active_losses.mean(), fmean(lowest_losses)
