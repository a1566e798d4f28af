"""Channels-last tensors as rows of pixels, and the four phases of an upsampled tensor."""

from torch import Tensor


def as_column(rows: Tensor) -> Tensor:
    """Pixels [n, C] as a channels-last tensor [1, C, n, 1], a view."""
    return rows.view(1, len(rows), 1, rows.size(1)).permute(0, 3, 1, 2)


def rows_in(v: Tensor) -> Tensor:
    """The pixels [B H W, C] of a channels-last [B, C, H, W], a view."""
    return v.permute(0, 2, 3, 1).view(-1, v.size(1))


def rows_at_a_time(v: Tensor, size: int, row: int, least: int, most: int) -> int:
    """How many rows of `row` elements, like v's, a CPU processes at a time: about `size` bytes.

    In half precision twice as many bytes: an operation is short beside the time to start it.
    """
    element = v.element_size()
    if element < 4:
        size *= 2
    return min(max(size // (row * element), least), most)


def phases_of(weight: Tensor) -> Tensor:
    """The kernel [2 * 2 * C', C, 3, 3] that computes the four phases of an upsampled tensor.

    In a transposed 5x5 convolution with stride 2, output pixel 2p weighs the input pixels p - 1, p
    and p + 1 with taps 4, 2 and 0. Output pixel 2p + 1 weighs p and p + 1 with taps 3 and 1.

    Args:
        weight: [C, C', 5, 5], of the transposed convolution.
    """
    taps = (((0, 4), (1, 2), (2, 0)), ((1, 3), (2, 1)))  # (pixel, tap) of even and odd outputs
    phases = weight.new_zeros(2, 2, weight.size(1), weight.size(0), 3, 3)
    for odd_row, rows in enumerate(taps):
        for odd_column, columns in enumerate(taps):
            for i, row in rows:
                for j, column in columns:
                    phases[odd_row, odd_column, :, :, i, j] = weight[:, :, row, column].t()
    return phases.flatten(0, 2)


def interleave(phases: Tensor, picture: Tensor) -> None:
    """Write four phases [B, 2 * 2 * C', H, W] into a channels-last `picture` [B, C', 2 H, 2 W].

    On channels-last data torch's pixel_shuffle takes three times as long.
    """
    batch, channels, height, width = phases.shape
    rows = phases.permute(0, 2, 3, 1).reshape(batch, height, width, 2, channels // 2)
    pixels = picture.permute(0, 2, 3, 1).view(batch, height, 2, width, channels // 2)
    pixels.copy_(rows.transpose(2, 3))
