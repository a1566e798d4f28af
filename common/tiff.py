"""Decode TIFFs that Pillow does not read, or reads wrongly, into pictures of 8 bits.

Pillow has a table of layouts. Above 8 bits it confuses white with black, misreads little-endian
CMYK, and refuses most other layouts. It also reads signed values as unsigned. tifffile returns the
samples as they are stored; this module interprets them (TIFF 6.0 and its supplements).
"""

import io
import logging

import numpy as np
import tifffile
from PIL import Image
from tifffile import EXTRASAMPLE, PHOTOMETRIC, PLANARCONFIG, SAMPLEFORMAT

from common.limits import refuse_too_large

ORIENTATION = 0x0112  # the tag's number, in EXIF too
INK_SET, DOT_RANGE, SUBSAMPLING, REFERENCE, DNG_VERSION = 332, 336, 530, 532, 50706
# What tifffile logs about a damaged file, it raises as well.
logging.getLogger("tifffile").addHandler(logging.NullHandler())

# The samples that make a colour, and Pillow's mode for them in 8 bits.
COLOURS: dict[int, tuple[int, str]] = {
    PHOTOMETRIC.MINISWHITE: (1, "L"),
    PHOTOMETRIC.MINISBLACK: (1, "L"),
    PHOTOMETRIC.RGB: (3, "RGB"),
    PHOTOMETRIC.PALETTE: (1, "RGB"),
    PHOTOMETRIC.SEPARATED: (4, "CMYK"),
    PHOTOMETRIC.CIELAB: (3, "LAB"),
    PHOTOMETRIC.ICCLAB: (3, "LAB"),
}
# The compressions that Pillow's libtiff always has; tifffile reads the others.
PILLOW_UNPACKS = (1, 2, 3, 4, 5, 6, 7, 8, 32773, 32946)
KINDS: dict[int, str] = {
    SAMPLEFORMAT.INT: "signed",
    SAMPLEFORMAT.IEEEFP: "floating-point",
    SAMPLEFORMAT.COMPLEXINT: "complex",
    SAMPLEFORMAT.COMPLEXIEEEFP: "complex",
}
FIRST_FRAME = "only its first frame or page is used"
RAW = "a camera's raw file; develop it to PNG, TIFF or JPEG first"
REMEDY = "save it as grey, RGB or CMYK of 8 or 16 bits"


def is_tiff(data: bytes) -> bool:
    """Whether a file's bytes begin like a TIFF's, whatever its name says."""
    return data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def decode_tiff(data: bytes) -> tuple[Image.Image, tuple[str, ...]] | None:
    """Decode the first page of a TIFF that Pillow does not read rightly.

    Returns:
        A picture of 8 bits, of mode L, LA, RGB, RGBA, CMYK or LAB, with the file's `icc_profile`
        and EXIF orientation; and notes on what was converted. None: Pillow reads the file rightly.

    Raises:
        ValueError: its samples have no meaning in 8 bits; says which they are.
        Exception: of other kinds, where tifffile meets a damaged file.
    """
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        if not len(file.pages):
            raise ValueError("truncated or damaged: a TIFF without a page")
        page = file.pages.first
        if not page.imagewidth * page.imagelength:
            raise ValueError("truncated or damaged: a TIFF without a picture")
        refuse_too_large(page.imagewidth, page.imagelength)
        _refuse_unsupported(page)
        if _pillow_reads(page) and _pillow_opens(data):
            return None
        image, notes = _picture(page, _samples(page))
        if len(file.pages) > 1:
            notes += (FIRST_FRAME,)
        image.format = "TIFF"
        if page.iccprofile:
            image.info["icc_profile"] = page.iccprofile
        if ORIENTATION in page.tags:
            image.getexif()[ORIENTATION] = int(page.tags[ORIENTATION].value)
    return image, notes


def _bits(page: tifffile.TiffPage) -> int:
    """The bits of a sample; the most bits where samples differ."""
    return int(np.max(page.bitspersample))


def _pillow_reads(page: tifffile.TiffPage) -> bool:
    """Whether Pillow reads such a page rightly if it opens it."""
    planes = page.planarconfig == PLANARCONFIG.SEPARATE
    plain = page.photometric == PHOTOMETRIC.RGB and not page.extrasamples
    unpacks = int(page.compression) in PILLOW_UNPACKS
    return _bits(page) <= 8 and unpacks and (plain or not planes)


