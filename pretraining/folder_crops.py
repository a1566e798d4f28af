"""Random crops of image files."""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from common.errors import InputError
from common.images import ImageFiles, UnreadableError
from common.workers import items_of, leave_signals_to_the_main_process
from pretraining.draws import READ_FAILED, TOO_SMALL, Batch, Draws, OnSkip, no_crop_message


class FolderCrops:
    """Random crops of image files, decoded by torch's data loader; needs no tensorflow.

    Each photo is first shrunk by a random factor from `smallest_scale` to 1.
    """

    def __init__(
        self, images: ImageFiles, size: int, batch_size: int, num_workers: int = 0,
        smallest_scale: float = 1.0,
    ):  # fmt: skip
        self.images = images
        self.size = size
        self.smallest_scale = smallest_scale
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.count = len(images)
        self.name = "image files"
        self.passed_over = images.passed_over

    def batches(self, draws: Draws, on_skip: OnSkip) -> Iterator[Batch]:
        """Endless batches, see `TrainingData`.

        Raises:
            InputError: no image gives a crop, or a worker died.
        """
        loader = DataLoader(
            _DrawnCrops(self.images, self.size, self.smallest_scale, draws.seed),
            batch_size=self.batch_size, sampler=_EndlessSampler(draws),
            num_workers=self.num_workers, collate_fn=_apart_from_crops,
            worker_init_fn=leave_signals_to_the_main_process,
            # A loader draws from the global generator by default, which would change the noise.
            generator=torch.Generator(),
        )  # fmt: skip
        crops: list[Tensor] = []
        failures = 0
        for drawn, x in items_of(loader):
            of_draw = iter(x)
            for g, name, problem in drawn:
                if problem:
                    on_skip(name, problem)
                    failures += 1
                    if failures > 20 * self.count:  # a usable image would have been drawn by now
                        raise InputError(no_crop_message("train_folder", self.size, problem))
                    continue
                failures = 0
                crops.append(next(of_draw))
                if len(crops) == self.batch_size:
                    batch = torch.stack(crops).permute(0, 3, 1, 2)  # [B, 3, S, S]
                    yield Batch(batch, draws.position_after(g))
                    crops = []


class _Draw(NamedTuple):
    """A draw: its number, the image's name, and what is wrong with it, if anything."""

    g: int
    name: str
    problem: str | None = None


def _apart_from_crops(
    items: list[tuple[_Draw, np.ndarray | None]],
) -> tuple[list[_Draw], Tensor]:
    """The draws, and the crops of those without a problem as one tensor, uint8 [k, S, S, 3].

    One tensor comes out of a worker through shared memory, and quickly.
    """
    crops = [torch.from_numpy(crop) for _, crop in items if crop is not None]
    x = torch.stack(crops) if crops else torch.empty(0, dtype=torch.uint8)
    return [draw for draw, _ in items], x


class _EndlessSampler:
    def __init__(self, draws: Draws):
        self.draws = draws

    def __iter__(self) -> Iterator[int]:
        return self.draws.numbers()


class _DrawnCrops(Dataset):
    """Item g: the draw, and its crop, uint8 [S, S, 3], unless the draw has a problem."""

    def __init__(self, images: ImageFiles, size: int, smallest_scale: float, seed: int):
        self.images = images
        self.size = size
        self.smallest_scale = smallest_scale
        self.seed = seed

    def __getitem__(self, g: int) -> tuple[_Draw, np.ndarray | None]:
        epoch, place = divmod(g, len(self.images))
        index = _permutation(len(self.images), self.seed, epoch)[place]
        name = self.images.names[index]
        try:
            picture = self.images.picture(int(index)).image
        except UnreadableError as error:
            return _Draw(g, name, f"{READ_FAILED}: {error}"), None
        if min(picture.size) < self.size:
            return _Draw(g, name, TOO_SMALL), None
        rng = np.random.default_rng((self.seed, g))
        side = self._side_in(picture, rng)
        left = int(rng.integers(picture.width - side + 1))
        top = int(rng.integers(picture.height - side + 1))
        crop = picture.crop((left, top, left + side, top + side))
        if side > self.size:  # shrinking the crop alone is as good as shrinking the photo
            crop = crop.resize((self.size, self.size), Image.Resampling.BICUBIC)
        if rng.random() < 0.5:
            crop = ImageOps.mirror(crop)
        return _Draw(g, name), np.array(crop)

    def _side_in(self, picture: Image.Image, rng: np.random.Generator) -> int:
        """The side in the picture of a crop that is S pixels wide once it is shrunk."""
        if self.smallest_scale == 1:
            return self.size
        side = round(self.size / rng.uniform(self.smallest_scale, 1))
        return min(side, *picture.size)


@lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count)
