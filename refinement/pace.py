"""How steps are spread over a schedule when there is a time limit."""

import math
import time
from collections.abc import Callable


class Pace:
    """Where in its schedule each step of a run stands: at its own number.

    With a time limit steps move on by more than one where the speed so far asks for it, so that the
    schedule ends with the time, however long it is.

    Args:
        first, last: the schedule's first position and its end.
        seconds: the time limit, from now on.
        reserve: the fraction of `seconds` that is left to what comes after this schedule.
        least_steps: where the reserve is shorter than so many steps, none is kept.
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
        self.taken, self.start, self.first_taken = 0, clock(), 0.0
        self.each = 0.0  # seconds a step, as far as known

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
        """A step was taken. The first one's time says little of the others'."""
        self.taken += 1
        stride = 1
        if self.seconds is not None:
            elapsed, left = self.elapsed, math.inf
            if self.taken == 1:
                self.first_taken = elapsed
            else:
                self.each = (elapsed - self.first_taken) / (self.taken - 1)
                left = round((self.seconds - self._reserved() - elapsed) / self.each)
            over = left <= 1 or elapsed >= self.seconds
            stride = self.last if over else max(1, (self.last - self.position) / left)
        self.position = min(self.position + stride, self.last)

    def _reserved(self) -> float:
        """Seconds for what comes after."""
        reserved = self.reserve * self.seconds
        return reserved if reserved >= self.least_steps * self.each else 0.0
