"""A run's folder: records, tables and plots, each file whole or absent.

results/<save_name>/
    config.json          the config with every default filled in
    images.jsonl         one record an image, written the moment it is done; `clock` has the
                         seconds at which each row of its trajectory was there
    latents/*.npz        the refined integer latents
    bitstreams/*.olc     the refined images as files, with `save_bitstreams`
    trajectories/*.csv   each metric at each evaluated step, per image
    reconstructions/     pictures, with `save_final`
    trajectory.csv/.png  the mean over the images
    before_after.png     every image from base to refined; comparison.png with `save_final`
    summary.json, log.txt
"""

import errno
import json
import logging
import math
import os
import platform
import re
import resource
import shutil
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import psutil
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from coding.bitstream import SUFFIX, read_bitstream
from common.errors import InputError, reason_of
from common.files import fitting, label_of, printable, write_whole
from common.images import Images, LoadedImage, save_picture
from common.processes import Ranks, first_rank_does, gather
from common.weights import read_checkpoint
from config import (
    PretrainConfig,
    RefineConfig,
    load_config,
    read_json_object,
    resolved,
)
from models import load_checkpoint, save_checkpoint, save_weights
from pretraining.draws import TrainingData
from refinement.result import Refined

log = logging.getLogger("refine")

# Keys that may change between a run and its resumption: they change no image's result beyond float
# rounding (another device does; the records say which it was, and are compared).
FREE_KEYS = frozenset((
    "resume", "num_workers", "output_dir", "save_name", "print_freq", "tot_batches", "images",
    "batch_size", "tracker", "device", "max_memory_gb",
))  # fmt: skip


ANOTHER_RUN = "choose another save_name, or delete the folder"


# --- files that are whole or absent ---------------------------------------------------------------


def write_json(path: Path, value: Any) -> Path:
    """Indented JSON; NaN and infinity become null."""
    text = json.dumps(_finite(value), indent=2) + "\n"
    return write_whole(path, lambda file: file.write_text(text, encoding="utf-8"))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- a run ----------------------------------------------------------------------------------------


