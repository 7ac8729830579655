"""Printing a user's mistake once, although every rank meets it."""

import fcntl
import os
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from neox.errors import UserError
from neox.launch.environment import Placement
from neox.launch.node import detect_node

ERROR_LOCK = "NEOX_ERROR_LOCK"  # path of a file shared by the workers of one host

# Longer than any launcher needs to end the other ranks once one has failed (torchrun looks every 0.1 s).
_LAUNCHER_REACTION_SECONDS = 1.0


def report_user_error(error: UserError, *, environ: Mapping[str, str] | None = None) -> None:
    """Write the error's text to stderr, once per group of local workers.

    Workers of `neox.launch.local` share a file: the first to lock it prints and the others see that it did.
    Under another launcher the first rank of each host prints at once; the others wait a second, in which
    the launcher ends them if that rank met the same mistake, and then print with their rank in front.
    """
    environ = os.environ if environ is None else environ
    if environ.get(ERROR_LOCK):
        _print_if_first(str(error), environ[ERROR_LOCK])
    elif environ.get("LOCAL_RANK", "0") == "0":
        _print(str(error))
    else:
        time.sleep(_LAUNCHER_REACTION_SECONDS)
        _print(f"[rank {environ.get('RANK', '?')}] {error}")


def print_notices(lines: Iterable[str], placement: Placement | None) -> None:
    """Write lines to stderr once for a run: in what starts the workers (on the first host), else in rank 0."""
    started_by_us = placement is not None and placement.launcher == "local"
    if placement is None:
        node = detect_node(os.environ)
        speaks = node is None or node.rank == 0
    else:
        speaks = placement.rank == 0 and not started_by_us
    if speaks:
        for line in lines:
            _print(line)


def _print_if_first(message: str, lock_path: str) -> None:
    # Held while printing: a worker that finds the mark and exits has the launcher end the others.
    with Path(lock_path).open("a+", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.seek(0)
        if not lock.read():
            _print(message)
            lock.write("printed")


def _print(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
