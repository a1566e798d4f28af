"""Image files and data sets become named tensors x [3, H, W] in [0, 1].

A data set has `names`, known before anything is read, and `load(names)`, which yields one
`LoadedImage` a name. A file that cannot be read is one too, with its `error`.
"""

import hashlib
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import skimage
import tifffile
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms import RandomResizedCrop

from config import InputError, RefineConfig

IMAGE_SUFFIXES = frozenset((
    ".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".avif", ".jp2", ".ppm", ".pgm",
    ".pnm", ".gif",
))  # fmt: skip
TIFF_SUFFIXES = frozenset((".tif", ".tiff"))
ORIENTATION = 0x0112  # the tag's number in EXIF and TIFF

# Public domain or CC0, shipped inside scikit-image's package.
SAMPLE_PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")


class LoadedImage(NamedTuple):
    """One image: x [3, H, W] in [0, 1], what was converted, or why it cannot be read."""

    name: str
    x: Tensor | None
    notes: tuple[str, ...] = ()
    error: str | None = None


class Images(Protocol):
    """What refinement needs of a data set."""

    names: list[str]

    def load(self, names: Sequence[str], num_workers: int) -> Iterator[LoadedImage]:
        """The images of these names, in this order."""


def seed_of(seed: int, name: str) -> int:
    """A seed in [0, 2^48) of one image, whatever the order or the subset of the others.

    Of these, torch's CPU generator uses the low 32 bits.
    """
    text = f"{seed}:{name}".encode(errors="surrogateescape")
    return int.from_bytes(hashlib.sha256(text).digest()[:6], "big")


# --- files ----------------------------------------------------------------------------------------


def find_images(path: str | Path, suffixes: frozenset[str] = IMAGE_SUFFIXES) -> list[Path]:
    """The image files below a folder, sorted by their path in it; or the one file at `path`.

    Raises:
        InputError: nothing there, or no image in it.
    """
    path = Path(path).expanduser()
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise InputError(f"{path}: no such folder or file (looked from {Path.cwd()})")
    found = [
        file
        for file in path.rglob("*")
        if file.suffix.lower() in suffixes
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
        and file.is_file()
    ]
    if not found:
        raise InputError(f"{path}: no image in it (looked for {' '.join(sorted(suffixes))})")
    return sorted(found, key=lambda file: file.relative_to(path).as_posix())


class ImageFiles(Dataset):
    """Image files on disk, whole or (with `crop`) one seeded random resized crop of each.

    An item is a `LoadedImage`; its name is the path below `root`.
    """

    def __init__(self, files: Sequence[Path], root: Path, crop: int | None = None, seed: int = 0):
        self.files = {file.relative_to(root).as_posix(): file for file in files}
        self.names = list(self.files)
        self.crop = crop
        self.seed = seed

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> LoadedImage:
        name = self.names[index]
        try:
            image, notes = read_rgb(self.files[name])
        except Exception as error:  # damaged files make decoders raise dozens of kinds
            reason = str(error).replace(str(self.files[name]), name) or type(error).__name__
            return LoadedImage(name, None, error=reason.splitlines()[0])
        if self.crop is not None:
            image = seeded_crop(image, self.crop, seed_of(self.seed, name))
        return LoadedImage(name, to_tensor(image), notes)

    def load(self, names: Sequence[str], num_workers: int = 0) -> Iterator[LoadedImage]:
        """The images of these names, in this order, read ahead by `num_workers` processes."""
        position = {name: index for index, name in enumerate(self.names)}
        chosen = Subset(self, [position[name] for name in names])
        yield from DataLoader(
            chosen, batch_size=None, num_workers=num_workers, collate_fn=_as_it_is
        )


def _as_it_is(image: LoadedImage) -> LoadedImage:
    return image


def read_rgb(path: Path) -> tuple[Image.Image, tuple[str, ...]]:
    """An upright 8-bit RGB picture, and what had to be converted for it.

    Raises:
        OSError, ValueError, and whatever else a decoder makes of a damaged file: unreadable, or
            pixels without a meaning in 8 bits.
    """
    # From memory: Pillow's memory-mapped TIFFs come out scrambled where EXIF turns them.
    data = io.BytesIO(path.read_bytes())
    if path.suffix.lower() in TIFF_SUFFIXES:
        deep = _read_deep_tiff(data)
        if deep is not None:
            return deep
    image = Image.open(data)
    layout = str(image.tile[0].args) if image.tile else ""
    orientation = image.getexif().get(ORIENTATION, 1)
    image.load()
    notes = []
    if orientation != 1:
        notes.append("turned upright as its EXIF orientation says")
        image = ImageOps.exif_transpose(image)
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _from_16_bits(np.asarray(image))
        return image, (*notes, "16 bits of grey scaled to 8 bits and RGB")
    if image.mode == "F":
        raise ValueError("32-bit floating-point pixels; save it with 8 or 16 bits")
    if ";16" in layout:
        notes.append("16 bits reduced to 8")
    if image.has_transparency_data:
        notes.append(f"{image.mode} with transparency composited on white")
        image = _on_white(image)
    elif image.mode != "RGB":
        notes.append(f"{image.mode} converted to RGB")
        image = image.convert("RGB")
    return image, tuple(notes)


