"""Rules between keys."""

from typing import Any

import pydantic
import pytest
from config.config_samples import sample

from neox.config import check_training, config_from_dict
from neox.errors import ConfigError


def message(world_size: int | None = 1, **changes: Any) -> str:
    with pytest.raises(ConfigError) as error:
        config_from_dict(sample(**changes), world_size=world_size)
    return str(error.value)


@pytest.mark.parametrize(
    ("given", "solved"),
    [
        ({"train_batch_size": 64, "train_micro_batch_size_per_gpu": 4}, (64, 4, 4)),
        ({"train_batch_size": 64, "gradient_accumulation_steps": 8}, (64, 2, 8)),
        ({"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 3}, (48, 4, 3)),
        ({"train_batch_size": 64}, (64, 16, 1)),
        ({"train_micro_batch_size_per_gpu": 4}, (16, 4, 1)),
        (
            {"train_batch_size": 64, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 4},
            (64, 4, 4),
        ),
    ],
)
def test_batch_triple_at_data_parallel_4(given: dict[str, int], solved: tuple[int, int, int]) -> None:
    flat = sample(train_micro_batch_size_per_gpu=None, model_parallel_size=2) | given
    config = config_from_dict(flat, world_size=8)
    assert config.parallel.data_parallel_size == 4
    batch = config.batch
    found = (batch.train_batch_size, batch.train_micro_batch_size_per_gpu, batch.gradient_accumulation_steps)
    assert found == solved
    # Made without a world size and given one later, it is the same.
    assert config_from_dict(flat, world_size=None).with_world_size(8).batch == batch


def test_batch_that_does_not_divide_names_the_nearest() -> None:
    assert message(4, train_batch_size=30) == (
        "train_batch_size: 30 is not a multiple of train_micro_batch_size_per_gpu 2 x data-parallel size 4 = 8; "
        "nearest that works: 32"
    )
    assert message(1, train_batch_size=8, gradient_accumulation_steps=3) == (
        "train_batch_size: 8 is not train_micro_batch_size_per_gpu 2 x gradient_accumulation_steps 3 x "
        "data-parallel size 1 = 6; set train_batch_size: 6, or gradient_accumulation_steps: 4, or leave one of "
        "the three out"
    )
    assert message(4, train_micro_batch_size_per_gpu=None, train_batch_size=2).endswith("nearest that works: 4")


def test_world_size_that_does_not_divide() -> None:
    assert message(6, model_parallel_size=2, pipe_parallel_size=2) == (
        "model_parallel_size: 6 processes cannot be dealt to 2 pipeline stages x 2 tensor ranks = 4; "
        "nearest number of processes: 8"
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"hidden_size": 65}, "hidden_size: 65 is not divisible by num_attention_heads 4; nearest: 64"),
        ({"max_position_embeddings": 16}, "seq_length: 32 is longer than max_position_embeddings 16"),
        ({"pos_emb": "rotary", "rotary_pct": 0.2}, "rotary_pct: 0.2 of head size 16 is 3 dimensions"),
        (
            {"intermediate_size": 7, "expansion_factor": 2},
            "expansion_factor: set together with intermediate_size",
        ),
        (
            {"attention_config": [[["local"], 4]]},
            "attention_config: 'local' is not supported yet; supported: global",
        ),
        ({"attention_config": [[["flash"], 3]]}, "attention_config: describes 3 layers, and num_layers is 4"),
        ({"attention_config": [[3]]}, "attention_config: expected a list such as"),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "bf16.enabled: fp16 is enabled too"),
        ({"precision": "fp32", "fp16": {"enabled": True}}, "fp16.enabled: contradicts precision 'fp32'"),
        ({"fp16": {"loss_scale": 0}}, "fp16.enabled: not set; add enabled: true or enabled: false"),
        ({"fp16": {"enabled": True, "type": "fp32"}}, "fp16.type: 'fp32' contradicts fp16"),
        ({"bf16": {"enabled": True, "type": "fp16"}}, "bf16.type: 'fp16' contradicts bf16"),
        (
            {"precision": "fp16", "fp16": {"enabled": True, "type": "bfloat16"}},
            "fp16.type: 'bfloat16' contradicts precision 'fp16'",
        ),
        (
            {"bf16": {"enabled": False}, "fp16": {"enabled": True, "type": "bfloat16"}},
            "fp16.type: 'bfloat16' contradicts bf16.enabled",
        ),
        (
            {"zero_optimization": {"stage": 1, "overlap_com": True}},
            "zero_optimization.overlap_com: unknown key; did you mean 'overlap_comm'?",
        ),
        (
            # Measured with two data ranks and reduce_scatter: false: gradients of half the size.
            {"gradient_predivide_factor": 2, "zero_optimization": {"stage": 3, "reduce_scatter": False}},
            "gradient_predivide_factor: 2.0 can leave gradients divided by it at ZeRO 3; remove it",
        ),
        (
            {"deepspeed_extra_args": {"gradient_predivide_factor": 2}, "zero_optimization": {"stage": 3}},
            "gradient_predivide_factor: 2 can leave gradients divided by it at ZeRO 3; remove it",
        ),
        (
            {"gradient_predivide_factor": 2, "zero_optimization": {"stage": 2}},
            "gradient_predivide_factor: ZeRO 2 cannot do it while it scatters; set zero_optimization.reduce_scatter",
        ),
        (
            {"prescale_gradients": True, "zero_optimization": {"stage": 1}},
            "prescale_gradients: ZeRO 1 cannot do it while it scatters; set zero_optimization.reduce_scatter: false",
        ),
        (
            {"deepspeed_extra_args": {"gradient_allreduce_op": "sum"}},
            "deepspeed_extra_args.gradient_allreduce_op: 'sum' trains wrongly: a loss here has the share",
        ),
        (
            {"deepspeed_extra_args": {"managed_gradient_accumulation": False}},
            "deepspeed_extra_args.managed_gradient_accumulation: False trains wrongly: micro-batches are added",
        ),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage: expected 0, 1, 2 or 3, got 4"),
        ({"pipe_partition_method": "magic"}, "pipe_partition_method: 'magic' is unknown"),
        ({"min_lr": 0.1}, "min_lr: 0.1 is above optimizer.params.lr 0.001"),
        ({"save": "here"}, "save: set without checkpoint_factor or extra_save_iters"),
        ({"checkpoint_factor": 1.5}, "checkpoint_factor: expected a whole number"),
        ({"checkpoint_factor": 1, "checkpoint_scale": "log"}, "checkpoint_factor: expected a ratio above 1"),
        ({"train_data_paths": ["a"]}, "data_path: set together with train_data_paths"),
        ({"train_epochs": 1}, "train_epochs: set together with train_iters"),
        ({"split": "1,2,3,4"}, "split: expected up to three proportions"),
        ({"split": "0,0,0"}, "split: expected a proportion above 0"),
        ({"optimizer": {"type": "Adam", "params": {"lr": "fast"}}}, "optimizer.params.lr: expected a number"),
        (
            {"optimizer": {"type": "Adam", "params": {"bettas": 1}}},
            "optimizer.params.bettas: unknown argument of adam",
        ),
        (
            {"optimizer": {"type": "SGD", "params": {"eps": 1}}},
            "optimizer.params.eps: unknown argument of sgd",
        ),
        ({"optimizer": {"params": {"lr": 1.0}}}, "optimizer: has no type"),
        (
            {"optimizer": {"type": "Adam", "params": {"betas": [0.9, 1]}}},
            "optimizer.params.betas: expected numbers from 0",
        ),
        (
            {"optimizer": {"type": "Adam", "params": {"weight_decay": 0.2}}, "weight_decay": 0.1},
            "optimizer.params.weight_decay: contradicts weight_decay 0.1",
        ),
    ],
)
def test_rule_is_told_in_one_line(changes: dict[str, Any], expected: str) -> None:
    text = message(**changes)
    assert text.startswith(expected)
    assert "\n" not in text


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_predivide_factor": 2},
        {"gradient_predivide_factor": 2, "zero_optimization": {"stage": 2, "reduce_scatter": False}},
        {"gradient_predivide_factor": 2, "bf16": {"enabled": True}, "zero_optimization": {"stage": 1}},
        {"prescale_gradients": True, "zero_optimization": {"stage": 3, "reduce_scatter": False}},
        {
            "prescale_gradients": True,
            "deepspeed_extra_args": {"zero_optimization": {"reduce_scatter": False, "stage": 1}},
        }
        | {"zero_optimization": {"stage": 1}},
    ],
)
def test_gradients_are_divided_where_that_works(changes: dict[str, Any]) -> None:
    assert config_from_dict(sample(**changes), world_size=2).given.items() >= changes.items()


