"""The layout of a file: a header, then for each group of symbols its string and its exceptions.

A file may also tell the decoder more than the latents; these bytes, its adaptation, are the last.
`coding.payload` writes and reads them.

Version 1, which can still be read, is for the mean-scale hyperprior alone.
"""

import struct
import zlib
from pathlib import Path
from typing import Annotated, NamedTuple

from common.errors import InputError
from common.limits import MAX_PIXELS

MAGIC, VERSION, SUFFIX = b"OLC", 2, ".olc"
# A file has the number of its model's family in this list, so the order must never change. Another
# family has number 255 and its name. A file with an adaptation has 128 more, or 254 for another
# family, so code that knows no adaptations refuses it. There is room for 126 families.
FAMILIES = (
    "mbt2018-mean", "bmshj2018-factorized", "bmshj2018-factorized-relu", "bmshj2018-hyperprior",
    "mbt2018", "cheng2020-anchor", "cheng2020-attn", "cheng2020-anchor-checkerboard",
    "elic2022-official", "elic2022-chandelier",
)  # fmt: skip
UNLISTED, ADAPTED, ADAPTED_UNLISTED = 255, 128, 254
MOST_GROUPS = 255


class Fixed(NamedTuple):
    """How a file begins; each field has its type as in Python's struct (little-endian)."""

    magic: Annotated[bytes, "3s"]  # OLC
    version: Annotated[int, "B"]  # of this layout: 2
    height: Annotated[int, "I"]  # of the picture, pixels
    width: Annotated[int, "I"]  # of the picture, pixels
    weights: Annotated[bytes, "4s"]  # start of the weights' SHA-256
    tables: Annotated[int, "I"]  # CRC-32 of the coders' tables, see `build_coder`
    symbols: Annotated[int, "I"]  # CRC-32 of height, width and all symbols, see `coding.coder`
    file: Annotated[int, "I"]  # CRC-32 of the whole file, with zeros for this field
    # Number in FAMILIES, plus 128 if there is an adaptation. 255, or 254 if there is an adaptation:
    # the name follows, its length first.
    family: Annotated[int, "B"]
    # Number of groups. Two lengths for each follow, then the adaptation's length if there is one.
    groups: Annotated[int, "B"]


class FixedOfVersion1(NamedTuple):
    """How a file of version 1 begins."""

    magic: Annotated[bytes, "3s"]
    version: Annotated[int, "B"]
    height: Annotated[int, "I"]
    width: Annotated[int, "I"]
    N: Annotated[int, "H"]
    M: Annotated[int, "H"]
    weights: Annotated[bytes, "4s"]
    tables: Annotated[int, "I"]
    z_bytes: Annotated[int, "I"]  # length of the string of z
    exception_bytes: Annotated[int, "H"]  # length of y's exceptions; y's string is last
    symbols: Annotated[int, "I"]
    file: Annotated[int, "I"]


def _layout(fields: type[NamedTuple]) -> struct.Struct:
    kinds = fields.__annotations__.values()
    return struct.Struct("<" + "".join(kind.__metadata__[0] for kind in kinds))


LAYOUT, LAYOUT_1 = _layout(Fixed), _layout(FixedOfVersion1)


class BitstreamError(InputError):
    """A file cannot be decoded exactly, or latents cannot be coded; the message says why."""


class CodedGroup(NamedTuple):
    """A group of symbols in a file: its string, and where float32 chose other tables."""

    string: bytes
    exceptions: bytes = b""


class Bitstream(NamedTuple):
    """A file: its picture's size in pixels, what it was made with, and its groups in coding order.

    family: the name of the model's family. weights, tables, symbols: see `Fixed`. version: of the
    layout. adaptation: bytes of `coding.payload`, which are not checked here; none in most
    files.
    """

    height: int
    width: int
    family: str
    weights: bytes
    tables: int
    symbols: int
    groups: tuple[CodedGroup, ...]
    version: int = VERSION
    adaptation: bytes = b""

    @property
    def size(self) -> tuple[int, int]:
        """H, W of the picture."""
        return self.height, self.width


# --- reading --------------------------------------------------------------------------------------


def read_bitstream(data: bytes) -> Bitstream:
    """The contents of a file, after all checks that need no weights.

    CompressAI's `decompress` takes the strings as `[[string of y], ..., [string of z]]`; here z's
    group, if there is a z, is the first.

    Raises:
        BitstreamError: not a file of this codec, another version, truncated or damaged.
    """
    if data[: len(MAGIC)] != MAGIC[: len(data)] or not data:
        raise BitstreamError(f"no file of this codec (they start with {MAGIC.decode()})")
    version = data[len(MAGIC)] if len(data) > len(MAGIC) else VERSION
    layout = {1: LAYOUT_1, VERSION: LAYOUT}.get(version)
    if layout is None:
        raise BitstreamError(f"of version {version}: this code reads versions 1 and {VERSION}")
    if len(data) < layout.size:
        raise BitstreamError(f"truncated: {len(data)} bytes, the header alone has {layout.size}")
    body = data[layout.size :]
    read = _read_version_1 if version == 1 else _read_version_2
    bitstream = read(layout.unpack_from(data), body)
    check_size(bitstream.height, bitstream.width)
    return bitstream


