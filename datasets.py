"""Files become tensors: named images to refine, and endless batches of crops to train on.

python datasets.py make-tfrecords --images PHOTOS --out data/tfrecords --shards 8
python datasets.py make-tfrecords --images PHOTOS --out data/tfrecords --shards 8 --workers 4
python datasets.py make-tfrecords --help

A data set to refine has `names`, known before anything is read, and `load(names)`, which yields
one `LoadedImage` a name, x [3, H, W] in [0, 1], also of a file that cannot be read: its `error`.

Training data are drawn: draw g = 0, 1, 2, ... is an image, a crop and a flip, all a function of the
seed and g alone. Rank r of w takes the draws g = r (mod w), so that any batch can be found again.
"""

import hashlib
import io
import itertools
import json
import os
import re
import signal
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import google_crc32c
import numpy as np
import skimage
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms import RandomResizedCrop
from tqdm import tqdm

from common.command_line import script_parser
from common.console import native_stderr
from common.errors import InputError, exits_with_one_line
from common.files import printable, user_path, write_whole
from common.finding import TIFF_SUFFIXES, Found, find_by_suffix, find_images
from common.pictures import Picture, read_picture
from config import PretrainConfig, RefineConfig

# Public domain or CC0, shipped inside scikit-image's package.
SAMPLE_PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")


class LoadedImage(NamedTuple):
    """One image: x [3, H, W] in [0, 1], what was converted, or why it cannot be read."""

    name: str
    x: Tensor | None
    notes: tuple[str, ...] = ()
    error: str | None = None


class Images(Protocol):
    """What refinement needs of a data set; `passed_over` says in a line what is not in it."""

    names: list[str]
    passed_over: str

    def load(self, names: Sequence[str], num_workers: int) -> Iterator[LoadedImage]:
        """The images of these names, in this order."""


def seed_of(seed: int, name: str) -> int:
    """A seed in [0, 2^48) of one image, whatever the order or the subset of the others.

    Of these, torch's CPU generator uses the low 32 bits.
    """
    text = f"{seed}:{name}".encode(errors="surrogateescape")
    return int.from_bytes(hashlib.sha256(text).digest()[:6], "big")


# --- files ----------------------------------------------------------------------------------------


class UnreadableError(Exception):
    """An image file cannot be read; one line that says why."""


def _reason(error: Exception, file: Path, name: str) -> str:
    """What a decoder says of a damaged file, in a line that names it as its set does."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    shown = text.replace(str(file), printable(name)).strip() or type(error).__name__
    shown = re.sub(r"<_io\.BytesIO[^>]*>", lambda _: printable(name), shown)
    return printable(shown.splitlines()[0])


class ImageFiles(Dataset):
    """Image files on disk, whole or (with `crop`) one seeded random resized crop of each.

    An item is a `LoadedImage`; its name is the path below the folder.
    """

    def __init__(self, found: Found, crop: int | None = None, seed: int = 0):
        self.files = {file.relative_to(found.root).as_posix(): file for file in found.files}
        self.names = list(self.files)
        self.passed_over = found.passed_over
        self.crop = crop
        self.seed = seed

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> LoadedImage:
        name = self.names[index]
        try:
            picture = self.picture(index)
        except UnreadableError as error:
            return LoadedImage(name, None, error=str(error))
        image = picture.image
        if self.crop is not None:
            image = seeded_crop(image, self.crop, seed_of(self.seed, name))
        return LoadedImage(name, to_tensor(image), picture.notes)

    def picture(self, index: int) -> Picture:
        """An upright RGB picture of 8 bits, and what was converted in it.

        Raises:
            UnreadableError: it cannot be read; says why.
        """
        name = self.names[index]
        try:
            return read_picture(self.files[name])
        except Exception as error:  # damaged files make decoders raise dozens of kinds
            raise UnreadableError(_reason(error, self.files[name], name)) from None

    def load(self, names: Sequence[str], num_workers: int = 0) -> Iterator[LoadedImage]:
        """The images of these names, in this order, read ahead by `num_workers` processes."""
        position = {name: index for index, name in enumerate(self.names)}
        chosen = Subset(self, [position[name] for name in names])
        yield from DataLoader(
            chosen, batch_size=None, num_workers=num_workers, collate_fn=_as_it_is,
            generator=torch.Generator(),
        )  # fmt: skip


def _as_it_is(image: LoadedImage) -> LoadedImage:
    return image


def to_tensor(image: Image.Image) -> Tensor:
    """x [3, H, W] in [0, 1] of an RGB picture."""
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8))  # [H, W, 3]
    return pixels.permute(2, 0, 1).contiguous().float() / 255


def save_picture(path: Path, x: Tensor) -> Path:
    """A PNG of x [3, H, W], clamped to [0, 1] and rounded to 8 bits."""
    return write_whole(path, lambda file: Image.fromarray(to_pixels(x)).save(file, format="PNG"))


def to_pixels(x: Tensor) -> np.ndarray:
    """uint8 [H, W, 3] of x [3, H, W], clamped to [0, 1]."""
    return (x.detach().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()


def seeded_crop(image: Image.Image, size: int, seed: int) -> Image.Image:
    """torchvision's random resized crop to [size, size], the same one for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return RandomResizedCrop(size)(image)


