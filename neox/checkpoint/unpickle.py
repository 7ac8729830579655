"""Reading `torch.save` files of other programs without running what is in them.

A pickle can call any function. Files of plain tensors go through torch's own `weights_only` reader; files that
also hold random-number states or objects of DeepSpeed go through an unpickler that knows a short list of names,
makes inert placeholders of DeepSpeed's and Megatron's classes, and refuses everything else.
"""

import codecs
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from neox.errors import CheckpointError

FOREIGN_PACKAGES = ("argparse", "deepspeed", "megatron")
"""Packages whose classes become placeholders."""


class ForbiddenNameError(pickle.UnpicklingError):
    """A pickle names something outside the list."""


class Placeholder:
    """Stands for an object of a class that is not loaded; keeps what was stored and does nothing."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _encode_latin1(text: str, encoding: str = "latin1") -> bytes:
    """How pickles of Python 2's age spell bytes; no other codec is let in."""
    if encoding != "latin1":
        raise ForbiddenNameError(f"codec {encoding}")
    return codecs.encode(text, encoding)


def _numpy_functions() -> dict[str, Callable[..., Any]]:
    """Return the functions that numpy arrays and scalars pickle by, found through numpy's own `__reduce__`."""
    return {"_reconstruct": np.empty(0).__reduce__()[0], "scalar": np.float64(0).__reduce__()[0]}  # type: ignore[index,dict-item]


ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "set"): set,
    ("builtins", "complex"): complex,
    ("_codecs", "encode"): _encode_latin1,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device,
    **{
        ("torch._utils", name): getattr(torch._utils, name)
        for name in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter")
    },
    **{
        (f"numpy.{core}.multiarray", name): function
        for core in ("core", "_core")
        for name, function in _numpy_functions().items()
    },
}


class RestrictedUnpickler(pickle.Unpickler):
    """Finds only the names of `ALLOWED`, torch's dtypes, and placeholders for foreign classes."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        """Return what a pickle names.

        Raises:
            ForbiddenNameError: it is not on the list.
        """
        module_name = {"__builtin__": "builtins"}.get(module_name, module_name)
        if (module_name, global_name) in ALLOWED:
            return ALLOWED[module_name, global_name]
        if module_name == "torch" and isinstance(getattr(torch, global_name, None), torch.dtype):
            return getattr(torch, global_name)
        if module_name.partition(".")[0] in FOREIGN_PACKAGES:
            return type(global_name, (Placeholder,), {})
        raise ForbiddenNameError(f"{module_name}.{global_name}")


def _load(file: Any, **options: Any) -> Any:
    return RestrictedUnpickler(file, **options).load()


# What torch.load wants of a `pickle_module`.
_RESTRICTED_PICKLE = SimpleNamespace(
    __name__="restricted_pickle",
    Unpickler=RestrictedUnpickler,
    load=_load,
    UnpicklingError=pickle.UnpicklingError,
)


def load_torch_file(path: Path) -> Any:
    """Read a `torch.save` file on the CPU; tensors stay on disk until they are used where the file allows it.

    Raises:
        CheckpointError: the file is missing or damaged, or asks for a function that is none of a checkpoint's.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    mapped = zipfile.is_zipfile(path)
    if mapped:
        _refuse_programs(path)
    with suppress(Exception):  # RNG states, foreign objects, damage: the second reader tells them apart
        return torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
    try:
        return torch.load(path, map_location="cpu", mmap=mapped, weights_only=False, pickle_module=_RESTRICTED_PICKLE)
    except ForbiddenNameError as error:
        raise CheckpointError(
            f"{path}: asks for {error}, which no checkpoint needs; not loaded, the file may be malicious"
        ) from None
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path}: not readable as a torch file ({reason}); copy it again") from None


def _refuse_programs(path: Path) -> None:
    """TorchScript archives are programs, and torch.load would hand them to another reader."""
    with zipfile.ZipFile(path) as archive:
        if any(name.endswith("/constants.pkl") for name in archive.namelist()):
            raise CheckpointError(f"{path}: a TorchScript program, not a file of weights")
