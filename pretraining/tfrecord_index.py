"""Where the examples of tfrecord files lie, their bytes, and the order of an epoch.

A tfrecord file is a row of examples. On disk an example is 8 bytes of length, 4 of their checksum,
the payload, and 4 of its checksum.
"""

import hashlib
import json
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import InputError
from common.files import write_whole
from common.optional_packages import import_package
from pretraining.draws import READ_FAILED

# Bytes before the length's checksum, before the payload, and of all but the payload.
LENGTH_BYTES, HEAD_BYTES, FRAME_BYTES = 8, 12, 16
INDEX_NAME = ".record_index.npz"


@dataclass(frozen=True)
class TfrecordIndex:
    """Where each of the n examples of some tfrecord files lies.

    `resized` says of each file whether its crops are random resized ones, as CLIC's are. `damaged`
    says why of each file that breaks off.
    """

    files: tuple[str, ...]
    resized: tuple[bool, ...]
    file: np.ndarray  # int64 [n], index into files
    offset: np.ndarray  # int64 [n], bytes
    length: np.ndarray  # int64 [n], bytes of payload
    damaged: Mapping[str, str]

    @property
    def count(self) -> int:
        """n, the number of examples."""
        return len(self.file)

    def merged_with(self, other: "TfrecordIndex") -> "TfrecordIndex":
        """An index of the examples of both, these first."""
        return TfrecordIndex(
            self.files + other.files,
            self.resized + other.resized,
            np.concatenate((self.file, other.file + len(self.files))),
            np.concatenate((self.offset, other.offset)),
            np.concatenate((self.length, other.length)),
            {**self.damaged, **other.damaged},
        )

    def name_of(self, example: int) -> str:
        """The example's file and its place in it, counted from 0."""
        file = int(self.file[example])
        place = example - int(np.searchsorted(self.file, file))
        return f"{self.files[file]} record {place}"


def index_tfrecords(path: str | Path, key: str = "path_train.train_imagenet") -> TfrecordIndex:
    """Index the tfrecords below a folder, or one file; a folder's index is kept in a file there.

    Raises:
        InputError: no such folder, no example in it, or google_crc32c is not installed; `key` is
            where the user named the path.
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
    index = index_files(files, root / INDEX_NAME if root.is_dir() else None)
    if not index.count:
        raise InputError(f"{key}: not one record in {len(files)} files; is it no tfrecord?")
    return index


def index_files(files: Sequence[Path], cache: Path | None) -> TfrecordIndex:
    """Find every example by the lengths that stand before each; reads no payload.

    Args:
        cache: where the index is kept; it holds while names, sizes and times stay the same.

    Raises:
        InputError: google_crc32c is not installed.
        OSError: a file cannot be read.
    """
    _crc32c_package()  # reading will need it, also where the index is kept
    stamp = stamp_of((str(file), file) for file in files)
    if cache is not None:
        broken = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)
        with suppress(*broken), np.load(cache) as kept:
            if str(kept["stamp"]) == stamp:
                return _index_of(files, kept["places"], json.loads(str(kept["damaged"])))
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
    return _index_of(files, places, damaged)


def _index_of(files: Sequence[Path], places: np.ndarray, damaged: dict[str, str]) -> TfrecordIndex:
    """places: int64 [n, 3], each example's file, offset and length."""
    names = tuple(str(file) for file in files)
    file, offset, length = places.astype(np.int64).T
    return TfrecordIndex(names, (False,) * len(names), file, offset, length, damaged)


def stamp_of(files: Iterable[tuple[str, Path]]) -> str:
    """A hash of files' names, sizes and times: another one as soon as one of them changes."""
    lines = []
    for name, file in files:
        status = file.stat()
        lines.append(f"{name}|{status.st_size}|{status.st_mtime_ns}")
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()[:16]


def _scan(path: Path) -> tuple[np.ndarray, np.ndarray, str | None]:
    """Offset and payload length of a file's examples, int64, and why it breaks off if it does."""
    size, at = path.stat().st_size, 0
    offsets, lengths, problem = [], [], None
    with path.open("rb", buffering=0) as file:
        while at < size:
            file.seek(at)
            head = file.read(HEAD_BYTES)
            length_bytes, checksum = head[:LENGTH_BYTES], head[LENGTH_BYTES:]
            length = int.from_bytes(length_bytes, "little")
            sound = len(head) == HEAD_BYTES and _checksum(length_bytes) == checksum
            if not sound or at + FRAME_BYTES + length > size:
                problem = (
                    f"{READ_FAILED}: no whole record from byte {at} on, {size - at} bytes left "
                    "out: truncated, compressed, or no tfrecord"
                )
                break
            offsets.append(at)
            lengths.append(length)
            at += FRAME_BYTES + length
    return np.array(offsets, np.int64), np.array(lengths, np.int64), problem


def _checksum(data: bytes) -> bytes:
    """The four bytes that a tfrecord writes after `data`: its CRC32C, masked as the format says."""
    crc = _crc32c_package().value(data)
    masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
    return masked.to_bytes(4, "little")


def _crc32c_package() -> Any:
    return import_package("google_crc32c", "tfrecords")


def read_payload(index: TfrecordIndex, example: int) -> bytes:
    """The bytes of an example.

    Raises:
        OSError: the file cannot be read.
        ValueError: the example's checksum is wrong.
    """
    length = int(index.length[example])
    with open(index.files[index.file[example]], "rb", buffering=0) as file:  # noqa: PTH123  faster
        file.seek(int(index.offset[example]) + HEAD_BYTES)
        data = file.read(length + 4)
    if _checksum(data[:length]) != data[length:]:
        raise ValueError("wrong checksum")
    return data[:length]


def epoch_order(index: TfrecordIndex, seed: int, epoch: int, cycle_length: int) -> np.ndarray:
    """Every example once, int64 [n], in the seeded order of an epoch.

    Files come in random order, cycle_length of them open at a time, whose examples are drawn at
    random. CLIC's few files are spread evenly at random over the epoch's whole length.
    """
    rng = np.random.default_rng((seed, epoch))
    starts = np.searchsorted(index.file, np.arange(len(index.files) + 1))
    resized = np.array(index.resized)[index.file]
    order = np.empty(index.count, np.int64)
    place = rng.permutation(resized)
    for kind in (False, True):
        files = rng.permutation([f for f, flag in enumerate(index.resized) if flag == kind])
        step = max(len(files), 1) if kind else cycle_length
        groups = [
            rng.permutation(
                np.concatenate([np.arange(starts[f], starts[f + 1]) for f in files[at : at + step]])
            )
            for at in range(0, len(files), step)
        ]
        order[place == kind] = np.concatenate([np.empty(0, np.int64), *groups])
    return order
