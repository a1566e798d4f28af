"""Code the images of a comparison by classical codecs, through Pillow."""

import io
import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image
from torch import Tensor

from common.files import printable
from common.images import Images, to_pixels, to_tensor
from common.records import Record
from metrics import picture_quality
from reports.comparison_tables import QUALITIES

# Pillow's name of the format, the option that sets the quality, its values, and other options.
CODECS: dict[str, tuple[str, str, tuple[int, ...], dict[str, Any]]] = {
    "JPEG": ("JPEG", "quality", (5, 10, 20, 35, 50, 70, 85), {"optimize": True}),
    "JPEG 2000": ("JPEG2000", "quality_layers", (200, 120, 80, 50, 30, 20, 12),
                  {"quality_mode": "rates"}),
    "WebP": ("WEBP", "quality", (1, 10, 25, 45, 65, 80, 90), {"method": 6}),
    "AVIF": ("AVIF", "quality", (5, 20, 30, 40, 50, 65, 75), {"speed": 6}),
}  # fmt: skip


def codec_table(
    images: Images, names: Sequence[str], codecs: Sequence[str], known: Path
) -> pd.DataFrame:
    """Rate and quality of classical codecs: one row for each image, codec and quality setting.

    Args:
        names: the images to code.
        codecs: keys of `CODECS`.
        known: the CSV file of an earlier comparison, if there is one; its rows are reused if they
            are of the same crop.

    Returns:
        The columns image, crop (empty for whole images), method, model, bpp, psnr and ms_ssim_db.
    """
    crop = "" if images.crop is None else str(images.crop)
    done = pd.DataFrame(columns=["image", "crop", "method"])
    with suppress(OSError, ValueError, KeyError):  # a damaged table is computed again
        stored = pd.read_csv(known, dtype={"image": str} | dict.fromkeys(QUALITIES, float))
        of_older = pd.Series("", index=stored.index)  # older tables are of whole images
        stored["crop"] = stored.get("crop", of_older).fillna("")
        done = stored[stored["crop"] == crop].copy()
    raw = {printable(name): name for name in names}  # by their names in the file
    done["image"] = done["image"].map(lambda name: raw.get(name, name))
    have = set(zip(done["image"], done["method"], strict=True))
    missing = [name for name in names if any((name, codec) not in have for codec in codecs)]
    rows = []
    for image in images.load(missing, 0):
        if image.x is None:
            continue
        for codec in codecs:
            if (image.name, codec) not in have:
                rows += [{**row, "crop": crop} for row in coded_by(codec, image.name, image.x)]
    table = pd.concat([done, pd.DataFrame(rows)]) if rows else done
    return table[table["image"].isin(names) & table["method"].isin(codecs)].reset_index(drop=True)


def coded_by(codec: str, name: str, x: Tensor) -> list[Record]:
    """The rows of `codec_table` for one codec and one image, x [3, H, W] in [0, 1]."""
    picture, rows = Image.fromarray(to_pixels(x)), []
    kind, option, values, others = CODECS[codec]
    for value in values:
        file = io.BytesIO()
        given = [value] if option == "quality_layers" else value
        picture.save(file, kind, **{option: given}, **others)
        decoded = to_tensor(Image.open(file).convert("RGB"))[None]
        quality = picture_quality(decoded, x[None])
        bpp = 8 * file.getbuffer().nbytes / (x.size(1) * x.size(2))
        row = {"image": name, "method": codec, "model": f"{option} {value}", "bpp": bpp}
        # An exactly decoded picture has no finite quality, and no point on a curve.
        row |= {key: quality[key] for key in ("psnr", "ms_ssim_db")}
        rows.append({key: None if value == math.inf else value for key, value in row.items()})
    return rows
