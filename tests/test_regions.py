"""Maps that say where distortion counts more: found by name, resampled, cropped, detected."""

import re
import types

import numpy as np
import pytest
import skimage
import torch
import torch.nn.functional as F
from PIL import Image

from common.errors import InputError
from common.finding import find_images
from common.images import ImageFiles
from config import (
    CompareConfig,
    PretrainConfig,
    RefineConfig,
    load_config,
    parse_command_line,
    resolved,
)
from conftest import ROOT, needs
from datasets import open_images
from regions import detector
from regions.maps import open_maps
from regions.weights import weights_of

KEY = "dev_options.path_weights.folder"
CHELSEA = skimage.data.chelsea()


def save(path, pixels):
    """Write a picture of these pixels; the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels)).save(path)
    return path


def grey(value, height=20, width=30):
    return np.full((height, width), value, np.uint8)


def mapped(images, maps):
    """The images of a folder by name, with the maps at a path."""
    files = ImageFiles(find_images(images))
    files.maps = open_maps(str(maps), files.names, KEY)
    return files, {image.name: image for image in files.load(files.names)}


def refusal(path, names=("a.jpg",)):
    """The one line in which maps are refused."""
    with pytest.raises(InputError) as refused:
        open_maps(str(path), names, KEY)
    message = str(refused.value)
    assert "\n" not in message
    return message


@pytest.fixture
def four(tmp_path):
    """A folder of four small pictures, one of them in a folder within."""
    for name in ("a.jpg", "a.png", "b.tif", "sub/a.jpg"):
        save(tmp_path / "images" / name, CHELSEA[:20, :30])
    return tmp_path / "images"


# --- files of maps


def test_a_map_is_found_by_the_path_of_its_image(four, tmp_path):
    """The exact name wins, then the name with another suffix behind it, then another suffix."""
    maps = tmp_path / "maps"
    values = {"a.jpg.png": 10, "a.png": 20, "b.bmp": 30, "sub/a.PGM": 40}
    for name, value in values.items():
        save(maps / name, grey(value))
    files, images = mapped(four, maps)
    assert files.map_messages == ()
    found = {name: round(image.region.unique().item() * 255) for name, image in images.items()}
    assert found == {"a.jpg": 10, "a.png": 20, "b.tif": 30, "sub/a.jpg": 40}
    for image in images.values():
        assert (image.region.shape, image.region.dtype) == ((1, 20, 30), torch.float32)


def test_images_without_a_map_and_maps_without_an_image_are_named(four, tmp_path):
    maps = tmp_path / "maps"
    for name in ("b.png", "sub/b.png", *(f"c{number}.png" for number in range(6))):
        save(maps / name, grey(9))
    (maps / "notes.txt").write_text("no map")
    files, images = mapped(four, maps)
    assert [name for name, image in images.items() if image.region is not None] == ["b.tif"]
    assert all(image.error is None for image in images.values())
    start = f"{KEY} = {maps}: "
    assert files.map_messages == (
        f"{start}images without a map, refined with equal weights: a.jpg, a.png, sub/a.jpg",
        f"{start}maps without an image: c0.png, c1.png, c2.png, c3.png, c4.png and 2 more",
        f"{start}passed over: 1 no readable image (.txt)",
    )


def test_names_of_image_files_and_clic_without_a_suffix_have_maps(tmp_path):
    """Only suffixes of images are left out: v1 and v2 are parts of names."""
    for name in ("clic_test_0007.png", "photo.v1.png"):
        save(tmp_path / name, grey(5))
    names = ["clic_test_0007", "photo.v1", "photo.v2"]
    maps = open_maps(str(tmp_path), names, KEY)
    picture = Image.fromarray(CHELSEA)
    assert [maps.of(name, picture) is not None for name in names] == [True, True, False]


def test_two_maps_that_fit_as_well_are_refused(tmp_path):
    for name in ("a.png", "a.tif"):
        save(tmp_path / name, grey(5))
    assert refusal(tmp_path) == (
        f"{KEY} = {tmp_path}: the image a.jpg has 2 maps, a.png, a.tif; keep one"
    )


def test_maps_that_cannot_be_used_are_refused_in_a_line(tmp_path):
    save(tmp_path / "other" / "b.png", grey(5))
    (tmp_path / "empty").mkdir()
    text = tmp_path / "text.png"
    text.write_text("no picture")
    start = f"{KEY} = {tmp_path}"
    assert refusal(tmp_path / "none").startswith(f"{start}/none: no such folder or file")
    assert refusal(tmp_path / "empty") == f"{start}/empty: no image in it"
    assert refusal(tmp_path / "other") == (
        f"{start}/other: no map in it is named as an image; the maps are b.png; the images are "
        "a.jpg"
    )
    assert refusal(text).startswith(f"{start}/text.png: cannot identify image file")
    assert refusal("") == f"{KEY} is empty: give a folder of maps, one map for all, or auto"


def test_maps_of_any_size_are_resampled(tmp_path):
    """Larger and smaller ones, against torch's own antialiased bilinear filter."""
    save(tmp_path / "images" / "a.png", CHELSEA[:50, :70])
    for height, width in ((300, 451), (13, 9), (50, 70)):
        level = np.asarray(Image.fromarray(CHELSEA).convert("L").resize((width, height)))
        save(tmp_path / "maps" / "a.png", level)
        region = mapped(tmp_path / "images", tmp_path / "maps")[1]["a.png"].region
        exact = torch.from_numpy(level.copy())[None, None].double() / 255
        expected = F.interpolate(exact, (50, 70), mode="bilinear", antialias=True)[0]
        torch.testing.assert_close(region.double(), expected, rtol=0, atol=1.01 / 255)


