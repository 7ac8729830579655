"""Files of `torch.save`: what is in them at once, their tensors one at a time.

`torch.load` either reads a file whole or maps it, and what a process has touched of a map counts as its memory. Here
the objects are unpickled by a restricted unpickler (`storage/unpickle.py`), and in the place of each tensor stands
its description, which reads the bytes when asked.

Format (pytorch/torch/serialization.py): a zip archive without compression. `<name>/data.pkl` holds the objects, where a
tensor is a storage, an offset and strides, and `<name>/data/<key>` the bytes of a storage. Files of before torch 1.6
have another format, which torch itself reads, through the same unpickler.
"""

import io
import os
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import torch

from neox.checkpoint.storage.unpickle import ForbiddenNameError, RestrictedUnpickler, Unchangeable
from neox.downloads import failed_download
from neox.errors import CheckpointError

STORAGE_TYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}
"""How pickles spell the type of a storage."""

_ZIP_MAGIC = b"PK\x03\x04"
_LOCAL_HEADER = struct.Struct("<4s22xHH")
"""Of a zip record: its magic number, and at its end the sizes of the name and of the extra field that follow."""


class Record:
    """The bytes of one storage in a file.

    The checksum that the archive has of them is compared when they have been read to the end, in one piece or in
    several that follow one another.

    Args:
        path: the file.
        begin: position of the first byte.
        size: number of bytes.
        crc: the archive's CRC-32; 0 where none was written.
    """

    def __init__(self, path: Path, *, begin: int, size: int, crc: int) -> None:
        self.path = path
        self.size = size
        self._begin = begin
        self._crc = crc
        self._seen = 0
        self._sum = 0

    def whole(self) -> bytes:
        """Read all of it.

        Raises:
            ValueError: it is damaged; says how.
        """
        return self.read(0, self.size).numpy().tobytes()

    def read(self, start: int, size: int) -> torch.Tensor:
        """Read bytes, uint8.

        Raises:
            ValueError: they are damaged; says how.
        """
        flat = torch.empty(size, dtype=torch.uint8)
        view = flat.numpy().data
        with self.path.open("rb", buffering=0) as file:
            _fill(file, view, self._begin + start)
        if start == 0:
            self._seen = self._sum = 0
        if start == self._seen and self._crc:
            self._seen, self._sum = start + size, zlib.crc32(view, self._sum)
            if self._seen == self.size and self._sum != self._crc:
                raise ValueError("its bytes are not those that were written, by their checksum")
        return flat


@dataclass(frozen=True)
class _Storage(Unchangeable):
    """A storage as a pickle names it."""

    record: Record
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class LazyTensor(Unchangeable):
    """A tensor that is still on disk.

    Attributes:
        record: where its storage is.
        dtype: of its elements.
        shape: of the tensor.
        stride, offset: in the storage, in elements.
        owner: the file, which knows what the tensor is called.
    """

    record: Record
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    owner: "TorchFile"

    def numel(self) -> int:
        """Number of elements."""
        return self.shape.numel()

    def read(self) -> torch.Tensor:
        """Read it on the CPU; of a storage that others share, its own part only.

        Raises:
            CheckpointError: the file cannot be read, or is damaged.
        """
        if self.numel() == 0:
            return torch.empty(self.shape, dtype=self.dtype)
        span = 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        return self._elements(self.offset, span).as_strided(self.shape, self.stride).contiguous()

    def slice(self, start: int, count: int) -> torch.Tensor:
        """Read `count` elements from `start` on of a contiguous tensor, flat."""
        assert self.is_contiguous, "a slice of a tensor whose elements do not lie one after another"
        assert 0 <= start <= start + count <= self.numel(), "a slice beyond the end of a tensor"
        return self._elements(self.offset + start, count)

    @property
    def is_contiguous(self) -> bool:
        """Whether its elements lie one after another, in row-major order."""
        expected = 1
        for size, step in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and step != expected:
                return False
            expected *= size
        return True

    def _elements(self, start: int, count: int) -> torch.Tensor:
        width = self.dtype.itemsize
        try:
            return self.record.read(start * width, count * width).view(self.dtype)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            name = self.owner.name_of(self)
            raise CheckpointError(f"{self.owner.path}: {name} cannot be read, {reason}; copy the file again") from None


