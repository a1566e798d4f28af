"""Every kind of picture comes out as what a person sees: colours, depths, profiles, limits."""

import io
import struct
import warnings
import zlib

import imagecodecs
import numpy as np
import pytest
import skimage
import tifffile
from PIL import Image, ImageCms, PngImagePlugin

from common.limits import MAX_PIXELS
from common.pictures import read_picture
from common.tiff import FIRST_FRAME
from profiles import ADOBE_RGB, DISPLAY_P3, SRGB, profile_of, srgb_of

PHOTO = skimage.data.chelsea()[60:100, 100:160]  # [40, 60, 3]
GREY = np.array(Image.fromarray(PHOTO).convert("L"))
OPACITY = np.tile(np.linspace(0, 255, 60).round().astype(np.uint8), (40, 1))


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


# --- TIFF -----------------------------------------------------------------------------------------

CMYK = np.array(Image.fromarray(PHOTO).convert("CMYK"))
CMYK[..., 3] = 40
RGB_OF_CMYK = np.array(Image.fromarray(CMYK, "CMYK").convert("RGB"))
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


def tiff(width, height, bits, data, **changed):
    """A TIFF of grey in one strip; `changed` are tags by number, such as t262=6."""
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 273: 8, 277: 1, 278: height,
            279: len(data), **{int(key[1:]): value for key, value in changed.items()}}  # fmt: skip
    directory = struct.pack("<H", len(tags))
    for tag, value in sorted(tags.items()):
        directory += struct.pack("<HHII", tag, 4, 1, value)
    return struct.pack("<2sHI", b"II", 42, 8 + len(data)) + data + directory + bytes(4)


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


@pytest.mark.parametrize("compression", ["lzw", "deflate", "zstd", "lzma", "packbits", "jpeg2000"])
@pytest.mark.parametrize("bits", [8, 16])
def test_every_common_compression_of_tiff_is_read(tmp_path, compression, bits):
    path = tmp_path / "a.tif"
    samples = deep(PHOTO) if bits == 16 else PHOTO
    predictor = {"predictor": True} if compression in ("lzw", "deflate", "zstd") else {}
    tifffile.imwrite(path, samples, photometric="rgb", compression=compression, **predictor)
    assert_near(read(path)[0], PHOTO, 0)


def test_grey_of_16_bits_as_pillow_packs_it(tmp_path):
    path = tmp_path / "a.tif"
    Image.fromarray(deep(GREY)).save(path, compression="tiff_lzw")
    assert_near(read(path)[0], GREY[..., None], 0)


# --- colour profiles ------------------------------------------------------------------------------


def in_profile(space):
    """A photo's values in another space, as a camera would write them, and its sRGB levels."""
    levels = PHOTO[:, ::-1]
    return np.ascontiguousarray(levels), srgb_of(space, levels)


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp", "avif"])
@pytest.mark.parametrize("space", [DISPLAY_P3, ADOBE_RGB], ids=lambda space: space.name)
def test_other_spaces_become_srgb(tmp_path, space, suffix):
    levels, expected = in_profile(space)
    path, exact = tmp_path / f"a.{suffix}", suffix in ("png", "tif")
    options = {"quality": 100} if suffix in ("jpg", "webp", "avif") else {}
    Image.fromarray(levels).save(path, icc_profile=profile_of(space), **options)
    pixels, notes = read(path)
    assert notes[-1] == f"converted to sRGB from its colour profile ({space.name})"
    if exact:
        assert_near(pixels, expected, 1.6)
    else:
        assert abs(pixels - expected).mean() < 2.5
    assert abs(levels - expected).mean() > 3  # what a reader without profiles is off by


def test_16_bits_transparency_and_a_profile_at_once(tmp_path):
    levels, expected = in_profile(ADOBE_RGB)
    path = tmp_path / "a.tif"
    samples = np.dstack((deep(levels), deep(OPACITY)))
    profile = [(34675, 7, len(profile_of(ADOBE_RGB)), profile_of(ADOBE_RGB), True)]
    tifffile.imwrite(path, samples, photometric="rgb", extrasamples=["unassalpha"],
                     extratags=profile)  # fmt: skip
    pixels, notes = read(path)
    assert_near(pixels, on_white(expected, OPACITY), 2)
    assert len(notes) == 3


