"""Generalised divisive normalisation (GDN) with an analytic backward pass and few temporaries.

Nothing is approximated: results differ from CompressAI's by float rounding only.
"""

from collections.abc import Iterator
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fast.autograd import Context
from fast.layout import as_column, rows_at_a_time, rows_in
from fast.pool import Pool

CHUNK_BYTES = 2**21  # of each tensor, which a CPU processes at a time, see `rows_at_a_time`


def gdn(x: Tensor, beta: Tensor, gamma: Tensor, inverse: bool, pool: Pool | None = None) -> Tensor:
    """x / sqrt(beta + gamma x^2), or x * sqrt(...) when inverse (arXiv 1511.06281).

    It keeps two tensors for the backward pass: x and the factor of x.

    Args:
        x: [B, C, H, W]; beta: [C] and gamma: [C, C], both >= 0, re-parametrised already.
        pool: the source of memory, torch by default. With a pool only one backward pass is
            possible, because the gradient overwrites the factor.

    Returns:
        [B, C, H, W], channels-last, with gradients to x, beta and gamma.
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
        # With a pool: autograd raises an error if a second pass reads the overwritten factor.
        grad_x = torch.empty_like(x) if ctx.pool is None else factor
        weights = None
        if any(ctx.needs_input_grad[1:3]):
            # A sum over chunks in bfloat16 would lose most of them.
            full = torch.promote_types(gamma.dtype, torch.float32)
            weights = gamma.new_zeros(len(gamma), dtype=full), torch.zeros_like(gamma, dtype=full)
        kept = rows_in(x), rows_in(factor)
        normalise_backward(kept, rows_in(grad), rows_in(grad_x), gamma, ctx.inverse, weights)
        return grad_x, *(weights or (None, None)), None, None


def normalise(
    x: Tensor, beta: Tensor, gamma: Tensor, inverse: bool, factor: Tensor | None, out: Tensor
) -> None:
    """Write the GDN of pixels x [n, C] into `out`, and out / x into `factor`; both [n, C]."""
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
    """Write the gradient to pixels x into `grad_x`, which may be one of the tensors in `kept`.

    Args:
        kept: x and the factor of `normalise`, [n, C] each.
        grad: the gradient to the result of `normalise`, [n, C].
        grad_weights: the gradients to beta and gamma, if wanted; this call adds to them.
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
    if rows.device.type != "cpu" or rows.dtype != torch.float32:
        return F.linear(rows, weight, bias)
    # torch gives a product in float32 to MKL, which uses half of an AMD processor's vector width.
    return rows_in(F.conv2d(as_column(rows), weight[:, :, None, None], bias))


def _chunks(*rows: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Corresponding parts of tensors [n, C]: a few rows each on a CPU, else all."""
    count = len(rows[0])
    if count == 0:
        return iter(())
    if rows[0].device.type == "cpu":
        count = rows_at_a_time(rows[0], CHUNK_BYTES, rows[0].size(1), 1, count)
    return zip(*(v.split(count) for v in rows), strict=True)


def _like(buffer: Tensor | None, rows: Tensor) -> Tensor:
    """A buffer shaped as `rows`: the first rows of the old buffer, or a new one."""
    return torch.empty_like(rows) if buffer is None else buffer[: len(rows)]
