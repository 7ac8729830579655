"""Batches that grow: their sizes, clean refusals, the training that follows, and resuming in the middle."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ranks
from training.growth import CURRICULUM, LENGTHS, RAMP, SIZES, by_hand, run, settings
from training.layouts import MODEL

from neox.config import config_from_dict
from neox.config.ramp import BatchRamp
from neox.errors import ConfigError
from neox.training.run import train


def test_sizes_grow_evenly_over_the_samples() -> None:
    """Megatron-LM's example [16, 8, 300000] to 1024: 126 increments, one every 300000 / 126 = 2380.95 samples."""
    ramp = BatchRamp(start=16, increment=8, samples=300000, full=1024)
    consumed = (0, 2380, 2381, 4761, 4762, 150000, 299999, 300000, 10**9)
    assert [ramp.size_at(c) for c in consumed] == [16, 16, 24, 24, 32, 16 + 8 * 63, 1016, 1024, 1024]


def test_resolved_configuration_keeps_it() -> None:
    flat = MODEL | RAMP | {"train_batch_size": 16}
    for config in (config_from_dict(flat, world_size=2), config_from_dict(flat).with_world_size(2)):
        assert BatchRamp.from_config(config) == BatchRamp(start=4, increment=4, samples=24, full=16)
        assert config.batch.gradient_accumulation_steps == 4
    assert BatchRamp.from_config(config_from_dict(MODEL | {"train_batch_size": 16})) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rampup_batch_size": [4, 4]}, r"expected \[first batch, increment, samples\], three integers above 0, got"),
        ({"rampup_batch_size": [4, 0, 24]}, r"expected \[first batch, increment, samples\]"),
        ({"rampup_batch_size": [4, 5, 24]}, "4 does not grow to train_batch_size 16 in steps of 5; change one"),
        ({"rampup_batch_size": [16, 4, 24]}, "16 does not grow to train_batch_size 16 in steps of 4; change one"),
        (
            {"rampup_batch_size": [4, 2, 24]},
            "its batch of 6 is not a multiple of train_micro_batch_size_per_gpu 2 x data-parallel size 2 = 4; make",
        ),
        ({"train_epochs": 1}, "one pass over the data is not defined with it; set train_iters"),
        ({"rampup_batch_size": "4 4 24"}, "expected a list, got '4 4 24'"),
    ],
)
def test_wrong_ramps_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^rampup_batch_size: {message}") as error:
        config_from_dict(MODEL | RAMP | {"train_batch_size": 16} | changes, world_size=2)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("changes", [{}, {"pipe_parallel_size": 2}], ids=["dp2", "pp2"])
def test_losses_are_those_of_the_growing_batches(documents: str, changes: dict[str, Any]) -> None:
    found = run_ranks(run, 2, settings(documents, **RAMP | changes), 2)[0]
    assert (found.sizes, found.lengths) == (SIZES, [32] * 6)
    np.testing.assert_allclose(found.losses, by_hand(settings(documents), SIZES, [32] * 6), rtol=0, atol=2e-5)


def train_whole(flat: dict[str, Any], world_size: int) -> None:
    """The run that `train.py` makes."""
    torch.set_num_threads(1)
    train(config_from_dict(flat, world_size=world_size))


def test_metrics_tell_what_grows(documents: str, tmp_path: Path) -> None:
    """With an evaluation of whole rows between steps of short ones, over two stages."""
    evaluation = {"eval_interval": 2, "eval_iters": 1, "do_test": False}
    logging = {"save": str(tmp_path), "extra_save_iters": [3], "log_interval": 1}
    flat = settings(documents, **RAMP | CURRICULUM | evaluation | logging, pipe_parallel_size=2)
    run_ranks(train_whole, 2, flat, 2)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "train/lm_loss" in line]
    assert [step["train/batch_size"] for step in steps] == SIZES
    assert [step["curriculum_seqlen"] for step in steps] == LENGTHS
    for step, size, length in zip(steps, SIZES, LENGTHS, strict=True):
        assert step["runtime/tokens_per_sec"] * step["runtime/iteration_time"] == pytest.approx(size * length)
    losses = [step["train/lm_loss"] for step in steps]
    np.testing.assert_allclose(losses, by_hand(settings(documents), SIZES, LENGTHS), rtol=0, atol=2e-5)
    assert len([line for line in lines if "validation/lm_loss" in line]) == 3


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [(2, {"zero_optimization": {"stage": 2}}), (2, {"pipe_parallel_size": 2})],
    ids=["zero2", "pp2"],
)
def test_resuming_in_the_middle_is_bitwise(
    documents: str, tmp_path: Path, world_size: int, layout: dict[str, Any]
) -> None:
    """Saved after step 3, when both the batch and the length are about to grow."""
    save = {"save": str(tmp_path), "extra_save_iters": [3]}
    flat = settings(documents, **RAMP | CURRICULUM | save | layout, hidden_dropout=0.1)
    whole = run_ranks(run, world_size, flat, world_size)[0]
    rest = run_ranks(run, world_size, flat | {"load": str(tmp_path), "iteration": 3}, world_size)[0]
    assert (rest.sizes, rest.lengths) == (SIZES[3:], LENGTHS[3:])
    assert dataclasses.replace(whole, losses=whole.losses[3:], sizes=whole.sizes[3:], lengths=whole.lengths[3:]) == rest
