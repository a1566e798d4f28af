"""Each architecture: a step of refinement beside a plain one, and the time of its files.

The networks have CompressAI's channels of low rates, and random weights: the time of a step does
not depend on these. The symbols of the files are random, too.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from architectures import ARCHITECTURES, Architecture, Autoregressive, Checkerboard
from benchmarks.refinement_loops import our_step, plain_round
from benchmarks.variant import MSE_WEIGHT, SCHEDULE, Variant, in_bfloat16
from coding.coder import build_coder, decode_picture, encode_latents

SIZE = (512, 768)  # of the pictures that are coded, pixels


class Widths(NamedTuple):
    """N and M of a network."""

    N: int
    M: int


# CompressAI's channels, of its low rates where these differ.
CHANNELS = {
    "bmshj2018-factorized": Widths(128, 192), "bmshj2018-factorized-relu": Widths(128, 192),
    "bmshj2018-hyperprior": Widths(128, 192), "mbt2018-mean": Widths(128, 192),
    "mbt2018": Widths(192, 192), "cheng2020-anchor": Widths(128, 128),
    "cheng2020-attn": Widths(128, 128), "cheng2020-anchor-checkerboard": Widths(128, 128),
    "elic2022-official": Widths(192, 320), "elic2022-chandelier": Widths(192, 320),
}  # fmt: skip


def untrained(name: str) -> Architecture:
    """A model of an architecture with random weights and CompressAI's channels."""
    torch.manual_seed(0)
    model = ARCHITECTURES[name].build(*CHANNELS[name])
    model.network.eval()
    return model


def plain_walk_step(model: Architecture, x: Tensor) -> Callable[[], Any]:
    """A step by CompressAI's own layers, written simply.

    All weights get gradients that are never used. Each step ends with an evaluation.
    """
    size = x.size(2), x.size(3)
    latents = {name: v.detach().requires_grad_() for name, v in model.analyze(x).items()}
    optimizer = torch.optim.Adam(latents.values(), lr=0.005)

    def loss_of(rounding: Callable[[Tensor], Tensor]) -> Tensor:
        walk = model.round(latents, rounding, size)
        bits = sum(-p.log2().sum() for p in walk.group_likelihoods)
        x_hat = model.network.g_s(walk.y_hat)[:, :, : size[0], : size[1]]
        return bits / (x.numel() / 3) + MSE_WEIGHT * F.mse_loss(x_hat, x)

    def step() -> tuple[float, float]:
        optimizer.zero_grad()
        loss = loss_of(lambda v: plain_round(v, SCHEDULE(100)))
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            return loss.item(), loss_of(torch.round).item()

    return step


@torch.no_grad()
def time_files(model: Architecture, rounds: int) -> dict[str, float]:
    """The seconds of our coding and decoding, and of CompressAI's decoding, the best of `rounds`.

    Coding has the decoding that compares. CompressAI decodes what it coded itself, from noise.
    """
    coder = build_coder(model)
    generator = torch.Generator().manual_seed(0)
    symbols = {
        name: (1.5 * torch.randn(shape, generator=generator)).round().int()
        for name, shape in model.latent_shapes(SIZE).items()
    }
    data = encode_latents(coder, symbols, SIZE)
    network = coder.model.network
    coded = network.compress(torch.rand(1, 3, *SIZE, generator=generator))
    stock = coded["strings"], coded["shape"]
    # The plain decoder of autoregressive models takes many seconds.
    few = 1 if isinstance(model, Autoregressive) else rounds
    return {
        "coding": _best(lambda: encode_latents(coder, symbols, SIZE), rounds),
        "decoding": _best(lambda: decode_picture(coder, data), rounds),
        "stock decoding": _best(lambda: _stock_decoding(model, network, stock), few),
    }


def _stock_decoding(model: Architecture, network: Any, stock: Sequence[Any]) -> Any:
    if isinstance(model, Checkerboard):
        return network.decompress(stock[0], shape=stock[1])
    return network.decompress(*stock)


def _best(work: Callable[[], Any], rounds: int) -> float:
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


ARCHITECTURE_STEPS = {
    "plain": Variant("plain loop by CompressAI's layers", False, plain_walk_step),
    "ours": Variant("this project's loop", True, our_step),
    "ours, bfloat16": Variant("this project's loop, bfloat16", True, in_bfloat16(our_step)),
}
