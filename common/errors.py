"""Errors that a user causes, and how a script ends with one line for them."""

import functools
import io
import os
import signal
import sys
from collections.abc import Callable, Sequence

from common.files import printable


class InputError(Exception):
    """Something a user gave is wrong: one line that names it and says what would be right."""


def exits_with_one_line(main: Callable[..., int]) -> Callable[..., int]:
    """Decorator of a script's `main`: an `InputError` or a failing disk is one line and code 2.

    An interrupt is code 130: what was computed is on disk already.
    """

    @functools.wraps(main)
    def guarded(argv: Sequence[str] | None = None) -> int:
        # Names may hold what the console's encoding has no letters for.
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            return main(argv)
        except InputError as error:
            print(f"error: {printable(str(error))}", file=sys.stderr)
        except BrokenPipeError:  # whoever read our output has seen enough
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
    """What failed at which file, as one line says it."""
    name = f"{error.filename}: " if error.filename else ""
    return f"{name}{error.strerror or error}"
