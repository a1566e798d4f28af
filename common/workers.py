"""Worker processes that load or convert data."""

import signal
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from common.errors import InputError


def leave_signals_to_the_main_process(*_: int) -> None:
    """Ignore SIGINT and SIGTERM: the whole process group gets them, the main process handles them.

    The arguments are ignored; torch's data loader passes each worker's number.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def items_of(loader: DataLoader) -> Iterator[Any]:
    """The loader's items.

    Raises:
        InputError: a worker died. What it sends lies in shared memory, of which containers often
            have little.
    """
    # torch's handler would raise where the death happens to be noticed, as in the middle of a step.
    # Without it the loader sees that a worker is gone when it waits for its next item.
    handler = signal.getsignal(signal.SIGCHLD)
    items = iter(loader)
    if signal.getsignal(signal.SIGCHLD) is not handler:
        signal.signal(signal.SIGCHLD, handler)
    try:
        yield from items
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        if "DataLoader worker" not in reason:
            raise
        raise InputError(
            f"num_workers = {loader.num_workers}: {reason}; is /dev/shm full? Take fewer workers "
            "or 0, and resume"
        ) from None
