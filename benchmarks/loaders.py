"""The speed of the tfrecord loader, compared with plain PIL."""

import argparse
import io
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from common.optional_packages import import_tensorflow
from datasets import sample_photos
from pretraining.draws import Draws
from pretraining.make_tfrecords import write_tfrecords
from pretraining.tfrecord_crops import TfrecordCrops
from pretraining.tfrecord_index import TfrecordIndex, epoch_order, index_tfrecords, read_payload

WARM_UP_BATCHES = 4


def time_loaders(arguments: argparse.Namespace) -> dict[str, Any]:
    """Compare the loaders on `--records`, or on tfrecords of the sample photos."""
    if arguments.records is not None:
        return compare_loaders(index_tfrecords(arguments.records, "--records"), arguments)
    with tempfile.TemporaryDirectory() as folder:
        make_sample_records(Path(folder))
        return compare_loaders(index_tfrecords(Path(folder) / "records"), arguments)


def compare_loaders(records: TfrecordIndex, arguments: argparse.Namespace) -> dict[str, Any]:
    """Time the project's loader and plain PIL in turn; print and return images per second."""
    size, batch_size = arguments.image_size, arguments.batch_size
    data = TfrecordCrops(records, size, batch_size, arguments.cycle_length)
    draws = Draws(seed=0)
    loaders = {
        "tf.data, as train.py": lambda: data.batches(draws, lambda name, reason: None),
        "PIL, one thread": lambda: pil_batches(records, size, batch_size, arguments.cycle_length),
    }
    speeds: dict[str, list[float]] = {name: [] for name in loaders}
    for _ in range(arguments.rounds):
        for name, make in loaders.items():
            speeds[name].append(images_per_second(make(), batch_size, arguments.seconds))
    print(
        f"{len(records.file)} records of {records.length.mean() / 1000:.0f} kB, crops of {size}, "
        f"batches of {batch_size}, {os.cpu_count()} cores ({platform.machine()}), median of "
        f"{arguments.rounds} rounds"
    )
    for name, values in speeds.items():
        print(
            f"{name:22} {statistics.median(values):8.1f} images/s   "
            f"({min(values):.1f} to {max(values):.1f})"
        )
    ours, plain = speeds.values()
    ratios = [a / b for a, b in zip(ours, plain, strict=True)]
    print(f"{'ratio':22} {statistics.median(ratios):8.2f}            "
          f"({min(ratios):.2f} to {max(ratios):.2f})")  # fmt: skip
    return {"images_per_second": speeds, "ratio": statistics.median(ratios)}


def images_per_second(batches: Iterator, batch_size: int, seconds: float) -> float:
    """The speed of an endless iterator of batches, measured after a few batches."""
    for _ in range(WARM_UP_BATCHES):
        next(batches)
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        next(batches)
        count += batch_size
    return count / (time.perf_counter() - started)


def pil_batches(
    records: TfrecordIndex, size: int, batch_size: int, cycle_length: int
) -> Iterator[np.ndarray]:
    """Random crops uint8 [B, S, S, 3], by a simple loop over the same records in the same order."""
    tf = import_tensorflow()
    rng = np.random.default_rng(0)
    batch, epoch = [], 0
    while True:
        for record in epoch_order(records, 0, epoch, cycle_length):
            example = tf.train.Example.FromString(read_payload(records, record))
            data = example.features.feature["image"].bytes_list.value[0]
            picture = Image.open(io.BytesIO(data)).convert("RGB")
            if min(picture.size) < size:
                continue
            left = rng.integers(picture.width - size + 1)
            top = rng.integers(picture.height - size + 1)
            pixels = np.asarray(picture)[top : top + size, left : left + size]
            batch.append(pixels[:, ::-1] if rng.random() < 0.5 else pixels)
            if len(batch) == batch_size:
                yield np.stack(batch)
                batch = []
        epoch += 1


def make_sample_records(folder: Path) -> None:
    """Write tfrecords of 64 JPEGs from the sample photos, 500x375 as many ImageNet images are."""
    rng = np.random.default_rng(0)
    photos = sample_photos()
    (folder / "images").mkdir()
    for index in range(64):
        picture = photos.picture(index % len(photos)).image
        scale = max(500 / picture.width, 375 / picture.height) * rng.uniform(1.0, 1.5)
        picture = picture.resize((round(picture.width * scale), round(picture.height * scale)))
        left = int(rng.integers(picture.width - 500 + 1))
        top = int(rng.integers(picture.height - 375 + 1))
        crop = picture.crop((left, top, left + 500, top + 375))
        crop.save(folder / "images" / f"{index:02d}.jpg", quality=95)
    write_tfrecords(folder / "images", folder / "records", shards=4, workers=1)
