"""The bytes in a file that tell the decoder more than the latents: y's lattice, and small numbers.

The layout; the highest bit of a byte is its first:

- 8 bits: flags. 1: a lattice follows. 2: directions follow. 4 << kind: the group of this kind of
  KINDS follows. Other bits are 0. At least one is 1.
- 8 bits, if flagged: the code of the lattice's step, in two's complement; not 0.
- 16 bits, if flagged: which file of directions.
- for each flagged group, in the order of KINDS: 8 bits with the code of its step, then its values
  as in `coding.runs`.
- zeros up to a whole byte.

Directions are flagged if, and only if, the group "directions" is. The default adaptation has no
bytes at all; another has 2^20 at most.
"""

import math
import struct
from typing import NamedTuple

from coding.bitstream import BitstreamError, number_bytes
from coding.runs import BitReader, BitWriter, read_values, write_values

# What the numbers of a group are. Files have its place in this tuple, so the order must never
# change; there is room for six.
KINDS = ("directions", "last_layer")
ALONG_DIRECTIONS = KINDS.index("directions")
WORDS = ("factors of directions", "weights of the last layer")  # in the order of KINDS
LATTICES, STEPS = range(-128, 128), range(256)  # the codes of steps
STEP_OF_1 = 192  # the code of a group's step of 1
LATTICE_FLAG, DIRECTIONS_FLAG, FIRST_GROUP = 1, 2, 4
MOST_BYTES = 2**20  # so that forged files cannot take the decoder long


class Numbers(NamedTuple):
    """The quantised numbers of one group; a number is its value times the step.

    kind: place in KINDS. step: code of the step, 0 to 255. values: integers of up to +-2^15, at
    most 2^20 of them. A file has no zeros at their end, so whoever reads them appends these.
    """

    kind: int
    step: int
    values: tuple[int, ...] = ()

    @property
    def step_size(self) -> float:
        """The quantisation step: 2^((step - 192) / 4)."""
        return _power_of_2((self.step - STEP_OF_1) / 4)


class Adaptation(NamedTuple):
    """What the decoder is told beside the latents.

    lattice: code of the step of y's lattice, -128 to 127; 0 is the step 1, the integers.
    directions: two bytes that identify the file of directions; none without that group.
    groups: at most one of each kind, in the order of KINDS.
    """

    lattice: int = 0
    directions: bytes = b""
    groups: tuple[Numbers, ...] = ()

    @property
    def lattice_step(self) -> float:
        """The step of y's lattice: 2^(lattice / 16)."""
        return _power_of_2(self.lattice / 16)


NOTHING = Adaptation()


def _power_of_2(exponent: float) -> float:
    """2^exponent, rounded to float32: the last bits of a power differ between machines."""
    (power,) = struct.unpack("<f", struct.pack("<f", 2**exponent))
    return float(power)


def lattice_code(step: float) -> int:
    """The code of the lattice whose step is nearest to this one (in its logarithm).

    Raises:
        ValueError: no code is near: the step is not between 2^-8 and 2^7.94.
    """
    return _nearest(step, 16, LATTICES, 0)


def step_code(step: float) -> int:
    """The code of a group's quantisation step that is nearest to this one (in its logarithm).

    Raises:
        ValueError: no code is near: the step is not between 2^-48 and 2^15.75.
    """
    return _nearest(step, 4, STEPS, STEP_OF_1)


def _nearest(step: float, codes_per_octave: int, codes: range, code_of_1: int) -> int:
    if 0 < step < math.inf:
        code = round(codes_per_octave * math.log2(step)) + code_of_1
        if code in codes:
            return code
    low, high = (2 ** ((code - code_of_1) / codes_per_octave) for code in (codes[0], codes[-1]))
    raise ValueError(f"a step of {step:g}: from {low:g} to {high:g} can be coded")


def in_words(adaptation: Adaptation) -> str:
    """What the decoder is told: the lattice, and how many numbers of each group are not 0."""
    counts = {group.kind: sum(map(bool, group.values)) for group in adaptation.groups}
    numbers = (f"{counts.get(kind, 0)} {words}" for kind, words in enumerate(WORDS))
    return ", ".join((f"lattice {adaptation.lattice_step:.4f}", *numbers))