def test_a_factor_beside_a_division_before_the_sum_is_announced() -> None:
    config = config_from_dict(sample(gradient_predivide_factor=2, prescale_gradients=True), world_size=2)
    notice = "gradient_predivide_factor has no effect: prescale_gradients divides by the number of ranks before the sum"
    assert notice in config.notices


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"num_attention_heads": 1}, "num_attention_heads"),
        ({"intermediate_size": 33}, "intermediate_size"),
        ({"sequence_parallel": True, "seq_length": 31}, "seq_length"),
    ],
)
def test_tensor_parallel_divisions(changes: dict[str, Any], key: str) -> None:
    assert f"{key}: " in message(2, model_parallel_size=2, **changes)


def test_data_lists_go_together() -> None:
    paths = {
        "data_path": None,
        "train_data_paths": ["a", "b"],
        "valid_data_paths": ["c"],
        "test_data_paths": ["d"],
    }
    config = config_from_dict(sample(**paths, train_data_weights=[1, 2]))
    assert config.data.train_data_weights == (1, 2)
    text = message(**paths, train_data_weights=[1])
    assert text == "train_data_weights: has 1 entries, and train_data_paths has 2"
    assert message(**paths, train_label_data_paths=["x"]).startswith("train_label_data_paths: has 1 entries")
    assert "valid_data_paths is missing" in message(**(paths | {"valid_data_paths": None}))
    assert message(**paths, train_data_weights=[0, 0]).startswith("train_data_weights: expected weights")


