"""Export to and import from Hugging Face's format, for GPTNeoX; a tensor at a time."""

import json
import shutil
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from neox.checkpoint.huggingface_config import (
    PREFIX,
    check_expressible,
    flat_keys,
    huggingface_config,
    huggingface_name,
)
from neox.checkpoint.native import DTYPE_NAMES
from neox.checkpoint.tokenizer_files import ExportedTokenizer
from neox.checkpoint.unpickle import load_torch_file
from neox.checkpoint.weights import WeightReader, check_shape, missing_tensor
from neox.config import ModelConfig, config_from_dict
from neox.errors import CheckpointError
from neox.model.build import meta_decoder

SHARD_BYTES = 5 * 10**9
"""Largest file of weights, as transformers writes them."""

HEADS = ("embed_out.weight", "lm_head.weight")
INDEX = "model.safetensors.index.json"


def export_huggingface(
    weights: WeightReader,
    config: ModelConfig,
    out: Path,
    *,
    dtype: torch.dtype,
    tokenizer: ExportedTokenizer | None = None,
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a folder that `transformers` opens as GPTNeoXForCausalLM.

    The folder appears under its name only when it is whole. One file of weights is in memory at a time.

    Args:
        weights: the trained weights.
        config: the model they belong to.
        out: the folder to make; it must not exist, or be empty.
        dtype: type of the exported weights.
        tokenizer: files and special tokens; None leaves them out.
        max_shard_bytes: bound on the size of a file, exceeded only by a single tensor larger than it.

    Raises:
        CheckpointError: GPTNeoX cannot express the model, the weights do not fit it, or `out` has files in it.
    """
    check_expressible(config)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out}: exists already; name a new folder, or remove it")
    temporary = out.with_name(f".{out.name}.incomplete")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        _write_weights(weights, config, temporary, dtype=dtype, max_shard_bytes=max_shard_bytes)
        tokens = dict(tokenizer.token_ids) if tokenizer else {"bos_token_id": None, "eos_token_id": None}
        content = huggingface_config(config, dtype=DTYPE_NAMES[dtype], tokens=tokens)
        _write_json(temporary / "config.json", content)
        _write_json(temporary / "generation_config.json", {"_from_model_config": True, **tokens})
        for name, text in (tokenizer.files if tokenizer else {}).items():
            (temporary / name).write_text(text, encoding="utf-8")
        for file in temporary.iterdir():
            file.chmod(0o644)  # safetensors makes files that nobody else on a cluster could read
        if out.exists():
            out.rmdir()
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_weights(
    weights: WeightReader, config: ModelConfig, folder: Path, *, dtype: torch.dtype, max_shard_bytes: int
) -> None:
    shapes = {name: parameter.shape for name, parameter in meta_decoder(config).named_parameters()}
    files = plan_files(shapes, bytes_per_number=dtype.itemsize, max_shard_bytes=max_shard_bytes)
    entries: dict[str, str] = {}
    for file, names in files.items():
        renamed = {huggingface_name(name, num_layers=config.num_layers): name for name in names}
        tensors = {theirs: weights.weight(ours, shapes[ours]) for theirs, ours in renamed.items()}
        save_file(
            {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()},
            folder / file,
            metadata={"format": "pt"},
        )
        entries |= dict.fromkeys(renamed, file)
    if len(files) > 1:
        total = sum(shape.numel() for shape in shapes.values()) * dtype.itemsize
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": entries})


def plan_files(
    shapes: Mapping[str, torch.Size], *, bytes_per_number: int, max_shard_bytes: int
) -> dict[str, list[str]]:
    """Deal tensors in order to files of at most `max_shard_bytes`; name of the file -> names of its tensors."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        size = shape.numel() * bytes_per_number
        if groups[-1] and filled + size > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": names for i, names in enumerate(groups, start=1)}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def is_huggingface(folder: Path) -> bool:
    """Whether a folder looks like a model of Hugging Face."""
    return (folder / "config.json").is_file()


class HuggingFaceReader:
    """Reads a GPTNeoX folder: safetensors or pickled weights, in one file or several.

    Attributes:
        folder: the folder with config.json.
        model_config: the model as this project describes it.

    Raises:
        CheckpointError: the folder holds another architecture, or its files are missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._keys = flat_keys(_read_json(folder / "config.json"), folder / "config.json")
        self.model_config = config_from_dict(self._keys | {"train_micro_batch_size_per_gpu": 1}, world_size=1).model
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
        wanted = huggingface_name(name, num_layers=self.model_config.num_layers)
        # Base models are saved without the prefix, and some writers use the head's name in memory.
        spellings = HEADS if wanted in HEADS else (wanted, wanted.removeprefix(PREFIX))
        for spelling in spellings:
            if spelling in self._locations:
                return self._read(self._locations[spelling], spelling)
        raise CheckpointError(f"{self.folder}: has no tensor {wanted}; copy the whole folder")

    def weight(self, name: str, shape: torch.Size) -> torch.Tensor:
        """Read a parameter, checked against the shape a model wants; a `WeightSource`.

        Raises:
            CheckpointError: it is missing, or naming both shapes where they differ.
        """
        tensor = self.tensor(name)
        check_shape(self.folder, name, tensor.shape, shape)
        return tensor

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
