"""Transposed convolution with fixed weights, the decoder's upsampling; see `UpsamplingKernel`."""

from functools import cached_property
from typing import Any, Protocol, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fast.autograd import Context
from fast.pool import Pool
from fast.winograd import Winograd

# Winograd's form is faster from these numbers on, measured on two x86-64 cores.
FEWEST_WINOGRAD_CHANNELS, FEWEST_WINOGRAD_PIXELS = 96, 4096


def upsample(x: Tensor, kernel: "UpsamplingKernel") -> Tensor:
    """CompressAI's `deconv` with fixed weights: a transposed 5x5 convolution with stride 2.

    It keeps no tensor for the backward pass.

    Args:
        x: [B, C, H, W].

    Returns:
        [B, C', 2 H, 2 W]; the gradient goes to x alone.
    """
    return _Upsample.apply(x, kernel)


class UpsamplingKernel(nn.Module):
    """A fixed kernel of `upsample`: weight [C, C', 5, 5], bias [C'].

    On a CPU, with many channels and a pool, it uses Winograd's minimal filtering (see `Winograd`).
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, pool: Pool | None = None):
        super().__init__()
        self.register_buffer("weight", weight.detach())
        self.register_buffer("bias", bias.detach())
        self.pool = pool

    @staticmethod
    def fits(layer: nn.ConvTranspose2d) -> bool:
        """Whether a layer is CompressAI's `deconv` with its usual kernel and stride."""
        shape = layer.kernel_size, layer.stride, layer.padding, layer.output_padding
        plain = layer.groups == 1 and layer.dilation == (1, 1) and layer.bias is not None
        return plain and shape == ((5, 5), (2, 2), (2, 2), (1, 1))

    @classmethod
    def of(cls, layer: nn.ConvTranspose2d, pool: Pool | None = None) -> Self:
        """The kernel of a layer.

        Raises:
            ValueError: the layer is not CompressAI's `deconv`.
        """
        if not cls.fits(layer):
            raise ValueError(f"a kernel of 5, stride 2 and bias are wanted, not {layer}")
        return cls(layer.weight, cast(Tensor, layer.bias), pool)

    def forward(self, x: Tensor) -> Tensor:
        """See `upsample`: [B, C', 2 H, 2 W] for x [B, C, H, W]."""
        return upsample(x, self)

    def gradient(self, grad: Tensor) -> Tensor:
        """The gradient to x, [B, C, H, W]; `grad` [B, C', 2 H, 2 W] is that to the result."""
        if self.has_winograd(grad.size(2) // 2, grad.size(3) // 2, grad):
            return self.winograd.gradient(grad)
        return F.conv2d(grad, self.weight, stride=2, padding=2)

    def has_winograd(self, height: int, width: int, v: Tensor) -> bool:
        """Whether to use Winograd's form for inputs of this size, with v's device and dtype."""
        in_float32 = v.dtype == torch.float32
        pooled_on_cpu = v.device.type == "cpu" and self.pool is not None
        wide = min(self.weight.shape[:2]) >= FEWEST_WINOGRAD_CHANNELS
        large = height * width >= FEWEST_WINOGRAD_PIXELS
        return in_float32 and pooled_on_cpu and wide and large

    def __getstate__(self) -> dict[str, Any]:
        """What a copy takes over: not Winograd's form, which it builds anew if it needs it."""
        return {key: value for key, value in self.__dict__.items() if key != "winograd"}

    @cached_property
    def winograd(self) -> Winograd:
        """Winograd's form, built on first use: it is six times as large as the kernel."""
        return Winograd(self.weight, self.pool or Pool())


class _Context(Context, Protocol):
    kernel: UpsamplingKernel


class _Upsample(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, x: Tensor, kernel: UpsamplingKernel) -> Tensor:
        ctx.kernel = kernel
        if kernel.has_winograd(x.size(2), x.size(3), x):
            return kernel.winograd.upsample(x, kernel.bias)
        return F.conv_transpose2d(
            x, kernel.weight, kernel.bias, stride=2, padding=2, output_padding=1
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.kernel.gradient(grad), None
