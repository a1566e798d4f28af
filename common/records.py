"""Files of JSON that are whole or absent: one object, or one record a line.

A refinement's images.jsonl has one record an image. The keys that every record has are
`RECORD_KEYS`; its sides `base` and `refined` have `SIDE_KEYS`.
"""

import errno
import json
import math
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from common.files import fitting, write_whole

# A JSON object: a line of images.jsonl or metrics.jsonl, one side of a record.
Record = dict[str, Any]

RECORD_KEYS = frozenset((
    "name", "width", "height", "lmbda", "base", "refined", "best_step", "steps", "stopped",
    "seconds", "seconds_per_step",
))  # fmt: skip
SIDE_KEYS = frozenset(("bpp", "psnr", "psnr_raw", "ms_ssim_db", "true_loss"))


# --- writing --------------------------------------------------------------------------------------


def write_json(path: Path, value: object) -> Path:
    """Write indented JSON; NaN and infinity become null.

    Raises:
        OSError: it cannot be written; names `path`.
    """
    text = json.dumps(finite(value), indent=2) + "\n"
    return write_whole(path, lambda file: file.write_text(text, encoding="utf-8"))


def finite(value: Any) -> Any:
    """A JSON value with None in place of NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def append_record(path: Path, record: Record) -> None:
    """Add one line, which is on the disk when this returns; NaN and infinity become null.

    Raises:
        OSError: it cannot be written; names `path`.
    """
    before = path.stat().st_size if path.is_file() else 0
    try:
        with path.open("ab", buffering=0) as file:
            line = f"{json.dumps(finite(record))}\n".encode()
            if file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file.fileno())
    except OSError as error:
        with suppress(OSError):
            os.truncate(path, before)  # or the next line would begin within this one
        raise OSError(error.errno, error.strerror, str(path)) from None


def write_records(path: Path, records: Iterable[Record]) -> Path:
    """Write one JSON object a line.

    Raises:
        OSError: it cannot be written; names `path`.
    """
    text = "".join(json.dumps(record) + "\n" for record in records)
    return write_whole(path, lambda file: file.write_text(text, encoding="utf-8"))


# --- reading --------------------------------------------------------------------------------------


def read_records(path: Path) -> dict[str, Record]:
    """The records of one images.jsonl by image name; nothing where there is no file.

    Of several records of one image the last counts. A line that is no whole record, such as one
    that a kill tore, is left out: its image is not done.
    """
    if not path.is_file():
        return {}
    records = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError, TypeError, KeyError, AttributeError):
            record = json.loads(line)
            if _is_record(record):
                records[record["name"]] = record
    return records


def _is_record(record: Record) -> bool:
    """Whether a record has all that tables and plots need, a number or null where they need one."""
    numbers = [record[side][key] for side in ("base", "refined") for key in SIDE_KEYS]
    numbers += [record[key] for key in ("seconds", "seconds_per_step", "steps")]
    return record.keys() >= RECORD_KEYS and all(
        value is None or isinstance(value, int | float) for value in numbers
    )


def merge_records(folder: Path, order: Sequence[str]) -> dict[str, Record]:
    """All records in a run's folder by image name; files of single ranks join images.jsonl.

    Args:
        order: image names; their records come first and in this order.

    Raises:
        OSError: images.jsonl cannot be written.
    """
    parts = sorted(folder.glob("images.rank*.jsonl"))
    found = read_records(folder / "images.jsonl")
    for part in parts:
        found |= read_records(part)
    position = {name: index for index, name in enumerate(order)}
    merged = {
        name: found[name]
        for name in sorted(found, key=lambda name: (position.get(name, len(order)), name))
    }
    if parts or (order and list(merged) != list(read_records(folder / "images.jsonl"))):
        write_records(folder / "images.jsonl", merged.values())
        for part in parts:
            part.unlink()
    return merged


def read_metrics(path: Path) -> list[Record]:
    """The rows of a metrics.jsonl; a last line that a kill tore is left out."""
    rows = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):
                rows.append(json.loads(line))
    return rows


# --- what a refinement's records say --------------------------------------------------------------


def result_file(folder: Path, kind: str, name: str, suffix: str = "") -> Path:
    """The file, or the folder, of one image in a run's folder; long names are shortened.

    Args:
        kind: the folder of all files of this kind, such as "latents".
    """
    return folder / kind / fitting(name, suffix)


def rate_of(side: Record) -> float:
    """Bits per pixel of a side's file or, where no file was written, the estimate."""
    estimate: float = side["bpp"]
    return side.get("file_bpp", estimate)
