"""Is what a GPU computes right? Each check is one number with a bound, see `CHECKS`.

The truth is CompressAI's own layers in float64 by autograd, its own decoder of files, this
project's results on the CPU, or what must not depend on batches, tiles or a stop. The checks run at
toy size on a CPU, too.
"""

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from adaptation.least_squares import quadratic_of
from architectures import Latents
from benchmarks.gpu_bench import (
    Bench,
    largest_change,
    last_relaxed,
    losses_of,
    percent,
    refine_all,
    relative_error,
)
from benchmarks.gpu_setting import AfterStep, Skipped, backend, photos, quietly
from benchmarks.objectives import MS_SSIM, with_ms_ssim
from benchmarks.refinement_loops import plain_loss, weighted_mse
from benchmarks.variant import LMBDA
from coding.bitstream import read_bitstream
from coding.coder import build_coder, decode_latents
from common.images import LoadedImage
from models import load_checkpoint, prepare_for_training
from objectives import Problem, RateDistortion
from refinement.batch import Metrics

TILE = 2  # side, in positions of y: many tiles even in a small picture
BATCH = 4


class Finding(NamedTuple):
    """What a check found: a value, which must be at most `bound`."""

    value: float
    bound: float
    unit: str

    @property
    def passed(self) -> bool:
        """Whether the value keeps to the bound; not a number does not."""
        return self.value <= self.bound


# --- the checks -----------------------------------------------------------------------------------

MSE = RateDistortion(LMBDA)
Check = Callable[[Bench], Finding]
CHECKS: dict[str, Check] = {}


def check(name: str, tf32: str = "off", **settings: Any) -> Callable[[Callable], Callable]:
    """Decorator: register a check under a name.

    Args:
        tf32: see `backend`.
        settings: keyword arguments of the decorated function.
    """

    def register(function: Callable[..., Finding]) -> Callable[..., Finding]:
        def run(bench: Bench) -> Finding:
            with backend(tf32), quietly():
                return function(bench, **settings)

        CHECKS[name] = run
        return function

    return register


# The decorator nearest to a function registers first.
@check("refinement of two photos, beside the CPU, TF32 on", tf32="on")
@check("refinement of two photos, beside the CPU, TF32 off")
def same_as_cpu(bench: Bench) -> Finding:
    """The fast recipe. Other noise, as a GPU's, changes the mean true loss by 0.03 %."""
    losses = losses_of(bench.refiner(bench.device, *bench.scale.recipe), bench.x)
    return Finding(abs(percent(losses, bench.losses_on_cpu)), 0.2, "% of the true loss")


def shifted(v: Tensor) -> Tensor:
    """In place of rounding: smooth, and the same on each device."""
    return v + 0.3


def leaves(latents: Latents, like: Tensor) -> Latents:
    """Copies with like's device and dtype, to which gradients can be taken."""
    return {name: v.detach().to(like).requires_grad_() for name, v in latents.items()}


@check("a fit's quadratic function of the last layer, TF32 on", tf32="on", bound=0.01)
@check("a fit's quadratic function of the last layer, TF32 off", bound=1e-4)
def quadratic_as_on_cpu(bench: Bench, bound: float) -> Finding:
    """Its gram matrix, beside the CPU's; with TF32 g_s computes a little otherwise."""
    grams = []
    for device in (torch.device("cpu"), bench.device):
        model, x = bench.short(device).model, bench.x[:1].to(device)
        problem = Problem(model, x, MSE)
        y_hat = model.round(model.analyze(x), shifted, problem.size).y_hat
        grams.append(quadratic_of(problem, y_hat.detach()).gram)
    return Finding(relative_error(grams[1], grams[0]), bound, "of the matrix")


