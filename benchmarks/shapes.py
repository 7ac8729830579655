"""The models that are timed, as configurations."""

from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from neox.config import Config, config_from_dict
from neox.errors import ConfigError


@dataclass(frozen=True)
class Shape:
    """A GPT-NeoX decoder with parallel residual, rotary positions on a quarter of each head, and an untied head.

    Attributes:
        name: as it is called in tables.
        layers, hidden, heads, vocabulary: sizes; the feed-forward width is 4 x hidden.
    """

    name: str
    layers: int
    hidden: int
    heads: int
    vocabulary: int = 50304

    def config(
        self, *, sequence: int, micro_batch: int = 1, precision: str = "fp32", zero_stage: int = 0, **keys: Any
    ) -> Config:
        """The run that trains this model in one process.

        Args:
            sequence: tokens of a sequence.
            micro_batch: sequences of a step; the engine takes batches of other sizes too.
            precision: `fp32` or `bfloat16`.
            zero_stage: ZeRO stage.
            keys: any other keys of a configuration.
        """
        flat: dict[str, Any] = {
            "num_layers": self.layers,
            "hidden_size": self.hidden,
            "num_attention_heads": self.heads,
            "padded_vocab_size": self.vocabulary,
            "seq_length": sequence,
            "max_position_embeddings": sequence,
            "pos_emb": "rotary",
            "rotary_pct": 0.25,
            "gpt_j_residual": True,
            "no_weight_tying": True,
            "precision": precision,
            "zero_optimization": {"stage": zero_stage},
            "train_micro_batch_size_per_gpu": micro_batch,
            "train_iters": 1000,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-8}},
            "weight_decay": 0.1,
            "gradient_clipping": 1.0,
        }
        return config_from_dict(flat | keys, world_size=1)


PYTHIA = MappingProxyType(
    {
        shape.name: shape
        for shape in (
            Shape("14M", layers=6, hidden=128, heads=4),
            Shape("70M", layers=6, hidden=512, heads=8),
            Shape("160M", layers=12, hidden=768, heads=12),
            Shape("410M", layers=24, hidden=1024, heads=16),
            Shape("1.4B", layers=24, hidden=2048, heads=16),
            Shape("6.9B", layers=32, hidden=4096, heads=32, vocabulary=50432),
        )
    }
)
"""The Pythia suite (Biderman et al. 2023, table 1), by name."""

NEOX_20B = Shape("20B", layers=44, hidden=6144, heads=64, vocabulary=50432)
"""GPT-NeoX-20B (Black et al. 2022, section 2.1)."""


def shapes_named(names: list[str]) -> list[Shape]:
    """The Pythia shapes of these names.

    Raises:
        ConfigError: there is none of that name.
    """
    for name in names:
        if name not in PYTHIA:
            raise ConfigError(f"--models {name}: no such shape; choose from {', '.join(PYTHIA)}")
    return [PYTHIA[name] for name in names]
