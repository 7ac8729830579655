"""What DeepSpeed offers through its sections works here, with results unchanged where it must not change them."""

import csv
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ranks
from training.layouts import ADAMW, MODEL, TRAINING
from training.test_monitors import metrics_of

from neox.config import config_from_dict
from neox.errors import ConfigError
from neox.training import preflight
from neox.training.recompute import segment_runner
from neox.training.run import train

SMALL = MODEL | TRAINING | ADAMW | {"train_batch_size": 8, "train_iters": 4, "log_interval": 1, "checkpoint_factor": 2}
PIPELINE = {"pipe_parallel_size": 2, "gradient_accumulation_steps": 2}
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}


def train_in(flat: dict[str, Any], world_size: int, folder: str) -> None:
    """Train in `folder`, which relative paths start from; what is printed goes to `printed.<rank>`."""
    os.chdir(folder)
    output = os.open(f"printed.{os.environ['RANK']}", os.O_CREAT | os.O_WRONLY)
    sys.stdout.flush()
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    torch.set_num_threads(1)
    try:
        train(config_from_dict(flat, world_size=world_size))
    finally:
        sys.stdout.flush()


def run(folder: Path, corpus: str, world_size: int, **changes: Any) -> list[float]:
    """Losses and gradient norms of every step."""
    folder.mkdir(exist_ok=True)
    flat = SMALL | {"data_path": corpus, "save": "run"} | changes
    run_ranks(train_in, world_size, flat, world_size, str(folder))
    return figures(metrics_of(folder / "run"))


def figures(metrics: dict[int, dict[str, float]]) -> list[float]:
    return [metrics[step][name] for step in sorted(metrics) for name in ("train/lm_loss", "train/grad_norm")]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, corpus: str) -> list[float]:
    """One process without any section."""
    found = run(tmp_path_factory.mktemp("plain"), corpus, 1)
    assert len(found) == 8
    return found


SAME_RESULTS: dict[str, tuple[int, dict[str, Any]]] = {
    "offload_zero1": (2, {"zero_optimization": {"stage": 1, **OFFLOAD}, "comms_logger": {"enabled": False}}),
    "offload_zero2": (2, {"zero_optimization": {"stage": 2, **OFFLOAD}}),
    "offload_zero3": (2, {"zero_optimization": {"stage": 3, **OFFLOAD, "offload_param": {"device": "cpu"}}}),
    "offload_pipeline": (2, {**PIPELINE, "zero_optimization": {"stage": 1, "cpu_offload": True}}),
    "secondary_partition": (4, {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}),
    "prescaled": (2, {"prescale_gradients": True, "gradient_predivide_factor": 2.0}),
    "inputs_in_cpu": (1, {"checkpoint_activations": True, "checkpoint_in_cpu": True}),
    "inputs_in_cpu_pipeline": (2, {**PIPELINE, "checkpoint_activations": True, "checkpoint_in_cpu": True}),
}


@pytest.mark.parametrize("name", SAME_RESULTS)
def test_results_are_those_without_the_section(tmp_path: Path, corpus: str, expected: list[float], name: str) -> None:
    world_size, changes = SAME_RESULTS[name]
    np.testing.assert_allclose(run(tmp_path, corpus, world_size, **changes), expected, rtol=0, atol=1e-5)
    printed = (tmp_path / "printed.0").read_text(encoding="utf-8")
    assert "[INFO]" not in printed
    assert "Comm. Op" not in printed


def test_resuming_with_offload(tmp_path: Path, corpus: str, expected: list[float]) -> None:
    world_size, changes = SAME_RESULTS["offload_zero3"]
    first = run(tmp_path, corpus, world_size, **changes, exit_interval=2)
    assert len(first) == 4
    both = run(tmp_path, corpus, world_size, **changes, load="run")
    np.testing.assert_allclose(both, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("stage", [0, 1])
def test_reduction_in_another_type(tmp_path: Path, corpus: str, expected: list[float], stage: int) -> None:
    found = run(tmp_path, corpus, 2, communication_data_type="bf16", zero_optimization={"stage": stage})
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-2)
    assert abs(found[1] - expected[1]) > 1e-5  # so that the type was used