def test_maps_of_16_bits_of_colours_and_with_transparency(tmp_path):
    save(tmp_path / "images" / "a.png", CHELSEA[:40, :60])
    deep = np.linspace(0, 65535, 40 * 60).astype(np.uint16).reshape(40, 60)
    file = save(tmp_path / "map.png", deep)
    image = mapped(tmp_path / "images", file)[1]["a.png"]
    expected = torch.from_numpy(deep.astype(np.float32) / 65535)[None]
    torch.testing.assert_close(image.region, expected, rtol=0, atol=0.51 / 255)
    assert image.notes == ("its map: 16 bits of grey scaled to 8 bits and RGB",)
    save(file, CHELSEA[:40, :60])
    image = mapped(tmp_path / "images", file)[1]["a.png"]
    luma = CHELSEA[:40, :60] @ np.array([0.299, 0.587, 0.114]) / 255  # Rec. 601
    np.testing.assert_allclose(image.region[0], luma, rtol=0, atol=0.51 / 255)
    assert image.notes == ()
    clear = np.zeros((40, 60, 4), np.uint8)
    save(file, clear)
    image = mapped(tmp_path / "images", file)[1]["a.png"]
    assert (image.region == 1).all()  # transparent maps lie on white, as photos do: a note says so
    assert image.notes == ("its map: RGBA with transparency composited on white",)


def test_one_map_for_all_has_the_size_of_each_image(photos, tmp_path):
    file = save(tmp_path / "map.png", np.tile(np.linspace(1, 255, 64).astype(np.uint8), (8, 1)))
    files, images = mapped(photos, file)
    assert files.map_messages == ()
    for image in images.values():
        assert image.region.shape[1:] == image.x.shape[1:]
        assert image.region[0, 0, 0] < 0.02 < 0.98 < image.region[0, -1, -1]


def test_a_black_map_for_all_is_refused_at_once(tmp_path):
    file = save(tmp_path / "map.png", grey(0))
    expected = f"{KEY} = {file}: is black all over the image: paint white what counts most"
    assert refusal(file) == expected
    save(file, np.full((20, 30), 100, np.uint16))  # of 65535: 0 of 255
    assert refusal(file) == expected


