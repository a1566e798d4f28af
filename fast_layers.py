"""The decoder's layers, exact and fast: analytic backward passes, few temporaries, kept memory.

Written plainly, normalisation takes as long as half of the convolutions, and page faults for its
many temporaries as long again. Nothing here approximates: results differ by float rounding only.
"""

import ctypes
import sys
import weakref
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterator
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from metrics import squared_error

# On a CPU so many bytes of each tensor are worked on at a time: what fits into the caches.
CHUNK_BYTES = 2**21
# Measured on two x86-64 cores: from where on Winograd's form wins, and its tiles at a time.
FEWEST_WINOGRAD_CHANNELS, FEWEST_WINOGRAD_PLACES, WINOGRAD_TILES = 96, 4096, 150
STRIP_BYTES = 2**22  # of rows at a time in `ToPicture`
ALIGNMENT = 64  # bytes, of a cache line
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
    if mallopt is None:
        return False
    # Older versions know no threshold above 32 MB for single blocks.
    kept = mallopt(M_MMAP_THRESHOLD, 2**31 - 1) or mallopt(M_MMAP_THRESHOLD, 2**25)
    return bool(kept and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


class Pool:
    """Memory of large tensors, handed out again as soon as no tensor uses it any more.

    glibc seldom gives an aligned block the place of an equal one, so that a process that keeps its
    pages would grow to twice what it needs.
    """

    SLACK = 1.5  # so many times as large as needed a block may be

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []  # bytes, the smallest first
        # What tensors let go of, at any time and in any thread; sorted in when memory is wanted.
        self._returned: deque[np.ndarray] = deque()

    def __reduce__(self) -> tuple:
        return Pool, ()  # a copy of a model needs no copy of unused memory

    def clear(self) -> None:
        """Give back what nobody uses: pictures of another size come."""
        self._returned.clear()
        self._free.clear()

    def empty(self, like: Tensor, *shape: int) -> Tensor:
        """An uninitialised channels-last tensor [B, C, H, W] on like's device, of like's type.

        On other devices than a CPU it comes from torch.
        """
        batch, channels, height, width = shape
        strides = (height * width * channels, 1, width * channels, channels)
        if like.device.type != "cpu":
            return torch.empty_strided(shape, strides, dtype=like.dtype, device=like.device)
        size = batch * strides[0] * like.element_size()
        block = self._block_of(size + ALIGNMENT)
        start = -block.ctypes.data % ALIGNMENT
        lease = block[start : start + size]  # the storage holds it, so it dies with the last tensor
        weakref.finalize(lease, self._returned.append, block).atexit = False
        storage = torch.from_numpy(lease).untyped_storage()
        return torch.empty(0, dtype=like.dtype).set_(storage, 0, shape, strides)

    def _block_of(self, size: int) -> np.ndarray:
        while self._returned:
            insort(self._free, self._returned.popleft(), key=len)
        index = bisect_left(self._free, size, key=len)
        if index < len(self._free) and len(self._free[index]) <= self.SLACK * size:
            return self._free.pop(index)
        if index > 0 and len(self._free[index - 1]) * self.SLACK > size:
            self._free.pop(index - 1)  # a larger one takes its place
        return np.empty(size, np.uint8)


# --- generalised divisive normalisation -----------------------------------------------------------


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


class _GDN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, beta: Tensor, gamma: Tensor, inverse: bool, pool) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        beta, gamma = beta.to(x.dtype), gamma.to(x.dtype)
        out = torch.empty_like(x) if pool is None else pool.empty(x, *x.shape)
        factor = None
        if any(ctx.needs_input_grad):
            factor = torch.empty_like(x) if pool is None else pool.empty(x, *x.shape)
            ctx.save_for_backward(x, factor, gamma)
        _normalise(
            _rows(x), beta, gamma, inverse, None if factor is None else _rows(factor), _rows(out)
        )
        ctx.inverse, ctx.pool = inverse, pool
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, factor, gamma = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        # Autograd refuses a second pass over a factor that was written to.
        grad_x = torch.empty_like(x) if ctx.pool is None else factor
        weights = (None, None)
        if any(ctx.needs_input_grad[1:3]):
            # Chunks add up: in bfloat16 most of them would be lost.
            full = torch.promote_types(gamma.dtype, torch.float32)
            weights = gamma.new_zeros(len(gamma), dtype=full), torch.zeros_like(gamma, dtype=full)
        rows = (_rows(v) for v in (x, factor, grad, grad_x))
        _normalise_backward(*rows, gamma, ctx.inverse, weights)
        return grad_x, *weights, None, None


