"""Refine the latents of images under a frozen model.

python train_flexible_inference.py --config example_files/flexible_inference.json
python train_flexible_inference.py --config example_files/fast.json --images PHOTOS
torchrun --nproc_per_node=2 train_flexible_inference.py --config example_files/two_class_ssl.json

For every image: encode it to latents once, then move these by gradient descent on
rate + lambda * distortion, rounded by the chosen relaxation; keep what is best when truly rounded.
Methods: Perugachi-Diaz, Gansekoele, Bhulai 2024 (arXiv 2401.17789); Yang, Bamler, Mandt 2020
(arXiv 2006.04240).
"""

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, count, groupby, islice
from typing import Any

from common.errors import InputError, exits_with_one_line
from config import RefineConfig, Target, no_polish, parse_command_line

# isort: split
import torch
from torch import Tensor

from architectures import Architecture
from architectures.footprint import footprint_of
from coding.bitstream import BitstreamError
from coding.coder import Coder, build_coder
from common.device import is_out_of_memory, pick_device, pick_precision
from common.images import Images, LoadedImage
from common.measuring import Cost, Stopwatch, machine_facts
from common.processes import first_rank_does, join_ranks
from common.progress import Progress
from datasets import open_images
from experimental_inference_methods import Rounding, Tau, rounding_from_config
from fast.freezing import release_memory
from fast.memory import MemoryBound, memory_bound
from fast.pool import keep_pages
from metrics import MS_SSIM_MIN_SIDE
from models import freeze, load_checkpoint
from objectives import Problem, objective_of
from refinement.adapting import AdaptedProblem
from refinement.batch import ImageError, ImageNoise, Recorder, Trajectory
from refinement.descent import (
    LBFGS_HISTORY,
    build_optimizer,
    forget_curvature,
    pace_of,
)
from refinement.graph import graphed, pick_cuda_graphs
from refinement.polish import polish_batch
from refinement.result import Refined, result_of
from refinement.run import Run, open_run, precision_of
from refinement.target import LambdaSearch, Start, refine_to_target
from refinement.told import adapt_facts, bytes_of_fits, check_adapt, use_directions_of
from regions.weights import weights_of_images
from reports.run_report import write_run_report


@exits_with_one_line
def main(argv: Sequence[str] | None = None) -> int:
    """Refine every image of a config; exit code 0, 1 when an image failed, 2 for bad input."""
    return report(refine_images(parse_command_line(RefineConfig, __doc__, argv)))


def refine(
    problem: Problem,
    rounding: Rounding,
    config: RefineConfig,
    names: Sequence[str],
    progress: Callable[[Tensor, Tensor | float], None],
    start: Start | None = None,
) -> list[Trajectory]:
    """Overfit the latents of each of the problem's images to this image.

    The first latents count as a candidate too, so no result is worse than they are. The loop does
    not wait for a GPU between evaluations. `max_seconds` and `early_stop` may leave out steps.

    Args:
        names: the images' names. The noise of an image depends only on its name, the config's seed
            and `start.trial`.
        start: the first latents and step; by default the encoder's latents and step 0.
    """
    pace = pace_of(config, len(problem.x), start.step if start else 0)
    start = start or Start(problem.model.analyze(problem.x))
    current = AdaptedProblem(problem, config, start.told)
    latents = {name: v.clone().requires_grad_() for name, v in start.latents.items()}
    optimizer = build_optimizer(latents, config.optimizer)
    noise = ImageNoise.of_images(config.seed, names, problem.x.device, start.trial)
    recorder = Recorder(current, rounding, config, noise, pace)
    losses = torch.zeros(len(problem.x))
    # The augmented loss is the mean with the true loss. This is a constant: half the gradient.
    weight = 0.5 if config.dev_options.augmented_loss else 1.0

    def loss_and_gradients(tau: Tau) -> tuple[Tensor, Tensor]:
        optimizer.zero_grad()
        relaxed = current.problem.relaxed(latents, rounding.with_tau(tau, noise.source))
        objective = weight * relaxed.loss.sum()
        objective.backward()
        return relaxed.loss.detach(), objective.detach()  # [B], scalar

    graphs = config.cuda_graphs is True  # `auto` is decided when a refiner is opened
    compute = graphed(loss_and_gradients, noise) if graphs else loss_and_gradients

    def closure() -> Tensor:
        nonlocal losses
        noise.restart(step)
        losses, objective = compute(rounding.temperature(pace.position))
        return objective

    for step in count(int(pace.position)):
        recorder.evaluate_if_due(step, latents)
        if pace.at_end or recorder.ended:
            break
        if current.adapt_if_due(pace, latents):
            forget_curvature(optimizer)
            if graphs:
                compute = graphed(loss_and_gradients, noise)  # the old one repeats the old problem
        optimizer.param_groups[0]["lr"] = config.lr_at(pace.position)
        optimizer.step(closure)  # type: ignore[arg-type]  # a loss may be a tensor
        pace.advance()
        progress(*recorder.progress_of(losses))
    trajectories = recorder.trajectories
    current.refit(trajectories)
    if config.polish_passes:
        polish_batch(current.of_best(trajectories), trajectories, config, noise, pace, progress)
        current.refit(trajectories)
    return trajectories


