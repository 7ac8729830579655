"""How many parameters a configuration has, counted on the model itself, without memory for it."""

from dataclasses import dataclass

from neox.config import ModelConfig
from neox.model.build import meta_decoder
from neox.model.layers import EMBEDDING_INDEX, canonical_parameters


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters; a tied head is counted once, in the embedding.

    Attributes:
        total: all.
        non_embedding: without the embedding of tokens and positions and without the output head.
        per_layer: of each layer, by its number in checkpoints.
    """

    total: int
    non_embedding: int
    per_layer: dict[int, int]


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Count exactly, on the meta device; `padded_vocab_size` must be resolved."""
    per_layer: dict[int, int] = {}
    for name, parameter in canonical_parameters(meta_decoder(config)).items():
        index = int(name.split(".")[1])
        per_layer[index] = per_layer.get(index, 0) + parameter.numel()
    total = sum(per_layer.values())
    head = per_layer.get(config.num_layers + 4, 0)
    return ParameterCount(total, total - per_layer[EMBEDDING_INDEX] - head, per_layer)
