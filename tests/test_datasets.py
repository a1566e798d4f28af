"""Real files of every kind become x in [0, 1]; what cannot be read is named."""

import os

import numpy as np
import pytest
import skimage
import tifffile
import torch
from PIL import Image

from common.errors import InputError
from common.finding import IMAGE_SUFFIXES, find_images
from common.images import ImageFiles, seed_of
from config import RefineConfig, load_config
from conftest import needs
from datasets import clic_tfrecords, open_images
from pixels import png
from profiles import ADOBE_RGB, srgb_of
from runs import numbers, results
from train_flexible_inference import main

PHOTO = skimage.data.chelsea()[:40, :60]


def load_one(path):
    (image,) = ImageFiles(find_images(path)).load([path.name])
    return image


def expected(pixels):
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1).float() / 255


def save(tmp_path, name, image, **options):
    path = tmp_path / name
    image.save(path, **options)
    return path


def test_a_photo_is_its_pixels(tmp_path):
    image = load_one(save(tmp_path, "a.png", Image.fromarray(PHOTO)))
    assert image.x.shape == (3, 40, 60)
    assert image.notes == ()
    torch.testing.assert_close(image.x, expected(PHOTO), rtol=0, atol=0)


def test_greyscale_and_palette_are_converted_with_a_note(tmp_path):
    grey = Image.fromarray(PHOTO).convert("L")
    image = load_one(save(tmp_path, "grey.png", grey))
    torch.testing.assert_close(image.x, expected(np.stack([np.array(grey)] * 3, -1)))
    assert image.notes == ("L converted to RGB",)
    palette = Image.fromarray(PHOTO).quantize(16)
    image = load_one(save(tmp_path, "palette.gif", palette))
    torch.testing.assert_close(image.x, expected(np.array(palette.convert("RGB"))))
    assert image.notes == ("P converted to RGB",)
    assert load_one(save(tmp_path, "bits.png", grey.convert("1"))).x.shape == (3, 40, 60)


def test_transparency_is_composited_on_white(tmp_path):
    alpha = np.zeros((40, 60, 1), np.uint8)
    alpha[:20] = 255
    alpha[20:30] = 128
    rgba = Image.fromarray(np.concatenate([PHOTO, alpha], -1))
    image = load_one(save(tmp_path, "rgba.png", rgba))
    a = alpha / 255
    white = expected((PHOTO * a + 255 * (1 - a)).astype(np.float32))
    torch.testing.assert_close(image.x, white, rtol=0, atol=1 / 255)
    assert image.notes == ("RGBA with transparency composited on white",)
    palette = Image.fromarray(PHOTO).quantize(16)
    path = save(tmp_path, "palette.png", palette, transparency=palette.getpixel((0, 0)))
    image = load_one(path)
    assert (image.x[:, 0, 0] == 1).all()
    assert "composited on white" in image.notes[0]


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_greyscale_is_scaled(tmp_path, suffix):
    values = np.linspace(0, 65535, 40 * 60).astype(np.uint16).reshape(40, 60)
    image = load_one(save(tmp_path, f"deep.{suffix}", Image.fromarray(values)))
    scaled = torch.from_numpy(values.astype(np.float32) / 65535).expand(3, 40, 60)
    torch.testing.assert_close(image.x, scaled, rtol=0, atol=0.51 / 255)
    assert "16 bits" in image.notes[0]


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_colour_is_scaled(tmp_path, suffix):
    path = tmp_path / f"deep.{suffix}"
    values = PHOTO.astype(np.uint16) * 257
    if suffix == "tif":
        skimage.io.imsave(path, values, check_contrast=False)
    else:
        rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
        path.write_bytes(png(60, 40, 2, rows, 16))
    image = load_one(path)
    torch.testing.assert_close(image.x, expected(PHOTO), rtol=0, atol=1.01 / 255)
    assert "16 bits" in image.notes[0]


def _tiff(path, pixels, **options):
    tifffile.imwrite(path, pixels, **options)
    return load_one(path)


