"""What a refined image gives to its run's folder, and the files that are made of it."""

from dataclasses import dataclass, field
from typing import Any

from architectures import Latents
from coding.bitstream import BitstreamError
from coding.coder import Coder, decode_picture, encode_latents, file_measures
from metrics import to_8_bit
from objectives import Problem
from refinement.batch import ImageError, Trajectory


@dataclass(frozen=True)
class Coded:
    """The refined image as a file, and what the files of base and refined latents measure."""

    bitstream: bytes
    measures: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Refined:
    """One refined image.

    symbols: the best integers, y [1, M, h, w] and z [1, N, h', w']. coded: with files alone.
    target: what a record says of the target, where there was one.
    """

    trajectory: Trajectory
    symbols: Latents
    coded: Coded | None = None
    target: dict[str, Any] | None = field(default=None)

    @property
    def file(self) -> Coded:
        """The image as a file.

        Raises:
            ValueError: it was refined without a coder.
        """
        if self.coded is None:
            raise ValueError("refined without a coder: there is no file")
        return self.coded


def result_of(
    problem: Problem,
    trajectory: Trajectory,
    target: dict[str, Any] | None = None,
    coder: Coder | None = None,
) -> Refined:
    """The result of one image's refinement, with its files where there is a coder.

    Raises:
        ImageError: no loss was finite, or its latents cannot be coded.
    """
    symbols = problem.model.symbols(trajectory.finite_latents(), problem.size)
    if coder is None:
        return Refined(trajectory, symbols, None, target)
    try:
        return Refined(trajectory, symbols, write_files(problem, coder, trajectory), target)
    except BitstreamError as error:
        raise ImageError(f"cannot be coded: {error}") from None


def write_files(problem: Problem, coder: Coder, trajectory: Trajectory) -> Coded:
    """Code one image's base and refined latents; measure rate and quality on the decoded files.

    The trajectory's pictures become those of the files.

    Raises:
        BitstreamError: see `encode_latents`.
    """
    measures: dict[str, dict[str, Any]] = {}
    data = b""
    for label, latents in (("base", trajectory.base_latents), ("refined", trajectory.latents)):
        data = encode_latents(coder, problem.model.symbols(latents, problem.size), problem.size)
        x_hat = decode_picture(coder, data)
        measures[label] = file_measures(data, x_hat, problem.x)
        if label in trajectory.pictures:
            trajectory.pictures[label] = to_8_bit(x_hat)
    return Coded(data, measures)