def test_an_image_whose_map_is_black_or_damaged_is_named_and_the_others_are_read(four, tmp_path):
    maps = tmp_path / "maps"
    save(maps / "a.jpg", grey(0))
    save(maps / "a.png", grey(7))
    faint = np.zeros((500, 500), np.uint8)
    faint[3, 4] = 1  # nothing is left of it in 20x30 pixels
    save(maps / "b.png", faint)
    whole = save(maps / "sub" / "a.png", CHELSEA).read_bytes()
    (maps / "sub" / "a.png").write_bytes(whole[:2000])
    _, images = mapped(four, maps)
    black = "is black all over the image: paint white what counts most"
    assert images["a.jpg"].error == f"its map {maps}/a.jpg {black}"
    assert images["b.tif"].error == f"its map {maps}/b.png {black}"
    assert images["sub/a.jpg"].error.startswith(f"its map {maps}/sub/a.png: ")
    for name in ("a.jpg", "b.tif", "sub/a.jpg"):
        assert images[name].x is None
        assert images[name].region is None
        assert "\n" not in images[name].error
    assert images["a.png"].region is not None


# --- data sets


def config_of(values, write_config, data_set, maps, path=None, **changed):
    """The config of a data set with its maps."""
    options = values["dev_options"]
    options.pop("folder", None)
    options |= {
        data_set: True, "path_test": {data_set: str(path)} if path else {},
        "path_weights": {data_set: str(maps), "kodak" if data_set != "kodak" else "clic": "/none"},
    }  # fmt: skip
    return load_config(write_config(values | changed), RefineConfig)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_crop_of_a_map_is_that_of_its_image(config_values, write_config, tmp_path, num_workers):
    """The images are their own maps, so each region must be the grey of its cropped image."""
    folder = tmp_path / "slides"
    for name in ("s1.tif", "deep/s2.tif"):
        save(folder / name, skimage.data.immunohistochemistry()[:, :, 0])
    config = config_of(config_values, write_config, "pathology", folder, folder, image_size=48)
    images = open_images(config)
    loaded = list(images.load(images.names, num_workers))
    assert [image.name for image in loaded] == ["deep/s2.tif", "s1.tif"]
    for image in loaded:
        assert image.region.shape == (1, 48, 48)
        assert torch.equal(image.region, image.x[:1])
    assert not torch.equal(loaded[0].region, loaded[1].region)


def test_a_map_is_cropped_to_the_same_centre(config_values, write_config, tmp_path):
    """A map of half the size is resampled to the whole image first, then cropped."""
    photo = skimage.data.chelsea()[:90, :120]
    save(tmp_path / "pictures" / "a.png", photo)
    save(tmp_path / "own" / "a.png", photo[..., 0])
    half = np.asarray(Image.fromarray(photo[..., 0]).resize((60, 45)))
    save(tmp_path / "half" / "a.png", half)
    config_values["dev_options"]["centre_crop"] = 33
    loaded = {}
    for maps in ("own", "half"):
        images = open_images(config_of(
            config_values, write_config, "tecnick", tmp_path / maps, tmp_path / "pictures"
        ))  # fmt: skip
        (loaded[maps],) = images.load(images.names)
    assert torch.equal(loaded["own"].region, loaded["own"].x[:1])
    exact = torch.from_numpy(half.copy())[None, None].double() / 255
    whole = F.interpolate(exact, (90, 120), mode="bilinear", antialias=True)[0]
    centre = whole[:, 28:61, 43:76]
    torch.testing.assert_close(loaded["half"].region.double(), centre, rtol=0, atol=1.01 / 255)


def test_a_map_that_is_black_in_the_crop_alone_is_named(config_values, write_config, tmp_path):
    save(tmp_path / "slides" / "s.tif", skimage.data.immunohistochemistry())
    corner = grey(0, 512, 512)
    corner[:2, :2] = 255
    maps = save(tmp_path / "corner.png", corner)
    config = config_of(
        config_values, write_config, "pathology", maps, tmp_path / "slides", image_size=48
    )
    images = open_images(config)
    (image,) = images.load(images.names)
    assert image.error.startswith(f"its map {maps} is black all over the crop")
    config_values["dev_options"] |= {"pathology": False, "centre_crop": 48}
    images = open_images(
        config_of(config_values, write_config, "tecnick", maps, tmp_path / "slides")
    )
    (image,) = images.load(images.names)
    assert image.error.startswith(f"its map {maps} is black all over the crop")


def test_only_the_maps_of_the_data_set_that_is_true_are_opened(
    config_values, write_config, tmp_path
):
    save(tmp_path / "coffee.tif", grey(50))
    images = open_images(config_of(config_values, write_config, "sample", tmp_path))
    assert [image.region is not None for image in images.load(images.names)] == [
        name == "coffee.png" for name in images.names
    ]
    config = config_of(config_values, write_config, "sample", tmp_path / "none")
    with pytest.raises(InputError, match=r"dev_options\.path_weights\.sample = .*none: no such"):
        open_images(config)


