"""What model a checkpoint holds, as it says itself: the flat keys of the architecture, from every format."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from neox.checkpoint.lora import MergedWeights
from neox.checkpoint.native.store import NativeReader
from neox.checkpoint.weights import WeightReader
from neox.config import Config, ModelConfig, config_from_dict
from neox.config.model import OTHER_KEYS
from neox.config.schema import places
from neox.config.yaml_files import normalise_key
from neox.errors import CheckpointError, ConfigError

TYPE_SECTIONS = ("fp16", "bf16")
"""Keys of the engine from which `precision` follows where it is not set."""


@runtime_checkable
class Described(Protocol):
    """A reader of a format that holds the architecture in a form of its own."""

    def config_keys(self) -> dict[str, Any]:
        """Flat YAML keys of the model."""
        ...


def model_config_of(reader: WeightReader) -> ModelConfig:
    """Resolve the model that a checkpoint says it holds.

    Raises:
        CheckpointError: it says nothing, or what no model can be built from.
    """
    return resolved(reader, saved_keys(reader)).model


def resolved(reader: WeightReader, keys: Mapping[str, Any]) -> Config:
    """Resolve what a checkpoint says of itself, with the sizes that its tensors tell.

    Args:
        reader: the checkpoint.
        keys: flat keys that it holds.

    Raises:
        CheckpointError: there are none, or what no model can be built from.
    """
    if not keys:
        raise CheckpointError(
            f"{reader.folder}: holds no configuration of its model; give the one of the training run (--config_file)"
        )
    counted = {"num_layers": blocks_of(reader), "train_micro_batch_size_per_gpu": 1}
    try:
        found = config_from_dict({**counted, **keys, "padded_vocab_size": reader.padded_vocab_size}, world_size=None)
    except ConfigError as error:
        problems = "; ".join(str(error).splitlines())
        raise CheckpointError(f"{reader.folder}: no model can be built from its configuration: {problems}") from None
    heads = [name for name in reader.names() if name.endswith(".final_linear.weight")]
    if heads and not found.model.no_weight_tying:
        raise CheckpointError(
            f"{reader.folder}: holds {heads[0]}, and its configuration ties the head to the embedding; "
            "set no_weight_tying to true there if the head is the model's"
        )
    return found


def saved_keys(reader: WeightReader) -> dict[str, Any]:
    """Flat keys of the model as a checkpoint describes itself; empty where it does not."""
    return of_sections(saved_config(reader), ("model",))


def saved_config(reader: WeightReader) -> dict[str, Any]:
    """All flat keys that a checkpoint holds of its run; empty where it holds none."""
    if isinstance(reader, MergedWeights):
        return saved_config(reader.reader) | {"lora": None}
    if isinstance(reader, NativeReader):
        return dict(reader.manifest.config)
    return reader.config_keys() if isinstance(reader, Described) else {}


def of_sections(flat: dict[str, Any], sections: Sequence[str]) -> dict[str, Any]:
    """The keys of some sections, and those of a model that cannot be honoured, to be refused by name."""
    known = {place.key for section in sections for place in places(section)}
    known |= {key.name for key in OTHER_KEYS} | set(TYPE_SECTIONS)
    return {key: value for key, value in flat.items() if normalise_key(key) in known}


def blocks_of(reader: WeightReader) -> int:
    """Number of transformer blocks, by the names of the tensors; some runs of GPT-NeoX did not save it."""
    return sum(name.endswith("attention.dense.weight") for name in reader.names())
