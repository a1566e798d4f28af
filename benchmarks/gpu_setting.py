"""What the checks and timings of a GPU share: photos, number formats, quiet runs of scripts."""

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import torch
from torch import Tensor

from common.images import to_tensor
from common.progress import Progress
from datasets import sample_photos

EXAMPLES = Path(__file__).parent.parent / "example_files"
# Whether convolutions and matrix products in float32 may round their factors to TF32's 10 bits.
TF32 = {"off": (False, False), "convolutions": (True, False), "on": (True, True)}
TORCH_DEFAULT = "convolutions"


class Skipped(Exception):  # noqa: N818  no error: there is nothing to do here
    """A check or a timing that cannot be made here; the message says why."""


@contextmanager
def backend(tf32: str, deterministic: bool = True, fastest: bool = False) -> Iterator[None]:
    """Set how a GPU computes convolutions and matrix products; the old settings return.

    Args:
        tf32: a key of `TF32`. Convolutions alone is torch's default.
        deterministic: as `pick_device` sets it. torch's default is False.
        fastest: let cuDNN time its algorithms first.
    """
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32, cudnn.deterministic, cudnn.benchmark
    cudnn.allow_tf32, matmul.allow_tf32 = TF32[tf32]
    cudnn.deterministic, cudnn.benchmark = deterministic, fastest
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32, cudnn.deterministic, cudnn.benchmark = before


@contextmanager
def quietly() -> Iterator[io.StringIO]:
    """Keep from the console what is printed, and give it."""
    printed = io.StringIO()
    with redirect_stdout(printed), redirect_stderr(printed):
        yield printed


def run_quietly(main: Callable[[Sequence[str]], int], *arguments: str) -> None:
    """Run a script's `main`.

    Raises:
        RuntimeError: its exit code is not 0; the message is the last line that it printed.
    """
    with quietly() as printed:
        code = main(arguments)
    if code:
        lines = printed.getvalue().strip().splitlines()
        raise RuntimeError(lines[-1] if lines else f"exit code {code}")


def one_line(error: Exception) -> str:
    """The type and the first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def photos(count: int, height: int, width: int) -> Tensor:
    """Crops [count, 3, height, width] in [0, 1] of the sample photos, each another one."""
    found = sample_photos()
    crops = []
    for index in range(count):
        picture = found.picture(index % len(found)).image
        zoom = max(width / picture.width, height / picture.height) * (1 + index // len(found) / 10)
        size = round(picture.width * zoom), round(picture.height * zoom)
        left, top = (size[0] - width) // 2, (size[1] - height) // 2
        box = left, top, left + width, top + height
        crops.append(to_tensor(picture.resize(size).crop(box)))
    return torch.stack(crops)


class AfterStep(Progress):
    """A run's own progress, which shows nothing, and calls a function after each step.

    Args:
        act: gets the number of steps taken.
    """

    def __init__(self, act: Callable[[int], None]):
        super().__init__("benchmark", None, print_freq=2**62)
        self.act = act

    def __call__(self, relaxed_loss: Tensor, true_loss: Tensor | float) -> None:
        """Count a step."""
        super().__call__(relaxed_loss, true_loss)
        self.act(self.steps)
