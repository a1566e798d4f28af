"""A training run's folder: its checkpoints, its log, and the checkpoint to resume from.

checkpoints/<save_name>/
    config.json         the config with every default filled in
    log.txt             the log
    metrics.jsonl       rows of kind "train" and "test"
    iter_<n>.pth.tar    checkpoints, the newest few
    training.png        the metrics over the steps
    weights.pth.tar     the model alone in half precision, written at the end
    test.json           rate and quality of each image, and their means, written with `test`
"""

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from architectures import Architecture
from common.device import pick_precision
from common.errors import InputError
from common.files import write_whole
from common.logs import log, open_tracker, start_logging
from common.numbers import rounded
from common.processes import Ranks, first_rank_does, gather
from common.progress import progress_bar
from common.records import Record, finite, read_metrics, write_json, write_records
from common.resuming import (
    ANOTHER_RUN,
    config_file_of,
    refuse_another_config,
    remove_leftovers,
    stored_precision,
)
from common.weights import read_checkpoint
from config import PretrainConfig, load_config, resolved
from models import load_checkpoint, save_checkpoint, save_weights
from pretraining.draws import TrainingData
from reports.run_plots import plot_training
from reports.run_tables import format_tests, means_of_tests

# The keys that may differ when a run is resumed.
FREE_KEYS = frozenset((
    "resume", "num_workers", "output_dir", "save_name", "print_freq", "save_model_freq", "device",
    "keep_checkpoints", "tot_iterations", "tracker", "test", "path_test_data",
))  # fmt: skip
# How many skipped images the log names for each reason; all are counted.
NAMED_SKIPS = 100


def folder_of(config: PretrainConfig) -> Path:
    """The folder of a training."""
    return Path(config.output_dir) / config.save_name


def precision_of(config: PretrainConfig, device: torch.device) -> str:
    """The precision of a run: `auto` is that of the checkpoints there, else what is faster."""
    name: str = config.precision
    if name == "auto":
        name = stored_precision(folder_of(config), "iter_*.pth.tar") or name
    return pick_precision(name, device)


def open_training_run(config: PretrainConfig, ranks: Ranks) -> "TrainingRun":
    """Open the run's folder, `output_dir/save_name`, new or to be resumed, and start its log.

    Every rank must call this.

    Raises:
        InputError: the folder holds checkpoints and `resume` is off, or they were made with
            another config; or, with `test`, there is nothing to test.
        OSError: the folder cannot be written.
    """
    folder = folder_of(config)
    first_rank_does(ranks, lambda: _prepare_folder(folder, config))
    start_logging(folder / "log.txt")
    return TrainingRun(folder, config, ranks)


def _prepare_folder(folder: Path, config: PretrainConfig) -> None:
    has_checkpoints = any(folder.glob("iter_*.pth.tar"))
    if config.test and not has_checkpoints and not config.pretrain:
        raise InputError(f"test: no checkpoint in {folder}, and pretrain names none")
    folder.mkdir(parents=True, exist_ok=True)
    if config.test:
        return
    if has_checkpoints and not config.resume:
        raise InputError(
            f'{folder}: holds checkpoints; go on with "resume": true, or {ANOTHER_RUN}'
        )
    if has_checkpoints:
        with config_file_of(folder) as stored:
            before = resolved(load_config(stored, PretrainConfig))
        # A cosine ends at `tot_iterations`, so with another end each step has another rate.
        free = FREE_KEYS - {"tot_iterations"} if config.lr.schedule == "cosine" else FREE_KEYS
        refuse_another_config(folder, before, resolved(config), free)
    elif any(folder.glob("*.pth.tar*")):
        raise InputError(
            f"{folder}: holds weights, but no checkpoint that can be read; {ANOTHER_RUN}"
        )
    else:
        (folder / "metrics.jsonl").unlink(missing_ok=True)
    remove_leftovers(folder)
    write_json(folder / "config.json", resolved(config))


