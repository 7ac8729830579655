"""Batch files of `neox.launch slurm` in a real Slurm: submitted, warned, requeued, resumed."""

import os
import re
import signal
import sys

from hosts import Cluster, rank_process, wait_until
from tiny_run import Training, losses_by_step, wait_for_step_after

PYTHON = sys.executable
STEPS = 200


def submit(made: Cluster, words: list[str]) -> str:
    """Write and submit a batch file; return the job's number."""
    flags = ["--nodes", "2", "--gpus-per-node", "0", "--tasks-per-node", "1", "--submit"]
    script = ["--script", words[0], *words[1:]]
    status, out = made.run("n1", PYTHON, "-m", "neox.launch", "slurm", *script, *flags)
    assert status == 0, out
    found = re.search(r"^job (\d+)$", out, flags=re.MULTILINE)
    assert found, out
    return found[1]


def state_of(made: Cluster, job: str) -> str:
    """Slurm's word for where the job stands."""
    out = made.run("n1", "scontrol", "show", "job", job)[1]
    found = re.search(r"JobState=(\w+)", out)
    return found[1] if found else out


def test_a_job_that_loses_a_rank_and_is_warned_goes_on_where_it_was(slurm: Cluster, training: Training) -> None:
    """Nothing says `load`: what is started again goes on from its own checkpoints."""
    save = slurm.folder / "long"
    words = training.held_script(save, f"train_iters={STEPS}", "checkpoint_factor=20", "preflight=true")
    with training.held():
        job = submit(slurm, [*words, "--name", "long"])
        log = slurm.folder / "logs" / f"long-{job}.out"
        wait_until((save / "latest").is_file, "the first checkpoint", 600)
        os.kill(rank_process(save, 1), signal.SIGKILL)
        wait_for_step_after(save, lambda: "samples consumed" in log.read_text(), "the restart")
        # What Slurm itself does at --signal's time, which it only checks once a minute.
        status, out = slurm.run("n1", "scancel", "--batch", "--signal=USR1", job)
        assert status == 0, out
        wait_until(lambda: "SIGUSR1: ended after iteration" in log.read_text(), "the end that was asked for", 600)
    wait_until(lambda: state_of(slurm, job) == "COMPLETED", "the end of the job", 600)
    said = log.read_text()
    assert (save / "latest").read_text() == f"global_step{STEPS}"
    assert said.count("restart 1 of 3") == 1, said
    assert said.count("launcher: Slurm; rank 0 of 2") == 3, said
    assert said.count("2 hosts: go") == 2, said
    assert said.count("samples consumed") == 2, said
    assert list(losses_by_step(save)) == list(range(1, STEPS + 1))
    assert "Restarts=1" in slurm.run("n1", "scontrol", "show", "job", job)[1]


def test_a_mistake_is_not_tried_again(slurm: Cluster, training: Training) -> None:
    save = slurm.folder / "never"
    job = submit(slurm, [*training.script(save, "data_path=nowhere"), "--name", "mistake"])
    wait_until(lambda: state_of(slurm, job) == "FAILED", "the end of the job", 600)
    log = (slurm.folder / "logs" / f"mistake-{job}.out").read_text()
    assert log.count("nowhere.idx: no such file") == 1
    assert "restart" not in log