@needs("tensorflow_datasets")
def test_clic_from_tensorflow_datasets_has_maps(config_values, write_config, tmp_path):
    import tensorflow_datasets as tfds

    photos = [skimage.data.coffee()[:32, :48], skimage.data.rocket()[:50, :20]]
    tfds.dataset_builders.store_as_tfds_dataset(
        name="clic",
        version="1.0.0",
        data_dir=tmp_path / "tfds",
        features=tfds.builder("clic", data_dir=tmp_path / "tfds").info.features,
        split_datasets={"test": [(key, {"image": photo}) for key, photo in enumerate(photos)]},
    )
    save(tmp_path / "maps" / "clic_test_0001.png", grey(51))
    config = config_of(config_values, write_config, "clic", tmp_path / "maps", tmp_path / "tfds")
    images = open_images(config)
    first, second = images.load(images.names)
    assert first.region is None
    assert torch.equal(second.region, torch.full((1, *second.x.shape[1:]), 51 / 255))
    assert images.map_messages[0].endswith("equal weights: clic_test_0000")


# --- weights


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_weights_have_mean_1_and_follow_the_map(strength):
    region = torch.from_numpy(CHELSEA[None, :, :, 0].astype(np.float32) / 255)
    region[:, :100] = 0
    weights = weights_of(region, strength)
    assert (weights.shape, weights.dtype) == (region.shape, torch.float32)
    assert weights.double().mean().item() == pytest.approx(1, abs=1e-6)
    exact = region.numpy().astype(np.float64)
    expected = (1 - strength) + strength * exact / (exact.sum() / exact.size)
    np.testing.assert_allclose(weights.numpy(), expected, rtol=1e-6)
    if strength == 0:
        assert (weights == 1).all()


# --- the command line


def parsed(path, *arguments):
    return parse_command_line(RefineConfig, "Refine.", ["--config", str(path), *arguments])


def test_roi_sets_the_maps_of_the_data_set_that_is_on_at_last(
    config_values, write_config, photos, tmp_path, monkeypatch
):
    path = write_config(config_values)
    assert parsed(path).dev_options.maps is None
    assert parsed(path, "--roi", "auto").dev_options.path_weights.folder == "auto"
    to_kodak = ("--set", "dev_options.kodak=true", "--set", "dev_options.folder=false")
    options = parsed(path, "--roi", str(photos), *to_kodak).dev_options
    assert options.path_weights.model_dump(exclude_none=True) == {"kodak": str(photos)}
    kodak = write_config(resolved(parsed(path, *to_kodak)), "kodak.json")
    options = parsed(kodak, "--roi", str(photos), "--images", str(photos)).dev_options
    assert (options.data_set, options.maps) == ("folder", str(photos))
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "auto.png", grey(1)).rename("auto")
    assert parsed(path, "--roi", "auto").dev_options.maps == "auto"
    file = parsed(path, "--roi", "./auto")
    assert file.dev_options.maps == "./auto"
    (image,) = open_images(file).load(["a_chelsea.png"])
    assert (image.region * 255 == 1).all()


@pytest.mark.parametrize("roi", ["nowhere", ""])
def test_a_missing_roi_is_one_line(config_values, write_config, roi):
    with pytest.raises(InputError) as refused:
        parsed(write_config(config_values), "--roi", roi)
    assert str(refused.value) == (
        f"--roi {roi}: no such file or folder; give a folder of maps, one map, or auto"
    )


def test_a_wrong_key_beside_roi_is_named(config_values, write_config):
    path = write_config(config_values | {"sead": 1})
    with pytest.raises(InputError, match=f"^{re.escape(str(path))}: unknown key 'sead'"):
        parsed(path, "--roi", "auto")


