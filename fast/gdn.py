"""Generalised divisive normalisation (GDN) with an analytic backward pass and few temporaries.

Nothing here approximates: results differ from CompressAI's by float rounding only.
"""

from collections.abc import Iterator
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fast.autograd import Context
from fast.layout import as_column, rows_in
from fast.pool import Pool

# On a CPU so many bytes of each tensor are worked on at a time: what fits into the caches.
CHUNK_BYTES = 2**21


def gdn(x: Tensor, beta: Tensor, gamma: Tensor, inverse: bool, pool: Pool | None = None) -> Tensor:
    """x / sqrt(beta + gamma x^2), or x * sqrt(...) when inverse (arXiv 1511.06281).

    Two tensors are kept for the backward pass: x and the factor.

    Args:
        x: [B, C, H, W]; beta: [C] and gamma: [C, C], not negative, re-parametrised already.
        pool: where memory comes from; without it, from torch. With it one backward pass is all:
            the gradient takes the factor's place.

    Returns:
        [B, C, H, W], channels-last, with gradients to all three.
    """
    return _GDN.apply(x, beta, gamma, inverse, pool)


class _Context(Context, Protocol):
    inverse: bool
    pool: Pool | None


class _GDN(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Context, x: Tensor, beta: Tensor, gamma: Tensor, inverse: bool, pool: Pool | None
    ) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        beta, gamma = beta.to(x.dtype), gamma.to(x.dtype)
        out = torch.empty_like(x) if pool is None else pool.empty(x, *x.shape)
        factor = None
        if any(ctx.needs_input_grad):
            factor = torch.empty_like(x) if pool is None else pool.empty(x, *x.shape)
            ctx.save_for_backward(x, factor, gamma)
        normalise(
            rows_in(x),
            beta,
            gamma,
            inverse,
            None if factor is None else rows_in(factor),
            rows_in(out),
        )
        ctx.inverse, ctx.pool = inverse, pool
        return out

    @staticmethod
    @once_differentiable
    def backward(
        ctx: _Context, grad: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None, None, None]:
        x, factor, gamma = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        # Autograd refuses a second pass over a factor that was written to.
        grad_x = torch.empty_like(x) if ctx.pool is None else factor
        weights = None
        if any(ctx.needs_input_grad[1:3]):
            # Chunks add up: in bfloat16 most of them would be lost.
            full = torch.promote_types(gamma.dtype, torch.float32)
            weights = gamma.new_zeros(len(gamma), dtype=full), torch.zeros_like(gamma, dtype=full)
        kept = rows_in(x), rows_in(factor)
        normalise_backward(kept, rows_in(grad), rows_in(grad_x), gamma, ctx.inverse, weights)
        return grad_x, *(weights or (None, None)), None, None


def normalise(
    x: Tensor, beta: Tensor, gamma: Tensor, inverse: bool, factor: Tensor | None, out: Tensor
) -> None:
    """GDN of pixels x [n, C] into `out`, and into `factor` the root of the norm, or 1 / it."""
    root = torch.sqrt if inverse else torch.rsqrt
    square = None
    for x_part, factor_part, out_part in _chunks(x, x if factor is None else factor, out):
        square = torch.mul(x_part, x_part, out=_like(square, x_part))
        norm = mix_channels(square, gamma, beta)
        rooted = root(norm, out=norm if factor is None else factor_part)
        torch.mul(x_part, rooted, out=out_part)


def normalise_backward(
    kept: tuple[Tensor, Tensor],
    grad: Tensor,
    grad_x: Tensor,
    gamma: Tensor,
    inverse: bool,
    grad_weights: tuple[Tensor, Tensor] | None = None,
) -> None:
    """The gradient to pixels x [n, C] into `grad_x`, which may be one of those kept.

    Args:
        kept: x and the factor, as `normalise` had and gave them.
        grad_weights: of beta and gamma, in float32; what they get is added, where they are given.
    """
    x, factor = kept
    to_norm = None  # twice the gradient to the norm
    from_norm = gamma.t().contiguous()
    for x_part, factor_part, grad_part, out in _chunks(x, factor, grad, grad_x):
        to_norm = torch.mul(grad_part, x_part, out=_like(to_norm, x_part))
        if inverse:
            to_norm.div_(factor_part)
        else:
            to_norm.mul_(factor_part).mul_(factor_part).mul_(factor_part).neg_()
        to_x = mix_channels(to_norm, from_norm)
        if grad_weights is not None:
            grad_beta, grad_gamma = grad_weights
            grad_beta.add_(to_norm.sum(0), alpha=0.5)
            grad_gamma.add_(to_norm.t() @ x_part.square(), alpha=0.5)
        torch.addcmul(to_x.mul_(x_part), grad_part, factor_part, out=out)


def mix_channels(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """rows @ weight^T + bias, [n, C'], for pixels [n, C] and weight [C', C]."""
    if rows.device.type != "cpu":
        return F.linear(rows, weight, bias)
    # A matrix product would go to MKL, which leaves half of an AMD processor's width unused.
    return rows_in(F.conv2d(as_column(rows), weight[:, :, None, None], bias))


def _chunks(*rows: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Parts of tensors [n, C], a few rows at a time on a CPU."""
    count = len(rows[0])
    if count == 0:
        return iter(())
    if rows[0].device.type == "cpu":
        count = max(1, CHUNK_BYTES // (rows[0].size(1) * rows[0].element_size()))
    return zip(*(v.split(count) for v in rows), strict=True)


def _like(buffer: Tensor | None, rows: Tensor) -> Tensor:
    """A buffer shaped as `rows`: the part of the old one that is needed, or a new one."""
    return torch.empty_like(rows) if buffer is None else buffer[: len(rows)]