def refine_images(
    config: RefineConfig, on_batch: Callable[[Cost], None] = lambda cost: None
) -> Run:
    """Refine every image of a config that is not done yet, save the results, return the run.

    Args:
        on_batch: called with the cost of each batch, after it is saved.

    Raises:
        InputError: a file or name in the config is missing or wrong.
        OSError: a file cannot be written.
    """
    keep_pages()
    rounding = rounding_from_config(config)
    ranks = join_ranks()
    model = load_checkpoint(config.pretrain, config.channels, config.architecture)
    images = open_images(config)
    device = pick_device(config.device, ranks.local)
    refuse_impossible(model, rounding, config, device)  # before a folder is made
    use_directions_of(config, model)
    precision = first_rank_does(ranks, lambda: precision_of(config, device))
    config = config.model_copy(update={"precision": precision})
    run = open_run(config, ranks, images, {
        "method": rounding.name, "params": rounding.params, "overridden": rounding.overridden,
        "objective": config.objective, "weighted": config.weighted,
        "lmbda": None if config.target else config.lmbda,
        "weights": model.weights_hash, "N": model.N, "M": model.M,
        "precision": precision, **machine_facts(device), **adapt_facts(config, model),
    })  # fmt: skip
    refiner = open_refiner(model, rounding, config, device)
    run.announce_largest(refiner.bound.largest(), refiner.bound.limit)

    for batch in batches(images, run.todo, config.num_workers, refiner.most_at_once):
        waiting = [batch]
        while waiting:
            part = waiting.pop(0)
            try:
                refine_and_save(refiner, part, run, on_batch)
            except BatchTooLargeError as error:
                run.split(part, str(error))
                waiting += [[image] for image in part]
            except ImageError as error:
                run.skip(part[0].name, str(error))
    return run


def report(run: Run) -> int:
    """Write the tables and plots of a run at its end; returns 1 if an image failed, else 0.

    Every rank must call this.

    Raises:
        OSError: a file cannot be written.
    """
    failed = run.gather_failures()

    def write() -> int:
        records = run.merge_records()
        return write_run_report(run.folder, records, failed | run.lost(records, failed), run.facts)

    return first_rank_does(run.ranks, write)


def refuse_impossible(
    model: Architecture, rounding: Rounding, config: RefineConfig, device: torch.device
) -> bool:
    """Refuse what the model or the device cannot do; returns whether to use CUDA graphs.

    Raises:
        InputError: the model has no polish or no files, its decoder cannot be told what `adapt`
            says, there is no such objective, or `cuda_graphs` cannot be true.
    """
    distortion = objective_of(config, config.lmbda).distortion
    if config.polish_passes and not distortion.is_mse:
        raise InputError(no_polish(config.polish_passes, config.objective))
    if config.polish_passes and not model.polishes:
        raise InputError(f"polish_passes: must be 0 for {model.name}, refined by its own forward")
    check_adapt(config, model)
    if config.writes_files:
        model.check_codable()
    return pick_cuda_graphs(config, rounding, device)


def open_refiner(
    model: Architecture, rounding: Rounding, config: RefineConfig, device: torch.device
) -> "Refiner":
    """The refiner of a config; freezes the loaded model in place.

    Raises:
        InputError: the checkpoint's coding tables are broken; or see `refuse_impossible` and
            `use_directions_of`.
    """
    graphs = refuse_impossible(model, rounding, config, device)
    extra_vectors = 2 * LBFGS_HISTORY if config.optimizer.name == "LBFGS" else 0
    footprint = footprint_of(model).with_vectors(extra_vectors)
    if not objective_of(config, config.lmbda).distortion.is_mse:
        footprint = footprint.with_pictures()
    bound = memory_bound(footprint, config.max_memory_gb, device, ":" in config.device)
    bound = bound._replace(base=bound.base + bytes_of_fits(config, model))
    config = config.model_copy(update={"cuda_graphs": graphs})
    if graphs:  # the graph keeps the memory of a step, and evaluations need their own
        bound = bound._replace(limit=(bound.base + bound.limit) / 2)
    use_directions_of(config, model)
    coder = build_coder(model) if config.writes_files else None
    frozen = freeze(model.to(device), config.coder_scales)
    precision = getattr(torch, pick_precision(config.precision, device))
    return Refiner(frozen, coder, rounding, config, bound, precision)