# --- CLIC 2020 through tensorflow-datasets --------------------------------------------------------


class ClicImages:
    """The test split of tensorflow-datasets' `clic`, downloaded on first use."""

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

    def load(self, names: Sequence[str], num_workers: int = 0) -> Iterator[LoadedImage]:
        """The images of these names in the data set's own order; one pass over the split."""
        wanted = set(names)
        records = self._builder.as_dataset(
            split=self.split,
            shuffle_files=False,
            read_config=self._tfds.ReadConfig(interleave_cycle_length=1),
        )
        for name, record in zip(self.names, records.as_numpy_iterator(), strict=True):
            if name in wanted:
                yield LoadedImage(name, to_tensor(Image.fromarray(record["image"])))


def is_prepared_clic(path: str) -> bool:
    """Whether a folder is one of tensorflow-datasets in which `clic` lies prepared."""
    return any(Path(path).glob("clic/*/dataset_info.json"))


def prepare_clic(data_dir: str | None, key: str, remedy: str, **options: Any):
    """tensorflow-datasets' builder of `clic`; downloaded only where no folder is given.

    Raises:
        InputError: it cannot be, or the folder holds none; the line starts with `key` and names the
            folder `remedy`.
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


def import_tensorflow():
    """tensorflow, imported late (4 s), after torch, quiet, and kept off the GPU."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with native_stderr():  # some lines heed no level
        import tensorflow as tf

        tf.config.set_visible_devices([], "GPU")
    return tf


def import_tensorflow_datasets():
    """tensorflow-datasets, imported late like tensorflow."""
    import_tensorflow()
    import tensorflow_datasets as tfds

    return tfds


# --- choosing one ---------------------------------------------------------------------------------


def open_images(config: RefineConfig) -> Images:
    """The data set that a refinement config switches on; opens no image yet.

    Raises:
        InputError: its path is missing from the config or from the disk.
    """
    options = config.dev_options
    chosen = options.data_set
    if chosen == "sample":
        return sample_photos()
    path, key = getattr(options.path_test, chosen), f"dev_options.path_test.{chosen}"
    if chosen == "clic" and (path is None or is_prepared_clic(path)):
        return ClicImages(path)
    if not path:
        raise InputError(f"{key}: {chosen} is switched on but has no path; name its folder here")
    inside = Path(path) / "RGB" / "RGB_OR_1200x1200"
    if chosen == "tecnick" and inside.is_dir():
        return open_folder(inside, key)
    if chosen == "pathology":
        with named_by(key):
            found = find_by_suffix(path, TIFF_SUFFIXES)
            return ImageFiles(found, config.image_size, config.crop_seed)
    return open_folder(path, key)


def sample_photos() -> ImageFiles:
    """The four photos that come with scikit-image."""
    root = Path(skimage.__file__).parent / "data"
    return ImageFiles(Found(root, [root / name for name in SAMPLE_PHOTOS], ""))


def open_folder(path: str | Path, key: str) -> ImageFiles:
    """The images below a folder, or the one file; "sample" is the sample photos.

    Raises:
        InputError: nothing there; the line starts with `key`, which named the path.
    """
    if path == "sample":
        return sample_photos()
    with named_by(key):
        return ImageFiles(find_images(path))


@contextmanager
def named_by(key: str) -> Iterator[None]:
    """Let an InputError on a path begin with the key that named it."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{key} = {error}") from None


# --- drawing for training -------------------------------------------------------------------------

READ_FAILED, TOO_SMALL = "not readable", "smaller than the crop"


class Batch(NamedTuple):
    """x, uint8 [B, 3, S, S] in channels-last memory; `position`: this rank's draws so far."""

    x: Tensor
    position: int


class Draws(NamedTuple):
    """Which draws are this process's: those g = rank (mod world), from its own `position` on."""

    seed: int
    rank: int = 0
    world: int = 1
    position: int = 0

    def numbers(self) -> Iterator[int]:
        """This process's draws g, without end."""
        return itertools.count(self.position * self.world + self.rank, self.world)

    def position_after(self, g: int) -> int:
        """How many draws this process has consumed once it has used draw g."""
        return g // self.world + 1


