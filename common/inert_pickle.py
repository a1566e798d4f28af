"""Read a pickle's tensors and plain values, and run nothing that the pickle names.

A pickle can name any function of any package and have it called. Here no name is looked up. Each
name becomes an `Inert` object, and so does the result of calling one. Only tensors and ordered
dictionaries are built. torch's own safe reader stops at the first name that it does not know.

This module can be passed to `torch.load` as its `pickle_module`.
"""

import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, BinaryIO, ClassVar

import torch
from torch import Tensor


class Inert(dict):
    """Stands in for a class, a function, or an object that these would have made.

    Attributes:
        name: the class or function, as `module.name`.
        is_network: whether it was saved with the state of a `torch.nn.Module`.

    It keeps the items of a subclass of dict, for weights may be among them.
    """

    # Pickles use objects as keys and in sets.
    __hash__ = object.__hash__  # type: ignore[assignment]  # dict has none
    __eq__ = object.__eq__

    def __init__(self, name: str):
        super().__init__()
        self.name = name
        self.__name__ = name  # torch names a network's class in a warning
        self.is_network = False

    def append(self, item: object) -> None:
        """Ignore an item; pickles append items to subclasses of list and deque."""

    extend = add = append


def _plain_tensor(
    storage: torch.TypedStorage,
    offset: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    requires_grad: bool,
    hooks: object,
    *metadata: object,
) -> Tensor:
    return torch._utils._rebuild_tensor_v2(
        storage, offset, size, stride, False, OrderedDict(), *metadata
    )


def _without_subclass(builder: Inert, subclass: Inert, arguments: tuple, state: object) -> Any:
    return _result_of(builder, arguments)


# The only functions that are called.
BUILDERS: dict[str, Callable] = {
    "collections.OrderedDict": OrderedDict,
    "torch._utils._rebuild_tensor": torch._utils._rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _plain_tensor,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "torch._utils._rebuild_parameter_with_state": lambda tensor, *_: tensor,
    "torch._tensor._rebuild_from_type_v2": _without_subclass,
}


def _result_of(called: object, arguments: tuple) -> Any:
    """The result of a call: built if `BUILDERS` has the name, else an `Inert`."""
    name = called.name if isinstance(called, Inert) else type(called).__name__
    return BUILDERS[name](*arguments) if name in BUILDERS else Inert(name)


class Unpickler(pickle._Unpickler):
    """The standard library's reader; what looks up names, calls or sets states is replaced."""

    dispatch: ClassVar[dict[int, Callable]] = dict(pickle._Unpickler.dispatch)
    # The base class sets both; the stubs do not have them.
    stack: list[Any]
    append: Callable[[object], None]

    def find_class(self, module: str, name: str) -> Inert | type:
        """An `Inert`; nothing is imported. torch compares `UntypedStorage` by identity."""
        if (module, name) == ("torch.storage", "UntypedStorage"):
            return torch.UntypedStorage
        return Inert(f"{module}.{name}")

    def get_extension(self, code: int) -> None:
        """Push an `Inert` for the class with this number in copyreg's registry."""
        self.append(Inert(f"copyreg extension {code}"))

    def _instantiate(self, called: object, arguments: list) -> None:
        self.append(_result_of(called, tuple(arguments)))

    def _call(self) -> None:
        arguments, called = self.stack.pop(), self.stack.pop()
        self.append(_result_of(called, arguments))

    def _call_with_keywords(self) -> None:
        self.stack.pop()
        self._call()

    def _set_state(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Inert) and isinstance(state, dict):
            target.is_network = {"_modules", "_parameters"} <= state.keys()

    dispatch[pickle.REDUCE[0]] = _call
    dispatch[pickle.NEWOBJ[0]] = _call
    dispatch[pickle.NEWOBJ_EX[0]] = _call_with_keywords
    dispatch[pickle.BUILD[0]] = _set_state


def load(file: BinaryIO, **options: Any) -> Any:
    """Read the next pickle of a binary file as `pickle.load` does, but run nothing.

    Raises:
        Exception: the pickle is broken; of any kind.
    """
    return Unpickler(file, **options).load()
