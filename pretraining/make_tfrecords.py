"""Convert a folder of images to tfrecords, in parallel; a stopped conversion can be resumed."""

import io
import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from common.errors import InputError
from common.files import write_whole
from common.finding import find_images
from common.images import why_unreadable
from common.optional_packages import import_tensorflow, require_package
from common.pictures import read_picture
from common.workers import leave_signals_to_the_main_process
from pretraining.tfrecord_index import stamp_of

MANIFEST_NAME = "conversion.json"
KEPT_FORMATS = frozenset(("JPEG", "MPO", "PNG"))


def write_tfrecords(
    images: Path, out: Path, shards: int, workers: int = 0, seed: int = 0
) -> dict[str, str]:
    """Convert the images below a folder to `shards` tfrecord files.

    An Example has the bytes features image, height, width and channels. `image` is the JPEG or PNG
    file itself if any decoder reads the same pixels from it, else a PNG of the converted pixels.
    The others are decimal digits. The order of the images is random, so that each shard is a
    mixture of all classes. Shards that an earlier call finished are kept.

    Args:
        out: the folder of the tfrecord files.
        workers: the number of processes; 0: one for each core.
        seed: of the order.

    Returns:
        The images that could not be read, by their path below `images`, and why.

    Raises:
        InputError: there are no images, or fewer than shards; `out` holds shards of other images;
            or tensorflow is not installed.
        OSError: a file cannot be written.
    """
    require_package("tensorflow", "make-tfrecords")
    root, files, passed_over = find_images(images)
    if passed_over:
        print(f"{images}: {passed_over}", file=sys.stderr)
    if shards > len(files):
        raise InputError(
            f"--shards {shards}: more than there are images in {images} ({len(files)})"
        )
    named = [(file.relative_to(root).as_posix(), file) for file in files]
    identity = {"images": len(files), "shards": shards, "seed": seed, "stamp": stamp_of(named)}
    names = np.random.default_rng(seed).permutation([name for name, _ in named])
    parts = {
        f"train-{index:05d}-of-{shards:05d}.tfrecord": part.tolist()
        for index, part in enumerate(np.array_split(names, shards))
    }
    manifest = _Manifest(out, identity)
    manifest.write()
    for leftover in out.glob(".*.tmp*"):
        leftover.unlink()
    _write_missing_shards(root, parts, manifest, workers)
    return {name: why for shard in parts for name, why in manifest.done[shard].items()}


class _Manifest:
    """Which shards of a conversion are written; it is stored in a file beside them.

    `done` has the unreadable images of each written shard, with the reasons. `identity` is equal
    for two calls that convert the same images in the same way.

    Raises:
        InputError: the folder holds shards of another conversion, or the file is damaged.
    """

    def __init__(self, out: Path, identity: dict[str, Any]):
        self.out = out
        self.identity = identity
        self.done = self._read()

    def write(self) -> None:
        text = json.dumps({**self.identity, "done": self.done}, indent=1)
        write_whole(self.out / MANIFEST_NAME, lambda path: path.write_text(text))

    def _read(self) -> dict[str, dict[str, str]]:
        out, path = self.out, self.out / MANIFEST_NAME
        if not path.is_file():
            if out.is_dir() and any("tfrecord" in f.name for f in out.iterdir()
                                    if f.name[0] != "."):  # fmt: skip
                raise InputError(f"--out {out}: holds tfrecords already; choose an empty folder")
            return {}
        try:
            manifest = json.loads(path.read_text())
            done = manifest.pop("done")
        except (ValueError, KeyError, AttributeError):
            raise InputError(f"{path}: damaged; delete {out} and start again") from None
        if manifest != self.identity:
            raise InputError(
                f"--out {out}: holds shards of other or changed images, or another --shards "
                f"({manifest.get('images')} images in {manifest.get('shards')} shards); "
                "choose another folder"
            )
        return done


def _write_missing_shards(
    root: Path, parts: dict[str, list[str]], manifest: _Manifest, workers: int
) -> None:
    """Write the shards that are not done; `parts`: the images of each shard, by its file name."""
    out, done = manifest.out, manifest.done
    todo = [shard for shard in parts if shard not in done or not (out / shard).is_file()]
    workers = min(workers or os.cpu_count() or 1, max(len(todo), 1))
    count = sum(map(len, parts.values()))
    bar = tqdm(total=count, unit=" images", disable=not sys.stderr.isatty())
    bar.update(sum(len(parts[shard]) for shard in parts if shard not in todo))
    with bar, ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=leave_signals_to_the_main_process
    ) as pool:  # fmt: skip
        jobs = {pool.submit(_write_shard, root, parts[shard], out / shard): shard for shard in todo}
        try:
            for job in as_completed(jobs):
                done[jobs[job]] = job.result()
                bar.update(len(parts[jobs[job]]))
                manifest.write()
        finally:
            pool.shutdown(cancel_futures=True)


def _write_shard(root: Path, names: Sequence[str], path: Path) -> dict[str, str]:
    """Write one tfrecord file; return the images that could not be read, and why."""
    tf = import_tensorflow("make-tfrecords")
    unreadable = {}

    def feature(value: bytes) -> Any:
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))

    def write(temporary: Path) -> None:
        with tf.io.TFRecordWriter(os.fspath(temporary)) as writer:
            for name in names:
                try:
                    fields = _fields_of(root / name)
                except Exception as error:  # damaged files make decoders raise dozens of kinds
                    unreadable[name] = why_unreadable(error, root / name, name)
                    continue
                features = {key: feature(value) for key, value in fields.items()}
                example = tf.train.Example(features=tf.train.Features(feature=features))
                writer.write(example.SerializeToString())

    try:
        write_whole(path, write)
    except tf.errors.OpError as error:  # the disk is full, for example
        raise OSError(None, str(error).splitlines()[0], str(path)) from None
    return unreadable


def _fields_of(path: Path) -> dict[str, bytes]:
    """An Example's four features, see `write_tfrecords`."""
    picture = read_picture(path)
    if picture.format in KEPT_FORMATS and picture.is_as_decoded:
        data, channels = path.read_bytes(), 1 if "L converted to RGB" in picture.notes else 3
    else:
        buffer = io.BytesIO()
        picture.image.save(buffer, "PNG")
        data, channels = buffer.getvalue(), 3
    sizes = {"height": picture.image.height, "width": picture.image.width, "channels": channels}
    return {"image": data, **{key: b"%d" % value for key, value in sizes.items()}}
