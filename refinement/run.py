"""A refinement's folder: what is in it, what of it is done, and how results get there.

Each file is whole or absent. results/<save_name>/
    config.json          the config with every default filled in
    images.jsonl         one record an image, written the moment it is done; `clock` has the
                         seconds at which each row of its trajectory was there
    latents/*.npz        the refined integer latents
    bitstreams/*.olc     the refined images as files, with `save_bitstreams`
    trajectories/*.csv   each metric at each evaluated step, per image
    reconstructions/     pictures, with `save_final`
    log.txt              all that the run said
    and what `reports.run_report` makes of these at the end
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from coding.bitstream import SUFFIX, read_bitstream
from common.errors import reason_of
from common.files import write_whole
from common.images import Images, LoadedImage, save_picture
from common.logs import log, open_tracker, start_logging
from common.measuring import Cost
from common.numbers import percent_change
from common.processes import Ranks, first_rank_does, gather
from common.progress import Progress
from common.records import (
    Record,
    append_record,
    merge_records,
    rate_of,
    read_records,
    result_file,
    write_json,
    write_records,
)
from common.resuming import ANOTHER_RUN, refuse_another_config, remove_leftovers
from config import InputError, RefineConfig, load_config, read_json_object, resolved
from refinement.result import Refined

# Keys that may change between a run and its resumption: they change no image's result beyond float
# rounding (another device does; the records say which it was, and are compared).
FREE_KEYS = frozenset((
    "resume", "num_workers", "output_dir", "save_name", "print_freq", "tot_batches", "images",
    "batch_size", "tracker", "device", "max_memory_gb",
))  # fmt: skip


def open_run(config: RefineConfig, ranks: Ranks, images: Images, facts: Record) -> "Run":
    """The run's folder, `output_dir/save_name`, new or to be resumed; logging goes there too.

    Args:
        images: the data set of the config.
        facts: what is true of the run as a whole: method, params, overridden, lmbda, weights, N, M
            and `machine_facts`.

    Raises:
        InputError: the folder holds results and `resume` is off, or they were made with another
            config or other weights.
    """
    folder = Path(config.output_dir) / config.save_name
    names = images.names[: config.image_count]

    def prepare() -> list[str]:
        _clear_folder(folder, config, facts)
        start_logging(folder / "log.txt")
        undone = _find_undone(folder, config, names)
        write_json(folder / "config.json", resolved(config))
        _announce(config, images, facts, len(names) - len(undone))
        return undone

    undone = first_rank_does(ranks, prepare)
    if ranks.rank:
        start_logging(folder / "log.txt")
    run = Run(folder, config, ranks, facts, names)
    run.todo = undone[ranks.rank :: ranks.world]
    return run


class Run:
    """One run's folder as one process sees it; made by `open_run`.

    names: the images of the run. todo: those that this process has to refine.
    """

    def __init__(
        self, folder: Path, config: RefineConfig, ranks: Ranks, facts: Record, names: list[str]
    ):
        self.folder = folder
        self.config = config
        self.ranks = ranks
        self.facts = facts
        self.names = names
        self.todo: list[str] = []
        self.failed: dict[str, str] = {}
        own = "images.jsonl" if ranks.world == 1 else f"images.rank{ranks.rank}.jsonl"
        self._own_path = folder / own
        self._mentioned: set[str] = set()
        self._track = open_tracker(config.tracker, config.save_name, folder, resolved(config))

    # --- on the way

    def split(self, batch: Sequence[LoadedImage], reason: str) -> None:
        """Log that the images of a batch, which cannot be refined together, go one by one."""
        log.warning("%s and %d more: %s; one by one now", batch[0].name, len(batch) - 1,
                    reason)  # fmt: skip

    def skip(self, name: str, reason: str) -> None:
        """Note an image that could not be refined; the run goes on and its exit code says so."""
        log.warning("%s: skipped: %s", name, reason)
        self.failed[name] = reason

    def begin(self, batch: Sequence[LoadedImage]) -> Progress:
        """A bar for a batch of images on a terminal, lines elsewhere.

        What was converted in the images is logged, each kind of conversion once.
        """
        for image in batch:
            for note in image.notes:
                if note not in self._mentioned:
                    log.info("%s: %s (said once; images.jsonl has it of each image)", image.name,
                             note)  # fmt: skip
            self._mentioned.update(image.notes)
        open_ended = self.config.target or self.config.max_seconds
        steps = self.config.tot_inference_iterations + len(batch) * self.config.polish_passes
        name = batch[0].name if len(batch) == 1 else f"{batch[0].name} and {len(batch) - 1} more"
        return Progress(name, None if open_ended else steps, self.config.print_freq)

    def save(self, image: LoadedImage, result: Refined, cost: Cost) -> bool:
        """Write all results of one image; its record comes last and makes it done.

        An image whose files cannot be written is skipped.

        Returns:
            Whether the files were written.
        """
        name, record = image.name, self._record(image, result, cost)
        try:
            self._write_files(image, result)
            append_record(self._own_path, record)
        except OSError as error:
            self.skip(name, f"its results cannot be written: {reason_of(error)}")
            return False
        try:
            self._track(name, result.trajectory.rows)
        except OSError as error:
            log.warning("%s: not sent to the tracker: %s", name, reason_of(error))
        if stopped := result.trajectory.stopped:
            log.warning("%s: stopped, %s; kept step %d", name, stopped, record["best_step"])
        target = self.config.target
        if target and result.target and not result.target["met"]:
            words = [target.in_words(result.target[key]) for key in ("wanted", "got")]
            log.warning("%s: the target, %s, was not met; the closest, %s, is kept", name, *words)
        log.info("%s: %s, best step %d, %.1f s", name, _in_words(record), record["best_step"],
                 cost.seconds)  # fmt: skip
        return True

    def _write_files(self, image: LoadedImage, result: Refined) -> None:
        name, table = image.name, pd.DataFrame(result.trajectory.rows)
        if self.config.dev_options.save_final:
            pictures = {label: x_hat[0] for label, x_hat in result.trajectory.pictures.items()}
            for label, x in {"original": image.pixels(), **pictures}.items():
                save_picture(self._file("reconstructions", name) / f"{label}.png", x)
        write_whole(
            self._file("trajectories", name, ".csv"), lambda f: table.to_csv(f, index=False)
        )
        arrays = {latent: v[0].cpu().numpy() for latent, v in result.symbols.items()}
        write_whole(
            self._file("latents", name, ".npz"), lambda file: np.savez_compressed(file, **arrays)
        )
        if (coded := result.coded) is not None:
            write_whole(
                self._file("bitstreams", name, SUFFIX),
                lambda file: file.write_bytes(coded.bitstream),
            )

    def _record(self, image: LoadedImage, result: Refined, cost: Cost) -> Record:
        trajectory, x = result.trajectory, image.pixels()
        files = result.coded.measures if result.coded else {}
        return {
            "name": image.name, "width": x.size(2), "height": x.size(1),
            "converted": image.notes,
            **{key: self.facts[key] for key in ("method", "params", "weights", "device")},
            "lmbda": trajectory.lmbda, "target": result.target, "seed": self.config.seed,
            "base": _side(trajectory.base) | files.get("base", {}),
            "refined": _side(trajectory.best) | files.get("refined", {}),
            "best_step": trajectory.best["step"], "steps": trajectory.rows[-1]["step"],
            "stopped": trajectory.stopped, "settled": trajectory.settled, **cost._asdict(),
            "clock": [round(seconds, 3) for seconds in trajectory.clock],
        }  # fmt: skip

    def _file(self, kind: str, name: str, suffix: str = "") -> Path:
        return result_file(self.folder, kind, name, suffix)

    # --- the end

    def gather_failures(self) -> dict[str, str]:
        """Why each skipped image of all processes failed; every rank must call this at the end.

        It returns when all processes have done their images.
        """
        parts = gather(self.ranks, self.failed)
        return {name: reason for part in parts for name, reason in part.items()}

    def merge_records(self) -> list[Record]:
        """The records of this run's images in order; images.jsonl has those of all ranks then.

        For the first rank, after `gather_failures`.

        Raises:
            OSError: images.jsonl cannot be written.
        """
        records = merge_records(self.folder, self.names)
        return [records[name] for name in self.names if name in records]


# --- what is to be done ---------------------------------------------------------------------------


def _find_undone(folder: Path, config: RefineConfig, names: Sequence[str]) -> list[str]:
    """Those of these images that are to be refined; what is wrong with earlier results is logged.

    An image whose files are not whole is to be done again, and its record is dropped.
    """
    path = folder / "images.jsonl"
    found = read_records(path)
    lines = len(path.read_bytes().splitlines()) if path.is_file() else 0
    if lines > len(found):
        log.warning("%s: %d of its lines are no whole records, and dropped", path,
                    lines - len(found))  # fmt: skip
    broken = [name for name in names if name in found and not is_whole(folder, found[name], config)]
    kept = [record for name, record in found.items() if name not in broken]
    if path.is_file():
        write_records(path, kept)
    for name in broken:
        log.warning("%s: its results are not whole; it is done again", name)
    return [name for name in names if name not in found or name in broken]


def _announce(config: RefineConfig, images: Images, facts: Record, done: int) -> None:
    """Log what is refined, how, and how much of it is done already."""
    found, wanted = len(images.names), config.image_count
    target, passes = config.target, config.polish_passes
    goal = (
        f"lambda {facts['lmbda']:g}"
        if target is None
        else (f"files of {target.in_words(target.wanted)}")
    )
    log.info(
        "%s (%s), %s, %d steps%s, N = %d, M = %d, %s", facts["method"],
        _hyper_parameters(facts) or "no hyper-parameters", goal, config.tot_inference_iterations,
        f" and {passes} passes of polish" if passes else "", facts["N"], facts["M"],
        facts["device"],
    )  # fmt: skip
    for name in config.overruled_methods:
        log.warning("improving_methods.%s has no effect: dev_options' method wins", name)
    if images.passed_over:
        log.info("%s", images.passed_over)
    if found < wanted and not config.takes_all_images:
        log.info("the data set has %d images, fewer than the config's %d: each is used once",
                 found, wanted)  # fmt: skip
    if found > wanted:
        log.info("the first %d of %d images, as images or tot_batches * batch_size says",
                 wanted, found)  # fmt: skip
    if done:
        log.info("%d of %d images are done already", done, min(found, wanted))


def _hyper_parameters(facts: Record) -> str:
    """Their names and values; where the config replaced the method's own value, that too."""
    own = facts["overridden"]
    return ", ".join(
        f"{key} {_short(value)}"
        + (f" as the config says, not its own {_short(own[key])}" if key in own else "")
        for key, value in facts["params"].items()
    )


