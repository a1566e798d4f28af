"""Every kind of picture comes out as what a person sees: colours, depths, profiles, limits."""

import io
import struct
import warnings

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms, PngImagePlugin

from common.limits import MAX_PIXELS
from common.pictures import read_picture
from common.tiff import FIRST_FRAME
from pixels import (
    CMYK,
    GREY,
    OPACITY,
    PHOTO,
    RGB_OF_CMYK,
    after_header,
    assert_near,
    deep,
    on_white,
    png,
    png_chunk,
    read,
    tiff,
)
from profiles import ADOBE_RGB, DISPLAY_P3, SRGB, profile_of, srgb_of

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
        ("p3", png_chunk(b"cICP", b"\x0c\x0d\0\1"), "Display P3"),
        ("srgb", png_chunk(b"cICP", b"\1\x0d\0\1"), None),
        ("linear", png_chunk(b"gAMA", struct.pack(">I", 100_000)), "gamma 1"),
        ("usual", png_chunk(b"gAMA", struct.pack(">I", 45_455)), None),
    ):
        path = tmp_path / f"{name}.png"
        path.write_bytes(after_header(data, chunk))
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
    path.write_bytes(after_header(path.read_bytes(), png_chunk(b"iCCP", chunk)))
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
    imagecodecs = pytest.importorskip("imagecodecs")
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


@pytest.mark.parametrize("brand", [b"avif", b"mif1"])
def test_avif_of_any_brand(tmp_path, brand):
    """HEIC files may have the brand mif1, too."""
    path = tmp_path / "a.avif"
    Image.fromarray(PHOTO).save(path, quality=95)
    data = path.read_bytes()
    assert data[4:12] == b"ftypavif"
    path.write_bytes(data[:8] + brand + data[12:])
    pixels, notes = read(path)
    assert abs(pixels - PHOTO).mean() < 6
    assert notes == ()


def test_heic(tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif")
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
