"""The start of worker processes that load or convert data."""

import signal


def leave_signals_to_the_main_process(*_: int) -> None:
    """Ignore SIGINT and SIGTERM: the whole process group gets them, the main process handles them.

    The arguments are ignored; torch's data loader passes each worker's number.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
