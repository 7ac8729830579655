"""Processes that read ahead for a rank, and live as long as it wants them."""

import os
import signal
import threading

_NOT_FOR_US = (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_SECONDS_BETWEEN_LOOKS = 5.0


def serve(rank_pid: int, worker: int) -> None:
    """Begin a worker's life: leave it to the rank to answer signals.

    Ctrl-C and a scheduler's signals reach all processes of a job, and the rank has steps to finish, for which it needs
    its workers. SIGTERM is also how the rank ends a worker that does not end by itself. A worker whose rank has died
    ends within seconds. torch's own see that by their parent, which is not the rank where a server starts them.

    Args:
        rank_pid: process that reads from this one.
        worker: number among its workers.
    """
    signal.set_wakeup_fd(-1)  # the rank's, which would take our signals for its own
    for signum in _NOT_FOR_US:
        signal.signal(signum, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_obey, args=(rank_pid,), daemon=True).start()


def _obey(rank_pid: int) -> None:
    """End this process when the rank says so, or is no more; a handler would not know who sent the signal."""
    while True:
        heard = signal.sigtimedwait({signal.SIGTERM}, _SECONDS_BETWEEN_LOOKS)
        if heard is not None and heard.si_pid == rank_pid:
            os._exit(0)
        try:
            os.kill(rank_pid, 0)
        except OSError:
            os._exit(0)
