"""Colours become sRGB, by littleCMS through Pillow."""

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

# The modes of pixels whose colours a profile of each space describes.
MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}
# Levels of 255 by which writings of sRGB itself differ: tables, rounded primaries.
SAME = 1
BROKEN = "its colour profile is broken and ignored"


def to_srgb(image: Image.Image, profile: bytes | None) -> tuple[Image.Image, str | None]:
    """An RGB picture in sRGB, and what its colour profile had to do with it.

    Without a profile grey and RGB are sRGB's already, CMYK is converted as Pillow does it, and Lab
    is CIE's, of D50.

    Args:
        image: of mode L, RGB, CMYK or LAB.
        profile: an ICC profile; empty where there is none, None where it could not be read.
    """
    if profile is None:
        return _plain(image), BROKEN
    if not profile:
        return _plain(image), None
    try:
        space, name = _described(profile)
        if space == "RGB" and image.mode == "L":
            image = image.convert("RGB")
        if MODES.get(space) != image.mode:
            return _plain(image), f"its colour profile is one of {space}, and ignored"
        transform = _transform(profile, image.mode)
        if transform is None:
            return image.convert("RGB"), None
        return transform.apply(image), f"converted to sRGB from its colour profile ({name})"
    except (ImageCms.PyCMSError, OSError, ValueError):
        return _plain(image), BROKEN


def _plain(image: Image.Image) -> Image.Image:
    if image.mode == "LAB":
        lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
        return _to_srgb_from(lab, "LAB").apply(image)
    return image.convert("RGB")


@lru_cache(maxsize=16)
def _described(profile: bytes) -> tuple[str, str]:
    """The space whose colours a profile describes, and its name."""
    opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    name = " ".join(ImageCms.getProfileDescription(opened).split())
    return opened.profile.xcolor_space.strip(), name or "unnamed"


@lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """What takes pixels of a mode to sRGB; None where they are sRGB's already."""
    transform = _to_srgb_from(ImageCms.ImageCmsProfile(io.BytesIO(profile)), mode)
    return None if _changes_nothing(transform, mode) else transform


def _to_srgb_from(profile: ImageCms.ImageCmsProfile, mode: str) -> ImageCms.ImageCmsTransform:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    return ImageCms.ImageCmsTransform(profile, srgb, mode, "RGB")


def _changes_nothing(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Whether the colours of a grid are what sRGB's are: there are dozens of sRGB profiles."""
    grid: np.ndarray
    if mode == "L":
        grid = np.arange(256, dtype=np.uint8)[None]  # [1, 256]
    elif mode == "RGB":
        grid = np.indices((18, 18, 18), dtype=np.uint8).reshape(3, 1, -1).transpose(1, 2, 0) * 15
    else:
        return False
    before = Image.fromarray(np.ascontiguousarray(grid))
    after = np.asarray(transform.apply(before), dtype=int)
    return bool((abs(after - np.asarray(before.convert("RGB"), dtype=int)) <= SAME).all())