def _pillow_opens(data: bytes) -> bool:
    try:
        with Image.open(io.BytesIO(data)):
            return True
    except (OSError, ValueError, SyntaxError, TypeError):
        return False


def _refuse_unsupported(page: tifffile.TiffPage) -> None:
    """Refuse samples that are no colours in [0, 2^bits - 1], and unsupported colour spaces."""
    if DNG_VERSION in page.tags:
        raise ValueError(RAW)
    if page.is_reduced:
        raise ValueError("its first page is a preview of another; save that one alone")
    if page.imagedepth > 1:
        raise ValueError(f"a volume of {page.imagedepth} layers is no picture")
    bits, kind = _bits(page), int(np.max(page.sampleformat))
    colour = getattr(page.photometric, "name", page.photometric)
    # Lab's a and b are signed whatever the sample format says.
    lab = page.photometric in (PHOTOMETRIC.CIELAB, PHOTOMETRIC.ICCLAB)
    if kind in KINDS and not (lab and kind == SAMPLEFORMAT.INT):
        raise ValueError(f"{bits}-bit {KINDS[kind]} samples; {REMEDY}")
    if bits > 16:
        raise ValueError(f"{bits}-bit samples; {REMEDY}")
    if page.photometric == PHOTOMETRIC.YCBCR:
        raw = page.compression == tifffile.COMPRESSION.NONE
        subsampled = SUBSAMPLING not in page.tags or page.tags[SUBSAMPLING].value != (1, 1)
        if bits > 8 or (raw and (subsampled or REFERENCE in page.tags)):
            raise ValueError(f"{bits}-bit YCbCr other than JPEG's; {REMEDY}")
    elif page.photometric not in COLOURS:
        raise ValueError(f"pixels of kind {colour}; {REMEDY}")
    inks = int(page.tags[INK_SET].value) if INK_SET in page.tags else 1
    if page.photometric == PHOTOMETRIC.SEPARATED and (inks != 1 or page.samplesperpixel < 4):
        raise ValueError(f"{page.samplesperpixel} inks other than cyan, magenta, yellow and black")
    dots = page.tags[DOT_RANGE].value[:2] if DOT_RANGE in page.tags else (0, 2**bits - 1)
    if page.photometric == PHOTOMETRIC.SEPARATED and tuple(dots) != (0, 2**bits - 1):
        raise ValueError(f"inks from {dots[0]} to {dots[1]}; {REMEDY}")


def _samples(page: tifffile.TiffPage) -> np.ndarray:
    """The page's samples, [H, W, S]."""
    if len({*np.atleast_1d(page.bitspersample).tolist()}) > 1:
        raise ValueError(f"samples of {page.bitspersample} bits; {REMEDY}")
    samples = page.asarray()
    if {*page.axes} - {*"YXS"}:
        raise ValueError(f"a volume of shape {samples.shape} is no picture")
    if samples.ndim == 2:
        return samples[:, :, None]
    separate = page.planarconfig == PLANARCONFIG.SEPARATE
    return np.moveaxis(samples, 0, -1) if separate else samples


