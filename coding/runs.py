"""Small integers, many of them zeros, as few bits: runs of equal flags in Golomb-Rice codes.

Golomb, "Run-length encodings", IEEE Transactions on Information Theory, 1966. Rice and Plaunt,
"Adaptive variable-length coding for efficient compression of spacecraft television data", IEEE
Transactions on Communication Technology, 1971.

The highest bit of a byte is its first. Zeros behind the last nonzero value are dropped. The bits of
values of which n are not zero:

1. n, three bits at a time, the low ones first. A bit before each three says if three more follow.
   Nothing more is written if n is 0.
2. A row of n counts: how many zeros lie between the nonzero value before and this one.
3. A row of n counts: the magnitude of each nonzero value, less 1.
4. n bits: 1 if the nonzero value is negative.

A row of n counts begins with a number c of four bits. Think of each count as so many flags "no",
and then one flag "yes".

- c <= 9: the counts follow, in the Golomb-Rice code of parameter c. It is short if "no" is
  frequent.
- c >= 10: the lengths of the runs of "yes" follow: one before each "no", which may be 0, and one
  behind the last "no". They are in the Golomb-Rice code of parameter c - 9. The row ends when its
  runs have n "yes". It has fewer "no" than n. It is short if "yes" is frequent.

The Golomb-Rice code of parameter k of a number: number >> k zeros, a one, the k low bits of it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from coding.bitstream import BitstreamError

LONGEST, LARGEST = 2**20, 2**15  # number of values up to the last nonzero one; magnitude
# The parameters of the code of counts, and of the code of runs; with 0 both are alike.
OF_COUNTS, OF_RUNS = range(10), range(1, 7)


class BitWriter:
    """Collects bits, as text of zeros and ones."""

    def __init__(self) -> None:
        self.parts: list[str] = []

    def put(self, number: int, bits: int) -> None:
        """A number in so many bits, the high ones first."""
        if bits:
            self.parts.append(f"{number:0{bits}b}")

    def put_short(self, number: int) -> None:
        """A number in groups of four bits; see the text at the top of this file."""
        while number >= 8:
            self.put(8 | number & 7, 4)
            number >>= 3
        self.put(number, 4)

    def put_rice(self, number: int, k: int) -> None:
        """A number in the Golomb-Rice code of parameter k."""
        self.parts.append("0" * (number >> k) + "1")
        self.put(number & (1 << k) - 1, k)

    def to_bytes(self) -> bytes:
        """All bits, and up to seven zeros that fill the last byte."""
        text = "".join(self.parts)
        count = -(-len(text) // 8)
        return int(text.ljust(8 * count, "0") or "0", 2).to_bytes(count, "big")


class BitReader:
    """Reads what `BitWriter` writes. Each method raises BitstreamError where the bits end early."""

    def __init__(self, data: bytes):
        self.text = f"{int.from_bytes(data, 'big'):0{8 * len(data)}b}" if data else ""
        self.position = 0

    @property
    def left(self) -> int:
        """How many bits are left."""
        return len(self.text) - self.position

    def take(self, bits: int) -> int:
        """The number in the next bits, the high ones first."""
        self.position += bits
        if self.position > len(self.text):
            raise BitstreamError("damaged: its adaptation ends too early")
        return int(self.text[self.position - bits : self.position] or "0", 2)

    def take_short(self) -> int:
        """A number of `put_short`, of up to 21 bits."""
        number = 0
        for shift in range(0, 21, 3):
            group = self.take(4)
            number |= (group & 7) << shift
            if group < 8:
                return number
        raise BitstreamError("damaged: the counts of its adaptation make no sense")

    def take_rice(self, k: int) -> int:
        """A number of `put_rice`."""
        zeros = self.text.find("1", self.position) - self.position
        if zeros < 0:
            raise BitstreamError("damaged: its adaptation ends too early")
        self.position += zeros + 1
        return zeros << k | self.take(k)

    def check_end(self) -> None:
        """Refuse anything but the zeros that fill the last byte."""
        rest = self.text[self.position :]
        if len(rest) > 7 or "1" in rest:
            raise BitstreamError("damaged: bits follow the end of its adaptation")


# --- values ---------------------------------------------------------------------------------------


def cost_in_bits(values: Sequence[int] | np.ndarray) -> int:
    """How many bits `write_values` writes for these integers, [n]; their range is not checked."""
    rows = _rows(np.asarray(values, np.int64))
    if not rows:
        return 4
    count = len(rows[0])
    short = 4 * max(1, -(-count.bit_length() // 3))
    return short + sum(4 + _cheapest(row).bits for row in rows) + count


def write_values(writer: BitWriter, values: Sequence[int] | np.ndarray) -> None:
    """Write integers, [n], without the zeros behind the last nonzero value.

    Raises:
        BitstreamError: there are more than 2^20 values, or a magnitude is above 2^15.
    """
    integers = np.asarray(values, np.int64)
    largest = np.abs(integers).max(initial=0)
    if len(integers) > LONGEST or largest > LARGEST:
        raise BitstreamError(
            f"an adaptation of {len(integers)} values, magnitudes up to {largest}: at most "
            f"{LONGEST} values and magnitudes of {LARGEST} can be coded"
        )
    rows = _rows(integers)
    writer.put_short(len(rows[0]) if rows else 0)
    for row in rows:
        code = _cheapest(row)
        writer.put(code.number, 4)
        for length in code.lengths.tolist():
            writer.put_rice(length, code.k)
    for value in integers[integers != 0].tolist():
        writer.put(int(value < 0), 1)


def read_values(reader: BitReader) -> tuple[int, ...]:
    """The integers of `write_values`; the last one, if there is any, is not zero.

    Raises:
        BitstreamError: the bits end early, or there are too many values, or too large ones.
    """
    count = reader.take_short()
    if count == 0:
        return ()
    zeros = _read_row(reader, count, LONGEST)
    if count + sum(zeros) > LONGEST:
        raise BitstreamError(f"damaged: its adaptation has more than {LONGEST} values")
    magnitudes = [less + 1 for less in _read_row(reader, count, LARGEST - 1)]
    values = np.zeros(count + sum(zeros), np.int64)
    signs = [1 - 2 * int(bit) for bit in f"{reader.take(count):0{count}b}"]
    values[np.cumsum(np.array(zeros) + 1) - 1] = np.array(magnitudes) * signs
    return tuple(values.tolist())


# --- rows of counts -------------------------------------------------------------------------------


class _Code(NamedTuple):
    """The shortest code of a row: the four bits before it, and its lengths with their parameter."""

    bits: int  # of the lengths alone
    number: int  # c in the text at the top of this file
    k: int
    lengths: np.ndarray


def _rows(values: np.ndarray) -> list[np.ndarray]:
    """How many zeros are before each nonzero value, and its magnitude - 1; nothing if all are 0."""
    (positions,) = values.nonzero()
    if not len(positions):
        return []
    zeros = positions.copy()
    zeros[1:] -= positions[:-1] + 1
    return [zeros, np.abs(values[positions]) - 1]


def _cheapest(counts: np.ndarray) -> _Code:
    bits, k = _shortest(counts, OF_COUNTS)
    code = _Code(bits, k, k, counts)
    # With as many "no" as "yes", runs of "yes" are never shorter than parameter 0 for the counts.
    if counts.sum() < len(counts):
        runs = np.diff(np.arange(len(counts)).repeat(counts), prepend=0, append=len(counts))
        bits, k = _shortest(runs, OF_RUNS)
        if bits < code.bits:
            code = _Code(bits, OF_COUNTS.stop - 1 + k, k, runs)
    return code


def _shortest(lengths: np.ndarray, parameters: range) -> tuple[int, int]:
    """The fewest bits of a Golomb-Rice code of these lengths, and its parameter."""
    # A parameter with more bits than the largest length is never better.
    most = max(parameters.start, min(parameters[-1], int(lengths.max()).bit_length()))
    return min(
        (int((lengths >> k).sum()) + (k + 1) * len(lengths), k)
        for k in range(parameters.start, most + 1)
    )


def _read_row(reader: BitReader, count: int, most: int) -> list[int]:
    """A row of so many counts, each of at most `most`."""
    if count > LONGEST:
        raise BitstreamError(f"damaged: its adaptation has more than {LONGEST} values")
    if count > reader.left:  # each nonzero value takes a bit for its sign alone
        raise BitstreamError("damaged: its adaptation ends too early")
    number = reader.take(4)
    if number in OF_COUNTS:
        counts = [reader.take_rice(number) for _ in range(count)]
    else:
        counts, yes = [0] * count, 0
        for _ in range(count):  # as there are fewer "no" than `count`, see `_cheapest`
            yes += reader.take_rice(number - OF_COUNTS.stop + 1)
            if yes >= count:
                break
            counts[yes] += 1
        if yes != count:
            raise BitstreamError("damaged: the counts of its adaptation make no sense")
    if max(counts) > most:
        raise BitstreamError("damaged: its adaptation has numbers beyond their range")
    return counts
