"""The search for the lambda at which an image's file has a wanted size or quality."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, NamedTuple

from architectures import Latents
from coding.adapted import adapted
from coding.coder import Coder, decode_picture, encode_latents
from coding.payload import NOTHING, Adaptation
from config import Target
from metrics import mean_squared_error, ms_ssim, ms_ssim_db, psnr, to_8_bit
from objectives import Problem, RateDistortion
from refinement.batch import Trajectory


class Start(NamedTuple):
    """The start of a refinement: its latents, its step in the schedule, and the noise's number.

    told: what the decoder is told of these latents.
    """

    latents: Latents
    step: int = 0
    trial: int = 0
    told: Adaptation = NOTHING


@dataclass(frozen=True)
class Trial:
    """A refinement at one lambda, and what the target measures of its file."""

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
    """Refine one image, and search the lambda at which its file meets a target.

    The first trial runs the whole schedule, at a lambda that the unrefined file suggests. Each
    later trial corrects lambda and runs the second half of the schedule. It starts from the latents
    of the trial before. The trial closest to the target is the result.

    Args:
        steps: the number of steps of the whole schedule.
        refine_at: refines the image at a lambda, from a start.
        note: called with one line on each trial.

    Returns:
        One trajectory over all trials, and the target's part of the image's record.

    Raises:
        BitstreamError: the latents of a trial cannot be coded.
        ImageError: the loss is not finite at the start.
    """
    target, begin = search.target, Start(problem.model.analyze(problem.x))
    unrefined = measure(problem, coder, begin.latents, target)
    search.begin(unrefined)
    trials: list[Trial] = []
    while search.goes_on:
        trajectory = refine_at(search.lmbda, begin)
        latents = trajectory.finite_latents()
        measured = measure(problem, coder, latents, target, trajectory.told)
        trials.append(Trial(trajectory, measured))
        note(f"lambda {trajectory.lmbda:.4g}: {target.in_words(measured)}")
        if trajectory.stopped:
            break
        search.add(measured)
        begin = Start(latents, steps // 2, len(trials), trajectory.told)
    chosen = min(trials, key=lambda trial: target.miss(trial.measured))
    if target.miss(unrefined) < target.miss(chosen.measured) and target.miss(chosen.measured) > 1:
        first = trials[0].trajectory
        unchanged = replace(first, latents=first.base_latents, best=first.base, told=NOTHING)
        chosen = Trial(unchanged, unrefined)
    outcome = {
        "kind": target.kind, "wanted": target.wanted, "got": chosen.measured,
        "met": target.miss(chosen.measured) <= 1, "stretches": len(trials),
    }  # fmt: skip
    every = [trial.trajectory for trial in trials]
    return concatenate(every, chosen.trajectory, problem.objective), outcome


def measure(
    problem: Problem, coder: Coder, latents: Latents, target: Target, told: Adaptation = NOTHING
) -> float:
    """The bpp of the file of one image's latents, or the quality (dB) of the decoded image.

    Args:
        told: what the decoder is told beside the latents.

    Raises:
        BitstreamError: see `encode_latents`.
        ValueError: the picture is too small for MS-SSIM.
    """
    symbols = adapted(problem.model, told).symbols(latents, problem.size)
    data = encode_latents(coder, symbols, problem.size, told)
    if target.kind == "bpp":
        return 8 * len(data) / problem.pixels
    x_hat, x = to_8_bit(decode_picture(coder, data)), problem.x.cpu()
    if target.kind == "psnr":
        return psnr(mean_squared_error(x_hat, x)).item()
    similarity = ms_ssim(x_hat, x)
    if similarity is None:
        raise ValueError("the picture is too small for MS-SSIM: see Refiner.unfit")
    return ms_ssim_db(similarity).item()


class LambdaSearch:
    """A secant search in log lambda for files that meet a target.

    A larger lambda gives a larger file and a better image. The latents of a trial have not adapted
    to its lambda completely, which makes a secant too flat. So the steepest of the last three is
    used.

    lmbda: the first lambda. usual_lambda: the search does not leave a wide range around it.
    """

    # log bpp, or dB, per unit of log lambda: the slopes of small models, roughly.
    SLOPES = MappingProxyType({"bpp": 0.17, "psnr": 0.8, "ms_ssim_db": 1.2})
    TRIALS, LONGEST_MOVE, REACH = 10, math.log(4), math.log(1024)

    def __init__(self, target: Target, lmbda: float, usual_lambda: float):
        self.target = target
        self.goes_on, self.trials = True, 0
        self.last: tuple[float, float] | None = None  # log lambda, and the error of its file
        self.secants: list[float] = []
        self.log_lmbda, centre = math.log(lmbda), math.log(usual_lambda)
        self.bounds = (
            min(centre - self.REACH, self.log_lmbda),
            max(centre + self.REACH, self.log_lmbda),
        )

    @property
    def lmbda(self) -> float:
        """The lambda to try."""
        return math.exp(self.log_lmbda)

    def begin(self, unrefined: float) -> None:
        """Set the first lambda from the bpp or quality (dB) of the unrefined file."""
        slope = self.SLOPES[self.target.kind]
        self.log_lmbda = self._move(self.log_lmbda, self._error(unrefined), slope)

    def add(self, measured: float) -> None:
        """Add the bpp or quality at this lambda; set the next one, or set `goes_on` to False."""
        error, slope = self._error(measured), self.SLOPES[self.target.kind]
        if self.last is not None and self.last[0] != self.log_lmbda:
            last_log_lmbda, last_error = self.last
            self.secants.append((error - last_error) / (self.log_lmbda - last_log_lmbda))
        if self.secants:
            slope = min(max(*self.secants[-3:], 0.3 * slope), 4 * slope)
        following = self._move(self.log_lmbda, error, slope)
        closer = self.last is None or abs(self.last[1]) - abs(error) > 0.005
        stuck = following == self.log_lmbda and not closer
        self.trials += 1
        self.goes_on = self.target.miss(measured) > 1 and not stuck and self.trials < self.TRIALS
        self.last, self.log_lmbda = (self.log_lmbda, error), following

    def _error(self, measured: float) -> float:
        wanted = self.target.wanted
        if self.target.kind == "bpp":
            return math.log(measured / wanted)
        return min(measured, 99.0) - wanted

    def _move(self, log_lmbda: float, error: float, slope: float) -> float:
        move = min(max(-error / slope, -self.LONGEST_MOVE), self.LONGEST_MOVE)
        return min(max(log_lmbda + move, self.bounds[0]), self.bounds[1])


def concatenate(
    trajectories: Sequence[Trajectory], chosen: Trajectory, objective: RateDistortion
) -> Trajectory:
    """One trajectory with the rows of all, the base of the first, and the result of `chosen`.

    Steps and seconds go on from one trajectory to the next. The base's loss is computed again, at
    the chosen lambda.
    """
    rows: list[dict[str, Any]] = []
    clock: list[float] = []
    for trajectory in trajectories:
        first = trajectory.rows[0]["step"]
        last_step, seconds = (rows[-1]["step"], clock[-1]) if rows else (0, 0.0)
        for row in trajectory.rows:
            row["step"] += last_step - first  # in place, because `best` is one of these rows
        # The first row of a later trajectory repeats the last latents of the one before.
        new = slice(1 if rows else 0, None)
        rows += trajectory.rows[new]
        clock += [seconds + time for time in trajectory.clock[new]]
    first = trajectories[0]
    base, objective = dict(first.base), objective.at(chosen.lmbda)
    for kind in ("relaxed", "true"):
        base[f"{kind}_loss"] = objective(base[f"{kind}_bpp"], base[f"{kind}_distortion"])
    kept = {
        "base": first.reconstructions.get("base"),
        "refined": chosen.reconstructions.get("refined"),
    }
    return replace(
        chosen,
        base=base,
        base_latents=first.base_latents,
        rows=rows,
        clock=clock,
        reconstructions={label: x_hat for label, x_hat in kept.items() if x_hat is not None},
    )
