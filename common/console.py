"""Catch what C libraries write to the console, for Python does not see it."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryFile


@contextmanager
def native_stderr() -> Iterator[list[str]]:
    """Catch standard error, also what C code writes; the list has its lines after the block."""
    lines: list[str] = []
    sys.stderr.flush()
    console = os.dup(2)
    with TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield lines
        finally:
            sys.stderr.flush()
            os.dup2(console, 2)
            os.close(console)
            file.seek(0)
            lines += file.read().decode(errors="backslashreplace").splitlines()
