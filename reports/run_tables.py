"""The numbers of one run: means over its images, and tables as text.

A record is a line of images.jsonl (see `common.records`). A result is that of one image in a test
of a network (see `pretraining.validation.measure`).
"""

import math
from collections.abc import Sequence

import pandas as pd

from common.files import label_of
from common.numbers import mean_of_known, percent_change, rounded
from common.records import Record

# --- a refinement ---------------------------------------------------------------------------------


def mean_trajectory(trajectories: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """The mean over images at each step at which an image was evaluated.

    If an image was not evaluated at a step, its row of the last step before counts.

    Args:
        trajectories: one table for each image, with a column `step`.

    Returns:
        One row for each step: `step`, `images` (their number), and the means of all other columns.
    """
    tables = [table.set_index("step") for table in trajectories]
    steps = sorted(set().union(*(table.index for table in tables)))
    rows = pd.concat([table.reindex(steps, method="ffill") for table in tables])
    table = rows.groupby("step").mean(numeric_only=True)
    table.insert(0, "images", len(tables))
    return table.reset_index()


def summarize(records: Sequence[Record], failed: dict[str, str]) -> Record:
    """Means over the images, and the gain by refinement, for summary.json.

    Args:
        failed: the reasons why images have no record, by name.
    """
    means = {
        side: {
            key: mean_of_known(record[side][key] for record in records) for key in records[0][side]
        }
        for side in ("base", "refined")
    }
    return {
        "images": len(records),
        "failed": failed,
        **means,
        "gain": _gain(means["base"], means["refined"]),
        "targets_met": [record["name"] for record in records if _meets_target(record)],
        "seconds": sum(record["seconds"] for record in records),
        "seconds_per_step": mean_of_known(record["seconds_per_step"] for record in records),
        "stopped_early": [record["name"] for record in records if record["stopped"]],
    }


def _gain(base: Record, refined: Record) -> Record:
    gain = {
        "bpp_percent": percent_change(base["bpp"], refined["bpp"]),
        "psnr_db": _difference(base["psnr"], refined["psnr"]),
        "psnr_raw_db": _difference(base["psnr_raw"], refined["psnr_raw"]),
        "true_loss_percent": percent_change(base["true_loss"], refined["true_loss"]),
    }
    if "file_bpp" in base:
        gain["file_bpp_percent"] = percent_change(base["file_bpp"], refined["file_bpp"])
    return gain


def _difference(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else after - before


def _meets_target(record: Record) -> bool:
    return bool(record.get("target") and record["target"]["met"])


def format_table(records: Sequence[Record], summary: Record) -> str:
    """The table of a run as text: one line for each image, base -> refined, and the mean.

    If files were written, it has their bpp, too. With a target it has each image's lambda in place
    of its losses, for losses at different lambdas cannot be compared.
    """
    width = max(5, *(len(label_of(record["name"])) for record in records))
    files, target = "file_bpp" in records[0]["base"], records[0].get("target")
    columns = [f"{'image':{width}} {'size':>11}"]
    if files:
        columns += [f"{'bpp (estimate)':^16}", f"{'bpp (file)':^25}"]
    else:
        columns += [f"{'bpp':^25}"]
    columns += [f"{'PSNR (dB)':^22}"]
    columns += [f"{'lambda':>8}  {'target':>10}"] if target else [f"{'R-D loss':^25}"]
    header = "  ".join([*columns, f"{'best step':>9}  {'time':>7}"])
    lines = [header, "-" * len(header)]
    for record in records:
        size = f"{record['width']}x{record['height']}"
        tail = f"  {record['best_step']:>9}  {record['seconds']:>5.0f} s"
        name = label_of(record["name"])
        lines.append(f"{name:{width}} {size:>11}{_changes(record)}{tail}")
    lines.append(f"{'mean':{width}} {'':>11}{_changes({'target': target and {}, **summary})}")
    return "\n".join(lines)


def _changes(entry: Record) -> str:
    """The columns between size and best step, for a record or for the means."""
    base, refined = entry["base"], entry["refined"]
    bpp, loss = (base["bpp"], refined["bpp"]), (base["true_loss"], refined["true_loss"])
    psnr = [math.inf if side["psnr"] is None else side["psnr"] for side in (base, refined)]
    gained = 0.0 if psnr[0] == psnr[1] else psnr[1] - psnr[0]
    text = ""
    if "file_bpp" in base:
        text = f"  {bpp[0]:.4f} -> {bpp[1]:.4f}"
        bpp = (base["file_bpp"], refined["file_bpp"])
    text += f"  {bpp[0]:.4f} -> {bpp[1]:.4f} ({percent_change(*bpp):+5.1f}%)"
    text += f"  {psnr[0]:5.2f} -> {psnr[1]:5.2f} ({gained:+.2f})"
    if entry.get("target") is None:
        return text + f"  {loss[0]:.4f} -> {loss[1]:.4f} ({percent_change(*loss):+5.1f}%)"
    if not entry["target"]:
        return text
    met = "met" if entry["target"]["met"] else "not met"
    return text + f"  {entry['lmbda']:>8.4g}  {entry['target']['wanted']:g} {met}"


# --- a test of a network --------------------------------------------------------------------------


def means_of_tests(results: Sequence[Record]) -> Record:
    """Unweighted means over the images without an error, and their number `images`."""
    known = [record for record in results if "error" not in record]
    keys = [key for key in (known or [{}])[0] if key != "name"]
    return {
        "images": len(known),
        **{key: mean_of_known(record[key] for record in known) for key in keys},
    }


def format_tests(results: Sequence[Record], means: Record) -> str:
    """The table of a test as text: one line for each image without an error, and the mean."""
    width = max(5, *(len(label_of(record["name"])) for record in results))
    header = f"{'image':{width}}  {'bpp':>7}  {'PSNR':>6}  {'MS-SSIM':>7}  {'(dB)':>6}  {'loss':>7}"
    lines = [header, "-" * len(header)]
    for record in [*results, {"name": "mean", **means}]:
        if "error" not in record:
            lines.append(
                f"{label_of(record['name']):{width}}  {rounded(record['bpp'], 4):>7}"
                f"  {rounded(record['psnr'], 2):>6}  {rounded(record['ms_ssim'], 4):>7}"
                f"  {rounded(record['ms_ssim_db'], 2):>6}  {rounded(record['loss'], 4):>7}"
            )
    return "\n".join(lines)
