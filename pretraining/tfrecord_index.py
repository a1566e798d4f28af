"""Find and read the examples of tfrecord files, and give them the order of an epoch.

A tfrecord file is a sequence of examples. Each has the payload's length (8 bytes), the checksum of
the length (4), the payload, and the payload's checksum (4).
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
    """The places of the n examples in a list of tfrecord files.

    `resized`: for each file, whether its crops are random resized ones, as CLIC's are. `damaged`:
    the files that cannot be read to their end, with the reasons.
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
        """One index of all examples, those of `self` first."""
        return TfrecordIndex(
            self.files + other.files,
            self.resized + other.resized,
            np.concatenate((self.file, other.file + len(self.files))),
            np.concatenate((self.offset, other.offset)),
            np.concatenate((self.length, other.length)),
            {**self.damaged, **other.damaged},
        )

    def name_of(self, example: int) -> str:
        """The name of an example in messages: its file, and its number there, from 0."""
        file = int(self.file[example])
        place = example - int(np.searchsorted(self.file, file))
        return f"{self.files[file]} record {place}"


def index_tfrecords(path: str | Path, key: str = "path_train.train_imagenet") -> TfrecordIndex:
    """Index the tfrecords below a folder, or one file; a folder's index is stored in the folder.

    Args:
        key: the config's key that holds the path; messages begin with it.

    Raises:
        InputError: there is no such folder, no example is in it, or google_crc32c is not installed.
        OSError: a file cannot be read.
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
    """Find every example by the lengths stored in the files; reads no payload.

    Args:
        cache: the file that stores the index; it is valid while names, sizes and times are equal.

    Raises:
        InputError: google_crc32c is not installed.
        OSError: a file cannot be read.
    """
    _crc32c_package()  # needed to read payloads, even with a stored index
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
        with suppress(OSError):  # the folder of the data may be read-only
            write_whole(cache, lambda path: np.savez(path, **kept))
    return _index_of(files, places, damaged)


def _index_of(files: Sequence[Path], places: np.ndarray, damaged: dict[str, str]) -> TfrecordIndex:
    """The index of `places`, int64 [n, 3]: each example's file, offset and length."""
    names = tuple(str(file) for file in files)
    file, offset, length = places.astype(np.int64).T
    return TfrecordIndex(names, (False,) * len(names), file, offset, length, damaged)


def stamp_of(files: Iterable[tuple[str, Path]]) -> str:
    """A hash of the names, sizes and times of files: it changes if one of these does.

    Raises:
        OSError: there is no such file.
    """
    lines = []
    for name, file in files:
        status = file.stat()
        lines.append(f"{name}|{status.st_size}|{status.st_mtime_ns}")
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()[:16]


def _scan(path: Path) -> tuple[np.ndarray, np.ndarray, str | None]:
    """Offsets and payload lengths of a file's examples, int64; and what is wrong, or None."""
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
    """The four checksum bytes that follow `data` in a tfrecord: its CRC32C, masked."""
    crc = _crc32c_package().value(data)
    masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
    return masked.to_bytes(4, "little")


def _crc32c_package() -> Any:
    return import_package("google_crc32c", "tfrecords")


def read_payload(index: TfrecordIndex, example: int) -> bytes:
    """The payload of an example.

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
    """The order of the examples in an epoch: int64 [n], each example once.

    Files come in random order, in groups of `cycle_length`. The examples of a group are mixed at
    random. The examples of `resized` files are mixed over the whole epoch.
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
