"""The benchmarks on a model of two layers: that they run, compare equal work, and compute what they say."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch

from benchmarks import cpu, gpu
from benchmarks.contestants import Bare, Engine, Transformers, single_process
from benchmarks.measure import Product, Speed, Timing, table, time_interleaved
from benchmarks.shapes import NEOX_20B, PYTHIA, Shape, shapes_named
from neox.errors import ConfigError
from neox.model.count import count_parameters
from neox.model.flops import TokenFlops
from neox.parallel.mesh import Mesh

TINY = Shape("tiny", layers=2, hidden=32, heads=4, vocabulary=160)
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with mock.patch.dict(os.environ), single_process(TINY.config(sequence=16)) as mesh:
        yield mesh


def test_contestants_do_the_same_work(mesh: Mesh):
    config = TINY.config(sequence=16, micro_batch=2)
    contestants = [Engine(config, mesh), Bare(config, mesh.device), Transformers(config, mesh.device)]
    tokens = torch.randint(160, (2, 17), generator=torch.Generator().manual_seed(0))
    curves = [[float(c.step(tokens)) for _ in range(4)] for c in contestants]
    assert curves[0][0] - curves[0][-1] > 0.05
    assert curves[1] == pytest.approx(curves[0], abs=1e-5)
    assert curves[2] == pytest.approx(curves[0], abs=1e-5)


def test_cpu_benchmark_measures_and_reports(mesh: Mesh):
    result = cpu.measure(TINY, mesh, sequence=16, batch=2, rounds=2, warmup=1)
    assert set(result["rows"]) == {"neox", "neox, no engine", "transformers"}
    for name, row in result["rows"].items():
        seconds = result["seconds"][name]
        assert len(seconds) == 2
        assert row["tokens/s (best)"] == pytest.approx(2 * 16 / min(seconds))
        assert row["x peer (best)"] == pytest.approx(min(result["seconds"]["transformers"]) / min(seconds))
    assert set(result["gemm"]) == {"2048 x 2048 x 2048", "32 x 32 x 128", "32 x 32 x 160"}
    assert result["gemm"][result["limit"]] == max(result["gemm"].values())
    lines = cpu.report("tiny", result).splitlines()
    assert sum(line.startswith("| ") for line in lines) == 4


def test_gpu_benchmark_on_the_cpu(mesh: Mesh):
    result = gpu.measure_training(TINY, mesh, sequence=16, rounds=1, compiled=False, micro_batches=(1, 2), gemm_size=64)
    assert set(result["rows"]) == {"neox", "transformers"}
    ours, peer = result["rows"]["neox"], result["rows"]["transformers"]
    assert ours["x peer"] == pytest.approx(ours["tokens/s"] / peer["tokens/s"])
    assert ours["micro batch"] in (1, 2)
    assert ours["MFU %, full"] is None
    assert "neox" in gpu.report("tiny", result)


def test_search_for_the_micro_batch_keeps_what_fitted(monkeypatch: pytest.MonkeyPatch):
    def row(contestant: object, config: object, device: object, *, micro_batch: int, **_: object) -> dict[str, float]:
        if micro_batch > limit:
            raise torch.OutOfMemoryError
        return {"micro batch": micro_batch, "tokens/s": speeds[micro_batch]}

    monkeypatch.setattr(gpu, "_timed_row", row)

    class Contestant:
        model = torch.nn.Linear(1, 1)

    speeds = {1: 100.0, 2: 150.0, 4: 151.0, 8: 900.0}
    found = {}
    for limit in (0, 1, 8):
        found[limit] = gpu._fastest(
            Contestant, TINY, torch.device("cpu"), rounds=1, micro_batches=(1, 2, 4, 8), limit=1.0
        )
    assert found[0] is None
    assert found[1]["micro batch"] == 1
    assert found[8]["micro batch"] == 2


def test_inference_benchmark_on_the_cpu():
    figures = gpu.measure_inference(TINY, sequence=32, prompt=4, new_tokens=3, copied=1024)
    assert figures["parameters, billion"] * 1e9 == count_parameters(TINY.config(sequence=32).model).total
    assert figures["generation, tokens/s (prompt included)"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_benchmark_refuses_in_one_line_without_a_gpu():
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "gpu.py"], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "no CUDA device" in done.stderr


def test_speed_by_hand():
    flops = TokenFlops(blocks=90.0, head=10.0)
    speed = Speed(50, Timing((1.0, 2.0, 4.0)), causal=flops, full=TokenFlops(blocks=190.0, head=10.0), limit=1e5)
    peer = Speed(50, Timing((2.0, 8.0, 8.0)), causal=flops, full=flops, limit=1e5)
    row = speed.row(peer=peer)
    assert row["tokens/s (median)"] == 25.0
    assert row["tokens/s (best)"] == 50.0
    assert row["x peer (median)"] == 4.0
    assert row["x peer (best)"] == 2.0
    assert row["% of GEMM, causal"] == pytest.approx(100 * 3 * 100 * 50 / 1e5)
    assert row["% of GEMM, full"] == pytest.approx(100 * 3 * 200 * 50 / 1e5)


def test_rounds_are_interleaved_and_warmup_is_not_timed():
    calls: list[str] = []
    runs = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    timings = time_interleaved(runs, device=torch.device("cpu"), rounds=2, warmup=1)
    assert "".join(calls) == "ababab"
    assert [len(timing.seconds) for timing in timings.values()] == [2, 2]
    assert Product(2, 3, 5).flops == 60


def test_table_lines_up():
    lines = table([{"": "ours", "x": 2.0}, {"": "theirs", "x": None}]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[2] == "| ours   | 2 |"


# Parameters as their authors publish them.
@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("14M", 14_067_712),
        ("70M", 70_426_624),
        ("160M", 162_322_944),
        ("410M", 405_334_016),
        ("1.4B", 1_414_647_808),
        ("6.9B", 6_857_302_016),
        ("20B", 20_554_567_680),
    ],
)
def test_shapes_are_the_published_ones(name: str, parameters: int):
    shape = NEOX_20B if name == "20B" else PYTHIA[name]
    assert count_parameters(shape.config(sequence=2048).model).total == parameters


def test_unknown_shape_is_named():
    with pytest.raises(ConfigError, match=r"--models 5M: no such shape"):
        shapes_named(["14M", "5M"])
