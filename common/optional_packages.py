"""Packages that only a part of the code needs, imported where they are used."""

import os
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from common.console import native_stderr
from common.errors import InputError


def require_package(package: str, user: str, part: str = "training") -> None:
    """Check that a package is installed; does not import it.

    Args:
        user: what needs the package; the message begins with it: "tfrecords".
        part: the part of `requirements/` that has it.

    Raises:
        InputError: it is not installed.
    """
    if find_spec(package) is None:
        raise _missing(package, user, part)


def import_package(package: str, user: str, part: str = "training") -> Any:
    """Import a package; `user`, `part`: see `require_package`.

    Raises:
        InputError: the package, or one that it imports, is not installed.
    """
    try:
        return import_module(package)
    except ModuleNotFoundError as error:
        raise _missing(error.name or package, user, part) from None


def import_tensorflow(user: str = "tfrecords") -> Any:
    """Import tensorflow, without its messages and without the GPU; takes 4 s.

    Raises:
        InputError: it is not installed.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with native_stderr():  # some messages ignore the log level
        tf = import_package("tensorflow", user)
        tf.config.set_visible_devices([], "GPU")
    return tf


def import_tensorflow_datasets(user: str = "tensorflow-datasets' clic") -> Any:
    """Import tensorflow-datasets, see `import_tensorflow`.

    Raises:
        InputError: it or tensorflow is not installed.
    """
    import_tensorflow(user)
    return import_package("tensorflow_datasets", user)


def _missing(package: str, user: str, part: str) -> InputError:
    return InputError(
        f"{user}: needs the package {package}, which is not installed: "
        f"pip install -r requirements/{part}.txt"
    )
