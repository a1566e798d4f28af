"""The folder of a refinement run: its files, its finished images, and how results are saved.

Each file is whole or absent. results/<save_name>/
    config.json          the config with every default filled in
    images.jsonl         one record for each image, written as soon as the image is done; `clock`
                         has the time of each row of its trajectory, in seconds; `told` has the
                         bytes that tell the decoder more, in hex, if there are any
    latents/*.npz        the refined integer latents
    bitstreams/*.olc     the refined images as compressed files, with `save_bitstreams`
    regions/*.png        the maps of images that have one
    trajectories/*.csv   each metric at each evaluated step, per image
    reconstructions/     images as PNG, with `save_final`
    log.txt              all messages of the run; another machine's are in log.<machine>.txt
    and the tables and plots of `reports.run_report`, at the end
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pandas as pd
import torch
from PIL import Image

from coding.bitstream import SUFFIX, read_bitstream
from coding.payload import to_bytes
from common.device import pick_precision
from common.errors import InputError, reason_of
from common.files import write_whole
from common.images import Images, LoadedImage, save_picture
from common.logs import log, open_tracker, start_logging
from common.machines import host_names, log_file, refuse_other_folder, refuse_other_input
from common.measuring import Cost
from common.numbers import percent_change
from common.processes import Ranks, first_rank_does, gather, shares
from common.progress import Progress
from common.records import (
    Record,
    append_record,
    loss_name,
    merge_records,
    rank_file,
    rate_of,
    read_records,
    result_file,
    write_json,
    write_records,
)
from common.resuming import (
    ANOTHER_RUN,
    config_file_of,
    differences,
    refuse_another_config,
    remove_leftovers,
    stored_precision,
)
from common.trajectories import read_trajectory
from config import RefineConfig, load_config, read_json_object, resolved
from refinement.result import Refined
from refinement.told import told_of
from regions.measures import bits_moved

# Keys that may differ when a run is resumed, because they change results by float rounding at most.
# Another device changes more, so `_refuse_other_facts` compares the devices of the records.
FREE_KEYS = frozenset((
    "resume", "num_workers", "output_dir", "save_name", "print_freq", "tot_batches", "images",
    "batch_size", "tracker", "device", "max_memory_gb", "cuda_graphs",
))  # fmt: skip
# Keys that may differ as well where results of several machines are only looked at.
PATHS = frozenset((
    "pretrain", "dev_options.path_test", "dev_options.path_weights", "adapt.directions",
))  # fmt: skip
RECORDS = "images*.jsonl"  # of one process or of each rank
# The facts of a run that must be the same for all its images, and those that each record repeats.
# Runs without directions, and older ones, have no such fact.
DECISIVE_FACTS = ("weights", "device", "directions")
RECORDED_FACTS = ("method", "params", "objective", "weighted", "precision", *DECISIVE_FACTS)


def folder_of(config: RefineConfig) -> Path:
    """The folder of a run."""
    return Path(config.output_dir) / config.save_name


def precision_of(config: RefineConfig, device: torch.device) -> str:
    """The precision of a run: `auto` is that of the results in its folder, else what is faster."""
    name: str = config.precision
    if name == "auto":
        name = stored_precision(folder_of(config), RECORDS) or name
    return pick_precision(name, device)


def open_run(config: RefineConfig, ranks: Ranks, images: Images, facts: Record) -> "Run":
    """Open the run's folder, `output_dir/save_name`, new or resumed, and start its log there.

    Every rank must call this.

    Args:
        images: the data set of the config.
        facts: the settings of the whole run: method, params, overridden, objective, weighted (by
            maps), lmbda, weights, N, M, precision, `machine_facts` and `adapt_facts`.

    Raises:
        InputError: the folder holds results and `resume` is off, or these were made with another
            config, other weights, other directions or another device; or the ranks differ in
            these, or in the folder.
        OSError: a file cannot be written.
        ConnectionError: another process has ended.
    """
    folder = folder_of(config)
    names = images.names[: config.image_count]
    hosts = host_names(ranks)
    refuse_other_input(ranks, hosts, {
        **resolved(config), "list of images": names,
        **{key: facts.get(key) for key in DECISIVE_FACTS},
    })  # fmt: skip

    def prepare() -> tuple[list[str], str]:
        _clear_folder(folder, config, facts)
        start_logging(folder / "log.txt")
        undone, broken = _find_undone(folder, config, names)
        write_json(folder / "config.json", resolved(config))
        _announce(config, images, facts, len(names) - len(undone))
        for name in broken:
            log.warning("%s: its results are not whole; it is done again", name)
        return undone, f"images/{uuid4().hex}"

    undone, key = first_rank_does(ranks, prepare)
    refuse_other_folder(ranks, hosts, folder)
    if ranks.rank:
        start_logging(log_file(folder, ranks, hosts))
    run = Run(folder, config, ranks, facts, names)
    run.todo = shares(ranks, undone, config.images_at_once, key)
    return run


class Run:
    """The folder of one run, for one process; `open_run` creates it.

    names: the images of the run. todo: gives out images that this process shall refine now, some
    consecutive ones at a time; the ranks share them (`shares`). failed: by image, why it was
    skipped.
    """

    def __init__(
        self, folder: Path, config: RefineConfig, ranks: Ranks, facts: Record, names: list[str]
    ):
        self.folder = folder
        self.config = config
        self.ranks = ranks
        self.facts = facts
        self.names = names
        self.todo: Iterable[Sequence[str]] = ()
        self.failed: dict[str, str] = {}
        alone = ranks.world == 1
        self._records_path = folder / "images.jsonl" if alone else rank_file(folder, ranks.rank)
        self._mentioned: set[str] = set()
        self._track = open_tracker(config.tracker, config.save_name, folder, resolved(config))

    # --- while it runs

    def announce_largest(self, pixels: float, limit: float) -> None:
        """Log the largest picture that fits into `limit` bytes."""
        log.info("pictures of up to %.3g megapixels fit into %.3g GB", max(pixels, 0) / 1e6,
                 limit / 1e9)  # fmt: skip

    def split(self, batch: Sequence[LoadedImage], reason: str) -> None:
        """Log that a batch cannot be refined together, so its images follow one by one."""
        log.warning("%s and %d more: %s; one by one now", batch[0].name, len(batch) - 1,
                    reason)  # fmt: skip

    def skip(self, name: str, reason: str) -> None:
        """Log why an image was not refined. The run goes on, and its exit code will be 1."""
        log.warning("%s: skipped: %s", name, reason)
        self.failed[name] = reason

    def begin(self, batch: Sequence[LoadedImage]) -> Progress:
        """The progress of a batch: a bar on a terminal, lines elsewhere.

        It also logs how images were converted, each kind of conversion once.
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

    def save(self, image: LoadedImage, result: Refined, cost: Cost) -> None:
        """Write all results of one image. The record comes last and marks the image as done.

        If a file cannot be written, the image is skipped.
        """
        name, record = image.name, self._record(image, result, cost)
        try:
            self._write_files(image, result)
            append_record(self._records_path, record)
        except OSError as error:
            self.skip(name, f"its results cannot be written: {reason_of(error)}")
            return
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

    def _write_files(self, image: LoadedImage, result: Refined) -> None:
        name, table = image.name, pd.DataFrame(result.trajectory.rows)
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
        if image.region is not None:
            save_picture(self._file("regions", name, ".png"), image.region.expand(3, -1, -1))
        if self.config.dev_options.save_final:
            images = {"original": image.pixels()}
            for label, x_hat in result.trajectory.reconstructions.items():
                images[label] = x_hat[0]
            for label, x in images.items():
                save_picture(self._file("reconstructions", name) / f"{label}.png", x)

    def _record(self, image: LoadedImage, result: Refined, cost: Cost) -> Record:
        trajectory, x = result.trajectory, image.pixels()
        files = result.coded.measures if result.coded else {}
        base, refined = (files.get(label, {}) | result.regions.get(label, {})
                         for label in ("base", "refined"))  # fmt: skip
        moved = {"y_bits_moved": bits_moved(base, refined)} if result.regions else {}
        told = {"told": text} if (text := to_bytes(trajectory.told).hex()) else {}
        return {
            "name": image.name, "width": x.size(2), "height": x.size(1),
            "converted": image.notes,
            **{key: self.facts[key] for key in RECORDED_FACTS if key in self.facts},
            "lmbda": trajectory.lmbda, "target": result.target, "seed": self.config.seed,
            "base": _side(trajectory.base) | base, "refined": _side(trajectory.best) | refined,
            **moved, **told,
            "best_step": trajectory.best["step"], "steps": trajectory.rows[-1]["step"],
            "stopped": trajectory.stopped, "settled": trajectory.settled, **cost._asdict(),
            "clock": [round(seconds, 3) for seconds in trajectory.clock],
        }  # fmt: skip

    def _file(self, kind: str, name: str, suffix: str = "") -> Path:
        return result_file(self.folder, kind, name, suffix)

    # --- the end

    def gather_failures(self) -> dict[str, str]:
        """The skipped images of all processes, and why; every rank must call this at the end.

        It returns when all processes are done with their images.
        """
        parts = gather(self.ranks, self.failed)
        return {name: reason for part in parts for name, reason in part.items()}

    def merge_records(self) -> list[Record]:
        """The records of this run's images in order; writes those of all ranks into images.jsonl.

        Only the first rank may call this, after `gather_failures`.

        Raises:
            OSError: images.jsonl cannot be written.
        """
        records = merge_records(self.folder, self.names, self.ranks.world)
        return [records[name] for name in self.names if name in records]

    def lost(self, records: Sequence[Record], failed: dict[str, str]) -> dict[str, str]:
        """The images that have neither a record nor a reason why they were skipped; says so."""
        known = failed.keys() | {record["name"] for record in records}
        reason = f'{self.folder} has no record of it; go on with "resume": true'
        return {name: reason for name in self.names if name not in known}


