"""How training data are drawn, whatever they are stored as.

Draw g = 0, 1, 2, ... is an image, a crop and a flip. All three are a function of the seed and g
alone. Rank r of w takes the draws g = r (mod w). So any batch can be found again.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

from torch import Tensor

READ_FAILED, TOO_SMALL = "not readable", "smaller than the crop"

# Called with the name of an image that could not be used, and the reason.
OnSkip = Callable[[str, str], None]


class Batch(NamedTuple):
    """x, uint8 [B, 3, S, S] in channels-last memory.

    `position`: how many draws this rank has consumed once it has used the batch.
    """

    x: Tensor
    position: int


class Draws(NamedTuple):
    """Which draws are this process's: those g = rank (mod world), from its own `position` on."""

    seed: int
    rank: int = 0
    world: int = 1
    position: int = 0

    def numbers(self) -> Iterator[int]:
        """This process's draws g, without end."""
        return itertools.count(self.position * self.world + self.rank, self.world)

    def position_after(self, g: int) -> int:
        """How many draws this process has consumed once it has used draw g."""
        return g // self.world + 1


class TrainingData(Protocol):
    """What pre-training needs of its data.

    `count` is the number of images and `name` says what they are. `passed_over` says in a line
    which files were left out; it is empty where none was.
    """

    count: int
    name: str
    passed_over: str

    def batches(self, draws: Draws, on_skip: OnSkip) -> Iterator[Batch]:
        """Batches without end; `on_skip` is called for every image that cannot be used."""


def nothing_usable(source: str, size: int, example: str) -> str:
    """The message where no image of `source` gives a crop; `example` says why not of one."""
    return (
        f"{source}: not one image gives a crop of {size}x{size} (the last one: {example}); "
        "a smaller image_size, or other images"
    )
