"""Networks and their gradients, computed tile by tile, to bound the memory for large images.

A position of y stands for 16x16 pixels. g_s computes a pixel from a bounded neighbourhood in y, and
g_a computes a position of y from a bounded neighbourhood in x. So overlapping tiles give the same
result as the whole image, and so do sums over tiles. Only float rounding differs.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fast.autograd import Context

ENCODER_TILE = 16  # side, in positions of y
STRIDE = 16  # pixels of x for each position of y, in each direction
# A decoder works on whole images up to this many pixels, else on tiles of 64 positions of y
# (1024x1024 pixels). This depends only on the image's size, so all decoders do the same.
WHOLE_PIXELS, CODING_TILE = 2**20, 64


# See `Architecture.squared_error`.
ErrorOf = Callable[[Tensor, Tensor, tuple[int, int], Tensor | None], tuple[Tensor, Tensor]]


class Tile(NamedTuple):
    """A tile in positions of y: the rows and columns of its result, and of its larger input."""

    core: tuple[slice, slice]
    window: tuple[slice, slice]

    def corner(self, unit: int) -> tuple[int, int]:
        """The row and column, in pixels, of the core in the window; `unit` pixels per position."""
        top, left = (core.start - window.start for core, window in zip(*self, strict=True))
        return unit * top, unit * left

    def crop(self, v: Tensor, unit: int) -> Tensor:
        """The core [B, C, h * unit, w * unit] of v, which is the result for the window."""
        (top, left), (rows, columns) = self.corner(unit), self.core
        height, width = (unit * (side.stop - side.start) for side in (rows, columns))
        return v[:, :, top : top + height, left : left + width]


def tiles_of(size: tuple[int, int], side: int, halo: int) -> Iterator[Tile]:
    """Tiles of at most side x side positions that cover a y of size (height, width).

    Args:
        halo: how far the input of a tile reaches beyond it, in positions.
    """
    starts = [(top, left) for top in range(0, size[0], side) for left in range(0, size[1], side)]
    for corner in starts:
        rows, columns = (
            slice(start, min(start + side, end)) for start, end in zip(corner, size, strict=True)
        )
        window = _with_halo(rows, size[0], halo), _with_halo(columns, size[1], halo)
        yield Tile((rows, columns), window)


def _with_halo(part: slice, end: int, halo: int) -> slice:
    return slice(max(part.start - halo, 0), min(part.stop + halo, end))


def coding_tile(size: tuple[int, int]) -> int | None:
    """The side of the coding tiles of an image of size (H, W); None is the whole image."""
    return CODING_TILE if size[0] * size[1] > WHOLE_PIXELS else None


def cut(v: Tensor, part: tuple[slice, slice], unit: int) -> Tensor:
    """The part of v [B, C, H, W] at these positions of y, of `unit` x `unit` pixels each."""
    rows, columns = (slice(unit * side.start, unit * side.stop) for side in part)
    return v[:, :, rows, columns]


@torch.no_grad()
def in_tiles(
    network: Callable[[Tensor], Tensor], v: Tensor, side: int, halo: int, units: tuple[int, int]
) -> Tensor:
    """network(v), channels-last, computed tile by tile.

    Args:
        network: g_a, for v = x [B, 3, 16 h, 16 w], or g_s, for v = y [B, M, h, w].
        side: the side of a tile, in positions of y.
        halo: see `tiles_of`.
        units: how many rows of v, and of the result, make one position of y.

    Raises:
        ValueError: v has no position of y.
    """
    unit, out_unit = units
    height, width = v.size(2) // unit, v.size(3) // unit
    out = None
    for tile in tiles_of((height, width), side, halo):
        part = tile.crop(network(cut(v, tile.window, unit)), out_unit)
        if out is None:
            shape = (v.size(0), part.size(1), height * out_unit, width * out_unit)
            out = torch.empty(shape, dtype=part.dtype, device=part.device,
                              memory_format=torch.channels_last)  # fmt: skip
        cut(out, tile.core, out_unit).copy_(part)
    if out is None:
        raise ValueError(f"no position of y in {tuple(v.shape)}")
    return out


def tiled_picture(
    g_s: Callable[[Tensor], Tensor], y_hat: Tensor, tiling: tuple[int, int]
) -> Tensor:
    """g_s(y_hat), channels-last, tile by tile, with a gradient to y_hat.

    The backward pass decodes each tile again, so that only the activations of one tile are in
    memory at a time. It does so under the autocast of the forward pass.

    Args:
        y_hat: [B, M, h, w].
        tiling: the side of a tile and its halo, in positions of y; see `tiles_of`.
    """
    picture: Tensor = _TiledPicture.apply(y_hat, g_s, tiling)
    return picture


class _PictureContext(Context, Protocol):
    g_s: Callable[[Tensor], Tensor]
    tiling: tuple[int, int]
    autocast: tuple[bool, torch.dtype]


class _TiledPicture(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _PictureContext,
        y_hat: Tensor,
        g_s: Callable[[Tensor], Tensor],
        tiling: tuple[int, int],
    ) -> Tensor:
        ctx.g_s, ctx.tiling = g_s, tiling
        device = y_hat.device.type
        ctx.autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        ctx.save_for_backward(y_hat)
        return in_tiles(g_s, y_hat, *tiling, (1, STRIDE))

    @staticmethod
    @once_differentiable
    def backward(ctx: _PictureContext, to_picture: Tensor) -> tuple[Tensor, None, None]:
        (y_hat,) = ctx.saved_tensors
        (enabled, dtype), gradient = ctx.autocast, torch.zeros_like(y_hat)
        for tile in tiles_of((y_hat.size(2), y_hat.size(3)), *ctx.tiling):
            with torch.enable_grad(), torch.autocast(y_hat.device.type, dtype, enabled):
                y_part = cut(y_hat, tile.window, 1).detach().requires_grad_()
                picture = tile.crop(ctx.g_s(y_part), STRIDE)
            wanted = cut(to_picture, tile.core, STRIDE)
            (to_y_part,) = torch.autograd.grad(picture, y_part, wanted.to(picture.dtype))
            cut(gradient, tile.window, 1).add_(to_y_part)
        return gradient, None, None


def tiled_error(
    error_of: ErrorOf,
    y_hat: Tensor,
    x: Tensor,
    tiling: tuple[int, int],
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The summed squared error of g_s(y_hat), cropped to x, tile by tile, and x_hat itself.

    The forward pass computes the gradient to y_hat too and keeps it. Only the activations of one
    tile are in memory at a time.

    Args:
        error_of: computes the same for one window of y_hat, see `Architecture.squared_error`.
        y_hat: [B, M, ceil(H/16), ceil(W/16)]; x: [B, 3, H, W].
        tiling: the side of a tile and its halo, in positions of y; see `tiles_of`.
        weights: [B, 1, H, W], of x's pixels; None: all are 1.

    Returns:
        The sum [B] in float64, with a gradient to y_hat, and x_hat [B, 3, H, W] without one.
    """
    return _TiledError.apply(y_hat, x, weights, error_of, tiling)


