"""Keys of experts: what follows from the router, what does not fit, what a checkpoint says of them."""

from typing import Any

import pytest

from neox.config import LoadedModel, config_from_dict
from neox.errors import ConfigError

FLAT = {
    "num_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "seq_length": 16,
    "padded_vocab_size": 64,
    "train_micro_batch_size_per_gpu": 1,
}
TOPK = {"moe_num_experts": 8, "moe_top_k": 2, "moe_router_type": "topk"}


def test_what_is_absent_follows_from_the_router() -> None:
    model = config_from_dict(FLAT | TOPK).model
    assert (model.moe_normalize_weights, model.moe_aux_loss_coeff) == (True, 0.001)
    assert model.expert_layers == (0, 1, 2, 3)
    assert not config_from_dict(FLAT | TOPK | {"moe_normalize_weights": False}).model.moe_normalize_weights
    assert not config_from_dict(FLAT | TOPK | {"moe_top_k": 1}).model.moe_normalize_weights
    sinkhorn = config_from_dict(FLAT | {"moe_num_experts": 8, "moe_expert_interval": 3}).model
    assert (sinkhorn.moe_router_type, sinkhorn.moe_aux_loss_coeff) == ("sinkhorn", 0.0)
    assert sinkhorn.expert_layers == (0, 3)
    assert config_from_dict(FLAT).model.expert_layers == ()


def test_a_configuration_says_the_same_when_it_is_read_again() -> None:
    for keys in (TOPK, TOPK | {"moe_top_k": 1}, {"moe_num_experts": 8}, {}):
        config = config_from_dict(FLAT | keys)
        again = config_from_dict(config.to_flat())
        assert (again.model, again.notices) == (config.model, config.notices)


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        (TOPK | {"moe_top_k": 9}, "moe_top_k: 9 of 8 experts (moe_num_experts); lower it"),
        (
            {"moe_num_experts": 8, "moe_top_k": 2},
            "moe_top_k: 2 with moe_router_type sinkhorn, which gives a token one; set moe_router_type: topk",
        ),
        (
            {"moe_num_experts": 8, "moe_jitter_eps": 0.1},
            "moe_jitter_eps: 0.1 has no meaning with moe_router_type sinkhorn; set moe_router_type: topk, or remove "
            "the key",
        ),
        (TOPK | {"moe_router_type": "hash"}, "moe_router_type: 'hash' is unknown; supported: 'sinkhorn' or 'topk'"),
        (
            TOPK | {"lora": {"rank": 2, "targets": ["attention", "linear1"]}},
            "lora.targets: mlp.linear1 cannot be adapted in a model with experts; set targets: [attention]",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(keys: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as error:
        config_from_dict(FLAT | keys)
    assert str(error.value) == line


def test_keys_without_experts_are_told() -> None:
    config = config_from_dict(FLAT | {"moe_top_k": 2, "moe_jitter_eps": 0.1})
    assert config.notices == tuple(
        f"{key} has no effect: moe_num_experts is 1" for key in ("moe_top_k", "moe_jitter_eps")
    )


def test_lora_adapts_attention_only() -> None:
    targets = config_from_dict(FLAT | TOPK | {"lora": {"rank": 2}}).lora.targets
    assert targets == ("attention.query_key_value", "attention.dense")


def test_a_checkpoint_gives_its_experts_and_refuses_others() -> None:
    model = config_from_dict(FLAT | TOPK | {"moe_aux_loss_coeff": 0.02}).model
    loaded = LoadedModel.whole(model, "there", {})
    batch = {"train_micro_batch_size_per_gpu": 1, "load": "there"}
    taken = config_from_dict(batch, read_model=lambda values: loaded).model
    assert all(getattr(taken, key) == getattr(model, key) for key in loaded.keys)
    assert taken.moe_aux_loss_coeff == 0.02
    other = config_from_dict(batch | {"moe_aux_loss_coeff": 0.5}, read_model=lambda values: loaded).model
    assert other.moe_aux_loss_coeff == 0.5
    with pytest.raises(ConfigError, match="moe_top_k: 3 is not what there has, 2; remove the key, or set it to 2"):
        config_from_dict(batch | {"moe_top_k": 3}, read_model=lambda values: loaded)
    dense = LoadedModel.whole(config_from_dict(FLAT).model, "there", {})
    with pytest.raises(ConfigError, match="moe_num_experts: 8 is not what there has, 1"):
        config_from_dict(FLAT | TOPK | {"load": "there"}, read_model=lambda values: dense)