class TrainingData(Protocol):
    """What pre-training needs of its data; `passed_over` says in a line what is not in it."""

    count: int
    name: str
    passed_over: str

    def batches(self, draws: Draws, on_skip: Callable[[str, str], None]) -> Iterator[Batch]:
        """Batches without end; on_skip(name, reason) hears of what could not be used."""


def open_training_data(config: PretrainConfig) -> TrainingData:
    """The training data of a config: a folder of images, or tfrecords of ImageNet and CLIC.

    Raises:
        InputError: nothing there, or CLIC cannot be prepared.
    """
    if config.train_folder:
        images = open_folder(config.train_folder, "train_folder")
        return FolderCrops(images, config.image_size, config.batch_size, config.num_workers)
    records = imagenet_tfrecords(config.path_train.train_imagenet)
    if config.train_clic_imagenet:
        records = records.joined(clic(config.path_train.train_clic or None))
    return RecordCrops(
        records, config.image_size, config.batch_size, config.cycle_length, config.num_workers
    )


class FolderCrops:
    """Random crops of image files, decoded by torch's data loader; needs no tensorflow."""

    def __init__(self, images: ImageFiles, size: int, batch_size: int, num_workers: int = 0):
        self.images = images
        self.size = size
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.count = len(images)
        self.name = "image files"
        self.passed_over = images.passed_over

    def batches(self, draws: Draws, on_skip: Callable[[str, str], None]) -> Iterator[Batch]:
        """Batches without end, see `TrainingData`.

        Raises:
            InputError: no image gives a crop.
        """
        loader = DataLoader(
            _DrawnCrops(self.images, self.size, draws.seed), batch_size=None,
            sampler=_EndlessSampler(draws), num_workers=self.num_workers,
            collate_fn=_as_it_is, worker_init_fn=_leave_signals_to_the_main_process,
            # Its own: a loader draws from the global one, which a resumed run must find untouched.
            generator=torch.Generator(),
        )  # fmt: skip
        crops, failures = [], 0
        for g, name, crop, problem in loader:
            if problem:
                on_skip(name, problem)
                failures += 1
                if failures > 20 * self.count:  # even one usable image would have come up
                    raise InputError(_nothing_usable("train_folder", self.size, problem))
                continue
            failures = 0
            crops.append(crop)
            if len(crops) == self.batch_size:
                x = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2)  # [B, 3, S, S]
                yield Batch(x, draws.position_after(g))
                crops = []


class _EndlessSampler:
    def __init__(self, draws: Draws):
        self.draws = draws

    def __iter__(self) -> Iterator[int]:
        return self.draws.numbers()


class _DrawnCrops(Dataset):
    """Item g: (g, the image's name, its uint8 crop [S, S, 3] or None, what is wrong)."""

    def __init__(self, images: ImageFiles, size: int, seed: int):
        self.images = images
        self.size = size
        self.seed = seed

    def __getitem__(self, g: int) -> tuple[int, str, np.ndarray | None, str | None]:
        epoch, place = divmod(g, len(self.images))
        index = _permutation(len(self.images), self.seed, epoch)[place]
        name = self.images.names[index]
        try:
            picture = self.images.picture(int(index)).image
        except UnreadableError as error:
            return g, name, None, f"{READ_FAILED}: {error}"
        if min(picture.size) < self.size:
            return g, name, None, TOO_SMALL
        rng = np.random.default_rng((self.seed, g))
        left = int(rng.integers(picture.width - self.size + 1))
        top = int(rng.integers(picture.height - self.size + 1))
        crop = picture.crop((left, top, left + self.size, top + self.size))
        if rng.random() < 0.5:
            crop = ImageOps.mirror(crop)
        return g, name, np.array(crop), None


@lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count)


