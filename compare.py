"""Refine one image set by several methods, and say which is better and by how much.

python compare.py --config example_files/compare/sample.json
python compare.py --config example_files/compare/kodak.json --set path=KODAK
torchrun --nproc_per_node=2 compare.py --config example_files/compare/kodak.json --set path=KODAK

Every method of the config meets every model and every seed. What is done is reused, so a stopped
comparison goes on where it was, and a method can be added later. In results/<save_name>/:

    runs/<method>/<model>/   a run of train_flexible_inference.py, whole
    images.csv               every image of every run
    table.csv, table.md      means, and paired differences to the anchor with confidence intervals
    loss.png, loss.svg       true loss over steps and over seconds
"""

import json
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from config import (
    DATA_SETS,
    CompareConfig,
    ComparedModel,
    InputError,
    RefineConfig,
    exits_with_one_line,
    folder_name,
    load_config,
    parse_command_line,
)

# isort: split
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy import stats

import train_flexible_inference
from datasets import write_whole
from experimental_inference_methods import rounding_from_config
from reporting import first_rank_does, join_ranks, read_records

CONFIDENCE = 0.95


class PlannedRun(NamedTuple):
    """One run: a method with a model and a seed, and the config that says so."""

    method: str
    model: ComparedModel
    seed: int
    path: str
    overrides: list[str]
    config: RefineConfig

    @property
    def folder(self) -> Path:
        """Where its results lie."""
        return Path(self.config.output_dir) / self.config.save_name


@exits_with_one_line
def main(argv=None) -> int:
    """Run what is missing, then report; exit code 0, 1 where images failed, 2 for bad input."""
    config = parse_command_line(CompareConfig, "Compare ways to refine an image set.", argv)
    runs = plan_runs(config)
    ranks = join_ranks()
    if ranks.rank == 0:
        steps = sum(run.config.tot_inference_iterations for run in runs) * config.images
        print(f"{len(runs)} runs, at most {steps:,} steps over {config.images} images", flush=True)
    worst = 0
    for number, run in enumerate(runs, start=1):
        if ranks.rank == 0:
            print(f"\n[{number}/{len(runs)}] {run.folder}", flush=True)
        sets = [part for override in run.overrides for part in ("--set", override)]
        code = train_flexible_inference.main(["--config", run.path, *sets])
        if code not in (0, 1):
            return code
        worst = max(worst, code)
    first_rank_does(ranks, lambda: report(config, runs))
    return worst


def plan_runs(config: CompareConfig) -> list[PlannedRun]:
    """Every method with every model and seed, checked before anything runs.

    Raises:
        InputError: a method's config is missing or wrong.
    """
    runs = []
    for method, chosen in config.methods.items():
        for model in config.models:
            for seed in config.seeds:
                label = model.label if len(config.seeds) == 1 else f"{model.label} seed {seed}"
                values = {
                    "batch_size": 1,
                    "tot_batches": config.images,
                    **{f"dev_options.{name}": name == config.data_set for name in DATA_SETS},
                    **({f"dev_options.path_test.{config.data_set}": config.path}
                       if config.path else {}),
                    **chosen.set,
                    "save_name": f"{config.save_name}/runs/{folder_name(method)}/{label}",
                    "output_dir": config.output_dir,
                    "train_lambda": model.train_lambda,
                    "pretrain": model.pretrain,
                    "dev_options.inference_lambda": model.inference_lambda,
                    "seed": seed,
                    "device": config.device,
                    "resume": True,
                }  # fmt: skip
                overrides = [f"{key}={json.dumps(value)}" for key, value in values.items()]
                source = f"methods.{method}, {chosen.config} and its changes"
                refine_config = load_config(chosen.config, RefineConfig, overrides, source)
                rounding_from_config(refine_config)
                runs.append(
                    PlannedRun(method, model, seed, chosen.config, overrides, refine_config)
                )
    return runs


# --- numbers --------------------------------------------------------------------------------------