@check("gradients of the frozen layers, in bfloat16", precision=torch.bfloat16, bound=0.15)
@check("gradients of the frozen layers, in tiles", tile=TILE, bound=1e-4)
@check("gradients of the frozen layers, TF32 on", tf32="on", bound=0.03)
@check("gradients of the frozen layers, TF32 off", bound=1e-4)
@check("gradients of the frozen layers for MS-SSIM", bound=1e-3, objective=MS_SSIM)
def frozen_gradients(
    bench: Bench,
    bound: float,
    tile: int | None = None,
    precision: torch.dtype = torch.float32,
    objective: RateDistortion = MSE,
) -> Finding:
    """The gradient to the latents, beside CompressAI's layers by autograd in float64."""
    height, width = bench.scale.size
    pictures = bench.x if objective is MSE else photos(1, max(height, 192), max(width, 192))
    x = pictures.to(bench.device).contiguous(memory_format=torch.channels_last)
    model = bench.short(bench.device).model
    latents = leaves(model.analyze(x), x)
    problem = Problem(model, x, objective, tile, precision)
    ours = torch.autograd.grad(problem.relaxed(latents, shifted).loss.mean(), [*latents.values()])
    exact_x = pictures.double()
    exact = leaves(latents, exact_x)
    plain = weighted_mse if objective is MSE else with_ms_ssim
    loss = plain_loss(bench.exact.network, exact_x, exact, shifted, shifted, plain)
    expected = torch.autograd.grad(loss, [*exact.values()])
    worst = max(map(relative_error, ours, expected))
    return Finding(worst, bound, "of the gradient's norm")


@check("gradients of the training layers")
def training_gradients(bench: Bench) -> Finding:
    """The gradients to all weights, beside CompressAI's layers by autograd in float64."""
    x = bench.x.to(bench.device)
    fast = prepare_for_training(copy.deepcopy(bench.stock)).to(bench.device)
    latents = fast.encode(x, fast.network.g_a)
    Problem(fast, x, RateDistortion(LMBDA)).relaxed(latents, shifted).loss.mean().backward()
    exact = copy.deepcopy(bench.exact.network).requires_grad_()
    y = exact.g_a(bench.x.double())
    latents = {"y": y, "z": exact.h_a(y)}
    plain_loss(exact, bench.x.double(), latents, shifted, shifted).backward()
    gradients = {name: v.grad for name, v in fast.network.named_parameters()}
    errors = [
        relative_error(gradients[name], v.grad)
        for name, v in exact.named_parameters()
        if v.grad is not None and v.grad.any()
    ]
    return Finding(max(errors), 1e-3, "of a gradient's norm")


def stock_losses(bench: Bench, latents: Sequence[Latents]) -> Tensor:
    """The true losses [B] of images' latents, by CompressAI's layers in float64 on the CPU."""
    x = bench.x.double()
    with torch.no_grad():
        return torch.stack([
            plain_loss(bench.exact.network, one_x, {k: v.to(one_x) for k, v in one.items()},
                       torch.round, torch.round)
            for one_x, one in zip(x.split(1), latents, strict=True)
        ])  # fmt: skip


@check("true loss, beside CompressAI's layers in float64")
def true_loss(bench: Bench) -> Finding:
    """The evaluations of a refinement: of its first latents and of its best."""
    runs = [result.trajectory for result in refine_all(bench.short(bench.device), bench.x)]

    def error(rows: Sequence[Metrics], latents: Sequence[Latents]) -> float:
        ours = torch.tensor([row["true_loss"] for row in rows], dtype=torch.float64)
        return abs(percent(ours, stock_losses(bench, latents)))

    first = error([run.base for run in runs], [run.base_latents for run in runs])
    best = error([run.best for run in runs], [run.latents for run in runs])
    return Finding(max(first, best), 0.02, "% of the true loss")


@check(f"a batch of {BATCH}, beside one by one")
def batch_as_alone(bench: Bench) -> Finding:
    """Each image has the same noise as alone."""
    refiner = bench.short(bench.device)
    x = photos(BATCH, *bench.scale.size)
    together = last_relaxed(refine_all(refiner, x))
    alone = [refine_all(refiner, one, index)[0] for index, one in enumerate(x.split(1))]
    return Finding(largest_change(together, last_relaxed(alone)), 0.02, "% of a relaxed loss")


@check("polish, by CompressAI's layers in float64")
def polish_lowers(bench: Bench) -> Finding:
    """After one step, 12 passes save 1 % and more."""
    overrides = "tot_inference_iterations=1", "polish_passes=12"
    runs = [
        result.trajectory for result in refine_all(bench.refiner(bench.device, *overrides), bench.x)
    ]
    before = torch.tensor(
        [min(row["true_loss"] for row in run.rows if row["step"] <= 1) for run in runs],
        dtype=torch.float64,
    )
    after = stock_losses(bench, [run.latents for run in runs])
    return Finding(percent(after, before), -1.0, "% of the true loss")


