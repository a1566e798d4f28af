"""Image files of every kind become upright RGB pictures of 8 bits, in sRGB."""

import io
import struct
import warnings
import zlib
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pillow_heif
from PIL import Image, ImageOps

from common.colour import to_srgb
from common.console import native_stderr
from common.formats import decode_jpeg2000, stated_otherwise
from common.limits import MAX_PIXELS, refuse_too_large
from common.tiff import FIRST_FRAME, ORIENTATION, RAW, decode_tiff, is_tiff, scaled_to_8_bits

pillow_heif.register_heif_opener()

# Sensor values, which a program must develop first; what Pillow would find in them is a thumbnail.
RAW_SUFFIXES = frozenset((
    ".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dcr", ".dng", ".erf", ".fff", ".iiq", ".k25", ".kdc",
    ".mef", ".mos", ".mrw", ".nef", ".nrw", ".orf", ".pef", ".raf", ".raw", ".rw2", ".rwl", ".sr2",
    ".srf", ".srw", ".x3f",
))  # fmt: skip
PNG_START = b"\x89PNG\r\n\x1a\n"
LARGEST_PROFILE, LARGEST_XMP = 2**26, 2**20  # bytes, unpacked
UNREADABLE = b"no profile"
XMP = b"XML:com.adobe.xmp\0\0"  # a text that may hold the orientation; the second 0: not packed

# What every decoder does by itself, or that leaves the pixels alone.
HARMLESS = frozenset((
    FIRST_FRAME, "1 converted to RGB", "L converted to RGB", "P converted to RGB",
))  # fmt: skip


class Picture(NamedTuple):
    """An upright RGB picture of 8 bits, what was converted for it, and the file's format."""

    image: Image.Image
    notes: tuple[str, ...]
    format: str | None

    @property
    def is_as_decoded(self) -> bool:
        """Whether any decoder gives these pixels of the file."""
        return {*self.notes} <= HARMLESS


def read_picture(path: Path) -> Picture:
    """The picture in an image file: upright, in sRGB, transparency on white, the first of several.

    Raises:
        OSError, ValueError, and whatever else a decoder makes of a damaged file: unreadable, too
            large, or pixels without a meaning in 8 bits.
    """
    if path.suffix.lower() in RAW_SUFFIXES:
        raise ValueError(RAW)
    # From memory: Pillow's memory-mapped TIFFs come out scrambled where EXIF turns them.
    data = path.read_bytes()
    if not data:
        raise ValueError("is empty (0 bytes)")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what matters is raised, or said in notes
        try:
            return _decoded(data)
        except Image.DecompressionBombError as error:
            size = next(word for word in str(error).replace("(", " ").split() if word.isdigit())
            raise ValueError(f"{size} pixels: at most {MAX_PIXELS} can be coded") from None
        except Exception:  # Pillow refuses PNGs whose texts are large, or whose profile is odd
            slim, profile = _without_texts(data)
            if len(slim) == len(data):
                raise
            return _decoded(slim, profile, ("odd or large texts or profiles set aside",))


def _decoded(data: bytes, profile: bytes | None = None, notes: tuple[str, ...] = ()) -> Picture:
    """The picture in a file's bytes; `profile` stands for one that was taken out of them."""
    found, deep = list(notes), decode_tiff(data) if is_tiff(data) else None
    if deep is None:
        image: Image.Image = Image.open(io.BytesIO(data))
        if image.format == "JPEG2000":
            image, scaled = decode_jpeg2000(image, data)
            found += scaled
    else:
        image, scaled = deep
        found += scaled
    refuse_too_large(*image.size)
    kind = image.format
    tiles = getattr(image, "tile", None)
    layout = str(tiles[0].args) if tiles else ""
    if _has_more_frames(image):
        found.append(FIRST_FRAME)
    orientation = _orientation(image)
    _load(image)
    if profile is None:
        profile = image.info.get("icc_profile", b"")
        if other := stated_otherwise(image, data) if profile == b"" else "":
            found.append(f"its colours are those of {other}, and not converted")
    if orientation != 1:
        found.append("turned upright as its EXIF orientation says")
        image = ImageOps.exif_transpose(image)
    image, alpha, apart = _apart(image, layout)
    image, note = to_srgb(image, profile)
    if alpha is not None:
        image.putalpha(alpha)
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return Picture(image, (*found, *apart, *([note] if note else [])), kind)


