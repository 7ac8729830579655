"""Who is named: from what every rank has begun, and from whether it gets on."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint.small_checkpoints import RUN, save

from neox.checkpoint.native.commit import prune_checkpoints
from neox.checkpoint.native.manifest import MANIFEST, Progress
from neox.checkpoint.storage.tensor_file import TensorFileWriter
from neox.data.gpt_dataset import Sample
from neox.files import WriteBehind
from neox.parallel.collectives import Record, own_record, raised_by_collective
from neox.parallel.mesh import Mesh
from neox.pulse import pulses
from neox.training.batches import BatchMaker
from neox.training.loaders import _from_server
from neox.watch import client, phase, session, signs
from neox.watch.report import places, ranges
from neox.watch.server import Server
from neox.watch.verdict import holding_up
from neox.watch.wire import keep_from_children

TENSOR = {0: [0, 1], 1: [0, 1], 2: [2, 3], 3: [2, 3]}
DATA = {0: [0, 2], 1: [1, 3], 2: [0, 2], 3: [1, 3]}


def standings(begun: dict[int, tuple[int, int]]) -> dict[int, dict[str, Any]]:
    """Collectives that each of four ranks has begun in its tensor-parallel and its data-parallel group."""
    return {
        rank: {"started": [(f"t{TENSOR[rank][0]}", TENSOR[rank], tensor), (f"d{DATA[rank][0]}", DATA[rank], data)]}
        for rank, (tensor, data) in begun.items()
    }


def test_the_wait_is_followed_to_its_end() -> None:
    # 2 has not come to the tensor group's 8th, so 3 waits there; 0 and 1 wait for 2 and 3 in the data groups.
    assert holding_up(standings({0: (8, 4), 1: (8, 4), 2: (7, 3), 3: (8, 3)})) == [2]


def test_ranks_that_wait_for_each_other_are_all_named() -> None:
    assert holding_up(standings({0: (8, 3), 1: (7, 3), 2: (7, 4), 3: (7, 3)})) == [1]
    assert holding_up(standings({0: (8, 3), 1: (7, 4), 2: (7, 4), 3: (8, 3)})) == [0, 1, 2, 3]


def test_nobody_is_behind() -> None:
    assert holding_up(standings(dict.fromkeys(range(4), (8, 4)))) == []


def test_a_rank_that_never_came_to_a_group_and_messages() -> None:
    world = {rank: {"started": [("", None, 5)]} for rank in range(3)}
    world[1] = {"started": []}
    assert holding_up(world) == [1]
    # Of a pipeline: stage 1 has not taken the second message of stage 0, and stage 2 waits for one of stage 1.
    stages = {
        0: {"started": [("0>1", [0, 1], 2)]},
        1: {"started": [("0>1", [0, 1], 1), ("1>2", [1, 2], 0)]},
        2: {"started": [("1>2", [1, 2], 1)]},
    }
    assert holding_up(stages) == [1]


def judged(idle: dict[int, float], begun: dict[int, tuple[int, int]]) -> tuple[str, list[int]] | None:
    """The verdict about ranks that have been idle for so many seconds, where a minute is allowed."""
    said: list[str] = []
    server = Server(size=4, token="", timeout=60.0, interval=5.0, say=said.append)
    found = standings(begun)
    for peer in server._peers:
        peer.sign = {"idle": idle[peer.rank]}
        peer.standing = peer.sign | found[peer.rank]
    return asyncio.run(server._verdict())


WAITING = {0: (8, 4), 1: (8, 4), 2: (7, 3), 3: (8, 3)}


def test_a_stalled_rank_is_to_blame() -> None:
    verdict = judged({0: 70.0, 1: 70.0, 2: 65.0, 3: 70.0}, WAITING)
    assert verdict == ("rank 2 has not got on for 65.0 s, and the others wait for it", [2])


def test_a_wait_for_a_rank_that_works_is_lawful() -> None:
    """One builds an index for hours, the others wait in a barrier."""
    assert judged({0: 7000.0, 1: 7000.0, 2: 3.0, 3: 7000.0}, WAITING) is None


def test_all_ranks_stall_and_none_is_behind() -> None:
    verdict = judged(dict.fromkeys(range(4), 61.0), dict.fromkeys(range(4), (8, 4)))
    assert verdict == ("no rank has got on for 61.0 s, and none is behind the others", [0, 1, 2, 3])
    assert judged({0: 61.0, 1: 61.0, 2: 61.0, 3: 5.0}, dict.fromkeys(range(4), (8, 4))) is None


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, and the computing time of this process, as the watch sees them."""
    now = [1000.0, 10.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "process_time", lambda: now[1])
    signs.begin()
    return now


