"""Find the faces in a picture, or else what stands out: maps that need no model of their own.

Faces: the cascades of Viola and Jones (CVPR 2001) that come with OpenCV. What stands out: the
spectral residual (Hou and Zhang, CVPR 2007), also from OpenCV.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from common.errors import InputError
from common.optional_packages import import_package

REMEDY = "install opencv-contrib-python-headless (requirements/refine.txt) in place of it"
LARGEST_SIDE = 800  # pixels in which faces are searched
SMALLEST_FACE = 1 / 16  # of the shorter side
FLOOR = 26  # of 255: outside of what was found a pixel counts about a tenth
# Of a face's box: half the axes of its ellipse, which holds the box's corners, hair and chin.
HALF_WIDTH, HALF_HEIGHT = 0.75, 0.85
# Of the shorter side: the smoothing of what stands out, and of the edges of a map.
SMOOTHING, SOFTNESS = 0.045, 0.02
# What stands out: this part of the pixels; its blobs that have this part of the largest one's mass.
STANDS_OUT, KEPT_BLOB = 0.15, 0.25


class Cascade(NamedTuple):
    """A cascade of OpenCV, and what it must reach for a face.

    `neighbours`: in how many more windows at the same place it must find the face. `score`: of its
    last stage. Both are from 100 images of ImageNet and the Kodak images: lower ones find patterns.
    """

    name: str
    neighbours: int
    score: float
    mirrored: bool = False


CASCADES = (
    Cascade("frontalface_alt2", 6, 55.0),
    Cascade("profileface", 7, 1.5),
    Cascade("profileface", 7, 1.5, mirrored=True),
    Cascade("frontalcatface_extended", 4, 1.0),
)


def detect_region(image: Image.Image) -> tuple[Image.Image, str]:
    """The map of an RGB picture, and what was found in it, in words.

    The map is of mode "L" and of the picture's size: 255 inside, 26 outside, soft edges. Inside are
    the faces of people and cats. Without a face it is what stands out. Where nothing does, as in a
    picture of one colour, the map is 255 everywhere.

    Raises:
        InputError: OpenCV is not installed.
    """
    cv2 = open_cv()
    scale = min(1, LARGEST_SIDE / max(image.size))
    size = tuple(max(1, round(side * scale)) for side in image.size)
    small = cv2.resize(np.asarray(image.convert("RGB")), size, interpolation=cv2.INTER_AREA)
    boxes = find_faces(small)
    inside = ellipses(boxes, small.shape[:2]) if boxes else salient_blobs(small)
    if not inside.any():
        return Image.new("L", image.size, 255), "nothing stands out"
    found = f"{len(boxes)} face{'s' * (len(boxes) > 1)}" if boxes else "what stands out"
    soft = smoothed(inside, SOFTNESS)
    levels = np.rint(FLOOR + (255 - FLOOR) * soft / soft.max()).astype(np.uint8)
    return Image.fromarray(levels).resize(image.size, Image.Resampling.BILINEAR), found


def open_cv() -> Any:
    """OpenCV, on one thread: with more the order of faces varies, and forked processes may hang.

    Raises:
        InputError: it is not installed, or lacks what maps are made with.
    """
    try:
        cv2 = import_package("cv2", "--roi auto", "refine")
    except ImportError as error:  # of a library of the system
        raise InputError(f"--roi auto: cannot import cv2 ({error}): {REMEDY}") from None
    lacking = [part for part in ("saliency", "data") if not hasattr(cv2, part)]
    if lacking:
        raise InputError(f"--roi auto: this cv2 has no {lacking[0]}: {REMEDY}")
    cv2.setNumThreads(1)
    return cv2


@lru_cache
def _classifier(name: str) -> Any:
    """OpenCV's cascade of this name."""
    cv2 = open_cv()
    return cv2.CascadeClassifier(f"{cv2.data.haarcascades}haarcascade_{name}.xml")


def find_faces(pixels: np.ndarray) -> list[tuple[int, int, int, int]]:
    """The faces in uint8 [H, W, 3]: left, top, width and height of each box, in pixels."""
    grey = open_cv().cvtColor(pixels, open_cv().COLOR_RGB2GRAY)
    height, width = grey.shape
    smallest = max(1, round(min(height, width) * SMALLEST_FACE))
    found = []
    for cascade in CASCADES:
        seen = np.ascontiguousarray(grey[:, ::-1]) if cascade.mirrored else grey
        boxes, _, scores = _classifier(cascade.name).detectMultiScale3(
            seen, 1.1, cascade.neighbours, minSize=(smallest, smallest), outputRejectLevels=True
        )
        for (x, y, w, h), score in zip(boxes, np.ravel(scores), strict=True):
            if score >= cascade.score:
                found.append(
                    (int(width - x - w if cascade.mirrored else x), int(y), int(w), int(h))
                )
    return sorted(found)


def ellipses(boxes: list[tuple[int, int, int, int]], size: tuple[int, int]) -> np.ndarray:
    """float32 [H, W]: 1 in the ellipses about these boxes, 0 elsewhere."""
    cv2, inside = open_cv(), np.zeros(size, np.float32)
    for x, y, w, h in boxes:
        centre = (x + w // 2, y + h // 2)
        axes = (round(HALF_WIDTH * w), round(HALF_HEIGHT * h))
        cv2.ellipse(inside, centre, axes, 0, 0, 360, 1.0, cv2.FILLED)
    return inside


def salient_blobs(pixels: np.ndarray) -> np.ndarray:
    """float32 [H, W]: 1 in the hulls of what stands out in uint8 [H, W, 3], 0 elsewhere."""
    cv2 = open_cv()
    inside = np.zeros(pixels.shape[:2], np.float32)
    if (pixels == pixels[0, 0]).all():  # the logarithm of its spectrum is infinite
        return inside
    _, saliency = cv2.saliency.StaticSaliencySpectralResidual_create().computeSaliency(pixels)
    saliency = smoothed(saliency, SMOOTHING)
    mask = (saliency >= np.quantile(saliency, 1 - STANDS_OUT)).astype(np.uint8)
    _, labels = cv2.connectedComponents(mask)
    mass = np.bincount(labels.ravel(), weights=(saliency * mask).ravel())
    for label in np.flatnonzero(mass >= KEPT_BLOB * mass.max()):
        contours, _ = cv2.findContours(
            (labels == label).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE
        )
        cv2.fillConvexPoly(inside, cv2.convexHull(np.concatenate(contours)), 1.0)
    return inside


def smoothed(values: np.ndarray, part: float) -> np.ndarray:
    """float32 [H, W] after a Gaussian whose sigma is this part of the shorter side."""
    cv2 = open_cv()
    sigma = max(1.0, part * min(values.shape))
    return cv2.GaussianBlur(values, (0, 0), sigma, borderType=cv2.BORDER_REPLICATE)
