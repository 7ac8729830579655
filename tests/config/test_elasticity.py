"""The `elasticity` section: the batches of DeepSpeed's last release that had it, and what may not be asked for."""

import json
from pathlib import Path
from typing import Any

import pytest
from config.config_samples import sample

from neox.config import Config, config_from_dict
from neox.config.requirements import check_training
from neox.errors import ConfigError

# Sections with a world size, and the batch and micro batch that DeepSpeed 0.19.7's compute_elastic_config gave, or
# nulls where it refused the world size.
CASES = json.loads((Path(__file__).resolve().parents[1] / "data" / "elasticity.json").read_text(encoding="utf-8"))
SECTION = {"enabled": True, "max_train_batch_size": 100, "micro_batch_sizes": [2, 4, 6], "version": 0.1}


def resolved(section: dict[str, Any], world_size: int | None, **changes: Any) -> Config:
    flat = sample(elasticity=section, **changes)
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        if key not in changes:
            flat.pop(key, None)
    return config_from_dict(flat, world_size=world_size)


def test_batches_are_deepspeeds() -> None:
    assert {section["version"] for section, *_ in CASES} == {0.1, 0.2}
    assert sum(total is None for _, _, total, _ in CASES) > 20
    for case, world_size, total, micro in CASES:
        section = {"enabled": True, **case}
        if total is None:
            with pytest.raises(ConfigError, match=f"give no batch for {world_size} processes; start") as error:
                resolved(section, world_size)
            assert "\n" not in str(error.value)
            continue
        batch = resolved(section, world_size).batch
        assert (batch.train_batch_size, batch.train_micro_batch_size_per_gpu) == (total, micro)
        assert total == micro * batch.gradient_accumulation_steps * world_size


def test_processes_that_hold_one_model_count_as_one_rank() -> None:
    batch = resolved(SECTION, 8, model_parallel_size=2, pipe_parallel_size=2).batch
    assert batch == resolved(SECTION, 2).batch
    hosts = SECTION | {"version": 0.2, "num_gpus_per_node": 4}
    assert resolved(hosts, 8, model_parallel_size=2).batch.train_batch_size % 4 == 0


def test_before_the_number_of_processes_is_known() -> None:
    config = resolved(SECTION, None)
    assert config.batch.train_batch_size == 96
    assert config.with_world_size(4).batch == resolved(SECTION, 4).batch
    check_training(resolved(SECTION | {"version": 0.2}, None, train_iters=10, data_path="data", vocab_file="vocab"))


def test_the_resolved_keys_give_the_batch_again() -> None:
    config = resolved(SECTION, 4)
    again = config_from_dict(config.to_flat(resolved=True), world_size=4)
    assert again.batch.train_batch_size == config.batch.train_batch_size == 96
    assert again.batch.gradient_accumulation_steps == config.batch.gradient_accumulation_steps == 4


def test_what_it_replaces_is_refused_or_announced() -> None:
    with pytest.raises(ConfigError, match=r"^train_batch_size: set together with elasticity, which sets the batch"):
        resolved(SECTION, 4, train_batch_size=96)
    config = resolved(SECTION | {"ignore_non_elastic_batch_info": True, "min_time": 5}, 4, train_batch_size=8)
    assert config.batch.train_batch_size == 96
    assert list(config.notices) == [
        "train_batch_size has no effect: elasticity sets the batch",
        "elasticity.min_time has no effect: it is for what starts the processes",
    ]
    assert resolved({"enabled": False}, 4, train_batch_size=8).batch.train_batch_size == 8


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_gpu": 3}, r"^elasticity.max_gpu: unknown key; did you mean 'max_gpus'\?"),
        ({"micro_batch_sizes": [2, 0]}, r"^elasticity.micro_batch_sizes: expected a list of whole numbers above 0"),
        ({"micro_batch_sizes": 2}, r"^elasticity.micro_batch_sizes: expected a list, got 2"),
        ({"micro_batch_sizes": [2, 200]}, "200 is more than max_train_batch_size leaves one rank, 100; remove it"),
        ({"version": 0.3}, r"^elasticity.version: expected 0.1 or 0.2, got 0.3"),
        ({"min_gpus": 0}, r"^elasticity.min_gpus: expected at least 1, got 0"),
        ({"min_gpus": 8, "max_gpus": 4}, r"^elasticity.max_gpus: 4 is less than min_gpus 8; raise it"),
        ({"model_parallel_size": 2}, r"^elasticity.model_parallel_size: 2 is not the 1 processes of pipe_parallel"),
        ({"enabled": "yes"}, r"^elasticity.enabled: expected true or false, got 'yes'"),
    ],
)
def test_mistakes_are_one_line(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        resolved(SECTION | changes, 4)
    assert "\n" not in str(error.value)


def test_what_is_missing_is_named() -> None:
    with pytest.raises(ConfigError) as error:
        resolved({"max_train_batch_size": 100}, 4)
    assert str(error.value) == "elasticity.enabled: not set; add enabled: true or enabled: false"
    with pytest.raises(ConfigError) as error:
        resolved({"enabled": True, "max_train_batch_size": 100}, 4)
    assert str(error.value) == "elasticity.micro_batch_sizes: not set, and elasticity is enabled; add it"


def test_hosts_must_hold_whole_models() -> None:
    with pytest.raises(ConfigError, match="num_gpus_per_node: 3 is no multiple of the 2 processes that hold one model"):
        resolved(SECTION | {"version": 0.2, "num_gpus_per_node": 3}, 4, model_parallel_size=2)
