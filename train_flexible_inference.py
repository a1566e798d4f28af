"""Refine the latents of images under a frozen mean-scale hyperprior.

python train_flexible_inference.py --config example_files/flexible_inference.json
python train_flexible_inference.py --config example_files/baselines/sga.json --set save_name=mine
torchrun --nproc_per_node=2 train_flexible_inference.py --config example_files/two_class_ssl.json

For every image: encode it to y and z once, then move y and z by gradient descent on
bpp + lambda * 255^2 * MSE, rounded by the chosen relaxation; keep what is best when truly rounded.
Methods: Perugachi-Diaz, Gansekoele, Bhulai 2024 (arXiv 2401.17789); Yang, Bamler, Mandt 2020
(arXiv 2006.04240).
"""

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count, groupby, islice
from statistics import fmean
from types import MappingProxyType
from typing import Any

from config import (
    EarlyStop,
    InputError,
    Optimizer,
    RefineConfig,
    Target,
    exits_with_one_line,
    parse_command_line,
)

# isort: split
import torch
from torch import Tensor

from codec import (
    BitstreamError,
    Coder,
    build_coder,
    decode_picture,
    encode_latents,
    file_measures,
)
from common.measuring import Cost, Stopwatch, machine_facts
from common.processes import first_rank_does, join_ranks
from common.progress import Progress
from datasets import LoadedImage, open_images, seed_of
from experimental_inference_methods import Pace, Rounding, hard_round, rounding_from_config
from fast_layers import keep_pages
from metrics import mean_squared_error, picture_quality, psnr, to_8_bit
from models import (
    Latents,
    analyze,
    freeze,
    integer_latents,
    is_out_of_memory,
    load_checkpoint,
    pick_device,
    rd_pass,
    release_memory,
    weights_hash,
)
from polish import cost_in_steps, polish
from refinement.run import Run, open_run
from reports.run_report import write_run_report
from tiles import MemoryBound, memory_bound

LBFGS_HISTORY = 100  # torch's own
LEAST_POLISH = cost_in_steps(4)  # steps: with less time than they take, descent has all of it


@exits_with_one_line
def main(argv=None) -> int:
    """Refine every image of a config; exit code 0, 1 when an image failed, 2 for bad input."""
    return refine_images(parse_command_line(RefineConfig, "Refine the latents of images.", argv))


def refine_images(
    config: RefineConfig, on_image: Callable[[Cost], None] = lambda cost: None
) -> int:
    """Refine every image of a config that is not done yet; 0, or 1 when an image failed.

    Args:
        on_image: told what each image took.

    Raises:
        InputError: what the config names is missing or wrong. OSError: a file cannot be written.
    """
    keep_pages()
    rounding = rounding_from_config(config)
    ranks = join_ranks()
    device = pick_device(config.device, ranks.local)
    model = load_checkpoint(config.pretrain, config.channels)
    images = open_images(config)
    run = open_run(config, ranks, {
        "method": rounding.name, "params": rounding.params, "overridden": rounding.overridden,
        "lmbda": None if config.target else config.lmbda,
        "weights": weights_hash(model), "N": model.N, "M": model.M, **machine_facts(device),
    })  # fmt: skip
    coder = build_coder(model) if config.writes_files else None
    vectors = 2 * LBFGS_HISTORY if config.optimizer.name == "LBFGS" else 0
    bound = memory_bound(
        model.N, model.M, config.max_memory_gb, device, ":" in config.device, vectors
    )
    model = freeze(model.to(device), config.coder_scales)

    loaded = images.load(run.pending(images), config.num_workers)
    for batch in equal_sized(loaded, lambda size: min(config.images_at_once, bound.images(size))):
        if batch[0].x is None:
            run.skip(batch[0].name, batch[0].error)
            continue
        for image in batch:
            run.mention(image.name, image.notes)
        waiting = [batch]
        while waiting:
            part, watch = waiting.pop(0), Stopwatch(device)
            try:
                results = refine_batch(model, coder, part, rounding, config, run, bound)
            except RefinementError as error:
                if len(part) > 1:
                    run.split(part, str(error))
                    waiting += [[image] for image in part]
                else:
                    run.skip(part[0].name, str(error))
                continue
            cost = cost_of(results, watch)
            for image, result in zip(part, results, strict=True):
                if isinstance(result, str):
                    run.skip(image.name, result)
                elif run.save(image, result, integer_latents(model, result.latents), cost):
                    on_image(cost)
    failed = run.gather_failures()
    return first_rank_does(
        ranks, lambda: write_run_report(run.folder, run.merge_records(), failed, run.facts)
    )


