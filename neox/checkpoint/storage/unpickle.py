"""Unpickling what other programs wrote without running what is in it.

A pickle can call any function. Checkpoints hold tensors, random-number states and a few objects of DeepSpeed, so the
unpickler knows a short list of names, makes inert placeholders of DeepSpeed's and Megatron's classes, and refuses
everything else.
"""

import codecs
import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

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


def _rebuild_with_state(function: Callable[..., Any], _: object, arguments: tuple[Any, ...], __: object) -> Any:
    """How tensors pickle that carry attributes, which are left out; `function` is on the list itself."""
    return function(*arguments)


def _encode_latin1(text: str, encoding: str = "latin1") -> bytes:
    """How pickles of Python 2's age spell bytes; no other codec is let in."""
    if encoding != "latin1":
        raise ForbiddenNameError(f"codec {encoding}")
    return codecs.encode(text, encoding)


class NumberType(Placeholder):
    """Stands for a numpy dtype: `("f8", False, True)`, and in its state the order of the bytes."""


def _number(kind: Any, raw: Any) -> Any:
    """A scalar of numpy.

    Of numpy's own only this is made, from a type that is looked at. Its dtypes and arrays can be told by a pickle to
    take bytes for addresses of objects, and no array of a checkpoint is read: they are states of random numbers.
    """
    code = kind.arguments[0] if isinstance(kind, NumberType) else None
    if not isinstance(code, str) or np.dtype(code).kind not in "biufcSU":
        raise ForbiddenNameError("a scalar of numpy that is no number")
    return np.frombuffer(raw, np.dtype(code).newbyteorder(kind.state[1]))[0]


ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "set"): set,
    ("builtins", "complex"): complex,
    ("_codecs", "encode"): _encode_latin1,
    ("numpy", "ndarray"): Placeholder,
    ("numpy", "dtype"): NumberType,
    ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device,
    ("torch", "Tensor"): Placeholder,
    ("torch.nn.parameter", "Parameter"): Placeholder,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_with_state,
    ("_io", "BytesIO"): Placeholder,
    **{
        ("torch._utils", name): getattr(torch._utils, name)
        for name in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter")
    },
    **{
        (f"numpy.{core}.multiarray", name): function
        for core in ("core", "_core")
        for name, function in (("_reconstruct", Placeholder), ("scalar", _number))
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
