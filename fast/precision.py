"""Networks with fixed weights, which work under autocast without casting them at each call."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn

from fast.pool import Pool


class FrozenNetwork(nn.Module):
    """A network with fixed weights. Under autocast, a copy in autocast's type does its work.

    Autocast alone would cast all weights at each call. The copy is made on first use.

    pool: the source of memory of the layers, shared with the copies; None if they have none.
    """

    def __init__(self, pool: Pool | None = None):
        super().__init__()
        self.pool = pool
        self._copies: dict[torch.dtype, Self] = {}

    @contextmanager
    def as_autocast_says(self, v: Tensor) -> Iterator[tuple[Self, Tensor]]:
        """This network and v, or both in autocast's type; autocast is off inside the block."""
        device_type = v.device.type
        if not torch.is_autocast_enabled(device_type):
            yield self, v
            return
        dtype = torch.get_autocast_dtype(device_type)
        with torch.autocast(device_type, enabled=False):
            yield self._copy_in(dtype), v.to(dtype)

    def _copy_in(self, dtype: torch.dtype) -> Self:
        if dtype not in self._copies:
            shared: dict[int, Any] = {id(self.pool): self.pool, id(self._copies): {}}
            self._copies[dtype] = copy.deepcopy(self, shared).to(dtype)
        return self._copies[dtype]


class FrozenLayers(FrozenNetwork, nn.Sequential):
    """Layers with fixed weights, one after the other."""

    def __init__(self, *layers: nn.Module, pool: Pool | None = None):
        super().__init__(pool)
        for index, layer in enumerate(layers):
            self.add_module(str(index), layer)

    def forward(self, v: Tensor) -> Tensor:
        """The result of the last layer."""
        with self.as_autocast_says(v) as (network, cast):
            for layer in network:
                cast = layer(cast)
            return cast
