"""The way from a folder of images to tfrecords: what they hold, and what a kill leaves."""

import io
import json
import os
import signal
import time

import numpy as np
import pytest
from forks import Fork
from PIL import Image

import datasets
from common.finding import find_images
from common.images import ImageFiles
from common.optional_packages import import_tensorflow
from conftest import needs
from crops import convert, draw, encode, numbers_of, picture
from pretraining.make_tfrecords import MANIFEST_NAME
from profiles import DISPLAY_P3, profile_of

pytestmark = needs("tensorflow")


def read_examples(folder):
    """Every example's features, read by tensorflow itself."""
    tf = import_tensorflow()
    files = [str(file) for file in sorted(folder.glob("*.tfrecord"))]
    found = []
    for raw in tf.data.TFRecordDataset(files).as_numpy_iterator():
        features = tf.train.Example.FromString(raw).features.feature
        found.append({key: value.bytes_list.value[0] for key, value in features.items()})
    return found


def test_converted_images_are_the_files_themselves(numbered_folder, tmp_path, capsys):
    (numbered_folder / "photo.jpg").write_bytes(encode(picture(7), "JPEG"))
    (numbered_folder / "photo.webp").write_bytes(encode(picture(8), "WEBP", lossless=True))
    (numbered_folder / "broken.jpg").write_bytes(encode(picture(9), "JPEG")[:300])
    out = tmp_path / "out"
    assert convert(numbered_folder, out, shards=3) == 1
    assert "could not read broken.jpg" in capsys.readouterr().err
    assert len(list(out.glob("*.tfrecord"))) == 3
    found = read_examples(out)
    originals = {
        file.read_bytes() for file in numbered_folder.rglob("*.*") if "broken" not in file.name
    }
    webp = (numbered_folder / "photo.webp").read_bytes()
    assert originals - {example["image"] for example in found} == {webp}
    assert len(found) == 8
    for example in found:
        pixels = np.asarray(Image.open(io.BytesIO(example["image"])))
        sizes = [int(example[key]) for key in ("height", "width", "channels")]
        assert sizes == list(pixels.shape)
        if example["image"] not in originals:
            assert np.array_equal(pixels, picture(8))
    drawn, skipped = draw(out, 8)
    assert sorted(numbers_of(drawn))[:6] == list(range(6))
    assert not skipped


def test_tfrecords_hold_the_pixels_that_folders_give(tmp_path, converted_here):
    """Transparency, orientation, colour profile, inks, depth: what a decoder alone gets wrong."""
    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    photo, exif = Image.fromarray(picture(3)), Image.Exif()
    exif[0x0112] = 6
    clear = photo.copy()
    clear.putalpha(Image.linear_gradient("L").resize(photo.size))
    clear.save(images / "clear.png")
    photo.quantize(9).save(images / "key.png", transparency=3)
    photo.save(images / "turned.jpg", exif=exif, quality=100)
    photo.save(images / "turned.png", exif=exif)
    photo.save(images / "p3.png", icc_profile=profile_of(DISPLAY_P3))
    photo.save(images / "p3.jpg", icc_profile=profile_of(DISPLAY_P3))
    photo.convert("CMYK").save(images / "inks.jpg")
    Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) * 257).save(
        images / "deep.png"
    )
    plain = {"plain.jpg": photo, "plain.png": photo, "grey.jpg": photo.convert("L"),
             "palette.png": photo.quantize(50)}  # fmt: skip
    for name, image in plain.items():
        image.save(images / name)
    assert convert(images, out, shards=1) == 0
    found = [example["image"] for example in read_examples(out)]
    assert {(images / name).read_bytes() for name in plain} <= {*found}
    tf = import_tensorflow()
    decoded = {tf.io.decode_image(data, 3).numpy().tobytes() for data in found}
    files = ImageFiles(find_images(images))
    for index, name in enumerate(files.names):
        if name != "plain.jpg" and name != "grey.jpg":  # two decoders of JPEG
            assert np.asarray(files.picture(index).image).tobytes() in decoded, name


def test_a_conversion_goes_on_where_it_was(numbered_folder, tmp_path, capsys, converted_here):
    out = tmp_path / "out"
    assert convert(numbered_folder, out) == 0
    before = sorted(example["image"] for example in read_examples(out))
    first, second = sorted(out.glob("*.tfrecord"))
    stamp = second.stat().st_mtime_ns
    first.unlink()
    assert convert(numbered_folder, out) == 0
    assert second.stat().st_mtime_ns == stamp
    assert sorted(example["image"] for example in read_examples(out)) == before
    assert convert(numbered_folder, out, shards=3) == 2
    assert "choose another folder" in capsys.readouterr().err


def test_a_conversion_stopped_before_its_first_example_goes_on(
    numbered_folder, tmp_path, converted_here
):
    """What a kill within the first shard leaves: a list of nothing and a torn temporary file."""
    out = tmp_path / "out"
    assert convert(numbered_folder, out) == 0
    for file in out.glob("*.tfrecord"):
        file.unlink()
    (out / ".0123.tmp.tfrecord").write_bytes(b"torn")
    manifest = json.loads((out / MANIFEST_NAME).read_text())
    (out / MANIFEST_NAME).write_text(json.dumps({**manifest, "done": {}}))
    assert convert(numbered_folder, out) == 0
    assert len(read_examples(out)) == 6
    assert not list(out.glob(".*"))


def test_changed_images_are_not_taken_for_converted_ones(
    numbered_folder, tmp_path, capsys, converted_here
):
    assert convert(numbered_folder, tmp_path / "out") == 0
    (numbered_folder / "0.png").write_bytes(encode(picture(77)))
    assert convert(numbered_folder, tmp_path / "out") == 2
    assert "choose another folder" in capsys.readouterr().err


def test_a_killed_conversion_leaves_whole_shards_only(tmp_path, converted_here):
    rng = np.random.default_rng(0)
    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    for number in range(60):
        noise = rng.integers(0, 256, (300, 300, 3), dtype=np.uint8)
        (images / f"{number}.png").write_bytes(encode(noise))
    command = ["make-tfrecords", "--images", str(images), "--out", str(out), "--shards", "30",
               "--workers", "1"]  # fmt: skip
    process = Fork(f"import datasets; datasets.main({command})")
    deadline = time.time() + 120
    while len(list(out.glob("*.tfrecord"))) < 2 and time.time() < deadline:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.join()
    assert len(list(out.glob("*.tfrecord"))) >= 2
    assert convert(images, out, shards=30) == 0
    assert len({example["image"] for example in read_examples(out)}) == 60
    assert len(json.loads((out / MANIFEST_NAME).read_text())["done"]) == 30


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--images", "nowhere", "--out", "out", "--shards", "1"), "nowhere: no such folder"),
        (("--images", "IMAGES", "--out", "out", "--shards", "0"), "--shards 0"),
        (("--images", "IMAGES", "--out", "out", "--shards", "99"), "--shards 99: more than"),
        (("--images", "IMAGES", "--out", "RECORDS", "--shards", "1"), "holds tfrecords already"),
    ],
)
def test_a_wrong_conversion_is_one_line(
    numbered_folder, tfrecords, tmp_path, capsys, options, message
):
    known = {"IMAGES": numbered_folder, "RECORDS": tfrecords, "out": tmp_path / "out"}
    arguments = [str(known.get(part, part)) for part in options]
    assert datasets.main(["make-tfrecords", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error