def test_values_that_follow_from_others() -> None:
    model = config_from_dict(sample(pos_emb="rotary", rotary_pct=0.25)).model
    assert (model.intermediate_size, model.max_position_embeddings) == (256, 32)
    assert (model.head_dim, model.rotary_ndims) == (16, 4)
    assert model.attention_types == ("global",) * 4
    assert config_from_dict(sample(expansion_factor=3)).model.intermediate_size == 192
    assert config_from_dict(sample(intermediate_size=100, mlp_multiple_of=32)).model.intermediate_size == 128
    mixed = config_from_dict(sample(attention_config=[[["global", "flash"], 1], [["flash"], "all"]])).model
    assert mixed.attention_types == ("global", "flash", "flash", "flash")


@pytest.mark.parametrize(
    ("changes", "horizon"),
    [
        ({}, 100),
        ({"lr_decay_fraction": 0.55}, 55),
        ({"lr_decay_iters": 70, "lr_decay_fraction": 0.5}, 70),
        ({"train_iters": None, "train_epochs": 1}, 0),
    ],
)
def test_decay_horizon(changes: dict[str, Any], horizon: int) -> None:
    assert config_from_dict(sample(**changes)).schedule.lr_decay_iters == horizon


def test_epochs_become_iterations() -> None:
    config = config_from_dict(sample(train_iters=None, train_epochs=2, lr_decay_fraction=0.5))
    resolved = config.with_train_iters(40)
    assert (resolved.training.train_iters, resolved.schedule.lr_decay_iters) == (40, 20)


@pytest.mark.parametrize(
    ("changes", "precision"),
    [
        ({}, "fp32"),
        ({"fp16": {"enabled": True, "fp16": True}}, "fp16"),
        ({"bf16": {"enabled": True}}, "bfloat16"),
        ({"precision": "bf16"}, "bfloat16"),
        ({"precision": "bfloat16", "fp16": {"enabled": False}}, "bfloat16"),
    ],
)
def test_precision(changes: dict[str, Any], precision: str) -> None:
    assert config_from_dict(sample(**changes)).model.precision == precision


