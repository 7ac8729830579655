"""Packages that only some users need, imported where they are used."""

from importlib import import_module
from typing import Any

from neox.errors import DataError


def optional_package(name: str, *, needed_by: str) -> Any:
    """Return a package's module.

    Raises:
        DataError: it is not installed; the message says how to install it.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise DataError(f"{needed_by} needs {name}: pip install {name}") from error
