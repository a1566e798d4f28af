"""What the worker processes of data loading and of conversion do when they start."""

import signal


def leave_signals_to_the_main_process(*_: int) -> None:
    """Ignore SIGINT and SIGTERM, which reach a whole process group: the main process acts on them.

    Takes and ignores the number that torch's data loader gives each worker.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
