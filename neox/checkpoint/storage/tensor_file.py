"""Files of tensors in the safetensors format, read and written one tensor at a time.

The library's own reader maps the file into memory and its writer wants all tensors at once: what a process has touched
of a file counts as its memory, so converting 14 GB would take 14 GB. Here a tensor is in memory while it is used.

Format (github.com/huggingface/safetensors, README): uint64 length of the header, the header as JSON
`{name: {dtype, shape, data_offsets}}`, then the tensors' bytes one after another.
"""

import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
import xxhash

from neox.downloads import failed_download
from neox.errors import CheckpointError, UnreadError
from neox.files import WriteBehind
from neox.patience import Patience, Result, is_mistake, read_again, unreadable

CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {code: dtype for dtype, code in CODES.items()}
_SMALL_FLOATS = ("F8_", "F6_", "F4")
"""Beginnings of the types of quantised models."""
PATIENCE = Patience(60.0)
"""With storage that fails while a checkpoint is read; nothing says how long its reader would wait."""

LARGEST_HEADER = 100 * 2**20
"""As the safetensors library bounds it."""


@dataclass(frozen=True)
class Entry:
    """A tensor of a file: type, shape, and where its bytes begin and end in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class TensorFile:
    """Reads a safetensors file without mapping it: memory is held for the tensors that were read, and no longer.

    Args:
        path: the file.

    Attributes:
        path: as given.
        entries: what is in it, by name, in the order of the bytes.

    Raises:
        CheckpointError: it is missing, no such file, or shorter or longer than its header says.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = self._open()
        except OSError as error:
            if is_mistake(error):
                raise CheckpointError(f"{path}: cannot be read ({error.strerror}); copy it again") from None
            self._file = self._again(self._open, error)
        self.entries = self._read_header()

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def names(self) -> list[str]:
        """Names of the tensors, in the order of their bytes."""
        return list(self.entries)

    def tensor(self, name: str) -> torch.Tensor:
        """Read a tensor on the CPU.

        Raises:
            CheckpointError: the file has no such tensor, or cannot be read.
        """
        if name not in self.entries:
            raise CheckpointError(f"{self.path}: has no tensor {name}; copy it again")
        entry = self.entries[name]
        flat = torch.empty(entry.end - entry.begin, dtype=torch.uint8)
        self._fill(flat.numpy().data, entry.begin)
        return flat.view(entry.dtype).view(entry.shape)

    def _fill(self, buffer: memoryview, offset: int) -> None:
        while buffer:
            count = self._read_some(buffer, offset)
            if count == 0:
                raise self._damaged("it ends too early")
            buffer, offset = buffer[count:], offset + count

    def _read_some(self, buffer: memoryview, offset: int) -> int:
        def read_anew() -> int:
            self._file = self._open()
            return os.preadv(self._file.fileno(), [buffer], offset)

        try:
            return os.preadv(self._file.fileno(), [buffer], offset)
        except OSError as error:
            return self._again(read_anew, error)

    def _open(self) -> BinaryIO:
        return self.path.open("rb", buffering=0)

    def _again(self, read: Callable[[], Result], error: OSError) -> Result:
        try:
            return read_again(self.path, read, error, PATIENCE)
        except OSError as last:
            raise UnreadError(f"{unreadable(self.path, last)}, tried for {PATIENCE.seconds:.0f} s") from None

    def _read_header(self) -> dict[str, Entry]:
        size = os.fstat(self._file.fileno()).st_size
        if size < 8:
            raise self._damaged("it is too short")
        start = bytearray(8)
        self._fill(memoryview(start), 0)
        (length,) = struct.unpack("<Q", start)
        if length > min(size - 8, LARGEST_HEADER):
            raise self._damaged("its header does not fit into it")
        header = bytearray(length)
        self._fill(memoryview(header), 8)
        try:
            content = json.loads(header)
            content.pop("__metadata__", None)
            for name, value in content.items():
                self._check_type(name, value["dtype"])
            entries = {name: _entry(value, 8 + length) for name, value in content.items()}
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            raise self._damaged("its header is no list of tensors") from None
        entries = dict(sorted(entries.items(), key=lambda item: item[1].begin))
        position = 8 + length
        for entry in entries.values():
            if entry.begin != position:
                raise self._damaged("its tensors do not lie one after another")
            position = entry.end
        if position != size:
            raise self._damaged(f"it has {size} bytes, its header says {position}")
        return entries

    def _check_type(self, name: str, kind: str) -> None:
        """Refuse by its name a type that cannot be read."""
        if kind in DTYPES:
            return
        hint = f"only {', '.join(DTYPES)} can be read"
        if kind.startswith(_SMALL_FLOATS):
            hint = "the model is quantised; use its release in bf16, fp16 or fp32"
        raise CheckpointError(f"{self.path}: {name} is of type {kind:.20}; {hint}")

    def _damaged(self, reason: str) -> CheckpointError:
        found = failed_download(self.path)
        return CheckpointError(f"{self.path}: {found or f'damaged, {reason}; copy it again'}")


def _entry(value: Mapping[str, Any], data: int) -> Entry:
    begin, end = map(int, value["data_offsets"])
    dtype, shape = DTYPES[value["dtype"]], tuple(map(int, value["shape"]))
    if torch.Size(shape).numel() * dtype.itemsize != end - begin:
        raise ValueError("shape and size differ")
    return Entry(dtype, shape, data + begin, data + end)


class TensorFileWriter:
    """Writes a safetensors file; its tensors come one by one, in the order announced.

    A context: leaving it flushes the file to disk.

    Args:
        path: the file, which must not exist.
        entries: name -> type and shape of every tensor that will come, in order.
        metadata: text for the header; transformers wants `{"format": "pt"}`.

    Attributes:
        checksums: of the bytes of each tensor written so far (`checksum`).
    """

    def __init__(
        self,
        path: Path,
        entries: Mapping[str, tuple[torch.dtype, Iterable[int]]],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.path = path
        self.checksums: dict[str, str] = {}
        self._expected = {name: (dtype, torch.Size(shape)) for name, (dtype, shape) in entries.items()}
        header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        position = 0
        for name, (dtype, shape) in self._expected.items():
            end = position + shape.numel() * dtype.itemsize
            header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [position, end]}
            position = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._file = path.open("xb", buffering=0)
        self._behind = WriteBehind(self._file.fileno())
        self._write(struct.pack("<Q", len(text)) + text)

    def __enter__(self) -> "TensorFileWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._naming_the_file(), self._file:
            if kind is None:
                missing = [name for name in self._expected if name not in self.checksums]
                assert not missing, f"{self.path}: {missing[0]} was announced and did not come"
                os.fsync(self._file.fileno())

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Append the next tensor, which is on the CPU."""
        expected = list(self._expected)[len(self.checksums)]
        assert name == expected, f"{self.path}: {expected} was to come, not {name}"
        assert (tensor.dtype, tensor.shape) == self._expected[name], f"{self.path}: {name} is not as announced"
        data = raw_bytes(tensor)
        self.checksums[name] = checksum(data)
        self._write(data)

    def _write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        with self._naming_the_file():
            while view:
                view = view[self._file.write(view) :]
            self._behind.wrote(len(data))

    @contextmanager
    def _naming_the_file(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            error.filename = error.filename or str(self.path)  # which a write does not know
            raise


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a CPU tensor in row-major order, without a copy where it is contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def checksum(data: bytes | memoryview) -> str:
    """XXH3 of 128 bits (github.com/Cyan4973/xxHash), as `xxhsum -H2` prints it."""
    return xxhash.xxh3_128_hexdigest(data)