class Run:
    """One run's folder as one process sees it; made by `open_run`."""

    def __init__(self, folder: Path, config: RefineConfig, ranks: Ranks, facts: dict[str, Any]):
        self.folder = folder
        self.config = config
        self.ranks = ranks
        self.facts = facts
        self.failed: dict[str, str] = {}
        self.names: list[str] = []
        own = "images.jsonl" if ranks.world == 1 else f"images.rank{ranks.rank}.jsonl"
        self._own_path = folder / own
        self._mentioned: set[str] = set()
        self._tracker = open_tracker(config, folder)

    def pending(self, images: Images) -> list[str]:
        """The images that this process has to refine: all that are not done, split over the ranks.

        What is not whole is not done, and its record is dropped.
        """
        self.names = images.names[: self.config.image_count]
        todo = first_rank_does(self.ranks, lambda: self._not_done(images))
        return todo[self.ranks.rank :: self.ranks.world]

    def _not_done(self, images: Images) -> list[str]:
        path = self.folder / "images.jsonl"
        found = read_records(path)
        lines = len(path.read_bytes().splitlines()) if path.is_file() else 0
        if lines > len(found):
            log.warning("%s: %d of its lines are no whole records, and dropped", path,
                        lines - len(found))  # fmt: skip
        broken = [name for name in self.names if name in found and not self._is_whole(found[name])]
        kept = [record for name, record in found.items() if name not in broken]
        if path.is_file():
            write_records(path, kept)
        todo = [name for name in self.names if name not in found or name in broken]
        self._announce(images, len(self.names) - len(todo))
        for name in broken:
            log.warning("%s: its results are not whole; it is done again", printable(name))
        return todo

    def _announce(self, images: Images, done: int) -> None:
        found, wanted = len(images.names), self.config.image_count
        target, passes = self.config.target, self.config.polish_passes
        goal = (
            f"files of {target.in_words(target.wanted)}"
            if target
            else (f"lambda {self.facts['lmbda']:g}")
        )
        log.info(
            "%s (%s), %s, %d steps%s, N = %d, M = %d, %s", self.facts["method"],
            self._hyper_parameters() or "no hyper-parameters", goal,
            self.config.tot_inference_iterations,
            f" and {passes} passes of polish" if passes else "", self.facts["N"], self.facts["M"],
            self.facts["device"],
        )  # fmt: skip
        for name in self.config.overruled_methods:
            log.warning("improving_methods.%s has no effect: dev_options' method wins", name)
        if images.passed_over:
            log.info("%s", images.passed_over)
        if found < wanted and not self.config.takes_all_images:
            log.info("the data set has %d images, fewer than the config's %d: each is used once",
                     found, wanted)  # fmt: skip
        if found > wanted:
            log.info("the first %d of %d images, as images or tot_batches * batch_size says",
                     wanted, found)  # fmt: skip
        if done:
            log.info("%d of %d images are done already", done, len(self.names))

    def _hyper_parameters(self) -> str:
        """Names and values, and of those that the config set otherwise what is the method's own."""
        own = self.facts["overridden"]
        return ", ".join(
            f"{key} {_short(value)}"
            + (f" as the config says, not its own {_short(own[key])}" if key in own else "")
            for key, value in self.facts["params"].items()
        )

    def split(self, batch: Sequence[LoadedImage], reason: str) -> None:
        """Say that images which do not go together are tried one by one."""
        log.warning("%s and %d more: %s; one by one now", printable(batch[0].name), len(batch) - 1,
                    reason)  # fmt: skip

    def skip(self, name: str, reason: str) -> None:
        """Note an image that could not be refined; the run goes on and its exit code says so."""
        log.warning("%s: skipped: %s", printable(name), printable(reason))
        self.failed[name] = reason

    def mention(self, name: str, notes: Sequence[str]) -> None:
        """Log what was converted in an image, each kind of conversion once."""
        for note in notes:
            if note not in self._mentioned:
                log.info("%s: %s (said once; images.jsonl has it of each image)", printable(name),
                         note)  # fmt: skip
        self._mentioned.update(notes)

    def progress(self, names: Sequence[str]) -> "Progress":
        """A bar for a batch of images on a terminal, lines elsewhere."""
        open_ended = self.config.target or self.config.max_seconds
        steps = self.config.tot_inference_iterations + len(names) * self.config.polish_passes
        name = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
        return Progress(name, None if open_ended else steps, self.config.print_freq)

    def save(self, image: LoadedImage, result: Refined, cost: "Cost") -> bool:
        """Write all that is known of one image; its record last, which is what makes it done.

        One whose files cannot be written is skipped: False.
        """
        name, record = image.name, self._record(image, result, cost)
        try:
            self._write_files(image, result)
            append_record(self._own_path, record)
        except OSError as error:
            self.skip(name, f"its results cannot be written: {reason_of(error)}")
            return False
        shown = printable(name)
        try:
            self._tracker(shown, result.trajectory.rows)
        except OSError as error:
            log.warning("%s: not sent to the tracker: %s", shown, printable(reason_of(error)))
        if stopped := result.trajectory.stopped:
            log.warning("%s: stopped, %s; kept step %d", shown, stopped, record["best_step"])
        if result.target and not result.target["met"]:
            words = [self.config.target.in_words(result.target[key]) for key in ("wanted", "got")]
            log.warning("%s: the target, %s, was not met; the closest, %s, is kept", shown, *words)
        log.info("%s: %s, best step %d, %.1f s", shown, _in_words(record), record["best_step"],
                 cost.seconds)  # fmt: skip
        return True

    def _write_files(self, image: LoadedImage, result: Refined) -> None:
        name, table = image.name, pd.DataFrame(result.trajectory.rows)
        write_whole(
            self._file("trajectories", name, ".csv"), lambda f: table.to_csv(f, index=False)
        )
        arrays = {latent: v[0].cpu().numpy() for latent, v in result.symbols.items()}
        write_whole(
            self._file("latents", name, ".npz"), lambda file: np.savez_compressed(file, **arrays)
        )
        if result.coded is not None:
            write_whole(
                self._file("bitstreams", name, SUFFIX),
                lambda file: file.write_bytes(result.coded.bitstream),
            )
        if self.config.dev_options.save_final:
            pictures = {label: x_hat[0] for label, x_hat in result.trajectory.pictures.items()}
            for label, x in {"original": image.x, **pictures}.items():
                save_picture(self._file("reconstructions", name) / f"{label}.png", x)

    def _record(self, image: LoadedImage, result: Refined, cost: "Cost") -> dict[str, Any]:
        trajectory = result.trajectory
        files = result.coded.measures if result.coded else {}
        return _finite({
            "name": image.name, "width": image.x.size(2), "height": image.x.size(1),
            "converted": image.notes,
            **{key: self.facts[key] for key in ("method", "params", "weights", "device")},
            "lmbda": trajectory.lmbda, "target": result.target, "seed": self.config.seed,
            "base": _side(trajectory.base) | files.get("base", {}),
            "refined": _side(trajectory.best) | files.get("refined", {}),
            "best_step": trajectory.best["step"], "steps": trajectory.rows[-1]["step"],
            "stopped": trajectory.stopped, "settled": trajectory.settled, **cost._asdict(),
            "clock": [round(seconds, 3) for seconds in trajectory.clock],
        })  # fmt: skip

    def finish(self) -> int:
        """Merge what all processes did, write tables and plots, print them; the exit code.

        Raises:
            OSError: a file cannot be written.
        """
        failed = {key: why for part in gather(self.ranks, self.failed) for key, why in part.items()}
        return first_rank_does(self.ranks, lambda: self._report(failed))

    def _report(self, failed: dict[str, str]) -> int:
        records = merge_records(self.folder, self.names)
        own = [records[name] for name in self.names if name in records]
        if not own:
            log.error("no image was refined")
            return 1
        files = [self._file("trajectories", record["name"], ".csv") for record in own]
        trajectory = mean_trajectory([pd.read_csv(file) for file in files])
        write_whole(
            self.folder / "trajectory.csv", lambda file: trajectory.to_csv(file, index=False)
        )
        summary = summarize(own, failed) | self.facts
        write_json(self.folder / "summary.json", summary)
        log.info("\n%s\n", format_table(own, summary))
        plots = [
            write_whole(self.folder / "trajectory.png", plot_trajectory(trajectory).savefig),
            write_whole(self.folder / "before_after.png", plot_rate_distortion(own).savefig),
        ]
        shown = [record["name"] for record in own
                 if self._file("reconstructions", record["name"]).is_dir()]  # fmt: skip
        if shown:
            figure = plot_comparison(self.folder, own, shown[:4])
            plots.append(write_whole(self.folder / "comparison.png", figure.savefig))
        log.info("results:  %s", self.folder)
        if self.config.writes_files:
            log.info("files:    %s", self.folder / "bitstreams")
        for label, path in zip(("plot:", "plot:", "images:"), plots, strict=False):
            log.info("%-9s %s", label, path)
        if shown:
            log.info("%-9s %s", "images:", self.folder / "reconstructions")
        if failed:
            log.error("failed: %s", printable(", ".join(sorted(failed))))
        return 1 if failed else 0

    def _is_whole(self, record: dict[str, Any]) -> bool:
        """Whether all that an image's record stands for is there and can be read."""
        name = record["name"]
        try:
            table = pd.read_csv(self._file("trajectories", name, ".csv"))
            steps = table["step"]
            sound = {"temperature", "true_loss", "relaxed_loss"} <= {*table.columns} and all(
                kind.kind in "biuf" for kind in table.dtypes
            )
            with np.load(self._file("latents", name, ".npz")) as arrays:
                shapes = [arrays[key].shape for key in ("y", "z")]
            if self.config.writes_files:
                read_bitstream(self._file("bitstreams", name, SUFFIX).read_bytes())
            if self.config.dev_options.save_final:
                for label in ("original", "base", "refined"):
                    with Image.open(self._file("reconstructions", name) / f"{label}.png") as image:
                        image.load()
        except Exception:  # damaged files make their readers raise dozens of kinds
            return False
        rows = len(record.get("clock", steps))  # records of older runs have no clock
        return sound and all(shapes) and len(steps) == rows and steps.iloc[-1] == record["steps"]

    def _file(self, kind: str, name: str, suffix: str = "") -> Path:
        return result_file(self.folder, kind, name, suffix)


