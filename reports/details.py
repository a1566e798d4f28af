"""Decode the results of an image from the latents that runs stored, for plots of details."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from architectures import Architecture, Latents
from coding.adapted import adapted
from common.errors import InputError
from common.files import printable
from common.images import Images, to_pixels
from common.records import Record, rate_of, records_in
from common.resuming import config_file_of
from config import RefineConfig, load_config
from models import freeze, load_checkpoint
from refinement.told import stored_symbols, told_of, use_directions_of
from regions.measures import inside_of
from reports.compared_run import ComparedRun
from reports.run_plots import most_improved

LARGEST_SHOWN = 4_000_000  # pixels; larger images are only in the tables


class Detail(NamedTuple):
    """A version of an image: x [3, H, W] in [0, 1], and the bits of y at each position [h, w].

    side: what a record says of it, for the whole image. It and the bits are None for the original.
    region: the image's map [1, H, W], if there is one; the original has it.
    """

    label: str
    x: Tensor
    side: Record | None = None
    bits: Tensor | None = None
    region: Tensor | None = None

    @property
    def in_words(self) -> str:
        """Rate and quality of the whole image; "" for the original."""
        if self.side is None:
            return ""
        words = [f"{rate_of(self.side):.4f} bpp"]
        for key, name in (("psnr", ""), ("ms_ssim_db", "MS-SSIM ")):
            if self.side[key] is not None:
                words.append(f"{name}{self.side[key]:.2f} dB")
        lines = [", ".join(words)]
        inside, outside = (self.side.get(f"psnr_{place}") for place in ("inside", "outside"))
        if inside is not None and outside is not None:
            lines.append(f"inside {inside:.2f} dB, outside {outside:.2f} dB")
        return "\n".join(lines)


@torch.no_grad()
def details_of(
    runs: Sequence[ComparedRun], config: RefineConfig, images: Images, name: str
) -> list[Detail] | None:
    """The versions of an image: the original, the base, and the result of each run.

    If the image, the model or a result cannot be read, the image is too large, a run lacks it, or
    the directions that it needs are missing or others: None, and a line on the console.

    Args:
        runs: the runs with one model.
        config: the config of any of these runs.
        name: the image.
    """
    found = [records_in(run.folder).get(name) for run in runs]
    records = [record for record in found if record]
    (image,) = images.load([name], 0)
    reason = (
        "it cannot be read" if image.x is None
        else "some method lacks it" if len(records) < len(runs)
        else "it is too large" if image.x[0].numel() > LARGEST_SHOWN
        else None
    )  # fmt: skip
    if image.x is None or reason:
        print(f"{printable(name)}: no pictures, for {reason}")
        return None
    if any((record["height"], record["width"]) != image.x.shape[1:] for record in records):
        print(f"{printable(name)}: no pictures, for some method refined another size of it")
        return None
    try:
        model = load_checkpoint(config.pretrain, architecture=config.architecture)
        decoders = _decoders(runs, records, model, config.coder_scales)
        symbols = [stored_symbols(run.folder, name) for run in runs]
    except InputError as error:
        print(printable(f"{name}: no pictures: {error}"))
        return None
    x = image.x[None]  # [1, 3, H, W]
    details = [Detail("original", image.x, region=image.region)]
    base = model.symbols(model.analyze(x), (x.size(2), x.size(3)))
    details.append(_detail(model, "base", base, records[0]["base"], x))
    for run, record, own, latents in zip(runs, records, decoders, symbols, strict=True):
        details.append(_detail(own, run.method, latents, record["refined"], x))
    return details


def windows_of(details: Sequence[Detail]) -> dict[str, tuple[slice, slice]]:
    """The rows and columns of the details that a report shows, by where they are.

    Without a map it is one, where the last method improved the base most. With a map it is where,
    inside, the last method improved the first one most, and where, outside, it fell behind most.
    """
    pixels = [to_pixels(detail.x) for detail in details]
    region = details[0].region
    if region is None:
        return {"": most_improved(pixels[0], pixels[1], pixels[-1])}
    first = pixels[2] if len(pixels) > 3 else pixels[1]
    inside = inside_of(region)[0].numpy()
    return {
        "inside the map: ": most_improved(pixels[0], first, pixels[-1], inside),
        "outside: ": most_improved(pixels[0], pixels[-1], first, 1 - inside),
    }


def _decoders(
    runs: Sequence[ComparedRun], records: Sequence[Record], model: Architecture, coder_scales: bool
) -> list[Architecture]:
    """The model as each run's record of an image changes it; freezes the model in place.

    Raises:
        InputError: a run's directions cannot be read or are others, or its record is damaged.
    """
    finders = [
        _directions_finder(run.folder, record, model)
        for run, record in zip(runs, records, strict=True)
    ]
    freeze(model, coder_scales)
    decoders = []
    for record, finder in zip(records, finders, strict=True):
        model.find_directions = finder
        decoders.append(adapted(model, told_of(record)))
    return decoders


def _directions_finder(
    folder: Path, record: Record, model: Architecture
) -> Callable[[], Any] | None:
    """What finds the directions that an image of a run needs; None: it needs none."""
    if not told_of(record).directions:
        return None
    with config_file_of(folder) as path:
        config = load_config(path, RefineConfig)
    use_directions_of(config, model)
    return model.find_directions


def _detail(model: Architecture, label: str, symbols: Latents, side: Record, x: Tensor) -> Detail:
    """Decode the integer latents of x [1, 3, H, W]; rate and PSNR are those of the record."""
    size = x.size(2), x.size(3)
    walk = model.place(symbols, size)
    x_hat = model.synthesize(walk.y_hat, size).clamp(0, 1)[0]
    likelihoods = walk.likelihoods[walk.groups[-1].name]
    bits = -likelihoods.log2().sum(1)[0]  # [h, w]
    return Detail(label, x_hat, side, bits)
