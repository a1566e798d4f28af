"""RGB colour spaces, their ICC profiles byte by byte, and their way to sRGB by the formulas."""

import struct
from typing import NamedTuple

import numpy as np


class Space(NamedTuple):
    """Chromaticities of red, green, blue (x, y), white D65, and the exponent of the levels."""

    name: str
    primaries: tuple
    gamma: float


DISPLAY_P3 = Space("Display P3", ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)), 2.2)
ADOBE_RGB = Space("Adobe RGB", ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06)), 563 / 256)
SRGB = Space("sRGB", ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06)), 2.4)
D65, D50 = (0.3127, 0.3290), (0.34567, 0.35850)
BRADFORD = np.array(
    [[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]]
)


def to_xyz(space):
    """The matrix from linear values to XYZ under D65 (SMPTE RP 177)."""
    columns = np.array([xyz_of(*primary) for primary in space.primaries]).T
    return columns * np.linalg.solve(columns, xyz_of(*D65))


def xyz_of(x, y):
    return np.array([x / y, 1, (1 - x - y) / y])


def srgb_of(space, levels):
    """Levels of sRGB, float, of uint8 levels [..., 3] of a space; out of gamut is clipped."""
    light = (levels / 255) ** space.gamma @ np.linalg.solve(to_xyz(SRGB), to_xyz(space)).T
    light = light.clip(0, 1)
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def profile_of(space, padding=0):
    """An ICC profile, version 2, of three primaries and an exponent (ICC.1:2001-04)."""
    cones = [BRADFORD @ xyz_of(*white) for white in (D65, D50)]
    adapt = np.linalg.inv(BRADFORD) @ np.diag(cones[1] / cones[0]) @ BRADFORD
    columns = (adapt @ to_xyz(space)).T
    name = space.name.encode() + b"\0"
    curve = struct.pack(">4s4xIH2x", b"curv", 1, round(space.gamma * 256))
    primaries = zip((b"rXYZ", b"gXYZ", b"bXYZ"), columns, strict=True)
    tags = {
        b"desc": struct.pack(">4s4xI", b"desc", len(name)) + name + bytes(78),
        b"cprt": b"text\0\0\0\0none\0",
        b"wtpt": xyz_tag(xyz_of(*D50)),
        **{key: xyz_tag(column) for key, column in primaries},
        **dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve),
    }
    if padding:
        tags[b"priv"] = b"data" + bytes(padding)
    at, table, body = 132 + 12 * len(tags), b"", b""
    for key, data in tags.items():
        data += bytes(-len(data) % 4)
        table += struct.pack(">4sII", key, at + len(body), len(data))
        body += data
    size = at + len(body)
    header = struct.pack(
        ">I4xI4s4s4s12x4s24x3I", size, 0x02400000, b"mntr", b"RGB ", b"XYZ ", b"acsp",
        *(round(65536 * value) for value in xyz_of(*D50)),
    )  # fmt: skip
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def xyz_tag(values):
    return struct.pack(">4s4x3i", b"XYZ ", *(round(65536 * value) for value in values))
