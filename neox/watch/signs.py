"""Signs of life of this process: what it is at, whether it gets on, and where it stands."""

import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch.distributed as dist

from neox.parallel.collectives import Record, last_record, records, stack_of
from neox.pulse import pulse, pulses

TRAINING = "training"
STARTING = "starting"
ENDING = "ending"

_WATCHED_THREADS = ("checkpoint",)
"""Names of threads whose stacks are shown beside the main thread's."""

_BUSY_SHARE = 0.02
"""Share of a core above which a process works rather than waits."""

_BUSY_CHARACTERS = 1 << 16
"""Bytes read and written, likewise, between two looks."""


@dataclass
class _Signs:
    """What the main thread says of itself; any thread may read it.

    Attributes:
        step: iterations done.
        phase: what it is at.
        lawful: whether nothing is expected of it: it waits for a person, say.
    """

    step: int = 0
    phase: str = STARTING
    lawful: bool = False


_signs = _Signs()


def begin() -> None:
    """A new run begins in this process."""
    _signs.__init__()  # type: ignore[misc]


def at_step(iteration: int, *, is_last: bool = False) -> None:
    """Say that so many iterations are done. From the first to the last every step must end in time."""
    _signs.step, _signs.phase = iteration, ENDING if is_last else TRAINING
    pulse()


@contextmanager
def phase(name: str, *, lawful: bool = False) -> Iterator[None]:
    """Name what the main thread is at, other than a training step.

    In such a phase a process also gets on as long as it computes, reads or writes: how long it takes is not known.

    Args:
        name: for the report.
        lawful: it may even wait as long as it likes.
    """
    before = _signs.phase, _signs.lawful
    _signs.phase, _signs.lawful = name, lawful
    pulse()
    try:
        yield
    finally:
        _signs.phase, _signs.lawful = before
        pulse()


class Idleness:
    """For how long the main thread has not got on, as looked at in regular intervals.

    Args:
        interval: seconds between two looks.
    """

    def __init__(self, interval: float) -> None:
        self._interval = interval
        self._looked = self._got_on = time.monotonic()
        self._progress = self._count()
        self._work = _work()

    def look(self) -> float:
        """Seconds since the main thread last got on."""
        now, progress, work = time.monotonic(), self._count(), _work()
        # This process itself may have been stopped, and with it all others: then everyone starts anew.
        slept = now - self._looked > 4 * self._interval + 1.0
        if slept or progress != self._progress or _signs.lawful or self._works(work, now):
            self._got_on = now
        self._looked, self._progress, self._work = now, progress, work
        return now - self._got_on

    def _count(self) -> tuple[int, int]:
        return sum(record.calls for record in records().values()), pulses()

    def _works(self, work: tuple[float, int], now: float) -> bool:
        """Whether it computes, reads or writes, outside of training; a process inside a collective may only spin."""
        if _signs.phase == TRAINING or last_record().inside:
            return False
        seconds, characters = work[0] - self._work[0], work[1] - self._work[1]
        return seconds > _BUSY_SHARE * (now - self._looked) or characters > _BUSY_CHARACTERS


