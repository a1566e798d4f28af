"""The decoder's layers, exact and fast: analytic backward passes, few temporaries, kept memory.

Written plainly, normalisation takes as long as half of the convolutions, and page faults for its
many temporaries as long again. Nothing here approximates: results differ by float rounding only.
"""

import ctypes
import sys
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# On a CPU so many bytes of each tensor are worked on at a time: what fits into the caches.
CHUNK_BYTES = 3 * 2**19
# Measured on two x86-64 cores: from where on Winograd's form wins, its tiles at a time, and up to
# where one convolution of all phases beats the transposed one.
FEWEST_WINOGRAD_CHANNELS, FEWEST_WINOGRAD_PLACES, WINOGRAD_TILES = 96, 1024, 400
MOST_PHASED_CHANNELS = 4
# glibc's names for the two thresholds, of malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def keep_pages() -> bool:
    """Let this process keep the memory that it frees, for the next tensor; whether that took.

    glibc gives large blocks back to the system at once, and each new tensor then costs a page fault
    every 4 kB: up to half of a refinement step. Without glibc nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    largest = 2**31 - 1
    return mallopt is not None and all(
        mallopt(threshold, largest) for threshold in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD)
    )


# --- generalised divisive normalisation -----------------------------------------------------------


def gdn(x: Tensor, beta: Tensor, gamma: Tensor, inverse: bool) -> Tensor:
    """x / sqrt(beta + gamma x^2), or x * sqrt(...) when inverse (arXiv 1511.06281).

    A matrix product over channels stands for the usual 1x1 convolution, whose result would depend
    on the number of threads. Two tensors are kept for the backward pass: x and the factor.

    Args:
        x: [B, C, H, W]; beta: [C] and gamma: [C, C], not negative, re-parametrised already.

    Returns:
        [B, C, H, W], channels-last, with gradients to all three.
    """
    return _GDN.apply(x, beta, gamma, inverse)


class _GDN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, beta: Tensor, gamma: Tensor, inverse: bool) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        beta, gamma = beta.to(x.dtype), gamma.to(x.dtype)
        out = torch.empty_like(x)
        factor = torch.empty_like(x)  # sqrt(norm), or 1 / sqrt(norm)
        root = torch.sqrt if inverse else torch.rsqrt
        square = norm = None
        for x_rows, factor_rows, out_rows in _chunks(x, factor, out):  # each [rows, C]
            square = torch.mul(x_rows, x_rows, out=_like(square, x_rows))
            norm = torch.mm(square, gamma.t(), out=_like(norm, x_rows)).add_(beta)
            torch.mul(x_rows, root(norm, out=factor_rows), out=out_rows)
        ctx.save_for_backward(x, factor, gamma)
        ctx.inverse = inverse
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, factor, gamma = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        grad_x, trains = torch.empty_like(x), ctx.needs_input_grad[1]
        grad_beta, grad_gamma = gamma.new_zeros(len(gamma)), torch.zeros_like(gamma)
        # twice the gradient to the norm, and its part in x's gradient over x
        to_norm = to_x = None
        for x_rows, factor_rows, grad_rows, out in _chunks(x, factor, grad, grad_x):
            to_norm = torch.mul(grad_rows, x_rows, out=_like(to_norm, x_rows))
            if ctx.inverse:
                to_norm.div_(factor_rows)
            else:
                to_norm.mul_(factor_rows).mul_(factor_rows).mul_(factor_rows).neg_()
            to_x = torch.mm(to_norm, gamma, out=_like(to_x, x_rows)).mul_(x_rows)
            torch.mul(grad_rows, factor_rows, out=out).add_(to_x)
            if trains:
                grad_beta.add_(to_norm.sum(0), alpha=0.5)
                grad_gamma.addmm_(to_norm.t(), x_rows.square(), alpha=0.5)
        return grad_x, grad_beta if trains else None, grad_gamma if trains else None, None


def _chunks(*tensors: Tensor):
    """Views [rows, C] of channels-last tensors [B, C, H, W], a few rows at a time on a CPU."""
    rows = [v.permute(0, 2, 3, 1).view(-1, v.size(1)) for v in tensors]
    size = CHUNK_BYTES // (rows[0].size(1) * rows[0].element_size())
    count = max(size, 1) if rows[0].device.type == "cpu" else max(len(rows[0]), 1)
    return zip(*(v.split(count) for v in rows), strict=True)


def _like(buffer: Tensor | None, rows: Tensor) -> Tensor:
    """A buffer shaped as `rows`: the part of the old one that is needed, or a new one."""
    return torch.empty_like(rows) if buffer is None else buffer[: len(rows)]


# --- transposed convolution -----------------------------------------------------------------------


def phases_of(weight: Tensor) -> Tensor:
    """The kernel [2 * 2 * C', C, 3, 3] that computes the four phases of an upsampled picture.

    A transposed 5x5 convolution with stride 2 has, at an even place 2p, the taps 4, 2 and 0 on
    p - 1, p and p + 1, and at 2p + 1 the taps 3 and 1 on p and p + 1. weight: [C, C', 5, 5].
    """
    taps = (((0, 4), (1, 2), (2, 0)), ((1, 3), (2, 1)))  # (place, tap) of even and odd
    phases = weight.new_zeros(2, 2, weight.size(1), weight.size(0), 3, 3)
    for odd_row, rows in enumerate(taps):
        for odd_column, columns in enumerate(taps):
            for i, row in rows:
                for j, column in columns:
                    phases[odd_row, odd_column, :, :, i, j] = weight[:, :, row, column].t()
    return phases.flatten(0, 2)


def interleave(phases: Tensor) -> Tensor:
    """The picture [B, C', 2 H, 2 W], channels-last, of its four phases [B, 2 * 2 * C', H, W].

    torch's pixel_shuffle takes three times as long on channels-last data.
    """
    batch, channels, height, width = phases.shape
    rows = phases.permute(0, 2, 3, 1).reshape(batch, height, width, 2, channels // 2)
    picture = _channels_last(phases, batch, channels // 4, 2 * height, 2 * width)
    places = picture.permute(0, 2, 3, 1).view(batch, height, 2, width, channels // 2)
    places.copy_(rows.transpose(2, 3))
    return picture


def _channels_last(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(
        shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last
    )


def upsample(x: Tensor, kernel: "UpsamplingKernel") -> Tensor:
    """CompressAI's `deconv` with fixed weights: transposed 5x5 convolution, twice the size.

    Keeps nothing for the backward pass.

    Args:
        x: [B, C, H, W].

    Returns:
        [B, C', 2 H, 2 W]; the gradient goes to x alone.
    """
    return _Upsample.apply(x, kernel)


class UpsamplingKernel(nn.Module):
    """A fixed kernel of `upsample` in the forms that are fastest for its size.

    weight [C, C', 5, 5], bias [C']. With few output channels `phases` serve (see `phases_of`). On a
    CPU, with many channels, Winograd's minimal filtering does (see `Winograd`).
    """

    def __init__(self, weight: Tensor, bias: Tensor):
        super().__init__()
        channels, out_channels = weight.shape[:2]
        self.register_buffer("weight", weight.detach())
        self.register_buffer("bias", bias.detach())
        few = out_channels <= MOST_PHASED_CHANNELS
        self.register_buffer("phases", phases_of(self.weight) if few else None)
        many = min(channels, out_channels) >= FEWEST_WINOGRAD_CHANNELS
        self.winograd = Winograd(self.weight) if many else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, C', 2 H, 2 W] for x [B, C, H, W]."""
        return upsample(x, self)

    def has_winograd(self, height: int, width: int, v: Tensor) -> bool:
        """Whether Winograd's form serves for inputs of this size, on v's device, in its dtype."""
        plain = v.device.type == "cpu" and v.dtype == torch.float32
        return self.winograd is not None and plain and height * width >= FEWEST_WINOGRAD_PLACES


class _Upsample(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, kernel: UpsamplingKernel) -> Tensor:
        ctx.kernel, ctx.dtype = kernel, x.dtype
        if kernel.phases is not None:
            phases = F.conv2d(x, kernel.phases, kernel.bias.repeat(4), padding=1)
            return interleave(phases)
        if kernel.has_winograd(*x.shape[2:], x):
            return kernel.winograd.upsample(x, kernel.bias)
        return F.conv_transpose2d(
            x, kernel.weight, kernel.bias, stride=2, padding=2, output_padding=1
        )

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        if ctx.kernel.has_winograd(grad.size(2) // 2, grad.size(3) // 2, grad):
            return ctx.kernel.winograd.gradient(grad), None
        weight = ctx.kernel.weight.to(grad.dtype)
        return F.conv2d(grad, weight, stride=2, padding=2).to(ctx.dtype), None


class Winograd(nn.Module):
    """Winograd's minimal filtering F(4x4, 3x3) for the four phases of `upsample` (1509.09308).

    A tile of 4x4 places needs 36 products a channel instead of 144 for the phase of 3x3 taps; the
    others have a zero tap first, so that the products of point 0 vanish: 30, 30 and 25 instead of
    96, 96 and 64. 121 matrix products replace 400. In float32 the error is ten times that
    of direct convolution, a few 1e-6 of the result.
    """

    PLACES, POINTS = 4, 6
    # To the points 0, 1, -1, 2, -2, infinity: of the input, of the kernel, and back.
    INPUT = (
        (4, 0, -5, 0, 1, 0), (0, -4, -4, 1, 1, 0), (0, 4, -4, -1, 1, 0),
        (0, -2, -1, 2, 1, 0), (0, 2, -1, -2, 1, 0), (0, 4, 0, -5, 0, 1),
    )  # fmt: skip
    KERNEL = (
        (1 / 4, 0, 0), (-1 / 6, -1 / 6, -1 / 6), (-1 / 6, 1 / 6, -1 / 6),
        (1 / 24, 1 / 12, 1 / 6), (1 / 24, -1 / 12, 1 / 6), (0, 0, 1),
    )  # fmt: skip
    OUTPUT = ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1))

    def __init__(self, weight: Tensor):
        super().__init__()
        kernel, output = (torch.tensor(m, dtype=torch.float64) for m in (self.KERNEL, self.OUTPUT))
        points = torch.tensor(self.INPUT, dtype=torch.float64)
        self.register_buffer("to_points", torch.kron(points, points).float())  # [36, 36]
        channels, out_channels = weight.shape[:2]
        phases = phases_of(weight.double()).view(2, 2, out_channels, channels, 3, 3)
        self.phases = [(row, column) for row in (0, 1) for column in (0, 1)]
        for row, column in self.phases:
            taps = kernel[row:] @ phases[row, column] @ kernel[column:].t()  # [C', C, n, n']
            name = f"{row}{column}"
            self.register_buffer("kernel" + name, taps.permute(2, 3, 1, 0).float().contiguous())
            back = torch.kron(output[:, row:].contiguous(), output[:, column:].contiguous())
            self.register_buffer("back" + name, back.float())  # [16, n n']

    def _of_phase(self, row: int, column: int) -> tuple[Tensor, Tensor]:
        """The kernel [n, n', C, C'] and the way back [16, n n'] of a phase; n is 6 - row."""
        return getattr(self, f"kernel{row}{column}"), getattr(self, f"back{row}{column}")

    def upsample(self, x: Tensor, bias: Tensor) -> Tensor:
        """[B, C', 2 H, 2 W], channels-last, for x [B, C, H, W]."""
        batch, channels, height, width = x.shape
        down, across = -(-height // 4), -(-width // 4)  # tiles
        x = x.permute(0, 2, 3, 1)  # [B, H, W, C]
        x = F.pad(x, (0, 0, 1, 4 * across - width + 1, 1, 4 * down - height + 1))
        out = _channels_last(x, batch, len(bias), 8 * down, 8 * across)
        phases = out.permute(0, 2, 3, 1).view(batch, down, 4, 2, across, 4, 2, -1)
        for image, first, last in self._strips(batch, down, across):
            rows, tiles = last - first, (last - first) * across
            strip = x[image, 4 * first : 4 * last + 2]
            windows = strip.unfold(0, 6, 4).unfold(1, 6, 4)  # [rows, across, C, 6, 6]
            windows = windows.permute(3, 4, 0, 1, 2).reshape(36, -1)
            points = (self.to_points @ windows).view(6, 6, tiles, channels)
            for row, column in self.phases:
                kernel, back = self._of_phase(row, column)
                products = x.new_empty(*kernel.shape[:2], tiles, len(bias))
                for index in range(len(kernel)):
                    torch.bmm(points[index + row, column:], kernel[index], out=products[index])
                values = (back @ products.flatten(0, 1).flatten(1)).view(4, 4, rows, across, -1)
                place = phases[image, first:last, :, row, :, :, column]  # [rows, 4, across, 4, C']
                torch.add(values.permute(2, 0, 3, 1, 4), bias, out=place)
        if (height, width) == (4 * down, 4 * across):
            return out
        # A layer that works in place may follow, and must not find a view.
        out = out[:, :, : 2 * height, : 2 * width]
        return out.clone(memory_format=torch.channels_last)

    def gradient(self, grad: Tensor) -> Tensor:
        """The gradient to x, [B, C, H, W], channels-last, for `grad` to the result of `upsample`.

        It is the transpose of each of that one's steps, in reverse.
        """
        batch, height, width = grad.size(0), grad.size(2) // 2, grad.size(3) // 2
        down, across = -(-height // 4), -(-width // 4)  # tiles
        grad = grad.permute(0, 2, 3, 1)  # [B, 2 H, 2 W, C']
        if (height, width) != (4 * down, 4 * across):
            grad = F.pad(grad, (0, 0, 0, 8 * across - 2 * width, 0, 8 * down - 2 * height))
        grad = grad.reshape(batch, down, 4, 2, across, 4, 2, -1)
        channels = self._of_phase(0, 0)[0].size(2)
        out = grad.new_zeros(batch, down + 1, 4, across + 1, 4, channels)
        for image, first, last in self._strips(batch, down, across):
            rows, tiles = last - first, (last - first) * across
            points = grad.new_zeros(6, 6, tiles, channels)
            for row, column in self.phases:
                kernel, back = self._of_phase(row, column)
                values = grad[image, first:last, :, row, :, :, column]  # [rows, 4, across, 4, C']
                values = values.permute(1, 3, 0, 2, 4).reshape(16, -1)
                products = (back.t() @ values).view(*kernel.shape[:2], tiles, -1)
                for index in range(len(kernel)):
                    part = points[index + row, column:]
                    part.baddbmm_(products[index], kernel[index].transpose(1, 2))
            windows = (self.to_points.t() @ points.view(36, -1)).view(6, 6, rows, across, channels)
            windows = windows.permute(2, 0, 3, 1, 4)  # [rows, 6, across, 6, C]: they overlap by 2
            here = out[image, first:last, :, :across], windows[:, :4, :, :4]
            below = out[image, first + 1 : last + 1, :2, :across], windows[:, 4:, :, :4]
            right = out[image, first:last, :, 1:, :2], windows[:, :4, :, 4:]
            corner = out[image, first + 1 : last + 1, :2, 1:, :2], windows[:, 4:, :, 4:]
            for place, part in (here, below, right, corner):
                place.add_(part)
        out = out.view(batch, 4 * down + 4, 4 * across + 4, -1)[:, 1 : height + 1, 1 : width + 1]
        return out.permute(0, 3, 1, 2)

    def _strips(self, batch: int, down: int, across: int) -> Iterator[tuple[int, int, int]]:
        """Image, first and last row of tiles of each part: what fits into the caches."""
        rows = max(1, WINOGRAD_TILES // across)
        for image in range(batch):
            for first in range(0, down, rows):
                yield image, first, min(first + rows, down)