@pytest.mark.parametrize(
    ("schema", "example"),
    [(PretrainConfig, "pretrain.json"), (CompareConfig, "compare/demo.json")],
)
def test_scripts_without_regions_do_not_know_roi(schema, example, capsys):
    example = str(ROOT / "example_files" / example)
    with pytest.raises(SystemExit):
        parse_command_line(schema, "A script.", ["--config", example, "--roi", "auto"])
    assert "unrecognized arguments: --roi" in capsys.readouterr().err


# --- maps without a file


@pytest.fixture
def detected():
    """The map of a picture as `auto` gives it, uint8 [H, W]."""

    def detect(pixels):
        maps = open_maps("auto", ["a.png"], KEY)
        assert maps.messages == ()
        picture = maps.of("a.png", Image.fromarray(pixels)).image
        assert (picture.mode, picture.size) == ("L", pixels.shape[1::-1])
        return np.asarray(picture)

    return detect


@needs("cv2")
def test_auto_finds_the_face_of_the_astronaut_and_nothing_else(detected):
    region = detected(skimage.data.astronaut())
    assert (region[80:160, 185:265] > 240).all()  # from the forehead to the chin
    for corner in (region[:32, :32], region[:32, -32:], region[-32:, :32], region[-32:, -32:]):
        assert (corner == 26).all()
    assert 0.04 < (region > 140).mean() < 0.12
    assert (region[:, :100] == 26).all()
    assert (region[240:] == 26).all()  # the suit and the helmet


@needs("cv2")
def test_faces_that_look_the_other_way_are_found_at_their_place(monkeypatch):
    """The cascade of profiles knows one side only, so it also searches the mirror image."""
    photo, boxes = skimage.data.astronaut(), []
    for mirrored in (False, True):
        profile = detector.Cascade("profileface", 3, 0.5, mirrored)
        monkeypatch.setattr(detector, "CASCADES", (profile,))
        boxes += detector.find_faces(photo[:, ::-1] if mirrored else photo)
    (x, y, w, h), other = boxes
    assert other == (512 - x - w, y, w, h)
    assert 180 < x < x + w < 300  # a part of her face


@needs("cv2")
def test_auto_finds_what_stands_out_where_there_is_no_face(detected):
    region = detected(skimage.data.coffee())
    assert (region[100:220, 220:360] > 200).mean() > 0.9  # the coffee and the spoon
    assert max(region[:40].max(), region[:, 450:].max()) < 40  # the table
    assert (region.min(), region.max()) == (26, 255)


@needs("cv2")
def test_auto_does_not_depend_on_what_was_done_before_or_on_threads(detected):
    import cv2

    once = {name: detected(getattr(skimage.data, name)()) for name in ("astronaut", "rocket")}
    cv2.setNumThreads(4)
    for name, region in reversed(once.items()):
        assert region.tobytes() == detected(getattr(skimage.data, name)()).tobytes()
    assert cv2.getNumThreads() == 1


@needs("cv2")
def test_auto_is_equal_everywhere_on_one_colour(detected):
    for colour in ((0, 0, 0), (200, 30, 31), (255, 255, 255)):
        region = detected(np.full((70, 90, 3), colour, np.uint8))
        assert (region == 255).all()


@needs("cv2")
@pytest.mark.parametrize("size", [(1, 1), (1, 40), (3, 2), (17, 900), (1000, 30)])
def test_auto_takes_pictures_of_every_size(detected, size):
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    assert detected(pixels).min() >= 26


@needs("cv2")
def test_workers_detect_as_the_main_process_does(photos):
    """After the main process has used OpenCV, whose threads a forked process would lack."""
    files = ImageFiles(find_images(photos), maps=open_maps("auto", [], KEY))
    here = {image.name: image.region for image in files.load(files.names)}
    for image in files.load(files.names, num_workers=2):
        assert torch.equal(image.region, here[image.name])


@pytest.mark.parametrize("part", ["saliency", "data"])
def test_another_opencv_is_refused_before_a_run(monkeypatch, part):
    """As opencv-python has no saliency, and packages of distributions have no cascades."""
    lacking = types.SimpleNamespace(saliency=1, data=1, setNumThreads=lambda number: None)
    delattr(lacking, part)
    monkeypatch.setattr(detector, "import_package", lambda *_: lacking)
    with pytest.raises(InputError, match=f"--roi auto: this cv2 has no {part}: install opencv-con"):
        open_maps("auto", ["a.png"], "key")