def result_file(folder: Path, kind: str, name: str, suffix: str = "") -> Path:
    """Where a run's folder has the file, or the folder, of one image; long names are shortened."""
    return folder / kind / fitting(name, suffix)


def _side(row: dict[str, Any]) -> dict[str, Any]:
    """The true metrics of a trajectory's row, and both losses, as a record names them."""
    true = {key.removeprefix("true_"): row[key] for key in row if key.startswith("true_")}
    loss = true.pop("loss")
    return {**true, "true_loss": loss, "relaxed_loss": row["relaxed_loss"]}


def open_run(config: RefineConfig, ranks: Ranks, facts: dict[str, Any]) -> Run:
    """The run's folder, `output_dir/save_name`, new or to be resumed; logging goes there too.

    Args:
        facts: what summary.json says of the run as a whole: method, weights, device.

    Raises:
        InputError: the folder holds results and `resume` is off, or they were made with another
            config or other weights.
    """
    folder = Path(config.output_dir) / config.save_name
    first_rank_does(ranks, lambda: _prepare_folder(folder, config, facts))
    start_logging(folder / "log.txt")
    return Run(folder, config, ranks, facts)


def _prepare_folder(folder: Path, config: RefineConfig, facts: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    files = [file for file in folder.glob("images*.jsonl") if file.stat().st_size]
    if files and not config.resume:
        count = sum(len(read_records(file)) for file in files)
        raise InputError(
            f"{folder}: holds the results of {count} images; "
            f'go on with "resume": true, or {ANOTHER_RUN}'
        )
    records = merge_records(folder, [])
    if records:
        _refuse_another_config(folder, config, FREE_KEYS)
        for key in ("weights", "device"):
            before = next(iter(records.values())).get(key)
            if before != facts[key]:
                raise InputError(
                    f"{folder}: cannot resume, its results were made with other {key} "
                    f"({before} then, {facts[key]} now); {ANOTHER_RUN}"
                )
    kinds = ("latents", "trajectories", "bitstreams", "reconstructions")
    for place in ("*", *(f"{kind}/**/*" for kind in kinds)):
        for leftover in folder.glob(place):
            if leftover.name.startswith(".") and ".tmp" in leftover.suffixes:
                leftover.unlink()
    write_json(folder / "config.json", resolved(config))


def _refuse_another_config(
    folder: Path, config: RefineConfig | PretrainConfig, free_keys: frozenset[str]
) -> None:
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: has results but no config.json; {ANOTHER_RUN}")
    # Read as a config, so that keys which came after it have their defaults.
    stored, overrides = folder / "config.json", []
    try:
        values = read_json_object(stored)
        if isinstance(config, RefineConfig) and "crop_seed" not in values:
            # It came later: until then the seed of the noise placed the crops too.
            of_crops = values.get("seed", 0) if config.dev_options.pathology else config.crop_seed
            overrides = [f"crop_seed={of_crops}"]
        before = resolved(load_config(stored, type(config), overrides))
    except InputError as error:
        raise InputError(f"{error}; {ANOTHER_RUN}") from None
    now = resolved(config)
    changed = _differences(
        {key: value for key, value in before.items() if key not in free_keys},
        {key: value for key, value in now.items() if key not in free_keys},
    )
    if changed:
        raise InputError(
            f"{folder}: cannot resume, its config differs in {', '.join(changed)}; {ANOTHER_RUN}"
        )


def _differences(before: dict, now: dict, prefix: str = "") -> list[str]:
    found = []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key} ({old!r} then, {new!r} now)")
    return found


# --- a training run -------------------------------------------------------------------------------

FREE_TRAINING_KEYS = frozenset((
    "resume", "num_workers", "output_dir", "save_name", "print_freq", "save_model_freq", "device",
    "keep_checkpoints", "tot_iterations", "tracker", "test", "path_test_data",
))  # fmt: skip
TEST_KEYS = ("loss", "bpp", "bpp_y", "bpp_z", "psnr", "ms_ssim", "ms_ssim_db")
# Skipped images are named in the log up to so many of a kind; all are counted.
NAMED_SKIPS = 100


