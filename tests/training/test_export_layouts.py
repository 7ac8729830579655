"""Trained at any layout, exported to Hugging Face and imported again: the same weights, bit by bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from training.layouts import ADAMW, MODEL, TRAINING

from neox.checkpoint.conversion.convert import largest_logit_difference
from neox.checkpoint.huggingface import export_huggingface
from neox.checkpoint.open import open_checkpoint
from neox.config import config_from_dict

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one_process": (1, {}),
    "tied": (1, {"no_weight_tying": False}),
    "tp2": (2, {"model_parallel_size": 2}),
    "tp2_sp_zero2": (2, {"model_parallel_size": 2, "sequence_parallel": True, "zero_optimization": {"stage": 2}}),
    "pp2_tied": (2, {"pipe_parallel_size": 2, "gradient_accumulation_steps": 2, "no_weight_tying": False}),
    "pp2_tp2": (4, {"pipe_parallel_size": 2, "model_parallel_size": 2, "gradient_accumulation_steps": 2}),
    "zero1": (2, {"zero_optimization": {"stage": 1}}),
    "zero2": (2, {"zero_optimization": {"stage": 2}}),
    "zero3": (2, {"zero_optimization": {"stage": 3}}),
    "tp2_zero3_bf16": (
        4,
        {"model_parallel_size": 2, "zero_optimization": {"stage": 3}, "precision": "bfloat16"},
    ),
}


def train(flat: dict[str, Any], world_size: int) -> None:
    from neox.training.run import train as train_run

    torch.set_num_threads(1)
    train_run(config_from_dict(flat, world_size=world_size))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_export_and_import_are_the_identity(tmp_path: Path, corpus: str, layout: str) -> None:
    world_size, changes = LAYOUTS[layout]
    save = {"save": str(tmp_path / "run"), "checkpoint_factor": 2, "train_iters": 2, "data_path": corpus}
    flat = MODEL | TRAINING | ADAMW | save | changes
    run_ranks(train, world_size, flat, world_size)

    config = config_from_dict(flat, world_size=world_size)
    trained = open_checkpoint(tmp_path / "run")
    dtype = trained.tensor(trained.names()[0]).dtype
    export_huggingface(trained, config.model, tmp_path / "hf", dtype=dtype)
    imported = open_checkpoint(tmp_path / "hf")
    assert sorted(imported.names()) == sorted(trained.names())
    for name in trained.names():
        assert torch.equal(imported.tensor(name), trained.tensor(name)), name
    assert imported.padded_vocab_size == 131
    assert largest_logit_difference(tmp_path / "hf", trained, config.model, dtype=dtype) < 1e-5
