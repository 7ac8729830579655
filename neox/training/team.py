"""The ranks of a run as those that write and check a checkpoint together."""

import sys
from contextlib import suppress
from typing import Any

import torch.distributed as dist

from neox.checkpoint.native.fallback import Check
from neox.checkpoint.native.integrity import team_damages
from neox.checkpoint.native.store import Team
from neox.parallel.mesh import Mesh


def team_of(mesh: Mesh, group: dist.ProcessGroup | None = None) -> Team:
    """All ranks, which exchange objects through `group`; None for the one that all collectives of training use."""

    def gather(item: Any) -> list[Any]:
        everyone: list[Any] = [None] * mesh.world_size
        dist.all_gather_object(everyone, item, group=group)
        return everyone

    return Team(rank=mesh.rank, size=mesh.world_size, gather=gather)


def thorough_check(mesh: Mesh) -> Check:
    """Compare every byte with its checksum, each rank a share of the files; the first rank warns."""
    team = team_of(mesh)
    return Check(lambda folder: team_damages(folder, team), lambda line: tell(mesh, line))


def tell(mesh: Mesh, line: str) -> None:
    """Write a line to stderr, once for all ranks; where nobody reads it, the run goes on."""
    if mesh.rank == 0:
        with suppress(OSError):
            print(line, file=sys.stderr, flush=True)