def cost_of(results: Sequence["Refinement | str"], watch: Stopwatch) -> Cost:
    """Each image's share of what a batch took."""
    seconds, peak = watch.read()
    share = seconds / len(results)
    steps = [result.trajectory[-1]["step"] for result in results if not isinstance(result, str)]
    return Cost(share, share / max([1, *steps]), peak, len(results))


class RefinementError(Exception):
    """A batch cannot be refined here; says why."""


def refine_batch(
    model,
    coder: Coder | None,
    batch: Sequence[LoadedImage],
    rounding: Rounding,
    config: RefineConfig,
    run: Run,
    bound: MemoryBound,
) -> list["Refinement | str"]:
    """What refining images of one size gave, files and all, or why one has no result.

    Raises:
        RefinementError: they do not fit into memory.
    """
    seeds = [seed_of(config.seed, image.name) for image in batch]
    device = next(model.buffers()).device
    try:
        x = torch.stack([image.x for image in batch]).to(device)  # [B, 3, H, W]
        tile = bound.tile(x.shape[2:])
        with run.progress([image.name for image in batch]) as progress:
            if config.target is None:
                results = refine(model, x, rounding, config, seeds, progress, tile=tile)
            else:
                results = [refine_to_target(model, coder, x, rounding, config, seeds[0], progress,
                                            tile)]  # fmt: skip
        return [finished(model, coder, x[i : i + 1], result) for i, result in enumerate(results)]
    except BitstreamError as error:  # while a target was searched, which takes one image
        return [f"cannot be coded: {error}"]
    except InputError as error:
        raise RefinementError(str(error)) from None
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise RefinementError(
            f"does not fit into the memory of {device}: see max_memory_gb and batch_size"
        ) from None


def finished(model, coder: Coder | None, x: Tensor, result: "Refinement") -> "Refinement | str":
    """A refinement of x [1, 3, H, W] with its files, or why it has no result."""
    if result.latents is None:
        return "its loss is not finite even before refinement"
    try:
        if coder is not None:
            write_files(model, coder, x, result)
    except BitstreamError as error:
        return f"cannot be coded: {error}"
    return result


def equal_sized(
    images: Iterable[LoadedImage], most: Callable[[tuple[int, int]], int]
) -> Iterator[list[LoadedImage]]:
    """Batches of consecutive images of one size (H, W), at most `most` of it; in the same order.

    An image that cannot be read is a batch of its own.
    """

    def shape(image: LoadedImage) -> tuple[int, int] | None:
        return None if image.x is None else tuple(image.x.shape[1:])

    for size, equal in groupby(images, shape):
        while batch := list(islice(equal, 1 if size is None else most(size))):
            yield batch


@dataclass
class Refinement:
    """What refining one image gave: the latents that were best when truly rounded, and the way.

    A row holds `step`, `temperature`, `lmbda` and the metrics of `evaluate` as `relaxed_*` and
    `true_*`; `base` and `best` are rows. base_latents are those that it began from. With files,
    `bitstream` is the refined one, and `files` has the measures of `base` and `refined`. `clock`
    has the seconds, this image's share of its batch's, at which each row was there.
    """

    lmbda: float
    early_stop: EarlyStop | None = None
    keeps_pictures: bool = False
    latents: Latents | None = None
    base_latents: Latents | None = None
    base: dict[str, Any] | None = None
    best: dict[str, Any] | None = None
    trajectory: list[dict[str, Any]] = field(default_factory=list)
    pictures: dict[str, Tensor] = field(default_factory=dict)
    clock: list[float] = field(default_factory=list)
    stopped: str | None = None
    settled: bool = False
    noise: Tensor | None = None
    target: dict[str, Any] | None = None
    bitstream: bytes | None = None
    files: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def over(self) -> bool:
        """Whether more steps are no use, for the loss is not finite or has settled."""
        return self.settled or self.stopped is not None

    @property
    def true_losses(self) -> list[float]:
        """The true loss at each row."""
        return [row["true_loss"] for row in self.trajectory]

    @property
    def lowest(self) -> float:
        """The lowest true loss so far; infinite where none was finite."""
        return self.best["true_loss"] if self.best else math.inf

    def add(self, row: dict[str, Any], latents: Latents, x_hat: Tensor, seconds: float) -> None:
        """Note an evaluated step; keep copies of its latents, and picture, if it is the best."""
        self.trajectory.append(row)
        self.clock.append(seconds)
        if not math.isfinite(row["true_loss"] + row["relaxed_loss"]):
            self.stopped = f"the loss is not finite at step {row['step']}"
        if row["true_loss"] < self.lowest:
            self.best = row
            self.latents = Latents(*(v.detach().clone() for v in latents))
            if self.keeps_pictures:
                self.pictures["refined"] = x_hat.clone()
        if self.base is None:
            self.base, self.base_latents = row, self.latents