def looks(clock: list[float], idleness: signs.Idleness, *, computing: float) -> float:
    """Look every five seconds for a minute, in which the process computes for so many seconds each time."""
    for _ in range(12):
        clock[0], clock[1] = clock[0] + 5.0, clock[1] + computing
        idle = idleness.look()
    return idle


def test_computing_counts_outside_of_training_only(clock: list[float]) -> None:
    idleness = signs.Idleness(5.0)
    assert looks(clock, idleness, computing=3.0) == 0.0
    assert looks(clock, idleness, computing=0.001) == 60.0
    signs.at_step(1)
    assert looks(clock, idleness, computing=3.0) == 55.0
    with phase("saving"):
        assert looks(clock, idleness, computing=3.0) == 0.0


def test_a_compiler_that_a_process_waits_for_counts() -> None:
    """The computing time of a child of a child, and of one that has ended."""
    shell = subprocess.Popen(
        ["sh", "-c", "i=0; (while :; do i=$((i+1)); done) & echo $!; wait"], stdout=subprocess.PIPE
    )
    assert shell.stdout is not None
    compiler = int(shell.stdout.readline())
    try:
        begun = computed()
        deadline = time.monotonic() + 60
        while computed() < begun + 0.2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        os.kill(compiler, signal.SIGKILL)
        shell.wait()
    assert computed() > begun + 0.1  # it is counted in ticks of a clock


def computed() -> float:
    """Seconds, without those of this process itself."""
    return signs._work()[0] - time.process_time()


def test_each_batch_that_a_slow_loader_gives_counts(clock: list[float]) -> None:
    def batches() -> Iterator[dict[str, torch.Tensor]]:
        while True:
            idle.append(looks(clock, idleness, computing=0.0))
            yield {"tokens": torch.zeros(1, 9, dtype=torch.long)}

    idle: list[float] = []
    idleness = signs.Idleness(5.0)
    signs.at_step(1)
    BatchMaker(Mesh(), accumulation=4).for_step(batches(), Progress())
    assert idle == [55.0] * 4


def test_a_server_of_completions_may_take_long(clock: list[float]) -> None:
    class Server:
        def take(self, count: int) -> list[Sample]:
            idle.append(looks(clock, idleness, computing=0.0))
            return [{"tokens": np.zeros(9, np.int64)}] * count

    idle: list[float] = []
    idleness = signs.Idleness(5.0)
    signs.at_step(1)
    assert next(_from_server(Server(), 2, Mesh()))["tokens"].shape == (2, 9)  # type: ignore[arg-type]
    assert idle == [0.0]


def test_parts_of_a_large_file_count_when_they_are_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WriteBehind, "LARGE", 1000)
    tensor, before = torch.zeros(300), pulses()
    entries = dict.fromkeys(("a", "b", "c"), (tensor.dtype, tensor.shape))
    with TensorFileWriter(tmp_path / "model.safetensors", entries) as file:
        for number, name in enumerate(entries, start=1):
            file.write(name, tensor)
            assert pulses() == before + number


def test_deleting_a_checkpoint_of_many_ranks_counts(clock: list[float], tmp_path: Path) -> None:
    for iteration in (1, 2):
        save(tmp_path, iteration)
    os.utime(tmp_path / "global_step1" / MANIFEST, (0, 0))
    idleness, before = signs.Idleness(5.0), pulses()
    clock[0] += 5.0
    assert prune_checkpoints(tmp_path, keep=1, lineage=RUN) == ["global_step1"]
    assert [path.name for path in tmp_path.glob("*global_step*")] == ["global_step2"]
    assert pulses() >= before + 3
    assert idleness.look() == 0.0


def test_a_person_may_take_long(clock: list[float]) -> None:
    idleness = signs.Idleness(5.0)
    with phase("waiting for a prompt", lawful=True):
        assert looks(clock, idleness, computing=0.0) == 0.0


def test_a_process_that_was_stopped_itself_begins_anew(clock: list[float]) -> None:
    idleness = signs.Idleness(5.0)
    clock[0] += 3600.0
    assert idleness.look() == 0.0


