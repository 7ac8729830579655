"""Import of a folder that `transformers` wrote; a tensor at a time."""

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from neox.checkpoint.huggingface.detect import family_that_wrote
from neox.checkpoint.huggingface.gpt_neox import HEADS
from neox.checkpoint.huggingface.write import INDEX
from neox.checkpoint.unpickle import load_torch_file
from neox.checkpoint.weights import missing_tensor
from neox.config import config_from_dict
from neox.errors import CheckpointError, ConfigError
from neox.model.build import meta_decoder


def is_huggingface(folder: Path) -> bool:
    """Whether a folder looks like a model of Hugging Face."""
    return (folder / "config.json").is_file()


class HuggingFaceReader:
    """Reads the folder of a model: safetensors or pickled weights, in one file or several.

    Attributes:
        folder: the folder with config.json.
        family: what config.json says it is.
        model_config: the model as this project describes it.

    Raises:
        CheckpointError: the folder holds another architecture, or its files are missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        content = _read_json(folder / "config.json")
        self.family = family_that_wrote(content, folder / "config.json")
        self._keys = self.family.flat_keys(content, folder / "config.json")
        try:
            config = config_from_dict(self._keys | {"train_micro_batch_size_per_gpu": 1}, world_size=1)
        except ConfigError as error:
            problems = "; ".join(str(error).splitlines())
            raise CheckpointError(f"{folder / 'config.json'}: no model can be built from it: {problems}") from None
        self.model_config = config.model
        self._shapes = {name: tuple(p.shape) for name, p in meta_decoder(self.model_config).named_parameters()}
        self._files: dict[Path, Any] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def names(self) -> list[str]:
        """Canonical names of all parameters, in the order of the layers."""
        return list(self._shapes)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each parameter as config.json gives it."""
        return dict(self._shapes)

    def config_keys(self) -> dict[str, Any]:
        """Flat YAML keys of the model."""
        return dict(self._keys)

    @property
    def padded_vocab_size(self) -> int:
        """Size of the softmax."""
        return int(self._keys["padded_vocab_size"])

    def tensor(self, name: str) -> torch.Tensor:
        """Read a parameter on the CPU, in the dtype of the file.

        Raises:
            CheckpointError: the folder has no such parameter, or its file is damaged.
        """
        if name not in self._shapes:
            raise missing_tensor(self.folder, name)
        theirs, layout = self.family.locate(name, self.model_config)
        return layout.join([self._find(wanted) for wanted in theirs])

    def _find(self, wanted: str) -> torch.Tensor:
        # Base models are saved without the prefix, and some writers use the name in memory of GPTNeoX's head.
        spellings = HEADS if wanted in HEADS else (wanted, wanted.removeprefix(self.family.prefix))
        for spelling in spellings:
            if spelling in self._locations:
                return self._read(self._locations[spelling], spelling)
        raise CheckpointError(f"{self.folder}: has no tensor {wanted}; copy the whole folder")

    @cached_property
    def _locations(self) -> dict[str, Path]:
        """File of each tensor of the folder."""
        for index in (INDEX, "pytorch_model.bin.index.json"):
            if (self.folder / index).is_file():
                entries = _read_json(self.folder / index)["weight_map"]
                return {name: self.folder / file for name, file in entries.items()}
        for name in ("model.safetensors", "pytorch_model.bin"):
            path = self.folder / name
            if path.is_file():
                return dict.fromkeys(self._open(path).keys(), path)
        raise CheckpointError(f"{self.folder}: has a config.json and no model.safetensors; copy the whole folder")

    def _open(self, path: Path) -> Any:
        if path not in self._files:
            if not path.is_file():
                raise CheckpointError(f"{path}: no such file; copy the whole folder")
            pickled = path.suffix != ".safetensors"
            try:
                self._files[path] = load_torch_file(path) if pickled else safe_open(path, framework="pt")
            except SafetensorError as error:
                raise CheckpointError(f"{path}: damaged ({error}); copy it again") from None
        return self._files[path]

    def _read(self, path: Path, name: str) -> torch.Tensor:
        file = self._open(path)
        if isinstance(file, dict):
            return file[name]
        try:
            return file.get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"{path}: damaged ({error}); copy it again") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; is this the folder of a Hugging Face model?") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}); copy it again") from None
    return dict(content)
