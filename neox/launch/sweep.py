"""Before ranks are started again on a host: `python -m neox.launch.sweep RUN` ends those that are left from before.

A host whose link was cut may still run them. They are known by a variable that all processes of a run inherit. Prints a
free port when they are gone.
"""

import os
import signal
import sys
import time
from pathlib import Path

from neox.launch.local import free_port
from neox.results import print_result

RUN = "NEOX_RUN"
"""Variable that every process of a run on the hosts of a file has: the run's own word."""

_SECONDS_TO_END = 20.0
_POLL_SECONDS = 0.05


def left_behind(run: str) -> list[int]:
    """Processes of this machine that belong to a run and have not ended; none outside Linux, where nobody can tell."""
    mark = f"{RUN}={run}".encode()
    return [int(path.name) for path in Path("/proc").glob("[0-9]*") if _is_of(path, mark)]


def _is_of(process: Path, mark: bytes) -> bool:
    try:
        state = (process / "stat").read_text(errors="replace").rpartition(")")[2].split()[0]
        return state not in "ZX" and mark in (process / "environ").read_bytes().split(b"\0")
    except (OSError, IndexError):  # it ended just now, or is another user's
        return False


def main(argv: list[str]) -> int:
    """Kill what is left of the run and wait until it is gone; status 1 names what does not end."""
    deadline = time.monotonic() + _SECONDS_TO_END
    while pids := left_behind(argv[0]):
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if time.monotonic() > deadline:
            print(f"processes {', '.join(map(str, pids))} of the run do not end", file=sys.stderr)
            return 1
        time.sleep(_POLL_SECONDS)
    print_result(free_port("0.0.0.0"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