# --- resumption -----------------------------------------------------------------------------------


def _clear_folder(folder: Path, config: RefineConfig, facts: Record) -> None:
    """Make the folder, or see that this run may go on in it, and drop what a killed run left."""
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
        refuse_another_config(
            folder, resolved(config), lambda stored: _stored_config(stored, config), FREE_KEYS
        )
        _refuse_other_facts(folder, next(iter(records.values())), facts)
    kinds = ("latents", "trajectories", "bitstreams", "reconstructions")
    remove_leftovers(folder, ("*", *(f"{kind}/**/*" for kind in kinds)))


def _stored_config(path: Path, config: RefineConfig) -> Record:
    """A folder's config.json with every default filled in."""
    values, overrides = read_json_object(path), []
    if "crop_seed" not in values:
        # It came later: until then the seed of the noise placed the crops too.
        of_crops = values.get("seed", 0) if config.dev_options.pathology else config.crop_seed
        overrides = [f"crop_seed={of_crops}"]
    return resolved(load_config(path, RefineConfig, overrides))


def _refuse_other_facts(folder: Path, record: Record, facts: Record) -> None:
    for key in ("weights", "device"):
        if record.get(key) != facts[key]:
            raise InputError(
                f"{folder}: cannot resume, its results were made with other {key} "
                f"({record.get(key)} then, {facts[key]} now); {ANOTHER_RUN}"
            )


