"""When a batch is evaluated during refinement, and what is kept of it."""

from statistics import fmean

import torch
from torch import Tensor

from architectures import Latents
from config import RefineConfig
from experimental_inference_methods import Rounding
from objectives import Problem
from refinement.noise import ImageNoise
from refinement.pace import Pace
from refinement.trajectory import Trajectory, images_of, metrics_of, row_of

PICTURED_STEPS = (1, 500)  # beside the first and the last; as in the published code


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
