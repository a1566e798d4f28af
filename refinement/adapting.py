"""The problem of a refinement, whose decoder is told more while the latents are refined."""

import time
from collections.abc import Sequence
from typing import Any

import torch

from adaptation.fit import Adapter
from architectures import Latents
from coding.payload import Adaptation
from config import RefineConfig
from objectives import Problem
from refinement.batch import Trajectory, metrics_of, row_of
from refinement.descent import Pace


class AdaptedProblem:
    """The problem of a batch as it is now; without `adapt` in the config it never changes.

    problem: the problem. told: what its decoder is told.

    Args:
        plain: the problem with the model as it is, of one image if the config has `adapt`.
        told: what the decoder is told at first.

    Raises:
        ValueError: the config has `adapt`, and the problem several images.
    """

    def __init__(self, plain: Problem, config: RefineConfig, told: Adaptation):
        if config.adapt and len(plain.x) > 1:
            raise ValueError("adapt: one image at a time, for each has its own decoder")
        self.adapter = Adapter(plain, config.adapt) if config.adapt else None
        self.problem = self.adapter.problem(told) if self.adapter else plain
        self.told, self.usual_lambda = told, config.usual_lambda
        self.fits: int | None = None  # so far; None: the lattice is not chosen yet
        self.fitted_to: dict[str, Any] | None = None  # the row of the last `refit`

    def adapt_if_due(self, pace: Pace, latents: Latents) -> bool:
        """Tell the decoder something else, if that is due; returns whether the problem changed.

        The first call chooses the lattice. Later ones fit the last layer to the latents.
        """
        if self.adapter is None:
            return False
        told = self.told
        if self.fits is None:
            self.fits = self.adapter.fits_before(pace.position, pace.last)
            lattice = self.adapter.with_lattice(self.usual_lambda).lattice
            told = told._replace(lattice=lattice)
        elif self.adapter.due(pace.position, pace.last, self.fits):
            self.fits += 1
            if self._is_finite(latents):
                told = self.adapter.fitted(latents, told)
        if told == self.told:
            return False
        self.told, self.problem = told, self.adapter.problem(told)
        return True

    @torch.no_grad()
    def _is_finite(self, latents: Latents) -> bool:
        """Whether there is something to fit to: a descent may have gone astray."""
        return bool(self.problem.true(latents).loss.isfinite().all())

    def of_best(self, trajectories: Sequence[Trajectory]) -> list[Problem]:
        """The problem of each image, with what the decoder is told of its best latents."""
        if self.adapter is None:
            return list(self.problem.images())
        return [self.adapter.problem(trajectory.told) for trajectory in trajectories]

    @torch.no_grad()
    def refit(self, trajectories: Sequence[Trajectory]) -> None:
        """Fit the last layer to the best latents of each image, and add the result as a row."""
        if self.adapter is None or not self.adapter.options.fits_the_decoder:
            return
        for trajectory in trajectories:
            fitted = self.fitted_to is not None and trajectory.best is self.fitted_to
            if not trajectory.stopped and not fitted:
                _refit(self.adapter, trajectory)
                self.fitted_to = trajectory.best


def _refit(adapter: Adapter, trajectory: Trajectory) -> None:
    began, last = time.perf_counter(), trajectory.rows[-1]
    told = adapter.fitted(trajectory.finite_latents(), trajectory.told)
    problem = adapter.problem(told).in_float32()
    (metrics,), x_hat = metrics_of(problem.true(trajectory.latents), problem.x)
    at = {"step": last["step"] + 1, "temperature": 0.0, "lmbda": trajectory.lmbda}
    clock = trajectory.clock[-1] + time.perf_counter() - began
    trajectory.add(row_of(at, metrics, metrics), trajectory.latents, x_hat, clock, told)
