"""Meeting under torchrun, whose store outlives the ranks: those of a restart must not read what dead ones wrote.

torch 2.13 keeps one store in the agent of the first host and gives it to every attempt unless
TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 is set where torchrun is started. gloo's ranks then find addresses of the attempt
before, NCCL's its identifier. So every attempt has a part of the store to itself, which rank 0 names, and a rank has
found the part of its own attempt when rank 0 answers it there.
"""

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from datetime import timedelta

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from neox.errors import AbsentError, LaunchError

_ATTEMPT = "neox/attempt"
_SECONDS_BETWEEN_LOOKS = 1.0
_MOST_NAMED = 8


def attempt_store(environ: Mapping[str, str], timeout: timedelta) -> Store:
    """The part of the agent's store that belongs to this attempt, as soon as all its ranks have come.

    Raises:
        LaunchError: the agent's store cannot be reached.
        AbsentError: not all come in time.
    """
    place = environ["MASTER_ADDR"], int(environ["MASTER_PORT"])
    try:
        store = TCPStore(*place, is_master=False, timeout=timeout, wait_for_workers=False)
    except dist.DistError as error:
        raise LaunchError(f"meeting at {place[0]}:{place[1]}: {str(error).splitlines()[0]}") from None
    rank, world = int(environ["RANK"]), int(environ["WORLD_SIZE"])
    name = _open(store, world, timeout) if rank == 0 else _find(store, rank, timeout)
    return PrefixStore(name, store)


def _open(store: Store, world: int, timeout: timedelta) -> str:
    """Name the attempt, and answer the others when all are there."""
    name = f"{_ATTEMPT}/{uuid.uuid4().hex}"
    store.set(_ATTEMPT, name)
    keys = [f"{name}/here/{rank}" for rank in range(1, world)]
    deadline, look = time.monotonic() + timeout.total_seconds(), timedelta(seconds=_SECONDS_BETWEEN_LOOKS)
    while keys and not _come(store, keys, look):  # between two looks signals are answered
        if time.monotonic() < deadline:
            continue
        absent = [rank for rank, key in enumerate(keys, start=1) if not store.check([key])]
        raise AbsentError(
            f"torchrun: after {timeout.total_seconds():g} s (distributed_timeout) {came_and_absent(world, absent)}"
        )
    store.set(f"{name}/answer", json.dumps({key: store.get(key).decode() for key in keys}))
    return name


def came_and_absent(world: int, absent: Sequence[int]) -> str:
    """How many ranks came, and which did not."""
    named = ", ".join(map(str, absent[:_MOST_NAMED])) + (", ..." if len(absent) > _MOST_NAMED else "")
    return f"{world - len(absent)} of {world} ranks came; absent: {named}; what they printed may say why"


def _find(store: Store, rank: int, timeout: timedelta) -> str:
    """Come to the attempt that is open now, and see by rank 0's answer that it is ours and not one that has ended."""
    deadline, look = time.monotonic() + timeout.total_seconds(), timedelta(seconds=_SECONDS_BETWEEN_LOOKS)
    word, name = uuid.uuid4().hex, ""
    while time.monotonic() < deadline:
        found = store.get(_ATTEMPT).decode() if _come(store, [_ATTEMPT], look) else ""
        if found != name:
            name = found
            store.set(f"{name}/here/{rank}", word)
        if name and _come(store, [f"{name}/answer"], look):
            if json.loads(store.get(f"{name}/answer"))[f"{name}/here/{rank}"] == word:
                return name
            time.sleep(_SECONDS_BETWEEN_LOOKS)  # an attempt that has ended
    raise AbsentError(
        f"torchrun: after {timeout.total_seconds():g} s (distributed_timeout) rank 0 had not come; what it printed may "
        "say why; if hosts left and came back, set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 where torchrun is started"
    )


def _come(store: Store, keys: list[str], time_for_it: timedelta) -> bool:
    """Wait for keys; say whether they are there."""
    try:
        store.wait(keys, time_for_it)
    except dist.DistError:
        return False
    return True
