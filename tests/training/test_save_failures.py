"""When one rank cannot write, all ranks say so and the last checkpoint stays."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from training.layouts import ADAMW, MODEL, TRAINING

from neox.checkpoint.native.integrity import damages
from neox.config import config_from_dict
from neox.errors import CheckpointError


def train_with_a_full_disk(
    flat: dict[str, Any], world_size: int, failing_rank: int, failing_step: str, times: int = 1000
) -> str:
    """Train with a disk that is full for one rank from iteration 3 on; return the error this rank saw."""
    import neox.checkpoint.native.store as native
    import neox.patience
    from neox.training.run import train

    torch.set_num_threads(1)
    neox.patience.FIRST_PAUSE = 0.01
    original, left = getattr(native, failing_step), [None] * times

    def fail(*args: Any, **kwargs: Any) -> Any:
        target = str(next(arg for arg in args if isinstance(arg, Path)))
        if "global_step4" in target and int(os.environ["RANK"]) == failing_rank and left:
            left.pop()
            raise OSError(28, "No space left on device", target)
        return original(*args, **kwargs)

    setattr(native, failing_step, fail)
    try:
        train(config_from_dict(flat, world_size=world_size))
    except CheckpointError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("failing_rank", "failing_step"),
    [(1, "TensorFileWriter"), (0, "TensorFileWriter"), (0, "write_whole"), (0, "begin")],
)
def test_a_full_disk_is_one_line_on_every_rank(
    tmp_path: Path, corpus: str, failing_rank: int, failing_step: str
) -> None:
    save = {"save": str(tmp_path), "checkpoint_factor": 2, "train_iters": 6, "data_path": corpus}
    flat = MODEL | TRAINING | ADAMW | save | {"model_parallel_size": 2, "io_retry_time": 0}
    errors = run_ranks(train_with_a_full_disk, 2, flat, 2, failing_rank, failing_step)
    assert errors[0] == errors[1]
    assert "No space left on device" in errors[0]
    assert "last checkpoint is untouched" in errors[0]
    assert (tmp_path / "latest").read_text() == "global_step2"
    assert json.loads((tmp_path / "global_step2" / "manifest.json").read_text())["progress"]["iteration"] == 2
    assert not (tmp_path / "global_step4").exists()


@pytest.mark.parametrize("async_save", [False, True])
def test_a_disk_that_recovers_costs_nothing(tmp_path: Path, corpus: str, async_save: bool) -> None:
    save = {"save": str(tmp_path), "checkpoint_factor": 1, "train_iters": 5, "data_path": corpus}
    save |= {"async_save": async_save, "keep_last_n_checkpoints": 2, "io_retry_time": "0:01:00"}
    flat = MODEL | TRAINING | ADAMW | save | {"model_parallel_size": 2}
    assert run_ranks(train_with_a_full_disk, 2, flat, 2, 1, "TensorFileWriter", 3) == ["no error"] * 2
    assert sorted(path.name for path in tmp_path.glob("*global_step*")) == ["global_step4", "global_step5"]
    assert damages(tmp_path / "global_step4") == []
    assert (tmp_path / "latest").read_text() == "global_step5"