def test_places_of_a_thousand_ranks() -> None:
    assert ranges([*range(512), 513, 1000, 1001]) == "0-511,513,1000-1001"
    last = {"name": "all_reduce", "call": 5, "elements": 8, "ranks": 2, "inside": True, "failed": False, "seconds": 1.0}
    place = {"step": 3, "phase": "training", "last": last, "stacks": {"": ["neox/training/plain.py:1 train_step"]}}
    other = place | {"stacks": {"": ["neox/data/loader.py:9 fetch", *(f"torch/x.py:{n} f" for n in range(40))]}}
    lines = places({rank: other if rank == 7 else place for rank in range(1000)}, {})
    assert lines == [
        "Where every rank stood:",
        "  rank 7: step 3, in all_reduce (call 5, 8 elements, 2 ranks), for 1.0 s",
        "    neox/data/loader.py:9 fetch",
        "    torch/x.py:37 f",
        "    torch/x.py:38 f",
        "    torch/x.py:39 f",
        "  ranks 0-6,8-999: step 3, in all_reduce (call 5, 8 elements, 2 ranks), for 1.0 s",
        "    neox/training/plain.py:1 train_step",
    ]


def test_who_does_not_know_the_token_is_not_heard() -> None:
    async def talk() -> tuple[bytes, str]:
        server = Server(size=1, token="secret", timeout=60.0, interval=5.0, say=print)
        listening = await asyncio.start_server(server.accept, "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*listening.sockets[0].getsockname())
        writer.write(b'{"kind":"greeting","token":"guess","rank":0,"host":"h","process":1}\n{"kind":"failed"}\n')
        answer = await reader.read()
        writer.close()
        listening.close()
        return answer, server._peers[0].state

    assert asyncio.run(talk()) == (b"", "running")


def test_a_forked_process_does_not_hold_a_connection_open() -> None:
    ours, theirs = socket.socketpair()
    keep_from_children(ours)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(writer)
        os.read(reader, 1)  # until the test ends
        os._exit(0)
    theirs.settimeout(30)
    with ours, theirs:
        ours.close()
        assert theirs.recv(1) == b""
    os.close(writer)
    os.waitpid(child, 0)
    os.close(reader)


def test_a_terminal_that_hangs_does_not_hold_up_the_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    reached, released = threading.Event(), threading.Event()

    def hang(text: str) -> None:
        reached.set()
        released.wait(240)

    monkeypatch.setattr(sys, "stderr", SimpleNamespace(write=hang, flush=lambda: None))
    monkeypatch.setattr(client, "_SECONDS_TO_PRINT", 0.1)
    client.say("rank 3 is gone")
    assert reached.wait(60)
    released.set()


def test_a_watch_that_fails_ends_its_process(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    async def defective(self: object, server: object, listening: object) -> None:
        raise ZeroDivisionError("a defect of the watch")

    ended = []
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setattr(session.Watch, "_watch", defective)
    monkeypatch.setattr(session, "end_now", lambda: ended.append(3))
    session.Watch(60.0)._run(None, None)
    assert ended == [3]
    assert "the watch of rank 5 failed: ZeroDivisionError: a defect of the watch" in capfd.readouterr().err


@pytest.mark.parametrize(("path", "is_its_own"), [("torch/utils/data/handler.py", False), ("torch/gloo.py", True)])
def test_a_loader_that_dies_during_a_collective_is_no_failure_of_it(path: str, is_its_own: bool) -> None:
    """torch raises it wherever the main thread is, which is mostly in a collective."""
    with pytest.raises(RuntimeError) as raised:
        exec(compile("raise RuntimeError('is killed by signal')", f"/site-packages/{path}", "exec"))
    Record().fail(raised.value)
    assert raised_by_collective(raised.value) == is_its_own


def test_where_a_collective_broke_is_known_while_its_exception_is_on_its_way() -> None:
    def reduces_gradients() -> None:
        record = own_record()
        record.begin("all_reduce", None, 8)
        try:
            raise RuntimeError("connection closed by peer")
        except RuntimeError as error:
            record.fail(error)
            raise
        finally:
            record.end()

    def stack() -> str:
        return "\n".join(signs.standing(0.0)["stacks"][""])

    with pytest.raises(RuntimeError):
        reduces_gradients()
    assert "reduces_gradients" in stack()
    own_record().begin("all_reduce", None, 8)
    own_record().end()
    assert "reduces_gradients" not in stack()
