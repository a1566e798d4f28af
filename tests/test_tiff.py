"""TIFFs of every layout, depth and compression come out as what a person sees."""

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms

from common.pictures import read_picture
from conftest import needs
from pixels import (
    CMYK,
    GREY,
    OPACITY,
    PHOTO,
    RGB_OF_CMYK,
    assert_near,
    deep,
    on_white,
    read,
    tiff,
)

INFRARED = 255 - GREY
# Name: 8-bit samples [H, W, S], what they are, the 8-bit picture that they show.
LAYOUTS = {
    "grey": (GREY[..., None], {"photometric": "minisblack"}, GREY[..., None]),
    "white is zero": (255 - GREY[..., None], {"photometric": "miniswhite"}, GREY[..., None]),
    "grey and alpha": (
        np.dstack((GREY, OPACITY)),
        {"photometric": "minisblack", "extrasamples": ["unassalpha"]},
        on_white(GREY[..., None], OPACITY),
    ),
    "RGB": (PHOTO, {"photometric": "rgb"}, PHOTO),
    "RGB and infrared": (
        np.dstack((PHOTO, INFRARED)), {"photometric": "rgb", "extrasamples": ["unspecified"]}, PHOTO
    ),
    "RGB and alpha": (
        np.dstack((PHOTO, OPACITY)),
        {"photometric": "rgb", "extrasamples": ["unassalpha"]},
        on_white(PHOTO, OPACITY),
    ),
    "RGB, alpha and infrared": (
        np.dstack((PHOTO, OPACITY, INFRARED)),
        {"photometric": "rgb", "extrasamples": ["unassalpha", "unspecified"]},
        on_white(PHOTO, OPACITY),
    ),
    "RGB, infrared and alpha": (
        np.dstack((PHOTO, INFRARED, OPACITY)),
        {"photometric": "rgb", "extrasamples": ["unspecified", "unassalpha"]},
        on_white(PHOTO, OPACITY),
    ),
    "CMYK": (CMYK, {"photometric": "separated"}, RGB_OF_CMYK),
    "CMYK and a spot colour": (
        np.dstack((CMYK, INFRARED)),
        {"photometric": "separated", "extrasamples": ["unspecified"]},
        RGB_OF_CMYK,
    ),
}  # fmt: skip


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("separate", [False, True], ids=["mixed", "planes"])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_a_tiff_of_16_bits_shows_what_that_of_8_bits_shows(tmp_path, layout, order, separate, bits):
    samples, options, shown = layout
    samples = deep(samples) if bits == 16 else samples
    if separate and samples.shape[2] > 1:
        options = {**options, "planarconfig": "separate"}
        samples = np.moveaxis(samples, -1, 0)
    elif samples.shape[2] == 1:
        samples = samples[..., 0]
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, samples, byteorder=order, metadata=None, **options)
    pixels, notes = read(path)
    assert_near(pixels, shown, 1)
    assert ("16 bits scaled to 8" in " ".join(notes)) == (bits == 16)


def test_premultiplied_colours_are_divided(tmp_path):
    """At 16 bits nearly all of them come back; only where nothing is seen they are lost."""
    multiplied = np.rint(deep(PHOTO) * (deep(OPACITY)[..., None] / 65535)).astype(np.uint16)
    path = tmp_path / "a.tif"
    samples = np.dstack((multiplied, deep(OPACITY)))
    tifffile.imwrite(path, samples, photometric="rgb", extrasamples=["assocalpha"])
    assert_near(read(path)[0], on_white(PHOTO, OPACITY), 1.01)


def test_16_bit_palettes_give_their_colours(tmp_path):
    colours = np.random.default_rng(0).integers(0, 65536, (3, 65536), dtype=np.uint16)
    indices = np.random.default_rng(1).integers(0, 65536, (40, 60), dtype=np.uint16)
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, indices, photometric="palette", colormap=colours)
    expected = colours[:, indices].transpose(1, 2, 0) / 257
    assert_near(read(path)[0], expected, 0.51)


@pytest.mark.parametrize("planes", [False, True], ids=["mixed", "planes"])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("photometric", ["cielab", "icclab"])
def test_lab_is_the_picture_that_it_was_made_of(tmp_path, photometric, bits, planes):
    srgb, lab = (ImageCms.createProfile(space) for space in ("sRGB", "LAB"))
    image = ImageCms.profileToProfile(Image.fromarray(PHOTO), srgb, lab, outputMode="LAB")
    levels = np.array(image).view(np.int8).astype(int)  # a and b are signed, L is not
    levels[..., 0] %= 256
    if photometric == "cielab":
        scale = np.array([257, 256, 256]) if bits == 16 else 1
    else:
        levels[..., 1:] += 128
        scale = 256 if bits == 16 else 1
    samples = (levels * scale).astype(f"u{bits // 8}")  # two's complement
    path = tmp_path / "a.tif"
    if planes:
        samples = np.moveaxis(samples, -1, 0)
    options = {"planarconfig": "separate"} if planes else {}
    tifffile.imwrite(path, samples, photometric=photometric, **options)
    pixels, notes = read(path)
    assert_near(pixels, PHOTO, 6)  # 8-bit Lab is coarse
    assert abs(pixels - PHOTO).mean() < 1.2
    assert "LAB converted to RGB" in notes


