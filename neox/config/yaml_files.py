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
from neox.files import absence

SUFFIXES = (".yml", ".yaml", ".json")

_MOST_VALUES = 100_000
"""Values of one file; far more than any configuration has."""
_MOST_DEPTH = 50
_TOO_DEEP = "nested too deeply; check braces, brackets and aliases"

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


_TAGS = {f"tag:yaml.org,2002:{name}" for name in (*(name for name, _, _ in _SCALARS), "str", "seq", "map")}
"""What a value can be; any other tag, !env say, would be dropped and its text taken as it stands."""


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
    replaced: list[str] = field(default_factory=list)
    """One line for each value that an override file replaced."""


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
    for candidate in (path, *(path.with_name(path.name + suffix) for suffix in SUFFIXES)):
        if candidate.is_file():
            return candidate
    if path.is_dir():
        raise ConfigError(f"{path}: is a folder; name a file in it")
    if not path.parent.is_dir():
        raise ConfigError(f"{path}: no such file, and no folder {path.parent}")
    if path.exists():
        raise ConfigError(f"{path}: {absence(path)}")
    names = {p.name: p for p in path.parent.iterdir() if p.suffix in SUFFIXES}
    names |= {p.stem: p for p in names.values()}
    near = did_you_mean(path.name, names)
    raise ConfigError(f"{path}: no such file{near}" if near else f"{path}: no such file; check the path")


def split_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Part the words of a command line into files and `key=value` overrides."""
    return [text for text in words if not _is_override(text)], [text for text in words if _is_override(text)]


def _is_override(text: str) -> bool:
    # `configs/lr=3e-4.yml` and `lr.yml=x` are files: a key has neither a slash nor a YAML extension.
    key, equals, _ = text.partition("=")
    return bool(equals) and re.fullmatch(r"[A-Za-z_][\w.-]*", key) is not None and not re.search(r"\.ya?ml", key)


def merge(paths: Sequence[Path], overrides: Sequence[str], *, override_files: Sequence[Path] = ()) -> Merged:
    """Read files into one mapping, lay override files over it, then apply `key=value` overrides.

    Raises:
        ConfigError: a file cannot be read or is no YAML. Keys set twice are collected in `problems`.
    """
    merged = Merged()
    upper = [_read_file(merged, path) for path in override_files]
    settled = {normalise_key(text.partition("=")[0].strip()) for text in overrides}
    settled |= {key for values, _ in upper for key, value in values.items() if not isinstance(value, dict)}
    for path in paths:
        values, lines = _read_file(merged, path)
        _merge_file(merged, values, lines, settled)
    for values, lines in upper:
        _replace(merged, values, lines)
    for text in overrides:
        _override(merged, text)
    return merged


def _read_file(merged: Merged, path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Values of a file, and the place of each dotted key."""
    text = _read(path)
    merged.files[path.name if path.name not in merged.files else str(path)] = text
    return _parse(text, str(path), merged.problems)


def _merge_file(merged: Merged, values: dict[str, Any], lines: dict[str, str], settled: set[str]) -> None:
    for key, value in values.items():
        if key in merged.values and not _same(merged.values[key], value) and key not in settled:
            other = f"{merged.values[key]!r} at {merged.sources[key]}"
            merged.problems.append(
                f"{lines[key]}: {key}: set to {value!r} here and to {other}; keep one of them, "
                "or let this file win with --override"
            )
        if key not in merged.values:
            merged.values[key] = value
            merged.sources.update(
                {name: line for name, line in lines.items() if name == key or name.startswith(key + ".")}
            )


