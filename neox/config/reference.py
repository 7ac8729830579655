"""The generated part of docs/configuration.md: a table of every key, made from the declarations."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from neox.config import json_schema
from neox.config.keys import Key, Section, Status, exact
from neox.config.layouts import markdown as layouts
from neox.config.schema import SECTIONS, Place, other_keys, places
from neox.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
MARK = "<!-- Below this line everything is written by `python -m neox.config docs`. -->"

_OTHERS = (
    (
        Status.NO_EFFECT,
        "Accepted without effect",
        "Switches for speed or memory that change nothing here. An active value is answered with one line that names "
        "the key.",
    ),
    (
        Status.DEAD,
        "Accepted and unused",
        "GPT-NeoX declares these keys and never reads them. Any value is answered with one line that names the key.",
    ),
    (
        Status.NOT_YET,
        "Not supported yet",
        "Refused by name, unless the value asks for nothing: the default, `false`, an empty one, "
        "`{enabled: false}`, `null`.",
    ),
    (
        Status.INTERNAL,
        "Cannot be set",
        "GPT-NeoX writes these keys itself. Setting one is an error that says what to do.",
    ),
)


def pages() -> dict[Path, str]:
    """Every generated file with the text it should have.

    Raises:
        ConfigError: this is no checkout of the project.
    """
    configuration = ROOT / "docs" / "configuration.md"
    try:
        prose = configuration.read_text(encoding="utf-8").partition(MARK)[0]
    except OSError:
        raise ConfigError(f"{configuration}: no such file; run this in a checkout of the project") from None
    return {
        configuration: f"{prose}{MARK}\n\n{keys_markdown()}",
        ROOT / "docs" / "layouts.md": layouts(),
        ROOT / "configs" / "schema.json": json_schema.text(),
    }


def keys_markdown() -> str:
    """Tables of the keys of each section, then of the keys that no section reads."""
    lines = ["## Keys", ""]
    for name, section in SECTIONS.items():
        lines += [f"### {_title(name)}", "", _first_line(section), ""]
        lines += _table(("Key", "Type", "Default", "Meaning", "Rule", "Status"), map(_field_row, places(name)))
    for status, title, prose in _OTHERS:
        keys = sorted((key for key in other_keys().values() if key.status is status), key=lambda key: key.name)
        lines += [f"### {title}", "", prose, ""]
        if status is Status.INTERNAL:
            lines += _table(("Key", "Meaning", "Instead"), map(_internal_row, keys))
        else:
            lines += _table(("Key", "Type", "Default", "Meaning"), map(_other_row, keys))
    return "\n".join(lines).rstrip("\n") + "\n"


def _table(head: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> list[str]:
    def line(cells: tuple[str, ...]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return [line(head), "|" + "---|" * len(head), *map(line, rows), ""]


def _field_row(place: Place) -> tuple[str, ...]:
    default = place.default
    shown = (
        "required"
        if place.info.is_required()
        else _value(None if place.bounded_above_zero and default == 0 else default)
    )
    upstream = place.extra["upstream"]
    status = f"honoured; not yet: {', '.join(upstream)}" if upstream else "honoured"
    kind = _kind(place.info.annotation) + _bounds(place)
    return f"`{place.key}`", kind, shown, place.info.description or "", place.rule, status


def _other_row(key: Key) -> tuple[str, ...]:
    return f"`{key.name}`", _kind(key.kind), _value(key.default), " ".join(filter(None, [key.description, key.rule]))


def _internal_row(key: Key) -> tuple[str, ...]:
    return f"`{key.name}`", key.description, key.instead


def _title(name: str) -> str:
    return {"deepspeed": "DeepSpeed", "lora": "LoRA"}.get(name, name.capitalize())


def _first_line(section: type[Section]) -> str:
    return (section.__doc__ or "").strip().partition("\n")[0]


def _value(value: Any) -> str:
    if value is None:
        return "-"
    return f"`{json.dumps(list(value) if isinstance(value, tuple) else value)}`"


_NAMES = {bool: "true or false", int: "integer", float: "number", str: "text", list: "list", dict: "mapping"}


def _kind(kind: Any) -> str:
    """A type in words."""
    if kind in _NAMES:
        return _NAMES[kind]
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return ", ".join(f"`{json.dumps(part) if isinstance(part, bool) else part}`" for part in parts)
    if origin is dict:
        return "mapping"
    if origin in (list, tuple):
        inner = [part for part in parts if part is not Ellipsis]
        return "list" if not inner or inner[0] is Any else f"list of {_PLURALS.get(_kind(inner[0]), _kind(inner[0]))}"
    if hasattr(kind, "__metadata__"):
        return _kind(parts[0])
    return " or ".join(dict.fromkeys(_kind(part) for part in parts if part is not type(None)))


_PLURALS = {"integer": "integers", "number": "numbers", "text": "texts"}
_WORDS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}


def _bounds(place: Place) -> str:
    words = [
        f"{word} {exact(getattr(bound, name))}"
        for bound in place.info.metadata
        for name, word in _WORDS.items()
        if hasattr(bound, name)
    ]
    return ", " + ", ".join(words) if words else ""