def test_reports_of_one_process(tmp_path: Path, corpus: str, expected: list[float]) -> None:
    """Monitors, the profiler of operations, and what DeepSpeed prints."""
    found = run(
        tmp_path,
        corpus,
        1,
        csv_monitor={"enabled": True, "output_path": "csv", "job_name": "job"},
        tensorboard={"enabled": True, "output_path": "tensorboard", "job_name": "job"},
        flops_profiler={"enabled": True, "profile_step": 2, "output_file": "operations.txt"},
        steps_per_print=2,
        dump_state=True,
    )
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    with (tmp_path / "csv" / "job" / "Train_Samples_lr.csv").open(encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert [int(row[0]) for row in rows[1:]] == [8, 16, 24, 32]
    assert float(rows[1][1]) == pytest.approx(3e-3, rel=0.1)
    assert list((tmp_path / "tensorboard" / "job").glob("events.out.tfevents.*"))
    table = (tmp_path / "operations.txt").read_text(encoding="utf-8")
    assert "Profile Summary at step 3:" in table
    assert "query_key_value" in table
    printed = (tmp_path / "printed.0").read_text(encoding="utf-8")
    assert "step=2, skipped=0, lr=[" in printed
    assert "step=4, skipped=0, lr=[" in printed
    assert "step=3" not in printed
    assert "DeepSpeedEngine configuration:" in printed


def test_reports_of_a_pipeline(tmp_path: Path, corpus: str, expected: list[float]) -> None:
    found = run(
        tmp_path,
        corpus,
        2,
        **PIPELINE,
        csv_monitor={"enabled": True, "output_path": "csv", "job_name": "job"},
        flops_profiler={"enabled": True, "profile_step": 2, "output_file": "operations.txt"},
        wall_clock_breakdown=True,
    )
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert (tmp_path / "csv" / "job" / "Train_Samples_train_loss.csv").is_file()
    assert "Profile Summary at step 3:" in (tmp_path / "operations.txt").read_text(encoding="utf-8")
    last = metrics_of(tmp_path / "run")[4]
    phases = ("forward", "backward", "backward-backward", "optimizer", "batch generator")
    assert all(last[f"timers/{name}"] > 0 for name in phases)
    # DeepSpeed's own lines of times, which wait for the device after every step, are not there.
    assert "optimizer_step" not in (tmp_path / "printed.0").read_text(encoding="utf-8")


def test_communication_log(tmp_path: Path, corpus: str, expected: list[float]) -> None:
    changes = {"comms_logger": {"enabled": True, "verbose": True}, "zero_optimization": {"stage": 1}}
    np.testing.assert_allclose(run(tmp_path, corpus, 2, **changes), expected, rtol=0, atol=1e-5)
    printed = (tmp_path / "printed.0").read_text(encoding="utf-8")
    assert "Comm. Op            Message Size        Count" in printed
    assert "comm op: all_reduce | time (ms): " in printed
    assert "Comm. Op" not in (tmp_path / "printed.1").read_text(encoding="utf-8")


@cache
def quantized() -> dict[str, Any]:
    section = {"stage": 3, "zero_quantized_weights": True, "zero_quantized_gradients": True}
    return SMALL | {"data_path": "nowhere", "zero_optimization": section}


def test_quantized_communication_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "cuda_device_count", lambda: 0)
    with pytest.raises(ConfigError, match=r"^zero_optimization.zero_quantized_weights: its kernels need CUDA") as error:
        preflight.prepare(config_from_dict(quantized()))
    assert "\n" not in str(error.value)
    monkeypatch.setattr(preflight, "cuda_device_count", lambda: 8)
    with pytest.raises(Exception, match="nowhere"):  # the next check: that of the data
        preflight.prepare(config_from_dict(quantized()))


def test_memory_profiling_without_a_gpu_is_remarked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "cuda_device_count", lambda: 0)
    lines = preflight.remarks(config_from_dict(SMALL | {"memory_profiling": True}))
    assert [line for line in lines if "memory_profiling" in line] == [
        "memory_profiling: there is no CUDA device here, nothing is recorded"
    ]


def test_only_the_inputs_of_a_segment_go_to_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[torch.Tensor] = []

    def save_on_cpu(*, pin_memory: bool) -> Any:
        assert pin_memory == torch.cuda.is_available()
        return torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x)

    monkeypatch.setattr(torch.autograd.graph, "save_on_cpu", save_on_cpu)
    layer, x = torch.nn.Linear(4, 4), torch.randn(2, 4, requires_grad=True)
    for in_cpu, count in ((False, 0), (True, 1)):
        saved.clear()
        config = config_from_dict(SMALL | {"checkpoint_activations": True, "checkpoint_in_cpu": in_cpu})
        segment_runner(config)(lambda x: layer(x).tanh().square(), x).sum().backward()
        assert [s.shape for s in saved] == [x.shape] * count
