"""Printing a user's mistake once, although every rank meets it."""

import contextlib
import fcntl
import os
import socket
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from neox.errors import UserError
from neox.launch.environment import LOCAL_LAUNCH, Placement, detect
from neox.launch.node import detect_node

ERROR_LOCK = "NEOX_ERROR_LOCK"  # path of a file that workers share

_NUMBERS = ("RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID", "PMI_RANK", "PET_NODE_RANK")
"""Variables that number processes, whatever else their launcher forgot to tell."""

# Longer than any launcher needs to end the other ranks once one has failed (torchrun looks every 0.1 s).
_LAUNCHER_REACTION_SECONDS = 1.0

# What started the ranks of a host has to end before what started the hosts can end the others.
_SECONDS_BETWEEN_HOSTS = 3.0


def report_user_error(error: UserError, *, environ: Mapping[str, str] | None = None) -> None:
    """Write the error's text to stderr, once for all that share the mistake.

    Workers of `neox.launch.local`, and of a batch file that `neox.launch slurm` wrote, share a file: the first to lock
    it prints and the others see that it did. Where such workers run on several hosts, each with its own file, those of
    other hosts than the first wait some seconds. Under another launcher rank 0 prints at once; the first rank of each
    other host waits a second and the rest two. In that time the launcher ends them if they met the same mistake; then
    they print with their rank in front.
    """
    environ = os.environ if environ is None else environ
    rank, local_rank, name = _speaker(environ)
    if environ.get(ERROR_LOCK):
        # What starts the ranks of a host gives them a file of that host.
        is_elsewhere = LOCAL_LAUNCH in environ and rank > local_rank
        _print_if_first(error, environ[ERROR_LOCK], name=name if is_elsewhere else "")
    elif rank == 0:
        tell(str(error))
    else:
        time.sleep(_LAUNCHER_REACTION_SECONDS * (1 if local_rank == 0 else 2))
        tell(f"{name}{error}")


def _speaker(environ: Mapping[str, str]) -> tuple[int, int, str]:
    """Rank, local rank, and how lines of this process begin; what starts a host's ranks counts as a rank of its own."""
    try:
        placement, node = detect(environ), detect_node(environ)
    except UserError:  # numbered wrongly, or not told all
        found = [int(text) for name in _NUMBERS if (text := environ.get(name, "")).isdecimal()]
        rank = found[0] if found else 0
        return rank, 0, f"[rank {rank}] "
    if placement is not None:
        return placement.rank, placement.local_rank, f"[rank {placement.rank}] "
    return (0 if node is None else node.rank), 0, f"[{socket.gethostname()}] "


def print_notices(lines: Iterable[str], placement: Placement | None) -> None:
    """Write lines to stderr once for a run: in what starts the workers (on the first host), else in rank 0."""
    started_by_us = placement is not None and placement.launcher == "local"
    if placement is None:
        node = detect_node(os.environ)
        speaks = node is None or node.rank == 0
    else:
        speaks = placement.rank == 0 and not started_by_us
    if speaks:
        for line in filter(None, lines):
            tell(line)


def _print_if_first(error: UserError, lock_path: str, *, name: str) -> None:
    # Held while printing: a worker that finds the mark and exits has the launcher end the others.
    with Path(lock_path).open("a+", encoding="utf-8") as lock:
        with contextlib.suppress(OSError):  # some file systems of several hosts know no locks: then it is said twice
            fcntl.flock(lock, fcntl.LOCK_EX)
        lock.seek(0)
        if lock.read():
            return
        if name:
            # Marked before it is said: whoever is ended in the meantime has met a mistake all the same.
            print(error.exit_status, end="", file=lock, flush=True)
            time.sleep(_SECONDS_BETWEEN_HOSTS)
            tell(f"{name}{error}")
        else:
            tell(str(error))
            lock.write(str(error.exit_status))


def tell(message: str) -> None:
    """Write a line to stderr at once; where nobody reads it, what starts a run stays with its ranks all the same."""
    with contextlib.suppress(OSError):
        print(message, file=sys.stderr, flush=True)
