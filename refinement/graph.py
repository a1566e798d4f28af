"""The kernels of a function as a CUDA graph: recorded once, repeated without the processor.

On a GPU a step launches hundreds of small kernels, and each launch costs the processor a few
microseconds. A graph launches all at once. It repeats the kernels with the same memory and the same
numbers. So all that changes from step to step must be in tensors that stay where they are: the
latents, the temperature, and the state of the generators.
"""

from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

import torch
from torch import Generator, Tensor

from common.errors import InputError
from config import RefineConfig
from experimental_inference_methods import Rounding
from refinement.batch import ImageNoise

# Calls before the recording: libraries choose their kernels and take their memory in them.
WARM_UPS = 3

Result = TypeVar("Result")


class Graph(Protocol):
    """What `GraphedFunction` needs of a GPU."""

    def warm_up(self, function: Callable[[], Result]) -> Result:
        """Run a function as if it were recorded."""

    def record(self, function: Callable[[], Result]) -> Result:
        """Record a function; its results have no values before the first `replay`."""

    def replay(self) -> None:
        """Repeat the recorded kernels; this writes the results anew."""


class CudaGraph:
    """A `Graph` on a GPU.

    At each replay a generator starts with the seed and the position that it has then.

    Args:
        generators: all that the function draws from.
    """

    def __init__(self, device: torch.device, generators: Sequence[Generator]):
        self.generators = generators
        self.graph = torch.cuda.CUDAGraph()
        self.stream = torch.cuda.Stream(device)

    def warm_up(self, function: Callable[[], Result]) -> Result:
        """See `Graph`."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            result = function()
        torch.cuda.current_stream().wait_stream(self.stream)
        return result

    def record(self, function: Callable[[], Result]) -> Result:
        """See `Graph`."""
        for generator in self.generators:
            self.graph.register_generator_state(generator)
        # Only this thread must not wait for the GPU now; a thread that loads images may.
        with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
            return function()

    def replay(self) -> None:
        """See `Graph`."""
        self.graph.replay()


class GraphedFunction(Generic[Result]):
    """A function of the temperature, as a graph: the first calls are warm-ups.

    Every call returns the same tensors, and the next call overwrites them.
    """

    def __init__(self, function: Callable[[Tensor], Result], graph: Graph, device: torch.device):
        self.function, self.graph = function, graph
        self.tau = torch.zeros((), dtype=torch.float64, device=device)
        self.calls = 0

    def __call__(self, tau: float) -> Result:
        """What the function returns at temperature tau."""
        self.tau.fill_(tau)
        self.calls += 1
        if self.calls <= WARM_UPS:
            return self.graph.warm_up(self._run)
        if self.calls == WARM_UPS + 1:
            self.result = self.graph.record(self._run)
        self.graph.replay()
        return self.result

    def _run(self) -> Result:
        return self.function(self.tau)


def graphed(function: Callable[[Tensor], Result], noise: ImageNoise) -> GraphedFunction[Result]:
    """A function of the temperature, as a CUDA graph.

    Args:
        noise: all noise that the function draws; its device is the graph's.
    """
    return GraphedFunction(function, CudaGraph(noise.device, noise.source.images), noise.device)


def pick_cuda_graphs(config: RefineConfig, rounding: Rounding, device: torch.device) -> bool:
    """Whether a refinement uses CUDA graphs: as the config says, with `auto` wherever it can.

    Raises:
        InputError: `cuda_graphs` is true, but there is no GPU, or the rounding method needs its
            temperature as a number.
    """
    if config.cuda_graphs == "auto":
        return device.type == "cuda" and rounding.takes_tensors
    if not config.cuda_graphs:
        return False
    if device.type != "cuda":
        raise InputError(f"cuda_graphs is true, but device is {device}: it needs a GPU")
    if not rounding.takes_tensors:
        raise InputError(
            f"cuda_graphs is true, but {rounding.name} reads the number in its temperature or in "
            "the latents, which a graph cannot: use torch's functions there, or set it to false"
        )
    return True
