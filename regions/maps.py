"""Open the maps that say where in a picture distortion counts more."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from PIL import Image

from common.errors import InputError, named_by
from common.files import printable
from common.finding import IMAGE_SUFFIXES, find_images
from common.images import BLACK, Maps, Region, UnreadableError, is_black, why_unreadable
from common.pictures import HARMLESS, read_picture
from regions.detector import detect_region, open_cv

SHOWN = 5  # names in a message


def open_maps(path: str, names: Sequence[str], key: str) -> Maps:
    """The maps of images.

    Args:
        path: "auto"; a folder of grey pictures, white where distortion counts most; or one such
            picture for all images. A map in a folder has the path of its image below the folder,
            with the image's suffix (a.jpg, a.jpg.png), or else with another one (a.png).
        names: the images' paths below their folder.
        key: the config's key that holds the path; messages begin with it.

    Raises:
        InputError: nothing is there, no map is in it or fits an image, two maps fit one image as
            well, the one map for all cannot be read or is black, or OpenCV is not installed.
    """
    if path == "auto":
        return DetectedMaps()
    if not path:
        raise InputError(f"{key} is empty: give a folder of maps, one map for all, or auto")
    with named_by(key):
        if Path(path).is_file():
            return FileMaps(dict.fromkeys(names, checked_map(Path(path))))
        found = find_images(path)
        by_name = {file.relative_to(found.root).as_posix(): file for file in found.files}
        fitting = fitting_maps(names, list(by_name), path)
    without = [name for name in names if name not in fitting]
    unused = sorted(by_name.keys() - fitting.values())
    messages = (
        f"images without a map, refined with equal weights: {in_short(without)}" if without else "",
        f"maps without an image: {in_short(unused)}" if unused else "",
        found.passed_over,
    )
    return FileMaps(
        {name: by_name[fits] for name, fits in fitting.items()},
        tuple(f"{key} = {path}: {words}" for words in messages if words),
    )


def fitting_maps(names: Sequence[str], maps: Sequence[str], path: str) -> dict[str, str]:
    """The map of each image that has one.

    Args:
        names, maps: paths below their folders; path: the folder of the maps.

    Raises:
        InputError: two maps fit one image as well, or no map fits any image.
    """
    exact, alike = set(maps), defaultdict(list)
    for name in maps:
        alike[without_suffix(name)].append(name)
    fitting = {}
    for name in names:
        fits = [name] if name in exact else alike.get(name) or alike.get(without_suffix(name), [])
        if len(fits) > 1:
            raise InputError(
                f"{path}: the image {printable(name)} has {len(fits)} maps, {in_short(fits)}; "
                "keep one"
            )
        if fits:
            fitting[name] = fits[0]
    if not fitting:
        raise InputError(
            f"{path}: no map in it is named as an image; the maps are {in_short(maps)}; the "
            f"images are {in_short(names)}"
        )
    return fitting


def without_suffix(name: str) -> str:
    """A path without the suffix of an image; of "a.jpg.png" it is "a.jpg"."""
    path = PurePosixPath(name)
    return str(path.with_suffix("")) if path.suffix.lower() in IMAGE_SUFFIXES else name


def in_short(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(printable(name) for name in names[:SHOWN]) + more


class FileMaps:
    """Maps in files, by the name of the image; an image may have none."""

    def __init__(self, files: dict[str, Path], messages: tuple[str, ...] = ()):
        self._files = files
        self.messages = messages

    def of(self, name: str, image: Image.Image) -> Region | None:
        """The map of an RGB picture, resampled to its size by an antialiased bilinear filter.

        Raises:
            UnreadableError: the file of the map cannot be read; says why.
        """
        if name not in self._files:
            return None
        grey, notes = read_map(self._files[name])
        resampled = grey.resize(image.size, Image.Resampling.BILINEAR)
        return Region(resampled, f"its map {printable(str(self._files[name]))}", notes)


class DetectedMaps:
    """Maps that `detect_region` makes.

    Raises:
        InputError: OpenCV is not installed.
    """

    messages: tuple[str, ...] = ()

    def __init__(self) -> None:
        open_cv()

    def of(self, name: str, image: Image.Image) -> Region:
        """The map of an RGB picture; `name` does not matter."""
        region, found = detect_region(image)
        return Region(region, "its detected map", (f"its map: {found}",))


def read_map(file: Path) -> tuple[Image.Image, tuple[str, ...]]:
    """A map as a picture of mode "L", and notes on what was converted in it.

    Raises:
        UnreadableError: the file cannot be read; says why.
    """
    try:
        picture = read_picture(file)
    except Exception as error:  # damaged files make decoders raise dozens of kinds
        reason = why_unreadable(error, file, file.name)
        raise UnreadableError(f"its map {printable(str(file))}: {reason}") from None
    notes = tuple(f"its map: {note}" for note in picture.notes if note not in HARMLESS)
    return picture.image.convert("L"), notes


def checked_map(file: Path) -> Path:
    """The file of a map, which can be read and is not black.

    Raises:
        InputError: it is not so.
    """
    try:
        grey, _ = read_map(file)
    except UnreadableError as error:
        raise InputError(str(error).removeprefix("its map ")) from None
    if is_black(grey):
        raise InputError(f"{file}: {BLACK}")
    return file
