"""How latents descend: the optimizer, and how fast a run moves through its schedule."""

import math
import time
from collections.abc import Callable

import torch

from architectures import Latents
from config import Optimizer, RefineConfig

LBFGS_HISTORY = 100  # torch's own
PROBES = 16  # of the curvature, before the first pass of polish


def cost_in_steps(passes: int) -> int:
    """About how many steps of refinement take as long as so many passes of polish, and probes."""
    return PROBES + passes if passes else 0


LEAST_POLISH = cost_in_steps(4)  # steps: with less time left than they take there is no polish


def build_optimizer(latents: Latents, options: Optimizer) -> torch.optim.Optimizer:
    """The optimizer of the latents that a config names."""
    moved = list(latents.values())
    if options.name == "adam":
        return torch.optim.Adam(moved, lr=options.lr, fused=True)
    if options.name == "sgd":
        return torch.optim.SGD(moved, lr=options.lr, momentum=options.momentum)
    return torch.optim.LBFGS(moved, lr=options.lr, history_size=LBFGS_HISTORY)


def pace_of(config: RefineConfig, images: int, first_step: int = 0) -> "Pace":
    """The schedule of a batch of so many images; its clock starts now."""
    steps, polishing = config.tot_inference_iterations, cost_in_steps(config.polish_passes)
    seconds = config.max_seconds * images if config.max_seconds else None
    return Pace(first_step, steps, seconds, polishing / (steps + polishing), LEAST_POLISH)


class Pace:
    """Where in its schedule each step of a run stands: at its own number.

    With a time limit a step moves on by more than one position where the measured speed asks for
    it, so that the schedule ends with the time, however long it is.

    Args:
        first, last: the schedule's first position and its end.
        seconds: the time limit, from now on.
        reserve: the fraction of `seconds` that is left to what comes after this schedule.
        least_steps: where the reserve is shorter than so many steps, none is kept.
        clock: a time in seconds.

    `steps_taken` counts the calls of `advance`; with a time limit `step_seconds` is the mean time
    of a step, the first one left out, and 0 before the second.
    """

    def __init__(
        self,
        first: int,
        last: int,
        seconds: float | None = None,
        reserve: float = 0.0,
        least_steps: float = 0.0,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.position: float = first
        self.last, self.seconds, self.clock = last, seconds, clock
        self.reserve, self.least_steps = reserve, least_steps
        self.start = clock()
        self.steps_taken, self._first_step_seconds = 0, 0.0
        self.step_seconds = 0.0

    @property
    def over(self) -> bool:
        """Whether the schedule is at its end."""
        return self.position >= self.last

    @property
    def elapsed(self) -> float:
        """Seconds since it was made."""
        return self.clock() - self.start

    def set_aside(self, seconds: float) -> None:
        """Keep so much of the time for something else."""
        if self.seconds is not None:
            self.seconds -= seconds

    def advance(self) -> None:
        """Move on after a step. The first step's time says little about the others' time."""
        self.steps_taken += 1
        stride: float = 1
        if self.seconds is not None:
            elapsed, steps_left = self.elapsed, math.inf
            if self.steps_taken == 1:
                self._first_step_seconds = elapsed
            else:
                others = self.steps_taken - 1
                self.step_seconds = (elapsed - self._first_step_seconds) / others
                left = self.seconds - self._reserved_of(self.seconds) - elapsed
                steps_left = round(left / self.step_seconds)
            out_of_time = steps_left <= 1 or elapsed >= self.seconds
            stride = self.last if out_of_time else max(1, (self.last - self.position) / steps_left)
        self.position = min(self.position + stride, self.last)

    def _reserved_of(self, seconds: float) -> float:
        """The time that is kept for what comes after."""
        reserved = self.reserve * seconds
        return reserved if reserved >= self.least_steps * self.step_seconds else 0.0
