"""Open the images that a config names, to refine, to test on, or to train on.

python datasets.py make-tfrecords --images PHOTOS --out data/tfrecords --shards 8
python datasets.py make-tfrecords --images PHOTOS --out data/tfrecords --shards 8 --workers 4
python datasets.py make-tfrecords --help
"""

import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import skimage
from PIL import Image

from common.command_line import script_parser
from common.errors import InputError, exits_with_one_line, named_by
from common.files import user_path
from common.finding import TIFF_SUFFIXES, Found, find_by_suffix, find_images
from common.images import (
    CentreCrop,
    ImageFiles,
    Images,
    LoadedImage,
    MappedAndCropped,
    SeededCrop,
    load_image,
)
from common.optional_packages import import_tensorflow_datasets
from config import PretrainConfig, RefineConfig
from pretraining.draws import TrainingData
from pretraining.folder_crops import FolderCrops
from pretraining.make_tfrecords import write_tfrecords
from pretraining.tfrecord_crops import TfrecordCrops
from pretraining.tfrecord_index import TfrecordIndex, index_files, index_tfrecords
from regions.maps import open_maps

# Public domain or CC0; they are part of scikit-image's package.
SAMPLE_PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")


def open_images(config: RefineConfig) -> Images:
    """The data set of a refinement config, with its crop and maps; no image is read yet.

    Raises:
        InputError: its path is not in the config, nothing is there, or a package is not installed;
            see also `open_maps`.
    """
    images, options = _open_data_set(config), config.dev_options
    if options.centre_crop is not None:
        images.crop = CentreCrop(options.centre_crop)
    if options.maps is not None:
        key = f"dev_options.path_weights.{options.data_set}"
        images.maps = open_maps(options.maps, images.names, key)
    return images


def _open_data_set(config: RefineConfig) -> Images:
    """See `open_images`; without maps."""
    options = config.dev_options
    chosen = options.data_set
    if chosen == "sample":
        return sample_photos()
    path, key = getattr(options.path_test, chosen), f"dev_options.path_test.{chosen}"
    if chosen == "clic" and (path is None or is_prepared_clic(path)):
        return ClicImages(path)
    if not path:
        raise InputError(f"{key}: {chosen} is switched on but has no path; name its folder here")
    rgb_folder = Path(path) / "RGB" / "RGB_OR_1200x1200"
    if chosen == "tecnick" and rgb_folder.is_dir():
        return open_folder(rgb_folder, key)
    if chosen == "pathology":
        with named_by(key):
            found = find_by_suffix(path, TIFF_SUFFIXES)
            return ImageFiles(found, SeededCrop(config.image_size, config.crop_seed))
    return open_folder(path, key)


def sample_photos() -> ImageFiles:
    """The four photos that come with scikit-image."""
    root = Path(skimage.__file__).parent / "data"
    return ImageFiles(Found(root, [root / name for name in SAMPLE_PHOTOS], ""))


def open_folder(path: str | Path, key: str) -> ImageFiles:
    """The images below a folder, or the one file; "sample" stands for the sample photos.

    Args:
        key: the config's key that holds the path; messages begin with it.

    Raises:
        InputError: nothing is there, or no image is in it.
    """
    if path == "sample":
        return sample_photos()
    with named_by(key):
        return ImageFiles(find_images(path))


def open_training_data(config: PretrainConfig) -> TrainingData:
    """The training data of a config: a folder of images, or tfrecords of ImageNet and CLIC.

    Raises:
        InputError: nothing is there, CLIC cannot be prepared, or a package is not installed.
        OSError: a tfrecord file cannot be read.
    """
    if config.train_folder:
        images = open_folder(config.train_folder, "train_folder")
        return FolderCrops(
            images, config.image_size, config.batch_size, config.num_workers,
            config.smallest_scale,
        )  # fmt: skip
    index = index_tfrecords(config.path_train.train_imagenet)
    if config.train_clic_imagenet:
        index = index.merged_with(clic_tfrecords(config.path_train.train_clic or None))
    return TfrecordCrops(
        index, config.image_size, config.batch_size, config.cycle_length, config.num_workers,
        config.smallest_scale,
    )  # fmt: skip


# --- CLIC 2020 through tensorflow-datasets --------------------------------------------------------


