"""Loops of refinement: the plain published one, ours, and only torch's convolutions."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from architectures import Architecture, Latents
from benchmarks.variant import LMBDA, METHOD, MSE_WEIGHT, SCHEDULE, Variant, in_bfloat16
from common.compressai import CompressionModel
from experimental_inference_methods import build_rounding
from models import freeze
from objectives import Problem, RateDistortion
from refinement.batch import ImageNoise


def weighted_mse(x_hat: Tensor, x: Tensor) -> Tensor:
    """lambda * 255^2 * MSE (arXiv 2401.17789).

    This repeats the formula on purpose: a benchmark must not share code with `objectives`.
    """
    return MSE_WEIGHT * F.mse_loss(x_hat, x)


def plain_loss(
    network: CompressionModel,
    x: Tensor,
    latents: Latents,
    round_y: Callable[[Tensor], Tensor],
    round_z: Callable[[Tensor], Tensor],
    weighted_distortion: Callable[[Tensor, Tensor], Tensor] = weighted_mse,
) -> Tensor:
    """bpp + a weighted distortion of x_hat and x, averaged over images, by CompressAI's modules."""
    medians = network.entropy_bottleneck.quantiles[:, 0, 1].detach().view(1, -1, 1, 1)
    z_hat = round_z(latents["z"] - medians) + medians
    scales, means = network.h_s(z_hat).chunk(2, 1)
    y_hat = round_y(latents["y"] - means) + means
    z_by_channel = z_hat.transpose(0, 1).reshape(network.N, 1, -1)
    bottleneck, conditional = network.entropy_bottleneck, network.gaussian_conditional
    p_z = bottleneck.likelihood_lower_bound(bottleneck._likelihood(z_by_channel)[0])
    p_y = conditional.likelihood_lower_bound(conditional._likelihood(y_hat, scales, means))
    bits = -p_z.log2().sum() - p_y.log2().sum()
    return bits / (x.numel() / 3) + weighted_distortion(network.g_s(y_hat), x)


def plain_round(v: Tensor, tau: float) -> Tensor:
    """Three-class SSL with its published settings, by torch's relaxed categorical distribution."""
    nearest = v.round().detach()
    candidates = torch.stack((nearest - 1, nearest, nearest + 1), dim=-1)
    u = (0.98 * (v.unsqueeze(-1) - candidates).abs() / 1.5).clamp(1e-6, 1 - 1e-6)
    p = torch.sigmoid(-1.4 * torch.logit(u)).clamp_min(1e-6)
    logits = 1.4 * p.log()
    sampler = torch.distributions.RelaxedOneHotCategorical(
        tau,  # type: ignore[arg-type]  # a number will do
        logits=logits / tau,
    )
    return (sampler.rsample() * candidates).sum(dim=-1)


def plain_step(
    model: Architecture,
    x: Tensor,
    weighted_distortion: Callable[[Tensor, Tensor], Tensor] = weighted_mse,
) -> Callable[[], Any]:
    """The published loop, written simply.

    The decoder's weights get gradients that are never used. Each step ends with an evaluation.
    """
    network = model.network
    with torch.no_grad():
        y = network.g_a(x)
        z = network.h_a(y)
    latents = {"y": y.requires_grad_(), "z": z.requires_grad_()}
    optimizer = torch.optim.Adam(latents.values(), lr=0.005)

    def step() -> tuple[float, float]:
        optimizer.zero_grad()
        relaxed = partial(plain_round, tau=SCHEDULE(100))
        loss = plain_loss(network, x, latents, relaxed, relaxed, weighted_distortion)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            rounds = torch.round, torch.round
            true_loss = plain_loss(network, x, latents, *rounds, weighted_distortion)
        return loss.item(), true_loss.item()

    return step


def our_step(
    model: Architecture,
    x: Tensor,
    precision: torch.dtype = torch.float32,
    objective: RateDistortion | None = None,
    weights: Tensor | None = None,
) -> Callable[[], Any]:
    """The step of `train_flexible_inference.refine`, without its evaluations every 50 steps."""
    x = x.contiguous(memory_format=torch.channels_last)
    objective = objective or RateDistortion(LMBDA)
    problem = Problem(freeze(model), x, objective, precision=precision, weights=weights)
    latents = {name: v.clone().requires_grad_() for name, v in problem.model.analyze(x).items()}
    optimizer = torch.optim.Adam(latents.values(), lr=0.005, fused=True)
    rounding = build_rounding(*METHOD, temperature=SCHEDULE)
    noise = ImageNoise([0] * len(x), x.device)

    def step() -> None:
        optimizer.zero_grad()
        terms = problem.relaxed(latents, noise.rounding(rounding, 0, 100))
        terms.loss.sum().backward()
        optimizer.step()

    return step


def floor_step(
    model: Architecture, x: Tensor, precision: torch.dtype = torch.float32
) -> Callable[[], Any]:
    """Only torch's convolutions of g_s and h_s, forward and backward to their input."""
    network = model.network.requires_grad_(False).to(memory_format=torch.channels_last)
    latents = model.analyze(x.contiguous(memory_format=torch.channels_last))
    network = network.to(precision)
    chains = []
    for part, latent in ((network.g_s, latents["y"]), (network.h_s, latents["z"])):
        kinds = (nn.Conv2d, nn.ConvTranspose2d)
        layers = nn.Sequential(*(layer for layer in part if isinstance(layer, kinds)))
        v = latent.to(precision).requires_grad_()
        chains.append((layers, v, torch.randn_like(layers(v))))

    def step() -> None:
        for layers, v, gradient in chains:
            v.grad = None
            layers(v).backward(gradient)

    return step


def compiled_step(model: Architecture, x: Tensor) -> Callable[[], Any]:
    """Our loop with CompressAI's own g_s, compiled by torch.compile."""
    plain = copy.deepcopy(model.network.g_s).requires_grad_(False)
    step = our_step(model, x)
    model.network.g_s = torch.compile(plain.to(memory_format=torch.channels_last))
    return step


REFINEMENTS = {
    "plain": Variant("plain published loop, as its users have it", False, plain_step),
    "plain, pages kept": Variant("plain published loop, pages kept", True, plain_step),
    "ours": Variant("this project's loop", True, our_step),
    "ours, bfloat16": Variant("this project's loop, bfloat16", True, in_bfloat16(our_step)),
    "floor": Variant("floor: torch's convolutions alone, pages kept", True, floor_step),
    "floor, bfloat16": Variant("floor in bfloat16", True, in_bfloat16(floor_step)),
    "compiled": Variant("this loop, torch.compile of CompressAI's g_s", True, compiled_step),
}
