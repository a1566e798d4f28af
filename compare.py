"""Refine one image set by several methods, and say which is better and by how much.

python compare.py --config example_files/compare/recipes_sample.json
python compare.py --config example_files/compare/recipes_sample.json --images PHOTOS --set images=0
torchrun --nproc_per_node=2 compare.py --config example_files/compare/recipes_sample.json --quick

Every method of the config meets every model and every seed. What is done is reused, so a stopped
comparison goes on where it was, and a method can be added later. `--quick` takes a few sample
photos and short schedules instead. In results/<save_name>/ each run has its folder,
runs/<method>/<model>/; reports/comparison.py says what lies beside them.
"""

import json
import sys
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from common.errors import InputError, exits_with_one_line
from config import (
    DATA_SETS,
    CompareConfig,
    ComparedModel,
    RefineConfig,
    folder_name,
    load_config,
    parse_command_line,
)

# isort: split
from common.device import pick_device
from common.measuring import Cost
from common.processes import first_rank_does, join_ranks
from common.records import read_records
from datasets import open_images
from experimental_inference_methods import rounding_from_config
from models import load_checkpoint
from refinement.polish import cost_in_steps
from reports.compared_run import ComparedRun
from reports.comparison import write_report
from reports.comparison_tables import published_curves
from train_flexible_inference import refine_images


class PlannedRun(NamedTuple):
    """One run: a method with a model and a seed, and the config that says so."""

    method: str
    model: ComparedModel
    seed: int
    config: RefineConfig

    @property
    def folder(self) -> Path:
        """Where its results lie."""
        return Path(self.config.output_dir) / self.config.save_name


@exits_with_one_line
def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, then report; exit code 0, 1 where images failed, 2 for bad input."""
    flags = {"quick": "a few sample photos and short schedules"}
    config = parse_command_line(CompareConfig, __doc__, argv, flags)
    runs = plan_runs(config)
    refuse_what_is_missing(config)
    ranks = join_ranks()
    forecast = Forecast(runs, ranks.world)
    if ranks.rank == 0:
        print(forecast.in_words(), flush=True)
    worst = 0
    for number, run in enumerate(runs, start=1):
        if ranks.rank == 0:
            print(f"\n[{number} of {len(runs)}] {run.folder}", flush=True)
        on_image = partial(forecast.print_time_left, run) if ranks.rank == 0 else lambda cost: None
        worst = max(worst, refine_images(run.config, on_image))
    compared = [ComparedRun(run.method, run.model.label, run.seed, run.folder) for run in runs]
    first = runs[0].config
    page = first_rank_does(ranks, lambda: write_report(config, compared, first, open_images(first)))
    return worst if page else 1


def refuse_what_is_missing(config: CompareConfig) -> None:
    """Check all that is needed only hours later.

    Raises:
        InputError: a checkpoint, a published curve or the device is missing or wrong.
    """
    published_curves(config.published)
    pick_device(config.device)
    for pretrain in {model.pretrain for model in config.models}:
        load_checkpoint(pretrain)


class Forecast:
    """How many decoder passes are left to do, and, once an image is done, how long they take."""

    def __init__(self, runs: Sequence[PlannedRun], processes: int):
        self.processes = processes
        self.has_printed_time = False
        self.passes, self.images = 0, 0
        for run in runs:
            done = len(set().union(*map(read_records, run.folder.glob("images*.jsonl"))))
            names = len(open_images(run.config).names)
            left = max(min(run.config.image_count, names) - done, 0)
            self.passes += left * passes_of(run.config)
            self.images += left

    def in_words(self) -> str:
        """How much there is to do."""
        return f"{self.images} refinements to do, {self.passes:,} decoder passes"

    def print_time_left(self, run: PlannedRun, cost: Cost) -> None:
        """Print a forecast from what the first image took; of later images do nothing."""
        if not self.has_printed_time:
            self.has_printed_time = True
            left = (self.passes - passes_of(run.config)) / self.processes
            minutes = left * cost.seconds / passes_of(run.config) / 60
            print(f"roughly {minutes:.0f} minutes more here, if images are as large", flush=True)


def passes_of(config: RefineConfig) -> int:
    """About how often an image goes through the decoder: steps, polish, evaluations."""
    steps = config.tot_inference_iterations
    return steps + cost_in_steps(config.polish_passes) + 2 * (steps // config.eval_freq + 2)


def plan_runs(config: CompareConfig) -> list[PlannedRun]:
    """Every method with every model and seed, checked before anything runs.

    Raises:
        InputError: a method's config is missing or wrong.
    """
    runs = []
    combinations = product(config.methods.items(), config.models, config.used_seeds)
    for (name, method), model, seed in combinations:
        label = folder_name(model.label) + (f" seed {seed}" if seed else "")
        values = {
            "batch_size": 1,
            "images": config.images,
            **{f"dev_options.{known}": known == config.image_set for known in DATA_SETS},
            **({f"dev_options.path_test.{config.data_set}": config.path} if config.path else {}),
            **config.set,
            **method.set,
            "save_name": f"{config.name}/runs/{folder_name(name)}/{label}",
            "output_dir": config.output_dir,
            "train_lambda": model.train_lambda,
            "pretrain": model.pretrain,
            "dev_options.inference_lambda": model.inference_lambda,
            "seed": seed,
            "device": config.device,
            "resume": True,
        }  # fmt: skip
        source = f"methods.{name}, {method.config} and its changes"
        refine_config = load_config(method.config, RefineConfig, _as_overrides(values), source)
        if config.quick:
            values |= quick_values(config, refine_config)
            refine_config = load_config(method.config, RefineConfig, _as_overrides(values), source)
        rounding_from_config(refine_config)
        if refine_config.target is not None:
            raise InputError(f"{source}: a target has a lambda for each image; losses say nothing")
        runs.append(PlannedRun(name, model, seed, refine_config))
    return runs


def quick_values(config: CompareConfig, long: RefineConfig) -> dict[str, Any]:
    """What `--quick` changes in a run but its images and seeds: a schedule shrunk to few steps.

    The polish counts as steps; it is left out where its probes would take half of them. Where the
    config sets the temperature by `exp`, it falls over the shorter run as over the long one. A
    constant learning rate is up to four times as high, or nothing would move.
    """
    options, steps = long.dev_options, long.tot_inference_iterations
    probes = cost_in_steps(long.polish_passes) - long.polish_passes
    passes = long.polish_passes if config.quick_steps >= 2 * probes else 0
    left = config.quick_steps - (probes if passes else 0)
    shrink = min(left / (steps + passes), 1)
    values: dict[str, Any] = {
        "images": config.quick_images,
        "tot_inference_iterations": max(round(steps * shrink), 1),
        "polish_passes": round(passes * shrink),
        "eval_freq": max(round(steps * shrink / 10), 1),
    }
    if options.temp_schedule == "exp":
        values["dev_options.temp_rate"] = options.temp_rate / shrink
    if long.optimizer.schedule == "constant" and options.custom_lr is None:
        values["optimizer.lr"] = long.optimizer.lr * min(1 / shrink, 4)
    return values


def _as_overrides(values: dict[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


if __name__ == "__main__":
    sys.exit(main())
