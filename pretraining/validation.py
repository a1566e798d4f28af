"""Test a model on whole images, during and after pre-training."""

from typing import Any

import torch

from architectures import Architecture
from architectures.footprint import footprint_of
from common.device import is_out_of_memory
from common.errors import InputError
from common.images import ImageFiles
from common.processes import Ranks, gather
from fast.memory import MemoryBound, memory_bound
from fast.tiles import coding_tile
from metrics import picture_quality
from objectives import Problem, RateDistortion

# Bytes that a test needs for each element of y, twice y and its prior; there is no optimizer.
TESTED_LATENT = 40


def validate(
    model: Architecture, images: ImageFiles | None, objective: RateDistortion, ranks: Ranks
) -> list[dict[str, Any]]:
    """The result of `measure` for every image, in order; an empty list without images.

    The ranks share the images; every rank must call this and gets all results.
    """
    if images is None:
        return []
    was_training = model.network.training
    model.network.eval()
    footprint = footprint_of(model).without_optimizer(TESTED_LATENT)
    if not objective.distortion.is_mse:
        footprint = footprint.with_pictures()
    bound = memory_bound(footprint, None, model.device)
    own = images.names[ranks.rank :: ranks.world]
    results = [measure(model, images, name, objective, bound) for name in own]
    model.network.train(was_training)
    by_name = {result["name"]: result for part in gather(ranks, results) for result in part}
    return [by_name[name] for name in images.names]


@torch.no_grad()
def measure(
    model: Architecture,
    images: ImageFiles,
    name: str,
    objective: RateDistortion,
    bound: MemoryBound,
) -> dict[str, Any]:
    """Rate and quality of a whole image with truly rounded latents.

    Returns:
        name, loss, bpp, bpp_y, bpp_z and the values of `picture_quality`. If the image cannot be
        read, does not fit into memory or fails otherwise: only name and error. The training goes
        on.
    """
    try:
        (image,) = images.load([name])
        if image.x is None:
            return {"name": name, "error": image.error}
        least = objective.distortion.least_side
        if min(image.x.shape[1:]) < least:
            reason = f"the objective {objective.name} needs {least} pixels or more a side"
            return {"name": name, "error": reason}
        tile = tested_tile((image.x.size(1), image.x.size(2)), bound)
        x = image.x[None].to(model.device)  # [1, 3, H, W]
        terms = Problem(model, x, objective, tile).true(model.analyze(x))
        rates = {f"bpp_{latent}": rate.item() for latent, rate in sorted(terms.rates.items())}
        values = {"loss": terms.loss.item(), "bpp": terms.bpp.item(), **rates}
        return {"name": name, **values, **picture_quality(terms.x_hat, x)}
    except Exception as error:
        if is_out_of_memory(error):
            return {"name": name, "error": f"does not fit into the memory of {model.device}"}
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return {"name": name, "error": reason}


def tested_tile(size: tuple[int, int], bound: MemoryBound) -> int | None:
    """The side of a tile in a test, in positions of y; None: the picture is not tiled.

    Args:
        size: H, W of the picture, pixels.

    Raises:
        MemoryError: the picture does not fit into memory even in the smallest tiles.
    """
    side = coding_tile(size)
    if side is None:
        return None
    try:
        return min(side, bound.tile(size) or side)
    except InputError:
        raise MemoryError from None
