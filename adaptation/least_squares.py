"""The squared error of pictures as a function of the decoder's last layer, which is linear.

With y_hat fixed the picture is linear in the last layer's weights. So its squared error is a
quadratic function of them, and a few sums over the picture say all about it.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fast.last_layer import LastLayer, input_of_last_layer, last_layer_of
from fast.layout import phases_of
from fast.tiles import STRIDE, Tile, cut, tiles_of
from objectives import Problem

SIDE = 32  # of a tile, in positions of y
MOST_PIXELS = 2**22
COLUMNS = 2**14  # positions of the last layer's input that are summed over at a time
UNIT = STRIDE // 2  # rows of the last layer's input for one position of y


class Quadratic(NamedTuple):
    """The summed squared error of a picture: error - 2 tr(d^T slope) + tr(d^T gram d).

    d is a change of the last layer [P, 3]: for each colour the C * 25 weights of its kernel, in the
    order of [C, 5, 5], then its bias. gram: [P, P], the same for each colour. slope: [P, 3]. All
    are in float64 on the CPU.
    """

    error: float
    slope: Tensor
    gram: Tensor

    def at(self, change: Tensor) -> "Quadratic":
        """The same error as a function of what is added to a change [P, 3]."""
        through = self.gram @ change
        error = self.error - float((change * (2 * self.slope - through)).sum())
        return Quadratic(error, self.slope - through, self.gram)

    def along(self, directions: Tensor) -> tuple[Tensor, Tensor]:
        """The slope [K] and the gram matrix [K, K] of the factors of directions [K, P, 3]."""
        through = torch.einsum("pq,kqc->kpc", self.gram, directions)
        return (
            torch.einsum("kpc,pc->k", directions, self.slope),
            torch.einsum("kpc,lpc->kl", directions, through),
        )


def to_columns(weight: Tensor, bias: Tensor) -> Tensor:
    """Weights [..., C, 3, 5, 5] and biases [..., 3] of last layers as [..., P, 3]."""
    columns = weight.movedim(-3, -1).flatten(-4, -2)
    return torch.cat((columns, bias[..., None, :]), -2)


def from_columns(change: Tensor) -> LastLayer:
    """The weight [C, 3, 5, 5] and the bias [3] of `to_columns`."""
    weight = change[:-1].unflatten(0, (-1, 5, 5)).movedim(-1, 1)
    return LastLayer(weight, change[-1])


@torch.no_grad()
def quadratic_of(problem: Problem, y_hat: Tensor) -> Quadratic:
    """The squared error of one image's picture around the last layer that the model has.

    Half-covered positions of the last layer's input, at the border of pictures of odd size, are
    left out. Of a large picture only every second, third or further tile is looked at, and the sums
    are scaled up: `MOST_PIXELS` tell enough of a few thousand weights.

    Args:
        y_hat: [1, M, h, w].

    Raises:
        ValueError: the model's last layer is no `deconv`.
    """
    last = last_layer_of(problem.model.network.g_s)
    if last is None:
        raise ValueError("the decoder does not end with a transposed convolution")
    sums, tiles = _Sums(last), list(_tiles(problem, y_hat))
    every = min(-(-problem.pixels // MOST_PIXELS), len(tiles))
    for tile in tiles[::every]:
        v = input_of_last_layer(problem.model.network.g_s, cut(y_hat, tile.window, 1))
        x = cut(problem.x, tile.core, STRIDE)
        weights = None if problem.weights is None else cut(problem.weights, tile.core, STRIDE)
        # One more row and column on either side: the kernel reaches there.
        top, left = tile.corner(UNIT)
        v = F.pad(v, (1, 1, 1, 1))[:, :, top:, left:]
        sums.add(v, x, weights)
    return sums.quadratic(_area(tiles) / _area(tiles[::every]))


def _area(tiles: Sequence[Tile]) -> int:
    """Positions of y in the tiles."""
    return sum(
        (rows.stop - rows.start) * (columns.stop - columns.start)
        for rows, columns in (tile.core for tile in tiles)
    )


def _tiles(problem: Problem, y_hat: Tensor) -> Iterator[Tile]:
    size = y_hat.size(2), y_hat.size(3)
    if problem.model.halo is None:
        return tiles_of(size, max(size), 0)
    return tiles_of(size, SIDE, problem.model.halo)


class _Sums:
    """The sums over a picture that `Quadratic` consists of, for each of the four phases."""

    def __init__(self, last: LastLayer):
        channels = last.weight.size(0)
        self.kernel = phases_of(last.weight).flatten(1)  # [12, C * 9]
        self.bias = last.bias.repeat(4)[:, None]
        taps = channels * 9 + 1
        self.error = 0.0
        # One gram matrix serves all phases where all pixels count alike.
        self.gram = torch.zeros(4, taps, taps, dtype=torch.float64)
        self.slope = torch.zeros(12, taps, dtype=torch.float64)
        index = torch.arange(1, channels * 25 + 1, dtype=torch.float64).view(channels, 1, 5, 5)
        indexes = phases_of(index).flatten(1).long()  # [4, C * 9]; 0: no weight
        self.indexes = F.pad(indexes, (0, 1), value=channels * 25 + 1)

    def add(self, v: Tensor, x: Tensor, weights: Tensor | None) -> None:
        """Add a part of the picture.

        Args:
            v: [1, C, h + 2, w + 2] or more rows and columns, the last layer's input around x.
            x: [1, 3, H, W]; weights: [1, 1, H, W] or None.
        """
        height, width = x.size(2) // 2, x.size(3) // 2
        if not width:  # one column of half-covered positions
            return
        rows = max(1, COLUMNS // width)
        for first in range(0, height, rows):
            last = min(first + rows, height)
            patches = F.unfold(v[:, :, first : last + 2, : width + 2], 3)[0]  # [C * 9, n]
            pixels = slice(2 * first, 2 * last)
            target = _phases(x[:, :, pixels, : 2 * width])  # [12, n]
            error = target - (self.kernel @ patches + self.bias)
            self._add_rows(patches, error, None if weights is None
                           else _phases(weights[:, :, pixels, : 2 * width]))  # fmt: skip

    def _add_rows(self, patches: Tensor, error: Tensor, weights: Tensor | None) -> None:
        """patches [C * 9, n], error [12, n], weights [4, n]."""
        if weights is None:
            self.gram += _with_bias(_product_with_itself(patches), patches.sum(1), patches.size(1))
            weighted = error
        else:
            for gram, one in zip(self.gram, weights, strict=True):
                product = _product_with_itself(patches * one.sqrt())
                gram += _with_bias(product, patches @ one, float(one.sum()))
            weighted = error * weights.repeat_interleave(3, 0)
        self.slope[:, :-1] += (weighted @ patches.t()).double().cpu()
        self.slope[:, -1] += weighted.sum(1).double().cpu()
        self.error += float((weighted * error).double().sum())

    def quadratic(self, scale: float) -> Quadratic:
        """The sums of all phases, by the weights of the kernel, times `scale`."""
        size = int(self.indexes.max())
        gram = torch.zeros(size + 1, size + 1, dtype=torch.float64)
        slope = torch.zeros(size + 1, 3, dtype=torch.float64)
        for phase, index in enumerate(self.indexes):
            gram[index[:, None], index] += self.gram[phase]
            slope[index] += self.slope[3 * phase : 3 * phase + 3].t()
        return Quadratic(scale * self.error, scale * slope[1:], scale * gram[1:, 1:])


def _product_with_itself(rows: Tensor) -> Tensor:
    """rows @ rows^T, which must be exact: TF32 on a GPU is not.

    On a CPU numpy computes one half of it only, in a third of torch's time.
    """
    if rows.device.type != "cpu":
        return rows.double() @ rows.double().t()
    array = rows.numpy()
    return torch.from_numpy(array @ array.T)


def _with_bias(gram: Tensor, sums: Tensor, count: float) -> Tensor:
    """The gram matrix [K + 1, K + 1] of rows [K, n] and a row of ones, in float64 on the CPU.

    Args:
        gram: that of the rows; sums: of each row; count: the product of the ones with themselves.
    """
    padded = F.pad(gram.double().cpu(), (0, 1, 0, 1))
    padded[-1, :-1] = padded[:-1, -1] = sums.double().cpu()
    padded[-1, -1] = count
    return padded


def _phases(x: Tensor) -> Tensor:
    """The pixels of x [1, C', 2 h, 2 w] by phase and channel, [4 * C', h * w]."""
    height, width = x.size(2) // 2, x.size(3) // 2
    split = x[0].unflatten(2, (width, 2)).unflatten(1, (height, 2))  # [C', h, 2, w, 2]
    return split.permute(2, 4, 0, 1, 3).reshape(-1, height * width)
