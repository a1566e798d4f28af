"""Files of JSON: one object in a file, or one object on each line.

A line of images.jsonl is the record of one image. Every record has `RECORD_KEYS`. Its sides `base`
and `refined` have `SIDE_KEYS`.
"""

import errno
import json
import math
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from common.files import printable, short_enough, write_whole

# A JSON object: a line of images.jsonl or of metrics.jsonl, or a side of a record.
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
    """Append one line, which is on the disk when this returns; NaN and infinity become null.

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
            os.truncate(path, before)  # else the next record would continue this line
        raise OSError(error.errno, error.strerror, str(path)) from None


def write_records(path: Path, records: Iterable[Record]) -> Path:
    """Write one JSON object on each line.

    Raises:
        OSError: it cannot be written; names `path`.
    """
    text = "".join(json.dumps(record) + "\n" for record in records)
    return write_whole(path, lambda file: file.write_text(text, encoding="utf-8"))


# --- reading --------------------------------------------------------------------------------------


def read_records(path: Path) -> dict[str, Record]:
    """The records of an images.jsonl by image name; empty if there is no file.

    If an image has several records, the last one counts. A line that is no whole record is left
    out, such as one that a kill cut off; its image is then not done.
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
    """Whether a record has all keys that tables and plots need, with numbers or null in them."""
    numbers = [record[side][key] for side in ("base", "refined") for key in SIDE_KEYS]
    numbers += [record[key] for key in ("seconds", "seconds_per_step", "steps")]
    return record.keys() >= RECORD_KEYS and all(
        value is None or isinstance(value, int | float) for value in numbers
    )


def rank_file(folder: Path, rank: int) -> Path:
    """The file in which one of several ranks writes its records."""
    return folder / f"images.rank{rank}.jsonl"


def merge_records(folder: Path, order: Sequence[str], world: int = 0) -> dict[str, Record]:
    """All records in a run's folder by image name; the ranks' files are merged into images.jsonl.

    Args:
        order: image names; their records come first, in this order.
        world: the number of ranks that wrote just now. Their files are opened by name, because a
            network drive may be late to list what another machine wrote.

    Raises:
        OSError: images.jsonl cannot be written.
    """
    named = (rank_file(folder, rank) for rank in range(world))
    parts = sorted({*folder.glob("images.rank*.jsonl"), *filter(Path.is_file, named)})
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


def records_in(folder: Path) -> dict[str, Record]:
    """The records in a run's folder by image name, with those that ranks have not merged yet.

    It changes nothing, so the run may go on meanwhile.
    """
    found: dict[str, Record] = {}
    # images.jsonl comes last: whoever merges the parts writes it before it deletes them.
    for part in sorted(folder.glob("images.rank*.jsonl")):
        with suppress(FileNotFoundError):
            found |= read_records(part)
    return read_records(folder / "images.jsonl") | found


def read_metrics(path: Path) -> list[Record]:
    """The rows of a metrics.jsonl; a line that a kill cut off is left out."""
    rows = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):
                rows.append(json.loads(line))
    return rows


# --- what a record refers to ----------------------------------------------------------------------


def result_file(folder: Path, kind: str, name: str, suffix: str = "") -> Path:
    """The path of one image's file, or folder, in a run's folder; long names are shortened.

    Args:
        kind: the subfolder for files of this kind, such as "latents".
    """
    return folder / kind / short_enough(name, suffix)


def rate_of(side: Record) -> float:
    """Bits per pixel of a side's file; the estimate where no file was written."""
    estimate: float = side["bpp"]
    return side.get("file_bpp", estimate)


def loss_name(record: Record, short: bool = False) -> str:
    """What the loss of a record counts beside the rate: `mse`, `ms-ssim, weighted by auto`.

    Args:
        short: leave out by which maps.
    """
    objective: str = record.get("objective", "mse")  # records of older runs have none
    weighted = record.get("weighted")
    if not weighted:
        return objective
    return f"{objective}, weighted" + ("" if short else f" by {printable(weighted)}")
