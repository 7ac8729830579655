"""Signals that ask a run to end: noted when they come, answered when the step is done."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from neox.launch.main import EXIT_INTERRUPTED

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_ENOUGH = b"\0"  # no signal has this number


class Signals:
    """The signals that have come so far.

    Attributes:
        received: in order.
        are_answered: whether the process ends now as they asked; those that still come are ignored then.
    """

    def __init__(self) -> None:
        self.received: list[signal.Signals] = []
        self.are_answered = False

    def note(self, signum: int, frame: FrameType | None = None) -> None:
        """A signal handler, which must not do more: it may interrupt anything, a save and a print too."""
        self.received.append(signal.Signals(signum))


@contextmanager
def noted_signals() -> Iterator[Signals]:
    """Note SIGINT, SIGTERM, SIGUSR1 and SIGHUP instead of dying of them; a second SIGINT ends the process at once.

    A signal that is ignored stays so, as `nohup` wants. Python runs a handler only between two of its instructions,
    which a main thread that hangs in a collective never reaches; so a thread counts the SIGINTs.
    """
    signals = Signals()
    handled = [signum for signum in ENDING if signal.getsignal(signum) is not signal.SIG_IGN]
    before = {signum: signal.signal(signum, signals.note) for signum in handled}
    for signum in handled:
        signal.siginterrupt(signum, False)  # libraries need not know about interrupted system calls
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    other_writer = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    thread = threading.Thread(target=_listen, args=(reader,), name="signals", daemon=True)
    thread.start()
    try:
        yield signals
    finally:
        signal.set_wakeup_fd(other_writer)
        for signum, handler in before.items():
            # Launchers, srun above all, end all ranks by SIGTERM when the first has ended with a status other than 0.
            signal.signal(signum, signal.SIG_IGN if signals.are_answered else handler)
        os.write(writer, _ENOUGH)
        thread.join()
        os.close(reader)
        os.close(writer)


def _listen(reader: int) -> None:
    """Read the numbers of signals as they come."""
    interrupts = 0
    while (byte := os.read(reader, 1)) != _ENOUGH:
        interrupts += byte[0] == signal.SIGINT
        if interrupts > 1:
            os._exit(EXIT_INTERRUPTED)
        if byte[0] == signal.SIGINT and os.environ.get("RANK", "0") == "0":
            print("SIGINT: the run ends after its step; a second one ends it now, unsaved", file=sys.stderr, flush=True)
