"""What is watched of parameters, of time and of memory: right figures, the same in every layout."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks import run_ranks
from training.layouts import ADAMW, MODEL, TRAINING, allow_fp16_on_cpu

from neox.config import config_from_dict
from neox.training.engine import Engine
from neox.training.metrics.monitors import GradientNoiseScale, NoiseAverage
from neox.training.metrics.profiling import MemoryHistory
from neox.training.metrics.timers import StepTimers
from neox.training.run import train

WATCH = {
    "log_grad_norm": True,
    "log_grad_pct_zeros": True,
    "log_param_norm": True,
    "log_optimizer_states": True,
    "log_gradient_noise_scale": True,
    "gradient_noise_scale_n_batches": 2,
    "log_interval": 3,
    "train_iters": 6,
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, {"model_parallel_size": 2}),
    "pp2": (2, {"pipe_parallel_size": 2, "gradient_accumulation_steps": 2}),
    "zero1": (2, {"zero_optimization": {"stage": 1}}),
    "zero3": (2, {"zero_optimization": {"stage": 3}, "gradient_noise_scale_cpu_offload": True}),
}


def train_here(flat: dict[str, Any], world_size: int) -> None:
    torch.set_num_threads(1)
    config = config_from_dict(flat, world_size=world_size)
    if config.model.precision == "fp16":
        allow_fp16_on_cpu()
    train(config)


def metrics_of(folder: Path) -> dict[int, dict[str, float]]:
    """All metrics by iteration."""
    found: dict[int, dict[str, float]] = {}
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        found.setdefault(record.pop("step"), {}).update(record)
    return found


def run(folder: Path, corpus: str, world_size: int = 1, **changes: Any) -> dict[int, dict[str, float]]:
    flat = MODEL | TRAINING | ADAMW | {"data_path": corpus, "log_dir": str(folder)} | changes
    run_ranks(train_here, world_size, flat, world_size)
    return metrics_of(folder)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, corpus: str) -> dict[bool, dict[int, dict[str, float]]]:
    """One process, by tying."""
    return {
        tied: run(tmp_path_factory.mktemp("alone"), corpus, **WATCH, no_weight_tying=not tied) for tied in (False, True)
    }


FAMILIES = ("gradient_norms", "pct_grad_zeros", "parameter_norms", "optimizer_state_norms")


def watched(metrics: dict[str, float]) -> dict[str, float]:
    return {k: v for k, v in metrics.items() if k.partition("/")[0] in FAMILIES or k == "train/noise_scale"}


def test_figures_of_one_process_agree_with_each_other(alone: dict[bool, dict[int, dict[str, float]]]) -> None:
    metrics = alone[False]
    assert metrics.keys() == {3, 6}
    last = metrics[6]
    norms = [value for name, value in last.items() if name.startswith("gradient_norms/")]
    assert math.hypot(*norms) == pytest.approx(last["train/grad_norm"], rel=1e-5)
    assert last["train/grad_norm"] > 0.5  # so that clipping took place, and the norms are those before it
    # Tokens that do not occur have no gradient in the embedding, and some occur.
    assert 0 < last["pct_grad_zeros/layers.0.word_embeddings.weight"] < 100
    assert last["pct_grad_zeros/layers.2.attention.dense.weight"] == 0
    assert {name.rpartition("_exp_avg")[1] for name in last if name.startswith("optimizer_state_norms")} == {"_exp_avg"}
    assert last["optimizer_state_norms/layers.2.mlp.linear1.weight_exp_avg_sq"] > 0
    names = {name.partition("/")[2] for name in last if name.startswith("parameter_norms")}
    assert "layers.6.final_linear.weight" in names
    assert len(names) == len(norms)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_figures_of_a_layout_are_those_of_one_process(
    tmp_path: Path, corpus: str, alone: dict[bool, dict[int, dict[str, float]]], layout: str
) -> None:
    world_size, changes = LAYOUTS[layout]
    tied = layout == "pp2"
    found = run(tmp_path, corpus, world_size, **(WATCH | {"no_weight_tying": not tied} | changes))
    assert found.keys() == alone[tied].keys()
    for iteration, metrics in alone[tied].items():
        expected = watched(metrics)
        assert watched(found[iteration]).keys() == expected.keys()
        for name, value in expected.items():
            if name.startswith("pct_grad_zeros") and name.endswith("query_key_value.bias"):
                continue  # the gradient of the keys' bias is rounding noise, since softmax does not see that bias
            tolerance = 0.02 if name == "train/noise_scale" else 2e-4
            assert found[iteration][name] == pytest.approx(value, rel=tolerance, abs=2e-4), name


def test_loss_scale_is_not_in_the_figures(tmp_path: Path, corpus: str) -> None:
    changes = {"precision": "fp16", "fp16": {"enabled": True, "initial_scale_power": 8}}
    found = run(tmp_path, corpus, 2, **changes, zero_optimization={"stage": 2}, log_grad_norm=True, train_iters=2)[2]
    assert found["train/loss_scale"] == 256
    norms = [value for name, value in found.items() if name.startswith("gradient_norms/")]
    assert math.hypot(*norms) == pytest.approx(found["train/grad_norm"], rel=1e-4)


def noise_scale_of_made_up_gradients(offload: bool) -> float:
    """Gradients G + noise of variance Sigma / B, for batches of several sizes; tr(Sigma) / |G|^2 is 12."""
    torch.distributed.init_process_group("gloo")
    generator = torch.Generator().manual_seed(1)
    size = 4000
    parameter = torch.nn.Parameter(torch.zeros(size))
    parameter.canonical_name, parameter.tensor_model_parallel = "layers.2.w", False
    logging = SimpleNamespace(
        gradient_noise_scale_n_batches=4, gradient_noise_scale_cpu_offload=offload, log_interval=10_000
    )
    config = SimpleNamespace(logging=logging, parallel=SimpleNamespace(zero_stage=0))
    mesh = SimpleNamespace(device=torch.device("cpu"), data_size=1, data_rank=0, tensor_rank=0, pipe_rank=0)
    watchers: list[Any] = []
    engine = SimpleNamespace(
        config=config, mesh=mesh, parameters=lambda: {"layers.2.w": parameter}, watch_gradients=watchers.append
    )
    scale = GradientNoiseScale(engine, SimpleNamespace(log=lambda *_: None), last_iteration=400)
    for iteration in range(1, 401):
        batch = 4 if iteration % 2 else 8
        noise = torch.randn(size, generator=generator) * math.sqrt(12.0 / batch / size)
        parameter.grad = torch.full((size,), 1.0 / math.sqrt(size)) + noise
        skipped = iteration % 50 == 49
        if skipped:
            parameter.grad.fill_(math.inf)
        watchers[0]()
        scale.after_step(SimpleNamespace(samples=batch, skipped=skipped, progress=SimpleNamespace(iteration=iteration)))
    assert scale.average.scale is not None
    return scale.average.scale


@pytest.mark.parametrize("offload", [False, True])
def test_noise_scale_is_the_one_of_the_distribution(offload: bool) -> None:
    (found,) = run_ranks(noise_scale_of_made_up_gradients, 1, offload)
    assert found == pytest.approx(12.0, rel=0.05)


def test_noise_scale_of_two_square_norms() -> None:
    # |G|^2 = 3 and tr(Sigma) = 24: |g|^2 is 3 + 24 / 8 = 6 for a batch of 8, and 3 + 24 / 24 = 4 for one of 24.
    average = NoiseAverage()
    assert average.scale is None
    average.add(6.0, 4.0, inverse_small=1 / 8, inverse_big=1 / 24)
    assert average.scale == pytest.approx(8.0)
    average.add(6.0, 0.5, inverse_small=1 / 8, inverse_big=1 / 24)
    assert NoiseAverage().scale is None
    drowned = NoiseAverage()
    drowned.add(6.0, 0.5, inverse_small=1 / 8, inverse_big=1 / 24)
    assert drowned.scale is None


def test_profile_times_and_copies(tmp_path: Path, corpus: str) -> None:
    changes = {"profile": True, "profile_step_start": 2, "profile_step_stop": 4, "wall_clock_breakdown": True}
    found = run(tmp_path, corpus, **changes, train_iters=4, log_interval=2, memory_profiling=True)
    trace = json.loads((tmp_path / "profile" / "rank0.pt.trace.json").read_text(encoding="utf-8"))
    steps = [event for event in trace["traceEvents"] if event.get("name") == "Optimizer.step#AdamW.step"]
    assert len(steps) == 2
    phases = {name: value for name, value in found[4].items() if name.startswith("timers/")}
    assert phases.keys() == {
        f"timers/{name}" for name in ("forward", "backward", "backward-backward", "backward-allreduce", "optimizer")
    }
    assert 0 < phases["timers/backward-backward"] <= phases["timers/backward"]
    assert (
        sum(phases[f"timers/{name}"] for name in ("forward", "backward", "optimizer"))
        < found[4]["runtime/iteration_time"]
    )
    (copy,) = tmp_path.glob("*_stdout.txt")
    lines = copy.read_text(encoding="utf-8").splitlines()
    assert sum("iteration        4/       4" in line for line in lines) == 1
    assert sum(line.startswith("time (ms) | forward: ") for line in lines) == 2


class Timed(Engine):
    """An engine whose passes do nothing but start and stop DeepSpeed's timer."""

    def __init__(self) -> None:
        self.deepspeed = SimpleNamespace(timers=StepTimers())

    def train_step(self, batch: Any) -> torch.Tensor:
        self.deepspeed.timers("fwd").start()
        self.deepspeed.timers("fwd").stop()
        return torch.zeros(())

    _evaluate = train_step

    def loss_before_update(self) -> None:
        return None


