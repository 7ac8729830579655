"""The `scheduler` section: step by step what DeepSpeed's own classes give, in the closed form and in a run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime import lr_schedules
from ranks import run_ranks
from training.layouts import ADAMW, MODEL, SGD, TRAINING
from training.test_monitors import metrics_of

from neox.config import Config, config_from_dict
from neox.config.__main__ import main
from neox.errors import CheckpointError, ConfigError
from neox.training.engine import Engine
from neox.training.run import train
from neox.training.schedule import LRSchedule

LR, BETAS = 3e-3, [0.9, 0.95]
BASE = MODEL | TRAINING | {"optimizer": {"type": "AdamW", "params": {"lr": LR, "betas": BETAS}}, "train_iters": 40}
TOTAL = {"total_num_steps": 30}
CYCLE = {"cycle_min_lr": 1e-4, "cycle_max_lr": 1e-2}
SCHEDULERS: list[tuple[str, dict[str, Any]]] = [
    ("WarmupLR", {"warmup_num_steps": 10}),
    ("WarmupLR", {"warmup_num_steps": 1, "warmup_max_lr": 2e-3, "warmup_type": "linear"}),
    ("WarmupLR", {"warmup_num_steps": 7, "warmup_min_lr": 1e-4, "warmup_max_lr": 5e-3, "warmup_type": "linear"}),
    ("WarmupDecayLR", TOTAL | {"warmup_num_steps": 10, "warmup_max_lr": 6e-4}),
    ("WarmupDecayLR", TOTAL | {"warmup_num_steps": 8, "warmup_min_lr": 1e-5, "warmup_type": "linear"}),
    ("WarmupDecayLR", {"total_num_steps": 5, "warmup_num_steps": 8}),
    ("WarmupCosineLR", TOTAL | {"warmup_num_steps": 10}),
    ("WarmupCosineLR", TOTAL | {"warmup_num_steps": 6, "warmup_min_ratio": 0.1, "cos_min_ratio": 0.05}),
    ("WarmupCosineLR", {"total_num_steps": 4, "warmup_num_steps": 9, "warmup_type": "linear"}),
    ("OneCycle", CYCLE | {"cycle_first_step_size": 10}),
    ("OneCycle", CYCLE | {"cycle_first_step_size": 7, "cycle_second_step_size": 12, "cycle_momentum": False}),
    ("OneCycle", CYCLE | {"cycle_first_step_size": 8, "cycle_second_step_size": 0, "cycle_min_mom": 0.5}),
    (
        "OneCycle",
        CYCLE
        | {"cycle_first_step_size": 9, "cycle_second_step_size": 11, "cycle_first_stair_count": 3}
        | {"cycle_second_stair_count": 4, "decay_step_size": 5, "decay_lr_rate": 0.5, "decay_mom_rate": -0.1},
    ),
    ("OneCycle", CYCLE | {"cycle_first_step_size": 10, "cycle_first_stair_count": 5, "decay_step_size": 3}),
    ("LRRangeTest", {"lr_range_test_min_lr": 1e-5, "lr_range_test_step_size": 4, "lr_range_test_step_rate": 2.5}),
    ("LRRangeTest", {"lr_range_test_step_size": 6, "lr_range_test_staircase": True}),
]
NAMES = [f"{name}-{number}" for number, (name, _) in enumerate(SCHEDULERS)]


def config_of(name: str, params: dict[str, Any], **changes: Any) -> Config:
    return config_from_dict(BASE | {"scheduler": {"type": name, "params": params}} | changes)


def deepspeeds(name: str, params: dict[str, Any], steps: int) -> list[tuple[float, tuple[float, float]]]:
    """Rate and betas that each step uses with DeepSpeed's class."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=LR, betas=(0.9, 0.95))
    scheduler = getattr(lr_schedules, name)(optimizer, **params)
    group, used = optimizer.param_groups[0], []
    for _ in range(steps):
        used.append((float(group["lr"]), tuple(group["betas"])))
        scheduler.step()
    return used