def refine(
    model,
    x: Tensor,
    rounding: Rounding,
    config: RefineConfig,
    seeds: Sequence[int],
    progress: Callable[[Tensor, Tensor | float], None],
    lmbda: float | None = None,
    start: Latents | None = None,
    first_step: int = 0,
    tile: int | None = None,
) -> list[Refinement]:
    """Overfit the latents of images x [B, 3, H, W] in [0, 1], each to its image.

    Every `eval_freq` steps and at the end the latents are truly rounded and evaluated, before that
    step's update; the first, no refinement, competes too, so no result is worse. Nothing waits for
    a GPU in between. `max_seconds` and `early_stop` may leave steps out.

    Args:
        seeds: of each image's noise.
        lmbda, start: the config's lambda and the encoder's latents where there are none.
        first_step: where in the schedule of temperatures and learning rates to begin.
        tile: positions of y a side that g_s sees at a time; all without it.
    """
    options, steps = config.dev_options, config.tot_inference_iterations
    lmbda = config.lmbda if lmbda is None else lmbda
    precision = getattr(torch, config.precision)
    seconds, polishing = None, cost_in_steps(config.polish_passes)
    if config.max_seconds:
        seconds = config.max_seconds * len(x)
    pace = Pace(first_step, steps, seconds, polishing / (steps + polishing), LEAST_POLISH)
    release_memory(model)
    x = x.contiguous(memory_format=torch.channels_last)
    start = analyze(model, x) if start is None else start
    latents = Latents(*(v.clone().requires_grad_() for v in start))
    optimizer = build_optimizer(latents, config.optimizer)
    generators = [torch.Generator(x.device) for _ in seeds]
    pictured = {first_step, 1, 500} if options.save_final else set()
    results = [Refinement(lmbda, config.early_stop, options.save_final) for _ in seeds]
    losses = torch.zeros(len(x))

    def relaxed_rounding() -> Callable[[Tensor], Tensor]:
        # Seeded by the step: the same noise however often LBFGS asks within it.
        noise = (g.manual_seed(seed + step) for g, seed in zip(generators, seeds, strict=True))
        return image_by_image([rounding.at(pace.position, generator) for generator in noise])

    def closure() -> Tensor:
        nonlocal losses
        optimizer.zero_grad()
        terms = rd_pass(model, x, latents, relaxed_rounding(), lmbda, tile, precision)
        losses, loss = terms["loss"].detach(), terms["loss"].sum()
        # The augmented loss averages in the true loss, a constant: half the gradient.
        objective = loss / 2 if options.augmented_loss else loss
        objective.backward()
        if isinstance(optimizer, torch.optim.LBFGS):
            for v in latents:
                # It flattens gradients, which channels-last networks leave strided.
                v.grad = v.grad.contiguous()
        return objective

    for step in count(first_step):
        due = step % config.eval_freq == 0 or step == first_step or pace.over
        began = pace.elapsed
        if pace.over and pictured:
            pictured.add(step)
        if due or step in pictured:
            true, x_hat = evaluate(model, x, latents, hard_round, lmbda, tile)
        if step in pictured:
            keep_pictures(results, x_hat, "base" if step == first_step else f"step_{step:04d}")
        if due:
            relaxed, _ = evaluate(model, x, latents, relaxed_rounding(), lmbda, tile, precision)
            at = {"step": step, "temperature": rounding.temperature(pace.position), "lmbda": lmbda}
            add_rows(results, generators, at, relaxed, true, latents, x_hat, pace.elapsed / len(x))
            if step == first_step:
                pace.set_aside(pace.elapsed - began)  # for the last evaluation
            if pace.over or all(result.over for result in results):
                break
        optimizer.param_groups[0]["lr"] = config.lr_at(pace.position)
        optimizer.step(closure)
        pace.advance()
        going = [index for index, result in enumerate(results) if not result.over]
        # An index would wait for a GPU.
        shown = losses if len(going) == len(results) else losses[going]
        progress(shown.mean(), fmean(results[index].lowest for index in going))
    if config.polish_passes:
        polish_results(model, x, results, config, generators, pace, tile, progress)
    return results


