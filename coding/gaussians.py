"""Codes symbols whose Gaussians depend on the symbols before, with constriction's range coder."""

import struct
from typing import Any

import numpy as np
import torch
from torch import Tensor

from architectures.walk import Shape, TurnDistribution
from coding.bitstream import BitstreamError
from common.optional_packages import import_package

START = struct.Struct("<2i")  # the smallest and the largest symbol
WIDEST = 2**22  # of this many symbols each has a probability of at least 2^-24
# Means and scales are rounded to multiples of this: another processor's last bits do not matter.
GRID = 2.0**-12


def encode_in_turn(distribution: TurnDistribution, symbols: Tensor) -> bytes:
    """Code integer symbols [1, C, h, w].

    The decoder's own walk gives the Gaussians, so that both have the same last bits.

    Raises:
        BitstreamError: the symbols or the Gaussians are too far apart for the coder.
    """
    table = symbols[0].flatten(1).t()  # [h w, C]
    lowest, highest = int(symbols.min()), int(symbols.max())
    if highest - lowest >= WIDEST:
        raise BitstreamError(f"symbols from {lowest} to {highest}: these are too far apart")
    parts: list[tuple[np.ndarray, ...]] = []

    def symbols_at(positions: Tensor, scales: Tensor, means: Tensor) -> Tensor:
        here = table[positions]
        parts.append((here.flatten().numpy().astype(np.int32), *_on_grid(scales, means)))
        return here

    _, channels, height, width = symbols.shape
    distribution.in_turn((1, channels, height, width), symbols_at)
    coder = _constriction().queue.RangeEncoder()
    values, scales, means = (np.concatenate(column) for column in zip(*parts, strict=True))
    coder.encode(values, _model(lowest, highest), means, scales)
    return START.pack(lowest, highest) + coder.get_compressed().astype("<u4").tobytes()


def decode_in_turn(distribution: TurnDistribution, string: bytes, shape: Shape) -> Tensor:
    """The symbols, int32 [1, C, h, w], of a string.

    Raises:
        BitstreamError: no encoder writes such a string.
    """
    if len(string) < START.size or (len(string) - START.size) % 4:
        raise BitstreamError("damaged: no encoder writes such a string")
    lowest, highest = START.unpack_from(string)
    if not 0 <= highest - lowest < WIDEST:
        raise BitstreamError("damaged: no encoder writes such a string")
    words = np.frombuffer(string, "<u4", offset=START.size).astype(np.uint32)
    coder, model = _constriction().queue.RangeDecoder(words), _model(lowest, highest)

    def symbols_at(positions: Tensor, scales: Tensor, means: Tensor) -> Tensor:
        rounded_scales, rounded_means = _on_grid(scales, means)
        try:
            values = coder.decode(model, rounded_means, rounded_scales)
        except AssertionError:  # constriction's error for data that no encoder writes
            raise BitstreamError("damaged: no encoder writes such a string") from None
        return torch.from_numpy(values).view(scales.shape)

    symbols = distribution.in_turn(shape, symbols_at)
    if not coder.maybe_exhausted():
        raise BitstreamError("damaged: its string has more symbols than the picture")
    return symbols


def _on_grid(scales: Tensor, means: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Scales and means on the grid, flat.

    Raises:
        BitstreamError: they are not finite, or too large for a Gaussian of integers.
    """
    if not bool((scales < 2**20).all() and (means.abs() < 2**30).all()):
        raise BitstreamError("its Gaussians are not finite: these are no latents of a picture")
    scales, means = ((v.double() / GRID).round() * GRID for v in (scales, means))
    return scales.flatten().numpy(), means.flatten().numpy()


def _model(lowest: int, highest: int) -> Any:
    """A Gaussian over the integers from `lowest` to `highest`, which must be two at least."""
    model = _constriction().model
    return model.QuantizedGaussian(lowest, max(highest, lowest + 1))


def _constriction() -> Any:
    return import_package("constriction", "files of autoregressive models", "refine").stream
