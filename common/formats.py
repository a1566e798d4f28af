"""What Pillow does not tell of JPEG 2000, and colour spaces that files state without a profile."""

import struct
from typing import Any

import imagecodecs
from PIL import Image

from common.tiff import scaled_to_8_bits

CODESTREAM = b"\xff\x4f\xff\x51"  # how it starts: SOC and SIZ (ITU-T T.800, annex A)
SYCC = 18  # of enumerated colour spaces (annex I)
# Primaries by their numbers in ITU-T H.273 that are sRGB's, or near and usual in photos.
USUAL_PRIMARIES = (1, 2, 5, 6)
PRIMARIES = {9: "BT.2020", 11: "DCI-P3", 12: "Display P3"}
SRGB_GAMMA = (0.40, 0.50)  # of PNG's gAMA chunk


def decode_jpeg2000(image: Image.Image, data: bytes) -> tuple[Image.Image, tuple[str, ...]]:
    """The picture that Pillow opened, its profile found; decoded anew where Pillow's bits overflow.

    Pillow reduces colours of more than 8 bits, and makes black of the lightest.

    Raises:
        ValueError: colours of more than 8 bits in another space than RGB, or signed.
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
    samples = imagecodecs.jpeg2k_decode(data)  # [H, W, C]
    decoded = Image.fromarray(scaled_to_8_bits(samples, bits), image.mode)
    decoded.format, decoded.info = image.format, image.info
    return decoded, (f"{bits} bits scaled to 8",)


def _colour_box(head: bytes) -> bytes:
    """What the colr box of a JP2 file holds; empty where there is none."""
    at = head.find(b"colr")
    if at < 4:
        return b""
    (length,) = struct.unpack_from(">I", head, at - 4)
    return head[at + 4 : at - 4 + length]


def stated_otherwise(image: Image.Image, data: bytes) -> str:
    """The name of a colour space other than sRGB that a file without a profile states, or nothing.

    A PNG's cICP and gAMA, HEIC's and AVIF's nclx, and the Adobe RGB of cameras (Exif's R03).
    """
    if image.format == "PNG":
        at = data.find(b"cICP", 0, 4096)
        if at > 0 and data[at + 4] not in USUAL_PRIMARIES:
            return _named(data[at + 4])
        gamma = image.info.get("gamma")
        if at < 0 and gamma and "srgb" not in image.info and not _is_usual(gamma):
            return f"gamma {gamma:g}"
    nclx: Any = image.info.get("nclx_profile") or {}
    primaries = nclx.get("color_primaries", 2) if isinstance(nclx, dict) else 2
    if primaries not in USUAL_PRIMARIES:
        return _named(int(primaries))
    if image.format in ("JPEG", "MPO") and b"R03\0" in data[:65536]:
        return "Adobe RGB, as Exif says"
    return ""


def _named(primaries: int) -> str:
    return PRIMARIES.get(primaries, f"primaries {primaries} of H.273")


def _is_usual(gamma: float) -> bool:
    low, high = SRGB_GAMMA
    return low <= gamma <= high
