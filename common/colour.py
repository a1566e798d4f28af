"""Colours become sRGB, by littleCMS through Pillow."""

import io

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
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = MODES.get(opened.profile.xcolor_space.strip())
        if mode == "RGB" and image.mode == "L":
            image = image.convert("RGB")
        if mode != image.mode:
            space = opened.profile.xcolor_space.strip()
            return _plain(image), f"its colour profile is one of {space}, and ignored"
        transform = _transform(opened, mode)
        if _changes_nothing(transform, mode):
            return image.convert("RGB"), None
        name = " ".join(ImageCms.getProfileDescription(opened).split()) or "unnamed"
        return transform.apply(image), f"converted to sRGB from its colour profile ({name})"
    except (ImageCms.PyCMSError, OSError, ValueError):
        return _plain(image), BROKEN


def _plain(image: Image.Image) -> Image.Image:
    if image.mode == "LAB":
        lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
        return _transform(lab, "LAB").apply(image)
    return image.convert("RGB")


def _transform(profile: ImageCms.ImageCmsProfile, mode: str) -> ImageCms.ImageCmsTransform:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    return ImageCms.ImageCmsTransform(profile, srgb, mode, "RGB")


def _changes_nothing(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Whether the colours of a grid are what sRGB's are: there are dozens of sRGB profiles."""
    if mode == "L":
        grid = np.arange(256, dtype=np.uint8)[None]  # [1, 256]
    elif mode == "RGB":
        grid = np.indices((18, 18, 18), dtype=np.uint8).reshape(3, 1, -1).transpose(1, 2, 0) * 15
    else:
        return False
    before = Image.fromarray(np.ascontiguousarray(grid))
    after = np.asarray(transform.apply(before), dtype=int)
    return bool((abs(after - np.asarray(before.convert("RGB"), dtype=int)) <= SAME).all())