def _has_more_frames(image: Image.Image) -> bool:
    with suppress(Exception):  # a damaged second frame is no matter
        return bool(getattr(image, "is_animated", False))
    return False


def _orientation(image: Image.Image) -> int:
    with suppress(Exception):  # a damaged EXIF is none
        value = int(image.getexif().get(ORIENTATION, 1))
        return value if 1 <= value <= 8 else 1
    return 1


def _load(image: Image.Image) -> None:
    """Decode the pixels.

    Raises:
        ValueError: libtiff, which goes on after an error, complained on the console; says what.
    """
    if image.format != "TIFF":
        image.load()
        return
    with native_stderr() as said:
        image.load()
    if said:
        raise ValueError(f"damaged: {said[0]}")


def _apart(
    image: Image.Image, layout: str
) -> tuple[Image.Image, Image.Image | None, tuple[str, ...]]:
    """A picture's colours, of mode L, RGB, CMYK or LAB, its alpha, and what was done for them.

    Args:
        layout: of the file's pixels, as Pillow's decoder is told it.
    """
    if image.mode == "La":  # premultiplied
        image = image.convert("LA")
    mode, shallow = image.mode, ("16 bits reduced to 8",) if ";16" in layout else ()
    if mode == "I" or mode.startswith("I;16"):
        return _grey_of_16_bits(image)
    if mode == "F":
        raise ValueError("32-bit floating-point pixels; save it with 8 or 16 bits")
    if image.has_transparency_data:
        key = image.info.get("transparency")
        if shallow and isinstance(key, tuple):  # of 16 bits, where the pixels have 8 by now
            image.info["transparency"] = tuple(value >> 8 for value in key)
        elif isinstance(key, int) and layout in ("L;2", "L;4"):  # of so few bits, not of 8
            image.info["transparency"] = key * {"L;2": 85, "L;4": 17}[layout]
        rgba = image.convert("RGBA")
        colours = rgba.convert("RGB") if mode not in ("1", "L", "LA", "La") else rgba.getchannel(0)
        note = f"{mode} with transparency composited on white"
        return colours, rgba.getchannel("A"), (*shallow, note)
    if mode == "RGB":
        return image, None, shallow
    kept = mode in ("L", "CMYK", "LAB")
    colours = image if kept else image.convert("L" if mode == "1" else "RGB")
    return colours, None, (*shallow, f"{mode} converted to RGB")


def _grey_of_16_bits(image: Image.Image) -> tuple[Image.Image, Image.Image | None, tuple[str, ...]]:
    pixels = np.asarray(image)  # Pillow gives some 16-bit files as int32
    if pixels.min() < 0 or pixels.max() > 65535:
        raise ValueError("pixels outside 0 to 65535; save it with 8 or 16 bits")
    note, alpha = "16 bits of grey scaled to 8 bits and RGB", None
    if "transparency" in image.info:
        alpha = Image.fromarray(np.where(pixels == image.info["transparency"], 0, 255).astype("u1"))
        note += ", transparency composited on white"
    return Image.fromarray(scaled_to_8_bits(pixels, 16)), alpha, (note,)


def _without_texts(data: bytes) -> tuple[bytes, bytes]:
    """A PNG without its texts and its colour profile, and the profile, if there is one.

    Other files come back as they are.
    """
    if not data.startswith(PNG_START):
        return data, b""
    kept, profile, at = [PNG_START], b"", len(PNG_START)
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        if kind == b"iCCP":
            profile = _unpacked_profile(data[at + 8 : end - 4])
        elif kind not in (b"tEXt", b"zTXt", b"iTXt") or (
            data.startswith(XMP, at + 8) and length < LARGEST_XMP
        ):
            kept.append(data[at:end])
        at = end
    return b"".join(kept), profile


def _unpacked_profile(chunk: bytes) -> bytes:
    """An ICC profile: in a PNG it stands packed behind a name, a zero and the packing's number."""
    unpacking = zlib.decompressobj()
    with suppress(zlib.error):
        profile = unpacking.decompress(chunk.partition(b"\0")[2][1:], LARGEST_PROFILE)
        return profile if unpacking.eof else UNREADABLE
    return UNREADABLE
