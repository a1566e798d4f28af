"""CompressAI's range coder, guarded; and which tables differ between float32 and float64."""

import numpy as np
import torch
from torch import Tensor

from coding.bitstream import BitstreamError
from common.compressai import EntropyModel


def encode(entropy_model: EntropyModel, symbols: Tensor, indexes: Tensor) -> bytes:
    """The string of integer symbols, each coded with the table of its index; both [1, C, h, w]."""
    return EntropyModel.compress(entropy_model, symbols.float(), indexes)[0]


def decode(entropy_model: EntropyModel, string: bytes, indexes: Tensor) -> Tensor:
    """The symbols, int32 [1, C, h, w], of a string.

    CompressAI's decoder checks no end: behind the string it reads on in the zeros put there. A
    symbol costs it less than 16 bits, an escaped one four more, and as many as these count up: a
    nibble of 15 means at least as many nibbles, and that the next counts too. Honest symbols, below
    2^24, count to 7. So few nibbles of 15 can follow each other that it stays inside the zeros.

    Raises:
        BitstreamError: no encoder writes such a string.
    """
    words = np.frombuffer(string[: len(string) // 4 * 4], "<u4") == 0xFFFFFFFF
    if len(string) > 6 * indexes.numel() + 64 or (words[1:] & words[:-1]).any():
        raise BitstreamError("damaged: no encoder writes such a string")
    padded = string + bytes(4 * indexes.numel() + 2**16)
    return EntropyModel.decompress(entropy_model, [padded], indexes, torch.int32)


def list_exceptions(indexes: Tensor, wanted: Tensor) -> bytes:
    """One number for each step by which an index must move: 2 * gap, plus 1 if it moves down.

    The gap counts positions since the last such number, row by row. Numbers are written seven bits
    a byte, the low ones first, the high bit on all but the last byte.
    """
    moves = (wanted - indexes).flatten().numpy()
    written, last = bytearray(), 0
    for position in np.flatnonzero(moves).tolist():
        for _ in range(abs(int(moves[position]))):
            number = 2 * (position - last) + int(moves[position] < 0)
            last = position
            while number >= 128:
                written.append(number & 127 | 128)
                number >>= 7
            written.append(number)
    return bytes(written)


def apply_exceptions(indexes: Tensor, exceptions: bytes, tables: int) -> None:
    """Move indexes, in place, as `list_exceptions` wrote; there are so many tables.

    Raises:
        BitstreamError: they lead outside the picture or the tables.
    """
    flat, position, number, shift = indexes.view(-1), 0, 0, 0
    for byte in exceptions:
        number |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            position += number >> 1
            if position >= len(flat):
                raise BitstreamError("damaged: an index exception lies outside the picture")
            flat[position] += -1 if number & 1 else 1
            number = shift = 0
    if shift or flat.min() < 0 or flat.max() >= tables:
        raise BitstreamError("damaged: its index exceptions make no sense")
