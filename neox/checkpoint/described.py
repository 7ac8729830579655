"""A checkpoint together with the configuration that belongs to it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from neox.checkpoint.architecture import Described, of_sections, resolved, saved_config
from neox.checkpoint.lora import MergedWeights, merged
from neox.checkpoint.native.manifest import Progress
from neox.checkpoint.native.store import NativeReader
from neox.checkpoint.open import open_checkpoint
from neox.checkpoint.upstream.reader import NO_HINTS, Hints, UpstreamReader
from neox.checkpoint.weight_map import weight_map
from neox.checkpoint.weights import WeightReader
from neox.config import Config, ModelConfig, load_config
from neox.errors import CheckpointError

SECTIONS = ("model", "tokenizer", "data")
"""What is taken from files that GPT-NeoX saved beside its weights: the rest of them is about a run that is over."""


def open_described(folder: Path, config_files: Sequence[str | Path] = ()) -> tuple[WeightReader, Config]:
    """Open a checkpoint of any format, LoRA's factors merged, and resolve its configuration.

    Args:
        folder: see `open_checkpoint`.
        config_files: configuration of the training run; absent: what the checkpoint says of itself.

    Returns:
        The weights, and the configuration with its vocabulary settled.

    Raises:
        CheckpointError: there is no checkpoint, or it does not say what it is.
        ConfigError: the configuration is wrong.
    """
    given = load_config(config_files) if config_files else None
    weights = merged(open_checkpoint(folder, hints=Hints.of(given.model) if given else NO_HINTS))
    if given is not None:
        config = given.with_vocabulary(weights.padded_vocab_size)
        _check_used(weights, config.model)
        return weights, config
    return weights, resolved(weights, _described(weights))


def _check_used(weights: WeightReader, model: ModelConfig) -> None:
    """See that a configuration leaves out no parameter: without it the model would compute something else."""
    names = weight_map(model)
    for name in weights.names():
        is_idle = model.gpt_j_tied and ".post_attention_layernorm." in name  # which GPT-NeoX keeps and does not use
        if name not in names and not is_idle:
            raise CheckpointError(
                f"{weights.folder}: holds {name}, which the model of the configuration does not have; "
                "use the configuration the checkpoint was trained with"
            )


def _described(reader: WeightReader) -> dict[str, Any]:
    """What a checkpoint holds of itself, without what was only about a run of GPT-NeoX's."""
    if isinstance(reader, UpstreamReader):
        return of_sections(saved_config(reader), SECTIONS)
    return described_keys(reader) if isinstance(reader, Described) else saved_config(reader)


def described_keys(reader: Described) -> dict[str, Any]:
    """Flat keys of a model in a format of its own, and of the tokenizer beside it."""
    folder = getattr(reader, "folder", None)
    return reader.config_keys() | (tokenizer_keys(folder) if folder is not None else {})


def tokenizer_keys(folder: Path) -> dict[str, str]:
    """Keys of the tokenizer that transformers saved beside a model; empty where there is none."""
    path = folder / "tokenizer.json"
    return {"tokenizer_type": "HFTokenizer", "vocab_file": str(path.resolve())} if path.is_file() else {}


def progress_of(reader: WeightReader) -> Progress:
    """How far the run of a checkpoint had come; at the start for formats that do not tell."""
    if isinstance(reader, MergedWeights):
        return progress_of(reader.reader)
    if isinstance(reader, NativeReader):
        return reader.manifest.progress
    return Progress(iteration=reader.iteration) if isinstance(reader, UpstreamReader) else Progress()