def report(config: CompareConfig, runs: Sequence[PlannedRun]) -> None:
    """Write every table and plot of finished runs, and print the table.

    Raises:
        OSError: a file cannot be written.
    """
    folder = Path(config.output_dir) / config.save_name
    images = image_table(runs)
    if images.empty:
        raise InputError(f"{folder}: no image was refined")
    table = method_table(images, config)
    text = markdown(table)
    write_whole(folder / "images.csv", lambda file: images.to_csv(file, index=False))
    write_whole(folder / "table.csv", lambda file: table.to_csv(file, index=False))
    write_whole(folder / "table.md", lambda file: file.write_text(text, encoding="utf-8"))
    figure = plot_loss(runs)
    for suffix in ("png", "svg"):
        write_whole(folder / f"loss.{suffix}", figure.savefig)
    print(f"\n{text}\ntables:   {folder}\nplot:     {folder / 'loss.png'}")


def image_table(runs: Iterable[PlannedRun]) -> pd.DataFrame:
    """One row an image, run and seed: what it was before and after, and what that took."""
    rows = []
    for run in runs:
        for record in read_records(run.folder / "images.jsonl").values():
            row = {"method": run.method, "model": run.model.label, "seed": run.seed,
                   "image": record["name"], "lmbda": record["lmbda"]}  # fmt: skip
            for side in ("base", "refined"):
                keys = ("bpp", "psnr", "ms_ssim_db", "true_loss")
                row |= {f"{side}_{key}": record[side][key] for key in keys}
            rows.append(row | {key: record[key] for key in ("steps", "best_step", "seconds")})
    return pd.DataFrame(rows)


def method_table(images: pd.DataFrame, config: CompareConfig) -> pd.DataFrame:
    """One row a model and method: means over the images, and the difference to the anchor.

    Seeds of an image are averaged first; `seed_spread_percent` is their standard deviation, mean
    over images. `change_percent` is the mean over images of loss / anchor's loss - 1, with the half
    width of its Student confidence interval; `change_of_mean_percent` compares the mean losses,
    `group: <name>` is `change_percent` over the images of a group alone. All count the images that
    a method shares with the anchor.
    """
    rows = []
    for model, of_model in images.groupby("model", sort=False):
        grouped = of_model.drop(columns=["model", "seed"]).groupby(["method", "image"], sort=False)
        means, spread = grouped.mean(), grouped["refined_true_loss"].std()
        sides = {"(base)": means.groupby("image").first().filter(like="base_")}
        sides |= {name: means.loc[name].drop(columns=means.filter(like="base_").columns)
                  for name in config.methods if name in means.index}  # fmt: skip
        sides = {name: side.rename(columns=lambda key: key.removeprefix("base_").removeprefix(
            "refined_")) for name, side in sides.items()}  # fmt: skip
        anchor = sides[config.anchor]["true_loss"] if config.anchor in sides else pd.Series()
        for name, side in sides.items():
            row = {"model": model, "method": name, "images": len(side)} | dict(side.mean())
            if name != "(base)":
                relative = spread.loc[name] / side["true_loss"]
                row["seeds"] = of_model.loc[of_model["method"] == name, "seed"].nunique()
                row["seed_spread_percent"] = 100 * relative.mean()
            rows.append(row | _changes(side["true_loss"], anchor, config.groups))
    return pd.DataFrame(rows)


def _changes(own: pd.Series, anchor: pd.Series, groups: dict[str, list[str]]) -> dict[str, float]:
    """What losses by image are beside the anchor's, as `method_table` names it."""
    own, anchor = own.align(anchor, join="inner")
    change = 100 * (own / anchor - 1)
    return {
        "change_percent": change.mean(),
        "half_interval": half_interval(change),
        "change_of_mean_percent": 100 * (own.mean() / anchor.mean() - 1),
        "least_change": change.min(),
        "most_change": change.max(),
        **{f"group: {name}": change[change.index.isin(part)].mean()
           for name, part in groups.items()},
    }  # fmt: skip


