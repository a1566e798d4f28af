"""The result of one image's refinement, and its compressed files."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from adaptation.fit import adapted_problem
from architectures import Latents
from coding.adapted import adapted
from coding.bitstream import BitstreamError
from coding.coder import Coder, decode_picture, encode_latents, file_measures
from coding.payload import NOTHING
from metrics import to_8_bit
from objectives import Problem
from refinement.batch import ImageError, Trajectory
from regions.measures import region_measures


@dataclass(frozen=True)
class Coded:
    """The compressed file of a refined image, and the measures of its base and refined files.

    bitstream: the file of the refined latents. measures: those of `file_measures`, by `base` and
    `refined`.
    """

    bitstream: bytes
    measures: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Refined:
    """One refined image.

    symbols: the best integers of each latent, y [1, M, h, w] and others. coded: the compressed
    file, if files are wanted. target: the target's part of the image's record, if there is one.
    regions: `region_measures` by `base` and `refined`; empty without a map.
    """

    trajectory: Trajectory
    symbols: Latents
    coded: Coded | None = None
    target: dict[str, Any] | None = field(default=None)
    regions: dict[str, dict[str, float]] = field(default_factory=dict)

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
    region: Tensor | None = None,
) -> Refined:
    """The result of one image's refinement, with its compressed files if there is a coder.

    Args:
        problem: with the model as it is; the trajectory says what the decoder is told.
        region: the image's map, [1, H, W], if it has one.

    Raises:
        ImageError: no loss was finite, or its latents cannot be coded.
    """
    told = adapted_problem(problem, trajectory.told)
    symbols = told.model.symbols(trajectory.finite_latents(), problem.size)
    coded, regions = None, {}
    if coder is not None:
        try:
            coded = write_files(problem, coder, trajectory)
        except BitstreamError as error:
            raise ImageError(f"cannot be coded: {error}") from None
    if region is not None:
        regions = {
            "base": region_measures(problem, trajectory.base_latents, region),
            "refined": region_measures(told, trajectory.latents, region),
        }
    return Refined(trajectory, symbols, coded, target, regions)


def write_files(problem: Problem, coder: Coder, trajectory: Trajectory) -> Coded:
    """Code one image's base and refined latents, decode both files, and measure them.

    The decoded images replace the reconstructions that the trajectory keeps.

    Raises:
        BitstreamError: see `encode_latents`.
    """
    measures: dict[str, dict[str, Any]] = {}
    data = b""
    base, refined = trajectory.base_latents, trajectory.latents
    sides = ("base", base, NOTHING), ("refined", refined, trajectory.told)
    for label, latents, told in sides:
        symbols = adapted(problem.model, told).symbols(latents, problem.size)
        data = encode_latents(coder, symbols, problem.size, told)
        x_hat = decode_picture(coder, data)
        measures[label] = file_measures(data, x_hat, problem.x)
        if label in trajectory.reconstructions:
            trajectory.reconstructions[label] = to_8_bit(x_hat)
    return Coded(data, measures)
