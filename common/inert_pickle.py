"""A pickle's tensors and plain values, without running anything that the pickle names.

A pickle can name any function of any package and have it called. Here no name is looked up: each
gives an `Inert` object, calls and states of those give further ones, and only tensors and ordered
dictionaries are built. torch's own safe reader stops at the first name that it does not know.

The module can be `torch.load`'s `pickle_module`.
"""

import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, BinaryIO, ClassVar

import torch
from torch import Tensor


class Inert(dict):
    """What stands for a class, a function, or an object that they would have made.

    Attributes:
        name: the class or function, as `module.name`.
        is_network: whether it was saved with the state of a `torch.nn.Module`.

    It keeps the items of a dictionary's subclass, for weights may be among them.
    """

    __hash__ = object.__hash__  # type: ignore[assignment]  # dict has none; these serve as keys
    __eq__ = object.__eq__

    def __init__(self, name: str):
        super().__init__()
        self.name = name
        self.__name__ = name  # torch names a network's class in a warning
        self.is_network = False

    def append(self, item: object) -> None:
        """Forget an item of what was a list's or queue's subclass."""

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


# All that is ever called; no name leads to anything else.
BUILDERS: dict[str, Callable] = {
    "collections.OrderedDict": OrderedDict,
    "torch._utils._rebuild_tensor": torch._utils._rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _plain_tensor,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "torch._utils._rebuild_parameter_with_state": lambda tensor, *_: tensor,
    "torch._tensor._rebuild_from_type_v2": _without_subclass,
}


def _result_of(called: object, arguments: tuple) -> Any:
    """What calling or constructing would give, inert but for `BUILDERS`."""
    name = called.name if isinstance(called, Inert) else type(called).__name__
    return BUILDERS[name](*arguments) if name in BUILDERS else Inert(name)


class Unpickler(pickle._Unpickler):
    """The standard library's reader with every step that looks up, calls or sets state replaced."""

    dispatch: ClassVar[dict[int, Callable]] = dict(pickle._Unpickler.dispatch)
    # The base class sets both; the stubs do not have them.
    stack: list[Any]
    append: Callable[[object], None]

    def find_class(self, module: str, name: str) -> Inert | type:
        """An inert stand-in; nothing is imported. torch knows untyped storages by identity."""
        if (module, name) == ("torch.storage", "UntypedStorage"):
            return torch.UntypedStorage
        return Inert(f"{module}.{name}")

    def get_extension(self, code: int) -> None:
        """Push a stand-in for the class that has this number in copyreg's registry."""
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
    """The next pickle of a binary file, as `pickle.load` but inert.

    Raises:
        Exception: of whatever kind a broken pickle leads to.
    """
    return Unpickler(file, **options).load()
