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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

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
from config import Optimizer, RefineConfig, Target, exits_with_one_line, parse_command_line
from datasets import open_images, seed_of
from experimental_inference_methods import Rounding, hard_round, rounding_from_config
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
    weights_hash,
)
from reporting import Progress, Stopwatch, join_ranks, machine_facts, open_run


@exits_with_one_line
def main(argv=None) -> int:
    """Refine every image of a config; exit code 0, 1 when an image failed, 2 for bad input."""
    config = parse_command_line(RefineConfig, "Refine the latents of images.", argv)
    rounding = rounding_from_config(config)
    ranks = join_ranks()
    device = pick_device(config.device, ranks.local)
    model = load_checkpoint(config.pretrain, config.channels)
    images = open_images(config)
    run = open_run(config, ranks, {
        "method": rounding.name, "params": rounding.params,
        "lmbda": None if config.target else config.lmbda,
        "weights": weights_hash(model), "N": model.N, "M": model.M, **machine_facts(device),
    })  # fmt: skip
    coder = build_coder(model) if config.writes_files else None
    model = freeze(model, config.coder_scales).to(device)

    for image in images.load(run.pending(images.names), config.num_workers):
        if image.x is None:
            run.skip(image.name, image.error)
            continue
        run.mention(image.name, image.notes)
        watch = Stopwatch(device)
        seed = seed_of(config.seed, image.name)
        try:
            x = image.x[None].to(device)  # [1, 3, H, W]
            with run.progress(image.name) as progress:
                if config.target is None:
                    result = refine(model, x, rounding, config, seed, progress)
                else:
                    result = refine_to_target(model, coder, x, rounding, config, seed, progress)
            if result.latents is None:
                run.skip(image.name, "its loss is not finite even before refinement")
                continue
            if coder is not None:
                write_files(model, coder, x, result)
            symbols = integer_latents(model, result.latents)
        except BitstreamError as error:
            run.skip(image.name, f"cannot be coded: {error}")
            continue
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            run.skip(image.name, f"does not fit into the memory of {device}")
            continue
        run.save(image, result, symbols, watch)
    return run.finish()


@dataclass
class Refinement:
    """What refining one image gave: the latents that were best when truly rounded, and the way.

    A row holds `step`, `temperature`, `lmbda` and the metrics of `evaluate` as `relaxed_*` and
    `true_*`; `base` and `best` are rows. base_latents are those that it began from. With files,
    `bitstream` is the refined one, and `files` has the measures of `base` and `refined`.
    """

    lmbda: float
    latents: Latents | None = None
    base_latents: Latents | None = None
    base: dict[str, Any] | None = None
    best: dict[str, Any] | None = None
    trajectory: list[dict[str, Any]] = field(default_factory=list)
    pictures: dict[str, Tensor] = field(default_factory=dict)
    stopped: str | None = None
    target: dict[str, Any] | None = None
    bitstream: bytes | None = None
    files: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, row: dict[str, Any], latents: Latents, x_hat: Tensor) -> None:
        """Note an evaluated step; keep its latents and picture if its true loss is the lowest."""
        self.trajectory.append(row)
        if not math.isfinite(row["true_loss"] + row["relaxed_loss"]):
            self.stopped = f"the loss is not finite at step {row['step']}"
        if row["true_loss"] < (self.best["true_loss"] if self.best else math.inf):
            self.best = row
            self.latents = Latents(*(v.detach().clone() for v in latents))
            self.pictures["refined"] = x_hat
        if self.base is None:
            self.base, self.base_latents = row, self.latents