class TorchFile:
    """A file of `torch.save`, of which nothing but the description of its tensors is in memory.

    Args:
        path: the file.

    Attributes:
        path: as given.
        content: what was saved, with a LazyTensor in the place of each tensor; a file in the format of before torch
            1.6 is read whole and has the tensors themselves.

    Raises:
        CheckpointError: the file is missing or damaged, or asks for a function that is none of a checkpoint's.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file; copy the whole folder")
        try:
            self.content: Any = self._read_archive() if zipfile.is_zipfile(path) else _read_legacy(path)
        except ForbiddenNameError as error:
            raise CheckpointError(
                f"{path}: asks for {error}, which no checkpoint needs; not loaded, the file may be malicious"
            ) from None
        except CheckpointError:
            raise
        except Exception as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            found = failed_download(path) or f"not readable as a torch file ({reason}); copy it again"
            raise CheckpointError(f"{path}: {found}") from None

    def name_of(self, tensor: LazyTensor) -> str:
        """Where a tensor is in the content, `module.sequential.0.word_embeddings.weight` say."""
        return next((name for name, item in _leaves(self.content, ()) if item is tensor), "a tensor")

    def _read_archive(self) -> Any:
        with zipfile.ZipFile(self.path) as archive, self.path.open("rb", buffering=0) as file:
            records = {info.filename: info for info in archive.infolist()}
            description = next((name for name in records if name.endswith("/data.pkl")), None)
            folder = (description or "").rpartition("/")[0]
            if f"{folder}/constants.pkl" in records:
                raise CheckpointError(f"{self.path}: a TorchScript program, not a file of weights")
            if description is None:
                raise ValueError("it has no data.pkl")
            found = {name: _record(self.path, file, info) for name, info in records.items()}
        order = found.get(f"{folder}/byteorder")
        if order is not None and order.whole() != b"little":
            raise ValueError("its numbers are big-endian")
        prefix = f"{folder}/data/"
        storages = {name.removeprefix(prefix): record for name, record in found.items() if name.startswith(prefix)}
        return _LazyUnpickler(found[description].whole(), self, storages).load()


class _LazyUnpickler(RestrictedUnpickler):
    """Finds descriptions where the pickle has storages and tensors."""

    def __init__(self, pickled: bytes, owner: TorchFile, records: dict[str, Record]) -> None:
        super().__init__(io.BytesIO(pickled))
        self._records = records
        self._rebuild: dict[str, Callable[..., Any]] = {
            "_rebuild_tensor": lambda *arguments: _describe(owner, *arguments[:4]),
            "_rebuild_tensor_v2": lambda *arguments: _describe(owner, *arguments[:4]),
            "_rebuild_tensor_v3": lambda *arguments: _describe(owner, *arguments[:4], dtype=arguments[6]),
            "_rebuild_parameter": lambda data, *_: data,
            "_rebuild_parameter_with_state": lambda data, *_: data,
        }

    def find_listed(self, module_name: str, global_name: str) -> Any:
        """What stands for a name; see RestrictedUnpickler."""
        if module_name == "torch._utils" and global_name in self._rebuild:
            return self._rebuild[global_name]
        if module_name in ("torch", "torch.storage") and global_name in STORAGE_TYPES:
            return STORAGE_TYPES[global_name]
        return super().find_listed(module_name, global_name)

    def persistent_load(self, reference: Any) -> _Storage:
        """Return the storage that a pickle names."""
        kind, dtype, key, _, count = reference
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"it refers to a {kind}")
        record = self._records[key]
        if count * dtype.itemsize > record.size:
            raise pickle.UnpicklingError(f"storage {key} has {record.size} bytes, {count} elements were announced")
        return _Storage(record, dtype)


def _describe(
    owner: TorchFile, storage: _Storage, offset: int, shape: Any, stride: Any, *, dtype: torch.dtype | None = None
) -> LazyTensor:
    dtype = dtype or storage.dtype
    size, steps = torch.Size(shape), tuple(map(int, stride))
    last = offset + sum((length - 1) * step for length, step in zip(size, steps, strict=True))
    if min((offset, *size, *steps)) < 0 or (size.numel() and (last + 1) * dtype.itemsize > storage.record.size):
        raise pickle.UnpicklingError(f"a tensor of shape {list(size)} is larger than its storage")
    return LazyTensor(storage.record, dtype, size, steps, int(offset), owner)


def _record(path: Path, file: BinaryIO, info: zipfile.ZipInfo) -> Record:
    """Where the bytes of a record begin: after its own header, whose size is not the one in the directory."""
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError("it was compressed after torch.save")
    header = bytearray(_LOCAL_HEADER.size)
    _fill(file, memoryview(header), info.header_offset)
    magic, name, extra = _LOCAL_HEADER.unpack(header)
    if magic != _ZIP_MAGIC:
        raise ValueError(f"record {info.filename} is not where the directory says")
    begin = info.header_offset + len(header) + name + extra
    if begin + info.file_size > os.fstat(file.fileno()).st_size:
        raise ValueError("it ends too early")
    return Record(path, begin=begin, size=info.file_size, crc=info.CRC)


def _fill(file: BinaryIO, buffer: memoryview, offset: int) -> None:
    while buffer:
        count = os.preadv(file.fileno(), [buffer], offset)
        if count == 0:
            raise ValueError("it ends too early")
        buffer, offset = buffer[count:], offset + count


# What torch.load wants of a `pickle_module`.
_RESTRICTED_PICKLE = SimpleNamespace(
    __name__="restricted_pickle",
    Unpickler=RestrictedUnpickler,
    load=lambda file, **options: RestrictedUnpickler(file, **options).load(),
    UnpicklingError=pickle.UnpicklingError,
)


def _read_legacy(path: Path) -> Any:
    with path.open("rb") as file:
        if file.read(4) == _ZIP_MAGIC:
            raise ValueError("it ends too early")
    return torch.load(path, map_location="cpu", weights_only=False, pickle_module=_RESTRICTED_PICKLE)


def load_torch_file(path: Path) -> Any:
    """Read a file of `torch.save` whole, on the CPU.

    Raises:
        CheckpointError: see TorchFile.
    """
    return read_all(TorchFile(path).content)


def read_all(item: Any) -> Any:
    """Put tensors in the place of their descriptions, in dicts, lists and tuples."""
    if isinstance(item, LazyTensor):
        return item.read()
    if isinstance(item, OrderedDict):
        return OrderedDict((key, read_all(value)) for key, value in item.items())
    if isinstance(item, dict):
        return {key: read_all(value) for key, value in item.items()}
    if isinstance(item, list):
        return [read_all(value) for value in item]
    if type(item) is tuple:
        return tuple(read_all(value) for value in item)
    return item


def _leaves(item: Any, place: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    if isinstance(item, dict):
        for key, value in item.items():
            yield from _leaves(value, (*place, str(key)))
    elif isinstance(item, list | tuple):
        for index, value in enumerate(item):
            yield from _leaves(value, (*place, str(index)))
    else:
        yield ".".join(place) or "its tensor", item