def _leave_signals_to_the_main_process(*_: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _nothing_usable(source: str, size: int, example: str) -> str:
    return (
        f"{source}: not one image gives a crop of {size}x{size} (the last one: {example}); "
        "a smaller image_size, or other images"
    )


# --- tfrecords ------------------------------------------------------------------------------------

# A record on disk: 8 bytes of length, 4 of checksum, the payload, 4 of checksum.
RECORD_HEAD, RECORD_PAYLOAD, RECORD_FRAME = 8, 12, 16
INDEX_NAME = ".record_index.npz"


class Records(NamedTuple):
    """Where every record of some tfrecord files lies; n records.

    `resized` says of each file whether its crops are random resized ones (CLIC); `damaged`, of
    files that break off, why.
    """

    files: tuple[str, ...]
    resized: tuple[bool, ...]
    file: np.ndarray  # int64 [n], index into files
    offset: np.ndarray  # int64 [n], bytes
    length: np.ndarray  # int64 [n], bytes of payload
    damaged: Mapping[str, str]

    def joined(self, other: "Records") -> "Records":
        """The records of both."""
        return Records(
            self.files + other.files,
            self.resized + other.resized,
            np.concatenate((self.file, other.file + len(self.files))),
            np.concatenate((self.offset, other.offset)),
            np.concatenate((self.length, other.length)),
            {**self.damaged, **other.damaged},
        )

    def name(self, record: int) -> str:
        """The record's file and its place in it, counted from 0."""
        file = int(self.file[record])
        place = record - int(np.searchsorted(self.file, file))
        return f"{self.files[file]} record {place}"


def imagenet_tfrecords(path: str | Path, key: str = "path_train.train_imagenet") -> Records:
    """The records below a folder, or of one file; their places are kept in a file beside them.

    Raises:
        InputError: no such folder, or no record in it.
    """
    root, key = Path(path), f"{key} = {path}"
    if root.is_file():
        files = [root]
    elif root.is_dir():
        files = sorted(
            file for file in root.rglob("*")
            if "tfrecord" in file.name and file.suffix != ".json"
            and not file.name.startswith(".") and file.is_file()
        )  # fmt: skip
    else:
        raise InputError(f"{key}: no such folder or file (looked from {Path.cwd()})")
    if not files:
        raise InputError(
            f"{key}: no *tfrecord* file in it; python datasets.py make-tfrecords makes them"
        )
    records = index_records(files, root / INDEX_NAME if root.is_dir() else None)
    if not len(records.file):
        raise InputError(f"{key}: not one record in {len(files)} files; is it no tfrecord?")
    return records


def clic(data_dir: str | None = None) -> Records:
    """The train split of tensorflow-datasets' `clic` (CLIC 2020), downloaded on first use.

    Raises:
        InputError: it cannot be prepared, or its files are gone.
    """
    key = "train_clic_imagenet"
    builder = prepare_clic(
        data_dir, key, "path_train.train_clic, or set train_clic_imagenet to false",
        file_format="tfrecord",
    )  # fmt: skip
    files = [Path(file) for file in builder.info.splits["train"].filepaths]
    try:
        records = index_records(files, None)
    except OSError as error:
        raise InputError(f"{key}: {error.filename}: {error.strerror}") from None
    return records._replace(resized=(True,) * len(files))


def index_records(files: Sequence[Path], cache: Path | None) -> Records:
    """Find every record by the lengths that stand before each; reads no payload.

    Args:
        cache: where the places are kept; it holds while names, sizes and times stay the same.
    """
    stamp = _digest([f"{f}|{f.stat().st_size}|{f.stat().st_mtime_ns}" for f in files])
    if cache is not None:
        broken = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)
        with suppress(*broken), np.load(cache) as kept:
            if str(kept["stamp"]) == stamp:
                return _records(files, kept["places"], json.loads(str(kept["damaged"])))
    found = [_scan(file) for file in files]
    places = np.concatenate([
        np.stack((np.full(len(offset), index), offset, length), axis=1)
        for index, (offset, length, _) in enumerate(found)
    ])  # fmt: skip
    damaged = {str(file): why for file, (_, _, why) in zip(files, found, strict=True) if why}
    if cache is not None:
        kept = {"stamp": stamp, "places": places, "damaged": json.dumps(damaged)}
        with suppress(OSError):  # data often lie where nobody may write
            write_whole(cache, lambda path: np.savez(path, **kept))
    return _records(files, places, damaged)


def _records(files: Sequence[Path], places: np.ndarray, damaged: dict[str, str]) -> Records:
    names = tuple(str(file) for file in files)
    return Records(names, (False,) * len(names), *places.astype(np.int64).T, damaged)


def _scan(path: Path) -> tuple[np.ndarray, np.ndarray, str | None]:
    """Offset and payload length of a file's records, int64, and why it breaks off if it does."""
    size, at = path.stat().st_size, 0
    offsets, lengths, problem = [], [], None
    with path.open("rb", buffering=0) as file:
        while at < size:
            file.seek(at)
            head = file.read(RECORD_PAYLOAD)
            length = int.from_bytes(head[:RECORD_HEAD], "little")
            sound = (
                len(head) == RECORD_PAYLOAD and _checksum(head[:RECORD_HEAD]) == head[RECORD_HEAD:]
            )
            if not sound or at + RECORD_FRAME + length > size:
                problem = (
                    f"{READ_FAILED}: no whole record from byte {at} on, {size - at} bytes left "
                    "out: truncated, compressed, or no tfrecord"
                )
                break
            offsets.append(at)
            lengths.append(length)
            at += RECORD_FRAME + length
    return np.array(offsets, np.int64), np.array(lengths, np.int64), problem


