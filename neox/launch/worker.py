"""What a worker process does about the process that started it."""

import ctypes
import os
import signal
import sys
from collections.abc import MutableMapping

LAUNCHER_PID = "NEOX_LAUNCHER_PID"

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def die_with_parent(environ: MutableMapping[str, str]) -> None:
    """Have the kernel kill this process when the launcher that started it dies, even by SIGKILL.

    Takes NEOX_LAUNCHER_PID out of `environ`, so that programs started by the worker do not take the
    launcher for their parent. Does nothing without that variable, or outside Linux. Called by the worker
    rather than between fork and exec, where only async-signal-safe code may run; so the parent may already
    be gone, which is checked after.

    Raises:
        SystemExit: the launcher died before this call.
    """
    launcher = environ.pop(LAUNCHER_PID, None)
    if launcher is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(launcher):
        raise SystemExit(128 + signal.SIGKILL)
