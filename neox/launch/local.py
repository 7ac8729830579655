"""Starting all ranks of this machine: what `python train.py` does when no launcher did it."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from neox import results
from neox.errors import LaunchError, UserError
from neox.launch.clock import STARTED, started
from neox.launch.endings import ENDING, Insistence, exit_status, forwarded_signals
from neox.launch.environment import LOCAL_LAUNCH, LOOPBACK, Placement, export
from neox.launch.node import Node
from neox.launch.reporting import ERROR_LOCK
from neox.launch.worker import LAUNCHER_PID

if TYPE_CHECKING:
    from neox.config import Config

_POLL_SECONDS = 0.05
_ERROR = "error"


def local_worker_count(config: "Config", cuda_devices: int) -> int:
    """Return the number of workers to start when nothing but this machine is asked for.

    With GPUs: all of them, or `num_gpus` if that is fewer. Without: `num_gpus`, or one model-parallel replica
    (`model_parallel_size` x pipeline stages).
    """
    asked = config.launch.num_gpus or 0
    if cuda_devices > 0:
        return min(cuda_devices, asked) if asked > 0 else cuda_devices
    return asked if asked > 0 else config.parallel.model_parallel_size * config.parallel.pipeline_stages


def run_local(
    argv: Sequence[str],
    *,
    workers: int,
    environ: Mapping[str, str],
    node: Node | None = None,
    grace: float = 10.0,
    heard: list[int] | None = None,
) -> int:
    """Run `workers` copies of `python ARGV...` as the ranks of this machine, and wait for all.

    The first worker to fail ends the others: SIGTERM, then SIGKILL after `grace` seconds. SIGINT, SIGTERM
    and SIGHUP are passed on, and the workers may take their time (to save a checkpoint); a SIGINT or SIGTERM after
    that kills them. SIGUSR1 and SIGUSR2 are passed on as often as they come. If this process is killed the
    workers die with it, provided that they call `die_with_parent`, as `script_main` does.

    Args:
        argv: script and its arguments, as in `sys.argv`.
        workers: processes to start here; without `node`, the size of the world.
        environ: environment of the workers, before the rank's variables are added.
        node: this machine among the hosts of the run; None if it is the only one.
        grace: seconds between SIGTERM and SIGKILL.
        heard: list to which the signals are added that this process is sent.

    Returns:
        Exit status: 0 if all succeeded, 2 if any worker ended with 2 or told of a user's mistake, else that of the
        first to fail, 128 + N for signal N.

    Raises:
        LaunchError: a worker cannot be started.
    """
    group = _Workers(terminal=sys.stdin is not None and sys.stdin.isatty(), heard=[] if heard is None else heard)
    with tempfile.TemporaryDirectory(prefix="neox-launch-") as folder, forwarded_signals(group.handle):
        try:
            alone = node is None or node.count == 1
            shared = _shared_environment(environ, workers=workers, folder=Path(folder), alone=alone)
            group.start([sys.executable, *argv], places=_places(workers, None if alone else node), environ=shared)
            status = _supervise(group, grace=grace)
        finally:
            group.end()
        # Whoever met it may have been ended for what others died of.
        return UserError.exit_status if _was_mistake(Path(folder)) else status


def single_placement() -> Placement:
    """Return the placement of a process that is the whole world, with a free port for its rendezvous."""
    return Placement(
        rank=0,
        local_rank=0,
        world_size=1,
        local_world_size=1,
        master_addr=LOOPBACK,
        master_port=free_port(),
        launcher="local",
    )


class _Workers:
    """The processes of one world that run on this machine, in rank order."""

    def __init__(self, *, terminal: bool, heard: list[int]) -> None:
        self.terminal = terminal
        self.heard = heard
        self.processes: list[subprocess.Popen[bytes]] = []
        self._insistence = Insistence()
        self._orphaned: set[int] = set()

    def start(self, command: Sequence[str], *, places: Sequence[Placement], environ: Mapping[str, str]) -> None:
        for place in places:
            before = len(self.heard)
            if any(signum in ENDING for signum in self.heard):  # asked to stop while starting
                return
            try:
                self.processes.append(self._start_one(command, place, environ))
            except OSError as error:
                which = f"worker {place.local_rank} of {len(places)}"
                raise LaunchError(f"cannot start {which}: {error}; try fewer workers") from error
            for signum in self.heard[before:]:  # came before it was one of those that are told
                self._pass_on(signum, [place.local_rank])

    def _start_one(
        self, command: Sequence[str], place: Placement, environ: Mapping[str, str]
    ) -> subprocess.Popen[bytes]:
        variables = dict(environ)
        export(place, variables)
        rank = place.local_rank
        # Only the first may read the terminal, and a process that does must stay in the terminal's foreground
        # group.
        return subprocess.Popen(
            command,
            env=variables,
            stdout=results.descriptor(),
            stdin=None if rank == 0 else subprocess.DEVNULL,
            process_group=None if self._shares_terminal(rank) else 0,
        )

    def _shares_terminal(self, rank: int) -> bool:
        return self.terminal and rank == 0

    def alive(self) -> list[int]:
        """Ranks still running."""
        return [rank for rank, process in enumerate(self.processes) if process.poll() is None]

    def failures(self) -> list[int]:
        """Nonzero statuses of the workers that have ended, in rank order; negative for a signal."""
        return [process.returncode for process in self.processes if process.returncode]

    def end_orphans(self) -> None:
        """Kill the children, data loaders say, of workers that failed since the last call."""
        for rank, process in enumerate(self.processes):
            if process.returncode and rank not in self._orphaned:
                self._orphaned.add(rank)
                if not self._shares_terminal(rank):
                    with contextlib.suppress(ProcessLookupError):  # most have none
                        os.killpg(process.pid, signal.SIGKILL)

    def send(self, signum: int) -> None:
        """Send a signal to every running worker; SIGKILL reaches the worker's own children too."""
        for rank in self.alive():
            if signum == signal.SIGKILL and not self._shares_terminal(rank):
                os.killpg(self.processes[rank].pid, signum)
            else:
                self.processes[rank].send_signal(signum)

    def end(self) -> None:
        """Leave no process behind, whatever happened."""
        self.send(signal.SIGKILL)
        for process in self.processes:
            process.wait()
        self.end_orphans()

    def handle(self, signum: int, frame: FrameType | None) -> None:
        """Signal handler: pass warnings and the first request to end on, turn who asks again into SIGKILL."""
        if signum in ENDING:
            if self._insistence.is_echo(signum):
                return
            if self._insistence.is_again(signum):
                self.heard.append(signum)
                self.send(signal.SIGKILL)
                return
        self.heard.append(signum)
        self._pass_on(signum, self.alive())

    def _pass_on(self, signum: int, ranks: Sequence[int]) -> None:
        for rank in ranks:
            # The terminal has already interrupted the worker in its foreground group.
            if not (signum == signal.SIGINT and self._shares_terminal(rank)):
                self.processes[rank].send_signal(signum)