@pytest.mark.parametrize(("name", "params"), SCHEDULERS, ids=NAMES)
def test_every_step_is_deepspeeds(name: str, params: dict[str, Any]) -> None:
    run = LRSchedule.from_config(config_of(name, params))
    expected = deepspeeds(name, params, 60)
    assert len({rate for rate, _ in expected}) > 2
    for step, (rate, betas) in enumerate(expected):
        assert run.lr_at(step) == pytest.approx(rate, rel=1e-12, abs=1e-18), step
        assert (run.betas_at(step) or tuple(BETAS)) == pytest.approx(betas, rel=1e-12), step


@pytest.mark.parametrize(("name", "params"), SCHEDULERS, ids=NAMES)
def test_a_checkpoint_goes_on_with_it(name: str, params: dict[str, Any]) -> None:
    run = LRSchedule.from_config(config_of(name, params))
    saved = json.loads(json.dumps(run.state_dict(12)))
    choice = {"override_lr_scheduler": False, "use_checkpoint_lr_scheduler": False}
    assert run.reconcile(saved, **choice) == run
    ours = LRSchedule.from_config(config_from_dict(BASE))
    assert ours.reconcile(saved, **choice | {"use_checkpoint_lr_scheduler": True}) == run
    assert ours.reconcile(saved, **choice | {"override_lr_scheduler": True}) == ours
    with pytest.raises(CheckpointError, match=f"decay_style is cosine in the config, {name} in the checkpoint"):
        ours.reconcile(saved, **choice)


def test_a_checkpoint_of_other_parameters_is_refused() -> None:
    saved = LRSchedule.from_config(config_of("WarmupLR", {"warmup_num_steps": 10})).state_dict(3)
    choice = {"override_lr_scheduler": False, "use_checkpoint_lr_scheduler": False}
    other = LRSchedule.from_config(config_of("WarmupLR", {"warmup_num_steps": 11}))
    with pytest.raises(
        CheckpointError, match=r"scheduler_params is \{.*11.*\} in the config, .*10.* in the checkpoint"
    ):
        other.reconcile(saved, **choice)


