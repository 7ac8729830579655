"""When a run began: where processes start others, the first of them says so."""

import os
import time
from collections.abc import Mapping

STARTED = "NEOX_STARTED"  # seconds since 1970

_IMPORTED = time.time()


def started(environ: Mapping[str, str]) -> float:
    """Time at which the command of the user began, in seconds since 1970.

    As the process says that started this one, so that neither imports nor restarts are forgotten; else the start of
    this process.
    """
    told = environ.get(STARTED)
    return float(told) if told else _own_start()


def _own_start() -> float:
    """Linux knows it to a hundredth of a second; elsewhere this module's import is near enough."""
    try:
        with open("/proc/self/stat", encoding="ascii", errors="replace") as file:
            # The name of the program, in brackets, may have blanks of its own. Start is field 22, in ticks since boot.
            ticks = int(file.read().rpartition(")")[2].split()[19])
    except OSError:
        return _IMPORTED
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")
