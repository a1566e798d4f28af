"""Find the images below a folder, and say which other files were passed over."""

import os
import warnings
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from common.errors import InputError
from common.pictures import RAW_SUFFIXES

# The suffixes of photos that Pillow opens.
IMAGE_SUFFIXES = frozenset((
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".tif", ".tiff", ".webp", ".avif",
    ".avifs", ".heic", ".heif", ".hif", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".bmp",
    ".dib", ".gif", ".tga", ".icb", ".vda", ".vst", ".ppm", ".pgm", ".pbm", ".pnm", ".psd", ".pcx",
    ".sgi", ".ras", ".qoi", ".dds",
))  # fmt: skip
TIFF_SUFFIXES = frozenset((".tif", ".tiff"))
# The formats that can be recognised by a file's first bytes.
FORMATS = (
    "PNG", "JPEG", "TIFF", "WEBP", "AVIF", "HEIF", "JPEG2000", "BMP", "GIF", "PPM", "PSD",
    "QOI",
)  # fmt: skip
# The ends of names of unfinished downloads and of backups.
LEFTOVERS = (".part", ".partial", ".crdownload", ".tmp", ".bak", ".old", "~")


class Found(NamedTuple):
    """The files found below `root`, sorted by their path in it.

    `passed_over` says in one line how many other files there are, and why; empty if there are none.
    """

    root: Path
    files: list[Path]
    passed_over: str


def find_images(path: str | Path) -> Found:
    """The images below a folder, or the one file at `path`.

    An image has the suffix of an image, or begins like one. Links are followed; each folder is
    searched once. Hidden files and folders are passed over.

    Raises:
        InputError: nothing is there, it cannot be read, or no image is in it.
    """
    return _find(path, _reason_against, "no image in it")


def find_by_suffix(path: str | Path, suffixes: frozenset[str]) -> Found:
    """The files below a folder that have one of these suffixes, or the one file at `path`.

    Args:
        suffixes: in lower case, with their dot.

    Raises:
        InputError: nothing is there, it cannot be read, or no such file is in it.
    """

    def reason_against(file: Path) -> str | None:
        return None if file.suffix.lower() in suffixes else "of another kind"

    return _find(path, reason_against, f"no {' or '.join(sorted(suffixes))} file in it")


def _reason_against(file: Path) -> str | None:
    """Why a file is no image that is read; None for an image."""
    suffix = file.suffix.lower()
    if suffix in IMAGE_SUFFIXES:
        return None
    if suffix in RAW_SUFFIXES:
        return "camera raw"
    if file.name.endswith(LEFTOVERS):
        return "unfinished or a copy"
    return None if _begins_like_an_image(file) else "no readable image"


def _begins_like_an_image(file: Path) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN]):
                return True
        except Image.DecompressionBombError:
            return True  # it is refused when it is read
        except Exception:  # Pillow raises dozens of kinds
            return False


def _find(path: str | Path, reason_against: Callable[[Path], str | None], none: str) -> Found:
    """The files for which `reason_against` gives None; `none`: the message if there are none."""
    root = Path(path)
    if root.is_file():
        return Found(root.parent, [root], "")
    if not root.is_dir():
        raise InputError(f"{path}: no such folder or file (looked from {Path.cwd()})")
    search = _Search(root, reason_against)
    passed_over = search.in_words()
    if not search.files:
        raise InputError(f"{path}: {none}" + (f"; {passed_over}" if passed_over else ""))
    files = sorted(search.files, key=lambda file: file.relative_to(root).as_posix())
    return Found(root, files, passed_over)


class _Search:
    """All files below a folder for which `reason_against` gives None; counts the others."""

    def __init__(self, root: Path, reason_against: Callable[[Path], str | None]):
        self.root = root
        self.reason_against = reason_against
        self.files: list[Path] = []
        self._reasons: Counter[str] = Counter()
        self._suffixes: dict[str, set[str]] = {}
        self._visited: set[tuple[int, int]] = set()
        # Linked folders come last, so that a folder is found by its own name, not by a link's.
        self._folders = deque([root])
        self._linked: deque[Path] = deque()
        while self._folders or self._linked:
            self._search((self._folders or self._linked).popleft())

    def in_words(self) -> str:
        """How many files were passed over, and why, in one line."""
        parts = []
        for reason, count in (+self._reasons).items():
            suffixes = sorted(self._suffixes.get(reason, ()))
            shown = ", ".join(suffixes[:6]) + (", ..." if len(suffixes) > 6 else "")
            parts.append(f"{count} {reason}" + (f" ({shown})" if shown else ""))
        return f"passed over: {', '.join(parts)}" if parts else ""

    def _search(self, folder: Path) -> None:
        try:
            status = folder.stat()
            if (status.st_dev, status.st_ino) in self._visited:
                self._reasons["linked folder met before"] += 1
                return
            self._visited.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name):
                    try:
                        self._add(entry)
                    except OSError as error:  # such as a link to itself
                        kind = "broken link" if entry.is_symlink() else "unreadable"
                        self._reasons[f"{kind} ({entry.name}: {error.strerror})"] += 1
        except OSError as error:
            if folder == self.root:
                raise InputError(f"{folder}: {error.strerror}") from None
            self._reasons[f"unreadable folder ({folder.name}: {error.strerror})"] += 1

    def _add(self, entry: os.DirEntry) -> None:
        file = Path(entry.path)
        if entry.is_dir():
            if entry.name.startswith("."):
                self._reasons["hidden folder"] += 1
            else:
                (self._linked if entry.is_symlink() else self._folders).append(file)
        elif entry.name.startswith("."):
            # Hidden files that are no images, such as the system's, are not counted.
            self._reasons["hidden"] += file.suffix.lower() in IMAGE_SUFFIXES
        elif not entry.is_file():
            self._reasons["broken link" if entry.is_symlink() else "no file"] += 1
        elif reason := self.reason_against(file):
            self._reasons[reason] += 1
            self._suffixes.setdefault(reason, set()).add(file.suffix.lower() or "no suffix")
        else:
            self.files.append(file)
