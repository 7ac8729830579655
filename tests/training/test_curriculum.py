"""Sequence lengths that grow: DeepSpeed's values at every step, clean refusals, and the training that follows."""

import copy
from typing import Any

import numpy as np
import pytest
from deepspeed.runtime.data_pipeline.curriculum_scheduler import CurriculumScheduler
from ranks import run_ranks
from training.growth import CURRICULUM, LENGTHS, by_hand, run, settings
from training.layouts import MODEL

from neox.config import config_from_dict
from neox.errors import ConfigError
from neox.model.flops import flops_per_token
from neox.training.callbacks import mean_flops
from neox.training.curriculum import curriculum_of

LINEAR: dict[str, Any] = CURRICULUM["curriculum_learning"]
ROOT = LINEAR | {
    "schedule_type": "fixed_root",
    "schedule_config": {"total_curriculum_step": 50, "difficulty_step": 4, "root_degree": 2},
}
DISCRETE = LINEAR | {
    "schedule_type": "fixed_discrete",
    "schedule_config": {"difficulty": [8, 16, 32], "max_step": [3, 10]},
}
UNEVEN = LINEAR | {
    "min_difficulty": 3,
    "max_difficulty": 31,
    "schedule_config": {"total_curriculum_step": 40, "difficulty_step": 5},
}