def test_a_grey_picture_with_an_rgb_profile(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(GREY).save(path, icc_profile=profile_of(ADOBE_RGB))
    expected = srgb_of(ADOBE_RGB, np.repeat(GREY[..., None], 3, axis=2))
    assert_near(read(path)[0], expected, 1.6)


def test_srgb_profiles_change_nothing_and_are_not_mentioned(tmp_path):
    written = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for number, profile in enumerate((written, profile_of(DISPLAY_P3._replace(name="sRGB")))):
        path = tmp_path / f"{number}.png"
        Image.fromarray(PHOTO).save(path, icc_profile=profile)
    assert read(tmp_path / "0.png")[1] == ()
    assert_near(read(tmp_path / "0.png")[0], PHOTO, 0)
    assert len(read(tmp_path / "1.png")[1]) == 1  # by its colours, not by its name


def test_a_space_a_little_beside_srgb_is_another(tmp_path):
    path, space = tmp_path / "a.png", SRGB._replace(name="a little brighter", gamma=2.25)
    Image.fromarray(PHOTO).save(path, icc_profile=profile_of(space))
    pixels, notes = read(path)
    assert_near(pixels, srgb_of(space, PHOTO), 1.6)
    assert notes == ("converted to sRGB from its colour profile (a little brighter)",)


def test_spaces_that_are_stated_without_a_profile_are_said(tmp_path):
    Image.fromarray(PHOTO).save(tmp_path / "plain.png")
    data = (tmp_path / "plain.png").read_bytes()
    for name, chunk, said in (
        ("p3", b"cICP\x0c\x0d\0\1", "Display P3"),
        ("srgb", b"cICP\1\x0d\0\1", None),
        ("linear", b"gAMA" + struct.pack(">I", 100_000), "gamma 1"),
        ("usual", b"gAMA" + struct.pack(">I", 45_455), None),
    ):
        path = tmp_path / f"{name}.png"
        head = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        path.write_bytes(data[:33] + head + data[33:])
        notes = (f"its colours are those of {said}, and not converted",) if said else ()
        assert read(path)[1] == notes


@pytest.mark.parametrize("damage", ["cut", "noise", "another space"])
def test_broken_profiles_are_ignored_with_a_note(tmp_path, damage):
    profile = profile_of(DISPLAY_P3)
    profile = {
        "cut": profile[:200],
        "noise": b"no profile at all" * 20,
        "another space": profile[:16] + b"CMYK" + profile[20:],
    }[damage]
    path = tmp_path / "a.png"
    Image.fromarray(PHOTO).save(path, icc_profile=profile)
    pixels, notes = read(path)
    assert_near(pixels, PHOTO, 0)
    assert len(notes) == 1
    assert "ignored" in notes[0]


# --- PNG ------------------------------------------------------------------------------------------


def test_large_texts_and_profiles_do_not_hide_a_png(tmp_path):
    texts = PngImagePlugin.PngInfo()
    texts.add_text("comment", "x" * 3_000_000, zip=True)
    texts.add_itxt("note", "y" * 3_000_000, zip=True)
    large = profile_of(DISPLAY_P3, padding=3_000_000)
    path = tmp_path / "a.png"
    Image.fromarray(PHOTO).save(path, pnginfo=texts)
    pixels, notes = read(path)
    assert_near(pixels, PHOTO, 0)
    assert notes == ("odd or large texts or profiles set aside",)
    Image.fromarray(PHOTO).save(path, icc_profile=large)
    pixels, notes = read(path)
    assert_near(pixels, srgb_of(DISPLAY_P3, PHOTO), 1.6)
    assert "Display P3" in notes[-1]


@pytest.mark.parametrize("chunk", [b"x", b"name\0\0no zlib", b"\0" * 40])
def test_odd_profile_chunks_do_not_hide_a_png(tmp_path, chunk):
    path = tmp_path / "a.png"
    Image.fromarray(PHOTO).save(path)
    data = path.read_bytes()
    body = b"iCCP" + chunk
    odd = struct.pack(">I", len(chunk)) + body + struct.pack(">I", zlib.crc32(body))
    path.write_bytes(data[:33] + odd + data[33:])  # behind IHDR
    pixels, notes = read(path)
    assert_near(pixels, PHOTO, 0)
    assert any("ignored" in note for note in notes)


def test_a_large_text_leaves_the_orientation(tmp_path):
    xmp = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><d tiff:Orientation="6"/></x:xmpmeta>'
    path, shown = tmp_path / "a.png", []
    for text in ("short", "x" * 3_000_000):
        texts = PngImagePlugin.PngInfo()
        texts.add_itxt("XML:com.adobe.xmp", xmp)
        texts.add_text("comment", text, zip=True)
        Image.fromarray(PHOTO).save(path, pnginfo=texts)
        shown.append(read(path)[0])
    assert_near(shown[0], np.rot90(PHOTO, -1), 0)
    assert_near(shown[1], np.rot90(PHOTO, -1), 0)


@pytest.mark.parametrize("bits", [2, 4])
def test_the_transparent_level_of_a_shallow_png_is_white(tmp_path, bits):
    levels = list(range(0, 2**bits, 2 ** (bits - 2)))  # four of them
    row = sum(level << (bits * (3 - place)) for place, level in enumerate(levels))
    rows = b"\0" + (row << 8 >> (4 * bits) if bits == 2 else row).to_bytes(bits // 2, "big")
    path = tmp_path / "a.png"
    path.write_bytes(png(4, 1, 0, rows, bits, struct.pack(">H", levels[1])))
    expected = [255 * level // (2**bits - 1) for level in levels]
    expected[1] = 255
    assert read(path)[0][0, :, 0].tolist() == expected


def png(width, height, kind, rows, bits=8, extra=b""):
    def chunk(name, data):
        body = name + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0))
    extra = chunk(b"tRNS", extra) if extra else b""
    return (b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(rows))
            + chunk(b"IEND", b""))  # fmt: skip


