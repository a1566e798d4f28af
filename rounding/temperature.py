"""Temperatures: schedules by their JSON names, and what a method is annealed with."""

from collections.abc import Callable
from dataclasses import dataclass

from common.errors import InputError

# (step, rate, ub, steps) -> tau, before it is clipped
Schedule = Callable[[float, float, float, int], float]

SCHEDULES: dict[str, Schedule] = {}


def temperature_schedule(name: str) -> Callable[[Schedule], Schedule]:
    """Decorator: register a schedule under its JSON name, a value of `temp_schedule`.

    The function gets the step (0 is the first), `temp_rate`, the upper bound `ub` and the number of
    steps of the run, and returns a temperature, which is clipped to the bounds afterwards.
    """

    def register(schedule: Schedule) -> Schedule:
        SCHEDULES[name] = schedule
        return schedule

    return register


def find_schedule(name: str) -> Schedule:
    """The registered schedule of this name.

    Raises:
        InputError: no such schedule; names what there is.
    """
    if name not in SCHEDULES:
        known = ", ".join(sorted(SCHEDULES))
        raise InputError(f"dev_options.temp_schedule = {name!r}: there are {known}")
    return SCHEDULES[name]


@dataclass(frozen=True)
class Temperature:
    """tau(t), annealed by a registered schedule and clipped to [lb, ub].

    Raises:
        InputError: no such schedule.
    """

    rate: float
    ub: float
    schedule: str = "exp"
    lb: float = 0.0
    steps: int = 1

    def __post_init__(self) -> None:
        find_schedule(self.schedule)

    def __call__(self, step: float) -> float:
        """The temperature of optimisation step `step` (0 is the first)."""
        tau = find_schedule(self.schedule)(step, self.rate, self.ub, self.steps)
        return min(max(tau, self.lb), self.ub)
