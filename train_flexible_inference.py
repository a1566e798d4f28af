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
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from config import Optimizer, RefineConfig, exits_with_one_line, parse_command_line
from datasets import open_images, seed_of
from experimental_inference_methods import Rounding, hard_round, rounding_from_config
from metrics import picture_quality, psnr, to_8_bit
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
from reporting import Stopwatch, join_ranks, machine_facts, open_run


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
        "method": rounding.name, "params": rounding.params, "lmbda": config.lmbda,
        "weights": weights_hash(model), "N": model.N, "M": model.M, **machine_facts(device),
    })  # fmt: skip
    model = freeze(model).to(device)

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
                result = refine(model, x, rounding, config, seed, progress)
            if result.latents is None:
                run.skip(image.name, "its loss is not finite even before refinement")
                continue
            symbols = integer_latents(model, result.latents)
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

    A row holds `step`, `temperature` and the metrics of `evaluate` as `relaxed_*` and `true_*`.
    """

    latents: Latents | None = None
    best: dict[str, Any] | None = None
    trajectory: list[dict[str, Any]] = field(default_factory=list)
    pictures: dict[str, Tensor] = field(default_factory=dict)
    stopped: str | None = None

    def add(self, row: dict[str, Any], latents: Latents, x_hat: Tensor) -> None:
        """Note an evaluated step; keep its latents and picture if its true loss is the lowest."""
        self.trajectory.append(row)
        if not math.isfinite(row["true_loss"] + row["relaxed_loss"]):
            self.stopped = f"the loss is not finite at step {row['step']}"
        if row["true_loss"] < (self.best["true_loss"] if self.best else math.inf):
            self.best = row
            self.latents = Latents(*(v.detach().clone() for v in latents))
            self.pictures["refined"] = x_hat


def refine(
    model,
    x: Tensor,
    rounding: Rounding,
    config: RefineConfig,
    seed: int,
    progress: Callable[[int, Tensor, float], None],
) -> Refinement:
    """Overfit the latents of x [1, 3, H, W] in [0, 1] to it; the noise follows from `seed`.

    Every `eval_freq` steps and at the end the latents are truly rounded and evaluated, before that
    step's update; step 0, no refinement, competes too, so the result is never worse.
    """
    options, steps = config.dev_options, config.tot_inference_iterations
    latents = Latents(*(v.requires_grad_() for v in analyze(model, x)))
    optimizer = build_optimizer(latents, config.optimizer)
    generator = torch.Generator(x.device)
    pictured = {0, 1, 500, steps} if options.save_final else set()
    result = Refinement()

    def relaxed_rounding() -> Callable[[Tensor], Tensor]:
        # Seeded by the step: the same noise however often LBFGS asks within it.
        return rounding.at(step, generator.manual_seed(seed + step))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = rd_pass(model, x, latents, relaxed_rounding(), config.lmbda)["loss"].sum()
        # The augmented loss averages in the true loss, a constant: half the gradient.
        (loss / 2 if options.augmented_loss else loss).backward()
        for v in latents:
            # LBFGS flattens gradients, which channels-last networks leave strided.
            v.grad = v.grad.contiguous()
        return loss

    for step in range(steps + 1):
        due = step % config.eval_freq == 0 or step == steps
        if due or step in pictured:
            true, x_hat = evaluate(model, x, latents, hard_round, config.lmbda)
        if step in pictured:
            result.pictures["base" if step == 0 else f"step_{step:04d}"] = x_hat
        if due:
            relaxed, _ = evaluate(model, x, latents, relaxed_rounding(), config.lmbda)
            row = {"step": step, "temperature": rounding.temperature(step)}
            row |= {f"relaxed_{key}": value for key, value in relaxed.items()}
            row |= {f"true_{key}": value for key, value in true.items()}
            result.add(row, latents, x_hat)
            if step == steps or result.stopped:
                break
        if options.custom_lr is not None:
            optimizer.param_groups[0]["lr"] = options.custom_lr.at(step)
        loss = optimizer.step(closure)
        progress(step, loss, result.best["true_loss"])
    return result


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
