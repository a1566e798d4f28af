"""A GPU that is none: tensors that say they are on one, and the kernels that it would run.

Code asks a tensor for its device to choose between the forms for a CPU and for a GPU. Here the
tensors of another device answer "cuda". With "cpu" the forms for a GPU compute real numbers, with
"meta" they compute only shapes, whatever the size. What only a GPU does is left out.
"""

from collections import Counter

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("cuda", 0)
# They allocate memory, or write none.
NO_KERNELS = {
    "detach", "empty", "empty_like", "empty_strided", "lift_fresh", "new_empty", "_unsafe_view",
    "_record_function_enter_new", "_record_function_exit",
}  # fmt: skip
# Their results' shapes or values must reach the host.
WAITING = {"_local_scalar_dense", "equal", "masked_select", "nonzero", "_unique2"}


class PretendedGpu(TorchFunctionMode):
    """Inside its block the tensors on `host`, "cpu" or "meta", say that they are on a GPU."""

    def __init__(self, host):
        super().__init__()
        self.host = torch.device(host)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function == torch.Tensor.device.__get__:
            device = function(*args)
            return GPU if device == self.host else device
        args = [self._real(value) for value in args]
        return function(*args, **{key: self._real(value) for key, value in (kwargs or {}).items()})

    def _real(self, value):
        is_gpu = isinstance(value, torch.device) and value.type == "cuda"
        return self.host if is_gpu else value


class Kernels(TorchDispatchMode):
    """Counts the operations of its block by name, views left out, and names those that wait.

    An operation waits if the host must have its result, or copies between host and device.
    """

    def __init__(self):
        super().__init__()
        self.counts = Counter()
        self.waits = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        name = operation.overloadpacket.__name__
        if operation.is_view or name in NO_KERNELS:
            return result
        self.counts[name] += 1
        tensors = [v for v in tree_leaves((args, kwargs, result)) if isinstance(v, torch.Tensor)]
        of_mask = name == "index" and any(v.dtype == torch.bool for v in tensors)
        # A number is passed with the kernel; it has no dimensions.
        devices = {v.device for v in tensors if v.dim() or name in ("copy_", "_to_copy")}
        if name in WAITING or of_mask or len(devices) > 1:
            self.waits.append(name)
        return result


class RecordedGraph(TorchDispatchMode):
    """A `refinement.graph.Graph` without a GPU, as strict as a CUDA graph.

    `replay` repeats the operations with the recorded numbers, on the recorded tensors.
    """

    def __init__(self, device, generators):
        super().__init__()
        self.generators = generators
        self.operations = []
        self.replays = self.warm_ups = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        if not operation.is_view:
            self.operations.append((operation, args, kwargs or {}, result))
        return result

    def warm_up(self, function):
        self.warm_ups += 1
        return function()

    def record(self, function):
        states = [generator.get_state() for generator in self.generators]
        with self:
            results = function()
        for generator, state in zip(self.generators, states, strict=True):
            generator.set_state(state)
        tree_map(lambda v: v.fill_(torch.nan), results)  # a GPU records without computing
        return results

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        for operation, args, kwargs, result in self.operations:
            again = operation(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old is not new:
                    old.copy_(new)