def _read_deep_tiff(data: io.BytesIO) -> tuple[Image.Image, tuple[str, ...]] | None:
    """A TIFF of more than 8 bits, which Pillow reads in part only; None for every other."""
    with tifffile.TiffFile(data) as file:
        page = file.pages[0]
        bits = np.max(page.bitspersample)
        if bits <= 8:
            data.seek(0)
            return None
        pixels = page.asarray()
        if page.planarconfig == tifffile.PLANARCONFIG.SEPARATE and pixels.ndim == 3:
            pixels = np.moveaxis(pixels, 0, -1)  # [C, H, W] to [H, W, C]
        if page.photometric == tifffile.PHOTOMETRIC.MINISWHITE:
            pixels = np.iinfo(pixels.dtype).max - pixels
        orientation = int(page.tags[ORIENTATION].value) if ORIENTATION in page.tags else 1
    if bits > 16:
        raise ValueError(f"{bits}-bit pixels; save it with 8 or 16 bits")
    image = _from_16_bits(pixels)
    notes = (f"{bits} bits scaled to 8 bits and RGB",)
    if orientation == 1:
        return image, notes
    image.getexif()[ORIENTATION] = orientation
    return ImageOps.exif_transpose(image), (*notes, "turned upright as its orientation says")


def _from_16_bits(pixels: np.ndarray) -> Image.Image:
    """RGB of [H, W] or [H, W, 1 to 4] (grey, grey and alpha, colour, colour and alpha) values."""
    if pixels.dtype not in (np.uint16, np.int32):  # Pillow gives some 16-bit files as int32
        raise ValueError(f"{pixels.dtype} pixels; save it with 8 or 16 bits")
    if pixels.min() < 0 or pixels.max() > 65535:
        raise ValueError("pixels outside 0 to 65535; save it with 8 or 16 bits")
    scaled = np.rint(pixels / 257).astype(np.uint8)
    if scaled.ndim == 3 and scaled.shape[2] == 1:
        scaled = scaled[:, :, 0]
    if scaled.ndim not in (2, 3) or (scaled.ndim == 3 and scaled.shape[2] not in (2, 3, 4)):
        raise ValueError(f"an array of shape {scaled.shape} is no picture")
    image = Image.fromarray(scaled)
    return _on_white(image) if image.has_transparency_data else image.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def to_tensor(image: Image.Image) -> Tensor:
    """x [3, H, W] in [0, 1] of an RGB picture."""
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8))  # [H, W, 3]
    return pixels.permute(2, 0, 1).contiguous().float() / 255


def seeded_crop(image: Image.Image, size: int, seed: int) -> Image.Image:
    """torchvision's random resized crop to [size, size], the same one for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return RandomResizedCrop(size)(image)


# --- CLIC 2020 through tensorflow-datasets --------------------------------------------------------


class ClicImages:
    """The test split of tensorflow-datasets' `clic`, downloaded on first use."""

    split = "test"

    def __init__(self, data_dir: str | None):
        self._tfds = import_tensorflow_datasets()
        try:
            self._builder = self._tfds.builder("clic", data_dir=data_dir)
            self._builder.download_and_prepare()
        except Exception as error:  # tfds and its HTTP libraries raise dozens of kinds
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise InputError(
                f"dev_options.clic: cannot prepare tensorflow-datasets' clic ({reason}); where "
                "there is no network, prepare it elsewhere and name its folder in "
                'dev_options.path_test.clic, or use "folder" with CLIC\'s image files'
            ) from None
        count = self._builder.info.splits[self.split].num_examples
        self.names = [f"clic_{self.split}_{index:04d}" for index in range(count)]

    def load(self, names: Sequence[str], num_workers: int = 0) -> Iterator[LoadedImage]:
        """The images of these names in the data set's own order; one pass over the split."""
        wanted = set(names)
        records = self._builder.as_dataset(
            split=self.split,
            shuffle_files=False,
            read_config=self._tfds.ReadConfig(interleave_cycle_length=1),
        )
        for name, record in zip(self.names, records.as_numpy_iterator(), strict=True):
            if name in wanted:
                yield LoadedImage(name, to_tensor(Image.fromarray(record["image"])))


def import_tensorflow_datasets():
    """tensorflow-datasets, imported late (4 s), after torch, and kept off the GPU."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import tensorflow as tf
    import tensorflow_datasets as tfds

    tf.config.set_visible_devices([], "GPU")
    return tfds


# --- choosing one ---------------------------------------------------------------------------------


def open_images(config: RefineConfig) -> Images:
    """The data set that a refinement config switches on; opens no image yet.

    Raises:
        InputError: its path is missing from the config or from the disk.
    """
    options = config.dev_options
    chosen = options.data_set
    if chosen == "sample":
        root = Path(skimage.__file__).parent / "data"
        return ImageFiles([root / name for name in SAMPLE_PHOTOS], root)
    path = getattr(options.path_test, chosen)
    if chosen == "clic" and not (path and _holds_images(Path(path))):
        return ClicImages(path)
    key = f"dev_options.path_test.{chosen}"
    if not path:
        raise InputError(f"{key}: {chosen} is switched on but has no path; name its folder here")
    root = Path(path).expanduser()
    if chosen == "tecnick" and (root / "RGB" / "RGB_OR_1200x1200").is_dir():
        root = root / "RGB" / "RGB_OR_1200x1200"
    suffixes = TIFF_SUFFIXES if chosen == "pathology" else IMAGE_SUFFIXES
    try:
        files = find_images(root, suffixes)
    except InputError as error:
        raise InputError(f"{key} = {error}") from None
    crop = config.image_size if chosen == "pathology" else None
    return ImageFiles(files, root if root.is_dir() else root.parent, crop, config.seed)


def _holds_images(path: Path) -> bool:
    return path.is_dir() and any(file.suffix.lower() in IMAGE_SUFFIXES for file in path.iterdir())
