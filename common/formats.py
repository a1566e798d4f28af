"""JPEG 2000 files that Pillow reads wrongly, and colour spaces stated without a profile."""

import struct
from typing import Any

from PIL import Image

from common.optional_packages import import_package
from common.tiff import scaled_to_8_bits

CODESTREAM = b"\xff\x4f\xff\x51"  # its first markers, SOC and SIZ (ITU-T T.800, annex A)
SYCC = 18  # the number of the colour space sYCC (annex I)
# Numbers of primaries (ITU-T H.273) that are sRGB's, or near them and usual in photos.
USUAL_PRIMARIES = (1, 2, 5, 6)
PRIMARIES = {9: "BT.2020", 11: "DCI-P3", 12: "Display P3"}
SRGB_GAMMA = (0.40, 0.50)  # the range of a PNG's gAMA that counts as sRGB


def decode_jpeg2000(image: Image.Image, data: bytes) -> tuple[Image.Image, tuple[str, ...]]:
    """Add the profile to a picture that Pillow opened; decode it again if it has over 8 bits.

    Pillow reduces such colours to 8 bits, but the lightest ones overflow to black.

    Args:
        image: opened by Pillow.
        data: the bytes of its file.

    Returns:
        The picture, and notes on what was converted.

    Raises:
        ValueError: colours of more than 8 bits in another space than RGB, or signed.
        InputError: they need a package that is not installed.
    """
    at = data.find(CODESTREAM)
    depth = data[at + 42] if at >= 0 and len(data) > at + 42 else 7
    bits, box = (depth & 0x7F) + 1, _colour_box(data[: max(at, 0)])
    if box[:1] == b"\2":
        image.info["icc_profile"] = box[3:]
    if bits <= 8 or image.mode.startswith("I"):
        return image, ()
    if depth & 0x80 or bits > 16 or image.mode not in ("RGB", "RGBA"):
        raise ValueError(f"JPEG 2000 of {bits} bits and mode {image.mode}; save it with 8 bits")
    if box[:1] == b"\1" and box[3:7] == struct.pack(">I", SYCC):
        raise ValueError(f"JPEG 2000 of {bits} bits in YCbCr; save it with 8 bits")
    imagecodecs = import_package("imagecodecs", f"JPEG 2000 of {bits} bits", "refine")
    samples = imagecodecs.jpeg2k_decode(data)  # [H, W, C]
    decoded = Image.fromarray(scaled_to_8_bits(samples, bits), image.mode)
    decoded.format, decoded.info = image.format, image.info
    return decoded, (f"{bits} bits scaled to 8",)


def _colour_box(head: bytes) -> bytes:
    """The content of a JP2 file's colr box; empty where there is none."""
    at = head.find(b"colr")
    if at < 4:
        return b""
    (length,) = struct.unpack_from(">I", head, at - 4)
    return head[at + 4 : at - 4 + length]


def stated_colour_space(image: Image.Image, data: bytes) -> str:
    """The colour space that a file without a profile states; "" for sRGB, or where it states none.

    It is stated by cICP or gAMA in a PNG, by nclx in HEIC and AVIF, and by R03 in Exif (Adobe RGB).
    """
    if image.format == "PNG":
        at = data.find(b"cICP", 0, 4096)
        if at > 0 and data[at + 4] not in USUAL_PRIMARIES:
            return _name_of_primaries(data[at + 4])
        gamma = image.info.get("gamma")
        if at < 0 and gamma and "srgb" not in image.info and not _is_usual(gamma):
            return f"gamma {gamma:g}"
    nclx: Any = image.info.get("nclx_profile") or {}
    primaries = nclx.get("color_primaries", 2) if isinstance(nclx, dict) else 2
    if primaries not in USUAL_PRIMARIES:
        return _name_of_primaries(int(primaries))
    if image.format in ("JPEG", "MPO") and b"R03\0" in data[:65536]:
        return "Adobe RGB, as Exif says"
    return ""


def _name_of_primaries(primaries: int) -> str:
    return PRIMARIES.get(primaries, f"primaries {primaries} of H.273")


def _is_usual(gamma: float) -> bool:
    low, high = SRGB_GAMMA
    return low <= gamma <= high
