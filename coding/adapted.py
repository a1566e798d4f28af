"""Models as a file's adaptation changes them: the lattice of y, and the decoder's last layer."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from architectures import Architecture
from architectures.directions import Directions
from coding.bitstream import BitstreamError
from coding.payload import KINDS, Adaptation, Numbers
from fast.last_layer import LastLayer, last_layer_of

DIRECTIONS, LAST_LAYER = KINDS


def adapted(model: Architecture, told: Adaptation) -> Architecture:
    """The model as an adaptation changes it; it shares all that does not change.

    Raises:
        BitstreamError: the adaptation does not fit the model or its directions.
        InputError: the model cannot have such a lattice, or see `load_directions`.
    """
    model = model.with_lattice(told.lattice_step)
    directions = _directions_of(model, told)
    if not told.groups:
        return model
    last = last_layer_of(getattr(model.network, "g_s", None))
    if last is None:
        raise BitstreamError(f"its adaptation changes a last layer that {model.name} does not have")
    weight, bias = last
    for group in told.groups:
        change = CHANGES[KINDS[group.kind]](group, directions, last)
        weight, bias = weight + change.weight.to(weight), bias + change.bias.to(bias)
    return model.with_last_layer(LastLayer(weight, bias))


def _directions_of(model: Architecture, told: Adaptation) -> Directions | None:
    needed = any(KINDS[group.kind] == DIRECTIONS for group in told.groups)
    if needed != bool(told.directions):
        raise BitstreamError("damaged: its adaptation does not say which directions it needs")
    if not needed:
        return None
    if model.find_directions is None:
        raise BitstreamError("its adaptation needs a file of directions: see --directions")
    directions: Directions = model.find_directions()
    if directions.mark != told.directions:
        raise BitstreamError(
            f"made with other directions ({told.directions.hex()}; these are "
            f"{directions.mark.hex()})"
        )
    return directions


def along_directions(group: Numbers, directions: Directions | None, last: LastLayer) -> LastLayer:
    """The change that the factors of directions make."""
    if directions is None or len(group.values) > len(directions.bias):
        raise BitstreamError("its adaptation has more factors than there are directions")
    return directions.change(_scaled(group))


def of_each_weight(group: Numbers, directions: Directions | None, last: LastLayer) -> LastLayer:
    """The change of the last layer's weights themselves, in the order of [C, 3, 5, 5]."""
    if len(group.values) > last.weight.numel():
        raise BitstreamError("its adaptation has more numbers than the last layer has weights")
    flat = torch.zeros(last.weight.numel(), dtype=torch.float64)
    flat[: len(group.values)] = _scaled(group)
    return LastLayer(flat.view(last.weight.shape), torch.zeros(len(last.bias)))


def _scaled(group: Numbers) -> Tensor:
    return torch.tensor(group.values, dtype=torch.float64) * group.step_size


CHANGES: Mapping[str, Callable[[Numbers, Directions | None, LastLayer], LastLayer]] = (
    MappingProxyType({DIRECTIONS: along_directions, LAST_LAYER: of_each_weight})
)
