"""Directions in which a decoder's last layer changes, learnt from photos.

A picture gains when the last layer is fitted to it, but its thousands of weights cost more bits
than that saves. Most of the gain lies in a few directions, which are alike for all photos. So a
file of directions lies beside the weights, and a coded picture only has a few factors.
"""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from architectures.base import Architecture
from common.errors import InputError
from common.files import write_whole
from fast.freezing import is_frozen
from fast.last_layer import LastLayer, last_layer_of

SUFFIX = ".directions.npz"
MOST = 4096  # directions in a file


class Directions(NamedTuple):
    """Changes of the last layer, the most useful ones first; see `pretraining.learn_directions`.

    weight: [K, C, 3, 5, 5], bias: [K, 3]. A factor of 1 changes the mean squared error, summed over
    the three colours, of a typical photo by 1. weights: the hash of the model's weights. mark: two
    bytes that tell this file from others.
    """

    weight: Tensor
    bias: Tensor
    weights: str
    mark: bytes

    def change(self, factors: Tensor) -> LastLayer:
        """The change of the last layer for up to K factors; those that are missing are 0."""
        used = factors.to(self.weight)
        of = (torch.einsum("k,k...->...", used, v[: len(used)]) for v in (self.weight, self.bias))
        return LastLayer(*of)


class MissingDirectionsError(InputError):
    """There is no file of directions at `path`; the message ends with what to do."""

    def __init__(self, path: Path, hint: str = "python -m pretraining.learn_directions makes it"):
        super().__init__(f"directions {path}: no such file; {hint}")
        self.path = path


@contextmanager
def hint_for_missing(hint: str) -> Iterator[None]:
    """Make the error of a missing file of directions say what to do here."""
    try:
        yield
    except MissingDirectionsError as error:
        raise MissingDirectionsError(error.path, hint) from None


class DirectionsFile:
    """Finds a model's directions in a file, which is read once, when it is first called.

    It keeps what the file must fit, not the model: freezing a model changes its hash.
    """

    def __init__(self, path: Path, model: Architecture):
        last = last_layer_of(getattr(model.network, "g_s", None))
        self.path = path
        self._name, self._weights = model.name, model.weights_hash
        self._shapes = None if last is None else (last.weight.shape, last.bias.shape)

    def __call__(self) -> Directions:
        """The directions; see `load_directions`."""
        return self._directions

    @cached_property
    def _directions(self) -> Directions:
        path = self.path
        if self._shapes is None:
            raise InputError(f"directions: the decoder of {self._name} does not end with a deconv")
        if not path.is_file():
            raise MissingDirectionsError(path)
        weight, bias, weights = _read_arrays(path)
        if weights != self._weights:
            raise InputError(
                f"directions {path}: for weights {weights}, but these are {self._weights}"
            )
        sound = weight.dim() == 5 and bias.dim() == 2 and 0 < len(weight) == len(bias) <= MOST
        sound = sound and weight.dtype == bias.dtype == torch.float16
        sound = sound and (weight.shape[1:], bias.shape[1:]) == self._shapes
        if not sound or not (weight.isfinite().all() and bias.isfinite().all()):
            raise InputError(f"directions {path}: no file of directions (its arrays are wrong)")
        checksum = zlib.crc32(bias.numpy().tobytes(), zlib.crc32(weight.numpy().tobytes()))
        mark = checksum.to_bytes(4, "little")[:2]
        return Directions(weight.float(), bias.float(), weights, mark)


def use_directions(model: Architecture, path: Path) -> None:
    """Let a model find its directions in a file, which is read when needed.

    Raises:
        ValueError: the model is frozen, and finds no directions in this file yet.
    """
    used = model.find_directions
    if isinstance(used, DirectionsFile) and used.path == path:
        return
    if is_frozen(model.network):
        raise ValueError("set the directions of a model before freezing it")
    model.find_directions = DirectionsFile(path, model)


def directions_beside(checkpoint: str) -> Path:
    """Where the directions of a checkpoint are: `a.pth.tar` has `a.directions.npz`."""
    path = Path(checkpoint)
    name = path.name
    for suffix in (".tar", ".pth", ".pt", ".safetensors"):
        name = name.removesuffix(suffix)
    return path.with_name(name + SUFFIX)


def save_directions(path: Path, weight: Tensor, bias: Tensor, weights: str) -> None:
    """Write directions in half precision.

    Args:
        weights: the hash of the model's weights.

    Raises:
        ValueError: a number is beyond the range of half precision.
        OSError: the file cannot be written.
    """
    arrays = {"weight": weight.half().numpy(), "bias": bias.half().numpy()}
    if not all(np.isfinite(array).all() for array in arrays.values()):
        raise ValueError("directions beyond the range of half precision")

    def write(file: Path) -> None:
        with file.open("wb") as out:
            np.savez_compressed(out, weights=np.array(weights), **arrays)

    write_whole(path, write)


def load_directions(path: Path, model: Architecture) -> Directions:
    """The directions in a file, which must be those of the model; it is not frozen.

    Raises:
        MissingDirectionsError: there is no such file.
        InputError: the file is broken or of other weights, or the decoder does not end with a
            transposed convolution.
    """
    return DirectionsFile(path, model)()


def _read_arrays(path: Path) -> tuple[Tensor, Tensor, str]:
    """The weight, the bias and the hash of the weights in a file, not checked."""
    try:
        with np.load(path) as arrays:
            weights = str(arrays["weights"])
            weight, bias = (torch.from_numpy(arrays[name]) for name in ("weight", "bias"))
    except Exception as error:  # damaged files make numpy raise a dozen kinds
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(f"directions {path}: no file of directions ({reason})") from None
    return weight, bias, weights