def refine_and_save(
    refiner: "Refiner", batch: Sequence[LoadedImage], run: Run, on_batch: Callable[[Cost], None]
) -> None:
    """Refine images of one size together, save those with a result, and skip the others.

    Raises:
        BatchTooLargeError, ImageError: see `Refiner.refine_batch`.
    """
    failures = refiner.unfit(batch)
    for name, failure in failures.items():
        run.skip(name, str(failure))
    batch = [image for image in batch if image.name not in failures]
    if not batch:
        return
    with run.begin(batch) as progress:
        watch = Stopwatch(refiner.model.device)
        results, failures = refiner.refine_batch(batch, progress)
    seconds, peak = watch.read()
    share = seconds / len(batch)
    steps = [result.trajectory.rows[-1]["step"] for result in results.values()]
    cost = Cost(share, share / max([1, *steps]), peak, len(batch))
    for image in batch:
        if image.name in failures:
            run.skip(image.name, str(failures[image.name]))
        else:
            run.save(image, results[image.name], cost)
    on_batch(cost)


class BatchTooLargeError(Exception):
    """Several images do not fit into memory together; the message says why."""


@dataclass(frozen=True)
class Refiner:
    """Refines images with a frozen model, as a config says.

    coder: codes the results, if compressed files are wanted. bound: the memory limit. precision:
    see `Problem`.
    """

    model: Architecture
    coder: Coder | None
    rounding: Rounding
    config: RefineConfig
    bound: MemoryBound
    precision: torch.dtype

    @property
    def file_coder(self) -> Coder:
        """The coder, where files are wanted.

        Raises:
            ValueError: none are.
        """
        if self.coder is None:
            raise ValueError("the config asks for no files: there is no coder")
        return self.coder

    def most_at_once(self, size: tuple[int, int]) -> int:
        """How many images of size (H, W) are refined together."""
        if not self.model.batches:
            return 1
        return min(self.config.images_at_once, self.bound.images(size))

    def refine_batch(
        self, batch: Sequence[LoadedImage], progress: Progress
    ) -> tuple[dict[str, Refined], dict[str, ImageError]]:
        """The results of images of one size, by name, and why the others have none.

        Raises:
            BatchTooLargeError: several images do not fit into memory.
            ImageError: the batch is one image, which cannot be read, coded or kept in memory.
        """
        results, failures = {}, {}
        with self._named_failures(batch):
            problem = self._problem_of(batch)
            outcomes = self._outcomes_of(problem, [image.name for image in batch], progress)
            for image, image_problem, outcome in zip(
                batch, problem.images(), outcomes, strict=True
            ):
                try:
                    result = result_of(image_problem, *outcome, self.coder, image.region)
                    results[image.name] = result
                except ImageError as error:
                    failures[image.name] = error
        return results, failures

    def refine_image(self, image: LoadedImage, progress: Progress) -> Refined:
        """One image's result, with its compressed file if there is a coder.

        Raises:
            ImageError: the image cannot be refined or coded; the message says why.
        """
        for error in self.unfit([image]).values():
            raise error
        results, failures = self.refine_batch([image], progress)
        for error in failures.values():
            raise error
        return results[image.name]

    def unfit(self, batch: Sequence[LoadedImage]) -> dict[str, ImageError]:
        """The images that the config's objective or target cannot be had with, and why."""
        reasons = {image.name: self._misfit(image) for image in batch}
        return {name: ImageError(reason) for name, reason in reasons.items() if reason}

    def _misfit(self, image: LoadedImage) -> str:
        """Why an image is not refined; "" if it is."""
        if image.x is None:
            return ""
        config, (height, width) = self.config, image.x.shape[1:]
        distortion = objective_of(config, config.lmbda).distortion
        needs = {f"the objective {distortion.name}": distortion.least_side}
        if config.target_ms_ssim_db is not None:
            needs["target_ms_ssim_db"] = MS_SSIM_MIN_SIDE
        for what, side in needs.items():
            if min(height, width) < side:
                return f"has {width}x{height} pixels; {what} needs {side} or more a side"
        if distortion.weighs_nothing is not None:
            weights = weights_of_images([image], config.dev_options.region_strength)
            if weights is not None and distortion.weighs_nothing(weights):
                return "its map is black except near the border, where MS-SSIM does not look"
        return ""

    def _problem_of(self, batch: Sequence[LoadedImage]) -> Problem:
        x = torch.stack([image.pixels() for image in batch]).to(self.model.device)  # [B, 3, H, W]
        weights = weights_of_images(batch, self.config.dev_options.region_strength)
        release_memory(self.model.network)
        return Problem(
            self.model,
            x.contiguous(memory_format=torch.channels_last),
            objective_of(self.config, self.config.lmbda),
            self.bound.tile((x.size(2), x.size(3))),
            self.precision,
            None if weights is None else weights.to(self.model.device),
        )

    def _outcomes_of(
        self, problem: Problem, names: Sequence[str], progress: Progress
    ) -> Sequence[tuple[Trajectory, dict[str, Any] | None]]:
        """Each image's trajectory, and what its record says of the target, where there is one."""
        if self.config.target is not None:
            return [self._refine_to_target(self.config.target, problem, names[0], progress)]
        return [
            (trajectory, None)
            for trajectory in refine(problem, self.rounding, self.config, names, progress)
        ]

    def _refine_to_target(
        self, target: Target, problem: Problem, name: str, progress: Progress
    ) -> tuple[Trajectory, dict[str, Any]]:
        config = self.config

        def refine_at(lmbda: float, start: Start) -> Trajectory:
            release_memory(self.model.network)
            problem_at = problem.at(lmbda)
            (trajectory,) = refine(problem_at, self.rounding, config, [name], progress, start)
            return trajectory

        search = LambdaSearch(target, config.lmbda, config.usual_lambda)
        steps = config.tot_inference_iterations
        return refine_to_target(problem, self.file_coder, search, steps, refine_at, progress.note)

    @contextmanager
    def _named_failures(self, batch: Sequence[LoadedImage]) -> Iterator[None]:
        """Turn errors into a `BatchTooLargeError`, or an `ImageError` if the batch is one image."""
        try:
            yield
        except ImageError:
            raise
        except BitstreamError as error:  # from a search for a target, which refines one image
            raise ImageError(f"cannot be coded: {error}") from None
        except (InputError, RuntimeError, MemoryError) as error:
            reason = str(error)
            if not isinstance(error, InputError):
                if not is_out_of_memory(error):
                    raise
                reason = (
                    f"does not fit into the memory of {self.model.device}: "
                    "see max_memory_gb and batch_size"
                )
            kind = ImageError if len(batch) == 1 else BatchTooLargeError
            raise kind(reason) from None


