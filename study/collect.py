"""Collect the losses of the study's comparisons from their folders into two small tables.

python -m study.collect results -o my_study

It reads the runs of example_files/compare/study_*.json that are below `results`, also of a study
that is not finished, and writes losses.csv and curves.csv.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from common.command_line import script_parser
from common.errors import InputError, exits_with_one_line
from common.files import user_path, write_whole
from common.records import records_in
from common.trajectories import read_trajectory
from compare import plan_runs, remarks_on
from config import CompareConfig, load_config
from reports.compared_run import ComparedRun, unlike
from reports.run_tables import mean_trajectory

CONFIGS = Path("example_files/compare")
EARLY = 500  # steps, a quarter of the published recipe
WITH_CURVES = "study_methods"
CURVE = ["study", "method", "model", "step", "loss"]
DIGITS = 6  # significant ones


class ImageRows(NamedTuple):
    """What a run has of one image: the rows of `losses` without and with refinement, and a curve.

    lowest: the lowest true loss so far, `loss`, at each evaluated `step`.
    """

    base: dict[str, Any]
    refined: dict[str, Any]
    lowest: pd.DataFrame


@exits_with_one_line
def main(argv: Sequence[str] | None = None) -> int:
    """Write the two tables; exit code 0, 2 where no run is found."""
    parser = script_parser(__doc__)
    parser.add_argument("results", type=user_path, help="the folder of the comparisons")
    parser.add_argument("-o", "--out", type=user_path, required=True, help="where to write")
    arguments = parser.parse_args(argv)
    losses, curves = collect(Path(arguments.results), CONFIGS)
    for name, table in (("losses", losses), ("curves", curves)):
        path = Path(arguments.out) / f"{name}.csv"
        write_whole(path, partial(table.to_csv, index=False, float_format=f"%.{DIGITS}g"))
        print(f"{path}: {len(table)} rows, {path.stat().st_size / 1000:.0f} kB")
    return 0


def collect(results: Path, configs: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The losses of each image in each run, and the mean curves of some comparisons.

    Raises:
        InputError: `results` has no run of these configs, or one of them is wrong.

    Returns:
        losses: study, method, model, seed, image; the true losses `loss_500`, the lowest of the
        first 500 steps, and `loss`, the lowest of all; bpp, psnr and ms_ssim_db, estimates of the
        refined image. The unrefined images are the method `base`, once for each study and model.
        curves: study, method, model, step, and `loss`: the mean over images of the lowest true loss
        so far. Only of the first seed.
    """
    losses: list[dict[str, Any]] = []
    curves: list[pd.DataFrame] = []
    for path in sorted(configs.glob("study_*.json")):
        config = load_config(path, CompareConfig, [f"output_dir={json.dumps(str(results))}"])
        for run, images in whole_runs(config).items():
            of_run = {"study": config.name, "method": run.method, "model": run.model}
            for base, refined, _ in images:
                losses += [{**of_run, "method": "base", **base}, {**of_run, **refined}]
            if config.name == WITH_CURVES and run.seed == config.seeds[0]:
                curve = mean_trajectory([lowest for *_, lowest in images])
                curves.append(curve.assign(**of_run)[CURVE])
    if not losses:
        raise InputError(f"{results}: no run of {configs}/study_*.json is in it")
    table = pd.DataFrame(losses).drop_duplicates(["study", "method", "model", "seed", "image"])
    return table, pd.concat([pd.DataFrame(columns=CURVE), *curves])


def whole_runs(config: CompareConfig) -> dict[ComparedRun, list[ImageRows]]:
    """What a comparison's runs have of each image.

    Runs without all images of the run that has most are left out, and so are those with others. So
    all means of a study are over the same images. The console names what is left out, and runs
    that were refined with another config, other weights or other pictures.
    """
    runs = plan_runs(config)
    spoiled = unlike([run.compared for run in runs])
    kept = [run for run in runs if run.compared not in spoiled]
    for remark in remarks_on(kept, spoiled):
        print(remark)
    found: dict[ComparedRun, dict[str, ImageRows]] = {}
    for run in (run.compared for run in kept):
        if images := dict(_images_of(run, config.centre_crop)):
            found[run] = images
    if found and len(found) < len(runs):
        print(f"{config.name}: {len(found)} of {len(runs)} runs have results")
    most = max(found.values(), key=len, default={})
    for run, images in list(found.items()):
        if images.keys() != most.keys():
            shared = len(images.keys() & most.keys())
            print(f"left out, with {shared} of the {len(most)} images: {run.folder}")
            del found[run]
    return {run: list(images.values()) for run, images in found.items()}


def _images_of(run: ComparedRun, crop: int | None) -> Iterator[tuple[str, ImageRows]]:
    """The name and the rows of each image of a run that was refined as a crop of this side.

    None: of each image.
    """
    for name, record in records_in(run.folder).items():
        if crop is not None and {record["width"], record["height"]} != {crop}:
            continue
        table = read_trajectory(run.folder, name)
        lowest = pd.DataFrame({"step": table["step"], "loss": table["true_loss"].cummin()})
        base, refined = (
            {"seed": seed, "image": name, "loss_500": early, "loss": side["true_loss"],
             **{key: side[key] for key in ("bpp", "psnr", "ms_ssim_db")}}
            for side, seed, early in (
                (record["base"], 0, record["base"]["true_loss"]),
                (record["refined"], run.seed, lowest.loc[lowest["step"] <= EARLY, "loss"].iloc[-1]),
            )
        )  # fmt: skip
        yield name, ImageRows(base, refined, lowest)


if __name__ == "__main__":
    sys.exit(main())
