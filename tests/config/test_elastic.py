"""The batch of an elastic run on any number of processes, and the rules of keys about restarts."""

from typing import Any

import pytest
from config.config_samples import sample

from neox.config import config_from_dict
from neox.errors import ConfigError

BASE = sample(train_micro_batch_size_per_gpu=None)
ELASTIC = BASE | {"elastic": True, "train_batch_size": 24}


@pytest.mark.parametrize(
    ("keys", "processes", "micro", "steps"),
    [
        ({"train_micro_batch_size_per_gpu": 4}, 1, 4, 6),
        ({"train_micro_batch_size_per_gpu": 4}, 2, 4, 3),
        ({"train_micro_batch_size_per_gpu": 4}, 3, 4, 2),
        ({"train_micro_batch_size_per_gpu": 4}, 4, 3, 2),
        ({"train_micro_batch_size_per_gpu": 4}, 24, 1, 1),
        ({"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 3}, 2, 4, 3),
        ({"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 3}, 1, 4, 6),
        ({"gradient_accumulation_steps": 2}, 4, 3, 2),
        ({}, 4, 6, 1),
    ],
    ids=str,
)
def test_the_batch_stays(keys: dict[str, Any], processes: int, micro: int, steps: int) -> None:
    config = config_from_dict(ELASTIC | keys, world_size=processes)
    batch = config.batch
    sizes = (batch.train_batch_size, batch.train_micro_batch_size_per_gpu, batch.gradient_accumulation_steps)
    assert sizes == (24, micro, steps)
    changed = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": steps,
    }
    for key, runs_as in changed.items():
        told = [
            line for line in config.notices if line.startswith(f"{key} {keys.get(key)} runs as {runs_as}: elastic, ")
        ]
        assert len(told) == (key in keys and keys[key] != runs_as)


@pytest.mark.parametrize(
    ("keys", "processes", "words"),
    [
        ({}, 5, "train_batch_size: 24 sequences cannot be shared by 5 data-parallel ranks; start one of 1, 2, 3, 4, 6"),
        ({"model_parallel_size": 2}, 10, "by 5 data-parallel ranks; start one of 2, 4, 6, 8, 12, 16, 24, 48 processes"),
        ({"train_batch_size": None, "train_micro_batch_size_per_gpu": 4}, 1, "and is not set; add train_batch_size"),
        ({"elasticity": {"enabled": True, "max_train_batch_size": 8, "micro_batch_sizes": [1]}}, 1, "keep one"),
    ],
    ids=str,
)
def test_what_cannot_be_shared(keys: dict[str, Any], processes: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config_from_dict(ELASTIC | keys, world_size=processes)


def test_the_first_start_of_a_run_whose_checkpoint_will_know() -> None:
    keys = {"train_batch_size": None, "train_micro_batch_size_per_gpu": 4, "load": "run", "save": "run"}
    config = config_from_dict(ELASTIC | keys | {"checkpoint_factor": 1}, world_size=2)
    assert config.batch.train_batch_size == 8


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"max_restarts": 3}, "max_restarts: 3 restarts have nothing to go on from; set save"),
        ({"auto_resume": True}, "auto_resume: goes on from the checkpoints in save, which is not set"),
    ],
    ids=str,
)
def test_nothing_to_go_on_from(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config_from_dict(BASE | keys)


def test_going_on_from_save_means_all_of_the_run() -> None:
    given = {"load": "other", "save": "run", "checkpoint_factor": 1, "finetune": True, "no_load_optim": True}
    config = config_from_dict(BASE | given | {"iteration": 5}, world_size=1).going_on_from_save().with_vocabulary(512)
    found = config.checkpoint
    assert (found.load, found.iteration, found.load_fallback) == ("run", None, True)
    assert not any((found.finetune, found.no_load_optim, found.no_load_rng))
