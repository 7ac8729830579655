"""TensorBoard and Weights & Biases themselves, offline."""

from pathlib import Path

import pytest
from training.layouts import ADAMW, MODEL, TRAINING

from neox.config import config_from_dict
from neox.training.metrics.loggers import MetricLog


def log_two_steps(changes: dict[str, object]) -> None:
    config = config_from_dict(MODEL | TRAINING | ADAMW | changes)
    with MetricLog.from_config(config, rank=0) as log:
        log.log(1, {"train/lm_loss": 4.5})
        log.log(2, {"train/lm_loss": 4.25})


def test_tensorboard_reads_back(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log_two_steps({"tensorboard_dir": str(tmp_path / "board"), "log_dir": str(tmp_path), "use_wandb": False})
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/lm_loss")] == [(1, 4.5), (2, 4.25)]


def test_wandb_offline_leaves_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    log_two_steps({"use_wandb": True, "wandb_group": "tests", "log_dir": str(tmp_path)})
    runs = list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert len(runs) == 1
    assert runs[0].stat().st_size > 0
