"""Collecting the mistakes of a configuration, each with its place."""

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from neox.errors import ConfigError

NO_PLACE = ("default", "given")
"""Sources that are no place in a file: not set at all, or set by a Python mapping."""


@dataclass
class Problems:
    """Mistakes found so far. `sources` maps a dotted key to the place where it was set."""

    sources: Mapping[str, str]
    lines: list[str] = field(default_factory=list)
    wrong: set[str] = field(default_factory=set)
    """Keys whose own value is wrong; what compares them with others is not told as well."""

    def place(self, key: str) -> str:
        """Where `key`, or the nearest mapping around it, was set; empty if nowhere."""
        while key:
            if key in self.sources:
                place = self.sources[key]
                return "" if place in NO_PLACE else place
            key = key.rpartition(".")[0]
        return ""

    def named(self, key: str) -> str:
        """`key` after the place where it was set, if there is one: the beginning of a line."""
        place = self.place(key)
        return f"{place}: {key}" if place else key

    def _place_of_another(self, message: str) -> str:
        """Where the first key was set that a message names; words that are no key for certain do not count."""
        names = (word for word in re.findall(r"[\w.]+", message) if "_" in word)
        return next((place for name in names if (place := self.place(name.rstrip(".")))), "")

    def add(self, key: str, message: str) -> None:
        """Note a mistake in `key`, unless the line names a key that is wrong by itself."""
        if self.wrong and not self.wrong.isdisjoint(re.findall(r"[\w.]+", f"{key} {message}")):
            return
        place = self.place(key) or self._place_of_another(message)
        name = key if key.isprintable() else repr(key)
        line = f"{place}: {name}: {message}" if place else f"{name}: {message}"
        if line not in self.lines:
            self.lines.append(line)

    def raise_any(self) -> None:
        """Raise ConfigError with one line a mistake, if there is one."""
        if self.lines:
            raise ConfigError("\n".join(self.lines))


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Ask for the nearest known name, as text to append to a message; nothing if none is near."""
    spelt = {other.lower(): other for other in known}
    near = difflib.get_close_matches(name.lower(), spelt, n=1, cutoff=0.6)
    return f"; did you mean {spelt[near[0]]!r}?" if near else ""