class _TiledError(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context,
        y_hat: Tensor,
        x: Tensor,
        weights: Tensor | None,
        error_of: ErrorOf,
        tiling: tuple[int, int],
    ) -> tuple[Tensor, Tensor]:
        needed = ctx.needs_input_grad[0]
        gradient = torch.zeros_like(y_hat) if needed else None
        x_hat = torch.empty_like(x)
        total = x.new_zeros(len(x), dtype=torch.float64)
        for tile in tiles_of((y_hat.size(2), y_hat.size(3)), *tiling):
            x_part, x_hat_part = (cut(v, tile.core, STRIDE) for v in (x, x_hat))
            weights_part = None if weights is None else cut(weights, tile.core, STRIDE)
            with torch.set_grad_enabled(needed):
                y_part = cut(y_hat, tile.window, 1).detach().requires_grad_(needed)
                # [B], and like x_part
                error, decoded = error_of(y_part, x_part, tile.corner(STRIDE), weights_part)
                if gradient is not None:
                    (to_y_part,) = torch.autograd.grad(error.sum(), y_part)
                    cut(gradient, tile.window, 1).add_(to_y_part)
            x_hat_part.copy_(decoded.detach())
            total += error.detach()
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(x_hat)
        return total, x_hat

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Context, to_total: Tensor, _: Tensor
    ) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        gradient = gradient * to_total.to(gradient.dtype)[:, None, None, None]
        return gradient, None, None, None, None
