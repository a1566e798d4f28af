"""Decode the crop of a tfrecord's example by tensorflow's operations.

`tf` is the module, which is imported late. Every other `Any` is one of its tensors.
"""

from typing import Any, NamedTuple

import numpy as np


class Drawn(NamedTuple):
    """The random numbers of a crop.

    `uniform`: float32 [3], in [0, 1). The first decides the flip, the others the top and left.
    `seed`: int64 [2], the seed of a random resized crop.
    `scale`: float32 [] in (0, 1], the factor by which the picture is shrunk; None: by none.
    `is_resized`: whether the crop is a random resized one; None if no file has such crops.
    """

    uniform: Any
    seed: Any
    scale: Any = None
    is_resized: Any = None


def crop_of_example(tf: Any, payload: Any, size: int, drawn: Drawn) -> tuple[Any, Any]:
    """A crop x, uint8 [S, S, 3], of a serialised Example.

    Args:
        payload: the Example's bytes.
        size: S.

    Returns:
        x and False; zeros and True if the picture is too small.
    """
    features = {"image": tf.io.FixedLenFeature([], tf.string)}
    data = tf.io.parse_single_example(payload, features)["image"]
    uniform, seed, scale, is_resized = drawn

    def window_in(shape: Any) -> tuple[Any, Any]:
        side = size if scale is None else _side_in(tf, shape, size, scale)
        room = tf.maximum(shape - side, 0)
        corner = tf.minimum(tf.cast(uniform[1:] * tf.cast(room + 1, tf.float32), tf.int32), room)
        extent = tf.minimum(shape, side)
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
    too_small = tf.reduce_any(tf.shape(x)[:2] < size)
    if is_resized is not None:
        too_small = too_small & ~is_resized
        x = tf.cond(is_resized, lambda: _resize(tf, x, size, "bilinear"), lambda: x)
    if scale is not None:  # a random resized crop has its size by now, and stays as it is
        x = _resize(tf, x, size, "bicubic")
    nothing = tf.zeros([size, size, 3], tf.uint8)
    # Branches, for tf.where and tf.pad would take as long as the decoding.
    x = tf.cond(too_small, lambda: nothing, lambda: x)
    x = tf.cond(uniform[0] < 0.5, lambda: tf.reverse(x, [1]), lambda: x)
    return tf.ensure_shape(x, [size, size, 3]), too_small


def _side_in(tf: Any, shape: Any, size: int, scale: Any) -> Any:
    """The side in a picture of shape (H, W) of a crop that is `size` wide once it is shrunk."""
    side = tf.cast(tf.round(size / scale), tf.int32)
    return tf.maximum(tf.minimum(side, tf.reduce_min(shape)), size)


def _resize(tf: Any, x: Any, size: int, method: str) -> Any:
    """Resize uint8 [H, W, 3] to uint8 [size, size, 3], antialiased."""
    scaled = tf.image.resize(tf.cast(x, tf.float32), [size, size], method, antialias=True)
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
