"""Programs run on hosts to be asked something: over ssh, or as steps of the Slurm job around us."""

import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from neox.launch.ssh import SSH, remote_command

Road = Literal["ssh", "srun"]
"""How a host is reached."""

_MOST_AT_ONCE = 256
_SECONDS_TO_END = 15.0


@dataclass(frozen=True)
class Reply:
    """What a program on a host printed, and how it ended.

    Attributes:
        status: exit status; None if it was ended for taking too long.
        lines: of its standard output.
        complaints: of its standard error.
    """

    status: int | None
    lines: list[str]
    complaints: list[str]

    @property
    def reason(self) -> str:
        """Why it failed, in one line."""
        if self.status is None:
            return "no answer in time"
        return self.complaints[-1] if self.complaints else f"status {self.status}"


@dataclass(frozen=True)
class Errand:
    """`python ARGV...` with variables added."""

    argv: Sequence[str]
    variables: Mapping[str, str]


def converse(errands: Mapping[str, Errand], *, road: Road, timeout: float) -> dict[str, Reply]:
    """Run each host's errand, all at the same time, and wait for all of them.

    Args:
        errands: by host.
        road: ssh, or srun inside a job.
        timeout: seconds after which a program is ended.
    """
    with ThreadPoolExecutor(_MOST_AT_ONCE) as threads:
        replies = threads.map(lambda host: _run(host, errands[host], road, timeout), errands)
        return dict(zip(errands, replies, strict=True))


def _run(host: str, errand: Errand, road: Road, timeout: float) -> Reply:
    command, variables = _command(host, errand, road)
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,  # its end ends the program over there
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",  # banners come in any encoding
            env=os.environ | variables,
            process_group=0,
        )
    except FileNotFoundError:
        return Reply(127, [], [f"{command[0]} is not installed here"])
    with process:
        return _listen(process, timeout)


def _listen(process: "subprocess.Popen[str]", timeout: float) -> Reply:
    assert process.stdout is not None
    assert process.stderr is not None
    complaints: list[str] = []
    listener = threading.Thread(target=complaints.extend, args=(process.stderr,))
    listener.start()
    late = threading.Event()
    clocks = [
        threading.Timer(timeout, _hang_up, (process, late)),
        # Where the line is cut nothing tells the far end, nor us.
        threading.Timer(timeout + _SECONDS_TO_END, process.kill),
    ]
    for clock in clocks:
        clock.start()
    lines = process.stdout.read().splitlines()
    listener.join()
    status = process.wait()
    for clock in clocks:
        clock.cancel()
    return Reply(None if late.is_set() else status, lines, [line.strip() for line in complaints if line.strip()])


def _command(host: str, errand: Errand, road: Road) -> tuple[list[str], dict[str, str]]:
    if road == "ssh":
        return [*SSH, host, *remote_command(errand.argv, errand.variables)], {}
    step = ["srun", "--nodes=1", "--ntasks=1", f"--nodelist={host}", "--overlap"]
    return [*step, sys.executable, "-m", "neox.launch.remote", *errand.argv], dict(errand.variables)


def _hang_up(process: "subprocess.Popen[str]", late: threading.Event) -> None:
    late.set()
    if process.stdin is not None:
        process.stdin.close()
