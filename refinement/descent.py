"""The descent of the latents: the optimizer, and how fast a run moves through its schedule."""

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from architectures import Latents
from config import Optimizer, RefineConfig

LBFGS_HISTORY = 100  # torch's default
PROBES = 16  # random draws that estimate the curvature before the first pass of polish


def cost_in_steps(passes: int) -> int:
    """The time of `passes` passes of polish and their probes, in steps of the descent; rough."""
    return PROBES + passes if passes else 0


LEAST_POLISH = cost_in_steps(4)  # steps; polish is skipped if less time than they take is left


def build_optimizer(latents: Latents, options: Optimizer) -> torch.optim.Optimizer:
    """The optimizer of the latents, as a config's `optimizer` section sets it."""
    moved = list(latents.values())
    if options.name == "adam":
        return torch.optim.Adam(moved, lr=options.lr, fused=True)
    if options.name == "sgd":
        return torch.optim.SGD(moved, lr=options.lr, momentum=options.momentum)
    for v in moved:  # they are channels-last, and LBFGS flattens gradients without a copy
        v.register_post_accumulate_grad_hook(_make_gradient_contiguous)
    return torch.optim.LBFGS(moved, lr=options.lr, history_size=LBFGS_HISTORY)


def _make_gradient_contiguous(v: Tensor) -> None:
    if v.grad is not None:
        v.grad = v.grad.contiguous()


def forget_curvature(optimizer: torch.optim.Optimizer) -> None:
    """Forget what LBFGS knows of a problem that has changed; other optimizers go on as they are."""
    if isinstance(optimizer, torch.optim.LBFGS):
        optimizer.state.clear()


def pace_of(config: RefineConfig, images: int, first_step: int = 0) -> "Pace":
    """The pace of a batch of `images` images; its clock starts now."""
    steps, polishing = config.tot_inference_iterations, cost_in_steps(config.polish_passes)
    seconds = config.max_seconds * images if config.max_seconds else None
    return Pace(first_step, steps, seconds, polishing / (steps + polishing), LEAST_POLISH)


class Pace:
    """The position of a run in its schedule; each step moves it on by one.

    A time limit may be too short for all steps. Then each step moves on by more than one position,
    as the measured speed demands, and the schedule ends when the time ends.

    Args:
        first, last: the schedule's first position and its end, in steps.
        seconds: the time limit, counted from now; None for no limit.
        reserve: the fraction of `seconds` in [0, 1] that is kept for the work after this schedule.
        least_steps: no reserve is kept if it is shorter than this number of steps.
        clock: returns the time in seconds.

    `steps_taken` counts the calls of `advance`. With a time limit `step_seconds` is the mean time
    of a step without the first one. It is 0 before the second step.
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
    def at_end(self) -> bool:
        """Whether the position is at the end of the schedule."""
        return self.position >= self.last

    @property
    def elapsed(self) -> float:
        """Seconds since this pace was created."""
        return self.clock() - self.start

    def set_aside(self, seconds: float) -> None:
        """Shorten the time limit, if there is one, by this many seconds."""
        if self.seconds is not None:
            self.seconds -= seconds

    def advance(self) -> None:
        """Move on after a step. The first step is slower than the others, so it is not timed."""
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
        """The seconds that are kept for the work after this schedule."""
        reserved = self.reserve * seconds
        return reserved if reserved >= self.least_steps * self.step_seconds else 0.0
