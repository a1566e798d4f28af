"""Convert colours to sRGB, by littleCMS through Pillow."""

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

# Pillow's pixel mode for each colour space of an ICC profile.
MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}
# Profiles of sRGB itself differ by so many of 255 levels, by their tables and rounded primaries.
SAME_WITHIN = 1
BROKEN = "its colour profile is broken and ignored"


def to_srgb(image: Image.Image, profile: bytes | None) -> tuple[Image.Image, str | None]:
    """Convert a picture to sRGB.

    Without a profile, grey and RGB are taken for sRGB, CMYK is converted as Pillow does it, and Lab
    is CIE's with the white point D50.

    Args:
        image: of mode L, RGB, CMYK or LAB, 8 bits.
        profile: an ICC profile. Empty: the file has none. None: it could not be read.

    Returns:
        The picture in mode RGB, and a note on what was done by its profile; None if nothing was.
    """
    if profile is None:
        return _without_profile(image), BROKEN
    if not profile:
        return _without_profile(image), None
    try:
        space, name = _space_and_name(profile)
        if space == "RGB" and image.mode == "L":
            image = image.convert("RGB")
        if MODES.get(space) != image.mode:
            return _without_profile(image), f"its colour profile is one of {space}, and ignored"
        transform = _transform(profile, image.mode)
        if transform is None:
            return image.convert("RGB"), None
        return transform.apply(image), f"converted to sRGB from its colour profile ({name})"
    except (ImageCms.PyCMSError, OSError, ValueError):
        return _without_profile(image), BROKEN


def _without_profile(image: Image.Image) -> Image.Image:
    if image.mode == "LAB":
        lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
        return _to_srgb_from(lab, "LAB").apply(image)
    return image.convert("RGB")


@lru_cache(maxsize=16)
def _space_and_name(profile: bytes) -> tuple[str, str]:
    """The colour space that a profile describes, and the profile's name."""
    opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    name = " ".join(ImageCms.getProfileDescription(opened).split())
    return opened.profile.xcolor_space.strip(), name or "unnamed"


@lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The transform from pixels of a mode to sRGB; None where they are in sRGB already."""
    transform = _to_srgb_from(ImageCms.ImageCmsProfile(io.BytesIO(profile)), mode)
    return None if _changes_nothing(transform, mode) else transform


def _to_srgb_from(profile: ImageCms.ImageCmsProfile, mode: str) -> ImageCms.ImageCmsTransform:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    return ImageCms.ImageCmsTransform(profile, srgb, mode, "RGB")


def _changes_nothing(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Whether the transform leaves a grid of colours alone: there are dozens of sRGB profiles."""
    grid: np.ndarray
    if mode == "L":
        grid = np.arange(256, dtype=np.uint8)[None]  # [1, 256]
    elif mode == "RGB":
        grid = np.indices((18, 18, 18), dtype=np.uint8).reshape(3, 1, -1).transpose(1, 2, 0) * 15
    else:
        return False
    before = Image.fromarray(np.ascontiguousarray(grid))
    after = np.asarray(transform.apply(before), dtype=int)
    return bool((abs(after - np.asarray(before.convert("RGB"), dtype=int)) <= SAME_WITHIN).all())
