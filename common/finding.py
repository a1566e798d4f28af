"""Which files below a folder are images, and what was passed over on the way."""

import os
import warnings
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from common.errors import InputError
from common.pictures import RAW_SUFFIXES

# What Pillow opens and photos come as.
IMAGE_SUFFIXES = frozenset((
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".tif", ".tiff", ".webp", ".avif",
    ".avifs", ".heic", ".heif", ".hif", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".bmp",
    ".dib", ".gif", ".tga", ".icb", ".vda", ".vst", ".ppm", ".pgm", ".pbm", ".pnm", ".psd", ".pcx",
    ".sgi", ".ras", ".qoi", ".dds",
))  # fmt: skip
TIFF_SUFFIXES = frozenset((".tif", ".tiff"))
# The formats of those that tell themselves by how they begin.
FORMATS = (
    "PNG", "JPEG", "TIFF", "WEBP", "AVIF", "HEIF", "JPEG2000", "BMP", "GIF", "PPM", "PSD",
    "QOI",
)  # fmt: skip
# Files that were not finished, or that are another's copy.
LEFTOVERS = (".part", ".partial", ".crdownload", ".tmp", ".bak", ".old", "~")


class Found(NamedTuple):
    """Files below `root`, sorted by their path in it; and what was passed over, in one line.

    `passed_over` is empty where nothing was.
    """

    root: Path
    files: list[Path]
    passed_over: str


def find_images(path: str | Path) -> Found:
    """The images below a folder, or the one file at `path`.

    Those whose names end like an image's, and all others that begin like one. Links are followed,
    to each folder once; what is hidden is not looked at.

    Raises:
        InputError: nothing there, or no image in it.
    """
    return _find(path, _is_image, "no image in it")


def find_by_suffix(path: str | Path, suffixes: frozenset[str]) -> Found:
    """The files below a folder whose names end so, or the one file at `path`.

    Raises:
        InputError: nothing there, or no such file in it.
    """

    def ends_so(file: Path) -> str | None:
        return None if file.suffix.lower() in suffixes else "of another kind"

    return _find(path, ends_so, f"no {' or '.join(sorted(suffixes))} file in it")


def _is_image(file: Path) -> str | None:
    """None for an image, else what a file is instead."""
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
            with Image.open(file, formats=FORMATS):
                return True
        except Image.DecompressionBombError:
            return True  # reading says that it is too large
        except Exception:  # Pillow raises dozens of kinds; whatever it is, it does not open
            return False


def _find(path: str | Path, judge: Callable[[Path], str | None], none: str) -> Found:
    root = Path(path)
    if root.is_file():
        return Found(root.parent, [root], "")
    if not root.is_dir():
        raise InputError(f"{path}: no such folder or file (looked from {Path.cwd()})")
    search = _Search(root, judge)
    passed_over = search.in_words()
    if not search.files:
        raise InputError(f"{path}: {none}" + (f"; {passed_over}" if passed_over else ""))
    files = sorted(search.files, key=lambda file: file.relative_to(root).as_posix())
    return Found(root, files, passed_over)


class _Search:
    """All files below a folder that `judge` says nothing against."""

    def __init__(self, root: Path, judge: Callable[[Path], str | None]):
        self.root = root
        self.judge = judge
        self.files: list[Path] = []
        self._reasons: Counter[str] = Counter()
        self._suffixes: dict[str, set[str]] = {}
        self._met: set[tuple[int, int]] = set()
        # Linked folders last: a folder goes by its own name, not by a link's.
        self._folders = deque([root])
        self._linked: deque[Path] = deque()
        while self._folders or self._linked:
            self._search((self._folders or self._linked).popleft())

    def in_words(self) -> str:
        """What was passed over and why, in a line."""
        parts = []
        for reason, count in (+self._reasons).items():
            suffixes = sorted(self._suffixes.get(reason, ()))
            shown = ", ".join(suffixes[:6]) + (", ..." if len(suffixes) > 6 else "")
            parts.append(f"{count} {reason}" + (f" ({shown})" if shown else ""))
        return f"passed over: {', '.join(parts)}" if parts else ""

    def _search(self, folder: Path) -> None:
        try:
            status = folder.stat()
            if (status.st_dev, status.st_ino) in self._met:
                self._reasons["linked folder met before"] += 1
                return
            self._met.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name):
                    try:
                        self._take(entry)
                    except OSError as error:  # such as a link to itself
                        kind = "broken link" if entry.is_symlink() else "unreadable"
                        self._reasons[f"{kind} ({entry.name}: {error.strerror})"] += 1
        except OSError as error:
            if folder == self.root:
                raise InputError(f"{folder}: {error.strerror}") from None
            self._reasons[f"unreadable folder ({folder.name}: {error.strerror})"] += 1

    def _take(self, entry: os.DirEntry) -> None:
        file = Path(entry.path)
        if entry.is_dir():
            if entry.name.startswith("."):
                self._reasons["hidden folder"] += 1
            else:
                (self._linked if entry.is_symlink() else self._folders).append(file)
        elif entry.name.startswith("."):
            # Not worth a word where it is a system's own file.
            self._reasons["hidden"] += file.suffix.lower() in IMAGE_SUFFIXES
        elif not entry.is_file():
            self._reasons["broken link" if entry.is_symlink() else "no file"] += 1
        elif reason := self.judge(file):
            self._reasons[reason] += 1
            self._suffixes.setdefault(reason, set()).add(file.suffix.lower() or "no suffix")
        else:
            self.files.append(file)