def keep_pictures(results: Sequence[Refinement], x_hat: Tensor, label: str) -> None:
    """Give each refinement that goes on its picture of x_hat [B, 3, H, W]."""
    for result, picture in zip(results, x_hat.split(1), strict=True):
        if not result.over:
            result.pictures[label] = picture.clone()


def add_rows(
    results: Sequence[Refinement],
    generators: Sequence[torch.Generator],
    at: dict[str, Any],
    relaxed: Sequence[dict[str, float | None]],
    true: Sequence[dict[str, float | None]],
    latents: Latents,
    x_hat: Tensor,
    seconds: float,
) -> None:
    """Add an evaluated step, `at` which it was, to each refinement that goes on."""
    for index, result in enumerate(results):
        if not result.over:
            row = at | {f"relaxed_{key}": value for key, value in relaxed[index].items()}
            row |= {f"true_{key}": value for key, value in true[index].items()}
            own = slice(index, index + 1)
            result.add(row, Latents(*(v[own] for v in latents)), x_hat[own], seconds)
            if result.early_stop and result.early_stop.settled(result.true_losses):
                # The polish goes on with this noise, as if the image were alone.
                result.settled, result.noise = True, generators[index].get_state()


def polish_results(
    model,
    x: Tensor,
    results: Sequence[Refinement],
    config: RefineConfig,
    generators: Sequence[torch.Generator],
    pace: Pace,
    tile: int | None,
    progress: Callable[[Tensor, Tensor], None],
) -> None:
    """Polish the best latents of each image of x [B, 3, H, W]; one more row says what that gave.

    With `max_seconds` each image has its share of the time that is left. One whose loss became
    infinite keeps the best that it had.
    """
    left = [index for index, result in enumerate(results) if not result.stopped]
    pixels = x.size(2) * x.size(3)
    for nth, index in enumerate(left):
        own, result, seconds = slice(index, index + 1), results[index], None
        if config.max_seconds:
            limit = config.max_seconds * len(x)
            evaluation = (limit - pace.seconds) / (2 * len(x))  # two of all images were set aside
            seconds = (limit - pace.elapsed) / (len(left) - nth) - evaluation
            # A step of the batch is one of each image.
            if seconds < LEAST_POLISH * pace.each / len(x):
                break
        if result.noise is not None:
            generators[index].set_state(result.noise)
        passes = Pace(0, config.polish_passes, seconds)
        lowest = fmean(results[index].lowest for index in left)

        def on_pass(gain: Tensor, lowest: float = lowest) -> None:
            loss = lowest - gain.mean() / pixels / len(left)
            progress(loss, loss)  # nothing is relaxed any more

        latents = polish(model, x[own], result.latents, result.lmbda, passes, generators[index],
                         tile, on_pass)  # fmt: skip
        (metrics,), x_hat = evaluate(model, x[own], latents, hard_round, result.lmbda, tile)
        row = {f"{kind}_{key}": v for kind in ("relaxed", "true") for key, v in metrics.items()}
        step = result.trajectory[-1]["step"] + passes.taken
        row = {"step": step, "temperature": 0.0, "lmbda": result.lmbda} | row
        result.add(row, latents, x_hat, result.clock[-1] + passes.elapsed)


