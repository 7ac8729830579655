"""The table of splits: what a rank takes, and how the parts become the whole again."""

import pytest
import torch

from neox.config import ModelConfig, config_from_dict
from neox.parallel.splits import join_shards, row_groups, split_dimension, take_shard

BASE = {
    "num_layers": 2,
    "hidden_size": 48,
    "num_attention_heads": 8,
    "seq_length": 8,
    "train_micro_batch_size_per_gpu": 1,
}
SHAPES = {
    "layers.0.word_embeddings.weight": (131, 8),
    "layers.0.position_embeddings.weight": (8, 48),
    "layers.2.attention.query_key_value.weight": (96, 48),
    "layers.2.attention.query_key_value.bias": (96,),
    "layers.2.attention.query_key_value.lora_A": (4, 48),
    "layers.2.attention.query_key_value.lora_B": (96, 4),
    "layers.2.attention.qk_layernorm.scale": (8, 6),
    "layers.2.attention.qk_layernorm.g": (1,),
    "layers.2.attention.dense.weight": (48, 48),
    "layers.2.attention.dense.bias": (48,),
    "layers.2.attention.dense.lora_A": (4, 48),
    "layers.2.attention.dense.lora_B": (48, 4),
    "layers.2.mlp.linear1.weight": (72, 48),
    "layers.2.mlp.linear1.bias": (72,),
    "layers.2.mlp.linear2.weight": (48, 36),
    "layers.2.input_layernorm.weight": (48,),
    "layers.6.final_linear.weight": (131, 8),
}


def model(**changes: object) -> ModelConfig:
    return config_from_dict(BASE | changes, world_size=None).model


GROUPED = model(num_kv_heads=4, activation="swiglu", intermediate_size=108)
WHOLE_ON_EVERY_RANK = {
    "layers.0.position_embeddings.weight",
    "layers.2.attention.query_key_value.lora_A",
    "layers.2.attention.qk_layernorm.g",
    "layers.2.attention.dense.bias",
    "layers.2.attention.dense.lora_B",
    "layers.2.input_layernorm.weight",
}


@pytest.mark.parametrize("config", [model(), GROUPED], ids=["plain", "grouped"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_shards_join_to_the_whole(config: ModelConfig, size: int) -> None:
    for name, shape in SHAPES.items():
        whole, groups = torch.randn(*shape), row_groups(name, config)
        shards = [take_shard(name, whole, rank=r, size=size, groups=groups) for r in range(size)]
        assert torch.equal(join_shards(name, shards, shape=whole.shape, groups=groups), whole)
        assert (split_dimension(name) is None) == (name in WHOLE_ON_EVERY_RANK)
        if name in WHOLE_ON_EVERY_RANK or size == 1:
            assert all(shard is whole for shard in shards)
        else:
            assert sum(shard.numel() for shard in shards) >= whole.numel() > shards[0].numel()


def test_a_rank_takes_its_share_of_every_group() -> None:
    # 8 heads of queries, 4 of keys, 4 of values, of 6 rows each; a row is marked by its number.
    name, rows = "layers.2.attention.query_key_value.bias", torch.arange(96)
    groups = row_groups(name, GROUPED)
    assert take_shard(name, rows, rank=1, size=2, groups=groups).tolist() == [
        *range(24, 48),
        *range(60, 72),
        *range(84, 96),
    ]
    name, rows = "layers.2.mlp.linear1.bias", torch.arange(72)
    share = take_shard(name, rows, rank=1, size=4, groups=row_groups(name, GROUPED))
    assert share.tolist() == [*range(9, 18), *range(45, 54)]


def test_heads_of_odd_size() -> None:
    config = model(hidden_size=40, num_kv_heads=2, activation="geglu", intermediate_size=66)
    for name, rows in (("attention.query_key_value.bias", 60), ("mlp.linear1.bias", 44)):
        whole, groups = torch.arange(rows), row_groups(name, config)
        shards = [take_shard(name, whole, rank=r, size=2, groups=groups) for r in (0, 1)]
        assert torch.equal(join_shards(name, shards, shape=whole.shape, groups=groups), whole)
        assert not torch.equal(torch.cat(shards), whole)


def test_what_does_not_divide_is_an_error() -> None:
    with pytest.raises(ValueError, match="does not divide by 2"):
        take_shard("layers.2.mlp.linear1.bias", torch.zeros(63), rank=0, size=2, groups=(1,))
    with pytest.raises(ValueError, match="does not divide by 4"):
        # The whole divides, but not each half.
        take_shard("layers.2.mlp.linear1.bias", torch.zeros(12), rank=0, size=4, groups=(1, 1))
    with pytest.raises(ValueError, match="no multiple of its groups"):
        take_shard("layers.2.mlp.linear1.bias", torch.zeros(63), rank=0, size=2, groups=(1, 1))


def test_parts_that_alternate_by_head_are_one_group() -> None:
    assert row_groups("layers.2.attention.query_key_value.weight", model()) == (1,)
    assert row_groups("layers.2.attention.query_key_value.weight", GROUPED) == (2, 1, 1)
    assert row_groups("layers.2.attention.query_key_value.weight", model(num_kv_heads=1)) == (8, 1, 1)
    assert row_groups("layers.2.mlp.linear1.weight", model()) == (1,)
    assert row_groups("layers.2.mlp.linear1.lora_B", GROUPED) == (1, 1)
    assert row_groups("layers.2.mlp.linear2.weight", GROUPED) == (1,)
