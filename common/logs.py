"""The log of a run, on the console and in a file; and trackers, which get its numbers."""

import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from common.errors import InputError
from common.files import printable
from common.optional_packages import require_package
from common.records import Record

log = logging.getLogger("refine")

# Sends rows of numbers under a name; each row has its `step`.
Tracker = Callable[[str, Sequence[Record]], None]


class _PrintableArguments(logging.Filter):
    """Makes names in log lines printable: they may have line ends, or bytes that are no text."""

    def filter(self, record: logging.LogRecord) -> bool:
        if isinstance(record.args, tuple):
            record.args = tuple(
                printable(str(value)) if isinstance(value, str | Path) else value
                for value in record.args
            )
        return True


log.addFilter(_PrintableArguments())


class _ThroughTqdm(logging.Handler):
    """Prints lines above a progress bar, not through it."""

    def emit(self, record: logging.LogRecord) -> None:
        encoding = sys.stdout.encoding or "utf-8"
        line = self.format(record).encode(encoding, errors="backslashreplace").decode(encoding)
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()


class _LogFile(logging.FileHandler):
    """A log file. If the disk is full, lines are lost, but the run goes on."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  logging's own name
        """Do nothing."""


def start_logging(path: Path) -> None:
    """Log to the console, and with times to the file at `path`; earlier log files are closed.

    Raises:
        OSError: the file cannot be opened.
    """
    for handler in list(log.handlers):
        handler.close()
        log.removeHandler(handler)
    to_file = _LogFile(path, encoding="utf-8", errors="backslashreplace")
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(to_file)
    log.addHandler(_ThroughTqdm())
    log.setLevel(logging.INFO)
    log.propagate = False


def open_tracker(kind: str | None, name: str, folder: Path, config: Record) -> Tracker:
    """The tracker of a run; for None a function that does nothing.

    Args:
        kind: "tensorboard", "wandb" or None.
        name, folder, config: the run's name, its folder, and its config as JSON values.

    Raises:
        InputError: the tracker is not installed.
    """
    if kind == "tensorboard":
        return _open_tensorboard(folder)
    if kind == "wandb":
        return _open_wandb(name, folder, config)
    return lambda name, rows: None


def _open_tensorboard(folder: Path) -> Tracker:
    # tensorboard imports tensorflow if it is installed, which prints much.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    require_package("tensorboard", 'tracker = "tensorboard"')
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"))

    def track(name: str, rows: Sequence[Record]) -> None:
        for row in rows:
            for key, value in row.items():
                if key != "step" and value is not None:
                    writer.add_scalar(f"{printable(name)}/{key}", value, row["step"])
        writer.flush()

    return track


def _open_wandb(name: str, folder: Path, config: Record) -> Tracker:
    try:
        import wandb
    except ImportError:
        raise InputError('tracker = "wandb": not installed; pip install wandb') from None
    session = wandb.init(
        project="overfitting-latents", name=name, group=name, dir=str(folder), config=config
    )

    def track(name: str, rows: Sequence[Record]) -> None:
        for row in rows:
            session.log({f"{printable(name)}/{key}": value for key, value in row.items()})

    return track