def test_optimizer() -> None:
    config = config_from_dict(sample(optimizer={"type": "ADAMW", "params": {"lr": "1e-2", "weight_decay": 0.3}}))
    assert config.optimizer.type == "adamw"
    assert (config.optimizer.lr, config.optimizer.weight_decay) == (1e-2, 0.3)
    assert config.optimizer.params == {"betas": [0.9, 0.999], "eps": 1e-8}
    silent = config_from_dict(sample(optimizer={"type": "SGD"}))
    assert silent.optimizer.lr == 1e-3
    assert silent.optimizer.params == {"momentum": 0.0}
    assert silent.notices == ("optimizer.params.lr is not set: 0.001 is used",)


def test_evaluation_is_off_without_batches() -> None:
    training = config_from_dict(sample(eval_iters=0)).training
    assert (training.do_train, training.do_valid, training.do_test) == (True, False, False)
    assert config_from_dict(sample(eval_iters=0, do_test=True)).training.do_test


def test_required_keys() -> None:
    with pytest.raises(ConfigError) as error:
        config_from_dict({"num_layers": 2})
    names = [line.split(":")[0] for line in str(error.value).splitlines()]
    assert names == ["hidden_size", "num_attention_heads", "seq_length"]


def test_loading_needs_less_than_training() -> None:
    flat = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "seq_length": 32}
    config = config_from_dict(flat, world_size=None)
    with pytest.raises(ConfigError) as error:
        check_training(config)
    names = [line.split(":")[0] for line in str(error.value).splitlines()]
    assert names == ["optimizer", "train_iters", "data_path", "train_batch_size", "vocab_file"]
    check_training(config_from_dict(sample(padded_vocab_size=128)))


@pytest.mark.parametrize("key", ["finetune", "iteration"])
def test_what_to_load_needs_load(key: str) -> None:
    """Else a run begins from fresh weights that was to begin from others."""
    flat = sample(padded_vocab_size=128, **{key: 1 if key == "iteration" else True})
    with pytest.raises(ConfigError, match=f"{key}: says what to load, and load is not set"):
        check_training(config_from_dict(flat))
    check_training(config_from_dict(flat | {"load": "run"}))


@pytest.mark.parametrize("resolved", [False, True])
def test_round_trip(resolved: bool) -> None:
    flat = sample(
        bf16={"enabled": True},
        model_parallel_size=2,
        sequence_parallel=True,
        expansion_factor=3,
        train_batch_size=8,
        extra_save_iters=[0, 10],
        attention_config=[[["flash"], 4]],
        zero_optimization={"stage": 2, "overlap_comm": True},
        optimizer={"type": "Adam", "params": {"lr": 1e-2, "betas": [0.9, 0.95], "weight_decay": 0.2}},
    )
    config = config_from_dict(flat, world_size=4)
    again = config_from_dict(config.to_flat(resolved=resolved), world_size=4)
    skipped = {"sources", "given", "files", "notices"}
    if resolved:
        skipped.add("model")
        assert again.model.intermediate_size == config.model.intermediate_size == 192
    assert again.model_dump(exclude=skipped) == config.model_dump(exclude=skipped)
    assert config_from_dict(again.to_flat(resolved=resolved), world_size=4).to_flat(resolved=True) == again.to_flat(
        resolved=True
    )


def test_flat_keys_belong_to_the_caller() -> None:
    flat = sample()
    config = config_from_dict(flat)
    flat["optimizer"]["params"]["lr"] = 5.0
    config.to_flat()["optimizer"]["params"]["lr"] = 6.0
    assert config.to_flat()["optimizer"]["params"]["lr"] == 1e-3


def test_vocabulary_and_world_size_are_set_later() -> None:
    config = config_from_dict(sample(model_parallel_size=2), world_size=None)
    assert config.model.padded_vocab_size is None
    assert config.parallel.world_size is None
    config = config.with_world_size(4).with_vocabulary(256)
    assert config.model.padded_vocab_size == 256
    assert config.parallel.data_parallel_size == 2
    assert config.to_flat()["padded_vocab_size"] == 256
    # The rows are padded to equal shares when the model is split, so any size goes with any layout.
    assert config.with_vocabulary(255).model.padded_vocab_size == 255


def test_config_is_frozen() -> None:
    config = config_from_dict(sample())
    with pytest.raises(pydantic.ValidationError):
        config.model.num_layers = 3  # type: ignore[misc]
