"""Images as tensors: read from files, cropped by a seed, and written as PNG."""

import hashlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import RandomResizedCrop

from common.errors import InputError
from common.files import printable, write_whole
from common.finding import Found
from common.pictures import Picture, read_picture
from common.workers import items_of


class LoadedImage(NamedTuple):
    """One image: x [3, H, W] in [0, 1], and notes on what was converted in it.

    `region` [1, H, W] in [0, 1] says where distortion counts more. It is None if the image has no
    map, else it is above 0 somewhere. If a file cannot be read, x is None and `error` says why.
    """

    name: str
    x: Tensor | None
    notes: tuple[str, ...] = ()
    error: str | None = None
    region: Tensor | None = None

    def pixels(self) -> Tensor:
        """x.

        Raises:
            InputError: the file cannot be read; says why.
        """
        if self.x is None:
            raise InputError(self.error)
        return self.x


class Region(NamedTuple):
    """The map of an image: a grey picture (mode "L") of its size, where it is from, and notes."""

    image: Image.Image
    source: str
    notes: tuple[str, ...] = ()


class Maps(Protocol):
    """The maps of a set of images; `messages` say in a line each which do not fit."""

    messages: tuple[str, ...]

    def of(self, name: str, image: Image.Image) -> Region | None:
        """The map of an RGB picture; None if it has none.

        Raises:
            UnreadableError: its file cannot be read; says why.
        """


class Crop(Protocol):
    """What is cut out of each image, and of its map."""

    def of(self, name: str, image: Image.Image) -> Image.Image:
        """The part of a picture to refine.

        Raises:
            UnreadableError: the picture is too small; says why.
        """


class Images(Protocol):
    """A set of images to refine.

    `names` are known before any image is read. `passed_over` says in one line which files were left
    out, and is empty if none were. `maps` and `crop` may be set before images are read;
    `map_messages` are those of the maps.
    """

    names: list[str]
    passed_over: str
    maps: Maps | None
    crop: Crop | None

    @property
    def map_messages(self) -> tuple[str, ...]:
        """In a line each, which images have no map, and which maps fit no image."""

    def load(self, names: Iterable[str], num_workers: int) -> Iterator[LoadedImage]:
        """One `LoadedImage` for each of these names, in this order.

        A name is asked for when its image is, or at most `num_workers` images ahead.
        """


BLACK = "is black all over the image: paint white what counts most"
BLACK_IN_CROP = "is black all over the crop: paint white what counts most there"


class UnreadableError(Exception):
    """An image file cannot be read, or is too small for a crop; one line that says why."""


