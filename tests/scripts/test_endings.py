"""train.py asked to end: by a scheduler that tells every process of the job, and through its launcher."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from training.layouts import ADAMW, MODEL, TRAINING, write_corpus

from neox.checkpoint.native.integrity import damages

ROOT = Path(__file__).parents[2]


def processes_of(pid: int) -> list[int]:
    """A process and all that descend from it."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += processes_of(int(child))
    return found


def tell_all(pid: int) -> None:
    for signum in (signal.SIGHUP, signal.SIGUSR1):
        for process in processes_of(pid):
            os.kill(process, signum)


def tell_launcher(pid: int) -> None:
    os.kill(pid, signal.SIGTERM)


def steps(save: Path) -> list[int]:
    log = save / "metrics.jsonl"
    whole = log.read_text().rpartition("\n")[0] if log.exists() else ""  # without a line that is being written
    return [json.loads(line)["step"] for line in whole.splitlines()]


def run_and_ask(config: Path, save: Path, ask: Callable[[int], None]) -> tuple[int, str]:
    """Start two ranks with a process each that reads ahead, as `nohup` does; `ask` when some steps are done."""
    nohup = ["sh", "-c", 'trap "" HUP; exec "$@"', "sh"]
    process = subprocess.Popen(
        [*nohup, sys.executable, str(ROOT / "train.py"), str(config)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        before, deadline = len(steps(save)), time.monotonic() + 240
        while len(steps(save)) < before + 3:
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline, "no step in time"
            time.sleep(0.05)
        ask(process.pid)
        err = process.communicate(timeout=240)[1]
        return process.returncode, err
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def config(tmp_path: Path) -> Path:
    save = str(tmp_path / "run")
    flat = {"data_path": write_corpus(tmp_path / "corpus_text_document"), "save": save, "load": save, "num_gpus": 2}
    flat |= {"checkpoint_factor": 10_000, "train_iters": 10_000, "log_interval": 1, "num_workers": 1}
    path = tmp_path / "model.yml"
    path.write_text(json.dumps(MODEL | TRAINING | ADAMW | flat | {"requeue_status": 75}))
    return path


def test_a_signal_that_comes_before_anything_is_ready(config: Path) -> None:
    process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), str(config)], stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while not handles(process.pid, signal.SIGTERM):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 75, err
    assert err.splitlines()[-1] == "SIGTERM: ended before the first step; nothing to save"
    assert "Traceback" not in err


def handles(pid: int, signum: int) -> bool:
    """Whether a process has a handler of its own for a signal."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = int(status.partition("SigCgt:")[2].split()[0], 16)
    return bool(caught >> (signum - 1) & 1)


def test_signals_end_a_run_that_the_same_command_takes_up_again(tmp_path: Path, config: Path) -> None:
    save, last = tmp_path / "run", 0
    for ask, name in ((tell_all, "SIGUSR1"), (tell_launcher, "SIGTERM")):
        status, err = run_and_ask(config, save, ask)
        assert status == 75, err
        first, last = last + 1, int((save / "latest").read_text().removeprefix("global_step"))
        assert f"{name}: ended after iteration {last} of 10000; saved in {save / f'global_step{last}'}" in err
        assert damages(save / f"global_step{last}") == []
        assert steps(save)[first - 1 :] == list(range(first, last + 1))