def refine(
    model,
    x: Tensor,
    rounding: Rounding,
    config: RefineConfig,
    seed: int,
    progress: Callable[[Tensor, float], None],
    lmbda: float | None = None,
    start: Latents | None = None,
    first_step: int = 0,
) -> Refinement:
    """Overfit the latents of x [1, 3, H, W] in [0, 1] to it; the noise follows from `seed`.

    Every `eval_freq` steps and at the end the latents are truly rounded and evaluated, before that
    step's update; the first, no refinement, competes too, so the result is never worse.

    Args:
        lmbda, start: the config's lambda and the encoder's latents where there are none.
        first_step: where in the schedule of temperatures and learning rates to begin.
    """
    options, steps = config.dev_options, config.tot_inference_iterations
    lmbda = config.lmbda if lmbda is None else lmbda
    start = analyze(model, x) if start is None else start
    latents = Latents(*(v.clone().requires_grad_() for v in start))
    optimizer = build_optimizer(latents, config.optimizer)
    generator = torch.Generator(x.device)
    pictured = {first_step, 1, 500, steps} if options.save_final else set()
    result = Refinement(lmbda)

    def relaxed_rounding() -> Callable[[Tensor], Tensor]:
        # Seeded by the step: the same noise however often LBFGS asks within it.
        return rounding.at(step, generator.manual_seed(seed + step))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = rd_pass(model, x, latents, relaxed_rounding(), lmbda)["loss"].sum()
        # The augmented loss averages in the true loss, a constant: half the gradient.
        (loss / 2 if options.augmented_loss else loss).backward()
        for v in latents:
            # LBFGS flattens gradients, which channels-last networks leave strided.
            v.grad = v.grad.contiguous()
        return loss

    for step in range(first_step, steps + 1):
        due = step % config.eval_freq == 0 or step in (first_step, steps)
        if due or step in pictured:
            true, x_hat = evaluate(model, x, latents, hard_round, lmbda)
        if step in pictured:
            result.pictures["base" if step == first_step else f"step_{step:04d}"] = x_hat
        if due:
            relaxed, _ = evaluate(model, x, latents, relaxed_rounding(), lmbda)
            row = {"step": step, "temperature": rounding.temperature(step), "lmbda": lmbda}
            row |= {f"relaxed_{key}": value for key, value in relaxed.items()}
            row |= {f"true_{key}": value for key, value in true.items()}
            result.add(row, latents, x_hat)
            if step == steps or result.stopped:
                break
        if options.custom_lr is not None:
            optimizer.param_groups[0]["lr"] = options.custom_lr.at(step)
        loss = optimizer.step(closure)
        progress(loss, result.best["true_loss"])
    return result


def refine_to_target(
    model,
    coder: Coder,
    x: Tensor,
    rounding: Rounding,
    config: RefineConfig,
    seed: int,
    progress: Progress,
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
        result = refine(model, x, rounding, config, seed + len(tried), progress, search.lmbda,
                        start, first_step)  # fmt: skip
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
    taken = 0
    for result in tried:
        first = result.trajectory[0]["step"]
        for row in result.trajectory:
            row["step"] += taken - first
        taken = result.trajectory[-1]["step"]
    # Where one run ends the next one begins: its first row would stand there twice.
    way = [*tried[0].trajectory, *(row for result in tried[1:] for row in result.trajectory[1:])]
    base = dict(tried[0].base)
    for kind in ("relaxed", "true"):
        mse = 10 ** (-base[f"{kind}_psnr_raw"] / 10)
        base[f"{kind}_loss"] = base[f"{kind}_bpp"] + chosen.lmbda * 255**2 * mse
    kept = {"base": tried[0].pictures.get("base"), "refined": chosen.pictures["refined"]}
    return replace(
        chosen,
        base=base,
        base_latents=tried[0].base_latents,
        trajectory=way,
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
    model, x: Tensor, latents: Latents, rounding: Callable[[Tensor], Tensor], lmbda: float
) -> tuple[dict[str, float | None], Tensor]:
    """Metrics of latents rounded by `rounding`, and x_hat [1, 3, H, W]; x [1, 3, H, W] in [0, 1].

    loss; bpp, bpp_y, bpp_z; psnr of clamped 8-bit pixels and psnr_raw of the networks' floats, dB;
    ms_ssim and ms_ssim_db of 8-bit pixels, None where a side is under 161 pixels.
    """
    terms = rd_pass(model, x, latents, rounding, lmbda)
    metrics = {key: terms[key].item() for key in ("loss", "bpp", "bpp_y", "bpp_z")}
    metrics |= {"psnr_raw": psnr(terms["mse"]).item(), **picture_quality(terms["x_hat"], x)}
    return metrics, to_8_bit(terms["x_hat"])


def build_optimizer(latents: Latents, options: Optimizer) -> torch.optim.Optimizer:
    """The optimizer of y and z that a config names."""
    if options.name == "adam":
        return torch.optim.Adam(latents, lr=options.lr)
    if options.name == "sgd":
        return torch.optim.SGD(latents, lr=options.lr, momentum=options.momentum)
    return torch.optim.LBFGS(latents, lr=options.lr)


if __name__ == "__main__":
    sys.exit(main())
