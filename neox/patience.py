"""How long what a disk or a network store refused is tried again."""

import errno
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from neox.errors import UserError
from neox.pulse import pulse

log = logging.getLogger(__name__)

Result = TypeVar("Result")

_MISTAKES = (
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ELOOP, errno.ENAMETOOLONG),
)

FIRST_PAUSE = 1.0
LONGEST_PAUSE = 30.0
"""Seconds between two tries; each pause is twice as long as the one before, up to this."""


@dataclass(frozen=True)
class Patience:
    """Time in which a failed read or write is tried again.

    Attributes:
        seconds: from the first failure on; 0 for none.
        sleep: waits for so many seconds.
        clock: seconds since some moment.
    """

    seconds: float = 0.0
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic

    def pauses(self) -> Iterator[float]:
        """Seconds to sleep before each further try, counted from the first request; ends when time is up."""
        end = self.clock() + self.seconds
        pause = FIRST_PAUSE
        while (left := end - self.clock()) > 0:
            pulse()  # trying again is no stall
            yield min(pause, left)
            pause = min(2 * pause, LONGEST_PAUSE)


IMPATIENT = Patience()

_OF_PATHS = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EROFS)
"""What only the path can be to blame for, and who may use it; a file that is not there may be a defect."""


def path_mistake(error: OSError) -> UserError | None:
    """The mistake of who named a path that cannot be one, or that is not for us; None for any other error."""
    if error.filename is None or error.errno not in _OF_PATHS:
        return None
    return UserError(f"{os.fsdecode(error.filename)}: cannot be used ({error.strerror}); check the path and its rights")


def is_mistake(error: OSError) -> bool:
    """Whether a file that was not used before gives this because it is not there, or not for us."""
    return error.errno in _MISTAKES


def read_again(path: Path, read: Callable[[], Result], error: OSError, patience: Patience) -> Result:
    """Do again what failed, until it works or time is up; two lines say so, however often it is tried.

    Args:
        path: the file, for the lines.
        read: opens and reads it.
        error: why it failed.
        patience: how long to try.

    Raises:
        OSError: the last error.
    """
    start = patience.clock()
    for number, pause in enumerate(patience.pauses()):
        if number == 0:
            log.warning("%s, trying again for %.0f s", unreadable(path, error), patience.seconds)
        patience.sleep(pause)
        try:
            result = read()
        except OSError as again:
            error = again
            continue
        log.warning("%s: can be read again by %s, after %.0f s", path, here(), patience.clock() - start)
        return result
    raise error


def unreadable(path: Path, error: OSError) -> str:
    """That a file cannot be read, by whom, and why."""
    return f"{path}: cannot be read by {here()} ({error.strerror or error})"


def here() -> str:
    """This process, for a line that any process may write: `rank 3 on n1`."""
    rank = os.environ.get("RANK")
    return f"rank {rank} on {socket.gethostname()}" if rank else socket.gethostname()
