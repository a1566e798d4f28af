"""Batches of crops on their way to the device."""

from collections.abc import Generator
from contextlib import closing

import torch

from pretraining.draws import Batch


def on_device(
    batches: Generator[Batch, None, None], device: torch.device
) -> Generator[Batch, None, None]:
    """The same batches in the same order, with x on the device; closing it closes `batches`.

    A GPU reads pinned memory by itself, in a stream of its own, while it computes the step before.
    The host waits for neither.
    """
    with closing(batches):
        if device.type == "cpu":
            yield from batches
            return
        copying = torch.cuda.Stream(device)
        for batch in batches:
            with torch.cuda.stream(copying):
                x = batch.x.pin_memory().to(device, non_blocking=True)
            computing = torch.cuda.current_stream(device)
            computing.wait_stream(copying)
            x.record_stream(computing)  # its memory must not be reused before the step has used it
            yield batch._replace(x=x)
