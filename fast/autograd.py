"""The type of what autograd hands to a function's two passes; torch's own has it wrong."""

from typing import Protocol

from torch import Tensor


class Context(Protocol):
    """What the forward pass leaves to the backward pass."""

    needs_input_grad: tuple[bool, ...]

    @property
    def saved_tensors(self) -> tuple[Tensor, ...]:
        """What `save_for_backward` got."""

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Keep tensors."""

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        """Say which results have no gradient."""