@check("a file made beside the device, decoded on the CPU")
def file_symbols(bench: Bench) -> Finding:
    """The symbols that a new coder reads, beside those of the device."""
    coder = build_coder(load_checkpoint(bench.checkpoint))
    wrong = 0
    for result in bench.coded:
        symbols, _ = decode_latents(coder, result.file.bitstream)
        wrong += sum(int((symbols[name] != v.cpu()).sum()) for name, v in result.symbols.items())
    return Finding(wrong, 0, "other symbols")


@check("the same file, decoded by CompressAI")
def stock_decoder(bench: Bench) -> Finding:
    """CompressAI's `decompress`, beside the device's picture of the same symbols."""
    stock, size = load_checkpoint(bench.checkpoint), bench.scale.size
    stock.prepare_tables()
    model = bench.short(bench.device).model
    worst = 0.0
    for result in bench.coded:
        z, y = read_bitstream(result.file.bitstream).groups
        strings = [[y.string], [z.string]]
        with torch.no_grad():
            theirs = stock.network.decompress(strings, (size[0] // 64, size[1] // 64))["x_hat"]
        ours = model.reconstruct(result.symbols, size).cpu()
        worst = max(worst, 255 * (ours - theirs).abs().max().item())
    return Finding(worst, 0.5, "of 255 levels at most")


@check("training of 30 steps, its loss")
def training_learns(bench: Bench) -> Finding:
    """The loss of the last steps over that of the first ones."""
    return Finding(bench.trained.loss_ratio, 0.6, "of the first loss")


@check("training of 30 steps, stopped and resumed")
def training_resumes(bench: Bench) -> Finding:
    """The weights beside those of the run without a stop, over the way of the last 15 steps."""
    return Finding(bench.trained.deviation, 0.01, "of the way")


@check("bfloat16 beside float32")
def bfloat16_loss(bench: Bench) -> Finding:
    """After few steps. The bound of a whole recipe is lower, but takes more photos to see."""
    single, half = (
        losses_of(bench.short(bench.device, "optimizer.lr=0.02", precision=name), bench.x)
        for name in ("float32", "bfloat16")
    )
    return Finding(percent(half, single), 0.5, "% of the true loss")


@check("CUDA graphs, beside no graphs")
def graphs_loss(bench: Bench) -> Finding:
    """Each step has the same noise, temperature and learning rate."""
    if bench.device.type == "cpu":
        raise Skipped("there are none on a CPU")
    eager, graphed = (
        last_relaxed(refine_all(bench.short(bench.device, f"cuda_graphs={on}"), bench.x))
        for on in ("false", "true")
    )
    return Finding(largest_change(graphed, eager), 0.02, "% of a relaxed loss")


# --- host synchronisation -------------------------------------------------------------------------


class RefuseHostReads(TorchDispatchMode):
    """Raises where a value of a tensor is read, which would wait for a GPU."""

    READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select")

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Called by torch for each operation."""
        if function.overloadpacket.__name__ in self.READS:
            raise RuntimeError(f"{function} waits for the device")
        return function(*args, **(kwargs or {}))


class _CudaRefusesToWait:
    def __enter__(self) -> None:
        torch.cuda.set_sync_debug_mode("error")

    def __exit__(self, *_: object) -> None:
        torch.cuda.set_sync_debug_mode("default")


def refuse_waiting(device: torch.device) -> AbstractContextManager:
    """An error is raised where the host waits for the device."""
    return RefuseHostReads() if device.type == "cpu" else _CudaRefusesToWait()


@check("steps without host synchronisation")
def no_synchronisation(bench: Bench) -> Finding:
    """The steps between the first one and the evaluation at the end."""
    with refuse_waiting(bench.device):
        try:
            torch.ones(2, device=bench.device).sum().item()
        except RuntimeError:
            pass
        else:
            raise RuntimeError("a synchronisation is not noticed here")
    refused = 0
    with ExitStack() as refusing:

        def act(steps: int) -> None:
            nonlocal refused
            if steps == 1:
                refusing.enter_context(refuse_waiting(bench.device))
            elif steps == bench.scale.steps:
                refusing.close()
                refused = steps - 1

        refiner = bench.short(bench.device)
        images = [LoadedImage(str(index), one) for index, one in enumerate(bench.x)]
        with AfterStep(act) as progress:
            refiner.refine_batch(images, progress)
    if not refused:
        raise RuntimeError("no step was watched")
    return Finding(0, 0, f"synchronisations in {refused} steps")
