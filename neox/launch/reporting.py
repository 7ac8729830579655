"""Printing a user's mistake once, although every rank meets it."""

import contextlib
import fcntl
import os
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from neox.errors import UserError
from neox.launch.environment import Placement, detect
from neox.launch.node import detect_node

ERROR_LOCK = "NEOX_ERROR_LOCK"  # path of a file that workers share

# Longer than any launcher needs to end the other ranks once one has failed (torchrun looks every 0.1 s).
_LAUNCHER_REACTION_SECONDS = 1.0


def report_user_error(error: UserError, *, environ: Mapping[str, str] | None = None) -> None:
    """Write the error's text to stderr, once for all that share the mistake.

    Workers of `neox.launch.local`, and of a batch file that `neox.launch slurm` wrote, share a file: the first to lock
    it prints and the others see that it did. Under another launcher rank 0 prints at once; the first rank of each
    other host waits a second and the rest two, in which the launcher ends them if they met the same mistake, and
    then print with their rank in front.
    """
    environ = os.environ if environ is None else environ
    if environ.get(ERROR_LOCK):
        _print_if_first(error, environ[ERROR_LOCK])
        return
    rank, local_rank = _ranks(environ)
    if rank == 0:
        tell(str(error))
    else:
        time.sleep(_LAUNCHER_REACTION_SECONDS * (1 if local_rank == 0 else 2))
        tell(f"[rank {rank}] {error}")


def _ranks(environ: Mapping[str, str]) -> tuple[int, int]:
    """Rank and local rank; zeros for a process that no launcher numbered, or numbered wrongly."""
    try:
        placement = detect(environ)
    except UserError:
        placement = None
    return (placement.rank, placement.local_rank) if placement else (0, 0)


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


def _print_if_first(error: UserError, lock_path: str) -> None:
    # Held while printing: a worker that finds the mark and exits has the launcher end the others.
    with Path(lock_path).open("a+", encoding="utf-8") as lock:
        with contextlib.suppress(OSError):  # some file systems of several hosts know no locks: then it is said twice
            fcntl.flock(lock, fcntl.LOCK_EX)
        lock.seek(0)
        if not lock.read():
            tell(str(error))
            lock.write(str(error.exit_status))


def tell(message: str) -> None:
    """Write a line to stderr at once."""
    print(message, file=sys.stderr, flush=True)
