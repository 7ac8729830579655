"""Parts of files, read when they are asked for.

Nothing is mapped into memory: where the storage fails or a file is cut short, a page of a map that cannot be read kills
the process with SIGBUS, and no reason is given. A read gives an error, and can be tried again.
"""

import errno
import os
import resource
from collections import deque
from pathlib import Path
from typing import Any
from weakref import ref

import numpy as np

from neox.errors import DataError, LostDataError
from neox.patience import IMPATIENT, Patience, is_mistake, read_again, unreadable


class StoredFile:
    """A file of a fixed size, parts of which are read.

    A read that fails is tried again, with growing pauses, on the file opened anew: it may have vanished and come back,
    or be on its way back. Pickled, it is its path.

    Args:
        path: the file.
        patience: how long to try.

    Attributes:
        size: its bytes, as they were first found.

    Raises:
        DataError: it cannot be opened.
    """

    def __init__(self, path: Path, patience: Patience = IMPATIENT) -> None:
        self.path = path
        self.patience = patience
        self.size = -1
        self._open: _Descriptor | None = None
        try:
            self.size = self._find_size()
        except OSError as error:
            if is_mistake(error):
                raise DataError(f"{path}: cannot be read ({error.strerror})") from None
            self._try_again(0, 0, error)

    def __reduce__(self) -> tuple[type["StoredFile"], tuple[Path, Patience]]:
        return StoredFile, (self.path, self.patience)

    def read(self, dtype: np.dtype, count: int, offset: int) -> np.ndarray:
        """Return `count` elements from byte `offset` on.

        Raises:
            LostDataError: they could not be read in all the time there was.
        """
        size = count * dtype.itemsize
        try:
            descriptor = self._open or self._opened()  # held, so that no other thread's open closes it
            data: bytes | bytearray = os.pread(descriptor.number, size, offset)
            if len(data) != size:
                data = self._read_in_parts(size, offset)
        except OSError as error:
            data = self._try_again(size, offset, error)
        return np.frombuffer(data, dtype)

    def close(self) -> None:
        """Let go of the file; the next read opens it again."""
        self._open = None

    def _read_in_parts(self, size: int, offset: int) -> bytearray:
        """Read however little the system gives at a time; it is no more than 2 GiB."""
        descriptor, data = self._open or self._opened(), bytearray(size)
        view = memoryview(data)
        while view:
            count = os.preadv(descriptor.number, [view], offset)
            if count == 0:
                raise OSError(errno.ESTALE, f"it ends at byte {offset}, and had {self.size} when the run opened it")
            view, offset = view[count:], offset + count
        return data

    def _opened(self) -> "_Descriptor":
        descriptor = _Descriptor(self.path)
        found = os.fstat(descriptor.number).st_size
        if found != self.size:
            raise OSError(errno.ESTALE, f"it has {found} bytes, and had {self.size} when the run opened it")
        self._open = descriptor
        _note_open(self)
        return descriptor

    def _find_size(self) -> int:
        if self.size >= 0:
            return self.size
        descriptor = _Descriptor(self.path)  # stat by name would not say whether it may be read
        return os.fstat(descriptor.number).st_size

    def _try_again(self, size: int, offset: int, error: OSError) -> bytearray:
        def read() -> bytearray:
            self.close()
            self.size = self._find_size()
            return self._read_in_parts(size, offset)

        try:
            return read_again(self.path, read, error, self.patience)
        except OSError as last:
            tried = f", tried for {self.patience.seconds:.0f} s" if self.patience.seconds else ""
            mend = "bring the file back and start again from the checkpoint"
            raise LostDataError(f"{unreadable(self.path, last)}{tried}; {mend}") from None


class StoredArray:
    """Rows of an array in a file; what is indexed or sliced is read then, and nothing is kept.

    Args:
        file: where it lies.
        dtype: of an element.
        offset: its first byte.
        length: number of rows.
        columns: elements of a row; 0 for an array of one dimension.
    """

    def __init__(self, file: StoredFile, dtype: np.dtype, offset: int, length: int, columns: int = 0) -> None:
        self.file = file
        self.dtype = dtype
        self._offset = offset
        self._length = length
        self._columns = columns
        self._row_bytes = dtype.itemsize * (columns or 1)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, key: int | slice) -> Any:
        """Row number `key`, or the array of a slice without a step."""
        if isinstance(key, slice):
            start, stop, step = key.indices(self._length)
            assert step == 1, f"a slice with step {step}"
            return self.rows(start, max(start, stop))
        number = key + self._length if key < 0 else key
        if not 0 <= number < self._length:
            raise IndexError(f"row {key} of {self._length}")
        return self.rows(number, number + 1)[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.rows(0, self._length).astype(self.dtype if dtype is None else dtype, copy=False)

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows `start` up to `stop`, which exist."""
        array = self.file.read(
            self.dtype, (stop - start) * (self._columns or 1), self._offset + start * self._row_bytes
        )
        return array.reshape(-1, self._columns) if self._columns else array


Rows = np.ndarray | StoredArray
"""An array, in memory or read when asked for."""


def stored_npy(path: Path, patience: Patience = IMPATIENT) -> StoredArray:
    """The array of a `.npy` file of one or two dimensions.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is damaged, or of another kind.
    """
    with path.open("rb") as file:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
        if read is None:
            raise ValueError(f"{path}: version {version}")
        shape, is_transposed, dtype = read(file)
        offset = file.tell()
    length, columns = (*shape, 0) if len(shape) == 1 else shape
    whole = StoredFile(path, patience)
    if is_transposed or whole.size != offset + length * max(1, columns) * dtype.itemsize:
        raise ValueError(f"{path}: {whole.size} bytes do not fit {dtype} {shape}")
    return StoredArray(whole, dtype, offset, length, columns)


class _Descriptor:
    """An open file, closed when nobody uses it any more."""

    number = -1

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)


_LIMIT = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
_MOST_OPEN = 4096 if _LIMIT == resource.RLIM_INFINITY else _LIMIT // 2

_opened: deque[ref[StoredFile]] = deque()
"""Files that are open, the first opened first."""


def _note_open(file: StoredFile) -> None:
    """Close what has been open longest where a blend has more files than a process may hold."""
    _opened.append(ref(file))
    while len(_opened) > _MOST_OPEN:
        oldest = _opened.popleft()()
        if oldest is not None and oldest is not file:
            oldest.close()
