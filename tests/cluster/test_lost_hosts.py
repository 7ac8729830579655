"""Runs on two hosts that lose a process, then a host, go on alone, and have the losses of one that lost none."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hosts import NAMES, Cluster, rank_process, wait_until
from tiny_run import Training, losses_by_step, wait_for_step_after

PYTHON = sys.executable
STEPS = 150
RUN = (f"train_iters={STEPS}", "checkpoint_factor=10", "distributed_timeout=20")
ELASTIC = ("elastic=true", "train_micro_batch_size_per_gpu=4")


@pytest.fixture(scope="module")
def undisturbed(two: Cluster, training: Training) -> dict[int, float]:
    """Losses of the run by one process."""
    save = two.folder / "undisturbed"
    status, out = two.run("n1", PYTHON, *training.script(save, *RUN, "num_gpus=1"))
    assert status == 0, out
    return losses_by_step(save)


def wait_for_checkpoint(save: Path, step: int) -> None:
    def is_there() -> bool:
        latest = save / "latest"
        return latest.exists() and int(latest.read_text().removeprefix("global_step")) >= step

    wait_until(is_there, f"checkpoint {step}", 600)


def has_rank(save: Path, rank: int) -> bool:
    try:
        return rank_process(save, rank) > 0
    except ProcessLookupError:
        return False


def seconds_to_next_step(save: Path, *outs: Path) -> float:
    """From now on, when a fault has just been caused, to the first step of a run that was taken up."""

    def resumptions() -> int:
        return sum(len(re.findall(r"resume .*: iteration", out.read_text())) for out in outs)

    begun, before = time.monotonic(), resumptions()
    wait_for_step_after(save, lambda: resumptions() > before, "the resumption")
    return time.monotonic() - begun


def kill_a_rank(save: Path, *outs: Path) -> float:
    """Kill rank 1 of a run that has saved; the seconds to its next step, after which it has saved again."""
    wait_for_checkpoint(save, 10)
    os.kill(rank_process(save, 1), signal.SIGKILL)
    seconds = seconds_to_next_step(save, *outs)
    wait_for_checkpoint(save, 30)
    return seconds


def start_logged(made: Cluster, host: str, log: Path, words: list[str]) -> "subprocess.Popen[str]":
    """Start a command on a host; what it prints goes to a file, as nobody reads while it runs."""
    return made.start(host, "sh", "-c", 'log=$1; shift; exec "$@" >$log 2>&1', "sh", log, *words)


@contextlib.contextmanager
def cut(two: Cluster, host: str) -> Iterator[None]:
    """A host without a link."""
    two.set_link(host, "down")
    try:
        yield
    finally:
        two.set_link(host, "up")


def tell(capsys: pytest.CaptureFixture[str], launcher: str, killed: float, alone: float) -> None:
    with capsys.disabled():
        print(f"\n{launcher}: next step {killed:.1f} s after a rank was killed, {alone:.1f} s after a link was cut")


def assert_done(save: Path, undisturbed: dict[int, float], out: str) -> None:
    assert (save / "latest").read_text() == f"global_step{STEPS}", out
    assert losses_by_step(save) == pytest.approx(undisturbed, abs=1e-5)


def test_torchrun_goes_on_with_the_host_that_is_left(
    two: Cluster, training: Training, undisturbed: dict[int, float], capsys: pytest.CaptureFixture[str]
) -> None:
    """A rank is killed, and both hosts start again; then a link is cut, and one goes on alone."""
    save = two.folder / "torchrun-restarts"
    meet = ["--nnodes", "1:2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "n1:29641", "--rdzv-id", "restarts"]
    meet += ["--rdzv-conf", "join_timeout=240,last_call_timeout=12", "--max-restarts", "3"]
    start = [PYTHON, "-m", "torch.distributed.run", "--nproc-per-node", "1", *meet]
    logs: list[Path] = [two.folder / f"torchrun-restarts-{host}.log" for host in NAMES]
    words = [*start, *training.held_script(save, *RUN, *ELASTIC)]
    agents = [start_logged(two, host, log, words) for host, log in zip(NAMES, logs, strict=True)]
    try:
        with training.held() as hold:
            killed = kill_a_rank(save, *logs)
            with cut(two, "n2"):
                alone = seconds_to_next_step(save, *logs)
                hold.unlink()
                status = agents[0].wait(600)
    finally:
        for agent in agents:  # the one that is cut off waits for the other's store, for minutes
            agent.kill()
            agent.wait()
    out = "\n".join(log.read_text() for log in logs)
    assert status == 0, out
    assert_done(save, undisturbed, out)
    assert "data 2 x tensor 1, ZeRO 0 -> pipeline 1 x data 1" in out
    tell(capsys, "torchrun", killed, alone)


def test_ssh_goes_on_with_the_host_that_is_left(
    ssh: Cluster, training: Training, undisturbed: dict[int, float], capsys: pytest.CaptureFixture[str]
) -> None:
    """The same over ssh; what was cut off has ended by itself."""
    save = ssh.folder / "ssh-restarts"
    over = ("launcher=ssh", f"hostfile={ssh.folder / 'hosts'}", "max_restarts=3", "master_port=29650")
    log = ssh.folder / "ssh-restarts.log"
    words = [PYTHON, *training.held_script(save, *RUN, *ELASTIC, *over)]
    process: subprocess.Popen[str] = ssh.start(
        "n1", "sh", "-c", 'log=$1; shift; exec "$@" >$log 2>&1', "sh", log, *words
    )
    try:
        with training.held() as hold:
            killed = kill_a_rank(save, log)
            with cut(ssh, "n2"):
                alone = seconds_to_next_step(save, log)
                hold.unlink()
                status = process.wait(600)
                wait_until(lambda: not has_rank(save, 1), "the end of the rank that was cut off", 240)
    finally:
        process.kill()
        process.wait()
    out = log.read_text()
    assert status == 0, out
    assert_done(save, undisturbed, out)
    # Which of the two the launcher sees first, the rank that was killed or the one that the watch ended, is open.
    assert re.search(r"^status (137|3); restart 1 of 3$", out, flags=re.MULTILINE), out
    assert "elastic: n2 is left out, it does not answer over ssh" in out
    tell(capsys, "ssh", killed, alone)