def _checksum(data: bytes) -> bytes:
    """The four bytes that a tfrecord writes after `data`: its CRC32C, masked as the format says."""
    crc = google_crc32c.value(data)
    masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
    return masked.to_bytes(4, "little")


def read_payload(records: Records, record: int) -> bytes:
    """The bytes of a record.

    Raises:
        OSError: the file cannot be read.
        ValueError: the record's checksum is wrong.
    """
    length = int(records.length[record])
    with open(records.files[records.file[record]], "rb", buffering=0) as file:  # noqa: PTH123  faster
        file.seek(int(records.offset[record]) + RECORD_PAYLOAD)
        data = file.read(length + 4)
    if _checksum(data[:length]) != data[length:]:
        raise ValueError("wrong checksum")
    return data[:length]


def epoch_order(records: Records, seed: int, epoch: int, cycle_length: int) -> np.ndarray:
    """Every record once, int64 [n], in the seeded order of an epoch.

    Files come in random order, cycle_length of them open at a time, whose records are drawn at
    random. CLIC's few files are spread evenly at random over the epoch's whole length.
    """
    rng = np.random.default_rng((seed, epoch))
    starts = np.searchsorted(records.file, np.arange(len(records.files) + 1))
    resized = np.array(records.resized)[records.file]
    order = np.empty(len(records.file), np.int64)
    place = rng.permutation(resized)
    for kind in (False, True):
        files = rng.permutation([f for f, flag in enumerate(records.resized) if flag == kind])
        step = max(len(files), 1) if kind else cycle_length
        groups = [
            rng.permutation(
                np.concatenate([np.arange(starts[f], starts[f + 1]) for f in files[at : at + step]])
            )
            for at in range(0, len(files), step)
        ]
        order[place == kind] = np.concatenate([np.empty(0, np.int64), *groups])
    return order


class RecordCrops:
    """Random crops of tfrecords, read and decoded by tf.data in parallel.

    A record is an Example whose bytes feature `image` is an encoded picture; a JPEG is decoded
    only where the crop needs it. Crops of `resized` files are torchvision's RandomResizedCrop.
    """

    passed_over = ""

    def __init__(
        self, records: Records, size: int, batch_size: int, cycle_length: int, num_workers: int = 0
    ):
        self.records = records
        self.size = size
        self.batch_size = batch_size
        self.cycle_length = cycle_length
        self.parallel = num_workers or os.cpu_count() or 1
        self.count = len(records.file)
        self.name = f"records in {len(records.files)} files"

    def batches(self, draws: Draws, on_skip: Callable[[str, str], None]) -> Iterator[Batch]:
        """Batches without end, see `TrainingData`.

        Raises:
            InputError: no record gives a crop.
        """
        for file, why in self.records.damaged.items():
            if draws.rank == 0:
                on_skip(file, why)
        pipeline = _Pipeline(self, draws, on_skip)
        pipeline.find_one_usable()
        yield from pipeline.batches()


