"""Read image files of every kind as upright RGB pictures of 8 bits, in sRGB."""

import io
import struct
import warnings
import zlib
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from common.colour import to_srgb
from common.console import native_stderr
from common.formats import decode_jpeg2000, stated_colour_space
from common.limits import MAX_PIXELS, refuse_too_large
from common.optional_packages import require_package
from common.tiff import FIRST_FRAME, ORIENTATION, RAW, decode_tiff, is_tiff, scaled_to_8_bits

Image.init()  # AVIF's opener before HEIC's, which takes some AVIFs for its own
with suppress(ImportError):
    import pillow_heif

    pillow_heif.register_heif_opener()

# Files of sensor values, which must be developed first; Pillow would read their small preview.
RAW_SUFFIXES = frozenset((
    ".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dcr", ".dng", ".erf", ".fff", ".iiq", ".k25", ".kdc",
    ".mef", ".mos", ".mrw", ".nef", ".nrw", ".orf", ".pef", ".raf", ".raw", ".rw2", ".rwl", ".sr2",
    ".srf", ".srw", ".x3f",
))  # fmt: skip
PNG_START = b"\x89PNG\r\n\x1a\n"
LARGEST_PROFILE, LARGEST_XMP = 2**26, 2**20  # bytes, decompressed
UNREADABLE_PROFILE = b"no profile"
XMP = b"XML:com.adobe.xmp\0\0"  # text that may hold the orientation; second 0: not compressed

# Notes on what any decoder does by itself, or what leaves the pixels alone.
HARMLESS = frozenset((
    FIRST_FRAME, "1 converted to RGB", "L converted to RGB", "P converted to RGB",
))  # fmt: skip


class Picture(NamedTuple):
    """An upright RGB picture of 8 bits, notes on what was converted, and the file's format."""

    image: Image.Image
    notes: tuple[str, ...]
    format: str | None

    @property
    def is_as_decoded(self) -> bool:
        """Whether any decoder reads these pixels from the file."""
        return {*self.notes} <= HARMLESS


def read_picture(path: Path) -> Picture:
    """Read an image file: upright, in sRGB, on white where it is transparent.

    Only the first of several frames or pages is read.

    Raises:
        OSError, ValueError: it is unreadable, too large, or its pixels have no meaning in 8 bits.
        InputError: it needs a package that is not installed.
        Exception: of other kinds, where a decoder meets a damaged file.
    """
    if path.suffix.lower() in RAW_SUFFIXES:
        raise ValueError(RAW)
    # From memory: Pillow scrambles a memory-mapped TIFF when it turns it as EXIF says.
    data = path.read_bytes()
    if not data:
        raise ValueError("is empty (0 bytes)")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what matters is raised or noted
        try:
            return _decode(data)
        except Image.DecompressionBombError as error:
            size = next(word for word in str(error).replace("(", " ").split() if word.isdigit())
            raise ValueError(f"{size} pixels: at most {MAX_PIXELS} can be coded") from None
        except Exception:  # Pillow refuses PNGs with large texts or odd profiles
            slim, profile = _without_texts(data)
            if len(slim) == len(data):
                raise
            return _decode(slim, profile, ("odd or large texts or profiles set aside",))


def _decode(data: bytes, profile: bytes | None = None, notes: tuple[str, ...] = ()) -> Picture:
    """Decode a file's bytes; `profile` is the one that was removed from them, if any."""
    found, from_tiff = list(notes), decode_tiff(data) if is_tiff(data) else None
    if from_tiff is None:
        image = _open(data)
        if image.format == "JPEG2000":
            image, scaled = decode_jpeg2000(image, data)
            found += scaled
    else:
        image, scaled = from_tiff
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
        if other := stated_colour_space(image, data) if profile == b"" else "":
            found.append(f"its colours are those of {other}, and not converted")
    if orientation != 1:
        found.append("turned upright as its EXIF orientation says")
        image = ImageOps.exif_transpose(image)
    image, alpha, split_notes = _split_alpha(image, layout)
    image, note = to_srgb(image, profile)
    if alpha is not None:
        image.putalpha(alpha)
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return Picture(image, (*found, *split_notes, *([note] if note else [])), kind)


def _open(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        if data[4:8] == b"ftyp" and "HEIF" not in Image.OPEN:
            require_package("pillow_heif", "HEIC", "refine")
        raise


def _has_more_frames(image: Image.Image) -> bool:
    with suppress(Exception):  # a damaged second frame does not matter
        return bool(getattr(image, "is_animated", False))
    return False


def _orientation(image: Image.Image) -> int:
    with suppress(Exception):  # damaged EXIF counts as none
        value = int(image.getexif().get(ORIENTATION, 1))
        return value if 1 <= value <= 8 else 1
    return 1


def _load(image: Image.Image) -> None:
    """Decode the pixels.

    Raises:
        ValueError: libtiff wrote an error to the console, after which it goes on; says which.
    """
    if image.format != "TIFF":
        image.load()
        return
    with native_stderr() as lines:
        image.load()
    if lines:
        raise ValueError(f"damaged: {lines[0]}")


def _split_alpha(
    image: Image.Image, layout: str
) -> tuple[Image.Image, Image.Image | None, tuple[str, ...]]:
    """Split a picture into its colours and its alpha.

    Args:
        layout: Pillow's name of the layout of the file's pixels.

    Returns:
        The colours, of mode L, RGB, CMYK or LAB; the alpha, or None; notes on what was converted.
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
        if shallow and isinstance(key, tuple):  # it has 16 bits, the pixels only 8 by now
            image.info["transparency"] = tuple(value >> 8 for value in key)
        # It has 2 or 4 bits, the pixels 8.
        elif isinstance(key, int) and layout in ("L;2", "L;4"):
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
    """A PNG without its texts and its colour profile; and that profile, or b"".

    Other files are returned as they are.
    """
    if not data.startswith(PNG_START):
        return data, b""
    kept, profile, at = [PNG_START], b"", len(PNG_START)
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        if kind == b"iCCP":
            profile = _profile_in(data[at + 8 : end - 4])
        elif kind not in (b"tEXt", b"zTXt", b"iTXt") or (
            data.startswith(XMP, at + 8) and length < LARGEST_XMP
        ):
            kept.append(data[at:end])
        at = end
    return b"".join(kept), profile


def _profile_in(chunk: bytes) -> bytes:
    """The ICC profile in a PNG's chunk: a name, a zero, a method number, compressed data."""
    decompressor = zlib.decompressobj()
    with suppress(zlib.error):
        profile = decompressor.decompress(chunk.partition(b"\0")[2][1:], LARGEST_PROFILE)
        return profile if decompressor.eof else UNREADABLE_PROFILE
    return UNREADABLE_PROFILE
