"""What libraries in C write to the console, past Python."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryFile


@contextmanager
def native_stderr() -> Iterator[list[str]]:
    """Keep standard error, the file itself, off the console; the list has its lines afterwards."""
    said: list[str] = []
    sys.stderr.flush()
    kept = os.dup(2)
    with TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield said
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            said += file.read().decode(errors="backslashreplace").splitlines()
