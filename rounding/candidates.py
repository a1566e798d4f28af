"""Integer candidates of a rounding, and the random draw among them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor
from torch.autograd.function import once_differentiable

from rounding.noise import open_uniform

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


def gumbel_softmax(logits: Tensor, tau: float, generator: Generator | None) -> Tensor:
    """Weights softmax((logits / tau + Gumbel noise) / tau) over the first axis, [K, ...].

    tau scales the logits and relaxes the sample (arXiv 2006.04240). For K = 2 one sigmoid of one
    logistic draw gives the same: a logistic draw is the difference of two Gumbel draws.
    """
    tau = max(tau, TAU_MIN)
    if len(logits) == 2:
        noise = torch.logit(open_uniform(logits[0], generator))
        second = torch.sigmoid(torch.add(noise / tau, logits[1] - logits[0], alpha=tau**-2))
        return torch.stack((1 - second, second))
    exponential = open_uniform(logits, generator).log_().neg_()
    return torch.softmax(torch.sub(logits * tau**-2, exponential.log_(), alpha=1 / tau), dim=0)


def sample_candidates(
    candidates: Candidates,
    score: Callable[..., Tensor],
    v: Tensor,
    tau: float,
    generator: Generator | None,
    **params: Any,
) -> Tensor:
    """The relaxed rounding of v, any shape: a sum of candidates, weighted by `gumbel_softmax`.

    Args:
        score: maps distances and `params` to logits.
    """
    return CandidateSample.apply(v, candidates, partial(score, **params), tau, generator)


class CandidateSample(torch.autograd.Function):
    """The weighted sum of candidates; the forward pass computes its derivative too.

    The elements of v are independent. So the backward pass needs only one derivative for each
    element, and a CPU can process the elements chunk by chunk.
    """

    CHUNK = 2**17  # elements that a CPU processes at a time

    @staticmethod
    def forward(
        ctx: Any,
        v: Tensor,
        candidates_of: Candidates,
        score: Callable[[Tensor], Tensor],
        tau: float,
        generator: Generator | None,
    ) -> Tensor:
        """The relaxed rounding v_hat, shaped as v."""
        flat = _in_memory_order(v)
        v_hat, derivative = torch.empty_like(flat), torch.empty_like(flat)
        count = CandidateSample.CHUNK if v.device.type == "cpu" else max(len(flat), 1)
        parts = (whole.split(count) for whole in (flat, v_hat, derivative))
        for v_part, v_hat_part, derivative_part in zip(*parts, strict=True):
            with torch.set_grad_enabled(ctx.needs_input_grad[0]):
                v_part = v_part.detach().requires_grad_(ctx.needs_input_grad[0])
                candidates, distance = candidates_of(v_part)
                logits = score(distance)
            weights = gumbel_softmax(logits.detach(), tau, generator)  # [K, n]
            torch.sum(candidates * weights, dim=0, out=v_hat_part)
            if not ctx.needs_input_grad[0]:
                continue
            # The derivative of v_hat to the logits; the factor 1 / tau^2 follows below.
            to_logits = (candidates - v_hat_part).mul_(weights)
            (to_v,) = torch.autograd.grad(logits, v_part, to_logits)
            torch.mul(to_v, max(tau, TAU_MIN) ** -2, out=derivative_part)
        ctx.save_for_backward(derivative)
        return _in_memory_order(v, back=v_hat)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient to v; the other arguments have none."""
        (derivative,) = ctx.saved_tensors
        return grad * _in_memory_order(grad, back=derivative), None, None, None, None


def _in_memory_order(v: Tensor, back: Tensor | None = None) -> Tensor:
    """v as a flat tensor in the order of its memory; with `back`, flat `back` shaped as v again."""
    if v.dim() != 4:
        return v.reshape(-1) if back is None else back.view(v.shape)
    v = v.permute(0, 2, 3, 1)  # [B, H, W, C]
    return v.reshape(-1) if back is None else back.view(v.shape).permute(0, 3, 1, 2)
