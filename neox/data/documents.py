"""Reading documents from text and JSON-lines files, compressed or not."""

import gzip
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from neox.data.packages import optional_package
from neox.errors import DataError

SUFFIXES = (".jsonl", ".txt")
COMPRESSED = ("", ".gz", ".zst")


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


def read_documents(inputs: Sequence[str | Path]) -> Iterator[Document]:
    """Return the documents of files in order, one at a time.

    A `.txt` file is one document; a `.jsonl` file has one on each line that is not blank; either may be
    compressed (`.gz`, `.zst`). A folder stands for all such files in it, sorted by name.

    Raises:
        DataError: a missing file, a kind that is not known, or text that is not UTF-8.
    """
    for path in _expand(inputs):
        try:
            with _open_text(path) as file:
                yield from _documents_of(path, file)
        except (UnicodeDecodeError, EOFError, gzip.BadGzipFile) as error:
            raise DataError(f"{path}: cannot be read as UTF-8 text ({error}); convert or compress it again") from error


def document_fields(document: Document, keys: Sequence[str]) -> list[str]:
    """Return the named text fields of a document; a plain text file has one field, "text".

    Raises:
        DataError: the line is not a JSON object, or a field is missing or not text.
    """
    if document.line == 0:
        if list(keys) != ["text"]:
            raise DataError(f"{document.path}: a plain text file has only the key 'text', not {', '.join(keys)}")
        return [document.raw]
    record = document_record(document)
    return [_field(document, record, key) for key in keys]


def document_text(document: Document, key: str = "text") -> str:
    """Return one text field of a document, or all of a plain text file."""
    return document.raw if document.line == 0 else document_fields(document, [key])[0]


def _expand(inputs: Sequence[str | Path]) -> list[Path]:
    paths: list[Path] = []
    for given in map(Path, inputs):
        if given.is_dir():
            found = sorted(path for path in given.iterdir() if _kind(path))
            if not found:
                raise DataError(f"{given}: no .jsonl or .txt files (plain, .gz or .zst) in this folder")
            paths += found
        elif not given.is_file():
            raise DataError(f"{given}: no such file")
        elif not _kind(given):
            raise DataError(f"{given}: unknown kind of file; use .jsonl or .txt, plain, .gz or .zst")
        else:
            paths.append(given)
    return paths


def _kind(path: Path) -> str | None:
    """Return ".jsonl" or ".txt", or None for any other file."""
    for kind in SUFFIXES:
        if path.name.endswith(tuple(kind + compressed for compressed in COMPRESSED)):
            return kind
    return None


def _documents_of(path: Path, file: TextIO) -> Iterator[Document]:
    if _kind(path) == ".txt":
        yield Document(str(path), 0, file.read())
        return
    for number, line in enumerate(file, start=1):
        if line.strip():
            yield Document(str(path), number, line)


@contextmanager
def _open_text(path: Path) -> Iterator[TextIO]:
    if path.suffix == ".zst":
        zstandard = optional_package("zstandard", needed_by=f"{path}: reading .zst")
        with path.open("rb") as raw:
            plain = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
            yield io.TextIOWrapper(plain, encoding="utf-8", newline="\n")
    elif path.suffix == ".gz":
        with gzip.open(path, "rt", encoding="utf-8", newline="\n") as file:
            yield file
    else:
        with path.open(encoding="utf-8", newline="\n") as file:
            yield file


def document_record(document: Document) -> dict[str, Any]:
    """Return the JSON object on the line of a document.

    Raises:
        DataError: there is none.
    """
    where = f"{document.path}:{document.line}"
    try:
        record = json.loads(document.raw)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not valid JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(record, dict):
        raise DataError(f"{where}: a JSON {type(record).__name__}, but each line must be an object with a text field")
    return record


def _field(document: Document, record: dict[str, Any], key: str) -> str:
    if not isinstance(record.get(key), str):
        state = "is not text" if key in record else f"is missing; the line has {', '.join(record) or 'no keys'}"
        raise DataError(f"{document.path}:{document.line}: key '{key}' {state}")
    return record[key]