def half_interval(values: Sequence[float]) -> float:
    """Half the width of Student's 95 % confidence interval of the mean; NaN for one value."""
    count = len(values)
    if count < 2:
        return math.nan
    quantile = stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)
    return float(quantile * np.std(values, ddof=1) / math.sqrt(count))


def markdown(table: pd.DataFrame) -> str:
    """The table for people; losses' changes are to the anchor."""
    groups = [key for key in table if key.startswith("group: ")]
    heads = ["model", "method", "images", "bpp", "PSNR (dB)", "loss", "change of mean loss",
             "change per image", *(key.removeprefix("group: ") for key in groups), "seeds", "steps",
             "s per image"]  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for _, row in table.iterrows():
        cells = [
            row["model"], row["method"], f"{row['images']:.0f}", f"{row['bpp']:.4f}",
            f"{row['psnr']:.2f}", f"{row['true_loss']:.4f}",
            _percent(row["change_of_mean_percent"]),
            _percent(row["change_percent"], row["half_interval"]),
            *(_percent(row[key]) for key in groups), _seeds(row), _whole(row["steps"]),
            _whole(row["seconds"]),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _percent(value: float, half_interval: float = math.nan) -> str:
    if math.isnan(value):
        return ""
    return f"{value:+.2f}" + ("" if math.isnan(half_interval) else f" ± {half_interval:.2f}") + " %"


def _whole(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.0f}"


def _seeds(row: Any) -> str:
    spread = row["seed_spread_percent"]
    return _whole(row["seeds"]) + ("" if math.isnan(spread) else f" (std {spread:.2f} %)")


# --- plots ----------------------------------------------------------------------------------------


def loss_curves(run: PlannedRun) -> pd.DataFrame:
    """A run's mean true loss over steps and seconds; an image that is done counts on."""
    tables = []
    for name, record in read_records(run.folder / "images.jsonl").items():
        table = pd.read_csv(run.folder / "trajectories" / f"{name}.csv").set_index("step")
        # Records of older runs have no clock.
        clock = record.get("clock") or table.index * record["seconds_per_step"]
        tables.append(table.assign(seconds=clock)[["true_loss", "seconds"]])
    if not tables:
        return pd.DataFrame(columns=["step", "true_loss", "seconds"])
    steps = sorted(set().union(*(table.index for table in tables)))
    rows = pd.concat([table.reindex(steps, method="ffill") for table in tables])
    return rows.groupby("step").mean().reset_index()


def plot_loss(runs: Sequence[PlannedRun]) -> Figure:
    """True loss over steps and over seconds, every method; a row of panels for each model."""
    labels = list(dict.fromkeys(run.model.label for run in runs))
    methods = list(dict.fromkeys(run.method for run in runs))
    figure = Figure(figsize=(11, 4.2 * len(labels)), dpi=130, layout="constrained")
    for label, axes in zip(labels, figure.subplots(len(labels), 2, squeeze=False), strict=True):
        base = None
        for run in (run for run in runs if run.model.label == label and run.seed == runs[0].seed):
            curve = loss_curves(run)
            if curve.empty:
                continue
            base = curve["true_loss"].iloc[0]
            for axis, key in zip(axes, ("step", "seconds"), strict=True):
                color = f"C{methods.index(run.method) % 10}"
                axis.plot(curve[key], curve["true_loss"], color=color, lw=1.5, label=run.method)
                axis.plot(curve[key].iloc[-1], curve["true_loss"].iloc[-1], "o", color=color, ms=5)
        for axis, key in zip(axes, ("step", "seconds per image"), strict=True):
            axis.set(xlabel=key, ylabel="true R-D loss, mean over images", xscale="log",
                     title=label)  # fmt: skip
            axis.grid(alpha=0.3, which="both")
            if base is not None:
                lowest = axis.get_ylim()[0]
                axis.axhline(base, color="grey", ls=":", lw=1, label="base")
                axis.set_ylim(lowest, base + 0.1 * (base - lowest))
        axes[0].legend(fontsize=8)
    return figure


if __name__ == "__main__":
    sys.exit(main())