class TrainingRun:
    """checkpoints/<save_name>/ as one process sees it; only the first rank writes there.

    config.json, log.txt, metrics.jsonl (rows of kind "train" and "test"), iter_<n>.pth.tar (the
    newest few), training.png, and at the end weights.pth.tar, the model alone in half precision.
    """

    def __init__(self, folder: Path, config: PretrainConfig, ranks: Ranks):
        self.folder = folder
        self.config = config
        self.ranks = ranks
        self.skipped: dict[str, str] = {}
        self._skips: Counter[str] = Counter()
        self._untested: set[str] = set()
        self._bar = None
        self._tracker = open_tracker(config, folder) if ranks.rank == 0 else lambda *_: None

    # what went before

    def checkpoint_to_resume(self) -> dict[str, Any] | None:
        """The newest checkpoint that is whole, after which metrics start anew; None in a new run.

        Raises:
            InputError: there are some, but none is whole.
        """
        if not first_rank_does(self.ranks, self._checkpoints):
            return None
        path = first_rank_does(self.ranks, self._newest_whole)
        checkpoint = read_checkpoint(path)
        first_rank_does(self.ranks, lambda: self._forget(checkpoint["iter"]))
        return checkpoint

    def model_to_test(self):
        """The model of the newest checkpoint, or of `pretrain` where there is none."""
        if not self._checkpoints():
            log.info("testing %s", self.config.pretrain)
            return load_checkpoint(self.config.pretrain, self.config.channels)
        path = first_rank_does(self.ranks, self._newest_whole)
        log.info("testing %s", path)
        return load_checkpoint(str(path), self.config.channels)

    def _newest_whole(self) -> Path:
        """The newest checkpoint that can be read; those that cannot get another name."""
        for path in self._checkpoints():
            try:
                checkpoint = read_checkpoint(path)
                if isinstance(checkpoint, dict) and "aux_optimizer_state_dict" in checkpoint:
                    return path
                reason = f"{path}: holds no state of the optimizers"
            except InputError as error:
                reason = str(error).removeprefix("pretrain ")
            log.warning("%s; renamed to *.damaged", reason)
            path.rename(f"{path}.damaged")
        raise InputError(f"{self.folder}: no checkpoint in it can be read; {ANOTHER_RUN}")

    def _checkpoints(self) -> list[Path]:
        """Newest first."""
        found = {
            int(match[1]): path
            for path in self.folder.glob("iter_*.pth.tar")
            if (match := re.fullmatch(r"iter_(\d+)\.pth\.tar", path.name))
        }
        return [found[step] for step in sorted(found, reverse=True)]

    def _forget(self, step: int) -> None:
        """Drop the metrics of steps after `step`, which will be made again, and a torn line."""
        path = self.folder / "metrics.jsonl"
        kept = [row for row in read_metrics(path) if row["step"] <= step]
        if path.is_file():
            write_records(path, kept)

    # the way

    def announce(self, step: int, model: Any, data: TrainingData, device: torch.device) -> None:
        """Log what will be trained on what, and start the progress bar."""
        if self.ranks.rank:
            return
        config = self.config
        start = f"from step {step}" if step else f"from {config.pretrain or 'scratch'}"
        log.info(
            "N = %d, M = %d, lambda %g, %s, %s at %g, batches of %d%s, crops of %d, %d %s, %s (%s)",
            model.N, model.M, config.train_lambda, start, config.optimizer, config.lr.base,
            config.batch_size, f" on each of {self.ranks.world} ranks" * (self.ranks.world > 1),
            config.image_size, data.count, data.name, device, config.precision,
        )  # fmt: skip
        self.mention_passed_over("train_folder", data.passed_over)
        columns, lines = shutil.get_terminal_size()
        self._bar = tqdm(
            total=config.tot_iterations, initial=step, disable=not sys.stderr.isatty(),
            ncols=columns, nrows=lines, unit=" steps",
        )  # fmt: skip

    def mention_passed_over(self, key: str, words: str) -> None:
        """Log what lies in a folder of the config beside images."""
        if words and self.ranks.rank == 0:
            log.info("%s: %s", key, words)

    def skip(self, name: str, reason: str) -> None:
        """Count an image that cannot be trained on, once, and name it in the log."""
        if name in self.skipped:
            return
        kind = self.skipped[name] = reason.partition(":")[0]
        self._skips[kind] += 1
        if self._skips[kind] <= NAMED_SKIPS:
            log.warning("%s: skipped: %s", printable(name), printable(reason))
        if self._skips[kind] == NAMED_SKIPS:
            log.warning("more that are %s are only counted", kind)

    def log_training(self, step: int, values: dict[str, Any], bad_steps: int) -> None:
        """A row of metrics.jsonl and a line of the log; every rank must call this."""
        skipped = self._skips
        if self.ranks.world > 1:  # two ranks may have met the same image
            parts = gather(self.ranks, self.skipped)
            skipped = Counter({name: why for part in parts for name, why in part.items()}.values())
        row = {"kind": "train", "step": step, **values, "bad_steps": bad_steps, "skipped": skipped}
        if self.ranks.rank == 0:
            self._write(row)
            if self._bar is not None:
                self._bar.update(step - self._bar.n)
            log.info(
                "step %d: loss %s, %s bpp, %s dB, lr %.3g, %.2f steps/s, %.1f images/s, "
                "waiting for data %.0f %%", step, _digits(values["loss"], 4),
                _digits(values["bpp"], 4), _digits(values["psnr"], 2), values["lr"],
                values["steps_per_second"], values["images_per_second"],
                100 * values["data_wait_share"],
            )  # fmt: skip

    def log_test(self, step: int, results: Sequence[dict[str, Any]]) -> None:
        """A row of metrics.jsonl with the means over the test images; nothing without images."""
        if not results or self.ranks.rank:
            return
        means = test_means(results)
        path = self.folder / "metrics.jsonl"
        known = ((row["kind"], row["step"]) for row in read_metrics(path))
        if ("test", step) not in known:  # a finished run, resumed, tests again
            self._write({"kind": "test", "step": step, **means})
        log.info("step %d, %d test images: loss %s, %s bpp, %s dB", step, means["images"],
                 _digits(means["loss"], 4), _digits(means["bpp"], 4),
                 _digits(means["psnr"], 2))  # fmt: skip
        self._name_untested(results)

    def _name_untested(self, results: Sequence[dict[str, Any]]) -> None:
        """Log the images that could not be tested, each once."""
        for record in results:
            name = record["name"]
            if "error" in record and name not in self._untested:
                self._untested.add(name)
                log.warning("%s: not tested: %s", printable(name), printable(record["error"]))

    def _write(self, row: dict[str, Any]) -> None:
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(_finite(row)) + "\n")
        numbers = {key: value for key, value in row.items() if isinstance(value, int | float)}
        self._tracker(row["kind"], [numbers])

    def save(self, step: int, model: Any, state: dict[str, Any]) -> None:
        """Write iter_<step>.pth.tar and delete the oldest beyond `keep_checkpoints`."""
        if self.ranks.rank:
            return
        state = {**state, "config": resolved(self.config)}
        save_checkpoint(self.folder / f"iter_{step}.pth.tar", model, state)
        for old in self._checkpoints()[self.config.keep_checkpoints :]:
            old.unlink()

    # the end

    def stopped(self, step: int) -> int:
        """Say where a signal stopped the run; exit code 0."""
        if self.ranks.rank == 0:
            self._close()
            log.info('stopped at step %d and saved; "resume": true goes on from here', step)
        return 0

    def diverged(self, step: int, bad: int) -> int:
        """Say that the run makes no sense any more; exit code 1."""
        if self.ranks.rank == 0:
            self._close()
            kept = next(iter(self._checkpoints()), None)
            log.error(
                "stopped at step %d: %d steps in a row without finite gradients; %s, with a lower "
                "lr.base and another save_name", step, bad,
                f'the last good checkpoint is {kept}: start from it ("pretrain")'
                if kept else "nothing was saved before: start again",
            )  # fmt: skip
        return 1

    def finish(self, step: int, model: Any) -> int:
        """Write the weights alone and the plot, and say where they are; exit code 0."""
        if self.ranks.rank == 0:
            self._close()
            weights = save_weights(self.folder / "weights.pth.tar", model, step)
            log.info("results:  %s", self.folder)
            log.info("weights:  %s", weights)
            if (self.folder / "training.png").is_file():
                log.info("plot:     %s", self.folder / "training.png")
        return 0

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        rows = read_metrics(self.folder / "metrics.jsonl")
        if any(row["kind"] == "train" for row in rows):
            write_whole(self.folder / "training.png", plot_training(rows).savefig)

    def report_test(self, results: Sequence[dict[str, Any]]) -> int:
        """Print the table of a test alone and write test.json; exit code 1 if an image failed."""
        failed = [record for record in results if "error" in record]
        if self.ranks.rank == 0:
            self._name_untested(results)
            if len(failed) < len(results):
                means = test_means(results)
                write_json(self.folder / "test.json", {"mean": means, "images": list(results)})
                log.info("\n%s\n", format_test(results, means))
                log.info("results:  %s", self.folder / "test.json")
        return 1 if failed else 0


