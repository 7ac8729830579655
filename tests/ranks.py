"""Run a function on n real processes that talk over gloo.

The fork server imports torch, DeepSpeed, megatron-core and this project once; each rank is a fork of it, so a
multi-process test costs about a second instead of half a minute.
"""

import contextlib
import multiprocessing
import os
import pickle
import random
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import connection, forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

SECONDS_FOR_PEERS = 30.0
"""In which the others may end when one has failed; they are killed then."""


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 240.0) -> list[Any]:
    """Call `function(*args)` on every rank and return what each returned, by rank.

    Args:
        function: a function of a module, as it must be pickled; it finds RANK, WORLD_SIZE and the rest in
            the environment.
        world_size: number of processes.
        timeout: seconds for the whole run.

    Raises:
        AssertionError: with the traceback of the rank that failed first.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes = _start(function, world_size, args, folder)
        try:
            wait_for(processes, timeout)
        finally:
            kill(processes)
        return [_result(Path(folder), rank, processes) for rank in range(world_size)]


def kill_ranks_when(
    happened: Callable[[], bool], function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 240.0
) -> None:
    """Start `function(*args)` on every rank and kill -9 them all as soon as `happened()`.

    Raises:
        AssertionError: if it does not happen in time, or the ranks end by themselves first.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes = _start(function, world_size, args, folder)
        try:
            deadline = time.monotonic() + timeout
            while not happened():
                assert time.monotonic() < deadline, "what was to happen before the kill did not"
                if not all(p.is_alive() for p in processes):
                    wait_for(processes, SECONDS_FOR_PEERS)
                    _result(Path(folder), 0, processes)
                    raise AssertionError("the ranks ended before the kill")
                time.sleep(0.005)
        finally:
            kill(processes)


def _start(function: Callable[..., Any], world_size: int, args: tuple[Any, ...], folder: str) -> list[BaseProcess]:
    variables = [rank_variables(rank, world_size, port) for port in [free_port()] for rank in range(world_size)]
    return [fork(_rank_main, function, args, place | {"PATH": os.environ["PATH"]}, folder) for place in variables]


def fork(function: Callable[..., None], *args: Any) -> BaseProcess:
    """Start `function(*args)` in a process in which all of `ranks_preload` is imported already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ranks_preload"])
    with _server_finds(Path(__file__).parent):
        forkserver.ensure_running()
    process = context.Process(target=_with_default_start, args=(function, *args))
    process.start()
    return process


def _with_default_start(function: Callable[..., None], *args: Any) -> None:
    # A child of the fork server would start its own children, the workers of loaders, through servers of their own,
    # each of which imports torch; a script that is started as usual does not.
    multiprocessing.set_start_method(None, force=True)
    function(*args)


@contextlib.contextmanager
def _server_finds(folder: Path) -> Iterator[None]:
    """Let a fork server that is started meanwhile import from `folder`; Python 3.11 passes no `sys.path` on to it."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), str(folder.parent), *([before] if before else [])])
    try:
        yield
    finally:
        del os.environ["PYTHONPATH"]
        if before is not None:
            os.environ["PYTHONPATH"] = before


def rank_variables(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What a launcher on this machine tells a rank."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }


def kill(processes: list[BaseProcess]) -> None:
    """End those that still run, and see all of them gone."""
    for process in processes:
        process.kill()
    for process in processes:
        process.join()


def _ports() -> Iterator[int]:
    """Ports in random order, below those that the kernel gives to connections; of each worker of pytest its own."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    ports = [port for port in range(10_000, 29_000) if port % 16 == worker % 16]
    while True:
        yield from random.SystemRandom().sample(ports, len(ports))


_untried_ports = _ports()


def free_port() -> int:
    """A TCP port nobody listens on now, and none that was given before: its listener may be still to come."""
    for port in _untried_ports:
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port
    raise AssertionError("unreachable")


def wait_for(processes: list[BaseProcess], timeout: float) -> None:
    """Return when all have ended, one has failed and its peers had time to notice, or time is up."""
    deadline = time.monotonic() + timeout
    while (left := deadline - time.monotonic()) > 0 and (running := [p for p in processes if p.is_alive()]):
        connection.wait([p.sentinel for p in running], left)
        if any(p.exitcode for p in processes):
            deadline = min(deadline, time.monotonic() + SECONDS_FOR_PEERS)


def _rank_main(function: Callable[..., Any], args: tuple[Any, ...], variables: dict[str, str], folder: str) -> None:
    os.environ.update(variables, OMP_NUM_THREADS="1")
    rank, world_size = int(variables["RANK"]), int(variables["WORLD_SIZE"])
    output = Path(folder) / f"{rank}.pickle"
    try:
        outcome = ("ok", function(*args))
    except BaseException:
        outcome = ("error", traceback.format_exc())
    output.with_suffix(".tmp").write_bytes(pickle.dumps(outcome))
    output.with_suffix(".tmp").rename(output)
    if rank == 0 and outcome[0] == "ok":
        _outlast([output.with_stem(str(other)) for other in range(1, world_size)])
    os._exit(outcome[0] == "error")


def _outlast(outputs: list[Path]) -> None:
    """Wait for the others, who may still read from the store that is in this process; but not for one that has died."""
    deadline = time.monotonic() + SECONDS_FOR_PEERS
    while time.monotonic() < deadline and not all(output.exists() for output in outputs):
        time.sleep(0.002)


def _result(folder: Path, rank: int, processes: list[BaseProcess]) -> Any:
    failures = [f for r in range(len(processes)) if (f := _failure(folder, r))]
    if failures:
        raise AssertionError("\n".join(failures))
    path = folder / f"{rank}.pickle"
    if not path.exists():
        codes = [p.exitcode for p in processes]
        raise AssertionError(f"rank {rank} gave no result in time; exit codes {codes}")
    return pickle.loads(path.read_bytes())[1]


def _failure(folder: Path, rank: int) -> str | None:
    path = folder / f"{rank}.pickle"
    if not path.exists():
        return None
    status, value = pickle.loads(path.read_bytes())
    return f"rank {rank}:\n{value}" if status == "error" else None