class _Pipeline:
    """tf.data from the places of records to batches of crops, in the order of the draws.

    Whatever fails on a record only drops its draw: the gap in the draws' numbers tells which.
    """

    def __init__(self, data: RecordCrops, draws: Draws, on_skip: Callable[[str, str], None]):
        self.tf = import_tensorflow()
        self.data = data
        self.draws = draws
        self.on_skip = on_skip
        self._small: set[int] = set()
        self._failed_in_a_row = 0
        resized = data.records.resized
        self._resized = self.tf.constant(resized) if any(resized) else None

    def batches(self) -> Iterator[Batch]:
        """Batches without end; reports what lay between their draws.

        Raises:
            InputError: no file can be read any more.
        """
        tf = self.tf
        first = self.draws.position * self.draws.world // self.data.count
        epochs = tf.data.Dataset.range(first, 2**62)
        batches = self._crops(epochs).batch(self.data.batch_size, drop_remainder=True)
        expected = next(self.draws.numbers())
        for x, g in batches.prefetch(4):
            for used in g.numpy().tolist():
                for dropped in range(expected, used, self.draws.world):
                    self._report(dropped)
                expected = used + self.draws.world
            # Both libraries look at the same memory.
            x = torch.from_dlpack(tf.experimental.dlpack.to_dlpack(x))  # [B, S, S, 3]
            yield Batch(x.permute(0, 3, 1, 2), self.draws.position_after(used))
        raise InputError(f"path_train: {self.data.records.files[0]} and all others: not readable")

    def find_one_usable(self) -> None:
        """Draw until one record gives a crop; the rest would wait for ever where none does.

        Raises:
            InputError: not one does.
        """
        epoch = self.draws.position * self.draws.world // self.data.count
        # Of so many epochs, every record is this rank's in one.
        epochs = self.tf.data.Dataset.range(epoch + 1, epoch + 1 + self.draws.world)
        if not any(True for _ in self._crops(epochs).take(1)):
            example = self.data.records.name(0)
            reason = TOO_SMALL if self._small else READ_FAILED
            raise InputError(_nothing_usable("path_train", self.data.size, f"{example}, {reason}"))
        self._small.clear()

    def _report(self, g: int) -> None:
        """Say what was wrong with a draw that gave no crop."""
        reason = TOO_SMALL if g in self._small else READ_FAILED
        self._small.discard(g)
        epoch, place = divmod(g, self.data.count)
        self.on_skip(self.data.records.name(int(self._order(epoch)[place])), reason)

    def _note_small(self, g: np.ndarray) -> np.bool_:
        """Remember, in tensorflow's thread, why a draw gives no crop; False, as a filter has it."""
        self._small.add(int(g))
        return np.bool_(False)

    def _read(self, record: np.ndarray) -> bytes:
        self._failed_in_a_row += 1
        payload = read_payload(self.data.records, int(record))
        self._failed_in_a_row = 0
        return payload

    def _still_readable(self, epoch: np.ndarray) -> np.bool_:
        """False where whole epochs of records could not be read: their files are gone."""
        return np.bool_(self._failed_in_a_row <= 2 * self.data.count + 100)

    @lru_cache(maxsize=3)  # noqa: B019  a pipeline lives as long as its run
    def _order(self, epoch: int) -> np.ndarray:
        return epoch_order(self.data.records, self.draws.seed, epoch, self.data.cycle_length)

    def _epoch_table(self, epoch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """g, record and file of this rank's draws, int64 [k, 3], and their luck [k, 3]."""
        records, draws, count = self.data.records, self.draws, self.data.count
        g = np.arange(count, dtype=np.int64) + epoch * count
        mine = (g % draws.world == draws.rank) & (g >= draws.position * draws.world)
        order = self._order(int(epoch))[mine]
        luck = np.random.default_rng((draws.seed, int(epoch), 1)).random((count, 3), np.float32)
        return np.stack((g[mine], order, records.file[order]), axis=1), luck[mine]

    def _crops(self, epochs):
        """x uint8 [S, S, 3] and g of every usable draw of these epochs."""
        tf, data = self.tf, self.data

        def readable(epoch):
            return tf.numpy_function(self._still_readable, [epoch], tf.bool)

        def rows_of(epoch):
            rows, luck = tf.numpy_function(self._epoch_table, [epoch], (tf.int64, tf.float32))
            table = tf.ensure_shape(rows, [None, 3]), tf.ensure_shape(luck, [None, 3])
            return tf.data.Dataset.from_tensor_slices(table)

        def crop(row, luck):
            g, record, file = tf.unstack(row, num=3)
            payload = tf.ensure_shape(tf.numpy_function(self._read, [record], tf.string), [])
            seed = tf.stack([tf.constant(self.draws.seed, tf.int64), g])
            is_resized = None if self._resized is None else self._resized[file]
            return *_crop_of_record(tf, payload, data.size, luck, seed, is_resized), g

        def big_enough(x, small, g):
            return tf.cond(
                small,
                lambda: tf.numpy_function(self._note_small, [g], tf.bool),
                lambda: tf.constant(True),
            )

        rows = epochs.take_while(readable).flat_map(rows_of)
        # One more than the cores: one always waits for its turn.
        crops = rows.map(crop, num_parallel_calls=data.parallel + 1, deterministic=True)
        return crops.ignore_errors().filter(big_enough).map(lambda x, small, g: (x, g))


def _crop_of_record(tf, record, size: int, luck, seed, is_resized):
    """A crop x, uint8 [S, S, 3], of a serialised Example, and False; or zeros and True, too small.

    luck: three uniform numbers, for the flip and the crop's place. is_resized: whether it is to be
    a random resized crop, which `seed` places; None where no file's are.
    """
    features = {"image": tf.io.FixedLenFeature([], tf.string)}
    data = tf.io.parse_single_example(record, features)["image"]

    def window_in(shape):
        room = tf.maximum(shape - size, 0)
        corner = tf.minimum(tf.cast(luck[1:] * tf.cast(room + 1, tf.float32), tf.int32), room)
        extent = tf.minimum(shape, size)
        if is_resized is None:
            return corner, extent
        other_corner, other_extent = _resized_window(tf, shape, seed)
        return (
            tf.where(is_resized, other_corner, corner), tf.where(is_resized, other_extent, extent)
        )  # fmt: skip

    def from_jpeg():  # only the window is decoded
        window = tf.concat(window_in(tf.io.extract_jpeg_shape(data)[:2]), axis=0)
        # What PIL and every viewer show; tensorflow's default is a coarser transform.
        return tf.io.decode_and_crop_jpeg(data, window, 3, dct_method="INTEGER_ACCURATE")

    def from_another():
        pixels = tf.io.decode_image(data, channels=3, expand_animations=False)
        corner, extent = window_in(tf.shape(pixels)[:2])
        return tf.slice(pixels, tf.pad(corner, [[0, 1]]), tf.concat([extent, [3]], axis=0))

    x = tf.ensure_shape(tf.cond(tf.io.is_jpeg(data), from_jpeg, from_another), [None, None, 3])
    if is_resized is not None:
        x = tf.cond(is_resized, lambda: _resize(tf, x, size), lambda: x)
    nothing = tf.zeros([size, size, 3], tf.uint8)
    small = tf.reduce_any(tf.shape(x)[:2] < size)
    # Branches, not tf.where and tf.pad: those cost as much as the decoding.
    x = tf.cond(small, lambda: nothing, lambda: x)
    x = tf.cond(luck[0] < 0.5, lambda: tf.reverse(x, [1]), lambda: x)
    return tf.ensure_shape(x, [size, size, 3]), small


def _resize(tf, x, size: int):
    """uint8 [size, size, 3] of uint8 [H, W, 3], bilinear with a filter as wide as the shrinking."""
    scaled = tf.image.resize(tf.cast(x, tf.float32), [size, size], antialias=True)
    return tf.cast(tf.clip_by_value(tf.round(scaled), 0, 255), tf.uint8)


def _resized_window(tf, shape, seed):
    """Corner and extent of torchvision's RandomResizedCrop: 8 to 100 % of the area, aspect 3/4 to
    4/3; ten tries to fit it in, then the largest central window of such an aspect.
    """
    luck = tf.unstack(tf.random.stateless_uniform([10, 4], seed), axis=1)
    height, width = tf.unstack(tf.cast(shape, tf.float32), num=2)
    area = height * width * (0.08 + 0.92 * luck[0])
    aspect = tf.exp(np.log(4 / 3) * (2 * luck[1] - 1))
    extents = tf.round(tf.stack((tf.sqrt(area / aspect), tf.sqrt(area * aspect)), axis=1))
    sides = tf.stack((height, width))
    fits = tf.reduce_all((extents > 0) & (extents <= sides), axis=1)
    first = tf.argmax(fits)
    central = tf.round(tf.minimum(sides, sides[::-1] * 4 / 3))
    extent = tf.where(tf.reduce_any(fits), extents[first], central)
    place = tf.where(tf.reduce_any(fits), tf.stack((luck[2][first], luck[3][first])), 0.5)
    room = sides - extent
    corner = tf.minimum(tf.floor(place * (room + 1)), room)
    return tf.cast(corner, tf.int32), tf.cast(extent, tf.int32)


# --- making tfrecords -----------------------------------------------------------------------------

MANIFEST_NAME = "conversion.json"
KEPT_FORMATS = frozenset(("JPEG", "MPO", "PNG"))


def write_tfrecords(
    images: Path, out: Path, shards: int, workers: int = 0, seed: int = 0
) -> dict[str, str]:
    """Turn the images below a folder into `shards` tfrecord files, in parallel; resumable.

    An Example has the bytes features image (a JPEG or PNG file as it is, if it needs no more than
    decoding; any other as the PNG of its converted pixels), height, width and channels (decimal
    digits). Images come in a seeded random order, so that a shard is a mixture of all classes. A
    shard is whole or absent; those that an earlier call finished are kept.

    Args:
        workers: processes; 0 is one a core.

    Returns:
        The images that could not be read, by their path below `images`, and why.

    Raises:
        InputError: no images, fewer than shards, or `out` holds shards of other images.
    """
    root, files, passed_over = find_images(images)
    if passed_over:
        print(f"{images}: {passed_over}", file=sys.stderr)
    if shards > len(files):
        raise InputError(
            f"--shards {shards}: more than there are images in {images} ({len(files)})"
        )
    stats = [(file.relative_to(root).as_posix(), file.stat()) for file in files]
    stamps = [f"{name}|{stat.st_size}|{stat.st_mtime_ns}" for name, stat in stats]
    names = np.random.default_rng(seed).permutation([name for name, _ in stats])
    parts = {
        f"train-{index:05d}-of-{shards:05d}.tfrecord": part.tolist()
        for index, part in enumerate(np.array_split(names, shards))
    }
    identity = {"images": len(files), "shards": shards, "seed": seed, "stamp": _digest(stamps)}
    done = _read_manifest(out, identity)

    def write_manifest() -> None:
        text = json.dumps({**identity, "done": done}, indent=1)
        write_whole(out / MANIFEST_NAME, lambda path: path.write_text(text))

    write_manifest()
    for leftover in out.glob(".*.tmp*"):
        leftover.unlink()
    todo = [shard for shard in parts if shard not in done or not (out / shard).is_file()]
    workers = min(workers or os.cpu_count() or 1, max(len(todo), 1))
    bar = tqdm(total=len(files), unit=" images", disable=not sys.stderr.isatty())
    bar.update(sum(len(parts[shard]) for shard in parts if shard not in todo))
    with bar, ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=_leave_signals_to_the_main_process
    ) as pool:  # fmt: skip
        jobs = {pool.submit(_write_shard, root, parts[shard], out / shard): shard for shard in todo}
        try:
            for job in as_completed(jobs):
                done[jobs[job]] = job.result()
                bar.update(len(parts[jobs[job]]))
                write_manifest()
        finally:
            pool.shutdown(cancel_futures=True)
    return {name: why for shard in parts for name, why in done[shard].items()}