def _normalise(
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


def _normalise_backward(
    x: Tensor,
    factor: Tensor,
    grad: Tensor,
    grad_x: Tensor,
    gamma: Tensor,
    inverse: bool,
    grad_weights: tuple[Tensor | None, Tensor | None] = (None, None),
) -> None:
    """The gradient to pixels x [n, C] into `grad_x`, which may be `factor` or x.

    Adds to `grad_weights`, of beta and gamma in float32, where they are given.
    """
    to_norm = None  # twice the gradient to the norm
    grad_beta, grad_gamma = grad_weights
    from_norm = gamma.t().contiguous()
    for x_part, factor_part, grad_part, out in _chunks(x, factor, grad, grad_x):
        to_norm = torch.mul(grad_part, x_part, out=_like(to_norm, x_part))
        if inverse:
            to_norm.div_(factor_part)
        else:
            to_norm.mul_(factor_part).mul_(factor_part).mul_(factor_part).neg_()
        to_x = mix_channels(to_norm, from_norm)
        if grad_beta is not None:
            grad_beta.add_(to_norm.sum(0), alpha=0.5)
            grad_gamma.add_(to_norm.t() @ x_part.square(), alpha=0.5)
        torch.addcmul(to_x.mul_(x_part), grad_part, factor_part, out=out)


def mix_channels(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """rows @ weight^T + bias, [n, C'], for pixels [n, C] and weight [C', C]."""
    if rows.device.type != "cpu":
        return F.linear(rows, weight, bias)
    # A matrix product would go to MKL, which leaves half of an AMD processor's width unused.
    return _rows(F.conv2d(_as_column(rows), weight[:, :, None, None], bias))


def _as_column(rows: Tensor) -> Tensor:
    """Pixels [n, C] as a channels-last picture [1, C, n, 1], a view."""
    return rows.view(1, len(rows), 1, rows.size(1)).permute(0, 3, 1, 2)


def _rows(v: Tensor) -> Tensor:
    """The pixels [B H W, C] of a channels-last [B, C, H, W], a view."""
    return v.permute(0, 2, 3, 1).view(-1, v.size(1))


def _rows_of(v: Tensor, image: int, first: int, last: int) -> Tensor:
    """The same of some rows of one image, [(last - first) W, C]."""
    return v[image, :, first:last].permute(1, 2, 0).view(-1, v.size(1))


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


def interleave(phases: Tensor, picture: Tensor) -> None:
    """Write four phases [B, 2 * 2 * C', H, W] into a channels-last picture [B, C', 2 H, 2 W].

    torch's pixel_shuffle takes three times as long on channels-last data.
    """
    batch, channels, height, width = phases.shape
    rows = phases.permute(0, 2, 3, 1).reshape(batch, height, width, 2, channels // 2)
    places = picture.permute(0, 2, 3, 1).view(batch, height, 2, width, channels // 2)
    places.copy_(rows.transpose(2, 3))


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
    """A fixed kernel of `upsample`: weight [C, C', 5, 5], bias [C'].

    On a CPU, with many channels and a pool, Winograd's minimal filtering serves (see `Winograd`).
    """

    def __init__(self, weight: Tensor, bias: Tensor, pool: Pool | None = None):
        super().__init__()
        self.register_buffer("weight", weight.detach())
        self.register_buffer("bias", bias.detach())
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        """[B, C', 2 H, 2 W] for x [B, C, H, W]."""
        return upsample(x, self)

    def gradient(self, grad: Tensor) -> Tensor:
        """The gradient to x, [B, C, H, W], for `grad` [B, C', 2 H, 2 W] to the result."""
        if self.has_winograd(grad.size(2) // 2, grad.size(3) // 2, grad):
            return self.winograd.gradient(grad)
        return F.conv2d(grad, self.weight.to(grad.dtype), stride=2, padding=2)

    def has_winograd(self, height: int, width: int, v: Tensor) -> bool:
        """Whether Winograd's form serves for inputs of this size, on v's device, in its dtype."""
        in_float32 = v.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        pooled_on_cpu = v.device.type == "cpu" and self.pool is not None
        wide = min(self.weight.shape[:2]) >= FEWEST_WINOGRAD_CHANNELS
        large = height * width >= FEWEST_WINOGRAD_PLACES
        return in_float32 and pooled_on_cpu and wide and large

    @cached_property
    def winograd(self) -> "Winograd":
        """Made when it is first wanted: six times as large as the kernel itself."""
        return Winograd(self.weight, self.pool)


class _Upsample(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, kernel: UpsamplingKernel) -> Tensor:
        ctx.kernel, ctx.dtype = kernel, x.dtype
        if kernel.has_winograd(*x.shape[2:], x):
            return kernel.winograd.upsample(x, kernel.bias)
        return F.conv_transpose2d(
            x, kernel.weight, kernel.bias, stride=2, padding=2, output_padding=1
        )

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return ctx.kernel.gradient(grad).to(ctx.dtype), None


class FrozenDecoder(nn.Sequential):
    """g_s with fixed weights: any layers, and `ToPicture` as the last."""

    def squared_error(
        self, y_hat: Tensor, x: Tensor, corner: tuple[int, int] = (0, 0)
    ) -> tuple[Tensor, Tensor]:
        """See `ToPicture.squared_error`; y_hat [B, M, h, w], x [B, 3, H, W]."""
        *layers, to_picture = self
        for layer in layers:
            y_hat = layer(y_hat)
        return to_picture.squared_error(y_hat, x, corner)


class ToPicture(nn.Module):
    """The decoder's last three layers with fixed weights: `upsample`, inverse GDN, `upsample`.

    What lies between them takes the most memory of all. So on a CPU the last two work in strips of
    rows, and the gradient of the squared error is computed along the way, in place: only the first
    one's result is ever there as a whole. The four phases of the picture are one convolution (see
    `phases_of`), which for few channels is faster than the transposed one.

    upsampling: the first of the three; beta [C], gamma [C, C]: see `gdn`; weight [C, C', 5, 5],
    bias [C']: of the last.
    """

    def __init__(
        self,
        upsampling: UpsamplingKernel,
        beta: Tensor,
        gamma: Tensor,
        weight: Tensor,
        bias: Tensor,
    ):
        super().__init__()
        self.upsampling = upsampling
        self.register_buffer("beta", beta.detach())
        self.register_buffer("gamma", gamma.detach())
        self.register_buffer("weight", weight.detach())
        self.register_buffer("phases", phases_of(weight.detach()))
        self.register_buffer("phases_bias", bias.detach().repeat(4))

    def forward(self, v: Tensor) -> Tensor:
        """The picture [B, C', 4 h, 4 w] for v [B, C, h, w], without a gradient.

        Raises:
            RuntimeError: a gradient to v is wanted; only `squared_error` has one.
        """
        if torch.is_grad_enabled() and v.requires_grad:
            raise RuntimeError("a frozen g_s gives no gradient of its picture: see squared_error")
        x, picture = self._begin(v)
        for _ in self._strips(x, picture):
            pass
        return picture

    def squared_error(
        self, v: Tensor, target: Tensor, corner: tuple[int, int] = (0, 0)
    ) -> tuple[Tensor, Tensor]:
        """The sum of squared errors of a part of the picture, and that part.

        Args:
            v: [B, C, h, w].
            target: [B, C', H, W], what the picture should be from row and column `corner` on.

        Returns:
            The sum [B], float64, with a gradient to v, once; and [B, C', H, W], which has none.
        """
        return _SquaredError.apply(v, target, corner, self)

    def _begin(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, C, 2 h, 2 w], the first layer's result, and an empty picture, channels-last."""
        x = self.upsampling(v).contiguous(memory_format=torch.channels_last)
        rows = x.new_empty(len(x), 2 * x.size(2), 2 * x.size(3), self.weight.size(1))
        return x, rows.permute(0, 3, 1, 2)

    def _strips(self, x: Tensor, picture: Tensor) -> Iterator[tuple[int, int, int, Tensor]]:
        """Write the picture of x [B, C, H, W], rows first to last of an image at a time.

        Yields image, first, last and GDN's factors [last - first + 2, W, C], of one row more on
        either side, as soon as the pixels of these rows are there. Then x may be changed up to row
        last - 2: the next strip reads the others.
        """
        (channels, height, width), rows = x.shape[1:], x.size(2)
        beta, gamma = self.beta.to(x.dtype), self.gamma.to(x.dtype)
        if x.device.type == "cpu":
            rows = max(2, STRIP_BYTES // (channels * width * x.element_size()))
        rows = min(rows, height)
        # GDN's factors and what it normalises, in the same place for all strips: it stays cached.
        strips = x.new_empty(2, rows + 2, width, channels)
        for image in range(len(x)):
            for first in range(0, height, rows):
                last = min(first + rows, height)
                known, end = (first + 1 if first else 0), min(last + 1, height)
                if first:
                    strips[:, :2] = strips[:, rows:]
                else:
                    strips[1, 0] = 0  # outside of the picture
                strip = strips[:, : last - first + 2]
                if last == height:
                    strip[1, -1] = 0
                factor, normal = strip[:, known - first + 1 : end - first + 1].flatten(1, 2)
                _normalise(_rows_of(x, image, known, end), beta, gamma, True, factor, normal)
                padded = strip[1:].permute(0, 3, 1, 2)
                phases = F.conv2d(padded, self.phases, self.phases_bias, padding=(0, 1))
                interleave(phases, picture[image : image + 1, :, 2 * first : 2 * last])
                yield image, first, last, strip[0]


class _SquaredError(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v: Tensor, target: Tensor, corner, stage: ToPicture) -> tuple[Tensor, Tensor]:
        x, picture = stage._begin(v)
        weight, gamma = stage.weight.to(x.dtype), stage.gamma.to(x.dtype)
        for image, first, last, factor in stage._strips(x, picture):
            if not ctx.needs_input_grad[0]:
                continue
            # Rows of x of which all pixels that they reach are there, and were not before.
            start, end = max(first - 1, 0), last if last == x.size(2) else last - 1
            error = _error_rows(picture[image], target[image], corner, 2 * start - 2, 2 * end + 1)
            to_normal = F.conv2d(error, weight, stride=2).to(x.dtype)  # [1, C, end - start, W]
            to_normal = _rows(to_normal.contiguous(memory_format=torch.channels_last))
            factor_rows = factor[start - first + 1 : end - first + 1].flatten(0, 1)
            x_rows = _rows_of(x, image, start, end)
            _normalise_backward(x_rows, factor_rows, to_normal, x_rows, gamma, True)
        gradient = None
        if ctx.needs_input_grad[0]:
            gradient = stage.upsampling.gradient(x).to(v.dtype)
            gradient = gradient.contiguous(memory_format=torch.channels_last)
        ctx.save_for_backward(gradient)
        (top, left), (height, width) = corner, target.shape[2:]
        shown = picture[:, :, top : top + height, left : left + width].to(target.dtype)
        ctx.mark_non_differentiable(shown)
        return squared_error(shown, target), shown

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, _: Tensor):
        (gradient,) = ctx.saved_tensors
        # In its place: autograd refuses a second pass over it.
        return gradient.mul_((2 * grad).to(gradient.dtype)[:, None, None, None]), None, None, None


def _error_rows(
    picture: Tensor, target: Tensor, corner: tuple[int, int], first: int, last: int
) -> Tensor:
    """picture - target in rows first to last of the picture, [1, C', last - first, W + 4].

    Zeros where there is no target, as in the two columns more on either side. picture [C', H, W];
    target [C', h, w] from row and column `corner` on.
    """
    (top, left), (height, width) = corner, target.shape[1:]
    rows = target.new_zeros(1, last - first, picture.size(2) + 4, len(picture))
    error = rows.permute(0, 3, 1, 2)
    above, below = max(first, top), min(last, top + height)
    if above < below:
        part = error[0, :, above - first : below - first, left + 2 : left + 2 + width]
        torch.sub(
            picture[:, above:below, left : left + width],
            target[:, above - top : below - top],
            out=part,
        )
    return error.to(picture.dtype)


class Winograd:
    """Winograd's minimal filtering F(4x4, 3x3) for the four phases of `upsample`.

    See arXiv 1509.09308. A tile of 4x4 places takes 36 products a channel and phase instead of 100
    on average. All phases share their input's points, so that one grouped 1x1 convolution, whose 36
    groups are the points, does the work. In float32 the error is ten times that of direct
    convolution, a few 1e-6 of the result.
    """

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
        for index, phase in enumerate(phases):  # one at a time: in float64 they are large
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
        places = out.permute(0, 2, 3, 1).view(batch, down, 4, 2, across, 4, 2, -1)
        for image, first, last in self._strips(batch, down, across):
            windows = padded[image, 4 * first : 4 * last + 2].unfold(0, 6, 4).unfold(1, 6, 4)
            values = self._values(windows.permute(0, 1, 3, 4, 2).reshape(-1, 36, channels))
            values = values.view(last - first, across, 4, 4, 2, 2, -1).permute(0, 2, 4, 1, 3, 5, 6)
            torch.add(values, bias, out=places[image, first:last])
            del values  # before the next strip takes as much memory
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
        channels = self.kernel.size(1)
        padded = self.pool.empty(grad, batch, channels, 4 * down + 4, 4 * across + 4).zero_()
        out = padded.permute(0, 2, 3, 1).view(batch, down + 1, 4, across + 1, 4, channels)
        for image, first, last in self._strips(batch, down, across):
            rows = last - first
            values = grad[image, first:last].permute(0, 3, 1, 4, 2, 5, 6)
            windows = self._windows(values.reshape(rows * across, 16, -1))
            windows = windows.view(rows, across, 6, 6, channels).transpose(1, 2)
            # [rows, 6, across, 6, C]: they overlap by 2
            here = out[image, first:last, :, :across], windows[:, :4, :, :4]
            below = out[image, first + 1 : last + 1, :2, :across], windows[:, 4:, :, :4]
            right = out[image, first:last, :, 1:, :2], windows[:, :4, :, 4:]
            corner = out[image, first + 1 : last + 1, :2, 1:, :2], windows[:, 4:, :, 4:]
            for place, part in (here, below, right, corner):
                place.add_(part)
            del windows, here, below, right, corner, part  # as above
        return padded[:, :, 1 : height + 1, 1 : width + 1]

    def _values(self, windows: Tensor) -> Tensor:
        """The 4x4 places of the four phases, [tiles, 16, 4 C'], of windows [tiles, 36, C]."""
        points = _as_column((self.to_points @ windows).flatten(1))
        products = F.conv2d(points, self.kernel[:, :, None, None], groups=36)
        return self.from_points @ _rows(products).view(len(windows), 36, -1)

    def _windows(self, values: Tensor) -> Tensor:
        """The transpose of `_values`: [tiles, 36, C] for [tiles, 16, 4 C']."""
        products = _as_column((self.from_points.t() @ values).flatten(1))
        points = F.conv_transpose2d(products, self.kernel[:, :, None, None], groups=36)
        return self.to_points.t() @ _rows(points).view(len(values), 36, -1)

    def _strips(self, batch: int, down: int, across: int) -> Iterator[tuple[int, int, int]]:
        """Image, first and last row of tiles of each part: what fits into the caches."""
        rows = max(1, WINOGRAD_TILES // across)
        for image in range(batch):
            for first in range(0, down, rows):
                yield image, first, min(first + rows, down)
