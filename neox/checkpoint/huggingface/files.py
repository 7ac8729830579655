"""Files of a folder that `transformers` opens: weights in safetensors or pickled, whole or in parts, and JSON."""

import json
from pathlib import Path
from typing import Any, Protocol

import torch

from neox.checkpoint.storage.tensor_file import TensorFile
from neox.checkpoint.storage.torch_file import LazyTensor, TorchFile
from neox.downloads import failed_download
from neox.errors import CheckpointError
from neox.files import is_inside

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


def weights_in(folder: Path) -> list[str]:
    """The files, or indexes of files, of weights in a folder, in the order in which transformers looks for them."""
    return [name for name in (SINGLE, INDEX, BIN, BIN_INDEX) if (folder / name).is_file()]


class WeightFile(Protocol):
    """A file of tensors by name, each read when asked for."""

    path: Path

    def names(self) -> list[str]:
        """Names of the tensors."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        ...

    def tensor(self, name: str) -> torch.Tensor:
        """Read a tensor on the CPU."""
        ...


class _Safetensors:
    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = TensorFile(path)

    def names(self) -> list[str]:
        return self._file.names()

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._file:
            raise _missing(self.path, name)
        return self._file.entries[name].shape

    def tensor(self, name: str) -> torch.Tensor:
        return self._file.tensor(name)


class _Pickled:
    def __init__(self, path: Path) -> None:
        self.path = path
        content = TorchFile(path).content
        if not isinstance(content, dict):
            raise CheckpointError(f"{path}: holds no tensors by name; copy the whole folder")
        self._tensors: dict[str, LazyTensor | torch.Tensor] = content

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._find(name).shape)

    def tensor(self, name: str) -> torch.Tensor:
        found = self._find(name)
        return found.read() if isinstance(found, LazyTensor) else found

    def _find(self, name: str) -> LazyTensor | torch.Tensor:
        if name not in self._tensors:
            raise _missing(self.path, name)
        return self._tensors[name]


def _missing(path: Path, name: str) -> CheckpointError:
    return CheckpointError(f"{path}: has no tensor {name}; copy it again")


def open_weights(path: Path) -> WeightFile:
    """Open a file of weights in either format, by its name.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; copy the whole folder")
    return _Safetensors(path) if path.suffix == ".safetensors" else _Pickled(path)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        CheckpointError: it is missing, or something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; is this the folder of a Hugging Face model?") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); copy it again") from None
    except (ValueError, RecursionError) as error:
        found = failed_download(path) or f"not valid JSON ({error}); copy it again"
        raise CheckpointError(f"{path}: {found}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds no JSON object; copy it again")
    return content


def read_index(path: Path) -> dict[str, str]:
    """Read which file of a folder each tensor is in.

    Raises:
        CheckpointError: it is missing, no such list, or leads out of the folder.
    """
    entries = read_json(path).get("weight_map")
    if not isinstance(entries, dict):
        raise CheckpointError(f"{path}: has no weight_map; copy it again")
    for name, file in entries.items():
        if not isinstance(file, str) or not is_inside(file):
            raise CheckpointError(f"{path}: {name} is in {file!r}, which is no file of the folder; copy it again")
    return entries
