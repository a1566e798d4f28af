"""The part of a refinement config on what the decoder is told beside the latents."""

from typing import Literal

from schemas.base import Index, Positive, Section, UserPath

# The step of y's lattice that is best for the lambda that a model was trained for, and how it
# changes with lambda; measured, see docs/adaptation.md.
USUAL_STEP, STEP_BY_LAMBDA = 1.15, 0.36


class Adapt(Section):
    """What the decoder is told beside the latents. Its bits count in the loss and in the file.
    null: nothing. Images are refined one at a time."""

    lattice: Positive | Literal["auto"] | None = None
    """+ The step of y's lattice. It costs one byte, or three where nothing else is told. `auto`:
    1.15 for the lambda that the model was trained for, and larger for smaller ones. null: 1."""
    directions: UserPath | None = None
    """+ Change the last layer of the decoder along directions that were learnt from photos. The
    path of their file, or `auto`: the one beside the weights. null: do not."""
    last_layer: bool = False
    """+ Change each weight of the decoder's last layer. This costs thousands of bits, which large
    pictures repay. Where they do not, nothing is changed."""
    fits: Index = 4
    """+ How often the last layer is fitted during the descent, at even distances. It is also fitted
    at the end, before and after the polish."""

    @property
    def fits_the_decoder(self) -> bool:
        """Whether the last layer is fitted at all."""
        return self.last_layer or self.directions is not None

    def step_at(self, lmbda: float, train_lambda: float) -> float:
        """The step of y's lattice for a lambda of the loss."""
        if self.lattice == "auto":
            return USUAL_STEP * (train_lambda / lmbda) ** STEP_BY_LAMBDA
        return self.lattice or 1.0
