"""Export to a folder that `transformers` opens; a tensor at a time."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from neox.checkpoint.huggingface.detect import family_of
from neox.checkpoint.huggingface.family import Family
from neox.checkpoint.huggingface.files import INDEX, SINGLE
from neox.checkpoint.native.store import DTYPE_NAMES
from neox.checkpoint.storage.ahead import read_ahead
from neox.checkpoint.storage.memory import return_freed
from neox.checkpoint.storage.progress import progress_bar
from neox.checkpoint.storage.tensor_file import TensorFileWriter
from neox.checkpoint.storage.whole_folder import check_free, whole_folder
from neox.checkpoint.tokenizer_files import ExportedTokenizer
from neox.checkpoint.weight_map import weight_map
from neox.checkpoint.weights import WeightReader, weight_source
from neox.config import ModelConfig
from neox.model.build import in_dtype

SHARD_BYTES = 5 * 10**9
"""Largest file of weights, as transformers writes them."""

CARD = "README.md"


class HuggingFaceWriter:
    """Writes a folder that `transformers` opens, as the class that has the model's formula.

    Args:
        config: the model.
        dtype: type of the exported weights.
        architecture: the family, by a name in `detect.FAMILIES`; None for the first that can express the model.
        max_shard_bytes: bound on the size of a file, exceeded only by a single tensor larger than it.

    Attributes:
        family: the class of transformers.

    Raises:
        CheckpointError: no class, or not the one named, can express the model.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: torch.dtype,
        architecture: str | None = None,
        max_shard_bytes: int = SHARD_BYTES,
    ) -> None:
        self.family: Family = family_of(config, architecture)
        self._config = config
        self._dtype = dtype
        self._shapes = {name: tensor.shape for name, tensor in weight_map(config).items()}
        self._plan = plan_files(self._shapes, bytes_per_number=dtype.itemsize, max_shard_bytes=max_shard_bytes)

    def files(self) -> dict[str, int]:
        """Bytes of the tensors of each file of weights."""
        return {file: sum(self._bytes(name) for name in names) for file, names in self._plan.items()}

    def write(
        self, weights: WeightReader, out: Path, *, tokenizer: ExportedTokenizer | None = None, card: str | None = None
    ) -> None:
        """Write the folder, which appears under its name only when it is whole; each tensor is read once.

        Args:
            weights: the trained weights.
            out: the folder to make; it must not exist, or be empty.
            tokenizer: files and special tokens; None leaves them out.
            card: text of the model card.

        Raises:
            CheckpointError: the weights do not fit the model, or `out` has files in it.
        """
        check_free(out)
        with whole_folder(out) as folder:
            self._write_weights(weights, folder)
            tokens = tokenizer or ExportedTokenizer({}, {"bos_token_id": None, "eos_token_id": None})
            content = self.family.config_json(self._config, dtype=DTYPE_NAMES[self._dtype], tokens=tokens.token_ids)
            _write_json(folder / "config.json", content)
            _write_json(folder / "generation_config.json", generation_settings(tokens.token_ids, tokens.ends))
            for name, text in (tokens.files | ({} if card is None else {CARD: card})).items():
                (folder / name).write_text(text, encoding="utf-8")

    def _write_weights(self, weights: WeightReader, folder: Path) -> None:
        entries: dict[str, str] = {}
        read = weight_source(weights)
        names = progress_bar(self._shapes, {name: self._bytes(name) for name in self._shapes}, "writing")
        tensors = read_ahead((name, read(name, self._shapes[name])) for name in names)
        for file, ours in self._plan.items():
            announced: dict[str, torch.Tensor] = {}
            for name in ours:
                announced |= self._theirs(name, torch.empty(self._shapes[name], device="meta"))
            described = {name: (self._dtype, tensor.shape) for name, tensor in announced.items()}
            with TensorFileWriter(folder / file, described, metadata={"format": "pt"}) as writer:
                for name in ours:
                    found, whole = next(tensors)
                    assert found == name, "files follow the order of the map"
                    parts = self._theirs(name, whole)
                    del whole
                    while parts:  # a part is gone before the next is converted
                        theirs = next(iter(parts))
                        writer.write(theirs, in_dtype(theirs, parts.pop(theirs), self._dtype))
                    return_freed()
            entries |= dict.fromkeys(announced, file)
        next(tensors, None)  # ends the bar
        if len(self._plan) > 1:
            _write_json(folder / INDEX, {"metadata": {"total_size": sum(self.files().values())}, "weight_map": entries})

    def _theirs(self, name: str, ours: torch.Tensor) -> dict[str, torch.Tensor]:
        """Their tensors for one of ours, by their names."""
        theirs, layout = self.family.locate(name, self._config)
        return dict(zip(theirs, layout.split(ours), strict=True))

    def _bytes(self, name: str) -> int:
        return self._shapes[name].numel() * self._dtype.itemsize


def export_huggingface(
    weights: WeightReader,
    config: ModelConfig,
    out: Path,
    *,
    dtype: torch.dtype,
    architecture: str | None = None,
    tokenizer: ExportedTokenizer | None = None,
    card: str | None = None,
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a folder in one call; see HuggingFaceWriter."""
    writer = HuggingFaceWriter(config, dtype=dtype, architecture=architecture, max_shard_bytes=max_shard_bytes)
    writer.write(weights, out, tokenizer=tokenizer, card=card)


def generation_settings(tokens: Mapping[str, int | None], ends: Sequence[int] = ()) -> dict[str, Any]:
    """What `generate` of transformers does by default: the likeliest token, until one that ends the text.

    Args:
        tokens: special tokens by their keys.
        ends: every token that ends a text; where there are several, `eos_token_id` is the list of them.
    """
    named: dict[str, Any] = {key: number for key, number in tokens.items() if number is not None}
    return named | ({"eos_token_id": list(ends)} if len(ends) > 1 else {}) | {"do_sample": False}


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
        return {SINGLE: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": names for i, names in enumerate(groups, start=1)}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