def _read_version_1(fields: tuple, body: bytes) -> Bitstream:
    fixed = FixedOfVersion1(*fields)
    _check_file(LAYOUT_1.pack(*fixed._replace(file=0)), body, fixed.file)
    z_end = fixed.z_bytes
    y_start = z_end + fixed.exception_bytes
    if y_start > len(body):
        raise BitstreamError(f"damaged: strings of {y_start} bytes in {len(body)}")
    groups = CodedGroup(body[:z_end]), CodedGroup(body[y_start:], body[z_end:y_start])
    return Bitstream(fixed.height, fixed.width, FAMILIES[0], fixed.weights, fixed.tables,
                     fixed.symbols, groups, version=1)  # fmt: skip


def _read_version_2(fields: tuple, body: bytes) -> Bitstream:
    fixed = Fixed(*fields)
    _check_file(LAYOUT.pack(*fixed._replace(file=0)), body, fixed.file)
    reader = _Bytes(body)
    adapted = ADAPTED <= fixed.family < UNLISTED
    family = _read_family(reader, fixed.family)
    lengths = [(reader.number(), reader.number()) for _ in range(fixed.groups)]
    adaptation_bytes = reader.number() if adapted else 0
    groups = tuple(CodedGroup(*map(reader.take, pair)) for pair in lengths)
    adaptation = reader.take(adaptation_bytes)
    if reader.left:
        raise BitstreamError(f"damaged: {reader.left} bytes more than its strings have")
    return Bitstream(fixed.height, fixed.width, family, fixed.weights, fixed.tables,
                     fixed.symbols, groups, adaptation=adaptation)  # fmt: skip


def _read_family(reader: "_Bytes", number: int) -> str:
    """The family's name; see `Fixed.family`."""
    if number in (UNLISTED, ADAPTED_UNLISTED):
        return reader.take(reader.number()).decode("utf-8", "replace")
    if number % ADAPTED < len(FAMILIES):
        return FAMILIES[number % ADAPTED]
    raise BitstreamError(f"of family {number}, which this code does not know")


class _Bytes:
    """Reads numbers and strings from bytes, one after the other."""

    def __init__(self, data: bytes):
        self.data, self.position = data, 0

    @property
    def left(self) -> int:
        """How many bytes are left."""
        return len(self.data) - self.position

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        if count > self.left:
            raise BitstreamError(f"damaged: strings of {count} bytes in {self.left}")
        self.position += count
        return self.data[self.position - count : self.position]

    def number(self) -> int:
        """A number of up to 35 bits, seven in each byte, the low ones first."""
        value = 0
        for shift in range(0, 35, 7):
            (byte,) = self.take(1)
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise BitstreamError("damaged: its lengths make no sense")


def check_size(height: int, width: int) -> None:
    """Refuse an image size that the format does not allow.

    Raises:
        BitstreamError: the image has no pixel, or too many.
    """
    if min(height, width) < 1 or height * width > MAX_PIXELS:
        raise BitstreamError(f"{width}x{height} pixels: from 1 to {MAX_PIXELS} can be coded")


def _check_file(start: bytes, body: bytes, checksum: int) -> None:
    if zlib.crc32(body, zlib.crc32(start)) != checksum:
        raise BitstreamError("truncated or damaged: its checksum does not match its bytes")


def read_file(path: Path) -> bytes:
    """The bytes of a file; only the first ones if it is not a file of this codec.

    Raises:
        BitstreamError: the file is longer than any of a picture of its size.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        start = file.read(LAYOUT_1.size)
        if len(start) < LAYOUT_1.size or not start.startswith(MAGIC):
            return start
        height, width = struct.unpack_from("<2I", start, len(MAGIC) + 1)
        # 32 bytes a pixel are six a symbol and more, with 1,000 channels of y.
        if path.stat().st_size > 32 * min(height * width, MAX_PIXELS) + 2**20:
            raise BitstreamError("damaged: longer than any file of a picture of its size")
        return start + file.read()


# --- writing --------------------------------------------------------------------------------------


def write_bitstream(bitstream: Bitstream) -> bytes:
    """The bytes of a file of the newest version.

    Raises:
        BitstreamError: there are more than 255 groups.
    """
    if len(bitstream.groups) > MOST_GROUPS:
        raise BitstreamError(f"{len(bitstream.groups)} groups: a file has {MOST_GROUPS} at most")
    family, body = _write_family(bitstream.family, adapted=bitstream.adaptation != b"")
    for part in bitstream.groups:
        body += number_bytes(len(part.string)) + number_bytes(len(part.exceptions))
    if bitstream.adaptation:
        body += number_bytes(len(bitstream.adaptation))
    body += b"".join(part.string + part.exceptions for part in bitstream.groups)
    body += bitstream.adaptation
    fixed = Fixed(
        MAGIC, VERSION, bitstream.height, bitstream.width, bitstream.weights, bitstream.tables,
        bitstream.symbols, 0, family, len(bitstream.groups),
    )  # fmt: skip
    checksum = zlib.crc32(body, zlib.crc32(LAYOUT.pack(*fixed)))
    return LAYOUT.pack(*fixed._replace(file=checksum)) + body


def _write_family(family: str, adapted: bool) -> tuple[int, bytes]:
    """The family's number, and its name with the length first if no number of FAMILIES tells it."""
    if family in FAMILIES:
        return FAMILIES.index(family) + ADAPTED * adapted, b""
    name = family.encode()
    return ADAPTED_UNLISTED if adapted else UNLISTED, number_bytes(len(name)) + name


def number_bytes(value: int) -> bytes:
    """A number, 0 to 2^35 - 1, as files have it: seven bits in each byte, the low ones first."""
    written = bytearray()
    while value >= 128:
        written.append(value & 127 | 128)
        value >>= 7
    written.append(value)
    return bytes(written)