def _supervise(group: _Workers, *, grace: float) -> int:
    first_failure = 0
    deadline = float("inf")
    while group.alive():
        group.end_orphans()
        if not first_failure and group.failures():
            first_failure = group.failures()[0]
            deadline = time.monotonic() + grace
            group.send(signal.SIGTERM)
        if time.monotonic() > deadline:
            group.send(signal.SIGKILL)
        time.sleep(_POLL_SECONDS)
    if not group.processes:
        return 128 + group.heard[0]
    return exit_status(first_failure, group.failures(), group.heard)


def _places(workers: int, node: Node | None) -> list[Placement]:
    """Placements of this machine's ranks, in order."""
    first = single_placement()
    if node is None:
        first = replace(first, world_size=workers, local_world_size=workers)
    else:
        first = replace(
            first,
            rank=node.first_rank(workers),
            world_size=node.world_size(workers),
            local_world_size=workers,
            master_addr=node.master_addr,
            master_port=node.master_port,
        )
    return [replace(first, rank=first.rank + number, local_rank=number) for number in range(workers)]


def _shared_environment(environ: Mapping[str, str], *, workers: int, folder: Path, alone: bool) -> dict[str, str]:
    variables = {
        # Without this every worker starts a thread per core and they fight over them.
        "OMP_NUM_THREADS": str(max(1, _available_cores() // workers)),
        **environ,
        LOCAL_LAUNCH: "1",
        LAUNCHER_PID: str(os.getpid()),
        ERROR_LOCK: str(folder / _ERROR),
        STARTED: str(started(environ)),
    }
    if alone and sys.platform.startswith("linux"):
        # gloo otherwise resolves the host's name, which on laptops and behind VPNs leads nowhere.
        variables.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return variables


def _was_mistake(folder: Path) -> bool:
    path = folder / _ERROR
    return path.exists() and path.read_text() == str(UserError.exit_status)


def _available_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def free_port(address: str = LOOPBACK) -> int:
    """A TCP port of this machine that nobody has now."""
    with socket.socket() as probe:
        probe.bind((address, 0))
        port: int = probe.getsockname()[1]
        return port
