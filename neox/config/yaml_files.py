"""YAML as people write it for language models, read with the line of every key.

Upstream's files are JSON-like flow mappings with comments and trailing commas; block style reads as well.
Unlike YAML 1.1, 1e-8 is a number, and 12:30 and 2020-01-01 are text.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import yaml

from neox.config.problems import Problems, did_you_mean
from neox.errors import ConfigError

_SUFFIXES = (".yml", ".yaml", ".json")

_SCALARS = (
    (
        "bool",
        r"^(?:yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF)$",
        "yYnNtTfFoO",
    ),
    ("int", r"^[-+]?(?:0|[1-9][0-9_]*)$", "-+0123456789"),
    (
        "float",
        r"^(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        "-+0123456789.",
    ),
    ("null", r"^(?:~|null|Null|NULL|)$", ("~", "n", "N", "")),
)


def _resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    """Our reading of plain scalars, by first character, as PyYAML wants it."""
    table: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    for name, pattern, first in _SCALARS:
        for character in first:
            table.setdefault(character, []).append((f"tag:yaml.org,2002:{name}", re.compile(pattern)))
    return table


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Composes nodes with our reading of plain scalars; values are built by `_Builder`."""

    yaml_implicit_resolvers: ClassVar[dict[str, list[tuple[str, re.Pattern[str]]]]] = _resolvers()


@dataclass
class Merged:
    """Flat keys of several files and the command line.

    `sources` maps a key, or the dotted path of a value inside one, to "file:line" or "command line";
    `files` maps the name of each file to its text.
    """

    values: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def normalise_key(key: str) -> str:
    """Spell a top-level key with underscores."""
    return key.replace("-", "_")


def resolve_config_paths(names: Sequence[str | Path], config_dir: str | Path | None = None) -> list[Path]:
    """Find configuration files, with `.yml` left out or not, in `config_dir` if given.

    Raises:
        ConfigError: a file is absent; the line names the nearest file of its folder.
    """
    return [_find(Path(config_dir or "") / name) for name in names]


def _find(path: Path) -> Path:
    for candidate in (path, *(path.with_name(path.name + suffix) for suffix in _SUFFIXES)):
        if candidate.is_file():
            return candidate
    if not path.parent.is_dir():
        raise ConfigError(f"{path}: no such file, and no folder {path.parent}")
    names = {p.name: p for p in path.parent.iterdir() if p.suffix in _SUFFIXES}
    names |= {p.stem: p for p in names.values()}
    near = did_you_mean(path.name, names)
    raise ConfigError(f"{path}: no such file{near}" if near else f"{path}: no such file; check the path")


def merge(paths: Sequence[Path], overrides: Sequence[str]) -> Merged:
    """Read files into one mapping, then apply `key=value` overrides.

    Raises:
        ConfigError: a file cannot be read or is no YAML. Keys set twice are collected in `problems`.
    """
    merged = Merged()
    settled = {normalise_key(text.partition("=")[0].strip()) for text in overrides}
    for path in paths:
        _merge_file(merged, path, settled)
    for text in overrides:
        _override(merged, text)
    return merged


def _merge_file(merged: Merged, path: Path, settled: set[str]) -> None:
    text = _read(path)
    merged.files[path.name if path.name not in merged.files else str(path)] = text
    values, lines = _parse(text, str(path), merged.problems)
    for key, value in values.items():
        if key in merged.values and merged.values[key] != value and key not in settled:
            other = f"{merged.values[key]!r} at {merged.sources[key]}"
            merged.problems.append(f"{lines[key]}: {key}: set to {value!r} here and to {other}; keep one of them")
        if key not in merged.values:
            merged.values[key] = value
            merged.sources.update(
                {name: line for name, line in lines.items() if name == key or name.startswith(key + ".")}
            )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from None


def _compose(text: str, name: str) -> yaml.Node | None:
    try:
        node: yaml.Node | None = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}" if mark else name
        raise ConfigError(f"{where}: not valid YAML: {error.problem}; check commas, quotes and braces nearby") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: not valid YAML: {' '.join(str(error).split())}") from None
    return node


def _parse(text: str, name: str, problems: list[str]) -> tuple[dict[str, Any], dict[str, str]]:
    node = _compose(text, name)
    if node is None:
        return {}, {}
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{name}:{node.start_mark.line + 1}: expected a mapping of keys to values at the top")
    lines: dict[str, str] = {}
    reader = _Builder(name, lines, problems)
    return reader.mapping(node, "", top=True), lines


class _Builder:
    """Builds values from YAML nodes, noting lines and keys that occur twice."""

    def __init__(self, name: str, lines: dict[str, str], problems: list[str]) -> None:
        self.name, self.lines, self.problems = name, lines, problems

    def mapping(self, node: yaml.MappingNode, prefix: str, *, top: bool = False) -> dict[str, Any]:
        """Build a mapping whose own dotted path is `prefix`."""
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = normalise_key(str(key_node.value)) if top else str(key_node.value)
            place = f"{self.name}:{key_node.start_mark.line + 1}"
            path = f"{prefix}.{key}" if prefix else key
            if key in result:
                self.problems.append(f"{place}: {path}: already set at {self.lines[path]}; keep one of them")
                continue
            self.lines[path] = place
            result[key] = self.value(value_node, path)
        return result

    def value(self, node: yaml.Node, path: str) -> Any:
        """Build any value."""
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(child, path) for child in node.value]
        return _scalar(node)


def _scalar(node: yaml.Node) -> Any:
    kind, text = node.tag.rpartition(":")[2], str(node.value)
    if kind == "bool":
        return text.lower() in ("yes", "true", "on")
    if kind == "int":
        return int(text.replace("_", ""))
    if kind == "float":
        return float(text.replace("_", "").replace(".inf", "inf").replace(".Inf", "inf").replace(".nan", "nan"))
    return None if kind == "null" else text


def _override(merged: Merged, text: str) -> None:
    name, equals, value_text = text.partition("=")
    path = name.strip().split(".")
    path[0] = normalise_key(path[0])
    if not equals or not all(path):
        raise ConfigError(f"command line: {text!r}: write an override as key=value, e.g. optimizer.params.lr=3e-4")
    node = _compose(value_text, "command line")
    value = None if node is None else _Builder("command line", {}, merged.problems).value(node, "")
    target = merged.values
    for depth, step in enumerate(path[:-1]):
        if target.get(step) is None:
            target[step] = {}
        if not isinstance(target[step], dict):
            raise ConfigError(f"command line: {name}: {'.'.join(path[: depth + 1])} is not a mapping")
        target = target[step]
    target[path[-1]] = value
    key = ".".join(path)
    stale = [old for old in merged.sources if old.startswith(key + ".")]
    for old in stale:
        del merged.sources[old]
    merged.sources[key] = "command line"
    merged.sources.setdefault(path[0], "command line")


def problems_of(merged: Merged) -> Problems:
    """Make the collector that goes on from the mistakes found while reading."""
    problems = Problems(merged.sources)
    problems.lines.extend(merged.problems)
    return problems


def from_mapping(flat: Mapping[str, Any]) -> Merged:
    """Take keys from a Python mapping instead of files."""
    return Merged(values={normalise_key(key): value for key, value in flat.items()})
