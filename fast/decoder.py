"""The last three layers of a decoder with fixed weights, fused with the squared error.

"Picture" here is the result of g_s, before it is cropped to the image's size.
Nothing is approximated: results differ from CompressAI's by float rounding only.
"""

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fast.autograd import Context
from fast.gdn import normalise, normalise_backward
from fast.layout import interleave, phases_of, rows_at_a_time, rows_in
from fast.precision import FrozenNetwork
from fast.upsampling import UpsamplingKernel
from metrics import squared_error

STRIP_BYTES = 2**22  # of the rows that `ToPicture` processes at a time, see `rows_at_a_time`


class FrozenDecoder(FrozenNetwork):
    """g_s with fixed weights: any layers, then `ToPicture`."""

    def __init__(self, *layers: nn.Module, to_picture: "ToPicture"):
        super().__init__(to_picture.upsampling.pool)
        self.layers = nn.Sequential(*layers)
        self.to_picture = to_picture

    def forward(self, y_hat: Tensor) -> Tensor:
        """See `ToPicture.forward`; y_hat [B, M, h, w]."""
        with self.as_autocast_says(y_hat) as (g_s, v):
            return g_s.to_picture(g_s.layers(v))

    def squared_error(
        self,
        y_hat: Tensor,
        x: Tensor,
        corner: tuple[int, int] = (0, 0),
        weights: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See `ToPicture.squared_error`; y_hat [B, M, h, w], x [B, 3, H, W]."""
        with self.as_autocast_says(y_hat) as (g_s, v):
            return g_s.to_picture.squared_error(g_s.layers(v), x, corner, weights)


class ToPicture(nn.Module):
    """The decoder's last three layers with fixed weights: `upsample`, inverse GDN, `upsample`.

    The tensors between these layers take more memory than all others. So on a CPU the last two
    layers work in strips of rows. The gradient of the squared error is computed strip by strip, in
    place. Only the first layer's result is in memory as a whole. The last layer computes the four
    phases of the picture by one convolution (see `phases_of`). With few channels this is faster
    than a transposed convolution.

    upsampling: the first layer. beta [C], gamma [C, C]: the weights of the GDN, see `gdn`. weight
    [C, C', 5, 5], bias [C']: the weights of the last layer.
    """

    beta: Tensor
    gamma: Tensor
    weight: Tensor
    phases: Tensor
    phases_bias: Tensor

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
        """The picture [B, C', 4 h, 4 w] for v [B, C, h, w]; its gradient can be taken once."""
        picture: Tensor = _Picture.apply(v, self)
        return picture

    def squared_error(
        self,
        v: Tensor,
        target: Tensor,
        corner: tuple[int, int] = (0, 0),
        weights: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The summed squared error of a part of the picture, and that part.

        Args:
            v: [B, C, h, w].
            target: [B, C', H, W].
            corner: the row and column of the picture where the target begins.
            weights: [B, 1, H, W], of the target's pixels; None: all are 1.

        Returns:
            The sum [B] in float64, with a gradient to v that can be taken once, and the part
            [B, C', H, W], which has no gradient.
        """
        return _SquaredError.apply(v, target, corner, weights, self)

    def input_of_last_layer(self, v: Tensor) -> Tensor:
        """What the last layer gets for v [B, C, h, w]: [B, C, 2 h, 2 w], without a gradient."""
        x = self.upsampling(v).contiguous(memory_format=torch.channels_last)
        normal = torch.empty_like(x)
        normalise(rows_in(x), self.beta, self.gamma, True, None, rows_in(normal))
        return normal

    def with_last_layer(self, weight: Tensor, bias: Tensor) -> Self:
        """The same layers, but for the last one: weight [C, C', 5, 5], bias [C']."""
        stage = type(self)(self.upsampling, self.beta, self.gamma, weight, bias)
        return stage.to(memory_format=torch.channels_last)

    def _begin(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """The first layer's result [B, C, 2 h, 2 w] and an empty picture, both channels-last."""
        x = self.upsampling(v).contiguous(memory_format=torch.channels_last)
        rows = x.new_empty(len(x), 2 * x.size(2), 2 * x.size(3), self.weight.size(1))
        return x, rows.permute(0, 3, 1, 2)

    def _strips(self, x: Tensor, picture: Tensor) -> Iterator["_Strip"]:
        """Write the picture of x [B, C, H, W], strip by strip, and yield each strip.

        After each strip the caller may change x up to row `last` - 2; the next strip still reads
        the later rows. On other devices than a CPU all rows of all images are one strip.
        """
        if x.device.type != "cpu":
            factor, normal = torch.empty_like(x), torch.empty_like(x)
            normalise(rows_in(x), self.beta, self.gamma, True, rows_in(factor), rows_in(normal))
            interleave(F.conv2d(normal, self.phases, self.phases_bias, padding=1), picture)
            yield _Strip(slice(len(x)), 0, x.size(2), factor.permute(0, 2, 3, 1), 0)
            return
        for image in range(len(x)):
            yield from self._strips_of(slice(image, image + 1), x, picture)

    def overwrite_by_gradient(self, x: Tensor, factor: Tensor, to_picture: Tensor) -> None:
        """Write the gradient to some rows of the first layer's result in place of these rows.

        Args:
            x: [b, C, rows, W]; factor: GDN's factors of x, [b rows W, C].
            to_picture: the gradient to the pixels that x reaches, [b, C', 2 rows + 3, 2 W + 4].
        """
        to_normal = F.conv2d(to_picture, self.weight, stride=2)  # [b, C, rows, W]
        to_normal = rows_in(to_normal.contiguous(memory_format=torch.channels_last))
        x_rows = rows_in(x)
        normalise_backward((x_rows, factor), to_normal, x_rows, self.gamma, True)

    def _strips_of(self, image: slice, x: Tensor, picture: Tensor) -> Iterator["_Strip"]:
        """The strips of one image, see `_strips`."""
        channels, height, width = x.shape[1:]
        rows = rows_at_a_time(x, STRIP_BYTES, width * channels, 2, height)
        # GDN's factors and results. All strips use the same memory, so it stays in the cache.
        strips = x.new_empty(2, rows + 2, width, channels)
        for first in range(0, height, rows):
            last = min(first + rows, height)
            first_new, end = (first + 1 if first else 0), min(last + 1, height)
            if first:
                strips[:, :2] = strips[:, rows:]
            else:
                strips[1, 0] = 0  # zero padding above the image
            strip = strips[:, : last - first + 2]
            if last == height:
                strip[1, -1] = 0
            factor, normal = strip[:, first_new - first + 1 : end - first + 1].flatten(1, 2)
            x_rows = rows_in(x[image, :, first_new:end])
            normalise(x_rows, self.beta, self.gamma, True, factor, normal)
            padded = strip[1:].permute(0, 3, 1, 2)
            phases = F.conv2d(padded, self.phases, self.phases_bias, padding=(0, 1))
            interleave(phases, picture[image, :, 2 * first : 2 * last])
            yield _Strip(image, first, last, strip[:1], first - 1)


class _Strip(NamedTuple):
    """Rows `first` to `last` of x, the first upsampling's result, for some images.

    factor: GDN's factors, [b, rows, W, C]; they begin at row `top` of x.
    """

    images: slice
    first: int
    last: int
    factor: Tensor
    top: int

    def factor_rows(self, start: int, end: int) -> Tensor:
        """The factors of rows start to end of x, [b (end - start) W, C]."""
        return self.factor[:, start - self.top : end - self.top].flatten(0, 2)


class _PictureContext(Context, Protocol):
    stage: ToPicture


class _Picture(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _PictureContext, v: Tensor, stage: ToPicture) -> Tensor:
        x, picture = stage._begin(v)
        for _ in stage._strips(x, picture):
            pass
        ctx.save_for_backward(x if ctx.needs_input_grad[0] else None)
        ctx.stage = stage
        return picture

    @staticmethod
    @once_differentiable
    def backward(ctx: _PictureContext, to_picture: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        stage, height = ctx.stage, x.size(2)
        rows, images = height, len(x)
        if x.device.type == "cpu":
            rows, images = rows_at_a_time(x, STRIP_BYTES, x[0, :, 0].numel(), 2, height), 1
        starts = product(range(0, len(x), images), range(0, height, rows))
        for image, first in starts:
            part = x[image : image + images, :, first : first + rows]
            # Two more rows and columns on either side: the last layer's kernel has 5 x 5 pixels.
            reached = slice(2 * first - 2, 2 * (first + part.size(2)) + 1)
            gradient = _with_margin(to_picture[image : image + images], reached).to(x.dtype)
            factor, normal = torch.empty_like(rows_in(part)), torch.empty_like(rows_in(part))
            normalise(rows_in(part), stage.beta, stage.gamma, True, factor, normal)
            # In place: autograd raises an error if a second pass reads a changed tensor.
            stage.overwrite_by_gradient(part, factor, gradient)
        return stage.upsampling.gradient(x).contiguous(memory_format=torch.channels_last), None


def _with_margin(v: Tensor, rows: slice) -> Tensor:
    """Some rows of v [b, C, H, W] with two more columns on either side; 0 where v has no pixel."""
    first, last = max(rows.start, 0), min(rows.stop, v.size(2))
    return F.pad(v[:, :, first:last], (2, 2, first - rows.start, rows.stop - last))


class _SquaredError(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context,
        v: Tensor,
        target: Tensor,
        corner: tuple[int, int],
        weights: Tensor | None,
        stage: ToPicture,
    ) -> tuple[Tensor, Tensor]:
        x, picture = stage._begin(v)
        for strip in stage._strips(x, picture):
            if not ctx.needs_input_grad[0]:
                continue
            # The rows of x for which this strip completed the last of the pixels they reach.
            start = max(strip.first - 1, 0)
            end = strip.last if strip.last == x.size(2) else strip.last - 1
            own = picture[strip.images], target[strip.images], slice(2 * start - 2, 2 * end + 1)
            error = _error_rows(*own, corner, None if weights is None else weights[strip.images])
            x_rows = x[strip.images, :, start:end]
            stage.overwrite_by_gradient(x_rows, strip.factor_rows(start, end), error)
        gradient = None
        if ctx.needs_input_grad[0]:
            gradient = stage.upsampling.gradient(x)
            gradient = gradient.contiguous(memory_format=torch.channels_last)
        ctx.save_for_backward(gradient)
        (top, left), (height, width) = corner, target.shape[2:]
        part = picture[:, :, top : top + height, left : left + width].to(target.dtype)
        ctx.mark_non_differentiable(part)
        return squared_error(part, target, weights), part

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        # In place: autograd raises an error if a second pass reads a changed tensor.
        gradient.mul_((2 * grad).to(gradient.dtype)[:, None, None, None])
        return gradient, None, None, None, None


def _error_rows(
    picture: Tensor,
    target: Tensor,
    rows: slice,
    corner: tuple[int, int],
    weights: Tensor | None,
) -> Tensor:
    """weights * (picture - target) in some rows of the picture, [b, C', rows, W + 4].

    The result has two more columns on either side. It is 0 where there is no target.

    Args:
        picture: [b, C', H, W]; target: [b, C', h, w], which begins at row and column `corner`.
        weights: [b, 1, h, w]; None: all are 1.
    """
    first, last = rows.start, rows.stop
    (top, left), (height, width) = corner, target.shape[2:]
    images, channels, columns = len(picture), picture.size(1), picture.size(3) + 4
    error = target.new_zeros(images, last - first, columns, channels).permute(0, 3, 1, 2)
    above, below = max(first, top), min(last, top + height)
    if above < below:
        inside = error[:, :, above - first : below - first, left + 2 : left + 2 + width]
        target_rows = slice(above - top, below - top)
        torch.sub(
            picture[:, :, above:below, left : left + width], target[:, :, target_rows], out=inside
        )
        if weights is not None:
            inside.mul_(weights[:, :, target_rows])
    return error.to(picture.dtype)
