"""Decode the crop of a tfrecord's example by tensorflow's operations.

`tf` is the module, which is imported late. Every other `Any` is one of its tensors.
"""

from typing import Any

import numpy as np


def crop_of_example(
    tf: Any, payload: Any, size: int, uniform: Any, seed: Any, is_resized: Any
) -> tuple[Any, Any]:
    """A crop x, uint8 [S, S, 3], of a serialised Example.

    Args:
        payload: the Example's bytes.
        size: S.
        uniform: float32 [3], uniform random numbers in [0, 1). The first decides the flip, the
            others the top and left of the crop.
        seed: int64 [2], the seed of a random resized crop.
        is_resized: whether the crop is a random resized one; None if no file has such crops.

    Returns:
        x and False; zeros and True if the picture is too small.
    """
    features = {"image": tf.io.FixedLenFeature([], tf.string)}
    data = tf.io.parse_single_example(payload, features)["image"]

    def window_in(shape: Any) -> tuple[Any, Any]:
        room = tf.maximum(shape - size, 0)
        corner = tf.minimum(tf.cast(uniform[1:] * tf.cast(room + 1, tf.float32), tf.int32), room)
        extent = tf.minimum(shape, size)
        if is_resized is None:
            return corner, extent
        other_corner, other_extent = _resized_window(tf, shape, seed)
        return (
            tf.where(is_resized, other_corner, corner), tf.where(is_resized, other_extent, extent)
        )  # fmt: skip

    def from_jpeg() -> Any:  # only the window is decoded
        window = tf.concat(window_in(tf.io.extract_jpeg_shape(data)[:2]), axis=0)
        # As PIL and all viewers decode it; tensorflow's default is a coarser transform.
        return tf.io.decode_and_crop_jpeg(data, window, 3, dct_method="INTEGER_ACCURATE")

    def from_another() -> Any:
        pixels = tf.io.decode_image(data, channels=3, expand_animations=False)
        corner, extent = window_in(tf.shape(pixels)[:2])
        return tf.slice(pixels, tf.pad(corner, [[0, 1]]), tf.concat([extent, [3]], axis=0))

    x = tf.ensure_shape(tf.cond(tf.io.is_jpeg(data), from_jpeg, from_another), [None, None, 3])
    if is_resized is not None:
        x = tf.cond(is_resized, lambda: _resize(tf, x, size), lambda: x)
    nothing = tf.zeros([size, size, 3], tf.uint8)
    too_small = tf.reduce_any(tf.shape(x)[:2] < size)
    # Branches, for tf.where and tf.pad would take as long as the decoding.
    x = tf.cond(too_small, lambda: nothing, lambda: x)
    x = tf.cond(uniform[0] < 0.5, lambda: tf.reverse(x, [1]), lambda: x)
    return tf.ensure_shape(x, [size, size, 3]), too_small


def _resize(tf: Any, x: Any, size: int) -> Any:
    """Resize uint8 [H, W, 3] to uint8 [size, size, 3], bilinear, antialiased."""
    scaled = tf.image.resize(tf.cast(x, tf.float32), [size, size], antialias=True)
    return tf.cast(tf.clip_by_value(tf.round(scaled), 0, 255), tf.uint8)


def _resized_window(tf: Any, shape: Any, seed: Any) -> tuple[Any, Any]:
    """Corner and extent of torchvision's RandomResizedCrop in a picture of shape (H, W).

    It has 8 to 100 % of the area and an aspect of 3/4 to 4/3. If ten tries do not fit into the
    picture, it is the largest central window of such an aspect.
    """
    # The random numbers of each try: its area, aspect, top and left.
    uniform = tf.unstack(tf.random.stateless_uniform([10, 4], seed), axis=1)
    height, width = tf.unstack(tf.cast(shape, tf.float32), num=2)
    area = height * width * (0.08 + 0.92 * uniform[0])
    aspect = tf.exp(np.log(4 / 3) * (2 * uniform[1] - 1))
    extents = tf.round(tf.stack((tf.sqrt(area / aspect), tf.sqrt(area * aspect)), axis=1))
    sides = tf.stack((height, width))
    fits = tf.reduce_all((extents > 0) & (extents <= sides), axis=1)
    first = tf.argmax(fits)
    central = tf.round(tf.minimum(sides, sides[::-1] * 4 / 3))
    extent = tf.where(tf.reduce_any(fits), extents[first], central)
    place = tf.where(tf.reduce_any(fits), tf.stack((uniform[2][first], uniform[3][first])), 0.5)
    room = sides - extent
    corner = tf.minimum(tf.floor(place * (room + 1)), room)
    return tf.cast(corner, tf.int32), tf.cast(extent, tf.int32)
