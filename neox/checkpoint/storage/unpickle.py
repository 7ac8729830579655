"""Unpickling what other programs wrote without running what is in it.

A pickle can call any function. Checkpoints hold tensors, random-number states and a few objects of DeepSpeed, so the
unpickler knows a short list of names, makes inert placeholders of DeepSpeed's and Megatron's classes, and refuses
everything else.
"""

import codecs
import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any, ClassVar

import numpy as np
import torch

FOREIGN_PACKAGES = ("argparse", "deepspeed", "megatron")
"""Packages whose classes become placeholders."""


ENUMS: dict[tuple[str, str], dict[str, int | str]] = {
    ("deepspeed.runtime.zero.config", "ZeroStageEnum"): {
        "disabled": 0,
        "optimizer_states": 1,
        "gradients": 2,
        "weights": 3,
        "max_stage": 3,
    },
    ("deepspeed.runtime.zero.offload_config", "OffloadDeviceEnum"): {"none": "none", "cpu": "cpu", "nvme": "nvme"},
    ("deepspeed.runtime.fp16.loss_scaler", "LossScaleProfile"): {"FUSED": "fused", "UNFUSED": "unfused"},
}
"""Enumerations that DeepSpeed's states hold: the value of each member."""

_LONGEST = 80
"""Characters of a name that an error shows; a pickle can make one of any length."""


class ForbiddenNameError(pickle.UnpicklingError):
    """A pickle names something outside the list."""

    def __init__(self, name: str) -> None:
        super().__init__(ascii(name)[1:-1][:_LONGEST])  # which may hold line ends


class Placeholder:
    """Stands for an object of a class that is not loaded; keeps what was stored and does nothing."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class EnumPlaceholder(Placeholder):
    """Stands for a member of an enumeration: its value is the only argument."""

    members: ClassVar[Mapping[str, int | str]] = {}


class Unchangeable:
    """What a pickle can use and not change: the opcode BUILD would set any attribute of it."""

    def __setstate__(self, _: object) -> None:
        raise ForbiddenNameError("a change of what the reader itself has made")


class ListedFunction(Unchangeable):
    """A function of the list."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        """Call it."""
        return self._function(*arguments)


def _enum_member(*arguments: Any) -> EnumPlaceholder:
    """`getattr(<enumeration>, "<member>")`, as Python 3.11.2 pickles a member; others call it with its value.

    Nothing is looked up on an object: the member is found by its name in `ENUMS`.
    """
    kind, name = arguments if len(arguments) == 2 else (None, None)
    if isinstance(kind, type) and issubclass(kind, EnumPlaceholder) and type(name) is str and name in kind.members:
        return kind(kind.members[name])
    raise ForbiddenNameError("builtins.getattr of something other than a known enumeration")


def _bytearray(raw: object = b"") -> bytearray:
    """A bytearray of bytes; of a number it would be that many zeros."""
    if type(raw) is not bytes:
        raise ForbiddenNameError("builtins.bytearray of something other than bytes")
    return bytearray(raw)


def _no_bytes() -> bytes:
    """How protocol 2 spells `b""`."""
    return b""


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
    ("builtins", "frozenset"): frozenset,
    ("builtins", "complex"): complex,
    ("builtins", "bytes"): _no_bytes,
    ("builtins", "bytearray"): _bytearray,
    ("builtins", "getattr"): _enum_member,
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
    **{(f"numpy.{core}.numeric", "_frombuffer"): Placeholder for core in ("core", "_core")},
    **{
        (module, f"{pure}{system}Path"): Placeholder
        for module in ("pathlib", "pathlib._local")  # the latter in Python 3.13
        for pure in ("", "Pure")
        for system in ("Posix", "Windows")
    },
}
"""What a pickle may name, and what stands for it; the same whatever Python and protocol wrote it."""


class RestrictedUnpickler(pickle.Unpickler):
    """Finds only the names of `ALLOWED`, torch's dtypes, and placeholders for foreign classes."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        """Return what a pickle names.

        Raises:
            ForbiddenNameError: it is not on the list.
        """
        found = self.find_listed({"__builtin__": "builtins"}.get(module_name, module_name), global_name)
        return ListedFunction(found) if isinstance(found, FunctionType) else found

    def find_listed(self, module_name: str, global_name: str) -> Any:
        """What stands for a name; see find_class."""
        if (module_name, global_name) in ALLOWED:
            return ALLOWED[module_name, global_name]
        if module_name == "torch" and isinstance(vars(torch).get(global_name), torch.dtype):
            return vars(torch)[global_name]
        if (module_name, global_name) in ENUMS:
            return type(global_name, (EnumPlaceholder,), {"members": ENUMS[module_name, global_name]})
        if module_name.partition(".")[0] in FOREIGN_PACKAGES:
            return type(global_name, (Placeholder,), {})
        raise ForbiddenNameError(f"{module_name}.{global_name}")
