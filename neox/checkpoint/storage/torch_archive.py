"""Writing `torch.save` files one tensor at a time.

`torch.save` wants every tensor of a file in memory, and the sequential layout of GPT-NeoX has a whole rank in one
file. Here the file begins with the description of all tensors, and their numbers are appended as they come.

Format (torch/serialization.py): a zip archive of uncompressed records, `data.pkl` the pickled objects, in which a
tensor names its storage, and `data/<key>` the bytes of each storage.
"""

import errno
import io
import os
import pickle
import shutil
import sys
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from neox.files import WriteBehind, flush

STORAGES = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.int64: torch.LongStorage,
    torch.uint8: torch.ByteStorage,
}
"""The classes by which a pickle spells the type of a storage."""

PROTOCOL = 2
"""Of the pickle, as `torch.save` has it."""


@dataclass(frozen=True)
class _Storage:
    """Stands in a pickle for the numbers of a tensor."""

    key: str
    dtype: torch.dtype
    count: int


class _Pickler(pickle.Pickler):
    """Pickles tensors as `torch.save` does, collecting them by the key of their storage."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=PROTOCOL)
        self.tensors: dict[str, torch.Tensor] = {}

    def reducer_override(self, obj: Any) -> Any:
        """Say how a tensor is made from its storage; everything else as usual."""
        if not isinstance(obj, torch.Tensor):
            return NotImplemented
        key = str(len(self.tensors))
        self.tensors[key] = obj
        storage = _Storage(key, obj.dtype, obj.numel())
        stride = torch.empty(obj.shape, device="meta").stride()
        return torch._utils._rebuild_tensor_v2, (storage, 0, tuple(obj.shape), stride, False, OrderedDict())

    def persistent_id(self, obj: Any) -> Any:
        """Name a storage."""
        if isinstance(obj, _Storage):
            return ("storage", STORAGES[obj.dtype], obj.key, "cpu", obj.count)
        return None


class TorchFileWriter:
    """Writes a file that `torch.load` reads, also with `weights_only=True`; its large tensors come one by one.

    A context: leaving it completes the file and flushes it to disk.

    Args:
        path: the file.
        content: what it holds. A tensor on the meta device is written later, by `write`; any other one at once.
    """

    def __init__(self, path: Path, content: object) -> None:
        self.path = path
        pickled = io.BytesIO()
        pickler = _Pickler(pickled)
        pickler.dump(content)
        with self._naming_the_cause():
            self._archive = torch._C.PyTorchFileWriter(str(path))
            for name, record in (("data.pkl", pickled.getvalue()), ("byteorder", sys.byteorder.encode())):
                self._archive.write_record(name, record, len(record))
        self._descriptor = os.open(path, os.O_RDONLY)
        self._behind = WriteBehind(self._descriptor)
        self._expected = {key: tensor for key, tensor in pickler.tensors.items() if tensor.is_meta}
        for key, tensor in pickler.tensors.items():
            if not tensor.is_meta:
                self._append(key, tensor)

    def __enter__(self) -> "TorchFileWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with self._naming_the_cause() if kind is None else suppress(RuntimeError):
                self._archive.write_end_of_file()
        finally:
            os.close(self._descriptor)
        if kind is None:
            assert not self._expected, f"{self.path}: {len(self._expected)} tensors were announced and did not come"
            flush(self.path)

    def write(self, tensor: torch.Tensor) -> None:
        """Append the next of the tensors that were on the meta device, in the order of the content."""
        key = next(iter(self._expected))
        announced = self._expected.pop(key)
        found, wanted = (tensor.dtype, tensor.shape), (announced.dtype, announced.shape)
        assert found == wanted, f"{self.path}: {found} came, {wanted} was announced"
        self._append(key, tensor)

    def write_all(self, tensors: Iterable[torch.Tensor]) -> None:
        """Append the next ones."""
        for tensor in tensors:
            self.write(tensor)

    def _append(self, key: str, tensor: torch.Tensor) -> None:
        numbers = tensor.detach().contiguous()
        if numbers.storage_offset():
            numbers = numbers.clone()  # a record is the beginning of a storage
        storage: Any = numbers.untyped_storage()
        with self._naming_the_cause(numbers.nbytes):
            self._archive.write_record(f"data/{key}", storage, numbers.nbytes)
        self._behind.wrote(numbers.nbytes)

    @contextmanager
    def _naming_the_cause(self, count: int = 2**20) -> Iterator[None]:
        """Make an error of the system of torch's, which says that bytes cannot be written, and not why."""
        try:
            yield
        except RuntimeError as error:
            code = errno.ENOSPC if shutil.disk_usage(self.path.parent).free < count else errno.EIO
            raise OSError(code, os.strerror(code), str(self.path)) from error
