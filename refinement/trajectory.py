"""How the refinement of one image went: evaluated steps, and the best latents on the way."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from architectures import Latents
from common.errors import InputError
from metrics import picture_quality, psnr, to_8_bit
from objectives import Terms

Metrics = dict[str, float | None]


class ImageError(InputError):
    """One image cannot be refined or coded; says why. The others go on."""


@dataclass
class Trajectory:
    """One image's way, and the latents that were best when truly rounded.

    rows: of each evaluated step, `step`, `temperature`, `lmbda`, and the metrics of `metrics_of` as
    `relaxed_*` and `true_*`. clock: this image's share of the seconds at which each row was there.
    base and best are rows; base_latents and latents are what belongs to them. pictures: by label,
    x_hat [1, 3, H, W], kept only with `keeps_pictures`. stopped: why the loss was not finite.
    settled: whether early stopping ended it.
    """

    lmbda: float
    keeps_pictures: bool = False
    rows: list[dict[str, Any]] = field(default_factory=list)
    clock: list[float] = field(default_factory=list)
    base: dict[str, Any] | None = None
    best: dict[str, Any] | None = None
    latents: Latents | None = None
    base_latents: Latents | None = None
    pictures: dict[str, Tensor] = field(default_factory=dict)
    stopped: str | None = None
    settled: bool = False

    @property
    def over(self) -> bool:
        """Whether more steps are no use: the loss is not finite, or has settled."""
        return self.settled or self.stopped is not None

    @property
    def true_losses(self) -> list[float]:
        """The true loss at each row."""
        return [row["true_loss"] for row in self.rows]

    @property
    def lowest(self) -> float:
        """The lowest true loss so far; infinite where none was finite."""
        return self.best["true_loss"] if self.best else math.inf

    def add(self, row: dict[str, Any], latents: Latents, x_hat: Tensor, seconds: float) -> None:
        """Add an evaluated step; keep copies of its latents and picture if it is the best."""
        self.rows.append(row)
        self.clock.append(seconds)
        if not math.isfinite(row["true_loss"] + row["relaxed_loss"]):
            self.stopped = f"the loss is not finite at step {row['step']}"
        if row["true_loss"] < self.lowest:
            self.best = row
            self.latents = {name: v.detach().clone() for name, v in latents.items()}
            if self.keeps_pictures:
                self.pictures["refined"] = x_hat.clone()
        if self.base is None:
            self.base, self.base_latents = row, self.latents

    def keep_picture(self, label: str, x_hat: Tensor) -> None:
        """Keep x_hat [1, 3, H, W] under a label, unless the image is over."""
        if not self.over:
            self.pictures[label] = x_hat.clone()

    def finite_latents(self) -> Latents:
        """The best latents.

        Raises:
            ImageError: no step had a finite loss.
        """
        if self.latents is None:
            raise ImageError("its loss is not finite even before refinement")
        return self.latents


def metrics_of(terms: Terms, x: Tensor) -> tuple[list[Metrics], Tensor]:
    """Metrics of each image of x [B, 3, H, W] in [0, 1], and x_hat in 8 bits.

    loss; bpp, and bpp_y, bpp_z of each latent; mse and psnr_raw (dB) of the networks' floats; psnr
    of clamped 8-bit pixels (dB); ms_ssim and ms_ssim_db of the same, None where a side is under 161
    pixels.
    """
    columns = {"loss": terms.loss.tolist(), "bpp": terms.bpp.tolist()}
    columns |= {f"bpp_{name}": terms.rates[name].tolist() for name in sorted(terms.rates)}
    columns |= {"mse": terms.mse.tolist(), "psnr_raw": psnr(terms.mse).tolist()}
    x_hat = to_8_bit(terms.x_hat)
    rows = []
    for values, shown, wanted in zip(
        zip(*columns.values(), strict=True), x_hat.split(1), x.split(1), strict=True
    ):
        quality = picture_quality(shown, wanted)
        rows.append({**dict(zip(columns, values, strict=True)), **quality})
    return rows, x_hat


def row_of(at: dict[str, Any], relaxed: Metrics, true: Metrics) -> dict[str, Any]:
    """A trajectory's row: where in the schedule it is, and both kinds of metrics."""
    row = at | {f"relaxed_{key}": value for key, value in relaxed.items()}
    return row | {f"true_{key}": value for key, value in true.items()}


def images_of(latents: Latents) -> Sequence[Latents]:
    """The latents of each image of a batch."""
    parts = {name: v.split(1) for name, v in latents.items()}
    count = len(next(iter(parts.values())))
    return [{name: part[index] for name, part in parts.items()} for index in range(count)]