# --- images still to refine -----------------------------------------------------------------------


def _find_undone(
    folder: Path, config: RefineConfig, names: Sequence[str]
) -> tuple[list[str], list[str]]:
    """The images that are still to be refined, and those of them whose earlier files are damaged.

    The record of a damaged image is dropped.
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
    return [name for name in names if name not in found or name in broken], broken


def _announce(config: RefineConfig, images: Images, facts: Record, done: int) -> None:
    """Log the images, the method, and how many images are done already."""
    found, wanted = len(images.names), config.image_count
    target, passes = config.target, config.polish_passes
    goal = (
        f"lambda {facts['lmbda']:g} for {loss_name(facts)}"
        if target is None
        else f"files of {target.in_words(target.wanted)}, loss for {loss_name(facts)}"
    )
    log.info(
        "%s (%s), %s, %d steps%s%s, N = %d, M = %d, %s, %s", facts["method"],
        _hyper_parameters(facts) or "no hyper-parameters", goal, config.tot_inference_iterations,
        f" and {passes} passes of polish" if passes else "",
        f", {facts['adapt']}" if "adapt" in facts else "", facts["N"], facts["M"],
        facts["device"], facts["precision"],
    )  # fmt: skip
    for name in config.overruled_methods:
        log.warning("improving_methods.%s has no effect: dev_options' method wins", name)
    if images.passed_over:
        log.info("%s", images.passed_over)
    if config.dev_options.maps is None and config.dev_options.region_strength != 1:
        log.warning("dev_options.region_strength has no effect: there are no maps")
    for message in images.map_messages:
        log.warning("%s", message)
    if found < wanted and not config.takes_all_images:
        log.info("the data set has %d images, fewer than the config's %d: each is used once",
                 found, wanted)  # fmt: skip
    if found > wanted:
        log.info("the first %d of %d images, as images or tot_batches * batch_size says",
                 wanted, found)  # fmt: skip
    if done:
        log.info("%d of %d images are done already", done, min(found, wanted))


def _hyper_parameters(facts: Record) -> str:
    """Their names and values, and the method's own value if the config replaced it."""
    defaults = facts["overridden"]
    return ", ".join(
        f"{key} {_short(value)}"
        + (f" as the config says, not its own {_short(defaults[key])}" if key in defaults else "")
        for key, value in facts["params"].items()
    )


