"""The vocabulary of the configuration: value types, and what is known of every key.

A key is declared once: as a field of a section (a setting that something reads, made by `setting`), or as a
row of its topic's `OTHER_KEYS` (a key that is accepted, retired, internal or not supported yet).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError


class Status(StrEnum):
    """What setting a key does."""

    HONOURED = "honoured"
    DERIVED = "derived"
    """Computed from other keys; has a field but cannot be set."""
    NO_EFFECT = "accepted: no effect on results"
    DEAD = "accepted: unused upstream and here"
    INTERNAL = "internal: cannot be set"
    NOT_YET = "not supported yet"


@dataclass(frozen=True)
class Key:
    """One flat YAML key that no section reads.

    Args:
        name: the key, with underscores.
        kind: type of its value: a builtin type or a `Literal`.
        default: its value when absent, which is also its inactive value.
        description: what it asks for.
        status: what setting it does.
        instead: for internal keys, what to set or do instead.
        same_as: name of another key; being equal to that key's value is inactive too.
        rule: how its value is derived, or which other keys it is bound to, in a short sentence.
    """

    name: str
    kind: Any
    default: Any
    description: str
    status: Status
    instead: str = ""
    same_as: str = ""
    rule: str = ""

    def is_inactive(self, value: Any, values: dict[str, Any]) -> bool:
        """Whether `value` asks for nothing, given all `values` of the configuration."""
        if value == self.default or (self.same_as and value == values.get(self.same_as)):
            return True
        if isinstance(value, dict):
            return not value or value.get("enabled") is False
        # A default of True means that False is a request.
        return self.default is not True and (value is False or value in ("", []))


def no_effect(name: str, kind: Any, default: Any, description: str, *, rule: str = "") -> Key:
    """Declare a key that changes speed or memory upstream and nothing here; an active value is announced."""
    return Key(name, kind, default, description, Status.NO_EFFECT, rule=rule)


def dead(name: str, kind: Any, default: Any, description: str, *, rule: str = "") -> Key:
    """Declare a key that upstream accepts and never reads; any value is announced."""
    return Key(name, kind, default, description, Status.DEAD, rule=rule)


def internal(name: str, kind: Any, description: str, *, instead: str) -> Key:
    """Declare a key that upstream writes itself; `instead` tells the user what to do."""
    return Key(name, kind, None, description, Status.INTERNAL, instead=instead)


def not_yet(name: str, kind: Any, default: Any, description: str, *, same_as: str = "", rule: str = "") -> Key:
    """Declare a key that is refused unless its value is inactive."""
    return Key(name, kind, default, description, Status.NOT_YET, same_as=same_as, rule=rule)


def setting(
    default: Any,
    description: str,
    *,
    key: str = "",
    upstream: tuple[str, ...] = (),
    retired: Mapping[str, str] | None = None,
    rule: str = "",
    **bounds: Any,
) -> Any:
    """Declare a field of a section, read from a YAML key.

    Args:
        default: value when the key is absent; `...` makes the key required.
        description: what it does, with its unit.
        key: dotted place in the YAML when it is not the field's own name, e.g. `optimizer.type`.
        upstream: values that upstream knows and that are not supported yet.
        retired: values that are gone for good, each with what to do instead.
        rule: how the value is derived when absent, or which other keys it is bound to, in a short sentence.
        bounds: pydantic's `gt`, `ge`, `lt`, `le`.
    """
    extra: dict[str, Any] = {"status": Status.HONOURED, "key": key, "upstream": upstream, "rule": rule}
    extra["retired"] = dict(retired or {})
    return Field(default, description=description, json_schema_extra=extra, **bounds)


def derived(default: Any, description: str) -> Any:
    """Declare a field that is computed and cannot be set."""
    extra: dict[str, Any] = {"status": Status.DERIVED, "key": "", "upstream": (), "rule": "", "retired": {}}
    return Field(default, description=description, json_schema_extra=extra)


class Section(BaseModel):
    """A frozen group of settings. Types are strict: text is no number, and true is no number either."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())


