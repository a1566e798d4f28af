"""Numbered pictures, whose crops tell where they lay, and tfrecords of them."""

import io

import numpy as np
from PIL import Image

import datasets
from common.optional_packages import import_tensorflow
from pretraining.draws import Draws
from pretraining.tfrecord_crops import TfrecordCrops
from pretraining.tfrecord_index import index_tfrecords

SIZE = 64  # of the crops, pixels a side
FIRST_DRAWS = Draws(0)


def picture(number, width=100, height=90):
    """Red counts columns, green rows, blue is the picture's number: a crop tells where it lay."""
    columns, rows = np.meshgrid(np.arange(width), np.arange(height))
    return np.stack((columns, rows, np.full_like(rows, number)), axis=-1).astype(np.uint8)


def encode(pixels, form="PNG", **options):
    buffer = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(
        buffer, form, **options
    )
    return buffer.getvalue()


def write_tfrecord(path, images):
    """A tfrecord of the published features, written by tensorflow itself."""
    tf = import_tensorflow()
    with tf.io.TFRecordWriter(str(path)) as writer:
        for image in images:
            values = {"image": image, "height": b"1", "width": b"1", "channels": b"3"}
            feature = {
                key: tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))
                for key, value in values.items()
            }
            example = tf.train.Example(features=tf.train.Features(feature=feature))
            writer.write(example.SerializeToString())


def draw(source, count, draws=FIRST_DRAWS, batch_size=1, num_workers=0, smallest_scale=1.0):
    """`count` batches of tfrecords, and what was skipped."""
    skipped = {}
    data = TfrecordCrops(index_tfrecords(source), SIZE, batch_size, 2, num_workers, smallest_scale)
    batches = data.batches(draws, skipped.__setitem__)
    drawn = [next(batches) for _ in range(count)]
    batches.close()
    return drawn, skipped


def numbers_of(batches):
    return [int(x[2, 0, 0]) for batch in batches for x in batch.x]


def is_crop(x, number):
    """Whether x, uint8 [3, S, S], lies in picture(number), mirrored or not, pixel by pixel."""
    pixels = x.permute(1, 2, 0).numpy()
    if pixels[0, 0, 0] > pixels[0, -1, 0]:
        pixels = pixels[:, ::-1]
    left, top = pixels[0, 0, :2]
    whole = picture(number)
    return np.array_equal(pixels, whole[top : top + SIZE, left : left + SIZE])


def shrunk_by(x):
    """By how much the picture of a crop x, uint8 [3, S, S], was shrunk, along x and y.

    From pixel to pixel red or green grow by that, once x is not mirrored.
    """
    values = x.int()
    width, height = abs(values[0, 0, -9] - values[0, 0, 8]), values[1, -9, 0] - values[1, 8, 0]
    return [float(extent) / (SIZE - 17) for extent in (width, height)]


def convert(images, out, shards=2):
    """The exit code of a conversion of a folder of images to tfrecords, in one process."""
    return datasets.main([
        "make-tfrecords", "--images", str(images), "--out", str(out),
        "--shards", str(shards), "--workers", "1",
    ])  # fmt: skip