def test_deep_tiffs_of_every_layout(tmp_path):
    """Separate planes, white as zero, alpha: 16 bits that Pillow reads in part or wrongly."""
    generator = np.random.default_rng(0)
    colour = generator.integers(0, 65536, (40, 60, 3), dtype=np.uint16)
    grey = colour[..., 0]
    exact = torch.from_numpy(colour / 65535).permute(2, 0, 1).float()

    def check(image, x):
        torch.testing.assert_close(image.x, x, rtol=0, atol=0.51 / 255)
        assert "16 bits" in image.notes[0]

    planes = _tiff(
        tmp_path / "p.tif", colour.transpose(2, 0, 1), photometric="rgb", planarconfig="separate"
    )
    check(planes, exact)
    check(_tiff(tmp_path / "c.tif", colour, photometric="rgb", compression="deflate"), exact)
    check(
        _tiff(tmp_path / "w.tif", grey, photometric="miniswhite"), 1 - exact[:1].expand(3, -1, -1)
    )
    alpha = np.stack([grey, np.zeros_like(grey)], -1)
    clear = _tiff(tmp_path / "a.tif", alpha, photometric="minisblack", extrasamples=["unassalpha"])
    assert (clear.x == 1).all()
    turned = _tiff(tmp_path / "t.tif", grey, extratags=[(274, "H", 1, 6, True)])
    check(turned, torch.rot90(exact[:1], -1, (1, 2)).expand(3, -1, -1))
    assert "upright" in turned.notes[1]
    for dtype in (np.int32, np.uint32, np.float32):
        image = _tiff(tmp_path / "wide.tif", grey.astype(dtype))
        assert "32-bit" in image.error


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "CMYK"])
def test_turned_tiffs_are_upright(tmp_path, mode):
    image = Image.fromarray(PHOTO).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save(tmp_path, "turned.tif", image, exif=exif)
    loaded = load_one(path)
    upright = np.rot90(np.array(image.convert("RGB")), -1)
    torch.testing.assert_close(loaded.x, expected(upright), rtol=0, atol=0)
    assert "upright" in loaded.notes[0]


