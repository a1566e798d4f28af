"""`python benchmark.py gpu`: is what a GPU computes right, and how fast is it? See docs/gpu.md."""

import gc
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_bench import FULL, TOY, Bench
from benchmarks.gpu_checks import CHECKS, Check
from benchmarks.gpu_setting import Skipped, one_line
from benchmarks.gpu_speed import Place, Setting, settings
from common.device import is_out_of_memory, pick_device
from common.errors import InputError
from common.measuring import machine_facts
from common.records import write_json
from refinement.batch import ImageError
from train_flexible_inference import BatchTooLargeError

# Seconds from the start, after which no timing begins that would end later. The whole shall end
# within 6 minutes; this leaves some for the start of Python and for wrong expectations.
LIMIT = 330.0

Row = dict[str, Any]


class Report:
    """Prints lines as they come, and keeps all of them in a JSON file.

    Args:
        path: the JSON file, written anew after each line.

    Raises:
        OSError: it cannot be written.
    """

    def __init__(self, path: Path, device: torch.device):
        self.path, self.started = path, time.perf_counter()
        self.rows: dict[str, list[Row]] = {"checks": [], "speed": []}
        self.facts = {**machine_facts(device), "cores": os.cpu_count()}
        self._write()

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.started

    @property
    def speed(self) -> Sequence[Row]:
        """The rows of timings so far."""
        return self.rows["speed"]

    def add(self, part: str, row: Row, line: str) -> None:
        """Print a line and write its row.

        Args:
            part: checks or speed.

        Raises:
            OSError: the file cannot be written.
        """
        self.rows[part].append(row)
        print(line, flush=True)
        self._write()

    def count(self, status: str) -> int:
        """How many rows have this status."""
        return sum(row["status"] == status for rows in self.rows.values() for row in rows)

    def _write(self) -> None:
        seconds = {"seconds": self.elapsed}
        write_json(self.path, {"machine": self.facts, "gpu": {**self.rows, **seconds}})


def check_gpu(device_name: str, checkpoint: str, path: Path) -> int:
    """Check a device and, if it is a GPU, time it; exit code 0, 1 if a line failed.

    Args:
        device_name: cuda, cuda:N, or cpu, which runs the checks alone, at toy size.
        checkpoint: the weights of the shipped size, trained for a lambda of 0.01.
        path: the JSON file with all figures.

    Raises:
        InputError: there is no such device here, or the checkpoint cannot be loaded.
        OSError: the file cannot be written.
    """
    try:
        device = pick_device(device_name)
    except InputError as error:
        raise InputError(f"{error}; --device cpu runs the checks at toy size") from None
    on_gpu = device.type == "cuda"
    bench = Bench(device, checkpoint, FULL if on_gpu else TOY)
    bench.stock  # noqa: B018  a wrong checkpoint is refused before the file is written
    report = Report(path, device)
    facts = report.facts
    print(f"{facts['machine']}, torch {facts['torch']}, {facts['cores']} cores", flush=True)
    run_checks(CHECKS, bench, report)
    if on_gpu:
        run_timings(settings(), Place(device, checkpoint), report)
    counts = {
        status: report.count(status)
        for status in ("passed", "failed", "skipped", "measured", "out of memory", "left out")
    }
    shown = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    print(f"\n{shown}, {report.elapsed:.0f} s\n{path}")
    return 1 if counts["failed"] else 0


def run_checks(checks: Mapping[str, Check], bench: Bench, report: Report) -> None:
    """Run every check; one that raises an error has failed, and the others go on."""
    for name, check in checks.items():
        row = {"name": name, **attempt(partial(finding_of, check, bench))}
        report.add("checks", row, line_of_check(row))


def finding_of(check: Check, bench: Bench) -> Row:
    """The row of a check that raises no error: its status, value, bound and unit."""
    finding = check(bench)
    return {"status": "passed" if finding.passed else "failed", **finding._asdict()}