def is_whole(folder: Path, record: Record, config: RefineConfig) -> bool:
    """Whether all files of an image's record are in the run's folder and can be read."""
    name = record["name"]
    try:
        table = pd.read_csv(result_file(folder, "trajectories", name, ".csv"))
        steps = table["step"]
        sound = {"temperature", "true_loss", "relaxed_loss"} <= {*table.columns} and all(
            kind.kind in "biuf" for kind in table.dtypes
        )
        with np.load(result_file(folder, "latents", name, ".npz")) as arrays:
            shapes = [arrays[key].shape for key in ("y", "z")]
        if config.writes_files:
            read_bitstream(result_file(folder, "bitstreams", name, SUFFIX).read_bytes())
        if config.dev_options.save_final:
            for label in ("original", "base", "refined"):
                path = result_file(folder, "reconstructions", name) / f"{label}.png"
                with Image.open(path) as image:
                    image.load()
    except Exception:  # damaged files make their readers raise dozens of kinds
        return False
    rows = len(record.get("clock", steps))  # records of older runs have no clock
    return sound and all(shapes) and len(steps) == rows and steps.iloc[-1] == record["steps"]


# --- records and their words ----------------------------------------------------------------------


def _side(row: Record) -> Record:
    """The true metrics of a trajectory's row, and both losses, as a record names them."""
    true = {key.removeprefix("true_"): row[key] for key in row if key.startswith("true_")}
    loss = true.pop("loss")
    return {**true, "true_loss": loss, "relaxed_loss": row["relaxed_loss"]}


def _in_words(record: Record) -> str:
    base, refined = record["base"], record["refined"]
    loss = f"loss {percent_change(base['true_loss'], refined['true_loss']):+.2f} %"
    if record.get("target"):  # losses at a lambda that was searched say little
        loss = f"lambda {record['lmbda']:.4g}"
    return (
        f"{rate_of(base):.4f} bpp {_db(base)} -> {rate_of(refined):.4f} bpp {_db(refined)}, {loss}"
    )


def _db(side: Record) -> str:
    return "inf dB" if side["psnr"] is None else f"{side['psnr']:.2f} dB"


def _short(value: Any) -> str:
    """A hyper-parameter's value; numbers with six digits."""
    return f"{value:.6g}" if type(value) in (int, float) else str(value)
