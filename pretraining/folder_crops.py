"""Random crops of image files."""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset

from common.errors import InputError
from common.images import ImageFiles, UnreadableError, as_it_is
from pretraining.draws import READ_FAILED, TOO_SMALL, Batch, Draws, OnSkip, no_crop_message
from pretraining.workers import leave_signals_to_the_main_process


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
            InputError: no image gives a crop.
        """
        loader = DataLoader(
            _DrawnCrops(self.images, self.size, self.smallest_scale, draws.seed),
            batch_size=None, sampler=_EndlessSampler(draws), num_workers=self.num_workers,
            collate_fn=as_it_is, worker_init_fn=leave_signals_to_the_main_process,
            # A loader draws from the global generator by default, which would change the noise.
            generator=torch.Generator(),
        )  # fmt: skip
        crops, failures = [], 0
        for g, name, crop, problem in loader:
            if problem:
                on_skip(name, problem)
                failures += 1
                if failures > 20 * self.count:  # one usable image would have been drawn by now
                    raise InputError(no_crop_message("train_folder", self.size, problem))
                continue
            failures = 0
            crops.append(crop)
            if len(crops) == self.batch_size:
                x = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2)  # [B, 3, S, S]
                yield Batch(x, draws.position_after(g))
                crops = []


class _EndlessSampler:
    def __init__(self, draws: Draws):
        self.draws = draws

    def __iter__(self) -> Iterator[int]:
        return self.draws.numbers()


class _DrawnCrops(Dataset):
    """Item g: (g, the image's name, its crop uint8 [S, S, 3] or None, what is wrong or None)."""

    def __init__(self, images: ImageFiles, size: int, smallest_scale: float, seed: int):
        self.images = images
        self.size = size
        self.smallest_scale = smallest_scale
        self.seed = seed

    def __getitem__(self, g: int) -> tuple[int, str, np.ndarray | None, str | None]:
        epoch, place = divmod(g, len(self.images))
        index = _permutation(len(self.images), self.seed, epoch)[place]
        name = self.images.names[index]
        try:
            picture = self.images.picture(int(index)).image
        except UnreadableError as error:
            return g, name, None, f"{READ_FAILED}: {error}"
        if min(picture.size) < self.size:
            return g, name, None, TOO_SMALL
        rng = np.random.default_rng((self.seed, g))
        side = self._side_in(picture, rng)
        left = int(rng.integers(picture.width - side + 1))
        top = int(rng.integers(picture.height - side + 1))
        crop = picture.crop((left, top, left + side, top + side))
        if side > self.size:  # shrinking the crop alone is as good as shrinking the photo
            crop = crop.resize((self.size, self.size), Image.Resampling.BICUBIC)
        if rng.random() < 0.5:
            crop = ImageOps.mirror(crop)
        return g, name, np.array(crop), None

    def _side_in(self, picture: Image.Image, rng: np.random.Generator) -> int:
        """The side in the picture of a crop that is S pixels wide once it is shrunk."""
        if self.smallest_scale == 1:
            return self.size
        side = round(self.size / rng.uniform(self.smallest_scale, 1))
        return min(side, *picture.size)


@lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count)
