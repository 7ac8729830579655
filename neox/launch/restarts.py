"""Starting the ranks of a run again after some of them were lost."""

import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from neox.launch.endings import EXIT_INTERRUPTED, forwarded_signals
from neox.launch.main import EXIT_USER_ERROR
from neox.launch.reporting import tell
from neox.launch.variables import RESTARTS
from neox.results import EXIT_BROKEN_PIPE

if TYPE_CHECKING:
    from neox.config import Config

REQUEUE_STATUS = 75
"""`requeue_status` of a run that a scheduler starts again by its status: EX_TEMPFAIL of <sysexits.h>."""

_COUNTS = (RESTARTS, "TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
_FINAL = (0, EXIT_USER_ERROR, EXIT_INTERRUPTED, EXIT_BROKEN_PIPE)
"""Statuses that trying again does not mend."""

_LONGEST_PAUSE = 60.0
_POLL_SECONDS = 0.05


def times_restarted(environ: Mapping[str, str]) -> int:
    """How often this run was started before, as far as this process knows.

    torchrun tells its hosts different numbers: one that only saw others come or go counts no restart.
    """
    return max(int(text) if (text := environ.get(name, "")).isdecimal() else 0 for name in _COUNTS)


@dataclass(frozen=True)
class Restarts:
    """How often a run is started again, and what ends it for good.

    Attributes:
        limit: restarts in a row without a new checkpoint.
        save: folder of checkpoints, in which progress is seen; None if the run saves nothing.
        requeue_status: status of a run that was asked to end and is to go on later; None for what does not go on.
    """

    limit: int = 0
    save: Path | None = None
    requeue_status: int | None = None

    @classmethod
    def of(cls, config: "Config") -> "Restarts":
        """As configured."""
        save = config.checkpoint.save
        settings = config.reliability
        return cls(settings.max_restarts, None if save is None else Path(save), settings.requeue_status)

    def newest(self) -> tuple[str, int]:
        """What tells one checkpoint from the next without opening either."""
        try:
            latest = (self.save / "latest") if self.save is not None else None
            return ("", 0) if latest is None else (latest.read_text(errors="replace"), latest.stat().st_mtime_ns)
        except OSError:
            return "", 0

    def is_final(self, status: int) -> bool:
        """Whether starting again cannot mend what ended with this status, or is not to."""
        return status in _FINAL or status == self.requeue_status

    def when_asked(self, status: int, heard: Sequence[int]) -> int:
        """The status of a run that was asked to end: processes that had yet to learn of it die of the signal itself."""
        if self.requeue_status is None or status not in {128 + signum for signum in heard}:
            return status
        return EXIT_INTERRUPTED if status == 128 + signal.SIGINT else self.requeue_status


Attempt = Callable[[int, list[int]], int | None]
"""Starts all ranks and waits for them: given the number of the restart, 0 at first, and the list to which it adds the
signals that it is sent; returns the exit status, or None where nothing can be started any more."""


def run_with_restarts(attempt: Attempt, restarts: Restarts) -> int:
    """Make attempts until one ends for good, or `restarts.limit` in a row made no checkpoint; return the last status.

    Before each restart there is a pause, a second at first and twice as long each time. A signal that asks the run to
    end, or warns of its end, is the last word: no attempt follows it.
    """
    heard: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        heard.append(signum)

    with forwarded_signals(note):
        number = in_a_row = status = 0
        while True:
            before = restarts.newest()
            ended = attempt(number, heard)
            if ended is None:
                return status
            status = ended
            if _asked(heard):
                return restarts.when_asked(status, heard)
            if restarts.is_final(status):
                return status
            in_a_row = 0 if restarts.newest() != before else in_a_row
            if in_a_row >= restarts.limit:
                return status
            number, in_a_row = number + 1, in_a_row + 1
            tell(f"status {status}; restart {in_a_row} of {restarts.limit}")
            if not pause(min(_LONGEST_PAUSE, 2.0 ** (in_a_row - 1)), heard):
                return status


def pause(seconds: float, heard: list[int]) -> bool:
    """Wait, and say whether that was not cut short by a signal that asks the run to end."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if _asked(heard):
            return False
        time.sleep(_POLL_SECONDS)
    return not _asked(heard)


def _asked(heard: list[int]) -> bool:
    """Whether one of the signals asks the run to end; SIGUSR2 does not."""
    return any(signum != signal.SIGUSR2 for signum in heard)
