"""How training crops are drawn, from files of any kind.

Each draw has a number g = 0, 1, 2, ... It is an image, a crop of it and a flip. All three depend on
the seed and g only. Rank r of w ranks takes the draws g = r (mod w). So a resumed run gets the same
batches.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

from torch import Tensor

READ_FAILED, TOO_SMALL = "not readable", "smaller than the crop"

# Called with the name of an image that cannot be used, and the reason.
OnSkip = Callable[[str, str], None]


class Batch(NamedTuple):
    """A batch of crops: x, uint8 [B, 3, S, S] in channels-last memory.

    `position`: how many draws this rank has consumed, this batch included.
    """

    x: Tensor
    position: int


class Draws(NamedTuple):
    """This process's draws: g = rank (mod world), after the `position` that it has consumed."""

    seed: int
    rank: int = 0
    world: int = 1
    position: int = 0

    def numbers(self) -> Iterator[int]:
        """This process's draws g, without end."""
        return itertools.count(self.position * self.world + self.rank, self.world)

    def position_after(self, g: int) -> int:
        """How many draws this process has consumed, draw g included."""
        return g // self.world + 1


class TrainingData(Protocol):
    """The training data, as pre-training uses them.

    `count` is the number of images; `name` says what they are. `passed_over` says in one line which
    files were left out, and is empty if none were.
    """

    count: int
    name: str
    passed_over: str

    def batches(self, draws: Draws, on_skip: OnSkip) -> Iterator[Batch]:
        """Endless batches; `on_skip` is called for each image that cannot be used."""


def no_crop_message(source: str, size: int, example: str) -> str:
    """The message for when no image of `source` gives a crop; `example`: the reason for one."""
    return (
        f"{source}: not one image gives a crop of {size}x{size} (the last one: {example}); "
        "a smaller image_size, or other images"
    )
