"""Runs in which a process is lost: four ranks, each with a file for what it prints."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from ranks import fork, free_port
from training.layouts import ADAMW, MODEL, TRAINING

SIZE = 4
SECONDS_TO_END = 300


@dataclass
class Ended:
    """What was seen of a run.

    Attributes:
        statuses: by rank; None where it had to be killed.
        texts: what each printed.
    """

    statuses: list[int | None]
    texts: list[str]


def run_until_all_end(body: Callable[..., None], *args: Any, folder: Path, stopped: int | None = None) -> Ended:
    """Run `body(*args)` on four ranks until all have ended; `stopped` is one that does not end, and is killed then."""
    port = free_port()
    files = [folder / f"{rank}.txt" for rank in range(SIZE)]
    processes = [fork(_rank, body, args, rank, port, str(files[rank])) for rank in range(SIZE)]
    deadline = time.monotonic() + SECONDS_TO_END
    try:
        for rank, process in enumerate(processes):
            if rank != stopped:
                process.join(max(0.0, deadline - time.monotonic()))
        statuses = [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()
    return Ended(statuses, [file.read_text() for file in files])


def _rank(body: Callable[..., None], args: tuple[Any, ...], rank: int, port: int, file: str) -> None:
    os.chdir(Path(file).parent)
    output = os.open(file, os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": SIZE, "LOCAL_WORLD_SIZE": SIZE, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in variables.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1")
    from neox.launch.main import leave, script_main

    def main(argv: list[str]) -> None:
        body(*args)

    try:
        status = script_main(main, [])
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    leave(status)


def own_rank() -> int:
    return int(os.environ["RANK"])


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stopped() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def asleep() -> None:
    time.sleep(10 * SECONDS_TO_END)


def defective() -> None:
    raise ZeroDivisionError("a defect of this rank")


def mistaken() -> None:
    from neox.errors import DataError

    raise DataError("corpus.bin: is damaged; copy it again")


def mark(rank: int) -> Path:
    """The file that says that a rank waits in a collective."""
    return Path(f"{rank}.waits")


def mark_wait() -> None:
    """Say when this rank comes to its next collective."""
    from neox.watch.signs import glance

    while not glance(0.0)["last"]["inside"]:
        time.sleep(0.001)
    mark(own_rank()).touch()


def train_until(fault: Callable[[], None], rank: int, corpus: str, timeout: float, num_workers: int = 0) -> None:
    """Train without end on two tensor-parallel times two data-parallel ranks.

    One fails when it is to fetch its fourth batch, and the others have theirs and wait for it.
    """
    import torch

    from neox.config import config_from_dict
    from neox.data.loader import BatchLoader
    from neox.training.run import train

    torch.set_num_threads(1)
    flat = MODEL | TRAINING | ADAMW | {"data_path": corpus, "model_parallel_size": 2, "train_iters": 1000}
    flat |= {"distributed_timeout": timeout, "num_workers": num_workers}
    following, taken = BatchLoader.__next__, count(1)

    def fetch(loader: BatchLoader) -> Any:
        if next(taken) == 4:
            if own_rank() != rank:
                threading.Thread(target=mark_wait, daemon=True).start()
            else:
                while not all(mark(other).exists() for other in range(SIZE) if other != rank):
                    time.sleep(0.01)
                fault()
        return following(loader)

    BatchLoader.__next__ = fetch
    train(config_from_dict(flat, world_size=SIZE))


def reduce_until(fault: Callable[[], None], rank: int, timeout: float) -> None:
    """Add up without end, watched; one rank fails at its fifth step, or all of them for a rank of -1."""
    import torch
    import torch.distributed as dist

    from neox.config import config_from_dict
    from neox.parallel.mesh import build_mesh
    from neox.watch import at_step, server, watched

    if rank == -1:
        server.SECONDS_TO_SETTLE = 60.0  # which ends as soon as all have failed

    config = config_from_dict(MODEL | TRAINING | ADAMW | {"distributed_timeout": timeout}, world_size=SIZE)
    with watched(config) as watch:
        build_mesh(config, when_joined=watch.begin)
        for step in count(1):
            at_step(step)
            if step == 5 and rank in (own_rank(), -1):
                fault()
            dist.all_reduce(torch.ones(8))
