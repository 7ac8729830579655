"""Bad steps, in real runs over gloo: left out, passed over, gone back over, or the end."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks
from training.layouts import saved_run
from training.poison import Poison, figures, same, skips, tensors, train_poisoned
from training.preferences import MODEL as PREFERENCES
from training.preferences import pairs

from neox.checkpoint.native.manifest import Manifest
from neox.config import config_from_dict
from neox.training.guards.left_out import order_of

NAN, LARGE = float("nan"), 20.0
OFFLOAD = {"stage": 3, "offload_optimizer": {"device": "cpu"}}
FP16 = {"enabled": True, "initial_scale_power": 6, "hysteresis": 1}

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "zero0": (1, {}),
    "zero0_dp2": (2, {}),
    "zero1_dp2_bf16": (2, {"zero_optimization": {"stage": 1}, "precision": "bfloat16"}),
    "zero2_dp2": (2, {"zero_optimization": {"stage": 2}}),
    "zero3_dp2": (2, {"zero_optimization": {"stage": 3}}),
    "zero3_dp2_fp16": (2, {"zero_optimization": {"stage": 3}, "precision": "fp16", "fp16": FP16}),
    "zero1_offload": (1, {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}),
    "zero2_offload_bf16": (
        1,
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}, "precision": "bfloat16"},
    ),
    "pp2": (2, {"pipe_parallel_size": 2}),
    "pp2_bf16": (2, {"pipe_parallel_size": 2, "precision": "bfloat16"}),
    "tp2_dp2": (4, {"model_parallel_size": 2, "zero_optimization": {"stage": 1}}),
}


def settings(save: Path, corpus: str) -> dict[str, Any]:
    return saved_run(save, corpus, gradient_accumulation_steps=2, extra_save_iters=[100])


def progress(folder: Path) -> Any:
    return Manifest.read(folder).progress


STEADY = {"train_iters": 6, "hidden_dropout": 0.0, "lr_decay_style": "constant", "warmup": 0.0}


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory, corpus: str) -> dict[int, float]:
    """Losses of a run that never reads the third and the fourth batch."""
    flat = settings(tmp_path_factory.mktemp("healthy") / "run", corpus) | STEADY
    leave_out_by_hand(flat, 1, [32, 64])
    run_ranks(train_poisoned, 1, flat, 1, {})
    return figures(Path(flat["save"]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_left_out_changes_nothing(tmp_path: Path, corpus: str, healthy: dict[int, float], layout: str) -> None:
    """Saved before and after two bad steps: weights, masters and moments are equal, and what follows is as without."""
    world_size, changes = LAYOUTS[layout]
    actions = {"on_bad_loss": "skip", "gradient_norm_limit": 10.0, "on_large_gradient": "skip"}
    is_fp16 = changes.get("precision") == "fp16"
    poison = {"3": LARGE, "4": LARGE if is_fp16 else NAN}
    flat = settings(tmp_path, corpus) | changes | STEADY | actions | {"extra_save_iters": [2, 4]}
    assert set(run_ranks(train_poisoned, world_size, flat, world_size, poison)) == {""}

    before, bad = (tensors(tmp_path / f"global_step{n}") for n in (2, 4))
    assert {key.split("/")[0] for key in before} == {"model", "optimizer", "random"}
    assert same(before, bad)
    losses, precision = figures(tmp_path), {"bfloat16": 2e-2, "fp16": 2e-3}.get(changes.get("precision", ""), 2e-5)
    assert [losses[step] for step in (1, 2, 5, 6)] == pytest.approx([healthy[n] for n in range(1, 5)], rel=precision)

    first, second = progress(tmp_path / "global_step2"), progress(tmp_path / "global_step4")
    assert (second.schedule_step, second.optimizer_step) == (first.schedule_step, first.optimizer_step)
    assert second.loss_scaler == first.loss_scaler
    assert bool(second.loss_scaler) == is_fp16
    assert figures(tmp_path, "train/skipped_iterations") == {1: 0, 2: 0, 3: 1, 4: 1, 5: 0, 6: 0}
    entries = skips(tmp_path)
    assert [(entry["iteration"], entry["samples"]) for entry in entries] == [(3, [32, 48]), (4, [48, 64])]
    assert "gradient norm" in entries[0]["reason"]
    assert is_fp16 or "loss nan" in entries[1]["reason"]
    assert [origin["place"] for origin in entries[0]["origins"]] == list(range(32, 48))
    assert all(origin["documents"] and origin["dataset"] == corpus for origin in entries[0]["origins"])


def test_preference_training_is_guarded_too(tmp_path: Path) -> None:
    flat = PREFERENCES | pairs(tmp_path) | {"train_impl": "dpo", "train_iters": 4, "save": str(tmp_path / "run")}
    guards = {"on_bad_loss": "skip", "extra_save_iters": [2, 3]}
    assert run_ranks(spoil_objective, 2, flat | guards, 2, 3) == ["", ""]
    before, bad, after = (tensors(tmp_path / "run" / f"global_step{n}") for n in (2, 3, 4))
    assert same(before, bad)
    assert not same(bad, after)
    (entry,) = skips(tmp_path / "run")
    assert "pos_document" in entry["origins"][0]["dataset"]


def spoil_objective(flat: dict[str, Any], world_size: int, iteration: int) -> str:
    """Train on pairs where one rank has a loss of NaN in this iteration."""
    from neox.training.objectives.dpo import DirectPreference

    healthy, calls = DirectPreference.__call__, []

    def spoilt(self: Any, model: Any, inputs: Any) -> Any:
        loss, figures = healthy(self, model, inputs)
        calls.append(loss)
        return loss * (NAN if len(calls) == iteration and os.environ["RANK"] == "0" else 1.0), figures

    DirectPreference.__call__ = spoilt  # type: ignore[method-assign]
    return train_poisoned(flat, world_size, {})


def leave_out_by_hand(flat: dict[str, Any], world_size: int, *ranges: list[int]) -> None:
    """Write what a run that had found bad data itself would have written."""
    folder = Path(flat["save"])
    folder.mkdir()
    order = order_of(config_from_dict(flat, world_size=world_size))
    (folder / "left_out.json").write_text(json.dumps({"order": order, "left_out": ranges}))


REWINDS: dict[str, tuple[int, dict[str, Any]]] = {
    "zero0": (1, {"num_workers": 1, "rampup_batch_size": [8, 8, 32]}),
    "zero2_dp2_bf16": (2, {"zero_optimization": {"stage": 2}, "precision": "bfloat16", "async_save": True}),
    "zero3_dp2": (2, {"zero_optimization": {"stage": 3}}),
    "pp2_bf16": (2, {"pipe_parallel_size": 2, "precision": "bfloat16"}),
    "tp2_dp2_fp16": (4, {"model_parallel_size": 2, "precision": "fp16", "fp16": FP16}),
    "adam8bit": (1, {"optimizer": {"type": "adam8bit", "params": {"lr": 3e-3}}}),
    "sm3": (1, {"optimizer": {"type": "SM3", "params": {"lr": 3e-2}}}),
    "muon": (1, {"optimizer": {"type": "Muon", "params": {"lr": 3e-3}}, "zero_optimization": {"stage": 1}}),
    "lora_zero3_offload": (1, {"lora": {"rank": 4}, "zero_optimization": OFFLOAD}),
}


@pytest.mark.parametrize("layout", REWINDS)
def test_a_rewind_leaves_the_data_out_and_nothing_else(tmp_path: Path, corpus: str, layout: str) -> None:
    """Two rewinds, to the start and to a checkpoint, end where a run ends that never read the data."""
    world_size, changes = REWINDS[layout]
    action = {"gradient_norm_limit": 10.0, "on_large_gradient": "rewind", "on_bad_loss": "rewind"}
    common = changes | {"train_iters": 6, "extra_save_iters": [3]}
    flat = settings(tmp_path / "rewound", corpus) | common | action
    by_hand = settings(tmp_path / "by_hand", corpus) | common
    windows = [[16, 24], [64, 80]] if "rampup_batch_size" in changes else [[16, 32], [80, 96]]
    poison = {windows[0][0] + 5: 60.0, windows[1][0] + 5: NAN if "lora" in layout else 60.0}
    leave_out_by_hand(by_hand, world_size, *windows)
    assert set(run_ranks(train_poisoned, world_size, flat, world_size, poison)) == {""}
    assert set(run_ranks(train_poisoned, world_size, by_hand, world_size, {})) == {""}

    rewound, expected = Path(flat["save"]), Path(by_hand["save"])
    entries = skips(rewound)
    assert [entry["samples"] for entry in entries] == windows
    assert ["back to iteration 0" in entries[0]["action"], "back to iteration 3" in entries[1]["action"]] == [True] * 2
    assert figures(rewound, "train/rewinds") == {entries[0]["iteration"]: 1, entries[1]["iteration"]: 2}
    assert figures(rewound) == figures(expected)
    for step in (3, 6):
        assert same(tensors(rewound / f"global_step{step}"), tensors(expected / f"global_step{step}"))
        first, second = progress(rewound / f"global_step{step}"), progress(expected / f"global_step{step}")
        assert replace(first, left_out=[]) == replace(second, left_out=[])
    assert progress(rewound / "global_step6").left_out == windows
    assert json.loads((rewound / "left_out.json").read_text())["left_out"] == windows


def train_with(
    flat: dict[str, Any], factors: dict[int | str, float], iteration: int, act: Callable[[Path], None]
) -> str:
    """Train on one rank, where something happens in an iteration."""
    healthy = Poison.for_step

    def for_step(self: Poison, loader: Any, progress: Any) -> Any:
        if progress.iteration + 1 == iteration:
            act(Path(flat["save"]))
        return healthy(self, loader, progress)

    Poison.for_step = for_step  # type: ignore[method-assign]
    return train_poisoned(flat, 1, factors)


def ask_to_end(_: Path) -> None:
    signal.raise_signal(signal.SIGTERM)


def lose_checkpoints(save: Path) -> None:
    for folder in save.glob("global_step*"):
        shutil.rmtree(folder)


def test_asked_to_end_in_the_step_that_goes_back_to_the_start(tmp_path: Path, corpus: str) -> None:
    """A signal of the first step ends the run after the second, which leads back: nothing is there to be saved."""
    flat = settings(tmp_path, corpus) | {"on_bad_loss": "rewind", "train_iters": 6}
    assert run_ranks(train_with, 1, flat, {"2": NAN}, 1, ask_to_end) == [""]
    assert list(tmp_path.glob("global_step*")) == []
    told = (tmp_path / "logs" / "ranks" / "rank-00000.log").read_text()
    assert "SIGTERM: ended at iteration 0 of 6, where the run went back to; nothing new to save\n" in told


def test_a_rewind_without_its_checkpoint_ends_in_one_line(tmp_path: Path, corpus: str) -> None:
    flat = settings(tmp_path, corpus) | {"on_bad_loss": "rewind", "train_iters": 4, "extra_save_iters": [1]}
    (error,) = run_ranks(train_with, 1, flat, {"2": NAN}, 2, lose_checkpoints)
    assert error == f"{tmp_path}/global_step1: no such checkpoint; {tmp_path} has: none"


def test_a_batch_left_out_is_passed_over_after_a_crash(tmp_path: Path, corpus: str) -> None:
    """At another layout and from a checkpoint before the decision, by the file beside the checkpoints alone."""
    common = {"train_iters": 6, "extra_save_iters": [2], "hidden_dropout": 0.0}
    flat = settings(tmp_path / "run", corpus) | common | {"on_bad_loss": "skip_batch"}
    by_hand = settings(tmp_path / "by_hand", corpus) | common
    leave_out_by_hand(by_hand, 1, [48, 64])
    run_ranks(train_poisoned, 1, by_hand, 1, {})
    assert run_ranks(train_poisoned, 1, flat, 1, {50: NAN}) == [""]
    run = Path(flat["save"])
    assert progress(run / "global_step6").left_out == [[48, 64]]
    assert progress(run / "global_step2").left_out == []
    assert figures(run)[5] != figures(Path(by_hand["save"]))[5]  # it computed the batch, and left out an update

    elsewhere = {"zero_optimization": {"stage": 1}, "gradient_accumulation_steps": 1}
    again = flat | elsewhere | {"load": str(run), "iteration": 2}
    assert run_ranks(train_poisoned, 2, again, 2, {50: NAN}) == ["", ""]
    assert len(skips(run)) == 1
    resumed, expected = figures(run), figures(Path(by_hand["save"]))
    assert resumed == pytest.approx(expected, rel=2e-5)
    assert progress(run / "global_step6").consumed_samples == 112


def test_a_spike_is_seen_alike_by_a_run_that_was_taken_up(tmp_path: Path, corpus: str) -> None:
    spikes = {"loss_spike_deviations": 6.0, "loss_spike_window": 8, "on_loss_spike": "skip", "gradient_clipping": 1.0}
    flat = settings(tmp_path, corpus) | spikes | {"train_iters": 10, "extra_save_iters": [8]}
    poison = {"9": 5.0}
    assert run_ranks(train_poisoned, 1, flat, 1, poison) == [""]
    losses, (entry,) = figures(tmp_path), skips(tmp_path)
    assert entry["iteration"] == 9
    assert progress(tmp_path / "global_step8").recent_losses == [losses[n] for n in range(1, 9)]
    kept = progress(tmp_path / "global_step10").recent_losses
    assert kept == [losses[n] for n in (*range(2, 9), 10)]

    again = flat | {"load": str(tmp_path), "iteration": 8}
    assert run_ranks(train_poisoned, 1, again, 1, poison) == [""]
    first, second = skips(tmp_path)
    assert first | {"time": 0} == second | {"time": 0}
    assert progress(tmp_path / "global_step10").recent_losses == kept


@pytest.mark.parametrize("precision", ["fp32", "bfloat16"])
def test_no_checkpoint_holds_what_a_bad_step_left(tmp_path: Path, corpus: str, precision: str) -> None:
    """With default settings the run ends before the save that follows, though no report is due."""
    flat = settings(tmp_path, corpus) | {"precision": precision, "checkpoint_factor": 3, "log_interval": 100}
    (error,) = run_ranks(train_poisoned, 1, flat, 1, {"5": NAN})
    assert error.startswith("iteration 5: loss nan (on_bad_loss: stop); samples 64 to 79; no checkpoint was saved")
    assert sorted(path.name for path in tmp_path.glob("*global_step*")) == ["global_step3"]
    assert all(value.float().isfinite().all() for value in tensors(tmp_path / "global_step3").values())


def test_bad_steps_end_where_there_are_too_many(tmp_path: Path, corpus: str) -> None:
    flat = settings(tmp_path / "skips", corpus) | {"on_bad_loss": "skip_batch", "max_skips": 2}
    always = {str(iteration): NAN for iteration in range(3, 20)}
    (error,) = run_ranks(train_poisoned, 1, flat, 1, always)
    assert error.startswith("iteration 5: loss nan (on_bad_loss: skip_batch); the 2 steps before it were left out too")
    assert [entry["samples"] for entry in skips(tmp_path / "skips")] == [[32, 48], [48, 64]]

    flat = settings(tmp_path / "rewinds", corpus) | {"on_bad_loss": "rewind", "max_skips": 2, "extra_save_iters": [1]}
    (error,) = run_ranks(train_poisoned, 1, flat, 1, always)
    assert error.startswith("iteration 3: loss nan (on_bad_loss: rewind); went back 2 times")
    windows = [entry["samples"] for entry in skips(tmp_path / "rewinds")]
    assert windows == [[32, 48], [48, 64]]


def test_fp16_ends_where_its_scale_cannot_fall(tmp_path: Path, corpus: str) -> None:
    """DeepSpeed leaves out what overflows and lowers the scale, until it is at its smallest."""
    scale = {"enabled": True, "initial_scale_power": 2, "hysteresis": 1, "min_loss_scale": 1}
    flat = settings(tmp_path, corpus) | {"precision": "fp16", "fp16": scale}
    always = {str(iteration): NAN for iteration in range(2, 20)}
    (error,) = run_ranks(train_poisoned, 1, flat, 1, always)
    assert error.startswith("iteration 4: loss nan (on_bad_loss: stop)")
    assert figures(tmp_path, "train/loss_scale")[3] == 1.0
    assert skips(tmp_path) == []
