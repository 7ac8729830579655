"""How a group of processes ends: signals passed on, and one exit status for all."""

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from types import FrameType
from typing import NoReturn, Self

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
EXIT_LOST = 3
"""Status of a process whose run was lost: a process died, was cut off, or stalled."""

EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it

WARNING = (signal.SIGUSR1, signal.SIGUSR2)
"""Sent by schedulers some time before they end a job; sending one twice is no reason to end at once."""

_SECONDS_OF_ECHOES = 0.2


class Insistence:
    """Tells who asks again from the echo of a first request to end.

    One request may come as several signals: `timeout` sends its own twice, a terminal that is closed SIGHUP two or
    three times, systemd SIGTERM with SIGHUP, and `pkill -f train.py` reaches workers to which their launcher passes it
    on too.
    """

    def __init__(self) -> None:
        self._heard: set[int] = set()
        self._first = float("inf")

    def is_echo(self, signum: int) -> bool:
        """Take note of a signal that asks for the end; whether it came just before already."""
        now = time.monotonic()
        self._first = min(self._first, now)
        is_known = signum in self._heard
        self._heard.add(signum)
        return is_known and now - self._first < _SECONDS_OF_ECHOES

    def is_again(self, signum: int) -> bool:
        """Whether a signal that was taken note of asks again; nobody does by SIGHUP, which a closed terminal sends."""
        return signum != signal.SIGHUP and time.monotonic() - self._first >= _SECONDS_OF_ECHOES


class EarlySignals:
    """Signals that ask for the end while libraries are imported, when there is nothing to save yet.

    The process ends at once, or as soon as its configuration has said with which status. An exception would not do:
    libraries catch it. Signals that are ignored stay so.
    """

    def __init__(self) -> None:
        """Begin with `with`."""
        self._status: int | None = None
        self._heard: int | None = None
        self._listening = ExitStack()

    def __enter__(self) -> Self:
        """Begin to listen."""
        self._listening.enter_context(forwarded_signals(self._hear))
        return self

    def __exit__(self, *raised: object) -> None:
        """Leave it to others."""
        self._listening.close()

    def answer_with(self, status: int) -> None:
        """End with this status when asked to, but for SIGINT; now, if that is what was asked."""
        self._status = status
        if self._heard is not None:
            self._end(self._heard, status)

    def _hear(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGUSR2:
            return
        if self._status is None:
            self._heard = self._heard or signum
        else:
            self._end(signum, self._status)

    def _end(self, signum: int, status: int) -> NoReturn:
        tell_of_early_end(signum)
        os._exit(EXIT_INTERRUPTED if signum == signal.SIGINT else status)


def tell_of_early_end(signum: int) -> None:
    """One line of rank 0, or of what starts the ranks; for a signal handler, which may have interrupted a print."""
    if os.environ.get("RANK", "0") == "0":
        line = f"{signal.Signals(signum).name}: ended before the first step; nothing to save\n"
        with suppress(OSError):
            os.write(2, line.encode())


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
        return EXIT_INTERRUPTED
    failures = [status for status in statuses if status]
    if 2 in failures:
        return 2
    status = first_failure or (failures[0] if failures else 0)
    return 128 - status if status < 0 else status