def image_by_image(roundings: Sequence[Callable[[Tensor], Tensor]]) -> Callable[[Tensor], Tensor]:
    """One rounding of v [B, ...] that lets each of B roundings have its image."""
    if len(roundings) == 1:
        return roundings[0]
    return lambda v: torch.cat(
        [rounding(part) for rounding, part in zip(roundings, v.split(1), strict=True)]
    )


def refine_to_target(
    model,
    coder: Coder,
    x: Tensor,
    rounding: Rounding,
    config: RefineConfig,
    seed: int,
    progress: Progress,
    tile: int | None = None,
) -> Refinement:
    """Refine x [1, 3, H, W] in [0, 1] at that lambda at which its file meets the config's target.

    The whole run comes first, at the lambda that the unrefined file suggests. Then runs over the
    second half of the schedule mend lambda, each from the latents of the one before. The closest
    counts.
    """
    target, steps = config.target, config.tot_inference_iterations
    tried: list[Refinement] = []

    def measure(latents: Latents) -> float:
        data = encode_latents(coder, integer_latents(model, latents), tuple(x.shape[2:]))
        if target.kind == "bpp":
            return 8 * len(data) / (x.size(2) * x.size(3))
        return psnr(mean_squared_error(to_8_bit(decode_picture(coder, data)), x.cpu())).item()

    def with_target(result: Refinement, value: float) -> Refinement:
        met = target.miss(value) <= 1
        values = {"kind": target.kind, "wanted": target.wanted, "got": value, "met": met}
        return replace(result, target=values)

    unrefined = measure(analyze(model, x))
    search = LambdaSearch(target, config.lmbda, config.train_lambda, unrefined)
    first_step, start = 0, None
    while search.goes_on:
        (result,) = refine(model, x, rounding, config, [seed + len(tried)], progress, search.lmbda,
                           start, first_step, tile)  # fmt: skip
        if result.latents is None:
            return result
        value = measure(result.latents)
        tried.append(with_target(result, value))
        progress.note(f"lambda {result.lmbda:.4g}: {target.in_words(value)}")
        if result.stopped:
            break
        search.tell(value)
        first_step, start = steps // 2, result.latents
    chosen = min(tried, key=lambda result: target.miss(result.target["got"]))
    if target.miss(unrefined) < target.miss(chosen.target["got"]) and not chosen.target["met"]:
        first = tried[0]
        chosen = replace(with_target(first, unrefined), latents=first.base_latents, best=first.base)
    return joined(tried, chosen)


class LambdaSearch:
    """Which lambda to try next for files to meet a target: secants in log lambda.

    A larger lambda gives a larger file of a better picture. A trial's latents have not yet followed
    its lambda all the way, which flattens a secant: of the last three the steepest counts.
    """

    # Of log bpp, and of PSNR in dB, per unit of log lambda: about what the bundled models have.
    SLOPES = MappingProxyType({"bpp": 0.17, "psnr": 0.8})
    TRIALS, LONGEST_STEP, REACH = 10, math.log(4), math.log(1024)

    def __init__(self, target: Target, lmbda: float, train_lambda: float, unrefined: float):
        self.target = target
        self.goes_on, self.trials, self.last = True, 0, None
        self.secants: list[float] = []
        start, centre = math.log(lmbda), math.log(train_lambda)
        self.bounds = min(centre - self.REACH, start), max(centre + self.REACH, start)
        self.position = self._step(start, self._off(unrefined), self.SLOPES[target.kind])

    @property
    def lmbda(self) -> float:
        """The lambda to try."""
        return math.exp(self.position)

    def tell(self, value: float) -> None:
        """What this lambda gave: the next one is set, or the search ends (`goes_on`)."""
        off, slope = self._off(value), self.SLOPES[self.target.kind]
        if self.last is not None and self.last[0] != self.position:
            position, before = self.last
            self.secants.append((off - before) / (self.position - position))
        if self.secants:
            slope = min(max(*self.secants[-3:], 0.3 * slope), 4 * slope)
        following = self._step(self.position, off, slope)
        gained = self.last is None or abs(self.last[1]) - abs(off) > 0.005
        stuck = following == self.position and not gained
        self.trials += 1
        self.goes_on = self.target.miss(value) > 1 and not stuck and self.trials < self.TRIALS
        self.last, self.position = (self.position, off), following

    def _off(self, value: float) -> float:
        wanted = self.target.wanted
        return math.log(value / wanted) if self.target.kind == "bpp" else min(value, 99.0) - wanted

    def _step(self, position: float, off: float, slope: float) -> float:
        step = min(max(-off / slope, -self.LONGEST_STEP), self.LONGEST_STEP)
        return min(max(position + step, self.bounds[0]), self.bounds[1])


