"""The resolved configuration as a table, JSON or YAML, each value with the place it comes from."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from neox.config.config import Config
from neox.config.schema import SECTIONS, Place, fields_with_keys, other_keys

DERIVED = "derived"
_ALSO_SET_AT = {"weight_decay": "optimizer.params.weight_decay"}
_WIDEST_VALUE = 48


@dataclass(frozen=True)
class Row:
    """One value.

    Attributes:
        section: name of its section; "without effect" for keys that nothing reads.
        key: dotted key.
        value: the value that runs.
        source: "file:line", "command line", "given" (from Python), "default" or "derived".
        is_given: whether a file or the command line sets it.
    """

    section: str
    key: str
    value: Any
    source: str
    is_given: bool


def rows(config: Config, *, only_given: bool = False) -> list[Row]:
    """List every value in the order of the sections; mappings are one row for each value inside."""
    found = [row for name, place in fields_with_keys() for row in _field_rows(config, name, place)]
    found += [
        Row("without effect", key, config.given[key], _place(config, key), is_given=True)
        for key in sorted(config.given.keys() & other_keys().keys())
    ]
    order = [*SECTIONS, "without effect"]
    found += _derived_rows(config)
    found.sort(key=lambda row: order.index(row.section))
    return [row for row in found if row.is_given or not only_given]


def _field_rows(config: Config, section: str, place: Place) -> Iterator[Row]:
    value = _plain(getattr(getattr(config, section), place.field))
    key = place.key if _dig(config.given, place.key) is not None else _ALSO_SET_AT.get(place.key, place.key)
    given = _dig(config.given, key)
    if isinstance(value, dict) and value:
        yield from _inner_rows(config, section, place.key, value)
        return
    if given is None:
        source = "default" if value == _plain(place.default) else DERIVED
        if place.bounded_above_zero and value == 0:
            value, source = None, "default"
        yield Row(section, place.key, value, source, is_given=False)
        return
    source = _place(config, key)
    if not _alike(given, value):
        source += f", from {json.dumps(given)}"
    yield Row(section, place.key, value, source, is_given=True)


def _inner_rows(config: Config, section: str, key: str, mapping: dict[str, Any]) -> Iterator[Row]:
    for name, value in mapping.items():
        path = f"{key}.{name}"
        if isinstance(value, dict) and value:
            yield from _inner_rows(config, section, path, value)
        else:
            is_given = _dig(config.given, path) is not None
            absent = DERIVED if section == "deepspeed" else "default"
            yield Row(section, path, value, _place(config, path) if is_given else absent, is_given=is_given)


def _derived_rows(config: Config) -> Iterator[Row]:
    settable = {(name, place.field) for name, place in fields_with_keys()}
    for name, section in SECTIONS.items():
        for field in section.model_fields:
            if (name, field) not in settable and (name, field) != ("optimizer", "is_given"):
                value = _plain(getattr(getattr(config, name), field))
                yield (
                    _rate_row(config)
                    if (name, field) == ("optimizer", "lr")
                    else Row(name, field, value, DERIVED, is_given=False)
                )


def _rate_row(config: Config) -> Row:
    """The peak learning rate, which is a field of its own and an argument of the optimizer."""
    key, optimizer = "optimizer.params.lr", config.optimizer
    is_given = _dig(config.given, key) is not None
    value = optimizer.lr if optimizer.is_given else None
    return Row("optimizer", key, value, _place(config, key) if is_given else "default", is_given=is_given)


def table(found: list[Row]) -> str:
    """Lay rows out in columns under the names of their sections, with a final newline."""
    width = max((len(row.key) for row in found), default=0)
    lines: list[str] = []
    section = ""
    for row in found:
        if row.section != section:
            section = row.section
            lines += ["", f"# {section}"] if lines else [f"# {section}"]
        lines.append(f"{row.key:<{width}}  {_shown(row.value):<{_WIDEST_VALUE}}  {row.source}")
    return "\n".join(lines) + "\n"


def as_json(found: list[Row]) -> str:
    """One JSON object: {key: {"value": ..., "source": ...}}, with a final newline."""
    return json.dumps({row.key: {"value": row.value, "source": row.source} for row in found}, indent=2) + "\n"


def as_yaml(config: Config, *, only_given: bool = False) -> str:
    """A file that resolves to the same configuration, with the source of each key behind it."""
    flat = config.to_flat(resolved=not only_given)
    by_key = {row.key: row.source for row in rows(config)}
    lines = []
    for key, value in flat.items():
        source = by_key.get(key) or _place(config, key) or "default"
        # JSON is YAML, and keeps a text a text whatever it looks like.
        lines.append(f"{key}: {json.dumps(value)}  # {source}")
    return "\n".join(lines) + "\n"


def _place(config: Config, key: str) -> str:
    places = {name: place for name, place in config.sources.items() if place != "default"}
    while key and key not in places:
        key = key.rpartition(".")[0]
    return places.get(key, "")


def _alike(given: Any, value: Any) -> bool:
    if isinstance(given, str) and isinstance(value, str):
        return given.lower() == value.lower()
    return bool(_plain(given) == value) or isinstance(given, str)


def _dig(values: dict[str, Any], key: str) -> Any:
    value: Any = values
    for step in key.split("."):
        value = value.get(step) if isinstance(value, dict) else None
    return value


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, list) and len(value) > 8 and len({json.dumps(item) for item in value}) == 1:
        return f"{json.dumps(value[0])} x {len(value)}"
    return json.dumps(value, ensure_ascii=False)
