"""JSON Schema (draft 2020-12) of a configuration file, made from the declarations of the keys.

It holds what one file can be checked for by itself: names, types, choices, bounds. Rules between keys, and keys that
are required but may stand in another file, are left to `python -m neox.config check`.
"""

import json
import re
import types
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BeforeValidator

from neox.config.deepspeed import SECTIONS as MAPPINGS
from neox.config.keys import NUMBER, Key, Status, lower, number
from neox.config.model import PRECISION_ALIASES, precision_name
from neox.config.schema import Place, fields_with_keys, other_keys

_TEXT_OF_A_NUMBER = f"^{NUMBER.pattern}$"
_BOUNDS = {"gt": "exclusiveMinimum", "ge": "minimum", "lt": "exclusiveMaximum", "le": "maximum"}
_TYPES: dict[Any, dict[str, Any]] = {
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    # A quoted number is read as one.
    float: {"type": ["number", "string"], "pattern": _TEXT_OF_A_NUMBER},
    str: {"type": "string"},
    list: {"type": "array"},
    dict: {"type": "object"},
    Any: {},
}


def json_schema() -> dict[str, Any]:
    """Return the schema of one configuration file."""
    properties: dict[str, Any] = {}
    for _, place in fields_with_keys():
        outer, dot, inner = place.key.partition(".")
        if dot:
            group = properties.setdefault(
                outer, {"type": ["object", "null"], "properties": {}, "additionalProperties": False}
            )
            group["properties"][inner] = _of_field(place)
        else:
            properties[outer] = _of_field(place)
    properties |= {key.name: _of_other(key) for key in other_keys().values()}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "neox configuration",
        "type": "object",
        "properties": dict(sorted(properties.items())),
        # Keys may be spelt with hyphens; completion offers the names with underscores only.
        "patternProperties": {
            f"^(?=.*-){key.replace('_', '[_-]')}$": {"$ref": f"#/properties/{key}"}
            for key in sorted(properties)
            if "_" in key
        },
        "additionalProperties": False,
    }


def text() -> str:
    """The schema as it stands in configs/schema.json."""
    return json.dumps(json_schema(), indent=1, ensure_ascii=False) + "\n"


def _of_field(place: Place) -> dict[str, Any]:
    annotation: Any = place.info.annotation
    metadata = [item for item in place.info.metadata if isinstance(item, BeforeValidator)]
    schema = _of_type(Annotated[annotation, *metadata] if metadata else annotation)
    for bound in place.info.metadata:
        schema |= {word: getattr(bound, name) for name, word in _BOUNDS.items() if hasattr(bound, name)}
    schema |= _inside(place.key)
    described = _described(place.info.description, place.rule)
    default = place.default
    if default is not None and not (place.bounded_above_zero and default == 0):
        described["default"] = default
    return described | _or_null(schema)


def _inside(path: str) -> dict[str, Any]:
    """Schema of the keys of a mapping that DeepSpeed gets; empty for anything else."""
    if path not in MAPPINGS:
        return {}
    kinds = sorted(MAPPINGS[path].items())
    inside = {name: _or_null(_of_type(kind)) | _inside(f"{path}.{name}") for name, kind in kinds}
    if path == "zero_optimization":
        inside["stage"] = {"enum": [0, 1, 2, 3]}
    return {"properties": inside, "additionalProperties": False}


def _of_other(key: Key) -> dict[str, Any]:
    described = _described(f"{key.description.rstrip('.')}. {key.status.value.capitalize()}.", key.rule or key.instead)
    if key.status is Status.INTERNAL:
        return described | {"type": "null"}
    if key.default is not None:
        described["default"] = key.default
    if key.status is not Status.NOT_YET:
        return described | _or_null(_of_type(key.kind))
    if key.kind is dict:
        off = {"type": "object", "properties": {"enabled": {"const": False}}, "required": ["enabled"]}
        return described | {"anyOf": [{"enum": [None, False]}, {"type": "object", "maxProperties": 0}, off]}
    return described | {"enum": _distinct([key.default, *([False] if key.is_inactive(False, {}) else []), None])}


def _described(description: str | None, rule: str) -> dict[str, Any]:
    return {"description": " ".join(filter(None, [description, rule]))}


def _of_type(kind: Any) -> dict[str, Any]:
    """Schema of a type annotation."""
    if kind in _TYPES:
        return dict(_TYPES[kind])
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _of_annotated(parts[0], parts[1:])
    if origin is Literal:
        return {"enum": list(parts)}
    if origin in (Union, types.UnionType):
        options = [_of_type(part) for part in parts if part is not type(None)]
        return options[0] if len(options) == 1 else {"anyOf": options}
    if origin in (list, tuple):
        items = [part for part in parts if part is not Ellipsis]
        return {"type": "array", "items": _of_type(items[0])} if items else {"type": "array"}
    assert origin is dict, f"no JSON type is known for {kind}"
    return {"type": "object"}


def _of_annotated(kind: Any, metadata: Iterable[Any]) -> dict[str, Any]:
    schema = _of_type(kind)
    readers = [item.func for item in metadata if isinstance(item, BeforeValidator)]
    if number in readers and kind is not float:
        return {"type": ["number", "string"], "pattern": _TEXT_OF_A_NUMBER}
    if "enum" in schema and (lower in readers or precision_name in readers):
        names = [*schema["enum"], *(PRECISION_ALIASES if precision_name in readers else [])]
        # Any case is accepted; completion offers the usual one.
        return {"anyOf": [schema, {"type": "string", "pattern": f"^({'|'.join(map(_any_case, names))})$"}]}
    return schema


def _any_case(name: str) -> str:
    return "".join(f"[{c.lower()}{c.upper()}]" if c.isalpha() else re.escape(c) for c in name)


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    """Allow null, which is the same as leaving the key out."""
    if "enum" in schema:
        return schema | {"enum": [*schema["enum"], None]}
    if "anyOf" in schema:
        return schema | {"anyOf": [*schema["anyOf"], {"type": "null"}]}
    kinds = schema.get("type")
    if kinds is None:
        return schema
    return schema | {"type": [*kinds, "null"] if isinstance(kinds, list) else [kinds, "null"]}


def _distinct(values: list[Any]) -> list[Any]:
    """Leave out repeated values; 0 and false are two."""
    return list({json.dumps(value): value for value in values}.values())
