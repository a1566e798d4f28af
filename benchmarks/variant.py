"""The description of a loop to time, and the settings that all loops share."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from experimental_inference_methods import Temperature

LMBDA, SCHEDULE = 0.01, Temperature(rate=1e-3, ub=1.0)
MSE_WEIGHT = 650.25  # of the plain loops, written out: they share nothing with `objectives`
METHOD = "sga_logits_3c", "log_ssl_a_factor_pow"


class Variant(NamedTuple):
    """A loop to time: its name, whether it keeps freed pages, and the builder of its step."""

    name: str
    keeps_pages: bool
    make_step: Callable[..., Callable[[], Any]]


def in_bfloat16(make_step: Callable[..., Callable[[], Any]]) -> Callable[..., Callable[[], Any]]:
    """A builder of the same step with bfloat16 as its precision."""
    return partial(make_step, precision=torch.bfloat16)
