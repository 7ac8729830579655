"""The rank that is slow by itself is named; those that wait for it are not."""

import json
import re
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from training.layouts import ADAMW, MODEL, TRAINING

from neox.config import config_from_dict
from neox.parallel import collectives
from neox.parallel.mesh import Mesh
from neox.training.stragglers import DeviceTime, compared

SLOW, NAP = 2, 1.0
"""A rank, and seconds that it sleeps in every forward pass: more than a step takes."""

LATE = 1
"""A rank that sleeps longer, in its first forward pass only."""


def train_with_a_slow_rank(flat: dict[str, Any], world_size: int) -> None:
    torch.set_num_threads(1)
    from neox.training import run

    start = run.start_or_resume

    def start_slowly(config: Any, mesh: Mesh) -> Any:
        engine, *rest = start(config, mesh)
        if mesh.rank == SLOW:
            engine.deepspeed.module.register_forward_pre_hook(lambda *_: time.sleep(NAP))
        if mesh.rank == LATE:
            naps = iter([5 * NAP])
            engine.deepspeed.module.register_forward_pre_hook(lambda *_: time.sleep(next(naps, 0.0)))
        return engine, *rest

    run.start_or_resume = start_slowly
    run.train(config_from_dict(flat, world_size=world_size))


def test_slow_rank_is_named(tmp_path: Path, corpus: str) -> None:
    flat = MODEL | TRAINING | ADAMW | {"data_path": corpus, "train_iters": 6, "log_interval": 2}
    flat |= {"model_parallel_size": 2, "straggler_factor": 2.0, "log_dir": str(tmp_path / "log")}
    flat |= {"save": str(tmp_path), "extra_save_iters": [6]}
    run_ranks(train_with_a_slow_rank, 4, flat, 4)
    text = "".join(path.read_text() for path in (tmp_path / "log").rglob("*") if path.is_file())
    found = re.findall(
        rf"iteration (\d): rank (\d) \(on {socket.gethostname()}\) is slow: ([\d.]+) s of its own a step, "
        r"([\d.]+) times the [\d.]+ s that are usual among all(?:; slow at (\d) of (\d) looks)?",
        text,
    )
    # The same line is in rank 0's file and in that of all. What a busy machine holds up besides is slow for moments.
    said = [line for line in dict.fromkeys(found) if line[1] == str(SLOW) or float(line[2]) >= NAP]
    assert [(when, rank) for when, rank, *_ in said] == [("2", "2"), ("4", "2"), ("6", "2")]
    assert [(times, looks) for *_, times, looks in said] == [("", ""), ("2", "2"), ("3", "3")]
    assert all(float(seconds) >= NAP and float(factor) > 2 for _, _, seconds, factor, *_ in said)

    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    slowest = [r["train/slowest_rank"] for r in records if "train/slowest_rank" in r]
    assert slowest == [SLOW] * 3


def test_ranks_are_compared_with_the_others_of_their_stage() -> None:
    mesh = Mesh(pipe_size=2, data_size=3, tensor_size=1)
    found = compared([1.0, 1.1, 1.2, 5.0, 5.0, 15.0], mesh)
    assert [one.rank for one in found][:2] == [5, 2]
    assert (found[0].usual, found[0].factor) == (5.0, 3.0)
    assert all(one.factor < 1.2 for one in found[1:])


def test_one_of_two_is_compared_with_the_other() -> None:
    found = compared([1.0, 3.0], Mesh(data_size=2))
    assert [(one.rank, one.factor) for one in found] == [(1, 3.0), (0, pytest.approx(1 / 3))]


def test_a_rank_alone_in_its_stage_is_not_compared() -> None:
    assert compared([1.0, 9.0], Mesh(pipe_size=2)) == []


class Stream:
    device = torch.device("cpu")


class Event:
    """Notes the time of a clock that the test moves."""

    now = 0.0

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing
        self.at = -1.0

    def record(self, stream: Stream) -> None:
        self.at = Event.now

    def synchronize(self) -> None:
        assert self.at >= 0

    def elapsed_time(self, other: "Event") -> float:
        return 1000.0 * (other.at - self.at)


def collective(seconds: float) -> None:
    record = collectives.own_record()
    record.begin("all_reduce", None, 1)
    Event.now += seconds
    record.end()


def test_device_time_is_that_of_the_step_without_its_collectives(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = [Stream(), Stream()]
    current = [streams[0]]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: current[0])
    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = DeviceTime(torch.device("cpu"))

    clock.start(is_sampled=False)
    collective(5.0)
    clock.stop()
    assert clock.seconds() is None

    clock.start(is_sampled=True)
    Event.now += 2.0
    collective(7.0)
    Event.now += 1.0
    current[0] = streams[1]
    collective(0.5)  # on a stream beside: it is not known who waits for it
    current[0] = streams[0]
    clock.stop()
    collective(100.0)
    assert clock.seconds() == pytest.approx(3.5)