def test_an_evaluation_is_no_phase_of_a_step() -> None:
    engine, batch = Timed(), SimpleNamespace()
    engine.evaluate(batch)
    assert engine.deepspeed.timers.take() == {}
    engine.train_step(batch)
    assert engine.deepspeed.timers.take().keys() == {"forward"}


def test_memory_history_where_there_is_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    observers: list[Any] = []
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **options: calls.append(options))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", calls.append)
    monkeypatch.setattr(torch._C, "_cuda_attach_out_of_memory_observer", observers.append, raising=False)
    logging = SimpleNamespace(memory_profiling_path=str(tmp_path / "mem"), profile_step_stop=4)
    engine = SimpleNamespace(config=SimpleNamespace(logging=logging), mesh=SimpleNamespace(rank=3))
    history = MemoryHistory(engine, last_iteration=100)
    history.before_training(SimpleNamespace(iteration=0))
    observers[0](0, 0, 0, 0)
    for iteration in range(1, 6):
        history.after_step(SimpleNamespace(progress=SimpleNamespace(iteration=iteration), is_last=False))
    path = str(tmp_path / "mem" / "rank3.pickle")
    assert calls == [{"max_entries": 100_000}, path, path, {"enabled": None}]
    calls.clear()
    history.before_training(SimpleNamespace(iteration=0))
    history.after_step(SimpleNamespace(progress=SimpleNamespace(iteration=1), is_last=True))  # the run was asked to end
    assert calls[1:] == [path, {"enabled": None}]
    assert (tmp_path / "mem").is_dir()