def batches(
    images: Images,
    shares: Iterable[Sequence[str]],
    num_workers: int,
    most: Callable[[tuple[int, int]], int],
) -> Iterator[list[LoadedImage]]:
    """Read images of each share, and make batches of those that are `equal_sized`.

    No batch has images of two shares, so batches do not depend on who takes which share. The next
    share is asked for when the last one's images are used up, or when processes read ahead.

    Args:
        shares: names of images, some at a time.
        num_workers: how many processes read ahead, each one image.
        most: see `equal_sized`.
    """
    lengths: deque[int] = deque()

    def names() -> Iterator[str]:
        for share in shares:
            lengths.append(len(share))
            yield from share

    loaded = images.load(names(), num_workers)
    for first in loaded:
        share = chain([first], islice(loaded, lengths.popleft() - 1))
        yield from equal_sized(share, most)


def equal_sized(
    images: Iterable[LoadedImage], most: Callable[[tuple[int, int]], int]
) -> Iterator[list[LoadedImage]]:
    """Batches of consecutive images of one size, in the same order.

    An image that cannot be read is a batch of its own.

    Args:
        most: returns the largest number of images in a batch, for a size (H, W).
    """

    def shape(image: LoadedImage) -> tuple[int, int] | None:
        return None if image.x is None else (image.x.size(1), image.x.size(2))

    for size, equal in groupby(images, shape):
        while batch := list(islice(equal, 1 if size is None else most(size))):
            yield batch


if __name__ == "__main__":
    sys.exit(main())