def test_damaged_tiffs_never_raise(tmp_path):
    """Two hundred random damages of a compressed TIFF: each is read, or named with its error."""
    path = tmp_path / "whole.tif"
    tifffile.imwrite(path, PHOTO.astype(np.uint16) * 257, photometric="rgb", compression="deflate")
    whole = bytearray(path.read_bytes())
    generator = np.random.default_rng(0)
    errors = 0
    for _ in range(200):
        damaged = bytearray(whole)
        for position in generator.integers(0, len(whole) // 8, 3):
            damaged[position] ^= 1 << int(generator.integers(8))
        path.write_bytes(damaged[: int(generator.integers(len(whole) // 2, len(whole) + 1))])
        image = load_one(path)
        assert (image.x is None) == bool(image.error)
        errors += image.x is None
    assert errors > 50


def test_cmyk_is_converted(tmp_path):
    image = load_one(save(tmp_path, "print.jpg", Image.fromarray(PHOTO).convert("CMYK")))
    torch.testing.assert_close(image.x, expected(PHOTO), rtol=0, atol=0.25)
    assert (image.x - expected(PHOTO)).abs().mean() < 0.03
    assert image.notes == ("CMYK converted to RGB",)


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    image = load_one(save(tmp_path, "turned.png", Image.fromarray(PHOTO), exif=exif))
    torch.testing.assert_close(image.x, expected(np.rot90(PHOTO, -1)), rtol=0, atol=0)
    assert "upright" in image.notes[0]


def test_unreadable_files_are_named_and_do_not_raise(tmp_path):
    whole = save(tmp_path, "whole.png", Image.fromarray(PHOTO)).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "empty.tif").write_bytes(b"")
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "float.tiff")
    for name in ("cut.png", "text.jpg", "empty.tif", "float.tiff"):
        image = load_one(tmp_path / name)
        assert image.x is None
        assert image.name == name
        assert image.error
        assert "\n" not in image.error


def test_a_folder_is_searched_deeply_and_sorted(tmp_path):
    for name in (
        "b/2.PNG",
        "a.jpg",
        "b/1.webp",
        ".hidden.png",
        "notes.txt",
        "b/c/3.JPEG",
        ".git/x.png",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(b"")
    found = [path.relative_to(tmp_path).as_posix() for path in find_images(tmp_path).files]
    assert found == ["a.jpg", "b/1.webp", "b/2.PNG", "b/c/3.JPEG"]
    assert find_images(tmp_path / "a.jpg").files == [tmp_path / "a.jpg"]
    with pytest.raises(InputError, match=f"{tmp_path}/none: no such folder"):
        find_images(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty: no image in it"):
        find_images(tmp_path / "empty")


def test_names_ending_alike_are_kept_apart_and_workers_keep_the_order(tmp_path):
    for name in ("a/x.png", "b/x.png", "c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(PHOTO).save(tmp_path / name)
    files = ImageFiles(find_images(tmp_path))
    chosen = ["c.png", "a/x.png", "b/x.png"]
    assert [image.name for image in files.load(chosen, num_workers=2)] == chosen


def _config(config_values, write_config, data_set, path=None, **values):
    options = config_values["dev_options"]
    options.pop("folder", None)
    options |= {data_set: True, "path_test": {} if path is None else {data_set: str(path)}}
    return load_config(write_config(config_values | values), RefineConfig)


def test_sample_photos_come_from_scikit_image(config_values, write_config):
    images = open_images(_config(config_values, write_config, "sample"))
    loaded = {image.name: image.x for image in images.load(images.names)}
    assert len(loaded) == 4
    torch.testing.assert_close(loaded["coffee.png"], expected(skimage.data.coffee()))
    rocket = srgb_of(ADOBE_RGB, skimage.data.rocket())  # its profile says that it is Adobe RGB
    torch.testing.assert_close(loaded["rocket.jpg"], expected(rocket), rtol=0, atol=1.5 / 255)


def test_tecnick_is_found_in_the_layout_of_testimages(config_values, write_config, tmp_path):
    inside = tmp_path / "TESTIMAGES/RGB/RGB_OR_1200x1200"
    inside.mkdir(parents=True)
    Image.fromarray(PHOTO).save(inside / "RGB_OR_1200x1200_001.png")
    config = _config(config_values, write_config, "tecnick", tmp_path / "TESTIMAGES")
    assert open_images(config).names == ["RGB_OR_1200x1200_001.png"]
    config_values["dev_options"]["path_test"]["tecnick"] = str(inside)
    again = load_config(write_config(config_values), RefineConfig)
    assert open_images(again).names == ["RGB_OR_1200x1200_001.png"]


def test_pathology_gives_seeded_crops_of_tiffs(config_values, write_config, tmp_path):
    folder = tmp_path / "slides"
    folder.mkdir()
    for name in ("s1.tif", "s2.tiff", "other.png"):
        Image.fromarray(skimage.data.immunohistochemistry()).save(folder / name)
    config = _config(config_values, write_config, "pathology", folder, image_size=48)
    images = open_images(config)
    assert images.names == ["s1.tif", "s2.tiff"]
    first, second = images.load(images.names)
    assert first.x.shape == second.x.shape == (3, 48, 48)
    assert not torch.equal(first.x, second.x)
    (again,) = images.load(["s2.tiff"])
    assert torch.equal(again.x, second.x)


def test_missing_paths_are_named(config_values, write_config, tmp_path):
    with pytest.raises(InputError, match=r"dev_options\.path_test\.kodak: kodak is switched on"):
        open_images(_config(config_values, write_config, "kodak"))
    config_values["dev_options"]["path_test"]["kodak"] = str(tmp_path / "nowhere")
    config = load_config(write_config(config_values), RefineConfig)
    with pytest.raises(InputError, match=r"path_test\.kodak = .*nowhere: no such folder"):
        open_images(config)


def test_clic_from_image_files(config_values, write_config, tmp_path):
    folder = tmp_path / "clic"
    folder.mkdir()
    Image.fromarray(PHOTO).save(folder / "photo.png")
    assert open_images(_config(config_values, write_config, "clic", folder)).names == ["photo.png"]


@needs("tensorflow_datasets")
def test_clic_from_tensorflow_datasets(config_values, write_config, tmp_path):
    """A small prepared copy of the real `clic`, read through tensorflow-datasets."""
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
    import tensorflow_datasets as tfds

    photos = [skimage.data.coffee()[:32, :48], skimage.data.rocket()[:50, :20]]
    builder = tfds.builder("clic", data_dir=tmp_path / "tfds")
    features = builder.info.features
    tfds.dataset_builders.store_as_tfds_dataset(
        name="clic",
        version="1.0.0",
        data_dir=tmp_path / "tfds",
        features=features,
        split_datasets={"test": [(key, {"image": photo}) for key, photo in enumerate(photos)]},
    )
    images = open_images(_config(config_values, write_config, "clic", tmp_path / "tfds"))
    assert images.names == ["clic_test_0000", "clic_test_0001"]
    loaded = {tuple(image.x.shape[1:]): image for image in images.load(images.names)}
    for photo in photos:
        torch.testing.assert_close(loaded[photo.shape[:2]].x, expected(photo), rtol=0, atol=0)
    (second,) = images.load(["clic_test_0001"])
    assert second.name == "clic_test_0001"
    config_values["dev_options"]["centre_crop"] = 20
    images = open_images(_config(config_values, write_config, "clic", tmp_path / "tfds"))
    crops = {image.x[0, 0, 0].item(): image.x for image in images.load(images.names)}
    for photo in (photos[0][6:26, 14:34], photos[1][15:35]):
        crop = expected(photo)
        torch.testing.assert_close(crops[crop[0, 0, 0].item()], crop, rtol=0, atol=0)


def test_seeds_differ_by_image_and_seed():
    seeds = {seed_of(seed, name) for seed in range(3) for name in ("a.png", "b.png")}
    assert len(seeds) == 6
    assert all(0 <= seed < 2**48 for seed in seeds)
    assert seed_of(0, "a.png") == seed_of(0, "a.png")


def test_common_suffixes_are_images():
    assert {".png", ".jpg", ".jpeg", ".webp", ".avif", ".tiff"} <= IMAGE_SUFFIXES


def test_a_path_to_clic_is_searched_or_refused_never_downloaded_into(
    config_values, write_config, tmp_path, monkeypatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    nested = tmp_path / "pictures" / "clic" / "valid"
    nested.mkdir(parents=True)
    Image.fromarray(PHOTO).save(nested / "photo.png")
    images = open_images(_config(config_values, write_config, "clic", "~/pictures"))
    assert images.names == ["clic/valid/photo.png"]
    for path in ("~/fotos", str(tmp_path / "empty")):
        (tmp_path / "empty").mkdir(exist_ok=True)
        config_values["dev_options"]["path_test"]["clic"] = path
        with pytest.raises(InputError, match=r"path_test\.clic = .*: no "):
            open_images(load_config(write_config(config_values), RefineConfig))
    assert sorted(file.name for file in tmp_path.iterdir() if file.is_dir()) == [
        "empty",
        "photos",
        "pictures",
    ]
    with pytest.raises(InputError, match=r"train_clic_imagenet: no clic that tensorflow-datasets"):
        clic_tfrecords(str(tmp_path / "pictures"))


def test_crops_do_not_change_with_the_seed_of_the_noise(config_values, write_config, tmp_path):
    Image.fromarray(skimage.data.immunohistochemistry()).save(tmp_path / "s.tif")
    one, two, other = (
        open_images(_config(config_values | seeds, write_config, "pathology", tmp_path))
        for seeds in ({"seed": 0}, {"seed": 5}, {"crop_seed": 5})
    )
    x = [next(iter(images.load(["s.tif"]))).x for images in (one, two, other)]
    assert torch.equal(x[0], x[1])
    assert not torch.equal(x[0], x[2])


# --- the centre of each image


@pytest.mark.parametrize("side", [1, 7, 8, 39])
def test_a_centre_crop_is_as_far_from_either_side(config_values, write_config, tmp_path, side):
    """To half a pixel; a turned photo has the turned crop where this is exact."""
    folder = tmp_path / "sizes"
    folder.mkdir()
    config_values["dev_options"]["centre_crop"] = side
    for height, width in ((39, 39), (40, 60), (39, 60), (40, 59)):
        photo = skimage.data.chelsea()[:height, :width]
        Image.fromarray(photo).save(folder / f"{height}x{width}.png")
        Image.fromarray(photo[::-1, ::-1]).save(folder / f"{height}x{width} turned.png")
    images = open_images(_config(config_values, write_config, "folder", folder))
    crops = {image.name.removesuffix(".png"): image.x for image in images.load(images.names)}
    for name in ("39x39", "40x60", "39x60", "40x59"):
        height, width = map(int, name.split("x"))
        rows, columns = (
            [at for at in range(length) if -side <= 2 * at - (length - 1) < side]
            for length in (height, width)
        )
        assert len(rows) == len(columns) == side
        photo = skimage.data.chelsea()[:height, :width]
        exact = expected(photo[np.ix_(rows, columns)])
        torch.testing.assert_close(crops[name], exact, rtol=0, atol=0)
        if (height - side) % 2 == (width - side) % 2 == 0:
            assert torch.equal(crops[f"{name} turned"], exact.flip(1, 2))


def test_an_image_smaller_than_the_crop_is_skipped_with_the_reason(
    config_values, write_config, photos, capsys
):
    """Also of photos that the command line names; the other one is refined as its centre."""
    options = config_values["dev_options"]
    options |= {"folder": False, "sample": True, "centre_crop": 70, "save_final": True}
    path = write_config(config_values | {"tot_inference_iterations": 1})
    assert main(["--config", str(path), "--images", str(photos)]) == 1
    out = capsys.readouterr().out
    for name, size in (("b_coffee.png", "64x64"), ("c_rocket.png", "100x64")):
        reason = f"{name}: skipped: has {size} pixels; its crop needs 70 or more a side"
        assert out.count(reason) == 1
    (record,) = numbers(results(config_values))
    assert (record["name"], record["width"], record["height"]) == ("a_chelsea.png", 70, 70)
    refined = results(config_values) / "reconstructions/a_chelsea.png/original.png"
    centre = np.array(Image.open(photos / "a_chelsea.png"))[:70, 5:75]
    assert np.array_equal(np.array(Image.open(refined)), centre)


def test_crops_of_pathology_are_not_cropped_again(config_values, write_config, tmp_path):
    config_values["dev_options"]["centre_crop"] = 48
    with pytest.raises(InputError, match="centre_crop: pathology images have the crops of image"):
        _config(config_values, write_config, "pathology", tmp_path)