def open_training_run(config: PretrainConfig, ranks: Ranks) -> TrainingRun:
    """The run's folder, `output_dir/save_name`, new or to be resumed; logging goes there too.

    Raises:
        InputError: the folder holds checkpoints and `resume` is off, or they were made with
            another config.
    """
    folder = Path(config.output_dir) / config.save_name

    def prepare() -> None:
        holds = any(folder.glob("iter_*.pth.tar"))
        if config.test and not holds and not config.pretrain:
            raise InputError(f"test: no checkpoint in {folder}, and pretrain names none")
        folder.mkdir(parents=True, exist_ok=True)
        if config.test:
            return
        if holds and not config.resume:
            raise InputError(
                f'{folder}: holds checkpoints; go on with "resume": true, or {ANOTHER_RUN}'
            )
        if holds:
            _refuse_another_config(folder, config, FREE_TRAINING_KEYS)
        elif any(folder.glob("*.pth.tar*")):
            raise InputError(
                f"{folder}: holds weights, but no checkpoint that can be read; {ANOTHER_RUN}"
            )
        else:
            (folder / "metrics.jsonl").unlink(missing_ok=True)
        for leftover in folder.glob(".*.tmp*"):
            leftover.unlink()
        write_json(folder / "config.json", resolved(config))

    first_rank_does(ranks, prepare)
    start_logging(folder / "log.txt")
    return TrainingRun(folder, config, ranks)


class Window:
    """Means over the steps since the last reading, kept on the device until they are read."""

    def __init__(self, ranks: Ranks, batch_size: int):
        self.ranks = ranks
        self.batch_size = batch_size
        self._reset()

    def _reset(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._good = self._steps = 0
        self._waited = 0.0
        self._started = time.perf_counter()

    def add(self, terms: dict[str, Tensor] | None, waited: float) -> None:
        """A step's terms, None if it was skipped, and the seconds it waited for data."""
        self._steps += 1
        self._waited += waited
        if terms is not None:
            self._good += 1
            for key, value in terms.items():
                self._sums[key] = self._sums.get(key, 0) + value

    @contextmanager
    def stopped_clock(self) -> Iterator[None]:
        """What happens inside counts in no speed."""
        paused = time.perf_counter()
        yield
        self._started += time.perf_counter() - paused

    def read(self) -> dict[str, float | None]:
        """Means over steps and ranks, and speeds; then starts anew. Every rank must call this."""
        own = {key: value.item() / self._good for key, value in self._sums.items()}
        seconds = time.perf_counter() - self._started
        parts = gather(self.ranks, own)
        means = {
            key: _mean([part.get(key) for part in parts])
            for key in ("loss", "psnr", "bpp", "bpp_y", "bpp_z", "aux_loss")
        }
        speed = self._steps / seconds
        values = {
            **means,
            "steps_per_second": speed,
            "images_per_second": speed * self.batch_size * self.ranks.world,
            "data_wait_share": self._waited / seconds,
        }
        self._reset()
        return values


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line that a kill tore is left out."""
    rows = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):
                rows.append(json.loads(line))
    return rows


def test_means(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Unweighted means over the images that could be tested."""
    known = [record for record in results if "error" not in record]
    return {
        "images": len(known),
        **{key: _mean([record[key] for record in known]) for key in TEST_KEYS},
    }


def format_test(results: Sequence[dict[str, Any]], means: dict[str, Any]) -> str:
    """The table of a test, one line an image and the mean."""
    width = max(5, *(len(label_of(record["name"])) for record in results))
    header = f"{'image':{width}}  {'bpp':>7}  {'PSNR':>6}  {'MS-SSIM':>7}  {'(dB)':>6}  {'loss':>7}"
    lines = [header, "-" * len(header)]
    for record in [*results, {"name": "mean", **means}]:
        if "error" not in record:
            lines.append(
                f"{label_of(record['name']):{width}}  {_digits(record['bpp'], 4):>7}"
                f"  {_digits(record['psnr'], 2):>6}  {_digits(record['ms_ssim'], 4):>7}"
                f"  {_digits(record['ms_ssim_db'], 2):>6}  {_digits(record['loss'], 4):>7}"
            )
    return "\n".join(lines)


def _short(value: Any) -> str:
    return f"{value:.6g}" if type(value) in (int, float) else str(value)


def _digits(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


# --- records --------------------------------------------------------------------------------------


# What every record has, and what its two sides have.
RECORD_KEYS = frozenset((
    "name", "width", "height", "lmbda", "base", "refined", "best_step", "steps", "stopped",
    "seconds", "seconds_per_step",
))  # fmt: skip
SIDE_KEYS = frozenset(("bpp", "psnr", "psnr_raw", "ms_ssim_db", "true_loss"))


def read_records(path: Path) -> dict[str, dict]:
    """The records of one images.jsonl by name, the last of each; none where there is no file.

    What is no whole record, such as a line that a kill tore, is left out: its image is not done.
    """
    if not path.is_file():
        return {}
    records = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError, TypeError, KeyError, AttributeError):
            record = json.loads(line)
            if _is_record(record):
                records[record["name"]] = record
    return records


def _is_record(record: dict[str, Any]) -> bool:
    """Whether all is there that tables and plots are made of; a number or null on each side."""
    numbers = [record[side][key] for side in ("base", "refined") for key in SIDE_KEYS]
    numbers += [record[key] for key in ("seconds", "seconds_per_step", "steps")]
    return record.keys() >= RECORD_KEYS and all(
        value is None or isinstance(value, int | float) for value in numbers
    )


def append_record(path: Path, record: dict) -> None:
    """One more line, on the disk when this returns.

    Raises:
        OSError: it cannot be written; names `path`.
    """
    before = path.stat().st_size if path.is_file() else 0
    try:
        with path.open("ab", buffering=0) as file:
            line = f"{json.dumps(record)}\n".encode()
            if file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file.fileno())
    except OSError as error:
        with suppress(OSError):
            os.truncate(path, before)  # or the next line would begin within this one
        raise OSError(error.errno, error.strerror, str(path)) from None