def joined(tried: Sequence[Refinement], chosen: Refinement) -> Refinement:
    """One of several refinements in a row, with the way of all up to the last, and their base.

    Steps count on; the base's loss is that at the chosen lambda.
    """
    taken, seconds = 0, 0.0
    for result in tried:
        first = result.trajectory[0]["step"]
        for row in result.trajectory:
            row["step"] += taken - first
        result.clock = [seconds + time for time in result.clock]
        taken, seconds = result.trajectory[-1]["step"], result.clock[-1]
    # Where one run ends the next one begins: its first row would stand there twice.
    way, clock = (
        [
            *getattr(tried[0], key),
            *(one for result in tried[1:] for one in getattr(result, key)[1:]),
        ]
        for key in ("trajectory", "clock")
    )
    base = dict(tried[0].base)
    for kind in ("relaxed", "true"):
        mse = 10 ** (-base[f"{kind}_psnr_raw"] / 10)
        base[f"{kind}_loss"] = base[f"{kind}_bpp"] + chosen.lmbda * 255**2 * mse
    kept = {"base": tried[0].pictures.get("base"), "refined": chosen.pictures.get("refined")}
    return replace(
        chosen,
        base=base,
        base_latents=tried[0].base_latents,
        trajectory=way,
        clock=clock,
        pictures={label: x_hat for label, x_hat in kept.items() if x_hat is not None},
        target={**chosen.target, "stretches": len(tried)},
    )


def write_files(model, coder: Coder, x: Tensor, result: Refinement) -> None:
    """Code base and refined latents of x [1, 3, H, W]; measure rate and quality on the files.

    Raises:
        BitstreamError: see `codec.encode_latents`.
    """
    for label, latents in (("base", result.base_latents), ("refined", result.latents)):
        symbols = integer_latents(model, latents)
        result.bitstream = encode_latents(coder, symbols, tuple(x.shape[2:]))
        x_hat = decode_picture(coder, result.bitstream)
        result.files[label] = file_measures(result.bitstream, x_hat, x)
        if label in result.pictures:
            result.pictures[label] = to_8_bit(x_hat)


@torch.no_grad()
def evaluate(
    model,
    x: Tensor,
    latents: Latents,
    rounding: Callable[[Tensor], Tensor],
    lmbda: float,
    tile: int | None = None,
    precision: torch.dtype = torch.float32,
) -> tuple[list[dict[str, float | None]], Tensor]:
    """Metrics of each image's latents rounded by `rounding`, and x_hat; x [B, 3, H, W] in [0, 1].

    loss; bpp, bpp_y, bpp_z; psnr of clamped 8-bit pixels and psnr_raw of the networks' floats, dB;
    ms_ssim and ms_ssim_db of 8-bit pixels, None where a side is under 161 pixels. x_hat has 8 bits.
    """
    terms = rd_pass(model, x, latents, rounding, lmbda, tile, precision)
    columns = {key: terms[key].tolist() for key in ("loss", "bpp", "bpp_y", "bpp_z")}
    columns["psnr_raw"] = psnr(terms["mse"]).tolist()
    x_hat = to_8_bit(terms["x_hat"])
    metrics = []
    for index, values in enumerate(zip(*columns.values(), strict=True)):
        own = slice(index, index + 1)
        quality = picture_quality(x_hat[own], x[own])
        metrics.append({**dict(zip(columns, values, strict=True)), **quality})
    return metrics, x_hat


def build_optimizer(latents: Latents, options: Optimizer) -> torch.optim.Optimizer:
    """The optimizer of y and z that a config names."""
    if options.name == "adam":
        return torch.optim.Adam(latents, lr=options.lr, fused=True)
    if options.name == "sgd":
        return torch.optim.SGD(latents, lr=options.lr, momentum=options.momentum)
    return torch.optim.LBFGS(latents, lr=options.lr, history_size=LBFGS_HISTORY)


if __name__ == "__main__":
    sys.exit(main())
