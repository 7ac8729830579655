"""The model of the checkpoint that `load` names, for the configuration to take its absent keys from."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from neox.checkpoint.architecture import model_config_of, saved_keys
from neox.checkpoint.described import tokenizer_keys
from neox.checkpoint.huggingface import HuggingFaceReader
from neox.checkpoint.native.fallback import checkpoint_to_load
from neox.checkpoint.native.manifest import MANIFEST
from neox.checkpoint.native.store import NativeReader
from neox.checkpoint.open import locate_checkpoint, open_checkpoint
from neox.checkpoint.upstream.reader import Hints, UpstreamReader
from neox.checkpoint.weights import WeightReader
from neox.config import LoadedModel

_ARGUMENTS = ("num_layers", "hidden_size", "num_attention_heads")
"""Sizes that GPT-NeoX saves beside the weights."""


def read_loaded_model(values: Mapping[str, Any]) -> LoadedModel | None:
    """Read the model that `load` (and `iteration`) of flat keys name, without reading a tensor.

    Returns:
        None where `load` is not set, or names a folder without a checkpoint, from which a run may start afresh.

    Raises:
        CheckpointError: the checkpoint cannot be read, or holds what no model can be built from; there is none and
            the sizes of the model are not given either.
    """
    load, iteration = values.get("load"), values.get("iteration")
    if not isinstance(load, str) or not (iteration is None or isinstance(iteration, int)):
        return None
    root = Path(load)
    fallback = values.get("load_fallback") is True
    folder = checkpoint_to_load(root, iteration, fallback=fallback) if root.is_dir() else None
    if folder is None and all(values.get(size) is not None for size in _ARGUMENTS):
        return None
    return _read(locate_checkpoint(folder or root), _hints(values))


def _read(folder: Path, hints: Hints) -> LoadedModel:
    reader = open_checkpoint(folder, hints=hints)
    if saved_keys(reader):
        return LoadedModel.whole(model_config_of(reader), str(_place(reader)), tokenizer_keys(reader.folder))
    return LoadedModel(_sizes(reader), str(reader.folder))


def _hints(values: Mapping[str, Any]) -> Hints:
    residual, heads = values.get("gpt_j_residual"), values.get("num_attention_heads")
    return Hints(residual if isinstance(residual, bool) else None, heads if isinstance(heads, int) else None)


def _sizes(reader: WeightReader) -> dict[str, Any]:
    """What is known of a model that has no description: the vocabulary, and what GPT-NeoX keeps in its state."""
    arguments = reader.arguments if isinstance(reader, UpstreamReader) else {}
    known = {name: arguments[name] for name in _ARGUMENTS if name in arguments}
    return known | {"padded_vocab_size": reader.padded_vocab_size}


def _place(reader: WeightReader) -> Path:
    if isinstance(reader, HuggingFaceReader):
        return reader.folder / "config.json"
    if isinstance(reader, NativeReader):
        return reader.folder / MANIFEST
    return reader.folder
