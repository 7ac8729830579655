"""Runs that are asked to end: all ranks after the same step, with a whole checkpoint, and on from there."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import fork, free_port, kill, rank_variables, run_ranks
from training.layouts import ADAMW, MODEL, TRAINING

from neox.checkpoint.native.integrity import damages
from neox.config import config_from_dict
from neox.training.ending import Pace
from neox.training.saving import Saver
from neox.training.signals import noted_signals

STEPS = 12


def settings(save: Path, corpus: str, **changes: Any) -> dict[str, Any]:
    run = {"data_path": corpus, "save": str(save), "load": str(save), "checkpoint_factor": 1000, "log_interval": 1}
    run |= {"train_iters": STEPS, "model_parallel_size": 2, "hidden_dropout": 0.1, "requeue_status": 75}
    return MODEL | TRAINING | ADAMW | run | changes


def losses(save: Path) -> list[tuple[int, float]]:
    records = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    return [(record["step"], record["train/lm_loss"]) for record in records]


def train_asked(flat: dict[str, Any], rank: int, moment: str, ask: Callable[[Path], object]) -> tuple[int, int, str]:
    """Train, and on one rank ask for the end: at the start, in the fourth step, or in the last one of the run.

    Returns:
        Iteration after which it ended, exit status, the last line that was written to stderr.
    """
    import io
    from contextlib import redirect_stderr

    import neox.training.ending as ending
    import neox.training.run as run
    from neox.training.plain import PlainEngine

    torch.set_num_threads(1)
    ending._SECONDS_BETWEEN_LOOKS = 0.0  # a whole run takes less than one second
    step, build, steps = PlainEngine.train_step, run.build_datasets, 0
    is_asked = int(os.environ["RANK"]) == rank

    def counted(engine: PlainEngine, batch: Any) -> torch.Tensor:
        nonlocal steps
        steps += 1
        if is_asked and ((steps == 4 and moment == "fourth") or (steps == STEPS - 10 and moment == "last")):
            ask(Path(flat["save"]))
        return step(engine, batch)

    def built(*arguments: Any, **named: Any) -> Any:
        if is_asked and moment == "start":
            ask(Path(flat["save"]))
        return build(*arguments, **named)

    PlainEngine.train_step, run.build_datasets = counted, built  # type: ignore[assignment,method-assign]
    with redirect_stderr(io.StringIO()) as said:
        outcome = run.train(config_from_dict(flat, world_size=4))
    return outcome.progress.iteration, outcome.status, (said.getvalue().splitlines() or [""])[-1]


def warned(save: Path) -> None:
    os.kill(os.getpid(), signal.SIGUSR1)


def interrupted(save: Path) -> None:
    os.kill(os.getpid(), signal.SIGINT)


def stopped(save: Path) -> None:
    (save / "STOP").touch()


def late(save: Path) -> None:
    now = time.time
    time.time = lambda: now() + 1e6


def not_asked(save: Path) -> None:
    raise AssertionError("nobody asks")


def one_answer(found: list[tuple[int, int, str]]) -> tuple[int, int, str]:
    """What all ranks agree on, and what the first one said of it; the others say nothing."""
    assert len({(iteration, status) for iteration, status, _ in found}) == 1
    assert [said for _, _, said in found[1:]] == [""] * 3
    return found[0]


def test_all_ranks_end_after_the_same_step_and_go_on_from_there(tmp_path: Path, corpus: str) -> None:
    """One run in five turns, each ended in another way on one rank of four, against the same run in one turn."""
    flat = settings(tmp_path / "turns", corpus)
    save = tmp_path / "turns"

    def turn(rank: int, moment: str, ask: Callable[[Path], object], **changes: Any) -> tuple[int, int, str]:
        return one_answer(run_ranks(train_asked, 4, flat | changes, rank, moment, ask))

    way_on = "; the same command goes on from there"
    # The step in which it is asked, and the one in which the others hear of it.
    assert turn(3, "fourth", warned) == (
        5,
        75,
        f"SIGUSR1: ended after iteration 5 of 12; saved in {save / 'global_step5'}{way_on}",
    )
    assert damages(save / "global_step5") == []
    assert turn(2, "start", interrupted)[:2] == (5, 0)
    assert turn(0, "fourth", late, time_limit="24:00:00") == (
        10,
        75,
        f"time_limit 86400 s: ended after iteration 10 of 12; saved in {save / 'global_step10'}{way_on}",
    )
    (save / "STOP").touch()
    assert turn(0, "never", not_asked) == (
        10,
        0,
        f"stop_file {save / 'STOP'}: ended before the first step, at iteration 10 of 12; nothing new to save",
    )
    assert not (save / "STOP").exists()
    # Too late to end early: what ends is the run.
    assert turn(2, "last", warned)[:2] == (12, 0)
    whole = settings(tmp_path / "whole", corpus)
    run_ranks(train_asked, 4, whole, 0, "never", not_asked)
    assert losses(save) == losses(tmp_path / "whole")
    assert (save / "latest").read_text() == "global_step12"


def test_a_second_interrupt_ends_a_process_that_hangs_in_a_library() -> None:
    """The main thread never gets to run a handler: it waits for a lock that it has itself."""
    script = """
