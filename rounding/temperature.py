"""Temperature schedules by their JSON names, and the temperature of a method over the steps."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from common.errors import InputError

# A temperature. In a CUDA graph it is a tensor without dimensions, for numbers cannot change there.
Tau = float | Tensor

# (step, rate, ub, steps) -> tau, not yet clipped
Schedule = Callable[[float, float, float, int], float]

SCHEDULES: dict[str, Schedule] = {}


def temperature_schedule(name: str) -> Callable[[Schedule], Schedule]:
    """Decorator: register a schedule under its JSON name, a value of `temp_schedule`.

    The function takes the step (0 is the first), `temp_rate`, the upper bound `ub` and the number
    of steps of the run. It returns a temperature, which `Temperature` clips to the bounds.
    """

    def register(schedule: Schedule) -> Schedule:
        SCHEDULES[name] = schedule
        return schedule

    return register


def find_schedule(name: str) -> Schedule:
    """The registered schedule with this name.

    Raises:
        InputError: no such schedule; lists the registered names.
    """
    if name not in SCHEDULES:
        known = ", ".join(sorted(SCHEDULES))
        raise InputError(f"dev_options.temp_schedule = {name!r}: there are {known}")
    return SCHEDULES[name]


def at_least(tau: Tau, bound: float) -> Tau:
    """The larger of a temperature, or a number made of one, and the bound."""
    return tau.clamp_min(bound) if isinstance(tau, Tensor) else max(tau, bound)


@dataclass(frozen=True)
class Temperature:
    """The temperature tau at each step: a registered schedule, clipped to [lb, ub].

    rate, steps: arguments of the schedule, see `temperature_schedule`.

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
        """The temperature at step `step` (0 is the first); may lie between two steps."""
        tau = find_schedule(self.schedule)(step, self.rate, self.ub, self.steps)
        return min(max(tau, self.lb), self.ub)
