"""Refine one image set by several methods, and report which is better and by how much.

python compare.py --config example_files/compare/recipes_sample.json
python compare.py --config example_files/compare/recipes_sample.json --images PHOTOS --set images=0
torchrun --nproc_per_node=2 compare.py --config example_files/compare/recipes_sample.json --quick
python compare.py --config example_files/compare/recipes_sample.json --only fast --only best
python compare.py --config example_files/compare/recipes_sample.json --report

Each method of the config runs with each model and each seed. Finished images are kept, so a stopped
comparison can go on, and a method can be added later. `--quick` uses a few sample photos and short
schedules. `--only METHOD` refines by some methods; `--report` reports what is done so far. Each run
has a folder, results/<save_name>/runs/<method>/<model>/. reports/comparison.py lists the other
files in results/<save_name>/.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

from common.command_line import Option
from common.errors import InputError, exits_with_one_line
from config import (
    DATA_SETS,
    CompareConfig,
    ComparedMethod,
    ComparedModel,
    RefineConfig,
    load_config,
    parse_command_line,
    read_json_object,
)

# isort: split
import torch

from architectures import Architecture
from common.device import pick_device, pick_precision
from common.images import Images
from common.processes import first_rank_does, join_ranks, ranks_from_environment
from common.records import loss_name, records_in
from common.resuming import stored_precision
from datasets import open_images
from experimental_inference_methods import rounding_from_config
from models import load_checkpoint
from objectives import objective_of
from refinement.descent import cost_in_steps
from refinement.forecast import Forecast, Work, passes_of
from refinement.run import RECORDS, changes_since, folder_of
from refinement.told import check_adapt, use_directions_of
from reports.compared_run import (
    ComparedRun,
    failures_of,
    mixed_precision,
    runs_to_compare,
    unlike,
)
from reports.comparison import write_report
from reports.comparison_tables import published_curves
from schemas.base import MS_SSIM_LAMBDAS
from train_flexible_inference import refine_images, report

OPTIONS = {
    "quick": Option("a few sample photos and short schedules", excludes_images=True),
    "only": Option("refine by this method alone; may stand several times", "METHOD"),
    "report": Option("refine nothing; report what is done so far"),
}


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

    @property
    def names(self) -> list[str]:
        """The names of its images.

        Raises:
            InputError: see `open_images`.
        """
        return open_images(self.config).names[: self.config.image_count]

    @property
    def compared(self) -> ComparedRun:
        """The same run, as reports know it."""
        return ComparedRun(self.method, self.model.label, self.seed, self.folder, self.loss)

    def is_in(self, methods: Sequence[str]) -> bool:
        """Whether its method is one of these; an empty list stands for all."""
        return not methods or self.method in methods

    def in_precision(self, precision: str) -> Self:
        """The same run; `auto` becomes this precision."""
        if self.config.precision != "auto":
            return self
        return self._replace(config=self.config.model_copy(update={"precision": precision}))


@exits_with_one_line
def main(argv: Sequence[str] | None = None) -> int:
    """Run what is not done, then report; exit code 0, 1 if images failed, 2 for wrong input."""
    config = parse_command_line(CompareConfig, __doc__, argv, OPTIONS)
    runs = plan_runs(config)
    if any(model.ms_ssim_lambda for model in config.models) and not any(
        run.config.objective == "ms-ssim" for run in runs
    ):
        print("models: ms_ssim_lambda has no effect: no method has the objective ms-ssim")
    tried = [] if config.report else [run for run in runs if run.is_in(config.only)]
    exit_code = refine_all(config, runs, tried) if tried else 0
    page = first_rank_does(join_ranks(), lambda: report_on(config, runs, tried))
    return exit_code if page else 1


def refine_all(
    config: CompareConfig, runs: Sequence[PlannedRun], tried: Sequence[PlannedRun]
) -> int:
    """Refine the images that are not done, and say how much is done; 1 if images failed, else 0.

    Args:
        runs: all runs of the comparison; their results say what the precision `auto` is.
        tried: those to do.

    Raises:
        InputError, OSError: see `check_inputs` and `refine_images`.
    """
    device = check_inputs(config, tried)
    ranks = join_ranks()
    precision = first_rank_does(ranks, lambda: precision_of_auto(runs, device))
    tried = [run.in_precision(precision) for run in tried]
    forecast = first_rank_does(ranks, lambda: forecast_of(tried, ranks.world))
    if ranks.rank == 0:
        print(forecast.work_left(), flush=True)
    exit_code = 0
    for number, run in enumerate(tried):
        if ranks.rank == 0:
            print(f"\n[{number + 1} of {len(tried)}] {run.folder}", flush=True)
            print(forecast.at_run(number), flush=True)
        on_batch = forecast.print_after if ranks.rank == 0 else lambda cost: None
        exit_code = max(exit_code, report(refine_images(run.config, on_batch)))
    return exit_code


def forecast_of(runs: Sequence[PlannedRun], processes: int) -> Forecast:
    """The forecast of these runs, in their order.

    Raises:
        InputError: see `open_images`.
    """
    works = [Work(run.folder, run.names, passes_of(run.config)) for run in runs]
    return Forecast(works, processes)


def report_on(
    config: CompareConfig, runs: Sequence[PlannedRun], tried: Sequence[PlannedRun]
) -> Path | None:
    """Write the report of what is done; returns its page, or None where nothing can be compared.

    Args:
        tried: the runs of this call. Images that they lack have failed, so none is left out.

    Raises:
        InputError: no image was refined yet; see also `write_report`.
        OSError: see `write_report`.
    """
    over = [run.compared for run in tried]
    # Maps, which another machine may lack, do not change the names.
    names = min(tried or runs, key=lambda run: run.config.dev_options.maps is not None).names
    compared, missing = runs_to_compare([run.compared for run in runs], names, over)
    remarks = [missing] if missing else []
    spoiled = unlike(compared)
    compared = [run for run in compared if run not in spoiled]
    kept = [run for run in runs if run.compared in compared]
    remarks += remarks_on(kept, spoiled, names)
    for remark in remarks:
        print(remark)
    if not compared:
        folder = Path(config.output_dir) / config.name
        raise InputError(f"{folder}: no image was refined yet; run it without --report first")
    configs = {run.model.label: run.config for run in reversed(kept)}
    return write_report(config, compared, configs, _images_of(kept), remarks)


def _images_of(runs: Sequence[PlannedRun]) -> Images:
    """The images of the runs, with maps if a method has some; without, if they cannot be read.

    Raises:
        InputError: see `open_images`.
    """
    without = [run.config for run in runs if run.config.dev_options.maps is None]
    for config in (run.config for run in runs if run.config.dev_options.maps is not None):
        try:
            return open_images(config)
        except InputError as error:
            if not without:
                raise
            print(f"no maps are shown: {error}")
            break
    return open_images(without[0])


def remarks_on(
    runs: Sequence[PlannedRun], spoiled: dict[ComparedRun, str], names: Sequence[str] = ()
) -> list[str]:
    """Lines that name failures, mixed precision, runs of another config, and runs left out.

    Runs may come from several machines, and be older than the config.

    Args:
        runs: those that are compared.
        spoiled: those that are left out, and why, see `unlike`.
        names: the images of each run.
    """
    compared = [run.compared for run in runs]
    left_out = {run.folder: f"left out: {words}" for run, words in spoiled.items()}
    changed = {run.folder: words for run in runs if (words := changes_since(run.config))}
    lines = [
        failures_of(compared, names), mixed_precision(compared),
        _first_of(left_out), _first_of(changed),
    ]  # fmt: skip
    return [line for line in lines if line]


def _first_of(lines: dict[Path, str]) -> str:
    """The first of some remarks on folders, and the number of the others; "" if there is none."""
    if not lines:
        return ""
    folder, words = next(iter(lines.items()))
    return f"{folder}: {words}" + (f" (and so {len(lines) - 1} more)" if len(lines) > 1 else "")


def check_inputs(config: CompareConfig, runs: Sequence[PlannedRun]) -> torch.device:
    """Check now what the comparison will need only hours later; return the device.

    Raises:
        InputError: a checkpoint, a published curve or the device is missing or wrong, a method's
            `adapt` is not for a model, or a run has results of another kind of device.
    """
    published_curves(config.published)
    device = pick_device(config.device, ranks_from_environment().local)
    for pretrain, architecture in {(model.pretrain, model.architecture) for model in config.models}:
        model = load_checkpoint(pretrain, architecture=architecture)
        for run in runs:
            if (run.config.pretrain, run.config.architecture) == (pretrain, architecture):
                _check_adapt(run, model)
    for run in runs:
        _check_device(run, device)
    return device


def _check_adapt(run: PlannedRun, model: Architecture) -> None:
    try:
        check_adapt(run.config, model)
        use_directions_of(run.config, model)
    except InputError as error:
        raise InputError(f"methods.{run.method} with {run.model.label}: {error}") from None


def _check_device(run: PlannedRun, device: torch.device) -> None:
    """Refuse now what `refine_images` would refuse when it comes to this run."""
    for record in records_in(run.folder).values():
        if (before := record.get("device", device.type)) != device.type:
            raise InputError(
                f"{run.folder}: its results were made on {before}, and this is {device.type}; "
                "choose other methods with --only, or report what is done with --report"
            )


def precision_of_auto(runs: Sequence[PlannedRun], device: torch.device) -> str:
    """The one precision of all runs with `auto`: that of their results, else what is faster."""
    folders = [run.folder for run in runs if run.config.precision == "auto"]
    stored = [found for folder in folders if (found := stored_precision(folder, RECORDS))]
    return pick_precision("float32" if not folders else stored[0] if stored else "auto", device)


def plan_runs(config: CompareConfig) -> list[PlannedRun]:
    """The runs of the comparison: each method with each model and seed.

    Raises:
        InputError: a method's config is missing or wrong, or methods have different targets.
    """
    runs = []
    for name, model, seed in config.combinations:
        method = config.methods[name]
        objective = _objective_of(config, method)
        values = {
            "batch_size": config.batch_size,
            "images": config.images,
            "dev_options.centre_crop": config.centre_crop,
            **{f"dev_options.{known}": known == config.image_set for known in DATA_SETS},
            **({f"dev_options.path_test.{config.data_set}": config.path} if config.path else {}),
            **config.set,
            **method.set,
            **_maps(config, method),
            "save_name": config.save_name_of(name, model, seed),
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
    _refuse_other_targets(runs)
    return runs


def _refuse_other_targets(runs: Sequence[PlannedRun]) -> None:
    targets = {run.method: run.config.target for run in runs}
    if len({*targets.values()}) > 1:
        with_target = next(name for name, target in targets.items() if target)
        raise InputError(
            f"methods.{with_target}: a target must be the same for all methods: put it into set"
        )


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