class ClicImages(MappedAndCropped):
    """The test split of tensorflow-datasets' `clic`; it is downloaded on first use.

    Raises:
        InputError: it cannot be prepared, or tensorflow-datasets is not installed.
    """

    split = "test"
    passed_over = ""

    def __init__(self, data_dir: str | None):
        self._tfds = import_tensorflow_datasets()
        self._builder = prepare_clic(
            data_dir,
            "dev_options.clic",
            'dev_options.path_test.clic, or use "folder" with CLIC\'s image files',
        )
        count = self._builder.info.splits[self.split].num_examples
        self.names = [f"clic_{self.split}_{index:04d}" for index in range(count)]

    def load(self, names: Iterable[str], num_workers: int = 0) -> Iterator[LoadedImage]:
        """The images of these names, in this order; reads on from one to the next."""
        position = {name: index for index, name in enumerate(self.names)}
        examples, at = self._examples(), 0
        for name in names:
            if position[name] < at:
                examples, at = self._examples(), 0
            example = next(islice(examples, position[name] - at, None))
            at = position[name] + 1
            image = Image.fromarray(example["image"])
            yield load_image(name, image, maps=self.maps, crop=self.crop)

    def _examples(self) -> Iterator[dict[str, Any]]:
        """The split's examples from the first one on, in the order of `names`."""
        data = self._builder.as_dataset(
            split=self.split,
            shuffle_files=False,
            read_config=self._tfds.ReadConfig(interleave_cycle_length=1),
        )
        return iter(data.as_numpy_iterator())


def is_prepared_clic(path: str) -> bool:
    """Whether tensorflow-datasets has prepared `clic` in this folder."""
    return any(Path(path).glob("clic/*/dataset_info.json"))


def prepare_clic(data_dir: str | None, key: str, remedy: str, **options: Any) -> Any:
    """tensorflow-datasets' builder of `clic`, which is downloaded only if no folder is given.

    Args:
        data_dir: a folder that holds CLIC prepared, or None.
        key: the config's key that switches CLIC on; messages begin with it.
        remedy: where to name the folder, for messages.
        options: of `tfds.builder`.

    Raises:
        InputError: the folder holds no prepared CLIC, CLIC cannot be prepared, or
            tensorflow-datasets is not installed.
    """
    if data_dir is not None and not is_prepared_clic(data_dir):
        raise InputError(
            f"{key}: no clic that tensorflow-datasets has prepared in {data_dir} "
            f"(clic/VERSION/dataset_info.json); name its folder in {remedy}, or leave it out to "
            "download"
        )
    tfds = import_tensorflow_datasets()
    try:
        builder = tfds.builder("clic", data_dir=data_dir, **options)
        builder.download_and_prepare()
    except Exception as error:  # tfds and its HTTP libraries raise dozens of kinds
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(
            f"{key}: cannot prepare tensorflow-datasets' clic ({reason}); where there is no "
            f"network, prepare it elsewhere and name its folder in {remedy}"
        ) from None
    return builder


def clic_tfrecords(data_dir: str | None = None) -> TfrecordIndex:
    """Index the train split of tensorflow-datasets' `clic`; it is downloaded on first use.

    Raises:
        InputError: it cannot be prepared, its files cannot be read, or a package is not installed.
    """
    key = "train_clic_imagenet"
    builder = prepare_clic(
        data_dir, key, "path_train.train_clic, or set train_clic_imagenet to false",
        file_format="tfrecord",
    )  # fmt: skip
    files = [Path(file) for file in builder.info.splits["train"].filepaths]
    try:
        index = index_files(files, None)
    except OSError as error:
        raise InputError(f"{key}: {error.filename}: {error.strerror}") from None
    return replace(index, resized=(True,) * len(files))


# --- the command line ----------------------------------------------------------------------------


@exits_with_one_line
def main(argv: Sequence[str] | None = None) -> int:
    """Make tfrecords; exit code 1 if an image could not be read and all others were written."""
    parser = script_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("make-tfrecords", help="turn a folder of images into tfrecords")
    make.add_argument("--images", type=user_path, required=True, help="folder, deep or flat")
    make.add_argument("--out", type=user_path, required=True, help="folder of the tfrecords")
    make.add_argument("--shards", type=int, required=True, help="number of tfrecord files")
    make.add_argument("--workers", type=int, default=0, help="processes; 0 is one a core")
    arguments = parser.parse_args(argv)
    for option in ("shards", "workers"):
        if getattr(arguments, option) < (option == "shards"):
            raise InputError(f"--{option} {getattr(arguments, option)}: too small")
    images, out = Path(arguments.images), Path(arguments.out)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # end the workers, too
    try:
        unreadable = write_tfrecords(images, out, arguments.shards, arguments.workers)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        return 130
    for name, why in sorted(unreadable.items()):
        print(f"could not read {name}: {why}", file=sys.stderr)
    print(f"{out}: {arguments.shards} shards; {len(unreadable)} images could not be read")
    return 1 if unreadable else 0


if __name__ == "__main__":
    sys.exit(main())
