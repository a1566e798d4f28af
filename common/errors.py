"""Errors that a user causes, which end a script with one line."""

import functools
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from common.files import printable


class InputError(Exception):
    """A user's input is wrong: one line that names it and says what would be right."""


@contextmanager
def named_by(key: str) -> Iterator[None]:
    """Begin the message of an InputError on a path with the config's key for that path."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{key} = {error}") from None


def exits_with_one_line(main: Callable[..., int]) -> Callable[..., int]:
    """Decorator of a script's `main`: an `InputError` or `OSError` gives one line and code 2.

    An interrupt gives code 130; what was computed is on disk already.
    """

    @functools.wraps(main)
    def guarded(argv: Sequence[str] | None = None) -> int:
        # Names may have letters that the console's encoding lacks.
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            return main(argv)
        except InputError as error:
            print(f"error: {printable(str(error))}", file=sys.stderr)
        except BrokenPipeError:  # the reader of our output, such as head, has ended
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 128 + signal.SIGPIPE
        except OSError as error:
            print(f"error: {printable(reason_of(error))}", file=sys.stderr)
        except KeyboardInterrupt:
            print("interrupted: what was finished is kept", file=sys.stderr)
            return 130
        return 2

    return guarded


def reason_of(error: OSError) -> str:
    """The file and what failed, in one line."""
    name = f"{error.filename}: " if error.filename else ""
    return f"{name}{error.strerror or error}"
