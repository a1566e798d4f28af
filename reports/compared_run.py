"""One run of a comparison, and which runs can be compared before all are done."""

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from common.files import printable
from common.records import Record, records_in

MOST_NAMED = 5  # runs in a message
# Unrefined results of one picture and model differ less than this between machines.
SAME_BPP = 0.02  # of the rate
SAME_PSNR = 0.2  # dB


class ComparedRun(NamedTuple):
    """One run of a comparison: a method with a model and a seed, and the folder of its results.

    loss: what its loss counts, see `common.records.loss_name`; None: its losses have several
    lambdas, and cannot be compared.
    """

    method: str
    model: str
    seed: int
    folder: Path
    loss: str | None = "mse"


def first_seeds(runs: Sequence[ComparedRun], model: str) -> list[ComparedRun]:
    """The run of each method with a model and the first seed, in the order of methods."""
    found: dict[str, ComparedRun] = {}
    for run in runs:
        if run.model == model:
            found.setdefault(run.method, run)
    return list(found.values())


def runs_to_compare(
    runs: Sequence[ComparedRun], names: Sequence[str], over: Sequence[ComparedRun] = ()
) -> tuple[list[ComparedRun], str]:
    """The runs that are done, and a line that names the others; "" if all are done.

    Runs that are not done are left out, for their few images would be all that can be compared. If
    none is done, those with any image are compared. An image that a run could not refine counts as
    done.

    Args:
        names: the images of each run.
        over: runs that are known to be done; what they lack has failed.
    """
    counts = {run: len(records_in(run.folder).keys() & {*names}) for run in runs}
    unfinished = {
        run: count
        for run, count in counts.items()
        if run not in over and count + len({*names} & _failed_in(run.folder)) < len(names)
    }
    if not unfinished:
        return list(runs), ""
    kept = [run for run in runs if run not in unfinished]
    start = "not done yet, and left out" if kept else "not done yet"
    kept = kept or [run for run in runs if counts[run]]
    return kept, f"{start}: {_in_words(unfinished, len(names))}"


def unlike(runs: Sequence[ComparedRun], key: str) -> str:
    """A line that names results which cannot be compared with those of the first run; "" if none.

    The first run is that with the same model.

    Args:
        key: what must be equal, a key of records such as `weights`; or `picture`: the images' sizes
            and their unrefined results must be alike.
    """
    first: dict[str, tuple[ComparedRun, dict[str, Record]]] = {}
    lines = []
    for run in runs:
        records = records_in(run.folder)
        other, expected = first.setdefault(run.model, (run, records))
        for name in [name for name in records if name in expected]:
            if words := _difference(records[name], expected[name], key):
                lines.append(f"{run.folder}: {words} in {other.folder}")
                break
    return (lines[0] + (f" (and so {len(lines) - 1} more)" if lines[1:] else "")) if lines else ""


def _difference(own: Record, other: Record, key: str) -> str:
    """How two records of an image differ, in words; "" where they do not."""
    if key != "picture":
        same = own.get(key) == other.get(key)
        return "" if same else f"its {key} is {own.get(key)}, but {other.get(key)}"
    if not _is_another_picture(own, other):
        return ""
    name = printable(own["name"])
    return f"its {name} is another picture: {_in_pixels(own)}, but {_in_pixels(other)}"


def _is_another_picture(own: Record, other: Record) -> bool:
    (size, bpp, psnr), (other_size, other_bpp, other_psnr) = _unrefined(own), _unrefined(other)
    return (
        size != other_size
        or abs(bpp - other_bpp) > SAME_BPP * other_bpp
        or abs(psnr - other_psnr) > SAME_PSNR
    )


def _in_pixels(record: Record) -> str:
    size, bpp, psnr = _unrefined(record)
    return f"{size}, unrefined {bpp:.4f} bpp and {psnr:.2f} dB"


def _unrefined(record: Record) -> tuple[str, float, float]:
    """The size, rate and PSNR of an unrefined image; 0 in place of what is not finite."""
    base = record["base"]
    return f"{record['width']}x{record['height']}", base["bpp"] or 0, base["psnr"] or 0


def _failed_in(folder: Path) -> set[str]:
    """The images without a record that a run's summary.json names as failed."""
    with suppress(OSError, ValueError, AttributeError, TypeError):
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        return set(summary.get("failed", ())) - records_in(folder).keys()
    return set()


def _in_words(unfinished: dict[ComparedRun, int], images: int) -> str:
    """The runs with their numbers of images; only some of a long list."""
    several_seeds = len({run.seed for run in unfinished}) > 1
    words = [
        f"{run.method} with {run.model}"
        + (f", seed {run.seed}" if several_seeds else "")
        + f" ({count} of {images}{'' if number else ' images'})"
        for number, (run, count) in enumerate(unfinished.items())
    ]
    more = len(words) - MOST_NAMED
    return ", ".join(words[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
