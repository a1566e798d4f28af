"""One line for each fault of a class of the user's, in place of a traceback."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import InputError

LONGEST = 240  # characters of a reason


class Fault(Exception):  # noqa: N818  it is turned into an InputError
    """A class of the user's breaks a rule of `Architecture`; the message says which."""


@contextmanager
def users_code(label: str, after: str = "") -> Iterator[None]:
    """Turn any exception of the user's code, `SystemExit` too, into an InputError of one line.

    Args:
        label: `path/to/file.py:Class`.
        after: more words for the end of the line.

    Raises:
        InputError: the code within failed. Its own InputErrors stay as they are.
    """
    try:
        yield
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        kind = "" if isinstance(error, Fault) else f"{type(error).__name__}: "
        reason = " ".join(str(error).split())[:LONGEST]
        line = f"architecture {label}: {place_of(label, error)}{kind}{reason}"
        raise InputError(line.removesuffix(": ") + after) from error


def place_of(label: str, error: BaseException) -> str:
    """`FILE:N: `, where N is the last line of the user's file that the error came through.

    `FILE: ` if it came through no line of this file, and "" if the error is a `Fault` then.

    Args:
        label: `path/to/file.py:Class`; a name without a file has no place.
    """
    path = label.rpartition(":")[0]
    if not path:
        return ""
    if isinstance(error, SyntaxError) and error.lineno:
        return f"{_shown(error.filename or path, path)}:{error.lineno}: "
    line, trace = 0, error.__traceback__
    while trace is not None:
        if _is_same(trace.tb_frame.f_code.co_filename, path):
            line = trace.tb_lineno
        trace = trace.tb_next
    if not line:
        return "" if isinstance(error, Fault) else f"{path}: "
    return f"{path}:{line}: "


def _shown(filename: str, path: str) -> str:
    """The file as the user named it, where it is that file."""
    return path if _is_same(filename, path) else filename


def _is_same(filename: str, path: str) -> bool:
    """Whether both name one file; the import system makes relative paths absolute."""
    return Path(filename).resolve() == Path(path).resolve()
