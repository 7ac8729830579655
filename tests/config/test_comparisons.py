"""What a run says about comparisons of ranks that its layout leaves little to."""

from typing import Any

import pytest

from neox.config import config_from_dict
from neox.errors import ConfigError

MODEL = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "seq_length": 32, "max_position_embeddings": 32}
BATCH = {"train_batch_size": 8, "train_iters": 10}
CHECKED, TIMED = {"replica_check_interval": 5}, {"straggler_factor": 2.0}


def notices(world_size: int, **changes: Any) -> list[str]:
    config = config_from_dict(MODEL | BATCH | changes, world_size=world_size)
    return [line for line in config.notices if line.startswith(("replica_check_interval", "straggler_factor"))]


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_nothing_to_say_where_there_are_copies(stage: int) -> None:
    assert notices(2, **CHECKED, **TIMED, zero_optimization={"stage": stage}) == []


def test_stage_3_has_few_copies() -> None:
    (line,) = notices(2, **CHECKED, zero_optimization={"stage": 3})
    assert line.startswith("replica_check_interval: at ZeRO 3 no rank holds another's weights")


def test_one_process_has_none() -> None:
    assert notices(1, **CHECKED) == ["replica_check_interval: one process has nothing twice, so nothing is compared"]
    assert notices(1, **CHECKED, zero_optimization={"stage": 1}) == []


def test_zenflow_has_no_copies_in_the_middle_of_a_step() -> None:
    zero = {"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}}
    with pytest.raises(ConfigError, match=r"^replica_check_interval: zenflow updates masters .*; set 0$"):
        notices(2, **CHECKED, **zero)
    assert notices(2, **zero) == []


def test_one_rank_a_stage_is_compared_with_nobody() -> None:
    (line,) = notices(2, **TIMED, pipe_parallel_size=2)
    assert line.startswith("straggler_factor: ranks of one stage are compared")
    assert notices(4, **TIMED, pipe_parallel_size=2) == []
