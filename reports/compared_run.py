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


def unlike(runs: Sequence[ComparedRun]) -> dict[ComparedRun, str]:
    """The runs whose results are not of the weights and pictures of most others, and why.

    Runs are compared with those of the same model. Pictures are the same if their sizes are, and
    their unrefined results are alike.
    """
    found = {}
    for model in dict.fromkeys(run.model for run in runs):
        known = {run: records_in(run.folder) for run in runs if run.model == model}
        usual = max(known, key=lambda run: _agreeing(known[run], list(known.values())))
        for run, records in known.items():
            if words := _difference(records, known[usual]):
                found[run] = f"{words} in {usual.folder}"
    return found


def _agreeing(records: dict[str, Record], all_known: Sequence[dict[str, Record]]) -> int:
    """How many runs' results share images with these, and do not differ."""
    sharing = [known for known in all_known if known.keys() & records.keys()]
    return sum(not _difference(records, known) for known in sharing)


def _difference(records: dict[str, Record], others: dict[str, Record]) -> str:
    """The first difference of two runs' results, in words; "" where there is none."""
    for name in [name for name in records if name in others]:
        own, other = records[name], others[name]
        weights = [one.get("weights") for one in (own, other)]
        if None not in weights and weights[0] != weights[1]:  # older records do not have them
            return f"it has other weights: {weights[0]}, but {weights[1]}"
        if _is_another_picture(own, other):
            words = f"{_in_pixels(own)}, but {_in_pixels(other)}"
            return f"its {printable(name)} is another picture: {words}"
    return ""


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


def mixed_precision(runs: Sequence[ComparedRun]) -> str:
    """In which precision the networks of each method computed, in words; "" if it is one."""
    methods: dict[str, dict[str, None]] = {}
    for run in runs:
        for record in records_in(run.folder).values():
            methods.setdefault(str(record.get("precision", "float32")), {})[run.method] = None
    if len(methods) < 2:
        return ""
    words = [f"{name} ({', '.join(own)})" for name, own in methods.items()]
    return f"networks computed in {', '.join(words)}"


def failures_of(runs: Sequence[ComparedRun], names: Sequence[str]) -> str:
    """The images that some run could not refine, with the models, in words; "" if there is none."""
    failed = dict.fromkeys(
        f"{printable(name)} with {run.model}"
        for run in runs for name in sorted(_failed_in(run.folder) & {*names})
    )  # fmt: skip
    return f"failed, and not compared: {', '.join(failed)}" if failed else ""


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
