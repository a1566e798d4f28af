"""Winograd's minimal filtering for the decoder's upsampling on a CPU."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fast.layout import as_column, phases_of, rows_in
from fast.pool import Pool

WINOGRAD_TILES = 150  # tiles processed at a time: fastest on two x86-64 cores


class Winograd:
    """Winograd's minimal filtering F(4x4, 3x3) for the four phases of `upsample`.

    See arXiv 1509.09308. A tile of 4x4 pixels takes 36 products for each channel and phase, direct
    convolution 100 on average. All phases share the input's points. So one grouped 1x1 convolution,
    with the 36 points as its groups, computes all products. In float32 the error is a few 1e-6 of
    the result, ten times that of direct convolution.
    """

    # Transforms of input and kernel to the points 0, 1, -1, 2, -2, infinity, and of results back.
    INPUT = (
        (4, 0, -5, 0, 1, 0), (0, -4, -4, 1, 1, 0), (0, 4, -4, -1, 1, 0),
        (0, -2, -1, 2, 1, 0), (0, 2, -1, -2, 1, 0), (0, 4, 0, -5, 0, 1),
    )  # fmt: skip
    KERNEL = (
        (1 / 4, 0, 0), (-1 / 6, -1 / 6, -1 / 6), (-1 / 6, 1 / 6, -1 / 6),
        (1 / 24, 1 / 12, 1 / 6), (1 / 24, -1 / 12, 1 / 6), (0, 0, 1),
    )  # fmt: skip
    OUTPUT = ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1))

    def __init__(self, weight: Tensor, pool: Pool):
        self.pool = pool
        points, kernel, output = (
            torch.tensor(matrix, dtype=torch.float64)
            for matrix in (self.INPUT, self.KERNEL, self.OUTPUT)
        )
        self.to_points = torch.kron(points, points).float()  # [36, 36]
        self.from_points = torch.kron(output, output).float()  # [16, 36]
        phases = phases_of(weight).unflatten(0, (4, -1))  # [4, C', C, 3, 3]
        taps = phases.new_empty(6, 6, *phases.shape[:3], dtype=torch.float32)
        for index, phase in enumerate(phases):  # one by one, because float64 takes much memory
            taps[:, :, index] = (kernel @ phase.double() @ kernel.t()).permute(2, 3, 0, 1)
        self.kernel = taps.flatten(0, 3)  # [36 * 4 C', C]

    def upsample(self, x: Tensor, bias: Tensor) -> Tensor:
        """[B, C', 2 H, 2 W], channels-last, for x [B, C, H, W]."""
        batch, channels, height, width = x.shape
        down, across = -(-height // 4), -(-width // 4)  # tiles
        padded = self.pool.empty(x, batch, channels, 4 * down + 2, 4 * across + 2).zero_()
        padded[:, :, 1 : height + 1, 1 : width + 1] = x
        padded = padded.permute(0, 2, 3, 1)  # [B, 4 down + 2, 4 across + 2, C]
        out = self.pool.empty(x, batch, len(bias), 8 * down, 8 * across)
        pixels = out.permute(0, 2, 3, 1).view(batch, down, 4, 2, across, 4, 2, -1)
        for image, first, last in self._strips(batch, down, across):
            windows = padded[image, 4 * first : 4 * last + 2].unfold(0, 6, 4).unfold(1, 6, 4)
            values = self._values(windows.permute(0, 1, 3, 4, 2).reshape(-1, 36, channels))
            values = values.view(last - first, across, 4, 4, 2, 2, -1).permute(0, 2, 4, 1, 3, 5, 6)
            torch.add(values, bias, out=pixels[image, first:last])
            del values  # frees its memory for the next strip
        if (height, width) == (4 * down, 4 * across):
            return out
        # The next layer may work in place, which a view does not allow.
        out = out[:, :, : 2 * height, : 2 * width]
        return out.clone(memory_format=torch.channels_last)

    def gradient(self, grad: Tensor) -> Tensor:
        """The gradient to x, [B, C, H, W]; `grad` [B, C', 2 H, 2 W] is that to `upsample`'s result.

        It applies the transposes of the operations of `upsample` in reverse order.
        """
        batch, height, width = grad.size(0), grad.size(2) // 2, grad.size(3) // 2
        down, across = -(-height // 4), -(-width // 4)  # tiles
        grad = grad.permute(0, 2, 3, 1)  # [B, 2 H, 2 W, C']
        if (height, width) != (4 * down, 4 * across):
            grad = F.pad(grad, (0, 0, 0, 8 * across - 2 * width, 0, 8 * down - 2 * height))
        grad = grad.reshape(batch, down, 4, 2, across, 4, 2, -1)
        channels = self.kernel.size(1)
        padded = self.pool.empty(grad, batch, channels, 4 * down + 4, 4 * across + 4).zero_()
        out = padded.permute(0, 2, 3, 1).view(batch, down + 1, 4, across + 1, 4, channels)
        for image, first, last in self._strips(batch, down, across):
            rows = last - first
            values = grad[image, first:last].permute(0, 3, 1, 4, 2, 5, 6)
            windows = self._windows(values.reshape(rows * across, 16, -1))
            windows = windows.view(rows, across, 6, 6, channels).transpose(1, 2)
            # windows: [rows, 6, across, 6, C]; neighbours overlap by 2 rows or columns.
            inside = out[image, first:last, :, :across], windows[:, :4, :, :4]
            below = out[image, first + 1 : last + 1, :2, :across], windows[:, 4:, :, :4]
            right = out[image, first:last, :, 1:, :2], windows[:, :4, :, 4:]
            corner = out[image, first + 1 : last + 1, :2, 1:, :2], windows[:, 4:, :, 4:]
            for target, part in (inside, below, right, corner):
                target.add_(part)
            del windows, inside, below, right, corner, part  # frees memory for the next strip
        return padded[:, :, 1 : height + 1, 1 : width + 1]

    def _values(self, windows: Tensor) -> Tensor:
        """The 4x4 pixels of the four phases, [tiles, 16, 4 C'], for windows [tiles, 36, C]."""
        points = as_column((self.to_points @ windows).flatten(1))
        products = F.conv2d(points, self.kernel[:, :, None, None], groups=36)
        return self.from_points @ rows_in(products).view(len(windows), 36, -1)

    def _windows(self, values: Tensor) -> Tensor:
        """The transpose of `_values`: [tiles, 36, C] for [tiles, 16, 4 C']."""
        products = as_column((self.from_points.t() @ values).flatten(1))
        points = F.conv_transpose2d(products, self.kernel[:, :, None, None], groups=36)
        return self.to_points.t() @ rows_in(points).view(len(values), 36, -1)

    def _strips(self, batch: int, down: int, across: int) -> Iterator[tuple[int, int, int]]:
        """Image, first and last row of tiles of each strip; a strip fits into the CPU's caches."""
        rows = max(1, WINOGRAD_TILES // across)
        for image in range(batch):
            for first in range(0, down, rows):
                yield image, first, min(first + rows, down)
