"""That lambda at which an image's file has a wanted size or quality."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, NamedTuple

from architectures import Latents
from coding.coder import Coder, decode_picture, encode_latents
from config import Target
from metrics import mean_squared_error, psnr, to_8_bit
from objectives import Problem, RateDistortion
from refinement.batch import Trajectory


class Start(NamedTuple):
    """Where a refinement begins: latents, the step of the schedule, and which noise it has."""

    latents: Latents
    step: int = 0
    trial: int = 0


@dataclass(frozen=True)
class Trial:
    """A refinement at one lambda, and what its file measured."""

    trajectory: Trajectory
    measured: float


def refine_to_target(
    problem: Problem,
    coder: Coder,
    search: "LambdaSearch",
    steps: int,
    refine_at: Callable[[float, Start], Trajectory],
    note: Callable[[str], None],
) -> tuple[Trajectory, dict[str, Any]]:
    """Refine one image at that lambda at which its file meets the target of a search.

    The whole run comes first, at the lambda that the unrefined file suggests. Then runs over the
    second half of the schedule mend lambda, each from the latents of the one before. The trial that
    is closest counts.

    Args:
        steps: of the whole schedule.
        refine_at: refines at a lambda.
        note: called with a line on each trial.

    Returns:
        One trajectory over all trials, and what a record says of the target.

    Raises:
        BitstreamError: latents on the way cannot be coded.
        ImageError: the loss is not finite at the start.
    """
    target = search.target
    begin = Start(problem.model.analyze(problem.x))
    unrefined = measure(problem, coder, begin.latents, target)
    search.begin(unrefined)
    trials: list[Trial] = []
    while search.goes_on:
        trajectory = refine_at(search.lmbda, begin)
        latents = trajectory.finite_latents()
        trials.append(Trial(trajectory, measure(problem, coder, latents, target)))
        measured = trials[-1].measured
        note(f"lambda {trajectory.lmbda:.4g}: {target.in_words(measured)}")
        if trajectory.stopped:
            break
        search.add(measured)
        begin = Start(latents, steps // 2, len(trials))
    chosen = min(trials, key=lambda trial: target.miss(trial.measured))
    if target.miss(unrefined) < target.miss(chosen.measured) and target.miss(chosen.measured) > 1:
        first = trials[0].trajectory
        chosen = Trial(replace(first, latents=first.base_latents, best=first.base), unrefined)
    outcome = {
        "kind": target.kind, "wanted": target.wanted, "got": chosen.measured,
        "met": target.miss(chosen.measured) <= 1, "stretches": len(trials),
    }  # fmt: skip
    return in_a_row([trial.trajectory for trial in trials], chosen.trajectory), outcome


def measure(problem: Problem, coder: Coder, latents: Latents, target: Target) -> float:
    """The bpp of the file of one image's latents, or the PSNR (dB) of its picture.

    Raises:
        BitstreamError: see `encode_latents`.
    """
    data = encode_latents(coder, problem.model.symbols(latents, problem.size), problem.size)
    if target.kind == "bpp":
        return 8 * len(data) / problem.pixels
    x_hat = to_8_bit(decode_picture(coder, data))
    return psnr(mean_squared_error(x_hat, problem.x.cpu())).item()


class LambdaSearch:
    """Which lambda to try next for files to meet a target: secants in log lambda.

    A larger lambda gives a larger file of a better picture. A trial's latents have not yet followed
    its lambda all the way, which flattens a secant: of the last three the steepest counts.
    """

    # Of log bpp, and of PSNR in dB, per unit of log lambda: about what the bundled models have.
    SLOPES = MappingProxyType({"bpp": 0.17, "psnr": 0.8})
    TRIALS, LONGEST_STEP, REACH = 10, math.log(4), math.log(1024)

    def __init__(self, target: Target, lmbda: float, train_lambda: float):
        self.target = target
        self.goes_on, self.trials = True, 0
        self.last: tuple[float, float] | None = None  # position, and how far its file was off
        self.secants: list[float] = []
        self.position, centre = math.log(lmbda), math.log(train_lambda)
        self.bounds = (
            min(centre - self.REACH, self.position),
            max(centre + self.REACH, self.position),
        )

    @property
    def lmbda(self) -> float:
        """The lambda to try."""
        return math.exp(self.position)

    def begin(self, unrefined: float) -> None:
        """Set the first lambda from what the unrefined file measured."""
        slope = self.SLOPES[self.target.kind]
        self.position = self._step(self.position, self._off(unrefined), slope)

    def add(self, measured: float) -> None:
        """Add what this lambda gave: the next one is set, or the search ends (`goes_on`)."""
        off, slope = self._off(measured), self.SLOPES[self.target.kind]
        if self.last is not None and self.last[0] != self.position:
            position, before = self.last
            self.secants.append((off - before) / (self.position - position))
        if self.secants:
            slope = min(max(*self.secants[-3:], 0.3 * slope), 4 * slope)
        following = self._step(self.position, off, slope)
        gained = self.last is None or abs(self.last[1]) - abs(off) > 0.005
        stuck = following == self.position and not gained
        self.trials += 1
        self.goes_on = self.target.miss(measured) > 1 and not stuck and self.trials < self.TRIALS
        self.last, self.position = (self.position, off), following

    def _off(self, measured: float) -> float:
        wanted = self.target.wanted
        if self.target.kind == "bpp":
            return math.log(measured / wanted)
        return min(measured, 99.0) - wanted

    def _step(self, position: float, off: float, slope: float) -> float:
        step = min(max(-off / slope, -self.LONGEST_STEP), self.LONGEST_STEP)
        return min(max(position + step, self.bounds[0]), self.bounds[1])


def in_a_row(trajectories: Sequence[Trajectory], chosen: Trajectory) -> Trajectory:
    """The chosen one of several trajectories, with the rows of all, and the base of the first.

    Steps and seconds count on. The base's loss is that at the chosen lambda.
    """
    rows: list[dict[str, Any]] = []
    clock: list[float] = []
    for trajectory in trajectories:
        first = trajectory.rows[0]["step"]
        taken, seconds = (rows[-1]["step"], clock[-1]) if rows else (0, 0.0)
        for row in trajectory.rows:
            row["step"] += taken - first  # in place: `best` is one of them
        # Where one run ends the next one begins: its first row would stand there twice.
        own = slice(1 if rows else 0, None)
        rows += trajectory.rows[own]
        clock += [seconds + time for time in trajectory.clock[own]]
    first = trajectories[0]
    base, objective = dict(first.base), RateDistortion(chosen.lmbda)
    for kind in ("relaxed", "true"):
        base[f"{kind}_loss"] = objective(base[f"{kind}_bpp"], base[f"{kind}_mse"])
    kept = {"base": first.pictures.get("base"), "refined": chosen.pictures.get("refined")}
    return replace(
        chosen,
        base=base,
        base_latents=first.base_latents,
        rows=rows,
        clock=clock,
        pictures={label: x_hat for label, x_hat in kept.items() if x_hat is not None},
    )
