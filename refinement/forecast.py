"""How much of several runs is done, and when the rest of them will be."""

import time
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from common.measuring import Cost
from common.records import records_in
from config import RefineConfig
from refinement.descent import cost_in_steps


class Work(NamedTuple):
    """The work of one run: its folder, the names of its images, and the passes of each image."""

    folder: Path
    names: Sequence[str]
    passes: int

    def left(self) -> int:
        """The number of its images that have no record yet."""
        return len({*self.names} - records_in(self.folder).keys())


class Forecast:
    """The part of some runs that is done, in decoder passes, and the time that the rest takes.

    Records are counted when a run begins. Within a run each process is taken to be as fast as this
    one. The time follows from the passes since the forecast was made, by all processes, and so it
    adapts. It is not known before the first image.

    Args:
        works: the runs in their order.
        processes: the number of processes that share each run.
    """

    def __init__(self, works: Sequence[Work], processes: int):
        self.works, self.processes = works, processes
        self._started = time.monotonic()
        self._begin_at(0)
        self._done_before = self._done

    def _begin_at(self, number: int) -> None:
        self._left = [work.left() for work in self.works]  # images
        self._done = sum(
            (len(work.names) - left) * work.passes
            for work, left in zip(self.works, self._left, strict=True)
        )
        self._left[:number] = [0] * number  # what has no record there has failed
        self._number = number

    def work_left(self) -> str:
        """The work that is left, in words: `24 refinements to do, 52,800 decoder passes`."""
        return f"{sum(self._left)} refinements to do, {self._passes_left:,} decoder passes"

    def at_run(self, number: int) -> str:
        """Count what is done when a run begins, all before it being over; returns `in_words`."""
        self._begin_at(number)
        return self.in_words()

    def print_after(self, cost: Cost) -> None:
        """Count a batch of the current run and print `in_words`."""
        images = min(cost.batch * self.processes, self._left[self._number])
        self._left[self._number] -= images
        self._done += images * self.works[self._number].passes
        print(self.in_words(), flush=True)

    def in_words(self) -> str:
        """What is done, e.g. `done: 2 of 8 runs, 31 % of the decoder passes; about 20 min left`."""
        left, since = self._passes_left, self._done - self._done_before
        percent = 100 * self._done // max(self._done + left, 1)
        line = (
            f"done: {self._left.count(0)} of {len(self._left)} runs, "
            f"{percent} % of the decoder passes"
        )
        if left == 0 or since <= 0:
            return line
        return f"{line}; {time_left((time.monotonic() - self._started) * left / since)}"

    @property
    def _passes_left(self) -> int:
        return sum(left * work.passes for work, left in zip(self.works, self._left, strict=True))


def passes_of(config: RefineConfig) -> int:
    """About how many decoder passes an image takes: steps, polish and evaluations."""
    steps = config.tot_inference_iterations
    return steps + cost_in_steps(config.polish_passes) + 2 * (steps // config.eval_freq + 2)


def time_left(seconds: float) -> str:
    """A time in words, and when it will be over: `about 1 h 20 min left, until about 21:40`."""
    hours, minutes = divmod(round(seconds / 60), 60)
    words = " ".join([*([f"{hours} h"] if hours else []), *([f"{minutes} min"] if minutes else [])])
    if not words:
        return "less than a minute left"
    now = datetime.now()
    end = now + timedelta(seconds=seconds)
    clock = f"{end:%H:%M}" if end.date() == now.date() else f"{end:%Y-%m-%d %H:%M}"
    return f"about {words} left, until about {clock}"