def _work() -> tuple[float, int]:
    """Seconds of computing time so far, of this process and of what it has started; bytes that it read and wrote."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
        characters = sum(int(line.split()[1]) for line in lines if line.startswith(("rchar", "wchar")))
    except (OSError, ValueError, IndexError):
        characters = 0
    return time.process_time() + _seconds_of_children(), characters


def _seconds_of_children() -> float:
    """Computing time of all that descends from this process, compilers above all, which it waits for."""
    seconds, unseen = 0.0, ["self"]
    while unseen:
        process = unseen.pop()
        try:
            # The name of the program, in brackets, may have blanks of its own. Fields 14 to 17 are the time of the
            # process, and that of its children that have ended, in user and system mode.
            fields = Path(f"/proc/{process}/stat").read_text(errors="replace").rpartition(")")[2].split()[11:15]
            seconds += sum(map(int, fields if process != "self" else fields[2:]))
            for children in Path(f"/proc/{process}/task").glob("*/children"):
                unseen += children.read_text().split()
        except (OSError, ValueError):  # it has just ended, or this system tells nothing of it
            continue
    return seconds / os.sysconf("SC_CLK_TCK")


def glance(idle: float) -> dict[str, Any]:
    """What a heartbeat tells: step, phase, seconds without progress, and the last collective."""
    return {"step": _signs.step, "phase": _signs.phase, "idle": round(idle, 3), "last": _last(last_record())}


def standing(idle: float, traceback: TracebackType | None = None) -> dict[str, Any]:
    """All that a report tells of this process: a glance, the collectives begun by group, and the stacks.

    Args:
        idle: seconds without progress.
        traceback: of the exception that the main thread came out with, which tells more than where it is now.
    """
    main, frames = threading.main_thread(), sys._current_frames()
    record = records().get(main.ident or 0)
    if traceback is not None:
        stacks = {"": frames_of(traceback)}
    elif record is not None and record.failed:  # and the exception is on its way
        stacks = {"": [_place(*call) for call in record.stack]}
    else:
        stacks = {"": _frames(frames.get(main.ident or 0))}
    threads = {thread.ident: thread.name for thread in threading.enumerate() if thread is not main}
    for number, frame in frames.items():
        name = threads.get(number, "autograd")
        is_inside = number in records() and records()[number].inside
        if number != main.ident and (is_inside or name in _WATCHED_THREADS):
            stacks[name] = _frames(frame)
    return glance(idle) | {"started": _started(), "stacks": stacks}


def host() -> str:
    """This machine, for the report."""
    return socket.gethostname()


def _last(record: Record) -> dict[str, Any] | None:
    if not record.name:
        return None
    members = _members(record.where)
    return {
        "name": record.name,
        "call": record.calls,
        "elements": record.elements,
        "ranks": dist.get_world_size() if members is None and dist.is_initialized() else len(members or ()),
        "inside": record.inside,
        "failed": record.failed,
        "seconds": round(time.monotonic() - record.since, 3),
    }


def _started() -> list[tuple[str, list[int] | None, int]]:
    """Collectives begun, by group: its name, its ranks (None: all), and how many; messages by pair of ranks."""
    found: dict[str, tuple[list[int] | None, int]] = {}
    for record in records().values():
        for where, count in list(record.started.items()):
            name = _group_name(where)
            if name is not None:
                members, before = found.get(name, (_members(where), 0))
                found[name] = members, before + count
    return [(name, members, count) for name, (members, count) in found.items()]


def _group_name(where: Any) -> str | None:
    """Name of a group, the same on all its ranks; None for what has none any more."""
    if where is None or where is dist.group.WORLD:
        return ""
    if isinstance(where, tuple):
        direction, peer = where
        own = dist.get_rank() if dist.is_initialized() else 0
        return f"{own}>{peer}" if direction == "send" else f"{peer}>{own}"
    return str(where.group_name) if isinstance(where, dist.ProcessGroup) else None


def _members(where: Any) -> list[int] | None:
    """Ranks of a group; None for all."""
    if where is None or where is dist.group.WORLD or not dist.is_initialized():
        return None
    if isinstance(where, tuple):
        return sorted({dist.get_rank(), dist.get_rank() if where[1] is None else int(where[1])})
    try:
        return dist.get_process_group_ranks(where)
    except (KeyError, ValueError, RuntimeError):  # gone meanwhile
        return []


def _frames(frame: FrameType | None) -> list[str]:
    """Functions of a stack, the outermost first."""
    return [_place(*call) for call in stack_of(frame)]


def frames_of(traceback: TracebackType | None) -> list[str]:
    """Functions of a traceback, the outermost first."""
    found = []
    while traceback is not None:
        code = traceback.tb_frame.f_code
        found.append(_place(code.co_filename, traceback.tb_lineno, code.co_qualname))
        traceback = traceback.tb_next
    return found


def _place(path: str, line: int, function: str) -> str:
    """Without the folders that every line would have; the source itself may lie on a disk that hangs."""
    for mark in ("/site-packages/", "/dist-packages/"):
        path = path.rpartition(mark)[2]
    root = str(Path(__file__).parents[2]) + "/"
    library = f"/python{sys.version_info.major}.{sys.version_info.minor}/"
    return f"{path.removeprefix(root).rpartition(library)[2]}:{line} {function}"
