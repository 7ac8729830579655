"""`async_save`: the same files and losses, and no failure, kill or exit that loses a checkpoint."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import kill_ranks_when, run_ranks
from training.layouts import saved_run

from neox.checkpoint.native.integrity import damages
from neox.config import config_from_dict
from neox.errors import CheckpointError, UserError


def settings(save: Path, corpus: str) -> dict[str, Any]:
    return saved_run(save, corpus, model_parallel_size=2, train_iters=7, checkpoint_factor=2)


def train(flat: dict[str, Any]) -> str:
    """Train on this rank; return the error it saw."""
    from neox.training.run import train

    torch.set_num_threads(1)
    try:
        train(config_from_dict(flat, world_size=2))
    except CheckpointError as error:
        return str(error)
    return ""


def losses(folder: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["train/lm_loss"] for record in records}


def test_the_same_losses_and_bytes(tmp_path: Path, corpus: str) -> None:
    at_once, behind = tmp_path / "at_once", tmp_path / "behind"
    assert run_ranks(train, 2, settings(at_once, corpus)) == ["", ""]
    flat = settings(behind, corpus) | {"async_save": True, "keep_last_n_checkpoints": 3}
    assert run_ranks(train, 2, flat) == ["", ""]
    assert losses(behind) == losses(at_once)
    assert (behind / "latest").read_text() == "global_step7"
    assert sorted(path.name for path in behind.glob("*global_step*")) == [f"global_step{n}" for n in (4, 6, 7)]
    for path in behind.glob("global_step*/*.safetensors"):
        assert path.read_bytes() == (at_once / path.relative_to(behind)).read_bytes()
    for folder in behind.glob("global_step*"):
        assert damages(folder) == []
        assert {path.name for path in folder.iterdir()} == {path.name for path in (at_once / folder.name).iterdir()}


def train_with_slow_disk(flat: dict[str, Any], seconds: float) -> str:
    """Train where each tensor of a checkpoint from iteration 4 on takes so long."""
    from neox.checkpoint.storage.tensor_file import TensorFileWriter

    write = TensorFileWriter.write

    def slow(writer: TensorFileWriter, name: str, tensor: torch.Tensor) -> None:
        if "global_step2" not in str(writer.path):
            time.sleep(seconds)
        write(writer, name, tensor)

    TensorFileWriter.write = slow  # type: ignore[method-assign]
    return train(flat)


def test_killed_while_it_is_written(tmp_path: Path, corpus: str) -> None:
    flat = settings(tmp_path, corpus) | {"async_save": True, "checkpoint_factor": None, "extra_save_iters": [2, 4]}
    log = tmp_path / "metrics.jsonl"

    def incomplete() -> list[Path]:
        return list(tmp_path.glob(".global_step4.*.incomplete"))

    def is_behind() -> bool:
        """Training has gone on from step 4 to step 6, and the first tensor of the checkpoint is not written yet."""
        return bool(incomplete()) and log.read_text().count("\n") >= 6

    kill_ranks_when(is_behind, train_with_slow_disk, 2, flat, 60.0)
    assert len(incomplete()) == 1
    assert (tmp_path / "latest").read_text() == "global_step2"
    assert damages(tmp_path / "global_step2") == []
    assert run_ranks(train, 2, flat | {"load": str(tmp_path)}) == ["", ""]
    assert sorted(path.name for path in tmp_path.glob("*global_step*")) == [f"global_step{n}" for n in (2, 4, 7)]


def train_with_full_disk(flat: dict[str, Any], failing_rank: int) -> str:
    """Train where one rank cannot write the checkpoint of iteration 4."""
    import neox.checkpoint.native.store as native

    writer = native.TensorFileWriter

    def fail(path: Path, *arguments: Any) -> Any:
        if "global_step4" in str(path) and int(os.environ["RANK"]) == failing_rank:
            raise OSError(28, "No space left on device", str(path))
        return writer(path, *arguments)

    native.TensorFileWriter = fail  # type: ignore[assignment, misc]
    return train(flat)


@pytest.mark.parametrize("log_interval", [1, 100], ids=["seen_at_a_step", "seen_at_the_next_save"])
def test_a_failure_ends_the_run_on_all_ranks(tmp_path: Path, corpus: str, log_interval: int) -> None:
    flat = settings(tmp_path, corpus) | {"async_save": True, "train_iters": 200, "log_interval": log_interval}
    flat |= {"checkpoint_factor": None, "extra_save_iters": [2, 4, 12], "io_retry_time": 0}
    errors = run_ranks(train_with_full_disk, 2, flat, 1)
    assert errors[0] == errors[1]
    assert "No space left on device" in errors[0]
    assert "last checkpoint is untouched" in errors[0]
    assert (tmp_path / "latest").read_text() == "global_step2"
    if log_interval == 100:
        assert not losses(tmp_path)
    else:
        assert max(losses(tmp_path)) < 200


def leave_while_saving(root: Path) -> None:
    """End as a script does after an error, with a checkpoint still being written."""
    from checkpoint.small_checkpoints import save

    from neox.launch.main import leave, script_main
    from neox.parallel.mesh import Mesh
    from neox.training.background import Background

    torch.distributed.init_process_group("gloo")

    def body(_: list[str]) -> None:
        def work(team: Any) -> None:
            time.sleep(0.5)
            save(root, 3, team=team)

        Background(Mesh()).start(work)
        raise UserError("the loss is not a number")

    leave(script_main(body, []))


def test_the_end_of_a_process_waits(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"exit codes \[2\]"):  # which is that of a UserError
        run_ranks(leave_while_saving, 1, tmp_path)
    assert (tmp_path / "latest").read_text() == "global_step3"
    assert damages(tmp_path / "global_step3") == []
