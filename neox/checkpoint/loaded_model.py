"""Reads the model of a checkpoint for the configuration; `neox.checkpoint.load` says when."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from neox.checkpoint.architecture import model_config_of, saved_keys
from neox.checkpoint.described import tokenizer_keys
from neox.checkpoint.huggingface import HuggingFaceReader
from neox.checkpoint.native.fallback import checkpoint_to_load
from neox.checkpoint.native.manifest import MANIFEST, Manifest, is_native
from neox.checkpoint.native.store import NativeReader
from neox.checkpoint.open import locate_checkpoint, open_checkpoint
from neox.checkpoint.upstream.reader import Hints, UpstreamReader
from neox.checkpoint.upstream.told import told_by_tensors
from neox.checkpoint.weights import WeightReader
from neox.config import LoadedModel, config_from_dict
from neox.errors import ConfigError

_REQUIRED = ("num_layers", "hidden_size", "num_attention_heads")
"""Sizes that no model is without."""


def read_model(values: Mapping[str, Any]) -> LoadedModel | None:
    """`neox.checkpoint.load.read_loaded_model` where `load` is set."""
    load, iteration = values["load"], values.get("iteration")
    if not (iteration is None or isinstance(iteration, int)):
        return None
    root = Path(load)
    # All checkpoints of a folder are of one model; whether a damaged one may be passed over is asked when it is loaded.
    folder = checkpoint_to_load(root, iteration, fallback=True) if root.is_dir() else None
    if folder is None and all(values.get(size) is not None for size in _REQUIRED):
        return None
    found = _read(locate_checkpoint(folder or root), _hints(values))
    return replace(found, batch=_batch_of(folder)) if folder is not None and _keeps_batch(values) else found


def _keeps_batch(values: Mapping[str, Any]) -> bool:
    """Whether the batch of the checkpoint is to stay: `neox.config.resolve_reliability` has the rule."""
    is_own = values.get("load") == values.get("save") and not values.get("finetune")
    return values.get("elastic") is True and is_own


def _batch_of(folder: Path) -> dict[str, int]:
    """Sizes of the batch that a native checkpoint was trained with, for the processes that it was trained by."""
    if not is_native(folder):
        return {}
    saved = Manifest.parse(folder)
    layout = saved.layout
    processes = layout.pipe_parallel_size * layout.data_parallel_size * layout.model_parallel_size
    try:
        batch = config_from_dict(saved.config, world_size=processes).batch
    except ConfigError:  # of a release with other rules
        return {}
    return {key: getattr(batch, key) for key in ("train_batch_size", "train_micro_batch_size_per_gpu")}


def _read(folder: Path, hints: Hints) -> LoadedModel:
    reader = open_checkpoint(folder, hints=hints)
    if saved_keys(reader):
        return LoadedModel.whole(model_config_of(reader), str(_place(reader)), tokenizer_keys(reader.folder))
    return LoadedModel(_sizes(reader), str(reader.folder))


def _hints(values: Mapping[str, Any]) -> Hints:
    residual, heads = values.get("gpt_j_residual"), values.get("num_attention_heads")
    return Hints(residual if isinstance(residual, bool) else None, heads if isinstance(heads, int) else None)


def _sizes(reader: WeightReader) -> dict[str, Any]:
    """What is known of a model that has no description: the vocabulary, and what GPT-NeoX's tensors tell."""
    told = told_by_tensors(reader) if isinstance(reader, UpstreamReader) else {}
    return told | {"padded_vocab_size": reader.padded_vocab_size}


def _place(reader: WeightReader) -> Path:
    if isinstance(reader, HuggingFaceReader):
        return reader.folder / "config.json"
    if isinstance(reader, NativeReader):
        return reader.folder / MANIFEST
    return reader.folder
