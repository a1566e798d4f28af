"""Progress of long work: a bar on a terminal, lines in the log elsewhere."""

import shutil
import sys

from torch import Tensor
from tqdm import tqdm

from common.files import label_of
from common.logs import log


def progress_bar(
    total: int | None, label: str | None = None, done: int = 0, unit: str = "it", keep: bool = True
) -> tqdm:
    """A progress bar on a terminal; elsewhere one that shows nothing (its `disable` is True).

    Args:
        total: how many updates there will be; None if unknown.
        done: how many of them were made before.
        keep: leave the bar on the terminal when it is closed.
    """
    # This gives the usual size for a terminal that reports 0.
    columns, lines = shutil.get_terminal_size()
    return tqdm(
        total=total, desc=label, initial=done, unit=unit, leave=keep,
        disable=not sys.stderr.isatty(), ncols=columns, nrows=lines,
    )  # fmt: skip


class Progress:
    """Progress of one image: a bar on a terminal; elsewhere a line every `print_freq` steps."""

    def __init__(self, name: str, total: int | None, print_freq: int):
        self.name, self.total, self.print_freq = name, total, print_freq
        self.steps = 0

    def __enter__(self) -> "Progress":
        self._bar = progress_bar(self.total, label_of(self.name), keep=False)
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def __call__(self, relaxed_loss: Tensor, true_loss: Tensor | float) -> None:
        """Count a step. A loss is read only when it is shown, for reading it waits for a GPU."""
        self._bar.update(1)
        if self._bar.disable:
            if self.steps and self.steps % self.print_freq == 0:
                of_total = f" of {self.total}" if self.total else ""
                log.info("%s: step %d%s, relaxed loss %.4f, true loss %.4f", self.name,
                         self.steps, of_total, relaxed_loss.item(), true_loss)  # fmt: skip
        elif self.steps % 10 == 0:
            self._bar.set_postfix_str(f"loss {relaxed_loss.item():.4f}, true {true_loss:.4f}")
        self.steps += 1

    def note(self, text: str) -> None:
        """Log a line about this image at its current step."""
        log.info("%s: step %d, %s", self.name, self.steps, text)
