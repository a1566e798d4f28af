"""Each image's own random numbers, the same whichever images it is refined with."""

from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor

from experimental_inference_methods import Rounding


class ImageNoise:
    """The random numbers of a batch: one generator an image, seeded anew for each step.

    Args:
        seeds: one an image.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device):
        self.seeds = tuple(seeds)
        self.device = device
        self._generators = [Generator(device) for _ in self.seeds]
        self._kept: dict[int, Tensor] = {}

    def rounding(
        self, rounding: Rounding, step: int, position: float
    ) -> Callable[[Tensor], Tensor]:
        """The relaxed rounding of centred latents v [B, ...] at a step, with fresh noise.

        However often a step asks, as LBFGS does, its noise is the same.

        Args:
            position: in the schedule of temperatures.
        """
        roundings = [
            rounding.at(position, generator.manual_seed(seed + step))
            for generator, seed in zip(self._generators, self.seeds, strict=True)
        ]
        return image_by_image(roundings)

    def keep(self, index: int) -> None:
        """Remember an image's state, from which `of_image` goes on."""
        self._kept[index] = self._generators[index].get_state()

    def of_image(self, index: int) -> Generator:
        """An image's generator: as it was kept, or as it is."""
        generator = self._generators[index]
        if index in self._kept:
            generator.set_state(self._kept.pop(index))
        return generator


def image_by_image(roundings: Sequence[Callable[[Tensor], Tensor]]) -> Callable[[Tensor], Tensor]:
    """One rounding of v [B, ...] that lets each of B roundings have its image."""
    if len(roundings) == 1:
        return roundings[0]
    return lambda v: torch.cat(
        [rounding(part) for rounding, part in zip(roundings, v.split(1), strict=True)]
    )
