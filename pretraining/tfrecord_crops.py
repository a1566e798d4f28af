"""Random crops of tfrecords, read and decoded by tf.data."""

import os
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from common.errors import InputError
from common.optional_packages import import_tensorflow, require_package
from pretraining.draws import READ_FAILED, TOO_SMALL, Batch, Draws, OnSkip, no_crop_message
from pretraining.example_crop import Drawn, crop_of_example
from pretraining.tfrecord_index import TfrecordIndex, epoch_order, read_payload


class TfrecordCrops:
    """Random crops of tfrecords, read and decoded by tf.data in parallel.

    The bytes feature `image` of an example is an encoded picture. Of a JPEG only the crop is
    decoded. Files that the index calls `resized` get torchvision's RandomResizedCrop. Pictures of
    the others are first shrunk by a random factor from `smallest_scale` to 1.

    Raises:
        InputError: tensorflow is not installed.
    """

    passed_over = ""

    def __init__(
        self, index: TfrecordIndex, size: int, batch_size: int, cycle_length: int,
        num_workers: int = 0, smallest_scale: float = 1.0,
    ):  # fmt: skip
        require_package("tensorflow", "tfrecords")
        self.index = index
        self.size = size
        self.batch_size = batch_size
        self.cycle_length = cycle_length
        self.smallest_scale = smallest_scale
        self.parallel = num_workers or os.cpu_count() or 1
        self.count = index.count
        self.name = f"records in {len(index.files)} files"

    def batches(self, draws: Draws, on_skip: OnSkip) -> Iterator[Batch]:
        """Endless batches, see `TrainingData`.

        Raises:
            InputError: no example gives a crop, or the files cannot be read any more.
        """
        for file, why in self.index.damaged.items():
            if draws.rank == 0:
                on_skip(file, why)
        pipeline = _Pipeline(self, draws, on_skip)
        pipeline.find_one_usable()
        yield from pipeline.batches()


class _Pipeline:
    """The tf.data pipeline from the index of examples to batches of crops, in the order of draws.

    If an example fails, its draw is dropped. The gap in the numbers of the draws shows which.
    """

    def __init__(self, data: TfrecordCrops, draws: Draws, on_skip: OnSkip):
        self.tf = import_tensorflow()
        self.data = data
        self.draws = draws
        self.on_skip = on_skip
        self._too_small: set[int] = set()  # draws g
        self._failed_in_a_row = 0
        resized = data.index.resized
        self._resized = self.tf.constant(resized) if any(resized) else None

    def batches(self) -> Iterator[Batch]:
        """Endless batches; draws that are missing between them are reported.

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
            # No copy: both libraries use the same memory.
            x = torch.from_dlpack(tf.experimental.dlpack.to_dlpack(x))  # [B, S, S, 3]
            yield Batch(x.permute(0, 3, 1, 2), self.draws.position_after(used))
        raise InputError(f"path_train: {self.data.index.files[0]} and all others: not readable")

    def find_one_usable(self) -> None:
        """Check that one example gives a crop, for `batches` would wait for ever without one.

        Raises:
            InputError: no example does.
        """
        epoch = self.draws.position * self.draws.world // self.data.count
        # In `world` epochs this rank draws each example once.
        epochs = self.tf.data.Dataset.range(epoch + 1, epoch + 1 + self.draws.world)
        if not any(True for _ in self._crops(epochs).take(1)):
            reason = TOO_SMALL if self._too_small else READ_FAILED
            example = f"{self.data.index.name_of(0)}, {reason}"
            raise InputError(no_crop_message("path_train", self.data.size, example))
        self._too_small.clear()

    def _report(self, g: int) -> None:
        """Call `on_skip` for a draw that gave no crop."""
        reason = TOO_SMALL if g in self._too_small else READ_FAILED
        self._too_small.discard(g)
        epoch, place = divmod(g, self.data.count)
        self.on_skip(self.data.index.name_of(int(self._order(epoch)[place])), reason)

    def _note_too_small(self, g: np.ndarray) -> np.bool_:
        """Remember that a draw's picture is too small; False makes tensorflow's filter drop it."""
        self._too_small.add(int(g))
        return np.bool_(False)

    def _read(self, example: np.ndarray) -> bytes:
        self._failed_in_a_row += 1
        payload = read_payload(self.data.index, int(example))
        self._failed_in_a_row = 0
        return payload

    def _still_readable(self, epoch: np.ndarray) -> np.bool_:
        """False once two epochs of examples in a row could not be read: their files are gone."""
        return np.bool_(self._failed_in_a_row <= 2 * self.data.count + 100)

    @lru_cache(maxsize=3)  # noqa: B019  there is one pipeline in a run
    def _order(self, epoch: int) -> np.ndarray:
        return epoch_order(self.data.index, self.draws.seed, epoch, self.data.cycle_length)

    def _epoch_table(self, epoch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """This rank's k draws of an epoch.

        Returns:
            g, example and file of each, int64 [k, 3]; its uniform random numbers, float32 [k, 3],
            and the factor that shrinks its picture, float32 [k, 1], side by side.
        """
        index, draws, count = self.data.index, self.draws, self.data.count
        g = np.arange(count, dtype=np.int64) + epoch * count
        mine = (g % draws.world == draws.rank) & (g >= draws.position * draws.world)
        order = self._order(int(epoch))[mine]
        uniform = np.random.default_rng((draws.seed, int(epoch), 1)).random((count, 3), np.float32)
        rng = np.random.default_rng((draws.seed, int(epoch), 2))
        scale = rng.uniform(self.data.smallest_scale, 1, (count, 1)).astype(np.float32)
        numbers = np.concatenate((uniform, scale), axis=1)
        return np.stack((g[mine], order, index.file[order]), axis=1), numbers[mine]

    def _crops(self, epochs: Any) -> Any:
        """The usable draws of `epochs` as a Dataset: x, uint8 [S, S, 3], and g of each."""
        tf, data = self.tf, self.data

        def readable(epoch: Any) -> Any:
            return tf.numpy_function(self._still_readable, [epoch], tf.bool)

        def rows_of(epoch: Any) -> Any:
            rows, numbers = tf.numpy_function(self._epoch_table, [epoch], (tf.int64, tf.float32))
            table = tf.ensure_shape(rows, [None, 3]), tf.ensure_shape(numbers, [None, 4])
            return tf.data.Dataset.from_tensor_slices(table)

        def crop(row: Any, numbers: Any) -> Any:
            g, example, file = tf.unstack(row, num=3)
            payload = tf.ensure_shape(tf.numpy_function(self._read, [example], tf.string), [])
            seed = tf.stack([tf.constant(self.draws.seed, tf.int64), g])
            is_resized = None if self._resized is None else self._resized[file]
            scale = numbers[3] if data.smallest_scale < 1 else None
            drawn = Drawn(numbers[:3], seed, scale, is_resized)
            return *crop_of_example(tf, payload, data.size, drawn), g

        def big_enough(x: Any, too_small: Any, g: Any) -> Any:
            return tf.cond(
                too_small,
                lambda: tf.numpy_function(self._note_too_small, [g], tf.bool),
                lambda: tf.constant(True),
            )

        rows = epochs.take_while(readable).flat_map(rows_of)
        # One more than the cores, for one is always waiting.
        crops = rows.map(crop, num_parallel_calls=data.parallel + 1, deterministic=True)
        return crops.ignore_errors().filter(big_enough).map(lambda x, too_small, g: (x, g))
