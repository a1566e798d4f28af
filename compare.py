"""Refine one image set by several methods, and report which is better and by how much.

python compare.py --config example_files/compare/recipes_sample.json
python compare.py --config example_files/compare/recipes_sample.json --images PHOTOS --set images=0
torchrun --nproc_per_node=2 compare.py --config example_files/compare/recipes_sample.json --quick

Each method of the config runs with each model and each seed. Finished images are kept, so a stopped
comparison can go on, and a method can be added later. `--quick` uses a few sample photos and short
schedules. Each run has a folder, results/<save_name>/runs/<method>/<model>/. reports/comparison.py
lists the other files in results/<save_name>/.
"""

import json
import sys
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, Self

from common.errors import InputError, exits_with_one_line
from config import (
    DATA_SETS,
    CompareConfig,
    ComparedMethod,
    ComparedModel,
    RefineConfig,
    folder_name,
    load_config,
    parse_command_line,
    read_json_object,
)

# isort: split
import torch

from architectures import Architecture
from common.device import pick_device, pick_precision
from common.measuring import Cost
from common.processes import first_rank_does, join_ranks, ranks_from_environment
from common.records import loss_name, read_records
from common.resuming import stored_precision
from datasets import open_images
from experimental_inference_methods import rounding_from_config
from models import load_checkpoint
from objectives import objective_of
from refinement.descent import cost_in_steps
from refinement.run import RECORDS, folder_of
from refinement.told import check_adapt, use_directions_of
from reports.compared_run import ComparedRun
from reports.comparison import write_report
from reports.comparison_tables import published_curves
from schemas.base import MS_SSIM_LAMBDAS
from train_flexible_inference import refine_images, report


class PlannedRun(NamedTuple):
    """One run of the comparison: a method, a model, a seed, and the config made of them."""

    method: str
    model: ComparedModel
    seed: int
    config: RefineConfig

    @property
    def folder(self) -> Path:
        """The folder of its results."""
        return folder_of(self.config)

    @property
    def loss(self) -> str | None:
        """What its loss counts beside the rate; None: a target has losses of several lambdas."""
        facts = {"objective": self.config.objective, "weighted": self.config.weighted}
        return None if self.config.target else loss_name(facts)

    def in_precision(self, precision: str) -> Self:
        """The same run; `auto` becomes this precision."""
        if self.config.precision != "auto":
            return self
        return self._replace(config=self.config.model_copy(update={"precision": precision}))


@exits_with_one_line
def main(argv: Sequence[str] | None = None) -> int:
    """Run what is not done, then report; exit code 0, 1 if images failed, 2 for wrong input."""
    flags = {"quick": "a few sample photos and short schedules"}
    config = parse_command_line(CompareConfig, __doc__, argv, flags)
    runs = plan_runs(config)
    if any(model.ms_ssim_lambda for model in config.models) and not any(
        run.config.objective == "ms-ssim" for run in runs
    ):
        print("models: ms_ssim_lambda has no effect: no method has the objective ms-ssim")
    device = check_inputs(config, runs)
    ranks = join_ranks()
    precision = first_rank_does(ranks, lambda: precision_of_auto(runs, device))
    runs = [run.in_precision(precision) for run in runs]
    # On the first rank: the others may read records while this one merges them.
    forecast = first_rank_does(ranks, lambda: Forecast(runs, ranks.world))
    if ranks.rank == 0:
        print(forecast.in_words(), flush=True)
    exit_code = 0
    for number, run in enumerate(runs, start=1):
        if ranks.rank == 0:
            print(f"\n[{number} of {len(runs)}] {run.folder}", flush=True)
        on_image = partial(forecast.print_time_left, run) if ranks.rank == 0 else lambda cost: None
        exit_code = max(exit_code, report(refine_images(run.config, on_image)))
    compared = [
        ComparedRun(run.method, run.model.label, run.seed, run.folder, run.loss) for run in runs
    ]
    # Of the first model; if a method has maps, the report shows them.
    of_model = [run.config for run in runs if run.model == runs[0].model]
    first = next((one for one in of_model if one.dev_options.maps), of_model[0])
    page = first_rank_does(ranks, lambda: write_report(config, compared, first, open_images(first)))
    return exit_code if page else 1


def check_inputs(config: CompareConfig, runs: Sequence[PlannedRun]) -> torch.device:
    """Check now what the comparison will need only hours later; return the device.

    Raises:
        InputError: a checkpoint, a published curve or the device is missing or wrong, or a
            method's `adapt` is not for a model.
    """
    published_curves(config.published)
    device = pick_device(config.device, ranks_from_environment().local)
    for pretrain, architecture in {(model.pretrain, model.architecture) for model in config.models}:
        model = load_checkpoint(pretrain, architecture=architecture)
        for run in runs:
            if (run.config.pretrain, run.config.architecture) == (pretrain, architecture):
                _check_adapt(run, model)
    return device


def _check_adapt(run: PlannedRun, model: Architecture) -> None:
    try:
        check_adapt(run.config, model)
        use_directions_of(run.config, model)
    except InputError as error:
        raise InputError(f"methods.{run.method} with {run.model.label}: {error}") from None


