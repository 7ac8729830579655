"""Signals that ask a run to end: noted when they come, answered when the step is done."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

import torch.distributed as dist

from neox.launch.endings import EXIT_INTERRUPTED, Insistence, tell_of_early_end

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_ENOUGH = b"\0"  # no signal has this number


class Signals:
    """The signals that have come so far.

    Attributes:
        received: in order.
        have_met: whether the ranks have; one that still waits for others ends by itself, at once.
        are_answered: whether the process ends now as they asked; those that still come are ignored then.
    """

    def __init__(self, status: int = 0) -> None:
        """Begin to note.

        Args:
            status: of a process that a scheduler ends before the ranks have met.
        """
        self.received: list[signal.Signals] = []
        self.have_met = dist.is_initialized()
        self.are_answered = False
        self._status = status

    def note(self, signum: int, frame: FrameType | None = None) -> None:
        """A signal handler, which must not do more: it may interrupt anything, a save and a print too.

        Raises:
            KeyboardInterrupt: at SIGINT before the ranks have met.
            SystemExit: at any other signal before that.
        """
        self.received.append(signal.Signals(signum))
        if not self.have_met:
            tell_of_early_end(signum)
            raise KeyboardInterrupt if signum == signal.SIGINT else SystemExit(self._status)


@contextmanager
def noted_signals(status: int = 0) -> Iterator[Signals]:
    """Note SIGINT, SIGTERM, SIGUSR1 and SIGHUP instead of dying of them; a second SIGINT ends the process at once.

    A signal that is ignored stays so, as `nohup` wants. Python runs a handler only between two of its instructions,
    which a main thread that hangs in a collective never reaches; so a thread counts the SIGINTs.

    Args:
        status: of a process that a scheduler ends before the ranks have met.
    """
    signals = Signals(status)
    handled = [signum for signum in ENDING if signal.getsignal(signum) is not signal.SIG_IGN]
    before = {signum: signal.signal(signum, signals.note) for signum in handled}
    for signum in handled:
        signal.siginterrupt(signum, False)  # libraries need not know about interrupted system calls
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    other_writer = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    thread = threading.Thread(target=_listen, args=(reader, signals), name="signals", daemon=True)
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


def _listen(reader: int, signals: Signals) -> None:
    """Read the numbers of signals as they come."""
    insistence = Insistence()
    while (byte := os.read(reader, 1)) != _ENOUGH:
        if byte[0] != signal.SIGINT or insistence.is_echo(signal.SIGINT):
            continue
        if insistence.is_again(signal.SIGINT):
            os._exit(EXIT_INTERRUPTED)
        if signals.have_met and os.environ.get("RANK", "0") == "0":
            with suppress(OSError):  # Ctrl-C ends a `tee` that read it, too
                print(
                    "SIGINT: the run ends after its step; a second one ends it now, unsaved",
                    file=sys.stderr,
                    flush=True,
                )