def _same(one: Any, other: Any) -> bool:
    """Whether two values say the same; true and 1 do not."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)


def _replace(merged: Merged, values: dict[str, Any], lines: dict[str, str]) -> None:
    """Lay the values of an override file over what is there, noting each value that changes."""

    def lay(target: dict[str, Any], new: dict[str, Any], prefix: str) -> None:
        for key, value in new.items():
            path = f"{prefix}{key}"
            old = target.get(key)
            if isinstance(old, dict) and isinstance(value, dict):
                lay(old, value, f"{path}.")
                continue
            if key in target and not _same(old, value):
                merged.replaced.append(f"{path}: {old!r} ({merged.sources[path]}) -> {value!r} ({lines[path]})")
            if value is None and prefix:
                target.pop(key, None)
            else:
                target[key] = value
            _forget(merged, path)
            merged.sources.update(
                {name: line for name, line in lines.items() if name == path or name.startswith(path + ".")}
            )

    lay(merged.values, values, "")


def _forget(merged: Merged, key: str) -> None:
    """Drop the places of the values inside a key that has a new value."""
    for old in [name for name in merged.sources if name.startswith(key + ".")]:
        del merged.sources[old]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from None


def _compose(text: str, name: str, *, lines: bool = True) -> yaml.Node | None:
    try:
        # Composing recurses in C, where no limit is kept.
        if len(text) > 50_000 and _is_deep(text):
            raise ConfigError(f"{name}: {_TOO_DEEP}")
        node: yaml.Node | None = yaml.compose(text, Loader=_Loader)
    except UnicodeEncodeError:  # a command line may hold any bytes
        raise ConfigError(f"{name}: not UTF-8 text; write it in UTF-8") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}" if mark and lines else name
        raise ConfigError(f"{where}: not valid YAML: {error.problem}; check commas, quotes and braces nearby") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: not valid YAML: {' '.join(str(error).split())}") from None
    return node


def _is_deep(text: str) -> bool:
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MOST_DEPTH:
            return True
    return False


def _parse(text: str, name: str, problems: list[str]) -> tuple[dict[str, Any], dict[str, str]]:
    node = _compose(text, name)
    if node is None:
        return {}, {}
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{name}:{node.start_mark.line + 1}: expected a mapping of keys to values at the top")
    lines: dict[str, str] = {}
    reader = _Builder(name, lines, problems)
    return reader.mapping(node, "", top=True), lines


def _text(key: str) -> str:
    """A key as it can stand in a line."""
    return key if key.isprintable() else repr(key)


class _Builder:
    """Builds values from YAML nodes, noting lines and keys that occur twice."""

    def __init__(self, name: str, lines: dict[str, str], problems: list[str]) -> None:
        self.name, self.lines, self.problems = name, lines, problems
        self.room, self.depth = _MOST_VALUES, 0

    def mapping(self, node: yaml.MappingNode, prefix: str, *, top: bool = False) -> dict[str, Any]:
        """Build a mapping whose own dotted path is `prefix`."""
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            place = f"{self.name}:{key_node.start_mark.line + 1}"
            if not isinstance(key_node, yaml.ScalarNode):
                self.problems.append(
                    f"{place}: expected a key, got a list or mapping; check braces and brackets nearby"
                )
                continue
            key = normalise_key(str(key_node.value)) if top else str(key_node.value)
            path = f"{prefix}.{key}" if prefix else key
            if key in result:
                again = self.value(value_node, path)
                if not _same(again, result[key]):
                    self.problems.append(f"{place}: {_text(path)}: already set at {self.lines[path]}; keep one of them")
                continue
            self.lines[path] = place
            result[key] = self.value(value_node, path)
        return result

    def value(self, node: yaml.Node, path: str) -> Any:
        """Build any value."""
        self.room -= 1
        if self.room < 0:
            # Aliases of aliases grow exponentially.
            raise ConfigError(f"{self.name}:{node.start_mark.line + 1}: too many values; check its & and * aliases")
        if node.tag not in _TAGS:
            self.problems.append(
                f"{self.name}:{node.start_mark.line + 1}: {_text(path)}: "
                f"tag {_text(node.tag)} means nothing here; remove it"
            )
            return None
        if isinstance(node, yaml.CollectionNode):
            return self._collection(node, path)
        try:
            return _scalar(node)
        except ValueError:
            kind = node.tag.rpartition(":")[2]
            shown = node.value if len(node.value) < 40 else node.value[:40] + "..."
            self.problems.append(f"{self.name}:{node.start_mark.line + 1}: {_text(path)}: {shown!r} is no {kind}")
            return None

    def _collection(self, node: yaml.CollectionNode, path: str) -> Any:
        self.depth += 1
        if self.depth > _MOST_DEPTH:
            # An alias inside what it names has no end.
            raise ConfigError(f"{self.name}:{node.start_mark.line + 1}: {_TOO_DEEP}")
        if isinstance(node, yaml.MappingNode):
            value: Any = self.mapping(node, path)
        else:
            value = [self.value(child, path) for child in node.value]
        self.depth -= 1
        return value


def _scalar(node: yaml.Node) -> Any:
    """Value of a plain, quoted or tagged scalar.

    Raises:
        ValueError: a number has too many digits, or a tag such as !!int does not fit.
    """
    kind, text = node.tag.rpartition(":")[2], str(node.value)
    if kind == "bool":
        return text.lower() in ("yes", "true", "on")
    if kind == "int":
        return int(text.replace("_", ""))
    if kind == "float":
        return float(text.lower().replace("_", "").replace(".inf", "inf").replace(".nan", "nan"))
    return None if kind == "null" else text


def _override(merged: Merged, text: str) -> None:
    name, equals, value_text = text.partition("=")
    path = name.strip().split(".")
    path[0] = normalise_key(path[0])
    if not equals or not all(path):
        raise ConfigError(f"command line: {text!r}: write an override as key=value, e.g. optimizer.params.lr=3e-4")
    node = _compose(value_text, f"command line: {text}", lines=False)
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
    _forget(merged, key)
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