# --- resumption -----------------------------------------------------------------------------------


def _clear_folder(folder: Path, config: RefineConfig, facts: Record) -> None:
    """Make the folder, or check that this run may resume in it, and drop unfinished files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [file for file in folder.glob(RECORDS) if file.stat().st_size]
    if files and not config.resume:
        count = sum(len(read_records(file)) for file in files)
        raise InputError(
            f"{folder}: holds the results of {count} images; "
            f'go on with "resume": true, or {ANOTHER_RUN}'
        )
    records = merge_records(folder, [])
    if records:
        before = _stored_config(folder, config)
        refuse_another_config(folder, before, resolved(config), FREE_KEYS)
        _refuse_other_facts(folder, next(iter(records.values())), facts)
    kinds = ("latents", "trajectories", "bitstreams", "reconstructions", "regions")
    remove_leftovers(folder, ("*", *(f"{kind}/**/*" for kind in kinds)))


def changes_since(config: RefineConfig) -> str:
    """Why the results in a config's folder may be of another config, in words; "" if they are not.

    Paths may differ, and `auto` stands for any precision. Results without a config.json count as of
    the same one.
    """
    folder = folder_of(config)
    if not (folder / "config.json").exists():
        return ""
    free = FREE_KEYS | PATHS | ({"precision"} if config.precision == "auto" else set())
    try:
        changes = differences(_stored_config(folder, config), resolved(config), free)
    except InputError:
        return "its config.json cannot be read, so it may be of another config"
    return f"was refined with another config: {', '.join(changes)}" if changes else ""


def _stored_config(folder: Path, config: RefineConfig) -> Record:
    """A folder's config.json with every default filled in."""
    with config_file_of(folder) as path:
        values, overrides = read_json_object(path), []
        if "crop_seed" not in values:
            # Older runs have no crop_seed: the seed of the noise also chose their crops.
            of_crops = values.get("seed", 0) if config.dev_options.pathology else config.crop_seed
            overrides = [f"crop_seed={of_crops}"]
        return resolved(load_config(path, RefineConfig, overrides))


