"""One photo in several forms, how a reader's pixels are compared, and files byte by byte."""

import struct
import zlib

import numpy as np
import skimage
from PIL import Image

from common.pictures import read_picture

PHOTO = skimage.data.chelsea()[60:100, 100:160]  # [40, 60, 3]
GREY = np.array(Image.fromarray(PHOTO).convert("L"))
OPACITY = np.tile(np.linspace(0, 255, 60).round().astype(np.uint8), (40, 1))
CMYK = np.array(Image.fromarray(PHOTO).convert("CMYK"))
CMYK[..., 3] = 40
RGB_OF_CMYK = np.array(Image.fromarray(CMYK, "CMYK").convert("RGB"))


def deep(levels):
    """16-bit values of 8-bit levels."""
    return levels.astype(np.uint16) * 257


def read(path):
    """The pixels of a picture, int [H, W, 3], and its notes."""
    picture = read_picture(path)
    assert picture.image.mode == "RGB"
    return np.asarray(picture.image).astype(int), picture.notes


def assert_near(pixels, expected, levels):
    difference = abs(pixels - expected)
    assert difference.max() <= levels, (difference.max(), difference.mean())


def on_white(levels, opacity):
    a = opacity[..., None] / 255
    return levels * a + 255 * (1 - a)


# --- files, byte by byte --------------------------------------------------------------------------


def tiff(width, height, bits, data, **changed):
    """A TIFF of grey in one strip; `changed` are tags by number, such as t262=6."""
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 273: 8, 277: 1, 278: height,
            279: len(data), **{int(key[1:]): value for key, value in changed.items()}}  # fmt: skip
    directory = struct.pack("<H", len(tags))
    for tag, value in sorted(tags.items()):
        directory += struct.pack("<HHII", tag, 4, 1, value)
    return struct.pack("<2sHI", b"II", 42, 8 + len(data)) + data + directory + bytes(4)


def png_chunk(name, data):
    """A chunk of PNG: its length, its name, its data and their checksum."""
    body = name + data
    return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))


def png(width, height, kind, rows, bits=8, transparent=b""):
    """A PNG of rows with their filter bytes; `kind` is its colour type: 0 grey, 2 RGB."""
    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    key = png_chunk(b"tRNS", transparent) if transparent else b""
    data = png_chunk(b"IDAT", zlib.compress(rows))
    start = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header)
    return start + key + data + png_chunk(b"IEND", b"")


def after_header(data, chunk):
    """The PNG with a chunk behind its IHDR."""
    return data[:33] + chunk + data[33:]
