"""The numbers of one run: means over its images, and tables as text.

A record is a line of images.jsonl (see `common.records`). A result is that of one image in a test
of a network (see `pretraining.validation.measure`).
"""

import math
from collections.abc import Sequence

import pandas as pd

from common.files import label_of
from common.numbers import mean_of_known, percent_change, rounded
from common.records import Record, loss_name

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
            key: mean_of_known(record[side].get(key) for record in records)
            for key in dict.fromkeys(key for record in records for key in record[side])
        }
        for side in ("base", "refined")
    }
    moved = [record["y_bits_moved"] for record in records if "y_bits_moved" in record]
    return {
        "images": len(records),
        "failed": failed,
        **means,
        **({"y_bits_moved": mean_of_known(moved)} if moved else {}),
        "gain": _gain(means["base"], means["refined"]),
        "targets_met": [record["name"] for record in records if _meets_target(record)],
        "seconds": sum(record["seconds"] for record in records),
        "seconds_per_step": mean_of_known(record["seconds_per_step"] for record in records),
        "stopped_early": [record["name"] for record in records if record["stopped"]],
    }


def _gain(base: Record, refined: Record) -> Record:
    gain = {
        "bpp_percent": percent_change(base["bpp"], refined["bpp"]),
        **{
            f"{key.removesuffix('_db')}_db": _difference(base[key], refined[key])
            for key in ("psnr", "psnr_raw", "ms_ssim_db", "psnr_inside", "psnr_outside")
            if key in base
        },
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
    columns += [f"{'PSNR (dB)':^22}", f"{'MS-SSIM (dB)':^22}"]
    loss = f"loss, {loss_name(records[0], short=True)}"
    columns += [f"{'lambda':>8}  {'target':>10}"] if target else [f"{loss:^25}"]
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
    text = ""
    if "file_bpp" in base:
        text = f"  {bpp[0]:.4f} -> {bpp[1]:.4f}"
        bpp = (base["file_bpp"], refined["file_bpp"])
    text += f"  {bpp[0]:.4f} -> {bpp[1]:.4f} ({percent_change(*bpp):+5.1f}%)"
    text += f"  {_gained(base, refined, 'psnr')}  {_gained(base, refined, 'ms_ssim_db')}"
    if entry.get("target") is None:
        return text + f"  {loss[0]:.4f} -> {loss[1]:.4f} ({percent_change(*loss):+5.1f}%)"
    if not entry["target"]:
        return text
    met = "met" if entry["target"]["met"] else "not met"
    return text + f"  {entry['lmbda']:>8.4g}  {entry['target']['wanted']:g} {met}"


def _gained(base: Record, refined: Record, key: str) -> str:
    """A quality in dB before and after; a picture without error has infinite PSNR."""
    if key != "psnr" and None in (base[key], refined[key]):
        return f"{'not known':^22}"
    db = [math.inf if side[key] is None else side[key] for side in (base, refined)]
    gained = 0.0 if db[0] == db[1] else db[1] - db[0]
    return f"{db[0]:5.2f} -> {db[1]:5.2f} ({gained:+.2f})"


def format_regions(records: Sequence[Record], summary: Record) -> str:
    """The table of the maps as text: quality and bits of y inside and outside, base -> refined.

    It has a line for each image with a map, and the mean; "" without maps.
    """
    known = [record for record in records if "y_bits_moved" in record]
    if not known:
        return ""
    width = max(10, *(len(label_of(record["name"])) for record in known))
    header = (
        f"{'image':{width}}  {'PSNR inside (dB)':^22}  {'PSNR outside (dB)':^22}  "
        f"{'bits of y inside':^18}  {'outside':^18}  {'moved':>7}"
    )
    lines = [header, "-" * len(header)]
    mean = "mean" if len(known) == len(records) else f"mean of {len(known)}"
    for entry in [*known, {"name": mean, **summary}]:
        base, refined = entry["base"], entry["refined"]
        bits = "  ".join(
            f"{base[key]:7.0f} -> {refined[key]:7.0f}"
            for key in ("y_bits_inside", "y_bits_outside")
        )
        lines.append(
            f"{label_of(entry['name']):{width}}  {_gained(base, refined, 'psnr_inside')}  "
            f"{_gained(base, refined, 'psnr_outside')}  {bits}  {entry['y_bits_moved']:+7.0f}"
        )
    lines.append("moved: bits of y inside, beyond the base's share of all bits there")
    return "\n".join(lines)


# --- a test of a network --------------------------------------------------------------------------


def means_of_tests(results: Sequence[Record]) -> Record:
    """Unweighted means over the images without an error, and their number `images`."""
    known = [record for record in results if "error" not in record]
    keys = [key for key in (known or [{}])[0] if key != "name"]
    return {
        "images": len(known),
        **{key: mean_of_known(record[key] for record in known) for key in keys},
    }


def format_tests(results: Sequence[Record], means: Record, objective: str = "mse") -> str:
    """The table of a test as text: one line for each image without an error, and the mean.

    Args:
        objective: what the loss counts beside the rate.
    """
    width = max(5, *(len(label_of(record["name"])) for record in results))
    header = f"{'image':{width}}  {'bpp':>7}  {'PSNR':>6}  {'MS-SSIM':>7}  {'(dB)':>6}  "
    header += f"loss, {objective}"
    lines = [header, "-" * len(header)]
    for record in [*results, {"name": "mean", **means}]:
        if "error" not in record:
            lines.append(
                f"{label_of(record['name']):{width}}  {rounded(record['bpp'], 4):>7}"
                f"  {rounded(record['psnr'], 2):>6}  {rounded(record['ms_ssim'], 4):>7}"
                f"  {rounded(record['ms_ssim_db'], 2):>6}  {rounded(record['loss'], 4):>7}"
            )
    return "\n".join(lines)
