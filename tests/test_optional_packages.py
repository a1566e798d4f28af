"""Without the packages that only some of the code needs: the rest works, a line names them."""

import os
import subprocess
import sys
import textwrap

import pytest
from PIL import Image

import datasets
import train
from common.errors import InputError
from common.formats import CODESTREAM
from common.logs import open_tracker
from common.optional_packages import import_tensorflow
from config import RefineConfig, load_config
from conftest import ROOT, needs
from pretraining.tfrecord_index import INDEX_NAME, index_tfrecords

OPTIONAL = (
    "tensorflow", "tensorflow_datasets", "google_crc32c", "pytorch_optimizer", "tensorboard",
    "imagecodecs", "pillow_heif", "constriction", "cv2",
)  # fmt: skip


@pytest.fixture
def hide(monkeypatch):
    """Lets a package look as if it were not installed."""
    return lambda package: monkeypatch.setitem(sys.modules, package, None)


@pytest.fixture
def tfrecords(tmp_path):
    """A folder with a tfrecord of one example."""
    folder = tmp_path / "tfrecords"
    folder.mkdir()
    with import_tensorflow().io.TFRecordWriter(str(folder / "a.tfrecord")) as writer:
        writer.write(b"an example")
    return folder


@pytest.fixture
def run_training(write_config, tmp_path):
    """Runs train.py for a step on the sample photos, or as `changed` says; its exit code."""

    def run(**changed):
        values = {
            "tot_iterations": 1, "train_lambda": 0.01, "channels": {"N": 4, "M": 4},
            "batch_size": 1, "image_size": 64, "save_name": "run", "train_folder": "sample",
            "path_test_data": "", "device": "cpu", "output_dir": str(tmp_path / "out"), **changed,
        }  # fmt: skip
        return train.main(["--config", str(write_config(values))])

    return run


def assert_names(message, user, package, part="training"):
    """The message is the one line that says what to install."""
    assert message.strip().removeprefix("error: ") == (
        f"{user}: needs the package {package}, which is not installed: "
        f"pip install -r requirements/{part}.txt"
    )


def test_every_script_starts_without_them_folders_are_trained_on_and_photos_read(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "8", "JPEG2000")
    data = bytearray((tmp_path / "8").read_bytes())
    data[data.index(CODESTREAM) + 42] = 12 - 1  # the bits of the first colour, less 1
    (tmp_path / "12").write_bytes(data)
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    script = f"""
        import sys
        for package in {OPTIONAL}:
            sys.modules[package] = None
        import benchmark, codec, compare, datasets, train, train_flexible_inference
        from config import PretrainConfig
        from pretraining.draws import Draws
        config = PretrainConfig(train_lambda=0.01, save_name="run", train_folder="sample",
                                image_size=64, batch_size=2)
        data = datasets.open_training_data(config)
        print(tuple(next(data.batches(Draws(0), print)).x.shape))
        for photo in datasets.open_folder({str(tmp_path)!r}, "path").load(["12", "8", "a.heic"]):
            print(photo.error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT, text=True, capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    shape, of_12_bits, of_8_bits, heic = done.stdout.splitlines()
    assert shape == "(2, 3, 64, 64)"
    assert_names(of_12_bits, "JPEG 2000 of 12 bits", "imagecodecs", "refine")
    assert of_8_bits == "None"
    assert_names(heic, "HEIC", "pillow_heif", "refine")


@needs("tensorflow")
@pytest.mark.parametrize("package", ["tensorflow", "google_crc32c"])
@pytest.mark.parametrize("is_indexed", [False, True])
def test_training_on_tfrecords_says_what_to_install(
    run_training, tfrecords, hide, capsys, package, is_indexed
):
    index_tfrecords(tfrecords)
    if not is_indexed:
        (tfrecords / INDEX_NAME).unlink()
    hide(package)
    changed = {"train_folder": "", "train_clic_imagenet": False,
               "path_train": {"train_imagenet": str(tfrecords)}}  # fmt: skip
    assert run_training(**changed) == 2
    assert_names(capsys.readouterr().err, "tfrecords", package)
    assert not tfrecords.with_name("out").exists()


def test_making_tfrecords_says_what_to_install(photos, tmp_path, hide, capsys):
    hide("tensorflow")
    out = tmp_path / "made"
    command = ["make-tfrecords", "--images", str(photos), "--out", str(out), "--shards", "1"]
    assert datasets.main(command) == 2
    assert_names(capsys.readouterr().err, "make-tfrecords", "tensorflow")
    assert not out.exists()


@needs("tensorflow")
@pytest.mark.parametrize("package", ["tensorflow", "tensorflow_datasets"])
def test_clic_says_what_to_install(config_values, write_config, hide, package):
    hide(package)
    config_values["dev_options"] |= {"folder": False, "clic": True, "path_test": {}}
    config = load_config(write_config(config_values), RefineConfig)
    for use in (lambda: datasets.open_images(config), datasets.clic_tfrecords):
        with pytest.raises(InputError) as refused:
            use()
        assert_names(str(refused.value), "tensorflow-datasets' clic", package)


def test_soap_alone_needs_its_package(run_training, hide, capsys):
    hide("pytorch_optimizer")
    assert run_training(optimizer="soap") == 2
    assert_names(capsys.readouterr().err, 'optimizer = "soap"', "pytorch_optimizer")
    assert run_training(optimizer="adam") == 0


def test_a_tracker_says_what_to_install(hide, tmp_path):
    hide("tensorboard")
    with pytest.raises(InputError) as refused:
        open_tracker("tensorboard", "run", tmp_path, {})
    assert_names(str(refused.value), 'tracker = "tensorboard"', "tensorboard")


def test_detected_regions_alone_need_their_package(config_values, write_config, photos, hide):
    hide("cv2")
    options = config_values["dev_options"]
    options["path_weights"] = {"folder": "auto"}
    with pytest.raises(InputError) as refused:
        datasets.open_images(load_config(write_config(config_values), RefineConfig))
    assert_names(str(refused.value), "--roi auto", "cv2", "refine")
    options["path_weights"] = {"folder": str(photos)}
    images = datasets.open_images(load_config(write_config(config_values), RefineConfig))
    assert all(image.region is not None for image in images.load(images.names))
