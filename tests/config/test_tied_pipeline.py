"""Combinations in which DeepSpeed lets the two ends of a tied pipeline drift apart are refused."""

from typing import Any

import pytest

from neox.config import config_from_dict
from neox.errors import ConfigError

PIPELINE = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "seq_length": 32,
    "max_position_embeddings": 32,
    "train_batch_size": 8,
    "pipe_parallel_size": 2,
    "gradient_accumulation_steps": 2,
    "no_weight_tying": False,
}


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        (
            {"precision": "bfloat16", "zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}},
            "offload_optimizer",
        ),
        ({"precision": "fp16", "data_types": {"grad_accum_dtype": "fp32"}}, "grad_accum_dtype"),
        ({"precision": "bfloat16", "data_types": {"grad_accum_dtype": "bf16"}}, "grad_accum_dtype"),
    ],
)
def test_refused_only_where_it_breaks(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        config_from_dict(PIPELINE | changes, world_size=2)
    config_from_dict(PIPELINE | changes | {"no_weight_tying": True}, world_size=2)
    config_from_dict(PIPELINE | changes | {"pipe_parallel_size": 1}, world_size=2)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bfloat16"])
def test_the_plain_ones_are_fine(precision: str) -> None:
    config_from_dict(PIPELINE | {"precision": precision}, world_size=2)
