"""The memory of this machine: how much there is, and that what was freed goes back."""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

MEMINFO = Path("/proc/meminfo")


def available_bytes() -> int | None:
    """Memory that a process could take without swapping, as Linux estimates it; None where that is not told."""
    try:
        lines = MEMINFO.read_text().splitlines()
    except OSError:
        return None
    found = next((line.split() for line in lines if line.startswith("MemAvailable:")), None)
    return None if found is None else int(found[1]) * 1024


def return_freed() -> None:
    """Give memory that was freed back to the system, in a walk over tensors after each.

    glibc does not use freed blocks of up to 32 MB again for aligned ones, which those of tensors are
    (sourceware.org/bugzilla 14581), so that the walk would take all of them together.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


@cache
def _trim() -> Any:
    """`malloc_trim` of glibc; None where there is another library."""
    try:
        return ctypes.CDLL("libc.so.6").malloc_trim
    except (OSError, AttributeError):
        return None
