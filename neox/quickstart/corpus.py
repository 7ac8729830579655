"""A corpus that every machine has: the source text of the Python standard library.

Left out are folders that many installations lack (`test`, `idlelib`, `tkinter`, ...) and tables written as code
(`encodings`, `pydoc_data`), whose near-copies on both sides of the split would flatter the held-out figure.
"""

import hashlib
import json
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from neox.errors import DataError

LEFT_OUT = frozenset(
    {
        "__pycache__", "encodings", "ensurepip", "idlelib", "lib-dynload", "lib2to3", "pydoc_data", "site-packages",
        "dist-packages", "test", "tests", "tkinter", "turtledemo",
    }
)  # fmt: skip
MACHINE_FILES = "_sysconfigdata"
"""Files that begin so hold the build settings of one machine."""

HELD_OUT_SHARE = 0.05


@dataclass(frozen=True)
class Corpus:
    """What `build_corpus` wrote.

    Attributes:
        train: JSON lines to train on.
        held_out: JSON lines that nothing is trained on, the tokenizer neither.
        train_files: documents in `train`.
        held_out_files: documents in `held_out`.
        train_bytes: UTF-8 bytes of text in `train`.
        held_out_bytes: UTF-8 bytes of text in `held_out`.
    """

    train: Path
    held_out: Path
    train_files: int
    held_out_files: int
    train_bytes: int
    held_out_bytes: int


def build_corpus(folder: Path, *, library: Path | None = None) -> Corpus:
    """Write `train.jsonl` and `held_out.jsonl`, one source file a line, fields `name` and `text`.

    A file is held out or not by a hash of its name, so the split is the same on every machine. Of equal files
    only the first is kept.

    Args:
        folder: where to write; made if need be.
        library: folder of `.py` files; default: the standard library of the running interpreter.

    Raises:
        DataError: there are too few files for both sides.
    """
    library = Path(sysconfig.get_path("stdlib")) if library is None else library
    lines: dict[bool, list[str]] = {False: [], True: []}
    sizes = {False: 0, True: 0}
    for name, text in _sources(library):
        side = _is_held_out(name)
        lines[side].append(json.dumps({"name": name, "text": text}))
        sizes[side] += len(text.encode())
    if not (lines[False] and lines[True]):
        found = sum(map(len, lines.values()))
        raise DataError(f"{library}: {found} usable .py files; the quickstart needs the standard library's sources")
    folder.mkdir(parents=True, exist_ok=True)
    paths = {False: folder / "train.jsonl", True: folder / "held_out.jsonl"}
    for side, path in paths.items():
        path.write_text("\n".join(lines[side]) + "\n", encoding="utf-8")
    return Corpus(paths[False], paths[True], len(lines[False]), len(lines[True]), sizes[False], sizes[True])


def _sources(library: Path) -> Iterator[tuple[str, str]]:
    """Name relative to the library and text of each file, sorted by name, each text once."""
    seen: set[str] = set()
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        if LEFT_OUT.intersection(relative.parts) or path.name.startswith(MACHINE_FILES):
            continue
        try:
            text = path.read_bytes().decode("utf-8")
        except (UnicodeDecodeError, OSError):
            continue  # a few old files are in Latin-1; a link may lead nowhere
        if text.strip() and text not in seen:
            seen.add(text)
            yield relative.as_posix(), text


def _is_held_out(name: str) -> bool:
    number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    return number < HELD_OUT_SHARE * 2**64