def whole_number(value: Any) -> Any:
    """Read 1e5 or 1000.0 as an integer; leave anything else to the type check."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


NUMBER = re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
"""A quoted number that is read as a float."""


def number(value: Any) -> Any:
    """Read a quoted number such as "1e-8" as a float; leave anything else to the type check."""
    return float(value) if isinstance(value, str) and NUMBER.fullmatch(value.strip()) else value


def number_hint(value: Any) -> str:
    """What to write instead of text that starts like a number; empty for anything else."""
    if not isinstance(value, str) or not re.match(r"\s*[-+]?\.?[0-9]", value):
        return ""
    mended = re.sub(r"[_,\s]", "", re.sub(r"(?<=[eE])_", "-", value))
    if NUMBER.fullmatch(mended) and mended == value.strip():  # 007 reads as text; some YAML readers take it for octal
        mended = re.sub(r"^([-+]?)0+(?=[0-9])", r"\1", mended)
    return f"; write {mended}" if NUMBER.fullmatch(mended) else "; write it like 1.5, 3e-4 or 1000"


def as_tuple(value: Any) -> Any:
    """Freeze a list."""
    return tuple(value) if isinstance(value, list) else value


def lower(value: Any) -> Any:
    """Spell a name in lower case, so that names are case-insensitive."""
    return value.lower() if isinstance(value, str) else value


def meant_text(value: Any) -> Any:
    """Refuse text that somebody meant as no value, or as true or false, or as a folder that a shell would find.

    `save: None` is text in YAML and would make a folder of that name; only null and ~ are no value there.
    """
    wrong = unmeant(value) if isinstance(value, str) else ""
    if wrong:
        raise PydanticCustomError("unmeant", "{wrong}", {"wrong": wrong})
    return value


def unmeant(text: str) -> str:
    """Why text is no name and no path; empty where it may be one."""
    word = text.strip().lower()
    if word in ("", "none", "null", "~"):
        return f"expected text, got {text!r}; write null for no value"
    if word in ("true", "false"):
        return f"expected text, got {text!r}"
    if text.startswith("~/"):
        return f"{text!r} begins with ~, which only a shell expands; write the whole path"
    return _nul(text)


def _nul(text: str) -> str:
    return f"{text!r} has a NUL character; remove it" if "\0" in text else ""


def without_nul(text: str) -> str:
    """Refuse text that no path can hold."""
    if wrong := _nul(text):
        raise PydanticCustomError("unmeant", "{wrong}", {"wrong": wrong})
    return text


def storable(value: int) -> int:
    """Refuse a number that arrays and files cannot hold."""
    if abs(value) >= 2**63:
        raise PydanticCustomError("unmeant", "{wrong}", {"wrong": f"expected less than 2**63, got {value}"})
    return value


def exact(bound: float) -> str:
    """A bound for a line of text; a whole number with all its digits."""
    return str(bound) if isinstance(bound, int) else f"{bound:g}"


Int = Annotated[int, BeforeValidator(whole_number), AfterValidator(storable)]
Float = Annotated[float, BeforeValidator(number), Field(allow_inf_nan=False)]
Text = Annotated[str, BeforeValidator(meant_text)]
"""A name or a path."""

Affix = Annotated[str, AfterValidator(without_nul)]
"""A part of a path, which may be empty."""

Strings = Annotated[tuple[Text, ...], BeforeValidator(as_tuple)]
Floats = Annotated[tuple[Float, ...], BeforeValidator(as_tuple)]
Ints = Annotated[tuple[Int, ...], BeforeValidator(as_tuple)]
Lower = BeforeValidator(lower)

_WORDS = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "a mapping",
}


def mismatch(value: Any, kind: Any) -> str:
    """Say in words how `value` fails to be of `kind`; empty if it fits."""
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        fits = any(value == choice and type(value) is type(choice) for choice in choices)
        return "" if fits else f"expected {' or '.join(map(repr, choices))}, got {value!r}"
    kinds = get_args(kind) or (kind,)
    if any(_fits(value, one) for one in kinds):
        return ""
    hint = number_hint(value) if {int, float} & set(kinds) else ""
    return f"expected {' or '.join(_WORDS[one] for one in kinds)}, got {value!r}{hint}"


def _fits(value: Any, kind: type) -> bool:
    if kind is float:
        value = number(value)
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        value = whole_number(value)
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)
