"""The last three layers of a decoder with fixed weights, fused with the squared error.

"Picture" here is the result of g_s, before it is cropped to the image's size.
Nothing is approximated: results differ from CompressAI's by float rounding only.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fast.autograd import Context
from fast.gdn import normalise, normalise_backward
from fast.layout import interleave, phases_of, rows_in, rows_of_image
from fast.upsampling import UpsamplingKernel
from metrics import squared_error

STRIP_BYTES = 2**22  # size of the rows that `ToPicture` processes at a time on a CPU


class FrozenDecoder(nn.Module):
    """g_s with fixed weights: any layers, then `ToPicture`."""

    def __init__(self, *layers: nn.Module, to_picture: "ToPicture"):
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.to_picture = to_picture

    def forward(self, y_hat: Tensor) -> Tensor:
        """See `ToPicture.forward`; y_hat [B, M, h, w]."""
        return self.to_picture(self.layers(y_hat))

    def squared_error(
        self, y_hat: Tensor, x: Tensor, corner: tuple[int, int] = (0, 0)
    ) -> tuple[Tensor, Tensor]:
        """See `ToPicture.squared_error`; y_hat [B, M, h, w], x [B, 3, H, W]."""
        return self.to_picture.squared_error(self.layers(y_hat), x, corner)


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
        """The summed squared error of a part of the picture, and that part.

        Args:
            v: [B, C, h, w].
            target: [B, C', H, W].
            corner: the row and column of the picture where the target begins.

        Returns:
            The sum [B] in float64, with a gradient to v that can be taken once, and the part
            [B, C', H, W], which has no gradient.
        """
        return _SquaredError.apply(v, target, corner, self)

    def _begin(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """The first layer's result [B, C, 2 h, 2 w] and an empty picture, both channels-last."""
        x = self.upsampling(v).contiguous(memory_format=torch.channels_last)
        rows = x.new_empty(len(x), 2 * x.size(2), 2 * x.size(3), self.weight.size(1))
        return x, rows.permute(0, 3, 1, 2)

    def _strips(self, x: Tensor, picture: Tensor) -> Iterator[tuple[int, int, int, Tensor]]:
        """Write the picture of x [B, C, H, W], strip by strip: rows first to last of one image.

        After each strip it yields image, first, last and GDN's factors [last - first + 2, W, C],
        which cover one more row on either side. Then the caller may change x up to row last - 2;
        the next strip still reads the later rows.
        """
        (channels, height, width), rows = x.shape[1:], x.size(2)
        beta, gamma = self.beta.to(x.dtype), self.gamma.to(x.dtype)
        if x.device.type == "cpu":
            rows = max(2, STRIP_BYTES // (channels * width * x.element_size()))
        rows = min(rows, height)
        # GDN's factors and results. All strips use the same memory, so it stays in the cache.
        strips = x.new_empty(2, rows + 2, width, channels)
        for image in range(len(x)):
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
                x_rows = rows_of_image(x, image, first_new, end)
                normalise(x_rows, beta, gamma, True, factor, normal)
                padded = strip[1:].permute(0, 3, 1, 2)
                phases = F.conv2d(padded, self.phases, self.phases_bias, padding=(0, 1))
                interleave(phases, picture[image : image + 1, :, 2 * first : 2 * last])
                yield image, first, last, strip[0]


class _SquaredError(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context, v: Tensor, target: Tensor, corner: tuple[int, int], stage: ToPicture
    ) -> tuple[Tensor, Tensor]:
        x, picture = stage._begin(v)
        weight, gamma = stage.weight.to(x.dtype), stage.gamma.to(x.dtype)
        for image, first, last, factor in stage._strips(x, picture):
            if not ctx.needs_input_grad[0]:
                continue
            # The rows of x for which this strip completed the last of the pixels they reach.
            start, end = max(first - 1, 0), last if last == x.size(2) else last - 1
            error = _error_rows(picture[image], target[image], corner, 2 * start - 2, 2 * end + 1)
            to_normal = F.conv2d(error, weight, stride=2).to(x.dtype)  # [1, C, end - start, W]
            to_normal = rows_in(to_normal.contiguous(memory_format=torch.channels_last))
            factor_rows = factor[start - first + 1 : end - first + 1].flatten(0, 1)
            x_rows = rows_of_image(x, image, start, end)
            normalise_backward((x_rows, factor_rows), to_normal, x_rows, gamma, True)
        gradient = None
        if ctx.needs_input_grad[0]:
            gradient = stage.upsampling.gradient(x).to(v.dtype)
            gradient = gradient.contiguous(memory_format=torch.channels_last)
        ctx.save_for_backward(gradient)
        (top, left), (height, width) = corner, target.shape[2:]
        part = picture[:, :, top : top + height, left : left + width].to(target.dtype)
        ctx.mark_non_differentiable(part)
        return squared_error(part, target), part

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        # In place: autograd raises an error if a second pass reads a changed tensor.
        return gradient.mul_((2 * grad).to(gradient.dtype)[:, None, None, None]), None, None, None


def _error_rows(
    picture: Tensor, target: Tensor, corner: tuple[int, int], first: int, last: int
) -> Tensor:
    """picture - target in rows first to last of the picture, [1, C', last - first, W + 4].

    The result has two more columns on either side. It is 0 where there is no target.

    Args:
        picture: [C', H, W]; target: [C', h, w], which begins at row and column `corner`.
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
