"""Paths as users give them, names that fit, and files that are whole or absent."""

import hashlib
import os
import unicodedata
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

LONGEST_NAME = 255  # bytes, of a file; nearly every file system's


def user_path(text: str) -> str:
    """A path as a user gives it in a config or a command, with ~ expanded.

    Raises:
        ValueError: no path has a null character.
    """
    if "\0" in text:
        raise ValueError("a path has no null character")
    return os.path.expanduser(text)  # noqa: PTH111  pathlib raises on names of no user


def printable(name: str) -> str:
    """A file name as any console, table and plot can show it.

    Bytes that are no text, control characters and line ends are escaped.
    """
    text = os.fsencode(name).decode("utf-8", errors="backslashreplace")
    escaped = ("Cc", "Cs", "Zl", "Zp")
    return "".join(
        ascii(char)[1:-1] if unicodedata.category(char) in escaped else char for char in text
    )


def label_of(name: str) -> str:
    """A file name as a table or a plot has room for it, 40 letters at most."""
    text = printable(name)
    return text if len(text) <= 40 else f"{text[:26]}...{text[-11:]}"


def fitting(name: str, suffix: str = "") -> str:
    """name + suffix, shortened where a file system would not take it.

    Each part of a path that is too long ends in ~ and the start of its SHA-256 instead.
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
    """Let `write` fill a temporary file beside `path`, then rename it to `path`.

    Raises:
        OSError: no folder can be made there, or the disk is full; it names `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    suffix = path.suffix if len(path.suffix) < 20 else ""  # writers may go by it
    temporary = path.with_name(f".{uuid4().hex}.tmp{suffix}")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())  # or a power cut leaves the new name on an empty file
        temporary.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None
    finally:
        with suppress(OSError):
            temporary.unlink()
    return path