def run_timings(wanted: Sequence[Setting], place: Place, report: Report) -> None:
    """Time the settings in this order, as long as each is expected to end before `LIMIT`."""
    gc.freeze()  # what is there now is never collected, so `free_memory` is fast
    print(f"\n{place.size[1]}x{place.size[0]} pixels, training on {place.crop}x{place.crop}\n"
          f"{HEADER}", flush=True)  # fmt: skip
    for setting in wanted:
        expected = setting.expected_seconds(report.speed)
        if report.elapsed + expected > LIMIT:
            row = {"status": "left out", "reason": f"takes about {expected:.0f} s"}
        else:
            row = attempt(partial(figures_of, setting, place))
            free_memory()
        row = {**setting.row(), **row}
        report.add("speed", row, line_of_timing(row))
    gc.unfreeze()


def free_memory() -> None:
    """Free what an earlier setting has left: models and graphs, and torch's reserve on the GPU."""
    gc.collect()
    torch.cuda.empty_cache()


def figures_of(setting: Setting, place: Place) -> Row:
    """The row of a timing that raises no error: its status and figures."""
    return {"status": "measured", **setting.measure(place)}


def attempt(run: Callable[[], Row]) -> Row:
    """The row of a check or timing, or that of its failure: with `status` and `reason`."""
    start = time.perf_counter()
    try:
        row = run()
    except Skipped as error:
        row = {"status": "skipped", "reason": str(error)}
    except Exception as error:
        full = is_out_of_memory(error) or isinstance(error, BatchTooLargeError | ImageError)
        row = {"status": "out of memory" if full else "failed", "reason": one_line(error)}
    return {**row, "took": time.perf_counter() - start}


# --- lines ----------------------------------------------------------------------------------------

COLUMNS = (("what", 16), ("loop", 20), ("N", -4), ("batch", -6), ("numbers", 20), ("s/step", -9),
           ("steps/s", -9), ("images/min", -11), ("peak MB", -9))  # fmt: skip
NUMBERS = {"off": "float32", "convolutions": "TF32 convolutions", "on": "TF32"}


def in_columns(cells: Sequence[str]) -> str:
    """A line of the table of timings."""
    padded = (f"{cell:{'<' if width > 0 else '>'}{abs(width)}}"
              for cell, (_, width) in zip(cells, COLUMNS, strict=True))  # fmt: skip
    return " ".join(padded).rstrip()


HEADER = in_columns([name for name, _ in COLUMNS])


def line_of_check(row: Row) -> str:
    """A check as a line: its status, its name, and the figure or the reason."""
    figure = row.get("reason", "")
    if "value" in row:
        sign = "<=" if row["value"] <= row["bound"] else ">"
        figure = f"{row['value']:.3g} {sign} {row['bound']:g} {row['unit']}"
    return f"{_shown(row['status']):8} {row['name']:52} {figure}   ({row['took']:.1f} s)"


def line_of_timing(row: Row) -> str:
    """A timing as a line of the table, or with the reason why there is none."""
    numbers = NUMBERS[row["tf32"]] if row["precision"] == "float32" else row["precision"]
    if row["precision"] == "auto" and "chosen" in row:
        numbers = f"auto: {row['chosen']}"
    cells = [
        row["what"],
        row["loop"],
        str(row.get("N", row["width"]) or ""),
        str(row["batch"]),
        numbers,
    ]
    if row["status"] != "measured":
        return f"{in_columns([*cells, '', '', '', ''])}   {_shown(row['status'])}: {row['reason']}"
    step, pace = row.get("seconds"), row.get("images_per_minute")
    steps = [f"{step:.5f}", f"{1 / step:.2f}", ""] if step else ["", "", f"{pace:.1f}"]
    return in_columns([*cells, *steps, f"{row['peak_mb']:.0f}"])


def _shown(status: str) -> str:
    return "FAILED" if status == "failed" else status
