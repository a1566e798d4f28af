"""Speed beside plain reference loops, measured in turns within one run.

python benchmark.py loader --records data/imagenet_tfrecords
python benchmark.py loader                                    # records made of the sample photos
python benchmark.py codec                                     # files of a 768x512 picture
"""

import argparse
import io
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from codec import build_coder, compress_picture
from config import InputError, exits_with_one_line
from datasets import (
    Draws,
    ImageFiles,
    RecordCrops,
    Records,
    epoch_order,
    find_images,
    imagenet_tfrecords,
    import_tensorflow,
    read_payload,
    sample_photos,
    to_tensor,
    write_tfrecords,
)
from models import load_checkpoint

WARM_UP_BATCHES = 4
BUNDLED_WEIGHTS = "example_files/weights/mean_scale_n64_lambda0.01.pth.tar"


@exits_with_one_line
def main(argv: Sequence[str] | None = None) -> int:
    """The command line; exit code 0, 2 for bad input."""
    parser = argparse.ArgumentParser(description="Measure speed.")
    commands = parser.add_subparsers(dest="command", required=True)
    loader = commands.add_parser("loader", help="the tfrecord loader beside plain PIL")
    loader.add_argument("--records", type=Path, help="folder of tfrecords (none: sample photos)")
    loader.add_argument("--image_size", type=int, default=256)
    loader.add_argument("--batch_size", type=int, default=32)
    loader.add_argument("--cycle_length", type=int, default=4)
    loader.add_argument("--rounds", type=int, default=5)
    loader.add_argument("--seconds", type=float, default=4.0, help="of each loader in each round")
    codec = commands.add_parser("codec", help="coding and decoding of one picture as a file")
    codec.add_argument("--checkpoint", default=BUNDLED_WEIGHTS, metavar="WEIGHTS")
    codec.add_argument("--image", type=Path, help="a picture (none: a sample photo at 768x512)")
    codec.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args(argv)
    for option in ("image_size", "batch_size", "cycle_length", "rounds", "seconds"):
        if getattr(arguments, option, 1) <= 0:
            raise InputError(f"--{option} {getattr(arguments, option)}: must be above 0")
    if arguments.command == "codec":
        return time_codec(arguments)
    if arguments.records is not None:
        records = imagenet_tfrecords(arguments.records, "--records")
        return compare_loaders(records, arguments)
    with tempfile.TemporaryDirectory() as folder:
        make_sample_records(Path(folder))
        return compare_loaders(imagenet_tfrecords(Path(folder) / "records"), arguments)


def compare_loaders(records: Records, arguments: argparse.Namespace) -> int:
    """Print images per second of the project's loader and of plain PIL, in turns, and the ratio."""
    size, batch_size = arguments.image_size, arguments.batch_size
    data = RecordCrops(records, size, batch_size, arguments.cycle_length)
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
    return 0


def time_codec(arguments: argparse.Namespace) -> int:
    """Print the seconds that coding and decoding of one picture take, networks included."""
    if arguments.image is None:
        photos = sample_photos()
        picture = photos.picture(photos.names.index("coffee.png"))[0].resize((768, 512))
    else:
        path = find_images(arguments.image)[0]
        picture, _, error = ImageFiles([path], path.parent).picture(0)
        if picture is None:
            raise InputError(f"--image {path}: {error}")
    coder = build_coder(load_checkpoint(arguments.checkpoint))
    x = to_tensor(picture)[None]  # [1, 3, H, W]
    compress_picture(coder, x)  # warms up
    rows = [compress_picture(coder, x)[1] for _ in range(arguments.rounds)]
    print(
        f"{x.size(3)}x{x.size(2)}, N = {coder.model.N}, M = {coder.model.M}, "
        f"{rows[0]['file_bytes']} bytes, {os.cpu_count()} cores ({platform.machine()}), median of "
        f"{arguments.rounds} rounds"
    )
    for key, what in (("coding", "g_a, h_a, coding, decoding to compare"),
                      ("decoding", "decoding, g_s")):  # fmt: skip
        times = [row[key] for row in rows]
        print(
            f"{key:9} {statistics.median(times):6.3f} s   ({min(times):.3f} to {max(times):.3f})"
            f"   {what}"
        )
    return 0


def images_per_second(batches: Iterator, batch_size: int, seconds: float) -> float:
    """Speed of an endless iterator of batches, its first few left out."""
    for _ in range(WARM_UP_BATCHES):
        next(batches)
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        next(batches)
        count += batch_size
    return count / (time.perf_counter() - started)


def pil_batches(
    records: Records, size: int, batch_size: int, cycle_length: int
) -> Iterator[np.ndarray]:
    """uint8 [B, S, S, 3] of the same records in the same order, as one would write it first."""
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
    """Records of ImageNet's size, cut from the four sample photos: 64 JPEGs of 500x375."""
    rng = np.random.default_rng(0)
    photos = sample_photos()
    (folder / "images").mkdir()
    for index in range(64):
        picture, _, _ = photos.picture(index % len(photos))
        scale = max(500 / picture.width, 375 / picture.height) * rng.uniform(1.0, 1.5)
        picture = picture.resize((round(picture.width * scale), round(picture.height * scale)))
        left = int(rng.integers(picture.width - 500 + 1))
        top = int(rng.integers(picture.height - 375 + 1))
        crop = picture.crop((left, top, left + 500, top + 375))
        crop.save(folder / "images" / f"{index:02d}.jpg", quality=95)
    write_tfrecords(folder / "images", folder / "records", shards=4, workers=1)


if __name__ == "__main__":
    sys.exit(main())
