"""CompressAI's range coder with checks, and the exceptions where float32 picks other tables."""

import numpy as np
import torch
from torch import Tensor

from coding.bitstream import BitstreamError
from common.compressai import EntropyModel


def encode(entropy_model: EntropyModel, symbols: Tensor, indexes: Tensor) -> bytes:
    """Code integer symbols, each with the table of its index; both [1, C, h, w]."""
    return EntropyModel.compress(entropy_model, symbols.float(), indexes)[0]


def decode(entropy_model: EntropyModel, string: bytes, indexes: Tensor) -> Tensor:
    """The symbols, int32 [1, C, h, w], of a string.

    CompressAI's decoder does not check where the string ends, so this function appends zeros. They
    must be long enough for any string that passes the checks below. A symbol takes less than 16
    bits. An escaped symbol also has a count of nibbles, and as many nibbles. A nibble of 15 extends
    the count by the next nibble, so many of them in a row make a huge count. Valid symbols are
    below 2^24 and need a count of at most 7. So the check refuses long runs of such nibbles.

    Args:
        indexes: the table of each symbol, int32 [1, C, h, w].

    Raises:
        BitstreamError: no encoder writes such a string.
    """
    words = np.frombuffer(string[: len(string) // 4 * 4], "<u4") == 0xFFFFFFFF
    if len(string) > 6 * indexes.numel() + 64 or (words[1:] & words[:-1]).any():
        raise BitstreamError("damaged: no encoder writes such a string")
    padded = string + bytes(4 * indexes.numel() + 2**16)
    return EntropyModel.decompress(entropy_model, [padded], indexes, torch.int32)


def list_exceptions(indexes: Tensor, wanted: Tensor) -> bytes:
    """The bytes that tell how `indexes` must change to become `wanted`, both [1, C, h, w].

    Each change of one index by 1 is one number: 2 * gap, plus 1 if the index decreases. The gap is
    the distance in symbols to the change before, in the order of the flat tensor. A number is
    written with seven bits in each byte, the low bits first. All its bytes but the last have the
    high bit set.
    """
    moves = (wanted - indexes).flatten().numpy()
    written, last = bytearray(), 0
    for symbol in np.flatnonzero(moves).tolist():
        for _ in range(abs(int(moves[symbol]))):
            number = 2 * (symbol - last) + int(moves[symbol] < 0)
            last = symbol
            while number >= 128:
                written.append(number & 127 | 128)
                number >>= 7
            written.append(number)
    return bytes(written)


def apply_exceptions(indexes: Tensor, exceptions: bytes, tables: int) -> None:
    """Change `indexes` in place, as the bytes of `list_exceptions` tell.

    Args:
        tables: the number of tables; an index must be below it.

    Raises:
        BitstreamError: an exception leads outside the image or the tables.
    """
    flat, symbol, number, shift = indexes.view(-1), 0, 0, 0
    for byte in exceptions:
        number |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            symbol += number >> 1
            if symbol >= len(flat):
                raise BitstreamError("damaged: an index exception lies outside the picture")
            flat[symbol] += -1 if number & 1 else 1
            number = shift = 0
    if shift or flat.min() < 0 or flat.max() >= tables:
        raise BitstreamError("damaged: its index exceptions make no sense")