@pytest.mark.parametrize(("kind", "samples"), [(0, deep(GREY)[..., None]), (2, deep(PHOTO) + 3)])
def test_the_transparent_colour_of_a_16_bit_png_is_white(tmp_path, kind, samples):
    samples = np.minimum(samples, 65000).astype(np.uint16)
    key = samples[7, 11]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    path = tmp_path / "a.png"
    path.write_bytes(png(60, 40, kind, rows, 16, key.astype(">u2").tobytes()))
    pixels, notes = read(path)
    clear = (samples == key).all(axis=2)
    assert (pixels[clear] == 255).all()
    assert_near(pixels[~clear], samples[~clear] / 257, 1.01)
    assert "transparency composited on white" in " ".join(notes)


def test_pictures_up_to_the_limit_are_read_without_a_warning(tmp_path):
    path = tmp_path / "a.png"
    Image.new("1", (10_000, 9_500), 1).save(path)  # 95 megapixels
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_picture(path).image.size == (10_000, 9_500)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_larger_ones_are_refused_in_a_line(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    if suffix == "png":
        path.write_bytes(png(20_000, 10_000, 0, b""))
    else:
        path.write_bytes(tiff(20_000, 10_000, 16, b""))
    with pytest.raises(ValueError, match=f"pixels: at most {MAX_PIXELS} can be coded") as error:
        read_picture(path)
    assert "\n" not in str(error.value)


# --- what the name does not say -------------------------------------------------------------------


def test_files_are_read_as_what_they_are(tmp_path):
    (tmp_path / "jpeg.tif").write_bytes(encoded(Image.fromarray(PHOTO), "JPEG", quality=100))
    assert abs(read(tmp_path / "jpeg.tif")[0] - PHOTO).mean() < 2
    tifffile.imwrite(tmp_path / "deep.tif", deep(CMYK), photometric="separated")
    (tmp_path / "deep.tif").rename(tmp_path / "deep.png")
    assert_near(read(tmp_path / "deep.png")[0], RGB_OF_CMYK, 1)


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_the_first_of_several_deep_pages(tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.stack((deep(GREY), 0 * deep(GREY))), photometric="minisblack")
    pixels, notes = read(path)
    assert_near(pixels, GREY[..., None], 0)
    assert FIRST_FRAME in notes


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif"])
def test_of_several_frames_the_first_is_used_and_that_is_said(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    frames = [Image.fromarray(array) for array in (PHOTO, 255 - PHOTO)]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    pixels, notes = read(path)
    assert FIRST_FRAME in notes
    assert abs(pixels - PHOTO).mean() < 12  # GIF has a palette, WebP is lossy
    frames[0].save(path)
    assert FIRST_FRAME not in read(path)[1]


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_jpeg_2000_of_any_depth(tmp_path, bits):
    """White among it, which Pillow turns to black above 8 bits."""
    levels = PHOTO.copy()
    levels[:10] = 255
    most = 2**bits - 1
    samples = np.rint(levels * (most / 255)).astype(np.uint8 if bits == 8 else np.uint16)
    path = tmp_path / "a.jp2"
    path.write_bytes(imagecodecs.jpeg2k_encode(samples, reversible=True, bitspersample=bits))
    assert_near(read(path)[0], levels, 0)


def test_the_profile_in_a_jpeg_2000(tmp_path):
    path = tmp_path / "a.jp2"
    Image.fromarray(PHOTO).save(path)
    data, profile = path.read_bytes(), profile_of(DISPLAY_P3)
    at = data.index(b"colr") - 4
    (length,) = struct.unpack_from(">I", data, at)
    box = b"colr\2\0\0" + profile
    grown = len(box) + 4 - length
    header = data.index(b"jp2h") - 4  # the box around it grows too
    (outer,) = struct.unpack_from(">I", data, header)
    data = data[:at] + struct.pack(">I", len(box) + 4) + box + data[at + length :]
    path.write_bytes(data[:header] + struct.pack(">I", outer + grown) + data[header + 4 :])
    pixels, notes = read(path)
    assert_near(pixels, srgb_of(DISPLAY_P3, PHOTO), 1.6)
    assert "Display P3" in notes[-1]


def test_heic(tmp_path):
    import pillow_heif

    path = tmp_path / "a.heic"
    pillow_heif.from_pillow(Image.fromarray(PHOTO)).save(path, quality=95)
    pixels, notes = read(path)
    assert abs(pixels - PHOTO).mean() < 6
    assert notes == ()


def test_a_camera_s_raw_file_is_refused(tmp_path):
    """It holds a small preview, which would be taken for the photo."""
    path = tmp_path / "a.nef"
    Image.fromarray(PHOTO).save(path, "TIFF")
    with pytest.raises(ValueError, match="raw file; develop it"):
        read_picture(path)
    path = tmp_path / "b.tif"  # under another name
    tifffile.imwrite(path, PHOTO, photometric="rgb", extratags=[(50706, "B", 4, b"\1\4\0\0", True)])
    with pytest.raises(ValueError, match="raw file; develop it"):
        read_picture(path)


def test_a_damaged_exif_is_none(tmp_path):
    path = tmp_path / "a.jpg"
    Image.fromarray(PHOTO).save(path, exif=b"Exif\0\0II*\0\xff\xff\xff\xff", quality=100)
    assert abs(read(path)[0] - PHOTO).mean() < 2


def test_an_orientation_that_there_is_not_turns_nothing(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 99
    path = tmp_path / "a.png"
    Image.fromarray(PHOTO).save(path, exif=exif)
    pixels, notes = read(path)
    assert_near(pixels, PHOTO, 0)
    assert notes == ()


def test_damage_that_libtiff_only_complains_of_is_refused(tmp_path, capfd):
    """It goes on, and leaves the rest of the picture black or white."""
    path = tmp_path / "a.tif"
    Image.fromarray(PHOTO).resize((600, 400)).convert("1").save(path, compression="group4")
    whole = path.read_bytes()
    assert read(path)[0].shape == (400, 600, 3)
    damaged = bytearray(whole)
    at = len(whole) // 2
    damaged[at : at + 40] = np.random.default_rng(0).bytes(40)
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match="damaged: Fax4Decode"):
        read_picture(path)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(("data", "said"), [(b"", "is empty"), (b"II*\0\xff\xff\0\0", "truncated")])
def test_cut_files_are_called_so(tmp_path, data, said):
    (tmp_path / "a.tif").write_bytes(data)
    with pytest.raises(ValueError, match=said):
        read_picture(tmp_path / "a.tif")
