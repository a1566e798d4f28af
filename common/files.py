"""Paths that users give, names short enough for a file, and files that are whole or absent."""

import hashlib
import os
import unicodedata
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

LONGEST_NAME = 255  # bytes of a file's name, the limit of nearly every file system


def user_path(text: str) -> str:
    """A path as a user gives it in a config or a command, with ~ expanded.

    Raises:
        ValueError: it has a null character.
    """
    if "\0" in text:
        raise ValueError("a path has no null character")
    return os.path.expanduser(text)  # noqa: PTH111  pathlib raises on names of no user


def printable(name: str) -> str:
    """A file name as any console, table and plot can show it.

    Bytes that are no UTF-8, control characters and line ends are escaped.
    """
    text = os.fsencode(name).decode("utf-8", errors="backslashreplace")
    escaped = ("Cc", "Cs", "Zl", "Zp")
    return "".join(
        ascii(char)[1:-1] if unicodedata.category(char) in escaped else char for char in text
    )


def label_of(name: str) -> str:
    """A file name for a table or a plot, shortened to at most 40 letters."""
    text = printable(name)
    return text if len(text) <= 40 else f"{text[:26]}...{text[-11:]}"


def short_enough(name: str, suffix: str = "") -> str:
    """name + suffix, shortened where a file system would refuse it.

    A part of the path over 255 bytes is cut; it then ends in ~ and the start of its SHA-256.
    """
    *folders, last = name.split("/")
    return "/".join((*map(_shortened, folders), _shortened(last, suffix)))


def _shortened(part: str, suffix: str = "") -> str:
    data, room = os.fsencode(part), LONGEST_NAME - len(suffix)
    if len(data) <= room:
        return part + suffix
    digest = hashlib.sha256(data).hexdigest()[:8]
    return f"{data[: room - 9].decode(errors='ignore')}~{digest}{suffix}"


def write_whole(path: Path, write: Callable[[Path], Any]) -> Path:
    """Call `write` with a temporary file beside `path`, then rename that file to `path`.

    Raises:
        OSError: the folder cannot be made, or the file cannot be written; names `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    suffix = path.suffix if len(path.suffix) < 20 else ""  # writers may choose the format by it
    temporary = path.with_name(f".{uuid4().hex}.tmp{suffix}")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())  # else a power cut may leave an empty file
        temporary.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None
    finally:
        with suppress(OSError):
            temporary.unlink()
    return path