class TrainingRun:
    """The run's folder as one process sees it; only the first rank writes there."""

    def __init__(self, folder: Path, config: PretrainConfig, ranks: Ranks):
        self.folder = folder
        self.config = config
        self.ranks = ranks
        self.skipped: dict[str, str] = {}
        self._skips: Counter[str] = Counter()
        self._failed_tests: set[str] = set()
        self._bar: tqdm | None = None
        kind = None if ranks.rank else config.tracker
        self._track = open_tracker(kind, config.save_name, folder, resolved(config))

    # --- the start

    def checkpoint_to_resume(self) -> Record | None:
        """Read the newest checkpoint that is whole; None in a new run.

        Metrics of later steps are dropped, for these steps will be repeated.

        Raises:
            InputError: there are checkpoints, but none is whole.
        """
        if not first_rank_does(self.ranks, self._checkpoints):
            return None
        path = first_rank_does(self.ranks, self._newest_whole)
        checkpoint = read_checkpoint(path)
        first_rank_does(self.ranks, lambda: self._drop_metrics_after(checkpoint["iter"]))
        return checkpoint

    def model_to_test(self) -> Architecture:
        """The model of the newest checkpoint, or of `pretrain` where there is none.

        Raises:
            InputError: no checkpoint in the folder can be read, or `pretrain` cannot.
        """
        if not self._checkpoints():
            log.info("testing %s", self.config.pretrain)
            config = self.config
            return load_checkpoint(config.pretrain, config.channels, config.architecture)
        path = first_rank_does(self.ranks, self._newest_whole)
        log.info("testing %s", path)
        return load_checkpoint(str(path), self.config.channels, self.config.architecture)

    def _newest_whole(self) -> Path:
        """The newest checkpoint that can be read; damaged ones are renamed."""
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
        """The folder's checkpoints, the newest first."""
        found = {
            int(match[1]): path
            for path in self.folder.glob("iter_*.pth.tar")
            if (match := re.fullmatch(r"iter_(\d+)\.pth\.tar", path.name))
        }
        return [found[step] for step in sorted(found, reverse=True)]

    def _drop_metrics_after(self, step: int) -> None:
        """Drop the metrics of steps after `step`, and a line that a kill cut off."""
        path = self.folder / "metrics.jsonl"
        kept = [row for row in read_metrics(path) if row["step"] <= step]
        if path.is_file():
            write_records(path, kept)

    # --- during training

    def announce(self, step: int, model: Architecture, data: TrainingData, machine: str) -> None:
        """Log the model, the data and the settings, and start the progress bar.

        Args:
            machine: the device and the precision, in words.
        """
        if self.ranks.rank:
            return
        config = self.config
        start = f"from step {step}" if step else f"from {config.pretrain or 'scratch'}"
        log.info(
            "N = %d, M = %d, lambda %g for %s, %s, %s at %g, batches of %d%s, crops of %d, "
            "%d %s, %s",
            model.N, model.M, config.train_lambda, config.objective, start, config.optimizer,
            config.lr.base, config.batch_size,
            f" on each of {self.ranks.world} ranks" * (self.ranks.world > 1), config.image_size,
            data.count, data.name, machine,
        )  # fmt: skip
        self.log_passed_over("train_folder", data.passed_over)
        self._bar = progress_bar(config.tot_iterations, done=step, unit=" steps")

    def log_passed_over(self, key: str, words: str) -> None:
        """Log which files were passed over (`words`) in the folder that a config's key names."""
        if words and self.ranks.rank == 0:
            log.info("%s: %s", key, words)

    def skip(self, name: str, reason: str) -> None:
        """Count an image that cannot be trained on, and name it in the log; each image once."""
        if name in self.skipped:
            return
        kind = self.skipped[name] = reason.partition(":")[0]
        self._skips[kind] += 1
        if self._skips[kind] <= NAMED_SKIPS:
            log.warning("%s: skipped: %s", name, reason)
        if self._skips[kind] == NAMED_SKIPS:
            log.warning("more that are %s are only counted", kind)

    def log_training(self, step: int, values: Record, bad_steps: int) -> None:
        """Write a row of metrics.jsonl and a line of the log; every rank must call this.

        Args:
            values: the learning rate `lr`, and the values of `Window.read`.

        Raises:
            OSError: the row cannot be written.
        """
        skipped = self._skips
        if self.ranks.world > 1:  # two ranks may have skipped the same image
            parts = gather(self.ranks, self.skipped)
            skipped = Counter({name: why for part in parts for name, why in part.items()}.values())
        row = {"kind": "train", "step": step, **values, "bad_steps": bad_steps, "skipped": skipped}
        if self.ranks.rank == 0:
            self._write(row)
            if self._bar is not None:
                self._bar.update(step - self._bar.n)
            log.info(
                "step %d: loss %s, %s bpp, %s dB, lr %.3g, %.2f steps/s, %.1f images/s, "
                "waiting for data %.0f %%", step, rounded(values["loss"], 4),
                rounded(values["bpp"], 4), rounded(values["psnr"], 2), values["lr"],
                values["steps_per_second"], values["images_per_second"],
                100 * values["data_wait_share"],
            )  # fmt: skip

    def log_test(self, step: int, results: Sequence[Record]) -> None:
        """Write a row of metrics.jsonl with the means of a test; without results do nothing.

        Args:
            results: of `validate`, one for each image.

        Raises:
            OSError: the row cannot be written.
        """
        if not results or self.ranks.rank:
            return
        means = means_of_tests(results)
        path = self.folder / "metrics.jsonl"
        known = ((row["kind"], row["step"]) for row in read_metrics(path))
        if ("test", step) not in known:  # a finished run that is resumed tests again
            self._write({"kind": "test", "step": step, **means})
        log.info("step %d, %d test images: loss for %s %s, %s bpp, %s dB, MS-SSIM %s dB", step,
                 means["images"], self.config.objective, rounded(means["loss"], 4),
                 rounded(means["bpp"], 4), rounded(means["psnr"], 2),
                 rounded(means["ms_ssim_db"], 2))  # fmt: skip
        self._log_failed_tests(results)

    def _log_failed_tests(self, results: Sequence[Record]) -> None:
        """Log the images that could not be tested, each once."""
        for record in results:
            name = record["name"]
            if "error" in record and name not in self._failed_tests:
                self._failed_tests.add(name)
                log.warning("%s: not tested: %s", name, record["error"])

    def _write(self, row: Record) -> None:
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite(row)) + "\n")
        numbers = {key: value for key, value in row.items() if isinstance(value, int | float)}
        self._track(row["kind"], [numbers])

    def save(self, step: int, model: Architecture, state: Record) -> None:
        """Write iter_<step>.pth.tar; keep the newest `keep_checkpoints` and delete the others.

        Raises:
            OSError: the checkpoint cannot be written.
        """
        if self.ranks.rank:
            return
        state = {**state, "config": resolved(self.config)}
        save_checkpoint(self.folder / f"iter_{step}.pth.tar", model, state)
        for old in self._checkpoints()[self.config.keep_checkpoints :]:
            old.unlink()

    # --- the end

    def end_stopped(self, step: int) -> int:
        """Log that a signal stopped the run at `step`; return the exit code, 0."""
        if self.ranks.rank == 0:
            self._close()
            log.info('stopped at step %d and saved; "resume": true goes on from here', step)
        return 0

    def end_diverged(self, step: int, bad: int) -> int:
        """Log that the run ends after `bad` bad steps in a row; return the exit code, 1."""
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

    def finish(self, step: int, model: Architecture) -> int:
        """Write the weights alone and the plot, and log their paths; return the exit code, 0."""
        if self.ranks.rank == 0:
            self._close()
            weights = save_weights(self.folder / "weights.pth.tar", model, step)
            log.info("results:  %s", self.folder)
            log.info("weights:  %s", weights)
            if (self.folder / "training.png").is_file():
                log.info("plot:     %s", self.folder / "training.png")
        return 0

    def _close(self) -> None:
        """End the progress bar and plot the metrics."""
        if self._bar is not None:
            self._bar.close()
        rows = read_metrics(self.folder / "metrics.jsonl")
        if any(row["kind"] == "train" for row in rows):
            plot = plot_training(rows, self.config.objective)
            write_whole(self.folder / "training.png", plot.savefig)

    def report_test(self, results: Sequence[Record]) -> int:
        """Log the table of a test, write test.json; return the exit code, 1 if an image failed."""
        failed = [record for record in results if "error" in record]
        if self.ranks.rank == 0:
            self._log_failed_tests(results)
            if len(failed) < len(results):
                means = means_of_tests(results)
                objective = self.config.objective
                tests = {"objective": objective, "mean": means, "images": list(results)}
                write_json(self.folder / "test.json", tests)
                log.info(f"\n{format_tests(results, means, objective)}\n")
                log.info("results:  %s", self.folder / "test.json")
        return 1 if failed else 0