def _refuse_other_facts(folder: Path, record: Record, facts: Record) -> None:
    for key in DECISIVE_FACTS:
        if record.get(key) != facts.get(key):
            raise InputError(
                f"{folder}: cannot resume, its results were made with other {key} "
                f"({record.get(key)} then, {facts.get(key)} now); {ANOTHER_RUN}"
            )


def is_whole(folder: Path, record: Record, config: RefineConfig) -> bool:
    """Whether the run's folder has all files that belong to a record, and they can be read."""
    name = record["name"]
    try:
        steps = read_trajectory(folder, name)["step"]
        with np.load(result_file(folder, "latents", name, ".npz")) as arrays:
            shapes = [array.shape for array in arrays.values()]
        told_of(record)
        if config.writes_files:
            read_bitstream(result_file(folder, "bitstreams", name, SUFFIX).read_bytes())
        if "y_bits_moved" in record:
            with Image.open(result_file(folder, "regions", name, ".png")) as region:
                region.load()
        if config.dev_options.save_final:
            for label in ("original", "base", "refined"):
                path = result_file(folder, "reconstructions", name) / f"{label}.png"
                with Image.open(path) as image:
                    image.load()
    except Exception:  # readers of damaged files raise dozens of types
        return False
    rows = len(record.get("clock", steps))  # records of older runs have no clock
    return bool(shapes) and all(shapes) and len(steps) == rows and steps.iloc[-1] == record["steps"]


# --- records as dicts and words -------------------------------------------------------------------


def _side(row: Record) -> Record:
    """The true metrics and both losses of a trajectory's row, under a record's names."""
    true = {key.removeprefix("true_"): row[key] for key in row if key.startswith("true_")}
    loss = true.pop("loss")
    return {**true, "true_loss": loss, "relaxed_loss": row["relaxed_loss"]}


def _in_words(record: Record) -> str:
    base, refined = record["base"], record["refined"]
    loss = f"loss {percent_change(base['true_loss'], refined['true_loss']):+.2f} %"
    if record.get("target"):  # losses of different lambdas cannot be compared
        loss = f"lambda {record['lmbda']:.4g}"
    if "told" in record:
        loss += f", {len(record['told']) // 2} bytes of adaptation"
    return (
        f"{rate_of(base):.4f} bpp {_db(base)} -> {rate_of(refined):.4f} bpp {_db(refined)}, {loss}"
    )


def _db(side: Record) -> str:
    """PSNR, and MS-SSIM where it is known, in dB."""
    text = "inf dB" if side["psnr"] is None else f"{side['psnr']:.2f} dB"
    similarity = side["ms_ssim_db"]
    return text if similarity is None else f"{text} (MS-SSIM {similarity:.2f} dB)"


def _short(value: Any) -> str:
    """The value of a hyper-parameter as text; numbers have six digits."""
    return f"{value:.6g}" if type(value) in (int, float) else str(value)
