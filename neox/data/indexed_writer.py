"""Writing tokenized corpora, so that a half-written file is never taken for a whole one."""

import contextlib
import os
import secrets
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from neox.data.indexed import DTYPE_CODES, MMAP_HEADER, MMAP_MAGIC, data_file, index_file
from neox.errors import DataError
from neox.files import flush, why_unwritable

UINT16_VOCABULARY_LIMIT = 65500  # upstream's rule; a little under 2**16


def smallest_token_dtype(vocab_size: int | None) -> np.dtype:
    """Return uint16 where the vocabulary is known and below 65,500, else int32 (the format's rule)."""
    if vocab_size is not None and vocab_size < UINT16_VOCABULARY_LIMIT:
        return np.dtype("<u2")
    return np.dtype("<i4")


class IndexedDatasetWriter:
    """Write `<prefix>.bin` and `<prefix>.idx` in the "mmap" format, one document at a time.

    Tokens go to temporary names beside the target; `finalize` renames them, the index last. Used as a context
    manager it finalizes on success and leaves nothing behind on an error.

    Args:
        prefix: path without extension; its folder is made if it is missing.
        dtype: one of the token types that the format knows, see `smallest_token_dtype`.

    Raises:
        DataError: a type that the format does not know, a token that does not fit the type, or a file that cannot be
            written.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype | type | str) -> None:
        self.prefix = str(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        codes = {known: code for code, known in DTYPE_CODES.items()}
        if self.dtype not in codes:
            raise DataError(f"{prefix}: tokens of type {self.dtype} cannot be stored; use uint16 or int32")
        self._code = codes[self.dtype]
        self._sizes = array("i")
        self._doc_idx = array("q", [0])
        writer = f"{os.getpid()}-{secrets.token_hex(4)}"  # containers on two hosts often have the same number
        self._bin_part, self._idx_part = Path(f"{prefix}.bin.{writer}.part"), Path(f"{prefix}.idx.{writer}.part")
        for place in (data_file(prefix), index_file(prefix)):
            if place.is_dir():
                raise DataError(f"{place}: a folder has this name; choose another prefix")
        with self._named_errors():
            data_file(prefix).parent.mkdir(parents=True, exist_ok=True)
            self._bin = self._bin_part.open("wb")

    def __enter__(self) -> "IndexedDatasetWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.finalize()
        else:
            self.discard()

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(
                f"{self.prefix}.bin: cannot be written ({why_unwritable(error)}); free space or choose another prefix"
            ) from error

    def add_document(self, tokens: np.ndarray | Sequence[int]) -> None:
        """Append one document that is a single item."""
        self.add_documents(np.asarray(tokens), [len(tokens)])

    def add_documents(self, tokens: np.ndarray, sizes: Sequence[int] | np.ndarray) -> None:
        """Append documents given as one row of tokens [sum(sizes)] and their lengths."""
        assert len(tokens) == int(np.sum(sizes)), f"{len(tokens)} tokens for sizes that sum to {np.sum(sizes)}"
        with self._named_errors():
            self._bin.write(self._as_stored(tokens).tobytes())
        first = len(self._sizes)
        self._sizes.extend(int(size) for size in sizes)
        self._doc_idx.extend(range(first + 1, len(self._sizes) + 1))

    def finalize(self) -> None:
        """Write the index, flush both files to disk and give them their names; on an error nothing is left behind."""
        _finalize([self])

    def discard(self) -> None:
        """Remove what has been written so far."""
        with contextlib.suppress(OSError):  # a full disk refuses what is still buffered
            self._bin.close()
        for part in (self._bin_part, self._idx_part):
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)

    def _write_rest(self) -> None:
        with self._named_errors():
            with self._bin:
                self._bin.flush()
                os.fsync(self._bin.fileno())
            with self._idx_part.open("wb") as file:
                self._write_index(file)
                file.flush()
                os.fsync(file.fileno())

    def _withdraw_index(self) -> None:
        with self._named_errors():
            index_file(self.prefix).unlink(missing_ok=True)

    def _give_names(self) -> None:
        with self._named_errors():
            self._bin_part.replace(data_file(self.prefix))
            self._idx_part.replace(index_file(self.prefix))
            flush(data_file(self.prefix).parent)

    def _as_stored(self, tokens: np.ndarray) -> np.ndarray:
        if tokens.dtype == self.dtype or not len(tokens):
            return tokens.astype(self.dtype, copy=False)
        if self.dtype.kind in "iu":
            bounds = np.iinfo(self.dtype)
            if tokens.min() < bounds.min or tokens.max() > bounds.max:
                raise DataError(
                    f"{self.prefix}: tokens {tokens.min()} to {tokens.max()} do not fit {self.dtype}; "
                    f"is the vocabulary size right?"
                )
        return tokens.astype(self.dtype)

    def _write_index(self, file: BinaryIO) -> None:
        sizes = np.asarray(self._sizes, "<i4")
        ends = np.cumsum(sizes, dtype=np.int64) * self.dtype.itemsize
        starts = np.concatenate((np.zeros(min(1, len(sizes)), np.int64), ends[:-1]))
        file.write(MMAP_HEADER.pack(MMAP_MAGIC, 1, self._code, len(sizes), len(self._doc_idx)))
        file.write(sizes.tobytes())
        file.write(starts.astype("<i8").tobytes())
        file.write(np.asarray(self._doc_idx, "<i8").tobytes())


class IndexedDatasetWriters:
    """Writers of datasets that belong together: at the end all of them get their names, or none does."""

    def __init__(self) -> None:
        self._writers: list[IndexedDatasetWriter] = []

    def open(self, prefix: str | Path, dtype: np.dtype | type | str) -> IndexedDatasetWriter:
        """Begin one more dataset; see `IndexedDatasetWriter`."""
        self._writers.append(IndexedDatasetWriter(prefix, dtype))
        return self._writers[-1]

    def __enter__(self) -> "IndexedDatasetWriters":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            _finalize(self._writers)
        else:
            _discard(self._writers)


def _finalize(writers: Sequence[IndexedDatasetWriter]) -> None:
    """Complete all datasets, and give them their names when all are whole.

    The old indices go first, so that at no moment a new .bin meets an old .idx, of its own or of another key.
    """
    try:
        for writer in writers:
            writer._write_rest()
        for writer in writers:
            writer._withdraw_index()
        for writer in writers:
            writer._give_names()
    except BaseException:
        _discard(writers)
        raise


def _discard(writers: Sequence[IndexedDatasetWriter]) -> None:
    for writer in writers:
        writer.discard()
