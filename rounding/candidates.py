"""Integer candidates of a rounding, and the random draw among them."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rounding.noise import ImageGenerators, Source, open_uniform
from rounding.temperature import Tau, at_least

# At a lower tau float32 would lose the Gumbel noise, and a draw is hard rounding already.
TAU_MIN = 1e-8

# v [...] -> K candidates and the distances of v to them, both [K, ...]
Candidates = Callable[[Tensor], tuple[Tensor, Tensor]]


def floor_ceil(v: Tensor) -> tuple[Tensor, Tensor]:
    """floor(v) and ceil(v), and the distances to them in [0, 1 - 1e-5]; both [2, ...]."""
    candidates = torch.stack((v.floor(), v.ceil())).detach()  # [2, ...]
    return candidates, (v - candidates).abs().clamp(max=1 - 1e-5)


def nearest_three(v: Tensor) -> tuple[Tensor, Tensor]:
    """round(v) + {-1, 0, 1}, and the distances to them in [0, 1.5]; both [3, ...]."""
    nearest = v.round().detach()
    candidates = torch.stack((nearest - 1, nearest, nearest + 1))  # [3, ...]
    return candidates, (v - candidates).abs()


def gumbel_softmax(logits: Tensor, tau: Tau, source: Source) -> Tensor:
    """Weights softmax((logits / tau + Gumbel noise) / tau) over the first axis, [K, ...].

    tau scales the logits and relaxes the sample (arXiv 2006.04240). For K = 2 one sigmoid of one
    logistic draw gives the same: a logistic draw is the difference of two Gumbel draws.
    """
    tau = at_least(tau, TAU_MIN)
    if len(logits) == 2:
        noise = torch.logit(open_uniform(logits[0], source))
        second = torch.sigmoid(_plus_scaled(noise / tau, logits[1] - logits[0], tau**-2))
        return torch.stack((1 - second, second))
    exponential = open_uniform(logits, source).log_().neg_()
    return torch.softmax(_plus_scaled(logits * tau**-2, exponential.log_(), -1 / tau), dim=0)


def _plus_scaled(v: Tensor, other: Tensor, factor: Tau) -> Tensor:
    """v + factor * other; a number as the factor saves a pass over memory."""
    if isinstance(factor, Tensor):
        return v + factor * other
    return torch.add(v, other, alpha=factor)


def sample_candidates(
    candidates: Candidates,
    score: Callable[..., Tensor],
    v: Tensor,
    tau: Tau,
    source: Source,
    **params: Any,
) -> Tensor:
    """The relaxed rounding of v, any shape: a sum of candidates, weighted by `gumbel_softmax`.

    Args:
        score: maps distances and `params` to logits.
    """
    return CandidateSample.apply(v, candidates, partial(score, **params), tau, source)


class CandidateSample(torch.autograd.Function):
    """The weighted sum of candidates; the forward pass computes its derivative too.

    The elements of v are independent. So the backward pass needs only one derivative for each
    element, and a CPU can process the elements chunk by chunk. A GPU processes all at once.
    """

    CHUNK = 2**17  # elements that a CPU processes at a time

    @staticmethod
    def forward(
        ctx: Any,
        v: Tensor,
        candidates_of: Candidates,
        score: Callable[[Tensor], Tensor],
        tau: Tau,
        source: Source,
    ) -> Tensor:
        """The relaxed rounding v_hat, shaped as v."""
        v_in_order = _in_memory_order(v)
        v_hat, derivative = torch.empty_like(v_in_order), torch.empty_like(v_in_order)
        for parts, part_source in _parts((v_in_order, v_hat, derivative), source):
            v_part, v_hat_part, derivative_part = parts
            with torch.set_grad_enabled(ctx.needs_input_grad[0]):
                v_part = v_part.detach().requires_grad_(ctx.needs_input_grad[0])
                candidates, distance = candidates_of(v_part)
                logits = score(distance)
            weights = gumbel_softmax(logits.detach(), tau, part_source)  # [K, ...]
            torch.sum(candidates * weights, dim=0, out=v_hat_part)
            if not ctx.needs_input_grad[0]:
                continue
            # The derivative of v_hat to the logits; the factor 1 / tau^2 follows below.
            to_logits = (candidates - v_hat_part).mul_(weights)
            (to_v,) = torch.autograd.grad(logits, v_part, to_logits)
            torch.mul(to_v, at_least(tau, TAU_MIN) ** -2, out=derivative_part)
        ctx.save_for_backward(derivative)
        return _in_order_of_dims(v_hat)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient to v; the other arguments have none."""
        (derivative,) = ctx.saved_tensors
        return grad * _in_order_of_dims(derivative), None, None, None, None


def _parts(
    tensors: tuple[Tensor, ...], source: Source
) -> Iterator[tuple[tuple[Tensor, ...], Source]]:
    """Corresponding parts of contiguous tensors, and their source: chunks on a CPU, else all."""
    if tensors[0].device.type != "cpu":
        yield tensors, source
        return
    by_image: list[tuple[tuple[Tensor, ...], Source]] = [(tensors, source)]
    if isinstance(source, ImageGenerators):
        images = zip(*(v.split(1) for v in tensors), strict=True)
        by_image = list(zip(images, source.images, strict=True))
    for image, own_source in by_image:
        for chunks in zip(*(v.view(-1).split(CandidateSample.CHUNK) for v in image), strict=True):
            yield chunks, own_source


def _in_memory_order(v: Tensor) -> Tensor:
    """v contiguous: [B, C, h, w], which is channels-last, becomes [B, h, w, C]."""
    return v.permute(0, 2, 3, 1).contiguous() if v.dim() == 4 else v.contiguous()


def _in_order_of_dims(v: Tensor) -> Tensor:
    """The view that undoes `_in_memory_order`."""
    return v.permute(0, 3, 1, 2) if v.dim() == 4 else v
