"""With `determinism: true` the same run gives the same bits, in losses and in everything a checkpoint holds."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from training.layouts import ADAMW, MODEL, TRAINING
from training.test_resume import figures

from neox.config import config_from_dict
from neox.errors import ConfigError
from neox.training.determinism import determinism

STEPS = 3
DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
CHANGES = {"determinism": True, "train_iters": STEPS, "log_interval": 1, "extra_save_iters": [2], "num_workers": 1}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tensor 2, data 2": (4, {"model_parallel_size": 2}),
    "pipeline 2": (2, {"pipe_parallel_size": 2, "precision": "bfloat16", "no_weight_tying": False}),
}


def train_and_tell(flat: dict[str, Any], world_size: int) -> dict[str, Any]:
    """Train; return what the libraries were told while the steps ran."""
    torch.set_num_threads(1)
    from neox.training import run

    told: dict[str, Any] = {}
    start = run.start_or_resume

    def start_and_look(*args: Any) -> Any:
        told.update(
            algorithms=torch.are_deterministic_algorithms_enabled(),
            only_warns=torch.is_deterministic_algorithms_warn_only_enabled(),
            compiler=torch._inductor.config.deterministic,
            cudnn=(torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark),
            variables={name: os.environ.get(name) for name in ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO")},
        )
        engine, *rest = start(*args)
        told["embeddings"] = {getattr(m, "deterministic_mode", None) for m in engine.deepspeed.module.modules()} - {
            None
        }
        return engine, *rest

    run.start_or_resume = start_and_look  # type: ignore[assignment]
    run.train(config_from_dict(flat, world_size=world_size))
    return told


def checksums(folder: Path) -> dict[str, Any]:
    """Of every tensor, by checkpoint and name: weights, masters, moments, random streams."""
    found = {}
    for manifest in sorted(folder.glob("global_step*/manifest.json")):
        for name, entry in json.loads(manifest.read_text())["tensors"].items():
            found[f"{manifest.parent.name} {name}"] = entry["checksum"]
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_bits_again(tmp_path: Path, corpus: str, layout: str) -> None:
    world_size, changes = LAYOUTS[layout]
    flat = MODEL | TRAINING | ADAMW | DROPOUT | CHANGES | {"data_path": corpus} | changes
    told = [run_ranks(train_and_tell, world_size, flat | {"save": str(tmp_path / run)}, world_size) for run in "ab"]
    losses = figures(tmp_path / "a")
    assert [step for step, name in losses if name == "train/lm_loss"] == list(range(1, STEPS + 1))
    assert figures(tmp_path / "b") == losses
    sums = checksums(tmp_path / "a")
    assert len(sums) > 100
    assert checksums(tmp_path / "b") == sums
    expected = {
        "algorithms": True,
        "only_warns": False,
        "compiler": True,
        "cudnn": (True, False),
        "variables": {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "^NVLS,NVLSTree"},
        "embeddings": {True} if "model_parallel_size" in changes else set(),
    }
    assert [*told[0], *told[1]] == [expected] * (2 * world_size)


def config(**changes: Any) -> Any:
    return config_from_dict(MODEL | TRAINING | ADAMW | changes, world_size=1)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO"):
        monkeypatch.setenv(name, "")  # so that it is put back, whatever the code does
        monkeypatch.delenv(name)
    return monkeypatch


def test_operation_without_a_fixed_order_is_named(environment: pytest.MonkeyPatch) -> None:
    refused = pytest.raises(ConfigError, match=r"^determinism: put_ has no kernel here .*; set determinism: false")
    with refused, determinism(config(determinism=True)):
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2))
    assert not torch.are_deterministic_algorithms_enabled()
    torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2))


def test_cublas_is_named(environment: pytest.MonkeyPatch) -> None:
    # What torch 2.13 says where the variable is missing, shortened.
    text = "Deterministic behavior was enabled with either `torch.use_deterministic_algorithms(True)` or ..., but"
    refused = pytest.raises(ConfigError, match=r"^determinism: a matrix product of cuBLAS has no kernel")
    with refused, determinism(config(determinism=True)):
        raise RuntimeError(text)


def test_other_failures_pass(environment: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match=r"^out of luck$"), determinism(config(determinism=True)):
        raise RuntimeError("out of luck")


def test_nothing_is_set_without_the_key(environment: pytest.MonkeyPatch) -> None:
    with determinism(config()):
        assert not torch.are_deterministic_algorithms_enabled()
        assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ


@pytest.mark.parametrize(
    ("name", "value"), [("CUBLAS_WORKSPACE_CONFIG", ":0:0"), ("NCCL_ALGO", "NVLS"), ("NCCL_ALGO", "Ring,NVLSTree")]
)
def test_environment_that_contradicts(environment: pytest.MonkeyPatch, name: str, value: str) -> None:
    environment.setenv(name, value)
    refused = pytest.raises(ConfigError, match=f"^determinism: {name} is '{value}'")
    with refused, determinism(config(determinism=True)):
        raise AssertionError("it must not begin")


@pytest.mark.parametrize(("name", "value"), [("CUBLAS_WORKSPACE_CONFIG", ":16:8"), ("NCCL_ALGO", "Tree")])
def test_environment_that_fits_stays(environment: pytest.MonkeyPatch, name: str, value: str) -> None:
    environment.setenv(name, value)
    with determinism(config(determinism=True)):
        assert os.environ[name] == value