class SeededCrop(NamedTuple):
    """One random resized crop of side x side pixels; a seed always gives the same."""

    side: int
    seed: int

    def of(self, name: str, image: Image.Image) -> Image.Image:
        """The crop of a picture, which depends on the seed and the name."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(self.seed, name))
            return RandomResizedCrop(self.side)(image)


class CentreCrop(NamedTuple):
    """The square of side x side pixels in the middle of a picture, not resized."""

    side: int

    def of(self, name: str, image: Image.Image) -> Image.Image:
        """The middle of a picture; where it cannot be exact, half a pixel more to the top left.

        Raises:
            UnreadableError: the picture is smaller.
        """
        width, height = image.size
        if min(width, height) < self.side:
            raise UnreadableError(
                f"has {width}x{height} pixels; its crop needs {self.side} or more a side"
            )
        left, top = (width - self.side) // 2, (height - self.side) // 2
        return image.crop((left, top, left + self.side, top + self.side))


class MappedAndCropped:
    """A set of images that may have maps, and of which a part may be cut out."""

    maps: Maps | None = None
    crop: Crop | None = None

    @property
    def map_messages(self) -> tuple[str, ...]:
        """In a line each, which images have no map, and which maps fit no image."""
        return self.maps.messages if self.maps is not None else ()


class ImageFiles(MappedAndCropped, Dataset):
    """Image files on disk. An item is a `LoadedImage`; its name is the path below the folder."""

    def __init__(self, found: Found, crop: Crop | None = None, maps: Maps | None = None):
        self.files = {file.relative_to(found.root).as_posix(): file for file in found.files}
        self.names = list(self.files)
        self.passed_over = found.passed_over
        self.crop = crop
        self.maps = maps

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> LoadedImage:
        name = self.names[index]
        try:
            picture = self.picture(index)
        except UnreadableError as error:
            return LoadedImage(name, None, error=str(error))
        return load_image(name, picture.image, picture.notes, self.maps, self.crop)

    def picture(self, index: int) -> Picture:
        """An upright RGB picture of 8 bits, and notes on what was converted.

        Raises:
            UnreadableError: the file cannot be read; says why.
        """
        name = self.names[index]
        try:
            return read_picture(self.files[name])
        except Exception as error:  # damaged files make decoders raise dozens of kinds
            raise UnreadableError(why_unreadable(error, self.files[name], name)) from None

    def load(self, names: Iterable[str], num_workers: int = 0) -> Iterator[LoadedImage]:
        """Read images by name, in this order; `num_workers` processes read ahead, 0: none.

        Each of them reads one image ahead: names may be shared with processes that wait for them.
        """
        position = {name: index for index, name in enumerate(self.names)}
        loader: DataLoader = DataLoader(
            self, batch_size=None, sampler=(position[name] for name in names),
            num_workers=num_workers, prefetch_factor=1 if num_workers else None,
            collate_fn=as_it_is, generator=torch.Generator(),
        )  # fmt: skip
        yield from items_of(loader)


def as_it_is(item: Any) -> Any:
    """The `collate_fn` of a data loader that shall not turn arrays into tensors."""
    return item


def load_image(
    name: str,
    image: Image.Image,
    notes: tuple[str, ...] = (),
    maps: Maps | None = None,
    crop: Crop | None = None,
) -> LoadedImage:
    """An RGB picture and its map, both after `crop`.

    The image's `error` says that it is too small for the crop, or that its map cannot be read or is
    black all over the crop.
    """
    try:
        region = maps.of(name, image) if maps is not None else None
        part = image if crop is None else crop.of(name, image)
        if region is None:
            return LoadedImage(name, to_tensor(part), notes)
        grey = region.image if crop is None else crop.of(name, region.image)
        if is_black(grey):
            where = BLACK if crop is None else BLACK_IN_CROP
            raise UnreadableError(f"{region.source} {where}")
    except UnreadableError as error:
        return LoadedImage(name, None, error=str(error))
    return LoadedImage(name, to_tensor(part), notes + region.notes, region=to_tensor(grey))


def is_black(grey: Image.Image) -> bool:
    """Whether a picture of mode "L" is 0 everywhere."""
    return grey.getbbox() is None


def why_unreadable(error: Exception, file: Path, name: str) -> str:
    """A decoder's reason in one line, with the image's `name` in place of the path of `file`."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    shown = text.replace(str(file), printable(name)).strip() or type(error).__name__
    shown = re.sub(r"<_io\.BytesIO[^>]*>", lambda _: printable(name), shown)
    return printable(shown.splitlines()[0])


def to_tensor(image: Image.Image) -> Tensor:
    """[3, H, W] of an RGB picture, [1, H, W] of a grey one; float32 in [0, 1]."""
    pixels = torch.from_numpy(np.atleast_3d(np.array(image, dtype=np.uint8)))  # [H, W, C]
    return pixels.permute(2, 0, 1).contiguous().float() / 255


def to_pixels(x: Tensor) -> np.ndarray:
    """uint8 [H, W, 3] of x [3, H, W], clamped to [0, 1]."""
    return (x.detach().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()


def save_picture(path: Path, x: Tensor) -> Path:
    """Write a PNG of x [3, H, W], clamped to [0, 1] and rounded to 8 bits.

    Raises:
        OSError: it cannot be written.
    """
    return write_whole(path, lambda file: Image.fromarray(to_pixels(x)).save(file, format="PNG"))


def seed_of(seed: int, name: str) -> int:
    """The seed of one image, in [0, 2^48); it does not depend on the other images.

    torch's CPU generator uses its low 32 bits only.
    """
    text = f"{seed}:{name}".encode(errors="surrogateescape")
    return int.from_bytes(hashlib.sha256(text).digest()[:6], "big")