@pytest.mark.parametrize("bits", [8, 16])
def test_premultiplied_grey(tmp_path, bits):
    grey, opacity = GREY.astype(float), OPACITY.astype(float)
    samples = np.dstack((np.rint(grey * opacity / 255), opacity)).astype(np.uint8)
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, deep(samples) if bits == 16 else samples, photometric="minisblack",
                     extrasamples=["assocalpha"])  # fmt: skip
    assert_near(read(path)[0], on_white(GREY[..., None], OPACITY), 1.6)


@needs("imagecodecs")
def test_12_bits_are_scaled_by_12_bits(tmp_path):
    """Packed by hand: two values in three bytes, the first one's high bits first."""
    values = np.linspace(0, 4095, 40 * 60).astype(int).reshape(40, 60)
    first, second = values[:, ::2], values[:, 1::2]
    packed = np.stack(
        (first >> 4, (first & 15) << 4 | second >> 8, second & 255), axis=2
    ).astype(np.uint8).tobytes()  # fmt: skip
    path = tmp_path / "a.tif"
    path.write_bytes(tiff(60, 40, 12, packed))
    assert_near(read(path)[0], values[..., None] * (255 / 4095), 0.51)


@needs("imagecodecs")
def test_ycbcr_that_no_decoder_turns_into_rgb_is_refused(tmp_path):
    """Without JPEG nothing says that its colours have half the resolution but a default."""
    path = tmp_path / "a.tif"
    path.write_bytes(tiff(8, 8, 8, bytes(96), t262=6, t277=3))
    with pytest.raises(ValueError, match="8-bit YCbCr other than JPEG's"):
        read_picture(path)
    planes = np.zeros((3, 8, 8), np.uint8)
    tifffile.imwrite(path, planes, photometric="ycbcr", planarconfig="separate", compression="lzw")
    with pytest.raises(ValueError, match="YCBCR that Pillow does not read"):
        read_picture(path)


REFUSED = {
    "signed 8 bits": (np.zeros((8, 8), np.int8), {}, "8-bit signed"),
    "signed": (np.zeros((8, 8), np.int16), {}, "16-bit signed"),
    "32 bits": (np.zeros((8, 8), np.uint32), {}, "32-bit"),
    "half": (np.zeros((8, 8), np.float16), {}, "16-bit floating-point"),
    "float": (np.zeros((8, 8, 3), np.float32), {"photometric": "rgb"}, "32-bit floating-point"),
    "double": (np.zeros((8, 8), np.float64), {}, "64-bit floating-point"),
    "complex": (np.zeros((8, 8), np.complex64), {}, "complex"),
    "sensor": (np.zeros((8, 8), np.uint16), {"photometric": "cfa"}, "CFA"),
    "YCbCr": (np.zeros((8, 8, 3), np.uint16), {"photometric": "ycbcr"}, "16-bit YCbCr"),
    "inks": (
        np.zeros((8, 8, 4), np.uint16),
        {"photometric": "separated", "extratags": [(332, "H", 1, 2, True)]},
        "4 inks other than",
    ),
    "negative inks": (
        np.zeros((8, 8, 4), np.uint8),
        {"photometric": "separated", "extratags": [(336, "B", 2, (255, 0), True)]},
        "inks from 255 to 0",
    ),
    "preview": (np.zeros((8, 8), np.uint8), {"subfiletype": 1}, "preview of another"),
    "8-bit volume": (
        np.zeros((16, 16, 16), np.uint8), {"volumetric": True, "tile": (16, 16, 16)}, "volume"
    ),
    "volume": (
        np.zeros((16, 16, 16), np.uint16), {"volumetric": True, "tile": (16, 16, 16)}, "volume"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED.keys())
def test_what_has_no_meaning_in_8_bits_is_refused_by_name(tmp_path, case):
    samples, options, said = case
    path = tmp_path / "a.tif"
    options = {"photometric": "minisblack", **options}
    tifffile.imwrite(path, samples, metadata=None, **options)
    with pytest.raises(ValueError, match=said) as error:
        read_picture(path)
    assert "\n" not in str(error.value)


@needs("imagecodecs")
@pytest.mark.parametrize("compression", ["lzw", "deflate", "zstd", "lzma", "packbits", "jpeg2000"])
@pytest.mark.parametrize("bits", [8, 16])
def test_every_common_compression_of_tiff_is_read(tmp_path, compression, bits):
    path = tmp_path / "a.tif"
    samples = deep(PHOTO) if bits == 16 else PHOTO
    predictor = {"predictor": True} if compression in ("lzw", "deflate", "zstd") else {}
    tifffile.imwrite(path, samples, photometric="rgb", compression=compression, **predictor)
    assert_near(read(path)[0], PHOTO, 0)


@needs("imagecodecs")
def test_grey_of_16_bits_as_pillow_packs_it(tmp_path):
    path = tmp_path / "a.tif"
    Image.fromarray(deep(GREY)).save(path, compression="tiff_lzw")
    assert_near(read(path)[0], GREY[..., None], 0)
