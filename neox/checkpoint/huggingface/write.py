"""Export to a folder that `transformers` opens; a file of weights at a time."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from neox.checkpoint.huggingface.detect import family_of
from neox.checkpoint.huggingface.family import Family
from neox.checkpoint.native import DTYPE_NAMES
from neox.checkpoint.tokenizer_files import ExportedTokenizer
from neox.checkpoint.weights import WeightReader, weight_source
from neox.config import ModelConfig
from neox.errors import CheckpointError
from neox.model.build import meta_decoder

SHARD_BYTES = 5 * 10**9
"""Largest file of weights, as transformers writes them."""

INDEX = "model.safetensors.index.json"


def export_huggingface(
    weights: WeightReader,
    config: ModelConfig,
    out: Path,
    *,
    dtype: torch.dtype,
    architecture: str | None = None,
    tokenizer: ExportedTokenizer | None = None,
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a folder that `transformers` opens, as the class that has the model's formula.

    The folder appears under its name only when it is whole. One file of weights is in memory at a time.

    Args:
        weights: the trained weights.
        config: the model they belong to.
        out: the folder to make; it must not exist, or be empty.
        dtype: type of the exported weights.
        architecture: the family, by a name in `detect.FAMILIES`; None for the first that can express the model.
        tokenizer: files and special tokens; None leaves them out.
        max_shard_bytes: bound on the size of a file, exceeded only by a single tensor larger than it.

    Raises:
        CheckpointError: no class, or not the one named, can express the model; the weights do not fit it; or `out`
            has files in it.
    """
    family = family_of(config, architecture)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out}: exists already; name a new folder, or remove it")
    temporary = out.with_name(f".{out.name}.incomplete")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        _write_weights(weights, config, family, temporary, dtype=dtype, max_shard_bytes=max_shard_bytes)
        tokens = dict(tokenizer.token_ids) if tokenizer else {"bos_token_id": None, "eos_token_id": None}
        content = family.config_json(config, dtype=DTYPE_NAMES[dtype], tokens=tokens)
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
    weights: WeightReader,
    config: ModelConfig,
    family: Family,
    folder: Path,
    *,
    dtype: torch.dtype,
    max_shard_bytes: int,
) -> None:
    shapes = {name: parameter.shape for name, parameter in meta_decoder(config).named_parameters()}
    files = plan_files(shapes, bytes_per_number=dtype.itemsize, max_shard_bytes=max_shard_bytes)
    entries: dict[str, str] = {}
    read = weight_source(weights)
    for file, names in files.items():
        tensors: dict[str, torch.Tensor] = {}
        for ours in names:
            theirs, layout = family.locate(ours, config)
            tensors |= zip(theirs, layout.split(read(ours, shapes[ours])), strict=True)
        save_file(
            {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()},
            folder / file,
            metadata={"format": "pt"},
        )
        entries |= dict.fromkeys(tensors, file)
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
