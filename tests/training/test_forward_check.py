"""`checkpoint_validation_with_forward_pass`: the same model passes at any layout, another one does not."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks import run_ranks
from training.layouts import ADAMW, MODEL, TRAINING
from training.test_monitors import metrics_of

from neox.checkpoint.native import store as native
from neox.config import config_from_dict
from neox.errors import CheckpointError
from neox.training.forward_check import TOLERANCES, check_forward
from neox.training.run import train

SMALL = MODEL | TRAINING | ADAMW | {"train_batch_size": 8, "train_iters": 4, "log_interval": 1, "checkpoint_factor": 2}
CHECK = {"checkpoint_validation_with_forward_pass": True, "hidden_dropout": 0.1}

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "small_batches": (1, {"train_micro_batch_size_per_gpu": 2, "checkpoint_activations": True}),
    "tp2_pp2": (4, {"model_parallel_size": 2, "pipe_parallel_size": 2, "gradient_accumulation_steps": 2}),
    "zero3": (2, {"zero_optimization": {"stage": 3}}),
}


def train_quietly(flat: dict[str, Any], world_size: int) -> None:
    torch.set_num_threads(1)
    train(config_from_dict(flat, world_size=world_size))


def run(folder: Path, corpus: str, layout: str, **changes: Any) -> dict[int, dict[str, float]]:
    world_size, settings = LAYOUTS[layout]
    flat = SMALL | settings | {"data_path": corpus, "save": str(folder), "load": str(folder)} | changes
    run_ranks(train_quietly, world_size, flat, world_size)
    return metrics_of(folder)


def saved_losses(folder: Path, iteration: int) -> list[float]:
    manifest = json.loads((folder / f"global_step{iteration}" / "manifest.json").read_text(encoding="utf-8"))
    losses: list[float] = manifest["forward_losses"]
    return losses


@pytest.mark.parametrize(("first", "second"), [("one", "tp2_pp2"), ("tp2_pp2", "zero3"), ("zero3", "small_batches")])
def test_the_same_model_at_another_layout(tmp_path: Path, corpus: str, first: str, second: str) -> None:
    run(tmp_path, corpus, first, **CHECK, exit_interval=2)
    before = saved_losses(tmp_path, 2)
    assert len(set(before)) == 4
    assert all(4 < loss < 6 for loss in before)  # ln 131 is 4.9
    run(tmp_path, corpus, second, **CHECK)
    assert saved_losses(tmp_path, 4) != pytest.approx(before, abs=1e-4)


def test_the_same_model_in_another_precision_or_length(tmp_path: Path, corpus: str) -> None:
    changes = CHECK | {"init_method_std": 0.2}
    run(tmp_path, corpus, "one", **changes, exit_interval=2, precision="bfloat16")
    run(tmp_path, corpus, "one", **changes, exit_interval=1, precision="fp32")
    assert len(saved_losses(tmp_path, 3)) == 4
    run(tmp_path, corpus, "one", **changes, seq_length=16)  # other sequences, which nothing can be compared with
    assert len(saved_losses(tmp_path, 4)) == 4


@pytest.mark.parametrize("layout", ["tp2_pp2", "zero3"])
def test_it_changes_nothing(tmp_path: Path, corpus: str, layout: str) -> None:
    expected = run(tmp_path / "without", corpus, layout, hidden_dropout=0.1)
    folder = tmp_path / "with"
    run(folder, corpus, layout, **CHECK, exit_interval=2)
    found = run(folder, corpus, layout, **CHECK)
    for step in range(1, 5):
        assert found[step]["train/lm_loss"] == expected[step]["train/lm_loss"]
        assert found[step]["train/grad_norm"] == expected[step]["train/grad_norm"]


def with_one_wrong_matrix(flat: dict[str, Any], world_size: int) -> str:
    """Take the run up with a matrix read wrong; what it says."""
    original = native.NativeReader.tensor

    def tensor(reader: native.NativeReader, name: str) -> torch.Tensor:
        value = original(reader, name)
        return value.flip(0) if "dense_h_to_4h" in name or "linear1.weight" in name else value

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(native.NativeReader, "tensor", tensor)
        try:
            train_quietly(flat, world_size)
        except CheckpointError as error:
            return str(error)
    return ""


def test_another_model_is_refused(tmp_path: Path, corpus: str) -> None:
    run(tmp_path, corpus, "one", **CHECK, exit_interval=2)
    flat = SMALL | {"data_path": corpus, "load": str(tmp_path)}
    (message,) = run_ranks(with_one_wrong_matrix, 1, flat | CHECK, 1)
    ours, theirs = (float(word.rstrip(";,")) for word in message.split() if word.startswith("4."))
    assert theirs == pytest.approx(saved_losses(tmp_path, 2)[0], abs=1e-6)
    assert abs(ours - theirs) > TOLERANCES["fp32"]
    assert message.startswith(f"{tmp_path / 'global_step2'}: checkpoint_validation_with_forward_pass: ")
    assert "\n" not in message
    assert run_ranks(with_one_wrong_matrix, 1, flat, 1) == [""]  # without the key nothing compares


def test_without_the_key_nothing_is_saved(tmp_path: Path, corpus: str) -> None:
    run(tmp_path, corpus, "one", exit_interval=2)
    assert saved_losses(tmp_path, 2) == []
    run(tmp_path, corpus, "one", **CHECK)  # a checkpoint without losses loads all the same
    assert len(saved_losses(tmp_path, 4)) == 4


@pytest.mark.parametrize(
    ("losses", "length", "why"),
    [([], 16, "it was saved without"), ([1.0], 32, "its sequences have 32 tokens, and seq_length is 16")],
    ids=["without", "longer"],
)
def test_a_checkpoint_that_cannot_be_compared_is_said_to_be(
    losses: list[float], length: int, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_from_dict(SMALL | CHECK | {"seq_length": 16})
    manifest = SimpleNamespace(forward_losses=losses, config={"seq_length": length})
    engine = SimpleNamespace(config=config, mesh=SimpleNamespace(rank=0))
    check_forward(engine, SimpleNamespace(manifest=manifest, folder="run"))  # type: ignore[arg-type]
    line = f"checkpoint_validation_with_forward_pass: run is not compared: {why}\n"
    assert capsys.readouterr().err == line