def write_records(path: Path, records: Iterable[dict]) -> Path:
    """One JSON object a line."""
    text = "".join(json.dumps(record) + "\n" for record in records)
    return write_whole(path, lambda file: file.write_text(text, encoding="utf-8"))


def merge_records(folder: Path, order: Sequence[str]) -> dict[str, dict]:
    """All records in a run's folder; those of single ranks are folded into images.jsonl."""
    parts = sorted(folder.glob("images.rank*.jsonl"))
    found = read_records(folder / "images.jsonl")
    for part in parts:
        found |= read_records(part)
    position = {name: index for index, name in enumerate(order)}
    merged = {
        name: found[name]
        for name in sorted(found, key=lambda name: (position.get(name, len(order)), name))
    }
    if parts or (order and list(merged) != list(read_records(folder / "images.jsonl"))):
        write_records(folder / "images.jsonl", merged.values())
        for part in parts:
            part.unlink()
    return merged


def mean_trajectory(trajectories: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """The mean over images at each evaluated step; where an image has none, its last one counts."""
    tables = [table.set_index("step") for table in trajectories]
    steps = sorted(set().union(*(table.index for table in tables)))
    rows = pd.concat([table.reindex(steps, method="ffill") for table in tables])
    table = rows.groupby("step").mean(numeric_only=True)
    table.insert(0, "images", len(tables))
    return table.reset_index()


def summarize(records: Sequence[dict], failed: dict[str, str]) -> dict[str, Any]:
    """Means over the images and what refinement changed, as summary.json has it."""
    means = {
        side: {key: _mean([record[side][key] for record in records]) for key in records[0][side]}
        for side in ("base", "refined")
    }
    base, refined = means["base"], means["refined"]
    return {
        "images": len(records),
        "failed": failed,
        **means,
        "gain": {
            "bpp_percent": _percent(base["bpp"], refined["bpp"]),
            "psnr_db": _difference(base["psnr"], refined["psnr"]),
            "psnr_raw_db": _difference(base["psnr_raw"], refined["psnr_raw"]),
            "true_loss_percent": _percent(base["true_loss"], refined["true_loss"]),
            **(
                {"file_bpp_percent": _percent(base["file_bpp"], refined["file_bpp"])}
                if "file_bpp" in base
                else {}
            ),
        },
        "targets_met": [record["name"] for record in records if _meets_target(record)],
        "seconds": sum(record["seconds"] for record in records),
        "seconds_per_step": _mean([record["seconds_per_step"] for record in records]),
        "stopped_early": [record["name"] for record in records if record["stopped"]],
    }


def _in_words(record: dict) -> str:
    base, refined = record["base"], record["refined"]
    loss = f"loss {_percent(base['true_loss'], refined['true_loss']):+.2f} %"
    if record.get("target"):  # losses at a lambda that was searched say little
        loss = f"lambda {record['lmbda']:.4g}"
    return f"{_rate(base):.4f} bpp {_db(base)} -> {_rate(refined):.4f} bpp {_db(refined)}, {loss}"


def _rate(side: dict) -> float:
    """Bits per pixel of the file, or, where there is none, as estimated."""
    return side.get("file_bpp", side["bpp"])


def _db(side: dict) -> str:
    return "inf dB" if side["psnr"] is None else f"{side['psnr']:.2f} dB"


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _difference(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else after - before


def _percent(before: float, after: float) -> float:
    return 100 * (after / before - 1)


def format_table(records: Sequence[dict], summary: dict[str, Any]) -> str:
    """The before/after table, one line an image and the mean.

    Where files were written: their bpp beside the estimate, and quality from the decoded files.
    With a target: each image's lambda in place of losses, which have different lambdas.
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


def _changes(entry: dict[str, Any]) -> str:
    """The columns between an image's size and its time, of a record or of the means."""
    base, refined = entry["base"], entry["refined"]
    bpp, loss = (base["bpp"], refined["bpp"]), (base["true_loss"], refined["true_loss"])
    psnr = [math.inf if side["psnr"] is None else side["psnr"] for side in (base, refined)]
    gained = 0.0 if psnr[0] == psnr[1] else psnr[1] - psnr[0]
    text = ""
    if "file_bpp" in base:
        text = f"  {bpp[0]:.4f} -> {bpp[1]:.4f}"
        bpp = (base["file_bpp"], refined["file_bpp"])
    text += f"  {bpp[0]:.4f} -> {bpp[1]:.4f} ({_percent(*bpp):+5.1f}%)"
    text += f"  {psnr[0]:5.2f} -> {psnr[1]:5.2f} ({gained:+.2f})"
    if entry.get("target") is None:
        return text + f"  {loss[0]:.4f} -> {loss[1]:.4f} ({_percent(*loss):+5.1f}%)"
    if not entry["target"]:
        return text
    met = "met" if entry["target"]["met"] else "not met"
    return text + f"  {entry['lmbda']:>8.4g}  {entry['target']['wanted']:g} {met}"


def _meets_target(record: dict[str, Any]) -> bool:
    return bool(record.get("target") and record["target"]["met"])


# --- plots ----------------------------------------------------------------------------------------

RELAXED, TRUE = "tab:orange", "tab:blue"
# Names may have letters that no font here has; a box stands for each.
warnings.filterwarnings("ignore", message="Glyph .* missing from")


def plot_trajectory(table: pd.DataFrame) -> Figure:
    """Relaxed and true loss, bpp and PSNR over the steps, with the temperature."""
    figure = Figure(figsize=(13, 3.8), dpi=120, layout="constrained")
    panels = (
        ("loss", "R-D loss"),
        ("bpp", "bits per pixel"),
        ("psnr_raw", "PSNR (dB, raw floats)"),
    )
    for axis, (key, label) in zip(figure.subplots(1, 3), panels, strict=True):
        axis.plot(table["step"], table[f"relaxed_{key}"], color=RELAXED, lw=1, label="relaxed")
        axis.plot(table["step"], table[f"true_{key}"], color=TRUE, lw=1.8, label="true")
        axis.axhline(
            table[f"true_{key}"].iloc[0], color="grey", lw=0.8, ls=":", label="base (true)"
        )
        axis.set(xlabel="step", ylabel=label)
        axis.grid(alpha=0.3)
        heat = axis.twinx()
        heat.plot(table["step"], table["temperature"], color="tab:red", lw=0.8, ls="--", alpha=0.6)
        heat.set(ylim=(0, 1.02))
        heat.tick_params(axis="y", colors="tab:red", labelsize=7)
        if key == "psnr_raw":
            heat.set_ylabel("temperature (dashed)", color="tab:red", fontsize=8)
        if key == "loss":
            axis.legend(fontsize=8)
    count = int(table["images"].max())
    figure.suptitle(f"Refinement, mean over {count} image{'s' if count > 1 else ''}", fontsize=10)
    return figure


def plot_training(rows: Sequence[dict[str, Any]]) -> Figure:
    """Loss, rate and quality over the steps of training, and of the tests between."""
    figure = Figure(figsize=(13, 3.8), dpi=120, layout="constrained")
    panels = (("loss", "R-D loss"), ("bpp", "bits per pixel"), ("psnr", "PSNR (dB)"))
    for axis, (key, label) in zip(figure.subplots(1, 3), panels, strict=True):
        for kind, style in (
            ("train", {"color": RELAXED}),
            ("test", {"color": TRUE, "marker": "o"}),
        ):
            known = [row for row in rows if row["kind"] == kind and row.get(key) is not None]
            if known:
                x, y = zip(*((row["step"], row[key]) for row in known), strict=True)
                name = "training crops, noise" if kind == "train" else "test images, rounded"
                axis.plot(x, y, lw=1.2, ms=4, label=name, **style)
        axis.set(xlabel="step", ylabel=label, yscale="log" if key == "loss" else "linear")
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=8)
    return figure


def plot_rate_distortion(records: Sequence[dict]) -> Figure:
    """Every image's way from base to refined in the rate-distortion plane, and the mean's."""
    lmbdas = {record["lmbda"] for record in records}
    lmbda = f"lambda {min(lmbdas):.3g}" + (f" to {max(lmbdas):.3g}" if len(lmbdas) > 1 else "")
    title = f"{records[0]['method']}, {lmbda}\nup and to the left is better"
    figure = Figure(figsize=(6.4, 4.8), dpi=120, layout="constrained")
    axis = figure.subplots()
    known = [r for r in records if None not in (r["base"]["psnr"], r["refined"]["psnr"])]
    points = {
        side: np.array([[_rate(r[side]), r[side]["psnr"]] for r in known]).reshape(-1, 2)
        for side in ("base", "refined")
    }
    for start, end in zip(points["base"], points["refined"], strict=True):
        axis.annotate("", xy=end, xytext=start, arrowprops={"arrowstyle": "->", "color": "grey"})
    mean = {side: values.mean(axis=0) for side, values in points.items() if len(values)}
    if len(known) > 1:
        axis.annotate("", xy=mean["refined"], xytext=mean["base"],
                      arrowprops={"arrowstyle": "->", "lw": 2})  # fmt: skip
        axis.annotate("mean", mean["base"], textcoords="offset points", xytext=(6, 3))
    axis.scatter(*points["base"].T, color=RELAXED, label="base", zorder=3, s=22)
    axis.scatter(*points["refined"].T, color=TRUE, label="refined", zorder=3, s=22)
    if len(known) <= 12:
        for record, point in zip(known, points["refined"], strict=True):
            axis.annotate(
                label_of(Path(record["name"]).stem), point, parse_math=False,
                textcoords="offset points", xytext=(6, 3),
                fontsize=8,
            )  # fmt: skip
    kind = "of the files" if "file_bpp" in records[0]["base"] else "(estimate)"
    axis.set(xlabel=f"bits per pixel {kind}", ylabel="PSNR (dB)", title=title)
    axis.margins(0.18)
    axis.grid(alpha=0.3)
    axis.legend()
    return figure


def plot_comparison(folder: Path, records: Sequence[dict], names: Sequence[str]) -> Figure:
    """Original, base and refined, a detail of each image: where refinement changed most.

    Args:
        folder: the run's.
    """
    by_name = {record["name"]: record for record in records}
    figure = Figure(figsize=(9, 3.2 * len(names) + 0.4), dpi=110, layout="constrained")
    figure.suptitle(
        f"Details of {len(names)} of {len(records)} images; bpp and PSNR are of the whole image",
        fontsize=9,
    )
    axes = figure.subplots(len(names), 3, squeeze=False)
    for row, name in zip(axes, names, strict=True):
        record = by_name[name]
        pictures = {
            label: np.asarray(
                Image.open(result_file(folder, "reconstructions", name) / f"{label}.png")
            )
            for label in ("original", "base", "refined")
        }
        window = most_improved(*pictures.values())
        for axis, (label, picture) in zip(row, pictures.items(), strict=True):
            axis.imshow(picture[window], interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            title = f"{label_of(name)}: {label}"
            if label != "original":
                side = record[label]
                db = "" if side["psnr"] is None else f", {side['psnr']:.2f} dB"
                title = f"{label}: {_rate(side):.3f} bpp{db}"
            axis.set_title(title, fontsize=9, parse_math=False)
    return figure


def most_improved(original: np.ndarray, base: np.ndarray, refined: np.ndarray) -> tuple:
    """The window of at most 160x160 pixels whose squared error fell most."""

    def error(picture: np.ndarray) -> np.ndarray:
        return ((picture.astype(float) - original) ** 2).sum(axis=2)

    gain = np.pad(error(base) - error(refined), ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    height, width = (min(160, side) for side in original.shape[:2])
    sums = (
        gain[height:, width:] - gain[:-height, width:] - gain[height:, :-width]
        + gain[:-height, :-width]
    )  # fmt: skip
    top, left = np.unravel_index(np.argmax(sums), sums.shape)
    return slice(top, top + height), slice(left, left + width)


# --- the console, the log, trackers ---------------------------------------------------------------


class Progress:
    """How one image comes along: a bar on a terminal, a line every print_freq steps elsewhere."""

    def __init__(self, name: str, total: int | None, print_freq: int):
        self.name, self.total, self.print_freq = name, total, print_freq
        self.steps = 0

    def __enter__(self) -> "Progress":
        # Terminals that report a size of 0 get the usual one.
        columns, lines = shutil.get_terminal_size()
        self._bar = tqdm(
            total=self.total, desc=label_of(self.name), leave=False,
            disable=not sys.stderr.isatty(), ncols=columns, nrows=lines,
        )  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def __call__(self, relaxed_loss: Tensor, true_loss: Tensor | float) -> None:
        """Called at every step; reads a loss, which waits for a GPU, only when it shows it."""
        self._bar.update(1)
        if self._bar.disable:
            if self.steps and self.steps % self.print_freq == 0:
                of_total = f" of {self.total}" if self.total else ""
                log.info("%s: step %d%s, relaxed loss %.4f, true loss %.4f", self.name,
                         self.steps, of_total, relaxed_loss.item(), true_loss)  # fmt: skip
        elif self.steps % 10 == 0:
            self._bar.set_postfix_str(f"loss {relaxed_loss.item():.4f}, true {true_loss:.4f}")
        self.steps += 1

    def note(self, text: str) -> None:
        """A line in between."""
        log.info("%s: step %d, %s", self.name, self.steps, text)


class _ThroughTqdm(logging.Handler):
    """Lines above a progress bar, not through it."""

    def emit(self, record: logging.LogRecord) -> None:
        encoding = sys.stdout.encoding or "utf-8"
        line = self.format(record).encode(encoding, errors="backslashreplace").decode(encoding)
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()


class _LogFile(logging.FileHandler):
    """A full disk ends no run: what cannot be logged is on the console."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  logging's own name
        """Nothing."""


def start_logging(path: Path) -> None:
    """Every line to the console, and with its time to `path`."""
    for handler in list(log.handlers):
        handler.close()
        log.removeHandler(handler)
    to_file = _LogFile(path, encoding="utf-8", errors="backslashreplace")
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(to_file)
    log.addHandler(_ThroughTqdm())
    log.setLevel(logging.INFO)
    log.propagate = False


def open_tracker(
    config: RefineConfig | PretrainConfig, folder: Path
) -> Callable[[str, Sequence[dict[str, Any]]], None]:
    """What sends an image's trajectory to the chosen tracker, or does nothing.

    Raises:
        InputError: wandb is asked for and not installed.
    """
    if config.tracker == "tensorboard":
        # tensorboard imports tensorflow where it is installed, which is loud.
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(folder / "tensorboard"))

        def to_tensorboard(name: str, trajectory: Sequence[dict[str, Any]]) -> None:
            for row in trajectory:
                for key, value in row.items():
                    if key != "step" and value is not None:
                        writer.add_scalar(f"{name}/{key}", value, row["step"])
            writer.flush()

        return to_tensorboard
    if config.tracker == "wandb":
        try:
            import wandb
        except ImportError:
            raise InputError('tracker = "wandb": not installed; pip install wandb') from None
        session = wandb.init(
            project="overfitting-latents", name=config.save_name, group=config.save_name,
            dir=str(folder), config=resolved(config),
        )  # fmt: skip

        def to_wandb(name: str, trajectory: Sequence[dict[str, Any]]) -> None:
            for row in trajectory:
                session.log({f"{name}/{key}": value for key, value in row.items()})

        return to_wandb
    return lambda name, trajectory: None


# --- measuring ------------------------------------------------------------------------------------


class Cost(NamedTuple):
    """What an image took: its share of its batch's seconds; the batch's peak memory, and size."""

    seconds: float
    seconds_per_step: float
    peak_memory_mb: float
    batch: int


class Stopwatch:
    """Seconds and peak memory since it was made, on the device that does the work."""

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            # Linux forgets the peak when asked; elsewhere it stays the whole process's.
            with suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")
        self.before = psutil.Process().memory_info().rss
        self.start = time.perf_counter()

    def read(self) -> tuple[float, float]:
        """Seconds, and the peak in MB: allocated on a GPU, resident otherwise."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            peak = torch.cuda.max_memory_allocated(self.device)
        else:
            peak = _peak_resident()
        return time.perf_counter() - self.start, peak / 2**20


def _peak_resident() -> int:
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def machine_facts(device: torch.device) -> dict[str, Any]:
    """Where numbers were made, for summary.json."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "device": device.type,
        "machine": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
