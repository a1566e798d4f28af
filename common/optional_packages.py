"""Packages that only some of the training needs: imported where they are used, or asked for."""

import os
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from common.console import native_stderr
from common.errors import InputError

INSTALL = "pip install -r requirements/training.txt"


def require_package(package: str, user: str) -> None:
    """Check that a package is installed; does not import it.

    Args:
        user: what needs it, as the message begins: "tfrecords", 'optimizer = "soap"'.

    Raises:
        InputError: it is not installed.
    """
    if find_spec(package) is None:
        raise _missing(package, user)


def import_package(package: str, user: str) -> Any:
    """The module of a package; `user` as in `require_package`.

    Raises:
        InputError: it, or a package that it imports, is not installed.
    """
    try:
        return import_module(package)
    except ModuleNotFoundError as error:
        raise _missing(error.name or package, user) from None


def import_tensorflow(user: str = "tfrecords") -> Any:
    """tensorflow, imported late (4 s), after torch, quiet, and kept off the GPU.

    Raises:
        InputError: it is not installed.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with native_stderr():  # some lines heed no level
        tf = import_package("tensorflow", user)
        tf.config.set_visible_devices([], "GPU")
    return tf


def import_tensorflow_datasets(user: str = "tensorflow-datasets' clic") -> Any:
    """tensorflow-datasets, imported late like tensorflow.

    Raises:
        InputError: it or tensorflow is not installed.
    """
    import_tensorflow(user)
    return import_package("tensorflow_datasets", user)


def _missing(package: str, user: str) -> InputError:
    return InputError(f"{user}: needs the package {package}, which is not installed: {INSTALL}")
