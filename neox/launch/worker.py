"""What a worker process does about the process that started it."""

import ctypes
import os
import signal
import sys
from collections.abc import MutableMapping

LAUNCHER_PID = "NEOX_LAUNCHER_PID"

_CARELESS = ("TORCHELASTIC_RUN_ID", "CROSS_RANK")
"""Variables of torchrun and of DeepSpeed's launcher, whose ranks would go on without them."""

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def die_with_parent(environ: MutableMapping[str, str]) -> None:
    """Have the kernel kill this process when the launcher that started it dies, even by SIGKILL.

    That is one of ours, by NEOX_LAUNCHER_PID, or torchrun, or DeepSpeed's. Takes NEOX_LAUNCHER_PID out of `environ`, so
    that programs started by the worker do not take the launcher for their parent. Does nothing under another launcher,
    or outside Linux. Called by the worker rather than between fork and exec, where only async-signal-safe code may run;
    so the parent may already be gone, which is checked after where its number is known.

    Raises:
        SystemExit: the launcher died before this call.
    """
    launcher = environ.pop(LAUNCHER_PID, None)
    is_rank = launcher is not None or any(name in environ for name in _CARELESS)
    if not is_rank or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if launcher is not None and os.getppid() != int(launcher):
        raise SystemExit(128 + signal.SIGKILL)