import ctypes
from neox.training.signals import noted_signals
libc, lock = ctypes.CDLL(None), ctypes.create_string_buffer(64)
with noted_signals() as signals:
    signals.have_met = True
    print("ready", flush=True)
    libc.pthread_mutex_lock(lock)
    libc.pthread_mutex_lock(lock)
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline().startswith(b"SIGINT: the run ends after its step")
        deadline = time.monotonic() + 240
        while process.poll() is None:  # at once it would pass for an echo of the first
            assert time.monotonic() < deadline
            process.send_signal(signal.SIGINT)
            time.sleep(0.05)
        assert process.communicate()[1] == b""
    finally:
        process.kill()
    assert process.returncode == 130


@pytest.mark.parametrize("signum", [signal.SIGHUP, signal.SIGINT])
def test_a_signal_that_is_ignored_when_a_run_starts_stays_so(signum: signal.Signals) -> None:
    before = signal.signal(signum, signal.SIG_IGN)
    try:
        with noted_signals() as signals:
            signals.have_met = True
            signal.raise_signal(signum)
            signal.raise_signal(signal.SIGUSR1)
        assert signals.received == [signal.SIGUSR1]
        assert signal.getsignal(signum) is signal.SIG_IGN
    finally:
        signal.signal(signum, before)


def train_alone(flat: dict[str, Any], variables: dict[str, str]) -> None:
    import neox.training.run as run

    os.environ.update(variables)
    raise SystemExit(run.train(config_from_dict(flat, world_size=2)).status)


def test_a_rank_that_waits_for_the_others_ends_at_once(tmp_path: Path) -> None:
    port = free_port()
    flat = settings(tmp_path / "run", str(tmp_path / "never_read"))
    process = fork(train_alone, flat, rank_variables(0, 2, port))
    try:
        deadline = time.monotonic() + 240
        while socket.socket().connect_ex(("127.0.0.1", port)):
            assert time.monotonic() < deadline
            assert process.is_alive()
            time.sleep(0.05)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGTERM)
        process.join(240)
        assert process.exitcode == 75
    finally:
        kill([process])


def test_time_that_is_kept_free_before_a_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    now, save = 0.0, None
    monkeypatch.setattr(time, "monotonic", lambda: now)
    pace = Pace(lambda: save, unknown_save=60.0)
    pace.begin()
    for step, callbacks in ((100.0, 0.5), (2.0, 0.5), (3.0, 7.0), (1.0, 0.5)):
        now += step
        pace.step_done()
        now += callbacks
        pace.callbacks_done()
    # The first step, in which kernels are compiled, does not count.
    assert pace.seconds_to_end() == 2 * (3 + 7) + 60 + 5
    save = 12.0
    assert pace.seconds_to_end() == 2 * (3 + 7) + 12 + 5


def test_a_save_in_the_background_may_have_to_wait_for_another() -> None:
    saver = object.__new__(Saver)
    saver.longest, saver._background = 7.0, None
    assert saver.seconds_to_save == 7.0
    saver._background = object()  # type: ignore[assignment]
    assert saver.seconds_to_save == 14.0
    saver.longest = None
    assert saver.seconds_to_save is None
