"""The layout of a file: a header, the string of z, the index exceptions, the string of y."""

import struct
import zlib
from pathlib import Path
from typing import Annotated, NamedTuple

from common.errors import InputError
from common.limits import MAX_PIXELS

MAGIC, VERSION, SUFFIX = b"OLC", 1, ".olc"


class Header(NamedTuple):
    """What a file begins with; each field has its type as in Python's struct (little-endian)."""

    magic: Annotated[bytes, "3s"]  # OLC
    version: Annotated[int, "B"]  # of this layout: 1
    height: Annotated[int, "I"]  # of the picture, pixels
    width: Annotated[int, "I"]  # of the picture, pixels
    N: Annotated[int, "H"]  # channels of z
    M: Annotated[int, "H"]  # channels of y
    weights: Annotated[bytes, "4s"]  # start of the weights' SHA-256
    tables: Annotated[int, "I"]  # CRC-32 of the coders' tables, see `build_coder`
    z_bytes: Annotated[int, "I"]  # length of the string of z, which follows the header
    exception_bytes: Annotated[int, "H"]  # length of the index exceptions; y's string is last
    symbols: Annotated[int, "I"]  # CRC-32 of height, width, z and y, little-endian int32, by row
    file: Annotated[int, "I"]  # CRC-32 of the whole file, with zeros for this field


LAYOUT = struct.Struct(
    "<" + "".join(kind.__metadata__[0] for kind in Header.__annotations__.values())
)


class BitstreamError(InputError):
    """A file cannot be decoded exactly, or latents cannot be coded; the message says why."""


class Bitstream(NamedTuple):
    """The parts of a file: its header and three byte strings."""

    header: Header
    z_string: bytes
    exceptions: bytes
    y_string: bytes


def read_bitstream(data: bytes) -> Bitstream:
    """The header and the strings of a file, after all checks that need no weights.

    CompressAI's `decompress` takes the strings as `[[y_string], [z_string]]`.

    Raises:
        BitstreamError: not a file of this codec, another version, truncated or damaged.
    """
    if data[: len(MAGIC)] != MAGIC[: len(data)] or not data:
        raise BitstreamError(f"no file of this codec (they start with {MAGIC.decode()})")
    if len(data) < LAYOUT.size:
        raise BitstreamError(f"truncated: {len(data)} bytes, the header alone has {LAYOUT.size}")
    header = Header(*LAYOUT.unpack_from(data))
    if header.version != VERSION:
        raise BitstreamError(f"of version {header.version}: this code reads version {VERSION}")
    body = data[LAYOUT.size :]
    if header.file != _checksum_of(header, body):
        raise BitstreamError("truncated or damaged: its checksum does not match its bytes")
    z_end = header.z_bytes
    y_start = z_end + header.exception_bytes
    if y_start > len(body):
        raise BitstreamError(f"damaged: strings of {y_start} bytes in {len(body)}")
    check_size(header.height, header.width)
    return Bitstream(header, body[:z_end], body[z_end:y_start], body[y_start:])


def check_size(height: int, width: int) -> None:
    """Refuse an image size that the format does not allow.

    Raises:
        BitstreamError: the image has no pixel, or too many.
    """
    if min(height, width) < 1 or height * width > MAX_PIXELS:
        raise BitstreamError(f"{width}x{height} pixels: from 1 to {MAX_PIXELS} can be coded")


def write_bitstream(header: Header, strings: bytes) -> bytes:
    """The bytes of a file: the header, with its checksum `file` set here, then the strings."""
    return LAYOUT.pack(*header._replace(file=_checksum_of(header, strings))) + strings


def _checksum_of(header: Header, strings: bytes) -> int:
    return zlib.crc32(strings, zlib.crc32(LAYOUT.pack(*header._replace(file=0))))


def read_file(path: Path) -> bytes:
    """The bytes of a file; only the first ones if it is not a file of this codec.

    Raises:
        BitstreamError: the file is longer than its header allows.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        start = file.read(LAYOUT.size)
        if len(start) == LAYOUT.size and start.startswith(MAGIC):
            if path.stat().st_size > _longest(Header(*LAYOUT.unpack(start))):
                raise BitstreamError("damaged: longer than any file of a picture of its size")
            return start + file.read()
    return start


def _longest(header: Header) -> int:
    """The largest size in bytes of a file with this header: six bytes a symbol, plus 128 kB."""
    positions = {side: -(-header.height // side) * -(-header.width // side) for side in (16, 64)}
    symbols = header.M * positions[16] + header.N * positions[64]
    return LAYOUT.size + 6 * symbols + 2**17
