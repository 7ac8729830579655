"""Plain ssh: asking hosts, and running one command on each until all end, with nothing left behind on any."""

import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType

from neox import results
from neox.errors import LaunchError
from neox.launch.endings import ENDING, Insistence, exit_status, forwarded_signals

SSH = (
    *("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10"),
    *("-o", "ServerAliveInterval=60", "-o", "ServerAliveCountMax=10"),
)
"""Never asks for a password, and ends when nothing has come from the host for ten minutes."""

_POLL_SECONDS = 0.1
_SECONDS_TO_END = 15.0
"""Longer than `neox.launch.remote` gives a program that is to end; after that the line to the host is cut."""
_MOST_AT_ONCE = 64


def check_reachable(hosts: Iterable[str]) -> None:
    """Ask every host over ssh, all at the same time.

    Raises:
        LaunchError: naming each that does not answer, with ssh's reason.
    """
    if silent := silent_hosts(hosts):
        named = "; ".join(f"{host} ({reason})" for host, reason in silent.items())
        raise LaunchError(f"hostfile: no answer over ssh from {named}; `ssh HOST true` must work without a password")


def silent_hosts(hosts: Iterable[str]) -> dict[str, str]:
    """Hosts that do not answer over ssh, with ssh's reason; all are asked at the same time."""
    names = list(hosts)
    with ThreadPoolExecutor(_MOST_AT_ONCE) as threads:
        return {host: reason for host, reason in zip(names, threads.map(_ask, names), strict=True) if reason}


def _ask(host: str) -> str:
    """The reason why a host does not answer; empty if it does."""
    try:
        done = subprocess.run(
            [*SSH, host, "true"], capture_output=True, text=True, errors="replace", timeout=30, check=False
        )
    except FileNotFoundError:
        return "ssh is not installed here"
    except subprocess.TimeoutExpired:
        return "no answer in 30 s"
    lines = done.stderr.strip().splitlines()
    return "" if done.returncode == 0 else (lines[-1] if lines else f"status {done.returncode}")


def remote_command(argv: Sequence[str], variables: Mapping[str, str]) -> list[str]:
    """What to give ssh after the host's name: our folder, the variables, and a watcher that runs `python ARGV...`.

    The watcher (`neox.launch.remote`) ends the program when its standard input ends, so when ssh ends for any reason.
    """
    settings = [f"{name}={value}" for name, value in variables.items()]
    command = ["exec", "env", *settings, sys.executable, "-m", "neox.launch.remote", *argv]
    return [f"cd {shlex.quote(str(Path.cwd()))} && {shlex.join(command)}"]


def run_everywhere(commands: Mapping[str, Sequence[str]], heard: list[int] | None = None) -> int:
    """Run each host's command over ssh and wait for all; the first to fail ends the others.

    SIGINT, SIGTERM, SIGHUP, SIGUSR1 and SIGUSR2 are passed on; a second SIGINT or SIGTERM ends all at once. A host that
    does not end its program in 15 s is given up: its link is cut, say.

    Args:
        commands: by host.
        heard: list to which the signals are added that this process is sent.

    Returns:
        Exit status as of `neox.launch.local.run_local`.
    """
    connections = _Connections([] if heard is None else heard)
    with forwarded_signals(connections.handle):
        try:
            for host, command in commands.items():
                connections.start([*SSH, host, *command])
            return connections.wait()
        finally:
            connections.hang_up()


class _Connections:
    """One ssh process for each host; its standard input carries signals, and its end ends the program there."""

    def __init__(self, heard: list[int]) -> None:
        self.processes: list[subprocess.Popen[bytes]] = []
        self.heard = heard
        self._insistence = Insistence()

    def start(self, command: Sequence[str]) -> None:
        # A group of its own: Ctrl-C at the terminal must not cut the line before the program has saved its work.
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=results.descriptor(), process_group=0)
        self.processes.append(process)

    def wait(self) -> int:
        first_failure, deadline = 0, float("inf")
        while None in (statuses := [process.poll() for process in self.processes]):
            if not first_failure and any(statuses):
                first_failure = next(status for status in statuses if status)
                self.hang_up()
                deadline = time.monotonic() + _SECONDS_TO_END
            if time.monotonic() > deadline:
                self.cut()
            time.sleep(_POLL_SECONDS)
        return exit_status(first_failure, [status for status in statuses if status], self.heard)

    def handle(self, signum: int, frame: FrameType | None) -> None:
        if signum in ENDING and self._insistence.is_echo(signum):
            return
        self.heard.append(signum)
        if signum in ENDING and self._insistence.is_again(signum):
            self.hang_up()
            return
        for process in self.processes:
            if process.poll() is None and process.stdin and not process.stdin.closed:
                try:
                    process.stdin.write(f"{signal.Signals(signum).name}\n".encode())
                    process.stdin.flush()
                except BrokenPipeError:
                    continue

    def hang_up(self) -> None:
        for process in self.processes:
            if process.stdin and not process.stdin.closed:
                try:
                    process.stdin.close()
                except BrokenPipeError:
                    continue

    def cut(self) -> None:
        """End the lines that are left, whatever is at their other end."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
