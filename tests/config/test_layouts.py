"""The table of legal layouts."""

from itertools import product
from pathlib import Path

import pytest
from config.config_samples import sample

from neox.config import config_from_dict
from neox.config.layouts import ANY_PRECISION, find_layout, markdown
from neox.errors import ConfigError

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("pipe", "stage", "precision"), list(product((0, 1, 2, 4), range(4), ANY_PRECISION)))
def test_every_layout_is_in_the_table_once(pipe: int, stage: int, precision: str) -> None:
    layout = find_layout(pipeline_stages=max(1, pipe), zero_stage=stage, precision=precision)
    flat = sample(pipe_parallel_size=pipe, precision=precision, zero_optimization={"stage": stage})
    if pipe >= 2 and stage >= 2:
        assert layout.refusal
        with pytest.raises(ConfigError, match=r"^zero_optimization.stage: ZeRO .*stage: 1, or pipe_parallel_size: 1"):
            config_from_dict(flat, world_size=4)
        return
    config = config_from_dict(flat, world_size=4)
    changed = stage == 0 and (pipe >= 2 or precision != "fp32")
    assert config.parallel.zero_stage == (1 if changed else stage)
    assert len(config.notices) == changed
    assert all(notice.startswith("zero_optimization.stage 0 runs as stage 1: ") for notice in config.notices)


@pytest.mark.parametrize(("pipe", "tensor", "sequence"), list(product((0, 1, 2), (1, 2), (False, True))))
def test_tensor_and_sequence_parallelism_go_with_everything(pipe: int, tensor: int, sequence: bool) -> None:
    flat = sample(pipe_parallel_size=pipe, model_parallel_size=tensor, sequence_parallel=sequence)
    parallel = config_from_dict(flat, world_size=4).parallel
    assert parallel.sequence_parallel == (sequence and tensor > 1)
    assert parallel.pipeline_stages == max(1, pipe)
    assert parallel.data_parallel_size == 4 // (tensor * max(1, pipe))


def test_more_stages_than_layers() -> None:
    with pytest.raises(ConfigError, match=r"^pipe_parallel_size: 8 stages for 4 layers; set it to 4 or less"):
        config_from_dict(sample(pipe_parallel_size=8), world_size=8)


def test_documented_table_is_the_table() -> None:
    assert markdown() == (ROOT / "docs" / "layouts.md").read_text()