def _digest(names: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(names).encode(errors="surrogateescape")).hexdigest()[:16]


def _read_manifest(out: Path, identity: dict[str, Any]) -> dict[str, dict[str, str]]:
    """What earlier calls finished: unreadable images of each shard."""
    path = out / MANIFEST_NAME
    if not path.is_file():
        if out.is_dir() and any("tfrecord" in f.name for f in out.iterdir() if f.name[0] != "."):
            raise InputError(f"--out {out}: holds tfrecords already; choose an empty folder")
        return {}
    try:
        manifest = json.loads(path.read_text())
        done = manifest.pop("done")
    except (ValueError, KeyError, AttributeError):
        raise InputError(f"{path}: damaged; delete {out} and start again") from None
    if manifest != identity:
        raise InputError(
            f"--out {out}: holds shards of other or changed images, or another --shards "
            f"({manifest.get('images')} images in {manifest.get('shards')} shards); "
            "choose another folder"
        )
    return done


def _write_shard(root: Path, names: Sequence[str], path: Path) -> dict[str, str]:
    """Write one tfrecord file; the images that could not be read, and why."""
    tf = import_tensorflow()
    unreadable = {}

    def feature(value: bytes):
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))

    def write(temporary: Path) -> None:
        with tf.io.TFRecordWriter(os.fspath(temporary)) as writer:
            for name in names:
                try:
                    fields = _encoded_picture(root / name)
                except Exception as error:  # damaged files make decoders raise dozens of kinds
                    unreadable[name] = _reason(error, root / name, name)
                    continue
                example = {key: feature(value) for key, value in fields.items()}
                writer.write(
                    tf.train.Example(
                        features=tf.train.Features(feature=example)
                    ).SerializeToString()
                )

    try:
        write_whole(path, write)
    except tf.errors.OpError as error:  # such as a full disk
        raise OSError(None, str(error).splitlines()[0], str(path)) from None
    return unreadable


def _encoded_picture(path: Path) -> dict[str, bytes]:
    """A record's four features of an image file: as it is where any decoder sees what we see."""
    picture = read_picture(path)
    if picture.format in KEPT_FORMATS and picture.is_as_decoded:
        data, channels = path.read_bytes(), 1 if "L converted to RGB" in picture.notes else 3
    else:
        buffer = io.BytesIO()
        picture.image.save(buffer, "PNG")
        data, channels = buffer.getvalue(), 3
    sizes = {"height": picture.image.height, "width": picture.image.width, "channels": channels}
    return {"image": data, **{key: b"%d" % value for key, value in sizes.items()}}


@exits_with_one_line
def main(argv: Sequence[str] | None = None) -> int:
    """The command line; exit code 1 when an image could not be read, every other was written."""
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
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the workers end with us
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
