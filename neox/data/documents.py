"""Reading documents from text and JSON-lines files, compressed or not."""

import json
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from neox.data.text_files import COMPRESSED, SurrogateFilter, text_lines, whole_text
from neox.downloads import lfs_pointer
from neox.errors import DataError
from neox.files import absence

log = logging.getLogger(__name__)

SUFFIXES = (".jsonl", ".txt")

MOST_NAMED = 10
"""Of what a folder holds and is not read."""


class Document(NamedTuple):
    """A document as it stands in its file.

    Attributes:
        path: the file.
        line: its line in a JSON-lines file, from 1; 0 where the whole file is the document.
        raw: the JSON line, or the text.
    """

    path: str
    line: int
    raw: str

    @property
    def place(self) -> str:
        """Where it stands, for messages."""
        return f"{self.path}:{self.line}" if self.line else self.path


def input_paths(words: Sequence[str]) -> list[str]:
    """Return the inputs of a command line: a comma separates two, unless it is in the name of a file."""
    # Not Path.exists, which fails where many files make a word too long for a name.
    return [path for word in words for path in ([word] if os.path.exists(word) else word.split(",")) if path]


def require_distinct(keys: Sequence[str]) -> None:
    """Check that no field of JSON lines is named twice: each is written to files of its own name.

    Raises:
        DataError: one is.
    """
    for number, key in enumerate(keys):
        if key in keys[:number]:
            raise DataError(f"--jsonl-keys: {key} is named twice; name each field once")


def read_documents(inputs: Sequence[str | Path]) -> Iterator[Document]:
    """Return the documents of files in order, one at a time.

    A `.txt` file is one document; a `.jsonl` file has one on each line that is not blank; either may be
    compressed (`.gz`, `.zst`). A folder stands for all such files in it, sorted by name, but for hidden ones; what else
    is in it, folders and archives say, is named in a warning.

    Raises:
        DataError: a missing file, a kind that is not known, one that is damaged, or text that is not UTF-8.
    """
    paths = input_files(inputs)
    _name_what_is_not_read(inputs)
    for path in paths:
        found = lfs_pointer(path)
        if found:  # as text it would be a document
            raise DataError(f"{path}: {found}")
        if file_kind(path) == ".txt":
            yield Document(str(path), 0, whole_text(path))
            continue
        for number, line in text_lines(path):
            if line.strip():
                yield Document(str(path), number, line)


def document_fields(document: Document, keys: Sequence[str], clean: SurrogateFilter) -> list[str]:
    """Return the named text fields of a document; a plain text file has one field, "text".

    Raises:
        DataError: the line is not a JSON object, or a field is missing or not text.
    """
    if document.line == 0:
        if list(keys) != ["text"]:
            raise DataError(f"{document.path}: a plain text file has only the key 'text', not {', '.join(keys)}")
        return [document.raw]
    record = _record(document)
    return clean([_field(document, record, key) for key in keys])


def document_text(document: Document, key: str, clean: SurrogateFilter) -> str:
    """Return one text field of a document, or all of a plain text file."""
    return document.raw if document.line == 0 else document_fields(document, [key], clean)[0]


def document_record(document: Document, clean: SurrogateFilter) -> dict[str, Any]:
    """Return the JSON object on the line of a document.

    Raises:
        DataError: there is none.
    """
    try:
        return clean(_record(document))
    except RecursionError:
        raise _invalid(document, "nested too deeply") from None


def file_kind(path: Path) -> str | None:
    """Return ".jsonl" or ".txt", or None for any other file."""
    for kind in SUFFIXES:
        if path.name.endswith(tuple(kind + compressed for compressed in ("", *COMPRESSED))):
            return kind
    return None


def input_files(inputs: Sequence[str | Path]) -> list[Path]:
    """Return the files that inputs stand for, see `read_documents`.

    Raises:
        DataError: there is none, or one of an unknown kind.
    """
    paths: list[Path] = []
    for given in map(Path, inputs):
        try:
            paths += _files_of(given)
        except OSError as error:
            raise DataError(f"{given}: cannot be read ({error.strerror})") from None
    return paths


def _files_of(given: Path) -> list[Path]:
    if given.is_dir():
        found = sorted(path for path in given.iterdir() if _is_input(path))
        pipes = [path for path in found if path.exists() and not path.is_file()]
        if pipes:
            raise DataError(f"{pipes[0]}: {absence(pipes[0])}")
        if not found:
            raise DataError(f"{given}: no .jsonl or .txt files (plain, .gz or .zst) in this folder that are not hidden")
        return found
    if not given.is_file():
        raise DataError(f"{given}: {absence(given)}")
    if not file_kind(given):
        raise DataError(f"{given}: unknown kind of file; use .jsonl or .txt, plain, .gz or .zst")
    return [given]


def _name_what_is_not_read(inputs: Sequence[str | Path]) -> None:
    for given in map(Path, inputs):
        if given.is_dir():
            paths = sorted(path for path in given.iterdir() if not path.name.startswith(".") and not _is_input(path))
            if paths:
                names = ", ".join(path.name for path in paths[:MOST_NAMED]) + ", ..." * (len(paths) > MOST_NAMED)
                log.warning("%s: not read, as they are no .jsonl or .txt files: %s", given, names)


def _is_input(path: Path) -> bool:
    """Whether a file of a folder is read. A broken link is, and fails: the file it stands for must not be left out."""
    return file_kind(path) is not None and not path.name.startswith(".") and not path.is_dir()


def _record(document: Document) -> dict[str, Any]:
    try:
        record = json.loads(document.raw)
    except json.JSONDecodeError as error:
        raise _invalid(document, f"{error.msg} at column {error.colno}") from None
    except RecursionError:
        raise _invalid(document, "nested too deeply") from None
    except ValueError:
        raise _invalid(document, "a number has thousands of digits") from None
    if not isinstance(record, dict):
        raise DataError(
            f"{document.place}: a JSON {type(record).__name__}, but each line must be an object with a text field"
        )
    return record


def _invalid(document: Document, reason: str) -> DataError:
    return DataError(f"{document.place}: not valid JSON ({reason}); correct the line or leave it out")


def _field(document: Document, record: dict[str, Any], key: str) -> str:
    if not isinstance(record.get(key), str):
        state = "is not text" if key in record else f"is missing; the line has {', '.join(record) or 'no keys'}"
        raise DataError(f"{document.place}: key '{key}' {state}")
    return record[key]
