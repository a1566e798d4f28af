"""Pictures of any size in bounded memory: networks and their gradients tile by tile.

A position of y is 16x16 pixels. g_s computes a pixel from a bounded neighbourhood of y, and g_a a
position of y from one of x, so tiles that overlap by it give the same as the whole picture, and so
do sums over tiles; only float rounding differs.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fast.autograd import Context

ENCODER_TILE = 16  # positions of y
STRIDE = 16  # pixels of x a position of y
# Four 5x5 layers, each of twice the resolution, reach 1 + 1/2 + 1/4 + 1/8 positions of y.
HALO = 2
# Files become whole pictures up to here; beyond, tiles of 1024x1024 pixels. It depends on the
# picture alone, so that all decoders do the same.
WHOLE_PIXELS, CODING_TILE = 2**20, 64


# See `Architecture.squared_error`.
ErrorOf = Callable[[Tensor, Tensor, tuple[int, int]], tuple[Tensor, Tensor]]


class Tile(NamedTuple):
    """Rows and columns, in positions of y, that a tile gives, and of the window that it needs."""

    core: tuple[slice, slice]
    window: tuple[slice, slice]

    def corner(self, unit: int) -> tuple[int, int]:
        """Row and column at which the core begins in what the window gave."""
        top, left = (core.start - window.start for core, window in zip(*self, strict=True))
        return unit * top, unit * left

    def crop(self, v: Tensor, unit: int) -> Tensor:
        """The core of what the window gave, [B, C, h * unit, w * unit]."""
        (top, left), (rows, columns) = self.corner(unit), self.core
        height, width = (unit * (side.stop - side.start) for side in (rows, columns))
        return v[:, :, top : top + height, left : left + width]


def tiles_of(size: tuple[int, int], side: int) -> Iterator[Tile]:
    """Tiles of at most side x side that cover a y of this height and width."""
    starts = [(top, left) for top in range(0, size[0], side) for left in range(0, size[1], side)]
    for corner in starts:
        rows, columns = (
            slice(start, min(start + side, end)) for start, end in zip(corner, size, strict=True)
        )
        window = _with_halo(rows, size[0]), _with_halo(columns, size[1])
        yield Tile((rows, columns), window)


def _with_halo(part: slice, end: int) -> slice:
    return slice(max(part.start - HALO, 0), min(part.stop + HALO, end))


def coding_tile(size: tuple[int, int]) -> int | None:
    """How large tiles are where a picture of H, W is coded; None is the whole picture."""
    return CODING_TILE if size[0] * size[1] > WHOLE_PIXELS else None


def cut(v: Tensor, part: tuple[slice, slice], unit: int) -> Tensor:
    """The part of v [B, C, H, W] at rows and columns given in positions of y, of `unit` each."""
    rows, columns = (slice(unit * side.start, unit * side.stop) for side in part)
    return v[:, :, rows, columns]


@torch.no_grad()
def in_tiles(
    network: Callable[[Tensor], Tensor], v: Tensor, side: int, unit: int, out_unit: int
) -> Tensor:
    """network(v), channels-last, a few positions of y at a time.

    Args:
        network: g_a, for x [B, 3, 16 h, 16 w], or g_s, for y [B, M, h, w].
        side: of a tile, in positions of y.
        unit, out_unit: how many pixels a side of v, and of the result, are a position of y.

    Raises:
        ValueError: v has no position of y.
    """
    height, width = v.size(2) // unit, v.size(3) // unit
    out = None
    for tile in tiles_of((height, width), side):
        part = tile.crop(network(cut(v, tile.window, unit)), out_unit)
        if out is None:
            shape = (v.size(0), part.size(1), height * out_unit, width * out_unit)
            out = torch.empty(shape, dtype=part.dtype, device=part.device,
                              memory_format=torch.channels_last)  # fmt: skip
        cut(out, tile.core, out_unit).copy_(part)
    if out is None:
        raise ValueError(f"no position of y in {tuple(v.shape)}")
    return out


def tiled_error(
    error_of: ErrorOf,
    y_hat: Tensor,
    x: Tensor,
    side: int,
) -> tuple[Tensor, Tensor]:
    """Sum of squared errors of g_s(y_hat), cropped to x, tile by tile, and the picture itself.

    The gradient to y_hat is computed along the way and kept; one tile's activations are all that is
    in memory at a time.

    Args:
        error_of: the same of a window of y_hat and the x that begins at a row and column of its
            picture, as `models.squared_error_of`.
        y_hat: [B, M, ceil(H/16), ceil(W/16)]; x: [B, 3, H, W]; side: in positions of y.

    Returns:
        The sum [B], float64, and x_hat [B, 3, H, W], which has no gradient.
    """
    return _TiledError.apply(y_hat, x, error_of, side)


class _TiledError(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context, y_hat: Tensor, x: Tensor, error_of: ErrorOf, side: int
    ) -> tuple[Tensor, Tensor]:
        needed = ctx.needs_input_grad[0]
        gradient = torch.zeros_like(y_hat) if needed else None
        x_hat = torch.empty_like(x)
        total = x.new_zeros(len(x), dtype=torch.float64)
        for tile in tiles_of((y_hat.size(2), y_hat.size(3)), side):
            x_part, x_hat_part = (cut(v, tile.core, STRIDE) for v in (x, x_hat))
            with torch.set_grad_enabled(needed):
                y_part = cut(y_hat, tile.window, 1).detach().requires_grad_(needed)
                error, shown = error_of(y_part, x_part, tile.corner(STRIDE))  # [B], like x_part
                if gradient is not None:
                    (to_y_part,) = torch.autograd.grad(error.sum(), y_part)
                    cut(gradient, tile.window, 1).add_(to_y_part)
            x_hat_part.copy_(shown.detach())
            total += error.detach()
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(x_hat)
        return total, x_hat

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, to_total: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * to_total.to(gradient.dtype)[:, None, None, None], None, None, None
