"""A run killed with SIGKILL and taken up by new processes goes on bitwise as if nothing had happened."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import kill_ranks_when, run_ranks
from training.layouts import ADAMW, MODEL, TRAINING, write_corpus

STEPS, SAVED, KILLED = 9, 4, 6

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one_process": (1, {}),
    "tp2_pp2": (4, {"model_parallel_size": 2, "pipe_parallel_size": 2}),
    "tp2_sp": (2, {"model_parallel_size": 2, "sequence_parallel": True}),
    "zero3_dp2": (2, {"zero_optimization": {"stage": 3}}),
    "zero1_dp2_bf16": (2, {"zero_optimization": {"stage": 1}, "precision": "bfloat16"}),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("sources")
    return {
        "train_data_paths": [
            write_corpus(folder / "first_text_document", documents=30),
            write_corpus(folder / "second_text_document", documents=30, first=30),
        ],
        "train_data_weights": [0.7, 0.3],
        "valid_data_paths": [write_corpus(folder / "valid_text_document", documents=5, first=60)],
        "test_data_paths": [write_corpus(folder / "test_text_document", documents=5, first=65)],
    }


def settings(sources: dict[str, Any], save: Path) -> dict[str, Any]:
    return (
        MODEL
        | TRAINING
        | ADAMW
        | sources
        | {
            "train_iters": STEPS,
            "gradient_accumulation_steps": 2,
            "hidden_dropout": 0.1,
            "attention_dropout": 0.1,
            "num_workers": 2,
            "log_interval": 1,
            "eval_interval": 3,
            "eval_iters": 2,
            "extra_save_iters": [SAVED],
            "save": str(save),
        }
    )


def train(flat: dict[str, Any], world_size: int) -> None:
    torch.set_num_threads(1)
    from neox.config import config_from_dict
    from neox.training.run import train as train_run

    train_run(config_from_dict(flat, world_size=world_size))


def figures(folder: Path) -> dict[tuple[int, str], float]:
    """Every logged figure that must not depend on the clock, the last line of a step counting."""
    found: dict[tuple[int, str], float] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        for name, value in record.items():
            if name.startswith(("train/", "validation/", "test/")):
                found[record["step"], name] = value
    return found


def reached(folder: Path, step: int) -> bool:
    log = folder / "metrics.jsonl"
    return log.exists() and (step, "train/lm_loss") in figures(folder)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_killed_run_goes_on_bitwise(tmp_path: Path, sources: dict[str, Any], layout: str) -> None:
    world_size, changes = LAYOUTS[layout]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run_ranks(train, world_size, settings(sources, whole) | changes, world_size)

    flat = settings(sources, broken) | changes
    kill_ranks_when(lambda: reached(broken, KILLED), train, world_size, flat, world_size)
    assert (broken / "latest").read_text() == f"global_step{SAVED}"
    run_ranks(train, world_size, flat | {"load": str(broken)}, world_size)

    expected, found = figures(whole), figures(broken)
    assert {step for step, name in found if name == "train/lm_loss"} == set(range(1, STEPS + 1))
    assert found == expected
    assert (broken / "latest").read_text() == f"global_step{STEPS}"


def test_dropout_was_on(tmp_path: Path, sources: dict[str, Any]) -> None:
    quiet = settings(sources, tmp_path) | {"hidden_dropout": 0.0, "attention_dropout": 0.0, "train_iters": 1}
    loud = settings(sources, tmp_path / "loud") | {"train_iters": 1}
    run_ranks(train, 1, quiet, 1)
    run_ranks(train, 1, loud, 1)
    assert figures(tmp_path)[1, "train/lm_loss"] != figures(tmp_path / "loud")[1, "train/lm_loss"]


FIRST = {"model_parallel_size": 2, "pipe_parallel_size": 2, "hidden_dropout": 0.0, "attention_dropout": 0.0}


@pytest.fixture(scope="module", params=["fp32", "bfloat16"])
def first_run(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, sources: dict[str, Any]
) -> tuple[str, dict[str, Any]]:
    """Precision and settings of a whole (tensor 2, pipeline 2) run, saved on the way."""
    flat = settings(sources, tmp_path_factory.mktemp("whole")) | FIRST | {"precision": request.param}
    run_ranks(train, 4, flat, 4)
    return request.param, flat


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        (1, {"model_parallel_size": 1, "pipe_parallel_size": 0}),
        (2, {"model_parallel_size": 1, "pipe_parallel_size": 0, "zero_optimization": {"stage": 3}}),
        (2, {"model_parallel_size": 1, "pipe_parallel_size": 2}),
    ],
    ids=["one_process", "zero3_dp2", "pp2"],
)
def test_another_layout_takes_the_run_up(
    tmp_path: Path, first_run: tuple[str, dict[str, Any]], world_size: int, layout: dict[str, Any]
) -> None:
    """Weights, moments, schedule and data position go from a (tensor 2, pipeline 2) run to any other."""
    precision, flat = first_run
    whole = Path(flat["save"])
    flat = flat | {"load": str(whole), "iteration": SAVED, "save": str(tmp_path)} | layout
    run_ranks(train, world_size, flat, world_size)
    expected, found = figures(whole), figures(tmp_path)
    assert {step for step, _ in found} == set(range(SAVED + 1, STEPS + 1))
    tolerance = 1e-4 if precision == "fp32" else 1e-2
    for key, value in found.items():
        if key[1].endswith("lm_loss"):
            assert value == pytest.approx(expected[key], abs=tolerance), key
        if key[1] == "train/learning_rate":
            assert value == expected[key]
