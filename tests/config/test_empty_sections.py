"""A section that is empty asks for nothing, as in DeepSpeed, whoever reads it."""

from typing import Any

import pytest
from config.config_samples import sample
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from neox.config import Config, config_from_dict, deepspeed_dict
from neox.config.resolve_deepspeed import offload_device
from neox.errors import ConfigError

SECTIONS = (
    *("fp16", "bf16", "amp", "zero_optimization", "flops_profiler", "comms_logger", "tensorboard", "wandb"),
    *("csv_monitor", "data_types", "deepspeed_extra_args", "elasticity", "curriculum_learning", "scheduler"),
    *("rope_scaling", "lora"),
)
INACTIVE = ("activation_checkpointing", "checkpoint", "sparsity_config", "autotuning", "soft_prompt_tuning")


def built(**changes: Any) -> Config:
    return config_from_dict(sample(**changes), world_size=1)


@pytest.mark.parametrize("name", SECTIONS)
def test_an_empty_section_is_an_absent_one_and_said_so(name: str) -> None:
    found, absent = built(**{name: {}}), built()
    assert deepspeed_dict(found) == deepspeed_dict(absent)
    assert found.to_flat(resolved=True) == absent.to_flat(resolved=True)
    assert found.notices == (f"{name}: empty, the same as absent", *absent.notices)


@pytest.mark.parametrize("name", INACTIVE)
def test_an_empty_section_that_nothing_reads_is_inactive(name: str) -> None:
    assert built(**{name: {}}).notices == built().notices


def test_only_a_section_may_be_empty() -> None:
    with pytest.raises(ConfigError, match="save: expected text"):
        built(save={})


def test_zenflow_is_on_when_its_section_is_empty() -> None:
    """In DeepSpeed, so it is handed on."""
    assert deepspeed_dict(built(zero_optimization={"stage": 1, "zenflow": {}}))["zero_optimization"]["zenflow"] == {}


NOWHERE: list[dict[str, Any]] = [{}, {"device": "none"}, {"pin_memory": True}, {"device": None}]


@pytest.mark.parametrize("section", NOWHERE)
@pytest.mark.parametrize("key", ["offload_optimizer", "offload_param"])
def test_offload_without_a_device_is_none(key: str, section: dict[str, Any]) -> None:
    given = {name: value for name, value in section.items() if value is not None}
    theirs = getattr(DeepSpeedZeroConfig(stage=3, **{key: given}), key)
    assert theirs.device == "none"
    config = built(zero_optimization={"stage": 3, key: section})
    assert offload_device(config.deepspeed, "optimizer") == offload_device(config.deepspeed, "param") == "none"
    assert key not in deepspeed_dict(config)["zero_optimization"]
    built(zero_optimization={"stage": 0, key: section})  # needs no stage either


@pytest.mark.parametrize("section", NOWHERE)
def test_optimizers_agree_that_nothing_is_offloaded(section: dict[str, Any]) -> None:
    zero = {"stage": 1, "offload_optimizer": section}
    assert built(zero_optimization=zero, optimizer={"type": "Muon", "params": {"lr": 0.01}}).optimizer.type == "muon"
    with pytest.raises(ConfigError, match="cpu_adam updates weights that lie in host memory"):
        built(zero_optimization=zero, optimizer={"type": "cpu_adam", "params": {"lr": 0.01}})


@pytest.mark.parametrize(
    "changes",
    [
        {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}},
        {"zero_optimization": {"stage": 1, "cpu_offload": True}},
        {"zero_optimization": {"stage": 1, "cpu_offload": True, "offload_optimizer": {}}},
        {"deepspeed_extra_args": {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}}
        | {"zero_optimization": {"stage": 1}},
    ],
)
def test_optimizers_agree_on_what_is_offloaded(changes: dict[str, Any]) -> None:
    config = built(**changes, optimizer={"type": "cpu_adam", "params": {"lr": 0.01}})
    assert offload_device(config.deepspeed, "optimizer") == "cpu"
    assert deepspeed_dict(config)["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
    with pytest.raises(ConfigError, match="muon does not work with offload_optimizer"):
        built(**changes, optimizer={"type": "Muon", "params": {"lr": 0.01}})


def test_two_spellings_of_offload_that_contradict() -> None:
    zero = {"stage": 1, "cpu_offload": True, "offload_optimizer": {"device": "none"}}
    with pytest.raises(ConfigError, match=r"zero_optimization\.cpu_offload: contradicts offload_optimizer"):
        built(zero_optimization=zero)