def flat(entries: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return MODEL | {"train_micro_batch_size_per_gpu": 2, "curriculum_learning": entries} | changes


@pytest.mark.parametrize("entries", [LINEAR, ROOT, DISCRETE, UNEVEN], ids=["linear", "root", "discrete", "uneven"])
def test_lengths_are_those_of_deepspeed(entries: dict[str, Any]) -> None:
    curriculum = curriculum_of(config_from_dict(flat(entries)))
    assert curriculum is not None
    scheduler = CurriculumScheduler(copy.deepcopy(entries))
    expected = [scheduler.update_difficulty(step) for step in range(1, 80)]
    assert [curriculum.length_at(step) for step in range(1, 80)] == expected
    assert len(set(expected)) > 2
    assert max(expected) <= 32


def test_the_published_example() -> None:
    """DeepSpeed's tutorial: 8 to 1024 tokens over 15,000 steps in multiples of 8; halfway is 8 + 1016 / 2 = 516."""
    entries = {
        "enabled": True,
        "curriculum_type": "seqlen",
        "min_difficulty": 8,
        "max_difficulty": 1024,
        "schedule_type": "fixed_linear",
        "schedule_config": {"total_curriculum_step": 15000, "difficulty_step": 8},
    }
    config = config_from_dict(flat(entries, seq_length=1024, max_position_embeddings=1024))
    curriculum = curriculum_of(config)
    assert curriculum is not None
    lengths = [curriculum.length_at(step) for step in (1, 118, 119, 7500, 14999, 15000, 15001, 10**6)]
    assert lengths == [8, 8, 16, 512, 1016, 1024, 1024, 1024]


def test_disabled_asks_for_nothing() -> None:
    assert curriculum_of(config_from_dict(flat({"enabled": False}))) is None


def changed(entries: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Entries with changes; those of schedule_config by their own names, None removes."""
    entries = copy.deepcopy(entries)
    for name, value in changes.items():
        group = entries["schedule_config"] if name in entries["schedule_config"] else entries
        group[name] = value
    return entries


WHERE = "curriculum_learning"
CONFIG = "curriculum_learning.schedule_config"
SP = {"model_parallel_size": 2, "sequence_parallel": True}
WRONG: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (changed(LINEAR, enabled="yes"), {}, f"{WHERE}.enabled: expected true or false, got 'yes'"),
    (changed(LINEAR, curriculum_type="vocab"), {}, f"{WHERE}.curriculum_type: expected 'seqlen', got 'vocab'"),
    (
        changed(LINEAR, schedule_type="custom"),
        {},
        f"{WHERE}.schedule_type: expected 'fixed_linear' or 'fixed_root' or 'fixed_discrete', got 'custom'",
    ),
    (
        changed(LINEAR, schedule_config=3),
        {},
        f"{CONFIG}: expected a mapping with total_curriculum_step and difficulty_step, got 3",
    ),
    (changed(LINEAR, warmup=8), {}, f"{WHERE}.warmup: unknown entry; remove it"),
    (changed(LINEAR, max_dificulty=8), {}, f"{WHERE}.max_dificulty: unknown entry; did you mean 'max_difficulty'?"),
    (
        changed(LINEAR, difficulty_step=None),
        {},
        f"{CONFIG}.difficulty_step: required with schedule_type fixed_linear; add it",
    ),
    (changed(LINEAR, difficulty_step=0), {}, f"{CONFIG}.difficulty_step: expected more than 0, got 0"),
    (changed(LINEAR, difficulty_step=64), {}, f"{CONFIG}.difficulty_step: 64 is above max_difficulty 32; lower it"),
    (changed(LINEAR, min_difficulty=2.5), {}, f"{WHERE}.min_difficulty: expected an integer, got 2.5"),
    (changed(LINEAR, min_difficulty=33), {}, f"{WHERE}.min_difficulty: 33 is above max_difficulty 32; lower it"),
    (
        changed(LINEAR, max_difficulty=64),
        {},
        f"{WHERE}.max_difficulty: 64 is above seq_length 32; set it to that or less",
    ),
    (changed(ROOT, root_degree=0), {}, f"{CONFIG}.root_degree: expected a number from 0.1 to 100, got 0"),
    (changed(ROOT, root_degree="two"), {}, f"{CONFIG}.root_degree: expected a number, got 'two'"),
    (
        changed(DISCRETE, max_step=[3]),
        {},
        f"{CONFIG}.max_step: has 1 entries for 3 in difficulty; give one less, the last length has no end",
    ),
    (
        changed(DISCRETE, difficulty=[8, 32, 16]),
        {},
        f"{CONFIG}.difficulty: expected numbers that do not fall, got [8, 32, 16]",
    ),
    (
        changed(DISCRETE, difficulty=[8, "x", 16]),
        {},
        f"{CONFIG}.difficulty: expected a list of integers above 0, got [8, 'x', 16]",
    ),
    (
        changed(DISCRETE, difficulty=[4, 8, 32]),
        {},
        f"{CONFIG}.difficulty: 4 is not from min_difficulty 8 to max_difficulty 32; change one of them",
    ),
    (
        changed(LINEAR, difficulty_step=3),
        SP,
        f"{CONFIG}.difficulty_step: 3 is not divisible by model_parallel_size 2, as sequence_parallel needs; "
        "change one",
    ),
]


@pytest.mark.parametrize(
    ("entries", "changes", "message"), WRONG, ids=[m.split(":")[0] + str(i) for i, (_, _, m) in enumerate(WRONG)]
)
def test_wrong_entries_are_named(entries: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        config_from_dict(flat(entries, **changes), world_size=2)
    assert str(error.value) == message


def test_flops_are_counted_at_each_length() -> None:
    model = config_from_dict(flat(LINEAR)).model
    whole, half = (
        flops_per_token(model.model_copy(update={"seq_length": length}), causal=False).model for length in (32, 16)
    )
    assert mean_flops(model, {32: 5}).model == pytest.approx(whole)
    assert 64 * mean_flops(model, {32: 1, 16: 2}).model == pytest.approx(32 * whole + 2 * 16 * half)
    assert half < whole


def test_losses_are_those_of_the_cut_rows(documents: str) -> None:
    flat = settings(documents, train_batch_size=4)
    found = run_ranks(run, 1, flat | CURRICULUM, 1)[0]
    assert (found.sizes, found.lengths) == ([4] * 6, LENGTHS)
    np.testing.assert_allclose(found.losses, by_hand(flat, [4] * 6, LENGTHS), rtol=0, atol=2e-5)
