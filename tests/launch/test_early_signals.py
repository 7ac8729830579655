"""Signals that come before there is anything to save, or several at once."""

import functools
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
from launch.test_local import HEARING, wait_for

from neox.launch import local
from neox.launch.endings import Insistence

ROOT = Path(__file__).resolve().parents[2]


def test_who_asks_again(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    insistence = Insistence()
    # As `timeout` does, and a terminal that is closed.
    assert [insistence.is_echo(signum) for signum in (signal.SIGTERM, signal.SIGTERM)] == [False, True]
    assert not insistence.is_echo(signal.SIGHUP)
    assert not insistence.is_again(signal.SIGHUP)
    now += 0.3
    assert not insistence.is_echo(signal.SIGTERM)
    assert insistence.is_again(signal.SIGTERM)
    assert insistence.is_again(signal.SIGINT)
    assert not insistence.is_again(signal.SIGHUP)


def test_a_signal_while_a_worker_is_started_reaches_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the fork and the note of it."""
    status, told = start_and_hear(monkeypatch, tmp_path, before=False)
    assert (status, told) == (0, str(int(signal.SIGTERM)))


def test_no_worker_is_started_after_a_signal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert start_and_hear(monkeypatch, tmp_path, before=True) == (128 + signal.SIGTERM, "")


def start_and_hear(monkeypatch: pytest.MonkeyPatch, folder: Path, *, before: bool) -> tuple[int, str]:
    """Run two workers under a launcher that is told to end while it starts the first; what that one heard."""
    (folder / "worker.py").write_text(textwrap.dedent(HEARING))
    start = local._Workers._start_one

    def interrupted(group: Any, command: Any, place: Any, environ: Any) -> Any:
        process = start(group, command, place, environ)
        wait_for([folder / "0"])
        os.kill(os.getpid(), signal.SIGTERM)
        return process

    monkeypatch.setattr(local._Workers, "_start_one", interrupted)
    heard = [int(signal.SIGTERM)] if before else []
    argv = [str(folder / "worker.py"), str(folder), "0"]
    status = local.run_local(argv, workers=2, environ=os.environ, heard=heard)
    assert not (folder / "1").exists()
    return status, (folder / "heard0").read_text() if (folder / "heard0").exists() else ""


EARLY = """
    import os, signal, sys
    from neox.launch.endings import EarlySignals
    number, moment = int(sys.argv[1]), sys.argv[2]
    with EarlySignals() as early:
        if moment != "early":
            early.answer_with(75)
        if moment != "after":
            os.kill(os.getpid(), number)
        print("still here", flush=True)
        early.answer_with(75)
    os.kill(os.getpid(), number)
"""


@pytest.mark.parametrize(
    ("signum", "moment", "status", "out"),
    [
        (signal.SIGTERM, "early", 75, "still here\n"),
        (signal.SIGUSR1, "late", 75, ""),
        (signal.SIGINT, "late", 130, ""),
        (signal.SIGINT, "early", 130, "still here\n"),
        (signal.SIGTERM, "after", -signal.SIGTERM, "still here\n"),
    ],
)
def test_a_signal_while_libraries_are_imported(signum: signal.Signals, moment: str, status: int, out: str) -> None:
    command = [sys.executable, "-c", textwrap.dedent(EARLY), str(int(signum)), moment]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    line = "" if moment == "after" else f"{signum.name}: ended before the first step; nothing to save\n"
    assert (done.returncode, done.stdout, done.stderr) == (status, out, line)


@pytest.mark.parametrize("signum", [signal.SIGHUP, signal.SIGINT])
def test_an_ignored_signal_stays_so_while_libraries_are_imported(signum: signal.Signals) -> None:
    """As under `nohup`, and in the background of a script."""
    command = [sys.executable, "-c", textwrap.dedent(EARLY), str(int(signum)), "late"]
    ignore = functools.partial(signal.signal, signum, signal.SIG_IGN)
    done = subprocess.run(command, cwd=ROOT, preexec_fn=ignore, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "still here\n", "")