def _picture(page: tifffile.TiffPage, samples: np.ndarray) -> tuple[Image.Image, tuple[str, ...]]:
    """The 8-bit picture of samples [H, W, S], and notes on what was converted."""
    bits, photometric = _bits(page), PHOTOMETRIC(page.photometric)
    if photometric not in COLOURS:
        raise ValueError(f"{photometric.name} that Pillow does not read; {REMEDY}")
    if photometric == PHOTOMETRIC.CIELAB and samples.shape[2] == 1:
        count, mode = 1, "L"  # lightness alone
    else:
        count, mode = COLOURS[photometric]
    colour, extra = samples[:, :, :count], samples[:, :, count:]
    if colour.shape[2] < count:
        raise ValueError(f"{samples.shape[2]} samples a pixel, not {photometric.name}'s {count}")
    kinds = _extra_kinds(page, extra.shape[2])
    notes: tuple[str, ...] = () if bits == 8 else (f"{bits} bits scaled to 8",)
    known = (EXTRASAMPLE.ASSOCALPHA, EXTRASAMPLE.UNASSALPHA)
    alpha = next((i for i, kind in enumerate(kinds) if kind in known), None)
    if len(kinds) > (alpha is not None):
        notes += ("channels without a stated meaning left out",)
    if photometric == PHOTOMETRIC.PALETTE:
        if page.colormap is None:
            raise ValueError("truncated or damaged: a TIFF without its palette")
        colour, bits = page.colormap[:, colour[:, :, 0]].transpose(1, 2, 0), 16
    elif photometric == PHOTOMETRIC.MINISWHITE:
        colour = 2**bits - 1 - colour
    if alpha is None:
        return Image.fromarray(_eight_bits(colour, bits, photometric), mode), notes
    opacity = extra[:, :, alpha]
    if kinds[alpha] == EXTRASAMPLE.ASSOCALPHA:
        if mode not in ("L", "RGB") or photometric == PHOTOMETRIC.MINISWHITE:
            raise ValueError(f"premultiplied transparency of {photometric.name}; {REMEDY}")
        colour = _unpremultiplied(colour, opacity, bits)
    if mode not in ("L", "RGB"):
        raise ValueError(f"transparency of {photometric.name}; {REMEDY}")
    picture = Image.fromarray(_eight_bits(colour, bits, photometric), mode)
    picture.putalpha(Image.fromarray(_eight_bits(opacity, _bits(page))))
    return picture, notes


def _extra_kinds(page: tifffile.TiffPage, count: int) -> list[int]:
    """The kinds of the `count` extra samples; a single one of RGB without a kind is its alpha."""
    kinds = [int(kind) for kind in page.extrasamples][:count]
    if not kinds and count == 1 and page.photometric == PHOTOMETRIC.RGB:
        return [int(EXTRASAMPLE.UNASSALPHA)]  # as Pillow and most others read it
    return kinds + [int(EXTRASAMPLE.UNSPECIFIED)] * (count - len(kinds))


def _unpremultiplied(colour: np.ndarray, opacity: np.ndarray, bits: int) -> np.ndarray:
    """Undo the multiplication of colours [H, W, C] by their opacity [H, W]."""
    opacity = np.maximum(opacity, 1)[:, :, None].astype(np.float32)
    most = 2**bits - 1
    return np.minimum(np.rint(colour * (most / opacity)), most).astype(np.uint16)


def _eight_bits(samples: np.ndarray, bits: int, photometric: int | None = None) -> np.ndarray:
    """Samples [H, W] or [H, W, C] in [0, 2^bits - 1] as uint8 in Pillow's form."""
    if samples.ndim == 3 and samples.shape[2] == 1:
        samples = samples[:, :, 0]
    if samples.ndim == 3 and photometric in (PHOTOMETRIC.CIELAB, PHOTOMETRIC.ICCLAB):
        return _lab(samples, bits, photometric)
    return scaled_to_8_bits(samples, bits)


def scaled_to_8_bits(samples: np.ndarray, bits: int) -> np.ndarray:
    """Integers in [0, 2^bits - 1], of any shape, scaled to [0, 255] and rounded; uint8."""
    most = 2**bits - 1
    table = np.rint(np.arange(most + 1) * (255 / most)).astype(np.uint8)
    return table[samples]


def _lab(samples: np.ndarray, bits: int, photometric: int) -> np.ndarray:
    """uint8 [H, W, 3] in Pillow's form of LAB: L in [0, 255], a and b in two's complement."""
    if bits not in (8, 16):
        raise ValueError(f"Lab of {bits} bits; {REMEDY}")
    unit = 2 ** (bits - 8)
    lightness, chroma = samples[:, :, :1], samples[:, :, 1:].astype(int)
    most = 2**bits - 1
    if photometric == PHOTOMETRIC.ICCLAB:
        most = 255 * unit  # 100 is 0xFF00 in 16 bits
        chroma -= 2 ** (bits - 1)  # CIELAB's are in two's complement already
    chroma = (chroma + 2 ** (bits - 1)) % 2**bits - 2 ** (bits - 1)
    lab = np.concatenate((lightness * (255 / most), chroma / unit), axis=2)
    return np.rint(lab).clip((0, -128, -128), (255, 127, 127)).astype(np.int16).astype(np.uint8)
