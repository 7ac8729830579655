"""Reading text files, compressed or not; a damaged file never passes for a whole one."""

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from neox.data.packages import optional_package
from neox.errors import DataError

Content = TypeVar("Content")

COMPRESSED = (".gz", ".zst")

BYTE_ORDER_MARK = "\ufeff"
"""Some editors put it at the start of a file; it is not part of the text."""

_BYTES_AT_A_TIME = 1 << 15  # of a compressed file; text that repeats itself becomes thousands of times as many
_LARGEST_WINDOW = 1 << 31  # bytes; that of `zstd --long=31`, with which some published corpora are made


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    r"""Return the lines of a UTF-8 file with their numbers from 1; a line ends with "\n", which it keeps.

    Raises:
        DataError: the file cannot be read, is not UTF-8, or its compressed data are damaged or cut off. The message
            names the line.
    """
    number = 0
    try:
        with _opened(path) as file:
            for number, line in enumerate(io.TextIOWrapper(file, encoding="utf-8", newline="\n"), start=1):
                yield number, line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line
    except _FAILURES as error:
        raise _named(error, path, number + 1) from None


def whole_text(path: Path) -> str:
    """Return the text of a UTF-8 file; see `text_lines`."""
    try:
        with _opened(path) as file:
            return file.read().decode().removeprefix(BYTE_ORDER_MARK)
    except _FAILURES as error:
        raise _named(error, path) from None


class SurrogateFilter:
    r"""Replaces lone surrogates in documents by U+FFFD, and counts the documents that had any.

    A surrogate is half of a UTF-16 pair. JSON can spell one alone ("\ud83d"), UTF-8 has no bytes for it, and no
    tokenizer has a token.

    Attributes:
        documents: that had a lone surrogate.
    """

    def __init__(self) -> None:
        self.documents = 0

    def __call__(self, content: Content) -> Content:
        """Return the content of one document, any JSON value, without lone surrogates in its texts."""
        cleaned = without_lone_surrogates(content)
        self.documents += cleaned != content
        return cleaned


def without_lone_surrogates(content: Any) -> Any:
    """Return a text, or any JSON value, with each lone surrogate replaced by U+FFFD."""
    if isinstance(content, list):
        return [without_lone_surrogates(part) for part in content]
    if isinstance(content, dict):
        return {key: without_lone_surrogates(part) for key, part in content.items()}
    if not isinstance(content, str):
        return content
    try:
        content.encode()
    except UnicodeEncodeError:
        return content.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return content


def replaced_line(documents: int) -> str:
    """Return the line that reports the documents a `SurrogateFilter` has counted."""
    plural = "s" * (documents != 1)
    return f"{documents:,} document{plural} had lone surrogates, which UTF-8 cannot hold; each was replaced by U+FFFD"


class _BadFrameError(Exception):
    """Not a Zstandard frame, or a damaged one."""


_DAMAGES = (zlib.error, gzip.BadGzipFile, _BadFrameError)
_FAILURES = (UnicodeDecodeError, EOFError, OSError, *_DAMAGES)


def _named(error: Exception, path: Path, line: int | None = None) -> DataError:
    """Return the error for what stopped the reading of a file, at `line` if that is known."""
    place = f"{path}:{line}" if line else str(path)
    if isinstance(error, UnicodeDecodeError):
        return _not_utf8(path)
    if isinstance(error, EOFError):
        return DataError(f"{place}: the compressed file is cut off here; download or copy it again")
    if isinstance(error, _DAMAGES):
        return DataError(
            f"{place}: the compressed file is damaged, or of another kind ({error}); download or compress it again"
        )
    return DataError(f"{place}: cannot be read ({getattr(error, 'strerror', None) or error})")


def _not_utf8(path: Path) -> DataError:
    """Name the first line that is not UTF-8; found by reading anew, as text is decoded many lines at a time."""
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                byte = f"byte {line[error.start]:#04x} in column {error.start + 1}"
                return DataError(f"{path}:{number}: cannot be read as UTF-8 ({byte}); convert the file to UTF-8")
    return DataError(f"{path}: changed while it was read; try again")


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    with path.open("rb") as raw:
        if path.suffix not in COMPRESSED:
            yield raw
            return
        if not raw.peek(1):
            raise EOFError  # no compressed file is empty
        if path.suffix == ".gz":
            with gzip.GzipFile(fileobj=raw) as file:
                yield file  # type: ignore[misc]
            return
        package = optional_package("zstandard", needed_by=f"{path}: reading .zst")
        with io.BufferedReader(_Zstandard(raw, package), buffer_size=1 << 17) as file:
            yield file


class _Zstandard(io.RawIOBase):
    """The content of Zstandard frames, all to their ends: the package's reader takes one that is cut off as whole."""

    def __init__(self, raw: BinaryIO, package: Any) -> None:
        self._raw = raw
        self._package = package
        self._frame: Any = None  # None between frames
        self._compressed = b""
        self._plain = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._plain:
            self._compressed = self._compressed or self._raw.read(_BYTES_AT_A_TIME)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError
                return 0
            self._decompress()
        count = min(len(buffer), len(self._plain))
        buffer[:count] = self._plain[:count]
        self._plain = self._plain[count:]
        return count

    def _decompress(self) -> None:
        if self._frame is None:
            self._frame = self._package.ZstdDecompressor(max_window_size=_LARGEST_WINDOW).decompressobj()
        try:
            self._plain = memoryview(self._frame.decompress(self._compressed))
        except self._package.ZstdError as error:
            raise _BadFrameError(str(error)) from None
        self._compressed = b""
        if self._frame.eof:
            self._compressed, self._frame = self._frame.unused_data, None
