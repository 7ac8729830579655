"""How many parameters a configuration has, counted on the model itself, without memory for it."""

from dataclasses import dataclass

from neox.config import ModelConfig
from neox.model.build import meta_decoder
from neox.model.layers import canonical_parameters
from neox.parallel.splits import is_expert


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters; a tied head is counted once, in the embedding.

    Attributes:
        total: all.
        non_embedding: without the embedding of tokens and positions and without the output head.
        per_layer: of each layer, by its number in checkpoints.
        active: all but those of the experts that a token does not go to.
    """

    total: int
    non_embedding: int
    per_layer: dict[int, int]
    active: int


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Count exactly, on the meta device; `padded_vocab_size` must be resolved."""
    per_layer: dict[int, int] = {}
    non_embedding = of_experts = 0
    for name, parameter in canonical_parameters(meta_decoder(config)).items():
        _, index, module = name.split(".", 2)
        per_layer[int(index)] = per_layer.get(int(index), 0) + parameter.numel()
        if not module.startswith(("word_embeddings", "position_embeddings", "final_linear")):
            non_embedding += parameter.numel()
        if is_expert(name):
            of_experts += parameter.numel()
    total = sum(per_layer.values())
    idle = of_experts // config.moe_num_experts * (config.moe_num_experts - config.moe_top_k)
    return ParameterCount(total, non_embedding, per_layer, total - idle)
