"""How the processes of a run find each other, and how long their groups wait.

Every process is to meet the others within `distributed_timeout`. Once they have, the watch (`neox.watch`) notices who
is lost, and tells it from who only takes long: one rank may build the index of a corpus for hours while the others
wait in a collective. The groups' own timeouts must not come before it, so they are long.
"""

import os
import resource
import socket
import time
from datetime import timedelta

import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore
from torch.distributed import distributed_c10d as c10d

from neox.errors import AbsentError, LaunchError
from neox.parallel.collectives import record_collectives
from neox.parallel.torchrun import attempt_store, came_and_absent

GROUP_TIMEOUT = timedelta(days=1)
"""How long a collective waits at most; a second net, should the watch fail."""

_MOST_FILES = 1 << 16
_POLL_SECONDS = 0.1
_SECONDS_TO_LINGER = 2.0


def join_world(backend: str, timeout: timedelta) -> None:
    """Meet the processes that RANK, WORLD_SIZE and MASTER_ADDR describe, and make the group of all.

    Its collectives wait for `timeout` until `wait_long` is called.

    Raises:
        LaunchError: the meeting place cannot be used.
        AbsentError: not all come in time.
    """
    record_collectives()
    _allow_connections()
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store = attempt_store(os.environ, timeout)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
        return
    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    deadline = time.monotonic() + timeout.total_seconds()
    if rank > 0:
        _await_first(place, deadline, timeout)
    try:
        store = TCPStore(*place, world, rank == 0, timeout, wait_for_workers=False, multi_tenant=True)
        _call_roll(store, rank, world, deadline, timeout)
    except dist.DistError as error:
        raise LaunchError(f"meeting at {place[0]}:{place[1]}: {str(error).splitlines()[0]}") from None
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)


def wait_long() -> None:
    """Have the group of all, and all groups made from now on, wait for GROUP_TIMEOUT."""
    c10d._set_pg_timeout(GROUP_TIMEOUT)
    # For the groups that libraries make.
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        setattr(c10d, name, GROUP_TIMEOUT)


def _allow_connections() -> None:
    """Allow this process more open files: gloo connects every rank with every other, and many shells allow 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft not in (resource.RLIM_INFINITY, wanted) and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _await_first(place: tuple[str, int], deadline: float, timeout: timedelta) -> None:
    """Wait until rank 0 listens; torch's store would fill pages with each of its attempts."""
    while True:
        try:
            with socket.create_connection(place, timeout=max(1.0, deadline - time.monotonic())):
                return
        except OSError as error:
            if time.monotonic() > deadline:
                why = f"{error.strerror or error}; is it started, and may {socket.gethostname()} reach it?"
                raise AbsentError(f"{_meeting(place, timeout)} rank 0 was not there: {why}") from None
            time.sleep(_POLL_SECONDS)


def _call_roll(store: TCPStore, rank: int, world: int, deadline: float, timeout: timedelta) -> None:
    """Wait until all have come, as the last one says.

    Raises:
        AbsentError: on all that have come, naming those who have not.
    """
    store.set(f"here/{rank}", "")
    if store.add("number", 1) == world:
        store.set("complete", "")
    while not store.check(["complete"]):
        if rank == 0 and time.monotonic() > deadline:
            absent = [other for other in range(world) if not store.check([f"here/{other}"])]
            store.set("absent", " ".join(map(str, absent)))
        if store.check(["absent"]):
            # Rank 0 keeps the store, which the others have to read.
            time.sleep(_SECONDS_TO_LINGER if rank == 0 else 0.0)
            absent = [int(number) for number in store.get("absent").decode().split()]
            raise AbsentError(f"{_meeting((store.host, store.port), timeout)} {came_and_absent(world, absent)}")
        time.sleep(_POLL_SECONDS * (1 + world / 256))  # all of them ask one process


def _meeting(place: tuple[str, int], timeout: timedelta) -> str:
    return f"meeting at {place[0]}:{place[1]}: after {timeout.total_seconds():g} s (distributed_timeout)"