# --- bytes ----------------------------------------------------------------------------------------


def bits(adaptation: Adaptation) -> int:
    """How many bits a file with the adaptation has more: its bytes, and their length before them.

    Raises:
        BitstreamError: see `to_bytes`.
    """
    count = len(to_bytes(adaptation))
    return 8 * (count + len(number_bytes(count))) if count else 0


def to_bytes(adaptation: Adaptation) -> bytes:
    """The bytes of an adaptation; none for the default one. Zeros at the end of values are dropped.

    Raises:
        BitstreamError: a field is not as its class says, or there are more than 2^20 bytes.
    """
    if adaptation == NOTHING:
        return b""
    _check(adaptation)
    writer = BitWriter()
    flags = LATTICE_FLAG * (adaptation.lattice != 0) | DIRECTIONS_FLAG * (
        adaptation.directions != b""
    )
    writer.put(flags | sum(FIRST_GROUP << group.kind for group in adaptation.groups), 8)
    if adaptation.lattice:
        writer.put(adaptation.lattice & 255, 8)
    for byte in adaptation.directions:
        writer.put(byte, 8)
    for group in adaptation.groups:
        writer.put(group.step, 8)
        write_values(writer, group.values)
    data = writer.to_bytes()
    if len(data) > MOST_BYTES:
        raise BitstreamError(
            f"an adaptation of {len(data)} bytes: at most {MOST_BYTES} can be coded"
        )
    return data


def from_bytes(data: bytes) -> Adaptation:
    """The adaptation of these bytes.

    Raises:
        BitstreamError: they are damaged, or of an adaptation that this code does not know.
    """
    if not data:
        return NOTHING
    if len(data) > MOST_BYTES:
        raise BitstreamError("damaged: its adaptation is too long")
    reader = BitReader(data)
    flags = reader.take(8)
    if flags >= FIRST_GROUP << len(KINDS):
        raise BitstreamError(f"its adaptation has flags {flags}, which this code does not know")
    lattice = reader.take(8) if flags & LATTICE_FLAG else 0
    directions = reader.take(16).to_bytes(2, "big") if flags & DIRECTIONS_FLAG else b""
    groups = tuple(
        Numbers(kind, reader.take(8), read_values(reader))
        for kind in range(len(KINDS))
        if flags & FIRST_GROUP << kind
    )
    reader.check_end()
    if flags == 0 or (flags & LATTICE_FLAG and lattice == 0):
        raise BitstreamError("damaged: its adaptation has an empty field")
    told = Adaptation(lattice - 256 * (lattice > 127), directions, groups)
    if not _directions_fit(told):
        raise BitstreamError("damaged: its adaptation does not say which directions it needs")
    return told


def _check(adaptation: Adaptation) -> None:
    kinds = [group.kind for group in adaptation.groups]
    if adaptation.lattice not in LATTICES:
        raise BitstreamError(f"lattice {adaptation.lattice} of an adaptation: from -128 to 127")
    if len(adaptation.directions) not in (0, 2):
        raise BitstreamError(f"directions of {len(adaptation.directions)} bytes: 0 or 2 are right")
    if kinds != sorted(set(kinds) & set(range(len(KINDS)))):
        raise BitstreamError(
            f"groups of kinds {kinds}: each at most once, in order, below {len(KINDS)}"
        )
    for group in adaptation.groups:
        if group.step not in STEPS:
            raise BitstreamError(f"step {group.step} of an adaptation: from 0 to 255")
    if not _directions_fit(adaptation):
        raise BitstreamError(
            "an adaptation needs both its directions' two bytes and their group, or neither"
        )


def _directions_fit(adaptation: Adaptation) -> bool:
    """Whether the file of directions is named if, and only if, there are factors of them."""
    needed = any(group.kind == ALONG_DIRECTIONS for group in adaptation.groups)
    return needed == bool(adaptation.directions)
