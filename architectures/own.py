"""Finds the family of models that a config names: a registered one, or a class of the user's."""

import difflib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from architectures.base import ARCHITECTURES, Architecture
from architectures.faults import users_code
from architectures.forwarded import forwarded_family
from common.compressai import CompressionModel
from common.errors import InputError


def find_family(architecture: str) -> type[Architecture]:
    """The family of a name, or of `path/to/file.py:Class`.

    The class is an `Architecture`, or a `CompressionModel` of CompressAI, which is then refined by
    its own `forward`. The code in the file is run.

    Raises:
        InputError: there is no such family, file or class, or the file cannot be imported.
            `architectures.trial` finds the other faults of a class.
    """
    path, colon, name = architecture.rpartition(":")
    if colon and path.endswith(".py"):
        return _own_family(architecture, path, name)
    if architecture not in ARCHITECTURES:
        close = difflib.get_close_matches(architecture, ARCHITECTURES, n=1)
        hint = f"did you mean {close[0]}? It " if close else ""
        raise InputError(
            f"architecture {architecture}: {hint}must be path/to/file.py:Class, or one of "
            f"{', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[architecture]


def _own_family(architecture: str, path: str, name: str) -> type[Architecture]:
    known = dict(ARCHITECTURES)
    try:
        module = _imported(architecture, Path(path))
    finally:
        # The class may register itself, but only this config asked for it.
        ARCHITECTURES.clear()
        ARCHITECTURES.update(known)
    found = getattr(module, name, None)
    if isinstance(found, type) and issubclass(found, Architecture):
        if found in ARCHITECTURES.values():
            return found
        abstract = sorted(getattr(found, "__abstractmethods__", ()))
        if abstract:
            raise InputError(f"architecture {architecture}: the class lacks {', '.join(abstract)}")
        if "name" not in vars(found):
            found.name = name
        found.given_as = architecture
        return found
    if isinstance(found, type) and issubclass(found, CompressionModel):
        return forwarded_family(found, architecture)
    kinds = "an Architecture (architectures/base.py) or CompressAI's CompressionModel"
    problem = f"has no {name}" if found is None else f"{name} is neither"
    raise InputError(f"architecture {architecture}: {problem}; a class is wanted that is {kinds}")


def _imported(architecture: str, path: Path) -> ModuleType:
    """The module of a file, which may import its neighbours."""
    if not path.is_file():
        raise InputError(f"architecture {architecture}: no such file (looked from {Path.cwd()})")
    module_name = f"own_architecture_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise InputError(f"architecture {architecture}: {path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    folder = str(path.resolve().parent)
    sys.modules[module_name] = module  # pickle and dataclasses look classes up there
    sys.path.append(folder)
    try:
        with users_code(architecture):
            spec.loader.exec_module(module)
    finally:
        sys.path.remove(folder)
    return module
