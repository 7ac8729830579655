"""A run saved at one layout goes on at any other as if it had never stopped."""

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from training.layouts import ADAMW, MODEL, TRAINING
from training.test_resume import figures, train

from neox.checkpoint.native.store import NativeReader

SAVED, STEPS = 10, 20
TOLERANCE = 1e-4


def settings(corpus: str, save: Path, tensor: int, pipe: int, zero: int = 1, **changes: Any) -> dict[str, Any]:
    """A run of 20 steps at a layout, saved after 10."""
    layout = {"model_parallel_size": tensor, "pipe_parallel_size": pipe, "zero_optimization": {"stage": zero}}
    run = {"train_iters": STEPS, "data_path": corpus, "save": str(save), "extra_save_iters": [SAVED], "log_interval": 1}
    batch = {"train_batch_size": 12, "gradient_accumulation_steps": 3}
    return MODEL | TRAINING | ADAMW | run | batch | layout | changes


def go_on(whole: Path, flat: dict[str, Any], world_size: int) -> None:
    """Take a run up after step 10, and compare what follows with the run that never stopped."""
    run_ranks(train, world_size, flat | {"load": str(whole), "iteration": SAVED}, world_size)
    expected, found = figures(whole), figures(Path(flat["save"]))
    assert {step for step, _ in found} == set(range(SAVED + 1, STEPS + 1))
    for step in range(SAVED + 1, STEPS + 1):
        for name, tolerance in (("lm_loss", TOLERANCE), ("learning_rate", 0.0), ("grad_norm", 10 * TOLERANCE)):
            key = step, f"train/{name}"
            assert found[key] == pytest.approx(expected[key], abs=tolerance), key


@pytest.fixture(scope="module")
def whole(corpus: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that never stopped: tensor 2 x pipeline 2."""
    folder = tmp_path_factory.mktemp("whole")
    run_ranks(train, 4, settings(corpus, folder, 2, 2), 4)
    return folder


@pytest.mark.parametrize(
    ("tensor", "pipe", "zero"),
    [(1, 0, 1), (1, 1, 2), (1, 0, 3), (1, 2, 1), (4, 0, 1), (4, 1, 2), (4, 0, 3)],
    ids=["dp4_zero1", "dp4_zero2", "dp4_zero3", "pp2_dp2", "tp4_zero1", "tp4_zero2", "tp4_zero3"],
)
def test_a_pipeline_run_goes_on_anywhere(
    tmp_path: Path, whole: Path, corpus: str, tensor: int, pipe: int, zero: int
) -> None:
    go_on(whole, settings(corpus, tmp_path, tensor, pipe, zero), 4)


def test_three_ranks_divide_nothing_evenly(tmp_path: Path, whole: Path, corpus: str) -> None:
    go_on(whole, settings(corpus, tmp_path, 1, 0, 3, gradient_accumulation_steps=2), 3)


@pytest.mark.parametrize(
    ("before", "after"),
    [((1, 0, 3), (2, 2, 1)), ((4, 0, 2), (1, 2, 1))],
    ids=["zero3_to_tp2_pp2", "tp4_to_pp2_dp2"],
)
def test_a_sequential_run_goes_on_in_a_pipeline(
    tmp_path: Path, corpus: str, before: tuple[int, int, int], after: tuple[int, int, int]
) -> None:
    first = tmp_path / "first"
    run_ranks(train, 4, settings(corpus, first, *before), 4)
    go_on(first, settings(corpus, tmp_path / "second", *after), 4)


def start(flat: dict[str, Any], world_size: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Start a run and return each parameter's weights and fp32 masters before its first step."""
    from neox.config import config_from_dict
    from neox.parallel.mesh import build_mesh
    from neox.training.run import start_or_resume
    from neox.training.state import MASTER, local_state

    torch.set_num_threads(1)
    config = config_from_dict(flat, world_size=world_size)
    engine, _, _ = start_or_resume(config, build_mesh(config))
    half = config.model.precision != "fp32"
    return {
        name: (p.detach().clone(), local_state(engine, p, MASTER).clone() if half else p.detach().clone())
        for name, p in engine.parameters().items()
    }


def tensors_read(flat: dict[str, Any], world_size: int) -> list[str]:
    """Resume on this rank, and return the tensors of the optimizer that it read."""
    read: list[str] = []
    original = NativeReader.tensor

    def noted(reader: NativeReader, key: str) -> torch.Tensor:
        read.append(key)
        return original(reader, key)

    NativeReader.tensor = noted  # type: ignore[method-assign]
    start(flat, world_size)
    return [key for key in read if key.endswith(("/exp_avg", "/master"))]


@pytest.mark.parametrize("precision", ["fp32", "bfloat16"])
def test_a_rank_reads_the_moments_that_it_updates(tmp_path: Path, whole: Path, corpus: str, precision: str) -> None:
    flat = settings(corpus, tmp_path, 1, 0, 1, load=str(whole), iteration=SAVED, precision=precision)
    by_rank = run_ranks(tensors_read, 4, flat, 4)
    saved = NativeReader(whole / f"global_step{SAVED}")
    moments = {key for key in saved.manifest.tensors if key.endswith("/exp_avg")}
    assert set().union(*by_rank) >= moments
    assert sum(len(keys) for keys in by_rank) < 2 * len(moments)


@pytest.mark.parametrize(("before", "after"), [("bfloat16", "fp32"), ("fp32", "bfloat16")])
def test_precision_changes_without_loss(tmp_path: Path, corpus: str, before: str, after: str) -> None:
    flat = settings(corpus, tmp_path, 1, 0, train_iters=3, extra_save_iters=[3])
    run_ranks(train, 1, flat | {"precision": before}, 1)
    reader = NativeReader(tmp_path / "global_step3")
    started = run_ranks(start, 1, flat | {"precision": after, "load": str(tmp_path), "train_iters": 3}, 1)[0]
    differs = False
    for name, (weights, master) in started.items():
        saved = reader.tensor(f"{name}/master" if before == "bfloat16" else name)
        assert torch.equal(master.view_as(saved), saved), name
        assert torch.equal(weights, saved.to(weights.dtype).view_as(weights)), name
        differs |= not torch.equal(saved, saved.bfloat16().float())
    assert differs, "the masters hold more than 16 bits"
