"""Killed at any moment of a save, the checkpoint before it is whole, and the next save works."""

import itertools
import os
import random
import sys
import time
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from checkpoint.small_checkpoints import RUN, save, stored
from ranks import fork, kill, run_ranks

from neox.checkpoint.native.commit import prune_checkpoints
from neox.checkpoint.native.integrity import damages
from neox.checkpoint.native.manifest import checkpoint_folder
from neox.checkpoint.native.store import Team
from neox.checkpoint.storage.tensor_file import TensorFileWriter

KILLS, SEED = 50, 20240607
NUMBERS = 60_000
"""A rank writes 1.1 MB of weights and moments with this many in each."""

DIED = 9


def whole(root: Path) -> str:
    """What `latest` says; every byte of that checkpoint is as it was written."""
    folder = checkpoint_folder(root)
    assert folder is not None
    assert damages(folder) == []
    return (root / "latest").read_text()


def hidden(root: Path) -> list[str]:
    return sorted(path.name for path in root.glob(".*"))


def save_for_ever(root: Path, first: int, rank: int, peer: Connection, ready: Connection) -> None:
    """Save as one of two ranks, every iteration twice."""

    def gather(item: Any) -> list[Any]:
        peer.send(item)
        other = peer.recv()
        return [item, other] if rank == 0 else [other, item]

    gather("ready")
    ready.send("go")
    for number in itertools.count():
        save(root, first + number // 2, team=Team(rank, 2, gather), numbers=NUMBERS)
        if rank == 0:
            prune_checkpoints(root, keep=2, lineage=RUN)


def killed_after(root: Path, first: int, seconds: float) -> None:
    """Have two ranks save, and kill both after so many seconds."""
    peers, (ready, told) = Pipe(), Pipe()
    ranks = [fork(save_for_ever, root, first, rank, peers[rank], told) for rank in range(2)]
    try:
        for _ in ranks:
            assert ready.poll(240)
            assert ready.recv() == "go"
        time.sleep(seconds)
    finally:
        kill(ranks)
    assert [process.exitcode for process in ranks] == [-DIED] * 2


def test_fifty_kills_at_random_moments(tmp_path: Path) -> None:
    print(f"seed {SEED}")
    moments = random.Random(SEED)
    begun = time.monotonic()
    save(tmp_path, 0, numbers=2 * NUMBERS)
    duration = min(time.monotonic() - begun, 0.15)
    unfinished, iteration = 0, 1
    for _ in range(KILLS):
        killed_after(tmp_path, iteration, moments.uniform(0, 3 * duration))
        unfinished += any(name.endswith((".incomplete", ".replaced")) for name in hidden(tmp_path))
        iteration = int(whole(tmp_path).removeprefix("global_step")) + 1
        save(tmp_path, iteration)
        assert whole(tmp_path) == f"global_step{iteration}"
        assert hidden(tmp_path) == []
    assert unfinished >= KILLS / 5, "most kills are to fall into a save"


def die_at(operation: int) -> list[str]:
    """From now on count what is done to files, and die before the one of this number, or in the middle of a write."""
    done: list[str] = []

    def count(name: str) -> bool:
        done.append(name)
        return len(done) == operation

    def on_event(event: str, arguments: tuple[Any, ...]) -> None:
        changes = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod")
        opened_to_write = event == "open" and isinstance(arguments[2], int) and arguments[2] & os.O_CREAT
        if (changes or opened_to_write) and count(event):
            os._exit(DIED)

    write = TensorFileWriter._write

    def counted_sync(descriptor: int) -> None:
        if count("fsync"):
            os._exit(DIED)

    def counted_write(writer: TensorFileWriter, data: Any) -> None:
        if count("write"):
            write(writer, data[: len(data) // 2])
            os._exit(DIED)
        write(writer, data)

    sys.addaudithook(on_event)
    os.fsync, TensorFileWriter._write = counted_sync, counted_write  # type: ignore[method-assign]
    return done


def save_dying(root: Path, iteration: int, operation: int) -> str:
    """Save in a process that dies at an operation; the names of all operations if it lived."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        done = die_at(operation)
        save(root, iteration)
        prune_checkpoints(root, keep=1, lineage=RUN)
        os.write(writing, ",".join(done).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as told:
        names = told.read()
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert status == (0 if names else DIED)
    return names


def die_at_each_operation(root: Path, again: bool) -> str:
    """Save once for each operation, and die there; check what is left. Returns the names of all operations."""
    os.fsync = lambda descriptor: None  # this process is the test's own; what is killed needs no disk, only power does
    save(root, 0)
    iteration = 0
    for operation in itertools.count(1):
        iteration += not again
        names = save_dying(root, iteration, operation)
        assert whole(root) in (f"global_step{iteration}", f"global_step{iteration - 1}")
        save(root, iteration)
        assert whole(root) == f"global_step{iteration}"
        assert hidden(root) == []
        if names:
            return names
    raise AssertionError("unreachable")


def test_death_at_each_operation_of_a_save(tmp_path: Path) -> None:
    for again in (False, True):
        (names,) = run_ranks(die_at_each_operation, 1, tmp_path / str(again), again)
        operations = names.split(",")
        assert len(operations) > 40
        # a text of configs, manifest, folder, latest; the folder whose place it takes, or one that is pruned
        assert operations.count("os.rename") >= 5
        assert operations.count("write") == len(list(stored(0))) + 2
        assert {"fsync", "os.rmdir", "os.remove"} <= set(operations)
