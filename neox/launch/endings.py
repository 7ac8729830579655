"""How a group of processes ends: signals passed on, and one exit status for all."""

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
EXIT_LOST = 3
"""Status of a process whose run was lost: a process died, was cut off, or stalled."""

WARNING = (signal.SIGUSR1, signal.SIGUSR2)
"""Sent by schedulers some time before they end a job; sending one twice is no reason to end at once."""


@contextmanager
def forwarded_signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Give `handler` the signals that a launcher passes on to its workers, and restore what was there before."""
    # A signal that is ignored stays so, here and in the workers: that is how `nohup` works.
    handled = [signum for signum in ENDING + WARNING if signal.getsignal(signum) is not signal.SIG_IGN]
    previous = {signum: signal.signal(signum, handler) for signum in handled}
    try:
        yield
    finally:
        for signum, before in previous.items():
            signal.signal(signum, before)


def exit_status(first_failure: int, statuses: Sequence[int], heard: Sequence[int] = ()) -> int:
    """The status of a group: 2 if any ended with 2 (a user's mistake), else that of the first to fail.

    Args:
        first_failure: status of the process seen to fail first, 0 if none was.
        statuses: of all processes, as `Popen.returncode` has them: negative for a signal.
        heard: signals that the group was sent; it ends as interrupted where two of them are SIGINT.
    """
    if list(heard).count(signal.SIGINT) > 1:
        return 128 + signal.SIGINT
    failures = [status for status in statuses if status]
    if 2 in failures:
        return 2
    status = first_failure or (failures[0] if failures else 0)
    return 128 - status if status < 0 else status