class Watched:
    """Rate and betas that the optimizer was given for each step of this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.used: list[tuple[float, tuple[float, float]]] = []
        original = Engine.set_learning_rate

        def watch(engine: Engine, learning_rate: float, betas: Any = None) -> None:
            original(engine, learning_rate, betas)
            group = engine.deepspeed.optimizer.param_groups[0]
            self.used.append((group["lr"], tuple(group["betas"])))

        monkeypatch.setattr(Engine, "set_learning_rate", watch)


def train_watched(flat: dict[str, Any], world_size: int) -> list[tuple[float, tuple[float, float]]]:
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as monkeypatch:
        watched = Watched(monkeypatch)
        train(config_from_dict(flat, world_size=world_size))
    return watched.used


ENGINES: dict[str, tuple[int, dict[str, Any]]] = {
    "zero2": (2, {"zero_optimization": {"stage": 2}}),
    "pipeline": (2, {"pipe_parallel_size": 2}),
}


@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_uses_it_and_resumes_with_it(tmp_path: Path, corpus: str, engine: str) -> None:
    world_size, changes = ENGINES[engine]
    params = CYCLE | {"cycle_first_step_size": 4, "cycle_second_step_size": 2}
    flat = MODEL | TRAINING | ADAMW | changes | {"data_path": corpus, "train_batch_size": 8, "train_iters": 8}
    flat |= {"scheduler": {"type": "onecycle", "params": params}, "log_interval": 1, "checkpoint_factor": 3}
    flat |= {"save": str(tmp_path), "load": str(tmp_path)}
    used = run_ranks(train_watched, world_size, flat | {"exit_interval": 3}, world_size)[-1]
    assert len(used) == 3
    used += run_ranks(train_watched, world_size, flat, world_size)[-1]
    expected = deepspeeds("OneCycle", params, 8)
    assert [rate for rate, _ in used] == pytest.approx([rate for rate, _ in expected], rel=1e-12)
    assert [betas for _, betas in used] == [pytest.approx(betas, rel=1e-12) for _, betas in expected]
    metrics = metrics_of(tmp_path)
    assert [metrics[step]["train/learning_rate"] for step in range(1, 9)] == [rate for rate, _ in used]


def test_what_has_no_effect_is_named() -> None:
    config = config_of("OneCycle", CYCLE, warmup=0.02, lr_decay_style="cosine", min_lr=1e-5)
    assert list(config.notices) == [
        "lr_decay_style, min_lr, warmup, optimizer.params.lr have no effect: scheduler OneCycle sets the learning rate",
        "optimizer.params.betas has no effect: scheduler OneCycle moves the first; the second is 0.99",
    ]
    cosine = config_from_dict(MODEL | ADAMW | {"scheduler": {"type": "WarmupCosineLR", "params": TOTAL}})
    assert list(cosine.notices) == []
    sgd = config_of("OneCycle", CYCLE | {"cycle_momentum": True}, **SGD)
    assert sgd.notices[-1] == "scheduler.params.cycle_momentum has no effect: sgd has no betas"
    assert LRSchedule.from_config(sgd).betas_at(5) is None


def test_the_resolved_keys_give_it_again() -> None:
    config = config_of("OneCycle", CYCLE | {"cycle_first_step_size": "1e1"})
    again = config_from_dict(config.to_flat(resolved=True))
    assert again.schedule == config.schedule
    assert config.schedule.scheduler is not None
    assert config.schedule.scheduler["params"]["cycle_second_step_size"] == 10.0


def test_it_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.yml"
    file.write_text(json.dumps(BASE | {"scheduler": {"type": "OneCycle", "params": CYCLE}}))
    assert main(["schedule", str(file)]) == 0
    assert (
        "learning rate: OneCycle, peak 0.000293, first 0.0001, last 0.000293, 40 iterations" in capsys.readouterr().out
    )


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"params": {}}, "scheduler.type: not set; add one of WarmupLR, WarmupDecayLR, WarmupCosineLR, OneCycle"),
    ({"type": "StepLR"}, "scheduler.type: 'StepLR' is unknown; supported: WarmupLR"),
    ({"type": "WarmupLR", "param": {}}, "scheduler.param: unknown key; did you mean 'params'?"),
    ({"type": "WarmupLR", "params": [1]}, r"scheduler.params: expected a mapping, got \[1\]"),
    ({"type": "WarmupDecayLR"}, "scheduler.params: WarmupDecayLR needs total_num_steps, and it is not set; add it"),
    (
        {"type": "WarmupLR", "params": {"warmup_steps": 3}},
        "scheduler.params.warmup_steps: unknown argument of WarmupLR; did you mean 'warmup_num_steps'?",
    ),
    ({"type": "WarmupLR", "params": {"warmup_num_steps": 0}}, "warmup_num_steps: expected more than 0, got 0"),
    ({"type": "WarmupLR", "params": {"warmup_num_steps": "many"}}, "expected an integer, got 'many'"),
    ({"type": "WarmupLR", "params": {"warmup_type": "cosine"}}, "expected 'log' or 'linear', got 'cosine'"),
    ({"type": "WarmupLR", "params": {"warmup_max_lr": [1, 2]}}, r"got \[1, 2\]; one value for all parameters"),
    ({"type": "WarmupLR", "params": {"warmup_max_lr": -1}}, "expected at least 0, got -1"),
    ({"type": "OneCycle", "params": CYCLE | {"cycle_max_mom": 1}}, "cycle_max_mom: expected 0 to below 1, got 1"),
    (
        {"type": "OneCycle", "params": CYCLE | {"cycle_first_step_size": 2, "decay_step_size": 1, "decay_mom_rate": 1}},
        "decay_mom_rate: 1 takes the momentum to 33.3 by iteration 40; lower it",
    ),
]


@pytest.mark.parametrize(("section", "words"), MISTAKES)
def test_mistakes_are_one_line(section: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        config_from_dict(BASE | {"scheduler": section})
    assert "\n" not in str(error.value)