def precision_of_auto(runs: Sequence[PlannedRun], device: torch.device) -> str:
    """The one precision of all runs with `auto`: that of their results, else what is faster."""
    folders = [run.folder for run in runs if run.config.precision == "auto"]
    stored = [found for folder in folders if (found := stored_precision(folder, RECORDS))]
    return pick_precision("float32" if not folders else stored[0] if stored else "auto", device)


class Forecast:
    """The number of decoder passes that are left; after the first image also their time."""

    def __init__(self, runs: Sequence[PlannedRun], processes: int):
        self.processes = processes
        self.has_printed_time = False
        self.passes, self.images = 0, 0
        for run in runs:
            done = len(set().union(*map(read_records, run.folder.glob(RECORDS))))
            names = len(open_images(run.config).names)
            left = max(min(run.config.image_count, names) - done, 0)
            self.passes += left * passes_of(run.config)
            self.images += left

    def in_words(self) -> str:
        """The work that is left, for a message."""
        return f"{self.images} refinements to do, {self.passes:,} decoder passes"

    def print_time_left(self, run: PlannedRun, cost: Cost) -> None:
        """Print the time left, from the cost of the first image; do nothing for later images."""
        if not self.has_printed_time:
            self.has_printed_time = True
            left = (self.passes - passes_of(run.config)) / self.processes
            minutes = left * cost.seconds / passes_of(run.config) / 60
            print(f"roughly {minutes:.0f} minutes more here, if images are as large", flush=True)


def passes_of(config: RefineConfig) -> int:
    """About how many decoder passes an image takes: steps, polish and evaluations."""
    steps = config.tot_inference_iterations
    return steps + cost_in_steps(config.polish_passes) + 2 * (steps // config.eval_freq + 2)


def plan_runs(config: CompareConfig) -> list[PlannedRun]:
    """The runs of the comparison: each method with each model and seed.

    Raises:
        InputError: a method's config is missing or wrong, or methods have different targets.
    """
    runs = []
    combinations = product(config.methods.items(), config.models, config.used_seeds)
    for (name, method), model, seed in combinations:
        objective = _objective_of(config, method)
        label = folder_name(model.label) + (f" seed {seed}" if seed else "")
        values = {
            "batch_size": 1,
            "images": config.images,
            **{f"dev_options.{known}": known == config.image_set for known in DATA_SETS},
            **({f"dev_options.path_test.{config.data_set}": config.path} if config.path else {}),
            **config.set,
            **method.set,
            **_maps(config, method),
            "save_name": f"{config.name}/runs/{folder_name(name)}/{label}",
            "output_dir": config.output_dir,
            "train_lambda": model.train_lambda,
            "pretrain": model.pretrain,
            "architecture": model.architecture,
            "dev_options.inference_lambda": model.lambda_for(objective),
            "seed": seed,
            "device": config.device,
            "resume": True,
        }  # fmt: skip
        source = f"methods.{name}, {method.config} and its changes"
        no_lambda = values["dev_options.inference_lambda"] is None
        if objective == "ms-ssim" and no_lambda and model.train_lambda < MS_SSIM_LAMBDAS[0]:
            raise InputError(
                f"models, {model.label}: methods.{name} has the objective ms-ssim, so give the "
                "model an ms_ssim_lambda"
            )
        refine_config = load_config(method.config, RefineConfig, _as_overrides(values), source)
        if config.quick:
            values |= quick_values(config, refine_config)
            refine_config = load_config(method.config, RefineConfig, _as_overrides(values), source)
        try:
            rounding_from_config(refine_config)
            objective_of(refine_config, refine_config.lmbda)
        except InputError as error:
            raise InputError(f"{source}: {error}") from None
        runs.append(PlannedRun(name, model, seed, refine_config))
    targets = {run.method: run.config.target for run in runs}
    if len({*targets.values()}) > 1:
        with_target = next(name for name, target in targets.items() if target)
        raise InputError(
            f"methods.{with_target}: a target must be the same for all methods: put it into set"
        )
    return runs


def _maps(config: CompareConfig, method: ComparedMethod) -> dict[str, str]:
    """The maps of a method, by dotted key; `quick` has other images, so its maps are `auto`."""
    if method.roi is None:
        return {}
    roi = "auto" if config.quick else method.roi
    return {f"dev_options.path_weights.{config.image_set}": roi}


def _objective_of(config: CompareConfig, method: ComparedMethod) -> str:
    """The objective that a method's config and its changes ask for."""
    changes = {**read_json_object(method.config), **config.set, **method.set}
    return str(changes.get("objective", "mse"))


def quick_values(config: CompareConfig, full: RefineConfig) -> dict[str, Any]:
    """The changes of `--quick` to a run's config, by dotted key: a schedule of few steps.

    The steps include the polish. It is left out if its probes would take more than half of them.
    With the schedule `exp` the temperature falls to the same value as in the full run. A constant
    learning rate is raised, at most four times, for otherwise the latents would hardly move.
    """
    options, steps = full.dev_options, full.tot_inference_iterations
    probes = cost_in_steps(full.polish_passes) - full.polish_passes
    passes = full.polish_passes if config.quick_steps >= 2 * probes else 0
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
    if full.optimizer.schedule == "constant" and options.custom_lr is None:
        values["optimizer.lr"] = full.optimizer.lr * min(1 / shrink, 4)
    return values


def _as_overrides(values: dict[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


if __name__ == "__main__":
    sys.exit(main())
