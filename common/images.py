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

    If its file cannot be read, x is None and `error` says why.
    """

    name: str
    x: Tensor | None
    notes: tuple[str, ...] = ()
    error: str | None = None

    def pixels(self) -> Tensor:
        """x.

        Raises:
            InputError: the file cannot be read; says why.
        """
        if self.x is None:
            raise InputError(self.error)
        return self.x


class Images(Protocol):
    """A set of images to refine.

    `names` are known before any image is read. `passed_over` says in one line which files were left
    out, and is empty if none were.
    """

    names: list[str]
    passed_over: str

    def load(self, names: Iterable[str], num_workers: int) -> Iterator[LoadedImage]:
        """One `LoadedImage` for each of these names, in this order.

        A name is asked for when its image is, or at most `num_workers` images ahead.
        """


class UnreadableError(Exception):
    """An image file cannot be read; one line that says why."""


class ImageFiles(Dataset):
    """Image files on disk, whole or (with `crop`) one seeded random resized crop of each.

    An item is a `LoadedImage`; its name is the path below the folder.
    """

    def __init__(self, found: Found, crop: int | None = None, seed: int = 0):
        self.files = {file.relative_to(found.root).as_posix(): file for file in found.files}
        self.names = list(self.files)
        self.passed_over = found.passed_over
        self.crop = crop
        self.seed = seed

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> LoadedImage:
        name = self.names[index]
        try:
            picture = self.picture(index)
        except UnreadableError as error:
            return LoadedImage(name, None, error=str(error))
        image = picture.image
        if self.crop is not None:
            image = seeded_crop(image, self.crop, seed_of(self.seed, name))
        return LoadedImage(name, to_tensor(image), picture.notes)

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


def why_unreadable(error: Exception, file: Path, name: str) -> str:
    """A decoder's reason in one line, with the image's `name` in place of the path of `file`."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    shown = text.replace(str(file), printable(name)).strip() or type(error).__name__
    shown = re.sub(r"<_io\.BytesIO[^>]*>", lambda _: printable(name), shown)
    return printable(shown.splitlines()[0])


def to_tensor(image: Image.Image) -> Tensor:
    """x [3, H, W], float32 in [0, 1], of an RGB picture."""
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8))  # [H, W, 3]
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


def seeded_crop(image: Image.Image, size: int, seed: int) -> Image.Image:
    """torchvision's random resized crop to size x size pixels; a seed always gives the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return RandomResizedCrop(size)(image)
