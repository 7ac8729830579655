"""Hosts with different code or packages do not train together: found before the first step, in one line."""

import hashlib
import os
import socket
import time

import torch
import torch.distributed as dist

from neox.errors import LaunchError
from neox.versions import differences, software

_MOST_NAMED = 4
_SECONDS_FOR_RANK_0 = 1.0


def agree_on_software(device: torch.device) -> None:
    """Compare versions across the hosts of the default group; ranks of one host read the same files anyway.

    Args:
        device: where this rank's collectives lie.

    Raises:
        LaunchError: in rank 0, naming what differs and where.
        SystemExit: in the others, with the status of a user's mistake.
    """
    world = dist.get_world_size()
    if os.environ.get("LOCAL_WORLD_SIZE") == str(world):
        return
    found = software()
    # A hash is compared first: the names and versions of thousands of ranks are worth sending only if they differ.
    digest = torch.tensor([_hash(found), -_hash(found)], dtype=torch.int64, device=device)
    dist.all_reduce(digest, op=dist.ReduceOp.MAX)
    if int(digest[0]) == -int(digest[1]):
        return
    everyone: list[tuple[str, dict[str, str]]] = [("", {})] * world
    dist.all_gather_object(everyone, (socket.gethostname(), found))
    if dist.get_rank() > 0:
        time.sleep(_SECONDS_FOR_RANK_0)  # the first to end has the launcher end the others
        raise SystemExit(2)
    unequal = differences(dict(everyone))
    shown = "; ".join(unequal[:_MOST_NAMED])
    raise LaunchError(f"the hosts differ: {shown}; install the same on all, or share one folder")


def _hash(found: dict[str, str]) -> int:
    """A number of 60 bits, the same in every process that has the same versions."""
    return int(hashlib.sha256(repr(sorted(found.items())).encode()).hexdigest()[:15], 16)
